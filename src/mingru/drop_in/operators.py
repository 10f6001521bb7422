"""`torch.gru` and `torch.lstm`, with the same arguments, which take less time on a CPU where that is possible.

The `forward` of an accelerated layer calls these in place of torch's. So its checks, orders and errors are torch's own.
"""

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import autograd, route
from ..ops.backends.native import is_slower
from ..ops.call import Call, Layout, Start, spec_of
from ..ops.graph import is_captured
from ..ops.names_of_torch import len_torch_dispatch_stack, outside_of_graphs

# What is added to the gates i, f, g, o of an LSTM where a sequence has ended: i is 0, and f is 1, so c stays.
_ENDED = (-1e5, 1e5, 0.0, 0.0)


@outside_of_graphs
def gru(x: Tensor, *args: Any) -> Any:
    """Compute `torch.gru` by the kernels of a GRU where these take less time."""
    found = None if is_captured() else _gru(x, *_with_batch_sizes(args))
    return torch.gru(x, *args) if found is None else found


@outside_of_graphs
def lstm(x: Tensor, *args: Any) -> Any:
    """Compute `torch.lstm` of packed sequences as of padded ones, for which torch has faster code."""
    found = None if is_captured() else _lstm(x, *_with_batch_sizes(args))
    return torch.lstm(x, *args) if found is None else found


def _with_batch_sizes(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments after x as those of packed sequences and `batch_first`. Padded ones have no batch sizes."""
    return (None, *args) if isinstance(args[1], list) else (*args, False)


def _is_usual(x: Tensor, states: tuple[Tensor, ...], flat: list[Any], num_layers: int, directions: int) -> bool:
    """Return whether eager code may compute these tensors: on the CPU, of one dtype, in the shapes of torch's."""
    every, features, per = (x, *states, *flat), states[0].size(-1), len(flat) // (num_layers * directions)
    if not route.is_for_native(*every) or len_torch_dispatch_stack() or x.numel() == 0:
        return False
    if (
        not all(each is not None and each.is_cpu and each.dtype == x.dtype for each in every)
        or x.layout != torch.strided
    ):
        return False
    rows = (3 if len(states) == 1 else 4) * features
    sizes = [x.size(-1), *[directions * features] * (num_layers - 1)]
    shapes = [[(rows, size), (rows, features), (rows,), (rows,)][:per] * directions for size in sizes]
    return [each.shape for each in flat] == [*chain(*shapes)]


def _layers(run: Any, x: Tensor, num_layers: int, directions: int, dropout: float) -> tuple[Tensor, ...]:
    """Return the outputs of stacked layers, and the last states. `run` computes one layer in one direction."""
    states = []
    for first in range(0, num_layers * directions, directions):
        outs, *lasts = zip(*(run(x, at) for at in range(first, first + directions)), strict=True)
        states.append(lasts)
        x = torch.cat(outs, -1) if directions == 2 else outs[0]
        if first < (num_layers - 1) * directions and dropout > 0:
            x = F.dropout(x, dropout)
    return x, *(torch.cat([*chain(*each)]) for each in zip(*states, strict=True))


def _gru(x: Tensor, batch_sizes: Any, hx: Tensor, flat: list[Any], _: bool, *options: Any) -> Any:
    num_layers, dropout, training, bidirectional, batch_first = options
    directions, steps = 2 if bidirectional else 1, x.size(int(batch_first)) if batch_sizes is None else len(batch_sizes)
    if x.dtype not in (torch.float32, torch.float64) or is_slower(hx.size(-1), steps, x.dtype, torch.is_grad_enabled()):
        return None
    if not _is_usual(x, (hx,), flat, num_layers, directions):
        return None
    # Copies of what backward needs here and not in torch, because a program may change it until then.
    per = len(flat) // len(hx)
    is_kept = torch.is_grad_enabled() and not all(weight.requires_grad for weight in flat[1::per])
    before = (hx.clone() if is_kept else hx).unsqueeze(2).unbind()
    layout = Layout(batch_sizes is None, batch_sizes)

    def run(x: Tensor, at: int) -> tuple[Tensor, Tensor]:
        return _recurrence(x, before[at], flat[at * per : (at + 1) * per], at % directions == 1, layout)

    x = x.transpose(0, 1) if batch_first else x
    out, last = _layers(run, x, num_layers, directions, dropout * training)
    if out.requires_grad and directions == 1:
        out = out.clone()
    return out.transpose(0, 1) if batch_first else out, last


def _recurrence(x: Tensor, before: Tensor, weights: list[Any], reverse: bool, layout: Layout) -> tuple[Tensor, Tensor]:
    """Compute a layer in one direction from a state (B, 1, H). Return its outputs and last state, (1, B, H)."""
    of_input, of_state, *biases = weights
    size = of_state.size(-1)
    bias: Any = biases[0] + F.pad(biases[1][: 2 * size], (0, size)) if biases else None
    of_candidate = biases[1][2 * size :] if biases else None
    if torch.is_grad_enabled():
        of_candidate = None if of_candidate is None else of_candidate.clone()
        of_input = of_input if x.requires_grad else of_input.clone()
    start = Start(before, before, None, None, of_state, of_candidate)
    call = Call(spec_of("gru", "tanh", reverse, 0.0), [x, of_input, bias], start, layout)
    out, last = autograd.run_kernel("linear_kernel", "native", call, True)
    return out, last.transpose(0, 1)


def _lstm(x: Tensor, batch_sizes: Any, hx: Any, flat: list[Any], has_bias: bool, *options: Any) -> Any:
    num_layers, dropout, training, bidirectional, _ = options
    directions, is_onednn = 2 if bidirectional else 1, torch.backends.mkldnn.enabled and x.dtype == torch.float32
    if batch_sizes is None or not is_onednn or len(hx) != 2 or hx[0].shape != hx[1].shape:  # with a projection
        return None
    h = hx[0]
    if not is_padded_faster(x.size(-1), h.size(-1), h.size(1), len(batch_sizes), len(x)):
        return None
    if not _is_usual(x, hx, flat, num_layers, directions):
        return None
    per, chunks = len(flat) // len(h), _chunks(batch_sizes.tolist())
    takes, puts, last, ended = _rows(batch_sizes, chunks)
    closed = x.new_tensor(_ENDED).repeat_interleave(h.size(-1)).unsqueeze(1)
    # Copies, because a program may change states until backward, as the biases.
    h_0, c_0 = (each.clone(memory_format=torch.contiguous_format).split(1) for each in hx)

    def run(x: Tensor, at: int) -> tuple[Tensor, Tensor, Tensor]:
        x, (of_input, of_state, *biases) = F.pad(x, (0, 0, 0, 1)), flat[at * per : (at + 1) * per]
        weights = [torch.cat([of_input, closed], 1), of_state, *(each.clone() for each in biases)]
        h, c, outs, stopped = h_0[at], c_0[at], [], []
        for first, end, count in chunks:
            h, (c, *rest) = h[:, :count], c.split([count, c.size(1) - count], 1)
            stopped += rest
            rows = F.embedding(takes[at % directions][first:end, :count], x)
            steps = torch.cat([rows, ended[first:end, :count]], -1)
            out, h, c = torch.lstm(steps, (h, c), weights, has_bias, 1, 0.0, training, False, False)
            outs.append(out.flatten(0, 1))
        every = torch.cat(outs)
        return F.embedding(puts[at % directions], every), every[last], torch.cat([c, *reversed(stopped)], 1)

    return _layers(run, x, num_layers, directions, dropout * training)


def is_padded_faster(inputs: int, features: int, batch: int, steps: int, rows: int) -> bool:
    """Return whether padded chunks of packed sequences take less time than torch's steps, of `rows` in all.

    Torch computes sequences of one length as padded ones itself. Otherwise, a step costs it the calls of operators, and
    with gradients a part of all steps; padding costs products of the states and inputs.
    """
    if rows == batch * steps or inputs > 512:
        return False
    if torch.is_grad_enabled():
        return 400 * (steps - 10) >= batch * features
    return steps >= 100 and batch * features <= 1600 and rows >= 0.4 * batch * steps


def _chunks(sizes: list[int]) -> list[tuple[int, int, int]]:
    """Divide packed steps into chunks (first step, end, sequences), so that less is padded than a call costs."""
    cuts = [0]
    for step, size in enumerate(sizes):
        ended = sizes[cuts[-1]] - size
        if ended > size and ended * (len(sizes) - step) > 128:
            cuts.append(step)
    return [(first, end, sizes[first]) for first, end in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]


def _rows(batch_sizes: Tensor, chunks: list[tuple[int, int, int]]) -> Any:
    """Return where the steps of padded sequences are in packed data, and reverse; last steps; and which have ended."""
    step, sequence = torch.arange(len(batch_sizes)).unsqueeze(1), torch.arange(chunks[0][2])
    goes_on = sequence < batch_sizes.unsqueeze(1)
    length = goes_on.sum(0)
    first, backward = batch_sizes.cumsum(0) - batch_sizes, (length - 1 - step).clamp_(0)
    # After its end, a sequence has the row of zeros that follows the data: a product of its last step may be infinite.
    takes = [
        torch.where(goes_on, rows, goes_on.sum())
        for rows in (first.unsqueeze(1) + sequence, first[backward] + sequence)
    ]
    place, begin = torch.zeros_like(backward), 0
    for start, end, count in chunks:
        place[start:end, :count] = torch.arange(begin, begin + (end - start) * count).view(-1, count)
        begin += (end - start) * count
    puts = place[goes_on], place.gather(0, backward)[goes_on]
    return takes, puts, place.gather(0, length.unsqueeze(0) - 1), (~goes_on).unsqueeze(2).float()
