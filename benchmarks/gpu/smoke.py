"""Check within minutes that the GPU kernels are right on this device. Exits with 1 if one is wrong.

    python -m benchmarks.gpu.smoke [--json FILE]
    TRITON_INTERPRET=1 python -m benchmarks.gpu.smoke --device cpu --small --configurations 4

Prints the versions, the driver and the properties of the device. Then it compares random configurations with the
reference of the tests, in float64 on the CPU, one step and one sequence after the other. Then it checks sequences of a
million steps that forget slowly, single steps with gates from -30 to 30, and CUDA graphs that are captured with and
without a call before.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from unittest import mock

import calls
import torch
from calls import Row, make, states

import mingru
from mingru.ops.backends.triton.device import first_line
from mingru.ops.cells import TIMED

from ..measure import write_json
from .device import about, parse, passes_of, supported

# Largest batch, steps and features: few steps; chunks; segments of time; a walk over many sequences and features.
SIZES = ((70, 16, 300), (8, 900, 130), (2, 9000, 40), (300, 90, 513))
SMALL = ((3, 3, 9), (2, 20, 6))
# Largest relative error of float32. With slow decays, the roundings of about 8,000 decays to 6e-8 add up: 4e-6 in
# Triton's interpreter after 50,000 steps.
MOST_OF_ONE_STEP, MOST_OF_SLOW_DECAYS = 1e-6, 1e-5


def configurations(count: int, seed: int, sizes: tuple[tuple[int, ...], ...] = SIZES) -> Iterator[Row]:
    """Yield random calls of the table of the tests."""
    draw = random.Random(seed)
    while count > 0:
        row = {name: draw.choice(values) for name, values in calls.FACTORS.items()}
        batch, steps, features = (draw.randint(1, most) for most in draw.choice(sizes))
        row |= {"batch": batch, "steps": steps, "features": (features + -features % calls.parts_of(row["cell"]),)}
        if row["cell"] not in TIMED:
            row |= {"dt": False, "min_decay": 0.0}
        if row["cell"] in calls.SCANS:
            row |= {"activation": "linear", "layout": "batch first"}
        if calls.is_allowed(row):
            count -= 1
            yield Row(**row)


def check(row: Row, device: torch.device, backend: str) -> float:
    """Return the largest error of a call, as a share of what is allowed; infinity if two runs differ."""
    with passes_of(backend):
        return calls.share_of_allowed(backend, row, device=device, runs=2)


def fuzz(rows: Iterator[Row], device: torch.device, backend: str) -> dict[str, float]:
    """Return the error of each call as a share of what is allowed, and print it."""
    shares = {}
    for row in rows:
        start = time.perf_counter()
        shares[str(row)] = share = check(row, device, backend)
        verdict = "right" if share <= 1.0 else "WRONG"
        print(f"{verdict}  {share:.2f} of the allowed error  {time.perf_counter() - start:4.1f} s  {row}", flush=True)
    return shares


def slow_decays(device: torch.device, backend: str, steps: int) -> dict[str, float]:
    """Return the largest relative errors of float32 sequences that forget 1 part in 8,000 in each step, or about it."""
    found = {}
    for cell, min_decay in (("mingru", 0.0), ("mingru", 0.1), ("minlstm", 0.0), ("linear_scan", 0.0)):
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
        for name, one, other in zip(("states", "gradients"), *results, strict=True):
            error = ((one.double().cpu() - other) / other).abs().max().item()
            found[f"{cell}{', dt, min_decay' if timed else ''}, {steps} steps, {name}"] = error
    return found


def single_steps(device: torch.device, backend: str) -> dict[str, float]:
    """Return the largest relative error of a float32 step, which depends on the GPU's exponential and reciprocal."""
    inputs = [torch.linspace(-most, most, 4096)[torch.randperm(4096)].view(1, 1, -1) for most in (30.0, 8.0)]
    h = torch.zeros(1, 1, 4096)
    got, truth = (states(name, "mingru", inputs, h, device=device)[0] for name in (backend, "exact"))
    return {"mingru, one step": ((got.double() - truth) / truth).abs().max().item()}


def graphs(device: torch.device) -> dict[str, str]:
    """Capture CUDA graphs of training and inference, after a call and without one; return what happened."""
    if device.type != "cuda":
        return {}
    rnn, x = mingru.MinGRU(6, 24, num_layers=2, device=device), torch.randn(4, 50, 6, device=device)
    trained = torch.cuda.make_graphed_callables(lambda x: rnn(x)[0], (x.clone().requires_grad_(),))
    leaf = x.clone().requires_grad_()
    grads = [torch.autograd.grad(function(leaf).square().sum(), leaf)[0] for function in (trained, lambda x: rnn(x)[0])]
    found = {"training, after a call": "right" if torch.allclose(*grads, rtol=1e-5, atol=1e-6) else "WRONG"}
    # A kernel that nothing here has loaded, because the numbers of features of the fuzz are even.
    rnn, x = mingru.MinGRU(6, 1, gate="signed", device=device, dtype=torch.float64).requires_grad_(False), x.double()
    for name in ("inference, without a call before", "inference, after a call"):
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.graph(graph):
                out, _ = rnn(x)
            graph.replay()
            found[name] = "right" if torch.allclose(out, rnn(x)[0]) else "WRONG"
        except RuntimeError as caught:
            # The end of the capture may raise once more.
            found[name] = f"an error: {first_line(caught)} ({caught.__context__})"
            rnn(x)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--configurations", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="small sizes, for Triton's interpreter")
    args = parse(parser, arguments)
    torch.manual_seed(args.seed)
    started, facts = time.perf_counter(), about(args.device)
    dtypes = supported(calls.FACTORS["dtype"], args.device, args.backend)
    rows = configurations(args.configurations, args.seed, SMALL if args.small else SIZES)
    conversion = "triton.runtime.interpreter._convert_float"
    with mock.patch(conversion, calls.rounded_bfloat16()) if calls.INTERPRETED else nullcontext():
        shares = fuzz((row for row in rows if row.dtype in dtypes), args.device, args.backend)
    slow = slow_decays(args.device, args.backend, 300 if args.small else 1_000_000)
    single, captured = single_steps(args.device, args.backend), graphs(args.device)
    for name, value in {**slow, **single, **captured}.items():
        print(f"{name}: {value}")
    limits = ((shares, 1.0), (slow, MOST_OF_SLOW_DECAYS), (single, MOST_OF_ONE_STEP))
    wrong = [name for errors, most in limits for name, value in errors.items() if not value <= most]
    # The message of a capture without a call before says what to do.
    wrong += [name for name, value in captured.items() if value != "right" and "call the module once" not in value]
    count, seconds = sum(map(len, (shares, slow, single, captured))), time.perf_counter() - started
    print(f"{len(wrong)} of {count} checks are wrong, {seconds:.0f} s")
    if args.json is not None:
        results = {"device": facts, "backend": args.backend, "shares": shares, "errors": slow | single}
        write_json(args.json, results | {"graphs": captured, "wrong": wrong, "count": count, "seconds": seconds})
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
