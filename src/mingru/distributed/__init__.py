"""Divide a sequence, or the features of a state, among the ranks of a mesh. Imported by its name only."""

from .sequence import SequenceParallel
from .tensor import TensorParallel

__all__ = ["SequenceParallel", "TensorParallel"]
