"""examples/irregular.py: its observations, models and baselines."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from programs import load, refusal
from torch.testing import assert_close

script = load("examples/irregular.py")

NAN = math.nan


def at(*numbers):
    return torch.tensor(numbers)


def sine(num_hours):
    """Two places with a daily cycle of 10 °C."""
    angle = torch.arange(num_hours) * (2 * math.pi / 24)
    return script.normalized(10 * torch.stack([angle.sin(), angle.cos()]))


def draw(series, mean_gap, starts=(0, 300)):
    places = torch.arange(len(starts)) % len(series.values)
    return script.observe(series, places, torch.tensor(starts), mean_gap, torch.Generator().manual_seed(0))


def test_temperatures_are_read_and_normalized(tmp_path):
    path = tmp_path / "weather.csv"
    rows = ["JFK,2013-01-31T22:00:00Z,32", "JFK,2013-01-31T23:00:00Z,50", "JFK,2013-02-01T00:00:00Z,NA"]
    rows += ["JFK,2013-02-01T01:00:00Z,68", "EWR,2013-01-31T22:00:00Z,50", "EWR,2013-02-01T00:00:00Z,32"]
    path.write_text("\n".join(["origin,time_hour,temp", *rows]), encoding="utf-8")
    series = script.read(path)
    # 0, 10, 10 and 0 °C in the three training hours: the mean is 5 and the standard deviation 5.
    assert_close(series.values, at([1, NAN, -1, NAN], [-1, 1, NAN, 3]), equal_nan=True)
    assert series.num_train == 3
    assert series.scale == pytest.approx(5)


def test_observations(monkeypatch):
    monkeypatch.setattr(script, "WINDOW", 6)
    monkeypatch.setattr(script, "HORIZON", 2)
    values = at([9.0, 0, 1, NAN, 3, 4, 6, 9, NAN], [NAN, NAN, NAN, NAN, 5, NAN, 4, NAN, 1])
    batch = script.observe(script.Series(values, 0, 1.0), at(0, 1), at(1, 1), 1, torch.Generator())
    assert batch.hours[0].tolist() == [1, 2, 4, 5, 6]
    assert batch.hours[1, :2].tolist() == [4, 6]
    assert_close(batch.values, at([0.0, 1, 3, 4, 6], [5, 4, 0, 0, 0]))
    assert_close(batch.dt, at([3.0, 1, 2, 1, 1], [3, 2, 3, 3, 3]) / 3)
    # Only the second half of the window counts, and only if the target is known and the observation is no padding.
    assert batch.is_scored.tolist() == [[False, False, True, True, False], [True, True, False, False, False]]
    assert batch.target[batch.is_scored].tolist() == [3, 5, -1, -3]


@pytest.mark.parametrize("clock", [False, True])
@pytest.mark.parametrize("name", script.MODELS)
def test_models_see_the_past_and_the_elapsed_times_that_they_should(name, clock):
    model = script.Model(name, 8, 2, "rotation", clock)
    batch = draw(sine(1000), 3)
    forecast = model(batch)
    assert forecast.shape == batch.target.shape

    def changed(field):
        other = getattr(batch, field).clone()
        other[:, 20] += 1
        difference = (model(batch._replace(**{field: other})) - forecast).abs().amax(0)
        assert (difference[:20] == 0).all()
        return bool((difference[20:25] > 1e-6).all())

    assert changed("values")
    assert changed("dt") == (name != "minGRU-none")
    assert changed("hours") == clock
    assert not changed("target")


def test_training_does_not_read_the_test_hours(monkeypatch):
    last, observe, series = [], script.observe, sine(1000)
    monkeypatch.setattr(script, "observe", lambda *x: last.append(int(x[2].max())) or observe(*x))
    monkeypatch.setattr(script, "evaluate", lambda *_: None)
    args = SimpleNamespace(hidden_dims=2, num_layers=1, gate="sigmoid", clock=False, batch_size=500, train_gaps=[3])
    args.num_steps, fabric = 5, SimpleNamespace(to_device=lambda x: x)

    def train(num_steps, loss_of, model, schedule_of):
        assert all(loss_of(model, step) > 0 for step in range(num_steps))
        return model

    script.train(SimpleNamespace(args=args, fabric=fabric, train=train, seconds=0), "minGRU-none", series, 0)
    assert max(last[:5]) + script.WINDOW + script.HORIZON == series.num_train


def test_errors_of_known_forecasts():
    series = sine(2400)
    # A cycle of 10 °C, a quarter of it later, differs by 10 °C (root mean square).
    no_change = script.evaluate(script.baseline("no change", series), series)
    assert no_change[0] == pytest.approx(10, rel=1e-4)
    assert no_change == pytest.approx([10] * len(script.GAPS), rel=0.1)
    half = pytest.approx([series.scale / 2] * len(script.GAPS))
    assert script.evaluate(lambda batch: batch.target + 0.5, series) == half
    alike = series._replace(values=series.values[:1].expand(2, -1))
    assert script.evaluate(script.baseline("daily mean", alike), alike) == pytest.approx([0] * 5, abs=1e-3)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("JFK,2013-01-31T22:00:00Z,NA", "must be .*, got no observations"),
        ("JFK,31.01.2013,32", "must be .*, got time data '31.01.2013' does not match"),
        ("JFK,2013-01-31T22:00:00Z,cold", "must be .* numbers or NA as temp, .*, got .*'cold'"),
        ("JFK,2013-01-31T22:00:00Z,32", "must have at least 984 hours, got 1"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, row, says):
    (tmp_path / "bad.csv").write_text(f"origin,time_hour,temp\n{row}\n", encoding="utf-8")
    assert re.search(says, refusal(script.main, ["--csv", str(tmp_path / "bad.csv")]))
