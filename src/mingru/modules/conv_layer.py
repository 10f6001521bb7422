"""One layer of the convolutional minGRU: norm, convolution, recurrence and residual."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import Layout, Map, Spec, Start, States, layout, traceable
from ..ops.cells import GATES, zero_state
from ..ops.graph import is_autocast, is_scripting
from ..ops.shape import accumulate_dtype
from .group_norm import GroupNorm

CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}


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

    def keeps_space(self) -> bool:
        """Return whether the output has the spatial size of the input, for every size."""
        return all(stride == 1 for stride in self.stride) and all(reach == 1 for reach in self.reach())

    def space(self, space: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial sizes of the output."""
        sizes = zip(space, self.reach(), self.stride, strict=True)
        return tuple((size - reach) // stride + 1 for size, reach, stride in sizes)


class MinConvLayer(nn.Module):
    """Apply norm, convolution, recurrence and residual of one layer, in one direction or both."""

    def __init__(
        self,
        input_dims: int,
        hidden_dims: int,
        geometry: Geometry,
        groups: int,
        bias: bool,
        bidirectional: bool,
        residual: bool,
        norm: str | None,
        candidate: str,
        gate: str,
        learn_initial_state: bool,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        self.num_directions = 2 if bidirectional else 1
        output_dims = self.num_directions * hidden_dims
        self.geometry = geometry
        self.hidden_dims = hidden_dims
        self.groups = groups
        self.candidate = candidate
        self.cell = GATES[gate]
        self.residual = residual
        convolution: Any = CONVOLUTIONS[len(geometry.kernel_size)]
        common: dict[str, Any] = {**geometry._asdict(), "groups": groups, **factory}
        self.norm = GroupNorm(_num_groups(input_dims), input_dims, **factory) if norm == "group" else None
        self.conv = convolution(input_dims, 2 * hidden_dims, bias=bias, **common)
        self.conv_reverse = convolution(input_dims, 2 * hidden_dims, bias=bias, **common) if bidirectional else None
        self.align = None
        if residual and not (input_dims == output_dims and geometry.keeps_space()):
            self.align = convolution(input_dims, output_dims, bias=False, **common)
        self.zero_state = zero_state(self.cell, candidate)
        shape = (self.num_directions, 1, 1, hidden_dims, *(1 for _ in geometry.kernel_size))
        self.initial_state = (
            nn.Parameter(torch.full(shape, self.zero_state, **factory)) if learn_initial_state else None
        )

    def reset_parameters(self) -> None:
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]
        if self.initial_state is not None:
            nn.init.constant_(self.initial_state, self.zero_state)

    def forward(
        self, x: Tensor, h: list[Tensor] | None, reset: Tensor | None, order: Layout
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the output in the layout of x, and the last state of each direction.

        x is (B, S, C, *space) or (S, B, C, *space); each tensor of h expands to (B, 1, H, *space).
        """
        steps = x.flatten(0, 1)
        y = x
        if self.norm is not None:
            y = torch.unflatten(self.norm(steps), 0, [x.size(0), x.size(1)])
        out, last = self._direction(y, h, reset, order, False)
        states = [last]
        if self.conv_reverse is not None:
            back, last = self._direction(y, h, reset, order, True)
            out = torch.cat([out, back], 2)
            states.append(last)
        if self.residual:
            added = x
            if self.align is not None:
                added = torch.unflatten(self.align(steps), 0, [x.size(0), x.size(1)])
                added = _ungrouped(added, self.groups, self.num_directions)
            out = out + added
        return out, states

    def _direction(
        self, y: Tensor, h: list[Tensor] | None, reset: Tensor | None, order: Layout, reverse: bool
    ) -> States:
        spec = Spec(self.cell, self.candidate, reverse)
        index = 1 if reverse else 0
        if self.initial_state is not None:
            initial_state = self.initial_state[index]
        else:
            dtype = y.dtype
            if is_scripting():
                # y may have the autocast dtype of the previous layer's output, which a scripted layer cannot detect.
                dtype = self.conv.weight.dtype
            initial_state = torch.full([1] * y.dim(), self.zero_state, dtype=dtype, device=y.device)
        start = Start(initial_state if h is None else h[index], initial_state, reset)
        if reverse:
            start = layout.in_reverse(start, order)
        if is_scripting():
            inputs = self._inputs(y, reverse)
            shape = list(inputs[0].shape)
            batch = [shape[1 if order.time_first else 0], 1]
            start = Start(start.h.expand(batch + shape[2:]), initial_state, start.reset)
            return traceable.recurrence(spec, inputs, start, order)
        else:
            return self._mapped(spec, y, start, order)

    def _mapped(self, spec: Spec, y: Tensor, start: Start, order: Layout) -> States:
        if is_autocast(y):
            start = start._replace(h=start.h.to(accumulate_dtype(y.dtype)))
        conv: Any = self.conv_reverse if spec.reverse else self.conv
        shape = (self.hidden_dims, *self.geometry.space(tuple(y.shape[3:])))
        mapped = Map(conv, lambda part: self._inputs(part, spec.reverse), shape)
        return ops.mapped_recurrence(spec, y, mapped, start, order)

    def _inputs(self, y: Tensor, reverse: bool) -> list[Tensor]:
        """Return the pre-activations of gate and candidate; their channels and spatial dimensions are contiguous."""
        pre = y.flatten(0, 1)
        if not reverse:
            pre = self.conv(pre)
        elif self.conv_reverse is not None:
            pre = self.conv_reverse(pre)
        pre = _ungrouped(torch.unflatten(pre, 0, [y.size(0), y.size(1)]), self.groups, 2)
        return list(pre.chunk(2, 2))


def _num_groups(channels: int) -> int:
    """Return the largest divisor of `channels`, up to 32, that leaves at least 16 channels per group; otherwise 1."""
    most = max(1, min(32, channels // 16))
    return next(count for count in range(most, 0, -1) if channels % count == 0)


def _ungrouped(x: Tensor, groups: int, parts: int) -> Tensor:
    """Return x with dimension 2 reordered from (group, part, channel) to (part, group, channel).

    The first order is that of a grouped convolution, whose output has the channels of each group in one block.
    """
    if groups == 1 or parts == 1:
        return x
    x = torch.unflatten(x, 2, [groups, parts, x.size(2) // (groups * parts)])
    return x.transpose(2, 3).flatten(2, 4)
