"""Tests for graph capture and transforms, and helpers for TorchScript and traces.

`torch.jit.trace` records only operations: Python branches and numbers stay those of the example. Functions that depend
on sizes or values are therefore scripted, and the trace contains the scripted function.
"""

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from . import names_of_torch

is_scripting: Callable[[], bool] = torch.jit.is_scripting  # type: ignore[attr-defined]
# True for `torch.compile` and `torch.export`.
is_compiling = torch.compiler.is_compiling

_ORDINARY = {Tensor, nn.Parameter, type(None)}
P = ParamSpec("P")
T = TypeVar("T")


def scripted_as(twin: Callable[..., object]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function in whose place TorchScript compiles `twin`."""

    def decorated(function: Callable[P, T]) -> Callable[P, T]:
        vars(function)[names_of_torch.PREPARE_SCRIPTABLE] = lambda: twin
        return function

    return decorated


def _no(x: Tensor | None = None) -> bool:
    return False


@scripted_as(_no)
def is_autocast(x: Tensor) -> bool:
    """Return whether autocast is enabled on the device of x, which a scripted module cannot know."""
    if not names_of_torch.is_any_autocast_enabled():
        return False
    # `is_autocast_enabled` raises an error for devices without autocast, such as "meta".
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which operations on x keep its dtype, also under autocast."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()


@scripted_as(_no)
def is_onnx() -> bool:
    """Return whether a graph is captured for ONNX, where it needs no derivatives, and each operation takes time."""
    return (bool(names_of_torch.is_tracing()) or names_of_torch.is_exporting()) and torch.onnx.is_in_onnx_export()


@scripted_as(_no)
def is_old_onnx() -> bool:
    """Return whether `torch.onnx.export(..., dynamo=False)` traces, which cannot translate most scripted functions."""
    return bool(names_of_torch.is_tracing()) and is_onnx()


def are_ordinary(*tensors: Tensor | None) -> bool:
    """Return whether one fused kernel can replace the individual operators on these tensors, some of which may be None.

    Tracing, functorch transforms, forward-mode AD and tensor subclasses need the individual operators.
    """
    return names_of_torch.is_untransformed() and {*map(type, tensors)} <= _ORDINARY


def are_eager(*tensors: Tensor | None) -> bool:
    """Return whether the tensors are ordinary, and no graph is captured, so that they have values."""
    return not names_of_torch.is_symbolic() and are_ordinary(*tensors)


def is_device_context() -> bool:
    """Return whether the only function mode is that of `with torch.device` or `torch.set_default_device`.

    It changes nothing here, because this package passes a device to every function that creates a tensor.
    """
    is_one = names_of_torch.len_torch_function_stack() == 1
    return is_one and type(names_of_torch.get_function_stack_at(0)).__module__ == names_of_torch.DEVICE_CONTEXTS


def are_batched(*tensors: Tensor) -> bool:
    """Return whether `vmap` or `is_grads_batched=True` maps over any of these tensors."""
    if is_compiling():
        return False
    return names_of_torch.are_functorch_transforms_active() or any(map(names_of_torch.is_legacy_batchedtensor, tensors))


def is_captured() -> bool:
    """Return whether a graph is captured: scripted, traced, compiled, exported or made by `make_fx`."""
    if is_scripting():
        return True
    else:
        return bool(names_of_torch.is_tracing()) or names_of_torch.is_symbolic()


def is_true_for_all_sizes(condition: bool) -> bool:
    """Return whether the condition is true for all sizes of a captured graph. Without a graph, return the condition."""
    if is_scripting():
        return condition
    else:
        return _is_statically_true(condition)


def _is_statically_true(condition: bool) -> bool:
    # Imported here because it loads sympy, and in its own function because TorchScript cannot compile an import.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def for_trace(of_old_onnx: bool = False) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Script the function while tracing, so that the trace keeps its branches and loops for other sizes.

    The older ONNX exporter can only translate functions that are scripted for it (`of_old_onnx`).
    """

    def decorated(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            own = _scripted(function) if names_of_torch.is_tracing() and is_old_onnx() == of_old_onnx else function
            return own(*args, **kwargs)

        # TorchScript compiles the function itself, as it does for `torch.jit.script_if_tracing`.
        vars(run).update({names_of_torch.SCRIPT_IF_TRACING: True, names_of_torch.ORIGINAL: function})
        return run

    return decorated


@functools.cache
def _scripted(function: Callable[P, T]) -> Callable[P, T]:
    with warnings.catch_warnings():
        # PyTorch's warning of deprecation, which torch.jit.trace has already shown.
        warnings.filterwarnings("ignore", "`torch.jit.script` is")
        return torch.jit.script(function)


def untraced(check: Callable[P, None]) -> Callable[P, None]:
    """Wrap a check so that a trace, which would record its operations, skips it. TorchScript compiles the check."""

    @scripted_as(check)
    @functools.wraps(check)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if not names_of_torch.is_tracing():
            check(*args, **kwargs)

    return run
