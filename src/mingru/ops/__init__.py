"""The recurrences: one meaning each, several bodies, one choice between them.

Shapes here and below: sequences (B, S, *), states (B, 1, *), `reset` (B, S) bool; B batch, S steps, * any sizes. The
callers, `functional` and `modules`, have checked them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import autograd, portable
from .cell import NUM_INPUTS, Kind
from .choice import BODIES, backends, body, choose, use_backend
from .shape import States, empty_states
from .tracing import for_trace, is_tracing

__all__ = [
    "NUM_INPUTS",
    "States",
    "are_plain",
    "backends",
    "linear_recurrence",
    "linear_scan",
    "recurrence",
    "use_backend",
]


def linear_scan(
    a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None = None, reverse: bool = False, backend: str = "auto"
) -> States:
    """h_t = a_t h_{t-1} + b_t, from the last step to the first if `reverse`; a reset puts h_{t-1} to 0."""
    if is_tracing():
        return for_trace(portable.linear_scan)(a, b, h, reset, reverse)
    name = choose("linear_scan", backend, b, None)
    if b.numel() == 0:
        return empty_states(a * b, h)
    if body(name).DIFFERENTIABLE:
        return body(name).linear_scan(a, b, h, reset, reverse)
    return autograd.linear_scan(name, a, b, h, reset, reverse)


def recurrence(
    cell: str,
    inputs: Sequence[Tensor],
    h: Tensor,
    initial: Tensor,
    reset: Tensor | None = None,
    activation: str = "positive",
    reverse: bool = False,
    batch_sizes: Tensor | None = None,
    backend: str = "auto",
) -> States:
    """The recurrence of a cell from its pre-activations; a reset puts h_{t-1} to `initial`.

    mingru, of gate and candidate:            h_t = (1 - z_t) h_{t-1} + z_t activate(value_t), z = sigma(gate)
    minlstm, of forget, input and candidate:  h_t = f_t h_{t-1} + i_t activate(value_t), the gates normalised

    With `batch_sizes`, sequences and `reset` are packed: (1, rows, *), see `packed`.
    """
    first = inputs[0]
    if is_tracing():
        inputs, initial = list(inputs), initial.expand_as(h)
        return for_trace(portable.recurrence)(cell, inputs, h, initial, reset, activation, reverse, batch_sizes)
    name = choose(cell, backend, first, activation)
    if first.numel() == 0:
        return empty_states(sum(inputs[1:], first), h)
    initial = initial.expand_as(h)
    kind = Kind(cell, activation, reverse)
    has_kernel = hasattr(BODIES[name], "recurrence") and (cell != "mingru" or batch_sizes is not None)
    run = autograd.recurrence if has_kernel and are_plain(*inputs) else autograd.composed
    return run(name, inputs, h, initial, reset, batch_sizes, kind)


def linear_recurrence(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    initial: Tensor,
    reset: Tensor | None = None,
    activation: str = "positive",
    reverse: bool = False,
    batch_sizes: Tensor | None = None,
    recompute: bool | None = None,
) -> States | None:
    """`recurrence` of the pre-activations x W^T + b in one go; None where no body can do that here.

    Backward computes them once more if `recompute`, or keeps them; by default it does what is quicker.
    """
    name = choose(cell, "auto", x, activation)
    # Half-width products are rounded with their bias, as `Linear` does it.
    fits = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    if not (fits and hasattr(BODIES[name], "linear_recurrence") and are_plain(x, weight) and x.numel() > 0):
        return None
    kind = Kind(cell, activation, reverse)
    # Without resets it is not asked for; but dynamo refuses one tensor in two places, and gets a view.
    initial = h if reset is None and not torch.compiler.is_compiling() else initial.expand_as(h)
    return autograd.linear_recurrence(name, x, weight, bias, h, initial, reset, batch_sizes, kind, recompute)


def are_plain(*tensors: Tensor) -> bool:
    """Whether nothing stands between these tensors and a kernel: no trace, no transform, no tensor type of its own.

    What stands there knows the operations apart, and has rules for each.
    """
    return (
        not is_tracing()
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )
