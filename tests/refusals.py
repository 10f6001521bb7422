"""Tables of wrong calls: each must raise the right error, and its message must say what is wrong.

A case is (arguments, error, pattern), and its name says what is wrong.
"""

import re

import torch


def assert_refused(call, cases, prefix=""):
    """Check that `call(**arguments)` raises the error of each case, with a message that begins as prefix + message.

    `cases` is such a table, or a list of cases whose messages are text.
    """
    table = literal({f"{at}: {case[2]}": case for at, case in enumerate(cases)}) if isinstance(cases, list) else cases
    for case, (arguments, error, message) in table.items():
        found = None
        try:
            call(**arguments)
        except Exception as raised:
            found = raised
        assert isinstance(found, error) and re.match(prefix + message, str(found)), f"{case}: {found!r}"


def wrong_tensors(argument, right, like):
    """Return calls with an argument that is no tensor, or has another dtype or device than `like`."""
    return {
        f"{argument} is no tensor": ({argument: [1.0]}, TypeError, f"{argument} must be a tensor, got list"),
        f"{argument} of float64": (
            {argument: right.double()},
            TypeError,
            rf"{argument} must be torch\.float32 like {like}, got torch\.float64; use {argument}\.to\(torch\.float32\)",
        ),
        f"{argument} on another device": (
            {argument: right.to("meta")},
            ValueError,
            rf"{argument} must be on cpu like {like}, got a tensor on meta; use {argument}\.to\('cpu'\)",
        ),
    }


def wrong_resets(letters, *shape):
    """Return calls with a reset of a wrong type, dtype, shape or device; `shape` is the right one."""
    right = torch.zeros(shape, dtype=torch.bool)
    got = type(right.tolist()).__name__
    cases = {
        "reset is no tensor": ({"reset": right.tolist()}, TypeError, f"reset must be a bool tensor, got {got}"),
        "reset of numbers": (
            {"reset": right.float()},
            TypeError,
            r"reset must be of dtype torch\.bool, got torch\.float32; use reset\.bool\(\)",
        ),
        "reset on another device": (
            {"reset": right.to("meta")},
            ValueError,
            r"reset must be on cpu like the sequence, got a tensor on meta; use reset\.to\('cpu'\)",
        ),
    }
    for wrong in (right[:1], right[..., :-1], right.unsqueeze(-1)):
        message = re.escape(f"reset must be {letters} = {shape}, got {tuple(wrong.shape)}")
        cases[f"reset of shape {tuple(wrong.shape)}"] = ({"reset": wrong}, ValueError, message)
    return cases


def wrong_shapes(argument, expected, *values):
    """Return calls with tensors of wrong shapes; `expected` is a pattern."""
    shapes = {tuple(value.shape): value for value in values}
    return {
        f"{argument} of shape {shape}": (
            {argument: value},
            ValueError,
            rf"{argument} must be {expected}.*, got {re.escape(str(shape))}",
        )
        for shape, value in shapes.items()
    }


def literal(cases):
    """Return cases whose messages are given as text, not as patterns; "..." stands for any text."""
    return {
        case: (arguments, error, re.escape(message).replace(re.escape("..."), ".*"))
        for case, (arguments, error, message) in cases.items()
    }
