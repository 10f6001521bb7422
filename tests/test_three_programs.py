"""What is special in three programs of examples/, which test_programs.py runs: dates, irregular series and CartPole."""

import copy
import math
import re
from types import SimpleNamespace

import pytest
import torch
from programs import load
from torch.testing import assert_close

# encoder_decoder.py, written for nn.GRU

dates = load("examples/encoder_decoder.py")


def test_short_runs_of_both(capsys, monkeypatch, tmp_path):
    """What dates have in common, such as the dashes and most first digits, is learned first."""
    monkeypatch.setattr(dates, "EPOCH", 60)
    small = "--accelerator cpu --steps 100 --batch 32 --num-tests 20 --hidden-dims 32 --lr 0.01".split()
    dates.main([*small, "--checkpoint", str(tmp_path / "run.pt"), "--save-every", "60"])
    lines = [line for line in capsys.readouterr().out.splitlines() if ": step " in line]
    line = r"(\w+\.?\w+): step (\d+), training loss (\d+\.\d{4}), \d+\.\d{2}% of unseen dates right, .+ s"
    found = [re.fullmatch(line, each).groups() for each in lines]
    expected = [(name, step) for name in ("accelerated", "nn.GRU") for step in ("60", "100")]
    assert [(name, step) for name, step, *_ in found] == expected
    for first, last in (found[:2], found[2:]):
        assert 2.5 > float(first[2]) > float(last[2]) < 2.0  # near log(11) at first
    losses = [float(each[2]) for each in found]
    assert losses[2:] == pytest.approx(losses[:2], abs=2e-3)  # the same function


# irregular.py

irregular = load("examples/irregular.py")

NAN = math.nan


def at(*numbers):
    return torch.tensor(numbers)


def sine(num_hours):
    """Two places with a daily cycle of 10 °C."""
    angle = torch.arange(num_hours) * (2 * math.pi / 24)
    return irregular.normalized(10 * torch.stack([angle.sin(), angle.cos()]))


def draw(series, mean_gap, starts=(0, 300)):
    places = torch.arange(len(starts)) % len(series.values)
    return irregular.observe(series, places, torch.tensor(starts), mean_gap, torch.Generator().manual_seed(0))


def test_temperatures_are_read_and_normalized(tmp_path):
    path = tmp_path / "weather.csv"
    rows = ["JFK,2013-01-31T22:00:00Z,32", "JFK,2013-01-31T23:00:00Z,50", "JFK,2013-02-01T00:00:00Z,NA"]
    rows += ["JFK,2013-02-01T01:00:00Z,68", "EWR,2013-01-31T22:00:00Z,50", "EWR,2013-02-01T00:00:00Z,32"]
    path.write_text("\n".join(["origin,time_hour,temp", *rows]), encoding="utf-8")
    series = irregular.read(path)
    # 0, 10, 10 and 0 °C in the three training hours: the mean is 5 and the standard deviation 5.
    assert_close(series.values, at([1, NAN, -1, NAN], [-1, 1, NAN, 3]), equal_nan=True)
    assert series.num_train == 3 and series.scale == pytest.approx(5)


def test_observations(monkeypatch):
    monkeypatch.setattr(irregular, "WINDOW", 6)
    monkeypatch.setattr(irregular, "HORIZON", 2)
    values = at([9.0, 0, 1, NAN, 3, 4, 6, 9, NAN], [NAN, NAN, NAN, NAN, 5, NAN, 4, NAN, 1])
    batch = irregular.observe(irregular.Series(values, 0, 1.0), at(0, 1), at(1, 1), 1, torch.Generator())
    assert batch.hours[0].tolist() == [1, 2, 4, 5, 6] and batch.hours[1, :2].tolist() == [4, 6]
    assert_close(batch.values, at([0.0, 1, 3, 4, 6], [5, 4, 0, 0, 0]))
    assert_close(batch.dt, at([3.0, 1, 2, 1, 1], [3, 2, 3, 3, 3]) / 3)
    # Only the second half of the window counts, and only if the target is known and the observation is no padding.
    assert batch.is_scored.tolist() == [[False, False, True, True, False], [True, True, False, False, False]]
    assert batch.target[batch.is_scored].tolist() == [3, 5, -1, -3]


@pytest.mark.parametrize("clock", [False, True])
@pytest.mark.parametrize("name", irregular.MODELS)
def test_models_see_the_past_and_the_elapsed_times_that_they_should(name, clock):
    model = irregular.Model(name, 8, 2, clock)
    batch = draw(sine(1000), 3)
    forecast = model(batch)
    assert forecast.shape == batch.target.shape

    def changed(field):
        other = getattr(batch, field).clone()
        other[:, 20] += 1
        difference = (model(batch._replace(**{field: other})) - forecast).abs().amax(0)
        assert (difference[:20] == 0).all()
        return bool((difference[20:25] > 1e-6).all())

    assert changed("values") and changed("dt") == (name != "minGRU-none")
    assert changed("hours") == clock and not changed("target")


def test_training_does_not_read_the_test_hours(monkeypatch):
    last, observe, series = [], irregular.observe, sine(1000)
    monkeypatch.setattr(irregular, "observe", lambda *x: last.append(int(x[2].max())) or observe(*x))
    monkeypatch.setattr(irregular, "evaluate", lambda *_: None)
    args = SimpleNamespace(hidden_dims=8, num_layers=1, clock=False, batch_size=500, train_gaps=[3])
    args.num_steps, fabric = 5, SimpleNamespace(to_device=lambda x: x)

    def train(num_steps, loss_of, model, schedule_of):
        assert all(loss_of(model, step) > 0 for step in range(num_steps))
        return model

    irregular.train(SimpleNamespace(args=args, fabric=fabric, train=train, seconds=0), "minGRU-none", series, 0)
    assert max(last[:5]) + irregular.WINDOW + irregular.HORIZON == series.num_train


def test_errors_of_known_forecasts():
    series = sine(2400)
    # A cycle of 10 °C, a quarter of it later, differs by 10 °C (root mean square).
    no_change = irregular.evaluate(irregular.baseline("no change", series), series)
    assert no_change[0] == pytest.approx(10, rel=1e-4)
    assert no_change == pytest.approx([10] * len(irregular.GAPS), rel=0.1)
    half = pytest.approx([series.scale / 2] * len(irregular.GAPS))
    assert irregular.evaluate(lambda batch: batch.target + 0.5, series) == half
    alike = series._replace(values=series.values[:1].expand(2, -1))
    assert irregular.evaluate(irregular.baseline("daily mean", alike), alike) == pytest.approx([0] * 5, abs=1e-3)


# memory_cartpole.py

cartpole = load("examples/memory_cartpole.py")


@pytest.mark.parametrize("name", cartpole.POLICIES)
def test_one_pass_equals_the_rollout(name):
    torch.manual_seed(0)
    policy, player = cartpole.Policy(name, 8), cartpole.Player(5, 0)
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
    data, _, returns = cartpole.Player(4, 0).play(cartpole.Policy("minGRU", 8), 200)
    assert data.reset[0].all() and torch.equal(data.reset[1:], data.is_last[:-1])
    assert torch.equal(data.terminated[:-1], data.is_last[1:])
    # In CartPole-v1, an episode begins within 0.05 of the middle.
    assert (data.x[data.reset] * torch.tensor([2.4, 0.2095])).abs().max() <= 0.05
    # The last position of an episode is at a limit.
    assert (data.x[data.is_last].abs().amax(1) > 0.999).all() and (data.x[~data.is_last].abs().amax(1) < 1.001).all()
    assert (data.reward == (~data.is_last).float()).all()
    unfinished = data.reward[data.is_last.flip(0).cumsum(0).flip(0) == 0]
    assert sum(returns) + unfinished.sum() == pytest.approx(data.reward.sum().item())


def test_advantages():
    """An episode that ends because the pole falls, and one that ends because of its length; both end after step 2."""
    value, last_value = torch.tensor([[1.0, 2.0, 4.0, 8.0]]).expand(2, 4).T, torch.tensor([[16.0, 16.0]])
    is_last = torch.tensor([False, False, True, False])[:, None].expand(4, 2)
    terminated = torch.zeros(4, 2, dtype=torch.bool)
    terminated[1, 0] = True
    data = cartpole.Rollout(None, None, is_last, None, None, value, (~is_last).float(), terminated)
    decay = 0.99 * 0.95
    last = 0.01 + 0.99 * 16 - 8
    fallen, truncated = 0.01 - 2, 0.01 + 0.99 * 4 - 2
    first = 0.01 + 0.99 * 2 - 1
    expected = [[first + decay * end, end, 0.0, last] for end in (fallen, truncated)]
    assert_close(cartpole.advantages(data, last_value), torch.tensor(expected).T)


@pytest.mark.parametrize("name", cartpole.POLICIES)
def test_a_player_goes_on_as_before(name):
    torch.manual_seed(0)
    policy, player = cartpole.Policy(name, 8), cartpole.Player(5, 0)
    player.play(policy, 30)
    saved, random_state = copy.deepcopy(player.state_dict()), torch.get_rng_state()
    expected, *_ = player.play(policy, 60)
    assert expected.reset.any(1).sum() > 5
    other = cartpole.Player(5, 1)
    other.load_state_dict(saved)
    torch.set_rng_state(random_state)
    assert_close(other.play(policy, 60)[0], expected, rtol=0, atol=0)
