"""Remedies for what is often passed in place of the right tensor."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.cells import BLOCKS
from .names import LENGTHS_OF_MASK
from .values import written

EMBED = "embed token ids first (torch.nn.Embedding)"
# Arguments of functions that have the form of the first one.
_SEQUENCES = ("angle", "b", "candidate", "input", "log_b")


def of_layers(layer: Any, form: Any, value: Any, shape: Sequence[int]) -> str:
    """Return the remedy for an argument of a layer or cell that has another type or shape, or ""."""
    if form.argument == "x":
        return of_ids(value) or _of_x(layer, value) if isinstance(value, Tensor) else ""
    if form.argument == "h" and isinstance(value, (list, tuple)):
        return _of_pair(layer, form, value)
    if form.parts[:1] in (["1"], ["D"]) and shape:
        return "pass a state of this batch size and of a module with the same options"
    is_of_torch = form.argument == "h" and form.parts[:1] == ["L*D"] and shape and value.dim() == 3
    return "convert a state of nn.GRU, (L * D, B, H), with h.unsqueeze(2)" if is_of_torch else ""


def of_functions(forms: Any, form: Any, value: Any, shape: Sequence[int]) -> str:
    """Return the remedy for an argument of a function that has another shape, or ""."""
    if form.argument == "h" and len(shape) == 2 and value.dim() == 1:
        return "(S, H) without a batch is read as (B, S); pass (1, S, H)"
    if form.argument not in _SEQUENCES or not shape:
        return ""
    if value.shape[:-1] == shape:
        return f"use {forms.names['x']}.unsqueeze(-1).expand_as({form.argument})"
    return f"to broadcast, use {form.argument}.expand, which copies nothing"


def of_dtype(argument: str, value: Tensor, remedy: str) -> str:
    """Return the remedy for another dtype."""
    if argument == "lengths" and value.dtype == torch.bool:
        return f"use {LENGTHS_OF_MASK}"
    if argument == "x" and of_ids(value):
        return f"{EMBED}, or {remedy} for numbers"
    return (of_mask(value) if argument == "h" else "") or remedy


def of_mask(h: Any) -> str:
    """Return the remedy for a mask, or lengths, in place of a state, or ""."""
    dtype = h.dtype if isinstance(h, Tensor) else None
    if dtype == torch.bool:
        return f"pass the starts of episodes as reset=; a layer takes a padding mask as {LENGTHS_OF_MASK}"
    return "a layer takes lengths as lengths=" if dtype == torch.int64 and h.dim() == 1 else ""


def of_ids(x: Tensor) -> str:
    """Return the remedy for token ids, if x has a dtype that an embedding accepts, or ""."""
    return EMBED if x.dtype in (torch.int64, torch.int32) else ""


def of_missing_dim(argument: str, x: Tensor, shape: Sequence[int]) -> str:
    """Return the remedy for a tensor that lacks one dimension of size 1 of this shape, or ""."""
    missing = (dim for dim, size in enumerate(shape) if size == 1 and x.shape == (*shape[:dim], *shape[dim + 1 :]))
    return next((f"use {argument}.unsqueeze({dim})" for dim in missing), "")


def _of_pair(layer: Any, form: Any, h: Any) -> str:
    """Return the remedy for a list of states, or the pair (h, c) of an LSTM."""
    cell = getattr(layer, "cell", "mingru")
    name, end = ("minLSTM", ", without a cell state") if cell.startswith("minlstm") else ("minGRU", "")
    if isinstance(h, list) and form.parts[:1] == ["L*D"]:
        end += "; torch.cat joins a list with a state of each layer"
    return f"a {'BlockGRU' if cell == BLOCKS else name}'s state is one tensor h, {written(form.parts)}{end}"


def _of_x(layer: Any, x: Tensor) -> str:
    if layer.num_space_dims > 0:
        return ""
    if layer.role == "step":
        return "use a layer, not a cell, for sequences" if x.dim() == 3 else ""
    if x.shape == (layer.input_dims,):
        return "use x[None, None] for one step"
    if x.dim() == 2 and x.shape[1] == layer.input_dims:
        batch, time = (0, 1) if layer.batch_first else (1, 0)
        return f"use x.unsqueeze({batch}) for one sequence, or x.unsqueeze({time}) for one step of a batch"
    return "use x.transpose(1, 2) if time is last" if x.dim() == 3 and x.shape[1] == layer.input_dims else ""
