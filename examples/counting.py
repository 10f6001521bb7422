"""Words over a group: train each gate of minGRU, nn.GRU and nn.LSTM on short sequences, and test on long ones.

    pip install ".[examples]"                     # in a clone of the repository
    python examples/counting.py                   # all models, three seeds, with a plot in counting.png
    python examples/counting.py --tasks 3 S3 --models rotation quaternion --seeds 0

A sequence has random elements of a group, and the target of each time step is the product of those so far:

- `2`, `3`, `5` and `7`: numbers, and their sum modulo this number. Modulo 2, it is the parity.
- `S3`: the 6 permutations of 3 objects, one after the other.
- `A5`: the 60 even permutations of 5 objects. Whatever computes their products can compute what any finite automaton
  does (Barrington 1989, "Bounded-Width Polynomial-Size Branching Programs Recognize Exactly Those Languages in NC1").

A model that has learned the group is right at any length; another one falls back to chance after the lengths of the
training. With transitions between 0 and 1, no diagonal recurrence can compute parity for all lengths, at any depth. A
negative transition can flip the sign of a state; a rotation can turn it by a fifth of a turn (Grazzi et al. 2024,
"Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues"); and the order of turns in space matters, as
that of permutations does.

The gates are one layer in a block with an MLP and a learned initial state. nn.GRU and nn.LSTM are one layer. Training
begins with 4 time steps, and the length doubles, up to 64, whenever 95% of a batch are right; a batch has as many time
steps as before. The optimizer and the number of training steps are the same for all.
"""

import itertools
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Parser, Run, at_least, draw_runs, drawing, warmup_cosine
from lightning_fabric import Fabric
from torch import Tensor, nn

from mingru.models import Block

MODELS = ("sigmoid", "signed", "rotation", "quaternion", "nn.GRU", "nn.LSTM")
TRAIN_LENGTH = 64
LENGTHS = (64, 128, 256, 512, 1024)
GROUPS = {"S3": "Permutations of 3", "A5": "Even permutations of 5"}
TASKS = ("2", "3", "5", "7", *GROUPS)
# The accuracy at a length is the mean over so many last steps.
WINDOW = 8
QUICK = {"num_steps": 20, "batch_size": 4, "hidden_dims": 16, "seeds": [0], "num_test": 16}


def products(task: str) -> Tensor:
    """Return the table of a group: entry (a, b) is the number of the element that a makes of b."""
    if task not in GROUPS:
        numbers = torch.arange(int(task))
        return (numbers.unsqueeze(1) + numbers) % len(numbers)
    elements = list(itertools.permutations(range(int(task[1]))))
    if task == "A5":
        elements = [p for p in elements if sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0]
    return torch.tensor([[elements.index(tuple(a[i] for i in b)) for b in elements] for a in elements])


def generate(batch_size: int, num_steps: int, table: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return tokens, and the products of all tokens so far, both (B, S)."""
    tokens = torch.randint(len(table), (batch_size, num_steps), generator=generator)
    targets = itertools.accumulate(tokens.unbind(1), lambda before, token: table[token, before])
    return tokens, torch.stack([*targets], 1)


class Model(nn.Module):
    """Map tokens (B, S) to the logits of the product after each of them, (B, S, size of the group)."""

    def __init__(self, name: str, size: int, dims: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dims)
        of_torch = {"nn.GRU": nn.GRU, "nn.LSTM": nn.LSTM}.get(name)
        options = {"mlp": 4, "norm": "layer", "gate": name, "learn_initial_state": True}
        self.rnn = of_torch(dims, dims, batch_first=True) if of_torch else Block(dims, **options)
        self.head = nn.Linear(dims, size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])


def train(run: Run, name: str, task: str, seed: int) -> tuple[list[float], float]:
    """Return a trained model's accuracies, and the seconds of training."""
    args, generator, table, length = run.args, torch.manual_seed(seed), products(task), [4]

    def loss_of(model: nn.Module, step: int) -> Tensor:
        now = length[0]
        tokens, targets = run.fabric.to_device(generate(args.batch_size * TRAIN_LENGTH // now, now, table, generator))
        logits = model(tokens)
        if (logits.argmax(-1) == targets).float().mean() > 0.95:
            length[0] = min(2 * now, TRAIN_LENGTH)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    model, schedule = Model(name, len(table), args.hidden_dims), partial(warmup_cosine, share=0.05)
    trained = run.train(args.num_steps, loss_of, model, length, schedule_of=schedule, weight_decay=0.0)
    return evaluate(run.fabric, trained, table, seed, args.num_test), run.seconds


@torch.no_grad()
def evaluate(fabric: Fabric, model: nn.Module, table: Tensor, seed: int, num_test: int) -> list[float]:
    """Return the accuracy at each of LENGTHS, on new sequences."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    tokens, targets = fabric.to_device(generate(num_test, LENGTHS[-1], table, generator))
    right = (model(tokens).argmax(-1) == targets).cpu().double().mean(0)
    return [right[length - WINDOW : length].mean().item() for length in LENGTHS]


def plot(path: Path, results: dict[str, dict[str, list[list[float]]]]) -> None:
    """Save a plot of accuracy against length: the mean over the seeds, and each seed in a light color."""
    # Below one another and narrow, so that the text is readable on phones.
    with drawing(path, 5.5, 1 + 2.2 * len(results)) as figure:
        all_axes = figure.subplots(len(results), sharex=True, squeeze=False)[:, 0]
        for axes, (task, by_model) in zip(all_axes, results.items(), strict=True):
            for name, runs in by_model.items():
                # nn.GRU is often hidden by nn.LSTM.
                width = 4.0 if name == "nn.GRU" else 1.5
                style = {"color": f"C{MODELS.index(name)}", "linewidth": width, "marker": "o", "markersize": 3}
                draw_runs(axes, LENGTHS, 100 * torch.tensor(runs), label=name, **style)
            axes.axhline(100 / len(products(task)), color="gray", linestyle="--", linewidth=1, label="chance")
            axes.set(xscale="log", ylabel="Accuracy (%)", title=GROUPS.get(task, f"Sum modulo {task}"), ylim=(0, 104))
            axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS], minor=False)
            axes.minorticks_off()
        all_axes[-1].set_xlabel(f"Length (at most {TRAIN_LENGTH} in training)")
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


def main(argv: list[str] | None = None) -> None:
    defaults = {"num_steps": 3000, "batch_size": 16, "hidden_dims": 64, "learning_rate": 3e-3}
    parser = Parser(__file__, __doc__, QUICK, models=MODELS, plot=Path("counting.png"), **defaults)
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=("2", "5", *GROUPS), help="moduli and groups")
    parser.add_argument("--num-test", type=at_least(1), default=256, help="test sequences of each model")
    args = parser.parse_args(argv)
    run = Run(parser, args, free=["tasks"])
    results: dict[str, dict[str, list[list[float]]]] = {}
    run.print(f"{'task':4} {'model':10} {'seed':>4} {'time':>6}  accuracy at length", *LENGTHS)
    for task, name, seed in itertools.product(args.tasks, args.models, args.seeds):
        accuracies, seconds = run.once(f"{task}, {name}, seed {seed}", train, name, task, seed)
        results.setdefault(task, {}).setdefault(name, []).append(accuracies)
        run.print(f"{task:4} {name:10} {seed:4} {seconds:5.0f}s ", *(f"{accuracy:7.2%}" for accuracy in accuracies))
    plot(args.plot, results)


if __name__ == "__main__":
    main()
