"""minGRU and minLSTM with the names, shapes and error types of `torch.nn.GRU`, `LSTM` and their cells.

    from mingru.drop_in import GRU, LSTM      # was: from torch.nn import GRU, LSTM

`replace` swaps the layers inside an existing model, `patch` those of a program that builds its own. By default, both
build torch's GRU itself, as one block of `mingru.GRU`, so that `replace` keeps the weights of a GRU. Other
layers, and an LSTM, have other equations, and new weights.
"""

from .accelerating import Acceleration, accelerate
from .cells import GRUCell, LSTMCell
from .layers import GRU, LSTM
from .patching import PatchReport, patch
from .replacing import Report, replace

__all__ = [
    "GRU",
    "LSTM",
    "Acceleration",
    "GRUCell",
    "LSTMCell",
    "PatchReport",
    "Report",
    "accelerate",
    "patch",
    "replace",
]
