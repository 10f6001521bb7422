"""MinGRU and MinLSTM: against the float64 reference, scripted, in reduced precision, in memory, and wrong calls.

`test_layers.py` tests what also holds for convolutional layers.
"""

import copy
import functools
import math

import pytest
import reference
import torch
from cover import cover, named
from refusals import WRONG_LAYER_OPTIONS, assert_refused, wrong_resets, wrong_tensors, wrong_values
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

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
HIGHWAY, ALL = OPTIONS[-2:]

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
    "residual": [False, True, "highway"],
    "norm": [None, "layer", "rms"],
    "candidate": ["positive", "linear", "tanh"],
    "learn_initial_state": [False, True],
    "recompute": [None, False, True],
    "h": [None, "full", "zero", "negative", "batch", "one", "layer"],
    "reset": [False, True],
}


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


def make_states(rnn, x):
    """A state for each layer and direction, as `rnn` takes it with x."""
    count, batch = rnn.num_layers * rnn.num_directions, x.shape[0 if rnn.batch_first else 1]
    return torch.randn(count, batch, 1, rnn.hidden_dims, dtype=x.dtype, device=x.device)


def make_input(rnn, dtype=torch.double, batch=B, steps=S):
    """x and reset in the module's own order."""
    x, reset = torch.randn(batch, steps, rnn.input_dims, dtype=dtype), torch.rand(batch, steps) < 0.2
    reset[:1, :1] = reset[1:2, -1:] = True
    return in_order(rnn, x), in_order(rnn, reset)


# What `test_layers.py` needs: a class and its sizes, a layer of another size, and the input features of a layer.
KIND_AND_SIZES = (mingru.MinGRU, (IN, H))


def wider(**options):
    return build(H + 1, **options)


def input_dims_of(layer):
    return layer.linear.in_features


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


def true_of(rnn):
    """`reference.layers` in the module's own order."""

    def function(x, h=None, reset=None):
        out, last = reference.layers(rnn, in_order(rnn, x), h, None if reset is None else in_order(rnn, reset))
        return in_order(rnn, out), last

    return function


TIGHT = {"rtol": 1e-9, "atol": 1e-9}
# The backends whose use of memory is promised.
FAST = [name for name in ("native", "torch") if mingru.backends().get(name) is True]


# The reference


def is_allowed(case):
    return not (case["residual"] == "highway" and case["bidirectional"])


@pytest.mark.parametrize("case", cover(FACTORS, is_allowed), ids=named)
def test_equals_the_reference(case):
    options = {name: value for name, value in case.items() if name not in ("h", "reset")}
    rnn = make(**options)
    x, reset = make_input(rnn)
    h = None if case["h"] is None else make_state(rnn, case["h"])
    reset = reset if case["reset"] else None

    got = graded(rnn, rnn, x, h, reset)
    assert got["out"].dtype == got["last"].dtype == torch.double
    assert got["last"].shape == (rnn.num_layers * rnn.num_directions, B, 1, H)
    assert_same(got, graded(true_of(rnn), rnn, x, h, reset), **TIGHT)


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


# What the states and outputs mean


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


# Scripting

# What HIGHWAY and ALL do not have.
SCRIPTED_SLOWLY = [
    {"cell": "minlstm", "candidate": "tanh", "norm": "layer", "recompute": True},
    {"cell": "minlstm_unnormalized", "candidate": "linear", "num_layers": 2, "bias": False},
]


@pytest.mark.parametrize(
    "options",
    [{}, HIGHWAY, ALL, *(pytest.param(options, marks=pytest.mark.slow) for options in SCRIPTED_SLOWLY)],
    ids=named,
)
def test_scripted_equals_eager(options):
    rnn = make(torch.float32, **options)
    scripted = torch.jit.script(rnn)
    assert scripted.state_dict().keys() == rnn.state_dict().keys()
    x, reset = make_input(rnn, torch.float32)
    h = make_state(rnn, "full", torch.float32)
    # Each twice and more: TorchScript runs other code once it has seen the shapes.
    for h_case, reset_case in [(None, None), (h, reset), (h[:1, :1], reset)]:
        got = graded(scripted, scripted, x, h_case, reset_case)
        assert_same(got, graded(rnn, rnn, x, h_case, reset_case))
    for steps in (1, 15, 16, 50):
        x, reset = in_order(rnn, torch.randn(2, steps, rnn.input_dims)), in_order(rnn, torch.rand(2, steps) < 0.2)
        with torch.no_grad():
            assert_close(scripted.eval()(x, h[:, :2], reset), rnn.eval()(x, h[:, :2], reset))


@pytest.mark.slow
def test_scripted_gradient_at_the_kink_of_g():
    """Padding of zeros without a bias is at the kink, where TorchScript's derivatives may differ from torch's own."""
    rnn = make(bias=False)
    scripted = torch.jit.script(rnn)
    x = torch.zeros(B, S, IN).double()
    expected = graded(true_of(rnn), rnn, x, None, None)
    for _ in range(3):
        assert_same(graded(scripted, scripted, x, None, None), expected, **TIGHT)


def test_scripted_refuses_a_wrong_x():
    for batch_first, letters in ((True, "(B, S, 4)"), (False, "(S, B, 4)")):
        scripted = torch.jit.script(mingru.MinGRU(IN, H, batch_first=batch_first))
        with pytest.raises(torch.jit.Error) as caught:
            scripted(torch.zeros(10, 128, 7))
        assert f"MinGRU: x must be {letters}" in str(caught.value)
        assert "[10, 128, 7]" in str(caught.value)


# Dtypes


@pytest.mark.parametrize("scripted", [False, pytest.param(True, marks=pytest.mark.slow)])
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


def test_autocast_casts_weights_once_for_all_steps():
    rnn, x = mingru.MinGRU(32, 64), torch.randn(2, 5, 32)
    weights = {p.shape for p in rnn.parameters()}
    casts = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].shape in weights:
                casts.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    h, grads = None, []
    with torch.autocast("cpu", torch.bfloat16):
        with Casts():
            with torch.no_grad():
                rnn(x[:, :1])
            for t in range(5):
                _, h = rnn(x[:, t : t + 1], h)
        assert len(casts) == len(weights)
        for last in (h, rnn(x)[1]):
            grads.append(torch.autograd.grad(last.square().sum(), rnn.parameters()))
    for one, other in zip(*grads, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


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


@pytest.mark.slow
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


@pytest.mark.parametrize("options", [{}, ALL], ids=named)
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
@pytest.mark.parametrize("backend", FAST)
def test_time_first_is_not_copied_to_batch_first(backend, steps, options, with_reset):
    rnn = make(torch.float32, batch_first=False, **options)
    with mingru.use_backend(backend):
        out, _ = rnn(torch.randn(steps, B, IN), reset=torch.rand(steps, B) < 0.2 if with_reset else None)
    assert out.shape == (steps, B, H * rnn.num_directions)
    assert out.is_contiguous()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("recompute", [None, False, True])
@pytest.mark.parametrize("hidden", [32, 64])
@pytest.mark.parametrize("backend", FAST)
def test_what_is_kept_for_the_backward_pass(backend, hidden, recompute, num_layers, batch_first):
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

    with mingru.use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, _ = rnn(x if batch_first else x.view(steps, batch, hidden))
    # Per layer the states and, unless they are quicker computed again, the two pre-activations.
    values = 1 if backend == "native" and (hidden < 64 if recompute is None else recompute) else 3
    assert out.requires_grad
    assert values <= sum(kept.values()) / (num_layers * batch * steps * hidden) <= values + 0.1


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


def test_to_another_dtype():
    rnn = make(torch.float32, num_layers=2, norm="rms", residual=True, learn_initial_state=True)
    x = torch.randn(B, S, IN)
    wide = copy.deepcopy(rnn).to(torch.double)
    assert {weight.dtype for weight in wide.parameters()} == {torch.double}
    out, h = wide(x.double())
    assert out.dtype == h.dtype == torch.double
    assert_close(out.float(), rnn(x)[0])
    assert_close(wide.float()(x), rnn(x), rtol=0, atol=0)


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
    **wrong_tensors("x", X, "the layer's weight"),
    **wrong_tensors("h", torch.zeros(1, 1, 8), "x"),
    **wrong_resets("(B, S)", 2, 5),
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
    "x is None": ({"x": None}, TypeError, r"x must be a tensor, got NoneType"),
    "x of integers": ({"x": X.long()}, TypeError, r"x must be torch\.float32 .*, got torch\.int64"),
    "x of complex": ({"x": X.cfloat()}, TypeError, r"x must be torch\.float32 .*, got torch\.complex64"),
    "h of other batch": (
        {"h": torch.zeros(3, 1, 8)},
        ValueError,
        r"h must be expandable to \(L \* D, B, 1, H\) = \(2, 2, 1, 8\), got \(3, 1, 8\)",
    ),
    "h of other layers": ({"h": torch.zeros(3, 2, 1, 8)}, ValueError, r"h must be expandable .*got \(3, 2, 1, 8\)"),
    "h of other features": ({"h": torch.zeros(2, 2, 1, 7)}, ValueError, r"h must be expandable .*got \(2, 2, 1, 7\)"),
    "h of too many steps": ({"h": torch.zeros(2, 2, 5, 8)}, ValueError, r"h must be expandable .*got \(2, 2, 5, 8\)"),
    "h of five dimensions": ({"h": torch.zeros(1, 2, 2, 1, 8)}, ValueError, r"h must be expandable"),
    "h of integers": (
        {"h": torch.zeros(1, 1, 8).long()},
        TypeError,
        r"h must be torch\.float32 like x, got torch\.int64",
    ),
}


def test_bad_calls():
    rnn = mingru.MinGRU(3, 8, num_layers=2)
    x = torch.randn(2, 5, 3)
    expected, before = rnn(x), copy.deepcopy(BAD_CALLS)
    assert_refused(lambda **args: rnn(**{"x": x, **args}), BAD_CALLS, "MinGRU: ")
    assert_close(rnn(x), expected, rtol=0, atol=0)
    # No argument was changed.
    for case, (args, _, _) in BAD_CALLS.items():
        for name, value in args.items():
            if isinstance(value, torch.Tensor) and not value.is_meta:
                assert torch.equal(value, before[case][0][name]), (case, name)


def test_bad_calls_in_the_order_of_time():
    rnn = mingru.MinGRU(3, 8, batch_first=False)
    with pytest.raises(ValueError, match=r"^MinGRU: x must be \(S, B, 3\) because input_dims is 3, got \(5, 3\)"):
        rnn(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"^MinGRU: reset must be \(S, B\) = \(5, 2\), got \(2, 5\)"):
        rnn(torch.zeros(5, 2, 3), reset=NO)
    with pytest.raises(ValueError, match=r"^MinGRU: h must be expandable to .* = \(1, 2, 1, 8\), got \(5, 1, 8\)"):
        rnn(torch.zeros(5, 2, 3), torch.zeros(5, 1, 8))


BAD_OPTIONS = {
    **WRONG_LAYER_OPTIONS,
    **wrong_values("hidden_dims", "an int", types=(None, [8, 8])),
    **wrong_values("hidden_dims", "at least 1", values=(-1,)),
    **wrong_values("residual", "a bool or 'highway'", types=("gated",)),
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
}


def test_bad_options():
    sizes = {"input_dims": 3, "hidden_dims": 8, "num_layers": 2}
    assert_refused(lambda **options: mingru.MinGRU(**{**sizes, **options}), BAD_OPTIONS, "MinGRU: ")


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
