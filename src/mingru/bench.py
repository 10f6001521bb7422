"""Time of this library's layer beside what one would use instead, on your own machine.

    python -m mingru.bench
    python -m mingru.bench --threads 4 --shape 8 512 256 256 --shape 1 1 64 64

One layer, float32; medians of interleaved runs in one process, in milliseconds: forward in inference mode, and
forward + backward for the input and all parameters. It needs torch alone, and about a minute.
"""

import argparse
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ._version import __version__
from .modules import MinGRU
from .ops import Spec
from .ops.route import backends, choose

# Each is batch, steps, input features, hidden features.
SHAPES = [(8, 512, 256, 256), (1, 4096, 256, 256), (64, 1000, 10, 100), (32, 64, 64, 64), (1, 1, 256, 256)]
LINEAR, GRU = "nn.Linear(I, 2H)", "nn.GRU"


def medians_ms(
    calls: dict[str, Callable[[], Any]], seconds: float = 4.0, least: int = 5, device: str = "cpu"
) -> dict[str, float]:
    """Run all calls, round after round, so that a slow spell of the machine meets them all alike.

    Each round has an order of its own: what ran before leaves caches and memory warm or cold.
    """
    wait = torch.accelerator.synchronize if torch.device(device).type != "cpu" else _nothing
    times_ms: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    wait()
    end = time.perf_counter() + seconds
    rounds = 0
    order, draw = list(calls.items()), random.Random(0)
    while time.perf_counter() < end or rounds < least:
        draw.shuffle(order)
        for name, call in order:
            start = time.perf_counter()
            call()
            wait()
            times_ms[name].append((time.perf_counter() - start) * 1e3)
        rounds += 1
    return {name: statistics.median(taken) for name, taken in times_ms.items()}


def _nothing() -> None:
    pass


def forward(function: Callable[[], Any]) -> Callable[[], None]:
    """The call to time for inference."""

    def run() -> None:
        with torch.inference_mode():
            function()

    return run


def forward_backward(function: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], None]:
    """The call to time for training: the gradients of all leaves, for a random gradient of what comes out."""
    grad = torch.randn_like(function())

    def run() -> None:
        torch.autograd.grad(function(), leaves, grad)

    return run


def output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What a layer gives at every step, without its last state."""
    return result if isinstance(result, Tensor) else result[0]


def where() -> dict[str, Any]:
    """The machine and the versions."""
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


def whole_layer(shape: Sequence[int], device: str, seconds: float) -> dict[str, tuple[float, float]]:
    """Forward, and forward + backward, of one layer of each kind, in milliseconds."""
    batch, steps, input_dims, hidden_dims = shape
    modules = {
        "mingru": MinGRU(input_dims, hidden_dims, device=device),
        LINEAR: nn.Linear(input_dims, 2 * hidden_dims, device=device),
        GRU: nn.GRU(input_dims, hidden_dims, batch_first=True, device=device),
        "nn.LSTM": nn.LSTM(input_dims, hidden_dims, batch_first=True, device=device),
    }
    x = torch.randn(batch, steps, input_dims, device=device, requires_grad=True)

    def on(module: nn.Module) -> Callable[[], Tensor]:
        return lambda: output(module(x))

    there = {name: forward(on(module)) for name, module in modules.items()}
    there_ms = medians_ms(there, seconds, 3, device)
    and_back = {name: forward_backward(on(module), [x, *module.parameters()]) for name, module in modules.items()}
    and_back_ms = medians_ms(and_back, seconds, 3, device)
    return {name: (there_ms[name], and_back_ms[name]) for name in modules}


def show(shape: Sequence[int], taken_ms: dict[str, tuple[float, float]]) -> None:
    columns = ["ms, medians", "forward", "fwd + bwd", f"{GRU} / it", "fwd + bwd", "it / nn.Linear", "fwd + bwd"]
    rows = []
    for name, taken in taken_ms.items():
        faster = [base / ms for base, ms in zip(taken_ms[GRU], taken, strict=True)]
        longer = [ms / base for base, ms in zip(taken_ms[LINEAR], taken, strict=True)]
        rows.append([name, *(_figure(number) for number in (*taken, *faster, *longer))])
    print_table(f"(B, S, I, H) = {tuple(shape)}", columns, rows)


def _figure(number: float) -> str:
    """Three digits, without an exponent."""
    decimals = max(0, 2 - math.floor(math.log10(number))) if number > 0 else 2
    return f"{number:.{decimals}f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _Parser("python -m mingru.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=_whole, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--device", type=_device, default="cpu", help="where to run (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=_seconds, default=3.0, help="time for each half of a table (default: %(default)s)"
    )
    parser.add_argument(
        "--shape",
        type=_whole,
        nargs=4,
        action="append",
        metavar=("B", "S", "I", "H"),
        help="batch, steps, input and hidden features; may be given again (default: five shapes)",
    )
    args = parser.parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for name, value in where().items():
        print(f"{name}: {value}")
    for name, can_run in backends().items():
        print(f"back end {name}: {'can run' if can_run is True else can_run}")
    auto = choose(Spec("mingru", "positive", False), torch.zeros(1, 1, 1, device=args.device))
    print(f"device {args.device}, where mingru takes its back end {auto!r}")
    for shape in args.shape or SHAPES:
        show(shape, whole_layer(shape, args.device, args.seconds))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return seconds


def _device(text: str) -> str:
    try:
        torch.zeros(1, device=text).add(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"torch can't compute on {text!r} here ({why})") from None
    return text


if __name__ == "__main__":
    main()
