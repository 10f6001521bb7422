"""The `"sequential"` backend: a loop over the steps, which follows the equations. For tests and for learning."""

import torch

from ..backend import Backend
from ..scan import LinearScan
from ..shape import States, along, times


def scan(call: LinearScan) -> States:
    state, states = call.h, []
    num_steps = call.b.shape[1]
    for t in reversed(range(num_steps)) if call.reverse else range(num_steps):
        now = slice(t, t + 1)
        if call.reset is not None:
            state = state.masked_fill(along(call.reset[:, now], state), 0)
        state = times(call.a[:, now], state, call.parts) + call.b[:, now]
        states.append(state)
    if call.reverse:
        states.reverse()
    return torch.cat(states, 1), state


BACKEND = Backend(scan=scan)
