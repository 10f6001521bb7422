"""Fixtures for the Triton kernels, which run on a GPU or, with TRITON_INTERPRET=1, slowly in Triton's interpreter."""

import collections
from pathlib import Path

import calls
import pytest

from mingru.ops import route
from mingru.ops.backends.triton import launch
from mingru.ops.backends.triton.tiling import Tiling
from mingru.ops.cells import NUM_INPUTS

# Small, because the interpreter runs each element of a scan on its own.
TILINGS = {
    "walk": Tiling(1, 4, 16, 1, 1, None),
    "chunks": Tiling(4, 3, 8, 1, 1, 2),
    "segments": Tiling(2, 4, 8, 3, 1, 2),
    "one step": Tiling(1, 1, 1024, 1, 1, None),
}


def pytest_collection_modifyitems(items):
    rows = collections.Counter()
    for item in items:
        if item.path.parent != Path(__file__).parent or not (calls.INTERPRETED or "triton" in item.nodeid):
            continue
        # Otherwise another backend would compute the gradients, and be tested instead.
        item.add_marker(pytest.mark.filterwarnings("error:mingru. using .*slower:RuntimeWarning"))
        if calls.INTERPRETED:
            numpys = "ignore:(invalid value|overflow|divide by zero|underflow) encountered:RuntimeWarning"
            item.add_marker(pytest.mark.filterwarnings(numpys))
            # Of a test with many rows, every third is quick.
            rows[item.originalname] += 1
            if rows[item.originalname] > 6 and rows[item.originalname] % 3:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _nothing_failed_before():
    for known in (launch._failures, launch._compiled):
        known.clear()
    route.warn_once.cache_clear()


@pytest.fixture(autouse=calls.INTERPRETED)
def _the_interpreter_computes_as_gpus_do(monkeypatch):
    monkeypatch.setattr("triton.runtime.interpreter._convert_float", calls.rounded_bfloat16())
    monkeypatch.setattr("triton.runtime.interpreter.ScanOps.generic_scan", calls.scanned_in_a_tree)


@pytest.fixture
def use_tiling(monkeypatch):
    """Use one tiling for all kernels, or the name of one; None stands for the tiling for the shape."""

    def use(tiling):
        tiling = TILINGS.get(tiling, tiling)

        def tiling_of(work):
            return tiling if work.cell in NUM_INPUTS else tiling._replace(segments=1)

        if tiling is not None:
            monkeypatch.setattr(launch, "tiling_of", tiling_of)

    return use
