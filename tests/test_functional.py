"""The functions as users call them: values at the edges, states, back ends, elapsed times, resets. Refusals: data/."""

import functools
import inspect
import math
import sys
import warnings

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import ALL_BACKENDS, DOUBLE, EXACT, TIGHT, assert_equal, graded, grid, tensors
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import mingru
from mingru import functional
from mingru.check import ranges as check
from mingru.functional import check_resets, elapsed_times

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


@half_widths
@pytest.mark.parametrize("name", BY_HAND)
def test_activations_of_half_width_round_as_few_times_as_their_steps(name, dtype):
    v = torch.randn(1000, dtype=dtype)
    out, exact = getattr(functional, name)(v), getattr(functional, name)(v.double())
    above, below = (v + 0.5, v.sigmoid()) if name == "g" else ((v + 0.5).log(), F.logsigmoid(v))
    error, allowed = ((value.double() - exact).abs().max() for value in (out, torch.where(v >= 0, above, below)))
    assert out.dtype == dtype and 0 < error <= 2 * allowed


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


def scan_of_logarithms(log_a, log_b):
    start = log_b[:, :1].exp()
    return torch.cat([start, reference.linear_scan(log_a.exp(), log_b[:, 1:].exp(), start)], 1)


INDEX = torch.arange(100).view(2, 50)
RESET, TIMES = INDEX % 7 == 3, INDEX.double() * 3 % 5 / 2


def gru(r, z, c, weight, bias=0.0, h=0.0):
    zeros, reset = torch.zeros(2, 1, 4).double(), RESET[:, : r.shape[1]] if torch.is_tensor(h) else None
    return reference.gru(r, z, c, weight, zeros[0, 0] + bias, zeros + h, reset, zeros + h, False)


def with_resets(function, name="initial_state", times=None, **options):
    """Call a function with resets, to the state before the first step, which is the last argument."""

    def run(x, *args, **given):
        dt = {} if times is None else {"dt": times[:, : x.shape[1]]}
        return function(x, *args, **{name: args[-1], "reset": RESET[:, : x.shape[1]]}, **dt, **options, **given)

    return run


def of_kind(kind):
    return lambda *inputs: reference.CELLS[f"mingru_{kind}"](*inputs, None, None, "tanh")


def turned(gate, *args, **options):
    return functional.mingru(gate[..., ::2], *args, kind="rotation", angle=gate[..., 1::2], **options)


def padded(x):
    """Resets and lengths, of which one is 0, and the mask of the padding."""
    lengths = torch.tensor([0, 1]) * ((x.shape[1] + 1) // 2)
    return {"reset": RESET[:, : x.shape[1]], "lengths": lengths}, torch.arange(x.shape[1]) >= lengths[:, None]


def scan_of_padded(a, b, h, **options):
    given, padding = padded(a)
    a, b = (each.masked_fill(padding[..., None], NAN) for each in (a, b))
    return functional.linear_scan(a, b, h, **given, **options)


def truth_of_padded(a, b, h):
    given, padding = padded(a)
    out = reference.linear_scan(a, b, h, reset=given["reset"])
    return out.masked_fill(padding[..., None], 0.0), torch.cat([h, out], 1)[range(2), given["lengths"]].unsqueeze(1)


def times_of_padded(t, first):
    given, padding = padded(t)
    return elapsed_times((t**2).cumsum(1).masked_fill(padding, NAN), first**2, **given)


def columns(t):
    return elapsed_times((t**2).cumsum(0), 0.0, batch_first=False)


def gaps(t, first=None):
    """Squares, in place of which resets have another number."""
    found, (given, padding) = F.pad(t[:, 1:] ** 2, (1, 0))[:, : t.shape[1]], padded(t)
    if first is None:
        return found
    is_first = given["reset"] | (torch.arange(t.shape[1]) == 0)
    return torch.where(is_first, first[:, None] ** 2, found).masked_fill(padding, 0.0)


# By name, and what else tells two apart: a function of numbers, its truth, and the shapes of its arguments.
SAME, TWO, THREE = (functional, reference), ("2 S 4",) * 2, ("2 S 4",) * 3
TRUTHS = {
    "g": (functional.g, reference.g, "2 S"),
    "log_g": (functional.log_g, lambda v: reference.g(v).log(), "2 S"),
    "mingru": (functional.mingru, reference.mingru, *TWO),
    "mingru without features": (functional.mingru, reference.mingru, "2 S", "2 S"),
    "mingru of rotations": (turned, of_kind("rotation"), *TWO),
    "minlstm": (functional.minlstm, reference.minlstm, *THREE),
    "minlstm without normalization": (
        functools.partial(functional.minlstm, normalize=False, activation="tanh"),
        functools.partial(reference.minlstm_unnormalized, activation="tanh"),
        *THREE,
    ),
    "gru": (functional.gru, gru, *THREE, "12 2"),
    "gru with everything": (with_resets(functional.gru), gru, *THREE, "12 4", "4", "2 1 4"),
    "linear_scan": (functional.linear_scan, lambda a, b: reference.linear_scan(a, b, torch.zeros(())), *TWO),
    "linear_scan in reverse": (*(functools.partial(each.linear_scan, reverse=True) for each in SAME), *TWO, "2 1 4"),
    "linear_scan with everything": (scan_of_padded, truth_of_padded, *TWO, "2 1 4"),
    "parallel_scan_log": (functional.parallel_scan_log, scan_of_logarithms, "2 S 4", "2 S+1 4"),
    "elapsed_times": (lambda t: elapsed_times((t**2).cumsum(1), 0.0), gaps, "2 S"),
    "elapsed_times of columns": (columns, lambda t: gaps(t.t()).t(), "S 2"),
    "elapsed_times with everything": (times_of_padded, gaps, "2 S", "2"),
}
for kind, own, shapes in (("mingru", {"min_decay": 0.3}, TWO), ("minlstm", {}, THREE)):
    calls = zip(SAME, ("initial_state", "initial"), strict=True)
    calls = (with_resets(getattr(home, kind), name, TIMES, activation="linear", **own) for home, name in calls)
    TRUTHS[f"{kind} with everything"] = *calls, *shapes, "2 1 4"
for kind in ("signed", "quaternion"):
    TRUTHS[f"mingru of kind {kind}"] = functools.partial(functional.mingru, kind=kind), of_kind(kind), *TWO
own = with_resets(functional.mingru), with_resets(reference.mingru, "initial"), *TWO
TRUTHS |= {f"mingru from ({shape})": (*own, shape) for shape in ("", "1", "4", "1 4", "1 1 4", "2 1 1", "2 1 4")}


def test_every_function_has_a_truth():
    """But those of masks, which have no numbers."""
    assert {name.split()[0] for name in TRUTHS} == {*dir(functional)} - {"reset_from_lengths", "check_resets"}


def test_every_option_of_a_function_has_a_truth():
    missing = {}
    for function in (getattr(functional, name.split()[0]) for name in TRUTHS):
        options = {each.name: each.default for each in inspect.signature(function).parameters.values()}
        missing[inspect.unwrap(function).__code__] = {
            name: default for name, default in options.items() if default is not inspect.Parameter.empty
        }

    def seen(frame, event, _):
        left = missing.get(frame.f_code, {}) if event == "call" else {}
        for option, default in [*left.items()]:
            value = frame.f_locals[option]
            if isinstance(value, torch.Tensor) or value != default:
                del left[option]

    for name, (function, *_) in TRUTHS.items():
        given = numbers(name, 3)
        sys.setprofile(seen)
        function(*given)
        sys.setprofile(None)
    assert {code.co_name: {*left} for code, left in missing.items() if left.keys() - {"backend"}} == {}


def numbers(name, steps):
    sizes = (eval(f"[{', '.join(shape.split())}]", {"S": steps}) for shape in TRUTHS[name][2:])
    return [torch.randn(each, **DOUBLE, requires_grad=True) for each in sizes]


@grid(name=TRUTHS, steps=[0, 1, 2, 50])
def test_every_function_is_the_reference(name, steps):
    """Values and gradients, on each backend."""
    (function, truth, *_), given = TRUTHS[name], numbers(name, steps)
    expected = graded(nn.Module(), truth, given)
    is_chosen = "backend" in inspect.signature(getattr(functional, name.split()[0])).parameters
    for backend in ALL_BACKENDS if is_chosen else (None,):
        options = {"backend": backend} if is_chosen else {}
        if backend != "log" or name in ("mingru", "minlstm"):
            assert_close(graded(nn.Module(), functools.partial(function, **options), given), expected, **TIGHT)
            # Each alone has a gradient, and it is no error to ask for it.
            for index in range(len(given)):
                leaves = [each.detach().requires_grad_(at == index) for at, each in enumerate(given)]
                assert tensors(function(*leaves, **options))[0].requires_grad


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *given):
        return self.function(*given)


# A function with everything is quick, and so is what has no such row.
MODES = [
    pytest.param(name, marks=[pytest.mark.slow] * (f"{name.split()[0]} with everything" in TRUTHS.keys() - {name}))
    for name in TRUTHS
    if "from (" not in name
]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", MODES)
def test_every_function_in_every_mode(name):
    """Derivatives of each kind; compiled, traced and batched, for sequences of other lengths too."""
    function, given = TRUTHS[name][0], numbers(name, 3)
    assert gradgradcheck(function, given)
    assert gradcheck(function, given, check_forward_ad=True, check_batched_grad=True)
    letters = [shape.split() for shape in TRUTHS[name][2:]]
    sizes = [{at: torch.export.Dim.AUTO for at, size in enumerate(each) if "S" in size} for each in letters]
    ways = [
        lambda *given: [each[1] for each in tensors(torch.vmap(function)(*(torch.stack([-x, x]) for x in given)))],
        torch.compile(function, fullgraph=True, dynamic=True, backend="eager"),
        torch.jit.trace(Called(function), given),
        torch.export.export(Called(function), (*given,), dynamic_shapes=((*sizes,),)).module(),
    ]
    # Times are only subtracted.
    tolerance = EXACT if name.startswith("elapsed_times") else TIGHT
    for steps in (3, 5, 40):
        given = numbers(name, steps)
        expected = graded(nn.Module(), function, given)
        for run in ways:
            assert_equal(graded(nn.Module(), run, given), expected, **tolerance)


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


def test_without_a_state_the_zero_state_also_after_a_reset():
    x = torch.randn(2, 2, 50, 3).double()
    assert_close(functional.mingru(*x, reset=RESET), reference.mingru(*x, None, RESET), **TIGHT)
    a, b, reset = torch.tensor([[2.0, 3.0, 5.0]]), torch.ones(1, 3), torch.tensor([[False, True, False]])
    # 2*4+1 = 9; cut: 1; 5*1+1 = 6. From the end: 5*4+1 = 21; cut: 1; 2*1+1 = 3
    assert functional.linear_scan(a, b, torch.tensor(4.0), reset=reset).tolist() == [[9.0, 1.0, 6.0]]
    assert functional.linear_scan(a, b, torch.tensor(4.0), reset=reset, reverse=True).tolist() == [[3.0, 1.0, 21.0]]


@half_widths
def test_half_width_input_takes_states_and_times_of_float32(dtype):
    x, states, dt = torch.randn(2, 20, 3).to(dtype), torch.randn(2, 3).to(dtype), torch.ones(2, 20)
    narrow, wide = (functional.mingru(x, x, h[0], initial_state=h[1], dt=dt) for h in (states, states.float()))
    assert narrow.dtype == wide.dtype == dtype and torch.equal(narrow, wide)


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


# Elapsed times and resets


B, S, IN, H = 4, 9, 3, 5


@pytest.fixture(autouse=True)
def _nothing_was_called():
    check._warn_once.cache_clear()
    check._WITH_LONG_SEQUENCES.clear()


@pytest.mark.parametrize("grad", [True, False])
def test_nanoseconds_warn_once(grad):
    rnn, x, dt = mingru.MinGRU(IN, H), torch.zeros(2, 3, IN), torch.full((2, 3), 3.6e12)
    with torch.set_grad_enabled(grad), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for usual in (dt / 3.6e12, dt * torch.inf, torch.tensor([[1.0, 3.6e12, 0.0]]).expand(2, 3)):
            rnn(x, dt=usual)
        assert not seen
        for _ in range(2):
            rnn(x, dt=dt)
            rnn(x, dt=dt.where(torch.tensor([False, True, True]), 0.0))
    assert [(each.filename, each.category) for each in seen] == [(__file__, RuntimeWarning)]
    assert str(seen[0].message).startswith("MinGRU: dt is above 1e+06 at all steps, which erases the state; divide dt")


TIMES, INCREASING = torch.arange(9.0), "increasing at all steps, as times are"


PROBLEMS = [
    (torch.zeros(2, 3), "0 at all steps, which ignores x"),
    (torch.zeros(2, 1), ""),
    (TIMES.expand(2, 9), INCREASING),
    (torch.stack([TIMES, TIMES * (TIMES < 4)]), INCREASING),  # the second is padded
    *((dt, "") for dt in (torch.stack([TIMES, TIMES.flip(0) + 1]), (TIMES + 1).expand(2, 9)[:, :7], torch.ones(2, 9))),
]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("dt", "problem"), PROBLEMS)
def test_times_in_place_of_gaps_warn_in_the_first_long_call(dt, problem, batch_first):
    rnn, order = mingru.MinGRU(IN, H, batch_first=batch_first), (0, 1) if batch_first else (1, 0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for given in (torch.ones(2, 3), dt, dt + 0):
            rnn(torch.zeros(*given.shape, IN).permute(*order, 2), dt=given.permute(order))
    assert [str(each.message).partition(";")[0] for each in seen] == [f"MinGRU: dt is {problem}"] * bool(problem)


# elapsed_times


def test_elapsed_times_by_hand():
    t = torch.tensor([[1.0, 3.0, 3.0, 7.5], [-2.0, 0.0, 1.0, 1.5]], dtype=torch.double)
    expected = torch.tensor([[0.5, 2.0, 0.0, 4.5], [0.5, 2.0, 1.0, 0.5]], dtype=torch.double)
    assert_close(elapsed_times(t, 0.5), expected, **EXACT)
    assert_close(elapsed_times(t.t(), 0.5, batch_first=False), expected.t(), **EXACT)
    # Each sequence has its own first time, here of another dtype.
    own = elapsed_times(t, torch.tensor([4, 6]))
    assert_close(own, torch.cat([torch.tensor([[4.0], [6.0]]).double(), expected[:, 1:]], 1), **EXACT)
    assert elapsed_times(t[:, :0], 1.0).shape == (2, 0) and elapsed_times(t[:0], 1.0).shape == (0, 4)
    assert elapsed_times(t, math.inf)[:, 0].isinf().all()
    # Integers are exact: float32 cannot tell the seconds of today's Unix times apart.
    t = 1_700_000_000 + torch.tensor([[0, 1, 3]])
    assert_close(elapsed_times(t, 2.5), torch.tensor([[2.5, 1.0, 2.0]]), **EXACT)
    assert elapsed_times(torch.tensor([[0, 255]], dtype=torch.uint8), 1)[0, 1] == 255
    assert elapsed_times(torch.tensor([[-100, 100]], dtype=torch.int8), 1)[0, 1] == 200
    # Concatenated and padded sequences.
    t, reset = torch.tensor([[1.0, 2.0, 5.0, 0.0, 0.5]]), torch.arange(5)[None] == 3
    assert elapsed_times(t, 9.0, reset=reset).tolist() == [[9.0, 1.0, 3.0, 9.0, 0.5]]
    assert elapsed_times(t.t(), 9.0, reset=reset.t(), batch_first=False).flatten().tolist() == [9.0, 1.0, 3.0, 9.0, 0.5]
    padded = torch.tensor([[1.0, 2.0, 5.0], [4.0, 0.0, math.nan], [math.nan, 0.0, 0.0]])
    dt = elapsed_times(padded, 9.0, lengths=torch.tensor([3, 1, 0]))
    assert dt.tolist() == [[9.0, 1.0, 3.0], [9.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_elapsed_times_of_any_batch_in_a_graph():
    model, t = Called(lambda t: elapsed_times(t, 1.5)), torch.rand(2, 5, **DOUBLE).cumsum(1)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("steps")}
    exported = torch.export.export(model, (t,), dynamic_shapes=((sizes,),)).module()
    other = torch.rand(3, 9, **DOUBLE).cumsum(1)
    assert_close(exported(other), elapsed_times(other, 1.5), **EXACT)


# check_resets

LAYERS = {
    "MinGRU": lambda: mingru.MinGRU(IN, H, 2, candidate="tanh", residual=True),
    "MinLSTM": lambda: mingru.MinLSTM(IN, H, batch_first=False),
    "Stack": lambda: mingru.Stack([mingru.MinGRU(IN, H), mingru.MinLSTM(H, H)]),
    "drop_in.LSTMLike": lambda: mingru.drop_in.LSTMLike(IN, H, cell="minlstm"),
}
MISTAKES = {
    "early": r"flags one step early; pass reset\[t\] = flags\[t - 1\]",
    "late": r"flags one step late; pass reset\[t\] = flags\[t \+ 1\]",
    "inverted": "inverted flags; pass ~reset",
    "unused": "a rollout without resets; pass each step its flags there too",
    "other": "flags that do not reproduce the rollout; check h, and that rnn has not changed and has no dropout",
    "one": "flags that do not reproduce the rollout.*",
}


def rollout(rnn, x, h, reset, time):
    outs = []
    for one, flags in zip(x.split(1, time), reset.split(1, time), strict=True):
        out, h = rnn(one, h, reset=flags)
        outs.append(out)
    return torch.cat(outs, time)


@grid(name=LAYERS, mistake=[None, *MISTAKES])
def test_the_mistake_is_named(name, mistake):
    rnn = LAYERS[name]()
    time = int(rnn.batch_first)
    # One more step at both ends, so that flags can be moved.
    flags = torch.rand(B, S + 2) < 0.3
    flags[0, 5] = True
    moved = {"early": flags[:, 2:], "late": flags[:, :-2], "inverted": ~flags[:, 1:-1]}
    in_order = [torch.randn(B, S, IN), flags[:, 1:-1], moved.get(mistake, flags[:, 1:-1])]
    x, right, reset = in_order if time == 1 else (each.transpose(0, 1) for each in in_order)
    _, h = rnn(x)
    out = rollout(rnn, x, h, torch.zeros_like(right) if mistake == "unused" else right, time)
    out = out * 1.01 if mistake == "other" else out
    if mistake == "one":
        out[-1, -1, 2] += 0.01
    if mistake is None:
        check_resets(rnn, x, h, reset, out)
        return
    with pytest.raises(ValueError, match=f"^check_resets: reset must be .*, got {MISTAKES[mistake]}$"):
        check_resets(rnn, x, h, reset, out)


def test_any_function_and_observations_of_any_dims():
    encoder, rnn = nn.Flatten(2), mingru.MinGRU(IN * 2, H)
    x, reset = torch.randn(B, S, IN, 2), torch.rand(B, S) < 0.3
    reset[0, 1] = True
    out = rollout(rnn, encoder(x), None, reset, 1)
    check_resets(lambda x, h, reset: rnn(encoder(x), h, reset), x, None, reset, out)
