"""The `"native"` backend: C++ kernels for the CPU (`csrc/`), vectorized over features.

Importing this module registers the operators with PyTorch's dispatcher. They take states in the accumulation dtype.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backend import Backend, Kernel
from ..call import Layout, Spec, Start
from ..layout import LinearScan, is_transposed
from ..shape import States, accumulate_dtype, as_dtype, as_real

# The `group` of csrc/scan.h.
_GROUP = 16
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _load() -> str | None:
    """Register the operators; return None, or the reason why they are missing."""
    folder = Path(__file__).parents[2]
    libraries = [path for path in (folder / "_kernels.so", folder / "_kernels.dll") if path.is_file()]
    if not libraries:
        return "the compiled kernels were not built; reinstall with a C++17 compiler on the PATH"
    try:
        torch.ops.load_library(libraries[0])  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the compiled kernels cannot be loaded ({error}); reinstall for this version of torch"
    return None


def _register_shapes() -> None:
    """Register functions that return the shapes of the outputs, for graphs that are captured without data."""

    def grads_of_start(
        h: Tensor, reset: Tensor | None, dt: Tensor | None, needs_dt: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_h, grad_initial_state = h.new_empty(h.shape), h.new_empty(0 if reset is None else h.shape)
        grads_of_dt = h.new_empty(0)
        if needs_dt and dt is not None:
            num_features = h.shape[2:].numel()
            grads_of_dt = h.new_empty(*dt.shape, (num_features + _GROUP - 1) // _GROUP)
        return grad_h, grad_initial_state, grads_of_dt

    def recurrence_forward(inputs: list[Tensor], h: Tensor, *_: Any) -> States:
        return inputs[0].new_empty(inputs[0].shape), h.new_empty(h.shape)

    def recurrence_backward(inputs: list[Tensor], h: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        _, reset, dt, batch_sizes, *_, needs_dt = rest
        num_leading = 2 if batch_sizes is None else 1
        leading, trailing = inputs[0].shape[:num_leading], inputs[0].shape[num_leading:]
        grads = inputs[0].new_empty(*leading, len(inputs) * trailing.numel())
        return grads, *grads_of_start(h, reset, dt, needs_dt)

    def linear_recurrence_forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        # No captured graph has lengths, which would make the number of rows depend on data.
        num_kept = x.shape[:-1].numel() if rest[-1] else 0
        out = x.new_empty(*x.shape[:-1], h.shape[-1])
        return out, h.new_empty(h.shape), x.new_empty(num_kept, weight.shape[0])

    def linear_recurrence_backward(
        x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        _, reset, dt, *_, needs_dt, needs_x, needs_weight, needs_bias = rest
        grad_x = x.new_empty(0)
        if needs_x:
            grad_x = x.new_empty(x.shape)
            if is_transposed(x):
                grad_x = x.new_empty(x.transpose(0, 1).shape).transpose(0, 1)
        grad_weight = weight.new_empty(weight.shape[0] if needs_weight else 0, weight.shape[1])
        grad_bias = weight.new_empty(1 if needs_bias else 0, weight.shape[0])
        return grad_x, grad_weight, grad_bias, *grads_of_start(h, reset, dt, needs_dt)

    for shapes in (
        recurrence_forward,
        recurrence_backward,
        linear_recurrence_forward,
        linear_recurrence_backward,
    ):
        torch.library.register_fake(f"mingru::{shapes.__name__}", shapes)


_WHY_NOT = _load()
if _WHY_NOT is None:
    _register_shapes()


def _unsupported(sequence: Tensor, spec: Spec) -> str | None:
    if not sequence.is_cpu:
        return f"it only runs on the CPU, and the tensors are on {sequence.device}"
    if sequence.dtype not in (*_DTYPES, torch.complex64, torch.complex128):
        return f"it does not support {sequence.dtype}"
    return None


def _state(h: Tensor, sequence: Tensor) -> Tensor:
    """Return a state (B, 1, *) in the accumulation dtype."""
    return as_dtype(h, accumulate_dtype(sequence.dtype))


def _given(start: Start, layout: Layout, like: Tensor) -> tuple[Tensor | None, ...]:
    """Return the states, resets, elapsed times and batch sizes that all operators take."""
    h, initial_state, reset, dt = start
    h = _state(h, like)
    initial_state = h if reset is None else _state(initial_state.expand_as(h), like)
    return h, initial_state, reset, dt, layout.batch_sizes


def _how(spec: Spec, layout: Layout) -> tuple[str, float, bool, bool]:
    """Return the name of the cell, `min_decay`, `reverse` and `time_first`, that all operators take."""
    cell, activation, reverse, min_decay = spec
    return f"{cell}_{activation}", min_decay, reverse, layout.time_first


def _recurrence(
    spec: Spec, inputs: Sequence[Tensor], start: Start, layout: Layout, keep: bool
) -> tuple[Tensor, Tensor, None]:
    given = _given(start, layout, inputs[0])
    out, last = torch.ops.mingru.recurrence_forward(inputs, *given, *_how(spec, layout))
    return out, as_dtype(last, start.h.dtype), None


def _recurrence_backward(
    spec: Spec, inputs: Sequence[Tensor], start: Start, layout: Layout, saved: Any, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    out, _, grad_out, grad_last = saved
    given, grad_last = _given(start, layout, inputs[0]), _state(grad_last, inputs[0])
    grads, *grads_of_start = torch.ops.mingru.recurrence_backward(
        inputs, *given, out, grad_out, grad_last, *_how(spec, layout), needs[0]
    )
    return _grads_of_start(start, needs[0], *grads_of_start) + _split(grads, inputs)


def _grads_of_start(
    start: Start, needs_dt: bool, grad_h: Tensor, grad_initial_state: Tensor, grads_of_dt: Tensor
) -> tuple[Tensor | None, ...]:
    grad_h = as_dtype(grad_h, start.h.dtype)
    grad_dt = grads_of_dt.sum(-1) if needs_dt else None
    if start.reset is None:
        return grad_h, None, grad_dt
    initial_state = start.initial_state
    return grad_h, as_dtype(grad_initial_state, initial_state.dtype).sum_to_size(initial_state.shape), grad_dt


def _split(grads: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of all inputs, which are concatenated in the last dimension."""
    return tuple(part.view(x.shape) for part, x in zip(grads.chunk(len(inputs), -1), inputs, strict=True))


def _linear_recurrence(
    spec: Spec, tensors: Sequence[Tensor], start: Start, layout: Layout, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    given = _given(start, layout, tensors[0])
    out, last, pre_activations = torch.ops.mingru.linear_recurrence_forward(
        *tensors, *given, layout.lengths, *_how(spec, layout), keep
    )
    return out, as_dtype(last, start.h.dtype), pre_activations


def _linear_recurrence_backward(
    spec: Spec, tensors: Sequence[Tensor], start: Start, layout: Layout, saved: Any, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    x = tensors[0]
    out, pre_activations, grad_out, grad_last = saved
    given, grad_last = _given(start, layout, x), _state(grad_last, x)
    grad_x, grad_weight, grad_bias, *grads_of_start = torch.ops.mingru.linear_recurrence_backward(
        *tensors, *given, layout.lengths, out, pre_activations, grad_out, grad_last, *_how(spec, layout), *needs
    )
    grads = (grad_x, grad_weight, grad_bias.squeeze(0) if needs[3] else None)
    found = (grad if need else None for grad, need in zip(grads, needs[1:], strict=True))
    return *_grads_of_start(start, needs[0], *grads_of_start), *found


def _scan(call: LinearScan) -> States:
    a, b, h, reset, reverse = call
    cell = "linear_scan"
    if a.is_complex():
        a, b, h, cell = as_real(a), as_real(b), as_real(h), "complex_linear_scan"
    out, last = torch.ops.mingru.recurrence_forward([a, b], h, h, reset, None, None, cell, 0.0, reverse, False)
    if cell == "complex_linear_scan":
        return torch.view_as_complex(out), torch.view_as_complex(last)
    return out, last


def _scan_backward(call: LinearScan, out: Tensor, grad_out: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    a, _, h, reset, reverse = call
    is_complex = a.is_complex()
    if is_complex:
        a, h, out, grad_out, grad_last = (as_real(x) for x in (a, h, out, grad_out, grad_last))
    cell = "complex_linear_scan" if is_complex else "linear_scan"
    # The gradients do not depend on b.
    inputs, given = [a, a], (h, h, reset, None, None)
    grads, grad_h, *_ = torch.ops.mingru.recurrence_backward(
        inputs, *given, out, grad_out, grad_last, cell, 0.0, reverse, False, False
    )
    found = *_split(grads, inputs), grad_h
    return tuple(torch.view_as_complex(grad.contiguous()) for grad in found) if is_complex else found


BACKEND = Backend(
    unavailable=lambda: _WHY_NOT,
    unsupported=_unsupported,
    scan=_scan,
    scan_backward=_scan_backward,
    differentiable=False,
    kernel=Kernel(_recurrence, _recurrence_backward, packed=True),
    linear_kernel=Kernel(_linear_recurrence, _linear_recurrence_backward, packed=True, lengths=True, autocast=True),
)
