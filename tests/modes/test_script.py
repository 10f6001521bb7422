"""TorchScript: every class scripted, traced and frozen, saved and run without mingru, and from several threads."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import DOUBLE, assert_equal, graded, selected_cases
from elsewhere import run_without_mingru
from mode import FEW, each_case, given, mode

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


@mode("torch.jit.script", ["MinGRU"])
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


# Traced


@mode("torch.jit.trace", [*FEW, "BlockGRU", "models.Block"])
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


@mode("torch.jit.trace")
def test_trace_refuses_what_does_not_fit(case):
    x, h = case.args(2, **DOUBLE)["x"], case.args(5, **DOUBLE)["h"]
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
    "form",
    [
        pytest.param("script", marks=pytest.mark.mode("script saved, run without mingru")),
        pytest.param("trace", marks=pytest.mark.mode("trace saved, run without mingru")),
    ],
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
