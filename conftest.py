import gc
import os
import sys

import pytest
import torch

import mingru
from mingru.ops import modes

# Importable only with Triton or another library, or of one name; they have no doctests that run.
collect_ignore_glob = ["src/mingru/integrations/*.py", "tests/*/conftest.py"]
collect_ignore = [
    *(f"src/mingru/ops/backends/triton/{name}.py" for name in ("math", "cells", "scan", "kernels")),
    "tests/ops/compiling.py",
]


def pytest_configure():
    # Parallel test processes share the CPU cores.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Keep what the tests load out of garbage collections, each of which would take half a second."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        # Less often than by default, because each file of tests ends with a collection.
        gc.set_threshold(20_000)
        gc.enable()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def _one_thread():
    """Use one thread: sums are in another order with more, and threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace["mingru"] = mingru
    doctest_namespace["torch"] = torch


@pytest.fixture
def _fresh_compiler():
    """Free what a test compiled or exported; otherwise a process keeps gigabytes of graphs."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()
    gc.collect()


def free_scripts():
    """Free what TorchScript keeps of each class that it has compiled: 100 MB for a stack with gradients."""
    modes._scripted.cache_clear()
    torch._C._jit_clear_class_registry()
    torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()
    torch.jit._state._clear_class_state()


@pytest.fixture
def _scripts_are_freed():
    yield
    free_scripts()


@pytest.fixture(autouse=True, scope="module")
def _compiled_code_is_freed():
    yield
    free_scripts()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    # What is left stays, such as torch's compiler. Later collections need not look at it.
    gc.freeze()
