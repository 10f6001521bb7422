"""Every backend of every recurrence against the float64 reference: values, gradients of everything, and properties."""

import math
from itertools import pairwise

import pytest
import reference
import torch
from calls import ALL, BACKENDS, TIGHT, assert_same, each, exact, graded, make, run, supports
from cover import cover, named
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import mingru
from mingru import ops
from mingru.ops.cells import TIMED, parts_of

LENGTHS = [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 257]
NOT_LOG = [name for name in BACKENDS if name != "log"]

OPTIONS = {
    "cell": list(reference.CELLS),
    "activation": ["positive", "linear", "tanh"],
    "reverse": [False, True],
    "with_reset": [False, True],
    "with_dt": [False, True],
    "min_decay": [0.0, 0.25],
}
# Orders in memory of the inputs, and whether time is the first dimension.
MEMORY = {
    "contiguous": lambda *inputs: inputs,
    "time first": lambda *inputs: [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs],
    "interleaved": lambda *inputs: torch.stack(inputs, -1).unbind(-1),
    "flipped": lambda *inputs: [x.flip(-1).contiguous().flip(-1) for x in inputs],
    "parts of a tensor": lambda *inputs: torch.cat(inputs, 2).chunk(len(inputs), 2),
}
TABLE = {**OPTIONS, "steps": LENGTHS, "features": [(6,), (18,), (2, 3, 4)], "memory": list(MEMORY)}
TABLE["time_first"] = [False, True]


def is_allowed(backend):
    def allowed(row):
        return supports(backend, row["cell"], row["activation"]) and (
            row["cell"] in TIMED or not (row["with_dt"] or row["min_decay"])
        )

    return allowed


def table(factors, *more):
    """Rows in which, for each backend, each two values of two options meet, and more rows."""
    # All backends but "log" compute every cell.
    covered = {backend: cover(factors, is_allowed(backend)) for backend in ("log", "torch")}
    rows = [
        (backend, row)
        for backend in ALL
        for row in [*covered.get(backend, covered["torch"]), *(row for row in more if is_allowed(backend)(row))]
    ]
    return pytest.mark.parametrize(("backend", "row"), rows, ids=lambda x: x if isinstance(x, str) else named(x))


# Each three values of three options, for sequences in several chunks and a rest.
USUAL = {"steps": 65, "features": (6,), "memory": "contiguous", "time_first": False}


@table(TABLE, *({**row, **USUAL} for row in cover(OPTIONS, is_allowed("torch"), strength=3)))
def test_values_and_gradients(backend, row):
    cell, time_first = row["cell"], row["time_first"]
    inputs, h, initial, reset, dt = make(cell, 3, row["steps"], *row["features"], reset=row["with_reset"])
    options = {name: row[name] for name in ("activation", "reverse", "min_decay")}
    tensors = [h, initial, *([dt] if row["with_dt"] else []), *inputs]

    def split(args):
        h, initial, *rest = args
        return rest[-len(inputs) :], h, initial, reset, rest[0] if row["with_dt"] else None

    def got(*args):
        inputs, h, initial, reset, dt = split(args)
        inputs = MEMORY[row["memory"]](*inputs)
        if time_first:
            inputs, reset, dt = [x.transpose(0, 1) for x in inputs], *(x if x is None else x.t() for x in (reset, dt))
        before = [x.detach().clone() for x in inputs]
        out, last = run(backend, cell, inputs, h, initial, reset, dt, time_first=time_first, **options)
        assert out.is_contiguous() or backend == "traceable"
        assert all(torch.equal(x, copy) for x, copy in zip(inputs, before, strict=True)), "an input was written to"
        return out.transpose(0, 1) if time_first else out, last

    names = ["out", "last", *(f"gradient {index} of h, initial, dt and inputs" for index in range(len(tensors)))]
    expected = graded(lambda *args: exact(cell, *split(args), **options), tensors)
    assert_same(graded(got, tensors), expected, names)
    # Other code runs without gradients.
    with torch.no_grad():
        assert_same(got(*tensors), expected[:2], names[:2])


def test_the_comparison_can_fail():
    inputs, h, initial, reset, _ = make("mingru", 3, 20, reset=True)
    expected = graded(lambda *args: exact("mingru", args[:2], *args[2:], reset), [*inputs, h, initial])
    inputs[0][1, 7, 2] += 1e-6
    got = graded(lambda *args: run("torch", "mingru", args[:2], *args[2:], reset), [*inputs, h, initial])
    with pytest.raises(AssertionError, match="out"):
        assert_same(got, expected, ["out", "last", *range(4)])


@pytest.mark.parametrize("activation", ["linear", "tanh"])
def test_the_log_backend_needs_a_positive_candidate(activation):
    with pytest.raises(ValueError, match="may be negative"):
        mingru.functional.mingru(torch.zeros(1, 1), torch.zeros(1, 1), activation=activation, backend="log")


SCANS = {
    "steps": LENGTHS,
    "dtype": [torch.double, torch.cdouble],
    "reverse": [False, True],
    "with_reset": [False, True],
    "features": [(), (5,), (2, 3)],
    "with_lengths": [False, True],
}


def scan_inputs(batch, steps, *rest, dtype=torch.double):
    """Return a, of at most 1, b and h."""
    a, b = torch.randn(2, batch, steps, *rest, dtype=dtype)
    return a / a.abs().clamp_min(1), b, torch.randn(batch, 1, *rest, dtype=dtype)


def padded(x, lengths, value):
    """Return x with a value after the end of each sequence."""
    return torch.stack(
        [torch.cat([row[:end], torch.full_like(row[end:], value)]) for row, end in zip(x, lengths, strict=True)]
    )


def one_by_one(a, b, h, reverse, reset, lengths):
    """Return the states of each sequence without its padding, which is 0, and the last states."""
    outs, lasts = [], []
    for index, end in enumerate(lengths.tolist()):
        each = slice(index, index + 1), slice(end)
        out, last = b[each], h[index : index + 1]
        if end > 0:
            out = reference.linear_scan(a[each], b[each], last, reverse, None if reset is None else reset[each])
            last = out[:, :1] if reverse else out[:, -1:]
        outs.append(torch.cat([out, b.new_zeros(1, b.shape[1] - end, *b.shape[2:])], 1))
        lasts.append(last)
    return torch.cat(outs), torch.cat(lasts)


@pytest.mark.parametrize("backend", NOT_LOG)
@pytest.mark.parametrize("row", cover(SCANS), ids=named)
def test_linear_scan_values_and_gradients(backend, row):
    tensors = scan_inputs(3, row["steps"], *row["features"], dtype=row["dtype"])
    reset = torch.rand(3, row["steps"]) < 0.2 if row["with_reset"] else None
    options = {"reverse": row["reverse"], "reset": reset}
    if row["with_lengths"]:
        lengths = torch.tensor([row["steps"], row["steps"] // 2, 0])
        # Nothing in the padding reaches a result.
        tensors = [padded(x, lengths, torch.nan) if x.shape[1] > 1 else x for x in tensors]
        got = graded(
            lambda *args: mingru.functional.linear_scan(*args, **options, lengths=lengths, backend=backend), tensors
        )
        expected = graded(lambda *args: one_by_one(*args, **options, lengths=lengths), tensors)
        return assert_same(got, expected, ["out", "last", "a", "b", "h"])
    got = graded(lambda *args: [mingru.functional.linear_scan(*args, **options, backend=backend)], tensors)
    expected = graded(lambda *args: [reference.linear_scan(*args, **options)], tensors)
    return assert_same(got, expected, ["out", "a", "b", "h"])


@pytest.mark.parametrize(
    ("dtype", "lengths"), [(torch.double, None), (torch.cdouble, None), (torch.double, torch.tensor([17, 5]))]
)
@pytest.mark.parametrize("backend", NOT_LOG)
def test_derivatives_of_linear_scan(backend, dtype, lengths):
    leaves = [tensor.requires_grad_() for tensor in scan_inputs(2, 17, 2, dtype=dtype)]
    reset = torch.rand(2, 17) < 0.2

    def function(*leaves):
        return mingru.functional.linear_scan(*leaves, reset=reset, lengths=lengths, backend=backend)

    assert gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


def test_a_scans_gradient_is_a_reversed_scan():
    a, b = torch.rand(2, 50, 3).double(), torch.randn(2, 50, 3).double().requires_grad_()
    grad_out = torch.randn(2, 50, 3).double()
    out = mingru.functional.linear_scan(a, b)
    (grad_b,) = torch.autograd.grad(out, b, grad_out)
    later = torch.cat([a[:, 1:], torch.zeros(2, 1, 3)], 1)
    torch.testing.assert_close(grad_b, mingru.functional.linear_scan(later, grad_out, reverse=True))


@table({**OPTIONS, "steps": [5, 18]})
def test_first_and_second_derivatives(backend, row):
    cell, steps = row["cell"], row["steps"]
    inputs, h, initial, reset, dt = make(cell, 1, steps, 2, reset=row["with_reset"])
    # The derivative of g jumps at 0; numbers measured across the jump mean nothing.
    inputs[-1] += 0.1 * inputs[-1].sign()
    options = {name: row[name] for name in ("activation", "reverse", "min_decay")}
    leaves = [x.requires_grad_() for x in ([*inputs, h, initial, dt] if row["with_dt"] else [*inputs, h, initial])]

    def function(*leaves):
        *inputs, h, initial = leaves[:-1] if row["with_dt"] else leaves
        return run(backend, cell, inputs, h, initial, reset, leaves[-1] if row["with_dt"] else None, **options)

    # Fast, which checks a random direction: each number of a first derivative is compared above.
    assert gradcheck(function, leaves, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize(("backend", "cell"), each(NOT_LOG))
def test_forward_mode_and_vmap(backend, cell):
    inputs, h, initial, reset, dt = make(cell, 2, 18, reset=True)
    timed = {"min_decay": 0.1} if cell in TIMED else {}
    primals = (*inputs, h, initial, *([dt] if timed else []))
    tangents = tuple(torch.randn_like(tensor) for tensor in primals)

    def function(compute, reset, *primals):
        rest = primals[len(inputs) :]
        return compute(primals[: len(inputs)], *rest[:2], reset, *rest[2:], **timed)[0]

    def got(*primals, reset=reset):
        return function(lambda *args, **options: run(backend, cell, *args, **options), reset, *primals)

    def expected(*primals):
        return function(lambda *args, **options: exact(cell, *args, **options), reset, *primals)

    torch.testing.assert_close(*(torch.func.jvp(each, primals, tangents) for each in (got, expected)), **TIGHT)

    def one(reset, *primals):
        return got(*(x.unsqueeze(0) for x in primals), reset=reset.unsqueeze(0)).squeeze(0)

    torch.testing.assert_close(torch.vmap(one)(reset, *primals), expected(*primals), **TIGHT)
    every = tuple(range(1, 1 + len(primals)))
    grads = torch.vmap(torch.func.grad(lambda *args: one(*args).square().sum(), every))(reset, *primals)
    leaves = [x.clone().requires_grad_() for x in primals]
    torch.testing.assert_close(grads, torch.autograd.grad(expected(*leaves).square().sum(), leaves), **TIGHT)


@pytest.mark.parametrize("backend", ALL)
def test_gradient_at_the_kink_and_at_a_state_of_zero(backend):
    candidate = torch.tensor([[0.0], [-0.0]], requires_grad=True)
    h = torch.zeros(2, 1, requires_grad=True)
    out, _ = run(backend, "mingru", [torch.zeros(2, 1), candidate], h, h.detach())
    grad_candidate, grad_h = torch.autograd.grad(out.sum(), (candidate, h))
    # z = 1/2 and g'(0) = 1; d/dh = 1 - z.
    assert grad_candidate.flatten().tolist() == [0.5, 0.5]
    assert grad_h.flatten().tolist() == [0.5, 0.5]


@pytest.mark.parametrize("dt", [None, torch.ones(1, 1).double()])
@pytest.mark.parametrize("backend", ALL)
def test_gradient_at_the_bound_of_the_decay(backend, dt):
    """At a gate of -log(min_decay), formulas of two sides meet."""
    gate = torch.full((1, 1), math.log(4.0), dtype=torch.double, requires_grad=True)
    zero, one = torch.zeros(1, 1).double(), torch.ones(1, 1).double()
    out, _ = run(backend, "mingru", [gate, zero], one, zero, None, dt, min_decay=0.25)
    # sigma(-gate) = 0.2, r = 0.25 + 0.75 * 0.2 and h' = r + (1 - r) g(0).
    torch.testing.assert_close(*torch.autograd.grad(out, gate), torch.full((1, 1), -0.75 * 0.2 * 0.8 * 0.5).double())


@pytest.mark.parametrize("steps", [100, 10_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_float32_error_by_length(steps):
    gate, candidate = (2 * torch.randn(1, steps, 2) for _ in range(2))
    # Float64 by the same chunks, itself compared with step-by-step float64 where that is fast.
    truth = mingru.functional.mingru(gate.double(), candidate.double(), backend="torch")
    first = [x[:, :1000].double() for x in (gate, candidate)]
    assert reference.relative_error(truth[:, :1000], reference.mingru(*first)) < 1e-14
    for backend in NOT_LOG:
        if backend != "sequential":
            assert reference.relative_error(mingru.functional.mingru(gate, candidate, backend=backend), truth) <= 2e-6


# Inputs before the candidate and options, and the number of steps that the state lasts.
LONG = [
    ("mingru", [-14.3], {}, 1.6e6),
    ("mingru", [-8.0], {}, 3000.0),
    ("mingru", [-3.0], {"min_decay": 0.999}, 2.1e4),
    ("mingru", [-8.0], {"dt": 1e-3}, 3e6),
    ("mingru_signed", [-14.3], {}, 8e5),
    ("mingru_rotation", [-14.3], {}, 1.6e6),
    ("mingru_quaternion", [-14.3], {}, 1.6e6),
    ("minlstm", [0.0, -14.3], {}, 8e5),
    ("minlstm_unnormalized", [14.3, -14.3], {}, 1.6e6),
]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("cell", "gates", "options", "lifetime"), LONG)
def test_errors_of_long_memories_grow_like_a_random_walk(cell, gates, options, lifetime, reverse):
    """A decay near 1, rounded to float32, would have the same error in each step that the state lasts."""
    steps, size = 100_000, max(2, parts_of(cell))
    inputs = [torch.full((1, steps, size), gate) for gate in gates]
    if parts_of(cell) > 1:
        inputs[0][..., 1:] = 0.0  # the angle
    inputs += [0.5 + torch.rand(1, steps, size), 0.5 + torch.rand(1, 1, size)]
    dt = torch.full((1, steps), options["dt"]) if "dt" in options else None

    def by_native(*inputs):
        *inputs, h = inputs
        time = None if dt is None else dt.to(h.dtype)
        options_of = {"activation": "linear", "min_decay": options.get("min_decay", 0.0), "reverse": reverse}
        return run("native", cell, inputs, h, torch.zeros_like(h), None, time, **options_of)

    weight = torch.rand(1, steps, size)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out, _ = by_native(*leaves)
        results.append([out, *torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)])
    for index, (got, truth) in enumerate(zip(*results, strict=True)):
        size = truth.abs().amax(1, keepdim=True)
        if parts_of(cell) == 4 and index == 1:
            # The components of a vector are as exact as the largest one.
            size[..., 1:] = size[..., 1:].amax(-1, keepdim=True)
        error = ((got - truth).abs() / size).nan_to_num().max()
        assert error <= 5e-7 * min(lifetime, steps) ** 0.5, f"gradient {index}" if index else "states"


def test_gates_near_0_and_1():
    gate = torch.tensor([-90.0, -30.0, -10.0, 0.0, 10.0, 30.0, 90.0]).repeat(20).reshape(1, -1, 1).repeat(1, 1, 4)
    candidate = torch.tensor([-80.0, -1.0, 1.0, 1e4]).expand_as(gate)
    truth = reference.mingru(gate.double(), candidate.double())
    for backend in [*NOT_LOG, "traceable"]:
        out, _ = run(backend, "mingru", [gate, candidate], torch.full((1, 1, 4), 0.5), torch.tensor(0.5))
        assert reference.relative_error(out, truth) <= 2e-6, backend


@pytest.mark.parametrize(("backend", "cell"), each())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_is_float32_inside(backend, cell, dtype):
    inputs, h, initial, reset, dt = make(cell, 2, 300, 4, dtype=dtype, reset=True)
    activation = "positive" if ops.cells.CELLS[cell].has_logarithms else "tanh"
    if activation == "positive":
        # Then no terms cancel.
        h, initial = h.abs(), initial.abs()
    for timed in ({}, {"dt": dt, "min_decay": 0.1}) if cell in TIMED and backend != "log" else ({},):
        leaves = [x.clone().requires_grad_() for x in (*inputs, h, initial)]
        call = (leaves[:-2], *leaves[-2:], reset)
        out, last = run(backend, cell, *call, activation=activation, **timed)
        assert out.dtype == last.dtype == dtype
        wide = [x.double() for x in leaves]
        timed64 = {**timed, "dt": dt.double()} if timed else {}
        truth, _ = exact(cell, wide[:-2], *wide[-2:], reset, activation=activation, **timed64)
        if activation == "positive" and not timed:
            # One rounding of the result and no more (the logarithm is less exact than that).
            allowed = torch.finfo(dtype).eps / 2 * (1.001 if backend != "log" else 1.1)
            assert reference.relative_error(out, truth) <= allowed
        else:
            # And the error of float32, whose terms may cancel.
            assert ((out.double() - truth).abs() <= torch.finfo(dtype).eps / 2 * truth.abs() + 1e-5).all()
        out.float().square().sum().backward()
        assert all(leaf.grad is not None and leaf.grad.dtype == dtype for leaf in leaves)
    # A float32 state beside bfloat16 or float16 stays float32.
    assert (
        run(backend, cell, inputs, h.float(), initial.float(), reset, activation=activation)[1].dtype == torch.float32
    )


@pytest.mark.parametrize("backend", ALL)
def test_expanded_inputs_and_no_features(backend):
    inputs, h, initial, _, _ = make("mingru", 3, 40, 4)
    one = inputs[0][:1, :1, :1].expand(3, 40, 4)
    expected = run(backend, "mingru", [one.clone(), inputs[1]], h, initial)
    torch.testing.assert_close(run(backend, "mingru", [one, inputs[1]], h, initial), expected)
    if backend != "traceable":
        args = [x[..., 0] for x in (*inputs, h)]
        torch.testing.assert_close(mingru.functional.mingru(*args, backend=backend), reference.mingru(*args))


@pytest.mark.parametrize(("backend", "cell"), each(BACKENDS))
def test_outputs_are_not_views(backend, cell):
    inputs, h, initial, _, _ = make(cell, 2, 20)
    for leaf in (inputs[0], inputs[0].clone().requires_grad_()):
        out, last = run(backend, cell, [leaf, *inputs[1:]], h, initial)
        assert not out._is_view()
        assert not last._is_view()


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (0, 0, 4), (2, 5, 0)])
@pytest.mark.parametrize(("backend", "cell"), each())
def test_nothing_in_nothing_out(backend, cell, shape):
    gate = torch.zeros(shape, requires_grad=True)
    h = torch.ones(shape[0], 1, shape[2], requires_grad=True)
    reset = torch.zeros(shape[:2], dtype=torch.bool)
    out, last = run(backend, cell, [gate] * ops.NUM_INPUTS[cell], h, torch.tensor(0.5), reset)
    assert out.shape == shape
    torch.testing.assert_close(last, h)
    torch.autograd.grad(last.sum() + out.sum(), (h, gate))


@pytest.mark.parametrize("backend", [*NOT_LOG, "traceable"])
@pytest.mark.parametrize(("index", "bad"), [(1, math.nan), (1, math.inf), (1, -math.inf), (0, math.nan)])
@pytest.mark.parametrize("distance", [25, 2])
@pytest.mark.parametrize("reverse", [False, True])
def test_nan_and_infinity_pass_and_stop_at_a_reset(backend, index, bad, distance, reverse):
    inputs, h, initial, _, _ = make("mingru", 2, 60, 3)
    where = 40 if reverse else 16
    at = where + (-distance if reverse else distance)
    reset = torch.zeros(2, 60, dtype=torch.bool)
    reset[:, at] = True
    clean = [x.clone() for x in inputs]
    inputs[index][0, where, 1] = bad
    options = {"activation": "linear", "reverse": reverse}
    out, _ = run(backend, "mingru", inputs, h, initial, reset, **options)
    expected, _ = run(backend, "mingru", clean, h, initial, reset, **options)
    tainted = torch.zeros_like(out, dtype=torch.bool)
    tainted[0, slice(at + 1, where + 1) if reverse else slice(where, at), 1] = True
    assert not out[tainted].isfinite().any()
    torch.testing.assert_close(out[~tainted], expected[~tainted], rtol=0, atol=0)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), steps=st.integers(1, 120), seed=st.integers(0, 2**31))
def test_properties(data, steps, seed):
    """Segments joined equal the whole, and a change reaches only later steps up to a reset of the same sequence."""
    torch.manual_seed(seed)
    backend = data.draw(st.sampled_from(ALL))
    reverse = data.draw(st.booleans())
    (gate, candidate), h, initial, reset, _ = make("mingru", 3, steps, 2, reset=True)
    whole, last = run(backend, "mingru", [gate, candidate], h, initial, reset, reverse=reverse)

    ends = [0, *sorted(data.draw(st.lists(st.integers(0, steps), max_size=3))), steps]
    state, segments = h, []
    spans = list(pairwise(ends))
    for start, end in reversed(spans) if reverse else spans:
        inputs = [gate[:, start:end], candidate[:, start:end]]
        out, state = run(backend, "mingru", inputs, state, initial, reset[:, start:end], reverse=reverse)
        segments.append(out)
    torch.testing.assert_close(torch.cat(segments[::-1] if reverse else segments, 1), whole)
    torch.testing.assert_close(state, last)

    at = data.draw(st.integers(0, steps - 1))
    changed = candidate.clone()
    changed[1, at] += 1.0
    out, _ = run(backend, "mingru", [gate, changed], h, initial, reset, reverse=reverse)
    difference = (out - whole).abs().amax(-1) > 1e-9
    expected = torch.zeros_like(difference)
    for t in range(at, -1, -1) if reverse else range(at, steps):
        if t != at and reset[1, t]:
            break
        expected[1, t] = True
    assert not (difference & ~expected).any()
    assert difference[1, at]


def test_threads_give_the_same_numbers():
    inputs, h, initial, _, _ = make("mingru", 2, 3000, 40, dtype=torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([run(backend, "mingru", inputs, h, initial)[0] for backend in ("torch", "traceable")])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_for_backward(backend):
    """Values for each value of the states; `docs/how_it_works.md` has these figures."""
    most = {"native": 3.1, "triton": 3.1, "torch": 3.1, "sequential": 10.1, "log": 13.1}
    shape = (4, 256, 32)
    pre = torch.randn(4, 256, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        mingru.functional.mingru(*pre.chunk(2, -1), backend=backend)
    assert sum(kept) / math.prod(shape) <= most[backend]


@pytest.mark.parametrize("backend", NOT_LOG)
@pytest.mark.parametrize("reverse", [False, True])
def test_linear_scan_that_grows(backend, reverse):
    """Decays above 1 are allowed; a product of them that overflows must not show where no state does."""
    steps = 1_000
    a, b = torch.full((1, steps, 1), 3.0), torch.zeros(1, steps, 1)
    at = 20 if reverse else steps - 21
    b[0, at] = 1.0
    b.requires_grad_()
    out = mingru.functional.linear_scan(a, b, reverse=reverse, backend=backend)
    expected = reference.linear_scan(a.double(), b.detach().double(), reverse=reverse)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=0)
    early = steps - 21 if reverse else 20
    (grad,) = torch.autograd.grad(out[:, early].sum(), b)
    assert grad.isfinite().all()
    torch.testing.assert_close(grad[0, steps - 1 if reverse else 0, 0].double(), torch.tensor(3.0).double() ** 20)


def test_forward_over_forward_is_refused_rather_than_wrong():
    x = torch.randn(1, 5, 2)

    def inner(x):
        return torch.func.jvp(lambda x: mingru.functional.mingru(x, x), (x,), (torch.ones_like(x),))[1]

    with pytest.raises(RuntimeError, match="forward mode over forward mode"):
        torch.func.jvp(inner, (x,), (torch.ones_like(x),))
    with mingru.use_backend("sequential"):
        twice = torch.func.jvp(inner, (x.double(),), (torch.ones_like(x.double()),))[1]
    direct = torch.func.jvp(
        torch.func.grad(lambda x: mingru.functional.mingru(x, x).sum()), (x.double(),), (torch.ones_like(x.double()),)
    )[1]
    torch.testing.assert_close(twice.sum(), direct.sum())
