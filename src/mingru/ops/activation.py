"""The candidate's activation, in every form that a body needs.

=============  =========================================  ==========================
activation     value                                      derivative
=============  =========================================  ==========================
``positive``   g(v) = v + 0.5 for v >= 0, sigma(v) below  1, sigma(v) sigma(-v) below
``linear``     v                                          1
``tanh``       tanh(v)                                    4 sigma(2v) sigma(-2v)
=============  =========================================  ==========================

``torch.where`` is not vectorised on the CPU (3 ms for a million elements where a sigmoid takes 0.3, torch 2.13), so the
two halves of g are joined by arithmetic. All but the `_into` forms script and differentiate, twice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("positive", "linear", "tanh")


def zero_state(activation: str) -> float:
    """The state that stands for 'nothing seen yet': g(0) = 0.5, and 0 where the candidate may be negative."""
    return 0.5 if activation == "positive" else 0.0


def _left(v: Tensor) -> Tensor:
    # v below 0, held at 0 from there on, with a gradient of 0 at 0 itself. So neither clamp_max nor hardtanh, whose
    # gradient at its own bound is 0 in torch and 1 in TorchScript.
    return -F.relu(-v)


def g(v: Tensor) -> Tensor:
    # Right of 0 the sigmoid adds 0.5 exactly and has no gradient; at 0 itself clamp_min's gradient is 1, so g'(0) = 1.
    return v.clamp_min(0.0) + _left(v).sigmoid()


def log_g(v: Tensor) -> Tensor:
    # clamp_min, not relu: the latter's gradient at 0 is 0.
    return torch.where(v >= 0, (v.clamp_min(0.0) + 0.5).log(), F.logsigmoid(v))


def activate(v: Tensor, activation: str) -> Tensor:
    if activation == "positive":
        return g(v)
    if activation == "tanh":
        return v.tanh()
    return v


def activate_into(v: Tensor, activation: str, out: Tensor, scratch: Tensor) -> Tensor:
    """`activate`, quicker, without a gradient, in memory that is there already."""
    if activation == "positive":
        # g is the larger of its two halves everywhere, since sigma(v) - 0.5 lies between 0 and v.
        torch.sigmoid(v, out=out)
        torch.add(v, 0.5, out=scratch)
        return torch.maximum(out, scratch, out=out)
    if activation == "tanh":
        return torch.tanh(v, out=out)
    return out.copy_(v)


def derivative_into(v: Tensor, activation: str, out: Tensor) -> Tensor:
    """`derivative`, likewise."""
    if activation == "positive":
        torch.clamp_max(v, 0.0, out=out).sigmoid_()
        return out.addcmul_(out, out, value=-1.0).add_(v >= 0, alpha=0.75)
    if activation == "tanh":
        torch.abs(v, out=out).mul_(-2.0).sigmoid_()
        return out.addcmul_(out, out, value=-1.0).mul_(4.0)
    return out.fill_(1.0)


def derivative(v: Tensor, activation: str) -> Tensor:
    if activation == "positive":
        s = _left(v).sigmoid()
        return s * (1.0 - s) + 0.75 * (v >= 0).to(v.dtype)
    if activation == "tanh":
        # 1 - tanh(v)^2 would cancel.
        return 4.0 * (2.0 * v).sigmoid() * (-2.0 * v).sigmoid()
    return torch.ones_like(v)
