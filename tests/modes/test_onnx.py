"""Every class as an ONNX file, run by ONNX Runtime, beside the module itself."""

import pytest
import torch
from cases import CASES, assert_equal, every_case_slowly, parametrized, small_chunks, tensors

import mingru

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.usefixtures("_fresh_compiler")

# ONNX Runtime rounds as it likes.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


class Session:
    """An exported module, called as the module is; its outputs are flat."""

    def __init__(self, path, module, args, **options):
        mingru.export.onnx(module, args, path, **options)
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


def is_of_both_directions(module):
    return any(getattr(each, "num_directions", 1) == 2 for each in module.modules())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


def in_use(case):
    return case.make().requires_grad_(False)


@pytest.mark.mode("ONNX, whole sequence")
@every_case_slowly
def test_any_batch_and_any_length(case, path):
    module = in_use(case)
    with small_chunks():
        session = Session(path, module, (case.x(), case.h()), max_steps=None if case.time_dim is None else 20)
    for batch, steps in [(1, 1), (3, 17), (2, 20)]:
        x, h = case.x(batch, steps), case.h(batch)
        assert_equal(session(x, h), tensors(module(x, h)), **TOLERANCE)


@pytest.mark.mode("ONNX, whole sequence")
@pytest.mark.slow
def test_long_and_both_ways(path):
    module = mingru.MinLSTM(3, 4, bidirectional=True).requires_grad_(False)
    session = Session(path, module, (torch.randn(2, 5, 3), torch.randn(2, 2, 1, 4)), max_steps=512)
    for batch, steps in [(1, 1), (3, 17), (3, 300), (1, 512)]:
        x, h = torch.randn(batch, steps, 3), torch.randn(2, batch, 1, 4)
        assert_equal(session(x, h), tensors(module(x, h)), **TOLERANCE)


@pytest.mark.slow
def test_lengths(path):
    module = mingru.MinGRU(3, 4, bidirectional=True).requires_grad_(False)
    with small_chunks():
        session = Session(path, module, (torch.randn(1, 7, 3), None, None, torch.tensor([3])), max_steps=20)
    assert session.inputs == {"x": ["batch", "time", 3], "lengths": ["batch"]}
    for batch, steps in [(1, 1), (3, 17), (2, 20)]:
        x, lengths = torch.randn(batch, steps, 3), torch.randint(0, steps + 1, (batch,))
        assert_equal(session(x, lengths), tensors(module(x, lengths=lengths)), **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_sequence_beyond_the_bound_does_not_pass_for_right(bidirectional, path):
    module = mingru.MinGRU(3, 4, bidirectional=bidirectional).requires_grad_(False)
    session = Session(path, module, torch.randn(1, 7, 3), max_steps=60)
    for steps in (60, 100, 1000):
        x = torch.randn(1, steps, 3)
        out, last = session(x)
        if steps == 1000:
            assert last.isnan().all()
            assert out.isnan().any()
        if not out.isnan().any():
            assert_equal([out, last], tensors(module(x)), **TOLERANCE)


@pytest.mark.mode("ONNX, whole sequence")
@pytest.mark.slow
def test_without_a_bound_and_without_a_state(path):
    module = mingru.MinGRU(3, 4, batch_first=False).requires_grad_(False)
    session = Session(path, module, torch.randn(1, 1, 3))
    assert session.inputs == {"x": ["time", "batch", 3]}
    assert session.outputs == {"out": ["time", "batch", 4], "h_out": [1, "batch", 1, 4]}
    for batch, steps in [(1, 1), (2, 300), (1, 5000)]:
        x = torch.randn(steps, batch, 3)
        assert_equal(session(x), tensors(module(x)), **TOLERANCE)


@pytest.mark.mode("ONNX, whole sequence")
@pytest.mark.slow
def test_with_resets_and_times(path):
    module = mingru.MinGRU(3, 4, learn_initial_state=True, min_decay=0.3).requires_grad_(False)

    def given(batch, steps):
        reset, dt = torch.rand(batch, steps) < 0.1, 2 * torch.rand(batch, steps)
        return torch.randn(batch, steps, 3), torch.randn(1, batch, 1, 4), reset, None, dt

    with small_chunks():
        session = Session(path, module, given(1, 7), max_steps=100)
    assert list(session.inputs) == ["x", "h", "reset", "dt"]
    for size in [(1, 1), (3, 17), (2, 100)]:
        args = given(*size)
        assert_equal(session(*args), tensors(module(*args)), **TOLERANCE)


@pytest.mark.mode("ONNX, single step")
@parametrized(CASES, quick=["MinGRU"])
def test_steps_that_follow_each_other_are_one_pass(case, path):
    """The state that comes out goes in again. What the model returns was the example for it."""
    module, num_steps = in_use(case), 20
    session = Session(path, module, case.x(2, 1), kind="step")
    h = state = case.h(3)
    time = case.time_dim
    whole = case.x(3, num_steps)
    xs = [case.x(3) for _ in range(num_steps)] if time is None else whole.split(1, time)
    outs, expected = [], []
    for x in xs:
        outputs = session(x, h)
        outs.append(outputs[0])
        h = outputs[-len(h) :] if isinstance(h, (list, tuple)) else outputs[-1]
        if time is None or is_of_both_directions(module):
            # Step by step is the only way, or another one than all at once.
            result = module(x, state)
            expected.append(tensors(result)[0])
            state = result if time is None else result[1]
    if time is None or is_of_both_directions(module):
        assert_equal([outs, h], [expected, state], **TOLERANCE)
    else:
        assert_equal([torch.cat(outs, time), h], module(whole, state), **TOLERANCE)


@pytest.mark.slow
@pytest.mark.mode("ONNX, single step")
def test_a_step_with_a_reset_and_a_time(path):
    module = mingru.MinGRU(3, 4, 2).requires_grad_(False)
    args = torch.randn(1, 1, 3), None, torch.ones(1, 1, dtype=torch.bool), None, torch.ones(1, 1)
    session = Session(path, module, args, kind="step")
    assert session.inputs == {"x": ["batch", 1, 3], "h": [2, "batch", 1, 4], "reset": ["batch", 1], "dt": ["batch", 1]}
    x, h, reset = torch.randn(4, 1, 3), torch.randn(2, 4, 1, 4), torch.tensor([[True], [False], [False], [True]])
    args = x, h, reset, None, torch.tensor([[1e-4], [0.5], [1.0], [3.0]])
    assert_equal(session(*args), tensors(module(*args)), **TOLERANCE)
