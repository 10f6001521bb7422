"""Six tasks of formal languages, trained on lengths 1 to 40 and tested on lengths 40 to 256.

    python -m benchmarks.reproduce.chomsky              # the table of README.md
    python -m benchmarks.reproduce.chomsky --num-steps 500000 --batch-size 128 --hidden-dims 256 --device cuda \\
        --json full.json                                # the size of Feng et al. 2024, for a GPU

In all tasks but bucket sort, the model outputs the answer after each symbol, so that one sequence of 40 symbols trains
all lengths from 1 to 40. In bucket sort, the sorted symbols are the outputs at markers after the sequence.

Five tasks are from Delétang et al. 2022, "Neural Networks and the Chomsky Hierarchy". Majority is from Beck et al.
2024, "xLSTM". All models have two layers, and the same number of training steps. Each learning rate is tried with the
first seed, and the one with the best accuracy at lengths up to 40 is used for the other seeds.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import LAYERS, Sample, accuracy, build, start, training

MODULUS, VOCAB_SIZE = 5, 9
MARKER = VOCAB_SIZE - 1
NEAR, FAR = (1, 40), (40, 256)


def parity(symbols: Tensor) -> Tensor:
    """Return whether the number of ones is odd."""
    return symbols.cumsum(1) % 2


def even_pairs(symbols: Tensor) -> Tensor:
    """Return whether the number of neighbors that differ is odd: then the last symbol differs from the first."""
    return (symbols != symbols[:, :1]).long()


def cycle_navigation(symbols: Tensor) -> Tensor:
    """Return the position in a cycle of 5 after moves by 0, 1 or -1 (symbol 2)."""
    return torch.where(symbols == 2, -1, symbols).cumsum(1) % MODULUS


def majority(symbols: Tensor) -> Tensor:
    """Return whether there are more ones than zeros."""
    return ((2 * symbols - 1).cumsum(1) > 0).long()


def modular_arithmetic(symbols: Tensor) -> Tensor:
    """Return the value modulo 5 of numbers (0 to 4) that are joined by +, - and * (5, 6 and 7).

    An operator at the end is ignored.
    """
    total, term = torch.zeros_like(symbols[:, 0]), symbols[:, 0]
    values = [term]
    for operator, number in zip(symbols[:, 1::2].unbind(1), symbols[:, 2::2].unbind(1), strict=False):
        times = operator == 7
        total = torch.where(times, total, total + term) % MODULUS
        term = torch.where(times, term * number, torch.where(operator == 6, -number, number)) % MODULUS
        values.append((total + term) % MODULUS)
    return torch.stack(values, 1).repeat_interleave(2, 1)[:, : symbols.shape[1]]


def bucket_sort(symbols: Tensor) -> Tensor:
    """Return the symbols, sorted."""
    return symbols.sort(1).values


# The number of symbols, and the function that returns the output: the answer for each length, except in bucket sort.
TASKS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "parity": (2, parity),
    "even pairs": (2, even_pairs),
    "cycle navigation": (3, cycle_navigation),
    "majority": (2, majority),
    "modular arithmetic": (MODULUS, modular_arithmetic),
    "bucket sort": (MODULUS, bucket_sort),
}
DEFAULTS: dict[str, Any] = {"models": list(LAYERS), "tasks": list(TASKS), "seeds": [0, 1, 2]}
DEFAULTS |= {"learning_rates": [2e-3, 8e-3], "hidden_dims": 64, "batch_size": 16, "num_steps": 600, "num_test": 128}


def generate(
    batch_size: int, generator: torch.Generator, task: str, shortest: int, longest: int
) -> tuple[Tensor, Tensor]:
    """Return random symbols, and the outputs for all lengths in the range; in bucket sort, for one random length."""
    num_symbols, output = TASKS[task]
    length = int(torch.randint(shortest, longest + 1, (), generator=generator)) if task == "bucket sort" else longest
    symbols = torch.randint(num_symbols, (batch_size, length), generator=generator)
    if task == "bucket sort":
        # The sorted symbols are the outputs at markers.
        return F.pad(symbols, (0, length), value=MARKER), output(symbols)
    if task == "modular arithmetic":
        symbols[:, 1::2] = torch.randint(5, 8, (batch_size, length // 2), generator=generator)
    return symbols, output(symbols)[:, shortest - 1 :]


def sample_of(task: str, lengths: tuple[int, int]) -> Sample:
    return functools.partial(generate, task=task, shortest=lengths[0], longest=lengths[1])


def main(arguments: list[str] | None = None) -> None:
    args, results = start("chomsky", __doc__, DEFAULTS, arguments)

    def compute(task: str, name: str, learning_rate: float, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = build(LAYERS[name], args.hidden_dims, 2, VOCAB_SIZE, args.device)
        for _ in training(model, sample_of(task, NEAR), args.num_steps, args.batch_size, learning_rate, seed):
            pass

        def test(lengths: tuple[int, int]) -> float:
            # In 8 parts, because each part of bucket sort has one length.
            parts = range(8 * seed, 8 * seed + 8)
            return sum(accuracy(model, sample_of(task, lengths), args.num_test // 8, part) for part in parts) / 8

        return {"near": test(NEAR), "far": test(FAR)}

    def run(task: str, name: str, rate: float, seed: int) -> dict[str, Any]:
        return results.run(f"{task}: {name}, learning rate {rate}, seed {seed}", compute, task, name, rate, seed)

    for seed, task, name in itertools.product(args.seeds, args.tasks, args.models):
        first = {rate: run(task, name, rate, args.seeds[0])["near"] for rate in args.learning_rates}
        run(task, name, max(first, key=first.__getitem__), seed)


if __name__ == "__main__":
    main()
