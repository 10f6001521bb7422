"""All private names of torch that this package uses. Each comment says what happens in a torch without the name.

No name is needed for `import mingru`. Without one of the functions that are asked at every call, results are the same,
but slower. The attributes of `nn.Module` that its subclasses use, such as `_modules`, are not listed.
"""

from contextlib import nullcontext
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def _of_torch(path: str, otherwise: Any) -> Any:
    """Return torch's own function, so that a call costs nothing more, or what replaces it."""
    try:
        return attrgetter(path)(torch)
    except AttributeError:
        return otherwise


def _yes(*args: object) -> bool:
    return True


def _copied(x: Tensor, shape: list[int]) -> Tensor:
    return x.reshape(shape).clone()


class _Missing:
    def __getattr__(self, name: str) -> Any:
        raise ImportError(f"mingru: torch {torch.__version__} has no torch.utils._pytree, which this function needs")


# Every call takes the dispatcher, and no module runs as one operator.
len_torch_dispatch_stack = _of_torch("_C._len_torch_dispatch_stack", _yes)
# No module runs as one operator.
is_torch_function_mode_enabled = _of_torch("_C._is_torch_function_mode_enabled", _yes)
# The same in a device context.
len_torch_function_stack = _of_torch("_C._len_torch_function_stack", _yes)
get_function_stack_at = _of_torch("_C._get_function_stack_at", _yes)
# The context sees each operation of the pass, which takes longer.
DisableTorchFunction = _of_torch("_C.DisableTorchFunction", nullcontext)
# A module whose first call is in a device context gets no plan.
EnableTorchFunction = _of_torch("_C._EnableTorchFunction", nullcontext)
# No module runs as one operator, and `nn.Linear` is called as a module.
has_any_global_hook = _of_torch("nn.modules.module._has_any_global_hook", _yes)
# Each call asks for the device's own autocast, which takes longer.
is_any_autocast_enabled = _of_torch("_C._is_any_autocast_enabled", _yes)
# No call runs in fused kernels, and gradients are computed by operations that vmap can map.
are_functorch_transforms_active = _of_torch("_C._are_functorch_transforms_active", _yes)
# Gradients are computed by operations that vmap can map.
is_legacy_batchedtensor = _of_torch("_C._functorch.is_legacy_batchedtensor", _yes)
# Products of float32 layers are never rounded to bfloat16.
get_fp32_precision = _of_torch("_C._get_fp32_precision_getter", _yes)
# The same, but slower. The state is None if there is no trace.
is_tracing = _of_torch("_C._get_tracing_state", torch.jit.is_tracing)  # type: ignore[attr-defined]
# A result in another shape is a copy.
unsafe_view = _of_torch("ops.aten._unsafe_view", _copied)
# A program of `torch.export` of a `GRU` has the steps of its example.
loop = _of_torch("ops.higher_order.scan", None)
# `mingru.export.onnx` raises an error.
pytree = _of_torch("utils._pytree", _Missing())
# Layers cannot be captured by `torch.export`, and by `make_fx` only if no check depends on values.
_get_dispatch_mode = _of_torch("_C._get_dispatch_mode", lambda key: None)
_FAKE = _of_torch("_C._TorchDispatchModeKey.FAKE", None)
_is_included = _of_torch("_C._dispatch_tls_is_dispatch_key_included", lambda key: None)
_PROXY = _of_torch("_C._TorchDispatchModeKey.PROXY", None)
_PRE_DISPATCH = _of_torch("_C.DispatchKey.PreDispatch", None)
# No level is -1. Without the name, forward mode runs in fused kernels, which have no rule for it. A function of Python
# would take longer.
forward_level = partial(getattr, forward_ad, "_current_level", -1)
# An exported program has the kernels of this package where it was exported with them.
_tracing_context = _of_torch("_guards.TracingContext.try_get", lambda: None)
_eager_transforms = _of_torch("_functorch.eager_transforms", None)

# Scripting compiles the eager code of a function in place of its twin, and fails if TorchScript does not support it.
PREPARE_SCRIPTABLE = "__prepare_scriptable__"
SCRIPT_IF_TRACING, ORIGINAL = "__script_if_tracing_wrapper", "__original_fn"
# `torch.compile` traces a function that it would otherwise call.
MARKED_CONSTANT = "_dynamo_marked_constant"
# In a device context, no module runs as one operator. The module is loaded only if there is one.
DEVICE_CONTEXTS = "torch.utils._device"
# The log of an ONNX export has a line about torchvision.
ONNX_REGISTRATION_LOG = "torch.onnx._internal.exporter._registration"


def outside_of_graphs(function: Any) -> Any:
    """Let `torch.compile` run a function, and what it calls, as eager code, without loading the compiler for it.

    Without the names, the function is compiled.
    """
    frames = _of_torch("_C._dynamo.eval_frame", None)
    if hasattr(frames, "set_code_exec_strategy") and hasattr(frames, "_FrameExecStrategy"):
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    return function


def is_untransformed() -> bool:
    """Return whether calls are neither traced nor transformed, by functorch or forward-mode AD.

    Without the names, no call runs in fused kernels.
    """
    return not (is_tracing() or are_functorch_transforms_active() or forward_level() >= 0)


def is_compiling() -> bool:
    """Return whether `torch.compile` or `torch.export` captures this call.

    The flag of torch belongs to the process: it is also set while another thread captures its calls. What Dynamo says,
    and modes of fake tensors, belong to the thread.
    """
    is_own = torch.compiler.is_dynamo_compiling
    return torch.compiler.is_compiling() and (is_own() or _get_dispatch_mode(_FAKE) is not None)


def is_exporting() -> bool:
    """Return whether `torch.export` captures this call. In torch 2.11, the public function also says so of `compile`.

    The flag belongs to the process, and the mode of fake tensors to the thread; that of an export takes others too.
    Without the flag's name, an exported program has the kernels of this package where it was exported with them.
    """
    fake = getattr(torch.compiler, "_is_exporting_flag", False) and getattr(_tracing_context(), "fake_mode", None)
    return bool(getattr(fake, "allow_non_fake_inputs", False))


# `torch.compile` asks once. Otherwise a compiled program would be compiled anew while another thread exports.
vars(is_exporting)[MARKED_CONSTANT] = True


def is_symbolic() -> bool:
    """Return whether tensors may have no values: in `torch.compile`, `torch.export` and `make_fx`, not in a trace."""
    return is_compiling() or _get_dispatch_mode(_PROXY) is not None or bool(_is_included(_PRE_DISPATCH))


def jvp_nesting() -> int:
    """Return how often `torch.func.jvp` is nested. Without the name, it is refused as if it were nested."""
    return getattr(_eager_transforms, "JVP_NESTING", 2)
