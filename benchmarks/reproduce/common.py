"""What the programs share: layers, training, accuracy, and results that the next run continues."""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mingru
import selective_copying
from examples.common import warmup_cosine

from ..measure import where, write

RESULTS = Path(__file__).parent / "results"
OPTIONS: dict[str, Any] = {"norm": "rms", "residual": True}
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "minGRU": functools.partial(mingru.MinGRU, **OPTIONS),
    "minLSTM": functools.partial(mingru.MinLSTM, **OPTIONS),
    "nn.GRU": functools.partial(nn.GRU, batch_first=True),
    "nn.LSTM": functools.partial(nn.LSTM, batch_first=True),
}
for gate in ("signed", "rotation", "quaternion"):
    LAYERS[f"minGRU, {gate}"] = functools.partial(mingru.MinGRU, gate=gate, **OPTIONS)
    # Two layers only.
    LAYERS[f"minGRU, sigmoid below {gate}"] = functools.partial(mingru.MinGRU, gate=["sigmoid", gate], **OPTIONS)
LAYERS["minGRU, mixed"] = functools.partial(mingru.MinGRU, gate="mixed", **OPTIONS)
# Runs of other seeds, models, ... continue a file: each run has them in its key. The machine has the threads.
UNRECORDED = ("json", "threads", "peer", "models", "layers", "lengths", "tasks", "seeds")
# Return tokens (B, S), and the classes (B, T) that the model must output at the last T time steps.
Sample = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


def copying(**config: int) -> Sample:
    """Return the sampler of selective_copying.py, with the config's seq_len, num_tokens and vocab_size."""
    return lambda batch_size, generator: selective_copying.generate(batch_size, config, generator)


def build(layers: Callable[..., nn.Module], dims: int, num_layers: int, vocab_size: int, device: str) -> nn.Module:
    """Return an embedding, recurrent layers and a linear head. Call torch.manual_seed before."""
    rnn = layers(dims, dims, num_layers)
    config = {"vocab_size": vocab_size, "embedding_dims": dims, "hidden_dims": dims}
    model = selective_copying.Model({**selective_copying.cfg, **config})
    model.rnn = rnn
    return model.to(device)


def training(
    model: nn.Module, sample: Sample, num_steps: int, batch_size: int, rate: float, seed: int, decay: bool = True
) -> Iterator[tuple[int, float]]:
    """Train, and yield the number of steps so far and the accuracy on the batch before each step.

    The learning rate rises during the first 5% of the steps, and falls to 0 along half a cosine if `decay`.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    if decay:
        schedule = warmup_cosine(optimizer, num_steps, 0.05)
    for step in range(num_steps):
        tokens, targets = (x.to(device) for x in sample(batch_size, generator))
        logits = model.train()(tokens)[:, -targets.shape[1] :]
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield step + 1, (logits.argmax(-1) == targets).float().mean().item()


@torch.no_grad()
def accuracy(model: nn.Module, sample: Sample, num_test: int, seed: int) -> float:
    """Return the fraction of outputs that are right, in new sequences."""
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(2**31 + seed)
    tokens, targets = sample(num_test, generator)
    logits = [model.eval()(part)[:, -targets.shape[1] :].cpu() for part in tokens.to(device).split(64)]
    return (torch.cat(logits).argmax(-1) == targets).double().mean().item()


class Results:
    """Results of a program in a JSON file, which is written after each run. A run that the file has is skipped."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        machine = {name: value for name, value in where().items() if name != "commit"}
        # As JSON has them, so that they compare.
        self.found = json.loads(json.dumps({"where": machine, "settings": settings, "runs": {}}))
        self.path = path
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            # Another version of this library continues the file, which keeps the version of its first run.
            same = found["where"] | {"mingru": machine["mingru"]} == self.found["where"]
            if not same or found["settings"] != self.found["settings"]:
                raise SystemExit(f"{path} has results of other settings or another machine: name a new file by --json")
            self.found = found

    def run(self, key: str, compute: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        """Return what `compute` returned for this key, with the seconds that the processor and the clock took."""
        runs: dict[str, dict[str, Any]] = self.found["runs"]
        if key not in runs:
            processor, clock = time.process_time(), time.perf_counter()
            runs[key] = compute(*arguments)
            runs[key]["processor_seconds"] = round(time.process_time() - processor, 1)
            runs[key]["seconds"] = round(time.perf_counter() - clock, 1)
            write(self.path, self.found)
            print(f"{key}: {json.dumps(runs[key])}", flush=True)
        return runs[key]


def start(
    program: str, doc: str, defaults: dict[str, Any], arguments: list[str] | None
) -> tuple[argparse.Namespace, Results]:
    """Return the options and the results of a program. Each default is an option, and is recorded with the results."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for option, value in defaults.items():
        values = value if isinstance(value, list) else [value]
        options = {"type": type(values[0]), "help": f"default: {' '.join(map(str, values))}"}
        options |= {"nargs": "+"} if value is values else {}
        parser.add_argument(f"--{option.replace('_', '-')}", default=value, **options)
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; default: 1")
    path = RESULTS / f"{program}.json"
    parser.add_argument("--json", type=Path, default=path, help="file of the results; default: the one of the page")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    settings = {name: value for name, value in vars(args).items() if name not in UNRECORDED}
    return args, Results(args.json, settings)
