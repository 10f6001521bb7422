"""Time of the layer and of its recurrence beside what one would use instead.

    python benchmarks/speed.py                         # tables
    python benchmarks/speed.py --sweep --plot speed.png    # time against sequence length, and the README's picture

All figures are medians of interleaved runs in one process, in milliseconds, forward in inference mode and forward +
backward for all inputs and parameters; one layer, float32.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from measure import where, write_json
from torch import nn

import mingru
from mingru.bench import forward, forward_backward, medians_ms, output, print_table

SHAPES = [(8, 512, 256, 256), (1, 4096, 256, 256), (16, 1024, 512, 512), (64, 1000, 10, 100), (32, 64, 64, 64)]
BODIES = [name for name, can_run in mingru.backends().items() if can_run is True and name not in ("log", "sequential")]
LENGTHS = [2**power for power in range(4, 17)]
SLOW_MS = 3000.0


def layers(input_dims: int, hidden_dims: int) -> dict[str, nn.Module]:
    return {
        "mingru": mingru.MinGRU(input_dims, hidden_dims),
        "mingru, scripted": torch.jit.script(mingru.MinGRU(input_dims, hidden_dims)),
        "nn.Linear(I, 2H)": nn.Linear(input_dims, 2 * hidden_dims),
        "nn.GRU": nn.GRU(input_dims, hidden_dims, batch_first=True),
        "nn.LSTM": nn.LSTM(input_dims, hidden_dims, batch_first=True),
    }


def both_ways(
    functions: dict[str, Callable[[], torch.Tensor]], leaves: dict[str, list[torch.Tensor]]
) -> dict[str, tuple[float, float]]:
    there = medians_ms({name: forward(function) for name, function in functions.items()})
    and_back = medians_ms({name: forward_backward(function, leaves[name]) for name, function in functions.items()})
    return {name: (there[name], and_back[name]) for name in functions}


def recurrence(batch: int, steps: int, hidden_dims: int) -> dict[str, tuple[float, float]]:
    """The recurrence alone, from given pre-activations; `log` is the paper's form."""
    pre = torch.randn(batch, steps, 2 * hidden_dims, requires_grad=True)
    gate, candidate = pre.detach().chunk(2, -1)
    gate, candidate = gate.requires_grad_(), candidate.requires_grad_()

    def on(body: str) -> Callable[[], torch.Tensor]:
        return lambda: mingru.functional.mingru(gate, candidate, backend=body)

    functions = {body: on(body) for body in [*BODIES, "log"]}
    return both_ways(functions, {name: [gate, candidate] for name in functions})


def whole_layer(batch: int, steps: int, input_dims: int, hidden_dims: int) -> dict[str, tuple[float, float]]:
    x = torch.randn(batch, steps, input_dims, requires_grad=True)
    modules = layers(input_dims, hidden_dims)
    functions = {name: (lambda module=module: output(module(x))) for name, module in modules.items()}
    for body in [*BODIES, "log"]:

        def on(body: str = body) -> torch.Tensor:
            with mingru.use_backend(body):
                return output(modules["mingru"](x))

        functions[f"mingru, {body}"] = on
    leaves = {name: [x, *modules[name if name in modules else "mingru"].parameters()] for name in functions}
    return both_ways(functions, leaves)


def show(title: str, results: dict[str, tuple[float, float]], against: str) -> None:
    columns = ["ms, medians", "forward", "fwd + bwd", f"{against} / it", "both ways"]
    rows = []
    for name, taken in results.items():
        ratios = [base / ms for base, ms in zip(results[against], taken, strict=True)]
        rows.append([name, *(f"{ms:.2f}" for ms in taken), *(f"{ratio:.2f}" for ratio in ratios)])
    print_table(title, columns, rows)


def sweep_at(steps: int, hidden_dims: int) -> dict[str, Callable[[], object]]:
    x = torch.randn(1, steps, hidden_dims, requires_grad=True)
    modules = layers(hidden_dims, hidden_dims)
    del modules["mingru, scripted"]

    def log_space() -> torch.Tensor:
        with mingru.use_backend("log"):
            return output(modules["mingru"](x))

    functions = {name: (lambda module=module: output(module(x))) for name, module in modules.items()}
    functions["minGRU in log space (the paper's form)"] = log_space
    return {
        name: forward_backward(function, [x, *modules.get(name, modules["mingru"]).parameters()])
        for name, function in functions.items()
    }


def sweep(hidden_dims: int) -> dict[str, dict[int, float]]:
    """Forward + backward against length, batch 1; whoever gets slow drops out."""
    taken: dict[str, dict[int, float]] = {}
    for steps in LENGTHS:
        calls = sweep_at(steps, hidden_dims)
        calls = {name: call for name, call in calls.items() if max(taken.get(name, {0: 0.0}).values()) < SLOW_MS}
        now = medians_ms(calls, seconds=2.0, least=3)
        for name, ms in now.items():
            taken.setdefault(name, {})[steps] = ms
        print(steps, {name: round(ms, 3) for name, ms in now.items()}, flush=True)
    return taken


def plot(taken: dict[str, dict[int, float]], hidden_dims: int, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"mingru": "#0b6e4f", "nn.GRU": "#c1121f", "nn.LSTM": "#e07a1f", "nn.Linear(I, 2H)": "#8d99ae"}
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, by_steps in taken.items():
        ours = name == "mingru"
        label = "mingru.MinGRU" if ours else name
        style = {"linewidth": 3.0, "zorder": 3} if ours else {"linewidth": 1.6}
        dashes = "--" if name.startswith("nn.Linear") else "-"
        axes.loglog(
            list(by_steps), list(by_steps.values()), dashes, color=colours.get(name, "#5a4fcf"), label=label, **style
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("sequence length (steps)")
    axes.set_ylabel("forward + backward (ms)")
    axes.set_title(f"One layer, batch 1, {hidden_dims} features, float32, {torch.get_num_threads()} CPU threads")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--sweep", action="store_true", help="time against sequence length instead of the tables")
    parser.add_argument("--hidden-dims", type=int, default=256, help="features in the sweep (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="draw the sweep into this file")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(where())
    if args.sweep or args.plot:
        results: object = sweep(args.hidden_dims)
        if args.plot:
            plot(results, args.hidden_dims, args.plot)
    else:
        results = {}
        for batch, steps, input_dims, hidden_dims in SHAPES:
            title = f"(B, S, H) = {(batch, steps, hidden_dims)}: the recurrence, from given pre-activations"
            results[title] = recurrence(batch, steps, hidden_dims)
            show(title, results[title], "log")
            title = f"(B, S, I, H) = {(batch, steps, input_dims, hidden_dims)}: the whole layer"
            results[title] = whole_layer(batch, steps, input_dims, hidden_dims)
            show(title, results[title], "nn.GRU")
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
