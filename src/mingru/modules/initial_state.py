"""The initial state of a layer, or of several: a parameter if it is learned, otherwise one number, `_zero_state`.

Weights of a layer that flips or turns its state say which number, because layers of `drop_in` begin with 0.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..ops.cells import CELLS, GATES, default_candidate, zero_state
from .options import Options


def default_start(options: Options) -> float:
    """Return the initial state if it is not learned: of all stacked layers, that of the layer with the largest."""
    cells = {GATES[gate] for gate in options.gates}
    return max(zero_state(cell, options.candidate or default_candidate(cell)) for cell in cells)


def learned_state(shape: Sequence[int], options: Options) -> nn.Parameter | None:
    """Return the parameter, for `reset_initial_state`, or None if the initial state is not learned."""
    return nn.Parameter(torch.empty(shape, **options.factory)) if options.learn_initial_state else None


@torch.no_grad()
def reset_initial_state(module: Any, layers: list[Any]) -> None:
    """Initialize a learned state. If the gate flips or turns it, it is drawn, so that blocks of features differ."""
    if module.initial_state is None:
        return
    for layer, rows in zip(layers, module.initial_state.chunk(len(layers)), strict=True):
        if CELLS[layer.cell].has_logarithms or layer.cell == "gru":
            nn.init.constant_(rows, module._zero_state)
        else:
            nn.init.normal_(rows)
