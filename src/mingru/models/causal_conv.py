"""A causal depthwise convolution whose last inputs are a state."""

from typing import Any

import torch
from torch import Tensor, nn

from ..modules.plan import plannable
from ..ops.causal_conv import Maybe, causal_conv
from ..ops.route import is_hooked
from ..ops.shape import States


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
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, x: Tensor, state: Tensor, reset: Maybe = None, lengths: Maybe = None, adds_x: bool = False
    ) -> States:
        """Return y (B, S, C), or x + y, and the state after the last step of each sequence."""
        return causal_conv(x, self.weight, self.bias, state, reset, lengths, self.kernel_size - 1, adds_x)


def plus_convolved(conv: nn.Module, x: Tensor, **given: Maybe) -> States:
    """Return x + conv(x) and the state: by the module itself, unless it is another one or hooks see its output.

    All but x go by name, because the hooks of Opacus expect positional arguments to be tensors with the batch first.
    """
    if type(conv) is CausalConv and not is_hooked(conv):
        states: States = conv(x, **given, adds_x=True)
        return states
    y, state = conv(x, **given)
    return y + x, state
