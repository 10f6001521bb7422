"""Models of pytorch-forecasting with minGRU or minLSTM layers: import them from here instead."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import drop_in
from ..drop_in.base import Pair
from . import require

with require("pytorch-forecasting", "pytorch-forecasting 1.8", __name__):
    from pytorch_forecasting import models
    from pytorch_forecasting.models.nn.rnn import RNN

__all__ = ["GRU", "LSTM", "DeepAR", "RecurrentNetwork", "TemporalFusionTransformer"]


def _zeros(rnn: drop_in.GRU | drop_in.LSTM, x: Tensor) -> Tensor:
    batch = x.shape[0 if rnn.batch_first else 1]
    return x.new_zeros(rnn.num_layers * rnn.num_directions, batch, rnn.hidden_size)


class GRU(drop_in.GRU):
    """Add to [mingru.drop_in.GRU][] what the models call: `enforce_sorted`, and methods for states.

    A length may be 0, also where all of them are: such a sequence keeps its initial state.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, hx: Tensor | None = None, lengths: Tensor | None = None, enforce_sorted: bool = True
    ) -> tuple[Tensor, Tensor]:
        if x.shape[1 if self.batch_first else 0] == 0:
            return x.new_zeros(*x.shape[:2], self.output_dims), self.init_hidden_state(x) if hx is None else hx
        return super().forward(x, hx, lengths=lengths)

    def init_hidden_state(self, x: Tensor) -> Tensor:
        return _zeros(self, x)

    def handle_no_encoding(self, hidden_state: Tensor, no_encoding: Tensor, initial_hidden_state: Tensor) -> Tensor:
        return torch.where(no_encoding, initial_hidden_state, hidden_state)

    def repeat_interleave(self, hidden_state: Tensor, n_samples: int) -> Tensor:
        return hidden_state.repeat_interleave(n_samples, 1)


class LSTM(drop_in.LSTM):
    """Add to [mingru.drop_in.LSTM][] what `GRU` adds, for pairs of states."""

    def forward(  # type: ignore[override]
        self, x: Tensor, hx: Pair | None = None, lengths: Tensor | None = None, enforce_sorted: bool = True
    ) -> tuple[Tensor, Pair]:
        if x.shape[1 if self.batch_first else 0] == 0:
            return x.new_zeros(*x.shape[:2], self.output_dims), self.init_hidden_state(x) if hx is None else hx
        return super().forward(x, hx, lengths=lengths)

    def init_hidden_state(self, x: Tensor) -> Pair:
        return _zeros(self, x), _zeros(self, x)

    def handle_no_encoding(self, hidden_state: Pair, no_encoding: Tensor, initial_hidden_state: Pair) -> Pair:
        (h, c), (h_0, c_0) = hidden_state, initial_hidden_state
        return torch.where(no_encoding, h_0, h), torch.where(no_encoding, c_0, c)

    def repeat_interleave(self, hidden_state: Pair, n_samples: int) -> Pair:
        h, c = hidden_state
        return h.repeat_interleave(n_samples, 1), c.repeat_interleave(n_samples, 1)


class _Replaced:
    """Replaces the layers of a model of pytorch-forecasting."""

    options: ClassVar[dict[str, Any]] = {"residual": True, "candidate": "tanh"}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model: Any = self
        for name, old in list(model.named_children()):
            if isinstance(old, RNN):
                layer = GRU if isinstance(old, nn.GRU) else LSTM
                of_torch = {"batch_first": True, "dropout": old.dropout}
                setattr(self, name, layer(old.input_size, old.hidden_size, old.num_layers, **of_torch, **self.options))


class RecurrentNetwork(_Replaced, models.RecurrentNetwork):
    """Use minGRU or minLSTM layers in `RecurrentNetwork`.

    Arguments are those of pytorch-forecasting's class: `cell_type` is "GRU" for minGRU, or "LSTM" for minLSTM (the
    default). Choose `rnn_layers=2`. Checkpoints are saved and loaded as usual, with this class.

    The layers have `residual=True` and `candidate="tanh"`, because the model feeds its output back. For other options
    of [mingru.drop_in.GRU][], derive a class, and set its attribute `options`.

    Examples:
        >>> model = RecurrentNetwork.from_dataset(dataset, cell_type="GRU", rnn_layers=2)  # doctest: +SKIP

    References:
        pytorch-forecasting 1.8, `pytorch_forecasting/models/nn/rnn.py`.
    """


class DeepAR(_Replaced, models.DeepAR):
    """Use minGRU or minLSTM layers in `DeepAR`; see `RecurrentNetwork`."""


class TemporalFusionTransformer(_Replaced, models.TemporalFusionTransformer):
    """Use minLSTM layers in `TemporalFusionTransformer`; see `RecurrentNetwork`. `lstm_layers` is their number."""
