"""Run every class in every mode, and print the table of docs/modes.md: python tests/modes/matrix.py [--write]"""

import sys
from pathlib import Path

import pytest
from cases import CASES

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent.parent / "docs" / "modes.md"
MARK = "<!-- printed by tests/modes/matrix.py -->\n"


class Matrix:
    """A plugin of pytest that fills the table; tests that fail leave none."""

    def __init__(self) -> None:
        self.modes: list[str] = []
        self.cells: dict[tuple[str, str], list[str]] = {}
        self.cell_of: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            mark, spec = item.get_closest_marker("mode"), getattr(item, "callspec", None)
            if mark is None:
                continue
            (mode,) = mark.args
            if mode not in self.modes:
                self.modes.append(mode)
            if spec is not None and "case" in spec.params:
                cell = self.cell_of[item.nodeid] = (mode, spec.params["case"].name)
                self.cells.setdefault(cell, [])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cell = self.cell_of.get(report.nodeid)
        if cell is None or not report.skipped:
            return
        reason = getattr(report, "wasxfail", None) or report.longrepr[2].removeprefix("Skipped: ")
        if reason not in self.cells[cell]:
            self.cells[cell].append(reason)

    def table(self) -> str:
        """A row for each mode, a column for each class; numbers lead to the limits below."""
        limits: list[str] = []

        def text(mode: str, name: str) -> str:
            if (mode, name) not in self.cells:
                return ""
            numbers = []
            for reason in self.cells[mode, name]:
                if reason not in limits:
                    limits.append(reason)
                numbers.append(str(limits.index(reason) + 1))
            return "✓" + (f" ({', '.join(numbers)})" if numbers else "")

        names = [case.name for case in CASES]
        rows = [["", *names], ["---"] * (1 + len(names))]
        rows += [[mode, *(text(mode, name) for name in names)] for mode in self.modes]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([*lines, "", *(f"{number}. {limit}" for number, limit in enumerate(limits, 1))]) + "\n"


def main() -> None:
    matrix = Matrix()
    code = pytest.main(["-q", "-p", "no:xdist", str(FOLDER)], plugins=[matrix])
    if code != 0:
        sys.exit(code)
    table = matrix.table()
    print(table)
    if "--write" in sys.argv[1:]:
        before, mark, _ = PAGE.read_text().partition(MARK)
        PAGE.write_text(before + mark + "\n" + table)


if __name__ == "__main__":
    main()
