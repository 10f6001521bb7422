"""Small facts that all backends share. All of it scripts."""

import torch
from torch import Tensor

# What a recurrence returns: the states of all steps, and the state after the last one, (B, 1, *).
States = tuple[Tensor, Tensor]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a recurrence is computed: float32 for bfloat16 and float16, otherwise the same."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return dtype


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x unchanged if it already has this dtype; exported graphs record even a conversion that does nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def empty_states(out: Tensor, h: Tensor, step_dim: int) -> States:
    """Return the result for an empty sequence or batch: the last state is h.

    The empty sum connects it to the inputs, so that autograd gives them a gradient instead of None.
    """
    last = out.sum(step_dim)
    return out, h + last.unsqueeze(1).to(h.dtype)


def along(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask over the leading dimensions of `like`, made to broadcast over the trailing ones."""
    for _ in range(like.dim() - mask.dim()):
        mask = mask.unsqueeze(-1)
    return mask
