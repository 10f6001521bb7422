"""Recurrent layers for SpeechBrain: `rnn_class: !name:mingru.integrations.speechbrain.MinGRU` in a YAML file."""

from typing import Any

from torch import Tensor

from .. import drop_in
from ..drop_in.interface import Pair
from . import require

with require("speechbrain", "speechbrain 1.1", __name__):
    from speechbrain.nnet import RNN

__all__ = ["MinGRU", "MinLSTM"]


class _Replaced:
    """Replaces the layers of SpeechBrain's class, and its packing of sequences."""

    layer: type[drop_in.GRU] | type[drop_in.LSTM]

    def __init__(
        self,
        hidden_size: int,
        input_shape: Any = None,
        input_size: int | None = None,
        num_layers: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        re_init: bool = True,
        bidirectional: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, input_shape, input_size, re_init=False)  # type: ignore[call-arg]
        options = {"norm": "rms", "residual": True, **options}
        options |= {"bias": bias, "dropout": dropout, "bidirectional": bidirectional, "batch_first": True}
        module: Any = self
        module.rnn = self.layer(module.rnn.input_size, hidden_size, num_layers, **options)

    def forward(self, x: Tensor, hx: Tensor | Pair | None = None, lengths: Tensor | None = None) -> Any:
        module: Any = self
        x = x.flatten(2)
        if lengths is None:
            return module.rnn(x, hx)
        # SpeechBrain's lengths are parts of S. It rounds them down, and cuts off what is padding in all sequences.
        lengths = (lengths * x.shape[1]).long()
        out, states = module.rnn(x, hx, lengths=lengths)
        return out[:, : int(lengths.max())], states


class MinGRU(_Replaced, RNN.GRU):
    """Use minGRU layers wherever SpeechBrain takes an `rnn_class`, such as in `CRDNN` and `RNNLM`.

        rnn_class: !name:mingru.integrations.speechbrain.MinGRU
            candidate: tanh

    Arguments, inputs and outputs are those of `speechbrain.nnet.RNN.GRU`. Further arguments are options of
    `mingru.drop_in.GRU`. The layers have `norm="rms"` and `residual=True`. `re_init` has no effect, because the
    layers have no recurrent weights. Relative lengths are passed to the layers as `lengths`, without packing.

    References:
        SpeechBrain 1.1, `speechbrain/nnet/RNN.py`.
    """

    layer = drop_in.GRU


class MinLSTM(_Replaced, RNN.LSTM):
    """Use minLSTM layers in SpeechBrain; see `MinGRU`. Further arguments are options of `mingru.drop_in.LSTM`."""

    layer = drop_in.LSTM
