"""Time MinGRU and its recurrence, and compare them with nn.GRU, nn.LSTM, nn.Linear and other packages.

    python benchmarks/speed.py                             # tables
    python benchmarks/speed.py --sweep --plot speed.png    # time by sequence length, and the README's picture
    python benchmarks/speed.py --ratios                    # time relative to MinGRU by shape, the README's table
    python benchmarks/speed.py --page                      # the same by batch, length, width and threads; writes them
                                                           # into docs/speed.md and docs/speed.json, in 5 minutes

Times are medians of interleaved runs in one process, in milliseconds, of one layer. Forward is timed in inference mode.
Forward + backward includes the gradients of all inputs and parameters. The dtype is float32 unless a name says bf16.

minGRU-pytorch is another package on PyPI. Without its output projection it computes the same recurrence from I to H
features, in log space. Its linear map has no bias, and its initial state is 0 instead of 0.5. mingru-scans computes it
in log space too. It is imported as `mingru`, so install it in a folder of its own, and name this folder:

    pip install --no-deps --target out/scans mingru-scans==0.2.0
    python benchmarks/speed.py --page --scans out/scans
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from measure import add_shape_option, where, write_json
from torch import Tensor, nn

import mingru
from mingru import bench
from mingru.bench import GRU, LINEAR, forward, forward_backward, medians_ms, output, print_table

try:
    from minGRU_pytorch import minGRU as PeerMinGRU
except ImportError:
    PeerMinGRU = None

SHAPES = [(8, 512, 256, 256), (1, 4096, 256, 256), (16, 1024, 512, 512), (64, 1000, 10, 100), (32, 64, 64, 64)]
IN_BF16 = SHAPES[:3]
RATIO_SHAPES = [
    (1, 256, 256, 256),
    (1, 4096, 256, 256),
    (1, 4096, 64, 64),
    (8, 512, 256, 256),
    (16, 1024, 512, 512),
    (32, 1024, 128, 128),
    (64, 1000, 10, 100),
    (128, 32, 128, 128),
]
# One shape, and others that differ in batch, steps or features.
PAGE_SHAPES = [
    (8, 512, 128, 128),
    (1, 512, 128, 128),
    (64, 512, 128, 128),
    (8, 1, 128, 128),
    (8, 16, 128, 128),
    (8, 64, 128, 128),
    (8, 4096, 128, 128),
    (8, 512, 32, 32),
    (8, 512, 512, 512),
]
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
MARKS = ("<!-- tables -->", "<!-- end of tables -->")
BACKENDS = [
    name for name, can_run in mingru.backends().items() if can_run is True and name not in ("log", "sequential")
]
LENGTHS = [2**power for power in range(4, 17)]
SLOW_MS = 3000.0
PEER, SCANS = "minGRU-pytorch", "mingru-scans"
BF16 = ", bf16 autocast"
FASTEST = "fastest linear, I to 2H"
# Milliseconds of forward, and of forward + backward or None if only forward was timed.
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
        # minGRU-pytorch rounds input_dims * factor down.
        factor = (hidden_dims + 0.5) / input_dims
        modules[PEER] = PeerMinGRU(input_dims, expansion_factor=factor, proj_out=False)
    return modules


def other_linears(x: Tensor, linear: nn.Linear) -> dict[str, Callable[[], Tensor]]:
    """Return other ways to compute the linear map; in inference, no such layer can be faster than the fastest way."""
    flat, weight, bias = x.detach().flatten(0, -2), linear.weight.detach(), linear.bias.detach()
    out = flat.new_empty(len(flat), len(weight))
    ways = {"torch.mm with out=, no bias": lambda: torch.mm(flat, weight.t(), out=out)}
    if torch.backends.mkldnn.is_available():
        ways["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return ways


def time_both(
    timer: Timer,
    functions: dict[str, Callable[[], Tensor]],
    leaves: dict[str, list[Tensor]],
    forward_only: dict[str, Callable[[], Tensor]] | None = None,
) -> Figures:
    every = {**functions, **(forward_only or {})}
    forward_ms = timer({name: forward(function) for name, function in every.items()})
    both_ms = timer({name: forward_backward(function, leaves[name]) for name, function in functions.items()})
    return {name: (ms, both_ms.get(name)) for name, ms in forward_ms.items()}


def recurrence(timer: Timer, batch: int, steps: int, hidden_dims: int) -> Figures:
    """Time the recurrence from given pre-activations; "log" is the paper's log-space version."""
    pre = torch.randn(batch, steps, 2 * hidden_dims, requires_grad=True)
    gate, candidate = pre.detach().chunk(2, -1)
    gate, candidate = gate.requires_grad_(), candidate.requires_grad_()

    def on(backend: str) -> Callable[[], Tensor]:
        return lambda: mingru.functional.mingru(gate, candidate, backend=backend)

    functions = {backend: on(backend) for backend in [*BACKENDS, "log"]}
    return time_both(timer, functions, {name: [gate, candidate] for name in functions})


def whole_layer(timer: Timer, batch: int, steps: int, input_dims: int, hidden_dims: int) -> Figures:
    x = torch.randn(batch, steps, input_dims, requires_grad=True)
    modules = layers(input_dims, hidden_dims)
    functions = {name: (lambda module=module: output(module(x))) for name, module in modules.items()}

    def on(backend: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with mingru.use_backend(backend):
                return output(modules["mingru"](x))

        return run

    def in_bf16(name: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return output(modules[name](x))

        return run

    functions |= {f"mingru, {backend}": on(backend) for backend in [*BACKENDS, "log"]}
    if (batch, steps, input_dims, hidden_dims) in IN_BF16:
        functions |= {name + BF16: in_bf16(name) for name in ("mingru", LINEAR)}
    leaves = {name: [x, *modules.get(name.removesuffix(BF16), modules["mingru"]).parameters()] for name in functions}
    linears = other_linears(x, modules[LINEAR])
    results = time_both(timer, functions, leaves, linears)
    fastest = min([LINEAR, *linears], key=lambda name: results[name][0])
    # The other ways have no gradient, so in training nn.Linear is the bound.
    results[f"{FASTEST}: {fastest}"] = (results[fastest][0], None)
    return {name: times for name, times in results.items() if name not in linears}


def show(title: str, results: Figures, ratios: list[tuple[str, str, str]]) -> None:
    """Print a table; each ratio is (heading, dividend, divisor), where "row" is the row's own figure."""
    headings = ["ms, medians", "forward", "fwd + bwd"]
    for heading, _, _ in ratios:
        headings += [heading, "fwd + bwd"]
    rows = []
    for name, times in results.items():
        known = {**results, "row": times}
        pairs = [pair for _, top, bottom in ratios for pair in zip(known[top], known[bottom], strict=True)]
        figures = [*times, *(None if None in pair else pair[0] / pair[1] for pair in pairs)]
        rows.append([name, *("" if figure is None else f"{figure:.2f}" for figure in figures)])
    filled = [any(column) for column in zip(*rows, strict=True)]
    print_table(title, list(compress(headings, filled)), [list(compress(row, filled)) for row in rows])


def show_layer(title: str, results: Figures) -> None:
    fastest = next(name for name in results if name.startswith(FASTEST))
    in_bf16 = {name: times for name, times in results.items() if name.endswith(BF16)}
    in_float32 = {name: times for name, times in results.items() if name not in in_bf16}
    ratios = [
        (f"speed-up over {GRU}", GRU, "row"),
        ("relative to nn.Linear", "row", LINEAR),
        ("relative to fastest linear", "row", fastest),
    ]
    show(title, in_float32, ratios)
    if in_bf16:
        compared = {"mingru": results["mingru"], **in_bf16}
        show(f"{title}, under autocast", compared, [("speed-up over mingru", "mingru", "row")])


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
    """Time forward + backward by length, batch 1; methods that become too slow are left out for longer sequences."""
    times: dict[str, dict[int, float]] = {}
    for steps in LENGTHS:
        calls = sweep_at(steps, hidden_dims)
        calls = {name: call for name, call in calls.items() if max(times.get(name, {0: 0.0}).values()) < SLOW_MS}
        now = timer(calls)
        for name, ms in now.items():
            times.setdefault(name, {})[steps] = ms
        print(steps, {name: round(ms, 3) for name, ms in now.items()}, flush=True)
    return times


def ratios(shapes: list[tuple[int, ...]], seconds: float) -> dict[str, dict[str, float]]:
    """Print how many times as long a training step of other layers takes, as a Markdown table by shape."""
    print(f"\n| (B, S, I, H) | MinGRU | {GRU} | nn.LSTM | {LINEAR} |\n| --- | --- | --- | --- | --- |")
    results = {}
    for shape in shapes:
        training_ms = {name: taken[1] for name, taken in bench.whole_layer(shape, "cpu", seconds).items()}
        relative = [training_ms[name] / training_ms["mingru"] for name in (GRU, "nn.LSTM", LINEAR)]
        cells = (f"{ratio:.0f} ×" if ratio >= 10 else f"{ratio:.2g} ×" for ratio in relative)
        print(f"| {shape} | {training_ms['mingru']:.3g} ms |", " | ".join(cells), "|", flush=True)
        results[str(shape)] = training_ms
    return results


def scans_of(folder: Path) -> Any:
    """Return the module of mingru-scans that pip installed in `folder`, under another name than `mingru`."""
    spec = importlib.util.spec_from_file_location("scans", folder / "mingru" / "min_gru.py")
    scans = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scans)
    return scans


def by_threads(
    timer: Timer, shapes: list[tuple[int, ...]], numbers: list[int], scans: Any
) -> dict[str, dict[str, Figures]]:
    """Time forward, and forward + backward, of one layer of each class, by number of threads and shape."""
    results: dict[str, dict[str, Figures]] = {}
    for threads in numbers:
        torch.set_num_threads(threads)
        of_shapes = results[str(threads)] = {}
        for batch, steps, input_dims, hidden_dims in shapes:
            modules = layers(input_dims, hidden_dims)
            del modules["mingru, scripted"]
            if scans is not None:
                modules[SCANS] = scans.MinGRU(input_dims, hidden_dims)
            x = torch.randn(batch, steps, input_dims, requires_grad=True)
            functions = {name: (lambda module=module, x=x: output(module(x))) for name, module in modules.items()}
            leaves = {name: [x, *module.parameters()] for name, module in modules.items()}
            shape = str((batch, steps, input_dims, hidden_dims))
            of_shapes[shape] = time_both(timer, functions, leaves)
            print(threads, shape, {name: f"{both:.3g}" for name, (_, both) in of_shapes[shape].items()}, flush=True)
    return results


def tables(record: dict[str, Any]) -> str:
    """Return the tables of docs/speed.md from what docs/speed.json has."""
    where, versions = record["where"], record["results"]["versions"]
    machine = f"{where['cores']} cores of {where['processor']} with {where['instructions']}, torch {where['torch']}"
    others = "".join(f", {name} {version}" for name, version in versions.items())
    load = record["results"]["load"]
    lines = [f"{machine}{others}.", f"The load average before the run was {load:.1f}."]
    if load > where["cores"]:
        lines += ["Other programs ran at the same time, so these ratios are rough."]
    for column, title in ((1, "A training step"), (0, "Forward, without gradients")):
        for threads, by_shape in record["results"]["times"].items():
            names = [name for name in next(iter(by_shape.values())) if name != "mingru"]
            lines += ["", f"{title}, {threads} thread{'s' * (threads != '1')}:", ""]
            headings = " | ".join(name.removesuffix("(I, 2H)") for name in names)
            lines += [f"| B, S, H | MinGRU, ms | {headings} |", "| --- " * (len(names) + 2) + "|"]
            for shape, figures in by_shape.items():
                batch, steps, input_dims, hidden_dims = json.loads(f"[{shape[1:-1]}]")
                features = hidden_dims if input_dims == hidden_dims else f"{input_dims} to {hidden_dims}"
                base = figures["mingru"][column]
                cells = [as_ratio(figures[name][column] / base) for name in names]
                lines.append(f"| {batch}, {steps}, {features} | {base:.3g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def as_ratio(ratio: float) -> str:
    """Return a ratio as the page shows it, in bold if the other layer is faster than MinGRU."""
    text = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"
    return f"**{text}**" if ratio < 1 else text


def write_page(page: Path, text: str) -> None:
    """Replace what is between the marks of the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    page.write_text(f"{before}{MARKS[0]}\n\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def plot(times: dict[str, dict[int, float]], hidden_dims: int, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"mingru": "#0b6e4f", GRU: "#c1121f", "nn.LSTM": "#e07a1f", LINEAR: "#8d99ae", PEER: "#b5179e"}
    figure, axes = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
    for name, by_steps in times.items():
        is_mingru = name == "mingru"
        label = "mingru.MinGRU" if is_mingru else name
        style = {"linewidth": 3.0, "zorder": 3} if is_mingru else {"linewidth": 1.6}
        dashes = "--" if name == LINEAR else "-"
        axes.loglog(
            list(by_steps), list(by_steps.values()), dashes, color=colors.get(name, "#5a4fcf"), label=label, **style
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("sequence length (steps)")
    axes.set_ylabel("forward + backward (ms)")
    axes.set_title(f"One layer, batch 1, {hidden_dims} features, {torch.get_num_threads()} CPU threads")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def page(parser: argparse.ArgumentParser, args: argparse.Namespace, timer: Timer) -> None:
    """Write docs/speed.json and the tables of docs/speed.md; with --json, only this file."""
    load = os.getloadavg()[0]
    versions = {} if PeerMinGRU is None else {PEER: importlib.metadata.version(PEER)}
    if args.scans:
        found = next(importlib.metadata.distributions(name=SCANS, path=[str(args.scans)]), None)
        if found is None:
            fix = f"run pip install --no-deps --target {args.scans} {SCANS}"
            parser.error(f"--scans must be a folder with {SCANS}, got {args.scans}; {fix}")
        versions[SCANS] = found.version
    shapes = [tuple(shape) for shape in args.shape or PAGE_SHAPES]
    times = by_threads(timer, shapes, sorted({1, args.threads}), scans_of(args.scans) if args.scans else None)
    path = args.json or PAGE.with_suffix(".json")
    write_json(path, {"load": load, "versions": versions, "times": times})
    text = tables(json.loads(path.read_text(encoding="utf-8")))
    print(text)
    if not args.json:
        write_page(PAGE, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--sweep", action="store_true", help="print times by sequence length instead of the tables")
    parser.add_argument("--hidden-dims", type=int, default=256, help="features in the sweep (default: %(default)s)")
    parser.add_argument("--ratios", action="store_true", help="print times relative to MinGRU instead of the tables")
    parser.add_argument(
        "--page",
        action="store_true",
        help="print times by shape, with one thread and with --threads, and write docs/speed.md",
    )
    parser.add_argument("--scans", type=Path, help="folder in which pip has installed mingru-scans, for --page")
    parser.add_argument("--plot", type=Path, help="plot the sweep to this file; implies --sweep")
    add_shape_option(parser, "five shapes")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each set of calls (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="minimum rounds of these calls (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(where())
    if PeerMinGRU is None:
        print(f"{PEER} is not installed, so its rows are left out")
    timer = partial(medians_ms, seconds=args.seconds, least=args.rounds)
    if args.page:
        page(parser, args, timer)
        return
    if args.sweep or args.plot:
        results: object = sweep(timer, args.hidden_dims)
        if args.plot:
            plot(results, args.hidden_dims, args.plot)
    elif args.ratios:
        results = ratios([tuple(shape) for shape in args.shape or RATIO_SHAPES], args.seconds)
    else:
        results = {}
        for batch, steps, input_dims, hidden_dims in args.shape or SHAPES:
            title = f"(B, S, H) = {(batch, steps, hidden_dims)}: the recurrence, from given pre-activations"
            results[title] = recurrence(timer, batch, steps, hidden_dims)
            show(title, results[title], [("speed-up over log", "log", "row")])
            title = f"(B, S, I, H) = {(batch, steps, input_dims, hidden_dims)}: the whole layer"
            results[title] = whole_layer(timer, batch, steps, input_dims, hidden_dims)
            show_layer(title, results[title])
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
