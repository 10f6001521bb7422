"""Time the language model: a step, reading a prompt, and training and generation beside minGRU-pytorch.

    python benchmarks/models.py

Times are medians of interleaved runs in one process, in milliseconds, with float32. All but training is timed in
inference mode. minGRU-pytorch keeps the state of its recurrence between steps, but not the last inputs of its
convolution. A model of its with convolutions reads all tokens again for each new token.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import where, write_json
from minGRU_pytorch.minLM import minLM
from torch import Tensor, nn

from mingru.bench import forward, medians_ms, print_table
from mingru.models import LanguageModel

VOCAB, DIMS, LAYERS = 84, 256, 6
OPTIONS: dict[str, dict[str, Any]] = {
    "no convolution, no MLP": {},
    "convolution": {"conv": 4},
    "convolution and MLP": {"conv": 4, "mlp": 2},
}


def show(title: str, times: dict[str, float], baseline: str) -> None:
    rows = [[name, f"{ms:.3f}", f"{ms / times[baseline]:.2f}"] for name, ms in times.items()]
    print_table(title, ["", "median ms", f"relative to {baseline}"], rows)


def step(options: dict[str, Any], seconds: float) -> dict[str, float]:
    """Time a step of one sequence, and the linear maps of a step."""
    lm = LanguageModel(VOCAB, DIMS, LAYERS, **options).eval()
    _, state = lm(torch.randint(VOCAB, (1, 1)))
    token = torch.randint(VOCAB, (1, 1))
    maps = [module for module in lm.modules() if isinstance(module, nn.Linear)]
    # The tied output layer is no module.
    maps.append(nn.Linear(DIMS, VOCAB, bias=False))
    inputs = [torch.randn(1, 1, module.in_features) for module in maps]

    def linear_maps() -> None:
        for module, x in zip(maps, inputs, strict=True):
            module(x)

    return medians_ms({"step": forward(lambda: lm(token, state)), "linear maps": forward(linear_maps)}, seconds)


def prompt(options: dict[str, Any], num_tokens: int, seconds: float) -> dict[str, float]:
    """Time reading a prompt in one pass, and token by token."""
    lm = LanguageModel(VOCAB, DIMS, LAYERS, **options).eval()
    ids = torch.randint(VOCAB, (1, num_tokens))

    def stepping() -> None:
        state = None
        for index in range(num_tokens):
            _, state = lm(ids[:, index : index + 1], state)

    return medians_ms({"one pass": forward(lambda: lm(ids)), "stepping": forward(stepping)}, seconds, least=3)


def training_step(lm: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(lm.parameters(), 1e-3)

    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return run


def peers(with_conv: bool) -> tuple[LanguageModel, Any]:
    """Return both models, with the options of minGRU-pytorch."""
    conv = 3 if with_conv else None
    ours = LanguageModel(VOCAB, DIMS, LAYERS, expansion=1.5, conv=conv, mlp=4, bias=True, tied=False)
    return ours, minLM(num_tokens=VOCAB, dim=DIMS, depth=LAYERS, enable_conv=with_conv)


def training(with_conv: bool, batch: int, num_tokens: int, seconds: float) -> dict[str, float]:
    ours, other = peers(with_conv)
    ids = torch.randint(VOCAB, (batch, num_tokens + 1))

    def loss() -> Tensor:
        logits, _ = ours(ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    calls = {
        "mingru": training_step(ours, loss),
        "minGRU-pytorch": training_step(other, lambda: other(ids, return_loss=True)),
    }
    return medians_ms(calls, seconds, least=3)


def generation(with_conv: bool, num_tokens: int, seconds: float) -> dict[str, float]:
    """Time greedy generation from one token."""
    ours, other = (lm.eval() for lm in peers(with_conv))
    start = torch.zeros(1, 1, dtype=torch.int64)

    def of_other() -> None:
        ids, hiddens = start, None
        for _ in range(num_tokens):
            logits, new = other(ids, return_prev_hiddens=True, prev_hiddens=hiddens)
            hiddens = new if other.can_cache else None
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)

    calls = {
        "mingru": forward(lambda: ours.generate(start, num_tokens, temperature=0)),
        "minGRU-pytorch": forward(of_other),
    }
    return medians_ms(calls, seconds, least=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each table (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens to read (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=16, help="sequences of a training step (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(where())
    results = {}

    def table(title: str, times: dict[str, float], baseline: str) -> None:
        results[title] = times
        show(title, times, baseline)

    for name, options in OPTIONS.items():
        table(f"One step, {LAYERS} layers, {DIMS} features, {name}", step(options, args.seconds), "linear maps")
    for name, options in OPTIONS.items():
        table(f"{args.prompt} tokens, {name}", prompt(options, args.prompt, args.seconds), "one pass")
    for with_conv in (False, True):
        name = "with convolutions" if with_conv else "without convolutions"
        times = training(with_conv, args.sequences, 256, args.seconds)
        table(f"Training step, {args.sequences} sequences of 256 tokens, {name}", times, "mingru")
        table(f"Generation of {args.tokens} tokens, {name}", generation(with_conv, args.tokens, args.seconds), "mingru")
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
