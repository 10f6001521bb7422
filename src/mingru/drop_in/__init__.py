"""minGRU layers with the names, shapes and error types of `torch.nn.GRU` and `torch.nn.GRUCell`: change one import.

    from mingru.drop_in import GRU      # was: from torch.nn import GRU

`replace` swaps the layers inside an existing model. Trained weights are not kept, because the equations differ.
"""

from .layers import GRU, GRUCell
from .replacing import Report, replace

__all__ = ["GRU", "GRUCell", "Report", "replace"]
