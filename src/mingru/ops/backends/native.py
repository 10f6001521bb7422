"""The `"native"` backend: C++ kernels for the CPU (`csrc/`), vectorized over features.

Importing this module registers the operators with PyTorch's dispatcher. They take states in the accumulation dtype.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backend import Backend, Given, Gradients, Kernel, grads_of_context
from ..call import FIRST_INPUT, Spec
from ..cells import MIXTURES
from ..layout import is_transposed
from ..names_of_torch import MARKED_CONSTANT, get_fp32_precision
from ..shape import States, as_dtype
from .sources import number_in, number_of_sources

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
_HALVES = (torch.bfloat16, torch.float16)
_PRODUCTS = ("mingru", "torch")
_ORDER = [f"has_{name}" for name in ("reset", "dt", "recurrent", "recurrent_bias", "batch_sizes", "lengths")]
_ORDER += ["reverse", "time_first", "keep", "rms_norm", "layer_norm", "output_gate", "keep_states"]
_ORDER += [f"needs_{name}" for name in ("dt", "recurrent", "x", "weight", "bias")] + ["bfloat16_products"]


def _load() -> str | None:
    """Register the operators; return None, or the reason why they are missing."""
    product = os.environ.get("MINGRU_PRODUCT") or "mingru"  # csrc/driver.cpp reads it
    if product not in _PRODUCTS:
        raise ValueError(f"the environment variable MINGRU_PRODUCT must be unset or in {_PRODUCTS}, got {product!r}")
    folder = Path(__file__).parents[2]
    libraries = [path for path in (folder / "_kernels.so", folder / "_kernels.dll") if path.is_file()]
    if not libraries:
        return "the compiled kernels were not built; reinstall with a C++17 compiler on the PATH"
    # In a clone, the sources may change after the library was built. Elsewhere, both were installed together.
    # Before the file is loaded, because a part of it would end the process.
    built_from, root = number_in(libraries[0]), folder.parents[1]
    is_clone = (root / "csrc").is_dir()
    if built_from is None or (is_clone and built_from != number_of_sources(root)):
        again = "build them again with 'pip install -e .'" if is_clone else "reinstall"
        return f"the compiled kernels were built from other sources, or their file is damaged; {again}"
    try:
        torch.ops.load_library(libraries[0])  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the compiled kernels cannot be loaded ({error}); reinstall for this version of torch"
    here, wanted = tuple(torch.ops.mingru.instruction_sets().split()), os.environ.get("MINGRU_ISA")
    if not here:
        return "the compiled kernels need AVX2, which this processor does not have"
    if wanted and wanted not in here:  # csrc/driver.cpp reads it too
        own = "an instruction set of the compiled kernels and of this processor"
        raise ValueError(f"the environment variable MINGRU_ISA must be unset or {own}, in {here}, got {wanted!r}")
    return None


def _register_shapes() -> None:
    """Register functions that return the shapes of the outputs, for graphs that are captured without data."""

    def flag(bits: int, name: str) -> bool:
        return bits & FLAGS[name] != 0

    def rows_of(x: Tensor, weight: Tensor | None) -> int:
        return x.shape[-1] if weight is None else weight.shape[0]

    def of_context(call: list[Tensor], bits: int) -> list[Tensor]:
        h, has_reset = call[0], flag(bits, "has_reset")
        # Each cell of a mixture has its own groups.
        count = 2 if bits & 0xFF in map(CELL_NUMBERS.get, MIXTURES) else 1
        num_groups = count * ((h.shape[2:].numel() // count + _GROUP - 1) // _GROUP)
        shapes = [h.shape] * (1 + has_reset)
        if flag(bits, "has_dt") and flag(bits, "needs_dt"):
            # The elapsed times come after two states and the resets.
            shapes.append(torch.Size((*call[2 + has_reset].shape, num_groups)))
        if flag(bits, "has_recurrent") and flag(bits, "needs_recurrent"):
            # The weights come after the elapsed times.
            shapes += [call[2 + has_reset + flag(bits, "has_dt")].shape, h.shape[-1:]]
        return [h.new_empty(shape) for shape in shapes]

    def recurrence_forward(inputs: list[Tensor], call: list[Tensor], bits: int, min_decay: float) -> States:
        return inputs[0].new_empty(inputs[0].shape), call[0].new_empty(call[0].shape)

    def recurrence_backward(inputs: list[Tensor], call: list[Tensor], out: Tensor, *rest: Any) -> list[Tensor]:
        num_leading = 1 if flag(rest[2], "has_batch_sizes") else 2
        num_grads = len(inputs) * out.shape[num_leading:].numel()
        return [*of_context(call, rest[2]), out.new_empty(*out.shape[:num_leading], num_grads)]

    def linear_recurrence_forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, call: list[Tensor], bits: int, *numbers: float
    ) -> tuple[Tensor, ...]:
        h, *leading = call[0], *x.shape[:-1]
        # No captured graph has lengths, which would make the number of rows depend on data.
        num_kept = math.prod(leading) if flag(bits, "keep") else 0
        num_sums = h.shape[-1] if flag(bits, "has_recurrent") else 0
        out, kept = x.new_empty(*leading, h.shape[-1]), x.new_empty(num_kept, rows_of(x, weight) + num_sums)
        return out, h.new_empty(h.shape), kept, x.new_empty(out.shape if flag(bits, "keep_states") else 0)

    def linear_recurrence_backward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, call: list[Tensor], *rest: Any
    ) -> list[Tensor]:
        bits, grads = rest[4], of_context(call, rest[4])
        if flag(bits, "needs_x"):
            order = (0, 1) if is_transposed(x) else (0, 0)
            grads.append(x.new_empty(x.transpose(*order).shape).transpose(*order))
        if flag(bits, "needs_weight"):
            grads.append(x.new_empty(rows_of(x, weight), x.shape[-1]))
        return [*grads, x.new_empty(rows_of(x, weight))] if flag(bits, "needs_bias") else grads

    def causal_conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, call: list[Tensor], *rest: Any) -> States:
        return x.new_empty(x.shape), call[0].new_empty(call[0].shape)

    def causal_conv_backward(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return tuple(x.new_empty(shape) for shape in (x.shape, weight.shape, weight.shape[1:], rest[1][0].shape))

    own = recurrence_forward, recurrence_backward, causal_conv_forward, causal_conv_backward
    for shapes in (*own, linear_recurrence_forward, linear_recurrence_backward):
        torch.library.register_fake(f"mingru::{shapes.__name__}", shapes)


_WHY_NOT = _load()
# The numbers of cells and activations, of the flags of a call, and of the instructions of an inference pass: empty
# without the kernels. The `group` of csrc/scan.h, and the `first_flag` of csrc/call.h.
*_listed, _group, _first_flag, _ = (torch.ops.mingru.names() if _WHY_NOT is None else "||||1|0|").split("|")
CELL_NUMBERS, _activations, _flags, INSTRUCTION_NUMBERS = (
    {name: number for number, name in enumerate(names.split())} for names in _listed
)
_GROUP, _FIRST_FLAG = int(_group), int(_first_flag)
ISA = os.environ.get("MINGRU_ISA") or ("" if _WHY_NOT else torch.ops.mingru.instruction_sets().split()[-1])
if _WHY_NOT is None:
    # In this order, `arguments` numbers them.
    assert [*_flags] == _ORDER, "the flags of csrc/call.h have another order"
    _register_shapes()
FLAGS = {name: 1 << _FIRST_FLAG + number for name, number in _flags.items()}
# Of a cell with its activation.
NUMBERS = {(cell, name): n | m << 8 for cell, n in CELL_NUMBERS.items() for name, m in _activations.items()}


# Blocks of fewer features have no products of bfloat16: `least_rounded` of csrc/recurrent_weights.h.
LEAST_ROUNDED = 32
# Instruction sets that multiply bfloat16.
HAS_BFLOAT16 = ISA in ("amx", "avx512_bf16", "emulated")


def rounds_products(dtype: torch.dtype) -> bool:
    """Return whether the products of recurrent weights round their operands to bfloat16.

    They do in sequences of bfloat16, as under autocast, and in float32 if the settings of oneDNN, for products or for
    recurrent layers, allow it, as `torch.set_float32_matmul_precision("medium")` does.
    """
    if not HAS_BFLOAT16 or dtype == torch.float64:
        return False
    rounded = get_fp32_precision("mkldnn", "matmul"), get_fp32_precision("mkldnn", "rnn")
    return dtype == torch.bfloat16 or (dtype == torch.float32 and "bf16" in rounded)


vars(rounds_products)[MARKED_CONSTANT] = True


def is_slower(features: int, batch: int, steps: int, dtype: torch.dtype, with_gradients: bool) -> bool:
    """Return whether a GRU of one block takes longer than `torch.gru`: for few steps.

    What comes before the steps, such as copies of large matrices, takes longer than the steps save. From 3,000 random
    sizes with one thread and AVX-512 or AVX2, on an AMD and, by MKL's choice of kernels, as on an Intel.
    """
    least = 20 if dtype == torch.float64 else 6 if with_gradients else 10
    return steps < least * (4 if batch == 1 and features >= 256 and not with_gradients else 2 if features >= 128 else 1)


def is_slower_in_bfloat16(cell: str, features: int, steps: int) -> bool:
    """Return whether a GRU or an LSTM of one block takes longer than torch's in bfloat16: narrow or short ones."""
    least = 2 if cell == "lstm" and ISA == "avx512_bf16" else 1
    return features < least * LEAST_ROUNDED or steps < 10


def is_slower_lstm(x: Tensor, features: int, batch: int, steps: int, is_fused: bool, with_gradients: bool) -> bool:
    """Return whether an LSTM takes longer than `torch.lstm`, which `is_fused` if oneDNN computes it.

    In float64, torch's products of many rows are faster, and without gradients few steps, as of a GRU. oneDNN is about
    as fast without AVX-512; in training, it is faster until the memory that it asks for is so large that the system
    gives new pages in each call. Its backward always computes the gradient of x, so the kernel gains less if x needs
    one. Without gradients, oneDNN is slower if it copies large weights for few sequences. From random sizes, with one
    thread and AVX-512 on an Intel (`python benchmarks/speed.py --rules 600`).
    """
    if not is_fused:
        most, is_few = (128 if with_gradients else 64) * min(steps, 64), steps < 10
        if x.dtype == torch.float64:
            is_few = is_few or (features >= 64 and batch * features > most)
            return is_few or (not with_gradients and is_slower(features, batch, steps, x.dtype, False))
        return is_few or (features < 4 and not with_gradients)
    inputs = x.size(-1)
    is_faster = inputs >= max(128, 2 * features)
    if with_gradients:
        is_faster = is_faster and not x.requires_grad
        is_faster = is_faster or (batch <= 4 and inputs >= 8) or batch * steps * features >= 3 * 2**18
    else:
        is_faster = is_faster and batch <= 16 and inputs * features >= 2**13 * max(batch, 4)
        is_faster = is_faster or (batch == 1 and 48 <= features < 192)
    return ISA not in ("avx512", "avx512_bf16", "amx") or steps < 40 or not is_faster


def _unsupported(sequence: Tensor, spec: Spec) -> str | None:
    if not sequence.is_cpu:
        return f"it only runs on the CPU, and the tensors are on {sequence.device}"
    if sequence.dtype not in _DTYPES:
        return f"it does not support {sequence.dtype}"
    if spec.cell not in CELL_NUMBERS and _WHY_NOT is None:
        return f"it has no kernel for the cell {spec.cell!r}"
    return None


def arguments(
    spec: Spec, given: Given, time_first: bool, keep: bool | None = None, needs: Sequence[bool] = ()
) -> tuple[list[Tensor], int, float]:
    """Return a call as all operators take it: its tensors, numbers and flags in one number, and `min_decay`.

    `given`: the tensors, with None for those that are absent, and the inputs. `needs` says whether dt, the recurrent
    weights, x, weight and bias need a gradient. See csrc/call.h.
    """
    h, initial_state, reset, dt, recurrent, recurrent_bias, *of_layout = given[:FIRST_INPUT]
    dtype = given[FIRST_INPUT].dtype
    dtype = torch.float32 if dtype in _HALVES else dtype
    h = h if h.dtype == dtype else h.to(dtype)
    if recurrent is not None:
        recurrent = recurrent.to(dtype).contiguous()
    if recurrent_bias is not None:
        recurrent_bias = recurrent_bias.to(dtype).contiguous()
    tensors = [h, h if reset is None else as_dtype(initial_state.expand_as(h), dtype)]
    bits, optional = NUMBERS[spec[:2]], (reset, dt, recurrent, recurrent_bias, *of_layout)
    for bit, x in enumerate(optional, _FIRST_FLAG):
        if x is not None:
            bits |= 1 << bit
            tensors.append(x)
    more = spec.norm == "rms", spec.norm == "layer", spec.output_gate, spec.output_gate and keep is not None
    if recurrent is not None and rounds_products(given[FIRST_INPUT].dtype):
        bits |= FLAGS["bfloat16_products"]
    for bit, flag in enumerate((spec.reverse, time_first, keep, *more, *needs), _FIRST_FLAG + len(optional)):
        # A branch, because `keep` is symbolic in a graph of any number of features.
        if flag:
            bits |= 1 << bit
    return tensors, bits, spec.min_decay


def _forward(spec: Spec, given: Given, time_first: bool, keep: bool | None) -> tuple[Any, ...]:
    out, last = torch.ops.mingru.recurrence_forward([*given[FIRST_INPUT:]], *arguments(spec, given, time_first))
    return out, last if last.dtype == given[0].dtype else last.to(given[0].dtype), None


def _backward(spec: Spec, given: Given, time_first: bool, saved: Given, needs: Sequence[bool]) -> Gradients:
    inputs, needs_dt, (states, _, grad_out, grad_last) = [*given[FIRST_INPUT:]], needs[3], saved
    tensors, bits, min_decay = arguments(spec, given, time_first, None, [needs_dt])
    rest = grad_out, as_dtype(grad_last, tensors[0].dtype), bits, min_decay
    *found, grads = torch.ops.mingru.recurrence_backward(inputs, tensors, states, *rest)
    parts = map(Tensor.view_as, grads.chunk(len(inputs), -1), inputs)
    *of_states, of_dt = _in_places(found, True, given[2] is not None, needs_dt)
    return *grads_of_context(given, of_states, None if of_dt is None else of_dt.sum(-1)), *parts


def _linear_forward(spec: Spec, given: Given, time_first: bool, keep: bool | None) -> tuple[Any, ...]:
    all_of = *given[FIRST_INPUT:], *arguments(spec, given, time_first, keep), spec.eps
    out, last, kept, states = torch.ops.mingru.linear_recurrence_forward(*all_of)
    return out, as_dtype(last, given[0].dtype), kept, *([states] if spec.output_gate else [])


def _linear_backward(spec: Spec, given: Given, time_first: bool, saved: Given, needs: Sequence[bool]) -> Gradients:
    wanted = [needs[3], needs[4] or needs[5], *needs[FIRST_INPUT:]]
    tensors, bits, min_decay = arguments(spec, given, time_first, None, wanted)
    states, kept, grad_out, grad_last = saved
    all_of = *given[FIRST_INPUT:], tensors, states, kept, grad_out, as_dtype(grad_last, tensors[0].dtype)
    found = torch.ops.mingru.linear_recurrence_backward(*all_of, bits, min_decay, spec.eps)
    has = True, given[2] is not None, needs[3], *[wanted[1]] * 2, *needs[FIRST_INPUT:]
    of_h, of_initial, of_dt, of_recurrent, of_bias, *of_map = _in_places(found, *has)
    of_context = grads_of_context(given, (of_h, of_initial), None if of_dt is None else of_dt.sum(-1))
    grads = *of_context[:4], of_recurrent, of_bias, *of_context[6:], *of_map
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def _in_places(found: list[Tensor], *has: bool) -> list[Tensor | None]:
    """Return the gradients that an operator has found, with None in the places of those that it has not."""
    rest = iter(found)
    return [next(rest) if each else None for each in has]


_CELLS = [cell for cell in CELL_NUMBERS if cell not in (*MIXTURES, "gru", "lstm")]
# Of a `Spec`, what these kernels compute and others don't.
_FIELDS = FLAGS.keys() & Spec._fields
_ALL = dict.fromkeys(("packed", "lengths", "whole"), True)
BACKEND = Backend(
    unavailable=lambda: _WHY_NOT,
    unsupported=_unsupported,
    kernel=Kernel(_forward, _backward, packed=True, cells=_CELLS, flags=_FIELDS),
    linear_kernel=Kernel(_linear_forward, _linear_backward, **_ALL, cells=CELL_NUMBERS, flags=_FIELDS),
)
