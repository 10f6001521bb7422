"""Arguments of every class: a wrong name is refused with the one that is meant. Values: test_refusals.py."""

import copy
import inspect
import pickle
from functools import partial

import pytest
import torch
from cases import CASES, Case, parametrized, refuses

import mingru
from mingru import drop_in

X = torch.randn(2, 5, 3)
# Arguments of the other stack are those of its layers.
STACK = Case("Stack", partial(mingru.Stack, [mingru.MinGRU(3, 4)]))
CLASSES = [each for each in CASES[:-2] if each.name.isidentifier() or "." in each.name]
every_class = parametrized([STACK if each.name == "Stack" else each for each in CLASSES])


# Constructors


# What is meant by names of other libraries and by typing errors, if a class has it.
MEANT = {
    "input_dims": "input_size in_channels",
    "hidden_dims": "hidden_size hidden_sizes out_channels hidden_dim expansion_factor",
    "input_dims and hidden_dims": "dim",
    "input_size": "input_dims",
    "hidden_size": "hidden_dims",
    "layers": "layer",
    "candidate": "activation",
    "num_layers": "n_layers",
    "": "momentum",
}
TYPED = "learn_initial_state bidirectional dropout residual kernel_size stride padding dilation"
MEANT |= {name: name[:3] + name[4] + name[3] + name[5:] for name in TYPED.split()}


@every_class
def test_constructors_know_what_is_meant(case):
    name, kind = case.module.name, type(case.module)
    parameters = list(inspect.signature(kind).parameters)
    known = {meant: names.split() for meant, names in MEANT.items() if {*meant.split(" and ")} <= {*parameters, ""}}
    assert len(known) > 2
    for meant, names in known.items():
        remedy = f"use {meant}" if meant else f"the arguments are {', '.join(parameters)}"
        for wrong in names:
            refuses(TypeError, f"^{name}: no argument '{wrong}'; {remedy}$", case.make, **{wrong: 3})
    for args, options, message in (
        ((), {}, f"missing a required argument: '{parameters[0]}'"),
        ([1] * 20, {}, "too many positional arguments"),
        ([1], {parameters[0]: 3}, f"multiple values for argument '{parameters[0]}'"),
    ):
        refuses(TypeError, f"^{name}: {message}; ", kind, *args, **options)
    if "device" in parameters:
        refuses(RuntimeError, "device string: gpu", case.make, device="gpu")


SIZES = {mingru.Stack: ([mingru.MinGRU(3, 4)],), mingru.MinConv2dGRU: (3, 4, 1)}


@pytest.mark.parametrize("kind", [mingru.MinGRU, mingru.MinLSTM, *SIZES, drop_in.GRULike])
def test_a_dropout_without_effect_is_blamed_on_the_line_that_asks_for_it(kind):
    message = rf"^(mingru\.drop_in\.)?{kind.__name__}: dropout=0.5 has no effect on one layer"
    with pytest.warns(UserWarning, match=message) as seen:
        kind(*SIZES.get(kind, (3, 4)), dropout=0.5)
    assert [warning.filename for warning in seen] == [__file__]


SIGN = "norm='rms' leaves only the sign of one feature"
OF_ONE = {  # What has a layer with one input feature, and the argument that is too small.
    "MinGRU: input_dims": lambda **norm: mingru.MinGRU(1, 4, **norm),
    "MinLSTM: hidden_dims": lambda **norm: mingru.MinLSTM(3, 1, 2, **norm),
    "mingru.GRUCell: input_dims": lambda **norm: mingru.GRUCell(1, 4, **norm),
    "mingru.drop_in.GRULike: input_size": lambda **norm: drop_in.GRULike(1, 4, **norm, cell="mingru"),
    "mingru.drop_in.LSTMLike: proj_size": lambda **norm: drop_in.LSTMLike(3, 4, 2, proj_size=1, **norm, cell="minlstm"),
    "Block: dims": lambda **norm: mingru.models.Block(1, expansion=4.0, **norm),
}


@pytest.mark.parametrize("argument", OF_ONE)
def test_a_norm_of_one_feature(argument):
    make = OF_ONE[argument]
    message = f"^{argument} must be at least 2 because norm is 'layer', .*, got 1; use more, or "
    refuses(ValueError, message, make, norm="layer")
    with pytest.warns(UserWarning, match=SIGN) as seen:
        make(norm="rms")
    assert [warning.filename for warning in seen] == [__file__]
    for norm in ("layer", "rms"):
        mingru.MinGRU(3, 1, norm=norm), mingru.MinGRU(3, 1, 2, bidirectional=True, norm=norm)


def test_a_group_norm_of_one_number():
    layer, x = mingru.MinConv1dGRU(1, 4, 1, norm="group"), torch.randn(2, 5, 1, 2)
    assert torch.isfinite(layer(x)[0]).all()
    message = r"^MinConv1dGRU: x must be larger in space at the input of layer 0, .*, got \(1,\); "
    refuses(ValueError, message, layer, x[..., :1])


# Names in calls

CALLS = {"hx": "h", "h0": "h", "hidden": "h", "state": "h", "prev_hidden": "h", "input": "x", "rest": "reset"}


@every_class
def test_calls_know_what_is_meant(case):
    layer, x, name = case.module, case.args()["x"], case.module.name
    parameters = list(inspect.signature(layer.forward).parameters)
    theirs = {"h": "hx", "h0": "hx", "hidden": "hx", "x": "input"}
    unknown = (theirs if case.of_torch else CALLS) | {"flag": None}
    if "lengths" not in parameters:
        unknown |= {"lengths": None, "mask": None}
    expected = layer(x)
    for wrong, meant in unknown.items():
        remedy = f"use {meant}" if meant else f"the arguments are {', '.join(parameters)}"
        refuses(TypeError, f"^{name}: no argument '{wrong}'; {remedy}$", layer, x, **{wrong: None})
    for args, options, message in (
        ((), {}, r"missing a required argument: '\w+'"),
        ((x, *[None] * len(parameters)), {}, "too many positional arguments"),
        ((x,), {parameters[0]: x}, f"multiple values for argument '{parameters[0]}'"),
    ):
        refuses(TypeError, rf"^{name}: {message}; the positional arguments are ", layer, *args, **options)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


class Wide(mingru.MinGRU):
    """As a user writes it."""

    def __init__(self, input_dims, **options):
        super().__init__(input_dims, 2 * input_dims, **options)

    def forward(self, x, h=None, **rest):
        if "error" in rest:
            raise rest["error"]
        return super().forward(x, h)


def test_a_subclass_has_its_own_names_and_errors():
    refuses(TypeError, "^Wide: no argument 'bidirectonal'; use bidirectional$", Wide, 3, bidirectonal=True)
    layer = Wide(3, bidirectional=True)
    assert layer(X, mask=None)[0].shape == (2, 5, 12)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(X)[0], layer(X)[0])
    for error in (TypeError("forward() of something else"), TypeError("no name"), ValueError("forward() is wrong")):
        with pytest.raises(type(error)) as caught:
            layer(X, error=error)
        assert caught.value is error


def test_hooks_may_take_arguments_of_their_own():
    layer = mingru.MinGRU(3, 4)
    hook = lambda module, args, given: (args, {name: x for name, x in given.items() if name != "mask"})  # noqa: E731
    with_mask = layer.register_forward_pre_hook(hook, with_kwargs=True)
    layer(X, mask=None)
    refuses(TypeError, "^MinGRU: h must be a tensor, got float; ", layer, X, h=0.5, mask=None)
    with_mask.remove()
    for call in (layer, torch.compile(mingru.MinGRU(3, 4), backend="eager")):
        refuses(TypeError, "^MinGRU: no argument 'mask'; ", call, X, mask=None)
