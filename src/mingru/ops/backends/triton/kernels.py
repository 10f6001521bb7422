"""The Triton kernel of the recurrences. Only `launch.py` imports this module, and only on use.

A program computes F neighboring features of one sequence. It walks over time in tiles of C chunks of T steps:

    C = 1   One step after the other. For many sequences and features.
    C > 1   Every chunk is computed from a state of 0, all chunks in parallel. `associative_scan` combines them to the
            state before each chunk. Then each chunk is computed again, from that state.

The inputs of a tile are read once, and its states are written once. If there are few programs, time is also divided
into segments: a first launch computes only the decay and the last state of each segment, and a second one the states.
The first launch walks: each chunk is a part of the segment, and they are combined at its end.
Everything is computed in a fixed order, without atomics.

Time is counted in the order of the scan; u is the step in that order. For `backwards`, a step u is the row
num_steps - 1 - u. The backward pass is a scan in the opposite direction. The row of a packed step comes from a table.

Suffixes: `_batch` and `_step` are strides. Strides of sequences and `num_units` count units of V features, and the
kernel multiplies them by V. That tells the compiler how addresses are aligned, so that accesses have 16 bytes whenever
the number of features allows them. All memory is read before any is written in a tile, because the compiler moves no
load over a store.
"""

from inspect import signature
from operator import itemgetter

import triton
import triton.language as tl

from ...cells import parts_of
from .cells import cell
from .math import INFINITY
from .scan import (
    carries,
    changes_of,
    chunk_of,
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
def begin(x, batch_stride, step, origin, feature, V: tl.constexpr):
    """Return a sequence from its first step in the order of the scan, and the stride to the next step, in elements."""
    if x is None:
        return (), ()
    else:
        batch, first_row, sign = origin
        step = step.to(tl.int64) * V
        # `multiple_of` promises the alignment in bytes, on scalars, because the compiler loses it on other addresses.
        ALIGNMENT: tl.constexpr = V * (x.dtype.element_ty.primitive_bitwidth // 8)
        at = batch * batch_stride * V + first_row * step
        return tl.multiple_of(x + at, ALIGNMENT) + feature, step * sign


@triton.jit
def address(first, t, rows, step):
    """Return the offset of step t of each chunk (C, 1); `first` is the index of its first step."""
    if len(rows) > 0:
        return rows[t] * step
    else:
        return first * step + t * step


@triton.jit
def time_of(dt, here, bound, A: tl.constexpr):
    """Return the `time` of a step of each chunk, as the cells take it. Steps that are not there have a time of 0."""
    if dt is None and bound is None:
        return ()
    else:
        one = tl.full((1, 1), 1.0, A)
        elapsed = one if dt is None else tl.load(dt, here, other=0.0).to(A)
        if bound is None:
            return (elapsed,)
        else:
            return elapsed, one * bound[0] + bound[1], one * bound[2] + bound[3]


@triton.jit
def after(p, l, state, PARTS: tl.constexpr):
    """Return the state after steps, from the state before them, their decay p and their last state l from 0, all as
    features (1, F). An infinite decay marks a reset, because |a| <= 1."""
    kept = features(times(number(p, PARTS), number(state, PARTS)))
    # A decay that underflowed times an infinite state would be NaN; the division has the sign of the decay.
    kept = tl.where((p == 0) & (tl.abs(state) == INFINITY), state / p, kept)
    return tl.where(p == INFINITY, l, kept + l)


@triton.jit
def carry_into(segment, state, products, ends, there, num_features):
    """Return the state before a segment, from the results of all segments before it, in their order."""
    PARTS: tl.constexpr = parts_in(state)
    state = features(state)
    for before in range(segment):
        p = tl.load(products + before * num_features, there, other=1.0)
        l = tl.load(ends + before * num_features, there, other=0.0)
        state = after(p, l, state, PARTS)
    return number(state, PARTS)


@triton.jit
def summary(p, l, any_reset):
    """Return the decay and the last state of a segment as features (1, F), from those of its chunks (C, F)."""
    PARTS: tl.constexpr = parts_in(p)
    C: tl.constexpr = p[0].shape[0]
    marked, ends = tl.where(any_reset, INFINITY, features(p)), features(l)
    p, l, _, _ = combined(where(any_reset, constant(p, 0.0), p), l)
    state = features(chunk_of(l, C - 1))
    decay = tl.where(tl.max(marked, 0)[None, :] == INFINITY, INFINITY, features(chunk_of(p, C - 1)))
    # 0 times an infinite state is NaN.
    if tl.max(tl.max((state != state).to(tl.int32), 1), 0) != 0:
        state = tl.zeros_like(state)
        for chunk in range(C):
            state = after(row(marked, chunk), row(ends, chunk), state, PARTS)
    return decay, state


@triton.jit
def derived(x, time, previous, CELL: tl.constexpr, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Return the conjugate of a, and the derivatives of the state; `previous` is () if they are not needed."""
    a, _, derivatives = cell(x, time, CELL, ACTIVATION, EXACT)
    return conjugate(a), changes_of(derivatives, previous) if len(previous) > 0 else ()


def kernel(function):
    """Compile a function. Only constants select another kernel, not numbers that are 1 or a multiple of 16, nor
    addresses that are a multiple of 16."""
    parameters = signature(function).parameters.values()
    values = [each.name for each in parameters if each.annotation is not tl.constexpr]
    return triton.jit(do_not_specialize=values)(function)


@kernel
def recurrence_kernel(
    num_steps,
    num_units,
    num_segments,
    segment_steps,
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
    # Sequences, None if there are none, and their strides of batch and time.
    x0,
    x1,
    x0_batch,
    x0_step,
    # Of x1 and x2, if their strides differ from those of x0.
    x1_batch=None,
    x1_step=None,
    x2=None,
    out=None,
    out_batch=None,
    out_step=None,
    grad_out=None,
    grad_out_batch=None,
    grad_out_step=None,
    # The gradients of all inputs, side by side.
    grads=None,
    grads_batch=None,
    grads_step=None,
    reset=None,
    reset_batch=None,
    reset_step=None,
    # Elapsed times; None if they are all 1.
    dt=None,
    dt_batch=None,
    dt_step=None,
    # Sums over the features of a unit, (num_units) for each elapsed time.
    grad_dt=None,
    # States (B, N).
    h=None,
    h_batch=None,
    initial_state=None,
    initial_state_batch=None,
    grad_last=None,
    # State after the last step, or gradient of h.
    after=None,
    # Sums over the steps of a segment, (B, num_segments, N) and (B, num_segments, num_inputs N).
    grad_initial_state=None,
    grad_bias=None,
    # Offset of each packed step, and length of each sequence, packed or padded.
    offsets=None,
    lengths=None,
    # Decay and last state from a state of 0 of each segment, (B, num_segments, N).
    products=None,
    ends=None,
    # log(m) and log(1 - m) of the lower bound m of the decay, each as a float32 number and the rest of it.
    bound=None,
):
    """Compute all states, or with `grad_out` the gradients; or without `out`, the products and ends of segments.

    In the backward pass, u counts from the last step of the recurrence to its first; `backwards` refers to that order.
    The state is then the carry, the gradient of the state before a step: c = a (dL/dh + c of the following step).
    Across a reset, c is added to the gradient of the initial state and continues as 0.
    """
    BACKWARD: tl.constexpr = grad_out is not None
    PACKED: tl.constexpr = offsets is not None
    SEGMENTS: tl.constexpr = products is not None
    SUMMARY: tl.constexpr = out is None
    NUM_INPUTS: tl.constexpr = 2 if x2 is None else 3
    EXACT: tl.constexpr = x0.dtype.element_ty == tl.float32
    A: tl.constexpr = tl.float64 if x0.dtype.element_ty == tl.float64 else tl.float32
    PARTS: tl.constexpr = parts_of_cell(CELL)
    MAY_GROW: tl.constexpr = CELL == "linear_scan" or CELL == "complex_linear_scan" or CELL == "quaternion_linear_scan"

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
        segments_at = batch * num_segments * num_features + feature
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
        earliest = load_state(h + batch * h_batch + feature, there, real, PARTS)
        state = load_state(grad_last + state_at, there, real, PARTS) if BACKWARD else earliest
    if initial_state is not None:
        start = load_state(initial_state + batch * initial_state_batch + feature, there, real, PARTS)
    if SEGMENTS and not SUMMARY:
        state = carry_into(segment, state, products + segments_at, ends + segments_at, there, num_features)

    first_row, sign = 0, 1
    if not PACKED:
        first_row, sign = (backwards * (total - 1)).to(tl.int64), 1 - 2 * backwards
    origin = batch, first_row, sign
    x0, x_rows = begin(x0, x0_batch, x0_step, origin, feature, V)
    others = (x0_batch, x0_step) if x1_batch is None else (x1_batch, x1_step)
    x1, other_rows = begin(x1, others[0], others[1], origin, feature, V)
    x2 = begin(x2, others[0], others[1], origin, feature, V)[0]
    out, out_rows = begin(out, out_batch, out_step, origin, feature, V)
    grad_out, grad_out_rows = begin(grad_out, grad_out_batch, grad_out_step, origin, feature, V)
    grads, grads_rows = begin(grads, grads_batch, grads_step, origin, feature, V)
    if reset is not None:
        reset, reset_rows = begin(reset, reset_batch, reset_step, origin, 0, 1)
    if grad_dt is not None:
        grad_dt_batch, grad_dt_rows = dt_batch.to(tl.int64) * num_units, dt_step.to(tl.int64) * num_units
        grad_dt, grad_dt_rows = begin(grad_dt, grad_dt_batch, grad_dt_rows, origin, unit, 1)
    if dt is not None:
        dt, dt_rows = begin(dt, dt_batch, dt_step, origin, 0, 1)

    keeping = KEEPING[0]
    if PARTS > 1:
        # The other parts of a number are 0.
        keeping = tl.where(feature % PARTS == 0, KEEPING[0], 0.0).to(x0.dtype.element_ty)
    # Of the gradients of the initial state and of the inputs.
    sums = (tl.zeros((C, F), A),) * (NUM_INPUTS + 1)
    # Steps from a chunk to the next one, and from a tile to the next one.
    apart, tile_steps, last_tile = T, C * T, end
    if SUMMARY:
        apart = segment_steps // C
        tile_steps, last_tile = T, begin_at + apart
    for tile in tl.range(begin_at, last_tile, tile_steps, num_stages=1 if SUMMARY else STAGES):
        u = tile + chunk * apart
        first = u.to(tl.int64)
        rows, masks, steps, resets, deltas = (), (), (), (), ()
        if PACKED:
            # The backward pass needs one more, because the previous state is in the row of the next u.
            for t in tl.static_range(T + BACKWARD):
                time = tl.where(backwards != 0, total - 1 - (u + t), u + t)
                rows += (tl.load(offsets + time, u + t < end, other=0) + batch,)
        for t in tl.static_range(T):
            here = u + t < end
            mask = here if EVEN else here & there
            masks += (mask,)
            at = address(first, t, rows, x_rows)
            x = (number(tl.load(x0 + at, mask, other=keeping).to(A), PARTS),)
            if x1_batch is not None:
                at = address(first, t, rows, other_rows)
            x += (number(tl.load(x1 + at, mask, other=KEEPING[1]).to(A), PARTS),)
            if NUM_INPUTS == 3:
                x += (number(tl.load(x2 + at, mask, other=KEEPING[2]).to(A), PARTS),)
            resets += (
                () if reset is None else tl.load(reset + address(first, t, rows, reset_rows), here, other=0) != 0,
            )
            elapsed = None if dt is None else dt + address(first, t, rows, dt_rows)
            previous = ()
            if BACKWARD:
                deltas += (load_state(grad_out + address(first, t, rows, grad_out_rows), mask, real, PARTS),)
            if BACKWARD and not SUMMARY:
                # The state before the first step is not in `out`.
                inside = u + t < tl.minimum(end, total - 1)
                at = address(first, t + 1, rows, out_rows)
                previous = load_state(out + at, inside if EVEN else inside & there, real, PARTS)
                previous = where(resets[t], start, where(u + t == total - 1, earliest, previous))
            steps += ((x, time_of(elapsed, here, bound, A), previous),)
        a, b, changes, before = (), deltas, (), state
        # Chunks need all a first. In the backward pass, float32 takes fewer instructions if all steps are derived
        # first, and bfloat16 fewer registers if each is derived when its gradients are written (Triton 3.9, sm_90).
        FIRST: tl.constexpr = C > 1 or EXACT or SUMMARY
        for t in tl.static_range(T):
            if not BACKWARD:
                a_t, b_t, _ = cell(steps[t][0], steps[t][1], CELL, ACTIVATION, EXACT)
                a += (a_t,)
                b += (b_t,)
            elif FIRST:
                a_t, changes_t = derived(*steps[t], CELL, ACTIVATION, EXACT)
                a += (a_t,)
                changes += (changes_t,)
        if C > 1 and not SUMMARY:
            before, state = carries(a, b, resets, None if BACKWARD else start, state, MAY_GROW)
        for t in tl.static_range(T):
            if SUMMARY:
                before = step(before, a[t], b[t], resets[t], None if BACKWARD else start)
                decay = times(a[t], decay)
                if reset is not None:
                    any_reset = any_reset | resets[t]
            elif not BACKWARD:
                before = step(before, a[t], b[t], resets[t], start)
                at = address(first, t, rows, out_rows)
                tl.store(out + at, features(before).to(out.dtype.element_ty), masks[t])
            else:
                a_t, changes_t = (a[t], changes[t]) if FIRST else derived(*steps[t], CELL, ACTIVATION, EXACT)
                delta = plus(deltas[t], before)
                found = gradients(delta, changes_t)
                at = address(first, t, rows, grads_rows)
                for k in tl.static_range(NUM_INPUTS):
                    tl.store(grads + at + k * num_features, found[k].to(grads.dtype.element_ty), masks[t])
                if grad_dt is not None:
                    by_unit = tl.sum(tl.reshape(found[NUM_INPUTS], (C, F // V, V)), 2)
                    at = address(first, t, rows, grad_dt_rows)
                    tl.store(grad_dt + at, by_unit, (u + t < end) & (unit < num_units))
                before = times(a_t, delta)
                to_initial = tl.where(resets[t], features(before), 0.0) if reset is not None else 0.0
                before = where(resets[t], constant(before, 0.0), before)
                summed = (sums[0] + to_initial,)
                for k in tl.static_range(NUM_INPUTS):
                    summed += (sums[k + 1] + found[k],)
                sums = summed
        if C == 1 or SUMMARY:
            state = before

    if lengths is not None and not (PACKED or SUMMARY):
        # The padding is not reversed.
        for tile in range(tl.maximum(begin_at, total), end_of_padding, C):
            row = (tile + chunk).to(tl.int64)
            mask, u = (row < end_of_padding) & there, (row - first_row) * sign
            nothing = tl.zeros((C, F), A)
            if BACKWARD:
                for k in tl.static_range(NUM_INPUTS):
                    tl.store(grads + u * grads_rows + k * num_features, nothing.to(grads.dtype.element_ty), mask)
                if grad_dt is not None:
                    by_unit = tl.zeros((C, F // V), A)
                    tl.store(grad_dt + u * grad_dt_rows, by_unit, (row < end_of_padding) & (unit < num_units))
            else:
                tl.store(out + u * out_rows, nothing.to(out.dtype.element_ty), mask)

    if SUMMARY:
        at = segments_at + segment * num_features
        p, l = summary(decay, state, any_reset)
        tl.store(products + at, p, there)
        tl.store(ends + at, l, there)
    else:
        is_last = segment == num_segments - 1 if SEGMENTS else True
        if is_last:
            tl.store(after + state_at, features(state).to(after.dtype.element_ty), there)
        if grad_initial_state is not None:
            tl.store(grad_initial_state + sums_of * num_features + feature, tl.sum(sums[0], 0)[None, :], there)
        if grad_bias is not None:
            for k in tl.static_range(NUM_INPUTS):
                at = (sums_of * NUM_INPUTS + k) * num_features + feature
                tl.store(grad_bias + at, tl.sum(sums[k + 1], 0)[None, :], there)


PARAMETERS = signature(recurrence_kernel.fn).parameters
constants_of = itemgetter(*(at for at, each in enumerate(PARAMETERS.values()) if each.annotation is tl.constexpr))
