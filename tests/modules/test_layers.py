"""What holds for the layers of features and of images alike: states, resets, dropout, dtypes, copies and devices."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import test_conv as conv
import test_recurrent as recurrent
import torch
from test_recurrent import TIGHT, assert_same, named
from torch.testing import assert_close

# Each has the same helpers: `make` makes a layer with options, `make_input` its x and reset.
FAMILIES = {"features": recurrent, "images": conv}
FEW = [
    *(("features", options) for options in ({}, recurrent.HIGHWAY, recurrent.ALL)),
    *(("images", options) for options in ({}, conv.ALL)),
]
# One dimension of space is enough to find what does not depend on it.
SMALL = {"features": {}, "images": {"space": 1}}

each_family = pytest.mark.parametrize("family", FAMILIES)
plain_and_full = pytest.mark.parametrize(
    ("family", "options"), FEW, ids=lambda value: value if isinstance(value, str) else named(value)
)
# TorchScript takes long to compile.
scripted_slowly_or_not = pytest.mark.parametrize("scripted", [False, pytest.param(True, marks=pytest.mark.slow)])
both_orders = pytest.mark.parametrize("batch_first", [True, False])


def states_of(h):
    """The states of each layer and direction, (B, 1, *) each."""
    return list(h.unbind(0)) if isinstance(h, torch.Tensor) else list(h)


def joined_states(family, states):
    return torch.stack(states) if family == "features" else states


def scripted_or_itself(module, scripted):
    return torch.jit.script(module) if scripted else module


# The reference


@each_family
def test_gradient_penalty(family):
    """A second derivative through a first one, as trainers compute it."""
    layers = FAMILIES[family]
    rnn = layers.make(**layers.ALL)
    x, reset = layers.make_input(rnn, steps=5)

    def penalty(function):
        leaf = x.clone().requires_grad_()
        out, h = function(leaf, None, reset)
        (grad,) = torch.autograd.grad(out.square().sum() + h[0].sum(), leaf, create_graph=True)
        return torch.autograd.grad((grad.norm(dim=2) - 1).square().sum(), list(rnn.parameters()))

    for got, expected in zip(penalty(rnn), penalty(layers.true_of(rnn)), strict=True):
        assert expected.any()
        assert_close(got, expected, **TIGHT)


# What the states and outputs mean


@plain_and_full
def test_states_are_those_after_the_last_step(family, options):
    layers = FAMILIES[family]
    rnn = layers.make(**{**options, "residual": False})
    x, reset = layers.make_input(rnn)
    out, h = rnn(x, reset=reset)
    states = states_of(h)
    assert len(states) == rnn.num_layers * rnn.num_directions
    ahead, *back = layers.in_order(rnn, out).chunk(rnn.num_directions, 2)
    assert torch.equal(ahead[:, -1:], states[-rnn.num_directions])
    for half in back:
        assert torch.equal(half[:, :1], states[-1])


@pytest.mark.parametrize("with_reset", [False, True])
@plain_and_full
def test_pieces_and_steps_equal_the_whole(family, options, with_reset):
    layers = FAMILIES[family]
    rnn = layers.make(**{"num_layers": 2, **options, "bidirectional": False})
    x, reset = layers.make_input(rnn)
    h, time = layers.make_states(rnn, x), 1 if rnn.batch_first else 0
    num_steps = x.shape[time]

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
    expected = layers.graded(rnn, rnn, x, h, reset)
    for sizes in ([1] * num_steps, [num_steps - 4, 0, 3, 1]):
        assert_same(layers.graded(joined(sizes), rnn, x, h, reset), expected, **TIGHT)


@plain_and_full
def test_batch_elements_do_not_know_each_other(family, options):
    layers = FAMILIES[family]
    rnn = layers.make(**options)
    x, reset = layers.make_input(rnn)
    states = states_of(layers.make_states(rnn, x))
    out, last = rnn(x, joined_states(family, states), reset)
    other_x, other_reset = x.clone(), reset.clone()
    layers.in_order(rnn, other_x)[1] += 1
    layers.in_order(rnn, other_reset)[1].logical_not_()
    for state in (others := [state.clone() for state in states]):
        state[1] -= 1
    other_out, other_last = rnn(other_x, joined_states(family, others), other_reset)
    pairs = zip(states_of(last), states_of(other_last), strict=True)
    for one, other in [(layers.in_order(rnn, out), layers.in_order(rnn, other_out)), *pairs]:
        assert (one != other).flatten(1).any(1).tolist() == [False, True, False]


@both_orders
@each_family
def test_the_backward_half_is_a_forward_layer_on_flipped_input(family, batch_first):
    layers = FAMILIES[family]
    rnn = layers.make(bidirectional=True, batch_first=batch_first)
    ahead, back = (layers.make(batch_first=batch_first) for _ in range(2))
    weights = rnn.state_dict()
    ahead.load_state_dict({name: weight for name, weight in weights.items() if "_reverse" not in name})
    back.load_state_dict({name.replace("_reverse", ""): weights[name] for name in weights if "_reverse" in name})
    x, _ = layers.make_input(rnn)
    h, time = layers.make_states(rnn, x), 1 if batch_first else 0
    out, last = rnn(x, h)
    out_ahead, last_ahead = ahead(x, h[:1])
    out_back, last_back = back(x.flip(time), h[1:])
    assert_close(out, torch.cat([out_ahead, out_back.flip(time)], 2), **TIGHT)
    assert_close(states_of(last), states_of(last_ahead) + states_of(last_back), **TIGHT)


@scripted_slowly_or_not
@both_orders
@each_family
def test_nothing_crosses_a_reset_in_either_direction(family, batch_first, scripted):
    layers = FAMILIES[family]
    rnn = layers.make(num_layers=2, bidirectional=True, batch_first=batch_first, **SMALL[family])
    run = scripted_or_itself(rnn, scripted)
    steps, ends = 17, [0, 4, 13, 17]  # three segments
    x, reset = (layers.in_order(rnn, each) for each in layers.make_input(rnn, steps=steps))
    reset.zero_()
    reset[1, ends[1:-1]] = True

    def outputs(x):
        return layers.in_order(rnn, run(layers.in_order(rnn, x), reset=layers.in_order(rnn, reset))[0]).flatten(2)

    before = outputs(x)
    for start, end in itertools.pairwise(ends):
        for at in (start, end - 1):
            other = x.clone()
            other[1, at] += 1
            changed = (outputs(other) != before).any(-1)
            expected = torch.zeros_like(changed)
            expected[1, start:end] = True
            assert torch.equal(changed, expected), at
    # Without a reset all of it changes, so the comparison above can fail.
    reset.zero_()
    before, other = outputs(x), x.clone()
    other[1, 9] += 1
    assert (outputs(other) != before).any(-1)[1].all()


@pytest.mark.parametrize("candidate", ["positive", "linear", "tanh"])
@pytest.mark.parametrize("learned", [False, True])
@each_family
def test_no_state_means_the_zero_or_the_learned_one(family, candidate, learned):
    layers = FAMILIES[family]
    rnn = layers.make(candidate=candidate, learn_initial_state=learned, num_layers=2, bidirectional=True)
    x, reset = layers.make_input(rnn)
    default = torch.full((1, 1, 1), 0.5 if candidate == "positive" else 0.0).double()
    if not learned:
        given = [default] * 4
    elif family == "features":
        given = list(rnn.initial_state)
    else:
        given = [state for layer in rnn.layers for state in layer.initial_state]
    states = [state.expand_as(full) for state, full in zip(given, states_of(rnn(x)[1]), strict=True)]
    expected = rnn(x, joined_states(family, states))
    assert_close(rnn(x), expected, rtol=0, atol=0)
    # A reset before the first step replaces any given state of the forward direction.
    reset.zero_()
    reset[:, 0] = True
    others = states_of(layers.make_states(rnn, x))
    mixed = [others[0], states[1], others[2], states[3]]
    assert_close(rnn(x, joined_states(family, mixed), reset), expected, **TIGHT)


# Dropout


@scripted_slowly_or_not
@both_orders
@each_family
def test_dropout_is_on_every_layers_output_but_the_last(family, batch_first, scripted):
    layers = FAMILIES[family]
    rnn = layers.make(num_layers=3, dropout=0.4, batch_first=batch_first, bidirectional=True, **SMALL[family])
    run = scripted_or_itself(rnn, scripted)
    assert run.training
    singles = []
    for layer in rnn.layers:
        single = copy.deepcopy(rnn)
        single.layers, single.num_layers = torch.nn.ModuleList([layer]), 1
        single.input_dims = layers.input_dims_of(layer)
        singles.append(single)
    x, reset = layers.make_input(rnn)

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
    plain = copy.deepcopy(rnn).eval()
    plain.dropout = 0.0
    assert_close(run.eval()(x)[0], plain(x)[0], **TIGHT)


@each_family
def test_dropout_of_everything_gives_the_next_layer_zeros(family):
    layers = FAMILIES[family]
    rnn = layers.make(num_layers=2, dropout=1.0)
    seen = []
    rnn.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, _ = layers.make_input(rnn)
    out, h = rnn(x)
    assert not seen[0].any()
    # Nothing is dropped from the output of the last layer and from the states.
    assert out.all()
    assert all(state.all() for state in states_of(h))
    rnn.eval()(x)
    assert seen[1].all()


@each_family
def test_dropout_without_a_layer_to_drop_warns(family):
    layers = FAMILIES[family]
    kind, sizes = layers.KIND_AND_SIZES
    with pytest.warns(UserWarning, match=rf"^{kind.__name__}: dropout=0\.5 has no effect on one layer") as seen:
        rnn = kind(*sizes, dropout=0.5)
    assert [warning.filename for warning in seen] == [__file__]
    x, _ = layers.make_input(rnn, torch.float32)
    assert torch.equal(rnn(x)[0], rnn.eval()(x)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind(*sizes, num_layers=2, dropout=0.5)


# Nothing in, nothing out


@pytest.mark.parametrize(
    ("family", "options", "scripted"),
    [
        *((*each, False) for each in FEW),
        *(pytest.param(family, {}, True, marks=pytest.mark.slow) for family in FAMILIES),
    ],
)
def test_empty(family, options, scripted):
    layers = FAMILIES[family]
    rnn = layers.make(torch.float32, **options)
    run = scripted_or_itself(rnn, scripted)
    for batch, steps in ((0, 5), (3, 0), (0, 0)):
        assert_empty(family, rnn, run, batch, steps)


def assert_empty(family, rnn, run, batch, steps):
    layers = FAMILIES[family]
    x, _ = layers.make_input(rnn, torch.float32, batch, steps)
    reset = layers.in_order(rnn, torch.ones(batch, steps, dtype=torch.bool))
    full_out, full_states = rnn(torch.randn(1, 1, *x.shape[2:]))
    shapes = [(batch, *state.shape[1:]) for state in states_of(full_states)]
    states = [torch.randn(shape, requires_grad=True) for shape in shapes]
    h = joined_states(family, states)
    for _ in range(2):
        out, last = run(x.clone().requires_grad_(), h, reset)
        assert layers.in_order(rnn, out).shape == (batch, steps, *full_out.shape[2:])
        # Without a step, not even a reset changes the state.
        assert_close(states_of(last), states, rtol=0, atol=0)
        grads = torch.autograd.grad(sum(state.sum() for state in states_of(last)) + out.sum(), states)
        assert all((grad == 1).all() for grad in grads)
    _, last = run(x)
    assert [state.shape for state in states_of(last)] == shapes


# Dtypes


@pytest.mark.parametrize(
    ("dtype", "scripted"),
    [
        *((dtype, False) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)),
        pytest.param(torch.bfloat16, True, marks=pytest.mark.slow),
    ],
)
@each_family
def test_what_goes_in_comes_out_in_each_dtype(family, dtype, scripted):
    layers = FAMILIES[family]
    rnn = layers.make(dtype, **layers.ALL)
    run = scripted_or_itself(rnn, scripted)
    x, reset = layers.make_input(rnn, dtype)
    for h in (None, layers.make_states(rnn, x)):
        got = layers.graded(run, run, x, h, reset)
        assert {name: tensor.dtype for name, tensor in got.items()} == dict.fromkeys(got, dtype)
        assert all(tensor.isfinite().all() for tensor in got.values())


# A module among modules


@plain_and_full
def test_copies_and_state_dicts(family, options):
    layers = FAMILIES[family]
    rnn = layers.make(**options).eval()
    x, reset = layers.make_input(rnn)
    expected = rnn(x, reset=reset)
    saved = io.BytesIO()
    torch.save(rnn.state_dict(), saved)
    saved.seek(0)
    other = layers.make(**options)
    assert not torch.equal(other(x, reset=reset)[0], expected[0])
    other.load_state_dict(torch.load(saved), strict=True)
    pointers = {weight.data_ptr() for weight in rnn.parameters()}
    for twin in (other, copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert_close(twin(x, reset=reset), expected, rtol=0, atol=0)
        assert not {weight.data_ptr() for weight in twin.parameters()} & pointers
        assert repr(twin) == repr(rnn)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layers.wider(**options).load_state_dict(rnn.state_dict(), strict=True)


@plain_and_full
def test_meta_device(family, options):
    layers = FAMILIES[family]
    rnn = layers.build(**options, device="meta")
    with torch.device("meta"):
        other = layers.build(**options)
    x, reset = layers.make_input(rnn, torch.float32)
    shapes = [each.shape for each in pytree_leaves(layers.build(**options)(x))]
    x, reset = x.to("meta"), reset.to("meta")
    h = layers.make_states(rnn, x)
    for one in (rnn, other):
        assert all(weight.is_meta for weight in one.parameters())
        for args in ((x,), (x, h), (x, h, reset)):
            found = pytree_leaves(one(*args))
            assert all(each.is_meta for each in found)
            assert [each.shape for each in found] == shapes
    real = rnn.to_empty(device="cpu")
    torch.manual_seed(5)
    real.reset_parameters()
    torch.manual_seed(5)
    assert_close(dict(real.named_parameters()), dict(layers.build(**options).named_parameters()), rtol=0, atol=0)


def pytree_leaves(outputs):
    out, states = outputs
    return [out, *states_of(states)]


@plain_and_full
def test_reset_parameters_initializes_as_the_constructor(family, options):
    layers = FAMILIES[family]
    torch.manual_seed(5)
    rnn = layers.build(**options)
    drawn = copy.deepcopy(rnn.state_dict())
    rnn.reset_parameters()
    assert any(not torch.equal(weight, drawn[name]) for name, weight in rnn.named_parameters())
    with torch.no_grad():
        for weight in rnn.parameters():
            weight.fill_(9.0)
    torch.manual_seed(5)
    rnn.reset_parameters()
    assert_close(dict(rnn.state_dict()), dict(drawn), rtol=0, atol=0)
    initial = [weight for name, weight in rnn.named_parameters() if "initial_state" in name]
    assert bool(initial) == rnn.learn_initial_state
    assert all((weight == 0.5).all() for weight in initial)


@each_family
def test_threads_give_the_same_numbers(family):
    layers = FAMILIES[family]
    rnn = layers.make(bidirectional=True)
    x, reset = layers.make_input(rnn, batch=32, steps=128 if family == "features" else 16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(layers.graded(rnn, rnn, x, None, reset))
    finally:
        torch.set_num_threads(before)
    assert_same(*results, **TIGHT)
