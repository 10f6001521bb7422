"""Dropout of layers and stacks."""

import copy

import torch
from cases import DOUBLE, INPUT, TIGHT, case, conv, parametrized, stack
from torch.testing import assert_close

import mingru

OPTIONS = {"num_layers": 3, "bidirectional": True}
SEVERAL = [
    case("MinGRU", mingru.MinGRU, INPUT, 5, **OPTIONS),
    case("MinLSTM, time first", mingru.MinLSTM, INPUT, 5, batch_first=False, residual=True, **OPTIONS),
    conv("MinConv1dGRU", 1, 5, **OPTIONS),
    conv("MinConv2dGRU", 2, 4, num_layers=2, batch_first=False),
    case("drop_in.LSTM", mingru.drop_in.LSTM, INPUT, 5, **OPTIONS),
    stack("Stack", *(lambda **factory: mingru.MinGRU(INPUT, INPUT, bidirectional=False, **factory),) * 3),
]


def each_layer(module):
    """Each of its layers in a module of its own."""
    for index, layer in enumerate(module.layers):
        if isinstance(module, mingru.Stack):
            yield mingru.Stack([layer], residual=module.residual)
            continue
        single = copy.copy(module)
        single._modules = dict(module._modules)
        single.layers, single.num_layers = torch.nn.ModuleList([layer]), 1
        if index > 0:
            single.input_dims = single.input_size = module.output_dims
        yield single


@parametrized(SEVERAL)
def test_dropout_is_on_every_layers_output_but_the_last(case):
    module, given = case.varied(**DOUBLE), case.given(**DOUBLE)
    x, reset = given["x"], given["reset"]
    plain, _ = case.call(module, x)
    module.dropout = 0.4
    *singles, last = each_layer(module)

    def by_hand():
        y = x
        for single in singles:
            y, _ = case.call(single, y, reset=reset)
            order = (lambda each: each) if case.batch_dim == 0 else (lambda each: each.transpose(0, 1))
            # As nn.GRU drops: each element kept with probability 0.6, and divided by it.
            y = y * order(torch.empty_like(order(y), memory_format=torch.contiguous_format).bernoulli_(0.6)) / 0.6
        return case.call(last, y, reset=reset)

    outs = []
    for function in (by_hand, *[lambda: case.call(module, x, reset=reset)] * 2):
        torch.manual_seed(3)
        out, states = function()
        # Nothing is dropped from the states, of which the last is that of the last layer.
        outs.append((out, states[-1][-1:]))
    assert_close(outs[1:], [outs[0]] * 2, **TIGHT)
    assert not torch.equal(case.call(module, x, reset=reset)[0], outs[1][0]), "another seed gave the same mask"
    module.eval()
    assert_close(case.call(module, x)[0], plain, **TIGHT)
