"""The arguments of a recurrence: its cell, its states, resets and elapsed times, and its memory layout.

To add an option, add it here, to the cells, and to the kernels; CONTRIBUTING.md names the places.

NamedTuples without methods, because TorchScript compiles the functions that take them. TorchScript refines an optional
field only after it was read into a local variable.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Spec(NamedTuple):
    """Cell, activation, direction, lower bound of the decay, and what else a kernel of a linear map includes.

    It has no defaults: `torch.compile(dynamic=True)` would make a default number a symbol, which two autograd functions
    cannot share.
    """

    cell: str
    """Cell type, one of `cells.CELLS`."""
    activation: str
    """Activation of the candidate, one of `activation.ACTIVATIONS`."""
    reverse: bool
    """Whether the scan runs from the last step to the first."""
    min_decay: float
    """Lower bound m of |a| per unit of time, from 0 to 1 (exclusive); see `cells.coefficients`."""
    norm: str
    """"rms" or "layer" if the linear map is of the normalized x; see `linear_map.normalized`."""
    eps: float
    """Number in the norm that is added to the variance."""
    output_gate: bool
    """Whether the last rows of the linear map are an output gate; see `linear_map.gated`."""


class Context(NamedTuple):
    """What a recurrence has beside its inputs: states, resets, elapsed times, and recurrent weights."""

    h: Tensor
    """State before the first step, (B, 1, *)."""
    initial_state: Tensor
    """Value of h_{t-1} if step t has a reset; expandable to (B, 1, *)."""
    reset: Tensor | None
    """Boolean reset mask with the leading dimensions of the sequences."""
    dt: Tensor | None = None
    """Time since the step before, with the leading dimensions of the sequences, accumulation dtype. None means 1."""
    recurrent: Tensor | None = None
    """Recurrent weights of the cell "gru", (3 H, K); see `ops.block_recurrence`."""
    recurrent_bias: Tensor | None = None
    """Their bias, (H)."""


class Layout(NamedTuple):
    """Layout of the sequences: (B, S, *), (S, B, *) if `time_first`, or packed, (P, *); see `ops.layout`."""

    time_first: bool
    """Whether padded sequences are (S, B, *)."""
    batch_sizes: Tensor | None = None
    """Number of sequences that have each step, (S), int64, on the CPU; None if the sequences are not packed."""
    lengths: Tensor | None = None
    """Number of valid steps of each padded sequence, (B), int64, from 0 to S; None if all steps are valid. The other
    steps are the padding: they keep the state, and their output is 0."""


BATCH_FIRST = Layout(False)


class Call(NamedTuple):
    """A recurrence and everything that it is computed from."""

    spec: Spec
    tensors: list[Tensor]
    """The inputs of the cell, its pre-activations. For a kernel of a linear map: x, and weight and bias or None."""
    context: Context
    layout: Layout


# The fields as tuples, because a trace can pass tuples to a scripted function, but no NamedTuple.
SpecTuple = tuple[str, str, bool, float, str, float, bool]
ContextTuple = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
LayoutTuple = tuple[bool, Tensor | None, Tensor | None]


def call_of(spec: SpecTuple, tensors: list[Tensor], context: ContextTuple, layout: LayoutTuple) -> Call:
    """Return the call of these tuples."""
    return Call(Spec(*spec), tensors, Context(*context), Layout(*layout))


def spec_of(cell: str, activation: str, reverse: bool, min_decay: float) -> Spec:
    """Return the spec of a recurrence alone."""
    return Spec(cell, activation, reverse, min_decay, "", 0.0, False)


_PLAIN = spec_of("", "", False, 0.0)[4:]


def is_plain(spec: Spec) -> bool:
    """Return whether every kernel of the cell computes all that a spec says; of a GRU, `torch.nn.GRU` does."""
    return spec[4:] == _PLAIN and (spec.cell != "gru" or (spec.activation == "tanh" and spec.min_decay == 0.0))


def with_steps(context: Context, reset: Tensor | None, dt: Tensor | None) -> Context:
    """Return a context with other resets and elapsed times, the values that belong to steps."""
    return Context(context.h, context.initial_state, reset, dt, *context[4:])


def flattened(context: Context, layout: Layout) -> list[Any]:
    """Return all tensors in one list, for kernels and autograd, in the order of csrc/scan.h. The inputs follow."""
    return [*context, *layout[1:]]


# The index of the first input in such a list.
FIRST_INPUT = len(Context._fields) + len(Layout._fields) - 1


def from_flat(spec: Spec, tensors: Sequence[Any], time_first: bool) -> Call:
    """Return the call of such a list."""
    at = len(Context._fields)
    layout = Layout(time_first, *tensors[at:FIRST_INPUT])
    return Call(spec, [*tensors[FIRST_INPUT:]], Context(*tensors[:at]), layout)
