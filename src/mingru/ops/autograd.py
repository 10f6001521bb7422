"""Derivatives of the recurrences, for every cell and every backend.

`Scan` computes the formulas of `ops.scan` by differentiable operations. Forward mode is another scan, and `vmap` folds
the mapped dimension into the batch. `composed` combines `Scan` with `cells.coefficients`, which PyTorch differentiates.
It supports every cell, backend and derivative.

`Recurrence` runs fused kernels for the forward pass and the first derivative. It saves the states, and the
pre-activations unless backward recomputes them. For all other derivatives it calls `composed`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import block_recurrence
from .backend import Gradients, Kernel, scan_backward_by, scan_by
from .backends import torch_in_graphs
from .call import FIRST_INPUT, Call, Spec, flattened, from_flat
from .cells import CELLS
from .layout import as_linear_scan, divided, in_layout, is_transposed, joined, padded_call, without_padding
from .linear_map import gated, normalized
from .modes import are_batched, mode_of, without_autocast
from .names_of_torch import jvp_nesting
from .route import Way, backend_of, way_of
from .scan import LinearScan, adjoint, grad_of_h, in_accumulation_dtype, previous_states
from .shape import States, as_dtype, conjugate, times


def composed(way: Way, call: Call) -> States:
    """Compute a recurrence by differentiable operations and the linear scan of a backend."""
    padded = padded_call(call)
    if call.spec.cell == "gru":
        with without_autocast(call.tensors[0], way.mode):
            return in_layout(block_recurrence.composed(padded), call)
    own = backend_of(way.backend).recurrence
    if own is not None:
        return in_layout(own(padded), call)
    linear = as_linear_scan(padded)
    if linear.parts == 1:
        return in_layout(scan(way, linear), call)
    if way.mode.is_compiled:
        # Compilers and exported graphs may not support complex numbers.
        return in_layout(torch_in_graphs.scan(linear), call)
    if linear.parts == 2:
        a, b, h = (torch.view_as_complex(x.contiguous()) for x in linear[:3])
        out, last = map(torch.view_as_real, scan(way, linear._replace(a=a, b=b, h=h, parts=1)))
    else:
        out, last = scan(way, linear)
    out, last = in_layout((out, last), call)
    # Copies, because outputs must not be views.
    return out.clone(memory_format=torch.contiguous_format), last.clone(memory_format=torch.contiguous_format)


def scan(way: Way, call: LinearScan) -> States:
    """Compute the linear scan by a backend, so that it is differentiable."""
    (backend, mode), own = way, backend_of(way.backend)
    if own.scan is not None:
        # Kernels convert numbers when they load them.
        call = in_accumulation_dtype(call)
        if own.kernel is None:
            return own.scan(call)
    in_compile = mode.is_compiled and not mode.is_exported
    if in_compile and not (torch.is_grad_enabled() and any(x.requires_grad for x in call[:3])):
        # Dynamo cannot trace the functions below if no tensor requires gradients. The kernel alone has no derivatives,
        # which transforms such as `torch.func.grad` may need.
        return _scan_in_graphs(call)
    run: Any = ScanInGraph.apply if mode.is_compiled else Scan.apply if mode.needs_operations else apply_scan
    return run(backend, *call)  # type: ignore[no-any-return]


def _scan_in_graphs(call: LinearScan) -> States:
    out, last = torch_in_graphs.scan(in_accumulation_dtype(call))
    return as_dtype(out, call.b.dtype), as_dtype(last, call.h.dtype)


class ScanInGraph(torch.autograd.Function):
    """Compute the linear scan, with reverse-mode derivatives of any order.

    It has no rules for forward mode and vmap, because `torch.compile` cannot trace a function that has them.
    """

    @staticmethod
    def forward(backend: str, *call: Any) -> States:
        own = backend_of(backend)
        return scan_by(own.kernel, LinearScan(*call)) if own.scan is None else own.scan(LinearScan(*call))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: States) -> None:
        ctx.backend, a, _, h, reset, *ctx.constants = inputs
        ctx.save_for_backward(a, h, reset, output[0])
        ctx.save_for_forward(a, h, reset, output[0])

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Gradients:
        a, h, reset, out = ctx.saved_tensors
        # No gradient depends on b, so b was not saved; `out` fills its field.
        call = LinearScan(a, out, h, reset, *ctx.constants)
        batched = are_batched(*grad)
        own = backend_of(ctx.backend)
        if own.scan is None and not torch.is_grad_enabled() and not batched:
            return None, *scan_backward_by(own.kernel, call, out, *grad), None, None, None
        # Kernels have no rule for batched gradients.
        delta = adjoint(_scan_in_graphs if batched else partial(scan, way_of(ctx.backend, mode_of(out))), call, grad)
        needs = ctx.needs_input_grad
        grad_a = times(delta, conjugate(previous_states(call, out), call.parts), call.parts) if needs[1] else None
        grad_h = grad_of_h(call, delta) if needs[3] else None
        return None, grad_a, delta, grad_h, None, None, None


class Scan(ScanInGraph):
    """Compute the linear scan, with rules for forward mode and vmap too."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> States:
        if jvp_nesting() > 1:
            why = "because PyTorch silently drops the inner tangent of a custom function"
            remedy = "use jacfwd over jacrev, or the backend 'sequential'"
            raise RuntimeError(f"mingru: forward mode over forward mode would give wrong results, {why}; {remedy}")
        _, da, db, dh, *_ = tangents
        a, h, reset, out = ctx.saved_tensors
        call = LinearScan(a, out, h, reset, *ctx.constants)
        drive = torch.zeros_like(out) if db is None else db
        if da is not None:
            drive = drive + as_dtype(times(da, previous_states(call, out), call.parts), out.dtype)
        call = call._replace(b=drive, h=torch.zeros_like(h) if dh is None else dh)
        return scan(way_of(ctx.backend, mode_of(drive)), call)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], backend: str, *call: Any) -> tuple[States, tuple[int, int]]:
        def fold(arg: Any, dim: int | None) -> Any:
            if not isinstance(arg, Tensor):
                return arg
            batched = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            return batched.flatten(0, 1)

        folded = LinearScan(*(fold(arg, dim) for arg, dim in zip(call, in_dims[1:], strict=True)))
        states = scan(way_of(backend, mode_of(folded.b)), folded)
        out, last = (torch.unflatten(tensor, 0, [info.batch_size, -1]) for tensor in states)
        return (out, last), (0, 0)


def run_kernel(name: str, way: Way, call: Call, keep: bool) -> States:
    """Run a kernel of the backend, so that it is differentiable. `name`: of its field, "kernel" or "linear_kernel"."""
    spec, tensors, context, layout = call
    backend, mode = way
    if name == "kernel" and tensors[0].dim() > 3 and mode.is_compiled:
        # Inductor treats tensors of more dimensions as images, and changes the strides of tensors saved for backward.
        flat = [x.flatten(2).contiguous() for x in tensors]
        initial_state = context.initial_state.expand_as(context.h)
        flat_context = context._replace(h=context.h.flatten(2), initial_state=initial_state.flatten(2))
        out, last = run_kernel(name, way, Call(spec, flat, flat_context, layout), keep)
        return out.view(tensors[0].shape), last.view(context.h.shape)
    kernel: Kernel = getattr(backend_of(backend), name)
    given: list[Any] = [*flattened(context, layout), *tensors]
    if torch.is_grad_enabled() and kernel.backward is not None:
        if context.reset is None:
            given[1] = None  # the initial state, which nothing reads
        # A flat list, because autograd ignores tensors inside tuples.
        run: Callable[..., States] = Recurrence.apply if mode.is_compiled else apply
        return run((name, backend, spec, layout.time_first, keep, mode.is_compiled), *given)
    out, last, *_ = kernel.forward(spec, given, layout.time_first, None)
    return out, last


# What a kernel is called with beside its tensors: the field of the backend that has the kernel, the backend, the spec,
# `time_first`, whether the pre-activations are kept for the backward pass, and whether the call is compiled.
KernelCall = tuple[str, str, Spec, bool, bool, bool]
# With fewer values, a copy of the output takes less time than to count its changes.
COPIED = 1 << 14


class Recurrence(torch.autograd.Function):
    """Compute a recurrence by the kernels of a backend. Second derivatives are computed by `composed`."""

    @staticmethod
    def forward(ctx: Any, call: KernelCall, *tensors: Any) -> States:
        name, backend, spec, time_first, keep, is_compiled = call
        kernel: Kernel = getattr(backend_of(backend), name)
        out, last, kept, *states = kernel.forward(spec, tensors, time_first, keep)
        ctx.changes = None
        # Not `out` itself: torch refuses a backward pass whose tensors a program has changed in place.
        if states or is_compiled:
            pass
        elif out.numel() < COPIED:
            states, out = [out], out.clone()
        else:
            # With the count of the changes of `out`, and nothing of its memory.
            states, ctx.changes = [out.data], out.detach()
            ctx.changes.data, ctx.num_changes = out.new_empty(0), out._version
        ctx.call, ctx.is_transposed = call, kept is not None and is_transposed(tensors[FIRST_INPUT])
        ctx.save_for_backward(*(states or [out]), kept, *tensors)
        return out, last

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Gradients:
        (name, backend, spec, time_first, *_), (states, kept, *tensors) = ctx.call, ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or are_batched(*grad):
            again = partial(_again, name, backend, spec, time_first)
            return None, *differentiable(again, tensors, needs, grad)
        # A saved-tensor hook may change the memory order of x, which is the order of the kept pre-activations.
        if kept is not None and is_transposed(tensors[FIRST_INPUT]) != ctx.is_transposed:
            kept = kept.new_empty(0)
        kernel: Kernel = getattr(backend_of(backend), name)
        if ctx.changes is not None and ctx.changes._version != ctx.num_changes:
            states = kernel.forward(spec, tensors, time_first, None)[0]
        return None, *kernel.backward(spec, tensors, time_first, (states, kept, *grad), needs)


# Without what `Function.apply` does for transforms, which takes as long as a small call.
apply: Callable[..., States] = super(torch.autograd.Function, Recurrence).apply
apply_scan: Callable[..., States] = super(torch.autograd.Function, Scan).apply


def transposed_(out: Tensor) -> Tensor:
    """Transpose the output of a recurrence in place, which is no change of what its backward pass needs."""
    node = out.grad_fn
    out.transpose_(0, 1)
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        node.num_changes = out._version
    return out


def _again(name: str, backend: str, spec: Spec, time_first: bool, *tensors: Any) -> States:
    """Compute the same as a kernel by differentiable operations."""
    call = from_flat(spec, tensors, time_first)
    if call.context.reset is None:
        # The initial state was not saved, and nothing reads it.
        call = call._replace(context=call.context._replace(initial_state=call.context.h))
    if spec.cell == "lstm":
        return block_recurrence.lstm_by_torch(call)
    way = way_of(backend, mode_of(call.tensors[0]))
    if name != "linear_kernel":
        return composed(way, call)
    (x, weight, bias), layout = call.tensors, call.layout
    if layout.lengths is not None:
        # Otherwise a NaN in the padding would reach the gradients of the weights.
        x = without_padding(x, layout.lengths, time_first)
    if spec.norm:
        x = normalized(x, spec.norm, spec.eps)
    x = x if weight is None else F.linear(x, weight, bias)
    inputs = list(x.chunk(CELLS[spec.cell].num_inputs + spec.output_gate, -1))
    gate = inputs.pop() if spec.output_gate else None
    parts = [composed(way, part) for part in divided(call._replace(tensors=inputs))]
    return gated(joined(parts, layout), gate)


def differentiable(
    function: Callable[..., States], tensors: Sequence[Tensor | None], needs: Sequence[bool], grad: Any
) -> list[Tensor | None]:
    """Run the function again, and return differentiable gradients of the tensors that need a gradient."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because one tensor may be computed from another, and no gradient must flow between them.
        views = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
        wanted: Any = [view for view, need in zip(views, needs, strict=True) if need]
        # Disabled, because the tensors of a linear kernel are already in the dtype in which it is computed.
        with without_autocast(grad[0]):
            states = function(*views)
            # A state may not depend on what needs a gradient.
            pairs = [pair for pair in zip(states, grad, strict=True) if pair[0].requires_grad]
            outputs, grads = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]
