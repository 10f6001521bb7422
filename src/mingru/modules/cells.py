"""Cells, which compute one step of a layer, for loops in the caller's code."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.types import Device

from ..check.calls import arguments_checked
from ..check.forms import CELL
from ..ops.call import Layout
from ..ops.layout import as_sequence
from ..ops.shape import MaybeList, MaybeTensor, Outputs, reshaped
from . import scripted
from .layer import typed_as
from .options import Candidate, Gate, Memory, Norm, arguments_of
from .stacked import Recurrent

# The options of a layer that a cell does not have.
ONE_LAYER: dict[str, Any] = {"num_layers": 1, "batch_first": True, "dropout": 0.0, "bidirectional": False}
ONE_LAYER |= {"residual": False, "output_gate": None, "recompute": None}


class RecurrentCell(Recurrent, role="step"):
    """Compute one step of one layer; the base class of `MinGRUCell` and `MinLSTMCell`."""

    _forms = CELL

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments, **ONE_LAYER)

    def forward(  # type: ignore[override]
        self, x: Tensor, h: Tensor | None = None, reset: Tensor | None = None, dt: Tensor | None = None
    ) -> Tensor:
        """Return the state after this step: see `Inputs` and `Outputs` of the class."""
        return self._forward(x, None if h is None else [h], reset, None, dt)[1][0]

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self) -> Any: ...  # type: ignore[override]

    def _compute(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> Outputs:
        sequence, before, reset, dt = as_sequence(x, None if h is None else h[0], reset, dt, 2)
        batch = sequence.size(0)
        if before is None:
            state = self._states(sequence, None, batch)[0]
        else:
            state = self._as_state(sequence, before, [batch, 1, self.hidden_dims])
        # The state, not the output, because the state stays float32 under autocast.
        out, states = self._run_layers(sequence, [state], reset, dt, Layout(False))
        return out, [reshaped(states[0], list(x.shape[:-1]) + [self.hidden_dims])]  # noqa: RUF005

    def _check_scripted(self, x: Tensor, h: MaybeList, reset: MaybeTensor, dt: MaybeTensor) -> None:
        scripted.check_x(self.name, x, [0, 1], "B", self.input_dims, self.num_space_dims)
        batch = list(x.shape[:-1])
        scripted.check_shape(self.name, "h", None if h is None else h[0], batch + [self.hidden_dims])  # noqa: RUF005
        scripted.check_steps(self.name, batch, reset, dt)


class MinGRUCell(RecurrentCell, planned=True):
    """Compute one step of a minimal gated recurrent unit.

        z = sigma(W_z x + b_z)
        h' = (1 - z) h + z g(W_h x + b_h)

    Symbols, weights, options and other gates are those of a one-layer `mingru.MinGRU`.

    Args:
        input_dims: Number of input features, I.
        hidden_dims: Number of state features, H.
        bias: If False, the linear maps have no bias.
        norm: "layer", "rms" or None: norm of the input.
        candidate: "positive" (g), "linear" or "tanh". Default: "positive" if `gate` is "sigmoid", otherwise "tanh".
        gate: "sigmoid", "signed", "rotation", "quaternion" or "mixed".
        min_decay: Lower bound of the decay.
        learn_initial_state: If True, the initial state is a parameter.
        memory: Number of time steps that a state lasts at first, see `mingru.MinGRU`.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.

    Inputs:
        - **x**: Input, (B, I), or (I,) without a batch. It has the dtype and device of the parameters.
        - **h**: State before the step, (B, H) or (H,), any real numbers. The dtype is that of x, or float32 if x is
          bfloat16 or float16. Default: the initial state, which is learned, or g(0) = 0.5, or 0 if "sigmoid" has
          another candidate.
        - **reset**: Boolean mask, (B,) or a scalar. Where True, the state is set to the initial state before the step.
        - **dt**: Time since the step before, (B,) or a scalar tensor; see the guide "Irregular time series".
          Default: 1.

    Outputs:
        - **h'**: State after the step, (B, H) or (H,). It is differentiable.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A size, shape, device, norm, candidate or gate is invalid.

    State dict:
        As in a one-layer `MinGRU` without `residual`: the state_dict of one loads into the other.

    Numerics:
        As in `MinGRU`. Under autocast, the state stays in float32.

    The differences from `torch.nn.GRUCell` are those between `MinGRU` and `torch.nn.GRU`. By default, `h=None` means
    0.5, not 0.

    Examples:
        >>> cell = mingru.MinGRUCell(input_dims=3, hidden_dims=64)
        >>> h = None
        >>> for x in torch.randn(5, 10, 3):  # five steps
        ...     h = cell(x, h)
        >>> h.shape
        torch.Size([10, 64])

    References:
        Feng et al. 2024, "Were RNNs All We Needed?", section 3.1 and appendix B.
    """

    cell = "mingru"

    @arguments_checked()
    def __init__(
        self,
        input_dims: int,
        hidden_dims: int,
        bias: bool = True,
        *,
        norm: Norm | None = None,
        candidate: Candidate | None = None,
        gate: Gate = "sigmoid",
        min_decay: float = 0.0,
        learn_initial_state: bool = False,
        memory: Memory | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(**arguments_of(locals()))


class MinLSTMCell(RecurrentCell, planned=True):
    """Compute one step of a minimal long short-term memory.

        f = sigma(W_f x + b_f)      i = sigma(W_i x + b_i)
        h' = f / (f + i) h + i / (f + i) g(W_h x + b_h)

    or, with `normalize=False`, h' = f h + i g(W_h x + b_h), whose state may grow.

    Symbols, weights and options are those of a one-layer `mingru.MinLSTM`.

    Args:
        input_dims: Number of input features, I.
        hidden_dims: Number of state features, H.
        bias: If False, the linear maps have no bias.
        norm: "layer", "rms" or None: norm of the input.
        candidate: "positive" (g), "linear" or "tanh".
        learn_initial_state: If True, the initial state is a parameter.
        memory: Number of time steps that a state lasts at first, see `mingru.MinGRU`.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.
        forget_bias: Added to the forget gate's bias at initialization. Requires `bias=True`.
        normalize: If False, the gates are not divided by their sum.

    Inputs:
        - **x**: Input, (B, I) or (I,).
        - **h**: State before the step, (B, H) or (H,).
        - **reset**: Boolean mask of sequences to reset.
        - **dt**: Time since the step before, (B,) or a scalar tensor; see the guide "Irregular time series".
          Default: 1.

    Outputs:
        - **h'**: State after the step, (B, H) or (H,).

    State dict:
        As in a one-layer `MinLSTM` without `residual`: the state_dict of one loads into the other.

    Numerics:
        As in `MinGRUCell`.

    Unlike `torch.nn.LSTMCell`, it has no cell state.

    Examples:
        >>> cell = mingru.MinLSTMCell(input_dims=3, hidden_dims=64, forget_bias=1.0)
        >>> h = cell(torch.randn(10, 3))
        >>> cell(torch.randn(10, 3), h).shape
        torch.Size([10, 64])

    References:
        Feng et al. 2024, "Were RNNs All We Needed?", section 3.2 and appendix B.
    """

    cell = "minlstm"

    @arguments_checked()
    def __init__(
        self,
        input_dims: int,
        hidden_dims: int,
        bias: bool = True,
        *,
        forget_bias: float = 0.0,
        normalize: bool = True,
        norm: Norm | None = None,
        candidate: Candidate | None = "positive",
        learn_initial_state: bool = False,
        memory: Memory | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(**arguments_of(locals()))
