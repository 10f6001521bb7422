"""Record the machine, the versions and the commit of a benchmark, and write its figures as JSON."""

import json
import subprocess
from pathlib import Path
from typing import Any

from mingru import bench


def where() -> dict[str, Any]:
    """Return the machine, the versions and the commit."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {**bench.where(), "commit": commit.stdout.strip() or "unknown"}


def write_json(path: Path, results: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"where": where(), "results": results}, indent=1) + "\n")
