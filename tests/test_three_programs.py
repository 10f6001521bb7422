"""What is special in three programs of examples/, which test_programs.py runs: dates, irregular series and CartPole."""

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
