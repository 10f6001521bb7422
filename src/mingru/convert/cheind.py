"""Convert weights of every version of the package cheind/mingru."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..check import require
from ..modules.marked import marks_of
from ..modules.minconvgru import MinConv2dGRU
from ..modules.mingru import MinGRU
from ..modules.stack import Stack
from ..modules.stacked import Directions
from .state_dict import Checkpoint


class Form(NamedTuple):
    """Names of the parts of a layer in one version of cheind/mingru; {} stands for the index of the layer."""

    linear: tuple[str, ...]  # one map with the gate's rows first, or a map for the gate and one for the candidate
    align: str | None = None
    norm: str | None = None

    @property
    def is_uniform(self) -> bool:
        """Return whether all layers have one hidden size, and a residual always has one map, in the first layer."""
        return self.align is not None and "{}" not in self.align

    def num_layers(self, found: Checkpoint) -> int:
        return found.count(f"{self.linear[0]}.weight")

    def keys(self, part: str, kind: str, index: int) -> list[str]:
        """Return the keys whose tensors form one parameter of this package; `part` as `RecurrentLayer` names it."""
        names = {"linear": self.linear, "conv": self.linear, "align": (self.align,), "norm": (self.norm,)}[part]
        return [f"{name.format(index)}.{kind}" for name in names if name is not None]


FORMS = (
    Form(("layers.{}.gate_hidden",), "layers.{}.res_align", "layers.{}.norm"),
    Form(("to_gate_hidden.{}",), "residual_layers.{}"),
    Form(("to_gate_hidden",)),
    Form(("linear_gate_hidden.{}",), "input_residual_align"),
    Form(("linear_z.{}", "linear_h.{}"), "input_residual_align"),
)


def from_cheind(
    state_dict: Mapping[str, Tensor],
    prefix: str = "",
    *,
    residual: bool | None = None,
    dropout: float = 0.0,
    stride: int | tuple[int, ...] | list[Any] | None = None,
    padding: int | tuple[int, ...] | str | list[Any] | None = None,
    num_groups: int | list[int] | None = None,
) -> MinGRU | MinConv2dGRU | Stack:
    """Convert the weights of a layer of cheind/mingru, the package that this one replaces.

    The converted layer computes the same outputs and states, from a given state and from the initial state, g(0) = 0.5
    in both packages. [mingru.MinGRU][] has the equations.

    Args:
        state_dict: Tensors by name, of one dtype and device, with the names of version 1.1.0 or later:

            - `layers.{i}.gate_hidden`, `.norm`, `.res_align` of `MinGRU` and `MinConv2dGRU`, from 29 November 2024 on
              (version 1.4.2, and the last commits of 1.4.0);
            - `to_gate_hidden.{i}`, `residual_layers.{i}` of the same classes, earlier in version 1.4.0;
            - `to_gate_hidden` of `MinGRUCell` and `MinConv2dGRUCell`;
            - `linear_gate_hidden.{i}`, `input_residual_align` of `MinGRU`, versions 1.2.1 and 1.3.0;
            - `linear_z.{i}`, `linear_h.{i}`, `input_residual_align` of `MinGRU`, versions 1.1.0 and 1.2.0.

        prefix: Prefix of the layer's names inside a model, such as "rnn."; other names are ignored. Default: no
            prefix.
        residual: Value of the original option `residual`. Required from version 1.4.0 on if no layer changes the size
            of its input, because the weights then do not show it. Default: inferred from the weights.
        dropout: Dropout probability of the new layer. It may differ from the original.
        stride: Original option `strides`, a number or a list with one number for each layer. Required for a
            convolutional layer.
        padding: Original option `paddings`, a number or a list with one number for each layer. Required for a
            convolutional layer.
        num_groups: Number of groups of a convolutional layer's norms, or a list with one number for each layer.
            Default: cheind/mingru's rule, the first of 64, 32, 16, 8, 4 that divides the channels and leaves at least 4
            to each group, else 1.

    Returns:
        A `mingru.MinGRU` if all hidden sizes are equal, else a `mingru.Stack` with one `MinGRU` for each layer; a
        `mingru.MinConv2dGRU` for convolutional weights. The layer holds copies of the tensors, in their dtype and on
        their device. Cells become layers, because cheind/mingru's cells take sequences; `mingru.MinGRUCell` takes the
        state_dict of a `MinGRU` of one layer.

    Raises:
        TypeError: `state_dict` is not a mapping, `residual` is not a bool, or the tensors have different or integer
            dtypes.
        ValueError: A key is missing or unexpected, a shape does not fit, tensors are on different devices, or an
            argument is missing or does not fit. Errors of the constructors pass through.

    State dict:
        `layers.{l}.linear`, `.norm` and `.align` as in `MinGRU`, `.conv` as in `MinConv2dGRU`; under
        `layers.{l}.layers.0.` in a `Stack`. Two things differ from a newly constructed layer:

        - Until version 1.3.0, the residual's linear map had a bias and was there even for equal sizes. Then
          `layers[0].align` is a `torch.nn.Linear` like the original. A new `MinGRU(..., residual=True)` rejects the
          state_dict because of the key `layers.0.align.bias`; set `layers[0].align = torch.nn.Linear(I, H)` first.
        - The group norms mostly have another number of groups. The number is saved as `layers.{l}.norm.groups`, which
          a new `MinConv2dGRU(..., norm="group")` loads and `torch.nn.GroupNorm` rejects.

    Pass states of cheind/mingru's `MinGRU`, a list of (B, 1, H), as `torch.stack(h)`. A state tensor of version 1.3.0
    or earlier, and a list for a `Stack` or a `MinConv2dGRU`, can be passed unchanged.

    `dropout` is applied only in training, and divides by 1 - dropout. In cheind/mingru, it was also applied in
    evaluation, and did not divide, until a commit of 25 November 2024, "fix dropout in eval mode". In this package, a
    state may be 0 or negative.

    cheind/mingru's `Bidirectional` runs one layer twice with the same weights, and leaves the second output in reverse
    order. No layer of this package does that. Convert with the prefix "rnn.", and join `layer(x)[0]` and
    `layer(x.flip(1))[0]` by `torch.cat` along dimension 2.

    Not converted: `layer_transforms` of version 1.2; the names `linear_z.weight`, `gate_hidden_layers` and
    `align_layers`, each used for a day between versions; norms without weights, which convolutional layers had for two
    hours on 29 November 2024 and which no state_dict shows.

    Examples:
        >>> checkpoint = {
        ...     "layers.0.gate_hidden.weight": torch.randn(12, 4),
        ...     "layers.0.gate_hidden.bias": torch.randn(12),
        ...     "layers.0.res_align.weight": torch.randn(6, 4),
        ...     "layers.1.gate_hidden.weight": torch.randn(12, 6),
        ...     "layers.1.gate_hidden.bias": torch.randn(12),
        ... }
        >>> layer = mingru.convert.from_cheind(checkpoint)
        >>> layer.num_layers, layer.residual, layer.layers[0].align
        (2, True, Linear(in_features=4, out_features=6, bias=False))
        >>> out, h = layer(torch.randn(2, 10, 4))
        >>> out.shape, h.shape
        (torch.Size([2, 10, 6]), torch.Size([2, 2, 1, 6]))

    References:
        https://github.com/cheind/mingru from 3597563 (version 1.1.0) to aa35d42, `mingru/modules.py` and the files
        before it.
    """
    name = "from_cheind"
    is_valid = residual is None or isinstance(residual, bool)
    require(name, "residual", is_valid, "a bool", repr(residual), error=TypeError)
    found = Checkpoint(name, state_dict, prefix)
    form = next((form for form in FORMS if form.num_layers(found)), None)
    if form is None:
        raise found.without([form.keys("linear", "weight", 0)[0] for form in FORMS])
    weights = _linears(found, form)
    has_kernel = weights[0].dim() == 4
    has_norm = form.norm is not None and form.keys("norm", "weight", 0)[0] in found
    without = f"None because the weights have no {'group norm' if has_kernel else 'convolution'}"
    remedy = "convolutional weights do not show it"
    for argument, value in (("stride", stride), ("padding", padding)):
        require(name, argument, value is not None or not has_kernel, "given", "None", remedy)
        require(name, argument, value is None or has_kernel, without, repr(value))
    require(name, "num_groups", num_groups is None or (has_kernel and has_norm), without, repr(num_groups))

    num_layers = len(weights)
    input_dims, hidden_sizes = weights[0].shape[1], [weight.shape[0] // 2 for weight in weights]
    bias = form.keys("linear", "bias", 0)[0] in found
    # "meta" skips the initialization, which would also change the state of the caller's random generator.
    factory: dict[str, Any] = {"device": "meta", "dtype": weights[0].dtype}
    options: dict[str, Any] = {"bias": bias, **factory}
    if has_kernel:
        kernels = [tuple(weight.shape[2:]) for weight in weights]
        options |= {"kernel_size": _common(kernels), "stride": stride, "padding": padding}
    if has_norm:
        options["norm"] = "group" if has_kernel else "layer"

    def construct(residual: bool, dropout: float) -> MinGRU | MinConv2dGRU | Stack:
        common: dict[str, Any] = {"residual": residual, **options}
        if has_kernel:
            return MinConv2dGRU(input_dims, _common(hidden_sizes), num_layers=num_layers, dropout=dropout, **common)
        if form.is_uniform or len(set(hidden_sizes)) == 1:
            return MinGRU(input_dims, hidden_sizes[0], num_layers, dropout=dropout, **common)
        return Stack([MinGRU(*sizes, **common) for sizes in pairwise([input_dims, *hidden_sizes])], dropout=dropout)

    if form.align is None:
        require(name, "residual", not residual, "False or None because a cell has no residual", "True")
        residual = False
    elif residual is None:
        residual = any(form.keys("align", "weight", index)[0] in found for index in range(num_layers))
        is_visible = form.is_uniform or any("align" in key for key in construct(True, 0.0).state_dict())
        remedy = "the weights do not show it, because no layer changes the size of its input"
        require(name, "residual", residual or is_visible, "True or False", "None", remedy)
    layer = construct(residual, dropout)
    layers: Any = layer.layers
    if form.is_uniform and residual:
        layers[0].align = nn.Linear(input_dims, hidden_sizes[0], bias, **factory)
    _load(found, form, layer)
    if has_kernel and has_norm:
        _regroup(name, num_groups, [part.norm for part in layers])
    return layer


def _linears(found: Checkpoint, form: Form) -> list[Tensor]:
    """Return the weight of each layer, (2H, I) or (2H, I, kernel_h, kernel_w), gate rows first."""
    by_layer = [form.keys("linear", "weight", index) for index in range(form.num_layers(found))]
    keys = [key for of_layer in by_layer for key in of_layer]
    found.check(keys, None)
    rows, divisor = ("2 * H", 2) if len(form.linear) == 1 else ("H", 1)
    letters = {2: f"({rows}, I)", 4: f"({rows}, I, kernel_h, kernel_w)"}
    num_dims = found[keys[0]].dim()
    expected = letters.get(num_dims, " or ".join(letters.values()))
    for key in keys:
        shape = found[key].shape
        is_valid = num_dims in letters and len(shape) == num_dims and all(shape) and shape[0] % divisor == 0
        found.check_shape(key, is_valid, expected)
    for gate, *candidate in by_layer:
        found.check_shapes(candidate, found[gate].shape, gate)
    return [torch.cat([found[key] for key in of_layer]) for of_layer in by_layer]


def _load(found: Checkpoint, form: Form, layer: nn.Module) -> None:
    """Load the tensors into the layer, which must need all of them."""
    parts = [(path, part) for path, part in layer.named_modules() if isinstance(part, Directions)]
    targets = []
    for index, (path, part) in enumerate(parts):
        for key, parameter in part.named_parameters():
            map_name, kind = key.split(".")
            targets.append((f"{path}.{key}", parameter.shape, form.keys(map_name, kind, index)))
    first = targets[0][2][0]
    found.check([key for *_, keys in targets for key in keys])
    for _, shape, keys in targets:
        found.check_shapes(keys, (shape[0] // len(keys), *shape[1:]), first)
    state = {target: torch.cat([found[key] for key in keys]) for target, _, keys in targets}
    layer.load_state_dict({**marks_of(layer), **state}, assign=True)


def _regroup(name: str, num_groups: int | list[int] | None, norms: list[Any]) -> None:
    """Set the numbers of groups of the norms: the given numbers, or by cheind/mingru's rule."""
    numbers = num_groups if isinstance(num_groups, list) else [num_groups] * len(norms)
    expected = f"a number or a list of {len(norms)}, one for each layer"
    require(name, "num_groups", len(numbers) == len(norms), expected, repr(num_groups))
    for norm, given in zip(norms, numbers, strict=True):
        channels = norm.num_channels
        by_rule = (n for n in (64, 32, 16, 8, 4, 1) if channels % n == 0 and channels >= n * min(4, channels))
        groups = next(by_rule) if given is None else given
        if groups != norm.num_groups:
            norm.regroup(groups)


def _common(values: list[Any]) -> Any:
    """Return the value if all values are equal, else the list."""
    return values[0] if all(value == values[0] for value in values) else values
