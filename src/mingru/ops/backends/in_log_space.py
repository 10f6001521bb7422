"""The `"log"` backend: the paper's parallel scan in log space (Feng et al. 2024, appendix B; Heinsen 2023).

    a*_t = sum_{i<=t} log a_i      log h_t = a*_t + logcumsumexp(log b - a*)_t

It is kept for studying the paper. It needs a positive candidate. It loses accuracy with length, because a* grows
without bound. The paper puts log h_0 in front of log b, which requires h_0 > 0 and has a NaN gradient at 0. Here
exp(a*_t) h_0 is added outside of the logarithm, so that any h_0 is allowed. PyTorch computes the gradients. Its second
derivative of `logcumsumexp` is NaN where the first derivative is exactly 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import Backend
from ..call import Call, Spec
from ..cells import CELLS, log_coefficients
from ..layout import padding_of
from ..shape import States, along


def _unsupported(sequence: Tensor, spec: Spec) -> str | None:
    if spec.cell not in CELLS or not CELLS[spec.cell].has_logarithms:
        return f"it takes the logarithm of a and b, which may be negative in {spec.cell}"
    if spec.activation != "positive":
        return f"it takes the logarithm of the candidate, which may be negative with activation {spec.activation!r}"
    return None


def parallel_scan_log(log_a: Tensor, log_b: Tensor) -> Tensor:
    decay = torch.cat([torch.zeros_like(log_b[:, :1]), log_a.cumsum(1)], 1)
    return (decay + (log_b - decay).logcumsumexp(1)).exp()


def _recurrence(call: Call) -> States:
    spec, start, lengths = call.spec, call.start, call.layout.lengths
    log_a, log_b = log_coefficients(spec, call.tensors, start)
    if lengths is not None:
        padding = along(padding_of(lengths, log_a), log_a)
        # Finite, because the gradient of `logcumsumexp` is NaN if all its terms are 0.
        log_a, log_b = log_a.masked_fill(padding, 0.0), log_b.masked_fill(padding, torch.finfo(log_b.dtype).min / 4)
    reset = start.reset
    if spec.reverse:
        log_a, log_b = log_a.flip(1), log_b.flip(1)
        reset = None if reset is None else reset.flip(1)
    h, initial_state = start.h.to(log_b.dtype), start.initial_state.to(log_b.dtype)
    if reset is None and start.dt is None:
        out = parallel_scan_log(log_a[:, 1:], log_b) + log_a.cumsum(1).exp() * h
    else:
        # Also without resets, because the decay of an infinite time is 0.
        out = _scan_in_doubling_spans(log_a, log_b, h, initial_state, reset)
    last = out[:, -1:].clone()
    return out.flip(1) if spec.reverse else out, last


def _scan_in_doubling_spans(
    log_a: Tensor, log_b: Tensor, h: Tensor, initial_state: Tensor, reset: Tensor | None
) -> Tensor:
    """Scan the steps between two resets separately. A decay of 0, whose logarithm is not finite, is allowed.

    By recursive doubling, each step is combined with the 1, 2, 4, ... steps before it, back to the last reset.
    Only a mask depends on the resets, so vmap and graph capture work.
    """
    seen_reset = torch.zeros_like(log_b, dtype=torch.bool) if reset is None else along(reset, log_b)
    # Finite even if a gate is 0, because -inf - (-inf) is NaN.
    log_b = log_b.clamp_min(torch.finfo(log_b.dtype).min / 4)
    span = 1
    while span < log_b.shape[1]:
        combined = _log_sum(log_b[:, span:], log_a[:, span:] + log_b[:, :-span])
        decay = log_a[:, span:] + log_a[:, :-span]
        now, stop = slice(span, None), seen_reset[:, span:]
        log_b = torch.cat([log_b[:, :span], torch.where(stop, log_b[:, now], combined)], 1)
        log_a = torch.cat([log_a[:, :span], torch.where(stop, log_a[:, now], decay)], 1)
        seen_reset = torch.cat([seen_reset[:, :span], stop | seen_reset[:, :-span]], 1)
        span *= 2
    return log_b.exp() + log_a.exp() * torch.where(seen_reset, initial_state, h)


def _log_sum(one: Tensor, other: Tensor) -> Tensor:
    """Compute logaddexp. The second derivative of `torch.logaddexp` is NaN if its arguments are far apart."""
    swap = one < other
    more, less = torch.where(swap, other, one), torch.where(swap, one, other)
    return more - F.logsigmoid(more - less)


BACKEND = Backend(unsupported=_unsupported, recurrence=_recurrence)
