"""Which body runs: the argument over `use_backend` over the environment over "auto"."""

import _thread
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from cases import ALL_BACKENDS, needs_kernels, refuses
from torch.testing import assert_close

import mingru
from mingru import functional
from mingru.ops import autograd, cells, route, spec_of
from mingru.ops.backend import Backend
from mingru.ops.backends import native

X = torch.zeros(2, 20, 3)
MINGRU = spec_of("mingru", "positive", False, 0.0)


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv("MINGRU_BACKEND", raising=False)


@pytest.fixture
def ran(monkeypatch):
    """The names of the bodies that were asked for since the test began."""
    names, backend_of = [], route.backend_of
    for module in (route, autograd):
        monkeypatch.setattr(module, "backend_of", lambda name: names.append(name) or backend_of(name))
    return names


def fake(*, unavailable=None, refuses=None):
    """A backend that says why it cannot run, and fails the test if it is run all the same."""

    def fail(*args):
        raise AssertionError("a body that cannot run was run")

    return Backend(unavailable=lambda: unavailable, unsupported=lambda *args: refuses, scan=fail, recurrence=fail)


@pytest.fixture
def add(monkeypatch):
    """Add backends of these names, which say why they cannot run."""

    def added(**backends):
        for name, why in backends.items():
            monkeypatch.setitem(route.BACKENDS, name, fake(**why))

    return added


def chosen():
    return route.choose(MINGRU, X).backend


def test_backends_tells_what_runs_here_and_why_not(add):
    found = mingru.backends()
    assert all(found[name] is True for name in ("torch", "log", "sequential"))
    assert all(can_run is True or (isinstance(can_run, str) and can_run) for can_run in found.values())
    assert "auto" not in found
    add(broken={"unavailable": "no such device found"})
    assert mingru.backends()["broken"] == "no such device found"


@pytest.mark.parametrize("name", ALL_BACKENDS)
def test_the_body_asked_for_is_the_one_that_runs(name, ran, monkeypatch):
    def call(**options):
        functional.mingru(X, X, **options)
        if name != "log":
            functional.linear_scan(X, X, **options)
        assert set(ran) == {name}
        ran.clear()

    call(backend=name)
    with mingru.use_backend(name):
        call()
    monkeypatch.setenv("MINGRU_BACKEND", name)
    call()
    mingru.MinGRU(3, 4)(X)
    assert set(ran) == {name}


def test_the_backward_pass_runs_on_the_body_of_the_forward_pass(ran):
    for name, block in (("torch", "log"), ("sequential", "torch")):
        with mingru.use_backend(block):
            out = functional.mingru(X.clone().requires_grad_(), X, backend=name)
        out.sum().backward()
        assert set(ran) == {name}
        ran.clear()


def test_auto_takes_the_first_that_serves(ran, add, monkeypatch):
    def all_ran():
        ran.clear()
        functional.mingru(X, X)
        functional.linear_scan(X, X)
        mingru.MinGRU(3, 4, candidate="tanh")(X)
        return set(ran)

    assert all_ran() == {chosen()}
    add(absent={"unavailable": "not built"}, narrow={"refuses": "it serves nothing"})
    monkeypatch.setattr(route, "FASTEST_FIRST", ("absent", "narrow", "sequential", "torch"))
    assert all_ran() == {"sequential"}


def test_the_argument_over_the_block_over_the_environment(ran, monkeypatch):
    def body_of(**options):
        functional.mingru(X, X, **options)
        return ran.pop()

    fastest = body_of()
    assert fastest != "sequential"
    monkeypatch.setenv("MINGRU_BACKEND", "sequential")
    assert body_of() == body_of(backend="auto") == "sequential" and body_of(backend="log") == "log"
    with mingru.use_backend("log"):
        assert body_of() == body_of(backend="auto") == "log" and body_of(backend="torch") == "torch"
        with mingru.use_backend("torch"):
            assert body_of() == "torch"
        with pytest.raises(ZeroDivisionError), mingru.use_backend("torch"):
            1 / 0  # noqa: B018
        assert body_of() == "log"
        # "auto" as a choice leaves the choice to what comes after it.
        with mingru.use_backend("auto"):
            assert body_of() == "sequential"
    assert body_of() == "sequential" and mingru.use_backend("log")(body_of)() == "log"
    monkeypatch.setenv("MINGRU_BACKEND", "auto")
    assert body_of() == fastest


def test_a_block_is_its_threads_own():
    outside = chosen()
    with ThreadPoolExecutor(1) as pool, mingru.use_backend("sequential"):
        assert pool.submit(chosen).result() == outside
        block = mingru.use_backend("log")
        pool.submit(block.__enter__).result()
        assert (chosen(), pool.submit(chosen).result()) == ("sequential", "log")
        pool.submit(block.__exit__, None, None, None).result()
        assert (chosen(), pool.submit(chosen).result()) == ("sequential", outside)


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


@pytest.mark.parametrize("name", ["", "cuda", "Torch", None, 3])
def test_unknown_names_are_refused(name, monkeypatch):
    known, before = r"must be one of 'auto', .*'torch', .*'sequential'.*, got ", chosen()
    with pytest.raises(ValueError, match=rf"^use_backend: name {known}{name!r}"), mingru.use_backend(name):
        pytest.fail("the block was entered")
    assert chosen() == before
    if isinstance(name, str):
        monkeypatch.setenv("MINGRU_BACKEND", name)
        with pytest.raises(ValueError, match=rf"variable MINGRU_BACKEND {known}{name!r}") if name else nullcontext():
            mingru.MinGRU(3, 4)(X)
        # What stands over it is not asked what it says.
        with mingru.use_backend("torch"):
            assert chosen() == "torch"


def test_asking_for_what_cannot_run_says_why_and_who_asked(add, monkeypatch):
    add(absent={"unavailable": "no GPU found"}, narrow={"refuses": "it takes float32 alone"})
    for name, why in (("absent", "no GPU found"), ("narrow", "it takes float32 alone")):
        text = f"selects '{name}', which cannot run this because {why}"
        for function in (functional.mingru, functional.linear_scan):
            refuses(ValueError, f"{function.__name__}: backend {text}; use 'auto'", function, X, X, backend=name)
        # Entering the block is fine: other tensors may be served.
        with mingru.use_backend(name), pytest.raises(ValueError, match=f"mingru: use_backend {text}"):
            chosen()
        monkeypatch.setenv("MINGRU_BACKEND", name)
        refuses(ValueError, f"the environment variable MINGRU_BACKEND {text}", chosen)
        monkeypatch.delenv("MINGRU_BACKEND")


class Python(mingru.MinGRU):
    cell = "only_python"


def test_a_device_without_kernels_is_named_once(monkeypatch):
    monkeypatch.setattr(native, "_WHY_NOT", "the compiled kernels were not built; ...")
    route.warn_once.cache_clear()
    # torch knows the names of devices that are not there.
    sequences = [types.SimpleNamespace(device=torch.device(name)) for name in ("meta", "mps", "mps", "cpu", "cpu")]
    with warnings.catch_warnings(record=True) as shown:
        for sequence in sequences:
            route._warn_if_kernels_are_missing(sequence, MINGRU)
    of_mps, of_cpu = (str(each.message) for each in shown)
    assert "'torch' on MPS, because there are kernels only for the CPU, CUDA, ROCm and XPU" in of_mps
    assert "slower backend 'torch' on the CPU, because the compiled kernels were not built" in of_cpu
    route.warn_once.cache_clear()


@needs_kernels
def test_kernels_compute_no_spec_that_they_do_not_know():
    known, gru = [MINGRU, MINGRU._replace(output_gate=True)], spec_of("gru", "tanh", False, 0.0)
    other = [MINGRU._replace(norm="rms"), gru._replace(activation="positive"), gru._replace(min_decay=0.5)]
    assert list(map(native.BACKEND.linear_kernel.computes, [*known, gru, *other])) == [True] * 3 + [False] * 3
    assert list(map(route.BACKENDS["torch"].kernel.computes, known)) == [True, False]


@needs_kernels
def test_a_cell_without_kernels_runs_with_a_warning(monkeypatch):
    """`coefficients` computes it like "mingru". The values of a new cell: tests/test_contributing.py."""
    monkeypatch.setitem(cells.CELLS, "only_python", cells.Cell(2, not_timed="the cell has no clock"))
    route.warn_once.cache_clear()
    rnn, x = Python(3, 4, bidirectional=True), torch.randn(2, 5, 3)
    with pytest.warns(RuntimeWarning, match="slower backend 'torch' on the CPU, .* the cell 'only_python'"):
        found = rnn(x)
    # Once.
    assert_close(rnn(x), found)
    refuses(ValueError, "dt must be None because the cell has no clock", rnn, x, dt=torch.ones(2, 5))
    with mingru.use_backend("native"), pytest.raises(ValueError, match="it has no kernel for the cell 'only_python'"):
        rnn(x)
