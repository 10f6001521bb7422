"""One layer of the convolutional minGRU: norm, convolution, recurrence and residual."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..check.values import check_int, check_parts, dims, per_layer, require
from ..ops.call import Context, Layout, Spec
from ..ops.cells import GATES
from ..ops.in_cache import Map
from ..ops.modes import is_autocast, is_scripting
from ..ops.shape import MaybeList, MaybeTensor, Outputs, States, accumulate_dtype, unflattened
from .group_norm import GroupNorm
from .initial_state import default_start, learned_state, reset_initial_state
from .level import Level
from .options import Options
from .saved import OF_LEVELS, add_marks, start_said_by

# A list has one entry for each layer, a tuple one number for each spatial dimension.
Sizes = int | tuple[int, ...] | list[Any]
# By the number of spatial dimensions.
CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Geometry(NamedTuple):
    """Sizes of a layer's convolution, with one number for each spatial dimension."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]

    def reach(self) -> list[int]:
        """Return the smallest input size with one output position; each `stride` more adds one position."""
        spans = [dilation * (size - 1) for size, dilation in zip(self.kernel_size, self.dilation, strict=True)]
        padded = spans if isinstance(self.padding, str) else [2 * padding for padding in self.padding]
        return [span + 1 - more for span, more in zip(spans, padded, strict=True)]

    def space(self, space: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial sizes of the output."""
        sizes = zip(space, self.reach(), self.stride, strict=True)
        return tuple((size - reach) // stride + 1 for size, reach, stride in sizes)


class ConvOptions(Options):
    """The options of the convolutional layers."""

    def check(self) -> None:
        super().check()
        # The number of state channels of each layer.
        self.widths = self._per_layer("hidden_dims")
        for width in self.widths:
            check_int(self.name, "hidden_dims", width, "an int, or a list of ints with one for each layer")
        for width, gate in zip(self.widths, self.gates, strict=True):
            check_parts(self.name, "hidden_dims", width, gate)

    def geometries(self) -> list[Geometry]:
        """Return the sizes of the convolution of each layer."""
        by_option = [
            [self._per_dimension(option, size) for size in self._per_layer(option)] for option in Geometry._fields
        ]
        geometries = [Geometry(*of_layer) for of_layer in zip(*by_option, strict=True)]
        for geometry in geometries:
            is_valid = geometry.padding != "same" or all(step == 1 for step in geometry.stride)
            expected = f"a number because stride is {dims(geometry.stride)}"
            require(self.name, "padding", is_valid, expected, "'same'", "'same' needs a stride of 1")
        return geometries

    def _per_layer(self, option: str) -> list[Any]:
        remedy = "a list has one entry for each layer, a tuple one number for each spatial dimension"
        return per_layer(self.name, option, getattr(self, option), self.num_layers, list, remedy)

    def _per_dimension(self, argument: str, size: object) -> Any:
        if argument == "padding" and size == "same":
            return size
        count = self.num_space_dims
        # A tuple in a list is no number.
        numbers: Any = size if isinstance(getattr(self, argument), tuple) else (size,) * count
        single = "an int" if count == 1 else f"an int, a tuple of {count} ints"
        expected = f"{single}, or a list of ints with one for each layer"
        require(self.name, argument, len(numbers) == count, expected, f"{size!r}")
        for number in numbers:
            check_int(self.name, argument, number, expected, 0 if argument == "padding" else 1)
        return numbers


class ConvLevel(Level):
    """Apply norm, convolution, recurrence and residual of one layer, in one direction or both."""

    _marks = (*OF_LEVELS, "zero_state")

    def __init__(self, input_dims: int, hidden_dims: int, geometry: Geometry, gate: str, options: ConvOptions) -> None:
        super().__init__(GATES[gate], hidden_dims, 0.0, options)
        self.num_directions = options.num_directions
        output_dims = self.num_directions * hidden_dims
        self.geometry = geometry
        self.residual = options.residual
        sizes = {**geometry._asdict(), **options.factory}
        convolution = partial(CONVOLUTIONS[len(geometry.kernel_size)], input_dims, **sizes)
        self.norm = GroupNorm(_num_groups(input_dims), input_dims, **options.factory) if options.norm else None
        self.conv = convolution(2 * hidden_dims, bias=options.bias)
        self.conv_reverse = convolution(2 * hidden_dims, bias=options.bias) if options.bidirectional else None
        self.align = None
        # Whether the output has the spatial size of the input, for every size.
        keeps_space = all(number == 1 for number in (*geometry.stride, *geometry.reach()))
        if self.residual and not (input_dims == output_dims and keeps_space):
            self.align = convolution(output_dims, bias=False)
        self.initialize_maps()
        self._shape_of_initial_state = [self.num_directions, 1, 1, hidden_dims, *(1 for _ in geometry.kernel_size)]
        self._zero_state = default_start(options)
        self.initial_state = learned_state(self._shape_of_initial_state, options)
        reset_initial_state(self, [self])
        add_marks(self, options.device)

    def reset_parameters(self) -> None:
        """Re-initialize all parameters."""
        super().reset_parameters()
        reset_initial_state(self, [self])

    def forward(self, x: Tensor, h: MaybeList, reset: MaybeTensor, layout: Layout, dtype: torch.dtype) -> Outputs:
        """Return the output in the layout of x, and the last state of each direction.

        x is (B, S, C, *space) or (S, B, C, *space); each tensor of h expands to (B, 1, H, *space). `dtype` is that of
        the default initial state.
        """
        steps = x.flatten(0, 1)
        y = x if self.norm is None else unflattened(self.norm(steps), x)
        initial: MaybeTensor = self.initial_state
        if initial is None:
            initial = torch.full([1], self._zero_state, dtype=dtype, device=x.device)
        initial = initial.expand(self._shape_of_initial_state)
        contexts: list[Context] = []
        for index in range(self.num_directions):
            contexts.append(Context(initial[index] if h is None else h[index], initial[index], reset))
        out, states = self._directions(y, contexts, layout)
        if self.residual:
            out = out + (x if self.align is None else unflattened(self.align(steps), x))
        return out, states

    def _said(self) -> dict[str, object]:
        return {**super()._said(), "zero_state": start_said_by(self)}

    def maps(self) -> list[Any]:
        """Return the convolution of each direction."""
        return [self.conv] if self.conv_reverse is None else [self.conv, self.conv_reverse]

    def _direction(self, y: Tensor, context: Context, layout: Layout, reverse: bool, found: MaybeList) -> States:
        if is_scripting():
            return self._from_inputs(self.spec(reverse), y, context, layout, found)
        else:
            return self._mapped(self.spec(reverse), y, context, layout)

    def _mapped(self, spec: Spec, y: Tensor, context: Context, layout: Layout) -> States:
        """Compute the map and the recurrence, by one kernel if possible. `mingru.distributed` replaces this."""
        if is_autocast(y):
            context = context._replace(h=context.h.to(accumulate_dtype(y.dtype)))
        shape = (self.hidden_dims, *self.geometry.space(tuple(y.shape[3:])))
        mapped = Map(self.maps()[spec.reverse], lambda part: self._inputs(part, spec.reverse), shape)
        return ops.mapped_recurrence(spec, y, mapped, context, layout)

    def _inputs(self, y: Tensor, reverse: bool) -> list[Tensor]:
        """Return the pre-activations of gate and candidate; their channels and spatial dimensions are contiguous."""
        pre = y.flatten(0, 1)
        if not reverse:
            pre = self.conv(pre)
        elif self.conv_reverse is not None:
            pre = self.conv_reverse(pre)
        return list(unflattened(pre, y).chunk(2, 2))


def _num_groups(channels: int) -> int:
    """Return the largest divisor of `channels`, up to 32, that leaves at least 16 channels per group; otherwise 1."""
    most = max(1, min(32, channels // 16))
    return next(count for count in range(most, 0, -1) if channels % count == 0)
