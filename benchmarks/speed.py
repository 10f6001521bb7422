"""Time of the layer and of its recurrence beside what one would use instead.

    python benchmarks/speed.py                         # tables
    python benchmarks/speed.py --sweep --plot speed.png    # time against sequence length, and the README's picture

All figures are medians of interleaved runs in one process, in milliseconds, forward in inference mode and forward +
backward for all inputs and parameters; one layer, float32 but for what says bf16.

minGRU-pytorch is the peer on PyPI, without its output projection: the same recurrence from I to H features, in log
space; its linear map has no bias, and its first state is 0 where ours is 0.5.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import compress
from pathlib import Path

import torch
from measure import where, write_json
from torch import Tensor, nn

import mingru
from mingru.bench import GRU, LINEAR, forward, forward_backward, medians_ms, output, print_table

try:
    from minGRU_pytorch import minGRU as PeerMinGRU
except ImportError:
    PeerMinGRU = None

SHAPES = [(8, 512, 256, 256), (1, 4096, 256, 256), (16, 1024, 512, 512), (64, 1000, 10, 100), (32, 64, 64, 64)]
IN_BF16 = SHAPES[:3]
BODIES = [name for name, can_run in mingru.backends().items() if can_run is True and name not in ("log", "sequential")]
LENGTHS = [2**power for power in range(4, 17)]
SLOW_MS = 3000.0
PEER = "minGRU-pytorch"
BF16 = ", bf16 autocast"
FASTEST = "fastest linear, I to 2H"
# Forward, and forward + backward, in milliseconds; None where that was not timed.
Figures = dict[str, tuple[float, float | None]]
Timer = Callable[[dict[str, Callable[[], object]]], dict[str, float]]


def layers(input_dims: int, hidden_dims: int) -> dict[str, nn.Module]:
    modules = {
        "mingru": mingru.MinGRU(input_dims, hidden_dims),
        "mingru, scripted": torch.jit.script(mingru.MinGRU(input_dims, hidden_dims)),
        LINEAR: nn.Linear(input_dims, 2 * hidden_dims),
        GRU: nn.GRU(input_dims, hidden_dims, batch_first=True),
        "nn.LSTM": nn.LSTM(input_dims, hidden_dims, batch_first=True),
    }
    if PeerMinGRU is not None:
        # It rounds input features times the factor down.
        factor = (hidden_dims + 0.5) / input_dims
        modules[PEER] = PeerMinGRU(input_dims, expansion_factor=factor, proj_out=False)
    return modules


def other_linears(x: Tensor, linear: nn.Linear) -> dict[str, Callable[[], Tensor]]:
    """The same map by other ways: the limit of any layer from I to H features in inference."""
    rows, weight, bias = x.detach().flatten(0, -2), linear.weight.detach(), linear.bias.detach()
    product = rows.new_empty(len(rows), len(weight))
    ways = {"torch.mm into given memory, no bias": lambda: torch.mm(rows, weight.t(), out=product)}
    if torch.backends.mkldnn.is_available():
        ways["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return ways


def both_ways(
    timer: Timer,
    functions: dict[str, Callable[[], Tensor]],
    leaves: dict[str, list[Tensor]],
    without_gradient: dict[str, Callable[[], Tensor]] | None = None,
) -> Figures:
    there = {name: forward(function) for name, function in {**functions, **(without_gradient or {})}.items()}
    there_ms = timer(there)
    and_back_ms = timer({name: forward_backward(function, leaves[name]) for name, function in functions.items()})
    return {name: (ms, and_back_ms.get(name)) for name, ms in there_ms.items()}


def recurrence(timer: Timer, batch: int, steps: int, hidden_dims: int) -> Figures:
    """The recurrence alone, from given pre-activations; `log` is the paper's form."""
    pre = torch.randn(batch, steps, 2 * hidden_dims, requires_grad=True)
    gate, candidate = pre.detach().chunk(2, -1)
    gate, candidate = gate.requires_grad_(), candidate.requires_grad_()

    def on(body: str) -> Callable[[], Tensor]:
        return lambda: mingru.functional.mingru(gate, candidate, backend=body)

    functions = {body: on(body) for body in [*BODIES, "log"]}
    return both_ways(timer, functions, {name: [gate, candidate] for name in functions})


def whole_layer(timer: Timer, batch: int, steps: int, input_dims: int, hidden_dims: int) -> Figures:
    x = torch.randn(batch, steps, input_dims, requires_grad=True)
    modules = layers(input_dims, hidden_dims)
    functions = {name: (lambda module=module: output(module(x))) for name, module in modules.items()}

    def on(body: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with mingru.use_backend(body):
                return output(modules["mingru"](x))

        return run

    def in_bf16(name: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return output(modules[name](x))

        return run

    functions |= {f"mingru, {body}": on(body) for body in [*BODIES, "log"]}
    if (batch, steps, input_dims, hidden_dims) in IN_BF16:
        functions |= {name + BF16: in_bf16(name) for name in ("mingru", LINEAR)}
    leaves = {name: [x, *modules.get(name.removesuffix(BF16), modules["mingru"]).parameters()] for name in functions}
    linears = other_linears(x, modules[LINEAR])
    results = both_ways(timer, functions, leaves, linears)
    fastest = min([LINEAR, *linears], key=lambda name: results[name][0])
    # In training nn.Linear is the limit.
    results[f"{FASTEST}: {fastest}"] = (results[fastest][0], None)
    return {name: taken for name, taken in results.items() if name not in linears}


def show(title: str, results: Figures, ratios: list[tuple[str, str, str]]) -> None:
    """Each ratio is its heading and what is divided by what; "it" is the row's own figure."""
    headings = ["ms, medians", "forward", "fwd + bwd"]
    for heading, _, _ in ratios:
        headings += [heading, "fwd + bwd"]
    rows = []
    for name, taken in results.items():
        known = {**results, "it": taken}
        pairs = [pair for _, top, bottom in ratios for pair in zip(known[top], known[bottom], strict=True)]
        figures = [*taken, *(None if None in pair else pair[0] / pair[1] for pair in pairs)]
        rows.append([name, *("" if figure is None else f"{figure:.2f}" for figure in figures)])
    filled = [any(column) for column in zip(*rows, strict=True)]
    print_table(title, list(compress(headings, filled)), [list(compress(row, filled)) for row in rows])


def show_layer(title: str, results: Figures) -> None:
    fastest = next(name for name in results if name.startswith(FASTEST))
    in_bf16 = {name: taken for name, taken in results.items() if name.endswith(BF16)}
    in_float32 = {name: taken for name, taken in results.items() if name not in in_bf16}
    ratios = [(f"{GRU} / it", GRU, "it"), ("it / nn.Linear", "it", LINEAR), ("it / fastest linear", "it", fastest)]
    show(title, in_float32, ratios)
    if in_bf16:
        beside = {"mingru": results["mingru"], **in_bf16}
        show(f"{title}, under autocast", beside, [("mingru / it", "mingru", "it")])


def sweep_at(steps: int, hidden_dims: int) -> dict[str, Callable[[], object]]:
    x = torch.randn(1, steps, hidden_dims, requires_grad=True)
    modules = layers(hidden_dims, hidden_dims)
    del modules["mingru, scripted"]

    def log_space() -> Tensor:
        with mingru.use_backend("log"):
            return output(modules["mingru"](x))

    functions = {name: (lambda module=module: output(module(x))) for name, module in modules.items()}
    functions["minGRU in log space (the paper's form)"] = log_space
    return {
        name: forward_backward(function, [x, *modules.get(name, modules["mingru"]).parameters()])
        for name, function in functions.items()
    }


def sweep(timer: Timer, hidden_dims: int) -> dict[str, dict[int, float]]:
    """Forward + backward against length, batch 1; whoever gets slow drops out."""
    taken: dict[str, dict[int, float]] = {}
    for steps in LENGTHS:
        calls = sweep_at(steps, hidden_dims)
        calls = {name: call for name, call in calls.items() if max(taken.get(name, {0: 0.0}).values()) < SLOW_MS}
        now = timer(calls)
        for name, ms in now.items():
            taken.setdefault(name, {})[steps] = ms
        print(steps, {name: round(ms, 3) for name, ms in now.items()}, flush=True)
    return taken


def plot(taken: dict[str, dict[int, float]], hidden_dims: int, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"mingru": "#0b6e4f", GRU: "#c1121f", "nn.LSTM": "#e07a1f", LINEAR: "#8d99ae", PEER: "#b5179e"}
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, by_steps in taken.items():
        ours = name == "mingru"
        label = "mingru.MinGRU" if ours else name
        style = {"linewidth": 3.0, "zorder": 3} if ours else {"linewidth": 1.6}
        dashes = "--" if name == LINEAR else "-"
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
    parser.add_argument(
        "--shape",
        type=int,
        nargs=4,
        action="append",
        metavar=("B", "S", "I", "H"),
        help="one of the tables' shapes; may be given again (default: five shapes)",
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each set of calls (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of it at the least (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(where())
    if PeerMinGRU is None:
        print(f"{PEER} is not installed: its rows are left out")
    timer = partial(medians_ms, seconds=args.seconds, least=args.rounds)
    if args.sweep or args.plot:
        results: object = sweep(timer, args.hidden_dims)
        if args.plot:
            plot(results, args.hidden_dims, args.plot)
    else:
        results = {}
        for batch, steps, input_dims, hidden_dims in args.shape or SHAPES:
            title = f"(B, S, H) = {(batch, steps, hidden_dims)}: the recurrence, from given pre-activations"
            results[title] = recurrence(timer, batch, steps, hidden_dims)
            show(title, results[title], [("log / it", "log", "it")])
            title = f"(B, S, I, H) = {(batch, steps, input_dims, hidden_dims)}: the whole layer"
            results[title] = whole_layer(timer, batch, steps, input_dims, hidden_dims)
            show_layer(title, results[title])
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
