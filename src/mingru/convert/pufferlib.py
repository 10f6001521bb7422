"""Convert weights that PufferLib trained."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..check import dims, expectation
from ..modules import MinGRU
from .state_dict import check_alike, check_keys, check_shapes, hint, under


def from_pufferlib(state_dict: Mapping[str, Tensor], prefix: str = "") -> MinGRU:
    """Convert the weights of the network `MinGRU` of PufferLib 4.

    The converted layer computes the same outputs, for whole sequences and in single steps, from the same initial state
    0. [mingru.MinGRU][] has the equations: these layers have `residual="highway"` and no bias.

    Args:
        state_dict: Tensors by name, of one dtype and device: `layers.{i}.weight` (3H, H) for each layer, rows in the
            order candidate, gate, highway.
        prefix: Prefix of the network's names inside a policy, such as "network."; other names are ignored. Default: no
            prefix.

    Returns:
        A `mingru.MinGRU`. It holds copies of the tensors, in their dtype and on their device.

    Raises:
        TypeError: `state_dict` is not a mapping, or the tensors have different or integer dtypes.
        ValueError: A key is missing or unexpected, a shape does not fit, or tensors are on different devices.

    State dict:
        `layers.{l}.linear.weight`, rows in the order gate, candidate, highway, and `initial_state`, which is 0 and not
        trained (`requires_grad` is False).

    The state is (L, B, 1, H). In PufferLib, it is a tuple of one tensor (L, B, H): pass `state[0].unsqueeze(2)`. In
    training, PufferLib computes every segment from the initial state.

    Examples:
        >>> policy = {
        ...     "encoder.encoder.weight": torch.randn(6, 9),
        ...     "network.layers.0.weight": torch.randn(18, 6),
        ...     "network.layers.1.weight": torch.randn(18, 6),
        ... }
        >>> rnn = mingru.convert.from_pufferlib(policy, "network.")
        >>> rnn.hidden_dims, rnn.num_layers, rnn.residual
        (6, 2, 'highway')
        >>> out, h = rnn(torch.randn(2, 10, 6))
        >>> out.shape, h.shape
        (torch.Size([2, 10, 6]), torch.Size([2, 2, 1, 6]))

    References:
        https://github.com/PufferAI/PufferLib at 8e3e754, `pufferlib/models.py`.
    """
    name, first = "from_pufferlib", "layers.0.weight"
    tensors = under(name, state_dict, prefix)
    num_layers = sum(re.fullmatch(r"layers\.\d+\.weight", key) is not None for key in tensors)
    if num_layers == 0:
        expected = f"a mapping with keys such as {prefix}{first}"
        got = f"the key {prefix}{next(iter(tensors))}"
        raise ValueError(expectation(name, "state_dict", expected, got, hint(state_dict, (first,))))
    keys = [f"layers.{index}.weight" for index in range(num_layers)]
    check_keys(name, prefix, tensors, keys)
    check_alike(name, prefix, tensors, first)
    weight = tensors[first]
    if weight.dim() != 2 or weight.shape[0] != 3 * weight.shape[1] or not weight.numel():
        raise ValueError(expectation(name, prefix + first, "(3 * H, H)", dims(weight.shape)))
    check_shapes(name, prefix, tensors, keys, tuple(weight.shape), first)

    hidden_dims = weight.shape[1]
    state = {}
    for index, key in enumerate(keys):
        candidate, gate, highway = tensors[key].chunk(3)
        state[f"layers.{index}.linear.weight"] = torch.cat([gate, candidate, highway])
    # Set even though it is 0, because the default of this package is 0.5. Resets use it too.
    state["initial_state"] = weight.new_zeros(num_layers, 1, 1, hidden_dims)
    # "meta" skips the initialization, which would also change the state of the caller's random generator.
    options: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
    rnn = MinGRU(
        hidden_dims, hidden_dims, num_layers, bias=False, residual="highway", learn_initial_state=True, **options
    )
    rnn.load_state_dict(state, assign=True)
    assert rnn.initial_state is not None
    rnn.initial_state.requires_grad_(False)
    return rnn
