"""The cells: a and b of h_t = a_t h_{t-1} + b_t, and their partial derivatives.

A cell is one function of its inputs, a tuple of numbers as in `scan`: the first input of `rotation` consists of a gate
and an angle, that of `quaternion` of a gate and a vector. `time` is a tuple: empty, or the elapsed time, and with a
lower bound m of the decay per unit of time, log(m) and log(1 - m). The function returns a, b, and a derivative for each
of the parts of the inputs and, last, for the elapsed time, as of a number: (da, db, scale), so that the derivatives of
a and b are scale da and scale db. `scale` is a real number, or ABSENT if it is 1. The compiler drops unused
derivatives.

To add a cell, add its function, a branch to `cell`, and an entry to `device.CELLS`.
"""

import triton
import triton.language as tl

from .math import (
    ABSENT,
    INFINITY,
    NAN_STAYS,
    direction,
    direction_of_product,
    hyperbolic_tangent,
    log1p_of_unit,
    logistic,
    minus,
    positive,
    power,
    reciprocal,
    softplus,
    tangent,
    tanh_near_0,
)
from .scan import parts_in

QUARTER_PI = tl.constexpr(0.785398163397448309616)
# Infinite times are replaced by this one where infinity times 0 would be NaN.
LONGEST = tl.constexpr(1e30)


@triton.jit
def activate(v, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Return the activation of the candidate and its derivative."""
    if ACTIVATION == "positive":
        return positive(v, EXACT)
    elif ACTIVATION == "tanh":
        return hyperbolic_tangent(v, EXACT)
    else:
        return v, tl.full(v.shape, 1.0, v.dtype)


@triton.jit
def rate_of(gate, time, EXACT: tl.constexpr):
    """Return the rate of a decay exp(-dt rate), and its derivative; see csrc/cells.h."""
    if len(time) == 1:
        rate, slope, _ = softplus(gate, EXACT)
        return rate, slope
    else:
        # The gate l with sigma(-l) = m + (1 - m) sigma(-gate), without the infinity minus infinity of an infinite gate.
        above = gate + time[1]
        _, _, below = softplus(above, EXACT)
        excess = log1p_of_unit(power(tl.abs(above), -1, EXACT))
        bounded = tl.minimum(gate, minus(time[1]), propagate_nan=NAN_STAYS) - excess + time[2]
        rate, slope, _ = softplus(bounded, EXACT)
        return rate, slope * below


@triton.jit
def finite(elapsed):
    return tl.minimum(elapsed, LONGEST, propagate_nan=NAN_STAYS)


@triton.jit
def decay(gate, time, EXACT: tl.constexpr):
    """Return the decay a, the weight z = 1 - a of the candidate, and the derivatives of -log(a) by gate and time."""
    if len(time) == 0:
        z, a = logistic(gate, EXACT)
        return a, z, z, ABSENT
    else:
        rate, slope = rate_of(gate, time, EXACT)
        # After an infinite time nothing is left, even if the rate was rounded to 0.
        x = tl.where(time[0] == INFINITY, time[0] + rate, time[0] * rate)
        a = power(x, -1, EXACT)
        # 1 - exp(-x) = tanh(x / 2) (1 + exp(-x)) does not cancel.
        near = x < 0.7
        small = tanh_near_0(tl.where(near, 0.5 * x, 0.0), tl.where(near, x, 0.0)) * (1.0 + a)
        # Near 1, a has one rounding and not the error of the power, which would add up over a long memory.
        return tl.where(near, 1.0 - small, a), tl.where(near, small, 1.0 - a), finite(time[0]) * slope, rate


@triton.jit
def of_decay(slope, value, scale):
    """Return the derivative of a and b = (1 - a) value, if that of a is - scale slope."""
    return (minus(slope), ABSENT), (slope * value, ABSENT), scale


@triton.jit
def of_b(real, imaginary):
    """Return the derivative by a number on which only b depends."""
    return (ABSENT, ABSENT), (real, imaginary), ABSENT


@triton.jit
def mingru(x, time, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    a, z, by_gate, by_time = decay(x[0][0], time, EXACT)
    value, slope = activate(x[1][0], ACTIVATION, EXACT)
    return (
        (a, ABSENT),
        (z * value, ABSENT),
        (of_decay(a, value, by_gate), of_b(z * slope, ABSENT), of_decay(a, value, by_time)),
    )


@triton.jit
def signed(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    gate = x[0][0]
    size, rest, slope_of_gate = tangent(0.5 * tl.abs(gate), tl.abs(gate), EXACT)
    value, slope = activate(x[1][0], ACTIVATION, EXACT)
    a = tl.where(gate < 0, size, minus(size))
    by_gate = slope_of_gate * -0.5
    # The derivative of |a| at 0 counts as 0, as that of torch.abs.
    signed_value = tl.where(a > 0, minus(value), tl.where(a < 0, value, 0.0))
    of_gate = (by_gate, ABSENT), (signed_value * by_gate, ABSENT), ABSENT
    return (a, ABSENT), (rest * value, ABSENT), (of_gate, of_b(rest * slope, ABSENT))


@triton.jit
def direction_in(time, angle):
    """Return cosine and sine of an angle in units of pi / 4, times the elapsed time, and its derivative by angle."""
    unit = tl.full((1, 1), QUARTER_PI, angle.dtype)
    if len(time) == 0:
        cosine, sine = direction(0.25 * angle)
    else:
        elapsed = tl.broadcast_to(finite(time[0]), angle.shape)
        cosine, sine = direction_of_product(0.25 * elapsed, angle)
        unit = elapsed * QUARTER_PI
    return cosine, sine, unit


@triton.jit
def rotation(x, time, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    gate, angle = x[0]
    keep, z, by_gate, by_time = decay(gate, time, EXACT)
    value0, slope0 = activate(x[1][0], ACTIVATION, EXACT)
    value1, slope1 = activate(x[1][1], ACTIVATION, EXACT)
    cosine, sine, turn = direction_in(time, angle)
    a, turned = (keep * cosine, keep * sine), (minus(keep * sine), keep * cosine)
    of_gate = (minus(a[0]), minus(a[1])), (keep * value0, keep * value1), by_gate
    of_angle = turned, (ABSENT, ABSENT), turn
    derivatives = of_gate, of_angle, of_b(z * slope0, ABSENT), of_b(ABSENT, z * slope1)
    if len(time) > 0:
        turn_in_time, kept = angle * QUARTER_PI, by_time * keep
        da = turn_in_time * turned[0] - by_time * a[0], turn_in_time * turned[1] - by_time * a[1]
        derivatives += ((da, (kept * value0, kept * value1), ABSENT), of_b(ABSENT, ABSENT))
    return a, (z * value0, z * value1), derivatives


@triton.jit
def quaternion(x, time, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    gate, v1, v2, v3 = x[0]
    keep, z, by_gate, by_time = decay(gate, time, EXACT)
    c0, slope0 = activate(x[1][0], ACTIVATION, EXACT)
    c1, slope1 = activate(x[1][1], ACTIVATION, EXACT)
    c2, slope2 = activate(x[1][2], ACTIVATION, EXACT)
    c3, slope3 = activate(x[1][3], ACTIVATION, EXACT)
    # As in csrc/cells.h.
    is_known = tl.where(v1 * v1 + v2 * v2 + v3 * v3 < INFINITY, 1.0, 0.0).to(gate.dtype)
    v1, v2, v3 = v1 * is_known, v2 * is_known, v3 * is_known
    square = v1 * v1 + v2 * v2 + v3 * v3 + 1e-30
    size = tl.sqrt(square)
    inverse = 1.0 / size
    cosine, sine, unit = direction_in(time, size)
    sine = sine * inverse
    a = keep * cosine, keep * sine * v1, keep * sine * v2, keep * sine * v3
    b = z * c0, z * c1, z * c2, z * c3
    along, by_size = minus(unit * sine), (unit * cosine - sine) * (inverse * inverse)
    p1, p2, p3 = by_size * v1, by_size * v2, by_size * v3
    nothing = (ABSENT,) * 4
    derivatives = (
        ((minus(a[0]), minus(a[1]), minus(a[2]), minus(a[3])), (keep * c0, keep * c1, keep * c2, keep * c3), by_gate),
        ((along * v1, p1 * v1 + sine, p1 * v2, p1 * v3), nothing, keep),
        ((along * v2, p2 * v1, p2 * v2 + sine, p2 * v3), nothing, keep),
        ((along * v3, p3 * v1, p3 * v2, p3 * v3 + sine), nothing, keep),
        (nothing, (z * slope0, ABSENT, ABSENT, ABSENT), ABSENT),
        (nothing, (ABSENT, z * slope1, ABSENT, ABSENT), ABSENT),
        (nothing, (ABSENT, ABSENT, z * slope2, ABSENT), ABSENT),
        (nothing, (ABSENT, ABSENT, ABSENT, z * slope3), ABSENT),
    )
    if len(time) > 0:
        turn, kept = keep * cosine * QUARTER_PI, by_time * keep
        da = (
            minus(keep * QUARTER_PI * sine * square + by_time * a[0]),
            turn * v1 - by_time * a[1],
            turn * v2 - by_time * a[2],
            turn * v3 - by_time * a[3],
        )
        none = nothing, nothing, ABSENT
        derivatives += ((da, (kept * c0, kept * c1, kept * c2, kept * c3), ABSENT), none, none, none)
    return a, b, derivatives


@triton.jit
def normalized_gates(forget, input, EXACT: tl.constexpr):
    """Return f / (f + i), i / (f + i), sigma(-forget) and sigma(-input), as csrc/cells.h describes."""
    forget_power, input_power = power(tl.abs(forget), -1, EXACT), power(tl.abs(input), -1, EXACT)
    ahead = tl.minimum(forget, 0.0, propagate_nan=NAN_STAYS) - tl.minimum(input, 0.0, propagate_nan=NAN_STAYS)
    behind = power(tl.abs(ahead), -1, EXACT)
    left = ahead < 0
    forget_weight = tl.where(left, behind, 1.0) * (1.0 + input_power)
    input_weight = tl.where(left, 1.0, behind) * (1.0 + forget_power)
    is_less = forget_weight < input_weight
    small = tl.where(is_less, forget_weight, input_weight) * reciprocal(forget_weight + input_weight, EXACT)
    large = 1.0 - small
    # sigma(-x) from exp(-|x|).
    without_forget = tl.where(forget < 0, 1.0, forget_power) * reciprocal(1.0 + forget_power, EXACT)
    without_input = tl.where(input < 0, 1.0, input_power) * reciprocal(1.0 + input_power, EXACT)
    return tl.where(is_less, small, large), tl.where(is_less, large, small), without_forget, without_input


@triton.jit
def minlstm(x, time, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    forget, input = x[0][0], x[1][0]
    if len(time) == 0:
        f, i, without_forget, without_input = normalized_gates(forget, input, EXACT)
        slope, by_time = f * i, ABSENT
    else:
        # A minLSTM is a minGRU with the gate log sigma(i) - log sigma(f).
        forget_cost, without_forget, _ = softplus(minus(forget), EXACT)
        input_cost, without_input, _ = softplus(minus(input), EXACT)
        f, i, by_gate, by_time = decay(forget_cost - input_cost, time, EXACT)
        slope = f * by_gate
    value, value_slope = activate(x[2][0], ACTIVATION, EXACT)
    of_forget, of_input = of_decay(slope, value, minus(without_forget)), of_decay(slope, value, without_input)
    return (
        (f, ABSENT),
        (i * value, ABSENT),
        (of_forget, of_input, of_b(i * value_slope, ABSENT), of_decay(f, value, by_time)),
    )


@triton.jit
def unnormalized(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    f, without_forget = logistic(x[0][0], EXACT)
    i, without_input = logistic(x[1][0], EXACT)
    value, slope = activate(x[2][0], ACTIVATION, EXACT)
    of_forget = (f, ABSENT), (ABSENT, ABSENT), without_forget
    of_input = (ABSENT, ABSENT), (value * i, ABSENT), without_input
    return (f, ABSENT), (i * value, ABSENT), (of_forget, of_input, of_b(i * slope, ABSENT))


@triton.jit
def scans(x):
    """The cell whose inputs are a and b."""
    a, b = x
    one, nothing = tl.full(a[0].shape, 1.0, a[0].dtype), (ABSENT,) * len(a)
    of_a, of_b = (), ()
    for k in tl.static_range(parts_in(a)):
        unit = nothing[:k] + (one,) + nothing[k + 1 :]  # noqa: RUF005 (not in Triton)
        of_a += ((unit, nothing, ABSENT),)
        of_b += ((nothing, unit, ABSENT),)
    return a, b, of_a + of_b


@triton.jit
def cell(x, time, CELL: tl.constexpr, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Return a, b and the derivatives."""
    if CELL == "mingru":
        return mingru(x, time, ACTIVATION, EXACT)
    elif CELL == "mingru_signed":
        return signed(x, ACTIVATION, EXACT)
    elif CELL == "mingru_rotation":
        return rotation(x, time, ACTIVATION, EXACT)
    elif CELL == "mingru_quaternion":
        return quaternion(x, time, ACTIVATION, EXACT)
    elif CELL == "minlstm":
        return minlstm(x, time, ACTIVATION, EXACT)
    elif CELL == "minlstm_unnormalized":
        return unnormalized(x, ACTIVATION, EXACT)
    else:
        return scans(x)
