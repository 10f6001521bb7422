"""Launch the kernel, for both passes. Triton is imported at the first launch."""

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...backend import KernelFailure
from ...call import Call, Spec
from ...cells import NUM_INPUTS
from ...layout import is_packing, is_transposed
from ...shape import States, accumulate_dtype
from . import device as devices
from .plan import KEEPING, Plan, Work, plan_of

Tensors = Sequence[Tensor]
# Of the backward pass: gradients of the inputs and of h, and three that may not be needed.
Results = tuple[Any, ...]
# The memory of a launch by the names of the kernel's arguments; inputs and summaries have several.
Memory = list[tuple[str, Any]]
# Its names, dtypes, strides, and addresses modulo 16.
Forms = tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]

_SEVERAL = ("inputs", "summaries")
# Sequences of features, other sequences, and states of which any batch stride is taken. All other memory is dense.
_FEATURES, _STEPS, _STATES = ("inputs", "out", "grad_out", "grads"), ("reset", "dt"), ("h", "initial_state")
# What the first of two launches reads, if time is divided into segments.
_OF_SUMMARIES = (*_SEVERAL, "grad_out", *_STEPS, "initial_state", "offsets", "lengths")

# Kernels by device, warps, and types and constants; None in the interpreter. Triton's own launch would take most of the
# time of a launch to find the kernel.
_compiled: dict[tuple[Any, ...], Any] = {}
# Why a kernel that never ran could not be compiled or launched, by the same.
_failures: dict[tuple[Any, ...], str] = {}
# One object for equal types and constants, whose hash takes less time. Two threads could take the same number.
_types: dict[tuple[Any, ...], object] = {}


def run(name: str, num_programs: int, plan: Plan, args: dict[str, Any]) -> None:
    """Launch the kernel of a pass, "forward" or "backward", on the device of its inputs."""
    x = args["inputs"][0][0]
    try:
        _launch(x.device, num_programs, plan, args)
    except Exception as error:
        if devices.is_out_of_memory(error):
            raise torch.OutOfMemoryError(f"mingru: {x.device} has no memory for a kernel: {error}") from error
        if devices.is_capturing(x.device):
            problem = "a CUDA graph cannot capture the first call of a Triton kernel, which loads it"
            raise RuntimeError(f"mingru: {problem}; call the module once before the capture") from error
        kernel = f"the {name} kernel of {args['CELL']}, {x.dtype}, on {x.device}"
        why = f"Triton failed to compile or launch {kernel} ({devices.first_line(error)})"
        raise KernelFailure(f"the backend 'triton' cannot run this because {why}; use 'torch'") from error


def _launch(device: torch.device, num_programs: int, plan: Plan, args: dict[str, Any]) -> None:
    from .kernels import PARAMETERS, recurrence_kernel

    values, key = [*map(args.get, PARAMETERS)], (device, plan.warps, args["TYPES"])
    compiled, is_known = _compiled.get(key), key in _compiled
    if key in _failures:
        raise RuntimeError(_failures[key])
    with devices.current(device):
        try:
            if not is_known:
                stand_ins = [x if name.isupper() else stand_in(x) for name, x in zip(PARAMETERS, values, strict=True)]
                # Fusion is given, because the default differs between versions of Triton.
                compiled = recurrence_kernel.warmup(*stand_ins, grid=(1,), num_warps=plan.warps, enable_fp_fusion=True)
            # The interpreter compiles nothing.
            (compiled or recurrence_kernel)[(num_programs, 1, 1)](*values)
        except Exception as error:
            # Some reasons to fail pass.
            if not (is_known or devices.is_capturing(device) or devices.is_out_of_memory(error)):
                _failures[key] = devices.first_line(error)
            raise
    _compiled[key] = compiled


class _Pointer:
    """An address in place of a tensor. It is odd, so that the compiler assumes no alignment."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 1


_pointer = functools.cache(_Pointer)


def stand_in(x: Any) -> Any:
    """Return what has the type of an operand and none of the values, such as multiples of 16, of which Triton would
    compile other kernels."""
    kind = type(x)
    if kind is int:
        # Integers of 32 and of 64 bits have different types.
        return 3 if -0x80000000 <= x < 0x80000000 else 0x80000001
    if kind is tuple:
        return tuple([stand_in(each) for each in x])
    if kind is float:
        return 0.5
    return _pointer(x.dtype) if isinstance(x, Tensor) else x


def types_of(args: dict[str, Any]) -> object:
    """Return what stands for the types of the operands and for the constants, which select a kernel."""
    types = tuple((name, x if name.isupper() else stand_in(x)) for name, x in args.items())
    return _types.setdefault(types, object())


@functools.lru_cache(4096)
def _prepared(name: str, spec: Spec, time_first: bool, sizes: tuple[int, ...], plan: Plan, forms: Forms) -> Any:
    """Return the arguments of a launch without the memory, and the strides of each memory, or None if it is dense.

    Calls with memory of the same forms share them. `sizes`: numbers of sequences, steps and features.
    """
    _, num_steps, num_features = sizes
    unit, is_packed = unit_of(num_features, forms), any(kind == "offsets" for kind, *_ in forms)
    found: list[Any] = []
    before = None
    for kind, _, strides, _ in forms:
        own, is_shared, before = unit if kind in _FEATURES else 1, (kind, strides) == before, (kind, strides)
        if kind in _FEATURES or kind in _STEPS:
            batch, step = (0, strides[0]) if is_packed else strides[:2][:: -1 if time_first else 1]
            found.append(() if is_shared else (batch // own, step // own))
        else:
            found.append(strides[:1] if kind in _STATES else None)
    tile = plan.chunks * plan.steps
    args: dict[str, Any] = {
        "bound": _bound(spec.min_decay),
        "num_steps": num_steps,
        "num_units": num_features // unit,
        "num_segments": plan.segments,
        # A whole number of tiles.
        "segment_steps": -(-num_steps // (plan.segments * tile)) * tile,
        "backwards": int(spec.reverse != (name == "backward")),
        "CELL": spec.cell,
        "ACTIVATION": spec.activation,
        "KEEPING": KEEPING[spec.cell],
        "V": unit,
        "EVEN": num_features % plan.features == 0,
    }
    args |= {"C": plan.chunks, "T": plan.steps, "F": plan.features, "STAGES": plan.stages}
    args["TYPES"] = types_of(_filled(args, [(kind, _pointer(dtype)) for kind, dtype, *_ in forms], found))
    return args, found


def _filled(args: dict[str, Any], memory: Memory, strides: list[Any]) -> dict[str, Any]:
    """Return these arguments and the memory: sequences and states as tuples, with their strides."""
    args = args.copy()
    for (name, x), own in zip(memory, strides, strict=True):
        operand = x if own is None else (x, *own)
        args[name] = (*args.get(name, ()), operand) if name in _SEVERAL else operand
    return args


def unit_of(num_features: int, forms: Forms) -> int:
    """Return the number of features that one access may have: at most 16 bytes, by sizes, strides and addresses."""
    size = forms[0][1].itemsize
    bits = 16 // size | num_features
    for kind, _, strides, address in forms:
        if kind in _FEATURES:
            for number in (address // size, *strides[:-1]):
                bits |= number
    # The lowest bit is the largest power of 2 that divides all of them.
    return bits & -bits


def _forms(memory: Memory) -> Forms:
    return tuple([(name, x.dtype, x.stride(), x.data_ptr() & 15) for name, x in memory])


def _written(x: Tensor) -> Tensor:
    """Return a tensor whose values are in memory; a negative view and a ZeroTensor have other values, or no memory."""
    return x.clone() if x.is_neg() or x._is_zerotensor() else x


def _state(h: Tensor) -> Tensor:
    """Return a state (B, *) whose elements are dense in each batch element, or which is expanded from one."""
    h = _written(h)
    if h.is_contiguous():
        return h
    return h[:1].contiguous().expand_as(h) if h.stride(0) == 0 else h.contiguous()


def has_initial_state(call: Call) -> bool:
    """Return whether a state after resets is an argument. A linear scan starts from 0 after a reset."""
    return call.start.reset is not None and call.spec.cell in NUM_INPUTS


class _Call:
    """What both passes have in common."""

    def __init__(self, name: str, call: Call) -> None:
        self.name = name
        self.spec, inputs, (h, initial_state, reset, dt, *_), (self.time_first, batch_sizes, lengths) = call
        # A sequence has its features in one last dimension.
        self.num_dims = 3 if batch_sizes is None else 2
        self.memory = [("inputs", self.flat(each)) for each in inputs]
        self.x, self.h = self.memory[0][1], _state(h)
        offsets, lengths = (None, lengths) if batch_sizes is None else _packing(batch_sizes, self.x)
        num_steps = self.x.shape[0 if self.time_first else 1] if offsets is None else offsets.shape[0]
        # The kernel writes the gradients of dt with the strides of dt.
        others = {"offsets": offsets, "lengths": lengths, "dt": dt, "reset": reset}
        self.memory += [(kind, _written(x).contiguous()) for kind, x in others.items() if x is not None]
        if has_initial_state(call):
            self.memory.append(("initial_state", _state(initial_state.expand_as(h))))
        # The numbers of sequences, steps and features.
        self.sizes = h.shape[0], num_steps, self.x.shape[-1]
        is_timed = self.spec.min_decay != 0 or dt is not None
        facts = name == "backward", reset is not None, batch_sizes is not None, is_timed
        work = Work(self.spec.cell, self.x.element_size(), *self.sizes, *facts, *devices.facts_of(self.x.device))
        self.plan = plan_of(work)

    def flat(self, x: Tensor) -> Tensor:
        """Return a sequence with contiguous features in one last dimension."""
        x = _written(x)
        x = x if x.dim() == self.num_dims else x.flatten(self.num_dims - 1)
        return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

    def launch(self, memory: Memory) -> None:
        """Launch the kernel. If time is divided into segments, launch it first for them, without results."""
        (num_sequences, _, num_features), plan = self.sizes, self.plan
        launches = [self.memory + memory]
        if plan.segments > 1:
            shape = (2, num_sequences, plan.segments, plan.chunks, num_features)
            summaries = self.x.new_empty(shape, dtype=accumulate_dtype(self.x.dtype)).unbind()
            launches[0] += [("summaries", each) for each in summaries]
            launches.insert(0, [each for each in launches[0] if each[0] in _OF_SUMMARIES])
        for each in launches:
            args, strides = _prepared(self.name, self.spec, self.time_first, self.sizes, plan, _forms(each))
            num_programs = -(-num_features // plan.features) * num_sequences * plan.segments
            run(self.name, num_programs, plan, _filled(args, each, strides))


# For each tensor of batch sizes, because a module calls the kernel many times with the same one.
_packings: Any = WeakTensorKeyDictionary()


def _packing(batch_sizes: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the offset of each step in packed data x, and the length of each sequence, on the device of x."""
    if devices.is_capturing(x.device):
        # Also if they are kept from a call before: a replay would read them after they are freed with `batch_sizes`.
        why = "because their batch_sizes are on the CPU; pass padded sequences and lengths"
        raise ValueError(f"mingru: packed sequences cannot be captured in a CUDA graph, {why}")
    kept: dict[Any, tuple[Tensor, Tensor]] = _packings.setdefault(batch_sizes, {})
    # Each stream has a copy of its own, because another one does not wait for the copy, and may reuse its memory.
    key = x.device, x.shape[0], devices.stream_of(x.device)
    if key not in kept:
        # In a compiled graph, no layer has checked them.
        if not is_packing(batch_sizes, x.shape[0]):
            raise ValueError("mingru: batch_sizes must be positive, must not increase, and sum to the packed steps")
        num_steps, num_sequences = batch_sizes.numel(), int(batch_sizes[0])
        offsets = batch_sizes.cumsum(0) - batch_sizes
        # Batch element b has as many steps as there are batch sizes above b.
        elements = torch.arange(num_sequences, device=batch_sizes.device)
        lengths = num_steps - torch.searchsorted(batch_sizes.flip(0), elements, right=True)
        both = torch.cat([offsets, lengths])
        both = (both.pin_memory() if x.device.type in devices.DEVICES else both).to(x.device, non_blocking=True)
        kept[key] = both[:num_steps], both[num_steps:]
    return kept[key]


@functools.cache
def _bound(min_decay: float) -> tuple[float, ...] | None:
    """Return log(m) and log(1 - m) of the lower bound m of the decay, each as a float32 number and the rest."""
    if min_decay == 0:
        return None
    # Triton passes numbers as float32, and kernels of float64 need more digits.
    pairs = ((number, ctypes.c_float(number).value) for number in (math.log(min_decay), math.log1p(-min_decay)))
    return tuple(part for number, rounded in pairs for part in (rounded, number - rounded))


def forward(call: Call) -> States:
    """Return the states of all steps, and the last state."""
    own, (out, last) = _Call("forward", call), forward_results(call)
    own.launch([("out", own.flat(out)), ("h", own.h), ("after", last)])
    return out, last


def backward(call: Call, saved: Tensors, needs_dt: bool, needs_bias: bool) -> Results:
    """Return the gradients of the inputs, side by side, and of h, of the initial state, of dt and of a bias.

    The last three are sums in the accumulation dtype, or None if they are not needed. `saved`: out, grad_out,
    grad_last.
    """
    own, results = _Call("backward", call), backward_results(call, saved, needs_dt, needs_bias)
    grads, grad_h, *sums = results
    (num_sequences, num_steps, num_features), segments = own.sizes, own.plan.segments
    memory: Memory = [("out", own.flat(saved[0])), ("grad_out", own.flat(saved[1])), ("grads", grads), ("h", own.h)]
    memory += [("grad_last", _written(saved[2]).contiguous()), ("after", grad_h)]
    # Each program has a sum of its own. The number of results, and of programs for each.
    num_units = num_features // unit_of(num_features, _forms(own.memory + memory)) if needs_dt else 0
    parts = {
        "grad_initial_state": (num_sequences, segments),
        "grad_dt": (sums[1].numel() if needs_dt else 0, num_units),
        # To read the gradients of few steps again moves less memory than a sum for each sequence.
        "grad_bias": (1, 0 if num_steps * grads.element_size() <= 8 else num_sequences * segments),
    }
    partial = []
    for x, (name, (size, count)) in zip(sums, parts.items(), strict=True):
        if x is not None and count > 0:
            memory.append((name, x if count == 1 else x.new_empty(size, count, x.numel() // size)))
            partial += [(memory[-1][1], x)] if count > 1 else []
    own.launch(memory)
    for part, x in partial:
        torch.sum(part, 1, out=x.view(part.shape[0], -1))
    if needs_bias and parts["grad_bias"][1] == 0:
        torch.sum(grads, [*range(grads.dim() - 1)], dtype=sums[2].dtype, out=sums[2])
    return results


def forward_results(call: Call) -> States:
    """Return uninitialized tensors for the results of `forward`."""
    x, h = (torch.empty_like(each, memory_format=torch.contiguous_format) for each in (call.tensors[0], call.start.h))
    return x, h


def backward_results(call: Call, saved: Tensors, needs_dt: bool, needs_bias: bool) -> Results:
    """Return uninitialized tensors for the results of `backward`."""
    x, (h, _, _, dt, *_) = call.tensors[0], call.start
    num_leading = 2 if call.layout.batch_sizes is None else 1
    leading, size = x.shape[:num_leading], len(call.tensors) * x.shape[num_leading:].numel()
    # In the memory order of the inputs.
    grads = x.new_empty(*leading[::-1], size).transpose(0, 1) if is_transposed(x) else x.new_empty(*leading, size)
    shape_of_dt = dt.shape if needs_dt and dt is not None else None
    shapes = h.shape if has_initial_state(call) else None, shape_of_dt, (size,) if needs_bias else None
    dtype = accumulate_dtype(x.dtype)
    sums = (None if shape is None else x.new_empty(shape, dtype=dtype) for shape in shapes)
    return grads, torch.empty_like(h, memory_format=torch.contiguous_format), *sums
