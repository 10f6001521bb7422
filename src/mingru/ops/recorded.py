"""What the `forward` of a module does with x, recorded as instructions.

`forward` is called with a `Recorded` in the place of x, and an object for each state of each layer and direction. What
x does not know, such as a product with a number, raises an error, and the module gets no plan.
"""

import math
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .backends import native
from .call import Context, Spec, is_plain
from .cells import CELLS
from .linear_map import NORMS

# The index of a state of the module, and of one of the layers and directions in it.
State = tuple[int, int]
# An instruction of the operator: its number, whether it has a bias, its state, and its cell and activation.
Row = tuple[int, int, int, int]


class Norm(NamedTuple):
    """A norm with weights."""

    kind: str
    eps: float | None


class Direction(NamedTuple):
    """What the recurrence of one layer and direction is computed from, except x and the states."""

    spec: Spec
    norm: Norm | None
    """Norm before the linear map, whose kernels include it."""
    map: list[int]
    recurrent: list[int]


class Recording:
    """The instructions of a module, in the order in which its `forward` computes them."""

    def __init__(self, indices: dict[int, int], time_first: bool) -> None:
        """`indices` has the index of each parameter of the module, by its id."""
        self.time_first = time_first
        self.steps: list[tuple[str, Any, list[int]]] = []
        """A name, what else it computes with, and its weights, as indices into `used`."""
        self.used: list[int] = []
        """The parameters of the module that are weights of the instructions."""
        self.is_open = False
        """Whether the outputs of two directions are not one yet."""
        self._indices = indices
        self._added: list[tuple[int, int]] = []
        self._num_layers: Counter[int] = Counter()

    def require(self, *conditions: bool) -> None:
        """Refuse the module if an assumption of the instructions does not hold."""
        if not all(conditions):
            raise ValueError("the instructions cannot describe this module")

    def weights(self, *found: Any) -> list[int]:
        """Take weights; return their indices, or -1 for None. A subclass, such as a quantized tensor, is refused."""
        self.require(found[0] is not None)
        return [-1 if each is None else self._weight(each) for each in found]

    def _weight(self, found: Any) -> int:
        self.require(type(found) is nn.Parameter)
        self.used.append(self._indices[id(found)])
        return len(self.used) - 1

    def norm(self, kind: str, shape: Any, weight: Any, bias: Any, eps: Any) -> tuple[Norm, list[int]]:
        is_number = type(eps) is float and not math.isnan(eps)
        self.require(weight is not None and tuple(shape) == weight.shape, kind == "rms" or bias is not None)
        self.require(is_number or (kind == "rms" and eps is None))
        return Norm(kind, eps), self.weights(weight, bias)

    def next_layer(self, state: int, layer: int) -> None:
        """Require that layers take their states one after the other."""
        self.require(layer == self._num_layers[state])
        self._num_layers[state] += 1

    def add(self, x: "Recorded", other: "Recorded") -> "Recorded":
        """Add a value from before, or a linear map of it. Sums must be nested, because values are kept on a stack."""
        self.require(all(at >= other.at or end < other.at for at, end in self._added))
        self._added.append((other.at, len(self.steps)))
        if other.map is None:
            return x.then("add", None)
        return x.then("add_linear", None, *self.weights(*other.map))

    def finish(self) -> tuple[list[Row], list[float]]:
        """Return the code and the numbers of the operator, and put into the steps where a value is kept."""
        self.require(not self.is_open)
        kept = Counter(at for at, _ in self._added)
        steps: list[tuple[str, Any, list[int]]] = []
        for at, step in enumerate(self.steps):
            steps += [("keep", None, [])] * kept[at] + [step]
        self.steps = steps
        rows: list[Row] = []
        numbers: list[float] = []

        def add(name: str, has_bias: bool = False, state: int = 0, cell: int = 0) -> None:
            rows.append((native.INSTRUCTION_NUMBERS[name], has_bias, state, cell))

        def add_norm(norm: Norm) -> None:
            # NaN is the default of RMSNorm, which depends on the dtype. In C++, the norm with a bias is a layer norm.
            numbers.append(math.nan if norm.eps is None else norm.eps)
            add("norm", norm.kind == "layer")

        for name, of, weights in steps:
            if name == "scan":
                directions, state = of
                spec, norm = directions[0].spec, directions[0].norm
                if norm is not None:
                    add_norm(norm)
                numbers.append(spec.min_decay)
                of_maps = [own for each in directions for own in (each.map, each.recurrent) if own[0] >= 0]
                has_bias, *others = {own[1] >= 0 for own in of_maps}
                self.require(not others)
                gate = spec.output_gate * native.FLAGS["output_gate"]
                scan = "scan" if len(directions) == 1 else "scan_both"
                add(scan, has_bias, state, native.NUMBERS[spec.cell, spec.activation] | gate)
            elif name == "norm":
                add_norm(of)
            elif name == "gelu":
                number, has_bias, *_ = rows.pop()
                self.require(number == native.INSTRUCTION_NUMBERS["linear"])
                add("linear_gelu", has_bias == 1)
            elif name != "dropout":
                add(name, len(weights) > 1 and weights[1] >= 0, of if name == "causal_conv" else 0)
        return rows, numbers


class Recorded:
    """x after some instructions, `map` of it, or one of two directions, which only `torch.cat` takes."""

    shape = ()
    """All have the same. The operator checks the sizes."""

    def __init__(self, recording: Recording, map: Any = None, is_part: bool = False) -> None:
        self.recording, self.map, self.is_part = recording, map, is_part
        self.at = len(recording.steps)

    @property
    def is_last(self) -> bool:
        recording = self.recording
        return self.map is None and not self.is_part and not recording.is_open and self.at == len(recording.steps)

    def then(self, name: str, of: Any, *weights: int) -> "Recorded":
        """Return x after one more instruction."""
        self.recording.require(self.is_last)
        self.recording.steps.append((name, of, [*weights]))
        return Recorded(self.recording)

    def dim(self) -> int:
        return 3

    def chunk(self, count: int, dim: int) -> "list[Recorded]":
        self.recording.require(count == 1)
        return [self]

    def __add__(self, other: Any) -> "Recorded":
        self.recording.require(type(other) is Recorded, not other.is_part)
        return self.recording.add(self, other)

    def norm(self, kind: str, shape: Any, weight: Any, bias: Any, eps: Any) -> "Recorded":
        found, weights = self.recording.norm(kind, shape, weight, bias, eps)
        return self.then("norm", found, *weights)

    def linear(self, *map: Any) -> "Recorded":
        # Of a value from before, it is added later.
        return self.then("linear", None, *self.recording.weights(*map)) if self.is_last else self.mapped(map)

    def mapped(self, map: Any) -> "Recorded":
        self.recording.require(self.map is None, not self.is_part)
        found = Recorded(self.recording, map)
        found.at = self.at
        return found

    def gelu(self, approximate: str = "none") -> "Recorded":
        self.recording.require(approximate == "none")
        return self.then("gelu", None)

    def dropout(self, p: Any, training: bool, inplace: bool) -> "Recorded":
        self.recording.require(0 <= p <= 1)
        return self.then("dropout", None) if training and p > 0 else self

    def causal_conv(self, weight: Any, bias: Any, state: Any, num_past: int, adds_x: bool) -> "tuple[Recorded, Any]":
        """Return x plus its convolution, and the state."""
        self.recording.require(weight is not None and len(weight) == num_past + 1, adds_x is True)
        self.recording.next_layer(*state)
        return self.then("causal_conv", state[0], *self.recording.weights(weight, bias)), state

    def recurrence(
        self, spec: Spec, linear: Any, context: Context, norm: Any, output_gate: bool
    ) -> "tuple[Recorded, Any]":
        """Return the recurrence of linear(norm(x)) in one direction, and the state."""
        recording, (state, layer), steps = self.recording, context.h, self.recording.steps
        recording.require(type(linear).forward is nn.Linear.forward, norm is None or type(norm) in NORMS)
        # What else a spec or a context says, the instructions do not.
        known = Context(context.h, context.h, None, None, context.recurrent, context.recurrent_bias)
        recording.require(is_plain(spec), all(map(operator.is_, context, known)))
        recording.require(spec.min_decay == 0 or (CELLS[spec.cell].not_timed is None and 0 < spec.min_decay < 1))
        recording.next_layer(state, layer)
        of_norm = None
        if norm is not None:
            kind = NORMS[type(norm)]
            bias = norm.bias if kind == "layer" else None
            of_norm, _ = recording.norm(kind, norm.normalized_shape, norm.weight, bias, norm.eps)
        for each, dim in ((linear.bias, 0), *((getattr(norm, name, None), 1) for name in ("weight", "bias"))):
            recording.require(each is None or each.shape == linear.weight.shape[dim : dim + 1])
        own, recurrent = recording.weights(linear.weight, linear.bias), [-1, -1]
        if context.recurrent is not None:
            recurrent = recording.weights(context.recurrent, context.recurrent_bias)
        of = Direction(spec._replace(output_gate=output_gate), of_norm, own, recurrent)
        if spec.reverse:
            # Reads the same x as the direction before it.
            directions, own_state = steps[-1][1] if steps and steps[-1][0] == "scan" else ([], None)
            recording.require(self.at == len(steps) - 1, len(directions) == 1, own_state == state)
            directions.append(of)
            recording.is_open = True
            return Recorded(recording, None, True), context.h
        return self.then("scan", ([of], state)), context.h

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return OPERATIONS[function](*args, **(kwargs or {}))


def _cat(parts: list[Any], dim: int) -> Any:
    """Return both directions, or the only one."""
    x = parts[0]
    if len(parts) == 1:
        return x
    recording = x.recording
    recording.require(len(parts) == 2, parts[1].is_part, x.at == parts[1].at == len(recording.steps))
    recording.is_open = False
    return Recorded(recording)


OPERATIONS: dict[Any, Callable[..., Any]] = {
    F.linear: lambda x, weight, bias=None: x.linear(weight, bias),
    F.gelu: lambda x, approximate="none": x.gelu(approximate),
    F.dropout: lambda x, p=0.5, training=True, inplace=False: x.dropout(p, training, inplace),
    F.rms_norm: lambda x, shape, weight=None, eps=None: x.norm("rms", shape, weight, None, eps),
    F.layer_norm: lambda x, shape, weight=None, bias=None, eps=1e-5: x.norm("layer", shape, weight, bias, eps),
    torch.cat: _cat,
}
