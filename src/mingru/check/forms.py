"""Forms: what the tensors of a call must be, as data. Checks, errors and shapes of states are computed from them.

A form is a shape in letters: B sequences, S steps, P packed steps, I features of x, H of a state, L layers, D
directions. A part with "*" stands for any number of dimensions at the end. The forms of all calls are at the end.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..ops.cells import CELLS
from ..ops.layout import is_packing
from ..ops.modes import are_eager, is_autocast, is_captured
from ..ops.shape import MaybeList, MaybeTensor, accumulate_dtype, is_expandable
from . import names as meant
from .ranges import check_range, check_times
from .values import check_floating, check_type, converted, dims, expectation, instead_of_a_tensor, require, written

Shape = Sequence[int]
Texts = dict[str, str]
Table = dict[str, "Form"]
EXPANDS = "expands to "
# Where a layer has the sizes that x has not: K and C are those of the convolution of a block.
PLACES = {"I": "input_dims", "H": "hidden_dims", "L": "num_layers", "D": "num_directions", "C": "input_dims"}

# What a tensor contains that has no numbers: its dtypes in words, the dtypes, and the method that converts others.
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
KINDS: dict[str, tuple[str, str, tuple[torch.dtype, ...], str]] = {
    "reset": ("a bool tensor", "of dtype torch.bool", (torch.bool,), "bool()"),
    "lengths": ("an integer tensor", "of a signed integer dtype or uint8", INTEGERS, "long()"),
}
# Their dtype may also be that in which a recurrence is computed.
STATES = ("h", "initial_state", "past", "dt")


class Checked(Protocol):
    """What has forms: a layer, or a `Function`."""

    name: str
    _forms: "Forms"

    def _hint(self, form: "Form", value: object, shape: Shape) -> str: ...


class LayerLike(Checked, Protocol):
    """What `check_call` asks of a layer."""

    role: str
    input_dims: int
    num_space_dims: int
    batch_first: bool

    def _tables(self) -> list[Table]: ...

    def _weight_of_x(self) -> MaybeTensor: ...


class Form:
    """An argument of a call: its shape in letters, and what it contains; without a kind, numbers of the dtype of x.

    `x` has the letters of the shape of x. An `exact` state must have the dtype of x.
    """

    def __init__(self, argument: str, text: str, x: list[str], exact: bool = False) -> None:
        self.argument, self.is_state = argument, argument in STATES and not exact
        self.expands = text.startswith(EXPANDS)
        self.parts = text.removeprefix(EXPANDS).split()
        sizes, rest = [part for part in self.parts if part[0] != "*"], self.parts[-1:]
        self._sizes, self.num_dims = [size_of(part, x) for part in sizes], len(sizes)
        # The first dimension of x of those that end the shape.
        self._rest = x.index(rest[0]) if len(self.parts) > len(sizes) else None
        self.noun, self.expected, self.dtypes, self.method = KINDS.get(argument, ("a tensor", "", (), ""))
        # Lengths may be on the CPU, where they are read.
        self.dtype, self.or_cpu = next(iter(self.dtypes), None), argument == "lengths"

    def shape(self, x: Shape, of: object) -> tuple[int, ...]:
        """Return the shape, for this shape of x and a layer that has the other sizes."""
        sizes = [size(x, of) for size in self._sizes]
        return (*sizes,) if self._rest is None else (*sizes, *x[self._rest :])

    def dim(self, letters: str) -> int | None:
        """Return the dimension that one of these letters stands for, or None if there is none."""
        return next((at for at, part in enumerate(self.parts) if part in letters), None)

    def check(
        self, owner: Checked, value: object, like: Tensor, x: Shape | None, of: object = None, place: str = ""
    ) -> None:
        """Raise an error unless a value has this form, for this shape of x, and the dtype and device of a tensor.

        Without a shape of x, any shape will do. `of` has the other sizes, by default a layer itself, and `place` is the
        index of the value in a list.
        """
        if not isinstance(value, Tensor):
            raise self.not_a_tensor(owner, value, place)
        shape = value.shape if x is None else self.shape(x, owner if of is None else of)
        # First what is usual.
        if value.shape == shape and value.dtype == (self.dtype or like.dtype) and value.device == like.device:
            return
        names = owner._forms.names
        name = names.get(self.argument, self.argument) + place
        like_name = "the layer's weight" if self.argument == "x" else names["like"]
        if value.dtype not in (self.dtypes or self._of_numbers(like)):
            expected, method = self.expected or f"{like.dtype} like {like_name}", self.method or f"to({like.dtype})"
            remedy = meant.of_dtype(owner, self.argument, value, converted(name, value, method))
            raise TypeError(expectation(owner.name, name, expected, str(value.dtype), remedy))
        if value.device != like.device and not (self.or_cpu and value.is_cpu):
            expected = f"{'on the CPU or ' * self.or_cpu}on {like.device} like {like_name}"
            remedy = converted(name, value, "cpu()" if self.or_cpu else f"to({str(like.device)!r})")
            raise ValueError(expectation(owner.name, name, expected, f"a tensor on {value.device}", remedy))
        if value.shape != shape and not (self.expands and is_expandable(value.shape, shape)):
            expected = f"{'expandable to ' * self.expands}{written(self.parts)} = {dims(shape)}"
            remedy = owner._hint(self, value, shape) or meant.of_missing_dim(name, value, shape)
            raise ValueError(expectation(owner.name, name, expected, dims(value.shape), remedy))

    def not_a_tensor(self, owner: Checked, value: object, place: str = "") -> TypeError:
        """Return the error about a value of another type."""
        name = owner._forms.names.get(self.argument, self.argument) + place
        got, remedy = instead_of_a_tensor(name, value)
        return TypeError(expectation(owner.name, name, self.noun, got, owner._hint(self, value, ()) or remedy))

    def _of_numbers(self, like: Tensor) -> tuple[torch.dtype, ...]:
        # Autocast converts what has another of its dtypes.
        is_converted = self.argument in ("x", *STATES) and is_autocast(like)
        others = (torch.float32, torch.bfloat16, torch.float16) if is_converted else ()
        return like.dtype, *others, *([accumulate_dtype(like.dtype)] if self.is_state else ())


def size_of(part: str, x: list[str]) -> Callable[[Shape, Any], int]:
    """Return the function of the shape of x, and of a layer, that computes one dimension, such as "L*D" or "S+1"."""
    for sign, combine in (("+", operator.add), ("*", operator.mul)):
        first, _, second = part.partition(sign)
        if second:
            one, other = size_of(first, x), size_of(second, x)
            return lambda shape, of: combine(one(shape, of), other(shape, of))
    if part in x:
        dim = x.index(part)
        return lambda shape, of: shape[dim]
    if part.isdigit():
        size = int(part)
        return lambda shape, of: size
    if part == "K":
        return lambda shape, of: of.conv.kernel_size - 1
    name = PLACES[part]
    return lambda shape, of: getattr(of, name)


class Forms:
    """The forms of all arguments of a call: a table for each form of x, and one for packed sequences.

    `names` has the names that a caller sees: of arguments, of the size I, and of what has the dtype of other arguments.
    `exact` is the state that must have the dtype of x.
    """

    def __init__(
        self, *tables: Texts, packed: Texts | None = None, exact: str = "", names: Texts | None = None
    ) -> None:
        self.names = {"I": "input_dims", "x": "x", **(names or {})}
        self.names.setdefault("like", self.names["x"])

        def forms_of(texts: Texts, more: str = "") -> Table:
            x = (texts["x"] + more).split()
            return {name: Form(name, text, x, name == exact) for name, text in texts.items()}

        # The size of the batch is behind the shape of x.
        self.packed = [] if packed is None else [forms_of(packed, " B")]
        self.batch_first = [forms_of(table) for table in tables]
        swapped = [{name: text.replace("B S", "S B") for name, text in table.items()} for table in tables]
        self.time_first = [forms_of(table) for table in swapped]


class Function:
    """A function with the forms of its arguments, which is checked as a layer is; `x` is the name of the first one."""

    _hint = meant.of_functions

    def __init__(self, name: str, forms: Texts, x: str = "x") -> None:
        self.name, self._forms = name, Forms(forms, names={"x": x})

    def table(self, batch_first: bool = True) -> Table:
        return (self._forms.batch_first if batch_first else self._forms.time_first)[0]

    def bind(self, x: Tensor, or_complex: bool = False) -> Table:
        """Return the forms of all arguments beside x, or raise an error if x has no numbers or not these dimensions."""
        table, argument = self.table(), self._forms.names["x"]
        check_floating(self.name, argument, x, or_complex)
        parts, num_dims = table["x"].parts, table["x"].num_dims
        if x.dim() < num_dims or (x.dim() > num_dims and len(parts) == num_dims):
            remedy = "add a batch dimension" * (x.dim() < num_dims)
            raise ValueError(expectation(self.name, argument, written(parts), dims(x.shape), remedy))
        return table


def bind(layer: LayerLike, tables: list[Table], x: object, weight: MaybeTensor) -> Table:
    """Return the table of the form that x has, or raise an error if it has none, or another dtype or device."""
    form, count = tables[0]["x"], layer.num_space_dims
    if not isinstance(x, Tensor):
        raise form.not_a_tensor(layer, x)
    shape = x.shape
    for table in tables:
        num_dims = table["x"].num_dims
        if len(shape) == num_dims + count and shape[num_dims - 1] == layer.input_dims:
            if weight is not None and not (x.dtype == weight.dtype and x.device == weight.device):
                table["x"].check(layer, x, weight, shape)
            return table
    names, letters = layer._forms.names, [table["x"].parts[: table["x"].num_dims + count] for table in tables]
    expected = " or ".join(written(parts, layer.input_dims) for parts in letters)
    expected += f" because {names['I']} is {layer.input_dims}" + f" and space is {count}-dimensional" * (count > 0)
    raise ValueError(expectation(layer.name, names["x"], expected, dims(shape), layer._hint(form, x, shape)))


def check_call(
    layer: LayerLike, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor, cell: str = ""
) -> Table:
    """Check a call of a layer with at most one state, and return the forms of its arguments."""
    if isinstance(x, PackedSequence) and layer._forms.packed:
        expected = "None because a PackedSequence has its own lengths"
        require(layer.name, "lengths", lengths is None, expected, type(lengths).__name__)
        table = bind(layer, layer._forms.packed, x.data, layer._weight_of_x())
        shape: Shape = (*x.data.shape, check_packing(layer, x))
        reset, dt = _packed_like(layer.name, x, "reset", reset), _packed_like(layer.name, x, "dt", dt)
        x = x.data
    else:
        table = bind(layer, layer._tables(), x, layer._weight_of_x())
        shape = x.shape
    if h is not None or reset is not None or lengths is not None or dt is not None:
        given = {"h": None if h is None else h[0], "reset": reset, "lengths": lengths, "dt": dt}
        check_given(layer, table, x, shape, cell or getattr(layer, "cell", ""), **given)
    return table


def check_given(owner: Checked, table: Table, like: Tensor, x: Shape, cell: str, **given: MaybeTensor) -> None:
    """Check arguments that may be None, for this shape of x. Values are checked in eager mode on the CPU."""
    for argument, value in given.items():
        if value is None:
            continue
        why_not, remedy = None, ""
        if argument not in table:
            why_not = f"{owner._forms.names['x']} is {written(table['x'].parts)}"
        elif argument == "dt":
            why_not, remedy = CELLS[cell].not_timed, "make log(dt) an input feature"
        if why_not is not None:
            expected, got = f"None because {why_not}", type(value).__name__
            raise ValueError(expectation(owner.name, argument, expected, got, remedy))
        form = table[argument]
        form.check(owner, value, like, x)
        # A graph has no values, and a GPU would be waited for.
        if argument == "lengths" and value.is_cpu and not is_captured():
            steps = x[table["x"].dim("S") or 0]
            check_range(owner.name, "lengths", value, steps, f"from 0 to S = {steps}")
        if argument == "dt" and value.is_cpu and are_eager(value) and value.numel() > 0:
            check_times(owner.name, value, form.dim("SP"))


def check_states(
    owner: Checked, states: Sequence[object], forms: Sequence[tuple[Form, object, Shape]], like: Tensor, what: str
) -> None:
    """Check a list of states, each with its form, what has its sizes, and the shape of x."""
    argument = owner._forms.names.get("h", "h")
    check_list(owner.name, argument, states, len(forms), f"a list of {len(forms)} {what}")
    for index, (state, (form, of, x)) in enumerate(zip(states, forms, strict=True)):
        form.check(owner, state, like, x, of, f"[{index}]")


def check_list(name: str, argument: str, values: Sequence[object], count: int, expected: str, remedy: str = "") -> None:
    """Check that values are a list or a tuple of so many."""
    check_type(name, argument, values, (list, tuple), expected, meant.of_mask(values) or remedy)
    require(name, argument, len(values) == count, expected, str(len(values)), remedy)


def check_packing(layer: Checked, x: PackedSequence) -> int:
    """Check the sizes of a PackedSequence, by which kernels read and write memory, and return the size of its batch."""
    _, batch_sizes, *orders = x
    if not are_eager(batch_sizes):
        return int(batch_sizes[0])  # A graph has no values.
    argument, count = layer._forms.names["x"], batch_sizes[:1].sum().item()
    is_valid, remedy = is_packing(batch_sizes, x.data.shape[0]), "use pack_padded_sequence"
    expected = f"packed with batch_sizes that are positive, do not increase and sum to {x.data.shape[0]}"
    require(layer.name, argument, is_valid, expected, str(batch_sizes.tolist()), remedy)
    expected = f"packed with one index in its order for each of {count} sequences"
    for size in [order.numel() for order in orders if order is not None]:
        require(layer.name, argument, size == count, expected, str(size), remedy)
    return int(count)


def _packed_like(name: str, x: PackedSequence, argument: str, given: Any) -> Any:
    """Return the data (P,) of an argument that must be packed like x."""
    if given is None:
        return None
    check_type(name, argument, given, PackedSequence, "a PackedSequence like x", "pack it with the lengths of x")
    fits = torch.equal(given.batch_sizes, x.batch_sizes) and torch.equal(_order_of(given), _order_of(x))
    require(name, argument, fits, "packed with the lengths and in the order of x", "others")
    return given.data


def _order_of(packed_x: PackedSequence) -> Tensor:
    """Return the batch index of each sorted sequence."""
    order = packed_x.sorted_indices
    return torch.arange(int(packed_x.batch_sizes[0]), device="cpu") if order is None else order.cpu()


# All forms.

_H = "expands to L*D B 1 H"
_STEPS = {"reset": "B S", "lengths": "B", "dt": "B S"}
_PACKED = {"reset": "P", "dt": "P"}

LAYER = Forms({"x": "B S I", "h": _H, **_STEPS}, packed={"x": "P I", "h": _H, **_PACKED})
_CELL = {"x": "B I", "h": "B H", "reset": "B", "dt": "B"}, {"x": "I", "h": "H", "reset": "", "dt": ""}
CELL = Forms(*_CELL)
OF_IMAGES = Forms({"x": "B S I *space", "h": "expands to B 1 H *space", "reset": "B S"})
CELL_OF_IMAGES = Forms(
    {"x": "B I *space", "h": "expands to B H *space", "reset": "B"},
    {"x": "I *space", "h": "expands to H *space", "reset": ""},
)
PER_STEP = Forms({"x": "B S I *space", "lengths": "B"}, packed={"x": "P I"})
# With the state of the convolution, the last K inputs of C features.
BLOCK = Forms({"x": "B S I", "h": "D B 1 H", "past": "1 B K C", **_STEPS}, names={"I": "dims", "past": "h"})
_OF_MODEL = {"x": "ids", "h": "state", "past": "state", "like": "the weights"}
LANGUAGE_MODEL = Forms({"x": "B S", "h": "D B 1 H", "reset": "B S", "lengths": "B"}, names=_OF_MODEL)

_OF_TORCH = {"x": "input", "h": "hx", "I": "input_size"}
LAYER_OF_TORCH = Forms(
    {"x": "B S I", "h": "L*D B H", **_STEPS},
    {"x": "S I", "h": "L*D H", "reset": "S", "dt": "S"},
    packed={"x": "P I", "h": "L*D B H", **_PACKED},
    exact="h",
    names=_OF_TORCH,
)
CELL_OF_TORCH = Forms(*_CELL, exact="h", names=_OF_TORCH)

_STATES = {"h": "expands to B 1 *", "initial_state": "expands to B 1 *", **_STEPS}
MINGRU = Function("mingru", {"x": "B S *", "candidate": "B S *", **_STATES}, x="gate")
_OF_PAIRS = {"h": "expands to B 1 2*H *", "initial_state": "expands to B 1 2*H *"}
_OF_PAIRS |= {"x": "B S H *", "angle": "B S H *", "candidate": "B S 2*H *", **_STEPS}
ROTATION = Function("mingru", _OF_PAIRS, x="gate")
MINLSTM = Function("minlstm", {"x": "B S *", "input": "B S *", "candidate": "B S *", **_STATES}, x="forget")
_OF_GRU = {"weight": "3*H H", "bias": "H", "h": "expands to B 1 H", "initial_state": "expands to B 1 H", "reset": "B S"}
GRU = Function("gru", {"x": "B S H", "update_gate": "B S H", "candidate": "B S H", **_OF_GRU}, x="reset_gate")
LINEAR_SCAN = Function("linear_scan", {"x": "B S *", "b": "B S *", **_STATES}, x="a")
PARALLEL_SCAN_LOG = Function("parallel_scan_log", {"x": "B S *", "log_b": "B S+1 *"}, x="log_a")
ELAPSED_TIMES = Function("elapsed_times", {"x": "B S", "first": "B", "reset": "B S", "lengths": "B"}, x="t")
CHECK_RESETS = Function("check_resets", {"x": "B S *", "reset": "B S"})
RESET_FROM_LENGTHS = Function("reset_from_lengths", {"x": "N", "lengths": "N"})
