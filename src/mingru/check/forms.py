"""Checks of the tensors of a call."""

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.cells import BLOCKS, CELLS
from ..ops.graph import are_eager, is_autocast, is_captured
from ..ops.layout import is_packing
from ..ops.shape import accumulate_dtype
from .messages import (
    check_type,
    dims,
    expectation,
    level_of_the_caller,
    not_a_tensor,
    of_another_shape,
    on_another_device,
    require,
    unsqueeze_remedy,
)
from .names import LENGTHS_OF_MASK

# Above it, an elapsed time is probably in another unit, such as nanoseconds. Also in csrc/inference.cpp.
MOST_USUAL_TIME = 1e6

EMBED = "embed token ids first (torch.nn.Embedding)"


def check_tensor(
    name: str, argument: str, x: Tensor, like: Tensor, like_name: str, shape: tuple[int, ...] | None = None
) -> None:
    """Check that x is a tensor of this shape, or the shape of `like`, with the dtype and the device of `like`."""
    check_like(name, argument, x, like, like_name)
    shape = like.shape if shape is None else shape
    if x.shape != shape:
        expected = f"{dims(shape)} because {like_name} is {dims(like.shape)}"
        remedy = f"to broadcast, use {argument}.expand, which copies nothing"
        if x.shape[:-1] == like.shape == shape:
            remedy = f"use {like_name}.unsqueeze(-1).expand_as({argument})"
        raise ValueError(expectation(name, argument, expected, dims(x.shape), remedy))


def check_like(
    name: str, argument: str, x: Tensor, like: Tensor, like_name: str, others: Sequence[Any] = (), ids: bool = False
) -> None:
    """Check that x is a tensor with the device of `like`, and with its dtype or one of the others.

    With `ids`, the error for integers says that token ids must be embedded.
    """
    if not isinstance(x, Tensor):
        raise not_a_tensor(name, argument, x)
    if x.dtype not in (like.dtype, *others):
        expected = f"{like.dtype} like {like_name}"
        remedy = f"use {argument}.to({like.dtype})"
        if ids and embed_remedy(x):
            remedy = f"{EMBED}, or {remedy} for numbers"
        if argument == "h":
            remedy = mask_remedy(x) or remedy
        raise TypeError(expectation(name, argument, expected, str(x.dtype), remedy))
    if x.device != like.device:
        raise on_another_device(name, argument, x, like.device, like_name)


def check_input(name: str, x: Tensor, weight: Tensor, like_name: str) -> None:
    """Check that x has the device of the weight, and its dtype unless autocast converts it."""
    check_like(name, "x", x, weight, like_name, autocast_dtypes(weight), ids=True)


def check_kind(name: str, argument: str, x: Tensor, like: Tensor, like_name: str = "x") -> None:
    """Check that x, a state or a time, has the device of a sequence, and its dtype or its accumulation dtype."""
    if not (isinstance(x, Tensor) and x.dtype == like.dtype and x.device == like.device):
        check_like(name, argument, x, like, like_name, (accumulate_dtype(like.dtype), *autocast_dtypes(like)))


def autocast_dtypes(like: Tensor) -> tuple[torch.dtype, ...]:
    """Return the dtypes that autocast converts, if it is enabled."""
    return (torch.float32, torch.bfloat16, torch.float16) if is_autocast(like) else ()


def mask_remedy(h: Any) -> str:
    """Return the fix for a mask, or lengths, in place of a state; otherwise ""."""
    dtype = h.dtype if isinstance(h, Tensor) else None
    if dtype == torch.bool:
        return f"pass the starts of episodes as reset=; a layer takes a padding mask as {LENGTHS_OF_MASK}"
    return "a layer takes lengths as lengths=" if dtype == torch.int64 and h.dim() == 1 else ""


def embed_remedy(x: Tensor) -> str:
    """Return the fix for token ids, if x has a dtype that an embedding accepts; otherwise ""."""
    return EMBED if x.dtype in (torch.int64, torch.int32) else ""


def check_list(name: str, argument: str, values: Any, count: int, expected: str, remedy: str = "") -> None:
    """Check that values are a list or a tuple of so many."""
    of_mask = mask_remedy(values) if argument == "h" else ""
    check_type(name, argument, values, (list, tuple), expected, of_mask or remedy)
    require(name, argument, len(values) == count, expected, str(len(values)), remedy)


def check_one_state(name: str, h: object, letters: str, cell: str = "mingru") -> None:
    """Check that h is neither a list of states nor the pair (h, c) of an LSTM."""
    if isinstance(h, (list, tuple)):
        layer, end = ("minLSTM", ", without a cell state") if cell.startswith("minlstm") else ("minGRU", "")
        layer = "BlockGRU" if cell == BLOCKS else layer
        if isinstance(h, list) and letters.startswith("(L"):
            end += "; torch.cat joins a list with a state of each layer"
        remedy = f"a {layer}'s state is one tensor h, {letters}{end}"
        raise TypeError(expectation(name, "h", "a tensor", type(h).__name__, remedy))


def check_state(name: str, argument: str, h: Tensor, sequence: Tensor) -> Tensor:
    """Return h expanded to the state (B, 1, *) of a sequence (B, S, *)."""
    check_kind(name, argument, h, sequence, "the sequence")
    remedy = "(S, H) without a batch is read as (B, S); pass (1, S, H)" if sequence.dim() == 2 and h.dim() == 1 else ""
    return expanded(name, argument, h, (sequence.shape[0], 1, *sequence.shape[2:]), "(B, 1, *)", remedy)


def expanded(name: str, argument: str, h: Tensor, shape: tuple[int, ...], letters: str, remedy: str = "") -> Tensor:
    try:
        return h.expand(shape)
    except RuntimeError:
        expected = f"expandable to {letters} = {dims(shape)}"
        remedy = remedy or unsqueeze_remedy(argument, h, shape)
        raise ValueError(expectation(name, argument, expected, dims(h.shape), remedy)) from None


def check_reset(name: str, reset: Tensor | None, sequence: Tensor, letters: str) -> None:
    if reset is None:
        return
    if not isinstance(reset, Tensor):
        raise not_a_tensor(name, "reset", reset, "a bool tensor")
    if reset.dtype != torch.bool:
        raise TypeError(expectation(name, "reset", "of dtype torch.bool", str(reset.dtype), "use reset.bool()"))
    if reset.shape != sequence.shape[:2]:
        raise of_another_shape(name, "reset", reset, letters, sequence.shape[:2])
    if reset.device != sequence.device:
        raise on_another_device(name, "reset", reset, sequence.device, "the sequence")


def check_dt(name: str, dt: Tensor, sequence: Tensor, cell: str, letters: str, like_name: str = "x") -> None:
    """Check the elapsed times of a sequence. Negative times and NaN are only found in eager mode on the CPU."""
    why_not = CELLS[cell].not_timed
    require(name, "dt", why_not is None, f"None because {why_not}", type(dt).__name__)
    check_kind(name, "dt", dt, sequence, like_name)
    if dt.shape != sequence.shape[:2]:
        raise of_another_shape(name, "dt", dt, letters, sequence.shape[:2])
    # On a GPU, the test would synchronize.
    if dt.is_cpu and are_eager(dt) and dt.numel() > 0:
        least, most = (time.item() for time in torch.aminmax(dt))
        if not least >= 0:
            raise ValueError(expectation(name, "dt", "at least 0", str(dt[~(dt >= 0)][0].item())))
        time = letters.find("S") // 3
        num_steps = dt.shape[time] if dt.dim() == 2 else 1
        is_new = name not in _WITH_LONG_SEQUENCES and num_steps > LEAST_INCREASES
        # Two events of a stream may have one time.
        if is_new or most > MOST_USUAL_TIME or (most == 0 and num_steps > 1):
            _check_times(name, dt, time if is_new else None, most)


# Gaps of so many steps in a row do not increase by chance.
LEAST_INCREASES = 7

# What has been called with more steps. Only the first such call tests for increases, which takes time.
_WITH_LONG_SEQUENCES: set[str] = set()


def _check_times(name: str, dt: Tensor, time: int | None, most: float) -> None:
    """Warn once of elapsed times that look like a mistake; `most` is the largest, `time` the dimension of time."""
    if most == 0:
        _warn_once(name, "0 at all steps, which ignores x; pass the time between two steps")
    elif MOST_USUAL_TIME < dt[dt > 0].min() < math.inf:
        _warn_once(name, f"above {MOST_USUAL_TIME:g} at all steps, which erases the state; divide dt by a typical gap")
    elif time is not None:
        increases, later = dt.diff(dim=time) > 0, dt.narrow(time, 1, dt.shape[time] - 1)
        # 0 is padding.
        if increases.sum() >= LEAST_INCREASES and (increases | (later == 0)).all():
            _warn_once(name, "increasing at all steps, as times are; use mingru.functional.elapsed_times")
    if time is not None:
        _WITH_LONG_SEQUENCES.add(name)


@functools.cache
def _warn_once(name: str, problem: str) -> None:
    warnings.warn(f"{name}: dt is {problem}", RuntimeWarning, stacklevel=level_of_the_caller())


def check_steps(
    name: str, x: Tensor, letters: str, cell: str, reset: Any, dt: Any, like_name: str = "x", lengths: Any = None
) -> None:
    """Check the resets and the elapsed times of the steps of a sequence, and its lengths."""
    check_reset(name, reset, x, letters)
    if dt is not None:
        check_dt(name, dt, x, cell, letters, like_name)
    if lengths is not None:
        batch, steps = x.shape[:2] if letters == "(B, S)" else (x.shape[1], x.shape[0])
        check_lengths(name, lengths, batch, steps, x.device)


def check_parameter(name: str, argument: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Check the shape and dtype of a parameter that a caller may have replaced, and that operations would convert."""
    if x.shape != shape:
        remedy = f"to broadcast, expand it to {dims(shape)}; for other sizes, construct a layer"
        raise ValueError(expectation(name, argument, dims(shape), dims(x.shape), remedy))
    if not x.is_floating_point():
        raise TypeError(expectation(name, argument, "of a floating-point dtype", str(x.dtype)))


def check_packing(name: str, x: Any) -> None:
    """Check the sizes of a PackedSequence, by which kernels read and write memory."""
    _, batch_sizes, *orders = x
    if not are_eager(batch_sizes):
        return  # A graph has no values.
    if not is_packing(batch_sizes, x.data.shape[0]):
        expected = f"packed with batch_sizes that are positive, do not increase and sum to {x.data.shape[0]}"
        raise ValueError(expectation(name, "x", expected, str(batch_sizes.tolist()), "use pack_padded_sequence"))
    count = int(batch_sizes[0])
    for order in orders:
        if order is not None and order.numel() != count:
            expected = f"packed with one index in its order for each of {count} sequences"
            raise ValueError(expectation(name, "x", expected, str(order.numel()), "use pack_padded_sequence"))


def check_integers(name: str, lengths: Tensor, letters: str) -> None:
    if not isinstance(lengths, Tensor):
        raise not_a_tensor(name, "lengths", lengths, f"an integer tensor {letters}")
    if lengths.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        remedy = f"use {LENGTHS_OF_MASK}" if lengths.dtype == torch.bool else "use lengths.long()"
        raise TypeError(expectation(name, "lengths", "of an integer dtype", str(lengths.dtype), remedy))


def check_lengths(name: str, lengths: Tensor, batch: int, steps: int, device: torch.device) -> None:
    check_integers(name, lengths, "(B,)")
    if lengths.shape != (batch,):
        raise of_another_shape(name, "lengths", lengths, "(B,)", (batch,))
    if lengths.device.type != "cpu" and lengths.device != device:
        expected = f"on the CPU or on {device} like x"
        raise ValueError(expectation(name, "lengths", expected, f"a tensor on {lengths.device}", "use lengths.cpu()"))
    if is_captured() or not lengths.is_cpu:
        return  # A graph has no values, and a GPU would be waited for.
    least, most = (length.item() for length in torch.aminmax(lengths)) if batch else (0, 0)
    if least < 0 or most > steps:
        raise ValueError(expectation(name, "lengths", f"from 0 to S = {steps}", str(lengths.tolist())))
