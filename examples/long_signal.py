"""Forecast an electrocardiogram of 1.5 million time steps, and compute all of them in one call.

    pip install ".[examples]"                 # in a clone of the repository
    pip install --no-deps systole==0.3.1      # the recording
    python examples/long_signal.py            # with a picture in long_signal.png

The recording is 25 minutes of a healthy person, 1,000 values per second (Legrand et al. 2020, Scientific Reports 10).
It comes from the PyPI package systole 0.3.1, whose license is GPL 3.0. The program reads its file, and does not import
it.

1. Forecasts of the value 10, 50 and 200 ms ahead. Models are trained on the first three quarters: 16 streams run
   through them in segments, with carried state. The last quarter is the test, one call. Baselines are the mean, no
   change, and a linear filter of the last 1,000 values, fitted by least squares.
2. Length: processor seconds and peak memory of a forward and backward pass over one sequence, for minGRU, GRUs and
   attention (`scaled_dot_product_attention`) of about as many parameters, up to a limit of seconds.

With the default options, OMP_NUM_THREADS=1, torch 2.13 and an AMD EPYC. Root mean square error, where 1 is the standard
deviation of the signal in training; mean of three seeds and half of their range:

                        10 ms           50 ms          200 ms    processor seconds
    mean                0.860           0.860           0.860
    no change           0.648           1.225           1.173
    linear              0.218           0.785           0.793            10
    mingru.GRU  0.100 ± 0.006   0.266 ± 0.027   0.751 ± 0.020            22
    minGRU      0.131 ± 0.018   0.340 ± 0.030   0.747 ± 0.006            16

200 ms ahead, both gain little over the linear filter. Half of the features of minGRU follow waves (`gate="mixed"`).

All 1,536,570 time steps take mingru.GRU 7.8 processor seconds forward and backward, with 2.4 GiB, and minGRU 5.3, with
2.2 GiB. Within 60 seconds, nn.GRU gets to 65,536 time steps (21 s, 3.1 GiB; mingru.GRU 0.16 s, 0.11 GiB), and attention
to 16,384 (12 s).
"""

import multiprocessing
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import LABELS, Parser, Run, at_least, drawing, fail, installed, positive, reading, spread, widest
from torch import Tensor, nn

import mingru

FIX = "run `pip install --no-deps systole==0.3.1`, or use --file"
MODELS = ("mingru.GRU", "minGRU", "nn.GRU")
TIMED = (*MODELS, "attention")
# Forecasts are this many time steps ahead; a time step is a millisecond.
HORIZONS = (10, 50, 200)
# Past values that the linear filter takes.
NUM_LAGS = 1000
# The models read this many time steps before the first one that is scored.
NUM_WARMUP = 20_000
QUICK = {"max_length": 100_000, "num_steps": 20, "num_parameters": 2000, "segment": 512, "seeds": [0], "limit": 1.0}


class Signal(NamedTuple):
    """A normalized signal (S), and for each time step the values to forecast (S - 200, 3)."""

    values: Tensor
    targets: Tensor
    num_train: int
    """The time steps before this one are for training."""


class Attention(nn.Module):
    """Apply layers of causal attention with four heads."""

    def __init__(self, hidden_dims: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(hidden_dims, n * hidden_dims) for n in [3, 1] * num_layers)

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        for project, out in zip(self.layers[::2], self.layers[1::2], strict=True):
            q, k, v = project(x).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            x = x + out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x, state


class Model(nn.Module):
    """Map values (B, S) to forecasts (B, S, 3), and return the state after the last time step."""

    def __init__(self, name: str, dims: int, num_layers: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(1, dims)
        if name == "minGRU":
            self.rnn: nn.Module = mingru.MinGRU(dims, dims, num_layers, norm="rms", residual=True, gate="mixed")
        elif name == "mingru.GRU":
            self.rnn = mingru.GRU(dims, dims, num_layers)
        elif name == "nn.GRU":
            self.rnn = nn.GRU(dims, dims, num_layers, batch_first=True)
        else:
            self.rnn = Attention(dims, num_layers)
        self.norm = nn.RMSNorm(dims)
        self.head = nn.Linear(dims, len(HORIZONS))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, state = self.rnn(self.encoder(x.unsqueeze(2)), state)
        return self.head(self.norm(out)), state


def read(path: Path, num_steps: int | None) -> Signal:
    """Return the first `num_steps` time steps of a .npy file with one number for each time step; None is all."""
    least = 4 * NUM_WARMUP
    with reading(path, "a .npy file of numbers"):
        values = torch.from_numpy(np.load(path)).double()
    if values.ndim != 1 or len(values) < least:
        fail(f"{path} must have one axis of at least {least:,} numbers, got the shape {tuple(values.shape)}")
    if not values.isfinite().all():
        fail(f"{path} must have finite numbers, got {values[~values.isfinite()][0]}")
    values = values[:num_steps]
    num_train = len(values) * 3 // 4
    train = values[:num_train]
    values = ((values - train.mean()) / train.std()).float()
    count = len(values) - max(HORIZONS)
    return Signal(values, torch.stack([values[h : h + count] for h in HORIZONS], 1), num_train)


def stream_length(signal: Signal, args: Any) -> int:
    """Return the time steps of one stream of the training."""
    return (signal.num_train - max(HORIZONS)) // args.batch_size


def make(name: str, num_parameters: int, num_layers: int) -> Model:
    """Return the largest model of at most this many parameters, whose width is a multiple of 4, of minGRU 8."""
    return widest(lambda width: Model(name, width, num_layers), num_parameters, *[8 if name == "minGRU" else 4] * 2)


def train(run: Run, name: str, signal: Signal, seed: int) -> tuple[Tensor, float]:
    """Train on streams that run in parallel through parts of the training time, in segments with carried state.

    Return the forecasts of the test and the processor seconds.
    """
    args, length = run.args, stream_length(signal, run.args)
    torch.manual_seed(seed)
    model = make(name, args.num_parameters, args.num_layers)
    parts = (each[: length * args.batch_size].unflatten(0, (args.batch_size, length)) for each in signal[:2])
    values, targets = map(run.fabric.to_device, parts)
    carried: list[Tensor | None] = [None]

    def loss_of(model: nn.Module, step: int) -> Tensor:
        start = step % (length // args.segment) * args.segment
        part = slice(start, start + args.segment)
        forecasts, state = model(values[:, part], carried[0] if start else None)
        carried[0] = state.detach()
        return F.mse_loss(forecasts, targets[:, part])

    trained = run.train(args.num_steps, loss_of, model, carried)
    with torch.no_grad():
        # One call over the test.
        x = run.fabric.to_device(signal.values[None, signal.num_train - NUM_WARMUP : -max(HORIZONS)])
        return trained(x)[0][0, NUM_WARMUP:].float().cpu(), run.processor_seconds


def fit_linear(signal: Signal) -> Callable[[Tensor], Tensor]:
    """Return a forecast from the last NUM_LAGS values, fitted by least squares on every tenth time step."""

    def features(rows: Tensor) -> Tensor:
        past = signal.values.unfold(0, NUM_LAGS, 1)[rows - NUM_LAGS + 1]
        return torch.cat([past, torch.ones(len(rows), 1)], 1).double()

    square, product = 0, 0
    for rows in torch.arange(NUM_LAGS, signal.num_train - max(HORIZONS), 10).split(4096):
        x = features(rows)
        square = square + x.t() @ x
        product = product + x.t() @ signal.targets[rows].double()
    # A small ridge, because neighboring values are nearly equal.
    ridge = 1e-7 * square.diagonal().mean() * torch.eye(NUM_LAGS + 1, dtype=torch.double)
    weights = torch.linalg.solve(square + ridge, product)
    return lambda rows: torch.cat([features(part) @ weights for part in rows.split(4096)]).float()


def peak_memory() -> float:
    """Return the largest memory of this process until now in GiB, or NaN if the system does not say it."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) / 2**20 if found else float("nan")


def measure(model: Model, values: Tensor, num_threads: int) -> tuple[float, float]:
    """Return the processor seconds and the GiB of one call with its backward pass."""
    torch.set_num_threads(num_threads)
    model(values[None, :1024])[0].sum().backward()
    before, start = peak_memory(), time.process_time()
    model(values[None])[0].square().mean().backward()
    return time.process_time() - start, peak_memory() - before


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def time_lengths(run: Run, name: str, signal: Signal) -> list[list[float]]:
    """Return the length, the seconds and the GiB of training steps on one sequence, until --limit."""
    most = len(signal.values)
    lengths = [4096 * 4**i for i in range(20) if 4096 * 4**i < most] + [most]
    results: list[list[float]] = []
    for length in lengths:
        if results:
            last_length, last_seconds, _ = results[-1]
            expected = last_seconds * (length / last_length) ** (2 if name == "attention" else 1)
            if expected > run.args.limit:
                run.print(f"{name:10} {length:10,} not run, because about {expected:,.0f} seconds are expected")
                break
        model = make(name, run.args.num_parameters, run.args.num_layers)
        # A new process, whose peak is that of this call.
        taken = apart(measure, model, signal.values[:length].clone(), torch.get_num_threads())
        results.append([length, *taken])
        run.print(f"{name:10} {length:10,} {taken[0]:8.2f} {taken[1]:6.2f}")
    return results


def plot(path: Path, signal: Signal, forecasts: dict[str, Tensor], lengths: dict[str, list]) -> None:
    """Draw forecasts of three seconds, and the seconds and the memory against the length."""
    with drawing(path, 9, 7, dpi=120) as figure:
        panels = figure.subplot_mosaic("aa;bc")
        axes = panels["a"]
        # Three seconds before the middle of the test.
        end, index = len(forecasts["linear"]) // 2, 1
        shown = slice(max(end - 3000, 0), end)
        seconds = torch.arange(shown.stop - shown.start) / 1000
        axes.plot(seconds, signal.targets[signal.num_train :][shown, index], color="black", linewidth=1, label="signal")
        for name, values in forecasts.items():
            color = f"C{TIMED.index(name)}" if name in TIMED else "gray"
            axes.plot(seconds, values[shown, index], color=color, linewidth=1.5, label=LABELS.get(name, name))
        axes.set(xlabel="Seconds", ylabel="Signal (standard deviations)", title=f"Forecast {HORIZONS[index]} ms ahead")
        axes.legend(loc="upper right")
        for number, axes, label in ((1, panels["b"], "Processor seconds"), (2, panels["c"], "Peak memory, GiB")):
            for name, rows in lengths.items():
                points = [row[0] for row in rows], [row[number] for row in rows]
                axes.plot(*points, color=f"C{TIMED.index(name)}", marker="o", label=LABELS.get(name, name))
            # A short sequence may need no new memory, and 0 has no logarithm.
            scale = "log" if any(row[number] > 0 for rows in lengths.values() for row in rows) else "linear"
            axes.set(xscale="log", yscale=scale, xlabel="Time steps in one forward and backward pass", ylabel=label)
            axes.legend()


def main(argv: list[str] | None = None) -> None:
    defaults = {"num_steps": 800, "num_parameters": 8000, "num_layers": 3, "batch_size": 16, "learning_rate": 0.01}
    parser = Parser(__file__, __doc__, QUICK, models=MODELS, plot=Path("long_signal.png"), **defaults)
    parser.set_defaults(models=["mingru.GRU", "minGRU"], accelerator="cpu")
    parser.add("--file", type=Path, help=".npy file; if omitted, Task1_ECG.npy of the package systole")
    parser.add("--max-length", type=at_least(4 * NUM_WARMUP), help="use at most so many time steps of the file")
    parser.add("--segment", type=at_least(1), default=1024, help="time steps of a training step, in each stream")
    parser.add("--limit", type=positive, default=60.0, help="most seconds of a timed call")
    args = parser.parse_args(argv)
    signal = read(args.file or installed("systole", FIX) / "datasets" / "Task1_ECG.npy", args.max_length)
    length = stream_length(signal, args)
    if args.segment > length:
        fail(f"--segment must be at most {length} with --batch-size {args.batch_size}, got {args.segment}")
    run = Run(parser, args)

    def show(name: str, forecasts: Tensor, seconds: float | None = None) -> list[float]:
        errors = (forecasts - signal.targets[signal.num_train :]).square().mean(0).sqrt().tolist()
        spent = "" if seconds is None else f"  {seconds:5.0f} s"
        run.print(f"{name:18} " + " ".join(f"{value:6.3f}" for value in errors) + spent)
        return errors

    run.print(f"{len(signal.values):,} time steps; error of forecasts {', '.join(map(str, HORIZONS))} ms ahead")
    rows = torch.arange(signal.num_train, len(signal.values) - max(HORIZONS))
    start = time.process_time()
    drawn = {"linear": fit_linear(signal)(rows)}
    seconds = time.process_time() - start
    show("mean", torch.zeros(len(rows), len(HORIZONS)))
    show("no change", signal.values[rows, None])
    show("linear", drawn["linear"], seconds)
    for name in args.models:
        found = run.each_seed(name, train, name, signal)
        runs = [show(f"{name}, seed {seed}", *each) for seed, each in zip(args.seeds, found, strict=True)]
        means = ", ".join(spread(errors, 0, ".3f") for errors in zip(*runs, strict=True))
        run.print(f"{name}, mean and half of the range: {means}")
        drawn[name], _ = found[-1]
    run.print(f"\n{'forward and backward':21} {'seconds':>8} {'GiB':>6}")
    lengths = {name: run.once(f"{name}, lengths", time_lengths, name, signal) for name in TIMED}
    plot(args.plot, signal, drawn, lengths)


if __name__ == "__main__":
    main()
