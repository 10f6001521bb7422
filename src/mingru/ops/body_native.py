"""The `"native"` body: C++ kernels for the CPU (`csrc/`), one pass over memory, vectorised over lanes.

They take sequences (B, S, N), states in the type of computation, and dense lanes; this module puts tensors into that
form and back. Operators are registered with torch's dispatcher when this module is imported.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .activation import ACTIVATIONS
from .cell import NUM_INPUTS, Kind
from .shape import States, accumulate_dtype, time_first

DIFFERENTIABLE = False
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _load() -> str | None:
    """Register the operators; the sentence that says why they are missing, or None."""
    folder = Path(__file__).parent.parent
    libraries = [path for path in (folder / "_kernels.so", folder / "_kernels.dll") if path.is_file()]
    if not libraries:
        return "the compiled kernels were not built; reinstall where a C++17 compiler is on the PATH"
    try:
        torch.ops.load_library(libraries[0])  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the compiled kernels can't be loaded ({error}); reinstall for this version of torch"
    return None


def _register_shapes() -> None:
    """What comes out, for graphs that are captured without data."""

    def sequence(like: Tensor, lanes: int) -> Tensor:
        batch, steps, _ = like.shape
        if time_first(like):
            return like.new_empty(steps, batch, lanes).transpose(0, 1)
        return like.new_empty(batch, steps, lanes)

    def linear_scan_forward(a: Tensor, b: Tensor, h: Tensor, *_: Any) -> States:
        return sequence(b, b.shape[2]), torch.empty_like(h)

    def linear_scan_backward(a: Tensor, h: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return sequence(a, 2 * a.shape[2]), torch.empty_like(h)

    def recurrence_forward(inputs: list[Tensor], bias: Tensor | None, h: Tensor, *_: Any) -> States:
        return sequence(inputs[0], inputs[0].shape[2]), torch.empty_like(h)

    def recurrence_backward(inputs: list[Tensor], bias: Tensor | None, h: Tensor, *_: Any) -> tuple[Tensor, ...]:
        grads = sequence(inputs[0], len(inputs) * inputs[0].shape[2])
        return grads, torch.empty_like(h), torch.empty_like(h)

    def linear_recurrence_forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        *_, cell, _, keep = rest
        num_columns = weight.shape[0]
        product = x.new_empty(x.shape[0] * x.shape[1] if keep else 0, num_columns)
        return sequence(x, num_columns // _num_inputs(cell)), torch.empty_like(h), product

    def linear_recurrence_backward(
        x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        *_, needs_x, needs_weight, needs_bias = rest
        grad_x = sequence(x, x.shape[2]) if needs_x else x.new_empty(0)
        grad_weight = weight.new_empty(weight.shape[0] if needs_weight else 0, weight.shape[1])
        grad_bias = weight.new_empty(1 if needs_bias else 0, weight.shape[0])
        return grad_x, grad_weight, grad_bias, torch.empty_like(h), torch.empty_like(h)

    for shapes in (
        linear_scan_forward,
        linear_scan_backward,
        recurrence_forward,
        recurrence_backward,
        linear_recurrence_forward,
        linear_recurrence_backward,
    ):
        torch.library.register_fake(f"mingru::{shapes.__name__}", shapes)


# The cells as the kernels number them (csrc/scan.h); 0 is the linear scan.
_CELLS = [(cell, activation) for cell in NUM_INPUTS for activation in ACTIVATIONS]


_NUMBERS = {pair: 1 + index for index, pair in enumerate(_CELLS)}


def _number(kind: Kind) -> int:
    return _NUMBERS[kind.cell, kind.activation]


def _num_inputs(number: int) -> int:
    return NUM_INPUTS[_CELLS[number - 1][0]]


_WHY_NOT = _load()
if _WHY_NOT is None:
    _register_shapes()


def unavailable() -> str | None:
    return _WHY_NOT


def refuses(sequence: Tensor, activation: str | None) -> str | None:
    if sequence.device.type != "cpu":
        return f"it runs on the CPU, and the tensors are on {sequence.device}"
    if sequence.dtype not in _DTYPES:
        return f"it computes real floating types, and the tensors are {sequence.dtype}"
    return None


def _lanes(x: Tensor) -> Tensor:
    """(B, S, *) as (B, S, N)."""
    return x if x.dim() == 3 else x.reshape(*x.shape[:2], -1)


def _state(h: Tensor, sequence: Tensor) -> Tensor:
    """(B, 1, *) as the kernels take it: dense, in the type of computation."""
    dtype = accumulate_dtype(sequence.dtype)
    return (h if h.dtype == dtype else h.to(dtype)).contiguous()


def _states(h: Tensor, initial: Tensor, reset: Tensor | None, sequence: Tensor) -> States:
    """Both states likewise; without resets the initial one is not used, and need not be made dense."""
    h = _state(h, sequence)
    return h, h if reset is None else _state(initial, sequence)


def linear_scan(a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool) -> States:
    out, last = torch.ops.mingru.linear_scan_forward(_lanes(a), _lanes(b), _state(h, b), reset, reverse)
    return out.view(b.shape), last.to(h.dtype)


def linear_scan_backward(
    a: Tensor, h: Tensor, reset: Tensor | None, out: Tensor, grad_out: Tensor, grad_last: Tensor, reverse: bool
) -> tuple[Tensor, ...]:
    grads, grad_h = torch.ops.mingru.linear_scan_backward(
        _lanes(a), _state(h, a), reset, _lanes(out), _lanes(grad_out), _state(grad_last, a), reverse
    )
    return *_apart(grads, [a, a]), grad_h.to(h.dtype)


def mingru(
    gate: Tensor, candidate: Tensor, h: Tensor, initial: Tensor, reset: Tensor | None, activation: str, reverse: bool
) -> States:
    return recurrence([gate, candidate], h, initial, reset, None, Kind("mingru", activation, reverse))


def mingru_backward(
    gate: Tensor,
    candidate: Tensor,
    h: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    out: Tensor,
    grad_out: Tensor,
    grad_last: Tensor,
    activation: str,
    reverse: bool,
) -> tuple[Tensor, ...]:
    grad = (grad_out, grad_last)
    kind = Kind("mingru", activation, reverse)
    return recurrence_backward([gate, candidate], h, initial, reset, None, out, grad, kind)


def recurrence(
    inputs: Sequence[Tensor],
    h: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    batch_sizes: Tensor | None,
    kind: Kind,
) -> States:
    """Any cell from its pre-activations, packed or not."""
    out, last = torch.ops.mingru.recurrence_forward(
        [_lanes(x) for x in inputs],
        None,
        *_states(h, initial, reset, inputs[0]),
        reset,
        batch_sizes,
        _number(kind),
        kind.reverse,
    )
    return out.view(inputs[0].shape), last.view(h.shape).to(h.dtype)


def recurrence_backward(
    inputs: Sequence[Tensor],
    h: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    batch_sizes: Tensor | None,
    out: Tensor,
    grad: States,
    kind: Kind,
) -> tuple[Tensor, ...]:
    """The gradients of all inputs, h and initial."""
    grads, grad_h, grad_initial = torch.ops.mingru.recurrence_backward(
        [_lanes(x) for x in inputs],
        None,
        *_states(h, initial, reset, inputs[0]),
        reset,
        batch_sizes,
        _lanes(out),
        _lanes(grad[0]),
        _state(grad[1], inputs[0]),
        _number(kind),
        kind.reverse,
    )
    return *_apart(grads, inputs), grad_h.to(h.dtype), grad_initial.to(initial.dtype)


def linear_recurrence(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    batch_sizes: Tensor | None,
    kind: Kind,
    keep: bool,
) -> tuple[Tensor, ...]:
    """`recurrence` of a linear map of x (B, S, I), block by block; if `keep`, also the products x W^T."""
    out, last, product = torch.ops.mingru.linear_recurrence_forward(
        x,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        *_states(h, initial, reset, x),
        reset,
        batch_sizes,
        _number(kind),
        kind.reverse,
        keep,
    )
    return out, last.to(h.dtype), product


def linear_recurrence_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    batch_sizes: Tensor | None,
    out: Tensor,
    product: Tensor,
    grad: States,
    kind: Kind,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias (where needed), h and initial."""
    *grads, grad_h, grad_initial = torch.ops.mingru.linear_recurrence_backward(
        x,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        *_states(h, initial, reset, x),
        reset,
        batch_sizes,
        out,
        product,
        grad[0],
        _state(grad[1], x),
        _number(kind),
        kind.reverse,
        *needs,
    )
    grad_x, grad_weight, grad_bias = (found if need else None for found, need in zip(grads, needs, strict=True))
    return (
        grad_x,
        grad_weight,
        None if grad_bias is None else grad_bias.squeeze(0),
        grad_h.to(h.dtype),
        grad_initial.to(initial.dtype),
    )


def _apart(grads: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of all inputs, side by side in the last dimension, each in its input's shape."""
    return [part.view(x.shape) for part, x in zip(grads.chunk(len(inputs), -1), inputs, strict=True)]
