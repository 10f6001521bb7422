"""Numbers, real or complex, and the combination of the chunks of a tile; see `cells` and `kernels`.

A number is a tuple (real, imaginary). A part that is always 0 is ABSENT, and takes no instructions.
"""

import triton
import triton.language as tl

from .math import ABSENT, INFINITY, NAN_STAYS, is_there, minus

# If V > 1, a pair is in one thread, so that taking pairs apart and joining them moves no data.


@triton.jit
def number(x, PAIRS: tl.constexpr):
    """Return features (C, F) as a number; complex numbers are pairs of features, 2 j and 2 j + 1."""
    if PAIRS:
        return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    else:
        return x, ABSENT


@triton.jit
def features(x):
    """Return a number as features (C, F)."""
    return tl.interleave(x[0], x[1]) if is_there(x[1]) else x[0]


@triton.jit
def plus_product(c, x, y):
    """Return c + x y of parts."""
    if is_there(x) and is_there(y):
        return tl.math.fma(x, y, c) if is_there(c) else x * y
    else:
        return c


@triton.jit
def plus_times(c, a, b):
    """Return c + a b."""
    real = plus_product(c[0], a[0], b[0])
    if is_there(a[1]):
        real = plus_product(real, minus(a[1]), b[1])
    return real, plus_product(plus_product(c[1], a[0], b[1]), a[1], b[0])


@triton.jit
def times(a, b):
    return plus_times((ABSENT, ABSENT), a, b)


@triton.jit
def plus(a, b):
    return a[0] + b[0], a[1] + b[1] if is_there(a[1]) else ABSENT


@triton.jit
def where(condition, a, b):
    """Return a where the condition is true, otherwise b. A condition that is never true is ()."""
    if is_there(condition):
        return tl.where(condition, a[0], b[0]), tl.where(condition, a[1], b[1]) if is_there(a[1]) else ABSENT
    else:
        return b


@triton.jit
def conjugate(a):
    return a[0], minus(a[1]) if is_there(a[1]) else ABSENT


@triton.jit
def constant(like, VALUE: tl.constexpr):
    """Return a real constant as a number."""
    real = tl.full(like[0].shape, VALUE, like[0].dtype)
    return real, tl.zeros(like[0].shape, like[0].dtype) if is_there(like[1]) else ABSENT


@triton.jit
def changes_of(derivatives, previous):
    """Return the derivatives of a state by real numbers, each with a scale as in `cells`."""
    changes = ()
    for k in tl.static_range(len(derivatives)):
        da, db, scale = derivatives[k]
        change = plus_times(db, da, previous)
        # Of a complex number, the gradient is scaled instead, which has one part.
        if is_there(scale) and not is_there(previous[1]):
            changes += (((change[0] * scale, ABSENT), ABSENT),)
        else:
            changes += ((change, scale),)
    return changes


@triton.jit
def gradient(delta, change, scale):
    """Return the gradient of a real number, from that of the state and the result of `changes_of`."""
    gradient = plus_product(plus_product(ABSENT, delta[0], change[0]), delta[1], change[1])
    if is_there(gradient):
        return gradient * scale if is_there(scale) else gradient
    else:
        return tl.zeros(delta[0].shape, delta[0].dtype)


@triton.jit
def gradients(delta, changes):
    """Return the gradients of the inputs and, last, of the elapsed time, as features."""
    found = ()
    PARTS: tl.constexpr = 2 if is_there(delta[1]) else 1
    for k in tl.static_range(len(changes) // PARTS):
        real = gradient(delta, *changes[PARTS * k])
        imaginary = gradient(delta, *changes[PARTS * k + 1]) if PARTS == 2 else ABSENT
        found += (features((real, imaginary)),)
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
    return times(p, P) + plus_times((L0, L1), P, l) + times(p, Q) + plus_times((M0, M1), Q, l)


@triton.jit
def combined(p, l):
    """Return the maps h -> p h + l from the first chunk to each chunk, and to the chunk before it."""
    one, zero = constant(p, 1.0), constant(p, 0.0)
    if is_there(p[1]):
        p0, p1, l0, l1, q0, q1, m0, m1 = tl.associative_scan(p + l + one + zero, 0, then_pairs)
        return (p0, p1), (l0, l1), (q0, q1), (m0, m1)
    else:
        p, l, q, m = tl.associative_scan((p[0], l[0], one[0], zero[0]), 0, then)
        return (p, ABSENT), (l, ABSENT), (q, ABSENT), (m, ABSENT)


@triton.jit
def row(x, CHUNK):
    """Return one chunk of a part (C, F), as (1, F)."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0])[:, None] == CHUNK, x, 0.0), 0)[None, :]


@triton.jit
def chunk_of(x, CHUNK):
    return row(x[0], CHUNK), row(x[1], CHUNK) if is_there(x[1]) else ABSENT


@triton.jit
def either(x, y):
    return x | y


@triton.jit
def carries(a, b, resets, start, state, MAY_GROW: tl.constexpr):
    """Return the state before each chunk (C, F), the state after the last one and the decay of all chunks (1, F).

    a, b and `resets` have a value for each step of a chunk; without resets, it is (). The state before the first
    chunk is `state` (1, F). If `start` is None, the states are the carries of the backward pass.
    """
    p, l = constant(a[0], 1.0), constant(a[0], 0.0)
    for t in tl.static_range(len(a)):
        l = step(l, a[t], b[t], resets[t], start)
        p = times(p, a[t])
        p = where(resets[t], constant(p, 0.0), p)
    p, l, p_before, l_before = combined(p, l)
    before = plus_times(l_before, p_before, state)
    last = chunk_of(plus_times(l, p, state), p[0].shape[0] - 1)
    # A product may underflow or be 0 because of a reset, and 0 times an infinite state is NaN. If |a| > 1, a product
    # may overflow, or underflow before it grows again. Then the chunks are computed one after the other. NaN stays
    # until the last chunk.
    whole = last[0] + last[1] if is_there(last[1]) else last[0]
    flags = (whole != whole).to(tl.int32)
    if MAY_GROW:
        SMALLEST: tl.constexpr = 2.2250738585072014e-308 if whole.dtype == tl.float64 else 1.1754943508222875e-38
        size, largest = tl.abs(p[0]), tl.zeros(p[0].shape, whole.dtype)
        if is_there(p[1]):
            size = tl.maximum(size, tl.abs(p[1]), propagate_nan=NAN_STAYS)
        for t in tl.static_range(len(a)):
            # |a|^2 of complex numbers.
            a0, a1 = a[t]
            largest = tl.maximum(largest, plus_product(a0 * a0, a1, a1) if is_there(a1) else tl.abs(a0))
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
            for t in tl.static_range(len(a)):
                h = step(h, a[t], b[t], resets[t], start)
            last = chunk_of(h, chunk)
    return before, last, chunk_of(p, p[0].shape[0] - 1)
