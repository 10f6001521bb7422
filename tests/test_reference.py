"""The reference itself, against numbers worked by hand."""

import math

import pytest
import reference
import torch
from torch.testing import assert_close

from mingru.models import Block
from mingru.ops.backends.native import CELL_NUMBERS
from mingru.ops.cells import CELLS


def tensor(*values):
    return torch.tensor([values], dtype=torch.double)


LN_3, EXACT = math.log(3.0), {"rtol": 1e-15, "atol": 0}


def test_every_cell_has_a_reference():
    # Those with recurrent weights have `reference.gru`, and torch's LSTM.
    assert {name for name in (*CELLS, *CELL_NUMBERS) if "scan" not in name} <= {*reference.CELLS, "gru", "lstm"}


def test_scan_by_hand():
    assert reference.g(tensor(-LN_3, -0.0, 0.0, 2.0)).tolist() == [[0.25, 0.5, 0.5, 2.5]]
    a, b, h = tensor(2.0, 3.0, -1.0), tensor(1.0, 0.5, 4.0), tensor(5.0)
    # 2*5+1 = 11; 3*11+0.5 = 33.5; -33.5+4 = -29.5
    assert reference.linear_scan(a, b, h).tolist() == [[11.0, 33.5, -29.5]]
    # From the end: -1*5+4 = -1; 3*-1+0.5 = -2.5; 2*-2.5+1 = -4
    assert reference.linear_scan(a, b, h, reverse=True).tolist() == [[-4.0, -2.5, -1.0]]
    # Cut before the second step, back to 7: 11; 3*7+0.5 = 21.5; -21.5+4 = -17.5
    reset = torch.tensor([[False, True, False]])
    assert reference.linear_scan(a, b, h, reset=reset, initial=7.0).tolist() == [[11.0, 21.5, -17.5]]


def test_cells_by_hand():
    # sigma(0) = 1/2 and sigma(ln 3) = 3/4; g(1.5) = 2 and g(-ln 3) = 1/4.
    gate, candidate = tensor(0.0, LN_3), tensor(1.5, -LN_3)
    # From g(0) = 1/2: 1/2*1/2 + 1/2*2 = 1.25; 1/4*1.25 + 3/4*1/4 = 0.5
    assert_close(reference.mingru(gate, candidate), tensor(1.25, 0.5), **EXACT)
    # The plain candidate, from 0: 1/2*1.5 = 0.75; 1/4*0.75 - 3/4*ln 3
    states = reference.mingru(gate, candidate, activation="linear")
    assert_close(states, tensor(0.75, 0.1875 - 0.75 * LN_3), **EXACT)
    # f is 3/4, 1/2 and i is 1/2, 3/4. From 1/2, of gates that sum to 1: 3/5*1/2 + 2/5*2 = 1.1; 2/5*1.1 + 3/5*1/4 = 0.59
    inputs = (gate.flip(1), gate, candidate)
    assert_close(reference.minlstm(*inputs), tensor(1.1, 0.59), **EXACT)
    # Of independent gates: 3/4*1/2 + 1/2*2 = 1.375; 1/2*1.375 + 3/4*1/4 = 0.875
    assert_close(reference.minlstm_unnormalized(*inputs), tensor(1.375, 0.875), **EXACT)


def test_norms_by_hand():
    weights = {"norm.weight": tensor(2.0, 3.0)[0], "norm.bias": tensor(0.5, 0.25)[0]}
    # The root of the mean square is sqrt((1 + 49) / 2) = 5; mean 4 and deviation 3.
    assert_close(reference.norm(tensor(1.0, 7.0), "rms", weights, "norm", 0.0), tensor(0.4, 4.2))
    assert_close(reference.norm(tensor(3000.0, 21000.0), "layer", weights, "norm", 0.0), tensor(-1.5, 3.25))


def block_without_layer(**options):
    """Return a block of one feature whose recurrent layer adds 0."""
    with pytest.warns(UserWarning, match="norm='rms' leaves only the sign"):
        block = Block(1, dtype=torch.double, **options)
    with torch.no_grad():
        block.out.weight.zero_()
        block.out.bias.zero_()
    return block


def test_convolution_of_a_block_by_hand():
    block = block_without_layer(conv=3)
    with torch.no_grad():
        block.conv.weight.copy_(torch.tensor([[2.0], [10.0], [100.0]]))
        block.conv.bias.fill_(0.5)
    x, h = tensor(1.0, 2.0, 3.0).unsqueeze(2), [block.initial(1)[0], tensor(4.0, 5.0).view(1, 1, 2, 1)]
    # 1+2*1+10*5+100*4+0.5; 2+2*2+10*1+100*5+0.5; 3+2*3+10*2+100*1+0.5
    out, (_, past) = reference.block(block, x, h)
    assert out.flatten().tolist() == [453.5, 516.5, 129.5] and past.tolist() == [[[[2.0], [3.0]]]]
    # A reset before the second step: 2+2*2+0.5; 3+2*3+10*2+0.5
    out, (_, past) = reference.block(block, x, h, torch.tensor([[False, True, False]]))
    assert out.flatten().tolist() == [453.5, 6.5, 29.5]
    # A reset before the last step: the state has no step from before it.
    out, (_, past) = reference.block(block, x, h, torch.tensor([[False, False, True]]))
    assert past.tolist() == [[[[0.0], [3.0]]]]


def test_mlp_of_a_block_by_hand():
    block = block_without_layer(mlp=1)
    with torch.no_grad():
        block.mlp[1].weight.fill_(2.0)
        block.mlp[1].bias.fill_(-1.0)
        block.mlp[3].weight.fill_(3.0)
        block.mlp[3].bias.fill_(0.25)
    # The norm of one feature is its sign; 2*1-1 = 1, and 1 times the normal distribution function at 1 is 0.8413447.
    out, _ = reference.block(block, torch.full((1, 1, 1), 5.0))
    assert_close(out.item(), 5 + 3 * 0.8413447460685429 + 0.25, rtol=1e-14, atol=0)
