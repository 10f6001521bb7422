"""Plot learning curves that examples/text.py wrote.

    python examples/text.py --minutes 3 --curve minGRU.json
    python examples/text.py --minutes 3 --cell lstm --lr 0.012 --curve nn.LSTM.json
    python benchmarks/text_curve.py minGRU.json nn.LSTM.json --plot docs/text.png

A curve is the loss on the held-out text against the minutes of training, evaluation left out. The name of its file is
its label.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from measure import OWN, draw

STYLES = {"mingru": OWN, "minlstm": {"color": "#5a4fcf"}, "gru": {"color": "#c1121f"}, "lstm": {"color": "#e07a1f"}}


def plot(curves: dict[str, dict[str, Any]], path: Path) -> None:
    lines = []
    for label, curve in curves.items():
        minutes, losses = zip(*((point["seconds"] / 60, point["held_out"]) for point in curve["points"]), strict=True)
        style = STYLES[curve["settings"]["cell"]]
        lines.append((minutes, losses, {**style, "label": f"{label}, {curve['parameters']:,} parameters"}))
    ngram, where = (next(iter(curves.values()))[name] for name in ("ngram", "where"))
    style = {"linestyle": "--", "color": "#8d99ae", "label": ngram["name"]}
    lines.append(((0, max(minutes[-1] for minutes, *_ in lines)), [ngram["held_out"]] * 2, style))
    best = max(min(losses) for _, losses, _ in lines)
    machine = f"{where['threads']} CPU threads" if where["device"] == "cpu" else where["device"]
    options = {"title": f"Language models on held-out text, {machine}", "xlabel": "training time (minutes)"}
    # The first losses are several times higher.
    options |= {"ylabel": "held-out loss (nats per character)", "ylim": (None, 1.4 * best), "xlim": (0, None)}
    draw(path, lines, **options)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("curves", type=Path, nargs="+", help="files that examples/text.py --curve wrote")
    parser.add_argument("--plot", type=Path, required=True, help="picture to write")
    args = parser.parse_args(argv)
    plot({path.stem: json.loads(path.read_text()) for path in args.curves}, args.plot)


if __name__ == "__main__":
    main()
