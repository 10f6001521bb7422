"""Functions that TorchScript compiles: checks of shapes in place of the checks of arguments, and packed sequences.

TorchScript knows that a tensor is no PackedSequence, and omits the branch.
"""

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..ops.graph import untraced


def check_x(name: str, x: Tensor, leading: list[int], letters: str, input_dims: int, num_space_dims: int) -> None:
    at = x.dim() - 1 - num_space_dims
    if at not in leading or x.size(at) != input_dims:
        space = ", *space" if num_space_dims > 0 else ""
        raise ValueError(f"{name}: x must be ({letters}, {input_dims}{space}), got {x.shape}")


def check_shape(name: str, argument: str, x: Tensor | None, shape: list[int]) -> None:
    if x is not None and list(x.shape) != shape:
        raise ValueError(f"{name}: {argument} must be {shape}, got {x.shape}")


def check_steps(name: str, shape: list[int], reset: Tensor | None, dt: Tensor | None, is_timed: bool) -> None:
    check_shape(name, "reset", reset, shape)
    check_shape(name, "dt", dt, shape)
    if dt is not None and not is_timed:
        raise ValueError(f"{name}: dt must be None because this cell takes no elapsed times")


def data_of(x: Tensor) -> Tensor:
    """Return a tensor unchanged, or the data of a PackedSequence."""
    if isinstance(x, PackedSequence):
        return x.data
    return x


def with_data(x: Tensor, data: Tensor) -> Tensor:
    """Return data, packed like x if x is a PackedSequence."""
    if isinstance(x, PackedSequence):
        return PackedSequence(data, *x[1:])
    return data


@untraced
def check_returned(name: str, index: int, states: list[Tensor], num_states: int) -> None:
    """Raise an error if a layer of a stack returns other states than it says, which the next call could not take."""
    layer = f"{name}: layers[{index}]"
    if not isinstance(states, (list, tuple)):
        raise TypeError(f"{layer} must return its states in a list, got something else; return (out, [state])")
    if len(states) != num_states:
        raise ValueError(f"{layer} must return num_states = {num_states} states, got {len(states)}; set num_states")


@untraced
def check_same_shape(name: str, index: int, added: Tensor, data: Tensor) -> None:
    """Raise an error if a layer of a stack with a residual changes the shape of its input."""
    if added.shape != data.shape:
        got = f"from {list(added.shape)} to {list(data.shape)}; pass residual=True to the layer instead"
        raise ValueError(f"{name}: layers[{index}] must keep the shape of x because residual is True, got {got}")
