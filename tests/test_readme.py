"""The README's code runs as it stands, and the usage code is the one that was asked for."""

import os
import re
from pathlib import Path

import mingru

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    assert "out_par, h = rnn(data, h0)" in blocks[0]
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["out_par"].shape == (10, 128, 64)


def test_files_that_it_names_are_there():
    root = Path(__file__).parent.parent
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / link).is_file(), link


def test_kernels_were_built_where_this_project_checks_itself():
    if os.environ.get("CI"):
        assert mingru.backends()["native"] is True
