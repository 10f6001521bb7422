"""Write the tables of README.md from the results of the other programs.

    python -m benchmarks.reproduce.page

The tables are written between comments, `<!-- reproduce: NAME -->` and `<!-- reproduce: end -->`.
"""

import json
import statistics
import textwrap
from pathlib import Path
from typing import Any

from ..measure import filled, markdown
from .chomsky import TASKS
from .common import RESULTS

PAGE = Path(__file__).with_name("README.md")
Runs = dict[str, dict[str, Any]]
# Feng et al. 2024: accuracy in % and its standard deviation.
PAPER = {
    "minGRU, 1 layers": "37.0 ± 2.3",
    "minGRU, 2 layers": "96.8 ± 3.2",
    "minGRU, 3 layers": "99.5 ± 0.2",
    "minLSTM, 1 layers": "37.6 ± 2.0",
    "minLSTM, 2 layers": "85.7 ± 5.8",
    "minLSTM, 3 layers": "96.0 ± 2.8",
}
# mingru-scans 0.2.0, accuracy in % at 1,024 time steps.
PUBLISHED = {
    "parity: nn.GRU": "100.0",
    "parity: mingru-scans log": "50.2",
    "parity: mingru-scans signed": "99.4",
    "S3: nn.GRU": "100.0",
    "S3: mingru-scans log": "17.1",
    "S3: mingru-scans signed": "73.2",
    "S3: mingru-scans rotation": "95.8",
}


def cell(values: list[float], most: int) -> str:
    """Return mean and standard deviation in %, and the number of seeds if it is not that of all seeds."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    count = "" if len(values) == most else f" (n = {len(values)})"
    return f"{100 * statistics.mean(values):.1f}{spread}{count}"


def by_seed(runs: Runs) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Return the runs of all seeds by the rest of their key, and the largest number of seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for key, run in runs.items():
        groups.setdefault(key.rpartition(", seed ")[0], []).append(run)
    return groups, max(len(group) for group in groups.values())


def copying(runs: Runs, _: dict[str, Any]) -> str:
    groups, most = by_seed(runs)
    found = {key: [run["accuracy"] for run in groups[key]] for key in PAPER if key in groups}
    rows = [[key.replace("1 layers", "1 layer"), cell(each, most), PAPER[key]] for key, each in found.items()]
    return markdown(["model", "here", "paper, full task"], rows)


def chomsky(runs: Runs, settings: dict[str, Any]) -> str:
    groups, most = by_seed(runs)
    tasks = [task for task in TASKS if any(key.startswith(f"{task}: ") for key in groups)]
    models = list(dict.fromkeys(key.split(": ")[1].rpartition(", learning rate ")[0] for key in groups))

    def at(task: str, model: str, where: str) -> str:
        keys = [f"{task}: {model}, learning rate {rate}" for rate in settings["learning_rates"]]
        if any(key not in groups for key in keys):
            return ""
        best = max(keys, key=lambda key: groups[key][0]["near"])
        return cell([run[where] for run in groups[best]], most)

    tables = []
    for where, title in (("far", "Lengths 40 to 256:"), ("near", "Lengths 1 to 40, as in training:")):
        rows = [[model, *(at(task, model, where) for task in tasks)] for model in models]
        tables += [title, markdown(["", *tasks], rows)]
    return "\n\n".join(tables)


def words(runs: Runs, _: dict[str, Any]) -> str:
    groups, most = by_seed(runs)
    rows = []
    for key in sorted(groups):
        lengths = zip(*(run["accuracy"] for run in groups[key]), strict=True)
        cells = [cell(list(values), most) for values in lengths]
        rows.append([*key.split(": "), *cells, PUBLISHED.get(key, "")])
    return markdown(["task", "model", "64", "256", "512", "1,024", "published, 1,024"], rows)


def groups(runs: Runs, _: dict[str, Any]) -> str:
    """Return a table with every seed, of results of the program `words`."""
    rows = []
    for key, group in sorted(by_seed(runs)[0].items()):
        lengths = zip(*(run["accuracy"] for run in group), strict=True)
        shown = [", ".join(f"{100 * value:.1f}".removesuffix(".0") for value in values) for values in lengths]
        rows.append([*key.split(": "), ", ".join(str(run["steps"]) for run in group), *shown])
    return markdown(["task", "model", "training steps", "64", "256", "512", "1,024"], rows)


TABLES = {"copying": copying, "chomsky": chomsky, "gates": chomsky, "words": words, "groups": groups}
TABLES |= {"blocks": groups}


def text_of(name: str, found: dict[str, Any]) -> str:
    """Return a table, and what it was measured with."""
    where, runs = found["where"], found["runs"]
    hours = sum(run["processor_seconds"] for run in runs.values()) / 3600
    settings = ", ".join(f"{key} {value}" for key, value in found["settings"].items())
    machine = f"{where['processor']} ({where['instructions']}), {where['threads']} thread, torch {where['torch']}"
    seeds = ", ".join(sorted({key.rpartition(", seed ")[2] for key in runs if ", seed " in key}))
    facts = f"{len(runs)} runs{seeds and ' with seeds '}{seeds}, {hours:.2f} processor hours; {machine}; {settings}."
    return f"{TABLES[name](runs, found['settings'])}\n\n{textwrap.fill(facts, 120)}"


def texts(folder: Path) -> dict[str, str]:
    return {name: text_of(name, json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))) for name in TABLES}


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), "reproduce", texts(RESULTS)), encoding="utf-8")


if __name__ == "__main__":
    main()
