"""TorchScript: every class scripted, traced and frozen, saved and run without mingru, and from several threads.

Values are those of the same module in eager mode, which other tests compare with the reference.
"""

import copy
import io
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from cases import CASES, ONE_MAP, ROWS, STACKS, Doubled, assert_equal, graded, padded, refuses, selected_cases, some
from elsewhere import run_without_mingru
from mode import FEW, each_case, given, in_mode, mode
from options import DOUBLE
from torch import nn
from torch.autograd import gradgradcheck

import mingru
from mingru import drop_in, functional

pytestmark = pytest.mark.usefixtures("_scripts_are_freed")

# Batches and steps; cells have batches alone. The first is run until TorchScript has specialized the code for it; the
# others are then new to that code. From 16 steps on, the recurrence is cut into chunks.
SIZES = [(2, 7), (2, 7), (2, 7), (3, 1), (1, 17)]
MANY = [*SIZES, (1, 2), (4, 15), (2, 16), (2, 40)]


@pytest.fixture(autouse=True)
def _only_torch_warns():
    # As torch does when it is imported: the checks of its own layers warn in every trace.
    torch.jit.TracerWarning.ignore_lib_warnings()


def calls(case, count, sizes=SIZES, **factory):
    """For each call: x, and what is given of h and reset."""
    return [given(case, batch, steps, count, **factory) for batch, steps in sizes]


def trace(case, module, count, size, check=False):
    """Checked by torch at another size, for which it traces anew and compares graph and values."""
    one, other = calls(case, count, [size, (3, 19)], **DOUBLE)
    # A list of states comes out, of which torch wants to be told that its length is fixed.
    options = {"strict": not isinstance(case.args()["h"], list)}
    return torch.jit.trace(module, one, check_trace=check, check_inputs=[other], **options)


# Scripted


@mode("torch.jit.script", FEW)
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_script(case, count):
    module = case.make(**DOUBLE)
    run = torch.jit.script(module)
    assert "mingru::" not in str(run.inlined_graph)
    for args in calls(case, count, MANY, **DOUBLE):
        assert_equal(graded(run, run, args), graded(module, module, args))


# TorchScript takes long to compile: every eighth row but the first, which is above, and of these some are quick.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if index % 5 == 0 else [pytest.mark.slow])
        for index, case in enumerate(some(ROWS, 8))
        if index > 0
    ],
)
def test_script_of_any_options_and_with_lengths(case):
    module = case.varied(**DOUBLE)
    run, everything = torch.jit.script(module), case.given(**DOUBLE)
    assert [name for name, _ in run.named_parameters()] == [name for name, _ in module.named_parameters()]
    # Twice: TorchScript runs other code once it has seen the shapes.
    calls = [{"x": everything["x"]}, everything, everything]
    if "lengths" in case.takes:
        calls.append({**padded(case, (9, 1, 0, 21), **DOUBLE)[0], "lengths": torch.tensor([9, 1, 0, 21])})
    for args in calls:
        found = [graded(module, lambda each=each, **given: case.call(each, **given), args) for each in (run, module)]
        assert found[0].keys() == found[1].keys()
        assert_equal(*found, rtol=1e-9, atol=1e-9)


@mode("torch.jit.script", ["MinGRU", "Stack with modules of torch"], [*CASES, STACKS[2]])
def test_script_in_training_and_not(case):
    module = case.make(**DOUBLE)
    for each in module.modules():
        if hasattr(each, "dropout"):
            each.dropout = 0.4
    run = torch.jit.script(module)
    for training in (True, False):
        module.train(training)
        run.train(training)
        # One sequence: of several, a dropout's numbers are drawn in the order of memory, which may be another one.
        for args in calls(case, 3, [(1, 7), (1, 7), (1, 7), (1, 16)], **DOUBLE):
            results = []
            for each in (module, run):
                torch.manual_seed(1)
                results.append(graded(each, each, args))
            assert_equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
# Scripted cells multiply one step at a time, and round otherwise.
@each_case([], ONE_MAP[:5])
def test_script_rounds_no_more_often(case, dtype):
    """In half width, and under autocast, if x is in float32: states are in float32."""
    is_autocast, x = dtype == torch.float32, torch.randn(2, 300, *case.features, dtype=dtype)
    module, eps = case.make(dtype=dtype), torch.finfo(torch.bfloat16 if is_autocast else dtype).eps
    run = torch.jit.script(module)
    h = [torch.rand_like(state, dtype=torch.float32) for state in case.call(module, x)[1]]
    lengths = {"lengths": torch.tensor([200, 300])} if "lengths" in case.takes else {}
    for args in ({}, {"h": h}, lengths):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            (out, states), (expected, last) = (case.call(each, x, **args) for each in (run, module))
        assert_equal(out, expected, rtol=eps, atol=0)
        assert_equal(states, last, rtol=4e-6 if states[0].dtype == torch.float32 else eps, atol=0)
        assert states[0].dtype == torch.float32 or not (is_autocast or "h" in args)


def test_lengths_of_each_integer_dtype_on_another_default_device():
    rnn = mingru.MinGRU(3, 4, bidirectional=True, **DOUBLE)
    run, x, lengths = torch.jit.script(rnn), torch.randn(3, 21, 3, **DOUBLE), torch.tensor([9, 1, 21])
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        with torch.device("meta"):
            found = run(x, lengths=lengths.to(dtype))
        assert_equal(found, rnn(x, lengths=lengths))


def test_functions():
    x = torch.tensor([-math.inf, -1e30, -100.0, -0.5, -0.0, 0.0, 0.5, 1e30, math.inf, math.nan], **DOUBLE)
    for function in (functional.g, functional.log_g):
        run = torch.jit.script(function)
        for _ in range(3):
            assert_equal(run(x), function(x), rtol=0, atol=0, equal_nan=True)
            assert_equal(*(graded(nn.Module(), lambda x, each=each: each(x), [x[1:-2]]) for each in (run, function)))
        assert gradgradcheck(run, torch.tensor([-2.0, -0.3, 0.2, 1.5], **DOUBLE).requires_grad_())
    scripted = torch.jit.script(functional.linear_scan)
    for dtype in (torch.float32, torch.bfloat16, torch.cfloat):
        a, b, h = torch.randn(3, 2, 40, 3, dtype=dtype)
        options = {"h": h[:, :1], "reset": torch.rand(2, 40) < 0.2, "reverse": True}
        assert_equal(scripted(a.tanh(), b, **options), functional.linear_scan(a.tanh(), b, **options))
    t = torch.rand(3, 9, **DOUBLE).cumsum(1)
    traced = torch.jit.trace(lambda t: functional.elapsed_times(t, 1.5), t[:2, :5])
    assert_equal(traced(t), functional.elapsed_times(t, 1.5), rtol=0, atol=0)
    for name in {*dir(functional)} - {"g", "log_g", "linear_scan"}:
        refuses((RuntimeError, torch.jit.frontend.FrontendError), "", torch.jit.script, getattr(functional, name))


@pytest.mark.slow
def test_a_layer_of_ones_own():
    stack, x = mingru.Stack([mingru.MinGRU(4, 4), Doubled(4), mingru.MinLSTM(8, 5)]), torch.randn(3, 7, 4)
    run, reset = torch.jit.script(stack), torch.rand(3, 7) < 0.3
    assert_equal(run(x, None, reset), stack(x, None, reset))
    assert_equal(run(x, stack(x)[1]), stack(x, stack(x)[1]))


def test_a_language_model():
    lm, ids, reset = (
        mingru.models.LanguageModel(11, 8, 2, conv=4, mlp=2),
        torch.randint(11, (2, 7)),
        torch.rand(2, 7) < 0.3,
    )
    run, (_, state) = torch.jit.script(lm), lm(ids)
    with torch.no_grad():
        assert_equal(run(ids, state, reset, torch.tensor([3, 7])), lm(ids, state, reset, torch.tensor([3, 7])))
    refuses(torch.jit.Error, "must be 4 tensors, got 3", run, ids, state[1:])
    # States do not keep the sequence.
    _, h = torch.jit.script(mingru.models.Block(8, conv=4))(torch.randn(3, 500, 8))
    assert [each.untyped_storage().nbytes() for each in h] == [4 * 3 * 8, 4 * 3 * 3 * 8]


class Sum(mingru.modules.Layer, role="sequence"):
    input_dims = output_dims = 3

    def forward(self, x, h=None):
        return x.cumsum(1), [x.sum(1)[None]]


def with_sum(*sizes):
    return mingru.Stack([Sum()])


class Around(nn.Module):
    """nn.GRU itself can't be called when scripted on its own."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, h: torch.Tensor | None = None):
        return self.rnn(x, h)


@pytest.mark.parametrize("home", [nn, drop_in])
def test_drop_in_scripts_as_torch_does(home):
    run = torch.jit.script(Around(home.GRU(3, 4, 2, bidirectional=True)))
    assert [run(torch.randn(*sizes, 3))[0].shape for sizes in ((5, 2), (5,))] == [(5, 2, 8), (5, 8)]
    cell = torch.jit.script(home.GRUCell(3, 4))
    assert cell(torch.randn(2, 3), torch.randn(2, 4)).shape == (2, 4) and cell(torch.randn(3)).shape == (4,)
    for call in ((torch.randn(2, 2),), (torch.randn(2, 3), torch.randn(1, 4)), (torch.randn(1, 2, 3),)):
        refuses((RuntimeError, torch.jit.Error), "", cell, *call)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_torchs_layers_accelerated_and_patched(bidirectional):
    rnn, x = nn.GRU(3, 4, 2, bidirectional=bidirectional), torch.randn(12, 3, 3)
    own, warned = Around(copy.deepcopy(rnn)), []
    drop_in.accelerate(own)
    for module in (Around(rnn), own):
        with pytest.warns() as seen:
            run = torch.jit.trace(module, (x,))
        warned.append(len(seen))
        for each in (run, torch.jit.script(module)):
            assert_equal(each(x + 1), rnn(x + 1), rtol=1e-4, atol=1e-4)
    assert warned[0] == warned[1]
    assert [name for name, *_ in drop_in.accelerate(nn.ModuleDict({"a": torch.jit.script(rnn)})).left] == ["a"]
    with drop_in.patch():
        patched = Around(nn.GRU(3, 4))
    assert_equal(torch.jit.script(copy.deepcopy(patched))(x), patched(x), rtol=1e-4, atol=1e-4)


# Checks, of shapes only

X, NO = torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool)
IMAGES = torch.randn(2, 5, 3, 4)
SCRIPTED = {
    mingru.MinGRU(3, 5): [
        ((X[..., :2],), "x must be (B, S, 3), got [2, 5, 2]"),
        ((X, None, None, None, X[0]), "dt must be [2, 5], got [5, 3]"),
    ],
    mingru.MinGRU(3, 5, batch_first=False): [((X[0],), "x must be (S, B, 3), got [5, 3]")],
    mingru.MinGRUCell(3, 8, gate="signed"): [
        ((X,), "x must be (B, 3), got [2, 5, 3]"),
        ((X[:, 0, :2],), "x must be (B, 3), got [2, 2]"),
        ((X[:, 0], torch.zeros(1, 8)), "h must be [2, 8], got [1, 8]"),
        ((X[:, 0], None, NO[0, :1]), "reset must be [2], got [1]"),
        ((X[:, 0], None, None, X[:, 0, 0]), "dt must be None because this cell takes no"),
    ],
    mingru.MinConv1dGRU(3, 4, 3, bidirectional=True): [
        ((IMAGES[:, :, :2],), "x must be (B, S, 3, *space)"),
        ((X,), "x must be (B, S, 3, *space)"),
        ((IMAGES, [torch.zeros(1)]), "h must have one state per layer and direction"),
        ((IMAGES, None, NO[:1]), "reset must be"),
    ],
    mingru.Stack([mingru.MinConv1dGRU(3, 3, 3, 2, padding=1), mingru.MinConv1dGRU(3, 3, 3)], residual=True): [
        ((IMAGES, None, None, torch.tensor([5, 2])), "lengths must be None because convolutional layers do not"),
        ((IMAGES, None, None, None, torch.ones(2, 5)), "dt must be None because convolutional layers do not"),
        ((IMAGES, [torch.zeros(1)] * 2), "h must be 3 tensors, got 2"),
        ((IMAGES,), "layers[1] must keep the shape of x because residual is True, got from [2, 5, 3, 4] to [2, 5"),
    ],
    drop_in.GRULike(3, 4, cell="mingru"): [
        *(((x,), "input must be") for x in (X[..., :2], X[None])),
        *((args, "hx must be") for args in ((X, X[:1, :1]), (X, X[:1, :, 0]), (X[0], X[:1]))),
    ],
    mingru.MinConv1dGRU(3, 4, 1, batch_first=False): [((X,), "x must be (S, B, 3, *space)")],
    mingru.MinConv1dGRUCell(3, 4, 3): [
        ((IMAGES,), "x must be (B, 3, *space)"),
        ((X[0, :, :2],), "x must be (B, 3, *space)"),
        ((IMAGES[0], torch.zeros(1, 3, 4, 2)), "h must be expandable to (B, H, *space)"),
        ((IMAGES[0, 0], torch.zeros(1, 4, 2)), "h must be expandable to (B, H, *space)"),
        ((IMAGES[0], None, NO[0, :2]), "reset must be"),
    ],
}


@pytest.mark.parametrize(("module", "calls"), SCRIPTED.items(), ids=[module.name for module in SCRIPTED])
def test_scripted_modules_refuse_what_would_pass_unseen(module, calls):
    scripted = torch.jit.script(module)
    for args, message in calls:
        with pytest.raises(torch.jit.Error) as caught:
            scripted(*args)
        assert f"{module.name}: {message}" in str(caught.value)


# Traced


@mode("torch.jit.trace", [*FEW, "mingru.GRU", "models.Block"])
@pytest.mark.parametrize(("count", "size"), [(1, (1, 1)), (2, (2, 7)), (3, (1, 17))])
def test_trace(case, count, size):
    """Batch and length are those of each call, also where the trace saw but one sequence or one step."""
    module = case.make(**DOUBLE)
    run = trace(case, module, count, size, check=True)
    graph = str(run.inlined_graph)
    # No operator of ours, and no function of Python's.
    assert "mingru::" not in graph and "^" not in graph
    for args in calls(case, count, MANY, **DOUBLE):
        assert_equal(graded(run, run, args), graded(module, module, args))


@pytest.mark.parametrize("rnn", [mingru.GRU, mingru.GRUCell, partial(mingru.MinLSTM, normalize=False), with_sum])
def test_a_trace_refuses_times_that_it_would_ignore(rnn):
    given = {"x": X[:, 0], "dt": X[:, 0, 0]} if rnn is mingru.GRUCell else {"x": X, "dt": X[..., 0]}
    trace = partial(torch.jit.trace, example_kwarg_inputs=given, check_trace=False)
    refuses(ValueError, "dt must be None because", trace, rnn(3, 4))


def test_lengths_in_a_trace():
    rnn = mingru.MinGRU(3, 4, 2, bidirectional=True, norm="layer", **DOUBLE)
    x, h, dt = torch.randn(2, 21, 3, **DOUBLE), torch.randn(4, 2, 1, 4, **DOUBLE), torch.rand(2, 21, **DOUBLE)
    args = x, h, torch.rand(2, 21) < 0.2, torch.tensor([4, 21]), dt
    run = torch.jit.trace(rnn, args, check_trace=False)
    for lengths in ((0, 9), (0, 0), (3, 0)):
        args = *args[:3], torch.tensor(lengths), dt
        assert_equal(*(graded(each, each, args) for each in (run, rnn)), rtol=1e-9, atol=1e-9)


# Of the checks, that they are not traced.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_has_no_slices():
    """In which a convolution and its recurrence are computed without gradients."""
    rnn, x = mingru.MinConv2dGRU(4, 6, 3, padding=1, **DOUBLE), torch.randn(81, 90, 4, 5, 5, **DOUBLE)
    with torch.no_grad():
        assert_equal(torch.jit.trace(rnn, (x[:80, :88],))(x), rnn(x), rtol=1e-9, atol=1e-9)


# Scripted, and then changed


CHANGES = [
    in_mode("torch.jit.freeze", torch.jit.freeze),
    in_mode("optimize_for_inference", torch.jit.optimize_for_inference),
]


@pytest.mark.parametrize("change", CHANGES)
@each_case([])
def test_frozen(case, change):
    module = case.make().eval()
    run = change(torch.jit.script(module))
    assert "mingru::" not in str(run.inlined_graph)
    eps = torch.finfo(torch.float32).eps
    for args in calls(case, 3):
        assert_equal(run(*args), module(*args), rtol=32 * eps, atol=32 * eps)


# Saved


# Each error is for its own cell to tell, which is one of many.
LOAD_AND_RUN = """
import warnings

warnings.simplefilter("error")
warnings.filterwarnings("ignore", "`torch.jit.load` is (deprecated|not supported)")
for key, (path, inputs) in given.items():
    try:
        run = torch.jit.load(path)
        results[key] = [run(*args) for args in inputs]
    except Exception as error:
        results[key] = f"{type(error).__name__}: {error}"
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, request):
    """For each form and case: what comes out in a process without mingru, and what should."""
    torch.manual_seed(0)
    torch.jit.TracerWarning.ignore_lib_warnings()  # The fixture of each test comes later.
    folder = tmp_path_factory.mktemp("saved")
    expected, outcomes, saved = {}, {}, {}
    for index, case in enumerate(selected_cases(request)):
        for form in ("script", "trace"):
            key, path = (form, case.name), f"{form}{index}.pt"
            module = case.make(**DOUBLE).eval()
            inputs = calls(case, 3, [(2, 7), (2, 7), (3, 17)], **DOUBLE)
            expected[key] = [module(*args) for args in inputs]
            try:
                run = torch.jit.script(module) if form == "script" else trace(case, module, 3, SIZES[0])
                torch.jit.save(run, str(folder / path))
                saved[key] = path, inputs
            except Exception as error:
                outcomes[key] = repr(error)
    outcomes |= run_without_mingru(LOAD_AND_RUN, folder, saved)
    return {key: (outcomes[key], result) for key, result in expected.items()}


@pytest.mark.parametrize(
    "form", [in_mode("script saved, run without mingru", "script"), in_mode("trace saved, run without mingru", "trace")]
)
@each_case([])
def test_saved_runs_without_mingru(case, form, elsewhere):
    got, expected = elsewhere[form, case.name]
    assert not isinstance(got, str), got
    assert_equal(got, expected)


# From several threads


@mode("scripted, from several threads", [])
def test_threads(case):
    """All at once, for each thread calls of its own, of code of which nothing has been run."""
    module, start, saved = case.make(**DOUBLE), threading.Barrier(8), io.BytesIO()
    inputs = [calls(case, 3, [(2, 7), (1 + index, 9 + index), (2, 7)], **DOUBLE) for index in range(8)]
    expected = [[graded(module, module, args) for args in mine] for mine in inputs]
    # Modules scripted alike share what they specialise.
    torch.jit.save(torch.jit.script(module), saved)
    saved.seek(0)
    run = torch.jit.load(saved)

    def work(mine):
        start.wait()
        return [graded(run, run, args) for args in mine]

    with ThreadPoolExecutor(8) as threads:
        assert_equal(list(threads.map(work, inputs)), expected)
