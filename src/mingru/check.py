"""Input validation: error messages that name function, argument, expected and actual value, and a fix."""

import functools
import itertools
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .ops.cells import BLOCKS, CELLS, GATES, cells_of, multiple_of
from .ops.graph import are_eager, is_autocast, is_captured, untraced
from .ops.layout import is_packing
from .ops.shape import accumulate_dtype
from .unknown_arguments import LENGTHS_OF_MASK

# Above it, an elapsed time is probably in another unit, such as nanoseconds. Also in csrc/inference.cpp.
MOST_USUAL_TIME = 1e6

EMBED = "embed token ids first (torch.nn.Embedding)"


def name_of(cls: type) -> str:
    """Return the name of a class for errors; that of a class of `drop_in` is not the name of torch's class."""
    package, is_drop_in, _ = cls.__module__.partition(".drop_in.")
    return f"{package}.drop_in.{cls.__name__}" if is_drop_in else cls.__name__


def expectation(name: str, argument: str, expected: str, got: str, remedy: str = "") -> str:
    """Return an error message: what the argument must be, what was passed, and the fix."""
    return f"{name}: {argument} must be {expected}, got {got}" + (f"; {remedy}" if remedy else "")


@contextmanager
def reworded(kinds: dict[type[Exception], type[Exception]], names: dict[str, str]) -> Iterator[None]:
    """Raise errors of the block as other kinds, and with other names of arguments."""
    try:
        yield
    except tuple(kinds) as error:
        text = str(error)
        for name, other in names.items():
            text = text.replace(name, other)
        raise kinds.get(type(error), type(error))(text) from None


def require(
    name: str, argument: str, ok: bool, expected: str, got: str, remedy: str = "", error: type[Exception] = ValueError
) -> None:
    """Raise an error if an argument is wrong. Not for `forward`, because the texts of sizes add guards to graphs."""
    if not ok:
        raise error(expectation(name, argument, expected, got, remedy))


def check_type(name: str, argument: str, value: object, types: Any, expected: str, remedy: str = "") -> None:
    if not isinstance(value, types):
        got = name_of(type(value))
        # A class of another module may have the name that is expected.
        got = f"{type(value).__module__}.{got}" if got in expected.replace(".", " ").split() else got
        raise TypeError(expectation(name, argument, expected, got, remedy))


def dims(shape: tuple[int, ...]) -> str:
    return str(tuple(shape))


def not_a_tensor(name: str, argument: str, found: Any, expected: str = "a tensor") -> TypeError:
    remedy, got = "" if found is None or isinstance(found, str) else "use torch.as_tensor", type(found).__name__
    if type(found) in (list, tuple) and any(isinstance(each, Tensor) for each in found):
        remedy = f"use torch.{'nn.utils.rnn.pad_sequence and lengths=' if argument == 'x' else 'cat'}, or torch.stack"
    if isinstance(found, PackedSequence):
        remedy = "use torch.nn.utils.rnn.pad_packed_sequence, and lengths="
    if isinstance(found, Tensor):
        got = "a nested tensor" if found.is_nested else f"a tensor with the layout {found.layout}"
        remedy = "use torch.nested.to_padded_tensor, and lengths=" if found.is_nested else f"use {argument}.to_dense()"
    return TypeError(expectation(name, argument, expected, got, remedy))


def on_another_device(name: str, argument: str, x: Tensor, device: torch.device, like_name: str) -> ValueError:
    remedy = f"use {argument}.to({str(device)!r})"
    return ValueError(expectation(name, argument, f"on {device} like {like_name}", f"a tensor on {x.device}", remedy))


def of_another_shape(name: str, argument: str, x: Tensor, letters: str, shape: tuple[int, ...]) -> ValueError:
    remedy = unsqueeze_remedy(argument, x, shape)
    return ValueError(expectation(name, argument, f"{letters} = {dims(shape)}", dims(x.shape), remedy))


def unsqueeze_remedy(argument: str, x: Tensor, shape: tuple[int, ...]) -> str:
    """Return the fix for a tensor that lacks one dimension of size 1 of this shape; otherwise ""."""
    missing = (dim for dim, size in enumerate(shape) if size == 1 and x.shape == (*shape[:dim], *shape[dim + 1 :]))
    return next((f"use {argument}.unsqueeze({dim})" for dim in missing), "")


def check_flag(name: str, argument: str, flag: object, remedy: str = "") -> None:
    if not isinstance(flag, bool):
        raise TypeError(expectation(name, argument, "a bool", repr(flag), remedy))


def check_residual(name: str, residual: object, input_dims: int, hidden_dims: int, bidirectional: bool) -> None:
    if residual != "highway":
        return
    remedy = "use a layer for each direction"
    require(name, "bidirectional", not bidirectional, "False because residual is 'highway'", "True", remedy)
    expected = f"{input_dims} like input_dims because residual is 'highway'"
    remedy = "change the size of x by a torch.nn.Linear before"
    require(name, "hidden_dims", hidden_dims == input_dims, expected, str(hidden_dims), remedy)


def check_int(name: str, argument: str, size: Any, expected: str = "an int", least: int = 1) -> None:
    if not isinstance(size, int) or isinstance(size, bool):
        remedy = "for layers of different sizes, use mingru.Stack" if isinstance(size, (list, tuple)) else ""
        raise TypeError(expectation(name, argument, expected, repr(size), remedy))
    if size < least:
        raise ValueError(expectation(name, argument, f"at least {least}", str(size)))


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_number(name: str, argument: str, value: Any, expected: str, is_valid: Callable[[float], bool]) -> None:
    if not (is_number(value) and is_valid(value)):
        raise (ValueError if is_number(value) else TypeError)(expectation(name, argument, expected, repr(value)))


def check_dropout(name: str, dropout: float, num_layers: int) -> None:
    check_number(name, "dropout", dropout, "a number from 0 to 1", lambda p: 0 <= p <= 1)
    if dropout > 0 and num_layers == 1:
        why = "because it is not applied to the last layer's output; add layers or set dropout to 0"
        text = f"{name}: dropout={dropout} has no effect on one layer, {why}"
        warnings.warn(text, stacklevel=_level_of_the_caller())


def _level_of_the_caller() -> int:
    """Return the `stacklevel` of the innermost frame outside of this package, and of torch, which calls modules."""
    packages = (__name__.partition(".")[0], "torch")
    frames = (frame for frame, _ in traceback.walk_stack(sys._getframe(1)))
    inner = itertools.takewhile(lambda each: each.f_globals.get("__name__", "").partition(".")[0] in packages, frames)
    return 1 + sum(1 for _ in inner)


def check_device(name: str, device: object) -> None:
    """Raise the type of torch's error if this is the name of no device."""
    try:
        torch.device(device) if isinstance(device, str) else None
    except RuntimeError:
        expected, remedy = "a device of torch", "the devices are 'cpu', 'cuda' (also of AMD), 'mps', 'xpu' and others"
        raise RuntimeError(expectation(name, "device", expected, repr(device), remedy)) from None


def check_choice(name: str, argument: str, value: object, choices: Collection[str]) -> None:
    # Not by comparison with values of other types: an array would compare its elements.
    if not (isinstance(value, str) and value in choices):
        raise ValueError(expectation(name, argument, f"one of {tuple(choices)}", repr(value)))


def check_parts(name: str, argument: str, size: int, gate: str) -> None:
    """Check that the gate can divide this number of features into numbers."""
    count = multiple_of(GATES[gate])
    if size % count:
        cells = cells_of(GATES[gate])
        condition = "even" if count == 2 else f"divisible by {count}"
        groups = "pairs of features" if count == 2 else f"groups of {count // len(cells)} features"
        groups += " in one half" if len(cells) > 1 else ""
        raise ValueError(expectation(name, argument, f"{condition} because gate={gate!r} turns {groups}", str(size)))


def per_layer(
    name: str, argument: str, value: Any, num_layers: int, kinds: Any = (list, tuple), remedy: str = ""
) -> list[Any]:
    """Return the value for each layer, from one value or a list."""
    expected = f"one value, or a list of {num_layers}, one for each layer"
    if hasattr(value, "tolist") and not isinstance(value, str):
        raise TypeError(expectation(name, argument, expected, repr(value), f"use {argument}.tolist()"))
    if not isinstance(value, kinds):
        return [value] * num_layers
    require(name, argument, len(value) == num_layers, expected, repr(value), remedy)
    return list(value)


def check_min_decay(name: str, min_decay: Any, gates: Sequence[str]) -> list[float]:
    """Return the lower bound of each layer."""
    bounds = per_layer(name, "min_decay", min_decay, len(gates))
    for bound, gate in zip(bounds, gates, strict=True):
        check_number(name, "min_decay", bound, "a number from 0 to 1 (exclusive)", lambda number: 0 <= number < 1)
        expected = "0 because a decay with a lower bound cannot change its sign and gate is 'signed'"
        require(name, "min_decay", not bound or gate != "signed", expected, repr(min_decay))
    return [float(bound) for bound in bounds]


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
    warnings.warn(f"{name}: dt is {problem}", RuntimeWarning, stacklevel=_level_of_the_caller())


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


@untraced
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
