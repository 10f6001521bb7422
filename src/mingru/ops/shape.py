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


def to_pairs(x: Tensor) -> Tensor:
    """Return a sequence (B, S, H, *) as (B, S, H / 2, *, 2): features 2 j and 2 j + 1 are a pair."""
    # Not `unflatten`, because it has no rule for `is_grads_batched`.
    shape = [x.size(0), x.size(1), x.size(2) // 2, 2] + list(x.shape[3:])  # noqa: RUF005 (not in TorchScript)
    return x.reshape(shape).movedim(3, -1)


def from_pairs(x: Tensor) -> Tensor:
    """Return a sequence (B, S, H / 2, *, 2) as (B, S, H, *)."""
    shape = [x.size(0), x.size(1), x.size(2) * 2] + list(x.shape[3:-1])  # noqa: RUF005 (not in TorchScript)
    return x.movedim(-1, 3).reshape(shape)


def as_real(x: Tensor) -> Tensor:
    """Return complex numbers (B, S, *) as pairs of real numbers (B, S, *, 2)."""
    return torch.view_as_real(x.resolve_conj())


def times(a: Tensor, b: Tensor, pairs: bool) -> Tensor:
    """Return the product of real numbers, or of complex numbers that are pairs in the last dimension."""
    if not pairs:
        return a * b
    real, turn = _parts(a)
    return torch.addcmul(real * b, turn, b.flip(-1))


def plus_times(c: Tensor, a: Tensor, b: Tensor, pairs: bool) -> Tensor:
    """Return c + a b; see `times`."""
    if not pairs:
        return torch.addcmul(c, a, b)
    real, turn = _parts(a)
    return torch.addcmul(torch.addcmul(c, real, b), turn, b.flip(-1))


def _parts(a: Tensor) -> States:
    """Return x and (-y, y) of pairs a = (x, y): a b = x (b_1, b_2) + (-y, y) (b_2, b_1), which keeps graphs small."""
    imaginary = a[..., 1:]
    return a[..., :1], torch.cat([-imaginary, imaginary], -1)


def one_like(a: Tensor, pairs: bool) -> Tensor:
    """Return 1 in each element, or the pair (1, 0)."""
    one = torch.ones_like(a)
    if not pairs:
        return one
    return torch.stack([one.select(-1, 0), torch.zeros_like(a.select(-1, 1))], -1)


def empty_states(out: Tensor, h: Tensor) -> States:
    """Return the result for an empty sequence or batch: the last state is h.

    The empty sum connects the last state to the inputs, so that their gradients are empty tensors instead of None.
    """
    return out, h + out.sum().to(h.dtype)


def along(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask over the leading dimensions of `like`, so that it broadcasts over the trailing dimensions."""
    for _ in range(like.dim() - mask.dim()):
        mask = mask.unsqueeze(-1)
    return mask
