"""Every class in every precision.

The truth is float64, step by step, from the very weights and inputs of the mode. What rounding costs, plain PyTorch
tells, by the same module on the back end "sequential" in the same precision: allowed is twice its error, thrice for
gradients.
"""

import copy

import pytest
import torch
from cases import CASES, assert_equal, graded, loss_of, tensors
from mode import each_case, given, in_mode, mode
from torch.utils import _pytree as pytree

import mingru


def make(case, **factory):
    return case.make(**factory), given(case, **factory)


def cast(args, dtype):
    return pytree.tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, args)


def truth_of(module, args):
    with mingru.use_backend("sequential"), torch.autocast("cpu", enabled=False):
        wide = copy.deepcopy(module).double()
        return graded(wide, wide, cast(args, torch.float64))


def check_errors(module, args, dtype):
    """Each as near to the truth as plain PyTorch comes, times 2 or 3; outputs within some roundings, whoever rounds."""
    found, truth, eps = graded(module, module, args), truth_of(module, args), torch.finfo(dtype).eps
    with mingru.use_backend("sequential"):
        by_plain_torch = graded(module, module, args)
    for name, exact in truth.items():
        error, plain_error = ((each[name] - exact).norm() for each in (found, by_plain_torch))
        if name.startswith("gradient"):
            assert exact.norm() > 0
            # Plain PyTorch may be right by chance, to less than a rounding.
            assert error <= max(3 * plain_error, eps * exact.norm()), name
        else:
            # A state that consists of inputs is exact.
            assert error > 0 or plain_error == 0
            assert error <= min(2 * plain_error, 4 * eps * exact.norm()), name
    dtypes = {name: each.dtype for name, each in found.items()}
    gradients = [dtypes.pop(name) for name in found if name.startswith("gradient")]
    return list(dtypes.values()), gradients


CASTS = [in_mode("autocast to bf16 on the CPU", torch.bfloat16), in_mode("autocast to fp16 on the CPU", torch.float16)]


@pytest.mark.parametrize("dtype", CASTS)
@each_case()
def test_autocast(case, dtype):
    module, args = make(case)
    with torch.autocast("cpu", dtype):
        outputs, gradients = check_errors(module, args, dtype)
    # A block adds to x, which is float32.
    sequences = [] if case.time_dim is None or case.name == "models.Block" else [dtype]
    assert outputs == sequences + [torch.float32] * (len(outputs) - len(sequences))
    assert set(gradients) == {torch.float32}


@pytest.mark.mode("autocast to bf16 on the CPU")
def test_autocast_rounds_no_state_of_the_torch_backend():
    x, h = torch.rand(3, 2, 50, 8), torch.rand(2, 1, 8)
    with torch.autocast("cpu", torch.bfloat16), mingru.use_backend("torch"):
        out = mingru.functional.mingru(*x[:2], h, kind="quaternion")
    assert_equal(out, mingru.functional.mingru(*x[:2], h, kind="quaternion"))


@pytest.mark.parametrize("dtype", [in_mode("pure bf16", torch.bfloat16), in_mode("pure fp16", torch.float16)])
@each_case()
def test_half_width(case, dtype):
    outputs, gradients = check_errors(*make(case, dtype=dtype), dtype)
    assert set(outputs) == set(gradients) == {dtype}


@mode("pure bf16", cases=[case for case in CASES if "Conv" in case.name])
def test_bfloat16_where_a_stride_leaves_one_place(case):
    """There oneDNN is wrong on a processor with AMX; without oneDNN, torch and the layers are right everywhere."""
    kind = getattr(mingru, case.name)
    module = kind(3, 4, 3, stride=2, dtype=torch.bfloat16)
    leading = (2,) if case.time_dim is None else (2, 7)
    args = [torch.randn(*leading, 3, *[3] * kind.num_space_dims, dtype=torch.bfloat16)]
    with torch.backends.mkldnn.flags(False):
        assert {each.shape[-1] for each in tensors(module(*args))} == {1}
        check_errors(module, args, torch.bfloat16)
    pytest.skip(
        "On processors with AMX, torch's bfloat16 convolutions are wrong, also under autocast, if a stride above 1 "
        "leaves one pixel in the last spatial dimension. With torch.backends.mkldnn.enabled = False they are right: "
        "https://github.com/pytorch/pytorch/issues/169688"
    )


@mode("float64")
def test_float64(case):
    module, args = make(case, dtype=torch.float64)
    found, truth = graded(module, module, args), truth_of(module, args)
    assert_equal(found, truth, rtol=1e-12, atol=1e-13)
    in_float32 = tensors(module.float()(*cast(args, torch.float32)))[0]
    assert not torch.allclose(in_float32.double(), truth["out"], rtol=1e-12, atol=1e-13)


# A loss that is scaled up, so that half-width gradients don't vanish


@mode("GradScaler step")
def test_grad_scaler(case):
    module, args = make(case)
    weights, truth, small = dict(module.named_parameters()), truth_of(module, args), 2.0**-26

    def error(scale, backend="auto"):
        optimizer, scaler = torch.optim.SGD(weights.values(), lr=1.0), torch.amp.GradScaler("cpu", init_scale=scale)
        with mingru.use_backend(backend), torch.autocast("cpu", torch.float16):
            outputs = tensors(module(*args))
        module.zero_grad()
        scaler.scale(loss_of(outputs) * small).backward()
        scaler.unscale_(optimizer)
        errors = [each.grad - truth[f"gradient of {name}"] * small for name, each in weights.items()]
        return torch.cat([each.flatten() for each in errors]).norm()

    assert 0 < error(2.0**24) <= 2 * error(2.0**24, "sequential")
    # Unscaled, half-width gradients are lost; scaled too much, they overflow.
    assert 4 * error(2.0**24) < error(1.0) and not error(2.0**60).isfinite()


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
