"""Every class as an ONNX file, run by ONNX Runtime, beside the module itself."""

from contextlib import nullcontext

import pytest
import torch
from cases import assert_equal, small_chunks, tensors
from mode import given, mode
from torch.export import Dim

import mingru

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.usefixtures("_fresh_compiler")

# ONNX Runtime rounds as it likes.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


class Session:
    """An exported module, called as the module is; its outputs are flat."""

    def __init__(self, path, module, args, export=mingru.export.onnx, **options):
        export(module, args, path, **options)
        self.model = onnx.load(path)
        onnx.checker.check_model(self.model, full_check=True)
        threads = onnxruntime.SessionOptions()
        threads.intra_op_num_threads = threads.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, threads, providers=["CPUExecutionProvider"])
        self.inputs = {each.name: each.shape for each in self.session.get_inputs()}

    def __call__(self, *args):
        given = zip(self.inputs, tensors(args), strict=True)
        return [torch.from_numpy(each) for each in self.session.run(None, {name: x.numpy() for name, x in given})]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


def in_use(case):
    return case.make().requires_grad_(False)


@mode("ONNX, whole sequence", [])
def test_any_batch_and_any_length(case, path):
    module, options = in_use(case), {"max_steps": None if case.time_dim is None else 20}
    if not isinstance(module, mingru.modules.Layer):
        options["dynamic_shapes"] = case.dynamic(Dim.AUTO, Dim.AUTO)
    with small_chunks():
        session = Session(path, module, given(case, count=2), **options)
    for batch, steps in [(1, 1), (3, 17), (2, 20)]:
        x, h = given(case, batch, steps, 2)
        assert_equal(session(x, h), tensors(module(x, h)), **TOLERANCE)


# Module, arguments beside x, options of the export, and batches and numbers of steps.
CALLS = {
    "long": (lambda: mingru.MinLSTM(3, 4, bidirectional=True), ("h",), {"max_steps": 512}, [(3, 300), (1, 512)]),
    "no bound": (lambda: mingru.MinGRU(3, 4, batch_first=False), (), {}, [(2, 300), (1, 5000)]),
    "lengths": (lambda: mingru.MinGRU(3, 4, bidirectional=True), ("lengths",), {"max_steps": 20}, [(3, 17), (2, 20)]),
    "resets and times": (
        lambda: mingru.MinGRU(3, 4, learn_initial_state=True, min_decay=0.3),
        *(("h", "reset", "dt"), {"max_steps": 100}, [(3, 17), (2, 100)]),
    ),
    "quaternions": (
        lambda: mingru.MinGRU(3, 8, gate="mixed", bidirectional=True, min_decay=0.1),
        *(("h", "reset", "lengths", "dt"), {"max_steps": 40}, [(3, 17), (2, 40)]),
    ),
    "a step of quaternions": (
        lambda: mingru.MinGRU(3, 8, 2, gate="mixed", min_decay=0.3),
        *(("h", "reset", "dt"), {"kind": "step"}, [(4, 1)]),
    ),
    "a node of ONNX": (
        lambda: mingru.BlockGRU(3, 4, 2, block_size=2, bidirectional=True),
        *(("h", "lengths"), {}, [(3, 17), (2, 300)]),
    ),
    "a loop of ONNX": (
        lambda: mingru.BlockGRU(3, 4, 2, block_size=2, bidirectional=True),
        *(("h", "reset", "lengths"), {}, [(3, 17), (2, 300)]),
    ),
    "a step": (lambda: mingru.MinGRU(3, 4, 2), ("h", "reset", "dt"), {"kind": "step"}, [(4, 1)]),
}


QUICK = "a step of quaternions", "a node of ONNX", "a step"
ROWS = [pytest.param(*row, id=name, marks=[] if name in QUICK else pytest.mark.slow) for name, row in CALLS.items()]


@pytest.mark.parametrize(("make", "names", "options", "sizes"), ROWS)
def test_calls(make, names, options, sizes, path):
    module = make().requires_grad_(False)

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
@pytest.mark.filterwarnings(
    "ignore:Exporting a model to ONNX with a batch_size other than 1", "ignore::DeprecationWarning"
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize(
    "make",
    [
        lambda: mingru.MinGRU(3, 4, 2, gate=["rotation", "quaternion"]),
        lambda: mingru.drop_in.GRU(3, 4, bidirectional=True),
        lambda: mingru.BlockGRU(3, 4, 2, block_size=2, bidirectional=True),
        lambda: mingru.MinConv2dGRU(3, 4, kernel_size=3),
    ],
)
def test_the_old_exporter_of_torch(make, steps, path):
    """A length of 1 is fixed, as other exporters fix it."""
    module = make().requires_grad_(False)
    space = (6, 5) if isinstance(module, mingru.MinConv2dGRU) else ()
    axes = {"x": {0: "first", 1: "second"} if steps > 1 else {}}
    x = torch.randn(steps, steps, 3, *space)
    session = Session(path, module, (x,), torch.onnx.export, dynamo=False, input_names=["x"], dynamic_axes=axes)
    for size in [(17, 2), (100, 1), (1, 20)] if steps > 1 else [(1, 1)]:
        x = torch.randn(*size, 3, *space)
        assert_equal(session(x), tensors(module(x)), **TOLERANCE)


class WithResets(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = mingru.BlockGRU(3, 4, 2, block_size=2, bidirectional=True)

    def forward(self, x, reset, lengths=None):
        return self.rnn(x, reset=reset, lengths=lengths)


@pytest.mark.filterwarnings("ignore")
def test_the_old_exporter_with_resets(path):
    """Of any number; it cannot export lengths, and the error says what can."""
    module, sizes = WithResets().requires_grad_(False), {0: "batch", 1: "time"}
    names = {"input_names": ["x", "reset"], "dynamic_axes": {"x": sizes, "reset": sizes}}
    args = torch.randn(2, 5, 3), torch.rand(2, 5) < 0.3
    session = Session(path, module, args, torch.onnx.export, dynamo=False, **names)
    for batch, steps in [(2, 5), (3, 9), (1, 1)]:
        args = torch.randn(batch, steps, 3), torch.rand(batch, steps) < 0.3
        assert_equal(session(*args), tensors(module(*args)), **TOLERANCE)
    with pytest.raises(ValueError, match="lengths must be None in an export"):
        Session(path, module, (*args, torch.tensor([1])), torch.onnx.export, dynamo=False)


class Bands(torch.nn.Module):
    """A layer inside a program: over the bands of each frame, in both directions."""

    def __init__(self):
        super().__init__()
        self.rnn = mingru.MinGRU(8, 4, bidirectional=True)

    def forward(self, frames, reset):
        return self.rnn(frames.transpose(1, 2), reset=reset)[0]


SIZES = ({0: Dim("frames"), 2: Dim("bands")}, {0: Dim.AUTO, 1: Dim.AUTO})


# Those of the exporters of torch.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("export", "options", "most"),
    [
        (torch.onnx.export, {"dynamo": False, "input_names": ["frames", "reset"]}, 900),
        (torch.onnx.export, {"dynamo": True, "verbose": False}, 250),
        (mingru.export.onnx, {"max_steps": 33, "dynamic_shapes": SIZES}, 400),
    ],
)
def test_a_short_sequence_has_few_nodes(export, options, most, path):
    """Of a known length, only the steps and levels that it needs."""
    module = Bands().requires_grad_(False).eval()
    args = (torch.randn(3, 8, 33), torch.rand(3, 33) < 0.2)
    args[0][1, :, 7] = torch.nan  # which does not pass a reset
    session = Session(path, module, args, export, **options)
    assert_equal(session(*args), [module(*args)], equal_nan=True, **TOLERANCE)
    assert len(session.model.graph.node) < most


@mode("ONNX, single step", ["MinGRU"])
def test_steps_that_follow_each_other_are_one_pass(case, path):
    """The state that comes out goes in again. What the model returns was the example for it."""
    module = in_use(case)
    session = Session(path, module, given(case, 2, 1)[0], kind="step")
    h = state = given(case, 3)[1]
    for _ in range(20):
        x = given(case, 3, 1)[0]
        outputs, expected = session(x, h), module(x, state)
        assert_equal(outputs, expected, **TOLERANCE)
        state = expected if case.time_dim is None else expected[1]
        h = case.of_states(outputs[-len(tensors(state)) :])
