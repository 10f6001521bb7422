"""Small functions on dtypes, shapes and parts of numbers that all backends share. All but the last are scriptable."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .modes import is_captured, is_compiling
from .names_of_torch import unsafe_view

# The states of all steps, and the state after the last step, (B, 1, *).
States = tuple[Tensor, Tensor]
# The output of a layer, and its last states.
Outputs = tuple[Tensor, list[Tensor]]
MaybeTensor = Tensor | None
MaybeList = list[Tensor] | None


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


def matrices(a: Tensor, parts: int) -> Tensor:
    """Return the matrices M(a), (*, parts, parts), with a b = M(a) b; a itself if it has one part.

    Row i and column j have the part i ^ j of a, with a sign. The first column is a.
    """
    if parts == 1:
        return a
    order, signs = [0, 1, 1, 0], [1.0, -1.0, 1.0, 1.0]
    if parts == 4:
        order = [0, 1, 2, 3, 1, 0, 3, 2, 2, 3, 0, 1, 3, 2, 1, 0]
        signs = [1.0, -1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0]
    found = a.index_select(a.dim() - 1, torch.tensor(order, device=a.device))
    found = found * torch.tensor(signs, dtype=a.dtype, device=a.device)
    return found.reshape(list(a.shape[:-1]) + [parts, parts])  # noqa: RUF005 (not in TorchScript)


def product(matrix: Tensor, b: Tensor, parts: int) -> Tensor:
    """Return the products a b of numbers with these parts, from `matrices` of a."""
    if parts == 1:
        return matrix * b
    if is_compiling():
        # A compiler fuses the sum of so few terms.
        return (matrix * b.unsqueeze(-2)).sum(-1)
    # Not `matmul`, which autocast and TensorFloat-32 round.
    out = matrix[..., 0] * b[..., :1]
    for part in range(1, parts):
        out = torch.addcmul(out, matrix[..., part], b[..., part : part + 1])
    return out


def plus_product(c: Tensor, matrix: Tensor, b: Tensor, parts: int) -> Tensor:
    """Return c + a b; see `product`."""
    return torch.addcmul(c, matrix, b) if parts == 1 else c + product(matrix, b, parts)


def times(a: Tensor, b: Tensor, parts: int) -> Tensor:
    """Return the products a b of numbers with these parts. Those of quaternions depend on the order."""
    return product(matrices(a, parts), b, parts)


def plus_times(c: Tensor, a: Tensor, b: Tensor, parts: int) -> Tensor:
    """Return c + a b; see `times`."""
    return plus_product(c, matrices(a, parts), b, parts)


def conjugate(a: Tensor, parts: int) -> Tensor:
    """Return the numbers with the opposite sign of all but the real part. Also for tensors of complex numbers."""
    return a.conj() if parts == 1 else torch.cat([a[..., :1], -a[..., 1:]], -1)


def one_like(a: Tensor, parts: int) -> Tensor:
    """Return the number 1 in each element."""
    one = torch.ones_like(a)
    return one if parts == 1 else torch.cat([one[..., :1], torch.zeros_like(a[..., 1:])], -1)


def empty_states(out: Tensor, h: Tensor, others: list[MaybeTensor]) -> States:
    """Return the result for an empty sequence or batch: the last state is h.

    Empty sums connect both to all tensors, so that gradients are 0, as torch.nn.GRU's are, and not None.
    """
    out = out + h.flatten()[:0].sum().to(out.dtype)
    for each in others:
        if each is not None:
            out = out + each.flatten()[:0].sum().to(out.dtype)
    return out, h + out.sum().to(h.dtype)


def along(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask over the leading dimensions of `like`, so that it broadcasts over the trailing dimensions."""
    for _ in range(like.dim() - mask.dim()):
        mask = mask.unsqueeze(-1)
    return mask


def reshaped(x: Tensor, shape: list[int]) -> Tensor:
    """Return x in another shape as a tensor that autograd does not treat as a view, so that `detach_` works.

    Autograd does not detect in-place changes of the result. Call it only if no operation has saved x for the backward
    pass.
    """
    return x.view(shape) if is_captured() else unsafe_view(x, shape)


def copied(view: Tensor) -> Tensor:
    """Return a copy of a view, because a view cannot be detached in place. In a graph, return the view."""
    return view if is_captured() else view.clone()


def without_dims(state: Tensor, dims: list[int]) -> Tensor:
    """Remove dimensions of size 1 from a new state that has no other references; `dims` must be in descending order."""
    for dim in dims:
        # In place, because `squeeze` would return a view, which cannot be detached in place.
        state = state.squeeze(dim) if is_captured() else state.squeeze_(dim)
    return state


def is_expandable(shape: Sequence[int], whole: Sequence[int]) -> bool:
    """Return whether a tensor of a shape can be expanded to another."""
    sizes = zip(reversed(shape), reversed(whole), strict=False)
    return len(shape) <= len(whole) and all(size in (1, other) for size, other in sizes)
