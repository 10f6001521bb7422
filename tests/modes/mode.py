"""What the tests of modes share: they run every class, in a mode and as it is."""

import pytest
from cases import CASES

# The classes of `drop_in` share their code; `drop_in.LSTMLike` has the most.
QUICK = [case.name for case in CASES if not case.name.startswith("drop_in.GRULike")]
# The quick tests of a mode that compiles use a layer and a cell.
FEW = ["MinGRU", "MinGRUCell"]


def each_case(quick=QUICK, cases=CASES, marks=()):
    """Run a test on each case. Others than `quick` are marked as slow; `marks` are pairs of a name and another mark."""
    params = []
    for case in cases:
        slow = [] if case.name in quick else [pytest.mark.slow]
        own = [mark for name, mark in marks if name == case.name]
        params.append(pytest.param(case, id=case.name, marks=[*slow, *own]))
    return pytest.mark.parametrize("case", params)


def mode(name, *args, **options):
    """Run a test on each case, as a test of this mode."""
    return lambda test: pytest.mark.mode(name)(each_case(*args, **options)(test))


def in_mode(name, value):
    """Return a value of a parameter with which a test is one of this mode."""
    return pytest.param(value, marks=pytest.mark.mode(name))


def given(case, batch=2, steps=7, count=3, **factory):
    """Return what a module is called with: x, states and resets, or the first of these."""
    x, h, reset, *_ = case.args(batch, steps, **factory).values()
    # Or nothing might tell of the states.
    reset[(0,) * reset.dim()] = False
    return (x, h, reset)[:count]
