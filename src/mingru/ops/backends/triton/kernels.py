"""The Triton kernel of the recurrences. Only `launch.py` imports this module, and only on use.

A program computes F neighboring features of one sequence. It walks over time in tiles of C chunks of T steps:

    C = 1   One step after the other. For many sequences and features.
    C > 1   Every chunk is computed from a state of 0, all chunks in parallel. `associative_scan` combines them to the
            state before each chunk. Then each chunk is computed again, from that state.

The inputs of a tile are read once, and its states are written once. If there are few programs, time is also divided
into segments, and both of two launches walk: each chunk is a part of a segment. The first launch computes only the
decay and the last state of each chunk, and combines those of a segment. The second one computes the states, from the
state before each chunk. Everything is computed in a fixed order, without atomics.

Time is counted in the order of the scan; u is the step in that order. For `backwards`, a step u is the row
num_steps - 1 - u. The backward pass is a scan in the opposite direction. The row of a packed step comes from a table.

A sequence is a tuple: its memory, and its strides of batch and time. These strides and `num_units` count units of V
features, and the kernel multiplies them by V. That tells the compiler how addresses are aligned, so that accesses have
16 bytes whenever the number of features allows them. All memory is read before any is written in a tile, because the
compiler moves no load over a store.
"""

from collections import namedtuple
from inspect import signature

import triton
import triton.language as tl

from ...cells import parts_of
from .cells import cell
from .math import INFINITY, is_there
from .scan import (
    carries,
    changes_of,
    combined,
    conjugate,
    constant,
    features,
    gradients,
    number,
    parts_in,
    plus,
    row,
    step,
    times,
    where,
)

parts_of_cell = triton.constexpr_function(parts_of)


# What a program computes: the features (1, F) of a sequence, or of a segment of it. `part` counts segments of all
# sequences; `segment` and `summaries`, the index of the first summary of the sequence, are () if there is one segment.
# `unit` (1, F / V) counts groups of V features, and `there` tells which features there are.
Place = namedtuple("Place", "batch segment part summaries feature there unit num_features num_units")
# Its steps, from `begin` to `end` of a sequence of `total` steps. Padding follows, until `padded_end`.
Span = namedtuple("Span", "begin end padded_end total")
# What is read of each step, each () if it is not there; the first input of a step that is not there, which keeps the
# state; and the states before the first step and after a reset.
Given = namedtuple("Given", "inputs keeping reset dt bound grad_out out earliest start")
# The first step of each chunk (C, 1), its index or the rows of packed steps, the end of the steps and of the sequence,
# and the features that are there, or True if all are.
Tile = namedtuple("Tile", "u first rows end total there")


@triton.jit
def place_of(num_units, num_segments, C: tl.constexpr, F: tl.constexpr, V: tl.constexpr, SEGMENTS: tl.constexpr):
    num_features = num_units * V
    num_blocks = tl.cdiv(num_features, F)
    program = tl.program_id(0)
    part = (program // num_blocks).to(tl.int64)
    block = program % num_blocks
    feature = block * F + tl.arange(0, F)[None, :]
    unit = block * (F // V) + tl.arange(0, F // V)[None, :]
    batch, segment, summaries = part, (), ()
    if SEGMENTS:
        batch, segment = part // num_segments, (part % num_segments).to(tl.int32)
        summaries = batch * num_segments * C * num_features + feature
    return Place(batch, segment, part, summaries, feature, feature < num_features, unit, num_features, num_units)


@triton.jit
def span_of(place, num_steps, segment_steps, lengths):
    begin, end, total = 0, num_steps, num_steps
    if is_there(place.segment):
        begin = place.segment * segment_steps
        end = tl.minimum(begin + segment_steps, num_steps)
    padded_end = end
    if is_there(lengths):
        total = tl.minimum(tl.maximum(tl.load(lengths + place.batch), 0), num_steps).to(tl.int32)
        end = tl.minimum(end, total)
    return Span(begin, end, padded_end, total)


@triton.jit
def begin(sequence, origin, feature, V: tl.constexpr):
    """Return a sequence from its first step in the order of the scan, and the stride to the next step, in elements."""
    if len(sequence) == 0:
        return ()
    else:
        x, batch_stride, step = sequence
        batch, first_row, sign = origin
        step = step.to(tl.int64) * V
        # `multiple_of` promises the alignment in bytes, on scalars, because the compiler loses it on other addresses.
        ALIGNMENT: tl.constexpr = V * (x.dtype.element_ty.primitive_bitwidth // 8)
        offset = batch * batch_stride * V + first_row * step
        return tl.multiple_of(x + offset, ALIGNMENT) + feature, step * sign


@triton.jit
def begin_all(inputs, sequences, origin, feature, V: tl.constexpr):
    """Return the inputs, and out, grad_out, reset and dt, from their first step."""
    out, grad_out, reset, dt = sequences
    strides, xs = inputs[0][1:], ()
    for k in tl.static_range(len(inputs)):
        # Of an input that is only memory, the strides are those of the one before it.
        if len(inputs[k]) > 1:
            strides = inputs[k][1:]
        xs += (begin((inputs[k][0], strides[0], strides[1]), origin, feature, V),)
    of_features = begin(out, origin, feature, V), begin(grad_out, origin, feature, V)
    return xs, of_features[0], of_features[1], begin(reset, origin, 0, 1), begin(dt, origin, 0, 1)


@triton.jit
def load_number(x, there, zero, other=0.0):
    return number(tl.load(x, there, other=other).to(zero[0].dtype), parts_in(zero))


@triton.jit
def load_state(h, place, zero):
    return zero if len(h) == 0 else load_number(h[0] + place.batch * h[1] + place.feature, place.there, zero)


@triton.jit
def rows_of(u, offsets, backwards, place, total, COUNT: tl.constexpr):
    """Return the rows of packed steps."""
    rows = ()
    if is_there(offsets):
        for t in tl.static_range(COUNT):
            time = tl.where(backwards != 0, total - 1 - (u + t), u + t)
            rows += (tl.load(offsets + time, u + t < total, other=0) + place.batch,)
    return rows


@triton.jit
def at(sequence, tile, t):
    """Return the addresses of step t of each chunk (C, 1)."""
    x, step = sequence
    return x + (tile.rows[t] * step if len(tile.rows) > 0 else tile.first * step + t * step)


@triton.jit
def time_of(elapsed, bound, zero):
    """Return the `time` of a step of each chunk, as the cells take it."""
    if not is_there(elapsed) and len(bound) == 0:
        return ()
    else:
        one = tl.full((1, 1), 1.0, zero[0].dtype)
        elapsed = elapsed.to(zero[0].dtype) if is_there(elapsed) else one
        return (elapsed,) if len(bound) == 0 else (elapsed, one * bound[0] + bound[1], one * bound[2] + bound[3])


@triton.jit
def load_tile(given, tile, zero, KEEPING: tl.constexpr, T: tl.constexpr):
    """Return for each step of a chunk what `coefficients` takes, and the mask of its resets or ()."""
    steps, resets = (), ()
    for t in tl.static_range(T):
        u, x = tile.u + t, ()
        here = u < tile.end
        mask = here & tile.there
        for k in tl.static_range(len(given.inputs)):
            other = given.keeping if k == 0 else KEEPING[k]
            x += (load_number(at(given.inputs[k], tile, t), mask, zero, other),)
        # Not None, because Triton 3.6 compiles no tuple that has it.
        reset = () if len(given.reset) == 0 else tl.load(at(given.reset, tile, t), here, other=0) != 0
        # Steps that are not there have a time of 0.
        elapsed = () if len(given.dt) == 0 else tl.load(at(given.dt, tile, t), here, other=0.0)
        delta = () if len(given.grad_out) == 0 else load_number(at(given.grad_out, tile, t), mask, zero)
        previous = ()
        if len(given.out) > 0:
            # The state before the first step is not in `out`.
            inside = (u < tl.minimum(tile.end, tile.total - 1)) & tile.there
            previous = load_number(at(given.out, tile, t + 1), inside, zero)
            previous = where(reset, given.start, where(u == tile.total - 1, given.earliest, previous))
        steps += ((x, time_of(elapsed, given.bound, zero), delta, previous),)
        resets += (reset,)
    return steps, resets


@triton.jit
def coefficients(x, time, delta, previous, CELL: tl.constexpr, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Return a and b of a step of the scan, and the derivatives of its state.

    In the backward pass, `delta` is the gradient of the state, and `previous` the state before the step. `delta` is ()
    in the forward pass, and `previous` if the derivatives are not needed.
    """
    a, b, derivatives = cell(x, time, CELL, ACTIVATION, EXACT)
    changes = changes_of(derivatives, previous) if len(previous) > 0 else ()
    return (a, b, ()) if len(delta) == 0 else (conjugate(a), delta, changes)


@triton.jit
def store_step(written, tile, t, found, there, num_features):
    """Write results of step t of each chunk, side by side."""
    for k in tl.static_range(len(found)):
        tl.store(at(written, tile, t) + k * num_features, found[k], (tile.u + t < tile.end) & there)


@triton.jit
def before_step(a, delta, reset):
    """Return the carry of the backward pass before a step, and its part for the initial state."""
    carry = times(a, delta)
    to_initial = tl.where(reset, features(carry), 0.0) if is_there(reset) else 0.0
    return where(reset, constant(carry, 0.0), carry), to_initial


@triton.jit
def fill_padding(written, of_dt, origin, place, span, zeros, COUNT: tl.constexpr):
    """Write zeros. The padding is not reversed."""
    C: tl.constexpr = zeros.shape[0]
    for first in range(tl.maximum(span.begin, span.total), span.padded_end, C):
        u = (first + tl.arange(0, C)[:, None]).to(tl.int64)
        tile = Tile(u, (u - origin[1]) * origin[2], (), span.padded_end, span.total, place.there)
        store_step(written, tile, 0, (zeros,) * COUNT, place.there, place.num_features)
        if len(of_dt) > 0:
            of_units = tl.zeros((C, place.unit.shape[1]), zeros.dtype)
            store_step(of_dt, tile, 0, (of_units,), place.unit < place.num_units, 0)


@triton.jit
def after(p, l, state, PARTS: tl.constexpr):
    """Return the state after steps, from the state before them, their decay p and their last state l from 0, all as
    features. An infinite decay marks a reset, because |a| <= 1."""
    kept = features(times(number(p, PARTS), number(state, PARTS)))
    # A decay that underflowed times an infinite state would be NaN; the division has the sign of the decay.
    kept = tl.where((p == 0) & (tl.abs(state) == INFINITY), state / p, kept)
    return tl.where(p == INFINITY, l, kept + l)


@triton.jit
def carry_into(state, summaries, place, C: tl.constexpr):
    """Return the state before each chunk of a segment (C, F), from the summaries of all segments before it, in their
    order, and of its own chunks."""
    PARTS: tl.constexpr = parts_in(state)
    state, chunk = features(state), tl.arange(0, C)[:, None]
    for before in range(place.segment):
        whole = place.summaries + (before * C + C - 1) * place.num_features
        p = tl.load(summaries[0] + whole, place.there, other=1.0)
        l = tl.load(summaries[1] + whole, place.there, other=0.0)
        state = after(p, l, state, PARTS)
    offset = place.summaries + (place.segment * C + chunk - 1) * place.num_features
    is_later = chunk > 0
    p = tl.load(summaries[0] + offset, place.there & is_later, other=1.0)
    l = tl.load(summaries[1] + offset, place.there & is_later, other=0.0)
    return number(tl.where(is_later, after(p, l, state, PARTS), state), PARTS)


@triton.jit
def store_summary(summaries, p, l, any_reset, place):
    """Write the decay and the last state from 0, as features (C, F), of all chunks until each one, from its own."""
    PARTS: tl.constexpr = parts_in(p)
    C: tl.constexpr = p[0].shape[0]
    marked, ends, chunk = tl.where(any_reset, INFINITY, features(p)), features(l), tl.arange(0, C)[:, None]
    p, l, _, _ = combined(where(any_reset, constant(p, 0.0), p), l)
    first_reset = tl.min(tl.where(any_reset, chunk, C), 0)[None, :]
    decays, states = tl.where(chunk >= first_reset, INFINITY, features(p)), features(l)
    # 0 times an infinite state is NaN, which stays until the last chunk.
    if tl.max(tl.max((states != states).to(tl.int32), 1), 0) != 0:
        state = tl.zeros_like(row(ends, 0))
        for here in range(C):
            state = after(row(marked, here), row(ends, here), state, PARTS)
            states = tl.where(chunk == here, state, states)
    offset = place.summaries + (place.segment * C + chunk) * place.num_features
    tl.store(summaries[0] + offset, decays, place.there)
    tl.store(summaries[1] + offset, states, place.there)


@triton.jit
def store_sums(memory, sums, place):
    """Write sums over the chunks and steps of a segment, side by side."""
    if is_there(memory):
        for k in tl.static_range(len(sums)):
            offset = (place.part * len(sums) + k) * place.num_features + place.feature
            tl.store(memory + offset, tl.sum(sums[k], 0)[None, :], place.there)


@triton.jit
def recurrence_kernel(
    CELL: tl.constexpr, ACTIVATION: tl.constexpr, KEEPING: tl.constexpr, TILING: tl.constexpr, V: tl.constexpr,
    EVEN: tl.constexpr, sizes, backwards, inputs, sequences, states, results, packing, summaries, bound,
):  # fmt: skip
    """Compute all states, or with `grad_out` the gradients; or without `out`, the summaries of segments.

    In the backward pass, u counts from the last step of the recurrence to its first; `backwards` refers to that order.
    The state is then the carry, the gradient of the state before a step: c = a (dL/dh + c of the following step).
    Across a reset, c is added to the gradient of the initial state and continues as 0.

    `launch.GROUPS` names what is in the tuples; () is what is not there, and `dt` if all times are 1. `summaries`: the
    decay and the last state from 0 of all chunks of a segment until each one, (B, num_segments, C, N). `bound`: log(m)
    and log(1 - m) of the lower bound m of the decay, each as a float32 number and the rest of it.
    """
    num_steps, num_units, num_segments, segment_steps = sizes
    out, grad_out, reset, dt = sequences
    h, initial_state, grad_last = states
    grads, grad_dt, after, grad_initial_state, grad_bias = results
    offsets, lengths = packing
    C: tl.constexpr = TILING.chunks
    T: tl.constexpr = TILING.steps
    F: tl.constexpr = TILING.features
    BACKWARD: tl.constexpr = len(grad_out) > 0
    SEGMENTS: tl.constexpr = len(summaries) > 0
    SUMMARY: tl.constexpr = len(out) == 0
    NUM_INPUTS: tl.constexpr = len(inputs)
    dtype: tl.constexpr = inputs[0][0].dtype.element_ty
    A: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    EXACT: tl.constexpr = dtype == tl.float32
    PARTS: tl.constexpr = parts_of_cell(CELL)
    MAY_GROW: tl.constexpr = CELL == "linear_scan" or CELL == "complex_linear_scan" or CELL == "quaternion_linear_scan"
    # Chunks need all a first. In the backward pass, float32 takes fewer instructions if all steps are derived first,
    # and bfloat16 fewer registers if each is derived when its gradients are written (Triton 3.9, sm_90).
    COMBINED: tl.constexpr = C > 1 and not SEGMENTS
    FIRST: tl.constexpr = not BACKWARD or COMBINED or EXACT or SUMMARY

    place = place_of(num_units, num_segments, C, F, V, SEGMENTS)
    span = span_of(place, num_steps, segment_steps, lengths)
    zero = number(tl.zeros((C if SUMMARY else 1, F), A), PARTS)
    earliest, state_at = load_state(h, place, zero), place.batch * place.num_features + place.feature
    state = load_number(grad_last + state_at, place.there, zero) if BACKWARD and not SUMMARY else earliest
    decay, any_reset = constant(zero, 1.0), tl.zeros((C, 1), tl.int1)
    start = load_state(initial_state, place, zero)
    if SEGMENTS and not SUMMARY:
        state = carry_into(state, summaries, place, C)

    origin = place.batch, 0, 1
    if not is_there(offsets):
        origin = place.batch, (backwards * (span.total - 1)).to(tl.int64), 1 - 2 * backwards
    of_dt = ()
    if is_there(grad_dt):
        of_dt = begin((grad_dt, dt[1].to(tl.int64) * num_units, dt[2].to(tl.int64) * num_units), origin, place.unit, 1)
    xs, out, grad_out, reset, dt = begin_all(inputs, sequences, origin, place.feature, V)
    written = begin(grads, origin, place.feature, V) if BACKWARD else out
    # The other parts of a number are 0.
    keeping = tl.where(place.feature % PARTS == 0, KEEPING[0], 0.0).to(dtype) if PARTS > 1 else KEEPING[0]
    given = Given(xs, keeping, reset, dt, bound, grad_out, out if BACKWARD else (), earliest, start)

    # Of the gradients of the initial state and of the inputs.
    sums = (tl.zeros((C, F), A),) * (NUM_INPUTS + 1)
    # Steps from a chunk to the next one, and from a tile to the next one.
    chunk, apart, tile_steps, last_tile = tl.arange(0, C)[:, None], T, C * T, span.end
    if SEGMENTS:
        apart = segment_steps // C
        tile_steps, last_tile = T, tl.minimum(span.begin + apart, span.end)
    for first in tl.range(span.begin, last_tile, tile_steps, num_stages=1 if SUMMARY else TILING.stages):
        u = first + chunk * apart
        # The backward pass needs one more row, because the previous state is in the row of the next u.
        rows = rows_of(u, offsets, backwards, place, span.total, T + BACKWARD)
        tile = Tile(u, u.to(tl.int64), rows, span.end, span.total, True if EVEN else place.there)
        steps, resets = load_tile(given, tile, zero, KEEPING, T)
        ready, before = (), state
        for t in tl.static_range(T if FIRST else 0):
            ready += (coefficients(*steps[t], CELL, ACTIVATION, EXACT),)
        if COMBINED:
            before, state = carries(ready, resets, None if BACKWARD else start, state, MAY_GROW)
        for t in tl.static_range(T):
            a, b, changes = ready[t] if FIRST else coefficients(*steps[t], CELL, ACTIVATION, EXACT)
            if SUMMARY:
                before = step(before, a, b, resets[t], None if BACKWARD else start)
                decay = times(a, decay)
                any_reset = any_reset | resets[t] if is_there(resets[t]) else any_reset
            elif BACKWARD:
                delta = plus(b, before)
                found = gradients(delta, changes)
                store_step(written, tile, t, found[:NUM_INPUTS], tile.there, place.num_features)
                if is_there(grad_dt):
                    of_units = tl.sum(tl.reshape(found[NUM_INPUTS], (C, F // V, V)), 2)
                    store_step(of_dt, tile, t, (of_units,), place.unit < num_units, 0)
                before, to_initial = before_step(a, delta, resets[t])
                sums = plus(sums, (to_initial,) + found[:NUM_INPUTS])  # noqa: RUF005 (not in Triton)
            else:
                before = step(before, a, b, resets[t], start)
                store_step(written, tile, t, (features(before),), tile.there, place.num_features)
        state = state if COMBINED else before

    if is_there(lengths) and not is_there(offsets) and not SUMMARY:
        fill_padding(written, of_dt, origin, place, span, tl.zeros((C, F), A), NUM_INPUTS if BACKWARD else 1)
    if SUMMARY:
        store_summary(summaries, decay, state, any_reset, place)
    else:
        is_last = place.segment == num_segments - 1 if SEGMENTS else True
        if is_last:
            tl.store(after + state_at, row(features(state), C - 1) if SEGMENTS else features(state), place.there)
        store_sums(grad_initial_state, sums[:1], place)
        store_sums(grad_bias, sums[1:], place)


PARAMETERS = tuple(signature(recurrence_kernel.fn).parameters)
