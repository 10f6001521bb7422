"""The programs of docs/reference/integrations.md: what one process saves, another loads, with equal results."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reference/integrations.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (\S+)\n(.*?)(?=^###|\Z)", PAGE, re.DOTALL | re.MULTILINE))


@pytest.mark.slow
@pytest.mark.parametrize("name", SECTIONS)
def test_programs(name, tmp_path):
    pytest.importorskip(name.lower().replace("-", "_"), reason=f"pip install {name}", exc_type=(ImportError, OSError))
    programs = dict(re.findall(r'```py title="(\w+\.py)"\n(.*?)```', SECTIONS[name], re.DOTALL))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    printed = []
    for file in ("fit.py", "load.py"):
        (tmp_path / file).write_text(programs[file], encoding="utf-8")
        command, captured = [sys.executable, "-W", "ignore", file], {"capture_output": True, "text": True}
        done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, **captured)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.splitlines()[-1])
    assert printed[0] == printed[1] != ""
