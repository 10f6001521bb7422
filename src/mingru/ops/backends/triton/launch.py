"""Launch the kernel, for both passes. Triton is imported at the first launch."""

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
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

# Kernels by device, warps, constants, and types of the other arguments, which is how Triton selects them. Its own
# search takes most of the time of a launch; None if Triton must launch the kernel.
_compiled: dict[tuple[Any, ...], Any] = {}
# Why a kernel that never ran could not be compiled or launched, by the same.
_failures: dict[tuple[Any, ...], str] = {}


def run(name: str, num_programs: int, plan: Plan, args: dict[str, Any]) -> None:
    """Launch the kernel of a pass, "forward" or "backward", on the device of its first argument."""
    x = args["x0"]
    try:
        _launch(x.device, num_programs, plan, args)
    except Exception as error:
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
    dtypes = tuple(x.dtype for x in values if isinstance(x, Tensor))
    # Integers of 32 and of 64 bits have different types.
    integers = [x for x in values if type(x) is int]
    wide = () if _fits(min(integers)) and _fits(max(integers)) else tuple(map(_fits, integers))
    key = (device, plan.warps, kernels.constants_of(values), tuple(map(type, values)), dtypes, wide)

    def by_triton() -> Any:
        # Fusion is given, because the default differs between versions of Triton. The interpreter returns None.
        return kernels.recurrence_kernel[(num_programs,)](**args, num_warps=plan.warps, enable_fp_fusion=True)

    with devices.current(device):
        if (compiled := _compiled.get(key)) is not None:
            try:
                compiled[(num_programs, 1, 1)](*values)
            except Exception:
                # Another version of Triton may take other arguments here.
                by_triton()
                _compiled[key] = None
        elif key in _compiled:
            by_triton()
        elif key in _failures:
            raise RuntimeError(_failures[key])
        else:
            _compiled[key] = _first(by_triton, device, key)


def _first(by_triton: Callable[[], Any], device: torch.device, key: tuple[Any, ...]) -> Any:
    """Return the kernel of a first launch. Try twice, because some reasons to fail pass, such as a full disk."""
    try:
        return by_triton()
    except Exception:
        if devices.is_capturing(device):
            raise
    try:
        return by_triton()
    except Exception as error:
        _failures[key] = devices.first_line(error)
        raise


def _fits(number: int) -> bool:
    return -(2**31) <= number < 2**31


def _written(tensors: Given) -> list[Any]:
    """Return tensors whose values are in memory; a negative view and a ZeroTensor have other values, or no memory."""
    return [x.clone() if x is not None and (x.is_neg() or x._is_zerotensor()) else x for x in tensors]


class _Call:
    """What both passes have in common."""

    def __init__(self, inputs: Tensors, given: Given, cell: Sequence[str], min_decay: float, order: Any) -> None:
        (self.cell, self.activation), self.min_decay, (self.reverse, self.time_first) = cell, min_decay, order
        self.start, layout, _ = from_flat(_written(given))
        self.batch_sizes, self.lengths = layout.batch_sizes, layout.lengths
        self.x = [self.flat(x) for x in _written(inputs)]
        if any(x.stride() != self.x[1].stride() for x in self.x[2:]):
            self.x = [x.contiguous() for x in self.x]
        self.num_features = self.x[0].shape[-1]
        if self.batch_sizes is None:
            self.num_sequences, self.num_steps = inputs[0].shape[:2][:: -1 if self.time_first else 1]
        else:
            self.num_sequences, self.num_steps = int(self.batch_sizes[0]), self.batch_sizes.numel()

    def flat(self, x: Tensor) -> Tensor:
        """Return a sequence with contiguous features in one last dimension."""
        x = x.flatten(2 if self.batch_sizes is None else 1)
        return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

    def plan(self, backward: bool) -> Plan:
        x = self.x[0]
        work = Work(
            cell=self.cell,
            itemsize=x.element_size(),
            num_sequences=self.num_sequences,
            num_steps=self.num_steps,
            num_features=self.num_features,
            backward=backward,
            has_reset=self.start.reset is not None,
            is_packed=self.batch_sizes is not None,
            is_timed=self.min_decay != 0 or self.start.dt is not None,
            wave=devices.wave_of(x.device),
            is_amd=devices.is_amd(x.device),
            processors=devices.processors_of(x.device),
        )
        plan = plan_of(work)
        return plan._replace(segments=-(-self.num_steps // self.segment_steps(plan)))

    def segment_steps(self, plan: Plan) -> int:
        """Return the number of steps of a segment, which is a whole number of tiles."""
        tile = plan.chunks * plan.steps
        return -(-self.num_steps // (plan.segments * tile)) * tile

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

    def sequences(self, unit: int, **sequences: Tensor | None) -> dict[str, Any]:
        """Return those sequences that are there, and their strides of batch and time in units, as arguments."""
        found: dict[str, Any] = {}
        for name, x in sequences.items():
            if x is not None:
                leading = (0, x.stride(0)) if self.batch_sizes is not None else x.stride()[:2]
                batch, step = leading[::-1] if self.time_first and self.batch_sizes is None else leading
                found |= {name: x, f"{name}_batch": batch // unit, f"{name}_step": step // unit}
        return found

    def launch(self, name: str, plan: Plan, unit: int, shared: dict[str, Any], whole: dict[str, Any]) -> None:
        """Launch the kernel with arguments `shared` and `whole`. If time is divided into segments, launch it first for
        the segments with `shared` alone."""
        x = self.x[0]
        shared |= {
            **dict(zip(("x0", "x1", "x2"), self.x, strict=False)),
            **self.sequences(unit, x0=x, x1=None if self.x[1].stride() == x.stride() else self.x[1]),
            **self.sequences(1, reset=self.start.reset, dt=self.start.dt),
            **_state("initial_state", self.start.initial_state),
            "bound": _bound(self.min_decay),
            "num_steps": self.num_steps,
            "num_units": self.num_features // unit,
            "num_segments": plan.segments,
            "segment_steps": self.segment_steps(plan),
            "backwards": int(self.reverse != (name == "backward")),
            "CELL": self.cell,
            "ACTIVATION": self.activation,
            "KEEPING": KEEPING[self.cell],
            "V": unit,
            "EVEN": self.num_features % plan.features == 0,
        }
        if self.batch_sizes is not None:
            shared["offsets"], shared["lengths"] = _packing(self.batch_sizes, x)
        elif self.lengths is not None:
            shared["lengths"] = self.lengths
        num_programs = -(-self.num_features // plan.features) * self.num_sequences * plan.segments
        if plan.segments > 1:
            shape = (2, self.num_sequences, plan.segments, self.num_features)
            shared["products"], shared["ends"] = x.new_empty(shape, dtype=accumulate_dtype(x.dtype))
            run(name, num_programs, plan, shared)
        run(name, num_programs, plan, shared | whole)


# For each tensor of batch sizes and device, because a module calls the kernel many times with the same one.
_packings: Any = WeakTensorKeyDictionary()


def _packing(batch_sizes: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the offset of each step in packed data x, and the length of each sequence, on the device of x."""
    kept: dict[Any, tuple[Tensor, Tensor]] = _packings.setdefault(batch_sizes, {})
    key = x.device, x.shape[0]
    if key not in kept:
        # In a compiled graph, no layer has checked them.
        if not is_packing(batch_sizes, x.shape[0]):
            raise ValueError("mingru: batch_sizes must be positive, must not increase, and sum to the packed steps")
        kept[key] = _new_packing(batch_sizes, x.device)
    return kept[key]


def _new_packing(batch_sizes: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    if devices.is_capturing(device):
        raise ValueError(
            "mingru: packed sequences cannot be captured in a CUDA graph, because their batch_sizes are on the CPU; "
            "pass padded sequences and lengths"
        )
    num_steps, num_sequences = batch_sizes.numel(), int(batch_sizes[0])
    offsets = batch_sizes.cumsum(0) - batch_sizes
    # Batch element b has as many steps as there are batch sizes above b.
    elements = torch.arange(num_sequences, device=batch_sizes.device)
    lengths = num_steps - torch.searchsorted(batch_sizes.flip(0), elements, right=True)
    both = torch.cat([offsets, lengths])
    if device.type in devices.DEVICES:
        both = both.pin_memory()
    both = both.to(device, non_blocking=True)
    return both[:num_steps], both[num_steps:]


def _state(name: str, h: Tensor | None) -> dict[str, Any]:
    """Return a state (B, N), or (1, N) for all batch elements, and its stride, as arguments."""
    if h is None:
        return {}
    h = (h[:1] if h.stride(0) == 0 else h).contiguous()
    return {name: h, f"{name}_batch": 0 if h.shape[0] == 1 else h[0].numel()}


def _bound(min_decay: float) -> tuple[float, ...] | None:
    """Return log(m) and log(1 - m) of the lower bound m of the decay, each as a float32 number and the rest."""
    if min_decay == 0:
        return None
    return *_in_float32(math.log(min_decay)), *_in_float32(math.log1p(-min_decay))


def _in_float32(number: float) -> tuple[float, float]:
    # Triton passes numbers as float32, and kernels of float64 need more digits.
    rounded = ctypes.c_float(number).value
    return rounded, number - rounded


def forward(inputs: Tensors, given: Given, cell: Sequence[str], min_decay: float, order: Sequence[bool]) -> States:
    """Return the states of all steps, and the last state.

    `given`: see `call.flattened`. `cell`: name and activation. `order`: reverse, time_first.
    """
    call = _Call(inputs, given, cell, min_decay, order)
    h = call.start.h
    out, last = inputs[0].new_empty(inputs[0].shape), h.new_empty(h.shape)
    flat = call.flat(out)
    unit = call.unit(flat)
    whole = {**call.sequences(unit, out=flat), **_state("h", h), "after": last}
    call.launch("forward", call.plan(backward=False), unit, {}, whole)
    return out, last


def backward(
    inputs: Tensors, given: Given, saved: Tensors, cell: Sequence[str], min_decay: float, flags: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the inputs, side by side, and of h, of the initial state, of dt and of a bias.

    The last three are sums in the accumulation dtype; they are empty if they are not needed. `saved`: out, grad_out,
    grad_last. `flags`: reverse, time_first, needs_dt, needs_bias.
    """
    *order, needs_dt, needs_bias = flags
    call = _Call(inputs, given, cell, min_decay, order)
    if call.start.dt is not None:
        # The kernel writes the gradients of dt with the strides of dt.
        call.start = call.start._replace(dt=call.start.dt.contiguous())
    h, initial_state, dt = call.start.h, call.start.initial_state, call.start.dt
    grads = grads_like(inputs, 2 if call.batch_sizes is None else 1)
    out, grad_out, grad_last = _written(saved)
    out, grad_out = call.flat(out), call.flat(grad_out)
    plan, unit = call.plan(backward=True), call.unit(out, grad_out, grads)
    grad_h = h.new_empty(h.shape)
    whole = {**call.sequences(unit, out=out, grads=grads), **_state("h", h), "after": grad_h}
    whole["grad_last"] = grad_last.contiguous()
    batch, segments, num_features = call.num_sequences, plan.segments, call.num_features
    new = functools.partial(inputs[0].new_empty, dtype=accumulate_dtype(inputs[0].dtype))
    # Sums of the programs of each segment.
    sums: dict[str, Tensor | None] = {
        "grad_initial_state": None if initial_state is None else new((batch, segments, num_features)),
        "grad_dt": None if dt is None or not needs_dt else new((*dt.shape, num_features // unit)),
        "grad_bias": new((batch * segments, len(inputs) * num_features)) if needs_bias else None,
    }
    call.launch("backward", plan, unit, call.sequences(unit, grad_out=grad_out), whole | sums)
    grad_initial_state, grad_dt, grad_bias = (
        new(0) if x is None else _summed(x, dim) for x, dim in zip(sums.values(), (1, -1, 0), strict=True)
    )
    if initial_state is not None:
        grad_initial_state = grad_initial_state.view(h.shape)
    return grads, grad_h, grad_initial_state, grad_dt, grad_bias


def _summed(x: Tensor, dim: int) -> Tensor:
    return x.select(dim, 0) if x.shape[dim] == 1 else x.sum(dim)


def grads_like(inputs: Tensors, num_leading: int) -> Tensor:
    """Return an uninitialized tensor for the gradients of all inputs, side by side, in their memory order."""
    first = inputs[0]
    leading, size = first.shape[:num_leading], len(inputs) * first.shape[num_leading:].numel()
    if is_transposed(first):
        return first.new_empty(leading[1], leading[0], size).transpose(0, 1)
    return first.new_empty(*leading, size)
