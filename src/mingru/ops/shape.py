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


def to_parts(x: Tensor, parts: int) -> Tensor:
    """Return a sequence (B, S, H, *) as numbers (B, S, H / parts, *, parts) of neighboring features.

    Numbers have 1 part (real; x itself), 2 (complex) or 4 (quaternions), in the last dimension.
    """
    if parts == 1:
        return x
    # Not `unflatten`, because it has no rule for `is_grads_batched`.
    shape = [x.size(0), x.size(1), x.size(2) // parts, parts] + list(x.shape[3:])  # noqa: RUF005 (not in TorchScript)
    return x.reshape(shape).movedim(3, x.dim())


def from_parts(x: Tensor, parts: int) -> Tensor:
    """Return numbers (B, S, H / parts, *, parts) as a sequence (B, S, H, *)."""
    if parts == 1:
        return x
    shape = [x.size(0), x.size(1), x.size(2) * parts] + list(x.shape[3:-1])  # noqa: RUF005 (not in TorchScript)
    return x.movedim(x.dim() - 1, 3).reshape(shape)


def unflattened(x: Tensor, like: Tensor) -> Tensor:
    """Return x with its first dimension split into the first two of `like`."""
    # Not `unflatten`, of which an older ONNX exporter makes fixed sizes.
    return x.reshape([like.size(0), like.size(1)] + list(x.shape[1:]))  # noqa: RUF005 (not in TorchScript)


def times(a: Tensor, b: Tensor, parts: int) -> Tensor:
    """Return the products a b of numbers with these parts. Those of quaternions depend on the order."""
    if parts == 1:
        return a * b
    return _plus_other_terms(a[..., :1] * b, a, b, parts)


def plus_times(c: Tensor, a: Tensor, b: Tensor, parts: int) -> Tensor:
    """Return c + a b; see `times`."""
    if parts == 1:
        return torch.addcmul(c, a, b)
    return _plus_other_terms(torch.addcmul(c, a[..., :1], b), a, b, parts)


def _plus_other_terms(c: Tensor, a: Tensor, b: Tensor, parts: int) -> Tensor:
    """Return c + (a - w) b, where w is the real part of a.

    A term x i b of the product is (-x, x) (b_1, b_0): signs of a, and an order of b, which keeps graphs small.
    """
    backwards = b.flip(-1)
    if parts == 2:
        y = a[..., 1:]
        return torch.addcmul(c, torch.cat([-y, y], -1), backwards)
    x, y, z = a[..., 1:2], a[..., 2:3], a[..., 3:]
    c = torch.addcmul(c, torch.cat([-x, x, -x, x], -1), torch.cat([backwards[..., 2:], backwards[..., :2]], -1))
    c = torch.addcmul(c, torch.cat([-y, y, y, -y], -1), torch.cat([b[..., 2:], b[..., :2]], -1))
    return torch.addcmul(c, torch.cat([-z, -z, z, z], -1), backwards)


def conjugate(a: Tensor, parts: int) -> Tensor:
    """Return the numbers with the opposite sign of all but the real part. Also for tensors of complex numbers."""
    return a.conj() if parts == 1 else torch.cat([a[..., :1], -a[..., 1:]], -1)


def one_like(a: Tensor, parts: int) -> Tensor:
    """Return the number 1 in each element."""
    one = torch.ones_like(a)
    return one if parts == 1 else torch.cat([one[..., :1], torch.zeros_like(a[..., 1:])], -1)


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
