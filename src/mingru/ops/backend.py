"""The description of a backend: its functions, what it supports, and how it fails."""

from collections.abc import Callable, Container
from dataclasses import dataclass

from torch import Tensor

from .call import Layout, Spec, Start
from .cells import NUM_INPUTS
from .scan import LinearScan
from .shape import States


@dataclass(frozen=True)
class Kernel:
    """A forward and a backward function; `autograd.Recurrence` makes them differentiable.

    forward(spec, tensors, start, layout, keep) -> (out, last, kept)
    backward(spec, tensors, start, layout, (out, kept, grad_out, grad_last), needs) -> (grad_h, grad_initial_state,
        grad_dt, *grads), where `needs` has an entry for dt and for each tensor: whether it needs a gradient
    """

    forward: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    backward: Callable[..., tuple[Tensor | None, ...]]
    packed: bool
    """If True, the kernel takes packed sequences. If False, it takes the results of `layout.padded_call`."""
    lengths: bool = False
    """Whether the kernel of a linear map takes the lengths of padded sequences, on the CPU, and skips the padding."""
    autocast: bool = False
    """Whether autocast may use the kernel of a linear map, whose tensors are then cast before the call."""
    cells: Container[str] = tuple(NUM_INPUTS)
    """The cells that the kernel computes. Default: all."""


class KernelFailure(RuntimeError):  # noqa: N818 (a sentence for users says what failed)
    """A kernel cannot be compiled or launched on this machine."""


@dataclass(frozen=True)
class Backend:
    """The functions of a backend. `scan` or `recurrence` is required; all others are optional."""

    unavailable: Callable[[], str | None] = lambda: None
    """Return the reason why the backend cannot run in this process, or None if it can."""
    unsupported: Callable[[Tensor, Spec], str | None] = lambda sequence, spec: None
    """Return the reason why the backend cannot run this spec on this tensor, or None if it can."""
    scan: Callable[[LinearScan], States] | None = None
    """Compute the linear scan."""
    scan_backward: Callable[..., tuple[Tensor | None, ...]] | None = None
    """Compute its gradients, (call, out, grad_out, grad_last) -> (grad_a, grad_b, grad_h). Default: another scan."""
    differentiable: bool = True
    """Whether `scan` consists of differentiable operations."""
    recurrence: Callable[[Spec, list[Tensor], Start, Layout], States] | None = None
    """Compute the recurrence of a `layout.padded_call` by differentiable operations. Default: by `scan`."""
    kernel: Kernel | None = None
    """Fused kernel of the recurrence. Its tensors are the pre-activations."""
    linear_kernel: Kernel | None = None
    """Fused kernel of a linear map and the recurrence. Its tensors are x, weight and bias."""
