"""Time the GPU kernels and whole layers. Their values are checked by `smoke`, and at these shapes by `tilings`.

    python -m benchmarks.gpu.speed [--results FOLDER] [--minutes 9] [--shape 64 1000 10 100]

"GPU" is the median time in microseconds of replaying a CUDA graph of the call, with none of its data in the L2 cache;
"call" is the time of one of many calls in a row, with Python. "floor" is the time in which a large copy would move the
elements that must be read and written, as a share of the time on the GPU: 3 elements for each state of a minGRU forward
and 9 for training, 3 and 8 for a linear scan. "launches" counts the Triton kernels of this library. They are compiled
before, in parallel; only the "first call" of a minGRU of the first shape compiles its kernels, into an empty cache.

nn.GRU, nn.LSTM, nn.Linear and tensor operations are timed too.
"""

import argparse
import functools
import itertools
import os
import sys
import tempfile
import timeit
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import mingru
from mingru import ops
from mingru.bench import forward, forward_backward, output
from mingru.ops import Context, spec_of

from ..measure import GRU, add_shape_option, plain_layers
from .device import Clock, Results, parse, passes_of, supported

# Batch, steps, input and hidden features. The last four: two with segments of time, one step, and little work.
SHAPES = [(64, 1000, 10, 100), (8, 4096, 256, 256), (1024, 128, 512, 512), (16, 16384, 128, 128)]
SHAPES += [(1, 4096, 256, 256), (1, 1_000_000, 64, 64), (64, 1, 512, 512), (1, 16, 32, 32)]
DTYPES = (torch.float32, torch.bfloat16)
Row = dict[str, Any]


class Method(NamedTuple):
    """A function of some tensors."""

    function: Callable[..., Tensor]
    leaves: list[Tensor]
    elements: tuple[int, int] | None = None
    """Elements that must be read or written for each state: forward, and forward and backward."""
    is_own: bool = True
    """Whether the kernels of this library must run."""


def recurrences(shape: Sequence[int], dtype: torch.dtype, device: torch.device, backend: str) -> dict[str, Method]:
    """Return the recurrences from given pre-activations."""
    batch, steps, _, features = shape
    pre = torch.randn(batch, steps, 3 * features, dtype=dtype, device=device)
    inputs = [part.detach().requires_grad_() for part in pre.chunk(3, -1)]
    h = torch.full((batch, 1, features), 0.5, device=device)
    reset, dt = torch.rand(batch, steps, device=device) < 0.01, torch.rand(batch, steps, device=device)

    plain = Context(h, h, None)

    def of(cell: str, context: Context = plain, name: str = backend) -> Method:
        spec, count = spec_of(cell, "positive", False, 0.0), ops.cells.NUM_INPUTS[cell]
        elements = count + 1, 3 * count + 3
        return Method(lambda *x: ops.recurrence(spec, x, context, backend=name)[0], inputs[:count], elements)

    a, b = ((-inputs[0]).sigmoid().detach().requires_grad_(), inputs[1].detach().clone().requires_grad_())
    return {
        "minGRU": of("mingru"),
        "minGRU, resets": of("mingru", Context(h, h, reset)),
        "minGRU, elapsed times": of("mingru", Context(h, h, None, dt)),
        'minGRU, gate="signed"': of("mingru_signed"),
        'minGRU, gate="rotation"': of("mingru_rotation"),
        "minLSTM": of("minlstm"),
        "linear_scan": Method(lambda a, b: mingru.functional.linear_scan(a, b, backend=backend), [a, b], (3, 8)),
        "minGRU, tensor operations": of("mingru", name="torch")._replace(is_own=False),
    }


def layers(shape: Sequence[int], dtype: torch.dtype, device: torch.device, _: str) -> dict[str, Method]:
    """Return whole layers; `use_backend` chooses their backend."""
    batch, steps, input_dims, features = shape
    x = torch.randn(batch, steps, input_dims, device=device, dtype=dtype)
    reset = torch.rand(batch, steps, device=device) < 0.01

    def of(module: nn.Module, *rest: Any) -> Method:
        """Return the module's output of x."""
        leaves = [x.clone().requires_grad_(), *module.parameters()]
        return Method(lambda x, *_: output(module(x, *rest)), leaves, is_own="mingru" in type(module).__module__)

    modules = {name: each.to(device, dtype) for name, each in plain_layers(input_dims, features).items()}
    if steps > 20_000:
        # They need about 12 microseconds for each step.
        del modules[GRU], modules["nn.LSTM"]
    rnn = modules.pop("mingru")
    methods = {
        "MinGRU": of(rnn),
        "MinGRU, resets": of(rnn, None, reset),
        "MinGRU, lengths": of(rnn, None, None, torch.linspace(steps, max(1, steps // 2), batch).long()),
        "MinLSTM": of(mingru.MinLSTM(input_dims, features, device=device, dtype=dtype)),
    }
    return methods | {name: of(module) for name, module in modules.items()}


def call_once(method: Method) -> Tensor:
    """Call both passes, and return the output."""
    out = method.function(*method.leaves)
    torch.autograd.grad(out, method.leaves, torch.ones_like(out))
    return out


def measure(clock: Clock, method: Method, backend: str, bandwidth: float) -> Row:
    """Time a method. `bandwidth`: bytes per microsecond of a copy."""
    function, leaves, elements, is_own = method
    with passes_of(backend if is_own else "") as launched:
        out = call_once(method)
    row: Row = {"launches": launched.call_count, "states": out.numel()}
    # The calls keep their tensors.
    launched.reset_mock()
    num_bytes = out.numel() * out.element_size()
    del out
    passes = (forward(lambda: function(*leaves)), forward_backward(lambda: function(*leaves), leaves))
    for index, (name, call) in enumerate(zip(("forward", "training"), passes, strict=True)):
        row[name] = clock.times(call)
        if elements is not None:
            row[name]["floor"] = elements[index] * num_bytes / bandwidth
    return row


def compile_method(make: Any, name: str, backend: str, *arguments: Any) -> None:
    """Call the kernels of a method."""
    with mingru.use_backend(backend):
        call_once(make(*arguments, backend)[name])


COLUMNS = ["", "GPU", "training", "floor", "training", "call", "training", "launches", "not captured"]


def cells(row: Row) -> list[str]:
    """Return a row of a table, without its name."""
    passes = row["forward"], row["training"]
    shares = [x["floor"] / x["device"] if x.get("floor") and x["device"] else None for x in passes]
    return [
        *("?" if x["device"] is None else f"{x['device']:.1f}" for x in passes),
        *("" if share is None else f"{share:.0%}" for share in shares),
        *(f"{x['call']:.1f}" for x in passes),
        str(row["launches"]),
        passes[0]["why"] or passes[1]["why"],
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.1, help="for each time (default: %(default)s)")
    add_shape_option(parser, "eight shapes")
    args = parse(parser, arguments)
    with mingru.use_backend(args.backend):
        return run(args, Clock(args.device, args.seconds), Results(args, "speed"))


def bandwidth_of(clock: Clock) -> dict[str, float]:
    """Return bytes per microsecond of a large copy, and microseconds of one that copies a number."""
    pair = [torch.zeros(1 << (20 if clock.device.type == "cpu" else 28), device=clock.device) for _ in range(2)]
    taken = [clock.times(lambda size=size: pair[0][:size].copy_(pair[1][:size])) for size in (None, 1)]
    # On devices without graphs, the time of one of many calls.
    large_us, small_us = (times["device"] or times["call"] for times in taken)
    return {"bandwidth": 2 * pair[0].numel() * pair[0].element_size() / large_us, "one_launch_us": small_us}


def run(args: argparse.Namespace, clock: Clock, results: Results) -> int:
    copies = results.of("copies", "large and small", bandwidth_of, clock)
    if copies is None:
        return results.finish()
    shapes, dtypes = args.shape or SHAPES, supported(DTYPES, args.device, args.backend)
    for shape, dtype, make in itertools.product(shapes, dtypes, (recurrences, layers)):
        kind, given = make.__name__, (tuple(shape), dtype, args.device)
        title = f"(B, S, I, H) = {given[0]}, {str(dtype).removeprefix('torch.')}"
        methods = make(*given, args.backend)
        own = [name for name in results.missing(f"{kind}, {title}", methods) if methods[name].is_own]
        if kind == "recurrences" and shape is shapes[0] and clock.device.type != "cpu":
            # This process has no kernels yet, and the folder has none either.
            with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):
                first = functools.partial(call_once, methods["minGRU"])
                results.of("first call", title, lambda first=first: timeit.timeit(first, number=1))
        results.compile(compile_method, [(make, name, args.backend, *given) for name in own])
        for name, method in methods.items():
            results.of(f"{kind}, {title}", name, measure, clock, method, args.backend, copies["bandwidth"])
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
