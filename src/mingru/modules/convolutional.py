"""The base classes of the convolutional layers and cells. `minconvgru.py` has the public classes.

TorchScript compiles `forward` and the functions that it calls. A scripted module checks only shapes; other errors are
raised by torch.
"""

from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.types import Device

from ..check.calls import arguments_checked
from ..check.forms import CELL_OF_IMAGES, OF_IMAGES, check_call, check_states
from ..check.values import expectation
from ..ops.call import Layout
from ..ops.layout import as_sequence
from ..ops.shape import MaybeList, MaybeTensor, Outputs, reshaped
from . import scripted
from .conv_level import ConvLevel, ConvOptions, Sizes
from .layer import typed_as
from .options import Candidate, Gate, Gates, Memory, arguments_of
from .stacked import Stacked


class Convolutional(Stacked, role="sequence"):
    """The base class of `MinConv2dGRU` and its variants, in any number of spatial dimensions."""

    _forms = OF_IMAGES

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
        bias: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        residual: bool = False,
        norm: Literal["group"] | None = None,
        candidate: Candidate | None = None,
        gate: Gates = "sigmoid",
        learn_initial_state: bool = False,
        memory: Memory | None = None,
        batch_first: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checked = ConvOptions(type(self).__name__, num_space_dims=self.num_space_dims, **arguments_of(locals()))
        sizes = [input_dims, *(checked.num_directions * width for width in checked.widths[:-1])]
        layers = zip(sizes, checked.widths, checked.geometries(), checked.gates, strict=True)
        super().__init__(checked, [ConvLevel(*layer, checked) for layer in layers])
        self.num_states = num_layers * self.num_directions

    def forward(
        self, x: Tensor, h: list[Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the output of all steps and the state after the last: see `Inputs` and `Outputs` of the class."""
        return self._forward(x, h, reset, None, None)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self) -> Any: ...

    def _compute(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> Outputs:
        return self._run_layers(x, h, reset)

    def _run_layers(self, x: Tensor, h: MaybeList, reset: MaybeTensor) -> Outputs:
        """Run all layers, and return a state (B, 1, H, *space) for each layer and direction."""
        layout = Layout(not self.batch_first)
        states: list[Tensor] = []
        # Under autocast, the output of a layer has another dtype, but states do not.
        dtype = x.dtype
        for index, layer in enumerate(self.layers):
            first = index * self.num_directions
            before = None if h is None else h[first : first + self.num_directions]
            x, last = layer(x, before, reset, layout, dtype)
            if index < self.num_layers - 1:
                x = self._dropped(x)
            states += last
        return x, states

    def _with_states(
        self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor
    ) -> Outputs:
        """Call the layer; `lengths` and `dt` must be None."""
        assert lengths is None and dt is None
        return self(x, h, reset)

    def _check_scripted(self, x: Tensor, h: MaybeList, reset: MaybeTensor, dt: MaybeTensor) -> None:
        order = "B, S" if self.batch_first else "S, B"
        scripted.check_x(self.name, x, [2], order, self.input_dims, self.num_space_dims)
        scripted.check_shape(self.name, "reset", reset, list(x.shape[:2]))
        if h is not None and len(h) != self.num_states:
            raise ValueError(f"{self.name}: h must have one state per layer and direction, got {len(h)}")

    def _check(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> None:
        table, n = check_call(self, x, None, reset, None, None), self.num_space_dims
        states: list[Any] = []
        for layer, (_, *space) in zip(self.layers, self._shapes(tuple(x.shape[-n:])), strict=True):
            states += [(table["h"], layer, (*x.shape[:-n], *space))] * self.num_directions
        if h is not None and self.role == "step":
            table["h"].check(self, h[0], x, states[0][2], states[0][1])
        elif h is not None:
            check_states(self, h, states, x, "states, one for each layer and direction")

    def _shapes(self, space: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return (channels, *space) of each layer's states; raise an error if the space of x is too small."""
        states: list[tuple[int, ...]] = []
        layers: Any = self.layers
        for index, layer in enumerate(layers):
            least = tuple(max(1, reach) for reach in layer.geometry.reach())
            if any(size < enough for size, enough in zip(space, least, strict=True)):
                kernel = ", ".join(f"{option} {size}" for option, size in layer.geometry._asdict().items())
                expected = f"at least {least} in space at the input of layer {index}, which has {kernel}"
                raise ValueError(expectation(self.name, "x", expected, str(space), "pad more, or pass a larger x"))
            if layer.norm is not None and layer.norm.num_channels * prod(space) == layer.norm.num_groups:
                expected = f"larger in space at the input of layer {index}, whose norm of one number is 0"
                raise ValueError(expectation(self.name, "x", expected, str(space), "leave norm out"))
            space = layer.geometry.space(space)
            states.append((layer.hidden_dims, *space))
        return states


class ConvCell(Convolutional, role="step"):
    """Compute one step of one layer; the base class of `MinConv2dGRUCell` and its variants."""

    _forms = CELL_OF_IMAGES

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
        bias: bool = True,
        norm: Literal["group"] | None = None,
        candidate: Candidate | None = None,
        gate: Gate = "sigmoid",
        learn_initial_state: bool = False,
        memory: Memory | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(**arguments_of(locals()))

    def forward(self, x: Tensor, h: Tensor | None = None, reset: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return the state after this step: see `Inputs` and `Outputs` of the class."""
        return self._forward(x, None if h is None else [h], reset, None, None)[1][0]

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self) -> Any: ...  # type: ignore[override]

    def _compute(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> Outputs:
        num_dims = 2 + self.num_space_dims
        sequence, before, reset, _ = as_sequence(x, None if h is None else h[0], reset, None, num_dims)
        out, states = self._run_layers(sequence, None if before is None else [before], reset)
        shape = list(states[0].shape)
        return out, [reshaped(states[0], shape[:1] + shape[2:] if x.dim() == num_dims else shape[2:])]

    def _check_scripted(self, x: Tensor, h: MaybeList, reset: MaybeTensor, dt: MaybeTensor) -> None:
        scripted.check_x(self.name, x, [0, 1], "B", self.input_dims, self.num_space_dims)
        if h is not None and h[0].dim() > x.dim():
            shapes = f"{h[0].shape} with x {x.shape}"
            raise ValueError(f"{self.name}: h must be expandable to (B, H, *space), got {shapes}")
        scripted.check_shape(self.name, "reset", reset, list(x.shape[: x.dim() - 1 - self.num_space_dims]))
