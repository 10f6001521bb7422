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
