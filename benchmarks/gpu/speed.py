"""Time the GPU kernels and whole layers. Their values are checked by `smoke`, and at these shapes by `plans`.

    python -m benchmarks.gpu.speed [--json FILE] [--shape 64 1000 10 100]

"GPU" is the median time in microseconds of replaying a CUDA graph of the call, with none of its data in the L2 cache;
"call" is the time of one of many calls in a row, with Python. "floor" is the time in which a large copy would move the
elements that must be read and written, as a share of the time on the GPU: 3 elements for each state of a minGRU forward
and 9 for training, 3 and 8 for a linear scan. "first" is the time of the first call, which compiles the kernels.
"launches" counts the Triton kernels of this library.

nn.GRU, nn.LSTM, nn.Linear and tensor operations are timed too, and accelerated-scan and flash-linear-attention if they
are installed. These two compute the scan from the decays and inputs, not from the pre-activations.
"""

import argparse
import functools
import importlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import mingru
from mingru import bench, ops
from mingru.bench import GRU, forward, forward_backward, output, print_table
from mingru.ops import NUM_INPUTS, Layout, Spec, Start
from mingru.ops.backends.triton.device import first_line

from ..measure import add_shape_option
from .device import Clock, Results, parse, passes_of, supported

# Batch, steps, input and hidden features. The last four: two with segments of time, one step, and little work.
SHAPES = [(64, 1000, 10, 100), (8, 4096, 256, 256), (1024, 128, 512, 512), (16, 16384, 128, 128)]
SHAPES += [(1, 4096, 256, 256), (1, 1_000_000, 64, 64), (64, 1, 512, 512), (1, 16, 32, 32)]
DTYPES = (torch.float32, torch.bfloat16)
# nn.GRU needs about 12 microseconds for each step.
MOST_STEPS_OF_A_GRU = 20_000
Row = dict[str, Any]


class Method(NamedTuple):
    """A function of some tensors."""

    function: Callable[..., Tensor]
    leaves: list[Tensor]
    elements: tuple[int, int] | None = None
    """Elements that must be read or written for each state: forward, and forward and backward."""
    is_own: bool = True
    """Whether the kernels of this library must run, and a failure is an error."""


@functools.cache
def imported(name: str) -> Any:
    """Return a module of another library, or None. accelerated-scan compiles its kernels when it is imported."""
    try:
        return importlib.import_module(name)
    except Exception as failed:
        print(f"not timed: {name} ({first_line(failed)})")
        return None


def others(a: Tensor, b: Tensor) -> dict[str, Method]:
    """Return implementations of the linear scan by other libraries."""
    methods = {}
    if (warp := imported("accelerated_scan.warp")) is not None:
        # It needs time last, and a power of 2 from 32 to 65536 as number of steps.
        steps = max(32, 1 << (a.shape[1] - 1).bit_length())
        turned = [F.pad(x.detach().mT, (0, steps - a.shape[1])).contiguous().requires_grad_() for x in (a, b)]
        methods[f"accelerated-scan (time last, {steps} steps)"] = Method(warp.scan, turned)
    if (hgrn := imported("fla.ops.hgrn")) is not None:
        logs = [b.detach().requires_grad_(), a.detach().log().requires_grad_()]
        methods["fla, chunk_hgrn"] = Method(lambda x, g: hgrn.chunk_hgrn(x, g)[0], logs)
        methods["fla, fused_recurrent_hgrn"] = Method(lambda x, g: hgrn.fused_recurrent_hgrn(x, g)[0], logs)
    return {name: method._replace(is_own=False) for name, method in methods.items()}


def packed_of(x: Tensor) -> PackedSequence:
    """Return sequences with lengths from half of the steps to all, the longest first."""
    lengths = torch.linspace(x.shape[1], max(1, x.shape[1] // 2), len(x)).long()
    return pack_padded_sequence(x.detach(), lengths, batch_first=True)


def recurrences(shape: Sequence[int], dtype: torch.dtype, device: torch.device, backend: str) -> dict[str, Method]:
    """Return the recurrences from given pre-activations."""
    batch, steps, _, features = shape
    pre = torch.randn(batch, steps, 3 * features, dtype=dtype, device=device)
    inputs = [part.detach().requires_grad_() for part in pre.chunk(3, -1)]
    packed = [packed_of(x) for x in inputs]
    h = torch.full((batch, 1, features), 0.5, device=device)
    reset, dt = torch.rand(batch, steps, device=device) < 0.01, torch.rand(batch, steps, device=device)

    rows, plain = [x.data.requires_grad_() for x in packed], Start(h, h, None)

    def of(cell: str, start: Start = plain, layout: Layout = ops.BATCH_FIRST, name: str = backend) -> Method:
        spec, count = Spec(cell, "positive", False), NUM_INPUTS[cell]
        given = (inputs if layout.batch_sizes is None else rows)[:count]
        elements = count + 1, 3 * count + 3
        return Method(lambda *x: ops.recurrence(spec, x, start, layout, name)[0], given, elements)

    a, b = ((-inputs[0]).sigmoid().detach().requires_grad_(), inputs[1].detach().clone().requires_grad_())
    methods = {
        "minGRU": of("mingru"),
        "minGRU, resets": of("mingru", Start(h, h, reset)),
        "minGRU, elapsed times": of("mingru", Start(h, h, None, dt)),
        "minGRU, packed": of("mingru", layout=Layout(False, packed[0].batch_sizes)),
        'minGRU, gate="signed"': of("mingru_signed"),
        'minGRU, gate="rotation"': of("mingru_rotation"),
        "minLSTM": of("minlstm"),
        "linear_scan": Method(lambda a, b: mingru.functional.linear_scan(a, b, backend=backend), [a, b], (3, 8)),
        "minGRU, tensor operations": of("mingru", name="torch")._replace(is_own=False),
    }
    return methods | others(a, b)


def layers(shape: Sequence[int], dtype: torch.dtype, device: torch.device, _: str) -> dict[str, Method]:
    """Return whole layers; `use_backend` chooses their backend."""
    batch, steps, input_dims, features = shape
    x = torch.randn(batch, steps, input_dims, device=device, dtype=dtype)
    packed, reset = packed_of(x), torch.rand(batch, steps, device=device) < 0.01

    def of(module: nn.Module, *rest: Any, is_packed: bool = False) -> Method:
        """Return the module's output of x."""

        def function(x: Tensor, *_: Tensor) -> Tensor:
            return module(PackedSequence(x, packed.batch_sizes))[0].data if is_packed else output(module(x, *rest))

        leaf = (packed.data if is_packed else x).clone().requires_grad_()
        return Method(function, [leaf, *module.parameters()], is_own=type(module).__module__.startswith("mingru"))

    modules = {name: each.to(device, dtype) for name, each in bench.layers(input_dims, features).items()}
    if steps > MOST_STEPS_OF_A_GRU:
        del modules[GRU], modules["nn.LSTM"]
    rnn = modules.pop("mingru")
    methods = {
        "MinGRU": of(rnn),
        "MinGRU, resets": of(rnn, None, reset),
        "MinGRU, lengths": of(rnn, None, None, torch.linspace(steps, max(1, steps // 2), batch).long()),
        "MinGRU, packed": of(rnn, is_packed=True),
        "MinLSTM": of(mingru.MinLSTM(input_dims, features, device=device, dtype=dtype)),
    }
    methods |= {name: of(module) for name, module in modules.items()}
    return methods | ({"nn.GRU, packed": of(modules[GRU], is_packed=True)} if GRU in modules else {})


def measure(clock: Clock, method: Method, backend: str, bandwidth: float) -> Row:
    """Time a method. `bandwidth`: bytes per microsecond of a copy."""
    function, leaves, elements, is_own = method
    start = time.perf_counter()
    with passes_of(backend if is_own else "") as names:
        out = function(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        clock.wait()
    row: Row = {"first_s": time.perf_counter() - start, "launches": len(names), "states": out.numel()}
    num_bytes = out.numel() * out.element_size()
    del out
    passes = (forward(lambda: function(*leaves)), forward_backward(lambda: function(*leaves), leaves))
    for index, (name, call) in enumerate(zip(("forward", "training"), passes, strict=True)):
        row[name] = clock.times(call)
        if elements is not None:
            row[name]["floor"] = elements[index] * num_bytes / bandwidth
    return row


def measure_all(clock: Clock, methods: dict[str, Method], backend: str, bandwidth: float) -> dict[str, Row]:
    rows = {}
    for name, method in methods.items():
        try:
            rows[name] = measure(clock, method, backend, bandwidth)
        except Exception as caught:
            # Other libraries support only some sizes and dtypes.
            if method.is_own and not isinstance(caught, torch.OutOfMemoryError):
                raise
            rows[name] = {"why": first_line(caught)}
    return rows


COLUMNS = ["", "GPU", "training", "floor", "training", "call", "training", "first s", "launches", "not captured"]


def cells(row: Row) -> list[str]:
    """Return a row of a table, without its name."""
    if "why" in row:
        return [row["why"][:60], *[""] * (len(COLUMNS) - 2)]
    passes = row["forward"], row["training"]
    shares = [x["floor"] / x["device"] if x.get("floor") and x["device"] else None for x in passes]
    return [
        *("?" if x["device"] is None else f"{x['device']:.1f}" for x in passes),
        *("" if share is None else f"{share:.0%}" for share in shares),
        *(f"{x['call']:.1f}" for x in passes),
        f"{row['first_s']:.1f}",
        str(row["launches"]),
        passes[0]["why"] or passes[1]["why"],
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.1, help="for each time (default: %(default)s)")
    add_shape_option(parser, "eight shapes")
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        # Kernels are compiled again, so that the time of the first call includes it.
        args = parse(parser, arguments)
        with mingru.use_backend(args.backend):
            run(args)


def bandwidth_of(clock: Clock) -> dict[str, float]:
    """Return bytes per microsecond of a large copy, and microseconds of one that copies a number."""
    pair = [torch.zeros(1 << (20 if clock.device.type == "cpu" else 28), device=clock.device) for _ in range(2)]
    taken = [clock.times(lambda size=size: pair[0][:size].copy_(pair[1][:size])) for size in (None, 1)]
    # On devices without graphs, the time of one of many calls.
    large_us, small_us = (times["device"] or times["call"] for times in taken)
    return {"bandwidth": 2 * pair[0].numel() * pair[0].element_size() / large_us, "one_launch_us": small_us}


def run(args: argparse.Namespace) -> None:
    clock, results = Clock(args.device, args.seconds), Results(args)
    if "bandwidth" not in results.all:
        results.all |= bandwidth_of(clock)
    bandwidth = results.all["bandwidth"]
    print(f"a copy moves {bandwidth * 1e-3:.0f} GB/s; one of a number takes {results.all['one_launch_us']:.1f} us")
    dtypes = supported(DTYPES, args.device, args.backend)

    def measured(make: Any, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Row]:
        methods = make(shape, dtype, args.device, args.backend)
        return measure_all(clock, methods, args.backend, bandwidth)

    for shape, dtype in itertools.product(args.shape or SHAPES, dtypes):
        title = f"(B, S, I, H) = {tuple(shape)}, {str(dtype).removeprefix('torch.')}"
        for kind, make in (("recurrences", recurrences), ("layers", layers)):
            rows = results.of(kind, title, measured, make, shape, dtype)
            if rows is None:
                return
            print_table(f"{kind}, {title}", COLUMNS, [[name, *cells(row)] for name, row in rows.items()])


if __name__ == "__main__":
    main()
