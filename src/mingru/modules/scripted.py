"""What scripted modules check: shapes, in place of all that `check` does. Eager code calls none of it."""

from torch import Tensor


def check_x(name: str, x: Tensor, leading: list[int], letters: str, input_dims: int, num_space_dims: int) -> None:
    at = x.dim() - 1 - num_space_dims
    if at not in leading or x.size(at) != input_dims:
        space = ", *space" if num_space_dims > 0 else ""
        raise ValueError(f"{name}: x must be ({letters}, {input_dims}{space}), got {x.shape}")


def check_shape(name: str, argument: str, x: Tensor | None, shape: list[int]) -> None:
    if x is not None and list(x.shape) != shape:
        raise ValueError(f"{name}: {argument} must be {shape}, got {x.shape}")


def check_steps(name: str, shape: list[int], reset: Tensor | None, dt: Tensor | None) -> None:
    check_shape(name, "reset", reset, shape)
    check_shape(name, "dt", dt, shape)
