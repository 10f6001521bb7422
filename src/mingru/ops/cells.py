"""The cells: a and b of h_t = a_t h_{t-1} + b_t from the pre-activations.

To add a cell, add an entry to `NUM_INPUTS`, a branch to `coefficients` and an entry to MINGRU_CELLS in csrc/scan.h.
Everything here is scriptable and twice differentiable.
"""

import torch.nn.functional as F
from torch import Tensor

from .activation import activate, log_g
from .call import Spec
from .shape import accumulate_dtype, as_dtype

# Order of the inputs, as in the rows of the weight: gate, candidate; forget, input, candidate. All cells have |a| <= 1.
NUM_INPUTS = {"mingru": 2, "minlstm": 3}
# Cells whose a and b are positive if the candidate is positive.
WITH_LOGARITHMS = ("mingru", "minlstm")


def coefficients(spec: Spec, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return a and b, in the accumulation dtype.

    mingru, with z = sigma(gate):                  a = 1 - z, b = z activate(candidate)
    minlstm, with f and i normalized to f + i = 1: a = f, b = i activate(candidate)
    """
    gate, candidate = _gate_and_candidate(spec, inputs)
    # sigma(-gate), because 1 - sigma(gate) would cancel near 1.
    return (-gate).sigmoid(), gate.sigmoid() * activate(candidate, spec.activation)


def log_coefficients(spec: Spec, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return log a and log b for the activation "positive"."""
    gate, candidate = _gate_and_candidate(spec, inputs)
    return F.logsigmoid(-gate), F.logsigmoid(gate) + log_g(candidate)


def _gate_and_candidate(spec: Spec, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the pre-activations of gate and candidate; minLSTM is a minGRU with gate log sigma(i) - log sigma(f).

    sigma(i) / (sigma(f) + sigma(i)) = sigma(log sigma(i) - log sigma(f))
    """
    x = [as_dtype(pre, accumulate_dtype(pre.dtype)) for pre in inputs]
    if spec.cell == "minlstm":
        return F.logsigmoid(x[1]) - F.logsigmoid(x[0]), x[2]
    return x[0], x[1]
