"""The Triton kernel of the recurrences. Only `launch.py` imports this module, and only on use.

A program computes F neighboring features of one sequence. It walks over time in tiles of C chunks of T steps:

    C = 1   One step after the other. For many sequences and features.
    C > 1   Every chunk is computed from a state of 0, all chunks in parallel. `associative_scan` combines them to the
            state before each chunk. Then each chunk is computed again, from that state.

The inputs of a tile are read once, and its states are written once. If there are few programs, time is also divided
into segments: a first launch computes only the decay and the last state of each segment, and a second one the states.
Everything is computed in a fixed order, without atomics.

Time is counted in the order of the scan; u is the step in that order. For `backwards`, a step u is the row
num_steps - 1 - u. The backward pass is a scan in the opposite direction. The row of a packed step comes from a table.

Suffixes: `_batch` and `_step` are strides. Strides of sequences and `num_units` count units of V features, and the
kernel multiplies them by V. That tells the compiler how addresses are aligned, so that accesses have 16 bytes whenever
the number of features allows them. All memory is read before any is written in a tile, because the compiler moves no
load over a store.
"""

from inspect import signature
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .cells import cell
from .math import INFINITY
from .scan import carries, change, conjugate, constant, features, gradient, number, plus, step, times, where


class How(NamedTuple):
    """What is known when the kernel is compiled."""

    CELL: Any
    ACTIVATION: Any
    KEEPING: Any
    C: Any
    T: Any
    F: Any
    V: Any
    EVEN: Any
    STAGES: Any
    EXACT: Any
    PAIRS: Any
    MAY_GROW: Any


class Rows(NamedTuple):
    """Tensors with a row for each step: their pointers, and the strides of batch and time that they share."""

    data: Any
    batch: Any
    step: Any


class Tensors(NamedTuple):
    """The tensors that have a row for each step, and what a step needs besides."""

    x: Any
    out: Any
    grad_out: Any
    grads: Any
    reset: Any
    dt: Any
    grad_dt: Any
    offsets: Any
    bound: Any


class States(NamedTuple):
    """The tensors without time, and the strides of their batch."""

    h: Any
    h_batch: Any
    initial_state: Any
    initial_batch: Any
    grad_last: Any
    after: Any
    """Receives the last state in the order of the scan: that of the recurrence, or the gradient of h."""
    grad_initial_state: Any
    grad_bias: Any
    lengths: Any
    products: Any
    ends: Any


class Sizes(NamedTuple):
    num_steps: Any
    num_units: Any
    num_segments: Any
    segment_steps: Any
    backwards: Any


class Place(NamedTuple):
    """The part of a call that a program computes."""

    batch: Any
    feature: Any
    there: Any
    """Mask of the features that exist."""
    unit: Any
    num_units: Any
    num_features: Any
    end: Any
    total: Any
    """Number of steps of the sequence."""
    backwards: Any
    start: Any
    """State after a reset."""
    earliest: Any
    """State before the first step of the recurrence, in the backward pass."""


@triton.jit
def wide(x):
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def masked(here, place, HOW):
    if HOW.EVEN:
        return here
    else:
        return here & place.there


@triton.jit
def from_first_step(rows, place, offset, V: tl.constexpr, PACKED: tl.constexpr):
    """Return rows that begin at the first step of a sequence in the order of the scan, with strides in elements."""
    if rows.data[0] is None:
        return rows
    else:
        step = rows.step.to(tl.int64) * V
        at = place.batch * rows.batch * V
        if not PACKED:
            at += (place.backwards * (place.total - 1)).to(tl.int64) * step
            step *= 1 - 2 * place.backwards
        # `multiple_of` promises the alignment in bytes, on scalars, because the compiler loses it on other addresses.
        ALIGNMENT: tl.constexpr = V * (rows.data[0].dtype.element_ty.primitive_bitwidth // 8)
        data = ()
        for k in tl.static_range(len(rows.data)):
            data += (tl.multiple_of(rows.data[k] + at, ALIGNMENT) + offset,)
        return Rows(data, rows.batch, step)


@triton.jit
def packed_rows(tensors, place, u, COUNT: tl.constexpr):
    """Return the rows of the next steps of each chunk, if the sequences are packed."""
    rows = ()
    if tensors.offsets is not None:
        for t in tl.static_range(COUNT):
            time = tl.where(place.backwards != 0, place.total - 1 - (u + t), u + t)
            rows += (tl.load(tensors.offsets + time, u + t < place.end, other=0) + place.batch,)
    return rows


@triton.jit
def address(u, t, packed, step):
    """Return the offset of step t of each chunk (C, 1); u is the first step."""
    if len(packed) > 0:
        return packed[t] * step
    else:
        return u.to(tl.int64) * step + t * step


@triton.jit
def load_number(rows, at, mask, HOW):
    return number(wide(tl.load(rows.data[0] + at, mask, other=0.0)), HOW.PAIRS)


@triton.jit
def time_of(tensors, at, here, like):
    """Return the `time` of a step of each chunk, as the cells take it. Steps that are not there have a time of 0."""
    if tensors.dt.data[0] is None and tensors.bound is None:
        return ()
    else:
        one = tl.full((1, 1), 1.0, like.dtype)
        elapsed = one
        if tensors.dt.data[0] is not None:
            elapsed = tl.load(tensors.dt.data[0] + at, here, other=0.0).to(like.dtype)
        if tensors.bound is None:
            return (elapsed,)
        else:
            # Each logarithm is a float32 number and the rest of it.
            bound = tensors.bound
            return elapsed, one * bound[0] + bound[1], one * bound[2] + bound[3]


@triton.jit
def load(tensors, place, u, packed, HOW):
    """Return the inputs of the cell, the resets and the times of the steps of a tile."""
    inputs, resets, moments = (), (), ()
    for t in tl.static_range(HOW.T):
        here = u + t < place.end
        at = address(u, t, packed, tensors.x.step)
        x = ()
        for k in tl.static_range(len(tensors.x.data)):
            keeping = HOW.KEEPING[k]
            if HOW.PAIRS:
                # The second feature of a pair is 0.
                keeping = tl.where(place.feature % 2 == 0, keeping, 0.0).to(tensors.x.data[k].dtype.element_ty)
            x += number(wide(tl.load(tensors.x.data[k] + at, masked(here, place, HOW), other=keeping)), HOW.PAIRS)
        inputs += (x,)
        if tensors.reset.data[0] is not None:
            at = address(u, t, packed, tensors.reset.step)
            resets += (tl.load(tensors.reset.data[0] + at, here, other=0) != 0,)
        at = 0 if tensors.dt.data[0] is None else address(u, t, packed, tensors.dt.step)
        moments += (time_of(tensors, at, here, x[0]),)
    return inputs, resets, moments


@triton.jit
def forward_tile(tensors, place, u, state, HOW):
    """Write the states of a tile, if `out` is given. Return the last state, the decay of the tile, and its resets."""
    packed = packed_rows(tensors, place, u, HOW.T)
    inputs, resets, moments = load(tensors, place, u, packed, HOW)
    a, b, decay = (), (), ()
    for t in tl.static_range(HOW.T):
        a_t, b_t, _ = cell(inputs[t], moments[t], HOW)
        a += (a_t,)
        b += (b_t,)
    before = state
    if HOW.C > 1:
        before, state, decay = carries(a, b, resets, place.start, state, HOW.MAY_GROW)
    if tensors.out.data[0] is not None:
        out = tensors.out.data[0]
        for t in tl.static_range(HOW.T):
            before = step(before, a[t], b[t], resets[t] if len(resets) > 0 else None, place.start)
            at = address(u, t, packed, tensors.out.step)
            tl.store(out + at, features(before).to(out.dtype.element_ty), masked(u + t < place.end, place, HOW))
    return state if HOW.C > 1 else before, decay, resets


@triton.jit
def gradients(delta, changes, HOW):
    """Return the gradients of the inputs, from that of the state and the derivatives of the state."""
    found = ()
    if HOW.PAIRS:
        for k in tl.static_range(len(changes) // 2):
            found += (tl.interleave(gradient(delta, *changes[2 * k]), gradient(delta, *changes[2 * k + 1])),)
    else:
        for k in tl.static_range(len(changes)):
            found += (gradient(delta, *changes[k]),)
    return found


@triton.jit
def derived(x, time, previous, HOW):
    """Return the conjugate of a, and the derivatives of the state by the inputs, if the previous state is given."""
    a, _, derivatives = cell(x, time, HOW)
    changes = ()
    if len(previous) > 0:
        for k in tl.static_range(len(derivatives)):
            changes += (change(derivatives[k], previous),)
    return conjugate(a), changes


@triton.jit
def backward_tile(tensors, place, u, carry, sums, HOW):
    """Write the gradients of a tile, if `grads` is given. Return the carry, the sums, the decay and the resets.

    u counts from the last step of the recurrence to its first. The carry is the gradient of the state before a step:
    c = a (dL/dh + c of the following step). Across a reset, c is added to the gradient of the initial state and
    continues as 0. The first sum is that gradient; the others are the gradients of a bias.
    """
    # One more than the steps of a chunk, because the previous state is in the row of the next u.
    packed = packed_rows(tensors, place, u, HOW.T + 1)
    inputs, resets, moments = load(tensors, place, u, packed, HOW)
    WRITES: tl.constexpr = tensors.grads.data[0] is not None
    deltas, states = (), ()
    for t in tl.static_range(HOW.T):
        here = u + t < place.end
        at = address(u, t, packed, tensors.grad_out.step)
        deltas += (load_number(tensors.grad_out, at, masked(here, place, HOW), HOW),)
        if WRITES:
            # The state before the first step is not in `out`.
            at = address(u, t + 1, packed, tensors.out.step)
            inside = u + t < tl.minimum(place.end, place.total - 1)
            previous = load_number(tensors.out, at, masked(inside, place, HOW), HOW)
            previous = where(u + t == place.total - 1, place.earliest, previous)
            if len(resets) > 0:
                previous = where(resets[t], place.start, previous)
            states += (previous,)
        else:
            states += ((),)
    # Chunks need all a first. Otherwise float32 takes fewer instructions if all steps are derived first, and bfloat16
    # fewer registers if each is derived when its gradients are written (Triton 3.9, sm_90).
    FIRST: tl.constexpr = HOW.C > 1 or HOW.EXACT
    a, changes, decay = (), (), ()
    if FIRST:
        for t in tl.static_range(HOW.T):
            a_t, changes_t = derived(inputs[t], moments[t], states[t], HOW)
            a += (a_t,)
            changes += (changes_t,)
    before = carry
    if HOW.C > 1:
        before, carry, decay = carries(a, deltas, resets, None, carry, HOW.MAY_GROW)
    if WRITES:
        grads = tensors.grads.data[0]
        for t in tl.static_range(HOW.T):
            here = u + t < place.end
            mask = masked(here, place, HOW)
            delta = plus(deltas[t], before)
            at = address(u, t, packed, tensors.grads.step)
            if FIRST:
                a_t, changes_t = a[t], changes[t]
            else:
                a_t, changes_t = derived(inputs[t], moments[t], states[t], HOW)
            found = gradients(delta, changes_t, HOW)
            for k in tl.static_range(len(tensors.x.data)):
                tl.store(grads + at + k * place.num_features, found[k].to(grads.dtype.element_ty), mask)
            if tensors.grad_dt.data[0] is not None:
                by_time = gradient(delta, *changes_t[len(changes_t) - 1])
                if HOW.PAIRS:
                    by_time = tl.interleave(by_time, tl.zeros(by_time.shape, by_time.dtype))
                by_unit = tl.sum(tl.reshape(by_time, (HOW.C, HOW.F // HOW.V, HOW.V)), 2)
                at = address(u, t, packed, tensors.grad_dt.step)
                tl.store(tensors.grad_dt.data[0] + at, by_unit, here & (place.unit < place.num_units))
            before = times(a_t, delta)
            to_initial = tl.zeros(found[0].shape, found[0].dtype)
            if len(resets) > 0:
                to_initial = tl.where(resets[t], features(before), 0.0)
                before = where(resets[t], constant(before, 0.0), before)
            summed = (sums[0] + to_initial,)
            for k in tl.static_range(len(tensors.x.data)):
                summed += (sums[k + 1] + found[k],)
            sums = summed
    return carry if HOW.C > 1 else before, sums, decay, resets


@triton.jit
def carry_into(segment, state, products, ends, place):
    """Return the state before a segment, from the results of all segments before it, in their order."""
    PAIRS: tl.constexpr = len(state) > 1
    for before in range(segment):
        p = tl.load(products + before * place.num_features, place.there, other=1.0)
        l = tl.load(ends + before * place.num_features, place.there, other=0.0)
        kept, state = features(times(number(p, PAIRS), state)), features(state)
        # A decay that underflowed times an infinite state would be NaN; the division has the sign of the decay.
        kept = tl.where((p == 0) & (tl.abs(state) == INFINITY), state / p, kept)
        # An infinite decay marks a reset, because |a| <= 1.
        state = number(tl.where(p == INFINITY, l, kept + l), PAIRS)
    return state


@triton.jit
def recurrence(tensors, states, sizes, HOW):
    """Compute all states, or with `grad_out` the gradients; or without `out`, the products and ends of segments."""
    BACKWARD: tl.constexpr = tensors.grad_out.data[0] is not None
    PACKED: tl.constexpr = tensors.offsets is not None
    SUMMARY: tl.constexpr = tensors.out.data[0] is None
    SEGMENTS: tl.constexpr = states.products is not None
    A: tl.constexpr = tl.float64 if tensors.x.data[0].dtype.element_ty == tl.float64 else tl.float32

    num_features = sizes.num_units * HOW.V
    num_blocks = tl.cdiv(num_features, HOW.F)
    program = tl.program_id(0)
    batch = (program // num_blocks).to(tl.int64)
    block = program % num_blocks
    feature = block * HOW.F + tl.arange(0, HOW.F)[None, :]
    there = feature < num_features
    begin, end, total = 0, sizes.num_steps, sizes.num_steps
    sums_at = batch
    if PACKED:
        total = tl.load(states.lengths + batch).to(tl.int32)
        end = total
    if SEGMENTS:
        segment = (batch % sizes.num_segments).to(tl.int32)
        batch = batch // sizes.num_segments
        begin = segment * sizes.segment_steps
        end = tl.minimum(begin + sizes.segment_steps, sizes.num_steps)

    zero = number(tl.zeros((1, HOW.F), A), HOW.PAIRS)
    state, start, earliest = zero, zero, zero
    at = batch * num_features + feature
    if not SUMMARY:
        earliest = number(wide(tl.load(states.h + batch * states.h_batch + feature, there, other=0.0)), HOW.PAIRS)
        state = earliest
        if BACKWARD:
            state = number(wide(tl.load(states.grad_last + at, there, other=0.0)), HOW.PAIRS)
    if states.initial_state is not None:
        initial_at = batch * states.initial_batch + feature
        start = number(wide(tl.load(states.initial_state + initial_at, there, other=0.0)), HOW.PAIRS)
    place = Place(
        batch=batch,
        feature=feature,
        there=there,
        unit=block * (HOW.F // HOW.V) + tl.arange(0, HOW.F // HOW.V)[None, :],
        num_units=sizes.num_units,
        num_features=num_features,
        end=end,
        total=total,
        backwards=sizes.backwards,
        start=start,
        earliest=earliest,
    )
    if SEGMENTS:
        segments_at = batch * sizes.num_segments * num_features + feature
        if not SUMMARY:
            state = carry_into(segment, state, states.products + segments_at, states.ends + segments_at, place)

    tensors = Tensors(
        x=from_first_step(tensors.x, place, feature, HOW.V, PACKED),
        out=from_first_step(tensors.out, place, feature, HOW.V, PACKED),
        grad_out=from_first_step(tensors.grad_out, place, feature, HOW.V, PACKED),
        grads=from_first_step(tensors.grads, place, feature, HOW.V, PACKED),
        reset=from_first_step(tensors.reset, place, 0, 1, PACKED),
        dt=from_first_step(tensors.dt, place, 0, 1, PACKED),
        grad_dt=from_first_step(tensors.grad_dt, place, place.unit, 1, PACKED),
        offsets=tensors.offsets,
        bound=tensors.bound,
    )
    chunk = tl.arange(0, HOW.C)[:, None]
    decay = constant(zero, 1.0)
    any_reset = tl.zeros((1, 1), tl.int32)
    # Of the gradients of the initial state and of the inputs.
    sums = (tl.zeros((HOW.C, HOW.F), A),) * (len(tensors.x.data) + 1)
    for tile in tl.range(begin, end, HOW.C * HOW.T, num_stages=HOW.STAGES):
        u = tile + chunk * HOW.T
        if BACKWARD:
            state, sums, decay_of_tile, resets = backward_tile(tensors, place, u, state, sums, HOW)
        else:
            state, decay_of_tile, resets = forward_tile(tensors, place, u, state, HOW)
        if SUMMARY:
            decay = times(decay, decay_of_tile)
            for t in tl.static_range(len(resets)):
                any_reset = any_reset | tl.max(resets[t].to(tl.int32), 0)[None, :]

    if SUMMARY:
        segment_at = segments_at + segment * num_features
        tl.store(states.products + segment_at, tl.where(any_reset != 0, INFINITY, features(decay)), there)
        tl.store(states.ends + segment_at, features(state), there)
    else:
        is_last = True
        if SEGMENTS:
            is_last = segment == sizes.num_segments - 1
        if is_last:
            tl.store(states.after + at, features(state).to(states.after.dtype.element_ty), there)
        if states.grad_initial_state is not None:
            summed_at = sums_at * num_features + feature
            tl.store(states.grad_initial_state + summed_at, tl.sum(sums[0], 0)[None, :], there)
        if states.grad_bias is not None:
            for k in tl.static_range(len(tensors.x.data)):
                summed_at = (sums_at * len(tensors.x.data) + k) * num_features + feature
                tl.store(states.grad_bias + summed_at, tl.sum(sums[k + 1], 0)[None, :], there)


def kernel(function):
    """Compile a function. Only constants select another kernel, not numbers that are 1 or a multiple of 16, nor addresses
    that are a multiple of 16."""
    values = [
        name for name, parameter in signature(function).parameters.items() if parameter.annotation is not tl.constexpr
    ]
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
    x_batch,
    x_step,
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
    initial_batch=None,
    last=None,
    grad_last=None,
    grad_h=None,
    # Sums over the steps of a segment, (B, num_segments, N) and (B, num_segments, num_inputs N).
    grad_initial_state=None,
    grad_bias=None,
    # Offset of each packed step, and length of each packed sequence.
    offsets=None,
    lengths=None,
    # Decay and last state from a state of 0 of each segment, (B, num_segments, N).
    products=None,
    ends=None,
    # log(m) and log(1 - m) of the lower bound m of the decay, each as a float32 number and the rest of it.
    bound=None,
):
    dt_units = Rows((grad_dt,), dt_batch, dt_step)
    if grad_dt is not None:
        dt_units = Rows((grad_dt,), dt_batch.to(tl.int64) * num_units, dt_step.to(tl.int64) * num_units)
    recurrence(
        Tensors(
            x=Rows((x0, x1) if x2 is None else (x0, x1, x2), x_batch, x_step),
            out=Rows((out,), out_batch, out_step),
            grad_out=Rows((grad_out,), grad_out_batch, grad_out_step),
            grads=Rows((grads,), grads_batch, grads_step),
            reset=Rows((reset,), reset_batch, reset_step),
            dt=Rows((dt,), dt_batch, dt_step),
            grad_dt=dt_units,
            offsets=offsets,
            bound=bound,
        ),
        States(
            h=h,
            h_batch=h_batch,
            initial_state=initial_state,
            initial_batch=initial_batch,
            grad_last=grad_last,
            after=last if grad_out is None else grad_h,
            grad_initial_state=grad_initial_state,
            grad_bias=grad_bias,
            lengths=lengths,
            products=products,
            ends=ends,
        ),
        Sizes(num_steps, num_units, num_segments, segment_steps, backwards),
        How(
            CELL=CELL,
            ACTIVATION=ACTIVATION,
            KEEPING=KEEPING,
            C=C,
            T=T,
            F=F,
            V=V,
            EVEN=EVEN,
            STAGES=STAGES,
            EXACT=x0.dtype.element_ty == tl.float32,
            PAIRS=CELL == "mingru_rotation" or CELL == "complex_linear_scan",
            MAY_GROW=CELL == "linear_scan" or CELL == "complex_linear_scan",
        ),
    )
