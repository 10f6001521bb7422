"""Sequences of different lengths: kernels that skip padding, derivatives, devices, dtypes and wrong calls.

tests/properties checks that each sequence is what it is alone.
"""

import functools
import itertools

import pytest
import torch
from cases import DOUBLE
from cover import cover
from refusals import assert_refused, by_message, wrong_shapes
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close

import mingru
from mingru.functional import reset_from_lengths

IN, H, S = 4, 5, 21
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
LENGTHS = torch.tensor([9, 1, S])
# "log" takes neither resets nor times.
BACKENDS = [name for name, can_run in mingru.backends().items() if can_run is True and name != "log"]
KINDS = {
    "mingru": mingru.MinGRU,
    "minlstm": mingru.MinLSTM,
    "minlstm_unnormalized": functools.partial(mingru.MinLSTM, normalize=False),
}
each_cell = pytest.mark.parametrize("cell", KINDS)


def make(cell="mingru", **options):
    return KINDS[cell](IN, H, **options, **DOUBLE)


def inputs(lengths, num_steps=S):
    """x with NaN in the padding, and resets."""
    x = torch.randn(len(lengths), num_steps, IN).double()
    x[torch.arange(num_steps) >= lengths.unsqueeze(1)] = torch.nan
    return x, torch.rand(len(lengths), num_steps) < 0.1


def graded(rnn, x, *args):
    """The outputs, and the gradients of x and of all weights."""
    x = x.detach().clone().requires_grad_()
    out, last = rnn(x, *args)
    weight = torch.linspace(-1, 2, out.numel()).view(out.shape)
    loss = (out * weight).sum() + last.square().sum()
    return [out, last, *torch.autograd.grad(loss, [x, *rnn.parameters()])]


# Derivatives

FORMS = {"backend": BACKENDS, "cell": list(KINDS), "form": ["lengths", "packed"]}


@pytest.mark.parametrize(tuple(FORMS), [tuple(row.values()) for row in cover(FORMS)])
def test_second_derivatives(backend, cell, form):
    rnn = KINDS[cell](2, 2, bidirectional=True, learn_initial_state=True, **DOUBLE)
    lengths = torch.tensor([2, 3, 0 if form == "lengths" else 1])
    x, h = torch.randn(3, 3, 2).double().requires_grad_(), torch.randn(2, 3, 1, 2).double().requires_grad_()
    reset = torch.tensor([[True, False, False], [False, False, True], [False, False, False]])
    names, weights = zip(*rnn.named_parameters(), strict=True)

    def function(x, h, *weights):
        def run(*args):
            return torch.func.functional_call(rnn, dict(zip(names, weights, strict=True)), args)

        if form == "lengths":
            return run(x, h, reset, lengths)
        both = [pack_padded_sequence(each, lengths, True, enforce_sorted=False) for each in (x, reset)]
        out, last = run(both[0], h, both[1])
        return out.data, last

    with mingru.use_backend(backend):
        assert torch.autograd.gradgradcheck(function, (x, h, *weights), fast_mode=True)


@each_cell
def test_transforms_with_lengths_fixed(cell):
    rnn = make(cell, num_layers=2, bidirectional=True)
    x, h, reset = torch.randn(3, S, IN).double(), torch.randn(4, 3, 1, H).double(), torch.rand(3, S) < 0.2

    def loss(x, h):
        out, last = rnn(x, h, reset, LENGTHS)
        return out.square().sum() + last.sum()

    leaves = [x.clone().requires_grad_(), h.clone().requires_grad_()]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    grad = torch.func.grad(loss, (0, 1))
    assert_close(grad(x, h), expected, **TIGHT)
    both = torch.stack([x, x + 1]), torch.stack([h, h - 1])
    for mapped, each in zip(zip(*torch.func.vmap(grad)(*both), strict=True), zip(*both, strict=True), strict=True):
        assert_close(mapped, grad(*each), **TIGHT)
    _, tangent = torch.func.jvp(loss, (x, h), (x, h))
    assert_close(tangent, sum((grad * leaf).sum() for grad, leaf in zip(expected, leaves, strict=True)), **TIGHT)
    models = [make(cell) for _ in range(3)]
    weights, _ = torch.func.stack_module_state(models)

    def run(weights, x):
        return torch.func.functional_call(models[0], weights, (x,), {"lengths": LENGTHS})

    found = zip(*torch.func.vmap(run, (0, None))(weights, x), strict=True)
    assert_close(list(found), [model(x, lengths=LENGTHS) for model in models], **TIGHT)


# Devices and dtypes


@pytest.mark.parametrize(
    ("form", "backend"),
    [*itertools.product(["lengths", "packed"], BACKENDS), pytest.param("scripted", "auto", marks=pytest.mark.slow)],
)
def test_another_default_device(backend, form):
    rnn, h = make(bidirectional=True), torch.randn(2, 3, 1, H).double()
    x, reset = inputs(LENGTHS)
    given = [x, h, reset, LENGTHS]
    if form == "packed":
        x, reset = (pack_padded_sequence(each, LENGTHS, True, enforce_sorted=False) for each in (x, reset))
        given = [x, h, reset]
    run = torch.jit.script(rnn) if form == "scripted" else rnn
    with mingru.use_backend(backend):
        expected = run(*given)
        with torch.device("meta"):
            out, last = run(*given)
    assert_close((out[0], last), (expected[0][0], expected[1]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("scripted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_lengths_of_each_integer_dtype(scripted, dtype):
    rnn, (x, _) = make(), inputs(LENGTHS)
    run = torch.jit.script(rnn) if scripted else rnn
    lengths = LENGTHS.to(dtype)
    assert_close(run(x, lengths=lengths), rnn(x, lengths=LENGTHS), **TIGHT)
    assert torch.equal(lengths, LENGTHS.to(dtype))


@pytest.mark.parametrize(("dtype", "steps", "length"), [(torch.uint8, 600, 200), (torch.int16, 40_000, 30_000)])
def test_lengths_of_a_dtype_that_could_not_hold_s(dtype, steps, length):
    rnn, x = mingru.MinGRU(1, 1), torch.randn(1, steps, 1)
    out, h = rnn(x, lengths=torch.tensor([length], dtype=dtype))
    assert_close(h[0], rnn(x[:, :length])[1][0])
    assert not out[:, length:].any()


def test_lengths_in_a_trace():
    rnn = make(num_layers=2, bidirectional=True, norm="layer")
    x, h, reset, dt = (
        torch.randn(2, S, IN).double(),
        torch.randn(4, 2, 1, H).double(),
        torch.rand(2, S) < 0.2,
        torch.rand(2, S).double(),
    )
    with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit.trace"):
        traced = torch.jit.trace(rnn, (x, h, reset, torch.tensor([4, S]), dt), check_trace=False)
    for lengths in ((0, 9), (0, 0), (3, 0)):
        args = h, reset, torch.tensor(lengths), dt
        assert_close(graded(traced, x, *args), graded(rnn, x, *args), **TIGHT)


# Padding is skipped, in blocks of 2048 rows, by several threads


@pytest.mark.skipif("native" not in BACKENDS, reason="no kernels")
@pytest.mark.parametrize("options", [{}, {"cell": "minlstm", "bidirectional": True, "num_layers": 2}])
def test_padding_is_skipped_without_packing(options, monkeypatch):
    rnn, (x, reset) = make(**options), inputs(LENGTHS)

    def no_packing(*args):
        raise AssertionError("the sequences were packed")

    monkeypatch.setattr("mingru.ops.layout.packing_of", no_packing)
    rnn(x, None, reset, LENGTHS)
    # A hook must see the steps, so this call packs them.
    rnn.layers[0].linear.register_forward_hook(lambda *args: None)
    with pytest.raises(AssertionError, match="were packed"):
        rnn(x, None, reset, LENGTHS)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["long", "many"])
@each_cell
def test_many_blocks(cell, kind, bidirectional):
    """Of long sequences, and of many that end within a step."""
    rnn = make(cell, bidirectional=bidirectional, learn_initial_state=True)
    lengths = torch.tensor([2049, 3000, 1, 2047, 700]) if kind == "long" else torch.randint(1, 5, (5000,))
    x, reset = inputs(lengths, lengths.max())
    fused = graded(rnn, x, None, reset, lengths)
    with mingru.use_backend("torch"):
        assert_close(fused, graded(rnn, x, None, reset, lengths), rtol=1e-9, atol=1e-7)
    for at in (0, 3):
        one = slice(at, at + 1)
        out, last = rnn(x[one, : lengths[at]], None, reset[one, : lengths[at]])
        assert_close((fused[0][one, : lengths[at]], fused[1][:, one]), (out, last), **TIGHT)


@pytest.mark.parametrize("kind", ["long", "many"])
@each_cell
def test_threads_give_the_same_numbers(cell, kind):
    # So many inputs that several threads copy them.
    rnn = KINDS[cell](24, 40, bidirectional=True, **DOUBLE)
    lengths = torch.tensor([900, 333, 1200]) if kind == "long" else torch.randint(1, 9, (700,))
    x, reset = torch.randn(len(lengths), lengths.max(), 24).double(), torch.rand(len(lengths), lengths.max()) < 0.2
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(graded(rnn, x, None, reset, lengths))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        # The weights' gradients are summed by each thread for itself.
        assert_close(result, results[0], **TIGHT)
        assert all(map(torch.equal, result[:3], results[0][:3]))


# What is refused

X = torch.zeros(3, 5, 3)
NO = torch.zeros(3, 5, dtype=torch.bool)
FULL = torch.tensor([5, 3, 1])


def packed(steps, lengths=FULL):
    return pack_padded_sequence(steps, lengths, batch_first=True, enforce_sorted=False)


IN_ORDER = pack_padded_sequence(X, FULL, batch_first=True)
EXPANDABLE = "h must be expandable to (L * D, B, 1, H) = (2, 3, 1, 8), got"
STEPS = "x must be packed steps of 3 features because input_dims is 3, got"
OTHER_ORDER = pack_padded_sequence(NO, FULL.flip(0), True, enforce_sorted=False)
TOO_FEW = PackedSequence(torch.zeros(5, 3), torch.tensor([3, 2]), torch.tensor([1, 0]))
BATCH_SIZES = [([3, 3], 5), ([1, 3], 4), ([3, 2], 40), ([3, 0], 3), ([2, -1], 1), ([], 0), ([[2], [1]], 3)]
BAD_CALLS = {
    **wrong_shapes("lengths", r"\(B,\) = \(3,\)", FULL[:2], FULL[:, None], torch.tensor(3)),
    **by_message(
        [
            ({"lengths": torch.tensor([5, -1, 1])}, ValueError, "lengths must be from 0 to S = 5, got [5, -1"),
            ({"lengths": torch.tensor([5, 6, 1])}, ValueError, "lengths must be from 0 to S = 5, got [5, 6"),
            ({"lengths": FULL.float()}, TypeError, "lengths must be of an integer dtype, got torch.float32; use"),
            ({"lengths": FULL.bool()}, TypeError, "lengths must be of an integer dtype, got torch.bool"),
            ({"lengths": [5, 3, 1]}, TypeError, "lengths must be an integer tensor (B,), got list; use torch"),
            ({"lengths": 5}, TypeError, "lengths must be an integer tensor (B,), got int"),
            ({"lengths": FULL, "reset": NO[:, :4]}, ValueError, "reset must be (B, S) = (3, 5), got (3, 4)"),
            ({"lengths": FULL, "reset": packed(NO)}, TypeError, "reset must be a bool tensor, got PackedSequence"),
            ({"lengths": FULL, "h": torch.zeros(2, 2, 1, 8)}, ValueError, f"{EXPANDABLE} (2, 2, 1, 8)"),
            ({"x": packed(X), "h": torch.zeros(2, 5, 1, 8)}, ValueError, f"{EXPANDABLE} (2, 5, 1, 8)"),
            ({"x": packed(X[..., :2])}, ValueError, f"{STEPS} (9, 2)"),
            ({"x": packed(X[..., 0])}, ValueError, f"{STEPS} (9,)"),
            ({"x": TOO_FEW}, ValueError, "x must be packed with one index in its order for each of 3 sequences, got 2"),
            (
                {"x": packed(X).double()},
                TypeError,
                "x must be torch.float32 like the layer's weight, got torch.float64",
            ),
            ({"x": packed(X).to("meta")}, ValueError, "x must be on cpu like the layer's weight, got a tensor on meta"),
            (
                {"x": packed(X), "lengths": FULL},
                ValueError,
                "lengths must be None because a PackedSequence has its own",
            ),
            ({"x": packed(X), "reset": NO}, TypeError, "reset must be a PackedSequence like x, got Tensor; pack it"),
            (
                {"x": IN_ORDER, "reset": pack_padded_sequence(NO, torch.tensor([5, 2, 2]), True)},
                ValueError,
                "reset must be packed with the lengths of x, got other lengths",
            ),
            ({"x": IN_ORDER, "reset": OTHER_ORDER}, ValueError, "reset must be packed in the order of x, got another"),
            (
                {"x": packed(X), "reset": packed(NO.float())},
                TypeError,
                "reset must be of dtype torch.bool, got torch.f",
            ),
            ({"x": packed(X), "reset": packed(NO[..., None])}, ValueError, "reset must be (1, steps) = (1, 9), got (1"),
        ]
    ),
    **by_message(
        (
            {"x": PackedSequence(torch.zeros(rows, 3), torch.tensor(sizes))},
            ValueError,
            f"x must be packed with batch_sizes that are positive, do not increase and sum to {rows}, got {sizes}; use",
        )
        for sizes, rows in BATCH_SIZES
    ),
    "on another device": (
        {"lengths": FULL.to("meta")},
        ValueError,
        r"lengths must be on the CPU .*, got a tensor on meta; use lengths\.cpu\(\)",
    ),
}


def test_bad_calls():
    for kind in (mingru.MinGRU, mingru.MinLSTM):
        rnn = kind(3, 8, num_layers=2)
        assert_refused(lambda rnn=rnn, **args: rnn(**{"x": X, **args}), BAD_CALLS, f"{kind.__name__}: ")


def test_bad_lengths_in_the_order_of_time():
    rnn = mingru.MinGRU(3, 8, batch_first=False)
    with pytest.raises(ValueError, match=r"^MinGRU: lengths must be from 0 to S = 3, got \[5, 3, 1, 1, 1\]"):
        rnn(X, lengths=torch.tensor([5, 3, 1, 1, 1]))
    with pytest.raises(ValueError, match=r"^MinGRU: lengths must be \(B,\) = \(5,\), got \(3,\)"):
        rnn(X, lengths=FULL)


# Sequences end to end


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
