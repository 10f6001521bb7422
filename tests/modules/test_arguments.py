"""Arguments of every class: flags are bools, and a wrong name is refused with the one that is meant."""

import copy
import inspect
import io
import pickle
import re

import pytest
import torch

import mingru
from mingru import drop_in

# For each class, its sizes, and an x that it takes.
X = torch.randn(2, 5, 3)
CONV = {1: torch.randn(2, 5, 3, 4), 2: torch.randn(2, 5, 3, 4, 4), 3: torch.randn(2, 5, 3, 4, 4, 4)}
CLASSES = {
    mingru.MinGRU: ((3, 4), X),
    mingru.MinLSTM: ((3, 4), X),
    mingru.MinGRUCell: ((3, 4), X[0]),
    mingru.MinLSTMCell: ((3, 4), X[0]),
    **{getattr(mingru, f"MinConv{dims}dGRU"): ((3, 4, 1), x) for dims, x in CONV.items()},
    **{getattr(mingru, f"MinConv{dims}dGRUCell"): ((3, 4, 1), x[:, 0]) for dims, x in CONV.items()},
    mingru.Stack: (([mingru.MinGRU(3, 4)],), X),
    drop_in.GRU: ((3, 4), X),
    drop_in.GRUCell: ((3, 4), X[0]),
    drop_in.LSTM: ((3, 4), X),
    drop_in.LSTMCell: ((3, 4), X[0]),
}
DROP_IN = (drop_in.GRU, drop_in.GRUCell, drop_in.LSTM, drop_in.LSTMCell)
FLAGS = [
    (kind, name)
    for kind in CLASSES
    for name, parameter in inspect.signature(kind).parameters.items()
    if isinstance(parameter.default, bool)
]


every_class = pytest.mark.parametrize("kind", CLASSES, ids=[kind.__name__ for kind in CLASSES])


def named(kind):
    """Return the name in errors."""
    return f"mingru.drop_in.{kind.__name__}" if kind in DROP_IN else kind.__name__


def refused(error, message):
    return pytest.raises(error, match=f"^{message}$")


def test_all_flags_are_here():
    assert {kind for kind, _ in FLAGS} == set(CLASSES)
    assert {name for _, name in FLAGS} == {
        "bias",
        "batch_first",
        "bidirectional",
        "residual",
        "normalize",
        "learn_initial_state",
    }


@every_class
def test_a_flag_is_a_bool(kind):
    sizes, _ = CLASSES[kind]
    for flag in (flag for each, flag in FLAGS if each is kind):
        expected = "a bool"
        if flag == "residual" and kind in (mingru.MinGRU, mingru.MinLSTM, drop_in.GRU, drop_in.LSTM):
            expected += " or 'highway'"
        for value in (0, 1, None, "False", 0.2, torch.tensor(True)):
            with pytest.raises(TypeError) as caught:
                kind(*sizes, **{flag: value})
            assert str(caught.value).startswith(f"{named(kind)}: {flag} must be {expected}, got {value!r}")
        for value in (True, False):
            assert getattr(kind(*sizes, **{flag: value}), flag) is value


@pytest.mark.parametrize("kind", [mingru.MinGRU, mingru.MinLSTM])
def test_recompute_is_a_bool_or_none(kind):
    for value in (True, False, None):
        assert kind(3, 4, recompute=value).recompute is value
    for value in (0, 1, "False"):
        with refused(TypeError, rf"{named(kind)}: recompute must be a bool or None, got {value!r}"):
            kind(3, 4, recompute=value)


@pytest.mark.parametrize("kind", [mingru.MinGRU, mingru.MinLSTM, drop_in.GRU])
def test_a_dropout_by_position_is_told_from_bias(kind):
    remedy = "the arguments after num_layers are bias, batch_first, dropout and bidirectional; pass dropout by keyword"
    with refused(TypeError, f"{named(kind)}: bias must be a bool, got 0.2; {remedy}"):
        kind(3, 4, 2, 0.2)
    with refused(TypeError, f"{named(kind)}: bias must be a bool, got 'no'"):
        kind(3, 4, 2, "no")


@pytest.mark.parametrize("kind", [mingru.MinGRUCell, mingru.MinLSTMCell])
def test_a_number_of_layers_by_position_is_told_from_bias(kind):
    remedy = "a cell has no num_layers; bias comes after hidden_dims"
    with refused(TypeError, f"{named(kind)}: bias must be a bool, got 2; {remedy}"):
        kind(3, 4, 2)


# Names

MEANT = {
    "input_size": "input_dims",
    "in_channels": "input_dims",
    "hidden_size": "hidden_dims",
    "hidden_sizes": "hidden_dims",
    "out_channels": "hidden_dims",
    "hidden_dim": "hidden_dims",
    "dim": "input_dims and hidden_dims",
    "expansion_factor": "hidden_dims",
    "batch_norm": "norm",
    "activation": "candidate",
    "momentum": None,
    "lern_initial_state": "learn_initial_state",
}
OF_LAYERS = {"n_layers": "num_layers", "bidirectonal": "bidirectional", "dropuot": "dropout", "residuals": "residual"}
OF_CONV = {"kernel_sizes": "kernel_size", "strides": "stride", "paddings": "padding", "dilations": "dilation"}
OF_DROP_IN = {"input_dims": "input_size", "hidden_dims": "hidden_size", "lern_initial_state": "learn_initial_state"}
OF_STACK = {"layer": "layers", "residuals": "residual", "num_layers": None}


def meant_by(kind):
    if kind is mingru.Stack:
        return OF_STACK
    if issubclass(kind, DROP_IN):
        return OF_DROP_IN
    of_conv = OF_CONV if "Conv" in kind.__name__ else {}
    return MEANT | of_conv | ({} if "Cell" in kind.__name__ else OF_LAYERS)


@every_class
def test_constructors_know_what_is_meant(kind):
    sizes, _ = CLASSES[kind]
    for name, meant in meant_by(kind).items():
        takes = f"the arguments are {', '.join(inspect.signature(kind).parameters)}"
        with refused(TypeError, f"{named(kind)}: no argument '{name}'; {f'use {meant}' if meant else takes}"):
            kind(*sizes, **{name: 3})


def test_all_sizes_by_torchs_names():
    with refused(TypeError, "MinGRU: no argument 'input_size'; use input_dims"):
        mingru.MinGRU(input_size=3, hidden_size=4)


@pytest.mark.parametrize("name", ["proj_size", "proj_out"])
def test_a_projection_is_a_layer_of_its_own(name):
    with refused(TypeError, f"MinLSTM: no argument '{name}'; apply a torch.nn.Linear to the output"):
        mingru.MinLSTM(3, 4, **{name: 2})


@every_class
def test_constructors_with_too_few_and_too_many(kind):
    sizes, _ = CLASSES[kind]
    with pytest.raises(TypeError, match=f"^{named(kind)}: missing a required argument: '.*'; "):
        kind(*sizes[:-1])
    with pytest.raises(TypeError, match=f"^{named(kind)}: too many positional arguments; "):
        kind(*sizes, *[1] * 20)
    parameters = list(inspect.signature(kind).parameters)
    with pytest.raises(TypeError, match=f"^{named(kind)}: multiple values for argument '{parameters[0]}'; "):
        kind(*sizes, **{parameters[0]: 3})
    if "device" in parameters:
        with pytest.raises(
            RuntimeError, match=f"^{named(kind)}: device must be a device of torch, got 'gpu'; the devi"
        ):
            kind(*sizes, device="gpu")


def test_what_is_taken_by_position():
    by_position = "input_dims, hidden_dims, kernel_size, num_layers"
    with refused(TypeError, f"MinConv2dGRU: too many positional arguments; the positional arguments are {by_position}"):
        mingru.MinConv2dGRU(3, 4, 3, 1, 2)


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
    with refused(TypeError, rf"{named(kind)}: missing a required argument: '\w+'; the positional arguments are .*"):
        layer()
    with refused(TypeError, rf"{named(kind)}: too many positional arguments; the positional arguments are .*"):
        layer(x, *[None] * len(parameters))
    with refused(
        TypeError, f"{named(kind)}: multiple values for argument '{parameters[0]}'; the positional arguments are .*"
    ):
        layer(x, **{parameters[0]: x})
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


class Wide(mingru.MinGRU):
    """As a user writes it."""

    def __init__(self, input_dims, **options):
        super().__init__(input_dims, 2 * input_dims, **options)

    def forward(self, x, h=None, **rest):
        if "error" in rest:
            raise rest["error"]
        return super().forward(x, h)


def test_a_subclass_has_its_own_names():
    with refused(TypeError, "Wide: no argument 'bidirectonal'; use bidirectional"):
        Wide(3, bidirectonal=True)
    layer = Wide(3, bidirectional=True)
    assert layer(X, mask=None)[0].shape == (2, 5, 12)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(X)[0], layer(X)[0])


def test_other_errors_pass_as_they_are():
    layer = Wide(3)
    for error in (TypeError("forward() of something else"), TypeError("no name"), ValueError("forward() is wrong")):
        with pytest.raises(type(error)) as caught:
            layer(X, error=error)
        assert caught.value is error


def test_hooks_may_take_arguments_of_their_own():
    layer = mingru.MinGRU(3, 4)
    expected = layer(X)

    def without_mask(module, args, kwargs):
        return args, {name: value for name, value in kwargs.items() if name != "mask"}

    with_mask = layer.register_forward_pre_hook(without_mask, with_kwargs=True)
    torch.testing.assert_close(layer(X, mask=None), expected, rtol=0, atol=0)
    with refused(TypeError, "MinGRU: h must be a tensor, got float; .*"):
        layer(X, h=0.5, mask=None)
    with_mask.remove()
    with refused(TypeError, "MinGRU: no argument 'mask'; .*"):
        layer(X, mask=None)


# Of any autograd function that is compiled.
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
def test_a_compiled_layer_tells_the_same():
    layer = torch.compile(mingru.MinGRU(3, 4), backend="eager")
    torch.testing.assert_close(layer(X, h=None), layer._orig_mod(X))
    with pytest.raises(TypeError, match="MinGRU: no argument 'hx'; use h"):
        layer(X, hx=None)


@every_class
def test_signatures_copies_and_scripts_stay(kind):
    """What inspects, copies and compiles a class finds it as if nobody watched its arguments."""
    sizes, x = CLASSES[kind]
    assert next(iter(inspect.signature(kind).parameters)) in ("input_dims", "input_size", "layers")
    assert "def __init__" in inspect.getsource(kind.__init__)
    layer = kind(*sizes)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)]
    for twin in [*twins, torch.jit.script(layer)]:
        torch.testing.assert_close(twin(x), layer(x))


@pytest.mark.parametrize("kind", [mingru.MinGRU, mingru.MinLSTM, mingru.MinConv2dGRU, mingru.Stack, drop_in.GRU])
def test_a_dropout_without_effect_is_blamed_on_the_line_that_asks_for_it(kind):
    with pytest.warns(UserWarning, match=f"^{named(kind)}: dropout=0.5 has no effect on one layer") as seen:
        kind(*CLASSES[kind][0], dropout=0.5)
    assert [warning.filename for warning in seen] == [__file__]


# Token ids

INTEGERS = [torch.int64, torch.int32]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@every_class
def test_token_ids_are_to_be_embedded(kind, dtype):
    sizes, x = CLASSES[kind]
    layer = kind(*sizes)
    inner = "MinGRU" if kind is mingru.Stack else named(kind)
    argument = "input" if "hx" in inspect.signature(kind.forward).parameters else "x"
    error = kind.mistake if kind in DROP_IN else TypeError
    remedy = rf"embed token ids first \(torch\.nn\.Embedding\), or use {argument}\.to\(torch\.float32\) for numbers"
    got = rf"{inner}: {argument} must be torch\.float32 like the layer's weight, got {dtype}; {remedy}"
    with refused(error, got):
        layer(x.to(dtype))
    # Of a shape that ids have.
    ids = torch.zeros(2, 7, dtype=dtype)
    error = RuntimeError if argument == "input" else ValueError
    with refused(
        error, rf"{inner}: {argument} must be .*, got \(2, 7\); embed token ids first \(torch\.nn\.Embedding\)"
    ):
        layer(ids)


@every_class
def test_other_numbers_are_not_token_ids(kind):
    sizes, x = CLASSES[kind]
    layer = kind(*sizes)
    for dtype in (torch.uint8, torch.float64, torch.complex64, torch.bool):
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            layer(x.to(dtype))
        assert "Embedding" not in str(caught.value)
        assert str(caught.value).endswith(".to(torch.float32)")
    for dtype in (torch.uint8, torch.float32):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            layer(torch.zeros(2, 7, dtype=dtype))
        assert "Embedding" not in str(caught.value)


def test_packed_token_ids():
    ids = torch.nn.utils.rnn.pack_sequence([torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)])
    for kind, error in ((mingru.MinGRU, ValueError), (drop_in.GRU, RuntimeError)):
        with pytest.raises(error, match=f"^{named(kind)}: .*; embed token ids first"):
            kind(3, 4)(ids)


# One state


def test_only_a_mingru_has_gates():
    for kind in (mingru.MinLSTM, mingru.MinLSTMCell):
        with refused(TypeError, f"{kind.__name__}: no argument 'gate'; only a minGRU has several gates"):
            kind(3, 4, gate="signed")
        got = f"{kind.__name__}: no argument 'min_decay'; only MinGRU and MinGRUCell have a bound of the decay"
        with refused(TypeError, got):
            kind(3, 4, min_decay=0.5)


@every_class
def test_a_mask_is_no_state(kind):
    sizes, x = CLASSES[kind]
    if "reset" in inspect.signature(kind.forward).parameters:
        mask = torch.zeros(2, dtype=torch.bool) if "Cell" in kind.__name__ else torch.zeros(2, 5, dtype=torch.bool)
        error = RuntimeError if kind in (drop_in.GRU, drop_in.GRUCell) else TypeError
        with refused(error, f"{named(kind)}: hx? must be .*; pass a mask as reset="):
            kind(*sizes)(x, mask)


def test_a_state_of_another_size_is_not_that_of_torch():
    layer = mingru.MinGRU(3, 4)
    expected = r"MinGRU: h must be expandable to \(L \* D, B, 1, H\) = \(1, 2, 1, 4\)"
    for shape in ((1, 3, 1, 4), (1, 2, 1, 5), (2, 5)):
        with refused(ValueError, rf"{expected}, got {re.escape(str(shape))}"):
            layer(X, torch.zeros(shape))
    with refused(ValueError, rf"{expected}, got \(1, 2, 4\); convert a state of nn.GRU, .*, with h.unsqueeze\(2\)"):
        layer(X, torch.zeros(1, 2, 4))


PAIRS = {"tuple": tuple, "list": list}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_the_state_is_one_tensor(pair):
    h = torch.zeros(1, 2, 1, 4)
    got = f"got {pair.__name__}"
    for layer, x, letters in (
        (mingru.MinLSTM(3, 4), X, r"\(L \* D, B, 1, H\)"),
        (mingru.MinLSTMCell(3, 4), X[0], r"\(B, H\)"),
        (mingru.MinLSTMCell(3, 4), X[0, 0], r"\(H\)"),
    ):
        remedy = f"a minLSTM's state is one tensor h, {letters}, without a cell state"
        with refused(TypeError, f"{layer.name}: h must be a tensor, {got}; {remedy}"):
            layer(x, pair([h, h]))
    for layer, x, letters in (
        (mingru.MinGRU(3, 4), X, r"\(L \* D, B, 1, H\)"),
        (mingru.MinGRUCell(3, 4), X[0], r"\(B, H\)"),
        (mingru.MinConv1dGRUCell(3, 4, 1), CONV[1][0], r"\(B, H, \*space\)"),
    ):
        remedy = f"a minGRU's state is one tensor h, {letters}"
        with refused(TypeError, f"{layer.name}: h must be a tensor, {got}; {remedy}"):
            layer(x, pair([h]))


def learned(kind, **options):
    """Return a module of two layers with all parameters that calls of its kind may have, and an x."""
    sizes, x = CLASSES[kind]
    if kind is mingru.Stack:
        return kind([mingru.MinGRU(3, 4), mingru.MinLSTM(4, 5)], residual=True), x
    known = inspect.signature(kind).parameters
    options = {"num_layers": 2, "bidirectional": True, "residual": True, "learn_initial_state": True, **options}
    return kind(*sizes, **{name: value for name, value in options.items() if name in known}), x


@every_class
@pytest.mark.parametrize("grad", [True, False])
def test_every_parameter_is_on_the_device_of_x(kind, grad):
    """Otherwise torch's linear maps and convolutions return memory that nobody wrote."""
    module, x = learned(kind)
    error = RuntimeError if kind in DROP_IN else ValueError
    with torch.set_grad_enabled(grad):
        for name, parameter in list(module.named_parameters()):
            owner, _, last = name.rpartition(".")
            setattr(module.get_submodule(owner), last, torch.nn.Parameter(parameter.to("meta")))
            with pytest.raises(error, match=r"must be on (cpu|meta) like"):
                module(x)
            setattr(module.get_submodule(owner), last, parameter)
        module(x)
        # All on "meta" compute shapes.
        assert learned(kind)[0].to("meta")(x.to("meta"))[0].is_meta


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind is not mingru.Stack], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("grad", [True, False])
def test_a_learned_initial_state_keeps_its_shape(kind, grad):
    """Another shape that can be broadcast would mean one thing in resets and another before the first step."""
    module, x = learned(kind)
    owner = module if hasattr(module, "initial_state") else module.layers[0]
    right = owner.initial_state.shape
    reset = torch.zeros(x.shape[: 1 if kind.__name__.endswith("Cell") else 2], dtype=torch.bool)
    with torch.set_grad_enabled(grad):
        for shape in [right[1:], (4,), (1,), (), (1, *right), (*right[:-1], 7), (right[0], 2, *right[2:])]:
            owner.initial_state = torch.nn.Parameter(torch.zeros(shape))
            for options in ({}, {"reset": reset}):
                text = re.escape(f"initial_state must be {tuple(right)}, got {tuple(shape)}; to broadcast, expand it")
                with pytest.raises(ValueError, match=rf"^{named(kind)}: (layers\[0\]\.)?{text}"):
                    module(x, **options)
