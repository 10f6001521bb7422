"""The Triton kernels against the float64 reference, and what only they promise.

With TRITON_INTERPRET=1 they run in Triton's interpreter, on the CPU and slowly; otherwise on a GPU, if there is one.
"""

import itertools
import math
import os
import re
import warnings

import numpy as np
import pytest
import reference
import torch
from cover import cover, named
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import mingru
from mingru import ops
from mingru.ops import NUM_INPUTS, Call, Layout, Spec, Start, autograd, route
from mingru.ops.autograd import scan
from mingru.ops.backend import KernelFailure
from mingru.ops.backends import sequential
from mingru.ops.backends.triton import device, launch
from mingru.ops.backends.triton.plan import Plan
from mingru.ops.cells import TIMED, parts_of
from mingru.ops.scan import LinearScan
from mingru.ops.shape import accumulate_dtype, along

WHY_NOT = mingru.backends()["triton"]
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not True, reason=str(WHY_NOT)),
    # Otherwise another backend would compute the gradients, and be tested instead.
    pytest.mark.filterwarnings("error:mingru. using the slower backend:RuntimeWarning"),
    # From numpy, in the interpreter.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero|underflow) encountered:RuntimeWarning"),
]
if WHY_NOT is True:
    from mingru.ops.backends.triton import kernels
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else torch.accelerator.current_accelerator() if WHY_NOT is True else "cpu"

# Small, because the interpreter runs each element of a scan on its own.
PLANS = {
    "walk": Plan(1, 4, 16, 1, 1, None),
    "chunks": Plan(4, 3, 8, 1, 1, 2),
    "segments": Plan(2, 4, 8, 3, 1, 2),
}
SCANS = ("linear_scan", "complex_linear_scan", "quaternion_linear_scan")
CELLS = [*NUM_INPUTS, *SCANS]


@pytest.fixture(autouse=True)
def _no_failure_before(monkeypatch):
    monkeypatch.setattr(launch, "_failures", {})
    monkeypatch.setattr(launch, "_compiled", {})
    route.warn_once.cache_clear()


@pytest.fixture(autouse=True)
def _bfloat16_is_rounded(monkeypatch):
    """Round to the nearest bfloat16, as GPUs do. The interpreter truncates."""
    if INTERPRETED:
        from triton.runtime import interpreter

        convert = interpreter._convert_float

        def rounded(x, before, after, mode):
            if (before.name, after.name) != ("fp32", "bf16"):
                return convert(x, before, after, mode)
            return torch.from_numpy(np.array(x)).bfloat16().view(torch.uint16).numpy()

        monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def use_plan(monkeypatch):
    """Use one plan for all kernels, or the name of one; None stands for the plan for the shape."""

    def use(plan):
        plan = PLANS.get(plan, plan)

        def plan_of(work):
            return plan if work.cell in NUM_INPUTS and not work.is_packed else plan._replace(segments=1)

        if plan is not None:
            monkeypatch.setattr(launch, "plan_of", plan_of)

    return use


EACH_PLAN = {"plan": list(PLANS) if INTERPRETED else [*PLANS, None]}
FACTORS = {
    **EACH_PLAN,
    "cell": CELLS,
    "activation": ["positive", "linear", "tanh"],
    "dtype": [torch.float32, torch.float64, torch.bfloat16, torch.float16],
    "reverse": [False, True],
    "with_reset": [False, True],
    "with_dt": [False, True],
    "min_decay": [0.0, 0.1, 0.9],
}


def is_allowed(row):
    """Return whether the cell has such an activation, dtype, time and bound."""
    cell = row["cell"]
    return (
        (cell in NUM_INPUTS or row["activation"] == "linear")
        and (cell not in SCANS[1:] or row["dtype"].itemsize >= 4)
        and (cell in TIMED or not (row["with_dt"] or row["min_decay"]))
    )


def make(cell, batch, steps, features, dtype, *, reset=False, scale=2.0):
    """Return the inputs, the states h and initial_state in the accumulation dtype, and resets."""
    if (why := device.unsupported(torch.empty(0, dtype=dtype, device=DEVICE), Spec(cell, "linear", False))) is not None:
        pytest.skip(why)
    count = NUM_INPUTS.get(cell, 2)
    features += -features % parts_of(cell)
    inputs = [(scale * torch.randn(batch, steps, features)).to(dtype) for _ in range(count)]
    if cell in SCANS:
        limit = parts_of(cell) ** -0.5
        inputs[0] = inputs[0].clamp(-limit, limit)
    states = torch.randn(2, batch, 1, features).to(accumulate_dtype(dtype)).unbind()
    mask = torch.rand(batch, steps) < 0.2 if reset else None
    return inputs, states, mask


def on_device(tensors):
    return [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]


def run(spec, inputs, states, reset, layout=ops.BATCH_FIRST, backend="triton", dt=None):
    if spec.cell == "complex_linear_scan":
        found = ops.linear_scan(*(as_complex(x) for x in (*inputs, states[0])), reset, spec.reverse, backend)
        return tuple(torch.view_as_real(states).flatten(2) for states in found)
    if spec.cell == "quaternion_linear_scan":
        a, b, h = (as_quaternion(x) for x in (*inputs, states[0]))
        return tuple(
            x.flatten(2) for x in scan(route.Choice(backend, True), LinearScan(a, b, h, reset, spec.reverse, 4))
        )
    if spec.cell == "linear_scan":
        return ops.linear_scan(*inputs, states[0], reset, spec.reverse, backend)
    return ops.recurrence(spec, inputs, Start(*states, reset, dt), layout, backend)


def as_complex(x):
    return torch.view_as_complex(x.unflatten(2, (-1, 2)))


def as_quaternion(x):
    return x.unflatten(2, (-1, 4))


def by_steps(spec, inputs, states, reset, dt=None):
    h, initial = states
    if spec.cell == "complex_linear_scan":
        out = reference.linear_scan(*(as_complex(x) for x in (*inputs, h)), spec.reverse, reset)
        out = torch.view_as_real(out).flatten(2)
    elif spec.cell == "quaternion_linear_scan":
        call = LinearScan(*(as_quaternion(x) for x in (*inputs, h)), reset, spec.reverse, 4)
        out = sequential.scan(call)[0].flatten(2)
    elif spec.cell == "linear_scan":
        out = reference.linear_scan(*inputs, h, spec.reverse, reset)
    else:
        timed = {"dt": dt, "min_decay": spec.min_decay} if spec.cell in TIMED else {}
        out = reference.CELLS[spec.cell](*inputs, h, reset, spec.activation, initial, spec.reverse, **timed)
    return out, out[:, :1] if spec.reverse else out[:, -1:]


def graded(function, spec, inputs, states, reset, weights, dt=None):
    leaves = [tensor.detach().requires_grad_() for tensor in (*inputs, *states, *([] if dt is None else [dt]))]
    count = len(inputs)
    timed = {} if dt is None else {"dt": leaves[-1]}
    out, last = function(spec, leaves[:count], leaves[count : count + 2], reset, **timed)
    weights = [weight.to(tensor) for weight, tensor in zip(weights, (out, last), strict=True)]
    grads = torch.autograd.grad([out, last], leaves, weights, allow_unused=True)
    return {"out": out, "last": last, **{str(index): grad for index, grad in enumerate(grads)}}


def check(spec, inputs, states, reset, dt=None):
    """Compare outputs and all gradients with the reference, with a few roundings on the way."""
    dtype = inputs[0].dtype
    batch, steps, features = inputs[0].shape
    weights = torch.randn(batch, steps, features).to(dtype), torch.randn(batch, 1, features).to(dtype)
    got = graded(run, spec, on_device(inputs), on_device(states), *on_device([reset]), weights, *on_device([dt]))
    wide = [[tensor.double() for tensor in tensors] for tensors in (inputs, states)]
    wide_dt = None if dt is None else dt.double()
    expected = graded(by_steps, spec, *wide, reset, [weight.double() for weight in weights], wide_dt)
    roundings = 4 if spec.min_decay or dt is not None else 2
    allowed = 64 * torch.finfo(accumulate_dtype(dtype)).eps + roundings / 2 * torch.finfo(dtype).eps
    for name, truth in expected.items():
        if truth is None or got[name] is None:
            assert all(grad is None or not grad.any() for grad in (truth, got[name])), (name, spec)
            continue
        error = (got[name].double().cpu() - truth).abs().max() / truth.abs().max().clamp_min(1.0)
        assert error <= allowed, (name, spec, tuple(inputs[0].shape), error.item())
    # States are rounded to the nearest number, once.
    truth = expected["out"]
    allowed = torch.finfo(dtype).eps / 2 * truth.abs() + 1e-5 * truth.abs().max()
    assert ((got["out"].double().cpu() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("row", cover(FACTORS, is_allowed), ids=named)
def test_values_and_gradients(row, use_plan):
    use_plan(row["plan"])
    inputs, states, reset = make(row["cell"], 1, 17, 7, row["dtype"], reset=row["with_reset"])
    dt = None
    if row["with_dt"]:
        dt = 3 * torch.rand(1, 17, dtype=states[0].dtype)
        dt[:, 4] = 0
    check(Spec(row["cell"], row["activation"], row["reverse"], row["min_decay"]), inputs, states, reset, dt)


@pytest.mark.parametrize(
    ("cell", "dtype", "steps", "features"),
    [("mingru", torch.bfloat16, 70, 16), ("minlstm", torch.float16, 70, 16), ("minlstm", torch.bfloat16, 9, 256)],
)
def test_plans_of_a_gpu_for_half_widths(cell, dtype, steps, features):
    inputs, states, reset = make(cell, 1, steps, features, dtype, reset=True)
    check(Spec(cell, "positive", False), inputs, states, reset)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has the test of all elements")
@pytest.mark.parametrize("strides", [(2**31 + 8, 8, 1), (8, 2**30 + 8, 1)])
def test_offsets_of_more_than_2_to_the_31(strides, use_plan, tmp_path):
    """Sequences in a file of 4 GB, of which only a few bytes are written."""
    use_plan(PLANS["walk"])
    memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=2**31 + 64, dtype=torch.bfloat16)
    x = memory.as_strided((2, 3, 8), strides)
    x.copy_(torch.randn(2, 3, 8))
    state = torch.zeros(2, 1, 8)

    def results(x):
        leaf = x.requires_grad_()
        out, _ = run(Spec("mingru", "positive", False), [leaf, leaf], [state, state], None)
        return out, *torch.autograd.grad(out, leaf, x.detach())

    for far, near in zip(results(x), results(x.clone()), strict=True):
        assert torch.equal(far, near)


def test_the_layouts_of_elapsed_times(use_plan):
    """Time first, the same for all sequences, and packed; each with its gradient."""
    use_plan(PLANS["chunks"])
    inputs, states, reset = make("mingru_rotation", 3, 9, 6, torch.float32, reset=True)
    inputs, states, reset = on_device(inputs), on_device(states), reset.to(DEVICE)
    spec = Spec("mingru_rotation", "positive", True, 0.2)
    dt = (2 * torch.rand(1, 9, device=DEVICE)).requires_grad_()

    def of(inputs, start, layout, backend):
        out, last = ops.recurrence(spec, inputs, start, layout, backend)
        weight = torch.linspace(-1, 1, out.shape[-1], device=DEVICE)
        return out, last, *torch.autograd.grad((out * weight).sum() + last.square().sum(), dt, retain_graph=True)

    def compare(inputs, start, layout):
        got, expected = (of(inputs, start, layout, backend) for backend in ("triton", "sequential"))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

    compare(inputs, Start(*states, reset, dt.expand(3, 9)), ops.BATCH_FIRST)
    first = [x.transpose(0, 1).contiguous() for x in inputs]
    compare(first, Start(*states, reset.t(), dt.expand(3, 9).t()), Layout(True, None, None))
    lengths = torch.tensor([9, 6, 2])

    def packed(x):
        return pack_padded_sequence(x, lengths, batch_first=True)

    rows, layout = [packed(x).data for x in inputs], Layout(False, packed(reset).batch_sizes, None)
    compare(rows, Start(*states, packed(reset).data, packed(dt.expand(3, 9)).data), layout)


@pytest.mark.parametrize("features", [1, 2, 15, 16, 17, 63, 64, 65, 127, 511, 512, 513, 1030])
def test_block_edges(features, use_plan):
    """The sizes of the tests of the C++ kernels, half of the lengths around a tile each, and all options in turn."""
    activations = ["positive", "linear", "tanh"]
    cells = [(cell, activation) for cell in NUM_INPUTS for activation in activations]
    cells += [(cell, "linear") for cell in CELLS if cell not in NUM_INPUTS]
    options = itertools.cycle(itertools.product(cells, [False, True], [False, True]))
    tile = 8 if features > 17 else 16
    for index, steps in enumerate([1, 2, tile - 1, tile, tile + 1, 2 * tile + 2][features % 2 :: 2]):
        (cell, activation), reverse, with_reset = [next(options) for _ in range(features % 7 + 1)][-1]
        if features > 65:
            # One block or two, because scans of the interpreter would take too long.
            use_plan(Plan(1, 8, 1024, 1, 1, None))
        elif features > 17:
            use_plan(Plan(2, 4, 64, 1 + index % 2, 1, None))
        else:
            use_plan(Plan(4, 4, 16, 1 + index % 3, 1, 2))
        inputs, states, reset = make(cell, 1 + (steps < 3), steps, features, torch.float32, reset=with_reset)
        check(Spec(cell, activation, reverse), inputs, states, reset)


def every_other(x):
    return torch.stack([x, x], -1).flatten(-2)[..., 1::2]


LAYOUTS = {
    "time first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other feature": every_other,
    "every other step": lambda x: every_other(x.mT).mT,
    "an odd address": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),
    "one sequence for all": lambda x: x[:1].expand_as(x),
    "one feature for all": lambda x: x[..., :1].expand_as(x),
    "one step for all": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_in_memory(layout, use_plan):
    use_plan(PLANS["chunks"])
    inputs, states, reset = make("mingru", 2, 13, 8, torch.float32, reset=True)
    check(Spec("mingru", "positive", False), [LAYOUTS[layout](x) for x in inputs], states, reset)
    # Different strides, and a mask that is not contiguous.
    mixed = [LAYOUTS[layout](inputs[0]), inputs[1]]
    reset = reset.t().contiguous().t()
    check(Spec("mingru", "positive", True), mixed, states, reset)
    # States that are the same for all batch elements, or not contiguous.
    states = states[0][:1].expand(2, 1, 8), every_other(states[1])
    check(Spec("mingru", "positive", True), inputs, states, reset)


def covered(allowed=lambda row: True, **factors):
    """Parametrize a test by rows in which each two values of these factors and of the plans meet."""
    factors |= EACH_PLAN
    rows = [tuple(row.values()) for row in cover(factors, allowed)]
    return pytest.mark.parametrize(tuple(factors), rows)


@covered(cell=["minlstm", "mingru_rotation"], reverse=[False, True])
def test_time_first_without_copies(cell, reverse, plan, use_plan):
    use_plan(plan)
    inputs, states, reset = make(cell, 2, 9, 8, torch.float32, reset=True)
    spec = Spec(cell, "positive", reverse)
    expected, last = run(spec, on_device(inputs), on_device(states), *on_device([reset]))
    # Gates side by side, as in a layer.
    pre = torch.cat([x.transpose(0, 1) for x in inputs], -1).to(DEVICE)
    before = pre.clone()
    layout = Layout(True, None, None)
    out, state = run(spec, pre.chunk(len(inputs), -1), on_device(states), reset.t().to(DEVICE), layout)
    torch.testing.assert_close(out.transpose(0, 1), expected, rtol=0, atol=0)
    torch.testing.assert_close(state, last, rtol=0, atol=0)
    assert out.is_contiguous()
    assert torch.equal(pre, before), "the input was written to"


@covered(cell=["mingru", "mingru_rotation"], reverse=[False, True], with_reset=[False, True])
def test_packed_sequences(cell, reverse, with_reset, plan, use_plan):
    use_plan(plan)
    lengths = torch.tensor([13, 13, 9, 1])
    inputs, states, reset = make(cell, 4, 13, 8, torch.float32, reset=with_reset)
    spec = Spec(cell, "positive", reverse)

    def packed(x):
        return pack_padded_sequence(x, lengths, batch_first=True)

    batch_sizes = packed(inputs[0]).batch_sizes
    weight = torch.randn(4, 13, 8)
    rows = [packed(x).data.to(DEVICE).requires_grad_() for x in inputs]
    leaves = [state.to(DEVICE).requires_grad_() for state in states]
    mask = None if reset is None else packed(reset).data.to(DEVICE)
    out, last = run(spec, rows, leaves, mask, Layout(False, batch_sizes, None))
    grads = torch.autograd.grad(
        [(out * packed(weight).data.to(DEVICE)).sum() + last.sum()], [*rows, *leaves], allow_unused=True
    )
    for b, length in enumerate(lengths.tolist()):
        one = [x[b : b + 1, :length].double().requires_grad_() for x in inputs]
        state = [x[b : b + 1].double().requires_grad_() for x in states]
        truth, truth_last = by_steps(spec, one, state, None if reset is None else reset[b : b + 1, :length])
        loss = (truth * weight[b, :length]).sum() + truth_last.sum()
        expected = torch.autograd.grad(loss, [*one, *state], allow_unused=True)

        def of(data, b=b, length=length):
            padded, _ = pad_packed_sequence(packed(weight)._replace(data=data.cpu()), batch_first=True)
            return padded[b : b + 1, :length].double()

        close = {"rtol": 2e-6, "atol": 2e-6}
        torch.testing.assert_close(of(out.detach()), truth.detach(), **close)
        torch.testing.assert_close(last[b : b + 1].detach().cpu().double(), truth_last.detach(), **close)
        for got, grad in zip(grads[:2], expected[:2], strict=True):
            torch.testing.assert_close(of(got), grad, **close)
        for got, grad in zip(grads[2:], expected[2:], strict=True):
            if grad is not None:
                torch.testing.assert_close(got[b : b + 1].cpu().double(), grad, **close)


@covered(cell=["mingru", "minlstm", "mingru_rotation"], reverse=[False, True], time_first=[False, True])
def test_padded_sequences(cell, reverse, time_first, plan, use_plan):
    """The state passes the padding, whose output and gradients are 0 whatever it contains."""
    use_plan(plan)
    lengths = torch.tensor([13, 0, 18], device=DEVICE)
    inputs, states, reset = make(cell, 3, 18, 4, torch.float32, reset=True)
    padding = torch.arange(18, device=DEVICE) >= lengths[:, None]
    dt, weight = torch.rand(3, 18, device=DEVICE), torch.linspace(-1, 1, 4, device=DEVICE)
    layout = Layout(time_first, None, lengths)

    def results(function, name, in_padding):
        leaves = [x.masked_fill(along(padding, x), in_padding) for x in (dt, *on_device(inputs))]
        leaves = [x.requires_grad_() for x in (*leaves, *on_device(states))]
        *sequences, mask = [x.transpose(0, 1) if time_first else x for x in (*leaves[:-2], reset.to(DEVICE))]
        start = Start(*leaves[-2:], mask, sequences[0])
        out, last = function(name, Call(Spec(cell, "positive", reverse), sequences[1:], start, layout))
        grads = torch.autograd.grad((out * weight).sum() + last.square().sum(), leaves)
        return [out, last, *grads]

    def kernel(name, call):
        return autograd.run_kernel(route.Choice(name, True, "kernel"), call, False)

    def composed(name, call):
        return autograd.composed(route.Choice(name, True), call)

    for got, truth in zip(results(kernel, "triton", math.nan), results(composed, "torch", 0.0), strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)


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
@pytest.mark.parametrize("cell", ["mingru", "mingru_rotation", "minlstm"])
def test_decays_near_1(cell, timed, use_plan):
    """The state forgets so slowly that all chunks and segments count until the end."""
    use_plan(Plan(8, 16, 2, 3, 1, 2))
    inputs, states, _ = make(cell, 1, 500, 2, torch.float32)
    inputs[-2] = inputs[-2] - 9.0
    if cell == "minlstm":
        inputs[0] = inputs[0] + 4.0
    states, dt = [state.abs() for state in states], 0.5 + torch.rand(1, 500) if timed else None
    spec = Spec(cell, "positive", False, 0.5 if timed else 0.0)
    check(spec, inputs, states, None, dt)
    if parts_of(cell) == 1:
        out, _ = run(spec, on_device(inputs), on_device(states), None, dt=None if dt is None else dt.to(DEVICE))
        wide = [[x.double() for x in tensors] for tensors in (inputs, states)]
        truth, _ = by_steps(spec, *wide, None, None if dt is None else dt.double())
        assert reference.relative_error(out.cpu(), truth) <= 2e-6


# Products of complex numbers and infinities follow no common rule.
@covered(
    lambda row: row["cell"] == "mingru" or math.isnan(row["bad"]),
    cell=["mingru", "mingru_rotation"],
    bad=[math.nan, math.inf, -math.inf],
    reverse=[False, True],
)
def test_nan_and_infinity_pass_as_step_by_step_and_stop_at_a_reset(cell, bad, reverse, plan, use_plan):
    use_plan(plan)
    inputs, states, _ = make(cell, 1, 20, 5, torch.float32)
    where, cut = (13, 4) if reverse else (4, 13)
    reset = torch.zeros(1, 20, dtype=torch.bool)
    reset[:, cut] = True
    inputs[1][0, where, :2] = bad
    inputs[0][0, where, 2] = bad
    spec = Spec(cell, "linear", reverse)
    weights = torch.ones_like(inputs[0]), torch.ones_like(states[0])
    got = graded(run, spec, on_device(inputs), on_device(states), reset.to(DEVICE), weights)
    wide = [[tensor.double() for tensor in tensors] for tensors in (inputs, states)]
    expected = graded(by_steps, spec, *wide, reset, weights)
    for name, truth in expected.items():
        # A derivative by autograd may be 0 times infinity where the kernel's formula has no such product.
        if name in ("out", "last") or not math.isinf(bad):
            found = got[name].cpu()
            assert torch.equal(found.isnan(), truth.isnan()), name
            torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5, equal_nan=True)


@covered(cell=["mingru", "mingru_signed"])
def test_an_infinite_state_outlives_decays_whose_product_underflows(cell, plan, use_plan):
    use_plan(plan)
    inputs, states, _ = make(cell, 1, 60, 2, torch.float32, scale=0.1)
    # Decays of 1e-4, of both signs if the gate is signed.
    inputs[0] = inputs[0] + 9.2 if cell == "mingru" else 2e-4 * inputs[0].sign()
    states[0][0, 0, 1] = math.inf
    out, last = run(Spec(cell, "positive", False), on_device(inputs), on_device(states), None)
    truth, truth_last = by_steps(Spec(cell, "positive", False), inputs, states, None)
    assert truth[..., 1].isinf().all()
    assert torch.equal(out[..., 1].cpu(), truth[..., 1])
    assert torch.equal(last[..., 1].cpu(), truth_last[..., 1])
    assert out[..., 0].isfinite().all()


EXTREMES = [1e4, -1e4, math.inf, -math.inf, math.nan, 0.0, -0.0, 80.0, -80.0]


@pytest.mark.parametrize("activation", ["positive", "linear", "tanh"])
def test_extreme_pre_activations(activation, use_plan):
    use_plan(Plan(1, 1, 64, 1, 1, None))
    # Each extreme number beside each good one.
    bad = torch.tensor(EXTREMES).repeat_interleave(4).view(1, 1, -1)
    good, h = (
        torch.tensor(x).repeat(len(EXTREMES)).view(1, 1, -1) for x in ([-1.0, 0.5, 2.0, 0.0], [1.0, 0.0, 3.0, 0.5])
    )
    for cell, pairs in {
        "mingru": [(bad, good), (good, bad), (bad, bad)],
        "mingru_signed": [(bad, good), (good, bad), (bad, bad)],
        "mingru_rotation": [(bad, good), (good, bad), (bad, bad)],
        "minlstm": [(bad, good, good), (good, bad, good), (good, good, bad), (bad, bad, good)],
        "minlstm_unnormalized": [(bad, good, good), (good, bad, good), (good, good, bad), (bad, bad, good)],
    }.items():
        for inputs in pairs:
            spec = Spec(cell, activation, False)
            out, _ = run(spec, on_device(inputs), on_device((h, h)), None)
            truth, _ = by_steps(spec, [x.double() for x in inputs], (h.double(), h.double()), None)
            if cell == "minlstm" and inputs[0] is inputs[1] is bad:
                # The reference divides 0 by 0; both gates are equal.
                halves = 0.5 * (h.double() + reference.ACTIVATIONS[activation](good.double()))
                truth = torch.where(bad == -1e4, halves, truth)
            # Products of complex numbers and infinities follow no common rule.
            compared = ~bad.isinf() if cell == "mingru_rotation" and inputs[-1] is bad else torch.ones_like(bad).bool()
            # The reference of the signed gate computes 1 - |a|. The products of a rotation cancel.
            atol = {"mingru_signed": 1e-16, "mingru_rotation": 1e-6}.get(cell, 1e-37)
            found = out.cpu()[compared], truth.float()[compared]
            torch.testing.assert_close(*found, rtol=1e-6, atol=atol, equal_nan=True)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 2e-7), (torch.float64, 1e-15)])
def test_angles_of_any_size(dtype, allowed, use_plan):
    """Whole turns are subtracted exactly, so that a large angle is as accurate as a small one."""
    use_plan(Plan(1, 1, 1024, 1, 1, None))
    # From 2^digits on, all numbers are integers, and soon all are whole turns, which are 8.
    digits = 23 if dtype == torch.float32 else 52
    integers = [
        2.0**power + 2.0 ** (power - digits) * torch.arange(64).double() for power in range(digits - 2, digits + 14)
    ]
    angle = torch.cat([torch.linspace(-30, 30, 2048), torch.linspace(-1e5, 1e5, 2048), *integers]).to(dtype)
    # Pairs of a gate that keeps the state and an angle, of no candidate, and of the state 1.
    gates, none, h = (
        torch.stack([torch.full_like(angle, x), y], -1).reshape(1, 1, -1)
        for x, y in ((-200.0, angle), (0.0, 0.0 * angle), (1.0, 0.0 * angle))
    )
    out, _ = run(Spec("mingru_rotation", "linear", False), on_device([gates, none]), on_device([h, h]), None)
    turn = math.pi / 4 * torch.remainder(angle.double(), 8.0)
    truth = torch.stack([turn.cos(), turn.sin()], -1).reshape(1, 1, -1)
    assert (out.cpu().double() - truth).abs().max() <= allowed


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 6e-7), (torch.float64, 2e-15)])
def test_whole_turns_of_a_long_time_are_subtracted_exactly(dtype, allowed, use_plan):
    use_plan(Plan(1, 1, 1024, 1, 1, None))
    angle = torch.linspace(-3, 3, 2048).to(dtype)
    gates, none, h = (
        torch.stack([x, y], -1).reshape(1, 1, -1)
        for x, y in ((torch.full_like(angle, -200.0), angle), (0 * angle, 0 * angle), (1 + 0 * angle, 0 * angle))
    )
    for dt in (0.3, 1000.1, 1e5 / 3):
        time = torch.full((1, 1), dt, dtype=dtype)
        start = Start(h, h, None, time)
        spec = Spec("mingru_rotation", "linear", False)
        out, _ = ops.recurrence(spec, on_device([gates, none]), Start(*on_device(start)), backend="triton")
        # The product is exact in extended precision.
        turns = (np.longdouble(time.item()) * angle.numpy().astype(np.longdouble)) % 8
        turn = torch.from_numpy((turns * np.longdouble(math.pi) / 4).astype(np.float64))
        truth = torch.stack([turn.cos(), turn.sin()], -1).reshape(1, 1, -1)
        assert (out.cpu().double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", ["mingru", "mingru_rotation", "minlstm"])
def test_after_an_infinite_time_only_the_candidate_is_left(cell, dtype, use_plan):
    use_plan(Plan(1, 1, 8, 1, 1, None))
    gates = torch.tensor([-2000.0, -110.0, -1.0, 3.0], dtype=dtype).repeat_interleave(2).view(1, 1, 8)
    candidate, h = torch.linspace(-2, 2, 8, dtype=dtype).view(1, 1, 8), torch.ones(1, 1, 8, dtype=dtype)
    inputs = [gates, candidate] if cell != "minlstm" else [-gates, gates, candidate]
    inputs = [x.to(DEVICE).requires_grad_() for x in inputs]
    start = Start(*on_device([h, h, None, torch.full((1, 1), math.inf, dtype=dtype)]))
    out, _ = ops.recurrence(Spec(cell, "linear", False), inputs, start, backend="triton")
    torch.testing.assert_close(out.detach().cpu(), candidate, rtol=0, atol=0)
    grads = torch.autograd.grad(out.sum(), inputs)
    torch.testing.assert_close(grads[-1].cpu(), torch.ones_like(candidate), rtol=0, atol=0)
    assert not any(grad.any() for grad in grads[:-1])


def test_small_candidates_keep_their_relative_precision(use_plan):
    use_plan(Plan(1, 1, 512, 1, 1, None))
    for dtype, allowed in ((torch.float32, 4e-7), (torch.float64, 2e-15)):
        v = torch.logspace(-30, 1, 500, dtype=dtype).reshape(1, 1, -1)
        for candidate in (v, -v):
            inputs = on_device([torch.zeros_like(v), candidate])
            out, _ = run(Spec("mingru", "tanh", False), inputs, on_device([torch.zeros_like(v)] * 2), None)
            truth = 0.5 * candidate.double().tanh()
            assert ((out.cpu() - truth).abs() / truth.abs()).max() < allowed


@covered(reverse=[False, True])
def test_linear_scan_that_grows(reverse, plan, use_plan):
    """A product of decays that overflows must not be seen in states that do not."""
    use_plan(plan)
    steps = 130
    a, b = torch.full((1, steps, 1), 3.0), torch.zeros(1, steps, 1)
    b[0, 20 if reverse else steps - 21] = 1.0
    inputs = on_device([a, b])
    leaf = inputs[1].requires_grad_()
    out, last = run(Spec("linear_scan", "linear", reverse), inputs, on_device([torch.zeros(1, 1, 1)] * 2), None)
    truth = reference.linear_scan(a.double(), b.double(), reverse=reverse)
    torch.testing.assert_close(out.detach().cpu().double(), truth, rtol=1e-5, atol=0)
    early = steps - 21 if reverse else 20
    (grad,) = torch.autograd.grad(out[:, early].sum() + 0.0 * last.sum(), leaf)
    assert grad.isfinite().all()
    first = grad[0, steps - 1 if reverse else 0, 0].cpu().double()
    torch.testing.assert_close(first, torch.tensor(3.0).double() ** 20)


@covered(reverse=[False, True], cell=["linear_scan", "complex_linear_scan"])
def test_linear_scan_whose_decays_underflow_before_they_grow(reverse, cell, plan, use_plan):
    use_plan(plan)
    decays, pair = (
        torch.tensor([1e-20] * 3 + [1] + [1e9] * 4),
        torch.tensor([1.0, cell == "linear_scan"]),
    )
    a, b = decays[None, :, None] * pair, torch.zeros(1, 8, 2)
    spec, inputs = Spec(cell, "linear", reverse), on_device([a.flip(1) if reverse else a, b])
    states = on_device(torch.full((2, 1, 1, 2), 1e25))
    got, expected = (
        graded(
            function,
            spec,
            *([x.to(dtype) for x in xs] for xs in (inputs, states)),
            None,
            [torch.ones_like(x) for x in (a, states[0])],
        )
        for function, dtype in ((run, torch.float32), (by_steps, torch.float64))
    )
    for name in ("out", "last", "1", "2"):
        torch.testing.assert_close(got[name].cpu().double(), expected[name], rtol=1e-5, atol=0)


def test_a_half_width_state_is_read_and_written_in_its_dtype(use_plan):
    use_plan(PLANS["chunks"])
    inputs, states, reset = make("mingru", 2, 13, 8, torch.bfloat16, reset=True)
    states = [state.bfloat16() for state in states]
    got = graded(
        *(run, Spec("mingru", "positive", False), on_device(inputs), on_device(states), reset.to(DEVICE)),
        (torch.ones(2, 13, 8), torch.ones(2, 1, 8)),
    )
    assert all(tensor.dtype == torch.bfloat16 for tensor in got.values())
    check(Spec("mingru", "positive", False), inputs, states, reset)


def test_a_reset_that_was_viewed_from_bytes(use_plan):
    """Its bytes may be others than 0 and 1."""
    use_plan(PLANS["chunks"])
    inputs, states, _ = make("mingru", 1, 9, 4, torch.float32)
    twos = torch.full((1, 9), 2, dtype=torch.uint8).view(torch.bool)
    spec = Spec("mingru", "positive", False)
    outs = [run(spec, on_device(inputs), on_device(states), mask.to(DEVICE))[0] for mask in (twos, twos | twos)]
    assert torch.equal(*outs)


# The layer with its linear map.


def linear_call(x, linear, states, reset, spec, layout, keep):
    call = Call(spec, [x, linear.weight, linear.bias], Start(*states, reset), layout)
    return autograd.run_kernel(route.Choice("triton", True, "linear_kernel"), call, keep)


@covered(
    cell=["minlstm", "mingru_rotation"], order=["batch first", "time first", "transposed"], with_bias=[False, True]
)
def test_linear_map_and_recurrence(cell, order, with_bias, plan, use_plan):
    use_plan(plan)
    keep = with_bias == (order == "time first")
    spec, layout = Spec(cell, "tanh", order == "time first"), Layout(order == "time first", None, None)
    num_features = 6 if parts_of(cell) > 1 else 5
    linear = nn.Linear(3, NUM_INPUTS[cell] * num_features, with_bias, device=DEVICE)
    x = torch.randn(9, 2, 3, device=DEVICE)
    x = x.transpose(0, 1) if order == "transposed" else x if order == "time first" else x.transpose(0, 1).contiguous()
    _, states, reset = make(cell, 2, 9, num_features, torch.float32, reset=True)
    states, reset = on_device(states), reset.to(DEVICE)
    reset = reset.t() if layout.time_first else reset
    leaves = [x.requires_grad_(), *(state.requires_grad_() for state in states), *linear.parameters()]
    weight = torch.randn(*x.shape[:2], num_features, device=DEVICE)

    def grads(out, last):
        assert out.is_contiguous()
        return [out, last, *torch.autograd.grad((out * weight).sum() + last.square().sum(), leaves)]

    got = grads(*linear_call(x, linear, states, reset, spec, layout, keep))
    pre = linear(x).chunk(NUM_INPUTS[cell], -1)
    expected = grads(*ops.recurrence(spec, pre, Start(*states, reset), layout, "torch"))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def test_one_buffer_holds_the_gradients_of_all_inputs(use_plan, monkeypatch):
    """They are one operand of both matrix products, without a copy."""
    use_plan(PLANS["walk"])
    seen = []
    kept = launch.backward
    monkeypatch.setattr(launch, "backward", lambda *args: seen.append(kept(*args)) or seen[-1])
    linear, x = nn.Linear(3, 8, device=DEVICE), torch.randn(2, 5, 3, device=DEVICE)
    state = torch.zeros(2, 1, 4, device=DEVICE)
    out, _ = linear_call(x, linear, (state, state), None, Spec("mingru", "positive", False), ops.BATCH_FIRST, True)
    out.sum().backward()
    grads = seen[0][0]
    assert grads.shape == (2, 5, 8)
    assert grads.is_contiguous()
    torch.testing.assert_close(linear.weight.grad, grads.flatten(0, 1).t() @ x.flatten(0, 1))
    torch.testing.assert_close(linear.bias.grad, grads.sum((0, 1)))


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
@pytest.mark.parametrize(("lengths", "timed"), [(None, False), ([7, 3], False), (None, True)])
def test_layers_run_on_triton(lengths, timed, launches):
    rnn = layer(num_layers=2, bidirectional=True, min_decay=[0.1, 0.6] if timed else 0.0)
    x = torch.randn(2, 7, 3, device=DEVICE)
    lengths = None if lengths is None else torch.tensor(lengths)
    reset = torch.rand(2, 7, device=DEVICE) < 0.3
    dt = (2 * torch.rand(2, 7, device=DEVICE)).requires_grad_() if timed else None
    leaves = [*rnn.parameters(), *([] if dt is None else [dt])]
    out, last = rnn(x, None, reset, lengths, dt)
    grads = torch.autograd.grad(out.square().sum() + last.sum(), leaves)
    assert launches == ["forward"] * 4 + ["backward"] * 4
    with mingru.use_backend("torch"):
        expected, expected_last = rnn(x, None, reset, lengths, dt)
        truth = torch.autograd.grad(expected.square().sum() + expected_last.sum(), leaves)
    for one, other in zip([out, last, *grads], [expected, expected_last, *truth], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_auto")
@pytest.mark.parametrize("form", ["lengths", "packed"])
def test_another_default_device(form, launches):
    rnn, x, lengths = layer(), torch.randn(3, 7, 3, device=DEVICE), torch.tensor([7, 3, 2])
    inputs = (x, None, None, lengths)
    if form == "packed":
        inputs = (pack_padded_sequence(x, lengths, batch_first=True),)
    expected, expected_last = rnn(*inputs)
    with torch.device("meta"):
        out, last = rnn(*inputs)
    assert launches == ["forward", "forward"]
    torch.testing.assert_close(out[0], expected[0])
    torch.testing.assert_close(last, expected_last)


@pytest.mark.usefixtures("_auto")
@pytest.mark.parametrize("grad", [False, True])
def test_a_step_is_one_launch_for_each_layer(grad, launches):
    with torch.set_grad_enabled(grad):
        layer(num_layers=3)(torch.randn(2, 1, 3, device=DEVICE))
        assert launches == ["forward"] * 3
        launches.clear()
        mingru.MinGRUCell(3, 8, device=DEVICE)(torch.randn(2, 3, device=DEVICE))
        assert launches == ["forward"]


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
    state = lm.initial_state(2)
    with NoReads():
        out, h = rnn(x, None, reset)
        (out.sum() + h.sum()).backward()
        logits, _ = lm(torch.ones(2, steps, dtype=torch.int64, device=DEVICE), state, reset)
        logits.sum().backward()
    assert all(p.grad is not None for p in rnn.parameters())


@pytest.mark.usefixtures("_auto")
@pytest.mark.parametrize("gate", ["sigmoid", "rotation"])
def test_images_run_on_triton(gate, launches):
    rnn = mingru.MinConv2dGRU(2, 4, 1, gate=gate, device=DEVICE)
    x = torch.randn(1, 4, 2, 3, 3, device=DEVICE)
    out, _ = rnn(x)
    out.sum().backward()
    assert launches == ["forward", "backward"]
    with mingru.use_backend("torch"):
        torch.testing.assert_close(rnn(x)[0], out)


# Transforms, graphs and errors.


@pytest.mark.parametrize("cell", ["mingru", "mingru_rotation"])
def test_second_derivatives(cell, use_plan):
    use_plan(Plan(1, 4, 2, 1, 1, None))
    inputs, states, _ = make(cell, 1, 3, 2, torch.float64)
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (*inputs, *states)]
    reset = torch.tensor([[False, True, False]], device=DEVICE)

    def function(*leaves):
        return run(Spec(cell, "tanh", True), leaves[:2], leaves[2:], reset)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_vmap_and_forward_mode(use_plan):
    use_plan(Plan(1, 4, 4, 1, 1, None))
    inputs, _, _ = make("mingru", 3, 5, 4, torch.float64)
    inputs = on_device(inputs)

    def one(gate, candidate):
        return mingru.functional.mingru(gate[None], candidate[None], backend="triton")[0]

    whole = mingru.functional.mingru(*inputs, backend="torch")
    torch.testing.assert_close(torch.vmap(one)(*inputs), whole)
    loss = torch.func.grad(lambda *args: one(*args).square().sum())
    leaf = inputs[0].clone().requires_grad_()
    expected = torch.autograd.grad(mingru.functional.mingru(leaf, inputs[1], backend="torch").square().sum(), leaf)[0]
    torch.testing.assert_close(torch.vmap(loss)(*inputs), expected)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    found, truth = (
        torch.func.jvp(lambda *args, b=b: mingru.functional.mingru(*args, backend=b), tuple(inputs), tangents)[1]
        for b in ("triton", "torch")
    )
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("layout", ["time first", "packed", "lengths"])
def test_operators_keep_torchs_contract(layout, use_plan):
    use_plan(PLANS["segments"])
    batch_sizes = torch.tensor([3, 3, 2, 2, 1]) if layout == "packed" else None
    leading = {"lengths": (3, 5), "time first": (5, 3), "packed": (11,)}[layout]
    inputs = [torch.randn(*leading, 4, device=DEVICE) for _ in range(2)]
    states, reset = on_device(torch.rand(2, 3, 1, 4)), torch.rand(*leading, device=DEVICE) < 0.3
    dt = torch.rand(*leading, device=DEVICE)
    lengths = torch.tensor([5, 2, 0], device=DEVICE) if layout == "lengths" else None
    given, how = [*states, reset, dt, batch_sizes, lengths], (["mingru", "positive"], 0.1)
    order, operators = [True, layout == "time first"], torch.ops.mingru
    torch.library.opcheck(operators.recurrence_triton_forward.default, (inputs, given, *how, order))
    out, last = operators.recurrence_triton_forward(inputs, given, *how, order)
    saved = [out, torch.randn_like(out), torch.randn_like(last)]
    for needs in ((False, False), (True, False), (False, True)):
        args = (inputs, given, saved, *how, [*order, *needs])
        torch.library.opcheck(operators.recurrence_triton_backward.default, args)


def test_values_that_are_not_in_memory():
    """Negative views and tensors without memory, as each argument and as a gradient."""

    def negative(x):
        return torch.complex(torch.zeros_like(x), -x).conj().imag

    def run(x, h, dt):
        reset = dt < 0.3
        return mingru.functional.mingru(x, x, h, dt=dt, reset=reset, initial_state=h, backend="triton")

    args = (torch.randn(2, 3, 4, device=DEVICE), torch.rand(2, 1, 4, device=DEVICE), torch.rand(2, 3, device=DEVICE))
    expected = run(*args)
    for index, each in enumerate(args):
        torch.testing.assert_close(run(*args[:index], negative(each), *args[index + 1 :]), expected)
        zero = torch._efficientzerotensor(*each.shape, device=DEVICE)
        found = run(*args[:index], zero, *args[index + 1 :])
        torch.testing.assert_close(found, run(*args[:index], torch.zeros_like(each), *args[index + 1 :]))
    x = args[0].requires_grad_()
    out = run(x, *args[1:])
    weight = torch.randn_like(out)
    found, truth = (torch.autograd.grad(out, x, each, retain_graph=True) for each in (negative(weight), weight))
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize(("sizes", "rows"), [([3, 3], 5), ([1, 3], 4), ([3, 2], 40), ([3, 0], 3)])
def test_operators_refuse_batch_sizes_that_do_not_fit(sizes, rows):
    pre, h = torch.randn(rows, 4, device=DEVICE), torch.rand(sizes[0], 1, 4, device=DEVICE)
    given = [h, None, None, None, torch.tensor(sizes), None]
    with pytest.raises(ValueError, match="mingru: batch_sizes must be positive, must not increase, and sum to"):
        torch.ops.mingru.recurrence_triton_forward([pre, pre], given, ["mingru", "positive"], 0.0, [False, False])


@pytest.mark.parametrize("layout", ["time first", "packed", "lengths", "linear_scan", "complex_linear_scan"])
def test_operators_fall_back_in_a_captured_graph(layout, break_kernel, use_plan):
    """All results of the operators, whose kernel then fails."""
    use_plan(PLANS["walk"])
    is_scan = "scan" in layout
    batch_sizes = torch.tensor([3, 3, 2, 2, 1]) if layout == "packed" else None
    leading = {"time first": (5, 3), "packed": (11,)}.get(layout, (3, 5))
    width = (4, 2) if layout == "complex_linear_scan" else (4,)
    inputs = [0.5 * torch.randn(*leading, *width, device=DEVICE) for _ in range(2)]
    states = [x.to(DEVICE) for x in torch.rand(2, 3, 1, *width)]
    reset, dt = torch.rand(*leading, device=DEVICE) < 0.3, torch.rand(*leading, device=DEVICE)
    lengths = torch.tensor([5, 2, 0], device=DEVICE) if layout == "lengths" else None
    given = [states[0], None if is_scan else states[1], reset, None if is_scan else dt, batch_sizes, lengths]
    how = ([layout, "linear"], 0.0) if is_scan else (["mingru", "positive"], 0.1)
    order, operators = [True, layout == "time first"], torch.ops.mingru

    def results():
        out, last = operators.recurrence_triton_forward(inputs, given, *how, order)
        saved = [out, torch.ones_like(out), torch.ones_like(last)]
        flags = [*order, not is_scan, not is_scan]
        return out, last, *operators.recurrence_triton_backward(inputs, given, saved, *how, flags)

    expected = results()
    break_kernel()
    launch._compiled.clear()
    with pytest.warns(RuntimeWarning, match="slower tensor operations in a captured graph.*no C compiler found"):
        found = results()
    for one, other in zip(found, expected, strict=True):
        assert (one.stride(), one.dtype) == (other.stride(), other.dtype)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_auto")
@pytest.mark.filterwarnings("ignore:.*Function.*should not be instantiated:DeprecationWarning")
def test_a_compiled_layer_falls_back(break_kernel):
    torch.compiler.reset()
    rnn, x = layer(), torch.randn(2, 9, 3, device=DEVICE)
    expected, _ = rnn(x)
    truth = torch.autograd.grad(expected.square().sum(), rnn.parameters())
    break_kernel()
    launch._compiled.clear()
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="slower tensor operations in a captured graph.*no C compiler found"):
        out, _ = compiled(x)
    with pytest.warns(RuntimeWarning, match="slower tensor operations in a captured graph.*no C compiler found"):
        grads = torch.autograd.grad(out.square().sum(), rnn.parameters())
    for one, other in zip((out, *grads), (expected, *truth), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# Dynamo's own way of tracing a function.
@pytest.mark.filterwarnings("ignore:.*Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("_auto")
@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 9])])
def test_compiles_without_a_graph_break(lengths):
    torch.compiler.reset()
    rnn = layer(bidirectional=True)
    x = torch.randn(2, 9, 3, device=DEVICE, requires_grad=True)
    reset = torch.rand(2, 9, device=DEVICE) < 0.2
    graphs = []

    def capture(graph, example_inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    compiler = aot_autograd(fw_compiler=capture)
    out, last = torch.compile(rnn, fullgraph=True, backend=compiler)(x, None, reset, lengths)
    assert "recurrence_triton_forward" in graphs[0].code
    expected, expected_last = rnn(x, None, reset, lengths)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(last, expected_last)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    (truth,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(grad, truth)


def test_exports_with_its_operator():
    rnn = layer()
    x = torch.randn(2, 9, 3, device=DEVICE)
    with torch.no_grad(), mingru.use_backend("triton"):
        length = torch.export.Dim("length", min=2, max=64)
        program = torch.export.export(rnn, (x,), dynamic_shapes=({1: length},))
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert "mingru.recurrence_triton_forward.default" in targets
        longer = torch.randn(2, 17, 3, device=DEVICE)
        torch.testing.assert_close(program.module()(longer)[0], rnn(longer)[0])


class Broken:
    """A kernel that fails to launch, for some calls and a number of times."""

    def __init__(self, times=math.inf, fails=lambda options: True):
        self.times, self.fails, self.kernel = times, fails, kernels.recurrence_kernel

    def __getitem__(self, grid):
        def launch(**options):
            if self.times > 0 and self.fails(options):
                self.times -= 1
                raise RuntimeError("no C compiler found\nmore lines")
            self.kernel[grid](**options)

        return launch


@pytest.fixture
def break_kernel(monkeypatch):
    return lambda *args: monkeypatch.setattr(kernels, "recurrence_kernel", Broken(*args))


def is_backward(options):
    return "grad_out" in options


FALLS_BACK = "using the slower backend 'torch'. .*no C compiler found"


def results_of(function, *leaves):
    """Return the values of a function and the gradients of its tensors."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out.abs().square().sum(), leaves)]


def second(x):
    leaf = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(mingru.functional.mingru(leaf, leaf).square().sum(), leaf, create_graph=True)
    return [grad, *torch.autograd.grad(grad.sum(), leaf)]


def mapped(x):
    return torch.vmap(lambda x: mingru.functional.mingru(x[None], x[None])[0])(x)


CALLS = {
    "mingru": lambda x: results_of(mingru.functional.mingru, x, x),
    "linear_scan": lambda x: results_of(mingru.functional.linear_scan, x, x),
    "complex linear_scan": lambda x: results_of(mingru.functional.linear_scan, x + 0j, x + 0j),
    "a layer": lambda x: results_of(lambda x: seeded(mingru.MinGRU, 8, 4, device=DEVICE)(x)[0], x),
    "images": lambda x: results_of(lambda x: seeded(mingru.MinConv1dGRU, 5, 4, 1, device=DEVICE)(x[:, None])[0], x),
    "second derivatives": second,
    "vmap": lambda x: results_of(mapped, x),
    "batched gradients": torch.vmap(torch.func.grad(lambda x: mapped(x[None]).square().sum())),
}


def seeded(layer, *args, **options):
    torch.manual_seed(0)
    return layer(*args, **options)


@pytest.mark.usefixtures("_auto")
@pytest.mark.parametrize("fails", ["every launch", "the backward pass", "the linear scan"])
@pytest.mark.parametrize("call", CALLS)
def test_torch_runs_if_a_kernel_fails(call, fails, break_kernel):
    """Each reason is said once, and the numbers are those of the backend "torch"."""
    x = torch.rand(2, 5, 8, device=DEVICE)
    with mingru.use_backend("torch"):
        expected = CALLS[call](x)
    which = {"the backward pass": is_backward, "the linear scan": lambda options: "scan" in options["CELL"]}
    break_kernel(math.inf, which.get(fails, lambda options: True))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        first, again = CALLS[call](x), CALLS[call](x)
    messages = [str(warning.message) for warning in found if "slower backend" in str(warning.message)]
    assert len(set(messages)) == len(messages)
    if fails == "every launch":
        assert messages
        assert all(re.search(FALLS_BACK, message) for message in messages)
    for values in (first, again):
        torch.testing.assert_close(list(values), list(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_auto")
def test_a_failure_concerns_one_kernel(break_kernel, use_plan):
    """Other cells, dtypes and plans run, and a kernel that has run is launched again after a failure."""
    tried = []

    def fails(options):
        tried.append((options["CELL"], options["x0"].dtype, options["T"]))
        return tried[-1] == ("minlstm", torch.float32, 4)

    break_kernel(math.inf, fails)
    x = torch.randn(2, 5, 8, device=DEVICE)
    use_plan("walk")
    with pytest.warns(RuntimeWarning, match=FALLS_BACK):
        mingru.functional.minlstm(x, x, x)
    assert len(tried) == 2
    mingru.functional.minlstm(x, x, x)
    assert len(tried) == 2
    mingru.functional.mingru(x, x)
    mingru.functional.minlstm(*[x.double()] * 3)
    use_plan("chunks")
    mingru.functional.minlstm(x, x, x)
    assert tried[2:] == [("mingru", torch.float32, 4), ("minlstm", torch.float64, 4), ("minlstm", torch.float32, 3)]
    assert mingru.backends()["triton"] is True
    assert len(launch._failures) == 1
    # A kernel that has run before.
    break_kernel(1)
    use_plan("walk")
    with pytest.warns(RuntimeWarning, match=FALLS_BACK):
        mingru.functional.mingru(x, x)
    assert len(launch._failures) == 1
    torch.testing.assert_close(mingru.functional.mingru(x, x), mingru.functional.mingru(x, x, backend="triton"))


def test_a_kernel_that_fails_once_is_launched_again(break_kernel):
    break_kernel(1)
    x = torch.randn(2, 5, 8, device=DEVICE)
    out = mingru.functional.mingru(x, x, backend="triton")
    torch.testing.assert_close(out, mingru.functional.mingru(x, x, backend="torch"))
    assert not launch._failures


@pytest.mark.usefixtures("_auto")
def test_a_failure_while_a_graph_is_captured_is_an_error_of_that_call_alone(break_kernel, monkeypatch):
    break_kernel(1)
    x = torch.randn(2, 5, 8, device=DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(device, "is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="call the module once before the capture"):
            mingru.functional.mingru(x, x)
    assert not launch._failures
    mingru.functional.mingru(x, x)


@pytest.mark.usefixtures("_auto")
def test_a_failure_is_an_error_if_triton_was_selected(break_kernel):
    break_kernel()
    x = torch.randn(2, 5, 8, device=DEVICE)
    with pytest.raises(KernelFailure, match=r"'triton' cannot run this because .*no C compiler found\); use 'torch'"):
        mingru.functional.mingru(x, x, backend="triton")
    launch._failures.clear()
    with mingru.use_backend("triton"), pytest.raises(KernelFailure, match="no C compiler found"):
        mingru.MinGRU(8, 4, device=DEVICE)(x)


@pytest.mark.usefixtures("_auto")
def test_a_failure_in_backward_is_an_error_if_triton_was_selected(break_kernel):
    x = torch.randn(2, 5, 8, device=DEVICE, requires_grad=True)
    out = mingru.functional.mingru(x, x, backend="triton")
    with mingru.use_backend("triton"):
        layer_out, _ = mingru.MinGRU(8, 4, device=DEVICE)(x)
    break_kernel()
    # Outside of `use_backend`, as in another thread.
    for states in (out, layer_out):
        with pytest.raises(KernelFailure, match="no C compiler found"):
            states.sum().backward()


@pytest.mark.usefixtures("_auto")
def test_torch_computes_the_gradients_if_only_their_kernel_fails(break_kernel, launches):
    rnn, x = layer(), torch.randn(2, 5, 3, device=DEVICE)
    out, _ = rnn(x)
    truth = torch.autograd.grad(out.square().sum(), rnn.parameters(), retain_graph=True)
    break_kernel(math.inf, is_backward)
    with pytest.warns(RuntimeWarning, match=FALLS_BACK):
        grads = torch.autograd.grad(out.square().sum(), rnn.parameters())
    for one, other in zip(grads, truth, strict=True):
        torch.testing.assert_close(one, other)
    # Inference does not need that kernel.
    launches.clear()
    with torch.no_grad():
        rnn(x)
    assert launches == ["forward"]


@pytest.mark.usefixtures("_auto")
def test_autocast_rounds_as_the_linear_map_does(use_plan, launches):
    use_plan(PLANS["chunks"])
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
@pytest.mark.parametrize("shape", [(64, 1000, 100), (1, 20_000, 64), (300, 130, 513), (4096, 40, 128)])
@pytest.mark.parametrize("cell", ["mingru", "mingru_rotation", "minlstm", "linear_scan", "complex_linear_scan"])
def test_large_shapes_are_right_and_the_same_in_every_run(cell, shape):
    spec = Spec(cell, "positive" if cell in NUM_INPUTS else "linear", False)
    inputs, states, reset = make(cell, *shape, torch.float32, reset=True)
    inputs, states, reset = on_device(inputs), on_device(states), reset.to(DEVICE)
    weights = torch.randn_like(inputs[0]), torch.randn_like(states[0])
    got, again = (graded(run, spec, inputs, states, reset, weights) for _ in range(2))
    wide = [[tensor.double() for tensor in tensors] for tensors in (inputs, states)]

    def by_torch(*args):
        return run(*args, backend="torch")

    expected = graded(by_torch, spec, *wide, reset, weights)
    for name, truth in expected.items():
        if truth is None:
            continue
        assert torch.equal(got[name], again[name]), name
        assert ((got[name] - truth).abs().max() / truth.abs().max()) <= 2e-5, name


@needs_gpu
def test_a_million_steps():
    gate, candidate = (2 * torch.randn(1, 1_000_000, 4, device=DEVICE) for _ in range(2))
    # With slow decays, the roundings of about 8,000 decays to 6e-8 add up: 4e-6 in the interpreter after 50,000 steps.
    for shift, allowed in ((0.0, 2e-6), (9.0, 1e-5)):
        pair = gate - shift, candidate
        truth = mingru.functional.mingru(*(x.double() for x in pair), backend="torch")
        assert reference.relative_error(mingru.functional.mingru(*pair, backend="triton"), truth) <= allowed


@needs_gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    gate = torch.zeros(2, 2**21 + 8, 520, dtype=torch.bfloat16, device=DEVICE)
    out = mingru.functional.mingru(gate, gate, backend="triton")
    # h = 0.5 h + 0.25 from 0.5 stays 0.5.
    assert (out[-1, -1] == 0.5).all()
    assert (out[0, ::4096] == 0.5).all()


@needs_gpu
def test_a_cuda_graph_and_another_stream():
    rnn = layer(num_layers=2)
    x = torch.randn(4, 50, 3, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        expected = rnn(x)[0]
        with torch.cuda.stream(stream):
            rnn(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = rnn(x)[0]
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    trained = torch.cuda.make_graphed_callables(lambda x: rnn(x)[0], (x.clone().requires_grad_(),))
    torch.testing.assert_close(trained(x.requires_grad_()), expected)


@needs_gpu
def test_steps_of_a_language_model_in_a_cuda_graph():
    lm, ids = language_model().eval(), torch.randint(5, (3, 7), device=DEVICE)
    with torch.no_grad():
        expected, _ = lm(ids)
        token, state = ids[:, :1].clone(), lm.initial_state(3)
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
