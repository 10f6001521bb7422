"""A recurrent model for rsl_rl, which computes all trajectories of an update in one pass."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import drop_in
from ..check import values
from . import OPTIONS, require

with require("rsl-rl-lib", "rsl_rl 5.5", __name__):
    from rsl_rl.models import RNNModel
    from rsl_rl.modules import RNN
    from rsl_rl.utils import unpad_trajectories

__all__ = ["MinGRUModel"]


class _OnePass(RNN):
    """Replaces the layers of rsl_rl's module, and its call over padded trajectories."""

    def __init__(self, rnn: Any) -> None:
        torch.nn.Module.__init__(self)
        self.rnn = rnn
        self.hidden_state = None

    def forward(self, input: Tensor, masks: Tensor | None = None, hidden_state: Any = None) -> Any:
        if masks is None or hidden_state is None:
            return super().forward(input, masks, hidden_state)
        x = unpad_trajectories(input, masks)
        # The trajectories of an environment follow one another, and fill its steps.
        num_steps, batch = x.shape[:2]
        lengths = masks.sum(0)
        starts = lengths.cumsum(0) - lengths
        goes_on = starts % num_steps == 0
        reset = masks.new_zeros(batch * num_steps).index_fill(0, starts[~goes_on], True)
        is_pair = isinstance(hidden_state, tuple)
        hx = [each[:, goes_on] for each in (hidden_state if is_pair else (hidden_state,))]
        return self.rnn(x, tuple(hx) if is_pair else hx[0], reset=reset.view(batch, num_steps).T)[0]


class MinGRUModel(RNNModel):
    """Use minGRU or minLSTM layers in rsl_rl, as actor, critic or both.

        config["actor"]["class_name"] = "mingru.integrations.rsl_rl:MinGRUModel"

    The arguments are those of rsl_rl's `RNNModel`, with "gru" as the default `rnn_type`; "lstm" is minLSTM.
    `rnn_options` are options of `mingru.drop_in.GRULike`. The default candidate is "tanh", and
    `residual` is True by default.

    In an update, the trajectories are not computed as padded sequences, but in one call over the steps of the
    environments, with resets. Models are saved, loaded and exported as usual.

    References:
        rsl_rl 5.5, `rsl_rl/models/rnn_model.py` and `rsl_rl/storage/rollout_storage.py`.
    """

    def __init__(
        self,
        *args: Any,
        rnn_type: str = "gru",
        rnn_hidden_dim: int = 256,
        rnn_num_layers: int = 1,
        rnn_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        options = {"cell": "mingru" if rnn_type == "gru" else "minlstm", **OPTIONS, **(rnn_options or {})}
        values.check_choice("MinGRUModel", "rnn_type", rnn_type, ("gru", "lstm"))
        expected = "False because rsl_rl begins episodes with 0"
        values.require("MinGRUModel", "learn_initial_state", not options.get("learn_initial_state"), expected, "True")
        super().__init__(*args, rnn_hidden_dim=rnn_hidden_dim, **kwargs)
        layer = drop_in.GRULike if rnn_type == "gru" else drop_in.LSTMLike
        self.rnn = _OnePass(layer(self.obs_dim, rnn_hidden_dim, rnn_num_layers, **options))

    def as_jit(self) -> Any:
        """Return the module that rsl_rl exports to TorchScript."""
        return _exported(super().as_jit)

    def as_onnx(self, verbose: bool = False) -> Any:
        """Return the module that rsl_rl exports to ONNX."""
        return _exported(super().as_onnx, verbose)


def _exported(export: Callable[..., Any], *args: Any) -> Any:
    with warnings.catch_warnings():
        # In the block, rsl_rl takes the layers for torch's. It builds none.
        warnings.filterwarnings("ignore", "patch: ", UserWarning)
        with drop_in.patch():
            return export(*args)
