"""Compare the speed of the README's model, and of MinGRU, with nn.GRU and nn.LSTM on your own machine.

    python -m mingru.bench
    python -m mingru.bench --threads 1 --shape 8 512 256 256 --shape 1 1 64 64

All models have two layers. Each time is the median of interleaved rounds in one process, in milliseconds, in
float32; in brackets is the middle half of the rounds. If it is wide, other programs run: use --threads 1, whose times
are of the processor, and a longer --seconds. "forward" runs in inference mode. "fwd + bwd" also computes the gradients
of the input and of all parameters. The program needs only torch.
"""

import argparse
import itertools
import math
import operator
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._version import __version__
from .modules.gru import GRU
from .modules.mingru import MinGRU
from .ops.call import spec_of
from .ops.route import backends, choose

Calls = dict[str, Callable[[], object]]
OPTIONS: dict[str, Any] = {"norm": "rms", "residual": True, "gate": "mixed"}
# Batch, steps, input features, hidden features.
SHAPE = (16, 256, 64, 64)


def medians_ms(calls: Calls, seconds: float = 4.0, least: int = 5, device: str = "cpu") -> dict[str, float]:
    """Return the median time of each call, in milliseconds; with one CPU thread, it is processor time."""
    return {name: statistics.median(taken) for name, taken in rounds_ms(calls, seconds, least, device).items()}


def rounds_ms(calls: Calls, seconds: float, least: int = 3, device: str = "cpu") -> dict[str, list[float]]:
    """Return the times of each call in all rounds, in milliseconds.

    All calls are timed once per round, so that a temporary slowdown of the machine affects them equally. The order
    differs between rounds. Before it is timed, each call runs once, so that its data is in the caches.
    """
    on_cpu = torch.device(device).type == "cpu"
    wait: Callable[[], object] = (lambda: None) if on_cpu else torch.accelerator.synchronize
    clock = time.process_time if on_cpu and torch.get_num_threads() == 1 else time.perf_counter
    times_ms: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    order, generator = list(calls.items()), random.Random(0)
    while order and (time.perf_counter() < end or min(map(len, times_ms.values())) < least):
        generator.shuffle(order)
        for name, call in order:
            call()
            wait()
            start = clock()
            call()
            wait()
            times_ms[name].append((clock() - start) * 1e3)
    return times_ms


def forward(function: Callable[[], object]) -> Callable[[], object]:
    """Return a function that calls `function` in inference mode."""
    return torch.inference_mode()(function)


def forward_backward(function: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    """Return a function that computes the gradients of all leaves, from a random gradient of the output."""
    grad = torch.randn_like(function())
    return lambda: torch.autograd.grad(function(), leaves, grad)


def output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return a layer's output at every step, without the last state."""
    return result if isinstance(result, Tensor) else result[0]


def where() -> dict[str, object]:
    """Return the machine and the versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mingru": __version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[index]) for row in [columns, *rows]) for index in range(len(columns))]
    print(f"\n{title}")
    for row in [columns, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)


def models(input_dims: int, hidden_dims: int, device: str) -> dict[str, nn.Module]:
    """Return what is compared. The first model is the one that the README begins with."""
    return {
        "mingru.GRU": GRU(input_dims, hidden_dims, 2, device=device),
        "MinGRU": MinGRU(input_dims, hidden_dims, 2, **OPTIONS, device=device),
        "nn.GRU": nn.GRU(input_dims, hidden_dims, 2, batch_first=True, device=device),
        "nn.LSTM": nn.LSTM(input_dims, hidden_dims, 2, batch_first=True, device=device),
    }


def compared(shape: Sequence[int], device: str, seconds: float) -> dict[str, list[str]]:
    """Return a row for each model: the times of forward, and of forward + backward, and both over the first model's."""
    batch, steps, input_dims, hidden_dims = shape
    modules = models(input_dims, hidden_dims, device)
    x = torch.randn(batch, steps, input_dims, device=device, requires_grad=True)
    calls = {name: (lambda module=module: output(module(x))) for name, module in modules.items()}
    inference = {name: forward(call) for name, call in calls.items()}
    training = {name: forward_backward(calls[name], [x, *module.parameters()]) for name, module in modules.items()}
    found = [rounds_ms(each, seconds, device=device) for each in (inference, training)]
    ratios = {name: [_spread(times[name], times["mingru.GRU"]) for times in found] for name in modules}
    return {name: [_spread(times[name]) for times in found] + ratios[name] for name in modules}


def _spread(times: list[float], bases: Sequence[float] = (1.0,)) -> str:
    """Format a ratio of medians, and the middle half of the ratios in the rounds."""
    low, _, high = statistics.quantiles(map(operator.truediv, times, itertools.cycle(bases)), n=4)
    middle = statistics.median(times) / statistics.median(bases)
    return f"{_figure(middle)} ({_figure(low)}-{_figure(high)})"


def _figure(number: float) -> str:
    """Format a number with at least three significant digits, without an exponent."""
    decimals = max(0, 2 - math.floor(math.log10(number))) if number > 0 else 2
    return f"{number:.{decimals}f}"


def main(arguments: Sequence[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m mingru.bench", "%(prog)s [options]", __doc__, formatter_class=form)
    parser.add_argument("--threads", type=int, help="number of CPU threads (default: torch's choice)")
    parser.add_argument("--device", default="cpu", help="device to run on (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds for each pass (default: %(default)s)")
    text = f"batch, steps, input and hidden features; can be repeated (default: {SHAPE})"
    parser.add_argument("--shape", type=int, nargs=4, action="append", metavar=("B", "S", "I", "H"), help=text)
    args = parser.parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for name, value in where().items():
        print(f"{name}: {value}")
    for name, can_run in backends().items():
        print(f"backend {name}: {'can run' if can_run is True else can_run}")
    auto = choose(spec_of("mingru_mixed", "tanh", False, 0.0), torch.zeros(1, 1, 1, device=args.device))
    print(f"device {args.device}{_product(args.device)}: mingru uses the backend {auto!r}")
    options = ", ".join(f"{name}={value!r}" for name, value in OPTIONS.items())
    print(f"mingru.GRU: the README's model\nMinGRU: {options}\nall models: two layers")
    for shape in args.shape or [SHAPE]:
        rows = compared(shape, args.device, args.seconds)
        columns = ["", "forward, ms", "fwd + bwd, ms", *(f"{part} / mingru.GRU" for part in ("forward", "fwd + bwd"))]
        title = f"(B, S, I, H) = {tuple(shape)}: medians (middle half of the rounds)"
        print_table(title, columns, [[name, *cells] for name, cells in rows.items()])


def _product(device: str) -> str:
    """Return the name of a GPU in parentheses, if torch knows it."""
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return "" if name is None else f" ({name(torch.device(device))})"


if __name__ == "__main__":
    main()
