"""Layers of any kinds and sizes, one over the other."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..check import arguments_checked, check_dropout, check_flags, dims, expectation
from ..ops import layout
from ..ops.graph import is_scripting, is_tracing, untraced
from .base import Base

PASS_A_LIST = "pass the layers in one list"


class Stack(Base, role="sequence"):
    """Layers of any kinds and sizes, each taking the output of the one before it.

        x_0 = x      x_{i+1} = layer_i(x_i)

    With `residual`, x_{i+1} = layer_i(x_i) + A_i x_i, where A_i is a linear map without bias if the features differ and
    the identity if they don't.

    Args:
        layers: `MinGRU`, `MinLSTM`, `MinConv1dGRU` and its siblings, or other stacks; at least one. Each has as many
            input features as the one before it has output features, D * H, and all have the same `batch_first` and
            the same number of space dimensions.
        dropout: probability in [0, 1] with which each element of each layer's output but the last's is dropped, in
            training only. It comes on top of what a layer of several layers drops between its own.
        residual: adds each layer's input to its output, which must have the same shape where the layer is
            convolutional. States are those without it.

    Called with:
        x: as the first layer takes it; so are `reset` and `lengths`, which all layers share. A
            `torch.nn.utils.rnn.PackedSequence` goes in, and comes out, where no layer is convolutional; `lengths`
            likewise.
        h: the states before the first step, a list as it is returned, or a tuple; in TorchScript, a list.
            Default: each layer's own.

    Returns:
        `out`, the last layer's output, and the list of the states after the last step, so that `stack(x2, h)`
        continues. The list is flat, and has for each layer in turn

        - one tensor of `MinGRU` or `MinLSTM`, (L * D, B, 1, H);
        - L * D tensors of a convolutional layer, (B, 1, H, *space), as it returns them;
        - all those of a stack;

        `num_states` in all. TorchScript, which knows lists of tensors but none of lists and tensors, takes the same.

    Raises:
        TypeError: layers, or states, that are none.
        ValueError: no layer; layers that don't fit over each other; a number of states, shape, device or dropout that
            does not fit; and what the layers raise.

    Parameters: the layers' under `layers.{i}.`, and `aligns.{i}.weight` (output features, input features) where
    `residual` needs one, drawn as `torch.nn.Linear` draws it, on the device and in the dtype of its layer.

    Example:
        >>> stack = mingru.Stack([mingru.MinGRU(3, 32, bidirectional=True), mingru.MinLSTM(64, 16)], dropout=0.1)
        >>> out, h = stack(torch.randn(10, 128, 3))
        >>> out.shape, [state.shape for state in h]
        (torch.Size([10, 128, 16]), [torch.Size([2, 10, 1, 32]), torch.Size([1, 10, 1, 16])])
    """

    @arguments_checked(PASS_A_LIST)
    def __init__(self, layers: Iterable[nn.Module], *, dropout: float = 0.0, residual: bool = False) -> None:
        super().__init__()
        self.name = type(self).__name__
        found: list[Any] = self._checked(layers)
        check_flags(self.name, residual=residual)
        check_dropout(self.name, dropout, len(found))
        self.layers = nn.ModuleList(found)
        self.dropout = float(dropout)
        self.residual = residual
        self.batch_first: bool = found[0].batch_first
        self.num_space_dims = found[0].num_space_dims
        self.input_dims: int = found[0].input_dims
        self.output_dims = found[-1].output_dims
        # The states of layer i are those from ends[i] to ends[i + 1].
        self.ends = [0]
        for layer in found:
            self.ends.append(self.ends[-1] + layer.num_states)
        self.num_states = self.ends[-1]
        self.aligns = nn.ModuleList(self._align(index, layer) for index, layer in enumerate(found))

    def _checked(self, layers: Any) -> list[Any]:
        """The layers, which fit over each other."""
        if not isinstance(layers, Iterable):
            raise TypeError(expectation(self.name, "layers", "a list of layers", type(layers).__name__, PASS_A_LIST))
        found = list(layers)
        if not found:
            raise ValueError(expectation(self.name, "layers", "at least one", "none"))
        for index, layer in enumerate(found):
            if not isinstance(layer, Base) or layer.role != "sequence":
                expected = "a MinGRU, MinLSTM, MinConv1dGRU, MinConv2dGRU, MinConv3dGRU or Stack"
                raise TypeError(expectation(self.name, f"layers[{index}]", expected, type(layer).__name__))
        for index, (below, layer) in enumerate(pairwise(found)):
            argument, beside = f"layers[{index + 1}]", f"layers[{index}]"
            if layer.batch_first != below.batch_first:
                expected = f"of batch_first={below.batch_first} as {beside} is"
                raise ValueError(expectation(self.name, argument, expected, str(layer.batch_first)))
            if layer.num_space_dims != below.num_space_dims:
                expected = f"of {below.num_space_dims} space dimensions as {beside} is"
                raise ValueError(expectation(self.name, argument, expected, str(layer.num_space_dims)))
            if layer.input_dims != below.output_dims:
                expected = f"of input_dims {below.output_dims} as {beside} puts out"
                raise ValueError(expectation(self.name, argument, expected, str(layer.input_dims)))
        return found

    def with_states(
        self, x: Tensor, h: list[Tensor] | None, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Call the stack."""
        out, states = self(x, h, reset, lengths)
        return out, states

    def _align(self, index: int, layer: Any) -> nn.Module:
        """What brings the layer's input to the shape of its output, for `residual`."""
        if not self.residual or layer.input_dims == layer.output_dims:
            return nn.Identity()
        if layer.num_space_dims > 0:
            argument, expected = f"layers[{index}]", "of as many output as input channels, as residual is True"
            got = f"{layer.input_dims} to {layer.output_dims}"
            remedy = "let the layer add its own by its option residual"
            raise ValueError(expectation(self.name, argument, expected, got, remedy))
        weight = next(layer.parameters())
        return nn.Linear(layer.input_dims, layer.output_dims, bias=False, device=weight.device, dtype=weight.dtype)

    def reset_parameters(self) -> None:
        """Draw all weights anew, as the constructors did."""
        for module in [*self.layers, *self.aligns]:
            if not isinstance(module, nn.Identity):
                module.reset_parameters()

    def forward(
        self, x: Tensor, h: list[Tensor] | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        if is_scripting():
            if h is not None and len(h) != self.num_states:
                raise ValueError(f"{self.name}: h must be {self.num_states} tensors, got {len(h)}")
        else:
            self._check(h)
        if lengths is not None and self.num_space_dims > 0:
            raise ValueError(f"{self.name}: lengths must be None, as convolutional layers take none")
        states: list[Tensor] = []
        for index, (layer, align) in enumerate(zip(self.layers, self.aligns)):  # noqa: B905 (not in TorchScript)
            before = None if h is None else h[self.ends[index] : self.ends[index + 1]]
            out, after = layer.with_states(x, before, reset, lengths)  # type: ignore[operator]
            states += after
            data = _data(out)
            if self.residual:
                residual_input = _data(x)
                if index == 0 and lengths is not None:
                    # The outputs are 0 in the padding, and stay 0.
                    padding = layout.padding_from_lengths(lengths, residual_input, not self.batch_first)
                    residual_input = residual_input.masked_fill(padding.unsqueeze(2), 0.0)
                added = align(residual_input)
                if (is_scripting() or not is_tracing()) and added.shape != data.shape:
                    shapes = f"from {_dims(added)} to {_dims(data)}"
                    raise ValueError(
                        f"{self.name}: layers[{index}] must keep the shape of x, as residual is True, got {shapes}; "
                        "let the layer add its own by its option residual"
                    )
                data = data + added
            if index < len(self.layers) - 1 and self.dropout > 0:
                data = F.dropout(data, self.dropout, self.training)
            x = _with_data(out, data)
        return x, states

    @untraced
    def _check(self, h: Any) -> None:
        """Refuse a list of states that is none; what is in it, its layer refuses."""
        if h is None:
            return
        if not isinstance(h, (list, tuple)):
            expected = f"a list of {self.num_states} tensors"
            raise TypeError(expectation(self.name, "h", expected, type(h).__name__, self._whose()))
        if len(h) != self.num_states:
            expected = f"{self.num_states} tensors"
            raise ValueError(expectation(self.name, "h", expected, str(len(h)), self._whose()))
        for index, state in enumerate(h):
            if not isinstance(state, Tensor):
                raise TypeError(expectation(self.name, f"h[{index}]", "a tensor", type(state).__name__, self._whose()))

    def _whose(self) -> str:
        counts = [end - start for start, end in pairwise(self.ends)]
        names = [type(layer).__name__ for layer in self.layers]
        return "they are " + ", ".join(f"{count} of {name}" for count, name in zip(counts, names, strict=True))

    def extra_repr(self) -> str:
        options = {"dropout": 0.0, "residual": False}
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in options if getattr(self, name) != options[name])


def _dims(x: Tensor) -> str:
    if is_scripting():
        return str(x.shape)
    else:
        return dims(x.shape)


def _data(x: Tensor) -> Tensor:
    """A tensor as it is, and the data of a PackedSequence."""
    if is_scripting():
        return x
    else:
        return x.data if isinstance(x, PackedSequence) else x


def _with_data(x: Tensor, data: Tensor) -> Tensor:
    """Other rows, packed as those of x are."""
    if is_scripting():
        return data
    else:
        return PackedSequence(data, *x[1:]) if isinstance(x, PackedSequence) else data
