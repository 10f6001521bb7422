"""minGRU and minLSTM cells with torch's interface."""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..check.calls import arguments_checked
from ..check.forms import CELL_OF_TORCH, check_call
from ..check.values import dims, expectation
from ..modules import scripted
from ..modules.cells import RecurrentCell
from ..modules.options import Candidate, Gate, Memory, Norm, arguments_of
from ..ops.shape import MaybeList, MaybeTensor
from .interface import DropIn, Pair, as_pair, states_of


class DropInCell(DropIn, RecurrentCell):
    """Base class of `GRUCell` and `LSTMCell`."""

    _forms = CELL_OF_TORCH
    _size_error = RuntimeError

    def _check_scripted(self, x: Tensor, h: MaybeList, reset: MaybeTensor, dt: MaybeTensor) -> None:
        if x.dim() not in (1, 2) or x.size(-1) != self.input_size:
            raise ValueError(f"{self.name}: input must be (B, {self.input_size}), got {x.shape}")
        batch = list(x.shape[:-1])
        scripted.check_shape(self.name, "hx", None if h is None else h[0], batch + [self.hidden_size])  # noqa: RUF005
        scripted.check_steps(self.name, batch, reset, dt, self._is_timed)

    def _check(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> None:
        if h is not None and isinstance(h[0], Tensor) and h[0].dim() not in (1, 2):
            raise ValueError(expectation(self.name, "hx", "(B, H) or (H,)", dims(h[0].shape)))
        check_call(self, x, h, reset, lengths, dt)


class GRUCell(DropInCell, role="step", planned=True):
    """Compute one step of a one-layer minGRU, with the interface of `torch.nn.GRUCell`.

    Args:
        input_size: Number of input features, I; at least 1.
        hidden_size: Number of state features, H; at least 1.
        bias: If False, the linear map has no bias.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.
        cell: Not in torch. "mingru" or "gru", as in `GRU`.
        block_size: Not in torch. Number of features that see each other with `cell="gru"`: the largest divisor of
            H up to this number.
        norm: Not in torch. "layer", "rms" or None: norm of the input.
        candidate: Not in torch. Activation of the candidate: "positive" (g), "linear" or "tanh". Default: "positive" if
            `gate` is "sigmoid", otherwise "tanh".
        gate: Not in torch. "sigmoid", "signed", "rotation", "quaternion" or "mixed", see `mingru.MinGRU`. From a
            state of 0, the others learn less: pass `learn_initial_state=True` too.
        min_decay: Not in torch. Lower bound of the decay.
        learn_initial_state: Not in torch. If True, the initial state is a parameter, which begins at 0,
            or if `gate` is not "sigmoid", is drawn from N(0, 1).
        memory: Not in torch. Number of time steps that a state lasts at first, see `mingru.MinGRU`.

    Inputs:
        - **input**: Input, (B, I), or (I,) without a batch; dtype and device of the parameters.
        - **hx**: State before the step, any real numbers; (B, H) or (H,). Default: 0, or the learned state.
        - **reset**: Not in torch. Boolean mask, (B,) or a scalar. Where True, the state is set to its default first.
        - **dt**: Not in torch. Time since the step before, (B,) or a scalar tensor. Default: 1.

    Outputs:
        - **hx**: State after the step, with the shape of the input `hx`; float32 under autocast.

    Raises:
        ValueError, RuntimeError, TypeError, AttributeError: Same type as `torch.nn.GRUCell` raises for the same
            mistake. Also RuntimeError for a size of 0, which torch accepts.

    State dict:
        As in a one-layer `GRU`: the state_dict of one loads into the other. The buffer of `GRU` that torch's layer
        refuses is `bias_hh` here, or `weight_hh` without bias.

    As with `GRU`, there is no `weight_ih`, `apply` treats the cell as one module, and `isinstance(cell,
    torch.nn.GRUCell)` is false outside of `mingru.drop_in.patch`.

    Examples:
        >>> cell = mingru.drop_in.GRUCell(10, 20)
        >>> hx = None
        >>> for x in torch.randn(6, 3, 10):  # six steps
        ...     hx = cell(x, hx)
        >>> hx.shape
        torch.Size([3, 20])
    """

    cell = "mingru"

    @arguments_checked()
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        cell: Literal["mingru", "gru"] = "mingru",
        norm: Norm | None = None,
        candidate: Candidate | None = None,
        gate: Gate = "sigmoid",
        min_decay: float = 0.0,
        block_size: int | None = None,
        learn_initial_state: bool = False,
        memory: Memory | None = None,
    ) -> None:
        super().__init__(**arguments_of(locals()))

    def forward(  # type: ignore[override]
        self, input: Tensor, hx: Tensor | None = None, reset: Tensor | None = None, dt: Tensor | None = None
    ) -> Tensor:
        """Return the state after this step: see `Inputs` and `Outputs` of the class."""
        return self._forward(input, None if hx is None else [hx], reset, None, dt)[1][0]

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]


class LSTMCell(DropInCell, role="step", planned=True):
    """Compute one step of a one-layer minLSTM, with the interface of `torch.nn.LSTMCell`.

    The state before the step is (h + c) / 2, as in `mingru.drop_in.LSTM`.

    Args:
        input_size: Number of input features, I; at least 1.
        hidden_size: Number of state features, H; at least 1.
        bias: If False, the linear map has no bias.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.
        cell: Not in torch. "minlstm", "mingru", which has a third fewer weights, or "gru", as in `GRU`.
        block_size: Not in torch. Number of features that see each other with `cell="gru"`: the largest divisor of
            H up to this number.
        forget_bias: Not in torch. Number added to the forget gate's bias at initialization, as in `LSTM`.
        normalize: Not in torch. If False, the gates of a minLSTM are not divided by their sum.
        norm: Not in torch. "layer", "rms" or None: norm of the input.
        candidate: Not in torch. Activation of the candidate: "positive" (g), "linear" or "tanh". Default: "positive" if
            `gate` is "sigmoid", otherwise "tanh".
        gate: Not in torch. "sigmoid", or with `cell="mingru"` also "signed", "rotation", "quaternion" or "mixed".
        min_decay: Not in torch. Lower bound of the decay, with `cell="mingru"`.
        learn_initial_state: Not in torch. If True, the initial state is a parameter, which begins at 0,
            or if `gate` is not "sigmoid", is drawn from N(0, 1).
        memory: Not in torch. Number of time steps that a state lasts at first, see `mingru.MinGRU`.

    Inputs:
        - **input**: Input, (B, I), or (I,) without a batch; dtype and device of the parameters.
        - **hx**: Pair (h, c) before the step, any real numbers; each (B, H) or (H,). Default: 0, or the learned state.
        - **reset**, **dt**: As in `mingru.drop_in.GRUCell`.

    Outputs:
        - **(h, c)**: Pair of two equal tensors after the step, each with the shape of `h`; float32 under autocast.

    Raises:
        ValueError, RuntimeError, TypeError, AttributeError: Same type as `torch.nn.LSTMCell` raises for the same
            mistake. Also RuntimeError for a size of 0, which torch accepts.

    State dict:
        As in a one-layer `LSTM`: the state_dict of one loads into the other. Buffers as in `mingru.drop_in.GRUCell`.

    Examples:
        >>> cell = mingru.drop_in.LSTMCell(10, 20)
        >>> hx = None
        >>> for x in torch.randn(6, 3, 10):  # six steps
        ...     hx = cell(x, hx)
        >>> h, c = hx
        >>> h.shape, c.shape
        (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    cell = "minlstm"

    @arguments_checked()
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        cell: Literal["minlstm", "mingru", "gru"] = "minlstm",
        forget_bias: float = 1.0,
        normalize: bool = True,
        norm: Norm | None = None,
        candidate: Candidate | None = None,
        gate: Gate = "sigmoid",
        min_decay: float = 0.0,
        block_size: int | None = None,
        learn_initial_state: bool = False,
        memory: Memory | None = None,
    ) -> None:
        super().__init__(**arguments_of(locals()))
        self.forget_bias = float(forget_bias)

    def initial(self, batch: int) -> Any:
        """Return the pair of a batch before the first step."""
        return as_pair(super().initial(batch), self.proj_size)

    def forward(  # type: ignore[override]
        self, input: Tensor, hx: Pair | None = None, reset: Tensor | None = None, dt: Tensor | None = None
    ) -> Pair:
        """Return the state after this step: see `Inputs` and `Outputs` of the class."""
        c = self._forward(input, states_of(self.name, hx, self.proj_size), reset, None, dt)[1][0]
        return c.clone(), c

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]
