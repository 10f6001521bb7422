"""`torch.gru`, `torch.lstm` and `torch.gru_cell` with the same arguments, in less time on a CPU if that is possible.

The `forward` of an accelerated layer calls these in place of torch's. So its checks, orders and errors are torch's own.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import autograd, route
from ..ops.backends.native import HAS_BFLOAT16, is_slower, is_slower_in_bfloat16, is_slower_lstm, rounds_products
from ..ops.call import BATCH_FIRST, Call, Context, Layout, spec_of
from ..ops.layout import is_packing
from ..ops.modes import EAGER, are_ordinary, mode_of
from ..ops.names_of_torch import len_torch_dispatch_stack, outside_of_graphs
from ..ops.shape import MaybeTensor, States, as_dtype

_DTYPES = (torch.float32, torch.float64)
# Of bias, num_layers, dropout, training, bidirectional and batch_first.
_TYPES = [bool, int, float, bool, bool, bool]


def _or_torch(cell: str, of_torch: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Return torch's operator of a cell, computed by kernels where these take less time."""

    def run(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        # The arguments of packed sequences begin with their batch sizes, and those of padded ones end with batch_first.
        all_args = (None, *args) if isinstance(args[1], list) else (*args, False)
        dtype = _dtype_of(x)
        found = None if dtype is None else _computed(cell, dtype, x, *all_args)
        return of_torch(x, *args) if found is None else found

    return run


gru = outside_of_graphs(_or_torch("gru", torch.gru))
lstm = outside_of_graphs(_or_torch("lstm", torch.lstm))


@outside_of_graphs
def gru_cell(x: Tensor, hx: Tensor, *weights: Any) -> Tensor:
    """Compute `torch.gru_cell` by the kernel of a GRU without gradients, if there are many sequences and features.

    Gradients take longer here than in torch, and so do small steps, whose call costs more than their products, and
    products with few rows.
    """
    is_large = len(hx) >= 64 and hx.numel() * (hx.size(-1) + x.size(-1)) >= 2**21
    if is_large and x.dtype in _DTYPES and not torch.is_grad_enabled() and mode_of(x).is_eager:
        flat, (batch, features), step = [each for each in weights if each is not None], hx.shape, x.unsqueeze(1)
        shapes = [(1, batch, features), *_shapes_of(3 * features, x.size(-1), features)[: len(flat)]]
        if len(flat) != 3 and _is_usual(step, None, True, [hx.unsqueeze(0), *flat], shapes):
            return _one_direction("gru", step, hx.unsqueeze(1), flat, False, BATCH_FIRST, False)[1].squeeze(1)
    return torch.gru_cell(x, hx, *weights)


def _dtype_of(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which kernels compute sequences x, or None if they don't."""
    mode = mode_of(x)
    if mode.is_autocast and mode._replace(is_eager=True, is_autocast=False) == EAGER:
        is_rounded = x.dtype == torch.float32 and torch.get_autocast_dtype("cpu") == torch.bfloat16
        return torch.bfloat16 if HAS_BFLOAT16 and is_rounded and x.is_cpu else None
    is_known = x.dtype in _DTYPES or (x.dtype == torch.bfloat16 and HAS_BFLOAT16)
    return x.dtype if mode.is_eager and is_known else None


def _computed(
    cell: str, dtype: torch.dtype, x: Tensor, batch_sizes: MaybeTensor, hx: Any, flat: list[Tensor], *options: Any
) -> tuple[Tensor, ...] | None:
    """Return what torch's operator of the cell returns, or None if that takes less time or may do something else."""
    bias, num_layers, dropout, training, bidirectional, batch_first = options
    directions, states = 2 if bidirectional else 1, (hx,) if cell == "gru" else hx
    # Torch refuses other types, which a program may have set, and another number of weights.
    per, is_known = 4 if bias else 2, [type(each) for each in options] == _TYPES
    is_known = is_known and isinstance(states, (tuple, list)) and states[0].dim() == 3
    if not is_known or len(flat) != num_layers * directions * per:
        return None
    is_trained, steps = torch.is_grad_enabled(), x.size(int(batch_first)) if batch_sizes is None else len(batch_sizes)
    batch, features = states[0].shape[1:]
    # Torch computes packed sequences of one length as padded ones.
    is_padded = batch_sizes is None or len(x) == batch * steps
    is_fused = bool(cell == "lstm" and is_padded and x.dtype != torch.float64 and torch.backends.mkldnn.enabled)
    of_lstm = x, features, batch, steps, is_fused, is_trained
    if rounds_products(dtype):
        if is_slower_in_bfloat16(cell, features, steps):
            return None
    elif is_slower(features, batch, steps, dtype, is_trained) if cell == "gru" else is_slower_lstm(*of_lstm):
        return None
    rows, sizes = (3 if cell == "gru" else 4) * features, [x.size(-1), *[directions * features] * (num_layers - 1)]
    of_weights = [_shapes_of(rows, size, features) for size in sizes for _ in range(directions)]
    of_states = [(len(of_weights), batch, features)] * (1 if cell == "gru" else 2)
    shapes = of_states + [shape for each in of_weights for shape in each[:per]]
    if not _is_usual(x, batch_sizes, batch_first, [*states, *flat], shapes):
        return None
    # Copies of what backward needs here and not in torch, because a program may change it until then. The backward of
    # oneDNN needs all, and refuses what has changed.
    is_copied = is_trained and not is_fused
    layout = Layout(batch_sizes is None, batch_sizes)
    x = x.transpose(0, 1) if batch_first else x
    if is_copied and not any(weight.requires_grad for weight in flat[: directions * per : per]):
        x = x.clone()
    elif is_trained and not x.is_contiguous():
        # What torch keeps: a copy, or x itself, if oneDNN or a product of two matrices can read it.
        x = x.contiguous() if is_fused else x.flatten(0, 1).view(x.shape)
    is_kept = is_copied and not all(weight.requires_grad for weight in flat[1::per])
    before = (torch.stack([*states], 2) if len(states) > 1 or is_kept else hx.unsqueeze(2)).unbind()
    # The dtype of torch's outputs, which under autocast is that of the operator that computes them.
    of_outputs = dtype if is_fused else x.dtype
    x, lasts = as_dtype(x, dtype), list[Tensor]()
    for first in range(0, num_layers * directions, directions):
        found = [
            _one_direction(cell, x, before[at], flat[at * per : (at + 1) * per], at > first, layout, is_copied)
            for at in range(first, first + directions)
        ]
        lasts += [last for _, last in found]
        x = torch.cat([out for out, _ in found], -1) if directions == 2 else found[0][0]
        if training and dropout != 0 and first < (num_layers - 1) * directions:
            x = torch.dropout(x, dropout, True)
    x = as_dtype(x, of_outputs)
    if batch_first:
        # Torch's GRU returns no view.
        x = autograd.transposed_(x) if cell == "gru" else x.transpose(0, 1)
    stacked = (torch.stack(each) for each in zip(*(last.unbind(1) for last in lasts), strict=True))
    return x, *(as_dtype(each, of_outputs) for each in stacked)


def _shapes_of(rows: int, inputs: int, features: int) -> list[tuple[int, ...]]:
    """Return the shapes of the two weights of a layer, and of its two biases."""
    return [(rows, inputs), (rows, features), (rows,), (rows,)]


def _is_usual(
    x: Tensor, batch_sizes: MaybeTensor, batch_first: bool, tensors: list[Tensor], shapes: list[tuple[int, ...]]
) -> bool:
    """Return whether eager code may compute these tensors: on the CPU, of one dtype, states first in these shapes."""
    if not are_ordinary(x, *tensors, batch_sizes) or len_torch_dispatch_stack() or x.numel() == 0:
        return False
    are_alike = all(each is not None and each.is_cpu and each.dtype == x.dtype for each in (x, *tensors))
    if not are_alike or x.layout != torch.strided or not route.is_native(x):
        return False
    is_known = batch_sizes is None or (batch_sizes.dtype == torch.int64 and batch_sizes.is_cpu)
    if not is_known or (batch_sizes is not None and not is_packing(batch_sizes, len(x))):
        return False
    batch = x.size(1 - int(batch_first)) if batch_sizes is None else int(batch_sizes[0])
    return batch == shapes[0][1] and [each.shape for each in tensors] == shapes


def _one_direction(
    cell: str, x: Tensor, before: Tensor, weights: list[Tensor], reverse: bool, layout: Layout, is_copied: bool
) -> States:
    """Compute a layer in one direction from its states, (B, 1, H) or (B, 2, H). Return its outputs and last states."""
    bias: Any = None
    of_candidate, (of_input, of_state, *biases) = None, weights
    if biases and cell == "gru":
        size = 2 * of_state.size(-1)
        bias, of_candidate = biases[0] + F.pad(biases[1][:size], (0, size // 2)), biases[1][size:]
        of_candidate = of_candidate.clone() if is_copied else of_candidate
    elif biases:
        bias = biases[0] + biases[1]
    if is_copied and not x.requires_grad:
        of_input = of_input.clone()
    of_input, bias = as_dtype(of_input, x.dtype), None if bias is None else as_dtype(bias, x.dtype)
    context = Context(before, before, None, None, of_state, of_candidate)
    call = Call(spec_of(cell, "tanh", reverse, 0.0), [x, of_input, bias], context, layout)
    return autograd.run_kernel("linear_kernel", route.NATIVE, call, True)
