"""The traceable version of the `"torch"` backend: out-of-place operations that a graph can capture for any length.

TorchScript, `torch.export`, ONNX and `torch.compile` capture these functions and differentiate them. A captured graph
cannot loop over an unknown length, so the number of operations must not depend on the length. The sequence is split
into C chunks of 16 steps, or fewer if it is known to be short. All chunks are processed in parallel, one step at a
time, each from a state of 0; the cumulative decay is computed too. Then the last states of the chunks are combined: one
after the other if their number is known to be small, otherwise by recursive doubling:

    h_c <- h_c + P_c h_{c-d}      P_c <- P_c P_{c-d}      d = 1, 2, 4, ... up to C

At first, h_c is the state and P_c the cumulative decay of chunk c only. After each doubling, they include twice as many
chunks, up to chunk c. Finally one multiply-add adds the carry-in of each chunk. For 0 <= a <= 1 and b >= 0 only
non-negative terms are added, so nothing cancels.
"""

import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import block_recurrence
from ..backend import Backend
from ..call import Call, Context, ContextTuple, Layout, LayoutTuple, Spec, SpecTuple, call_of
from ..layout import as_linear_scan, divided, in_layout, joined, padded_call
from ..modes import for_trace, is_exported, is_old_onnx, is_scripting, is_true_for_all_sizes
from ..scan import LinearScan
from ..shape import States, along, empty_states, matrices, plus_product, plus_times, product


def recurrence(spec: Spec, inputs: list[Tensor], context: Context, layout: Layout) -> States:
    """Compute the recurrence of a cell. A saved scripted module contains this function and needs no mingru."""
    return joined([_of_cell(call) for call in divided(Call(spec, inputs, context, layout))], layout)


def _of_cell(call: Call) -> States:
    if call.tensors[0].numel() == 0:
        h, initial_state, _, dt, weight, bias = call.context
        return empty_states(torch.stack(call.tensors).sum(0), h, [initial_state, dt, weight, bias])
    if call.spec.cell == "gru":
        return in_layout(block_recurrence.composed(padded_call(call)), call)
    return in_layout(scan(as_linear_scan(padded_call(call))), call)


@for_trace()
def traced_recurrence(spec: SpecTuple, inputs: list[Tensor], context: ContextTuple, layout: LayoutTuple) -> States:
    """Call `recurrence` from a trace."""
    call = call_of(spec, inputs, context, layout)
    return recurrence(call.spec, inputs, call.context, call.layout)


@for_trace()
def linear_scan(a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool) -> States:
    """Compute h_t = a_t h_{t-1} + b_t. a, b and h have the same dtype."""
    if b.numel() == 0:
        return empty_states(a * b, h, [])
    return scan(LinearScan(a, b, h, reset, reverse, 1))


class _OfThread(threading.local):
    """What computes a scan and a step of a mixture while `export.onnx` runs in this thread."""

    scan: Callable[[LinearScan], States] | None = None
    mixed_step: Callable[[Call], States | None] | None = None


in_export = _OfThread()


def scan(call: LinearScan) -> States:
    if not is_scripting():
        if in_export.scan is not None:
            return in_export.scan(call)
    return _scan(call.a, call.b, call.h, call.reset, call.reverse, call.parts)


def mixed_step(call: Call) -> States | None:
    """Return one step of all cells of a mixture, if it is not computed cell by cell."""
    return None if in_export.mixed_step is None else in_export.mixed_step(call)


def chunk_size() -> int:
    """Return the largest number of steps of a chunk. A function, because TorchScript cannot read a global number."""
    return 16


def most_steps() -> int:
    """Return the longest sequence that a graph supports if its length has no bound."""
    return 1 << 28


def _scan(a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool, parts: int) -> States:
    """Return the states (B, S, *) and the last state (B, 1, *); h (B, 1, *) is the state before the first step."""
    num_steps, a, is_old = b.size(1), matrices(a, parts), is_old_onnx()
    chunk = chunk_size() if is_old else _steps_of_a_chunk(num_steps)
    if num_steps == 1 if is_old else _is_few(num_steps):
        resets = [] if reset is None else _split(reset, 1, reverse)
        states = _step(_split(a, 1, reverse), _split(b, 1, reverse), resets, h, parts)
        return torch.cat(_in_order(states, reverse), 1), states[-1]

    num_chunks = (num_steps + chunk - 1) // chunk
    are_few = not is_old and _is_few(num_chunks)
    has_view = is_scripting() or is_old or are_few
    if not has_view:
        # One or two more than needed, so that the size is never 1: export would add a guard on a size that may be 1.
        num_chunks = num_steps // chunk + 2
    more = num_chunks * chunk - num_steps
    # The padding is scanned after all steps, in either direction.
    padding = [more, 0] if reverse else [0, more]
    a_t = _step_by_step(a, padding, num_chunks, chunk, reverse, has_view)
    b_t = _step_by_step(b, padding, num_chunks, chunk, reverse, has_view)
    resets = [] if reset is None else _step_by_step(reset, padding, num_chunks, chunk, reverse, has_view)
    local = [b_t[0]] + _step(a_t[1:], b_t[1:], resets[1:], b_t[0], parts)  # noqa: RUF005 (not in TorchScript)
    decay, seen_reset = _cumulative_decays(a_t, resets, parts)
    of_chunks = None if reset is None else seen_reset[-1]
    if are_few:
        carry_in = _carry_in(decay[-1], local[-1], of_chunks, h.unsqueeze(2), reverse, parts)
    else:
        of_chunks = None if of_chunks is None else along(of_chunks, local[-1])
        carry_in = _doubled(decay[-1], local[-1], of_chunks, h.unsqueeze(2), reverse, parts, chunk)
    if reset is not None:
        mask = along(torch.cat(_in_order(seen_reset, reverse), 2), carry_in)
        carry_in = torch.where(mask, 0.0, carry_in)
    all_local, all_decays = torch.cat(_in_order(local, reverse), 2), torch.cat(_in_order(decay, reverse), 2)
    out = plus_times(all_local, all_decays, carry_in, parts)
    # Not `flatten`, because it has no rule for `is_grads_batched`.
    shape = [out.size(0), -1] + list(out.shape[3:])  # noqa: RUF005 (not in TorchScript)
    # Not a slice, because it would depend on which of two lengths is smaller. Not `pad`, because ExecuTorch refuses
    # negative numbers.
    out = out.reshape(shape).index_select(1, torch.arange(num_steps, device=out.device) + padding[0])
    # A copy, so that the state can be overwritten.
    return out, (out[:, :1] if reverse else out[:, -1:]).clone()


def _steps_of_a_chunk(num_steps: int) -> int:
    """Return the square root of the length if it is known, because a graph then has the fewest operations."""
    for size in range(2, chunk_size()):
        if most_steps() <= size * size or is_true_for_all_sizes(num_steps <= size * size):
            return size
    return chunk_size()


def _is_few(count: int) -> bool:
    """Return whether a number of steps or chunks is at most `chunk_size` and, in a captured graph, fixed."""
    for number in range(chunk_size() + 1):  # noqa: SIM110 (not in TorchScript)
        if is_true_for_all_sizes(count == number):
            return True
    return False


def _reaches(distance: int, count: int, chunk: int, in_export: bool) -> bool:
    """Return whether recursive doubling has covered all chunks, or all that the graph supports."""
    if is_scripting():
        return distance >= count
    else:
        # `torch.compile` may add guards: one more graph for more than 4096 steps, and one for more than a million.
        may_guard = distance in (1 << 8, 1 << 16) and not in_export
        known = distance > most_steps() // chunk + 2 or is_true_for_all_sizes(distance >= count)
        return known or (may_guard and distance >= count)


def _in_order(steps: list[Tensor], reverse: bool) -> list[Tensor]:
    """Return the steps in the order of the scan. A second call restores the order of time."""
    return steps[::-1] if reverse else steps


def _split(x: Tensor, dim: int, reverse: bool) -> list[Tensor]:
    """Split a dimension into tensors of size 1. They keep it, because ONNX would need a node to remove each."""
    return _in_order(list(torch.split(x, 1, dim)), reverse)


def _step_by_step(
    x: Tensor, padding: list[int], num_chunks: int, chunk: int, reverse: bool, has_view: bool
) -> list[Tensor]:
    """Pad (B, S, *), and split it into tensors (B, C, 1, *): the first steps of all chunks, the second steps, ..."""
    # F.pad takes the last dimension first.
    x = F.pad(x, [0, 0] * (x.dim() - 2) + padding)
    if has_view:
        # One view, because its gradient is a single copy.
        shape = [x.size(0), num_chunks, chunk] + list(x.shape[2:])  # noqa: RUF005 (not in TorchScript)
        return _split(x.reshape(shape), 2, reverse)
    # Slices, because a captured graph cannot prove that the view is valid for every C.
    return _in_order([x[:, step::chunk].unsqueeze(2) for step in range(chunk)], reverse)


def _step(a: list[Tensor], b: list[Tensor], resets: list[Tensor], h: Tensor, parts: int) -> list[Tensor]:
    """Return the states, computed one step after the other from `matrices`; `resets` is empty without resets."""
    states: list[Tensor] = []
    for index in range(len(b)):
        if len(resets) > 0:
            # Masked instead of multiplied by 0, so that NaN does not pass a reset.
            h = h.masked_fill(along(resets[index], h), 0.0)
        h = plus_product(b[index], a[index], h, parts)
        states.append(h)
    return states


def _cumulative_decays(a: list[Tensor], resets: list[Tensor], parts: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the cumulative decay up to each step, from `matrices`, and whether the steps up to it contain a reset."""
    decays: list[Tensor] = []
    seen_reset: list[Tensor] = []
    first = a[0] if parts == 1 else a[0].select(-1, 0)
    for index in range(len(a)):
        decay = first if index == 0 else product(a[index], decays[-1], parts)
        if len(resets) > 0:
            decay = decay.masked_fill(along(resets[index], decay), 0.0)
            seen_reset.append(resets[0] if index == 0 else seen_reset[-1] | resets[index])
        decays.append(decay)
    return decays, seen_reset


@for_trace(of_old_onnx=True)
def _doubled(
    decay: Tensor, state: Tensor, reset: Tensor | None, h: Tensor, reverse: bool, parts: int, chunk: int
) -> Tensor:
    """Return the carry-in of each chunk by recursive doubling; see `_carry_in`."""
    # The states before h are 0, so that all sources exist.
    zero = torch.zeros_like(h)
    state = torch.cat([state, h, zero] if reverse else [zero, h, state], 1)
    decay = torch.cat([decay, zero, zero] if reverse else [zero, zero, decay], 1)
    count = state.size(1) - 1
    positions = torch.arange(count + 1, device=state.device)
    distance, in_export = 1, is_exported()
    # One bound for the sources in each direction, because AOTInductor takes minutes to simplify two.
    if reset is None:
        while not _reaches(distance, count, chunk, in_export):
            sources = (positions + distance).clamp(max=count) if reverse else (positions - distance).clamp(min=0)
            matrix = matrices(decay, parts)
            state = plus_product(state, matrix, state.index_select(1, sources), parts)
            decay = product(matrix, decay.index_select(1, sources), parts)
            distance *= 2
    else:
        no_reset = torch.zeros_like(reset[:, :1])
        seen = torch.cat([reset, no_reset, no_reset] if reverse else [no_reset, no_reset, reset], 1)
        while not _reaches(distance, count, chunk, in_export):
            sources = (positions + distance).clamp(max=count) if reverse else (positions - distance).clamp(min=0)
            matrix = matrices(decay, parts)
            state = plus_product(state, matrix, state.index_select(1, sources).masked_fill(seen, 0.0), parts)
            decay = product(matrix, decay.index_select(1, sources), parts).masked_fill(seen, 0.0)
            seen = seen | seen.index_select(1, sources)
            distance *= 2
    if in_export and not is_true_for_all_sizes(distance >= count):
        # NaN, because otherwise nothing would show that a sequence is longer than the graph supports.
        state = state.masked_fill(positions[-1] > distance, float("nan"))
    return state[:, 1:-1]


def _carry_in(decay: Tensor, state: Tensor, seen_reset: Tensor | None, h: Tensor, reverse: bool, parts: int) -> Tensor:
    """Return the carry-in of each of few chunks, (B, C, 1, *), from h (B, 1, 1, *) and the results of the chunks.

    decay and state (B, C, 1, *) are the cumulative decay and the last state of each chunk, computed from a state of 0.
    `seen_reset` (B, C, 1) marks chunks that contain a reset.
    """
    resets = [] if seen_reset is None else _split(seen_reset, 1, reverse)
    decays = _split(matrices(decay, parts), 1, reverse)[:-1]
    states = [h] + _step(decays, _split(state, 1, reverse)[:-1], resets, h, parts)  # noqa: RUF005 (not in TorchScript)
    return torch.cat(_in_order(states, reverse), 1)


def _scan_of_now(call: LinearScan) -> States:
    return scan(call)


BACKEND = Backend(scan=_scan_of_now)
