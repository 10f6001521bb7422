"""The recurrences: one meaning each, several bodies, one choice between them.

Shapes here and below: sequences (B, S, *), states (B, 1, *), `reset` (B, S) bool; B batch, S steps, * any sizes. The
callers, `functional` and `modules`, have checked them.
"""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import autograd
from .choice import BODIES, backends, choose, use_backend
from .shape import States

__all__ = ["States", "backends", "linear_mingru", "linear_scan", "mingru", "use_backend"]


def linear_scan(
    a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None = None, reverse: bool = False, backend: str = "auto"
) -> States:
    """h_t = a_t h_{t-1} + b_t, from the last step to the first if `reverse`; a reset puts h_{t-1} to 0."""
    name = choose(backend, b, None)
    if b.numel() == 0:
        return a * b, h.clone()
    if BODIES[name].DIFFERENTIABLE:
        return BODIES[name].linear_scan(a, b, h, reset, reverse)
    return autograd.linear_scan(name, a, b, h, reset, reverse)


def mingru(
    gate: Tensor,
    candidate: Tensor,
    h: Tensor,
    initial: Tensor,
    reset: Tensor | None = None,
    activation: str = "positive",
    reverse: bool = False,
    backend: str = "auto",
) -> States:
    """h_t = (1 - z_t) h_{t-1} + z_t activate(value_t), z = sigma(gate); a reset puts h_{t-1} to `initial`."""
    name = choose(backend, gate, activation)
    if gate.numel() == 0:
        return gate * candidate, h.clone()
    initial = initial.expand_as(h)
    if BODIES[name].DIFFERENTIABLE:
        return BODIES[name].mingru(gate, candidate, h, initial, reset, activation, reverse)
    return autograd.mingru(name, gate, candidate, h, initial, reset, activation, reverse)


def linear_mingru(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    initial: Tensor,
    reset: Tensor | None = None,
    activation: str = "positive",
    reverse: bool = False,
) -> States | None:
    """`mingru` of the pre-activations x W^T + b, gate rows first, in one go; None where no body can do that here."""
    name = choose("auto", x, activation)
    if not hasattr(BODIES[name], "mingru_linear") or x.numel() == 0 or not _plain(x, weight):
        return None
    return autograd.linear_mingru(name, x, weight, bias, h, initial.expand_as(h), reset, activation, reverse)


def _plain(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing stands between these tensors and a kernel: no capture, no transform, no tensor type of its own.

    What stands there knows the linear map and the recurrence apart, and has rules for each.
    """
    return (
        type(x) is Tensor
        and type(weight) in (nn.Parameter, Tensor)
        and x.dtype == weight.dtype
        # Half-width products are rounded with their bias, as `Linear` does it.
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )
