"""The layer: against the float64 reference, scripted, saved, in pieces, in every dtype, and what it refuses."""

import copy
import functools
import io
import itertools
import math
import pickle
import random
import subprocess
import sys
import warnings

import pytest
import reference
import torch
from torch.testing import assert_close

import mingru

B, S, IN, H = 3, 21, 4, 5

# Every option on its own, and together.
OPTIONS = [
    {},
    {"num_layers": 2},
    {"bias": False},
    {"batch_first": False},
    {"bidirectional": True},
    {"residual": True},
    {"norm": "layer"},
    {"norm": "rms"},
    {"candidate": "linear"},
    {"candidate": "tanh"},
    {"learn_initial_state": True},
    {"recompute": True},
    {"recompute": False, "num_layers": 2},
    {"cell": "minlstm"},
    {"cell": "minlstm", "bias": False, "bidirectional": True},
    {"cell": "minlstm_unnormalized", "num_layers": 2, "norm": "layer"},
    {"residual": "highway"},
    {"residual": "highway", "cell": "minlstm", "num_layers": 2, "bias": False, "norm": "rms", "batch_first": False},
    {
        "num_layers": 2,
        "batch_first": False,
        "bidirectional": True,
        "residual": True,
        "norm": "rms",
        "learn_initial_state": True,
    },
]

# By the name of the recurrence.
KINDS = {
    "mingru": mingru.MinGRU,
    "minlstm": mingru.MinLSTM,
    "minlstm_unnormalized": functools.partial(mingru.MinLSTM, normalize=False),
}

FACTORS = {
    "cell": list(KINDS),
    "num_layers": [1, 2, 3],
    "bias": [True, False],
    "batch_first": [True, False],
    "bidirectional": [False, True],
    "residual": [False, True],
    "norm": [None, "layer", "rms"],
    "candidate": ["positive", "linear", "tanh"],
    "learn_initial_state": [False, True],
    "recompute": [None, False, True],
    "h": [None, "full", "zero", "negative", "batch", "one", "layer"],
    "reset": [False, True],
}


def cover(factors):
    """Few combinations in which each value of a factor meets each of every other: greedily, the best of some drawn."""
    draw = random.Random(0)

    def pairs(row):
        return set(itertools.combinations(row.items(), 2))

    missing = {
        ((one, v), (two, w))
        for one, two in itertools.combinations(factors, 2)
        for v, w in itertools.product(factors[one], factors[two])
    }
    rows = []
    while missing:
        start = dict(draw.choice(sorted(missing, key=repr)))
        drawn = [{name: start.get(name, draw.choice(factors[name])) for name in factors} for _ in range(30)]
        rows.append(max(drawn, key=lambda row: len(missing & pairs(row))))
        missing -= pairs(rows[-1])
    return rows


def named(options):
    return " ".join(f"{name}={value}" for name, value in options.items()) or "plain"


def build(hidden_dims=H, *, cell="mingru", **options):
    input_dims = hidden_dims if options.get("residual") == "highway" else IN
    return KINDS[cell](input_dims, hidden_dims, **options)


def make(dtype=torch.double, **options):
    rnn = build(**options, dtype=dtype)
    with torch.no_grad():
        # Away from the values where a forgotten norm weight or a forgotten initial state would not show.
        for name, weight in rnn.named_parameters():
            if "norm" in name or name == "initial_state":
                weight.add_(torch.randn_like(weight) / 4)
    return rnn


def make_state(rnn, kind, dtype=torch.double):
    count = rnn.num_layers * rnn.num_directions
    shape = {"batch": (B, 1, H), "one": (1, 1, H), "layer": (count, 1, 1, H)}.get(kind, (count, B, 1, H))
    if kind == "zero":
        return torch.zeros(shape, dtype=dtype)
    h = torch.randn(shape, dtype=dtype)
    return -h.abs() if kind == "negative" else h


def make_input(rnn, dtype=torch.double):
    """x and reset in the module's own order, and the functions between it and batch-first order."""
    x, reset = torch.randn(B, S, rnn.input_dims, dtype=dtype), torch.rand(B, S) < 0.2
    reset[0, 0] = reset[1, -1] = True
    return in_order(rnn, x), in_order(rnn, reset)


def in_order(rnn, sequence):
    return sequence if rnn.batch_first else sequence.transpose(0, 1)


def graded(function, rnn, x, h, reset):
    """out, h and the gradients of x, h and all weights, through out and through the returned state."""
    x = x.detach().clone().requires_grad_()
    h = None if h is None else h.detach().clone().requires_grad_()
    out, last = function(x, h, reset)
    # Not all alike, so that no two outputs can be swapped, and made without a seed of its own.
    weight, weight_last = (torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape) for t in (out, last))
    loss = (out * weight).sum() + (last.square() * weight_last).sum()
    leaves = {"x": x, **({} if h is None else {"h": h}), **dict(rnn.named_parameters())}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    got = {"out": out, "last": last}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        # A leaf that took no part: no gradient and a gradient of 0 mean the same.
        got[name] = torch.zeros_like(leaf) if grad is None else grad
    return got


def assert_same(got, expected, **tolerances):
    assert got.keys() == expected.keys()
    for name in expected:
        assert_close(got[name], expected[name], msg=lambda m, name=name: f"{name}: {m}", **tolerances)


TIGHT = {"rtol": 1e-9, "atol": 1e-9}
# The bodies whose use of memory is promised.
FAST = [name for name in ("native", "torch") if mingru.backends().get(name) is True]


# The reference


@pytest.mark.parametrize("case", cover(FACTORS), ids=named)
def test_equals_the_reference(case):
    options = {name: value for name, value in case.items() if name not in ("h", "reset")}
    rnn = make(**options)
    x, reset = make_input(rnn)
    h = None if case["h"] is None else make_state(rnn, case["h"])
    reset = reset if case["reset"] else None

    def truth(x, h, reset):
        out, last = reference.layers(rnn, in_order(rnn, x), h, None if reset is None else in_order(rnn, reset))
        return in_order(rnn, out), last

    got = graded(rnn, rnn, x, h, reset)
    assert got["out"].dtype == got["last"].dtype == torch.double
    assert got["last"].shape == (rnn.num_layers * rnn.num_directions, B, 1, H)
    assert_same(got, graded(truth, rnn, x, h, reset), **TIGHT)


def test_the_comparison_with_the_reference_can_fail():
    rnn = make(num_layers=2)
    x, reset = make_input(rnn)
    expected = graded(lambda *args: reference.layers(rnn, *args), rnn, x, None, reset)
    with torch.no_grad():
        rnn.layers[1].linear.bias[0] += 1e-6
    with pytest.raises(AssertionError, match="out"):
        assert_same(graded(rnn, rnn, x, None, reset), expected, **TIGHT)


@pytest.mark.parametrize("options", [{}, {"num_layers": 3, "residual": True}], ids=named)
def test_float32_is_as_exact_as_plain_float32(options):
    rnn = make(torch.float32, **options)
    x, reset = torch.randn(B, 500, IN), torch.rand(B, 500) < 0.01

    def plain(x):
        for layer in rnn.layers:
            gate, candidate = layer.linear(x).chunk(2, -1)
            out = reference.mingru(gate, candidate, reset=reset)
            x = out + (0 if not rnn.residual else x if layer.align is None else layer.align(x))
        return x

    truth, _ = reference.layers(rnn, x, reset=reset)
    error, allowed = ((got.double() - truth).abs().max() for got in (rnn(x, reset=reset)[0], plain(x)))
    assert 0 < error <= 2 * allowed


def test_gradient_penalty():
    """A second derivative by way of a first one, as trainers take it."""
    rnn = make(num_layers=2, bidirectional=True, residual=True)
    x, reset = make_input(rnn)

    def penalty(function):
        leaf = x.clone().requires_grad_()
        out, h = function(leaf, None, reset)
        (grad,) = torch.autograd.grad(out.square().sum() + h.sum(), leaf, create_graph=True)
        return torch.autograd.grad((grad.norm(dim=-1) - 1).square().sum(), list(rnn.parameters()))

    for got, expected in zip(penalty(rnn), penalty(lambda *args: reference.layers(rnn, *args)), strict=True):
        assert expected.any()
        assert_close(got, expected, **TIGHT)


# What the states and outputs mean


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_h_is_the_state_after_the_last_step(options):
    rnn = make(**{**options, "residual": False})
    x, reset = make_input(rnn)
    out, h = rnn(x, reset=reset)
    out, top = in_order(rnn, out), (rnn.num_layers - 1) * rnn.num_directions
    assert torch.equal(out[:, -1:, :H], h[top])
    if rnn.bidirectional:
        assert torch.equal(out[:, :1, H:], h[top + 1])


@pytest.mark.parametrize("dims", [IN, H])
def test_residual_is_added_to_the_output_and_not_to_the_state(dims):
    rnn = mingru.MinGRU(dims, H, residual=True, dtype=torch.double)
    x = torch.randn(B, S, dims).double()
    out, h = rnn(x)
    added = x if dims == H else x @ rnn.layers[0].align.weight.T
    plain = mingru.MinGRU(dims, H, dtype=torch.double)
    plain.layers[0].linear.load_state_dict(rnn.layers[0].linear.state_dict())
    out_plain, h_plain = plain(x)
    assert_close(out, out_plain + added, **TIGHT)
    assert torch.equal(h, h_plain)


@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("cell", KINDS)
def test_a_highway_mixes_the_state_and_the_input(cell, norm):
    rnn = make(cell=cell, residual="highway", norm=norm)
    plain = KINDS[cell](H, H, dtype=torch.double)
    rows = 3 * H if cell == "mingru" else 4 * H
    assert [tuple(weight.shape) for weight in rnn.layers[0].linear.parameters()] == [(rows, H), (rows,)]
    with torch.no_grad():
        for name, weight in plain.layers[0].linear.named_parameters():
            weight.copy_(rnn.layers[0].linear.get_parameter(name)[:-H])
    x, reset = make_input(rnn)
    y = x if norm is None else rnn.layers[0].norm(x)
    states, h = plain(y, reset=reset)
    mix = rnn.layers[0].linear(y)[..., -H:].sigmoid()
    out, last = rnn(x, reset=reset)
    assert_close(out, mix * states + (1 - mix) * x, **TIGHT)
    assert_close(last, h, **TIGHT)


def test_a_highway_by_hand():
    rnn = mingru.MinGRU(1, 1, residual="highway", candidate="linear")
    with torch.no_grad():
        # z = sigma(0) = 1/2, the candidate is x, and sigma(ln 3) = 3/4.
        rnn.layers[0].linear.weight.copy_(torch.tensor([[0.0], [1.0], [0.0]]))
        rnn.layers[0].linear.bias.copy_(torch.tensor([0.0, 0.0, math.log(3.0)]))
    # States 1/2*8 + 1/2*2 = 5 and 1/2*5 + 1/2*3 = 4; outputs 3/4*5 + 1/4*2 and 3/4*4 + 1/4*3.
    out, h = rnn(torch.tensor([[[2.0], [3.0]]]), torch.tensor(8.0))
    assert_close(out.flatten(), torch.tensor([4.25, 3.75]))
    assert h.item() == 4.0
    # A highway that is far on one side is exact there.
    for bias, expected in ((200.0, 4.0), (-200.0, 3.0)):
        with torch.no_grad():
            rnn.layers[0].linear.bias[2] = bias
        assert rnn(torch.tensor([[[2.0], [3.0]]]), torch.tensor(8.0))[0][0, 1].item() == expected


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("options", [options for options in OPTIONS if "bidirectional" not in options], ids=named)
def test_pieces_and_steps_equal_the_whole(options, with_reset):
    rnn = make(**{"num_layers": 2, **options})
    x, reset = make_input(rnn)
    h = make_state(rnn, "full")
    time = 1 if rnn.batch_first else 0

    def joined(sizes):
        def function(x, h, reset):
            outs = []
            resets = [None] * len(sizes) if reset is None else reset.split(sizes, time)
            for piece, reset_piece in zip(x.split(sizes, time), resets, strict=True):
                out, h = rnn(piece, h, reset_piece)
                outs.append(out)
            return torch.cat(outs, time), h

        return function

    reset = reset if with_reset else None
    expected = graded(rnn, rnn, x, h, reset)
    for sizes in ([1] * S, [17, 0, 3, 1]):
        assert_same(graded(joined(sizes), rnn, x, h, reset), expected, **TIGHT)


def test_batch_elements_do_not_know_each_other():
    for options in OPTIONS:
        rnn = make(**options)
        x, reset = make_input(rnn)
        h = make_state(rnn, "full")
        out, last = rnn(x, h, reset)
        other_x, other_h, other_reset = x.clone(), h.clone(), reset.clone()
        in_order(rnn, other_x)[1] += 1
        other_h[:, 1] -= 1
        in_order(rnn, other_reset)[1].logical_not_()
        other_out, other_last = rnn(other_x, other_h, other_reset)
        changed = (in_order(rnn, out) != in_order(rnn, other_out)).flatten(1).any(1)
        assert changed.tolist() == [False, True, False], options
        assert (last != other_last).any(0).flatten(1).any(1).tolist() == [False, True, False], options


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_backward_half_is_a_forward_layer_on_flipped_input(batch_first):
    rnn = make(bidirectional=True, batch_first=batch_first)
    ahead, back = (make(batch_first=batch_first) for _ in range(2))
    ahead.layers[0].linear.load_state_dict(rnn.layers[0].linear.state_dict())
    back.layers[0].linear.load_state_dict(rnn.layers[0].linear_reverse.state_dict())
    x, _ = make_input(rnn)
    h = make_state(rnn, "full")
    time = 1 if batch_first else 0
    out, last = rnn(x, h)
    out_ahead, last_ahead = ahead(x, h[:1])
    out_back, last_back = back(x.flip(time), h[1:])
    assert_close(out, torch.cat([out_ahead, out_back.flip(time)], -1), **TIGHT)
    assert_close(last, torch.cat([last_ahead, last_back]), **TIGHT)


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_nothing_crosses_a_reset_in_either_direction(num_layers, batch_first, scripted):
    rnn = make(num_layers=num_layers, bidirectional=True, batch_first=batch_first)
    run = torch.jit.script(rnn) if scripted else rnn
    cuts = [0, 6, 17, S]  # three stretches
    reset = torch.zeros(B, S, dtype=torch.bool)
    reset[1, cuts[1:-1]] = True
    x = torch.randn(B, S, IN).double()

    def outputs(x):
        return in_order(rnn, run(in_order(rnn, x), reset=in_order(rnn, reset))[0])

    before = outputs(x)
    for start, end in itertools.pairwise(cuts):
        for at in (start, end - 1):
            other = x.clone()
            other[1, at] += 1
            changed = (outputs(other) != before).any(-1)
            expected = torch.zeros_like(changed)
            expected[1, start:end] = True
            assert torch.equal(changed, expected), at
    # Without a reset all of it changes: the test sees what it looks for.
    reset.zero_()
    before, other = outputs(x), x.clone()
    other[1, 9] += 1
    assert (outputs(other) != before).any(-1)[1].all()


@pytest.mark.parametrize("candidate", ["positive", "linear", "tanh"])
@pytest.mark.parametrize("learned", [False, True])
def test_no_state_means_the_zero_or_the_learned_one(candidate, learned):
    rnn = make(candidate=candidate, learn_initial_state=learned, num_layers=2)
    x, _ = make_input(rnn)
    zero = torch.full((2, 1, 1, H), 0.5 if candidate == "positive" else 0.0).double()
    state = rnn.initial_state if learned else zero
    expected = rnn(x, state)
    assert_close(rnn(x), expected, rtol=0, atol=0)
    # A reset before the first step forgets whatever is given.
    reset = torch.zeros(B, S, dtype=torch.bool)
    reset[:, 0] = True
    assert_close(rnn(x, make_state(rnn, "full"), reset), expected, **TIGHT)


# Dropout


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_is_on_every_layers_output_but_the_last(batch_first, scripted):
    rnn = make(num_layers=3, dropout=0.4, batch_first=batch_first, bidirectional=True)
    run = torch.jit.script(rnn) if scripted else rnn
    assert run.training
    singles = []
    for layer in rnn.layers:
        dims = layer.linear.in_features
        single = mingru.MinGRU(dims, H, batch_first=batch_first, bidirectional=True, dtype=torch.double)
        single.layers[0].load_state_dict(layer.state_dict())
        singles.append(single)
    x, reset = make_input(rnn)

    def by_hand(x):
        for single in singles[:-1]:
            x, _ = single(x, reset=reset)
            # As nn.GRU drops: each element kept with probability 0.6, and divided by it.
            x = x * torch.empty_like(x).bernoulli_(0.6) / 0.6
        return singles[-1](x, reset=reset)[0]

    outs = []
    for function in (by_hand, lambda x: run(x, reset=reset)[0], lambda x: run(x, reset=reset)[0]):
        torch.manual_seed(3)
        outs.append(function(x))
    assert_close(outs[1], outs[0], **TIGHT)
    assert_close(outs[2], outs[0], **TIGHT)
    assert not torch.equal(run(x, reset=reset)[0], outs[1]), "another seed gave the same mask"


def test_dropout_in_eval_is_none():
    rnn = make(num_layers=2, dropout=0.5).eval()
    x, _ = make_input(rnn)
    plain = make(num_layers=2)
    plain.load_state_dict(rnn.state_dict())
    assert torch.equal(rnn(x)[0], plain(x)[0])
    assert torch.equal(torch.jit.script(rnn)(x)[0], torch.jit.script(plain)(x)[0])
    assert not torch.equal(rnn.train()(x)[0], plain(x)[0])


def test_dropout_of_everything_gives_the_next_layer_zeros():
    rnn = make(num_layers=2, dropout=1.0)
    seen = []
    rnn.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, _ = make_input(rnn)
    out, h = rnn(x)
    assert not seen[0].any()
    # The last layer's own output is whole, and so is the first layer's state.
    assert out.all()
    assert h.all()
    out, _ = rnn.eval()(x)
    assert seen[1].all()


def test_dropout_without_a_layer_to_drop_warns():
    with pytest.warns(UserWarning, match=r"^MinGRU: dropout=0\.5 has no effect on one layer") as seen:
        rnn = mingru.MinGRU(IN, H, dropout=0.5)
    assert [warning.filename for warning in seen] == [__file__]
    x = torch.randn(B, S, IN)
    assert torch.equal(rnn(x)[0], rnn.eval()(x)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mingru.MinGRU(IN, H, 2, dropout=0.5)


# Scripting


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS[0],
        OPTIONS[-1],
        *(pytest.param(options, marks=pytest.mark.slow) for options in OPTIONS[1:-1:3]),
        *(pytest.param(options, marks=pytest.mark.exhaustive) for options in [*OPTIONS[2:-1:3], *OPTIONS[3:-1:3]]),
    ],
    ids=named,
)
def test_scripted_equals_eager(options):
    rnn = make(torch.float32, **options)
    scripted = torch.jit.script(rnn)
    x, reset = make_input(rnn, torch.float32)
    h = make_state(rnn, "full", torch.float32)
    # Each twice and more: TorchScript runs other code once it has seen the shapes.
    for h_case, reset_case in [(None, None), (h, reset), (h, None), (None, reset), (h[:1, :1], reset)]:
        got = graded(scripted, scripted, x, h_case, reset_case)
        assert_same(got, graded(rnn, rnn, x, h_case, reset_case))
    for steps in (1, 15, 16, 50):
        x, reset = in_order(rnn, torch.randn(2, steps, rnn.input_dims)), in_order(rnn, torch.rand(2, steps) < 0.2)
        with torch.no_grad():
            assert_close(scripted.eval()(x, h[:, :2], reset), rnn.eval()(x, h[:, :2], reset))


def test_scripted_in_float64_is_exact():
    rnn = make(num_layers=2, bidirectional=True, residual=True, norm="layer", learn_initial_state=True)
    scripted = torch.jit.script(rnn)
    x, reset = make_input(rnn)
    expected = graded(lambda *args: reference.layers(rnn, *args), rnn, x, None, reset)
    for _ in range(3):
        assert_same(graded(scripted, scripted, x, None, reset), expected, **TIGHT)


def test_scripted_gradient_at_the_kink_of_g():
    """Padding of zeros without a bias is at the kink, where TorchScript's derivatives may differ from torch's own."""
    rnn = make(bias=False)
    scripted = torch.jit.script(rnn)
    x = torch.zeros(B, S, IN).double()
    expected = graded(lambda *args: reference.layers(rnn, *args), rnn, x, None, None)
    for _ in range(3):
        assert_same(graded(scripted, scripted, x, None, None), expected, **TIGHT)


def test_scripted_refuses_a_wrong_x():
    for batch_first, letters in ((True, "(B, S, 4)"), (False, "(S, B, 4)")):
        scripted = torch.jit.script(mingru.MinGRU(IN, H, batch_first=batch_first))
        with pytest.raises(torch.jit.Error) as caught:
            scripted(torch.zeros(10, 128, 7))
        assert f"MinGRU: x must be {letters}" in str(caught.value)
        assert "[10, 128, 7]" in str(caught.value)


WITHOUT_MINGRU = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mingru":
            raise ModuleNotFoundError("mingru is not here")

sys.meta_path.insert(0, Blocker())
try:
    import mingru
except ModuleNotFoundError:
    print("no mingru")
import torch

for path in sys.argv[1:]:
    case = torch.load(path + ".in")
    rnn = torch.jit.load(path)
    torch.save([rnn(x, h, reset) for x, h, reset in case for _ in range(2)], path + ".out")
assert "mingru" not in sys.modules
"""


@pytest.mark.parametrize(
    "some",
    [
        pytest.param(OPTIONS[::3], marks=pytest.mark.slow),
        pytest.param([*OPTIONS[1::3], *OPTIONS[2::3]], marks=pytest.mark.exhaustive),
    ],
    ids=["a third", "the others"],
)
def test_saved_modules_run_without_the_package(some, tmp_path):
    expected = {}
    for index, options in enumerate(some):
        rnn = make(torch.float32, **options)
        path = str(tmp_path / f"{index}.pt")
        torch.jit.save(torch.jit.script(rnn), path)
        x, reset = make_input(rnn, torch.float32)
        h = make_state(rnn, "full", torch.float32)
        calls = [(x, None, None), (x, h, reset), (x, h[:, :1], None)]
        torch.save(calls, path + ".in")
        expected[path] = [rnn(*call) for call in calls for _ in range(2)]
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_MINGRU, *expected]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["no mingru"]
    for path, results in expected.items():
        assert_close([list(pair) for pair in torch.load(path + ".out")], [list(pair) for pair in results])


# Nothing in, nothing out


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=named)
@pytest.mark.parametrize(("batch", "steps"), [(0, 5), (3, 0), (0, 0)])
def test_empty(batch, steps, options, scripted):
    rnn = make(torch.float32, **options)
    run = torch.jit.script(rnn) if scripted else rnn
    x = in_order(rnn, torch.randn(batch, steps, IN)).requires_grad_()
    reset = in_order(rnn, torch.ones(batch, steps, dtype=torch.bool))
    count = rnn.num_layers * rnn.num_directions
    h = torch.randn(count, batch, 1, H, requires_grad=True)
    for _ in range(2):
        out, last = run(x, h, reset)
        assert in_order(rnn, out).shape == (batch, steps, H * rnn.num_directions)
        # With no step taken, not even a reset changes the state.
        assert torch.equal(last, h)
        (grad,) = torch.autograd.grad(last.sum() + out.sum(), h)
        assert torch.equal(grad, torch.ones_like(h))
    out, last = run(x)
    initial = torch.full((count, batch, 1, H), 0.5) if rnn.initial_state is None else rnn.initial_state
    assert torch.equal(last, initial.expand(count, batch, 1, H))


# Dtypes


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_goes_in_comes_out_in_each_dtype(dtype, scripted):
    rnn = make(dtype, num_layers=2, bidirectional=True, residual=True, norm="layer", learn_initial_state=True)
    run = torch.jit.script(rnn) if scripted else rnn
    x, reset = make_input(rnn, dtype)
    for h in (None, make_state(rnn, "full", dtype)):
        got = graded(run, run, x, h, reset)
        assert {name: tensor.dtype for name, tensor in got.items()} == dict.fromkeys(got, dtype)
        assert all(tensor.isfinite().all() for tensor in got.values())


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_width_layers_round_once_after_the_linear_map(dtype, scripted):
    rnn = make(dtype)
    run = torch.jit.script(rnn) if scripted else rnn
    x = torch.randn(B, 300, IN, dtype=dtype)
    out, _ = run(x)
    gate, candidate = rnn.layers[0].linear(x).double().chunk(2, -1)
    assert reference.relative_error(out, reference.mingru(gate, candidate)) <= 1.001 * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_keeps_the_state_in_float32(dtype):
    rnn = make(torch.float32, num_layers=2)
    x = torch.randn(B, 300, IN, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out, h = rnn(x)
        pre = [rnn.layers[0].linear(x)]
        pre.append(rnn.layers[1].linear(reference.mingru(*pre[0].double().chunk(2, -1)).bfloat16()))
        pieces, state = [], None
        for piece in x.split([100, 1, 199], 1):
            out_piece, state = rnn(piece, state)
            pieces.append(out_piece)
    assert out.dtype == torch.bfloat16
    assert h.dtype == state.dtype == torch.float32
    truths = [reference.mingru(*of_layer.double().chunk(2, -1)) for of_layer in pre]
    assert reference.relative_error(out, truths[1]) <= 1.001 * torch.finfo(torch.bfloat16).eps / 2
    # Float32 in more than name: nothing was rounded to half width on the way.
    for got, truth in zip(h, truths, strict=True):
        assert reference.relative_error(got, truth[:, -1:]) <= 2e-6
    assert_close(torch.cat(pieces, 1), out)
    assert_close(state, h, rtol=torch.finfo(torch.bfloat16).eps, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert rnn(x, h.bfloat16())[1].dtype == torch.float32


def test_autocast_trains():
    rnn = make(torch.float32)
    x, target = torch.randn(B, 50, IN), torch.rand(B, 50, H)
    parameters = list(rnn.parameters())

    def grads(function, dtype=None):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
            out = function(x if dtype is None else x.to(dtype))
        return torch.autograd.grad((out.to(dtype or torch.float32) - target).square().mean(), parameters)

    def plain(x):
        gate, candidate = rnn.layers[0].linear(x).float().chunk(2, -1)
        return reference.mingru(gate, candidate).bfloat16()

    got = grads(lambda x: rnn(x)[0])
    truth = grads(lambda x: reference.layers(rnn, x)[0], torch.double)
    for one, by_plain_torch, exact in zip(got, grads(plain), truth, strict=True):
        assert one.dtype == torch.float32
        assert 0 < (one - exact).norm() <= 2 * (by_plain_torch - exact).norm()

    optimizer = torch.optim.SGD(parameters, lr=0.5)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = (rnn(x)[0].float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_scripted_under_autocast():
    rnn = make(torch.float32, num_layers=2)
    x = torch.randn(B, S, IN)
    with torch.autocast("cpu", torch.bfloat16):
        expected = rnn(x)
        for _ in range(3):
            out, h = torch.jit.script(rnn)(x)
            assert (out.dtype, h.dtype) == (torch.bfloat16, torch.float32)
            assert_close(out, expected[0])
            assert_close(h, expected[1], rtol=torch.finfo(torch.bfloat16).eps, atol=0)


# Memory


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=named)
def test_strided_and_expanded_input(options):
    rnn = make(**options)
    x = torch.randn(2 * B, 2 * S, 2 * IN).double()
    strided = in_order(rnn, x[::2, ::2, ::2])
    swapped = in_order(rnn, x[:B, :S, :IN].transpose(0, 1).contiguous().transpose(0, 1))
    flipped = in_order(rnn, x[:B, :S, :IN].transpose(0, 2).contiguous().transpose(0, 2))
    expanded = in_order(rnn, x[:1, :1, :IN].expand(B, S, IN))
    reset = in_order(rnn, (torch.rand(1, 2 * S) < 0.2)[:, ::2].expand(B, S))
    h = torch.randn(H).double()
    for one in (strided, swapped, flipped, expanded):
        before = one.clone()
        got = graded(rnn, rnn, one, h, reset)
        expected = graded(rnn, rnn, one.contiguous(), h.expand(1, 1, H).contiguous(), reset.contiguous())
        expected["h"] = expected["h"].flatten()
        assert_same(got, expected, **TIGHT)
        assert_close(rnn(one, h, reset), rnn(one.contiguous(), h, reset), **TIGHT)
        assert torch.equal(one, before), "the input was written to"


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "residual": True, "norm": "rms"}, {"bidirectional": True}])
@pytest.mark.parametrize("steps", [5, 64])
@pytest.mark.parametrize("body", FAST)
def test_time_first_is_not_copied_to_batch_first(body, steps, options, with_reset):
    rnn = make(torch.float32, batch_first=False, **options)
    with mingru.use_backend(body):
        out, _ = rnn(torch.randn(steps, B, IN), reset=torch.rand(steps, B) < 0.2 if with_reset else None)
    assert out.shape == (steps, B, H * rnn.num_directions)
    assert out.is_contiguous()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("recompute", [None, False, True])
@pytest.mark.parametrize("hidden", [32, 64])
@pytest.mark.parametrize("body", FAST)
def test_what_is_kept_for_the_backward_pass(body, hidden, recompute, num_layers, batch_first):
    batch, steps = 4, 256
    rnn = mingru.MinGRU(hidden, hidden, num_layers, batch_first=batch_first, recompute=recompute)
    x = torch.randn(batch, steps, hidden)
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *rnn.parameters())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor  # which keeps the storage alive, so that no address comes twice

    with mingru.use_backend(body), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, _ = rnn(x if batch_first else x.view(steps, batch, hidden))
    # Per layer the states and, unless they are quicker computed again, the two pre-activations.
    values = 1 if body == "native" and (hidden < 64 if recompute is None else recompute) else 3
    assert out.requires_grad
    assert values <= sum(kept.values()) / (num_layers * batch * steps * hidden) <= values + 0.1


def test_threads_give_the_same_numbers():
    rnn = mingru.MinGRU(IN, 16, bidirectional=True, dtype=torch.double)
    x = torch.randn(32, 128, IN).double()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(graded(rnn, rnn, x, None, None))
    finally:
        torch.set_num_threads(before)
    assert_same(*results, **TIGHT)


# A module among modules


def test_parameter_names_and_shapes():
    def shapes(**options):
        return {name: tuple(weight.shape) for name, weight in mingru.MinGRU(3, 8, **options).named_parameters()}

    first = {"layers.0.linear.weight": (16, 3), "layers.0.linear.bias": (16,)}
    assert shapes() == first
    assert shapes(bias=False) == {"layers.0.linear.weight": (16, 3)}
    assert shapes(num_layers=2) == {**first, "layers.1.linear.weight": (16, 8), "layers.1.linear.bias": (16,)}
    back = {"layers.0.linear_reverse.weight": (16, 3), "layers.0.linear_reverse.bias": (16,)}
    assert shapes(bidirectional=True) == {**first, **back}
    assert shapes(num_layers=2, bidirectional=True)["layers.1.linear_reverse.weight"] == (16, 16)
    assert shapes(num_layers=2, residual=True).keys() - shapes(num_layers=2).keys() == {"layers.0.align.weight"}
    assert shapes(residual=True)["layers.0.align.weight"] == (8, 3)
    assert shapes(residual=True, bidirectional=True)["layers.0.align.weight"] == (16, 3)
    assert shapes(norm="rms") == {**first, "layers.0.norm.weight": (3,)}
    assert shapes(norm="layer") == {**first, "layers.0.norm.weight": (3,), "layers.0.norm.bias": (3,)}
    assert shapes(learn_initial_state=True) == {**first, "initial_state": (1, 1, 1, 8)}
    learned = {"learn_initial_state": True, "num_layers": 3, "bidirectional": True}
    assert shapes(**learned)["initial_state"] == (6, 1, 1, 8)
    # No candidate, dropout or order of time makes a parameter, and there are no buffers.
    assert shapes(candidate="tanh", dropout=0.1, num_layers=2, batch_first=False) == shapes(num_layers=2)
    rnn = mingru.MinGRU(3, 8, 2, bidirectional=True, learn_initial_state=True)
    assert list(rnn.state_dict()) == [name for name, _ in rnn.named_parameters()]


def test_number_of_parameters():
    rnn = mingru.MinGRU(3, 64, num_layers=2, residual=True)
    # 128 * 3 + 128, the residual's 64 * 3, 128 * 64 + 128
    assert sum(weight.numel() for weight in rnn.parameters()) == 512 + 192 + 8320


def test_gate_rows_come_first():
    rnn = mingru.MinGRU(1, 1)
    with torch.no_grad():
        rnn.layers[0].linear.weight.copy_(torch.tensor([[0.0], [1.0]]))
        rnn.layers[0].linear.bias.copy_(torch.tensor([-100.0, 0.0]))
    # A gate of 0 keeps the state, whatever the candidate.
    out, _ = rnn(torch.tensor([[[3.0]]]), torch.tensor([7.0]))
    assert out.item() == 7.0
    with torch.no_grad():
        rnn.layers[0].linear.bias[0] = 100.0
    # A gate of 1 takes g(3).
    assert rnn(torch.tensor([[[3.0]]]), torch.tensor([7.0]))[0].item() == 3.5


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_copies_and_state_dicts(options):
    rnn = make(**options).eval()
    x, reset = make_input(rnn)
    expected = rnn(x, reset=reset)
    saved = io.BytesIO()
    torch.save(rnn.state_dict(), saved)
    saved.seek(0)
    other = make(**options)
    assert not torch.equal(other(x, reset=reset)[0], expected[0])
    other.load_state_dict(torch.load(saved), strict=True)
    for twin in (other, copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert_close(twin(x, reset=reset), expected, rtol=0, atol=0)
        assert not {weight.data_ptr() for weight in twin.parameters()} & {
            weight.data_ptr() for weight in rnn.parameters()
        }
        assert repr(twin) == repr(rnn)
    scripted = torch.jit.script(rnn)
    assert scripted.state_dict().keys() == rnn.state_dict().keys()
    with pytest.raises(RuntimeError, match="size mismatch"):
        build(H + 1, **options).load_state_dict(rnn.state_dict(), strict=True)


def test_to_another_dtype():
    rnn = make(torch.float32, num_layers=2, norm="rms", residual=True, learn_initial_state=True)
    x = torch.randn(B, S, IN)
    wide = copy.deepcopy(rnn).to(torch.double)
    assert {weight.dtype for weight in wide.parameters()} == {torch.double}
    out, h = wide(x.double())
    assert out.dtype == h.dtype == torch.double
    assert_close(out.float(), rnn(x)[0])
    assert_close(wide.float()(x), rnn(x), rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_meta_device(options):
    rnn = build(**options, device="meta")
    with torch.device("meta"):
        other = build(**options)
        x = in_order(rnn, torch.zeros(B, S, rnn.input_dims))
        reset = in_order(rnn, torch.zeros(B, S, dtype=torch.bool))
        h = torch.zeros(1, 1, H)
    for one in (rnn, other):
        assert all(weight.is_meta for weight in one.parameters())
        for args in ((x,), (x, h), (x, h, reset)):
            out, last = one(*args)
            assert out.is_meta
            assert in_order(rnn, out).shape == (B, S, H * rnn.num_directions)
            assert last.shape == (rnn.num_layers * rnn.num_directions, B, 1, H)
    real = rnn.to_empty(device="cpu")
    torch.manual_seed(5)
    real.reset_parameters()
    torch.manual_seed(5)
    fresh = build(**options)
    assert_close(dict(real.named_parameters()), dict(fresh.named_parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_reset_parameters_draws_as_the_constructor_did(options):
    torch.manual_seed(5)
    rnn = build(**options)
    drawn = copy.deepcopy(rnn.state_dict())
    rnn.reset_parameters()
    assert any(not torch.equal(weight, drawn[name]) for name, weight in rnn.named_parameters())
    with torch.no_grad():
        for weight in rnn.parameters():
            weight.fill_(9.0)
    torch.manual_seed(5)
    rnn.reset_parameters()
    assert_close(dict(rnn.state_dict()), dict(drawn), rtol=0, atol=0)
    if rnn.initial_state is not None:
        assert (rnn.initial_state == 0.5).all()


def test_repr_says_what_is_not_default():
    assert mingru.MinGRU(3, 8).extra_repr() == "3, 8"
    options = {
        "num_layers": 2,
        "bias": False,
        "batch_first": False,
        "dropout": 0.25,
        "bidirectional": True,
        "residual": True,
        "norm": "rms",
        "candidate": "tanh",
        "learn_initial_state": True,
    }
    rnn = mingru.MinGRU(3, 8, **options)
    assert rnn.extra_repr() == "3, 8, " + ", ".join(f"{name}={value!r}" for name, value in options.items())
    assert repr(rnn).startswith("MinGRU(\n  3, 8, num_layers=2, ")
    again = eval(f"mingru.MinGRU({rnn.extra_repr()})")
    assert repr(again) == repr(rnn)


# What is refused

X = torch.zeros(2, 5, 3)
NO = torch.zeros(2, 5, dtype=torch.bool)

BAD_CALLS = {
    "x without batch": ({"x": X[0]}, ValueError, r"x must be \(B, S, 3\) because input_dims is 3, got \(5, 3\)"),
    "x of four dimensions": (
        {"x": X[None]},
        ValueError,
        r"x must be \(B, S, 3\) because input_dims is 3, got \(1, 2, 5, 3\)",
    ),
    "x of other features": (
        {"x": torch.zeros(10, 128, 4)},
        ValueError,
        r"x must be \(B, S, 3\) because input_dims is 3, got \(10, 128, 4\)",
    ),
    "x is no tensor": ({"x": [[[1.0, 2.0, 3.0]]]}, TypeError, r"x must be a tensor, got list"),
    "x is None": ({"x": None}, TypeError, r"x must be a tensor, got NoneType"),
    "x of float64": ({"x": X.double()}, TypeError, r"x must be torch\.float32 .*, got torch\.float64; use x\.to"),
    "x of integers": ({"x": X.long()}, TypeError, r"x must be torch\.float32 .*, got torch\.int64"),
    "x of complex": ({"x": X.cfloat()}, TypeError, r"x must be torch\.float32 .*, got torch\.complex64"),
    "x on another device": (
        {"x": X.to("meta")},
        ValueError,
        r"x must be on cpu .*, got a tensor on meta; use x\.to\('cpu'\)",
    ),
    "h is no tensor": ({"h": 0.5}, TypeError, r"h must be a tensor, got float"),
    "h is a list of states": ({"h": [X]}, TypeError, r"h must be a tensor, got list"),
    "h of other batch": (
        {"h": torch.zeros(3, 1, 8)},
        ValueError,
        r"h must be expandable to \(L \* D, B, 1, H\) = \(2, 2, 1, 8\), got \(3, 1, 8\)",
    ),
    "h of other layers": ({"h": torch.zeros(3, 2, 1, 8)}, ValueError, r"h must be expandable .*got \(3, 2, 1, 8\)"),
    "h of other features": ({"h": torch.zeros(2, 2, 1, 7)}, ValueError, r"h must be expandable .*got \(2, 2, 1, 7\)"),
    "h of too many steps": ({"h": torch.zeros(2, 2, 5, 8)}, ValueError, r"h must be expandable .*got \(2, 2, 5, 8\)"),
    "h of five dimensions": ({"h": torch.zeros(1, 2, 2, 1, 8)}, ValueError, r"h must be expandable"),
    "h of float64": (
        {"h": torch.zeros(1, 1, 8).double()},
        TypeError,
        r"h must be torch\.float32 like x, got torch\.float64",
    ),
    "h of integers": (
        {"h": torch.zeros(1, 1, 8).long()},
        TypeError,
        r"h must be torch\.float32 like x, got torch\.int64",
    ),
    "h on another device": (
        {"h": torch.zeros(1, 1, 8, device="meta")},
        ValueError,
        r"h must be on cpu like x, .*meta",
    ),
    "reset is no tensor": ({"reset": [[True]]}, TypeError, r"reset must be a bool tensor, got list"),
    "reset of other length": ({"reset": NO[:, :4]}, ValueError, r"reset must be \(B, S\) = \(2, 5\), got \(2, 4\)"),
    "reset in the wrong order": ({"reset": NO.T}, ValueError, r"reset must be \(B, S\) = \(2, 5\), got \(5, 2\)"),
    "reset of one row": ({"reset": NO[:1]}, ValueError, r"reset must be \(B, S\) = \(2, 5\), got \(1, 5\)"),
    "reset with features": (
        {"reset": NO[..., None]},
        ValueError,
        r"reset must be \(B, S\) = \(2, 5\), got \(2, 5, 1\)",
    ),
    "reset of numbers": ({"reset": NO.float()}, TypeError, r"reset must be of dtype torch\.bool, got torch\.float32"),
    "reset on another device": ({"reset": NO.to("meta")}, ValueError, r"reset must be on cpu .*, got a tensor on meta"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case):
    args, error, message = BAD_CALLS[case]
    rnn = mingru.MinGRU(3, 8, num_layers=2)
    x = torch.randn(2, 5, 3)
    expected = rnn(x)
    args = {
        name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in {"x": x, **args}.items()
    }
    before = copy.deepcopy(args)
    with pytest.raises(error, match="^MinGRU: " + message):
        rnn(**args)
    for name, value in args.items():
        if isinstance(value, torch.Tensor) and not value.is_meta:
            assert torch.equal(value, before[name]), name
    assert_close(rnn(x), expected, rtol=0, atol=0)


def test_bad_calls_in_the_order_of_time():
    rnn = mingru.MinGRU(3, 8, batch_first=False)
    with pytest.raises(ValueError, match=r"^MinGRU: x must be \(S, B, 3\) because input_dims is 3, got \(5, 3\)"):
        rnn(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"^MinGRU: reset must be \(S, B\) = \(5, 2\), got \(2, 5\)"):
        rnn(torch.zeros(5, 2, 3), reset=NO)
    with pytest.raises(ValueError, match=r"^MinGRU: h must be expandable to .* = \(1, 2, 1, 8\), got \(5, 1, 8\)"):
        rnn(torch.zeros(5, 2, 3), torch.zeros(5, 1, 8))


BAD_OPTIONS = {
    "input_dims of 0": ({"input_dims": 0}, ValueError, r"input_dims must be at least 1, got 0"),
    "hidden_dims below 0": ({"hidden_dims": -1}, ValueError, r"hidden_dims must be at least 1, got -1"),
    "no layers": ({"num_layers": 0}, ValueError, r"num_layers must be at least 1, got 0"),
    "input_dims of 3.0": ({"input_dims": 3.0}, TypeError, r"input_dims must be an int, got 3\.0"),
    "hidden_dims None": ({"hidden_dims": None}, TypeError, r"hidden_dims must be an int, got None"),
    "hidden_dims listed": ({"hidden_dims": [8, 8]}, TypeError, r"hidden_dims must be an int, got \[8, 8\]"),
    "num_layers a string": ({"num_layers": "2"}, TypeError, r"num_layers must be an int, got '2'"),
    "num_layers True": ({"num_layers": True}, TypeError, r"num_layers must be an int, got True"),
    "unknown residual": (
        {"residual": "gated"},
        TypeError,
        r"residual must be a bool or 'highway', got 'gated'$",
    ),
    "highway of other sizes": (
        {"residual": "highway"},
        ValueError,
        r"hidden_dims must be 3 like input_dims because residual is 'highway', got 8; change the size of x by a torch",
    ),
    "highway in both directions": (
        {"residual": "highway", "hidden_dims": 3, "bidirectional": True},
        ValueError,
        r"bidirectional must be False because residual is 'highway', got True; use a layer for each direction",
    ),
    "dropout above 1": ({"dropout": 1.5}, ValueError, r"dropout must be a number from 0 to 1, got 1\.5"),
    "dropout below 0": ({"dropout": -0.1}, ValueError, r"dropout must be a number from 0 to 1, got -0\.1"),
    "dropout NaN": ({"dropout": float("nan")}, ValueError, r"dropout must be a number from 0 to 1, got nan"),
    "dropout a string": ({"dropout": "0.5"}, TypeError, r"dropout must be a number from 0 to 1, got '0\.5'"),
    "dropout True": ({"dropout": True}, TypeError, r"dropout must be a number from 0 to 1, got True"),
    "unknown norm": ({"norm": "batch"}, ValueError, r"norm must be one of None, 'layer', 'rms', got 'batch'"),
    "norm True": ({"norm": True}, ValueError, r"norm must be one of None, 'layer', 'rms', got True"),
    "unknown candidate": (
        {"candidate": "relu"},
        ValueError,
        r"candidate must be one of \('positive', .*\), got 'relu'",
    ),
    "candidate None": ({"candidate": None}, ValueError, r"candidate must be one of \('positive', .*\), got None"),
    "integer dtype": ({"dtype": torch.int64}, TypeError, r"dtype must be a floating-point dtype, got torch\.int64"),
    "complex dtype": (
        {"dtype": torch.cfloat},
        TypeError,
        r"dtype must be a floating-point dtype, got torch\.complex64",
    ),
    "dtype a string": ({"dtype": "float32"}, TypeError, r"dtype must be a floating-point dtype, got 'float32'"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case):
    options, error, message = BAD_OPTIONS[case]
    with pytest.raises(error, match="^MinGRU: " + message):
        mingru.MinGRU(**{"input_dims": 3, "hidden_dims": 8, "num_layers": 2, **options})


def test_dropout_may_be_an_integer_and_sits_at_the_bounds():
    for dropout in (0, 1, 0.0, 1.0):
        assert mingru.MinGRU(3, 8, 2, dropout=dropout).dropout == dropout


@pytest.mark.parametrize("backend", [name for name, can_run in mingru.backends().items() if can_run is True])
def test_gradients_when_one_input_is_made_from_another(backend):
    """With `create_graph`, each path is counted once."""
    rnn = mingru.MinGRU(3, 4).double()
    encoder = torch.nn.Linear(3, 4).double()
    x = torch.randn(2, 7, 3, dtype=torch.double, requires_grad=True)
    with mingru.use_backend(backend):
        loss = rnn(x, encoder(x.mean(1))[None, :, None])[0].square().sum()
        (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
        (graphed,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(graphed.square().sum(), x)
    torch.testing.assert_close(graphed, plain)
    with mingru.use_backend("sequential"):
        loss = rnn(x, encoder(x.mean(1))[None, :, None])[0].square().sum()
        (graphed,) = torch.autograd.grad(loss, x, create_graph=True)
        (truth,) = torch.autograd.grad(graphed.square().sum(), x)
    torch.testing.assert_close(second, truth)


def test_a_saved_tensor_hook_may_lay_tensors_out_anew():
    rnn = mingru.MinGRU(64, H, batch_first=False)
    x = torch.randn(S, B, 64)

    def grads(pack):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out, _ = rnn(x)
        return torch.autograd.grad(out.square().sum(), list(rnn.parameters()))

    assert_close(grads(lambda tensor: tensor.contiguous()), grads(lambda tensor: tensor))


def test_weights_that_do_not_lie_dense():
    rnn, twin = make(torch.float32), make(torch.float32)
    twin.load_state_dict(rnn.state_dict())
    linear = twin.layers[0].linear
    linear.weight = torch.nn.Parameter(linear.weight.detach().t().contiguous().t())
    linear.bias = torch.nn.Parameter(torch.stack([linear.bias.detach()] * 2, 1)[:, 0])
    assert not linear.weight.is_contiguous()
    assert not linear.bias.is_contiguous()
    x, reset = make_input(rnn, torch.float32)
    for got, expected in zip(
        graded(twin, twin, x, None, reset).values(), graded(rnn, rnn, x, None, reset).values(), strict=True
    ):
        assert_close(got, expected)


def test_a_parametrised_weight_is_computed_once():
    rnn = make(torch.float32)
    count = []

    class Counted(torch.nn.Module):
        def forward(self, weight):
            count.append(1)
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(rnn.layers[0].linear, "weight", Counted())
    count.clear()
    rnn(torch.randn(B, S, IN))
    assert len(count) == 1
