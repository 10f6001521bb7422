"""Layers: they know parameters and shapes, not devices."""

from .mingru import MinGRU
from .minlstm import MinLSTM

__all__ = ["MinGRU", "MinLSTM"]
