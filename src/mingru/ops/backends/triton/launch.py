"""Launch the kernel, for both passes. Triton is imported at the first launch."""

import ctypes
import functools
import importlib
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...call import Call
from ...cells import NUM_INPUTS
from ...layout import is_packing, is_transposed, lengths_of
from ...shape import States, accumulate_dtype
from . import device as devices
from .tiling import Tiling, Work, tiling_of

Tensors = Sequence[Tensor]
# Of the backward pass: gradients of the inputs and of h, and three that may not be needed.
Results = tuple[Any, ...]
# The tensors of a launch with the names of the kernel's arguments; inputs and summaries have several.
Named = list[tuple[str, Tensor]]
# Its names, dtypes, strides, and addresses modulo 16, which matter for sequences of features.
Form = tuple[str, torch.dtype, tuple[int, ...], int]
# The arguments of the kernel by their names, and what selects a compiled kernel: device, warps, types and constants.
Args = dict[str, Any]
Key = tuple[torch.device, int, object]

_SEVERAL = ("inputs", "summaries")
# What the kernel takes as one argument. `grad_last` is dense and has no stride. `after` is the state after the last
# step, or the gradient of h. `grad_dt` has sums over the features of a unit, (num_units) for each elapsed time. The
# last two results are sums over the steps of a segment, (B, num_segments, N) and (B, num_segments, num_inputs N).
# `offsets` are those of packed steps, and `lengths` those of sequences, packed or padded.
GROUPS = {
    "sizes": ("num_steps", "num_units", "num_segments", "segment_steps"),
    "sequences": ("out", "grad_out", "reset", "dt"),
    "states": ("h", "initial_state", "grad_last"),
    "results": ("grads", "grad_dt", "after", "grad_initial_state", "grad_bias"),
    "packing": ("offsets", "lengths"),
}
# () is what is not there.
NOTHING: Args = dict.fromkeys(itertools.chain(("inputs", "summaries"), *GROUPS.values()), ())
# Sequences of features, other sequences, and states of which any batch stride is taken. All others are dense.
_FEATURES, _STEPS, _STATES = ("inputs", "out", "grad_out", "grads"), ("reset", "dt"), ("h", "initial_state")
# What the backward pass reads besides, and the results of each pass. The last three are sums over the steps or features
# of a program.
_SAVED = ("out", "grad_out", "grad_last")
_WRITTEN = {"forward": ("out", "after"), "backward": ("grads", "after", "grad_initial_state", "grad_dt", "grad_bias")}
# What the first of two launches reads, if time is divided into segments.
_OF_SUMMARIES = (*_SEVERAL, "grad_out", *_STEPS, "initial_state", "offsets", "lengths")

# Kernels; None in the interpreter. Triton's own launch would take most of the
# time of a launch to find the kernel.
_compiled: dict[Key, Any] = {}
# Why a kernel that never ran could not be compiled or launched, by the same.
_failures: dict[Key, str] = {}
# One object for equal types and constants, whose hash takes less time. Two threads could take the same number.
_types: dict[object, object] = {}


class KernelFailure(RuntimeError):  # noqa: N818 (a sentence for users says what failed)
    """A kernel cannot be compiled or launched on this machine."""


def run(name: str, num_programs: int, tiling: Tiling, args: Args, again: bool = True) -> None:
    """Launch the kernel of a pass, "forward" or "backward", on the device of its inputs.

    It is compiled if it is not known.
    """
    device = args["inputs"][0][0].device
    key = device, tiling.warps, args["TYPES"]
    if key in _failures:
        # Also in a capture, because no call before it would help.
        raise KernelFailure(_failures[key])
    try:
        _start(key, num_programs, args)
    except Exception as error:
        if devices.is_out_of_memory(error):
            if not again or devices.is_capturing(device):
                raise torch.OutOfMemoryError(f"mingru: {device} has no memory for a kernel: {error}") from error
            devices.free(device)
            return run(name, num_programs, tiling, args, False)
        if devices.is_capturing(device):
            problem = "a CUDA graph cannot capture the first call of a Triton kernel, which loads it"
            raise RuntimeError(f"mingru: {problem}; call the module once before the capture") from error
        kernel = f"the {name} kernel of {args['CELL']}, {args['inputs'][0][0].dtype}, on {device}"
        why = f"Triton failed to compile or launch {kernel} ({devices.first_line(error)})"
        why = f"the backend 'triton' cannot run this because {why}; use 'torch'"
        if key not in _compiled:
            _failures[key] = why
        raise KernelFailure(why) from error


def _start(key: Key, num_programs: int, args: Args) -> None:
    kernels, (device, warps, _), is_known = _kernels(), key, key in _compiled
    compiled, values = _compiled.get(key), values_of(args)
    with devices.current(device):
        if not is_known:
            named = zip(kernels.PARAMETERS, values, strict=True)
            stand_ins = [x if name.isupper() else stand_in(x) for name, x in named]
            # Fusion is given, because the default differs between versions of Triton.
            compiled = kernels.recurrence_kernel.warmup(*stand_ins, grid=(1,), num_warps=warps, enable_fp_fusion=True)
        # The interpreter compiles nothing.
        (compiled or kernels.recurrence_kernel)[(num_programs, 1, 1)](*values)
    _compiled[key] = compiled


# The time of an import statement would be a part of each launch.
_kernels = functools.cache(lambda: importlib.import_module(f"{__package__}.kernels"))
# Made once, because each launch reads all arguments.
_reads = functools.cache(lambda: [operator.itemgetter(*GROUPS.get(name, (name,))) for name in _kernels().PARAMETERS])


def values_of(args: Args) -> list[Any]:
    """Return what the kernel takes, in the order of its parameters."""
    return [read(args) for read in _reads()]


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


def types_of(args: Args) -> object:
    """Return what stands for the types of the operands and for the constants, which select a kernel."""
    types = tuple((name, x if name.isupper() else stand_in(x)) for name, x in args.items())
    return _types.setdefault(types, object())


# What passes do, by what `_pass` knows of the tensors.
_recipes: dict[object, Any] = {}


def _recipe(choose: Callable[[Work], Tiling], name: str, call: Call, named: Named, results: Named) -> Any:
    """Return the tiling of a pass, and what it does with tensors of the same forms.

    This is: functions that convert given tensors, by their index; of each result its name, dtype, shape in memory, and
    the function that returns it, or None; the shape of the summaries; and for each launch the arguments without the
    tensors, and the strides of each tensor, or None if it is dense.
    """
    (spec, (first, *_), (h, *_), (_, batch_sizes, _)), dtype = call, call.tensors[0].dtype
    num_dims, num_sequences, num_steps = 3 if batch_sizes is None else 2, h.shape[0], _num_steps(call)
    flat = functools.partial(_flat, num_dims=num_dims)
    found = [(flat if arg in _FEATURES else _state if arg in _STATES else Tensor.contiguous) for arg, _ in named]
    dense = [convert(x) for convert, (_, x) in zip(found, named, strict=True)]
    conversions = [(at, found[at]) for at, x in enumerate(dense) if x is not named[at][1]]
    owned = [(arg, x) for x, (arg, _) in zip(dense, named, strict=True)]
    forms = _forms(owned)
    num_features = math.prod(first.shape[num_dims - 1 :])
    names, unit = {arg for arg, *_ in forms}, unit_of(num_features, forms)
    is_timed, is_packed = spec.min_decay != 0 or "dt" in names, "offsets" in names
    facts = name == "backward", "reset" in names, is_packed, is_timed, *devices.facts_of(first.device)
    tiling = choose(Work(spec.cell, dtype.itemsize, num_sequences, num_steps, num_features, *facts))
    # Each program has a sum of its own.
    counts = {"grad_initial_state": (tiling.segments, 1), "grad_dt": (num_features // unit, 1 if is_packed else 2)}
    counts["grad_bias"] = num_sequences * tiling.segments, 0
    written: list[Any] = []
    for arg, x in results:
        forms.append((arg, x.dtype, flat(x).stride() if arg in _FEATURES else (), 0))
        (count, dim), shape, finish = counts.get(arg, (1, 0)), tuple(x.shape), None
        if count > 1:
            shape, finish = (*shape[:dim], count, *shape[dim:]), functools.partial(torch.sum, dim=dim)
        elif not x.is_contiguous():
            shape, finish = x.transpose(0, 1).shape, functools.partial(torch.transpose, dim0=0, dim1=1)
        written.append((arg, x.dtype, shape, finish))
    launches = _launches(name, call, tiling, unit, num_features, forms)
    shape = 2, num_sequences, tiling.segments, tiling.chunks, num_features
    # Not converted again for this launch.
    named[:] = owned
    return tiling, conversions, written, shape, launches


def _launches(name: str, call: Call, tiling: Tiling, unit: int, num_features: int, forms: list[Form]) -> Any:
    """Return for each launch the arguments without tensors, and the strides of each tensor; None if it is dense."""
    (spec, _, _, (time_first, batch_sizes, _)), num_steps = call, _num_steps(call)
    tile, is_packed = tiling.chunks * tiling.steps, batch_sizes is not None
    args = NOTHING | {"CELL": spec.cell, "ACTIVATION": spec.activation, "KEEPING": devices.CELLS[spec.cell]}
    # The number of segments selects no kernel.
    args |= {"TILING": tiling._replace(segments=1), "EVEN": num_features % tiling.features == 0, "V": unit}
    args |= {"backwards": int(spec.reverse != (name == "backward")), "bound": _bound(spec.min_decay)}
    args |= {"num_steps": num_steps, "num_segments": tiling.segments, "num_units": num_features // unit}
    # A whole number of tiles.
    args["segment_steps"] = -(-num_steps // (tiling.segments * tile)) * tile
    launches: list[Any] = []
    for own_forms in _of_launches(forms, 2 * [("summaries", accumulate_dtype(forms[0][1]), (), 0)], tiling):
        found: list[tuple[int, ...] | None] = []
        before = None
        for arg, _, strides, _ in own_forms:
            own, is_shared, before = unit if arg in _FEATURES else 1, (arg, strides) == before, (arg, strides)
            if arg in _FEATURES or arg in _STEPS:
                batch, step = (0, strides[0]) if is_packed else strides[:2][:: -1 if time_first else 1]
                found.append(() if is_shared else (batch // own, step // own))
            else:
                found.append(strides[:1] if arg in _STATES else None)
        filled = _filled(args, [(arg, _pointer(dtype)) for arg, dtype, *_ in own_forms], found)
        launches.append((args | {"TYPES": types_of(filled)}, found))
    return launches


def _of_launches(named: list[Any], summaries: list[Any], tiling: Tiling) -> list[list[Any]]:
    """Return the tensors of each launch. If there are several segments, the first writes summaries and no results."""
    whole = [*named, *summaries]
    return [[each for each in whole if each[0] in _OF_SUMMARIES], whole] if tiling.segments > 1 else [named]


def _filled(args: Args, named: Sequence[tuple[str, object]], strides: Sequence[tuple[int, ...] | None]) -> Args:
    """Return these arguments and the tensors: sequences and states as tuples, with their strides."""
    args = args.copy()
    for (name, x), own in zip(named, strides, strict=True):
        operand = x if own is None else (x, *own)
        args[name] = (*args[name], operand) if name in _SEVERAL else operand
    return args


def unit_of(num_features: int, forms: Sequence[Form]) -> int:
    """Return the number of features that one access may have: at most 16 bytes, by sizes, strides and addresses."""
    size = forms[0][1].itemsize
    bits = 16 // size | num_features
    for arg, _, strides, address in forms:
        if arg in _FEATURES:
            for number in (address // size, *strides[:-1]):
                bits |= number
    # The lowest bit is the largest power of 2 that divides all of them.
    return bits & -bits


def _forms(named: Named) -> list[Form]:
    return [(arg, x.dtype, x.stride(), x.data_ptr() & 15 if arg in _FEATURES else 0) for arg, x in named]


def _on_meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _state(h: Tensor) -> Tensor:
    """Return a state (B, *) whose elements are dense in each batch element, or which is expanded from one."""
    if h.is_contiguous():
        return h
    return h[:1].contiguous().expand_as(h) if h.stride(0) == 0 else h.contiguous()


def has_initial_state(call: Call) -> bool:
    """Return whether a state after resets is an argument. A linear scan starts from 0 after a reset."""
    return call.context.reset is not None and call.spec.cell in NUM_INPUTS


def _num_steps(call: Call) -> int:
    time_first, batch_sizes, _ = call.layout
    return batch_sizes.numel() if batch_sizes is not None else call.tensors[0].shape[0 if time_first else 1]


def _flat(x: Tensor, num_dims: int) -> Tensor:
    """Return a sequence with contiguous features in one last dimension."""
    x = x if x.dim() == num_dims else x.flatten(num_dims - 1)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _given(call: Call, saved: Tensors) -> Named:
    """Return what a pass reads."""
    _, inputs, (h, initial_state, reset, dt, *_), (_, batch_sizes, lengths) = call
    named: Named = [("inputs", x) for x in inputs]
    if batch_sizes is not None:
        x, sizes = inputs[0], tuple(batch_sizes.tolist())
        if devices.is_capturing(x.device):
            # Also if they are kept from a call before: a replay would read them after they are freed.
            why = "because their batch_sizes are on the CPU; pass padded sequences and lengths"
            raise ValueError(f"mingru: packed sequences cannot be captured in a CUDA graph, {why}")
        # Each stream has a copy of its own, because another one does not wait for the copy, and may reuse its memory.
        offsets, lengths = _packing(sizes, x.shape[0], x.device, devices.stream_of(x.device))
        named.append(("offsets", offsets))
    # The kernel writes the gradients of dt with the strides of dt.
    named += [(arg, x) for arg, x in (("lengths", lengths), ("dt", dt), ("reset", reset)) if x is not None]
    if has_initial_state(call):
        named.append(("initial_state", initial_state.expand_as(h)))
    named += [("h", h), *zip(_SAVED, saved, strict=False)]
    # A negative view and a ZeroTensor have other values than their memory, or no memory.
    return [(arg, x.clone() if x.is_neg() or x._is_zerotensor() else x) for arg, x in named]


def _pass(name: str, call: Call, saved: Tensors, *needs: bool) -> dict[str, Tensor]:
    """Run a pass, and return its results by their names."""
    named, (spec, (x, *_), (h, *_), (time_first, batch_sizes, _)) = _given(call, saved), call
    forms = _forms(named)
    num_steps = None if batch_sizes is None else batch_sizes.shape
    key = tiling_of, name, spec, time_first, needs, x.device, x.shape, h.shape[0], num_steps, *forms
    recipe = _recipes.get(key)
    if recipe is None:
        if len(_recipes) >= 4096:
            _recipes.clear()
        # The forms alone, without memory.
        own = call.context._replace(h=_on_meta(h), dt=None if call.context.dt is None else _on_meta(call.context.dt))
        meta = call._replace(tensors=[*map(_on_meta, call.tensors)], context=own)
        results: Any = forward_results(meta) if name == "forward" else backward_results(meta, saved, *needs)
        results = [(arg, y) for arg, y in zip(_WRITTEN[name], results, strict=True) if y is not None]
        recipe = _recipes[key] = _recipe(tiling_of, name, call, named, results)
    tiling, conversions, written, shape, launches = recipe
    for at, convert in conversions:
        named[at] = named[at][0], convert(named[at][1])
    new = [(arg, x.new_empty(own_shape, dtype=dtype)) for arg, dtype, own_shape, _ in written]
    named += new
    both = x.new_empty(shape, dtype=accumulate_dtype(x.dtype)).unbind() if tiling.segments > 1 else ()
    summaries = [("summaries", each) for each in both]
    num_programs = -(-shape[-1] // tiling.features) * shape[1] * tiling.segments
    for each, (args, strides) in zip(_of_launches(named, summaries, tiling), launches, strict=True):
        run(name, num_programs, tiling, _filled(args, each, strides))
    return {arg: y if own[3] is None else own[3](y) for (arg, y), own in zip(new, written, strict=True)}


# Kept, because each layer and pass of a module has the same batch sizes.
@functools.lru_cache(64)
def _packing(sizes: tuple[int, ...], num_rows: int, device: torch.device, stream: object) -> tuple[Tensor, Tensor]:
    """Return the offset of each step in packed data, and the length of each sequence, on a device."""
    batch_sizes = torch.tensor(sizes, device="cpu")
    # In a compiled graph, no layer has checked them.
    if not is_packing(batch_sizes, num_rows):
        raise ValueError("mingru: batch_sizes must be positive, must not increase, and sum to the packed steps")
    both = torch.cat([batch_sizes.cumsum(0) - batch_sizes, lengths_of(batch_sizes)])
    both = (both.pin_memory() if device.type in devices.DEVICES else both).to(device, non_blocking=True)
    return both[: len(sizes)], both[len(sizes) :]


@functools.cache
def _bound(min_decay: float) -> tuple[float, ...]:
    """Return log(m) and log(1 - m) of the lower bound m of the decay, each as a float32 number and the rest."""
    if min_decay == 0:
        return ()
    # Triton passes numbers as float32, and kernels of float64 need more digits.
    pairs = ((number, ctypes.c_float(number).value) for number in (math.log(min_decay), math.log1p(-min_decay)))
    return tuple(part for number, rounded in pairs for part in (rounded, number - rounded))


def forward(call: Call) -> States:
    """Return the states of all steps, and the last state."""
    found = _pass("forward", call, ())
    return found["out"], found["after"]


def backward(call: Call, saved: Tensors, needs_dt: bool, needs_bias: bool) -> Results:
    """Return the gradients of the inputs, side by side, and of h, of the initial state, of dt and of a bias.

    The last three are sums in the accumulation dtype, or None if they are not needed. `saved`: out, grad_out,
    grad_last.
    """
    # To read the gradients of few steps again moves less memory than a sum for each sequence.
    is_short = needs_bias and _num_steps(call) * call.tensors[0].element_size() <= 8
    found = _pass("backward", call, saved, needs_dt, needs_bias and not is_short)
    if is_short:
        grads = found["grads"]
        found["grad_bias"] = grads.sum([*range(grads.dim() - 1)], dtype=accumulate_dtype(grads.dtype))
    return tuple(map(found.get, _WRITTEN["backward"]))


def forward_results(call: Call) -> States:
    """Return uninitialized tensors for the results of `forward`."""
    x, h = call.tensors[0], call.context.h
    return x.new_empty(x.shape), h.new_empty(h.shape)


def backward_results(call: Call, saved: Tensors, needs_dt: bool, needs_bias: bool) -> Results:
    """Return uninitialized tensors for the results of `backward`."""
    x, (h, _, _, dt, *_) = call.tensors[0], call.context
    num_leading, shape, dtype = 2 if call.layout.batch_sizes is None else 1, x.shape, accumulate_dtype(x.dtype)
    size = len(call.tensors) * math.prod(shape[num_leading:])
    # In the memory order of the inputs.
    is_swapped = is_transposed(x)
    grads = x.new_empty((*(shape[1::-1] if is_swapped else shape[:num_leading]), size))
    of_dt = dt.shape if needs_dt and dt is not None else None
    shapes = h.shape if has_initial_state(call) else None, of_dt, (size,) if needs_bias else None
    sums = [None if shape is None else x.new_empty(shape, dtype=dtype) for shape in shapes]
    return grads.transpose(0, 1) if is_swapped else grads, h.new_empty(h.shape), *sums
