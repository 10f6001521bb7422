"""Layers of a user's own in a `Stack`: the protocol of `mingru.modules.Layer`."""

import copy
import functools
import itertools
import pickle
import re
from pathlib import Path

import pytest
import torch
from cases import Doubled
from torch import nn
from torch.testing import assert_close

import mingru
from mingru.modules import Layer

STEPS = ("reset", "lengths", "dt")
B, S, DIMS = 3, 7, 4
RESET = torch.zeros(B, S, dtype=torch.bool)
RESET[0, 2] = RESET[1, 0] = RESET[2, 5] = True
LENGTHS = torch.tensor([S, 0, 4])


def sequence():
    return torch.randn(B, S, DIMS, dtype=torch.double)


def stack_of(**options):
    layers = [mingru.MinGRU(DIMS, DIMS), Doubled(DIMS), mingru.Stack([mingru.MinLSTM(2 * DIMS, 5)])]
    return mingru.Stack(layers, **options).double()


def test_a_module_among_modules():
    stack, other, x = stack_of(residual=True), stack_of(residual=True), sequence()
    assert [type(align) for align in stack.aligns] == [nn.Identity, nn.Linear, nn.Linear]
    other.load_state_dict(stack.state_dict())
    for twin in (other, copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert_close(twin(x), stack(x), rtol=0, atol=0)
    stack.reset_parameters()
    assert not stack.layers[1].decay.any()
    assert not torch.equal(stack.layers[0].layers[0].linear.weight, other.layers[0].layers[0].linear.weight)


def documented(page: str, name: str) -> type:
    """Return a layer from the block of code of a page that defines it."""
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    names = {"mingru": mingru, "torch": torch, "Block": mingru.models.Block}
    exec(next(each for each in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if f"class {name}(" in each), names)
    return names[name]


def test_the_documented_layer_with_lengths():
    layer = documented("models.md", "Smooth")(DIMS)
    stack, x = mingru.Stack([layer, mingru.MinGRU(DIMS, DIMS)]).double(), sequence()
    options = {"reset": RESET, "dt": torch.rand(B, S, dtype=torch.double)}
    h = [torch.randn(1, B, DIMS, dtype=torch.double), torch.randn(1, B, 1, DIMS, dtype=torch.double)]
    out, last = stack(x, h, lengths=LENGTHS, **options)
    for index, end in enumerate(LENGTHS.tolist()):
        each, states = slice(index, index + 1), [state[:, index : index + 1] for state in h]
        alone = torch.zeros(1, 0, DIMS, dtype=torch.double), states
        if end > 0:
            alone = stack(x[each, :end], states, **{key: value[each, :end] for key, value in options.items()})
        assert_close((out[each, :end], [state[:, each] for state in last]), alone)
        assert not out[index, end:].any()
    # The time of two steps is the time of one.
    twice = torch.full((B, S), 2.0, dtype=torch.double)
    assert_close(layer(x, dt=twice)[1], layer(x.repeat_interleave(2, 1))[1])


class OnlyStates(Doubled, role="sequence"):
    def forward(self, x, h=None):
        return super().forward(x, h)


class Stateless(Layer, role="sequence"):
    num_states = 0
    input_dims = output_dims = DIMS

    def forward(self, x, h=None, dt=None, reset=None):
        return x * 2, []


class ByKeyword(Doubled, role="sequence"):
    def forward(self, x, h=None, *, dt=None, lengths=None, reset=None):
        return super().forward(x, h, reset, lengths, dt)


class Wrapped(Doubled, role="sequence"):
    @functools.wraps(Doubled.forward)
    def forward(self, *args, **options):
        return super().forward(*args, **options)


USED = {OnlyStates: (), Stateless: ("reset", "dt"), ByKeyword: STEPS, Wrapped: STEPS, Doubled: STEPS}


@pytest.mark.parametrize("cls", USED)
def test_what_a_layer_does_not_use_is_refused(cls):
    layers = [mingru.MinGRU(DIMS, DIMS), cls() if cls is Stateless else cls(DIMS)]
    stack, x = mingru.Stack([mingru.Stack(layers)]), torch.randn(B, S, DIMS)
    assert cls._step_arguments == USED[cls]
    _, h = stack(x)
    assert len(h) == stack.num_states == 1 + layers[1].num_states
    steps = [{}, {"reset": RESET}][: 1 + ("reset" in USED[cls])]
    for grad, state, options in itertools.product((True, False), (None, h), steps):
        with torch.set_grad_enabled(grad):
            below, first = layers[0](x, state and state[0], **options)
            out, rest = layers[1](below, state and state[1:], **options)
            assert_close(stack(x, state, **options), (out, [first, *rest]))
    for argument, value in (("reset", RESET), ("lengths", LENGTHS), ("dt", torch.ones(B, S))):
        if argument not in USED[cls]:
            message = (
                f"^Stack: {argument} must be None because the forward of layers\\[1\\], {cls.__name__}, does not use "
                f"it, got Tensor; add {argument}=None to the arguments of that forward, and use it there$"
            )
            with pytest.raises(ValueError, match=message):
                stack(x, **{argument: value})


@pytest.mark.slow
def test_it_compiles():
    stack, x = stack_of(), sequence()
    expected = stack(x, None, RESET)
    torch.compiler.reset()
    compiled = torch.compile(stack, fullgraph=True, backend="eager")
    assert_close(compiled(x, None, RESET), expected)


class Plain(Layer, role="sequence"):
    """Not even parameters, and states as it is told."""

    input_dims = output_dims = DIMS

    def __init__(self, states=None):
        super().__init__()
        self.states = states

    def forward(self, x, h=None, reset=None, lengths=None, dt=None):
        return x, [x[:, -1:].transpose(0, 1)] if self.states is None else self.states


def test_defaults():
    layer, x = Plain(), torch.ones(1, 2, DIMS)
    assert (layer.name, layer.num_states, layer.num_space_dims, layer.batch_first) == ("Plain", 1, 0, True)
    layer.reset_parameters()
    with torch.no_grad():
        assert_close(mingru.Stack([layer], residual=True)(x), (2 * x, [torch.ones(1, 1, DIMS)]))
    with pytest.raises(TypeError, match=r"^Plain: no argument 'hx'; use h"):
        layer(x, hx=None)


def made(name, role=None, **attributes):
    return type(name, (Layer,), {"forward": Plain.forward, **attributes}, role=role)


BAD = {
    made("NoRole"): r'layers\[0\] must be a MinGRU, .*, got NoRole; if .*, pass role="sequence" to the class',
    made(
        "NoSizes", role="sequence"
    ): r"layers\[0\] must be a layer that sets input_dims and output_dims, got NoSizes wit",
    made("NoOutput", role="sequence", input_dims=4): r"layers\[0\] must be .*, got NoOutput without output_dims$",
}


@pytest.mark.parametrize("cls", BAD)
def test_what_is_missing_is_named(cls):
    with pytest.raises(TypeError, match=BAD[cls]):
        mingru.Stack([cls()])
    with pytest.raises(ValueError, match=r"layers\[1\] must be a layer with input_dims=8, the output features of"):
        mingru.Stack([Doubled(4), Plain()])
    with pytest.raises(ValueError, match=r"Wrong: role must be one of \('sequence', 'step', .*, got 'seq'"):
        made("Wrong", role="seq")


STATE = torch.zeros(1, B, DIMS)
RETURNED = [
    (STATE, TypeError, r"^Stack: layers\[1\] must return its states in a list, .*\(out, \[state\]\)$"),
    ([], ValueError, r"^Stack: layers\[1\] must return num_states = 1 states, got 0; set num_states$"),
    ([STATE] * 2, ValueError, "num_states = 1 states, got 2"),
]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("states", "error", "message"), RETURNED)
def test_other_states_than_it_says(states, error, message, grad):
    stack = mingru.Stack([mingru.MinGRU(DIMS, DIMS), Plain(states)])
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        stack(torch.randn(B, S, DIMS))
