"""The residual block: against the float64 reference, in pieces, padded and with resets, its states and its errors."""

import itertools
import math
import re

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from routes import (
    Case,
    assert_as_exact,
    assert_equals_the_reference,
    assert_routes_equal,
    cases,
    detached_pieces,
    errors,
    graded,
    graded_reference,
    one_pass,
    varied,
)
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close

import mingru
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
each_option = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()) or "plain"
)
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


def make(dtype=torch.float32, **options):
    return varied(Block(DIMS, dtype=dtype, **options))


def make_inputs(block, case):
    torch.manual_seed(case.seed)
    dtype = block.out.weight.dtype
    x = torch.randn(len(case.lengths), case.num_steps, DIMS, dtype=dtype)
    h = [torch.randn_like(each) for each in block.initial_state(len(x))]
    return x, h if case.with_state else None


# Values, states and gradients


@each_option
@pytest.mark.parametrize("with_state", [False, True])
def test_equals_the_reference(options, with_state):
    block = make(torch.double, **options)
    for lengths, resets in (([S] * B, []), ([9, 1, S], [(0, 0), (0, 1), (2, 4), (2, 5), (2, 10)])):
        case = Case(lengths, [], resets, with_state, 0)
        assert_equals_the_reference(reference.block, block, *make_inputs(block, case), case)


@pytest.mark.parametrize("examples", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_all_routes_are_equal(examples):
    # No shrinking, because it takes minutes and the cases are small.
    @settings(deadline=None, derandomize=True, max_examples=examples, phases=[Phase.generate])
    @given(case=cases(), options=some_options)
    def check(case, options):
        block = make(**options)
        assert_routes_equal(reference.block, block, *make_inputs(block, case), case)

    check()


@pytest.mark.parametrize("examples", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_pieces_with_detached_states(examples):
    """Truncated backpropagation through time."""

    @settings(deadline=None, derandomize=True, max_examples=examples, phases=[Phase.generate])
    @given(case=cases(equal_lengths=True), options=some_options)
    def check(case, options):
        block = make(torch.double, **options)
        inputs = make_inputs(block, case)
        assert_equals_the_reference(reference.block, block, *inputs, case, detached_pieces, detached_pieces)

    check()


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


# Nothing comes from elsewhere


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_lengths_of_each_integer_dtype(dtype):
    block, lengths = make(conv=4), torch.tensor([9, 0, S])
    case = Case(lengths.tolist(), [], [(0, 3)], True, 0)
    x, h = make_inputs(block, case)
    out, states = block(x, h, case.reset, lengths.to(dtype))
    expected, others = block(x, h, case.reset, lengths)
    assert torch.equal(out, expected)
    assert all(map(torch.equal, states, others))


@each_option
def test_padding_has_no_effect(options):
    block, lengths = make(torch.double, **options), [9, 0, S]
    case = Case(lengths, [], [(0, 3)], True, 0)
    x, h = make_inputs(block, case)
    reset = case.reset
    outs = []
    for fill in (1.0, math.nan, math.inf):
        inputs = x.masked_fill(case.padding, fill).requires_grad_()
        reset = reset ^ case.padding.squeeze(2)
        out, states = block(inputs, h, reset, torch.tensor(lengths))
        assert not out.masked_select(case.padding).any()
        grads = torch.autograd.grad(
            (out.square().sum(), *(state.square().sum() for state in states)), [inputs, *block.parameters()]
        )
        assert not grads[0].masked_select(case.padding).any()
        outs.append([out, *states, *grads])
    for others in outs[1:]:
        for one, other in zip(outs[0], others, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("conv", [None, 4])
def test_what_a_step_depends_on(conv, with_grad):
    """NaN in one step reaches later steps of the same row until a reset, and nothing else."""
    block = make(conv=conv, mlp=2)
    reset = torch.zeros(B, S, dtype=torch.bool)
    reset[1, 6] = True
    for step, end in ((2, 6), (5, 6), (6, S), (9, S)):
        x = torch.randn(B, S, DIMS)
        x[1, step] = math.nan
        with torch.set_grad_enabled(with_grad):
            out, states = block(x, reset=reset)
        expected = torch.zeros(B, S, dtype=torch.bool)
        expected[1, step:end] = True
        assert torch.equal(out.isnan().any(-1), expected)
        # The convolution's state has the last three steps.
        for state, first in zip(states, (0, S - 3), strict=False):
            is_reached = end == S and step >= first
            assert state.isnan().flatten(2).any(-1).squeeze(0).tolist() == [False, is_reached, False]


@pytest.mark.parametrize("with_grad", [True, False])
def test_nan_in_a_state_ends_at_a_reset(with_grad):
    block = make(conv=4)
    h = [torch.full_like(each, math.nan) for each in block.initial_state(2)]
    x = torch.randn(2, S, DIMS)
    reset = torch.zeros(2, S, dtype=torch.bool)
    reset[0, 0] = reset[1, 3] = True
    with torch.set_grad_enabled(with_grad):
        out, states = block(x, h, reset)
    assert out.isnan().any(-1).tolist() == [[False] * S, [True] * 3 + [False] * (S - 3)]
    assert all(state.isfinite().all() for state in states)
    assert_close(out[0], block(x[:1])[0][0])


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


def test_checkpoint_gives_the_same_gradients_with_dropout():
    plain, checkpointed = (make(conv=3, mlp=2, dropout=0.5, checkpoint=checkpoint) for checkpoint in (False, True))
    checkpointed.load_state_dict(plain.state_dict())
    case = Case([4, S], [], [(1, 5)], True, 0)
    inputs = make_inputs(plain, case)
    found = []
    for block in (plain, checkpointed):
        torch.manual_seed(2)
        values, gradients = graded(lambda block, x, h, _: block(x, h, case.reset), block, *inputs, case)
        found.append([*values.values(), *gradients.values()])
    assert all(itertools.starmap(torch.equal, zip(*found, strict=True)))


def test_reset_parameters():
    options = {"conv": 3, "mlp": 2, "norm": "layer", "learn_initial_state": True, "cell": "minlstm", "forget_bias": 1.0}
    torch.manual_seed(0)
    fresh = Block(DIMS, **options)
    block = make(**options)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(math.nan)
    block.reset_parameters()
    for name, parameter in block.named_parameters():
        assert parameter.isfinite().all(), name
        assert (parameter.std(correction=0) == 0) == (fresh.get_parameter(name).std(correction=0) == 0), name


# States


@each_option
def test_the_default_state(options):
    block = make(torch.double, **options)
    x = torch.randn(B, S, DIMS).double()
    h = block.initial_state(B)
    assert [each.shape for each in h] == [each.shape for each in block(x)[1]] == block.state_shapes(B)
    for one, other in zip(block(x, h)[0], block(x)[0], strict=True):
        assert torch.equal(one, other)
    reset = torch.zeros(B, S, dtype=torch.bool)
    reset[:, 0] = True
    random = [torch.randn_like(each) for each in h]
    if not block.rnn.bidirectional:
        assert_close(block(x, random, reset), block(x))


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


def test_states_are_a_list_or_a_tuple():
    block = make(conv=3)
    x = torch.randn(B, S, DIMS)
    _, h = block(x)
    assert isinstance(h, list)
    assert torch.equal(block(x, tuple(h))[0], block(x, h)[0])


def test_blocks_in_a_stack():
    stack = mingru.Stack([make(conv=3, dtype=torch.double), mingru.MinGRU(DIMS, DIMS, dtype=torch.double)])
    x = torch.randn(B, S, DIMS).double()
    out, h = stack(x)
    first, before = stack(x[:, :4])
    second, after = stack(x[:, 4:], map_state(torch.Tensor.detach, before))
    assert_close(torch.cat([first, second], 1), out)
    assert_close(after, h)


# Bad input

NAN = math.nan
RATIO = "a finite number"
BAD_OPTIONS = {
    "dims of 0": ({"dims": 0}, ValueError, "dims must be at least 1, got 0"),
    "dims of float": ({"dims": 5.0}, TypeError, "dims must be an int, got 5.0"),
    "dims of bool": ({"dims": True}, TypeError, "dims must be an int, got True"),
    "cell": ({"cell": "gru"}, ValueError, "cell must be one of ('mingru', 'minlstm'), got 'gru'"),
    "cell in a list": ({"cell": ["mingru"]}, ValueError, "cell must be one of ('mingru', 'minlstm'), got ['mingru']"),
    "expansion of 0": ({"expansion": 0}, ValueError, f"expansion must be {RATIO} with expansion * dims >= 1, got 0"),
    "expansion below 0": ({"expansion": -1.0}, ValueError, f"expansion must be {RATIO} with "),
    "expansion of NaN": ({"expansion": NAN}, ValueError, f"expansion must be {RATIO} with "),
    "expansion too large": ({"expansion": 1e308}, ValueError, f"expansion must be {RATIO} with "),
    "expansion too small": ({"expansion": 0.05}, ValueError, f"expansion must be {RATIO} with "),
    "expansion of bool": ({"expansion": True}, TypeError, "expansion must be a number, got True"),
    "expansion of str": ({"expansion": "1"}, TypeError, "expansion must be a number, got '1'"),
    "mlp of 0": ({"mlp": 0}, ValueError, f"mlp must be {RATIO} with mlp * dims >= 1, got 0"),
    "mlp of bool": ({"mlp": True}, TypeError, "mlp must be a number, got True"),
    "conv of 1": ({"conv": 1}, ValueError, "conv must be at least 2, got 1"),
    "conv of float": ({"conv": 3.0}, TypeError, "conv must be an int or None, got 3.0"),
    "conv of bool": ({"conv": True}, TypeError, "conv must be an int or None, got True"),
    "norm": ({"norm": "batch"}, ValueError, "norm must be one of ('layer', 'rms'), got 'batch'"),
    "no norm": ({"norm": None}, ValueError, "norm must be one of ('layer', 'rms'), got None"),
    "norm in a list": ({"norm": ["rms"]}, ValueError, "norm must be one of ('layer', 'rms'), got ['rms']"),
    "bias": ({"bias": 1}, TypeError, "bias must be a bool, got 1"),
    "dropout above 1": ({"dropout": 1.1}, ValueError, "dropout must be a number from 0 to 1, got 1.1"),
    "dropout of NaN": ({"dropout": NAN}, ValueError, "dropout must be a number from 0 to 1, got nan"),
    "dropout of bool": ({"dropout": True}, TypeError, "dropout must be a number from 0 to 1, got True"),
    "checkpoint": ({"checkpoint": 1}, TypeError, "checkpoint must be a bool, got 1"),
    "num_layers": ({"num_layers": 2}, TypeError, "no argument 'num_layers'; a block has one layer, and its x"),
    "batch_first": ({"batch_first": True}, TypeError, "no argument 'batch_first'; a block has one layer"),
    "residual": ({"residual": True}, TypeError, "no argument 'residual'; a block has one layer"),
    "hidden_dims": ({"hidden_dims": 8}, TypeError, "no argument 'hidden_dims'; use expansion"),
    "expansion_factor": ({"expansion_factor": 2}, TypeError, "no argument 'expansion_factor'; use expansion"),
    "batch_norm": ({"batch_norm": True}, TypeError, "no argument 'batch_norm'; use norm"),
    "typing error": ({"candidat": "tanh"}, TypeError, "no argument 'candidat'; use candidate"),
    "unknown": ({"heads": 2}, TypeError, "no argument 'heads'; the arguments are dims, cell, expansion, conv, mlp, "),
    "normalize of a minGRU": (
        {"normalize": False},
        TypeError,
        "no argument 'normalize'; only a minLSTM has two gates",
    ),
    "forget_bias of a minGRU": (
        {"forget_bias": 1.0},
        TypeError,
        "no argument 'forget_bias'; only a minLSTM has a forget gate",
    ),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case):
    options, error, message = BAD_OPTIONS[case]
    with pytest.raises(error, match="^Block: " + re.escape(message)):
        Block(**{"dims": DIMS, **options})


OF_THE_LAYER = {
    "candidate": ({"candidate": "relu"}, ValueError, "candidate must be one of ('positive', 'linear', 'tanh'), got"),
    "bidirectional": ({"bidirectional": 1}, TypeError, "bidirectional must be a bool, got 1"),
    "learn_initial_state": ({"learn_initial_state": 1}, TypeError, "learn_initial_state must be a bool, got 1"),
    "recompute": ({"recompute": 1}, TypeError, "recompute must be a bool or None, got 1"),
    "dtype": ({"dtype": torch.int64}, TypeError, "dtype must be a floating-point dtype, got torch.int64"),
}


@pytest.mark.parametrize("case", OF_THE_LAYER)
def test_bad_options_of_the_layer(case):
    options, error, message = OF_THE_LAYER[case]
    with pytest.raises(error, match="^MinGRU: " + re.escape(message)):
        Block(DIMS, **options)


X = torch.zeros(2, 4, DIMS)
STATE = [torch.zeros(1, 2, 1, DIMS), torch.zeros(1, 2, 2, DIMS)]
SHAPES = "(1, 2, 1, 5)", "(1, 2, 2, 5)"
OTHER = "pass a state of this batch size and of a module with the same options"
BAD_CALLS = {
    "x of two dimensions": ({"x": X[0]}, ValueError, "x must be (B, S, 5), got (4, 5)"),
    "x of other features": ({"x": X[..., 1:]}, ValueError, "x must be (B, S, 5), got (2, 4, 4)"),
    "x of ids": (
        {"x": X.long()},
        TypeError,
        "x must be torch.float32 like the block's weights, got torch.int64; embed",
    ),
    "x of float64": (
        {"x": X.double()},
        TypeError,
        "x must be torch.float32 like the block's weights, got torch.float64",
    ),
    "x on another device": ({"x": X.to("meta")}, ValueError, "x must be on cpu like the block's weights, got a tensor"),
    "x of a list": ({"x": X.tolist()}, TypeError, "x must be a tensor (B, S, 5), got list; use torch.as_tensor"),
    "x packed": ({"x": pack_sequence([X[0]])}, TypeError, "x must be a tensor (B, S, 5), got PackedSequence; pad the"),
    "one state": ({"h": STATE[:1]}, ValueError, "h must be a list of 2 tensors, got 1"),
    "three states": ({"h": [*STATE, X]}, ValueError, "h must be a list of 2 tensors, got 3"),
    "a tensor as states": ({"h": STATE[0]}, TypeError, "h must be a list of 2 tensors, got Tensor"),
    "a dict as states": ({"h": {0: STATE[0], 1: STATE[1]}}, TypeError, "h must be a list of 2 tensors, got dict"),
    "None in the states": ({"h": [None, STATE[1]]}, TypeError, "h[0] must be a tensor, got NoneType"),
    "a number in the states": ({"h": [STATE[0], 1.0]}, TypeError, "h[1] must be a tensor, got float"),
    "states of another batch": (
        {"h": [torch.zeros(1, 3, 1, DIMS), STATE[1]]},
        ValueError,
        f"h[0] must be {SHAPES[0]}, got (1, 3, 1, 5); {OTHER}",
    ),
    "states of one sequence": (
        {"h": map_state(lambda state: state[:, :1], STATE)},
        ValueError,
        f"h[0] must be {SHAPES[0]}, got (1, 1, 1, 5); {OTHER}",
    ),
    "states in another order": ({"h": STATE[::-1]}, ValueError, f"h[0] must be {SHAPES[0]}, got {SHAPES[1]}; {OTHER}"),
    "states of another kernel size": (
        {"h": [STATE[0], torch.zeros(1, 2, 1, DIMS)]},
        ValueError,
        f"h[1] must be {SHAPES[1]}, got (1, 2, 1, 5); {OTHER}",
    ),
    "states of float64": (
        {"h": map_state(torch.Tensor.double, STATE)},
        TypeError,
        "h[0] must be torch.float32 like x, got torch.float64; use h[0].to(torch.float32)",
    ),
    "states on another device": (
        {"h": [STATE[0], STATE[1].to("meta")]},
        ValueError,
        "h[1] must be on cpu like x, got a tensor on meta; use h[1].to('cpu')",
    ),
    "reset of other steps": (
        {"reset": torch.zeros(2, 3, dtype=torch.bool)},
        ValueError,
        "reset must be (B, S) = (2, 4), got (2, 3)",
    ),
    "reset of numbers": (
        {"reset": torch.zeros(2, 4)},
        TypeError,
        "reset must be of dtype torch.bool, got torch.float32",
    ),
    "length below 0": ({"lengths": torch.tensor([4, -1])}, ValueError, "lengths must be from 0 to S = 4, got [4, -1]"),
    "length above S": ({"lengths": torch.tensor([5, 4])}, ValueError, "lengths must be from 0 to S = 4, got [5, 4]"),
    "lengths of a list": ({"lengths": [4, 4]}, TypeError, "lengths must be an integer tensor (B,), got list"),
    "lengths of float": (
        {"lengths": torch.ones(2)},
        TypeError,
        "lengths must be of an integer dtype, got torch.float32",
    ),
    "negative times": ({"dt": -torch.ones(2, 4)}, ValueError, "dt must be at least 0, got -1.0"),
    "an unknown argument": (
        {"mask": None},
        TypeError,
        "no argument 'mask'; the arguments are x, h, reset, lengths, dt",
    ),
    "state instead of h": ({"state": STATE}, TypeError, "no argument 'state'; use h"),
}


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case, with_grad):
    arguments, error, message = BAD_CALLS[case]
    with torch.set_grad_enabled(with_grad), pytest.raises(error, match="^Block: " + re.escape(message)):
        Block(DIMS, conv=3)(**{"x": X, **arguments})


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("case", [name for name in BAD_CALLS if "lengths" in name or "reset" in name])
def test_bad_calls_without_convolution(case, with_grad):
    arguments, error, message = BAD_CALLS[case]
    with torch.set_grad_enabled(with_grad), pytest.raises(error, match="^Block: " + re.escape(message)):
        Block(DIMS)(**{"x": X, **arguments})
