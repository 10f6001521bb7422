"""What holds for every cell on every backend: values and gradients of the table in `calls.py`, and properties.

With TRITON_INTERPRET=1, the only backend is "triton".
"""

import math
from fractions import Fraction
from functools import partial
from itertools import product

import calls
import pytest
import reference
import torch
from calls import ALL, BACKENDS, CELLS, INTERPRETED, NOT_LOG, SCANS, TIMED, Row, each, make, parts_of, states
from cases import TIGHT, grid, needs_kernels, refuses, with_threads
from options import CALLS, CANDIDATES, cover
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import mingru
from mingru import functional
from mingru.ops.cells import NUM_INPUTS

KERNELS = [name for name in BACKENDS if name in ("native", "triton")]
TURNING = ["mingru_rotation", "mingru_quaternion"]
not_in_the_interpreter = pytest.mark.skipif(INTERPRETED, reason="other tests are of Triton")
each_backend = pytest.mark.parametrize("backend", NOT_LOG)


@pytest.mark.parametrize(("backend", "row"), [(name, row) for name in ALL for row in calls.rows(name)], ids=str)
def test_values_and_gradients(backend, row, use_tiling):
    use_tiling(row.tiling)
    assert calls.share_of_allowed(backend, row) <= 1


@not_in_the_interpreter
@pytest.mark.parametrize("index", [0, 1])
def test_the_comparison_can_fail(index, monkeypatch):
    """A wrong number in the states or in the last states, and NaN."""
    row, run = Row(layout="lengths", reset=True, dt=True, steps=5), calls.run
    assert calls.share_of_allowed(BACKENDS[0], row) < 1
    monkeypatch.setattr(calls, "run", lambda *args: [x * (1 + (i == index) / 1000) for i, x in enumerate(run(*args))])
    assert calls.share_of_allowed(BACKENDS[0], row) > 1
    exact = [torch.tensor([4.0, 0.1]).double(), torch.tensor([0.5]).double()]
    assert calls.error([exact[0] + 0.25, exact[1]], exact) == 0.0625
    assert math.isnan(calls.error([exact[0], math.nan * exact[1]], exact))


ONE, TWO, THIRD, EIGHTH = [9.0], [9.0, 9.0], 8 / math.sqrt(27), [-math.sqrt(2), -math.sqrt(8)]
TURNS = [[-200, 2, 0, 0], [-200, 0, 2, 0], [-200, 0, 0, 2], [-200, *[THIRD] * 3], [-200, 0, 0, 0]]
TURNED = [-2, 1, -4, 3, 4, 3, -2, -1, 1, 2, 3, 4, -5, 0, -2, -1, -5, 0, -2, -1]
# Cell, pre-activations but candidates, candidates, state, options and states. A gate of -200 keeps, and 200 flips.
BY_HAND = [
    ("mingru_signed", [[-200], [0], [200], [200], [-200]], [ONE, [3.0], ONE, ONE, ONE], [5.0], {}, [5, 3, -3, 3, 3]),
    # A whole, a half, a quarter and an eighth of a turn.
    ("mingru_rotation", [[-200, u] for u in (8, 4, 2, -1)], [TWO] * 4, [3.0, 1.0], {}, [3, 1, -3, -1, 1, -3, *EIGHTH]),
    # Products with i, j and k from the left, with (i + j + k - 1) / 2, and with 1.
    ("mingru_quaternion", TURNS, [TWO * 2] * 5, [1.0, 2.0, 3.0, 4.0], {}, TURNED),
    # A gate of 0 halves the state in one unit of time, or leaves m + (1 - m) / 2 = 0.75 of it.
    ("mingru", [[0]] * 4, [[0.0]] * 4, [16.0], {"dt": torch.tensor([[1.0, 2.0, 0.0, 0.5]])}, [8, 2, 2, 2**0.5]),
    ("mingru", [[0]] * 2, [[0.0]] * 2, [16.0], {"dt": torch.tensor([[1.0, 2.0]]), "min_decay": 0.5}, [12, 6.75]),
    ("mingru_rotation", [[-200, 2]], [TWO], [3.0, 1.0], {"dt": torch.tensor([[2.0]])}, [-3, -1]),
    # 257 and 259 are between two bfloat16 numbers.
    ("mingru", [[0, 0]], [[258.0, -260.0]], [256.0, -258.0], {"dtype": torch.bfloat16}, [256, -260]),
]


@pytest.mark.parametrize(("cell", "gates", "candidate", "h", "options", "expected"), BY_HAND)
@each_backend
def test_by_hand(backend, cell, gates, candidate, h, options, expected):
    dtype = options.get("dtype", torch.float32)
    inputs = [torch.tensor([x], dtype=dtype) for x in (gates, candidate)]
    out, _ = states(backend, cell, inputs, torch.tensor([[h]]), candidate="linear", **options)
    assert_close(out.flatten(), torch.tensor(expected, dtype=dtype), rtol=1e-6, atol=1e-6)


DERIVATIVES = {name: calls.FACTORS[name] for name in ("cell", "candidate", "reverse", "reset", "dt")}
DERIVATIVES |= {"min_decay": [0.0, 0.25], "steps": [3] if INTERPRETED else [5, 18]}


def second_derivatives():
    for backend in ALL:
        kind = backend if backend in ("log", "traceable") else "torch"
        # In the padding, the logarithm of a candidate is -infinity. The interpreter is slow.
        layouts = {} if kind == "log" or INTERPRETED else {"layout": CALLS["layout"]}
        found = cover(DERIVATIVES | layouts, lambda row, kind=kind: calls.is_allowed(row, kind))
        given = {"dtype": torch.double, "features": (2,), "batch": 1 if INTERPRETED else 3}
        yield from ((backend, Row(**row, **given)) for row in found[: 3 if INTERPRETED else None])


@pytest.mark.parametrize(("backend", "row"), [*second_derivatives()], ids=str)
def test_first_and_second_derivatives(backend, row, use_tiling):
    use_tiling("walk")
    given = calls.drawn(row)[0].to(calls.device_of(backend))
    # The derivative of g jumps at 0; numbers measured across the jump mean nothing.
    given.inputs[-1].add_(given.inputs[-1].sign(), alpha=0.1)
    leaves = [x.requires_grad_() for x in given.leaves()]

    def function(*leaves):
        return calls.run(backend, row, given.of(*leaves))

    # Fast, which checks a random direction: each number of a first derivative is compared above.
    assert gradcheck(function, leaves, check_batched_grad=row.cell not in SCANS[1:], fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


FORWARD = ("mingru", "mingru_rotation") if INTERPRETED else tuple(NUM_INPUTS)


@pytest.mark.parametrize(("backend", "cell"), each(NOT_LOG, FORWARD))
def test_forward_mode_and_vmap(backend, cell, use_tiling):
    use_tiling("walk")
    inputs, h, initial, reset, dt = make(cell, 2, 5 if INTERPRETED else 18, 4, reset=True)
    timed = {"min_decay": 0.1} if cell in TIMED else {}
    primals = (*inputs, h, initial, *([dt] if timed else []))
    tangents = tuple(torch.randn_like(tensor) for tensor in primals)
    batched = calls.Given(inputs, h, initial, reset, dt if timed else None)

    def by(backend):
        return lambda *leaves: states(backend, cell, *batched.of(*leaves)[:5], **timed)[0]

    assert_close(*(torch.func.jvp(by(each), primals, tangents) for each in (backend, "exact")), **TIGHT)

    def one(reset, *primals):
        given = batched._replace(reset=reset.unsqueeze(0)).of(*(x.unsqueeze(0) for x in primals))
        return states(backend, cell, *given[:5], **timed)[0].squeeze(0)

    moved = [x.movedim(0, -1) for x in (reset, *primals)]
    assert_close(torch.vmap(one, -1, -1)(*moved), by("exact")(*primals).movedim(0, -1), **TIGHT)
    every = tuple(range(1, 1 + len(primals)))
    grads = torch.vmap(torch.func.grad(lambda *args: one(*args).square().sum(), every))(reset, *primals)
    leaves = [x.clone().requires_grad_() for x in primals]
    assert_close(grads, torch.autograd.grad(by("exact")(*leaves).square().sum(), leaves), **TIGHT)


def test_forward_over_forward_is_refused_rather_than_wrong():
    def along(function):
        return lambda x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]

    def call(x):
        return functional.mingru(x, x).sum()

    x = torch.randn(1, 5, 2).double()
    refuses(RuntimeError, "forward mode over forward mode", along(along(call)), x)
    with mingru.use_backend("sequential"):
        twice = along(along(call))(x)
    assert_close(twice, along(torch.func.grad(call))(x).sum())


@pytest.mark.parametrize("backend", ALL)
def test_gradients_where_formulas_of_two_sides_meet(backend):
    """The kink of g, a state of zero, a gate of -log(min_decay), and a signed gate of 0."""
    candidate = torch.tensor([[0.0], [-0.0]])[:, None].requires_grad_()
    h = torch.zeros(2, 1, 1, requires_grad=True)
    out, _ = states(backend, "mingru", [torch.zeros(2, 1, 1), candidate], h, h.detach())
    # z = 1/2 and g'(0) = 1; d/dh = 1 - z.
    assert [x.flatten().tolist() for x in torch.autograd.grad(out.sum(), (candidate, h))] == [[0.5, 0.5]] * 2
    gate = torch.full((1, 1, 1), math.log(4.0), dtype=torch.double, requires_grad=True)
    zero, one = torch.zeros(1, 1, 1).double(), torch.ones(1, 1, 1).double()
    for dt in (None, one[0])[: 1 + (backend != "log")]:
        out, _ = states(backend, "mingru", [gate, zero], one, zero, None, dt, min_decay=0.25)
        # sigma(-gate) = 0.2, r = 0.25 + 0.75 * 0.2 and h' = r + (1 - r) g(0).
        assert_close(*torch.autograd.grad(out, gate), torch.full((1, 1, 1), -0.75 * 0.2 * 0.8 * 0.5).double())
    if backend != "log":
        gate = torch.zeros_like(zero, requires_grad=True)
        out, _ = states(backend, "mingru_signed", [gate, one], one)
        # a = 0 and da = -1/2; the derivative of |a| counts as 0.
        assert_close(*torch.autograd.grad(out, gate), -0.5 * one)


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


@needs_kernels
@not_in_the_interpreter
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("cell", "gates", "options", "lifetime"), LONG)
def test_errors_of_long_memories_grow_like_a_random_walk(cell, gates, options, lifetime, reverse):
    """A decay near 1, rounded to float32, would have the same error in each step that the state lasts."""
    steps, size = 100_000, max(2, parts_of(cell))
    inputs = [torch.full((1, steps, size), gate) for gate in gates]
    if parts_of(cell) > 1:
        inputs[0][..., 1:] = 0.0  # the angle
    inputs += [0.5 + torch.rand(1, steps, size), 0.5 + torch.rand(1, 1, size)]
    weight, results = torch.rand(1, steps, size), []
    for dtype in (torch.float32, torch.float64):
        *leaves, h = (x.to(dtype).requires_grad_() for x in inputs)
        dt = torch.full((1, steps), options["dt"], dtype=dtype) if "dt" in options else None
        more = {"candidate": "linear", "min_decay": options.get("min_decay", 0.0), "reverse": reverse}
        out, _ = states("native", cell, leaves, h, torch.zeros_like(h), None, dt, **more)
        results.append([out, *torch.autograd.grad((out * weight.to(dtype)).sum(), [*leaves, h])])
    for index, (got, truth) in enumerate(zip(*results, strict=True)):
        size = truth.abs().amax(1, keepdim=True)
        if parts_of(cell) == 4 and index == 1:
            # The components of a vector are as exact as the largest one.
            size[..., 1:] = size[..., 1:].amax(-1, keepdim=True)
        error = ((got - truth).abs() / size).nan_to_num().max()
        assert error <= 5e-7 * min(lifetime, steps) ** 0.5, f"gradient {index}" if index else "states"


EXTREMES = [1e4, -1e4, math.inf, -math.inf, math.nan, 0.0, -0.0, 80.0, -80.0]
WITH_TIMES = [(*pair, timed) for pair in each(NOT_LOG) for timed in (False, True)[: 1 + (pair[1] in TIMED)]]


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize(("backend", "cell", "timed"), WITH_TIMES)
def test_extreme_pre_activations(backend, cell, candidate, timed, use_tiling):
    """Each extreme number beside each good one, in each input and in several."""
    use_tiling("one step")
    bad = torch.tensor(EXTREMES).repeat_interleave(4).view(1, 1, -1)
    good, h = torch.tensor([[-1.0, 0.5, 2.0, 0.0], [1.0, 0.0, 3.0, 0.5]]).repeat(1, len(EXTREMES)).view(2, 1, 1, -1)
    timing = {"dt": torch.tensor([[0.5]]), "min_decay": 0.3} if timed else {}
    # Of a quaternion only in some parts.
    first = torch.where(torch.tensor([True, False] * 18), bad, 0.0) if cell == "mingru_quaternion" else bad
    for inputs in product((first, good), *[(bad, good)] * (NUM_INPUTS[cell] - 1)):
        out, _ = states(backend, cell, inputs, h, candidate=candidate, **timing)
        truth, _ = states("exact", cell, inputs, h, candidate=candidate, **timing)
        if cell == "minlstm" and inputs[0] is inputs[1] is bad:
            # The reference divides 0 by 0; both gates are equal.
            halves = 0.5 * (h.double() + reference.ACTIVATIONS[candidate](inputs[2].double()))
            truth = truth if timed else torch.where(bad == -1e4, halves, truth)
        # Products of complex numbers and infinities follow no common rule.
        compared = ~(bad.isinf() & (parts_of(cell) > 1 and inputs[-1] is bad)) & ~(truth.isnan() & (bad == -1e4))
        # The reference of the signed gate computes 1 - |a|. The products of a rotation cancel.
        atol = 1e-6 if timed or parts_of(cell) > 1 else {"mingru_signed": 1e-16}.get(cell, 1e-37)
        found = out[compared], truth.float()[compared]
        assert_close(*found, rtol=1e-5 if timed else 1e-6, atol=atol, equal_nan=True)


def where_numbers_would_cancel():
    """Yield gates, candidates, a state, a time, options and the allowed error, relative to each number."""
    gates = torch.tensor([-90.0, -30.0, -10.0, 0.0, 10.0, 30.0, 90.0]).repeat_interleave(4)
    yield gates, torch.tensor([-80.0, -1.0, 1.0, 1e4]).repeat(7), 0.5, None, {}, 2e-6
    for dtype, most in ((torch.float32, 4e-7), (torch.float64, 2e-15)):
        small = torch.logspace(-30, 1, 500, dtype=dtype)
        yield 0 * small, small, 0.0, None, {"candidate": "tanh"}, most
    # The weight of the candidate, 1 - a. The error of exp(-x) is that of x, and x is up to 30 * 50.
    for min_decay, time in product((0.0, 1e-6, 0.5, 0.999), (1e-6, 1e-3, 1.0, 50.0)):
        for candidate, h, most in ((1.0, 0.0, 4e-6), (0.0, 1.0, 2e-4)):
            options = {"candidate": "linear", "min_decay": min_decay}
            yield torch.linspace(-30, 30, 121), candidate, h, time, options, most


@each_backend
def test_small_numbers_keep_their_relative_precision(backend, use_tiling):
    use_tiling("one step")
    for *inputs, time, options, most in where_numbers_would_cancel():
        gate, candidate, h = (torch.as_tensor(x).to(inputs[0]).expand_as(inputs[0]).view(1, 1, -1) for x in inputs)
        args = [gate, candidate], h, h, None, None if time is None else torch.full((1, 1), time)
        out, truth = (states(name, "mingru", *args, **options)[0].double() for name in (backend, "exact"))
        assert_close(out, truth, rtol=most, atol=1e-37)


def large_angles(dtype):
    # From 2^digits on, all numbers are integers, and soon all are whole turns, which are 8.
    digits = 23 if dtype == torch.float32 else 52
    powers = 2.0 ** torch.arange(digits - 2, digits + 14).double()[:, None]
    integers = (powers * (1 + 2.0**-digits * torch.arange(64).double())).flatten()
    largest = [1e20, -3e38] if dtype == torch.float32 else []
    few = torch.linspace(-30, 30, 2048), torch.linspace(-1e5, 1e5, 2048), torch.tensor(largest)
    return torch.cat([integers, -integers, *few]).to(dtype)


@pytest.mark.parametrize("cell", TURNING)
@each_backend
def test_angles_of_any_size(backend, cell, use_tiling):
    """Whole turns are subtracted from the exact product of the time and the angle, so that none is less accurate."""
    use_tiling("one step")
    times = (0.1, 30.3, 1000.0, 12345.678, *(() if backend == "triton" else (1e6, 3e9)))
    cases = [(2 * torch.randn(500), time, 1.8e-6) for time in times]
    # The size of a vector is rounded.
    exact = [(torch.float32, 3e-7), (torch.float64, 1e-15)] if cell == "mingru_rotation" else []
    cases += [(large_angles(dtype), None, most) for dtype, most in exact]
    for angles, time, most in cases:
        dt = None if time is None else torch.tensor([[time]])
        zeros = [torch.zeros_like(angles)] * (parts_of(cell) - 2)
        # A gate that keeps the state, no candidate, and the state 1.
        gates = torch.stack([torch.full_like(angles, -math.inf), angles, *zeros], -1).view(1, 1, -1)
        h = torch.stack([torch.ones_like(angles), 0 * angles, *zeros], -1).view(1, 1, -1)
        out, _ = states(backend, cell, [gates, torch.zeros_like(gates)], h, h, None, dt, candidate="linear")
        elapsed = 1 if dt is None else Fraction(dt.item())
        turns = [float(elapsed * Fraction(angle) % 8) for angle in angles.tolist()]
        radians = math.pi / 4 * torch.tensor(turns, dtype=torch.float64)
        truth = torch.stack([radians.cos(), radians.sin(), *zeros], -1).flatten()
        assert (out.double().flatten() - truth).abs().max() <= most


FORGETTING = [(*pair, candidate) for candidate in ("linear", "positive") for pair in each(NOT_LOG, TIMED, candidate)]


@grid(min_decay=[0.0, 0.25], dtype=[torch.float32, torch.float64])
@pytest.mark.parametrize(("backend", "cell", "candidate"), FORGETTING)
def test_an_infinite_time_forgets(backend, cell, candidate, min_decay, dtype, use_tiling):
    """Also if exp(gate) underflows. Only a gate of -infinity, which forgets nothing, keeps the state."""
    use_tiling("one step")
    gates = torch.tensor([-math.inf, -800.0, -200.0, -105.0, -1.0, 0.0, 95.0, 95.0], dtype=dtype).reshape(1, 1, -1)
    gates = [gates] if cell != "minlstm" else [torch.zeros_like(gates), gates]
    if (parts := parts_of(cell)) > 1:  # of a gate and an angle, or a vector
        gates = [torch.stack([gates[0], *[torch.ones_like(gates[0])] * (parts - 1)], -1).flatten(2)]
    h = 3 + torch.rand_like(gates[0])
    # Above 0, where "positive" adds 0.5.
    dt = torch.tensor([[math.inf]], dtype=dtype)
    leaves = [leaf.requires_grad_() for leaf in (*gates, torch.rand_like(h), h, dt)]
    options = {"candidate": candidate, "min_decay": min_decay}
    out, _ = states(backend, cell, leaves[:-2], h, None, None, dt, **options)
    rounding = {"rtol": 1e-6 if backend == "log" else 0, "atol": 0}
    expected = leaves[-3] + (0.5 if candidate == "positive" else 0.0)
    # Triton's kernels take a gate of -infinity as one that keeps nothing of the state's angle.
    assert_close(out[..., parts:], expected[..., parts:], **rounding)
    if parts == 1 and backend != "triton":  # otherwise, its angle after an infinite time is any
        assert_close(out[..., :1], h[..., :1], rtol=0, atol=0)
    *grad_gates, grad_candidate, grad_h, grad_dt = torch.autograd.grad(out[..., parts:].sum(), leaves)
    assert all((grad == 0).all() for grad in (*grad_gates, grad_h, grad_dt))
    assert_close(grad_candidate[..., parts:], torch.ones_like(h)[..., parts:], **rounding)


@grid(distance=[13] if INTERPRETED else [13, 2], reverse=[False, True])
@pytest.mark.parametrize(("backend", "cell"), each(NOT_LOG, CELLS, "linear"))
def test_nan_and_infinity_pass_and_stop_at_a_reset(backend, cell, distance, reverse, use_tiling):
    inputs, h, initial, _, _ = make(cell, 2, 25, 4, dtype=torch.float32)
    where = 18 if reverse else 6
    at = where + (-distance if reverse else distance)
    reset = torch.zeros(2, 25, dtype=torch.bool)
    reset[:, at] = True
    options = {"candidate": "linear", "reverse": reverse}
    parts = parts_of(cell)
    tainted = torch.zeros_like(inputs[0], dtype=torch.bool)
    # The first number of the first sequence, until the reset.
    tainted[0, slice(at + 1, where + 1) if reverse else slice(where, at), :parts] = True
    # Products of complex numbers and infinities follow no common rule.
    numbers = [(-1, math.nan), (0, math.nan), *([(-1, math.inf), (-1, -math.inf)] if parts == 1 else [])]
    for tiling, (index, bad) in zip(("walk", "chunks", "segments") * 2, numbers, strict=False):
        use_tiling(tiling)
        expected, _ = states(backend, cell, inputs, h, initial, reset, **options)
        wrong = [x.clone() for x in inputs]
        wrong[index][0, where, 0] = bad
        out, _ = states(backend, cell, wrong, h, initial, reset, **options)
        lost = out[tainted].isfinite() | (out[tainted].isnan() & (math.isinf(bad) and backend in KERNELS))
        assert not lost.any() or parts > 1
        assert not out[0, where, 0].isfinite()
        # The backend "torch" computes a chunk otherwise if it is not finite.
        assert_close(out[~tainted], expected[~tainted], rtol=1e-5, atol=1e-5)
        if backend in KERNELS and cell in ("mingru", "mingru_rotation") and math.isnan(bad):
            grads = []
            for name in (backend, "exact"):
                leaves = [x.clone().requires_grad_() for x in (*wrong, h, initial)]
                out, _ = states(name, cell, leaves[:-2], *leaves[-2:], reset, **options)
                grads.append(torch.autograd.grad(out.sum(), leaves))
            for got, truth in zip(*grads, strict=True):
                assert_close(got, truth, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 5000, 16), (1, 5000, 40), (3, 700, 18), (8, 512, 256), (2, 300, 1100)])
@pytest.mark.parametrize("cell", [*NUM_INPUTS, "linear_scan"])
@not_in_the_interpreter
def test_threads_do_not_show_in_the_numbers_of_native_and_torch(cell, shape):
    """Also where time is cut for want of other work, where the state forgets slowly, and for sums over features."""
    inputs, h, initial, reset, dt = make(cell, *shape, dtype=torch.float32, reset=True)
    for backend, slow, reverse in (("auto", 0, False), ("auto", 9, True), ("torch", 0, True), ("traceable", 0, False)):
        # Elementwise functions of PyTorch have other bits at the end of a thread's part than in whole vectors.
        if (backend != "auto" and (cell != "mingru" or shape[2] != 256)) or (slow and cell == "linear_scan"):
            continue
        gates = [inputs[0] - slow * (inputs[0].shape[2] != 18), *inputs[1:]]
        given = calls.Given(gates, h, initial, *((None, None) if slow else (reset, dt if cell in TIMED else None)))
        function = partial(calls.run, backend, Row(cell, "linear", reverse=reverse))
        weights = torch.randn_like(gates[0]), torch.randn_like(h)

        def results(function=function, given=given, weights=weights):
            return calls.graded(lambda *leaves: function(given.of(*leaves)), given.leaves(), weights)

        first, *others = with_threads((1, 2, 3, 1), results)
        for other in others:
            # The sums of autograd depend on the number of threads.
            pairs = list(zip(first, other, strict=True))[: None if backend == "auto" else 2]
            assert all(torch.equal(*pair) for pair in pairs), (backend, slow)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_for_backward(backend):
    """Values for each value of the states."""
    most = {"native": 3.1, "triton": 3.1, "torch": 3.1, "sequential": 10.1, "log": 13.1}
    shape = (2, 12, 4) if INTERPRETED else (4, 256, 32)
    pre = torch.randn(*shape[:2], 2 * shape[2], requires_grad=True, device=calls.device_of(backend))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        functional.mingru(*pre.chunk(2, -1), backend=backend)
    assert sum(kept) / math.prod(shape) <= most[backend] + (0.1 if INTERPRETED else 0)


@grid(backend=[name for name in NOT_LOG if name != "traceable"], cell=SCANS[:2], reverse=[False, True])
def test_decays_above_1(backend, cell, reverse, use_tiling):
    """A product of them that overflows, or underflows before it grows, must not show where no state does."""
    for tiling in ("walk", "chunks", "segments"):
        use_tiling(tiling)
        steps = 130
        real = torch.ones(2) if cell == "linear_scan" else torch.tensor([1.0, 0.0])
        grows, late = 3.0 * real.expand(1, steps, 2), torch.zeros(1, steps, 2)
        late[0, 20 if reverse else steps - 21] = 1.0
        decays = torch.tensor([1e-20] * 3 + [1] + [1e9] * 4)[None, :, None] * real
        underflows = decays.flip(1) if reverse else decays, 0 * decays, 1e25 * real[None, None]
        cases = [(grows, late, 0 * late[:, :1]), underflows][cell != "linear_scan" and INTERPRETED :]
        for a, b, h in cases:
            results = []
            for name in (backend, "exact"):
                leaves = [x.clone().requires_grad_() for x in (b, h)]
                out, last = states(name, cell, [a, leaves[0]], leaves[1], candidate="linear", reverse=reverse)
                early = out[:, steps - 21 if reverse else 20] if a is grows else out
                results.append([out, last, *torch.autograd.grad(early.sum() + (a is not grows) * last.sum(), leaves)])
            for got, truth in zip(*results, strict=True):
                assert_close(got.double(), truth.double(), rtol=1e-5, atol=0)
        if backend != "triton":
            return


@grid(backend=KERNELS, grad=[True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.* dt is 0 at all steps:RuntimeWarning")
def test_values_that_are_not_in_memory(backend, grad):
    """Negative views and tensors without memory, as each argument and as a gradient, and masks of other bytes."""
    device = calls.device_of(backend)
    rnn, cell = mingru.MinGRU(4, 4, device=device), mingru.MinGRUCell(4, 4, device=device)

    def call(x, h, dt, initial, reset=None):
        with mingru.use_backend(backend):
            reset = dt < 0.3 if reset is None else reset
            out = functional.mingru(x, x, h, dt=dt, reset=reset, initial_state=initial)
            return out, functional.linear_scan(x, x, h), rnn(x, h[None], dt=dt), cell(x[:, 0], h[:, 0], dt=dt[:, 0])

    args = [torch.rand(shape, device=device) for shape in ((2, 5, 4), (2, 1, 4), (2, 5), (2, 1, 4))]
    with torch.set_grad_enabled(grad):
        for index, each in enumerate(args):
            for special in (calls.negative(each), torch._efficientzerotensor(*each.shape, device=device)):
                given, plain = ([*args[:index], x, *args[index + 1 :]] for x in (special, special.clone() + 0))
                assert_close(call(*given), call(*plain))
        twos = torch.full((2, 5), 2, dtype=torch.uint8, device=device).view(torch.bool)
        assert_close(call(*args, twos), call(*args, twos | True), rtol=0, atol=0)
    if grad:
        out = call(args[0].requires_grad_(), *args[1:])[0]
        weight, row = torch.randn_like(out), torch.randn_like(out[:1, :1]).transpose(0, 2).contiguous().transpose(0, 2)
        for special in (calls.negative(weight), out.new_ones(()).expand_as(out), row.expand_as(out)):
            pair = special, torch.zeros_like(out) + special
            found, truth = (torch.autograd.grad(out, args[0], each, retain_graph=True) for each in pair)
            assert_close(found, truth)


SHAPES = [(1, 1, 3, 5), (3, 40, 7, 20), (3, 5000, 4, 16), (300, 33, 4, 17), (3, 700, 3, 530)]
LAYERS = {"mingru": mingru.MinGRU, "minlstm": mingru.MinLSTM}
LAYERS["mingru_rotation"] = partial(mingru.MinGRU, gate="rotation")
IN_ONE_GO = {
    "layer": [*LAYERS],
    "shape": [(1, 9, 3, 6), (2, 1, 3, 8)] if INTERPRETED else SHAPES,
    "order": ["batch first", "time first", "transposed", "lengths"],
    "dtype": [torch.float32, torch.float64][: 1 if INTERPRETED else 2],
    **{name: [False, True] for name in ("bidirectional", "bias", "recompute")},
    "tiling": calls.TILINGS if INTERPRETED else [None],
}
# The bias of features that are not in the first block of a state, by the scan.
MANY = {name: values[0] for name, values in IN_ONE_GO.items()}
MANY |= {"shape": SHAPES[-1], "dtype": torch.float64, "bias": True}


@pytest.mark.parametrize(
    "row", [*cover(IN_ONE_GO), *([] if INTERPRETED else [MANY])], ids=lambda row: " ".join(map(str, row.values()))
)
@pytest.mark.parametrize("backend", KERNELS)
def test_linear_map_and_recurrence_in_one_go(backend, row, use_tiling):
    """Several blocks of rows, whole sequences in a block and parts of one: as tensor operations do it one by one."""
    name, (batch, steps, features, lanes), order, dtype, *flags, tiling = row.values()
    use_tiling(tiling)
    options = {**dict(zip(("bidirectional", "bias", "recompute"), flags, strict=True)), "candidate": "tanh"}
    tensor = {"dtype": dtype, "device": calls.device_of(backend)}
    rnn = LAYERS[name](features, lanes + lanes % 2, batch_first=order != "time first", **options, **tensor)
    x = torch.randn(steps, batch, features, **tensor)
    x = x if order == "time first" else x.transpose(0, 1)
    x = x.contiguous() if order in ("batch first", "lengths") else x
    lengths = torch.linspace(steps, 0, batch, device=x.device).long() if order == "lengths" else None
    h, reset = torch.randn(1 + flags[0], batch, 1, rnn.hidden_dims, **tensor), torch.rand(x.shape[:2]) < 0.05
    leaves, results = [x, h, *rnn.parameters()], []
    weight, before = torch.randn(*x.shape[:2], rnn.output_dims, **tensor), h.clone()
    for leaf in leaves:
        leaf.requires_grad_()
    for computing in (backend, "torch"):
        with mingru.use_backend(computing):
            out, last = rnn(x, h, reset.to(x.device), lengths)
        results.append([out, last, *torch.autograd.grad((out * weight).sum() + last.square().sum(), leaves)])
    for index, (got, truth) in enumerate(zip(*results, strict=True)):
        # Gradients of the weights are sums over all rows.
        assert (got - truth).abs().max() <= 100 * torch.finfo(dtype).eps * truth.abs().max().clamp_min(1.0), index
    assert torch.equal(h, before), "the given state was written to"
