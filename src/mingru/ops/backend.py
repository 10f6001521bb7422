"""The description of a backend: its functions, what it supports, and how it fails."""

import functools
import warnings
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .call import BATCH_FIRST, FIRST_INPUT, Call, Spec, Start, flattened, from_flat, spec_of
from .cells import NUM_INPUTS
from .scan import LinearScan
from .shape import States, as_dtype

# Of the fields of a `Start`, and of the tensors of a call.
Grads = tuple[Sequence[Tensor | None], Sequence[Tensor | None]]


class Saved(NamedTuple):
    """What a backward pass has: results of the forward pass, and their gradients."""

    states: Tensor
    kept: Tensor | None
    grad_out: Tensor
    grad_last: Tensor


class Needs(NamedTuple):
    """Which gradients are needed."""

    start: Any
    """A `Start` of bools."""
    tensors: Sequence[bool]


@dataclass(frozen=True)
class Kernel:
    """A forward and a backward function; `autograd.Recurrence` makes them differentiable.

    Backward computes the pre-activations again unless forward keeps them.
    """

    forward: Callable[[Spec, Sequence[Any], bool, bool | None], tuple[Any, ...]]
    """(spec, tensors, time_first, keep) -> (out, last, kept), and the states if `out` is gated. The tensors are a list
    like that of `call.flattened`. `keep` is None without a backward pass."""
    backward: Any
    """(spec, tensors, time_first, saved, needs) -> gradients of the tensors, or None if forward consists of
    differentiable operations. `needs` says of each tensor whether it needs a gradient."""
    packed: bool
    """If True, the kernel takes packed sequences. If False, it takes the results of `layout.padded_call`."""
    lengths: bool = False
    """Whether the kernel takes the lengths of padded sequences, on the device of x, and skips the padding."""
    autocast: bool = False
    """Whether autocast may use the kernel of a linear map, whose tensors are then cast before the call."""
    whole: bool = False
    """Whether the kernel of a linear map includes a norm of x and an output gate."""
    cells: Container[str] = tuple(NUM_INPUTS)
    """The cells that the kernel computes. Default: all."""


def of_calls(forward: Any, backward: Any, **options: Any) -> Kernel:
    """Return a kernel of functions that take a call: (call, keep) and (call, saved, `Needs`) -> `Grads`."""

    def run(spec: Spec, tensors: Sequence[Any], time_first: bool, keep: bool | None) -> tuple[Any, ...]:
        found: tuple[Any, ...] = forward(from_flat(spec, tensors, time_first), keep)
        return found

    def run_backward(spec: Spec, tensors: Sequence[Any], time_first: bool, saved: Saved, needs: Any) -> Any:
        need: Any = from_flat(spec, needs, time_first)
        call = from_flat(spec, tensors, time_first)
        of_start, of_inputs = backward(call, saved, Needs(need.start, need.tensors))
        return *of_start, *[None] * (FIRST_INPUT - len(of_start)), *of_inputs

    return Kernel(run, None if backward is None else run_backward, **options)


def scan_by(kernel: Kernel, call: LinearScan) -> States:
    """Compute the linear scan by a fused kernel, which takes the parts of numbers as features."""
    spec, (a, b, h) = _real(call)
    out, last, _ = kernel.forward(spec, [*flattened(Start(h, h, call.reset), BATCH_FIRST), a, b], False, False)
    return _like(call, out), _like(call, last)


def scan_backward_by(kernel: Kernel, call: LinearScan, *saved: Tensor) -> tuple[Tensor, ...]:
    """Compute the gradients of a, b and h; `saved`: out, grad_out, grad_last."""
    spec, (a, _, h, out, *grad) = _real(call, *saved)
    # The gradients do not depend on b.
    tensors = [*flattened(Start(h, h, call.reset), BATCH_FIRST), a, a]
    needs = [True, *[False] * (FIRST_INPUT - 1), True, True]
    of_h, *_, of_a, of_b = kernel.backward(spec, tensors, False, Saved(out, None, *grad), needs)
    return _like(call, of_a), _like(call, of_b), _like(call, of_h)


def _real(call: LinearScan, *others: Tensor) -> tuple[Spec, list[Tensor]]:
    """Return the cell of a scan, and a, b, h and other tensors as real numbers."""
    cell, tensors = "linear_scan" if call.parts == 1 else "quaternion_linear_scan", [*call[:3], *others]
    if call.a.is_complex():
        cell, tensors = "complex_linear_scan", [torch.view_as_real(x.resolve_conj()) for x in tensors]
    return spec_of(cell, "linear", call.reverse, 0.0), tensors


def _like(call: LinearScan, x: Tensor) -> Tensor:
    return torch.view_as_complex(x.contiguous()) if call.a.is_complex() else x


def grads_of_start(tensors: Sequence[Any], of_states: Sequence[Any], grad_dt: Tensor | None) -> Sequence[Any]:
    """Return the gradients of h, the initial state, resets and elapsed times, with which a call begins.

    `of_states`: of h and of the initial state, that for each sequence; empty or None if there is none.
    """
    (grad_h, of_initial_state), (h, initial_state, reset, *_) = of_states, tensors
    if reset is None or of_initial_state is None or of_initial_state.numel() == 0:
        of_initial_state = None
    else:
        of_initial_state = as_dtype(of_initial_state.sum_to_size(initial_state.shape), initial_state.dtype)
    return as_dtype(grad_h, h.dtype), of_initial_state, None, grad_dt


def on_one_device(shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that returns the shapes of an operator's outputs, to refuse tensors on several devices.

    PyTorch calls this function in place of the operator if any tensor is on "meta". If others are not, it would return
    memory that nobody wrote. Integers, which are sizes, may be on the CPU.
    """

    @functools.wraps(shapes)
    def run(*args: Any) -> Any:
        lists = (arg if isinstance(arg, (list, tuple)) else [arg] for arg in args)
        tensors = [x for each in lists for x in each if isinstance(x, Tensor)]
        found = {str(x.device) for x in tensors if x.dtype != torch.int64 or x.device.type != "cpu"}
        if len(found) > 1:
            got = ", ".join(sorted(found))
            raise ValueError(f"mingru::{shapes.__name__}: tensors must be on one device, got {got}")
        return shapes(*args)

    return run


class KernelFailure(RuntimeError):  # noqa: N818 (a sentence for users says what failed)
    """A kernel cannot be compiled or launched on this machine."""


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(f"mingru: {message}", RuntimeWarning, stacklevel=2)


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
    recurrence: Callable[[Call], States] | None = None
    """Compute the recurrence of a `layout.padded_call` by differentiable operations. Default: by `scan`."""
    kernel: Kernel | None = None
    """Fused kernel of the recurrence. Its tensors are the pre-activations."""
    linear_kernel: Kernel | None = None
    """Fused kernel of a linear map and the recurrence. Its tensors are x, weight and bias."""
