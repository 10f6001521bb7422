"""Test cases of every mode: each class of the library, and a model that combines several classes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import mingru
from mingru.ops.backends import traceable

# Input features, state features, and pixels in each spatial dimension.
INPUT, HIDDEN, PIXELS = 3, 4, 5


class Case(NamedTuple):
    """A small module of a class and its inputs: `make(**factory)(x, h, reset)`."""

    name: str
    make: Callable[..., nn.Module]
    # Shape of x after batch and time.
    features: tuple[int, ...] = (INPUT,)
    # Shape of the state for a batch size, or a list of shapes if the state is a list of tensors.
    states: Callable[[int], Any] = lambda batch: (2, batch, 1, HIDDEN)
    # Dimensions of x; cells have no time dimension.
    batch_dim: int = 0
    time_dim: int | None = 1
    # Type of a list of states.
    of_states: type = list

    def x(self, batch: int = 2, steps: int = 7, **factory: Any) -> Tensor:
        leading = {self.batch_dim: batch}
        if self.time_dim is not None:
            leading[self.time_dim] = steps
        return torch.randn(*(leading[dim] for dim in sorted(leading)), *self.features, **factory)

    def h(self, batch: int = 2, **factory: Any) -> Any:
        sizes = self.states(batch)
        if isinstance(sizes, list):
            return self.of_states(torch.randn(each, **factory) for each in sizes)
        return torch.randn(sizes, **factory)

    def reset(self, batch: int = 2, steps: int = 7) -> Tensor:
        leading = {self.batch_dim: batch}
        if self.time_dim is not None:
            leading[self.time_dim] = steps
        return torch.rand(*(leading[dim] for dim in sorted(leading))) < 0.3

    def dynamic(self, batch: Any, steps: Any) -> tuple[Any, Any]:
        """Return the dynamic dimensions of x and h, as `dynamic_shapes` of `torch.export` expects them."""
        x_dims = {self.batch_dim: batch}
        if self.time_dim is not None:
            x_dims[self.time_dim] = steps
        # A state's batch dimension is the one that differs between batches of 2 and 3.
        one, two = self.states(2), self.states(3)
        if isinstance(one, list):
            return x_dims, self.of_states(_differing(*pair, batch) for pair in zip(one, two, strict=True))
        return x_dims, _differing(one, two, batch)


def _differing(one: tuple[int, ...], two: tuple[int, ...], batch: Any) -> dict[int, Any]:
    return {dim: batch for dim, (a, b) in enumerate(zip(one, two, strict=True)) if a != b}


def tensors(outputs: Any) -> list[Tensor]:
    """Return all tensors in the outputs of a module, in order."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def assert_equal(got: Any, expected: Any, **tolerance: Any) -> None:
    """Check that both outputs have the same number of tensors, and that these are close."""
    pairs = list(zip(tensors(got), tensors(expected), strict=True))
    assert pairs
    for one, other in pairs:
        torch.testing.assert_close(one, other, **tolerance)


class Model(nn.Module):
    """A model that combines several classes and takes and returns their states."""

    def __init__(self, **factory: Any) -> None:
        super().__init__()
        self.encoder = nn.Linear(INPUT, 6, **factory)
        self.images = mingru.MinConv1dGRU(1, 2, 3, padding=1, **factory)
        self.stack = mingru.Stack(
            [
                mingru.MinGRU(12, HIDDEN, bidirectional=True, norm="rms", **factory),
                mingru.MinLSTM(8, HIDDEN, **factory),
            ],
            residual=True,
        )
        self.rnn = mingru.drop_in.GRU(HIDDEN, HIDDEN, batch_first=True, **factory)
        self.cell = mingru.MinGRUCell(HIDDEN, HIDDEN, norm="layer", **factory)
        self.head = nn.Linear(2 * HIDDEN, 2, **factory)

    def forward(
        self, x: Tensor, h: list[Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        images: list[Tensor] | None = None
        stack: list[Tensor] | None = None
        rnn: Tensor | None = None
        cell: Tensor | None = None
        if h is not None:
            images, stack, rnn, cell = h[:1], h[1:3], h[3], h[4]
        y = self.encoder(x).unsqueeze(2)
        y, after_images = self.images(y, images, reset)
        y, after_stack = self.stack(y.flatten(2, 3), stack, reset)
        y, after_rnn = self.rnn(y, rnn)
        state = self.cell(y.mean(1), cell)
        y = torch.cat([y, state.unsqueeze(1).expand_as(y)], 2)
        return self.head(y), after_images + after_stack + [after_rnn, state]


def _conv(dims: int) -> Case:
    space = (PIXELS,) * dims
    return Case(
        f"MinConv{dims}dGRU",
        lambda **factory: getattr(mingru, f"MinConv{dims}dGRU")(
            INPUT, HIDDEN, 3, num_layers=2, stride=[1, 2], padding=1, norm="group", **factory
        ),
        (INPUT, *space),
        lambda batch: [(batch, 1, HIDDEN, *space), (batch, 1, HIDDEN, *((PIXELS + 1) // 2,) * dims)],
    )


def _conv_cell(dims: int) -> Case:
    space = (PIXELS,) * dims
    return Case(
        f"MinConv{dims}dGRUCell",
        lambda **factory: getattr(mingru, f"MinConv{dims}dGRUCell")(INPUT, HIDDEN, 3, padding=1, **factory),
        (INPUT, *space),
        lambda batch: (batch, HIDDEN, *space),
        time_dim=None,
    )


CASES = [
    Case("MinGRU", lambda **factory: mingru.MinGRU(INPUT, HIDDEN, 2, residual=True, norm="layer", **factory)),
    Case(
        "MinLSTM",
        lambda **factory: mingru.MinLSTM(INPUT, HIDDEN, bidirectional=True, learn_initial_state=True, **factory),
    ),
    Case(
        "MinGRU (signed)",
        lambda **factory: mingru.MinGRU(INPUT, HIDDEN, gate="signed", candidate="tanh", **factory),
        states=lambda batch: (1, batch, 1, HIDDEN),
    ),
    Case(
        "MinGRU (rotation)",
        lambda **factory: mingru.MinGRU(INPUT, HIDDEN, gate="rotation", candidate="tanh", min_decay=0.3, **factory),
        states=lambda batch: (1, batch, 1, HIDDEN),
    ),
    Case(
        "MinGRU (quaternion)",
        lambda **factory: mingru.MinGRU(INPUT, HIDDEN, gate="quaternion", min_decay=0.3, **factory),
        states=lambda batch: (1, batch, 1, HIDDEN),
    ),
    *(_conv(dims) for dims in (1, 2, 3)),
    Case(
        "Stack",
        lambda **factory: mingru.Stack(
            [
                mingru.MinGRU(INPUT, HIDDEN, 2, **factory),
                mingru.MinLSTM(HIDDEN, 5, normalize=False, **factory),
                mingru.MinGRU(5, 5, residual="highway", **factory),
            ],
            residual=True,
        ),
        states=lambda batch: [(2, batch, 1, HIDDEN), (1, batch, 1, 5), (1, batch, 1, 5)],
    ),
    Case(
        "MinGRUCell",
        lambda **factory: mingru.MinGRUCell(INPUT, HIDDEN, **factory),
        states=lambda batch: (batch, HIDDEN),
        time_dim=None,
    ),
    Case(
        "MinLSTMCell",
        lambda **factory: mingru.MinLSTMCell(INPUT, HIDDEN, candidate="tanh", normalize=False, **factory),
        states=lambda batch: (batch, HIDDEN),
        time_dim=None,
    ),
    *(_conv_cell(dims) for dims in (1, 2, 3)),
    Case(
        "drop_in.GRU",
        lambda **factory: mingru.drop_in.GRU(INPUT, HIDDEN, 2, **factory),
        states=lambda batch: (2, batch, HIDDEN),
        batch_dim=1,
        time_dim=0,
    ),
    Case(
        "drop_in.GRUCell",
        lambda **factory: mingru.drop_in.GRUCell(INPUT, HIDDEN, **factory),
        states=lambda batch: (batch, HIDDEN),
        time_dim=None,
    ),
    Case(
        "drop_in.LSTM",
        lambda **factory: mingru.drop_in.LSTM(INPUT, HIDDEN, bidirectional=True, **factory),
        states=lambda batch: [(2, batch, HIDDEN), (2, batch, HIDDEN)],
        batch_dim=1,
        time_dim=0,
        of_states=tuple,
    ),
    Case(
        "drop_in.LSTMCell",
        lambda **factory: mingru.drop_in.LSTMCell(INPUT, HIDDEN, **factory),
        states=lambda batch: [(batch, HIDDEN), (batch, HIDDEN)],
        time_dim=None,
        of_states=tuple,
    ),
    Case(
        "models.Block",
        lambda **factory: mingru.models.Block(INPUT, expansion=5 / 3, conv=3, mlp=2, **factory),
        states=lambda batch: [(1, batch, 1, 5), (1, batch, 2, INPUT)],
    ),
    Case(
        "combined model",
        Model,
        states=lambda batch: [
            (batch, 1, 2, 6),
            (2, batch, 1, HIDDEN),
            (1, batch, 1, HIDDEN),
            (1, batch, HIDDEN),
            (batch, HIDDEN),
        ],
    ),
]


_WITHOUT_LENGTHS = ("Cell", "Conv", "combined")
CASES_WITH_LENGTHS = [case for case in CASES if not any(part in case.name for part in _WITHOUT_LENGTHS)]


def parametrized(cases: list[Case], quick: Sequence[str] | None = None) -> pytest.MarkDecorator:
    """Run a test on each case. The cases that `quick` does not name are marked as slow; None marks none."""
    params = []
    for case in cases:
        marks = [] if quick is None or case.name in quick else [pytest.mark.slow]
        params.append(pytest.param(case, marks=marks, id=case.name))
    return pytest.mark.parametrize("case", params)


def selected_cases(request: pytest.FixtureRequest) -> list[Case]:
    """Return the cases of this run's tests that use the requesting fixture of a module."""
    items = [
        item
        for item in request.session.items
        if getattr(item, "module", None) is request.module and request.fixturename in item.fixturenames
    ]
    names = {item.callspec.params["case"].name for item in items}
    return [case for case in CASES if case.name in names]


# The classes of `drop_in` share their code; `drop_in.LSTM` has the most.
every_case = parametrized(CASES, quick=[case.name for case in CASES if not case.name.startswith("drop_in.GRU")])
# The quick tests of a mode that compiles use a layer and a cell.
every_case_of_few_quick = parametrized(CASES, quick=["MinGRU", "MinGRUCell"])
every_case_slowly = parametrized(CASES, quick=[])
every_convolution = parametrized([case for case in CASES if "Conv" in case.name])


def _four() -> int:
    return 4


@contextmanager
def small_chunks() -> Iterator[None]:
    """Use chunks of 4 steps instead of 16, because exporting then takes a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traceable, "chunk_size", _four)
        yield
