"""The checks of a call of a layer or cell, which raise errors that name the wrong argument."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..check.forms import check_input, check_kind, check_one_state, check_packing, check_steps, embed_remedy, expanded
from ..check.messages import check_type, dims, expectation, not_a_tensor, require
from .shared import MaybeList, MaybeTensor, weight_of


def check_sequence(
    layer: Any, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor
) -> None:
    """Check a call of a MinGRU or MinLSTM."""
    if isinstance(x, PackedSequence):
        check_packed(layer, x, h, reset, lengths, dt)
        return
    order = "B, S" if layer.batch_first else "S, B"
    check_x(layer, x, (2,), f"({order}, {layer.input_dims})")
    if h is not None:
        _check_state(layer, x, h[0], x.shape[0 if layer.batch_first else 1])
    check_steps(layer.name, x, f"({order})", layer.cell, reset, dt, lengths=lengths)


def check_packed(layer: Any, x: PackedSequence, h: Any, reset: Any, lengths: object, dt: object) -> None:
    """Check a call with a PackedSequence."""
    expected = "None because a PackedSequence has its own lengths"
    require(layer.name, "lengths", lengths is None, expected, type(lengths).__name__)
    check_x(layer, x.data, (1,), f"packed steps of {layer.input_dims} features")
    check_packing(layer.name, x)
    if h is not None:
        _check_state(layer, x.data, h[0], int(x.batch_sizes[0]))
    packed = _packed_like(layer.name, x, "reset", reset), _packed_like(layer.name, x, "dt", dt)
    check_steps(layer.name, x.data.unsqueeze(0), "(1, steps)", layer.cell, *packed)


def check_x(layer: Any, x: Any, leading: Any, letters: str, remedy: str = "", size: str = "input_dims") -> None:
    """Raise an error if x has another number of leading dimensions, or does not fit the weights.

    `leading` has the possible numbers, and `size` is the argument that is the number of features of x.
    """
    if not isinstance(x, Tensor):
        raise not_a_tensor(layer.name, "x", x)
    count = layer.num_space_dims
    at = x.dim() - 1 - count
    if at not in leading or x.shape[at] != layer.input_dims:
        space = f" and space is {count}-dimensional" if count else ""
        expected = f"{letters} because {size} is {layer.input_dims}{space}"
        raise ValueError(expectation(layer.name, "x", expected, dims(x.shape), remedy or _remedy_for(layer, x)))
    weight = weight_of(layer._map_of_x())
    if weight is not None and not (x.dtype == weight.dtype and x.device == weight.device):
        check_input(layer.name, x, weight, "the layer's weight")


def _remedy_for(layer: Any, x: Tensor) -> str:
    """Return the fix for an input of another shape, or ""."""
    if embed_remedy(x) or layer.num_space_dims > 0:
        return embed_remedy(x)
    if x.shape == (layer.input_dims,):
        return "use x[None, None] for one step"
    if x.dim() == 2 and x.shape[1] == layer.input_dims:
        batch, time = (0, 1) if layer.batch_first else (1, 0)
        return f"use x.unsqueeze({batch}) for one sequence, or x.unsqueeze({time}) for one step of a batch"
    return "use x.transpose(1, 2) if time is last" if x.dim() == 3 and x.shape[1] == layer.input_dims else ""


def _check_state(layer: Any, x: Tensor, h: Any, batch: int) -> None:
    """Raise an error if h does not fit x."""
    check_one_state(layer.name, h, "(L * D, B, 1, H)", layer.cell)
    check_kind(layer.name, "h", h, x)
    shape = (layer.num_layers * layer.num_directions, batch, 1, layer.hidden_dims)
    if h.shape != shape:
        remedy = "convert a state of nn.GRU, (L * D, B, H), with h.unsqueeze(2)" if h.dim() == 3 else ""
        expanded(layer.name, "h", h, shape, "(L * D, B, 1, H)", remedy)


def _packed_like(name: str, x: PackedSequence, argument: str, given: Any) -> Any:
    """Return the data (1, P) of an argument that must be packed like x."""
    if given is None:
        return None
    check_type(name, argument, given, PackedSequence, "a PackedSequence like x", "pack it with the lengths of x")
    has_lengths = torch.equal(given.batch_sizes, x.batch_sizes)
    require(name, argument, has_lengths, "packed with the lengths of x", "other lengths")
    has_order = torch.equal(_order_of(given), _order_of(x))
    require(name, argument, has_order, "packed in the order of x", "another order")
    return given.data.unsqueeze(0)


def _order_of(packed_x: PackedSequence) -> Tensor:
    """Return the batch index of each sorted sequence."""
    order = packed_x.sorted_indices
    return torch.arange(int(packed_x.batch_sizes[0]), device="cpu") if order is None else order.cpu()
