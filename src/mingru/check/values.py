"""The words of all errors, and checks of options and other values that are no tensors."""

import importlib
import itertools
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeGuard

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..ops.cells import GATES, multiple_of

Types = type | tuple[type, ...]


def name_of(cls: type) -> str:
    """Return the name of a class for errors, with its package if that is a name of torch too."""
    package, is_drop_in, _ = cls.__module__.partition(".drop_in.")
    package = f"{package}.drop_in" if is_drop_in else package.removesuffix(".modules.gru")
    return f"{package}.{cls.__name__}" if package != cls.__module__ else cls.__name__


def expectation(name: str, argument: str, expected: str, got: str, remedy: str = "") -> str:
    """Return an error message: what the argument must be, what was passed, and the fix."""
    return f"{name}: {argument} must be {expected}, got {got}" + (f"; {remedy}" if remedy else "")


@contextmanager
def reworded(names: dict[str, str]) -> Iterator[None]:
    """Raise a ValueError of the block with other names of arguments."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for name, other in names.items():
            text = text.replace(name, other)
        raise ValueError(text) from None


def require(
    name: str, argument: str, ok: bool, expected: str, got: str, remedy: str = "", error: type[Exception] = ValueError
) -> None:
    """Raise an error if an argument is wrong. Not for `forward`, because the texts of sizes add guards to graphs."""
    if not ok:
        raise error(expectation(name, argument, expected, got, remedy))


def check_type(name: str, argument: str, value: object, types: Types, expected: str, remedy: str = "") -> None:
    if not isinstance(value, types):
        got = name_of(type(value))
        # A class of another module may have the name that is expected.
        got = f"{type(value).__module__}.{got}" if got in expected.replace(".", " ").split() else got
        raise TypeError(expectation(name, argument, expected, got, remedy))


def imported(name: str, user: str, extra: str) -> ModuleType:
    """Return a module of an optional package, or raise the error that says what to install."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        remedy = f'run pip install {package}, or ".[{extra}]" in a clone of the repository'
        raise ModuleNotFoundError(f"{user} needs the package {package}: {remedy}", name=error.name) from error


def dims(shape: tuple[int, ...]) -> str:
    return str(tuple(shape))


def written(parts: Sequence[str], size: object = "I") -> str:
    """Return the letters of a form as in messages, with the number of features of x."""
    texts = [str(size) if part == "I" else re.sub(r"(?<=\w)[*/+](?=\w)", r" \g<0> ", part) for part in parts]
    packed = "packed steps " if parts[:1] == ["P"] else ""
    return f"{packed}({', '.join(texts)}{',' * (len(texts) == 1)})" if texts else "a scalar"


def instead_of_a_tensor(argument: str, found: object) -> tuple[str, str]:
    """Return what came in place of a tensor, and the fix."""
    is_array = hasattr(found, "__array__") or isinstance(found, (int, float, list, tuple))
    remedy, got = "use torch.as_tensor" if is_array else "", type(found).__name__
    if isinstance(found, (list, tuple)) and any(isinstance(each, Tensor) for each in found):
        remedy = f"use torch.{'nn.utils.rnn.pad_sequence and lengths=' if argument == 'x' else 'cat'}, or torch.stack"
    if isinstance(found, PackedSequence):
        remedy = "use torch.nn.utils.rnn.pad_packed_sequence, and lengths="
    if isinstance(found, str) and argument.partition("[")[0] in ("ids", "prompts"):
        remedy = "encode the text first: the model takes the numbers of tokens"
    if isinstance(found, Tensor):
        got = "a nested tensor" if found.is_nested else f"a tensor with the layout {found.layout}"
        remedy = "use torch.nested.to_padded_tensor, and lengths=" if found.is_nested else f"use {argument}.to_dense()"
    return got, remedy


def converted(argument: str, x: Tensor, method: str) -> str:
    """Return the fix for a tensor of another dtype or on another device: the method that converts it, if one can."""
    # TorchScript has no tuple of prefixes.
    if x.is_meta and (method.startswith("to('") or method.startswith("cpu")):  # noqa: PIE810
        return f"create {argument} there, because a tensor on meta has no values"
    return f"use {argument}.{'dequantize().' if x.is_quantized else ''}{method}"


def not_a_tensor(name: str, argument: str, found: object, expected: str = "a tensor") -> TypeError:
    return TypeError(expectation(name, argument, expected, *instead_of_a_tensor(argument, found)))


def check_floating(name: str, argument: str, x: Tensor, or_complex: bool = False) -> None:
    if not isinstance(x, Tensor):
        raise not_a_tensor(name, argument, x)
    if not (x.is_floating_point() or (or_complex and x.is_complex())):
        remedy = converted(argument, x, "float()")
        raise TypeError(expectation(name, argument, "of a floating-point dtype", str(x.dtype), remedy))


def level_of_the_caller() -> int:
    """Return the `stacklevel` of the innermost frame outside of this package, and of torch, which calls modules."""
    packages = (__name__.partition(".")[0], "torch")
    frames = (frame for frame, _ in traceback.walk_stack(sys._getframe(1)))
    inner = itertools.takewhile(lambda each: each.f_globals.get("__name__", "").partition(".")[0] in packages, frames)
    return 1 + sum(1 for _ in inner)


def check_flag(name: str, argument: str, flag: object, remedy: str = "") -> None:
    if not isinstance(flag, bool):
        raise TypeError(expectation(name, argument, "a bool", repr(flag), remedy))


def check_int(name: str, argument: str, size: object, expected: str = "an int", least: int = 1) -> None:
    if not isinstance(size, int) or isinstance(size, bool):
        remedy = "for layers of different sizes, use mingru.Stack" if isinstance(size, (list, tuple)) else ""
        raise TypeError(expectation(name, argument, expected, repr(size), remedy))
    if size < least:
        raise ValueError(expectation(name, argument, f"at least {least}", str(size)))


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_number(name: str, argument: str, value: object, expected: str, is_valid: Callable[[float], bool]) -> None:
    if not (is_number(value) and is_valid(value)):
        raise (ValueError if is_number(value) else TypeError)(expectation(name, argument, expected, repr(value)))


def check_dropout(name: str, dropout: float, num_layers: int) -> None:
    check_number(name, "dropout", dropout, "a number from 0 to 1", lambda p: 0 <= p <= 1)
    if dropout > 0 and num_layers == 1:
        why = "because it is not applied to the last layer's output; add layers or set dropout to 0"
        text = f"{name}: dropout={dropout} has no effect on one layer, {why}"
        warnings.warn(text, stacklevel=level_of_the_caller())


def check_choice(name: str, argument: str, value: object, choices: Collection[str]) -> None:
    # Not by comparison with values of other types: an array would compare its elements.
    if not (isinstance(value, str) and value in choices):
        raise ValueError(expectation(name, argument, f"one of {tuple(choices)}", repr(value)))


def check_parts(name: str, argument: str, size: int, gate: str) -> None:
    """Check that the gate can divide this number of features into numbers."""
    count = multiple_of(GATES[gate])
    expected = f"divisible by {count} because gate={gate!r} turns groups of features"
    require(name, argument, size % count == 0, expected, str(size))


def per_layer(
    name: str, argument: str, value: Any, num_layers: int, kinds: Any = (list, tuple), remedy: str = ""
) -> list[Any]:
    """Return the value for each layer, from one value or a list."""
    expected = f"one value, or a list of {num_layers}, one for each layer"
    if not isinstance(value, kinds):
        if not isinstance(value, (str, float)) and hasattr(value, "tolist"):
            raise TypeError(expectation(name, argument, expected, repr(value), f"use {argument}.tolist()"))
        return [value] * num_layers
    require(name, argument, len(value) == num_layers, expected, repr(value), remedy)
    return list(value)


def check_min_decay(name: str, min_decay: float | Sequence[float], gates: Sequence[str]) -> list[float]:
    """Return the lower bound of each layer."""
    bounds = per_layer(name, "min_decay", min_decay, len(gates))
    for bound, gate in zip(bounds, gates, strict=True):
        check_number(name, "min_decay", bound, "a number from 0 to 1 (exclusive)", lambda number: 0 <= number < 1)
        if gate == "signed" and bound != 0:
            expected = "0 because a decay with a lower bound cannot change its sign and gate is 'signed'"
            raise ValueError(expectation(name, "min_decay", expected, repr(min_decay)))
    return [float(bound) for bound in bounds]
