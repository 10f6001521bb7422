"""Selective copying by models of 60,000 parameters: accuracy against layers and training steps, beside nn.GRU.

    python -m benchmarks.reproduce.layers

The sequences have 4 data tokens of 14 in 32 time steps (see selective_copying.py). After a warm-up the learning rate is
constant, so that one training gives the accuracy after each number of steps.
"""

import bisect
import itertools
from typing import Any

import torch

from examples.common import num_parameters

from .common import LAYERS, accuracy, build, copying, start, training

MODELS = ["nn.GRU, 1 layer", "minGRU, 1 layer", "minGRU, 2 layers", "minGRU, 3 layers", "minGRU, 4 layers"]
DEFAULTS: dict[str, Any] = {"models": MODELS, "seeds": [0, 1, 2], "num_parameters": 60_000, "steps": [500, 1000, 1500]}
DEFAULTS |= {"batch_size": 32, "learning_rate": 3e-3, "num_test": 1024}
CONFIG = {"seq_len": 32, "num_tokens": 4, "vocab_size": 16}


def model_of(title: str, most: int, device: str) -> torch.nn.Module:
    """Return the model with the smallest width that gives at least the number of parameters."""
    name, count = title.split(", ")

    def at(width: int) -> torch.nn.Module:
        return build(LAYERS[name], width, int(count.split()[0]), CONFIG["vocab_size"], device)

    return at(1 + bisect.bisect_left(range(1, 1000), most, key=lambda width: num_parameters(at(width))))


def main(arguments: list[str] | None = None) -> None:
    args, results = start("layers", __doc__, DEFAULTS, arguments)
    sample = copying(**CONFIG)

    def compute(title: str, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = model_of(title, args.num_parameters, args.device)
        run = training(model, sample, args.steps[-1], args.batch_size, args.learning_rate, seed, decay=False)
        found = [accuracy(model, sample, args.num_test, seed) for step, _ in run if step in args.steps]
        return {"parameters": num_parameters(model), "accuracy": found}

    for seed, title in itertools.product(args.seeds, args.models):
        results.run(f"{title}, seed {seed}", compute, title, seed)


if __name__ == "__main__":
    main()
