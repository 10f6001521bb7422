"""Time layers, cells and models, and compare them with torch's, with linear maps and with other packages.

    python benchmarks/speed.py                             # one layer and its recurrence, by shape
    python benchmarks/speed.py steps gates                 # other groups of tables, which --help lists
    python benchmarks/speed.py --sweep --plot speed.png    # time by sequence length, and the README's picture
    python benchmarks/speed.py --ratios                    # time relative to MinGRU by shape, the README's table
    python benchmarks/speed.py --page                      # the same by batch, length, width and threads; writes them
                                                           # into docs/speed.md and docs/speed.json, in 5 minutes

Times are medians of interleaved runs in one process, in milliseconds. Forward is timed in inference mode. Forward +
backward includes the gradients of all inputs and parameters. The dtype is float32 unless a name says bf16.

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
import multiprocessing
import os
import re
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measure import add_shape_option, where, write_json
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import mingru
from mingru import bench, drop_in, ops
from mingru.bench import GRU, LINEAR, forward, forward_backward, medians_ms, output, print_table
from mingru.models import LanguageModel
from mingru.ops.cells import GATES

try:
    from minGRU_pytorch import minGRU as PeerMinGRU
except ImportError:
    PeerMinGRU = None

SHAPES = [(8, 512, 256, 256), (1, 4096, 256, 256), (16, 1024, 512, 512), (64, 1000, 10, 100), (32, 64, 64, 64)]
IN_BF16 = SHAPES[:3]
RATIO_SHAPES = [(1, 256, 256, 256), (1, 4096, 256, 256), (1, 4096, 64, 64), (8, 512, 256, 256), (16, 1024, 512, 512)]
RATIO_SHAPES += [(32, 1024, 128, 128), (64, 1000, 10, 100), (128, 32, 128, 128)]
# One shape, and others that differ in batch, steps or features.
PAGE_SHAPES = [(batch, 512, 128, 128) for batch in (8, 1, 64)] + [(8, steps, 128, 128) for steps in (1, 16, 64, 4096)]
PAGE_SHAPES += [(8, 512, dims, dims) for dims in (32, 512)]
# Rows, features, columns.
PRODUCTS = [(4096, 256, 512), (2048, 512, 1024), (2048, 64, 128), (2048, 10, 200), (64, 256, 512), (8, 256, 512)]
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
MARKS = ("<!-- tables -->", "<!-- end of tables -->")
BACKENDS = [name for name, can_run in mingru.backends().items() if can_run is True and name != "sequential"]
LENGTHS = [2**power for power in range(4, 17)]
SLOW_MS = 3000.0
PEER, SCANS = "minGRU-pytorch", "mingru-scans"


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
    factors: dict | None = None
    """Numbers by which milliseconds are multiplied, by name."""


def values(result):
    out = output(result)
    return out.data if isinstance(out, PackedSequence) else out


def all_of(results):
    return list(results)[-1]


def time_both(timer, calls, leaves, plain=False):
    """Return milliseconds of forward, and of forward + backward or None, by name."""
    functions = {name: (lambda call=call: values(call())) for name, call in calls.items()}
    forward_ms = timer(calls if plain else {name: forward(function) for name, function in functions.items()})
    both_ms = timer({name: forward_backward(functions[name], leaves[name]) for name in leaves or ()}) if leaves else {}
    return {name: (ms, both_ms.get(name)) for name, ms in forward_ms.items()}


def run(table, timer):
    """Time a table and print it."""
    figures = time_both(timer, table.calls, table.leaves, table.plain)
    factors = table.factors or {}
    figures = {
        name: [ms and ms * factors.get(name, 1.0) for ms in taken if ms is not None or table.leaves]
        for name, taken in figures.items()
    }
    columns = ["forward", "fwd + bwd"] if table.leaves else ["median ms" if not factors else "median"]
    baselines = table.baselines or (next(iter(table.calls)),)
    headings = [*columns, *(f"{column} / {name}" for name in baselines for column in columns)]
    rows = []
    for name, taken in figures.items():
        ratios = [
            ms and base and ms / base for each in baselines for ms, base in zip(taken, figures[each], strict=True)
        ]
        rows.append([name, *(f"{ms:.4g}" if ms else "" for ms in taken), *(f"{x:.2f}" if x else "" for x in ratios)])
    print_table(table.title, ["", *headings], rows)
    return figures


def of_modules(title, x, modules, *baselines, calls=None):
    """Return the table of modules that are called with x."""
    calls = calls or {name: partial(module, x) for name, module in modules.items()}
    leaves = {name: [x, *module.parameters()] for name, module in modules.items()}
    return Table(title, calls, leaves, baselines)


def layers(input_dims, hidden_dims):
    modules = {
        "mingru": mingru.MinGRU(input_dims, hidden_dims),
        LINEAR: nn.Linear(input_dims, 2 * hidden_dims),
        GRU: nn.GRU(input_dims, hidden_dims, batch_first=True),
        "nn.LSTM": nn.LSTM(input_dims, hidden_dims, batch_first=True),
    }
    if PeerMinGRU is not None:
        # minGRU-pytorch rounds input_dims * factor down.
        factor = (hidden_dims + 0.5) / input_dims
        modules[PEER] = PeerMinGRU(input_dims, expansion_factor=factor, proj_out=False)
    return modules


def within(context, call):
    """Return the call within a context that is made for each call."""

    def run():
        with context():
            return call()

    return run


in_bf16 = partial(torch.autocast, "cpu", torch.bfloat16)


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
        if (batch, steps, input_dims, hidden_dims) in IN_BF16:
            calls |= {f"{name}, bf16 autocast": within(in_bf16, calls[name]) for name in ("mingru", LINEAR)}
        of = {name: modules.get(name.partition(", bf16")[0], modules["mingru"]) for name in calls}
        leaves = {name: [x, *module.parameters()] for name, module in of.items()}
        # Other ways to compute the linear map; in inference, no such layer can be faster than the fastest way.
        flat, weight, bias = x.detach().flatten(0, 1), modules[LINEAR].weight.detach(), modules[LINEAR].bias.detach()
        calls["torch.mm with out=, no bias"] = partial(torch.mm, flat, weight.t(), out=flat.new_empty(0))
        if torch.backends.mkldnn.is_available():
            linear = torch.ops.mkldnn._linear_pointwise
            calls["oneDNN"] = partial(linear, x.detach(), weight, bias, "none", [], "")
        title = f"(B, S, I, H) = {(batch, steps, input_dims, hidden_dims)}: the whole layer"
        yield Table(title, calls, leaves, (GRU, LINEAR))


def family(args):
    """the other layers, and drop_in, with MinGRU and torch's layers; MinConv2dGRU with a convolution"""
    for batch, steps, dims, *_ in args.shape or [(8, 512, 256), (32, 64, 64), (1, 1, 256)]:
        x = torch.randn(batch, steps, dims, requires_grad=True)
        modules = {
            "MinGRU": mingru.MinGRU(dims, dims),
            "MinLSTM": mingru.MinLSTM(dims, dims),
            "drop_in.GRU": drop_in.GRU(dims, dims, batch_first=True),
            GRU: nn.GRU(dims, dims, batch_first=True),
            "nn.LSTM": nn.LSTM(dims, dims, batch_first=True),
        }
        yield of_modules(f"One layer, (B, S, I = H) = {(batch, steps, dims)}", x, modules)
    x = torch.randn(4, 16, 32, 64, 64, requires_grad=True)
    modules = {"nn.Conv2d": nn.Conv2d(32, 64, 3, padding=1), "MinConv2dGRU": mingru.MinConv2dGRU(32, 32, 3, padding=1)}
    calls = {name: partial(module, x.flatten(0, 1) if "nn." in name else x) for name, module in modules.items()}
    yield of_modules("(B, S, C, *space) = (4, 16, 32, 64, 64), kernel 3, H = 32", x, modules, calls=calls)


def gates(args):
    """the recurrence alone, with each gate, elapsed times and a lower bound"""
    for batch, steps, features, *_ in args.shape or [(8, 512, 256), (64, 1000, 100)]:
        inputs = [torch.randn(batch, steps, features, requires_grad=True) for _ in range(2)]
        zero, dt = torch.zeros(batch, 1, features), 2 * torch.rand(batch, steps)
        calls = {}
        for name in ("sigmoid", "signed", "rotation", "sigmoid, dt", "rotation, dt", "sigmoid, min_decay"):
            cell = GATES[name.partition(",")[0]]
            spec = ops.Spec(cell, "positive", False, 0.5 if "min_decay" in name else 0.0)
            start = ops.Start(zero, zero, None, dt if "dt" in name else None)
            calls[name] = partial(ops.recurrence, spec, inputs, start)
        title = f"Gates, recurrence alone, (B, S, H) = {(batch, steps, features)}"
        yield Table(title, calls, dict.fromkeys(calls, inputs))


def lengths(args):
    """sequences of different lengths, evenly spaced from 1 to S, so that half of the steps are padding"""
    batch, steps, dims = 32, 512, 256
    given = torch.linspace(1, steps, batch).round().long()
    x, rnn, gru = torch.randn(batch, steps, dims), mingru.MinGRU(dims, dims), nn.GRU(dims, dims, batch_first=True)
    packed = pack_padded_sequence(x, given, batch_first=True, enforce_sorted=False)
    calls = {
        "as many unpadded steps": partial(rnn, torch.randn(batch, int(given.sum()) // batch, dims)),
        "all steps": partial(rnn, x),
        "lengths=": partial(rnn, x, lengths=given),
        "PackedSequence": partial(rnn, packed),
        "nn.GRU, PackedSequence": partial(gru, packed),
    }
    leaves = {name: [*(gru if "nn.GRU" in name else rnn).parameters()] for name in calls}
    yield Table("Lengths from 1 to S, (B, S, I = H) = (32, 512, 256); fwd + bwd for the parameters", calls, leaves)


def steps(args):
    """one step of layers and cells, with linear maps and nn.GRU"""
    dims = 256
    x, h, deep_h = torch.randn(1, 1, dims), torch.rand(1, 1, 1, dims), torch.rand(3, 1, 1, dims)
    linears = [nn.Linear(dims, 2 * dims) for _ in range(3)]
    calls = {LINEAR: partial(linears[0], x), "MinGRU": partial(mingru.MinGRU(dims, dims), x, h)}
    calls[GRU] = partial(nn.GRU(dims, dims, batch_first=True), x, torch.zeros(1, 1, dims))
    yield Table("one step of a layer", calls)
    deep = mingru.MinGRU(dims, dims, 3, norm="rms", residual=True)
    calls = {
        "three nn.Linear(I, 2H)": lambda: all_of(linear(x) for linear in linears),
        "MinGRU": partial(deep, x, deep_h),
    }
    yield Table("one step of three layers, norm='rms', residual=True", calls)
    cells = {"nn.GRUCell": nn.GRUCell(dims, dims), "MinGRUCell": mingru.MinGRUCell(dims, dims)}
    yield Table("one step of a cell", {name: partial(cell, x[0], h[0, 0]) for name, cell in cells.items()})


def half(args):
    """bfloat16 modules, and float32 modules under autocast, with their linear maps

    On processors without bfloat16 matrix instructions, nn.Linear itself is slow in bfloat16.
    """
    for shape in args.shape or [(8, 512, 256, 256), (16, 1024, 512, 512)]:
        for name, dtype in (("bfloat16 module", torch.bfloat16), ("float32 module, bfloat16 autocast", torch.float32)):
            x = torch.randn(*shape[:3], dtype=dtype, requires_grad=True)
            modules = {
                LINEAR: nn.Linear(shape[2], 2 * shape[3], dtype=dtype),
                "MinGRU": mingru.MinGRU(*shape[2:], dtype=dtype),
            }
            autocast = partial(in_bf16, enabled=dtype == torch.float32)
            calls = {key: within(autocast, partial(module, x)) for key, module in modules.items()}
            yield of_modules(f"(B, S, I, H) = {tuple(shape)}, {name}", x, modules, calls=calls)


def products(args):
    """the three products of a linear map, by torch (MKL on x86), by oneDNN and by this library

    With MINGRU_PRODUCT=mingru, the product of this library where torch's is the default.
    """
    for rows, features, columns in PRODUCTS:
        x, weight, grad = torch.randn(rows, features), torch.randn(columns, features), torch.randn(rows, columns)
        factors = {"forward": (x, weight.t()), "gradient of x": (grad, weight), "of the weight": (grad.t(), x)}
        for name, (left, right) in factors.items():
            calls = {"torch.mm": partial(torch.mm, left, right)}
            calls["mingru"] = partial(torch.ops.mingru.multiply, left, right, None)
            if torch.backends.mkldnn.is_available():
                linear = torch.ops.mkldnn._linear_pointwise
                calls["oneDNN"] = partial(linear, left, right.t(), None, "none", [], "")
            yield Table(f"{(rows, features, columns)}, {name}", calls)


def compiled(args):
    """eager mode with torch.compile, of a layer and of a linear map of its size"""
    for shape in args.shape or [*bench.SHAPES, (16, 1024, 512, 512)]:
        torch._dynamo.reset()
        x = torch.randn(shape[:3], requires_grad=True)
        modules = {"MinGRU, eager": mingru.MinGRU(*shape[2:]), "nn.Linear, eager": nn.Linear(shape[2], 2 * shape[3])}
        modules |= {
            name.replace("eager", "compiled"): torch.compile(module, fullgraph=True) for name, module in modules.items()
        }
        yield of_modules(
            f"torch.compile, (B, S, I, H) = {tuple(shape)}", x, modules, "MinGRU, eager", "nn.Linear, eager"
        )


VOCAB, DIMS, LAYERS = 84, 256, 6


def training_step(lm, loss):
    optimizer = torch.optim.AdamW(lm.parameters(), 1e-3)

    def run():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return run


def model(args):
    """a language model: a step, reading a prompt, and training and generation beside minGRU-pytorch

    minGRU-pytorch keeps the state of its recurrence between steps, but not the last inputs of its convolution. A model
    of its with convolutions reads all tokens again for each new token.
    """
    from minGRU_pytorch.minLM import minLM

    options = {"no convolution, no MLP": {}, "convolution": {"conv": 4}, "convolution and MLP": {"conv": 4, "mlp": 2}}
    for name, given in options.items():
        lm, ids = LanguageModel(VOCAB, DIMS, LAYERS, **given).eval(), torch.randint(VOCAB, (1, args.prompt))
        _, state = lm(ids[:, :1])
        # The tied output layer is no module.
        maps = [*(each for each in lm.modules() if isinstance(each, nn.Linear)), nn.Linear(DIMS, VOCAB, bias=False)]
        pairs = [(each, torch.randn(1, 1, each.in_features)) for each in maps]
        calls = {
            "linear maps": lambda pairs=pairs: all_of(each(x) for each, x in pairs),
            "step": partial(lm, ids[:, :1], state),
        }
        yield Table(f"One step, {LAYERS} layers, {DIMS} features, {name}", calls)

        def stepping(lm=lm, ids=ids):
            state = None
            for token in ids.split(1, 1):
                out, state = lm(token, state)
            return out

        yield Table(f"{args.prompt} tokens, {name}", {"one pass": partial(lm, ids), "stepping": stepping})
    for with_conv in (False, True):
        conv = 3 if with_conv else None
        ours = LanguageModel(VOCAB, DIMS, LAYERS, expansion=1.5, conv=conv, mlp=4, bias=True, tied=False)
        other = minLM(num_tokens=VOCAB, dim=DIMS, depth=LAYERS, enable_conv=with_conv)
        name = "with convolutions" if with_conv else "without convolutions"
        ids = torch.randint(VOCAB, (args.sequences, 257))

        def loss(ours=ours, ids=ids):
            return F.cross_entropy(ours(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())

        calls = {"mingru": training_step(ours, loss)}
        calls[PEER] = training_step(other, partial(other, ids, return_loss=True))
        yield Table(f"Training step, {args.sequences} sequences of 256 tokens, {name}", calls, plain=True)
        start = torch.zeros(1, 1, dtype=torch.int64)

        other.eval()

        def generate(other=other, start=start):
            ids, hiddens = start, None
            for _ in range(args.tokens):
                logits, new = other(ids, return_prev_hiddens=True, prev_hiddens=hiddens)
                hiddens = new if other.can_cache else None
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
            return ids

        calls = {"mingru": partial(ours.eval().generate, start, args.tokens, temperature=0), PEER: generate}
        yield Table(f"Generation of {args.tokens} tokens, {name}", calls)


def scaling(args):
    """time and memory by sequence length, and the scan relative to copies of its tensors"""
    rnn, calls, leaves = mingru.MinGRU(64, 64), {}, {}
    for count in [4**power for power in range(5, 11)]:
        # Short sequences are repeated, because one short call would mostly measure the caches that the last call left.
        x, repeats = torch.randn(1, count, 64, requires_grad=True), max(1, 2**16 // count)

        def call(x=x, repeats=repeats):
            return torch.stack([output(rnn(x))[:, -1] for _ in range(repeats)])

        calls[str(count)], leaves[str(count)] = call, [x, *rnn.parameters()]
    factors = {count: 1e6 / max(2**16, int(count)) for count in calls}
    yield Table("One time step of (B, S, I, H) = (1, S, 64, 64), ns, by S", calls, leaves, factors=factors)
    a, b, out = torch.rand(8, 512, 256), torch.randn(8, 512, 256), torch.empty(8, 512, 256)
    targets = [torch.empty_like(out) for _ in range(3)]
    calls = {
        "linear_scan": partial(mingru.functional.linear_scan, a, b),
        "copy of a, b and h": lambda: all_of(map(torch.Tensor.copy_, targets, (a, b, out))),
        "clone of a, b and h": lambda: all_of(x.clone() for x in (a, b, out)),
    }
    yield Table("(B, S, H) = (8, 512, 256), the scan and copies", calls)
    if Path("/proc/self/status").is_file():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            taken = pool.submit(inference_mb, args.threads).result()
        print_table("Memory of inference, (B, S, I, H) = (1, 1000000, 64, 64), MB", [*taken], [[*taken.values()]])


def resident_mb(name):
    """Return the memory of this process; getrusage would return the parent's peak if that is higher."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3 * 1.024


def inference_mb(threads):
    """Return the peak memory of one forward pass, without its input and its output."""
    torch.set_num_threads(threads)
    rnn, x = mingru.MinGRU(64, 64), torch.randn(1, 1_000_000, 64)
    with torch.inference_mode():
        # Excludes memory that is allocated once, in the first call.
        rnn(x[:, :1024])
        before = resident_mb("VmRSS")
        mb = rnn(x)[0].nbytes / 1e6
    return {"input": f"{mb:.1f}", "output": f"{mb:.1f}", "all else": f"{resident_mb('VmHWM') - before - mb:.1f}"}


class Tagger(nn.Module):
    """An embedding, a bidirectional layer and a linear map."""

    def __init__(self, name):
        super().__init__()
        self.is_packed, kind = "packed" in name, {"nn": nn, "drop_in": drop_in}.get(name.partition(".")[0])
        self.embedding, self.head = nn.Embedding(1000, 128), nn.Linear(128, 20)
        kind = kind and getattr(kind, name.partition(".")[2].partition(",")[0])
        self.rnn = kind and kind(128, 64, batch_first=True, bidirectional=True)

    def forward(self, words, lengths):
        x = self.embedding(words)
        if not self.is_packed:
            return self.head(self.rnn(x, lengths=lengths)[0])
        x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        x = x if self.rnn is None else self.rnn(x)[0]
        return self.head(pad_packed_sequence(x, batch_first=True, total_length=words.shape[1])[0])


def tagger(args):
    """a training step of a tagger of 32 sentences of random lengths, packed and with `lengths=`"""
    names = [f"{home}.{kind}, packed" for home in ("nn", "drop_in") for kind in ("GRU", "LSTM")]
    names += ["drop_in.GRU, lengths=", "drop_in.LSTM, lengths=", "packed without a layer"]
    for longest in args.longest:
        torch.manual_seed(0)
        words, given = torch.randint(1000, (32, longest)), torch.randint(1, longest + 1, (32,))
        given[0] = longest

        def step(module, words=words, given=given):
            module.zero_grad()
            module(words, given).square().mean().backward()

        calls = {name: partial(step, Tagger(name)) for name in names}
        yield Table(f"A training step, up to {longest} words", calls, plain=True)


def deploy(args):
    """exported layers in ONNX Runtime, with their state as input and output, with an exported nn.GRU

    The batch size is dynamic; in files for sequences the length is dynamic too, up to 512 steps. Each call allocates
    its outputs.
    """
    import onnxruntime

    for shape in args.shape or [(1, 1, 256, 256), (1, 512, 256, 256), (8, 512, 256, 256)]:
        modules = {
            GRU: nn.GRU(*shape[2:], batch_first=True),
            "MinGRU": mingru.MinGRU(*shape[2:]),
            "drop_in.GRU": drop_in.GRU(*shape[2:], batch_first=True),
            **({"MinGRUCell": mingru.MinGRUCell(*shape[2:])} if shape[1] == 1 else {}),
        }
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: Path(folder, f"{name}.onnx") for name in modules}
            for name, module in modules.items():
                export(name, module, shape, paths[name])
            sizes = [[name, f"{path.stat().st_size / 1000:.0f}"] for name, path in paths.items()]
            print_table(f"(B, S, I, H) = {shape}, ONNX", ["", "kB"], sizes)
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
                title = f"(B, S, I, H) = {shape}, ONNX Runtime, {threads} thread{'s'[: threads - 1]}"
                yield Table(title, calls, plain=True)


def example(name, batch, count, input_dims, hidden_dims):
    """Return x and h for the module of this name."""
    if name == "MinGRUCell":
        return torch.randn(batch, input_dims), torch.rand(batch, hidden_dims)
    state = (1, batch, 1, hidden_dims) if name == "MinGRU" else (1, batch, hidden_dims)
    return torch.randn(batch, count, input_dims), torch.rand(state)


def export(name, module, shape, path):
    is_step, given = shape[1] == 1, example(name, 2, min(shape[1], 20), *shape[2:])
    if name != GRU:
        bound = {"kind": "step"} if is_step else {"kind": "sequence", "max_steps": shape[1]}
        mingru.export.onnx(module, given, path, **bound)
        return
    dynamic = ({0: "batch"} if is_step else {0: "batch", 1: "time"}, {1: torch.export.Dim.AUTO})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"input_names": ["x", "h"], "output_names": ["out", "h_out"], "dynamic_shapes": dynamic}
        torch.onnx.export(module.eval(), given, path, dynamo=True, external_data=False, verbose=False, **options)


GROUPS = {
    function.__name__: function
    for function in (one_layer, family, gates, lengths, steps, half, products, compiled, model, scaling, tagger, deploy)
}


def sweep(timer, hidden_dims):
    """Time forward + backward by length, batch 1; methods that become too slow are left out for longer sequences."""
    times = {}
    for count in LENGTHS:
        x, modules = torch.randn(1, count, hidden_dims, requires_grad=True), layers(hidden_dims, hidden_dims)
        calls = {name: partial(module, x) for name, module in modules.items()}
        log = "minGRU in log space (the paper's form)"
        calls[log] = within(partial(mingru.use_backend, "log"), calls["mingru"])
        calls = {
            name: forward_backward(
                lambda call=call: output(call()), [x, *modules.get(name, modules["mingru"]).parameters()]
            )
            for name, call in calls.items()
            if max(times.get(name, {0: 0.0}).values()) < SLOW_MS
        }
        now = timer(calls)
        for name, ms in now.items():
            times.setdefault(name, {})[count] = ms
        print(count, {name: round(ms, 3) for name, ms in now.items()}, flush=True)
    return times


def ratios(shapes, seconds):
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


def scans_of(folder):
    """Return the module of mingru-scans that pip installed in `folder`, under another name than `mingru`."""
    spec = importlib.util.spec_from_file_location("scans", folder / "mingru" / "min_gru.py")
    scans = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scans)
    return scans


def by_threads(timer, shapes, numbers, scans):
    """Time forward, and forward + backward, of one layer of each class, by number of threads and shape."""
    results = {}
    for threads in numbers:
        torch.set_num_threads(threads)
        for shape in shapes:
            modules = layers(*shape[2:])
            if scans is not None:
                modules[SCANS] = scans.MinGRU(*shape[2:])
            table = of_modules("", torch.randn(shape[:3], requires_grad=True), modules)
            found = results.setdefault(str(threads), {})[str(shape)] = time_both(timer, table.calls, table.leaves)
            print(threads, shape, {name: f"{both:.3g}" for name, (_, both) in found.items()}, flush=True)
    return results


def tables(record):
    """Return the table of docs/speed.md, a training step with the most threads, from what docs/speed.json has."""
    where, versions = record["where"], record["results"]["versions"]
    machine = f"{where['cores']} cores of {where['processor']} with {where['instructions']}, torch {where['torch']}"
    others = "".join(f", {name} {version}" for name, version in versions.items())
    load = record["results"]["load"]
    lines = [f"{machine}{others}.", f"The load average before the run was {load:.1f}."]
    if load > where["cores"]:
        lines += ["Other programs ran at the same time, so these ratios are rough."]
    threads, by_shape = list(record["results"]["times"].items())[-1]
    names = [name for name in next(iter(by_shape.values())) if name != "mingru"]
    lines += ["", f"A training step, {threads} thread{'s' * (threads != '1')}:", ""]
    headings = " | ".join(name.removesuffix("(I, 2H)") for name in names)
    lines += [f"| B, S, H | MinGRU, ms | {headings} |", "| --- " * (len(names) + 2) + "|"]
    for shape, figures in by_shape.items():
        batch, steps, input_dims, hidden_dims = json.loads(f"[{shape[1:-1]}]")
        features = hidden_dims if input_dims == hidden_dims else f"{input_dims} to {hidden_dims}"
        times = {name: forward_and_both[1] for name, forward_and_both in figures.items()}
        cells = [as_ratio(times[name] / times["mingru"]) for name in names]
        lines.append(f"| {batch}, {steps}, {features} | {times['mingru']:.3g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def as_ratio(ratio):
    """Return a ratio as the page shows it, in bold if the other layer is faster than MinGRU."""
    text = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"
    return f"**{text}**" if ratio < 1 else text


def plot(times, hidden_dims, path):
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"mingru": "#0b6e4f", GRU: "#c1121f", "nn.LSTM": "#e07a1f", LINEAR: "#8d99ae", PEER: "#b5179e"}
    figure, axes = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
    for name, by_steps in times.items():
        style = {"linewidth": 3.0, "zorder": 3, "label": "mingru.MinGRU"} if name == "mingru" else {"linewidth": 1.6}
        style = {"label": name, "color": colors.get(name, "#5a4fcf"), **style}
        axes.loglog(list(by_steps), list(by_steps.values()), "--" if name == LINEAR else "-", **style)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="sequence length (steps)", ylabel="forward + backward (ms)")
    axes.set_title(f"One layer, batch 1, {hidden_dims} features, {torch.get_num_threads()} CPU threads")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def page(parser, args, timer):
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
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        PAGE.write_text(f"{before}{MARKS[0]}\n\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def main():
    listed = "\n".join(f"  {name:<10} {function.__doc__.splitlines()[0]}" for name, function in GROUPS.items())
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"groups:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("groups", nargs="*", help=f"groups of tables (default: {one_layer.__name__})")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--sweep", action="store_true", help="print times by sequence length instead of the tables")
    parser.add_argument("--hidden-dims", type=int, default=256, help="features in the sweep (default: %(default)s)")
    parser.add_argument("--ratios", action="store_true", help="print times relative to MinGRU instead of the tables")
    text = "print times by shape, with one thread and with --threads, and write docs/speed.md"
    parser.add_argument("--page", action="store_true", help=text)
    parser.add_argument("--scans", type=Path, help="folder in which pip has installed mingru-scans, for --page")
    parser.add_argument("--plot", type=Path, help="plot the sweep to this file; implies --sweep")
    add_shape_option(parser, "those of the group")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens that a model generates (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens that a model reads (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=16, help="sequences of a model's step (default: %(default)s)")
    parser.add_argument(
        "--longest", type=int, nargs="*", default=[40, 400], help="sentences of the tagger (default: 40 400)"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each set of calls (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="minimum rounds of these calls (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if unknown := [name for name in args.groups if name not in GROUPS]:
        parser.error(f"groups must be some of {', '.join(GROUPS)}, got {unknown[0]!r}")
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
        results = sweep(timer, args.hidden_dims)
        if args.plot:
            plot(results, args.hidden_dims, args.plot)
    elif args.ratios:
        results = ratios([tuple(shape) for shape in args.shape or RATIO_SHAPES], args.seconds)
    else:
        chosen = args.groups or [one_layer.__name__]
        results = {table.title: run(table, timer) for name in chosen for table in GROUPS[name](args)}
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
