"""Whole models as files."""

from torch import nn

from . import drop_in, modules
from .convert import Projected
from .modules.conv_layer import CONVOLUTIONS, Geometry, MinConvLayer
from .modules.group_norm import GroupNorm
from .modules.recurrent import NORMS, RecurrentLayer


def safe_globals() -> list[type]:
    """Return the classes that files of this library's layers name, for `torch.load` with `weights_only=True`.

    `torch.save(model)` writes the names of all classes in a model. `torch.load` refuses a class that it has not been
    told to trust, unless `weights_only` is False, with which a file can run any code.

    Returns:
        The public layers, cells and `mingru.Stack`, the classes inside them, and those of `torch.nn` that they contain.
        Give them to `torch.serialization.add_safe_globals` once, or to the context manager
        `torch.serialization.safe_globals`. A model of your own needs its own classes too.

    A file with only a `state_dict` names none of these classes and needs none of this.

    Example:
        >>> import io
        >>> file = io.BytesIO()
        >>> torch.save(mingru.MinGRU(3, 4), file)
        >>> _ = file.seek(0)
        >>> with torch.serialization.safe_globals(mingru.safe_globals()):
        ...     torch.load(file, weights_only=True)
        MinGRU(
          3, 4
          (layers): ModuleList(
            (0): RecurrentLayer(
              (linear): Linear(in_features=3, out_features=8, bias=True)
            )
          )
        )
    """
    layers = [getattr(modules, name) for name in modules.__all__]
    of_torch = [nn.Identity, nn.Linear, nn.ModuleList, *CONVOLUTIONS.values(), *NORMS.values()]
    ours = [drop_in.GRU, drop_in.GRUCell, Projected, Geometry, GroupNorm, MinConvLayer, RecurrentLayer]
    return [*layers, *ours, *of_torch]
