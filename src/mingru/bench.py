"""Compare the speed of the README's model with nn.GRU and nn.LSTM on your own machine.

    python -m mingru.bench
    python -m mingru.bench --threads 4 --shape 8 512 256 256 --shape 1 1 64 64

Torch's models have one layer. Each time is the median of interleaved runs in one process, in milliseconds, in float32.
With one CPU thread, it is processor time, which is right on a busy machine too. "forward" runs in inference mode.
"fwd + bwd" also computes the gradients of the input and of all parameters. The program needs only torch.
"""

import argparse
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ._version import __version__
from .modules.mingru import MinGRU
from .ops.call import spec_of
from .ops.route import backends, choose

# Of the README's model.
OPTIONS: dict[str, Any] = {"norm": "rms", "residual": True, "gate": "mixed"}
# Batch, steps, input features, hidden features.
SHAPE = (16, 256, 64, 64)


def medians_ms(
    calls: dict[str, Callable[[], Any]], seconds: float = 4.0, least: int = 5, device: str = "cpu"
) -> dict[str, float]:
    """Return the median time of each call, in milliseconds; with one CPU thread, it is processor time.

    All calls are timed once per round, so that a temporary slowdown of the machine affects them equally. The order
    differs between rounds. Before it is timed, each call runs once, so that its data is in the caches.
    """
    on_cpu = torch.device(device).type == "cpu"
    wait: Callable[[], object] = (lambda: None) if on_cpu else torch.accelerator.synchronize
    clock = time.process_time if on_cpu and torch.get_num_threads() == 1 else time.perf_counter
    times_ms: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    rounds = 0
    order, generator = list(calls.items()), random.Random(0)
    while time.perf_counter() < end or rounds < least:
        generator.shuffle(order)
        for name, call in order:
            call()
            wait()
            start = clock()
            call()
            wait()
            times_ms[name].append((clock() - start) * 1e3)
        rounds += 1
    return {name: statistics.median(taken) for name, taken in times_ms.items()}


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


def where() -> dict[str, Any]:
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


def compared(shape: Sequence[int], device: str, seconds: float) -> dict[str, tuple[float, float]]:
    """Return the times of forward, and of forward + backward, of each module, in milliseconds."""
    batch, steps, input_dims, hidden_dims = shape
    modules = {
        "MinGRU": MinGRU(input_dims, hidden_dims, num_layers=2, **OPTIONS).to(device),
        "nn.GRU": nn.GRU(input_dims, hidden_dims, batch_first=True, device=device),
        "nn.LSTM": nn.LSTM(input_dims, hidden_dims, batch_first=True, device=device),
    }
    x = torch.randn(batch, steps, input_dims, device=device, requires_grad=True)
    calls = {name: (lambda module=module: output(module(x))) for name, module in modules.items()}
    inference = {name: forward(call) for name, call in calls.items()}
    training = {name: forward_backward(calls[name], [x, *module.parameters()]) for name, module in modules.items()}
    inference_ms, training_ms = (medians_ms(each, seconds, 1, device) for each in (inference, training))
    return {name: (inference_ms[name], training_ms[name]) for name in modules}


def _figure(number: float) -> str:
    """Format a number with at least three significant digits, without an exponent."""
    decimals = max(0, 2 - math.floor(math.log10(number))) if number > 0 else 2
    return f"{number:.{decimals}f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _Parser("python -m mingru.bench", description=(__doc__ or "").splitlines()[0])
    whole, seconds = _above_0(int, "a whole number"), _above_0(float, "a number")
    parser.add_argument("--threads", type=whole, help="number of CPU threads (default: torch's choice)")
    parser.add_argument("--device", type=_device, default="cpu", help="device to run on (default: %(default)s)")
    parser.add_argument("--seconds", type=seconds, default=2.0, help="seconds for each pass (default: %(default)s)")
    text = f"batch, steps, input and hidden features; can be repeated (default: {SHAPE})"
    parser.add_argument("--shape", type=whole, nargs=4, action="append", metavar=("B", "S", "I", "H"), help=text)
    args = parser.parse_args(arguments)
    for *_, features in args.shape or []:
        if features % 8:
            parser.error(f"argument --shape: H must be divisible by 8 because gate is 'mixed', got '{features}'")
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
    print(f"MinGRU: the README's model, num_layers=2, {options}")
    for shape in args.shape or [SHAPE]:
        taken_ms = compared(shape, args.device, args.seconds)
        own, parts = taken_ms["MinGRU"], ("forward", "fwd + bwd")
        rows = [
            [name, *map(_figure, (*taken, *(ms / base for ms, base in zip(taken, own, strict=True))))]
            for name, taken in taken_ms.items()
        ]
        columns = ["median ms", *parts, *(f"time / MinGRU: {part}" for part in parts)]
        print_table(f"(B, S, I, H) = {tuple(shape)}", columns, rows)


def _product(device: str) -> str:
    """Return the name of a GPU in parentheses, if torch knows it."""
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return "" if name is None else f" ({name(torch.device(device))})"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def _above_0(kind: type[int] | type[float], what: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        with suppress(ValueError):
            if 0 < kind(text) < math.inf:
                return kind(text)
        raise argparse.ArgumentTypeError(f"must be {what} above 0, got {text!r}")

    return parse


def _device(text: str) -> str:
    try:
        torch.zeros(1, device=text).add(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"torch cannot compute on {text!r} here ({why})") from None
    return text


if __name__ == "__main__":
    main()
