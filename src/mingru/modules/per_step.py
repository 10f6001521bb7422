"""Layers of torch in a stack: what computes each time step on its own, and has no state."""

from torch import Tensor, nn

from ..check.forms import PER_STEP, check_call
from ..ops import layout
from ..ops.shape import MaybeList, MaybeTensor, Outputs
from .layer import Composite, data_of, with_data

# No number changes by the value of another.
_OF_NUMBERS = (
    "Identity Dropout AlphaDropout ReLU ReLU6 RReLU LeakyReLU ELU CELU SELU GELU SiLU Mish Softplus Softsign "
    "Tanh Hardtanh Tanhshrink Sigmoid LogSigmoid Hardsigmoid Hardswish Softshrink Hardshrink"
)
_OF_FEATURES = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
OF_TORCH: tuple[type[nn.Module], ...] = (*(getattr(nn, name) for name in _OF_NUMBERS.split()), *_OF_FEATURES)


class PerStep(Composite, role="sequence"):
    """Apply a module of torch to each time step. The output is 0 in the padding."""

    num_states = 0
    _forms = PER_STEP

    def __init__(self, module: nn.Module, input_dims: int, batch_first: bool, num_space_dims: int) -> None:
        super().__init__()
        self.name = type(module).__name__
        # Also on the instance: TorchScript ignores class attributes.
        self.num_states = 0
        self.module = module
        self.input_dims = self.dims_in(module) or input_dims
        self.output_dims = module.out_features if isinstance(module, nn.Linear) else self.input_dims
        self.batch_first = batch_first
        # Features are the last dimension only if there is no space.
        self.num_space_dims = 0 if isinstance(module, _OF_FEATURES) else num_space_dims

    @staticmethod
    def dims_in(module: object) -> int | None:
        """Return the number of input features of a layer or a module of torch, if it says it."""
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            return module.normalized_shape[-1]
        found: int | None = getattr(module, "in_features", getattr(module, "input_dims", None))
        return found

    def _compute(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> Outputs:
        data = data_of(x)
        if lengths is not None:
            # Otherwise a NaN in the padding would reach the gradients of the weights.
            data = layout.without_padding(data, lengths, not self.batch_first)
        data = self.module(data)
        if lengths is not None:
            data = layout.without_padding(data, lengths, not self.batch_first)
        states: list[Tensor] = []
        return with_data(x, data), states

    def default_states(self, x: Tensor, batch: int) -> list[Tensor]:
        """Return no states."""
        return []

    def _check(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> None:
        check_call(self, x, None, None, lengths, None, "mingru")
