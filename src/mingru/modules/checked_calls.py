"""The checks of a call of MinGRU, MinLSTM and their cells."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..check import (
    check_kind,
    check_lengths,
    check_one_state,
    check_packing,
    check_steps,
    check_type,
    dims,
    embed_remedy,
    expanded,
    expectation,
    require,
)
from . import scripted
from .marked import GUARDS
from .shared import MaybeList, MaybeTensor
from .stacked import Stacked


class CheckedCalls(Stacked):
    """Raise errors that name the wrong argument."""

    cell: str
    hidden_dims: int
    is_timed: bool
    remedy_for_weights = "train the layer from its initialization"
    """What to do about a state_dict of torch.nn."""

    def _check(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> None:
        if isinstance(x, PackedSequence):
            self._check_packed(x, h, reset, lengths, dt)
            return
        order = "B, S" if self.batch_first else "S, B"
        self._check_x(x, (2,), f"({order}, {self.input_dims})")
        batch, steps = x.shape[:2] if self.batch_first else (x.shape[1], x.shape[0])
        if h is not None:
            self._check_state(x, h[0], batch)
        check_steps(self.name, x, f"({order})", self.cell, reset, dt)
        if lengths is not None:
            check_lengths(self.name, lengths, batch, steps, x.device)

    def _check_packed(self, x: PackedSequence, h: Any, reset: Any, lengths: object, dt: object) -> None:
        expected = "None because a PackedSequence has its own lengths"
        require(self.name, "lengths", lengths is None, expected, type(lengths).__name__)
        if x.data.dim() != 2 or x.data.shape[1] != self.input_dims:
            expected = f"packed steps of {self.input_dims} features because input_dims is {self.input_dims}"
            raise ValueError(expectation(self.name, "x", expected, dims(x.data.shape), embed_remedy(x.data)))
        check_packing(self.name, x)
        self._check_weight(x.data)
        if h is not None:
            self._check_state(x.data, h[0], int(x.batch_sizes[0]))
        packed = self._packed_like(x, "reset", reset), self._packed_like(x, "dt", dt)
        check_steps(self.name, x.data.unsqueeze(0), "(1, steps)", self.cell, *packed)

    def _packed_like(self, x: PackedSequence, argument: str, given: Any) -> Tensor | None:
        """Return the data (1, P) of an argument that must be packed like x."""
        if given is None:
            return None
        remedy = "pack it with the lengths of x"
        check_type(self.name, argument, given, PackedSequence, "a PackedSequence like x", remedy)
        has_lengths = torch.equal(given.batch_sizes, x.batch_sizes)
        require(self.name, argument, has_lengths, "packed with the lengths of x", "other lengths")
        has_order = torch.equal(_order_of(given), _order_of(x))
        require(self.name, argument, has_order, "packed in the order of x", "another order")
        data: Tensor = given.data.unsqueeze(0)
        return data

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        of_torch = next((key for key in state_dict if key.startswith(f"{prefix}weight_ih")), None)
        if of_torch is not None:
            expected = f"weights of {self.name} because the equations differ"
            got = f"{of_torch} of torch.nn"
            # Also if the caller is not strict, as torch does with weights of another shape.
            args[-1].append(expectation(self.name, "state_dict", expected, got, self.remedy_for_weights))
            return
        for name in GUARDS:
            guard = state_dict.pop(prefix + name, None)
            if name in self._buffers:
                # Older files have none.
                state_dict[prefix + name] = torch.tensor(1, device=getattr(guard, "device", None))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_state(self, x: Tensor, h: Any, batch: int) -> None:
        """Raise an error if h does not fit x."""
        check_one_state(self.name, h, "(L * D, B, 1, H)", self.cell)
        check_kind(self.name, "h", h, x)
        shape = (self.num_layers * self.num_directions, batch, 1, self.hidden_dims)
        if h.shape != shape:
            remedy = "convert a state of nn.GRU, (L * D, B, H), with h.unsqueeze(2)" if h.dim() == 3 else ""
            expanded(self.name, "h", h, shape, "(L * D, B, 1, H)", remedy)

    def _check_scripted(self, x: Tensor, h: MaybeList, reset: MaybeTensor, dt: MaybeTensor) -> None:
        order = "B, S" if self.batch_first else "S, B"
        scripted.check_x(self.name, x, [2], order, self.input_dims, self.num_space_dims)
        scripted.check_steps(self.name, list(x.shape[:2]), reset, dt, self.is_timed)


def _order_of(packed_x: PackedSequence) -> Tensor:
    """Return the batch index of each sorted sequence."""
    order = packed_x.sorted_indices
    return torch.arange(int(packed_x.batch_sizes[0]), device="cpu") if order is None else order.cpu()
