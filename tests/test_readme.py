"""The README's code runs as it stands, and the usage code is the one that was asked for."""

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
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert hashlib.sha256(code.encode()).hexdigest() == ASKED_FOR
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["out_par"].shape == (10, 128, 64)


def test_files_that_it_names_are_there():
    root = Path(__file__).parent.parent
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / link).is_file(), link


def test_kernels_were_built_where_this_project_checks_itself():
    if os.environ.get("CI"):
        assert mingru.backends()["native"] is True


DOCS = Path(__file__).parent.parent / "docs"
# Milliseconds of a training step by shape and layer, on a Xeon and on an EPYC.
RATIOS = [json.loads((DOCS / f"{name}.json").read_text())["results"] for name in ("ratios", "ratios_amd")]


def shown(times_ms):
    ratios = [times_ms[name] / times_ms["mingru"] for name in ("nn.GRU", "nn.LSTM")]
    return [f"{times_ms['mingru']:.3g} ms", *(f"{each:.0f} ×" if each >= 10 else f"{each:.2g} ×" for each in ratios)]


def test_the_tables_of_ratios_are_what_the_command_wrote():
    page = (DOCS / "speed.md").read_text().partition("## By batch")[0]
    cells = [[shape, *(cell for each in RATIOS for cell in shown(each[shape]))] for shape in RATIOS[0]]
    rows = [f"| {' | '.join(each)} |" for each in cells]
    assert [line for line in page.splitlines() if re.match(r"\| \(\d", line)] == rows
    in_readme = [line for line in README.splitlines() if re.match(r"\| \(\d", line)]
    assert len(in_readme) == 3 and set(in_readme) < set(rows)


def test_the_headline_is_true_for_all_shapes():
    speed = json.loads((DOCS / "speed.json").read_text())["results"]["times"]
    found = [(shape, times["nn.GRU"] / times["mingru"]) for each in RATIOS for shape, times in each.items()]
    for times in speed.values():
        found += [(shape, layers["nn.GRU"][1] / layers["mingru"][1]) for shape, layers in times.items()]
    long = [ratio for shape, ratio in found if int(shape.split(", ")[1]) >= 256]
    sentence = f"of `nn.GRU` takes {min(long):.2g} to {max(long):.0f} times as long"
    assert sentence in README and sentence in (DOCS / "index.md").read_text()


def test_citation_and_changelog_have_the_version():
    root = Path(__file__).parent.parent
    assert f"\nversion: {mingru.__version__}\n" in (root / "CITATION.cff").read_text()
    newest = re.search(r"^## ([^\s]+)", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == mingru.__version__
