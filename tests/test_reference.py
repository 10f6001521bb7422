"""The reference itself, against numbers worked by hand."""

import math

import reference
import torch


def test_g_by_hand():
    v = torch.tensor([-math.log(3.0), -0.0, 0.0, 2.0], dtype=torch.double)
    assert reference.g(v).tolist() == [0.25, 0.5, 0.5, 2.5]


def test_linear_scan_by_hand():
    a = torch.tensor([[2.0, 3.0, -1.0]], dtype=torch.double)
    b = torch.tensor([[1.0, 0.5, 4.0]], dtype=torch.double)
    # 2*5+1 = 11; 3*11+0.5 = 33.5; -33.5+4 = -29.5
    assert reference.linear_scan(a, b, torch.tensor([[5.0]])).tolist() == [[11.0, 33.5, -29.5]]
    # From the end: -1*5+4 = -1; 3*-1+0.5 = -2.5; 2*-2.5+1 = -4
    assert reference.linear_scan(a, b, torch.tensor([[5.0]]), reverse=True).tolist() == [[-4.0, -2.5, -1.0]]
    # Cut before the second step, back to 7: 11; 3*7+0.5 = 21.5; -21.5+4 = -17.5
    reset = torch.tensor([[False, True, False]])
    assert reference.linear_scan(a, b, torch.tensor([[5.0]]), reset=reset, initial=7.0).tolist() == [
        [11.0, 21.5, -17.5]
    ]


def test_mingru_by_hand():
    # sigma(0) = 1/2 and sigma(ln 3) = 3/4; g(1.5) = 2 and g(-ln 3) = 1/4.
    gate = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.double)
    candidate = torch.tensor([[1.5, -math.log(3.0)]], dtype=torch.double)
    # From g(0) = 1/2: 1/2*1/2 + 1/2*2 = 1.25; 1/4*1.25 + 3/4*1/4 = 0.5
    states = reference.mingru(gate, candidate)
    torch.testing.assert_close(states, torch.tensor([[1.25, 0.5]], dtype=torch.double), rtol=1e-15, atol=0)
    # The plain candidate, from 0: 1/2*1.5 = 0.75; 1/4*0.75 - 3/4*ln 3
    states = reference.mingru(gate, candidate, activation="linear")
    expected = torch.tensor([[0.75, 0.1875 - 0.75 * math.log(3.0)]], dtype=torch.double)
    torch.testing.assert_close(states, expected, rtol=1e-15, atol=0)
