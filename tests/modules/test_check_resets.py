"""`check_resets`: which mistake it names, for flags moved in time, inverted, and not used in the rollout."""

import pytest
import torch
from torch import nn

import mingru
from mingru.functional import check_resets

B, S, IN, H = 4, 9, 3, 5
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
}


def rollout(rnn, x, h, reset, time):
    outs = []
    for one, flags in zip(x.split(1, time), reset.split(1, time), strict=True):
        out, h = rnn(one, h, reset=flags)
        outs.append(out)
    return torch.cat(outs, time)


@pytest.fixture(params=LAYERS)
def case(request):
    """A layer, a function that makes observations or flags time first if it is, and its dimension of time."""
    rnn = LAYERS[request.param]()
    time = int(rnn.batch_first)
    return rnn, (lambda each: each if time == 1 else each.transpose(0, 1)), time


def call_of(case, mistake):
    rnn, ordered, time = case
    # One more step at both ends, so that flags can be moved.
    flags = torch.rand(B, S + 2) < 0.3
    flags[0, 5] = True
    x, reset = ordered(torch.randn(B, S, IN)), ordered(flags[:, 1:-1])
    _, h = rnn(x)
    out = rollout(rnn, x, h, torch.zeros_like(reset) if mistake == "unused" else reset, time)
    moved = {"early": flags[:, 2:], "late": flags[:, :-2], "inverted": ~flags[:, 1:-1]}
    reset = ordered(moved[mistake]) if mistake in moved else reset
    return rnn, x, h, reset, out


def test_right_flags(case):
    check_resets(*call_of(case, None))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_mistake_is_named(case, mistake):
    rnn, x, h, reset, out = call_of(case, mistake)
    if mistake == "other":
        out = out * 1.01
    with pytest.raises(ValueError, match=f"^check_resets: reset must be .*, got {MISTAKES[mistake]}$"):
        check_resets(rnn, x, h, reset, out)


def test_one_sequence_is_enough():
    rnn, x, h, reset, out = call_of((mingru.MinGRU(IN, H), lambda each: each, 1), None)
    out[1, -1, 2] += 0.01
    with pytest.raises(ValueError, match="do not reproduce"):
        check_resets(rnn, x, h, reset, out)


def test_any_function_and_observations_of_any_dims():
    encoder, rnn = nn.Flatten(2), mingru.MinGRU(IN * 2, H)
    x, reset = torch.randn(B, S, IN, 2), torch.rand(B, S) < 0.3
    reset[0, 1] = True
    out = rollout(rnn, encoder(x), None, reset, 1)
    check_resets(lambda x, h, reset: rnn(encoder(x), h, reset), x, None, reset, out)


@pytest.mark.parametrize(
    ("reset", "width", "error", "message"),
    [
        (torch.ones(B, S), H, TypeError, r"reset must be of dtype torch\.bool, got torch\.float32"),
        (torch.ones(S, B, dtype=torch.bool), H, ValueError, r"reset must be \(B, S\) = \(4, 9\), got \(9, 4\)"),
        (torch.arange(S).expand(B, S) == 0, H, ValueError, "reset must be True somewhere after the first step, got no"),
        (torch.ones(B, S, dtype=torch.bool), 1, ValueError, r"out must be the shape of a pass = \(4, 9, 5\), got \(4"),
    ],
)
def test_bad_arguments(reset, width, error, message):
    with pytest.raises(error, match=f"^check_resets: {message}"):
        check_resets(mingru.MinGRU(IN, H), torch.randn(B, S, IN), None, reset, torch.zeros(B, S, width))
