"""Layers of other code bases: the packages themselves, or a restatement of their formulas, with weights to convert."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from minGRU_pytorch import minGRU
from minGRU_pytorch.minLSTM import minLSTM
from reference import g, recurrence

from mingru.convert import from_cheind, from_lucidrains, from_minrnns, from_pufferlib

B = 3


def double(*shape):
    return torch.randn(shape, dtype=torch.double)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.double)


# Layers of the other packages. They take x and a list of states or None, and return the output and such a list.


class Peer:
    """Has `tensors`, its state_dict; `convert` and the `options` for it; and the `shape` of the features of x."""

    options = {}  # noqa: RUF012

    def converted(self, **options):
        return self.convert(self.tensors, **{**self.options, **options})

    def input(self, length):
        return double(B, length, *self.shape)


class Lucidrains(Peer):
    """The package itself."""

    convert = staticmethod(from_lucidrains)

    def __init__(self, kind, dims, factor=1.0, proj_out=None):
        self.module = {"mingru": minGRU, "minlstm": minLSTM}[kind](dims, factor, proj_out).double()
        self.tensors, self.shape = self.module.state_dict(), (dims,)

    def __call__(self, x, h=None):
        out, h = self.module(x, h and h[0], return_next_prev_hidden=True)
        return out, [h]


class Authors(Peer):
    """The layers of https://github.com/BorealisAI/minRNNs at ff52e9d, `models/minRNNs.py`.

    There: candidate rows first, then gate, or forget and input, with bias; a projection with bias; from g of a learned
    vector, or from nothing; minLSTM's two gates divided by their sum, where asked for (not in "minlstm_unnormalized").
    """

    convert = staticmethod(from_minrnns)

    def __init__(self, kind, dims, factor=1.0, learn=True):
        inner, self.kind, self.shape = int(dims * factor), kind, (dims,)
        self.parts = 2 if kind == "mingru" else 3
        self.options = {} if kind == "mingru" else {"use_coeff_norm": kind == "minlstm"}
        self.tensors = {
            "to_hidden_and_gate.weight": double(self.parts * inner, dims),
            "to_hidden_and_gate.bias": double(self.parts * inner),
            "to_out.weight": double(dims, inner),
            "to_out.bias": double(dims),
            "init_hidden_state": double(inner),
        }
        if not learn:
            del self.tensors["init_hidden_state"]

    def __call__(self, x, h=None):
        linear, bias, out, out_bias, *start = self.tensors.values()
        candidate, *gates = F.linear(x, linear, bias).chunk(self.parts, -1)
        gates = [gate.sigmoid() for gate in gates]
        decay, weight = gates if self.parts == 3 else (1 - gates[0], gates[0])
        if self.kind == "minlstm":
            decay, weight = decay / (decay + weight), weight / (decay + weight)
        states = recurrence(decay, weight, candidate, h[0] if h else g(start[0]) if start else zeros(1))
        return F.linear(states, out, out_bias), [states[:, -1:]]


class Puffer(Peer):
    """The network `MinGRU` of https://github.com/PufferAI/PufferLib at 8e3e754.

    There: one map without bias for each layer, with the rows of candidate, gate and highway; states from 0.
    """

    convert = staticmethod(from_pufferlib)

    def __init__(self, size, num_layers=1):
        self.tensors = {f"layers.{index}.weight": double(3 * size, size) for index in range(num_layers)}
        self.shape = (size,)

    def __call__(self, x, h=None):
        last = []
        for index, weight in enumerate(self.tensors.values()):
            candidate, gate, highway = (x @ weight.T).tensor_split(3, -1)
            z, mix = gate.sigmoid(), highway.sigmoid()
            states = recurrence(1 - z, z, candidate, h[index] if h else zeros(1))
            x = mix * states + (1 - mix) * x
            last.append(states[:, -1:])
        return x, last


PARTS = {"linear": "gate_hidden", "align": "res_align", "norm": "norm"}


class Cheind(Peer):
    """Layers of https://github.com/cheind/mingru at aa35d42, and a cell.

    There: gate rows first, candidate rows second; from g(0); norm on the layer's input; the layer's input, before the
    norm, added to its output, not to its state, through a map without bias where sizes differ.
    """

    convert = staticmethod(from_cheind)

    def __init__(
        self, *sizes, cell=False, bias=True, norm=False, residual=False, kernels=None, stride=None, padding=None
    ):
        self.residual, self.norm, self.stride, self.padding = residual, norm, stride, padding
        self.options = {"residual": residual, "stride": stride, "padding": padding}
        self.shape = (sizes[0], 5, 6) if kernels else sizes[:1]
        self.tensors = {}
        self.layers = []
        for i, (input_dims, hidden_dims) in enumerate(pairwise(sizes)):
            kernel = (kernels[i], kernels[i]) if kernels else ()
            keeps = not kernels or (stride[i] == 1 and kernels[i] == 1 + 2 * padding[i])
            weights = {"linear": double(2 * hidden_dims, input_dims, *kernel)}
            if bias:
                weights["linear bias"] = double(2 * hidden_dims)
            if norm:
                weights |= {"norm": double(input_dims), "norm bias": double(input_dims)}
            if residual and (input_dims != hidden_dims or not keeps):
                weights["align"] = double(hidden_dims, input_dims, *kernel)
            self.layers.append(weights)
            for name, weight in weights.items():
                part, _, kind = name.partition(" ")
                path = "to_gate_hidden" if cell else f"layers.{i}.{PARTS[part]}"
                self.tensors[f"{path}.{kind or 'weight'}"] = weight

    def __call__(self, x, h=None, num_groups=None):
        states = []
        for i, weights in enumerate(self.layers):
            pre = self.linear(i, "linear", self.normalized(weights, x, num_groups and num_groups[i]))
            gate, candidate = pre.chunk(2, 2)
            z = gate.sigmoid()
            # From 0.5, unless a state is given.
            out = recurrence(1 - z, z, candidate, h and h[i])
            states.append(out[:, -1:])
            if self.residual:
                out = out + (self.linear(i, "align", x) if "align" in weights else x)
            x = out
        return x, states

    def linear(self, i, name, x):
        weight, bias = self.layers[i][name], self.layers[i].get(name + " bias")
        if x.dim() == 3:
            return F.linear(x, weight, bias)
        return F.conv2d(x.flatten(0, 1), weight, bias, self.stride[i], self.padding[i]).unflatten(0, x.shape[:2])

    def normalized(self, weights, x, num_groups):
        """Of mean 0 and variance 1: the features, or a group of channels over space, then scaled and shifted."""
        if not self.norm:
            return x
        channels = x.shape[2]
        groups = 1
        if x.dim() == 5:
            # Their rule.
            possible = [n for n in (64, 32, 16, 8, 4, 1) if channels % n == 0 and channels // n >= min(4, channels)]
            groups = num_groups or possible[0]
        rows = x.reshape(*x.shape[:2], groups, -1)
        rows = (rows - rows.mean(-1, True)) / (rows.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        shape = (channels, *(1 for _ in x.shape[3:]))
        return rows.view(x.shape) * weights["norm"].view(shape) + weights["norm bias"].view(shape)
