"""Small functions on dtypes and shapes that all backends share. Everything here is scriptable."""

import torch
from torch import Tensor

# The states of all steps, and the state after the last step, (B, 1, *).
States = tuple[Tensor, Tensor]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a recurrence is computed: float32 for bfloat16 and float16, otherwise the same."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return dtype


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in this dtype. An unneeded conversion is skipped, because exported graphs would record it."""
    return x if x.dtype == dtype else x.to(dtype)


def empty_states(out: Tensor, h: Tensor, step_dim: int) -> States:
    """Return the result for an empty sequence or batch: the last state is h.

    The empty sum connects the last state to the inputs, so that their gradients are empty tensors instead of None.
    """
    last = out.sum(step_dim)
    return out, h + last.unsqueeze(1).to(h.dtype)


def along(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask over the leading dimensions of `like`, so that it broadcasts over the trailing dimensions."""
    for _ in range(like.dim() - mask.dim()):
        mask = mask.unsqueeze(-1)
    return mask
