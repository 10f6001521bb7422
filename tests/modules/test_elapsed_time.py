"""`elapsed_times`, what `dt` and `min_decay` refuse, and bounds by hand. Their values in layers: tests/properties."""

import functools
import math
import warnings

import pytest
import torch
from refusals import assert_refused
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import mingru
from mingru import check
from mingru.functional import elapsed_times

B, S, IN, H = 3, 21, 4, 6
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def test_per_sample_gradients():
    rnn = mingru.MinGRU(IN, H).double()
    x, h, dt = torch.randn(B, S, IN).double(), torch.rand(1, B, 1, H).double(), torch.rand(B, S).double()
    parameters = {name: weight.detach() for name, weight in rnn.named_parameters()}

    def loss(parameters, x, h, dt):
        args = {"dt": dt[None]}
        return torch.func.functional_call(rnn, parameters, (x[None], h[:, None]), args)[0].square().sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 1, 0))(parameters, x, h, dt)
    whole = torch.autograd.grad(rnn(x, h, dt=dt)[0].square().sum(), rnn.parameters())
    for per_sample, total in zip(each.values(), whole, strict=True):
        assert_close(per_sample.sum(0), total, **TIGHT)


def test_min_decay_bounds_the_decay():
    """With candidates of 0, the state shrinks at most by the bound of its layer."""
    rnn = mingru.MinGRU(1, 1, 2, candidate="linear", bias=False, min_decay=[0.25, 0.75])
    with torch.no_grad():
        for weight in rnn.parameters():
            weight.copy_(torch.tensor([[100.0], [0.0]]))
    _, h = rnn(torch.ones(1, 2, 1), torch.ones(2, 1, 1, 1))
    # The second layer has gates 100 * 0.25 and 100 * 0.0625: its decays are its bound too.
    assert_close(h.flatten(), torch.tensor([0.25**2, 0.75**2]), rtol=1e-2, atol=0)
    assert repr(rnn).startswith("MinGRU(\n  1, 1, num_layers=2, bias=False, candidate='linear', min_decay=(0.25, 0.75)")


@pytest.mark.parametrize("grad", [True, False])
def test_nanoseconds_warn_once(grad, monkeypatch):
    monkeypatch.setattr(check, "_warn_of_large_times", functools.cache(check._warn_of_large_times.__wrapped__))
    rnn, x, dt = mingru.MinGRU(IN, H), torch.zeros(2, 3, IN), torch.full((2, 3), 3.6e12)
    with torch.set_grad_enabled(grad), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for usual in (dt / 3.6e12, dt * torch.inf, dt * 0, torch.tensor([[1.0, 3.6e12, 0.0]]).expand(2, 3)):
            rnn(x, dt=usual)
        assert not seen
        for _ in range(2):
            rnn(x, dt=dt)
            rnn(x, dt=dt.where(torch.tensor([False, True, True]), 0.0))
    assert [(each.filename, each.category) for each in seen] == [(__file__, RuntimeWarning)]
    assert str(seen[0].message).startswith("MinGRU: dt is above 1e+06 at all steps, which erases the state; divide dt")


def test_errors():
    rnn, x, dt = mingru.MinGRU(IN, H), torch.zeros(2, 3, IN), torch.ones(2, 3)
    bad = {
        "MinGRU: dt must be a tensor, got float; use torch.as_tensor": 1.0,
        r"MinGRU: dt must be \(B, S\) = \(2, 3\), got \(3, 2\)": dt.t(),
        "MinGRU: dt must be torch.float32 like x, got torch.float64": dt.double(),
        "MinGRU: dt must be at least 0, got -1.0": -dt,
        "MinGRU: dt must be at least 0, got nan": dt * math.nan,
    }
    for message, value in bad.items():
        with pytest.raises((TypeError, ValueError), match=message):
            rnn(x, dt=value)
    lengths = torch.tensor([3, 2])
    packed = pack_padded_sequence(x, lengths, True)
    with pytest.raises(TypeError, match="dt must be a PackedSequence like x, got Tensor; pack it with"):
        rnn(packed, dt=dt)
    with pytest.raises(ValueError, match="dt must be packed with the lengths of x, got other lengths"):
        rnn(packed, dt=pack_padded_sequence(dt, torch.tensor([3, 1]), True))
    with pytest.raises(ValueError, match=r"dt must be at least 0, got -1\.0"):
        rnn(packed, dt=pack_padded_sequence(-dt, lengths, True))
    with pytest.raises(ValueError, match=r"MinGRUCell: dt must be \(B,\) = \(2,\), got \(3,\)"):
        mingru.MinGRUCell(IN, H)(x[:, 0], dt=torch.ones(3))
    with pytest.raises(ValueError, match="Stack: dt must be None because convolutional layers"):
        mingru.Stack([mingru.MinConv1dGRU(1, 2, 1)])(torch.randn(1, 2, 1, 5), dt=torch.ones(1, 2))
    for kind in (mingru.MinGRU, mingru.MinGRUCell):
        signed = kind(IN, H, gate="signed")
        given, times = (x, dt) if kind is mingru.MinGRU else (x[:, 0], dt[:, 0])
        with pytest.raises(ValueError, match=f"{kind.__name__}: dt must be None because the gate is 'signed'"):
            signed(given, dt=times)
    with pytest.raises(torch.jit.Error, match="MinGRUCell: dt must be None because this cell takes no"):
        torch.jit.script(signed)(given, dt=times)
    with pytest.raises(torch.jit.Error, match=r"MinGRU: dt must be \[2, 3\], got \[3, 2\]"):
        torch.jit.script(rnn)(x, dt=dt.t())
    for value in (1.0, -0.1, [0.1, 0.2], math.nan):
        with pytest.raises(ValueError, match="MinGRU: min_decay must be a number from 0 to 1"):
            mingru.MinGRU(IN, H, min_decay=value)
    for value in (None, "0.1", True, [None]):
        with pytest.raises(TypeError, match="MinGRU: min_decay must be a number from 0 to 1"):
            mingru.MinGRU(IN, H, min_decay=value)
    with pytest.raises(ValueError, match="MinGRU: min_decay must be 0 because a decay with a lower bound"):
        mingru.MinGRU(IN, H, gate="signed", min_decay=0.1)


# elapsed_times


def test_elapsed_times_by_hand():
    t = torch.tensor([[1.0, 3.0, 3.0, 7.5], [-2.0, 0.0, 1.0, 1.5]], dtype=torch.double)
    expected = torch.tensor([[0.5, 2.0, 0.0, 4.5], [0.5, 2.0, 1.0, 0.5]], dtype=torch.double)
    assert_close(elapsed_times(t, 0.5), expected, rtol=0, atol=0)
    assert_close(elapsed_times(t.t(), 0.5, batch_first=False), expected.t(), rtol=0, atol=0)
    # Each sequence has its own first time, here of another dtype.
    own = elapsed_times(t, torch.tensor([4, 6]))
    assert own.dtype == torch.double
    assert_close(own, torch.cat([torch.tensor([[4.0], [6.0]]), expected[:, 1:]], 1), rtol=0, atol=0)
    assert elapsed_times(t[:, :0], 1.0).shape == (2, 0)
    assert elapsed_times(t[:0], 1.0).shape == (0, 4)
    assert elapsed_times(t, math.inf)[:, 0].isinf().all()


def test_elapsed_times_of_integers_are_exact():
    """float32 cannot tell the seconds of today's Unix times apart."""
    t = 1_700_000_000 + torch.tensor([[0, 1, 3]])
    assert_close(elapsed_times(t, 2.5), torch.tensor([[2.5, 1.0, 2.0]]), rtol=0, atol=0)
    assert elapsed_times(torch.tensor([[0, 255]], dtype=torch.uint8), 1)[0, 1] == 255
    assert elapsed_times(torch.tensor([[-100, 100]], dtype=torch.int8), 1)[0, 1] == 200


def test_elapsed_times_of_concatenated_and_padded_sequences():
    t = torch.tensor([[1.0, 2.0, 5.0, 0.0, 0.5]])
    reset = torch.tensor([[False, False, False, True, False]])
    assert elapsed_times(t, 9.0, reset=reset).tolist() == [[9.0, 1.0, 3.0, 9.0, 0.5]]
    assert elapsed_times(t.t(), 9.0, reset=reset.t(), batch_first=False).flatten().tolist() == [9.0, 1.0, 3.0, 9.0, 0.5]
    padded = torch.tensor([[1.0, 2.0, 5.0], [4.0, 0.0, math.nan], [math.nan, 0.0, 0.0]])
    dt = elapsed_times(padded, 9.0, lengths=torch.tensor([3, 1, 0]))
    assert dt.tolist() == [[9.0, 1.0, 3.0], [9.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_elapsed_times_continue_a_sequence():
    rnn, x, t = mingru.MinGRU(IN, H).double(), torch.randn(B, S, IN).double(), torch.rand(B, S).double().cumsum(1)
    whole, last = rnn(x, dt=elapsed_times(t, 2.0))
    head, h = rnn(x[:, :8], dt=elapsed_times(t[:, :8], 2.0))
    tail, h = rnn(x[:, 8:], h, dt=elapsed_times(t[:, 8:], t[:, 8] - t[:, 7]))
    assert_close((torch.cat([head, tail], 1), h), (whole, last), **TIGHT)
    # The mistake that it prevents: a difference padded with 0 ignores the first observation.
    other = torch.cat([x[:, :1] + 1, x[:, 1:]], 1)
    wrong = torch.nn.functional.pad(t.diff(), (1, 0))
    assert torch.equal(rnn(other, dt=wrong)[1], rnn(x, dt=wrong)[1])
    assert not torch.allclose(rnn(other, dt=elapsed_times(t, 2.0))[1], last)


def test_elapsed_times_have_gradients_and_graphs():
    t, first = torch.rand(2, 5).double().cumsum(1).requires_grad_(), torch.rand(2).double().requires_grad_()
    lengths, reset = torch.tensor([4, 5]), torch.rand(2, 5) < 0.3

    def function(t, first):
        return elapsed_times(t, first, reset=reset, lengths=lengths)

    assert torch.autograd.gradcheck(function, (t, first), check_forward_ad=True)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert_close(compiled(t, first), function(t, first), rtol=0, atol=0)
    mapped = torch.vmap(lambda t, first: elapsed_times(t[None], first[None])[0])(t, first)
    assert_close(mapped, elapsed_times(t, first), rtol=0, atol=0)

    class Model(torch.nn.Module):
        def forward(self, t):
            return elapsed_times(t, 1.5)

    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("steps")},)
    exported = torch.export.export(Model(), (t.detach(),), dynamic_shapes=sizes).module()
    traced = torch.jit.trace(Model(), t.detach())
    other = torch.rand(3, 9).double().cumsum(1)
    for module in (exported, traced):
        assert_close(module(other), elapsed_times(other, 1.5), rtol=0, atol=0)


T = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 4.5]])
BAD_TIMES = {
    "a list": (
        {"t": [[1.0]]},
        TypeError,
        r"t must be a tensor \(B, S\), got list; use torch\.as_tensor; convert numpy",
    ),
    "one dimension": ({"t": T[0]}, ValueError, r"t must be \(B, S\), got \(3,\)"),
    "one dimension, time first": ({"t": T[0], "batch_first": False}, ValueError, r"t must be \(S, B\), got \(3,\)"),
    "bools": ({"t": T > 1}, TypeError, r"t must be of a floating-point or integer dtype, got torch\.bool"),
    "complex": ({"t": T.cfloat()}, TypeError, r"t must be of a floating-point or integer dtype, got torch\.complex64"),
    "decreasing": ({}, ValueError, r"t must be times that do not decrease, got 4\.5 after 5\.0 at t\[1, 2\]; sort the"),
    "decreasing, time first": ({"t": T.t(), "batch_first": False}, ValueError, r".* got 4\.5 after 5\.0 at t\[2, 1\]"),
    "NaN": ({"t": T[:1] * math.nan}, ValueError, r"t must be times that do not decrease, got .* at t\[0, 1\]"),
    "no first": ({"first": None}, TypeError, r"first must be a number of at least 0, or a tensor \(B,\), got None"),
    "first below 0": ({"first": -0.5}, ValueError, r"first must be a number of at least 0, .* got -0\.5"),
    "first NaN": ({"first": math.nan}, ValueError, r"first must be a number of at least 0, .* got nan"),
    "first of a sequence": ({"first": T[:, 0] - 2}, ValueError, r"first must be at least 0, got -1\.0 for sequence 0"),
    "first of each step": ({"first": T}, ValueError, r"first must be \(B,\) = \(2,\), got \(2, 3\)"),
    "first elsewhere": (
        {"first": T[:, 0].to("meta")},
        ValueError,
        r"first must be on cpu like t, got a tensor on meta",
    ),
    "a reset of numbers": ({"reset": T}, TypeError, r"reset must be of dtype torch\.bool"),
    "lengths above S": (
        {"lengths": torch.tensor([3, 4])},
        ValueError,
        r"lengths must be from 0 to S = 3, got \[3, 4\]",
    ),
    "batch_first of a number": ({"batch_first": 1}, TypeError, r"batch_first must be a bool, got 1"),
}


def test_elapsed_times_refuse():
    cases = {name: ({"t": T, "first": 1.0, **changed}, *rest) for name, (changed, *rest) in BAD_TIMES.items()}
    assert_refused(elapsed_times, cases, "elapsed_times: ")
