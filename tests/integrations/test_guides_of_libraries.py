"""The programs of the guides: what one process saves, another loads, with equal results."""

import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[2]
PAGES = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("other_libraries.md",))
TABS = dict(re.findall(r'^=== "([^"]+)"\n(.*?)(?=^\S)', PAGES, re.DOTALL | re.MULTILINE))
PACKAGES = {"GluonTS": "gluonts.torch", "pytorch-forecasting": "pytorch_forecasting"}


@pytest.mark.slow
@pytest.mark.parametrize("name", TABS)
def test_programs(name, tmp_path):
    pytest.importorskip(PACKAGES.get(name, name.lower()), reason=f"pip install {name}", exc_type=(ImportError, OSError))
    programs = dict(re.findall(r'```py title="(\w+\.py)"\n(.*?)```', dedent(TABS[name]), re.DOTALL))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    printed = []
    for file in ("fit.py", "load.py"):
        (tmp_path / file).write_text(programs[file], encoding="utf-8")
        command = [sys.executable, "-W", "ignore", file]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.splitlines()[-1])
    assert printed[0] == printed[1] != ""
