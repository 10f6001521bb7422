"""The guides: their code runs as it stands, and their links lead somewhere."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = sorted(path.relative_to(DOCS).as_posix() for path in (*DOCS.glob("*.md"), *DOCS.glob("more/*.md")))


@pytest.fixture(autouse=True)
def _trusts_no_more_classes_afterwards():
    """A guide tells torch.load which classes to trust, for the whole process."""
    before = torch.serialization.get_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.mark.parametrize(
    "guide", [pytest.param(guide, marks=[pytest.mark.slow] * ("deploy" in guide)) for guide in GUIDES]
)
# What torch's own tools say of torch.
@pytest.mark.filterwarnings("ignore:`torch.jit.(script_method|optimize_for_inference)` is deprecated")
def test_the_code_runs(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / guide).read_text(encoding="utf-8")
    for section, package in (("ExecuTorch", "executorch"), ("Lightning", "lightning")):
        if importlib.util.find_spec(package) is None:
            text = re.sub(rf"## {section}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == text.count("```python")
    names = {}
    for block in blocks:
        exec(compile(block, guide, "exec"), names)


@pytest.mark.parametrize("guide", GUIDES)
def test_the_links_are_there(guide):
    for link in re.findall(r"\]\(([^)#:]+)\)", (DOCS / guide).read_text(encoding="utf-8")):
        assert ((DOCS / guide).parent / link).is_file(), link


def test_the_notebook_runs():
    cells = json.loads((DOCS / "first_hour.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), "first_hour.ipynb", "exec"), names)
    # The model remembers the first of ten times as many steps as in training. Guessing has an error of 1.
    x, target = names["sample"](256, 300)
    with torch.no_grad():
        assert torch.nn.functional.mse_loss(names["model"](x), target) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("index", range(4))
def test_two_processes(index, tmp_path):
    """The program of distributed.md, divided in each way; weights that are divided are saved too."""
    program, *ways = re.findall(r"```py\n(.*?)```", (DOCS / "distributed.md").read_text(encoding="utf-8"), re.DOTALL)
    program = program.replace("# Save\n", ways.pop(2) if index in (1, 3) else "")
    (tmp_path / "train.py").write_text(program.replace("# Divide\n", ways[index]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"]
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    # A thread of gloo that still runs may abort a process at its end (torch 2.13), when all is done.
    aborted_at_end = "terminate called without an active exception" in done.stderr
    assert done.returncode == 0 or aborted_at_end, done.stderr
    assert "trained 2 processes" in done.stdout
