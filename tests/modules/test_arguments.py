"""Arguments of every class: a wrong name is refused with the one that is meant. Values: test_refusals.py."""

import copy
import inspect
import pickle

import pytest
import torch

import mingru
from mingru import drop_in

# For each class, its sizes, and an x that it takes.
X = torch.randn(2, 5, 3)
IMAGES = {dims: torch.randn(2, 5, 3, *[4] * dims) for dims in (1, 2, 3)}
CLASSES = {
    mingru.MinGRU: ((3, 4), X),
    mingru.MinLSTM: ((3, 4), X),
    mingru.MinGRUCell: ((3, 4), X[0]),
    mingru.MinLSTMCell: ((3, 4), X[0]),
    **{getattr(mingru, f"MinConv{dims}dGRU"): ((3, 4, 1), x) for dims, x in IMAGES.items()},
    **{getattr(mingru, f"MinConv{dims}dGRUCell"): ((3, 4, 1), x[:, 0]) for dims, x in IMAGES.items()},
    mingru.Stack: (([mingru.MinGRU(3, 4)],), X),
    drop_in.GRULike: ((3, 4), X),
    drop_in.GRULikeCell: ((3, 4), X[0]),
    drop_in.LSTMLike: ((3, 4), X),
    drop_in.LSTMLikeCell: ((3, 4), X[0]),
}
DROP_IN = (drop_in.GRULike, drop_in.GRULikeCell, drop_in.LSTMLike, drop_in.LSTMLikeCell)
every_class = pytest.mark.parametrize("kind", CLASSES, ids=[kind.__name__ for kind in CLASSES])


def named(kind):
    """Return the name in errors."""
    return f"mingru.drop_in.{kind.__name__}" if kind in DROP_IN else kind.__name__


def refused(error, message):
    return pytest.raises(error, match=f"^{message}$")


# Constructors


# What is meant by names of other libraries.
MEANT = {
    "input_dims": "input_size in_channels",
    "hidden_dims": "hidden_size hidden_sizes out_channels hidden_dim expansion_factor",
    "input_dims and hidden_dims": "dim",
    "candidate": "activation",
    "learn_initial_state": "lern_initial_state",
    "": "momentum",
}
OF_LAYERS = {"num_layers": "n_layers", "bidirectional": "bidirectonal", "dropout": "dropuot", "residual": "residuals"}
OF_CONV = {"kernel_size": "kernel_sizes", "stride": "strides", "padding": "paddings", "dilation": "dilations"}
OF_DROP_IN = {"input_size": "input_dims", "hidden_size": "hidden_dims", "learn_initial_state": "lern_initial_state"}
OF_STACK = {"layers": "layer", "residual": "residuals", "": "num_layers"}


def meant_by(kind):
    if kind in (mingru.Stack, *DROP_IN):
        return OF_STACK if kind is mingru.Stack else OF_DROP_IN
    of_conv = OF_CONV if "Conv" in kind.__name__ else {}
    return MEANT | of_conv | ({} if "Cell" in kind.__name__ else OF_LAYERS)


@every_class
def test_constructors_know_what_is_meant(kind):
    sizes, _ = CLASSES[kind]
    parameters = list(inspect.signature(kind).parameters)
    assert parameters[0] in ("input_dims", "input_size", "layers")
    for meant, names in meant_by(kind).items():
        for name in names.split():
            remedy = f"use {meant}" if meant else f"the arguments are {', '.join(parameters)}"
            with refused(TypeError, f"{named(kind)}: no argument '{name}'; {remedy}"):
                kind(*sizes, **{name: 3})
    for args, options, message in (
        (sizes[:-1], {}, "missing a required argument: '.*'"),
        ((*sizes, *[1] * 20), {}, "too many positional arguments"),
        (sizes, {parameters[0]: 3}, f"multiple values for argument '{parameters[0]}'"),
    ):
        with pytest.raises(TypeError, match=f"^{named(kind)}: {message}; "):
            kind(*args, **options)
    if "device" in parameters:
        with pytest.raises(RuntimeError, match="device string: gpu"):
            kind(*sizes, device="gpu")


@pytest.mark.parametrize("kind", [mingru.MinGRU, mingru.MinLSTM, mingru.MinConv2dGRU, mingru.Stack, drop_in.GRULike])
def test_a_dropout_without_effect_is_blamed_on_the_line_that_asks_for_it(kind):
    with pytest.warns(UserWarning, match=f"^{named(kind)}: dropout=0.5 has no effect on one layer") as seen:
        kind(*CLASSES[kind][0], dropout=0.5)
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
    with refused(ValueError, f"{argument} must be at least 2 because norm is 'layer', .*, got 1; use more, or .*"):
        make(norm="layer")
    with pytest.warns(UserWarning, match=SIGN) as seen:
        make(norm="rms")
    assert [warning.filename for warning in seen] == [__file__]
    for norm in ("layer", "rms"):
        mingru.MinGRU(3, 1, norm=norm), mingru.MinGRU(3, 1, 2, bidirectional=True, norm=norm)


def test_a_group_norm_of_one_number():
    layer, x = mingru.MinConv1dGRU(1, 4, 1, norm="group"), torch.randn(2, 5, 1, 2)
    assert torch.isfinite(layer(x)[0]).all()
    with refused(ValueError, r"MinConv1dGRU: x must be larger in space at the input of layer 0, .*, got \(1,\); .*"):
        layer(x[..., :1])


# Names in calls

CALLS = {"hx": "h", "h0": "h", "hidden": "h", "state": "h", "prev_hidden": "h", "input": "x", "rest": "reset"}


@every_class
def test_calls_know_what_is_meant(kind):
    sizes, x = CLASSES[kind]
    layer = kind(*sizes)
    parameters = list(inspect.signature(kind.forward).parameters)[1:]
    theirs = {"h": "hx", "h0": "hx", "hidden": "hx", "x": "input"}
    unknown = (theirs if "hx" in parameters else CALLS) | {"flag": None}
    if "lengths" not in parameters:
        unknown |= {"lengths": None, "mask": None}
    expected = layer(x)
    for name, meant in unknown.items():
        remedy = f"use {meant}" if meant else f"the arguments are {', '.join(parameters)}"
        with refused(TypeError, f"{named(kind)}: no argument '{name}'; {remedy}"):
            layer(x, **{name: None})
    for args, options, message in (
        ((), {}, r"missing a required argument: '\w+'"),
        ((x, *[None] * len(parameters)), {}, "too many positional arguments"),
        ((x,), {parameters[0]: x}, f"multiple values for argument '{parameters[0]}'"),
    ):
        with refused(TypeError, rf"{named(kind)}: {message}; the positional arguments are .*"):
            layer(*args, **options)
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
    with refused(TypeError, "Wide: no argument 'bidirectonal'; use bidirectional"):
        Wide(3, bidirectonal=True)
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
    with refused(TypeError, "MinGRU: h must be a tensor, got float; .*"):
        layer(X, h=0.5, mask=None)
    with_mask.remove()
    for call in (layer, torch.compile(mingru.MinGRU(3, 4), backend="eager")):
        with refused(TypeError, "MinGRU: no argument 'mask'; .*"):
            call(X, mask=None)
