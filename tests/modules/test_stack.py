"""A stack: its states, residuals and hooks. For its values: tests/properties."""

import torch
from cases import STACKS, parametrized
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

from mingru import MinGRU, MinLSTM, Stack

X = torch.zeros(2, 5, 3)


class Wide(MinGRU):
    """A subclass that keeps `forward` is a layer."""

    def __init__(self, input_dims):
        super().__init__(input_dims, 4 * input_dims)


def test_a_module_among_modules():
    stack = Stack(layer for layer in (Wide(3), MinLSTM(12, 5)))
    assert list(stack.state_dict()) == [
        f"layers.{index}.{name}" for index, layer in enumerate(stack.layers) for name in layer.state_dict()
    ]
    seen = []
    for layer in stack.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(module))
    assert stack(X)[0].shape == (2, 5, 5) and seen == list(stack.layers)
    assert stack.extra_repr() == ""
    stack = Stack([MinGRU(3, 4), MinLSTM(4, 5)], dropout=0.25, residual=True)
    assert stack.extra_repr() == "dropout=0.25, residual=True" and "MinGRU(\n      3, 4\n" in repr(stack)
    # Weights can be shared: the same layer twice is one set of parameters.
    layer = MinGRU(3, 3)
    stack, x = Stack([layer, layer]), torch.randn(2, 5, 3)
    assert len(list(stack.parameters())) == 2
    below, first = layer(x)
    out, second = layer(below)
    assert_close(stack(x), (out, [first, second]), rtol=0, atol=0)


def test_modules_of_torch_get_no_dropout_and_are_scripted():
    stack, x = Stack([torch.nn.Linear(3, 6), MinGRU(6, 6)], dropout=1.0), torch.randn(2, 5, 3)
    assert torch.equal(stack(x)[0], stack.eval()(x)[0])
    assert_close(torch.jit.script(stack)(x), stack(x))


def test_dropout_of_a_packed_sequence():
    stack = Stack([MinGRU(3, 6, 2), MinLSTM(6, 6)], dropout=0.5)
    packed = pack_padded_sequence(torch.randn(3, 9, 3), [9, 4, 1], batch_first=True)
    dropped = stack(packed)[0].data
    assert not torch.equal(stack(packed)[0].data, dropped)
    assert torch.equal(stack.eval()(packed)[0].data, stack(packed)[0].data)


@parametrized(STACKS[1:])
def test_states_are_those_of_the_layers_in_a_list_or_a_tuple(case):
    module, x = case.make(), case.args()["x"]
    _, h = module(x)
    assert len(h) == module.num_states == sum(layer.num_states for layer in module.layers)
    assert_close(module(x, tuple(h)), module(x, h), rtol=0, atol=0)
