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
from ...call import from_flat
from ...layout import is_packing, is_transposed
from ...shape import States, accumulate_dtype
from . import device as devices
from .plan import KEEPING, Plan, Work, plan_of

Tensors = Sequence[Tensor]
Given = Sequence[Tensor | None]

# Kernels by device, warps, constants and types of the operands; None in the interpreter. Triton's own launch would take
# most of the time of a launch to find the kernel.
_compiled: dict[tuple[Any, ...], Any] = {}
# Why a kernel that never ran could not be compiled or launched, by the same.
_failures: dict[tuple[Any, ...], str] = {}


def run(name: str, num_programs: int, plan: Plan, args: dict[str, Any]) -> None:
    """Launch the kernel of a pass, "forward" or "backward", on the device of its inputs."""
    x = args["inputs"][0][0]
    try:
        _launch(x.device, num_programs, plan, args)
    except Exception as error:
        if devices.is_out_of_memory(error):
            raise torch.OutOfMemoryError(f"mingru: {x.device} has no memory for a kernel: {error}") from error
        if devices.is_capturing(x.device):
            raise RuntimeError(
                "mingru: a CUDA graph cannot capture the first call of a Triton kernel, which loads it; call the "
                "module once before the capture"
            ) from error
        why = (
            f"Triton failed to compile or launch the {name} kernel of {args['CELL']}, {x.dtype}, on {x.device} "
            f"({devices.first_line(error)})"
        )
        raise KernelFailure(f"the backend 'triton' cannot run this because {why}; use 'torch'") from error


def _launch(device: torch.device, num_programs: int, plan: Plan, args: dict[str, Any]) -> None:
    from . import kernels

    args = args | {"C": plan.chunks, "T": plan.steps, "F": plan.features, "STAGES": plan.stages}
    values = [args.get(name) for name in kernels.PARAMETERS]
    constants, operands = values[: kernels.NUM_CONSTANTS], values[kernels.NUM_CONSTANTS :]
    key = (device, plan.warps, *constants, *[x if x is None else stand_in(x) for x in operands])
    if key in _failures:
        raise RuntimeError(_failures[key])
    # Fusion is given, because the default differs between versions of Triton.
    kernel, options = kernels.recurrence_kernel, {"num_warps": plan.warps, "enable_fp_fusion": True}
    with devices.current(device):
        try:
            compiled = _compiled[key] if key in _compiled else kernel.warmup(*key[2:], grid=(1,), **options)
            # The interpreter compiles nothing.
            (kernel[(num_programs,)] if compiled is None else compiled[(num_programs, 1, 1)])(*values)
        except Exception as error:
            # Some reasons to fail pass.
            if key not in _compiled and not (devices.is_capturing(device) or devices.is_out_of_memory(error)):
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


def _written(tensors: Given) -> list[Any]:
    """Return tensors whose values are in memory; a negative view and a ZeroTensor have other values, or no memory."""
    return [x.clone() if x is not None and (x.is_neg() or x._is_zerotensor()) else x for x in tensors]


class _Call:
    """What both passes have in common."""

    def __init__(self, inputs: Tensors, given: Given, cell: Sequence[str], min_decay: float, flags: Any) -> None:
        (self.cell, self.activation), self.min_decay, (self.reverse, self.time_first) = cell, min_decay, flags
        _, _, self.start, layout = from_flat(None, _written(given))
        self.batch_sizes, self.offsets, self.lengths = layout.batch_sizes, None, layout.lengths
        self.x = [self.flat(x) for x in _written(inputs)]
        if any(x.stride() != self.x[1].stride() for x in self.x[2:]):
            self.x = [x.contiguous() for x in self.x]
        self.num_features = self.x[0].shape[-1]
        if self.batch_sizes is None:
            self.num_sequences, self.num_steps = inputs[0].shape[:2][:: -1 if self.time_first else 1]
        else:
            self.offsets, self.lengths = _packing(self.batch_sizes, self.x[0])
            self.num_sequences, self.num_steps = len(self.lengths), len(self.offsets)

    def flat(self, x: Tensor) -> Tensor:
        """Return a sequence with contiguous features in one last dimension."""
        x = x.flatten(2 if self.batch_sizes is None else 1)
        return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

    def plan(self, backward: bool) -> Plan:
        x, reset, dt = self.x[0], self.start.reset, self.start.dt
        sizes = x.element_size(), self.num_sequences, self.num_steps, self.num_features
        facts = backward, reset is not None, self.batch_sizes is not None, self.min_decay != 0 or dt is not None
        return plan_of(Work(self.cell, *sizes, *facts, *devices.facts_of(x.device)))

    def unit(self, *sequences: Tensor) -> int:
        """Return the number of features that one access may have: at most 16 bytes, by sizes, strides and addresses."""
        size = self.x[0].element_size()
        bits = 16 // size | self.num_features
        for x in (*self.x, *sequences):
            bits |= x.data_ptr() // size
            for stride in x.stride()[:-1]:
                bits |= stride
        # The lowest bit is the largest power of 2 that divides all of them.
        return bits & -bits

    def sequence(self, x: Tensor | None, unit: int) -> tuple[Any, ...] | None:
        """Return a sequence and its strides of batch and time in units, as an argument."""
        if x is None:
            return None
        if self.batch_sizes is not None:
            return x, 0, x.stride(0) // unit
        step, batch = x.stride()[:2] if self.time_first else x.stride()[1::-1]
        return x, batch // unit, step // unit

    def launch(self, name: str, plan: Plan, unit: int, shared: dict[str, Any], whole: dict[str, Any]) -> None:
        """Launch the kernel with arguments `shared` and `whole`. If time is divided into segments, launch it first for
        the segments with `shared` alone."""
        x, *others = self.x
        num_own = 1 + (others[0].stride() != x.stride())
        tile = plan.chunks * plan.steps
        shared |= {
            "inputs": (*(self.sequence(x, unit) for x in self.x[:num_own]), *((x,) for x in self.x[num_own:])),
            "reset": self.sequence(self.start.reset, 1),
            "dt": self.sequence(self.start.dt, 1),
            "initial_state": _state(self.start.initial_state),
            "offsets": self.offsets,
            "lengths": self.lengths,
            "bound": _bound(self.min_decay),
            "num_steps": self.num_steps,
            "num_units": self.num_features // unit,
            "num_segments": plan.segments,
            # A whole number of tiles.
            "segment_steps": -(-self.num_steps // (plan.segments * tile)) * tile,
            "backwards": int(self.reverse != (name == "backward")),
            "CELL": self.cell,
            "ACTIVATION": self.activation,
            "KEEPING": KEEPING[self.cell],
            "V": unit,
            "EVEN": self.num_features % plan.features == 0,
        }
        num_programs = -(-self.num_features // plan.features) * self.num_sequences * plan.segments
        if plan.segments > 1:
            shape = (2, self.num_sequences, plan.segments, plan.chunks, self.num_features)
            shared["summaries"] = x.new_empty(shape, dtype=accumulate_dtype(x.dtype)).unbind()
            run(name, num_programs, plan, shared)
        run(name, num_programs, plan, shared | whole)


# For each tensor of batch sizes, because a module calls the kernel many times with the same one.
_packings: Any = WeakTensorKeyDictionary()


def _packing(batch_sizes: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the offset of each step in packed data x, and the length of each sequence, on the device of x."""
    if devices.is_capturing(x.device):
        # Also if they are kept from a call before: a replay would read them after they are freed with `batch_sizes`.
        raise ValueError(
            "mingru: packed sequences cannot be captured in a CUDA graph, because their batch_sizes are on the CPU; "
            "pass padded sequences and lengths"
        )
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


def _state(h: Tensor | None) -> tuple[Tensor, int] | None:
    """Return a state (B, N), or (1, N) for all batch elements, and its stride, as an argument."""
    if h is None:
        return None
    h = (h[:1] if h.stride(0) == 0 else h).contiguous()
    return h, 0 if h.shape[0] == 1 else h[0].numel()


def _bound(min_decay: float) -> tuple[float, ...] | None:
    """Return log(m) and log(1 - m) of the lower bound m of the decay, each as a float32 number and the rest."""
    if min_decay == 0:
        return None
    # Triton passes numbers as float32, and kernels of float64 need more digits.
    pairs = ((number, ctypes.c_float(number).value) for number in (math.log(min_decay), math.log1p(-min_decay)))
    return tuple(part for number, rounded in pairs for part in (rounded, number - rounded))


def forward(inputs: Tensors, given: Given, cell: Sequence[str], min_decay: float, flags: Sequence[bool]) -> States:
    """Return the states of all steps, and the last state.

    `given`: see `call.flattened`. `cell`: name and activation. `flags`: reverse, time_first.
    """
    call = _Call(inputs, given, cell, min_decay, flags)
    out, last = forward_results(inputs, given)
    flat = call.flat(out)
    unit = call.unit(flat)
    whole = {"out": call.sequence(flat, unit), "h": _state(call.start.h), "after": last}
    call.launch("forward", call.plan(backward=False), unit, {}, whole)
    return out, last


def backward(
    inputs: Tensors, given: Given, saved: Tensors, cell: Sequence[str], min_decay: float, flags: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Return the gradients of the inputs, side by side, and of h, of the initial state, of dt and of a bias.

    The last three are sums in the accumulation dtype; they are empty if they are not needed. `saved`: out, grad_out,
    grad_last. `flags`: reverse, time_first, needs_dt, needs_bias.
    """
    call = _Call(inputs, given, cell, min_decay, flags[:2])
    if call.start.dt is not None:
        # The kernel writes the gradients of dt with the strides of dt.
        call.start = call.start._replace(dt=call.start.dt.contiguous())
    results = backward_results(inputs, given, flags)
    grads, grad_h, *sums = results
    out, grad_out, grad_last = _written(saved)
    out, grad_out = call.flat(out), call.flat(grad_out)
    plan, unit = call.plan(backward=True), call.unit(out, grad_out, grads)
    whole = {
        "out": call.sequence(out, unit),
        "grads": call.sequence(grads, unit),
        "h": _state(call.start.h),
        "grad_last": grad_last.contiguous(),
        "after": grad_h,
    }
    # Each program has sums of its own. The dimensions of results, of these programs, and of what they have in common.
    counts = {
        "grad_initial_state": (call.num_sequences, plan.segments),
        "grad_dt": (sums[1].numel(), call.num_features // unit),
        "grad_bias": (1, call.num_sequences * plan.segments),
    }
    for x, (name, (size, count)) in zip(sums, counts.items(), strict=True):
        if x.numel() > 0:
            whole[name] = x if count == 1 else x.new_empty(size, count, x.numel() // size)
    call.launch("backward", plan, unit, {"grad_out": call.sequence(grad_out, unit)}, whole)
    for x, name in zip(sums, counts, strict=True):
        part = whole.get(name, x)
        if part is not x:
            torch.sum(part, 1, out=x.view(len(part), -1))
    return results


def forward_results(inputs: Tensors, given: Given, *_: Any) -> States:
    """Return uninitialized tensors for the results of `forward`."""
    h: Any = given[0]
    return inputs[0].new_empty(inputs[0].shape), h.new_empty(h.shape)


def backward_results(inputs: Tensors, given: Given, flags: Sequence[bool]) -> tuple[Tensor, ...]:
    """Return uninitialized tensors for the results of `backward`."""
    _, _, (h, initial_state, _, dt), layout = from_flat(None, given)
    needs_dt, needs_bias = flags[2:]
    x, num_leading = inputs[0], 2 if layout.batch_sizes is None else 1
    leading, size = x.shape[:num_leading], len(inputs) * x.shape[num_leading:].numel()
    # In the memory order of the inputs.
    if is_transposed(x):
        grads = x.new_empty(leading[1], leading[0], size).transpose(0, 1)
    else:
        grads = x.new_empty(*leading, size)
    new = functools.partial(x.new_empty, dtype=accumulate_dtype(x.dtype))
    of_initial_state, of_dt = 0 if initial_state is None else h.shape, dt.shape if needs_dt and dt is not None else 0
    return grads, h.new_empty(h.shape), new(of_initial_state), new(of_dt), new(size if needs_bias else 0)
