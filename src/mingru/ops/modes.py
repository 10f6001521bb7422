"""How a call runs: captured, transformed, under autocast or none of these; and helpers for TorchScript and traces.

`mode_of` asks all of it once, at the entrance of a call. TorchScript compiles functions that take no `Mode`.

`torch.jit.trace` records only operations: Python branches and numbers stay those of the example. Functions that depend
on sizes or values are therefore scripted, and the trace contains the scripted function.
"""

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from . import names_of_torch

is_scripting: Callable[[], bool] = torch.jit.is_scripting  # type: ignore[attr-defined]

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


def _yes() -> bool:
    return True


def _itself(condition: bool) -> bool:
    return condition


is_compiling = scripted_as(_no)(names_of_torch.is_compiling)


class Mode(NamedTuple):
    """How a call runs, which is given to all that it calls."""

    is_eager: bool = True
    """Whether none of the others is true."""
    is_traced: bool = False
    """Whether `torch.jit.trace` records it."""
    is_symbolic: bool = False
    """Whether tensors may have no values: in `torch.compile`, `torch.export` and `make_fx`, not in a trace."""
    is_compiled: bool = False
    """Whether it is in `torch.compile` or `torch.export`."""
    is_exported: bool = False
    needs_operations: bool = False
    """Whether no fused kernel can take the place of operations: in a trace, functorch transforms and forward mode."""
    is_autocast: bool = False
    """Whether autocast is enabled on its device."""
    is_onnx: bool = False
    """Whether its graph is for ONNX, where it needs no derivatives, and each operation takes time."""


EAGER = Mode()


def mode_of(x: Tensor) -> Mode:
    """Return the mode of a call of x."""
    names, is_compiled = names_of_torch, is_compiling()
    is_symbolic = is_compiled
    if not is_compiled and (names.len_torch_dispatch_stack() or names.is_torch_function_mode_enabled()):
        # The modes of `make_fx` take longer to tell from others.
        is_symbolic = names.is_symbolic()
    is_traced = names.is_tracing()
    needs_operations = is_traced or names.are_functorch_transforms_active() or names.forward_level() >= 0
    is_cast = names.is_any_autocast_enabled() and is_autocast(x)
    if not (is_symbolic or needs_operations or is_cast):
        return EAGER
    is_exported = is_compiled and names.is_exporting()
    onnx = (is_traced or is_exported) and torch.onnx.is_in_onnx_export()
    return Mode(False, *map(bool, (is_traced, is_symbolic, is_compiled, is_exported, needs_operations, is_cast, onnx)))


@scripted_as(_no)
def is_autocast(x: Tensor) -> bool:
    """Return whether autocast is enabled on the device of x, which a scripted module cannot know."""
    if not names_of_torch.is_any_autocast_enabled():
        return False
    # `is_autocast_enabled` raises an error for devices without autocast, such as "meta".
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(x: Tensor, mode: Mode | None = None) -> AbstractContextManager[object]:
    """Return a context in which operations on x keep its dtype, also under autocast. `mode`: if it is known."""
    is_cast = is_autocast(x) if mode is None else mode.is_autocast
    return torch.autocast(x.device.type, enabled=False) if is_cast else nullcontext()


@scripted_as(_no)
def is_onnx() -> bool:
    """Return what `Mode` says, in functions that TorchScript compiles."""
    return (bool(names_of_torch.is_tracing()) or names_of_torch.is_exporting()) and torch.onnx.is_in_onnx_export()


@scripted_as(_no)
def is_old_onnx() -> bool:
    """Return whether `torch.onnx.export(..., dynamo=False)` traces, which cannot translate most scripted functions."""
    return bool(names_of_torch.is_tracing()) and torch.onnx.is_in_onnx_export()


def are_ordinary(*tensors: Tensor | None) -> bool:
    """Return whether none of these tensors is of a subclass, which needs the individual operators. Some may be None."""
    return {*map(type, tensors)} <= _ORDINARY


def are_eager(*tensors: Tensor | None) -> bool:
    """Return whether the tensors are ordinary and have values, and nothing sees operations but autocast."""
    return not names_of_torch.is_symbolic() and names_of_torch.is_untransformed() and are_ordinary(*tensors)


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


@scripted_as(_yes)
def is_captured() -> bool:
    """Return whether a graph is captured: scripted, traced, compiled, exported or made by `make_fx`."""
    return bool(names_of_torch.is_tracing()) or names_of_torch.is_symbolic()


@scripted_as(_no)
def is_exported() -> bool:
    """Return what `Mode` says, in functions that TorchScript compiles."""
    return names_of_torch.is_exporting()


@scripted_as(_itself)
def is_true_for_all_sizes(condition: bool) -> bool:
    """Return whether the condition is true for all sizes of a captured graph. Without a graph, return the condition."""
    # Imported here because it loads sympy.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def for_trace(of_old_onnx: bool = False) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Script the function while tracing, so that the trace keeps its branches and loops for other sizes.

    The older ONNX exporter can only translate functions that are scripted for it (`of_old_onnx`).
    """

    def decorated(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            is_for_it = names_of_torch.is_tracing() and torch.onnx.is_in_onnx_export() == of_old_onnx
            return (_scripted(function) if is_for_it else function)(*args, **kwargs)

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
