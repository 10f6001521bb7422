"""Layers: they know parameters and shapes, not devices."""

from .mingru import MinGRU

__all__ = ["MinGRU"]
