"""Compute pre-activations and their recurrence in slices that stay in the cache, if no gradient is needed.

Allocating the pre-activations of a whole sequence costs more than the arithmetic. A convolutional layer over (4, 16,
32, 64, 64) with kernel size 3 takes 61 to 82 ms in slices, depending on whether malloc keeps memory, and 98 ms without
slices. Only the convolution, without slices, takes 77 ms (two cores of a Xeon with AVX-512, torch 2.13).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import route
from .call import Call
from .modes import are_ordinary, mode_of
from .shape import States, accumulate_dtype

_SLICE_BYTES = 4 << 20
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Map(NamedTuple):
    """The map from a sequence to its pre-activations."""

    module: nn.Module
    inputs: Callable[[Tensor], list[Tensor]]
    """Compute the inputs of the cell from x, (B, S, *) or (S, B, *)."""
    state_shape: tuple[int, ...]
    """Trailing sizes of the state and of each input of the cell."""


def sizes_of(x: Tensor, of: Map, num_inputs: int) -> tuple[int, int] | None:
    """Return the size of a slice in the first two dimensions of x, or None if slices cannot be used."""
    is_known = x.is_cpu and type(of.module) in _CONVOLUTIONS and are_ordinary(x, *of.module.parameters())
    # A hook must be called with the whole batch.
    if not is_known or torch.is_grad_enabled() or not mode_of(x).is_eager or route.is_hooked(of.module):
        return None
    outer, inner = x.shape[:2]
    size = num_inputs * math.prod(of.state_shape) * x.element_size()
    # At least 2, because torch is slow on a single volume.
    count = max(2, _SLICE_BYTES // size)
    if count * size > 4 * _SLICE_BYTES or outer * inner < 4 * count:
        return None
    return max(1, count // inner), min(inner, count)


def in_slices(run: Callable[[Call], States], call: Call, of: Map, sizes: tuple[int, int]) -> States:
    """Call `run` on one slice of x after the other."""
    spec, (x,), context, layout = call
    time, batch = (0, 1) if layout.time_first else (1, 0)
    out = x.new_empty((*x.shape[:2], *of.state_shape))
    # In the accumulation dtype, so that the state is not rounded between slices.
    states = context.h.to(accumulate_dtype(x.dtype))
    lasts = []
    for first in range(0, x.shape[batch], sizes[batch]):
        elements = slice(first, first + sizes[batch])
        last = states[elements]
        begins = range(0, x.shape[time], sizes[time])
        for begin in reversed(begins) if spec.reverse else begins:
            steps = slice(begin, begin + sizes[time])
            at = (steps, elements) if layout.time_first else (elements, steps)
            reset, dt = (None if steps is None else steps[at] for steps in (context.reset, context.dt))
            part = Call(spec, [x[at]], context._replace(h=last, reset=reset, dt=dt), layout)
            out[at], last = run(part)
        lasts.append(last)
    return out, torch.cat(lasts).to(context.h.dtype)
