"""Translate dates in words to ISO dates with an encoder and a decoder of nn.GRU, which one line makes faster.

    pip install ".[examples]"              # in a clone of the repository
    python examples/encoder_decoder.py     # with `mingru.drop_in.accelerate(translator)`, and without

    Wednesday, the 12th of March 1997  ->  1997-03-12

The encoder reads packed sequences of different lengths in both directions. The decoder starts from the encoder's last
states. In training, the decoder's inputs are the correct digits; in a test, they are its own predictions. Test dates
never occur in training.

With the defaults, both print the same losses, and from 600 training steps on translate all unseen dates correctly. All
1,000 steps take 20 processor seconds of one thread of an AMD EPYC, and 58 without the line.
"""

import datetime
import random
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from common import Parser, Run, at_least, num_parameters, positive
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from mingru import drop_in

MODELS = ("accelerated", "nn.GRU")
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
FORMS = (
    "{day} {month} {year}",
    "{month} {day}, {year}",
    "{month:.3} {day} {year}",
    "{day}-{month:.3}-{year}",
    "{day}.{number}.{year}",
    "{weekday}, {day} {month} {year}",
    "{weekday}, the {day}{th} of {month} {year}",
    "the {day}{th} of {month} in the year {year}",
)
FIRST, LAST = datetime.date(1900, 1, 1).toordinal(), datetime.date(2099, 12, 31).toordinal()
EPOCH = 200  # training steps between tests
DIGITS = "0123456789-"
BEGIN = len(DIGITS)
LENGTH = len("1997-03-12")
QUICK = {"steps": 200, "batch": 16, "hidden_dims": 32, "num_tests": 200}


def draw(size: int, held_out: bool, generator: random.Random) -> tuple[list[Tensor], Tensor]:
    """Return the characters of random dates in words, each (S,), and their ISO digits, (B, LENGTH)."""
    texts, isos = [], []
    for _ in range(size):
        # Every tenth date is held out for tests.
        tenth = FIRST + 10 * generator.randrange((LAST - FIRST) // 10)
        date = datetime.date.fromordinal(tenth if held_out else tenth + generator.randrange(1, 10))
        ending = "th" if date.day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(date.day % 10, "th")
        names = {"weekday": DAYS[date.weekday()], "month": MONTHS[date.month - 1], "th": ending}
        text = generator.choice(FORMS).format(day=date.day, number=date.month, year=date.year, **names)
        texts.append(torch.tensor(list(text.encode("ascii"))))
        isos.append([DIGITS.index(character) for character in date.isoformat()])
    return texts, torch.tensor(isos)


class Encoder(nn.Module):
    def __init__(self, hidden_dims: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, hidden_dims)
        self.rnn = nn.GRU(hidden_dims, hidden_dims, num_layers, batch_first=True, bidirectional=True)
        self.join = nn.Linear(2 * hidden_dims, hidden_dims)

    def forward(self, characters: Tensor, lengths: Tensor) -> Tensor:
        """Return states (L, B, H) that join the last states of both directions, for padded characters (B, S)."""
        self.rnn.flatten_parameters()
        packed = pack_padded_sequence(self.embedding(characters), lengths, batch_first=True, enforce_sorted=False)
        _, h_n = self.rnn(packed)
        layers = h_n.view(self.rnn.num_layers, 2, -1, self.rnn.hidden_size)
        return torch.tanh(self.join(torch.cat([layers[:, 0], layers[:, 1]], -1)))


class Decoder(nn.Module):
    def __init__(self, hidden_dims: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(DIGITS) + 1, hidden_dims)
        self.rnn = nn.GRU(2 * hidden_dims, hidden_dims, num_layers, batch_first=True)
        self.head = nn.Linear(hidden_dims, len(DIGITS))

    def forward(self, digits: Tensor, h: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next digits' logits and the states, for digits (B, S), states h (L, B, H), context (B, H)."""
        inputs = torch.cat([self.embedding(digits), context.unsqueeze(1).expand(-1, digits.size(1), -1)], -1)
        out, h = self.rnn(inputs, h)
        return self.head(out), h


class Translator(nn.Module):
    def __init__(self, hidden_dims: int, num_layers: int) -> None:
        super().__init__()
        self.encoder = Encoder(hidden_dims, num_layers)
        self.decoder = Decoder(hidden_dims, num_layers)

    def forward(self, characters: Tensor, lengths: Tensor, digits: Tensor | None = None) -> Tensor:
        """Return logits (B, LENGTH, digits) of each digit, given the digits before it.

        If `digits` is None, the model's own most likely digits are used instead.
        """
        h = self.encoder(characters, lengths)
        context = h[-1]
        digit = torch.full_like(characters[:, :1], BEGIN)
        if digits is not None:
            return self.decoder(torch.cat([digit, digits[:, :-1]], 1), h, context)[0]
        steps = []
        for _ in range(LENGTH):
            logits, h = self.decoder(digit, h, context)
            steps.append(logits)
            digit = logits.argmax(-1)
        return torch.cat(steps, 1)


def batch(size: int, held_out: bool, generator: random.Random, fabric: Fabric) -> tuple[Tensor, Tensor, Tensor]:
    texts, isos = draw(size, held_out, generator)
    # pack_padded_sequence needs lengths on the CPU.
    lengths = torch.tensor([len(text) for text in texts])
    return fabric.to_device(pad_sequence(texts, batch_first=True)), lengths, fabric.to_device(isos)


@torch.no_grad()
def accuracy(model: nn.Module, num_tests: int, fabric: Fabric) -> float:
    """Return the fraction of dates whose characters are all correct."""
    model.eval()
    characters, lengths, isos = batch(num_tests, True, random.Random(1), fabric)
    right = (model(characters, lengths).argmax(-1) == isos).all(1)
    model.train()
    return right.float().mean().item()


class Generator(random.Random):
    """A generator whose state a checkpoint has."""

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.getstate()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.setstate(saved["state"])


def train(run: Run, name: str, seed: int) -> None:
    args, generator = run.args, Generator(seed)
    torch.manual_seed(seed)
    translator = Translator(args.hidden_dims, args.num_layers)
    if name == "accelerated":
        drop_in.accelerate(translator)
    run.print(f"{name}: {num_parameters(translator):,} parameters in encoder and decoder")
    losses: list[float] = []  # since the last test

    def report(model: nn.Module, step: int) -> None:
        right = accuracy(model, args.num_tests, run.fabric)
        result = f"training loss {statistics.mean(losses):.4f}, {right:.2%} of unseen dates right"
        run.print(f"{name}: step {step}, {result}, {run.processor_seconds:.0f} s")
        losses.clear()

    def loss_of(model: nn.Module, step: int) -> Tensor:
        if losses and step % EPOCH == 0:
            report(model, step)
        characters, lengths, isos = batch(args.batch, False, generator, run.fabric)
        loss = F.cross_entropy(model(characters, lengths, isos).flatten(0, 1), isos.flatten())
        losses.append(loss.item())
        return loss

    report(run.train(args.steps, loss_of, translator, generator, losses, lr=args.lr, weight_decay=0.0), args.steps)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, __doc__, QUICK, models=MODELS, seeds=(0,), hidden_dims=64, num_layers=2)
    parser.add("--steps", type=at_least(1), default=1000, help="number of training steps")
    parser.add("--batch", type=at_least(1), default=64, help="dates in each training step")
    parser.add("--num-tests", type=at_least(1), default=2000, help="unseen dates in each test")
    parser.add("--lr", type=positive, default=5e-3, help="highest learning rate")
    args = parser.parse_args(argv)
    run = Run(parser, args)
    for name in args.models:
        run.each_seed(name, train, name)


if __name__ == "__main__":
    main()
