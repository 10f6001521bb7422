"""Parity, counting and the products of permutations, trained on 64 time steps: the table of the package mingru-scans.

    python -m benchmarks.reproduce.words                       # this library and nn.GRU
    pip install --no-deps --target peer mingru-scans==0.2.0    # a folder of its own: it is imported as `mingru` too
    python -m benchmarks.reproduce.words --peer peer --tasks parity S3    # also the models of that package

The inputs are elements of a group, and the target of each time step is the product of those so far: sums of bits modulo
2 ("parity"), sums modulo 3, 5 or 7, permutations of 3 objects ("S3"), even permutations of 5 objects ("A5"). As in that
table: 64 features, one layer in a residual block with an MLP (nn.GRU and GRU have neither), Adam with a learning
rate of 3e-3, at most 1,600 steps. The model with the best accuracy at 128 time steps is tested; training stops when
that accuracy is 1, as nothing is better.

In tasks with "all steps", training does not stop before, and of the best models the last is tested. In those with
"short first", sequences have 4 time steps at first. Their length doubles, up to 64, when 95% of a batch
is right. A batch has as many time steps as before, the learning rate falls to 0, and the last model is tested.

Models with "learned start" learn their initial state. It is drawn from N(0, 1), or begins with 2 in "learned from 2",
and with 0 in GRU.
"""

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mingru

from ..measure import scans
from .common import LAYERS, accuracy, build, start, training

FREE = "tanh, own input gate"
GRUS = {"GRU": {}, "GRU, learned start": {"learn_initial_state": True}}
# Options of a block with one layer.
BLOCKS: dict[str, dict[str, Any]] = {"minGRU": {}, "signed": {"gate": "signed"}, "mixed": {"gate": "mixed"}}
for gate in ("rotation", "quaternion"):
    learned = {"gate": gate, "learn_initial_state": True}
    BLOCKS |= {gate: {"gate": gate}, f"{gate}, learned start": learned, f"{gate}, learned from 2": learned}
MODULI = {"parity": 2, "modulo 3": 3, "modulo 5": 5, "modulo 7": 7}
GROUPS = {"S3": list(itertools.permutations(range(3)))}
GROUPS["A5"] = [
    p for p in itertools.permutations(range(5)) if sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0
]
SHORT_FIRST, ALL_STEPS = "short first", "all steps"
SHORT_FIRST_STEPS = {"S3": 2000, "A5": 4000}

TASKS = [*MODULI, "S3", f"modulo 5, {ALL_STEPS}", *(f"{group}, {SHORT_FIRST}" for group in SHORT_FIRST_STEPS)]
DEFAULTS: dict[str, Any] = {"models": [*BLOCKS, FREE, *GRUS, "nn.GRU"], "tasks": TASKS, "seeds": [0, 1, 2]}
DEFAULTS |= {"num_steps": 1600, "batch_size": 16, "peer": ""}
TRAIN_LENGTH, CHOICE_LENGTH, LENGTHS, DIMS = 64, 128, (64, 256, 512, 1024), 64
PEERS = {"mingru-scans log": "log", "mingru-scans signed": "signed", "mingru-scans rotation": "rotation"}


class OwnInputGate(nn.Module):
    """A block like `models.Block` whose state is h_t = tanh(f_t) h_{t-1} + sigma(i_t) tanh(c_t), by `linear_scan`."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.norm, self.linear, self.out = nn.LayerNorm(dims), nn.Linear(dims, 3 * dims), nn.Linear(dims, dims)
        self.mlp = nn.Sequential(nn.LayerNorm(dims), nn.Linear(dims, 4 * dims), nn.GELU(), nn.Linear(4 * dims, dims))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        forget, input, candidate = self.linear(self.norm(x)).chunk(3, -1)
        states = mingru.functional.linear_scan(forget.tanh(), input.sigmoid() * candidate.tanh())
        x = x + self.out(states)
        return x + self.mlp(x), states[:, -1:]


@functools.cache
def products(group: str) -> Tensor:
    """Return a table: [after, before] is the number of the permutation that applies `before` first."""
    elements = GROUPS[group]
    return torch.tensor([[elements.index(tuple(a[i] for i in b)) for b in elements] for a in elements])


def size_of(task: str) -> int:
    """Return the number of elements of the group."""
    return MODULI[task] if task in MODULI else len(GROUPS[task])


def generate(batch_size: int, generator: torch.Generator, task: str, length: int) -> tuple[Tensor, Tensor]:
    """Return tokens (B, length), and the sums or products of all tokens so far (B, length)."""
    tokens = torch.randint(size_of(task), (batch_size, length), generator=generator)
    if task in MODULI:
        return tokens, tokens.cumsum(1) % MODULI[task]
    found = [tokens[:, 0]]
    for token in tokens.unbind(1)[1:]:
        found.append(products(task)[token, found[-1]])
    return tokens, torch.stack(found, 1)


def layers(name: str, folder: str) -> nn.Module:
    """Return one layer, in a block with an MLP."""
    if name in PEERS:
        return scans(Path(folder)).MinGRUStack(DIMS, DIMS, n_layers=1, mixer=PEERS[name])
    if name in GRUS:
        return mingru.GRU(DIMS, DIMS, block_size=32, **GRUS[name])
    if name not in BLOCKS:
        return OwnInputGate(DIMS) if name == FREE else LAYERS[name](DIMS, DIMS)
    block = mingru.models.Block(DIMS, mlp=4, norm="layer", **BLOCKS[name])
    if name.endswith("from 2"):
        nn.init.constant_(block.rnn.initial_state, 2.0)
    return block


def main(arguments: list[str] | None = None) -> None:
    args, results = start("words", __doc__, DEFAULTS, arguments)

    def compute(name: str, seed: int, task: str) -> dict[str, Any]:
        torch.manual_seed(seed)
        task, _, schedule = task.partition(", ")
        # The tables of parity and S3 have 6 symbols.
        model = build(lambda *_: layers(name, args.peer), DIMS, 1, max(6, size_of(task)), args.device)
        at = functools.partial(functools.partial, generate, task=task)
        short_first, all_steps = schedule == SHORT_FIRST, schedule == ALL_STEPS
        num_steps = SHORT_FIRST_STEPS[task] if short_first else args.num_steps
        length = 4 if short_first else TRAIN_LENGTH

        def sample(batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            return generate(batch_size * TRAIN_LENGTH // length, generator, task, length)

        best, kept, chosen = -1.0, num_steps, {}
        for step, right in training(model, sample, num_steps, args.batch_size, 3e-3, seed, decay=short_first):
            if short_first:
                length = min(TRAIN_LENGTH, 2 * length) if right > 0.95 else length
            elif step % 50 == 0 or step == num_steps:
                found = accuracy(model, at(length=CHOICE_LENGTH), 128, 1000 + seed)
                if found > best or (found == best and all_steps):
                    best, kept, chosen = found, step, copy.deepcopy(model.state_dict())
                if best == 1 and not all_steps:
                    break
        if not short_first:
            model.load_state_dict(chosen)
        return {"steps": kept, "accuracy": [accuracy(model, at(length=length), 128, seed) for length in LENGTHS]}

    for seed, name, task in itertools.product(args.seeds, [*args.models, *(PEERS if args.peer else [])], args.tasks):
        results.run(f"{task}: {name}, seed {seed}", compute, name, seed, task)


if __name__ == "__main__":
    main()
