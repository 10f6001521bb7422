"""Wrong calls, and what they are told: the doctest data/refusals.txt."""

import doctest

import pytest
import torch


@pytest.mark.parametrize("grad", [True, False])
def test_refusals(grad):
    """Other code runs without gradients."""
    with torch.set_grad_enabled(grad):
        failed, tried = doctest.testfile("data/refusals.txt", optionflags=doctest.ELLIPSIS)
    assert failed == 0 and tried > 400
