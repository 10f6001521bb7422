"""Gradients for the bodies that compute values alone: written once, for every such body.

The adjoint of h_t = a_t h_{t-1} + b_t is the same recurrence run backwards,

    delta_t = dL/dh_t + a_{t+1} delta_{t+1}

and from delta all else is elementwise: dL/db_t = delta_t, dL/da_t = delta_t h_{t-1}, dL/dh_0 = a_1 delta_1. So only the
inputs and the states are kept. The formulas below are made of differentiable operations and differentiate in turn;
forward mode is one more scan; and as nothing mixes batch elements, `vmap` folds its dimension into the batch.
`torch.compile` traces no function that has rules for the latter two, hence the base classes without them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import eager_transforms

from . import choice, packed
from .activation import activate, derivative
from .cell import NUM_INPUTS, Kind, as_mingru
from .choice import BODIES
from .shape import States, accumulate_dtype, along, as_dtype, time_first

# From this many input features on, products are kept for backward; below, it is quicker to compute them again than to
# write and read them.
_WIDE = 64


def linear_scan(body: str, a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool) -> States:
    function = _LinearScanBase if torch.compiler.is_compiling() else _LinearScan
    states: States = function.apply(body, a, b, h, reset, reverse)  # type: ignore[no-untyped-call]
    return states


def mingru(
    body: str,
    gate: Tensor,
    candidate: Tensor,
    h: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    activation: str,
    reverse: bool,
) -> States:
    if torch.compiler.is_compiling():
        # Inductor takes more dimensions for an image's, and lays out what is kept for backward in its own way.
        tensors = [x.flatten(2).contiguous() if x.dim() > 3 else x for x in (gate, candidate, h, initial)]
        out, last = _MinGRUBase.apply(body, *tensors, reset, activation, reverse)  # type: ignore[no-untyped-call]
        return out.view(gate.shape), last.view(h.shape)
    states: States = _MinGRU.apply(body, gate, candidate, h, initial, reset, activation, reverse)  # type: ignore[no-untyped-call]
    return states


def recurrence(
    body: str,
    inputs: Sequence[Tensor],
    h: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    batch_sizes: Tensor | None,
    kind: Kind,
) -> States:
    """Any cell, packed or not, by a body that has `recurrence`."""
    states: States = _Recurrence.apply(body, kind, h, initial, reset, batch_sizes, *inputs)  # type: ignore[no-untyped-call]
    return states


def linear_recurrence(
    body: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    batch_sizes: Tensor | None,
    kind: Kind,
    recompute: bool | None,
) -> States:
    """The same of the pre-activations x W^T + b, by a body that has `linear_recurrence`."""
    inputs = (x, weight, bias, h, initial, reset, batch_sizes)
    if torch.is_grad_enabled():
        keep = x.shape[-1] >= _WIDE if recompute is None else not recompute
        states: States = _LinearRecurrence.apply(body, kind, keep, *inputs)  # type: ignore[no-untyped-call]
        return states
    out, last, _ = BODIES[body].linear_recurrence(*inputs, kind, False)  # type: ignore[attr-defined]
    return out, last


def composed(
    body: str,
    inputs: Sequence[Tensor],
    h: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    batch_sizes: Tensor | None,
    kind: Kind,
) -> States:
    """`recurrence` made of `mingru` and differentiable operations around it: for every body, and every derivative."""
    gate, candidate = as_mingru(kind.cell, list(inputs))
    if batch_sizes is None:
        out, last = _any_mingru(body, gate, candidate, h, initial, reset, kind.activation, kind.reverse)
    else:
        gate, candidate, reset, index = packed.spread_mingru(gate, candidate, reset, batch_sizes, kind.reverse)
        out, last = _any_mingru(body, gate, candidate, h, initial, reset, kind.activation, False)
        out = packed.gather(out, index)
    return as_dtype(out, inputs[0].dtype), last


def _any_mingru(body: str, *inputs: Any) -> States:
    if choice.body(body).DIFFERENTIABLE:
        return choice.body(body).mingru(*inputs)
    return mingru(body, *inputs)


def _refuse_forward_over_forward() -> None:
    # torch drops the inner tangent of a function with a rule of its own, and says nothing.
    if eager_transforms.JVP_NESTING > 1:
        raise RuntimeError(
            "mingru: forward mode over forward mode would give wrong numbers here; take jacfwd over jacrev, or the "
            "back end 'sequential'"
        )


def _fused(body: str, name: str) -> Callable[..., tuple[Tensor, ...]] | None:
    """The body's own backward kernel, which serves where no derivative of the gradient is asked for."""
    return None if torch.is_grad_enabled() else getattr(BODIES[body], name, None)


def _first(sequence: Tensor, reverse: bool) -> Tensor:
    return sequence[:, -1:] if reverse else sequence[:, :1]


def _met(out: Tensor, h: Tensor, initial: Tensor | None, reset: Tensor | None, reverse: bool) -> Tensor:
    """The state that each step met: the one before it, or the initial one (None is 0) where there was a reset."""
    met = torch.cat([out[:, 1:], h], 1) if reverse else torch.cat([h, out[:, :-1]], 1)
    if reset is None:
        return met
    mask = along(reset, met)
    return met.masked_fill(mask, 0) if initial is None else torch.where(mask, initial, met)


def _adjoint(body: str, a: Tensor, grad: States, reset: Tensor | None, reverse: bool) -> Tensor:
    """delta: the scan against the direction of the forward one, each step by the decay of the step after it."""
    one = torch.ones_like(a[:, :1])
    decay = torch.cat([one, a[:, :-1]] if reverse else [a[:, 1:], one], 1).conj()
    if reset is not None:
        no = torch.zeros_like(reset[:, :1])
        reset = torch.cat([no, reset[:, :-1]] if reverse else [reset[:, 1:], no], 1)
    grad_out, grad_last = grad
    return linear_scan(body, decay, grad_out.to(a.dtype), grad_last.to(a.dtype), reset, not reverse)[0]


def _grad_h(a: Tensor, delta: Tensor, reset: Tensor | None, reverse: bool) -> Tensor:
    grad_h = _first(a, reverse).conj() * _first(delta, reverse)
    return grad_h if reset is None else grad_h.masked_fill(along(_first(reset, reverse), grad_h), 0)


def _fold(info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> list[Any]:
    """Move the dimension that vmap maps over into the batch of each tensor."""

    def fold(arg: Any, dim: int | None) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        batched = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
        return batched.flatten(0, 1)

    return [fold(arg, dim) for arg, dim in zip(args, in_dims, strict=True)]


def _unfold(info: Any, states: States) -> tuple[States, tuple[int, int]]:
    out, last = (torch.unflatten(tensor, 0, [info.batch_size, -1]) for tensor in states)
    return (out, last), (0, 0)


class _LinearScanBase(torch.autograd.Function):
    @staticmethod
    def forward(body: str, a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool) -> States:
        return BODIES[body].linear_scan(a, b, h, reset, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: States) -> None:
        ctx.body, a, _, h, reset, ctx.reverse = inputs
        ctx.save_for_backward(a, h, reset, output[0])
        ctx.save_for_forward(a, h, reset, output[0])

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        a, h, reset, out = ctx.saved_tensors
        fused = _fused(ctx.body, "linear_scan_backward")
        if fused is not None:
            return None, *fused(a, h, reset, out, *grad, ctx.reverse), None, None
        dtype = accumulate_dtype(out.dtype)
        decay = a.to(dtype)
        delta = _adjoint(ctx.body, decay, grad, reset, ctx.reverse)
        grad_a = grad_h = None
        if ctx.needs_input_grad[1]:
            met = _met(out.to(dtype), h.to(dtype), None, reset, ctx.reverse)
            grad_a = (delta * met.conj()).to(a.dtype)
        if ctx.needs_input_grad[3]:
            grad_h = _grad_h(decay, delta, reset, ctx.reverse).to(h.dtype)
        return None, grad_a, delta.to(out.dtype), grad_h, None, None


class _LinearScan(_LinearScanBase):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _refuse_forward_over_forward()
        _, da, db, dh, _, _ = tangents
        a, h, reset, out = ctx.saved_tensors
        drive = torch.zeros_like(out) if db is None else db
        if da is not None:
            drive = drive + da * _met(out, h.to(out.dtype), None, reset, ctx.reverse)
        return linear_scan(ctx.body, a, drive, torch.zeros_like(h) if dh is None else dh, reset, ctx.reverse)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _unfold(info, linear_scan(*_fold(info, in_dims, args)))


class _MinGRUBase(torch.autograd.Function):
    @staticmethod
    def forward(
        body: str,
        gate: Tensor,
        candidate: Tensor,
        h: Tensor,
        initial: Tensor,
        reset: Tensor | None,
        activation: str,
        reverse: bool,
    ) -> States:
        return BODIES[body].mingru(gate, candidate, h, initial, reset, activation, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: States) -> None:
        ctx.body, gate, candidate, h, initial, reset, ctx.activation, ctx.reverse = inputs
        ctx.save_for_backward(gate, candidate, h, initial, reset, output[0])
        ctx.save_for_forward(gate, candidate, h, initial, reset, output[0])

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        gate, candidate, h, initial, reset, out = ctx.saved_tensors
        fused = _fused(ctx.body, "mingru_backward")
        if fused is not None:
            inputs = (gate, candidate, h, initial, reset, out)
            return None, *fused(*inputs, *grad, ctx.activation, ctx.reverse), None, None, None
        dtype = accumulate_dtype(gate.dtype)
        k, v = gate.to(dtype), candidate.to(dtype)
        a, z = (-k).sigmoid(), k.sigmoid()
        delta = _adjoint(ctx.body, a, grad, reset, ctx.reverse)
        met = _met(out.to(dtype), h.to(dtype), initial.to(dtype), reset, ctx.reverse)
        _, need_gate, need_candidate, need_h, need_initial, _, _, _ = ctx.needs_input_grad
        grad_gate = grad_candidate = grad_h = grad_initial = None
        if need_gate:
            grad_gate = (delta * (activate(v, ctx.activation) - met) * z * a).to(gate.dtype)
        if need_candidate:
            grad_candidate = (delta * z * derivative(v, ctx.activation)).to(candidate.dtype)
        if need_h:
            grad_h = _grad_h(a, delta, reset, ctx.reverse).to(h.dtype)
        if need_initial and reset is not None:
            grad_initial = (a * delta).masked_fill(~along(reset, a), 0).sum(1, keepdim=True).to(initial.dtype)
        return None, grad_gate, grad_candidate, grad_h, grad_initial, None, None, None


class _MinGRU(_MinGRUBase):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _refuse_forward_over_forward()
        _, dgate, dcandidate, dh, dinitial, _, _, _ = tangents
        gate, candidate, h, initial, reset, out = ctx.saved_tensors
        dtype = accumulate_dtype(gate.dtype)
        k, v = gate.to(dtype), candidate.to(dtype)
        a, z = (-k).sigmoid(), k.sigmoid()
        drive = torch.zeros_like(out, dtype=dtype)
        if dgate is not None:
            met = _met(out.to(dtype), h.to(dtype), initial.to(dtype), reset, ctx.reverse)
            drive = drive + dgate * (activate(v, ctx.activation) - met) * z * a
        if dcandidate is not None:
            drive = drive + dcandidate * z * derivative(v, ctx.activation)
        if dinitial is not None and reset is not None:
            drive = drive + (a * dinitial).masked_fill(~along(reset, a), 0)
        dout, dlast = linear_scan(ctx.body, a, drive, torch.zeros_like(h) if dh is None else dh, reset, ctx.reverse)
        return dout.to(gate.dtype), dlast

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _unfold(info, mingru(*_fold(info, in_dims, args)))


class _Recurrence(torch.autograd.Function):
    """The first derivative by the body's own kernels; a second one by those of `composed`."""

    @staticmethod
    def forward(
        ctx: Any,
        body: str,
        kind: Kind,
        h: Tensor,
        initial: Tensor,
        reset: Tensor | None,
        batch_sizes: Tensor | None,
        *inputs: Tensor,
    ) -> States:
        ctx.body, ctx.kind = body, kind
        out, last = BODIES[body].recurrence(inputs, h, initial, reset, batch_sizes, kind)  # type: ignore[attr-defined]
        ctx.save_for_backward(reset, batch_sizes, out, h, initial, *inputs)
        return out, last

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        reset, batch_sizes, out, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad

        def again(h: Tensor, initial: Tensor, *inputs: Tensor) -> States:
            return composed(ctx.body, inputs, h, initial, reset, batch_sizes, ctx.kind)

        if torch.is_grad_enabled():
            grads = _differentiable(again, tensors, [*needs[2:4], *needs[6:]], grad)
        else:
            h, initial, *inputs = tensors
            backward = BODIES[ctx.body].recurrence_backward  # type: ignore[attr-defined]
            *grads, grad_h, grad_initial = backward(inputs, h, initial, reset, batch_sizes, out, grad, ctx.kind)
            grads = [grad_h, grad_initial, *grads]
        return None, None, *grads[:2], None, None, *grads[2:]


class _LinearRecurrence(torch.autograd.Function):
    """Likewise, with the linear map."""

    @staticmethod
    def forward(
        ctx: Any,
        body: str,
        kind: Kind,
        keep: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        h: Tensor,
        initial: Tensor,
        reset: Tensor | None,
        batch_sizes: Tensor | None,
    ) -> States:
        ctx.body, ctx.kind = body, kind
        tensors = (x, weight, bias, h, initial)
        out, last, product = BODIES[body].linear_recurrence(*tensors, reset, batch_sizes, kind, keep)  # type: ignore[attr-defined]
        ctx.save_for_backward(reset, batch_sizes, out, product, *tensors)
        ctx.time_first = time_first(x)
        return out, last

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        reset, batch_sizes, out, product, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:8]

        def again(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, initial: Tensor) -> States:
            inputs = F.linear(x, weight, bias).chunk(NUM_INPUTS[ctx.kind.cell], -1)
            return composed(ctx.body, inputs, h, initial, reset, batch_sizes, ctx.kind)

        if torch.is_grad_enabled():
            grads = _differentiable(again, tensors, needs, grad)
        else:
            if time_first(tensors[0]) != ctx.time_first:
                # A saved-tensor hook laid x out anew: the products' rows are in the order of before.
                product = product.new_empty(0)
            backward = BODIES[ctx.body].linear_recurrence_backward  # type: ignore[attr-defined]
            grads = backward(*tensors, reset, batch_sizes, out, product, grad, ctx.kind, needs[:3])
        return None, None, None, *grads, None, None


def _differentiable(
    function: Callable[..., States], tensors: Sequence[Tensor | None], needs: Sequence[bool], grad: Any
) -> list[Tensor | None]:
    """The gradients of those tensors that need one, themselves differentiable, from a second run of the function."""
    # Views, so that no gradient runs on from one tensor into another that it was made from.
    views = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    wanted = [view for view, need in zip(views, needs, strict=True) if need]
    # The forward pass ran outside of autocast, or had not come here.
    with torch.autocast("cpu", enabled=False):
        states = function(*views)
        grads = torch.autograd.grad(states, wanted, grad, create_graph=True, allow_unused=True)  # type: ignore[arg-type]
    found = iter(grads)
    return [next(found) if need else None for need in needs]
