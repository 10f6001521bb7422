"""The `"torch"` backend: tensor operations in linear space, on any device. `traceable` is its version for graphs.

The sequence is split into C chunks of T steps, where T is about the square root of S. All chunks are processed in
parallel, one step at a time, each from a state of 0; the cumulative decay P is computed too. Then the C carries are
computed one after the other, and one multiply-add adds the carry-in of each chunk:

    local_t = a_t local_{t-1} + b_t      P_t = a_t P_{t-1}      h_t = local_t + P_t carry

This takes about 2 T + 2 C kernel launches instead of S. For 0 <= a <= 1 and b >= 0 only non-negative terms are added,
so nothing cancels. These functions work in place and record no gradient; `autograd` defines the derivatives.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import Backend, Kernel
from ..call import Layout, Spec, Start
from ..cells import NUM_INPUTS
from ..graph import is_compiling
from ..layout import LinearScan, as_linear_scan, padded_call
from ..shape import States, accumulate_dtype, along, as_dtype


def scan(call: LinearScan) -> States:
    owned = call._replace(a=_copy(call.a), b=_copy(call.b))
    return _scan_in_place(owned, in_chunks=not _may_overflow(call.a))


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _may_overflow(a: Tensor) -> bool:
    """Return whether the cumulative decay of a chunk may overflow, which requires |a| > 1.

    If so, all steps are computed one after the other, because infinity times a carry of 0 is NaN. A captured graph
    cannot inspect values and always uses chunks.
    """
    if is_compiling() or a.is_meta:
        return False
    _, size = _chunks_of(a.shape[1])
    most = torch.finfo(a.dtype).max ** (0.5 / size)
    return not bool((a.detach().abs() <= most).all())


def _chunks_of(num_steps: int) -> list[int]:
    """Return the number of chunks and the number of steps of a chunk. The remaining steps are computed one by one.

    Chunks of about the square root of the length need the fewest launches. Below 16 steps, a single loop is faster.
    """
    size = int(math.sqrt(num_steps)) if num_steps >= 16 else num_steps + 1
    return [num_steps // size, size]


# On the CPU, coefficients and gradients are computed in blocks of this size, for the reasons in `ops.blocks`.
_BLOCK_BYTES = 1 << 19

Call = tuple[Spec, list[Tensor], Start, Layout]
"""The result of `layout.padded_call`."""


def _blocks_of(call: Call) -> list[tuple[slice, Call]]:
    """Return the blocks of steps, each with its part of the call."""
    spec, inputs, start, layout = call
    first = inputs[0]
    num_steps = first.shape[1]
    size = num_steps
    if first.is_cpu:
        # Multiples of 64 steps, so that each of a few threads computes whole SIMD vectors and rounding does not differ.
        size = max(64, _BLOCK_BYTES // (first.element_size() * first[:, :1].numel()) // 64 * 64)

    def part(steps: slice) -> Call:
        reset, dt = (None if x is None else x[:, steps] for x in (start.reset, start.dt))
        lengths = layout.lengths
        if lengths is not None:
            lengths = (lengths - steps.start).clamp(0, steps.stop - steps.start)
        return spec, [x[:, steps] for x in inputs], start._replace(reset=reset, dt=dt), layout._replace(lengths=lengths)

    blocks = [slice(begin, min(begin + size, num_steps)) for begin in range(0, num_steps, size)]
    return [(steps, part(steps)) for steps in blocks]


def _new(like: Tensor, dtype: torch.dtype, time_first: bool) -> Tensor:
    """Return an uninitialized sequence (B, S, *) in the caller's memory order; the tensor is not a view."""
    batch, num_steps, *rest = like.shape
    if time_first:
        return like.new_empty(num_steps, batch, *rest, dtype=dtype).transpose_(0, 1)
    return like.new_empty(batch, num_steps, *rest, dtype=dtype)


def _recurrence(spec: Spec, inputs: Sequence[Tensor], start: Start, layout: Layout, keep: bool) -> Any:
    call = padded_call(spec, list(inputs), start, layout)
    a, b = (_new(call[1][0], accumulate_dtype(inputs[0].dtype), layout.time_first) for _ in range(2))
    for steps, block in _blocks_of(call):
        a[:, steps], b[:, steps], *_ = as_linear_scan(*block)
    h = as_dtype(call[2].h, b.dtype)
    out, last = _scan_in_place(LinearScan(a, b, h, call[2].reset, call[0].reverse))
    out = out.to(inputs[0].dtype)
    if layout.time_first:
        # In place, so that no output is a view.
        out.transpose_(0, 1)
    return out, last.to(start.h.dtype), None


def _recurrence_backward(
    spec: Spec, inputs: Sequence[Tensor], start: Start, layout: Layout, saved: Any, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Compute the gradients as `autograd` describes, in place and in blocks."""
    out, _, grad_out, grad_last = saved
    if layout.time_first:
        out, grad_out = out.transpose(0, 1), grad_out.transpose(0, 1)
    call = padded_call(spec, list(inputs), start, layout)
    (_, (first_input, *_), (h, _, reset, _), _), reverse, blocks = call, spec.reverse, _blocks_of(call)
    # In the order of the scan, not of time.
    earlier, later, first, last = slice(-1), slice(1, None), slice(1), slice(-1, None)
    if reverse:
        earlier, later, first, last = later, earlier, last, first

    a, delta = (_new(first_input, accumulate_dtype(out.dtype), layout.time_first) for _ in range(2))
    for steps, block in blocks:
        a[:, steps] = as_linear_scan(*block).a
    first_a = a[:, first].clone()
    delta.copy_(grad_out)[:, last] += grad_last
    later_reset = None if reset is None else reset[:, later]
    _scan_in_place(LinearScan(a[:, later], delta[:, earlier], delta[:, last].clone(), later_reset, not reverse))

    grad_h = first_a.mul_(delta[:, first])
    if reset is not None:
        grad_h.masked_fill_(along(reset[:, first], grad_h), 0)
    grads = [
        torch.empty_like(x) if need and x is not None else None
        for x, need in zip([start.dt, *inputs], needs, strict=True)
    ]
    views = [None if grad is None else grad.transpose(0, 1) if layout.time_first else grad for grad in grads]
    grad_initial_state = None if reset is None else torch.zeros_like(start.initial_state, dtype=delta.dtype)
    for steps, block in blocks:
        # The previous state of each step is in `out`, but that of the first step is h.
        begin, end = (steps.start + 1, steps.stop + 1) if reverse else (steps.start - 1, steps.stop - 1)
        parts = [out[:, max(begin, 0) : end].to(delta.dtype)]
        if begin < 0 or end > out.shape[1]:
            parts.insert(len(parts) if reverse else 0, h.to(delta.dtype))
        previous = torch.cat(parts, 1)
        found = _block_backward(block, needs, previous, delta[:, steps])
        for view, grad in zip(views, found, strict=False):
            if view is not None:
                view[:, steps] = grad
        if grad_initial_state is not None:
            grad_initial_state += found[-1]
    if grad_initial_state is not None:
        grad_initial_state = grad_initial_state.to(start.initial_state.dtype)
    return grad_h.to(start.h.dtype), grad_initial_state, *grads


def _block_backward(call: Call, needs: Sequence[bool], previous: Tensor, delta: Tensor) -> list[Any]:
    """Return the gradients of dt, of the inputs of a block, and of the initial state, from dL/da and dL/db."""
    spec, inputs, start, layout = call
    with torch.enable_grad():
        leaves: list[Any] = [
            None if x is None else x.detach().requires_grad_(need)
            for x, need in zip([start.dt, *inputs], needs, strict=True)
        ]
        # In the dtype of delta, because the gradients of all blocks are summed in that dtype.
        initial_state = start.initial_state.detach().to(delta.dtype).requires_grad_(start.reset is not None)
        leaves.append(initial_state)
        own = Start(start.h.detach(), initial_state, start.reset, leaves[0])
        scan = as_linear_scan(spec, leaves[1:-1], own, layout)
    if start.reset is not None:
        previous = previous.masked_fill(along(start.reset, previous), 0)
    outputs = [(x, grad) for x, grad in ((scan.a, previous * delta), (scan.b, delta)) if x.requires_grad]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    if not outputs:
        return [None] * len(leaves)
    grads = iter(torch.autograd.grad([x for x, _ in outputs], wanted, [grad for _, grad in outputs]))
    return [None if leaf is None or not leaf.requires_grad else next(grads) for leaf in leaves]


def _scan_in_place(call: LinearScan, in_chunks: bool = True) -> States:
    """Overwrite b with the states, and a with intermediate values. Return b and the last state."""
    a, b, h, reset, reverse = call
    num_steps = b.shape[1]
    count, size = _chunks_of(num_steps) if in_chunks else (0, num_steps)
    whole = count * size
    rest = (a[:, whole:], b[:, whole:], None if reset is None else reset[:, whole:])
    state = h.squeeze(1)
    if reverse:
        state = _step_in_place(*rest, state, reverse)
    if whole:
        chunk_a, chunk_b = (torch.unflatten(x[:, :whole], 1, [count, size]) for x in (a, b))
        chunk_reset = None if reset is None else torch.unflatten(reset[:, :whole], 1, [count, size])
        state = _chunks_in_place(chunk_a, chunk_b, chunk_reset, state, reverse)
    if not reverse:
        _step_in_place(*rest, state, reverse)
    last = b[:, :1] if reverse else b[:, -1:]
    return b, last.clone()


def _in_order(sequence: Tensor, dim: int, reverse: bool) -> list[Tensor]:
    steps = list(sequence.unbind(dim))
    return steps[::-1] if reverse else steps


def _step_in_place(a: Tensor, b: Tensor, reset: Tensor | None, h: Tensor, reverse: bool) -> Tensor:
    """Overwrite b with the states, one step after the other in dimension 1. Return the last state."""
    resets = [None] * b.shape[1] if reset is None else _in_order(along(reset, b), 1, reverse)
    for a_t, b_t, reset_t in zip(_in_order(a, 1, reverse), _in_order(b, 1, reverse), resets, strict=True):
        # Masked instead of multiplied by 0, so that NaN does not pass a reset.
        h = b_t.addcmul_(a_t, h if reset_t is None else h.masked_fill(reset_t, 0))
    return h


def _chunks_in_place(a: Tensor, b: Tensor, reset: Tensor | None, h: Tensor, reverse: bool) -> Tensor:
    """Overwrite b with the states of all chunks; a and b are (B, C, T, *), reset (B, C, T). Return the last state."""
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


# Complex numbers need a scan of their own.
_CELLS = [cell for cell in NUM_INPUTS if cell != "mingru_rotation"]
_KERNEL = Kernel(_recurrence, _recurrence_backward, packed=False, cells=_CELLS)
BACKEND = Backend(scan=scan, differentiable=False, kernel=_KERNEL)
