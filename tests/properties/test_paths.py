"""Every path of the kernels in every kind of call, compared with the backend "sequential" under torch's own autograd.

A path is what one kernel computes together, or what stands between two kernels. All pairs of a path and a kind of call
are tests. What is given and what is trained change from row to row, so that every two values of two columns meet.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from cases import DOUBLE, WRAPS, Case, assert_equal, case, loss_of, on_meta, small_chunks, stack, tensors
from options import lengths_of, steps_of
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

import mingru
from mingru import GRU, MinGRU, MinLSTM, drop_in
from mingru.ops import autograd


def wrapped(way: str, kind: Any, *sizes: Any, **options: Any) -> Any:
    module = kind(*sizes, **options)
    WRAPS[way](module)
    return module


PATHS = [
    case("map", MinGRU, 4, 8),
    case("map without bias", MinLSTM, 4, 8, bias=False, normalize=False),
    case("two maps", MinGRU, 4, 8, 2),
    case("both directions", MinGRU, 4, 8, bidirectional=True, candidate="tanh"),
    case("rms", MinGRU, 4, 4, 2, norm="rms", residual=True),
    case("layer", MinLSTM, 4, 8, norm="layer"),
    case("mixture", MinGRU, 4, 8, gate="mixed"),
    case("mixture with norm", MinGRU, 4, 8, 2, gate="mixed", norm="rms", residual=True),
    case("rotation", MinGRU, 4, 8, gate="rotation", min_decay=0.3),
    case("quaternion", MinGRU, 4, 8, 2, gate="quaternion"),
    case("signed", MinGRU, 4, 8, gate="signed", learn_initial_state=True),
    case("output gate", MinGRU, 4, 8, 2, output_gate="silu"),
    case("output gate of a mixture", MinGRU, 4, 8, gate="mixed", norm="rms", output_gate="silu"),
    case("highway", MinGRU, 4, 4, residual="highway"),
    case("recomputed", MinGRU, 4, 8, norm="rms", recompute=True),
    case("kept", MinGRU, 4, 8, recompute=False),
    case("blocks", GRU, 4, 8, 2, block_size=4),
    case("blocks with norm", GRU, 4, 8, norm="rms", residual=True, bidirectional=True),
    case("step of one block", GRU, 4, 8),
    case("step", MinGRU, 4, 8, 2, norm="rms", residual=True),
    case("blocks, hooked", partial(wrapped, "hook", GRU), 4, 8, 2, block_size=4),
    case("blocks of low rank", partial(wrapped, "low rank", GRU), 4, 8, norm="rms", bidirectional=True),
    case("one block, parametrized", partial(wrapped, "parametrized", GRU), 4, 4, residual=True),
    case("projection", drop_in.LSTMLike, 4, 8, proj_size=2, batch_first=True, cell="mingru"),
    case("convolution", mingru.models.Block, 4, conv=3, mlp=2),
    case("convolution of a mixture", mingru.models.Block, 4, conv=2, expansion=2, gate="mixed"),
    stack("stack", lambda **factory: MinGRU(4, 8, 2, **factory), lambda **factory: MinLSTM(8, 8, **factory)),
]
GIVEN = ["x", "reset", "lengths", "packed", "dt"]
TRAINED = ["all", "x", "weights", "first weight", "last weight"]


class Row:
    """A module, what it is called with, and the tensors that need a gradient."""

    def __init__(self, path: Case, given: str, trained: str) -> None:
        self.module = path.varied(**DOUBLE)
        steps = 1 if path.name.startswith("step") else 5
        self.x, self.given = torch.randn(3, steps, 4, **DOUBLE), {}
        lengths, (reset, dt) = lengths_of(3, steps, 1), steps_of(3, steps, **DOUBLE)
        self.batch_sizes = (lengths > torch.arange(steps).unsqueeze(1)).sum(1)
        self.is_packed = given == "packed" and not path.name.startswith("convolution")
        if self.is_packed:
            self.x = self.x.flatten(0, 1)[: lengths.sum()]
        elif given in path.takes:
            self.given = {given: {"reset": reset, "lengths": lengths, "dt": dt}[given]}
        names = [name for name, _ in self.module.named_parameters()]
        chosen = {"all": names, "x": [], "weights": names, "first weight": names[:1], "last weight": names[-1:]}
        self.names = chosen[trained]
        for name, weight in self.module.named_parameters():
            weight.requires_grad_(name in self.names)
        self.trains_x = trained in ("all", "x")
        weights = dict(self.module.named_parameters())
        self.x.requires_grad_(self.trains_x)
        self.leaves = [*([self.x] if self.trains_x else []), *(weights[name] for name in self.names)]

    def call(self, x: Tensor) -> list[Tensor]:
        """Return the outputs and states, without the batch sizes of packed outputs."""
        given = PackedSequence(x, self.batch_sizes) if self.is_packed else x
        return [each for each in tensors(self.module(given, **self.given)) if each.is_floating_point()]

    def of(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        """Return the same of other leaves."""
        x = leaves[0] if self.trains_x else self.x
        weights = dict(zip(self.names, leaves[self.trains_x :], strict=True))
        with torch.nn.utils.stateless._reparametrize_module(self.module, weights):
            return tuple(self.call(x))

    def grads(self, outputs: Any, **options: Any) -> Any:
        outputs = [each for each in outputs if each.requires_grad]
        return torch.autograd.grad(loss_of(outputs), self.leaves, allow_unused=True, materialize_grads=True, **options)


def first(row: Row) -> Any:
    outputs = row.call(row.x)
    return outputs, row.grads(outputs)


def second(row: Row) -> Any:
    return row.grads(row.grads(row.call(row.x), create_graph=True))


def batched(row: Row) -> Any:
    outputs = [each for each in row.call(row.x) if each.requires_grad]
    given = [torch.stack([each.cos(), each.detach(), each.exp()]).detach() for each in outputs]
    options = {"is_grads_batched": True, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(outputs, row.leaves, given, **options)


def forward_mode(row: Row) -> Any:
    return jvp(row.of, tuple(row.leaves), tuple(each.detach().cos() for each in row.leaves))


def mapped(row: Row) -> Any:
    return vmap(row.of)(*(torch.stack([each, each.cos()]).detach() for each in row.leaves))


def mapped_gradient(row: Row) -> Any:
    function = grad(lambda *leaves: loss_of(row.of(*leaves)), tuple(range(len(row.leaves))))
    return vmap(function)(*(torch.stack([each, each.cos()]).detach() for each in row.leaves))


def checkpointed(row: Row) -> Any:
    return row.grads(checkpoint(row.call, row.x, use_reentrant=False))


def in_a_device_context(row: Row) -> Any:
    outputs = on_meta(row.call, row.x)
    return outputs, row.grads(outputs)


def changed_in_place(row: Row) -> Any:
    out, *states = row.call(row.x)
    outputs = [out.add_(1).relu_(), *states]
    return outputs, row.grads(outputs)


def changed_in_place_without_a_copy(row: Row) -> Any:
    with mock.patch.object(autograd, "COPIED", 0):
        return changed_in_place(row)


def without_gradients(row: Row) -> Any:
    with torch.no_grad():
        return row.call(row.x)


def compiled(row: Row, dynamic: bool) -> Any:
    outputs = torch.compile(row.call, fullgraph=True, backend="aot_eager", dynamic=dynamic)(row.x)
    return outputs, row.grads(outputs)


EAGER = [first, second, batched, forward_mode, mapped, mapped_gradient, checkpointed]
EAGER += [without_gradients, changed_in_place, changed_in_place_without_a_copy, in_a_device_context]


def rows(path: Case, index: int, count: int = 5) -> Iterator[Row]:
    """Yield rows of a kind of call in which each value of both columns occurs once."""
    shift = PATHS.index(path) + index
    for row in range(count):
        at = (row + 3 * shift) % 5
        yield Row(path, GIVEN[at], TRAINED[(at + shift) % 5])


each_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)


@pytest.mark.parametrize("kind", EAGER, ids=lambda kind: kind.__name__)
@each_path
def test_eager(path, kind):
    for row in rows(path, EAGER.index(kind)):
        found = kind(row)
        with mingru.use_backend("sequential"):
            assert_equal(found, kind(row))


# A graph of any size takes long to make of several cells.
OF_ANY_SIZE = [
    pytest.param(path, True, id=f"{path.name}, dynamic", marks=[pytest.mark.slow] * ("mixture" in path.name))
    for path in PATHS
]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("path", "dynamic"), [*(pytest.param(path, False, id=path.name) for path in PATHS), *OF_ANY_SIZE]
)
def test_compiled(path, dynamic):
    """What a compiled call must be equal to is the same call in eager mode."""
    with small_chunks():
        for row in rows(path, len(EAGER) + dynamic, 1):
            assert_equal(compiled(row, dynamic), first(row))
