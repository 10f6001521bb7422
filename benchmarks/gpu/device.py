"""What the programs in this folder share: their options, the device, their results, and times."""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.benchmark import Timer

import mingru
from mingru.bench import medians_ms
from mingru.ops import spec_of
from mingru.ops.backends.triton import launch
from mingru.ops.backends.triton.device import IS_INTERPRETED, first_line, unsupported

from ..measure import where, write
from . import end_with

ROOT = Path(__file__).parents[2]
# Results of other sources are not compared.
SOURCES = ("src/mingru/**/*.py", "tests/ops/*.py", "tests/reference.py", "benchmarks/gpu/*.py")
# Facts that results of one file have in common. What differs between two hours of one card is not compared.
SAME = ("name", "torch", "triton", "sources")
DRIVER = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,clocks_throttle_reasons.active"


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the options of a program. Adds the device, and the backend that the program tests or times on it."""
    accelerator = torch.accelerator.current_accelerator()
    parser.add_argument("--device", type=torch.device, default=accelerator, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing after this time")
    parser.add_argument("--results", type=Path, help="folder: write the results there, and go on where they end")
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
    """Return those dtypes that the backend takes on a device: not bfloat16 on a T4."""
    empty = (torch.empty(0, dtype=dtype, device=device) for dtype in dtypes)
    spec = spec_of("mingru", "positive", False, 0.0)
    return [x.dtype for x in empty if backend != "triton" or unsupported(x, spec) is None]


def about(device: torch.device) -> dict[str, Any]:
    """Print and return the machine, the versions, and the properties of the device."""
    facts = {**where(), "cuda": torch.version.cuda, "hip": torch.version.hip, "device": str(device), "name": "CPU"}
    facts["triton"] = importlib.import_module("triton").__version__ if mingru.backends()["triton"] is True else None
    if device.type != "cpu":
        properties = torch.get_device_module(device).get_device_properties(device)
        facts |= {"name": properties.name, "properties": str(properties)}
    if device.type == "cuda" and shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={DRIVER}", "--format=csv,noheader", f"--id={device.index or 0}"]
        facts[DRIVER] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    facts["sources"] = digest(*SOURCES)
    print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n", flush=True)
    return facts


def digest(*patterns: str, text: str = "") -> str:
    """Return what changes with files of this folder, and with a text."""
    paths = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths) + text.encode()).hexdigest()[:12]


def compiled(function: Callable[..., None], *task: Any) -> None:
    """Call a function so that Triton stores its kernels on disk. What fails here fails again where it is measured."""
    with suppress(Exception):
        function(*task)
    # Now that an error does not hold tensors any more.
    torch.accelerator.empty_cache()


class Results:
    """Results of a program by kind and title, written to FOLDER/PROGRAM.json after each, so that a run goes on where
    another one was stopped. A measurement that fails is in "failed", and the next run tries it again."""

    def __init__(self, args: argparse.Namespace, program: str) -> None:
        self.name, self.path = program, args.results and args.results / f"{program}.json"
        self.device, self.end, self.is_stopped = args.device, time.monotonic() + 60 * args.minutes, False
        self.pool: ProcessPoolExecutor | None = None
        facts = about(args.device)
        self.all: dict[str, Any] = {"device": facts, "backend": args.backend, "failed": {}}
        if self.path is not None and self.path.exists():
            found = json.loads(self.path.read_text())
            if all(found["device"].get(name) == facts.get(name) for name in SAME):
                self.all = found
            else:
                os.replace(self.path, self.path.with_name(f"{program}-{found['device']['sources']}.json"))

    def missing(self, kind: str, titles: Iterable[Any]) -> list[Any]:
        """Return those titles that have no result yet."""
        return [title for title in titles if str(title) not in self.all.get(kind, {})]

    def of(self, kind: str, title: str, measure: Callable[..., Any], *arguments: Any) -> Any:
        """Return what is known, or measure it; None if there is no time left, or if it fails."""
        known, failed, name = self.all.setdefault(kind, {}), self.all["failed"], f"{kind}, {title}"
        if title not in known and self.has_time(name):
            failed.pop(name, None)
            try:
                known[title] = measure(*arguments)
            except Exception as caught:
                failed[name] = first_line(caught)
                traceback.print_exc()
            print(f"{name}: {known.get(title)}", flush=True)
            self.write()
            if name in failed and self.device.type != "cpu":
                # An error here is one of the device, after which everything would fail.
                torch.get_device_module(self.device).synchronize(self.device)
        return known.get(title)

    def has_time(self, name: str) -> bool:
        if time.monotonic() > self.end and not self.is_stopped:
            self.is_stopped = True
            print(f"stopped before {name}; the same command goes on from there")
        return not self.is_stopped

    def write(self) -> None:
        if self.path is not None:
            write(self.path, self.all)

    def compile(self, function: Callable[..., None], tasks: Iterable[Sequence[Any]]) -> None:
        """Call a function for each task in other processes, which end with this one."""
        if self.device.type == "cpu" or self.is_stopped:
            return
        if self.pool is None:
            own = multiprocessing.get_context("spawn"), end_with, (os.getpid(),)
            # Each process may have 3 GB of the GPU's memory.
            free = torch.get_device_module(self.device).mem_get_info(self.device)[0]
            self.pool = ProcessPoolExecutor(max(1, min(16, os.cpu_count() or 1, free // (3 << 30))), *own)
        try:
            for future in [self.pool.submit(compiled, function, *task) for task in tasks]:
                future.exception()
        except BrokenProcessPool:
            self.pool = None

    def finish(self, wrong: Sequence[str] | None = None) -> int:
        """Print the last line of the program; return its exit status. Default of `wrong`: what failed."""
        wrong = [*self.all["failed"]] if wrong is None else wrong
        count = sum(len(each) for kind, each in self.all.items() if kind not in ("device", "backend"))
        stopped = ", stopped after --minutes" if self.is_stopped else ""
        print(*(f"WRONG: {name}" for name in wrong), f"{self.name}: {len(wrong)} of {count} wrong{stopped}", sep="\n")
        return int(bool(wrong))


@contextmanager
def passes_of(backend: str) -> Iterator[mock.Mock]:
    """Count the launches of Triton kernels in the block. "triton" must launch those of both passes."""
    with mock.patch.object(launch, "run", wraps=launch.run) as run:
        yield run
    names = {call.args[0] for call in run.call_args_list}
    if backend == "triton" and names != {"forward", "backward"}:
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
