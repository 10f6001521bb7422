"""Convert layers of minGRU-pytorch and of the code of the paper's authors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..check.values import dims, require
from ..modules.mingru import MinGRU
from ..modules.minlstm import MinLSTM
from ..modules.stack import Stack
from ..ops.activation import g
from .state_dict import Checkpoint

CLASSES_BY_NUM_PARTS: dict[int, type[MinGRU] | type[MinLSTM]] = {2: MinGRU, 3: MinLSTM}


def from_lucidrains(state_dict: Mapping[str, Tensor], prefix: str = "") -> MinGRU | MinLSTM | Stack:
    """Convert the weights of a `minGRU` or `minLSTM` of the package minGRU-pytorch.

    The converted layer computes the same outputs, for whole sequences and in single steps, from the same initial state
    0. `mingru.MinGRU` and `mingru.MinLSTM` have the equations.

    Args:
        state_dict: Tensors by name, of one dtype and device. A minGRU has `to_hidden_and_gate.weight` (2H, I), rows in
            the order candidate, gate. A minLSTM has `to_hidden_and_f_i_gate.weight` (3H, I), rows in the order
            candidate, forget, input. A layer with a projection also has `to_out.weight` (I, H).
        prefix: Prefix of the layer's names inside a model, such as "layers.0.2."; other names are ignored.
            Default: no prefix.

    Returns:
        A `mingru.MinGRU` or `mingru.MinLSTM` of one layer without bias. If there is `to_out`, a `mingru.Stack` of the
        layer and a `torch.nn.Linear`. It holds copies of the tensors, in their dtype and on their device.

    Raises:
        TypeError: `state_dict` is not a mapping, or the tensors have different or integer dtypes.
        ValueError: A key is missing or unexpected, a shape does not fit, or tensors are on different devices.

    State dict:
        `layers.0.linear.weight`, rows in the order of this package, and `initial_state`, which is 0 and not trained
        (`requires_grad` is False). In a `Stack`, these are under `layers.0.`, and the projection is
        `layers.1.module.weight`.

    The state is always returned: (1, B, 1, H), in a list if the layer is a `Stack`. `prev_hidden` of minGRU-pytorch can
    be passed unchanged, or to a `Stack` as `[prev_hidden]`. If minGRU-pytorch's minLSTM gets a state and more than one
    step, it applies g to the state; its single steps and this layer do not.

    Examples:
        >>> checkpoint = {"to_hidden_and_gate.weight": torch.randn(12, 4), "to_out.weight": torch.randn(4, 6)}
        >>> layer = mingru.convert.from_lucidrains(checkpoint)
        >>> layer.layers[0].hidden_dims, layer.layers[1].module
        (6, Linear(in_features=6, out_features=4, bias=False))
        >>> out, h = layer(torch.randn(2, 10, 4))
        >>> out.shape, h[0].shape
        (torch.Size([2, 10, 4]), torch.Size([1, 2, 1, 6]))

    References:
        minGRU-pytorch 0.2.1, `minGRU_pytorch/minGRU.py` and `minLSTM.py`.
    """
    num_parts = {"to_hidden_and_gate.weight": 2, "to_hidden_and_f_i_gate.weight": 3}
    found = Checkpoint("from_lucidrains", state_dict, prefix)
    first = next((key for key in found if key in num_parts), None)
    if first is None:
        raise found.without(num_parts)
    found.check([first], ("to_out.weight",))
    weight, parts = found[first], num_parts[first]
    is_valid = weight.dim() == 2 and weight.shape[0] % parts == 0 and weight.numel() > 0
    found.check_shape(first, is_valid, f"({parts} * H, I)")
    return _layer(found, weight.shape[0] // parts, first)


def from_minrnns(state_dict: Mapping[str, Tensor], prefix: str = "", *, use_coeff_norm: bool | None = None) -> Stack:
    """Convert the weights of a `minGRU` or `minLSTM` of the paper's authors' code, BorealisAI/minRNNs.

    The converted layer computes the same outputs, for whole sequences and in single steps, from the same initial state:
    g(`init_hidden_state`), or 0 without that key. `mingru.MinGRU` and `mingru.MinLSTM` have the equations.

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
        A `mingru.Stack` of a `mingru.MinGRU` or `mingru.MinLSTM` of one layer and a `torch.nn.Linear`. It holds copies
        of the tensors, in their dtype and on their device.

    Raises:
        TypeError: `state_dict` is not a mapping, or the tensors have different or integer dtypes.
        ValueError: A key is missing or unexpected, a shape does not fit, tensors are on different devices, or
            `use_coeff_norm` is not a bool for a minLSTM.

    State dict:
        `layers.0.layers.0.linear.weight` and `.bias`, rows in the order of this package, `layers.1.module.weight` and
        `.bias`, and `layers.0.initial_state`: g(`init_hidden_state`), or 0 and not trained (`requires_grad` is False)
        without that key.

    Training changes the initial state directly, not the argument of g. The returned state is a list with one
    tensor, (1, B, 1, H). In minRNNs, a state is a pair, the state and its logarithm; pass the first in a list.

    Examples:
        >>> checkpoint = {
        ...     "layers.0.2.to_hidden_and_gate.weight": torch.randn(12, 4),
        ...     "layers.0.2.to_hidden_and_gate.bias": torch.randn(12),
        ...     "layers.0.2.to_out.weight": torch.randn(4, 6),
        ...     "layers.0.2.to_out.bias": torch.randn(4),
        ...     "layers.0.2.init_hidden_state": torch.zeros(6),
        ... }
        >>> layer = mingru.convert.from_minrnns(checkpoint, "layers.0.2.")
        >>> layer.layers[0].initial_state.flatten().tolist()
        [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
        >>> out, h = layer(torch.randn(2, 10, 4))
        >>> out.shape, h[0].shape
        (torch.Size([2, 10, 4]), torch.Size([1, 2, 1, 6]))

    References:
        https://github.com/BorealisAI/minRNNs at ff52e9d, `models/minRNNs.py`.
    """
    found, first = Checkpoint("from_minrnns", state_dict, prefix), "to_hidden_and_gate.weight"
    if first not in found:
        raise found.without([first])
    found.check([first, "to_hidden_and_gate.bias", "to_out.weight", "to_out.bias"], ("init_hidden_state",))
    weight, out = found[first], found["to_out.weight"]
    # Only the projection shows H.
    hidden_dims = out.shape[1] if out.dim() == 2 else 0
    rows = [parts * hidden_dims for parts in CLASSES_BY_NUM_PARTS]
    is_valid = weight.dim() == 2 and weight.shape[0] in rows and weight.numel() > 0
    expected = f"(2 * H, I) or (3 * H, I) with {prefix}to_out.weight (I, H)"
    require(found.name, prefix + first, is_valid, expected, f"{dims(weight.shape)} with {dims(out.shape)}")
    options: dict[str, Any] = {}
    if weight.shape[0] == 3 * hidden_dims:
        is_valid, remedy = isinstance(use_coeff_norm, bool), "see the original config.yaml"
        expected = "True or False for a minLSTM"
        require(found.name, "use_coeff_norm", is_valid, expected, repr(use_coeff_norm), remedy)
        options["normalize"] = use_coeff_norm
    layer = _layer(found, hidden_dims, first, **options)
    assert isinstance(layer, Stack)
    return layer


def _layer(found: Checkpoint, hidden_dims: int, first: str, **options: Any) -> MinGRU | MinLSTM | Stack:
    """Return the layer with these weights and its projection, if any; `first` is the key of the layer's linear map."""
    weight, pre_state = found[first], found.get("init_hidden_state")
    num_rows, input_dims = weight.shape
    factory: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
    options |= {"bias": "to_hidden_and_gate.bias" in found, "learn_initial_state": True}
    rnn: Any = CLASSES_BY_NUM_PARTS[num_rows // hidden_dims](input_dims, hidden_dims, **options, **factory)
    layer, at = rnn, ""
    if "to_out.weight" in found:
        out = nn.Linear(hidden_dims, input_dims, "to_out.bias" in found, **factory)
        layer, at = Stack([rnn, out]), "layers.0."
    keys = {f"{at}layers.0.linear.weight": first, f"{at}layers.0.linear.bias": "to_hidden_and_gate.bias"}
    keys |= {f"layers.1.module.{kind}": f"to_out.{kind}" for kind in ("weight", "bias")}
    keys = {name: key for name, key in keys.items() if key in found}
    if pre_state is not None:
        found.check_size("init_hidden_state", (hidden_dims,), first)
    start = weight.new_zeros(hidden_dims) if pre_state is None else g(pre_state)

    def gates_first(key: str, x: Tensor) -> Tensor:
        # The candidate's rows are first in the other packages and last in this one; the order of the gates is the same.
        return x.clone() if key.startswith("to_out.") else x.roll(-hidden_dims, 0)

    # The initial state is set even if it is 0, because the default of this package is 0.5. Resets use it too.
    found.into(layer, keys, gates_first, {f"{at}initial_state": start.detach().view(1, 1, 1, hidden_dims)})
    rnn.initial_state.requires_grad_(pre_state is not None)
    return layer  # type: ignore[no-any-return]
