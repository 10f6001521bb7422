"""What a backend is: what it can do, stated as data."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .call import Layout, Spec, Start
from .layout import LinearScan
from .shape import States


@dataclass(frozen=True)
class Kernel:
    """A pair of functions that compute values only; `autograd.Recurrence` makes them differentiable.

    forward(spec, tensors, start, layout, keep) -> (out, last, kept)
    backward(spec, tensors, start, layout, (out, kept, grad_out, grad_last), needs) -> (grad_h, grad_initial_state,
        *grads of the tensors); `needs` says which of the tensors need one
    """

    forward: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    backward: Callable[..., tuple[Tensor | None, ...]]
    packed: bool
    """Whether it takes packed sequences; if not, it takes them padded, with `Layout.padding`."""


@dataclass(frozen=True)
class Backend:
    """What a backend can do. Each must have `scan` or `recurrence`."""

    unavailable: Callable[[], str | None] = lambda: None
    """Why it cannot run in this process; None if it can."""
    unsupported: Callable[[Tensor, Spec], str | None] = lambda sequence, spec: None
    """Why it cannot run this spec on this tensor; None if it can."""
    scan: Callable[[LinearScan], States] | None = None
    """The linear scan."""
    scan_backward: Callable[..., tuple[Tensor | None, ...]] | None = None
    """Its gradients, (call, out, grad_out, grad_last) -> (grad_a, grad_b, grad_h); None: by one more scan."""
    differentiable: bool = True
    """Whether `scan` is made of differentiable operations."""
    recurrence: Callable[[Spec, list[Tensor], Start, Layout], States] | None = None
    """A differentiable recurrence of its own, on calls in the form of `layout.padded_call`; None: by `scan`."""
    kernel: Kernel | None = None
    """A fused kernel for the recurrence; the tensors are the pre-activations."""
    linear_kernel: Kernel | None = None
    """A fused kernel for a linear map and the recurrence; the tensors are x, weight and bias."""
