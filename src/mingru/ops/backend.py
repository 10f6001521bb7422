"""The description of a backend: its functions, and what it supports."""

import functools
import warnings
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .call import FIRST_INPUT, Call, Spec, is_plain, spec_of
from .cells import NUM_INPUTS
from .scan import LinearScan
from .shape import States, as_dtype

# The tensors of `call.flattened`, with None for those that are absent, and gradients of some of them.
Given = Sequence[Any]
Gradients = Sequence[Any]


@dataclass(frozen=True)
class Kernel:
    """A forward and a backward function; `autograd.Recurrence` makes them differentiable.

    Backward computes the pre-activations again unless forward keeps them.
    """

    forward: Callable[[Spec, Given, bool, bool | None], tuple[Any, ...]]
    """(spec, tensors, time_first, keep) -> (out, last, kept), and the states if `out` is gated. The tensors are a list
    like that of `call.flattened`. `keep` is None without a backward pass."""
    backward: Any
    """(spec, tensors, time_first, saved, needs) -> gradients of the tensors, or None if forward consists of
    differentiable operations. `saved`: the states, what forward kept, and the gradients of `out` and `last`. `needs`
    says of each tensor whether it needs a gradient."""
    packed: bool
    """If True, the kernel takes packed sequences. If False, it takes the results of `layout.padded_call`."""
    lengths: bool = False
    """Whether the kernel takes the lengths of padded sequences, on the device of x, and skips the padding."""
    whole: bool = False
    """Whether the kernel of a linear map includes a norm of x and an output gate."""
    cells: Container[str] = tuple(NUM_INPUTS)
    """The cells that the kernel computes. Default: all."""
    flags: Iterable[str] = ()
    """The fields of `Spec` that only this kernel computes: others see whether a spec `is_plain`."""

    def computes(self, spec: Spec) -> bool:
        """Return whether the kernel computes all that a spec says. What it does not know, it must not ignore."""
        if spec.cell not in self.cells:
            return False
        return is_plain(spec) or is_plain(spec._replace(**dict.fromkeys(self.flags, False)))  # type: ignore[arg-type]


# The tensors between resets and inputs.
_NOTHING = [None] * (FIRST_INPUT - 3)
# The cells of linear scans, which compute nothing from their pre-activations a and b, for both directions.
_CELLS = "linear_scan", "complex_linear_scan", "quaternion_linear_scan"
SCANS = {(cell, way): spec_of(cell, "linear", way, 0.0) for cell in _CELLS for way in (False, True)}


def scan_by(kernel: Any, call: LinearScan) -> States:
    """Compute the linear scan by a fused kernel, which takes the parts of numbers as features."""
    spec, (a, b, h) = _real(call)
    out, last, _ = kernel.forward(spec, [h, h, call.reset, *_NOTHING, a, b], False, False)
    if call.a.is_complex():
        out, last = (torch.view_as_complex(x.contiguous()) for x in (out, last))
    return out, last


def scan_backward_by(kernel: Any, call: LinearScan, *saved: Tensor) -> tuple[Tensor, ...]:
    """Compute the gradients of a, b and h; `saved`: out, grad_out, grad_last."""
    spec, (a, _, h, out, *grad) = _real(call, *saved)
    # The gradients do not depend on b.
    tensors, needs = [h, h, call.reset, *_NOTHING, a, a], [True, *[False] * (FIRST_INPUT - 1), True, True]
    of_h, *_, of_a, of_b = kernel.backward(spec, tensors, False, (out, None, *grad), needs)
    found = of_a, of_b, of_h
    return tuple(torch.view_as_complex(x.contiguous()) for x in found) if call.a.is_complex() else found


def _real(call: LinearScan, *others: Tensor) -> tuple[Spec, list[Tensor]]:
    """Return the cell of a scan, and a, b, h and other tensors as real numbers."""
    cell, tensors = "linear_scan" if call.parts == 1 else "quaternion_linear_scan", [*call[:3], *others]
    if call.a.is_complex():
        cell, tensors = "complex_linear_scan", [torch.view_as_real(x.resolve_conj()) for x in tensors]
    # Made here, because a graph of any sizes makes a symbol of each number that it finds in a table: see `Spec`.
    return spec_of(cell, "linear", call.reverse, 0.0), tensors


def grads_of_context(tensors: Given, of_states: Gradients, grad_dt: Tensor | None) -> Gradients:
    """Return the gradients of all tensors of a call before the inputs, but those of recurrent weights.

    `of_states`: of h and of the initial state, that for each sequence; empty or None if there is none.
    """
    (grad_h, of_initial), (h, initial, reset, *others) = of_states, tensors[:FIRST_INPUT]
    if reset is None or of_initial is None or of_initial.numel() == 0:
        of_initial = None
    else:
        of_initial = as_dtype(of_initial.sum_to_size(initial.shape), initial.dtype)
    return as_dtype(grad_h, h.dtype), of_initial, None, grad_dt, *[None] * (len(others) - 1)


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(f"mingru: {message}", RuntimeWarning, stacklevel=2)


@dataclass(frozen=True)
class Backend:
    """The functions of a backend. `scan`, `recurrence` or `kernel` is required; all others are optional."""

    unavailable: Callable[[], str | None] = lambda: None
    """Return the reason why the backend cannot run in this process, or None if it can."""
    unsupported: Callable[[Tensor, Spec], str | None] = lambda sequence, spec: None
    """Return the reason why the backend cannot run this spec on this tensor, or None if it can."""
    scan: Callable[[LinearScan], States] | None = None
    """Compute the linear scan, by differentiable operations if there is no `kernel`. Default: by `kernel`."""
    recurrence: Callable[[Call], States] | None = None
    """Compute the recurrence of a `layout.padded_call` by differentiable operations. Default: by `scan`."""
    kernel: Kernel | None = None
    """Fused kernel of the recurrence. Its tensors are the pre-activations."""
    linear_kernel: Kernel | None = None
    """Fused kernel of a linear map and the recurrence. Its tensors are x, weight and bias."""
