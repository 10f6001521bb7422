"""`mingru.export.onnx` as one calls it: names, examples, models of one's own, and bad input."""

import io
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

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


@pytest.mark.slow
def test_names_and_sizes_of_a_step(path):
    onnx(mingru.MinGRU(3, 4, 2), torch.randn(1, 1, 3), str(path), kind="step")
    inputs, outputs = shapes(path)
    assert inputs == {"x": ["batch", 1, 3], "h": [2, "batch", 1, 4]}
    assert outputs == {"out": ["batch", 1, 4], "h_out": [2, "batch", 1, 4]}


def test_names_of_lists_of_states(path):
    stack = mingru.Stack([mingru.MinGRU(3, 4, batch_first=False), mingru.MinGRU(4, 5, batch_first=False)])
    onnx(stack, torch.randn(1, 1, 3), path, kind="step")
    inputs, outputs = shapes(path)
    assert inputs == {"x": [1, "batch", 3], "h_0": [1, "batch", 1, 4], "h_1": [1, "batch", 1, 5]}
    assert outputs == {"out": [1, "batch", 5], "h_out_0": [1, "batch", 1, 4], "h_out_1": [1, "batch", 1, 5]}


def test_names_of_cells(path):
    onnx(mingru.drop_in.GRUCell(3, 4), torch.randn(1, 3), path, kind="step")
    inputs, outputs = shapes(path)
    assert inputs == {"x": ["batch", 3], "h": ["batch", 4]} and outputs == {"h_out": ["batch", 4]}


def test_without_a_batch(path):
    cell = mingru.MinGRUCell(3, 4).requires_grad_(False)
    onnx(cell, torch.randn(3), path, kind="step")
    x, h = torch.randn(3), torch.randn(4)
    torch.testing.assert_close(run(path, x, h), [cell(x, h)])


def test_an_example_state_for_all_sequences(path):
    rnn = mingru.MinGRU(3, 4, 2).requires_grad_(False)
    onnx(rnn, (torch.randn(3, 1, 3), torch.zeros(1, 1, 1, 4)), path, kind="step")
    x, h = torch.randn(5, 1, 3), torch.randn(2, 5, 1, 4)
    torch.testing.assert_close(run(path, x, h), list(rnn(x, h)))


@pytest.mark.parametrize("args", [(torch.tensor([[1]]),), (torch.tensor([[1], [2]]), torch.zeros(1, 2, 5))])
def test_a_model_of_ones_own_in_steps(args, path):
    """As it is in use, without dropout, and in the modes in which it was afterwards."""
    model = Tagger()
    model.rnn.eval()
    onnx(model, args, path, kind="step")
    assert (model.training, model.rnn.training, model.drop.training) == (True, False, True)
    inputs, outputs = shapes(path)
    assert inputs == {"tokens": ["batch", 1], "state": [1, "batch", 5]}
    assert list(outputs) == ["out", "h_out"]
    model.eval().requires_grad_(False)
    tokens, state = torch.tensor([[1], [4], [6]]), torch.randn(1, 3, 5)
    torch.testing.assert_close(run(path, tokens, state), list(model(tokens, state)))


@pytest.mark.slow
def test_a_model_of_ones_own_over_sequences(path):
    model = Tagger()
    onnx(model, torch.tensor([[1]]), path, max_steps=64)
    inputs, outputs = shapes(path)
    assert inputs == {"tokens": ["batch", "time"]}
    assert list(outputs.values()) == [["batch", "time", 2], [1, "batch", 5]]
    model.eval().requires_grad_(False)
    tokens = torch.randint(7, (3, 50))
    torch.testing.assert_close(run(path, tokens), list(model(tokens)))


def test_sizes_that_one_names(path):
    rnn = mingru.MinGRU(3, 4).requires_grad_(False)
    onnx(rnn, torch.randn(2, 6, 3), path, dynamic_shapes=({0: torch.export.Dim("rows")},))
    inputs, _ = shapes(path)
    assert inputs == {"x": ["rows", 6, 3]}
    x = torch.randn(5, 6, 3)
    torch.testing.assert_close(run(path, x), list(rnn(x)))


class Pieces(nn.Module):
    def forward(self, out):
        return {"a": out + 1, "b": (out * 2, out - 1)}


class Echo(nn.Module):
    def forward(self, out):
        return out + 1


def test_names_of_other_outputs(path):
    onnx(Pieces(), torch.zeros(2, 3), path, kind="sequence")
    inputs, outputs = shapes(path)
    assert list(inputs) == ["out"] and list(outputs) == ["out_0", "out_1", "out_2"]
    x = torch.randn(4, 9)
    torch.testing.assert_close(run(path, x), [x + 1, x * 2, x - 1])


def test_an_output_named_as_an_input(path):
    onnx(Echo(), torch.zeros(2, 3), path)
    x = torch.randn(4, 9)
    torch.testing.assert_close(run(path, x), [x + 1])


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
    with pytest.raises(ModuleNotFoundError, match=r'run pip install "\.\[onnx\]" in a clone') as caught:
        onnx(mingru.MinGRU(3, 4), torch.randn(1, 1, 3), path, kind="step")
    assert caught.value.name == package and not path.exists()


RNN = mingru.MinGRU(3, 4)
X = torch.zeros(2, 5, 3)


class Alone(nn.Module):
    def forward(self, x, h=None):
        return x if h is None else x + h


class Masked(nn.Module):
    """Its second argument is no state."""

    def __init__(self):
        super().__init__()
        self.rnn = mingru.MinGRU(3, 4)

    def forward(self, x, mask=None, h=None):
        return self.rnn(x if mask is None else x * mask, h)


BOTH = mingru.MinGRU(3, 4, bidirectional=True)
TRITON = {"max_batch_size": 8}


@pytest.mark.parametrize(
    ("error", "message", "model", "example", "options"),
    [
        (ValueError, "kind must be 'sequence' or 'step', got 'steps'", RNN, X, {"kind": "steps"}),
        (ValueError, "kind must be 'sequence' or 'step', got None", RNN, X, {"kind": None}),
        (TypeError, "model must be a torch.nn.Module, got type", mingru.MinGRU, X, {}),
        (TypeError, "example_inputs must be a tensor x, or a tuple .*, got list", RNN, [X], {}),
        (TypeError, "got PackedSequence; ONNX has no packed sequences", RNN, pack_sequence([X[0]]), {}),
        (ValueError, r"example_inputs must be .*, got \(\)", RNN, (), {}),
        (TypeError, r"example_inputs\[0\] must be a tensor, got NoneType", RNN, (None,), {}),
        (TypeError, r"example_inputs\[1\] must be tensors or None, got int", RNN, (X, 3), {}),
        (ValueError, r"example_inputs\[0\] must be a non-empty tensor, got \(2, 0, 3\)", RNN, X[:, :0], {}),
        (ValueError, r"x must be of one step .*, got \(2, 5, 3\); use x.narrow\(1, 0, 1\)", RNN, X, {"kind": "step"}),
        (
            ValueError,
            "max_steps must be None because kind is 'step', got 4",
            RNN,
            X[:, :1],
            {"kind": "step", "max_steps": 4},
        ),
        (
            ValueError,
            r"max_steps must be None because dynamic_shapes is given, got 9; use Dim\(\.\.\., max=9\)",
            RNN,
            X,
            {"dynamic_shapes": (None,), "max_steps": 9},
        ),
        (ValueError, "max_steps must be at least the 5 steps of the example, got 4", RNN, X, {"max_steps": 4}),
        (ValueError, "max_steps must be at least 2, got 1", RNN, X, {"max_steps": 1}),
        (TypeError, "max_steps must be an int, got 4.0", RNN, X, {"max_steps": 4.0}),
        (TypeError, "no argument 'opset_version'; torch chooses the opset; .*", RNN, X, {"opset_version": 17}),
        (ValueError, "max_steps must be None because x has no time", mingru.MinGRUCell(3, 4), X[0], {"max_steps": 4}),
        (ValueError, r"x must be \(B, S, \.\.\.\), got \(3,\)", Echo(), torch.zeros(3), {}),
        (
            ValueError,
            r"x must be of size 2 or more in dimension 0, .*, got \(1, 4\); use a larger example",
            Alone(),
            (torch.zeros(1, 4),) * 2,
            {},
        ),
        (ValueError, r"must be \(x, h\) because kind is 'step'", Pieces(), torch.zeros(2, 3), {"kind": "step"}),
        (ValueError, r"must be \(x, h\) because kind is 'step' and .* forward", Masked(), X[:, :1], {"kind": "step"}),
        (ValueError, "max_batch_size must be at least 1, got 0", RNN, X[:, :1], {"max_batch_size": 0}),
        (TypeError, r"model must be .* initial\(batch\), got Tagger", Tagger(), X[:, :1], TRITON),
        (TypeError, "model must be of one direction, .*, got MinGRU", BOTH, X[:, :1], TRITON),
        (ValueError, r"x must be of a batch and features, got \[3\]", mingru.MinGRUCell(3, 4), X[0, 0], TRITON),
    ],
)
def test_bad_input(error, message, model, example, options, path):
    function, name = (mingru.export.triton, "triton") if "max_batch_size" in options else (onnx, "onnx")
    with pytest.raises(error, match=f"^export.{name}: .*{message}"):
        function(model, example, path, **options)
    assert not path.exists()


def test_bad_paths(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"path must be in an existing folder, got .*; create the folder first"):
        onnx(RNN, X, tmp_path / "missing" / "model.onnx")
    with pytest.raises(ValueError, match="path must be the path of a file, got the folder"):
        onnx(RNN, X, tmp_path / "folder")
    with pytest.raises(TypeError, match=r"path must be a str or os.PathLike, got BytesIO"):
        onnx(RNN, X, io.BytesIO())


@pytest.mark.parametrize("wrap", [torch.jit.script, torch.compile])
def test_a_scripted_or_compiled_model(wrap, path):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, .*; pass the original module"):
        onnx(wrap(RNN), X, path)


def test_what_the_model_refuses(path):
    with pytest.raises(ValueError, match=r"MinGRU: x must be \(B, S, 3\)"):
        onnx(RNN, torch.zeros(2, 5, 4), path)
