"""Models for NeuralForecast with minGRU or minLSTM layers, which are saved and loaded like others."""

from typing import Any, ClassVar

from . import Replaced, mixed, require

with require("neuralforecast", "neuralforecast 3.3", __name__):
    from neuralforecast import models
    from neuralforecast.core import MODEL_FILENAME_DICT

__all__ = ["MinDeepAR", "MinGRU", "MinLSTM"]


class _Loadable(Replaced):
    """Replaces the layers of a model, and lets `NeuralForecast.load` find its class."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        MODEL_FILENAME_DICT[cls.__name__.lower()] = cls


class MinGRU(_Loadable, models.GRU):
    """Use minGRU layers in NeuralForecast's `GRU`.

        NeuralForecast([MinGRU(h=24, input_size=48)], freq="MS")

    Arguments are those of NeuralForecast's class. Models are saved and loaded as usual. If a model is loaded in another
    program, import this module there before.

    The layers have `residual=True` and `candidate="tanh"`. For other options of `mingru.drop_in.GRU`, derive a class
    in an importable module, and set its attribute `options`.

    References:
        NeuralForecast 3.3, `neuralforecast/models/gru.py` and `neuralforecast/core.py`.
    """


class MinLSTM(_Loadable, models.LSTM):
    """Use minLSTM layers in NeuralForecast's `LSTM`; see `MinGRU`. The options are those of `mingru.drop_in.LSTM`."""


class MinDeepAR(_Loadable, models.DeepAR):
    """Use minimal recurrent layers in NeuralForecast's `DeepAR`; see `MinGRU`.

    The layers have `residual=True`, and `cell="mingru"` with `gate="mixed"` if `lstm_hidden_size` is divisible by 8, as
    the default of 128 is; otherwise they are minLSTM with `norm="rms"`.
    """

    options: ClassVar[Any] = property(
        lambda self: {"residual": True, **(mixed(self.hist_encoder.hidden_size) or {"norm": "rms"})}
    )
