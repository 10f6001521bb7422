"""A process where this package is not: what was saved must run there."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

BEFORE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mingru":
            raise ModuleNotFoundError("there is no mingru here")

sys.meta_path.insert(0, Blocker())
import torch

given, results = torch.load("given.pt"), {}
"""
AFTER = """
try:
    import mingru
except ModuleNotFoundError:
    print("no module")
assert not any(name.partition(".")[0] == "mingru" for name in sys.modules)
assert not torch.ops.loaded_libraries and not hasattr(torch.ops.mingru, "recurrence_forward")
assert not any(schema.name.startswith("mingru::") for schema in torch._C._jit_get_all_schemas())
print("no kernels")
torch.save(results, "results.pt")
"""


def run_without_mingru(script: str, folder: Path, given: Any) -> dict[Any, Any]:
    """What the script, which runs in this folder and finds `given`, leaves in `results`."""
    torch.save(given, folder / "given.pt")
    command = [sys.executable, "-c", BEFORE + textwrap.dedent(script) + AFTER]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["no module", "no kernels"]
    return torch.load(folder / "results.pt")
