"""Whether the kernels can run in this process and on a device, and what they must know of the device."""

import functools
import importlib.util
import os
import re
from contextlib import nullcontext
from math import inf
from typing import Any

import torch

from ...call import Spec
from ...names_of_torch import MARKED_CONSTANT

# Types of devices; ROCm calls itself "cuda".
DEVICES = ("cuda", "xpu")
# The cells that the kernels compute. Each has the inputs with which a step keeps the state: of a number its first part,
# the other parts are 0.
CELLS = {
    "mingru": (-inf, 0.0),
    "mingru_signed": (-inf, 0.0),
    "mingru_rotation": (-inf, 0.0),
    "minlstm": (0.0, -inf, 0.0),
    "minlstm_unnormalized": (inf, -inf, 0.0),
    "linear_scan": (1.0, 0.0),
    "complex_linear_scan": (1.0, 0.0),
    "mingru_quaternion": (-inf, 0.0),
    "quaternion_linear_scan": (1.0, 0.0),
}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
_OLDEST = (3, 6)
# Triton reads this variable when it is imported. Its interpreter runs the kernels on the CPU, for tests.
_NOTHING = nullcontext()
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    return _why_not()


def _call_while_compiling(function: object) -> None:
    """Make `torch.compile` call a function instead of tracing it.

    `torch.compiler.assume_constant_result` does this too, but it loads the whole compiler.
    """
    setattr(function, MARKED_CONSTANT, True)


_call_while_compiling(unavailable)


@functools.cache
def _why_not() -> str | None:
    """Return the reason why no kernel can run in this process."""
    if not (IS_INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available()):
        return "torch finds no CUDA, ROCm or XPU device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install the package triton"
    try:
        import triton
    except Exception as error:
        return f"Triton cannot be imported ({first_line(error)}); reinstall it for this version of torch"
    version = triton.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        return f"Triton {version} is too old; install Triton {'.'.join(map(str, _OLDEST))} or later"
    if IS_INTERPRETED or torch.xpu.is_available():
        return None
    try:
        problems = [_problem_of(torch.device("cuda", each), torch.float32) for each in range(torch.cuda.device_count())]
    except RuntimeError as error:  # in a forked process, or of a broken driver
        return f"torch cannot use the GPU ({first_line(error)})"
    return problems[0] if problems and all(problems) else None


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def unsupported(sequence: torch.Tensor, spec: Spec) -> str | None:
    kind = sequence.device.type
    if kind not in DEVICES and not (IS_INTERPRETED and kind == "cpu"):
        return f"it only runs on CUDA, ROCm and XPU devices, and the tensors are on {sequence.device}"
    if sequence.dtype not in _DTYPES:
        return f"it does not support {sequence.dtype}"
    if spec.cell == "gru":
        return f"it has no kernel for the cell {spec.cell!r}"
    return _why_too_old(sequence.device, sequence.dtype) if kind == "cuda" else None


def _why_too_old(device: torch.device, dtype: torch.dtype) -> str | None:
    return _problem_of(device, dtype)


_call_while_compiling(_why_too_old)


@functools.cache
def _problem_of(device: torch.device, dtype: torch.dtype) -> str | None:
    if torch.version.hip is not None:
        return None
    found = torch.cuda.get_device_capability(device)
    card = f"{device} is a {torch.cuda.get_device_name(device)} with {found[0]}.{found[1]}"
    if found < (7, 5):
        return f"the kernels need compute capability 7.5 or higher, and {card}"
    if found < (8, 0) and dtype == torch.bfloat16:
        return f"the kernels of {dtype} need compute capability 8.0 or higher, and {card}, which runs torch.float16"
    return None


@functools.cache
def facts_of(device: torch.device) -> tuple[int, bool, int]:
    """Return the number of threads of a warp, whether this is a GPU of AMD, and the number of multiprocessors."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return found.warp_size, torch.version.hip is not None, found.multi_processor_count
    return 32, False, torch.xpu.get_device_properties(device).gpu_subslice_count if device.type == "xpu" else 132


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_out_of_memory(error: Exception) -> bool:
    """Return whether a device or the machine had no memory. Triton raises a RuntimeError if it cannot load a kernel."""
    names = "out.?of.?((device|host).?)?memory|cannot allocate"
    return isinstance(error, MemoryError) or re.search(names, str(error), re.I) is not None


def free(device: torch.device) -> None:
    """Give back the memory that torch keeps for tensors, which a kernel may need."""
    if device.type in DEVICES:
        torch.get_device_module(device).empty_cache()


def stream_of(device: torch.device) -> Any:
    """Return the current stream of a device, or None."""
    return torch.get_device_module(device).current_stream(device) if device.type in DEVICES else None


def current(device: torch.device) -> Any:
    """Return a context in which this device is the current one."""
    module = _module_of(device)
    return _NOTHING if module is None or module.current_device() == device.index else module.device(device)


@functools.cache
def _module_of(device: torch.device) -> Any:
    return None if device.type == "cpu" else torch.get_device_module(device)
