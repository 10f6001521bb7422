"""Plot learning curves that examples/text.py wrote.

    python examples/text.py --curve mingru.json
    python examples/text.py --cell gru --minutes 3 --curve gru.json
    python benchmarks/text_curve.py mingru.json gru.json --plot docs/text.png

A curve is the loss on the held-out text against the minutes of training, evaluation left out. The name of its file is
its label.
"""

import argparse
import json
from pathlib import Path
from typing import Any

COLORS = {"mingru": "#0b6e4f", "minlstm": "#5a4fcf", "gru": "#c1121f", "lstm": "#e07a1f"}


def plot(curves: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
    for label, curve in curves.items():
        cell, points = curve["settings"]["cell"], curve["points"]
        style = {"linewidth": 3.0, "zorder": 3} if cell == "mingru" else {"linewidth": 1.6}
        minutes, losses = [point["seconds"] / 60 for point in points], [point["held_out"] for point in points]
        axes.plot(minutes, losses, color=COLORS[cell], label=f"{label}, {curve['parameters']:,} parameters", **style)
    ngram, where = (next(iter(curves.values()))[name] for name in ("ngram", "where"))
    axes.axhline(ngram["held_out"], linestyle="--", color="#8d99ae", label=ngram["name"])
    best = max(min(point["held_out"] for point in curve["points"]) for curve in curves.values())
    machine = f"{where['threads']} CPU threads" if where["device"] == "cpu" else where["device"]
    labels = {"xlabel": "training time (minutes)", "ylabel": "held-out loss (nats per character)"}
    # The first losses are several times higher.
    axes.set(ylim=(None, 1.4 * max(best, ngram["held_out"])), xlim=(0, None), **labels)
    axes.set_title(f"Language models on held-out text, {machine}")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("curves", type=Path, nargs="+", help="files that examples/text.py --curve wrote")
    parser.add_argument("--plot", type=Path, required=True, help="picture to write")
    args = parser.parse_args(argv)
    plot({path.stem: json.loads(path.read_text()) for path in args.curves}, args.plot)


if __name__ == "__main__":
    main()
