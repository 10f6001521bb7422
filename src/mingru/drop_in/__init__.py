"""minGRU under the names, shapes and errors of `torch.nn.GRU` and `torch.nn.GRUCell`: change one import.

    from mingru.drop_in import GRU      # was: from torch.nn import GRU

`replace` does so inside a model that exists. Neither carries weights over: the mathematics are others.
"""

from .layers import GRU, GRUCell
from .replacing import Report, replace

__all__ = ["GRU", "GRUCell", "Report", "replace"]
