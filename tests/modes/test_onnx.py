"""Every class as an ONNX file, run by ONNX Runtime, beside the module itself."""

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from cases import CASES, assert_equal, case, graded, grid, refuses, small_chunks, tensors
from mode import given, mode
from torch.export import Dim

import mingru
from mingru.modules.layer import Layer, is_bidirectional

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.usefixtures("_fresh_compiler")

# ONNX Runtime rounds as it likes.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


class Session:
    """An exported module, called as the module is; its outputs are flat."""

    def __init__(self, path, *args, export=mingru.export.onnx, **options):
        if args:
            export(*args, path, **options)
        self.model = onnx.load(path)
        onnx.checker.check_model(self.model, full_check=True)
        threads = onnxruntime.SessionOptions()
        threads.intra_op_num_threads = threads.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, threads, providers=["CPUExecutionProvider"])
        self.inputs = {each.name: each.shape for each in self.session.get_inputs()}
        self.outputs = {each.name: each.shape for each in self.session.get_outputs()}

    def __call__(self, *args):
        given = zip(self.inputs, tensors(args), strict=True)
        return [torch.from_numpy(each) for each in self.session.run(None, {name: x.numpy() for name, x in given})]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


@mode("ONNX, whole sequence", [])
def test_any_batch_and_any_length(case, path):
    module, options = case.make().requires_grad_(False), {"max_steps": None if case.time_dim is None else 20}
    if not isinstance(module, mingru.modules.Layer):
        options["dynamic_shapes"] = case.dynamic(Dim.AUTO, Dim.AUTO)
    with small_chunks():
        session = Session(path, module, given(case, count=2), **options)
    for batch, steps in [(1, 1), (3, 17), (2, 20)]:
        x, h = given(case, batch, steps, 2)
        assert_equal(session(x, h), tensors(module(x, h)), **TOLERANCE)


# Module, arguments beside x, options of the export, and batches and numbers of steps.
MIXED, BLOCKS = {"gate": "mixed"}, partial(mingru.GRU, 3, 4, 2, block_size=2, bidirectional=True)
GRU, LSTM, TIMED, BOTH = mingru.MinGRU, mingru.MinLSTM, {"min_decay": 0.3}, {"bidirectional": True}
CALLS = {
    "long": (partial(LSTM, 3, 4, **BOTH), "h", {"max_steps": 512}, [(3, 300), (1, 512)]),
    "no bound": (partial(GRU, 3, 4, batch_first=False), "", {}, [(2, 300), (1, 5000)]),
    "lengths": (partial(GRU, 3, 4, **BOTH), "lengths", {"max_steps": 20}, [(3, 17), (2, 20)]),
    "resets": (
        partial(GRU, 3, 4, learn_initial_state=True, **TIMED),
        "h reset dt",
        {"max_steps": 100},
        [(3, 17), (2, 100)],
    ),
    "quaternions": (
        partial(GRU, 3, 8, **MIXED, **BOTH, **TIMED),
        "h reset lengths dt",
        {"max_steps": 40},
        [(3, 17), (2, 40)],
    ),
    "a step of quaternions": (partial(GRU, 3, 8, 2, **MIXED, **TIMED), "h reset dt", {"kind": "step"}, [(4, 1)]),
    "a node of ONNX": (BLOCKS, "h lengths", {}, [(3, 17), (2, 300)]),
    "a loop of ONNX": (BLOCKS, "h reset lengths", {}, [(3, 17), (2, 300)]),
    "a step": (partial(GRU, 3, 4, 2), "h reset dt", {"kind": "step"}, [(4, 1)]),
}


QUICK = "a step of quaternions", "a node of ONNX", "a step"
ROWS = [pytest.param(*row, id=name, marks=[] if name in QUICK else pytest.mark.slow) for name, row in CALLS.items()]


@pytest.mark.parametrize(("make", "names", "options", "sizes"), ROWS)
def test_calls(make, names, options, sizes, path):
    module, names = make().requires_grad_(False), names.split()

    def given(batch, steps):
        x, reset = torch.randn(batch, steps, 3), torch.rand(batch, steps) < 0.2
        args = {"x": x if module.batch_first else x.transpose(0, 1)}
        args["h"] = torch.randn(module.num_layers * module.num_directions, batch, 1, module.hidden_dims)
        args["reset"] = reset
        args |= {"lengths": torch.randint(0, steps + 1, (batch,)), "dt": 3 * torch.rand(batch, steps)}
        return {name: each if name in ("x", *names) else None for name, each in args.items()}

    is_step = "kind" in options
    # What the model returns is the example for the state of a step.
    example = given(1, 1 if is_step else 7) | ({"h": None} if is_step else {})
    with small_chunks() if options.get("max_steps", 512) < 512 else nullcontext():
        session = Session(path, module, tuple(example.values()), **options)
    assert list(session.inputs) == ["x", *names]
    assert session.inputs["x"].index("batch") == (0 if module.batch_first else 1)
    for size in [(1, 1), *sizes]:
        args = given(*size).values()
        assert_equal(session(*args), tensors(module(*args)), **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_sequence_beyond_the_bound_does_not_pass_for_right(bidirectional, path):
    module = mingru.MinGRU(3, 4, bidirectional=bidirectional).requires_grad_(False)
    session = Session(path, module, torch.randn(1, 7, 3), max_steps=60)
    for steps in (59, 60, 61, 1000):
        x = torch.randn(1, steps, 3)
        found = session(x)
        if steps > 60:
            assert all(each.isnan().all() for each in found)
        else:
            assert_equal(found, tensors(module(x)), **TOLERANCE)


# The state that torch warns about has the batch of the input.
LAYERS = [
    lambda: mingru.MinGRU(3, 4, 2, gate=["rotation", "quaternion"]),
    lambda: mingru.drop_in.GRULike(3, 4, bidirectional=True, cell="mingru"),
    lambda: mingru.GRU(3, 4, 2, block_size=2, bidirectional=True),
    lambda: mingru.MinConv2dGRU(3, 4, kernel_size=3),
]


@pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size other than 1")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@grid(steps=[1, 5], make=LAYERS)
def test_the_old_exporter_of_torch(make, steps, path):
    """A length of 1 is fixed, as other exporters fix it."""
    module = make().requires_grad_(False)
    space = (6, 5) if isinstance(module, mingru.MinConv2dGRU) else ()
    axes = {"x": {0: "first", 1: "second"} if steps > 1 else {}}
    x = torch.randn(steps, steps, 3, *space)
    session = Session(path, module, (x,), export=torch.onnx.export, dynamo=False, input_names=["x"], dynamic_axes=axes)
    for size in [(17, 2), (100, 1), (1, 20)] if steps > 1 else [(1, 1)]:
        x = torch.randn(*size, 3, *space)
        assert_equal(session(x), tensors(module(x)), **TOLERANCE)


@pytest.mark.filterwarnings("ignore")
def test_the_old_exporter_refuses_resets_and_lengths():
    """Of a GRU; the error says what exports them."""
    rnn = mingru.GRU(3, 4, 2, block_size=2, bidirectional=True)
    for args in ((None, torch.rand(2, 5) < 0.3), (None, None, torch.tensor([1, 5]))):
        # After an error, this exporter leaves the cache of casts disabled, as it was for a moment.
        with torch.autocast("cpu", enabled=False), pytest.raises(ValueError, match="must be None in an export with"):
            torch.onnx.export(rnn, (torch.randn(2, 5, 3), *args), io.BytesIO(), dynamo=False)


class Bands(torch.nn.Module):
    """A layer inside a program: over the bands of each frame, in both directions."""

    def __init__(self):
        super().__init__()
        self.rnn = mingru.MinGRU(8, 4, bidirectional=True)

    def forward(self, frames, reset):
        return self.rnn(frames.transpose(1, 2), reset=reset)[0]


SIZES = ({0: Dim("frames"), 2: Dim("bands")}, {0: Dim.AUTO, 1: Dim.AUTO})


# Those of the exporters of torch.
EXPORTERS = [
    (torch.onnx.export, {"dynamo": False, "input_names": ["frames", "reset"]}, 900),
    (torch.onnx.export, {"dynamo": True, "verbose": False}, 250),
    (mingru.export.onnx, {"max_steps": 33, "dynamic_shapes": SIZES}, 400),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("export", "options", "most"), EXPORTERS)
def test_a_short_sequence_has_few_nodes(export, options, most, path):
    """Of a known length, only the steps and levels that it needs."""
    module = Bands().requires_grad_(False).eval()
    args = (torch.randn(3, 8, 33), torch.rand(3, 33) < 0.2)
    args[0][1, :, 7] = torch.nan  # which does not pass a reset
    session = Session(path, module, args, export=export, **options)
    assert_equal(session(*args), [module(*args)], equal_nan=True, **TOLERANCE)
    assert len(session.model.graph.node) < most


# Layers of one direction, the only ones that compute steps.
ONE_WAY = [case(each.name, type(each.module), 3, 4) if is_bidirectional(each.module) else each for each in CASES]


@mode("ONNX, single step", ["MinGRU"], cases=ONE_WAY)
def test_steps_that_follow_each_other_are_one_pass(case, path):
    """The state that comes out goes in again. What a layer returns was the example for it."""
    module = case.make().requires_grad_(False)
    example = given(case, 2, 1, 1) if isinstance(module, Layer) else given(case, 3, 1, 2)
    session = Session(path, module, example, kind="step")
    h = state = given(case, 3)[1]
    for _ in range(20):
        x = given(case, 3, 1)[0]
        outputs, expected = session(x, h), module(x, state)
        assert_equal(outputs, expected, **TOLERANCE)
        state = expected if case.time_dim is None else expected[1]
        h = case.of_states(outputs[-len(tensors(state)) :])


class Meanwhile(torch.nn.Module):
    """A model during whose capture another thread calls something."""

    def __init__(self, call):
        super().__init__()
        self.call, self.of_torch, self.own = call, torch.nn.GRU(3, 4), mingru.GRU(4, 3)

    def forward(self, x):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self.call).result()
        return self.layers(x)

    def layers(self, x):
        return self.own(self.of_torch(x)[0])[0] + 1

    def compile(self, x, path):
        """Compile only the layers, while the compiler for their graph calls all."""
        torch.compile(self.layers, backend=lambda graph, _: [self(x), graph.forward][1])(x)


CAPTURES = {
    "ONNX of torch": lambda model, x, path: torch.onnx.export(model, (x,), dynamo=True, verbose=False),
    "ONNX": mingru.export.onnx,
    "old ONNX": lambda model, x, path: torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False),
    "export": lambda model, x, path: torch.export.export(model, (x,)),
    "trace": lambda model, x, path: torch.jit.trace(model, (x,), check_trace=False),
    "compile": Meanwhile.compile,
}


@pytest.fixture(scope="module")
def calls():
    """All modules and what they are called with."""
    torch.manual_seed(0)
    rnn = mingru.GRU(3, 4)
    compiled = rnn, torch.compile(rnn, backend="eager"), (torch.randn(2, 3, 3),)
    return [*((module, module, given(case)) for case in CASES for module in [case.make()]), compiled]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("capture", CAPTURES)
def test_calls_of_another_thread(capture, calls, path):
    """Flags of torch say to all threads that one of them captures. The calls of the others are as eager as before."""

    def outputs():
        with torch.no_grad():
            alone = [run(*args) for _, run, args in calls]
        return alone, [graded(*call) for call in calls]

    expected, found = outputs(), []
    CAPTURES[capture](Meanwhile(lambda: found.append(outputs())), torch.randn(2, 5, 3), path)
    assert found
    for each in found:
        assert_equal(each, expected, rtol=1e-4, atol=1e-4)


# `mingru.export.onnx` as one calls it: names, examples, models of one's own, and bad input

export = mingru.export.onnx


class Tagger(torch.nn.Module):
    """A user's model: a state of torch's shape, names of its own."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 3)
        self.rnn = mingru.drop_in.GRULike(3, 5, batch_first=True, cell="mingru")
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(5, 2)

    def forward(self, tokens, state=None):
        out, state = self.rnn(self.embedding(tokens), state)
        return self.head(self.drop(out)), state


def test_one_file_and_nothing_else(path, capfd):
    """Silent, with no notes of the machine that wrote it."""
    assert export(mingru.MinGRU(3, 4), torch.randn(1, 1, 3), path, kind="step") is None
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"] and capfd.readouterr() == ("", "")
    model = onnx.load(path)
    assert not any(node.metadata_props for node in model.graph.node) and b"site-packages" not in path.read_bytes()
    assert {node.domain for node in model.graph.node} == {""}


STACK = mingru.Stack([mingru.MinGRU(3, 4, batch_first=False), mingru.MinGRU(4, 5, batch_first=False)])


STEPS = [
    (mingru.MinGRU(3, 4, 2), (1, 1, 3), ["batch", 1, 3], ["batch", 1, 4], {"": [2, "batch", 1, 4]}),
    (STACK, (1, 1, 3), [1, "batch", 3], [1, "batch", 5], {"_0": [1, "batch", 1, 4], "_1": [1, "batch", 1, 5]}),
    (mingru.drop_in.GRULikeCell(3, 4, cell="mingru"), (1, 3), ["batch", 3], None, {"": ["batch", 4]}),
    (mingru.models.Block(3), (1, 1, 3), ["batch", 1, 3], ["batch", 1, 3], {"_0": [1, "batch", 1, 3]}),
]


@pytest.mark.parametrize(("model", "x", "size", "out", "states"), STEPS)
def test_names_and_sizes_of_a_step(model, x, size, out, states, path):
    session = Session(str(path), model, torch.randn(x), kind="step")
    assert session.inputs == {"x": size, **{f"h{end}": each for end, each in states.items()}}
    assert session.outputs == {**({"out": out} if out else {}), **{f"h_out{end}": each for end, each in states.items()}}


RNN, X = mingru.MinGRU(3, 4, 2).requires_grad_(False), torch.randn(2, 5, 3)
ALL_SIZES = {"kind": "sequence", "dynamic_shapes": ({0: Dim("rows")},)}
# An argument that is None has no dimensions.
ALONE, SAME = (torch.zeros(1, 4), None, torch.zeros(1, 4)), ({1: Dim("time")}, None, {1: Dim.AUTO})
ONE_STATE = (torch.randn(3, 1, 3), torch.zeros(1, 1, 1, 4))


class Pieces(torch.nn.Module):
    def forward(self, out):
        return {"a": out + 1, "b": (out * 2, out - 1)}


class Alone(torch.nn.Module):
    def forward(self, out, mask=None, h=None):
        return out if h is None else (out + h, h)


FILES = [
    # Without a batch.
    (mingru.MinGRUCell(3, 4), torch.randn(3), {"kind": "step"}, [(3,), (4,)], {"x": [3], "h": [4]}),
    # One state for all sequences and layers.
    (RNN, ONE_STATE, {"kind": "step"}, [(5, 1, 3), (2, 5, 1, 4)], {"x": ["batch", 1, 3], "h": [2, "batch", 1, 4]}),
    (RNN, X, ALL_SIZES, [(7, 5, 3)], {"x": ["rows", 5, 3]}),
    # As many steps as the example has.
    (RNN, X, {"max_steps": 5}, [(7, 5, 3)], {"x": ["batch", "time", 3]}),
    (Pieces(), X[0], {"dynamic_shapes": ({1: Dim("time")},)}, [(5, 9)], {"out": [5, "time"]}),
    # The sizes of a model of one's own are those of the example.
    (Pieces(), X[0], {}, [(5, 3)], {"out": [5, 3]}),
    # An output has another name than an input.
    (Alone(), ALONE, {"dynamic_shapes": SAME}, [(1, 6), (1, 6)], {"out": [1, "time"], "h": [1, "time"]}),
]


@pytest.mark.parametrize(("model", "example", "options", "args", "inputs"), FILES)
def test_the_file_computes_what_the_model_does(model, example, options, args, inputs, path):
    session = Session(path, model, example, **options)
    assert session.inputs == inputs
    given = [torch.randn(size) for size in args]
    with torch.no_grad():
        expected = model(**dict(zip(inputs, given, strict=True))) if isinstance(model, Alone) else model(*given)
    assert_equal(session(*given), expected, **TOLERANCE)


@grid(is_ours=[False, True], kind=["step", pytest.param("sequence", marks=pytest.mark.slow)])
def test_a_model_of_tokens(is_ours, kind, path):
    """As it is in use, without dropout, and in the modes in which it was afterwards."""
    model = mingru.models.LanguageModel(7, 4, 1, dropout=0.5) if is_ours else Tagger()
    # The example of a step of a class of this library needs no state, and then no batch of 2.
    count, state = {"step": 1, "sequence": 50}[kind], torch.zeros(1, 2, 1, 4) if is_ours else torch.zeros(1, 2, 5)
    example = (torch.ones(2, min(count, 2), dtype=torch.int64), [state] if is_ours else state)
    rnn = next(module for module in model.modules() if hasattr(module, "num_directions")).eval()
    no_state, named = is_ours and kind == "step", {0: Dim("batch")}
    of_all = ({**named, 1: Dim("time")} if kind == "sequence" else named, {1: Dim.AUTO})
    shapes = None if is_ours else of_all
    session = Session(path, model, example[0][:1] if no_state else example, kind=kind, dynamic_shapes=shapes)
    assert (model.training, rnn.training) == (True, False)
    inputs, outputs = session.inputs, session.outputs
    size = [1, "batch", 1, 4] if is_ours else [1, "batch", 5]
    assert list(inputs.values()) == [["batch", 1 if kind == "step" else "time"], size]
    names = ["ids", "state_0", "out", "state_out_0"] if is_ours else ["tokens", "state", "out", "h_out"]
    assert [*inputs, *outputs] == names
    model.eval().requires_grad_(False)
    tokens, state = torch.randint(7, (3, count)), torch.randn(1, 3, *state.shape[2:])
    out, last = model(tokens, [state] if is_ours else state)
    assert_equal(session(tokens, state), [out, last], **TOLERANCE)


def test_an_empty_example_an_empty_chunk_and_a_link(path):
    model, h, link = mingru.MinGRU(3, 4, 2), torch.randn(2, 3, 1, 4), path.with_name("link.onnx")
    link.symlink_to(path)
    export(model, (torch.zeros(0, 5, 3), h[:, :0]), link)
    assert link.is_symlink() and not path.is_symlink()
    for steps in (0, 1, 4):
        x = torch.randn(3, steps, 3)
        with torch.no_grad():
            assert_equal(Session(path)(x, h), model(x, h), **TOLERANCE)


class Fails(torch.nn.Module):
    """Not by its numbers, but by what it does with them."""

    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


# The exporter's second attempt.
@pytest.mark.filterwarnings("ignore")
def test_a_failure_leaves_what_was_there(path):
    path.write_text("older")
    model = Fails().train()
    refuses(torch.onnx.OnnxExporterError, "", export, model, torch.zeros(2, 3), path)
    assert path.read_text() == "older" and [*path.parent.iterdir()] == [path] and model.training


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_without_onnx(package, path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r'or "\.\[onnx\]" in a clone') as caught:
        export(mingru.MinGRU(3, 4), torch.randn(1, 1, 3), path, kind="step")
    assert caught.value.name == package and not path.exists()


# Those that are refused before the packages are imported: data/refusals.txt.
STEP, MOST = {"kind": "step"}, {"max_steps": 4}
BAD_CALLS = {
    r"x must be of one step .*, got \(2, 5, 3\); use x.narrow\(1, 0, 1\)": (RNN, X, STEP),
    "max_steps must be at least the 5 steps of the example, got 4": (RNN, X, MOST),
    "max_steps must be None because x has no time": (mingru.MinGRUCell(3, 4), X[0], MOST),
    r"must be \(x, h, ...\) because kind is 'step' and the model is not a class of .*, got only x": (Pieces(), X, STEP),
}


def test_bad_calls(path):
    for message, (model, example, options) in BAD_CALLS.items():
        refuses(ValueError, f"^export.onnx: .*{message}", export, model, example, path, **options)
    refuses(ValueError, r"MinGRU: x must be \(B, S, 3\)", export, RNN, torch.zeros(2, 5, 4), path)
    for folder in (path.parent, ""):
        refuses(ValueError, "path must be of a file, got .*; add a name", export, RNN, X, folder)
    assert not path.exists()
