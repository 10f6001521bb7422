"""The options of layers: the arguments of their constructors, checked once."""

import functools
import inspect
from collections.abc import Callable, Sequence
from math import inf
from types import SimpleNamespace
from typing import Annotated, Any, Literal, ParamSpec, TypedDict, get_args, get_type_hints

import torch

from ..check.calls import arguments_checked
from ..check.values import check_choice, check_dropout, check_flags, check_int, check_number, per_layer, require
from ..ops.activation import ACTIVATIONS
from ..ops.cells import CELLS, GATES, cells_of, default_candidate

P = ParamSpec("P")
# For type checkers; `Options` checks the values.
Candidate = Literal["positive", "linear", "tanh"]
Gate = Literal["sigmoid", "signed", "rotation", "quaternion", "mixed"]
Gates = Gate | Sequence[Gate]
Norm = Literal["layer", "rms"]
Memory = float | Sequence[float]
Residual = bool | Literal["highway"]
OutputGate = Literal["silu"]


# The options of constructors by keyword, with their defaults. In this order, signatures have them.
ORDER = (
    *("cell", "forget_bias", "normalize", "residual", "norm", "candidate", "gate", "min_decay", "output_gate"),
    *("block_size", "learn_initial_state", "memory", "recompute", "batch_first", "device", "dtype"),
)


class Placement(TypedDict, total=False):
    """Device and dtype of the parameters."""

    device: Annotated[Any, None]
    dtype: Annotated[torch.dtype | None, None]


class StateOptions(TypedDict, total=False):
    """Options of all layers and cells."""

    candidate: Annotated[Candidate | None, None]
    learn_initial_state: Annotated[bool, False]
    memory: Annotated[Memory | None, None]


class NormedOptions(StateOptions, total=False):
    norm: Annotated[Norm | None, None]


class CellOptions(NormedOptions, total=False):
    gate: Annotated[Gate, "sigmoid"]
    min_decay: Annotated[float, 0.0]


class StackedOptions(NormedOptions, total=False):
    residual: Annotated[Residual, False]
    output_gate: Annotated[OutputGate | None, None]
    recompute: Annotated[bool | None, None]


class GateOptions(TypedDict, total=False):
    gate: Annotated[Gates, "sigmoid"]
    min_decay: Annotated[float | Sequence[float], 0.0]


class ForgetOptions(TypedDict, total=False):
    forget_bias: Annotated[float, 0.0]
    normalize: Annotated[bool, True]


class MinGRUOptions(StackedOptions, GateOptions, Placement, total=False):
    """Options of `MinGRU`."""


class MinGRUCellOptions(CellOptions, Placement, total=False):
    """Options of `MinGRUCell`."""


class MinLSTMOptions(StackedOptions, ForgetOptions, Placement, total=False):
    """Options of `MinLSTM`."""


class MinLSTMCellOptions(NormedOptions, ForgetOptions, Placement, total=False):
    """Options of `MinLSTMCell`."""


class BlockGRUCellOptions(Placement, total=False):
    """Options of `BlockGRUCell`."""

    block_size: Annotated[int, 32]
    norm: Annotated[Norm | None, None]
    learn_initial_state: Annotated[bool, False]
    memory: Annotated[Memory | None, None]


class BlockGRUOptions(BlockGRUCellOptions, total=False):
    """Options of `BlockGRU`."""

    residual: Annotated[bool, False]
    recompute: Annotated[bool | None, None]


class PairOptions(ForgetOptions, total=False):
    """Options of `drop_in.LSTM` and `LSTMCell`."""

    cell: Annotated[Literal["minlstm", "mingru", "blockgru"], "minlstm"]
    block_size: Annotated[int, 32]


class OneStateOptions(TypedDict, total=False):
    """Options of `drop_in.GRU` and `GRUCell`."""

    cell: Annotated[Literal["mingru", "blockgru"], "mingru"]
    block_size: Annotated[int, 32]


class LayerOptions(StateOptions, GateOptions, ForgetOptions, Placement, total=False):
    """Options of `MinGRU`, `MinLSTM` and `BlockGRU` that a block passes on."""

    bias: bool
    bidirectional: bool
    output_gate: OutputGate | None
    block_size: int
    recompute: bool | None


def constructor(**defaults: Any) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorate a constructor with `**options: Unpack[...]`, to check its arguments and fill in the defaults.

    Its signature then has each option. `defaults` replace those of the options.
    """

    def decorated(init: Callable[P, None]) -> Callable[P, None]:
        *own, options = inspect.signature(init).parameters.values()
        hints = get_type_hints(get_args(options.annotation)[0], include_extras=True)
        values = {name: defaults.get(name, hints[name].__metadata__[0]) for name in sorted(hints, key=ORDER.index)}
        for name, value in values.items():
            option = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value)
            own.append(option.replace(annotation=get_args(hints[name])[0]))

        @functools.wraps(init)
        def run(*args: Any, **kwargs: Any) -> None:
            init(*args, **{**values, **kwargs})

        vars(run)["__signature__"] = inspect.Signature(own, return_annotation=None)
        return arguments_checked()(run)

    return decorated


def arguments_of(scope: dict[str, Any], *without: str) -> dict[str, Any]:
    """Return the arguments of a constructor from its `locals()`, without some of them."""
    arguments = {**scope, **scope.get("options", {})}
    return {name: arguments[name] for name in arguments if name not in ("self", "__class__", "options", *without)}


class Options(SimpleNamespace):
    """The arguments of the constructor of a layer, checked. All but device and dtype become attributes of the layer."""

    norms: tuple[str, ...]
    """Names of the norms that the layer has."""

    def __init__(self, name: str, **arguments: Any) -> None:
        """`name` is that of the class that is constructed, for errors."""
        super().__init__(name=name, **arguments)
        self.check()

    def check(self) -> None:
        """Raise an error for an argument that is invalid."""
        check_int(self.name, "input_dims", self.input_dims)
        check_int(self.name, "num_layers", self.num_layers)
        check_flags(self.name, bias=self.bias, batch_first=self.batch_first, bidirectional=self.bidirectional)
        check_flags(self.name, learn_initial_state=self.learn_initial_state)
        check_dropout(self.name, self.dropout, self.num_layers)
        for gate in self.gates:
            check_choice(self.name, "gate", gate, GATES)
        if self.candidate is not None:
            check_choice(self.name, "candidate", self.candidate, ACTIVATIONS)
        if self.memory is not None:
            memory, expected = self.memory, "a number above 1, a pair of two such numbers, or None"
            for number in memory if isinstance(memory, list | tuple) and len(memory) == 2 else (memory,):
                check_number(self.name, "memory", number, expected, lambda steps: 1 < steps < inf)
            require(self.name, "memory", self.bias, "None because bias is False", repr(self.memory))
        norms = (None, *self.norms)
        is_valid = isinstance(self.norm, str | None) and self.norm in norms
        require(self.name, "norm", is_valid, f"one of {', '.join(map(repr, norms))}", repr(self.norm))
        is_valid = self.dtype is None or (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point)
        require(self.name, "dtype", is_valid, "a floating-point dtype", repr(self.dtype), error=TypeError)

    @property
    def factory(self) -> dict[str, Any]:
        return {"device": self.device, "dtype": self.dtype}

    @property
    def gates(self) -> list[str]:
        """The gate of each layer."""
        return per_layer(self.name, "gate", self.gate, self.num_layers)

    def candidate_of(self, gate: str) -> str:
        return default_candidate(gate) if self.candidate is None else self.candidate

    def memories_of(self, cell: str, min_decay: float) -> list[tuple[float, float] | None]:
        """Return the memory of the first and the last number of each part of a state; None for no shift of biases."""
        if self.memory is None:
            default = CELLS[cell].memory if self.bias else None
            return [None if CELLS[each].has_logarithms else default for each in cells_of(cell)]
        first, last = self.memory if isinstance(self.memory, list | tuple) else (self.memory, self.memory)
        least = 1.0 / (1.0 - min_decay)
        expected = f"above {least:g} because min_decay is {min_decay}, with which each state lasts longer"
        require(self.name, "memory", min(first, last) > least, expected, repr(self.memory))
        # What the gate must last by itself, without the bound.
        return [(first / least, last / least)] * len(cells_of(cell))

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1
