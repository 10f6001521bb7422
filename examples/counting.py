"""Count modulo 2, 3 and 5: train each gate of minGRU, nn.GRU and nn.LSTM on short sequences, and test on long ones.

    pip install ".[examples]"                     # in a clone of the repository
    python examples/counting.py                   # all models, three seeds, with a plot in counting.png
    python examples/counting.py --tasks 3 --models rotation --seeds 0

A sequence has random numbers from 0 to m - 1, and the target of each time step is the sum so far modulo m. Modulo 2
this is parity. Training sequences have 40 time steps. A model that has learned to count is right at any length; a model
that has learned only sums of up to 40 numbers falls back to chance, 1 / m.

All models have an embedding, layers of one type and a linear head, and the same optimizer and number of training steps.
By default, "signed" has one layer, because two drift in parity, and the others have two.
The first token marks the start. With transitions between 0 and 1, no diagonal recurrence can compute parity for all
lengths, at any depth. A negative transition can flip the sign of a state, which computes parity; a rotation can turn
it by a third or a fifth of a turn, which counts modulo 3 or 5 (Grazzi et al. 2024, "Unlocking State-Tracking in Linear
RNNs Through Negative Eigenvalues").
"""

import itertools
import statistics
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Parser, Run, at_least, draw_runs, drawing, warmup_cosine
from lightning_fabric import Fabric
from torch import Tensor, nn

import mingru

GATES = ("sigmoid", "signed", "rotation")
MODELS = (*GATES, "nn.GRU", "nn.LSTM")
TRAIN_LENGTH = 40
LENGTHS = (40, 64, 128, 256, 512, 1024)
# The accuracy at a length is the mean over so many last steps.
WINDOW = 8
QUICK = {"num_steps": 20, "batch_size": 16, "hidden_dims": 16, "seeds": [0], "num_test": 16}


def generate(batch_size: int, num_steps: int, modulus: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return tokens (B, 1 + S), of which the first marks the start, and the sums (B, S)."""
    numbers = torch.randint(modulus, (batch_size, num_steps), generator=generator)
    return F.pad(numbers, (1, 0), value=modulus), numbers.cumsum(1) % modulus


class Model(nn.Module):
    """Map tokens (B, 1 + S) to the logits of the sum after each number, (B, S, modulus)."""

    def __init__(self, name: str, modulus: int, dims: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(modulus + 1, dims)
        if name in GATES:
            self.rnn: nn.Module = mingru.MinGRU(dims, dims, num_layers, gate=name, candidate="tanh")
        else:
            self.rnn = {"nn.GRU": nn.GRU, "nn.LSTM": nn.LSTM}[name](dims, dims, num_layers, batch_first=True)
        self.head = nn.Linear(dims, modulus)

    def forward(self, tokens: Tensor) -> Tensor:
        out, _ = self.rnn(self.embedding(tokens))
        return self.head(out[:, 1:])


def train(run: Run, name: str, modulus: int, seed: int) -> tuple[list[float], float, float]:
    """Return a trained model's accuracies, its loss (the mean over the last 50 steps) and the seconds of training."""
    args, generator = run.args, torch.manual_seed(seed)
    # At 1,024 time steps, one signed layer computes parity without an error, and two layers drift.
    model = Model(name, modulus, args.hidden_dims, args.num_layers or (1 if name == "signed" else 2))
    losses: list[float] = []

    def loss_of(model: nn.Module, step: int) -> Tensor:
        tokens, sums = run.fabric.to_device(generate(args.batch_size, TRAIN_LENGTH, modulus, generator))
        loss = F.cross_entropy(model(tokens).flatten(0, 1), sums.flatten(), label_smoothing=args.label_smoothing)
        losses.append(loss.item())
        return loss

    options = {"schedule_of": partial(warmup_cosine, share=0.05), "weight_decay": args.weight_decay}
    trained = run.train(args.num_steps, loss_of, model, losses, **options)
    return evaluate(run.fabric, trained, modulus, seed, args.num_test), statistics.mean(losses[-50:]), run.seconds


@torch.no_grad()
def evaluate(fabric: Fabric, model: nn.Module, modulus: int, seed: int, num_test: int) -> list[float]:
    """Return the accuracy at each of LENGTHS, on new sequences."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    tokens, sums = fabric.to_device(generate(num_test, LENGTHS[-1], modulus, generator))
    right = (model(tokens).argmax(-1) == sums).cpu().double().mean(0)
    return [right[length - WINDOW : length].mean().item() for length in LENGTHS]


def plot(path: Path, results: dict[str, dict[str, list[list[float]]]]) -> None:
    """Save a plot of accuracy against length: the mean over the seeds, and each seed in a light color."""
    # Below one another and narrow, so that the text is readable on phones.
    with drawing(path, 5.5, 1 + 2.4 * len(results)) as figure:
        all_axes = figure.subplots(len(results), sharex=True, squeeze=False)[:, 0]
        for axes, (task, by_model) in zip(all_axes, results.items(), strict=True):
            for name, runs in by_model.items():
                # nn.GRU is often hidden by nn.LSTM.
                width = 4.0 if name == "nn.GRU" else 1.5
                style = {"color": f"C{MODELS.index(name)}", "linewidth": width, "marker": "o", "markersize": 3}
                draw_runs(axes, LENGTHS, 100 * torch.tensor(runs), label=name, **style)
            axes.axhline(100 / int(task), color="gray", linestyle="--", linewidth=1, label="chance")
            axes.axvline(TRAIN_LENGTH, color="gray", linestyle=":", linewidth=1)
            axes.set(xscale="log", ylabel="Accuracy (%)", title=f"Sum modulo {task}", ylim=(0, 104))
            axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS], minor=False)
            axes.minorticks_off()
        all_axes[-1].set_xlabel("Length")
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


def main(argv: list[str] | None = None) -> None:
    defaults = {"num_steps": 1500, "batch_size": 128, "hidden_dims": 64, "learning_rate": 3e-3}
    parser = Parser(__file__, __doc__, QUICK, models=MODELS, plot=Path("counting.png"), **defaults)
    add = parser.add_argument
    add("--tasks", type=at_least(2), nargs="+", default=(2, 3, 5), metavar="M", help="moduli")
    add("--num-layers", type=at_least(1), help="number of layers; if omitted, 1 for signed, otherwise 2")
    add("--weight-decay", type=at_least(0, float), default=0.0, help="weight decay of AdamW")
    add("--label-smoothing", type=at_least(0, float, 1), default=0.1, help="share of the targets that is uniform")
    add("--num-test", type=at_least(1), default=256, help="test sequences of each model")
    args = parser.parse_args(argv)
    run = Run(parser, args, free=["tasks"])
    results: dict[str, dict[str, list[list[float]]]] = {}
    run.print(f"{'task':10} {'model':9} {'seed':>4} {'time':>6} {'loss':>8}  accuracy at length", *LENGTHS)
    for modulus, name, seed in itertools.product(args.tasks, args.models, args.seeds):
        key = f"modulo {modulus}, {name}, seed {seed}"
        accuracies, loss, seconds = run.once(key, train, name, modulus, seed)
        results.setdefault(str(modulus), {}).setdefault(name, []).append(accuracies)
        row = f"modulo {modulus:<3} {name:9} {seed:4} {seconds:5.0f}s {loss:8.5f} "
        run.print(row, *(f"{accuracy:7.2%}" for accuracy in accuracies))
    plot(args.plot, results)


if __name__ == "__main__":
    main()
