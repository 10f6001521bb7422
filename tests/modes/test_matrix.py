"""The table in the docs has all modes, and names classes that are there; `matrix.py` fills it."""

import re

from cases import CASES
from matrix import MARK, PAGE, Matrix, modes


def test_the_table_is_that_of_these_tests():
    lines = PAGE.read_text(encoding="utf-8").partition(MARK)[2].splitlines()
    _, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [line[2:] for line in lines if line.startswith("- ")] == modes()
    names = {case.name for case in CASES}
    assert f"All are {', '.join(case.name for case in CASES)}." in lines
    for mode, tested, limited in rows:
        assert mode in modes() and (limited or tested != "all")
        assert tested == "all" or set(tested.split(", ")) < names
        assert {re.sub(r" \(\d+\)$", "", each) for each in re.split("[,;] ", limited) if each} <= names


def test_a_table():
    matrix, (first, second, *rest), (mode, other, *_) = Matrix(), (case.name for case in CASES), modes()
    matrix.cells = {(mode, name): [] for name in rest} | {(mode, first): ["x", "y"], (mode, second): ["y"]}
    matrix.cells[other, second] = []
    table = matrix.table()
    assert f"\n| {mode} | all | {first} (1); {first}, {second} (2) |\n| {other} | {second} |  |\n" in table
    assert table.endswith("\n\n1. x\n2. y\n")
