"""A stack: its states, residuals and hooks, and what it refuses. For its values: tests/properties."""

import re

import pytest
import torch
from cases import STACKS, parametrized
from refusals import assert_refused, wrong_values
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

from mingru import MinConv1dGRU, MinConv1dGRUCell, MinConv2dGRU, MinGRU, MinLSTM
from mingru.drop_in import GRU
from mingru.modules.cells import MinGRUCell
from mingru.modules.stack import Stack

B, S, IN = 3, 9, 4

DOUBLE = {"dtype": torch.double}


def ahead():
    """What can be run in pieces."""
    return [MinGRU(IN, 6, 2, **DOUBLE), MinLSTM(6, 6, **DOUBLE), MinGRU(6, 2, learn_initial_state=True, **DOUBLE)]


scripted_slowly_or_not = pytest.mark.parametrize("scripted", [False, pytest.param(True, marks=pytest.mark.slow)])


# Residual


def test_no_residual_makes_no_parameter():
    stack = Stack(ahead())
    assert list(stack.state_dict()) == [
        f"layers.{index}.{name}" for index, layer in enumerate(stack.layers) for name in layer.state_dict()
    ]


def test_residual_of_convolutions_that_keep_the_shape():
    layers = [MinConv2dGRU(2, 2, 3, padding=1), MinConv2dGRU(2, 1, (1, 5), padding=(0, 2), bidirectional=True)]
    stack = Stack(layers, residual=True)
    x = torch.randn(2, 4, 2, 5, 6)
    first, _ = layers[0](x)
    second, _ = layers[1](first + x)
    assert_close(stack(x)[0], second + first + x)


@scripted_slowly_or_not
def test_residual_of_convolutions_that_change_space_is_refused(scripted):
    stack = Stack([MinConv2dGRU(2, 2, 3, padding=1), MinConv2dGRU(2, 2, 3)], residual=True)
    run = torch.jit.script(stack) if scripted else stack
    with pytest.raises((ValueError, torch.jit.Error)) as caught:
        run(torch.randn(2, 4, 2, 5, 6))
    assert "Stack: layers[1] must keep the shape of x because residual is True, got from " in str(caught.value)
    assert "[2, 4, 2, 5, 6] to [2, 4, 2, 3, 4]" in str(caught.value).replace("(", "[").replace(")", "]")
    assert "; pass residual=True to the layer instead" in str(caught.value)


def test_dropout_of_a_packed_sequence():
    stack = Stack(ahead(), dropout=0.5)
    packed = pack_padded_sequence(torch.randn(B, S, IN).double(), [S, 4, 1], batch_first=True)
    dropped = stack(packed)[0].data
    assert not torch.equal(stack(packed)[0].data, dropped)
    assert torch.equal(stack.eval()(packed)[0].data, stack(packed)[0].data)


# A module among modules


def test_hooks_of_layers_run():
    stack, x = Stack(ahead()), torch.randn(B, S, IN).double()
    seen = []
    for layer in stack.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(module))
    stack(x)
    assert seen == list(stack.layers)


def test_a_subclass_that_keeps_forward_is_a_layer():
    class Wide(MinGRU):
        def __init__(self, input_dims):
            super().__init__(input_dims, 4 * input_dims)

    out, _ = Stack(layer for layer in (Wide(2), MinGRU(8, 3)))(torch.randn(1, 2, 2))
    assert out.shape == (1, 2, 3)


def test_repr_says_what_is_not_default():
    assert Stack([MinGRU(3, 4)]).extra_repr() == ""
    stack = Stack([MinGRU(3, 4), MinLSTM(4, 5)], dropout=0.25, residual=True)
    assert stack.extra_repr() == "dropout=0.25, residual=True"
    assert "MinGRU(\n      3, 4\n" in repr(stack)


# What is refused

KINDS = r"must be a MinGRU, MinLSTM, .* or models\.Block, got"
WRONG_KINDS = {
    "GRU": [nn.GRU(3, 4)],
    "Linear": [nn.Linear(3, 4)],
    "str": ["MinGRU"],
    "type": [MinGRU],
    "MinGRUCell": [MinGRUCell(3, 4)],
    "MinConv1dGRUCell": [MinConv1dGRUCell(3, 4, 1)],
    "mingru.drop_in.GRU": [GRU(3, 4)],
}
FEATURES = "a layer with input_dims={}, the output features of layers[0], got 4"
SPACE = "a layer with 1 spatial dimensions like layers[0], got"
CHANNELS = "a layer with as many output as input channels because residual is True, got 3 input and 4 output channels"
# What the second layer must be.
MISFITS = {
    FEATURES.format(8): [MinGRU(3, 4, bidirectional=True), MinGRU(4, 5)],
    FEATURES.format(6): [Stack([MinGRU(3, 4), MinGRU(4, 6)]), MinGRU(4, 5)],
    FEATURES.format(10): [MinConv1dGRU(3, [4, 10], 1, 2), MinConv1dGRU(4, 5, 1)],
    "a layer with batch_first=True like layers[0], got False": [MinLSTM(4, 5), MinGRU(5, 6, batch_first=False)],
    f"{SPACE} 2": [MinConv1dGRU(3, 4, 1), MinConv2dGRU(4, 5, 1)],
    f"{SPACE} 0": [MinConv1dGRU(3, 4, 1), MinGRU(4, 5)],
    f"{CHANNELS}; pass residual=True to": [MinConv1dGRU(3, 3, 1), MinConv1dGRU(3, 4, 1)],
}


def test_bad_layers():
    cases = {
        "none": ({"layers": []}, ValueError, "layers must be a list of at least one layer, got an empty list"),
        "a layer": ({"layers": MinGRU(3, 4)}, TypeError, "layers must be a list of layers, got MinGRU"),
        "a part": ({"layers": [MinGRU(3, 4), nn.Linear(4, 5)]}, TypeError, rf"layers\[1\] {KINDS} Linear"),
        "of torch": (
            {"layers": [nn.LSTM(3, 4)]},
            TypeError,
            rf"layers\[0\] {KINDS} LSTM; use mingru.MinGRU or mingru.",
        ),
        **wrong_values("dropout", "a number from 0 to 1", types=("0",), values=(1.5, float("nan"))),
    }
    for name, layers in WRONG_KINDS.items():
        cases[name] = ({"layers": layers}, TypeError, rf"layers\[0\] {KINDS} {name.rpartition('.')[2]}")
    for message, layers in MISFITS.items():
        options = {"layers": layers, "residual": message.startswith(CHANNELS)}
        cases[message] = (options, ValueError, re.escape(f"layers[1] must be {message}"))
    assert_refused(lambda **options: Stack(**{"layers": [MinGRU(3, 4)], **options}), cases, "Stack: ")


X = torch.zeros(2, 5, 3)
H = [torch.zeros(2, 2, 1, 4), torch.zeros(1, 2, 1, 5)]

BAD_CALLS = {
    "h is one tensor": (
        {"h": H[0]},
        TypeError,
        r"Stack: h must be a list of 2 tensors, got Tensor; pass 1 for MinGRU, 1 for MinLSTM",
    ),
    "h of one": ({"h": H[:1]}, ValueError, r"Stack: h must be 2 tensors, got 1; pass 1 for MinGRU, 1 for MinLSTM"),
    "h of too many": ({"h": [*H, H[0]]}, ValueError, r"Stack: h must be 2 tensors, got 3"),
    "h with None": ({"h": [H[0], None]}, TypeError, r"Stack: h\[1\] must be a tensor, got NoneType"),
    "h nested": ({"h": [[H[0]], H[1]]}, TypeError, r"Stack: h\[0\] must be a tensor, got list"),
    "h swapped": ({"h": H[::-1]}, ValueError, r"MinGRU: h must be expandable to .* = \(2, 2, 1, 4\)"),
    "h of float64": ({"h": [H[0], H[1].double()]}, TypeError, r"MinLSTM: h must be torch\.float32 like x"),
    "x of other features": ({"x": X[..., :2]}, ValueError, r"MinGRU: x must be \(B, S, 3\)"),
    "x is a list": ({"x": [X]}, TypeError, r"MinGRU: x must be a tensor, got list"),
    "reset of other length": (
        {"reset": torch.zeros(2, 4, dtype=torch.bool)},
        ValueError,
        r"MinGRU: reset must be \(B, S\)",
    ),
    "lengths above": ({"lengths": torch.tensor([6, 1])}, ValueError, r"MinGRU: lengths must be from 0 to S = 5"),
    "lengths in a list": ({"lengths": [5, 1]}, TypeError, r"MinGRU: lengths must be an integer tensor"),
}


@parametrized(STACKS[1:])
def test_states_are_those_of_the_layers_in_a_list_or_a_tuple(case):
    module = case.make()
    x = case.x()
    _, h = module(x)
    assert len(h) == module.num_states == sum(layer.num_states for layer in module.layers)
    expected = module(x, h)
    assert_close(module(x, tuple(h)), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"^Stack: h must be {len(h)} tensors, got {len(h) + 1}; "):
        module(x, (*h, h[0]))


def test_layers_go_into_one_list():
    for layers in ((MinGRU(3, 4), MinLSTM(4, 5)), (MinGRU(3, 4), MinGRU(4, 4), MinGRU(4, 4))):
        with pytest.raises(TypeError, match=r"^Stack: too many positional arguments; pass the layers in one list$"):
            Stack(*layers)
    with pytest.raises(TypeError, match=r"^Stack: layers must be a list .*, got MinGRU; pass the layers in one list$"):
        Stack(MinGRU(3, 4))


@pytest.mark.parametrize("residual", [False, True])
def test_bad_calls(residual):
    stack = Stack([MinGRU(3, 4, num_layers=2), MinLSTM(4, 5)], residual=residual)
    assert_refused(lambda **args: stack(**{"x": X, **args}), BAD_CALLS)


@scripted_slowly_or_not
def test_bad_calls_of_convolutions(scripted):
    stack = Stack([MinConv1dGRU(3, 4, 1, 2), MinConv1dGRU(4, 5, 1)])
    run = torch.jit.script(stack) if scripted else stack
    x = torch.zeros(2, 5, 3, 6)
    with pytest.raises((ValueError, torch.jit.Error)) as caught:
        run(x, lengths=torch.tensor([5, 2]))
    assert "Stack: lengths must be None because convolutional layers do not support lengths" in str(caught.value)
    with pytest.raises((ValueError, torch.jit.Error)) as caught:
        run(x, [torch.zeros(1)] * 2)
    assert "Stack: h must be 3 tensors, got 2" in str(caught.value)
    if not scripted:
        assert str(caught.value).endswith("; pass 2 for MinConv1dGRU, 1 for MinConv1dGRU")


def test_a_layer_may_be_hooked_into_two_stacks():
    """Weights can be shared: the same layer twice is one set of parameters."""
    layer = MinGRU(3, 3)
    stack = Stack([layer, layer])
    assert len(list(stack.parameters())) == 2
    x = torch.randn(2, 5, 3)
    out, (first, second) = stack(x)
    below, expected = layer(x)
    assert torch.equal(first, expected)
    assert_close((out, second), layer(below), rtol=0, atol=0)
