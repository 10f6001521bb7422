"""The base classes of the convolutional layers and cells: stacked layers, directions, states and options.

`minconvgru.py` has the public classes. TorchScript compiles `forward` and the functions that it calls. A scripted
module checks only shapes; other errors are raised by torch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..check import (
    arguments_checked,
    check_dropout,
    check_flags,
    check_gate,
    check_int,
    check_like,
    check_one_state,
    check_options,
    check_pairs,
    check_reset,
    dims,
    embed_remedy,
    expanded,
    expectation,
)
from ..ops import Layout
from ..ops.graph import is_autocast, is_scripting, untraced
from ..ops.shape import accumulate_dtype
from .base import Base
from .conv_layer import Geometry, MinConvLayer
from .shared import not_default, reshaped, weight_of

# A list has one entry for each layer, a tuple one number for each spatial dimension.
Sizes = int | tuple[int, ...] | list[Any]


class MinConv(Base, role="sequence"):
    """Apply stacked layers in any number of spatial dimensions; the base class of `MinConv2dGRU` and its variants."""

    num_space_dims: int

    @arguments_checked()
    def __init__(
        self,
        input_dims: int,
        hidden_dims: int | list[int],
        kernel_size: Sizes,
        num_layers: int = 1,
        *,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        residual: bool = False,
        norm: str | None = None,
        candidate: str = "positive",
        gate: str = "sigmoid",
        learn_initial_state: bool = False,
        batch_first: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.name = type(self).__name__
        for argument, size in (("input_dims", input_dims), ("num_layers", num_layers), ("groups", groups)):
            check_int(self.name, argument, size)
        check_flags(self.name, bias=bias, bidirectional=bidirectional, residual=residual, batch_first=batch_first)
        check_flags(self.name, learn_initial_state=learn_initial_state)
        check_dropout(self.name, dropout, num_layers)
        check_options(self.name, norm, ("group",), candidate, dtype)
        widths = self._per_layer("hidden_dims", hidden_dims, num_layers)
        for width in widths:
            check_int(self.name, "hidden_dims", width, "an int, or a list of ints with one for each layer")
        if any(width % groups for width in [input_dims, *widths]):
            expected = f"a divisor of input_dims={input_dims} and hidden_dims={hidden_dims}"
            raise ValueError(expectation(self.name, "groups", expected, str(groups)))
        check_gate(self.name, "gate", gate)
        for width in widths:
            check_pairs(self.name, "hidden_dims" if groups == 1 else "hidden_dims / groups", width // groups, gate)
        options = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
        geometries = self._geometries(num_layers, options)
        self.input_dims = input_dims
        self.hidden_dims = _copied_list(hidden_dims)
        self.kernel_size = _copied_list(kernel_size)
        self.num_layers = num_layers
        self.stride = _copied_list(stride)
        self.padding = _copied_list(padding)
        self.dilation = _copied_list(dilation)
        self.groups = groups
        self.bias = bias
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.residual = residual
        self.norm = norm
        self.candidate = candidate
        self.gate = gate
        self.learn_initial_state = learn_initial_state
        self.batch_first = batch_first

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_directions = 2 if bidirectional else 1
        # Also set on the instance: TorchScript ignores class attributes.
        self.num_space_dims = type(self).num_space_dims
        self.num_states = num_layers * self.num_directions
        self.output_dims = self.num_directions * widths[-1]
        self.layers = nn.ModuleList(
            MinConvLayer(
                input_dims if index == 0 else self.num_directions * widths[index - 1],
                widths[index],
                geometries[index],
                groups,
                self.bias,
                self.bidirectional,
                self.residual,
                norm,
                candidate,
                gate,
                self.learn_initial_state,
                factory,
            )
            for index in range(num_layers)
        )

    def reset_parameters(self) -> None:
        """Re-initialize all parameters."""
        for layer in self.layers:
            layer.reset_parameters()  # type: ignore[operator]

    def forward(
        self, x: Tensor, h: list[Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        if is_scripting():
            if x.dim() != 3 + self.num_space_dims or x.size(2) != self.input_dims:
                letters = "(B, S, " if self.batch_first else "(S, B, "
                raise ValueError(f"{self.name}: x must be {letters}{self.input_dims}, *space), got {x.shape}")
            if reset is not None and reset.shape != x.shape[:2]:
                raise ValueError(f"{self.name}: reset must be {x.shape[:2]}, got {reset.shape}")
            if h is not None and len(h) != self.num_layers * self.num_directions:
                raise ValueError(f"{self.name}: h must have one state per layer and direction, got {len(h)}")
        else:
            self._check(x, h, reset)
        order = Layout(not self.batch_first, None, None)
        states: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            first = index * self.num_directions
            before = None if h is None else h[first : first + self.num_directions]
            x, last = layer(x, before, reset, order)
            states += last
            if index < self.num_layers - 1 and self.dropout > 0:
                x = F.dropout(x, self.dropout, self.training)
        return x, states

    def with_states(
        self, x: Tensor, h: list[Tensor] | None, reset: Tensor | None, lengths: Tensor | None, dt: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Call the layer; `lengths` and `dt` must be None."""
        assert lengths is None and dt is None
        out, last = self(x, h, reset)
        return out, last

    def _per_layer(self, argument: str, sizes: Any, num_layers: int) -> list[Any]:
        if not isinstance(sizes, list):
            return [sizes] * num_layers
        if len(sizes) != num_layers:
            expected = f"a list of {num_layers} entries because num_layers is {num_layers}"
            remedy = "a list has one entry for each layer, a tuple one number for each spatial dimension"
            raise ValueError(expectation(self.name, argument, expected, f"{sizes!r}", remedy))
        return sizes

    def _geometries(self, num_layers: int, options: dict[str, Any]) -> list[Geometry]:
        by_option = {
            argument: [self._per_dimension(argument, size) for size in self._per_layer(argument, sizes, num_layers)]
            for argument, sizes in options.items()
        }
        geometries = [Geometry(*of_layer) for of_layer in zip(*by_option.values(), strict=True)]
        for geometry in geometries:
            if geometry.padding == "same" and any(step > 1 for step in geometry.stride):
                expected = f"a number because stride is {dims(geometry.stride)}"
                raise ValueError(expectation(self.name, "padding", expected, "'same'", "'same' needs a stride of 1"))
        return geometries

    def _per_dimension(self, argument: str, size: Any) -> Any:
        if argument == "padding" and size == "same":
            return size
        count = self.num_space_dims
        numbers = size if isinstance(size, tuple) else (size,) * count
        single = "an int" if count == 1 else f"an int, a tuple of {count} ints"
        expected = f"{single}, or a list of these with one for each layer"
        if len(numbers) != count:
            raise ValueError(expectation(self.name, argument, expected, f"{size!r}"))
        for number in numbers:
            check_int(self.name, argument, number, expected, 0 if argument == "padding" else 1)
        return numbers

    @untraced
    def _check(self, x: Tensor, h: Any, reset: Tensor | None) -> None:
        """Raise an error if an argument is invalid."""
        order = "B, S" if self.batch_first else "S, B"
        shapes = self._check_x(x, order, 2)
        batch = x.shape[0 if self.batch_first else 1]
        check_reset(self.name, reset, x, f"({order})")
        if h is None:
            return
        expected = f"a list of {len(self.layers) * self.num_directions} states, one for each layer and direction"
        if not isinstance(h, (list, tuple)):
            raise TypeError(expectation(self.name, "h", expected, type(h).__name__))
        if len(h) != len(self.layers) * self.num_directions:
            raise ValueError(expectation(self.name, "h", expected, str(len(h))))
        for index, state in enumerate(h):
            argument = f"h[{index}]"
            check_like(self.name, argument, state, x, "x", or_dtype=accumulate_dtype(x.dtype), autocast=is_autocast(x))
            shape = (batch, 1, *shapes[index // self.num_directions])
            expanded(self.name, argument, state, shape, "(B, 1, H, *space)")

    def _check_x(self, x: Tensor, order: str, leading: int) -> list[tuple[int, ...]]:
        """Raise an error if x does not fit the weights; return (channels, *space) of each layer's states."""
        if not isinstance(x, Tensor):
            raise TypeError(expectation(self.name, "x", "a tensor", type(x).__name__, "use torch.as_tensor"))
        count = self.num_space_dims
        if x.dim() != leading + 1 + count or x.shape[leading] != self.input_dims:
            letters = f"({order}, {self.input_dims}, *space)" if order else f"({self.input_dims}, *space)"
            expected = f"{letters} because input_dims is {self.input_dims} and space is {count}-dimensional"
            raise ValueError(expectation(self.name, "x", expected, dims(x.shape), embed_remedy(x)))
        layers: Any = self.layers
        weight = weight_of(layers[0].conv)
        if weight is not None:
            check_like(self.name, "x", x, weight, "the layer's weight", autocast=is_autocast(x), ids=True)
        states: list[tuple[int, ...]] = []
        space = tuple(x.shape[leading + 1 :])
        for index, layer in enumerate(layers):
            least = tuple(max(1, reach) for reach in layer.geometry.reach())
            if any(size < enough for size, enough in zip(space, least, strict=True)):
                kernel = ", ".join(f"{option} {size}" for option, size in layer.geometry._asdict().items())
                expected = f"at least {least} in space at the input of layer {index}, which has {kernel}"
                raise ValueError(expectation(self.name, "x", expected, str(space), "pad more, or pass a larger x"))
            space = layer.geometry.space(space)
            states.append((layer.hidden_dims, *space))
        return states

    def extra_repr(self) -> str:
        text = f"{self.input_dims}, {self.hidden_dims}, {self.kernel_size}"
        defaults = {
            "num_layers": 1,
            "stride": 1,
            "padding": 0,
            "dilation": 1,
            "groups": 1,
            "bias": True,
            "dropout": 0.0,
            "bidirectional": False,
            "residual": False,
            "norm": None,
            "candidate": "positive",
            "gate": "sigmoid",
            "learn_initial_state": False,
            "batch_first": True,
        }
        return text + not_default(self, defaults)


def _copied_list(sizes: Any) -> Any:
    """Return sizes, or a copy of a list, so that later changes to the caller's list have no effect."""
    return list(sizes) if isinstance(sizes, list) else sizes


class MinConvCell(MinConv, role="step"):
    """Compute one step of one layer; the base class of `MinConv2dGRUCell` and its variants."""

    @arguments_checked()
    def __init__(
        self,
        input_dims: int,
        hidden_dims: int,
        kernel_size: int | tuple[int, ...],
        *,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        norm: str | None = None,
        candidate: str = "positive",
        gate: str = "sigmoid",
        learn_initial_state: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_dims,
            hidden_dims,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            norm=norm,
            candidate=candidate,
            gate=gate,
            learn_initial_state=learn_initial_state,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor, h: Tensor | None = None, reset: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if is_scripting():
            leading = x.dim() - 1 - self.num_space_dims
            if leading not in (0, 1) or x.size(leading) != self.input_dims:
                raise ValueError(f"{self.name}: x must be (B, {self.input_dims}, *space), got {x.shape}")
            if h is not None and h.dim() > x.dim():
                raise ValueError(f"{self.name}: h must be expandable to (B, H, *space), got {h.shape} with x {x.shape}")
            if reset is not None and reset.shape != x.shape[:leading]:
                raise ValueError(f"{self.name}: reset must be {x.shape[:leading]}, got {reset.shape}")
        else:
            self._check_step(x, h, reset)
        batched = x.dim() == 2 + self.num_space_dims
        if h is not None:
            # Before `unsqueeze(1)` below, because the layer expands h to a shape with time as dimension 1.
            while h.dim() < x.dim():
                h = h.unsqueeze(0)
        if not batched:
            x = x.unsqueeze(0)
            h = None if h is None else h.unsqueeze(0)
            reset = None if reset is None else reset.unsqueeze(0)
        before: list[Tensor] | None = None
        if h is not None:
            before = [h.unsqueeze(1)]
        reset = None if reset is None else reset.unsqueeze(1)
        states: list[Tensor] = []
        for layer in self.layers:
            _, states = layer(x.unsqueeze(1), before, reset, Layout(False, None, None))
        shape = list(states[0].shape)
        return reshaped(states[0], shape[:1] + shape[2:] if batched else shape[2:])

    @untraced
    def _check_step(self, x: Tensor, h: Tensor | None, reset: Tensor | None) -> None:
        """Raise an error if an argument is invalid."""
        batched = not isinstance(x, Tensor) or x.dim() != 1 + self.num_space_dims
        (state,) = self._check_x(x, "B" if batched else "", int(batched))
        batch = x.shape[: int(batched)]
        if h is not None:
            letters = "(B, H, *space)" if batched else "(H, *space)"
            check_one_state(self.name, h, letters)
            check_like(self.name, "h", h, x, "x", or_dtype=accumulate_dtype(x.dtype), autocast=is_autocast(x))
            expanded(self.name, "h", h, (*batch, *state), letters)
        check_reset(self.name, reset, x.flatten(int(batched)).select(-1, 0), "(B,)" if batched else "a scalar")
