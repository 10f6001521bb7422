"""examples/memory_cartpole.py: rollouts, resets and advantages."""

import copy
from types import SimpleNamespace

import pytest
import torch
from programs import load
from torch.testing import assert_close

script = load("examples/memory_cartpole.py")


@pytest.mark.parametrize("name", script.POLICIES)
def test_one_pass_equals_the_rollout(name):
    torch.manual_seed(0)
    policy, player = script.Policy(name, 8), script.Player(5, 0)
    player.play(policy, 20)
    state = player.state
    data, *_ = player.play(policy, 60)
    assert data.reset.any(1).sum() > 5
    with torch.no_grad():
        logits, value, last = policy(data.x, state, data.reset)
    assert_close(value, data.value)
    assert_close(torch.distributions.Categorical(logits=logits).log_prob(data.action), data.log_prob)
    for h, expected in zip(last, player.state, strict=True):
        assert_close(h, expected)
    # The loss of PPO depends on the resets: the policy has a memory, or none.
    with torch.no_grad():
        _, other, _ = policy(data.x, state, torch.zeros_like(data.reset))
    assert torch.equal(other, value) == (name == "no memory")


def test_episodes():
    torch.manual_seed(0)
    data, _, returns = script.Player(4, 0).play(script.Policy("minGRU", 8), 200)
    assert data.reset[0].all()
    assert torch.equal(data.reset[1:], data.is_last[:-1])
    assert torch.equal(data.terminated[:-1], data.is_last[1:])
    # In CartPole-v1, an episode begins within 0.05 of the middle.
    assert (data.x[data.reset] * torch.tensor([2.4, 0.2095])).abs().max() <= 0.05
    # The last position of an episode is at a limit.
    assert (data.x[data.is_last].abs().amax(1) > 0.999).all()
    assert (data.x[~data.is_last].abs().amax(1) < 1.001).all()
    assert (data.reward == (~data.is_last).float()).all()
    unfinished = data.reward[data.is_last.flip(0).cumsum(0).flip(0) == 0]
    assert sum(returns) + unfinished.sum() == pytest.approx(data.reward.sum().item())


def test_advantages():
    """An episode that ends because the pole falls, and one that ends because of its length; both end after step 2."""
    value, last_value = torch.tensor([[1.0, 2.0, 4.0, 8.0]]).expand(2, 4).T, torch.tensor([[16.0, 16.0]])
    is_last = torch.tensor([False, False, True, False])[:, None].expand(4, 2)
    terminated = torch.zeros(4, 2, dtype=torch.bool)
    terminated[1, 0] = True
    data = script.Rollout(None, None, is_last, None, None, value, (~is_last).float(), terminated)
    decay = 0.99 * 0.95
    last = 0.01 + 0.99 * 16 - 8
    fallen, truncated = 0.01 - 2, 0.01 + 0.99 * 4 - 2
    first = 0.01 + 0.99 * 2 - 1
    expected = [[first + decay * end, end, 0.0, last] for end in (fallen, truncated)]
    assert_close(script.advantages(data, last_value), torch.tensor(expected).T)


def test_only_first_episodes_are_evaluated(monkeypatch):
    reset = torch.tensor([[1, 1], [0, 0], [0, 1], [1, 0]]).bool()
    reward = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    found = SimpleNamespace(reset=reset, reward=reward), None, []
    played = SimpleNamespace(play=lambda policy, num_steps, is_greedy: found)
    monkeypatch.setattr(script, "Player", lambda *_: played)
    assert script.evaluate(None, 0) == 1.5


@pytest.mark.parametrize("name", script.POLICIES)
def test_a_player_goes_on_as_before(name):
    torch.manual_seed(0)
    policy, player = script.Policy(name, 8), script.Player(5, 0)
    player.play(policy, 30)
    saved, random_state = copy.deepcopy(player.state_dict()), torch.get_rng_state()
    expected, *_ = player.play(policy, 60)
    assert expected.reset.any(1).sum() > 5
    other = script.Player(5, 1)
    other.load_state_dict(saved)
    torch.set_rng_state(random_state)
    assert_close(other.play(policy, 60)[0], expected, rtol=0, atol=0)
