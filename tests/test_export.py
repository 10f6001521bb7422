"""`mingru.export.onnx` as one calls it: names, examples, models of one's own, and bad input."""

import sys

import pytest
import torch
from torch import nn

import mingru

onnx_package = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

onnx = mingru.export.onnx


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


def shapes(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return ({each.name: each.shape for each in found} for found in (session.get_inputs(), session.get_outputs()))


def run(path, *args):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {each.name: arg.numpy() for each, arg in zip(session.get_inputs(), args, strict=True)}
    return [torch.from_numpy(out) for out in session.run(None, given)]


class Tagger(nn.Module):
    """A user's model: a state of torch's shape, names of its own."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.rnn = mingru.drop_in.GRU(3, 5, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, 2)

    def forward(self, tokens, state=None):
        out, state = self.rnn(self.embedding(tokens), state)
        return self.head(self.drop(out)), state


def test_one_file_and_nothing_else(path, capfd):
    """Silent, with no notes of the machine that wrote it."""
    assert onnx(mingru.MinGRU(3, 4), torch.randn(1, 1, 3), path, kind="step") is None
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert capfd.readouterr() == ("", "")
    model = onnx_package.load(path)
    assert not any(node.metadata_props for node in model.graph.node)
    assert b"site-packages" not in path.read_bytes()
    assert {node.domain for node in model.graph.node} == {""}


STACK = mingru.Stack([mingru.MinGRU(3, 4, batch_first=False), mingru.MinGRU(4, 5, batch_first=False)])
STATES = {"_0": [1, "batch", 1, 4], "_1": [1, "batch", 1, 5]}


def named(name, sizes):
    return {name + end: size for end, size in sizes.items()}


@pytest.mark.parametrize(
    ("model", "x", "size", "out", "states"),
    [
        (mingru.MinGRU(3, 4, 2), (1, 1, 3), ["batch", 1, 3], ["batch", 1, 4], {"": [2, "batch", 1, 4]}),
        (STACK, (1, 1, 3), [1, "batch", 3], [1, "batch", 5], STATES),
        (mingru.drop_in.GRUCell(3, 4), (1, 3), ["batch", 3], None, {"": ["batch", 4]}),
        (mingru.models.Block(3), (1, 1, 3), ["batch", 1, 3], ["batch", 1, 3], {"_0": [1, "batch", 1, 3]}),
    ],
)
def test_names_and_sizes_of_a_step(model, x, size, out, states, path):
    onnx(model, torch.randn(x), str(path), kind="step")
    inputs, outputs = shapes(path)
    assert inputs == {"x": size, **named("h", states)}
    assert outputs == {**({} if out is None else {"out": out}), **named("h_out", states)}


DIM = torch.export.Dim.AUTO
RNN, X = mingru.MinGRU(3, 4, 2).requires_grad_(False), torch.randn(2, 5, 3)
ALL_SIZES = {"kind": "sequence", "dynamic_shapes": ({0: torch.export.Dim("rows")},)}
# An argument that is None has no dimensions.
ALONE, SAME = (torch.zeros(1, 4), None, torch.zeros(1, 4)), ({1: torch.export.Dim("time")}, None, {1: DIM})
ONE_STATE = (torch.randn(3, 1, 3), torch.zeros(1, 1, 1, 4))


class Pieces(nn.Module):
    def forward(self, out):
        return {"a": out + 1, "b": (out * 2, out - 1)}


class Echo(nn.Module):
    def forward(self, out):
        return out + 1


class Alone(nn.Module):
    def forward(self, x, mask=None, h=None):
        return x if h is None else (x + h, h)


@pytest.mark.parametrize(
    ("model", "example", "options", "args", "inputs"),
    [
        # Without a batch.
        (mingru.MinGRUCell(3, 4), torch.randn(3), {"kind": "step"}, [(3,), (4,)], {"x": [3], "h": [4]}),
        # One state for all sequences and layers.
        (RNN, ONE_STATE, {"kind": "step"}, [(5, 1, 3), (2, 5, 1, 4)], {"x": ["batch", 1, 3], "h": [2, "batch", 1, 4]}),
        (RNN, X, ALL_SIZES, [(7, 5, 3)], {"x": ["rows", 5, 3]}),
        # As many steps as the example has.
        (RNN, X, {"max_steps": 5}, [(7, 5, 3)], {"x": ["batch", "time", 3]}),
        (Pieces(), X[0], {"dynamic_shapes": ({1: torch.export.Dim("time")},)}, [(5, 9)], {"out": [5, "time"]}),
        # An output has another name than an input. The sizes of a model of one's own are those of the example.
        (Echo(), X[0], {}, [(5, 3)], {"out": [5, 3]}),
        (Alone(), ALONE, {"dynamic_shapes": SAME}, [(1, 6), (1, 6)], {"x": [1, "time"], "h": [1, "time"]}),
    ],
)
def test_the_file_computes_what_the_model_does(model, example, options, args, inputs, path):
    onnx(model, example, path, **options)
    assert next(shapes(path)) == inputs
    given = [torch.randn(size) for size in args]
    with torch.no_grad():
        expected = model(**dict(zip(inputs, given, strict=True))) if isinstance(model, Alone) else model(*given)
    torch.testing.assert_close(run(path, *given), torch.utils._pytree.tree_leaves(expected))


@pytest.mark.parametrize("kind", ["step", pytest.param("sequence", marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_ours", [False, True])
def test_a_model_of_tokens(is_ours, kind, path):
    """As it is in use, without dropout, and in the modes in which it was afterwards."""
    model = mingru.models.LanguageModel(7, 4, 1, dropout=0.5) if is_ours else Tagger()
    # The example of a step of a class of this library needs no state, and then no batch of 2.
    count, state = {"step": 1, "sequence": 50}[kind], torch.zeros(1, 2, 1, 4) if is_ours else torch.zeros(1, 2, 5)
    example = (torch.ones(2, min(count, 2), dtype=torch.int64), [state] if is_ours else state)
    rnn = next(module for module in model.modules() if hasattr(module, "num_directions")).eval()
    no_state, named = is_ours and kind == "step", {0: torch.export.Dim("batch")}
    of_all = ({**named, 1: torch.export.Dim("time")} if kind == "sequence" else named, {1: DIM})
    onnx(model, example[0][:1] if no_state else example, path, kind=kind, dynamic_shapes=None if is_ours else of_all)
    assert (model.training, rnn.training) == (True, False)
    inputs, outputs = shapes(path)
    size = [1, "batch", 1, 4] if is_ours else [1, "batch", 5]
    assert list(inputs.values()) == [["batch", 1 if kind == "step" else "time"], size]
    end = "_0" if is_ours else ""
    assert [*inputs, *outputs] == [
        "ids" if is_ours else "tokens",
        f"state{end}",
        "out",
        f"{'state' if is_ours else 'h'}_out{end}",
    ]
    model.eval().requires_grad_(False)
    tokens, state = torch.randint(7, (3, count)), torch.randn(1, 3, *state.shape[2:])
    out, last = model(tokens, [state] if is_ours else state)
    torch.testing.assert_close(run(path, tokens, state), [out, *([last] if torch.is_tensor(last) else last)])


class Fails(nn.Module):
    """Not by its numbers, but by what it does with them."""

    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


# The exporter's second attempt.
@pytest.mark.filterwarnings("ignore")
def test_a_failure_leaves_what_was_there(path):
    path.write_text("older")
    model = Fails().train()
    with pytest.raises(torch.onnx.OnnxExporterError):
        onnx(model, torch.zeros(2, 3), path)
    assert path.read_text() == "older" and [*path.parent.iterdir()] == [path]
    assert model.training


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_without_onnx(package, path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r'or "\.\[onnx\]" in a clone') as caught:
        onnx(mingru.MinGRU(3, 4), torch.randn(1, 1, 3), path, kind="step")
    assert caught.value.name == package and not path.exists()


# Those that are refused before the packages are imported: data/refusals.txt.
BAD_CALLS = {
    r"x must be of one step .*, got \(2, 5, 3\); use x.narrow\(1, 0, 1\)": (RNN, X, "step"),
    r"must be \(x, h, ...\) because kind is 'step' and the model is not a class of .*, got only x": (Echo(), X, "step"),
}


def test_bad_calls(path):
    for message, (model, example, kind) in BAD_CALLS.items():
        with pytest.raises(ValueError, match=f"^export.onnx: .*{message}"):
            onnx(model, example, path, kind=kind)
    with pytest.raises(ValueError, match=r"MinGRU: x must be \(B, S, 3\)"):
        onnx(RNN, torch.zeros(2, 5, 4), path)
    assert not path.exists()
