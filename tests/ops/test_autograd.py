"""Kernels and their derivatives: saved tensors, which inputs need a gradient, and in which dtype it is summed."""

import pytest
import torch
from cases import ALL_BACKENDS
from torch.testing import assert_close

import mingru
from mingru import functional


def test_a_saved_tensor_hook_may_change_the_order_in_memory():
    """The pre-activations that are kept lie in the order of x."""
    rnn, x = mingru.MinGRU(64, 8), torch.randn(5, 3, 64).transpose(0, 1)

    def gradients(x, pack):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: pack(x) if x.dim() == 3 else x, lambda x: x):
            return torch.autograd.grad(rnn(x)[0].square().sum(), list(rnn.parameters()))

    expected = gradients(x.contiguous(), lambda x: x)
    for pack in (lambda x: x, lambda x: x.contiguous(), lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert_close(gradients(x, pack), expected)


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_tensor_subclass_goes_in(backend):
    rnn, x, h = mingru.MinGRU(3, 4), torch.randn(2, 5, 3), torch.rand(1, 2, 1, 4)
    expected = rnn(x, h)
    with mingru.use_backend(backend):
        for given in ((x.as_subclass(Tagged), h), (x, h.as_subclass(Tagged))):
            assert_close([each.as_subclass(torch.Tensor) for each in rnn(*given)], [*expected])


def test_what_a_hook_sees_keeps_its_shape():
    seen = []
    for rnn, x, shape in (
        (mingru.MinGRU(3, 4), torch.randn(2, 5, 3), (2, 1, 4)),
        (mingru.MinGRUCell(3, 4), torch.randn(2, 3), (2, 1, 4)),
        (mingru.MinConv1dGRUCell(3, 4, 1), torch.randn(2, 3, 6), (2, 1, 4, 6)),
    ):
        rnn.layers[0].register_forward_hook(lambda module, args, out: seen.append(out[1][0]))
        rnn(x)
        assert seen.pop().shape == shape
    given = torch.rand(2, 1, 4)
    rnn = mingru.MinGRU(3, 4)
    rnn.layers[0].register_forward_hook(lambda module, args, out: (out[0], [given]))
    assert rnn(torch.randn(2, 5, 3))[1].shape == (1, 2, 1, 4)
    assert given.shape == (2, 1, 4)


def test_a_learned_state_of_images_compiles_with_resets():
    rnn = mingru.MinConv2dGRU(3, 4, 1, learn_initial_state=True)
    x, reset = torch.randn(2, 5, 3, 6, 7), torch.rand(2, 5) < 0.4
    compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x, None, reset), rnn(x, None, reset))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_state_of_float32_beside_bfloat16_keeps_its_precision_in_backward(backend):
    gate, candidate = torch.zeros(1, 1, 1), torch.full((1, 1, 1), 100.0)
    gate, candidate = (x.bfloat16().requires_grad_() for x in (gate, candidate))
    functional.mingru(gate, candidate, torch.full((1, 1, 1), 100.4), backend=backend).sum().backward()
    # (g(100) - 100.4) z (1 - z)
    assert gate.grad.item() == pytest.approx(0.025, rel=0.01)


@pytest.mark.parametrize("backend", [name for name in ALL_BACKENDS if name in ("native", "torch")])
def test_the_gradient_of_a_half_width_initial_state_is_summed_in_float32(backend):
    # Many steps, each of which adds less than the spacing of bfloat16 at the sum.
    gate, candidate = torch.zeros(8, 20_000, 4).bfloat16(), torch.zeros(8, 20_000, 4).bfloat16()
    initial = torch.zeros(1, 1, 4, dtype=torch.bfloat16).requires_grad_()
    reset = torch.ones(8, 20_000, dtype=torch.bool)
    functional.mingru(gate, candidate, reset=reset, initial_state=initial, backend=backend).sum().backward()
    # Each of 160,000 steps adds 1 - z = 0.5.
    assert_close(initial.grad.float(), torch.full((1, 1, 4), 80_000.0), rtol=0.01, atol=0)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_an_initial_state_without_resets_has_no_gradient(backend):
    gate, candidate, h = torch.randn(3, 2, 5, 4)
    initial = torch.rand(1, 1, 4, requires_grad=True)
    out = functional.mingru(gate, candidate, h[:, :1], initial_state=initial, backend=backend)
    assert not out.requires_grad
    gate.requires_grad_()
    out = functional.mingru(gate, candidate, h[:, :1], initial_state=initial, backend=backend)
    grads = torch.autograd.grad(out.sum(), [gate, initial], create_graph=True, allow_unused=True)
    assert grads[0] is not None
    assert grads[1] is None


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_batched_gradients_keep_no_graph(backend):
    rnn = mingru.MinGRU(3, 4)
    with mingru.use_backend(backend):
        out, _ = rnn(torch.randn(2, 5, 3))
    grads = torch.autograd.grad(out, list(rnn.parameters()), torch.randn(3, *out.shape), is_grads_batched=True)
    assert not any(grad.requires_grad for grad in grads)
