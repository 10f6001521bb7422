"""A recurrence and the map that makes its pre-activations, in blocks that stay in the cache.

Without a gradient, whole pre-activations would be new memory, which costs more than arithmetic. A layer over (4, 16,
32, 64, 64) with a kernel of 3 takes 61 to 82 ms in blocks, depending on whether malloc keeps memory, and 98 otherwise;
its convolution alone, over all of it, takes 77 (two cores of a Xeon with AVX-512, torch 2.13).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import route
from .call import Layout, Spec, Start
from .graph import are_ordinary, is_autocast, is_compiling
from .shape import States, accumulate_dtype

_BLOCK_BYTES = 4 << 20
# Modules that compute the same on a part of the batch.
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Map(NamedTuple):
    """What makes the pre-activations of a sequence."""

    module: nn.Module
    inputs: Callable[[Tensor], list[Tensor]]
    """From x, (B, S, *) or (S, B, *), to the inputs of the cell."""
    state_shape: tuple[int, ...]
    """Trailing sizes of an input of the cell, and of the state."""


def sizes_of(x: Tensor, of: Map, num_inputs: int) -> tuple[int, int] | None:
    """Return how much of the first two dimensions of x goes into one block; None for no blocks."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or is_compiling() or is_autocast(x):
        return None
    # A hook must see the whole batch.
    if (
        type(of.module) not in _CONVOLUTIONS
        or route.is_hooked(of.module)
        or not are_ordinary(x, *of.module.parameters())
    ):
        return None
    outer, inner = x.shape[:2]
    size = num_inputs * math.prod(of.state_shape) * x.element_size()
    # torch is slow on a single volume.
    count = max(2, _BLOCK_BYTES // size)
    if count * size > 4 * _BLOCK_BYTES or outer * inner < 4 * count:
        return None
    return max(1, count // inner), min(inner, count)


def in_blocks(
    run: Callable[[Tensor, Start], States],
    x: Tensor,
    of: Map,
    start: Start,
    call: tuple[Spec, Layout],
    sizes: tuple[int, int],
) -> States:
    """Run a recurrence, `run`, on one block after the other."""
    spec, order = call
    time, batch = (0, 1) if order.time_first else (1, 0)
    out = x.new_empty((*x.shape[:2], *of.state_shape))
    # The state between blocks is not rounded.
    states = start.h.to(accumulate_dtype(x.dtype))
    lasts = []
    for first in range(0, x.shape[batch], sizes[batch]):
        rows = slice(first, first + sizes[batch])
        last = states[rows]
        begins = range(0, x.shape[time], sizes[time])
        for begin in reversed(begins) if spec.reverse else begins:
            steps = slice(begin, begin + sizes[time])
            at = (steps, rows) if order.time_first else (rows, steps)
            reset = None if start.reset is None else start.reset[at]
            out[at], last = run(x[at], Start(last, start.initial_state, reset))
        lasts.append(last)
    return out, torch.cat(lasts).to(start.h.dtype)
