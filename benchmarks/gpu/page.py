"""Write the results of a GPU into docs/gpu.md, and the sentence about GPUs into the README and the pages that have it.

    python -m benchmarks.gpu.page [--results FOLDER]

The results are the JSON files that the programs wrote into a folder, benchmarks/gpu/results by default. Without them,
the page says that the kernels have never run on a GPU. The texts are written between comments, `<!-- gpu: NAME -->` and
`<!-- gpu: end -->`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from ..measure import filled, markdown
from .device import ROOT, SAME
from .smoke import count_of, wrong_of
from .speed import COLUMNS, cells

RESULTS = ROOT / "benchmarks" / "gpu" / "results"
PROGRAMS = ("smoke", "speed", "tilings", "tests")
PAGES = [ROOT / "README.md", ROOT / "docs" / "gpu.md"]
Results = dict[str, Any]
NEVER = "The GPU kernels have been compiled for NVIDIA and AMD GPUs and tested in Triton's interpreter, but have "
NEVER += "never run on a GPU."
COPIES = """
A copy moves {gigabytes:.0f} GB/s; the floor is the time of a copy of the bytes that must be read and written. A copy of
one number takes {one_launch_us:.1f} µs. First training call of a minGRU, with compilation:
{first}.
""".strip()


def read(folder: Path) -> Results | None:
    """Return the results of the programs by name, or None if the kernels have not run on a GPU. Only those of `smoke`
    must be there."""
    names = [name for name in PROGRAMS if (folder / f"{name}.json").exists()]
    if not names:
        return None
    if "smoke" not in names:
        raise FileNotFoundError(f"{folder} has no smoke.json; run `make gpu`, which writes it first")
    results: Results = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    found = {tuple(each["device"].get(name) for name in SAME) for each in results.values()}
    on_gpu = all(each["device"]["device"] != "cpu" and each["backend"] == "triton" for each in results.values())
    if len(found) > 1 or not on_gpu:
        raise ValueError(f"{folder} must have results of the kernels on one GPU, of one version, got {sorted(found)}")
    return results


def sentence(results: Results | None) -> str:
    """Return what is known of the kernels on GPUs."""
    if results is None:
        return NEVER
    device, smoke = results["smoke"]["device"], results["smoke"]
    wrong = wrong_of(smoke)
    right = "were all right" if not wrong else f"gave {len(wrong)} wrong results"
    where = f"{device['name']} (torch {device['torch']}, Triton {device['triton']})"
    return f"The GPU kernels have run on one GPU, {where}: {count_of(smoke)} checks {right}."


def tables(results: Results | None) -> str:
    """Return all results as Markdown."""
    if results is None:
        return "The kernels have never run on a GPU. No time, accuracy or memory use on a GPU is known."
    smoke, speed = results["smoke"], results.get("speed", {})
    facts = ", ".join(f"{name} {value}" for name, value in smoke["device"].items() if value is not None)
    parts = [f"Machine: {facts}.", "### Checks"]
    shares = smoke.get("shares", {})
    most = max(shares.values(), default=0.0)
    rows = [[f"{len(shares)} random configurations", f"at most {most:.2f} of the allowed error"]]
    errors = [(f"{title}, {name}", x) for title, found in smoke.get("errors", {}).items() for name, x in found.items()]
    rows += [[name, f"{value:.1e}"] for name, value in errors]
    rows += [[f"CUDA graph: {name}", value] for name, value in smoke.get("graphs", {}).items()]
    if "tests" in results:
        passed = list(results["tests"]["outcomes"].values()).count("passed")
        rows += [["tests", f"{passed} passed, {len(results['tests']['failed'])} failed"]]
    rows += [[f"**wrong**: {name}", smoke["failed"].get(name, "")] for name in wrong_of(smoke)]
    others = (each["failed"].items() for program, each in results.items() if program != "smoke")
    rows += [[f"**failed**: {name}", why] for failed in others for name, why in failed]
    parts.append(markdown(["check", "result"], rows))
    if speed.get("copies"):
        copies = speed["copies"]["large and small"]
        first = ", ".join(f"{seconds:.1f} s" for seconds in speed.get("first call", {}).values()) or "not measured"
        parts += [COPIES.format(gigabytes=copies["bandwidth"] / 1e3, first=first, **copies)]
        parts += ["### Recurrences and layers, in µs"]
    for title, rows_of in speed.items():
        if title.startswith(("recurrences", "layers")):
            shown = [[name, *cells(row)] for name, row in rows_of.items()]
            parts += [f"**{title}**", markdown(COLUMNS, shown)]
    return "\n\n".join(parts)


def texts_of(results: Results | None) -> dict[str, str]:
    return {"sentence": sentence(results), "results": tables(results)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    texts = texts_of(read(parser.parse_args(arguments).results))
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), "gpu", texts), encoding="utf-8")
    print(texts["sentence"])


if __name__ == "__main__":
    main()
