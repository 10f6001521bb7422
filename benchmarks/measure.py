"""What several benchmarks share: an option, the record of the machine and the versions, JSON, pages and pictures."""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

import mingru.bench

LINEAR, GRU = "nn.Linear(I, 2H)", "nn.GRU"
SCANS = "mingru-scans"
# The line of this library in a picture.
OWN = {"linewidth": 3.0, "zorder": 3, "color": "#0b6e4f"}


def add_shape_option(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the option `--shape`, a list of (B, S, I, H), or None if it is not given."""
    text = f"batch, steps, input and hidden features; may be repeated (default: {default})"
    parser.add_argument("--shape", type=int, nargs=4, action="append", metavar=("B", "S", "I", "H"), help=text)


def plain_layers(*sizes: int) -> dict[str, nn.Module]:
    """Return a layer of each class with these numbers of features, and the linear map of `MinGRU`."""
    of_torch = {f"nn.{kind.__name__}": kind(*sizes, batch_first=True) for kind in (nn.GRU, nn.LSTM)}
    return {"mingru": mingru.MinGRU(*sizes), LINEAR: nn.Linear(sizes[0], 2 * sizes[1]), **of_torch}


def where() -> dict[str, Any]:
    """Return the machine, the versions and the commit."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {**mingru.bench.where(), "commit": commit.stdout.strip() or "unknown"}


def write_json(path: Path, results: Any) -> None:
    write(path, {"where": where(), "results": results})


def add_json(path: Path, results: Any) -> None:
    """Add what this processor measured to a file of some, in place of what it had measured before."""
    machine, known = where(), json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    others = [each for each in known if each["where"]["processor"] != machine["processor"]]
    write(path, [*others, {"where": machine, "results": results}])


def write(path: Path, content: Any) -> None:
    """Replace a file in one operation, so that a program that is stopped here leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def markdown(columns: list[str], rows: Iterable[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def marked(kind: str) -> re.Pattern[str]:
    """Return the pattern of `<!-- kind: NAME -->`, a text and `<!-- kind: end -->`."""
    comments = rf"^( *)<!-- {kind}: (\w+) -->\n(?:.*?\n)?? *<!-- {kind}: end -->$"
    return re.compile(comments, re.DOTALL | re.MULTILINE)


def filled(page: str, kind: str, texts: Mapping[str, str]) -> str:
    """Return a page with other texts between its comments. A text of one line is wrapped, with the comments' indent."""

    def fill(match: re.Match[str]) -> str:
        indent, name = match.groups()
        text = textwrap.fill(texts[name], 120, initial_indent=indent, subsequent_indent=indent)
        text = f"\n{texts[name]}\n" if "\n" in texts[name] else text
        return f"{indent}<!-- {kind}: {name} -->\n{text}\n{indent}<!-- {kind}: end -->"

    return marked(kind).sub(fill, page)


def draw(path: Path, lines: Iterable[tuple[Any, Any, dict[str, Any]]], is_log: bool = False, **options: Any) -> None:
    """Write a picture of lines, each with its x, y and style. `options` are those of the axes."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
    for x, y, style in lines:
        axes.plot(list(x), list(y), **style)
    if is_log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    axes.set(**options)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def scans(folder: Path) -> ModuleType:
    """Return the package mingru-scans that pip installed in a folder, under another name than `mingru`."""
    path = folder / "mingru" / "__init__.py"
    if not path.exists():
        raise SystemExit(f"{path} is missing: run pip install --no-deps --target {folder} {SCANS}==0.2.0")
    spec = importlib.util.spec_from_file_location("mingru_scans", path, submodule_search_locations=[str(path.parent)])
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
