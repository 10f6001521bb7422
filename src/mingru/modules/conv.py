"""minGRU over images, signals and volumes: the linear maps are convolutions, the states have channels over space.

Every class is thin: the number of its space dimensions, and what it tells. `forward` and what it calls scripts, but for
the checks, which a scripted module leaves to torch.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..check import (
    arguments_checked,
    check_dropout,
    check_flags,
    check_int,
    check_like,
    check_one_state,
    check_options,
    check_reset,
    dims,
    embed_remedy,
    expanded,
    expectation,
)
from ..ops import Layout, Map, Spec, Start, States, traceable
from ..ops.activation import zero_state
from ..ops.graph import is_autocast, is_scripting, untraced
from ..ops.shape import accumulate_dtype
from .base import Base
from .group_norm import GroupNorm
from .recurrent import in_reverse, not_default, weight_of, without_dims

# By the number of space dimensions.
CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}

# A list is for the layers, a tuple for the dimensions of space.
Sizes = int | tuple[int, ...] | list[Any]


class Geometry(NamedTuple):
    """Where a layer's convolution reads: one number for each dimension of space."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]

    def reach(self) -> list[int]:
        """The least size of a space that yields one place; each `stride` more yields another."""
        spans = [dilation * (size - 1) for size, dilation in zip(self.kernel_size, self.dilation, strict=True)]
        padded = spans if isinstance(self.padding, str) else [2 * padding for padding in self.padding]
        return [span + 1 - more for span, more in zip(spans, padded, strict=True)]

    def keeps_space(self) -> bool:
        """Whether a space of any size comes out in the same size."""
        return all(stride == 1 for stride in self.stride) and all(reach == 1 for reach in self.reach())

    def space(self, space: tuple[int, ...]) -> tuple[int, ...]:
        """What comes out of this space."""
        sizes = zip(space, self.reach(), self.stride, strict=True)
        return tuple((size - reach) // stride + 1 for size, reach, stride in sizes)


class MinConvLayer(nn.Module):
    """Norm, convolution, recurrence and residual of one layer, in one direction or both."""

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
        self.residual = residual
        convolution: Any = CONVOLUTIONS[len(geometry.kernel_size)]
        common: dict[str, Any] = {**geometry._asdict(), "groups": groups, **factory}
        self.norm = GroupNorm(_num_groups(input_dims), input_dims, **factory) if norm == "group" else None
        self.conv = convolution(input_dims, 2 * hidden_dims, bias=bias, **common)
        self.conv_reverse = convolution(input_dims, 2 * hidden_dims, bias=bias, **common) if bidirectional else None
        self.align = None
        if residual and not (input_dims == output_dims and geometry.keeps_space()):
            self.align = convolution(input_dims, output_dims, bias=False, **common)
        self.zero_state = zero_state(candidate)
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
        """Return the output, in the layout of x, and the last states.

        x is (B, S, C, *space) or (S, B, C, *space); h expands to (B, 1, H, *space), for each direction.
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
        spec = Spec("mingru", self.candidate, reverse)
        index = 1 if reverse else 0
        if self.initial_state is not None:
            initial_state = self.initial_state[index]
        else:
            dtype = y.dtype
            if is_scripting():
                # A scripted layer cannot detect autocast; y may have the autocast dtype of the previous layer's output.
                dtype = self.conv.weight.dtype
            initial_state = torch.full([1] * y.dim(), self.zero_state, dtype=dtype, device=y.device)
        start = Start(initial_state if h is None else h[index], initial_state, reset)
        if reverse:
            start = in_reverse(start, order)
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
        of = Map(conv, lambda part: self._inputs(part, spec.reverse), shape)
        return ops.mapped_recurrence(spec, y, of, start, order)

    def _inputs(self, y: Tensor, reverse: bool) -> list[Tensor]:
        """Return the pre-activations of gate and candidate, whose channels and space are contiguous."""
        pre = y.flatten(0, 1)
        if not reverse:
            pre = self.conv(pre)
        elif self.conv_reverse is not None:
            pre = self.conv_reverse(pre)
        pre = _ungrouped(torch.unflatten(pre, 0, [y.size(0), y.size(1)]), self.groups, 2)
        return list(pre.chunk(2, 2))


def _num_groups(channels: int) -> int:
    """The most groups, up to 32, that share the channels evenly, 16 or more to each; else 1."""
    most = max(1, min(32, channels // 16))
    return next(count for count in range(most, 0, -1) if channels % count == 0)


def _ungrouped(x: Tensor, groups: int, parts: int) -> Tensor:
    """Channels in the order of group, part, channel to the order of part, group, channel; they are in dimension 2.

    A convolution gives each group its own block of channels, hence the order that it has.
    """
    if groups == 1 or parts == 1:
        return x
    x = torch.unflatten(x, 2, [groups, parts, x.size(2) // (groups * parts)])
    return x.transpose(2, 3).flatten(2, 4)


class MinConv(Base):
    """Layers, one over the other, in any number of space dimensions; the base of `MinConv2dGRU` and its siblings."""

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
            remedy = f"they are {input_dims} and {hidden_dims}"
            raise ValueError(
                expectation(self.name, "groups", "a divisor of input_dims and hidden_dims", str(groups), remedy)
            )
        options = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
        geometries = self._geometries(num_layers, options)
        self.input_dims = input_dims
        self.hidden_dims = _kept(hidden_dims)
        self.kernel_size = _kept(kernel_size)
        self.num_layers = num_layers
        self.stride = _kept(stride)
        self.padding = _kept(padding)
        self.dilation = _kept(dilation)
        self.groups = groups
        self.bias = bias
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.residual = residual
        self.norm = norm
        self.candidate = candidate
        self.learn_initial_state = learn_initial_state
        self.batch_first = batch_first

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_directions = 2 if bidirectional else 1
        # Of an instance too, as TorchScript sees none of a class.
        self.num_space_dims = type(self).num_space_dims
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
                self.learn_initial_state,
                factory,
            )
            for index in range(num_layers)
        )

    def reset_parameters(self) -> None:
        """Draw all weights anew, as the constructor did."""
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

    def _per_layer(self, argument: str, sizes: Any, num_layers: int) -> list[Any]:
        if not isinstance(sizes, list):
            return [sizes] * num_layers
        if len(sizes) != num_layers:
            expected = f"a list with one entry for each layer as num_layers is {num_layers}"
            remedy = "a tuple has one for each dimension of space"
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
                expected = f"a number where stride is {dims(geometry.stride)}"
                raise ValueError(expectation(self.name, "padding", expected, "'same', which needs a stride of 1"))
        return geometries

    def _per_dimension(self, argument: str, size: Any) -> Any:
        if argument == "padding" and size == "same":
            return size
        count = self.num_space_dims
        numbers = size if isinstance(size, tuple) else (size,) * count
        kinds = "an int" if count == 1 else f"an int, a tuple of {count} ints"
        expected = f"{kinds}, or a list of these with one for each layer"
        if len(numbers) != count:
            raise ValueError(expectation(self.name, argument, expected, f"{size!r}"))
        for number in numbers:
            check_int(self.name, argument, number, expected, 0 if argument == "padding" else 1)
        return numbers

    @untraced
    def _check(self, x: Tensor, h: Any, reset: Tensor | None) -> None:
        """Refuse what does not fit."""
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
        """Refuse an x that does not fit to the weights; returns channels and space of each layer's states."""
        if not isinstance(x, Tensor):
            raise TypeError(expectation(self.name, "x", "a tensor", type(x).__name__, "torch.as_tensor makes one"))
        count = self.num_space_dims
        if x.dim() != leading + 1 + count or x.shape[leading] != self.input_dims:
            letters = f"({order}, {self.input_dims}, *space)" if order else f"({self.input_dims}, *space)"
            expected = f"{letters} as input_dims is {self.input_dims} and space {count}-dimensional"
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
                expected = f"at least {least} in space where it enters layer {index}, which has {kernel}"
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
            "learn_initial_state": False,
            "batch_first": True,
        }
        return text + not_default(self, defaults)


def _kept(sizes: Any) -> Any:
    """What the caller wrote, safe from what becomes of his list."""
    return list(sizes) if isinstance(sizes, list) else sizes


class MinConvCell(MinConv):
    """One step of one layer; the base of `MinConv2dGRUCell` and its siblings."""

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
                raise ValueError(f"{self.name}: h must expand to (B, H, *space) beside x {x.shape}, got {h.shape}")
            if reset is not None and reset.shape != x.shape[:leading]:
                raise ValueError(f"{self.name}: reset must be {x.shape[:leading]}, got {reset.shape}")
        else:
            self._check_step(x, h, reset)
        batched = x.dim() == 2 + self.num_space_dims
        if h is not None:
            # The layer expands it, but to a shape with one more dimension, that of time, behind the batch.
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
        return without_dims(states[0], [1] if batched else [1, 0])

    @untraced
    def _check_step(self, x: Tensor, h: Tensor | None, reset: Tensor | None) -> None:
        """Refuse what does not fit."""
        batched = not isinstance(x, Tensor) or x.dim() != 1 + self.num_space_dims
        (state,) = self._check_x(x, "B" if batched else "", int(batched))
        batch = x.shape[: int(batched)]
        if h is not None:
            letters = "(B, H, *space)" if batched else "(H, *space)"
            check_one_state(self.name, h, letters)
            check_like(self.name, "h", h, x, "x", or_dtype=accumulate_dtype(x.dtype), autocast=is_autocast(x))
            expanded(self.name, "h", h, (*batch, *state), letters)
        # One value for each sequence.
        check_reset(self.name, reset, x.flatten(int(batched)).select(-1, 0), "(B,)" if batched else "a scalar")


class MinConv1dGRU(MinConv):
    """Stacked minGRU of one-dimensional convolutions, over sequences of signals; space is one size.

    As `mingru.MinConv2dGRU` in all else.

    Example:
        >>> rnn = mingru.MinConv1dGRU(input_dims=2, hidden_dims=8, kernel_size=5, padding=4, dilation=2)
        >>> out, states = rnn(torch.randn(3, 20, 2, 100))
        >>> out.shape, states[0].shape
        (torch.Size([3, 20, 8, 100]), torch.Size([3, 1, 8, 100]))
    """

    num_space_dims = 1


class MinConv2dGRU(MinConv):
    """Stacked minimal gated recurrent units with convolutions for linear maps, over sequences of images.

    Each layer and direction computes, at every place of the image and from its input x_t,

        z_t = sigma(W_z * x_t + b_z)
        h_t = (1 - z_t) h_{t-1} + z_t g(W_h * x_t + b_h)

    where * is a convolution over space, z the gate that admits the candidate, h the state, and g keeps the candidate
    positive (`mingru.functional.g`). Time is parallel: all steps are convolved as one batch.

    An argument that may differ from layer to layer is also taken as a list with one entry for each; a tuple has one
    number for each dimension of space. So `kernel_size=[3, (1, 5)]` is 3 x 3 in the first layer, 1 x 5 in the second.

    Args:
        input_dims: C, channels of the input; at least 1.
        hidden_dims: H, channels of the state; at least 1. An int, or a list.
        kernel_size: of the convolution. An int, a tuple, or a list of these; so are stride, padding and dilation.
        num_layers: L; layer l + 1 takes the output of layer l.
        stride: steps of the kernel over space.
        padding: places of 0 on each side of space; or "same", which keeps its size and needs a stride of 1.
        dilation: steps between the places that the kernel reads.
        groups: each part of the channels reads its own part of the input alone, in every layer (but for the norm). It
            divides `input_dims` and every entry of `hidden_dims`. Over a bidirectional layer, the forward channels come
            first. With more than one, the pre-activations are copied once.
        bias: whether the convolutions have one.
        dropout: probability in [0, 1] with which each element of each layer's output but the last's is dropped, in
            training only.
        bidirectional: a second direction in each layer, with weights of its own, reads from the end; D = 2, else 1.
        residual: adds each layer's input to its output; where channels differ, or space could, through a convolution of
            the same kernel, stride, padding, dilation and groups, without bias. The state is the one without it.
        norm: "group" on the input of every layer, each step for itself, or None. It has as many groups, up to 32, as
            share the channels evenly with 16 or more to each: one, so, for fewer than 32 channels.
        candidate: "positive": g, the paper's log-space form; "linear": v itself, its plain form; "tanh".
        learn_initial_state: makes the state that stands for 'nothing seen yet' a parameter: a number for each layer,
            direction and channel, the same at every place, so that images may have any size.
        batch_first: x is (B, S, C, *space), as against (S, B, C, *space). No data is copied for either.
        device: of the parameters.
        dtype: of the parameters, a floating one.

    Called with:
        x: (B, S, C, *space), or (S, B, C, *space) with `batch_first=False`; dtype and device of the parameters. B or S
            may be 0.
        h: states before the first step, any real numbers: a list with a tensor for each layer and direction, which
            expands to (B, 1, H, *space) of that layer; dtype of x, or float32 beside half-width x. Index l * D is layer
            l forward, l * D + 1 backward. Default: the 'zero' state g(0) = 0.5 (0 where `candidate` is not "positive"),
            or the learned one.
        reset: bool, the first two dimensions of x. Where true, the state is put back to the zero or learned state
            before that step consumes its input. The backward direction is cut at the same place: between that step and
            the one before it.

    Returns:
        A tensor and a list. `out`, (B, S, D * H, *space) or (S, B, D * H, *space), is the last layer's output, both
        directions in the order of time; a space of size n comes out of each layer as
        (n + 2 padding - dilation (kernel_size - 1) - 1) // stride + 1. The list has each layer's and direction's state
        after its last step, (B, 1, H, *space), so that `rnn(x2, states)` continues. All are differentiable.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a size, shape, device, norm, candidate or dropout that does not fit; a list of another length than
            the layers; an image too small for a kernel.

    Parameters: `layers.{l}.conv.weight` (2H, C / groups, *kernel_size), gate rows first, candidate rows second, and
    `.bias` (2H); with groups, that order within each group, whose rows lie together. `layers.{l}.conv_reverse`,
    `.norm`, `.align` (the residual's map, (D * H, C / groups, *kernel_size); with groups, each has its forward rows,
    then its backward ones) and `.initial_state` (D, 1, 1, H, 1, 1) where asked for. Drawn as `torch.nn.Conv2d` draws.

    Numerics: as of `mingru.MinGRU`, once the convolution is done. On the CPU and without a gradient, a long input is
    convolved block by block, unless the convolution has hooks: much quicker, in less memory, and the same but for
    rounding.

    Differs from the convolutional GRU in that no convolution reads the state: a place learns of its neighbours' past
    through the layers above alone.

    Example:
        >>> rnn = mingru.MinConv2dGRU(3, [16, 32], kernel_size=3, num_layers=2, stride=[1, 2], padding=1)
        >>> out, states = rnn(torch.randn(4, 10, 3, 32, 32))
        >>> out.shape, [state.shape for state in states]
        (torch.Size([4, 10, 32, 16, 16]), [torch.Size([4, 1, 16, 32, 32]), torch.Size([4, 1, 32, 16, 16])])
        >>> out, states = rnn(torch.randn(4, 1, 3, 32, 32), states)  # the next image

    Source: Feng et al. 2024, "Were RNNs All We Needed?", section 3.1; Ballas et al. 2016, "Delving Deeper into
    Convolutional Networks for Learning Video Representations", section 3.1, for the convolutional GRU.
    """

    num_space_dims = 2


class MinConv3dGRU(MinConv):
    """Stacked minGRU of three-dimensional convolutions, over sequences of volumes.

    As `mingru.MinConv2dGRU` in all else.

    Example:
        >>> rnn = mingru.MinConv3dGRU(input_dims=1, hidden_dims=4, kernel_size=3, padding=1)
        >>> out, states = rnn(torch.randn(2, 5, 1, 8, 8, 8))
        >>> out.shape, states[0].shape
        (torch.Size([2, 5, 4, 8, 8, 8]), torch.Size([2, 1, 4, 8, 8, 8]))
    """

    num_space_dims = 3


class MinConv1dGRUCell(MinConvCell):
    """One step of a one-layer `mingru.MinConv1dGRU`; called and built as `mingru.MinConv2dGRUCell` is.

    Example:
        >>> cell = mingru.MinConv1dGRUCell(input_dims=2, hidden_dims=8, kernel_size=3, padding=1)
        >>> cell(torch.randn(4, 2, 50)).shape
        torch.Size([4, 8, 50])
    """

    num_space_dims = 1


class MinConv2dGRUCell(MinConvCell):
    """One step of a one-layer `mingru.MinConv2dGRU`, for loops of the caller's own.

    Args:
        input_dims: as of `mingru.MinConv2dGRU`, for its only layer.
        hidden_dims: as of `mingru.MinConv2dGRU`, for its only layer.
        kernel_size: as of `mingru.MinConv2dGRU`, for its only layer.
        stride: as of `mingru.MinConv2dGRU`, for its only layer.
        padding: as of `mingru.MinConv2dGRU`, for its only layer.
        dilation: as of `mingru.MinConv2dGRU`, for its only layer.
        groups: as of `mingru.MinConv2dGRU`, for its only layer.
        bias: as of `mingru.MinConv2dGRU`, for its only layer.
        norm: as of `mingru.MinConv2dGRU`.
        candidate: as of `mingru.MinConv2dGRU`.
        learn_initial_state: as of `mingru.MinConv2dGRU`.
        device: as of `mingru.MinConv2dGRU`.
        dtype: as of `mingru.MinConv2dGRU`.

    Called with:
        x: (B, C, *space), or (C, *space) without a batch.
        h: the state before this step, any real numbers, which expands to (B, H, *space), or to (H, *space) without a
            batch, where space is that of the output; dtype of x, or float32 beside half-width x. Default: as of
            `MinConv2dGRU`.
        reset: bool (B), or () without a batch: where true, the state is put back before this step.

    Returns:
        The state after this step, (B, H, *space) or (H, *space).

    Raises and parameters: as of `MinConv2dGRU` with one layer; `load_state_dict` takes either's.

    Example:
        >>> cell = mingru.MinConv2dGRUCell(input_dims=3, hidden_dims=8, kernel_size=3, stride=2)
        >>> h = cell(torch.randn(4, 3, 9, 9))
        >>> h = cell(torch.randn(4, 3, 9, 9), h)
        >>> h.shape
        torch.Size([4, 8, 4, 4])
    """

    num_space_dims = 2


class MinConv3dGRUCell(MinConvCell):
    """One step of a one-layer `mingru.MinConv3dGRU`; called and built as `mingru.MinConv2dGRUCell` is.

    Example:
        >>> cell = mingru.MinConv3dGRUCell(input_dims=1, hidden_dims=4, kernel_size=(1, 3, 3))
        >>> cell(torch.randn(2, 1, 5, 6, 7)).shape
        torch.Size([2, 4, 5, 4, 5])
    """

    num_space_dims = 3
