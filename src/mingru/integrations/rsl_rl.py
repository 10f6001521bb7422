"""A recurrent model for rsl_rl, which computes all trajectories of an update in one pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..check import values
from . import WithStatesOfTorch, require

with require("rsl-rl-lib", "rsl_rl 5.5", __name__):
    from rsl_rl.models import RNNModel
    from rsl_rl.modules import RNN
    from rsl_rl.utils import unpad_trajectories

__all__ = ["MinGRUModel"]


class _OnePass(RNN):
    """Replaces the layers of rsl_rl's module, and its call over padded trajectories."""

    def __init__(self, rnn: nn.Module) -> None:
        torch.nn.Module.__init__(self)
        self.rnn = rnn
        self.hidden_state = None

    def forward(self, input: Tensor, masks: Tensor | None = None, hidden_state: Tensor | None = None) -> Any:
        if masks is None or hidden_state is None:
            return super().forward(input, masks, hidden_state)
        x = unpad_trajectories(input, masks)
        # The trajectories of an environment follow one another, and fill its steps.
        num_steps, batch = x.shape[:2]
        lengths = masks.sum(0)
        starts = lengths.cumsum(0) - lengths
        goes_on = starts % num_steps == 0
        reset = masks.new_zeros(batch * num_steps).index_fill(0, starts[~goes_on], True)
        return self.rnn(x, hidden_state[:, goes_on], reset=reset.view(batch, num_steps).T)[0]


class MinGRUModel(RNNModel):
    """Use recurrent layers of this library in rsl_rl, as actor, critic or both.

        config["actor"]["class_name"] = "mingru.integrations.rsl_rl:MinGRUModel"

    The arguments are those of rsl_rl's `RNNModel`, with "gru" as the only `rnn_type`. `rnn_options` are options of
    `mingru.GRU`, or {"cell": "mingru"} or {"cell": "minlstm"} and options of that layer, by default `candidate="tanh"`
    and `residual=True`.

    In an update, the trajectories are not computed as padded sequences, but in one call over the steps of the
    environments, with resets. Models are saved, loaded and exported as usual.

    References:
        rsl_rl 5.5, `rsl_rl/models/rnn_model.py` and `rsl_rl/storage/rollout_storage.py`.
    """

    def __init__(
        self,
        *args: object,
        rnn_type: str = "gru",
        rnn_hidden_dim: int = 256,
        rnn_num_layers: int = 1,
        rnn_options: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        values.check_choice("MinGRUModel", "rnn_type", rnn_type, ("gru",))
        super().__init__(*args, rnn_hidden_dim=rnn_hidden_dim, **kwargs)
        options: dict[str, Any] = {"batch_first": False, **(rnn_options or {})}
        layers = WithStatesOfTorch("MinGRUModel", self.obs_dim, rnn_hidden_dim, rnn_num_layers, **options)
        self.rnn = _OnePass(layers)

    def as_jit(self) -> nn.Module:
        """Return the module that rsl_rl exports to TorchScript."""
        return _exported(super().as_jit)

    def as_onnx(self, verbose: bool = False) -> nn.Module:
        """Return the module that rsl_rl exports to ONNX."""
        return _exported(super().as_onnx, verbose)


def _exported(export: Callable[..., nn.Module], *args: bool) -> nn.Module:
    # Here, rsl_rl takes the layers for torch's. It builds none.
    of_torch, nn.GRU = nn.GRU, WithStatesOfTorch  # type: ignore[assignment, misc]
    try:
        return export(*args)
    finally:
        nn.GRU = of_torch  # type: ignore[misc]
