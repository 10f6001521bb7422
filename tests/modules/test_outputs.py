"""Outputs and states are tensors of their own, contiguous where torch's are, in every class and by every backend."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree as pytree

import mingru

BACKENDS = [name for name, can_run in mingru.backends().items() if can_run is True]
B, S, INPUT, HIDDEN = 2, 5, 3, 4


def sequence(time_first=False):
    return torch.randn(*((S, B) if time_first else (B, S)), INPUT)


def packed():
    return pack_padded_sequence(sequence(), torch.tensor([3, 5]), batch_first=True, enforce_sorted=False)


def images(*space):
    return torch.randn(B, S, INPUT, *space)


CALLS = {
    "MinGRU": lambda: (mingru.MinGRU(INPUT, HIDDEN), sequence()),
    "MinGRU, wide": lambda: (mingru.MinGRU(64, HIDDEN), torch.randn(B, S, 64)),
    "MinGRU, time first": lambda: (mingru.MinGRU(INPUT, HIDDEN, batch_first=False), sequence(time_first=True)),
    "MinGRU, two layers": lambda: (mingru.MinGRU(INPUT, HIDDEN, 2), sequence()),
    "MinGRU, bidirectional": lambda: (mingru.MinGRU(INPUT, HIDDEN, bidirectional=True), sequence()),
    "MinGRU, residual": lambda: (mingru.MinGRU(INPUT, HIDDEN, residual=True, norm="rms"), sequence()),
    "MinGRU, resets": lambda: (mingru.MinGRU(INPUT, HIDDEN), sequence(), None, torch.rand(B, S) < 0.3),
    "MinGRU, lengths": lambda: (mingru.MinGRU(INPUT, HIDDEN), sequence(), None, None, torch.tensor([3, 5])),
    "MinGRU, packed": lambda: (mingru.MinGRU(INPUT, HIDDEN), packed()),
    "MinGRU, bfloat16": lambda: (mingru.MinGRU(INPUT, HIDDEN, dtype=torch.bfloat16), sequence().bfloat16()),
    "MinGRU, no steps": lambda: (mingru.MinGRU(INPUT, HIDDEN), torch.randn(B, 0, INPUT)),
    "MinLSTM": lambda: (mingru.MinLSTM(INPUT, HIDDEN), sequence()),
    "MinLSTM, learned": lambda: (mingru.MinLSTM(INPUT, HIDDEN, learn_initial_state=True), sequence()),
    "MinGRUCell": lambda: (mingru.MinGRUCell(INPUT, HIDDEN), torch.randn(B, INPUT)),
    "MinGRUCell, one": lambda: (mingru.MinGRUCell(INPUT, HIDDEN), torch.randn(INPUT)),
    "MinLSTMCell": lambda: (mingru.MinLSTMCell(INPUT, HIDDEN), torch.randn(B, INPUT)),
    "MinConv1dGRU": lambda: (mingru.MinConv1dGRU(INPUT, HIDDEN, 3), images(9)),
    "MinConv2dGRU": lambda: (mingru.MinConv2dGRU(INPUT, HIDDEN, 3), images(9, 9)),
    "MinConv2dGRU, time first": lambda: (
        mingru.MinConv2dGRU(INPUT, HIDDEN, 3, batch_first=False),
        images(9, 9).transpose(0, 1).contiguous(),
    ),
    "MinConv3dGRUCell": lambda: (mingru.MinConv3dGRUCell(INPUT, HIDDEN, 3), torch.randn(B, INPUT, 5, 5, 5)),
    "Stack": lambda: (mingru.Stack([mingru.MinGRU(INPUT, HIDDEN), mingru.MinLSTM(HIDDEN, HIDDEN)]), sequence()),
    **{
        f"Block, {name}": lambda options=options: (
            mingru.models.Block(INPUT, **options),
            sequence(True).transpose(0, 1),
        )
        for name, options in {"plain": {}, "mlp": {"mlp": 2, "expansion": 2.0}}.items()
    },
    "Block, expanded": lambda: (mingru.models.Block(INPUT, mlp=2), sequence()[:1].expand(4, S, INPUT)),
    "Stack, time-major memory": lambda: (
        mingru.Stack([mingru.MinGRU(INPUT, INPUT, residual="highway")], residual=True),
        sequence(True).transpose(0, 1),
    ),
    "drop_in.GRU": lambda: (mingru.drop_in.GRU(INPUT, HIDDEN), sequence(time_first=True)),
    "drop_in.GRU, batch first": lambda: (mingru.drop_in.GRU(INPUT, HIDDEN, batch_first=True), sequence()),
    "drop_in.GRU, one sequence": lambda: (mingru.drop_in.GRU(INPUT, HIDDEN), torch.randn(S, INPUT)),
    "drop_in.GRU, packed": lambda: (mingru.drop_in.GRU(INPUT, HIDDEN), packed()),
    "drop_in.GRUCell": lambda: (mingru.drop_in.GRUCell(INPUT, HIDDEN), torch.randn(B, INPUT)),
    "drop_in.GRUCell, one": lambda: (mingru.drop_in.GRUCell(INPUT, HIDDEN), torch.randn(INPUT)),
    "drop_in.LSTM": lambda: (mingru.drop_in.LSTM(INPUT, HIDDEN), sequence(time_first=True)),
    "drop_in.LSTM, projected, one": lambda: (mingru.drop_in.LSTM(INPUT, HIDDEN, proj_size=2), torch.randn(S, INPUT)),
    "drop_in.LSTMCell": lambda: (mingru.drop_in.LSTMCell(INPUT, HIDDEN), torch.randn(B, INPUT)),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_no_output_is_a_view(name, backend, grad):
    module, *args = CALLS[name]()
    with torch.set_grad_enabled(grad), mingru.use_backend(backend):
        outputs = [each for each in pytree.tree_leaves(module(*args)) if isinstance(each, torch.Tensor)]
    storages = [each.untyped_storage().data_ptr() for each in outputs if each.numel()]
    assert len(set(storages)) == len(storages), "two outputs share memory"
    for each in outputs:
        assert each._base is None, "a view"
        assert each.is_contiguous()
        assert each.requires_grad == (grad and each.is_floating_point())
        each.detach_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_a_state_detached_in_place_cuts_the_gradient_and_nothing_else(name, backend):
    module, *args = CALLS[name]()
    if not isinstance(args[0], torch.Tensor) or args[0].numel() == 0:
        return
    with mingru.use_backend(backend):
        *_, state = outputs = pytree.tree_leaves(module(*args))
        values = [each.clone() for each in outputs]
        if len(outputs) > 1:
            state.detach_()
        outputs[0].sum().backward()
    for each, value in zip(outputs, values, strict=True):
        assert torch.equal(each, value)
    assert all(weight.grad is not None for weight in module.parameters() if weight.requires_grad)


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
