"""The `"torch"` backend: tensor operations in linear space, on any device. `torch_in_graphs` is its version for graphs.

The sequence is split into C chunks of T steps, where T is about the square root of S. All chunks are processed in
parallel, one step at a time, each from a state of 0; the cumulative decay P is computed too. Then the C carries are
computed one after the other, and one multiply-add adds the carry-in of each chunk:

    local_t = a_t local_{t-1} + b_t      P_t = a_t P_{t-1}      h_t = local_t + P_t carry

This takes about 2 T + 2 C kernel launches instead of S. For 0 <= a <= 1 and b >= 0 only non-negative terms are added,
so nothing cancels. The scan works in place and records no gradient; `ops.scan` defines its derivatives.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..backend import Backend, Given, Gradients, Kernel
from ..block_recurrence import by_torch
from ..call import Spec, from_flat
from ..cells import NUM_INPUTS, parts_of
from ..layout import as_linear_scan, in_layout, padded_call
from ..scan import LinearScan, adjoint, grad_of_h, previous_states
from ..shape import States, along
from . import torch_in_graphs


def scan(call: LinearScan) -> States:
    if call.parts > 1:
        return torch_in_graphs.scan(call)
    owned = call._replace(a=_copy(call.a), b=_copy(call.b))
    return _scan_in_place(owned, in_chunks=not _may_overflow(call.a))


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _may_overflow(a: Tensor) -> bool:
    """Return whether the cumulative decay of a chunk may overflow, which requires |a| > 1.

    If so, all steps are computed one after the other, because infinity times a carry of 0 is NaN.
    """
    if a.is_meta:
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


def _forward(spec: Spec, given: Given, time_first: bool, keep: bool | None) -> tuple[Tensor, Tensor, None]:
    call = from_flat(spec, given, time_first)
    # In place, because the coefficients are new.
    states = _scan_in_place(as_linear_scan(padded_call(call)))
    # The padding has states, because backward needs them in the reverse direction.
    out, last = in_layout(states, call._replace(layout=call.layout._replace(lengths=None)))
    # The coefficients have the memory order of the inputs.
    return out.contiguous(), last, None


def _backward(spec: Spec, given: Given, time_first: bool, saved: Given, needs: Sequence[bool]) -> Gradients:
    """Compute the coefficients again. PyTorch differentiates them, but not the scan."""
    out, _, grad_out, grad_last = saved
    if time_first:
        out, grad_out = out.transpose(0, 1), grad_out.transpose(0, 1)
    # Of h and of the initial state, which without resets is None.
    wants = [True, given[1] is not None, *needs[2:]]
    with torch.enable_grad():
        pairs = zip(given, wants, strict=True)
        leaves: list[Any] = [None if x is None else x.detach().requires_grad_(want) for x, want in pairs]
        call = as_linear_scan(padded_call(from_flat(spec, leaves, time_first)))
    with torch.no_grad():
        # Only the decays are new.
        delta = adjoint(lambda new: _scan_in_place(new._replace(b=_copy(new.b))), call, (grad_out, grad_last))
        grads = previous_states(call, out.to(delta.dtype)).mul_(delta), delta, grad_of_h(call, delta)
    outputs = [(x, grad) for x, grad in zip(call[:3], grads, strict=True) if x.requires_grad]
    wanted = [leaf for leaf, want in zip(leaves, wants, strict=True) if want]
    found = iter(torch.autograd.grad([x for x, _ in outputs], wanted, [grad for _, grad in outputs]))
    return [next(found) if want else None for want in wants]


def _scan_in_place(call: LinearScan, in_chunks: bool = True) -> States:
    """Overwrite b with the states, and a with intermediate values. Return b and the last state."""
    a, b, h, reset, reverse, _ = call
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
    return b, (b[:, :1] if reverse else b[:, -1:]).clone()


def _in_order(sequence: Tensor, dim: int, reverse: bool) -> list[Tensor]:
    steps = list(sequence.unbind(dim))
    return steps[::-1] if reverse else steps


def _step_in_place(a: Tensor, b: Tensor, reset: Tensor | None, h: Tensor, reverse: bool, dim: int = 1) -> Tensor:
    """Overwrite b with the states, one step after the other in this dimension. Return the last state."""
    resets = [None] * b.shape[dim] if reset is None else _in_order(along(reset, b), dim, reverse)
    for a_t, b_t, reset_t in zip(_in_order(a, dim, reverse), _in_order(b, dim, reverse), resets, strict=True):
        # Masked instead of multiplied by 0, so that NaN does not pass a reset.
        h = b_t.addcmul_(a_t, h if reset_t is None else h.masked_fill(reset_t, 0))
    return h


def _chunks_in_place(a: Tensor, b: Tensor, reset: Tensor | None, h: Tensor, reverse: bool) -> Tensor:
    """Overwrite b with the states of all chunks; a and b are (B, C, T, *), reset (B, C, T). Return the last state."""
    _step_in_place(a, b, reset, torch.zeros_like(b.select(2, 0)), reverse, 2)
    for before, decay in pairwise(_in_order(a, 2, reverse)):
        decay.mul_(before)
    end = 0 if reverse else -1
    has_reset = seen_reset = None
    if reset is not None:
        seen_reset = reset.flip(2).cummax(2).values.flip(2) if reverse else reset.cummax(2).values
        has_reset = seen_reset.select(2, end)
        # Not only at the reset, because the product of NaN and 0 is NaN.
        seen_reset = along(seen_reset, b)
        a.masked_fill_(seen_reset, 0)
    # The states after each chunk; each chunk starts from the one before.
    states, before_all = b.select(2, end).clone(), h.unsqueeze(1)
    h = _step_in_place(a.select(2, end), states, has_reset, h, reverse)
    carry = torch.cat([states[:, 1:], before_all] if reverse else [before_all, states[:, :-1]], 1).unsqueeze(2)
    b.addcmul_(a, carry if seen_reset is None else carry.expand_as(b).masked_fill(seen_reset, 0))
    return h


# Numbers with several parts need a scan of their own.
_CELLS = [cell for cell in NUM_INPUTS if parts_of(cell) == 1]
_KERNEL = Kernel(_forward, _backward, packed=False, cells=_CELLS)
_OF_GRU = Kernel(by_torch, None, packed=True, lengths=True, cells=["gru"])
BACKEND = Backend(scan=scan, kernel=_KERNEL, linear_kernel=_OF_GRU)
