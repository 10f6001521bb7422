"""Convert weights that PufferLib trained."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..modules.mingru import MinGRU
from .state_dict import Checkpoint


def from_pufferlib(state_dict: Mapping[str, Tensor], prefix: str = "") -> MinGRU:
    """Convert the weights of the network `MinGRU` of PufferLib 4.

    The converted layer computes the same outputs, for whole sequences and in single steps, from the same initial state
    0. `mingru.MinGRU` has the equations: these layers have `residual="highway"` and no bias.

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
    first, found = "layers.0.weight", Checkpoint("from_pufferlib", state_dict, prefix)
    num_layers = found.count("layers.{}.weight")
    if num_layers == 0:
        raise found.without([first])
    keys = [f"layers.{index}.weight" for index in range(num_layers)]
    found.check(keys)
    weight = found[first]
    is_valid = weight.dim() == 2 and weight.shape[0] == 3 * weight.shape[1] and weight.numel() > 0
    found.check_shape(first, is_valid, "(3 * H, H)")
    dims = weight.shape[1]
    options: dict[str, Any] = {"learn_initial_state": True, "device": "meta", "dtype": weight.dtype}
    rnn = MinGRU(dims, dims, num_layers, bias=False, residual="highway", **options)

    def gate_first(key: str, x: Tensor) -> Tensor:
        candidate, gate, highway = x.chunk(3)
        return torch.cat([gate, candidate, highway])

    names = {f"layers.{index}.linear.weight": key for index, key in enumerate(keys)}
    found.into(rnn, names, gate_first, {"initial_state": weight.new_zeros(num_layers, 1, 1, dims)})
    rnn.get_parameter("initial_state").requires_grad_(False)
    return rnn
