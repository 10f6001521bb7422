"""The residual block: hard cases, dropout, states and errors. All routes: test_routes.py; others: tests/properties."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from cover import named
from hypothesis import strategies as st
from refusals import CANDIDATE, DROPOUT, DTYPE, assert_refused, literal, wrong_resets, wrong_states, wrong_values
from routes import (
    Case,
    assert_as_exact,
    assert_routes_equal,
    errors,
    graded,
    graded_reference,
    one_pass,
    varied,
)
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close

from mingru.models import Block, map_state

DIMS, B, S = 5, 3, 11

# Each option alone, and all together.
OPTIONS = [
    {},
    {"conv": 2},
    {"conv": 4},
    {"mlp": 2},
    {"conv": 4, "mlp": 1.5},
    {"cell": "minlstm"},
    {"cell": "minlstm", "forget_bias": 1.0, "conv": 3},
    {"cell": "minlstm", "normalize": False, "mlp": 2},
    {"norm": "layer", "mlp": 1},
    {"expansion": 1.5, "conv": 3},
    {"expansion": 0.5},
    {"bias": False, "conv": 3, "mlp": 2},
    {"candidate": "linear"},
    {"candidate": "tanh", "gate": "signed"},
    {"gate": "rotation", "expansion": 1.5, "conv": 3},
    {"min_decay": 0.5, "conv": 2, "mlp": 2},
    {"learn_initial_state": True},
    {"bidirectional": True},
    {"bidirectional": True, "conv": 3, "learn_initial_state": True, "expansion": 1.4},
    {"recompute": True},
    {"recompute": False},
    {"checkpoint": True, "conv": 3, "mlp": 2},
    {"cell": "minlstm", "conv": 4, "mlp": 2, "norm": "layer", "expansion": 1.4, "learn_initial_state": True},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=named)
some_options = st.fixed_dictionaries(
    {
        "cell": st.sampled_from(["mingru", "minlstm"]),
        "conv": st.sampled_from([None, 2, 3, 5]),
        "mlp": st.sampled_from([None, 2]),
        "norm": st.sampled_from(["rms", "layer"]),
        "expansion": st.sampled_from([1, 1.4, 0.6]),
        "bias": st.booleans(),
        "candidate": st.sampled_from(["positive", "linear", "tanh"]),
        "learn_initial_state": st.booleans(),
    }
)


# One of each part, for the parameters.
EVERYTHING = {"conv": 3, "mlp": 2, "norm": "layer", "learn_initial_state": True, "cell": "minlstm", "forget_bias": 1.0}


def build(**options):
    return Block(DIMS, **options)


def make(dtype=torch.float32, **options):
    return varied(build(dtype=dtype, **options))


def make_inputs(block, case):
    torch.manual_seed(case.seed)
    dtype = block.out.weight.dtype
    x = torch.randn(len(case.lengths), case.num_steps, DIMS, dtype=dtype)
    h = [torch.randn_like(each) for each in block.initial_state(len(x))]
    return x, h if case.with_state else None


# Hard cases


ROWS = [7, 7]
HARD_CASES = {
    "pieces shorter than the convolution's past": Case(ROWS, [1, 2, 4, 5], [], True, 0),
    "two resets within the convolution's past": Case(ROWS, [3, 4], [(0, 2), (0, 3), (1, 3)], True, 0),
    "resets at every step": Case(ROWS, [3], [(0, step) for step in range(7)], True, 0),
    "a reset before the first step": Case(ROWS, [1], [(0, 0)], True, 0),
    "a reset before the last step": Case(ROWS, [6], [(1, 6)], True, 0),
    "a reset at a cut": Case(ROWS, [4], [(0, 4)], False, 0),
    "rows shorter than the convolution's past": Case([1, 2, 7], [1], [], True, 0),
    "an empty sequence": Case([0, 7, 0], [2], [(1, 4)], True, 0),
    "an empty sequence without a state": Case([7, 0], [2], [(0, 4), (1, 0)], False, 0),
    "a reset before the last step of a short row": Case([2, 7], [1], [(0, 1)], True, 0),
    "resets in the padding": Case([2, 7], [4], [(0, 2), (0, 3), (0, 6)], True, 0),
}


@pytest.mark.parametrize("case", HARD_CASES.values(), ids=HARD_CASES)
def test_hard_cases(case):
    block = make(conv=4, mlp=2, cell="minlstm", learn_initial_state=True)
    assert_routes_equal(reference.block, block, *make_inputs(block, case), case)


def test_the_comparison_can_fail():
    block = make(conv=4)
    case = Case(ROWS, [3], [], True, 0)
    x, h = make_inputs(block, case)
    expected = graded_reference(reference.block, one_pass, block, x, h, case)
    allowed = errors(graded(one_pass, block, x, h, case), expected)
    forgotten = [h[0], torch.cat([torch.zeros(1, 2, 1, DIMS), h[1][:, :, 1:]], 2)]
    with pytest.raises(AssertionError, match=r"^no oldest input, value out: error"):
        assert_as_exact("no oldest input", graded(one_pass, block, x, forgotten, case), expected, allowed)
    values, gradients = graded(one_pass, block, x, h, case)
    gradients["conv.weight"][3, 2] += 1e-5 * max(gradient.abs().max() for gradient in gradients.values())
    with pytest.raises(AssertionError, match=r"^changed, gradient conv\.weight: error"):
        assert_as_exact("changed", (values, gradients), expected, allowed)


# Options


def test_dropout():
    block = make(conv=3, mlp=2, dropout=1.0)
    x = torch.randn(B, S, DIMS)
    without = x + block.conv(x, torch.zeros(1, B, 2, DIMS))[0]
    assert_close(block(x)[0], without)
    plain = make(conv=3, mlp=2)
    plain.load_state_dict(block.state_dict())
    assert torch.equal(block.eval()(x)[0], plain(x)[0])
    block = make(mlp=2, dropout=0.5)
    torch.manual_seed(1)
    out, _ = block(x)
    torch.manual_seed(1)
    y = x + F.dropout(block.out(block.rnn(x)[0]), 0.5)
    assert_close(out, y + F.dropout(block.mlp(y), 0.5))


# States


@each_option
def test_states_do_not_keep_the_sequence(options):
    block = make(**options)
    sizes = []
    for num_steps in (1, 5, 500):
        x = torch.randn(B, num_steps, DIMS)
        for arguments in ({}, {"reset": torch.rand(B, num_steps) < 0.3}, {"lengths": torch.tensor([1, num_steps, 1])}):
            for with_grad in (True, False):
                with torch.set_grad_enabled(with_grad):
                    _, h = block(x, **arguments)
                assert all(each.untyped_storage().nbytes() == each.numel() * each.element_size() for each in h)
                sizes.append(sum(each.numel() for each in h))
    assert set(sizes) == {sum(math.prod(shape) for shape in block.state_shapes(B))}


@pytest.mark.usefixtures("_scripts_are_freed")
def test_states_of_a_scripted_block_do_not_keep_the_sequence():
    _, h = torch.jit.script(make(conv=4))(torch.randn(B, 500, DIMS))
    assert [each.untyped_storage().nbytes() for each in h] == [4 * B * DIMS, 4 * B * 3 * DIMS]


# Bad input

RATIO = "a finite number with {0} * dims >= 1"
BAD_OPTIONS = {
    **wrong_values("dims", "an int", types=(5.0, True)),
    **wrong_values("dims", "at least 1", values=(0,)),
    **wrong_values("cell", "one of ('mingru', 'minlstm')", values=("gru", ["mingru"])),
    **wrong_values("expansion", "a number", types=(True, "1")),
    **wrong_values("expansion", RATIO.format("expansion"), values=(0, -1.0, math.nan, 1e308, 0.05)),
    **wrong_values("mlp", "a number", types=(True,)),
    **wrong_values("mlp", RATIO.format("mlp"), values=(0,)),
    **wrong_values("conv", "an int or None", types=(3.0, True)),
    **wrong_values("conv", "at least 2", values=(1,)),
    **wrong_values("norm", "one of ('layer', 'rms')", values=("batch", None, ["rms"])),
    **wrong_values("bias", "a bool", types=(1,)),
    **wrong_values("checkpoint", "a bool", types=(1,)),
    **DROPOUT,
    **{
        f"the option {name}": ({name: value}, TypeError, f"no argument '{name}'; {remedy}")
        for name, value, remedy in (
            ("num_layers", 2, "a block has one layer, and its x"),
            ("batch_first", True, "a block has one layer"),
            ("residual", True, "a block has one layer"),
            ("hidden_dims", 8, "use expansion"),
            ("expansion_factor", 2, "use expansion"),
            ("batch_norm", True, "use norm"),
            ("candidat", "tanh", "use candidate"),
            ("heads", 2, "the arguments are dims, cell, expansion, conv, mlp, "),
            ("normalize", False, "only a minLSTM has two gates"),
            ("forget_bias", 1.0, "only a minLSTM has a forget gate"),
        )
    },
}
OF_THE_LAYER = {
    **wrong_values("bidirectional", "a bool", types=(1,)),
    **wrong_values("learn_initial_state", "a bool", types=(1,)),
    **wrong_values("recompute", "a bool or None", types=(1,)),
    **CANDIDATE,
    **DTYPE,
}


def test_bad_options():
    assert_refused(lambda **options: Block(**{"dims": DIMS, **options}), BAD_OPTIONS, "Block: ")
    assert_refused(lambda **options: Block(DIMS, **options), OF_THE_LAYER, "MinGRU: ")


X = torch.zeros(2, 4, DIMS)
STATE = [torch.zeros(1, 2, 1, DIMS), torch.zeros(1, 2, 2, DIMS)]
LIKE, SEQUENCE = "x must be torch.float32 like the block's weights, got", "x must be a tensor (B, S, 5), got"
BAD_CALLS = {
    "x of two dimensions": ({"x": X[0]}, ValueError, "x must be (B, S, 5), got (4, 5)"),
    "x of other features": ({"x": X[..., 1:]}, ValueError, "x must be (B, S, 5), got (2, 4, 4)"),
    "x of ids": ({"x": X.long()}, TypeError, f"{LIKE} torch.int64; embed"),
    "x of float64": ({"x": X.double()}, TypeError, f"{LIKE} torch.float64"),
    "x on another device": ({"x": X.to("meta")}, ValueError, "x must be on cpu like the block's weights, got a tensor"),
    "x of a list": ({"x": X.tolist()}, TypeError, f"{SEQUENCE} list; use torch.as_tensor"),
    "x packed": ({"x": pack_sequence([X[0]])}, TypeError, f"{SEQUENCE} PackedSequence; pad the"),
    "negative times": ({"dt": -torch.ones(2, 4)}, ValueError, "dt must be at least 0, got -1.0"),
    "an unknown argument": (
        {"mask": None},
        TypeError,
        "no argument 'mask'; use lengths=mask.sum(1)",
    ),
    "state instead of h": ({"state": STATE}, TypeError, "no argument 'state'; use h"),
    "states of another kernel size": (
        {"h": [STATE[0], torch.zeros(1, 2, 1, DIMS)]},
        ValueError,
        "h[1] must be (1, 2, 2, 5), got (1, 2, 1, 5); pass a state of this batch size",
    ),
}
LENGTHS = {
    "a length below 0": (
        {"lengths": torch.tensor([4, -1])},
        ValueError,
        "lengths must be from 0 to S = 4, got [4, -1]",
    ),
    "a length above S": ({"lengths": torch.tensor([5, 4])}, ValueError, "lengths must be from 0 to S = 4, got [5, 4]"),
    "a list": ({"lengths": [4, 4]}, TypeError, "lengths must be an integer tensor (B,), got list"),
    "float": ({"lengths": torch.ones(2)}, TypeError, "lengths must be of an integer dtype, got torch.float32"),
}


@pytest.mark.parametrize("with_grad", [True, False])
def test_bad_calls(with_grad):
    without_conv = {**literal(LENGTHS), **wrong_resets("(B, S)", 2, 4)}
    with_conv = {**literal(BAD_CALLS), **wrong_states("h", STATE, "x"), **without_conv}
    for conv, cases in ((3, with_conv), (None, without_conv)):
        with torch.set_grad_enabled(with_grad):
            block = Block(DIMS, conv=conv)
            assert_refused(lambda block=block, **arguments: block(**{"x": X, **arguments}), cases, "Block: ")


def test_a_state_that_is_one_tensor():
    with pytest.raises(TypeError, match="map_state: state must be a list of tensors, got Tensor; call the function on"):
        map_state(torch.Tensor.detach, torch.zeros(1, 2, 1, 4))
