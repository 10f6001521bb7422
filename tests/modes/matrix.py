"""Run every class in every mode, and print the table of docs/more/modes.md: python tests/modes/matrix.py [--write]"""

import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from cases import CASES  # noqa: E402

PAGE = FOLDER.parent.parent / "docs" / "more" / "modes.md"
MARK = "<!-- printed by tests/modes/matrix.py -->\n"


def modes() -> list[str]:
    """Return the names of all modes, in the order of the tests."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("test_*.py")))
    return list(dict.fromkeys(re.findall(r'mode\(\s*"([^"]+)"', text)))


class Matrix:
    """Pytest plugin that collects the limitations reported by the tests of each cell of the table."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name != "cell":
                continue
            limitations = self.cells.setdefault(tuple(value), [])
            if report.skipped:
                limitation = getattr(report, "wasxfail", None) or report.longrepr[2].removeprefix("Skipped: ")
                if limitation not in limitations:
                    limitations.append(limitation)

    def table(self) -> str:
        """Return the lists of all classes and modes, the table of exceptions, and the numbered limitations."""
        names, cells = [case.name for case in CASES], self.cells
        found = {mode: {name: cells[mode, name] for name in names if (mode, name) in cells} for mode in modes()}
        limitations = dict.fromkeys(each for by_name in found.values() for cell in by_name.values() for each in cell)
        numbers = {limitation: number for number, limitation in enumerate(limitations, 1)}
        lines = [f"All are {', '.join(names)}.", "", *(f"- {mode}" for mode in found), "", "## Exceptions", ""]
        lines += ["| mode | classes | with a limitation |", "| --- | --- | --- |"]
        for mode, by_name in found.items():
            limited = [
                f"{', '.join(name for name in by_name if each in by_name[name])} ({number})"
                for each, number in numbers.items()
                if any(each in cell for cell in by_name.values())
            ]
            tested = "all" if len(by_name) == len(names) else ", ".join(by_name)
            lines += [f"| {mode} | {tested} | {'; '.join(limited)} |"] * (tested != "all" or limited != [])
        return "\n".join([*lines, "", *(f"{number}. {limitation}" for limitation, number in numbers.items())]) + "\n"


def main() -> None:
    matrix = Matrix()
    # test_matrix.py is left out, because it checks the table that this run is about to replace.
    options = ["-q", "-n", "auto", "--dist", "loadscope", "--ignore", str(FOLDER / "test_matrix.py")]
    code = pytest.main([*options, str(FOLDER)], plugins=[matrix])
    if code != 0:
        sys.exit(code)
    table = matrix.table()
    print(table)
    if "--write" in sys.argv[1:]:
        before, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
        PAGE.write_text(before + mark + "\n" + table, encoding="utf-8")


if __name__ == "__main__":
    main()
