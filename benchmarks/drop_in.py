"""Train six programs with torch's recurrent layers, and with what `mingru.drop_in.patch` builds in their place.

    OMP_NUM_THREADS=1 python benchmarks/drop_in.py --json docs/drop_in.json
    python benchmarks/drop_in.py ppo brits --seeds 0

Each program is a small one with the task, the layers and the loops of a public program:

- ppo: CleanRL's ppo_atari_lstm, an LSTM that steps in Python with masks of ended episodes. A cue is shown at the first
  of 8 steps, and the last action must repeat it; % of last actions that are right.
- seq2seq: an encoder and decoder with attention, GRUs, which write a sequence backwards. The decoder steps in Python,
  and asserts that output and state are equal; % of symbols that are right.
- tagger: a bidirectional LSTM that says of each number whether the one before and the one after are as even or
  odd as it is; % of tags that are right.
- brits: BRITS, two LSTMCells whose state decays over gaps, which fill in missing values; relative error.
- mrnn: M-RNN, the same task by a bidirectional GRU for each series; relative error.
- vae: EC2-VAE, a GRU that encodes melodies and a GRUCell that decodes them; % of notes that are right.

The first three initialize their weights in loops over their parameters, as the public programs do, in the rows with
"own". The other rows have the layers' initialization. The seconds are of the processor, with one thread.
"""

import argparse
import json
import math
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import markdown, write_json
from torch import nn

from mingru import drop_in

H = 32
DEEP = {"norm": "rms", "residual": True}
# The options of `patch` in each row.
ROWS = {
    "torch": None,
    "default": {},
    "blocks of 16": {"cell": "blockgru", "block_size": 16},
    "minGRU, minLSTM": {"cell": "minlstm"},
    "norm, residual": {"cell": "minlstm", **DEEP},
    "2 layers, norm, residual": {"cell": "minlstm", "num_layers": 2, **DEEP},
    'minGRU, gate="mixed"': {"cell": "mingru", "gate": "mixed", "norm": "rms"},
}


class Program(nn.Module):
    """A program with `loss` and `metric`, which draw their data from a generator by `logits_and_labels`."""

    num_steps, lr = 400, 3e-3

    def __init__(self):
        super().__init__()
        self.build()

    def initialize(self):
        """Initialize the weights as the public program does."""

    def loss(self, g):
        logits, labels = self.logits_and_labels(32, g)
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    def metric(self, g):
        logits, labels = self.logits_and_labels(512, g)
        return 100 * (logits.argmax(-1) == labels).float().mean().item()


class PPO(Program):
    num_steps, num_envs, length, period = 360, 32, 16, 8

    def build(self):
        self.encoder, self.lstm = nn.Linear(6, H), nn.LSTM(H, H)
        self.actor, self.critic = nn.Linear(H, 2), nn.Linear(H, 1)
        self.state, self.count = (torch.zeros(1, self.num_envs, H),) * 2, 0

    def initialize(self):
        for layer, size in ((self.encoder, 2**0.5), (self.actor, 0.01), (self.critic, 1.0)):
            nn.init.orthogonal_(layer.weight, size)
            nn.init.zeros_(layer.bias)
        for name, weight in self.lstm.named_parameters():
            nn.init.zeros_(weight) if "bias" in name else nn.init.orthogonal_(weight, 1.0)

    def sample(self, num, g):
        """Return observations of two episodes after a part of another, the first steps and the last, and the cues."""
        step = (torch.arange(num) + torch.arange(self.length).unsqueeze(1)) % self.period
        episode = (step == 0).long().cumsum(0)
        cues = torch.randint(2, (3, num), generator=g).gather(0, episode)
        x = torch.rand(self.length, num, 6, generator=g)
        x[..., :2] = F.one_hot(cues, 2) * (step == 0).unsqueeze(-1)
        x[..., 2] = step == self.period - 1
        return x, step == 0, (step == self.period - 1) & (episode > 0), cues

    def outputs(self, x, starts, state):
        found = []
        for h, start in zip(self.encoder(x).relu(), starts.float(), strict=True):
            keep = (1.0 - start).view(1, -1, 1)
            out, state = self.lstm(h.unsqueeze(0), (keep * state[0], keep * state[1]))
            found.append(out)
        return torch.cat(found), state

    @torch.no_grad()
    def rollout(self, g):
        x, starts, ends, cues = self.sample(self.num_envs, g)
        first, (out, self.state) = self.state, self.outputs(x, starts, self.state)
        before, returns = self.actor(out).log_softmax(-1), torch.zeros(self.length + 1, self.num_envs)
        actions = torch.multinomial(before.flatten(0, 1).exp(), 1, generator=g).view(*cues.shape, 1)
        for t in reversed(range(self.length)):
            returns[t] = torch.where(ends[t], (actions[t, :, 0] == cues[t]).float(), 0.95 * returns[t + 1])
        gains = returns[:-1] - self.critic(out).squeeze(-1)
        return x, starts, first, actions, before, (gains - gains.mean()) / (gains.std() + 1e-8), returns[:-1]

    def loss(self, g):
        # Four epochs for each rollout.
        self.data, self.count = self.data if self.count % 4 else self.rollout(g), self.count + 1
        x, starts, first, actions, before, gains, returns = self.data
        out, _ = self.outputs(x, starts, first)
        now = self.actor(out).log_softmax(-1)
        ratio = (now - before).gather(-1, actions).squeeze(-1).exp()
        gain = torch.min(ratio * gains, ratio.clamp(0.8, 1.2) * gains) - 0.01 * (now.exp() * now).sum(-1)
        return 0.5 * F.mse_loss(self.critic(out).squeeze(-1), returns) - gain.mean()

    def logits_and_labels(self, num, g):
        x, starts, ends, cues = self.sample(num, g)
        return self.actor(self.outputs(x, starts, (torch.zeros(1, num, H),) * 2)[0])[ends], cues[ends]


class Seq2Seq(Program):
    num_steps, vocab_size = 350, 8

    def build(self):
        self.source, self.target = nn.Embedding(self.vocab_size, H), nn.Embedding(self.vocab_size + 1, H)
        self.encoder, self.between = nn.GRU(H, H), nn.Linear(H, H)
        self.attention, self.score = nn.Linear(2 * H, H), nn.Linear(H, 1, bias=False)
        self.decoder, self.head = nn.GRU(2 * H, H), nn.Linear(3 * H, self.vocab_size)

    def initialize(self):
        for name, weight in self.named_parameters():
            nn.init.normal_(weight, 0, 0.01) if "weight" in name else nn.init.zeros_(weight)

    def logits_and_labels(self, num, g):
        length = int(torch.randint(5, 9, (), generator=g))
        labels = (ids := torch.randint(self.vocab_size, (length, num), generator=g)).flip(0)
        given = self.target(torch.cat([torch.full_like(ids[:1], self.vocab_size), labels[:-1]]))
        encoded, last = self.encoder(self.source(ids))
        state, logits = self.between(last.transpose(0, 1).flatten(1)).tanh(), []
        for x in given:
            mixed = self.attention(torch.cat([state.expand(length, -1, -1), encoded], -1)).tanh()
            context = (self.score(mixed).softmax(0) * encoded).sum(0)
            output, hidden = self.decoder(torch.cat([x, context], -1).unsqueeze(0), state.unsqueeze(0))
            assert (output == hidden).all()
            state = hidden.squeeze(0)
            logits.append(self.head(torch.cat([state, context, x], -1)))
        return torch.stack(logits), labels


class Tagger(Program):
    num_steps, vocab_size, lr = 400, 16, 1e-3

    def build(self):
        self.embedding, self.lstm = nn.Embedding(self.vocab_size, H), nn.LSTM(H, H, bidirectional=True)
        self.head = nn.Linear(2 * H, 4)

    def initialize(self):
        for weight in self.parameters():
            nn.init.normal_(weight, 0, 0.1)

    def logits_and_labels(self, num, g):
        ids = torch.randint(self.vocab_size, (16, num), generator=g)
        labels = 2 * ((ids + ids.roll(1, 0)) % 2) + (ids + ids.roll(-1, 0)) % 2
        return self.head(self.lstm(self.embedding(ids))[0])[1:-1], labels[1:-1]


class Imputation(Program):
    num_steps, lr, num_series = 200, 5e-3, 5

    def sample(self, num, g):
        """Return series (S, B, F), which of their values are known, and the times since the value before."""
        t = torch.arange(16).view(-1, 1, 1)
        phases, periods = (torch.rand(2, num, 2, generator=g) * torch.tensor([2 * math.pi, 1.0])).unbind(-1)
        waves = (2 * math.pi * t / (8 + 8 * periods.view(2, 1, num, 1)) + phases.view(2, 1, num, 1)).sin()
        x = (waves * torch.stack([torch.linspace(1, -1, 5), torch.linspace(0, 1, 5)]).view(2, 1, 1, 5)).sum(0)
        known = (torch.rand(x.shape, generator=g) < 0.4).float()
        gaps = torch.zeros_like(known)
        for t in range(1, len(gaps)):
            gaps[t] = 1 + (1 - known[t - 1]) * gaps[t - 1]
        return x, known, gaps

    def loss(self, g):
        x, known, gaps = self.sample(32, g)
        seen = known * (torch.rand(known.shape, generator=g) < 0.8)
        return ((self.filled_in(x * seen, seen, gaps) - x).abs() * known).sum() / known.sum()

    def metric(self, g):
        x, known, gaps = self.sample(512, g)
        errors, unknown = self.filled_in(x * known, known, gaps) - x, 1 - known
        return ((errors.square() * unknown).sum() / (x.square() * unknown).sum()).sqrt().item()


class BRITS(Imputation):
    def build(self):
        self.cells = nn.ModuleList([nn.LSTMCell(2 * self.num_series, H) for _ in range(2)])
        self.decays = nn.ModuleList([nn.Linear(self.num_series, H) for _ in range(2)])
        self.heads = nn.ModuleList([nn.Linear(H, self.num_series) for _ in range(2)])

    def one_way(self, at, x, known, gaps):
        (h, c), found = x.new_zeros(2, x.shape[1], H), []
        for value, is_known, gap in zip(x, known, gaps, strict=True):
            h = h * (-self.decays[at](gap).relu()).exp()
            found.append(self.heads[at](h))
            full = is_known * value + (1 - is_known) * found[-1]
            h, c = self.cells[at](torch.cat([full, is_known], -1), (h, c))
        return torch.stack(found)

    def filled_in(self, x, known, gaps):
        back = self.one_way(1, x.flip(0), known.flip(0), gaps.flip(0)).flip(0)
        return (self.one_way(0, x, known, gaps) + back) / 2


class MRNN(Imputation):
    def build(self):
        self.rnn, self.head = nn.GRU(3, H, bidirectional=True), nn.Linear(2 * H, 1)
        self.mix = nn.Linear(2 * self.num_series, self.num_series)

    def filled_in(self, x, known, gaps):
        out, _ = self.rnn(torch.stack([x, known, gaps], -1).flatten(1, 2))
        # A value is not seen by its own estimate.
        ahead, back = F.pad(out[:-1, :, :H], (0, 0, 0, 0, 1, 0)), F.pad(out[1:, :, H:], (0, 0, 0, 0, 0, 1))
        own = self.head(torch.cat([ahead, back], -1)).view(x.shape)
        return own + self.mix(torch.cat([known * x + (1 - known) * own, known], -1))


class VAE(Program):
    num_steps, vocab_size, lr = 600, 8, 1e-2

    def build(self):
        self.encoder, self.to_code = nn.GRU(self.vocab_size, H, bidirectional=True), nn.Linear(2 * H, 2 * 16)
        self.start, self.cell = nn.Linear(16, H), nn.GRUCell(self.vocab_size + 16, H)
        self.head = nn.Linear(H, self.vocab_size)

    def logits_and_labels(self, num, g):
        # Three notes, and the same again, higher or lower.
        motif = torch.randint(self.vocab_size, (1, 3, num), generator=g)
        ids = (motif + torch.randint(-2, 3, (2, 1, num), generator=g).cumsum(0)).flatten(0, 1) % self.vocab_size
        notes = F.one_hot(ids, self.vocab_size).float()
        mean, scale = self.to_code(self.encoder(notes)[1].transpose(0, 1).flatten(1)).chunk(2, -1)
        self.divergence = 0.5 * (mean.square() + scale.exp() - scale - 1).mean()
        code = mean + torch.randn(mean.shape, generator=g) * (scale / 2).exp() * self.training
        h, logits = self.start(code).tanh(), []
        for note in [torch.zeros_like(notes[0]), *notes[:-1]]:
            x = note if self.training or not logits else F.one_hot(logits[-1].argmax(-1), self.vocab_size)
            h = self.cell(torch.cat([x, code], -1), h)
            logits.append(self.head(h))
        return torch.stack(logits), ids

    def loss(self, g):
        return super().loss(g) + 0.001 * self.divergence


PROGRAMS = {"ppo": PPO, "seq2seq": Seq2Seq, "tagger": Tagger, "brits": BRITS, "mrnn": MRNN, "vae": VAE}


def train(kind, options, is_own, seed):
    """Return the metric and the processor seconds of training, or the error of a program that cannot use the layers."""
    torch.manual_seed(seed)
    with nullcontext() if options is None else drop_in.patch(**options):
        program = kind()
    if is_own:
        program.initialize()
    optimizer, g = torch.optim.Adam(program.parameters(), kind.lr), torch.Generator().manual_seed(seed)
    start = time.process_time()
    for _ in range(kind.num_steps):
        optimizer.zero_grad()
        program.loss(g).backward()
        nn.utils.clip_grad_norm_(program.parameters(), 1.0)
        optimizer.step()
    seconds = time.process_time() - start
    with torch.no_grad():
        return program.eval().metric(torch.Generator().manual_seed(1)), seconds


def cell_of(results):
    """Return the range of the metrics and the median of the seconds, or the error of a program that fails."""
    if isinstance(results, str):
        return f"fails ({results})"
    ends = dict.fromkeys(f"{each:.0f}" if each > 1.5 else f"{each:.2f}" for each, _ in (min(results), max(results)))
    return f"{'–'.join(ends)}; {statistics.median(seconds for _, seconds in results):.1f} s"


def table(results):
    return markdown(["", *ROWS], [[name, *(cell_of(found[row]) for row in ROWS)] for name, found in results.items()])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", nargs="*", help="default: all", default=list(PROGRAMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--json", type=Path, help="file of the results; those of other programs in it stay")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(args.json.read_text())["results"] if args.json and args.json.exists() else {}
    for name in args.programs:
        kind = PROGRAMS[name]
        for is_own in (False, True) if kind.initialize is not Program.initialize else (False,):
            found = results[name + ", own" * is_own] = {}
            for row, options in ROWS.items():
                try:
                    found[row] = [train(kind, options, is_own, seed) for seed in args.seeds]
                except (AssertionError, RuntimeError, ValueError) as error:
                    found[row] = type(error).__name__
                print(name, "own" * is_own, row, found[row], flush=True)
        if args.json:
            write_json(args.json, results)
    print(table(results))


if __name__ == "__main__":
    main()
