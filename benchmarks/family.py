"""Time the other layers of the library and compare them with MinGRU, with torch's layers or with a convolution.

    python benchmarks/family.py

Times are medians of interleaved runs in one process, in milliseconds, with float32. Forward is timed in inference mode.
Forward + backward includes the gradients of all inputs and parameters.
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
from mingru import ops
from mingru.bench import forward, forward_backward, medians_ms, output, print_table

Times = dict[str, tuple[float, float]]


def values(result: Any) -> Tensor:
    out = output(result)
    return out.data if isinstance(out, PackedSequence) else out


def time_both(functions: dict[str, Callable[[], Tensor]], leaves: dict[str, list[Tensor]], seconds: float) -> Times:
    """Return milliseconds of forward, and of forward + backward, by name."""
    forward_ms = medians_ms({name: forward(function) for name, function in functions.items()}, seconds)
    both_ms = medians_ms(
        {name: forward_backward(function, leaves[name]) for name, function in functions.items()}, seconds
    )
    return {name: (forward_ms[name], both_ms[name]) for name in functions}


def time_modules(
    calls: dict[str, Callable[[], Any]], modules: dict[str, nn.Module], x: Tensor, seconds: float
) -> Times:
    functions = {name: (lambda call=call: values(call())) for name, call in calls.items()}
    leaves = {name: [x, *modules[name].parameters()] for name in calls}
    return time_both(functions, leaves, seconds)


def show(title: str, times: Times, baseline: str) -> None:
    columns = ["ms, medians", "forward", "fwd + bwd", f"relative to {baseline}", "fwd + bwd"]
    rows = []
    for name, pair in times.items():
        ratios = [ms / base for ms, base in zip(pair, times[baseline], strict=True)]
        rows.append([name, *(f"{ms:.3f}" for ms in pair), *(f"{ratio:.2f}" for ratio in ratios)])
    print_table(title, columns, rows)


def recurrent_layers(batch: int, steps: int, dims: int, seconds: float) -> Times:
    x = torch.randn(batch, steps, dims, requires_grad=True)
    modules = {
        "MinGRU": mingru.MinGRU(dims, dims),
        "MinLSTM": mingru.MinLSTM(dims, dims),
        "drop_in.GRU": mingru.drop_in.GRU(dims, dims, batch_first=True),
        "nn.GRU": nn.GRU(dims, dims, batch_first=True),
        "nn.LSTM": nn.LSTM(dims, dims, batch_first=True),
    }
    calls = {name: (lambda module=module: module(x)) for name, module in modules.items()}
    return time_modules(calls, modules, x, seconds)


def gates(batch: int, steps: int, features: int, seconds: float) -> Times:
    """Time the recurrence alone, from pre-activations on, with each gate."""
    inputs = [torch.randn(batch, steps, features, requires_grad=True) for _ in range(2)]
    zero = torch.zeros(batch, 1, features)
    start, start_with_dt = ops.Start(zero, zero, None), ops.Start(zero, zero, None, 2 * torch.rand(batch, steps))
    calls = {
        "sigmoid": (ops.Spec("mingru", "positive", False), start),
        "signed": (ops.Spec("mingru_signed", "positive", False), start),
        "rotation": (ops.Spec("mingru_rotation", "positive", False), start),
        "sigmoid, dt": (ops.Spec("mingru", "positive", False), start_with_dt),
        "rotation, dt": (ops.Spec("mingru_rotation", "positive", False), start_with_dt),
        "sigmoid, min_decay": (ops.Spec("mingru", "positive", False, 0.5), start),
    }
    functions = {name: (lambda call=call: ops.recurrence(call[0], inputs, call[1])[0]) for name, call in calls.items()}
    return time_both(functions, dict.fromkeys(calls, inputs), seconds)


def different_lengths(batch: int, steps: int, dims: int, seconds: float) -> Times:
    """Time a padded batch: its lengths are evenly spaced from 1 to S, so half of the steps are padding."""
    lengths = torch.linspace(1, steps, batch).round().long()
    x = torch.randn(batch, steps, dims, requires_grad=True)
    total = int(lengths.sum())
    unpadded = torch.randn(batch, total // batch, dims, requires_grad=True)
    packed = pack_padded_sequence(x.detach(), lengths, batch_first=True, enforce_sorted=False)
    rnn, gru = mingru.MinGRU(dims, dims), nn.GRU(dims, dims, batch_first=True)
    calls = {
        "all steps": lambda: rnn(x),
        "as many unpadded steps": lambda: rnn(unpadded),
        "lengths=": lambda: rnn(x, lengths=lengths),
        "PackedSequence": lambda: rnn(packed),
        "nn.GRU, PackedSequence": lambda: gru(packed),
    }
    functions = {name: (lambda call=call: values(call())) for name, call in calls.items()}
    weights = {name: [*(gru if "nn.GRU" in name else rnn).parameters()] for name in calls}
    return time_both(functions, weights, seconds)


def convolutional(seconds: float) -> Times:
    x = torch.randn(4, 16, 32, 64, 64, requires_grad=True)
    modules: dict[str, nn.Module] = {
        "nn.Conv2d": nn.Conv2d(32, 64, 3, padding=1),
        "MinConv2dGRU": mingru.MinConv2dGRU(32, 32, 3, padding=1),
    }
    calls = {
        "nn.Conv2d": lambda: modules["nn.Conv2d"](x.flatten(0, 1)),
        "MinConv2dGRU": lambda: modules["MinConv2dGRU"](x),
    }
    return time_modules(calls, modules, x, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each set of calls (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(where())
    results = {}

    def table(title: str, times: Times, baseline: str) -> None:
        results[title] = times
        show(title, times, baseline)

    for batch, steps, dims in [(8, 512, 256), (32, 64, 64), (1, 1, 256)]:
        title = f"One layer, (B, S, I = H) = {(batch, steps, dims)}"
        table(title, recurrent_layers(batch, steps, dims, args.seconds), "MinGRU")
    for batch, steps, features in [(8, 512, 256), (64, 1000, 100)]:
        title = f"Gates, recurrence alone, (B, S, H) = {(batch, steps, features)}"
        table(title, gates(batch, steps, features, args.seconds), "sigmoid")
    title = "Lengths from 1 to S, (B, S, I = H) = (32, 512, 256); fwd + bwd for the parameters"
    table(title, different_lengths(32, 512, 256, args.seconds), "as many unpadded steps")
    table("(B, S, C, *space) = (4, 16, 32, 64, 64), kernel 3, H = 32", convolutional(args.seconds), "nn.Conv2d")
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
