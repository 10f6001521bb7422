"""TorchScript: every class scripted, traced and frozen, saved and run without mingru, and from several threads."""

import contextlib
import io
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import (
    CASES,
    assert_equal,
    every_case,
    every_case_of_few_quick,
    every_case_slowly,
    parametrized,
    selected_cases,
    tensors,
)
from elsewhere import run_without_mingru

pytestmark = pytest.mark.usefixtures("_scripts_are_freed")

DOUBLE = {"dtype": torch.float64}
GRADED = {**DOUBLE, "requires_grad": True}
# Batches and steps; cells have batches alone. The first is run until TorchScript has specialised the code for it; the
# others are then new to that code. From 16 steps on, the recurrence is cut into chunks.
FEW = [(2, 7), (2, 7), (2, 7), (3, 1), (1, 17)]
MANY = [*FEW, (1, 2), (4, 15), (2, 16), (2, 40)]
ALL = ("h", "reset")

# What torch itself says of all this.
DEPRECATED = re.compile(
    r"`torch\.jit\.\w+` is (deprecated|not supported in Python 3\.14\+ and may break)\. "
    r"Please (switch to `torch\.compile` or `torch\.export`|switch to `torch\.export`|use `torch\.compile` instead)\."
)


@contextlib.contextmanager
def nothing_of_ours_warns():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # As torch does when it is imported: the checks of its own layers, such as GroupNorm, warn in every trace.
        torch.jit.TracerWarning.ignore_lib_warnings()
        yield
    others = [each for each in caught if not DEPRECATED.fullmatch(str(each.message))]
    assert not others, "\n".join(f"{each.filename}:{each.lineno}: {each.message}" for each in others)


@pytest.fixture(autouse=True)
def _watched():
    with nothing_of_ours_warns():
        yield


def test_what_warns_is_seen():
    with pytest.raises(AssertionError, match="ours"), nothing_of_ours_warns():
        warnings.warn("ours", stacklevel=1)


def arguments(case, given, batch, steps, **factory):
    """For the call: x, and what is given of h and reset."""
    args = [case.x(batch, steps, **factory)]
    with_reset = "reset" in given
    if "h" in given or with_reset:
        args.append(case.h(batch, **factory) if "h" in given else None)
    if with_reset:
        args.append(case.reset(batch, steps))
    return tuple(args)


def calls(case, given, sizes=FEW, **factory):
    return [arguments(case, given, batch, steps, **factory) for batch, steps in sizes]


def graded(module, args):
    """What comes out, and the gradients of x, h and all parameters; 0 where there is none."""
    outputs = tensors(module(*args))
    leaves = [parameter for _, parameter in sorted(module.named_parameters())]
    leaves += [each for each in tensors(args) if each.requires_grad]
    loss = sum(each.cos().sum() for each in outputs)
    return outputs, torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)


def trace(case, module, given, size, check=False, **factory):
    """Checked by torch at another size, for which it traces anew and compares graph and values."""
    one, other = calls(case, given, [size, (3, 19)], **factory)
    # A list of states comes out, of which torch wants to be told that its length is fixed.
    options = {"strict": not isinstance(case.h(), list)}
    return torch.jit.trace(module, one, check_trace=check, check_inputs=[other], **options)


def with_dropout(module):
    for each in module.modules():
        if hasattr(each, "dropout"):
            each.dropout = 0.4
    return module


# Scripted


@pytest.mark.mode("torch.jit.script")
@pytest.mark.parametrize(
    "given",
    [
        pytest.param((), id="x", marks=pytest.mark.slow),
        pytest.param(ALL, id="all"),
    ],
)
@every_case_of_few_quick
def test_script(case, given):
    module = case.make(**DOUBLE)
    run = torch.jit.script(module)
    assert "mingru::" not in str(run.inlined_graph)
    for args in calls(case, given, MANY, **GRADED):
        assert_equal(graded(run, args), graded(module, args))


@pytest.mark.mode("torch.jit.script")
@parametrized(CASES, quick=["MinGRU"])
def test_script_in_training_and_not(case):
    module = with_dropout(case.make(**DOUBLE))
    run = torch.jit.script(module)
    for training in (True, False):
        module.train(training)
        run.train(training)
        # One sequence: of several, a dropout's numbers are drawn in the order of memory, which may be another one.
        for args in calls(case, ALL, [(1, 7), (1, 7), (1, 7), (1, 16)], **GRADED):
            torch.manual_seed(1)
            expected = graded(module, args)
            torch.manual_seed(1)
            assert_equal(graded(run, args), expected)


# Traced


@pytest.mark.mode("torch.jit.trace")
@pytest.mark.parametrize(
    ("given", "size"), [((), (1, 1)), (("h",), (2, 7)), (ALL, (1, 17))], ids=["x", "x and h", "all"]
)
@every_case_of_few_quick
def test_trace(case, given, size):
    """Batch and length are those of each call, also where the trace saw but one sequence or one step."""
    module = case.make(**DOUBLE)
    run = trace(case, module, given, size, check=True, **DOUBLE)
    graph = str(run.inlined_graph)
    # No operator of ours, and no function of Python's.
    assert "mingru::" not in graph and "^" not in graph
    for args in calls(case, given, MANY, **GRADED):
        assert_equal(graded(run, args), graded(module, args))


@pytest.mark.mode("torch.jit.trace")
@every_case
def test_trace_refuses_what_does_not_fit(case):
    x, h = case.x(2, **DOUBLE), case.h(5, **DOUBLE)
    with pytest.raises((ValueError, RuntimeError), match=r"\bhx?(\[\d\])? must be"):
        torch.jit.trace(case.make(**DOUBLE), (x, h))


# Scripted, and then changed


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(torch.jit.freeze, marks=pytest.mark.mode("torch.jit.freeze")),
        pytest.param(torch.jit.optimize_for_inference, marks=pytest.mark.mode("optimize_for_inference")),
    ],
)
@every_case_slowly
def test_frozen(case, change):
    module = case.make().eval()
    run = change(torch.jit.script(module))
    assert "mingru::" not in str(run.inlined_graph)
    eps = torch.finfo(torch.float32).eps
    for args in calls(case, ALL):
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
    folder = tmp_path_factory.mktemp("saved")
    expected, outcomes, saved = {}, {}, {}
    for index, case in enumerate(selected_cases(request)):
        for form in ("script", "trace"):
            key, path = (form, case.name), f"{form}{index}.pt"
            module = case.make(**DOUBLE).eval()
            inputs = calls(case, ALL, [(2, 7), (2, 7), (3, 17)], **DOUBLE)
            expected[key] = [module(*args) for args in inputs]
            try:
                with nothing_of_ours_warns():
                    run = torch.jit.script(module) if form == "script" else trace(case, module, ALL, FEW[0], **DOUBLE)
                    torch.jit.save(run, str(folder / path))
                saved[key] = path, inputs
            except Exception as error:
                outcomes[key] = repr(error)
    outcomes |= run_without_mingru(LOAD_AND_RUN, folder, saved)
    return {key: (outcomes[key], result) for key, result in expected.items()}


@pytest.mark.parametrize(
    "form",
    [
        pytest.param("script", marks=pytest.mark.mode("script saved, run without mingru")),
        pytest.param("trace", marks=pytest.mark.mode("trace saved, run without mingru")),
    ],
)
@every_case_slowly
def test_saved_runs_without_mingru(case, form, elsewhere):
    got, expected = elsewhere[form, case.name]
    assert not isinstance(got, str), got
    assert_equal(got, expected)


# From several threads


def from_eight_threads(call, inputs):
    """All at once, for each thread those of its own."""
    start = threading.Barrier(8)

    def work(mine):
        start.wait()
        return [call(args) for args in mine]

    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(work, inputs))


def anew(run):
    """The same as code of its own, of which nothing has been run; modules scripted alike share what they specialise."""
    saved = io.BytesIO()
    torch.jit.save(run, saved)
    saved.seek(0)
    return torch.jit.load(saved)


def for_eight_threads(case, **factory):
    return [calls(case, ALL, [(2, 7), (1 + index, 9 + index), (2, 7)], **factory) for index in range(8)]


@pytest.mark.mode("scripted, from several threads")
@every_case_slowly
def test_threads(case):
    module = case.make(**DOUBLE)
    inputs = for_eight_threads(case, **GRADED)
    expected = [[graded(module, args) for args in mine] for mine in inputs]
    run = anew(torch.jit.script(module))
    assert_equal(from_eight_threads(lambda args: graded(run, args), inputs), expected)


@pytest.mark.slow
@pytest.mark.mode("scripted, from several threads")
def test_threads_with_a_frozen_module():
    case = CASES[-1]
    module = case.make(**DOUBLE).eval()
    inputs = for_eight_threads(case, **DOUBLE)
    expected = [[module(*args) for args in mine] for mine in inputs]
    run = torch.jit.freeze(torch.jit.script(module))
    assert_equal(from_eight_threads(lambda args: run(*args), inputs), expected)
