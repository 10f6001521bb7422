"""What the benchmarks share: medians of interleaved runs, and a record of where they were taken."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mingru


def medians_ms(calls: dict[str, Callable[[], Any]], seconds: float = 4.0, least: int = 5) -> dict[str, float]:
    """Run all calls in turn, round after round, so that a slow spell of the machine meets them all alike."""
    times_ms: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times_ms.values()))) < least:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times_ms[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(taken) for name, taken in times_ms.items()}


def forward(function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        with torch.inference_mode():
            function()

    return run


def forward_backward(function: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], Any]:
    grad = torch.randn_like(function())

    def run() -> None:
        torch.autograd.grad(function(), leaves, grad)

    return run


def where() -> dict[str, Any]:
    """The machine, the versions and the commit."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mingru": mingru.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_json(path: Path, results: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"where": where(), "results": results}, indent=1) + "\n")


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[index]) for row in [columns, *rows]) for index in range(len(columns))]
    print(f"\n{title}")
    for row in [columns, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)
