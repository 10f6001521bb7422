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

from inspect import signature

import triton
import triton.language as tl

from ...cells import parts_of
from .cells import cell
from .math import INFINITY
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


@triton.jit
def load_state(x, there, like, PARTS: tl.constexpr):
    return number(tl.load(x, there, other=0.0).to(like.dtype), PARTS)


@triton.jit
def begin(sequence, origin, feature, V: tl.constexpr):
    """Return a sequence from its first step in the order of the scan, and the stride to the next step, in elements."""
    x, batch_stride, step = sequence
    batch, first_row, sign = origin
    step = step.to(tl.int64) * V
    # `multiple_of` promises the alignment in bytes, on scalars, because the compiler loses it on other addresses.
    ALIGNMENT: tl.constexpr = V * (x.dtype.element_ty.primitive_bitwidth // 8)
    offset = batch * batch_stride * V + first_row * step
    return tl.multiple_of(x + offset, ALIGNMENT) + feature, step * sign


@triton.jit
def at(sequence, first, t, rows):
    """Return the addresses of step t of each chunk (C, 1); `first` is the index of its first step."""
    x, step = sequence
    if len(rows) > 0:
        return x + rows[t] * step
    else:
        return x + (first * step + t * step)


@triton.jit
def time_of(elapsed, bound, A: tl.constexpr):
    """Return the `time` of a step of each chunk, as the cells take it."""
    if elapsed is None and bound is None:
        return ()
    else:
        one = tl.full((1, 1), 1.0, A)
        elapsed = one if elapsed is None else elapsed.to(A)
        if bound is None:
            return (elapsed,)
        else:
            return elapsed, one * bound[0] + bound[1], one * bound[2] + bound[3]


@triton.jit
def after(p, l, state, PARTS: tl.constexpr):
    """Return the state after steps, from the state before them, their decay p and their last state l from 0, all as
    features. An infinite decay marks a reset, because |a| <= 1."""
    kept = features(times(number(p, PARTS), number(state, PARTS)))
    # A decay that underflowed times an infinite state would be NaN; the division has the sign of the decay.
    kept = tl.where((p == 0) & (tl.abs(state) == INFINITY), state / p, kept)
    return tl.where(p == INFINITY, l, kept + l)


@triton.jit
def carry_into(segment, state, summaries, offset, there, num_features, C: tl.constexpr):
    """Return the state before each chunk of a segment (C, F), from the summaries of all segments before it, in their
    order, and of its own chunks. `offset`: of the summaries of this batch element."""
    PARTS: tl.constexpr = parts_in(state)
    state, chunk = features(state), tl.arange(0, C)[:, None]
    for before in range(segment):
        whole = offset + (before * C + C - 1) * num_features
        p = tl.load(summaries[0] + whole, there, other=1.0)
        l = tl.load(summaries[1] + whole, there, other=0.0)
        state = after(p, l, state, PARTS)
    offset += (segment * C + chunk - 1) * num_features
    is_later = chunk > 0
    p = tl.load(summaries[0] + offset, there & is_later, other=1.0)
    l = tl.load(summaries[1] + offset, there & is_later, other=0.0)
    return number(tl.where(is_later, after(p, l, state, PARTS), state), PARTS)


@triton.jit
def summary(p, l, any_reset):
    """Return the decay and the last state from 0, as features (C, F), of all chunks until each one, from its own."""
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
    return decays, states


@triton.jit
def coefficients(x, time, delta, previous, CELL: tl.constexpr, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Return a and b of a step of the scan, and the derivatives of its state.

    In the backward pass, `delta` is the gradient of the state, and `previous` the state before the step. `delta` is ()
    in the forward pass, and `previous` if the derivatives are not needed.
    """
    a, b, derivatives = cell(x, time, CELL, ACTIVATION, EXACT)
    if len(delta) == 0:
        return a, b, ()
    else:
        return conjugate(a), delta, changes_of(derivatives, previous) if len(previous) > 0 else ()


@triton.jit
def recurrence_kernel(
    CELL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEPING: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    num_steps,
    num_units,
    num_segments,
    segment_steps,
    backwards,
    # Sequences. All others are None if they are not there. An input that is only memory has the strides of the one
    # before it.
    inputs,
    out=None,
    grad_out=None,
    # The gradients of all inputs, side by side.
    grads=None,
    reset=None,
    # Elapsed times; None if they are all 1.
    dt=None,
    # Sums over the features of a unit, (num_units) for each elapsed time.
    grad_dt=None,
    # States (B, N) and their strides of batch.
    h=None,
    initial_state=None,
    # States of dense memory: `after` is the state after the last step, or the gradient of h.
    grad_last=None,
    after=None,
    # Sums over the steps of a segment, (B, num_segments, N) and (B, num_segments, num_inputs N).
    grad_initial_state=None,
    grad_bias=None,
    # Offset of each packed step, and length of each sequence, packed or padded.
    offsets=None,
    lengths=None,
    # Decay and last state from a state of 0 of the chunks of a segment until each chunk, (B, num_segments, C, N).
    summaries=None,
    # log(m) and log(1 - m) of the lower bound m of the decay, each as a float32 number and the rest of it.
    bound=None,
):
    """Compute all states, or with `grad_out` the gradients; or without `out`, the summaries of segments.

    In the backward pass, u counts from the last step of the recurrence to its first; `backwards` refers to that order.
    The state is then the carry, the gradient of the state before a step: c = a (dL/dh + c of the following step).
    Across a reset, c is added to the gradient of the initial state and continues as 0.
    """
    BACKWARD: tl.constexpr = grad_out is not None
    PACKED: tl.constexpr = offsets is not None
    SEGMENTS: tl.constexpr = summaries is not None
    SUMMARY: tl.constexpr = out is None
    NUM_INPUTS: tl.constexpr = len(inputs)
    dtype: tl.constexpr = inputs[0][0].dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32
    A: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    PARTS: tl.constexpr = parts_of_cell(CELL)
    MAY_GROW: tl.constexpr = CELL == "linear_scan" or CELL == "complex_linear_scan" or CELL == "quaternion_linear_scan"
    # Chunks need all a first. In the backward pass, float32 takes fewer instructions if all steps are derived first,
    # and bfloat16 fewer registers if each is derived when its gradients are written (Triton 3.9, sm_90).
    COMBINED: tl.constexpr = C > 1 and not SEGMENTS
    FIRST: tl.constexpr = not BACKWARD or COMBINED or EXACT or SUMMARY

    num_features = num_units * V
    num_blocks = tl.cdiv(num_features, F)
    program = tl.program_id(0)
    batch = (program // num_blocks).to(tl.int64)
    block = program % num_blocks
    feature = block * F + tl.arange(0, F)[None, :]
    unit = block * (F // V) + tl.arange(0, F // V)[None, :]
    there = feature < num_features
    begin_at, end, total = 0, num_steps, num_steps
    sums_of = batch
    if SEGMENTS:
        segment = (batch % num_segments).to(tl.int32)
        batch = batch // num_segments
        begin_at = segment * segment_steps
        end = tl.minimum(begin_at + segment_steps, num_steps)
        summaries_at = batch * num_segments * C * num_features + feature
    end_of_padding = end
    if lengths is not None:
        total = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), num_steps).to(tl.int32)
        end = tl.minimum(end, total)
    chunk = tl.arange(0, C)[:, None]

    real = tl.zeros((C if SUMMARY else 1, F), A)
    zero = number(real, PARTS)
    state, start, decay, any_reset = zero, zero, constant(zero, 1.0), tl.zeros((C, 1), tl.int1)
    state_at = batch * num_features + feature
    if not SUMMARY:
        earliest = load_state(h[0] + batch * h[1] + feature, there, real, PARTS)
        state = load_state(grad_last + state_at, there, real, PARTS) if BACKWARD else earliest
    if initial_state is not None:
        start = load_state(initial_state[0] + batch * initial_state[1] + feature, there, real, PARTS)
    if SEGMENTS and not SUMMARY:
        state = carry_into(segment, state, summaries, summaries_at, there, num_features, C)

    first_row, sign = 0, 1
    if not PACKED:
        first_row, sign = (backwards * (total - 1)).to(tl.int64), 1 - 2 * backwards
    origin = batch, first_row, sign
    strides, xs = inputs[0][1:], ()
    for k in tl.static_range(NUM_INPUTS):
        if len(inputs[k]) > 1:
            strides = inputs[k][1:]
        xs += (begin((inputs[k][0], strides[0], strides[1]), origin, feature, V),)
    if BACKWARD:
        grad_out = begin(grad_out, origin, feature, V)
    if not SUMMARY:
        out = begin(out, origin, feature, V)
        written = begin(grads, origin, feature, V) if BACKWARD else out
    if reset is not None:
        reset = begin(reset, origin, 0, 1)
    if grad_dt is not None:
        strides = dt[1].to(tl.int64) * num_units, dt[2].to(tl.int64) * num_units
        grad_dt = begin((grad_dt, strides[0], strides[1]), origin, unit, 1)
    if dt is not None:
        dt = begin(dt, origin, 0, 1)

    keeping = KEEPING[0]
    if PARTS > 1:
        # The other parts of a number are 0.
        keeping = tl.where(feature % PARTS == 0, KEEPING[0], 0.0).to(dtype)
    # Of the gradients of the initial state and of the inputs.
    sums = (tl.zeros((C, F), A),) * (NUM_INPUTS + 1)
    # Steps from a chunk to the next one, and from a tile to the next one.
    apart, tile_steps, last_tile = T, C * T, end
    if SEGMENTS:
        apart = segment_steps // C
        tile_steps, last_tile = T, tl.minimum(begin_at + apart, end)
    for tile in tl.range(begin_at, last_tile, tile_steps, num_stages=1 if SUMMARY else STAGES):
        u = tile + chunk * apart
        first = u.to(tl.int64)
        rows, masks, resets, steps, ready = (), (), (), (), ()
        if PACKED:
            # The backward pass needs one more, because the previous state is in the row of the next u.
            for t in tl.static_range(T + BACKWARD):
                time = tl.where(backwards != 0, total - 1 - (u + t), u + t)
                rows += (tl.load(offsets + time, u + t < total, other=0) + batch,)
        for t in tl.static_range(T):
            here = u + t < end
            mask = here if EVEN else here & there
            masks += (mask,)
            x = ()
            for k in tl.static_range(NUM_INPUTS):
                loaded = tl.load(at(xs[k], first, t, rows), mask, other=keeping if k == 0 else KEEPING[k])
                x += (number(loaded.to(A), PARTS),)
            resets += (() if reset is None else tl.load(at(reset, first, t, rows), here, other=0) != 0,)
            # Steps that are not there have a time of 0.
            elapsed = None if dt is None else tl.load(at(dt, first, t, rows), here, other=0.0)
            # Not None, because Triton 3.6 compiles no tuple that has it.
            delta, previous = (), ()
            if BACKWARD:
                delta = load_state(at(grad_out, first, t, rows), mask, real, PARTS)
            if BACKWARD and not SUMMARY:
                # The state before the first step is not in `out`.
                inside = u + t < tl.minimum(end, total - 1)
                previous = load_state(at(out, first, t + 1, rows), inside if EVEN else inside & there, real, PARTS)
                previous = where(resets[t], start, where(u + t == total - 1, earliest, previous))
            steps += ((x, time_of(elapsed, bound, A), delta, previous),)
        for t in tl.static_range(T if FIRST else 0):
            ready += (coefficients(*steps[t], CELL, ACTIVATION, EXACT),)
        before = state
        if COMBINED:
            before, state = carries(ready, resets, None if BACKWARD else start, state, MAY_GROW)
        for t in tl.static_range(T):
            a, b, changes = ready[t] if FIRST else coefficients(*steps[t], CELL, ACTIVATION, EXACT)
            if SUMMARY:
                before = step(before, a, b, resets[t], None if BACKWARD else start)
                decay = times(a, decay)
                if reset is not None:
                    any_reset = any_reset | resets[t]
            else:
                if BACKWARD:
                    delta = plus(b, before)
                    found = gradients(delta, changes)
                else:
                    before = step(before, a, b, resets[t], start)
                    found = (features(before),)
                for k in tl.static_range(NUM_INPUTS if BACKWARD else 1):
                    tl.store(at(written, first, t, rows) + k * num_features, found[k], masks[t])
                if grad_dt is not None:
                    by_unit = tl.sum(tl.reshape(found[NUM_INPUTS], (C, F // V, V)), 2)
                    tl.store(at(grad_dt, first, t, rows), by_unit, (u + t < end) & (unit < num_units))
                if BACKWARD:
                    before = times(a, delta)
                    to_initial = tl.where(resets[t], features(before), 0.0) if reset is not None else 0.0
                    before = where(resets[t], constant(before, 0.0), before)
                    sums = plus(sums, (to_initial,) + found[:NUM_INPUTS])  # noqa: RUF005 (not in Triton)
        if not COMBINED:
            state = before

    if lengths is not None and not (PACKED or SUMMARY):
        # The padding is not reversed.
        for tile in range(tl.maximum(begin_at, total), end_of_padding, C):
            padded = (tile + chunk).to(tl.int64)
            inside, u = padded < end_of_padding, (padded - first_row) * sign
            for k in tl.static_range(NUM_INPUTS if BACKWARD else 1):
                tl.store(at(written, u, 0, ()) + k * num_features, tl.zeros((C, F), A), inside & there)
            if grad_dt is not None:
                tl.store(at(grad_dt, u, 0, ()), tl.zeros((C, F // V), A), inside & (unit < num_units))

    if SUMMARY:
        decays, states = summary(decay, state, any_reset)
        summaries_at += (segment * C + chunk) * num_features
        tl.store(summaries[0] + summaries_at, decays, there)
        tl.store(summaries[1] + summaries_at, states, there)
    else:
        is_last = segment == num_segments - 1 if SEGMENTS else True
        if is_last:
            tl.store(after + state_at, row(features(state), C - 1) if SEGMENTS else features(state), there)
        if grad_initial_state is not None:
            tl.store(grad_initial_state + sums_of * num_features + feature, tl.sum(sums[0], 0)[None, :], there)
        if grad_bias is not None:
            for k in tl.static_range(NUM_INPUTS):
                place = (sums_of * NUM_INPUTS + k) * num_features + feature
                tl.store(grad_bias + place, tl.sum(sums[k + 1], 0)[None, :], there)


PARAMETERS = tuple(signature(recurrence_kernel.fn).parameters)
