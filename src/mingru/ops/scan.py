"""The linear scan and its derivatives, which have one meaning for all backends.

The adjoint of h_t = a_t h_{t-1} + b_t is the same recurrence in the opposite direction:

    delta_t = dL/dh_t + a_{t+1} delta_{t+1}
    dL/db_t = delta_t      dL/da_t = delta_t h_{t-1}      dL/dh_0 = a_1 delta_1

Of complex numbers and quaternions, a_{t+1}, h_{t-1} and a_1 are conjugates here. Products of quaternions depend on the
order: the one above.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .shape import States, accumulate_dtype, along, as_dtype, conjugate, one_like, times


class LinearScan(NamedTuple):
    """The scan h_t = a_t h_{t-1} + b_t. A reset sets h_{t-1} to 0.

    a, b and h have the accumulation dtype. Backends with a kernel also take half widths, which it computes in float32.
    """

    a: Tensor
    """Decays, (B, S, *)."""
    b: Tensor
    """Inputs, (B, S, *)."""
    h: Tensor
    """State before the first step, (B, 1, *)."""
    reset: Tensor | None
    """Boolean reset mask, (B, S)."""
    reverse: bool
    """Whether the scan runs from the last step to the first."""
    parts: int = 1
    """Size of the last dimension if it has the parts of a number (`shape.to_parts`); 1: real or complex tensors."""


def in_accumulation_dtype(call: LinearScan) -> LinearScan:
    dtype = accumulate_dtype(call.b.dtype)
    a, b, h = (as_dtype(x, dtype) for x in call[:3])
    return call._replace(a=a, b=b, h=h)


def _first(sequence: Tensor, reverse: bool) -> Tensor:
    # Not a slice, because a full slice has no rule for `is_grads_batched`.
    return sequence.narrow(1, sequence.shape[1] - 1 if reverse else 0, 1)


def previous_states(call: LinearScan, out: Tensor) -> Tensor:
    """Return the previous state of each step, which is 0 at a reset."""
    previous = torch.cat([out[:, 1:], call.h], 1) if call.reverse else torch.cat([call.h, out[:, :-1]], 1)
    return previous if call.reset is None else previous.masked_fill(along(call.reset, previous), 0)


def adjoint(run: Callable[[LinearScan], States], call: LinearScan, grad: tuple[Tensor, Tensor]) -> Tensor:
    """Return delta, by a scan in the opposite direction that uses the decay of the following step."""
    a, reset, reverse = call.a, call.reset, call.reverse
    one = one_like(a[:, :1], call.parts)
    decay = conjugate(torch.cat([one, a[:, :-1]] if reverse else [a[:, 1:], one], 1), call.parts)
    if reset is not None:
        no_reset = torch.zeros_like(reset[:, :1])
        reset = torch.cat([no_reset, reset[:, :-1]] if reverse else [reset[:, 1:], no_reset], 1)
    grad_out, grad_last = (x.to(a.dtype) for x in grad)
    return run(LinearScan(decay.resolve_conj(), grad_out, grad_last, reset, not reverse, call.parts))[0]


def grad_of_h(call: LinearScan, delta: Tensor) -> Tensor:
    grad_h = times(conjugate(_first(call.a, call.reverse), call.parts), _first(delta, call.reverse), call.parts)
    return grad_h if call.reset is None else grad_h.masked_fill(along(_first(call.reset, call.reverse), grad_h), 0)
