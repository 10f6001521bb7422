"""The cells: a and b of h_t = a_t h_{t-1} + b_t from the pre-activations.

To add a cell, add an entry to `CELLS` and a branch to `coefficients`. It then runs everywhere as tensor operations.
CONTRIBUTING.md says how to add it to the kernels in C++ and Triton.
Everything here is scriptable and twice differentiable.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import activate, log_g
from .call import Context, Spec
from .modes import is_onnx
from .shape import accumulate_dtype, along, as_dtype, to_parts


class Cell(NamedTuple):
    """What other files must know of a cell. All cells but "gru", which has no a, have |a| <= 1."""

    num_inputs: int
    """Number of pre-activations, in the order of the rows of the weight: gate, candidate; forget, input, candidate; of
    "gru" reset gate, update gate, candidate."""
    has_logarithms: bool = True
    """Whether a and b are positive if the candidate is positive."""
    memory: tuple[float, float] | None = None
    """Default of the option; None for no bias. In a mixture, that of the features that turn."""
    not_timed: str | None = None
    """Why the cell takes no elapsed times and no lower bound; None if |a| is a decay, so that it takes both."""


CELLS = {
    "mingru": Cell(2),
    "mingru_signed": Cell(2, False, None, "the gate is 'signed', and a negative decay has no real power"),
    "mingru_rotation": Cell(2, False),
    "minlstm": Cell(3),
    "minlstm_unnormalized": Cell(3, not_timed="normalize is False, so that the gates have no common decay"),
    "mingru_quaternion": Cell(2, False, (21.0, 21.0)),
    "mingru_mixed": Cell(2, False, (2.0, 60.0)),
    "gru": Cell(3, False, None, "its gates see the state"),
}
# The cell of each gate of a minGRU.
GATES = {
    "sigmoid": "mingru",
    "signed": "mingru_signed",
    "rotation": "mingru_rotation",
    "quaternion": "mingru_quaternion",
    "mixed": "mingru_mixed",
}


def default_candidate(cell: str) -> str:
    """Return the default activation of the candidate: symmetric if the state has both signs."""
    return "positive" if CELLS[cell].has_logarithms else "tanh"


def zero_state(cell: str, activation: str) -> float:
    """Return the default initial state: g(0) = 0.5, also for what flips or turns, as 0 has nothing to turn; or 0."""
    turns = not CELLS[cell].has_logarithms and cell != "gru"
    return 0.5 if activation == "positive" or turns else 0.0


def gate_biases(cell: str, steps: Tensor) -> list[Tensor]:
    """Return the biases of the first inputs with which a state lasts so many steps, 1 / (1 - |a|)."""
    odds = (2 * steps - 1 if cell == "mingru_signed" else steps - 1).log()
    signs = {"minlstm": (1, -1), "minlstm_unnormalized": (1,), "gru": (0, 1)}
    return [sign * odds for sign in signs.get(cell, (-1,))]


def parts_of(cell: str) -> int:
    """Return how many neighboring features are one number of a, b and the state; see `shape.to_parts`."""
    if cell in ("mingru_quaternion", "quaternion_linear_scan"):
        return 4
    return 2 if cell in ("mingru_rotation", "complex_linear_scan") else 1


def cells_of(cell: str) -> list[str]:
    """Return the cells of a mixture, of which each computes an equal part of the features; otherwise the cell."""
    return ["mingru", "mingru_quaternion"] if cell == "mingru_mixed" else [cell]


def multiple_of(cell: str) -> int:
    """Return the number of which the number of features must be a multiple."""
    cells = cells_of(cell)
    return len(cells) * max(map(parts_of, cells))


MIXTURES = tuple(name for name in CELLS if len(cells_of(name)) > 1)
# Not those of mixtures, which are computed cell by cell, and of "gru", which is no linear recurrence.
NUM_INPUTS = {name: cell.num_inputs for name, cell in CELLS.items() if name not in (*MIXTURES, "gru")}


def coefficients(spec: Spec, inputs: list[Tensor], context: Context) -> tuple[Tensor, Tensor]:
    """Return a and b, in the accumulation dtype. Both are new tensors, because a scan may overwrite them.

    mingru, with z = sigma(gate):                  a = 1 - z, b = z activate(candidate)
    mingru_signed:                                 a = -tanh(gate / 2), b = (1 - |a|) activate(candidate)
    mingru_rotation, with z and an angle:          a = (1 - z) exp(i angle), b = z activate(candidate), as pairs
    mingru_quaternion, with z and a vector:        a = (1 - z) exp(i v_1 + j v_2 + k v_3), as quaternions; b as above
    minlstm, with f and i normalized to f + i = 1: a = f, b = i activate(candidate)
    minlstm_unnormalized:                          a = sigma(forget), b = sigma(input) activate(candidate)

    With the lower bound m = min_decay, 1 - z (or f) becomes r = m + (1 - m) (1 - z). With elapsed times dt (B, S), r
    becomes r^dt, and angle and v become dt angle and dt v. z (or i) becomes 1 - r or 1 - r^dt.
    """
    if spec.cell == "mingru_signed":
        gate, candidate = _wide(inputs)
        # 1 - |tanh(x / 2)| = 2 sigma(-|x|), which does not cancel.
        return -(0.5 * gate).tanh(), 2.0 * (-gate.abs()).sigmoid() * activate(candidate, spec.activation)
    if spec.cell == "mingru_rotation":
        return _rotation(spec, inputs, context)
    if spec.cell == "mingru_quaternion":
        return _quaternion(spec, inputs, context)
    if spec.cell == "minlstm_unnormalized":
        forget, input, candidate = _wide(inputs)
        return forget.sigmoid(), input.sigmoid() * activate(candidate, spec.activation)
    gate, candidate = _gate_and_candidate(spec, inputs)
    keep, update = _decay(gate, spec.min_decay, context)
    return keep, update * activate(candidate, spec.activation)


def log_coefficients(spec: Spec, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return log a and log b for the activation "positive", without elapsed times."""
    if spec.cell == "minlstm_unnormalized":
        forget, input, candidate = _wide(inputs)
        return F.logsigmoid(forget), F.logsigmoid(input) + log_g(candidate)
    gate, candidate = _gate_and_candidate(spec, inputs)
    if spec.min_decay == 0:
        return F.logsigmoid(-gate), F.logsigmoid(gate) + log_g(candidate)
    log_keep = _log_decay(gate, spec.min_decay)
    # Not 0, because the logarithm of 0 has no derivative.
    least = torch.finfo(gate.dtype).tiny ** 0.5
    return log_keep, (least - log_keep.expm1()).log() + log_g(candidate)


def _decay(gate: Tensor, min_decay: float, context: Context) -> tuple[Tensor, Tensor]:
    """Return r and 1 - r as in `coefficients`, both in full relative precision."""
    dt = context.dt
    if dt is None:
        # sigma(-gate), because 1 - sigma(gate) would cancel near 1.
        keep, update = (-gate).sigmoid(), gate.sigmoid()
        if min_decay == 0:
            return keep, update
        return min_decay + (1.0 - min_decay) * keep, (1.0 - min_decay) * update
    log_keep = _log_decay_in(gate, min_decay, dt)
    keep = log_keep.exp()
    # 1 - exp(x) = -tanh(x / 2) (1 + exp(x)) does not cancel. `expm1` would in ONNX graphs.
    return keep, -(0.5 * log_keep).tanh() * (1.0 + keep)


def _elapsed(dt: Tensor) -> Tensor:
    """Return the elapsed times without infinity, whose products with 0 and derivatives would be NaN."""
    return dt.masked_fill(dt.isinf(), 1.0)


def _log_decay(gate: Tensor, min_decay: float) -> Tensor:
    if min_decay == 0:
        return F.logsigmoid(-gate)
    # The gate l with sigma(-l) = m + (1 - m) sigma(-gate) is gate + log(1 - m) - softplus(gate + log m). It is computed
    # without infinity minus infinity for an infinite gate. Not by `clamp_max` and `abs`, whose gradients at the bound
    # are of different sides.
    log_min, log_range = math.log(min_decay), math.log1p(-min_decay)
    over = gate + log_min
    is_over = over > 0
    distance = torch.where(is_over, over, -over)
    bounded = gate.masked_fill(is_over, -log_min) + log_range + F.logsigmoid(distance)
    return F.logsigmoid(-bounded)


def _log_decay_in(gate: Tensor, min_decay: float, dt: Tensor) -> Tensor:
    """Return the logarithm of the decay in the time dt."""
    log_keep = _log_decay(gate, min_decay) * along(_elapsed(dt), gate)
    # Not minus infinity times a decay that underflowed to 0. A gate of minus infinity forgets nothing.
    return log_keep.masked_fill(along(dt, gate).isinf() & (gate > -math.inf), -math.inf)


def _wide(inputs: list[Tensor]) -> list[Tensor]:
    return [as_dtype(pre, accumulate_dtype(pre.dtype)) for pre in inputs]


def _gate_and_candidate(spec: Spec, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the pre-activations of gate and candidate; minLSTM is a minGRU with gate log sigma(i) - log sigma(f).

    sigma(i) / (sigma(f) + sigma(i)) = sigma(log sigma(i) - log sigma(f))
    """
    x = _wide(inputs)
    if spec.cell == "minlstm":
        return F.logsigmoid(x[1]) - F.logsigmoid(x[0]), x[2]
    return x[0], x[1]


def _rotation(spec: Spec, inputs: list[Tensor], context: Context) -> tuple[Tensor, Tensor]:
    """Return a and b (B, S, H / 2, *, 2). The first input has pairs of a gate and an angle, in units of pi / 4."""
    gates, candidates = [to_parts(x, 2) for x in _wide(inputs)]
    gate, turn = gates.unbind(-1)
    angle = _angle(turn, context)
    keep, update = _decay(gate, spec.min_decay, context)
    a = torch.stack([keep * angle.cos(), keep * angle.sin()], -1)
    return a, update.unsqueeze(-1) * activate(candidates, spec.activation)


def _quaternion(spec: Spec, inputs: list[Tensor], context: Context) -> tuple[Tensor, Tensor]:
    """Return a and b (B, S, H / 4, *, 4). The first input has a gate and a vector of three numbers, in units of pi / 4.

    With the angle phi = |v|, exp(i v_1 + j v_2 + k v_3) = cos(phi) + sin(phi) / phi (i v_1 + j v_2 + k v_3).
    """
    gates, candidates = [to_parts(x, 4) for x in _wide(inputs)]
    if is_onnx():
        keep, update = _decay(gates[..., :1], spec.min_decay, context)
        return keep * unit_quaternion(gates[..., 1:], context), update * activate(candidates, spec.activation)
    gate, vector = gates[..., 0], gates[..., 1:]
    unit = torch.full_like(gate, 0.25 * math.pi)
    dt = context.dt
    if dt is not None:
        unit = unit * along(_elapsed(dt), gate)
    # A vector whose square overflows counts as 0, because nothing is known about its angle. Infinity becomes NaN.
    is_known = vector.square().sum(-1, keepdim=True) < math.inf
    vector = torch.where(is_known, vector, 0.0 * vector)
    square = vector.square().sum(-1)
    # Below 1/2, series of the square, because |v| has no derivative at 0.
    small = unit * unit * square
    is_small = small < 0.25
    small = torch.where(is_small, small, 0.0)
    size = torch.where(is_small, 1.0, square).sqrt()
    angle = _angle(size, context)
    cosine = torch.where(is_small, _alternating(small, 0), angle.cos())
    sine = torch.where(is_small, unit * _alternating(small, 1), angle.sin() / size)
    keep, update = _decay(gate, spec.min_decay, context)
    a = torch.cat([cosine.unsqueeze(-1), sine.unsqueeze(-1) * vector], -1)
    return keep.unsqueeze(-1) * a, update.unsqueeze(-1) * activate(candidates, spec.activation)


def unit_quaternion(vector: Tensor, context: Context) -> Tensor:
    """Return the exponential above from few operations, without derivatives at 0.

    The bounds give the same results for vectors whose length would be 0 or infinite; 2^63 is a number of whole turns.
    """
    size = torch.linalg.vector_norm(vector, dim=-1, keepdim=True).clamp(1e-15, 2.0**63)
    angle = _angle(size, context)
    return torch.cat([angle.cos(), angle.sin() / size * vector], -1)


def _alternating(square: Tensor, odd: int) -> Tensor:
    """Return cos(x), or if `odd`, sin(x) / x, from x^2 for |x| < 1/2, as a Taylor series."""
    total = torch.ones_like(square)
    for n in range(7, 0, -1):
        total = 1.0 - square * total / ((2 * n - 1 + odd) * (2 * n + odd))
    return total


def _angle(turn: Tensor, context: Context) -> Tensor:
    """Return an angle in units of pi / 4, times the elapsed time, as an angle in which whole turns are left out."""
    dt, turn = context.dt, 0.125 * turn
    if dt is None:
        turn = _without_whole_turns(turn)
    else:
        elapsed = along(_elapsed(dt), turn)
        product = elapsed * turn
        lost = _error_of_product(elapsed, turn, product).detach()
        turn = _without_whole_turns(product) + _without_whole_turns(lost)
    return turn * (2.0 * math.pi)


def _without_whole_turns(turn: Tensor) -> Tensor:
    """Subtract whole turns, without rounding. The product with pi would lose the precision of a large angle."""
    return turn - turn.round()


def _error_of_product(x: Tensor, y: Tensor, product: Tensor) -> Tensor:
    """Return x y - product, where `product` is x y, rounded. The products of the halves of x and y are exact."""
    x_high, y_high = _upper_half(x), _upper_half(y)
    x_low, y_low = x - x_high, y - y_high
    return ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low


def _upper_half(x: Tensor) -> Tensor:
    """Round x to half of its bits, as Veltkamp does."""
    scaled = x * (134217729.0 if x.dtype == torch.float64 else 4097.0)
    return scaled - (scaled - x)
