"""The `"log"` backend: the paper's parallel scan in log space (Feng et al. 2024, appendix B; Heinsen 2023).

    a*_t = sum_{i<=t} log a_i      log h_t = a*_t + logcumsumexp(log b - a*)_t

It is kept for studying the paper. It needs a positive candidate, and takes neither resets nor times. It loses accuracy
with length, because a* grows without bound. The paper puts log h_0 in front of log b, which requires h_0 > 0 and has a
NaN gradient at 0. Here exp(a*_t) h_0 is added outside of the logarithm, so that any h_0 is allowed. PyTorch computes
the gradients. Its second derivative of `logcumsumexp` is NaN where the first derivative is exactly 0.
"""

import torch
from torch import Tensor

from ..backend import Backend
from ..call import Call, Spec
from ..cells import CELLS, log_coefficients
from ..layout import padding_of
from ..shape import States, along


def _unsupported(sequence: Tensor, spec: Spec) -> str | None:
    if spec.cell == "gru":
        return "its cell is no linear recurrence"
    if spec.cell not in CELLS or not CELLS[spec.cell].has_logarithms:
        return f"it takes the logarithm of a and b, which may be negative in {spec.cell}"
    if spec.activation != "positive":
        return f"it takes the logarithm of the candidate, which may be negative with activation {spec.activation!r}"
    return None


def parallel_scan_log(log_a: Tensor, log_b: Tensor) -> Tensor:
    decay = torch.cat([torch.zeros_like(log_b[:, :1]), log_a.cumsum(1)], 1)
    return (decay + (log_b - decay).logcumsumexp(1)).exp()


def _states_in_log_space(call: Call) -> States:
    spec, context, lengths = call.spec, call.context, call.layout.lengths
    for name, given in (("reset", context.reset), ("dt", context.dt)):
        if given is not None:
            why = "a decay may then be 0, which has no logarithm"
            raise ValueError(f"{spec.cell}: the backend 'log' takes no {name}, because {why}; use 'auto'")
    log_a, log_b = log_coefficients(spec, call.tensors)
    if lengths is not None:
        padding = along(padding_of(lengths, log_a), log_a)
        # Finite, because the gradient of `logcumsumexp` is NaN if all its terms are 0.
        log_a, log_b = log_a.masked_fill(padding, 0.0), log_b.masked_fill(padding, torch.finfo(log_b.dtype).min / 4)
    if spec.reverse:
        log_a, log_b = log_a.flip(1), log_b.flip(1)
    out = parallel_scan_log(log_a[:, 1:], log_b) + log_a.cumsum(1).exp() * context.h.to(log_b.dtype)
    last = out[:, -1:].clone()
    return out.flip(1) if spec.reverse else out, last


BACKEND = Backend(unsupported=_unsupported, recurrence=_states_in_log_space)
