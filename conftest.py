import gc
import os
import sys

import pytest
import torch

import mingru
from mingru.ops import graph


def pytest_configure():
    # Parallel test processes share the CPU cores.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace["mingru"] = mingru
    doctest_namespace["torch"] = torch


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_code():
    """Free the graphs of a module's tests: TorchScript and the compiler would keep gigabytes of them."""
    yield
    graph._scripted.cache_clear()
    torch._C._jit_clear_class_registry()
    torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()
    torch.jit._state._clear_class_state()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
