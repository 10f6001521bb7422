"""Weights of other code bases: against the package of the one, against a restatement of the other's formulas."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from minGRU_pytorch import minGRU
from minGRU_pytorch.minLSTM import minLSTM
from torch import nn
from torch.testing import assert_close

import mingru
from mingru.convert import Projected, from_lucidrains, from_minrnns

B = 3
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
KINDS = ["mingru", "minlstm"]
LENGTHS = [1, 2, 17]


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
    vector, or from nothing; minLSTM's two gates divided by their sum, where asked for.
    """

    def __init__(self, kind, dims, factor=1.0, learn=True, dtype=torch.double):
        super().__init__()
        inner = int(dims * factor)
        self.parts = {"mingru": 2, "minlstm": 3}[kind]
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
                forget, admit = pre[0].sigmoid(), pre[1].sigmoid()
                keep, admit = forget / (forget + admit), admit / (forget + admit)
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
        self.norm = True if kind == "minlstm" else None

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


PEERS = [case for kind in KINDS for case in lucidrains(kind) + authors(kind)]
SOME = [case for kind in KINDS for case in (lucidrains(kind)[1], lucidrains(kind)[3], *authors(kind)[:2])]


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


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize(("source", "args"), SOME)
def test_steps_with_state(source, args, scripted):
    peer, layer, x = made(source, args)
    run = torch.jit.script(layer) if scripted else layer
    whole, last = peer(x)
    theirs, ours = None, None
    for t in range(x.shape[1]):
        out, theirs = peer(x[:, t : t + 1], theirs)
        our_out, ours = run(x[:, t : t + 1], ours)
        assert_close(our_out, out, **TIGHT)
        assert_close(ours[0], theirs, **TIGHT)
        assert_close(our_out, whole[:, t : t + 1], **TIGHT)
    assert_close(ours[0], last, **TIGHT)


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
    fresh = type(rnn)(rnn.input_dims, rnn.hidden_dims, bias=rnn.bias, learn_initial_state=True, dtype=x.dtype)
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
    with pytest.raises(ValueError, match=r"got embed\.weight, layers\..*; a layer of theirs has prefix='layers\.1\.'$"):
        convert(model.state_dict())


# What is refused


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
            "state_dict must be of the keys to_hidden_and_gate.weight or to_hidden_and_f_i_gate.weight and perhaps "
            "to_out.weight, got to_out.weight",
        ),
        ({"to_out.bias": zeros(4)}, "got to_hidden_and_gate.weight, to_out.weight, to_out.bias"),
        (
            {"to_hidden_and_f_i_gate.weight": zeros(9, 4)},
            "got to_hidden_and_gate.weight, to_out.weight, to_hidden",
        ),
        ({GATES + "weight": zeros(7, 4)}, "to_hidden_and_gate.weight must be (2 * H, I), got (7, 4)"),
        ({GATES + "weight": zeros(0, 4)}, "to_hidden_and_gate.weight must be (2 * H, I), got (0, 4)"),
        ({GATES + "weight": zeros(12)}, "to_hidden_and_gate.weight must be (2 * H, I), got (12,)"),
        (
            {"to_out.weight": zeros(6, 4)},
            "to_out.weight must be (4, 6) as to_hidden_and_gate.weight is (12, 4), got (6, 4)",
        ),
        (
            {"to_out.weight": zeros(4, 6).to("meta")},
            "to_out.weight must be on cpu as to_hidden_and_gate",
        ),
        ({str(index): zeros(1) for index in range(9)}, "to_out.weight, 0, 1, 2, 3, 4, 5 and 3 more"),
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
            "state_dict must be of the keys a.to_hidden_and_gate.weight, a.to_hidden_and_gate.bias, a.to_out.weight, "
            "a.to_out.bias and perhaps a.init_hidden_state, got a.init_hidden_state, a.to_hidden_and_gate.weight, "
            "a.to_out.weight",
        ),
        ({"conv.weight": zeros(4)}, "a.to_out.bias, a.conv.weight"),
        (
            {GATES + "weight": zeros(24, 4)},
            "a.to_hidden_and_gate.weight must be (2 * H, I) or (3 * H, I) with a.to_out.weight (I, H), "
            "got (24, 4) with (4, 6)",
        ),
        ({"to_out.weight": zeros(4)}, "a.to_out.weight (I, H), got (12, 4) with (4,)"),
        (
            {"to_out.weight": zeros(5, 6)},
            "a.to_out.weight must be (4, 6) as a.to_hidden_and_gate.weight is",
        ),
        ({"to_out.bias": zeros(5)}, "a.to_out.bias must be (4,) as"),
        ({GATES + "bias": zeros(6)}, "a.to_hidden_and_gate.bias must be (12,) as"),
        ({"init_hidden_state": zeros(1, 6)}, "a.init_hidden_state must be (6,) as"),
    ],
)
def test_authors_weights_that_do_not_fit(changes, message):
    state_dict = {**authors_weights(), **changes}
    with pytest.raises(ValueError, match="from_minrnns: ") as caught:
        from_minrnns({"a." + key: weight for key, weight in state_dict.items() if weight is not None}, "a.")
    assert message in str(caught.value)
    assert "prefix" not in str(caught.value)


def test_a_prefix_of_nothing():
    with pytest.raises(ValueError, match=r"keys b\.to_hidden_and_gate.*, got none that begins with 'b\.'$"):
        from_lucidrains(lucidrains_weights(), "b.")


@pytest.mark.parametrize("use_coeff_norm", [None, False, "True"])
def test_a_minlstm_whose_gates_may_not_be_normalised(use_coeff_norm):
    state_dict = Authors("minlstm", 4).module.state_dict()
    with pytest.raises(ValueError, match=r"use_coeff_norm must be True for a minLSTM, got .*config\.yaml"):
        from_minrnns(state_dict, use_coeff_norm=use_coeff_norm)


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
    assert why(half).startswith(
        "to_out.weight must be torch.float64 as to_hidden_and_gate.weight is, got torch.float16"
    )
    listed = {**weights, GATES + "weight": [1.0]}
    assert why(listed).startswith("to_hidden_and_gate.weight must be a tensor, got list")
    whole = {key: weight.long() for key, weight in weights.items()}
    assert why(whole) == "to_hidden_and_gate.weight must be of a floating dtype, got torch.int64"
