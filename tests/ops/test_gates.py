"""The gates but "sigmoid", and the scan of complex numbers: by hand, accuracy and extreme numbers.

`test_recurrence.py` compares them with the reference, beside all other cells.
"""

import math

import calls
import pytest
import reference
import torch
from calls import TIGHT, make
from refusals import assert_refused

import mingru
from mingru import functional, ops
from mingru.ops.cells import GATES, parts_of

BACKENDS, ALL = ([name for name in names if name != "log"] for names in (calls.BACKENDS, calls.ALL))
CELLS = ["mingru_signed", "mingru_rotation", "mingru_quaternion"]


def run(backend, cell, inputs, h, initial, reset=None, activation="tanh"):
    return calls.run(backend, cell, inputs, h, initial, reset, activation=activation)


def test_by_hand():
    """Keep, replace and flip; and a whole, a half and a quarter of a turn."""
    keep, replace, flip = -200.0, 0.0, 200.0
    gate = torch.tensor([[keep, replace, flip, flip, keep, flip]]).unsqueeze(-1)
    candidate = torch.tensor([[9.0, 3.0, 9.0, 9.0, 9.0, 9.0]]).unsqueeze(-1)
    for backend in BACKENDS:
        out = functional.mingru(gate, candidate, torch.tensor(5.0), kind="signed", activation="linear", backend=backend)
        assert out.flatten().tolist() == [5.0, 3.0, -3.0, 3.0, 3.0, -3.0]

    gate, angle = torch.full((1, 4, 1), -200.0), torch.tensor([[8.0, 4.0, 2.0, -1.0]]).unsqueeze(-1)
    h = torch.tensor([[[3.0, 1.0]]])
    options = {"angle": angle, "kind": "rotation", "activation": "linear"}
    expected = torch.tensor([[3.0, 1.0], [-3.0, -1.0], [1.0, -3.0], [-math.sqrt(2.0), -math.sqrt(8.0)]])
    for backend in BACKENDS:
        out = functional.mingru(gate, torch.ones(1, 4, 2), h, **options, backend=backend)
        torch.testing.assert_close(out[0], expected, rtol=3e-7, atol=3e-7)

    # Products with i, j and k from the left, with (i + j + k - 1) / 2, and with 1.
    third = 8 / math.sqrt(27)
    gates = torch.tensor([[-200.0, 2, 0, 0], [-200, 0, 2, 0], [-200, 0, 0, 2], [-200.0, *[third] * 3], [-200, 0, 0, 0]])
    h = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    expected = [[-2.0, 1.0, -4.0, 3.0], [4.0, 3.0, -2.0, -1.0], [1.0, 2.0, 3.0, 4.0]]
    expected = torch.tensor([*expected, [-5.0, 0.0, -2.0, -1.0], [-5.0, 0.0, -2.0, -1.0]])
    for backend in BACKENDS:
        out = functional.mingru(gates.unsqueeze(0), torch.ones(1, 5, 4), h, kind="quaternion", backend=backend)
        torch.testing.assert_close(out[0], expected, rtol=1e-6, atol=1e-6)


def test_the_functions_equal_the_cells():
    gate, angle, h = torch.randn(2, 9, 3).double(), 4 * torch.randn(2, 9, 3).double(), torch.randn(2, 1, 6).double()
    candidate, reset = torch.randn(2, 9, 6).double(), torch.rand(2, 9) < 0.3
    out = functional.mingru(gate, candidate, h, kind="rotation", angle=angle, reset=reset)
    pairs = torch.stack([gate, angle], 3).flatten(2)
    torch.testing.assert_close(out, reference.mingru_rotation(pairs, candidate, h, reset, "tanh"), **TIGHT)
    # The default initial state is 0, for every activation.
    assert functional.mingru(gate, candidate[..., :3], kind="signed", backend="torch").shape == gate.shape
    for activation in ("positive", "tanh"):
        out = functional.mingru(gate, candidate[..., :3], kind="signed", activation=activation, reset=reset)
        expected = reference.mingru_signed(gate, candidate[..., :3], None, reset, activation)
        torch.testing.assert_close(out, expected, **TIGHT)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("forget", [2.0, 6.0, 12.0])
def test_error_against_the_sum_of_absolute_terms(cell, forget):
    """Terms cancel, so the error is compared with the scan of |a| and |b|; a long memory makes the sum long."""
    steps = 20_000
    torch.manual_seed(1)
    gate, parts = 2 * torch.randn(1, steps, 4) - forget, parts_of(cell)
    candidate = torch.randn(1, steps, 4)
    for part in range(1, parts):
        gate[..., part::parts] = 4 * torch.randn(1, steps, 4 // parts)
    if parts == 1:
        gate *= torch.randn(1, steps, 4).sign()
    h = torch.randn(1, 1, 4)
    # Float64 in chunks, which `test_recurrence.py` compares with float64 step by step.
    exact, _ = run("torch", cell, [gate.double(), candidate.double()], h.double(), torch.zeros(1, 1, 4).double())
    size = (-gate[..., ::parts].double()).sigmoid() if parts > 1 else (0.5 * gate.double()).tanh().abs()
    size = size.repeat_interleave(parts, -1)
    terms, start = (
        x.unflatten(-1, (-1, parts)).norm(dim=-1).repeat_interleave(parts, -1)
        for x in (candidate.double().tanh(), h.double())
    )
    bound = functional.linear_scan(size, (1 - size) * terms, start, backend="torch")
    for backend in ALL:
        first = slice(3000 if backend == "sequential" else steps)
        out, _ = run(backend, cell, [gate[:, first], candidate[:, first]], h, torch.zeros(1, 1, 4))
        error = ((out.double() - exact[:, first]).abs() / bound[:, first]).max()
        assert error <= BOUND * (1 + LENGTHS[forget]), backend


# The relative error of one step, and about how many steps a state lasts: the errors of its steps add up like a random
# walk in the best case.
BOUND = 5e-7
LENGTHS = {2.0: 10, 6.0: 100, 12.0: 1000}


@pytest.mark.parametrize("extreme", [1e4, -1e4, math.inf, -math.inf, math.nan, 0.0, -0.0, 95.0, -95.0])
@pytest.mark.parametrize("activation", ["positive", "linear", "tanh"])
def test_extreme_pre_activations(extreme, activation):
    bad, good = torch.full((1, 1, 4), extreme), torch.tensor([[[-1.0, 0.5, 2.0, 0.0]]])
    h = torch.tensor([[[1.0, 0.0, 3.0, 0.5]]])
    angles = torch.tensor([[[extreme, 0.5, extreme, 2.0]]])
    vectors = [
        ("mingru_quaternion", torch.tensor([[[gate, 0.0, v, 0.0]]])) for gate, v in ((extreme, 1), (-1, extreme))
    ]
    for cell, gate in (("mingru_signed", bad), ("mingru_signed", good), ("mingru_rotation", angles), *vectors):
        # Products of complex numbers and infinities follow no common rule.
        for candidate in (good,) if parts_of(cell) > 1 and math.isinf(extreme) else (good, bad):
            for backend in BACKENDS:
                out, _ = run(backend, cell, [gate, candidate], h, h, None, activation)
                exact = reference.CELLS[cell](gate.double(), candidate.double(), h.double(), None, activation)
                torch.testing.assert_close(out, exact.float(), rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_angles_of_any_size(backend):
    """Whole turns are subtracted exactly, so that a large angle is as accurate as a small one."""
    # Floats from 2^23 to 2^26 are integers that are no whole turns, which are 8. All larger floats are.
    integers = [
        sign * (2.0**power + 2.0 ** (power - 23) * torch.arange(65)) for power in range(20, 40) for sign in (1, -1)
    ]
    angle = torch.cat(
        [torch.linspace(-30, 30, 4001), torch.linspace(-1e5, 1e5, 4001), *integers, torch.tensor([1e20, -3e38])]
    )
    angle = angle.reshape(1, 1, -1)
    gate = torch.full_like(angle, -200.0)
    pairs, same = (torch.stack([gate, each], 3).flatten(2) for each in (angle, angle.double().remainder(8)))
    h = torch.tensor([1.0, 0.0]).repeat(angle.shape[2]).reshape(1, 1, -1)
    out, _ = run(backend, "mingru_rotation", [pairs, torch.zeros_like(pairs)], h, h)
    exact = reference.mingru_rotation(same, torch.zeros_like(same), h.double(), None, "tanh")
    assert (out - exact).abs().max() < 3e-7


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_crosses_a_reset(cell):
    for backend in ALL:
        (gate, candidate), h, initial, *_ = make(cell, 2, 60, 4)
        candidate[:, 15] = math.nan
        reset = torch.zeros(2, 60, dtype=torch.bool)
        reset[:, 40] = True
        out, _ = run(backend, cell, [gate, candidate], h, initial, reset)
        assert out[:, 20].isnan().all()
        torch.testing.assert_close(
            out[:, 40:], run(backend, cell, [gate[:, 40:], candidate[:, 40:]], initial, initial)[0]
        )


@pytest.mark.parametrize("cell", CELLS)
def test_threads_do_not_change_the_results(cell):
    """Also if time is split between threads, and if the memory is long."""
    before = torch.get_num_threads()
    for shape in ((1, 5000, 16), (3, 700, 18), (2, 300, 1100)):
        (gate, candidate), h, initial, *_ = make(cell, *shape, dtype=torch.float32)
        gate[..., 0::2] -= 7.0
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                leaves = [tensor.clone().requires_grad_() for tensor in (gate, candidate, h)]
                out, last = run("auto", cell, leaves[:2], leaves[2], initial)
                results.append([out, last, *torch.autograd.grad(out.sum() + last.sum(), leaves)])
        finally:
            torch.set_num_threads(before)
        for one, two, three in zip(*results, strict=True):
            assert torch.equal(one, two)
            assert torch.equal(one, three)


def test_the_log_backend_refuses_them():
    x = torch.zeros(2, 5, 4)
    for kind, angle in (("signed", None), ("rotation", x), ("quaternion", None)):
        candidate = x if angle is None else torch.zeros(2, 5, 8)
        message = f"mingru_{kind}: backend selects 'log', .* may be negative in mingru_{kind}; use 'auto'"
        with pytest.raises(ValueError, match=message):
            functional.mingru(x, candidate, kind=kind, angle=angle, backend="log")
        with mingru.use_backend("log"), pytest.raises(ValueError, match=f"may be negative in mingru_{kind}"):
            mingru.MinGRU(3, 4, gate=kind)(torch.zeros(2, 5, 3))


X = torch.zeros(2, 5, 4)
WRONG = {
    "unknown kind": (
        {"kind": "tanh"},
        ValueError,
        r"kind must be one of \('sigmoid', 'signed', 'rotation', 'quaternion'\), got 'tanh'",
    ),
    "kind in a list": ({"kind": ["signed"]}, ValueError, r"kind must be one of .*, got \['signed'\]"),
    "angle of signed": (
        {"kind": "signed", "angle": X},
        ValueError,
        "angle must be None because kind is 'signed', got Tensor; pass kind='rotation'",
    ),
    "features of quaternions": (
        {"gate": X[..., :3], "kind": "quaternion"},
        ValueError,
        r"gate must be \(B, S, H, \*\) with H divisible by 4 because kind is 'quaternion', got \(2, 5, 3\)",
    ),
    "no angle": (
        {"kind": "rotation"},
        ValueError,
        "angle must be a tensor like gate because kind is 'rotation', got None",
    ),
    "shape of angle": (
        {"kind": "rotation", "angle": X[:, :4]},
        ValueError,
        r"angle must be \(2, 5, 4\) because gate is \(2, 5, 4\), got \(2, 4, 4\)",
    ),
    "shape of candidate": (
        {"kind": "rotation", "angle": X},
        ValueError,
        r"candidate must be \(2, 5, 8\) because gate is \(2, 5, 4\), got \(2, 5, 4\)",
    ),
    "dtype of angle": ({"kind": "rotation", "angle": X.double()}, TypeError, r"angle must be torch\.float32 like gate"),
    "no features": (
        {"gate": X[..., 0], "kind": "rotation", "angle": X[..., 0]},
        ValueError,
        r"gate must be \(B, S, H / 2, \*\) because kind is 'rotation', got \(2, 5\)",
    ),
}


def test_errors():
    assert_refused(lambda **given: functional.mingru(**{"gate": X, "candidate": X, **given}), WRONG, "mingru: ")


def test_gates_have_cells():
    assert set(GATES.values()) <= set(ops.NUM_INPUTS)


# The scan of complex numbers


def complex_inputs(batch, steps, *rest, dtype=torch.cdouble, largest=1.0):
    real = torch.empty(0, dtype=dtype).real.dtype
    a = torch.polar(
        largest * torch.rand(batch, steps, *rest, dtype=real), 7 * torch.rand(batch, steps, *rest, dtype=real)
    )
    return a, torch.randn(batch, steps, *rest, dtype=dtype), torch.randn(batch, 1, *rest, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.cfloat, torch.cdouble])
@pytest.mark.parametrize("backend", BACKENDS)
def test_complex_scan_of_any_tensor(backend, dtype):
    """Conjugated, strided and expanded; many features."""
    a, b, h = complex_inputs(2, 70, 40, dtype=dtype)
    exact = reference.linear_scan(a.conj().cdouble(), b.cdouble(), h.cdouble())
    out = functional.linear_scan(a.conj(), b, h, backend=backend)
    assert out.dtype == dtype
    assert out.is_contiguous()
    torch.testing.assert_close(out.cdouble(), exact, rtol=1e-5, atol=1e-5)
    strided = [torch.stack([x, x], -1)[..., 1] for x in (a.conj(), b, h)]
    torch.testing.assert_close(functional.linear_scan(*strided, backend=backend), out)
    one = functional.linear_scan(a[:, :1, :1].expand_as(a), b, backend=backend)
    torch.testing.assert_close(one, functional.linear_scan(a[:, :1, :1].repeat(1, 70, 40), b, backend=backend))
