"""What only the C++ kernels promise; their numbers are tested with those of all other bodies."""

import itertools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import reference
import torch
from cover import cover

import mingru
from mingru import ops
from mingru.ops import Call, Layout, Spec, Start, autograd, route
from mingru.ops.backends import native
from mingru.ops.cells import TIMED

WHY_NOT = mingru.backends()["native"]
pytestmark = pytest.mark.skipif(WHY_NOT is not True, reason=str(WHY_NOT))


def run(gate, candidate, h=None, **options):
    return mingru.functional.mingru(gate, candidate, h, backend="native", **options)


def call_of(cell, h, initial, reset=None, dt=None, batch_sizes=None, lengths=None, min_decay=0.0, flags=()):
    """Return a call as the operators take it; `flags` are in the order of csrc/call.h."""
    optional = (reset, dt, batch_sizes, lengths)
    flags = (*(x is not None for x in optional), *flags)
    how = native.number_of(Spec(cell, "positive", False)) | sum(flag << bit for bit, flag in enumerate(flags, 16))
    return [h, initial, *(x for x in optional if x is not None)], how, min_decay


def inputs(*shape, dtype=torch.float32):
    return [2 * torch.randn(*shape).to(dtype) for _ in range(2)]


CONTRACTS = {
    "cell": ["mingru", "minlstm", "minlstm_unnormalized"],
    "layout": ["batch first", "time first", "packed", "lengths"],
    "with_bias": [False, True],
    "with_reset": [False, True],
    "reverse": [False, True],
}


@pytest.mark.parametrize(tuple(CONTRACTS), [tuple(row.values()) for row in cover(CONTRACTS)])
def test_operators_keep_torchs_contract(cell, layout, with_bias, with_reset, reverse):
    count = ops.NUM_INPUTS[cell]
    batch_sizes = torch.tensor([3, 3, 2, 2, 1]) if layout == "packed" else None
    lengths = torch.tensor([20, 1, 7]) if layout == "lengths" else None
    leading = {"batch first": (3, 20), "time first": (20, 3), "packed": (11,), "lengths": (3, 20)}[layout]
    pre = [torch.randn(*leading, 5) for _ in range(count)]
    bias = torch.randn(count * 5) if with_bias else None
    h, initial = torch.rand(3, 1, 5), torch.rand(3, 1, 5)
    reset = torch.rand(*leading) < 0.2 if with_reset else None
    # dt selects the timed form of a cell.
    is_timed = cell in TIMED and with_bias and with_reset
    dt, min_decay = (torch.rand(*leading), 0.2) if is_timed else (None, 0.0)
    tensors, flags = (h, initial, reset, dt, batch_sizes), (reverse, layout == "time first")
    call = call_of(cell, *tensors, min_decay=min_decay, flags=flags)
    out, last = torch.ops.mingru.recurrence_forward(pre, *call)
    x, weight = torch.randn(*leading, 4), torch.randn(count * 5, 4)
    product = torch.randn(out[..., 0].numel() if lengths is None else 28, count * 5)
    grad = (torch.randn_like(out), last)
    _, how, _ = backward = call_of(cell, *tensors, min_decay=min_decay, flags=(*flags, False, is_timed))
    needs = (is_timed, with_bias, with_reset, reverse and with_bias)
    with_lengths = call_of(cell, *tensors, lengths, min_decay, (*flags, with_bias, *needs))
    calls = {
        "recurrence_forward": (pre, *call),
        "recurrence_backward": (pre, backward[0], out, *grad, how, min_decay),
        "linear_recurrence_forward": (x, weight, bias, *with_lengths),
        "linear_recurrence_backward": (x, weight, bias, with_lengths[0], out, product, *grad, *with_lengths[1:]),
    }
    if layout != "packed":
        calls["recurrence_forward"] = (pre[:2], *call_of("linear_scan", h, h, reset, flags=flags))
    checks = torch.library._OPCHECK_DEFAULT_UTILS if lengths is None else "test_schema"
    for operator, args in calls.items():
        torch.library.opcheck(getattr(torch.ops.mingru, operator).default, args, test_utils=checks)
    apart = [torch.randn(*leading, 10)[..., ::2] for _ in range(count)]
    torch.library.opcheck(torch.ops.mingru.recurrence_forward.default, (apart, *call))


def test_operators_refuse_what_would_read_past_the_end():
    gate, candidate = inputs(3, 20, 5)
    h = torch.rand(3, 1, 5)
    pair, packed_pair = [gate, candidate], [gate[0], candidate[0]]
    mask, number = torch.zeros(3, 20, dtype=torch.bool), native.number_of(Spec("mingru", "positive", False))
    one = [h, h]
    for tensors, *call in [
        ([gate, candidate[:, :19]], *call_of("mingru", h, h)),
        (pair, *call_of("mingru", h[:2], h)),
        (pair, *call_of("mingru", h, h[:2], mask)),
        (pair, *call_of("mingru", h.double(), h)),
        ([gate, candidate.double()], *call_of("mingru", h, h)),
        (pair, *call_of("mingru", h, h, mask[:, :19])),
        (pair, *call_of("mingru", h, h, mask.t())),
        (pair, *call_of("mingru", h, h, mask.float())),
        (pair, one[:1], number, 0.0),
        (pair, [*one, mask], number, 0.0),
        (pair, one, number | 1 << 16, 0.0),
        (pair, one, number | 1 << 27, 0.0),
        (pair, one, number | 1 << 40, 0.0),
        (pair, one, number - 2**63, 0.0),
        (pair, one, 255, 0.0),
        (pair, one, len(native.CELLS), 0.0),
        (pair, one, number | 3 << 8, 0.0),
        (pair, *call_of("minlstm", h, h)),
        (pair, *call_of("mingru", h, h, flags=(False, True))),
        ([], *call_of("mingru", h, h)),
        ([gate[0, 0], candidate[0, 0]], *call_of("mingru", h, h)),
        ([gate[:0], candidate[:0]], *call_of("mingru", h[:0], h[:0])),
        (packed_pair, *call_of("mingru", h, h, batch_sizes=torch.tensor([3, 4, 13]))),
        (packed_pair, *call_of("mingru", h, h, batch_sizes=torch.tensor([3, 3, 3]))),
        (packed_pair, *call_of("mingru", h, h, batch_sizes=torch.tensor([20, 0]))),
        (packed_pair, *call_of("mingru", h, h, batch_sizes=torch.tensor([10, 10], dtype=torch.int32))),
        (pair, *call_of("mingru", h, h, batch_sizes=torch.tensor([20]))),
        (pair, *call_of("mingru", h, h, lengths=torch.tensor([20, 1, 7]))),
        (pair, *call_of("mingru", h, h, dt=torch.ones(3, 19))),
        (pair, *call_of("mingru", h, h, dt=torch.ones(20, 3))),
        (pair, *call_of("mingru", h, h, dt=torch.ones(3, 20).double())),
        (pair, *call_of("mingru_signed", h, h, dt=torch.ones(3, 20))),
        (pair, *call_of("linear_scan", h, h, min_decay=0.5)),
        (pair, *call_of("mingru", h, h, min_decay=1.0)),
        (pair, *call_of("mingru", h, h, min_decay=-0.5)),
    ]:
        with pytest.raises(RuntimeError, match=r"mingru|recurrence"):
            torch.ops.mingru.recurrence_forward(tensors, *call)


@pytest.mark.parametrize(
    "lengths",
    [
        torch.tensor([20, -1, 7]),
        torch.tensor([21, 1, 7]),
        torch.tensor([20, 7]),
        torch.tensor([[20, 1, 7]]),
        torch.tensor([20, 1, 7], dtype=torch.int32),
        torch.tensor([20, 0, 1, 0, 7, 0])[::2],
    ],
    ids=["negative", "more than S", "too few", "two dimensions", "int32", "not contiguous"],
)
def test_operators_refuse_wrong_lengths(lengths):
    x, weight, h = torch.randn(3, 20, 4), torch.randn(10, 4), torch.rand(3, 1, 5)
    with pytest.raises(RuntimeError, match="linear_recurrence_forward: lengths must be"):
        torch.ops.mingru.linear_recurrence_forward(x, weight, None, *call_of("mingru", h, h, lengths=lengths))


@pytest.mark.parametrize(
    "shape", [(1, 5000, 1), (1, 5000, 16), (1, 5000, 40), (3, 700, 17), (8, 512, 256), (2, 300, 1100)]
)
@pytest.mark.parametrize("scale", [2.0, 0.0])
def test_threads_do_not_show_in_the_numbers(shape, scale):
    """Also where time is cut for want of other work, and where the state (scale 0: gates of 1e-4) forgets slowly."""
    gate, candidate = inputs(*shape)
    gate = scale * gate - 9.0 * (scale == 0.0)
    grad_out = torch.randn(shape)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for reverse in (False, True):
                leaves = [gate.clone().requires_grad_(), candidate.clone().requires_grad_()]
                h = torch.full((shape[0], 1, shape[2]), 0.5, requires_grad=True)
                spec, start = Spec("mingru", "positive", reverse), Start(h, h.detach(), None)
                out, last = ops.recurrence(spec, leaves, start, backend="native")
                grads = torch.autograd.grad((out * grad_out).sum() + last.sum(), [*leaves, h])
                results.append([out.detach(), last.detach(), *grads])
    finally:
        torch.set_num_threads(before)
    for first, second, third in zip(
        results[0] + results[1], results[2] + results[3], results[4] + results[5], strict=True
    ):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


def test_cut_time_passes_nan_and_infinity_as_one_piece_does():
    gate, candidate = inputs(1, 4000, 4)
    candidate[0, 100, 0] = float("inf")
    candidate[0, 200, 1] = float("nan")
    candidate[0, 3000, 2] = float("-inf")
    out = run(gate, candidate, activation="linear")
    steps = mingru.functional.mingru(gate, candidate, activation="linear", backend="sequential")
    assert torch.equal(out.isnan(), steps.isnan())
    assert torch.equal(out.isposinf(), steps.isposinf())
    assert torch.equal(out.isneginf(), steps.isneginf())


@pytest.mark.parametrize("extreme", [1e4, -1e4, float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 95.0, -95.0])
@pytest.mark.parametrize("activation", ["positive", "linear", "tanh"])
def test_extreme_pre_activations(extreme, activation):
    bad = torch.full((1, 1, 4), extreme)
    good = torch.tensor([[[-1.0, 0.5, 2.0, 0.0]]])
    h = torch.tensor([[[1.0, 0.0, 3.0, 0.5]]])
    for gate, candidate in [(bad, good), (good, bad), (bad, bad)]:
        out = run(gate, candidate, h, activation=activation)
        truth = reference.mingru(gate.double(), candidate.double(), h.double(), activation=activation).float()
        torch.testing.assert_close(out, truth, rtol=1e-6, atol=1e-44, equal_nan=True)


@pytest.mark.parametrize("extreme", [1e4, -1e4, float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 95.0, -95.0])
@pytest.mark.parametrize("activation", ["positive", "linear", "tanh"])
def test_extreme_pre_activations_of_an_unnormalized_minlstm(extreme, activation):
    bad = torch.full((1, 1, 4), extreme)
    good = torch.tensor([[[-1.0, 0.5, 2.0, 0.0]]])
    h = torch.tensor([[[1.0, 0.0, 3.0, 0.5]]])
    for inputs in itertools.product((bad, good), repeat=3):
        out = mingru.functional.minlstm(*inputs, h, activation=activation, normalize=False, backend="native")
        doubles = [each.double() for each in (*inputs, h)]
        truth = reference.minlstm_unnormalized(*doubles, activation=activation).float()
        torch.testing.assert_close(out, truth, rtol=1e-6, atol=1e-44, equal_nan=True)


def test_subnormals_are_not_flushed():
    gate = torch.full((1, 1, 16), 100.0)
    out = run(gate, torch.full((1, 1, 16), -95.0), torch.zeros(1, 1, 16))
    # sigma(-95) = 5.5e-42
    torch.testing.assert_close(out, torch.full_like(out, 5.52e-42), rtol=1e-2, atol=0)
    assert (torch.tensor(1e-40) * torch.tensor(0.5)).item() > 0, "the process flushes subnormals"


def test_small_numbers_keep_their_relative_precision():
    v = torch.logspace(-30, 1, 2000).reshape(1, 1, -1)
    for candidate in (v, -v):
        out = run(torch.zeros_like(v), candidate, torch.zeros(1, 1, 1), activation="tanh")
        truth = 0.5 * candidate.double().tanh()
        assert ((out - truth).abs() / truth.abs()).max() < 4e-7


def test_many_python_threads():
    gate, candidate = inputs(4, 300, 64)
    expected = run(gate, candidate)
    wrong = []

    def work():
        for _ in range(20):
            if not torch.equal(run(gate, candidate), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_child(queue, gate, candidate):
    torch.set_num_threads(1)
    queue.put(run(gate, candidate).sum().item())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_worker_forked_after_use():
    gate, candidate = inputs(1, 50, 8)
    expected = run(gate, candidate).sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, gate, candidate))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(60)
    assert child.exitcode == 0


# Dynamo's own way of tracing a function, in torch 2.13.
@pytest.mark.filterwarnings("ignore:.*Function.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_graph_break():
    torch.compiler.reset()
    rnn = mingru.MinGRU(8, 16, 2, bidirectional=True)
    x = torch.randn(3, 70, 8, requires_grad=True)
    reset = torch.rand(3, 70) < 0.1
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    got, expected = compiled(x, None, reset), rnn(x, None, reset)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    (grad,) = torch.autograd.grad(got[0].sum(), x)
    (truth,) = torch.autograd.grad(expected[0].sum(), x)
    torch.testing.assert_close(grad, truth)


def negative_view(x):
    """Return a tensor with the values of x, whose memory has -x."""
    negative = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negative.is_neg()
    assert torch.equal(negative, x)
    return negative


@pytest.mark.parametrize("form", ["layer", "cell", "recurrence", "scan"])
@pytest.mark.parametrize("grad", [True, False])
def test_values_that_are_not_in_memory(form, grad):
    """Each argument as a negative view, which PyTorch resolves before an operator, but not in a `Tensor?[]`."""
    x, h, dt = torch.randn(2, 5, 4), torch.rand(2, 1, 4), torch.rand(2, 5)
    layer, cell = mingru.MinGRU(4, 4), mingru.MinGRUCell(4, 4)
    call, args = {
        "layer": (lambda x, h, dt: layer(x, h[None], dt=dt), (x, h, dt)),
        "cell": (lambda x, h, dt: cell(x, h, dt=dt), (x[:, 0], h[:, 0], dt[:, 0])),
        "recurrence": (lambda x, h, dt, i: run(x, x, h, dt=dt, reset=dt < 0.5, initial_state=i), (x, h, dt, h + 1)),
        "scan": (lambda x, h: mingru.functional.linear_scan(x.sigmoid(), x, h, backend="native"), (x, h)),
    }[form]
    with torch.set_grad_enabled(grad):
        expected = call(*args)
        for index in range(len(args)):
            torch.testing.assert_close(
                call(*(negative_view(y) if i == index else y for i, y in enumerate(args))), expected
            )
        if grad:
            x = args[0].clone().requires_grad_()
            out = call(x, *args[1:])
            out = out[0] if form == "layer" else out
            weight = torch.randn_like(out)
            found, truth = (
                torch.autograd.grad(out, x, each, retain_graph=True) for each in (negative_view(weight), weight)
            )
            torch.testing.assert_close(found, truth)


def test_a_tensor_without_memory():
    x, h = torch.randn(2, 5, 4), torch._efficientzerotensor(1, 2, 1, 4)
    layer = mingru.MinGRU(4, 4)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(
                layer(x, h, dt=torch._efficientzerotensor(2, 5)), layer(x, h + 0, dt=0 * x[..., 0])
            )
    torch.testing.assert_close(run(x, x, h[0]), run(x, x, torch.zeros(2, 1, 4)))


def test_a_bias_with_strides_and_of_another_dtype():
    layer, x, dt = mingru.MinGRU(4, 4), torch.randn(2, 5, 4), torch.rand(2, 5)
    one = torch.tensor([0.5])
    layer.layers[0].linear.bias = torch.nn.Parameter(one.expand(8))
    found = layer(x, dt=dt)
    layer.layers[0].linear.bias = torch.nn.Parameter(one.repeat(8))
    torch.testing.assert_close(found, layer(x, dt=dt))
    layer.layers[0].linear.bias = torch.nn.Parameter(one.repeat(8).half())
    with pytest.raises(RuntimeError, match="bias must be"):
        layer(x, dt=dt)


def test_operators_refuse_tensors_on_several_devices():
    """Otherwise PyTorch would return memory that nobody wrote, because one tensor on "meta" asks for shapes only."""
    x, weight, bias, h, lengths = (
        torch.randn(3, 5, 4),
        torch.randn(8, 4),
        torch.randn(8),
        torch.rand(3, 1, 4),
        torch.tensor([5, 3, 1]),
    )
    mask, dt = torch.zeros(3, 5, dtype=torch.bool), torch.rand(3, 5)
    tensors, how, bound = call_of("mingru", h, h + 1, mask, dt)
    with_lengths, how_with_lengths, _ = call_of("mingru", h, h + 1, mask, dt, None, lengths)
    calls = {
        "recurrence_forward": [[x, x + 1], tensors, how, bound],
        "recurrence_backward": [[x, x + 1], tensors, x + 2, x + 3, h + 2, how, bound],
        "linear_recurrence_forward": [x, weight, bias, with_lengths, how_with_lengths, bound],
        "linear_recurrence_backward": [x, weight, bias, tensors, x + 2, x[0, 0, :0], x + 3, h + 2, how, bound],
    }
    for name, args in calls.items():
        operator = getattr(torch.ops.mingru, name)
        operator(*args)
        leaves, spec = torch.utils._pytree.tree_flatten(args)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                moved = [each.to("meta") if i == index else each for i, each in enumerate(leaves)]
                with pytest.raises(ValueError, match=f"mingru::{name}: tensors must be on one device, got cpu, meta"):
                    operator(*torch.utils._pytree.tree_unflatten(moved, spec))


CELL = native.number_of(Spec("mingru", "positive", False)) if WHY_NOT is True else 0
WRONG_CODE = {
    "nothing": [],
    "an unknown instruction": [(99, 0, 0, 0)],
    "no instruction that computes x": ["keep", "add"],
    "added to the caller's x": ["keep", "add", "norm"],
    "added to what is kept": ["norm", "keep", "keep", "add", "add"],
    "add without keep": ["norm", "add"],
    "more weights than there are": ["norm", "norm", "norm"],
    "an unknown state": [("scan", 0, 1, CELL)],
    "a negative state": [("scan", 0, -1, CELL)],
    "a state twice": [("scan", 0, 0, CELL), ("scan", 0, 0, CELL)],
    "an unknown cell": [("scan", 0, 0, 255)],
    "an unknown candidate": [("scan", 0, 0, CELL | 3 << 8)],
    **{f"bit {bit}": [("scan", 0, 0, CELL | 1 << bit)] for bit in range(16, 63)},
    "a negative cell": [("scan", 0, 0, CELL - 2**63)],
}


@pytest.mark.parametrize("wrong", WRONG_CODE)
def test_the_inference_operator_trusts_no_code(wrong):
    x, h, norm, weight = torch.randn(2, 5, 4), torch.randn(1, 2, 1, 4), torch.ones(4), torch.randn(8, 4)
    kept, rows = x.clone(), [row if isinstance(row, tuple) else (row, 0, 0, 0) for row in WRONG_CODE[wrong]]
    code = [(native.INSTRUCTIONS.get(name, name), *rest) for name, *rest in rows]
    has_scan = any(name == "scan" for name, *_ in rows)
    weights, states = ([weight], [h]) if has_scan else ([norm, norm], [])
    args = torch.tensor(code, dtype=torch.int64).view(-1, 4), torch.tensor([0.0, 0.0], dtype=torch.float64), False
    with pytest.raises(RuntimeError, match="unknown") if wrong.startswith("an unknown c") else nullcontext():
        out, _ = torch.ops.mingru.inference(x, weights, states, [], [], [], *args)
        assert out.numel() == 0
    assert torch.equal(x, kept)


def test_missing_library_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "ops" / "backends" / "native.py"))
    assert "not built" in native._load()
    (tmp_path / "_kernels.so").write_bytes(b"not a library")
    assert "cannot be loaded" in native._load()


def test_a_library_of_other_sources_is_not_used(tmp_path, monkeypatch):
    package = tmp_path / "src" / "mingru"
    package.mkdir(parents=True)
    library = next(path for path in Path(native.__file__).parents[2].iterdir() if path.stem == "_kernels")
    (package / library.name).symlink_to(library)
    monkeypatch.setattr(native, "__file__", str(package / "ops" / "backends" / "native.py"))
    assert native._load() is None  # installed without the sources
    shutil.copytree(Path(__file__).parents[2] / "csrc", tmp_path / "csrc")
    assert native._load() is None
    (tmp_path / "csrc" / "scan.h").write_text("// of another commit")
    of_others = r"the compiled kernels were built from other sources; build them again with 'pip install -e \.'"
    assert re.fullmatch(of_others, native._load())
    # The first libraries have no such number.
    monkeypatch.setattr(torch.ops, "mingru", SimpleNamespace())
    assert re.fullmatch(of_others, native._load())


# Products of all sizes of tiles and panels, and of several parts of the memory: rows, columns, depth.
PRODUCTS = """
import itertools, torch, mingru
differs = False
multiply = torch.ops.mingru.multiply
shapes = [*itertools.product((31, 32, 97), (1, 15, 16, 17, 48, 65, 128), (1, 16, 255, 257)), *itertools.product(
    range(33, 45), (33, 62), (300,)), (40, 2100, 600), (100, 4200, 20), (2100, 70, 30), (64, 100, 9000)]
for (rows, columns, depth), flips in zip(shapes, itertools.cycle(itertools.product((0, 1), (0, 1), (0, 1)))):
    turned = lambda x, flip: x.t().contiguous().t() if flip else x
    left, right = turned(torch.randn(rows, depth), flips[0]), turned(torch.randn(depth, columns), flips[1])
    added = torch.randn(columns) if flips[2] else None
    truth, size = left.double() @ right.double(), left.abs().double() @ right.abs().double()
    truth = truth if added is None else truth + added
    torch.set_num_threads(1)
    out = multiply(left, right, added)
    assert ((out - truth).abs() <= 3e-7 * (size + truth.abs())).all(), (rows, columns, depth, flips)
    plain = left @ right if added is None else torch.addmm(added, left, right)
    differs |= not torch.equal(out, plain)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        in_tiles = differs and rows >= 32 and rows * columns * depth >= 2**17
        assert not in_tiles or torch.equal(multiply(left, right, added), out), (rows, columns, depth, threads)
    if in_tiles and rows >= 40 and (rows - 8) * columns * depth >= 2**17:
        assert torch.equal(multiply(left[8:], right, added), out[8:]), (rows, columns, depth)
for bad in ((left, left, None), (left, right, added.double()), (left[0], right, None), (left, right[:, ::2].t(), None)):
    try:
        multiply(*bad)
    except RuntimeError as error:
        assert "multiply: left and right must be" in str(error), error
    else:
        raise AssertionError(bad)
x = torch.full((40, 70), 2.0)
x[3, 5], x[7, 1] = float("nan"), float("inf")
out = multiply(x, torch.ones(70, 90), None)
assert out[3].isnan().all() and out[7].isinf().all() and (out.sum(1).isfinite().sum() == 38)
torch.manual_seed(0)
for module in (mingru.MinGRU(70, 90, 2), mingru.MinLSTM(64, 40, bias=False), mingru.models.Block(64, mlp=4)):
    width = 70 if isinstance(module, mingru.MinGRU) else 64
    x = torch.randn(3, 700, width, requires_grad=True)
    results = []
    for dtype in (torch.float32, torch.float64):
        module, x = module.to(dtype), x.detach().to(dtype).requires_grad_()
        out, _ = module(x)
        with torch.inference_mode():
            again, _ = module(x)
        results.append([out, again, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
    for one, truth in zip(*results):
        assert (one - truth).abs().max() < 2e-6 * truth.abs().max(), (module, one.shape)
print(differs)
"""


@pytest.mark.parametrize("product", ["mingru", "torch", ""])
def test_products(product):
    command = [sys.executable, "-c", PRODUCTS]
    environment = os.environ | {"MINGRU_PRODUCT": product}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    in_tiles = product != "torch" and "avx512vl" in info and (product == "mingru" or "AuthenticAMD" in info)
    assert done.stdout.split() == [str(in_tiles)]


def test_unknown_product_is_refused(monkeypatch):
    monkeypatch.setenv("MINGRU_PRODUCT", "mkl")
    with pytest.raises(ValueError, match=r"MINGRU_PRODUCT must be unset or in \('mingru', 'torch'\), got 'mkl'"):
        native._load()


def test_what_runs_instead_is_said_once(monkeypatch):
    monkeypatch.setattr(native, "_WHY_NOT", "the compiled kernels were not built; ...")
    route.warn_once.cache_clear()
    gate = torch.zeros(1, 3, 2)
    with pytest.warns(RuntimeWarning, match="slower backend 'torch' on the CPU, because the compiled kernels were not"):
        mingru.functional.mingru(gate, gate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mingru.functional.mingru(gate, gate)
    route.warn_once.cache_clear()


IN_BLOCKS = {
    "shape": [(1, 1, 3, 5), (3, 40, 7, 20), (2, 5000, 4, 16), (300, 33, 4, 17), (5, 2100, 3, 300)],
    "reverse": [False, True],
    "time_first": [False, True],
    "dtype": [torch.float32, torch.float64],
}


@pytest.mark.parametrize(tuple(IN_BLOCKS), [tuple(row.values()) for row in cover(IN_BLOCKS)])
def test_linear_and_recurrence_in_one_go(shape, reverse, time_first, dtype):
    """Several blocks of rows, whole sequences in a block and stretches of one: as the two do it one by one."""
    batch, steps, features, lanes = shape
    x = torch.randn(steps, batch, features, dtype=dtype)
    x = x if time_first else x.transpose(0, 1).contiguous()
    linear = torch.nn.Linear(features, 2 * lanes, dtype=dtype)
    h, initial = torch.randn(batch, 1, lanes, dtype=dtype), torch.randn(batch, 1, lanes, dtype=dtype)
    reset = torch.rand(x.shape[:2]) < 0.01
    before = h.clone()
    spec, start, layout = Spec("mingru", "positive", reverse), Start(h, initial, reset), Layout(time_first, None, None)
    for bias in (linear.bias, None):
        linear.bias = bias
        for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
            out, last = ops.linear_recurrence(spec, given, linear, start, layout)
            pre = linear(x).chunk(2, -1)
            expected, expected_last = ops.recurrence(spec, pre, start, layout, backend="native")
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(last, expected_last)
            assert out.is_contiguous()
    assert torch.equal(h, before), "the given state was written to"


@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_of_linear_and_recurrence_in_one_go(with_bias, time_first):
    linear = torch.nn.Linear(4, 10, with_bias, dtype=torch.double)
    x, h, initial = torch.randn(9, 3, 4).double(), torch.randn(3, 1, 5).double(), torch.randn(1, 1, 5).double()
    x = x if time_first else x.transpose(0, 1).contiguous()
    reset = torch.rand(x.shape[:2]) < 0.2
    spec, layout = Spec("mingru", "tanh", True), Layout(time_first, None, None)

    def function(x, h, initial, weight, *bias):
        call = Call(spec, [x, weight, *bias, *[None] * (1 - len(bias))], Start(h, initial, reset), layout)
        return autograd.run_kernel(route.Choice("native", True, "linear_kernel"), call, True)

    leaves = [leaf.detach().requires_grad_() for leaf in (x, h, initial, *linear.parameters())]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_a_layer_under_a_transform_or_with_a_hook_is_not_taken_in_one_go():
    rnn = mingru.MinGRU(3, 4).double()
    x = torch.randn(5, 7, 3).double()
    expected = rnn(x)[0]
    parameters = {name: weight.detach() for name, weight in rnn.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(rnn, parameters, (x[None],))[0].square().sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    whole = torch.autograd.grad(expected.square().sum(), rnn.parameters())
    for per_sample, total in zip(each.values(), whole, strict=True):
        torch.testing.assert_close(per_sample.sum(0), total)
    out, tangent = torch.func.jvp(lambda x: rnn(x)[0], (x,), (torch.ones_like(x),))
    torch.testing.assert_close(out, expected)
    nudged = rnn(x + 1e-7)[0]
    torch.testing.assert_close(tangent, (nudged - expected) / 1e-7, rtol=1e-4, atol=1e-5)

    seen = []
    rnn.layers[0].linear.register_forward_hook(lambda module, args, pre: seen.append(pre.shape) or 2 * pre)
    assert not torch.allclose(rnn(x)[0], expected)
    assert seen == [(5, 7, 8)]


def test_a_reset_that_was_viewed_from_bytes():
    """Its bytes may be others than 0 and 1."""
    gate, candidate = inputs(2, 30, 5)
    twos = torch.full((2, 30), 2, dtype=torch.uint8).view(torch.bool)
    ones = torch.ones(2, 30, dtype=torch.bool)
    assert torch.equal(run(gate, candidate, reset=twos), run(gate, candidate, reset=ones))
