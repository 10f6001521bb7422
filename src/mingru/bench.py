"""Compare the speed of the README's model, and of MinGRU, with nn.GRU and nn.LSTM on your own machine.

    python -m mingru.bench
    python -m mingru.bench --threads 1 --shape 8 512 256 256 --shape 1 1 64 64
    python -m mingru.bench --threads 1 --shape 8 128 32 512 --block-size 32 64 128
    python -m mingru.bench --threads 1 --autocast
    python -m mingru.bench --threads 1 --shape 32 200 32 128 --last

All models have two layers. Each time is the median of interleaved rounds in one process, in milliseconds, in
float32, or with --autocast in bfloat16; in brackets is the middle half of the rounds. If it is wide, other programs
run: use --threads 1, whose times are of the processor, and a longer --seconds. "forward" runs in inference mode. "fwd
+ bwd" also computes the gradients of the input and of all parameters. The program needs only torch.
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
from .ops.backends.native import HAS_BFLOAT16, ISA
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
        "kernels": ISA or "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mingru": __version__,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    other = platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), other)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[index]) for row in [columns, *rows]) for index in range(len(columns))]
    print(f"\n{title}")
    for row in [columns, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)


def models(inputs: int, hidden: int, block_sizes: Sequence[int]) -> dict[str, nn.Module]:
    """Return what is compared. The first model is the one that the README begins with."""
    of_torch = {f"nn.{kind.__name__}": kind(inputs, hidden, 2, batch_first=True) for kind in (nn.GRU, nn.LSTM)}
    blocks = {f"blocks of {size}": GRU(inputs, hidden, 2, block_size=size) for size in block_sizes}
    return {"mingru.GRU": GRU(inputs, hidden, 2), **blocks, "MinGRU": MinGRU(inputs, hidden, 2, **OPTIONS), **of_torch}


def compared(shape: Sequence[int], args: argparse.Namespace) -> dict[str, list[str]]:
    """Return a row for each model: the times of forward, and of forward + backward, and both over the first model's."""
    modules = {name: module.to(args.device) for name, module in models(shape[2], shape[3], args.block_size).items()}
    x = torch.randn(shape[:3], device=args.device, requires_grad=True)
    rounded = torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.autocast)
    steps = slice(-1, None) if args.last else slice(None)
    calls = {name: rounded(lambda module=module: output(module(x))[:, steps]) for name, module in modules.items()}
    inference = {name: forward(call) for name, call in calls.items()}
    training = {name: forward_backward(calls[name], [x, *module.parameters()]) for name, module in modules.items()}
    found = [rounds_ms(each, args.seconds, device=args.device) for each in (inference, training)]
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
    threads = torch.get_num_threads()
    parser.add_argument("--threads", type=int, default=threads, help="number of CPU threads (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="device to run on (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds for each pass (default: %(default)s)")
    text = f"batch, steps, input and hidden features; can be repeated (default: {SHAPE})"
    parser.add_argument("--shape", type=int, nargs=4, action="append", metavar=("B", "S", "I", "H"), help=text)
    text = "also compare mingru.GRU with these numbers of features in a block"
    parser.add_argument("--block-size", type=int, nargs="+", default=[], metavar="K", help=text)
    parser.add_argument("--autocast", action="store_true", help="run all models under torch.autocast to bfloat16")
    parser.add_argument("--last", action="store_true", help="take the gradient of the last time step's output only")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    facts = where() | {f"backend {name}": "can run" if why is True else why for name, why in backends().items()}
    facts["bfloat16 products"] = ISA if HAS_BFLOAT16 else "none on this processor; mingru.GRU multiplies in float32"
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    auto = choose(spec_of("mingru_mixed", "tanh", False, 0.0), torch.zeros(1, 1, 1, device=args.device))
    print(f"device {args.device}{_product(args.device)}: mingru uses the backend {auto.backend!r}")
    options = ", ".join(f"{name}={value!r}" for name, value in OPTIONS.items())
    print(f"mingru.GRU: the README's model\nMinGRU: {options}\nall models: two layers")
    for shape in args.shape or [SHAPE]:
        rows = compared(shape, args)
        columns = ["", "forward, ms", "fwd + bwd, ms", *(f"{part} / mingru.GRU" for part in ("forward", "fwd + bwd"))]
        title = f"(B, S, I, H) = {tuple(shape)}{' in bfloat16' * args.autocast}: medians (middle half of the rounds)"
        print_table(title, columns, [[name, *cells] for name, cells in rows.items()])


def _product(device: str) -> str:
    """Return the name of a GPU in parentheses, if torch knows it."""
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return "" if name is None else f" ({name(torch.device(device))})"


if __name__ == "__main__":
    main()
