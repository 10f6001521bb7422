"""Convert the language model of minGRU-pytorch."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..check.values import require
from ..models import LanguageModel
from ..modules.stack import Stack
from .projected import from_lucidrains
from .state_dict import Checkpoint


def language_model_from_lucidrains(state_dict: Mapping[str, Tensor], prefix: str = "") -> LanguageModel:
    """Convert the weights of a `minLM` of the package minGRU-pytorch.

    The converted model computes the same logits, for whole sequences and in single steps. Dropout is 0, because the
    weights do not show it.

    Args:
        state_dict: Tensors by name, of one dtype and device: `token_emb.weight` (V, dims), `norm.weight`,
            `to_logits.weight` (V, dims), and for each block `layers.{i}.1.weight` and `.3.weight` (norms), `.2.*` (the
            layer, see `mingru.convert.from_lucidrains`), and `.4.0.*` and `.4.2.*` (the feed-forward network).
        prefix: Prefix of the model's names, such as "net."; other names are ignored. Default: no prefix.

    Returns:
        A `mingru.models.LanguageModel` with copies of the tensors, in their dtype and on their device.

    Raises:
        TypeError: `state_dict` is not a mapping, or the tensors have different or integer dtypes.
        ValueError: A key is missing or unexpected, a shape does not fit, or tensors are on different devices. The model
            has convolutions (`enable_conv=True`), which are followed by a map of all features that a
            `mingru.models.Block` does not have.

    State dict:
        As in a `LanguageModel` with `learn_initial_state=True`. The recurrent layers and W have a bias, which is 0, and
        the initial states are 0 and not trained (`requires_grad` is False).

    Pass `prev_hiddens` of minGRU-pytorch, a list of (B, 1, H), as `[h.unsqueeze(0) for h in prev_hiddens]`.

    Examples:
        >>> checkpoint = {
        ...     "token_emb.weight": torch.randn(10, 4),
        ...     "layers.0.1.weight": torch.ones(4),
        ...     "layers.0.2.to_hidden_and_gate.weight": torch.randn(12, 4),
        ...     "layers.0.2.to_out.weight": torch.randn(4, 6),
        ...     "layers.0.3.weight": torch.ones(4),
        ...     "layers.0.4.0.weight": torch.randn(16, 4),
        ...     "layers.0.4.0.bias": torch.randn(16),
        ...     "layers.0.4.2.weight": torch.randn(4, 16),
        ...     "layers.0.4.2.bias": torch.randn(4),
        ...     "norm.weight": torch.ones(4),
        ...     "to_logits.weight": torch.randn(10, 4),
        ... }
        >>> lm = mingru.convert.language_model_from_lucidrains(checkpoint)
        >>> logits, state = lm(torch.tensor([[3, 1, 4]]))
        >>> logits.shape
        torch.Size([1, 3, 10])

    References:
        minGRU-pytorch 0.2.1, `minGRU_pytorch/minLM.py`.
    """
    found = Checkpoint("language_model_from_lucidrains", state_dict, prefix)
    has_conv = "layers.0.0.net.0.weight" in found
    remedy = "a Block has no map of all features after its convolution"
    require(found.name, "state_dict", not has_conv, "of a model without convolutions", "enable_conv=True", remedy)
    num_layers = max(1, found.count("layers.{}.1.weight"))
    first = "token_emb.weight"
    names = {first: "embedding.weight", "norm.weight": "norm.weight", "to_logits.weight": "head.weight"}
    parts = {"1.weight": "rnn.layers.0.norm.weight", "3.weight": "mlp.0.weight"}
    parts |= {f"4.{index}.{kind}": f"mlp.{index + 1}.{kind}" for index in (0, 2) for kind in ("weight", "bias")}
    for index in range(num_layers):
        names |= {f"layers.{index}.{part}": f"blocks.layers.{index}.{name}" for part, name in parts.items()}
    of_layers = tuple(key for key in found if re.match(r"layers\.\d+\.2\.", key))
    found.check([*names], of_layers)
    found.check_shape(first, found[first].dim() == 2 and found[first].numel() > 0, "(V, dims)")
    vocab_size, dims = found[first].shape

    state: dict[str, Tensor] = {}
    rnn: Any = None
    for index in range(num_layers):
        layer = from_lucidrains(state_dict, f"{prefix}layers.{index}.2.")
        rnn, out = layer, torch.eye(dims).to(found[first])
        if isinstance(layer, Stack):
            rnn, out = layer.layers[0], layer.state_dict()["layers.1.module.weight"]
        block = f"blocks.layers.{index}."
        state |= {f"{block}rnn.{name}": x for name, x in rnn.state_dict().items()}
        weight = state[f"{block}rnn.layers.0.linear.weight"]
        state[f"{block}rnn.layers.0.linear.bias"] = weight.new_zeros(len(weight))
        state[f"{block}out.weight"] = out
        state[f"{block}out.bias"] = weight.new_zeros(dims)
    expansion, mlp = rnn.hidden_dims / dims, found["layers.0.4.0.bias"].numel() / dims
    # "meta" skips the initialization, which would also change the state of the caller's random generator.
    options: dict[str, Any] = {"learn_initial_state": True, "device": "meta", "dtype": found[first].dtype}
    lm = LanguageModel(vocab_size, dims, num_layers, tied=False, cell=rnn.cell, expansion=expansion, mlp=mlp, **options)
    found.into(lm, {name: key for key, name in names.items()}, more=state)
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(not name.endswith("initial_state"))
    return lm
