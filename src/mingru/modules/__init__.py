"""Layers and cells. They hold parameters and check shapes; `ops` chooses what runs on which device."""

from .layer import Layer

__all__ = ["Layer"]
