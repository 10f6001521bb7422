"""The `"triton"` backend: kernels for GPUs, compiled by Triton on first use.

`launch` calls the kernel in `kernels`, divided as `plan` says. Importing this module registers two operators with
PyTorch's dispatcher, but does not import Triton. Captured graphs contain the operators; eager calls skip the
dispatcher. States have any floating dtype, and are computed in the accumulation dtype of the sequences. The operators
take complex numbers as pairs of features.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backend import Backend, Grads, Kernel, scan_backward_by, scan_by
from ...call import Layout, Spec, Start, flattened, from_flat
from ...cells import NUM_INPUTS
from ...graph import are_eager, is_autocast
from ...layout import is_transposed
from ...shape import States, accumulate_dtype, as_dtype
from . import launch
from .device import DEVICES, IS_INTERPRETED, unavailable, unsupported
from .launch import Tensors
from .plan import KEEPING

__all__ = ["BACKEND", "DEVICES"]


def _register() -> torch.library.Library:
    """Register the operators, and functions that return the shapes of their outputs."""
    library = torch.library.Library("mingru", "FRAGMENT")  # type: ignore[no-untyped-call]
    define: Any = library.define
    implement: Any = library.impl
    tags = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
    given, how = "Tensor[] inputs, Tensor?[] given", "str[] cell, float min_decay, bool[] flags"
    define(f"recurrence_triton_forward({given}, {how}) -> (Tensor, Tensor)", tags=tags)
    define(
        f"recurrence_triton_backward({given}, Tensor[] saved, {how}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        tags=tags,
    )
    for key in ("CUDA", "XPU", *(("CPU",) if IS_INTERPRETED else ())):
        implement("recurrence_triton_forward", launch.forward, key)
        implement("recurrence_triton_backward", launch.backward, key)

    def forward(inputs: list[Tensor], given: list[Any], *_: Any) -> States:
        return inputs[0].new_empty(inputs[0].shape), given[0].new_empty(given[0].shape)

    def backward(inputs: list[Tensor], given: list[Any], *rest: Any) -> tuple[Tensor, ...]:
        start, layout, _ = from_flat(given)
        h, initial_state, dt = start.h, start.initial_state, start.dt
        needs_dt, needs_bias = rest[-1][2:]
        first, num_leading = inputs[0], 2 if layout.batch_sizes is None else 1
        num_features, dtype = first.shape[num_leading:].numel(), accumulate_dtype(first.dtype)
        return (
            launch.grads_like(inputs, num_leading),
            h.new_empty(h.shape),
            first.new_empty(0 if initial_state is None else (h.shape[0], num_features), dtype=dtype),
            first.new_empty(0 if dt is None or not needs_dt else dt.shape, dtype=dtype),
            first.new_empty(len(inputs) * num_features if needs_bias else 0, dtype=dtype),
        )

    torch.library.register_fake("mingru::recurrence_triton_forward", forward, lib=library)
    torch.library.register_fake("mingru::recurrence_triton_backward", backward, lib=library)
    return library


_LIBRARY = _register()


def _run(name: str, spec: Spec, tensors: tuple[Sequence[Any], ...], *flags: bool) -> tuple[Tensor, ...]:
    """Call the operator of a pass. `tensors`: inputs, given, and for "backward" out, grad_out and grad_last."""
    # A call may skip the dispatcher if nothing else could take it.
    is_direct = are_eager(*tensors[0]) and not torch._C._len_torch_dispatch_stack()
    run: Any = getattr(launch, name) if is_direct else getattr(torch.ops.mingru, f"recurrence_triton_{name}")
    return tuple(run(*tensors, [spec.cell, spec.activation], spec.min_decay, [spec.reverse, *flags]))


def _given(spec: Spec, start: Start, layout: Layout) -> list[Tensor | None]:
    """Return all tensors but the inputs, as both operators take them."""
    # A linear scan starts from 0 after a reset.
    has_initial_state = start.reset is not None and spec.cell in NUM_INPUTS
    initial_state: Any = start.initial_state.expand_as(start.h) if has_initial_state else None
    return flattened(start._replace(initial_state=initial_state), layout)


def _recurrence(spec: Spec, inputs: Tensors, start: Start, layout: Layout, keep: bool) -> tuple[Tensor, Tensor, None]:
    out, last = _run("forward", spec, (inputs, _given(spec, start, layout)), layout.time_first)
    return out, last, None


def _recurrence_backward(spec: Spec, inputs: Tensors, start: Start, layout: Layout, saved: Any, needs: Any) -> Grads:
    out, _, *grad = saved
    tensors = inputs, _given(spec, start, layout), [out, *grad]
    needs_dt = needs[0].dt
    grads, *grads_of_start, _ = _run("backward", spec, tensors, layout.time_first, needs_dt, False)
    return _grads_of_start(start, needs_dt, *grads_of_start), _split(grads, inputs)


def _grads_of_start(
    start: Start, needs_dt: bool, grad_h: Tensor, grad_initial_state: Tensor, grad_dt: Tensor
) -> Sequence[Tensor | None]:
    of_initial_state: Any = None
    if grad_initial_state.numel() > 0:
        of_initial_state = grad_initial_state.view(start.h.shape).sum_to_size(start.initial_state.shape)
        of_initial_state = as_dtype(of_initial_state, start.initial_state.dtype)
    return Start(grad_h, of_initial_state, None, grad_dt if needs_dt else None)


def _split(grads: Tensor, inputs: Tensors) -> tuple[Tensor, ...]:
    """Return the gradients of all inputs, which are side by side in the last dimension."""
    return tuple(part.view(x.shape) for part, x in zip(grads.chunk(len(inputs), -1), inputs, strict=True))


def _in_memory_order(x: Tensor) -> Tensor:
    """Return a sequence with its first two dimensions in the order of memory; a second call restores the order."""
    return x.transpose(0, 1) if is_transposed(x) else x


def _pre_activations(spec: Spec, tensors: Sequence[Any], kept: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Return the pre-activations in the order of memory, and as inputs. `kept`: a matrix with a row for each step."""
    x = _in_memory_order(tensors[0])
    pre = F.linear(x, *tensors[1:]) if kept is None else kept.view(*x.shape[:-1], kept.shape[-1])
    inputs = pre if x is tensors[0] else pre.transpose(0, 1)
    return pre, list(inputs.chunk(NUM_INPUTS[spec.cell], -1))


def _linear_recurrence(
    spec: Spec, tensors: Sequence[Any], start: Start, layout: Layout, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    pre, inputs = _pre_activations(spec, tensors, None)
    out, last, _ = _recurrence(spec, inputs, start, layout, keep)
    return out, last, pre.flatten(0, -2) if keep else None


def _linear_recurrence_backward(
    spec: Spec, tensors: Sequence[Any], start: Start, layout: Layout, saved: Any, needs: Any
) -> Grads:
    x, weight, bias = tensors
    needs_dt, (needs_x, needs_weight, needs_bias) = needs[0].dt, needs[1]
    out, kept, *grad = saved
    # The tensors are in the dtype in which autocast computes.
    with torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext():
        _, inputs = _pre_activations(spec, tensors, kept if kept is not None and kept.numel() else None)
        of_call = inputs, _given(spec, start, layout), [out, *grad]
        grads, *grads_of_start, grad_bias = _run("backward", spec, of_call, layout.time_first, needs_dt, needs_bias)
        x = _in_memory_order(x)
        # One matrix of the gradients of all inputs, for both products.
        matrix = (grads.transpose(0, 1) if is_transposed(inputs[0]) else grads).flatten(0, -2)
        grad_x = grad_weight = None
        if needs_x:
            grad_x = (matrix @ weight).view(x.shape)
            grad_x = grad_x if x is tensors[0] else grad_x.transpose(0, 1)
        if needs_weight:
            grad_weight = matrix.t() @ x.flatten(0, -2)
    found = (grad_x, grad_weight, as_dtype(grad_bias, bias.dtype) if needs_bias else None)
    return _grads_of_start(start, needs_dt, *grads_of_start), found


def _unsupported(sequence: Tensor, spec: Spec) -> str | None:
    return unsupported(sequence, spec) or launch.failure(sequence, spec.cell)


_KERNEL = Kernel(_recurrence, _recurrence_backward, packed=True, lengths=True, cells=KEEPING)
BACKEND = Backend(
    unavailable=unavailable,
    unsupported=_unsupported,
    scan=partial(scan_by, _KERNEL),
    scan_backward=partial(scan_backward_by, _KERNEL),
    differentiable=False,
    kernel=_KERNEL,
    linear_kernel=Kernel(
        _linear_recurrence, _linear_recurrence_backward, packed=True, lengths=True, autocast=True, cells=KEEPING
    ),
)
