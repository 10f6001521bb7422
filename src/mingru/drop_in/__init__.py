"""torch.nn's recurrent layers in less time, and layers of other cells with their interface.

    from mingru.drop_in import GRU, LSTM      # was: from torch.nn import GRU, LSTM

`GRU`, `LSTM`, `GRUCell` and `LSTMCell` are torch's classes, which compute by kernels where these take less time.
`accelerate` changes the layers of a model to them, and `patch` lets a program build them. With `cell`, `patch` and
`replace` build layers of another cell with torch's interface instead: `GRULike`, `LSTMLike` and their cells.
"""

from .accelerating import Acceleration, accelerate
from .layers import GRULike, GRULikeCell, LSTMLike, LSTMLikeCell
from .of_torch import GRU, LSTM, GRUCell, LSTMCell
from .patching import PatchReport, patch
from .replacing import Report, replace

__all__ = [
    "GRU",
    "LSTM",
    "Acceleration",
    "GRUCell",
    "GRULike",
    "GRULikeCell",
    "LSTMCell",
    "LSTMLike",
    "LSTMLikeCell",
    "PatchReport",
    "Report",
    "accelerate",
    "patch",
    "replace",
]
