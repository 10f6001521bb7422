"""The recurrences: one meaning each, several bodies, one choice between them.

Shapes here and below: sequences (B, S, *), states (B, 1, *), `reset` (B, S) bool; B batch, S steps, * any sizes. The
callers, `functional` and `modules`, have checked them.
"""

from torch import Tensor

from . import autograd
from .choice import BODIES, backends, choose, use_backend
from .shape import States

__all__ = ["States", "backends", "linear_scan", "mingru", "use_backend"]


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
