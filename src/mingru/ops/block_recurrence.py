"""The recurrence of a GRU whose features see each other in blocks of K.

From the pre-activations r_t, z_t and c_t, with the recurrent weights U and the bias d:

    h_t = (1 - z) tanh(c_t + r (U_c h_{t-1} + d)) + z h_{t-1}
    r = sigma(r_t + U_r h_{t-1})        z = sigma(z_t + U_z h_{t-1})

The weights are (3 H, K), with the rows of torch.nn.GRU: r, z, c. Each row has those of the K features of its block.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from .call import Call, Context, Layout, Spec, from_flat, is_plain
from .layout import in_layout, padded_call, padding_of, without_padding
from .modes import Mode, is_true_for_all_sizes, scripted_as, without_autocast
from .names_of_torch import is_exporting, loop
from .shape import States, accumulate_dtype, as_dtype

# What each step has, in the order of the pass: pre-activations (S, 3, blocks, B, K), and masks (S, B, 1) of resets and
# of the padding.
_Steps = tuple[Tensor, Tensor | None, Tensor | None]
# What all steps share: weights (blocks, K, 3 K), bias (blocks, 1, K), and the state after a reset.
_Own = tuple[Tensor, Tensor | None, Tensor]


def composed(call: Call) -> States:
    """Compute a padded call step by step, by differentiable operations that TorchScript can compile."""
    context, lengths, reverse = call.context, call.layout.lengths, call.spec.reverse
    weight, bias, reset = context.recurrent, context.recurrent_bias, context.reset
    assert call.spec.activation == "tanh" and call.spec.min_decay == 0.0, "a GRU with another recurrence"
    assert weight is not None
    dtype, size = accumulate_dtype(call.tensors[0].dtype), weight.size(1)
    # The product with the states, (blocks, B, K), does not mix blocks.
    weight = as_dtype(weight, dtype).view(3, -1, size, size).permute(1, 3, 0, 2).reshape(-1, size, 3 * size)
    bias = None if bias is None else as_dtype(bias, dtype).view(-1, 1, size)
    h, initial_state = [_in_blocks(as_dtype(x, dtype), size)[0] for x in [context.h, context.initial_state]]
    x = torch.stack([_in_blocks(as_dtype(x, dtype), size) for x in call.tensors], 1)
    reset = None if reset is None else reset.t().unsqueeze(2)
    padding = None if lengths is None else padding_of(lengths, call.tensors[0]).t().unsqueeze(2)
    if reverse:
        x, reset = x.flip(0), None if reset is None else reset.flip(0)
        padding = None if padding is None else padding.flip(0)
    out, last = _all_steps(h, (x, reset, padding), (weight, bias, initial_state))
    out, last = [x.permute(2, 0, 1, 3).flatten(2) for x in [out.flip(0) if reverse else out, last.unsqueeze(0)]]
    return out, last


def _in_blocks(x: Tensor, size: int) -> Tensor:
    """Return (B, S, H) as (S, blocks, B, K)."""
    return torch.unflatten(x, 2, [-1, size]).permute(1, 2, 0, 3)


def _step(h: Tensor, now: _Steps, own: _Own) -> Tensor:
    """Return the next state, (blocks, B, K)."""
    (x, reset, padding), (weight, bias, initial_state) = now, own
    r, z, c = x.unbind(0)
    if reset is not None:
        h = torch.where(reset, initial_state, h)
    sums = torch.bmm(h, weight).chunk(3, 2)
    candidate = sums[2] if bias is None else sums[2] + bias
    candidate = (c + (r + sums[0]).sigmoid() * candidate).tanh()
    update = z + sums[1]
    # sigma(-update), because 1 - sigma(update) would cancel near 1.
    new = (-update).sigmoid() * candidate + update.sigmoid() * h
    return new if padding is None else torch.where(padding, h, new)


def _each_step(h: Tensor, steps: _Steps, own: _Own) -> States:
    """Return the states (S, blocks, B, K) and the last state."""
    xs, reset, padding = steps
    states: list[Tensor] = []
    # Not an index for each, whose gradient has the size of all steps.
    for t, x in enumerate(xs.unbind(0)):
        h = _step(h, (x, None if reset is None else reset[t], None if padding is None else padding[t]), own)
        states.append(h)
    return torch.stack(states), h


@scripted_as(_each_step)
def _all_steps(h: Tensor, steps: _Steps, own: _Own) -> States:
    """Call `_each_step`; `torch.export` captures a loop, so that the number of steps is not that of the example."""
    unrolls = loop is None or not is_exporting() or torch.compiler.is_dynamo_compiling()
    if unrolls or is_true_for_all_sizes(steps[0].size(0) == 1):
        return _each_step(h, steps, own)

    def step(h: Tensor, *tensors: Tensor) -> list[Tensor]:
        rest = iter(tensors)
        given: Any = [tuple(None if each is None else next(rest) for each in some) for some in (steps, own)]
        # Outputs must not share memory. The states before the steps, because AOTInductor fails if it can write what
        # follows, such as a sum, into an output of the loop.
        return [_step(h, *given), h.clone()]

    xs, others = ([each for each in some if each is not None] for some in (steps, own))
    # AOTInductor finds sizes only among the inputs of the loop.
    sizes = [size for size in h.shape if isinstance(size, torch.SymInt)]
    # A copy, which has the strides of the next state also where a size is 1.
    last, before = loop(step, [h.clone(memory_format=torch.contiguous_format)], xs, (*others, *sizes))
    return torch.cat([before, last.unsqueeze(0)])[1:], last


def kept_in_padding(call: Call) -> Call:
    """Return the same call of pre-activations side by side without lengths: update gates keep the state in padding."""
    (x,), context, (time_first, _, lengths) = call.tensors, call.context, call.layout
    assert lengths is not None
    padding = padding_of(lengths, x.transpose(0, 1) if time_first else x)
    padding = padding.t() if time_first else padding
    r, z, c = x.chunk(3, -1)
    z = z.masked_fill(padding.unsqueeze(-1), torch.finfo(x.dtype).max)
    reset = None if context.reset is None else context.reset & ~padding
    return Call(call.spec, [torch.cat([r, z, c], -1)], context._replace(reset=reset), Layout(time_first))


def dense(weight: Tensor) -> Tensor:
    """Return recurrent weights (3 H, K) as those of torch.nn.GRU, (3 H, H), with 0 outside of the blocks."""
    size, features = weight.size(1), weight.size(0) // 3
    if size == features:
        return weight
    block = torch.arange(features, device=weight.device) // size
    return weight.repeat(1, features // size).masked_fill(block.repeat(3).unsqueeze(1) != block, 0.0)


def is_one_node(mode: Mode, x: Tensor, context: Context, layout: Layout) -> bool:
    """Return whether a graph for ONNX has one node for this, which takes no resets. One step needs none."""
    if not mode.is_traced:
        return context.reset is None and not is_true_for_all_sizes(x.size(0 if layout.time_first else 1) == 1)
    if context.reset is not None:
        why = "in an export with dynamo=False, which has no loop; use mingru.export.onnx"
        raise ValueError(f"GRU: reset must be None {why}")
    return layout.lengths is None


def in_onnx(mode: Mode, call: Call) -> States:
    """Compute the recurrence of a linear map by one node of an ONNX graph; the tensors are x, weight and bias."""
    (x, weight, bias), context, (time_first, _, lengths) = call.tensors, call.context, call.layout
    dtype, features = accumulate_dtype(x.dtype), context.h.size(2)
    assert context.recurrent is not None
    weights = [as_dtype(weight, dtype), dense(as_dtype(context.recurrent, dtype))]
    biases = [weight.new_zeros(3 * features, dtype=dtype) if bias is None else as_dtype(bias, dtype)]
    own = None if context.recurrent_bias is None else as_dtype(context.recurrent_bias, dtype)
    # Not padded, of which the exporters would make operations.
    biases.append(0.0 * biases[0] if own is None else torch.cat([0.0 * own, 0.0 * own, own]))
    x, h = as_dtype(x if time_first else x.transpose(0, 1), dtype), as_dtype(context.h, dtype).transpose(0, 1)
    if mode.is_traced:
        steps = x.flip(0) if call.spec.reverse else x
        out, last = torch.gru(steps, h, weights + biases, True, 1, 0.0, False, False, False)
        out = out.flip(0) if call.spec.reverse else out
    else:
        # ONNX has the update gate first.
        order = torch.tensor([1, 0, 2], device=x.device)
        in_order = [each.view(3, features, -1).index_select(0, order) for each in weights + biases]
        maps = [each.view(1, 3 * features, -1) for each in in_order]
        inputs = [x, *maps[:2], torch.cat(maps[2:], 1).squeeze(2), None if lengths is None else lengths.int(), h]
        direction = "reverse" if call.spec.reverse else "forward"
        options: dict[str, Any] = {"hidden_size": features, "linear_before_reset": 1, "direction": direction}
        shapes = (x.size(0), 1, x.size(1), features), h.shape
        outputs = torch.onnx.ops.symbolic_multi_out(
            "GRU", inputs, options, dtypes=(dtype, dtype), shapes=shapes, version=18
        )
        out, last = outputs[0].squeeze(1), outputs[1]
        if lengths is not None:
            # ONNX Runtime does not keep the state of an empty sequence.
            last = torch.where((lengths > 0).unsqueeze(1), last, h)
    out, last = as_dtype(out if time_first else out.transpose(0, 1), call.tensors[0].dtype), last.transpose(0, 1)
    return out, as_dtype(last, context.h.dtype)


def lstm_by_torch(call: Call) -> States:
    """Compute an LSTM, whose states are (B, 2, H), by `torch.lstm`; the tensors are x, (S, B, I) or packed, and others.

    As of packed sequences, because the code for padded ones has no second derivatives.
    """
    (x, weight, bias), recurrent, batch_sizes = call.tensors, call.context.recurrent, call.layout.batch_sizes
    # One direction in reverse is the second of two with equal weights.
    num, shape = 1 + call.spec.reverse, x.shape[:-1]
    if batch_sizes is None:
        batch_sizes = torch.full([shape[0]], shape[1], device="cpu")
    weights = [weight, recurrent, *([] if bias is None else [bias, torch.zeros_like(bias)])] * num
    before = [each.expand(num, *each.shape) for each in call.context.h.unbind(1)]
    options: Any = weights, bias is not None, 1, 0.0, False, num == 2
    out, *last = torch.lstm(x.flatten(0, -2), batch_sizes, before, *options)
    return out.chunk(num, 1)[-1].view(*shape, -1), torch.stack([each[-1] for each in last], 1)


def blocks_of(weight: Tensor, size: int) -> Tensor:
    """Return the blocks of recurrent weights of torch.nn.GRU, (3 H, H), as (3 H, K): the inverse of `dense`."""
    by_block = weight.reshape(3, -1, size, weight.size(1) // size, size)
    return by_block.diagonal(0, 1, 3).permute(0, 3, 1, 2).reshape(-1, size)


def by_torch(
    spec: Spec, given: Sequence[Any], time_first: bool, keep: bool | None = None
) -> tuple[Tensor, Tensor, None]:
    """Compute the recurrence of a linear map by `torch.gru`, on any device; the tensors are x, weight and bias.

    A sequence with resets is one sequence for each piece between them.
    """
    call = from_flat(spec, given, time_first)
    (x, weight, bias), context, lengths = call.tensors, call.context, call.layout.lengths
    if weight is None:
        # Finite, because torch.gru has a linear map, whose products with 0 must be 0.
        finite = torch.finfo(x.dtype)
        x, weight = x.clamp(finite.min, finite.max), torch.eye(x.size(-1), dtype=x.dtype, device=x.device)
    with without_autocast(x):
        if x.is_meta or (lengths is not None and not lengths.any()):
            # There are no values of resets and lengths, or torch would refuse an empty sequence.
            x = x if lengths is None else without_padding(x, lengths, call.layout.time_first)
            of_inputs = call._replace(tensors=[*F.linear(x, weight, bias).chunk(3, -1)])
            return *in_layout(composed(padded_call(of_inputs)), call), None
        dtype = accumulate_dtype(x.dtype)
        second, zeros = context.recurrent_bias, weight.new_zeros(len(weight))
        if second is not None:
            second = F.pad(second, (2 * context.h.size(2), 0))
        assert context.recurrent is not None
        weights = [weight, dense(context.recurrent), *(zeros if each is None else each for each in (bias, second))]
        # One piece of memory, as cuDNN needs it; of several it makes one, with a warning. Made anew for each call,
        # because an edit of `weight.data` does not change the version of a weight.
        whole = torch.cat([as_dtype(each, dtype).flatten() for each in weights])
        parts = zip(torch.split(whole, [each.numel() for each in weights]), weights, strict=True)
        weights = [part.view_as(each) for part, each in parts]
        padded = padded_call(call._replace(tensors=[as_dtype(x, dtype)]))
        (steps,), reverse = padded.tensors, call.spec.reverse
        # As in training, because the backward pass of cuDNN needs it. There is no dropout.
        options = weights, True, 1, 0.0, True, False
        if context.reset is None and padded.layout.lengths is None:
            h = as_dtype(context.h, dtype).transpose(0, 1).contiguous()
            out, last = torch.gru(steps.flip(1) if reverse else steps, h, *options, True)
            states = out.flip(1) if reverse else out, last.transpose(0, 1)
        else:
            packed, batch_sizes, h, rows, sequences, pieces = _in_pieces(padded)
            found, lasts = torch.gru(packed, batch_sizes, h, *options)
            out = steps.new_zeros(steps.shape[:2].numel(), h.size(2)).index_copy(0, rows, found)
            last = as_dtype(context.h, dtype).squeeze(1).index_copy(0, sequences, lasts[0].index_select(0, pieces))
            states = torch.unflatten(out, 0, steps.shape[:2]), last.unsqueeze(1)
        out, last = in_layout(states, call)
        # A copy, because outputs are not views.
        return out.clone(memory_format=torch.contiguous_format), last, None


def is_for_cell_of_torch(call: Call) -> bool:
    """Return whether the cell of torch computes this recurrence of a linear map: one step of one block with gradients.

    With large weights, a training step then takes as little as a third of the time.
    """
    (spec, (x, *_), context, (time_first, *others)), weight = call, call.context.recurrent
    is_one = others == [None, None] and x.size(0 if time_first else 1) == 1 and torch.is_grad_enabled()
    is_dense = is_one and is_plain(spec) and weight is not None and 3 * weight.size(1) == weight.size(0)
    return is_dense and x.dtype == context.h.dtype == accumulate_dtype(x.dtype)


def by_cell_of_torch(call: Call) -> States:
    """Compute one step by `torch.gru_cell`."""
    (x, weight, bias), (h, initial_state, reset, _, recurrent, second) = call.tensors, call.context
    if reset is not None:
        h = torch.where(reset.view(-1, 1, 1), initial_state, h)
    assert recurrent is not None
    second = None if second is None else F.pad(second, (2 * len(second), 0))
    step = torch.gru_cell(x.flatten(0, 1), h.squeeze(1), weight, recurrent, bias, second)
    # Two tensors, because what a program does with one must not show in the other.
    return torch.stack([step], 0 if call.layout.time_first else 1), torch.stack([step], 1)


def _in_pieces(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the pieces between resets as packed sequences.

    Returns:
        Data, batch sizes and states before the pieces; the index in (B S) of each packed step; the sequences that have
        steps, and the last piece of each.
    """
    (x,), context, lengths = call.tensors, call.context, call.layout.lengths
    batch, num_steps = x.shape[:2]
    done = torch.arange(num_steps, device=x.device).expand(batch, -1)
    ends = torch.full_like(done[:, :1], num_steps) if lengths is None else lengths.to(x.device).unsqueeze(1)
    # In the order of the pass.
    steps = (ends - 1 - done).clamp(min=0) if call.spec.reverse else done
    is_valid = done < ends
    reset = torch.zeros_like(is_valid) if context.reset is None else context.reset.gather(1, steps)
    rows = (torch.arange(batch, device=x.device).unsqueeze(1) * num_steps + steps)[is_valid]
    first = (reset | (done == 0))[is_valid].nonzero().squeeze(1)
    sizes = first.diff(append=first.new_full((1,), len(rows)))
    packed = pack_padded_sequence(pad_sequence([*torch.split(rows, sizes.tolist())]), sizes.cpu(), enforce_sorted=False)
    order, rank = packed.sorted_indices, packed.unsorted_indices
    assert order is not None and rank is not None
    sequence = rows[first] // num_steps
    states = (each.expand_as(context.h).squeeze(1)[sequence] for each in (context.initial_state, context.h))
    # The first pieces continue from h, and all others follow a reset.
    h = torch.where(reset[is_valid][first].unsqueeze(1), *states)[order]
    is_last = torch.cat([sequence[1:] != sequence[:-1], torch.ones_like(sequence[:1], dtype=torch.bool)])
    data = x.flatten(0, 1).index_select(0, packed.data)
    return data, packed.batch_sizes, as_dtype(h, x.dtype).unsqueeze(0), packed.data, sequence[is_last], rank[is_last]
