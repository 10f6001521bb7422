"""Modules for Darts: `RNNModel(model=MinGRUModule)` and `BlockRNNModel(model=MinGRUBlockModule)`."""

from typing import Any

from . import Replaced, require

with require("darts[torch]", "darts 0.48", __name__):
    from darts.models.forecasting.block_rnn_model import _BlockRNNModule
    from darts.models.forecasting.rnn_model import _RNNModule
    from darts.utils.serialization import add_safe_globals

__all__ = ["MinGRUBlockModule", "MinGRUModule", "MinLSTMBlockModule", "MinLSTMModule"]


class _Loadable(Replaced):
    """Replaces the layers of a module of Darts, and lets `load` find its class."""

    name = "GRU"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # For `load`, which otherwise needs `trusted=True`.
        add_safe_globals([cls])

    def __init__(self, **kwargs: Any) -> None:
        # Lightning stores the arguments in a checkpoint, and passes them when the checkpoint is loaded.
        super().__init__(**{**kwargs, "name": self.name})


class MinGRUModule(_Loadable, _RNNModule):
    """Use minGRU layers in `RNNModel`.

    Pass the class, and two layers: `RNNModel(24, model=MinGRUModule, n_rnn_layers=2, training_length=36)`. Models are
    saved and loaded as usual. If a model is loaded in another program, import this module there.

    The layers have `residual=True` and `candidate="tanh"`, because `RNNModel` feeds its output back. For other options
    of `mingru.drop_in.GRU`, derive a class in an importable module, and set its attribute `options`:

        class Normed(MinGRUModule):
            options = {**MinGRUModule.options, "norm": "rms"}

    References:
        Darts 0.48, `darts/models/forecasting/rnn_model.py`.
    """


class MinLSTMModule(_Loadable, _RNNModule):
    """Use minLSTM layers in `RNNModel`; see `MinGRUModule`. The options are those of `mingru.drop_in.LSTM`."""

    name = "LSTM"


class MinGRUBlockModule(_Loadable, _BlockRNNModule):
    """Use minGRU layers in `BlockRNNModel`; see `MinGRUModule`."""


class MinLSTMBlockModule(_Loadable, _BlockRNNModule):
    """Use minLSTM layers in `BlockRNNModel`; see `MinGRUModule`. The options are those of `mingru.drop_in.LSTM`."""

    name = "LSTM"
