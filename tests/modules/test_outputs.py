"""Outputs and states are contiguous tensors of their own, in every class and by every backend."""

import itertools

import pytest
import torch
from cases import BACKENDS, BLOCKS, HIDDEN, ROWS, case, parametrized, some, tensors
from torch.nn.utils.rnn import pack_padded_sequence

import mingru

B, S = 2, 5


def calls(case):
    """What to call the module with: no state, a state and resets, lengths, packed sequences, and no steps."""
    x, h, reset, *_ = case.args(B, S).values()
    yield x, None
    yield x, h, reset
    if "lengths" in case.takes:
        yield x, None, None, torch.tensor([3, 5])
        if "lock" not in case.name:
            yield pack_padded_sequence(x, torch.tensor([3, 5]), case.batch_dim == 0, enforce_sorted=False), None
    if not case.is_cell and not case.of_torch:
        yield x.narrow(case.time_dim, 0, 0), None
    # Laid out with the other dimension first, and expanded.
    yield x.transpose(0, 1).contiguous().transpose(0, 1), None
    yield x.narrow(case.batch_dim, 0, 1).expand_as(x), None


@pytest.mark.parametrize("backend", BACKENDS)
# The output of `Projected` is that of an nn.Linear.
@parametrized(
    [
        case("MinGRU, wide", mingru.MinGRU, 64, HIDDEN),
        BLOCKS[0],
        *(each for each in some(ROWS, 3) if each.name != "Projected"),
    ]
)
def test_no_output_is_a_view(case, backend):
    module = case.make()
    for args, grad in itertools.product(calls(case), (True, False)):
        with torch.set_grad_enabled(grad), mingru.use_backend(backend):
            outputs = tensors(module(*args))
        values = [each.detach().clone() for each in outputs]
        storages = [each.untyped_storage().data_ptr() for each in outputs if each.numel()]
        assert len(set(storages)) == len(storages), "two outputs share memory"
        # The state of a causal convolution consists of inputs.
        assert all(each.requires_grad == grad for each in outputs[:2] if each.is_floating_point())
        assert all(each._base is None and each.is_contiguous() for each in outputs), "a view"
        # A state detached in place cuts the gradient and nothing else.
        for each in outputs[1:]:
            each.detach_()
        if grad:
            module.zero_grad()
            # Activation checkpointing computes the forward pass again.
            with mingru.use_backend(backend):
                outputs[0].sum().backward()
            weights = [weight for name, weight in module.named_parameters() if "initial" not in name]
            assert all(weight.grad is not None for weight in weights)
        assert all(map(torch.equal, outputs, values))
        outputs[0].detach_()


@pytest.mark.parametrize("time_first", [False, True])
def test_the_state_of_a_step_does_not_come_from_its_output(time_first):
    """Otherwise a hook of the output would see the gradient of the state too."""
    out, h = mingru.BlockGRU(3, 4, batch_first=not time_first)(torch.randn(1, 1, 3))
    assert torch.autograd.grad(h.sum(), out, allow_unused=True) == (None,)
