"""The Triton kernels of the recurrences. `triton.py` launches them; only that module imports this one, and only on use.

A program computes F neighboring features of one sequence. It walks over time in tiles of C chunks of T steps:

    C = 1   One step after the other. For many sequences and features.
    C > 1   Every chunk is computed from a state of 0, all chunks in parallel. `associative_scan` combines them to the
            state before each chunk. Then each chunk is computed again, from that state.

The inputs of a tile are read once, and its states are written once. If there are few programs, time is also divided
into segments: a first launch computes only the decay and the last state of each segment, and a second one the states.
Everything is computed in a fixed order, without atomics.

Time is counted in the order of the scan; u is the step in that order. For `backwards`, a step u is the row
num_steps - 1 - u. The backward pass is a scan in the opposite direction. The row of a packed step comes from a table.

Complex numbers are pairs of features, 2 j and 2 j + 1. `times` and `plus_times` multiply them.

Prefixes and suffixes: `x_` inputs of the cell, `num_` counts, `_batch` and `_step` strides. Strides of sequences and
`num_units` count units of V features, and the kernel multiplies them by V. That tells the compiler how addresses are
aligned, so that accesses have 16 bytes whenever the number of features allows them. All memory is read before any is
written in a tile, because the compiler moves no load over a store.
"""

import triton
import triton.language as tl

# log2(e) in float32, and the rest of it.
LOG2E = tl.constexpr(1.4426950216293335)
LOG2E_REST = tl.constexpr(1.9259629911266175e-08)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
QUARTER_PI = tl.constexpr(0.785398163397448309616)
NAN_STAYS = tl.constexpr(tl.PropagateNan.ALL)

# Arguments that do not select another compiled kernel, as numbers do that are 1 or a multiple of 16, and addresses that
# are a multiple of 16.
FORWARD_VALUES = [
    *("x0", "x1", "x2", "out", "h", "initial_state", "last", "reset", "dt", "offsets", "lengths", "products", "ends"),
    *("num_steps", "num_units", "num_segments", "segment_steps"),
    *("x_batch", "x_step", "out_batch", "out_step", "h_batch", "initial_batch"),
    *("reset_batch", "reset_step", "dt_batch", "dt_step"),
    *("log_bound", "log_bound_rest", "log_range", "log_range_rest", "backwards"),
]
BACKWARD_VALUES = [
    *FORWARD_VALUES,
    *("grad_out", "grads", "grad_last", "grad_h", "grad_initial_state", "grad_dt", "grad_bias"),
    *("grad_out_batch", "grad_out_step", "grads_batch", "grads_step"),
]
BACKWARD_VALUES.remove("last")


# Functions of one number. If EXACT, their error in float32 is about that of a rounding; otherwise the inputs have fewer
# digits.


@triton.jit
def minus(x):
    # Not -x, which Triton computes as 0 - x: a multiplication by -1 becomes a sign of the operand that uses it.
    return x * -1.0


@triton.jit
def power(x, SIGN: tl.constexpr, EXACT: tl.constexpr):
    """Return exp(SIGN x), which must be at most 1."""
    if x.dtype == tl.float64:
        return tl.exp(x * SIGN)
    # exp2 is one instruction and exp five, because exp has subnormal results.
    if not EXACT:
        return tl.exp2(x * (SIGN * LOG2E))
    # Infinity minus infinity would be NaN.
    if SIGN > 0:
        x = tl.maximum(x, -104.0, propagate_nan=NAN_STAYS)
    if SIGN < 0:
        x = tl.minimum(x, 104.0, propagate_nan=NAN_STAYS)
    scaled = x * (SIGN * LOG2E)
    # The rounding error of the product, minus the rest of log2(e).
    excess = tl.math.fma(x, tl.full(x.shape, -SIGN * LOG2E, x.dtype), scaled) - x * (SIGN * LOG2E_REST)
    whole = tl.exp2(scaled)
    return tl.math.fma(whole, excess * -LN2, whole)


@triton.jit
def reciprocal(x, EXACT: tl.constexpr):
    """Return 1 / x for x from 1 to 4."""
    if x.dtype == tl.float64:
        return 1.0 / x
    # Two instructions instead of the seven of a division.
    root = tl.rsqrt(x)
    guess = root * root
    if not EXACT:
        return guess
    # One step of Newton's method.
    return tl.math.fma(guess, tl.math.fma(minus(x), guess, tl.full(x.shape, 1.0, x.dtype)), guess)


@triton.jit
def logistic(x, EXACT: tl.constexpr):
    """Return sigma(x) and sigma(-x), both in full relative precision."""
    p = power(tl.abs(x), -1, EXACT)
    small = p * reciprocal(1.0 + p, EXACT)
    # Nothing cancels, because small <= 0.5, and the rounding of 1 + p does not matter as it does in 1 / (1 + p).
    large = 1.0 - small
    left = x < 0
    return tl.where(left, small, large), tl.where(left, large, small)


@triton.jit
def positive(v, EXACT: tl.constexpr):
    """Return g(v) and its derivative. g(v) = max(v + 0.5, sigma(v)), because sigma(v) - 0.5 is between 0 and v."""
    p = power(tl.minimum(v, 0.0, propagate_nan=NAN_STAYS), 1, EXACT)
    inverse = reciprocal(1.0 + p, EXACT)
    left = p * inverse
    return tl.maximum(v + 0.5, left, propagate_nan=NAN_STAYS), tl.where(v >= 0, 1.0, left * inverse)


@triton.jit
def tanh_near_0(x, double):
    """Return tanh of |x| < 0.35, where 1 - exp(-2x) would cancel; `double` is 2x, and exp(-double) is not 0."""
    if x.dtype == tl.float64:
        # expm1(y) = (exp(y) - 1) y / log(exp(y)): the rounding errors of exp cancel.
        p = tl.exp(minus(double))
        same = p == 1.0
        expm1 = minus(double) * tl.where(same, 1.0, (p - 1.0) / tl.where(same, 1.0, tl.log(p)))
        return minus(expm1) / (2.0 + expm1)
    # Taylor series. The first omitted term is below 2e-8 of the sum.
    square = x * x
    series = square * (-1382.0 / 155925.0) + 62.0 / 2835.0
    series = series * square - 17.0 / 315.0
    series = series * square + 2.0 / 15.0
    series = series * square - 1.0 / 3.0
    return x + x * (square * series)


@triton.jit
def hyperbolic_tangent(x, EXACT: tl.constexpr):
    """Return tanh(x) and its derivative, computed as 4 p / (1 + p)^2 where 1 - tanh(x)^2 would cancel."""
    double = 2.0 * tl.abs(x)
    p = power(double, -1, EXACT)
    inverse = reciprocal(1.0 + p, EXACT)
    near = tl.abs(x) < 0.35
    # Far from 0, the function is not used, but its operations must not fail.
    size = tl.where(near, tanh_near_0(tl.where(near, tl.abs(x), 0.0), tl.where(near, double, 0.0)), (1.0 - p) * inverse)
    slope = tl.where(near, 1.0 - size * size, 4.0 * p * (inverse * inverse))
    return tl.where(x < 0, minus(size), size), slope


@triton.jit
def log1p_of_unit(q):
    """Return log(1 + q) for q from 0 to 1, in full relative precision; see csrc/math.h."""
    if q.dtype == tl.float64:
        is_large = q > 0.41421356237309505
        r = tl.where(is_large, 0.5 * (q - 1.0), q)
        s = r / (2.0 + r)
        x = s * s
        sum = ((1.0 / 21 * x + 1.0 / 19) * x + 1.0 / 17) * x + 1.0 / 15
        sum = (((sum * x + 1.0 / 13) * x + 1.0 / 11) * x + 1.0 / 9) * x + 1.0 / 7
        sum = ((sum * x + 1.0 / 5) * x + 1.0 / 3) * x + 1.0
        log = 2.0 * s * sum
        # Not `where` of two numbers, which would be float32.
        return tl.where(is_large, log + 0.69314718055994530942, log)
    else:
        sum = (0.005364822689443827 * q - 0.03006578609347343) * q + 0.07920452207326889
        sum = ((sum * q - 0.1375380158424377) * q + 0.191536545753479) * q - 0.2485716342926025
        sum = (sum * q + 0.3332132399082184) * q - 0.4999964833259583
        return q + q * q * sum


@triton.jit
def softplus(x, EXACT: tl.constexpr):
    """Return log(1 + exp(x)), its derivative sigma(x), and sigma(-x)."""
    p = power(tl.abs(x), -1, EXACT)
    large = reciprocal(1.0 + p, EXACT)
    small = p * large
    left = x < 0
    value = tl.maximum(x, 0.0, propagate_nan=NAN_STAYS) + log1p_of_unit(p)
    return value, tl.where(left, small, large), tl.where(left, large, small)


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
def small_direction(r):
    """Return cos(pi r) and sin(pi r) for |r| <= 1/4. csrc/math.h has the errors of these polynomials."""
    x = r * r
    if r.dtype == tl.float64:
        cosine = ((4.3030695870329470073e-6 * x - 0.00010463810492484570712) * x + 0.0019295743094039230479) * x
        cosine = (((cosine - 0.025806891390014060013) * x + 0.23533063035889320454) * x - 1.3352627688545894959) * x
        cosine = ((cosine + 4.0587121264167682182) * x - 4.9348022005446793094) * x + 1.0
        sine = ((7.9520540014755127848e-7 * x - 0.000021915353447830215827) * x + 0.00046630280576761256442) * x
        sine = (((sine - 0.0073704309457143507773) * x + 0.082145886611128228799) * x - 0.59926452932079207689) * x
        sine = ((sine + 2.5501640398773454439) * x - 5.1677127800499700292) * x + 3.1415926535897932385
    else:
        cosine = ((0.2313287854194641 * x - 1.335044503211975) * x + 4.058707237243652) * x
        cosine = (cosine - 4.934802055358887) * x + 1.0
        sine = ((-0.5890750885009766 * x + 2.549767017364502) * x - 5.167707920074463) * x + 3.1415927410125732
    return cosine, sine * r


@triton.jit
def direction(x):
    """Return cos(pi x) and sin(pi x); see csrc/math.h."""
    if x.dtype == tl.float64:
        ROUNDER: tl.constexpr = 6755399441055744.0
        INTEGER: tl.constexpr = tl.int64
        BITS: tl.constexpr = 64
    else:
        ROUNDER: tl.constexpr = 12582912.0
        INTEGER: tl.constexpr = tl.int32
        BITS: tl.constexpr = 32
    # Adding this number rounds to an integer, here to the number of quarter turns.
    shifted = 2.0 * x + ROUNDER
    r = x - 0.5 * (shifted - ROUNDER)
    # Larger numbers have no fraction, but would leave the range of the polynomials.
    r = tl.maximum(tl.minimum(r, 0.25, propagate_nan=NAN_STAYS), -0.25, propagate_nan=NAN_STAYS)
    cosine, sine = small_direction(r)
    # The low bits of `shifted` are those of the number of quarter turns. The second bit becomes the sign.
    quarters = shifted.to(INTEGER, bitcast=True)
    swap = (quarters & 1) != 0
    SIGN: tl.constexpr = -(1 << (BITS - 1))
    cosine_sign = ((quarters + 1) << (BITS - 2)) & SIGN
    sine_sign = (quarters << (BITS - 2)) & SIGN
    turned_cosine = tl.where(swap, sine, cosine).to(INTEGER, bitcast=True) ^ cosine_sign
    turned_sine = tl.where(swap, cosine, sine).to(INTEGER, bitcast=True) ^ sine_sign
    return turned_cosine.to(x.dtype, bitcast=True), turned_sine.to(x.dtype, bitcast=True)


# Complex numbers. If V > 1, a pair is in one thread, so that taking pairs apart and joining them moves no data.


@triton.jit
def parts(x):
    """Return the real and the imaginary parts (C, F / 2) of pairs (C, F)."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def times(a, b, PAIRS: tl.constexpr):
    """Return a b."""
    if PAIRS:
        a0, a1 = parts(a)
        b0, b1 = parts(b)
        return tl.interleave(a0 * b0 - a1 * b1, a1 * b0 + a0 * b1)
    else:
        return a * b


@triton.jit
def plus_times(c, a, b, PAIRS: tl.constexpr):
    """Return c + a b."""
    if PAIRS:
        c0, c1 = parts(c)
        a0, a1 = parts(a)
        b0, b1 = parts(b)
        return tl.interleave(c0 + a0 * b0 - a1 * b1, c1 + a1 * b0 + a0 * b1)
    else:
        return tl.math.fma(a, b, c)


@triton.jit
def ones(C: tl.constexpr, F: tl.constexpr, A: tl.constexpr, PAIRS: tl.constexpr):
    """Return the number 1, as (C, F)."""
    if PAIRS:
        return tl.interleave(tl.full((C, F // 2), 1.0, A), tl.zeros((C, F // 2), A))
    else:
        return tl.full((C, F), 1.0, A)


# The cells. `<cell>_coefficients` returns a and b; `<cell>_gradients` returns a, and the gradient of each input for
# delta = 1, or what `gradient_of_pairs` takes. To add a cell, add both functions, a branch to `coefficients` and
# `gradients`, and an entry to `triton.KEEPING`. Cells have up to three inputs.
# `time` is None, or a tuple: the elapsed time, and with a lower bound m of the decay per unit of time, log(m) and
# log(1 - m). The gradients then include that of the elapsed time.


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
def decay(gate, time, EXACT: tl.constexpr):
    """Return the weight z of the candidate, the decay 1 - z, the derivative of z, and with `time` the rate."""
    if time is None:
        z, a = logistic(gate, EXACT)
        return z, a, z * a, z
    else:
        rate, slope = rate_of(gate, time, EXACT)
        x = time[0] * rate
        a = power(x, -1, EXACT)
        # 1 - exp(-x) = tanh(x / 2) (1 + exp(-x)) does not cancel.
        near = x < 0.7
        small = tanh_near_0(tl.where(near, 0.5 * x, 0.0), tl.where(near, x, 0.0)) * (1.0 + a)
        return tl.where(near, small, 1.0 - a), a, time[0] * slope * a, rate


@triton.jit
def mingru_coefficients(gate, candidate, time, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    z, a, _, _ = decay(gate, time, EXACT)
    value, _ = activate(candidate, ACTIVATION, EXACT)
    return a, z * value


@triton.jit
def mingru_gradients(gate, candidate, previous, time, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    z, a, slope_of_z, rate = decay(gate, time, EXACT)
    value, slope = activate(candidate, ACTIVATION, EXACT)
    change = value - previous
    return a, change * slope_of_z, z * slope, change * a * rate


@triton.jit
def half_tangent(x, EXACT: tl.constexpr):
    """Return |tanh(x / 2)| and 1 - |tanh(x / 2)|, both in full relative precision."""
    size = tl.abs(x)
    p = power(size, -1, EXACT)
    inverse = reciprocal(1.0 + p, EXACT)
    near = size < 0.7
    small = tanh_near_0(tl.where(near, 0.5 * size, 0.0), tl.where(near, size, 0.0))
    return tl.where(near, small, (1.0 - p) * inverse), 2.0 * (p * inverse)


@triton.jit
def signed_coefficients(gate, candidate, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    size, rest = half_tangent(gate, EXACT)
    value, _ = activate(candidate, ACTIVATION, EXACT)
    return tl.where(gate < 0, size, minus(size)), rest * value


@triton.jit
def signed_gradients(gate, candidate, previous, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    size, rest = half_tangent(gate, EXACT)
    value, slope = activate(candidate, ACTIVATION, EXACT)
    a = tl.where(gate < 0, size, minus(size))
    # The derivative of |a| at 0 counts as 0, as that of torch.abs.
    signed_value = tl.where(a > 0, minus(value), tl.where(a < 0, value, 0.0))
    grad = (signed_value + previous) * (rest * (1.0 + size)) * -0.5
    return a, grad, rest * slope


@triton.jit
def turned_by(angle, time):
    """Return the cosine and the sine of the angle of a step, given in units of pi / 4."""
    if time is None:
        return direction(0.25 * angle)
    else:
        return direction(0.25 * time[0] * angle)


@triton.jit
def rotation_coefficients(gates, candidates, time, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    gate, angle = parts(gates)
    z, keep, _, _ = decay(gate, time, EXACT)
    cosine, sine = turned_by(angle, time)
    values, _ = activate(candidates, ACTIVATION, EXACT)
    return tl.interleave(keep * cosine, keep * sine), tl.interleave(z, z) * values


@triton.jit
def rotation_gradients(gates, candidates, previous, time, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    gate, angle = parts(gates)
    z, keep, slope, rate = decay(gate, time, EXACT)
    cosine, sine = turned_by(angle, time)
    values, slopes = activate(candidates, ACTIVATION, EXACT)
    turned = times(tl.interleave(cosine, sine), previous, True)
    conjugate = tl.interleave(keep * cosine, minus(keep * sine))
    change, quarter = values - turned, keep * QUARTER_PI
    for_time, turn_in_time = keep * rate, quarter * angle
    if time is not None:
        quarter *= time[0]
    return (
        conjugate,
        change * tl.interleave(slope, slope),
        tl.interleave(z, z) * slopes,
        turned * tl.interleave(quarter, quarter),
        change * tl.interleave(for_time, for_time),
        turned * tl.interleave(turn_in_time, turn_in_time),
    )


@triton.jit
def normalized_gates(forget, input, EXACT: tl.constexpr):
    """Return f / (f + i), i / (f + i), exp(-|forget|) and exp(-|input|), as csrc/cells.h describes."""
    forget_power, input_power = power(tl.abs(forget), -1, EXACT), power(tl.abs(input), -1, EXACT)
    ahead = tl.minimum(forget, 0.0, propagate_nan=NAN_STAYS) - tl.minimum(input, 0.0, propagate_nan=NAN_STAYS)
    behind = power(tl.abs(ahead), -1, EXACT)
    left = ahead < 0
    forget_weight = tl.where(left, behind, 1.0) * (1.0 + input_power)
    input_weight = tl.where(left, 1.0, behind) * (1.0 + forget_power)
    is_less = forget_weight < input_weight
    small = tl.where(is_less, forget_weight, input_weight) * reciprocal(forget_weight + input_weight, EXACT)
    large = 1.0 - small
    return tl.where(is_less, small, large), tl.where(is_less, large, small), forget_power, input_power


@triton.jit
def minlstm_coefficients(forget, input, candidate, time, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    if time is None:
        f, i, _, _ = normalized_gates(forget, input, EXACT)
        value, _ = activate(candidate, ACTIVATION, EXACT)
        return f, i * value
    else:
        # A minLSTM is a minGRU with the gate log sigma(i) - log sigma(f).
        forget_cost, _, _ = softplus(minus(forget), EXACT)
        input_cost, _, _ = softplus(minus(input), EXACT)
        return mingru_coefficients(forget_cost - input_cost, candidate, time, ACTIVATION, EXACT)


@triton.jit
def minlstm_gradients(forget, input, candidate, previous, time, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    if time is None:
        f, i, forget_power, input_power = normalized_gates(forget, input, EXACT)
        value, slope = activate(candidate, ACTIVATION, EXACT)
        shifted = (value - previous) * f * i
        # sigma(-x) from exp(-|x|).
        without_forget = tl.where(forget < 0, 1.0, forget_power) * reciprocal(1.0 + forget_power, EXACT)
        without_input = tl.where(input < 0, 1.0, input_power) * reciprocal(1.0 + input_power, EXACT)
        return f, minus(shifted) * without_forget, shifted * without_input, i * slope, shifted
    else:
        forget_cost, without_forget, _ = softplus(minus(forget), EXACT)
        input_cost, without_input, _ = softplus(minus(input), EXACT)
        a, shifted, for_candidate, for_time = mingru_gradients(
            forget_cost - input_cost, candidate, previous, time, ACTIVATION, EXACT
        )
        return a, minus(shifted) * without_forget, shifted * without_input, for_candidate, for_time


@triton.jit
def unnormalized_coefficients(forget, input, candidate, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    f, _ = logistic(forget, EXACT)
    i, _ = logistic(input, EXACT)
    value, _ = activate(candidate, ACTIVATION, EXACT)
    return f, i * value


@triton.jit
def unnormalized_gradients(forget, input, candidate, previous, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    f, without_forget = logistic(forget, EXACT)
    i, without_input = logistic(input, EXACT)
    value, slope = activate(candidate, ACTIVATION, EXACT)
    return f, previous * f * without_forget, value * i * without_input, i * slope


@triton.jit
def coefficients(x0, x1, x2, time, CELL: tl.constexpr, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Return a and b of h_t = a_t h_{t-1} + b_t."""
    if CELL == "mingru":
        return mingru_coefficients(x0, x1, time, ACTIVATION, EXACT)
    elif CELL == "mingru_signed":
        return signed_coefficients(x0, x1, ACTIVATION, EXACT)
    elif CELL == "mingru_rotation":
        return rotation_coefficients(x0, x1, time, ACTIVATION, EXACT)
    elif CELL == "minlstm":
        return minlstm_coefficients(x0, x1, x2, time, ACTIVATION, EXACT)
    elif CELL == "minlstm_unnormalized":
        return unnormalized_coefficients(x0, x1, x2, ACTIVATION, EXACT)
    else:
        return x0, x1


@triton.jit
def gradients(x0, x1, x2, previous, time, CELL: tl.constexpr, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Return a, the gradients of the three inputs for dL/dh_t = 1, and twice that of the elapsed time. If a cell has no
    third input or no elapsed time, their places hold other numbers.

    For complex numbers, return the conjugate of a; d0, the gradient of the second input, and d2, of which
    `gradient_of_pairs` makes the gradient of the first input; and d0 and d2 of the elapsed time.
    """
    if CELL == "mingru":
        a, d0, d1, for_time = mingru_gradients(x0, x1, previous, time, ACTIVATION, EXACT)
        return a, d0, d1, d1, for_time, for_time
    elif CELL == "mingru_signed":
        a, d0, d1 = signed_gradients(x0, x1, previous, ACTIVATION, EXACT)
        return a, d0, d1, d1, d1, d1
    elif CELL == "mingru_rotation":
        return rotation_gradients(x0, x1, previous, time, ACTIVATION, EXACT)
    elif CELL == "minlstm":
        a, d0, d1, d2, for_time = minlstm_gradients(x0, x1, x2, previous, time, ACTIVATION, EXACT)
        return a, d0, d1, d2, for_time, for_time
    elif CELL == "minlstm_unnormalized":
        a, d0, d1, d2 = unnormalized_gradients(x0, x1, x2, previous, ACTIVATION, EXACT)
        return a, d0, d1, d2, d2, d2
    else:
        one = tl.full(x0.shape, 1.0, x0.dtype)
        if CELL == "complex_linear_scan":
            real, imaginary = parts(x0)
            x0 = tl.interleave(real, minus(imaginary))
        return x0, previous, one, previous, one, one


@triton.jit
def gradient_of_pairs(delta, d0, d2):
    """Return the gradient of the first input of a complex cell: pairs Re(delta conj(d0)) and Im(delta conj(d2))."""
    delta0, delta1 = parts(delta)
    real0, real1 = parts(d0)
    imaginary0, imaginary1 = parts(d2)
    return tl.interleave(delta0 * real0 + delta1 * real1, delta1 * imaginary0 - delta0 * imaginary1)


# The combination of chunks.


@triton.jit
def then(p_left, l_left, p_before, l_before, p_right, l_right, p_before_right, l_before_right):
    """Combine maps h -> p h + l. The last two values are the map without the last chunk, because shifting the result by
    one chunk would exchange data between threads."""
    return (
        p_left * p_right,
        p_right * l_left + l_right,
        p_left * p_before_right,
        p_before_right * l_left + l_before_right,
    )


@triton.jit
def then_pairs(
    p0_left,
    p1_left,
    l0_left,
    l1_left,
    p0_before,
    p1_before,
    l0_before,
    l1_before,
    p0_right,
    p1_right,
    l0_right,
    l1_right,
    p0_before_right,
    p1_before_right,
    l0_before_right,
    l1_before_right,
):
    """Combine maps of complex numbers as `then` does. 0 marks the real part, and 1 the imaginary part."""
    return (
        p0_left * p0_right - p1_left * p1_right,
        p1_left * p0_right + p0_left * p1_right,
        l0_right + p0_right * l0_left - p1_right * l1_left,
        l1_right + p1_right * l0_left + p0_right * l1_left,
        p0_left * p0_before_right - p1_left * p1_before_right,
        p1_left * p0_before_right + p0_left * p1_before_right,
        l0_before_right + p0_before_right * l0_left - p1_before_right * l1_left,
        l1_before_right + p1_before_right * l0_left + p0_before_right * l1_left,
    )


@triton.jit
def row_of(x, row, CHUNK: tl.constexpr):
    """Return one chunk of (C, F), as (1, F)."""
    return tl.sum(tl.where(row == CHUNK, x, 0.0), 0)[None, :]


@triton.jit
def carries(
    a,
    b,
    reset,
    start,
    product,
    local,
    state,
    C: tl.constexpr,
    T: tl.constexpr,
    HAS_RESET: tl.constexpr,
    BACKWARD: tl.constexpr,
    MAY_GROW: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Return the state before each chunk (C, F), the state after the last one and the decay of all chunks (1, F).

    `product` and `local` are the map h -> product h + local of each chunk. The state before the first chunk is `state`
    (1, F). a, b and reset are tuples with a value for each step of a chunk.
    """
    row = tl.arange(0, C)[:, None]
    if PAIRS:
        p0, p1 = parts(product)
        l0, l1 = parts(local)
        one, zero = tl.full(p0.shape, 1.0, p0.dtype), tl.zeros(p0.shape, p0.dtype)
        p0, p1, l0, l1, p0_before, p1_before, l0_before, l1_before = tl.associative_scan(
            (p0, p1, l0, l1, one, zero, zero, zero), 0, then_pairs
        )
        p, l = tl.interleave(p0, p1), tl.interleave(l0, l1)
        p_before, l_before = tl.interleave(p0_before, p1_before), tl.interleave(l0_before, l1_before)
    else:
        one, zero = tl.full(product.shape, 1.0, product.dtype), tl.zeros(product.shape, product.dtype)
        p, l, p_before, l_before = tl.associative_scan((product, local, one, zero), 0, then)
    from_state = tl.broadcast_to(state, product.shape)
    before = plus_times(l_before, p_before, from_state, PAIRS)
    last = row_of(plus_times(l, p, from_state, PAIRS), row, C - 1)
    # A product may underflow or be 0 because of a reset, and 0 times an infinite state is NaN; or it may overflow if
    # |a| > 1. Then the chunks are computed one after the other. NaN stays until the last chunk.
    wrong = tl.max((last != last).to(tl.int32), 1)
    if MAY_GROW:
        overflows = (tl.abs(p) < INFINITY).to(tl.int32) == 0
        wrong = tl.maximum(wrong, tl.max(tl.max(overflows.to(tl.int32), 1), 0))
    if tl.max(wrong, 0) != 0:
        last = state
        for chunk in range(C):
            before = tl.where(row == chunk, last, before)
            h = tl.broadcast_to(last, product.shape)
            for t in tl.static_range(T):
                if BACKWARD:
                    h = times(a[t], b[t] + h, PAIRS)
                    if HAS_RESET:
                        h = tl.where(reset[t], 0.0, h)
                else:
                    if HAS_RESET:
                        h = tl.where(reset[t], start, h)
                    h = plus_times(b[t], a[t], h, PAIRS)
            last = tl.sum(tl.where(row == chunk, h, 0.0), 0)[None, :]
    return before, last, p


@triton.jit
def carry_into(segment, state, products, ends, row, num_features, feature, there, PAIRS: tl.constexpr):
    """Return the state before a segment, from the results of all segments before it, in their order."""
    for before in range(segment):
        at = (row + before) * num_features + feature
        p = tl.load(products + at, there, other=1.0)
        l = tl.load(ends + at, there, other=0.0)
        # A decay that underflowed times an infinite state would be NaN; the division has the sign of the decay.
        kept = tl.where((p == 0) & (tl.abs(state) == INFINITY), state / p, times(p, state, PAIRS))
        # An infinite decay marks a reset, because |a| <= 1.
        state = tl.where(p == INFINITY, l, kept + l)
    return state


@triton.jit
def beginning(batch, batch_stride, step, first_row, sign, V: tl.constexpr, PACKED: tl.constexpr):
    """Return the offset of the first step of a sequence in the order of the scan, and the stride to the next step. The
    offset of packed steps is in a table."""
    step = step.to(tl.int64) * V
    at = batch * batch_stride * V
    if PACKED:
        return at, step
    else:
        return at + first_row * step, step * sign


@triton.jit
def address(first, t, rows, step, PACKED: tl.constexpr):
    """Return the offset of step t of each chunk (C, 1); `first` is the index of its first step."""
    if PACKED:
        return rows[t] * step
    else:
        return first * step + t * step


@triton.jit
def time_of(dt, at, here, log_bound, log_bound_rest, log_range, log_range_rest, A: tl.constexpr):
    """Return the `time` of a step of each chunk, as the cells take it. Steps that are not there have a time of 0."""
    one = tl.full((1, 1), 1.0, A)
    elapsed = one
    if dt is not None:
        elapsed = tl.load(dt + at, here, other=0.0).to(A)
    if log_bound is None:
        return (elapsed,)
    else:
        return elapsed, one * log_bound + log_bound_rest, one * log_range + log_range_rest


@triton.jit(do_not_specialize=FORWARD_VALUES)
def forward_kernel(
    # Sequences.
    x0,
    x1,
    x2,
    out,
    # States (B, N), and masks; None if there are none.
    h,
    initial_state,
    last,
    reset,
    # Elapsed times; None if they are all 1.
    dt,
    # Offset of each packed step, and length of each packed sequence.
    offsets,
    lengths,
    # Decay and last state from a state of 0 of each segment, (B, num_segments, N).
    products,
    ends,
    num_steps,
    num_units,
    num_segments,
    segment_steps,
    x_batch,
    x_step,
    out_batch,
    out_step,
    h_batch,
    initial_batch,
    reset_batch,
    reset_step,
    dt_batch,
    dt_step,
    # log(m) and log(1 - m) of the lower bound m of the decay, each as a float32 number and the rest; None without one.
    log_bound,
    log_bound_rest,
    log_range,
    log_range_rest,
    backwards,
    CELL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEPING: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute all states, or without `out` the products and ends of segments."""
    HAS_RESET: tl.constexpr = reset is not None
    HAS_DT: tl.constexpr = dt is not None
    TIMED: tl.constexpr = dt is not None or log_bound is not None
    PACKED: tl.constexpr = offsets is not None
    SEGMENTS: tl.constexpr = products is not None
    SUMMARY: tl.constexpr = out is None
    EXACT: tl.constexpr = x0.dtype.element_ty == tl.float32
    A: tl.constexpr = tl.float64 if x0.dtype.element_ty == tl.float64 else tl.float32
    PAIRS: tl.constexpr = CELL == "mingru_rotation" or CELL == "complex_linear_scan"
    MAY_GROW: tl.constexpr = CELL == "linear_scan" or CELL == "complex_linear_scan"

    num_features = num_units * V
    num_blocks = tl.cdiv(num_features, F)
    program = tl.program_id(0)
    batch = (program // num_blocks).to(tl.int64)
    feature = (program % num_blocks) * F + tl.arange(0, F)[None, :]
    there = feature < num_features
    begin, end, total = 0, num_steps, num_steps
    if PACKED:
        total = tl.load(lengths + batch).to(tl.int32)
        end = total
    if SEGMENTS:
        segment = (batch % num_segments).to(tl.int32)
        batch = batch // num_segments
        begin = segment * segment_steps
        end = tl.minimum(begin + segment_steps, num_steps)
    chunk = tl.arange(0, C)[:, None]

    if SUMMARY:
        state = tl.zeros((1, F), A)
        decay = ones(1, F, A, PAIRS)
        any_reset = tl.zeros((1, 1), tl.int32)
    else:
        state = tl.load(h + batch * h_batch + feature, there, other=0.0).to(A)
    start = tl.zeros((1, F), A)
    if initial_state is not None:
        start = tl.load(initial_state + batch * initial_batch + feature, there, other=0.0).to(A)
    if SEGMENTS and not SUMMARY:
        state = carry_into(segment, state, products, ends, batch * num_segments, num_features, feature, there, PAIRS)

    first_row = (backwards * (total - 1)).to(tl.int64)
    sign = 1 - 2 * backwards
    x_at, x_step = beginning(batch, x_batch, x_step, first_row, sign, V, PACKED)
    # `multiple_of` promises the alignment in bytes, on scalars, because the compiler loses it on other addresses.
    ALIGNMENT: tl.constexpr = V * (x0.dtype.element_ty.primitive_bitwidth // 8)
    x0 = tl.multiple_of(x0 + x_at, ALIGNMENT) + feature
    x1 = tl.multiple_of(x1 + x_at, ALIGNMENT) + feature
    if x2 is not None:
        x2 = tl.multiple_of(x2 + x_at, ALIGNMENT) + feature
    if HAS_RESET:
        reset_at, reset_step = beginning(batch, reset_batch, reset_step, first_row, sign, 1, PACKED)
        reset += reset_at
    if HAS_DT:
        dt_at, dt_step = beginning(batch, dt_batch, dt_step, first_row, sign, 1, PACKED)
        dt += dt_at
    if not SUMMARY:
        out_at, out_step = beginning(batch, out_batch, out_step, first_row, sign, V, PACKED)
        out = tl.multiple_of(out + out_at, ALIGNMENT) + feature

    keeping = KEEPING[0]
    if PAIRS:
        # The second feature of a pair is 0.
        keeping = tl.where(feature % 2 == 0, KEEPING[0], 0.0).to(x0.dtype.element_ty)
    for tile in tl.range(begin, end, C * T, num_stages=STAGES):
        first = (tile + chunk * T).to(tl.int64)
        inputs0, inputs1, inputs2, is_reset, moments, rows = (), (), (), (), (), ()
        for t in tl.static_range(T):
            u = tile + chunk * T + t
            here = u < end
            if PACKED:
                time = tl.where(backwards != 0, total - 1 - u, u)
                rows += (tl.load(offsets + time, here, other=0) + batch,)
            mask = here if EVEN else here & there
            at = address(first, t, rows, x_step, PACKED)
            inputs0 += (tl.load(x0 + at, mask, other=keeping).to(A),)
            inputs1 += (tl.load(x1 + at, mask, other=KEEPING[1]).to(A),)
            if x2 is not None:
                inputs2 += (tl.load(x2 + at, mask, other=KEEPING[2]).to(A),)
            else:
                inputs2 += (inputs1[t],)
            if HAS_RESET:
                is_reset += (tl.load(reset + address(first, t, rows, reset_step, PACKED), here, other=0) != 0,)
            if TIMED:
                at = address(first, t, rows, dt_step, PACKED) if HAS_DT else 0
                moments += (time_of(dt, at, here, log_bound, log_bound_rest, log_range, log_range_rest, A),)
        a, b = (), ()
        product = ones(C, F, A, PAIRS)
        local = tl.zeros((C, F), A)
        seen = tl.zeros((C, 1), tl.int32)
        for t in tl.static_range(T):
            a_t, b_t = coefficients(
                inputs0[t], inputs1[t], inputs2[t], moments[t] if TIMED else None, CELL, ACTIVATION, EXACT
            )
            a += (a_t,)
            b += (b_t,)
            if C > 1:
                if HAS_RESET:
                    local = tl.where(is_reset[t], start, local)
                    product = tl.where(is_reset[t], 0.0, product)
                    seen = tl.where(is_reset[t], 1, seen)
                local = plus_times(b_t, a_t, local, PAIRS)
                product = times(product, a_t, PAIRS)
        if C > 1:
            before, state, p = carries(
                a, b, is_reset, start, product, local, state, C, T, HAS_RESET, False, MAY_GROW, PAIRS
            )
            if SUMMARY:
                decay = times(decay, row_of(p, chunk, C - 1), PAIRS)
                any_reset = any_reset | tl.max(seen, 0)[None, :]
        else:
            before = state
        if not SUMMARY:
            for t in tl.static_range(T):
                if HAS_RESET:
                    before = tl.where(is_reset[t], start, before)
                before = plus_times(b[t], a[t], before, PAIRS)
                here = (tile + chunk * T + t) < end
                at = address(first, t, rows, out_step, PACKED)
                tl.store(out + at, before.to(out.dtype.element_ty), here if EVEN else here & there)
            if C == 1:
                state = before

    if SUMMARY:
        at = (batch * num_segments + segment) * num_features + feature
        tl.store(products + at, tl.where(any_reset != 0, INFINITY, decay), there)
        tl.store(ends + at, state, there)
    else:
        is_last = True
        if SEGMENTS:
            is_last = segment == num_segments - 1
        if is_last:
            tl.store(last + batch * num_features + feature, state.to(last.dtype.element_ty), there)


@triton.jit(do_not_specialize=BACKWARD_VALUES)
def backward_kernel(
    # Sequences. `grads` has the gradients of all inputs side by side.
    x0,
    x1,
    x2,
    out,
    grad_out,
    grads,
    h,
    initial_state,
    reset,
    dt,
    offsets,
    lengths,
    grad_last,
    grad_h,
    # Sums over the features of a unit, (num_units) for each elapsed time.
    grad_dt,
    # Sums over the steps of a segment, (B, num_segments, N) and (B, num_segments, num_inputs N).
    grad_initial_state,
    grad_bias,
    products,
    ends,
    num_steps,
    num_units,
    num_segments,
    segment_steps,
    x_batch,
    x_step,
    out_batch,
    out_step,
    grad_out_batch,
    grad_out_step,
    grads_batch,
    grads_step,
    h_batch,
    initial_batch,
    reset_batch,
    reset_step,
    dt_batch,
    dt_step,
    # log(m) and log(1 - m) of the lower bound m of the decay, each as a float32 number and the rest; None without one.
    log_bound,
    log_bound_rest,
    log_range,
    log_range_rest,
    backwards,
    CELL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEPING: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute the gradients, or without `grads` the products and ends of segments.

    u counts from the last step of the recurrence to its first; `backwards` refers to that order. The carry is the
    gradient of the state before a step: c = a (dL/dh + c of the following step). Across a reset, c is added to the
    gradient of the initial state and continues as 0.
    """
    HAS_RESET: tl.constexpr = reset is not None
    HAS_DT: tl.constexpr = dt is not None
    TIMED: tl.constexpr = dt is not None or log_bound is not None
    PACKED: tl.constexpr = offsets is not None
    SEGMENTS: tl.constexpr = products is not None
    SUMMARY: tl.constexpr = grads is None
    HAS_INITIAL: tl.constexpr = grad_initial_state is not None
    HAS_BIAS: tl.constexpr = grad_bias is not None
    NUM_INPUTS: tl.constexpr = 2 if x2 is None else 3
    EXACT: tl.constexpr = x0.dtype.element_ty == tl.float32
    A: tl.constexpr = tl.float64 if x0.dtype.element_ty == tl.float64 else tl.float32
    PAIRS: tl.constexpr = CELL == "mingru_rotation" or CELL == "complex_linear_scan"
    MAY_GROW: tl.constexpr = CELL == "linear_scan" or CELL == "complex_linear_scan"

    num_features = num_units * V
    num_blocks = tl.cdiv(num_features, F)
    program = tl.program_id(0)
    batch = (program // num_blocks).to(tl.int64)
    block = program % num_blocks
    feature = block * F + tl.arange(0, F)[None, :]
    unit = block * (F // V) + tl.arange(0, F // V)[None, :]
    there = feature < num_features
    begin, end, total = 0, num_steps, num_steps
    sum_row = batch
    if PACKED:
        total = tl.load(lengths + batch).to(tl.int32)
        end = total
    if SEGMENTS:
        segment = (batch % num_segments).to(tl.int32)
        batch = batch // num_segments
        begin = segment * segment_steps
        end = tl.minimum(begin + segment_steps, num_steps)
    chunk = tl.arange(0, C)[:, None]

    if SUMMARY:
        carry = tl.zeros((1, F), A)
        decay = ones(1, F, A, PAIRS)
        any_reset = tl.zeros((1, 1), tl.int32)
    else:
        carry = tl.load(grad_last + batch * num_features + feature, there, other=0.0).to(A)
        earliest = tl.load(h + batch * h_batch + feature, there, other=0.0).to(A)
    start = tl.zeros((1, F), A)
    if initial_state is not None:
        start = tl.load(initial_state + batch * initial_batch + feature, there, other=0.0).to(A)
    to_initial = tl.zeros((C, F), A)
    sum0, sum1, sum2 = tl.zeros((C, F), A), tl.zeros((C, F), A), tl.zeros((C, F), A)
    if SEGMENTS and not SUMMARY:
        carry = carry_into(segment, carry, products, ends, batch * num_segments, num_features, feature, there, PAIRS)

    first_row = (backwards * (total - 1)).to(tl.int64)
    sign = 1 - 2 * backwards
    x_at, x_step = beginning(batch, x_batch, x_step, first_row, sign, V, PACKED)
    ALIGNMENT: tl.constexpr = V * (x0.dtype.element_ty.primitive_bitwidth // 8)
    x0 = tl.multiple_of(x0 + x_at, ALIGNMENT) + feature
    x1 = tl.multiple_of(x1 + x_at, ALIGNMENT) + feature
    if x2 is not None:
        x2 = tl.multiple_of(x2 + x_at, ALIGNMENT) + feature
    grad_out_at, grad_out_step = beginning(batch, grad_out_batch, grad_out_step, first_row, sign, V, PACKED)
    grad_out = tl.multiple_of(grad_out + grad_out_at, ALIGNMENT) + feature
    if HAS_RESET:
        reset_at, reset_step = beginning(batch, reset_batch, reset_step, first_row, sign, 1, PACKED)
        reset += reset_at
    if HAS_DT:
        dt_at, dt_step = beginning(batch, dt_batch, dt_step, first_row, sign, 1, PACKED)
        dt += dt_at
    if not SUMMARY:
        out_at, out_step = beginning(batch, out_batch, out_step, first_row, sign, V, PACKED)
        out = tl.multiple_of(out + out_at, ALIGNMENT) + feature
        grads_at, grads_step = beginning(batch, grads_batch, grads_step, first_row, sign, V, PACKED)
        grads = tl.multiple_of(grads + grads_at, ALIGNMENT) + feature

    keeping = KEEPING[0]
    if PAIRS:
        # The second feature of a pair is 0.
        keeping = tl.where(feature % 2 == 0, KEEPING[0], 0.0).to(x0.dtype.element_ty)
    for tile in tl.range(begin, end, C * T, num_stages=STAGES):
        first = (tile + chunk * T).to(tl.int64)
        inputs0, inputs1, inputs2, deltas, states, is_reset, moments, rows = (), (), (), (), (), (), (), ()
        if PACKED:
            # One more than the steps of a chunk, because the previous state is in the row of the next u.
            for t in tl.static_range(T + 1):
                u = tile + chunk * T + t
                time = tl.where(backwards != 0, total - 1 - u, u)
                rows += (tl.load(offsets + time, u < end, other=0) + batch,)
        for t in tl.static_range(T):
            u = tile + chunk * T + t
            here = u < end
            mask = here if EVEN else here & there
            at = address(first, t, rows, x_step, PACKED)
            inputs0 += (tl.load(x0 + at, mask, other=keeping).to(A),)
            inputs1 += (tl.load(x1 + at, mask, other=KEEPING[1]).to(A),)
            if x2 is not None:
                inputs2 += (tl.load(x2 + at, mask, other=KEEPING[2]).to(A),)
            else:
                inputs2 += (inputs1[t],)
            at = address(first, t, rows, grad_out_step, PACKED)
            deltas += (tl.load(grad_out + at, mask, other=0.0).to(A),)
            if not SUMMARY:
                # The state before the first step is not in `out`.
                at = address(first, t + 1, rows, out_step, PACKED)
                inside = here & (u < total - 1)
                states += (tl.load(out + at, inside if EVEN else inside & there, other=0.0).to(A),)
            if HAS_RESET:
                is_reset += (tl.load(reset + address(first, t, rows, reset_step, PACKED), here, other=0) != 0,)
            if TIMED:
                at = address(first, t, rows, dt_step, PACKED) if HAS_DT else 0
                moments += (time_of(dt, at, here, log_bound, log_bound_rest, log_range, log_range_rest, A),)
        a, grads0, grads1, grads2, grads_dt, grads_angle = (), (), (), (), (), ()
        product = ones(C, F, A, PAIRS)
        local = tl.zeros((C, F), A)
        seen = tl.zeros((C, 1), tl.int32)
        for t in tl.static_range(T):
            if SUMMARY:
                previous = local
            else:
                previous = tl.where(tile + chunk * T + t == total - 1, earliest, states[t])
                if HAS_RESET:
                    previous = tl.where(is_reset[t], start, previous)
            a_t, d0, d1, d2, d_dt, d_angle = gradients(
                inputs0[t], inputs1[t], inputs2[t], previous, moments[t] if TIMED else None, CELL, ACTIVATION, EXACT
            )
            a += (a_t,)
            grads0 += (d0,)
            grads1 += (d1,)
            grads2 += (d2,)
            grads_dt += (d_dt,)
            grads_angle += (d_angle,)
            if C > 1:
                local = times(a_t, deltas[t] + local, PAIRS)
                product = times(product, a_t, PAIRS)
                if HAS_RESET:
                    local = tl.where(is_reset[t], 0.0, local)
                    product = tl.where(is_reset[t], 0.0, product)
                    seen = tl.where(is_reset[t], 1, seen)
        if C > 1:
            before, carry, p = carries(
                a, deltas, is_reset, start, product, local, carry, C, T, HAS_RESET, True, MAY_GROW, PAIRS
            )
            if SUMMARY:
                decay = times(decay, row_of(p, chunk, C - 1), PAIRS)
                any_reset = any_reset | tl.max(seen, 0)[None, :]
        else:
            before = carry
        if not SUMMARY:
            for t in tl.static_range(T):
                here = (tile + chunk * T + t) < end
                mask = here if EVEN else here & there
                delta = deltas[t] + before
                at = address(first, t, rows, grads_step, PACKED)
                grad0, grad1 = delta * grads0[t], delta * grads1[t]
                if PAIRS:
                    grad0 = gradient_of_pairs(delta, grads0[t], grads2[t])
                tl.store(grads + at, grad0.to(grads.dtype.element_ty), mask)
                tl.store(grads + at + num_features, grad1.to(grads.dtype.element_ty), mask)
                if NUM_INPUTS > 2:
                    grad2 = delta * grads2[t]
                    tl.store(grads + at + 2 * num_features, grad2.to(grads.dtype.element_ty), mask)
                    if HAS_BIAS:
                        sum2 += grad2
                if grad_dt is not None:
                    for_dt = delta * grads_dt[t]
                    if PAIRS:
                        for_dt = gradient_of_pairs(delta, grads_dt[t], grads_angle[t])
                    for_dt = tl.sum(tl.reshape(for_dt, (C, F // V, V)), 2)
                    at = (dt_at + address(first, t, rows, dt_step, PACKED)) * num_units
                    tl.store(grad_dt + at + unit, for_dt, here & (unit < num_units))
                if HAS_BIAS:
                    sum0 += grad0
                    sum1 += grad1
                before = times(a[t], delta, PAIRS)
                if HAS_RESET:
                    if HAS_INITIAL:
                        to_initial += tl.where(is_reset[t], before, 0.0)
                    before = tl.where(is_reset[t], 0.0, before)
            if C == 1:
                carry = before

    if SUMMARY:
        at = (batch * num_segments + segment) * num_features + feature
        tl.store(products + at, tl.where(any_reset != 0, INFINITY, decay), there)
        tl.store(ends + at, carry, there)
    else:
        if HAS_INITIAL:
            tl.store(grad_initial_state + sum_row * num_features + feature, tl.sum(to_initial, 0)[None, :], there)
        if HAS_BIAS:
            at = sum_row * (NUM_INPUTS * num_features) + feature
            tl.store(grad_bias + at, tl.sum(sum0, 0)[None, :], there)
            tl.store(grad_bias + at + num_features, tl.sum(sum1, 0)[None, :], there)
            if NUM_INPUTS > 2:
                tl.store(grad_bias + at + 2 * num_features, tl.sum(sum2, 0)[None, :], there)
        is_last = True
        if SEGMENTS:
            is_last = segment == num_segments - 1
        if is_last:
            tl.store(grad_h + batch * num_features + feature, carry.to(grad_h.dtype.element_ty), there)
