"""Train minGRU on selective copying: find a few tokens among noise, and repeat them in order.

    python selective_copying.py
    python selective_copying.py --seq-len 256 --vocab-size 16 --num-tokens 8 --num-steps 20000 --plot curves.png
    python selective_copying.py --save model.safetensors
    python selective_copying.py --load model.safetensors
    python selective_copying.py --checkpoint run.pt             # if it is killed, add --resume to continue

Run `pip install ".[examples]"` in a clone of the repository first. The task is from Gu and Dao 2023, "Mamba:
Linear-Time Sequence Modeling with Selective State Spaces". The layers are minGRUs and not `mingru.GRU`, because the
program repeats this task as their paper did: Feng et al. 2024, "Were RNNs All We Needed?".

Token 0 is noise, tokens 1 to vocab_size - 2 are data, and token vocab_size - 1 is the marker. The first seq_len time
steps have num_tokens data tokens at distinct random positions, and noise at all other positions. Positions and data
tokens are sampled uniformly, and data tokens may repeat. Then num_tokens markers follow, so a sequence has
seq_len + num_tokens time steps. At the i-th marker the model must output the i-th data token. Only the outputs at the
markers count in loss and accuracy. For example, with seq_len 8, vocab_size 6 and num_tokens 3:

    input   0 3 0 0 1 0 3 0 5 5 5
    target                  3 1 3

All markers are the same token, and all data tokens are equally likely. Guessing is therefore right with
probability 1 / (vocab_size - 2), which is 25% by default.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

# Imported first, because it says how to install missing packages.
from examples.common import Fabric, Parser, Run, at_least, drawing, fail, positive, warmup_cosine, write

# isort: split
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mingru

Config = dict[str, Any]

PRINT_EVERY = 20
# Validation adds this number to the seed. Seeds are smaller, so no run trains on validation data of any seed.
MAX_SEED = 2**31
LEAST = {"seed": 0, "warmup": 0, "weight_decay": 0, "vocab_size": 4}
MOST = {"seed": MAX_SEED - 1, "warmup": 1}
NORMS = ("layer", "rms", "none")
QUICK = {"num_steps": 100, "num_validation": 512}
HELP = {
    "seq_len": "time steps before the markers",
    "vocab_size": "number of different tokens: noise, marker and at least two data tokens",
    "num_tokens": "data tokens in each sequence",
    "embedding_dims": "features of each embedded token",
    "hidden_dims": "state features of each layer",
    "num_layers": "number of minGRU layers",
    "residual": "add each layer's input to its output",
    "norm": "norm of each layer's input",
    "batch_size": "sequences in each training step",
    "num_steps": "number of training steps",
    "learning_rate": "highest learning rate",
    "warmup": "fraction of the training steps in which the learning rate rises",
    "weight_decay": "weight decay of AdamW",
    "max_grad_norm": "norm to which larger gradients are scaled down",
    "num_validation": "number of validation sequences",
    "seed": "random seed of weights and sequences",
}


def generate(batch_size: int, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random sequences (B, seq_len + num_tokens) and their data tokens in order (B, num_tokens)."""
    seq_len, vocab_size, num_tokens = config["seq_len"], config["vocab_size"], config["num_tokens"]
    targets = torch.randint(1, vocab_size - 1, (batch_size, num_tokens), generator=generator)
    positions = torch.rand(batch_size, seq_len, generator=generator).argsort(1)[:, :num_tokens].sort(1).values
    tokens = torch.zeros(batch_size, seq_len, dtype=torch.long).scatter_(1, positions, targets)
    return torch.cat([tokens, torch.full_like(targets, vocab_size - 1)], 1), targets


class Model(nn.Module):
    """Map tokens (B, S) to logits (B, S, vocab_size) by an embedding, minGRU layers and a linear head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config["vocab_size"], config["embedding_dims"])
        self.rnn = mingru.MinGRU(
            input_dims=config["embedding_dims"],
            hidden_dims=config["hidden_dims"],
            num_layers=config["num_layers"],
            residual=config["residual"],
            norm=None if config["norm"] == "none" else config["norm"],
        )
        self.head = nn.Linear(config["hidden_dims"], config["vocab_size"])

    def forward(self, tokens: Tensor) -> Tensor:
        out, _ = self.rnn(self.embedding(tokens))
        return self.head(out)


def train(config: Config, run: Run) -> tuple[nn.Module, Tensor]:
    """Train a model, and return it with the loss and accuracy of each training step, (num_steps, 2)."""
    generator = torch.manual_seed(config["seed"])
    model = Model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["learning_rate"], weight_decay=config["weight_decay"])
    schedule = warmup_cosine(optimizer, config["num_steps"], config["warmup"])
    model, optimizer = run.fabric.setup(model, optimizer)

    history = torch.zeros(config["num_steps"], 2, device=run.fabric.device)
    for step in run.steps(config["num_steps"], model, optimizer, schedule, history):
        tokens, targets = run.fabric.to_device(generate(config["batch_size"], config, generator))
        logits = model(tokens)[:, -config["num_tokens"] :]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        run.fabric.backward(loss)
        run.fabric.clip_gradients(model, optimizer, max_norm=config["max_grad_norm"])
        optimizer.step()
        schedule.step()

        history[step, 0] = loss.detach()
        history[step, 1] = (logits.argmax(-1) == targets).float().mean()
        run.log(loss=history[step, 0], accuracy=history[step, 1])
        if step % PRINT_EVERY == 0:
            loss_now, accuracy = history[step].tolist()
            run.print(f"Step [{step + 1}/{config['num_steps']}], Loss: {loss_now:.4f}, Accuracy: {accuracy:.2%}")
    return model, history.cpu()


@torch.no_grad()
def evaluate(model: nn.Module, config: Config, fabric: Fabric) -> float:
    """Return the fraction of data tokens recalled in num_validation new sequences."""
    generator = torch.Generator().manual_seed(MAX_SEED + config["seed"])
    model.eval()
    num_right = 0
    for start in range(0, config["num_validation"], config["batch_size"]):
        batch_size = min(config["batch_size"], config["num_validation"] - start)
        tokens, targets = fabric.to_device(generate(batch_size, config, generator))
        num_right += (model(tokens)[:, -config["num_tokens"] :].argmax(-1) == targets).sum().item()
    return num_right / (config["num_validation"] * config["num_tokens"])


def save(path: Path, model: nn.Module, config: Config) -> None:
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    write(path, safetensors.torch.save(tensors, metadata={"config": json.dumps(config)}))


def load(path: Path) -> tuple[Config, dict[str, Tensor]]:
    """Return the config and the weights in a file that `save` wrote."""
    try:
        with path.open("rb"), safetensors.safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a dict)
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror or error}")
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        fail(f"{path} is damaged or not a checkpoint of this program: {error}")
    if not isinstance(config, dict) or config.keys() != {*cfg, "precision"}:
        fail(f"{path} is not a checkpoint of this program: its config is missing or incomplete")
    return config, tensors


def plot(path: Path, history: Tensor, accuracy: float, config: Config) -> None:
    """Save a plot of loss and accuracy over the training steps."""
    steps = range(1, config["num_steps"] + 1)
    width = min(PRINT_EVERY, config["num_steps"])
    means = history.unfold(0, width, 1).mean(-1)
    chance = 1 / (config["vocab_size"] - 2)

    with drawing(path, 8, 6) as figure:
        figure.suptitle(
            f"Selective copying: {config['num_tokens']} tokens in {config['seq_len']} time steps, "
            f"vocabulary {config['vocab_size']}\n"
            f"{config['num_layers']} minGRU layers of {config['hidden_dims']} features, "
            f"validation accuracy {accuracy:.2%}"
        )
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axes, column, color in ((upper, 0, "tab:blue"), (lower, 1, "tab:green")):
            values = history[:, column] * (100 if axes is lower else 1)
            averages = means[:, column] * (100 if axes is lower else 1)
            axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8, label="each step")
            axes.plot(steps[width - 1 :], averages, color=color, linewidth=1.8, label=f"mean of {width} steps")
            axes.margins(x=0.01)
        upper.set(yscale="log", ylabel="Loss (cross-entropy)")
        lower.set(ylabel="Accuracy (%)", xlabel="Training step", ylim=(0, 104))
        lower.axhline(100 * chance, color="gray", linestyle="--", linewidth=1, label=f"chance, {chance:.0%}")
        upper.legend(loc="upper right", framealpha=1)
        lower.legend(loc="lower right", framealpha=1)


def make_parser() -> Parser:
    """Return a parser with one option for each entry of `cfg` and three options for files."""
    parser = Parser(__file__, __doc__, QUICK)
    for name, default in cfg.items():
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, str):
            kind = {"choices": NORMS}
        elif isinstance(default, float) and name not in LEAST:
            kind = {"type": positive}
        else:
            kind = {"type": at_least(LEAST.get(name, 1), type(default), MOST.get(name, math.inf))}
        # argparse checks defaults that are strings, so that an entry that was edited is checked too.
        checked = default if isinstance(default, bool) else str(default)
        parser.add_argument(option(name), default=checked, help=HELP[name], **kind)
    parser.add_output("--plot", "plot of loss and accuracy by training step")
    parser.add_output("--save", "file for the trained model (safetensors)")
    text = "validate a saved model instead of training; the options that it was trained with become the defaults"
    parser.add_argument("--load", type=Path, help=text)
    return parser


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.load:
        if args.save or args.plot or args.checkpoint:
            fail("--load does not train, so it cannot be combined with --save, --plot or --checkpoint")
        saved, tensors = load(args.load)
        flags = [option(name if value else f"no_{name}") for name, value in saved.items() if isinstance(value, bool)]
        given = [f"{option(name)}={value}" for name, value in saved.items() if not isinstance(value, bool)]
        args = parser.parse_args([*flags, *given, *argv])
    config = {name: getattr(args, name) for name in (*cfg, "precision")}
    if config["num_tokens"] > config["seq_len"]:
        fail(f"--num-tokens must be at most --seq-len ({config['seq_len']}), got {config['num_tokens']}")
    run = Run(parser, args, free=["load", "num_validation"])
    if args.load:
        model = Model(config)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            fail(f"{args.load} does not match this model: {error}")
        model = run.fabric.setup_module(model)
    else:
        model, history = train(config, run)
    if args.save:
        save(args.save, model, config)
    accuracy = evaluate(model, config, run.fabric)
    if args.plot:
        plot(args.plot, history, accuracy, config)
    run.print(f"Validation Accuracy: {accuracy:.2%}")


# Each entry can be changed here or on the command line.
cfg: Config = {
    "seq_len": 64,
    "vocab_size": 6,
    "num_tokens": 4,
    "embedding_dims": 4,
    "hidden_dims": 64,
    "num_layers": 3,
    "residual": True,
    "norm": "layer",
    "batch_size": 64,
    "num_steps": 1500,
    "learning_rate": 5e-3,
    "warmup": 0.05,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "num_validation": 8192,
    "seed": 0,
}

if __name__ == "__main__":
    main()
