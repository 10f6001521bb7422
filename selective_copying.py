"""Train minGRU on selective copying: find a few tokens among noise, and repeat them in order.

    python selective_copying.py
    python selective_copying.py --seq-len 256 --vocab-size 16 --num-tokens 8 --num-steps 20000 --plot curves.png
    python selective_copying.py --save model.safetensors
    python selective_copying.py --load model.safetensors

Run `pip install ".[examples]"` in a clone of the repository first. The task is from Gu and Dao 2023, "Mamba:
Linear-Time Sequence Modeling with Selective State Spaces". The layers are from Feng et al. 2024, "Were RNNs All We
Needed?".

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
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm

import mingru

Config = dict[str, Any]

PRINT_EVERY = 20
# Validation adds this number to the seed. Seeds are smaller, so no run trains on validation data of any seed.
MAX_SEED = 2**31
CHOICES = {"norm": ("layer", "rms", "none"), "precision": ("32-true", "bf16-mixed")}
MAY_BE_ZERO = ("seed", "warmup", "weight_decay")
HELP = {
    "seq_len": "time steps before the markers",
    "vocab_size": "number of different tokens, noise and marker included",
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
    "precision": "floating-point precision",
    "seed": "random seed of weights and sequences",
}


class UserError(Exception):
    """An error of the user, reported in one line."""


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


def train(config: Config, fabric: Fabric) -> tuple[nn.Module, Tensor]:
    """Train a model, and return it with the loss and accuracy of each training step, (num_steps, 2)."""
    generator = torch.manual_seed(config["seed"])
    model = Model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["learning_rate"], weight_decay=config["weight_decay"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))
    model, optimizer = fabric.setup(model, optimizer)

    history = torch.zeros(config["num_steps"], 2, device=fabric.device)
    for step in tqdm(range(config["num_steps"]), desc="Training", unit="step", leave=False, disable=None):
        tokens, targets = fabric.to_device(generate(config["batch_size"], config, generator))
        logits = model(tokens)[:, -config["num_tokens"] :]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=config["max_grad_norm"])
        optimizer.step()
        schedule.step()

        history[step, 0] = loss.detach()
        history[step, 1] = (logits.argmax(-1) == targets).float().mean()
        if step % PRINT_EVERY == 0:
            loss_now, accuracy = history[step].tolist()
            tqdm.write(
                f"Step [{step + 1}/{config['num_steps']}], Loss: {loss_now:.4f}, Accuracy: {accuracy:.2%}", sys.stdout
            )
    return model, history.cpu()


def learning_rate_factor(step: int, config: Config) -> float:
    """Return a factor that rises linearly during warm-up and then falls to 0 along half a cosine."""
    num_warmup = max(1, round(config["warmup"] * config["num_steps"]))
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, config["num_steps"] - num_warmup)
    return (1 + math.cos(math.pi * progress)) / 2


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


def check(config: Config) -> None:
    """Raise UserError if an entry of the config is invalid."""
    for name, default in cfg.items():
        value = config[name]
        if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
            raise UserError(f"{name} must be of type {type(default).__name__}, got {value!r}")
        if name in CHOICES and value not in CHOICES[name]:
            raise UserError(f"{name} must be one of {', '.join(CHOICES[name])}, got {value}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if name in MAY_BE_ZERO and not 0 <= value < math.inf:
                raise UserError(f"{name} must be 0 or more, got {value}")
            if name not in MAY_BE_ZERO and not 0 < value < math.inf:
                raise UserError(f"{name} must be above 0, got {value}")
    if config["vocab_size"] < 4:
        raise UserError(f"vocab_size must be at least 4 (noise, marker, two data tokens), got {config['vocab_size']}")
    if config["num_tokens"] > config["seq_len"]:
        raise UserError(f"num_tokens must be at most seq_len ({config['seq_len']}), got {config['num_tokens']}")
    if config["warmup"] > 1:
        raise UserError(f"warmup must be a fraction of the training steps, at most 1, got {config['warmup']}")
    if config["seed"] >= MAX_SEED:
        raise UserError(f"seed must be below {MAX_SEED}, got {config['seed']}")


def save(path: Path, model: nn.Module, config: Config) -> None:
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_whole(path, safetensors.torch.save(tensors, metadata={"config": json.dumps(config)}))


def load(path: Path) -> tuple[Config, dict[str, Tensor]]:
    """Return the config and the weights in a file that `save` wrote."""
    try:
        with path.open("rb"), safetensors.safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a dict)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged or not a checkpoint of this program: {error}") from error
    if not isinstance(config, dict) or config.keys() != cfg.keys():
        raise UserError(f"{path} is not a checkpoint of this program: its config is missing or incomplete")
    return config, tensors


def load_weights(model: Model, tensors: dict[str, Tensor], path: Path) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{path} does not match the config: {name} is {found.get(name, 'missing')}, "
                f"expected {expected.get(name, 'no such tensor')}"
            )
    model.load_state_dict(tensors)


def check_writable(path: Path) -> None:
    """Raise UserError if path cannot be written. Called before training, so that no result is lost."""
    try:
        if target(path).is_dir():
            raise UserError(f"cannot write {path}: it is a folder")
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path}: it is not a regular file")
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"cannot write {path}: it is read-only")
        # The temporary file is tested, because its name is longer than that of the file, and may be too long.
        temporary(path).touch()
        temporary(path).unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def target(path: Path) -> Path:
    """Return the path with symbolic links resolved, so that writing does not replace a link."""
    return Path(os.path.realpath(path))


def temporary(path: Path) -> Path:
    return target(path).with_name(f"{target(path).name}.{os.getpid()}.part")


def write_whole(path: Path, content: bytes) -> None:
    """Write the content to path; if that fails, leave the old file unchanged."""
    try:
        temporary(path).write_bytes(content)
        os.replace(temporary(path), target(path))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary(path).unlink(missing_ok=True)


def check_plot(path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('--plot needs matplotlib: run pip install ".[examples]" in a clone of mingru') from error
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise UserError(f"--plot must end in one of {', '.join(f'.{kind}' for kind in sorted(kinds))}, got {path}")


def plot(path: Path, history: Tensor, accuracy: float, config: Config) -> None:
    """Save a plot of loss and accuracy over the training steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = range(1, config["num_steps"] + 1)
    width = min(PRINT_EVERY, config["num_steps"])
    means = history.unfold(0, width, 1).mean(-1)
    chance = 1 / (config["vocab_size"] - 2)

    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"Selective copying: {config['num_tokens']} tokens in {config['seq_len']} time steps, "
        f"vocabulary {config['vocab_size']}\n"
        f"{config['num_layers']} minGRU layers of {config['hidden_dims']} features, validation accuracy {accuracy:.2%}"
    )
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, column, color in ((upper, 0, "tab:blue"), (lower, 1, "tab:green")):
        values = history[:, column] * (100 if axes is lower else 1)
        averages = means[:, column] * (100 if axes is lower else 1)
        axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8, label="each step")
        axes.plot(steps[width - 1 :], averages, color=color, linewidth=1.8, label=f"mean of {width} steps")
        axes.grid(alpha=0.3)
        axes.margins(x=0.01)
    upper.set(yscale="log", ylabel="Loss (cross-entropy)")
    lower.set(ylabel="Accuracy (%)", xlabel="Training step", ylim=(0, 104))
    lower.axhline(100 * chance, color="gray", linestyle="--", linewidth=1, label=f"chance, {chance:.0%}")
    upper.legend(loc="upper right", framealpha=1)
    lower.legend(loc="lower right", framealpha=1)

    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower())
    write_whole(path, content.getvalue())


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def make_parser() -> Parser:
    """Return a parser with one option for each entry of `cfg` and three options for files."""
    parser = Parser("selective_copying.py", description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    for name, default in cfg.items():
        option = f"--{name.replace('_', '-')}"
        text = f"{HELP[name]}; default: {default}"
        if isinstance(default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(option, type=type(default), choices=CHOICES.get(name), help=text)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save a plot of loss and accuracy by training step")
    parser.add_argument("--save", type=Path, metavar="FILE", help="save the trained model (safetensors)")
    parser.add_argument(
        "--load",
        type=Path,
        metavar="FILE",
        help="validate a saved model instead of training; the options that it was trained with become the defaults",
    )
    return parser


def run(given: Config) -> None:
    plot_path, save_path, load_path = (given.pop(name, None) for name in ("plot", "save", "load"))
    if load_path and (plot_path or save_path):
        raise UserError("--load does not train, so it cannot be combined with --save or --plot")
    if save_path and plot_path and target(save_path) == target(plot_path):
        raise UserError(f"--save and --plot must be different files, got {save_path} for both")
    loaded, tensors = load(load_path) if load_path else ({}, {})
    config = {**cfg, **loaded, **given}
    check(config)
    for path in filter(None, (save_path, plot_path)):
        check_writable(path)
    if plot_path:
        check_plot(plot_path)

    fabric = Fabric(accelerator="auto", devices=1, precision=config["precision"])
    if load_path:
        model = Model(config)
        load_weights(model, tensors, load_path)
        model = fabric.setup_module(model)
    else:
        model, history = train(config, fabric)
    if save_path:
        save(save_path, model, config)
    accuracy = evaluate(model, config, fabric)
    if plot_path:
        plot(plot_path, history, accuracy, config)
    print(f"Validation Accuracy: {accuracy:.2%}")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    try:
        run(given)
    except UserError as error:
        parser.error(str(error))


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
    "precision": "32-true",
    "seed": 0,
}

if __name__ == "__main__":
    main()
