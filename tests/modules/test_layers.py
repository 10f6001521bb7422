"""Dropout and threads of layers and stacks."""

import copy

import pytest
import torch
from cases import DOUBLE, INPUT, case, conv, parametrized, stack, tensors
from torch.testing import assert_close

import mingru

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
OPTIONS = {"num_layers": 3, "bidirectional": True}
SEVERAL = [
    case("MinGRU", mingru.MinGRU, INPUT, 5, **OPTIONS),
    case("MinLSTM, time first", mingru.MinLSTM, INPUT, 5, batch_first=False, residual=True, **OPTIONS),
    conv("MinConv1dGRU", 1, 5, **OPTIONS),
    conv("MinConv2dGRU", 2, 4, num_layers=2, batch_first=False),
    case("drop_in.LSTM", mingru.drop_in.LSTM, INPUT, 5, **OPTIONS),
    stack("Stack", *(lambda **factory: mingru.MinGRU(INPUT, INPUT, bidirectional=False, **factory),) * 3),
]
scripted_slowly_or_not = pytest.mark.parametrize("scripted", [False, pytest.param(True, marks=pytest.mark.slow)])


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


@scripted_slowly_or_not
@parametrized(SEVERAL)
def test_dropout_is_on_every_layers_output_but_the_last(case, scripted):
    module, given = case.varied(**DOUBLE), case.given(**DOUBLE)
    plain, _ = case.call(module, given["x"])
    module.dropout = 0.4
    run = torch.jit.script(module) if scripted else module
    x, reset = given["x"], given["reset"]
    *singles, last = each_layer(module)

    def by_hand():
        y = x
        for single in singles:
            y, _ = case.call(single, y, reset=reset)
            order = (lambda each: each) if case.batch_dim == 0 else (lambda each: each.transpose(0, 1))
            # As nn.GRU drops: each element kept with probability 0.6, and divided by it.
            y = y * order(torch.empty_like(order(y), memory_format=torch.contiguous_format).bernoulli_(0.6)) / 0.6
        return case.call(last, y, reset=reset)[0]

    outs = []
    for function in (by_hand, *[lambda: case.call(run, x, reset=reset)[0]] * 2):
        torch.manual_seed(3)
        outs.append(function())
    assert_close(outs[1:], [outs[0]] * 2, **TIGHT)
    assert not torch.equal(case.call(run, x, reset=reset)[0], outs[1]), "another seed gave the same mask"
    run.eval()
    assert_close(case.call(run, x)[0], plain, **TIGHT)


@parametrized(SEVERAL)
def test_dropout_of_everything_gives_the_next_layer_zeros(case):
    module, x = case.varied(**DOUBLE), case.given(**DOUBLE)["x"]
    module.dropout, module.residual = 1.0, False
    seen = []
    module.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out, states = case.call(module, x)
    assert not seen[0].any()
    # Nothing is dropped from the output of the last layer and from the states.
    assert out.any() and all(state.any() for state in states)
    case.call(module.eval(), x)
    assert seen[1].all()


@parametrized(SEVERAL)
def test_threads_give_the_same_numbers(case):
    module, given = case.varied(**DOUBLE), case.given(32, 64 if len(case.features) == 1 else 8, **DOUBLE)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs = tensors(case.call(module, **given))
            grads = torch.autograd.grad(sum(each.square().sum() for each in outputs), list(module.parameters()))
            results.append([*outputs, *grads])
    finally:
        torch.set_num_threads(before)
    assert_close(*results, **TIGHT)
