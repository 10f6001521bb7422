"""The passes by tensor operations, for a kernel that failed: a captured graph cannot choose another backend."""

from collections.abc import Sequence
from typing import Any

import torch

from ...call import Call
from ...cells import NUM_INPUTS, parts_of
from ...scan import LinearScan, adjoint, grad_of_h, in_accumulation_dtype, previous_states
from ...shape import States, conjugate, times
from .. import torch_in_graphs, torch_in_place
from .launch import Results, Tensors, backward_results, forward_results, has_initial_state


def _scan(call: Call) -> LinearScan:
    (a, b), start, spec = call.tensors, call.start, call.spec
    return in_accumulation_dtype(LinearScan(a, b, start.h, start.reset, spec.reverse, parts_of(spec.cell)))


def _copied(results: Sequence[Any], found: Sequence[Any]) -> None:
    """Copy what was found into the results."""
    for result, x in zip(results, found, strict=True):
        result.copy_(x.reshape(result.shape))


def forward(call: Call) -> States:
    results, is_cell = forward_results(call), call.spec.cell in NUM_INPUTS
    _copied(results, torch_in_graphs.recurrence(*call) if is_cell else torch_in_place.scan(_scan(call)))
    return results


def backward(call: Call, saved: Tensors, needs_dt: bool, needs_bias: bool) -> Results:
    results, inputs = backward_results(call, saved, needs_dt, needs_bias), call.tensors
    h, initial_state, _, dt, *_ = call.start
    grads, *of_start, of_bias = results
    wanted: list[Any] = [*grads.chunk(len(inputs), -1), *of_start]
    found: Sequence[Any]
    if call.spec.cell in NUM_INPUTS:
        after_reset = initial_state.expand_as(h) if has_initial_state(call) else None
        with torch.enable_grad():
            all_of = *inputs, h, after_reset, dt
            leaves: list[Any] = [x if x is None else x.detach().requires_grad_() for x in all_of]
            own = call.start._replace(h=leaves[-3], initial_state=leaves[-2], dt=leaves[-1])
            states = torch_in_graphs.recurrence(call.spec, leaves[:-3], own, call.layout)
        needed = [x for x, result in zip(leaves, wanted, strict=True) if result is not None]
        found = torch.autograd.grad(states, needed, list(saved[1:]), materialize_grads=True)
    else:
        # Not by autograd, because no gradient depends on b, which may be another tensor here.
        scan, (out, grad_out, grad_last) = _scan(call), saved
        delta = adjoint(torch_in_place.scan, scan, (grad_out, grad_last))
        before = conjugate(previous_states(scan, out.to(delta.dtype)), scan.parts)
        found = times(delta, before, scan.parts), delta, grad_of_h(scan, delta)
    _copied([result for result in wanted if result is not None], found)
    if of_bias is not None:
        of_bias.copy_(grads.flatten(0, -2).sum(0, dtype=of_bias.dtype))
    return results
