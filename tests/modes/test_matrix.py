"""The table in the docs has all modes and all classes; `matrix.py` fills it."""

from cases import CASES
from matrix import MARK, PAGE, modes


def test_the_table_is_that_of_these_tests():
    header, rule, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text(encoding="utf-8").partition(MARK)[2].splitlines()
        if line.startswith("|")
    ]
    assert header == ["", *(case.name for case in CASES)]
    assert set(rule) == {"---"}
    assert [row[0] for row in rows] == modes()
    for row in rows:
        assert len(row) == len(header)
        assert any(cell.startswith("✓") for cell in row[1:]), row[0]
