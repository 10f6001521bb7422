"""Parity and the permutations of 3 objects, trained on 64 time steps: the table of the package mingru-scans.

    python -m benchmarks.reproduce.words                       # this library and nn.GRU
    pip install --no-deps --target peer mingru-scans==0.2.0    # a folder of its own: it is imported as `mingru` too
    python -m benchmarks.reproduce.words --peer peer           # also the models of that package

In "parity", the target of each time step is the sum of the bits so far, modulo 2. In "S3", the inputs are permutations
of 3 objects, and the target is the product of those so far. As in that table: 64 features, one layer in a residual
block with an MLP (nn.GRU has none), batches of 128, Adam with a learning rate of 3e-3, at most 1,600 steps. The model
with the best accuracy at 128 time steps is tested; training stops when that accuracy is 1, as nothing is better.
"""

import copy
import functools
import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mingru

from .common import LAYERS, accuracy, build, start, training

FREE = "tanh, own input gate"

DEFAULTS: dict[str, Any] = {
    "models": ["minGRU", "signed", "rotation", FREE, "nn.GRU"],
    "tasks": ["parity", "S3"],
    "seeds": [0, 1, 2],
    "num_steps": 1600,
    "batch_size": 16,
    "peer": "",
}
TRAIN_LENGTH, CHOICE_LENGTH, LENGTHS, DIMS = 64, 128, (64, 256, 512, 1024), 64
PERMUTATIONS = list(itertools.permutations(range(3)))
# [after, before] is the number of the permutation that applies `before` first.
PRODUCTS = torch.tensor(
    [[PERMUTATIONS.index(tuple(a[i] for i in b)) for b in PERMUTATIONS] for a in PERMUTATIONS], dtype=torch.long
)
PEERS = {"mingru-scans log": "log", "mingru-scans signed": "signed", "mingru-scans rotation": "rotation"}


class OwnInputGate(nn.Module):
    """A block like `models.Block` whose state is h_t = tanh(f_t) h_{t-1} + sigma(i_t) tanh(c_t), by `linear_scan`."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.norm, self.linear, self.out = nn.LayerNorm(dims), nn.Linear(dims, 3 * dims), nn.Linear(dims, dims)
        self.mlp = nn.Sequential(nn.LayerNorm(dims), nn.Linear(dims, 4 * dims), nn.GELU(), nn.Linear(4 * dims, dims))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        forget, input, candidate = self.linear(self.norm(x)).chunk(3, -1)
        h = torch.zeros_like(x[:, :1])
        states = mingru.functional.linear_scan(forget.tanh(), input.sigmoid() * candidate.tanh(), h)
        x = x + self.out(states)
        return x + self.mlp(x), states[:, -1:]


def generate(batch_size: int, generator: torch.Generator, task: str, length: int) -> tuple[Tensor, Tensor]:
    """Return tokens (B, length), and the sums or products of all tokens so far (B, length)."""
    tokens = torch.randint(2 if task == "parity" else 6, (batch_size, length), generator=generator)
    if task == "parity":
        return tokens, tokens.cumsum(1) % 2
    products = [tokens[:, 0]]
    for token in tokens.unbind(1)[1:]:
        products.append(PRODUCTS[token, products[-1]])
    return tokens, torch.stack(products, 1)


def peer(folder: str) -> Any:
    """Return the package mingru-scans in a folder, imported under another name."""
    path = Path(folder, "mingru", "__init__.py")
    if not path.exists():
        raise SystemExit(f"{path} is missing: run pip install --no-deps --target {folder} mingru-scans==0.2.0")
    spec = importlib.util.spec_from_file_location("mingru_scans", path, submodule_search_locations=[str(path.parent)])
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layers(name: str, folder: str) -> nn.Module:
    """Return one layer, in a block with an MLP."""
    if name in PEERS:
        return peer(folder).MinGRUStack(DIMS, DIMS, n_layers=1, mixer=PEERS[name])
    if name == FREE:
        return OwnInputGate(DIMS)
    if name == "nn.GRU":
        return LAYERS[name](DIMS, DIMS)
    return mingru.models.Block(DIMS, mlp=4, norm="layer", gate="sigmoid" if name == "minGRU" else name)


def main(arguments: list[str] | None = None) -> None:
    args, results = start("words", __doc__, DEFAULTS, arguments)

    def compute(task: str, name: str, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = build(layers(name, args.peer), 6, DIMS, args.device)
        at = functools.partial(functools.partial, generate, task=task)
        best, kept, chosen = -1.0, 0, {}
        for step, _ in training(
            model, at(length=TRAIN_LENGTH), args.num_steps, args.batch_size, 3e-3, seed, decay=False
        ):
            if step % 50 == 0 or step == args.num_steps:
                found = accuracy(model, at(length=CHOICE_LENGTH), 128, 1000 + seed)
                if found > best:
                    best, kept, chosen = found, step, copy.deepcopy(model.state_dict())
                if best == 1:
                    break
        model.load_state_dict(chosen)
        return {"steps": kept, "accuracy": [accuracy(model, at(length=length), 128, seed) for length in LENGTHS]}

    for seed in args.seeds:
        for name in [*args.models, *(PEERS if args.peer else [])]:
            for task in args.tasks:
                results.run(f"{task}: {name}, seed {seed}", functools.partial(compute, task, name, seed))


if __name__ == "__main__":
    main()
