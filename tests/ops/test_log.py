"""What the paper's form does with resets; its other numbers are tested with those of all other bodies."""

import math

import pytest
import reference
import torch

import mingru


def run(gate, candidate, h, reset):
    return mingru.functional.mingru(gate, candidate, h, reset=reset, backend="log")


def given(batch=4, steps=9):
    gate, candidate = torch.randn(2, batch, steps, 3, dtype=torch.double)
    return gate, candidate, torch.randn(batch, 1, 3, dtype=torch.double), torch.rand(batch, steps) < 0.3


def test_resets_are_mapped():
    args = given()

    def one(*args):
        return run(*(each.unsqueeze(0) for each in args)).squeeze(0)

    expected = reference.mingru(*args)
    torch.testing.assert_close(torch.vmap(one)(*args), expected)
    moved = [each.movedim(0, -1) for each in args]
    torch.testing.assert_close(torch.vmap(one, -1, -1)(*moved), expected.movedim(0, -1))

    found = torch.vmap(torch.func.grad(lambda *args: one(*args).square().sum(), (0, 1, 2)))(*args)
    inputs = [each.requires_grad_() for each in args[:3]]
    whole = reference.mingru(*inputs, args[3])
    torch.testing.assert_close(found, torch.autograd.grad(whole.square().sum(), inputs))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_resets_at_any_steps(share, steps):
    gate, candidate, h, _ = given(steps=steps)
    reset = torch.rand(4, steps) < share
    torch.testing.assert_close(run(gate, candidate, h, reset), reference.mingru(gate, candidate, h, reset))


def test_gates_that_are_shut_or_open_entirely_have_gradients():
    gate, candidate, h, reset = given()
    gate[0, 2:5] = gate[1, 0] = gate[2] = -math.inf
    gate[1, 4] = gate[3, 7] = math.inf
    inputs = [each.requires_grad_() for each in (gate, candidate, h)]

    def gradients(states):
        first = torch.autograd.grad(states.square().sum(), inputs, create_graph=True)
        return first, torch.autograd.grad(sum(each.square().sum() for each in first), inputs)

    torch.testing.assert_close(gradients(run(*inputs, reset)), gradients(reference.mingru(*inputs, reset)))


def test_second_derivatives_with_resets():
    gate, candidate, h, reset = given(batch=2, steps=5)
    inputs = [each.requires_grad_() for each in (gate, candidate, h)]
    assert torch.autograd.gradcheck(lambda *inputs: run(*inputs, reset), inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *inputs: run(*inputs, reset), inputs)
