"""The operators of this backend by tensor operations: a captured graph whose kernel failed cannot choose again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...call import Call, Spec, from_flat
from ...cells import NUM_INPUTS
from ...scan import LinearScan, adjoint, grad_of_h, in_accumulation_dtype, previous_states
from ...shape import States, accumulate_dtype
from .. import tensors, traceable
from .launch import Given, Tensors, grads_like


def _call(inputs: Tensors, given: Given, cell: Sequence[str], min_decay: float, order: Sequence[bool]) -> Call:
    start, layout, _ = from_flat(given, order[1])
    if start.initial_state is None:
        start = start._replace(initial_state=start.h)
    return Call(Spec(cell[0], cell[1], order[0], min_decay), list(inputs), start, layout)


def _scan(call: Call, *others: Tensor) -> list[Tensor]:
    """Return a, b, h and other tensors of a linear scan, as complex numbers if they are pairs."""
    parts = [*call.tensors, call.start.h, *others]
    is_complex = call.spec.cell == "complex_linear_scan"
    return [torch.view_as_complex(x.contiguous()) for x in parts] if is_complex else parts


def _like(found: Tensor, x: Tensor) -> Tensor:
    """Return a result in the form and dtype of a tensor."""
    return (torch.view_as_real(found) if found.is_complex() else found).to(x.dtype).view(x.shape).contiguous()


def _run(call: LinearScan) -> States:
    return tensors.scan(in_accumulation_dtype(call))


def forward(inputs: Tensors, given: Given, cell: Sequence[str], min_decay: float, order: Sequence[bool]) -> States:
    call = _call(inputs, given, cell, min_decay, order)
    if call.spec.cell in NUM_INPUTS:
        found = traceable.recurrence(*call)
    else:
        a, b, h = _scan(call)
        found = _run(LinearScan(a, b, h, call.start.reset, call.spec.reverse))
    return _like(found[0], inputs[0]), _like(found[1], call.start.h)


def backward(
    inputs: Tensors, given: Given, saved: Tensors, cell: Sequence[str], min_decay: float, flags: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = _call(inputs, given, cell, min_decay, flags)
    h, initial_state, reset, dt = call.start
    *_, needs_dt, needs_bias = flags
    num_leading = 2 if call.layout.batch_sizes is None else 1
    grads, new = grads_like(inputs, num_leading), inputs[0].new_zeros
    dtype = accumulate_dtype(inputs[0].dtype)
    of_inputs: list[Any]
    grad_h: Any
    grad_initial_state = grad_dt = None
    if call.spec.cell in NUM_INPUTS:
        with torch.enable_grad():
            leaves: list[Any] = [
                None if x is None else x.detach().requires_grad_() for x in (*inputs, h, initial_state, dt)
            ]
            own = call.start._replace(h=leaves[-3], initial_state=leaves[-2], dt=leaves[-1])
            states = traceable.recurrence(call.spec, leaves[:-3], own, call.layout)
        wanted = [x for x in leaves if x is not None]
        found = iter(torch.autograd.grad(states, wanted, list(saved[1:]), allow_unused=True))
        *of_inputs, grad_h, grad_initial_state, grad_dt = [None if x is None else next(found) for x in leaves]
    else:
        a, _, first, out, *grad = _scan(call, *saved)
        scan = in_accumulation_dtype(LinearScan(a, out, first, reset, call.spec.reverse))
        delta = adjoint(_run, scan, (grad[0], grad[1]))
        of_inputs, grad_h = [delta * previous_states(scan, scan.b).conj(), delta], grad_of_h(scan, delta)
    parts = [_like(x, part).flatten(num_leading) for x, part in zip(of_inputs, inputs, strict=True)]
    grads.copy_(torch.cat(parts, -1))
    sums = grads.flatten(0, -2).sum(0, dtype=dtype) if needs_bias else new(0, dtype=dtype)

    def given_or_empty(grad: Tensor | None, x: Tensor | None) -> Tensor:
        if x is None:
            return new(0, dtype=dtype)
        return new(x.shape, dtype=dtype) if grad is None else grad.to(dtype).contiguous()

    of_initial_state = given_or_empty(grad_initial_state, None if given[1] is None else h)
    return grads, _like(grad_h, h), of_initial_state, given_or_empty(grad_dt, dt if needs_dt else None), sums
