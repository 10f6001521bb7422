"""Sequences of different lengths, padded, packed or end to end: each is what it is alone, and nothing else enters."""

import itertools
import re

import pytest
import reference
import torch
from cover import cover
from test_recurrent import IN, KINDS, OPTIONS, TIGHT, B, H, S, assert_same, graded, in_order, make, make_state, named
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.testing import assert_close

import mingru
from mingru.functional import reset_from_lengths

# Their order is not its own inverse.
LENGTHS = (9, 1, S)
ALL = OPTIONS[-1]
BACKENDS = [name for name, can_run in mingru.backends().items() if can_run is True]

FORMS = ["lengths", "scripted", "packed"]
each_form = pytest.mark.parametrize("form", ["lengths", "packed", pytest.param("scripted", marks=pytest.mark.slow)])
# TorchScript takes long to compile.
each_option_and_form = pytest.mark.parametrize(
    ("options", "form"),
    [(options, form) for form in FORMS for options in (OPTIONS if form != "scripted" else ({}, ALL))],
    ids=lambda value: value if isinstance(value, str) else named(value),
)
plain_and_all = pytest.mark.parametrize(
    "options", [{}, {"cell": "minlstm", "bidirectional": True}, ALL], ids=["plain", "minlstm", "all"]
)


def together(rnn, form, lengths, enforce_sorted=False):
    """A function of x, h and reset, padded, to out, padded, and h; by one of the ways to say the lengths."""
    if form == "packed":
        return packed(rnn, lengths, enforce_sorted)
    run, lengths = torch.jit.script(rnn) if form == "scripted" else rnn, torch.tensor(lengths)
    return lambda x, h=None, reset=None: run(x, h, reset, lengths)


def packed(rnn, lengths, enforce_sorted):
    def function(x, h=None, reset=None):
        num_steps = x.shape[1 if rnn.batch_first else 0]
        x, reset = (
            each
            if each is None
            else pack_padded_sequence(each, torch.tensor(lengths), rnn.batch_first, enforce_sorted=enforce_sorted)
            for each in (x, reset)
        )
        out, last = rnn(x, h, reset)
        assert isinstance(out, PackedSequence)
        # Whatever unpacks x, unpacks it.
        for got, came in zip(out[1:], x[1:], strict=True):
            assert got is came
        return pad_packed_sequence(out, rnn.batch_first, total_length=num_steps)[0], last

    return function


def alone(rnn, lengths, layers=reference.layers):
    """The same, each sequence on its own, by the reference."""
    count = rnn.num_layers * rnn.num_directions

    def function(x, h=None, reset=None):
        x, reset = in_order(rnn, x), None if reset is None else in_order(rnn, reset)
        outs, states = [], []
        for at, length in enumerate(lengths):
            one = slice(at, at + 1)
            state = None if h is None else h.expand(count, len(lengths), 1, H)[:, one]
            if length == 0:
                out, last = x[one, :0, :1].expand(1, 0, rnn.output_dims), initial_state(rnn) if state is None else state
            else:
                out, last = layers(rnn, x[one, :length], state, None if reset is None else reset[one, :length])
            outs.append(torch.cat([out, out.new_zeros(1, x.shape[1] - length, out.shape[2])], 1))
            states.append(last)
        return in_order(rnn, torch.cat(outs)), torch.cat(states, 1)

    return function


def initial_state(rnn):
    """The default state of one sequence, (L * D, 1, 1, H)."""
    if rnn.initial_state is not None:
        return rnn.initial_state
    value = reference.initial_state(rnn.cell, rnn.candidate)
    return torch.full((rnn.num_layers * rnn.num_directions, 1, 1, H), value, dtype=torch.double)


def padded(rnn, lengths, dtype=torch.double, num_steps=S, fill=7.0):
    """x and reset in the module's own order; what stands in the padding is no number to be used."""
    x, reset = (
        torch.randn(len(lengths), num_steps, rnn.input_dims, dtype=dtype),
        torch.rand(len(lengths), num_steps) < 0.2,
    )
    reset[0, 0] = True
    x[in_padding(lengths, num_steps)] = fill
    return in_order(rnn, x), in_order(rnn, reset)


def in_padding(lengths, num_steps=S):
    return torch.arange(num_steps) >= torch.tensor(lengths).unsqueeze(1)


# Each sequence as alone


@each_option_and_form
def test_each_sequence_is_as_alone(options, form):
    rnn = make(**options)
    x, reset = padded(rnn, LENGTHS)
    function = together(rnn, form, LENGTHS)
    for h, cuts in [(make_state(rnn, "full"), reset), (None, None)][: 1 if form == "scripted" else 2]:
        got = graded(function, rnn, x, h, cuts)
        assert got["last"].shape == (rnn.num_layers * rnn.num_directions, B, 1, H)
        assert_same(got, graded(alone(rnn, LENGTHS), rnn, x, h, cuts), **TIGHT)


@pytest.mark.parametrize("what", ["out", "last", "gradient"])
def test_the_comparison_can_fail(what):
    rnn = make(num_layers=2, bidirectional=True)
    x, reset = padded(rnn, LENGTHS)
    expected = graded(alone(rnn, LENGTHS), rnn, x, None, reset)
    run, wrong = together(rnn, "lengths", LENGTHS), (9, 2, S)
    if what == "out":
        got = graded(together(rnn, "lengths", wrong), rnn, x, None, reset)
    elif what == "last":
        got = graded(lambda *args: (run(*args)[0], rnn(*args)[1]), rnn, x, None, reset)
    else:
        got = graded(run, rnn, x, None, reset)
        got["x"][2, 0] += 1e-6
    with pytest.raises(AssertionError, match={"gradient": "x"}.get(what, what)):
        assert_same(got, expected, **TIGHT)


@each_form
@plain_and_all
@pytest.mark.parametrize(
    "lengths",
    [(S, S, S), (1, 1, 1), (S, 9, 1), (4, 2, 4), (1,), (3, 1, 4, 1, 5, 9, 2, 6)],
    ids=lambda lengths: "-".join(map(str, lengths)),
)
def test_lengths_of_all_kinds(lengths, options, form):
    rnn = make(**options)
    x, reset = padded(rnn, lengths)
    h = torch.randn(rnn.num_layers * rnn.num_directions, len(lengths), 1, H).double()
    expected = graded(alone(rnn, lengths), rnn, x, h, reset)
    assert_same(graded(together(rnn, form, lengths), rnn, x, h, reset), expected, **TIGHT)
    if form == "packed" and list(lengths) == sorted(lengths, reverse=True):
        function = together(rnn, form, lengths, enforce_sorted=True)
        assert_same(graded(function, rnn, x, h, reset), expected, **TIGHT)


def test_packed_from_a_list_of_sequences():
    rnn = make(bidirectional=True)
    sequences = [torch.randn(length, IN).double() for length in (2, 7, 3)]
    out, h = rnn(pack_sequence(sequences, enforce_sorted=False))
    out, lengths = pad_packed_sequence(out, batch_first=True)
    assert lengths.tolist() == [2, 7, 3]
    for at, sequence in enumerate(sequences):
        out_alone, h_alone = rnn(sequence[None])
        assert_close(out[at, : len(sequence)], out_alone[0], **TIGHT)
        assert_close(h[:, at], h_alone[:, 0], **TIGHT)


# Some of 0: in front, in the middle and at the end, one step in all, none at all, and more sequences than a block has.
EMPTY = [(0, 9, S, 0, 1, 0), (0, 1, 0), (S, 0), (0,), (0, 0, 0), tuple(range(S + 1))]


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({"learn_initial_state": True}, "lengths"),
        ({"cell": "minlstm", "bidirectional": True, "batch_first": False}, "lengths"),
        (ALL, "lengths"),
        (ALL, "scripted"),
    ],
    ids=["learned", "minlstm", "all", "all-scripted"],
)
def test_an_empty_sequence_keeps_its_state(options, form):
    """`torch.nn.utils.rnn` packs no empty sequences."""
    rnn = make(**options)
    run = torch.jit.script(rnn) if form == "scripted" else rnn
    for lengths in EMPTY:
        x, reset = padded(rnn, lengths, fill=float("nan"))
        h = torch.randn(rnn.num_layers * rnn.num_directions, len(lengths), 1, H).double()
        function, empty = together(run, "lengths", lengths), torch.tensor(lengths) == 0
        for state, mask in ((h, reset), (None, None)):
            got = graded(function, rnn, x, state, mask)
            assert_same(got, graded(alone(rnn, lengths), rnn, x.nan_to_num(7.0), state, mask), **TIGHT)
            with torch.no_grad():
                assert_close(function(x, state, mask), (got["out"], got["last"]), **TIGHT)
            before = (initial_state(rnn) if state is None else state).expand_as(got["last"])
            assert torch.equal(got["last"][:, empty], before[:, empty])


@pytest.mark.parametrize("lengths", [(0, 9, S, 0), (0, 0)], ids=["some", "all"])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("cell", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sequences_on_every_backend(backend, cell, hooked, lengths):
    rnn = make(cell=cell, num_layers=2, bidirectional=True)
    if hooked:
        rnn.layers[0].linear.register_forward_hook(lambda *args: None)
    x, reset = padded(rnn, lengths)
    h = torch.randn(4, len(lengths), 1, H).double()
    with mingru.use_backend(backend):
        got = graded(together(rnn, "lengths", lengths), rnn, x, h, reset)
    assert_same(got, graded(alone(rnn, lengths), rnn, x, h, reset), **TIGHT)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        pytest.param("native", ALL, marks=pytest.mark.slow),
        pytest.param("torch", {}, marks=pytest.mark.slow),
        pytest.param("log", {"bidirectional": True}, marks=pytest.mark.slow),
    ],
    ids=["native", "torch", "log"],
)
@pytest.mark.filterwarnings("ignore:.*Function.*should not be instantiated:DeprecationWarning")
def test_empty_sequences_in_a_compiled_graph(backend, options):
    torch.compiler.reset()
    rnn = make(**options)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    for lengths in ((0, 9, S, 0), (0, 0, 0)):
        x, reset = padded(rnn, lengths, fill=float("nan"))
        h = torch.randn(rnn.num_layers * rnn.num_directions, len(lengths), 1, H).double()
        with mingru.use_backend(backend):
            got = graded(together(compiled, "lengths", lengths), rnn, x, h, reset)
        assert_same(got, graded(alone(rnn, lengths), rnn, x.nan_to_num(7.0), h, reset), **TIGHT)


def test_empty_sequences_in_a_trace():
    rnn = make(num_layers=2, bidirectional=True, norm="layer")
    x, reset = padded(rnn, (4, S))
    h = torch.randn(4, 2, 1, H).double()
    with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit.trace"):
        traced = torch.jit.trace(rnn, (x, h, reset, torch.tensor([4, S])), check_trace=False)
    for lengths in ((0, 9), (0, 0), (3, 0)):
        run = together(traced, "lengths", lengths)
        assert_same(
            graded(lambda *args, run=run: run(*args), rnn, x, h, reset),
            graded(alone(rnn, lengths), rnn, x, h, reset),
            **TIGHT,
        )


@pytest.mark.parametrize(("gate", "form"), [("sigmoid", "lengths"), ("rotation", "lengths"), ("rotation", "scripted")])
def test_elapsed_times_of_empty_sequences(gate, form):
    rnn = mingru.MinGRU(IN, 4, 2, bidirectional=True, gate=gate, dtype=torch.double)
    run = torch.jit.script(rnn) if form == "scripted" else rnn
    x, h, dt = torch.randn(4, S, IN).double(), torch.randn(4, 4, 1, 4).double(), torch.rand(4, S).double()
    lengths = torch.tensor([0, 7, 0, S])
    leaves = [leaf.requires_grad_() for leaf in (x, h, dt)]
    out, last = run(x, h, None, lengths, dt)
    grads = torch.autograd.grad(out.square().sum() + last.square().sum(), leaves)
    loss = h[:, lengths == 0].square().sum()
    for at in (1, 3):
        one, length = slice(at, at + 1), lengths[at]
        alone = rnn(x[one, :length], h[:, one], None, None, dt[one, :length])
        loss = loss + sum(each.square().sum() for each in alone)
        assert_close((out[one, :length], last[:, one]), alone, **TIGHT)
    assert torch.equal(last[:, lengths == 0], h[:, lengths == 0])
    assert not out[lengths == 0].any()
    assert_close(grads, torch.autograd.grad(loss, leaves), **TIGHT)


@pytest.mark.parametrize("form", ["eager", "scripted"])
@plain_and_all
def test_lengths_of_sequences_without_steps(options, form):
    rnn = make(**options)
    run = torch.jit.script(rnn) if form == "scripted" else rnn
    x, h = torch.zeros(2, 0, IN).double(), torch.randn(rnn.num_layers * rnn.num_directions, 2, 1, H).double()
    out, last = run(in_order(rnn, x), h.requires_grad_(), None, torch.tensor([0, 0]))
    assert in_order(rnn, out).shape == (2, 0, rnn.output_dims)
    assert torch.equal(last, h)
    assert torch.equal(torch.autograd.grad(last.sum(), h)[0], torch.ones_like(h))


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_with_an_empty_sequence(backend):
    rnn = mingru.MinGRU(2, 2, bidirectional=True, dtype=torch.double)
    x, h = torch.randn(3, 3, 2).double().requires_grad_(), torch.randn(2, 3, 1, 2).double().requires_grad_()

    def function(x, h):
        out, last = rnn(x, h, None, torch.tensor([2, 0, 3]))
        return out, last.square()

    with mingru.use_backend(backend):
        assert torch.autograd.gradgradcheck(function, (x, h), fast_mode=True)


@each_form
def test_states_that_expand(form):
    rnn = make(num_layers=2)
    x, reset = padded(rnn, LENGTHS)
    function = together(rnn, form, LENGTHS)
    for kind in ("batch", "one", "layer"):
        h = make_state(rnn, kind)
        expected = graded(alone(rnn, LENGTHS), rnn, x, h, reset)
        assert_same(graded(function, rnn, x, h, reset), expected, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("scripted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_lengths_of_each_integer_dtype(scripted, dtype):
    rnn = make()
    run = torch.jit.script(rnn) if scripted else rnn
    x, _ = padded(rnn, LENGTHS)
    lengths = torch.tensor(LENGTHS, dtype=dtype)
    assert_close(run(x, lengths=lengths), run(x, lengths=torch.tensor(LENGTHS)), **TIGHT)
    assert lengths.tolist() == list(LENGTHS)


@pytest.mark.parametrize("scripted", [False, pytest.param(True, marks=pytest.mark.slow)])
@plain_and_all
def test_an_empty_batch(options, scripted):
    rnn = make(**options)
    run = torch.jit.script(rnn) if scripted else rnn
    x, reset = torch.zeros(0, 5, IN).double(), torch.zeros(0, 5, dtype=torch.bool)
    out, h = run(in_order(rnn, x), None, in_order(rnn, reset), torch.zeros(0, dtype=torch.int64))
    assert in_order(rnn, out).shape == (0, 5, H * rnn.num_directions)
    assert h.shape == (rnn.num_layers * rnn.num_directions, 0, 1, H)


@plain_and_all
def test_states_go_on_from_the_true_ends(options):
    """A second call takes up each sequence where it ended."""
    options = {**options, "bidirectional": False}
    rnn = make(**options)
    x = torch.randn(B, 2 * S, IN).double()
    more = (5, 2, S)
    following = torch.stack([x[at, length : length + S] for at, length in enumerate(LENGTHS)])
    out, h = rnn(in_order(rnn, x[:, :S]), lengths=torch.tensor(LENGTHS))
    out, h = rnn(in_order(rnn, following), h, lengths=torch.tensor(more))
    for at, (length, rest) in enumerate(zip(LENGTHS, more, strict=True)):
        out_alone, h_alone = rnn(in_order(rnn, x[at : at + 1, : length + rest]))
        assert_close(in_order(rnn, out)[at, :rest], in_order(rnn, out_alone)[0, length:], **TIGHT)
        assert_close(h[:, at], h_alone[:, 0], **TIGHT)


# Nothing enters from elsewhere


@each_form
@plain_and_all
def test_out_is_0_in_the_padding(options, form):
    rnn = make(**options)
    x, reset = padded(rnn, LENGTHS)
    out, _ = together(rnn, form, LENGTHS)(x, None, reset)
    out, missing = in_order(rnn, out), in_padding(LENGTHS)
    assert (out[missing] == 0).all()
    assert (out[~missing] != 0).all()


@each_option_and_form
def test_the_padding_does_not_matter(options, form):
    rnn = make(**options)
    x, reset = padded(rnn, LENGTHS)
    h = make_state(rnn, "full")
    function = together(rnn, form, LENGTHS)
    # Scripted, other code runs from the second call on, and rounds in another order.
    for _ in range(2 if form == "scripted" else 1):
        before = graded(function, rnn, x, h, reset)
    missing = in_padding(LENGTHS)
    in_order(rnn, reset)[missing] ^= True
    for fill in (float("nan"), float("inf"), 1e300)[: 1 if form == "scripted" else 3]:
        in_order(rnn, x)[missing] = fill
        after = graded(function, rnn, x, h, reset)
        assert_same(after, before, rtol=0, atol=0)
        assert (in_order(rnn, after["x"])[missing] == 0).all()


@each_form
@pytest.mark.parametrize("cell", KINDS)
def test_sequences_do_not_know_each_other(cell, form):
    rnn = make(cell=cell, bidirectional=True, residual=True)
    lengths = (3, 4, 1)
    x, _ = padded(rnn, lengths, num_steps=5)
    h = make_state(rnn, "full")
    function = together(rnn, form, lengths)

    def numbers(x):
        leaf = x.clone().requires_grad_()
        out, last = function(leaf, h)
        (grad,) = torch.autograd.grad(out.square().sum() + last.square().sum(), leaf)
        return out.flatten(1), grad.flatten(1), last.transpose(0, 1).flatten(1)

    # Scripted, other code runs from the second call on, and rounds in another order.
    for _ in range(2):
        before = numbers(x)
    for at, length in enumerate(lengths):
        for step in range(length):
            other = x.clone()
            other[at, step, 1] += 1
            for got, expected in zip(numbers(other), before, strict=True):
                changed = (got != expected).any(1)
                assert changed[at]
                changed[at] = False
                assert not changed.any(), (at, step)


@each_form
@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_past_ignores_the_future(num_layers, form):
    rnn = make(num_layers=num_layers)
    x, _ = padded(rnn, LENGTHS)
    function = together(rnn, form, LENGTHS)
    for _ in range(3):
        before, _ = function(x)
    x[0, 5] += 1
    changed = (function(x)[0] != before).any(-1)
    assert not changed[0, :5].any()
    assert changed[0, 5:9].all()
    assert not changed[0, 9:].any()
    assert not changed[1:].any()


@each_form
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("cell", KINDS)
def test_nothing_crosses_a_reset_in_either_direction(cell, num_layers, form):
    rnn = make(cell=cell, num_layers=num_layers, bidirectional=True)
    x, reset = padded(rnn, LENGTHS)
    cuts = [0, 3, 7, 9]
    reset.zero_()
    reset[0, cuts[1:-1]] = True
    function = together(rnn, form, LENGTHS)
    for _ in range(3):
        before, _ = function(x, None, reset)
    for start, end in itertools.pairwise(cuts):
        for at in (start, end - 1):
            other = x.clone()
            other[0, at] += 1
            changed = (function(other, None, reset)[0] != before).any(-1)
            expected = torch.zeros_like(changed)
            expected[0, start:end] = True
            assert torch.equal(changed, expected), at


# Back ends and derivatives


@pytest.mark.parametrize("form", ["lengths", "packed"])
@pytest.mark.parametrize("cell", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_back_end(backend, cell, form):
    rnn = make(cell=cell, num_layers=2, bidirectional=True, residual=True, learn_initial_state=True)
    x, reset = padded(rnn, LENGTHS)
    h = make_state(rnn, "full")
    expected = graded(alone(rnn, LENGTHS), rnn, x, h, reset)
    with mingru.use_backend(backend):
        assert_same(graded(together(rnn, form, LENGTHS), rnn, x, h, reset), expected, **TIGHT)
        # What the fused path does not serve: a linear map with a hook.
        rnn.layers[0].linear.register_forward_hook(lambda *args: None)
        assert_same(graded(together(rnn, form, LENGTHS), rnn, x, h, reset), expected, **TIGHT)


FORMS_OF_CALLS = {"backend": BACKENDS, "cell": list(KINDS), "form": ["lengths", "packed"]}


@pytest.mark.parametrize(tuple(FORMS_OF_CALLS), [tuple(row.values()) for row in cover(FORMS_OF_CALLS)])
def test_second_derivatives(backend, cell, form):
    rnn = KINDS[cell](2, 2, bidirectional=True, learn_initial_state=True, dtype=torch.double)
    lengths = (2, 3, 1)
    x, h = torch.randn(3, 3, 2).double().requires_grad_(), torch.randn(2, 3, 1, 2).double().requires_grad_()
    reset = torch.tensor([[True, False, False], [False, False, True], [False, False, False]])
    names, weights = zip(*rnn.named_parameters(), strict=True)

    def function(x, h, *weights):
        def run(*args):
            return torch.func.functional_call(rnn, dict(zip(names, weights, strict=True)), args)

        if form == "lengths":
            return run(x, h, reset, torch.tensor(lengths))
        both = [pack_padded_sequence(each, torch.tensor(lengths), True, enforce_sorted=False) for each in (x, reset)]
        out, last = run(both[0], h, both[1])
        return out.data, last

    with mingru.use_backend(backend):
        assert torch.autograd.gradgradcheck(function, (x, h, *weights), fast_mode=True)


@pytest.mark.parametrize("cell", KINDS)
def test_transforms_with_lengths_fixed(cell):
    rnn = make(cell=cell, num_layers=2, bidirectional=True)
    lengths = torch.tensor(LENGTHS)
    x, reset = padded(rnn, LENGTHS)
    h = make_state(rnn, "full")

    def loss(x, h):
        out, last = rnn(x, h, reset, lengths)
        return out.square().sum() + last.sum()

    leaves = [x.clone().requires_grad_(), h.clone().requires_grad_()]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert_close(torch.func.grad(loss, (0, 1))(x, h), expected, **TIGHT)
    batch_x, batch_h = torch.stack([x, x + 1]), torch.stack([h, h - 1])
    for mapped, each in zip(
        zip(*torch.func.vmap(torch.func.grad(loss, (0, 1)))(batch_x, batch_h), strict=True),
        zip(batch_x, batch_h, strict=True),
        strict=True,
    ):
        assert_close(mapped, torch.func.grad(loss, (0, 1))(*each), **TIGHT)
    _, tangent = torch.func.jvp(loss, (x, h), (x, h))
    assert_close(tangent, sum((grad * leaf).sum() for grad, leaf in zip(expected, leaves, strict=True)), **TIGHT)


def test_models_mapped_over():
    models = [make() for _ in range(3)]
    x, _ = padded(models[0], LENGTHS)
    weights, _ = torch.func.stack_module_state(models)

    def run(weights, x):
        return torch.func.functional_call(models[0], weights, (x,), {"lengths": torch.tensor(LENGTHS)})

    out, h = torch.func.vmap(run, (0, None))(weights, x)
    for index, model in enumerate(models):
        assert_close((out[index], h[index]), model(x, lengths=torch.tensor(LENGTHS)), **TIGHT)


# Dtypes


@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_each_dtype(dtype, form):
    rnn = make(dtype, num_layers=2, bidirectional=True, residual=True, norm="layer", learn_initial_state=True)
    x, reset = padded(rnn, LENGTHS, dtype)
    for h in (None, make_state(rnn, "full", dtype)):
        got = graded(together(rnn, form, LENGTHS), rnn, x, h, reset)
        assert {name: tensor.dtype for name, tensor in got.items()} == dict.fromkeys(got, dtype)
        expected = graded(alone(rnn, LENGTHS, lambda rnn, *args: rnn(*args)), rnn, x, h, reset)
        # Each weight's gradient is summed in another order.
        eps = torch.finfo(dtype).eps
        for name in got:
            error = (got[name].double() - expected[name].double()).abs().max()
            assert error <= 8 * eps * expected[name].double().abs().max(), name


@pytest.mark.parametrize("form", ["lengths", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", KINDS)
def test_half_width_layers_round_once_after_the_linear_map(cell, dtype, form):
    rnn = make(dtype, cell=cell)
    x, _ = padded(rnn, (200, 300, 1), dtype, num_steps=300)
    out, _ = together(rnn, form, (200, 300, 1))(x)
    for at, length in enumerate((200, 300, 1)):
        pre = rnn.layers[0].linear(x[at : at + 1, :length]).double()
        truth = reference.CELLS[cell](*pre.chunk(2 if cell == "mingru" else 3, -1))
        error = reference.relative_error(out[at : at + 1, :length], truth)
        assert error <= 1.001 * torch.finfo(dtype).eps / 2


@each_form
def test_a_state_in_float32_beside_half_width_input(form):
    rnn = make(torch.bfloat16)
    x, _ = padded(rnn, LENGTHS, torch.bfloat16)
    out, h = together(rnn, form, LENGTHS)(x, make_state(rnn, "full", torch.float32))
    assert (out.dtype, h.dtype) == (torch.bfloat16, torch.float32)


@each_form
def test_autocast_keeps_the_state_in_float32(form):
    rnn = make(torch.float32, num_layers=2)
    x, _ = padded(rnn, LENGTHS, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        function = together(rnn, form, LENGTHS)
        for _ in range(3):
            out, h = function(x)
        expected = alone(rnn, LENGTHS, lambda rnn, *args: rnn(*args))(x)
    assert (out.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    assert_close((out, h), expected, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


def test_meta_device():
    rnn = make(**ALL).to("meta")
    x = in_order(rnn, torch.zeros(B, S, IN, dtype=torch.double, device="meta"))
    out, h = rnn(x, lengths=torch.tensor(LENGTHS))
    assert out.is_meta
    assert in_order(rnn, out).shape == (B, S, H * rnn.num_directions)
    assert h.shape == (rnn.num_layers * rnn.num_directions, B, 1, H)


@pytest.mark.parametrize(
    ("form", "backend"),
    [*itertools.product(["lengths", "packed"], BACKENDS), pytest.param("scripted", "auto", marks=pytest.mark.slow)],
)
def test_another_default_device(backend, form):
    rnn = make(bidirectional=True)
    x, reset = padded(rnn, LENGTHS)
    h = make_state(rnn, "full")
    lengths = torch.tensor(LENGTHS)
    inputs = [x, h, reset, lengths]
    if form == "packed":
        inputs = [pack_padded_sequence(x, lengths, True, enforce_sorted=False), h]
        inputs.append(pack_padded_sequence(reset, lengths, True, enforce_sorted=False))
    run = torch.jit.script(rnn) if form == "scripted" else rnn
    with mingru.use_backend(backend):
        expected = run(*inputs)
        with torch.device("meta"):
            out, last = run(*inputs)
    assert_close((out[0], last), (expected[0][0], expected[1]))


@pytest.mark.parametrize("form", ["lengths", "packed"])
@plain_and_all
def test_strided_input(options, form):
    rnn = make(**options)
    x, reset = padded(rnn, LENGTHS)
    wide = torch.zeros(*(2 * size for size in x.shape)).double()
    wide[::2, ::2, ::2] = x
    strided, flipped = wide[::2, ::2, ::2], x.transpose(0, 2).contiguous().transpose(0, 2)
    expected = graded(together(rnn, form, LENGTHS), rnn, x, None, reset)
    for one in (strided, flipped):
        before = one.clone()
        assert_close(together(rnn, form, LENGTHS)(one, None, reset)[0], expected["out"], **TIGHT)
        assert torch.equal(one, before), "the input was written to"


@pytest.mark.skipif("native" not in BACKENDS, reason="no kernels")
@pytest.mark.parametrize("options", [{}, {"cell": "minlstm", "bidirectional": True, "num_layers": 2}], ids=named)
def test_padding_is_skipped_without_packing(options, monkeypatch):
    rnn = make(**options)
    x, reset = padded(rnn, LENGTHS, fill=float("nan"))
    expected = graded(alone(rnn, LENGTHS), rnn, x.nan_to_num(7.0), None, reset)

    def no_packing(*args):
        raise AssertionError("the sequences were packed")

    monkeypatch.setattr("mingru.ops.layout.packing_of", no_packing)
    assert_same(graded(together(rnn, "lengths", LENGTHS), rnn, x, None, reset), expected)
    # A hook must see the steps, so this call packs them.
    rnn.layers[0].linear.register_forward_hook(lambda *args: None)
    with pytest.raises(AssertionError, match="were packed"):
        rnn(x, None, reset, torch.tensor(LENGTHS))


# Blocks and threads


def fused_and_not(rnn, x, reset, lengths):
    fused = graded(together(rnn, "lengths", lengths), rnn, x, None, reset)
    with mingru.use_backend("torch"):
        return fused, graded(together(rnn, "lengths", lengths), rnn, x, None, reset)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", KINDS)
def test_long_sequences_over_many_blocks(cell, bidirectional):
    """The kernels take 2048 rows at once."""
    rnn = make(cell=cell, bidirectional=bidirectional, learn_initial_state=True)
    lengths = (2049, 3000, 1, 2047, 700)
    x, reset = padded(rnn, lengths, num_steps=3000, fill=float("nan"))
    reset &= torch.rand(reset.shape) < 0.05
    assert_same(*fused_and_not(rnn, x, reset, lengths), rtol=1e-9, atol=1e-7)
    out, _ = rnn(x, None, reset, torch.tensor(lengths))
    for at in (0, 3):
        out_alone, _ = rnn(x[at : at + 1, : lengths[at]], None, reset[at : at + 1, : lengths[at]])
        assert_close(out[at, : lengths[at]], out_alone[0], **TIGHT)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", KINDS)
def test_batches_larger_than_a_block(cell, bidirectional):
    """Blocks end within a step."""
    rnn = make(cell=cell, bidirectional=bidirectional, learn_initial_state=True)
    lengths = tuple(torch.randint(1, 5, (5000,)).tolist())
    x, reset = padded(rnn, lengths, num_steps=4, fill=float("nan"))
    fused, expected = fused_and_not(rnn, x, reset, lengths)
    assert_same(fused, expected, rtol=1e-9, atol=1e-7)
    out, h = together(rnn, "lengths", lengths)(x, None, reset)
    for length in (1, 4):
        of_it = torch.tensor(lengths) == length
        out_alone, h_alone = rnn(x[of_it, :length], None, reset[of_it, :length])
        assert_close(out[of_it, :length], out_alone, **TIGHT)
        assert_close(h[:, of_it], h_alone, **TIGHT)


@pytest.mark.parametrize("lengths", ["long", "many"])
@pytest.mark.parametrize("cell", KINDS)
def test_threads_give_the_same_numbers(cell, lengths):
    # So many inputs that several threads copy them.
    rnn = KINDS[cell](24, 40, bidirectional=True, dtype=torch.double)
    lengths = (900, 333, 1200) if lengths == "long" else tuple(torch.randint(1, 9, (700,)).tolist())
    x, reset = padded(rnn, lengths, num_steps=max(lengths))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(graded(together(rnn, "lengths", lengths), rnn, x, None, reset))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        # The weights' gradients are summed by each thread for itself.
        assert_same(result, results[0], **TIGHT)
        for name in ("out", "last", "x"):
            assert torch.equal(result[name], results[0][name]), name


# What is refused

X = torch.zeros(3, 5, 3)
NO = torch.zeros(3, 5, dtype=torch.bool)
FULL = torch.tensor([5, 3, 1])
PACKED = pack_padded_sequence(X, FULL, batch_first=True)

BAD_CALLS = {
    "length below 0": ({"lengths": torch.tensor([5, -1, 1])}, ValueError, r"lengths must be from 0 to S = 5, got \[5"),
    "length above S": ({"lengths": torch.tensor([5, 6, 1])}, ValueError, r"lengths must be from 0 to S = 5, got \[5"),
    "lengths of float": ({"lengths": FULL.float()}, TypeError, r"lengths must be of an integer dtype, .*float32; use"),
    "lengths of bool": ({"lengths": FULL.bool()}, TypeError, r"lengths must be of an integer dtype, got torch\.bool"),
    "lengths of other batch": ({"lengths": FULL[:2]}, ValueError, r"lengths must be \(B,\) = \(3,\), got \(2,\)"),
    "lengths of two dimensions": (
        {"lengths": FULL[:, None]},
        ValueError,
        r"lengths must be \(B,\) = \(3,\), got \(3, 1\)",
    ),
    "a number": ({"lengths": torch.tensor(3)}, ValueError, r"lengths must be \(B,\) = \(3,\), got \(\)"),
    "a list": ({"lengths": [5, 3, 1]}, TypeError, r"lengths must be an integer tensor \(B,\), got list; use torch"),
    "an int": ({"lengths": 5}, TypeError, r"lengths must be an integer tensor \(B,\), got int"),
    "lengths on another device": (
        {"lengths": FULL.to("meta")},
        ValueError,
        r"lengths must be on the CPU .*, got a tensor on meta; use lengths\.cpu\(\)",
    ),
    "reset of other steps": (
        {"lengths": FULL, "reset": NO[:, :4]},
        ValueError,
        r"reset must be \(B, S\) = \(3, 5\), got \(3, 4\)",
    ),
    "reset packed beside padded x": (
        {"lengths": FULL, "reset": pack_padded_sequence(NO, FULL, batch_first=True)},
        TypeError,
        r"reset must be a bool tensor, got PackedSequence",
    ),
    "h of other batch": (
        {"lengths": FULL, "h": torch.zeros(2, 2, 1, 8)},
        ValueError,
        r"h must be expandable to \(L \* D, B, 1, H\) = \(2, 3, 1, 8\), got \(2, 2, 1, 8\)",
    ),
    "h of other batch, packed": (
        {"x": PACKED, "h": torch.zeros(2, 5, 1, 8)},
        ValueError,
        r"h must be expandable to \(L \* D, B, 1, H\) = \(2, 3, 1, 8\), got \(2, 5, 1, 8\)",
    ),
    "packed of other features": (
        {"x": pack_padded_sequence(X[..., :2], FULL, batch_first=True)},
        ValueError,
        r"x must be packed steps of 3 features because input_dims is 3, got \(9, 2\)",
    ),
    "packed without features": (
        {"x": pack_padded_sequence(X[..., 0], FULL, batch_first=True)},
        ValueError,
        r"x must be packed steps of 3 features because input_dims is 3, got \(9,\)",
    ),
    **{
        f"batch_sizes {sizes}": (
            {"x": PackedSequence(torch.zeros(rows, 3), torch.tensor(sizes))},
            ValueError,
            re.escape(
                f"x must be packed with batch_sizes that are positive, do not increase and sum to {rows}, got {sizes}; "
                "use pack_padded_sequence"
            ),
        )
        for sizes, rows in [([3, 3], 5), ([1, 3], 4), ([3, 2], 40), ([3, 0], 3), ([2, -1], 1), ([], 0), ([[2], [1]], 3)]
    },
    "too few indices of an order": (
        {"x": PackedSequence(torch.zeros(5, 3), torch.tensor([3, 2]), torch.tensor([1, 0]))},
        ValueError,
        r"x must be packed with one index in its order for each of 3 sequences, got 2; use pack_padded_sequence",
    ),
    "packed of float64": ({"x": PACKED.double()}, TypeError, r"x must be torch\.float32 .*, got torch\.float64"),
    "packed on another device": ({"x": PACKED.to("meta")}, ValueError, r"x must be on cpu .*, got a tensor on meta"),
    "lengths beside packed": (
        {"x": PACKED, "lengths": FULL},
        ValueError,
        r"lengths must be None because a PackedSequence has its own lengths, got Tensor",
    ),
    "padded reset beside packed": (
        {"x": PACKED, "reset": NO},
        TypeError,
        r"reset must be a PackedSequence like x, got Tensor; pack it with the lengths of x",
    ),
    "reset of other lengths": (
        {"x": PACKED, "reset": pack_padded_sequence(NO, torch.tensor([5, 2, 2]), batch_first=True)},
        ValueError,
        r"reset must be packed with the lengths of x, got other lengths",
    ),
    "reset in another order": (
        {
            "x": PACKED,
            "reset": pack_padded_sequence(NO, FULL.flip(0), batch_first=True, enforce_sorted=False),
        },
        ValueError,
        r"reset must be packed in the order of x, got another order",
    ),
    "reset packed of numbers": (
        {"x": PACKED, "reset": pack_padded_sequence(NO.float(), FULL, batch_first=True)},
        TypeError,
        r"reset must be of dtype torch\.bool, got torch\.float32",
    ),
    "reset packed with features": (
        {"x": PACKED, "reset": pack_padded_sequence(NO[..., None], FULL, batch_first=True)},
        ValueError,
        r"reset must be \(1, steps\) = \(1, 9\), got \(1, 9, 1\)",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case):
    args, error, message = BAD_CALLS[case]
    for kind in (mingru.MinGRU, mingru.MinLSTM):
        rnn = kind(3, 8, num_layers=2)
        with pytest.raises(error, match=f"^{kind.__name__}: {message}"):
            rnn(**{"x": X, **args})


def test_bad_lengths_in_the_order_of_time():
    rnn = mingru.MinGRU(3, 8, batch_first=False)
    with pytest.raises(ValueError, match=r"^MinGRU: lengths must be from 0 to S = 3, got \[5, 3, 1, 1, 1\]"):
        rnn(X, lengths=torch.tensor([5, 3, 1, 1, 1]))
    with pytest.raises(ValueError, match=r"^MinGRU: lengths must be \(B,\) = \(5,\), got \(3,\)"):
        rnn(X, lengths=FULL)


# End to end


def end_to_end(rnn, x, lengths, num_steps):
    """The sequences of x in one row, in the order of the layer, with what fills it up."""
    rows = [in_order(rnn, x)[at, :length] for at, length in enumerate(lengths)]
    rows.append(torch.full((num_steps - sum(lengths), rnn.input_dims), 7.0).double())
    return in_order(rnn, torch.cat(rows).unsqueeze(0))


@pytest.mark.parametrize(
    ("options", "scripted"),
    [
        *((options, False) for options in OPTIONS),
        *(pytest.param(options, True, marks=pytest.mark.slow) for options in ({}, ALL)),
    ],
    ids=lambda value: named(value) if isinstance(value, dict) else "scripted" if value else "",
)
@pytest.mark.parametrize("extra", [0, 4])
def test_one_row_end_to_end_is_each_sequence_alone(options, extra, scripted):
    rnn = make(**options)
    run = torch.jit.script(rnn) if scripted else rnn
    x, _ = padded(rnn, LENGTHS)
    num_steps = sum(LENGTHS) + extra
    reset = in_order(rnn, reset_from_lengths(torch.tensor(LENGTHS), num_steps if extra else None))

    def in_one_row(x, h, _):
        out, _ = run(end_to_end(rnn, x, LENGTHS, num_steps), None, reset)
        outs = in_order(rnn, out)[0].split([*LENGTHS, extra])[: len(LENGTHS)]
        # Each with zeros behind it, as `alone` has it.
        return in_order(rnn, torch.nn.utils.rnn.pad_sequence(outs, batch_first=True)), out.new_zeros(1)

    def truth(x, h, _):
        return alone(rnn, LENGTHS)(x)[0], x.new_zeros(1)

    assert_same(graded(in_one_row, rnn, x, None, None), graded(truth, rnn, x, None, None), **TIGHT)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("cell", KINDS)
def test_nothing_crosses_a_boundary_of_one_row(cell, num_layers):
    rnn = make(cell=cell, num_layers=num_layers, bidirectional=True, residual=True)
    lengths = (3, 1, 5)
    ends = [0, 3, 4, 9, 11]
    reset = reset_from_lengths(torch.tensor(lengths), 11)
    x = torch.randn(1, 11, IN).double()

    def numbers(x, reset):
        leaf = x.clone().requires_grad_()
        out, _ = rnn(leaf, None, reset)
        (grad,) = torch.autograd.grad(out.square().sum(), leaf)
        return torch.cat([out, grad], -1)[0]

    before, without = numbers(x, reset), numbers(x, None)
    for start, end in itertools.pairwise(ends):
        for at in range(start, end):
            other = x.clone()
            other[0, at, 2] += 1
            changed = (numbers(other, reset) != before).any(-1)
            expected = torch.zeros(11, dtype=torch.bool)
            expected[start:end] = True
            assert torch.equal(changed, expected), at
            # Without the mask all of it changes: the test sees what it looks for.
            assert (numbers(other, None) != without).any(-1).all()


def test_reset_from_lengths():
    lengths = torch.tensor([2, 1, 3])
    assert reset_from_lengths(lengths).tolist() == [[True, False, True, True, False, False]]
    # What is behind the last sequence is cut off from it.
    assert reset_from_lengths(lengths, 8).tolist() == [[True, False, True, True, False, False, True, False]]
    assert torch.equal(reset_from_lengths(lengths, 6), reset_from_lengths(lengths))
    assert reset_from_lengths(lengths[:0]).shape == (1, 0)
    assert reset_from_lengths(lengths[:0], 3).tolist() == [[True, False, False]]
    # The sum outgrows the dtype.
    small = torch.full((300,), 200, dtype=torch.uint8)
    mask = reset_from_lengths(small)
    assert mask.dtype == torch.bool
    assert torch.equal(mask.flatten().nonzero().flatten(), torch.arange(0, 60_000, 200))


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (([2, 1],), TypeError, r"lengths must be an integer tensor \(N,\), got list; use torch\.as_tensor"),
        ((FULL.float(),), TypeError, r"lengths must be of an integer dtype, got torch\.float32; use lengths\.long"),
        ((FULL.bool(),), TypeError, r"lengths must be of an integer dtype, got torch\.bool"),
        ((FULL.cfloat(),), TypeError, r"lengths must be of an integer dtype, got torch\.complex64"),
        ((torch.tensor(3),), ValueError, r"lengths must be \(N,\), got \(\)"),
        ((FULL[None],), ValueError, r"lengths must be \(N,\), got \(1, 3\)"),
        ((torch.tensor([2, 0]),), ValueError, r"lengths must be at least 1 each, got \[2, 0\]"),
        ((torch.tensor([2, -1]),), ValueError, r"lengths must be at least 1 each, got \[2, -1\]"),
        ((FULL, 8), ValueError, r"num_steps must be at least 9, the sum of lengths, got 8"),
        ((FULL, 9.0), TypeError, r"num_steps must be an int, got 9\.0"),
        ((FULL, True), TypeError, r"num_steps must be an int, got True"),
    ],
)
def test_bad_arguments_of_reset_from_lengths(args, error, message):
    with pytest.raises(error, match="^reset_from_lengths: " + message):
        reset_from_lengths(*args)


@pytest.mark.parametrize(("dtype", "steps", "length"), [(torch.uint8, 600, 200), (torch.int16, 40_000, 30_000)])
def test_lengths_of_a_dtype_that_could_not_hold_s(dtype, steps, length):
    rnn, x = mingru.MinGRU(1, 1), torch.randn(1, steps, 1)
    out, h = rnn(x, lengths=torch.tensor([length], dtype=dtype))
    torch.testing.assert_close(h[0], rnn(x[:, :length])[1][0])
    assert not out[:, length:].any()
