"""Try many tilings for each class of shapes, check their values, and write the fastest as JSON.

    python -m benchmarks.gpu.tilings [--results FOLDER] [--minutes 9] [--shape 64 1000 100]

A tiling divides the work of a kernel (`src/mingru/ops/backends/triton/tiling.py`). The tilings of a class, 40 of all by
default, are first compiled, in parallel. Then each is timed by replays of a CUDA graph, with none of its data in the L2
cache: a forward tiling in inference, a backward tiling in training, with the usual forward tiling. The program prints,
for each class, the tiling that `tiling_of` chooses and the five fastest, in microseconds. A class fails if the values
of the tiling that `tiling_of` chooses are wrong.
"""

import argparse
import functools
import itertools
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from calls import allowed, error
from torch import Tensor

import mingru
from mingru.bench import forward, forward_backward
from mingru.ops.backends.triton import launch
from mingru.ops.backends.triton.device import facts_of, first_line
from mingru.ops.backends.triton.tiling import Tiling, Work

from .device import Clock, Results, parse, supported

# Batch, steps, features. The last three have 2^16, 2^17 and 2^18 features together; `tiling_of` walks from 2^17 on.
SHAPES = [(64, 1000, 100), (8, 4096, 256), (1, 4096, 256), (1, 1_000_000, 64), (1, 1_000_000, 8)]
SHAPES += [(1024, 128, 512), (128, 256, 512), (256, 256, 512), (512, 256, 512)]


class Task(NamedTuple):
    """A tiling for a pass, in a class of shapes."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    backward: bool
    tiling: Tiling | None
    """None for the tiling that `tiling_of` chooses."""


def candidates(task: Task, wave: int) -> list[Tiling]:
    """Return tilings whose tiles are not much longer than the sequences."""
    batch, steps, features = task.shape
    # Features of a step that a thread has: 16 bytes, or half of that. More steps would need too many registers.
    widths, times = (4,) if task.dtype.itemsize == 4 else (4, 8), (2, 4) if task.backward else (4, 8)
    tilings = []
    for width, time, stages in itertools.product(widths, times, (None, 2, 3)):
        if wave * width < 2 * features:
            tilings.append(Tiling(1, time, wave * width, 1, 1, stages))
        for warps, num_features in itertools.product((1, 2, 4, 8), (8, 16, 32)):
            chunks = wave * width * warps // num_features
            tile, programs = chunks * time, batch * -(-features // num_features)
            if tile <= 2 * steps and num_features < 2 * features:
                # With segments, up to two or four programs for each of 132 processors.
                segments = {max(1, min(64, steps // (2 * tile), most // programs)) for most in (264, 528)}
                tilings += [Tiling(chunks, time, num_features, each, warps, stages) for each in segments]
    return tilings


@contextmanager
def using(task: Task) -> Iterator[list[Tiling]]:
    """Use the tiling of the task for its pass; collect the tilings of that pass."""
    used, usual = [], launch.tiling_of

    def tiling_of(work: Work) -> Tiling:
        tiling = usual(work) if task.tiling is None or work.backward != task.backward else task.tiling
        if work.backward == task.backward:
            used.append(tiling)
        return tiling

    with mock.patch.object(launch, "tiling_of", tiling_of):
        yield used


def results_of(inputs: list[Tensor], backward: bool, backend: str) -> list[Tensor]:
    """Return the states, or the gradients."""
    out = mingru.functional.mingru(*inputs, backend=backend)
    return list(torch.autograd.grad(out, inputs, torch.ones_like(out))) if backward else [out]


def reference_of(inputs: list[Tensor], backward: bool, most: int = 1 << 22) -> list[Tensor]:
    """Return the same in float64, by parts of so many states, because a state takes 168 bytes."""
    dim = 0 if len(inputs[0]) > 1 else 2
    size = max(1, most * inputs[0].shape[dim] // inputs[0].numel())
    parts = zip(*(x.detach().split(size, dim) for x in inputs), strict=True)
    found = [results_of([x.double().requires_grad_() for x in part], backward, "torch") for part in parts]
    return [torch.cat([x.detach() for x in same], dim) for same in zip(*found, strict=True)]


def compile_tiling(task: Task, device: str) -> None:
    """Run a tiling once."""
    launch._failures.clear()
    with using(task):
        x = torch.zeros(task.shape, dtype=task.dtype, device=device, requires_grad=True)
        results_of([x, x], task.backward, "triton")


def timed(clock: Clock, task: Task, inputs: list[Tensor], exact: list[Tensor], backend: str) -> dict[str, Any]:
    """Return the tiling, its time, and its error as a share of what is allowed; or why there is none."""
    call = functools.partial(mingru.functional.mingru, *inputs, backend=backend)
    with using(task) as used:
        # A tiling that failed must not prevent the next one.
        launch._failures.clear()
        try:
            got = results_of(inputs, task.backward, backend)
        except (RuntimeError, ValueError) as failed:
            return {"tiling": task.tiling, "why": first_line(failed)}
        if backend == "triton" and not used:
            raise AssertionError("the launch did not call `tiling_of`, so that its tiling is unknown")
        result = {"tiling": used[0] if used else task.tiling, "share": error(got, exact) / allowed(task.dtype)}
        del got
        if not result["share"] <= 1.0:
            assert task.tiling is not None, f"{task}: the values of the tiling that `tiling_of` chooses are wrong"
            return result | {"why": "its values are wrong"}
        replay, why = clock.capture(forward_backward(call, inputs) if task.backward else forward(call))
        return result | ({"why": why} if replay is None else {"us": clock.replay_us(replay)})


def sweep(clock: Clock, kind: Task, tilings: list[Tiling], backend: str) -> dict[str, Any]:
    """Return the usual tiling of a class, and the fastest of the others."""
    inputs = [torch.randn(kind.shape, device=clock.device).to(kind.dtype).requires_grad_() for _ in range(2)]
    exact = reference_of(inputs, kind.backward)
    chosen, *found = [timed(clock, kind._replace(tiling=tiling), inputs, exact, backend) for tiling in (None, *tilings)]
    fastest = sorted((each for each in found if "us" in each), key=lambda each: each["us"])
    return {"tilings": len(found), "chosen": chosen, "fastest": fastest[:5]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.01, help="for each tiling (default: %(default)s)")
    parser.add_argument("--shape", type=int, nargs=3, action="append", metavar=("B", "S", "H"), help="may be repeated")
    parser.add_argument("--most", type=int, default=40, help="number of tilings of a class (default: %(default)s)")
    args = parse(parser, arguments)
    clock = Clock(args.device, args.seconds)
    dtypes = supported((torch.float32, torch.bfloat16), args.device, args.backend)
    results = Results(args, "tilings")

    def measured(kind: Task) -> dict[str, Any]:
        tilings = candidates(kind, facts_of(args.device)[0])
        tilings = random.Random(0).sample(tilings, min(args.most, len(tilings)))
        # The kernels do not depend on the number of sequences.
        small = kind._replace(shape=(1, min(kind.shape[1], 8192), kind.shape[2]))
        results.compile(compile_tiling, [(small._replace(tiling=each), str(args.device)) for each in (None, *tilings)])
        return sweep(clock, kind, tilings, args.backend)

    for shape, dtype, backward in itertools.product(args.shape or SHAPES, dtypes, (False, True)):
        kind = Task(tuple(shape), dtype, backward, None)
        results.of("classes", str(kind), measured, kind)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
