"""Convert sequences of every layout to (B, S, *), the layout in which tensor operations scan, and back.

Packed data is (P, *), as in `torch.nn.utils.rnn.PackedSequence`: step 0 of all sequences, then step 1 of the sequences
that have a step 1, and so on, P steps in total. The longest sequence is the first. `batch_sizes` (S), int64, on the
CPU, counts the sequences that have each step. Everything here is scriptable.
"""

import torch
from torch import Tensor

from .call import Call, Context, Layout, Spec, with_steps
from .cells import cells_of, coefficients, parts_of
from .modes import for_trace, is_captured, is_old_onnx
from .scan import LinearScan
from .shape import MaybeTensor, States, along, as_dtype, from_parts, one_like, plus_times, to_parts


def padded_call(call: Call) -> Call:
    """Return the same call for batch-first sequences, without resets and with elapsed times of 1 in the padding."""
    inputs, layout = call.tensors, call.layout
    reset, dt = call.context.reset, call.context.dt
    batch_sizes, lengths = layout.batch_sizes, layout.lengths
    if batch_sizes is not None:
        lengths = lengths_of(batch_sizes)
        shape = [lengths.numel(), batch_sizes.numel()]
        index, num_steps = packed_index(lengths, shape[1]), shape[0] * shape[1]
        inputs = [torch.unflatten(unpack(x, index, num_steps), 0, shape) for x in inputs]
        reset = None if reset is None else unpack(reset, index, num_steps).view(shape)
        dt = None if dt is None else unpack(dt, index, num_steps).view(shape)
    else:
        if layout.time_first:
            inputs = [x.transpose(0, 1) for x in inputs]
            reset = None if reset is None else reset.transpose(0, 1)
            dt = None if dt is None else dt.transpose(0, 1)
        if lengths is not None:
            padding = padding_of(lengths, inputs[0])
            # Not `masked_fill`, which ONNX Runtime has not for a mask.
            reset = None if reset is None else reset & ~padding
            dt = None if dt is None else dt.masked_fill(padding, 1.0)
    return Call(call.spec, inputs, with_steps(call.context, reset, dt), Layout(False, None, lengths))


def divided(call: Call) -> list[Call]:
    """Return a call for each cell of a mixture, of its part of the features; the call itself for any other cell."""
    spec, context, layout = call.spec, call.context, call.layout
    cells = cells_of(spec.cell)
    if len(cells) == 1:
        return [call]
    dim = 2 if layout.batch_sizes is None else 1
    inputs = [x.chunk(len(cells), dim) for x in call.tensors]
    states = [x.chunk(len(cells), 2) for x in (context.h, context.initial_state.expand_as(context.h))]
    calls: list[Call] = []
    for index, cell in enumerate(cells):
        own = Spec(cell, *spec[1:])
        first = Context(states[0][index], states[1][index], context.reset, context.dt)
        calls.append(Call(own, [x[index] for x in inputs], first, layout))
    return calls


def joined(states: list[States], layout: Layout) -> States:
    """Return the states of a mixture from those of its cells."""
    if len(states) == 1:
        return states[0]
    dim = 2 if layout.batch_sizes is None else 1
    return torch.cat([out for out, _ in states], dim), torch.cat([last for _, last in states], 2)


def as_linear_scan(call: Call) -> LinearScan:
    """Return the scan that a cell computes, of numbers with its parts. The call must come from `padded_call`."""
    spec, context = call.spec, call.context
    a, b = coefficients(spec, call.tensors, context)
    parts = parts_of(spec.cell)
    lengths = call.layout.lengths
    if lengths is not None:
        a, b = kept_in_padding(a, b, lengths, parts)
    h = to_parts(context.h, parts)
    reset = context.reset
    if reset is not None:
        initial_state = to_parts(context.initial_state.expand_as(context.h), parts)
        b = torch.where(along(reset, b), plus_times(b, a, as_dtype(initial_state, b.dtype), parts), b)
    return LinearScan(a, b, as_dtype(h, b.dtype), reset, spec.reverse, parts)


def in_layout(states: States, call: Call) -> States:
    """Return states (B, S, *) in the layout and dtype of a call, and the last state in the dtype of its h."""
    layout = call.layout
    parts = parts_of(call.spec.cell)
    out, last = from_parts(states[0], parts), from_parts(states[1], parts)
    out = as_dtype(out, call.tensors[0].dtype)
    batch_sizes, lengths = layout.batch_sizes, layout.lengths
    if batch_sizes is not None:
        out = pack(out, packed_index(lengths_of(batch_sizes), batch_sizes.numel()))
    elif lengths is not None:
        out = without_padding(out, lengths, False)
    if layout.time_first:
        # A copy, because outputs must be contiguous and not views. Not in place, because backward keeps `out`.
        out = out.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    return out, as_dtype(last, call.context.h.dtype)


def is_transposed(x: Tensor) -> bool:
    """Return whether the first two dimensions of a sequence (B, S, I) or (S, B, I) are in reverse order in memory."""
    return not x.is_contiguous() and x.dim() == 3 and x.stride(0) < x.stride(1)


def is_packing(batch_sizes: Tensor, num_rows: int) -> bool:
    """Return whether so many packed steps can have these batch sizes. Kernels read and write memory by them."""
    sizes: list[int] = batch_sizes.tolist()
    is_falling = batch_sizes.dim() == 1 and sizes == sorted(sizes, reverse=True) and sizes[-1:] > [0]
    return is_falling and sum(sizes) == num_rows


def lengths_of(batch_sizes: Tensor) -> Tensor:
    """Return the number of steps of each packed sequence."""
    num_sequences = int(batch_sizes[:1].sum())
    return (batch_sizes.unsqueeze(1) > torch.arange(num_sequences, device=batch_sizes.device)).sum(0)


def packed_index(lengths: Tensor, num_steps: int, order: Tensor | None = None, time_first: bool = False) -> Tensor:
    """Return the index of each packed step in the flattened (B, S) or (S, B), for lengths in descending order.

    `order` has the batch index of each sequence; by default, the batch has the order of the packed sequences.
    """
    steps = torch.arange(num_steps, device=lengths.device).unsqueeze(1)
    batch = torch.arange(lengths.numel(), device=lengths.device) if order is None else order
    index = steps * lengths.numel() + batch if time_first else batch * num_steps + steps
    return index[steps < lengths]


def unpack(packed: Tensor, index: Tensor, num_steps: int) -> Tensor:
    """Return packed data (P, *) as flattened padded data (num_steps, *), with 0 in the padding."""
    padded = packed.new_zeros([num_steps] + list(packed.shape[1:]))  # noqa: RUF005 (not in TorchScript)
    return padded.index_copy(0, index.to(packed.device), packed)


def pack(padded: Tensor, index: Tensor) -> Tensor:
    """Return padded data (B, S, *) or (S, B, *) as packed data (P, *)."""
    return padded.flatten(0, 1).index_select(0, index.to(padded.device))


@for_trace()
def packing_of(lengths: Tensor, x: Tensor, time_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return `batch_sizes`, the batch index of each packed sequence, and the index of each packed step.

    The longest sequences are the first. Empty sequences are not packed.
    """
    if is_old_onnx():
        why = "in an export with dynamo=False, which cannot sort; use mingru.export.onnx"
        raise ValueError("lengths must be None " + why)
    lengths, order = lengths.cpu().sort(descending=True, stable=True)
    num_steps = x.size(0 if time_first else 1)
    batch_sizes = (torch.arange(num_steps, device=lengths.device).unsqueeze(1) < lengths).sum(1)
    index = packed_index(lengths, num_steps, order, time_first)
    return batch_sizes[batch_sizes > 0], order[lengths > 0], index


def with_lengths(x: Tensor, lengths: Tensor, time_first: bool) -> tuple[Tensor, Layout]:
    """Return padded sequences for layers that take lengths, and their layout.

    Kernels skip the padding. A captured graph computes it, and a GPU computes all but the recurrence there; nothing
    that is there may reach a gradient.
    """
    lengths = lengths.to(x.device, non_blocking=True)
    if is_captured() or not x.is_cpu:
        x = without_padding(x, lengths, time_first)
    return x, Layout(time_first, None, lengths.long().contiguous())


def in_reverse(context: Context, layout: Layout) -> Context:
    """Return the context of the reverse direction, whose resets and elapsed times move by one step.

    A reset at step t is a boundary between the steps t - 1 and t, and dt the time between them. The reverse direction
    crosses that boundary before step t - 1. Before the last step of each sequence, it sees no reset, and uses the time
    before the first step, which no other step uses.
    """
    reset, dt = context.reset, context.dt
    if reset is not None:
        reset = of_next_step(reset, torch.zeros_like(reset), layout)
    if dt is not None:
        batch_sizes = layout.batch_sizes
        if batch_sizes is not None:
            first = _of_first_packed_step(dt, batch_sizes)
        else:
            first = (dt[:1] if layout.time_first else dt[:, :1]).expand_as(dt)
        dt = of_next_step(dt, first, layout)
    return with_steps(context, reset, dt)


def padding_of(lengths: Tensor, like: Tensor) -> Tensor:
    """Return the mask of padded steps (B, S) of a sequence (B, S, *)."""
    return torch.arange(like.size(1), device=like.device) >= lengths.to(like.device).unsqueeze(1)


def kept_in_padding(a: Tensor, b: Tensor, lengths: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Return a and b (B, S, *) of a scan with 1 and 0 in the padding, which keep the state there."""
    padding = along(padding_of(lengths, a), a)
    return torch.where(padding, one_like(a, parts), a), b.masked_fill(padding, 0.0)


def without_padding(x: Tensor, lengths: Tensor, time_first: bool) -> Tensor:
    """Return a sequence with 0 in the padding."""
    padding = padding_of(lengths, x.transpose(0, 1) if time_first else x)
    return x.masked_fill(along(padding.t() if time_first else padding, x), 0.0)


def of_next_step(x: Tensor, at_end: Tensor, layout: Layout) -> Tensor:
    """Return the value of the next step of each sequence, and `at_end` at its last step."""
    batch_sizes, lengths = layout.batch_sizes, layout.lengths
    if batch_sizes is not None:
        return _of_next_packed_step(x, at_end, batch_sizes)
    if layout.time_first:
        x, at_end = x.t(), at_end.t()
    if lengths is not None:
        padding = padding_of(lengths, x)
        x = (x & ~padding) | (at_end & padding) if x.dtype == torch.bool else torch.where(padding, at_end, x)
    # Not x[:, 1:] first, because export would add a guard on its size.
    following = torch.cat([x, at_end[:, :1]], 1)[:, 1:]
    return following.t() if layout.time_first else following


@for_trace()
def _of_next_packed_step(x: Tensor, at_end: Tensor, batch_sizes: Tensor) -> Tensor:
    offsets = batch_sizes.cumsum(0) - batch_sizes
    batch = torch.arange(int(batch_sizes[:1].sum()), device=batch_sizes.device)
    exists = batch < batch_sizes[1:].unsqueeze(1)
    before = (offsets[:-1].unsqueeze(1) + batch)[exists]
    after = (offsets[1:].unsqueeze(1) + batch)[exists]
    return at_end.index_copy(0, before.to(x.device), x.index_select(0, after.to(x.device)))


@for_trace()
def _of_first_packed_step(x: Tensor, batch_sizes: Tensor) -> Tensor:
    """Return the value of the first step of each packed step's sequence."""
    batch = torch.arange(int(batch_sizes[:1].sum()), device=batch_sizes.device)
    sequence = batch.expand(batch_sizes.numel(), -1)[batch < batch_sizes.unsqueeze(1)]
    # The first steps of all sequences are the first packed steps.
    return x.index_select(0, sequence.to(x.device))


def as_sequence(
    x: Tensor, h: MaybeTensor, reset: MaybeTensor, dt: MaybeTensor, num_dims: int
) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor]:
    """Return the arguments of a cell as those of a sequence of one step.

    `num_dims` is the number of dimensions of x with a batch. The batch has size 1 if x has none.
    """
    batched = x.dim() == num_dims
    if h is not None:
        # Before the time dimension is added, because h may have fewer dimensions than x.
        while h.dim() < x.dim():
            h = h.unsqueeze(0)
        h = _with_time(h, batched)
    reset = None if reset is None else _with_time(reset, batched)
    dt = None if dt is None else _with_time(dt, batched)
    return _with_time(x, batched), h, reset, dt


def _with_time(x: Tensor, batched: bool) -> Tensor:
    return x.unsqueeze(1) if batched else x.unsqueeze(0).unsqueeze(0)
