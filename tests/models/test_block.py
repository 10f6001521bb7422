"""The residual block: dropout, states, errors, and its convolution. Its values: tests/properties."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import graded, needs_kernels, with_threads
from options import MEMORY, cover
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import mingru
from mingru.models import Block
from mingru.models.causal_conv import CausalConv
from mingru.ops.causal_conv import causal_conv, composed

DIMS, B, S = 5, 3, 11


def test_dropout():
    x = torch.randn(B, S, DIMS)
    block, plain = Block(DIMS, conv=3, mlp=2, dropout=1.0), Block(DIMS, conv=3, mlp=2)
    assert_close(block(x)[0], x + block.conv(x, torch.zeros(1, B, 2, DIMS))[0])
    assert torch.equal(block.eval()(x)[0], mingru.modules.layer.take_weights(plain, block)(x)[0])
    block = Block(DIMS, mlp=2, dropout=0.5)
    torch.manual_seed(1)
    out, _ = block(x)
    torch.manual_seed(1)
    y = x + F.dropout(block.out(block.rnn(x)[0]), 0.5)
    assert_close(out, y + F.dropout(block.mlp(y), 0.5))


CONVOLUTIONS = {
    "dtype": [torch.float64, torch.float32],
    "steps": [1, 3, 64, 131],
    "batch": [1, 5],
    "features": [1, 16, 37],
    "size": [2, 4, 9],
    **{name: [False, True] for name in ("bias", "reset", "lengths", "adds_x", "nan")},
    **{name: [*MEMORY] for name in ("memory", "memory_of_grad")},
}


@needs_kernels
@pytest.mark.parametrize("row", cover(CONVOLUTIONS), ids=str)
def test_the_operator_of_the_convolution_is_as_exact_as_tensor_operations(row):
    """Operations in float64 are exact; those of the same type have an error too. NaN is in the same places."""
    dtype, steps, batch, features, size, *_ = row.values()
    draw = partial(torch.randn, dtype=dtype)
    x, grad = (MEMORY[row[name]](draw(batch, steps, features)) for name in ("memory", "memory_of_grad"))
    state, grad_last = draw(2, 1, batch, size - 1, features)
    if row["nan"] and "for all" not in row["memory"]:
        state[0, 0, -1, 0] = x[-1, steps // 2, -1] = torch.nan
    weights = draw(size, features), draw(features) if row["bias"] else None
    reset = torch.rand(batch, steps) < 0.3 if row["reset"] else None
    lengths = torch.randint(steps + 1, (batch,)) if row["lengths"] else None

    def run(function, dtype):
        leaves = [None if each is None else each.to(dtype).requires_grad_() for each in (x, *weights, state)]
        results = function(*leaves, reset, lengths, size - 1, row["adds_x"])
        wanted = [each for each in leaves if each is not None]
        return *results, *torch.autograd.grad(results, wanted, (grad.to(dtype), grad_last.to(dtype)))

    exact, usual, found = run(composed, torch.float64), run(composed, dtype), run(causal_conv, dtype)
    for true, one, other in zip(exact, usual, found, strict=True):
        assert other.shape == one.shape and other.dtype == one.dtype and torch.equal(other.isnan(), true.isnan())
        errors = [(each - true).nan_to_num().abs().max() for each in (one, other)]
        size_of_sums = true.nan_to_num().abs().max().clamp_min(steps**0.5)
        assert errors[1] <= 2 * errors[0] + 8 * torch.finfo(dtype).eps * size_of_sums


@needs_kernels
def test_when_the_convolution_is_one_operator():
    conv, x, state = CausalConv(DIMS, 4, True), torch.randn(B, S, DIMS), torch.randn(1, B, 3, DIMS)

    def is_one(x=x, state=state):
        y, last = conv(x, state)
        assert_close((y, last), composed(x, conv.weight, conv.bias, state, None, None, 3, False))
        return y.grad_fn.name() == "_FusedBackward"

    for context in (mingru.use_backend("torch"), torch.autocast("cpu", torch.bfloat16), forward_ad.dual_level()):
        assert is_one()
        with context:
            assert not is_one()
    assert not is_one(x.as_subclass(type("Tagged", (torch.Tensor,), {})))
    assert not is_one(x[:, :0]) and not is_one(x.double(), state.double()) and is_one(x, state.half())
    parametrizations.weight_norm(conv)
    assert is_one()
    for name, value in (("weight", torch.randn(4, 1)), ("bias", torch.randn(1)), ("bias", torch.randn(DIMS).double())):
        conv = CausalConv(DIMS, 4, True)
        setattr(conv, name, nn.Parameter(value))
        assert not is_one()


def test_hooks_of_the_convolution_see_its_own_output():
    block, x, seen = Block(DIMS, conv=3), torch.randn(B, S, DIMS), []
    expected = block(x)
    handle = block.conv.register_forward_hook(lambda conv, args, out: seen.append(out[0]))
    assert_close(block(x), expected)
    handle.remove()
    assert_close(seen, [block.conv(x, torch.zeros(1, B, 2, DIMS))[0]])
    block.conv.forward = lambda x, **_: (-x, torch.zeros(1, B, 2, DIMS))
    assert torch.equal(block(x)[0], block(2 * x)[0])


@needs_kernels
def test_gradients_of_the_convolution_do_not_depend_on_the_number_of_threads():
    x, state, conv = torch.randn(7, 300, 40), torch.randn(1, 7, 3, 40, requires_grad=True), CausalConv(40, 4, True)
    first, *others = with_threads((1, 2, 3), lambda: graded(conv, conv, (x, state)))
    assert all(torch.equal(each[name], first[name]) for each in others for name in first)
