"""Wrong calls, and what they are told: the doctest data/refusals.txt."""

import doctest
import re

import pytest
import torch


class Parser(doctest.DocTestParser):
    """Takes the last line of a traceback alone."""

    _EXCEPTION_RE = re.compile(r"(?:Traceback .*\n)?(?P<msg>\w+(?:Error|Warning): .*)")


@pytest.mark.parametrize("grad", [True, False])
def test_refusals(grad):
    """Other code runs without gradients."""
    with torch.set_grad_enabled(grad):
        failed, tried = doctest.testfile("data/refusals.txt", optionflags=doctest.ELLIPSIS, parser=Parser())
    assert failed == 0 and tried > 400
