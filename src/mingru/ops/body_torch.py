"""The `"torch"` body: plain tensor operations in linear space, on any device.

The sequence is cut into C chunks of T steps, T about the root of S. All chunks are stepped side by side, each from a
state of 0, while the product of their decays is kept; then the C carries are passed along one after the other; then one
multiply-add brings each chunk its carry:

    local_t = a_t local_{t-1} + b_t      P_t = a_t P_{t-1}      h_t = local_t + P_t carry

That is 2 T + 2 C + a few launches instead of S. For 0 <= a <= 1 and b >= 0 only positive terms are added: nothing
cancels. Everything happens in place, in memory made here, so these functions record no gradient: `autograd` gives it.
"""

import torch
from torch import Tensor

from .activation import activate_into, derivative_into
from .shape import States, accumulate_dtype, along, chunks_of, time_first

DIFFERENTIABLE = False


def unavailable() -> str | None:
    return None


def refuses(sequence: Tensor, activation: str | None) -> str | None:
    return None


def linear_scan(a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool) -> States:
    dtype = accumulate_dtype(b.dtype)
    own_a, own_b = a.to(dtype, copy=True), b.to(dtype, copy=True)
    states = _scan_in_place(own_a, own_b, h.to(dtype).squeeze(1), reset, reverse, in_chunks=not _may_overflow(a))
    return _finish(states, b.dtype, h.dtype, reverse)


def _may_overflow(a: Tensor) -> bool:
    """Whether a chunk's product of decays may leave the numbers, as it can for |a| > 1 alone.

    Then all must be stepped through: infinity times a carry of 0 is NaN. A graph that is captured sees no numbers, and
    goes by chunks.
    """
    if torch.compiler.is_compiling() or a.is_meta:
        return False
    _, size = chunks_of(a.shape[1])
    most = torch.finfo(accumulate_dtype(a.dtype)).max ** (0.5 / size)
    return not bool((a.detach().abs() <= most).all())


def mingru(
    gate: Tensor, candidate: Tensor, h: Tensor, initial: Tensor, reset: Tensor | None, activation: str, reverse: bool
) -> States:
    dtype = accumulate_dtype(gate.dtype)
    k, v = gate.to(dtype), candidate.to(dtype)
    a, b = _empty_like(k), _empty_like(k)
    activate_into(v, activation, b, scratch=a)
    b.mul_(torch.sigmoid(k, out=a))
    _decay_into(k, a)
    if reset is not None:
        mask = along(reset, b)
        b = torch.where(mask, torch.addcmul(b, a, initial.to(dtype).expand_as(b)), b)
    states = _scan_in_place(a, b, h.to(dtype).squeeze(1), reset, reverse)
    return _finish(states, gate.dtype, h.dtype, reverse)


def mingru_backward(
    gate: Tensor,
    candidate: Tensor,
    h: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    out: Tensor,
    grad_out: Tensor,
    grad_last: Tensor,
    activation: str,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """What `autograd` writes as formulas, in the memory of three sequences: fresh memory costs more than arithmetic."""
    dtype = accumulate_dtype(gate.dtype)
    k, v, states, before_first, before_reset = (x.to(dtype) for x in (gate, candidate, out, h, initial))
    # In the order of the scan: all steps but the last, all but the first, the first, the last.
    earlier, later, first, last = slice(-1), slice(1, None), slice(1), slice(-1, None)
    if reverse:
        earlier, later, first, last = later, earlier, last, first

    # delta_t = dL/dh_t + a_{t+1} delta_{t+1}
    delta, work, scratch = (_empty_like(states) for _ in range(3))
    delta.copy_(grad_out)
    _decay_into(k[:, later], work[:, earlier])
    work[:, last] = 1.0
    cuts = None
    if reset is not None:
        cuts = torch.zeros_like(reset)
        cuts[:, earlier] = reset[:, later]
    _scan_in_place(work, delta, grad_last.to(dtype).squeeze(1), cuts, not reverse)

    met = states[:, earlier]
    grad_met = _decay_into(k, scratch)[:, first] * delta[:, first]
    grad_initial = torch.zeros_like(grad_met)
    if reset is not None:
        mask = along(reset, k)
        met = torch.where(mask[:, later], before_reset, met)
        before_first = torch.where(mask[:, first], before_reset, before_first)
        grad_met = grad_met.masked_fill(mask[:, first], 0)
        grad_initial = (scratch * delta).masked_fill(~mask, 0).sum(1, keepdim=True)

    # dL/dk = delta (candidate - met) z (1 - z), dL/dv = delta z g'(v)
    activate_into(v, activation, work, scratch)
    work[:, later].sub_(met)
    work[:, first].sub_(before_first)
    delta.mul_(torch.sigmoid(k, out=scratch))
    grad_gate = work.mul_(delta).mul_(_decay_into(k, scratch))
    grad_candidate = delta.mul_(derivative_into(v, activation, scratch))
    return (
        grad_gate.to(gate.dtype),
        grad_candidate.to(candidate.dtype),
        grad_met.to(h.dtype),
        grad_initial.to(initial.dtype),
    )


def _decay_into(k: Tensor, out: Tensor) -> Tensor:
    """1 - z. As sigma(-k): 1 - sigma(k) would cancel near 1."""
    return torch.neg(k, out=out).sigmoid_()


def _empty_like(x: Tensor) -> Tensor:
    """Dense, with batch and time in the order in which they lie in x; `torch.empty_like` forgets that of a slice."""
    if time_first(x):
        return x.new_empty((x.shape[1], x.shape[0], *x.shape[2:])).transpose(0, 1)
    return x.new_empty(x.shape)


def _finish(states: Tensor, dtype: torch.dtype, state_dtype: torch.dtype, reverse: bool) -> States:
    last = states[:, :1] if reverse else states[:, -1:]
    return states.to(dtype), last.to(state_dtype, copy=True)


def _scan_in_place(
    a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool, in_chunks: bool = True
) -> Tensor:
    """Turn b (B, S, *) into the states and a into rubble; h is (B, *)."""
    num_steps = b.shape[1]
    count, size = chunks_of(num_steps) if in_chunks else (0, num_steps)
    cut = count * size
    if reverse:
        h = _step_in_place(a[:, cut:], b[:, cut:], h, None if reset is None else reset[:, cut:], reverse)
    if cut:
        h = _chunks_in_place(
            torch.unflatten(a[:, :cut], 1, [count, size]),
            torch.unflatten(b[:, :cut], 1, [count, size]),
            h,
            None if reset is None else torch.unflatten(reset[:, :cut], 1, [count, size]),
            reverse,
        )
    if not reverse:
        _step_in_place(a[:, cut:], b[:, cut:], h, None if reset is None else reset[:, cut:], reverse)
    return b


def _in_order(sequence: Tensor, dim: int, reverse: bool) -> list[Tensor]:
    steps = list(sequence.unbind(dim))
    return steps[::-1] if reverse else steps


def _step_in_place(a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool) -> Tensor:
    """One step after the other along dimension 1; returns the state after the last."""
    resets = [None] * b.shape[1] if reset is None else _in_order(along(reset, b), 1, reverse)
    for a_t, b_t, reset_t in zip(_in_order(a, 1, reverse), _in_order(b, 1, reverse), resets, strict=True):
        # Masked rather than multiplied by 0, so that not even NaN crosses a reset.
        h = b_t.addcmul_(a_t, h if reset_t is None else h.masked_fill(reset_t, 0))
    return h


def _chunks_in_place(a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool) -> Tensor:
    """a, b (B, C, T, *), reset (B, C, T): the states of all chunks into b; returns the state after the last."""
    crossed = None
    if reset is not None:
        mask = along(reset, b)
        a.masked_fill_(mask, 0)
        in_time = reset.flip(2) if reverse else reset
        crossed = in_time.cummax(2).values
        crossed = along(crossed.flip(2) if reverse else crossed, b)

    decays, locals_ = _in_order(a, 2, reverse), _in_order(b, 2, reverse)
    resets = [None] * len(decays) if reset is None else _in_order(mask, 2, reverse)
    for t in range(1, len(decays)):
        before, reset_t = locals_[t - 1], resets[t]
        locals_[t].addcmul_(decays[t], before if reset_t is None else before.masked_fill(reset_t, 0))
        decays[t].mul_(decays[t - 1])

    carries = torch.empty_like(locals_[-1])
    cut_off = [None] * b.shape[1] if crossed is None else _in_order(crossed.select(2, 0 if reverse else -1), 1, reverse)
    chunks = zip(
        _in_order(carries, 1, reverse),
        _in_order(locals_[-1], 1, reverse),
        _in_order(decays[-1], 1, reverse),
        cut_off,
        strict=True,
    )
    for carry, local, decay, cut in chunks:
        carry.copy_(h)
        h = torch.addcmul(local, decay, h if cut is None else h.masked_fill(cut, 0))

    brought = carries.unsqueeze(2)
    b.addcmul_(a, brought if crossed is None else brought.expand_as(b).masked_fill(crossed, 0))
    return h
