"""The residual block: dropout, states and errors. Its values: tests/properties."""

import pytest
import torch
import torch.nn.functional as F
from cases import BLOCKS, parametrized
from torch.testing import assert_close

from mingru.models import Block

DIMS, B, S = 5, 3, 11


def test_dropout():
    x = torch.randn(B, S, DIMS)
    block, plain = Block(DIMS, conv=3, mlp=2, dropout=1.0), Block(DIMS, conv=3, mlp=2)
    assert_close(block(x)[0], x + block.conv(x, torch.zeros(1, B, 2, DIMS))[0])
    plain.load_state_dict(block.state_dict())
    assert torch.equal(block.eval()(x)[0], plain(x)[0])
    block = Block(DIMS, mlp=2, dropout=0.5)
    torch.manual_seed(1)
    out, _ = block(x)
    torch.manual_seed(1)
    y = x + F.dropout(block.out(block.rnn(x)[0]), 0.5)
    assert_close(out, y + F.dropout(block.mlp(y), 0.5))


@parametrized(BLOCKS)
def test_states(case):
    """Their shapes, the default ones, and that they do not keep the sequence."""
    block = case.make()
    shapes = block.state_shapes(B)
    for num_steps in (1, 5, 500):
        x, h = torch.randn(B, num_steps, DIMS), block.initial_state(B)
        for arguments in ({}, {"reset": torch.rand(B, num_steps) < 0.3}, {"lengths": torch.tensor([1, num_steps, 1])}):
            for with_grad in (True, False):
                with torch.set_grad_enabled(with_grad):
                    out, last = block(x, **arguments)
                    assert torch.equal(block(x, tuple(h), **arguments)[0], out)
                assert [each.shape for each in last] == [each.shape for each in h] == shapes
                assert all(each.untyped_storage().nbytes() == each.numel() * each.element_size() for each in last)


@pytest.mark.usefixtures("_scripts_are_freed")
def test_states_of_a_scripted_block_do_not_keep_the_sequence():
    _, h = torch.jit.script(Block(DIMS, conv=4))(torch.randn(B, 500, DIMS))
    assert [each.untyped_storage().nbytes() for each in h] == [4 * B * DIMS, 4 * B * 3 * DIMS]
