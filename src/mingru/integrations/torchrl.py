"""Recurrent modules for TorchRL, which compute all trajectories of a batch in one pass."""

from inspect import signature
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..check import values
from ..models.block import LAYERS
from ..modules.stacked import Recurrent
from . import WithPairs, WithStatesOfTorch, require

with require("torchrl", "torchrl 0.14", __name__):
    from torchrl.modules import GRUModule, LSTMModule

__all__ = ["MinGRUModule", "MinLSTMModule"]


class _OnePass:
    """Replaces the layers of a module of TorchRL, and its scan with resets."""

    layers: type[WithStatesOfTorch] = WithStatesOfTorch

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, **options: Any) -> None:
        of_layer = {"cell", "num_layers", *signature(LAYERS[options.get("cell", "gru")]).parameters}
        names = options.keys() & (signature(super().__init__).parameters.keys() - of_layer)
        of_module = {name: options.pop(name) for name in names}
        name = type(self).__name__
        for option in ("bidirectional", "dropout"):
            expected = "left out, as with TorchRL's scan"
            values.require(name, option, not options.get(option), expected, repr(options.get(option)))
        layers = self.layers(name, input_size, hidden_size, num_layers, **options)
        super().__init__(**{self.name: layers}, **of_module)  # type: ignore[attr-defined]
        # The form of a call with all its resets. Set here, because the constructor would compile TorchRL's own scan.
        self.recurrent_backend = "scan"


class MinGRUModule(_OnePass, GRUModule):
    """Apply recurrent layers of this library to a tensordict, as TorchRL's `GRUModule` does.

    In recurrent mode, all trajectories in the rows of a batch are computed in one call. The state before a step with
    `is_init` is 0. As in TorchRL, the state after the last step of a trajectory is written at that step; elsewhere, 0
    is written.

    Args:
        input_size: Number of input features.
        hidden_size: Number of state features.
        num_layers: Number of layers.
        **options: Arguments of TorchRL's module: `in_key` or `in_keys`, such as ["observation", "state"], `out_key` or
            `out_keys`, such as ["features", ("next", "state")], and `default_recurrent_mode`. `recurrent_backend`,
            and what else chooses among TorchRL's own computations, has no effect. Others are options of `mingru.GRU`,
            or `cell="mingru"` or "minlstm" and options of that layer, by default `candidate="tanh"` and
            `residual=True`.

    Examples:
        >>> from tensordict import TensorDict  # doctest: +SKIP
        >>> module = MinGRUModule(3, 8, in_keys=["obs", "h"], out_keys=["y", ("next", "h")])  # doctest: +SKIP
        >>> data = TensorDict({"obs": torch.randn(2, 3), "is_init": torch.ones(2, 1).bool()}, [2])  # doctest: +SKIP
        >>> module(data)["y"].shape  # doctest: +SKIP
        torch.Size([2, 8])

    References:
        TorchRL 0.14, `torchrl/modules/tensordict_module/rnn.py`.
    """

    name = "gru"

    def _gru_scan_with_resets(
        self, input: Tensor, hidden_in: Tensor, hidden: Tensor, is_init: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _in_one_pass(self.gru.layer, input, hidden, is_init)


class MinLSTMModule(_OnePass, LSTMModule):
    """Apply recurrent layers to a tensordict, as TorchRL's `LSTMModule` does; see `MinGRUModule`.

    The keys are those of the input and of two states, which are the same.
    """

    name, layers = "lstm", WithPairs

    def _lstm_scan_with_resets(
        self, input: Tensor, hidden0_in: Tensor, hidden1_in: Tensor, hidden: tuple[Tensor, Tensor], is_init: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, states = _in_one_pass(self.lstm.layer, input, hidden[0], is_init)
        return y, states, states


def _in_one_pass(rnn: Recurrent, x: Tensor, h: Tensor, is_init: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output (B, S, H), and the states (B, S, L, H) at the last step of each trajectory, 0 elsewhere.

    h (L, B, H) is the state of each row.
    """
    states = rnn.all_states(x, h.unsqueeze(2), is_init)
    # The output of a GRU is the state of its last layer.
    y = states[-1] if rnn.cell == "gru" and not rnn.residual else rnn(x, h.unsqueeze(2), is_init)[0]
    goes_on = F.pad(~is_init[:, 1:], (0, 1))
    return y, states.permute(1, 2, 0, 3).masked_fill(goes_on[:, :, None, None], 0.0)
