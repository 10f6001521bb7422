"""What several benchmarks share: an option, the record of the machine and the versions, and figures as JSON."""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from mingru import bench


def add_shape_option(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the option `--shape`, a list of (B, S, I, H), or None if it is not given."""
    text = f"batch, steps, input and hidden features; may be repeated (default: {default})"
    parser.add_argument("--shape", type=int, nargs=4, action="append", metavar=("B", "S", "I", "H"), help=text)


def where() -> dict[str, Any]:
    """Return the machine, the versions and the commit."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {**bench.where(), "commit": commit.stdout.strip() or "unknown"}


def write_json(path: Path, results: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"where": where(), "results": results}, indent=1) + "\n")
