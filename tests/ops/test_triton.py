"""What only the Triton kernels promise; `test_recurrence.py` tests their numbers, with those of all other backends.

With TRITON_INTERPRET=1 they run in Triton's interpreter, on the CPU and slowly; otherwise on a GPU, if there is one.
"""

import itertools
import math
import re
import warnings

import calls
import pytest
import reference
import torch
from calls import INTERPRETED, Row, drawn, make, parts_of, states
from cases import grid, refuses
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import mingru
from mingru.ops import route, spec_of
from mingru.ops.backends.triton import device, launch
from mingru.ops.backends.triton.tiling import Tiling

WHY_NOT = mingru.backends()["triton"]
pytestmark = pytest.mark.skipif(WHY_NOT is not True, reason=str(WHY_NOT))
if WHY_NOT is True:
    from mingru.ops.backends.triton import kernels
DEVICE = calls.device_of("triton" if WHY_NOT is True else "torch")
MINGRU = spec_of("mingru", "positive", False, 0.0)


LANES = (127, 511, 512, 513, 1030)
# Tilings of a GPU for half widths, and many features.
SIZES = [("mingru", torch.bfloat16, 70, 16), ("minlstm", torch.float16, 70, 16), ("minlstm", torch.bfloat16, 9, 256)]
ROWS = [Row(cell, dtype=dtype, steps=steps, features=(n,), batch=1, reset=True) for cell, dtype, steps, n in SIZES]
for tiling, size in itertools.product((Tiling(1, 8, 1024, 1, 1, None), Tiling(2, 4, 1024, 2, 1, None)), LANES):
    given = {"reset": True, "reverse": tiling.segments > 1, "memory": "different strides", "steps": 9, "batch": 2}
    ROWS.append(Row("minlstm", features=(size,), tiling=tiling, **given))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_special_rows(row, use_tiling):
    use_tiling(row.tiling)
    assert calls.share_of_allowed("triton", row) <= 1


def test_the_gradient_of_dt_near_a_fixed_point_has_the_error_of_rounded_states():
    row = Row("mingru", "tanh", torch.bfloat16, dt=True, memory="one column for all", steps=40, features=(8,), batch=2)
    assert 0.3 < calls.share_of_allowed("triton", row, 13) <= 1


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has the test of all elements")
@pytest.mark.parametrize("strides", [(2**31 + 8, 8, 1), (8, 2**30 + 8, 1)])
def test_offsets_of_more_than_2_to_the_31(strides, use_tiling, tmp_path):
    """Sequences in a file of 4 GB, of which only a few bytes are written."""
    use_tiling("walk")
    memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=2**31 + 64, dtype=torch.bfloat16)
    x = memory.as_strided((2, 3, 8), strides)
    x.copy_(torch.randn(2, 3, 8))

    def results(x):
        leaf = x.requires_grad_()
        out, _ = states("triton", "mingru", [leaf, leaf], torch.zeros(2, 1, 8))
        return out, *torch.autograd.grad(out, leaf, x.detach())

    assert all(map(torch.equal, results(x), results(x.clone())))


@pytest.fixture
def _errors_of_a_gpu(monkeypatch):
    """Let exp2 and rsqrt of float32 be off as far as NVIDIA's may be. The interpreter computes them exactly."""
    if INTERPRETED:
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        for name in ("create_exp2", "create_rsqrt"):
            exact = getattr(InterpreterBuilder, name)

            def off(self, x, exact=exact):
                found = exact(self, x)
                return TensorHandle((found.data * (1 + 2.0**-22)).astype(found.data.dtype), found.dtype)

            monkeypatch.setattr(InterpreterBuilder, name, off)


@pytest.mark.usefixtures("_errors_of_a_gpu")
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize(
    "cell", ["mingru", *(pytest.param(cell, marks=pytest.mark.slow) for cell in ("mingru_rotation", "minlstm"))]
)
def test_decays_near_1(cell, timed, use_tiling, monkeypatch):
    """The state forgets so slowly that all chunks and segments count until the end."""
    use_tiling(Tiling(8, 16, 2, 3, 1, 2))
    row = Row(cell, dt=timed, min_decay=0.5 * timed, steps=500, features=(2,), batch=1)

    def slow(row, *_):
        (inputs, h, initial, _, dt, *_), weights = drawn(row)
        inputs[-2] = inputs[-2] - 9.0
        if cell == "minlstm":
            inputs[0] = inputs[0] + 4.0
        dt = None if dt is None else 0.5 + dt / 3
        return calls.Given(inputs, h.abs(), initial.abs(), None, dt), weights

    monkeypatch.setattr(calls, "drawn", slow)
    calls._truth.cache_clear()
    assert calls.share_of_allowed("triton", row) <= 1
    calls._truth.cache_clear()
    if parts_of(cell) == 1:
        given, _ = slow(row)
        found, truth = (states(name, cell, *given[:5], min_decay=row.min_decay)[0] for name in ("triton", "exact"))
        assert reference.relative_error(found, truth) <= 2e-6


@grid(cell=["mingru", "mingru_signed"], tiling=calls.TILINGS)
def test_an_infinite_state_outlives_decays_whose_product_underflows(cell, tiling, use_tiling):
    use_tiling(tiling)
    inputs, h, *_ = make(cell, 1, 60, 2, dtype=torch.float32)
    # Decays of 1e-4, of both signs if the gate is signed.
    inputs[0] = 0.05 * inputs[0] + 9.2 if cell == "mingru" else 2e-4 * inputs[0].sign()
    h[0, 0, 1] = math.inf
    for found, truth in zip(*(states(name, cell, inputs, h) for name in ("triton", "exact")), strict=True):
        assert truth[..., 1].isinf().all() and torch.equal(found[..., 1].double(), truth[..., 1])
        assert found[..., 0].isfinite().all()


# The layer with its linear map.


def layer(**options):
    return mingru.MinGRU(3, 8, device=DEVICE, **options)


@pytest.fixture
def _auto(monkeypatch):
    monkeypatch.setattr(route, "FASTEST_FIRST", ("triton", "torch"))
    monkeypatch.delenv("MINGRU_BACKEND", raising=False)


@pytest.fixture
def launches(monkeypatch):
    """Names of the passes launched since the test began."""
    names = []
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda name, *args: names.append(name) or run(name, *args))
    return names


@pytest.mark.usefixtures("_auto")
@pytest.mark.parametrize("form", ["lengths", "packed"])
def test_another_default_device(form, launches):
    rnn, x, lengths = layer(), torch.randn(3, 7, 3, device=DEVICE), torch.tensor([7, 3, 2])
    packed = (pack_padded_sequence(x, lengths, batch_first=True),)
    inputs = packed if form == "packed" else (x, None, None, lengths)
    expected, expected_last = rnn(*inputs)
    with torch.device("meta"):
        out, last = rnn(*inputs)
    assert launches == ["forward", "forward"]
    torch.testing.assert_close((out[0], last), (expected[0], expected_last))


class NoReads(TorchDispatchMode):
    """Raise an error if a value of a tensor is read, which a CUDA graph cannot capture."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function._schema.name not in {f"aten::{name}" for name in ("_local_scalar_dense", "nonzero", "equal")}
        return function(*args, **(kwargs or {}))


def language_model():
    return mingru.models.LanguageModel(5, 8, 2, expansion=1.0, conv=3, device=DEVICE)


@pytest.mark.usefixtures("_auto")
@pytest.mark.parametrize("steps", [1, 6])
def test_nothing_waits_for_values(steps):
    x = torch.randn(2, steps, 3, device=DEVICE)
    reset = torch.zeros(2, steps, dtype=torch.bool, device=DEVICE)
    rnn, lm = layer(num_layers=2, norm="rms", bidirectional=steps > 1, min_decay=0.1), language_model()
    state = lm.initial(2)
    with NoReads():
        out, h = rnn(x, None, reset)
        (out.sum() + h.sum()).backward()
        logits, _ = lm(torch.ones(2, steps, dtype=torch.int64, device=DEVICE), state, reset)
        logits.sum().backward()
    assert all(p.grad is not None for p in rnn.parameters())


# Transforms, graphs and errors.


FALLS_BACK = "using slower tensor operations. .*no C compiler found"


def as_operators_take_it(row):
    """Return the inputs, the other tensors, the cell and the order of a call."""
    inputs, h, initial, reset, dt, lengths, batch_sizes = drawn(row)[0].to(DEVICE)
    if row.cell == "complex_linear_scan":
        *inputs, h = (x.unflatten(-1, (-1, 2)) for x in (*inputs, h))
    others = [h, None if row.cell in calls.SCANS or reset is None else initial, reset, dt, batch_sizes, lengths]
    return inputs, others, ([row.cell, row.candidate], row.min_decay), [row.reverse, not row.batch_first]


WHOLE = {"reset": True, "dt": True, "min_decay": 0.1, "reverse": True, "steps": 5, "features": (4,)}
LAYOUTS = [
    pytest.param(Row(**layout, **WHOLE), marks=[pytest.mark.slow] * (layout != {"layout": "packed"}))
    for layout in ({"layout": "packed"}, {"batch_first": False}, {"layout": "lengths"})
]
SCANS = [Row(cell, "linear", reset=True, reverse=True, steps=5, features=(4,)) for cell in calls.SCANS[:2]]
SCANS += [SCANS[0]._replace(dtype=torch.bfloat16)]


@pytest.mark.parametrize("row", LAYOUTS, ids=str)
def test_operators_keep_torchs_contract(row, use_tiling):
    use_tiling("segments")
    inputs, given, how, order = as_operators_take_it(row)
    forward, backward = torch.ops.mingru.recurrence_triton_forward, torch.ops.mingru.recurrence_triton_backward
    torch.library.opcheck(forward.default, (inputs, given, *how, order))
    out, last = forward(inputs, given, *how, order)
    saved = [out, torch.randn_like(out), torch.randn_like(last)]
    for needs in ((False, False), (True, False), (False, True)):
        torch.library.opcheck(backward.default, (inputs, given, saved, *how, [*order, *needs]))


@pytest.mark.parametrize(("sizes", "rows"), [([3, 3], 5), ([1, 3], 4), ([3, 2], 40), ([3, 0], 3)])
def test_operators_refuse_batch_sizes_that_do_not_fit(sizes, rows):
    pre, h = torch.randn(rows, 4, device=DEVICE), torch.rand(sizes[0], 1, 4, device=DEVICE)
    given = [h, None, None, None, torch.tensor(sizes), None]
    with pytest.raises(ValueError, match="mingru: batch_sizes must be positive, must not increase, and sum to"):
        torch.ops.mingru.recurrence_triton_forward([pre, pre], given, ["mingru", "positive"], 0.0, [False, False])


@pytest.mark.parametrize("row", [*LAYOUTS, *SCANS, Row(dt=True, steps=5, features=(4,))], ids=str)
def test_operators_fall_back_in_a_captured_graph(row, break_kernel, use_tiling):
    """All results of the operators, whose kernel then fails."""
    use_tiling("walk")
    inputs, given, how, order = as_operators_take_it(row)

    def results():
        out, last = torch.ops.mingru.recurrence_triton_forward(inputs, given, *how, order)
        saved, needs = [out, torch.ones_like(out), torch.ones_like(last)], [row.cell not in calls.SCANS] * 2
        return out, last, *torch.ops.mingru.recurrence_triton_backward(inputs, given, saved, *how, [*order, *needs])

    expected = results()
    break_kernel()
    launch._compiled.clear()
    with pytest.warns(RuntimeWarning, match=FALLS_BACK):
        found = results()
    for one, other in zip(found, expected, strict=True):
        assert (one.stride(), one.dtype) == (other.stride(), other.dtype)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_auto")
@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 9])])
def test_compiles_without_a_graph_break(lengths, launches):
    torch.compiler.reset()
    rnn = layer(bidirectional=True)
    x, reset = torch.randn(2, 9, 3, device=DEVICE, requires_grad=True), torch.rand(2, 9, device=DEVICE) < 0.2
    # An error if a graph is of one number of steps.
    for each in (x, reset):
        torch._dynamo.mark_dynamic(each, 1)
    found, truth = [], []
    for run, results in ((torch.compile(rnn, fullgraph=True, backend="aot_eager"), found), (rnn, truth)):
        out, last = run(x, None, reset, lengths)
        results += [out, last, *torch.autograd.grad(out.square().sum(), x)]
        assert launches == ["forward"] * 2 + ["backward"] * 2
        launches.clear()
    torch.testing.assert_close(found, truth)


@pytest.mark.usefixtures("_auto")
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_compiled_programs_capture_no_cuda_graph_of_packed_sequences(form, launches):
    # They take seconds to load.
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.utils import is_cudagraph_unsafe_fx_node

    torch.compiler.reset()
    rnn, x, graphs = layer(), torch.randn(3, 7, 3, device=DEVICE), []
    given = x if form == "padded" else pack_padded_sequence(x, torch.tensor([7, 3, 2]), batch_first=True)

    def seen(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    out, last = torch.compile(rnn, fullgraph=True, backend=aot_autograd(fw_compiler=seen))(given)
    (out if form == "padded" else out.data).sum().backward()
    torch.testing.assert_close(last, rnn(given)[1])
    unsafe = [is_cudagraph_unsafe_fx_node(node) for graph in graphs for node in graph.graph.nodes]
    assert sum(unsafe) == (2 if form == "packed" else 0) and launches == ["forward", "backward", "forward"]


class Broken:
    """A kernel that fails to compile and to launch, for some calls and a number of times."""

    def __init__(self, times=math.inf, fails=lambda args: True):
        self.times, self.fails, self.kernel = times, fails, kernels.recurrence_kernel

    def warmup(self, *values, **options):
        if self.times > 0 and self.fails(dict(zip(kernels.PARAMETERS, values, strict=True))):
            self.times -= 1
            raise RuntimeError("no C compiler found\nmore lines")

    def __getitem__(self, grid):
        return lambda *values, **options: self.warmup(*values) or self.kernel[grid](*values, **options)


@pytest.fixture
def break_kernel(monkeypatch):
    return lambda *args: monkeypatch.setattr(kernels, "recurrence_kernel", Broken(*args))


def results_of(function, *leaves):
    """Return the values of a function and the gradients of its tensors."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out.abs().square().sum(), leaves)]


def second(x, **how):
    leaf = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(mingru.functional.mingru(leaf, leaf, **how).square().sum(), leaf, create_graph=True)
    return [grad, *torch.autograd.grad(grad.sum(), leaf)]


def mapped(x):
    return torch.vmap(lambda x: mingru.functional.mingru(x[None], x[None])[0])(x)


MORE = {"norm": "rms", "residual": True, "bidirectional": True}
CALLS = {
    "mingru": lambda x: results_of(mingru.functional.mingru, x, x),
    "linear_scan": lambda x: results_of(mingru.functional.linear_scan, x, x),
    "complex linear_scan": lambda x: results_of(mingru.functional.linear_scan, x + 0j, x + 0j),
    "a layer": lambda x: results_of(lambda x, t: seeded(mingru.MinGRU, 8, 4)(x, None, t > 0.5, dt=t)[0], x, x[..., 0]),
    "a plan": lambda x: results_of(lambda x: seeded(mingru.MinLSTM, 8, 4, 2, **MORE)(x, None, x[..., 0] > 0.5)[0], x),
    "images": lambda x: results_of(lambda x: seeded(mingru.MinConv1dGRU, 5, 4, 1, gate="rotation")(x[:, None])[0], x),
    "second derivatives": second,
    "second derivatives of quaternions": lambda x: second(x, kind="quaternion"),
    "vmap": lambda x: results_of(mapped, x),
    "batched gradients": torch.vmap(torch.func.grad(lambda x: mapped(x[None]).square().sum())),
}


def seeded(layer, *args, **options):
    torch.manual_seed(0)
    return layer(*args, device=DEVICE, **options)


@pytest.mark.usefixtures("_auto")
@grid(call=CALLS, fails=["every launch", "the backward pass", "the linear scan"])
def test_torch_runs_if_a_kernel_fails(call, fails, break_kernel):
    """Each reason is said once, and the numbers are those of the backend "torch"."""
    x = torch.rand(2, 5, 8, device=DEVICE)
    with mingru.use_backend("torch"):
        expected = CALLS[call](x)
    backward, scan = lambda args: args["sequences"][1] != (), lambda args: "scan" in args["CELL"]
    break_kernel(math.inf, {"the backward pass": backward, "the linear scan": scan}.get(fails, lambda args: True))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        first, again = CALLS[call](x), CALLS[call](x)
    messages = [str(warning.message) for warning in found if "slower" in str(warning.message)]
    assert len(set(messages)) == len(messages)
    if fails == "every launch":
        assert messages and all(re.search(FALLS_BACK, message) for message in messages)
    for values in (first, again):
        torch.testing.assert_close(list(values), list(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_auto")
def test_a_failure_concerns_one_kernel(break_kernel, use_tiling):
    """Other cells, dtypes and tilings run, and a kernel that has run is launched again after a failure."""
    tried = []

    def fails(args):
        tried.append((args["CELL"], args["inputs"][0][0].dtype, args["TILING"].steps))
        return tried[-1] == ("minlstm", torch.float32, 4)

    break_kernel(math.inf, fails)
    x = torch.randn(2, 5, 8, device=DEVICE)
    use_tiling("walk")
    with pytest.warns(RuntimeWarning, match=FALLS_BACK):
        mingru.functional.minlstm(x, x, x)
    mingru.functional.minlstm(x, x, x)
    assert len(tried) == 1
    mingru.functional.mingru(x, x)
    mingru.functional.minlstm(*[x.double()] * 3)
    use_tiling("chunks")
    mingru.functional.minlstm(x, x, x)
    # Each was compiled and launched.
    expected = [("mingru", torch.float32, 4), ("minlstm", torch.float64, 4), ("minlstm", torch.float32, 3)]
    assert tried[1:] == [kernel for kernel in expected for _ in range(2)] and mingru.backends()["triton"] is True
    assert len(launch._failures) == 1
    # A kernel that has run before.
    break_kernel(1)
    use_tiling("walk")
    with pytest.warns(RuntimeWarning, match=FALLS_BACK):
        mingru.functional.mingru(x, x)
    assert len(launch._failures) == 1
    torch.testing.assert_close(mingru.functional.mingru(x, x), mingru.functional.mingru(x, x, backend="triton"))


@pytest.mark.usefixtures("_auto")
def test_a_failure_while_a_graph_is_captured_is_an_error_of_that_call_alone(break_kernel, monkeypatch):
    break_kernel(1)
    x, captures = torch.randn(2, 5, 8, device=DEVICE), True
    monkeypatch.setattr(device, "is_capturing", lambda device: captures)
    refuses(RuntimeError, "call the module once before the capture", mingru.functional.mingru, x, x)
    captures = False
    assert not launch._failures
    mingru.functional.mingru(x, x)
    # One that failed before is known, and no call would help.
    break_kernel()
    launch._compiled.clear()
    for captures in (False, True):  # noqa: B007 (read by is_capturing)
        with pytest.warns(RuntimeWarning, match=FALLS_BACK):
            mingru.functional.mingru(x, x)
        route.warn_once.cache_clear()


@pytest.mark.usefixtures("_auto")
def test_a_failure_is_an_error_if_triton_was_selected(break_kernel):
    x = torch.randn(2, 5, 8, device=DEVICE, requires_grad=True)

    def by_argument():
        return mingru.functional.mingru(x, x, backend="triton")

    def in_block():
        with mingru.use_backend("triton"):
            return mingru.MinGRU(8, 4, device=DEVICE)(x)[0]

    outs = [by_argument(), in_block()]
    break_kernel()
    # The backward passes run outside of the block, as in another thread.
    for run in (by_argument, in_block, *(out.sum().backward for out in outs)):
        refuses(launch.KernelFailure, r"'triton' cannot run .*no C compiler found\); use 'torch'", run)


@pytest.mark.usefixtures("_auto")
def test_autocast_rounds_as_the_linear_map_does(use_tiling, launches):
    use_tiling("chunks")
    rnn, x = layer(), torch.randn(2, 9, 3, device=DEVICE, requires_grad=True)
    linear = rnn.layers[0].linear
    with torch.autocast(x.device.type, torch.bfloat16):
        out, last = rnn(x)
        pre = linear(x)
        assert pre.dtype == torch.bfloat16
        expected = mingru.functional.mingru(*pre.chunk(2, -1), torch.full((2, 1, 8), 0.5, device=DEVICE))
    assert (out.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    leaves = [x, linear.weight, linear.bias]
    grads, truth = (torch.autograd.grad(states.float().square().sum(), leaves) for states in (out, expected))
    assert launches == ["forward", "forward", "backward", "backward"]
    for grad, other in zip(grads, truth, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, other, rtol=2e-2, atol=2e-2)


# Only on a GPU.

needs_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")


@needs_gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    gate = torch.zeros(2, 2**21 + 8, 520, dtype=torch.bfloat16, device=DEVICE)
    out = mingru.functional.mingru(gate, gate, backend="triton")
    # h = 0.5 h + 0.25 from 0.5 stays 0.5.
    assert (out[-1, -1] == 0.5).all() and (out[0, ::4096] == 0.5).all()


@needs_gpu
def test_steps_of_a_language_model_in_a_cuda_graph():
    lm, ids = language_model().eval(), torch.randint(5, (3, 7), device=DEVICE)
    with torch.no_grad():
        expected, _ = lm(ids)
        token, state = ids[:, :1].clone(), lm.initial(3)
        state = [each.clone() for each in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            lm(token, state)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits, after = lm(token, state)
            for kept, new in zip(state, after, strict=True):
                kept.copy_(new)
        for step in range(7):
            token.copy_(ids[:, step : step + 1])
            graph.replay()
            torch.testing.assert_close(logits[:, 0], expected[:, step], rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.skipif(not INTERPRETED and torch.accelerator.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    x = torch.randn(2, 30, 8, device="cuda:1")
    out = mingru.functional.mingru(x, x, backend="triton")
    torch.testing.assert_close(out, mingru.functional.mingru(x, x, backend="torch"))
