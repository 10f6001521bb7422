"""Elapsed times and lower bounds of the decay, and packed sequences: by hand, accuracy and extreme numbers.

`test_recurrence.py` compares them with the reference.
"""

import math
from fractions import Fraction

import pytest
import reference
import torch
from calls import ALL, BACKENDS, TIGHT, each, exact, make, run

from mingru import functional
from mingru.ops.cells import TIMED, parts_of

NOT_LOG = [name for name in ALL if name != "log"]
each_timed = pytest.mark.parametrize(("backend", "cell"), each(cells=TIMED))
# For each combination: whether there are elapsed times, and the lower bound.
FORMS = [(True, 0.0), (True, 0.25), (False, 0.25)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("backend", "cell"), each())
def test_packed(backend, cell, reverse):
    lengths = torch.tensor([9, 4, 1])
    inputs, h, initial, reset, dt = make(cell, 3, 9, reset=True)
    dt.requires_grad_()

    def pack(x):
        return torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)

    batch_sizes = pack(dt).batch_sizes
    packed_dt = pack(dt).data if cell in TIMED else None
    call = ([pack(x).data for x in inputs], h, initial, pack(reset).data, packed_dt)
    out, last = run(backend, cell, *call, reverse=reverse, batch_sizes=batch_sizes)
    for index, length in enumerate(lengths.tolist()):
        at = slice(index, index + 1)
        one = [x[at, :length] for x in (*inputs, reset, dt)]
        truth = exact(cell, one[:-2], h[at], initial[at], *one[-2:], reverse=reverse)
        steps = (torch.cumsum(batch_sizes, 0) - batch_sizes)[:length] + index
        torch.testing.assert_close(out[steps], truth[0][0], **TIGHT)
        torch.testing.assert_close(last[index], truth[1][0], **TIGHT)
        if cell in TIMED:
            grad, exact_grad = (
                torch.autograd.grad(each.square().sum(), dt, retain_graph=True)[0][index]
                for each in (out[steps], truth[0])
            )
            torch.testing.assert_close(grad, exact_grad, **TIGHT)


def test_by_hand():
    """A gate of 0 halves the state in one unit of time."""
    dt, zero = torch.tensor([[1.0, 2.0, 0.0, 0.5]]), torch.zeros(1, 4, 1)
    h = torch.tensor(16.0)
    for backend in BACKENDS:
        if backend != "log":
            out = functional.mingru(zero, zero, h, dt=dt, activation="linear", backend=backend)
            expected = torch.tensor([8.0, 2.0, 2.0, math.sqrt(2.0)])
            torch.testing.assert_close(out.flatten(), expected, rtol=1e-6, atol=0)
            # m + (1 - m) / 2 = 0.75
            out = functional.mingru(zero, zero, h, dt=dt, activation="linear", backend=backend, min_decay=0.5)
            torch.testing.assert_close(out[0, :2, 0], 16 * torch.tensor([0.75, 0.75**3]), rtol=1e-6, atol=0)
    # A quarter turn in one unit of time is half a turn in two.
    gate, angle, h = torch.full((1, 1, 1), -200.0), torch.full((1, 1, 1), 2.0), torch.tensor([[[3.0, 1.0]]])
    for backend in BACKENDS:
        if backend != "log":
            options = {"angle": angle, "kind": "rotation", "dt": torch.tensor([[2.0]]), "backend": backend}
            out = functional.mingru(gate, torch.zeros(1, 1, 2), h, **options)
            torch.testing.assert_close(out, -h, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cell", ["mingru", "minlstm"])
@pytest.mark.parametrize("backend", ALL)
def test_parts_of_a_step_give_the_whole(backend, cell):
    """With the same pre-activations, steps of dt1 and dt2 are one step of dt1 + dt2."""
    inputs, h, initial, _, _ = make(cell, 2, 1)
    parts = torch.rand(2, 2).double()
    twice = [x.expand(-1, 2, -1) for x in inputs]
    out, last = run(backend, cell, twice, h, initial, None, parts, min_decay=0.2)
    _, whole = run(backend, cell, inputs, h, initial, None, parts.sum(1, keepdim=True), min_decay=0.2)
    torch.testing.assert_close(last, whole, **TIGHT)
    assert not torch.allclose(out[:, 0], out[:, 1])


@each_timed
def test_a_time_of_1_is_the_ordinary_cell(backend, cell):
    inputs, h, initial, reset, dt = make(cell, 2, 50, dtype=torch.float32, reset=True)
    timed, _ = run(backend, cell, inputs, h, initial, reset, torch.ones_like(dt))
    plain, _ = run(backend, cell, inputs, h, initial, reset)
    tolerance = 1e-3 if backend == "log" else 2e-6
    torch.testing.assert_close(timed, plain, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize(
    ("cell", "steps", "with_dt", "min_decay"),
    [
        *((cell, 10_000, *form) for cell in ("mingru", "minlstm") for form in FORMS),
        pytest.param("mingru", 1_000_000, True, 0.25, marks=pytest.mark.slow),
    ],
)
def test_float32_error_by_length(cell, steps, with_dt, min_decay):
    torch.manual_seed(0)
    inputs, h, initial, _, dt = make(cell, 1, steps, 2, dtype=torch.float32)
    # Positive, so that no terms cancel.
    h, dt = h.abs(), dt if with_dt else None
    # Float64 in chunks, which `test_recurrence.py` compares with float64 step by step.
    wide = [x.double() for x in (h, initial)]
    wide_dt = None if dt is None else dt.double()
    truth, _ = run("torch", cell, [x.double() for x in inputs], *wide, None, wide_dt, min_decay=min_decay)
    for backend in ("native", "torch"):
        out, _ = run(backend, cell, inputs, h, initial, None, dt, min_decay=min_decay)
        assert reference.relative_error(out, truth) < 2e-6


@pytest.mark.parametrize("backend", NOT_LOG)
@pytest.mark.parametrize("min_decay", [0.0, 1e-6, 0.5, 0.999])
def test_nothing_cancels_for_short_times_and_long_memories(backend, min_decay):
    """The weight of the candidate, 1 - a, keeps its relative precision."""
    gate = torch.linspace(-30, 30, 121).reshape(1, 1, -1)
    one, zero = torch.ones_like(gate), torch.zeros_like(gate)
    for time in (1e-6, 1e-3, 1.0, 50.0):
        dt = torch.full((1, 1), time)
        truth = [
            reference.mingru(
                *(x.double() for x in (gate, candidate, h)), None, "linear", dt=dt.double(), min_decay=min_decay
            )
            for candidate, h in ((one, zero), (zero, one))
        ]
        for (candidate, h), expected in zip(((one, zero), (zero, one)), truth, strict=True):
            options = {"activation": "linear", "min_decay": min_decay}
            out, _ = run(backend, "mingru", [gate, candidate], h, h, None, dt, **options)
            # The error of exp(-x) is that of x, and x is up to 30 * 50.
            rtol = 4e-6 if candidate is one else 2e-4
            torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=1e-37)


@pytest.mark.parametrize("extreme", [1e4, -1e4, math.inf, -math.inf, math.nan, 95.0, -95.0, 0.0])
@pytest.mark.parametrize("min_decay", [0.0, 0.3])
@pytest.mark.parametrize("backend", NOT_LOG)
def test_extreme_pre_activations(backend, extreme, min_decay):
    h = torch.tensor([[[1.0, 0.25, 3.0, 0.5]]])
    gate, candidate = torch.full((1, 1, 4), extreme), torch.tensor([[[-1.0, 0.5, 2.0, 0.0]]])
    dt = torch.tensor([[0.5]])
    for inputs in ([gate, candidate], [candidate, gate]):
        out, _ = run(backend, "mingru", inputs, h, h, None, dt, min_decay=min_decay)
        truth = reference.mingru(*(x.double() for x in (*inputs, h)), dt=dt.double(), min_decay=min_decay)
        torch.testing.assert_close(out, truth.float(), rtol=1e-5, atol=1e-6, equal_nan=True)


@each_timed
def test_a_time_of_0_keeps_the_state(backend, cell):
    inputs, h, initial, _, dt = make(cell, 2, 6)
    dt[:, 2] = 0
    dt.requires_grad_()
    out, _ = run(backend, cell, inputs, h, initial, None, dt)
    torch.testing.assert_close(out[:, 2], out[:, 1], rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(out.sum(), dt)
    truth = reference.CELLS[cell](*inputs, h, None, "positive", initial, False, dt)
    torch.testing.assert_close(grad, torch.autograd.grad(truth.sum(), dt)[0], **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("min_decay", [0.0, 0.25])
@pytest.mark.parametrize(
    ("backend", "cell", "activation"),
    [(*pair, activation) for activation in ("linear", "positive") for pair in each(ALL, TIMED, activation)],
)
def test_an_infinite_time_forgets(backend, cell, activation, min_decay, dtype):
    """Also if exp(gate) underflows. Only a gate of -infinity, which forgets nothing, keeps the state."""
    gates = torch.tensor([-math.inf, -800.0, -200.0, -105.0, -1.0, 0.0, 95.0, 95.0], dtype=dtype).reshape(1, 1, -1)
    gates = [gates] if cell != "minlstm" else [torch.zeros_like(gates), gates]
    if (parts := parts_of(cell)) > 1:  # of a gate and an angle, or a vector
        gates = [torch.stack([gates[0], *[torch.ones_like(gates[0])] * (parts - 1)], -1).flatten(2)]
    h = 3 + torch.rand_like(gates[0])
    # Above 0, where "positive" adds 0.5.
    leaves = [leaf.requires_grad_() for leaf in (*gates, torch.rand_like(h), h)]
    dt = torch.tensor([[math.inf]], dtype=dtype)
    state = leaves[-1]
    out, _ = run(backend, cell, leaves[:-1], state, state, None, dt, activation=activation, min_decay=min_decay)
    kept, rounding = parts, {"rtol": 1e-6 if backend == "log" else 0, "atol": 0}
    expected = leaves[-2] + (0.5 if activation == "positive" else 0.0)
    torch.testing.assert_close(out[..., kept:], expected[..., kept:], **rounding)
    if parts == 1:  # otherwise, its angle after an infinite time is any
        torch.testing.assert_close(out[..., :kept], h[..., :kept], rtol=0, atol=0)
    *grad_gates, grad_candidate, grad_h = torch.autograd.grad(out[..., kept:].sum(), leaves)
    assert all((grad == 0).all() for grad in (*grad_gates, grad_h))
    ones = torch.ones_like(grad_candidate)
    torch.testing.assert_close(grad_candidate[..., kept:], ones[..., kept:], **rounding)


@pytest.mark.parametrize("cell", ["mingru_rotation", "mingru_quaternion"])
@pytest.mark.parametrize("backend", NOT_LOG)
def test_angles_of_long_times(backend, cell):
    """Whole turns are subtracted from the exact product of the time and the angle."""
    angles = 2 * torch.randn(1, 1, 500)
    zeros = [torch.zeros_like(angles)] * (parts_of(cell) - 2)
    gates = torch.stack([torch.full_like(angles, -math.inf), angles, *zeros], -1).flatten(2)
    candidate = torch.zeros_like(gates)
    h = torch.stack([torch.ones_like(angles), 0 * angles, *zeros], -1).flatten(2)
    for time in (0.1, 30.3, 1000.0, 12345.678, 1e6, 3e9):
        dt = torch.tensor([[time]])
        out, _ = run(backend, cell, [gates, candidate], h, h, None, dt)
        turns = [float(Fraction(dt.item()) * Fraction(angle) % 8) for angle in angles.flatten().tolist()]
        radians = math.pi / 4 * torch.tensor(turns, dtype=torch.float64)
        expected = torch.stack([radians.cos(), radians.sin(), *(zero.flatten() for zero in zeros)], -1).flatten()
        assert (out.double().flatten() - expected).abs().max() < 1.8e-6


def test_the_number_of_threads_does_not_change_the_bits():
    """Gradients of dt are sums over features, which threads share."""
    inputs, h, initial, reset, dt = make("mingru", 2, 700, 200, dtype=torch.float32, reset=True)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_() for x in (*inputs, dt)]
            out, _ = run("native", "mingru", leaves[:2], h, initial, reset, leaves[2])
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def test_errors():
    x = torch.zeros(2, 3, 4)
    dt = torch.ones(2, 3)
    bad = {
        "dt must be a tensor": 1.0,
        r"dt must be \(B, S\) = \(2, 3\), got \(3, 2\)": torch.ones(3, 2),
        "dt must be torch.float32 like (gate|forget), got torch.int64": torch.ones(2, 3, dtype=torch.int64),
        "dt must be at least 0, got -1.0": -dt,
        "dt must be at least 0, got nan": torch.full((2, 3), math.nan),
    }
    for message, value in bad.items():
        for function in (functional.mingru, lambda *args, **options: functional.minlstm(x, *args, **options)):
            with pytest.raises((TypeError, ValueError), match=message):
                function(x, x, dt=value)
    with pytest.raises(ValueError, match="mingru: dt must be None because the gate is 'signed'"):
        functional.mingru(x, x, dt=dt, kind="signed")
    with pytest.raises(ValueError, match="mingru: min_decay must be 0 because"):
        functional.mingru(x, x, min_decay=0.5, kind="signed")
    with pytest.raises(ValueError, match="mingru: min_decay must be a number from 0 to 1"):
        functional.mingru(x, x, min_decay=1.0)
