"""benchmarks/idioms.py: every idiom on torch's classes and on ours, and the guide's table of those that differ."""

import importlib.util
from pathlib import Path

import pytest
from torch import nn

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "idioms.py"
spec = importlib.util.spec_from_file_location("idioms", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.fixture(scope="module")
def rows():
    return script.rows()


def between_the_marks(page):
    _, _, rest = page.read_text(encoding="utf-8").partition(script.MARKS[0])
    return rest.partition(script.MARKS[1])[0].strip() + "\n"


def test_the_guide_has_the_table(rows):
    assert between_the_marks(script.PAGE) == script.table(rows), "run python benchmarks/idioms.py --write"


def test_titles_are_unique(rows):
    titles = [row.idiom for row in rows]
    assert len(set(titles)) == len(titles) == len(script.IDIOMS)
    assert all(titles)
    assert not any("\n" in title or "|" in title for title in titles)


def test_every_idiom_says_the_same_again(rows):
    assert script.rows() == rows


def test_outcomes():
    def module(kind):
        assert kind is nn.GRU
        return kind(2, 3)

    def nothing(kind):
        kind(2, 3)

    assert script.outcome(module, nn.GRU) == "GRU(2, 3)"
    assert script.outcome(nothing, nn.GRU) == "runs"
    assert script.outcome(module, nn.GRUCell) == "AssertionError"


def test_the_table_shows_what_differs():
    rows = [script.Row("a", "1", "1"), script.Row("b", "1", "2")]
    assert script.table(rows).splitlines() == [
        "Of 2 idioms, 1 give the same result with both classes. The others:",
        "",
        "| idiom | `torch.nn` | `mingru.drop_in` |",
        "| --- | --- | --- |",
        "| b | 1 | 2 |",
    ]


def test_the_table_is_written_between_the_marks(rows, tmp_path, monkeypatch, capsys):
    whole = script.PAGE.read_text(encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(whole.replace("| idiom |", "| old |"), encoding="utf-8")
    monkeypatch.setattr(script, "PAGE", page)
    monkeypatch.setattr(script, "rows", lambda: rows)
    script.main([])
    assert page.read_text(encoding="utf-8") != whole
    script.main(["--write"])
    assert page.read_text(encoding="utf-8") == whole
    assert capsys.readouterr().out == 2 * script.table(rows)
