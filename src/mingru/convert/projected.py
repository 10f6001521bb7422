"""Layers with a projection behind them: from minGRU-pytorch, and from the code of the paper's authors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..check import dims, expectation
from ..modules import MinGRU, MinLSTM
from ..ops import States
from ..ops.activation import g
from .state_dict import check_alike, check_keys, check_shapes, hint, under

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
    found = under(name, state_dict, prefix)
    first = next((key for key in found if key in firsts), "")
    if not first:
        expected = f"of keys such as {' or '.join(prefix + key for key in firsts)}"
        got = f"the key {prefix}{next(iter(found))}"
        raise ValueError(expectation(name, "state_dict", expected, got, hint(state_dict, firsts)))
    check_keys(name, prefix, found, [first, *always], perhaps)
    check_alike(name, prefix, found, first)
    return {first: found[first], **found}


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
        check_shapes(name, prefix, tensors, [key], shapes[key], first)

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
