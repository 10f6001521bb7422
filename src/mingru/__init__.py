"""Minimal gated recurrent layers for PyTorch, after Feng et al. 2024, "Were RNNs All We Needed?"."""

from . import functional
from ._version import __version__
from .modules import MinGRU, MinLSTM
from .ops import backends, use_backend

__all__ = ["MinGRU", "MinLSTM", "__version__", "backends", "functional", "use_backend"]
