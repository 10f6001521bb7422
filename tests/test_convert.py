"""Weights of other code bases: against the package itself, its recorded outputs, or a restatement of its formulas."""

import copy
import io
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from minGRU_pytorch import minGRU
from minGRU_pytorch.minLM import minLM
from minGRU_pytorch.minLSTM import minLSTM
from torch import nn
from torch.testing import assert_close

import mingru
from mingru.convert import (
    Projected,
    from_cheind,
    from_lucidrains,
    from_minrnns,
    from_pufferlib,
    language_model_from_lucidrains,
)

B = 3
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
KINDS = ["mingru", "minlstm"]
LENGTHS = [1, 2, 17]
# The parts of a layer's linear map.
PARTS = {"mingru": 2, "minlstm": 3, "minlstm_unnormalized": 3}


class Lucidrains:
    """The package itself, called as ours is: x, h -> out, h."""

    def __init__(self, kind, dims, factor=1.0, proj_out=None, dtype=torch.double):
        self.linear = {"mingru": "to_hidden_and_gate", "minlstm": "to_hidden_and_f_i_gate"}[kind]
        self.module = {"mingru": minGRU, "minlstm": minLSTM}[kind](dims, factor, proj_out).to(dtype)

    def __call__(self, x, h=None):
        return self.module(x, h, return_next_prev_hidden=True)

    def converted(self):
        return from_lucidrains(self.module.state_dict())


class AuthorsLayer(nn.Module):
    """The layers of https://github.com/BorealisAI/minRNNs at ff52e9d, `models/minRNNs.py`, in linear space, by steps.

    There: candidate rows first, then gate, or forget and input, with bias; a projection with bias; from g of a learned
    vector, or from nothing; minLSTM's two gates divided by their sum, where asked for (not in "minlstm_unnormalized").
    """

    def __init__(self, kind, dims, factor=1.0, learn=True, dtype=torch.double):
        super().__init__()
        inner = int(dims * factor)
        self.parts, self.normalize = PARTS[kind], kind == "minlstm"
        self.to_hidden_and_gate = nn.Linear(dims, self.parts * inner, dtype=dtype)
        self.to_out = nn.Linear(inner, dims, dtype=dtype)
        self.init_hidden_state = nn.Parameter(torch.randn(inner, dtype=dtype)) if learn else None

    def forward(self, x, h=None):
        candidate, *gates = (part.unbind(1) for part in self.to_hidden_and_gate(x).chunk(self.parts, -1))
        if h is not None:
            state = h.squeeze(1)
        elif self.init_hidden_state is not None:
            state = self.g(self.init_hidden_state)
        else:
            state = 0.0
        states = []
        for v, *pre in zip(candidate, *gates, strict=True):
            if self.parts == 2:
                admit = pre[0].sigmoid()
                keep = 1 - admit
            else:
                keep, admit = pre[0].sigmoid(), pre[1].sigmoid()
                if self.normalize:
                    keep, admit = keep / (keep + admit), admit / (keep + admit)
            state = keep * state + admit * self.g(v)
            states.append(state)
        states = torch.stack(states, 1)
        return self.to_out(states), states[:, -1:]

    @staticmethod
    def g(v):
        return torch.where(v >= 0, v + 0.5, v.sigmoid())


class Authors:
    linear = "to_hidden_and_gate"

    def __init__(self, kind, *args, **options):
        self.module = AuthorsLayer(kind, *args, **options)
        self.norm = None if kind == "mingru" else kind == "minlstm"

    def __call__(self, x, h=None):
        return self.module(x, h)

    def converted(self):
        return from_minrnns(self.module.state_dict(), use_coeff_norm=self.norm)


def lucidrains(kind):
    options = [(5, 1.0, None), (5, 1.0, True), (4, 1.5, None), (4, 1.5, False), (1, 1.0, None), (1, 3.0, None)]
    return [pytest.param(Lucidrains, (kind, *each), id=f"lucidrains {kind} {each}") for each in options]


def authors(kind):
    options = [(5, 1.0, True), (5, 1.0, False), (4, 1.5, True), (4, 1.5, False), (1, 1.0, False)]
    return [pytest.param(Authors, (kind, *each), id=f"authors {kind} {each}") for each in options]


PEERS = [case for kind in KINDS for case in lucidrains(kind)] + [case for kind in PARTS for case in authors(kind)]
SOME = [lucidrains(kind)[index] for kind in KINDS for index in (1, 3)]
SOME += [case for kind in PARTS for case in authors(kind)[:2]]


def made(source, args):
    peer = source(*args)
    return peer, peer.converted(), torch.randn(B, 17, args[1], dtype=torch.double)


def rnn_of(layer):
    return layer.rnn if isinstance(layer, Projected) else layer


def weights(peer, layer):
    """Pairs of parameters: theirs, ours, and the rows of ours in the order of theirs."""
    theirs, linear, hidden = (
        dict(peer.module.named_parameters()),
        rnn_of(layer).layers[0].linear,
        rnn_of(layer).hidden_dims,
    )
    ours = {f"{peer.linear}.weight": linear.weight, f"{peer.linear}.bias": linear.bias}
    if isinstance(layer, Projected):
        ours |= {"to_out.weight": layer.out.weight, "to_out.bias": layer.out.bias}
    ours["init_hidden_state"] = rnn_of(layer).initial_state
    for name, weight in theirs.items():
        # The candidate, last here, comes first there.
        yield name, weight, ours[name], (lambda t: t.roll(hidden, 0)) if name.startswith(peer.linear) else (lambda t: t)


def assert_same(peer, layer, x):
    """Outputs, states and all gradients, by way of both."""
    found = []
    for function in (peer, layer):
        leaf = x.clone().requires_grad_()
        out, h = function(leaf)
        loss = (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum() + h.square().sum()
        found.append((out, h, loss, leaf))
    (out, h, loss, leaf), (our_out, our_h, our_loss, our_leaf) = found
    assert our_h.shape == (1, *h.shape)
    assert_close(our_out, out, **TIGHT)
    assert_close(our_h[0], h, **TIGHT)
    names, theirs, ours, orders = zip(*weights(peer, layer), strict=True)
    grads = torch.autograd.grad(loss, [leaf, *theirs])
    our_grads = torch.autograd.grad(our_loss, [our_leaf, *ours])
    assert_close(our_grads[0], grads[0], **TIGHT)
    for name, order, weight, grad, our_grad in zip(names, orders, theirs, grads[1:], our_grads[1:], strict=True):
        # Ours is for the state, theirs for what g makes the state of.
        slope = torch.where(weight >= 0, 1.0, F.sigmoid(weight) * F.sigmoid(-weight))
        expected = grad / slope if name == "init_hidden_state" else grad
        assert expected.any()
        assert_close(
            order(our_grad.view(our_grad.shape[-expected.dim() :])),
            expected,
            **TIGHT,
            msg=lambda m, n=name: f"{n}: {m}",
        )


# The same as theirs


# TorchScript takes long to compile.
scripted_slowly_or_not = pytest.mark.parametrize("scripted", [False, pytest.param(True, marks=pytest.mark.slow)])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("source", "args"), PEERS)
def test_one_pass(source, args, length):
    peer, layer, x = made(source, args)
    assert_same(peer, layer, x[:, :length])


@pytest.mark.parametrize("place", ["gate", "candidate", "out", "start"])
def test_the_comparison_can_fail(place):
    peer, layer, x = made(Authors, ("mingru", 5))
    linear = layer.rnn.layers[0].linear
    spoilt = {"gate": linear.bias[0], "candidate": linear.bias[5], "out": layer.out.bias[0]}
    with torch.no_grad():
        spoilt.get(place, layer.rnn.initial_state[0, 0, 0, 0]).add_(1e-6)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(peer, layer, x)


def check_steps(peer, layer, x):
    whole, last = peer(x)
    theirs, ours = None, None
    for t in range(x.shape[1]):
        out, theirs = peer(x[:, t : t + 1], theirs)
        our_out, ours = layer(x[:, t : t + 1], ours)
        assert_close(our_out, out, **TIGHT)
        assert_close(ours[0], theirs, **TIGHT)
        assert_close(our_out, whole[:, t : t + 1], **TIGHT)
    assert_close(ours[0], last, **TIGHT)


@pytest.mark.parametrize(("source", "args"), SOME)
def test_steps_with_state(source, args):
    check_steps(*made(source, args))


@pytest.mark.slow
@pytest.mark.parametrize(("source", "args"), [SOME[0], SOME[-1]])
def test_scripted_steps_with_state(source, args):
    peer, layer, x = made(source, args)
    check_steps(peer, torch.jit.script(layer), x)


@pytest.mark.parametrize(("source", "args"), SOME)
def test_pieces_and_their_state_as_it_is(source, args):
    peer, layer, x = made(source, args)
    whole, last = peer(x)
    h = peer(x[:, :6])[1]
    first, ours = layer(x[:, :6])
    for state in (h, ours):
        rest, end = layer(x[:, 6:], state)
        assert_close(torch.cat([first, rest], 1), whole, **TIGHT)
        assert_close(end[0], last, **TIGHT)


@pytest.mark.parametrize(("source", "args"), SOME)
def test_a_reset_starts_where_they_start(source, args):
    peer, layer, x = made(source, args)
    reset = torch.zeros(B, x.shape[1], dtype=torch.bool)
    reset[:, [0, 6]] = True
    out, _ = layer(x, torch.randn(B, 1, rnn_of(layer).hidden_dims, dtype=x.dtype), reset)
    assert_close(out, torch.cat([peer(x[:, :6])[0], peer(x[:, 6:])[0]], 1), **TIGHT)


def test_by_hand():
    """Candidate log 3 / -log 3 and gate 0, at one step each: halves of 1.5986 and of 0.25, from 0."""
    three = torch.tensor(3.0, dtype=torch.double).log().item()
    x = torch.tensor([[[1.0], [-1.0]]], dtype=torch.double)
    out, _ = from_lucidrains({"to_hidden_and_gate.weight": torch.tensor([[three], [0.0]], dtype=torch.double)})(x)
    first = (three + 0.5) / 2
    assert_close(out.flatten(), torch.tensor([first, first / 2 + 0.125], dtype=torch.double), **TIGHT)


@pytest.mark.parametrize("length", [2, 9])
def test_their_minlstm_puts_a_carried_state_through_g(length):
    """What our documentation says of theirs: more than one step from a state h are ours from g(h)."""
    peer, layer, x = made(Lucidrains, ("minlstm", 5))
    x, h = x[:, :length], torch.rand(B, 1, 5).double()
    out, _ = peer(x, h)
    assert_close(layer(x, mingru.functional.g(h))[0], out, **TIGHT)
    assert (layer(x, h)[0] - out).abs().max() > 1e-2


@pytest.mark.parametrize("expansion", [1.0, 1.5])
@pytest.mark.parametrize("use_lstm", [False, True])
def test_a_language_model_computes_the_same_logits(use_lstm, expansion):
    theirs = minLM(num_tokens=11, dim=8, depth=3, ff_mult=2, expansion=expansion, use_lstm=use_lstm, dropout=0.1)
    theirs = theirs.double().eval()
    for parameter in theirs.parameters():
        # Norms start as the identity.
        nn.init.normal_(parameter)
    ours = language_model_from_lucidrains({f"net.{name}": x for name, x in theirs.state_dict().items()}, "net.")
    ids, new = torch.randint(11, (2, 13)), torch.randint(11, (2, 1))
    expected, hidden = theirs(ids, return_prev_hiddens=True)
    logits, _ = ours(ids)
    assert_close(logits, expected, **TIGHT)
    expected, _ = theirs(torch.cat([ids, new], 1), prev_hiddens=hidden, return_prev_hiddens=True)
    assert_close(ours(new, [h.unsqueeze(0) for h in hidden])[0], expected, **TIGHT)
    ours(ids)[0].sum().backward()
    assert {name for name, x in ours.named_parameters() if x.grad is None} == {
        f"blocks.layers.{index}.rnn.initial_state" for index in range(3)
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": None}, "got no key norm.weight"),
        ({"layers.1.2.to_out.weight": torch.zeros(4, 5)}, r"layers.1.2.to_out.weight must be \(4, 6\)"),
        ({"layers.1.4.0.weight": torch.zeros(9, 4)}, r"layers.1.4.0.weight must be \(8, 4\)"),
        ({"layers.0.0.net.0.weight": torch.zeros(4, 1, 3)}, "of a model without convolutions"),
        ({"other": torch.zeros(1)}, "unexpected key other"),
    ],
)
def test_errors_of_a_language_model(change, message):
    state = minLM(num_tokens=5, dim=4, depth=2, ff_mult=2).state_dict() | change
    with pytest.raises(ValueError, match=message):
        language_model_from_lucidrains({name: x for name, x in state.items() if x is not None})


@pytest.mark.parametrize("options", [("reset",), ("dt",), ("lengths",), ("reset", "dt", "lengths")])
def test_projected_takes_all_arguments_also_in_a_stack(options):
    projected = Projected(mingru.MinGRU(4, 6, 2), nn.Linear(6, 4))
    stack = mingru.Stack([projected, mingru.MinLSTM(4, 5)])
    x, lengths = torch.randn(B, 9, 4), torch.tensor([9, 0, 4])
    given = {"reset": torch.rand(B, 9) < 0.2, "dt": torch.rand(B, 9), "lengths": lengths}
    given = {name: given[name] for name in options}
    y, h = projected.rnn(x, **given)
    expected = projected.out(y)
    if "lengths" in options:
        expected[torch.arange(9) >= lengths.unsqueeze(1)] = 0.0
    out, state = projected(x, **given)
    assert_close(out, expected)
    assert torch.equal(state, h)
    last, last_state = stack.layers[1](expected, **given)
    out, states = stack(x, **given)
    assert_close([out, *states], [last, h, last_state])
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([9, 2, 4]), True, False)
    assert projected(packed)[0].data.shape == (15, 4)


def test_projected_takes_only_layers():
    with pytest.raises(TypeError, match="Projected: rnn must be a layer such as MinGRU, got GRU"):
        Projected(nn.GRU(3, 4), nn.Linear(4, 3))


# What comes back


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_and_sizes(kind):
    rnn_class = {"mingru": mingru.MinGRU, "minlstm": mingru.MinLSTM}[kind]
    plain, projected = Lucidrains(kind, 4, 1.5, False).converted(), Lucidrains(kind, 4, 1.5).converted()
    assert type(plain) is rnn_class
    assert (plain.input_dims, plain.hidden_dims, plain.num_layers, plain.bias) == (4, 6, 1, False)
    assert type(projected) is Projected and type(projected.rnn) is rnn_class
    assert (projected.out.in_features, projected.out.out_features, projected.out.bias) == (6, 4, None)
    theirs = Authors(kind, 4, 1.5).converted()
    assert type(theirs) is Projected and type(theirs.rnn) is rnn_class
    assert theirs.rnn.bias and theirs.out.bias is not None


@pytest.mark.parametrize(("source", "args"), SOME)
def test_only_a_learned_start_goes_on_learning(source, args):
    peer, layer, _ = made(source, args)
    learned = source is Authors and peer.module.init_hidden_state is not None
    start = rnn_of(layer).initial_state
    assert start.requires_grad == learned
    assert start.any() == learned
    others = [name for name, weight in layer.named_parameters() if not weight.requires_grad]
    assert others == (
        [] if learned else [name for name, _ in layer.named_parameters() if name.endswith("initial_state")]
    )
    assert copy.deepcopy(rnn_of(layer)).initial_state.requires_grad == learned


@pytest.mark.parametrize(("source", "args"), SOME)
def test_round_trip_of_our_state_dict(source, args):
    _, layer, x = made(source, args)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    rnn = rnn_of(layer)
    options = {"normalize": rnn.normalize} if isinstance(rnn, mingru.MinLSTM) else {}
    options |= {"bias": rnn.bias, "learn_initial_state": True, "dtype": x.dtype}
    fresh = type(rnn)(rnn.input_dims, rnn.hidden_dims, **options)
    if isinstance(layer, Projected):
        bias = layer.out.bias is not None
        fresh = Projected(fresh, nn.Linear(rnn.hidden_dims, rnn.input_dims, bias=bias, dtype=x.dtype))
    assert (fresh(x)[0] != layer(x)[0]).all()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for got, expected in zip(fresh(x), layer(x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", [Lucidrains, Authors])
def test_dtype_and_device_are_those_of_the_tensors(source, dtype):
    peer = source("mingru", 4, 1.5, dtype=dtype)
    layer = peer.converted()
    assert {weight.dtype for weight in layer.parameters()} == {dtype}
    assert {weight.device.type for weight in layer.parameters()} == {"cpu"}
    x = torch.randn(B, 7, 4, dtype=dtype)
    exact = source("mingru", 4, 1.5)
    exact.module.load_state_dict(peer.module.state_dict())
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert_close(layer(x)[0].double(), exact(x.double())[0], rtol=tolerance, atol=tolerance)
    peer.module.to("meta")
    assert {weight.device.type for weight in peer.converted().parameters()} == {"meta"}


@pytest.mark.parametrize("source", [Lucidrains, Authors])
def test_weights_are_copies_and_nothing_is_drawn(source):
    peer = source("mingru", 4, 1.5)
    seed = torch.get_rng_state()
    state_dict = peer.module.state_dict(keep_vars=True)
    layer = from_lucidrains(state_dict) if source is Lucidrains else from_minrnns(state_dict)
    assert torch.equal(torch.get_rng_state(), seed)
    before = copy.deepcopy(peer.module.state_dict())
    for weight in layer.parameters():
        assert weight.is_leaf
        nn.init.zeros_(weight)
    for name, weight in peer.module.state_dict().items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize("source", [Lucidrains, Authors])
def test_a_layer_inside_a_model(source):
    peer, layer, x = made(source, ("mingru", 4, 1.5))
    model = nn.ModuleDict({"embed": nn.Embedding(3, 4), "layers": nn.ModuleList([nn.Identity(), peer.module])})
    convert = from_lucidrains if source is Lucidrains else from_minrnns
    inner = convert(model.state_dict(), "layers.1.")
    assert torch.equal(inner(x)[0], layer(x)[0])
    with pytest.raises(ValueError, match=r"got the key embed\.weight; use prefix='layers\.1\.'$"):
        convert(model.state_dict())


# What is refused


CONVERTERS = {
    "from_cheind": (from_cheind, "layers.0.gate_hidden.weight", torch.zeros(12, 4)),
    "from_lucidrains": (from_lucidrains, "to_hidden_and_gate.weight", torch.zeros(12, 4)),
    "from_minrnns": (from_minrnns, "to_hidden_and_gate.weight", torch.zeros(12, 4)),
    "from_pufferlib": (from_pufferlib, "layers.0.weight", torch.zeros(12, 4)),
}


@pytest.mark.parametrize("name", CONVERTERS)
def test_keys_that_are_no_strings_and_sparse_tensors(name):
    function, key, weight = CONVERTERS[name]
    for other in ({0: weight}, {key: weight, 1: weight}):
        with pytest.raises(
            TypeError, match=rf"^{name}: the key [01] of state_dict must be a str, got int; use .state_d"
        ):
            function(other)
    more = {
        "to_out.weight": torch.zeros(4, 6),
        "to_out.bias": torch.zeros(4),
        "to_hidden_and_gate.bias": torch.zeros(12),
    }
    sparse = {key: weight.to_sparse(), **(more if name == "from_minrnns" else {})}
    message = rf"^{name}: {key} must be of layout torch.strided, got torch.sparse_coo; use .to_dense\(\)$"
    with pytest.raises(TypeError, match=message):
        function(sparse)


def lucidrains_weights():
    return Lucidrains("mingru", 4, 1.5).module.state_dict()


def authors_weights():
    return Authors("mingru", 4, 1.5).module.state_dict()


GATES = "to_hidden_and_gate."


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.double)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {GATES + "weight": None},
            "state_dict must be a mapping with keys such as to_hidden_and_gate.weight or "
            "to_hidden_and_f_i_gate.weight, got the key to_out.weight",
        ),
        (
            {"to_out.bias": zeros(4)},
            "a mapping with the keys to_hidden_and_gate.weight and optionally to_out.weight, "
            "got the unexpected key to_out.bias",
        ),
        ({"to_hidden_and_f_i_gate.weight": zeros(9, 4)}, "got the unexpected key to_hidden_and_f_i_gate.weight"),
        ({GATES + "weight": zeros(7, 4)}, "to_hidden_and_gate.weight must be (2 * H, I), got (7, 4)"),
        ({GATES + "weight": zeros(0, 4)}, "to_hidden_and_gate.weight must be (2 * H, I), got (0, 4)"),
        ({GATES + "weight": zeros(12)}, "to_hidden_and_gate.weight must be (2 * H, I), got (12,)"),
        (
            {"to_out.weight": zeros(6, 4)},
            "to_out.weight must be (4, 6) because to_hidden_and_gate.weight is (12, 4), got (6, 4)",
        ),
        (
            {"to_out.weight": zeros(4, 6).to("meta")},
            "to_out.weight must be on cpu like to_hidden_and_gate",
        ),
        ({str(index): zeros(1) for index in range(9)}, "got the unexpected key 0"),
    ],
)
def test_lucidrains_weights_that_do_not_fit(changes, message):
    state_dict = {**lucidrains_weights(), **changes}
    with pytest.raises(ValueError, match="from_lucidrains: ") as caught:
        from_lucidrains({key: weight for key, weight in state_dict.items() if weight is not None})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"to_out.bias": None, GATES + "bias": None},
            "state_dict must be a mapping with the keys a.to_hidden_and_gate.weight, a.to_hidden_and_gate.bias, "
            "a.to_out.weight, a.to_out.bias and optionally a.init_hidden_state, got no key a.to_hidden_and_gate.bias",
        ),
        ({"to_out.bias": None}, "got no key a.to_out.bias"),
        ({"conv.weight": zeros(4)}, "got the unexpected key a.conv.weight"),
        (
            {GATES + "weight": zeros(24, 4)},
            "a.to_hidden_and_gate.weight must be (2 * H, I) or (3 * H, I) with a.to_out.weight (I, H), "
            "got (24, 4) with (4, 6)",
        ),
        ({"to_out.weight": zeros(4)}, "a.to_out.weight (I, H), got (12, 4) with (4,)"),
        (
            {"to_out.weight": zeros(5, 6)},
            "a.to_out.weight must be (4, 6) because a.to_hidden_and_gate.weight is",
        ),
        ({"to_out.bias": zeros(5)}, "a.to_out.bias must be (4,) because"),
        ({GATES + "bias": zeros(6)}, "a.to_hidden_and_gate.bias must be (12,) because"),
        ({"init_hidden_state": zeros(1, 6)}, "a.init_hidden_state must be (6,) because"),
    ],
)
def test_authors_weights_that_do_not_fit(changes, message):
    state_dict = {**authors_weights(), **changes}
    with pytest.raises(ValueError, match="from_minrnns: ") as caught:
        from_minrnns({"a." + key: weight for key, weight in state_dict.items() if weight is not None}, "a.")
    assert message in str(caught.value)
    assert "prefix" not in str(caught.value)


def test_a_prefix_of_nothing():
    with pytest.raises(ValueError, match=r"with keys that begin with 'b\.', got the key to_hidden_and_gate\.weight$"):
        from_lucidrains(lucidrains_weights(), "b.")
    with pytest.raises(ValueError, match=r"got an empty mapping$"):
        from_lucidrains({})


@pytest.mark.parametrize("use_coeff_norm", [None, 1, "True"])
def test_a_minlstm_whose_weights_do_not_show_the_normalization(use_coeff_norm):
    state_dict = Authors("minlstm", 4).module.state_dict()
    with pytest.raises(ValueError, match=r"use_coeff_norm must be True or False for a minLSTM, got .*config\.yaml"):
        from_minrnns(state_dict, use_coeff_norm=use_coeff_norm)
    for value in (True, False):
        assert from_minrnns(state_dict, use_coeff_norm=value).rnn.normalize is value


@pytest.mark.parametrize(
    ("convert", "weights"), [(from_lucidrains, lucidrains_weights), (from_minrnns, authors_weights)]
)
def test_wrong_types(convert, weights):
    weights = weights()

    def why(*args):
        with pytest.raises(TypeError) as caught:
            convert(*args)
        return str(caught.value).removeprefix(convert.__name__ + ": ")

    assert why(nn.Linear(2, 2)) == "state_dict must be a mapping of names to tensors, got Linear; use .state_dict()"
    assert why(weights, 3) == "prefix must be a str, got 3"
    half = {**weights, "to_out.weight": weights["to_out.weight"].half()}
    assert why(half).startswith("to_out.weight must be torch.float64 like to_hidden_and_gate.weight, got torch.float16")
    listed = {**weights, GATES + "weight": [1.0]}
    assert why(listed).startswith("to_hidden_and_gate.weight must be a tensor, got list")
    whole = {key: weight.long() for key, weight in weights.items()}
    assert why(whole) == "to_hidden_and_gate.weight must be of a floating-point dtype, got torch.int64"


# cheind/mingru

# In the file: how its numbers were made.
RECORDED = json.loads((Path(__file__).parent / "data/cheind.json").read_text(encoding="utf-8"))["cases"]
# The names of linear map, residual map and norm of layer i, by version.
NAMES = {
    "1.4.2": lambda i: ([f"layers.{i}.gate_hidden"], f"layers.{i}.res_align", f"layers.{i}.norm"),
    "1.4.0": lambda i: ([f"to_gate_hidden.{i}"], f"residual_layers.{i}", ""),
    "cell": lambda i: (["to_gate_hidden"], "", ""),
    "1.3.0": lambda i: ([f"linear_gate_hidden.{i}"], "input_residual_align", ""),
    "1.2.0": lambda i: ([f"linear_z.{i}", f"linear_h.{i}"], "input_residual_align", ""),
}
OLD = ("1.3.0", "1.2.0")


def double(*shape):
    return torch.randn(shape, dtype=torch.double)


class Cheind:
    """Layers of https://github.com/cheind/mingru in linear space, step by step, with weights drawn here.

    There: gate rows first, candidate rows second; from g(0); norm on the layer's input; the layer's input, before the
    norm, added to its output, not to its state. Until version 1.3.0 the first layer's input always goes through a map,
    with bias, later only where sizes differ, without.
    """

    def __init__(
        self, version, sizes, *, bias=True, norm=False, residual=False, kernels=None, stride=None, padding=None
    ):
        self.residual, self.norm, self.stride, self.padding = residual, norm, stride, padding
        self.state_dict = {}
        self.layers = []
        for i, (input_dims, hidden_dims) in enumerate(pairwise(sizes)):
            kernel = (kernels[i], kernels[i]) if kernels else ()
            keeps = not kernels or (stride[i] == 1 and kernels[i] == 1 + 2 * padding[i])
            weights = {"linear": double(2 * hidden_dims, input_dims, *kernel)}
            if bias:
                weights["linear bias"] = double(2 * hidden_dims)
            if norm:
                weights |= {"norm": double(input_dims), "norm bias": double(input_dims)}
            if residual and (i == 0 if version in OLD else input_dims != hidden_dims or not keeps):
                weights["align"] = double(hidden_dims, input_dims, *kernel)
                if bias and version in OLD:
                    weights["align bias"] = double(hidden_dims)
            self.layers.append(weights)
            linears, align, norm_name = NAMES[version](i)
            for name, weight in weights.items():
                part, _, kind = name.partition(" ")
                names = {"linear": linears, "align": [align], "norm": [norm_name]}[part]
                pieces = zip(names, weight.chunk(len(names)), strict=True)
                self.state_dict |= {f"{name}.{kind or 'weight'}": piece for name, piece in pieces}

    def converted(self, **options):
        options = {"residual": self.residual, "stride": self.stride, "padding": self.padding, **options}
        return from_cheind(self.state_dict, **options)

    def __call__(self, x, h=None, num_groups=None):
        states = []
        for i, weights in enumerate(self.layers):
            pre = self.linear(i, "linear", self.normalized(weights, x, num_groups and num_groups[i]))
            gate, candidate = pre.chunk(2, 2)
            state = torch.full_like(gate[:, 0], 0.5) if h is None else h[i].squeeze(1)
            out = []
            for t in range(x.shape[1]):
                z = gate[:, t].sigmoid()
                state = (1 - z) * state + z * AuthorsLayer.g(candidate[:, t])
                out.append(state)
            states.append(state.unsqueeze(1))
            out = torch.stack(out, 1)
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


def as_ours(layer, h):
    """Their state for our layer; a list of tensors is stacked for a MinGRU."""
    return torch.stack(h) if isinstance(layer, mingru.MinGRU) and isinstance(h, list) else h


def assert_states(ours, theirs):
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our.reshape(their.shape), their, **TIGHT)


CASES = [
    *((version, (3, 5), {"bias": bias}) for version in NAMES for bias in (True, False)),
    *((version, sizes, {"residual": True}) for version in OLD for sizes in [(3, 5, 5), (4, 4), (4, 4, 4)]),
    ("1.3.0", (3, 5, 5), {"residual": True, "bias": False}),
    ("1.2.0", (4, 4, 4), {}),
    *(
        (version, sizes, {"residual": residual, "bias": bias})
        for version in ("1.4.2", "1.4.0")
        for sizes in [(3, 5, 5), (4, 4, 4), (3, 5, 2), (5, 5, 3), (3, 3)]
        for residual, bias in [(True, True), (False, True), (True, False)]
    ),
    *(
        ("1.4.2", sizes, {"norm": True, "residual": residual})
        for sizes in [(3, 5, 2), (4, 4, 4)]
        for residual in (True, False)
    ),
]
IMAGES = [
    ("cell", (2, 3), {"kernels": [2], "stride": [1], "padding": [0]}),
    ("1.4.0", (2, 3, 3), {"kernels": [3, 1], "stride": [2, 1], "padding": [1, 0], "residual": True}),
    ("1.4.2", (3, 3), {"kernels": [3], "stride": [1], "padding": [1], "residual": True, "bias": False}),
    ("1.4.2", (3, 3), {"kernels": [3], "stride": [1], "padding": [0], "residual": True}),
    ("1.4.2", (32, 4, 8), {"kernels": [3, 1], "stride": [1, 2], "padding": [1, 1], "residual": True, "norm": True}),
    ("1.4.2", (64, 12), {"kernels": [1], "stride": [1], "padding": [0], "norm": True}),
]
# A residual with bias, layers of different sizes, and convolutions.
SOME_CHEIND = [
    ("1.3.0", (3, 5, 5), {"residual": True}),
    ("1.4.2", (3, 5, 2), {"residual": True, "norm": True}),
    IMAGES[1],
    IMAGES[4],
]


def sequence(sizes, options, length):
    return double(B, length, sizes[0], *((5, 6) if "kernels" in options else ()))


@pytest.mark.parametrize("run", [0, 1], ids=["default state", "given state"])
@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["name"])
def test_recorded_outputs(case, run):
    weights = {name: torch.tensor(weight, dtype=torch.double) for name, weight in case["weights"].items()}
    x, found = torch.tensor(case["x"], dtype=torch.double), case["runs"][run]

    def state(h):
        """As it was returned: one tensor until version 1.3.0, later a list with one for each layer."""
        if h is None:
            return None
        is_one = next(iter(weights)).startswith("linear_")
        return torch.tensor(h, dtype=torch.double) if is_one else [torch.tensor(each, dtype=torch.double) for each in h]

    h, last = state(found["h"]), state(found["last"])
    both = next(iter(weights)).startswith("rnn.")
    layer = from_cheind(weights, "rnn." if both else "", **case["options"])
    if both:
        half = len(last) // 2
        forward, ours = layer(x, None if h is None else as_ours(layer, h[:half]))
        backward, more = layer(x.flip(1), None if h is None else as_ours(layer, h[half:]))
        out, ours = torch.cat([forward, backward], 2), [*ours, *more]
    else:
        out, ours = layer(x, None if h is None else as_ours(layer, h))
    assert_close(out, torch.tensor(found["out"], dtype=torch.double), **TIGHT)
    assert_states(ours, last)


def test_every_kind_is_recorded():
    """The two runs of each differ, and each version and kind is there."""
    assert {case["commit"] for case in RECORDED} == {"e6fed96", "d0c19c3", "3c16719", "aa35d42"}
    assert len(RECORDED) == 13
    for case in RECORDED:
        first, second = case["runs"]
        assert first["h"] is None and second["h"] is not None
        assert first["out"] != second["out"]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("version", "sizes", "options"), CASES + IMAGES)
def test_cheind_one_pass(version, sizes, options, length):
    peer = Cheind(version, sizes, **options)
    layer, x = peer.converted(), sequence(sizes, options, length)
    out, h = layer(x)
    expected, states = peer(x)
    assert_close(out, expected, **TIGHT)
    assert_states(h, states)


@scripted_slowly_or_not
@pytest.mark.parametrize(("version", "sizes", "options"), SOME_CHEIND)
def test_cheind_pieces_from_a_given_state(version, sizes, options, scripted):
    peer = Cheind(version, sizes, **options)
    layer, x = peer.converted(), sequence(sizes, options, 6)
    call = torch.jit.script(layer) if scripted else layer
    start = [torch.rand_like(state) + 0.1 for state in peer(x)[1]]
    expected, last = peer(x, start)
    h, outs = as_ours(layer, start), []
    for piece in x.split([1, 3, 2], 1):
        out, h = call(piece, h)
        outs.append(out)
    assert_close(torch.cat(outs, 1), expected, **TIGHT)
    assert_states(h, last)


@pytest.mark.parametrize(
    ("version", "sizes", "options", "place"),
    [
        ("1.3.0", (3, 4, 4), {"residual": True}, "layers.0.align.bias"),
        ("1.3.0", (4, 4, 4), {"residual": True}, "layers.0.align.weight"),
        ("1.4.2", (3, 4, 2), {"norm": True, "residual": True}, "layers.1.layers.0.align.weight"),
        ("1.4.2", (3, 4, 2), {"norm": True, "residual": True}, "layers.0.layers.0.norm.bias"),
        (*IMAGES[4][:2], IMAGES[4][2], "layers.1.norm.weight"),
    ],
)
def test_the_comparison_with_cheind_can_fail(version, sizes, options, place):
    peer = Cheind(version, sizes, **options)
    layer, x = peer.converted(), sequence(sizes, options, 4)
    with torch.no_grad():
        layer.get_parameter(place).flatten()[0].add_(1e-6)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(layer(x)[0], peer(x)[0], **TIGHT)


@pytest.mark.parametrize(("version", "sizes", "options"), SOME_CHEIND)
def test_cheind_gradients(version, sizes, options):
    peer = Cheind(version, sizes, **options)
    leaf = sequence(sizes, options, 5).requires_grad_()
    grads = [torch.autograd.grad((call(leaf)[0] ** 2).sum(), leaf)[0] for call in (peer, peer.converted())]
    assert grads[0].any()
    assert_close(grads[1], grads[0], rtol=1e-8, atol=1e-8)


def test_kinds_of_layers():
    stack = Cheind("1.4.2", (3, 5, 2), residual=True).converted(dropout=0.25)
    assert type(stack) is mingru.Stack
    assert [(type(each), each.input_dims, each.hidden_dims, each.residual) for each in stack.layers] == [
        (mingru.MinGRU, 3, 5, True),
        (mingru.MinGRU, 5, 2, True),
    ]
    assert stack.dropout == 0.25 and not stack.residual
    rnn = Cheind("1.4.2", (3, 5, 5), norm=True, bias=False).converted(dropout=0.25)
    assert type(rnn) is mingru.MinGRU
    assert (rnn.num_layers, rnn.norm, rnn.bias, rnn.residual, rnn.dropout) == (2, "layer", False, False, 0.25)
    conv = Cheind(*IMAGES[1][:2], **IMAGES[1][2]).converted()
    assert type(conv) is mingru.MinConv2dGRU
    assert (conv.hidden_dims, conv.stride, conv.padding) == (3, [2, 1], [1, 0])


def test_a_cell_of_ours_takes_what_a_cell_of_theirs_becomes():
    peer = Cheind("cell", (3, 5))
    cell = mingru.MinGRUCell(3, 5, dtype=torch.double)
    cell.load_state_dict(peer.converted().state_dict())
    x = double(B, 1, 3)
    assert_close(cell(x[:, 0]), peer(x)[0][:, 0], **TIGHT)


@pytest.mark.parametrize("version", NAMES)
def test_cheind_weights_are_copies_and_nothing_is_drawn(version):
    peer = Cheind(version, (3, 5))
    seed = torch.get_rng_state()
    peer.state_dict = {name: weight.float().requires_grad_() for name, weight in peer.state_dict.items()}
    before = copy.deepcopy(peer.state_dict)
    layer = peer.converted()
    assert torch.equal(torch.get_rng_state(), seed)
    for weight in layer.parameters():
        assert weight.is_leaf and weight.requires_grad and weight.dtype == torch.float32
        nn.init.zeros_(weight)
    for name, weight in peer.state_dict.items():
        assert torch.equal(weight, before[name])
    meta = {name: weight.to("meta") for name, weight in before.items()}
    assert {weight.device.type for weight in from_cheind(meta, residual=False).parameters()} == {"meta"}


def test_a_residual_that_the_weights_do_not_show():
    peer = Cheind("1.4.2", (4, 4, 4), residual=True)
    with pytest.raises(
        ValueError, match=r"from_cheind: residual must be True or False, got None; the weights do not show"
    ):
        peer.converted(residual=None)
    x = double(B, 4, 4)
    assert (peer.converted(residual=False)(x)[0] - peer(x)[0]).abs().max() > 0.1
    for version, sizes, options in [
        ("1.4.2", (3, 4, 4), {"residual": True}),
        ("1.4.2", (3, 4, 4), {}),
        ("1.3.0", (4, 4, 4), {"residual": True}),
        ("1.3.0", (4, 4, 4), {}),
        ("cell", (4, 4), {}),
    ]:
        peer = Cheind(version, sizes, **options)
        x = double(B, 4, sizes[0])
        assert_close(peer.converted(residual=None)(x)[0], peer(x)[0], **TIGHT)


# What does not fit a layer as its constructor makes it


@pytest.mark.parametrize("sizes", [(3, 4, 4), (4, 4, 4)])
def test_a_residual_with_bias_through_a_state_dict(sizes):
    peer = Cheind("1.3.0", sizes, residual=True)
    layer, x = peer.converted(), double(B, 5, sizes[0])
    assert_close(copy.deepcopy(layer)(x)[0], peer(x)[0], **TIGHT)
    fresh = mingru.MinGRU(sizes[0], 4, 2, residual=True, dtype=torch.double)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*layers\.0\.align\.bias"):
        fresh.load_state_dict(layer.state_dict())
    fresh.layers[0].align = nn.Linear(sizes[0], 4, dtype=torch.double)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x)[0], layer(x)[0])
    layer.reset_parameters()
    assert not torch.equal(fresh(x)[0], layer(x)[0])


def normed(**options):
    """Theirs has 8 groups in the first layer and 1 in the second, ours would have 2 and 1."""
    peer = Cheind(*IMAGES[4][:2], **IMAGES[4][2])
    return peer, peer.converted(**options), sequence(*IMAGES[4][1:], 3)


FRESH = {"stride": [1, 2], "padding": 1, "residual": True, "norm": "group", "dtype": torch.double}


def fresh_conv():
    return mingru.MinConv2dGRU(32, [4, 8], [3, 1], 2, **FRESH)


def test_groups_travel_in_the_state_dict():
    peer, layer, x = normed()
    assert [each.norm.num_groups for each in layer.layers] == [8, 1]
    assert [each.norm.num_groups for each in fresh_conv().layers] == [2, 1]
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = fresh_conv()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_close(fresh(x)[0], peer(x)[0], **TIGHT)
    assert fresh.state_dict().keys() == layer.state_dict().keys()
    assert_close(copy.deepcopy(fresh)(x)[0], peer(x)[0], **TIGHT)
    assert_close(torch.jit.script(fresh)(x)[0], peer(x)[0], **TIGHT)
    exported = torch.export.export(fresh, (x,)).module()
    assert_close(exported(x)[0], peer(x)[0], **TIGHT)


def test_other_groups_never_load_silently():
    peer, layer, x = normed()
    plain = fresh_conv()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"layers\.0\.norm\.groups\""):
        layer.load_state_dict(plain.state_dict())
    plain.layers[0].norm = nn.GroupNorm(2, 32, dtype=torch.double)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"layers\.0\.norm\.groups\""):
        plain.load_state_dict(layer.state_dict())
    plain.load_state_dict(layer.state_dict(), strict=False)
    # What loading them used to do.
    assert (plain(x)[0] - peer(x)[0]).abs().max() > 0.01
    state_dict = layer.state_dict()
    state_dict["layers.0.norm.groups"] = torch.tensor(5)
    with pytest.raises(ValueError, match="num_groups must be a divisor of the number of channels, 32, got 5"):
        layer.load_state_dict(state_dict)


def test_layers_without_other_groups_have_the_state_dict_of_before():
    assert not any("groups" in name for name in fresh_conv().state_dict())
    layer = Cheind("1.4.2", (8, 4), kernels=[1], stride=[1], padding=[0], norm=True).converted()
    assert not any("groups" in name for name in layer.state_dict())


@pytest.mark.parametrize(("num_groups", "expected"), [(4, [4, 4]), (1, [1, 1]), ([16, 2], [16, 2])])
def test_other_groups_than_by_their_rule(num_groups, expected):
    peer, layer, x = normed(num_groups=num_groups)
    assert [each.norm.num_groups for each in layer.layers] == expected
    assert_close(layer(x)[0], peer(x, num_groups=expected)[0], **TIGHT)


# What from_cheind refuses


@pytest.mark.parametrize(
    ("version", "options", "changes", "message"),
    [
        ("1.4.2", {}, {"head.weight": zeros(2, 2)}, "got the unexpected key a.head.weight"),
        ("1.4.2", {}, {"layers.1.gate_hidden.weight": None}, "got the unexpected key a.layers.1.gate_hidden.bias"),
        (
            "1.4.2",
            {},
            {"layers.0.gate_hidden.weight": None},
            "state_dict must be a mapping with the keys a.layers.0.gate_hidden.weight, "
            "got no key a.layers.0.gate_hidden.weight",
        ),
        (
            "1.4.2",
            {},
            {"layers.1.gate_hidden.bias": None},
            "state_dict must be a mapping with the keys a.layers.0.gate_hidden.weight, a.layers.0.gate_hidden.bias, "
            "a.layers.1.gate_hidden.weight, a.layers.1.gate_hidden.bias, got no key a.layers.1.gate_hidden.bias",
        ),
        ("1.4.2", {"norm": True}, {"layers.1.norm.bias": None}, "got no key a.layers.1.norm.bias"),
        (
            "1.4.2",
            {"norm": True},
            {"layers.1.norm.running_mean": zeros(4)},
            "got the unexpected key a.layers.1.norm.running_mean",
        ),
        ("1.4.2", {"residual": True}, {"layers.0.res_align.weight": None}, "got no key a.layers.0.res_align.weight"),
        ("1.4.2", {}, {"layers.0.res_align.weight": zeros(4, 3)}, "got the unexpected key a.layers.0.res_align.weight"),
        ("1.4.2", {}, {"to_gate_hidden.0.weight": zeros(8, 3)}, "got the unexpected key a.to_gate_hidden.0.weight"),
        (
            "1.4.2",
            {},
            {"linear_gate_hidden.0.weight": zeros(8, 3)},
            "got the unexpected key a.linear_gate_hidden.0.weight",
        ),
        (
            "1.4.2",
            {},
            {"layers.0.gate_hidden.weight": zeros(7, 3)},
            "gate_hidden.weight must be (2 * H, I), got (7, 3)",
        ),
        (
            "1.4.2",
            {},
            {"layers.0.gate_hidden.weight": zeros(8)},
            "(2 * H, I) or (2 * H, I, kernel_h, kernel_w), got (8,)",
        ),
        ("1.4.2", {}, {"layers.1.gate_hidden.weight": zeros(8, 4, 1, 1)}, "must be (2 * H, I), got (8, 4, 1, 1)"),
        ("1.4.2", {}, {"layers.0.gate_hidden.weight": zeros(8, 0)}, "must be (2 * H, I), got (8, 0)"),
        (
            "1.4.2",
            {},
            {"layers.1.gate_hidden.weight": zeros(8, 5)},
            "a.layers.1.gate_hidden.weight must be (8, 4) because a.layers.0.gate_hidden.weight is (8, 3), got (8, 5)",
        ),
        ("1.4.2", {}, {"layers.1.gate_hidden.bias": zeros(4)}, "a.layers.1.gate_hidden.bias must be (8,) because"),
        (
            "1.4.2",
            {},
            {"layers.1.gate_hidden.bias": zeros(8).to("meta")},
            "bias must be on cpu like a.layers.0.gate_hidden",
        ),
        ("1.3.0", {"residual": True}, {"input_residual_align.bias": None}, "got no key a.input_residual_align.bias"),
        (
            "1.3.0",
            {"residual": True},
            {"input_residual_align.weight": None},
            "got no key a.input_residual_align.weight",
        ),
        (
            "1.3.0",
            {},
            {"linear_gate_hidden.1.weight": zeros(10, 4)},
            "weight must be (8, 4) because a.linear_gate_hidden.0",
        ),
        ("1.3.0", {}, {"layer_transforms.0.weight": zeros(4, 4)}, "got the unexpected key a.layer_transforms.0.weight"),
        ("1.2.0", {}, {"linear_h.1.weight": None}, "got no key a.linear_h.1.weight"),
        (
            "1.2.0",
            {},
            {"linear_h.1.weight": zeros(5, 4)},
            "a.linear_h.1.weight must be (4, 4) because a.linear_z.1.weight is",
        ),
        ("1.2.0", {}, {"linear_h.0.weight": zeros(4)}, "a.linear_h.0.weight must be (H, I), got (4,)"),
    ],
)
def test_cheind_weights_that_do_not_fit(version, options, changes, message):
    state_dict = {**Cheind(version, (3, 4, 4), **options).state_dict, **changes}
    state_dict = {"a." + key: weight for key, weight in state_dict.items() if weight is not None}
    with pytest.raises(ValueError, match="from_cheind: ") as caught:
        from_cheind(state_dict, "a.", residual=options.get("residual", False))
    assert message in str(caught.value)


def test_a_missing_layer_is_named():
    state_dict = Cheind("1.4.2", (3, 4, 4, 4)).state_dict
    left = {key: weight for key, weight in state_dict.items() if not key.startswith("layers.1.")}
    with pytest.raises(ValueError, match=r"got no key layers\.1\.gate_hidden\.weight$"):
        from_cheind(left)


def test_foreign_weights():
    with pytest.raises(
        ValueError, match=r"keys such as layers\.0\.gate_hidden\.weight or .*, got the key to_hidden_and_gate"
    ):
        from_cheind(lucidrains_weights())
    both = {f"model.rnn.{key}": weight for key, weight in Cheind("1.4.2", (3, 4)).state_dict.items()}
    with pytest.raises(ValueError, match=r"use prefix='model\.rnn\.'$"):
        from_cheind(both)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": None}, "stride must be given, got None; convolutional weights do not show it"),
        ({"padding": None}, "padding must be given, got None"),
        ({"num_groups": [8]}, "num_groups must be a number or a list of 2, one for each layer, got [8]"),
        ({"num_groups": 3}, "num_groups must be a divisor of the number of channels, 32, got 3"),
        ({"residual": False}, "got the unexpected key layers.0.res_align.weight"),
    ],
)
def test_options_of_convolutions_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match="must be") as caught:
        normed(**options)
    assert message in str(caught.value)


def test_options_that_do_not_fit():
    rnn = Cheind("1.4.2", (3, 4))
    with pytest.raises(ValueError, match=r"stride must be None because the weights have no convolution, got 1$"):
        rnn.converted(stride=1)
    with pytest.raises(ValueError, match="num_groups must be None because the weights have no convolution, got 1"):
        rnn.converted(num_groups=1)
    with pytest.raises(ValueError, match="num_groups must be None because the weights have no group norm, got 1"):
        Cheind(*IMAGES[1][:2], **IMAGES[1][2]).converted(num_groups=1)
    with pytest.raises(ValueError, match="residual must be False or None because a cell has no residual, got True"):
        Cheind("cell", (4, 4)).converted(residual=True)
    with pytest.raises(TypeError, match="residual must be a bool, got 1"):
        rnn.converted(residual=1)
    half = {**rnn.state_dict, "layers.0.gate_hidden.bias": zeros(8).half()}
    with pytest.raises(
        TypeError, match=r"gate_hidden\.bias must be torch\.float64 like layers\.0\.gate_hidden\.weight"
    ):
        from_cheind(half)


# PufferLib


class PufferNetwork(nn.Module):
    """The network `MinGRU` of https://github.com/PufferAI/PufferLib at 8e3e754, in linear space, by steps.

    There: one map without bias for each layer, with the rows of candidate, gate and highway; states (L, B, H) from 0.
    """

    def __init__(self, size, num_layers=1, dtype=torch.double):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, 3 * size, bias=False, dtype=dtype) for _ in range(num_layers))

    def forward(self, x, states=None):
        last = []
        for index, layer in enumerate(self.layers):
            state = torch.zeros_like(x[:, 0]) if states is None else states[index]
            outs = []
            for step in x.unbind(1):
                candidate, gate, highway = (layer.weight @ step.mT).T.tensor_split(3, 1)
                z, mix = gate.sigmoid(), highway.sigmoid()
                state = (1 - z) * state + z * AuthorsLayer.g(candidate)
                outs.append(mix * state + (1 - mix) * step)
            x = torch.stack(outs, 1)
            last.append(state)
        return x, torch.stack(last)


def ours_of(weight):
    """Rows in our order: gate, candidate, highway."""
    candidate, gate, highway = weight.tensor_split(3)
    return torch.cat([gate, candidate, highway])


def assert_same_as_puffer(network, rnn, x, states=None):
    """Outputs, states and all gradients, by way of both."""
    found = []
    for function, given in ((network, states), (rnn, None if states is None else states.unsqueeze(2))):
        leaves = [x.clone().requires_grad_(), *([] if given is None else [given.clone().requires_grad_()])]
        out, h = function(*leaves)
        loss = (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum() + h.square().sum()
        weights = [layer.weight if function is network else layer.linear.weight for layer in function.layers]
        found.append((out, h.flatten(), *(grad.flatten() for grad in torch.autograd.grad(loss, leaves + weights))))
    theirs, ours = found
    theirs = [*theirs]
    for index in range(len(network.layers)):
        at = index - len(network.layers)
        theirs[at] = ours_of(theirs[at].view_as(network.layers[index].weight)).flatten()
    assert_close(ours, tuple(theirs), **TIGHT)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("sizes", [(5, 1), (4, 3), (1, 2)])
def test_puffer_one_pass(sizes, length, with_state):
    network = PufferNetwork(*sizes)
    rnn = from_pufferlib(network.state_dict())
    x = double(B, length, sizes[0])
    assert_same_as_puffer(network, rnn, x, double(sizes[1], B, sizes[0]) if with_state else None)


@pytest.mark.parametrize("row", [0, 5, 10])
def test_the_comparison_with_puffer_can_fail(row):
    network = PufferNetwork(5, 2)
    rnn = from_pufferlib(network.state_dict())
    with torch.no_grad():
        rnn.layers[1].linear.weight[row, 0] += 1e-6
    with pytest.raises(AssertionError, match="not close"):
        assert_same_as_puffer(network, rnn, double(B, 7, 5))


def test_puffer_by_hand():
    """Candidate 1.5, gate 0 and highway 0 of an input of 3: the state 1/2*2 = 1 and the output (1 + 3) / 2."""
    rnn = from_pufferlib({"layers.0.weight": torch.tensor([[0.5], [0.0], [0.0]])})
    out, h = rnn(torch.tensor([[[3.0]]]))
    assert (out.item(), h.item()) == (2.0, 1.0)


@pytest.mark.parametrize("scripted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_puffer_steps_and_resets(scripted):
    network = PufferNetwork(4, 2)
    rnn = from_pufferlib(network.state_dict())
    run = torch.jit.script(rnn) if scripted else rnn
    x, h = double(B, 9, 4), None
    whole, last = network(x)
    for t in range(9):
        with torch.set_grad_enabled(t % 2 == 0):
            out, h = run(x[:, t : t + 1], h)
        assert_close(out, whole[:, t : t + 1], **TIGHT)
    assert_close(h.squeeze(2), last, **TIGHT)
    reset = torch.zeros(B, 9, dtype=torch.bool)
    reset[:, [0, 6]] = True
    out, _ = run(x, double(2, B, 1, 4), reset)
    assert_close(out, torch.cat([network(x[:, :6])[0], network(x[:, 6:])[0]], 1), **TIGHT)


def test_what_from_pufferlib_returns():
    network = PufferNetwork(4, 3, torch.float32)
    seed, before = torch.get_rng_state(), copy.deepcopy(network.state_dict())
    rnn = from_pufferlib(network.state_dict(keep_vars=True))
    assert torch.equal(torch.get_rng_state(), seed)
    assert type(rnn) is mingru.MinGRU
    assert (rnn.input_dims, rnn.hidden_dims, rnn.num_layers, rnn.bias) == (4, 4, 3, False)
    assert [name for name, weight in rnn.named_parameters() if not weight.requires_grad] == ["initial_state"]
    assert not rnn.initial_state.any()
    fresh = mingru.MinGRU(4, 4, 3, bias=False, residual="highway", learn_initial_state=True)
    fresh.load_state_dict(rnn.state_dict())
    x = torch.randn(B, 5, 4)
    assert_close(fresh(x), rnn(x), rtol=0, atol=0)
    for weight in rnn.parameters():
        assert weight.is_leaf
        nn.init.zeros_(weight)
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    half = from_pufferlib(PufferNetwork(4, 2, torch.bfloat16).to("meta").state_dict())
    assert {(weight.dtype, weight.device.type) for weight in half.parameters()} == {(torch.bfloat16, "meta")}


def test_a_network_inside_a_policy():
    network = PufferNetwork(4)
    policy = nn.ModuleDict({"encoder": nn.Linear(3, 4), "network": network})
    x = double(B, 5, 4)
    assert_close(from_pufferlib(policy.state_dict(), "network.")(x)[0], network(x)[0], **TIGHT)
    with pytest.raises(ValueError, match=r"got the key encoder\.weight; use prefix='network\.'$"):
        from_pufferlib(policy.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.0.weight": None}, "state_dict must be a mapping with the keys a.layers.0.weight, got no key a.lay"),
        ({"layers.0.bias": zeros(12)}, "a.layers.1.weight, got the unexpected key a.layers.0.bias"),
        ({"layers.0.weight": zeros(12)}, "a.layers.0.weight must be (3 * H, H), got (12,)"),
        ({"layers.0.weight": zeros(12, 5)}, "a.layers.0.weight must be (3 * H, H), got (12, 5)"),
        ({"layers.0.weight": zeros(0, 0)}, "a.layers.0.weight must be (3 * H, H), got (0, 0)"),
        ({"layers.1.weight": zeros(15, 5)}, "a.layers.1.weight must be (12, 4) because a.layers.0.weight is (12, 4)"),
        ({"layers.1.weight": zeros(12, 4).half()}, "a.layers.1.weight must be torch.float64 like a.layers.0.weight"),
        ({"layers.1.weight": zeros(12, 4).to("meta")}, "a.layers.1.weight must be on cpu like a.layers.0.weight"),
        ({"layers.1.weight": [1.0]}, "a.layers.1.weight must be a tensor, got list"),
    ],
)
def test_puffer_weights_that_do_not_fit(changes, message):
    state_dict = {**PufferNetwork(4, 2).state_dict(), **changes}
    with pytest.raises((ValueError, TypeError), match=r"^from_pufferlib: ") as caught:
        from_pufferlib({"a." + key: weight for key, weight in state_dict.items() if weight is not None}, "a.")
    assert message in str(caught.value)


def test_weights_that_are_not_of_puffer():
    for weights in (lucidrains_weights(), mingru.MinGRU(4, 4, residual="highway").state_dict()):
        with pytest.raises(ValueError, match=r"a mapping with keys such as layers\.0\.weight, got the key "):
            from_pufferlib(weights)
    with pytest.raises(TypeError, match=r"^from_pufferlib: state_dict must be a mapping of names to tensors, got Puff"):
        from_pufferlib(PufferNetwork(4))
    with pytest.raises(TypeError, match=r"layers\.0\.weight must be of a floating-point dtype, got torch\.int64"):
        from_pufferlib({"layers.0.weight": torch.zeros(12, 4, dtype=torch.int64)})
