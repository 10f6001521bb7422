"""Measure what a call of the GPU kernels costs the processor, without a GPU. Small work on a GPU takes as long as this.

    python -m benchmarks.gpu.host [--seconds 2]

Prints microseconds of the processor for a call of `functional.mingru`, of `MinGRU` without gradients, and for a
training step of it, beside `nn.Linear`. Triton compiles the kernels for an H100. Tensors are on the CPU, and the driver
launches nothing, so that the time of CUDA itself is missing. On a GPU, `benchmarks.gpu.speed` measures whole calls.
"""

import argparse
import statistics
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

import mingru
from mingru.bench import output
from mingru.functional import mingru as recurrence
from mingru.ops.backends.triton import device, launch


class NoDriver:
    """A driver of Triton for an H100 that is not there. It loads and launches nothing."""

    utils = SimpleNamespace(
        load_binary=lambda *args: (object(), 0, 0, 0, 1024),
        unload_module=lambda module: None,
        get_device_properties=lambda index: {"max_shared_mem": 232_448},
    )

    def launcher_cls(self, *args: Any) -> Callable[..., None]:
        return lambda *args: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, index: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextmanager
def without_gpu(driver: NoDriver) -> Iterator[None]:
    """Let the kernels take tensors on the CPU, and launch nothing."""
    from triton.runtime.driver import driver as drivers

    with (
        mock.patch.object(drivers, "_active", driver),
        mock.patch.object(device, "IS_INTERPRETED", True),
        mock.patch.object(device, "_why_not", lambda: None),  # noqa: PT008 (a mock would take time of each call)
        mock.patch.dict(launch._compiled, clear=True),
    ):
        yield


def microseconds(call: Callable[[], Any], seconds: float) -> float:
    """Return the median processor time of a call in 20 rounds, which take about `seconds` together."""
    timer = timeit.Timer(call, timer=time.thread_time)
    timer.timeit(1)
    count = max(1, int(seconds / 20 / (timer.timeit(10) / 10)))
    return statistics.median(timer.repeat(20, count)) / count * 1e6


def measure(seconds: float) -> dict[str, float]:
    x = torch.randn(2, 16, 8)
    # On a GPU, pre-activations are not recomputed.
    rnn, linear = mingru.MinGRU(8, 8, recompute=False), nn.Linear(8, 16)

    def training(module: nn.Module) -> Callable[[], None]:
        def call() -> None:
            output(module(x)).sum().backward()

        return call

    calls = {"functional.mingru": lambda: recurrence(x, x), "MinGRU": lambda: rnn(x), "nn.Linear": lambda: linear(x)}
    with torch.no_grad():
        found = {f"{name}, no gradients": microseconds(call, seconds) for name, call in calls.items()}
    for name, module in (("MinGRU", rnn), ("nn.Linear", linear)):
        found[f"{name}, training step"] = microseconds(training(module), seconds)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each figure")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with without_gpu(NoDriver()), mingru.use_backend("triton"):
        found = measure(args.seconds)
    for name, time_of in found.items():
        print(f"{name:<32} {time_of:6.1f} us")


if __name__ == "__main__":
    main()
