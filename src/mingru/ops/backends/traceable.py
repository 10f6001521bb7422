"""The traceable version of the `"torch"` backend: out-of-place operations that a graph can capture for any length.

TorchScript, `torch.export`, ONNX and `torch.compile` capture these functions and differentiate them. A captured graph
cannot loop over an unknown length, so the number of operations must not depend on the length. The sequence is split
into C chunks of 16 steps. All chunks are processed in parallel, one step at a time, each from a state of 0; the
cumulative decay is computed too. Then the last states of the chunks are combined by recursive doubling:

    h_c <- h_c + P_c h_{c-d}      P_c <- P_c P_{c-d}      d = 1, 2, 4, ... below C

h_c and P_c first cover only chunk c, then the last 2, 4, ... chunks. Finally one multiply-add adds the carry-in of each
chunk. For 0 <= a <= 1 and b >= 0 only non-negative terms are added, so nothing cancels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import Backend
from ..call import Call, Layout, LayoutTuple, Spec, SpecTuple, Start, StartTuple, call_of
from ..graph import for_trace, is_old_onnx, is_scripting, is_true_for_all_sizes
from ..layout import as_linear_scan, divided, in_layout, joined, padded_call
from ..private import is_exporting
from ..scan import LinearScan
from ..shape import States, along, empty_states, one_like, plus_times, times


def recurrence(spec: Spec, inputs: list[Tensor], start: Start, layout: Layout) -> States:
    """Compute the recurrence of a cell. A saved scripted module contains this function and needs no mingru."""
    return joined([_of_cell(call) for call in divided(Call(spec, inputs, start, layout))], layout)


def _of_cell(call: Call) -> States:
    if call.tensors[0].numel() == 0:
        return empty_states(torch.stack(call.tensors).sum(0), call.start.h)
    return in_layout(scan(as_linear_scan(padded_call(call))), call)


@for_trace
def traced_recurrence(spec: SpecTuple, inputs: list[Tensor], start: StartTuple, layout: LayoutTuple) -> States:
    """Call `recurrence` from a trace."""
    call = call_of(spec, inputs, start, layout)
    return recurrence(call.spec, inputs, call.start, call.layout)


@for_trace
def linear_scan(a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool) -> States:
    """Compute h_t = a_t h_{t-1} + b_t. a, b and h have the same dtype."""
    if b.numel() == 0:
        return empty_states(a * b, h)
    return scan(LinearScan(a, b, h, reset, reverse, 1))


def scan(call: LinearScan) -> States:
    """Compute the scan."""
    out, last = _scan(call.a, call.b, call.h.squeeze(1), call.reset, call.reverse, call.parts)
    return out, last.unsqueeze(1)


def chunk_size() -> int:
    """Return the number of steps of a chunk. A function, because TorchScript cannot read a global number."""
    return 16


def _scan(a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool, parts: int) -> States:
    """Return the states (B, S, *) and the last state (B, *); h (B, *) is the state before the first step."""
    num_steps, chunk = b.size(1), chunk_size()
    if _is_short(num_steps, chunk):
        resets = [] if reset is None else _in_order(list(reset.unbind(1)), reverse)
        steps = _in_order(list(a.unbind(1)), reverse), _in_order(list(b.unbind(1)), reverse)
        states = _step(steps[0], steps[1], resets, h, parts)
        return torch.stack(_in_order(states, reverse), 1), states[-1]

    # One or two more than needed, so that the size is never 1: export would add a guard on a size that may be 1.
    num_chunks = num_steps // chunk + 2
    more = num_chunks * chunk - num_steps
    # A decay of 1 and an input of 0 keep the state.
    a_t = _step_by_step(_padded_with_ones(a, more, parts), num_chunks, chunk, reverse)
    b_t = _step_by_step(_padded(b, more, 0.0), num_chunks, chunk, reverse)
    resets = [] if reset is None else _step_by_step(_padded(reset, more, 0.0), num_chunks, chunk, reverse)
    local = [b_t[0]] + _step(a_t[1:], b_t[1:], resets[1:], b_t[0], parts)  # noqa: RUF005 (not in TorchScript)
    decay, seen_reset = _cumulative_decays(a_t, resets, parts)
    before, last = _combined(decay[-1], local[-1], None if reset is None else seen_reset[-1], h, reverse, parts)
    carry_in = before.unsqueeze(2)
    if reset is not None:
        mask = along(torch.stack(_in_order(seen_reset, reverse), 2), carry_in)
        carry_in = torch.where(mask, 0.0, carry_in)
    all_local, all_decays = torch.stack(_in_order(local, reverse), 2), torch.stack(_in_order(decay, reverse), 2)
    out = plus_times(all_local, all_decays, carry_in, parts)
    # Not `flatten`, because it has no rule for `is_grads_batched`.
    shape = [out.size(0), -1] + list(out.shape[3:])  # noqa: RUF005 (not in TorchScript)
    # Not a slice, because it would depend on which of two lengths is smaller. Not `pad`, because ExecuTorch refuses
    # negative numbers.
    return out.reshape(shape).index_select(1, torch.arange(num_steps, device=out.device)), last


def _is_short(num_steps: int, chunk: int) -> bool:
    """Return whether the number of steps is at most `chunk` and, in a captured graph, fixed."""
    if is_old_onnx():
        return num_steps == 1
    for count in range(chunk + 1):  # noqa: SIM110 (not in TorchScript)
        if is_true_for_all_sizes(num_steps == count):
            return True
    return False


def _reaches(distance: int, count: int) -> bool:
    """Return whether recursive doubling has covered all chunks."""
    if is_old_onnx():
        return False
    known = is_true_for_all_sizes(distance >= count)
    if is_scripting():
        return known
    else:
        # `torch.compile` may add guards: one more graph for more than 4096 steps, and one for more than a million.
        may_guard = distance in (1 << 8, 1 << 16) and not is_exporting()
        return known or (may_guard and distance >= count)


def _in_order(steps: list[Tensor], reverse: bool) -> list[Tensor]:
    """Return the steps in the order of the scan. A second call restores the order of time."""
    return steps[::-1] if reverse else steps


def _padded(x: Tensor, more: int, value: float) -> Tensor:
    """Append `more` steps to dimension 1."""
    # F.pad takes the last dimension first.
    return F.pad(x, [0, 0] * (x.dim() - 2) + [0, more], value=value)


def _padded_with_ones(a: Tensor, more: int, parts: int) -> Tensor:
    if parts == 1:
        return _padded(a, more, 1.0)
    others = [_padded(a.select(-1, part), more, 0.0) for part in range(1, parts)]
    return torch.stack([_padded(a.select(-1, 0), more, 1.0)] + others, -1)  # noqa: RUF005 (not in TorchScript)


def _step_by_step(x: Tensor, num_chunks: int, chunk: int, reverse: bool) -> list[Tensor]:
    """Split (B, C * chunk, *) into `chunk` tensors (B, C, *): the first steps of all chunks, the second steps, ..."""
    if is_scripting():
        # One view, because its gradient is a single copy.
        return _in_order(list(torch.unflatten(x, 1, [num_chunks, chunk]).unbind(2)), reverse)
    else:
        # Slices, because a captured graph cannot prove that the view is valid for every C.
        return _in_order([x[:, step::chunk] for step in range(chunk)], reverse)


def _step(a: list[Tensor], b: list[Tensor], resets: list[Tensor], h: Tensor, parts: int) -> list[Tensor]:
    """Return the states, computed one step after the other. If there are no resets, `resets` is empty."""
    states: list[Tensor] = []
    for index in range(len(b)):
        if len(resets) > 0:
            # Masked instead of multiplied by 0, so that NaN does not pass a reset.
            h = h.masked_fill(along(resets[index], h), 0.0)
        h = plus_times(b[index], a[index], h, parts)
        states.append(h)
    return states


def _cumulative_decays(a: list[Tensor], resets: list[Tensor], parts: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the cumulative decay up to each step, and whether the steps up to it contain a reset."""
    decays: list[Tensor] = []
    seen_reset: list[Tensor] = []
    for index in range(len(a)):
        decay = a[0] if index == 0 else times(a[index], decays[-1], parts)
        if len(resets) > 0:
            decay = decay.masked_fill(along(resets[index], decay), 0.0)
            seen_reset.append(resets[0] if index == 0 else seen_reset[-1] | resets[index])
        decays.append(decay)
    return decays, seen_reset


def _combined(decay: Tensor, state: Tensor, seen_reset: Tensor | None, h: Tensor, reverse: bool, parts: int) -> States:
    """Return the carry-in of each chunk (B, C, *) and the last state (B, *) from the results of the chunks.

    decay and state (B, C, *) are the cumulative decay and the last state of each chunk, computed from a state of 0.
    `seen_reset` (B, C) marks chunks that contain a reset.
    """
    first = h.unsqueeze(1)
    state = torch.cat([state, first] if reverse else [first, state], 1)
    one = one_like(first, parts)
    decay = torch.cat([decay, one] if reverse else [one, decay], 1)
    if seen_reset is not None:
        no_reset = torch.zeros_like(seen_reset[:, :1])
        seen_reset = torch.cat([seen_reset, no_reset] if reverse else [no_reset, seen_reset], 1)
    count = state.size(1)
    positions = torch.arange(count, device=state.device)
    distance = 1
    # At most 268 million steps in a graph whose length has no bound.
    while distance < 1 << 24 and not _reaches(distance, count):
        sources = positions + distance if reverse else positions - distance
        # Chunks with fewer than `distance` chunks before them are complete; their decay is no longer used.
        stop = (sources != sources.clamp(0, count - 1)).unsqueeze(0)
        sources = sources.clamp(0, count - 1)
        if seen_reset is not None:
            stop = stop | seen_reset
        state = plus_times(state, decay, state.index_select(1, sources).masked_fill(along(stop, state), 0.0), parts)
        decay = times(decay, decay.index_select(1, sources), parts)
        if seen_reset is not None:
            decay = decay.masked_fill(along(seen_reset, decay), 0.0)
            seen_reset = seen_reset | seen_reset.index_select(1, sources)
        distance *= 2
    if not is_scripting():
        if is_exporting():
            # NaN, because otherwise nothing would show that a sequence is longer than the graph supports.
            state = state.masked_fill(positions[-1] >= distance, torch.nan)
    if reverse:
        return state[:, 1:], state[:, 0]
    else:
        return state[:, :-1], state[:, -1]


BACKEND = Backend(scan=scan)
