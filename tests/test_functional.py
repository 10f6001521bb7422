"""The functions as users call them: values at the edges, states and back ends. Bodies: ops/; refusals: data/."""

import functools
import itertools
import math

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import ALL_BACKENDS, BACKENDS, TIGHT
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from mingru import functional

INF, NAN = math.inf, math.nan
half_widths = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def tensor(*values):
    return torch.tensor(values, dtype=torch.double)


# g and log_g: values and slopes at these places. The slope at 0 is that from the right.

PLACES = (-INF, -1e30, -100.0, -math.log(3.0), -0.0, 0.0, 0.5, 1e30, INF, NAN)
QUARTER, HALF = math.log(4.0), math.log(2.0)
BY_HAND = {
    "g": (
        (0.0, 0.0, math.exp(-100.0), 0.25, 0.5, 0.5, 1.0, 1e30, INF, NAN),
        (0.0, math.exp(-100.0), 3 / 16, 1.0, 1.0, 1.0, 1.0),
    ),
    "log_g": (
        (-INF, -1e30, -100.0, -QUARTER, -HALF, -HALF, 0.0, math.log(1e30), INF, NAN),
        (1.0, 1.0, 0.75, 2.0, 2.0, 1.0, 1e-30),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_activations_by_hand(name):
    function, (values, slopes) = getattr(functional, name), BY_HAND[name]
    assert_close(function(tensor(*PLACES)), tensor(*values), rtol=1e-15, atol=1e-15, equal_nan=True)
    v = tensor(*PLACES[1:-2]).requires_grad_()
    (grad,) = torch.autograd.grad(function(v).sum(), v)
    assert_close(grad, tensor(*slopes), rtol=1e-12, atol=0)
    v = torch.randn(4, 5).double()
    v = (v + 0.1 * v.sign()).requires_grad_()
    assert_close(function(v), reference.g(v).log() if name == "log_g" else reference.g(v))
    assert gradcheck(function, v) and gradgradcheck(function, v)


@half_widths
@pytest.mark.parametrize("name", BY_HAND)
def test_activations_of_half_width_round_as_few_times_as_their_steps(name, dtype):
    v = torch.randn(1000, dtype=dtype)
    out, exact = getattr(functional, name)(v), getattr(functional, name)(v.double())
    above, below = (v + 0.5, v.sigmoid()) if name == "g" else ((v + 0.5).log(), F.logsigmoid(v))
    error, allowed = ((value.double() - exact).abs().max() for value in (out, torch.where(v >= 0, above, below)))
    assert out.dtype == dtype and 0 < error <= 2 * allowed


def with_gradient(form, *leaves):
    """Return the outputs of a form, and the gradients of its arguments."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    outs = form(*leaves)
    return [*outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), leaves)]


# The paper's scan


def test_parallel_scan_log_by_hand():
    # 2*5+1 = 11; 3*11+0.5 = 33.5; 33.5/4+4 = 12.375
    out = functional.parallel_scan_log(tensor(2.0, 3.0, 0.25).log()[None], tensor(5.0, 1.0, 0.5, 4.0).log()[None])
    assert_close(out, tensor(5.0, 11.0, 33.5, 12.375)[None], rtol=1e-14, atol=0)
    log_b = torch.randn(2, 1, 3)
    assert_close(functional.parallel_scan_log(torch.zeros(2, 0, 3), log_b), log_b.exp())
    # A logarithm of -inf is an input of 0, and a decay's a cut.
    out = functional.parallel_scan_log(torch.zeros(1, 2), torch.tensor([[0.0, -INF, 0.0]]))
    assert_close(out, torch.tensor([[1.0, 1.0, 2.0]]))


@pytest.mark.parametrize("rest", [(), (3,), (2, 3)])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_parallel_scan_log_against_the_reference(steps, rest):
    log_a, log_b = torch.randn(2, steps, *rest).double(), torch.randn(2, steps + 1, *rest).double()

    def truth(log_a, log_b):
        start = log_b[:, :1].exp()
        return [torch.cat([start, reference.linear_scan(log_a.exp(), log_b[:, 1:].exp(), start)], 1)]

    found = with_gradient(lambda *logs: [functional.parallel_scan_log(*logs)], log_a, log_b)
    assert_close(found, with_gradient(truth, log_a, log_b), **TIGHT)


def test_the_log_form_loses_accuracy_with_length_and_the_torch_form_does_not():
    gate, candidate = (2 * torch.randn(4, 10_000, 8) for _ in range(2))
    wide = gate.double(), candidate.double()
    truth = functional.mingru(*wide, backend="torch")
    assert_close(truth[:, :500], reference.mingru(*(pre[:, :500] for pre in wide)), rtol=1e-13, atol=0)
    # Through the paper's own function too, whose first value is the initial state.
    log_b = torch.cat([torch.full((4, 1, 8), 0.5).log(), F.logsigmoid(gate) + functional.log_g(candidate)], 1)
    states = {
        "log": functional.mingru(gate, candidate, backend="log"),
        "paper": functional.parallel_scan_log(F.logsigmoid(-gate), log_b)[:, 1:],
        "torch": functional.mingru(gate, candidate, backend="torch"),
    }
    for name, out in states.items():
        short, long = (reference.relative_error(out[:, :steps], truth[:, :steps]) for steps in (100, 10_000))
        # What the docstrings say, in order of magnitude.
        is_as_said = 0 < short <= long < 2e-6 if name == "torch" else 1e-6 < short < 1e-4 < long < 1e-2
        assert is_as_said and (name == "torch" or long > 10 * short), name


@pytest.mark.parametrize("steps", [100, 1_000_000])
def test_the_error_without_normalization_does_not_grow_with_length(steps):
    inputs = [2 * torch.randn(1, steps, 2) for _ in range(3)]
    truth = functional.minlstm(*(each.double() for each in inputs), normalize=False, backend="torch")
    for backend in ALL_BACKENDS:
        if backend not in ("log", "sequential"):
            out = functional.minlstm(*inputs, normalize=False, backend=backend)
            assert reference.relative_error(out, truth) <= 2e-6


# States and back ends


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 3), (1, 1, 3), (2, 1, 1), (2, 1, 3), (1, 1, 1)])
def test_states_are_what_expands(shape):
    gate, candidate, a = (torch.randn(2, 20, 3).double() for _ in range(3))
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[0, 7] = reset[1, 0] = True

    # A state, and one that stands for no state and for a reset.
    def truth(state, h):
        last = reference.mingru(gate, candidate, state if h is None else h, reset, initial=state)
        return reference.mingru(gate, candidate, state), reference.linear_scan(a, candidate, state), last

    def found(state, h, backend):
        last = functional.mingru(gate, candidate, h, reset=reset, initial_state=state, backend=backend)
        return functional.mingru(gate, candidate, state), functional.linear_scan(a, candidate, state), last

    for h, number in itertools.product((None, torch.randn(2, 1, 3).double()), (-1.0, 0.0, 2.5)):
        state = torch.full(shape, number).double()
        expected = with_gradient(functools.partial(truth, h=h), state)
        for backend in BACKENDS:
            assert_close(with_gradient(functools.partial(found, h=h, backend=backend), state), expected, **TIGHT)


def test_without_a_state_the_zero_state_also_after_a_reset():
    gate, candidate, reset = torch.randn(2, 20, 3).double(), torch.randn(2, 20, 3).double(), torch.rand(2, 20) < 0.2
    for activation in ("positive", "linear", "tanh"):
        out = functional.mingru(gate, candidate, reset=reset, activation=activation)
        assert_close(out, reference.mingru(gate, candidate, None, reset, activation), **TIGHT)
    a, b, reset = torch.tensor([[2.0, 3.0, 5.0]]), torch.ones(1, 3), torch.tensor([[False, True, False]])
    # 2*4+1 = 9; cut: 1; 5*1+1 = 6. From the end: 5*4+1 = 21; cut: 1; 2*1+1 = 3
    assert functional.linear_scan(a, b, torch.tensor(4.0), reset=reset).tolist() == [[9.0, 1.0, 6.0]]
    assert functional.linear_scan(a, b, torch.tensor(4.0), reset=reset, reverse=True).tolist() == [[3.0, 1.0, 21.0]]


@half_widths
def test_half_width_input_takes_states_and_times_of_float32(dtype):
    x, states, dt = torch.randn(2, 20, 3).to(dtype), torch.randn(2, 3).to(dtype), torch.ones(2, 20)
    narrow, wide = (functional.mingru(x, x, h[0], initial_state=h[1], dt=dt) for h in (states, states.float()))
    assert narrow.dtype == wide.dtype == dtype and torch.equal(narrow, wide)
    with pytest.raises(TypeError, match=f"mingru: candidate must be {dtype} like gate, got torch.float32; "):
        functional.mingru(x, x.float())


@half_widths
def test_derivatives_of_a_half_width_scan(dtype):
    a, b = torch.rand(2, 40, 3).to(dtype), torch.randn(2, 40, 3).to(dtype)

    def scan(a, b):
        return functional.linear_scan(a, b).double()

    for derive in (
        lambda *args: torch.func.jvp(scan, args, args)[1],
        torch.func.grad(lambda *args: scan(*args).square().sum(), (0, 1)),
        torch.func.jacrev(lambda *args: scan(*args)[:, -1].sum(-1), (0, 1)),
        torch.func.grad(lambda *args: torch.func.grad(lambda *args: scan(*args).square().sum())(*args).sum()),
    ):
        got, exact = derive(a, b), derive(a.double(), b.double())
        for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, exact)), strict=True):
            assert (one.double() - other).abs().max() <= 4 * torch.finfo(dtype).eps * other.abs().max()


def test_linear_scan_with_lengths():
    halves = torch.full((2, 3), 0.5), torch.ones(2, 3)
    out, last = functional.linear_scan(*halves, torch.tensor(4.0), lengths=torch.tensor([2, 0]))
    assert (out.tolist(), last.tolist()) == ([[3.0, 2.5, 0.0], [0.0, 0.0, 0.0]], [[2.5], [4.0]])
