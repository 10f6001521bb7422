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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import mingru
from mingru import ops
from mingru.ops import NUM_INPUTS, Spec, Start
from mingru.ops.backends.triton.device import first_line
from mingru.ops.cells import TIMED, parts_of

from ..measure import write_json
from .device import about, allowed, error, launches, parse, supported

sys.path += [str(Path(__file__).parents[2] / folder) for folder in ("tests", "tests/ops")]
from calls import exact, make, run

# Largest batch, steps and features: few steps; chunks; segments of time; a walk over many sequences and features.
SIZES = ((70, 16, 300), (8, 900, 130), (2, 9000, 40), (300, 90, 513))
SMALL = ((3, 3, 9), (2, 20, 6))
CHOICES: dict[str, tuple[Any, ...]] = {
    "cell": tuple(NUM_INPUTS),
    "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "layout": ("batch first", "time first", "lengths", "packed"),
    "activation": ("positive", "linear", "tanh"),
    "reverse": (False, True),
    "reset": (False, True),
    "dt": (False, True),
    "min_decay": (0.0, 0.1, 0.9),
}
# Largest relative error of float32. With slow decays, the roundings of about 8,000 decays to 6e-8 add up: 4e-6 in
# Triton's interpreter after 50,000 steps.
MOST_OF_ONE_STEP, MOST_OF_SLOW_DECAYS = 1e-6, 1e-5
Config = dict[str, Any]


def configurations(count: int, seed: int, sizes: tuple[tuple[int, ...], ...] = SIZES) -> Iterator[Config]:
    draw = random.Random(seed)
    for _ in range(count):
        config = {name: draw.choice(values) for name, values in CHOICES.items()}
        if config["cell"] not in TIMED:
            config |= {"dt": False, "min_decay": 0.0}
        batch, steps, features = (draw.randint(1, most) for most in draw.choice(sizes))
        features += -features % parts_of(config["cell"])
        yield config | {"shape": (batch, steps, features)}


def by_kernel(config: Config, backend: str, lengths: Tensor, reset: Tensor | None, leaves: list[Tensor]) -> Any:
    """Return the states, padded and batch first, and the last states, computed in the layout of the configuration."""
    count, layout = NUM_INPUTS[config["cell"]], config["layout"]
    inputs, states, dt = leaves[:count], leaves[count : count + 2], leaves[-1] if config["dt"] else None
    options = {name: config[name] for name in ("activation", "reverse", "min_decay")}
    if layout == "lengths":
        spec = Spec(config["cell"], *options.values())
        return ops.recurrence(spec, inputs, Start(*states, reset, dt), ops.Layout(False, None, lengths), backend)
    if layout == "batch first":
        return run(backend, config["cell"], inputs, *states, reset, dt, **options)

    def laid_out(x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous() if layout == "time first" else pack_padded_sequence(x, lengths, True).data

    given = [None if x is None else laid_out(x) for x in (reset, dt)]
    inputs = [laid_out(x) for x in inputs]
    if layout == "time first":
        out, last = run(backend, config["cell"], inputs, *states, *given, **options, time_first=True)
        return out.transpose(0, 1), last
    batch_sizes = pack_padded_sequence(leaves[0], lengths, batch_first=True).batch_sizes
    out, last = run(backend, config["cell"], inputs, *states, *given, **options, batch_sizes=batch_sizes)
    return pad_packed_sequence(PackedSequence(out, batch_sizes), batch_first=True)[0], last


def by_steps(config: Config, lengths: Tensor, reset: Tensor | None, leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the same by the reference of the tests, for each sequence without its padding."""
    count, parts = NUM_INPUTS[config["cell"]], []
    options = {name: config[name] for name in ("activation", "reverse", "min_decay")}
    for b, length in enumerate(lengths.tolist()):
        inputs = [x[b : b + 1, :length] for x in leaves[:count]]
        states = [x[b : b + 1] for x in leaves[count : count + 2]]
        given = [None if x is None else x[b : b + 1, :length] for x in (reset, leaves[-1] if config["dt"] else None)]
        out, last = exact(config["cell"], inputs, *states, *given, **options)
        parts.append((F.pad(out, (0, 0, 0, config["shape"][1] - length)), last))
    outs, lasts = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lasts)


def graded(function: Callable[[list[Tensor]], Any], tensors: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Return the states, the last states, and the gradients of all tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    results = function(leaves)
    weights = [weight.to(x) for weight, x in zip(weights, results, strict=True)]
    return [*results, *torch.autograd.grad(results, leaves, weights, allow_unused=True, materialize_grads=True)]


def drawn(config: Config) -> tuple[list[Tensor], Tensor | None, Tensor, list[Tensor]]:
    """Return random tensors, resets and lengths of a configuration, and weights of its states and last states."""
    (batch, steps, features), dtype = config["shape"], config["dtype"]
    inputs, *states, reset, dt = make(config["cell"], batch, steps, features, dtype=dtype, reset=config["reset"])
    lengths = torch.full((batch,), steps)
    if config["layout"] in ("lengths", "packed"):
        # The longest is the first, and has all steps.
        lengths[1:] = torch.randint(1, steps + 1, (batch - 1,)).sort(descending=True).values
    weights = [torch.randn(batch, size, features).to(dtype) for size in (steps, 1)]
    return [*inputs, *states, *([dt] if config["dt"] else [])], reset, lengths, weights


def check(config: Config, device: torch.device, backend: str) -> float:
    """Return the largest error of a configuration, as a share of what is allowed; infinity if two runs differ."""
    tensors, reset, lengths, weights = drawn(config)
    truth = graded(lambda leaves: by_steps(config, lengths, reset, leaves), [x.double() for x in tensors], weights)
    own = [x.to(device) for x in tensors], None if reset is None else reset.to(device)

    def got() -> list[Tensor]:
        return graded(lambda leaves: by_kernel(config, backend, lengths, own[1], leaves), own[0], weights)

    with launches() as names:
        results = got()
    if backend == "triton" and not {"forward", "backward"} <= set(names):
        raise AssertionError(f"{config}: only the passes {names} ran in Triton")
    if not all(torch.equal(one, other) for one, other in zip(results, got(), strict=True)):
        return float("inf")
    return error(results, truth) / allowed(config["dtype"], 4 if config["dt"] or config["min_decay"] else 2)


def fuzz(configs: Iterator[Config], device: torch.device, backend: str) -> dict[str, float]:
    """Return the error of each configuration as a share of what is allowed, and print it."""
    shares = {}
    for config in configs:
        start, name = time.perf_counter(), ", ".join(f"{name} {value}" for name, value in config.items())
        shares[name] = share = check(config, device, backend)
        verdict = "right" if share <= 1.0 else "WRONG"
        print(f"{verdict}  {share:.2f} of the allowed error  {time.perf_counter() - start:4.1f} s  {name}", flush=True)
    return shares


def slow_decays(device: torch.device, backend: str, steps: int) -> dict[str, float]:
    """Return the largest relative errors of float32 sequences that forget 1 part in 8,000 in each step."""

    def states_and_grad(inputs: list[Tensor], backend: str) -> list[Tensor]:
        h = torch.full_like(inputs[0][:, :1], 0.5)
        out, _ = run(backend, cell, [*inputs[:-1], inputs[-1].requires_grad_()], h, h)
        # All terms of both are positive, so that no error is small only beside another number.
        return [out, *torch.autograd.grad(out.sum(), inputs[-1])]

    found = {}
    for cell in ("mingru", "minlstm"):
        inputs = make(cell, 1, steps, 4, dtype=torch.float32)[0]
        inputs[-2] -= 9.0
        got = states_and_grad([x.to(device, copy=True) for x in inputs], backend)
        truth = states_and_grad([x.double() for x in inputs], "torch")
        for name, one, other in zip(("states", "gradients"), got, truth, strict=True):
            found[f"{cell}, {steps} steps, {name}"] = ((one.double().cpu() - other) / other).abs().max().item()
    return found


def single_steps(device: torch.device, backend: str) -> dict[str, float]:
    """Return the largest relative error of a float32 step, which depends on the GPU's exponential and reciprocal."""
    inputs = [torch.linspace(-most, most, 4096)[torch.randperm(4096)].view(1, 1, -1) for most in (30.0, 8.0)]
    h = torch.zeros(1, 1, 4096)
    got, _ = run(backend, "mingru", [x.to(device) for x in inputs], *[h.to(device)] * 2)
    truth, _ = exact("mingru", [x.double() for x in inputs], *[h.double()] * 2)
    return {"mingru, one step": ((got.double().cpu() - truth) / truth).abs().max().item()}


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
    rnn, x = mingru.MinGRU(6, 1, gate="signed", device=device, dtype=torch.float64), x.double()
    for name in ("inference, without a call before", "inference, after a call"):
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()), torch.cuda.graph(graph):
                out, _ = rnn(x)
        except RuntimeError as caught:
            # The end of the capture may raise once more.
            found[name] = f"an error: {first_line(caught)} ({caught.__context__})"
        else:
            graph.replay()
            found[name] = "right" if torch.allclose(out, rnn(x)[0]) else "WRONG"
        with torch.no_grad():
            rnn(x)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--configurations", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="small sizes, for Triton's interpreter")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parse(parser, arguments)
    torch.manual_seed(args.seed)
    started, facts = time.perf_counter(), about(args.device)
    for name, value in {**facts, "backend": args.backend}.items():
        print(f"{name}: {value}")
    dtypes = supported(CHOICES["dtype"], args.device, args.backend)
    configs = configurations(args.configurations, args.seed, SMALL if args.small else SIZES)
    shares = fuzz((each for each in configs if each["dtype"] in dtypes), args.device, args.backend)
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
