"""The truth: plain PyTorch in float64, one step after the other. `test_reference.py` checks it by hand."""

import torch
from torch import Tensor


def g(v: Tensor) -> Tensor:
    return torch.where(v >= 0, v + 0.5, torch.sigmoid(v))


ACTIVATIONS = {"positive": g, "linear": lambda v: v, "tanh": torch.tanh}
ZERO = {"positive": 0.5, "linear": 0.0, "tanh": 0.0}


def linear_scan(a, b, h=None, reverse=False, reset=None, initial=0.0):
    """States (B, S, *) of h_t = a_t h_{t-1} + b_t; a reset puts h_{t-1} to `initial`."""
    num_steps = b.shape[1]
    initial = torch.as_tensor(initial, dtype=b.dtype).expand_as(b[:, :1]).squeeze(1)
    state = initial if h is None else h.to(b.dtype).expand_as(b[:, :1]).squeeze(1)
    states = [None] * num_steps
    for t in range(num_steps - 1, -1, -1) if reverse else range(num_steps):
        if reset is not None:
            mask = reset[:, t].reshape(-1, *[1] * (state.dim() - 1))
            state = torch.where(mask, initial, state)
        state = a[:, t] * state + b[:, t]
        states[t] = state
    return torch.stack(states, 1) if states else b.clone()


def mingru(gate, candidate, h=None, reset=None, activation="positive", initial=None, reverse=False):
    z = torch.sigmoid(gate)
    initial = ZERO[activation] if initial is None else initial
    return linear_scan(torch.sigmoid(-gate), z * ACTIVATIONS[activation](candidate), h, reverse, reset, initial)


def minlstm(forget, admit, candidate, h=None, reset=None, activation="positive", initial=None, reverse=False):
    f, i = torch.sigmoid(forget), torch.sigmoid(admit)
    initial = ZERO[activation] if initial is None else initial
    return linear_scan(f / (f + i), i / (f + i) * ACTIVATIONS[activation](candidate), h, reverse, reset, initial)


CELLS = {"mingru": mingru, "minlstm": minlstm}


def layers(rnn, x, h=None, reset=None):
    """What a `MinGRU` or a `MinLSTM` computes, from a module's weights, in float64 and with batch first; no dropout."""
    x = x.double()
    weights = {name: weight.double() for name, weight in rnn.named_parameters()}
    count = rnn.num_layers * rnn.num_directions
    initial = weights.get("initial_state", torch.full((1, 1, 1, 1), ZERO[rnn.candidate], dtype=torch.double))
    initial = initial.expand(count, x.shape[0], 1, rnn.hidden_dims)
    h = initial if h is None else h.double().expand_as(initial)
    last = []
    for index in range(rnn.num_layers):
        y, prefix, outs = x, f"layers.{index}.", []
        if rnn.norm is not None:
            scale = weights[prefix + "norm.weight"]
        if rnn.norm == "layer":
            y = torch.nn.functional.layer_norm(y, y.shape[-1:], scale, weights[prefix + "norm.bias"])
        if rnn.norm == "rms":
            y = y / (y.square().mean(-1, keepdim=True) + torch.finfo(scale.dtype).eps).sqrt() * scale
        for direction, name in enumerate(["linear", "linear_reverse"][: rnn.num_directions]):
            pre = y @ weights[f"{prefix}{name}.weight"].T + weights.get(f"{prefix}{name}.bias", 0.0)
            at = index * rnn.num_directions + direction
            cut = reset
            if direction == 1:
                cut = None if reset is None else torch.cat([reset[:, 1:], torch.zeros_like(reset[:, :1])], 1)
            inputs = pre.split(rnn.hidden_dims, -1)
            out = CELLS[rnn.cell](*inputs, h[at], cut, rnn.candidate, initial[at], reverse=direction == 1)
            last.append(out[:, :1] if direction else out[:, -1:])
            outs.append(out)
        out = torch.cat(outs, -1)
        if rnn.residual:
            align = weights.get(prefix + "align.weight")
            out = out + (x if align is None else x @ align.T)
        x = out
    return x, torch.stack(last)


def relative_error(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).abs() / truth.abs()).max().item()
