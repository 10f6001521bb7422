"""Every body of every recurrence against the float64 reference: values, gradients of everything, and properties."""

import math
from itertools import pairwise

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import mingru
from mingru import ops
from mingru.ops.backends import traceable

BODIES = [name for name, can_run in mingru.backends().items() if can_run is True]
# The form of "torch" for graphs, which is no backend of its own.
ALL_BODIES = [*BODIES, "traceable"]
LENGTHS = [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 257]


def run_cell(body, cell, inputs, h, initial, reset=None, activation="positive", reverse=False, layout=ops.BATCH_FIRST):
    spec, start = ops.Spec(cell, activation, reverse), ops.Start(h, initial, reset)
    if body == "traceable":
        return traceable.recurrence(spec, inputs, start, layout)
    return ops.recurrence(spec, inputs, start, layout, body)


def run_mingru(body, gate, candidate, *rest, **options):
    return run_cell(body, "mingru", [gate, candidate], *rest, **options)


def run_minlstm(body, forget, admit, candidate, *rest, **options):
    return run_cell(body, "minlstm", [forget, admit, candidate], *rest, **options)


def serves(body, activation):
    return body != "log" or activation == "positive"


def make_mingru(batch, steps, *rest, dtype=torch.double, scale=2.0, reset=False):
    gate = scale * torch.randn(batch, steps, *rest, dtype=dtype)
    candidate = scale * torch.randn(batch, steps, *rest, dtype=dtype)
    h = torch.randn(batch, 1, *rest, dtype=dtype)
    initial = torch.randn(batch, 1, *rest, dtype=dtype)
    return gate, candidate, h, initial, torch.rand(batch, steps) < 0.2 if reset else None


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("activation", ["positive", "linear", "tanh"])
@pytest.mark.parametrize("cell", ["mingru", "minlstm", "minlstm_unnormalized"])
@pytest.mark.parametrize("body", ALL_BODIES)
def test_values_and_gradients(body, cell, activation, with_reset, reverse, steps):
    if not serves(body, activation):
        with pytest.raises(ValueError, match="may be negative"):
            mingru.functional.mingru(torch.zeros(1, 1), torch.zeros(1, 1), activation=activation, backend=body)
        return
    gate, candidate, h, initial, reset = make_mingru(3, steps, 5, reset=with_reset)
    gates = [gate] if cell == "mingru" else [gate, 2 * torch.randn_like(gate)]
    weight, weight_last = torch.randn(3, steps, 5).double(), torch.randn(3, 1, 5).double()

    def graded(function):
        leaves = [tensor.clone().requires_grad_() for tensor in (h, initial, candidate, *gates)]
        out, last = function(*leaves)
        loss = (out * weight).sum() + (last.square() * weight_last).sum()
        return out, last, *torch.autograd.grad(loss, leaves, allow_unused=True)

    def truth(h, initial, candidate, *gates):
        out = reference.CELLS[cell](*gates, candidate, h, reset, activation, initial, reverse)
        return out, out[:, :1] if reverse else out[:, -1:]

    def got_by(h, initial, candidate, *gates):
        return run_cell(body, cell, [*gates, candidate], h, initial, reset, activation, reverse)

    got, expected = graded(got_by), graded(truth)
    for name, one, other in zip(["out", "last", "h", "initial", "candidate", 0, 1], got, expected, strict=False):
        if other is None or one is None:
            # A leaf that took no part: no gradient and a gradient of 0 mean the same.
            assert (other is None or not other.any()) and (one is None or not one.any()), name
        else:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    assert len(got) == len(expected) == 5 + len(gates)


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("body", [name for name in BODIES if name != "log"])
def test_linear_scan_values_and_gradients(body, with_reset, reverse, steps):
    a, b, h, _, reset = make_mingru(3, steps, 5, scale=0.9, reset=with_reset)
    weight = torch.randn_like(a)

    def graded(function):
        leaves = [tensor.clone().requires_grad_() for tensor in (a, b, h)]
        out = function(*leaves)
        return out, *torch.autograd.grad((out * weight).sum(), leaves)

    got = graded(lambda a, b, h: mingru.functional.linear_scan(a, b, h, reverse=reverse, reset=reset, backend=body))
    expected = graded(lambda a, b, h: reference.linear_scan(a, b, h, reverse, reset))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_linear_scan_of_complex_numbers():
    a = torch.polar(torch.rand(2, 40, 3).double(), 6 * torch.rand(2, 40, 3).double())
    b, h = torch.randn(2, 40, 3, dtype=torch.cdouble), torch.randn(2, 1, 3, dtype=torch.cdouble)
    out = mingru.functional.linear_scan(a, b, h)
    torch.testing.assert_close(out, reference.linear_scan(a, b, h))
    leaves = [
        tensor[:, :17].requires_grad_() if tensor.shape[1] > 1 else tensor.requires_grad_() for tensor in (a, b, h)
    ]
    assert gradcheck(mingru.functional.linear_scan, leaves)


def test_a_scans_gradient_is_a_reversed_scan():
    a, b = torch.rand(2, 50, 3).double(), torch.randn(2, 50, 3).double().requires_grad_()
    grad_out = torch.randn(2, 50, 3).double()
    out = mingru.functional.linear_scan(a, b)
    (grad_b,) = torch.autograd.grad(out, b, grad_out)
    later = torch.cat([a[:, 1:], torch.zeros(2, 1, 3)], 1)
    torch.testing.assert_close(grad_b, mingru.functional.linear_scan(later, grad_out, reverse=True))


@pytest.mark.parametrize("body", ALL_BODIES)
@pytest.mark.parametrize("cell", ["mingru", "minlstm_unnormalized"])
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_first_and_second_derivatives(body, cell, with_reset, reverse):
    gate, candidate, h, initial, reset = make_mingru(1, 18, 1, reset=with_reset)
    # g's derivative jumps at 0; numbers measured across the jump mean nothing.
    candidate = candidate + 0.1 * candidate.sign()
    gates = [gate] if cell == "mingru" else [gate, 2 * torch.randn_like(gate)]
    leaves = [tensor.requires_grad_() for tensor in (h, initial, candidate, *gates)]

    def function(h, initial, candidate, *gates):
        return run_cell(body, cell, [*gates, candidate], h, initial, reset, reverse=reverse)

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("body", [name for name in BODIES if name != "log"])
def test_first_and_second_derivatives_of_linear_scan(body):
    a, b, h, _, reset = make_mingru(2, 18, 2, scale=0.7, reset=True)
    leaves = [tensor.requires_grad_() for tensor in (a, b, h)]

    def function(*leaves):
        return mingru.functional.linear_scan(*leaves, reset=reset, backend=body)

    assert gradcheck(function, leaves, check_forward_ad=True)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("body", [name for name in BODIES if name != "log"])
def test_forward_mode(body):
    gate, candidate, h, initial, reset = make_mingru(2, 18, 2, reset=True)
    tangents = tuple(torch.randn_like(tensor) for tensor in (gate, candidate, h, initial))

    def tangent(function):
        return torch.func.jvp(function, (gate, candidate, h, initial), tangents)[1]

    got = tangent(lambda *leaves: run_mingru(body, *leaves, reset)[0])
    expected = tangent(lambda gate, candidate, h, initial: reference.mingru(gate, candidate, h, reset, initial=initial))
    torch.testing.assert_close(got, expected)


def test_vmap_and_per_sample_gradients():
    gate, candidate, h, _, reset = make_mingru(6, 20, 3, reset=True)

    def one(gate, candidate, h, reset):
        return mingru.functional.mingru(gate[None], candidate[None], h[None], reset=reset[None])[0]

    whole = mingru.functional.mingru(gate, candidate, h, reset=reset)
    torch.testing.assert_close(torch.vmap(one)(gate, candidate, h, reset), whole)
    per_sample = torch.vmap(torch.func.grad(lambda *args: one(*args).square().sum()))(gate, candidate, h, reset)
    leaf = gate.clone().requires_grad_()
    loss = mingru.functional.mingru(leaf, candidate, h, reset=reset).square().sum()
    torch.testing.assert_close(per_sample, torch.autograd.grad(loss, leaf)[0])


@pytest.mark.parametrize("body", ALL_BODIES)
def test_gradient_at_the_kink_and_at_a_state_of_zero(body):
    candidate = torch.tensor([[0.0], [-0.0]], requires_grad=True)
    h = torch.zeros(2, 1, requires_grad=True)
    out, _ = run_mingru(body, torch.zeros(2, 1), candidate, h, h.detach())
    grad_candidate, grad_h = torch.autograd.grad(out.sum(), (candidate, h))
    # z = 1/2 and g'(0) = 1; d/dh = 1 - z.
    assert grad_candidate.flatten().tolist() == [0.5, 0.5]
    assert grad_h.flatten().tolist() == [0.5, 0.5]


@pytest.mark.parametrize("steps", [100, 10_000, 1_000_000])
def test_float32_error_by_length(steps):
    gate, candidate = (2 * torch.randn(1, steps, 2) for _ in range(2))
    # Float64 by the same chunks, itself held against step-by-step float64 where that is quick.
    truth = mingru.functional.mingru(gate.double(), candidate.double(), backend="torch")
    assert (
        reference.relative_error(
            truth[:, :1000], reference.mingru(gate[:, :1000].double(), candidate[:, :1000].double())
        )
        < 1e-14
    )
    for body in BODIES:
        if body in ("log", "sequential"):
            continue
        assert reference.relative_error(mingru.functional.mingru(gate, candidate, backend=body), truth) <= 2e-6


def test_gates_near_0_and_1():
    gate = torch.tensor([-90.0, -30.0, -10.0, 0.0, 10.0, 30.0, 90.0]).repeat(20).reshape(1, -1, 1).repeat(1, 1, 4)
    candidate = torch.tensor([-80.0, -1.0, 1.0, 1e4]).expand_as(gate)
    truth = reference.mingru(gate.double(), candidate.double())
    for body in ALL_BODIES:
        if body != "log":
            out, _ = run_mingru(body, gate, candidate, torch.full((1, 1, 4), 0.5), torch.tensor(0.5))
            assert reference.relative_error(out, truth) <= 2e-6, body


@pytest.mark.parametrize("body", ALL_BODIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_width_types_are_float32_inside(body, dtype):
    gate, candidate, h, initial, reset = make_mingru(2, 300, 4, dtype=dtype, reset=True)
    h, initial = h.abs(), initial.abs()
    leaves = [tensor.clone().requires_grad_() for tensor in (gate, candidate, h, initial)]
    out, last = run_mingru(body, *leaves, reset)
    assert out.dtype == last.dtype == dtype
    exact = reference.mingru(*(tensor.double() for tensor in (gate, candidate, h)), reset, initial=initial.double())
    # One rounding of the result and no more (the log form is less exact than that).
    allowed = torch.finfo(dtype).eps / 2 * (1.001 if body != "log" else 1.1)
    assert reference.relative_error(out, exact) <= allowed
    out.float().square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == dtype for leaf in leaves)
    # A float32 state beside half-width input stays float32.
    assert run_mingru(body, gate, candidate, h.float(), initial.float(), reset)[1].dtype == torch.float32


@pytest.mark.parametrize("body", ALL_BODIES)
@pytest.mark.parametrize("cell", ["minlstm", "minlstm_unnormalized"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_width_minlstm_is_float32_inside(body, cell, dtype):
    forget, candidate, h, initial, reset = make_mingru(2, 300, 4, dtype=dtype, reset=True)
    admit, h, initial = (3 * torch.randn(2, 300, 4)).to(dtype), h.abs(), initial.abs()
    out, last = run_cell(body, cell, [forget, admit, candidate], h, initial, reset)
    assert out.dtype == last.dtype == dtype
    wide = [tensor.double() for tensor in (forget, admit, candidate, h)]
    exact = reference.CELLS[cell](*wide, reset, initial=initial.double())
    allowed = torch.finfo(dtype).eps / 2 * (1.001 if body != "log" else 1.1)
    assert reference.relative_error(out, exact) <= allowed


@pytest.mark.parametrize("body", ALL_BODIES)
def test_layouts_give_the_same_numbers(body):
    gate, candidate, h, initial, reset = make_mingru(3, 40, 4, reset=True)
    expected, _ = run_mingru(body, gate, candidate, h, initial, reset)
    time_first = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (gate, candidate)]
    interleaved = torch.stack([gate, candidate], -1).unbind(-1)
    flipped = [tensor.flip(2).contiguous().flip(2) for tensor in (gate, candidate)]
    halves = torch.cat([gate, candidate], -1).chunk(2, -1)
    for pair in (time_first, interleaved, flipped, halves):
        torch.testing.assert_close(run_mingru(body, *pair, h, initial, reset)[0], expected)
    before = time_first[0].clone()
    assert run_mingru(body, *time_first, h, initial)[0].is_contiguous()
    assert torch.equal(time_first[0], before), "the input was written to"
    swapped = [tensor.transpose(0, 1) for tensor in (gate, candidate, reset)]
    for pair in (swapped[:2], [tensor.contiguous() for tensor in swapped[:2]]):
        out, _ = run_cell(body, "mingru", pair, h, initial, swapped[2], layout=ops.Layout(True, None, None))
        torch.testing.assert_close(out.transpose(0, 1), expected)
        assert out.is_contiguous() or body == "traceable"
    one = gate[:1, :1, :1].expand(3, 40, 4)
    torch.testing.assert_close(
        run_mingru(body, one, candidate, h, initial)[0], run_mingru(body, one.clone(), candidate, h, initial)[0]
    )


@pytest.mark.parametrize("rest", [(), (4,), (2, 3, 4)])
@pytest.mark.parametrize("body", BODIES)
def test_trailing_sizes(body, rest):
    gate, candidate, h, _, reset = make_mingru(2, 20, *rest, reset=True)
    out = mingru.functional.mingru(gate, candidate, h, reset=reset, backend=body)
    torch.testing.assert_close(out, reference.mingru(gate, candidate, h, reset))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (0, 0, 3), (2, 5, 0)])
@pytest.mark.parametrize("body", BODIES)
def test_nothing_in_nothing_out(body, shape):
    gate = torch.zeros(shape, requires_grad=True)
    h = torch.ones(shape[0], 1, shape[2], requires_grad=True)
    reset = torch.zeros(shape[:2], dtype=torch.bool)
    out, last = run_mingru(body, gate, gate, h, torch.tensor(0.5), reset)
    assert out.shape == shape
    torch.testing.assert_close(last, h)
    torch.autograd.grad(last.sum() + out.sum(), (h, gate))


@pytest.mark.parametrize("body", [name for name in ALL_BODIES if name != "log"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reverse", [False, True])
def test_nan_and_infinity_pass_and_stop_at_a_reset(body, bad, reverse):
    gate, candidate, h, initial, _ = make_mingru(2, 60, 3, scale=1.0)
    where, cut = (40, 15) if reverse else (15, 40)
    reset = torch.zeros(2, 60, dtype=torch.bool)
    reset[:, cut] = True
    candidate[0, where, 1] = bad
    clean = candidate.clone()
    clean[0, where, 1] = 0.0
    out, _ = run_mingru(body, gate, candidate, h, initial, reset, "linear", reverse)
    expected, _ = run_mingru(body, gate, clean, h, initial, reset, "linear", reverse)
    tainted = torch.zeros_like(out, dtype=torch.bool)
    tainted[0, slice(cut + 1, where + 1) if reverse else slice(where, cut), 1] = True
    assert not out[tainted].isfinite().any()
    torch.testing.assert_close(out[~tainted], expected[~tainted], rtol=0, atol=0)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), steps=st.integers(1, 120), seed=st.integers(0, 2**31))
def test_properties(data, steps, seed):
    """Pieces joined equal the whole, the past ignores the future, a reset cuts, batch elements are alone."""
    torch.manual_seed(seed)
    body = data.draw(st.sampled_from(ALL_BODIES))
    reverse = data.draw(st.booleans())
    gate, candidate, h, initial, reset = make_mingru(3, steps, 2, reset=True)
    whole, last = run_mingru(body, gate, candidate, h, initial, reset, reverse=reverse)

    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, steps), max_size=3))), steps]
    state, pieces = h, []
    spans = list(pairwise(cuts))
    for start, end in reversed(spans) if reverse else spans:
        span = slice(start, end)
        out, state = run_mingru(
            body, gate[:, span], candidate[:, span], state, initial, reset[:, span], reverse=reverse
        )
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces[::-1] if reverse else pieces, 1), whole)
    torch.testing.assert_close(state, last)

    at = data.draw(st.integers(0, steps - 1))
    changed = candidate.clone()
    changed[1, at] += 1.0
    out, _ = run_mingru(body, gate, changed, h, initial, reset, reverse=reverse)
    difference = (out - whole).abs().amax(-1) > 1e-9
    expected = torch.zeros_like(difference)
    reached = range(at, -1, -1) if reverse else range(at, steps)
    for t in reached:
        if t != at and reset[1, t]:
            break
        expected[1, t] = True
    assert not (difference & ~expected).any()
    assert difference[1, at]


def test_threads_give_the_same_numbers():
    gate, candidate, h, initial, _ = make_mingru(2, 3000, 40, dtype=torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([run_mingru(body, gate, candidate, h, initial)[0] for body in ("torch", "traceable")])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("body", BODIES)
def test_what_is_kept_for_backward(body):
    """In values for each of the states; `docs/how_it_works.md` tells these figures."""
    most = {"native": 3.1, "triton": 3.1, "torch": 3.1, "sequential": 9.1, "log": 13.1}
    shape = (4, 256, 32)
    pre = torch.randn(4, 256, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        mingru.functional.mingru(*pre.chunk(2, -1), backend=body)
    assert sum(kept) / math.prod(shape) <= most[body]


@pytest.mark.parametrize("body", [name for name in BODIES if name != "log"])
@pytest.mark.parametrize("reverse", [False, True])
def test_linear_scan_that_grows(body, reverse):
    """Decays above 1 are allowed; a product of them that overflows must not show where no state does."""
    steps = 10_000
    a, b = torch.full((1, steps, 1), 3.0), torch.zeros(1, steps, 1)
    at = 20 if reverse else steps - 21
    b[0, at] = 1.0
    b.requires_grad_()
    out = mingru.functional.linear_scan(a, b, reverse=reverse, backend=body)
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
