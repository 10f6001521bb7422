"""Minimal gated recurrent layers for PyTorch, after Feng et al. 2024, "Were RNNs All We Needed?"."""

import typing

from . import convert, drop_in, export, functional, models
from ._version import __version__
from .check import names as _names
from .modules.cells import MinGRUCell, MinLSTMCell
from .modules.gru import GRU, GRUCell
from .modules.minconvgru import (
    MinConv1dGRU,
    MinConv1dGRUCell,
    MinConv2dGRU,
    MinConv2dGRUCell,
    MinConv3dGRU,
    MinConv3dGRUCell,
)
from .modules.mingru import MinGRU
from .modules.minlstm import MinLSTM
from .modules.stack import Stack
from .ops.route import backends, use_backend
from .serialization import safe_globals

__all__ = [
    "GRU",
    "GRUCell",
    "MinConv1dGRU",
    "MinConv1dGRUCell",
    "MinConv2dGRU",
    "MinConv2dGRUCell",
    "MinConv3dGRU",
    "MinConv3dGRUCell",
    "MinGRU",
    "MinGRUCell",
    "MinLSTM",
    "MinLSTMCell",
    "Stack",
    "__version__",
    "backends",
    "convert",
    "drop_in",
    "export",
    "functional",
    "models",
    "safe_globals",
    "use_backend",
]


def __dir__() -> list[str]:
    """Return the names that a person should see, among them modules that have been imported by their names."""
    return [name for name in (*__all__, "modules", *_names.BY_THEIR_NAMES_ONLY) if name in globals()]


for _module in (convert, drop_in, export, functional, models):
    # For tab completion. `mingru.functional.mingru` is not in `__all__`, because * would replace this package.
    vars(_module)["__dir__"] = [*_module.__all__, *["mingru"] * (_module is functional)].copy

# Type checkers would take every name for known.
if not typing.TYPE_CHECKING:

    def __getattr__(name):
        raise AttributeError(_names.unknown_name(__all__, globals(), name))
