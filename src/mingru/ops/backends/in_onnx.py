"""The linear scan as nodes of ONNX, for `mingru.export.onnx`.

PyTorch takes up to 20 ms for each operation of a graph whose sizes are symbols, and a scan has hundreds. So it captures
the scan as one operator, for which its exporter then writes the nodes below. They compute what `torch_in_graphs` does.
The decay and the state of a step are two columns of one tensor, (P, 2, B, C, T, F): first the P parts of a number, then
B sequences, C chunks of T steps, and F features.

The product of numbers is one of matrices: a b = M(a) b, whose row i and column j have the part i ^ j of a, with a sign.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..activation import activate
from ..call import Call
from ..cells import _decay, unit_quaternion
from ..layout import in_layout, padded_call
from ..modes import is_true_for_all_sizes
from ..scan import LinearScan
from ..shape import States, accumulate_dtype, along, as_dtype, from_parts, times, to_parts
from . import torch_in_graphs

# A value of a graph, for which onnxscript has no type.
Value = Any
# Of M(a) for quaternions. A complex number has the first two rows and columns.
_SIGNS = ((1, -1, -1, -1), (1, 1, -1, 1), (1, 1, 1, -1), (1, -1, 1, 1))
# Dimensions of (P, 2, B, C, T, F).
_COLUMNS, _CHUNKS, _STEPS = 1, 3, 4


def scan(call: LinearScan, most_steps: int) -> States:
    """Compute a scan of at most so many steps, as one operator."""
    out, last = _operator(*call, most_steps)
    return out, last


@torch.library.custom_op("mingru::scan_of_onnx", mutates_args=())
def _operator(
    a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool, parts: int, most_steps: int
) -> tuple[Tensor, Tensor]:
    return torch_in_graphs._scan(a, b, h, reset, reverse, parts)


@_operator.register_fake
def _(a: Tensor, b: Tensor, h: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(b), torch.empty_like(h)


def mixed_step(call: Call) -> States | None:
    """Compute one step of all cells of a mixture together; None if the call is another."""
    spec, (gate, candidate), context, layout = call
    is_step = gate.dim() == 3 and is_true_for_all_sizes(gate.size(0 if layout.time_first else 1) == 1)
    if spec.cell != "mingru_mixed" or not is_step or layout.lengths is not None:
        return None
    spec, (gate, candidate), context, layout = padded_call(call)
    gate, candidate = (as_dtype(x, accumulate_dtype(x.dtype)) for x in (gate, candidate))
    features = range(gate.size(2))
    turning = [feature for feature in features if feature >= len(features) // 2]
    own = [feature - feature % 4 if feature in turning else feature for feature in features]
    vectors = [feature for feature in turning if feature % 4]
    keep, update = _decay(gate.index_select(2, torch.tensor(own, device=gate.device)), spec.min_decay, context)
    vector = gate.index_select(2, torch.tensor(vectors, device=gate.device))
    unit = unit_quaternion(vector.reshape(-1, 1, len(vectors) // 3, 3), context)
    h = as_dtype(context.h, gate.dtype)
    if context.reset is not None:
        h = torch.where(along(context.reset, h), as_dtype(context.initial_state, h.dtype), h)
    out = _turned(keep, unit, update * activate(candidate, spec.activation), h)
    return in_layout((out, out), call)


@torch.library.custom_op("mingru::turned_of_onnx", mutates_args=())
def _turned(keep: Tensor, unit: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """Compute b + keep h, of which the second half is turned by unit (B, 1, H / 8, 4)."""
    still, turning = h.chunk(2, 2)
    return b + keep * torch.cat([still, from_parts(times(unit, to_parts(turning, 4), 4), 4)], 2)


@_turned.register_fake
def _(keep: Tensor, unit: Tensor, b: Tensor, h: Tensor) -> Tensor:
    return torch.empty_like(b)


def translation() -> dict[Any, Callable[..., Value]]:
    """Return the functions that write the nodes of the operators, as `torch.onnx.export` takes them."""

    def nodes(a, b, h, reset=None, reverse: bool = False, parts: int = 1, most_steps: int = 1):  # type: ignore[no-untyped-def]
        return _Nodes(b, parts, most_steps).scan(a, b, h, reset, reverse)

    def turned(keep, unit, b, h):  # type: ignore[no-untyped-def]
        return _Nodes(b, 4, 1).turned(keep, unit, b, h)

    return {torch.ops.mingru.scan_of_onnx.default: nodes, torch.ops.mingru.turned_of_onnx.default: turned}


class _Nodes:
    """The nodes of one scan."""

    def __init__(self, b: Value, parts: int, most_steps: int) -> None:
        from onnxscript import opset18

        self.op: Any = opset18
        self.parts, self.dtype, self.num_steps = parts, b.dtype, b.shape[1]
        self.is_fixed = isinstance(self.num_steps, int)
        self.most = self.num_steps if self.is_fixed else most_steps
        # A known number of few steps is one chunk. Otherwise the square root, which has the fewest nodes.
        largest = torch_in_graphs.chunk_size()
        self.is_one = self.is_fixed and self.most <= largest
        root = next((size for size in range(2, largest) if self.most <= size * size), largest)
        self.size = self.most if self.is_one else root

    def numbers(self, value: Any) -> Value:
        return self.op.Constant(value=_tensor(value, self.dtype))

    def integers(self, *values: int) -> Value:
        return self.op.Constant(value_ints=values)

    def scan(self, a: Value, b: Value, h: Value, reset: Value, reverse: bool) -> Value:
        op, size = self.op, self.size
        zero = self.numbers(0.0)
        if self.num_steps == 1:
            h = h if reset is None else op.Where(op.Unsqueeze(reset, self.integers(*range(2, len(b.shape)))), zero, h)
            if self.parts > 1:
                h = op.Unsqueeze(h, self.integers(-2))
            out = op.Add(self._product(self._matrix(a, -1), h, -1), b)
            return out, out
        spaces = b.shape[2 : len(b.shape) - (self.parts > 1)]
        of_space = op.Shape(b, start=2, end=2 + len(spaces))
        a, b, h = (self._parts_first(x, len(spaces)) for x in (a, b, h))
        of_features = op.Shape(b, start=3, end=4)
        if reverse:
            a, b = self._flipped(a, 2), self._flipped(b, 2)
            reset = None if reset is None else self._flipped(reset, 1)
        count = self.integers(self.num_steps) if self.is_fixed else op.Shape(b, start=2, end=3)
        a, b = (op.Unsqueeze(self._chunks(x, 2, count, of_features), self.integers(_COLUMNS)) for x in (a, b))
        x = first = op.Unsqueeze(h, self.integers(_COLUMNS, _CHUNKS))
        if not self.is_one:
            # Beside the state, a column for the decay. They begin as 0 and as 1.
            b = op.Pad(b, self.integers(0, 1, *[0] * 10))
            x = self.numbers([[[[[[float(part == 0)]]]], [[[[0.0]]]]] for part in range(self.parts)])
        resets: Sequence[Value | None] = [None] * size
        if reset is not None:
            reset = op.Unsqueeze(self._chunks(reset, 1, count), self.integers(3))
            resets = self._split(reset, 2, size)
        steps = []
        decays, inputs = (self._split(each, -2, size) for each in (self._matrix(a), b))
        for decay, own, mask in zip(decays, inputs, resets, strict=True):
            # Masked instead of multiplied by 0, so that NaN does not pass a reset.
            x = op.Add(self._product(decay, x if mask is None else op.Where(mask, zero, x)), own)
            steps.append(x)
        out = op.Concat(*steps, axis=_STEPS) if size > 1 else x
        if not self.is_one:
            # The numbers are the types int32 and bool.
            seen = None if reset is None else op.Cast(op.CumSum(op.Cast(reset, to=6), op.Constant(value_int=2)), to=9)
            carry = self._carry_in(x, first, seen, zero, count)
            decay, state = self._split(out, _COLUMNS, 2)
            # The matrix of the carry-in, which is smaller than that of the decays.
            added = self._product(self._matrix(carry, 0, right=True), decay)
            out = op.Add(state, added if seen is None else op.Where(seen, zero, added))
        shape = op.Concat(self.integers(0, 0, -1), of_features, axis=0)
        out = op.Reshape(op.Squeeze(out, self.integers(_COLUMNS)), shape)
        if not self.is_fixed or self.num_steps % size:
            out = op.Slice(out, self.integers(0), count, self.integers(2))
        end = self.integers(-1), self.integers(1 << 62), self.integers(2)
        last = op.Slice(out, *end)
        if not self.is_fixed:
            # The state of no steps stays.
            last = op.Slice(op.Concat(h, last, axis=2), *end)
        out = self._flipped(out, 2) if reverse else out
        return tuple(self._parts_last(each, of_space, len(spaces)) for each in (out, last))

    def turned(self, keep: Value, unit: Value, b: Value, h: Value) -> Value:
        """Return b + keep h, of which the second half is turned by unit (B, 1, H / 8, 4).

        The part i ^ j of the unit times the part j of h is added to the part i of the product.
        """
        op, rows = self.op, range(4)
        pairs = [(i, j) for i in rows for j in rows]
        of_unit = self.numbers([[float(part == i ^ j) for i, j in pairs] for part in rows])
        of_h = self.numbers([[float(part == j) for _, j in pairs] for part in rows])
        to_product = self.numbers([[float(_SIGNS[i][j] * (part == i)) for part in rows] for i, j in pairs])
        still, turning = op.Split(h, num_outputs=2, axis=2)
        turning = op.Reshape(turning, self.integers(0, 1, -1, 4))
        product = op.MatMul(op.Mul(op.MatMul(unit, of_unit), op.MatMul(turning, of_h)), to_product)
        turned = op.Concat(still, op.Reshape(product, self.integers(0, 1, -1)), axis=2)
        return op.Add(b, op.Mul(keep, turned))

    def _carry_in(self, totals: Value, first: Value, seen: Value, zero: Value, count: Value) -> Value:
        """Return the state before each chunk, (P, 1, B, C, 1, F), from the decays and states of whole chunks.

        By recursive doubling, as in `torch_in_graphs`. Before the chunks, there are h, whose decay is 0, and zeros.
        """
        op = self.op
        decay, state = self._split(totals, _COLUMNS, 2)
        decay = op.Pad(decay, self.integers(*[0] * _CHUNKS, 2, *[0] * 8))
        state = op.Concat(op.Pad(first, self.integers(*[0] * _CHUNKS, 1, *[0] * 8)), state, axis=_CHUNKS)
        if seen is not None:
            seen = op.Slice(seen, self.integers(-1), self.integers(1 << 62), self.integers(2))
            seen = op.Pad(seen, self.integers(0, 2, *[0] * 6))
        number = op.Squeeze(op.Shape(state, start=_CHUNKS, end=_CHUNKS + 1))
        positions = op.Range(op.Constant(value_int=0), number, op.Constant(value_int=1))
        distance, most_chunks = 1, -(-self.most // self.size)
        while distance < most_chunks + 1:
            sources = op.Max(op.Sub(positions, self.integers(distance)), self.integers(0))
            own = self._matrix(decay, 0)
            before = op.Gather(state, sources, axis=_CHUNKS)
            state = op.Add(state, self._product(own, before if seen is None else op.Where(seen, zero, before)))
            decay = self._product(own, op.Gather(decay, sources, axis=_CHUNKS))
            if seen is not None:
                decay = op.Where(seen, zero, decay)
                seen = op.Or(seen, op.Gather(seen, sources, axis=1))
            distance *= 2
        if not self.is_fixed:
            # Otherwise nothing would show that a sequence is too long.
            state = op.Where(op.Greater(count, self.integers(self.most)), self.numbers(float("nan")), state)
        return op.Slice(state, self.integers(1), self.integers(-1), self.integers(_CHUNKS))

    def _matrix(self, a: Value, at: int = 0, right: bool = False) -> Value:
        """Return M(a) from parts in dimension `at`, in two dimensions there; if `right`, the M' of b a = M'(a) b.

        The matrices of `right` are smaller where a has fewer elements than b.
        """
        if self.parts == 1:
            return a
        rows = range(self.parts)
        order = [[i ^ j for j in rows] for i in rows]
        signs = [[float(_SIGNS[i][i ^ j if right else j]) for j in rows] for i in rows]
        trailing = [1] * (0 if at else 5)
        matrix = self.op.Gather(a, self.op.Constant(value=_tensor(order, 7)), axis=at)
        return self.op.Mul(matrix, self.op.Reshape(self.numbers(signs), self.integers(*[self.parts] * 2, *trailing)))

    def _product(self, matrix: Value, x: Value, at: int = 1) -> Value:
        product = self.op.Mul(matrix, x)
        return product if self.parts == 1 else self.op.ReduceSum(product, self.integers(at), keepdims=0)

    def _chunks(self, x: Value, at: int, count: Value, *trailing: Value) -> Value:
        """Return x with the time, its dimension `at`, in two dimensions: chunks, and their steps."""
        op, rank = self.op, at + 1 + len(trailing)
        if not self.is_fixed or self.num_steps % self.size:
            more = op.Mod(op.Neg(count), self.integers(self.size))
            after = [self.integers(*[0] * len(trailing))] if trailing else []
            x = op.Pad(x, op.Concat(self.integers(*[0] * (rank + at)), more, *after, axis=0))
        return op.Reshape(x, op.Concat(self.integers(*[0] * at, -1, self.size), *trailing, axis=0))

    def _split(self, x: Value, dim: int, count: int) -> Sequence[Value]:
        return self.op.Split(x, num_outputs=count, axis=dim) if count > 1 else [x]

    def _flipped(self, x: Value, dim: int) -> Value:
        return self.op.Slice(x, *map(self.integers, (-1, -(1 << 62), dim, -1)))

    def _parts_first(self, x: Value, rest: int) -> Value:
        """Return (B, S, *, P) as (P, B, S, F)."""
        op = self.op
        x = op.Unsqueeze(x, self.integers(0)) if self.parts == 1 else op.Transpose(x, perm=[2 + rest, *range(2 + rest)])
        return x if rest == 1 else op.Reshape(x, self.integers(0, 0, 0, -1))

    def _parts_last(self, x: Value, of_space: Value, rest: int) -> Value:
        op = self.op
        if rest > 1:
            x = op.Reshape(x, op.Concat(self.integers(0, 0, 0), of_space, axis=0))
        return op.Squeeze(x, self.integers(0)) if self.parts == 1 else op.Transpose(x, perm=[*range(1, 3 + rest), 0])


def _tensor(value: Any, dtype: int) -> Any:
    from onnx_ir import DataType, tensor

    return tensor(value, DataType(dtype))
