"""Convert weights of the package cheind/mingru, version 1.4.2."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from ..check.values import require
from ..modules.level import Level
from ..modules.minconvgru import MinConv2dGRU
from ..modules.mingru import MinGRU
from ..modules.stack import Stack
from .state_dict import Checkpoint

LAYER, CELL = "layers.{}.gate_hidden.weight", "to_gate_hidden.weight"
# Names of the parts of a layer.
NAMES = {"linear": "gate_hidden", "conv": "gate_hidden", "align": "res_align", "norm": "norm"}
OLDER = ("to_gate_hidden.0.", "linear_gate_hidden.", "linear_z.")


def from_cheind(
    state_dict: Mapping[str, Tensor],
    prefix: str = "",
    *,
    residual: bool | None = None,
    dropout: float = 0.0,
    stride: int | tuple[int, ...] | list[int | tuple[int, ...]] | None = None,
    padding: int | tuple[int, ...] | str | list[int | tuple[int, ...] | str] | None = None,
    num_groups: int | list[int] | None = None,
) -> MinGRU | MinConv2dGRU | Stack:
    """Convert the weights of a layer of cheind/mingru, the package that this one replaces.

    The converted layer computes the same outputs and states, from a given state and from the initial state, g(0) = 0.5
    in both packages. `mingru.MinGRU` has the equations.

    Args:
        state_dict: Tensors by name, of one dtype and device, with the names of version 1.4.2, the last one:
            `layers.{i}.gate_hidden`, `.norm`, `.res_align` of `MinGRU` and `MinConv2dGRU`, or `to_gate_hidden` of
            `MinGRUCell` and `MinConv2dGRUCell`. The guide "Coming from another minGRU" shows how
            to rename those of older versions.
        prefix: Prefix of the layer's names inside a model, such as "rnn."; other names are ignored. Default: no
            prefix.
        residual: Value of the original option `residual`. Required if no layer changes the size of its input, because
            the weights then do not show it. Default: inferred from the weights.
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
        `layers.{l}.layers.0.` in a `Stack`. The group norms mostly have another number of groups than those of a new
        layer. The number is saved as `layers.{l}.norm.groups`, which a new `MinConv2dGRU(..., norm="group")` loads and
        `torch.nn.GroupNorm` rejects.

    Pass states of cheind/mingru's `MinGRU`, a list of (B, 1, H), as `torch.stack(h)`, and those for a `Stack` or a
    `MinConv2dGRU` unchanged.

    In this package, a state may be 0 or negative.

    cheind/mingru's `Bidirectional` runs one layer twice with the same weights, and leaves the second output in reverse
    order. No layer of this package does that. Convert with the prefix "rnn.", and join `layer(x)[0]` and
    `layer(x.flip(1))[0]` by `torch.cat` along dimension 2.

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
        https://github.com/cheind/mingru at aa35d42, `mingru/modules.py`.
    """
    name = "from_cheind"
    is_valid = residual is None or isinstance(residual, bool)
    require(name, "residual", is_valid, "a bool", repr(residual), error=TypeError)
    found = Checkpoint(name, state_dict, prefix)
    is_cell = CELL in found
    num_layers = 1 if is_cell else found.count(LAYER)
    if num_layers == 0:
        is_older = any(key.startswith(OLDER) for key in found)
        older = 'see the guide "Coming from another minGRU" to rename keys of versions before 1.4.2' if is_older else ""
        raise found.without([LAYER.format(0), CELL], older)

    def key(index: int, part: str, kind: str) -> str:
        return f"to_gate_hidden.{kind}" if is_cell else f"layers.{index}.{NAMES[part]}.{kind}"

    weights = _linears(found, [key(index, "linear", "weight") for index in range(num_layers)])
    has_kernel = weights[0].dim() == 4
    has_norm = key(0, "norm", "weight") in found and not is_cell
    without = f"None because the weights have no {'group norm' if has_kernel else 'convolution'}"
    remedy = "convolutional weights do not show it"
    for argument, value in (("stride", stride), ("padding", padding)):
        require(name, argument, value is not None or not has_kernel, "given", "None", remedy)
        require(name, argument, value is None or has_kernel, without, repr(value))
    require(name, "num_groups", num_groups is None or (has_kernel and has_norm), without, repr(num_groups))

    input_dims, hidden_sizes = weights[0].shape[1], [weight.shape[0] // 2 for weight in weights]
    # "meta" skips the initialization, which would also change the state of the caller's random generator.
    options: dict[str, Any] = {"bias": key(0, "linear", "bias") in found, "device": "meta", "dtype": weights[0].dtype}
    if has_kernel:
        kernels = [tuple(weight.shape[2:]) for weight in weights]
        sizes = [size[0] if size[0] == size[1] else size for size in kernels]
        options |= {"kernel_size": _common(sizes), "stride": stride, "padding": padding}
    if has_norm:
        options["norm"] = "group" if has_kernel else "layer"

    def construct(residual: bool, dropout: float) -> MinGRU | MinConv2dGRU | Stack:
        common: dict[str, Any] = {"residual": residual, **options}
        if has_kernel:
            return MinConv2dGRU(input_dims, _common(hidden_sizes), num_layers=num_layers, dropout=dropout, **common)
        if len(set(hidden_sizes)) == 1:
            return MinGRU(input_dims, hidden_sizes[0], num_layers, dropout=dropout, **common)
        return Stack([MinGRU(*sizes, **common) for sizes in pairwise([input_dims, *hidden_sizes])], dropout=dropout)

    if is_cell:
        require(name, "residual", not residual, "False or None because a cell has no residual", "True")
        residual = False
    elif residual is None:
        residual = any(key(index, "align", "weight") in found for index in range(num_layers))
        is_visible = any("align" in key for key in construct(True, 0.0).state_dict())
        remedy = "the weights do not show it, because no layer changes the size of its input"
        require(name, "residual", residual or is_visible, "True or False", "None", remedy)
    layer = construct(residual, dropout)
    parts = [(path, part) for path, part in layer.named_modules() if isinstance(part, Level)]
    keys = {
        f"{path}.{parameter}": key(index, *parameter.split("."))
        for index, (path, part) in enumerate(parts)
        for parameter, _ in part.named_parameters()
    }
    found.check(list(keys.values()))
    found.into(layer, keys)
    if has_kernel and has_norm:
        _regroup(name, num_groups, [part.norm for _, part in parts])
    return layer


def _linears(found: Checkpoint, keys: list[str]) -> list[Tensor]:
    """Return the weight of each layer, (2H, I) or (2H, I, kernel_h, kernel_w), gate rows first."""
    found.check(keys, None)
    letters = {2: "(2 * H, I)", 4: "(2 * H, I, kernel_h, kernel_w)"}
    num_dims = found[keys[0]].dim()
    expected = letters.get(num_dims, " or ".join(letters.values()))
    for key in keys:
        shape = found[key].shape
        is_valid = num_dims in letters and len(shape) == num_dims and all(shape) and shape[0] % 2 == 0
        found.check_shape(key, is_valid, expected)
    return [found[key] for key in keys]


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
