"""The functions as users call them: values at the edges, what they refuse, states and back ends. Bodies: ops/."""

import functools
import math

import pytest
import reference
import torch
import torch.nn.functional as F
from refusals import assert_refused, wrong_resets, wrong_tensors
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import mingru
from mingru import functional

BACKENDS = [name for name, can_run in mingru.backends().items() if can_run is True]
INF, NAN = math.inf, math.nan
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


# g and log_g


def test_g_by_hand():
    v = torch.tensor([-INF, -1e30, -math.log(3.0), -0.0, 0.0, 2.0, 1e30, INF, NAN], dtype=torch.double)
    expected = torch.tensor([0.0, 0.0, 0.25, 0.5, 0.5, 2.5, 1e30, INF, NAN], dtype=torch.double)
    assert_close(functional.g(v), expected, rtol=1e-15, atol=0, equal_nan=True)


def test_log_g_by_hand():
    v = torch.tensor([-INF, -1e30, -100.0, -math.log(3.0), -0.0, 0.0, 0.5, 1e30, INF, NAN], dtype=torch.double)
    half = -math.log(2.0)
    values = [-INF, -1e30, -100.0, -math.log(4.0), half, half, 0.0, math.log(1e30), INF, NAN]
    expected = torch.tensor(values, dtype=torch.double)
    assert_close(functional.log_g(v), expected, rtol=1e-15, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_g_is_the_logarithm_of_g_and_keeps_what_that_loses(dtype):
    v = torch.linspace(-20, 20, 401, dtype=dtype)
    assert_close(functional.log_g(v).exp(), functional.g(v))
    assert_close(functional.g(v), reference.g(v))
    far = torch.tensor([-1000.0], dtype=dtype)
    assert functional.g(far).log().item() == -INF
    assert functional.log_g(far).item() == -1000.0


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize(("name", "slope"), [("g", 1.0), ("log_g", 2.0)])
def test_gradient_at_0_is_that_from_the_right(name, slope, scripted):
    function = getattr(functional, name)
    function = torch.jit.script(function) if scripted else function
    for _ in range(3):
        v = torch.tensor([0.0, -0.0], requires_grad=True)
        (grad,) = torch.autograd.grad(function(v).sum(), v)
        assert grad.tolist() == [slope, slope]


def test_gradients_far_out_are_finite_and_keep_their_precision():
    v = torch.tensor([-1e30, -100.0, 1e30], dtype=torch.double, requires_grad=True)
    (grad,) = torch.autograd.grad(functional.g(v).sum(), v)
    assert_close(grad, torch.tensor([0.0, math.exp(-100.0), 1.0], dtype=torch.double), rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(functional.log_g(v).sum(), v)
    assert_close(grad, torch.tensor([1.0, 1.0, 1e-30], dtype=torch.double), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["g", "log_g"])
def test_derivatives_away_from_0(name):
    v = torch.randn(20).double()
    v = (v + 0.1 * v.sign()).requires_grad_()
    assert gradcheck(getattr(functional, name), v)
    assert gradgradcheck(getattr(functional, name), v)


@pytest.mark.parametrize("name", ["g", "log_g"])
def test_activations_script(name):
    function = getattr(functional, name)
    scripted = torch.jit.script(function)
    for v in (torch.randn(3, 4), torch.randn(2, 3, 4), torch.tensor([-INF, 0.0, INF, NAN])):
        assert_close(scripted(v), function(v), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["g", "log_g"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_of_half_width(name, dtype):
    v = torch.randn(1000, dtype=dtype)
    out = getattr(functional, name)(v)
    exact = getattr(functional, name)(v.double())
    assert out.dtype == dtype
    # What the same steps, each rounded, may lose: v + 0.5 and its logarithm where v >= 0, one function below.
    steps = {
        "g": torch.where(v >= 0, v + 0.5, v.sigmoid()),
        "log_g": torch.where(v >= 0, (v + 0.5).log(), F.logsigmoid(v)),
    }
    error, allowed = ((value.double() - exact).abs().max() for value in (out, steps[name]))
    assert 0 < error <= 2 * allowed


# The paper's scan


def test_parallel_scan_log_by_hand():
    log_a = torch.tensor([[2.0, 3.0, 0.25]]).double().log()
    log_b = torch.tensor([[5.0, 1.0, 0.5, 4.0]]).double().log()
    # 2*5+1 = 11; 3*11+0.5 = 33.5; 33.5/4+4 = 12.375
    expected = torch.tensor([[5.0, 11.0, 33.5, 12.375]]).double()
    assert_close(functional.parallel_scan_log(log_a, log_b), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("rest", [(), (3,), (2, 3)])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_parallel_scan_log_against_the_reference(steps, rest):
    log_a, log_b = torch.randn(2, steps, *rest).double(), torch.randn(2, steps + 1, *rest).double()
    weight = torch.randn_like(log_b)

    def truth(log_a, log_b):
        start = log_b[:, :1].exp()
        return torch.cat([start, reference.linear_scan(log_a.exp(), log_b[:, 1:].exp(), start)], 1)

    results = []
    for function in (functional.parallel_scan_log, truth):
        leaves = [log_a.clone().requires_grad_(), log_b.clone().requires_grad_()]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    assert_close(*results, **TIGHT)


def test_parallel_scan_log_of_no_steps_and_no_inputs():
    log_b = torch.randn(2, 1, 3)
    assert_close(functional.parallel_scan_log(torch.zeros(2, 0, 3), log_b), log_b.exp())
    # A logarithm of -inf is an input of 0, and a decay's a cut.
    out = functional.parallel_scan_log(torch.zeros(1, 2), torch.tensor([[0.0, -INF, 0.0]]))
    assert_close(out, torch.tensor([[1.0, 1.0, 2.0]]))


def test_the_log_form_loses_accuracy_with_length_and_the_torch_form_does_not():
    gate, candidate = (2 * torch.randn(4, 10_000, 8) for _ in range(2))
    wide = gate.double(), candidate.double()
    truth = functional.mingru(*wide, backend="torch")
    assert_close(truth[:, :500], reference.mingru(*(pre[:, :500] for pre in wide)), rtol=1e-13, atol=0)
    # Through the paper's own function too, whose first value is the initial state.
    start = torch.full((4, 1, 8), 0.5).log()
    log_b = torch.cat([start, F.logsigmoid(gate) + functional.log_g(candidate)], 1)
    states = {
        "log": functional.mingru(gate, candidate, backend="log"),
        "paper": functional.parallel_scan_log(F.logsigmoid(-gate), log_b)[:, 1:],
        "torch": functional.mingru(gate, candidate, backend="torch"),
    }
    for name, out in states.items():
        short, long = (reference.relative_error(out[:, :steps], truth[:, :steps]) for steps in (100, 10_000))
        if name == "torch":
            assert 0 < short <= long < 2e-6
        else:
            assert long > 10 * short > 0, name
            # What the docstrings say, in order of magnitude.
            assert 1e-6 < short < 1e-4, name
            assert 1e-4 < long < 1e-2, name


# minLSTM


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_without_normalization_grows_to_its_limit(backend):
    """f = 3/4, i = 1/2 and a candidate of 2: i c / (1 - f) = 4, which is more than any candidate."""
    forget = torch.full((1, 200, 2), math.log(3.0), dtype=torch.double)
    inputs = (forget, torch.zeros_like(forget), torch.full_like(forget, 1.5))
    for normalize, limit in ((False, 4.0), (True, 2.0)):
        out = functional.minlstm(*inputs, normalize=normalize, backend=backend)
        assert_close(out[:, -1], torch.full((1, 2), limit).double(), **TIGHT)


@pytest.mark.parametrize("steps", [100, 1_000_000])
def test_the_error_without_normalization_does_not_grow_with_length(steps):
    inputs = [2 * torch.randn(1, steps, 2) for _ in range(3)]
    truth = functional.minlstm(*(each.double() for each in inputs), normalize=False, backend="torch")
    for backend in BACKENDS:
        if backend not in ("log", "sequential"):
            out = functional.minlstm(*inputs, normalize=False, backend=backend)
            assert reference.relative_error(out, truth) <= 2e-6


# States and back ends


@pytest.mark.parametrize("activation", ["positive", "linear", "tanh"])
def test_without_a_state_the_zero_state(activation):
    gate, candidate = torch.randn(2, 20, 3).double(), torch.randn(2, 20, 3).double()
    out = functional.mingru(gate, candidate, activation=activation)
    assert_close(out, reference.mingru(gate, candidate, activation=activation), **TIGHT)
    zero = 0.5 if activation == "positive" else 0.0
    assert torch.equal(out, functional.mingru(gate, candidate, torch.tensor(zero).double(), activation=activation))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 3), (1, 1, 3), (2, 1, 1), (2, 1, 3), (1, 1, 1)])
def test_h_is_what_expands(shape):
    gate, candidate, a = (torch.randn(2, 20, 3).double() for _ in range(3))
    for h in (torch.randn(shape).double(), torch.zeros(shape).double(), -torch.ones(shape).double()):
        results = []
        for mingru_form, scan_form in (
            (functional.mingru, functional.linear_scan),
            (reference.mingru, reference.linear_scan),
        ):
            leaf = h.clone().requires_grad_()
            outs = mingru_form(gate, candidate, leaf), scan_form(a, candidate, leaf)
            results.append([*outs, torch.autograd.grad(sum(out.square().sum() for out in outs), leaf)[0]])
        assert_close(*results, **TIGHT)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "log"])
def test_initial_state_stands_for_no_state_and_for_a_reset(backend):
    gate, candidate = torch.randn(2, 20, 3).double(), torch.randn(2, 20, 3).double()
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[0, 7] = reset[1, 0] = True
    for h in (None, torch.randn(2, 1, 3).double()):
        for shape in ((), (3,), (2, 1, 3)):
            initial = torch.randn(shape).double()
            results = []
            for form in (
                lambda initial, h: functional.mingru(
                    gate, candidate, h, reset=reset, initial_state=initial, backend=backend
                ),
                lambda initial, h: reference.mingru(
                    gate, candidate, initial if h is None else h, reset, initial=initial.expand(2, 1, 3)
                ),
            ):
                leaf = initial.clone().requires_grad_()
                out = form(leaf, h)
                results.append([out, torch.autograd.grad(out.square().sum(), leaf)[0]])
            assert_close(*results, **TIGHT)


def test_a_reset_of_linear_scan_puts_the_state_to_0():
    a, b = torch.tensor([[2.0, 3.0, 5.0]]), torch.tensor([[1.0, 1.0, 1.0]])
    reset = torch.tensor([[False, True, False]])
    # 2*4+1 = 9; cut: 1; 5*1+1 = 6. From the end: 5*4+1 = 21; cut: 1; 2*1+1 = 3
    assert functional.linear_scan(a, b, torch.tensor(4.0), reset=reset).tolist() == [[9.0, 1.0, 6.0]]
    assert functional.linear_scan(a, b, torch.tensor(4.0), reset=reset, reverse=True).tolist() == [[3.0, 1.0, 21.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_width_input_takes_a_state_of_its_own_dtype_or_float32(dtype):
    gate, candidate = torch.randn(2, 20, 3, dtype=dtype), torch.randn(2, 20, 3, dtype=dtype)
    h = torch.randn(3, dtype=dtype)
    for function in (functional.mingru, functional.linear_scan):
        narrow, wide = function(gate, candidate, h), function(gate, candidate, h.float())
        assert narrow.dtype == wide.dtype == dtype
        assert torch.equal(narrow, wide)
    initial = functional.mingru(gate, candidate, initial_state=h.float())
    assert torch.equal(initial, functional.mingru(gate, candidate, h))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
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


# What is refused

X = torch.zeros(2, 5, 3)


@pytest.mark.parametrize(("name", "first", "second"), [("mingru", "gate", "candidate"), ("linear_scan", "a", "b")])
def test_bad_calls(name, first, second):
    floating, sequence = f"{first} must be of a floating-point dtype, got", rf"{first} must be \(B, S, \*\).*, got"
    like, expanded = rf"{second} must be \(2, 5, 3\) because {first} is \(2, 5, 3\), got", "h must be expandable to"
    cases = {
        "first no tensor": ({first: [[0.0]]}, TypeError, f"{first} must be a tensor, got list"),
        "first of integers": ({first: X.long()}, TypeError, rf"{floating} torch\.int64"),
        "first of bools": ({first: X.bool()}, TypeError, rf"{floating} torch\.bool"),
        "first without steps": ({first: torch.zeros(3)}, ValueError, rf"{sequence} \(3,\)"),
        "first a scalar": ({first: torch.tensor(1.0)}, ValueError, rf"{sequence} \(\)"),
        **wrong_tensors(second, X, first),
        "second of other shape": ({second: X[:, :4]}, ValueError, rf"{like} \(2, 4, 3\)"),
        "second would broadcast": (
            {second: X[:1]},
            ValueError,
            rf"{like} \(1, 5, 3\); to broadcast, use {second}\.expand",
        ),
        "second of other rank": ({second: X[..., None]}, ValueError, rf"{like} \(2, 5, 3, 1\)"),
        **wrong_tensors("h", X[:, :1], "the sequence"),
        "h of half": ({"h": X[:, :1].half()}, TypeError, r"h must be torch\.float32 .*, got torch\.float16"),
        "h without time": ({"h": X[:, 0]}, ValueError, rf"{expanded} \(B, 1, \*\) = \(2, 1, 3\), got \(2, 3\)"),
        "h of all steps": ({"h": X}, ValueError, rf"{expanded} .*, got \(2, 5, 3\)"),
        "h of layers": ({"h": X[None, :, :1]}, ValueError, rf"{expanded} .*, got \(1, 2, 1, 3\)"),
        **wrong_resets("(B, S)", 2, 5),
    }
    assert_refused(lambda **given: getattr(functional, name)(**{first: X, second: X, **given}), cases, f"{name}: ")


def test_bad_calls_of_activations():
    for name in ("g", "log_g"):
        cases = {"a list": ({"x": [0.5]}, TypeError, "x must be a tensor, got list")}
        for dtype in (torch.int64, torch.bool, torch.complex64):
            cases[str(dtype)] = ({"x": X.to(dtype)}, TypeError, f"x must be of a floating-point dtype, got {dtype}")
        assert_refused(getattr(functional, name), cases, f"{name}: ")


def test_bad_calls_of_one_recurrence():
    h, unknown = X[:, :1], {"activation": "relu"}
    cases = {
        "activation": (unknown, ValueError, r"activation must be one of \('positive', 'linear', 'tanh'\), got 'relu'"),
        "gate": ({"gate": X.cfloat()}, TypeError, r"gate must be of a floating-point dtype, got torch\.complex64"),
        **wrong_tensors("initial_state", h, "the sequence"),
        "initial_state": (
            {"initial_state": X},
            ValueError,
            r"initial_state must be expandable to \(B, 1, \*\) = \(2, 1, 3\), got \(2, 5, 3\)",
        ),
    }
    for state in (None, h):
        call = functools.partial(functional.mingru, h=state)
        assert_refused(lambda call=call, **given: call(**{"gate": X, "candidate": X, **given}), cases, "mingru: ")
    shape = r"input must be \(2, 5, 3\) because forget is \(2, 5, 3\), got \(2, 1, 3\)"
    cases = {
        "a number": ({"normalize": 0}, TypeError, r"normalize must be a bool, got 0$"),
        "another shape": ({"normalize": False, "input": X[:, :1]}, ValueError, shape),
    }
    inputs = {"forget": X, "input": X, "candidate": X}
    assert_refused(lambda **given: functional.minlstm(**{**inputs, **given}), cases, "minlstm: ")


def test_bad_calls_of_parallel_scan_log():
    inputs = {"log_a": X, "log_b": torch.zeros(2, 6, 3)}
    shape = r"log_b must be \(2, 6, 3\) because log_a is \(2, 5, 3\), got \(2, 5, 3\)"
    cases = {
        "no tensor": ({"log_a": [0.0]}, TypeError, "log_a must be a tensor, got list"),
        "integers": ({"log_a": X.long()}, TypeError, r"log_a must be of a floating-point dtype, got torch\.int64"),
        "one dimension": ({"log_a": X[0, 0]}, ValueError, r"log_a must be \(B, S, \*\), got \(3,\)"),
        "without x_0": ({"log_b": X}, ValueError, shape),
        **wrong_tensors("log_b", inputs["log_b"], "log_a"),
    }
    assert_refused(lambda **given: functional.parallel_scan_log(**{**inputs, **given}), cases, "parallel_scan_log: ")


def test_backends_that_cannot_run():
    unknown, cannot = "backend must be one of 'auto', .*'torch'.*, got", "backend selects 'log', which cannot run this"
    for function, inputs, options, message in (
        (functional.mingru, X, {"backend": "cuda"}, f"{unknown} 'cuda'"),
        (functional.linear_scan, X, {"backend": "Torch"}, f"{unknown} 'Torch'"),
        (functional.mingru, X[:0], {"backend": "cuda"}, f"{unknown} 'cuda'"),
        (functional.linear_scan, X, {"backend": "log"}, f"{cannot} .* the logarithm of a and b.*; use 'auto'"),
        (functional.mingru, X, {"backend": "log", "activation": "tanh"}, f"{cannot} .* activation 'tanh'; use 'auto'"),
    ):
        with pytest.raises(ValueError, match=message):
            function(inputs, inputs, **options)


def test_the_remedy_of_a_refused_b_works():
    """`a must be ...; to broadcast, use a.expand, which copies nothing`: it does what it says."""
    a, b = torch.rand(1, 1, 3), torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match=r"b\.expand, which copies nothing"):
        functional.linear_scan(b, a)
    assert_close(functional.linear_scan(a.expand_as(b), b), functional.linear_scan(a.expand_as(b).clone(), b))


def test_lengths_of_linear_scan():
    a, b = torch.full((2, 3), 0.5), torch.ones(2, 3)
    out, last = functional.linear_scan(a, b, torch.tensor(4.0), lengths=torch.tensor([2, 0]))
    assert (out.tolist(), last.tolist()) == ([[3.0, 2.5, 0.0], [0.0, 0.0, 0.0]], [[2.5], [4.0]])
    cases = {
        "above": ({"lengths": torch.tensor([4, 1])}, ValueError, r"lengths must be from 0 to S = 3, got \[4, 1\]"),
        "shape": ({"lengths": torch.tensor([3])}, ValueError, r"lengths must be \(B,\) = \(2,\), got \(1,\)"),
        "list": ({"lengths": [3, 1]}, TypeError, r"lengths must be an integer tensor \(B,\), got list"),
    }
    assert_refused(functools.partial(functional.linear_scan, a, b), cases, "linear_scan: ")
    # TorchScript has no lengths.
    scripted = torch.jit.script(functional.linear_scan)
    for dtype in (torch.float32, torch.bfloat16, torch.cfloat):
        a, b, h = torch.randn(3, 2, 40, 3, dtype=dtype)
        options = {"h": h[:, :1], "reset": torch.rand(2, 40) < 0.2, "reverse": True}
        assert_close(scripted(a.tanh(), b, **options), functional.linear_scan(a.tanh(), b, **options))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "log"])
@pytest.mark.parametrize("name", ["mingru", "minlstm", "linear_scan"])
def test_batched_gradients_of_functions(name, backend):
    function = getattr(functional, name)
    inputs = [torch.randn(2, 20, 3).double().requires_grad_() for _ in range(3 if name == "minlstm" else 2)]
    h, reset = torch.rand(2, 1, 3).double().requires_grad_(), torch.rand(2, 20) < 0.2
    out = function(*inputs, h, reset=reset, backend=backend)
    grads = torch.randn(4, *out.shape).double()
    found = torch.autograd.grad(out, [*inputs, h], grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, [*inputs, h], each, retain_graph=True) for each in grads]
    for each, parts in zip(found, zip(*one_by_one, strict=True), strict=True):
        assert_close(each, torch.stack(parts))
