"""Convert layers with an output projection, of minGRU-pytorch and of the code of the paper's authors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..check import dims, expectation
from ..modules import MinGRU, MinLSTM
from ..ops import States
from ..ops.activation import g
from .state_dict import check_alike, check_keys, check_shapes, hint, under

CLASSES_BY_NUM_PARTS: dict[int, type[MinGRU] | type[MinLSTM]] = {2: MinGRU, 3: MinLSTM}


class Projected(nn.Module):
    """Apply a linear map to the output of a recurrent layer.

        y_t, h = rnn(x, h, reset)
        out_t = W y_t + b

    where y is the layer's output, h its state, and W and b are the parameters of `out`. The state is not projected.

    Args:
        rnn: Recurrent layer, such as [mingru.MinGRU][], with an output of (B, S, D * H).
        out: Map of the output: `torch.nn.Linear(D * H, O)` or another module that takes (B, S, D * H).

    Inputs:
        - **x**: Input sequence that `rnn` accepts.
        - **h**: State before the first step, as `rnn` accepts it. Default: the initial state of `rnn`.
        - **reset**: Reset mask that `rnn` accepts.

    Outputs:
        - **out**: Projected output, (B, S, O) or (S, B, O).
        - **h**: State as `rnn` returns it; `layer(x2, h)` continues the sequence.

    Raises:
        TypeError, ValueError: Raised by `rnn`.

    State dict:
        Parameters of `rnn` under `rnn.`, parameters of `out` under `out.`.

    Examples:
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
    """Convert the weights of a `minGRU` or `minLSTM` of the package minGRU-pytorch.

    The converted layer computes the same outputs, for whole sequences and in single steps, from the same initial state
    0. [mingru.MinGRU][] and [mingru.MinLSTM][] have the equations.

    Args:
        state_dict: Tensors by name, of one dtype and device. A minGRU has `to_hidden_and_gate.weight` (2H, I), rows in
            the order candidate, gate. A minLSTM has `to_hidden_and_f_i_gate.weight` (3H, I), rows in the order
            candidate, forget, input. A layer with a projection also has `to_out.weight` (I, H).
        prefix: Prefix of the layer's names inside a model, such as "layers.0.2."; other names are ignored.
            Default: no prefix.

    Returns:
        A `mingru.MinGRU` or `mingru.MinLSTM` of one layer without bias, in a `Projected` if there is `to_out`. The
        layer holds copies of the tensors, in their dtype and on their device.

    Raises:
        TypeError: `state_dict` is not a mapping, or the tensors have different or integer dtypes.
        ValueError: A key is missing or unexpected, a shape does not fit, or tensors are on different devices.

    State dict:
        `layers.0.linear.weight`, rows in the order of this package, and `initial_state`, which is 0 and not trained
        (`requires_grad` is False). In a `Projected`, these are under `rnn.`, beside `out.weight`.

    The state, (1, B, 1, H), is always returned. `prev_hidden` of minGRU-pytorch can be passed unchanged. If
    minGRU-pytorch's minLSTM gets a state and more than one step, it applies g to the state; its single steps and this
    layer do not.

    Examples:
        >>> checkpoint = {"to_hidden_and_gate.weight": torch.randn(12, 4), "to_out.weight": torch.randn(4, 6)}
        >>> layer = mingru.convert.from_lucidrains(checkpoint)
        >>> layer.rnn.hidden_dims, layer.out
        (6, Linear(in_features=6, out_features=4, bias=False))
        >>> out, h = layer(torch.randn(2, 10, 4))
        >>> out.shape, h.shape
        (torch.Size([2, 10, 4]), torch.Size([1, 2, 1, 6]))

    References:
        minGRU-pytorch 0.2.1, `minGRU_pytorch/minGRU.py` and `minLSTM.py`.
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
    """Convert the weights of a `minGRU` or `minLSTM` of the paper's authors' code, BorealisAI/minRNNs.

    The converted layer computes the same outputs, for whole sequences and in single steps, from the same initial state:
    g(`init_hidden_state`), or 0 without that key. [mingru.MinGRU][] and [mingru.MinLSTM][] have the equations.

    Args:
        state_dict: Tensors by name, of one dtype and device. A minGRU has `to_hidden_and_gate.weight` (2H, I) and
            `.bias` (2H), rows in the order candidate, gate. A minLSTM has (3H, I) and (3H), rows in the order
            candidate, forget, input. Both have `to_out.weight` (I, H) and `.bias` (I), and `init_hidden_state` (H) if
            it was learned.
        prefix: Prefix of the layer's names inside a model, such as "layers.0.2."; other names are ignored.
            Default: no prefix.
        use_coeff_norm: Value of the original option `use_coeff_norm`, from the original config.yaml. Required for a
            minLSTM, because the weights do not show it. It becomes `normalize` of the `MinLSTM`.

    Returns:
        A `Projected` around a `mingru.MinGRU` or `mingru.MinLSTM` of one layer. It holds copies of the tensors, in
        their dtype and on their device.

    Raises:
        TypeError: `state_dict` is not a mapping, or the tensors have different or integer dtypes.
        ValueError: A key is missing or unexpected, a shape does not fit, tensors are on different devices, or
            `use_coeff_norm` is not a bool for a minLSTM.

    State dict:
        `rnn.layers.0.linear.weight` and `.bias`, rows in the order of this package, `out.weight` and `.bias`, and
        `rnn.initial_state`: g(`init_hidden_state`), or 0 and not trained (`requires_grad` is False) without that key.

    Training changes the initial state directly, not the argument of g. The returned state is (1, B, 1, H). In minRNNs,
    a state is a pair, the state and its logarithm; the first of the pair can be passed unchanged.

    Examples:
        >>> checkpoint = {
        ...     "layers.0.2.to_hidden_and_gate.weight": torch.randn(12, 4),
        ...     "layers.0.2.to_hidden_and_gate.bias": torch.randn(12),
        ...     "layers.0.2.to_out.weight": torch.randn(4, 6),
        ...     "layers.0.2.to_out.bias": torch.randn(4),
        ...     "layers.0.2.init_hidden_state": torch.zeros(6),
        ... }
        >>> layer = mingru.convert.from_minrnns(checkpoint, "layers.0.2.")
        >>> layer.rnn.initial_state.flatten().tolist()
        [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
        >>> out, h = layer(torch.randn(2, 10, 4))
        >>> out.shape, h.shape
        (torch.Size([2, 10, 4]), torch.Size([1, 2, 1, 6]))

    References:
        https://github.com/BorealisAI/minRNNs at ff52e9d, `models/minRNNs.py`.
    """
    name, first = "from_minrnns", "to_hidden_and_gate.weight"
    required = ("to_hidden_and_gate.bias", "to_out.weight", "to_out.bias")
    tensors = _of_layer(name, state_dict, prefix, (first,), required, ("init_hidden_state",))
    weight, out = tensors[first], tensors["to_out.weight"]
    # Only the projection shows H.
    hidden_dims = out.shape[1] if out.dim() == 2 else 0
    rows = [parts * hidden_dims for parts in CLASSES_BY_NUM_PARTS]
    if weight.dim() != 2 or weight.shape[0] not in rows or not weight.numel():
        expected = f"(2 * H, I) or (3 * H, I) with {prefix}to_out.weight (I, H)"
        raise ValueError(expectation(name, prefix + first, expected, f"{dims(weight.shape)} with {dims(out.shape)}"))
    options: dict[str, Any] = {}
    if weight.shape[0] == 3 * hidden_dims:
        if not isinstance(use_coeff_norm, bool):
            expected, remedy = "True or False for a minLSTM", "see the original config.yaml"
            raise ValueError(expectation(name, "use_coeff_norm", expected, repr(use_coeff_norm), remedy))
        options["normalize"] = use_coeff_norm
    layer = _layer(name, prefix, hidden_dims, first, tensors, **options)
    assert isinstance(layer, Projected)
    return layer


def _of_layer(
    name: str,
    state_dict: Mapping[str, Tensor],
    prefix: str,
    firsts: tuple[str, ...],
    required: tuple[str, ...],
    optional: tuple[str, ...],
) -> dict[str, Tensor]:
    """Return the tensors under the prefix, without it: one of `firsts` (the first), all `required`, some `optional`."""
    found = under(name, state_dict, prefix)
    first = next((key for key in found if key in firsts), "")
    if not first:
        expected = f"a mapping with keys such as {' or '.join(prefix + key for key in firsts)}"
        got = f"the key {prefix}{next(iter(found))}"
        raise ValueError(expectation(name, "state_dict", expected, got, hint(state_dict, firsts)))
    check_keys(name, prefix, found, [first, *required], optional)
    check_alike(name, prefix, found, first)
    return {first: found[first], **found}


def _layer(
    name: str, prefix: str, hidden_dims: int, first: str, tensors: dict[str, Tensor], **options: Any
) -> MinGRU | MinLSTM | Projected:
    """Return the layer with these weights and its projection, if any; `first` is the key of the layer's linear map."""
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

    # "meta" skips the initialization, which would also change the state of the caller's random generator.
    factory: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
    bias, pre_state = tensors.get("to_hidden_and_gate.bias"), tensors.get("init_hidden_state")
    # The candidate's rows are first in the other packages and last in this one; the order of the gates is the same.
    state = {"layers.0.linear.weight": weight.roll(-hidden_dims, 0)}
    if bias is not None:
        state["layers.0.linear.bias"] = bias.roll(-hidden_dims, 0)
    # Set even if it is 0, because the default of this package is 0.5. Resets use it too.
    value = weight.new_zeros(hidden_dims) if pre_state is None else g(pre_state)
    state["initial_state"] = value.view(1, 1, 1, hidden_dims)
    rnn = CLASSES_BY_NUM_PARTS[num_rows // hidden_dims](
        input_dims, hidden_dims, bias=bias is not None, learn_initial_state=True, **factory, **options
    )
    rnn.load_state_dict(state, assign=True)
    assert rnn.initial_state is not None
    rnn.initial_state.requires_grad_(pre_state is not None)
    if "to_out.weight" not in tensors:
        return rnn
    out = nn.Linear(hidden_dims, input_dims, bias="to_out.bias" in tensors, **factory)
    projection = {
        key.removeprefix("to_out."): tensor.clone() for key, tensor in tensors.items() if key.startswith("to_out.")
    }
    out.load_state_dict(projection, assign=True)
    return Projected(rnn, out)
