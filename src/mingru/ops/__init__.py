"""The recurrences, each computed by one of several backends.

A recurrence is one value, a `Call`: its `Spec` (cell, activation, direction), the inputs of the cell, its `Context`
(states, resets, elapsed times) and its `Layout` (memory layout). The callers, `functional` and `modules`, check the
tensors before the call.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import autograd, block_recurrence, in_cache, route
from .backend import SCANS
from .backends import torch_in_graphs
from .call import BATCH_FIRST, Call, Context, Layout, Spec, is_plain
from .call import spec_of as spec_of
from .cells import CELLS, MIXTURES
from .in_cache import Map
from .layout import divided, in_layout, joined, kept_in_padding, padded_call, padding_of, without_padding
from .linear_map import LINEAR_MAPS, are_recomputed, gated
from .modes import scripted_as
from .recorded import Recorded
from .scan import LinearScan, in_accumulation_dtype
from .shape import MaybeTensor, States, as_dtype


def linear_scan(
    a: Tensor, b: Tensor, h: Tensor, reset: MaybeTensor, reverse: bool, backend: str, lengths: MaybeTensor
) -> States:
    """Compute h_t = a_t h_{t-1} + b_t for (B, S, *) sequences. A reset sets h_{t-1} to 0."""
    if lengths is not None:
        a, b = kept_in_padding(a, b, lengths, 1)
        reset = None if reset is None else reset & ~padding_of(lengths, b)
    scan = LinearScan(a, b, h, reset, reverse)
    way = route.choose(SCANS["linear_scan", reverse], b, backend)
    if way.mode.is_traced or b.numel() == 0:
        out, last = torch_in_graphs.linear_scan(*in_accumulation_dtype(scan)[:5])
    else:
        out, last = autograd.scan(way, scan)
    out = out if lengths is None else without_padding(out, lengths, False)
    return as_dtype(out, b.dtype), as_dtype(last, h.dtype)


@scripted_as(torch_in_graphs.recurrence)
def recurrence(
    spec: Spec, inputs: Sequence[Tensor], context: Context, layout: Layout = BATCH_FIRST, backend: str = "auto"
) -> States:
    """Compute the recurrence of a cell from its pre-activations."""
    return _run(route.choose(spec, inputs[0], backend), Call(spec, list(inputs), context, layout))


def linear_recurrence(
    spec: Spec,
    x: Tensor,
    linear: Any,
    context: Context,
    layout: Layout,
    recompute: bool | None = None,
    norm: nn.Module | None = None,
    output_gate: bool = False,
) -> States:
    """Compute the recurrence of the pre-activations linear(norm(x)), by one fused kernel if possible.

    `recompute` is that of `are_recomputed`. The last of the pre-activations may be an output gate of the states.
    """
    if isinstance(x, Recorded):
        return x.recurrence(spec, linear, context, norm, output_gate)
    way = route.choose(spec, x)
    call = route.fused_with(linear, way, Call(spec, [x], context, layout), norm, output_gate)
    if call is None and norm is not None:
        x = norm(x)
        call = route.fused_with(linear, way, Call(spec, [x], context, layout), None, output_gate)
    is_in_onnx = way.mode.is_onnx and spec.cell == "gru" and is_plain(spec)
    if is_in_onnx and block_recurrence.is_one_node(way.mode, x, context, layout):
        own = [x, linear.weight, linear.bias]
        if type(linear) not in LINEAR_MAPS or route.is_hooked(linear):
            x = linear(x)
            own = [x, torch.eye(x.size(-1), dtype=x.dtype, device=x.device), None]
        return block_recurrence.in_onnx(way.mode, Call(spec, own, context, layout))
    if call is None:
        x = linear(x)
        if (found := _of_gru(way, Call(spec, [x], context, layout), recompute)) is not None:
            return found
        inputs = list(x.chunk(CELLS[spec.cell].num_inputs + output_gate, -1))
        gate = inputs.pop() if output_gate else None
        return gated(_run(way, Call(spec, inputs, context, layout)), gate)
    if way is route.NATIVE and spec.cell == "gru" and block_recurrence.is_for_cell_of_torch(call):
        return block_recurrence.by_cell_of_torch(call)
    return autograd.run_kernel("linear_kernel", way, call, not are_recomputed(spec.cell, x, recompute))


def mapped_recurrence(spec: Spec, x: Tensor, of: Map, context: Context, layout: Layout) -> States:
    """Compute the recurrence of the pre-activations that the map `of` computes from x.

    `context.h` is expanded to the shape of the states.
    """
    batch = x.shape[1 if layout.time_first else 0]
    call = Call(spec, [x], context._replace(h=context.h.expand(batch, 1, *of.state_shape)), layout)
    sizes = in_cache.sizes_of(x, of, CELLS[spec.cell].num_inputs)

    def run(part: Call) -> States:
        return recurrence(spec, of.inputs(part.tensors[0]), part.context, layout)

    return run(call) if sizes is None else in_cache.in_slices(run, call, of, sizes)


def _of_gru(way: route.Way, call: Call, recompute: bool | None = None) -> States | None:
    """Compute the recurrence of a GRU from its pre-activations, side by side in one tensor, by a kernel if possible."""
    if call.spec.cell != "gru":
        return None
    # The kernel's sizes would depend on the values of lengths, which a captured graph does not know.
    lengths = call.layout.lengths if way.mode.is_symbolic else None
    fused = route.fused_with(None, way, call if lengths is None else block_recurrence.kept_in_padding(call))
    if fused is None:
        return None
    out, last = autograd.run_kernel("linear_kernel", way, fused, recompute is not True)
    return out if lengths is None else without_padding(out, lengths, call.layout.time_first), last


def _run(way: route.Way, call: Call) -> States:
    if way.mode.is_traced or call.tensors[0].numel() == 0:
        return torch_in_graphs.traced_recurrence(*call)
    if call.spec.cell in MIXTURES:
        step = torch_in_graphs.mixed_step(call)
        return step or joined([_run(way, each) for each in divided(call)], call.layout)
    kernel = route.kernel_of(way, call)
    if kernel is None:
        whole = [torch.cat(call.tensors, -1)] if call.spec.cell == "gru" else call.tensors
        return _of_gru(way, call._replace(tensors=whole)) or autograd.composed(way, call)
    if kernel.packed or (call.layout.batch_sizes is None and call.layout.lengths is None):
        return autograd.run_kernel("kernel", way, call, False)
    states = autograd.run_kernel("kernel", way, padded_call(call), False)
    return in_layout(states, call)
