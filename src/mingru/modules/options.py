"""The options of layers: the arguments of their constructors, checked once."""

import functools
import inspect
from collections.abc import Sequence
from math import inf
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from ..check.values import check_choice, check_dropout, check_int, check_number, per_layer, require
from ..ops.cells import CELLS, GATES, cells_of, default_candidate

T = TypeVar("T")
# The values of options; a constructor refuses others, see `annotations`.
Candidate = Literal["positive", "linear", "tanh"]
Gate = Literal["sigmoid", "signed", "rotation", "quaternion", "mixed"]
Gates = Gate | Sequence[Gate]
Norm = Literal["layer", "rms"]
Memory = float | Sequence[float]
Residual = bool | Literal["highway"]
OutputGate = Literal["silu"]


def arguments_of(scope: dict[str, T]) -> dict[str, T]:
    """Return the arguments of a constructor from its `locals()`, to pass all of them to the base class."""
    return {name: value for name, value in scope.items() if name not in ("self", "__class__")}


class Options(SimpleNamespace):
    """The arguments of the constructor of a layer, checked. All but device and dtype become attributes of the layer."""

    def __init__(self, name: str, **arguments: Any) -> None:
        """`name` is that of the class that is constructed, for errors."""
        super().__init__(**arguments)
        self.name = name
        self.arguments = arguments
        self.factory = {"device": self.device, "dtype": self.dtype}
        self.check()
        self.num_directions = 2 if self.bidirectional else 1

    def check(self) -> None:
        """Raise an error for an argument that is invalid."""
        check_int(self.name, "input_dims", self.input_dims)
        check_int(self.name, "num_layers", self.num_layers)
        check_dropout(self.name, self.dropout, self.num_layers)
        # The gate of each layer.
        self.gates = per_layer(self.name, "gate", self.gate, self.num_layers)
        for gate in self.gates:
            check_choice(self.name, "gate", gate, GATES)
        if self.memory is not None:
            memory, expected = self.memory, "a number above 1, a pair of two such numbers, or None"
            for number in memory if isinstance(memory, list | tuple) and len(memory) == 2 else (memory,):
                check_number(self.name, "memory", number, expected, lambda steps: 1 < steps < inf)
            require(self.name, "memory", self.bias, "None because bias is False", repr(self.memory))
        is_valid = self.dtype is None or (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point)
        require(self.name, "dtype", is_valid, "a floating-point dtype", repr(self.dtype), error=TypeError)

    def memories_of(self, cell: str, min_decay: float) -> dict[str, tuple[float, float] | None]:
        """Return the memory of the first and the last number of each cell of a mixture; None for no shift of biases."""
        if self.memory is None:
            default = CELLS[cell].memory if self.bias else None
            return {each: None if CELLS[each].has_logarithms else default for each in cells_of(cell)}
        first, last = self.memory if isinstance(self.memory, list | tuple) else (self.memory, self.memory)
        least = 1.0 / (1.0 - min_decay)
        expected = f"above {least:g} because min_decay is {min_decay}, with which each state lasts longer"
        require(self.name, "memory", min(first, last) > least, expected, repr(self.memory))
        # What the gate must last by itself, without the bound.
        return dict.fromkeys(cells_of(cell), (first / least, last / least))


def one_or_all(values: Sequence[T]) -> T | tuple[T, ...]:
    """Return the value that all layers have, or a tuple with one for each layer."""
    return values[0] if values.count(values[0]) == len(values) else tuple(values)


def arguments_of_class(cls: type) -> dict[str, Any]:
    """Return the default of each argument of the constructor, from the class of this package that defines it.

    The default of a required argument is `inspect.Parameter.empty`. Subclasses elsewhere may have other arguments.
    """
    package = __name__.partition(".")[0]
    return _defaults(next(each for each in cls.__mro__ if each.__module__.partition(".")[0] == package))


@functools.cache
def _defaults(own: type) -> dict[str, Any]:
    return {name: each.default for name, each in inspect.signature(own).parameters.items()}


def defaults_of(module: nn.Module) -> dict[str, Any]:
    """Return the default of each argument of the constructor; of `candidate`, the one for the module's gates."""
    defaults = {**arguments_of_class(type(module))}
    if "candidate" in defaults and "gate" in defaults:
        gates = vars(module)["gate"]
        gates = [gates] if isinstance(gates, str) else gates
        of_gates = [default_candidate(GATES[gate]) for gate in gates]
        defaults["candidate"] = "tanh" if vars(module).get("cell") == "gru" else one_or_all(of_gates)
    return defaults


def not_default(module: nn.Module, *names: str) -> str:
    """Return ", name=value" for each of these options that differs from its default; without names, for all options."""
    defaults = defaults_of(module)
    text = ""
    for name in names or defaults:
        value = getattr(module, name, defaults[name])
        if defaults[name] is not inspect.Parameter.empty and value != defaults[name]:
            text += f", {name}={value!r}"
    return text
