"""Write the results of a GPU into docs/gpu.md, and the sentence about GPUs into the README and the pages that have it.

    python -m benchmarks.gpu.page

The results are the JSON files that `make gpu` writes into benchmarks/gpu/results. Without them, the page says that the
kernels have never run on a GPU. The texts are written between comments, `<!-- gpu: NAME -->` and `<!-- gpu: end -->`.
"""

import json
from pathlib import Path
from typing import Any

from mingru.bench import GRU, LINEAR

from ..measure import filled, markdown
from .speed import COLUMNS, cells

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "gpu" / "results"
PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("index.md", "how_it_works.md", "gpu.md"))]
Results = dict[str, Any]
NEVER = "The GPU kernels have been compiled for NVIDIA and AMD GPUs and tested in Triton's interpreter, but have "
NEVER += "never run on a GPU."
COPIES = """
A copy moves {gigabytes:.0f} GB/s; the floor is the time of a copy of the bytes that must be read and written. A copy of
one number takes {one_launch_us:.1f} µs. The ratios are of times of training calls, with Python.
""".strip()


def read(folder: Path) -> Results | None:
    """Return the results of the programs by name, or None if the kernels have not run on a GPU. Those of `speed` and
    `plans` may be missing, or have a part of their tables."""
    names = [name for name in ("smoke", "speed", "plans") if (folder / f"{name}.json").exists()]
    if not names:
        return None
    if "smoke" not in names:
        raise FileNotFoundError(f"{folder} has no smoke.json; run `make gpu`, which writes it first")
    results: Results = {name: json.loads((folder / f"{name}.json").read_text())["results"] for name in names}
    # Results that are tracked make the commit "dirty" when they are written again.
    found = {(each["device"]["name"], each["device"]["commit"].removesuffix("-dirty")) for each in results.values()}
    on_gpu = all(each["device"]["device"] != "cpu" and each["backend"] == "triton" for each in results.values())
    if len(found) > 1 or not on_gpu:
        raise ValueError(f"{folder} must have results of the kernels on one GPU, of one commit, got {sorted(found)}")
    return results


def sentence(results: Results | None) -> str:
    """Return what is known of the kernels on GPUs."""
    if results is None:
        return NEVER
    device, smoke = results["smoke"]["device"], results["smoke"]
    right = "were all right" if not smoke["wrong"] else f"gave {len(smoke['wrong'])} wrong results"
    where = f"{device['name']} (torch {device['torch']}, Triton {device['triton']})"
    return f"The GPU kernels have run on one GPU, {where}: {smoke['count']} checks {right}."


def summary(speed: Results) -> str:
    """Return a table of training: the share of the floor of a minGRU, and how much faster a layer is than others."""
    rows = []
    for title, layers in speed.get("layers", {}).items():
        passes = [speed["recurrences"][title]["minGRU"].get(name, {}) for name in ("forward", "training")]
        shares = [x["floor"] / x["device"] if x.get("device") else None for x in passes]
        names = ("MinGRU", GRU, "nn.LSTM", LINEAR)
        own, *others = [layers.get(name, {}).get("training", {}).get("call") for name in names]
        ratios = [f"{other / own:.2f}" if own and other else "" for other in others]
        rows.append([title, *("" if share is None else f"{share:.0%}" for share in shares), *ratios])
    columns = ["", "share of the floor", "training", *(f"{name} / MinGRU" for name in (GRU, "nn.LSTM", LINEAR))]
    return markdown(columns, rows)


def tables(results: Results | None) -> str:
    """Return all results as Markdown."""
    if results is None:
        return "The kernels have never run on a GPU. No time, accuracy or memory use on a GPU is known."
    smoke, speed = results["smoke"], results.get("speed", {})
    facts = ", ".join(f"{name} {value}" for name, value in smoke["device"].items() if value is not None)
    parts = [f"Machine: {facts}.", "### Checks"]
    most = max(smoke["shares"].values())
    rows = [[f"{len(smoke['shares'])} random configurations", f"at most {most:.2f} of the allowed error"]]
    rows += [[name, f"{value:.1e}"] for name, value in smoke["errors"].items()]
    rows += [[f"CUDA graph: {name}", value] for name, value in smoke["graphs"].items()]
    rows += [[f"**wrong**: {name}", ""] for name in smoke["wrong"]]
    parts.append(markdown(["check", "result"], rows))
    if speed:
        parts += ["### Training, summary", summary(speed), COPIES.format(gigabytes=speed["bandwidth"] / 1e3, **speed)]
    for kind in ("recurrences", "layers"):
        parts += [f"### All {kind}, in µs"] if kind in speed else []
        for title, rows_of in speed.get(kind, {}).items():
            shown = [[name, *cells(row)] for name, row in rows_of.items()]
            parts += [f"**{title}**", markdown(COLUMNS, shown)]
    rows = []
    for title, each in results.get("plans", {}).get("classes", {}).items():
        best = each["fastest"][0] if each["fastest"] else {}
        chosen = f"{each['chosen']['us']:.1f}" if "us" in each["chosen"] else each["chosen"]["why"]
        fastest = [f"{best['us']:.1f}", str(tuple(best["plan"]))] if best else ["", ""]
        rows.append([title, chosen, *fastest])
    if rows:
        columns = ["class", "chosen plan", "fastest plan", "chunks, steps, features, segments, warps, stages"]
        parts += ["### Plans, in µs", markdown(columns, rows)]
    return "\n\n".join(parts)


def texts_of(results: Results | None) -> dict[str, str]:
    return {"sentence": sentence(results), "results": tables(results)}


def main() -> None:
    texts = texts_of(read(RESULTS))
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), "gpu", texts), encoding="utf-8")
    print(texts["sentence"])


if __name__ == "__main__":
    main()
