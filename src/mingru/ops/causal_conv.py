"""The causal depthwise convolution: one operator of the CPU kernels, or tensor operations."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import differentiable
from .backend import SCANS, Gradients
from .backends import native
from .call import Context, Layout, flattened
from .modes import are_batched, scripted_as
from .recorded import Recorded
from .route import is_for_native
from .shape import States, as_dtype

# Not half widths: their conversions take as long as what the operator saves.
_DTYPES = (torch.float32, torch.float64)
Maybe = Tensor | None


def composed(
    x: Tensor, weight: Tensor, bias: Maybe, state: Tensor, reset: Maybe, lengths: Maybe, num_past: int, adds_x: bool
) -> States:
    """Compute a causal convolution by differentiable operations; see `causal_conv`."""
    num_steps = x.size(1)
    past, segment = past_and_segment(x, state, reset, num_past)
    y = x * weight[0]
    if bias is not None:
        y = y + bias
    for lag in range(1, num_past + 1):
        first = num_past - lag
        shifted = past[:, first : first + num_steps]
        if segment is not None:
            is_before_reset = segment[:, first : first + num_steps] != segment[:, num_past:]
            shifted = shifted.masked_fill(is_before_reset.unsqueeze(2), 0.0)
        y = torch.addcmul(y, shifted, weight[lag])
    return y + x if adds_x else y, state_after(past, segment, lengths, num_past)


@scripted_as(composed)
def causal_conv(
    x: Tensor, weight: Tensor, bias: Maybe, state: Tensor, reset: Maybe, lengths: Maybe, num_past: int, adds_x: bool
) -> States:
    """Compute y_t = bias + sum_k weight_k x_{t-k}, and x_t if `adds_x`, and the state after the last step.

    x is (B, S, C), the weight (num_past + 1, C), and the state the inputs before x, (1, B, num_past, C).
    """
    if isinstance(x, Recorded):
        return x.causal_conv(weight, bias, state, num_past, adds_x)
    tensors = (x, weight, bias, state, reset, lengths)
    is_plain = is_for_native(*tensors) and x.dtype in _DTYPES
    own = zip((weight, bias), ((num_past + 1, x.shape[-1]), x.shape[-1:]), strict=True)
    # Shapes come last, because a trace would record a comparison.
    fits = is_plain and all(each is None or (each.dtype == x.dtype and each.shape == shape) for each, shape in own)
    if not fits or x.numel() == 0:
        return composed(*tensors, num_past, adds_x)
    states: States = _Fused.apply(num_past, adds_x, *tensors)  # type: ignore[no-untyped-call]
    return states


class _Fused(torch.autograd.Function):
    """Compute the convolution and its first derivatives by the operators, all others by `composed`."""

    @staticmethod
    def forward(ctx: Any, num_past: int, adds_x: bool, *tensors: Any) -> States:
        ctx.num_past, ctx.adds_x = num_past, adds_x
        ctx.save_for_backward(*tensors)
        return torch.ops.mingru.causal_conv_forward(*_arguments(*tensors), adds_x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Gradients:
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled() or are_batched(*grad):
            again = partial(composed, num_past=ctx.num_past, adds_x=ctx.adds_x)
            return None, None, *differentiable(again, tensors, ctx.needs_input_grad[2:], grad)
        x, weight, bias, state = torch.ops.mingru.causal_conv_backward(*_arguments(*tensors), ctx.adds_x, *grad)
        of_bias = None if tensors[2] is None else bias
        return None, None, x, weight, of_bias, as_dtype(state, tensors[3].dtype), None, None


def _arguments(x: Tensor, weight: Tensor, bias: Maybe, state: Tensor, reset: Maybe, lengths: Maybe) -> tuple[Any, ...]:
    """Return the first arguments of the operators."""
    layout = Layout(False, None, None if lengths is None else lengths.long().contiguous())
    given = [*flattened(Context(state, state, reset), layout), x]
    return x, weight, bias, *native.arguments(SCANS["linear_scan", False], given, False)[:2]


def past_and_segment(x: Tensor, state: Tensor, reset: Maybe, num_past: int) -> tuple[Tensor, Maybe]:
    """Return the inputs from the state on, and their segments: steps of one segment have no reset between them."""
    if state.dtype != x.dtype:
        state = state.to(x.dtype)
    segment: Maybe = None
    if reset is not None:
        # The state belongs to segment 0.
        segment = F.pad(reset.cumsum(1), [num_past, 0])
    # Step t of x is step t + num_past.
    return torch.cat([state.squeeze(0), x], 1), segment


def state_after(past: Tensor, segment: Maybe, lengths: Maybe, num_past: int) -> Tensor:
    """Return the state after the last step of each sequence, from the inputs and segments from the state on."""
    # Not after the last operation, because the state must not be a view.
    past = past.unsqueeze(0)
    if lengths is None:
        last = past[:, :, past.size(2) - num_past :]
        if segment is None:
            # Not a view, which would keep the whole sequence in memory.
            return last.clone()
        segment = segment[:, segment.size(1) - num_past :]
    else:
        # int64, because `gather` takes no narrower dtype.
        steps = lengths.to(past.device).long().unsqueeze(1) + torch.arange(num_past, device=past.device)
        last = past.gather(2, steps.unsqueeze(2).expand(1, -1, -1, past.size(3)))
        if segment is None:
            return last
        segment = segment.gather(1, steps)
    is_before_reset = segment != segment[:, -1:]
    return last.masked_fill(is_before_reset.unsqueeze(2), 0.0)
