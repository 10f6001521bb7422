"""Functions of one number, for the Triton kernels.

If EXACT, their error in float32 is about that of a rounding; otherwise the inputs have fewer digits.
"""

import triton
import triton.language as tl

# log2(e) in float32, and the rest of it.
LOG2E = tl.constexpr(1.4426950216293335)
LOG2E_REST = tl.constexpr(1.9259629911266175e-08)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
# Adding such a number rounds to an integer, which is in the low bits of the sum.
ROUNDER_32 = tl.constexpr(12582912.0)
ROUNDER_64 = tl.constexpr(6755399441055744.0)
NAN_STAYS = tl.constexpr(tl.PropagateNan.ALL)
# A part of a number that is not there; a scalar of int1 after a function returned it. Triton 3.6 returns no tuple with
# None, and it does not distinguish plus_times(x, (), y) from plus_times((), x, y): it calls the one compiled first.
ABSENT = tl.constexpr(False)


@triton.constexpr_function
def is_there(x):
    """Return whether a part of a number, or a condition, is neither ABSENT nor ()."""
    return isinstance(x, tl.tensor) and x.type != tl.int1


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
def tangent(x, double, EXACT: tl.constexpr):
    """Return tanh(x), 1 - tanh(x) and 1 - tanh(x)^2 for x >= 0, all in full relative precision; `double` is 2x."""
    p = power(double, -1, EXACT)
    inverse = reciprocal(1.0 + p, EXACT)
    near = double < 0.7
    # Far from 0, the function is not used, but its operations must not fail.
    small = tanh_near_0(tl.where(near, x, 0.0), tl.where(near, double, 0.0))
    half = p * inverse
    return tl.where(near, small, (1.0 - p) * inverse), 2.0 * half, 4.0 * (half * inverse)


@triton.jit
def hyperbolic_tangent(x, EXACT: tl.constexpr):
    """Return tanh(x) and its derivative."""
    size, _, slope = tangent(tl.abs(x), 2.0 * tl.abs(x), EXACT)
    return tl.where(x < 0, minus(size), size), slope


@triton.jit
def log1p_of_unit(q):
    """Return log(1 + q) for q from 0 to 1, in full relative precision; see csrc/math.h."""
    if q.dtype == tl.float64:
        # The rounding errors of 1 + q cancel.
        added = (1.0 + q) - 1.0
        return tl.where(added == 0.0, q, tl.log(1.0 + q) * (q / tl.where(added == 0.0, 1.0, added)))
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
def remainder(x, UNIT: tl.constexpr):
    """Return x minus a multiple of a power of two, without rounding; see csrc/math.h."""
    ROUNDER: tl.constexpr = ROUNDER_64 if x.dtype == tl.float64 else ROUNDER_32
    return x - ((x * (1.0 / UNIT) + ROUNDER) - ROUNDER) * UNIT


@triton.jit
def direction(x):
    """Return cos(pi x) and sin(pi x); see csrc/math.h."""
    INTEGER: tl.constexpr = tl.int64 if x.dtype == tl.float64 else tl.int32
    BITS: tl.constexpr = 64 if x.dtype == tl.float64 else 32
    ROUNDER: tl.constexpr = ROUNDER_64 if x.dtype == tl.float64 else ROUNDER_32
    # First many turns, because the number of quarter turns of a large x would be rounded.
    x = remainder(x, 256.0)
    shifted = 2.0 * x + ROUNDER
    r = x - 0.5 * (shifted - ROUNDER)
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


@triton.jit
def direction_of_product(x, y):
    """Return cos(pi x y) and sin(pi x y). Whole turns are subtracted before the product is rounded."""
    product = x * y
    rest = tl.math.fma(x, y, minus(product))
    return direction(remainder(product, 2.0) + rest)
