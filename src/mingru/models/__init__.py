"""Blocks and models made of the layers."""

from .block import Block
from .language_model import LanguageModel

__all__ = ["Block", "LanguageModel"]
