"""Wrong calls, and what they are told: the doctest data/refusals.txt."""

import doctest


def test_refusals():
    failed, tried = doctest.testfile("data/refusals.txt", optionflags=doctest.ELLIPSIS)
    assert failed == 0 and tried > 400
