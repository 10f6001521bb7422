"""The `"triton"` backend: kernels for GPUs (`triton_kernels.py`), compiled by Triton on first use.

Importing this module registers two operators with PyTorch's dispatcher, but does not import Triton. Captured graphs
contain the operators; eager calls skip the dispatcher. States have any floating dtype, and are computed in the
accumulation dtype of the sequences. The operators take complex numbers as pairs of features.
"""

import ctypes
import functools
import importlib.util
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import Backend, Kernel, KernelFailure
from ..call import Layout, Spec, Start
from ..cells import NUM_INPUTS
from ..graph import are_ordinary, is_autocast, is_compiling
from ..layout import LinearScan, is_transposed
from ..shape import States, accumulate_dtype, as_dtype, as_real

# Types of devices; ROCm calls itself "cuda".
DEVICES = ("cuda", "xpu")
# Inputs with which a step keeps the state, for each cell; the first one of a pair, whose second one is 0.
KEEPING = {
    "mingru": (-torch.inf, 0.0),
    "mingru_signed": (-torch.inf, 0.0),
    "mingru_rotation": (-torch.inf, 0.0),
    "minlstm": (0.0, -torch.inf, 0.0),
    "minlstm_unnormalized": (torch.inf, -torch.inf, 0.0),
    "linear_scan": (1.0, 0.0),
    "complex_linear_scan": (1.0, 0.0),
}

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
_OLDEST = (3, 6)
# Triton reads this variable when it is imported. Its interpreter runs the kernels on the CPU, for tests.
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Plan(NamedTuple):
    """How a kernel divides its work; see `triton_kernels`."""

    chunks: int
    """Number of chunks of a tile, C."""
    steps: int
    """Number of steps of a chunk, T."""
    features: int
    """Number of features of a program, F."""
    segments: int
    """Number of segments of time that are computed in parallel."""
    warps: int
    stages: int | None
    """Number of tiles whose inputs are loaded in advance; None if the compiler decides."""


def plan_of(
    num_sequences: int,
    num_steps: int,
    num_features: int,
    itemsize: int,
    *,
    cell: str,
    backward: bool,
    has_reset: bool,
    is_packed: bool,
    is_timed: bool,
    wave: int,
) -> Plan:
    """Return the plan of a kernel. It depends only on shape and dtype, so that results do not depend on the GPU.

    `wave` is the number of threads of a warp: 64 on AMD GPUs, otherwise 32.
    """
    # Values of one step that a warp loads if each thread loads 16 bytes.
    warp = wave * 16 // itemsize
    steps = {2: 8, 4: 8, 8: 4}[itemsize] // (2 if backward else 1)
    if is_timed:
        # Elapsed times and bounds need more registers, and compile for longer.
        steps //= 2
    # Three numbers of each step and feature are needed for the gradients of these cells, instead of two.
    is_large = backward and cell in ("minlstm", "minlstm_unnormalized", "mingru_rotation")
    if is_large and itemsize == 2:
        # More steps would need more registers than there are.
        steps = 2
    if num_steps == 1:
        return Plan(1, 1, min(warp, _power_of_2(num_features)), 1, 1, None)
    walk = Plan(1, steps, min(warp, _power_of_2(num_features)), 1, 1, None)
    if num_steps <= 2 * steps or (num_sequences * num_features >= 1 << 17 and num_features > warp // 2):
        return walk
    if itemsize == 2:
        # Chunks need more registers, because the coefficients of all their steps are kept.
        steps = min(steps, 4 if not backward else 2 if has_reset else 3)
    elif is_large and not is_timed:
        steps -= itemsize == 4
    # 128 bytes of a step if that gives enough programs for all processors of a GPU, otherwise fewer; 32 is a sector.
    sizes = [size // itemsize for size in (128, 64, 32)]
    features = next((size for size in sizes if num_sequences * -(-num_features // size) >= 264), sizes[-1])
    programs = num_sequences * -(-num_features // features)
    # One warp on AMD GPUs, where scans across warps were wrong in some versions of Triton (ROCm/triton#947).
    warps = 1 if wave == 64 or programs >= 1056 else 4 if programs >= 132 else 8
    chunks = warps * warp // features
    # Three sizes, so that sequences of many lengths need few kernels.
    chunks = next((size for size in (8, 32) if size < chunks and size * steps >= num_steps), chunks)
    warps = max(1, chunks * features // warp)
    tile = chunks * steps
    segments = 1
    # Segments cannot be combined if |a| > 1, because the product of a segment may overflow.
    if cell in NUM_INPUTS and not is_packed and programs < 64:
        segments = max(1, min(64, -(-264 // programs), num_steps // (2 * tile)))
    # Addresses of packed steps are loaded too, and loading them in advance would need barriers.
    return Plan(chunks, steps, features, segments, warps, None if wave == 64 or is_packed else 2)


def _power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is not less."""
    return 1 << (number - 1).bit_length()


_failure: str | None = None


def _unavailable() -> str | None:
    return _failure or _why_not()


def _call_while_compiling(function: Any) -> None:
    """Make `torch.compile` call a function instead of tracing it.

    `torch.compiler.assume_constant_result` does this too, but it loads the whole compiler.
    """
    function._dynamo_marked_constant = True


_call_while_compiling(_unavailable)


@functools.cache
def _why_not() -> str | None:
    """Return the reason why no kernel can run in this process."""
    if not (_IS_INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available()):
        return "torch finds no CUDA, ROCm or XPU device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install the package triton"
    try:
        import triton
    except Exception as error:
        return f"Triton cannot be imported ({_first_line(error)}); reinstall it for this version of torch"
    version = triton.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        return f"Triton {version} is too old; install Triton {'.'.join(map(str, _OLDEST))} or later"
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _unsupported(sequence: Tensor, spec: Spec) -> str | None:
    kind = sequence.device.type
    if kind not in DEVICES and not (_IS_INTERPRETED and kind == "cpu"):
        return f"it only runs on CUDA, ROCm and XPU devices, and the tensors are on {sequence.device}"
    if sequence.dtype not in _DTYPES:
        return f"it does not support {sequence.dtype}"
    return _why_too_old(sequence.device) if kind == "cuda" else None


def _why_too_old(device: torch.device) -> str | None:
    return _problem_of(device)


_call_while_compiling(_why_too_old)


@functools.cache
def _problem_of(device: torch.device) -> str | None:
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0):
        return None
    return f"Triton needs compute capability 8.0 or higher, and {device} is a {torch.cuda.get_device_name(device)}"


def _run(name: str, num_programs: int, plan: Plan, args: Sequence[Any], constants: dict[str, Any]) -> None:
    """Launch the kernel of this name on the device of its first argument."""
    global _failure  # noqa: PLW0603
    from . import triton_kernels

    kernel, device = getattr(triton_kernels, name), args[0].device
    tile = {"C": plan.chunks, "T": plan.steps, "F": plan.features, "STAGES": plan.stages}
    try:
        with _on(device):
            # Fusion is given, because the default differs between versions of Triton.
            kernel[(num_programs,)](*args, **constants, **tile, num_warps=plan.warps, enable_fp_fusion=True)
    except Exception as error:
        _failure = f"Triton failed to compile or launch a kernel on {device} ({_first_line(error)})"
        raise KernelFailure(f"the backend 'triton' cannot run this because {_failure}; use 'torch'") from error


def _on(device: torch.device) -> Any:
    """Return a context in which this device is the current one."""
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device)
    return nullcontext() if module.current_device() == device.index else module.device(device)


@functools.cache
def _wave(kind: str) -> int:
    """Return the number of threads of a warp on devices of this type."""
    return 64 if kind == "cuda" and torch.version.hip is not None else 32


class _Work:
    """What both passes have in common: shapes, strides and the constants of the kernels."""

    def __init__(self, inputs: Sequence[Tensor], batch_sizes: Tensor | None, spec: Spec, time_first: bool) -> None:
        self.spec, self.time_first, self.is_packed = spec, time_first, batch_sizes is not None
        first = inputs[0]
        self.shape = first.shape
        sequences = [self.sequence(x) for x in inputs]
        if any(x.stride() != sequences[0].stride() for x in sequences):
            sequences = [x.contiguous() for x in sequences]
        self.inputs = sequences
        self.num_features = sequences[0].shape[-1]
        self.offsets = self.lengths = None
        if batch_sizes is None:
            self.num_sequences, self.num_steps = first.shape[:2] if not time_first else (first.shape[1], first.shape[0])
        else:
            self.num_sequences, self.num_steps = int(batch_sizes[0]), batch_sizes.numel()
            self.offsets, self.lengths = _packing(batch_sizes, first.device)

    def plan(self, *, backward: bool, has_reset: bool, has_dt: bool) -> Plan:
        x = self.inputs[0]
        return plan_of(
            *(self.num_sequences, self.num_steps, self.num_features, x.element_size()),
            cell=self.spec.cell,
            backward=backward,
            has_reset=has_reset,
            is_packed=self.is_packed,
            is_timed=self.spec.min_decay != 0 or has_dt,
            wave=_wave(x.device.type),
        )

    def sequence(self, x: Tensor) -> Tensor:
        """Return a sequence with contiguous features in one last dimension."""
        x = x.flatten(1 if self.is_packed else 2)
        return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

    def strides(self, x: Tensor, unit: int) -> tuple[int, int]:
        """Return the strides of batch and time in units."""
        if self.is_packed:
            return 0, x.stride(0) // unit
        batch, step = (1, 0) if self.time_first else (0, 1)
        return x.stride(batch) // unit, x.stride(step) // unit

    def unit(self, *sequences: Tensor) -> int:
        """Return the number of features that one access may have: at most 16 bytes, by sizes, strides and addresses."""
        size = sequences[0].element_size()
        bits = 16 // size | self.num_features
        for x in sequences:
            bits |= x.data_ptr() // size
            for stride in x.stride()[:-1]:
                bits |= stride
        # The lowest bit is the largest power of 2 that divides all of them.
        return bits & -bits

    def constants(self, plan: Plan, unit: int) -> dict[str, Any]:
        cell, activation = self.spec[:2]
        even = self.num_features % plan.features == 0
        return {"CELL": cell, "ACTIVATION": activation, "KEEPING": KEEPING[cell], "V": unit, "EVEN": even}

    def num_programs(self, plan: Plan) -> int:
        return -(-self.num_features // plan.features) * self.num_sequences

    def segments(self, plan: Plan) -> tuple[int, int]:
        """Return the number of segments, and the number of steps of a segment, which is a whole number of tiles."""
        tile = plan.chunks * plan.steps
        size = -(-self.num_steps // (plan.segments * tile)) * tile
        return -(-self.num_steps // size), size


def _packing(batch_sizes: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the offset of each step in packed data, and the length of each sequence, on the device."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "mingru: packed sequences cannot be captured in a CUDA graph, because their batch_sizes are on the CPU; "
            "pass padded sequences"
        )
    num_steps, num_sequences = batch_sizes.numel(), int(batch_sizes[0])
    offsets = batch_sizes.cumsum(0) - batch_sizes
    # Batch element b has as many steps as there are batch sizes above b.
    lengths = num_steps - torch.searchsorted(batch_sizes.flip(0), torch.arange(num_sequences), right=True)
    both = torch.cat([offsets, lengths])
    if device.type != "cpu":
        both = both.pin_memory().to(device, non_blocking=True)
    return both[:num_steps], both[num_steps:]


def _state(h: Tensor) -> tuple[Tensor, int]:
    """Return a state (B, N), or (1, N) for all batch elements, and its stride; features are contiguous."""
    if h.stride(0) == 0:
        h = h[:1]
    return h.contiguous(), 0 if h.shape[0] == 1 else h[0].numel()


def _strides_of_steps(work: _Work, *given: Tensor | None) -> list[int]:
    """Return the strides of batch and time of tensors that have one element for each step."""
    return [stride for x in given for stride in ((0, 0) if x is None else work.strides(x, 1))]


def _bound(min_decay: float) -> tuple[float | None, ...]:
    """Return log(m) and log(1 - m) of the lower bound m of the decay, each as a float32 number and the rest."""
    if min_decay == 0:
        return (None,) * 4
    return *_in_float32(math.log(min_decay)), *_in_float32(math.log1p(-min_decay))


def _in_float32(number: float) -> tuple[float, float]:
    # Triton passes numbers as float32, and kernels of float64 need more digits.
    rounded = ctypes.c_float(number).value
    return rounded, number - rounded


def _forward(
    inputs: Sequence[Tensor],
    h: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    dt: Tensor | None,
    batch_sizes: Tensor | None,
    cell: str,
    activation: str,
    min_decay: float,
    reverse: bool,
    time_first: bool,
) -> States:
    """Return the states of all steps, and the last state."""
    work = _Work(inputs, batch_sizes, Spec(cell, activation, reverse, min_decay), time_first)
    x = work.inputs
    out, last = x[0].new_empty(work.shape), h.new_empty(h.shape)
    flat_out = work.sequence(out)
    plan, unit = work.plan(backward=False, has_reset=reset is not None, has_dt=dt is not None), work.unit(*x, flat_out)
    states = _state(h), (None, 0) if initial_state is None else _state(initial_state)
    pointers = (reset, dt, work.offsets, work.lengths)
    num_segments, segment_steps = work.segments(plan)
    numbers = (
        *(work.num_steps, work.num_features // unit, num_segments, segment_steps),
        *(*work.strides(x[0], unit), *work.strides(flat_out, unit), states[0][1], states[1][1]),
        *(*_strides_of_steps(work, reset, dt), *_bound(min_decay), int(reverse)),
    )
    constants, num_programs = work.constants(plan, unit), work.num_programs(plan) * num_segments
    x = [*x, None] if len(x) == 2 else x  # type: ignore[list-item]
    products = ends = None
    if num_segments > 1:
        products = x[0].new_empty(work.num_sequences, num_segments, work.num_features, dtype=_accumulated(x[0]))
        ends = torch.empty_like(products)
        summary = (*x, None, None, states[1][0], None, *pointers, products, ends, *numbers)
        _run("forward_kernel", num_programs, plan, summary, constants)
    args = (*x, flat_out, states[0][0], states[1][0], last, *pointers, products, ends, *numbers)
    _run("forward_kernel", num_programs, plan, args, constants)
    return out, last


def _accumulated(x: Tensor) -> torch.dtype:
    return accumulate_dtype(x.dtype)


def _grads_like(inputs: Sequence[Tensor], num_leading: int) -> Tensor:
    """Return an uninitialized tensor for the gradients of all inputs, side by side, in their memory order."""
    first = inputs[0]
    leading, size = first.shape[:num_leading], len(inputs) * first.shape[num_leading:].numel()
    if is_transposed(first):
        return first.new_empty(leading[1], leading[0], size).transpose(0, 1)
    return first.new_empty(*leading, size)


def _backward(
    inputs: Sequence[Tensor],
    h: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    dt: Tensor | None,
    batch_sizes: Tensor | None,
    out: Tensor,
    grad_out: Tensor,
    grad_last: Tensor,
    cell: str,
    activation: str,
    min_decay: float,
    reverse: bool,
    time_first: bool,
    needs_dt: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the inputs, side by side, and of h, of the initial state (B, N), of dt and of a bias.

    The last three are sums in the accumulation dtype; they are empty if they are not needed.
    """
    work = _Work(inputs, batch_sizes, Spec(cell, activation, reverse, min_decay), time_first)
    x, first = work.inputs, inputs[0]
    grads = _grads_like(inputs, 1 if work.is_packed else 2)
    flat_out, flat_grad = work.sequence(out), work.sequence(grad_out)
    plan = work.plan(backward=True, has_reset=reset is not None, has_dt=dt is not None)
    unit = work.unit(*x, flat_out, flat_grad, grads)
    num_segments, segment_steps = work.segments(plan)
    rows, dtype = work.num_sequences * num_segments, _accumulated(first)
    grad_h = h.new_empty(h.shape)
    has_initial_state = initial_state is not None
    grad_initial_state = first.new_empty(rows if has_initial_state else 0, work.num_features, dtype=dtype)
    grad_bias = first.new_empty(rows if needs_bias else 0, len(x) * work.num_features, dtype=dtype)
    grads_of_dt = None
    if dt is not None and needs_dt:
        # The kernel writes them with the strides of dt.
        dt = dt.contiguous()
        grads_of_dt = dt.new_empty(*dt.shape, work.num_features // unit)
    states = _state(h), (None, 0) if initial_state is None else _state(initial_state)
    numbers = (
        *(work.num_steps, work.num_features // unit, num_segments, segment_steps),
        *(*work.strides(x[0], unit), *work.strides(flat_out, unit)),
        *(*work.strides(flat_grad, unit), *work.strides(grads, unit), states[0][1], states[1][1]),
        *(*_strides_of_steps(work, reset, dt), *_bound(min_decay), int(not reverse)),
    )
    constants, num_programs = work.constants(plan, unit), work.num_programs(plan) * num_segments
    pointers = (reset, dt, work.offsets, work.lengths)
    x = [*x, None] if len(x) == 2 else x  # type: ignore[list-item]
    products = ends = None
    if num_segments > 1:
        products = first.new_empty(work.num_sequences, num_segments, work.num_features, dtype=dtype)
        ends = torch.empty_like(products)
        summary = (*x, None, flat_grad, None, None, None, *pointers, *(None,) * 5, products, ends, *numbers)
        _run("backward_kernel", num_programs, plan, summary, constants)
    args = (
        *(*x, flat_out, flat_grad, grads, states[0][0], states[1][0], *pointers, grad_last.contiguous(), grad_h),
        *(grads_of_dt, grad_initial_state if has_initial_state else None, grad_bias if needs_bias else None),
        *(products, ends, *numbers),
    )
    _run("backward_kernel", num_programs, plan, args, constants)
    if num_segments > 1 and has_initial_state:
        grad_initial_state = grad_initial_state.view(-1, num_segments, work.num_features).sum(1)
    grad_dt = first.new_empty(0, dtype=dtype) if grads_of_dt is None else grads_of_dt.sum(-1)
    return grads, grad_h, grad_initial_state, grad_dt, grad_bias.sum(0) if needs_bias else grad_bias.view(0)


def _register() -> torch.library.Library:
    """Register the operators, and functions that return the shapes of their outputs."""
    library = torch.library.Library("mingru", "FRAGMENT")  # type: ignore[no-untyped-call]
    define: Any = library.define
    implement: Any = library.impl
    tags = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
    given = "Tensor[] inputs, Tensor h, Tensor? initial_state, Tensor? reset, Tensor? dt, Tensor? batch_sizes"
    how = "str cell, str activation, float min_decay, bool reverse, bool time_first"
    define(f"recurrence_triton_forward({given}, {how}) -> (Tensor, Tensor)", tags=tags)
    define(
        f"recurrence_triton_backward({given}, Tensor out, Tensor grad_out, Tensor grad_last, {how}, bool needs_dt, "
        "bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        tags=tags,
    )
    for key in ("CUDA", "XPU", *(("CPU",) if _IS_INTERPRETED else ())):
        implement("recurrence_triton_forward", _forward, key)
        implement("recurrence_triton_backward", _backward, key)

    def forward(inputs: list[Tensor], h: Tensor, *_: Any) -> States:
        return inputs[0].new_empty(inputs[0].shape), h.new_empty(h.shape)

    def backward(
        inputs: list[Tensor], h: Tensor, initial_state: Tensor | None, reset: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        dt, batch_sizes, *_, needs_dt, needs_bias = rest
        first = inputs[0]
        num_leading = 2 if batch_sizes is None else 1
        num_features = first.shape[num_leading:].numel()
        dtype = _accumulated(first)
        return (
            _grads_like(inputs, num_leading),
            h.new_empty(h.shape),
            first.new_empty(0 if initial_state is None else h.shape[0], num_features, dtype=dtype),
            first.new_empty(0 if dt is None or not needs_dt else dt.shape, dtype=dtype),
            first.new_empty(len(inputs) * num_features if needs_bias else 0, dtype=dtype),
        )

    torch.library.register_fake("mingru::recurrence_triton_forward", forward, lib=library)
    torch.library.register_fake("mingru::recurrence_triton_backward", backward, lib=library)
    return library


_LIBRARY = _register()


def _is_direct(*tensors: Tensor) -> bool:
    """Return whether a call may skip the dispatcher."""
    return not is_compiling() and are_ordinary(*tensors) and not torch._C._len_torch_dispatch_stack()


def _call_forward(inputs: Sequence[Tensor], h: Tensor, *args: Any) -> States:
    run: Any = _forward if _is_direct(*inputs, h) else torch.ops.mingru.recurrence_triton_forward
    out, last = run(inputs, h, *args)
    return out, last


def _call_backward(inputs: Sequence[Tensor], h: Tensor, *args: Any) -> tuple[Tensor, ...]:
    run: Any = _backward if _is_direct(*inputs, h) else torch.ops.mingru.recurrence_triton_backward
    return tuple(run(inputs, h, *args))


def _given(start: Start, layout: Layout) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the states, resets, elapsed times and batch sizes that both operators take."""
    h, initial_state, reset, dt = start
    return h, None if reset is None else initial_state.expand_as(h), reset, dt, layout.batch_sizes


def _how(spec: Spec, layout: Layout) -> tuple[str, str, float, bool, bool]:
    """Return the cell, the activation, `min_decay`, `reverse` and `time_first`, that both operators take."""
    cell, activation, reverse, min_decay = spec
    return cell, activation, min_decay, reverse, layout.time_first


def _recurrence(
    spec: Spec, inputs: Sequence[Tensor], start: Start, layout: Layout, keep: bool
) -> tuple[Tensor, Tensor, None]:
    return *_call_forward(inputs, *_given(start, layout), *_how(spec, layout)), None


def _recurrence_backward(
    spec: Spec, inputs: Sequence[Tensor], start: Start, layout: Layout, saved: Any, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    out, _, *grad = saved
    grads, *grads_of_start, _ = _call_backward(
        inputs, *_given(start, layout), out, *grad, *_how(spec, layout), needs[0], False
    )
    return _grads_of_start(start, needs[0], *grads_of_start) + _split(grads, inputs)


def _grads_of_start(
    start: Start, needs_dt: bool, grad_h: Tensor, grad_initial_state: Tensor, grad_dt: Tensor
) -> tuple[Tensor | None, ...]:
    initial_state, for_initial_state = start.initial_state, None
    if start.reset is not None:
        for_initial_state = grad_initial_state.view(start.h.shape).sum_to_size(initial_state.shape)
        for_initial_state = as_dtype(for_initial_state, initial_state.dtype)
    return grad_h, for_initial_state, grad_dt if needs_dt else None


def _split(grads: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of all inputs, which are side by side in the last dimension."""
    return tuple(part.view(x.shape) for part, x in zip(grads.chunk(len(inputs), -1), inputs, strict=True))


def _in_memory_order(x: Tensor) -> Tensor:
    """Return a sequence with its first two dimensions in the order of memory; a second call restores the order."""
    return x.transpose(0, 1) if is_transposed(x) else x


def _pre_activations(spec: Spec, tensors: Sequence[Any], kept: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Return the pre-activations as a matrix with a row for each step, in the order of memory, and as inputs."""
    x = _in_memory_order(tensors[0])
    matrix = F.linear(x, *tensors[1:]).flatten(0, -2) if kept is None else kept
    pre = matrix.view(*x.shape[:-1], matrix.shape[-1])
    if x is not tensors[0]:
        pre = pre.transpose(0, 1)
    return matrix, list(pre.chunk(NUM_INPUTS[spec.cell], -1))


def _linear_recurrence(
    spec: Spec, tensors: Sequence[Any], start: Start, layout: Layout, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    matrix, inputs = _pre_activations(spec, tensors, None)
    out, last, _ = _recurrence(spec, inputs, start, layout, keep)
    return out, last, matrix if keep else None


def _linear_recurrence_backward(
    spec: Spec, tensors: Sequence[Any], start: Start, layout: Layout, saved: Any, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    x, weight, bias = tensors
    needs_dt, needs_x, needs_weight, needs_bias = needs
    out, kept, *grad = saved
    # The tensors are in the dtype in which autocast computes.
    with torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext():
        _, inputs = _pre_activations(spec, tensors, kept if kept is not None and kept.numel() else None)
        grads, *grads_of_start, grad_bias = _call_backward(
            inputs, *_given(start, layout), out, *grad, *_how(spec, layout), needs_dt, needs_bias
        )
        x = _in_memory_order(x)
        # One matrix of the gradients of all inputs, for both products.
        matrix = (grads.transpose(0, 1) if is_transposed(inputs[0]) else grads).flatten(0, -2)
        grad_x = grad_weight = None
        if needs_x:
            grad_x = (matrix @ weight).view(x.shape)
            grad_x = grad_x if x is tensors[0] else grad_x.transpose(0, 1)
        if needs_weight:
            grad_weight = matrix.t() @ x.flatten(0, -2)
    found = (grad_x, grad_weight, as_dtype(grad_bias, bias.dtype) if needs_bias else None)
    return *_grads_of_start(start, needs_dt, *grads_of_start), *found


def _scan(call: LinearScan) -> States:
    a, b, h, reset, reverse = call
    cell = "linear_scan"
    if a.is_complex():
        a, b, h, cell = as_real(a), as_real(b), as_real(h), "complex_linear_scan"
    out, last = _call_forward([a, b], h, None, reset, None, None, cell, "linear", 0.0, reverse, False)
    if cell == "complex_linear_scan":
        return torch.view_as_complex(out), torch.view_as_complex(last)
    return out, last


def _scan_backward(call: LinearScan, out: Tensor, grad_out: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    a, _, h, reset, reverse = call
    is_complex = a.is_complex()
    if is_complex:
        a, h, out, grad_out, grad_last = (as_real(x) for x in (a, h, out, grad_out, grad_last))
    cell = "complex_linear_scan" if is_complex else "linear_scan"
    # The gradients do not depend on b.
    inputs = [a, a]
    grads, grad_h, *_ = _call_backward(
        *(inputs, h, None, reset, None, None, out, grad_out, grad_last, cell, "linear", 0.0, reverse, False),
        *(False, False),
    )
    found = *_split(grads, inputs), grad_h
    return tuple(torch.view_as_complex(grad) for grad in found) if is_complex else found


BACKEND = Backend(
    unavailable=_unavailable,
    unsupported=_unsupported,
    scan=_scan,
    scan_backward=_scan_backward,
    differentiable=False,
    kernel=Kernel(_recurrence, _recurrence_backward, packed=True, cells=KEEPING),
    linear_kernel=Kernel(_linear_recurrence, _linear_recurrence_backward, packed=True, autocast=True, cells=KEEPING),
)
