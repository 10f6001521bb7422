"""From weights that other code bases trained to layers of this package with the same outputs."""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .check import check_like, dims, expectation
from .modules import MinConv2dGRU, MinGRU, MinLSTM, Stack
from .ops import States
from .ops.activation import g

__all__ = ["Projected", "from_cheind", "from_lucidrains", "from_minrnns"]

# By the parts of H rows that a weight has.
CLASSES: dict[int, type[MinGRU] | type[MinLSTM]] = {2: MinGRU, 3: MinLSTM}


class Projected(nn.Module):
    """A recurrent layer with a linear map over its output.

        y_t, h = rnn(x, h, reset)
        out_t = W y_t + b

    where y is the layer's output, h its state, and W and b belong to `out`. The state is the one before the map.

    Args:
        rnn: the layer, `mingru.MinGRU` or a sibling; output (B, S, D * H).
        out: the map of its output, `torch.nn.Linear(D * H, O)` or another module that takes (B, S, D * H).

    Called with:
        x: as `rnn` takes it.
        h: state before the first step, as `rnn` takes it. Default: `rnn`'s own.
        reset: as `rnn` takes it.

    Returns:
        Two tensors: the projected output, (B, S, O) or (S, B, O), and the state as `rnn` returns it, so that
        `layer(x2, h)` continues.

    Raises:
        TypeError, ValueError: from `rnn`.

    Parameters: those of `rnn` under `rnn.`, those of `out` under `out.`.

    Example:
        >>> layer = mingru.convert.Projected(mingru.MinGRU(4, 6), torch.nn.Linear(6, 4))
        >>> out, h = layer(torch.randn(2, 10, 4))
        >>> out.shape, h.shape
        (torch.Size([2, 10, 4]), torch.Size([1, 2, 1, 6]))
    """

    def __init__(self, rnn: nn.Module, out: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn
        self.out = out

    def forward(self, x: Tensor, h: Tensor | None = None, reset: Tensor | None = None) -> States:
        y, h = self.rnn(x, h, reset)
        return self.out(y), h


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
    """Make a layer of the weights of a layer of cheind/mingru, the package that this one replaces.

    It computes the same outputs and states, from a given state and from the default one, g(0) = 0.5 in both packages
    (`MinGRU` has the equations).

    Args:
        state_dict: tensors by name, of one dtype and device, with the names of version 1.1.0 or later:

            - `layers.{i}.gate_hidden`, `.norm`, `.res_align` of `MinGRU` and `MinConv2dGRU`, from 29 November 2024 on
              (version 1.4.2, and 1.4.0 at its end);
            - `to_gate_hidden.{i}`, `residual_layers.{i}` of the same, version 1.4.0 before;
            - `to_gate_hidden` of `MinGRUCell` and `MinConv2dGRUCell`;
            - `linear_gate_hidden.{i}`, `input_residual_align` of `MinGRU`, versions 1.2.1 and 1.3.0;
            - `linear_z.{i}`, `linear_h.{i}`, `input_residual_align` of `MinGRU`, versions 1.1.0 and 1.2.0.

        prefix: the part of the names before these, for a layer inside a model: "rnn." for example. Other names are left
            alone. Default: no prefix.
        residual: what `residual` was. Needed from version 1.4.0 on if no layer changes the size of its input, because
            the weights then don't show it. Default: as the weights show it.
        dropout: the new layer's `dropout`, for training. It may differ from what it was.
        stride: for a convolutional layer, needed: what `strides` was, a number or a list with one for each layer.
        padding: for a convolutional layer, needed: what `paddings` was, a number or a list with one for each layer.
        num_groups: for a convolutional layer with norm: groups of its norm, a number or a list with one for each layer.
            Default: by their rule, the first of 64, 32, 16, 8, 4 that divides the channels and leaves at least 4 to
            each group, else 1.

    Returns:
        A `mingru.MinGRU` if all hidden sizes are equal, else a `mingru.Stack` with one `MinGRU` for each layer; for
        convolutional weights a `mingru.MinConv2dGRU`. Dtype and device are those of the tensors, of which the layer
        holds copies. Cells become layers, because their cells take sequences; `mingru.MinGRUCell` takes the state_dict
        of a `MinGRU` of one layer.

    Raises:
        TypeError: no state_dict, a residual that is not a bool, or tensors of different or integer dtypes.
        ValueError: the first key that is missing or one too many, a shape that does not fit, tensors on different
            devices, an argument that is needed or that does not fit; and what the constructors raise.

    Parameters: `layers.{l}.linear`, `.norm`, `.align` as `MinGRU` has them, `.conv` as `MinConv2dGRU` has it, under
    `layers.{l}.layers.0.` in a `Stack`. Two things differ from a layer that a constructor makes:

    - Until version 1.3.0 the residual's linear map had a bias, and was there even if the sizes were equal. Then
      `layers[0].align` is a `torch.nn.Linear` like theirs. A new `MinGRU(..., residual=True)` refuses the state_dict,
      because of the key `layers.0.align.bias`, until it has `layers[0].align = torch.nn.Linear(I, H)` too.
    - Their group norms mostly have another number of groups. It is in the state_dict as `layers.{l}.norm.groups`, and
      a new `MinConv2dGRU(..., norm="group")` takes it from there. torch's own `GroupNorm` refuses it.

    States: their list of a `MinGRU`, (B, 1, H) each, goes in as `torch.stack(h)`, their tensor of version 1.3.0 or
    earlier as it is, and so do lists for a `Stack` or a `MinConv2dGRU`.

    Differs from theirs in `dropout`, which drops in training only and divides by 1 - dropout. Theirs also dropped in
    evaluation, and did not divide, until a commit of 25 November 2024, "fix dropout in eval mode". Initial states
    may be 0 or negative.

    Their `Bidirectional` runs one layer twice with the same weights, and leaves the second output in reverse order. No
    layer here does, but two calls do: convert with the prefix "rnn.", and join `layer(x)[0]` with
    `layer(x.flip(1))[0]` by `torch.cat` along dimension 2.

    Not converted: `layer_transforms` of version 1.2; the names `linear_z.weight`, `gate_hidden_layers` and
    `align_layers` of a day each between versions; norms without weights that convolutional layers had for two hours on
    29 November 2024, which no state_dict shows.

    Example:
        >>> theirs = {
        ...     "layers.0.gate_hidden.weight": torch.randn(12, 4),
        ...     "layers.0.gate_hidden.bias": torch.randn(12),
        ...     "layers.0.res_align.weight": torch.randn(6, 4),
        ...     "layers.1.gate_hidden.weight": torch.randn(12, 6),
        ...     "layers.1.gate_hidden.bias": torch.randn(12),
        ... }
        >>> layer = mingru.convert.from_cheind(theirs)
        >>> layer.num_layers, layer.residual, layer.layers[0].align
        (2, True, Linear(in_features=4, out_features=6, bias=False))
        >>> out, h = layer(torch.randn(2, 10, 4))
        >>> out.shape, h.shape
        (torch.Size([2, 10, 6]), torch.Size([2, 2, 1, 6]))

    Source: https://github.com/cheind/mingru from 3597563 (version 1.1.0) to aa35d42, `mingru/modules.py` and the files
    before it.
    """
    name = "from_cheind"
    if residual is not None and not isinstance(residual, bool):
        raise TypeError(expectation(name, "residual", "a bool", repr(residual)))
    tensors = _under(name, state_dict, prefix)
    form = _form_of(name, state_dict, prefix, tensors)
    weights = _linears(name, prefix, tensors, form)
    has_kernel = weights[0].dim() == 4
    has_norm = form.norm is not None and form.keys("norm", 0, "weight")[0] in tensors
    for argument, value, needed, fits in (
        ("stride", stride, has_kernel, has_kernel),
        ("padding", padding, has_kernel, has_kernel),
        ("num_groups", num_groups, False, has_kernel and has_norm),
    ):
        if needed and value is None:
            raise ValueError(expectation(name, argument, "given", "None", "the weights of a convolution don't show it"))
        if value is not None and not fits:
            without = "group norm" if has_kernel else "convolution"
            raise ValueError(expectation(name, argument, f"None for weights without a {without}", repr(value)))

    num_layers = len(weights)
    input_dims, widths = weights[0].shape[1], [weight.shape[0] // 2 for weight in weights]
    bias = form.keys("linear", 0, "bias")[0] in tensors
    # On "meta" nothing is drawn that the weights would replace, and the caller's seed stays where it is.
    factory: dict[str, Any] = {"device": "meta", "dtype": weights[0].dtype}
    options: dict[str, Any] = {"bias": bias, **factory}
    if has_kernel:
        kernels = [tuple(weight.shape[2:]) for weight in weights]
        options |= {"kernel_size": _common(kernels), "stride": stride, "padding": padding}
    if has_norm:
        options["norm"] = "group" if has_kernel else "layer"

    def made(residual: bool, dropout: float) -> tuple[MinGRU | MinConv2dGRU | Stack, dict[str, Any]]:
        """The layer, and what is one layer in it, by the beginning of its parameters' names."""
        common: dict[str, Any] = {"residual": residual, **options}
        if has_kernel:
            conv = MinConv2dGRU(input_dims, _common(widths), num_layers=num_layers, dropout=dropout, **common)
            return conv, {f"layers.{index}.": part for index, part in enumerate(conv.layers)}
        if form.is_uniform or len(set(widths)) == 1:
            rnn = MinGRU(input_dims, widths[0], num_layers, dropout=dropout, **common)
            return rnn, {f"layers.{index}.": part for index, part in enumerate(rnn.layers)}
        rnns = [MinGRU(*sizes, **common) for sizes in pairwise([input_dims, *widths])]
        stack = Stack(rnns, dropout=dropout)
        return stack, {f"layers.{index}.layers.0.": rnn.layers[0] for index, rnn in enumerate(rnns)}

    if form.align is None:
        if residual:
            raise ValueError(expectation(name, "residual", "False or None, as a cell has no residual", "True"))
        residual = False
    elif residual is None:
        residual = any(form.keys("align", index, "weight")[0] in tensors for index in range(num_layers))
        shows = form.is_uniform or any(part.align is not None for part in made(True, 0.0)[1].values())
        if not residual and not shows:
            remedy = "the weights don't show it, as no layer changes the size of its input"
            raise ValueError(expectation(name, "residual", "True or False", "None", remedy))
    layer, parts = made(residual, dropout)
    if form.is_uniform and residual:
        parts["layers.0."].align = nn.Linear(input_dims, widths[0], bias, **factory)
    _load(name, prefix, tensors, form, layer, parts)
    if has_kernel and has_norm:
        _regroup(name, num_groups, [part.norm for part in parts.values()])
    return layer


def from_lucidrains(state_dict: Mapping[str, Tensor], prefix: str = "") -> MinGRU | MinLSTM | Projected:
    """Make a layer of the weights of a `minGRU` or `minLSTM` of the package minGRU-pytorch.

    It computes what theirs does, h_0 = 0 included, in one pass and in steps (`MinGRU`, `MinLSTM` have the equations).

    Args:
        state_dict: tensors by name, of one dtype and device: `to_hidden_and_gate.weight` (2H, I), candidate rows first,
            gate rows second, of a minGRU, or `to_hidden_and_f_i_gate.weight` (3H, I), candidate, forget, input, of a
            minLSTM; and `to_out.weight` (I, H) where the layer has its projection.
        prefix: of the layer's names where it is part of a model, "layers.0.2." for example; names that begin otherwise
            are left alone. Default: none.

    Returns:
        A `mingru.MinGRU` or `mingru.MinLSTM` of one layer without bias, in a `Projected` where there is `to_out`. Dtype
        and device are those of the tensors, of which it holds copies.

    Raises:
        TypeError: no state_dict, or tensors of different or integer dtypes.
        ValueError: a key missing or one too many, a shape that does not fit, tensors on different devices.

    Parameters: `layers.0.linear.weight`, in this package's order of rows, and `initial_state`, 0 and frozen
    (`requires_grad` is False), as theirs is none; under `rnn.`, beside `out.weight`, in a `Projected`.

    Differs from theirs in that the state, (1, B, 1, H), always comes out; their `prev_hidden` may go in as it is. Their
    minLSTM, given a state and more than one step, puts the state through g once more: here, as in their single steps,
    it counts as it is.

    Example:
        >>> theirs = {"to_hidden_and_gate.weight": torch.randn(12, 4), "to_out.weight": torch.randn(4, 6)}
        >>> layer = mingru.convert.from_lucidrains(theirs)
        >>> layer.rnn.hidden_dims, layer.out
        (6, Linear(in_features=6, out_features=4, bias=False))
        >>> out, h = layer(torch.randn(2, 10, 4))
        >>> out.shape, h.shape
        (torch.Size([2, 10, 4]), torch.Size([1, 2, 1, 6]))

    Source: minGRU-pytorch 0.2.1, `minGRU_pytorch/minGRU.py` and `minLSTM.py`.
    """
    name = "from_lucidrains"
    num_parts = {"to_hidden_and_gate.weight": 2, "to_hidden_and_f_i_gate.weight": 3}
    tensors = _of_layer(name, state_dict, prefix, tuple(num_parts), (), ("to_out.weight",))
    first = next(iter(tensors))
    weight, parts = tensors[first], num_parts[first]
    if weight.dim() != 2 or weight.shape[0] % parts or not weight.numel():
        raise ValueError(expectation(name, prefix + first, f"({parts} * H, I)", dims(weight.shape)))
    return _layer(name, prefix, weight.shape[0] // parts, first, tensors)


def from_minrnns(
    state_dict: Mapping[str, Tensor], prefix: str = "", *, use_coeff_norm: bool | None = None
) -> Projected:
    """Make a layer of the weights of a `minGRU` or `minLSTM` of the paper's authors' code, BorealisAI/minRNNs.

    It computes what theirs does, in one pass and in steps, from h_0 = g(`init_hidden_state`), or 0 where they have none
    (`MinGRU`, `MinLSTM` have the equations).

    Args:
        state_dict: tensors by name, of one dtype and device: `to_hidden_and_gate.weight` and `.bias`, (2H, I) and (2H),
            candidate rows first, gate rows second, of a minGRU, or (3H, I) and (3H), candidate, forget, input, of a
            minLSTM; `to_out.weight` (I, H) and `.bias` (I); `init_hidden_state` (H) where they learned one.
        prefix: of the layer's names where it is part of a model, "layers.0.2." for example; names that begin otherwise
            are left alone. Default: none.
        use_coeff_norm: for a minLSTM, theirs of that name, which their `config.yaml` records and the weights don't
            show. Must be True: gates that are not normalised have no equal here.

    Returns:
        A `Projected` around a `mingru.MinGRU` or `mingru.MinLSTM` of one layer. Dtype and device are those of the
        tensors, of which it holds copies.

    Raises:
        TypeError: no state_dict, or tensors of different or integer dtypes.
        ValueError: a key missing or one too many, a shape that does not fit, tensors on different devices, a minLSTM
            without `use_coeff_norm=True`.

    Parameters: `rnn.layers.0.linear.weight` and `.bias`, in this package's order of rows, `out.weight` and `.bias`, and
    `rnn.initial_state`: g(`init_hidden_state`), or 0 and frozen (`requires_grad` is False) where they have none.

    Differs from theirs in that training moves the initial state itself, not what g makes it of, and in the state that
    comes out: (1, B, 1, H), where theirs is a pair, the state and its logarithm. The first of the pair may go in as it
    is.

    Example:
        >>> theirs = {
        ...     "layers.0.2.to_hidden_and_gate.weight": torch.randn(12, 4),
        ...     "layers.0.2.to_hidden_and_gate.bias": torch.randn(12),
        ...     "layers.0.2.to_out.weight": torch.randn(4, 6),
        ...     "layers.0.2.to_out.bias": torch.randn(4),
        ...     "layers.0.2.init_hidden_state": torch.zeros(6),
        ... }
        >>> layer = mingru.convert.from_minrnns(theirs, "layers.0.2.")
        >>> layer.rnn.initial_state.flatten().tolist()
        [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
        >>> out, h = layer(torch.randn(2, 10, 4))
        >>> out.shape, h.shape
        (torch.Size([2, 10, 4]), torch.Size([1, 2, 1, 6]))

    Source: https://github.com/BorealisAI/minRNNs at ff52e9d, `models/minRNNs.py`.
    """
    name, first = "from_minrnns", "to_hidden_and_gate.weight"
    always = ("to_hidden_and_gate.bias", "to_out.weight", "to_out.bias")
    tensors = _of_layer(name, state_dict, prefix, (first,), always, ("init_hidden_state",))
    weight, out = tensors[first], tensors["to_out.weight"]
    # Only the projection tells how many parts the rows are.
    hidden_dims = out.shape[1] if out.dim() == 2 else 0
    rows = [parts * hidden_dims for parts in CLASSES]
    if weight.dim() != 2 or weight.shape[0] not in rows or not weight.numel():
        expected = f"(2 * H, I) or (3 * H, I) with {prefix}to_out.weight (I, H)"
        raise ValueError(expectation(name, prefix + first, expected, f"{dims(weight.shape)} with {dims(out.shape)}"))
    if weight.shape[0] == 3 * hidden_dims and use_coeff_norm is not True:
        remedy = "their config.yaml has it; gates that are not normalised have no equal here"
        raise ValueError(expectation(name, "use_coeff_norm", "True for a minLSTM", repr(use_coeff_norm), remedy))
    layer = _layer(name, prefix, hidden_dims, first, tensors)
    assert isinstance(layer, Projected)
    return layer


def _of_layer(
    name: str,
    state_dict: Mapping[str, Tensor],
    prefix: str,
    firsts: tuple[str, ...],
    always: tuple[str, ...],
    perhaps: tuple[str, ...],
) -> dict[str, Tensor]:
    """The tensors under the prefix, without it: one of `firsts`, as the first, all of `always`, some of `perhaps`."""
    found = _under(name, state_dict, prefix)
    first = next((key for key in found if key in firsts), "")
    if not first:
        expected = f"of keys such as {' or '.join(prefix + key for key in firsts)}"
        got = f"the key {prefix}{next(iter(found))}"
        raise ValueError(expectation(name, "state_dict", expected, got, _hint(state_dict, firsts)))
    _check_keys(name, prefix, found, [first, *always], perhaps)
    _check_alike(name, prefix, found, first)
    return {first: found[first], **found}


def _check_keys(
    name: str, prefix: str, found: Mapping[str, Tensor], wanted: list[str], perhaps: tuple[str, ...] | None = ()
) -> None:
    """All wanted keys must be found, and no others but those of `perhaps`; None allows any other."""
    wrong = [f"no key {prefix}{key}" for key in wanted if key not in found]
    if perhaps is not None:
        wrong += [f"the key {prefix}{key}" for key in found if key not in (*wanted, *perhaps)]
    if wrong:
        more = f" and {len(wanted) - 8} more" if len(wanted) > 8 else ""
        expected = f"of the keys {', '.join(prefix + key for key in wanted[:8])}{more}"
        if perhaps:
            expected += f" and perhaps {', '.join(prefix + key for key in perhaps)}"
        raise ValueError(expectation(name, "state_dict", expected, wrong[0]))


def _check_shapes(
    name: str, prefix: str, tensors: Mapping[str, Tensor], keys: list[str], shape: tuple[int, ...], first: str
) -> None:
    for key in keys:
        if tensors[key].shape != shape:
            expected = f"{dims(shape)} as {prefix}{first} is {dims(tensors[first].shape)}"
            raise ValueError(expectation(name, prefix + key, expected, dims(tensors[key].shape)))


def _under(name: str, state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under the prefix, without it; at least one."""
    if not isinstance(state_dict, Mapping):
        got = type(state_dict).__name__
        raise TypeError(expectation(name, "state_dict", "a mapping of names to tensors", got, "use .state_dict()"))
    if not isinstance(prefix, str):
        raise TypeError(expectation(name, "prefix", "a str", repr(prefix)))
    found = {key[len(prefix) :]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    if not found:
        got = f"the key {next(iter(state_dict))}" if state_dict else "an empty one"
        raise ValueError(expectation(name, "state_dict", f"one with keys that begin with {prefix!r}", got))
    return found


def _check_alike(name: str, prefix: str, tensors: Mapping[str, Tensor], first: str) -> None:
    """All must be tensors of the dtype, a floating one, and the device of the first."""
    weight = tensors[first]
    for key in (first, *tensors):
        # Against itself the first is asked whether it is a tensor.
        check_like(name, prefix + key, tensors[key], weight, prefix + first)
    if not weight.is_floating_point():
        raise TypeError(expectation(name, prefix + first, "of a floating dtype", str(weight.dtype)))


def _hint(state_dict: Mapping[str, Tensor], firsts: tuple[str, ...]) -> str:
    """A prefix under which there is a layer, if there is any."""
    prefixes = [key[: -len(first)] for key in state_dict for first in firsts if key.endswith("." + first)]
    return f"a layer of theirs has prefix={prefixes[0]!r}" if prefixes else ""


def _layer(
    name: str, prefix: str, hidden_dims: int, first: str, tensors: dict[str, Tensor]
) -> MinGRU | MinLSTM | Projected:
    """The layer that has these weights, its projection around it; `first` is the one with H rows for each part."""
    weight = tensors[first]
    num_rows, input_dims = weight.shape
    shapes = {
        first: (num_rows, input_dims),
        "to_hidden_and_gate.bias": (num_rows,),
        "to_out.weight": (input_dims, hidden_dims),
        "to_out.bias": (input_dims,),
        "init_hidden_state": (hidden_dims,),
    }
    for key in tensors:
        _check_shapes(name, prefix, tensors, [key], shapes[key], first)

    # On "meta" nothing is drawn that the weights would replace, and the caller's seed stays where it is.
    factory: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
    bias, start = tensors.get("to_hidden_and_gate.bias"), tensors.get("init_hidden_state")
    # Their rows: candidate, then the gates in our order. A roll puts the candidate last.
    state = {"layers.0.linear.weight": weight.roll(-hidden_dims, 0)}
    if bias is not None:
        state["layers.0.linear.bias"] = bias.roll(-hidden_dims, 0)
    # Theirs start from 0 where nothing was learned, our zero state is g(0) = 0.5: a parameter that is kept from
    # training starts from 0 too, resets included, and travels in the state_dict.
    state["initial_state"] = (weight.new_zeros(hidden_dims) if start is None else g(start)).view(1, 1, 1, hidden_dims)
    rnn = CLASSES[num_rows // hidden_dims](
        input_dims, hidden_dims, bias=bias is not None, learn_initial_state=True, **factory
    )
    rnn.load_state_dict(state, assign=True)
    assert rnn.initial_state is not None
    rnn.initial_state.requires_grad_(start is not None)
    if "to_out.weight" not in tensors:
        return rnn
    out = nn.Linear(hidden_dims, input_dims, bias="to_out.bias" in tensors, **factory)
    outs = {key.removeprefix("to_out."): tensor.clone() for key, tensor in tensors.items() if key.startswith("to_out.")}
    out.load_state_dict(outs, assign=True)
    return Projected(rnn, out)


class Form(NamedTuple):
    """What one version of cheind/mingru calls the parts of a layer; {} stands for the index of the layer."""

    linear: tuple[str, ...]  # both parts in one, gate rows first; or the gate's and the candidate's
    align: str | None = None
    norm: str | None = None

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have one hidden size, and a residual one map, in the first layer, whatever the sizes."""
        return self.align is not None and "{}" not in self.align

    def num_layers(self, tensors: Mapping[str, Tensor]) -> int:
        pattern = re.escape(self.linear[0]).replace(r"\{\}", r"\d+") + r"\.weight"
        return sum(re.fullmatch(pattern, key) is not None for key in tensors)

    def keys(self, part: str, index: int, kind: str) -> list[str]:
        """The keys of a weight or bias, which our parameter joins; `part` as `RecurrentLayer` calls it."""
        names = {"linear": self.linear, "conv": self.linear, "align": (self.align,), "norm": (self.norm,)}[part]
        return [f"{name.format(index)}.{kind}" for name in names if name is not None]


FORMS = (
    Form(("layers.{}.gate_hidden",), "layers.{}.res_align", "layers.{}.norm"),
    Form(("to_gate_hidden.{}",), "residual_layers.{}"),
    Form(("to_gate_hidden",)),
    Form(("linear_gate_hidden.{}",), "input_residual_align"),
    Form(("linear_z.{}", "linear_h.{}"), "input_residual_align"),
)


def _form_of(name: str, state_dict: Mapping[str, Tensor], prefix: str, tensors: dict[str, Tensor]) -> Form:
    """The form that has a layer in these tensors."""
    for form in FORMS:
        if form.num_layers(tensors):
            return form
    firsts = tuple(form.keys("linear", 0, "weight")[0] for form in FORMS)
    expected = f"of keys such as {' or '.join(prefix + key for key in firsts)}"
    got = f"the key {prefix}{next(iter(tensors))}"
    raise ValueError(expectation(name, "state_dict", expected, got, _hint(state_dict, firsts)))


def _linears(name: str, prefix: str, tensors: dict[str, Tensor], form: Form) -> list[Tensor]:
    """The weight of each layer, (2H, I) or (2H, I, kernel_h, kernel_w), gate rows first."""
    by_layer = [form.keys("linear", index, "weight") for index in range(form.num_layers(tensors))]
    keys = [key for of_layer in by_layer for key in of_layer]
    _check_keys(name, prefix, tensors, keys, None)
    _check_alike(name, prefix, tensors, keys[0])
    first = tensors[keys[0]]
    rows, divisor = ("2 * H", 2) if len(form.linear) == 1 else ("H", 1)
    letters = {2: f"({rows}, I)", 4: f"({rows}, I, kernel_h, kernel_w)"}
    expected = letters.get(first.dim(), " or ".join(letters.values()))
    for key in keys:
        shape = tensors[key].shape
        if first.dim() not in letters or len(shape) != first.dim() or not all(shape) or shape[0] % divisor:
            raise ValueError(expectation(name, prefix + key, expected, dims(shape)))
    for gate, *candidate in by_layer:
        _check_shapes(name, prefix, tensors, candidate, tensors[gate].shape, gate)
    return [torch.cat([tensors[key] for key in of_layer]) for of_layer in by_layer]


def _load(
    name: str, prefix: str, tensors: dict[str, Tensor], form: Form, layer: nn.Module, parts: dict[str, Any]
) -> None:
    """Give the layer these weights, which must be all that it has; `parts` are single layers, by their path."""
    shapes, sources = {}, {}
    for index, (path, part) in enumerate(parts.items()):
        for key, parameter in part.state_dict().items():
            map_name, kind = key.split(".")
            sources[path + key] = form.keys(map_name, index, kind)
            shapes[path + key] = parameter.shape
    first = next(iter(sources.values()))[0]
    _check_keys(name, prefix, tensors, [key for keys in sources.values() for key in keys])
    for ours, keys in sources.items():
        _check_shapes(name, prefix, tensors, keys, (shapes[ours][0] // len(keys), *shapes[ours][1:]), first)
    state = {ours: torch.cat([tensors[key] for key in keys]) for ours, keys in sources.items()}
    layer.load_state_dict(state, assign=True)


def _regroup(name: str, num_groups: int | list[int] | None, norms: list[Any]) -> None:
    """Give the norms their numbers of groups: those named, or those of cheind/mingru's rule."""
    if isinstance(num_groups, list) and len(num_groups) != len(norms):
        expected = f"a number or a list of {len(norms)}, one for each layer"
        raise ValueError(expectation(name, "num_groups", expected, repr(num_groups)))
    for index, norm in enumerate(norms):
        channels = norm.num_channels
        groups = num_groups[index] if isinstance(num_groups, list) else num_groups
        if groups is None:
            groups = next(
                each for each in (64, 32, 16, 8, 4, 1) if channels % each == 0 and channels >= each * min(4, channels)
            )
        if groups != norm.num_groups:
            norm.regroup(groups)


def _common(values: list[Any]) -> Any:
    """The one value that all are, else the list."""
    return values[0] if all(value == values[0] for value in values) else values
