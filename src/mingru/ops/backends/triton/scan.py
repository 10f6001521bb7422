"""Numbers, real or complex, and the combination of the chunks of a tile; see `cells` and `kernels`."""

import triton
import triton.language as tl

from .math import INFINITY, minus

# If V > 1, a pair is in one thread, so that taking pairs apart and joining them moves no data.


@triton.jit
def number(x, PAIRS: tl.constexpr):
    """Return features (C, F) as a number; complex numbers are pairs of features, 2 j and 2 j + 1."""
    if PAIRS:
        return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    else:
        return (x,)


@triton.jit
def features(x):
    """Return a number as features (C, F)."""
    if len(x) == 1:
        return x[0]
    else:
        return tl.interleave(x[0], x[1])


@triton.jit
def plus_times(c, a, b):
    """Return c + a b."""
    if len(a) == 1:
        return (tl.math.fma(a[0], b[0], c[0]),)
    else:
        real, imaginary = tl.math.fma(a[0], b[0], c[0]), tl.math.fma(a[0], b[1], c[1])
        return tl.math.fma(minus(a[1]), b[1], real), tl.math.fma(a[1], b[0], imaginary)


@triton.jit
def times(a, b):
    """Return a b. If b is complex, a may be real or imaginary; see `cells`."""
    if len(b) == 1:
        return (a[0] * b[0],)
    elif len(a) == 1:
        return a[0] * b[0], a[0] * b[1]
    elif len(a) == 3:
        return minus(a[0] * b[1]), a[0] * b[0]
    else:
        return a[0] * b[0] - a[1] * b[1], a[1] * b[0] + a[0] * b[1]


@triton.jit
def plus(a, b):
    if len(a) == 1:
        return (a[0] + b[0],)
    else:
        return a[0] + b[0], a[1] + b[1]


@triton.jit
def where(condition, a, b):
    if len(a) == 1:
        return (tl.where(condition, a[0], b[0]),)
    else:
        return tl.where(condition, a[0], b[0]), tl.where(condition, a[1], b[1])


@triton.jit
def conjugate(a):
    if len(a) == 1:
        return a
    else:
        return a[0], minus(a[1])


@triton.jit
def broadcast(a, shape):
    if len(a) == 1:
        return (tl.broadcast_to(a[0], shape),)
    else:
        return tl.broadcast_to(a[0], shape), tl.broadcast_to(a[1], shape)


@triton.jit
def constant(like, VALUE: tl.constexpr):
    """Return a real constant as a number."""
    real = tl.full(like[0].shape, VALUE, like[0].dtype)
    if len(like) == 1:
        return (real,)
    else:
        return real, tl.zeros(like[0].shape, like[0].dtype)


@triton.jit
def change(derivative, previous):
    """Return the derivative of a state by a real number, and a scale as in `cells`."""
    da, db, scale = derivative
    if len(da) == 0:
        change = db
    elif len(db) == 0:
        change = times(da, previous)
    else:
        change = plus_times(db, da, previous)
    # Of a complex number, the gradient is scaled instead, which has one part.
    if len(scale) > 0 and len(previous) == 1:
        return (change[0] * scale[0],), ()
    else:
        return change, scale


@triton.jit
def changes_of(derivatives, previous):
    changes = ()
    if len(previous) > 0:
        for k in tl.static_range(len(derivatives)):
            changes += (change(derivatives[k], previous),)
    return changes


@triton.jit
def gradient(delta, change, scale):
    """Return the gradient of a real number, from that of the state and the result of `change`."""
    if len(change) == 0:
        return tl.zeros(delta[0].shape, delta[0].dtype)
    elif len(change) == 1:
        return delta[0] * change[0]
    elif len(change) == 3:
        return delta[1] * change[0]
    else:
        gradient = delta[0] * change[0] + delta[1] * change[1]
        return gradient * scale[0] if len(scale) > 0 else gradient


@triton.jit
def gradients(delta, changes):
    """Return the gradients of the inputs and, last, of the elapsed time, as features."""
    found = ()
    if len(delta) == 1:
        for k in tl.static_range(len(changes)):
            found += (gradient(delta, *changes[k]),)
    else:
        for k in tl.static_range(len(changes) // 2):
            found += (tl.interleave(gradient(delta, *changes[2 * k]), gradient(delta, *changes[2 * k + 1])),)
        if len(changes) % 2 == 1:
            by_time = gradient(delta, *changes[len(changes) - 1])
            found += (tl.interleave(by_time, tl.zeros(by_time.shape, by_time.dtype)),)
    return found


@triton.jit
def step(state, a, b, reset, start):
    """Return the state after a step; `reset` is None or a mask. If `start` is None, return the carry of the backward
    pass, which a reset sets to 0 after the step."""
    if start is not None:
        if reset is not None:
            state = where(reset, start, state)
        return plus_times(b, a, state)
    else:
        state = times(a, plus(b, state))
        if reset is not None:
            state = where(reset, constant(state, 0.0), state)
        return state


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
def combined(p, l):
    """Return the maps h -> p h + l from the first chunk to each chunk, and to the chunk before it."""
    one, zero = constant(p, 1.0), constant(p, 0.0)
    if len(p) == 1:
        p, l, p_before, l_before = tl.associative_scan(p + l + one + zero, 0, then)
        return (p,), (l,), (p_before,), (l_before,)
    else:
        p0, p1, l0, l1, p0_before, p1_before, l0_before, l1_before = tl.associative_scan(
            p + l + one + zero, 0, then_pairs
        )
        return (p0, p1), (l0, l1), (p0_before, p1_before), (l0_before, l1_before)


@triton.jit
def row(x, CHUNK):
    """Return one chunk of a part (C, F), as (1, F)."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0])[:, None] == CHUNK, x, 0.0), 0)[None, :]


@triton.jit
def chunk_of(x, CHUNK):
    if len(x) == 1:
        return (row(x[0], CHUNK),)
    else:
        return row(x[0], CHUNK), row(x[1], CHUNK)


@triton.jit
def is_any(condition):
    """Return whether the condition (R, F) is true anywhere."""
    return tl.max(tl.max(condition.to(tl.int32), 1), 0) != 0


@triton.jit
def carries(a, b, resets, start, state, MAY_GROW: tl.constexpr):
    """Return the state before each chunk (C, F), the state after the last one and the decay of all chunks (1, F).

    a, b and `resets` have a value for each step of a chunk; without resets, `resets` is empty. The state before the
    first chunk is `state` (1, F). If `start` is None, the states are the carries of the backward pass.
    """
    p, l = constant(a[0], 1.0), constant(a[0], 0.0)
    for t in tl.static_range(len(a)):
        reset = resets[t] if len(resets) > 0 else None
        l = step(l, a[t], b[t], reset, start)
        p = times(p, a[t])
        if reset is not None:
            p = where(reset, constant(p, 0.0), p)
    p, l, p_before, l_before = combined(p, l)
    from_state = broadcast(state, p[0].shape)
    before = plus_times(l_before, p_before, from_state)
    last = chunk_of(plus_times(l, p, from_state), p[0].shape[0] - 1)
    # A product may underflow or be 0 because of a reset, and 0 times an infinite state is NaN; or it may overflow if
    # |a| > 1. Then the chunks are computed one after the other. NaN stays until the last chunk.
    wrong = is_any(features(last) != features(last))
    if MAY_GROW:
        wrong = wrong | is_any((tl.abs(features(p)) < INFINITY).to(tl.int32) == 0)
    if wrong:
        last = state
        for chunk in range(p[0].shape[0]):
            here = tl.arange(0, p[0].shape[0])[:, None] == chunk
            before = where(here, broadcast(last, p[0].shape), before)
            h = broadcast(last, p[0].shape)
            for t in tl.static_range(len(a)):
                h = step(h, a[t], b[t], resets[t] if len(resets) > 0 else None, start)
            last = chunk_of(h, chunk)
    return before, last, chunk_of(p, p[0].shape[0] - 1)
