"""The `"log"` body: the paper's parallel form, in log space (Feng et al. 2024, appendix B; Heinsen 2023).

    a*_t = sum_{i<=t} log a_i      log h_t = a*_t + logcumsumexp(log b - a*)_t

Kept because the paper's is what people come to study: it needs a positive candidate, and it loses accuracy with length,
as a* grows without bound. The paper puts log h_0 in front of log b, which asks for h_0 > 0 and has a NaN gradient at 0;
here the initial state's share, exp(a*_t) h_0, is added outside of the logarithm, which allows any h_0. Gradients are
torch's own; its second derivative of `logcumsumexp` is NaN where the first is exactly 0.
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
    k, v, state_dtype = gate.to(dtype), candidate.to(dtype), h.dtype
    if reverse:
        k, v = k.flip(1), v.flip(1)
        reset = None if reset is None else reset.flip(1)
    log_a, log_b = F.logsigmoid(-k), F.logsigmoid(k) + log_g(v)
    h, initial = h.to(dtype), initial.to(dtype)
    out = _scan(log_a, log_b, h) if reset is None else _scan_stretches(log_a, log_b, h, initial, reset)
    last = out[:, -1:].to(state_dtype)
    return (out.flip(1) if reverse else out).to(gate.dtype), last


def _scan(log_a: Tensor, log_b: Tensor, h: Tensor) -> Tensor:
    return parallel_scan_log(log_a[:, 1:], log_b) + log_a.cumsum(1).exp() * h


def _scan_stretches(log_a: Tensor, log_b: Tensor, h: Tensor, initial: Tensor, reset: Tensor) -> Tensor:
    """Each stretch between resets as a sequence of its own: a decay of 0 has no finite logarithm.

    Every step takes up what the 1, 2, 4, ... steps before it have taken up, until its stretch begins; where that is,
    only the mask tells, and so this maps and is captured as all else is.
    """
    cut = along(reset, log_b)
    # Where a gate is shut entirely: finite, as two numbers that are -inf have no difference.
    log_b = log_b.clamp_min(torch.finfo(log_b.dtype).min / 4)
    span, begun = 1, cut
    while span < log_b.shape[1]:
        joined = _log_sum(log_b[:, span:], log_a[:, span:] + log_b[:, :-span])
        decay = log_a[:, span:] + log_a[:, :-span]
        now, stop = slice(span, None), begun[:, span:]
        log_b = torch.cat([log_b[:, :span], torch.where(stop, log_b[:, now], joined)], 1)
        log_a = torch.cat([log_a[:, :span], torch.where(stop, log_a[:, now], decay)], 1)
        begun = torch.cat([begun[:, :span], stop | begun[:, :-span]], 1)
        span *= 2
    return log_b.exp() + log_a.exp() * torch.where(begun, initial, h)


def _log_sum(one: Tensor, other: Tensor) -> Tensor:
    """`torch.logaddexp`, whose second derivative overflows to NaN where its arguments lie far apart."""
    swap = one < other
    more, less = torch.where(swap, other, one), torch.where(swap, one, other)
    return more - F.logsigmoid(more - less)
