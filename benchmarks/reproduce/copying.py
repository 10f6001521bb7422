"""Selective copying of 16 tokens, as in table 1 of Feng et al. 2024, with 1 to 3 layers.

    python -m benchmarks.reproduce.copying          # the table of README.md
    python -m benchmarks.reproduce.copying --seq-len 4096 --num-steps 400000 --batch-size 64 --hidden-dims 384 \\
        --learning-rate 3e-4 --layers 3 --device cuda --json full.json    # the size of the paper, for a GPU

The task is that of selective_copying.py: 16 data tokens among noise. There are 16 different tokens, noise and marker
included.
"""

import itertools
from typing import Any

import torch

from .common import LAYERS, accuracy, build, copying, start, training

DEFAULTS: dict[str, Any] = {"models": ["minGRU", "minLSTM"], "layers": [3, 2, 1], "seeds": [0, 1, 2]}
DEFAULTS |= {"seq_len": 64, "num_tokens": 16, "vocab_size": 16, "hidden_dims": 64, "batch_size": 16}
DEFAULTS |= {"learning_rate": 5e-3, "num_steps": 10_000, "num_test": 1024}


def main(arguments: list[str] | None = None) -> None:
    args, results = start("copying", __doc__, DEFAULTS, arguments)
    sample = copying(seq_len=args.seq_len, num_tokens=args.num_tokens, vocab_size=args.vocab_size)

    def compute(name: str, num_layers: int, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = build(LAYERS[name], args.hidden_dims, num_layers, args.vocab_size, args.device)
        for _ in training(model, sample, args.num_steps, args.batch_size, args.learning_rate, seed):
            pass
        return {"accuracy": accuracy(model, sample, args.num_test, seed)}

    for seed, num_layers, name in itertools.product(args.seeds, args.layers, args.models):
        results.run(f"{name}, {num_layers} layers, seed {seed}", compute, name, num_layers, seed)


if __name__ == "__main__":
    main()
