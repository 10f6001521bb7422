"""Time the GPU kernels, and compare them with a copy, with nn.GRU and nn.LSTM, and with other scans.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --json out/gpu.json --plot out/gpu.png --shape 64 1000 10 100

The first tables time the recurrence from given pre-activations, the second ones whole layers, and the last one a sweep
over sizes. "share of copy" compares with a copy of as many bytes as a method moves that reads every input once and
writes every output once. Times are medians in milliseconds. Calls are queued without waiting, so that a time below
about 0.05 ms is the time of launching from Python.

accelerated-scan and flash-linear-attention are timed if they are installed. They compute the scan from the decays and
inputs, not from the pre-activations.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import add_shape_option, write_json
from torch import Tensor, nn

import mingru
from mingru import ops
from mingru.bench import GRU, LINEAR, forward, forward_backward, output, print_table, where

SHAPES = [(64, 1000, 10, 100), (8, 4096, 256, 256), (1024, 128, 512, 512), (16, 16384, 128, 128)]
DTYPES = [torch.float32, torch.bfloat16]
BATCHES, LENGTHS, FEATURES = (1, 8, 64, 512, 2048), (1, 16, 256, 4096, 65536), (32, 128, 512, 2048)
MOST_STATES = 1 << 27
COPY = "copy"
# Elements that are read or written for each state.
FORWARD, BOTH = 3, 9
Call = Callable[[], Any]
# Milliseconds of forward, and of forward + backward; the reason if it cannot run.
Figures = dict[str, tuple[float, float] | str]


class Timer:
    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def ms(self, call: Call) -> float:
        """Return the time of a call: the median of several runs of many queued calls."""
        for _ in range(3):
            call()
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        repeats = max(1, min(200, int(self.seconds / 10 / (time.perf_counter() - start))))
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            self.wait()
            taken.append((time.perf_counter() - start) / repeats * 1e3)
        return statistics.median(taken)

    def both(self, function: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[float, float] | str:
        try:
            return self.ms(forward(function)), self.ms(forward_backward(function, leaves))
        except (RuntimeError, ValueError, AssertionError) as error:
            # Other packages support only some sizes, and memory may not suffice.
            return (str(error).splitlines() or [type(error).__name__])[0][:60]


def associative(a: Tensor, b: Tensor) -> Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan

    def then(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    states: Tensor = associative_scan(then, (a, b), 1)[1]
    return states


def scans(a: Tensor, b: Tensor) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """Return other implementations of the scan, each with its leaves."""
    ways: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {}
    if not a.is_cpu:
        compiled = torch.compile(associative)
        ways["associative_scan, compiled"] = (lambda: compiled(a, b)), [a, b]
    try:
        from accelerated_scan.warp import scan
    except ImportError:
        pass
    else:
        turned = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (a, b)]
        ways["accelerated-scan (time last)"] = (lambda: scan(*turned)), turned
    try:
        from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn
    except ImportError:
        pass
    else:
        logs = [b.detach().requires_grad_(), a.detach().log().requires_grad_()]
        ways["fla, chunk_hgrn"] = (lambda: chunk_hgrn(*logs)[0]), logs
        ways["fla, fused_recurrent_hgrn"] = (lambda: fused_recurrent_hgrn(*logs)[0]), logs
    return ways


def recurrence(timer: Timer, batch: int, steps: int, features: int, dtype: torch.dtype) -> tuple[Figures, float]:
    """Time the recurrence from pre-activations; return the bytes per millisecond of a copy too."""
    pre = torch.randn(batch, steps, 2 * features, dtype=dtype, device=timer.device)
    gate, candidate = (part.detach().requires_grad_() for part in pre.chunk(2, -1))
    leaves = [gate, candidate]
    zero = torch.zeros(batch, 1, features, device=timer.device)
    into = torch.empty_like(pre)
    bandwidth = 2 * pre.numel() * pre.element_size() / timer.ms(lambda: into.copy_(pre))

    def on(backend: str) -> Callable[[], Tensor]:
        return lambda: mingru.functional.mingru(gate, candidate, backend=backend)

    compiled = torch.compile(on("log"))
    results = {name: timer.both(on(backend), leaves) for name, backend in (("mingru", "auto"), ("torch", "torch"))}
    dt = torch.rand(batch, steps, device=timer.device)
    for name, cell, elapsed in (
        ('mingru, gate="signed"', "mingru_signed", None),
        ('mingru, gate="rotation"', "mingru_rotation", None),
        ("mingru, elapsed times", "mingru", dt),
    ):
        spec, start = ops.Spec(cell, "positive", False), ops.Start(zero, zero, None, elapsed)
        results[name] = timer.both(lambda spec=spec, start=start: ops.recurrence(spec, leaves, start)[0], leaves)
    results["log space (the paper's form)"] = timer.both(on("log"), leaves)
    results["log space, compiled"] = timer.both(compiled, leaves)
    a, b = ((-gate).sigmoid().detach().requires_grad_(), candidate.detach().clone().requires_grad_())
    for name, (function, own) in scans(a, b).items():
        results[name] = timer.both(function, own)
    return results, bandwidth


def layers(timer: Timer, batch: int, steps: int, input_dims: int, features: int, dtype: torch.dtype) -> Figures:
    options: dict[str, Any] = {"device": timer.device, "dtype": dtype}
    modules = {
        "mingru": mingru.MinGRU(input_dims, features, **options),
        LINEAR: nn.Linear(input_dims, 2 * features, **options),
        GRU: nn.GRU(input_dims, features, batch_first=True, **options),
        "nn.LSTM": nn.LSTM(input_dims, features, batch_first=True, **options),
    }
    x = torch.randn(batch, steps, input_dims, requires_grad=True, **options)
    return {
        name: timer.both(lambda module=module: output(module(x)), [x, *module.parameters()])  # type: ignore[misc]
        for name, module in modules.items()
    }


def show(title: str, results: Figures, columns: dict[str, Callable[[float, float], tuple[float, float]]]) -> None:
    headings = ["ms", "forward", "fwd + bwd"]
    for heading in columns:
        headings += [heading, "fwd + bwd"]
    rows = []
    for name, times in results.items():
        if isinstance(times, str):
            rows.append([name, times, *[""] * (len(headings) - 2)])
            continue
        figures = [f"{ms:.3f}" for ms in times]
        rows.append([name, *figures, *(f"{x:.2f}" for column in columns.values() for x in column(*times))])
    print_table(title, headings, rows)


def sweep(timer: Timer) -> list[dict[str, Any]]:
    """Time training of the recurrence for many sizes, and print how much faster it is than tensor operations."""
    cells = []
    for features, batch in itertools.product(FEATURES, BATCHES):
        for steps in LENGTHS:
            if batch * steps * features > MOST_STATES:
                continue
            pair = [torch.randn(batch, steps, features, device=timer.device).requires_grad_() for _ in range(2)]

            def on(backend: str, pair: list[Tensor] = pair) -> Callable[[], Tensor]:
                return lambda: mingru.functional.mingru(*pair, backend=backend)

            taken = {name: timer.both(on(name), pair) for name in ("auto", "torch")}
            cells.append({"batch": batch, "steps": steps, "features": features, **taken})
    rows: dict[tuple[int, int], list[str]] = {}
    for cell in cells:
        own, other = cell["auto"], cell["torch"]
        ratio = "?" if isinstance(own, str) or isinstance(other, str) else f"{other[1] / own[1]:.1f}"
        # Marks what must not happen: a slower kernel.
        ratio += "" if ratio == "?" or float(ratio) >= 1.0 else " !"
        rows.setdefault((cell["features"], cell["batch"]), []).append(ratio)
    table = [[f"H {features}, B {batch}", *row] for (features, batch), row in rows.items()]
    table = [[*row, *[""] * (len(LENGTHS) + 1 - len(row))] for row in table]
    print_table("Speed-up of training over tensor operations, float32", ["", *(f"S {n}" for n in LENGTHS)], table)
    return cells


def plot(cells: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for features, color in zip(FEATURES, ("#0b6e4f", "#c1121f", "#e07a1f", "#8d99ae"), strict=True):
        own = [cell for cell in cells if cell["features"] == features and not isinstance(cell["auto"], str)]
        states = [cell["batch"] * cell["steps"] * features for cell in own]
        rate = [count / cell["auto"][1] * 1e-6 for count, cell in zip(states, own, strict=True)]
        axes.loglog(states, rate, "o", color=color, label=f"H = {features}")
    axes.set(xlabel="states (B x S x H)", ylabel="billion states per second, forward + backward")
    axes.legend()
    axes.grid(visible=True, which="major", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    accelerator = torch.accelerator.current_accelerator()
    parser.add_argument("--device", default=None if accelerator is None else str(accelerator))
    parser.add_argument("--seconds", type=float, default=0.2, help="for each figure (default: %(default)s)")
    add_shape_option(parser, "four shapes")
    parser.add_argument("--no-sweep", action="store_true", help="skip the sweep over sizes")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--plot", type=Path, help="write a picture of the sweep to this file")
    args = parser.parse_args()
    if args.device is None:
        parser.error("torch finds no GPU; --device cpu runs the program without one")
    device = torch.device(args.device)
    timer = Timer(device, args.seconds)
    torch.manual_seed(0)
    name = torch.get_device_module(device).get_device_name(device) if device.type != "cpu" else "CPU"
    print(f"device: {name}")
    for key, value in where().items():
        print(f"{key}: {value}")
    print(f"backend triton: {mingru.backends()['triton']}")
    results: dict[str, Any] = {"device": name, "recurrence": {}, "layers": {}}
    for shape, dtype in itertools.product(args.shape or SHAPES, DTYPES):
        batch, steps, _, features = shape
        title = f"{tuple(shape)}, {str(dtype).removeprefix('torch.')}"
        taken, bandwidth = recurrence(timer, batch, steps, features, dtype)
        per_element = batch * steps * features * dtype.itemsize / bandwidth
        show(
            f"Recurrence (B, S, I, H) = {title}; a copy moves {bandwidth * 1e-9:.2f} TB/s",
            taken,
            {"share of copy": lambda one, two, e=per_element: (FORWARD * e / one, BOTH * e / two)},  # type: ignore[misc]
        )
        results["recurrence"][title] = {**taken, COPY: bandwidth}
        whole = results["layers"][title] = layers(timer, *shape, dtype)
        bases = {key: whole[key] for key in (GRU, LINEAR)}
        columns = {}
        if not isinstance(base := bases[GRU], str):
            columns[f"speed-up over {GRU}"] = lambda one, two, base=base: (base[0] / one, base[1] / two)
        if not isinstance(base := bases[LINEAR], str):
            columns["relative to nn.Linear"] = lambda one, two, base=base: (one / base[0], two / base[1])
        show(f"Layer (B, S, I, H) = {title}", whole, columns)
    if not args.no_sweep:
        results["sweep"] = sweep(timer)
        if args.plot is not None:
            plot(results["sweep"], args.plot)
    if args.json is not None:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
