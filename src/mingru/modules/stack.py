"""Stacks of different layers."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..check.calls import arguments_checked
from ..check.forms import LAYER, Form, Shape, check_list
from ..check.values import check_dropout, check_type, expectation, require
from ..ops import layout
from ..ops.modes import untraced
from ..ops.shape import MaybeList, MaybeTensor, Outputs
from .layer import Composite, Layer, Steps, data_of, with_data
from .options import not_default
from .per_step import OF_TORCH, PerStep
from .saved import add_marks
from .stacked import Stacked

PASS_A_LIST = "pass the layers in one list"
USE_OURS = "use mingru.MinGRU or mingru.MinLSTM in its place"
# What to do about a module that is no layer.
REMEDIES_BY_ROLE = {
    "torch": USE_OURS,
    "step": "use a layer in place of a cell, such as MinGRU of MinGRUCell",
    "custom": 'if its forward has the form of a layer, pass role="sequence" to the class',
}
REMEDIES: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (OF_TORCH, "use torch.nn.Sequential"),
    (nn.Sequential, "put its modules into the list"),
    (nn.RNNBase, USE_OURS),
    (nn.Embedding, "embed the ids before: stack(embedding(ids))"),
    (nn.Conv1d, "for a causal convolution, use mingru.models.Block(dims, conv=kernel_size)"),
    (nn.BatchNorm1d, "use norm= of the layer, or torch.nn.LayerNorm"),
    (object, "derive a layer of your own from mingru.modules.Layer"),
)


class Stack(Composite, role="sequence", planned=True):
    """Apply layers of any type and size in sequence, each to the output of the previous layer.

        x_0 = x      x_{i+1} = layer_i(x_i)

    With `residual`, x_{i+1} = layer_i(x_i) + A_i x_i. A_i is a linear map without bias if the numbers of features
    differ, otherwise the identity.

    Args:
        layers: At least one `MinGRU`, `MinLSTM`, `MinConv1dGRU`, `MinConv2dGRU`, `MinConv3dGRU`, `Stack` or
            `mingru.models.Block`, or a layer of your own, see `mingru.modules.Layer`. Between them, before and
            after, also modules of torch that act on each time step: `torch.nn.Linear`, `Dropout`, `LayerNorm`,
            `RMSNorm` and activations of single numbers, such as `ReLU`. Each has as many input features as the
            previous layer has output features, D * H. All have the same `batch_first` and the same number of spatial
            dimensions.
        dropout: Dropout probability, from 0 to 1, on the output of every layer except the last. Used in training only.
            The layers' own dropout is applied too. Modules of torch get no dropout and no residual.
        residual: If True, add each layer's input to its output. A convolutional layer must then keep the shape of its
            input. The returned states do not include the residual.

    Inputs:
        - **x**: Input of the first layer. It may be a `torch.nn.utils.rnn.PackedSequence` if no layer is convolutional.
        - **h**: States before the first step, a list as returned or a tuple (in TorchScript, a list). Default: the
          initial state of each layer.
        - **reset**: Boolean mask that all layers share, as in their `forward`. Those of `reset`, `lengths` and `dt`
          that the `forward` of a layer of your own does not use must be None.
        - **lengths**: Number of valid steps of each sequence, if no layer is convolutional.
        - **dt**: Time since the step before, if all layers take elapsed times; see
          the guide "Irregular time series".

    Outputs:
        - **out**: Output of the last layer, packed if x is packed.
        - **h**: List of the `num_states` states after the last step, so that `stack(x2, h)` continues the sequence. It
          contains, in the order of the layers, one tensor (L * D, B, 1, H) of each `MinGRU` or `MinLSTM`, L * D tensors
          `(B, 1, H, *space)` of each convolutional layer, and all states of each inner `Stack`. The list is flat
          because TorchScript does not support nested lists.

    Raises:
        TypeError: An element of `layers` is not a supported layer, or `h` is not a list of tensors.
        ValueError: `layers` is empty, two layers do not fit together, or a number of states, a shape, device or dropout
            is invalid. Errors of the layers pass through.

    State dict:
        - `layers.{i}.*`: entries of layer i; `layers.{i}.module.*` of a module of torch.
        - `aligns.{i}.weight` (output features, input features): the residual's linear map, if layer i needs one. It is
          initialized as in `torch.nn.Linear`, with the device and dtype of the layer.
        - `residual_mark`: 1 if `residual` is True.

    Examples:
        >>> stack = mingru.Stack([mingru.MinGRU(3, 32, bidirectional=True), mingru.MinLSTM(64, 16)], dropout=0.1)
        >>> out, h = stack(torch.randn(10, 128, 3))
        >>> out.shape, [state.shape for state in h]
        (torch.Size([10, 128, 16]), [torch.Size([2, 10, 1, 32]), torch.Size([1, 10, 1, 16])])
    """

    _marks = ("residual",)

    @arguments_checked(PASS_A_LIST)
    def __init__(self, layers: Iterable[nn.Module], *, dropout: float = 0.0, residual: bool = False) -> None:
        super().__init__()
        found: list[Any] = self._checked(layers)
        check_dropout(self.name, dropout, len(found))
        self.layers = nn.ModuleList(found)
        self.dropout = float(dropout)
        self.residual = residual
        self.batch_first: bool = found[0].batch_first
        self.num_space_dims = found[0].num_space_dims
        self.input_dims: int = found[0].input_dims
        self.output_dims = found[-1].output_dims
        # Layer i has states[ends[i] : ends[i + 1]].
        self._ends = [*accumulate((layer.num_states for layer in found), initial=0)]
        self.num_states = self._ends[-1]
        self._of_torch = [isinstance(layer, PerStep) for layer in found]
        self.aligns = nn.ModuleList(self._align(index, layer) for index, layer in enumerate(found))
        add_marks(self, next(self.parameters(), torch.empty(0)).device)

    def _checked(self, layers: Iterable[object]) -> list[Any]:
        """Return the layers as a list; raise an error if one is not supported or does not fit the previous one."""
        check_type(self.name, "layers", layers, Iterable, "a list of layers", PASS_A_LIST)
        found = list(layers)
        require(self.name, "layers", bool(found), "a list of at least one layer", "an empty list")
        own = [each for each in found if isinstance(each, Layer) and each.role == "sequence"]
        # Modules that keep the number of features take it from what is before them, or if they are first, behind. If
        # nothing says it, there is an error below.
        dims = next(filter(None, map(PerStep.dims_in, found)), None)
        for index, each in enumerate(found):
            if own and isinstance(each, OF_TORCH):
                shape = getattr(each, "normalized_shape", ())
                expected, got = "a norm of the features only", f"one of the last {len(shape)} dimensions"
                require(self.name, f"layers[{index}]", len(shape) < 2, expected, got)
                expected = "a module with inplace=False, because the backward pass needs its input"
                require(self.name, f"layers[{index}]", not getattr(each, "inplace", False), expected, "inplace=True")
                found[index] = PerStep(each, dims or 0, own[0].batch_first, own[0].num_space_dims)
            dims = getattr(found[index], "output_dims", None)
        for index, layer in enumerate(found):
            got = type(layer).__name__
            if not isinstance(layer, Layer) or layer.role != "sequence":
                expected = "a MinGRU, MinLSTM, MinConv1dGRU, MinConv2dGRU, MinConv3dGRU, Stack or models.Block"
                expected += ", between which torch's Linear, Dropout, norms and activations may stand"
                remedy = REMEDIES_BY_ROLE.get(layer.role) if isinstance(layer, Layer) else None
                remedy = remedy or next(text for types, text in REMEDIES if isinstance(layer, types))
                if isinstance(layer, OF_TORCH):
                    got = f"only modules of torch ({got})"
                raise TypeError(expectation(self.name, f"layers[{index}]", expected, got, remedy))
            missing = [name for name in ("input_dims", "output_dims") if getattr(layer, name, None) is None]
            expected = "a layer that sets input_dims and output_dims"
            got += f" without {' and '.join(missing)}"
            require(self.name, f"layers[{index}]", not missing, expected, got, error=TypeError)
        for index, (before, layer) in enumerate(pairwise(found)):
            for option, of_before, expected in (
                ("batch_first", "batch_first", "batch_first={} like"),
                ("num_space_dims", "num_space_dims", "{} spatial dimensions like"),
                ("input_dims", "output_dims", "input_dims={}, the output features of"),
            ):
                wanted, got = getattr(before, of_before), getattr(layer, option)
                text = f"a layer with {expected.format(wanted)} layers[{index}]"
                require(self.name, f"layers[{index + 1}]", got == wanted, text, str(got))
        return found

    def default_states(self, x: Tensor, batch: int) -> list[Tensor]:
        """Return the states that replace h=None."""
        return [state for layer in self.layers for state in layer.default_states(x, batch)]  # type: ignore[operator]

    def _state_forms(self, x: Shape) -> list[tuple[Form, Layer, Shape]]:
        return [state for layer in self.layers for state in layer._state_forms(x)]  # type: ignore[operator]

    def _align(self, index: int, layer: Layer) -> nn.Module:
        """Return the map from the layer's input to the shape of its output, for `residual`."""
        if not self.residual or layer.input_dims == layer.output_dims or isinstance(layer, PerStep):
            return nn.Identity()
        expected = "a layer with as many output as input channels because residual is True"
        got = f"{layer.input_dims} input and {layer.output_dims} output channels"
        remedy = "pass residual=True to the layer instead"
        require(self.name, f"layers[{index}]", layer.num_space_dims == 0, expected, got, remedy)
        weight = next(layer.parameters(), torch.empty(0))
        return nn.Linear(layer.input_dims, layer.output_dims, bias=False, device=weight.device, dtype=weight.dtype)

    if TYPE_CHECKING:

        def __call__(
            self,
            x: Steps,
            h: Sequence[Tensor] | None = None,
            reset: Steps | None = None,
            lengths: MaybeTensor = None,
            dt: Steps | None = None,
        ) -> tuple[Steps, list[Tensor]]: ...

    def _compute(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> Outputs:
        if lengths is not None and self.num_space_dims > 0:
            raise ValueError(f"{self.name}: lengths must be None because convolutional layers do not support lengths")
        if dt is not None and self.num_space_dims > 0:
            raise ValueError(f"{self.name}: dt must be None because convolutional layers do not support elapsed times")
        states: list[Tensor] = []
        for index, (layer, align) in enumerate(zip(self.layers, self.aligns)):  # noqa: B905 (not in TorchScript)
            before = None if h is None else h[self._ends[index] : self._ends[index + 1]]
            out, after = layer._with_states(x, before, reset, lengths, dt)  # type: ignore[operator]
            _check_returned(self.name, index, after, self._ends[index + 1] - self._ends[index])
            states += after
            data = data_of(out)
            if self.residual and not self._of_torch[index]:
                residual_input = data_of(x)
                if index == 0 and lengths is not None:
                    # The output must stay 0 in the padding.
                    residual_input = layout.without_padding(residual_input, lengths, not self.batch_first)
                added = align(residual_input)
                _check_same_shape(self.name, index, added, data)
                data = data + added
            if index < len(self.layers) - 1 and not self._of_torch[index]:
                data = self._dropped(data)
            x = with_data(out, data)
        return x, states

    def _check_all(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> None:
        # Also in a trace, where a layer that does not use an argument would be called without it.
        for argument, value in (("reset", reset), ("lengths", lengths), ("dt", dt)):
            for index, layer in enumerate([] if value is None else self.layers):
                if argument not in layer._step_arguments:  # type: ignore[operator]
                    expected = f"None because the forward of layers[{index}], {type(layer).__name__}, does not use it"
                    remedy = f"add {argument}=None to the arguments of that forward, and use it there"
                    raise ValueError(expectation(self.name, argument, expected, type(value).__name__, remedy))
        super()._check_all(x, h, reset, lengths, dt)

    def _check(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> None:
        """Raise an error if h is not a list of `num_states` tensors. The layers check the other arguments."""
        if h is None:
            return
        if not isinstance(h, (list, tuple)) or len(h) != self.num_states:
            check_list(self.name, "h", h, self.num_states, f"a list of {self.num_states} tensors", self._counts())
        like = data_of(x)
        for index, state in enumerate(h):
            if not isinstance(state, Tensor):
                raise TypeError(expectation(self.name, f"h[{index}]", "a tensor", type(state).__name__, self._counts()))
            if state.dtype != like.dtype or state.device != like.device:
                layer = self.layers[next(at for at, end in enumerate(self._ends[1:]) if index < end)]
                if isinstance(layer, Stacked):  # The states of others may be anything.
                    LAYER.batch_first[0]["h"].check(self, state, like, None, place=f"[{index}]")

    def _counts(self) -> str:
        counts = [end - start for start, end in pairwise(self._ends)]
        names = [type(layer).__name__ for layer in self.layers]
        return "pass " + ", ".join(f"{count} for {name}" for count, name in zip(counts, names, strict=True) if count)

    def extra_repr(self) -> str:
        return not_default(self).removeprefix(", ")


@untraced
def _check_returned(name: str, index: int, states: list[Tensor], num_states: int) -> None:
    """Raise an error if a layer of a stack returns other states than it says, which the next call could not take."""
    layer = f"{name}: layers[{index}]"
    if not isinstance(states, (list, tuple)):
        raise TypeError(f"{layer} must return its states in a list, got something else; return (out, [state])")
    if len(states) != num_states:
        raise ValueError(f"{layer} must return num_states = {num_states} states, got {len(states)}; set num_states")


@untraced
def _check_same_shape(name: str, index: int, added: Tensor, data: Tensor) -> None:
    """Raise an error if a layer of a stack with a residual changes the shape of its input."""
    if added.shape != data.shape:
        got = f"from {list(added.shape)} to {list(data.shape)}; pass residual=True to the layer instead"
        raise ValueError(f"{name}: layers[{index}] must keep the shape of x because residual is True, got {got}")
