"""Time layers, cells and models, and compare them with torch's, with linear maps and with other packages.

    pip install ".[bench]"                                 # in a clone of the repository
    python benchmarks/speed.py                             # one layer and its recurrence, by shape
    python benchmarks/speed.py products deploy               # other groups of tables, which --help lists
    python benchmarks/speed.py --gru 64 128 256 512        # nn.GRU and nn.LSTM as they are, and accelerated, by shape
    python benchmarks/speed.py --rules 600                 # the rules by which drop_in uses kernels, on random sizes
    python benchmarks/speed.py --sweep --plot speed.png    # time by sequence length, and the README's picture
    python benchmarks/speed.py --page                      # time relative to MinGRU by shape and threads, in 8
                                                           # minutes; writes docs/speed.md and docs/speed.json

Times are medians of interleaved runs in one process, in milliseconds. Forward is timed in inference mode. Forward +
backward includes the gradients of all inputs and parameters. The dtype is float32 unless a name says bf16.

minGRU-pytorch is another package on PyPI. Without its output projection it computes the same recurrence from I to H
features, in log space. Its linear map has no bias, and its initial state is 0 instead of 0.5.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import random
import tempfile
import time
import warnings
from copy import deepcopy
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import measure
import torch
from measure import GRU, LINEAR, add_json, markdown, plain_layers, where, write_json
from minGRU_pytorch import minGRU
from torch import nn
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import mingru
from mingru import drop_in
from mingru.bench import forward, forward_backward, medians_ms, output, print_table

SHAPES = [(8, 512, 256, 256), (1, 4096, 256, 256), (16, 1024, 512, 512), (64, 1000, 10, 100), (32, 64, 64, 64)]
# Of the model that docs/choosing.md begins with. The last are short.
BATCHES = [(1, 200), (8, 128), (32, 100), (64, 64)]
EQUAL_SHAPES = [(*each, 32, dims) for dims in (64, 128, 256, 512) for each in BATCHES]
EQUAL_SHAPES += [(32, 29, 12, 32), (64, 8, 16, 32), (16, 20, 8, 64)]
# One shape, and others that differ in batch, steps or features.
PAGE_SHAPES = [(batch, 512, 128, 128) for batch in (8, 1, 64)] + [(8, steps, 128, 128) for steps in (1, 16, 64, 4096)]
PAGE_SHAPES += [(8, 512, dims, dims) for dims in (32, 512)]
# Rows, features, columns.
PRODUCTS = [(4096, 256, 512), (2048, 512, 1024), (2048, 64, 128), (2048, 10, 200), (64, 256, 512), (8, 256, 512)]
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
ROUNDED, MORE = PAGE.with_name("speed_bfloat16.json"), PAGE.parent / "more" / "bfloat16.md"
BACKENDS = [name for name, can_run in mingru.backends().items() if can_run is True and name != "sequential"]
LENGTHS = [2**power for power in range(4, 17)]
BATCH, FEATURES, SLOW_MS = 8, 256, 3000.0
PEER, START, MIXED, BLOCKS = "minGRU-pytorch", "mingru.GRU", 'MinGRU, gate="mixed"', "blocks of 64"
# Left out where models have two layers, and what these are compared with.
OF_ONE, OTHERS = (PEER, "mingru", LINEAR), (GRU, "nn.LSTM", BLOCKS, MIXED)
OF_TORCH, FLOAT32 = OTHERS[:2], "mingru.GRU in float32"


class Table(NamedTuple):
    """What is timed together."""

    title: str
    calls: dict
    """Functions without arguments, by name. They return a layer's result."""
    leaves: dict | None = None
    """Tensors whose gradients are computed, by the names of the functions that are timed in training too."""
    baselines: tuple = ()
    """Names whose time is divided by; by default, the first name."""
    plain: bool = False
    """Whether functions are called as they are, not in inference mode."""


def values(result):
    out = output(result)
    return out.data if isinstance(out, PackedSequence) else out


def time_both(timer, table):
    """Return milliseconds of forward and of forward + backward or None, by name."""
    functions = {name: (lambda call=call: values(call())) for name, call in table.calls.items()}
    training = {name: forward_backward(functions[name], leaves) for name, leaves in (table.leaves or {}).items()}
    both_ms = timer(training) if training else {}
    forward_ms = timer(table.calls if table.plain else {name: forward(each) for name, each in functions.items()})
    return {name: (ms, both_ms.get(name)) for name, ms in forward_ms.items()}


def run(table, timer):
    """Time a table and print it."""
    columns = ["forward", "fwd + bwd"] if table.leaves else ["median ms"]
    figures = {name: taken[: len(columns)] for name, taken in time_both(timer, table).items()}
    baselines = table.baselines or (next(iter(table.calls)),)
    rows = []
    for name, taken in figures.items():
        pairs = [pair for each in baselines for pair in zip(taken, figures[each], strict=True)]
        ratios = [f"{ms / base:.2f}" if ms and base else "" for ms, base in pairs]
        rows.append([name, *(f"{ms:.4g}" if ms else "" for ms in taken), *ratios])
    headings = [*columns, *(f"{column} / {name}" for name in baselines for column in columns)]
    print_table(table.title, ["", *headings], rows)
    return figures


def of_modules(title, x, modules, *baselines, calls=None):
    """Return the table of modules that are called with x."""
    calls = calls or {name: partial(module, x) for name, module in modules.items()}
    return Table(title, calls, {name: [x, *module.parameters()] for name, module in modules.items()}, baselines)


def layers(input_dims, hidden_dims):
    # minGRU-pytorch rounds input_dims * factor down.
    peer = minGRU(input_dims, expansion_factor=(hidden_dims + 0.5) / input_dims, proj_out=False)
    return {**plain_layers(input_dims, hidden_dims), PEER: peer}


def within(context, call):
    """Return the call within a context that is made for each call."""

    def run(*args):
        with context():
            return call(*args)

    return run


def products_of(x, weight, bias=None):
    """Return the ways to compute a linear map, apart from nn.Linear."""
    calls = {"torch.mm": partial(torch.mm, x, weight.t(), out=x.new_empty(0))}
    if torch.backends.mkldnn.is_available():
        calls["oneDNN"] = partial(torch.ops.mkldnn._linear_pointwise, x, weight, bias, "none", [], "")
    return calls


def one_layer(args):
    """one layer and its recurrence, with torch's layers, other backends and minGRU-pytorch"""
    for batch, steps, input_dims, hidden_dims in args.shape or SHAPES:
        pair = [torch.randn(batch, steps, hidden_dims, requires_grad=True) for _ in range(2)]
        calls = {name: partial(mingru.functional.mingru, *pair, backend=name) for name in BACKENDS}
        title = f"(B, S, H) = {(batch, steps, hidden_dims)}: the recurrence, from given pre-activations"
        yield Table(title, calls, dict.fromkeys(calls, pair), ("log",))
        x, modules = torch.randn(batch, steps, input_dims, requires_grad=True), layers(input_dims, hidden_dims)
        modules["mingru, scripted"] = torch.jit.script(modules["mingru"])
        calls = {name: partial(module, x) for name, module in modules.items()}
        for name in BACKENDS:
            calls[f"mingru, {name}"] = within(partial(mingru.use_backend, name), calls["mingru"])
        leaves = {name: [x, *modules.get(name, modules["mingru"]).parameters()] for name in calls}
        # In inference, no layer can be faster than the fastest way to compute its linear map.
        calls |= products_of(x.detach().flatten(0, 1), modules[LINEAR].weight.detach(), modules[LINEAR].bias.detach())
        title = f"(B, S, I, H) = {(batch, steps, input_dims, hidden_dims)}: the whole layer"
        yield Table(title, calls, leaves, (GRU, LINEAR))


def products(args):
    """the three products of a linear map, by torch (MKL on x86), by oneDNN and by this library

    With MINGRU_PRODUCT=mingru, the product of this library where torch's is the default.
    """
    for rows, features, columns in PRODUCTS:
        x, weight, grad = torch.randn(rows, features), torch.randn(columns, features), torch.randn(rows, columns)
        factors = {"forward": (x, weight.t()), "gradient of x": (grad, weight), "of the weight": (grad.t(), x)}
        for name, (left, right) in factors.items():
            calls = products_of(left, right.t()) | {"mingru": partial(torch.ops.mingru.multiply, left, right, None)}
            yield Table(f"{(rows, features, columns)}, {name}", calls)


def deploy(args):
    """exported models of two layers in ONNX Runtime, with their state as input and output, with an exported nn.GRU

    The batch size is dynamic; in files for sequences the length is dynamic too, up to that of the shape. Each call
    allocates its outputs. If ExecuTorch is installed, it runs single steps, and sequences, except of nn.GRU.
    """
    import onnxruntime

    has_executorch = bool(find_spec("executorch") and import_module("executorch.exir"))
    for shape in args.shape or [(1, 1, 256, 256), (1, 512, 256, 256), (8, 512, 256, 256)]:
        options = {"num_layers": 2, "norm": "rms", "residual": True}
        modules = {GRU: nn.GRU(*shape[2:], 2, batch_first=True), "MinGRU": mingru.MinGRU(*shape[2:], **options)}
        modules |= {"MinGRU, mixed": mingru.MinGRU(*shape[2:], **options, gate="mixed")}
        modules |= {"mingru.GRU": mingru.GRU(*shape[2:], num_layers=2)}
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: Path(folder, f"{name}.onnx") for name in modules}
            rows, methods = [], {}
            for name, module in modules.items():
                given, sizes = example(name, 2, min(shape[1], 20), *shape[2:]), {0: Dim.AUTO}
                if shape[1] > 1 and name != GRU:
                    # Not `Dim.AUTO(max=)`, whose maximum the capture does not know.
                    sizes[1] = Dim("steps", max=shape[1])
                seconds = [processor_seconds(export, name, module, shape, paths[name])[0]]
                with torch.no_grad():
                    capture = partial(torch.export.export, module.eval(), given, dynamic_shapes=(sizes, {1: Dim.AUTO}))
                    more, program = processor_seconds(capture)
                    seconds += [more, processor_seconds(torch._inductor.aoti_compile_and_package, program)[0]]
                    if has_executorch and (shape[1] == 1 or name != GRU):
                        more, call = processor_seconds(in_executorch, name, module, shape, folder)
                        seconds, methods[f"{name} in ExecuTorch"] = [*seconds, more], call
                cells = [f"{each:.1f}" for each in seconds]
                rows.append([name, f"{paths[name].stat().st_size / 1000:.0f}", *cells, *[""] * (4 - len(cells))])
            columns = ["", "kB of ONNX", "processor seconds of ONNX", "torch.export", "then AOTInductor", "ExecuTorch"]
            print_table(f"(B, S, I, H) = {shape}, exported", columns, rows)
            for threads in (1, 2):
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
                # Otherwise the threads of a session keep spinning while another session is timed.
                options.add_session_config_entry("session.force_spinning_stop", "1")
                options.log_severity_level = 3
                calls = {}
                for name, module in modules.items():
                    given, runs = example(name, *shape), onnxruntime.InferenceSession(paths[name], options)
                    named = {each.name: x.numpy() for each, x in zip(runs.get_inputs(), given, strict=True)}
                    calls[name] = partial(runs.run, None, named)
                    # Timing a wrong result is meaningless.
                    with torch.no_grad():
                        expected = output(module(*given))
                    torch.testing.assert_close(torch.from_numpy(calls[name]()[0]), expected, rtol=1e-4, atol=1e-5)
                table = f"(B, S, I, H) = {shape}, ONNX Runtime, threads: {threads}"
                yield Table(table, calls | (methods if threads == 1 else {}), plain=True)


def processor_seconds(function, *args, **kwargs):
    """Return how long a call took, and its result."""
    start = time.process_time()
    result = function(*args, **kwargs)
    return time.process_time() - start, result


def in_executorch(name, module, shape, folder):
    """Export a module to the portable operators of ExecuTorch, and return a function that runs it."""
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    given, path = [*example(name, *shape)], f"{folder}/{name}.pte"
    sizes = {} if shape[1] == 1 else {1: Dim("steps", max=shape[1])}
    program = torch.export.export(module, tuple(given), dynamic_shapes=(sizes, None))
    to_edge_transform_and_lower(program).to_executorch().save(path)
    return partial(Runtime.get().load_program(path).load_method("forward").execute, given)


def example(name, batch, count, input_dims, hidden_dims):
    """Return x and h for the module of this name."""
    state = (2, batch, hidden_dims) if name == GRU else (2, batch, 1, hidden_dims)
    return torch.randn(batch, count, input_dims), torch.rand(state)


def export(name, module, shape, path):
    is_step, given = shape[1] == 1, example(name, 2, min(shape[1], 20), *shape[2:])
    if name != GRU:
        mingru.export.onnx(module, given, path, **({"kind": "step"} if is_step else {"max_steps": shape[1]}))
        return
    dynamic = ({0: "batch"} if is_step else {0: "batch", 1: "time"}, {1: torch.export.Dim.AUTO})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"input_names": ["x", "h"], "output_names": ["out", "h_out"], "dynamic_shapes": dynamic}
        torch.onnx.export(module.eval(), given, path, dynamo=True, external_data=False, verbose=False, **options)


def against_torch(args, timer):
    """Print times of nn.GRU / those of its weights in mingru.GRU, and of torch's layers / accelerated: two passes."""
    shapes, found = [(batch, steps) for steps in (1, 20, 200) for batch in (1, 8, 32, 64)], {}
    for dims in args.gru:
        modules = {f"nn.{kind.__name__}": kind(dims, dims, batch_first=True) for kind in (nn.GRU, nn.LSTM)}
        modules |= {f"{name}, accelerated": deepcopy(module) for name, module in modules.items()}
        for name in modules.keys() - {GRU, "nn.LSTM"}:
            drop_in.accelerate(modules[name])
        modules["mingru.GRU"] = mingru.GRU.from_torch(modules[GRU])
        for shape in shapes:
            table = of_modules("", torch.randn(*shape, dims, requires_grad=True), modules)
            found[dims, shape] = time_both(timer, table)
    for name in modules.keys() - {GRU, "nn.LSTM"}:
        base = "nn.LSTM" if "LSTM" in name else GRU
        rows = [[str(dims), *(ratios(found[dims, shape], base, name) for shape in shapes)] for dims in args.gru]
        print_table(f"{base} / {name}, threads: {args.threads}", ["H", *map(str, shapes)], rows)
    return {f"{dims}, {shape}": each for (dims, shape), each in found.items()}


def against_rules(args, timer):
    """Print random calls that the rules of drop_in give to slower kernels; return all ratios."""
    found, end = {}, time.monotonic() + args.rules
    while time.monotonic() < end:
        batch, steps, inputs, features = (round(2 ** random.uniform(0, most)) for most in (8, 8, 9.5, 9.5))
        features = random.choice([features, -(-features // 16) * 16])
        if batch * steps * features * (inputs + features) < 2**30:
            kinds = ["GRU", "LSTM"], [torch.float32, torch.float64], ["padded", "packed"], ["x", "x with gradient"]
            call = *map(random.choice, [*kinds, [1, args.threads]]), batch, steps, inputs, features
            gains = gain(timer, *call)
            if any(ratio < 0.95 and is_used for ratio, is_used in gains):
                # What was slow by chance is not slow again.
                gains = map(max, zip(gains, gain(timer, *call), strict=True))
            for name, (ratio, is_used) in zip(("training", "without gradients"), gains, strict=True):
                found[f"{name}, {', '.join(map(str, call))}"] = ratio, is_used
                if ratio < 0.95 and is_used:
                    print(f"{ratio:.2f}", [*found][-1], flush=True)
    by_rule = [[ratio for ratio, is_used in found.values() if is_used == each] for each in (True, False)]
    slow, fast = sum(ratio < 0.95 for ratio in by_rule[0]), sum(ratio > 1.05 for ratio in by_rule[1])
    print(f"kernels compute {len(by_rule[0])} calls, {slow} slower; torch computes {len(by_rule[1])}, {fast} slower")
    return found


def gain(timer, kind, dtype, layout, given, threads, batch, steps, inputs, features):
    """Return torch's time / the kernel's in training and without gradients, and whether a rule chooses the kernel."""
    torch.set_num_threads(threads)
    modules, asked = {"torch": getattr(nn, kind)(inputs, features, dtype=dtype)}, []
    modules["mingru"] = deepcopy(modules["torch"])
    drop_in.accelerate(modules["mingru"])
    x = torch.randn(steps, batch, inputs, dtype=dtype)
    if layout == "packed":
        lengths = [steps, *random.choices(range(1, steps + 1), k=batch - 1)]
        x, *sizes = pack_padded_sequence(x, lengths, enforce_sorted=False)
    x.requires_grad_(given == "x with gradient")
    sequences = PackedSequence(x, *sizes) if layout == "packed" else x
    calls = {name: partial(module, sequences) for name, module in modules.items()}
    leaves = {name: [*[x] * x.requires_grad, *module.parameters()] for name, module in modules.items()}
    rules = {"is_slower": drop_in.operators.is_slower, "is_slower_lstm": drop_in.operators.is_slower_lstm}
    always = {name: lambda *args, rule=rule: asked.append(not rule(*args)) for name, rule in rules.items()}
    with mock.patch.multiple(drop_in.operators, **always):
        (forward, both), own = time_both(timer, Table("", calls, leaves)).values()
    return [(both / own[1], asked[0]), (forward / own[0], asked[-1])]


def ratios(found, base, name):
    return " ; ".join(f"{of_torch / own:.2f}" for of_torch, own in zip(found[base], found[name], strict=True))


GROUPS = {each.__name__: each for each in (one_layer, products, deploy)}


def starts(*sizes):
    """Return the model that docs/choosing.md begins with, and others of two layers."""
    mixed = mingru.MinGRU(*sizes, 2, norm="rms", residual=True, gate="mixed")
    of_torch = {f"nn.{kind.__name__}": kind(*sizes, 2, batch_first=True) for kind in (nn.GRU, nn.LSTM)}
    blocks = {BLOCKS: mingru.GRU(*sizes, 2, block_size=64)} if sizes[1] > 64 else {}
    return {START: mingru.GRU(*sizes, 2), **blocks, MIXED: mixed, **of_torch}


def whole_layers(timer, shape, others=None, skipped=()):
    """Return the milliseconds of forward, and of forward + backward, of one layer of each class, by name."""
    modules = {**layers(*shape[2:]), **(others or {})}
    modules = {name: module for name, module in modules.items() if name not in skipped}
    found = time_both(timer, of_modules("", torch.randn(shape[:3], requires_grad=True), modules))
    print(torch.get_num_threads(), shape, {name: f"{both:.3g}" for name, (_, both) in found.items()}, flush=True)
    return found


def short(ratio):
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2f}" if ratio < 2 else f"{ratio:.1f}"


def sweep(timer):
    """Time forward + backward by length; methods that become too slow are left out for longer sequences."""
    times = {}
    for count in LENGTHS:
        slow = [name for name, by_count in times.items() if max(by_count.values()) >= SLOW_MS]
        found = whole_layers(timer, (BATCH, count, FEATURES, FEATURES), starts(FEATURES, FEATURES), [*OF_ONE, *slow])
        for name, (_, both) in found.items():
            times.setdefault(name, {})[count] = both
    return times


def equal(by_threads, others=None):
    """Return the tables of the model to begin with beside others of two layers, a training step and inference."""
    others = others or OTHERS

    def over_threads(shape, name, at):
        found = [(each[shape][START][at], each[shape].get(name)) for each in by_threads.values()]
        return "; ".join(f"{ms:.3g}" if name == START else short(own[at] / ms) for ms, own in found if own)

    tables, shapes = [], next(iter(by_threads.values()))
    for kind, at in {"training step": 1, "without gradients": 0}.items():
        rows = [[shape, *(over_threads(shape, name, at) for name in (START, *others))] for shape in shapes]
        tables.append(markdown(["(B, S, I, H)", f"{kind}, ms", *others], rows))
    return "\n\n".join(tables)


def in_bfloat16(args, timer):
    """Time models of two layers under autocast to bfloat16, by threads, shape and name."""
    load, found = os.getloadavg()[0], {}
    for threads, shape in itertools.product((1, args.threads), map(tuple, args.shape or EQUAL_SHAPES[:16])):
        torch.set_num_threads(threads)
        x, models = torch.randn(shape[:3], requires_grad=True), starts(*shape[2:])
        # Gradients are of the dtype of parameters, so one call serves both.
        leaves = {name: [x, *models[name].parameters()] for name in (START, *OF_TORCH)}
        rounded = partial(torch.autocast, "cpu", torch.bfloat16)
        calls = {name: within(rounded, partial(models[name], x)) for name in leaves}
        calls[FLOAT32], leaves[FLOAT32] = partial(models[START], x), leaves[START]
        found.setdefault(str(threads), {})[str(shape)] = times = time_both(timer, Table("", calls, leaves))
        print(threads, shape, {name: f"{both:.3g}" for name, (_, both) in times.items()}, flush=True)
    return {"load": load, "times": found}


def tables(records, rounded):
    """Return the tables of the pages by name, of all processors of docs/speed.json and docs/speed_bfloat16.json."""
    texts = {"equal": [heading(each) + equal(each["results"]["equal"]) for each in records]}
    others = *OF_TORCH, FLOAT32
    texts["bfloat16"] = [heading(each) + equal(each["results"]["times"], others) for each in rounded]
    return {name: "\n\n".join(each) for name, each in {**texts, "tables": map(of_one_layer, records)}.items()}


def heading(record):
    text = "{cores} cores of {processor}, kernels {kernels}, torch {torch}".format(**record["where"])
    text += "".join(f", {name} {version}" for name, version in record["results"].get("versions", {}).items())
    return f"{text}. The load average before the run was {record['results']['load']:.1f}.\n\n"


def of_one_layer(record):
    """Return the table of one layer beside others, with the most threads."""
    threads, by_shape = list(record["results"]["times"].items())[-1]
    names = [name for name in next(iter(by_shape.values())) if name != "mingru"]
    rows = []
    for shape, figures in by_shape.items():
        batch, steps, input_dims, hidden_dims = json.loads(f"[{shape[1:-1]}]")
        features = hidden_dims if input_dims == hidden_dims else f"{input_dims} to {hidden_dims}"
        times = {name: forward_and_both[1] for name, forward_and_both in figures.items()}
        ratios = [times[name] / times["mingru"] for name in names]
        # In bold if the other layer is faster than MinGRU.
        cells = [f"**{short(ratio)}**" if ratio < 1 else short(ratio) for ratio in ratios]
        rows.append([f"{batch}, {steps}, {features}", f"{times['mingru']:.3g}", *cells])
    table = markdown(["B, S, H", "MinGRU, ms", *(name.removesuffix("(I, 2H)") for name in names)], rows)
    return f"A training step on {record['where']['processor']}, {threads} thread{'s' * (threads != '1')}:\n\n{table}"


def plot(times, path):
    styles = {
        START: measure.OWN,
        MIXED: {"color": "#52b788"},
        BLOCKS: {**measure.OWN, "linestyle": "--", "linewidth": 1.5},
        GRU: {"color": "#c1121f"},
        "nn.LSTM": {"color": "#e07a1f"},
    }
    lines = [(by_steps, by_steps.values(), {"label": name, **styles[name]}) for name, by_steps in times.items()]
    labels = {"xlabel": "sequence length (steps)", "ylabel": "forward + backward (ms)"}
    threads = f"{torch.get_num_threads()} CPU thread{'s' * (torch.get_num_threads() != 1)}"
    title = f"Two layers, batch {BATCH}, {FEATURES} features, {threads}"
    measure.draw(path, lines, is_log=True, title=title, **labels)


def page(args, timer):
    """Write docs/speed.json and the tables of docs/speed.md; with --json, only this file."""
    load = os.getloadavg()[0]
    versions = {PEER: importlib.metadata.version(PEER)}
    of_equal, times = {}, {}
    for threads in sorted({1, args.threads}):
        torch.set_num_threads(threads)
        for shape in [tuple(shape) for shape in args.shape or EQUAL_SHAPES]:
            found = whole_layers(timer, shape, starts(*shape[2:]), OF_ONE)
            of_equal.setdefault(str(threads), {})[str(shape)] = found
        for shape in [tuple(shape) for shape in args.shape or PAGE_SHAPES]:
            others = {"mingru.GRU": mingru.GRU(*shape[2:])}
            times.setdefault(str(threads), {})[str(shape)] = whole_layers(timer, shape, others)
    path = args.json or PAGE.with_suffix(".json")
    add_json(path, {"load": load, "versions": versions, "equal": of_equal, "times": times})
    fill(path, ROUNDED, not args.json)


def fill(path, rounded, is_written):
    """Print the tables of these files, and write them into docs/speed.md and docs/more/bfloat16.md."""
    texts = tables(*(json.loads(each.read_text(encoding="utf-8")) for each in (path, rounded)))
    print("\n\n".join(texts.values()))
    for each in (PAGE, MORE) if is_written else ():
        each.write_text(measure.filled(each.read_text(encoding="utf-8"), "speed", texts), encoding="utf-8")


def main():
    listed = "\n".join(f"  {name:<10} {function.__doc__.splitlines()[0]}" for name, function in GROUPS.items())
    description, form = __doc__.splitlines()[0], argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=f"groups:\n{listed}", formatter_class=form)
    add = parser.add_argument
    add("groups", nargs="*", help=f"groups of tables (default: {one_layer.__name__})")
    add("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    add("--sweep", action="store_true", help="print times by sequence length instead of the tables")
    add("--page", action="store_true", help="print times with one thread and --threads, and write docs/speed.md")
    add("--bfloat16", action="store_true", help="the same under autocast to bfloat16, for docs/more/bfloat16.md")
    add("--plot", type=Path, help="plot the sweep to this file; implies --sweep")
    measure.add_shape_option(parser, "those of the group")
    add("--seconds", type=float, default=4.0, help="time for each set of calls (default: %(default)s)")
    add("--rounds", type=int, default=5, help="minimum rounds of these calls (default: %(default)s)")
    add("--rules", type=float, metavar="SECONDS", help="print random calls whose kernels are slower than torch")
    add("--gru", type=int, nargs="+", metavar="H", help="compare torch's layers with themselves accelerated")
    add("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if unknown := [name for name in args.groups if name not in GROUPS]:
        parser.error(f"groups must be some of {', '.join(GROUPS)}, got {unknown[0]!r}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(where())
    timer = partial(medians_ms, seconds=args.seconds, least=args.rounds)
    if args.page:
        page(args, timer)
    elif args.bfloat16:
        add_json(args.json or ROUNDED, in_bfloat16(args, timer))
        fill(PAGE.with_suffix(".json"), args.json or ROUNDED, not args.json)
    elif args.rules:
        results = against_rules(args, timer)
    elif args.gru:
        results = against_torch(args, timer)
    elif args.sweep or args.plot:
        results = sweep(timer)
        if args.plot:
            plot(results, args.plot)
    else:
        chosen = args.groups or [one_layer.__name__]
        results = {table.title: run(table, timer) for name in chosen for table in GROUPS[name](args)}
    if args.json and not (args.page or args.bfloat16):
        write_json(args.json, results)


if __name__ == "__main__":
    main()
