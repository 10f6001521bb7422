"""The `"native"` body: C++ kernels for the CPU (`csrc/`), one pass over memory, vectorised over lanes.

They take sequences (B, S, N), states in the type of computation, and dense lanes; this module puts tensors into that
form and back. Operators are registered with torch's dispatcher when this module is imported.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .activation import ACTIVATIONS
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

    def mingru_forward(gate: Tensor, candidate: Tensor, bias: Tensor | None, h: Tensor, *_: Any) -> States:
        return sequence(gate, gate.shape[2]), torch.empty_like(h)

    def mingru_backward(gate: Tensor, candidate: Tensor, bias: Tensor | None, h: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return sequence(gate, 2 * gate.shape[2]), torch.empty_like(h), torch.empty_like(h)

    def mingru_linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, *_: Any) -> States:
        return sequence(x, weight.shape[0] // 2), torch.empty_like(h)

    operators = (linear_scan_forward, linear_scan_backward, mingru_forward, mingru_backward, mingru_linear_forward)
    for shapes in operators:
        torch.library.register_fake(f"mingru::{shapes.__name__}", shapes)


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
    return h.to(accumulate_dtype(sequence.dtype)).contiguous()


def _states(h: Tensor, initial: Tensor, reset: Tensor | None, sequence: Tensor) -> States:
    """Both states likewise; without resets the initial one is not used, and need not be made dense."""
    h = _state(h, sequence)
    return h, h if reset is None else _state(initial, sequence)


def linear_scan(a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool) -> States:
    out, last = torch.ops.mingru.linear_scan_forward(_lanes(a), _lanes(b), _state(h, b), reset, reverse)
    return out.view(b.shape), last.to(h.dtype)


def mingru(
    gate: Tensor, candidate: Tensor, h: Tensor, initial: Tensor, reset: Tensor | None, activation: str, reverse: bool
) -> States:
    out, last = torch.ops.mingru.mingru_forward(
        _lanes(gate),
        _lanes(candidate),
        None,
        *_states(h, initial, reset, gate),
        reset,
        ACTIVATIONS.index(activation),
        reverse,
    )
    return out.view(gate.shape), last.to(h.dtype)


def linear_scan_backward(
    a: Tensor, h: Tensor, reset: Tensor | None, out: Tensor, grad_out: Tensor, grad_last: Tensor, reverse: bool
) -> tuple[Tensor, ...]:
    grads, grad_h = torch.ops.mingru.linear_scan_backward(
        _lanes(a), _state(h, a), reset, _lanes(out), _lanes(grad_out), _state(grad_last, a), reverse
    )
    return *_apart(grads, a), grad_h.to(h.dtype)


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
    grads, grad_h, grad_initial = torch.ops.mingru.mingru_backward(
        _lanes(gate),
        _lanes(candidate),
        None,
        *_states(h, initial, reset, gate),
        reset,
        _lanes(out),
        _lanes(grad_out),
        _state(grad_last, gate),
        ACTIVATIONS.index(activation),
        reverse,
    )
    return *_apart(grads, gate), grad_h.to(h.dtype), grad_initial.to(initial.dtype)


def mingru_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    activation: str,
    reverse: bool,
) -> States:
    """`mingru` of a linear map of x (B, S, I), block by block, without a tensor of all pre-activations."""
    out, last = torch.ops.mingru.mingru_linear_forward(
        x, weight, bias, *_states(h, initial, reset, x), reset, ACTIVATIONS.index(activation), reverse
    )
    return out, last.to(h.dtype)


def mingru_linear_keeping(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    activation: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and the products x W^T, which backward needs; the bias is added by the kernels."""
    product = _from_rows(_rows(x, x) @ weight.t(), x)
    gate, candidate = product.chunk(2, -1)
    out, last = torch.ops.mingru.mingru_forward(
        gate, candidate, bias, *_states(h, initial, reset, x), reset, ACTIVATIONS.index(activation), reverse
    )
    return out, last.to(h.dtype), product


def mingru_linear_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    out: Tensor,
    product: Tensor,
    grad_out: Tensor,
    grad_last: Tensor,
    activation: str,
    reverse: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias (where needed), h and initial."""
    gate, candidate = product.chunk(2, -1)
    grads, grad_h, grad_initial = torch.ops.mingru.mingru_backward(
        gate,
        candidate,
        bias,
        *_states(h, initial, reset, x),
        reset,
        out,
        grad_out,
        _state(grad_last, x),
        ACTIVATIONS.index(activation),
        reverse,
    )
    rows = _rows(grads, grads)
    grad_x = grad_weight = grad_bias = None
    if needs[0]:
        grad_x = _from_rows(rows @ weight, grads)
    if needs[1]:
        grad_weight = rows.t() @ _rows(x, grads)
    if needs[2]:
        grad_bias = rows.sum(0)
    return grad_x, grad_weight, grad_bias, grad_h.to(h.dtype), grad_initial.to(initial.dtype)


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """(B, S, *) as dense (B * S, *), batch and time in the order in which they lie in the memory of `order`."""
    return (x.transpose(0, 1) if time_first(order) else x).reshape(-1, x.shape[2])


def _from_rows(rows: Tensor, order: Tensor) -> Tensor:
    """Back to (B, S, *)."""
    batch, steps, _ = order.shape
    return rows.view(steps, batch, -1).transpose(0, 1) if time_first(order) else rows.view(batch, steps, -1)


def _apart(grads: Tensor, like: Tensor) -> list[Tensor]:
    """The gradients of two inputs, (B, S, 2 N) side by side, each in its input's shape."""
    return [half.view(like.shape) for half in grads.chunk(2, -1)]
