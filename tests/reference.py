"""Reference implementation in float64, one time step after the other.

`test_reference.py` compares it with values worked by hand.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import mingru as library


def g(v: Tensor) -> Tensor:
    return torch.where(v >= 0, v + 0.5, torch.sigmoid(v))


ACTIVATIONS = {"positive": g, "linear": lambda v: v, "tanh": torch.tanh}
EPS = torch.finfo(torch.double).eps
INITIAL_STATE = {"positive": 0.5, "linear": 0.0, "tanh": 0.0}


def linear_scan(a, b, h=None, reverse=False, reset=None, initial=0.0, times=torch.mul):
    """Return the states (B, S, *) of h_t = a_t h_{t-1} + b_t; a reset replaces h_{t-1} by `initial`."""
    num_steps = b.shape[1]
    initial = torch.as_tensor(initial, dtype=b.dtype).expand_as(b[:, :1]).squeeze(1)
    state = initial if h is None else h.to(b.dtype).expand_as(b[:, :1]).squeeze(1)
    states = [None] * num_steps
    for t in range(num_steps - 1, -1, -1) if reverse else range(num_steps):
        if reset is not None:
            mask = reset[:, t].reshape(-1, *[1] * (state.dim() - 1))
            state = torch.where(mask, initial, state)
        state = times(a[:, t], state) + b[:, t]
        states[t] = state
    return torch.stack(states, 1) if states else b.clone()


def decayed(keep, update, dt, min_decay):
    """Return the decay and the weight of the candidate, with a lower bound and elapsed times dt (B, S)."""
    keep, update = min_decay + (1 - min_decay) * keep, (1 - min_decay) * update
    if dt is None:
        return keep, update
    # log(keep) loses no digits if `update` is small.
    exponent = along_time(dt, keep.dim()) * torch.where(update < 0.5, torch.log1p(-update), torch.log(keep))
    return torch.exp(exponent), -torch.expm1(exponent)


def recurrence(a, z, candidate, h=None, reset=None, activation="positive", initial=None, reverse=False):
    """Return the states of h_t = a_t h_{t-1} + z_t activation(candidate_t)."""
    initial = INITIAL_STATE[activation] if initial is None else initial
    return linear_scan(a, z * ACTIVATIONS[activation](candidate), h, reverse, reset, initial)


# `start` is h, reset, activation, initial and reverse.


def mingru(gate, candidate, *start, dt=None, min_decay=0.0, **options):
    keep, z = decayed(torch.sigmoid(-gate), torch.sigmoid(gate), dt, min_decay)
    return recurrence(keep, z, candidate, *start, **options)


def minlstm(forget, input, candidate, *start, dt=None, min_decay=0.0, **options):
    f, i = torch.sigmoid(forget), torch.sigmoid(input)
    return recurrence(*decayed(f / (f + i), i / (f + i), dt, min_decay), candidate, *start, **options)


def minlstm_unnormalized(forget, input, candidate, *start, **options):
    return recurrence(torch.sigmoid(forget), torch.sigmoid(input), candidate, *start, **options)


def mingru_signed(gate, candidate, h=None, reset=None, activation="positive", initial=None, reverse=False):
    a, initial = -torch.tanh(gate / 2), 0.5 if initial is None else initial
    return recurrence(a, 1 - a.abs(), candidate, h, reset, activation, initial, reverse)


def of_numbers(
    numbers, a, z, candidate, h=None, reset=None, activation="positive", initial=None, reverse=False, **times
):
    """Compute with numbers of several features."""
    like = candidate[:, :1]
    h, initial = (
        None if state is None else numbers(torch.as_tensor(state, dtype=like.dtype).expand_as(like))
        for state in (h, 0.5 if initial is None else initial)
    )
    return linear_scan(a, z * numbers(ACTIVATIONS[activation](candidate)), h, reverse, reset, initial, **times)


def pairs(x):
    return torch.complex(x[:, :, 0::2], x[:, :, 1::2])


def fours(x):
    return torch.stack([x[:, :, part::4] for part in range(4)], -1)


def along_time(dt, dims):
    return 1.0 if dt is None else dt.reshape(*dt.shape, *[1] * (dims - 2))


def mingru_rotation(gates, candidate, *start, dt=None, min_decay=0.0, **options):
    """Compute with complex numbers; `gates` has pairs of a gate and an angle."""
    gate, angle = gates[:, :, 0::2], gates[:, :, 1::2] * (math.pi / 4)
    keep, z = decayed(torch.sigmoid(-gate), torch.sigmoid(gate), dt, min_decay)
    a = torch.polar(keep, angle * along_time(dt, angle.dim()))
    out = of_numbers(pairs, a, z, candidate, *start, **options)
    return torch.stack([out.real, out.imag], 3).flatten(2, 3)


def quaternion_product(p, q):
    """Return the product of quaternions in the last dimension, from the table of Hamilton."""
    w, x, y, z = p.unbind(-1)
    a, b, c, d = q.unbind(-1)
    return torch.stack(
        [
            w * a - x * b - y * c - z * d,
            w * b + x * a + y * d - z * c,
            w * c - x * d + y * a + z * b,
            w * d + x * c - y * b + z * a,
        ],
        -1,
    )


def mingru_quaternion(gates, candidate, *start, dt=None, min_decay=0.0, **options):
    """`gates` has groups of a gate and a vector of three numbers."""
    gate, vector = fours(gates)[..., 0], fours(gates)[..., 1:]
    keep, z = decayed(torch.sigmoid(-gate), torch.sigmoid(gate), dt, min_decay)
    size = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    time = along_time(dt, size.dim())
    angle = time * size * (math.pi / 4)
    sine = angle.sin() * vector / torch.where(size == 0, 1.0, size)
    axis = torch.where(angle == 0, time * (math.pi / 4) * vector, sine)
    a = keep.unsqueeze(-1) * torch.cat([angle.cos(), axis], -1)
    out = of_numbers(fours, a, z.unsqueeze(-1), candidate, *start, **options, times=quaternion_product)
    return out.movedim(-1, 3).flatten(2, 3)


def mingru_mixed(gates, candidate, h=None, reset=None, activation="positive", initial=None, **options):
    """Half of the features are those of `mingru`, and the other half those of `mingru_quaternion`."""
    initial = 0.5 if initial is None else initial
    like = candidate[:, :1]
    states = [torch.as_tensor(x, dtype=like.dtype).expand_as(like) for x in (initial if h is None else h, initial)]
    halves = zip(*(x.chunk(2, 2) for x in (gates, candidate, *states)), strict=True)
    cells = zip((mingru, mingru_quaternion), halves, strict=True)
    return torch.cat([cell(*own, first, reset, activation, then, **options) for cell, (*own, first, then) in cells], 2)


def gru(r, z, c, weight, bias, h, reset, initial, reverse):
    """`weight` has the rows of torch.nn.GRU, each with the features of its block."""
    size = weight.shape[1]
    u_r, u_z, u_c = (torch.block_diag(*gate.split(size)) for gate in weight.chunk(3))
    state, out = h.expand_as(c[:, :1]).squeeze(1), c.clone()
    steps = range(c.shape[1])
    for t in reversed(steps) if reverse else steps:
        if reset is not None:
            state = torch.where(reset[:, t, None], initial.expand_as(c[:, :1]).squeeze(1), state)
        candidate = torch.tanh(c[:, t] + torch.sigmoid(r[:, t] + state @ u_r.T) * (state @ u_c.T + bias))
        update = z[:, t] + state @ u_z.T
        state = torch.sigmoid(-update) * candidate + torch.sigmoid(update) * state
        out[:, t] = state
    return out


_ALL = (mingru, mingru_signed, mingru_rotation, mingru_quaternion, mingru_mixed, minlstm, minlstm_unnormalized)
CELLS = {cell.__name__: cell for cell in _ALL}


def initial_state(cell, activation):
    return 0.5 if cell.startswith("mingru_") else INITIAL_STATE[activation]


def norm(x, kind, weights, prefix, eps):
    """Normalize the features of x, as the norm with the weights `prefix` does."""
    scale = weights[f"{prefix}.weight"]
    if kind == "rms":
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * scale
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale + weights[f"{prefix}.bias"]


def layers(rnn, x, h=None, reset=None, eps=EPS, dt=None, start=None):
    """Compute a `MinGRU` or `MinLSTM` in float64 from its weights, with x (B, S, I) and without dropout.

    `eps` is the eps of its RMS norms, which depends on the dtype, and `start` a number in place of the default state.
    """
    x = x.double()
    weights = {name: weight.double() for name, weight in rnn.named_parameters()}
    count = rnn.num_layers * rnn.num_directions
    start = max(initial_state(layer.cell, layer.candidate) for layer in rnn.layers) if start is None else start
    initial = weights.get("initial_state", torch.full((1, 1, 1, 1), start).double())
    initial = initial.expand(count, x.shape[0], 1, rnn.hidden_dims)
    h = initial if h is None else h.double().expand_as(initial)
    last = []
    for index in range(rnn.num_layers):
        y, prefix, outs = x, f"layers.{index}.", []
        if rnn.norm is not None:
            y = norm(y, rnn.norm, weights, prefix + "norm", eps)
        for direction, name in enumerate(["linear", "linear_reverse"][: rnn.num_directions]):
            pre = y @ weights[f"{prefix}{name}.weight"].T + weights.get(f"{prefix}{name}.bias", 0.0)
            state = index * rnn.num_directions + direction
            resets = of_direction(reset, direction == 1)
            inputs = list(pre.split(rnn.hidden_dims, -1))
            mix = torch.sigmoid(inputs.pop()) if rnn.residual == "highway" else None
            gate = inputs.pop() if getattr(rnn, "output_gate", None) else None
            layer = rnn.layers[index]
            options = {} if layer.cell in ("mingru_signed", "minlstm_unnormalized") else {"min_decay": layer.min_decay}
            if dt is not None:
                # The reverse direction crosses the time before a step on its way to the step before it.
                options["dt"] = torch.cat([dt[:, 1:], dt[:, :1]], 1) if direction else dt
            if layer.cell == "gru":
                own = prefix + "recurrent" + "_reverse" * direction
                recurrent = weights[f"{own}.weight"], weights.get(f"{own}.bias", 0.0)
                out = gru(*inputs, *recurrent, h[state], resets, initial[state], direction == 1)
            else:
                start = h[state], resets, layer.candidate, initial[state]
                out = CELLS[layer.cell](*inputs, *start, reverse=direction == 1, **options)
            last.append(h[state] if out.shape[1] == 0 else out[:, :1] if direction else out[:, -1:])
            out = out if gate is None else out * gate * torch.sigmoid(gate)
            projection = weights.get(f"{prefix}projections.{direction}.weight")
            outs.append(out if projection is None else out @ projection.T)
        out = torch.cat(outs, -1)
        if mix is not None:
            out = mix * out + (1 - mix) * x
        elif rnn.residual:
            align = weights.get(prefix + "align.weight")
            assert (align is None) == (x.shape == out.shape)
            out = out + (x if align is None else x @ align.T)
        x = out
    return x, torch.stack(last)


def of_direction(reset, is_reverse):
    """Return the resets of a direction. The reverse one comes to a step from the step after it."""
    return torch.cat([reset[:, 1:], torch.zeros_like(reset[:, :1])], 1) if is_reverse and reset is not None else reset


def linear(x, weights, prefix):
    return x @ weights[f"{prefix}.weight"].T + weights.get(f"{prefix}.bias", 0.0)


def block(module, x, h=None, reset=None, eps=EPS, dt=None):
    """Compute a `Block` in float64 from its weights, with x (B, S, dims) and without dropout."""
    x = x.double()
    weights = {name: weight.double() for name, weight in module.named_parameters()}
    states = []
    if "conv.weight" in weights:
        kernel = weights["conv.weight"]
        num_past = len(kernel) - 1
        past = x.new_zeros(len(x), num_past, x.shape[2]) if h is None else h[1].double().squeeze(0)
        window, outs = list(past.unbind(1)), []
        for t in range(x.shape[1]):
            if reset is not None:
                window = [each.masked_fill(reset[:, t, None], 0.0) for each in window]
            window.append(x[:, t])
            y = sum(kernel[lag] * window[-1 - lag] for lag in range(len(kernel)))
            outs.append(x[:, t] + y + weights.get("conv.bias", 0.0))
            window = window[1:]
        x = torch.stack(outs, 1) if outs else x
        states.append(torch.stack(window, 1).unsqueeze(0))
    y, last = layers(module.rnn, x, None if h is None else h[0], reset, eps, dt)
    x = x + linear(y, weights, "out")
    if "mlp.0.weight" in weights:
        y = linear(norm(x, module.rnn.norm, weights, "mlp.0", eps), weights, "mlp.1")
        x = x + linear(y * (1 + torch.erf(y / math.sqrt(2))) / 2, weights, "mlp.3")
    return x, [last, *states]


def language_model(lm, ids, state=None, reset=None, eps=EPS):
    """Compute a `LanguageModel` in float64 from its weights, with ids (B, S) and without dropout."""
    weights = {name: weight.double() for name, weight in lm.named_parameters()}
    x, states = weights["embedding.weight"][ids.long()], []
    for module in lm.blocks.layers:
        count = 1 if module.conv is None else 2
        before = None if state is None else state[len(states) : len(states) + count]
        x, after = block(module, x, before, reset, eps)
        states += after
    x = norm(x, lm.blocks.layers[0].rnn.norm, weights, "norm", eps)
    return x @ weights.get("head.weight", weights["embedding.weight"]).T, states


def convolved(x, weights, prefix, **geometry):
    """Return a convolution of x (B, S, C, *space), for one step after the other."""
    weight, bias = weights[f"{prefix}.weight"], weights.get(f"{prefix}.bias")
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 4]
    return torch.stack([convolve(step, weight, bias, **geometry) for step in x.unbind(1)], 1)


def convolutions(rnn, x, h=None, reset=None):
    """Compute a convolutional layer in float64 from its weights, with x (B, S, C, *space) and without dropout."""
    weights = {name: weight.double() for name, weight in rnn.named_parameters()}
    start = max(initial_state(layer.cell, layer.candidate) for layer in rnn.layers)
    num_directions, over_space = rnn.num_directions, (-1, *[1] * rnn.num_space_dims)
    x, last = x.double(), []
    for index in range(rnn.num_layers):
        prefix = f"layers.{index}."
        geometry = {name: getattr(rnn, name) for name in ("stride", "padding", "dilation")}
        geometry = {name: each[index] if isinstance(each, list) else each for name, each in geometry.items()}
        y = x
        if rnn.norm == "group":
            apart = y.reshape(*y.shape[:2], rnn.layers[index].norm.num_groups, -1)
            deviation = apart - apart.mean(-1, keepdim=True)
            y = (deviation / (deviation.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view(y.shape)
            scale, shift = (weights[f"{prefix}norm.{name}"].view(over_space) for name in ("weight", "bias"))
            y = y * scale + shift
        outs = []
        for direction, name in enumerate(["conv", "conv_reverse"][:num_directions]):
            gate, candidate = convolved(y, weights, prefix + name, **geometry).chunk(2, 2)
            initial = weights.get(prefix + "initial_state", torch.full((2,), start).double())[direction]
            before = initial if h is None else h[index * num_directions + direction].double()
            cut = of_direction(reset, direction == 1)
            layer = rnn.layers[index]
            out = CELLS[layer.cell](gate, candidate, before, cut, layer.candidate, initial, reverse=direction == 1)
            outs.append(out)
            last.append(out[:, :1] if direction else out[:, -1:])
        out = torch.cat(outs, 2)
        if rnn.residual:
            is_aligned = f"{prefix}align.weight" in weights
            out = out + (convolved(x, weights, prefix + "align", **geometry) if is_aligned else x)
        x = out
    return x, last


def module(rnn, x, h=None, reset=None, dt=None):
    """Compute a layer, a cell, a stack or a block of the library, with x (B, S, *), and its states in a list."""
    if isinstance(rnn, library.Stack):
        states, rest = [], h
        for index, layer in enumerate(rnn.layers):
            count = getattr(layer, "num_states", 1)
            out, last = module(layer, x, None if h is None else rest[:count], reset, dt)
            rest = None if h is None else rest[count:]
            if rnn.residual and count > 0:
                align = dict(rnn.named_parameters()).get(f"aligns.{index}.weight")
                out = out + (x if align is None else x @ align.double().T)
            x, states = out, states + last
        return x, states
    if type(rnn).__name__ == "PerStep":
        weights = {name: weight.double() for name, weight in rnn.module.named_parameters()}
        return torch.func.functional_call(rnn.module, weights, x), []
    if isinstance(rnn, library.models.Block):
        return block(rnn, x, h, reset, dt=dt)
    if isinstance(rnn, library.models.LanguageModel):
        return language_model(rnn, x, h, reset)
    is_cell, is_like_torch = type(rnn).__name__.endswith("Cell"), "drop_in" in type(rnn).__module__
    if rnn.num_space_dims > 0:
        h = h if h is None or not is_cell else [state.unsqueeze(1) for state in h]
        out, last = convolutions(rnn, x, h, reset)
        return out, [state.squeeze(1) for state in last] if is_cell else last
    # The last of a pair, if h is projected, and otherwise its mean.
    state = None if h is None else h[-1] if rnn.proj_size else sum(h) / len(h)
    if state is not None:
        state = state[None, :, None] if is_cell else state.unsqueeze(2) if is_like_torch else state
    out, last = layers(rnn, x, state, reset, dt=dt, start=0.0 if is_like_torch else None)
    last = last[0, :, 0] if is_cell else last.squeeze(2) if is_like_torch else last
    if not (is_like_torch and "LSTM" in type(rnn).__name__):
        return out, [last]
    maps = [weight.double() for name, weight in rnn.named_parameters() if "projections" in name]
    h_n = [each @ weight.T for each, weight in zip(last, maps, strict=True)] if maps else last
    return out, [torch.stack(h_n) if maps else last, last]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).abs() / expected.abs()).max().item()
