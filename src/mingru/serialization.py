"""Saving and loading of whole models."""

import sys
from typing import Any

from torch import nn

from . import convert, drop_in, models
from .models.causal_conv import CausalConv
from .modules.conv_level import CONVOLUTIONS, ConvLevel, Geometry
from .modules.group_norm import GroupNorm
from .modules.level import NORMS, LinearLevel
from .modules.per_step import OF_TORCH, PerStep
from .ops.linear_map import RecurrentMap, WeightAndBias


def safe_globals() -> list[Any]:
    """Return the classes that `torch.load` must trust to load a whole model with `weights_only=True`.

    `torch.save(model)` writes the names of all classes in a model. `torch.load` raises an error for a class that is not
    registered as safe, unless `weights_only` is False. But then a file can run any code. A file that contains only a
    state_dict does not need these classes.

    Returns:
        The public layers, cells, `mingru.Stack` and models, the classes inside them, and the `torch.nn` classes that
        they contain. Pass them to `torch.serialization.add_safe_globals` once, or to the context manager
        `torch.serialization.safe_globals`. Add the classes of your own model.

    Examples:
        >>> import io
        >>> file = io.BytesIO()
        >>> torch.save(mingru.MinGRU(3, 4), file)
        >>> _ = file.seek(0)
        >>> with torch.serialization.safe_globals(mingru.safe_globals()):
        ...     torch.load(file, weights_only=True)
        MinGRU(
          3, 4
          (layers): ModuleList(
            (0): LinearLevel(
              (linear): Linear(in_features=3, out_features=8, bias=True)
            )
          )
        )
    """
    homes = (sys.modules[__name__.partition(".")[0]], convert, drop_in, models)
    public = [getattr(home, name) for home in homes for name in home.__all__]
    layers = [each for each in public if isinstance(each, type) and issubclass(each, nn.Module)]
    of_torch = [nn.Embedding, nn.ModuleList, nn.Sequential, *OF_TORCH, *CONVOLUTIONS.values(), *NORMS.values()]
    inner = [CausalConv, Geometry, GroupNorm, ConvLevel, PerStep, LinearLevel, RecurrentMap, WeightAndBias]
    return [*layers, *inner, *of_torch]
