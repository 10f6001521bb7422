"""Checks of options and other values that are no tensors."""

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from ..ops.cells import GATES, cells_of, multiple_of
from .messages import expectation, level_of_the_caller, require


def check_flags(name: str, **flags: object) -> None:
    for argument, flag in flags.items():
        check_flag(name, argument, flag)


def check_flag(name: str, argument: str, flag: object, remedy: str = "", expected: str = "a bool") -> None:
    if not isinstance(flag, bool):
        raise TypeError(expectation(name, argument, expected, repr(flag), remedy))


def check_bias(name: str, bias: object) -> None:
    """Check the `bias` of a layer. For a number, the error lists later arguments, because one was probably meant."""
    after = "the arguments after num_layers are bias, batch_first, dropout and bidirectional; pass dropout by keyword"
    check_flag(name, "bias", bias, after if is_number(bias) else "")


def check_residual(name: str, residual: object, input_dims: int, hidden_dims: int, bidirectional: bool) -> None:
    if not isinstance(residual, str) or residual != "highway":
        check_flag(name, "residual", residual, expected="a bool or 'highway'")
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
        warnings.warn(text, stacklevel=level_of_the_caller())


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
    count, cells = multiple_of(GATES[gate]), cells_of(GATES[gate])
    condition = "even" if count == 2 else f"divisible by {count}"
    groups = "pairs of features" if count == 2 else f"groups of {count // len(cells)} features"
    groups += " in one half" if len(cells) > 1 else ""
    require(name, argument, size % count == 0, f"{condition} because gate={gate!r} turns {groups}", str(size))


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
