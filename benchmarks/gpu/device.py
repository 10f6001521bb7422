"""The device of the programs in this folder: its properties, the kernels that ran on it, errors, and times."""

import argparse
import importlib.metadata
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.benchmark import Timer

import mingru
from mingru.bench import medians_ms
from mingru.ops import Spec
from mingru.ops.backends.triton import launch
from mingru.ops.backends.triton.device import IS_INTERPRETED, first_line, unsupported

from ..measure import where, write_json

DRIVER = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,clocks_throttle_reasons.active"


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the options of a program. Adds the device, and the backend that the program tests or times on it."""
    accelerator = torch.accelerator.current_accelerator()
    parser.add_argument("--device", type=torch.device, default=accelerator, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing after this time")
    parser.add_argument("--json", type=Path, help="write the results to this file, and go on where it ends")
    args = parser.parse_args(arguments)
    if args.device is None:
        parser.error("torch finds no GPU; --device cpu runs the program without one")
    needs_triton = args.device.type != "cpu" or IS_INTERPRETED
    why = mingru.backends()["triton"]
    if needs_triton and why is not True:
        parser.error(f"the kernels cannot run on {args.device}: {why}")
    args.backend = "triton" if needs_triton else "torch"
    torch.manual_seed(0)
    return args


def supported(dtypes: Sequence[torch.dtype], device: torch.device, backend: str) -> list[torch.dtype]:
    """Return those dtypes that the backend takes on a device, and print why not the others: bfloat16 on a T4."""
    taken = []
    for dtype in dtypes:
        x, spec = torch.empty(0, dtype=dtype, device=device), Spec("mingru", "positive", False)
        if (why := unsupported(x, spec) if backend == "triton" else None) is None:
            taken.append(dtype)
        else:
            print(f"skipped, because {why}")
    return taken


def about(device: torch.device) -> dict[str, Any]:
    """Print and return the machine, the versions, and the properties of the device."""
    facts = {**where(), "cuda": torch.version.cuda, "hip": torch.version.hip, "device": str(device), "name": "CPU"}
    facts["triton"] = importlib.metadata.version("triton") if mingru.backends()["triton"] is True else None
    if device.type != "cpu":
        properties = torch.get_device_module(device).get_device_properties(device)
        facts |= {"name": properties.name, "properties": str(properties)}
    if device.type == "cuda" and shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={DRIVER}", "--format=csv,noheader", f"--id={device.index or 0}"]
        facts[DRIVER] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n", flush=True)
    return facts


class Results:
    """Results by title, written to a file after each, so that a run goes on where another one was stopped."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path, self.end = args.json, time.monotonic() + 60 * args.minutes
        facts = about(args.device)
        self.all: dict[str, Any] = {"device": facts, "backend": args.backend}
        if self.path is not None and self.path.exists():
            found = json.loads(self.path.read_text())["results"]
            # What differs between two hours of one card is not compared.
            if all(found["device"].get(name) == facts.get(name) for name in ("name", "torch", "triton", "commit")):
                self.all = found

    def of(self, kind: str, title: str, measure: Callable[..., Any], *arguments: Any) -> Any:
        """Return what is known, or measure it; None if there is no time left."""
        known = self.all.setdefault(kind, {})
        if title not in known:
            if time.monotonic() > self.end:
                print(f"stopped before {kind}, {title}; the same command goes on from there")
                return None
            known[title] = measure(*arguments)
            if self.path is not None:
                write_json(self.path, self.all)
        return known[title]


@contextmanager
def passes_of(backend: str) -> Iterator[list[str]]:
    """Collect the passes of the Triton kernels that are launched in the block. "triton" must have both passes."""
    names: list[str] = []
    run: Callable[..., Any] = launch.run

    def recorded(name: str, *args: Any) -> Any:
        names.append(name)
        return run(name, *args)

    with mock.patch.object(launch, "run", recorded):
        yield names
    if backend == "triton" and not {"forward", "backward"} <= set(names):
        raise AssertionError(f"only the passes {names} ran in Triton; forward and backward are expected")


class Clock:
    """Measures times of calls. On the CPU, a replay is a call."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds, self.module = device, seconds, torch.get_device_module(device)
        properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        size = 0 if properties is None else max(1 << 28, 4 * properties.L2_cache_size)
        self.other = torch.zeros(size // 4, device=device)

    def wait(self) -> None:
        if self.device.type != "cpu":
            self.module.synchronize(self.device)

    def flush(self) -> None:
        """Replace the data in the L2 cache. By reading, because written data would be written back during the call."""
        self.other.sum()

    def times(self, call: Callable[[], object]) -> dict[str, Any]:
        """Return median times in microseconds.

        "device" is the time on the device: a CUDA graph of the call is replayed, with none of its data in the L2 cache.
        It is None if the call cannot be captured, and "why" says why. "call" is the time of one of many calls in a row,
        with Python.
        """
        for _ in range(2):
            call()
        replay, why = self.capture(call)
        return {"device": replay and self.replay_us(replay), "call": self.call_us(call), "why": why}

    def capture(self, call: Callable[[], object]) -> tuple[Callable[[], object] | None, str]:
        """Return a function that replays the call, or None and the reason."""
        if self.device.type != "cuda":
            return (call, "") if self.device.type == "cpu" else (None, "CUDA graphs need CUDA or ROCm")
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # The end of this block restores the current stream, also if the capture fails.
        with torch.cuda.stream(stream):
            call()
            try:
                with torch.cuda.graph(graph, stream=stream):
                    call()
            except (RuntimeError, ValueError) as caught:
                return None, first_line(caught)
        self.wait()
        return graph.replay, ""

    def replay_us(self, replay: Callable[[], object]) -> float:
        if self.device.type == "cpu":
            return medians_ms({"": replay}, self.seconds)[""] * 1e3
        taken, end = [], time.perf_counter() + self.seconds
        while len(taken) < 5 or (time.perf_counter() < end and len(taken) < 200):
            start, stop = (self.module.Event(enable_timing=True) for _ in range(2))
            self.flush()
            start.record()
            replay()
            stop.record()
            self.wait()
            taken.append(start.elapsed_time(stop) * 1e3)
        return statistics.median(taken)

    def call_us(self, call: Callable[[], object]) -> float:
        """Return the time of a call among many that are queued without waiting for the device."""
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=self.seconds).median * 1e6
