"""Layers of a user's own in a `Stack`: the protocol of `mingru.modules.Layer`."""

import copy
import functools
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import mingru
from mingru.modules import Layer


class Smooth(Layer, role="sequence"):
    """Average over the past, with a trained decay for each feature. A minimal layer: sizes and `forward`."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.input_dims = self.output_dims = dims
        self.decay = nn.Parameter(torch.linspace(-1.0, 2.0, dims))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.decay)

    def forward(
        self,
        x: Tensor,
        h: list[Tensor] | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        assert lengths is None and dt is None
        a = self.decay.sigmoid()
        state = torch.zeros_like(x[:, 0]) if h is None else h[0][0]
        out: list[Tensor] = []
        for step in range(x.size(1)):
            if reset is not None:
                state = state.masked_fill(reset[:, step : step + 1], 0.0)
            state = a * state + (1.0 - a) * x[:, step]
            out.append(state)
        return torch.stack(out, 1), [state.unsqueeze(0)]


class Doubled(Smooth, role="sequence"):
    """A layer of two states, another size, and everything else as in its base class."""

    def __init__(self, dims: int) -> None:
        super().__init__(dims)
        self.output_dims = 2 * dims
        self.num_states = 2

    def forward(
        self,
        x: Tensor,
        h: list[Tensor] | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        a = self.decay.sigmoid()
        first = torch.zeros_like(x[:, 0]) if h is None else h[0][0]
        second = torch.zeros_like(x[:, 0]) if h is None else h[1][0]
        out: list[Tensor] = []
        for step in range(x.size(1)):
            if reset is not None:
                first = first.masked_fill(reset[:, step : step + 1], 0.0)
                second = second.masked_fill(reset[:, step : step + 1], 0.0)
            first, second = a * first + x[:, step], a * second - x[:, step]
            out.append(torch.cat([first, second], -1))
        return torch.stack(out, 1), [first.unsqueeze(0), second.unsqueeze(0)]


ROOT = Path(__file__).parents[2]
STEPS = ("reset", "lengths", "dt")
B, S, DIMS = 3, 7, 4
RESET = torch.zeros(B, S, dtype=torch.bool)
RESET[0, 2] = RESET[1, 0] = RESET[2, 5] = True


def stack_of(**options):
    layers = [mingru.MinGRU(DIMS, DIMS), Smooth(DIMS), Doubled(DIMS), mingru.Stack([mingru.MinLSTM(2 * DIMS, 5)])]
    return mingru.Stack(layers, **options).double()


def by_hand(stack, x, h=None, reset=None):
    """Call one layer after the other."""
    rnn, smooth, doubled, inner = stack.layers
    h = [None] * 5 if h is None else h
    x, first = rnn(x, h[0], reset)
    x, second = smooth(x, None if h[1] is None else h[1:2], reset)
    x, third = doubled(x, None if h[2] is None else h[2:4], reset)
    x, fourth = inner(x, None if h[4] is None else h[4:], reset)
    return x, [first, *second, *third, *fourth]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("reset", [None, RESET], ids=["", "reset"])
def test_states_go_in_and_come_out(grad, reset):
    stack, x = stack_of(), torch.randn(B, S, DIMS, dtype=torch.double)
    with torch.set_grad_enabled(grad):
        out, h = stack(x, None, reset)
        assert_close((out, h), by_hand(stack, x, None, reset))
        assert stack.num_states == len(h) == 5
        # Two segments are one sequence.
        resets = (None, None) if reset is None else (reset[:, :3], reset[:, 3:])
        first, state = stack(x[:, :3], None, resets[0])
        second, last = stack(x[:, 3:], state, resets[1])
        assert_close((torch.cat([first, second], 1), last), (out, h))


def test_a_module_among_modules():
    stack, other, x = stack_of(residual=True), stack_of(residual=True), torch.randn(B, S, DIMS, dtype=torch.double)
    assert [type(align) for align in stack.aligns] == [nn.Identity, nn.Identity, nn.Linear, nn.Linear]
    other.load_state_dict(stack.state_dict())
    for twin in (other, copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert_close(twin(x), stack(x), rtol=0, atol=0)
    stack.reset_parameters()
    assert not stack.layers[1].decay.any()
    assert not torch.equal(stack.layers[0].layers[0].linear.weight, other.layers[0].layers[0].linear.weight)


def documented(page: str, name: str) -> type:
    """Return a layer from the block of code of a page that defines it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    names = {"mingru": mingru, "torch": torch, "Block": mingru.models.Block}
    exec(next(block for block in blocks if f"class {name}(" in block), names)
    return names[name]


LENGTHS = torch.tensor([S, 0, 4])


@pytest.mark.parametrize(("page", "name"), [("models.md", "Smooth"), ("gates.md", "SignedLSTM")])
def test_the_documented_layers_with_lengths(page, name):
    cls = documented(page, name)
    layer = cls(DIMS) if name == "Smooth" else cls(DIMS, DIMS)
    stack, x = mingru.Stack([layer, mingru.MinGRU(DIMS, DIMS)]).double(), torch.randn(B, S, DIMS, dtype=torch.double)
    options = {"reset": RESET, "dt": torch.rand(B, S, dtype=torch.double)} if name == "Smooth" else {"reset": RESET}
    h = [torch.randn(1, B, DIMS, dtype=torch.double), torch.randn(1, B, 1, DIMS, dtype=torch.double)]
    out, last = stack(x, h, lengths=LENGTHS, **options)
    for index, end in enumerate(LENGTHS.tolist()):
        each, states = slice(index, index + 1), [state[:, index : index + 1] for state in h]
        alone = torch.zeros(1, 0, DIMS, dtype=torch.double), states
        if end > 0:
            alone = stack(x[each, :end], states, **{key: value[each, :end] for key, value in options.items()})
        assert_close((out[each, :end], [state[:, each] for state in last]), alone)
        assert not out[index, end:].any()
    if name == "Smooth":
        # The time of two steps is the time of one.
        twice = torch.full((B, S), 2.0, dtype=torch.double)
        one = stack.layers[0](x.repeat_interleave(2, 1))[1]
        assert_close(stack.layers[0](x, dt=twice)[1], one)


class OnlyStates(Smooth, role="sequence"):
    """A layer that takes no other arguments."""

    def forward(self, x, h=None):
        return super().forward(x, h)


class Ignoring(Smooth, role="sequence"):
    """A layer that names arguments and does not use them."""

    def forward(self, x, h=None, reset=None, lengths=None, dt=None):
        return super().forward(x, h, reset)


class Stateless(Smooth, role="sequence"):
    """A layer that needs neither resets nor elapsed times, because it has no state."""

    num_states = 0

    def forward(self, x, h=None, reset=None, lengths=None, dt=None):
        return x * 2, []


class ByKeyword(Smooth, role="sequence"):
    def forward(self, x, h=None, *, dt=None, lengths=None, reset=None):
        return super().forward(x, h, reset, lengths, dt)


class Wrapped(Smooth, role="sequence"):
    @functools.wraps(Smooth.forward)
    def forward(self, *args, **options):
        return super().forward(*args, **options)


@pytest.mark.parametrize(
    ("cls", "used"),
    [
        (OnlyStates, ()),
        (Ignoring, ("reset",)),
        (Stateless, ("reset", "dt")),
        (ByKeyword, STEPS),
        (Wrapped, STEPS),
        (Smooth, STEPS),
        (Doubled, ("reset",)),
    ],
)
def test_what_a_layer_does_not_use_is_refused(cls, used):
    layers = [mingru.MinGRU(DIMS, DIMS), cls(DIMS)]
    stack, x = mingru.Stack([mingru.Stack(layers)]), torch.randn(B, S, DIMS)
    assert cls.step_arguments == used
    out, h = stack(x, stack(x)[1])
    assert_close(out, layers[1](layers[0](x, stack(x)[1][0])[0], stack(x)[1][1:])[0])
    for argument, value in (("reset", RESET), ("lengths", LENGTHS), ("dt", torch.ones(B, S))):
        if argument not in used:
            message = (
                f"^Stack: {argument} must be None because the forward of layers\\[1\\], {cls.__name__}, does not use "
                f"it, got Tensor; add {argument}=None to the arguments of that forward, and use it there$"
            )
            with pytest.raises(ValueError, match=message):
                stack(x, **{argument: value})
    if "reset" in used:
        with torch.no_grad():
            assert_close(stack(x, h, RESET)[1][1:], layers[1](layers[0](x, h[0], RESET)[0], h[1:], reset=RESET)[1])


@pytest.mark.parametrize("cls", [OnlyStates, Ignoring, ByKeyword])
def test_scripting_says_what_forward_must_be(cls):
    message = rf"^{cls.__name__}: to be scripted in a Stack, forward must have all arguments and their types, forward\("
    with pytest.raises(TypeError, match=message):
        torch.jit.script(nn.Sequential(mingru.Stack([cls(DIMS)])))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Function.*should not be instantiated:DeprecationWarning")
def test_graphs():
    stack, x = stack_of(), torch.randn(B, S, DIMS, dtype=torch.double)
    expected = stack(x, None, RESET)
    scripted = torch.jit.script(stack)
    assert_close(scripted(x, None, RESET), expected)
    assert_close(scripted(x, expected[1]), stack(x, expected[1]))
    for argument in ({"lengths": LENGTHS}, {"dt": torch.ones(B, S)}):
        with pytest.raises(
            torch.jit.Error, match=f"{next(iter(argument))} must be None because the forward of a layer"
        ):
            scripted(x, **argument)
    torch.compiler.reset()
    compiled = torch.compile(stack, fullgraph=True, backend="eager")
    assert_close(compiled(x, None, RESET), expected)


def test_defaults():
    class Unscaled(Layer, role="sequence"):
        """Not even parameters."""

        def __init__(self):
            super().__init__()
            self.input_dims = self.output_dims = 2

        def forward(self, x, h=None, reset=None, lengths=None, dt=None):
            return x, [x[:, -1:].transpose(0, 1)]

    layer = Unscaled()
    assert (layer.name, layer.num_states, layer.num_space_dims, layer.batch_first) == ("Unscaled", 1, 0, True)
    layer.reset_parameters()
    with torch.no_grad():
        out, (h,) = mingru.Stack([layer], residual=True)(torch.ones(1, 2, 2))
    assert_close(out, torch.full((1, 2, 2), 2.0))
    assert_close(h, torch.ones(1, 1, 2))
    with pytest.raises(TypeError, match=r"^Unscaled: no argument 'hx'; use h"):
        layer(torch.ones(1, 2, 2), hx=None)


class NoRole(Layer):
    def forward(self, x):
        return x


class NoSizes(Layer, role="sequence"):
    pass


class NoOutput(Layer, role="sequence"):
    input_dims = 4


BAD = {
    "no role": (NoRole, r'layers\[0\] must be a MinGRU, .*, got NoRole; if .*, pass role="sequence" to the class'),
    "no sizes": (NoSizes, r"layers\[0\] must be a layer that sets input_dims and output_dims, got NoSizes without "),
    "one size": (NoOutput, r"layers\[0\] must be a layer that sets .*, got NoOutput without output_dims$"),
}


@pytest.mark.parametrize(("cls", "message"), BAD.values(), ids=BAD)
def test_what_is_missing_is_named(cls, message):
    with pytest.raises(TypeError, match=message):
        mingru.Stack([cls()])


def test_an_unknown_role():
    with pytest.raises(ValueError, match=r"Wrong: role must be one of \('sequence', 'step', .*, got 'seq'"):

        class Wrong(Layer, role="seq"):
            pass


def test_a_layer_of_another_size():
    with pytest.raises(ValueError, match=r"layers\[1\] must be a layer with input_dims=8, the output features of"):
        mingru.Stack([Doubled(4), Smooth(4)])


class Returning(Layer, role="sequence"):
    """A layer that returns other states than it says."""

    def __init__(self, states):
        super().__init__()
        self.input_dims = self.output_dims = DIMS
        self.returned = states

    def forward(self, x, h=None, reset=None, lengths=None, dt=None):
        return x, self.returned


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize(
    ("states", "error", "message"),
    [
        (
            torch.zeros(1, B, DIMS),
            TypeError,
            r"^Stack: layers\[1\] must return its states in a list, .*\(out, \[state\]\)$",
        ),
        ([], ValueError, r"^Stack: layers\[1\] must return num_states = 1 states, got 0; set num_states$"),
        ([torch.zeros(1, B, DIMS)] * 2, ValueError, "num_states = 1 states, got 2"),
    ],
)
def test_other_states_than_it_says(states, error, message, with_gradients):
    stack = mingru.Stack([mingru.MinGRU(DIMS, DIMS), Returning(states)])
    with torch.set_grad_enabled(with_gradients), pytest.raises(error, match=message):
        stack(torch.randn(B, S, DIMS))
