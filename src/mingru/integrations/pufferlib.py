"""Recurrent layers for PufferLib: `MinGRUWrapper` for version 3, and the network `MinGRU` for version 4.

This module does not import PufferLib, because its versions have different classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import WithStatesOfTorch

__all__ = ["MinGRU", "MinGRUWrapper"]


class MinGRUWrapper(nn.Module):
    """Add recurrent layers to a policy of PufferLib 3, between `encode_observations` and `decode_actions`.

    Use it in place of `pufferlib.models.LSTMWrapper`, with `use_rnn` on. As there, the policy is initialized again, and
    the state is not reset where an episode ends.

    Args:
        env: Environment of PufferLib; `single_observation_space` is read.
        policy: Module with PufferLib's methods `encode_observations` and `decode_actions`.
        input_size: Number of features that `encode_observations` returns.
        hidden_size: Number of features that `decode_actions` takes.
        num_layers: Number of layers, L. PufferLib stores L * `hidden_size` state features, the attribute `hidden_size`.
        **options: Options of `mingru.GRU`, or `cell="mingru"` or "minlstm" and options of that layer, by default
            `candidate="tanh"` and `residual=True`.

    Examples:
        >>> policy = MinGRUWrapper(vecenv.driver_env, policy)  # doctest: +SKIP
        >>> trainer = pufferl.PuffeRL(config, vecenv, policy)  # doctest: +SKIP

    References:
        PufferLib 3.0, `pufferlib/models.py` and `pufferlib/pufferl.py`.
    """

    def __init__(
        self, env: Any, policy: Any, input_size: int = 128, hidden_size: int = 128, num_layers: int = 1, **options: Any
    ) -> None:
        super().__init__()
        self.obs_shape = tuple(env.single_observation_space.shape)
        self.policy = policy
        self.is_continuous = policy.is_continuous
        for name, parameter in policy.named_parameters():
            if "layer_norm" not in name and "bias" in name:
                nn.init.zeros_(parameter)
            elif "layer_norm" not in name and "weight" in name and parameter.ndim > 1:
                nn.init.orthogonal_(parameter)
        # PufferLib looks for an attribute of this name.
        self.lstm = WithStatesOfTorch("MinGRUWrapper", input_size, hidden_size, num_layers, **options)
        self.hidden_size = num_layers * hidden_size

    def forward_eval(self, observations: Tensor, state: dict[str, Any]) -> tuple[object, Tensor]:
        """Return logits and values (B, 1) of one step, and write the next state into `state`."""
        logits, values, _ = self._steps(observations, 1, state)
        return logits, values

    def forward(self, observations: Tensor, state: dict[str, Any]) -> tuple[object, Tensor]:
        """Return logits (B * S, *) and values (B, S) of whole sequences (B, S, *), or of one step (B, *)."""
        num_steps = observations.shape[1] if observations.dim() == len(self.obs_shape) + 2 else 1
        logits, values, state["hidden"] = self._steps(observations.reshape(-1, *self.obs_shape), num_steps, state)
        return logits, values.reshape(-1, num_steps)

    def _steps(self, observations: Tensor, num_steps: int, state: dict[str, Any]) -> tuple[object, Tensor, Tensor]:
        x = self.policy.encode_observations(observations, state=state).unflatten(0, (-1, num_steps))
        h = state["lstm_h"]
        if h is not None:
            h = h.unflatten(1, (self.lstm.num_layers, -1)).transpose(0, 1).contiguous()
        out, h = self.lstm(x, h)
        # `lstm_c` is not needed, and stays as it is.
        state["lstm_h"] = h.transpose(0, 1).flatten(1).detach()
        logits, values = self.policy.decode_actions(out.flatten(0, 1))
        return logits, values, out


class MinGRU(nn.Module):
    """Network of recurrent layers for a policy of PufferLib 4, in place of a class of `pufferlib.models`.

        Policy(encoder, decoder, MinGRU(hidden_size, num_layers=2))

    As with PufferLib's networks, the state is not reset where an episode ends, and training begins from the initial
    state. To continue with weights of PufferLib's own `MinGRU`, see `mingru.convert.from_pufferlib`.

    Args:
        hidden_size: Number of features, H.
        num_layers: Number of layers, L.
        **options: As in `MinGRUWrapper`.

    References:
        PufferLib 4, `pufferlib/models.py`.
    """

    def __init__(self, hidden_size: int, num_layers: int = 1, **options: Any) -> None:
        super().__init__()
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.rnn = WithStatesOfTorch("MinGRU", hidden_size, hidden_size, num_layers, **options)

    def initial_state(self, batch_size: int, device: torch.device | str) -> tuple[Tensor]:
        """Return the state (L, B, H) in a tuple."""
        return (torch.zeros(self.num_layers, batch_size, self.hidden_size, device=device),)

    def forward_eval(self, h: Tensor, state: tuple[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
        """Return the output (B, H) of one step, and the next state."""
        out, last = self.rnn(h.unsqueeze(1), state[0])
        return out.squeeze(1), (last,)

    def forward_train(self, h: Tensor) -> Tensor:
        """Return the output (B, S, H) of whole sequences."""
        return self.rnn(h)[0]  # type: ignore[no-any-return]
