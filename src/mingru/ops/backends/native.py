"""The `"native"` backend: C++ kernels for the CPU (`csrc/`), one pass over memory, vectorized over features.

The operators take sequences as the layout says and states in the accumulation dtype. They are registered with PyTorch's
dispatcher when this module is imported.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backend import Backend, Kernel
from ..call import Layout, Spec, Start
from ..layout import LinearScan
from ..shape import States, accumulate_dtype

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _load() -> str | None:
    """Register the operators; return the sentence that says why they are missing, or None."""
    folder = Path(__file__).parents[2]
    libraries = [path for path in (folder / "_kernels.so", folder / "_kernels.dll") if path.is_file()]
    if not libraries:
        return "the compiled kernels were not built; reinstall where a C++17 compiler is on the PATH"
    try:
        torch.ops.load_library(libraries[0])  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the compiled kernels can't be loaded ({error}); reinstall for this version of torch"
    return None


def _register_shapes() -> None:
    """Register the shapes of the outputs, for graphs that are captured without data."""

    def recurrence_forward(inputs: list[Tensor], h: Tensor, *_: Any) -> States:
        return inputs[0].new_empty(inputs[0].shape), torch.empty_like(h)

    def recurrence_backward(inputs: list[Tensor], h: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        num_leading = 2 if rest[2] is None else 1
        leading, trailing = inputs[0].shape[:num_leading], inputs[0].shape[num_leading:]
        grads = inputs[0].new_empty(*leading, len(inputs) * trailing.numel())
        return grads, torch.empty_like(h), torch.empty_like(h)

    def linear_recurrence_forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        num_rows = x.shape[:-1].numel() if rest[-1] else 0
        out = x.new_empty(*x.shape[:-1], h.shape[-1])
        return out, torch.empty_like(h), x.new_empty(num_rows, weight.shape[0])

    def linear_recurrence_backward(
        x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        *_, needs_x, needs_weight, needs_bias = rest
        grad_x = x.new_empty(0)
        if needs_x:
            is_swapped = x.dim() == 3 and not x.is_contiguous() and x.stride(0) < x.stride(1)
            grad_x = x.new_empty(x.transpose(0, 1).shape).transpose(0, 1) if is_swapped else x.new_empty(x.shape)
        grad_weight = weight.new_empty(weight.shape[0] if needs_weight else 0, weight.shape[1])
        grad_bias = weight.new_empty(1 if needs_bias else 0, weight.shape[0])
        return grad_x, grad_weight, grad_bias, torch.empty_like(h), torch.empty_like(h)

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
    if sequence.device.type != "cpu":
        return f"it runs on the CPU, and the tensors are on {sequence.device}"
    if sequence.dtype not in _DTYPES:
        return f"it computes real floating types, and the tensors are {sequence.dtype}"
    return None


def _state(h: Tensor, sequence: Tensor) -> Tensor:
    """Return a state (B, 1, *) as the kernels take it: contiguous, in the accumulation dtype."""
    dtype = accumulate_dtype(sequence.dtype)
    return (h if h.dtype == dtype else h.to(dtype)).contiguous()


def _given(spec: Spec, start: Start, layout: Layout, like: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return what all operators take: before the tensors of backward, and behind them."""
    h = _state(start.h, like)
    # Without resets the initial state is not used, and need not be made contiguous.
    initial_state = h if start.reset is None else _state(start.initial_state.expand_as(start.h), like)
    cell = f"{spec.cell}_{spec.activation}"
    return (h, initial_state, start.reset, layout.batch_sizes), (cell, spec.reverse, layout.time_first)


def _recurrence(
    spec: Spec, inputs: Sequence[Tensor], start: Start, layout: Layout, keep: bool
) -> tuple[Tensor, Tensor, None]:
    before, behind = _given(spec, start, layout, inputs[0])
    out, last = torch.ops.mingru.recurrence_forward(inputs, *before, *behind)
    return out, last.to(start.h.dtype), None


def _recurrence_backward(
    spec: Spec, inputs: Sequence[Tensor], start: Start, layout: Layout, saved: Any, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    out, _, grad_out, grad_last = saved
    before, behind = _given(spec, start, layout, inputs[0])
    grads, grad_h, grad_initial_state = torch.ops.mingru.recurrence_backward(
        inputs, *before, out, grad_out, _state(grad_last, inputs[0]), *behind
    )
    return _grads_of_states(start, grad_h, grad_initial_state) + _split(grads, inputs)


def _grads_of_states(start: Start, grad_h: Tensor, grad_initial_state: Tensor) -> tuple[Tensor | None, ...]:
    initial_state = start.initial_state
    grad = grad_initial_state.to(initial_state.dtype).sum_to_size(initial_state.shape)
    return grad_h.to(start.h.dtype), grad


def _split(grads: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of all inputs, which lie side by side in the last dimension."""
    return tuple(part.view(x.shape) for part, x in zip(grads.chunk(len(inputs), -1), inputs, strict=True))


def _linear_recurrence(
    spec: Spec, tensors: Sequence[Tensor], start: Start, layout: Layout, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = tensors
    before, behind = _given(spec, start, layout, x)
    bias = None if bias is None else bias.contiguous()
    out, last, product = torch.ops.mingru.linear_recurrence_forward(
        x, weight.contiguous(), bias, *before, *behind, keep
    )
    return out, last.to(start.h.dtype), product


def _linear_recurrence_backward(
    spec: Spec, tensors: Sequence[Tensor], start: Start, layout: Layout, saved: Any, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    x, weight, bias = tensors
    out, product, grad_out, grad_last = saved
    before, behind = _given(spec, start, layout, x)
    bias = None if bias is None else bias.contiguous()
    *grads, grad_h, grad_initial_state = torch.ops.mingru.linear_recurrence_backward(
        *(x, weight.contiguous(), bias, *before), *(out, product, grad_out, _state(grad_last, x)), *behind, *needs
    )
    grad_x, grad_weight, grad_bias = (found if need else None for found, need in zip(grads, needs, strict=True))
    grad_bias = None if grad_bias is None else grad_bias.squeeze(0)
    return (*_grads_of_states(start, grad_h, grad_initial_state), grad_x, grad_weight, grad_bias)


def _as_recurrence(call: LinearScan, like: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    h = _state(call.h, like)
    return (h, h, call.reset, None), ("linear_scan", call.reverse, False)


def _scan(call: LinearScan) -> States:
    before, behind = _as_recurrence(call, call.b)
    out, last = torch.ops.mingru.recurrence_forward([call.a, call.b], *before, *behind)
    return out, last


def _scan_backward(call: LinearScan, out: Tensor, grad_out: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    before, behind = _as_recurrence(call, call.a)
    # The gradients do not depend on b.
    inputs = [call.a, call.a]
    grads, grad_h, _ = torch.ops.mingru.recurrence_backward(
        inputs, *before, out, grad_out, _state(grad_last, call.a), *behind
    )
    return *_split(grads, inputs), grad_h


BACKEND = Backend(
    unavailable=lambda: _WHY_NOT,
    unsupported=_unsupported,
    scan=_scan,
    scan_backward=_scan_backward,
    differentiable=False,
    kernel=Kernel(_recurrence, _recurrence_backward, packed=True),
    linear_kernel=Kernel(_linear_recurrence, _linear_recurrence_backward, packed=True),
)
