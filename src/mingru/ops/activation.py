"""Activations of the candidate.

=============  =========================================
activation     value
=============  =========================================
``positive``   g(v) = v + 0.5 for v >= 0, sigma(v) below
``linear``     v
``tanh``       tanh(v)
=============  =========================================

Everything here is scriptable and twice differentiable.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .modes import is_old_onnx

ACTIVATIONS = ("positive", "linear", "tanh")


def g(v: Tensor) -> Tensor:
    below = (-F.relu(-v)).sigmoid()
    if is_old_onnx():
        return F.relu(v) + below  # It cannot translate `threshold`.
    # Not `torch.where`, which takes 3 ms for a million elements on the CPU; a sigmoid takes 0.3 ms (torch 2.13). Not
    # `clamp_min(0.0)`, whose gradient at 0 is 1 or, in torch 2.15, 0. Above a bound below 0, which must not round to 0,
    # that of `threshold` is 1. That of relu at 0 is 0.
    bound = -5e-8 if v.dtype == torch.float16 else -1e-37
    return F.threshold(v, bound, 0.0) + below


def log_g(v: Tensor) -> Tensor:
    is_right = v >= 0
    return torch.where(is_right, (torch.where(is_right, v, 0.0) + 0.5).log(), F.logsigmoid(v))


def activate(v: Tensor, activation: str) -> Tensor:
    if activation == "positive":
        return g(v)
    if activation == "tanh":
        return v.tanh()
    return v
