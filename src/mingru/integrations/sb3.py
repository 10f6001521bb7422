"""Recurrent policies for `RecurrentPPO` of sb3-contrib, which compute each sequence in one pass, with resets.

A policy of sb3-contrib steps through a sequence in Python as soon as an episode starts inside it.
"""

from typing import Any

import torch
from torch import Tensor

from . import WithPairs, require

with require("sb3-contrib", "sb3-contrib 2.9", __name__):
    from sb3_contrib.ppo_recurrent import CnnLstmPolicy, MlpLstmPolicy, MultiInputLstmPolicy

__all__ = ["MinGRUCnnPolicy", "MinGRUMultiInputPolicy", "MinGRUPolicy"]


class _OnePass(MlpLstmPolicy):
    """Replaces the LSTMs of a policy, and the loop over its steps."""

    # Factor of the initial weights of the first layer of a minGRU or minLSTM.
    input_gain = 1.0

    def __init__(self, *args: Any, lstm_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lstm_kwargs = lstm_kwargs or {}
        for name in ("lstm_actor", "lstm_critic"):
            old = getattr(self, name)
            if old is not None:
                options: dict[str, Any] = {"batch_first": False, **self.lstm_kwargs}
                lstm = WithPairs(type(self).__name__, old.input_size, old.hidden_size, old.num_layers, **options)
                first = lstm.layer.layers[0]
                for each in (first.linear, first.align):
                    if lstm.layer.cell != "gru" and each is not None:
                        each.weight.data *= self.input_gain
                setattr(self, name, lstm)
        schedule = kwargs["lr_schedule"] if "lr_schedule" in kwargs else args[2]
        self.optimizer = self.optimizer_class(self.parameters(), lr=schedule(1), **self.optimizer_kwargs)

    @staticmethod
    def _process_sequence(
        features: Tensor, lstm_states: tuple[Tensor, Tensor], episode_starts: Tensor, lstm: WithPairs
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the output of all steps (N, H), and the states after the last step of each sequence."""
        batch = lstm_states[0].shape[1]
        x, starts = (torch.unflatten(each, 0, [batch, -1]).transpose(0, 1) for each in (features, episode_starts))
        out, states = lstm(x, lstm_states, reset=starts != 0)
        return out.transpose(0, 1).flatten(0, 1), states

    def _get_constructor_parameters(self) -> dict[str, object]:
        return {
            **super()._get_constructor_parameters(),
            "lstm_hidden_size": self.lstm_output_dim,
            "n_lstm_layers": self.lstm_actor.num_layers,
            "shared_lstm": self.shared_lstm,
            "enable_critic_lstm": self.enable_critic_lstm,
            "lstm_kwargs": self.lstm_kwargs,
        }


class MinGRUPolicy(_OnePass):
    """Use recurrent layers of this library in `RecurrentPPO`, for observations that are vectors.

        h_t = h_0 where an episode starts, else h_{t-1}, before each step; h_0 = 0

    Pass the class instead of the name of a policy. The arguments are those of `MlpLstmPolicy`; `lstm_kwargs` are
    options of `mingru.GRU`, or `cell="mingru"` or "minlstm" and options of that layer, by default `candidate="tanh"`
    and `residual=True`. Models are saved and loaded as usual.

    The initial weights of the first layer of a minGRU or minLSTM are 3 times those of `torch.nn.Linear`, because
    observations that are not normalized are often small. A subclass may have another factor as `input_gain`. It is 1 in
    the policies for images and dictionaries.

    Examples:
        >>> from sb3_contrib import RecurrentPPO  # doctest: +SKIP
        >>> model = RecurrentPPO(MinGRUPolicy, "CartPole-v1", policy_kwargs={"lstm_hidden_size": 64})  # doctest: +SKIP

    References:
        sb3-contrib 2.9, `sb3_contrib/common/recurrent/policies.py`.
    """

    input_gain = 3.0


class MinGRUCnnPolicy(_OnePass, CnnLstmPolicy):
    """Use recurrent layers behind a convolutional network, for images; see `MinGRUPolicy`."""


class MinGRUMultiInputPolicy(_OnePass, MultiInputLstmPolicy):
    """Use recurrent layers for observations that are dictionaries; see `MinGRUPolicy`."""
