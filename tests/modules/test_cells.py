"""The cells: a layer one step at a time, and what they refuse."""

import copy
import functools
import inspect
import io
import pickle

import pytest
import reference
import torch
from refusals import WRONG_OPTIONS, assert_refused, wrong_resets, wrong_tensors, wrong_values
from test_recurrent import TIGHT, assert_same, graded, named
from torch.testing import assert_close

import mingru
from mingru.modules.cells import MinGRUCell, MinLSTMCell

B, S, IN, H = 3, 7, 4, 5

KINDS = {
    "mingru": (MinGRUCell, mingru.MinGRU),
    "minlstm": (MinLSTMCell, mingru.MinLSTM),
    "minlstm_unnormalized": tuple(functools.partial(kind, normalize=False) for kind in (MinLSTMCell, mingru.MinLSTM)),
}

OPTIONS = [
    {},
    {"bias": False},
    {"norm": "layer"},
    {"norm": "rms"},
    {"candidate": "linear"},
    {"candidate": "tanh"},
    {"learn_initial_state": True},
    {"cell": "minlstm"},
    {"cell": "minlstm", "forget_bias": 1.5},
    {"cell": "minlstm_unnormalized", "forget_bias": 1.5},
    {"cell": "minlstm", "bias": False, "norm": "rms", "candidate": "tanh", "learn_initial_state": True},
]
ALL = OPTIONS[-1]
FULL_UNNORMALIZED = {**ALL, "cell": "minlstm_unnormalized"}

options_of = pytest.mark.parametrize("options", OPTIONS, ids=named)
scripted_or_not = pytest.mark.parametrize("scripted", [False, True])
# TorchScript takes long to compile.
scripted_slowly_or_not = pytest.mark.parametrize("scripted", [False, pytest.param(True, marks=pytest.mark.slow)])
options_scripted_or_not = pytest.mark.parametrize(
    ("options", "scripted"),
    [*((options, False) for options in OPTIONS), *((options, True) for options in ({}, FULL_UNNORMALIZED, ALL))],
    ids=lambda value: named(value) if isinstance(value, dict) else "scripted" if value else "",
)


def pair(*, cell="mingru", dtype=torch.double, **options):
    """A cell, and the layer with the same weights."""
    kind, kind_of_layer = KINDS[cell]
    cell, layer = (each(IN, H, **options, dtype=dtype) for each in (kind, kind_of_layer))
    with torch.no_grad():
        for name, weight in cell.named_parameters():
            # Away from the values where a forgotten norm weight or a forgotten initial state would not show.
            if "norm" in name or name == "initial_state":
                weight.add_(torch.randn_like(weight) / 4)
    layer.load_state_dict(cell.state_dict(), strict=True)
    return cell, layer


def looped(cell):
    """What a layer's forward does, by the cell: out (B, S, H) and h (1, B, 1, H)."""

    def function(x, h, reset):
        state = None if h is None else h[0, :, 0]
        outs = []
        for t in range(x.shape[1]):
            state = cell(x[:, t], state, None if reset is None else reset[:, t])
            outs.append(state)
        return torch.stack(outs, 1), state[None, :, None]

    return function


def inputs(dtype=torch.double):
    reset = torch.rand(B, S) < 0.2
    reset[0, 0] = reset[1, -1] = True
    return torch.randn(B, S, IN, dtype=dtype), torch.randn(1, B, 1, H, dtype=dtype), reset


# Against the layer


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("with_h", [False, True])
@options_scripted_or_not
def test_a_loop_equals_the_layer(options, with_h, with_reset, scripted):
    cell, layer = pair(**options)
    x, h, reset = inputs()
    args = (x, h if with_h else None, reset if with_reset else None)
    run = torch.jit.script(cell) if scripted else cell
    expected = graded(layer, layer, *args)
    assert_same(graded(looped(run), run, *args), expected, **TIGHT)
    assert_same(graded(lambda *args: reference.layers(cell, *args), cell, *args), expected, **TIGHT)


def test_the_comparison_with_the_layer_can_fail():
    cell, layer = pair()
    x, h, reset = inputs()
    with torch.no_grad():
        cell.layers[0].linear.bias[0] += 1e-6
    with pytest.raises(AssertionError, match="out"):
        assert_same(graded(looped(cell), cell, x, h, reset), graded(layer, layer, x, h, reset), **TIGHT)


@options_scripted_or_not
def test_one_element_without_a_batch(options, scripted):
    cell, _ = pair(**options)
    run = torch.jit.script(cell) if scripted else cell
    x, h, _ = inputs()
    x, h = x[:, 0], h[0, :, 0]
    for state in (None, h):
        for reset in (None, torch.tensor([True, False, True])):
            batched = cell(x, state, reset)
            assert batched.shape == (B, H)
            for at in range(B):
                alone = run(x[at], *(None if each is None else each[at] for each in (state, reset)))
                assert alone.shape == (H,)
                assert_close(alone, batched[at], **TIGHT)


@options_of
def test_weights_load_into_the_layer_and_back(options):
    cell, layer = pair(**options)
    assert list(cell.state_dict()) == list(layer.state_dict())
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(1.5)
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    cell.load_state_dict(torch.load(saved), strict=True)
    x, h, reset = inputs()
    expected = layer(x, h, reset)[0]
    for twin in (cell, copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert_close(looped(twin)(x, h, reset)[0], expected, **TIGHT)
        assert repr(twin) == repr(cell)


def test_parameters_are_drawn_as_the_layers():
    for name, (kind, kind_of_layer) in KINDS.items():
        options = {"forget_bias": 3.0} if name != "mingru" else {}
        drawn = []
        for each in (kind, kind_of_layer):
            torch.manual_seed(5)
            drawn.append(each(IN, H, **options))
        assert_close(dict(drawn[0].state_dict()), dict(drawn[1].state_dict()), rtol=0, atol=0)
        torch.manual_seed(5)
        drawn[0].reset_parameters()
        assert_close(dict(drawn[0].state_dict()), dict(drawn[1].state_dict()), rtol=0, atol=0)
        if options:
            assert (drawn[0].layers[0].linear.bias[:H] > 2).all()


# States


@scripted_slowly_or_not
@pytest.mark.parametrize("candidate", ["positive", "linear", "tanh"])
@pytest.mark.parametrize("learned", [False, True])
def test_no_state_and_a_reset_mean_the_zero_or_the_learned_state(learned, candidate, scripted):
    cell, _ = pair(candidate=candidate, learn_initial_state=learned)
    run = torch.jit.script(cell) if scripted else cell
    x, h, _ = inputs()
    x, h = x[:, 0], h[0, :, 0]
    zero = torch.full((H,), 0.5 if candidate == "positive" else 0.0).double()
    expected = cell(x, (cell.initial_state.flatten() if learned else zero).expand(B, H))
    assert_close(run(x), expected, **TIGHT)
    reset = torch.tensor([False, True, False])
    got, kept = run(x, h, reset), run(x, h)
    assert_close(got[1], expected[1], **TIGHT)
    assert_close(got[[0, 2]], kept[[0, 2]], **TIGHT)
    assert not torch.equal(kept[1], expected[1])
    # Not even NaN crosses a reset.
    h[1] = float("nan")
    assert_close(run(x, h, reset), got, **TIGHT)


def test_batch_elements_do_not_know_each_other():
    cell, _ = pair(**ALL)
    x, h, _ = inputs()
    x, h = x[:, 0], h[0, :, 0]
    before = cell(x, h)
    x[1] += 1
    h[1] -= 1
    assert (cell(x, h) != before).any(1).tolist() == [False, True, False]


@scripted_or_not
def test_an_empty_batch(scripted):
    for cell in (pair(dtype=torch.float)[0], pair(**ALL, dtype=torch.float)[0]):
        run = torch.jit.script(cell) if scripted else cell
        x = torch.zeros(0, IN, requires_grad=True)
        for _ in range(2):
            for h in (None, torch.zeros(0, H)):
                out = run(x, h, torch.zeros(0, dtype=torch.bool))
                assert out.shape == (0, H)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert grad.shape == (0, IN)


def test_second_derivatives():
    cell, _ = pair()
    x, h = torch.randn(2, IN).double().requires_grad_(), torch.randn(2, H).double().requires_grad_()
    reset = torch.tensor([False, True])
    assert torch.autograd.gradgradcheck(lambda x, h: cell(x, h, reset), (x, h))


def test_vmap_over_models_and_over_the_batch():
    cell, _ = pair()
    x, h, _ = inputs()
    x, h = x[:, 0], h[0, :, 0]
    assert_close(torch.func.vmap(cell)(x, h), cell(x, h), **TIGHT)
    grads = torch.func.vmap(torch.func.grad(lambda x, h: cell(x, h).square().sum()))(x, h)
    leaf = x.clone().requires_grad_()
    assert_close(grads, torch.autograd.grad(cell(leaf, h).square().sum(), leaf)[0], **TIGHT)


# Dtypes


@scripted_slowly_or_not
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_goes_in_comes_out_in_each_dtype(dtype, scripted):
    cell, layer = pair(**ALL, dtype=dtype)
    run = torch.jit.script(cell) if scripted else cell
    x, h, reset = inputs(dtype)
    for state in (None, h):
        got = graded(looped(run), run, x, state, reset)
        assert {name: tensor.dtype for name, tensor in got.items()} == dict.fromkeys(got, dtype)
        eps = torch.finfo(dtype).eps
        assert_close(got["out"][:, :1], layer(x[:, :1], state, reset[:, :1])[0], rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_state_in_float32_stays_there_beside_half_width_input(dtype):
    cell, layer = pair(dtype=dtype)
    x, h, _ = inputs(dtype)
    out = cell(x[:, 0], h[0, :, 0].float())
    assert out.dtype == torch.float32
    assert torch.equal(out, layer(x[:, :1], h.float())[1][0, :, 0])


def test_autocast_keeps_the_state_in_float32():
    cell, layer = pair(dtype=torch.float)
    x, _, _ = inputs(torch.float)
    with torch.autocast("cpu", torch.bfloat16):
        state = None
        for t in range(S):
            pre = cell.layers[0].linear(x[:, t]).double()
            before = torch.full((B, 1, H), 0.5) if state is None else state[:, None]
            truth = reference.mingru(*pre[:, None].chunk(2, -1), before)[:, 0]
            state = cell(x[:, t], state)
            assert pre.abs().max() > 0.1
            assert state.dtype == torch.float32
            # Nothing was rounded to half width but the product.
            assert reference.relative_error(state, truth) <= 2e-6
        assert_close(state, layer(x)[1][0, :, 0], rtol=torch.finfo(torch.bfloat16).eps, atol=0)
        scripted = torch.jit.script(cell)
        for _ in range(3):
            assert scripted(x[:, 0]).dtype == torch.float32


@options_of
def test_meta_device(options):
    options = dict(options)
    cell = KINDS[options.pop("cell", "mingru")][0](IN, H, **options, device="meta")
    assert all(weight.is_meta for weight in cell.parameters())
    x = torch.zeros(B, IN, device="meta")
    for h in (None, torch.zeros(B, H, device="meta")):
        out = cell(x, h, torch.zeros(B, dtype=torch.bool, device="meta"))
        assert out.is_meta
        assert out.shape == (B, H)


# A module among modules


def test_signatures():
    shared = "input_dims, hidden_dims, bias=True, *, {}norm=None, candidate={}learn_initial_state=False, memory=None, "
    shared += "device=None, dtype=None"
    for kind, extra in (
        (MinGRUCell, ("", "None, gate='sigmoid', min_decay=0.0, ")),
        (MinLSTMCell, ("forget_bias=0.0, normalize=True, ", "'positive', ")),
    ):
        found, expected = (
            [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]
            for function in (kind, eval(f"lambda {shared.format(*extra)}: None"))
        )
        assert found == expected
        assert list(inspect.signature(kind.forward).parameters) == ["self", "x", "h", "reset", "dt"]
        for argument in ("residual", "dropout", "num_layers", "bidirectional", "batch_first"):
            with pytest.raises(TypeError, match=argument):
                kind(IN, H, **{argument: 1})


def test_repr_says_what_is_not_default():
    assert MinGRUCell(3, 8).extra_repr() == "3, 8"
    options = {"bias": False, "norm": "rms", "candidate": "tanh", "learn_initial_state": True}
    cell = MinGRUCell(3, 8, **options)
    assert cell.extra_repr() == "3, 8, " + ", ".join(f"{name}={value!r}" for name, value in options.items())
    assert repr(eval(f"MinGRUCell({cell.extra_repr()})")) == repr(cell)
    assert repr(MinLSTMCell(3, 8, forget_bias=1.5)).startswith("MinLSTMCell(\n  3, 8, forget_bias=1.5\n")
    assert repr(MinLSTMCell(3, 8, normalize=False)).startswith("MinLSTMCell(\n  3, 8, normalize=False\n")


# What is refused

X = torch.zeros(2, 3)

BAD_CALLS = {
    **wrong_tensors("x", X, "the layer's weight"),
    **wrong_tensors("h", torch.zeros(2, 8), "x"),
    **wrong_resets("(B,)", 2),
    "x of three dimensions": (
        {"x": torch.zeros(2, 5, 3)},
        ValueError,
        r"x must be \(B, 3\) or \(3,\) because input_dims is 3, got \(2, 5, 3\); use a layer, not a cell",
    ),
    "x of no dimension": ({"x": torch.zeros(())}, ValueError, r"x must be \(B, 3\) or \(3,\) .*got \(\)$"),
    "x of other features": ({"x": torch.zeros(2, 4)}, ValueError, r"x must be \(B, 3\) or .*got \(2, 4\)$"),
    "x alone, of other features": ({"x": torch.zeros(2)}, ValueError, r"x must be .* \(3,\) .*got \(2,\)$"),
    "x is packed": (
        {"x": torch.nn.utils.rnn.pack_sequence([X])},
        TypeError,
        r"x must be a tensor, got PackedSequence",
    ),
    "x of integers": ({"x": X.long()}, TypeError, r"x must be torch\.float32 .*, got torch\.int64"),
    "h of other batch": ({"h": torch.zeros(3, 8)}, ValueError, r"h must be \(B, H\) = \(2, 8\), got \(3, 8\)"),
    "h of one row": ({"h": torch.zeros(1, 8)}, ValueError, r"h must be \(B, H\) = \(2, 8\), got \(1, 8\)"),
    "h of other features": ({"h": torch.zeros(2, 7)}, ValueError, r"h must be \(B, H\) = \(2, 8\), got \(2, 7\)"),
    "h of the layer": ({"h": torch.zeros(1, 2, 1, 8)}, ValueError, r"h must be \(B, H\) .*got \(1, 2, 1, 8\)"),
    "h without batch": ({"h": torch.zeros(8)}, ValueError, r"h must be \(B, H\) = \(2, 8\), got \(8,\)"),
    "h with batch, x without": (
        {"x": X[0], "h": torch.zeros(2, 8)},
        ValueError,
        r"h must be \(H\) = \(8,\), got \(2, 8\)",
    ),
    "reset of a batch, x without": (
        {"x": X[0], "reset": torch.zeros(1, dtype=torch.bool)},
        ValueError,
        r"reset must be a scalar = \(\), got \(1,\)",
    ),
}


@pytest.mark.parametrize("kind", [MinGRUCell, MinLSTMCell])
def test_bad_calls(kind):
    cell = kind(3, 8)
    expected = cell(X)
    assert_refused(lambda **args: cell(**{"x": X, **args}), BAD_CALLS, f"{kind.__name__}: ")
    assert torch.equal(cell(X), expected)


def test_scripted_bad_calls():
    cell = torch.jit.script(MinGRUCell(3, 8))
    for args, message in (
        ((torch.zeros(2, 5, 3),), "MinGRUCell: x must be (B, 3), got [2, 5, 3]"),
        ((torch.zeros(2, 4),), "MinGRUCell: x must be (B, 3), got [2, 4]"),
        ((X, torch.zeros(1, 8)), "MinGRUCell: h must be [2, 8], got [1, 8]"),
        ((X, None, torch.zeros(1, dtype=torch.bool)), "MinGRUCell: reset must be [2], got [1]"),
    ):
        with pytest.raises(torch.jit.Error) as caught:
            cell(*args)
        assert message in str(caught.value)


def test_bad_options():
    cases = {**WRONG_OPTIONS, **wrong_values("hidden_dims", "an int", types=(8.0,))}
    sizes = {"input_dims": 3, "hidden_dims": 8}
    for kind in (MinGRUCell, MinLSTMCell):
        assert_refused(lambda kind=kind, **options: kind(**{**sizes, **options}), cases, f"{kind.__name__}: ")
    with pytest.raises(ValueError, match=r"^MinLSTMCell: forget_bias must be 0 because bias is False, got 1\.0"):
        MinLSTMCell(3, 8, bias=False, forget_bias=1.0)
