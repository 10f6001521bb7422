"""The `"log"` body: the paper's parallel form, in log space (Feng et al. 2024, appendix B; Heinsen 2023).

    a*_t = sum_{i<=t} log a_i      log h_t = a*_t + logcumsumexp(log b - a*)_t

Kept because the paper's is what people come to study: it needs a positive candidate, and it loses accuracy with length,
as a* grows without bound. The paper puts log h_0 in front of log b, which asks for h_0 > 0 and has a NaN gradient at 0;
here the initial state's share, exp(a*_t) h_0, is added outside of the logarithm, which allows any h_0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import log_g
from .shape import States, accumulate_dtype, along

DIFFERENTIABLE = True


def unavailable() -> str | None:
    return None


def refuses(sequence: Tensor, activation: str | None) -> str | None:
    if activation is None:
        return "it takes the logarithm of a and b, and linear_scan allows any a and b"
    if activation != "positive":
        return f"it takes the logarithm of the candidate, and a candidate that is {activation!r} may be negative"
    return None


def linear_scan(a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool) -> States:
    raise AssertionError("refused above")


def parallel_scan_log(log_a: Tensor, log_b: Tensor) -> Tensor:
    decay = torch.cat([torch.zeros_like(log_b[:, :1]), log_a.cumsum(1)], 1)
    return (decay + (log_b - decay).logcumsumexp(1)).exp()


def mingru(
    gate: Tensor, candidate: Tensor, h: Tensor, initial: Tensor, reset: Tensor | None, activation: str, reverse: bool
) -> States:
    dtype = accumulate_dtype(gate.dtype)
    k, v = gate.to(dtype), candidate.to(dtype)
    if reverse:
        k, v = k.flip(1), v.flip(1)
        reset = None if reset is None else reset.flip(1)
    log_a, log_b = F.logsigmoid(-k), F.logsigmoid(k) + log_g(v)
    if reset is None:
        out = _scan(log_a, log_b, h.to(dtype))
    else:
        row, column = _segments(reset)
        shape = (int(row.max()) + 1, int(column.max()) + 1, *k.shape[2:])
        # Each stretch between resets becomes a sequence of its own; what pads the shorter ones is never read back.
        starts = torch.where(along(reset[:, :1], h), initial, h).to(dtype)
        begins = initial.to(dtype).expand_as(starts)[_owner(row)].index_copy(0, row[:, 0], starts)
        placed = (k.new_zeros(shape).index_put((row, column), share) for share in (log_a, log_b))
        out = _scan(*placed, begins)[row, column]
    last = out[:, -1:].to(h.dtype)
    return (out.flip(1) if reverse else out).to(gate.dtype), last


def _scan(log_a: Tensor, log_b: Tensor, h: Tensor) -> Tensor:
    return parallel_scan_log(log_a[:, 1:], log_b) + log_a.cumsum(1).exp() * h


def _segments(reset: Tensor) -> tuple[Tensor, Tensor]:
    """For each step (B, S) the number of the stretch that it belongs to, over the whole batch, and its place therein."""
    starts = reset.clone()
    starts[:, 0] = True
    row = starts.flatten().cumsum(0).view_as(reset) - 1
    step = torch.arange(reset.shape[1], device=reset.device).expand_as(reset)
    column = step - torch.where(starts, step, 0).cummax(1).values
    return row, column


def _owner(row: Tensor) -> Tensor:
    """The batch element of each stretch."""
    batch = torch.arange(row.shape[0], device=row.device)
    return batch.repeat_interleave(row[:, -1] - row[:, 0] + 1)
