"""Weights of other code bases: against the package itself, its recorded outputs, or a restatement of its formulas."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from cases import TIGHT, grid, refuses
from minGRU_pytorch.minLM import minLM
from peers import Authors, B, Cheind, Lucidrains, Puffer, double, zeros
from torch import nn
from torch.testing import assert_close

import mingru
from mingru.convert import from_cheind, from_pufferlib, language_model_from_lucidrains
from mingru.modules.per_step import PerStep

KINDS = {"mingru": mingru.MinGRU, "minlstm": mingru.MinLSTM}


def as_ours(layer, h):
    """Their states for our layer: as they are, or stacked for a MinGRU of several layers."""
    if isinstance(h, torch.Tensor) or isinstance(layer, (mingru.Stack, mingru.MinConv2dGRU)):
        return h
    return h[0] if len(h) == 1 else torch.stack(h)


def assert_states(ours, theirs):
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our.reshape(their.shape), their, **TIGHT)


def assert_same(peer, layer, x):
    """Outputs, states, and the gradient of x, by way of both."""
    found = []
    for call in (peer, layer):
        leaf = x.clone().requires_grad_()
        out, states = call(leaf)
        weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        loss = (out * weight).sum() + sum(state.square().sum() for state in states)
        found.append((out, states, torch.autograd.grad(loss, leaf)[0]))
    (out, states, grad), (our_out, our_states, our_grad) = found
    assert grad.any()
    assert_close([our_out, our_grad], [out, grad], **TIGHT)
    assert_states(our_states, states)


def rnn_of(layer):
    return layer.layers[0] if len(layer.layers) > 1 and isinstance(layer.layers[1], PerStep) else layer


IMAGES = [
    (Cheind, (2, 3), {"cell": True, "kernels": [2], "stride": [1], "padding": [0]}),
    (Cheind, (2, 3, 3), {"kernels": [3, 1], "stride": [2, 1], "padding": [1, 0], "residual": True}),
    (Cheind, (3, 3), {"kernels": [3], "stride": [1], "padding": [1], "residual": True, "bias": False}),
    (Cheind, (3, 3), {"kernels": [3], "stride": [1], "padding": [0], "residual": True}),
    (Cheind, (64, 12), {"kernels": [1], "stride": [1], "padding": [0], "norm": True}),
    (Cheind, (256, 12), {"kernels": [1], "stride": [1], "padding": [0], "norm": True}),
]
# Theirs has 8 groups in the first layer and 1 in the second, ours would have 2 and 1.
NORMED = {"kernels": [3, 1], "stride": [1, 2], "padding": [1, 1], "residual": True, "norm": True}
NORMED = (Cheind, (32, 4, 8), NORMED)
# Two of minGRU-pytorch, of the authors with a start and without, a residual, layers of different sizes, convolutions,
# and PufferLib's network.
SOME = [
    *((Lucidrains, (kind, *sizes), {}) for kind in KINDS for sizes in [(5, 1.0, True), (4, 1.5, False)]),
    *((Authors, (kind, 5, 1.0, learn), {}) for kind in (*KINDS, "minlstm_unnormalized") for learn in (True, False)),
    (Cheind, (3, 5, 5), {"residual": True}),
    (Cheind, (3, 5, 2), {"residual": True, "norm": True}),
    IMAGES[1],
    NORMED,
    (Puffer, (4, 2), {}),
]
# One of each package, and of each of our classes.
EACH = [SOME[index] for index in (0, 4, 10, 11, 12, 14)]
CASES = [
    *SOME,
    *((Lucidrains, (kind, *sizes), {}) for kind in KINDS for sizes in [(5,), (4, 1.5), (1,), (1, 3.0)]),
    *((Authors, (kind, 4, 1.5), {}) for kind in (*KINDS, "minlstm_unnormalized")),
    (Authors, ("minlstm", 1, 1.0, False), {}),
    *((Cheind, (3, 5), {"cell": cell, "bias": bias}) for cell in (True, False) for bias in (True, False)),
    *(
        (Cheind, sizes, {"residual": residual, "bias": bias})
        for sizes in [(3, 5, 5), (4, 4, 4), (3, 5, 2), (5, 5, 3), (3, 3)]
        for residual, bias in [(True, True), (False, True), (True, False)]
    ),
    (Cheind, (3, 5, 2), {"norm": True}),
    *((Cheind, (4, 4, 4), {"norm": True, "residual": residual}) for residual in (True, False)),
    *IMAGES,
    *((Puffer, sizes, {}) for sizes in [(5,), (4, 3), (1, 2)]),
]


def name_of(case):
    source, args, options = case
    return f"{source.__name__} {args} {options}"


def made(case):
    source, args, options = case
    peer = source(*args, **options)
    return peer, peer.converted(), peer.input(17)


# The same as theirs

some = pytest.mark.parametrize("case", SOME, ids=name_of)
each = pytest.mark.parametrize("case", EACH, ids=name_of)


@pytest.mark.parametrize("length", [1, 2, 17])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_one_pass(case, length):
    peer, layer, x = made(case)
    assert_same(peer, layer, x[:, :length])


CHANGED = [
    (SOME[4], "layers.0.layers.0.linear.bias", 0),
    (SOME[4], "layers.1.module.bias", 0),
    (SOME[4], "layers.0.initial_state", 0),
    (SOME[10], "layers.0.align.weight", 0),
    (SOME[11], "layers.1.layers.0.align.weight", 0),
    (NORMED, "layers.1.norm.weight", 0),
    *((SOME[-1], "layers.1.linear.weight", 4 * row) for row in (0, 4, 8)),
]


@pytest.mark.parametrize(("case", "place", "index"), CHANGED)
def test_the_comparison_can_fail(case, place, index):
    peer, layer, x = made(case)
    with torch.no_grad():
        layer.get_parameter(place).flatten()[index].add_(1e-6)
    refuses(AssertionError, "not close", assert_same, peer, layer, x)


@some
def test_their_states_and_resets(case):
    peer, layer, x = made(case)
    (first, state), (whole, last) = peer(x[:, :6]), peer(x)
    out, h = layer(x[:, 6:], as_ours(layer, state))
    assert_close(out, whole[:, 6:], **TIGHT)
    assert_states(h, last)
    # A reset starts where they start.
    reset = torch.zeros(B, 17, dtype=torch.bool)
    reset[:, [0, 6]] = True
    out, _ = layer(x, as_ours(layer, [torch.randn_like(each) for each in last]), reset)
    assert_close(out, torch.cat([first, peer(x[:, 6:])[0]], 1), **TIGHT)


def test_puffer_by_hand():
    """Candidate 1.5, gate 0 and highway 0 of an input of 3: the state 1/2*2 = 1 and the output (1 + 3) / 2."""
    out, h = from_pufferlib({"layers.0.weight": torch.tensor([[0.5], [0.0], [0.0]])})(torch.tensor([[[3.0]]]))
    assert (out.item(), h.item()) == (2.0, 1.0)


@pytest.mark.parametrize("length", [2, 9])
def test_their_minlstm_puts_a_carried_state_through_g(length):
    """What our documentation says of theirs: more than one step from a state h are ours from g(h)."""
    peer, layer, x = made((Lucidrains, ("minlstm", 5), {}))
    x, h = x[:, :length], torch.rand(B, 1, 5).double()
    out, _ = peer(x, [h])
    assert_close(layer(x, mingru.functional.g(h))[0], out, **TIGHT)
    assert (layer(x, h)[0] - out).abs().max() > 1e-2


@grid(use_lstm=[False, True], expansion=[1.0, 1.5])
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
    unused = [name for name, x in ours.named_parameters() if x.grad is None]
    assert unused == [f"blocks.layers.{index}.rnn.initial_state" for index in range(3)]


# What comes back


WITHOUT_BIAS = (Cheind, (3, 5, 5), {"norm": True, "bias": False})
OF_LUCIDRAINS = r"Stack.*MinLSTM\(\s*4, 6, bias=False.*\(module\): Linear\(in_features=6, out_features=4, bias=False"
OF_AUTHORS = r"Stack.*MinGRU\(\s*4, 6, learn_init.*\(module\): Linear\(in_features=6, out_features=4, bias=True"
OF_SIZES = r"Stack\(.*dropout=0.25.*MinGRU\(\s*3, 5, residual=True.*MinGRU\(\s*5, 2, residual=True"


@pytest.mark.parametrize(
    ("case", "options", "pattern"),
    [
        ((Lucidrains, ("mingru", 4, 1.5, False), {}), {}, r"MinGRU\(\s*4, 6, bias=False, learn_initial_state=True"),
        ((Lucidrains, ("minlstm", 4, 1.5), {}), {}, OF_LUCIDRAINS),
        ((Authors, ("mingru", 4, 1.5), {}), {}, OF_AUTHORS),
        ((Cheind, (3, 5, 2), {"residual": True}), {"dropout": 0.25}, OF_SIZES),
        (WITHOUT_BIAS, {"dropout": 0.5}, r"MinGRU\(\s*3, 5, num_layers=2, bias=False, dropout=0.5, norm='layer'"),
        (IMAGES[1], {}, r"MinConv2dGRU\(\s*2, 3, \[3, 1\], num_layers=2, stride=\[2, 1\], padding"),
        ((Puffer, (4, 3), {}), {}, r"MinGRU\(\s*4, 4, num_layers=3, bias=False, residual='highway'"),
    ],
    ids=str,
)
def test_kinds_and_sizes(case, options, pattern):
    source, args, given = case
    assert re.match(f"(?s){pattern}", repr(source(*args, **given).converted(**options)))


@some
def test_only_a_learned_start_goes_on_learning(case):
    peer, layer, _ = made(case)
    start = dict(layer.named_parameters()).get("initial_state", getattr(rnn_of(layer), "initial_state", None))
    is_learned = "init_hidden_state" in peer.tensors
    # cheind/mingru starts at g(0), which is our default.
    assert (start is None) == isinstance(peer, Cheind)
    frozen = [weight for weight in copy.deepcopy(layer).parameters() if not weight.requires_grad]
    assert len(frozen) == (start is not None and not is_learned)
    assert start is None or (start.requires_grad, bool(start.any())) == (is_learned, is_learned)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_copies_and_nothing_is_drawn(case, dtype):
    peer, exact, x = made(case)
    peer.tensors = {name: weight.to(dtype).requires_grad_() for name, weight in peer.tensors.items()}
    seed, before = torch.get_rng_state(), copy.deepcopy(peer.tensors)
    layer = peer.converted()
    assert torch.equal(torch.get_rng_state(), seed)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    assert_close(layer(x.to(dtype))[0].double(), exact(x)[0], rtol=tolerance, atol=tolerance)
    for weight in layer.parameters():
        assert weight.is_leaf and weight.dtype == dtype and weight.device.type == "cpu"
        nn.init.zeros_(weight)
    assert all(torch.equal(weight, before[name]) for name, weight in peer.tensors.items())
    peer.tensors = {name: weight.to("meta") for name, weight in before.items()}
    assert {weight.device.type for weight in peer.converted().parameters()} == {"meta"}


@each
def test_a_layer_inside_a_model(case):
    peer, layer, x = made(case)
    model = {"embed.weight": zeros(3, 4), **{f"layers.1.{name}": weight for name, weight in peer.tensors.items()}}
    assert torch.equal(peer.convert(model, "layers.1.", **peer.options)(x)[0], layer(x)[0])
    refuses(ValueError, r"got the key embed\.weight; use prefix='layers\.1\.'$", peer.convert, model)


# What is refused


@each
def test_wrong_types(case):
    peer, _, _ = made(case)
    key, weight = next((key, weight) for key, weight in peer.tensors.items() if weight.dim() > 1)
    whole = {name: each.long() for name, each in peer.tensors.items()}
    for changed, error, message in [
        (nn.Linear(2, 2), TypeError, "state_dict must be a mapping of names to tensors, got Linear; use .state_dict()"),
        ({**peer.tensors, 0: weight}, TypeError, "the key 0 of state_dict must be a str, got int; use .state_dict()"),
        ({**peer.tensors, key: weight.to_sparse()}, TypeError, f"{key} must be a tensor, got a tensor with the layout"),
        ({**peer.tensors, key: [1.0]}, TypeError, f"{key} must be a tensor, got list"),
        (whole, TypeError, f"{key} must be of a floating-point dtype, got torch.int64"),
        ({}, ValueError, "state_dict must be a mapping with keys that begin with '', got an empty mapping"),
    ]:
        refuses(error, re.escape(f"{peer.convert.__name__}: {message}"), peer.convert, changed, **peer.options)
    refuses(TypeError, "prefix must be a str, got 3", peer.convert, peer.tensors, 3, **peer.options)


@pytest.mark.parametrize("use_coeff_norm", [None, 1, "True"])
def test_a_minlstm_whose_weights_do_not_show_the_normalization(use_coeff_norm):
    peer = Authors("minlstm", 4)
    with pytest.raises(ValueError, match=r"use_coeff_norm must be True or False for a minLSTM, got .*config\.yaml"):
        peer.converted(use_coeff_norm=use_coeff_norm)
    for value in (True, False):
        assert rnn_of(peer.converted(use_coeff_norm=value)).normalize is value


# cheind/mingru

# In the file: how its numbers were made.
RECORDED = json.loads((Path(__file__).parent / "data/cheind.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("run", [0, 1], ids=["default state", "given state"])
@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["name"])
def test_recorded_outputs(case, run):
    weights = {name: torch.tensor(weight, dtype=torch.double) for name, weight in case["weights"].items()}
    x, found = torch.tensor(case["x"], dtype=torch.double), case["runs"][run]

    def state(h):
        return None if h is None else [torch.tensor(each, dtype=torch.double) for each in h]

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


def test_a_residual_that_the_weights_do_not_show():
    peer = Cheind(4, 4, 4, residual=True)
    with pytest.raises(ValueError, match=r"^from_cheind: residual must be True or False, got None; the weights do not"):
        peer.converted(residual=None)
    for *sizes, residual, cell in [(3, 4, 4, True, False), (3, 4, 4, False, False), (4, 4, False, True)]:
        peer, x = Cheind(*sizes, residual=residual, cell=cell), double(B, 4, sizes[0])
        assert_close(peer.converted(residual=None)(x)[0], peer(x)[0], **TIGHT)


@pytest.mark.parametrize("first", ["to_gate_hidden.0", "linear_gate_hidden.0", "linear_z.0"])
def test_older_versions_are_renamed_by_the_user(first):
    with pytest.raises(ValueError, match=r"or a\.to_gate_hidden\.weight, got .*; see the guide .* to rename keys"):
        from_cheind({f"a.{first}.weight": zeros(8, 3)}, "a.")


# What does not fit a layer as its constructor makes it


FRESH = {"stride": [1, 2], "padding": 1, "residual": True, "norm": "group", "dtype": torch.double}


def fresh_conv():
    return mingru.MinConv2dGRU(32, [4, 8], [3, 1], 2, **FRESH)


def test_groups_travel_in_the_state_dict():
    peer, layer, x = made(NORMED)
    assert not any("groups" in name for name in fresh_conv().state_dict())
    assert [each.norm.num_groups for each in layer.layers] == [8, 1]
    assert [each.norm.num_groups for each in fresh_conv().layers] == [2, 1]
    fresh = fresh_conv()
    fresh.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert fresh.state_dict().keys() == layer.state_dict().keys()
    exported = torch.export.export(fresh, (x,)).module()
    for module in (fresh, copy.deepcopy(fresh), exported):
        assert_close(module(x)[0], peer(x)[0], **TIGHT)


def test_other_groups_never_load_silently():
    layer, plain, missing = made(NORMED)[1], fresh_conv(), r"key\(s\) in state_dict: \"layers\.0\.norm\.groups\""
    refuses(RuntimeError, f"Missing {missing}", layer.load_state_dict, plain.state_dict())
    plain.layers[0].norm = nn.GroupNorm(2, 32, dtype=torch.double)
    refuses(RuntimeError, f"Unexpected {missing}", plain.load_state_dict, layer.state_dict())
    with pytest.raises(ValueError, match="num_groups must be a divisor of the number of channels, 32, got 5"):
        layer.load_state_dict(layer.state_dict() | {"layers.0.norm.groups": torch.tensor(5)})


@pytest.mark.parametrize(("num_groups", "expected"), [(4, [4, 4]), (1, [1, 1]), ([16, 2], [16, 2])])
def test_other_groups_than_by_their_rule(num_groups, expected):
    peer, _, x = made(NORMED)
    layer = peer.converted(num_groups=num_groups)
    assert [each.norm.num_groups for each in layer.layers] == expected
    assert_close(layer(x)[0], peer(x, num_groups=expected)[0], **TIGHT)
