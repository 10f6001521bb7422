"""Numbers, and the combination of the chunks of a tile; see `cells` and `kernels`.

A number is a tuple of 2 parts, or of 4 for quaternions. A part that is always 0 is ABSENT, and takes no instructions.
That is the second part of a real number.
"""

import triton
import triton.language as tl

from .math import ABSENT, INFINITY, NAN_STAYS, is_there, minus

# If V > 1, a number is in one thread, so that taking numbers apart and joining them moves no data.


@triton.constexpr_function
def parts_in(x):
    """Return the number of parts of a number: 1, 2 or 4."""
    return len(x) if is_there(x[1]) else 1


@triton.jit
def number(x, PARTS: tl.constexpr):
    """Return features (C, F) as a number, whose parts are neighboring features."""
    if PARTS == 1:
        return x, ABSENT
    elif PARTS == 2:
        return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    else:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth


@triton.jit
def features(x):
    """Return a number as features (C, F)."""
    PARTS: tl.constexpr = parts_in(x)
    if PARTS == 1:
        return x[0]
    elif PARTS == 2:
        return tl.interleave(x[0], x[1])
    else:
        return tl.interleave(tl.interleave(x[0], x[2]), tl.interleave(x[1], x[3]))


@triton.jit
def plus_product(c, x, y):
    """Return c + x y of parts."""
    if is_there(x) and is_there(y):
        return tl.math.fma(x, y, c) if is_there(c) else x * y
    else:
        return c


@triton.jit
def minus_product(c, x, y):
    """Return c - x y of parts."""
    return plus_product(c, minus(x), y) if is_there(x) else c


@triton.jit
def plus_times(c, a, b):
    """Return c + a b. Products of quaternions depend on the order."""
    real = minus_product(plus_product(c[0], a[0], b[0]), a[1], b[1])
    second = plus_product(plus_product(c[1], a[0], b[1]), a[1], b[0])
    if len(a) == 2:
        return real, second
    else:
        real = minus_product(minus_product(real, a[2], b[2]), a[3], b[3])
        second = minus_product(plus_product(second, a[2], b[3]), a[3], b[2])
        third = minus_product(plus_product(c[2], a[0], b[2]), a[1], b[3])
        third = plus_product(plus_product(third, a[2], b[0]), a[3], b[1])
        fourth = plus_product(plus_product(c[3], a[0], b[3]), a[1], b[2])
        fourth = plus_product(minus_product(fourth, a[2], b[1]), a[3], b[0])
        return real, second, third, fourth


@triton.jit
def times(a, b):
    return plus_times((ABSENT,) * len(a), a, b)


@triton.jit
def plus(a, b):
    total = ()
    for k in tl.static_range(len(a)):
        total += (a[k] + b[k] if is_there(a[k]) else ABSENT,)
    return total


@triton.jit
def where(condition, a, b):
    """Return a where the condition is true, otherwise b. A condition that is never true is ()."""
    if is_there(condition):
        chosen = ()
        for k in tl.static_range(len(a)):
            chosen += (tl.where(condition, a[k], b[k]) if is_there(a[k]) else ABSENT,)
        return chosen
    else:
        return b


@triton.jit
def conjugate(a):
    parts = (a[0],)
    for k in tl.static_range(1, len(a)):
        parts += (minus(a[k]) if is_there(a[k]) else ABSENT,)
    return parts


@triton.jit
def constant(like, VALUE: tl.constexpr):
    """Return a real constant as a number."""
    parts = (tl.full(like[0].shape, VALUE, like[0].dtype),)
    for k in tl.static_range(1, len(like)):
        parts += (tl.zeros(like[0].shape, like[0].dtype) if is_there(like[k]) else ABSENT,)
    return parts


@triton.jit
def changes_of(derivatives, previous):
    """Return the derivatives of a state by real numbers, each with a scale as in `cells`."""
    changes = ()
    for k in tl.static_range(len(derivatives)):
        da, db, scale = derivatives[k]
        change = plus_times(db, da, previous)
        # Of a number with several parts, the gradient is scaled instead, which has one part.
        if is_there(scale) and not is_there(previous[1]):
            changes += (((change[0] * scale, ABSENT), ABSENT),)
        else:
            changes += ((change, scale),)
    return changes


@triton.jit
def gradient(delta, change, scale):
    """Return the gradient of a real number, from that of the state and the result of `changes_of`."""
    gradient = ABSENT
    for k in tl.static_range(len(delta)):
        gradient = plus_product(gradient, delta[k], change[k])
    if is_there(gradient):
        return gradient * scale if is_there(scale) else gradient
    else:
        return tl.zeros(delta[0].shape, delta[0].dtype)


@triton.jit
def gradients(delta, changes):
    """Return the gradients of the inputs and, last, of the elapsed time, as features."""
    found = ()
    PARTS: tl.constexpr = parts_in(delta)
    for k in tl.static_range(len(changes) // PARTS):
        parts = ()
        for part in tl.static_range(PARTS):
            parts += (gradient(delta, *changes[PARTS * k + part]),)
        found += (features(parts if PARTS > 1 else (parts[0], ABSENT)),)
    return found


@triton.jit
def step(state, a, b, reset, start):
    """Return the state after a step; `reset` is a mask or (). If `start` is None, return the carry of the backward
    pass, which a reset sets to 0 after the step."""
    if start is not None:
        return plus_times(b, a, where(reset, start, state))
    else:
        state = times(a, plus(b, state))
        return where(reset, constant(state, 0.0), state)


# Maps h -> p h + l of neighboring chunks are combined; capitals belong to the second one. q and m are the map without
# the last chunk, because shifting the result by one chunk would exchange data between threads.


@triton.jit
def then(p, l, q, m, P, L, Q, M):
    return p * P, P * l + L, p * Q, Q * l + M


@triton.jit
def then_pairs(p0, p1, l0, l1, q0, q1, m0, m1, P0, P1, L0, L1, Q0, Q1, M0, M1):
    """Combine maps of complex numbers. 0 marks the real part, and 1 the imaginary part."""
    p, l, P, Q = (p0, p1), (l0, l1), (P0, P1), (Q0, Q1)
    return times(P, p) + plus_times((L0, L1), P, l) + times(Q, p) + plus_times((M0, M1), Q, l)


@triton.jit
def then_fours(
    p0, p1, p2, p3, l0, l1, l2, l3, q0, q1, q2, q3, m0, m1, m2, m3, P0, P1, P2, P3, L0, L1, L2, L3, Q0, Q1, Q2, Q3,
    M0, M1, M2, M3,
):  # fmt: skip
    """Combine maps of quaternions."""
    p, l, P, Q = (p0, p1, p2, p3), (l0, l1, l2, l3), (P0, P1, P2, P3), (Q0, Q1, Q2, Q3)
    return times(P, p) + plus_times((L0, L1, L2, L3), P, l) + times(Q, p) + plus_times((M0, M1, M2, M3), Q, l)


@triton.jit
def combined(p, l):
    """Return the maps h -> p h + l from the first chunk to each chunk, and to the chunk before it."""
    one, zero = constant(p, 1.0), constant(p, 0.0)
    PARTS: tl.constexpr = parts_in(p)
    if PARTS > 1:
        maps = tl.associative_scan(p + l + one + zero, 0, then_fours if PARTS == 4 else then_pairs)
        return maps[:PARTS], maps[PARTS : 2 * PARTS], maps[2 * PARTS : 3 * PARTS], maps[3 * PARTS :]
    else:
        p, l, q, m = tl.associative_scan((p[0], l[0], one[0], zero[0]), 0, then)
        return (p, ABSENT), (l, ABSENT), (q, ABSENT), (m, ABSENT)


@triton.jit
def row(x, CHUNK):
    """Return one chunk of a part (C, F), as (1, F)."""
    # A sum of the bits, because adding 0.0 would lose the sign of -0.0.
    bits = x.to(tl.int64 if x.dtype == tl.float64 else tl.int32, bitcast=True)
    return tl.sum(tl.where(tl.arange(0, x.shape[0])[:, None] == CHUNK, bits, 0), 0)[None, :].to(x.dtype, bitcast=True)


@triton.jit
def chunk_of(x, CHUNK):
    parts = ()
    for k in tl.static_range(len(x)):
        parts += (row(x[k], CHUNK) if is_there(x[k]) else ABSENT,)
    return parts


@triton.jit
def either(x, y):
    return x | y


@triton.jit
def carries(maps, resets, start, state, MAY_GROW: tl.constexpr):
    """Return the state before each chunk (C, F), and the state after the last one (1, F).

    `maps` has a and b, and `resets` a mask or (), of each step of a chunk. The state before the first chunk is `state`
    (1, F). If `start` is None, the states are the carries of the backward pass.
    """
    p, l = constant(maps[0][0], 1.0), constant(maps[0][0], 0.0)
    for t in tl.static_range(len(maps)):
        l = step(l, maps[t][0], maps[t][1], resets[t], start)
        p = times(maps[t][0], p)
        p = where(resets[t], constant(p, 0.0), p)
    p, l, p_before, l_before = combined(p, l)
    before = plus_times(l_before, p_before, state)
    last = chunk_of(plus_times(l, p, state), p[0].shape[0] - 1)
    # A product may underflow or be 0 because of a reset, and 0 times an infinite state is NaN. If |a| > 1, a product
    # may overflow, or underflow before it grows again. Then the chunks are computed one after the other. NaN stays
    # until the last chunk.
    whole = last[0]
    for k in tl.static_range(1, parts_in(last)):
        whole += last[k]
    flags = (whole != whole).to(tl.int32)
    if MAY_GROW:
        SMALLEST: tl.constexpr = 2.2250738585072014e-308 if whole.dtype == tl.float64 else 1.1754943508222875e-38
        size, largest = tl.abs(p[0]), tl.zeros(p[0].shape, whole.dtype)
        for k in tl.static_range(1, parts_in(p)):
            size = tl.maximum(size, tl.abs(p[k]), propagate_nan=NAN_STAYS)
        for t in tl.static_range(len(maps)):
            # Or |a|^2, which also exceeds 1 if |a| does.
            a = maps[t][0]
            of_a = tl.abs(a[0])
            if parts_in(p) > 1:
                of_a = of_a * of_a
                for k in tl.static_range(1, len(p)):
                    of_a = plus_product(of_a, a[k], a[k])
            largest = tl.maximum(largest, of_a)
        is_finite, is_small, grows = size < INFINITY, size < SMALLEST, largest > 1.0
        flags = flags | (is_finite.to(tl.int32) ^ 1) | is_small.to(tl.int32) << 1 | grows.to(tl.int32) << 2
    flags = tl.reduce(tl.reduce(flags, 1, either), 0, either)
    wrong = flags != 0
    if MAY_GROW:
        wrong = (flags & 1 != 0) | (flags & 6 == 6)
    if wrong:
        last = state
        for chunk in range(p[0].shape[0]):
            here = tl.arange(0, p[0].shape[0])[:, None] == chunk
            before = where(here, last, before)
            h = last
            for t in tl.static_range(len(maps)):
                h = step(h, maps[t][0], maps[t][1], resets[t], start)
            last = chunk_of(h, chunk)
    return before, last
