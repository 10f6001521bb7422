"""The checks of a call of MinGRU, MinLSTM and their cells. In a scripted module, only shapes are checked."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..check import (
    check_dt,
    check_lengths,
    check_like,
    check_one_state,
    check_reset,
    dims,
    embed_remedy,
    expanded,
    expectation,
)
from ..ops.graph import is_autocast, untraced
from ..ops.shape import accumulate_dtype
from .base import Base
from .shared import weight_of


class CheckedCalls(Base):
    """Raise errors that name the wrong argument."""

    cell: str
    input_dims: int
    hidden_dims: int
    num_layers: int
    num_directions: int
    batch_first: bool
    is_timed: bool

    @untraced
    def _check(
        self, x: Tensor, h: Tensor | None, reset: Tensor | None, lengths: Tensor | None, dt: Tensor | None
    ) -> None:
        """Raise an error if an argument is invalid."""
        if not isinstance(x, Tensor):
            raise TypeError(expectation(self.name, "x", "a tensor", type(x).__name__, "use torch.as_tensor"))
        letters = "(B, S, {})" if self.batch_first else "(S, B, {})"
        if x.dim() != 3 or x.shape[2] != self.input_dims:
            expected = f"{letters.format(self.input_dims)} because input_dims is {self.input_dims}"
            raise ValueError(expectation(self.name, "x", expected, dims(x.shape), embed_remedy(x)))
        batch, steps = x.shape[:2] if self.batch_first else (x.shape[1], x.shape[0])
        self._check_beside(x, h, batch)
        order = "(B, S)" if self.batch_first else "(S, B)"
        check_reset(self.name, reset, x, order)
        check_dt(self.name, dt, x, self.cell, order, autocast=is_autocast(x))
        if lengths is not None:
            check_lengths(self.name, lengths, batch, steps, x.device)

    def _check_packed(
        self, x: PackedSequence, h: Tensor | None, reset: Any, lengths: Any, dt: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        """Raise an error if an argument is invalid for a PackedSequence; return the packed resets and elapsed times."""
        if lengths is not None:
            expected = "None because a PackedSequence has its own lengths"
            raise ValueError(expectation(self.name, "lengths", expected, type(lengths).__name__))
        if x.data.dim() != 2 or x.data.shape[1] != self.input_dims:
            expected = f"packed steps of {self.input_dims} features because input_dims is {self.input_dims}"
            raise ValueError(expectation(self.name, "x", expected, dims(x.data.shape), embed_remedy(x.data)))
        self._check_beside(x.data, h, int(x.batch_sizes[0]))
        packed_reset, packed_dt = self._packed_like(x, "reset", reset), self._packed_like(x, "dt", dt)
        steps, sequence = "(1, steps)", x.data.unsqueeze(0)
        if packed_reset is not None:
            check_reset(self.name, packed_reset.unsqueeze(0), sequence, steps)
        if packed_dt is not None:
            check_dt(self.name, packed_dt.unsqueeze(0), sequence, self.cell, steps, autocast=is_autocast(x.data))
        return packed_reset, packed_dt

    def _packed_like(self, x: PackedSequence, argument: str, given: Any) -> Tensor | None:
        """Return the data of an argument that must be packed like x."""
        if given is None:
            return None
        if not isinstance(given, PackedSequence):
            expected = "a PackedSequence like x"
            remedy = "pack it with the lengths of x"
            raise TypeError(expectation(self.name, argument, expected, type(given).__name__, remedy))
        if not torch.equal(given.batch_sizes, x.batch_sizes):
            raise ValueError(expectation(self.name, argument, "packed with the lengths of x", "other lengths"))
        if not torch.equal(_order_of(given), _order_of(x)):
            raise ValueError(expectation(self.name, argument, "packed in the order of x", "another order"))
        data: Tensor = given.data
        return data

    def _check_beside(self, x: Tensor, h: Tensor | None, batch: int) -> None:
        """Raise an error if x does not fit the weights, or h does not fit x."""
        autocast = is_autocast(x)
        layers: Any = self.layers
        weight = weight_of(layers[0].linear)
        if weight is not None:
            check_like(self.name, "x", x, weight, "the layer's weight", autocast=autocast, ids=True)
        if h is not None:
            check_one_state(self.name, h, "(L * D, B, 1, H)", self.cell)
            check_like(self.name, "h", h, x, "x", or_dtype=accumulate_dtype(x.dtype), autocast=autocast)
            shape = (self.num_layers * self.num_directions, batch, 1, self.hidden_dims)
            if h.shape != shape:
                remedy = "convert a state of nn.GRU, (L * D, B, H), with h.unsqueeze(2)"
                expanded(self.name, "h", h, shape, "(L * D, B, 1, H)", remedy)

    def _check_scripted_call(self, x: Tensor, reset: Tensor | None, dt: Tensor | None) -> None:
        """Check the shapes of the arguments of a scripted layer."""
        if x.dim() != 3 or x.size(2) != self.input_dims:
            letters = "(B, S, " if self.batch_first else "(S, B, "
            raise ValueError(f"{self.name}: x must be {letters}{self.input_dims}), got {x.shape}")
        self._check_scripted(list(x.shape[:2]), reset, dt)

    def _check_scripted(self, shape: list[int], reset: Tensor | None, dt: Tensor | None) -> None:
        """Check the arguments of a scripted module that have one value for each step."""
        if reset is not None and list(reset.shape) != shape:
            raise ValueError(f"{self.name}: reset must be {shape}, got {reset.shape}")
        if dt is not None and list(dt.shape) != shape:
            raise ValueError(f"{self.name}: dt must be {shape}, got {dt.shape}")
        if dt is not None and not self.is_timed:
            raise ValueError(f"{self.name}: dt must be None because this cell takes no elapsed times")


def _order_of(packed_x: PackedSequence) -> Tensor:
    """Return the batch index of each sorted sequence."""
    order = packed_x.sorted_indices
    return torch.arange(int(packed_x.batch_sizes[0]), device="cpu") if order is None else order.cpu()
