"""Layers, and cells for one step, of this library with torch's interface: names, order of arguments, and states."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from ..check.calls import arguments_checked
from ..check.forms import CELL_OF_TORCH, LAYER_OF_TORCH
from ..modules import scripted
from ..modules.cells import RecurrentCell
from ..modules.options import Candidate, Gate, Gates, Memory, Norm, OutputGate, Residual, arguments_of
from ..ops.shape import MaybeList, MaybeTensor, Outputs, States, copied, without_dims
from .interface import DropIn, Pair, states_of


class DropInLayer(DropIn):
    """Base class of `GRULike` and `LSTMLike`."""

    _forms = LAYER_OF_TORCH

    @arguments_checked()
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        cell: Literal["gru", "mingru", "minlstm"] = "gru",
        forget_bias: float = 1.0,
        normalize: bool = True,
        residual: Residual = False,
        norm: Norm | None = None,
        candidate: Candidate | None = None,
        gate: Gates = "sigmoid",
        min_decay: float | Sequence[float] = 0.0,
        output_gate: OutputGate | None = None,
        block_size: int | None = None,
        learn_initial_state: bool = False,
        memory: Memory | None = None,
        recompute: bool | None = None,
    ) -> None:
        super().__init__(**arguments_of(locals()))

    def _compute(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> Outputs:
        if isinstance(x, PackedSequence) or x.dim() == 3:
            out, states = self._sequences(x, None if h is None else [h[0].unsqueeze(2)], reset, lengths, dt)
            return out, [without_dims(states[0], [2])]
        batch_dim = 0 if self.batch_first else 1
        reset = None if reset is None else reset.unsqueeze(batch_dim)
        dt = None if dt is None else dt.unsqueeze(batch_dim)
        before = None if h is None else [h[0].unsqueeze(1).unsqueeze(2)]
        out, states = self._sequences(x.unsqueeze(batch_dim), before, reset, None, dt)
        return copied(out.squeeze(batch_dim)), [without_dims(states[0], [2, 1])]

    def _check_scripted(self, x: Tensor, h: MaybeList, reset: MaybeTensor, dt: MaybeTensor) -> None:
        if x.dim() not in (2, 3) or x.size(-1) != self.input_size:
            letters = "(B, S, " if self.batch_first else "(S, B, "
            raise ValueError(f"{self.name}: input must be {letters}{self.input_size}), got {x.shape}")
        batch = list(x.shape[:-1])
        batch.pop(1 if self.batch_first and x.dim() == 3 else 0)
        shape = [self.num_layers * self.num_directions] + batch + [self.hidden_size]  # noqa: RUF005 (not in TorchScript)
        scripted.check_shape(self.name, "hx", None if h is None else h[0], shape)
        scripted.check_steps(self.name, list(x.shape[:-1]), reset, dt)


class GRULike(DropInLayer, role="torch", planned=True):
    """Apply a stack of layers of a cell of this library to a sequence, with the interface of `torch.nn.GRU`.

    `cell` says which equations it has: "mingru", "minlstm" or "gru" are those of `mingru.MinGRU`, `mingru.MinLSTM` and
    `mingru.GRU`. `mingru.drop_in.patch` and `mingru.drop_in.replace` build it in place of a `torch.nn.GRU`.

    Args:
        input_size: Number of input features, I; at least 1.
        hidden_size: Number of state features, H; at least 1.
        num_layers: Number of stacked layers, L.
        bias: If False, the linear maps have no bias. `torch.nn.GRU` has two biases for each gate, this layer one.
        batch_first: If True, input and output are (B, S, *) instead of (S, B, *). States keep their shape.
        dropout: Dropout probability on the output of every layer except the last.
        bidirectional: If True, each layer has a reverse direction (D = 2, else 1).
        proj_size: Number P of features to which a linear map without bias reduces the output of each layer and
            direction, below H. The state keeps H features. Default: 0, no map.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.
        cell: "gru", "mingru" or "minlstm". All steps of the last two are computed in parallel, because no gate
            depends on the state. "gru" has no `gate`, `candidate`, `min_decay`, `output_gate`, highway and `dt`.
        forget_bias: Number added to the forget gate's bias of a minLSTM at initialization.
        normalize: If False, the gates of a minLSTM are not divided by their sum.
        residual: If True, add each layer's input to its output. "highway" mixes both.
        norm: "layer", "rms" or None: norm of each layer's input. For a single feature, use None: "layer" raises an
            error, and "rms" leaves only the sign, with a warning.
        candidate: Activation of the candidate: "positive" (g), "linear" or "tanh". Default: "positive" if `gate` is
            "sigmoid", otherwise "tanh".
        gate: Of a minGRU: "sigmoid", "signed", "rotation", "quaternion" or "mixed", see `mingru.MinGRU`, or a list
            with one for each layer. From a state of 0, the others learn less: pass `learn_initial_state=True` too.
        min_decay: Lower bound of the decay of a minGRU: a number, or a list with one for each layer.
        output_gate: "silu" or None: gate of each layer's output, of a minGRU or minLSTM; not with `proj_size`.
        block_size: Number of features that see each other with `cell="gru"`: the largest divisor of H up to this
            number. Default: all of them.
        learn_initial_state: If True, the initial state is a parameter, which begins at 0, or if `gate` is not
            "sigmoid", is drawn from N(0, 1).
        memory: Number of time steps that a state lasts at first, see `mingru.MinGRU`.
        recompute: If True, backward recomputes pre-activations, see `mingru.MinGRU`.

    Inputs:
        - **input**: Sequence, (S, B, I), (B, S, I) with `batch_first`, (S, I) without a batch, or a
          `torch.nn.utils.rnn.PackedSequence`; dtype and device of the parameters.
        - **hx**: State before the first step, any real numbers; (L * D, B, H), or (L * D, H) without a batch. Index l *
          D is layer l forward, l * D + 1 its reverse direction. Default: 0, or the learned state.
        - **reset**: Boolean mask with the leading dimensions of `input`; packed if `input` is packed. Where True, the
          state is set to its default before that step.
        - **lengths**: Number of valid steps of each sequence, integers (B,) from 0 to S. `output` is 0 in the padding,
          and `h_n` is the state after the last valid step.
        - **dt**: Time since the step before, with the leading dimensions of `input`; packed if `input` is packed.
          Default: 1. See `mingru.MinGRU`.

    Outputs:
        - **output**: Output of the last layer, (S, B, D * H), (B, S, D * H), (S, D * H) or packed, like `input`. With
          `proj_size`, P instead of H.
        - **h_n**: State of each layer and direction after the last step of its sequence, with the shape of `hx`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A size, shape, device, length or option is invalid, or options do not fit.

    State dict:
        As in the layer of `mingru` with this cell: the state_dict of one loads into the other. With `proj_size`, also
        `layers.{l}.projections.{d}.weight` (P, H). Two buffers let torch's layers refuse it:
        `load_in_mingru_drop_in_patch`, and `bias_hh_l0` or without bias `weight_hh_l0`; see `mingru.drop_in.patch`.

    All arguments except `device` and `dtype` are attributes, as in `torch.nn.GRU`; `mode` is "GRU".

    Differences from `torch.nn.GRU`:

    - The weights are others, so those of a GRU cannot be loaded, and there are no attributes such as `weight_ih_l0`,
      `all_weights` or private lists of their names such as `_flat_weights_names`.
    - The linear maps inside are no `torch.nn.Linear`, so that programs that initialize each of them leave these alone.
    - Under autocast, `output` has autocast's dtype and `h_n` is float32.
    - `flatten_parameters` does nothing. `apply` treats the layer as one module.
    - `isinstance(rnn, torch.nn.GRU)` is false, also in a block of `mingru.drop_in.patch`.

    Examples:
        >>> rnn = mingru.drop_in.GRULike(10, 20, num_layers=2, cell="mingru")
        >>> output, h_n = rnn(torch.randn(5, 3, 10), torch.zeros(2, 3, 20))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
        >>> rnn
        GRULike(10, 20, num_layers=2, cell='mingru')
    """

    mode = "GRU"

    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | None = None,
    ) -> States:
        """Return the output of all steps and the state after the last: see `Inputs` and `Outputs` of the class."""
        output, states = self._forward(input, None if hx is None else [hx], reset, lengths, dt)
        return output, states[0]


class LSTMLike(DropInLayer, role="torch", planned=True):
    """Apply a stack of layers of a cell of this library to a sequence, with the interface of `torch.nn.LSTM`.

    Each cell has one state, so `h_n` and `c_n` are equal. The state before the first step is

        s_0 = (h_0 + c_0) / 2

    which is exactly the last state if a program passes the pair on, and 0 where it sets both to 0. A pair (h, zeros) or
    (zeros, c) starts from half of what it has. With `proj_size`, h_n is the projection of c_n, and s_0 = c_0.

    Attributes, weights, errors and differences from torch's layer are those of `mingru.drop_in.GRULike`; `mode` is
    "LSTM". In addition, there is no output gate, so `h_n` is not bounded by 1, and `c_n` cannot count steps as a sum.

    Args:
        input_size: Number of input features, I; at least 1.
        hidden_size: Number of state features, H; at least 1.
        num_layers: Number of stacked layers, L.
        bias: If False, the linear maps have no bias. `torch.nn.GRU` has two biases for each gate, this layer one.
        batch_first: If True, input and output are (B, S, *) instead of (S, B, *). States keep their shape.
        dropout: Dropout probability on the output of every layer except the last.
        bidirectional: If True, each layer has a reverse direction (D = 2, else 1).
        proj_size: Number P of features to which a linear map without bias reduces the output of each layer and
            direction, below H. The state keeps H features. Default: 0, no map.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.
        cell: "gru", "mingru" or "minlstm". All steps of the last two are computed in parallel, because no gate
            depends on the state. "gru" has no `gate`, `candidate`, `min_decay`, `output_gate`, highway and `dt`.
        forget_bias: Number added to the forget gate's bias of a minLSTM at initialization.
        normalize: If False, the gates of a minLSTM are not divided by their sum.
        residual: If True, add each layer's input to its output. "highway" mixes both.
        norm: "layer", "rms" or None: norm of each layer's input. For a single feature, use None: "layer" raises an
            error, and "rms" leaves only the sign, with a warning.
        candidate: Activation of the candidate: "positive" (g), "linear" or "tanh". Default: "positive" if `gate` is
            "sigmoid", otherwise "tanh".
        gate: Of a minGRU: "sigmoid", "signed", "rotation", "quaternion" or "mixed", see `mingru.MinGRU`, or a list
            with one for each layer. From a state of 0, the others learn less: pass `learn_initial_state=True` too.
        min_decay: Lower bound of the decay of a minGRU: a number, or a list with one for each layer.
        output_gate: "silu" or None: gate of each layer's output, of a minGRU or minLSTM; not with `proj_size`.
        block_size: Number of features that see each other with `cell="gru"`: the largest divisor of H up to this
            number. Default: all of them.
        learn_initial_state: If True, the initial state is a parameter, which begins at 0, or if `gate` is not
            "sigmoid", is drawn from N(0, 1).
        memory: Number of time steps that a state lasts at first, see `mingru.MinGRU`.
        recompute: If True, backward recomputes pre-activations, see `mingru.MinGRU`.

    Inputs:
        - **hx**: Pair (h_0, c_0): h_0 (L * D, B, H), or (L * D, B, P) with `proj_size`, and c_0 (L * D, B, H); without
          a batch, neither has B. Default: 0, or the learned state.
        - **input**, **reset**, **lengths**, **dt**: As in `mingru.drop_in.GRULike`.

    Outputs:
        - **output**: As in `mingru.drop_in.GRULike`.
        - **(h_n, c_n)**: State of each layer and direction after the last step of its sequence, with the shapes of
          `hx`. Both are tensors of their own: a change of one in place does not change the other.

    Examples:
        >>> rnn = mingru.drop_in.LSTMLike(10, 20, num_layers=2, cell="minlstm")
        >>> output, (h_n, c_n) = rnn(torch.randn(5, 3, 10))
        >>> output, (h_n, c_n) = rnn(torch.randn(5, 3, 10), (h_n, c_n))
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]), torch.Size([2, 3, 20]))
        >>> rnn
        LSTMLike(10, 20, num_layers=2, cell='minlstm')
    """

    mode, has_pair = "LSTM", True

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        hx: Pair | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | None = None,
    ) -> tuple[Tensor, Pair]:
        """Return the output of all steps and the state after the last: see `Inputs` and `Outputs` of the class."""
        output, states = self._forward(input, states_of(self.name, hx, self.proj_size), reset, lengths, dt)
        c_n = states[0]
        if self.proj_size == 0:
            return output, (c_n.clone(), c_n)
        projected: list[Tensor] = []
        for layer in self.layers:
            projected += layer.projected(list(c_n[len(projected) :].unbind(0)))  # type: ignore[operator]
        return output, (torch.stack(projected), c_n)


class DropInCell(DropIn, RecurrentCell):
    """Base class of `GRULikeCell` and `LSTMLikeCell`."""

    _forms = CELL_OF_TORCH

    @arguments_checked()
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        cell: Literal["gru", "mingru", "minlstm"] = "gru",
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


class GRULikeCell(DropInCell, role="step", planned=True):
    """Compute one step of a one-layer `mingru.drop_in.GRULike`, with the interface of `torch.nn.GRUCell`.

    Args:
        input_size: Number of input features, I; at least 1.
        hidden_size: Number of state features, H; at least 1.
        bias: If False, the linear map has no bias.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.
        cell: "gru", "mingru" or "minlstm". Options are those of `mingru.drop_in.GRULike`.
        forget_bias: Number added to the forget gate's bias of a minLSTM at initialization.
        normalize: If False, the gates of a minLSTM are not divided by their sum.
        norm: "layer", "rms" or None: norm of the input.
        candidate: Activation of the candidate: "positive" (g), "linear" or "tanh".
        gate: Of a minGRU: "sigmoid", "signed", "rotation", "quaternion" or "mixed".
        min_decay: Lower bound of the decay of a minGRU.
        block_size: Number of features that see each other with `cell="gru"`.
        learn_initial_state: If True, the initial state is a parameter.
        memory: Number of time steps that a state lasts at first.

    Inputs:
        - **input**: Input, (B, I), or (I,) without a batch; dtype and device of the parameters.
        - **hx**: State before the step, any real numbers; (B, H) or (H,). Default: 0, or the learned state.
        - **reset**: Boolean mask, (B,) or a scalar. Where True, the state is set to its default first.
        - **dt**: Time since the step before, (B,) or a scalar tensor. Default: 1.

    Outputs:
        - **hx**: State after the step, with the shape of the input `hx`; float32 under autocast.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A size, shape, device or option is invalid, or options do not fit.

    State dict:
        As in a one-layer `GRULike`: the state_dict of one loads into the other. The buffer that torch's cell refuses is
        `bias_hh` here, or `weight_hh` without bias.

    Examples:
        >>> cell = mingru.drop_in.GRULikeCell(10, 20, cell="mingru")
        >>> hx = None
        >>> for x in torch.randn(6, 3, 10):  # six steps
        ...     hx = cell(x, hx)
        >>> hx.shape
        torch.Size([3, 20])
    """

    def forward(  # type: ignore[override]
        self, input: Tensor, hx: Tensor | None = None, reset: Tensor | None = None, dt: Tensor | None = None
    ) -> Tensor:
        """Return the state after this step: see `Inputs` and `Outputs` of the class."""
        return self._forward(input, None if hx is None else [hx], reset, None, dt)[1][0]


class LSTMLikeCell(DropInCell, role="step", planned=True):
    """Compute one step of a one-layer `mingru.drop_in.LSTMLike`, with the interface of `torch.nn.LSTMCell`.

    The state before the step is (h + c) / 2, as in `LSTMLike`. All else is as in `mingru.drop_in.GRULikeCell`.

    Args:
        input_size: Number of input features, I; at least 1.
        hidden_size: Number of state features, H; at least 1.
        bias: If False, the linear map has no bias.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.
        cell: "gru", "mingru" or "minlstm". Options are those of `mingru.drop_in.GRULike`.
        forget_bias: Number added to the forget gate's bias of a minLSTM at initialization.
        normalize: If False, the gates of a minLSTM are not divided by their sum.
        norm: "layer", "rms" or None: norm of the input.
        candidate: Activation of the candidate: "positive" (g), "linear" or "tanh".
        gate: Of a minGRU: "sigmoid", "signed", "rotation", "quaternion" or "mixed".
        min_decay: Lower bound of the decay of a minGRU.
        block_size: Number of features that see each other with `cell="gru"`.
        learn_initial_state: If True, the initial state is a parameter.
        memory: Number of time steps that a state lasts at first.

    Inputs:
        - **hx**: Pair (h, c) before the step, any real numbers; each (B, H) or (H,). Default: 0, or the learned state.
        - **input**, **reset**, **dt**: As in `mingru.drop_in.GRULikeCell`.

    Outputs:
        - **(h, c)**: Pair of two equal tensors after the step, each with the shape of `h`; float32 under autocast.

    Examples:
        >>> cell = mingru.drop_in.LSTMLikeCell(10, 20, cell="minlstm")
        >>> hx = None
        >>> for x in torch.randn(6, 3, 10):  # six steps
        ...     hx = cell(x, hx)
        >>> h, c = hx
        >>> h.shape, c.shape
        (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    has_pair = True

    def forward(  # type: ignore[override]
        self, input: Tensor, hx: Pair | None = None, reset: Tensor | None = None, dt: Tensor | None = None
    ) -> Pair:
        """Return the state after this step: see `Inputs` and `Outputs` of the class."""
        c = self._forward(input, states_of(self.name, hx, self.proj_size), reset, None, dt)[1][0]
        return c.clone(), c
