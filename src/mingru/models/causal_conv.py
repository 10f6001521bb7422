"""A causal depthwise convolution whose last inputs are a state."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.inference import plannable


@plannable
class CausalConv(nn.Module):
    """Compute y_t = bias + sum_k weight_k * x_{t-k}, with k from 0 to kernel_size - 1, for each feature on its own.

    Inputs before the first step are the state `(1, B, kernel_size - 1, C)`, the oldest first. Inputs from before a
    reset count as 0.
    """

    def __init__(self, dims: int, kernel_size: int, bias: bool, **factory: Any) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(kernel_size, dims, **factory))
        self.bias = nn.Parameter(torch.empty(dims, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Re-initialize all parameters, as `torch.nn.Conv1d` does."""
        bound = self.kernel_size**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x: Tensor, state: Tensor, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return y (B, S, C) and the state after the last step of each sequence."""
        num_steps, num_past = x.size(1), self.kernel_size - 1
        past, segment = self._past(x, state, reset)
        y = x * self.weight[0]
        if self.bias is not None:
            y = y + self.bias
        for lag in range(1, self.kernel_size):
            first = num_past - lag
            shifted = past[:, first : first + num_steps]
            if segment is not None:
                is_before_reset = segment[:, first : first + num_steps] != segment[:, num_past:]
                shifted = shifted.masked_fill(is_before_reset.unsqueeze(2), 0.0)
            y = torch.addcmul(y, shifted, self.weight[lag])
        return y, self._state_after(past, segment, lengths)

    def _past(self, x: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the inputs from the state on, and their segments: steps of one segment have no reset between them."""
        if state.dtype != x.dtype:
            state = state.to(x.dtype)
        segment: Tensor | None = None
        if reset is not None:
            # The state belongs to segment 0.
            segment = F.pad(reset.cumsum(1), [self.kernel_size - 1, 0])
        # Step t of x is step t + kernel_size - 1.
        return torch.cat([state.squeeze(0), x], 1), segment

    def _state_after(self, past: Tensor, segment: Tensor | None, lengths: Tensor | None) -> Tensor:
        num_past = self.kernel_size - 1
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
