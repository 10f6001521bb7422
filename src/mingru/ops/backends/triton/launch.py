"""Launch the kernel, for both passes. Triton is imported at the first launch."""

import ctypes
import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...call import Call
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
# Its names, dtypes, strides, and addresses modulo 16. Only sequences and states need the last two.
Forms = tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]

_SEVERAL = ("inputs", "summaries")
# Sequences of features, other sequences, and states of which any batch stride is taken. All other memory is dense.
_FEATURES, _STEPS, _STATES = ("inputs", "out", "grad_out", "grads"), ("reset", "dt"), ("h", "initial_state")
# Sums over the steps or features of a program.
_SUMS = ("grad_initial_state", "grad_dt", "grad_bias")
# What the first of two launches reads, if time is divided into segments.
_OF_SUMMARIES = (*_SEVERAL, "grad_out", *_STEPS, "initial_state", "offsets", "lengths")

# Kernels by device, warps, and types and constants; None in the interpreter. Triton's own launch would take most of the
# time of a launch to find the kernel.
_compiled: dict[tuple[Any, ...], Any] = {}
# Why a kernel that never ran could not be compiled or launched, by the same.
_failures: dict[tuple[Any, ...], str] = {}
# One object for equal types and constants, whose hash takes less time. Two threads could take the same number.
_types: dict[tuple[Any, ...], object] = {}


class KernelFailure(RuntimeError):  # noqa: N818 (a sentence for users says what failed)
    """A kernel cannot be compiled or launched on this machine."""


def run(name: str, num_programs: int, plan: Plan, args: dict[str, Any]) -> None:
    """Launch the kernel of a pass, "forward" or "backward", on the device of its inputs."""
    started(name, args["inputs"][0][0].device, num_programs, plan, args)


def started(name: str, device: Any, num_programs: int, plan: Plan, args: dict[str, Any], again: bool = True) -> Any:
    """Launch a kernel, which is compiled if it is not known, and return it. Without programs, it is only loaded."""
    key = device, plan.warps, args["TYPES"]
    if key in _failures:
        # Also in a capture, because no call before it would help.
        raise KernelFailure(_failures[key])
    try:
        return _start(key, num_programs, args)
    except Exception as error:
        if devices.is_out_of_memory(error):
            if not again or devices.is_capturing(device):
                raise torch.OutOfMemoryError(f"mingru: {device} has no memory for a kernel: {error}") from error
            devices.free(device)
            return started(name, device, num_programs, plan, args, False)
        if devices.is_capturing(device):
            problem = "a CUDA graph cannot capture the first call of a Triton kernel, which loads it"
            raise RuntimeError(f"mingru: {problem}; call the module once before the capture") from error
        kernel = f"the {name} kernel of {args['CELL']}, {args['inputs'][0][0].dtype}, on {device}"
        why = f"Triton failed to compile or launch {kernel} ({devices.first_line(error)})"
        why = f"the backend 'triton' cannot run this because {why}; use 'torch'"
        if key not in _compiled and not devices.is_without_files(error):
            _failures[key] = why
        raise KernelFailure(why) from error


def _start(key: tuple[Any, ...], num_programs: int, args: dict[str, Any]) -> Any:
    kernels, (device, warps, _), is_known = _kernels(), key, key in _compiled
    compiled, names = _compiled.get(key), kernels.PARAMETERS
    values = [*map(args.get, names)]
    with devices.current(device):
        if not is_known:
            stand_ins = [x if name.isupper() else stand_in(x) for name, x in zip(names, values, strict=True)]
            # Fusion is given, because the default differs between versions of Triton.
            compiled = kernels.recurrence_kernel.warmup(*stand_ins, grid=(1,), num_warps=warps, enable_fp_fusion=True)
        # The interpreter compiles nothing.
        launch = (compiled or kernels.recurrence_kernel)[(num_programs, 1, 1)]
        if num_programs > 0:
            launch(*values)
    _compiled[key] = compiled
    return compiled


# The time of an import statement would be a part of each launch.
_kernels = functools.cache(lambda: importlib.import_module(f"{__package__}.kernels"))


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
def _prepared(planned: Any, name: str, call: Any, device: Any, sizes: Any, forms: Forms, held: int = 16) -> Any:
    """Return the plan of a pass, the shape of its summaries, how many sums each result has and in which dimension, and
    for each launch the arguments without the memory, and the strides of each memory, or None if it is dense.

    Calls with memory of the same forms share them. `call`: the spec, and whether sequences are time-first. `sizes`:
    numbers of sequences, steps and features. `held`: see `Work`.
    """
    (spec, time_first), (num_sequences, num_steps, num_features), dtype = call, sizes, forms[0][1]
    kinds, unit = {kind for kind, *_ in forms}, unit_of(num_features, forms)
    is_timed, is_packed = spec.min_decay != 0 or "dt" in kinds, "offsets" in kinds
    facts = name == "backward", "reset" in kinds, is_packed, is_timed, *devices.facts_of(device)
    plan = planned(Work(spec.cell, dtype.itemsize, num_sequences, num_steps, num_features, *facts, held))
    tile = plan.chunks * plan.steps
    # A whole number of tiles.
    segment_steps = -(-num_steps // (plan.segments * tile)) * tile
    args = {"CELL": spec.cell, "ACTIVATION": spec.activation, "KEEPING": KEEPING[spec.cell], "V": unit}
    args |= {"C": plan.chunks, "T": plan.steps, "F": plan.features, "STAGES": plan.stages}
    args |= {"EVEN": num_features % plan.features == 0, "backwards": int(spec.reverse != (name == "backward"))}
    args |= {"num_steps": num_steps, "num_segments": plan.segments, "segment_steps": segment_steps}
    args |= {"num_units": num_features // unit, "bound": _bound(spec.min_decay)}
    launches: list[tuple[dict[str, Any], list[Any]]] = []
    for memory in _of_launches([*forms], 2 * [("summaries", accumulate_dtype(dtype), (), 0)], plan):
        found: list[Any] = []
        before = None
        for kind, _, strides, _ in memory:
            own, is_shared, before = unit if kind in _FEATURES else 1, (kind, strides) == before, (kind, strides)
            if kind in _FEATURES or kind in _STEPS:
                batch, step = (0, strides[0]) if is_packed else strides[:2][:: -1 if time_first else 1]
                found.append(() if is_shared else (batch // own, step // own))
            else:
                found.append(strides[:1] if kind in _STATES else None)
        filled = _filled(args, [(kind, _pointer(dtype)) for kind, dtype, *_ in memory], found)
        filled["TYPES"] = types_of(filled)
        launches.append((args | {"TYPES": filled["TYPES"]}, found))
    if plan.segments > 1 and held == 16:
        load = functools.partial(started, name, device, 0, plan, filled)
        if devices.num_resident(device, plan.warps, load) == 1:
            return _prepared(planned, name, call, device, sizes, forms, plan.warps)
    counts = {"grad_initial_state": (plan.segments, 1), "grad_dt": (num_features // unit, 1 if is_packed else 2)}
    counts["grad_bias"] = num_sequences * plan.segments, 0
    return plan, (2, num_sequences, plan.segments, plan.chunks, num_features), counts, launches


def _of_launches(memory: list[Any], summaries: list[Any], plan: Plan) -> list[list[Any]]:
    """Return the memory of each launch. If time is divided into segments, the first writes summaries and no results."""
    whole = [*memory, *summaries]
    return [[each for each in whole if each[0] in _OF_SUMMARIES], whole] if plan.segments > 1 else [memory]


def _filled(args: dict[str, Any], memory: Memory, strides: Sequence[Any]) -> dict[str, Any]:
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


def _num_steps(call: Call) -> int:
    time_first, batch_sizes, _ = call.layout
    return batch_sizes.numel() if batch_sizes is not None else call.tensors[0].shape[0 if time_first else 1]


def _flat(x: Tensor, num_dims: int) -> Tensor:
    """Return a sequence with contiguous features in one last dimension."""
    x = _written(x)
    x = x if x.dim() == num_dims else x.flatten(num_dims - 1)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _prepare(name: str, call: Call, sequences: Memory, others: Memory, sums: Any = ()) -> tuple[Memory, Any]:
    """Return the memory of a pass, of these sequences and others and what both passes read, and what is `_prepared`.

    `sums`: names of memory that is allocated later.
    """
    spec, inputs, (h, initial_state, reset, dt, *_), (time_first, batch_sizes, lengths) = call
    # A sequence has its features in one last dimension.
    num_dims = 3 if batch_sizes is None else 2
    memory: Memory = [("inputs", _flat(each, num_dims)) for each in inputs]
    x = memory[0][1]
    if batch_sizes is not None:
        offsets, lengths = _packing(batch_sizes, x)
        memory.append(("offsets", offsets))
    # The kernel writes the gradients of dt with the strides of dt.
    for kind, each in (("lengths", lengths), ("dt", dt), ("reset", reset)):
        if each is not None:
            memory.append((kind, _written(each).contiguous()))
    if has_initial_state(call):
        memory.append(("initial_state", _state(initial_state.expand_as(h))))
    memory += [(kind, _flat(each, num_dims)) for kind, each in sequences]
    memory += [("h", _state(h)), *others]
    sizes = h.shape[0], _num_steps(call), x.shape[-1]
    forms = [(n, y.dtype, y.stride(), y.data_ptr() & 15) for n, y in memory]
    forms += [(each, accumulate_dtype(x.dtype), (), 0) for each in sums]
    return memory, _prepared(plan_of, name, (spec, time_first), x.device, sizes, tuple(forms))


def _launch(name: str, memory: Memory, prepared: tuple[Any, ...]) -> None:
    (plan, shape, _, launches), summaries, x = prepared, [], memory[0][1]
    if plan.segments > 1:
        summaries = [("summaries", each) for each in empty(x, accumulate_dtype(x.dtype), *shape).unbind()]
    num_programs = -(-shape[-1] // plan.features) * shape[1] * plan.segments
    for each, (args, strides) in zip(_of_launches(memory, summaries, plan), launches, strict=True):
        run(name, num_programs, plan, _filled(args, each, strides))


# For each tensor of batch sizes, because a module calls the kernel many times with the same one.
_packings: Any = WeakTensorKeyDictionary()


def _packing(batch_sizes: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the offset of each step in packed data x, and the length of each sequence, on the device of x."""
    if devices.is_capturing(x.device):
        # Also if they are kept from a call before: a replay would read them after they are freed with `batch_sizes`.
        why = "because their batch_sizes are on the CPU; pass padded sequences and lengths"
        raise ValueError(f"mingru: packed sequences cannot be captured in a CUDA graph, {why}")
    # Tensors of inference mode have no version.
    version = batch_sizes.tolist() if batch_sizes.is_inference() else batch_sizes._version
    if _packings.get(batch_sizes, (None,))[0] != version:
        _packings[batch_sizes] = version, {}
    kept: dict[Any, States] = _packings[batch_sizes][1]
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


def empty(like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return memory that a kernel writes, on the device of a tensor. Deterministic mode would fill it before."""
    if not torch.are_deterministic_algorithms_enabled() or type(like) is not Tensor or like.is_meta:
        return like.new_empty(*shape, dtype=dtype)
    strides, storage = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))], cast(Any, torch.UntypedStorage)
    memory = storage(math.prod(shape) * dtype.itemsize, device=like.device)
    return like.new_empty(0, dtype=dtype).set_(memory, 0, shape, strides)


def forward(call: Call) -> States:
    """Return the states of all steps, and the last state."""
    out, last = forward_results(call)
    _launch("forward", *_prepare("forward", call, [("out", out)], [("after", last)]))
    return out, last


def backward(call: Call, saved: Tensors, needs_dt: bool, needs_bias: bool) -> Results:
    """Return the gradients of the inputs, side by side, and of h, of the initial state, of dt and of a bias.

    The last three are sums in the accumulation dtype, or None if they are not needed. `saved`: out, grad_out,
    grad_last.
    """
    results, (out, grad_out, grad_last) = backward_results(call, saved, needs_dt, needs_bias), saved
    grads, grad_h, *sums = results
    # To read the gradients of few steps again moves less memory than a sum for each sequence.
    is_short = needs_bias and _num_steps(call) * grads.element_size() <= 8
    wanted = {name: x for name, x in zip(_SUMS, sums[: 3 - is_short], strict=False) if x is not None}
    sequences, others = [("out", out), ("grad_out", grad_out), ("grads", grads)], [("after", grad_h)]
    others.append(("grad_last", _written(grad_last).contiguous()))
    memory, prepared = _prepare("backward", call, sequences, others, wanted)
    # Each program has a sum of its own.
    for name, x in wanted.items():
        count, dim = prepared[2][name]
        memory.append((name, x if count == 1 else empty(x, x.dtype, *x.shape[:dim], count, *x.shape[dim:])))
    _launch("backward", memory, prepared)
    for name, part in memory[len(memory) - len(wanted) :]:
        if part is not wanted[name]:
            torch.sum(part, prepared[2][name][1], out=wanted[name])
    if is_short:
        torch.sum(grads, [*range(grads.dim() - 1)], dtype=sums[2].dtype, out=sums[2])
    return results


def forward_results(call: Call) -> States:
    """Return uninitialized tensors for the results of `forward`."""
    x, h = call.tensors[0], call.start.h
    return empty(x, x.dtype, *x.shape), empty(h, h.dtype, *h.shape)


def backward_results(call: Call, saved: Tensors, needs_dt: bool, needs_bias: bool) -> Results:
    """Return uninitialized tensors for the results of `backward`."""
    x, (h, _, _, dt, *_) = call.tensors[0], call.start
    num_leading, shape, dtype = 2 if call.layout.batch_sizes is None else 1, x.shape, accumulate_dtype(x.dtype)
    size = len(call.tensors) * math.prod(shape[num_leading:])
    # In the memory order of the inputs.
    is_swapped = is_transposed(x)
    grads = empty(x, x.dtype, *(shape[1::-1] if is_swapped else shape[:num_leading]), size)
    of_dt: Any = dt.shape if needs_dt and dt is not None else None
    shapes = h.shape if has_initial_state(call) else None, of_dt, (size,) if needs_bias else None
    sums = [None if shape is None else empty(x, dtype, *shape) for shape in shapes]
    return grads.transpose(0, 1) if is_swapped else grads, empty(h, h.dtype, *h.shape), *sums
