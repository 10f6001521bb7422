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


def wrong_values(option, expected, types=(), values=()):
    """Return calls with values of an option that have a wrong type, or that are not allowed."""
    errors = [*((TypeError, value) for value in types), *((ValueError, value) for value in values)]
    return {
        f"{option} of {value!r}": ({option: value}, error, re.escape(f"{option} must be {expected}, got {value!r}"))
        for error, value in errors
    }


def literal(cases):
    """Return cases whose messages are given as text, not as patterns; "..." stands for any text."""
    return {
        case: (arguments, error, re.escape(message).replace(re.escape("..."), ".*"))
        for case, (arguments, error, message) in cases.items()
    }


def by_message(cases):
    """Return cases, whose messages are text, by these messages."""
    return literal({message: (arguments, error, message) for arguments, error, message in cases})


def wrong_states(argument, right, like):
    """Return calls with a list of states that does not fit; `right` is a list that fits."""
    count, last, first = len(right), f"{argument}[{len(right) - 1}]", f"{argument}[0]"
    of_count = f"{argument} must be a list of {count} tensors, got"
    of_shape = f"{first} must be {tuple(right[0].shape)}, got"
    narrow = [each[:, :1] for each in right]
    remedy = "pass a state of this batch size and of a module with the same options"
    found = [
        (right[:1], ValueError, f"{of_count} 1"),
        ([*right, right[0]], ValueError, f"{of_count} {count + 1}"),
        (right[0], TypeError, f"{of_count} Tensor"),
        (dict(enumerate(right)), TypeError, f"{of_count} dict"),
        ([None, *right[1:]], TypeError, f"{first} must be a tensor, got NoneType"),
        ([*right[:-1], 1.0], TypeError, f"{last} must be a tensor, got float"),
        (narrow, ValueError, f"{of_shape} {tuple(narrow[0].shape)}; {remedy}"),
        (right[::-1], ValueError, f"{of_shape} {tuple(right[-1].shape)}; {remedy}"),
        (
            [each.double() for each in right],
            TypeError,
            f"{first} must be torch.float32 like {like}, got torch.float64; use {first}.to(torch.float32)",
        ),
        (
            [*right[:-1], right[-1].to("meta")],
            ValueError,
            f"{last} must be on cpu like {like}, got a tensor on meta; use {last}.to('cpu')",
        ),
    ]
    return by_message(({argument: states}, error, message) for states, error, message in found)


def wrong_ids(argument, right, vocab_size):
    """Return calls with ids (B, S) that are out of range, or of a wrong dtype, device or shape."""
    of_dtype, of_shape = f"{argument} must be int64 or int32, got", f"{argument} must be (B, S), got"
    of_range = f"{argument} must be from 0 to {vocab_size - 1} because vocab_size is {vocab_size}, got"
    device = f"{argument} must be on cpu like the weights, got a tensor on meta; use {argument}.to('cpu')"
    batch = f"add a batch dimension with {argument}.unsqueeze(0)"
    found = [
        (right + vocab_size, ValueError, f"{of_range} {vocab_size}"),
        (right - 1, ValueError, f"{of_range} -1"),
        (right.float(), TypeError, f"{of_dtype} torch.float32; use {argument}.long()"),
        (right.bool(), TypeError, f"{of_dtype} torch.bool; use {argument}.long()"),
        (right.byte(), TypeError, f"{of_dtype} torch.uint8; use {argument}.long()"),
        (right.to("meta"), ValueError, device),
        (right[0], ValueError, f"{of_shape} ({right.shape[1]},); {batch}"),
        (right[0, 0], ValueError, f"{of_shape} ()"),
        (right[None], ValueError, f"{of_shape} {(1, *right.shape)}"),
    ]
    return by_message(({argument: ids}, error, message) for ids, error, message in found)
