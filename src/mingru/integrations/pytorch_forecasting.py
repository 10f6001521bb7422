"""Models of pytorch-forecasting with layers of this library: import them from here instead."""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import drop_in
from ..drop_in.layers import DropInLayer
from ..ops.names_of_torch import pytree
from . import OPTIONS, require

with require("pytorch-forecasting", "pytorch-forecasting 1.8", __name__):
    from pytorch_forecasting import models
    from pytorch_forecasting.models.nn.rnn import RNN

__all__ = ["GRU", "LSTM", "DeepAR", "RecurrentNetwork", "TemporalFusionTransformer"]


class _WithStates(DropInLayer):
    """Adds what the models call: `enforce_sorted`, and methods for states, each of them one tensor or a pair."""

    def forward(self, x: Tensor, hx: Any = None, lengths: Tensor | None = None, enforce_sorted: bool = True) -> Any:  # type: ignore[override]
        if x.shape[1 if self.batch_first else 0] == 0:
            return x.new_zeros(*x.shape[:2], self.output_dims), self.init_hidden_state(x) if hx is None else hx
        return super().forward(x, hx, lengths=lengths)

    def init_hidden_state(self, x: Tensor) -> Any:
        batch = x.shape[0 if self.batch_first else 1]
        zeros = x.new_zeros(self.num_layers * self.num_directions, batch, self.hidden_size)
        return zeros if self.mode == "GRU" else (zeros, zeros.clone())

    def handle_no_encoding(self, hidden_state: Any, no_encoding: Tensor, initial_hidden_state: Any) -> Any:
        return pytree.tree_map(partial(torch.where, no_encoding), initial_hidden_state, hidden_state)

    def repeat_interleave(self, hidden_state: Any, n_samples: int) -> Any:
        return pytree.tree_map(lambda h: h.repeat_interleave(n_samples, 1), hidden_state)


class GRU(_WithStates, drop_in.GRU, role="custom"):  # type: ignore[misc]
    """Add to `mingru.drop_in.GRU` what the models call: `enforce_sorted`, and methods for states.

    A length may be 0, also where all of them are: such a sequence keeps its initial state.
    """


class LSTM(_WithStates, drop_in.LSTM, role="custom"):  # type: ignore[misc]
    """Add to `mingru.drop_in.LSTM` what `GRU` adds, for pairs of states."""


class _Replaced(nn.Module):
    """Replaces the layers of a model of pytorch-forecasting."""

    options: ClassVar[dict[str, Any]] = OPTIONS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, old in list(self.named_children()):
            if isinstance(old, RNN):
                layer = GRU if isinstance(old, nn.GRU) else LSTM
                of_torch = {"batch_first": True, "dropout": old.dropout}
                setattr(self, name, layer(old.input_size, old.hidden_size, old.num_layers, **of_torch, **self.options))


class RecurrentNetwork(_Replaced, models.RecurrentNetwork):
    """Use layers of this library in `RecurrentNetwork`.

    Arguments are those of pytorch-forecasting's class: `cell_type` is "GRU" for `mingru.drop_in.GRU`, or "LSTM" (the
    default) for `mingru.drop_in.LSTM`. Choose `rnn_layers=2`. Checkpoints are saved and loaded as usual, with this
    class.

    The layers have `cell="gru"`, because gates that see the state learn best here. For other options, such as
    {"residual": True, "candidate": "tanh"}, derive a class, and set its attribute `options`.

    Examples:
        >>> model = RecurrentNetwork.from_dataset(dataset, cell_type="GRU", rnn_layers=2)  # doctest: +SKIP

    References:
        pytorch-forecasting 1.8, `pytorch_forecasting/models/nn/rnn.py`.
    """

    options: ClassVar[dict[str, Any]] = {"cell": "gru"}


class DeepAR(_Replaced, models.DeepAR):
    """Use minGRU or minLSTM layers in `DeepAR`; see `RecurrentNetwork`.

    The layers have `residual=True` and `candidate="tanh"`, because the model feeds its output back.
    """


class TemporalFusionTransformer(_Replaced, models.TemporalFusionTransformer):
    """Use minLSTM layers in `TemporalFusionTransformer`; see `RecurrentNetwork`. `lstm_layers` is their number.

    The layers have the defaults of `mingru.drop_in.LSTM`, because the model itself adds their input to their output.
    """

    options: ClassVar[dict[str, Any]] = {}
