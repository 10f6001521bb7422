"""Functions for sequences: `elapsed_times`, with times that are too large and bounds by hand; and `check_resets`, which
names mistakes of flags that are moved in time, inverted, or not used in the rollout. Values in layers: properties."""

import functools
import math
import warnings

import pytest
import torch
from cases import EXACT, TIGHT
from torch import nn
from torch.testing import assert_close

import mingru
from mingru.check import forms as check
from mingru.functional import check_resets, elapsed_times

B, S, IN, H = 4, 9, 3, 5


def test_min_decay_bounds_the_decay():
    """With candidates of 0, the state shrinks at most by the bound of its layer."""
    rnn = mingru.MinGRU(1, 1, 2, candidate="linear", bias=False, min_decay=[0.25, 0.75])
    with torch.no_grad():
        for weight in rnn.parameters():
            weight.copy_(torch.tensor([[100.0], [0.0]]))
    _, h = rnn(torch.ones(1, 2, 1), torch.ones(2, 1, 1, 1))
    # The second layer has gates 100 * 0.25 and 100 * 0.0625: its decays are its bound too.
    assert_close(h.flatten(), torch.tensor([0.25**2, 0.75**2]), rtol=1e-2, atol=0)


@pytest.fixture(autouse=True)
def _nothing_was_called():
    check._warn_once.cache_clear()
    check._WITH_LONG_SEQUENCES.clear()


@pytest.mark.parametrize("grad", [True, False])
def test_nanoseconds_warn_once(grad):
    rnn, x, dt = mingru.MinGRU(IN, H), torch.zeros(2, 3, IN), torch.full((2, 3), 3.6e12)
    with torch.set_grad_enabled(grad), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for usual in (dt / 3.6e12, dt * torch.inf, torch.tensor([[1.0, 3.6e12, 0.0]]).expand(2, 3)):
            rnn(x, dt=usual)
        assert not seen
        for _ in range(2):
            rnn(x, dt=dt)
            rnn(x, dt=dt.where(torch.tensor([False, True, True]), 0.0))
    assert [(each.filename, each.category) for each in seen] == [(__file__, RuntimeWarning)]
    assert str(seen[0].message).startswith("MinGRU: dt is above 1e+06 at all steps, which erases the state; divide dt")


TIMES, INCREASING = torch.arange(9.0), "increasing at all steps, as times are"


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("dt", "problem"),
    [
        (torch.zeros(2, 3), "0 at all steps, which ignores x"),
        (torch.zeros(2, 1), ""),
        (TIMES.expand(2, 9), INCREASING),
        (torch.stack([TIMES, TIMES * (TIMES < 4)]), INCREASING),  # the second is padded
        (torch.stack([TIMES, TIMES.flip(0) + 1]), ""),
        ((TIMES + 1).expand(2, 9)[:, :7], ""),
        (torch.ones(2, 9), ""),
    ],
)
def test_times_in_place_of_gaps_warn_in_the_first_long_call(dt, problem, batch_first):
    rnn, order = mingru.MinGRU(IN, H, batch_first=batch_first), (0, 1) if batch_first else (1, 0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for given in (torch.ones(2, 3), dt, dt + 0):
            rnn(torch.zeros(*given.shape, IN).permute(*order, 2), dt=given.permute(order))
    assert [str(each.message).partition(";")[0] for each in seen] == [f"MinGRU: dt is {problem}"] * bool(problem)


# elapsed_times


def test_elapsed_times_by_hand():
    t = torch.tensor([[1.0, 3.0, 3.0, 7.5], [-2.0, 0.0, 1.0, 1.5]], dtype=torch.double)
    expected = torch.tensor([[0.5, 2.0, 0.0, 4.5], [0.5, 2.0, 1.0, 0.5]], dtype=torch.double)
    assert_close(elapsed_times(t, 0.5), expected, **EXACT)
    assert_close(elapsed_times(t.t(), 0.5, batch_first=False), expected.t(), **EXACT)
    # Each sequence has its own first time, here of another dtype.
    own = elapsed_times(t, torch.tensor([4, 6]))
    assert_close(own, torch.cat([torch.tensor([[4.0], [6.0]]).double(), expected[:, 1:]], 1), **EXACT)
    assert elapsed_times(t[:, :0], 1.0).shape == (2, 0) and elapsed_times(t[:0], 1.0).shape == (0, 4)
    assert elapsed_times(t, math.inf)[:, 0].isinf().all()
    # Integers are exact: float32 cannot tell the seconds of today's Unix times apart.
    t = 1_700_000_000 + torch.tensor([[0, 1, 3]])
    assert_close(elapsed_times(t, 2.5), torch.tensor([[2.5, 1.0, 2.0]]), **EXACT)
    assert elapsed_times(torch.tensor([[0, 255]], dtype=torch.uint8), 1)[0, 1] == 255
    assert elapsed_times(torch.tensor([[-100, 100]], dtype=torch.int8), 1)[0, 1] == 200
    # Concatenated and padded sequences.
    t, reset = torch.tensor([[1.0, 2.0, 5.0, 0.0, 0.5]]), torch.arange(5)[None] == 3
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


class Model(torch.nn.Module):
    def forward(self, t):
        return elapsed_times(t, 1.5)


def test_elapsed_times_have_gradients_and_graphs():
    t, first = torch.rand(2, 5).double().cumsum(1).requires_grad_(), torch.rand(2).double().requires_grad_()
    function = functools.partial(elapsed_times, reset=torch.rand(2, 5) < 0.3, lengths=torch.tensor([4, 5]))
    assert torch.autograd.gradcheck(function, (t, first), check_forward_ad=True)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert_close(compiled(t, first), function(t, first), **EXACT)
    mapped = torch.vmap(lambda *args: elapsed_times(*(each[None] for each in args))[0])
    assert_close(mapped(t, first), elapsed_times(t, first), **EXACT)
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("steps")},)
    exported = torch.export.export(Model(), (t.detach(),), dynamic_shapes=sizes).module()
    other = torch.rand(3, 9).double().cumsum(1)
    assert_close(exported(other), elapsed_times(other, 1.5), **EXACT)


# check_resets

LAYERS = {
    "MinGRU": lambda: mingru.MinGRU(IN, H, 2, candidate="tanh", residual=True),
    "MinLSTM": lambda: mingru.MinLSTM(IN, H, batch_first=False),
    "Stack": lambda: mingru.Stack([mingru.MinGRU(IN, H), mingru.MinLSTM(H, H)]),
    "drop_in.LSTM": lambda: mingru.drop_in.LSTM(IN, H),
}
MISTAKES = {
    "early": r"flags one step early; pass reset\[t\] = flags\[t - 1\]",
    "late": r"flags one step late; pass reset\[t\] = flags\[t \+ 1\]",
    "inverted": "inverted flags; pass ~reset",
    "unused": "a rollout without resets; pass each step its flags there too",
    "other": "flags that do not reproduce the rollout; check h, and that rnn has not changed and has no dropout",
    "one": "flags that do not reproduce the rollout.*",
}


def rollout(rnn, x, h, reset, time):
    outs = []
    for one, flags in zip(x.split(1, time), reset.split(1, time), strict=True):
        out, h = rnn(one, h, reset=flags)
        outs.append(out)
    return torch.cat(outs, time)


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
@pytest.mark.parametrize("name", LAYERS)
def test_the_mistake_is_named(name, mistake):
    rnn = LAYERS[name]()
    time = int(rnn.batch_first)
    # One more step at both ends, so that flags can be moved.
    flags = torch.rand(B, S + 2) < 0.3
    flags[0, 5] = True
    moved = {"early": flags[:, 2:], "late": flags[:, :-2], "inverted": ~flags[:, 1:-1]}
    in_order = [torch.randn(B, S, IN), flags[:, 1:-1], moved.get(mistake, flags[:, 1:-1])]
    x, right, reset = in_order if time == 1 else (each.transpose(0, 1) for each in in_order)
    _, h = rnn(x)
    out = rollout(rnn, x, h, torch.zeros_like(right) if mistake == "unused" else right, time)
    out = out * 1.01 if mistake == "other" else out
    if mistake == "one":
        out[-1, -1, 2] += 0.01
    if mistake is None:
        check_resets(rnn, x, h, reset, out)
        return
    with pytest.raises(ValueError, match=f"^check_resets: reset must be .*, got {MISTAKES[mistake]}$"):
        check_resets(rnn, x, h, reset, out)


def test_any_function_and_observations_of_any_dims():
    encoder, rnn = nn.Flatten(2), mingru.MinGRU(IN * 2, H)
    x, reset = torch.randn(B, S, IN, 2), torch.rand(B, S) < 0.3
    reset[0, 1] = True
    out = rollout(rnn, encoder(x), None, reset, 1)
    check_resets(lambda x, h, reset: rnn(encoder(x), h, reset), x, None, reset, out)
