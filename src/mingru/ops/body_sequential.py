"""The `"sequential"` body: one step after the other, as the equations read. For testing and for learning."""

import torch
from torch import Tensor

from .activation import activate
from .shape import States, accumulate_dtype, along

DIFFERENTIABLE = True


def unavailable() -> str | None:
    return None


def refuses(sequence: Tensor, activation: str | None) -> str | None:
    return None


def linear_scan(a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool) -> States:
    return _steps(a, b, h, torch.zeros_like(h), reset, reverse)


def mingru(
    gate: Tensor, candidate: Tensor, h: Tensor, initial: Tensor, reset: Tensor | None, activation: str, reverse: bool
) -> States:
    dtype = accumulate_dtype(gate.dtype)
    k, v = gate.to(dtype), candidate.to(dtype)
    out, last = _steps((-k).sigmoid(), k.sigmoid() * activate(v, activation), h, initial, reset, reverse)
    return out.to(gate.dtype), last


def _steps(a: Tensor, b: Tensor, h: Tensor, initial: Tensor, reset: Tensor | None, reverse: bool) -> States:
    dtype = accumulate_dtype(b.dtype)
    state = h.to(dtype)
    states = []
    num_steps = b.shape[1]
    for t in reversed(range(num_steps)) if reverse else range(num_steps):
        now = slice(t, t + 1)
        if reset is not None:
            state = torch.where(along(reset[:, now], state), initial.to(dtype), state)
        state = a[:, now].to(dtype) * state + b[:, now].to(dtype)
        states.append(state)
    if reverse:
        states.reverse()
    return torch.cat(states, 1).to(b.dtype), state.to(h.dtype)
