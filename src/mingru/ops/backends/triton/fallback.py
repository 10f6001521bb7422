"""The passes by tensor operations, for a kernel that failed: a captured graph cannot choose another backend."""

from typing import Any

import torch

from ...backend import Gradients, Kernel
from ...call import FIRST_INPUT, Call, flattened
from ...cells import NUM_INPUTS, parts_of
from ...scan import LinearScan, adjoint, grad_of_h, in_accumulation_dtype, previous_states
from ...shape import States, conjugate, times
from .. import torch_in_graphs, torch_in_place
from .launch import Results, Tensors, backward_results, forward_results, has_initial_state


def _scan(call: Call) -> LinearScan:
    (a, b), context, spec = call.tensors, call.context, call.spec
    return in_accumulation_dtype(LinearScan(a, b, context.h, context.reset, spec.reverse, parts_of(spec.cell)))


def _copied(results: Tensors, found: Tensors) -> None:
    """Copy what was found into the results."""
    for result, x in zip(results, found, strict=True):
        result.copy_(x.reshape(result.shape))


def _in_place(call: Call) -> tuple[Kernel, list[Any]] | None:
    """Return the kernel of the backend "torch", which takes fewer operations, and its tensors, if it can run this."""
    kernel = torch_in_place.BACKEND.kernel
    if kernel is None or call.spec.cell not in kernel.cells or call.layout[1:] != (None, None):
        return None
    context = call.context if has_initial_state(call) else call.context._replace(initial_state=None)  # type: ignore[arg-type]
    return kernel, [*flattened(context, call.layout), *call.tensors]


def forward(call: Call) -> States:
    results, is_cell, in_place = forward_results(call), call.spec.cell in NUM_INPUTS, _in_place(call)
    if in_place is not None:
        kernel, given = in_place
        found = kernel.forward(call.spec, given, call.layout.time_first, None)[:2]
    else:
        found = torch_in_graphs.recurrence(*call) if is_cell else torch_in_place.scan(_scan(call))
    _copied(results, found)
    return results


def backward(call: Call, saved: Tensors, needs_dt: bool, needs_bias: bool) -> Results:
    results, inputs = backward_results(call, saved, needs_dt, needs_bias), call.tensors
    h, initial_state, _, dt, *_ = call.context
    after_reset = initial_state.expand_as(h) if has_initial_state(call) else None
    grads, *of_context, of_bias = results
    wanted: list[Any] = [*grads.chunk(len(inputs), -1), *of_context]
    found: Gradients
    in_place = _in_place(call)
    if in_place is not None:
        kernel, given = in_place
        given[1], (out, *of_out) = after_reset, saved
        needs = [x is not None for x in given]
        needs[2:4] = False, needs_dt and dt is not None
        grads_of = kernel.backward(call.spec, given, call.layout.time_first, (out, None, *of_out), needs)
        found = [x for x in (*grads_of[FIRST_INPUT:], *grads_of[:2], grads_of[3]) if x is not None]
    elif call.spec.cell in NUM_INPUTS:
        with torch.enable_grad():
            all_of = *inputs, h, after_reset, dt
            leaves: list[Any] = [x if x is None else x.detach().requires_grad_() for x in all_of]
            own = call.context._replace(h=leaves[-3], initial_state=leaves[-2], dt=leaves[-1])
            states = torch_in_graphs.recurrence(call.spec, leaves[:-3], own, call.layout)
        needed = [x for x, result in zip(leaves, wanted, strict=True) if result is not None]
        found = torch.autograd.grad(states, needed, list(saved[1:]), materialize_grads=True)
    else:
        scan, (out, grad_out, grad_last) = _scan(call), saved
        delta = adjoint(torch_in_place.scan, scan, (grad_out, grad_last))
        before = conjugate(previous_states(scan, out.to(delta.dtype)), scan.parts)
        found = times(delta, before, scan.parts), delta, grad_of_h(scan, delta)
    _copied([result for result in wanted if result is not None], found)
    if of_bias is not None:
        of_bias.copy_(grads.flatten(0, -2).sum(0, dtype=of_bias.dtype))
    return results
