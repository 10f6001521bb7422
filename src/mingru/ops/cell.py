"""The kinds of recurrence, told by name, and how all of them come down to minGRU's."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .shape import accumulate_dtype, as_dtype

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

    In the type of computation, as a gate rounded to half its width would be another one; outputs are so too.
    """
    if cell == "minlstm":
        forget, admit, candidate = [as_dtype(x, accumulate_dtype(x.dtype)) for x in inputs]
        return F.logsigmoid(admit) - F.logsigmoid(forget), candidate
    return inputs[0], inputs[1]
