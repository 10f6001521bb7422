"""The residual block around a recurrent layer."""

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Unpack

from ..check.calls import arguments_checked
from ..check.forms import BLOCK, Form, Shape, check_call, check_states
from ..check.names import unknown_argument
from ..check.values import check_choice, check_dropout, check_flag, check_int, check_number, name_of, reworded
from ..modules.gru import GRU
from ..modules.layer import Composite, Layer, weight_of
from ..modules.level import NORMS
from ..modules.mingru import MinGRU
from ..modules.minlstm import MinLSTM
from ..modules.options import Candidate, Gates, Memory, Norm, OutputGate, arguments_of_class, not_default
from ..ops import layout
from ..ops.modes import is_scripting
from ..ops.shape import MaybeList, MaybeTensor, Outputs
from .causal_conv import CausalConv, plus_convolved

LAYERS = {"mingru": MinGRU, "minlstm": MinLSTM, "gru": GRU}
# Arguments of a layer that a block sets.
SET_BY_THE_BLOCK = ("input_dims", "hidden_dims", "num_layers", "batch_first", "residual")


class LayerOptions(TypedDict, total=False):
    """Options of the layer that a block passes on, for type checkers."""

    bias: bool
    bidirectional: bool
    candidate: Candidate | None
    gate: Gates
    min_decay: float | Sequence[float]
    output_gate: OutputGate | None
    learn_initial_state: bool
    memory: Memory | None
    recompute: bool | None
    forget_bias: float
    normalize: bool
    block_size: int | None
    device: torch.device | str | int | None
    dtype: torch.dtype | None


class BlockOptions(LayerOptions, total=False):
    """Options of a block, for type checkers."""

    cell: Literal["mingru", "minlstm", "gru"]
    expansion: float
    conv: int | None
    mlp: float | None
    norm: Norm
    dropout: float
    checkpoint: bool


class Block(Composite, role="sequence", planned=True):
    """Apply a residual block around a recurrent layer to a sequence.

        x_t = x_t + conv(x)_t           if `conv`
        x_t = x_t + W rnn(norm(x))_t
        x_t = x_t + mlp(norm(x_t))      if `mlp`

    where conv is causal and depthwise, and the norms, W and the MLP act on each step.

    Args:
        dims: Number of features of input and output.
        cell: "mingru", "minlstm" or "gru".
        expansion: The state has `round(expansion * dims)` features.
        conv: Kernel size of the convolution, at least 2, or None.
        mlp: The MLP has `round(mlp * dims)` hidden features and GELU; None for no MLP.
        norm: "rms" or "layer".
        dropout: Dropout probability of the outputs of W and of the MLP. Used in training only.
        checkpoint: If True, training recomputes the block in the backward pass instead of storing its activations.
            With weights of `torch.func.functional_call`, compute the gradients inside of that call: after it, the block
            is computed again with its own weights, as every module is in `torch.utils.checkpoint`.
        **layer_options: `bias`, `bidirectional`, `candidate`, `gate`, `min_decay`, `output_gate`,
            `learn_initial_state`, `memory`, `recompute`, `forget_bias`, `normalize`, `block_size`, `device` and `dtype`
            of `mingru.MinGRU`, `mingru.MinLSTM` or `mingru.GRU`. `bias`, `device` and `dtype` apply to the other
            parts too.

    Inputs:
        - **x**: Sequence, (B, S, dims).
        - **h**: List of states before the first step: the state of the layer, (D, B, 1, H), and, with `conv`, the last
          inputs of the convolution, (1, B, conv - 1, dims), the oldest first. Default: the initial state of the layer,
          and zeros.
        - **reset**: Bool mask, (B, S). Where True, both states are set to their default before that step.
        - **lengths**: Number of valid steps of each sequence, integers (B,) from 0 to S. `out` is 0 in the padding.
        - **dt**: Time since the step before, at the first step since `h`, (B, S), for the layer; the convolution does
          not depend on it.

    Outputs:
        - **out**: Sequence, (B, S, dims).
        - **h**: List of the states after the last valid step, so that `block(x2, h)` continues.

        All outputs are differentiable.

    Raises:
        TypeError: An argument has the wrong type or dtype, or an option is unknown.
        ValueError: A size, shape, device, option or number of states is invalid.

    State dict:
        `rnn` is the layer with its norm, `out` is W. `conv.weight` (conv, dims) has the weight of the current step
        first. `mlp` has the norm, the first and the second linear map as 0, 1 and 3.

    Examples:
        >>> block = mingru.models.Block(64, expansion=1.5, conv=4, mlp=2)
        >>> out, h = block(torch.randn(10, 128, 64))
        >>> out.shape, [state.shape for state in h]
        (torch.Size([10, 128, 64]), [torch.Size([1, 10, 1, 96]), torch.Size([1, 10, 3, 64])])
        >>> out, h = block(torch.randn(10, 1, 64), h)  # the next step

    References:
        Feng et al. 2024, "Were RNNs All We Needed?", appendix C, and the authors' code.
    """

    _forms = BLOCK

    @arguments_checked()
    def __init__(
        self,
        dims: int,
        *,
        cell: Literal["mingru", "minlstm", "gru"] = "mingru",
        expansion: float = 1.0,
        conv: int | None = None,
        mlp: float | None = None,
        norm: Norm = "rms",
        dropout: float = 0.0,
        checkpoint: bool = False,
        **layer_options: Unpack[LayerOptions],
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {**layer_options}
        check_int(self.name, "dims", dims)
        _check_ratio(self.name, "expansion", expansion, dims)
        if conv is not None:
            check_int(self.name, "conv", conv, "an int or None", 2)
        if mlp is not None:
            _check_ratio(self.name, "mlp", mlp, dims)
        # On two outputs, so that there is no warning as for a single layer.
        check_dropout(self.name, dropout, 2)
        check_layer_options(self.name, cell, options, list(arguments_of_class(type(self))))
        factory: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
        bias = options.get("bias", True)
        check_flag(self.name, "bias", bias)
        self.cell = cell
        self.dropout = float(dropout)
        self.checkpoint = checkpoint
        self.input_dims = self.output_dims = dims
        sizes = {"input_dims": "dims", "hidden_dims": "dims" if expansion == 1 else "round(expansion * dims)"}
        names = {f"{name_of(LAYERS[cell])}: {name}": f"{self.name}: {by}" for name, by in sizes.items()}
        with reworded(names):
            self.rnn = LAYERS[cell](dims, round(expansion * dims), norm=norm, **options)
        self.out = nn.Linear(self.rnn.output_dims, dims, bias, **factory)
        self.conv = None if conv is None else CausalConv(dims, conv, bias, **factory)
        self.mlp = None
        if mlp is not None:
            hidden = round(mlp * dims)
            self.mlp = nn.Sequential(
                NORMS[norm](dims, **factory),
                nn.Linear(dims, hidden, bias, **factory),
                nn.GELU(),
                nn.Linear(hidden, dims, bias, **factory),
            )
        self.num_states = 1 if conv is None else 2

    def default_states(self, x: Tensor, batch: int) -> list[Tensor]:
        """Return the states that replace h=None."""
        of_conv = [torch.zeros(shape, dtype=x.dtype, device=x.device) for shape in self._state_shapes(batch)[1:]]
        return [self.rnn._state(x, None, batch), *of_conv]

    def _record(self, x: Any, h: Any) -> Any:
        x.recording.require(self.num_states == 1 + (self.conv is not None))
        return self._run(x, h, None, None, None)

    def _compute(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> Outputs:
        if not is_scripting():
            if self.checkpoint and self.training and torch.is_grad_enabled():
                out, states = checkpoint(self._run, x, h, reset, lengths, dt, use_reentrant=False)
                return out, states
        return self._run(x, h, reset, lengths, dt)

    def _run(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> Outputs:
        if lengths is not None:
            # Otherwise a NaN in the padding would reach the gradients of the weights.
            x = layout.without_padding(x, lengths, False)
        states: list[Tensor] = []
        conv = self.conv
        if conv is not None:
            past = x.new_zeros([1, x.size(0), conv.kernel_size - 1, x.size(2)]) if h is None else h[1]
            if is_scripting():
                convolved, past = conv(x, state=past, reset=reset, lengths=lengths)
                x = convolved + x
            else:
                x, past = plus_convolved(conv, x, state=past, reset=reset, lengths=lengths)
            states.append(past)
        y, last = self.rnn(x, None if h is None else h[0], reset, lengths, dt)
        states.insert(0, last)
        # x is the second operand, because a sum has the strides of the first, and outputs are contiguous.
        x = self._dropped(self.out(y)) + x
        mlp = self.mlp
        if mlp is not None:
            x = self._dropped(mlp(x)) + x
        if lengths is not None:
            x = layout.without_padding(x, lengths, False)
        return x, states

    def _check(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> None:
        """Raise an error if the layer would not: it sees neither the convolution's state nor what x was before."""
        check_call(self, x, None, reset, lengths, dt, self.rnn.cell)
        if h is not None:
            check_states(self, h, self._state_forms(x.shape), x, "tensors")

    def _weight_of_x(self) -> MaybeTensor:
        return weight_of(self.out)

    def _state_forms(self, x: Shape) -> list[tuple[Form, Layer, Shape]]:
        (table,) = BLOCK.batch_first
        return [(table["h"], self.rnn, x), (table["past"], self, x)][: self.num_states]

    def extra_repr(self) -> str:
        return f"{self.input_dims}, cell={self.cell!r}" + not_default(self, "dropout", "checkpoint")


def check_layer_options(name: str, cell: str, layer_options: Iterable[str], arguments: list[str]) -> None:
    """Raise an error for an option that the layer in a block does not have."""
    check_choice(name, "cell", cell, LAYERS)
    own = [argument for argument in arguments if not argument.endswith("_options")]
    of_layer = inspect.signature(LAYERS[cell]).parameters
    own += [argument for argument in of_layer if argument not in (*own, *SET_BY_THE_BLOCK)]
    for option in layer_options:
        if option in ("num_layers", "batch_first", "residual"):
            raise TypeError(f"{name}: no argument {option!r}; a block has one layer, and its x is (B, S, dims)")
        if option not in own:
            raise TypeError(unknown_argument(name, option, own))


def _check_ratio(name: str, argument: str, ratio: float, dims: int) -> None:
    expected = f"a finite number with {argument} * dims >= 1"
    check_number(name, argument, ratio, expected, lambda x: math.isfinite(x * dims) and round(x * dims) >= 1)
