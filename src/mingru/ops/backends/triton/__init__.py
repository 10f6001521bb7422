"""The `"triton"` backend: kernels for GPUs, compiled by Triton on first use.

`launch` calls the kernel in `kernels`, divided as `tiling` says. Importing this module registers two operators with
PyTorch's dispatcher, but does not import Triton. Captured graphs contain the operators; eager calls skip the
dispatcher. States have any floating dtype, and are computed in the accumulation dtype of the sequences. The operators
take the parts of numbers as features.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backend import Backend, Given, Gradients, Kernel, grads_of_context, warn_once
from ...call import FIRST_INPUT, Call, Spec, from_flat, spec_of
from ...cells import NUM_INPUTS
from ...layout import is_transposed
from ...modes import are_eager, without_autocast
from ...names_of_torch import len_torch_dispatch_stack
from ...shape import MaybeTensor, accumulate_dtype, as_dtype
from . import fallback, launch
from .device import CELLS, DEVICES, IS_INTERPRETED, unavailable, unsupported

__all__ = ["ALONE", "BACKEND", "CELLS", "DEVICES"]
Flags = Sequence[bool]
# Runs a pass, "forward" or "backward", of a call.
Run = Callable[..., tuple[Any, ...]]


def _alone(name: str, call: Call, *of_pass: object) -> Any:
    """Run a pass, "forward" or "backward", by its kernel."""
    return getattr(launch, name)(call, *of_pass)


def _or_torch(name: str, call: Call, *of_pass: object) -> Any:
    """Run a pass by its kernel, or if that fails, by tensor operations."""
    try:
        return _alone(name, call, *of_pass)
    except launch.KernelFailure as failure:
        warn_once(f"using slower tensor operations. {failure}")
    return getattr(fallback, name)(call, *of_pass)


_LIBRARY: Any = torch.library.Library("mingru", "FRAGMENT")  # type: ignore[no-untyped-call]


def _register(name: str, saved: str, num_results: int) -> None:
    """Register the operator of a pass, and a function that returns the shapes of its outputs."""
    operator = f"recurrence_triton_{name}"
    arguments = f"Tensor[] inputs, Tensor?[] given, {saved}str[] cell, float min_decay, bool[] flags"
    tags = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)

    def called(function: Run, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Call a function of a call with the arguments of the operator. Results that are not needed are empty."""
        inputs, given, *of_pass, (cell, activation), min_decay, (reverse, time_first, *needs) = arguments
        tensors = [*given[:4], None, None, *given[4:], *inputs]  # without recurrent weights
        call = from_flat(spec_of(cell, activation, reverse, min_decay), tensors, time_first)
        empty = partial(inputs[0].new_empty, 0, dtype=accumulate_dtype(inputs[0].dtype))
        return tuple(empty() if x is None else x for x in function(call, *of_pass, *needs))

    def run(*args: object) -> tuple[Tensor, ...]:
        return called(partial(_or_torch, name), args)

    def shapes(*args: object) -> tuple[Tensor, ...]:
        return called(getattr(launch, f"{name}_results"), args)

    shapes.__name__ = operator
    # `torch.compile` captures no CUDA graph of packed sequences, whose batch sizes are on the CPU.
    for own, more in ((operator, ()), (f"{operator}.packed", (torch.Tag.cudagraph_unsafe,))):
        _LIBRARY.define(f"{own}({arguments}) -> ({', '.join(['Tensor'] * num_results)})", tags=(*tags, *more))
        for key in ("CUDA", "XPU", *(("CPU",) if IS_INTERPRETED else ())):
            _LIBRARY.impl(own, run, key)
        torch.library.register_fake(f"mingru::{own}", shapes, lib=_LIBRARY)


_register("forward", "", 2)
_register("backward", "Tensor[] saved, ", 5)


def _run(eager: Run, name: str, call: Call, *of_pass: object) -> tuple[Any, ...]:
    """Run a pass, by the function `eager` if the call may skip the dispatcher, because nothing else could take it.

    `of_pass`, only for "backward": out, grad_out and grad_last; whether dt and a bias need gradients.
    """
    if are_eager(*call.tensors) and not len_torch_dispatch_stack():
        return eager(name, call, *of_pass)
    spec, inputs, context, layout = call
    initial_state = context.initial_state.expand_as(context.h) if launch.has_initial_state(call) else None
    given, needs = [context.h, initial_state, *context[2:4], *layout[1:]], of_pass[1:]
    run = getattr(torch.ops.mingru, f"recurrence_triton_{name}")
    run = run.default if layout.batch_sizes is None else run.packed
    flags = [spec.reverse, layout.time_first, *needs]
    return tuple(run(inputs, given, *of_pass[:1], [spec.cell, spec.activation], spec.min_decay, flags))


def _forward(eager: Run, spec: Spec, given: Given, time_first: bool, keep: bool | None) -> tuple[MaybeTensor, ...]:
    return *_run(eager, "forward", from_flat(spec, given, time_first)), None


def _backward(eager: Run, spec: Spec, given: Given, time_first: bool, saved: Given, needs: Flags) -> Gradients:
    call, needs_dt, (out, _, *grad) = from_flat(spec, given, time_first), needs[3], saved
    grads, *of_states, grad_dt, _ = _run(eager, "backward", call, [out, *grad], needs_dt, False)
    parts = grads.chunk(len(call.tensors), -1)
    of_inputs = [part.view(x.shape) for part, x in zip(parts, call.tensors, strict=True)]
    return *grads_of_context(given, of_states, grad_dt if needs_dt else None), *of_inputs


def _in_memory_order(x: Tensor) -> Tensor:
    """Return a sequence with its first two dimensions in the order of memory; a second call restores the order."""
    return x.transpose(0, 1) if is_transposed(x) else x


def _mapped(spec: Spec, given: Given, time_first: bool, rows: Tensor, kept: Tensor | None) -> tuple[Tensor, Call]:
    """Return the pre-activations in the order of memory, and their call.

    `rows`: x in this order. `kept`: the pre-activations that forward returned.
    """
    x, weight, bias = given[FIRST_INPUT:]
    pre = F.linear(rows, weight, bias) if kept is None else kept
    inputs = (pre if rows is x else pre.transpose(0, 1)).chunk(NUM_INPUTS[spec.cell], -1)
    return pre, from_flat(spec, [*given[:FIRST_INPUT], *inputs], time_first)


def _linear_forward(
    eager: Run, spec: Spec, given: Given, time_first: bool, keep: bool | None
) -> tuple[MaybeTensor, ...]:
    pre, mapped = _mapped(spec, given, time_first, _in_memory_order(given[FIRST_INPUT]), None)
    return *_run(eager, "forward", mapped), pre if keep else None


def _linear_backward(eager: Run, spec: Spec, given: Given, time_first: bool, saved: Given, needs: Flags) -> Gradients:
    (x, weight, bias), (out, kept, *grad) = given[FIRST_INPUT:], saved
    needs_dt, (needs_x, needs_weight, needs_bias) = needs[3], needs[FIRST_INPUT:]
    rows = _in_memory_order(x)
    # The tensors are in the dtype in which autocast computes.
    with without_autocast(x):
        _, mapped = _mapped(spec, given, time_first, rows, kept if kept is not None and kept.numel() else None)
        grads, *of_states, grad_dt, grad_bias = _run(eager, "backward", mapped, [out, *grad], needs_dt, needs_bias)
        # One matrix of the gradients of all inputs, for both products.
        matrix = (grads.transpose(0, 1) if is_transposed(mapped.tensors[0]) else grads).flatten(0, -2)
        grad_rows = torch.mm(matrix, weight).view(rows.shape) if needs_x else None
        grad_weight = torch.mm(matrix.t(), rows.flatten(0, -2)) if needs_weight else None
    grad_x = grad_rows if grad_rows is None or rows is x else grad_rows.transpose(0, 1)
    of_bias = as_dtype(grad_bias, bias.dtype) if needs_bias else None
    return *grads_of_context(given, of_states, grad_dt if needs_dt else None), grad_x, grad_weight, of_bias


def _backend(eager: Run) -> Backend:
    """Return the backend whose eager passes this function runs."""
    options: Any = {"packed": True, "lengths": True, "cells": CELLS}
    kernel = Kernel(partial(_forward, eager), partial(_backward, eager), **options)
    passes = partial(_linear_forward, eager), partial(_linear_backward, eager)
    return Backend(unavailable, unsupported, kernel=kernel, linear_kernel=Kernel(*passes, **options))


# If the caller selected the backend, a kernel that fails is an error.
BACKEND, ALONE = _backend(_or_torch), _backend(_alone)
