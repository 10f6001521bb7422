"""Modules of every class of the library with its options, and what they are called with: the rows of the tests.

tests/properties checks what holds for each row. The first rows, `CASES`, are the classes of docs/more/modes.md, which
tests/modes runs in every mode. In the others, every two values of two options meet in one row.
"""

import inspect
import io
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from options import CALLS, CANDIDATES, CELLS, DOUBLE, EXACT, GATED, TIGHT, cover, named, steps_of  # noqa: F401
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils import _pytree as pytree

import mingru
from mingru import drop_in
from mingru.ops.backends import torch_in_graphs

# Input features, state features, and pixels in each spatial dimension.
INPUT, HIDDEN, PIXELS = 3, 4, 5
ALL_BACKENDS = [name for name, can_run in mingru.backends().items() if can_run is True]
needs_kernels = pytest.mark.skipif("native" not in ALL_BACKENDS, reason=str(mingru.backends()["native"]))
# "log" takes neither resets nor times, and needs a positive candidate.
BACKENDS = [name for name in ALL_BACKENDS if name != "log"]


class Case:
    """A small module of a class and its inputs: `make(**factory)(**args(**factory))`."""

    def __init__(self, name: str, make: Callable[..., nn.Module], features: tuple[int, ...] = (INPUT,)) -> None:
        # `features` is the shape of x after batch and time.
        self.name, self.make, self.features = name, make, features

    @cached_property
    def module(self) -> Any:
        """A module to ask, not to compare."""
        with torch.random.fork_rng(devices=[]):
            return self.make()

    @cached_property
    def is_cell(self) -> bool:
        return type(self.module).__name__.endswith("Cell")

    @property
    def of_torch(self) -> bool:
        """Whether the module has torch's interface."""
        return isinstance(self.module, drop_in.GRULike | drop_in.LSTMLike | drop_in.GRULikeCell | drop_in.LSTMLikeCell)

    @cached_property
    def batch_dim(self) -> int:
        return 0 if self.is_cell or getattr(self.module, "batch_first", True) else 1

    @cached_property
    def time_dim(self) -> int | None:
        return None if self.is_cell else 1 - self.batch_dim

    @cached_property
    def states(self) -> list[Any]:
        """The states of a batch of 2 and of 3."""
        with torch.no_grad():
            outputs = [self.module(torch.zeros(*self.leading(batch, 1), *self.features)) for batch in (2, 3)]
        return outputs if self.is_cell else [states for _, states in outputs]

    @cached_property
    def state_dims(self) -> list[int]:
        """The batch dimension of each state: that which differs between batches of 2 and 3."""
        pairs = zip(*map(tensors, self.states), strict=True)
        return [[a == b for a, b in zip(one.shape, two.shape, strict=True)].index(False) for one, two in pairs]

    def of_states(self, states: Any) -> Any:
        """Something for each state, in the form in which the module takes states."""
        return pytree.tree_unflatten(list(states), pytree.tree_structure(self.states[0]))

    @cached_property
    def takes(self) -> tuple[str, ...]:
        """Which of reset, lengths and dt the module takes."""
        names = inspect.signature(type(self.module).forward).parameters
        modules = list(self.module.modules())
        without = {"dt"} if not all(getattr(each, "_is_timed", True) for each in modules) else set()
        if any(getattr(each, "num_space_dims", 0) for each in modules):
            without |= {"dt", "lengths"}
        return tuple(name for name in ("reset", "lengths", "dt") if name in names and name not in without)

    def leading(self, batch: int, steps: int) -> list[int]:
        sizes = {self.batch_dim: batch}
        if self.time_dim is not None:
            sizes[self.time_dim] = steps
        return [sizes[dim] for dim in sorted(sizes)]

    def dynamic(self, batch: Any, steps: Any) -> tuple[Any, Any]:
        """Return the dynamic dimensions of x and h, as `dynamic_shapes` of `torch.export` expects them."""
        x_dims = {self.batch_dim: batch} | ({} if self.time_dim is None or steps is None else {self.time_dim: steps})
        return x_dims, self.of_states({dim: batch} for dim in self.state_dims)

    def varied(self, **factory: Any) -> nn.Module:
        """A module without parameters at which a forgotten norm or initial state would not show."""
        module = self.make(**factory)
        with torch.no_grad():
            for name, weight in module.named_parameters():
                if "norm" in name or "initial_state" in name or name.startswith("mlp.0"):
                    weight.add_(torch.randn_like(weight) / 4)
        return module

    @cached_property
    def unrolls(self) -> bool:
        """Whether a graph of `torch.compile` has each step of its example, and takes no other length."""
        return any(getattr(each, "cell", None) == "gru" for each in self.module.modules())

    @cached_property
    def steps(self) -> int:
        """More than a chunk of steps, where there may be chunks."""
        return 6 if self.is_cell or len(self.features) > 1 else 21

    def given(self, batch: int = 3, steps: int | None = None, **factory: Any) -> dict[str, Any]:
        """All that `call` takes but lengths, alike for all classes: the batch first, and a list of states."""
        steps = self.steps if steps is None else steps
        reset, dt = steps_of(batch, steps, **factory)
        x = torch.randn(batch, steps, *self.features, **factory)
        shapes = [list(state.shape) for state in tensors(self.states[0])]
        for shape, dim in zip(shapes, self.state_dims, strict=True):
            shape[dim] = batch
        given = {"x": x, "h": [torch.randn(shape, **factory) for shape in shapes], "reset": reset, "dt": dt}
        return given if "dt" in self.takes else {name: each for name, each in given.items() if name != "dt"}

    def args(self, batch: int = 2, steps: int = 7, **factory: Any) -> dict[str, Any]:
        """What is given, as the module takes it; a cell takes the first step."""
        given = self.given(batch, steps, **factory)
        return {name: self.of_states(each) if name == "h" else self.turned(each) for name, each in given.items()}

    def turned(self, each: Tensor) -> Tensor:
        """Something with batch and time, of which a cell takes the first step."""
        return each[:, 0].clone() if self.is_cell else each.transpose(0, self.batch_dim).contiguous()

    def call(self, run: Any, x: Any, h: Any = None, **steps: Any) -> tuple[Tensor, list[Tensor]]:
        """Call `run`, the module or what was made of it, with x and everything else batch first, or packed."""
        state = None if h is None else self.of_states(h)
        steps = {name: each for name, each in steps.items() if each is not None}
        if self.is_cell:
            outs = []
            for t in range(x.shape[1]):
                state = run(x[:, t], state, **{name: each[:, t] for name, each in steps.items()})
                outs.append(tensors(state)[0])
            return torch.stack(outs, 1), tensors(state)
        if not isinstance(x, Tensor):
            out, state = run(x, state, **steps)
            return out, tensors(state)
        steps = {name: each if name == "lengths" else each.transpose(0, self.batch_dim) for name, each in steps.items()}
        out, state = run(x.transpose(0, self.batch_dim), state, **steps)
        return out.transpose(0, self.batch_dim), tensors(state)

    def alone(self, given: dict[str, Any], index: int, length: int | None = None) -> dict[str, Any]:
        """What is given for one sequence, up to its length."""
        one = {name: each[index : index + 1, :length] for name, each in given.items() if name != "h"}
        pairs = zip(given.get("h") or [], self.state_dims, strict=False)
        return one | ({"h": [state.narrow(dim, index, 1) for state, dim in pairs]} if given.get("h") else {})


class LowRank(nn.Module):
    """A linear map, and an addition of low rank."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, (rows, columns) = linear, linear.weight.shape
        self.down = nn.Parameter(torch.randn(2, columns, dtype=linear.weight.dtype) / 4)
        self.up = nn.Parameter(torch.randn(rows, 2, dtype=linear.weight.dtype) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.down.t() @ self.up.t()


def on_maps(wrap: Callable[[nn.Module, str, nn.Linear], Any]) -> Callable[[nn.Module], None]:
    """Return a function that wraps each linear map of a module, with its owner and its name."""

    def run(module: nn.Module) -> None:
        for owner in list(module.modules()):
            for name, each in list(owner.named_children()):
                if type(each) is nn.Linear:
                    wrap(owner, name, each)

    return run


# Ways in which a program wraps linear maps, so that they must be called as modules.
WRAPS = {
    "hook": on_maps(lambda owner, name, linear: linear.register_forward_hook(lambda *_: None)),
    "low rank": on_maps(lambda owner, name, linear: setattr(owner, name, LowRank(linear))),
    "parametrized": on_maps(lambda owner, name, linear: register_parametrization(linear, "weight", nn.Tanh())),
}


def tensors(outputs: Any) -> list[Tensor]:
    """Return all tensors in the outputs of a module, in order."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def assert_equal(got: Any, expected: Any, **tolerance: Any) -> None:
    """Check that both outputs have the same number of tensors, and that these are close."""
    pairs = list(zip(tensors(got), tensors(expected), strict=True))
    assert pairs
    for one, other in pairs:
        torch.testing.assert_close(one, other, **tolerance)


def through_a_file(value: Any, **options: Any) -> Any:
    """Return what `torch.load` makes of what `torch.save` writes."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def padded(case, lengths, **factory):
    """What is given, with NaN in the padding, and random resets."""
    given = case.given(len(lengths), **factory)
    padding = torch.arange(case.steps) >= torch.tensor(lengths).unsqueeze(1)
    if given["x"].is_floating_point():
        given["x"][padding] = torch.nan
    return given, padding


def refuses(error: type[BaseException], message: str, call: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Check that a call raises this error, whose message contains the pattern."""
    with pytest.raises(error, match=message or None):
        call(*args, **options)


def outcome(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return what a call returns, or the type and the text of its error."""
    torch.manual_seed(2)  # for dropout
    try:
        return call(*args, **options)
    except Exception as error:
        return type(error), str(error)


def in_a_process(code: str, *arguments: str, **variables: str) -> str:
    """Return what a program prints in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    environment = os.environ | variables
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def on_meta(call: Callable[..., Any], *args: Any) -> Any:
    """Call something while the default device is another one."""
    with torch.device("meta"):
        return call(*args)


def graded(module: nn.Module, run: Callable[..., Any], given: Any) -> dict[str, Tensor]:
    """Return the outputs by name, and the gradients of all that is given and of all parameters; 0 if there is none."""
    leaves = dict(module.named_parameters())

    def leaf(path: Any, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            name = pytree.keystr(path).replace("['", "").replace("']", "")
            value = leaves[name] = value.detach().clone().requires_grad_()
        return value

    given = pytree.tree_map_with_path(leaf, given)
    out, *states = tensors(run(**given) if isinstance(given, dict) else run(*given))
    found = {"out": out} | {f"state {index}": state for index, state in enumerate(states)}
    # Outside of autocast, as its documentation says.
    with torch.autocast("cpu", enabled=False):
        loss = loss_of(found)
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
    return found | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def loss_of(outputs: Any) -> Any:
    """Return a sum of squares in float32 at least, not all alike, so that no two numbers can be exchanged."""
    wide = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in tensors(outputs)]
    weights = [torch.linspace(-1, 2, each.numel(), dtype=each.dtype).view(each.shape) for each in wide]
    return sum((each.square() * weight).sum() for each, weight in zip(wide, weights, strict=True))


def with_threads(numbers: tuple[int, ...], function: Callable[[], Any]) -> list[Any]:
    """Return the results of a function with these numbers of threads."""
    before = torch.get_num_threads()
    try:
        return [function() for number in numbers if torch.set_num_threads(number) is None]
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_process() -> Iterator[Any]:
    """Let this process be all of a group, and return its mesh."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


Maybe = Tensor | None


def join_processes(rank: int, folder: Path, count: int, seconds: int) -> None:
    """Let this process, with one thread, be one of a group."""
    torch.set_num_threads(1)
    store, timeout = torch.distributed.FileStore(str(folder / "store"), count), timedelta(seconds=seconds)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timeout)


class Model(nn.Module):
    """A model that combines several classes and takes and returns their states."""

    def __init__(self, **factory: Any) -> None:
        super().__init__()
        self.encoder = nn.Linear(INPUT, 6, **factory)
        self.images = mingru.MinConv1dGRU(1, 2, 3, padding=1, **factory)
        first = mingru.MinGRU(12, HIDDEN, bidirectional=True, norm="rms", **factory)
        self.stack = mingru.Stack([first, mingru.MinLSTM(8, HIDDEN, **factory)], residual=True)
        self.rnn = mingru.drop_in.GRULike(HIDDEN, HIDDEN, batch_first=True, **factory, cell="mingru")
        self.cell = mingru.MinGRUCell(HIDDEN, HIDDEN, norm="layer", **factory)
        self.head = nn.Linear(2 * HIDDEN, 2, **factory)

    def forward(self, x: Tensor, h: list[Tensor] | None = None, reset: Maybe = None) -> tuple[Tensor, list[Tensor]]:
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


class Doubled(mingru.modules.Layer, role="sequence"):
    """Two averages over the past, with a trained decay for each feature: a layer of two states and another size."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.input_dims, self.output_dims, self.num_states = dims, 2 * dims, 2
        self.decay = nn.Parameter(torch.linspace(-1.0, 2.0, dims))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.decay)

    def forward(
        self, x: Tensor, h: list[Tensor] | None = None, reset: Maybe = None, lengths: Maybe = None, dt: Maybe = None
    ) -> tuple[Tensor, list[Tensor]]:
        a = self.decay.sigmoid().expand_as(x)
        first = mingru.functional.linear_scan(a, x, None if h is None else h[0].transpose(0, 1), reset=reset)
        second = mingru.functional.linear_scan(a, -2 * x, None if h is None else h[1].transpose(0, 1), reset=reset)
        return torch.cat([first, second], -1), [first[:, -1:].transpose(0, 1), second[:, -1:].transpose(0, 1)]


def case(name: str, kind: Any, *sizes: Any, space: int = 0, **options: Any) -> Case:
    return Case(name, lambda **factory: kind(*sizes, **options, **factory), (sizes[0], *[PIXELS] * space))


def conv(name: str, space: int, hidden: Any = HIDDEN, **options: Any) -> Case:
    return case(name, getattr(mingru, name.partition(" ")[0]), INPUT, hidden, 3, space=space, padding=1, **options)


def stack(name: str, *layers: Any, residual: bool = True, space: int = 0) -> Case:
    """Of layers that are made with a dtype and a device."""
    made = layers[0](device="meta")
    first = getattr(made, "in_features", getattr(made, "input_dims", None))

    def make(**factory: Any) -> nn.Module:
        return mingru.Stack([layer(**factory) for layer in layers], residual=residual)

    return Case(name, make, (first, *[PIXELS] * space))


# Layers of these sizes and options, which are made with a dtype and a device.
GRU, LSTM = partial(partial, mingru.MinGRU), partial(partial, mingru.MinLSTM)
SEVERAL = [GRU(INPUT, HIDDEN, 2), LSTM(HIDDEN, 5, normalize=False)]
SEVERAL += [GRU(5, 5, residual="highway"), GRU(5, 5, output_gate="silu")]
CASES = [
    case("MinGRU", mingru.MinGRU, INPUT, HIDDEN, 2, residual=True, norm="layer"),
    case("MinLSTM", mingru.MinLSTM, INPUT, HIDDEN, bidirectional=True, learn_initial_state=True),
    case("MinGRU (signed)", mingru.MinGRU, INPUT, HIDDEN, gate="signed", candidate="tanh"),
    case("MinGRU (rotation)", mingru.MinGRU, INPUT, HIDDEN, gate="rotation", candidate="tanh", min_decay=0.3),
    case("MinGRU (quaternion)", mingru.MinGRU, INPUT, HIDDEN, gate="quaternion", min_decay=0.3),
    *(conv(f"MinConv{dims}dGRU", dims, num_layers=2, stride=[1, 2], norm="group") for dims in (1, 2, 3)),
    stack("Stack", *SEVERAL),
    case("mingru.GRU", mingru.GRU, INPUT, HIDDEN, 2, block_size=2),
    case("MinGRUCell", mingru.MinGRUCell, INPUT, HIDDEN),
    case("MinLSTMCell", mingru.MinLSTMCell, INPUT, HIDDEN, candidate="tanh", normalize=False),
    *(conv(f"MinConv{dims}dGRUCell", dims) for dims in (1, 2, 3)),
    case("drop_in.GRULike", drop_in.GRULike, INPUT, HIDDEN, 2, cell="mingru"),
    case("drop_in.GRULikeCell", drop_in.GRULikeCell, INPUT, HIDDEN, cell="mingru"),
    case("drop_in.LSTMLike", drop_in.LSTMLike, INPUT, HIDDEN, bidirectional=True, cell="minlstm"),
    case("drop_in.LSTMLikeCell", drop_in.LSTMLikeCell, INPUT, HIDDEN, cell="minlstm"),
    case("models.Block", mingru.models.Block, INPUT, expansion=5 / 3, conv=3, mlp=2),
    Case("combined model", Model),
]


# All options

LAYER = {
    "cell": CELLS,
    "num_layers": [1, 2],
    "bias": [True, False],
    "batch_first": CALLS["batch_first"],
    "bidirectional": [False, True],
    "residual": [False, True, "highway"],
    "output_gate": [None, "silu"],
    "norm": [None, "layer", "rms"],
    "candidate": CANDIDATES,
    "learn_initial_state": [False, True],
    "recompute": [None, False, True],
    "min_decay": [0.0, 0.3],
}
CELL = {name: LAYER[name] for name in ("cell", "bias", "norm", "candidate", "learn_initial_state", "min_decay")}
# `drop_in` has the same code, so that fewer options meet.
FEWER = {**LAYER, "residual": [False, True], "norm": [None], "candidate": ["positive"], "recompute": [None]}


class List(tuple):
    """A list that can be hashed."""

    __slots__ = ()


# A row takes as many numbers of a tuple as it has dimensions, and as many of a list as it has layers.
TUPLES = {"kernel_size": (2, 1, 3), "stride": (1, 2, 1), "padding": (1, 0, 2), "dilation": (2, 1, 1)}
LISTS = {"hidden_dims": (16, 8), "kernel_size": (2, 3), "stride": (2, 1), "padding": (0, "same"), "dilation": (1, 2)}
CONV_CELL = {
    "space": [1, 2, 3],
    "hidden_dims": [8, 16],
    "kernel_size": [1, 3, TUPLES["kernel_size"]],
    "stride": [1, 2, TUPLES["stride"]],
    "padding": [0, 1, "same", TUPLES["padding"]],
    "dilation": [1, 2, TUPLES["dilation"]],
    "bias": [True, False],
    "norm": [None, "group"],
    "candidate": CANDIDATES,
    "cell": GATED[:-1],
    "learn_initial_state": [False, True],
}
CONV = {
    **{name: [*values, List(LISTS[name])] if name in LISTS else values for name, values in CONV_CELL.items()},
    **{name: LAYER[name] for name in ("num_layers", "batch_first", "bidirectional")},
    "residual": [False, True],
}


def is_possible(row: dict[str, Any]) -> bool:
    """Whether the options of a layer of features go together."""
    without_bound = row["cell"] in ("mingru_signed", "gru") or row["cell"].startswith("minlstm")
    if row["cell"] == "gru" and (row.get("residual") == "highway" or row.get("output_gate")):
        return False
    excludes_others = row.get("residual") == "highway" and (row["bidirectional"] or row["output_gate"])
    return not (without_bound and row["min_decay"] > 0) and not excludes_others


def gate_of(cell: str) -> str:
    """Return the option of the classes for a cell of `GATED`."""
    return cell.partition("_")[2] or "sigmoid"


def of_features(home: Any, end: str, row: dict[str, Any]) -> Case:
    """The case of a row of options: a layer or a cell of mingru or drop_in."""
    options = dict(row)
    if row["cell"] == "gru":
        for name in ("candidate", "min_decay", "output_gate", *([] if home is drop_in else ["cell"])):
            options.pop(name, None)
        kind = f"GRU{'Like' if home is drop_in else ''}{end}"
        return case(f"{kind} {named(options)}", getattr(home, kind), INPUT, 6, block_size=2, **options)
    cell, bound, is_like_torch = options.pop("cell"), options.pop("min_decay"), home is drop_in
    kind = "LSTM" if cell.startswith("minlstm") else "GRU"
    if kind == "LSTM":
        options["normalize"] = cell == "minlstm"
    else:
        options |= {"gate": gate_of(cell), "min_decay": [bound, 2 * bound] if row.get("num_layers") == 2 else bound}
    if is_like_torch:
        # Of each interface some.
        options["cell"] = cell.partition("_")[0]
        kind = "LSTMLike" if cell in ("mingru_rotation", "minlstm_unnormalized") else "GRULike"
    hidden = {"mingru_rotation": 6, "mingru_quaternion": 8, "mingru_mixed": 8}.get(cell, 5)
    input_dims = hidden if row.get("residual") == "highway" else INPUT
    made = getattr(home, f"{'' if is_like_torch else 'Min'}{kind}{end}")
    return case(f"{made.__name__} {named(options)}", made, input_dims, hidden, **options)


def geometries(row: dict[str, Any]) -> list[list[tuple[Any, ...]]]:
    """Return kernel size, stride, dilation and padding of each layer in each spatial dimension."""
    names, space = ("kernel_size", "stride", "dilation", "padding"), range(row["space"])
    by_layer = ([of_part(row[name], List, layer) for name in names] for layer in range(row.get("num_layers", 1)))
    return [[tuple(of_part(each, tuple, at) for each in sizes) for at in space] for sizes in by_layer]


def of_part(value: Any, kind: type, index: int) -> Any:
    return value[index] if type(value) is kind else value


def is_possible_of_images(row: dict[str, Any]) -> bool:
    """Whether no layer pads with "same" where a stride forbids it, or where torch warns because one side gets more."""
    sizes = itertools.chain(*geometries(row))
    return not any(padding == "same" and (stride > 1 or kernel % 2 == 0) for kernel, stride, _, padding in sizes)


def of_images(row: dict[str, Any]) -> Case:
    """Likewise a convolutional layer, or a cell if there is no number of layers."""
    space, count = row["space"], row.get("num_layers", 1)
    options = {
        name: list(value[:count]) if type(value) is List else value[:space] if type(value) is tuple else value
        for name, value in {**row, "gate": gate_of(row["cell"])}.items()
        if name not in ("space", "cell")
    }
    # The smallest space of which the last layer makes 2 x 3 x 2 places.
    sizes = [2, 3, 2][:space]
    for layer in reversed(geometries(row)):
        for at, (kernel, stride, dilation, padding) in enumerate(layer):
            span = dilation * (kernel - 1)
            sizes[at] = max(2, (sizes[at] - 1) * stride + span + 1 - (span if padding == "same" else 2 * padding))
    kind = f"MinConv{space}dGRU{'' if 'num_layers' in row else 'Cell'}"
    return Case(f"{kind} {named(options)}", partial(getattr(mingru, kind), 8, **options), (8, *sizes))


def block(**options: Any) -> Case:
    return case(f"Block {named(options)}", mingru.models.Block, 5, **options)


# Only these have no norm, residual or highway, so that kernels skip their padding.
ONE_OR_TWO = [{"num_layers": 1, "output_gate": None}, {"num_layers": 2, "output_gate": "silu"}]
PLAIN = [{"cell": cell, "min_decay": 0.0, **given} for cell in CELLS for given in ONE_OR_TWO]
FEATURES = [of_features(mingru, "", row) for row in [*PLAIN, *cover(LAYER, is_possible)]]
TWO = {"gate": ["mixed", "sigmoid"], "bidirectional": True, "num_layers": 2, "norm": "group"}
MIXED_IMAGES = conv("MinConv2dGRU with mixed gates", 2, 16, **TWO)
IMAGES = [*(of_images(row) for row in cover(CONV, is_possible_of_images)), MIXED_IMAGES]
PROJECTED, MINLSTM = (INPUT, 5, 2), {"proj_size": 2, "cell": "minlstm"}
LIKE_TORCH = [
    case("GRU with projections", drop_in.GRULike, *PROJECTED, **MINLSTM),
    case("LSTM with projections", drop_in.LSTMLike, *PROJECTED, **MINLSTM, batch_first=True, residual=True),
    case("LSTM with projections of both directions", drop_in.LSTMLike, *PROJECTED, **MINLSTM, bidirectional=True),
    *(of_features(drop_in, "", row) for row in cover(FEWER, is_possible)),
    *(of_features(drop_in, "Cell", row) for row in cover({name: FEWER[name] for name in CELL}, is_possible)),
]
STEPS = [of_features(mingru, "Cell", row) for row in cover(CELL, is_possible)]
STEPS += [of_images(row) for row in cover(CONV_CELL, is_possible_of_images)]
CONV1D = partial(mingru.MinConv1dGRU, INPUT, INPUT)


def projected(**factory: Any) -> nn.Module:
    return mingru.Stack([mingru.MinGRU(INPUT, 6, 2, **factory), nn.Linear(6, INPUT, **factory)])


def of_stacks(**factory: Any) -> nn.Module:
    layers = [mingru.MinLSTM(4, 4, **factory), mingru.Stack([mingru.MinGRU(4, 4, **factory)])]
    return mingru.Stack(layers, residual=True)


BOTH, TANH = {"bidirectional": True, "norm": "rms"}, {"candidate": "tanh", "bias": False}
OF_TORCH = [partial(nn.Linear, INPUT, 6), lambda **_: nn.Tanh(), GRU(6, 5)]
OF_TORCH += [partial(nn.LayerNorm, 5), partial(nn.Linear, 5, 4), LSTM(4, 3)]
STACKS = [
    stack("Stack with a projection", projected, LSTM(INPUT, 5)),
    stack(
        "Stack of both directions", GRU(INPUT, 6, 2, **BOTH), LSTM(12, 5, learn_initial_state=True), GRU(5, 3, **TANH)
    ),
    stack("Stack with modules of torch", *OF_TORCH),
    stack("Stack with the time first", GRU(INPUT, 5, batch_first=False), LSTM(5, 5, batch_first=False)),
    stack("Stack of stacks", GRU(INPUT, 4), of_stacks, residual=False),
    stack("Stack of images", partial(CONV1D, 3, padding=1, num_layers=2), partial(CONV1D, 1), space=1),
    stack("Stack of blocks", partial(mingru.models.Block, INPUT, conv=3), GRU(INPUT, 4)),
]
BLOCK = {
    "cell": ["mingru", "minlstm"],
    "conv": [None, 2, 4],
    "mlp": [None, 1.5],
    "expansion": [1, 1.4, 0.6],
    "checkpoint": [False, True],
    **{name: LAYER[name] for name in ("bias", "candidate", "learn_initial_state", "bidirectional", "output_gate")},
    "norm": ["rms", "layer"],
}
BLOCKS = [block(gate="rotation", expansion=1.2, min_decay=0.3), block(cell="gru", expansion=1.2, block_size=2, conv=2)]
BLOCKS += [block(**row) for row in cover(BLOCK)]
SEVERAL_GATES = {"gate": ["sigmoid", "quaternion", "rotation"], "min_decay": [0.0, 0.25, 0.5], "candidate": "tanh"}
MIXED = case("MinGRU with mixed gates", mingru.MinGRU, INPUT, 8, 3, residual=True, **BOTH, **SEVERAL_GATES)
# Layers and cells of one linear map or convolution.
ONE_MAP = [
    case("MinGRU", mingru.MinGRU, INPUT, 5),
    case("MinGRU, learned", mingru.MinGRU, INPUT, 5, learn_initial_state=True),
    case("MinLSTM", mingru.MinLSTM, INPUT, 5),
    case("MinLSTM, unnormalized", mingru.MinLSTM, INPUT, 5, normalize=False),
    case("MinConv2dGRU", mingru.MinConv2dGRU, INPUT, 5, 1, space=2),
    case("MinGRUCell", mingru.MinGRUCell, INPUT, 5),
    case("MinConv2dGRUCell", mingru.MinConv2dGRUCell, INPUT, 5, 1, space=2),
]


class Model(Case):
    """A language model."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, partial(mingru.models.LanguageModel, 11, 6, 2, **options))

    @property
    def states(self) -> list[Any]:  # type: ignore[override]
        return [self.module.initial(batch) for batch in (2, 3)]

    def given(self, batch: int = 3, steps: int | None = None, **factory: Any) -> dict[str, Any]:
        given = super().given(batch, steps, **factory)
        return {**given, "x": torch.randint(11, given["x"].shape[:2])}


MODELS = [
    Model("LanguageModel", cell="minlstm", expansion=1.5, learn_initial_state=True, tied=False, norm="layer"),
    Model("LanguageModel with convolutions", conv=6, mlp=2, checkpoint=True),
    Model("LanguageModel without bias", bias=False, candidate="tanh", mlp=1),
]
# The combined model has no reference.
ROWS = [*CASES[:-1], *FEATURES, MIXED, *STEPS, *IMAGES, *LIKE_TORCH, *STACKS, *BLOCKS]


def some(cases: list[Case], count: int = 4) -> list[Case]:
    """Return every `count`th, for what hardly depends on options."""
    return cases[::count]


CASES_WITH_LENGTHS = [case for case in CASES if "lengths" in case.takes]


def parametrized(cases: list[Case]) -> pytest.MarkDecorator:
    """Run a test on each case."""
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


def grid(**factors: Iterable[Any]) -> Callable[[Any], Any]:
    """Run a test with each value of each factor."""

    def decorated(test: Any) -> Any:
        for name, values in factors.items():
            test = pytest.mark.parametrize(name, values)(test)
        return test

    return decorated


def selected_cases(request: pytest.FixtureRequest) -> list[Case]:
    """Return the cases of this run's tests that use the requesting fixture of a module."""
    items = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    names = {item.callspec.params["case"].name for item in items if request.fixturename in item.fixturenames}
    return [case for case in CASES if case.name in names]


def small_chunks() -> Any:
    """Use chunks of 4 steps instead of 16, because exporting then takes a third of the time."""
    return mock.patch.object(torch_in_graphs, "chunk_size", lambda: 4)  # noqa: PT008 (Dynamo traces it)
