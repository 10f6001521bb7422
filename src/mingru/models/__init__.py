"""Blocks and models made of the layers."""

from .block import Block
from .language_model import LanguageModel
from .state import map_state

__all__ = ["Block", "LanguageModel", "map_state"]
