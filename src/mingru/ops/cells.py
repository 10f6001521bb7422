"""The cells: what a and b of h_t = a_t h_{t-1} + b_t are. MINGRU_CELLS in csrc/scan.h is the same list for C++.

A new cell is an entry of `NUM_INPUTS` and a branch of `coefficients`. All of it scripts and differentiates, twice.
"""

import torch.nn.functional as F
from torch import Tensor

from .activation import activate, log_g
from .call import Spec
from .shape import accumulate_dtype, as_dtype

# The pre-activations of each cell, in the order of the weight's rows: gate, candidate; forget, input, candidate. `a` is
# never above 1 in size.
NUM_INPUTS = {"mingru": 2, "minlstm": 3}
# The cells with `log_coefficients`: a and b are positive if the candidate is.
WITH_LOGARITHMS = ("mingru", "minlstm")


def coefficients(spec: Spec, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return a and b, in the accumulation dtype.

    mingru, z = sigma(gate):              a = 1 - z, b = z activate(candidate)
    minlstm, f and i normalized to f + i = 1:  a = f, b = i activate(candidate)
    """
    gate, candidate = _gate_and_candidate(spec, inputs)
    # sigma(-gate), because 1 - sigma(gate) would cancel near 1.
    return (-gate).sigmoid(), gate.sigmoid() * activate(candidate, spec.activation)


def log_coefficients(spec: Spec, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return log a and log b, of a candidate that is "positive"."""
    gate, candidate = _gate_and_candidate(spec, inputs)
    return F.logsigmoid(-gate), F.logsigmoid(gate) + log_g(candidate)


def _gate_and_candidate(spec: Spec, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The normalized gates of minLSTM are those of one gate, the difference of their logarithms.

    sigma(i) / (sigma(f) + sigma(i)) = sigma(log sigma(i) - log sigma(f))
    """
    x = [as_dtype(pre, accumulate_dtype(pre.dtype)) for pre in inputs]
    if spec.cell == "minlstm":
        return F.logsigmoid(x[1]) - F.logsigmoid(x[0]), x[2]
    return x[0], x[1]
