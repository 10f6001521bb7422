"""Outputs and states are tensors of their own, contiguous where torch's are, in every class and by every backend."""

import itertools

import pytest
import torch
from cases import BLOCKS, HIDDEN, INPUT, ROWS, case, parametrized, some, tensors
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import mingru

BACKENDS = [name for name, can_run in mingru.backends().items() if can_run is True]
B, S = 2, 5


def calls(case):
    """What to call the module with: no state, a state and resets, lengths, packed sequences, and no steps."""
    x = case.x(B, S)
    yield x, None
    yield x, case.h(B), case.reset(B, S)
    if "lengths" in case.takes:
        yield x, None, None, torch.tensor([3, 5])
        if "lock" not in case.name:
            yield pack_padded_sequence(x, torch.tensor([3, 5]), case.batch_dim == 0, enforce_sorted=False), None
    if not case.is_cell and not case.of_torch:
        yield x.narrow(case.time_dim, 0, 0), None
    # Laid out with the other dimension first, and expanded.
    yield x.transpose(0, 1).contiguous().transpose(0, 1), None
    yield x.narrow(case.batch_dim, 0, 1).expand_as(x), None


WIDE = case("MinGRU, wide", mingru.MinGRU, 64, HIDDEN)
every_row = parametrized([WIDE, BLOCKS[0], *some(ROWS, 3)])
backends = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "log"])


@backends
@every_row
def test_no_output_is_a_view(case, backend):
    module = case.make()
    for args, grad in itertools.product(calls(case), (True, False)):
        with torch.set_grad_enabled(grad), mingru.use_backend(backend):
            outputs = tensors(module(*args))
        storages = [each.untyped_storage().data_ptr() for each in outputs if each.numel()]
        assert len(set(storages)) == len(storages), "two outputs share memory"
        # The state of a causal convolution consists of inputs.
        assert all(each.requires_grad == grad for each in outputs[:2] if each.is_floating_point())
        for each in outputs:
            assert each._base is None, "a view"
            assert each.is_contiguous()
            each.detach_()


@backends
@every_row
def test_a_state_detached_in_place_cuts_the_gradient_and_nothing_else(case, backend):
    module = case.make()
    with mingru.use_backend(backend):
        *_, state = outputs = tensors(module(case.x(B, S)))
        values = [each.clone() for each in outputs]
        if len(outputs) > 1:
            state.detach_()
        outputs[0].sum().backward()
    for each, value in zip(outputs, values, strict=True):
        assert torch.equal(each, value)
    assert all(weight.grad is not None for name, weight in module.named_parameters() if "initial" not in name)


@pytest.mark.parametrize("scripted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_truncated_backpropagation_as_books_write_it(scripted):
    """h.detach_() between segments: the gradient is the sum of the segments', each from a state that is a number."""
    x = torch.randn(12, B, INPUT)
    layers = (nn.GRU(INPUT, HIDDEN), mingru.drop_in.GRU(INPUT, HIDDEN), mingru.MinGRU(INPUT, HIDDEN, batch_first=False))
    for rnn in layers:
        run = torch.jit.script(rnn) if scripted and not isinstance(rnn, nn.GRU) else rnn
        h = None
        for segment in x.split(4):
            out, h = run(segment, h)
            out.square().sum().backward()
            h = h.detach() if scripted else h.detach_()
        found = [weight.grad.clone() for weight in rnn.parameters()]
        rnn.zero_grad()
        h = None
        for segment in x.split(4):
            out, h = rnn(segment, h)
            out.square().sum().backward()
            h = h.detach().clone()
        for one, weight in zip(found, rnn.parameters(), strict=True):
            torch.testing.assert_close(one, weight.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("batch_first", "bidirectional", "num_layers"), list(itertools.product([False, True], [False, True], [1, 2]))
)
def test_output_is_contiguous_wherever_that_of_torch_is(batch_first, bidirectional, num_layers, backend):
    options = {"num_layers": num_layers, "batch_first": batch_first, "bidirectional": bidirectional}
    ours, theirs = mingru.drop_in.GRU(INPUT, HIDDEN, **options), nn.GRU(INPUT, HIDDEN, **options)
    x = torch.randn(2, 5, INPUT)
    for given in (
        x,
        torch.randn(5, 2, INPUT).transpose(0, 1),
        x[:, ::2],
        x[:1].expand(4, 5, INPUT),
        torch.randn(5, INPUT),
    ):
        with mingru.use_backend(backend):
            output, h_n = ours(given)
        expected, _ = theirs(given)
        assert output.shape == expected.shape
        assert output.is_contiguous()
        assert h_n.is_contiguous()
        output.view(-1, output.shape[-1])
