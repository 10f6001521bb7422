"""Time of minGRU's relatives, each beside what it is to be held against.

    python benchmarks/family.py

Medians of interleaved runs in one process, in milliseconds, forward in inference mode and forward + backward for all
inputs and parameters; float32.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import where, write_json
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import mingru
from mingru.bench import forward, forward_backward, medians_ms, output, print_table

Taken = dict[str, tuple[float, float]]


def values(result: Any) -> Tensor:
    out = output(result)
    return out.data if isinstance(out, PackedSequence) else out


def both_ways(calls: dict[str, Callable[[], Any]], modules: dict[str, nn.Module], x: Tensor, seconds: float) -> Taken:
    functions = {name: (lambda call=call: values(call())) for name, call in calls.items()}
    there = medians_ms({name: forward(function) for name, function in functions.items()}, seconds)
    leaves = {name: [x, *modules[name].parameters()] for name in calls}
    back = medians_ms({name: forward_backward(function, leaves[name]) for name, function in functions.items()}, seconds)
    return {name: (there[name], back[name]) for name in calls}


def show(title: str, taken: Taken, against: str) -> None:
    columns = ["ms, medians", "forward", "fwd + bwd", f"it / {against}", "fwd + bwd"]
    rows = []
    for name, times in taken.items():
        ratios = [ms / base for ms, base in zip(times, taken[against], strict=True)]
        rows.append([name, *(f"{ms:.3f}" for ms in times), *(f"{ratio:.2f}" for ratio in ratios)])
    print_table(title, columns, rows)


def kinds(batch: int, steps: int, dims: int, seconds: float) -> Taken:
    x = torch.randn(batch, steps, dims, requires_grad=True)
    modules = {
        "MinGRU": mingru.MinGRU(dims, dims),
        "MinLSTM": mingru.MinLSTM(dims, dims),
        "drop_in.GRU": mingru.drop_in.GRU(dims, dims, batch_first=True),
        "nn.GRU": nn.GRU(dims, dims, batch_first=True),
        "nn.LSTM": nn.LSTM(dims, dims, batch_first=True),
    }
    return both_ways({name: (lambda module=module: module(x)) for name, module in modules.items()}, modules, x, seconds)


def of_different_lengths(batch: int, steps: int, dims: int, seconds: float) -> Taken:
    """Half of all steps are padding: lengths from 1 to S, evenly spread."""
    lengths = torch.linspace(1, steps, batch).round().long()
    x = torch.randn(batch, steps, dims, requires_grad=True)
    total = int(lengths.sum())
    real = torch.randn(batch, total // batch, dims, requires_grad=True)
    packed = pack_padded_sequence(x.detach(), lengths, batch_first=True, enforce_sorted=False)
    rnn, gru = mingru.MinGRU(dims, dims), nn.GRU(dims, dims, batch_first=True)
    calls = {
        "all steps": lambda: rnn(x),
        "as many unpadded steps": lambda: rnn(real),
        "lengths=": lambda: rnn(x, lengths=lengths),
        "PackedSequence": lambda: rnn(packed),
        "nn.GRU, PackedSequence": lambda: gru(packed),
    }
    functions = {name: (lambda call=call: values(call())) for name, call in calls.items()}
    there = medians_ms({name: forward(function) for name, function in functions.items()}, seconds)
    weights = {name: [*(gru if "nn.GRU" in name else rnn).parameters()] for name in calls}
    back = medians_ms(
        {name: forward_backward(function, weights[name]) for name, function in functions.items()}, seconds
    )
    return {name: (there[name], back[name]) for name in calls}


def convolutional(seconds: float) -> Taken:
    x = torch.randn(4, 16, 32, 64, 64, requires_grad=True)
    modules: dict[str, nn.Module] = {
        "its convolution": nn.Conv2d(32, 64, 3, padding=1),
        "MinConv2dGRU": mingru.MinConv2dGRU(32, 32, 3, padding=1),
    }
    calls = {
        "its convolution": lambda: modules["its convolution"](x.flatten(0, 1)),
        "MinConv2dGRU": lambda: modules["MinConv2dGRU"](x),
    }
    return both_ways(calls, modules, x, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="time for each half of a table (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(where())
    results = {}

    def table(title: str, taken: Taken, against: str) -> None:
        results[title] = taken
        show(title, taken, against)

    for batch, steps, dims in [(8, 512, 256), (32, 64, 64), (1, 1, 256)]:
        table(f"One layer, (B, S, I = H) = {(batch, steps, dims)}", kinds(batch, steps, dims, args.seconds), "MinGRU")
    title = "Lengths from 1 to S, (B, S, I = H) = (32, 512, 256); fwd + bwd for the parameters"
    table(title, of_different_lengths(32, 512, 256, args.seconds), "as many unpadded steps")
    table("(B, S, C, *space) = (4, 16, 32, 64, 64), kernel 3, H = 32", convolutional(args.seconds), "its convolution")
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
