"""Sequences in every layout as the linear scan of (B, S, *) that all backends compute, and back. All of it scripts.

Packed sequences are (rows, *), as `torch.nn.utils.rnn.PackedSequence` packs them: first step 0 of all sequences, then
step 1 of those that have one, and so on. `batch_sizes` (S), int64, on the CPU, counts them; the longest sequence is the
first.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Layout, Spec, Start
from .cells import coefficients
from .graph import for_trace, is_scripting, is_tracing
from .shape import States, along, as_dtype


class LinearScan(NamedTuple):
    """h_t = a_t h_{t-1} + b_t, where a reset sets h_{t-1} to 0."""

    a: Tensor
    """(B, S, *), in the accumulation dtype; so are b and h."""
    b: Tensor
    h: Tensor
    """(B, 1, *)"""
    reset: Tensor | None
    """(B, S) bool"""
    reverse: bool


def padded_call(
    spec: Spec, inputs: list[Tensor], start: Start, layout: Layout
) -> tuple[Spec, list[Tensor], Start, Layout]:
    """Return the same call in batch-first order, unpacked: padding instead of `batch_sizes`, always forward then."""
    reset = start.reset
    batch_sizes = layout.batch_sizes
    if batch_sizes is not None:
        rows, padding = unpack_index(batch_sizes, spec.reverse)
        inputs = [unpack(x, rows, padding) for x in inputs]
        if reset is not None:
            reset = unpack(reset, rows, padding)
        return (
            Spec(spec.cell, spec.activation, False),
            inputs,
            Start(start.h, start.initial_state, reset),
            Layout(False, None, padding.to(inputs[0].device)),
        )
    if layout.time_first:
        padding_or_none = layout.padding
        return (
            spec,
            [x.transpose(0, 1) for x in inputs],
            Start(start.h, start.initial_state, None if reset is None else reset.transpose(0, 1)),
            Layout(False, None, None if padding_or_none is None else padding_or_none.transpose(0, 1)),
        )
    return spec, inputs, start, layout


def as_linear_scan(spec: Spec, inputs: list[Tensor], start: Start, layout: Layout) -> LinearScan:
    """Return the scan that a cell computes; the call is in the form of `padded_call`."""
    a, b = coefficients(spec, inputs)
    padding = layout.padding
    if padding is not None:
        mask = along(padding, a)
        a, b = a.masked_fill(mask, 1.0), b.masked_fill(mask, 0.0)
    reset = start.reset
    if reset is not None:
        b = torch.where(along(reset, b), torch.addcmul(b, a, as_dtype(start.initial_state, b.dtype)), b)
    return LinearScan(a, b, as_dtype(start.h, b.dtype), reset, spec.reverse)


def in_layout(spec: Spec, states: States, like: Tensor, h: Tensor, layout: Layout) -> States:
    """Return the states (B, S, *) in the layout, and in the dtypes, of an input and of h."""
    out, last = states
    out = as_dtype(out, like.dtype)
    batch_sizes = layout.batch_sizes
    if batch_sizes is not None:
        rows, padding = unpack_index(batch_sizes, spec.reverse)
        out = pack(out, pack_index(rows, padding))
    elif layout.time_first:
        # A copy, because outputs are contiguous and no view. Not in place, because backward keeps `out`.
        out = out.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    return out, as_dtype(last, h.dtype)


def rows_are_swapped(x: Tensor) -> bool:
    """Whether the first two dimensions of a sequence (B, S, I) or (S, B, I) are in reverse order in memory."""
    return not x.is_contiguous() and x.dim() == 3 and x.stride(0) < x.stride(1)


def rows_from_lengths(lengths: Tensor, x: Tensor, time_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return `batch_sizes`, the order of the batch, and the index of each row in the flattened x."""
    num_steps = x.size(0 if time_first else 1)
    lengths, order = lengths.cpu().sort(descending=True, stable=True)
    steps = torch.arange(num_steps, device=lengths.device).unsqueeze(1)
    exists = steps < lengths
    batch_sizes = exists.sum(1)[: int(lengths[0])]
    index = steps * lengths.numel() + order if time_first else order * num_steps + steps
    return batch_sizes, order, index[exists]


def padding_from_lengths(lengths: Tensor, x: Tensor, time_first: bool) -> Tensor:
    """Return the steps of x, (B, S, *) or (S, B, *), that do not exist: (B, S) or (S, B)."""
    steps = torch.arange(x.size(0 if time_first else 1), device=x.device)
    padding = steps >= lengths.to(x.device).unsqueeze(1)
    return padding.transpose(0, 1) if time_first else padding


def unpack_index(batch_sizes: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Return (B, S) indices of each step's row, and the mask of padding, whose index is 0.

    If `reverse`, the steps are reversed within each sequence.
    """
    batch = torch.arange(int(batch_sizes[0]), device=batch_sizes.device).unsqueeze(1)
    lengths = (batch_sizes > batch).sum(1).unsqueeze(1)
    steps = torch.arange(batch_sizes.numel(), device=batch_sizes.device).unsqueeze(0)
    padding = steps >= lengths
    if reverse:
        steps = lengths - 1 - steps
    first_rows = batch_sizes.cumsum(0) - batch_sizes
    rows = first_rows[steps.clamp_min(0)] + batch
    return rows.masked_fill(padding, 0), padding


def unpack(sequence: Tensor, rows: Tensor, padding: Tensor) -> Tensor:
    """Return packed (rows, *) as (B, S, *), with 0 in the padding."""
    flat = sequence.index_select(0, rows.flatten().to(sequence.device))
    padded = torch.unflatten(flat, 0, [rows.size(0), rows.size(1)])
    return padded.masked_fill(along(padding.to(sequence.device), padded), 0.0)


def pack_index(rows: Tensor, padding: Tensor) -> Tensor:
    """Return (rows): where in the flat (B * S) of `unpack_index` each row is."""
    exists = (~padding).flatten().nonzero().squeeze(1)
    index = torch.empty_like(exists)
    index[rows.flatten()[exists]] = exists
    return index


def pack(padded: Tensor, index: Tensor) -> Tensor:
    """Return (B, S, *) as packed (rows, *)."""
    return padded.flatten(0, 1).index_select(0, index.to(padded.device))


def reset_seen_in_reverse(reset: Tensor, layout: Layout) -> Tensor:
    """Return the reset mask of the reverse direction.

    A reset is the boundary before step t. In reverse order that boundary comes before step t - 1, so the mask moves by
    one step, and is False at the end of each sequence.
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
    following = batch_sizes[1:]
    first_rows = batch_sizes.cumsum(0) - batch_sizes
    batch = torch.arange(int(batch_sizes[0]), device=batch_sizes.device).unsqueeze(0)
    exists = batch < following.unsqueeze(1)
    before = (first_rows[:-1].unsqueeze(1) + batch)[exists]
    after = (first_rows[1:].unsqueeze(1) + batch)[exists]
    moved = torch.zeros_like(reset)
    moved[before.to(reset.device)] = reset[after.to(reset.device)]
    return moved
