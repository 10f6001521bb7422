"""Time the GPU kernels and whole layers, and check their values. Exits with 1 if a value is wrong.

    python -m benchmarks.gpu.speed [--json FILE] [--shape 64 1000 10 100]

"GPU" is the median time in microseconds of replaying a CUDA graph of the call, with none of its data in the L2 cache;
"call" is the time of one of many calls in a row, with Python. "floor" is the time in which a large copy would move the
elements that must be read and written, as a share of the time on the GPU: 3 elements for each state of a minGRU forward
and 9 for training, 3 and 8 for a linear scan. "first" is the time of the first call, which compiles the kernels. "peak"
is the memory that a training call needs. "launches" counts the Triton kernels of this library. "error" is the largest
error of states and gradients against float64, relative to the largest number.

nn.GRU, nn.LSTM, nn.Linear and tensor operations are timed too, and accelerated-scan and flash-linear-attention if they
are installed. These two compute the scan from the decays and inputs, not from the pre-activations.
"""

import argparse
import copy
import functools
import importlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from calls import allowed, error
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import mingru
from mingru import ops
from mingru.bench import GRU, LINEAR, forward, forward_backward, output, print_table
from mingru.ops import NUM_INPUTS, Layout, Spec, Start
from mingru.ops.backends.triton.device import first_line

from ..measure import add_shape_option
from .device import Clock, Results, launches, parse, supported

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
    truth: Callable[..., Tensor] | None = None
    """The same function of float64 tensors; None if its values are not checked."""
    elements: tuple[int, int] | None = None
    """Elements that must be read or written for each state: forward, and forward and backward."""
    num_sums: int | None = None
    """Argument of `allowed`; None for other libraries, whose error is only shown."""


def of_cell(cell: str, leaves: list[Tensor], start: Start, layout: Layout, backend: str) -> Method:
    """Return the recurrence of a cell from its pre-activations. `start` is in float64."""
    spec, num_inputs = Spec(cell, "positive", False), NUM_INPUTS[cell]
    own = Start(*(x if x is None or x.dtype == torch.bool else x.float() for x in start))

    def truth(*inputs: Tensor) -> Tensor:
        if layout.batch_sizes is None:
            return ops.recurrence(spec, inputs, start, layout, "torch")[0]
        padded = [pad_packed_sequence(PackedSequence(x, layout.batch_sizes), batch_first=True) for x in inputs]
        out, _ = ops.recurrence(spec, [x for x, _ in padded], start, backend="torch")
        return pack_padded_sequence(out, padded[0][1], batch_first=True).data

    def function(*inputs: Tensor) -> Tensor:
        return ops.recurrence(spec, inputs, own, layout, backend)[0]

    return Method(function, leaves[:num_inputs], truth, (num_inputs + 1, 3 * num_inputs + 3), 64)


def scan(a: Tensor, b: Tensor) -> Tensor:
    return mingru.functional.linear_scan(a, b, backend="torch")


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
    if not a.is_cpu:
        from torch._higher_order_ops.associative_scan import associative_scan

        def then(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return left[0] * right[0], right[0] * left[1] + right[1]

        # Dynamo stops after 8 variants of the function, and what it would then time is not compiled.
        torch.compiler.reset()
        compiled = torch.compile(lambda a, b: associative_scan(then, (a, b), 1)[1], dynamic=False)
        methods["associative_scan, compiled"] = Method(compiled, [a, b], scan)
    if (warp := imported("accelerated_scan.warp")) is not None:
        # It needs time last, and a power of 2 from 32 to 65536 as number of steps.
        steps = max(32, 1 << (a.shape[1] - 1).bit_length())
        turned = [F.pad(x.detach().mT, (0, steps - a.shape[1])).contiguous().requires_grad_() for x in (a, b)]
        name = f"accelerated-scan (time last, {steps} steps)"
        methods[name] = Method(warp.scan, turned, lambda a, b: scan(a.mT, b.mT).mT)
    if (hgrn := imported("fla.ops.hgrn")) is not None:
        logs = [b.detach().requires_grad_(), a.detach().log().requires_grad_()]
        for name in ("chunk_hgrn", "fused_recurrent_hgrn"):
            function = getattr(hgrn, name)
            methods[f"fla, {name}"] = Method(
                lambda x, g, function=function: function(x, g)[0], logs, lambda x, g: scan(g.exp(), x)
            )
    return methods


def lengths_of(batch: int, steps: int) -> Tensor:
    """Return lengths from half of the steps to all, the longest first."""
    return torch.linspace(steps, max(1, steps // 2), batch).long()


def recurrences(
    batch: int, steps: int, _: int, features: int, dtype: torch.dtype, device: torch.device, backend: str
) -> dict[str, Method]:
    """Return the recurrences from given pre-activations."""
    pre = torch.randn(batch, steps, 3 * features, dtype=dtype, device=device)
    inputs = [part.detach().requires_grad_() for part in pre.chunk(3, -1)]
    h = torch.full((batch, 1, features), 0.5, dtype=torch.float64, device=device)
    reset = torch.rand(batch, steps, device=device) < 0.01
    packed = [pack_padded_sequence(x.detach(), lengths_of(batch, steps), batch_first=True) for x in inputs]
    rows = [x.data.requires_grad_() for x in packed]
    plain, dt = Start(h, h, None), torch.rand(batch, steps, dtype=torch.float64, device=device).float().double()

    def of(cell: str, start: Start = plain) -> Method:
        return of_cell(cell, inputs, start, ops.BATCH_FIRST, backend)

    a, b = ((-inputs[0]).sigmoid().detach().requires_grad_(), inputs[1].detach().clone().requires_grad_())

    def by_triton(a: Tensor, b: Tensor) -> Tensor:
        return mingru.functional.linear_scan(a, b, backend=backend)

    methods = {
        "minGRU": of("mingru"),
        "minGRU, resets": of("mingru", Start(h, h, reset)),
        "minGRU, elapsed times": of("mingru", Start(h, h, None, dt)),
        "minGRU, packed": of_cell("mingru", rows, plain, Layout(False, packed[0].batch_sizes), backend),
        'minGRU, gate="signed"': of("mingru_signed"),
        'minGRU, gate="rotation"': of("mingru_rotation"),
        "minLSTM": of("minlstm"),
        "linear_scan": Method(by_triton, [a, b], scan, (3, 8), 64),
        "minGRU, tensor operations": of_cell("mingru", inputs, plain, ops.BATCH_FIRST, "torch")._replace(num_sums=None),
    }
    return methods | others(a, b)


def layers(
    batch: int, steps: int, input_dims: int, features: int, dtype: torch.dtype, device: torch.device, _: str
) -> dict[str, Method]:
    """Return whole layers; `use_backend` chooses their backend."""
    options: Any = {"device": device, "dtype": dtype}
    x = torch.randn(batch, steps, input_dims, **options)
    lengths, reset = lengths_of(batch, steps), torch.rand(batch, steps, device=device) < 0.01
    packed = pack_padded_sequence(x, lengths, batch_first=True)

    def of(module: nn.Module, *rest: Any, is_packed: bool = False) -> Method:
        """Return the module's output of x. Other modules than ours are not checked."""
        names, parameters = zip(*module.named_parameters(), strict=True)
        wide = copy.deepcopy(module).double()

        def given(x: Tensor) -> Any:
            return PackedSequence(x, packed.batch_sizes) if is_packed else x

        def data(result: Any) -> Tensor:
            return result[0].data if is_packed else output(result)

        def truth(x: Tensor, *values: Tensor) -> Tensor:
            with mingru.use_backend("torch"):
                return data(torch.func.functional_call(wide, dict(zip(names, values, strict=True)), (given(x), *rest)))

        leaf = (packed.data if is_packed else x).clone().requires_grad_()
        is_own = type(module).__module__.startswith("mingru")
        # The linear map rounds the pre-activations, and the gradients of its weights are sums over all steps.
        return Method(
            lambda x, *_: data(module(given(x), *rest)),
            [leaf, *parameters],
            truth if is_own else None,
            num_sums=1024 if is_own else None,
        )

    rnn = mingru.MinGRU(input_dims, features, **options)
    methods = {
        "MinGRU": of(rnn),
        "MinGRU, resets": of(rnn, None, reset),
        "MinGRU, lengths": of(rnn, None, None, lengths),
        "MinGRU, packed": of(rnn, is_packed=True),
        "MinLSTM": of(mingru.MinLSTM(input_dims, features, **options)),
        LINEAR: of(nn.Linear(input_dims, 2 * features, **options)),
    }
    if steps <= MOST_STEPS_OF_A_GRU:
        gru = nn.GRU(input_dims, features, batch_first=True, **options)
        methods[GRU] = of(gru)
        methods["nn.GRU, packed"] = of(gru, is_packed=True)
        methods["nn.LSTM"] = of(nn.LSTM(input_dims, features, batch_first=True, **options))
    return methods


def measure(clock: Clock, method: Method, backend: str, bandwidth: float) -> Row:
    """Check and time a method. `bandwidth`: bytes per microsecond of a copy."""
    function, leaves, truth, elements, num_sums = method
    start = time.perf_counter()
    with launches() as names:
        out = function(*leaves)
        grad = torch.randn_like(out)
        results = [out, *torch.autograd.grad(out, leaves, grad)]
        clock.wait()
    row: Row = {"first_s": time.perf_counter() - start, "launches": len(names), "states": out.numel()}
    if num_sums is not None and backend == "triton" and not {"forward", "backward"} <= set(names):
        raise AssertionError(f"the kernels that ran are {names}; forward and backward are expected")
    if truth is not None:
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        exact = truth(*wide)
        exact = [exact, *torch.autograd.grad(exact, wide, grad.double())]
        row["error"] = error(results, exact)
        row["wrong"] = num_sums is not None and not row["error"] <= allowed(leaves[0].dtype, 4, num_sums)
        del wide, exact
    num_bytes = out.numel() * out.element_size()
    del out, results
    passes = (forward(lambda: function(*leaves)), forward_backward(lambda: function(*leaves), leaves))
    row["peak_bytes"] = clock.peak_bytes(passes[1])
    for index, (name, call) in enumerate(zip(("forward", "training"), passes, strict=True)):
        taken = clock.times(call)
        row[name] = taken._asdict()
        if elements is not None:
            row[name]["floor"] = elements[index] * num_bytes / bandwidth
    return row


def measure_all(clock: Clock, methods: dict[str, Method], backend: str, bandwidth: float) -> dict[str, Row]:
    rows = {}
    for name, method in methods.items():
        try:
            rows[name] = measure(clock, method, backend, bandwidth)
        except torch.OutOfMemoryError as full:
            rows[name] = {"why": first_line(full)}
        except Exception as other:
            if method.num_sums is not None:
                raise
            # Other libraries support only some sizes and dtypes.
            rows[name] = {"why": first_line(other)}
    return rows


COLUMNS = ["", "GPU", "training", "floor", "training", "call", "training", "first s", "peak MB", "launches", "error"]


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
        "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
        str(row["launches"]),
        ("WRONG " if row.get("wrong") else "") + (f"{row['error']:.1e}" if "error" in row else ""),
    ]


def show(title: str, rows: dict[str, Row]) -> None:
    print_table(title, COLUMNS, [[name, *cells(row)] for name, row in rows.items()])
    whys = {row[name]["why"] for row in rows.values() if "why" not in row for name in ("forward", "training")} - {""}
    for why in sorted(whys):
        print(f"?: cannot be captured, {why}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.1, help="for each time (default: %(default)s)")
    add_shape_option(parser, "eight shapes")
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        # Kernels are compiled again, so that the time of the first call includes it.
        args = parse(parser, arguments)
        with mingru.use_backend(args.backend):
            return run(args)


def bandwidth_of(clock: Clock) -> dict[str, float]:
    """Return bytes per microsecond of a large copy, and microseconds of one that copies a number."""
    pair = [torch.zeros(1 << (20 if clock.device.type == "cpu" else 28), device=clock.device) for _ in range(2)]
    large_us, small_us = (
        # On devices without graphs, the time of one of many calls.
        taken.device or taken.call
        for taken in (clock.times(lambda size=size: pair[0][:size].copy_(pair[1][:size])) for size in (None, 1))
    )
    return {"bandwidth": 2 * pair[0].numel() * pair[0].element_size() / large_us, "one_launch_us": small_us}


def run(args: argparse.Namespace) -> int:
    clock, results = Clock(args.device, args.seconds), Results(args)
    if "bandwidth" not in results.all:
        results.all |= bandwidth_of(clock)
    bandwidth = results.all["bandwidth"]
    print(f"a copy moves {bandwidth * 1e-3:.0f} GB/s; one of a number takes {results.all['one_launch_us']:.1f} us")
    wrong = False
    dtypes = supported(DTYPES, args.device, args.backend)
    for shape, dtype in itertools.product(args.shape or SHAPES, dtypes):
        title = f"(B, S, I, H) = {tuple(shape)}, {str(dtype).removeprefix('torch.')}"
        for kind, make in (("recurrences", recurrences), ("layers", layers)):

            def measured(make: Any = make, shape: Any = shape, dtype: torch.dtype = dtype) -> dict[str, Row]:
                methods = make(*shape, dtype, args.device, args.backend)
                return measure_all(clock, methods, args.backend, bandwidth)

            rows = results.of(kind, title, measured)
            if rows is None:
                print(f"stopped before {kind}, {title}; the same command goes on from there")
                return int(wrong)
            show(f"{kind}, {title}", rows)
            wrong |= any(row.get("wrong") for row in rows.values())
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
