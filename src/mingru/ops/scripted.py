"""The `"torch"` body's twin for TorchScript: the same chunks, out of place, so that TorchScript's autograd follows it.

A scripted module runs without this package, so it can call neither `torch.autograd.Function` nor an operator registered
here. `body_torch` explains the method; where memory is not the caller's own, stepping through the chunks a second time
from their carries is as quick as keeping the products of the decays.
"""

import torch
from torch import Tensor

from . import packed
from .activation import activate
from .cell import as_mingru
from .shape import States, accumulate_dtype, along, chunks_of

Step = tuple[Tensor, Tensor, Tensor]


def recurrence(
    cell: str,
    inputs: list[Tensor],
    h: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    activation: str,
    reverse: bool,
    batch_sizes: Tensor | None,
) -> States:
    gate, candidate = as_mingru(cell, inputs)
    if batch_sizes is None:
        out, last = mingru(gate, candidate, h, initial, reset, activation, reverse)
    else:
        gate, candidate, reset, index = packed.spread_mingru(gate, candidate, reset, batch_sizes, reverse)
        out, last = mingru(gate, candidate, h, initial, reset, activation, False)
        out = packed.gather(out, index)
    return out.to(inputs[0].dtype), last


def mingru(
    gate: Tensor, candidate: Tensor, h: Tensor, initial: Tensor, reset: Tensor | None, activation: str, reverse: bool
) -> States:
    if gate.numel() == 0:
        return gate * candidate, h.clone()
    dtype = accumulate_dtype(gate.dtype)
    k, v = gate.to(dtype), candidate.to(dtype)
    a, b = (-k).sigmoid(), k.sigmoid() * activate(v, activation)
    if reset is not None:
        mask = along(reset, b)
        b = torch.where(mask, torch.addcmul(b, a, initial.to(dtype)), b)
        # Masked rather than multiplied by 0 below, so that not even NaN crosses a reset.
        a = a.masked_fill(mask, 0.0)
    out, last = _scan(a, b, h.to(dtype).squeeze(1), reset, reverse)
    return out.to(gate.dtype), last.unsqueeze(1).to(h.dtype)


def _scan(a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool) -> States:
    """The states (B, S, *), and the last of them (B, *), from a state h (B, *)."""
    num_steps = b.size(1)
    count, size = chunks_of(num_steps)
    cut = count * size
    masked = reset is not None
    cuts = torch.zeros([b.size(0), num_steps], dtype=torch.bool, device=b.device) if reset is None else reset
    states: list[Tensor] = []
    if reverse:
        rest, h = _steps(a[:, cut:], b[:, cut:], h, cuts[:, cut:], masked, 1, reverse)
        states.append(rest)
    if cut > 0:
        chunks, h = _chunks(
            torch.unflatten(a[:, :cut], 1, [count, size]),
            torch.unflatten(b[:, :cut], 1, [count, size]),
            h,
            torch.unflatten(cuts[:, :cut], 1, [count, size]),
            masked,
            reverse,
        )
        states.append(chunks.flatten(1, 2))
    if reverse:
        states.reverse()
    else:
        rest, h = _steps(a[:, cut:], b[:, cut:], h, cuts[:, cut:], masked, 1, reverse)
        states.append(rest)
    return torch.cat(states, 1), h


def _chunks(a: Tensor, b: Tensor, h: Tensor, cuts: Tensor, masked: bool, reverse: bool) -> States:
    """a, b (B, C, T, *): the end of every chunk from a state of 0, then the carries, then all states from them."""
    local = torch.zeros_like(b.select(2, 0))
    decay = torch.ones_like(local)
    for a_t, b_t, cut_t in _in_order(a, b, cuts, 2, reverse):
        local = torch.addcmul(b_t, a_t, _before(local, cut_t, masked))
        decay = decay * a_t
    carries: list[Tensor] = []
    for decay_c, local_c, cut_c in _in_order(decay, local, cuts.any(2), 1, reverse):
        carries.append(h)
        h = torch.addcmul(local_c, decay_c, _before(h, cut_c, masked))
    if reverse:
        carries.reverse()
    states, _ = _steps(a, b, torch.stack(carries, 1), cuts, masked, 2, reverse)
    return states, h


def _steps(a: Tensor, b: Tensor, h: Tensor, cuts: Tensor, masked: bool, dim: int, reverse: bool) -> States:
    if b.size(dim) == 0:
        return b, h
    states: list[Tensor] = []
    for a_t, b_t, cut_t in _in_order(a, b, cuts, dim, reverse):
        h = torch.addcmul(b_t, a_t, _before(h, cut_t, masked))
        states.append(h)
    if reverse:
        states.reverse()
    return torch.stack(states, dim), h


def _before(h: Tensor, cut: Tensor, masked: bool) -> Tensor:
    return h.masked_fill(along(cut, h), 0.0) if masked else h


def _in_order(a: Tensor, b: Tensor, cuts: Tensor, dim: int, reverse: bool) -> list[Step]:
    steps: list[Step] = []
    for a_t, b_t, cut_t in zip(a.unbind(dim), b.unbind(dim), cuts.unbind(dim)):  # noqa: B905 (not in TorchScript)
        steps.append((a_t, b_t, cut_t))
    if reverse:
        steps.reverse()
    return steps
