"""Which body runs: the argument over `use_backend` over the environment over "auto"."""

import _thread
import dataclasses
import threading
import types
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mingru
from mingru import functional
from mingru.ops import Spec, cells, route
from mingru.ops.backend import Backend

X = torch.zeros(2, 20, 3)
MINGRU = Spec("mingru", "positive", False)
RUNNABLE = [name for name, can_run in mingru.backends().items() if can_run is True]


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv("MINGRU_BACKEND", raising=False)


@pytest.fixture
def ran(monkeypatch):
    """The names of the bodies that ran since the test began, one entry for each call."""
    calls = []

    def spy(name, function):
        def spied(*args):
            calls.append(name)
            return function(*args)

        return spied

    for name, backend in route.BACKENDS.items():
        spied = {field: getattr(backend, field) for field in ("scan", "scan_backward", "recurrence")}
        spied = {field: function and spy(name, function) for field, function in spied.items()}
        for field in ("kernel", "linear_kernel"):
            kernel = getattr(backend, field)
            functions = {} if kernel is None else {"forward": kernel.forward, "backward": kernel.backward}
            functions = {way: spy(name, function) for way, function in functions.items()}
            spied[field] = kernel and dataclasses.replace(kernel, **functions)
        monkeypatch.setitem(route.BACKENDS, name, dataclasses.replace(backend, **spied))
    return calls


def fake(*, unavailable=None, refuses=None):
    """A backend that says why it cannot run, and fails the test if it is run all the same."""

    def fail(*args):
        raise AssertionError("a body that cannot run was run")

    return Backend(unavailable=lambda: unavailable, unsupported=lambda *args: refuses, scan=fail, recurrence=fail)


def chosen():
    return route.choose(MINGRU, X).backend


def test_backends_tells_what_runs_here_and_why_not(monkeypatch):
    found = mingru.backends()
    assert {"torch", "log", "sequential"} <= found.keys()
    assert all(found[name] is True for name in ("torch", "log", "sequential"))
    assert all(can_run is True or (isinstance(can_run, str) and can_run) for can_run in found.values())
    assert "auto" not in found
    found.clear()
    assert mingru.backends(), "the caller's dictionary is the library's own"
    monkeypatch.setitem(route.BACKENDS, "broken", fake(unavailable="no such device found"))
    assert mingru.backends()["broken"] == "no such device found"


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_body_asked_for_is_the_one_that_runs(name, ran, monkeypatch):
    functional.mingru(X, X, backend=name)
    assert ran == [name]
    with mingru.use_backend(name):
        functional.mingru(X, X)
    assert ran == [name] * 2
    monkeypatch.setenv("MINGRU_BACKEND", name)
    functional.mingru(X, X)
    mingru.MinGRU(3, 4)(X)
    assert ran == [name] * 4
    if name != "log":
        functional.linear_scan(X, X)
        functional.linear_scan(X, X, backend=name)
        assert ran == [name] * 6


@pytest.mark.parametrize("name", ["torch", "sequential"])
def test_the_backward_pass_runs_on_the_body_of_the_forward_pass(name, ran):
    gate = X.clone().requires_grad_()
    with mingru.use_backend("log" if name == "torch" else "torch"):
        out = functional.mingru(gate, X, backend=name)
    out.sum().backward()
    assert set(ran) == {name}


def test_auto_takes_the_first_that_serves(ran, monkeypatch):
    functional.mingru(X, X)
    functional.linear_scan(X, X)
    assert ran == [chosen(), route.choose(Spec("linear_scan", "linear", False), X).backend]
    monkeypatch.setitem(route.BACKENDS, "absent", fake(unavailable="not built"))
    monkeypatch.setitem(route.BACKENDS, "narrow", fake(refuses="it serves nothing"))
    monkeypatch.setattr(route, "FASTEST_FIRST", ("absent", "narrow", "sequential", "torch"))
    ran.clear()
    functional.mingru(X, X)
    functional.linear_scan(X, X)
    mingru.MinGRU(3, 4, candidate="tanh")(X)
    assert ran == ["sequential"] * 3


@pytest.mark.parametrize("activation", ["positive", "linear", "tanh", None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_auto_never_fails(device, dtype, activation):
    x = torch.zeros(2, 5, 3, dtype=dtype, device=device)
    if activation is None:
        out = functional.linear_scan(x, x)
    elif dtype.is_complex:
        return  # refused before there is a choice
    else:
        out = functional.mingru(x, x, activation=activation)
    assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)


def test_the_argument_over_the_block_over_the_environment(ran, monkeypatch):
    def body_of(**options):
        functional.mingru(X, X, **options)
        return ran.pop()

    fastest = body_of()
    monkeypatch.setenv("MINGRU_BACKEND", "sequential")
    assert body_of() == body_of(backend="auto") == "sequential"
    with mingru.use_backend("log"):
        assert body_of() == body_of(backend="auto") == "log"
        assert body_of(backend="torch") == "torch"
    assert body_of() == "sequential"
    assert body_of(backend="log") == "log"
    # "auto" as a choice leaves the choice to what comes after it.
    with mingru.use_backend("auto"):
        assert body_of() == "sequential"
    monkeypatch.setenv("MINGRU_BACKEND", "auto")
    assert body_of() == fastest
    monkeypatch.delenv("MINGRU_BACKEND")
    assert body_of() == fastest


@pytest.mark.parametrize("manager", [mingru.use_backend, mingru.drop_in.patch])
def test_a_call_without_a_block_warns(manager, ran):
    arguments = ("log",) if manager is mingru.use_backend else ()
    with pytest.warns(
        RuntimeWarning, match=rf"^{manager.__name__}: no effect without a block; put .* into `with"
    ) as seen:
        manager(*arguments)
    assert [each.filename for each in seen] == [__file__]
    with pytest.raises(TypeError):
        manager(*range(9))


def test_blocks_nest_and_end_at_an_exception():
    outside = chosen()
    assert outside != "sequential"
    with mingru.use_backend("sequential"):
        with mingru.use_backend("log"):
            assert chosen() == "log"
        assert chosen() == "sequential"
        with pytest.raises(ZeroDivisionError), mingru.use_backend("log"):
            1 / 0  # noqa: B018
        assert chosen() == "sequential"
        with mingru.use_backend("auto"):
            assert chosen() == outside
    assert chosen() == outside
    assert mingru.use_backend("sequential")(chosen)() == "sequential"


def test_a_block_is_its_threads_own():
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other():
        seen.append(chosen())
        with mingru.use_backend("log"):
            seen.append(chosen())
            inside.set()
            leave.wait(10)

    outside = chosen()
    with mingru.use_backend("sequential"):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
        assert chosen() == "sequential"
        leave.set()
        thread.join(10)
    assert seen == [outside, "log"]


def test_threads_of_autograd_use_the_last_open_block():
    def chosen_elsewhere():
        """The backend in a thread that `threading` has not started."""
        found, done = [], threading.Event()

        def run():
            found.append(chosen())
            done.set()

        _thread.start_new_thread(run, ())
        assert done.wait(10)
        return found[0]

    outside = chosen_elsewhere()
    assert outside == chosen()
    with mingru.use_backend("log"):
        with mingru.use_backend("sequential"):
            assert chosen_elsewhere() == "sequential"
        assert chosen_elsewhere() == "log"
        with mingru.use_backend("auto"):
            assert chosen_elsewhere() == outside
    assert chosen_elsewhere() == outside


def test_a_checkpoint_in_a_block():
    rnn, x = mingru.MinGRU(3, 4), X.clone().requires_grad_()
    with mingru.use_backend("torch"):
        out, _ = checkpoint(rnn, x, use_reentrant=False)
        out.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", ["", "cuda", "Torch", None, 3])
def test_unknown_names_are_refused(name, monkeypatch):
    known = r"must be one of 'auto', .*'torch', .*'sequential'.*, got "
    with pytest.raises(ValueError, match=rf"backend {known}{name!r}"):
        functional.mingru(X, X, backend=name)
    before = chosen()
    with pytest.raises(ValueError, match=rf"^use_backend: name {known}{name!r}"), mingru.use_backend(name):
        pytest.fail("the block was entered")
    assert chosen() == before


def test_an_unknown_name_in_the_environment(monkeypatch):
    monkeypatch.setenv("MINGRU_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"the environment variable MINGRU_BACKEND must be one of .*, got 'cuda'"):
        mingru.MinGRU(3, 4)(X)
    # What stands over it is not asked what it says.
    functional.mingru(X, X, backend="torch")
    with mingru.use_backend("torch"):
        functional.mingru(X, X)
    monkeypatch.setenv("MINGRU_BACKEND", "")
    assert chosen() in RUNNABLE


def test_asking_for_what_cannot_run_says_why_and_who_asked(monkeypatch):
    monkeypatch.setitem(route.BACKENDS, "absent", fake(unavailable="no GPU found"))
    monkeypatch.setitem(route.BACKENDS, "narrow", fake(refuses="it takes float32 alone"))
    for name, why in (("absent", "no GPU found"), ("narrow", "it takes float32 alone")):
        text = f"selects '{name}', which cannot run this because {why}"
        for function in (functional.mingru, functional.linear_scan):
            with pytest.raises(ValueError, match=f"{function.__name__}: backend {text}; use 'auto'"):
                function(X, X, backend=name)
        # Entering the block is fine: other tensors may be served.
        with mingru.use_backend(name), pytest.raises(ValueError, match=f"mingru: use_backend {text}"):
            mingru.MinGRU(3, 4)(X)
        monkeypatch.setenv("MINGRU_BACKEND", name)
        with pytest.raises(ValueError, match=f"the environment variable MINGRU_BACKEND {text}"):
            mingru.MinGRU(3, 4)(X)
        monkeypatch.delenv("MINGRU_BACKEND")


class Python(mingru.MinGRU):
    cell = "only_python"


@pytest.fixture
def _cell_of_python(monkeypatch):
    """A cell without kernels; `coefficients` computes it like "mingru"."""
    monkeypatch.setitem(cells.CELLS, "only_python", cells.Cell(2, not_timed="the cell has no clock"))
    monkeypatch.setitem(cells.NUM_INPUTS, "only_python", 2)
    route.warn_once.cache_clear()
    yield
    route.warn_once.cache_clear()


def test_a_device_without_kernels_is_named_once():
    route.warn_once.cache_clear()
    # torch knows the names of devices that are not there.
    sequences = [types.SimpleNamespace(device=torch.device(name)) for name in ("meta", "mps", "mps")]
    with warnings.catch_warnings(record=True) as shown:
        for sequence in sequences:
            route._warn_if_kernels_are_missing(sequence, MINGRU)
    (message,) = map(str, (each.message for each in shown))
    assert "'torch' on MPS, because there are kernels only for the CPU, CUDA, ROCm and XPU" in message
    route.warn_once.cache_clear()


@pytest.mark.usefixtures("_cell_of_python")
@pytest.mark.skipif(mingru.backends()["native"] is not True, reason="the kernels were not built")
def test_a_cell_without_kernels_runs_with_a_warning():
    rnn, same, x = Python(3, 4, bidirectional=True), mingru.MinGRU(3, 4, bidirectional=True), torch.randn(2, 5, 3)
    same.load_state_dict(rnn.state_dict())
    expected = same(x)
    with pytest.warns(RuntimeWarning, match="slower backend 'torch' on the CPU, .* the cell 'only_python'"):
        found = rnn(x)
    # Once.
    with torch.no_grad():
        without_gradients = rnn(x)
    for one, other, exact in zip(found, without_gradients, expected, strict=True):
        torch.testing.assert_close(one, exact)
        torch.testing.assert_close(other, exact)
    found[0].sum().backward()
    expected[0].sum().backward()
    torch.testing.assert_close(rnn.layers[0].linear.weight.grad, same.layers[0].linear.weight.grad)
    with pytest.raises(ValueError, match="dt must be None because the cell has no clock"):
        rnn(x, dt=torch.ones(2, 5))
    with mingru.use_backend("native"), pytest.raises(ValueError, match="it has no kernel for the cell 'only_python'"):
        rnn(x)
