"""Measure time by sequence length, memory of inference, and the scan relative to a copy of its tensors.

    python benchmarks/scaling.py

Times are medians of interleaved runs in one process, with float32. Memory is measured in a separate process.
"""

import argparse
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from measure import where, write_json

import mingru
from mingru.bench import forward, forward_backward, medians_ms, output, print_table

LENGTHS = [4**power for power in range(5, 11)]
DIMS = 64
# Short sequences are repeated, because one short call would mostly measure the caches that the previous call left.
MIN_STEPS = 2**16
MEMORY_STEPS = 1_000_000
SCAN_SHAPE = (8, 512, 256)
Timer = Callable[[dict[str, Callable[[], object]]], dict[str, float]]


def repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def by_length(timer: Timer) -> dict[str, dict[str, float]]:
    """Return nanoseconds per time step of one layer, (B, S, I, H) = (1, S, 64, 64), by S."""
    rnn = mingru.MinGRU(DIMS, DIMS)
    inference, training = {}, {}
    for steps in LENGTHS:
        x = torch.randn(1, steps, DIMS, requires_grad=True)
        times = max(1, MIN_STEPS // steps)

        def function(x: torch.Tensor = x) -> torch.Tensor:
            return output(rnn(x))

        inference[str(steps)] = repeated(forward(function), times)
        training[str(steps)] = repeated(forward_backward(function, [x, *rnn.parameters()]), times)

    def per_step(times_ms: dict[str, float]) -> dict[str, float]:
        return {steps: ms * 1e6 / max(MIN_STEPS, int(steps)) for steps, ms in times_ms.items()}

    return {"inference": per_step(timer(inference)), "training": per_step(timer(training))}


def show_by_length(results: dict[str, dict[str, float]]) -> None:
    columns, rows = ["steps"], [[str(steps)] for steps in LENGTHS]
    for way, by_steps in results.items():
        columns += [f"{way}, ns", f"relative to {LENGTHS[0]} steps"]
        for row, ns in zip(rows, by_steps.values(), strict=True):
            row += [f"{ns:.1f}", f"{ns / by_steps[str(LENGTHS[0])]:.2f}"]
    print_table(f"One time step of (B, S, I, H) = (1, S, {DIMS}, {DIMS})", columns, rows)


def resident_mb(peak: bool) -> float:
    """Return the memory of this process; getrusage would return the parent's peak if that is higher."""
    name = "VmHWM" if peak else "VmRSS"
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3 * 1.024


def inference_mb(threads: int) -> dict[str, float]:
    """Return the peak memory of one forward pass, without its input and its output."""
    torch.set_num_threads(threads)
    rnn = mingru.MinGRU(DIMS, DIMS)
    x = torch.randn(1, MEMORY_STEPS, DIMS)
    with torch.inference_mode():
        # Excludes memory that is allocated once, in the first call.
        rnn(x[:, :1024])
        before = resident_mb(peak=False)
        out, _ = rnn(x)
    growth = resident_mb(peak=True) - before
    mb = out.nbytes / 1e6
    return {"input": mb, "output": mb, "all else": growth - mb}


def scan_and_copies(timer: Timer) -> dict[str, float]:
    """Time the scan, which reads two tensors and writes one, and copies, which read three and write three."""
    a, b, out = torch.rand(SCAN_SHAPE), torch.randn(SCAN_SHAPE), torch.empty(SCAN_SHAPE)
    tensors = (a, b, out)
    targets = [torch.empty_like(tensor) for tensor in tensors]
    calls = {
        "linear_scan": lambda: mingru.functional.linear_scan(a, b),
        "copy of a, b and h": lambda: [target.copy_(tensor) for target, tensor in zip(targets, tensors, strict=True)],
        "clone of a, b and h": lambda: [tensor.clone() for tensor in tensors],
    }
    return timer({name: forward(call) for name, call in calls.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each set of calls (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="minimum rounds of these calls (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(where())
    timer = partial(medians_ms, seconds=args.seconds, least=args.rounds)

    results: dict[str, object] = {}
    if Path("/proc/self/status").is_file():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            results["memory_mb"] = memory = pool.submit(inference_mb, args.threads).result()
        title = f"Memory of inference, (B, S, I, H) = (1, {MEMORY_STEPS}, {DIMS}, {DIMS}), MB"
        print_table(title, list(memory), [[f"{mb:.1f}" for mb in memory.values()]])
    else:
        print("memory is not measured, because this system has no /proc")

    results["step_ns"] = step_ns = by_length(timer)
    show_by_length(step_ns)

    results["scan_ms"] = scan = scan_and_copies(timer)
    rows = [[name, f"{ms:.3f}", f"{scan['linear_scan'] / ms:.2f}"] for name, ms in scan.items()]
    print_table(f"(B, S, H) = {SCAN_SHAPE}, forward", ["ms, medians", "forward", "linear_scan / this row"], rows)
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
