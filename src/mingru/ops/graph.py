"""Every question about graphs and transforms, and what TorchScript and traces need.

`torch.jit.trace` records operations, and takes Python's branches and numbers for those of all later inputs. So whatever
depends on sizes or values is scripted, and a trace contains the scripted function.
"""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._jit_internal import is_scripting
from torch.autograd import forward_ad
from torch.jit import _trace

__all__ = [
    "are_batched",
    "are_ordinary",
    "for_trace",
    "is_autocast",
    "is_compiling",
    "is_exporting",
    "is_scripting",
    "is_tracing",
    "is_true_for_all_sizes",
    "untraced",
]

# Whether `torch.compile` or `torch.export` captures a graph, and whether it is the latter.
is_compiling = torch.compiler.is_compiling
is_exporting = torch.compiler.is_exporting

P = ParamSpec("P")
T = TypeVar("T")


def is_tracing() -> bool:
    return bool(_trace.is_tracing())  # type: ignore[no-untyped-call]


def is_autocast(x: Tensor) -> bool:
    if x.is_cpu:
        return torch.is_autocast_enabled("cpu")
    # torch raises an error if asked about a device without autocast, such as "meta".
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def are_ordinary(*tensors: Tensor) -> bool:
    """Whether one fused kernel can replace the individual operators on these tensors.

    Tracing, functorch transforms, forward-mode AD and tensor subclasses need the individual operators.
    """
    return (
        not is_tracing()
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def are_batched(*tensors: Tensor | None) -> bool:
    """Whether `vmap` or `is_grads_batched=True` maps over any of these tensors."""
    if is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or any(
        tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors
    )


def is_true_for_all_sizes(condition: bool) -> bool:
    """Whether it holds for all sizes that a captured graph may meet; outside of a graph, whether it holds."""
    if is_scripting():
        return condition
    else:
        return _is_statically_true(condition)


def _is_statically_true(condition: bool) -> bool:
    # Imported here because it loads sympy. In its own function because TorchScript cannot compile an import statement,
    # even in a branch that never runs.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def for_trace(function: Callable[P, T]) -> Callable[P, T]:
    """Return the function, scripted while a trace is made, so that its branches and loops serve any size."""
    return _scripted(function) if is_tracing() else function


@functools.cache
def _scripted(function: Callable[P, T]) -> Callable[P, T]:
    with warnings.catch_warnings():
        # PyTorch's deprecation warning, which torch.jit.trace has already shown.
        warnings.filterwarnings("ignore", "`torch.jit.script` is", DeprecationWarning)
        return torch.jit.script(function)


def untraced(check: Callable[P, None]) -> Callable[P, None]:
    """Wrap a check so that it leaves no operation in a trace."""

    @functools.wraps(check)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if not is_tracing():
            check(*args, **kwargs)
            return
        state = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            check(*args, **kwargs)
        finally:
            torch._C._set_tracing_state(state)  # type: ignore[attr-defined]

    return run
