"""Sequences of different lengths, packed as `torch.nn.utils.rnn.PackedSequence` packs them: (1, rows, *).

Step 0 of all sequences comes first, then step 1 of those that have one, and so on: `batch_sizes` (S), int64, on the
CPU, counts them; the longest sequence is the first. For the bodies that know no other way, rows are spread out to
(B, S, *) and gathered again. All of it scripts.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .shape import along
from .tracing import for_trace, is_tracing


def pack_index(lengths: Tensor, x: Tensor, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_sizes`, the order of the batch, and for each row its place in the flat (B, S, *), or (S, B, *), x."""
    num_steps = x.size(1 if batch_first else 0)
    lengths, order = lengths.cpu().sort(descending=True, stable=True)
    steps = torch.arange(num_steps, device=lengths.device).unsqueeze(1)
    there = steps < lengths
    batch_sizes = there.sum(1)[: int(lengths[0])]
    places = order * num_steps + steps if batch_first else steps * lengths.numel() + order
    return batch_sizes, order, places[there]


def padding(lengths: Tensor, x: Tensor, batch_first: bool) -> Tensor:
    """Where the padded x, (B, S, F) or (S, B, F), has no step: the same with F = 1."""
    steps = torch.arange(x.size(1 if batch_first else 0), device=x.device)
    missing = (steps >= lengths.to(x.device).unsqueeze(1)).unsqueeze(2)
    return missing if batch_first else missing.transpose(0, 1)


def shut(cell: str, inputs: list[Tensor], missing: Tensor) -> list[Tensor]:
    """Pre-activations that keep the state where there is no step (B, S, 1), as the gate to the candidate is shut."""
    admits = 1 if cell == "minlstm" else 0
    return [x.masked_fill(missing, -math.inf if index == admits else 0.0) for index, x in enumerate(inputs)]


def lengths_of(batch_sizes: Tensor) -> Tensor:
    """(B)"""
    batch = torch.arange(int(batch_sizes[0]), device=batch_sizes.device).unsqueeze(1)
    return (batch_sizes > batch).sum(1)


def spread_index(batch_sizes: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """(B, S): the row of each step, turned round within each sequence if `reverse`; and where there is none (row 0)."""
    lengths = lengths_of(batch_sizes).unsqueeze(1)
    steps = torch.arange(batch_sizes.numel(), device=batch_sizes.device).unsqueeze(0)
    missing = steps >= lengths
    if reverse:
        steps = lengths - 1 - steps
    first_rows = batch_sizes.cumsum(0) - batch_sizes
    rows = first_rows[steps.clamp_min(0)] + torch.arange(lengths.numel(), device=lengths.device).unsqueeze(1)
    return rows.masked_fill(missing, 0), missing


def gather_index(rows: Tensor, missing: Tensor) -> Tensor:
    """(rows): where in the flat (B * S) of `spread_index` each row went."""
    there = (~missing).flatten().nonzero().squeeze(1)
    index = torch.empty_like(there)
    index[rows.flatten()[there]] = there
    return index


def spread(sequence: Tensor, rows: Tensor, missing: Tensor, fill: float) -> Tensor:
    """(1, rows, *) to (B, S, *), with `fill` where there is no row."""
    flat = sequence.squeeze(0).index_select(0, rows.flatten().to(sequence.device))
    padded = torch.unflatten(flat, 0, [rows.size(0), rows.size(1)])
    return padded.masked_fill(along(missing.to(sequence.device), padded), fill)


def spread_mingru(
    gate: Tensor, candidate: Tensor, reset: Tensor | None, batch_sizes: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """What a minGRU that goes forward takes for packed rows in either direction, and the index for `gather`."""
    rows, missing = spread_index(batch_sizes, reverse)
    # Where a sequence has ended, a shut gate keeps its state.
    gate = spread(gate, rows, missing, -math.inf)
    candidate = spread(candidate, rows, missing, 0.0)
    reset = None if reset is None else spread(reset, rows, missing, 0.0)
    return gate, candidate, reset, gather_index(rows, missing)


def gather(padded: Tensor, index: Tensor) -> Tensor:
    """Back to (1, rows, *)."""
    return padded.flatten(0, 1).index_select(0, index.to(padded.device)).unsqueeze(0)


def one_step_on(reset: Tensor, batch_sizes: Tensor | None) -> Tensor:
    """The mask, (B, S) or (1, rows), whose step t is step t + 1 of this one, and false at each sequence's end."""
    if batch_sizes is None or batch_sizes.dtype == torch.bool:
        return F.pad(reset, [0, 1], value=0.0)[:, 1:]
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        if is_tracing():
            return for_trace(one_step_on)(reset, batch_sizes)
    following = batch_sizes[1:]
    first_rows = batch_sizes.cumsum(0) - batch_sizes
    batch = torch.arange(int(batch_sizes[0]), device=batch_sizes.device).unsqueeze(0)
    there = batch < following.unsqueeze(1)
    before = (first_rows[:-1].unsqueeze(1) + batch)[there]
    after = (first_rows[1:].unsqueeze(1) + batch)[there]
    moved = torch.zeros_like(reset)
    moved[:, before.to(reset.device)] = reset[:, after.to(reset.device)]
    return moved
