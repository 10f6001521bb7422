"""What Triton's compiler makes of the kernels: registers, spills, barriers, the width of accesses, instructions.

They are compiled for GPUs that need not be there. Triton must not be in interpreter mode.
"""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton, and not its interpreter", allow_module_level=True)

from calls import SCANS, Row, parts_of
from compiling import TARGETS, Case, Compiled
from options import cover, named

from mingru.ops.cells import NUM_INPUTS

MANY, FEW = (1024, 128, 512), (8, 4096, 256)
CELLS = (*NUM_INPUTS, "linear_scan")
TIMED = {"dt": True, "min_decay": 0.1}
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def case_of(name, cell, dtype, shape, candidate=None, needs_dt=False, **options):
    candidate = candidate or ("positive" if cell in NUM_INPUTS else "linear")
    batch, steps, features = shape
    row = Row(cell, candidate, dtype, batch=batch, steps=steps, features=(features,), **options)
    return Case(name, row, name == "backward" and cell in NUM_INPUTS, needs_dt)


def num_accesses(case, tiling):
    """Return how many loads and stores of sequences a thread needs in a tile."""
    count = NUM_INPUTS.get(case.row.cell, 2)
    if case.name == "forward":
        return tiling.steps * count, tiling.steps
    # The gradients of a linear scan do not depend on b.
    loads = count if case.row.cell in NUM_INPUTS else 1
    return tiling.steps * (loads + 2), tiling.steps * count


def check(case, target):
    found, row, parts = Compiled(case, target), case.row, parts_of(case.row.cell)
    loads, stores = num_accesses(case, found.tiling)
    # In chunks of half-width numbers that are combined in each tile, a thread has 4 features.
    width = 8 if row.dtype.itemsize == 2 and found.tiling.chunks > 1 == found.tiling.segments else 16
    assert found.local == 0, case
    # Of a block, on GPUs with the least: sm_86, sm_89 and sm_120.
    assert found.shared <= 101_376, case
    assert found.accesses[f"st {width}"] == stores, (case, found.accesses)
    if target.startswith("gfx"):
        # The compiler may unroll.
        assert found.accesses[f"ld {width}"] >= loads, (case, found.accesses)
        assert found.registers <= (512 if target == "gfx942" else 256), case
        assert found.num_spills() == 0, case
        return found
    # A copy to shared memory is written twice, because the first tiles are loaded before the loop.
    copied = found.accesses[f"ld {width}"] + found.accesses[f"copy {width}"]
    assert copied in (loads, 2 * loads), (case, found.accesses)
    # Quaternions of float64 have 8 words for each feature of a group, more than fit into registers.
    is_large = parts > 2 and row.dtype == torch.float64
    # Registers that are saved once, outside of the loop.
    assert found.stack <= (64 if is_large else 40), case
    assert found.per_state() > 2, (case, "no loop was found")
    assert found.num_spills() <= {"sm_75": 7 if is_large else 1, "sm_100": 3 * is_large}.get(target, 0), case
    # Triton 3.6 makes up to 17 of these with two parts and 26 in quaternions, Triton 3.9 up to 10 and 20.
    most = 10 + 3 * row.reset + 7 * (parts > 1 or row.cell in SCANS) + 9 * (parts > 2)
    most = 0 if found.tiling.chunks == 1 else 74 if is_large else most
    assert found.opcodes()["BAR"] <= most, (case, found.opcodes()["BAR"])
    return found


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_most_registers_of_each_cell(cell, name):
    """CI compiles these with the oldest version of Triton, too."""
    check(case_of(name, cell, BF16, FEW), "sm_90")


FACTORS = {
    "name": ["forward", "backward"],
    "cell": CELLS,
    "dtype": [F32, BF16, F64],
    "shape": [MANY, FEW],
    "target": list(TARGETS),
}


def is_supported(row):
    return row["target"] != "sm_75" or row["dtype"] != BF16


@pytest.mark.parametrize("row", cover(FACTORS, is_supported), ids=named)
def test_some_kernels(row):
    *case, target = row.values()
    check(case_of(*case), target)


@pytest.mark.slow
@pytest.mark.parametrize("row", cover(FACTORS, is_supported, len(FACTORS)), ids=named)
def test_all_kernels(row):
    test_some_kernels(row)


WITH_TIME = {**FACTORS, "cell": ["mingru", "mingru_rotation", "minlstm"], "dtype": [F32, BF16], "target": ["sm_90"]}


@pytest.mark.parametrize("row", cover(WITH_TIME, strength=3), ids=named)
def test_elapsed_times_and_lower_bounds(row):
    *case, target = row.values()
    check(case_of(*case, **TIMED), target)


@pytest.mark.parametrize("target", ["sm_90", "gfx942", "gfx1100"])
def test_gradients_of_elapsed_times(target):
    """Their sums over features stay inside of a thread, without barriers."""
    for cell, shape in (("mingru", FEW), ("mingru_rotation", MANY)):
        found = Compiled(case_of("backward", cell, F32, shape, needs_dt=True, **TIMED), target)
        assert found.local == 0
        # Triton 3.6 makes 8, Triton 3.9 makes 6.
        assert target != "sm_90" or found.opcodes()["BAR"] <= (8 if cell == "mingru" else 0)


@pytest.mark.parametrize("name", [pytest.param("forward", marks=pytest.mark.slow), "backward"])
def test_other_variants(name):
    check(case_of(name, "mingru", F16, MANY), "sm_90")
    check(case_of(name, "mingru", F32, FEW, "tanh"), "sm_90")
    check(case_of(name, "minlstm", BF16, MANY, "linear"), "sm_90")
    check(case_of(name, "mingru", F32, (8, 1, 256)), "sm_90")
    for cell, dtype in (("mingru", F32), ("minlstm", F32), ("mingru", BF16)):
        for shape in (MANY, FEW):
            check(case_of(name, cell, dtype, shape, reset=True), "sm_90")
    check(case_of(name, "mingru", F32, FEW, layout="packed"), "sm_90")
    with_lengths = Compiled(case_of(name, "mingru", F32, FEW, layout="lengths"), "sm_90")
    assert with_lengths.num_spills() == with_lengths.local == 0
    for shape in (MANY, FEW):
        check(case_of(name, "complex_linear_scan", F32, shape), "sm_90")
    check(case_of(name, "mingru_rotation", BF16, FEW, "tanh", reset=True), "sm_90")
    segments = case_of(name, "mingru", F32, (1, 65_536, 32))
    assert check(segments, "sm_90").tiling.segments > 1
    summary = Compiled(segments._replace(is_summary=True, has_bias=False), "sm_90")
    assert summary.local == 0


# Instructions per state, for many features: forward, backward, and backward with the gradient of a bias.
MOST = {
    ("mingru", F32): (45, 60, 60),
    ("mingru", BF16): (30, 45, 46),
    ("mingru_rotation", F32): (50, 70, 70),
    ("mingru_rotation", BF16): (40, 60, 61),
}


@pytest.mark.parametrize(("cell", "dtype"), MOST)
def test_instructions_per_state(cell, dtype):
    forward, backward, with_bias = MOST[cell, dtype]
    assert Compiled(case_of("forward", cell, dtype, MANY), "sm_90").per_state() <= forward
    case = case_of("backward", cell, dtype, MANY)
    assert Compiled(case, "sm_90").per_state() <= with_bias
    assert Compiled(case._replace(has_bias=False), "sm_90").per_state() <= backward


@pytest.mark.parametrize("features", [100, 36, 30])
def test_accesses_are_as_wide_as_the_number_of_features_allows(features):
    for dtype in (F32, BF16):
        unit = min(16 // dtype.itemsize, features & -features)
        found = Compiled(case_of("forward", "mingru", dtype, (64, 1000, features)), "sm_90")
        width = unit * dtype.itemsize
        assert found.accesses[f"st {width}"] >= found.tiling.steps
        assert found.accesses[f"ld {width}"] + found.accesses[f"copy {width}"] >= 2 * found.tiling.steps
        assert not any(found.accesses[f"st {narrow}"] for narrow in (1, 2) if narrow < width)
