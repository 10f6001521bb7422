"""The cells: a layer one step at a time, and what they refuse."""

import inspect

import pytest
import torch
from refusals import WRONG_OPTIONS, assert_refused, wrong_resets, wrong_shapes, wrong_tensors, wrong_values

from mingru.modules.cells import MinGRUCell, MinLSTMCell

B, S, IN, H = 3, 7, 4, 5


# Against the layer


# States


# Dtypes


# A module among modules


def test_signatures():
    shared = "input_dims, hidden_dims, bias=True, *, {}norm=None, candidate={}learn_initial_state=False, memory=None, "
    shared += "device=None, dtype=None"
    for kind, extra in (
        (MinGRUCell, ("", "None, gate='sigmoid', min_decay=0.0, ")),
        (MinLSTMCell, ("forget_bias=0.0, normalize=True, ", "'positive', ")),
    ):
        found, expected = (
            [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]
            for function in (kind, eval(f"lambda {shared.format(*extra)}: None"))
        )
        assert found == expected
        assert list(inspect.signature(kind.forward).parameters) == ["self", "x", "h", "reset", "dt"]
        for argument in ("residual", "dropout", "num_layers", "bidirectional", "batch_first"):
            with pytest.raises(TypeError, match=argument):
                kind(IN, H, **{argument: 1})


# What is refused

X = torch.zeros(2, 3)

BAD_CALLS = {
    **wrong_tensors("x", X, "the layer's weight"),
    **wrong_tensors("h", torch.zeros(2, 8), "x"),
    **wrong_resets("(B,)", 2),
    **wrong_shapes(
        "x", r"\(B, 3\) or \(3,\) because input_dims is 3", torch.zeros(()), torch.zeros(2, 4), torch.zeros(2)
    ),
    **wrong_shapes("x", r"\(B, 3\) or ", torch.zeros(2, 5, 3)),
    "x of a sequence": ({"x": torch.zeros(2, 5, 3)}, ValueError, r".*got \(2, 5, 3\); use a layer, not a cell"),
    "x is packed": (
        {"x": torch.nn.utils.rnn.pack_sequence([X])},
        TypeError,
        r"x must be a tensor, got PackedSequence",
    ),
    "x of integers": ({"x": X.long()}, TypeError, r"x must be torch\.float32 .*, got torch\.int64"),
    **wrong_shapes("h", r"\(B, H\) = \(2, 8\)", *map(torch.zeros, ((3, 8), (1, 8), (2, 7), (1, 2, 1, 8), (8,)))),
    "h with batch, x without": (
        {"x": X[0], "h": torch.zeros(2, 8)},
        ValueError,
        r"h must be \(H\) = \(8,\), got \(2, 8\)",
    ),
    "reset of a batch, x without": (
        {"x": X[0], "reset": torch.zeros(1, dtype=torch.bool)},
        ValueError,
        r"reset must be a scalar = \(\), got \(1,\)",
    ),
}


@pytest.mark.parametrize("kind", [MinGRUCell, MinLSTMCell])
def test_bad_calls(kind):
    cell = kind(3, 8)
    expected = cell(X)
    assert_refused(lambda **args: cell(**{"x": X, **args}), BAD_CALLS, f"{kind.__name__}: ")
    assert torch.equal(cell(X), expected)


def test_scripted_bad_calls():
    cell = torch.jit.script(MinGRUCell(3, 8))
    for args, message in (
        ((torch.zeros(2, 5, 3),), "MinGRUCell: x must be (B, 3), got [2, 5, 3]"),
        ((torch.zeros(2, 4),), "MinGRUCell: x must be (B, 3), got [2, 4]"),
        ((X, torch.zeros(1, 8)), "MinGRUCell: h must be [2, 8], got [1, 8]"),
        ((X, None, torch.zeros(1, dtype=torch.bool)), "MinGRUCell: reset must be [2], got [1]"),
    ):
        with pytest.raises(torch.jit.Error) as caught:
            cell(*args)
        assert message in str(caught.value)


def test_bad_options():
    cases = {**WRONG_OPTIONS, **wrong_values("hidden_dims", "an int", types=(8.0,))}
    sizes = {"input_dims": 3, "hidden_dims": 8}
    for kind in (MinGRUCell, MinLSTMCell):
        assert_refused(lambda kind=kind, **options: kind(**{**sizes, **options}), cases, f"{kind.__name__}: ")
    with pytest.raises(ValueError, match=r"^MinLSTMCell: forget_bias must be 0 because bias is False, got 1\.0"):
        MinLSTMCell(3, 8, bias=False, forget_bias=1.0)
