"""The words of errors: function, argument, what is expected, what came, and the remedy."""

import itertools
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


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


def level_of_the_caller() -> int:
    """Return the `stacklevel` of the innermost frame outside of this package, and of torch, which calls modules."""
    packages = (__name__.partition(".")[0], "torch")
    frames = (frame for frame, _ in traceback.walk_stack(sys._getframe(1)))
    inner = itertools.takewhile(lambda each: each.f_globals.get("__name__", "").partition(".")[0] in packages, frames)
    return 1 + sum(1 for _ in inner)
