"""The kinds of recurrence, told by name, and how all of them come down to minGRU's."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

# Pre-activations of each, in the order of the weights' rows: gate, candidate; forget, input, candidate.
NUM_INPUTS = {"mingru": 2, "minlstm": 3}


class Kind(NamedTuple):
    """What is computed: which cell, with which activation of the candidate, and from which end."""

    cell: str
    activation: str
    reverse: bool


def as_mingru(cell: str, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Gate and candidate of the minGRU that computes the same.

    minLSTM's gates share 1 between them, which makes them one gate of the difference of their logarithms:

        sigma(i) / (sigma(f) + sigma(i)) = sigma(log sigma(i) - log sigma(f))
    """
    if cell == "minlstm":
        return F.logsigmoid(inputs[1]) - F.logsigmoid(inputs[0]), inputs[2]
    return inputs[0], inputs[1]
