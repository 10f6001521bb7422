"""What holds for every class and all of its options as modules: weights, copies, files, representations and devices."""

import copy
import inspect
import pickle
import re
from functools import partial

import cases
import pytest
import torch
from cases import FEATURES, IMAGES, MODELS, ROWS, STEPS, parametrized, refuses, some, tensors, through_a_file
from options import DOUBLE
from torch import nn
from torch.testing import assert_close

import mingru
from mingru import convert, drop_in, models
from mingru.modules.per_step import OF_TORCH


@parametrized([*ROWS, *MODELS])
def test_copies_and_files(case):
    module, other, given = case.varied(**DOUBLE), case.make(**DOUBLE), case.given(2, 5, **DOUBLE)
    expected = case.call(module, **given)
    assert not torch.equal(case.call(other, **given)[0], expected[0])
    other.load_state_dict(through_a_file(module.state_dict()))
    # The reference reads names and shapes; there are no buffers but marks.
    names = [name for name in module.state_dict() if not name.endswith(("_mark", ".gate"))]
    assert case.of_torch or names == [name for name, _ in module.named_parameters()]
    pointers = {weight.data_ptr() for weight in module.parameters()}
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), through_a_file(module, weights_only=False)]
    # An option that acts in training alone fails here: both of its meanings are for test_one_forward.py.
    for twin in (other, *twins, copy.deepcopy(module).eval()):
        assert_close(case.call(twin, **given), expected, rtol=0, atol=0)
        assert repr(twin) == repr(module) and not {weight.data_ptr() for weight in twin.parameters()} & pointers


@parametrized(some(ROWS, 2))
def test_parameters_are_drawn_again_as_by_the_constructor(case):
    torch.manual_seed(5)
    module = case.make()
    drawn = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        for weight in module.parameters():
            weight.fill_(9.0)
    torch.manual_seed(5)
    module.reset_parameters()
    if case.of_torch:
        # Its constructor draws a learned state twice.
        drawn.pop("initial_state", None)
    for name, each in drawn.items():
        assert_close(module.state_dict()[name], each, rtol=0, atol=0)
    with torch.device("meta"):
        empty = case.make()
    real = empty.to_empty(device="cpu")
    torch.manual_seed(5)
    real.reset_parameters()
    assert_close(dict(real.named_parameters()), dict(module.named_parameters()), rtol=0, atol=0)


@parametrized(some(ROWS, 8))
def test_shapes_on_the_device_meta(case):
    module, given = case.make(device="meta"), case.given()
    out, states = case.call(case.make(), **given)
    assert all(weight.is_meta for weight in module.parameters())
    given = {name: [each.to("meta") for each in value] if name == "h" else value for name, value in given.items()}
    given = {name: value if name == "h" else value.to("meta") for name, value in given.items()}
    for names, device in (((), "meta"), (("h", "reset"), "cpu")):
        lengths = {"lengths": torch.tensor([4, 0, 2], device=device)} if "lengths" in case.takes else {}
        on_meta = case.call(module, **{name: value for name, value in given.items() if name not in names}, **lengths)
        for found, expected in zip([on_meta[0], *on_meta[1]], [out, *states], strict=True):
            assert found.is_meta and found.shape == expected.shape
        # Not even gradients read lengths, for which a GPU would wait.
        sum(each.sum() for each in tensors(on_meta)).backward()
        assert all(weight.grad.shape == weight.shape for weight in module.parameters() if "h" not in names)


@parametrized([*FEATURES, *STEPS, *IMAGES, *cases.LIKE_TORCH])
def test_a_representation_is_a_constructor(case):
    module = case.make()
    again = eval(f"kind({module.extra_repr()})", {"kind": type(module)})
    assert repr(again) == repr(module) and again.state_dict().keys() == module.state_dict().keys()
    # Only what is not default.
    defaults = inspect.signature(type(module)).parameters
    named = [name for name in re.findall(r"(\w+)=", module.extra_repr()) if name not in ("candidate", "gate", "cell")]
    assert all(getattr(module, name) != defaults[name].default for name in named)


@parametrized([case for case in ROWS if case.is_cell])
def test_a_cell_is_a_layer(case):
    """Weights have the same names, are drawn alike, and go there and back. An element of a batch may come alone."""
    torch.manual_seed(5)
    cell, given = case.make(**DOUBLE), case.given(**DOUBLE)
    kind = getattr(drop_in if case.of_torch else mingru, type(cell).__name__.removesuffix("Cell"))
    torch.manual_seed(5)
    layer = eval(f"kind({cell.extra_repr()}, dtype=torch.double)", {"kind": kind, "torch": torch})
    # The guards of `drop_in` have the names of torch's weights, which differ.
    of_both = [{key: value for key, value in each.state_dict().items() if "_hh" not in key} for each in (layer, cell)]
    assert_close(*of_both, rtol=0, atol=0)
    cell = case.varied(**DOUBLE)
    layer.load_state_dict(through_a_file(cell.state_dict()))
    x = given["x"].transpose(0, 1) if case.of_torch and not layer.batch_first else given["x"]
    out, _ = layer(x)
    out = out.transpose(0, 1) if case.of_torch and not layer.batch_first else out
    assert_close(case.call(cell, given["x"])[0], out, rtol=1e-9, atol=1e-9)
    state, steps = case.of_states(given["h"]), {name: given[name][:, 0] for name in given if name not in ("x", "h")}
    for h, extra in ((state, steps), (None, {})):
        together = tensors(cell(given["x"][:, 0], h, **extra))
        for at in range(3):
            one = None if h is None else case.of_states(each[at] for each in given["h"])
            alone = cell(given["x"][at, 0], one, **{name: each[at] for name, each in extra.items()})
            assert_close(tensors(alone), [each[at] for each in together], rtol=1e-9, atol=1e-9)


with_and_without_grad = pytest.mark.parametrize("grad", [True, False])
LEARNED = [row for row in ROWS if "learn_initial_state=True" in row.name and "lock" not in row.name]


@with_and_without_grad
@parametrized(some([row for row in ROWS if row.name != "Stack with a projection"], 6))
def test_every_parameter_is_on_the_device_of_x(case, grad):
    """Otherwise torch's linear maps and convolutions return memory that nobody wrote."""
    module, x = case.make(), case.args()["x"]
    with torch.set_grad_enabled(grad):
        for name, parameter in list(module.named_parameters()):
            owner, _, last = name.rpartition(".")
            setattr(module.get_submodule(owner), last, nn.Parameter(parameter.to("meta")))
            refuses(ValueError, r"must be on (cpu|meta) like", module, x)
            setattr(module.get_submodule(owner), last, parameter)
        module(x)


@with_and_without_grad
@parametrized(some(LEARNED, 4))
def test_a_learned_initial_state_of_another_shape_is_broadcast(case, grad):
    """In resets as before the first step."""
    module, args = case.make(), case.args()
    owner = module if hasattr(module, "initial_state") else module.layers[0]
    right = owner.initial_state.shape
    given = [{}, {"reset": args["reset"]}] if "reset" in case.takes else [{}]
    with torch.set_grad_enabled(grad):
        for shape in (right[1:], right[-1:] if owner is module else right[3:], (1,), ()):
            # In place of the parameter, and in it, after a call.
            owner.initial_state = nn.Parameter(torch.randn(right if len(shape) % 2 else shape))
            module(args["x"]) if len(shape) % 2 else None
            owner.initial_state.data = torch.randn(shape)
            found = [module(args["x"], **each) for each in given]
            owner.initial_state.data = owner.initial_state.data.expand(right).clone()
            torch.testing.assert_close(found, [module(args["x"], **each) for each in given])
        for shape in ((1, *right), (*right[:-1], 7)):
            owner.initial_state = nn.Parameter(torch.zeros(shape))
            refuses(RuntimeError, "expand", module, args["x"])


# Whole models as files, loaded with weights_only=True in a process of its own

# Options that bring in every class that may be inside.
FILES = [
    *(case.make for case in [*cases.CASES[:-1], *some(ROWS, 4), *MODELS]),
    partial(mingru.MinLSTM, 3, 4, 2, norm="rms", forget_bias=1.0, dtype=torch.bfloat16),
    lambda: mingru.Stack([mingru.MinGRU(3, 4), *(each() for each in OF_TORCH[:-3])]),
    lambda: mingru.MinConv2dGRU(3, [4, 5], [3, 1], num_layers=2, padding=["same", 0], residual=True),
    lambda: drop_in.LSTMLike(3, 4, 2, proj_size=2, dropout=0.5, cell="minlstm"),
    lambda: models.LanguageModel(5, 4, 1, tied=False),
    *(partial(each, 3, 4) for each in (mingru.GRUCell, drop_in.GRU, drop_in.LSTM, drop_in.GRUCell, drop_in.LSTMCell)),
]

LOAD = """
import sys
import torch

sys.modules["mingru"] = None
try:
    torch.load(sys.argv[-1], weights_only=False)
except ModuleNotFoundError:
    del sys.modules["mingru"]
import mingru

torch.serialization.add_safe_globals(mingru.safe_globals())
loaded = {}
for path in sys.argv[2:]:
    model = torch.load(path, weights_only=True)
    loaded[path] = (type(model).__name__, repr(model), model.state_dict())
torch.save(loaded, sys.argv[1])
"""


def test_whole_models_load_in_a_fresh_process(tmp_path):
    made, named = {str(tmp_path / str(index)): make() for index, make in enumerate(FILES)}, set()
    for path, model in made.items():
        torch.save(model, path)
        # Nothing is allowed by the import.
        refuses(pickle.UnpicklingError, "safe_globals", torch.load, path, weights_only=True)
        named |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    public = [getattr(home, name) for home in (mingru, convert, drop_in, models) for name in home.__all__]
    layers = {each for each in public if isinstance(each, type) and issubclass(each, nn.Module)}
    safe = [each[0] if isinstance(each, tuple) else each for each in mingru.safe_globals()]
    assert layers == {type(model) for model in made.values()} <= set(safe)
    # A class that no file names would be trusted for nothing.
    assert named == {f"{each.__module__}.{each.__qualname__}" for each in safe}
    found = str(tmp_path / "found")
    cases.in_a_process(LOAD, found, *made)
    for path, (kind, text, weights) in torch.load(found, weights_only=True).items():
        model = made[path]
        assert (kind, text) == (type(model).__name__, repr(model))
        torch.testing.assert_close(weights, model.state_dict(), rtol=0, atol=0)
