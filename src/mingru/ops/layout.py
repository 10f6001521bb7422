"""Convert sequences of every layout to (B, S, *), the layout in which all backends scan, and back.

Packed data is (P, *), as in `torch.nn.utils.rnn.PackedSequence`: step 0 of all sequences, then step 1 of the sequences
that have a step 1, and so on, P steps in total. The longest sequence is the first. `batch_sizes` (S), int64, on the
CPU, counts the sequences that have each step. Everything here is scriptable.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Layout, Spec, Start
from .cells import coefficients, is_complex
from .graph import for_trace, is_scripting, is_tracing
from .shape import States, along, as_dtype, from_pairs, one_like, plus_times, to_pairs


class LinearScan(NamedTuple):
    """The scan h_t = a_t h_{t-1} + b_t. A reset sets h_{t-1} to 0. a, b and h have the accumulation dtype."""

    a: Tensor
    """Decays, (B, S, *)."""
    b: Tensor
    """Inputs, (B, S, *)."""
    h: Tensor
    """State before the first step, (B, 1, *)."""
    reset: Tensor | None
    """Boolean reset mask, (B, S)."""
    reverse: bool
    """Whether the scan runs from the last step to the first."""


def padded_call(
    spec: Spec, inputs: list[Tensor], start: Start, layout: Layout
) -> tuple[Spec, list[Tensor], Start, Layout]:
    """Return the same call for batch-first sequences.

    Packed sequences become padded. They are reversed while unpacking, so that the returned call runs forward.
    """
    reset, dt = start.reset, start.dt
    batch_sizes = layout.batch_sizes
    if batch_sizes is not None:
        index, padding = unpack_index(batch_sizes, spec.reverse)
        inputs = [unpack(x, index, padding) for x in inputs]
        if reset is not None:
            reset = unpack(reset, index, padding)
        if dt is not None:
            dt = unpack(dt, index, padding)
        return (
            Spec(spec.cell, spec.activation, False, spec.min_decay),
            inputs,
            Start(start.h, start.initial_state, reset, dt),
            Layout(False, None, padding.to(inputs[0].device)),
        )
    if layout.time_first:
        padding_or_none = layout.padding
        return (
            spec,
            [x.transpose(0, 1) for x in inputs],
            Start(
                start.h,
                start.initial_state,
                None if reset is None else reset.transpose(0, 1),
                None if dt is None else dt.transpose(0, 1),
            ),
            Layout(False, None, None if padding_or_none is None else padding_or_none.transpose(0, 1)),
        )
    return spec, inputs, start, layout


def as_linear_scan(spec: Spec, inputs: list[Tensor], start: Start, layout: Layout) -> LinearScan:
    """Return the scan that a cell computes, of pairs if `is_complex`. The call must come from `padded_call`."""
    a, b = coefficients(spec, inputs, start.dt)
    pairs = is_complex(spec)
    padding = layout.padding
    if padding is not None:
        mask = along(padding, a)
        a, b = torch.where(mask, one_like(a, pairs), a) if pairs else a.masked_fill(mask, 1.0), b.masked_fill(mask, 0.0)
    h, initial_state = start.h, start.initial_state
    if pairs:
        h, initial_state = to_pairs(h), to_pairs(initial_state.expand_as(h))
    reset = start.reset
    if reset is not None:
        b = torch.where(along(reset, b), plus_times(b, a, as_dtype(initial_state, b.dtype), pairs), b)
    return LinearScan(a, b, as_dtype(h, b.dtype), reset, spec.reverse)


def in_layout(spec: Spec, states: States, like: Tensor, h: Tensor, layout: Layout) -> States:
    """Return states (B, S, *) in the given layout and the dtype of `like`, and the last state in the dtype of h."""
    out, last = states
    if is_complex(spec):
        out, last = from_pairs(out), from_pairs(last)
    out = as_dtype(out, like.dtype)
    batch_sizes = layout.batch_sizes
    if batch_sizes is not None:
        index, padding = unpack_index(batch_sizes, spec.reverse)
        out = pack(out, pack_index(index, padding))
    elif layout.time_first:
        # A copy, because outputs must be contiguous and not views. Not in place, because backward keeps `out`.
        out = out.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    return out, as_dtype(last, h.dtype)


def is_transposed(x: Tensor) -> bool:
    """Return whether the first two dimensions of a sequence (B, S, I) or (S, B, I) are in reverse order in memory."""
    return not x.is_contiguous() and x.dim() == 3 and x.stride(0) < x.stride(1)


def packing_from_lengths(lengths: Tensor, x: Tensor, time_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return `batch_sizes`, the order of the batch, and the index of each packed step in the flattened x."""
    num_steps = x.size(0 if time_first else 1)
    lengths, order = lengths.cpu().sort(descending=True, stable=True)
    steps = torch.arange(num_steps, device=lengths.device).unsqueeze(1)
    exists = steps < lengths
    batch_sizes = exists.sum(1)[: int(lengths[0])]
    index = steps * lengths.numel() + order if time_first else order * num_steps + steps
    return batch_sizes, order, index[exists]


def padding_from_lengths(lengths: Tensor, x: Tensor, time_first: bool) -> Tensor:
    """Return the mask of padded steps of x, (B, S) or (S, B)."""
    steps = torch.arange(x.size(0 if time_first else 1), device=x.device)
    padding = steps >= lengths.to(x.device).unsqueeze(1)
    return padding.transpose(0, 1) if time_first else padding


def unpack_index(batch_sizes: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Return the packed index of each step, (B, S), and the mask of padded steps, whose index is 0.

    If `reverse`, the steps are reversed within each sequence.
    """
    batch = torch.arange(int(batch_sizes[0]), device=batch_sizes.device).unsqueeze(1)
    lengths = (batch_sizes > batch).sum(1).unsqueeze(1)
    steps = torch.arange(batch_sizes.numel(), device=batch_sizes.device).unsqueeze(0)
    padding = steps >= lengths
    if reverse:
        steps = lengths - 1 - steps
    offsets = batch_sizes.cumsum(0) - batch_sizes
    index = offsets[steps.clamp_min(0)] + batch
    return index.masked_fill(padding, 0), padding


def unpack(packed: Tensor, index: Tensor, padding: Tensor) -> Tensor:
    """Return packed data (P, *) as padded data (B, S, *), with 0 in the padding."""
    flat = packed.index_select(0, index.flatten().to(packed.device))
    padded = torch.unflatten(flat, 0, [index.size(0), index.size(1)])
    return padded.masked_fill(along(padding.to(packed.device), padded), 0.0)


def pack_index(index: Tensor, padding: Tensor) -> Tensor:
    """Return the inverse of `unpack_index`: for each of the P packed steps, its index in the flattened (B * S)."""
    exists = (~padding).flatten().nonzero().squeeze(1)
    inverse = torch.empty_like(exists)
    inverse[index.flatten()[exists]] = exists
    return inverse


def pack(padded: Tensor, inverse: Tensor) -> Tensor:
    """Return padded data (B, S, *) as packed data (P, *)."""
    return padded.flatten(0, 1).index_select(0, inverse.to(padded.device))


def reset_seen_in_reverse(reset: Tensor, layout: Layout) -> Tensor:
    """Return the reset mask of the reverse direction.

    A reset at step t is a boundary between the steps t - 1 and t. The reverse direction crosses that boundary before
    step t - 1, so the mask moves by one step and is False at the end of each sequence.
    """
    batch_sizes = layout.batch_sizes
    if batch_sizes is None:
        if layout.time_first:
            return F.pad(reset, [0, 0, 0, 1], value=0.0)[1:]
        return F.pad(reset, [0, 1], value=0.0)[:, 1:]
    if not is_scripting():
        if is_tracing():
            return for_trace(_packed_reset_seen_in_reverse)(reset, batch_sizes)
    return _packed_reset_seen_in_reverse(reset, batch_sizes)


def _packed_reset_seen_in_reverse(reset: Tensor, batch_sizes: Tensor) -> Tensor:
    return _packed_next(reset, torch.zeros_like(reset), batch_sizes)


def dt_seen_in_reverse(dt: Tensor, layout: Layout) -> Tensor:
    """Return the elapsed times of the reverse direction.

    dt at step t is the time between the steps t - 1 and t. The reverse direction crosses it before step t - 1, so the
    times move by one step. Before the last step it uses the time before the first step, which no other step uses.
    """
    batch_sizes = layout.batch_sizes
    if batch_sizes is not None:
        if not is_scripting():
            if is_tracing():
                return for_trace(_packed_dt_seen_in_reverse)(dt, batch_sizes)
        return _packed_dt_seen_in_reverse(dt, batch_sizes)
    padding = layout.padding
    if layout.time_first:
        if padding is not None:
            dt = torch.where(padding, dt[:1], dt)
        return torch.cat([dt, dt[:1]])[1:]
    if padding is not None:
        dt = torch.where(padding, dt[:, :1], dt)
    # Not dt[:, 1:] first, because export would add a guard on its size.
    return torch.cat([dt, dt[:, :1]], 1)[:, 1:]


def _packed_dt_seen_in_reverse(dt: Tensor, batch_sizes: Tensor) -> Tensor:
    batch = torch.arange(int(batch_sizes[0]), device=batch_sizes.device).unsqueeze(0)
    exists = batch < batch_sizes.unsqueeze(1)
    # The first times of all sequences are the first packed values.
    sequence = batch.expand_as(exists)[exists]
    return _packed_next(dt, dt.index_select(0, sequence.to(dt.device)), batch_sizes)


def _packed_next(x: Tensor, at_end: Tensor, batch_sizes: Tensor) -> Tensor:
    """Return the packed value of the next step of each sequence, and `at_end` at its last step."""
    following = batch_sizes[1:]
    offsets = batch_sizes.cumsum(0) - batch_sizes
    batch = torch.arange(int(batch_sizes[0]), device=batch_sizes.device).unsqueeze(0)
    exists = batch < following.unsqueeze(1)
    before = (offsets[:-1].unsqueeze(1) + batch)[exists]
    after = (offsets[1:].unsqueeze(1) + batch)[exists]
    return at_end.index_copy(0, before.to(x.device), x.index_select(0, after.to(x.device)))
