"""minGRU and minLSTM layers with torch's interface: names, shapes and types of errors."""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import Self

from ..check.calls import arguments_checked
from ..check.forms import LAYER_OF_TORCH, check_call
from ..check.values import check_type, dims, expectation, name_of, require
from ..modules import gru, scripted
from ..modules.layer import Steps, take_weights
from ..modules.options import Candidate, Gates, Memory, Norm, OutputGate, Residual, arguments_of
from ..ops.graph import is_captured, is_scripting, untraced
from ..ops.shape import MaybeList, MaybeTensor, Outputs, States, copied, without_dims
from .interface import ONE_BLOCK, DropIn, Pair, as_pair, states_of

State = TypeVar("State", Tensor, Pair)


class TypedCall(Protocol[State]):
    """A call, for type checkers. It also takes packed sequences, which TorchScript does not know in `forward`."""

    def __call__(
        self,
        input: Steps,
        hx: State | None = None,
        reset: Steps | None = None,
        lengths: MaybeTensor = None,
        dt: Steps | None = None,
        mask: MaybeTensor = None,
    ) -> tuple[Steps, State]: ...


class DropInLayer(DropIn):
    """Base class of `GRU` and `LSTM`."""

    _forms = LAYER_OF_TORCH
    _size_error = ValueError
    # TorchScript does not support nested lists of parameters.
    __jit_unused_properties__ = (*DropIn.__jit_unused_properties__, "all_weights")

    def _lengths(self, input: Tensor, lengths: MaybeTensor, mask: MaybeTensor) -> MaybeTensor:
        """Return the lengths, or the numbers of valid steps of the mask."""
        if mask is None:
            return lengths
        time_dim = 1 if self.batch_first else 0
        if not is_scripting():
            check_mask(self, mask, input, lengths, time_dim)
        return mask.sum(time_dim)

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
        if x.dim() not in (2, 3) or x.size(-1) != self.input_size or x.size(self._time(x)) == 0:
            letters = "(B, S, " if self.batch_first else "(S, B, "
            raise ValueError(f"{self.name}: input must be {letters}{self.input_size}), S > 0, got {x.shape}")
        scripted.check_shape(self.name, "hx", None if h is None else h[0], self._state_shape(x))
        scripted.check_steps(self.name, list(x.shape[:-1]), reset, dt, self._is_timed)

    def _check(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> None:
        table = check_call(self, x, h, reset, lengths, dt)
        if isinstance(x, Tensor) and x.shape[table["x"].dim("S") or 0] == 0:
            raise RuntimeError(expectation(self.name, "input", "of at least 1 step", dims(x.shape)))

    def _time(self, input: Tensor) -> int:
        return 1 if self.batch_first and input.dim() == 3 else 0

    def _state_shape(self, input: Tensor) -> list[int]:
        batch = list(input.shape[:-1])
        batch.pop(self._time(input))
        return [self.num_layers * self.num_directions] + batch + [self.hidden_size]  # noqa: RUF005 (not in TorchScript)

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """Return the weight, and the bias if there is one, of each layer and direction, in the order of `h_n`.

        With `cell="gru"`, those of the recurrent weights follow.
        """
        directions = [own for layer in self.layers for own in layer.maps_of_directions()]  # type: ignore[operator]
        return [[weight for each in own for weight in each.parameters()] for own in directions]


@untraced
def check_mask(layer: Any, mask: Any, input: Any, lengths: Any, time_dim: int) -> None:
    """Raise an error if the mask is not True for the first steps of each sequence, and only for them."""
    name = layer.name
    require(name, "lengths", lengths is None, "None because mask is given", type(lengths).__name__)
    is_padded = isinstance(input, Tensor) and input.dim() == 3
    require(name, "mask", is_padded, "None unless input is padded and has a batch", type(mask).__name__)
    layer._tables()[0]["mask"].check(layer, mask, input, input.shape)
    if is_captured():
        return  # A graph has no values.
    by_time = mask.transpose(0, time_dim)
    is_valid = bool((by_time[1:] <= by_time[:-1]).all())
    remedy = "to start a new sequence inside, use reset"
    require(name, "mask", is_valid, "True for the first steps of each sequence only", "gaps", remedy)


class GRU(DropInLayer, role="torch", planned=True):
    """Apply a stack of minGRU layers to a sequence, with the interface of `torch.nn.GRU`.

    All time steps are computed in parallel, because no gate depends on the state, except with `cell="gru"`.

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
        cell: Not in torch. "mingru", or "gru" with `mingru.GRU` inside, whose gates see the state. It has no
            `gate`, `candidate`, `min_decay`, `output_gate`, highway and `dt`, and computes one step after the other.
        block_size: Not in torch. Number of features that see each other with `cell="gru"`: the largest divisor of
            H up to this number.
        residual: Not in torch. If True, add each layer's input to its output. "highway" mixes both.
        output_gate: Not in torch. "silu" or None: gate of each layer's output; not with `proj_size`.
        norm: Not in torch. "layer", "rms" or None: norm of each layer's input. For a single feature,
            use None: "layer" raises an error, and "rms" leaves only the sign, with a warning.
        candidate: Not in torch. Activation of the candidate: "positive" (g), "linear" or "tanh". Default: "positive" if
            `gate` is "sigmoid", otherwise "tanh".
        gate: Not in torch. "sigmoid", "signed", "rotation", "quaternion" or "mixed", see `mingru.MinGRU`, or a list
            with one for each layer. From a state of 0, the others learn less: pass `learn_initial_state=True` too.
        min_decay: Not in torch. Lower bound of the decay: a number, or a list with one for each layer.
        learn_initial_state: Not in torch. If True, the initial state is a parameter, which begins at 0,
            or if `gate` is not "sigmoid", is drawn from N(0, 1).
        memory: Not in torch. Number of time steps that a state lasts at first, see `mingru.MinGRU`.
        recompute: Not in torch. If True, backward recomputes pre-activations, see `mingru.MinGRU`.

    Inputs:
        - **input**: Sequence, (S, B, I), (B, S, I) with `batch_first`, (S, I) without a batch, or a
          `torch.nn.utils.rnn.PackedSequence`; dtype and device of the parameters. S is at least 1.
        - **hx**: State before the first step, any real numbers; (L * D, B, H), or (L * D, H) without a batch. Index l *
          D is layer l forward, l * D + 1 its reverse direction. Default: 0, or the learned state.
        - **reset**: Not in torch. Boolean mask with the leading dimensions of `input`; packed if `input` is packed.
          Where True, the state is set to its default before that step.
        - **lengths**: Not in torch. Number of valid steps of each sequence, integers (B,) from 0 to S. `output` is 0 in
          the padding, and `h_n` is the state after the last valid step.
        - **dt**: Not in torch. Time since the step before, with the leading dimensions of `input`; packed if `input` is
          packed. Default: 1. See `mingru.MinGRU`.
        - **mask**: Not in torch. `lengths` as TorchRL passes them: boolean, with the leading dimensions of a padded
          `input`, True for the valid steps, which come first. It is not a reset.

    Outputs:
        - **output**: Output of the last layer, (S, B, D * H), (B, S, D * H), (S, D * H) or packed, like `input`. With
          `proj_size`, P instead of H.
        - **h_n**: State of each layer and direction after the last step of its sequence, with the shape of `hx`.

    Raises:
        ValueError, RuntimeError, TypeError, AttributeError: Same type as `torch.nn.GRU` raises for the same mistake.
            The arguments that torch does not have raise the errors of `mingru.MinGRU`.

    State dict:
        As in `mingru.MinGRU`: the state_dict of one loads into the other. With `proj_size`, also
        `layers.{l}.projections.{d}.weight` (P, H). Two buffers let torch's layers refuse it:
        `load_in_mingru_drop_in_patch`, and `bias_hh_l0` or without bias `weight_hh_l0`; see `mingru.drop_in.patch`.
        `reset_parameters` initializes as `torch.nn.Linear` does.
        `all_weights` has a list [weight, bias] for each layer and direction, in the order of `h_n`; with
        `cell="gru"`, the recurrent weight and bias follow.

    All arguments except `device` and `dtype` are attributes, as in `torch.nn.GRU`; `mode` is "GRU".

    Differences from `torch.nn.GRU`:

    - The equations differ, so the weights of a GRU cannot be loaded. There are no attributes such as `weight_ih_l0` or
      private lists of their names such as `_flat_weights_names`. With `cell="gru"` and `block_size=hidden_size`,
      the equations are the same: its state_dict loads, and `weight_ih_l0` and its like can be read.
    - The linear maps inside are no `torch.nn.Linear`, so that programs that initialize each of them leave these alone.
    - Under autocast, `output` has autocast's dtype and `h_n` is float32.
    - `flatten_parameters` does nothing. `apply` treats the layer as one module.
    - `isinstance(rnn, torch.nn.GRU)` is false outside of `mingru.drop_in.patch`, because `torch.compile` rejects
      every instance of `torch.nn.GRU`.

    Differences from `mingru.MinGRU`: names, order of input dimensions, shape of states and initial state.

    Examples:
        >>> rnn = mingru.drop_in.GRU(10, 20, num_layers=2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10), torch.zeros(2, 3, 20))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
        >>> rnn
        GRU(10, 20, num_layers=2)
        >>> mingru.drop_in.GRU(10, 100, cell="gru")
        GRU(10, 100, cell='gru')
    """

    cell, mode = "mingru", "GRU"

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
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        cell: Literal["mingru", "gru"] = "mingru",
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

    @classmethod
    def from_torch(cls, gru: nn.GRU) -> Self:
        """Return the layer that computes the same as a `torch.nn.GRU`, with its weights, trainable where those are.

        It has one block of `cell="gru"`. The two biases of r become their sum, and so do those of z.

        Raises:
            TypeError: `gru` is no `torch.nn.GRU`.

        Examples:
            >>> mingru.drop_in.GRU.from_torch(torch.nn.GRU(3, 48))
            GRU(3, 48, cell='gru')
        """
        check_type(f"{name_of(cls)}.from_torch", "gru", gru, nn.modules.GRU, "a torch.nn.GRU", "")
        return cls._like(gru, ONE_BLOCK)  # type: ignore[no-any-return]

    def to_torch(self) -> nn.GRU:
        """Return the `torch.nn.GRU` that computes the same, with these weights, which are 0 outside of the blocks.

        Of its two biases of r, and of z, the second is 0.

        Raises:
            ValueError: `cell` is not "gru", or an option is set that `torch.nn.GRU` has not.
        """
        name, got = f"{self.name}.to_torch", repr(self.cell.partition("_")[0])
        require(name, "cell", self.cell == "gru", "'gru', because a minGRU has other equations", got)
        require(name, "proj_size", self.proj_size == 0, "0 because torch.nn.GRU has none", str(self.proj_size))
        names, weight = inspect.signature(gru.GRU).parameters, next(self.parameters())
        rnn = gru.GRU(**{name: getattr(self, name) for name in names if name in vars(self)})
        return take_weights(rnn.to(weight.device, weight.dtype), self).to_torch()

    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> States:
        """Return the output of all steps and the state after the last: see `Inputs` and `Outputs` of the class."""
        lengths = self._lengths(input, lengths, mask)
        output, states = self._forward(input, None if hx is None else [hx], reset, lengths, dt)
        return output, states[0]

    if TYPE_CHECKING:
        __call__: TypedCall[Tensor]  # type: ignore[assignment]


class LSTM(DropInLayer, role="torch", planned=True):
    """Apply a stack of minLSTM layers to a sequence, with the interface of `torch.nn.LSTM`.

    A minLSTM has one state, so `h_n` and `c_n` are equal. The state before the first step is

        s_0 = (h_0 + c_0) / 2

    which is exactly the last state if a program passes the pair on, and 0 where it sets both to 0. A pair (h, zeros) or
    (zeros, c) starts from half of what it has. With `proj_size`, h_n is the projection of c_n, and s_0 = c_0.

    All time steps are computed in parallel, because no gate depends on the state, except with `cell="gru"`.

    Args:
        input_size: Number of input features, I; at least 1.
        hidden_size: Number of state features, H; at least 1.
        num_layers: Number of stacked layers, L.
        bias: If False, the linear maps have no bias. `torch.nn.LSTM` has two biases for each gate, this layer one.
        batch_first: If True, input and output are (B, S, *) instead of (S, B, *). States keep their shape.
        dropout: Dropout probability on the output of every layer except the last.
        bidirectional: If True, each layer has a reverse direction (D = 2, else 1).
        proj_size: Number P of features to which a linear map without bias reduces the output of each layer and
            direction, below H. Default: 0, no map.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.
        cell: Not in torch. "minlstm", "mingru", which has a third fewer weights, or "gru", as in
            `mingru.drop_in.GRU`.
        block_size: Not in torch. Number of features that see each other with `cell="gru"`: the largest divisor of
            H up to this number.
        forget_bias: Not in torch. Number added to the forget gate's bias at initialization. A minGRU, and a layer
            without bias, have no such bias, and take no other value than the default.
        normalize: Not in torch. If False, the gates of a minLSTM are not divided by their sum.
        residual: Not in torch. If True, add each layer's input to its output. "highway" mixes both.
        output_gate: Not in torch. "silu" or None: gate of each layer's output; not with `proj_size`.
        norm: Not in torch. "layer", "rms" or None: norm of each layer's input. For a single feature,
            use None: "layer" raises an error, and "rms" leaves only the sign, with a warning.
        candidate: Not in torch. Activation of the candidate: "positive" (g), "linear" or "tanh". Default: "positive" if
            `gate` is "sigmoid", otherwise "tanh".
        gate: Not in torch. "sigmoid", or with `cell="mingru"` also "signed", "rotation", "quaternion" or "mixed", as in
            `mingru.drop_in.GRU`.
        min_decay: Not in torch. Lower bound of the decay, with `cell="mingru"`: a number, or a list with one for each
            layer.
        learn_initial_state: Not in torch. If True, the initial state is a parameter, which begins at 0,
            or if `gate` is not "sigmoid", is drawn from N(0, 1).
        memory: Not in torch. Number of time steps that a state lasts at first, see `mingru.MinGRU`.
        recompute: Not in torch. If True, backward recomputes pre-activations, see `mingru.MinGRU`.

    Inputs:
        - **input**: As in `mingru.drop_in.GRU`.
        - **hx**: Pair (h_0, c_0): h_0 (L * D, B, H), or (L * D, B, P) with `proj_size`, and c_0 (L * D, B, H); without
          a batch, neither has B. Default: 0, or the learned state.
        - **reset**, **lengths**, **dt**, **mask**: As in `mingru.drop_in.GRU`.

    Outputs:
        - **output**: Output of the last layer, (S, B, D * H), (B, S, D * H), (S, D * H) or packed, like `input`. With
          `proj_size`, P instead of H.
        - **(h_n, c_n)**: State of each layer and direction after the last step of its sequence, with the shapes of
          `hx`. Both are tensors of their own: a change of one in place does not change the other.

    Raises:
        ValueError, RuntimeError, TypeError, AttributeError: Same type as `torch.nn.LSTM` raises for the same mistake;
            TypeError if `hx` is not a pair. The arguments that torch does not have raise the errors of
            `mingru.MinLSTM`.

    State dict:
        As in `mingru.MinLSTM`, or `mingru.MinGRU` with `cell="mingru"`: the state_dict of one loads into the other.
        With `proj_size`, also `layers.{l}.projections.{d}.weight` (P, H). Two buffers as in `mingru.drop_in.GRU`.

    Differences from `torch.nn.LSTM` are those of `mingru.drop_in.GRU` from `torch.nn.GRU`. In addition, there is no
    output gate, so `h_n` is not bounded by 1, and `c_n` is no sum that can count steps.

    Examples:
        >>> rnn = mingru.drop_in.LSTM(10, 20, num_layers=2)
        >>> output, (h_n, c_n) = rnn(torch.randn(5, 3, 10))
        >>> output, (h_n, c_n) = rnn(torch.randn(5, 3, 10), (h_n, c_n))
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]), torch.Size([2, 3, 20]))
        >>> rnn
        LSTM(10, 20, num_layers=2)
    """

    cell, mode = "minlstm", "LSTM"

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
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        cell: Literal["minlstm", "mingru", "gru"] = "minlstm",
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
        self.forget_bias = float(forget_bias)

    def initial(self, batch: int) -> Any:
        """Return the pair of a batch before the first step."""
        return as_pair(super().initial(batch), self.proj_size)

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        hx: Pair | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Pair]:
        """Return the output of all steps and the state after the last: see `Inputs` and `Outputs` of the class."""
        lengths, h = self._lengths(input, lengths, mask), states_of(self.name, hx, self.proj_size)
        output, states = self._forward(input, h, reset, lengths, dt)
        c_n = states[0]
        if self.proj_size == 0:
            return output, (c_n.clone(), c_n)
        projected: list[Tensor] = []
        for layer in self.layers:
            projected += layer.projected(list(c_n[len(projected) :].unbind(0)))  # type: ignore[operator]
        return output, (torch.stack(projected), c_n)

    if TYPE_CHECKING:
        __call__: TypedCall[Pair]  # type: ignore[assignment]
