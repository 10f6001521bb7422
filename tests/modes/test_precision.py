"""Every class in every precision.

The truth is float64, step by step, from the very weights and inputs of the mode. What rounding costs, plain PyTorch
tells, by the same module on the back end "sequential" in the same precision: allowed is twice its error, thrice for
gradients.
"""

import copy

import pytest
import torch
from cases import CASES, Case, assert_equal, every_case, every_convolution, parametrized, tensors
from torch.utils import _pytree as pytree

import mingru


def make(case, **factory):
    module = case.make(**factory)
    args = [case.x(**factory), case.h(**factory)]
    reset = case.reset()
    # Or nothing might tell of h.
    reset[(0,) * reset.dim()] = False
    return module, [*args, reset]


def cast(args, dtype):
    return pytree.tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, args)


def loss_of(outputs):
    """Of numbers that differ, in float32 at least."""
    return sum((each.to(torch.promote_types(each.dtype, torch.float32)) - 2).square().mean() for each in outputs)


def run(module, args):
    """All outputs, and the gradients of all parameters, x and states."""
    args = pytree.tree_map(lambda x: x.detach().clone().requires_grad_(x.is_floating_point()), args)
    outputs = tensors(module(*args))
    wanted = [*module.parameters(), *(each for each in tensors(args) if each.is_floating_point())]
    # Outside of autocast, as its documentation has it.
    with torch.autocast("cpu", enabled=False):
        return outputs, torch.autograd.grad(loss_of(outputs), wanted)


def truth_of(module, args):
    with mingru.use_backend("sequential"), torch.autocast("cpu", enabled=False):
        return run(copy.deepcopy(module).double(), cast(args, torch.float64))


def check_errors(found, by_plain_torch, truth, eps):
    """Each as near to the truth as plain PyTorch comes, times 2 or 3; outputs within some roundings, whoever rounds."""
    for one, plain, exact in zip(found[0], by_plain_torch[0], truth[0], strict=True):
        error = (one - exact).norm()
        plain_error = (plain - exact).norm()
        assert error <= 2 * plain_error
        # A state that consists of inputs is exact.
        assert error > 0 or plain_error == 0
        assert error <= 4 * eps * exact.norm()
    for one, plain, exact in zip(found[1], by_plain_torch[1], truth[1], strict=True):
        assert exact.norm() > 0
        # Plain PyTorch may be right by chance, to less than a rounding.
        assert (one - exact).norm() <= max(3 * (plain - exact).norm(), eps * exact.norm())


def dtypes(of):
    return [each.dtype for each in of]


def check_autocast(case, dtype):
    module, args = make(case)
    with torch.autocast("cpu", dtype):
        found = run(module, args)
        with mingru.use_backend("sequential"):
            by_plain_torch = run(module, args)
    # A block adds to x, which is float32.
    sequences = [] if case.time_dim is None or case.name == "models.Block" else [dtype]
    assert dtypes(found[0]) == sequences + [torch.float32] * (len(found[0]) - len(sequences))
    assert set(dtypes(found[1])) == {torch.float32}
    check_errors(found, by_plain_torch, truth_of(module, args), torch.finfo(dtype).eps)


@pytest.mark.mode("autocast to bf16 on the CPU")
@every_case
def test_autocast_to_bfloat16(case):
    check_autocast(case, torch.bfloat16)


@pytest.mark.mode("autocast to fp16 on the CPU")
@every_case
def test_autocast_to_float16(case):
    check_autocast(case, torch.float16)


def check_pure(case, dtype):
    module, args = make(case, dtype=dtype)
    found = run(module, args)
    with mingru.use_backend("sequential"):
        by_plain_torch = run(module, args)
    assert set(dtypes(found[0])) == set(dtypes(found[1])) == {dtype}
    check_errors(found, by_plain_torch, truth_of(module, args), torch.finfo(dtype).eps)


@pytest.mark.mode("pure bf16")
@every_case
def test_bfloat16(case):
    check_pure(case, torch.bfloat16)


@pytest.mark.mode("pure bf16")
@every_convolution
def test_bfloat16_where_a_stride_leaves_one_place(case, monkeypatch):
    """There oneDNN is wrong on a processor with AMX; without oneDNN, torch and the layers are right everywhere."""
    kind = getattr(mingru, case.name)
    module = kind(3, 4, 3, stride=2, dtype=torch.bfloat16)
    leading = (2,) if case.time_dim is None else (2, 7)
    args = [torch.randn(*leading, 3, *[3] * kind.num_space_dims, dtype=torch.bfloat16)]
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    found = run(module, args)
    with mingru.use_backend("sequential"):
        by_plain_torch = run(module, args)
    assert {each.shape[-1] for each in found[0]} == {1}
    check_errors(found, by_plain_torch, truth_of(module, args), torch.finfo(torch.bfloat16).eps)
    pytest.skip(
        "On processors with AMX, the error of torch's bfloat16 convolution can be larger than its output, also under "
        "autocast. This happens if a stride above 1 leaves one pixel in the last spatial dimension. With "
        "torch.backends.mkldnn.enabled = False the output is correct: https://github.com/pytorch/pytorch/issues/169688"
    )


@pytest.mark.mode("pure fp16")
@every_case
def test_float16(case):
    check_pure(case, torch.float16)


@pytest.mark.mode("float64")
@every_case
def test_float64(case):
    module, args = make(case, dtype=torch.float64)
    found = run(module, args)
    assert set(dtypes(found[0])) == set(dtypes(found[1])) == {torch.float64}
    assert_equal(found, truth_of(module, args), rtol=1e-12, atol=1e-13)
    with pytest.raises(AssertionError):
        assert_equal(run(module.float(), cast(args, torch.float32)), found, rtol=1e-12, atol=1e-13, check_dtype=False)


# Long runs


def pieces_of(case):
    """How many steps there are in all, and in each call: one, but where ten thousand calls would take too long."""
    if case.time_dim is None:
        return (1_000 if "Conv" in case.name else 10_000), 1
    return 10_000, 1 if case.name == "MinGRU" else 100


@torch.no_grad()
def walk(case, module, x, h, steps):
    """All that comes out of x (S, B, ...), as (steps, features), and the last state, which goes from call to call."""
    found = []
    for piece in x.split(steps, 0):
        if case.time_dim is None:
            h = module(piece[0], h)
            found.append(tensors(h)[0].flatten())
        else:
            out, h = module(piece.movedim(0, case.time_dim), h)
            found.append(out.movedim(case.time_dim, 0).flatten())
    return torch.cat(found).view(x.shape[0], -1), h


def drift(case, state_dtype):
    """Worst error by number of steps, in units of 2^-8, and the mean one over the first and the last tenth.

    Relative to the root mean square of what should have come out.
    """
    num_steps, steps = pieces_of(case)
    module = case.make(dtype=torch.bfloat16)
    x = torch.randn(num_steps, 1, *case.features).bfloat16()
    h = cast(case.h(1), state_dtype)
    found, last = walk(case, module, x, h, steps)
    # The second state of a block consists of inputs.
    states = last[:1] if case.name == "models.Block" else tensors(last)
    assert {each.dtype for each in states} == {state_dtype}
    assert found.dtype == (state_dtype if case.time_dim is None else torch.bfloat16)
    # What runs from the end, or takes a mean over the steps, begins anew with every piece.
    in_one_pass = case.time_dim is not None and case.name not in ("MinLSTM", "drop_in.LSTM", "combined model")
    exact, _ = walk(case, module.double(), x.double(), cast(h, torch.float64), num_steps if in_one_pass else steps)
    errors = (found - exact).norm(dim=1) / exact.square().sum(1).mean().sqrt() * 256
    worst = {count: errors[:count].max().item() for count in (10, 100, 1_000, 10_000) if count <= num_steps}
    tenth = num_steps // 10
    return worst, errors[:tenth].mean().item(), errors[-tenth:].mean().item()


@pytest.mark.mode("pure bf16")
@parametrized(CASES, quick=[])
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32], ids=["bfloat16 state", "float32 state"])
def test_ten_thousand_steps(case, state_dtype):
    if state_dtype == torch.float32 and (case.name.startswith("drop_in") or case.name == "combined model"):
        # As of torch.nn.GRU, and the model has one.
        with pytest.raises(RuntimeError, match=r"must be torch\.bfloat16"):
            drift(case, state_dtype)
        return
    worst, first, last = drift(case, state_dtype)
    print(f"{case.name}: {', '.join(f'{error:.2f} by step {count}' for count, error in worst.items())} (times 2^-8)")
    assert 0 < max(worst.values()) < 6
    assert last < 1.25 * first


@pytest.mark.mode("pure bf16")
def test_a_long_memory_wants_a_state_in_float32():
    """A gate of a thousandth changes no number of eight bits; in float32 it changes the state all the same."""
    cell = mingru.MinGRUCell(3, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        cell.layers[0].linear.bias[:16] = -7
    x = torch.randn(3_000, 1, 3).bfloat16()
    case = Case("MinGRUCell", lambda **factory: mingru.MinGRUCell(3, 16, **factory))
    exact, _ = walk(case, copy.deepcopy(cell).double(), x.double(), torch.full((1, 16), 4.0).double(), 1)
    far, near = (
        (walk(case, cell, x, torch.full((1, 16), 4.0, dtype=dtype), 1)[0][-1] / exact[-1] - 1).abs().max()
        for dtype in (torch.bfloat16, torch.float32)
    )
    print(f"bfloat16 {far:.3f}, float32 {near:.4f}")
    assert near < 2**-8 < 1 < far


# A loss that is scaled up, so that half-width gradients don't vanish


def scaled_step(module, args, scale):
    """What is left of the scale after one step with such a loss, and the gradients that the optimizer saw."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with torch.autocast("cpu", torch.float16):
        outputs = tensors(module(*args))
    scaler.scale(loss_of(outputs) * 2**-20).backward()
    scaler.unscale_(optimizer)
    grads = [weight.grad.clone() for weight in module.parameters()]
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale(), grads


def distance(got, truth):
    return sum((one - other).square().sum() for one, other in zip(got, truth, strict=True)).sqrt()


@pytest.mark.mode("GradScaler step")
@every_case
def test_grad_scaler(case):
    module, args = make(case)
    before = [weight.detach().clone() for weight in module.parameters()]
    _, truth = truth_of(module, args)
    truth = [grad * 2**-20 for grad in truth[: len(before)]]

    def step(scale, backend="auto"):
        twin = copy.deepcopy(module)
        with mingru.use_backend(backend):
            return twin, *scaled_step(twin, args, scale)

    twin, scale, grads = step(2.0**18)
    assert scale == 2.0**18
    error = distance(grads, truth)
    _, _, by_plain_torch = step(2.0**18, "sequential")
    assert 0 < error <= 2 * distance(by_plain_torch, truth)
    # Unscaled, half-width gradients are lost.
    _, _, unscaled = step(1.0)
    assert 4 * error < distance(unscaled, truth)
    assert_equal(list(twin.parameters()), [one - grad for one, grad in zip(before, grads, strict=True)])
    assert any(not torch.equal(*pair) for pair in zip(before, twin.parameters(), strict=True))

    # So large a scale that they overflow: the step is left out, and the scale halved.
    twin, scale, grads = step(2.0**60)
    assert not all(grad.isfinite().all() for grad in grads)
    assert scale == 2.0**59
    assert_equal(list(twin.parameters()), before, rtol=0, atol=0)


@pytest.mark.mode("autocast to bf16 on the CPU")
@pytest.mark.parametrize("layer", [mingru.MinGRU, mingru.MinLSTM])
def test_a_gradient_taken_inside_autocast_of_a_forward_outside(layer):
    """It is computed as the forward was."""
    rnn = layer(3, 4)
    x = torch.randn(2, 7, 3)

    def gradient(rnn, x, autocast):
        x = x.requires_grad_()
        loss = rnn(x)[0].square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return torch.autograd.grad(loss, x, create_graph=True)[0]

    truth = gradient(copy.deepcopy(rnn).double(), x.double(), False)
    assert (gradient(rnn, x, True) - truth).norm() <= 1e-6 * truth.norm()
