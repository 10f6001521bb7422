"""Small facts that all bodies share. All of it scripts."""

import math

import torch
from torch import Tensor

# What a recurrence returns: the states of all steps (B, S, *), and the state after the last one (B, 1, *).
States = tuple[Tensor, Tensor]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which a recurrence is computed: float32 for the half-width types, else the tensor's own."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return dtype


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x itself where it has this type already: of a conversion to the same, exported graphs keep a trace."""
    return x if x.dtype == dtype else x.to(dtype)


def empty_states(out: Tensor, h: Tensor) -> States:
    """Of no step, or no sequence: the last state is h, and comes from the inputs all the same, as gradients have it."""
    return out, h + out.sum(1, keepdim=True).to(h.dtype)


def time_first(x: Tensor) -> bool:
    """Whether a (B, S, *) tensor lies in memory as (S, B, *)."""
    return x.shape[0] > 1 and x.stride(0) < x.stride(1)


def along(reset: Tensor, like: Tensor) -> Tensor:
    """A mask over the leading dimensions of `like`, made to broadcast over the trailing ones."""
    for _ in range(like.dim() - reset.dim()):
        reset = reset.unsqueeze(-1)
    return reset


def chunks_of(num_steps: int) -> list[int]:
    """How many chunks of how many steps a sequence is cut into; what is left over is stepped through.

    Chunks of about the root of the length need the fewest launches. Below 16 steps, stepping through is quicker.
    """
    size = int(math.sqrt(num_steps)) if num_steps >= 16 else num_steps + 1
    return [num_steps // size, size]
