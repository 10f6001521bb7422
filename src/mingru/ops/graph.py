"""Tests for graph capture and transforms, and helpers for TorchScript and traces.

`torch.jit.trace` records only operations: Python branches and numbers stay those of the example. Functions that depend
on sizes or values are therefore scripted, and the trace contains the scripted function.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from . import private
from .private import (
    are_functorch_transforms_active,
    get_function_stack_at,
    has_any_global_hook,
    is_forward_mode,
    is_in_make_fx,
    is_legacy_batchedtensor,
    is_torch_function_mode_enabled,
    len_torch_dispatch_stack,
    len_torch_function_stack,
)

is_scripting: Callable[[], bool] = torch.jit.is_scripting  # type: ignore[attr-defined]
is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]
# True for `torch.compile` and `torch.export`, and only for `torch.export`.
is_compiling = torch.compiler.is_compiling
is_exporting = torch.compiler.is_exporting

P = ParamSpec("P")
T = TypeVar("T")


def scripted_as(twin: Callable[..., object]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function in whose place TorchScript compiles `twin`."""

    def decorated(function: Callable[P, T]) -> Callable[P, T]:
        vars(function)[private.PREPARE_SCRIPTABLE] = lambda: twin
        return function

    return decorated


def _no_autocast(x: Tensor) -> bool:
    return False


@scripted_as(_no_autocast)
def is_autocast(x: Tensor) -> bool:
    """Return whether autocast is enabled on the device of x, which a scripted module cannot know."""
    if x.is_cpu:
        return torch.is_autocast_enabled("cpu")
    # `is_autocast_enabled` raises an error for devices without autocast, such as "meta".
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def are_ordinary(*tensors: Tensor) -> bool:
    """Return whether one fused kernel can replace the individual operators on these tensors.

    Tracing, functorch transforms, forward-mode AD and tensor subclasses need the individual operators.
    """
    return is_untransformed() and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)


def are_eager(*tensors: Tensor) -> bool:
    """Return whether the tensors are ordinary, and no graph is captured, so that they have values."""
    return not is_symbolic() and are_ordinary(*tensors)


def is_plain_inference(x: Any) -> bool:
    """Return, in eager mode, whether no gradient, trace, transform, mode or hook sees operations on x, on the CPU."""
    return (
        not torch.is_grad_enabled()
        and type(x) is Tensor
        and x.is_cpu
        and is_untransformed()
        and not torch.is_autocast_enabled("cpu")
        and not len_torch_dispatch_stack()
        and not is_torch_function_mode_enabled()
        and not has_any_global_hook()
    )


def is_only_in_device_context() -> bool:
    """Return whether the only function mode is that of `with torch.device` or `torch.set_default_device`.

    It changes nothing here, because this package passes a device to every function that creates a tensor.
    """
    return (
        is_torch_function_mode_enabled()
        and len_torch_function_stack() == 1
        and type(get_function_stack_at(0)).__module__ == private.DEVICE_CONTEXTS
    )


def is_untransformed() -> bool:
    """Return whether calls are neither traced nor transformed, by functorch or forward-mode AD."""
    return not (is_tracing() or are_functorch_transforms_active() or is_forward_mode())


def are_batched(*tensors: Tensor | None) -> bool:
    """Return whether `vmap` or `is_grads_batched=True` maps over any of these tensors."""
    if is_compiling():
        return False
    return are_functorch_transforms_active() or any(
        tensor is not None and is_legacy_batchedtensor(tensor) for tensor in tensors
    )


def is_symbolic() -> bool:
    """Return whether tensors may have no values: in `torch.compile`, `torch.export` and `make_fx`, not in a trace."""
    return is_compiling() or is_in_make_fx()


def is_captured() -> bool:
    """Return whether a graph is captured: scripted, traced, compiled, exported or made by `make_fx`."""
    if is_scripting():
        return True
    else:
        return is_tracing() or is_symbolic()


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


def for_trace(function: Callable[P, T]) -> Callable[P, T]:
    """Script the function while tracing, so that the trace keeps its branches and loops for other sizes."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return _scripted(function)(*args, **kwargs) if is_tracing() else function(*args, **kwargs)

    # TorchScript compiles the function itself, as it does for `torch.jit.script_if_tracing`.
    vars(run).update({private.SCRIPT_IF_TRACING: True, private.ORIGINAL: function})
    return run


@functools.cache
def _scripted(function: Callable[P, T]) -> Callable[P, T]:
    with warnings.catch_warnings():
        # PyTorch's warning of deprecation, which torch.jit.trace has already shown.
        warnings.filterwarnings("ignore", "`torch.jit.script` is")
        return torch.jit.script(function)


def untraced(check: Callable[P, None]) -> Callable[P, None]:
    """Wrap a check so that a trace does not record its operations. TorchScript compiles the check itself."""

    @scripted_as(check)
    @functools.wraps(check)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if not is_tracing():
            check(*args, **kwargs)
        elif private.can_pause_trace:
            state = private.get_tracing_state()
            private.set_tracing_state(None)
            try:
                check(*args, **kwargs)
            finally:
                private.set_tracing_state(state)

    return run
