"""The `"torch"` backend: plain tensor operations in linear space, on any device. `traceable` is its form for graphs.

The sequence is split into C chunks of T steps, T about the root of S. All chunks are processed in parallel, one step at
a time, each from a state of 0, while the cumulative decay P is kept. Then the C carries are passed along one after the
other, and one multiply-add gives each chunk its carry-in:

    local_t = a_t local_{t-1} + b_t      P_t = a_t P_{t-1}      h_t = local_t + P_t carry

That is 2 T + 2 C + a few launches instead of S. For 0 <= a <= 1 and b >= 0 only positive terms are added, so nothing
cancels. Everything happens in place, in memory made here, so these functions record no gradient: `autograd` adds it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import Backend, Kernel
from ..call import Layout, Spec, Start
from ..graph import is_compiling
from ..layout import LinearScan, as_linear_scan, padded_call
from ..shape import States, along


def scan(call: LinearScan) -> States:
    owned = call._replace(a=call.a.clone(), b=call.b.clone())
    return _scan_in_place(owned, in_chunks=not _may_overflow(call.a))


def _may_overflow(a: Tensor) -> bool:
    """Whether the cumulative decay of a chunk may overflow, which needs |a| > 1.

    Then all steps are computed one after the other, because infinity times a carry of 0 is NaN. A captured graph cannot
    inspect values, and always uses chunks.
    """
    if is_compiling() or a.is_meta:
        return False
    _, size = _chunks_of(a.shape[1])
    most = torch.finfo(a.dtype).max ** (0.5 / size)
    return not bool((a.detach().abs() <= most).all())


def _chunks_of(num_steps: int) -> list[int]:
    """Return the number of chunks and their number of steps; the remaining steps are computed one after the other.

    Chunks of about the root of the length need the fewest launches. Below 16 steps, one step after the other is faster.
    """
    size = int(math.sqrt(num_steps)) if num_steps >= 16 else num_steps + 1
    return [num_steps // size, size]


def _recurrence(spec: Spec, inputs: Sequence[Tensor], start: Start, layout: Layout, keep: bool) -> Any:
    # `as_linear_scan` makes new tensors, whose order in memory is that of the inputs.
    out, last = _scan_in_place(as_linear_scan(*padded_call(spec, list(inputs), start, layout)))
    out = out.to(inputs[0].dtype)
    if layout.time_first:
        # In place, so that no output is a view.
        out.transpose_(0, 1)
    return out.contiguous(), last.to(start.h.dtype), None


def _recurrence_backward(
    spec: Spec, inputs: Sequence[Tensor], start: Start, layout: Layout, saved: Any, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    from ..autograd import adjoint, grad_of_h, previous_states

    out, _, grad_out, grad_last = saved
    if layout.time_first:
        out, grad_out = out.transpose(0, 1), grad_out.transpose(0, 1)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        initial_state = start.initial_state.detach().requires_grad_(start.reset is not None)
        leaf_start = Start(start.h.detach(), initial_state, start.reset)
        call = as_linear_scan(*padded_call(spec, leaves, leaf_start, layout))
    detached = call._replace(a=call.a.detach(), b=call.b.detach())
    delta = adjoint(lambda of: _scan_in_place(of._replace(b=of.b.clone())), detached, (grad_out, grad_last))
    previous = previous_states(detached, out.to(call.a.dtype))
    ways = [(call.a, previous.mul_(delta)), (call.b, delta)]
    outputs, grad_outputs = zip(*[way for way in ways if way[0].requires_grad], strict=True)
    wanted = [leaf for leaf in (*leaves, initial_state) if leaf.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grad_outputs) if wanted else ())
    grads = [next(found) if leaf.requires_grad else None for leaf in leaves]
    return grad_of_h(detached, delta).to(start.h.dtype), next(found, None), *grads


def _scan_in_place(call: LinearScan, in_chunks: bool = True) -> States:
    """Overwrite b with the states; a is used as scratch."""
    a, b, h, reset, reverse = call
    num_steps = b.shape[1]
    count, size = _chunks_of(num_steps) if in_chunks else (0, num_steps)
    whole = count * size
    rest = (a[:, whole:], b[:, whole:], None if reset is None else reset[:, whole:])
    state = h.squeeze(1)
    if reverse:
        state = _step_in_place(*rest, state, reverse)
    if whole:
        chunk_a, chunk_b = (x[:, :whole].unflatten(1, [count, size]) for x in (a, b))
        chunk_reset = None if reset is None else reset[:, :whole].unflatten(1, [count, size])
        state = _chunks_in_place(chunk_a, chunk_b, chunk_reset, state, reverse)
    if not reverse:
        _step_in_place(*rest, state, reverse)
    last = b[:, :1] if reverse else b[:, -1:]
    return b, last.clone()


def _in_order(sequence: Tensor, dim: int, reverse: bool) -> list[Tensor]:
    steps = list(sequence.unbind(dim))
    return steps[::-1] if reverse else steps


def _step_in_place(a: Tensor, b: Tensor, reset: Tensor | None, h: Tensor, reverse: bool) -> Tensor:
    """Compute one step after the other along dimension 1; return the state after the last."""
    resets = [None] * b.shape[1] if reset is None else _in_order(along(reset, b), 1, reverse)
    for a_t, b_t, reset_t in zip(_in_order(a, 1, reverse), _in_order(b, 1, reverse), resets, strict=True):
        # Masked rather than multiplied by 0, so that not even NaN passes a reset.
        h = b_t.addcmul_(a_t, h if reset_t is None else h.masked_fill(reset_t, 0))
    return h


def _chunks_in_place(a: Tensor, b: Tensor, reset: Tensor | None, h: Tensor, reverse: bool) -> Tensor:
    """Write the states of all chunks into b; a, b (B, C, T, *), reset (B, C, T). Return the state after the last."""
    seen_reset = None
    if reset is not None:
        mask = along(reset, b)
        a.masked_fill_(mask, 0)
        in_time = reset.flip(2) if reverse else reset
        seen_reset = in_time.cummax(2).values
        seen_reset = along(seen_reset.flip(2) if reverse else seen_reset, b)

    decays, locals_ = _in_order(a, 2, reverse), _in_order(b, 2, reverse)
    resets = [None] * len(decays) if reset is None else _in_order(mask, 2, reverse)
    for t in range(1, len(decays)):
        before, reset_t = locals_[t - 1], resets[t]
        locals_[t].addcmul_(decays[t], before if reset_t is None else before.masked_fill(reset_t, 0))
        decays[t].mul_(decays[t - 1])

    carries = torch.empty_like(locals_[-1])
    stops: list[Any] = [None] * b.shape[1]
    if seen_reset is not None:
        stops = _in_order(seen_reset.select(2, 0 if reverse else -1), 1, reverse)
    chunks = zip(
        _in_order(carries, 1, reverse),
        _in_order(locals_[-1], 1, reverse),
        _in_order(decays[-1], 1, reverse),
        stops,
        strict=True,
    )
    for carry, local, decay, stop in chunks:
        carry.copy_(h)
        h = torch.addcmul(local, decay, h if stop is None else h.masked_fill(stop, 0))

    carry_in = carries.unsqueeze(2)
    b.addcmul_(a, carry_in if seen_reset is None else carry_in.expand_as(b).masked_fill(seen_reset, 0))
    return h


BACKEND = Backend(scan=scan, differentiable=False, kernel=Kernel(_recurrence, _recurrence_backward, packed=False))
