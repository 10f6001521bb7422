"""Convert weights that other packages trained to layers of this package with the same outputs."""

from .cheind import from_cheind
from .language_model import language_model_from_lucidrains
from .projected import from_lucidrains, from_minrnns
from .pufferlib import from_pufferlib

__all__ = ["from_cheind", "from_lucidrains", "from_minrnns", "from_pufferlib", "language_model_from_lucidrains"]
