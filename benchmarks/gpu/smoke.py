"""Check within minutes that the GPU kernels are right on this device. Exits with 1 if one is wrong.

    python -m benchmarks.gpu.smoke [--results FOLDER] [--minutes 9]
    TRITON_INTERPRET=1 python -m benchmarks.gpu.smoke --device cpu --small --configurations 4

Prints the versions, the driver and the properties of the device. Then it compares random configurations with the
reference of the tests, in float64 on the CPU, one step and one sequence after the other. Then it checks sequences of a
million steps that forget slowly, single steps with gates from -30 to 30, and CUDA graphs that are captured with and
without a call before. Calls whose kernels fail are wrong, too.
"""

import argparse
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import calls
import torch
from calls import Row, make, states
from torch.nn.utils.rnn import pack_padded_sequence

import mingru
from mingru.ops.backends.triton.device import first_line

from .device import ROOT, Results, digest, parse, passes_of, supported

# Largest batch, steps and features: few steps; chunks; segments of time; a walk over many sequences and features.
SIZES = ((70, 16, 300), (8, 900, 130), (2, 9000, 40), (300, 90, 513))
SMALL = ((3, 3, 9), (2, 20, 6))
REFERENCES = ROOT / "out" / "references"
# What must happen with CUDA graphs. The message of a capture without a call before says what to do.
AFTER_A_CALL = "^(right|.*call the module once.*); after a call, right$"
REFUSED = "packed sequences cannot be captured"
GRAPHS = {"inference": AFTER_A_CALL, "training": AFTER_A_CALL, "packed sequences": f"{REFUSED}.*; after.* {REFUSED}"}
# Largest relative error of float32. With slow decays, the roundings of about 8,000 decays to 6e-8 add up: 4e-6 in
# Triton's interpreter after 50,000 steps.
MOST_OF_ONE_STEP, MOST_OF_SLOW_DECAYS = 1e-6, 1e-5
ONE_STEP = "mingru, one step"
SLOW = [("mingru", 0.0), ("mingru", 0.1), ("minlstm", 0.0), ("linear_scan", 0.0)]


def configurations(count: int, seed: int, sizes: tuple[tuple[int, ...], ...] = SIZES) -> Iterator[Row]:
    """Yield random calls of the table of the tests."""
    draw = random.Random(seed)
    while count > 0:
        row = {name: draw.choice(values) for name, values in calls.FACTORS.items()}
        batch, steps, features = (draw.randint(1, most) for most in draw.choice(sizes))
        row |= {"batch": batch, "steps": steps, "features": (features + -features % calls.parts_of(row["cell"]),)}
        if row["cell"] not in calls.TIMED:
            row |= {"dt": False, "min_decay": 0.0}
        if row["cell"] in calls.SCANS:
            row |= {"candidate": "linear", "batch_first": True, "layout": "padded"}
        if calls.is_allowed(row):
            count -= 1
            yield Row(**row)


def kept(row: Row, seed: int, truth: Callable[..., list[torch.Tensor]] = calls._truth) -> list[torch.Tensor]:
    """Return the reference of a row. It is kept on disk, because it takes longer than the kernels."""
    name = digest("tests/reference.py", "tests/ops/calls.py", text=f"{row} {seed} {torch.__version__}")
    path, part = REFERENCES / f"{name}.pt", REFERENCES / f"{name}.{os.getpid()}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save([x.detach() for x in truth(row, seed)], part)
        os.replace(part, path)
    return list(torch.load(path))


def check(row: Row, device: torch.device, backend: str) -> float:
    """Return the largest error of a call, as a share of what is allowed; infinity if two runs differ."""
    with passes_of(backend), mock.patch.object(calls, "_truth", kept):
        return calls.share_of_allowed(backend, row, device=device, runs=2)


def slow_decay(cell: str, min_decay: float, device: torch.device, backend: str, steps: int) -> dict[str, float]:
    """Return the largest relative errors of float32 sequences that forget 1 part in 8,000 in each step, or about it."""
    inputs, *_, dt = make(cell, 1, steps, 4, dtype=torch.float32)
    inputs[-2] -= 9.0
    inputs = [(9.0 - inputs[1]).sigmoid(), inputs[1].abs()] if cell == "linear_scan" else inputs
    results = []
    for wide, name, place in ((torch.float32, backend, device), (torch.float64, "torch", "cpu")):
        leaves = [x.to(place, wide).requires_grad_() for x in inputs]
        timed = {"dt": dt.to(place, wide), "min_decay": min_decay} if min_decay else {}
        h = torch.full_like(leaves[0][:, :1], 0.5).detach()
        out = getattr(mingru.functional, cell)(*leaves, h, backend=name, **timed)
        # All terms of both are positive, so that no error is small only beside another number.
        results.append([out, *torch.autograd.grad(out.sum(), leaves[-1])])
    pairs = zip(("states", "gradients"), *results, strict=True)
    return {name: ((one.double().cpu() - other) / other).abs().max().item() for name, one, other in pairs}


def single_steps(device: torch.device, backend: str) -> dict[str, float]:
    """Return the largest relative error of a float32 step, which depends on the GPU's exponential and reciprocal."""
    inputs = [torch.linspace(-most, most, 4096)[torch.randperm(4096)].view(1, 1, -1) for most in (30.0, 8.0)]
    h = torch.zeros(1, 1, 4096)
    got, truth = (states(name, "mingru", inputs, h, device=device)[0] for name in (backend, "exact"))
    return {"states": ((got.double() - truth) / truth).abs().max().item()}


def captured(function: Callable[[], torch.Tensor]) -> str:
    """Capture a CUDA graph without a call before, and after one; return what happened."""
    found = []
    # The first product of matrices loads cuBLAS, which a capture cannot do.
    torch.eye(2, device="cuda").mm(torch.eye(2, device="cuda"))
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.graph(graph):
                out = function()
            graph.replay()
            found.append("right" if torch.allclose(out, function()) else "WRONG")
        except (RuntimeError, ValueError) as caught:
            # The end of the capture may raise once more.
            found.append(f"an error: {first_line(caught)} ({caught.__context__})")
            function()
    return "; after a call, ".join(found)


def graphs(device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the calls to capture."""
    x = torch.randn(4, 50, 6, device=device, dtype=torch.float64, requires_grad=True)
    packed = pack_padded_sequence(x.detach(), torch.tensor([50, 9, 9, 1]), batch_first=True)
    # Kernels that nothing here has loaded, because the numbers of features of the random calls are even.
    rnn = mingru.MinGRU(6, 1, gate="signed", device=device, dtype=torch.float64)
    return {
        "inference": torch.no_grad()(lambda: rnn(x)[0]),
        "training": lambda: torch.autograd.grad(rnn(x)[0].square().sum(), x)[0],
        "packed sequences": torch.no_grad()(lambda: rnn(packed)[0].data),
    }


def wrong_of(results: dict[str, Any]) -> list[str]:
    """Return the names of the checks that failed, or whose result is wrong."""
    wrong = [name for name, share in results.get("shares", {}).items() if not share <= 1.0]
    for title, found in results.get("errors", {}).items():
        most = MOST_OF_ONE_STEP if title == ONE_STEP else MOST_OF_SLOW_DECAYS
        wrong += [f"{title}, {name}" for name, value in found.items() if not value <= most]
    graphs = results.get("graphs", {})
    return [*results["failed"], *wrong, *(name for name in graphs if not re.search(GRAPHS[name], graphs[name]))]


def count_of(results: dict[str, Any]) -> int:
    return sum(len(results.get(kind, {})) for kind in ("failed", "shares", "errors", "graphs"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--configurations", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="small sizes, for Triton's interpreter")
    args = parse(parser, arguments)
    results, where = Results(args, "smoke"), (args.device, args.backend)
    dtypes = supported(calls.FACTORS["dtype"], *where)
    rows = configurations(args.configurations, args.seed, SMALL if args.small else SIZES)
    rows = [row for row in rows if row.dtype in dtypes]
    conversion = "triton.runtime.interpreter._convert_float"
    with mock.patch(conversion, calls.rounded_bfloat16()) if calls.INTERPRETED else nullcontext():
        for first in range(0, len(rows), 16):
            batch = rows[first : first + 16]
            results.compile(check, [(row, *where) for row in results.missing("shares", batch)])
            for row in batch:
                results.of("shares", str(row), check, row, *where)
    steps = 300 if args.small else 1_000_000
    for cell, min_decay in SLOW:
        title = f"{cell}{', dt, min_decay' if min_decay else ''}, {steps} steps"
        results.of("errors", title, slow_decay, cell, min_decay, *where, steps)
    results.of("errors", ONE_STEP, single_steps, *where)
    for name, function in graphs(args.device).items() if args.device.type == "cuda" else ():
        results.of("graphs", name, captured, function)
    return results.finish(wrong_of(results.all))


if __name__ == "__main__":
    sys.exit(main())
