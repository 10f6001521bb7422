"""The residual block: dropout, states and errors. Its values: tests/properties."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import BLOCKS, parametrized
from refusals import assert_refused, literal, wrong_resets, wrong_states, wrong_values
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close

from mingru.models import Block

DIMS, B, S = 5, 3, 11


def test_dropout():
    x = torch.randn(B, S, DIMS)
    block, plain = Block(DIMS, conv=3, mlp=2, dropout=1.0), Block(DIMS, conv=3, mlp=2)
    assert_close(block(x)[0], x + block.conv(x, torch.zeros(1, B, 2, DIMS))[0])
    plain.load_state_dict(block.state_dict())
    assert torch.equal(block.eval()(x)[0], plain(x)[0])
    block = Block(DIMS, mlp=2, dropout=0.5)
    torch.manual_seed(1)
    out, _ = block(x)
    torch.manual_seed(1)
    y = x + F.dropout(block.out(block.rnn(x)[0]), 0.5)
    assert_close(out, y + F.dropout(block.mlp(y), 0.5))


@parametrized(BLOCKS)
def test_states(case):
    """Their shapes, the default ones, and that they do not keep the sequence."""
    block = case.make()
    shapes = block.state_shapes(B)
    for num_steps in (1, 5, 500):
        x, h = torch.randn(B, num_steps, DIMS), block.initial_state(B)
        for arguments in ({}, {"reset": torch.rand(B, num_steps) < 0.3}, {"lengths": torch.tensor([1, num_steps, 1])}):
            for with_grad in (True, False):
                with torch.set_grad_enabled(with_grad):
                    out, last = block(x, **arguments)
                    assert torch.equal(block(x, tuple(h), **arguments)[0], out)
                assert [each.shape for each in last] == [each.shape for each in h] == shapes
                assert all(each.untyped_storage().nbytes() == each.numel() * each.element_size() for each in last)


@pytest.mark.usefixtures("_scripts_are_freed")
def test_states_of_a_scripted_block_do_not_keep_the_sequence():
    _, h = torch.jit.script(Block(DIMS, conv=4))(torch.randn(B, 500, DIMS))
    assert [each.untyped_storage().nbytes() for each in h] == [4 * B * DIMS, 4 * B * 3 * DIMS]


# Bad input

RATIO = "a finite number with {0} * dims >= 1"
BAD_OPTIONS = {
    **wrong_values("dims", "an int", types=(5.0, True)),
    **wrong_values("dims", "at least 1", values=(0,)),
    **wrong_values("cell", "one of ('mingru', 'minlstm')", values=("gru", ["mingru"])),
    **wrong_values("expansion", "a number", types=(True, "1")),
    **wrong_values("expansion", RATIO.format("expansion"), values=(0, -1.0, math.nan, 1e308, 0.05)),
    **wrong_values("mlp", "a number", types=(True,)),
    **wrong_values("mlp", RATIO.format("mlp"), values=(0,)),
    **wrong_values("conv", "an int or None", types=(3.0, True)),
    **wrong_values("conv", "at least 2", values=(1,)),
    **wrong_values("norm", "one of ('layer', 'rms')", values=("batch", None, ["rms"])),
    **wrong_values("bias", "a bool", types=(1,)),
    **wrong_values("checkpoint", "a bool", types=(1,)),
    **wrong_values("dropout", "a number from 0 to 1", types=("0.5", True), values=(1.5, -0.1, math.nan)),
    **{
        f"the option {name}": ({name: 2}, TypeError, f"no argument '{name}'; {remedy}")
        for name, remedy in {
            **dict.fromkeys(("num_layers", "batch_first", "residual"), "a block has one layer, and its x"),
            **dict.fromkeys(("hidden_dims", "expansion_factor"), "use expansion"),
            "candidat": "use candidate",
            "heads": "the arguments are dims, cell, expansion, conv, mlp, ",
            "normalize": "only a minLSTM has two gates",
            "forget_bias": "only a minLSTM has a forget gate",
        }.items()
    },
}


def test_bad_options():
    assert_refused(lambda **options: Block(**{"dims": DIMS, **options}), BAD_OPTIONS, "Block: ")


X = torch.zeros(2, 4, DIMS)
STATE = [torch.zeros(1, 2, 1, DIMS), torch.zeros(1, 2, 2, DIMS)]
LIKE, SEQUENCE = "x must be torch.float32 like the block's weights, got", "x must be a tensor (B, S, 5), got"
BAD_CALLS = {
    "x of two dimensions": ({"x": X[0]}, ValueError, "x must be (B, S, 5), got (4, 5)"),
    "x of other features": ({"x": X[..., 1:]}, ValueError, "x must be (B, S, 5), got (2, 4, 4)"),
    "x of ids": ({"x": X.long()}, TypeError, f"{LIKE} torch.int64; embed"),
    "x of float64": ({"x": X.double()}, TypeError, f"{LIKE} torch.float64"),
    "x on another device": ({"x": X.to("meta")}, ValueError, "x must be on cpu like the block's weights, got a tensor"),
    "x of a list": ({"x": X.tolist()}, TypeError, f"{SEQUENCE} list; use torch.as_tensor"),
    "x packed": ({"x": pack_sequence([X[0]])}, TypeError, f"{SEQUENCE} PackedSequence; pad the"),
    "negative times": ({"dt": -torch.ones(2, 4)}, ValueError, "dt must be at least 0, got -1.0"),
    "an unknown argument": ({"mask": None}, TypeError, "no argument 'mask'; use lengths=mask.sum(1)"),
    "state instead of h": ({"state": STATE}, TypeError, "no argument 'state'; use h"),
}
LENGTHS = {
    "a length": ({"lengths": torch.tensor([4, -1])}, ValueError, "lengths must be from 0 to S = 4, got [4, -1]"),
    "a list": ({"lengths": [4, 4]}, TypeError, "lengths must be an integer tensor (B,), got list"),
}


@pytest.mark.parametrize("with_grad", [True, False])
def test_bad_calls(with_grad):
    without_conv = {**literal(LENGTHS), **wrong_resets("(B, S)", 2, 4)}
    with_conv = {**literal(BAD_CALLS), **wrong_states("h", STATE, "x"), **without_conv}
    for conv, cases in ((3, with_conv), (None, without_conv)):
        with torch.set_grad_enabled(with_grad):
            block = Block(DIMS, conv=conv)
            assert_refused(lambda block=block, **arguments: block(**{"x": X, **arguments}), cases, "Block: ")
