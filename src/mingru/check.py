"""The sentences in which bad input is refused: function, argument, what was expected, what came, and the remedy."""

import warnings
from collections.abc import Collection

import torch
from torch import Tensor

from .ops.activation import ACTIVATIONS
from .ops.shape import accumulate_dtype


def expectation(name: str, argument: str, expected: str, got: str, remedy: str = "") -> str:
    return f"{name}: {argument} must be {expected}, got {got}" + (f"; {remedy}" if remedy else "")


def dims(shape: torch.Size | tuple[int, ...]) -> str:
    return str(tuple(shape))


def check_int(name: str, argument: str, size: object, expected: str = "an int", least: int = 1) -> None:
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(expectation(name, argument, expected, repr(size)))
    if size < least:
        raise ValueError(expectation(name, argument, f"at least {least}", str(size)))


def check_dropout(name: str, dropout: float, num_layers: int) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(expectation(name, "dropout", "a number from 0 to 1", repr(dropout)))
    if not 0 <= dropout <= 1:
        raise ValueError(expectation(name, "dropout", "a number from 0 to 1", repr(dropout)))
    if dropout > 0 and num_layers == 1:
        warnings.warn(
            f"{name}: dropout={dropout} has no effect on one layer, as the last layer's output is never dropped; add "
            "layers or set dropout to 0",
            stacklevel=3,
        )


def check_options(name: str, norm: str | None, norms: Collection[str], candidate: str, dtype: object) -> None:
    if norm is not None and norm not in tuple(norms):
        known = ", ".join(repr(each) for each in (None, *norms))
        raise ValueError(expectation(name, "norm", f"one of {known}", repr(norm)))
    if candidate not in ACTIVATIONS:
        raise ValueError(expectation(name, "candidate", f"one of {ACTIVATIONS}", repr(candidate)))
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(expectation(name, "dtype", "a floating dtype", repr(dtype)))


def check_tensor(
    name: str,
    argument: str,
    x: Tensor,
    *,
    like: Tensor,
    like_name: str,
    shape: torch.Size | tuple[int, ...],
) -> None:
    """x must be a tensor of this shape, with the dtype and the device of `like`."""
    check_like(name, argument, x, like, like_name)
    if x.shape != shape:
        was = f"{dims(shape)} as {like_name} is {dims(like.shape)}"
        raise ValueError(expectation(name, argument, was, dims(x.shape), f"{argument}.expand copies nothing"))


def check_like(
    name: str,
    argument: str,
    x: Tensor,
    like: Tensor,
    like_name: str,
    *,
    or_dtype: torch.dtype | None = None,
    autocast: bool = False,
) -> None:
    """x must be a tensor with the dtype (or the one named, or any that autocast converts) and the device of `like`."""
    if not isinstance(x, Tensor):
        raise TypeError(expectation(name, argument, "a tensor", type(x).__name__, "torch.as_tensor makes one"))
    if x.dtype not in (like.dtype, or_dtype) and not (autocast and accumulate_dtype(x.dtype) == torch.float32):
        as_like = f"{like.dtype} as {like_name} is"
        raise TypeError(expectation(name, argument, as_like, str(x.dtype), f"use {argument}.to({like.dtype})"))
    if x.device != like.device:
        as_like = f"on {like.device} as {like_name} is"
        raise ValueError(
            expectation(name, argument, as_like, f"one on {x.device}", f"use {argument}.to({str(like.device)!r})")
        )


def check_state(name: str, argument: str, h: Tensor, sequence: Tensor) -> Tensor:
    """The state (B, 1, *) that h stands for beside a sequence (B, S, *)."""
    check_like(name, argument, h, sequence, "the sequence", or_dtype=accumulate_dtype(sequence.dtype))
    return expanded(name, argument, h, (sequence.shape[0], 1, *sequence.shape[2:]), "(B, 1, *)")


def expanded(name: str, argument: str, h: Tensor, shape: tuple[int, ...], letters: str, remedy: str = "") -> Tensor:
    try:
        return h.expand(shape)
    except RuntimeError:
        expected = f"expandable to {letters} = {dims(shape)}"
        raise ValueError(expectation(name, argument, expected, dims(h.shape), remedy)) from None


def check_reset(name: str, reset: Tensor | None, sequence: Tensor, letters: str) -> None:
    if reset is None:
        return
    if not isinstance(reset, Tensor):
        raise TypeError(expectation(name, "reset", "a bool tensor", type(reset).__name__, "torch.as_tensor makes one"))
    if reset.dtype != torch.bool:
        raise TypeError(expectation(name, "reset", "of dtype torch.bool", str(reset.dtype), "use reset.bool()"))
    if reset.shape != sequence.shape[:2]:
        expected = f"{letters} = {dims(sequence.shape[:2])}"
        raise ValueError(expectation(name, "reset", expected, dims(reset.shape)))
    if reset.device != sequence.device:
        expected = f"on {sequence.device} as the sequence is"
        remedy = f"use reset.to({str(sequence.device)!r})"
        raise ValueError(expectation(name, "reset", expected, f"one on {reset.device}", remedy))


def check_lengths(name: str, lengths: Tensor, batch: int, steps: int, device: torch.device) -> None:
    if not isinstance(lengths, Tensor):
        remedy = "torch.as_tensor makes one"
        raise TypeError(expectation(name, "lengths", "an integer tensor (B,)", type(lengths).__name__, remedy))
    if lengths.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        remedy = "use lengths.long()"
        raise TypeError(expectation(name, "lengths", "of an integer dtype", str(lengths.dtype), remedy))
    if lengths.shape != (batch,):
        raise ValueError(expectation(name, "lengths", f"(B,) = ({batch},)", dims(lengths.shape)))
    if lengths.device.type != "cpu" and lengths.device != device:
        expected = f"on the CPU or on {device} as x is"
        raise ValueError(expectation(name, "lengths", expected, f"one on {lengths.device}", "use lengths.cpu()"))
    if torch.compiler.is_compiling():
        return  # A graph that is captured knows no values.
    # Wide enough for S itself.
    long = lengths.long()
    if batch and not bool(((long >= 1) & (long <= steps)).all()):
        raise ValueError(expectation(name, "lengths", f"from 1 to S = {steps}", str(lengths.tolist())))
