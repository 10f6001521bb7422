"""Layers and cells. They hold parameters and check shapes; `ops` chooses what runs on which device."""

from .cells import MinGRUCell, MinLSTMCell
from .layer import Layer
from .minconvgru import (
    MinConv1dGRU,
    MinConv1dGRUCell,
    MinConv2dGRU,
    MinConv2dGRUCell,
    MinConv3dGRU,
    MinConv3dGRUCell,
)
from .mingru import MinGRU
from .minlstm import MinLSTM
from .stack import Stack

__all__ = [
    "Layer",
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
]
