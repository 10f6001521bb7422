"""The README's code runs as it stands, and so does the usage code that was asked for, of which it is a part."""

import hashlib
import json
import os
import re
from pathlib import Path

import mingru

# The usage code that this project was asked to run as it stands.
ASKED_FOR = "a2a4fdd80b43b33097f9e2f9dda071f31748a08e0bcd24d21d2fd3ff19512333"
README = (Path(__file__).parent.parent / "README.md").read_text()


def test_code_runs():
    (part,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    whole = (Path(__file__).parent / "data" / "usage.txt").read_text()
    assert hashlib.sha256(whole.encode()).hexdigest() == ASKED_FOR
    for code in (part, whole):
        names = {}
        exec(compile(code, "README.md", "exec"), names)
        assert names["out_par"].shape == (10, 128, 64)
    assert set(part.splitlines()) <= set(whole.splitlines())


def test_files_that_it_names_are_there():
    root = Path(__file__).parent.parent
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / link).is_file(), link


def test_kernels_were_built_where_this_project_checks_itself():
    if os.environ.get("CI"):
        assert mingru.backends()["native"] is True


DOCS = Path(__file__).parent.parent / "docs"
SPEED = json.loads((DOCS / "speed.json").read_text(encoding="utf-8"))["results"]


def test_the_headline_is_true_for_all_shapes():
    times = SPEED["equal"]["1"].values()
    found = [[each[name][1] / each["BlockGRU"][1] for each in times] for name in ("nn.GRU", "nn.LSTM")]
    (gru, lstm) = (f"{min(ratios):.2g} to {max(ratios):.2g}" for ratios in found)
    sentence = f"`nn.GRU` with as many layers takes {gru} times as long, and of `nn.LSTM` {lstm} times"
    for text in (README, (DOCS / "index.md").read_text(encoding="utf-8")):
        assert sentence in " ".join(text.split())


def test_citation_and_changelog_have_the_version():
    root = Path(__file__).parent.parent
    assert f"\nversion: {mingru.__version__}\n" in (root / "CITATION.cff").read_text()
    newest = re.search(r"^## ([^\s]+)", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == mingru.__version__
