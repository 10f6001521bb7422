"""Calls of every cell, by every backend and by the float64 reference."""

import reference
import torch

import mingru
from mingru import ops
from mingru.ops.backends import traceable
from mingru.ops.cells import TIMED, parts_of

# `test_triton.py` tests the other backend.
BACKENDS = [name for name, can_run in mingru.backends().items() if can_run is True and name != "triton"]
# With the version of "torch" for graphs, which is not a backend of its own.
ALL = [*BACKENDS, "traceable"]
CELLS = list(reference.CELLS)
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def supports(backend, cell, activation="positive"):
    """Return whether the backend computes the cell; the log backend needs positive numbers."""
    return backend != "log" or (activation == "positive" and ops.cells.CELLS[cell].has_logarithms)


def each(backends=ALL, cells=CELLS, activation="positive"):
    """Return the pairs of a backend and a cell that it computes."""
    return [(backend, cell) for backend in backends for cell in cells if supports(backend, cell, activation)]


def run(
    backend,
    cell,
    inputs,
    h,
    initial,
    reset=None,
    dt=None,
    *,
    activation="positive",
    reverse=False,
    min_decay=0.0,
    time_first=False,
    batch_sizes=None,
):
    """Return the states and the last state of a backend."""
    spec, start = ops.Spec(cell, activation, reverse, min_decay), ops.Start(h, initial, reset, dt)
    layout = ops.Layout(time_first, batch_sizes)
    if backend == "traceable":
        return traceable.recurrence(spec, list(inputs), start, layout)
    return ops.recurrence(spec, list(inputs), start, layout, backend)


def exact(cell, inputs, h, initial, reset=None, dt=None, *, activation="positive", reverse=False, min_decay=0.0):
    """Return the same of the reference."""
    timed = {"dt": dt, "min_decay": min_decay} if cell in TIMED else {}
    out = reference.CELLS[cell](*inputs, h, reset, activation, initial, reverse, **timed)
    return out, out[:, :1] if reverse else out[:, -1:]


def make(cell, batch, steps, *rest, dtype=torch.double, reset=False):
    """Return the inputs of a cell, a state, an initial state, resets and elapsed times from 0 to 3."""
    features, *rest = rest or (6,)
    rest = (features + -features % parts_of(cell), *rest)
    inputs = [2 * torch.randn(batch, steps, *rest, dtype=dtype) for _ in range(ops.NUM_INPUTS[cell])]
    h, initial = (torch.randn(batch, 1, *rest, dtype=dtype) for _ in range(2))
    dt = 3 * torch.rand(batch, steps, dtype=torch.float32 if dtype.itemsize == 2 else dtype)
    return inputs, h, initial, torch.rand(batch, steps) < 0.2 if reset else None, dt


def graded(function, tensors):
    """Return the outputs of a function, and the gradients of all tensors through all outputs."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    outputs = function(*leaves)
    # Not all alike, so that no two outputs can be swapped.
    loss = 0
    for power, out in enumerate(outputs, 1):
        weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        loss = loss + (out**power * weight).sum().real
    return [*outputs, *torch.autograd.grad(loss, leaves, materialize_grads=True)]


def assert_same(got, expected, names, **tolerances):
    """Check that the results of `graded` are close."""
    for one, other, name in zip(got, expected, names, strict=True):
        torch.testing.assert_close(one, other, msg=lambda m, name=name: f"{name}: {m}", **(tolerances or TIGHT))
