"""An estimator for GluonTS with minimal recurrent layers, whose predictors are saved and loaded like others."""

from typing import Any, ClassVar

from .. import drop_in
from . import mixed, require

with require("gluonts[torch]", "gluonts 0.17", __name__):
    from gluonts.core.component import validated
    from gluonts.torch.model.deepar import estimator, lightning_module

__all__ = ["DeepAREstimator", "DeepARLightningModule"]


class DeepARLightningModule(lightning_module.DeepARLightningModule):
    """The network of `DeepAREstimator`. The file of a predictor has its name and its arguments."""

    @validated()
    def __init__(
        self,
        model_kwargs: dict[str, Any],
        options: dict[str, Any],
        lr: float = 1e-3,
        weight_decay: float = 1e-8,
        patience: int = 10,
    ) -> None:
        super().__init__(model_kwargs, lr, weight_decay, patience)
        drop_in.replace(self, **{"cell": "minlstm", **options})


class DeepAREstimator(estimator.DeepAREstimator):
    """Use minimal recurrent layers in `DeepAREstimator`.

    Arguments are those of GluonTS's class. A predictor is saved by `serialize`, and loaded by `Predictor.deserialize`,
    without an import of this module.

    The layers have `residual=True`, `norm="rms"`, and `cell="mingru"` with `gate="mixed"` if `hidden_size` is divisible
    by 8, as the default of 40 is. For other options of `mingru.drop_in.LSTM`, derive a class, and set its attribute
    `options`.

    Examples:
        >>> predictor = DeepAREstimator(freq="M", prediction_length=12).train(dataset)  # doctest: +SKIP

    References:
        GluonTS 0.17, `gluonts/torch/model/deepar/estimator.py`.
    """

    options: ClassVar[dict[str, Any] | None] = None

    def create_lightning_module(self) -> Any:
        """Return the network."""
        given = super().create_lightning_module().__init_args__
        by_default = {"residual": True, "norm": "rms", **mixed(given["model_kwargs"]["hidden_size"])}
        return DeepARLightningModule(**given, options=by_default if self.options is None else self.options)
