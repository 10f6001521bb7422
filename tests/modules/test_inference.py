"""Inference passes that run as one operator, and the same modules called one by one.

Whatever is called, and however a module was changed, both give the same values, shapes and errors.
"""

import copy
import functools
import gc
import random
import weakref
from contextlib import contextmanager, suppress
from unittest import mock

import pytest
import torch
from cases import tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import BaseTorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import mingru
from mingru.models.causal_conv import CausalConv
from mingru.ops import inference
from mingru.ops.cells import TIMED

WHY_NOT = mingru.backends()["native"]
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not True, reason=str(WHY_NOT)),
    # A random edit may name a cell that the kernels lack.
    pytest.mark.filterwarnings("ignore:mingru. using the slower backend:RuntimeWarning"),
]
DIMS = 4


def outcome(module, *args, **kwargs):
    """Return what a call returns, or the type and the text of its error."""
    try:
        return module(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)


def is_error(result):
    return isinstance(result, tuple) and isinstance(result[0], type)


def assert_same_as_one_by_one(module, *args, context=torch.no_grad, **kwargs):
    with context():
        found = outcome(module, *args, **kwargs)
        with mock.patch.object(inference, "run", return_value=None):
            expected = outcome(module, *args, **kwargs)
    if is_error(found) or is_error(expected):
        assert found == expected
        return
    assert type(found) is type(expected)
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


def is_planned(module, x):
    """Return whether one operator computes the call, which is given only for its shapes."""
    with torch.no_grad():
        return inference.run(module, x, None, None, not getattr(module, "batch_first", True)) is not None


MODULES = {
    "MinGRU": lambda: mingru.MinGRU(DIMS, DIMS, 2, norm="rms", residual=True),
    "both directions": lambda: mingru.MinGRU(DIMS, DIMS, bidirectional=True, residual=True),
    "plain": lambda: mingru.MinGRU(DIMS, DIMS),
    "MinLSTM": lambda: mingru.MinLSTM(DIMS, DIMS, norm="layer", learn_initial_state=True),
    "MinGRUCell": lambda: mingru.MinGRUCell(DIMS, DIMS, norm="rms"),
    "MinLSTMCell": lambda: mingru.MinLSTMCell(DIMS, DIMS),
    "Stack": lambda: mingru.Stack([mingru.MinGRU(DIMS, 6), mingru.MinLSTM(6, DIMS, norm="rms")], residual=True),
    "Block": lambda: mingru.models.Block(DIMS, conv=3, mlp=2),
    "Stack of blocks": lambda: mingru.Stack([mingru.models.Block(DIMS, mlp=2, norm="layer") for _ in range(2)]),
    "drop_in.GRU": lambda: mingru.drop_in.GRU(DIMS, DIMS, 2, norm="rms", batch_first=True),
    "drop_in.GRUCell": lambda: mingru.drop_in.GRUCell(DIMS, DIMS),
    "signed": lambda: mingru.MinGRU(DIMS, DIMS, gate="signed", norm="rms"),
    "projected": lambda: mingru.drop_in.GRU(DIMS, DIMS, 2, batch_first=True, proj_size=2),
}


def made(name):
    torch.manual_seed(0)
    module = MODULES[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module


def input_of(module, batch=2, steps=3):
    torch.manual_seed(1)
    return torch.randn(batch, DIMS) if module.role == "step" else torch.randn(batch, steps, DIMS)


def planned(module):
    """Call a module once, so that it has a plan, and return its input."""
    x = input_of(module)
    assert is_planned(module, x)
    return x


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def shift(linear):
    forward = linear.forward
    linear.forward = lambda x: forward(x) + 1


def layer_of(module):
    return next(each for each in module.modules() if hasattr(each, "linear_reverse"))


def norm_of(module):
    return next(each for each in module.modules() if isinstance(each, (nn.RMSNorm, nn.LayerNorm)))


def block_of(module):
    return next(each for each in module.modules() if isinstance(each, mingru.models.Block))


def replace_hooks(module):
    hooks = type(module._forward_hooks)()
    hooks[0] = lambda module, args, out: out + 1
    module._forward_hooks = hooks


def replace_weight(linear, tensor):
    del linear.weight
    linear.weight = tensor


def set_gelu(module, gelu):
    block_of(module).mlp[2] = gelu


# (module, edit); the first call comes before the edit.
EDITS = {
    "a subclass as reverse map": (
        "both directions",
        lambda m: setattr(layer_of(m), "linear_reverse", Shifted(DIMS, 2 * DIMS)),
    ),
    "a patched reverse map": ("both directions", lambda m: shift(layer_of(m).linear_reverse)),
    "a part appended to the MLP": ("Block", lambda m: m.mlp.append(nn.Linear(DIMS, DIMS))),
    "a part inserted into the MLP": ("Block", lambda m: m.mlp.insert(1, nn.GELU())),
    "another GELU": ("Block", lambda m: set_gelu(m, nn.GELU("tanh"))),
    "the attribute of GELU": ("Block", lambda m: setattr(m.mlp[2], "approximate", "tanh")),
    "an activation in place of GELU": ("Block", lambda m: set_gelu(m, nn.ReLU())),
    "an MLP without a norm": ("Block", lambda m: setattr(m, "mlp", m.mlp[1:])),
    "no MLP": ("Block", lambda m: setattr(m, "mlp", None)),
    "an MLP": ("Block", lambda m: setattr(m, "mlp", nn.Sequential(nn.LayerNorm(DIMS), *m.mlp[1:]))),
    "no convolution": ("Stack of blocks", lambda m: setattr(block_of(m), "conv", CausalConv(DIMS, 2, True))),
    "a norm without effect": ("MinGRU", lambda m: setattr(m.layers[1], "norm", nn.Identity())),
    "no norm": ("MinGRU", lambda m: setattr(m.layers[1], "norm", None)),
    "a new norm": ("plain", lambda m: setattr(m.layers[0], "norm", nn.RMSNorm(DIMS))),
    "a norm of other features": ("MinGRU", lambda m: setattr(m.layers[1], "norm", nn.RMSNorm(3))),
    "a norm of two dimensions": ("MinGRU", lambda m: setattr(m.layers[1], "norm", nn.LayerNorm((3, DIMS)))),
    "a norm without weights": (
        "MinGRU",
        lambda m: setattr(m.layers[0], "norm", nn.RMSNorm(DIMS, elementwise_affine=False)),
    ),
    "a new map of the residual": ("MinGRU", lambda m: setattr(m.layers[1], "align", nn.Linear(DIMS, DIMS, bias=False))),
    "a map of the residual with a bias": ("MinGRU", lambda m: setattr(m.layers[0], "align", nn.Linear(DIMS, DIMS))),
    "a new layer": ("MinGRU", lambda m: m.layers.append(copy.deepcopy(m.layers[0]))),
    "a removed layer": ("MinGRU", lambda m: m.layers.pop(1)),
    "another class": ("plain", lambda m: setattr(layer_of(m).linear, "__class__", Shifted)),
    "another class of the layer": ("plain", lambda m: setattr(m, "__class__", Wrong)),
    "a negative eps": ("MinGRU", lambda m: setattr(norm_of(m), "eps", -0.5)),
    "a negative eps from the start": ("MinGRU", lambda m: setattr(norm_of(m), "eps", -1.0)),
    "no eps": ("MinGRU", lambda m: setattr(norm_of(m), "eps", None)),
    "time first in a cell": ("MinGRUCell", lambda m: setattr(m, "batch_first", False)),
    "an eps": ("MinGRU", lambda m: setattr(norm_of(m), "eps", 0.5)),
    "a subclass as map": ("plain", lambda m: setattr(layer_of(m), "linear", Shifted(DIMS, 2 * DIMS))),
    "another map": ("Block", lambda m: setattr(layer_of(m), "linear", nn.Linear(DIMS, 2 * DIMS))),
    "another weight": (
        "Block",
        lambda m: setattr(layer_of(m).linear, "weight", nn.Parameter(torch.randn(2 * DIMS, DIMS))),
    ),
    "a weight changed in place": ("Block", lambda m: layer_of(m).linear.weight.data.mul_(2)),
    "other data": ("Block", lambda m: setattr(layer_of(m).linear.weight, "data", torch.randn(2 * DIMS, DIMS))),
    "loaded": ("Block", lambda m: m.load_state_dict(MODULES["Block"]().state_dict())),
    "loaded and assigned": ("Block", lambda m: m.load_state_dict(MODULES["Block"]().state_dict(), assign=True)),
    "a compiled layer in a stack": ("Stack", lambda m: m.layers[0].compile(backend="eager")),
    "hooks replaced": ("MinGRU", lambda m: replace_hooks(layer_of(m).linear)),
    "a hook": ("Block", lambda m: m.mlp.register_forward_hook(lambda module, args, out: out + 1)),
    "a method of the layer": ("plain", lambda m: setattr(layer_of(m), "_direction", lambda *args: 1 / 0)),
    "a method of the block": ("Block", lambda m: setattr(m, "_run", lambda *args: (args[0] + 1, []))),
    "compiled": ("Block", lambda m: m.rnn.compile(backend="eager")),
    "time first in a block": ("Block", lambda m: setattr(m.rnn, "batch_first", False)),
    "time first in a stack": ("Stack", lambda m: setattr(m.layers[0], "batch_first", False)),
    "a layer like torch's in a block": ("Block", lambda m: setattr(m, "rnn", mingru.drop_in.GRU(DIMS, DIMS))),
    "a cell in a stack": ("Stack", lambda m: m.layers.__setitem__(0, mingru.MinGRUCell(DIMS, 6))),
    "a layer of other sizes": ("Stack", lambda m: m.layers.__setitem__(1, mingru.MinGRU(5, DIMS))),
    "other ends": ("Stack", lambda m: setattr(m, "ends", [0, 1, 1])),
    "a map in a stack": ("Stack", lambda m: m.aligns.__setitem__(0, Doubled())),
    "other input features": ("plain", lambda m: setattr(m, "input_dims", 9)),
    "other state features": ("plain", lambda m: setattr(m, "hidden_dims", 9)),
    "an unknown candidate": ("plain", lambda m: setattr(m.layers[0], "candidate", "sine")),
    "another candidate": ("MinLSTM", lambda m: setattr(m.layers[0], "candidate", "tanh")),
    "another gate": ("plain", lambda m: setattr(m.layers[0], "cell", "mingru_signed")),
    "a bound": ("plain", lambda m: setattr(m.layers[0], "min_decay", 0.5)),
    "a highway": ("plain", lambda m: setattr(m.layers[0], "highway", True)),
    "a residual": ("plain", lambda m: setattr(m.layers[0], "residual", True)),
    "no residual": ("MinGRU", lambda m: setattr(m.layers[0], "residual", False)),
    "weight normalization": ("plain", lambda m: parametrizations.weight_norm(layer_of(m).linear)),
    "a parametrized norm": ("MinGRU", lambda m: parametrize.register_parametrization(norm_of(m), "weight", Doubled())),
    "a weight that is no parameter": (
        "plain",
        lambda m: replace_weight(layer_of(m).linear, torch.randn(2 * DIMS, DIMS)),
    ),
    "a transposed weight": (
        "plain",
        lambda m: setattr(layer_of(m).linear, "weight", nn.Parameter(torch.randn(DIMS, 2 * DIMS).t())),
    ),
    "a deleted bias": ("plain", lambda m: setattr(layer_of(m).linear, "bias", None)),
    "more features by data": ("plain", lambda m: setattr(layer_of(m).linear.weight, "data", torch.randn(2 * DIMS, 5))),
    "dropout": ("MinGRU", lambda m: (setattr(m, "dropout", 1.0), m.train())),
    "dropout of a block": ("Block", lambda m: (setattr(m, "dropout", 1.0), m.train())),
    "the parameters' dictionary": (
        "plain",
        lambda m: setattr(layer_of(m).linear, "_parameters", dict(nn.Linear(DIMS, 2 * DIMS)._parameters)),
    ),
    "the submodules' dictionary": ("Block", lambda m: setattr(m, "_modules", dict(made("Block")._modules))),
}


# After these, one operator computes the pass all the same.
STILL_IN_ONE = {
    *("no MLP", "an MLP", "no norm", "a new norm", "a new map of the residual", "a map of the residual with a bias"),
    *("a negative eps", "a negative eps from the start", "no eps", "an eps", "time first in a cell", "another map"),
    *("another weight", "a weight changed in place", "other data", "loaded", "loaded and assigned", "a deleted bias"),
    *("another candidate", "another gate", "a bound", "a residual", "no residual"),
    *("the parameters' dictionary", "the submodules' dictionary"),
}


class Wrong(mingru.MinGRU):
    def _run(self, *args):
        out, last = super()._run(*args)
        return out + 1, last


@pytest.mark.parametrize("edit", EDITS)
def test_edits(edit):
    name, change = EDITS[edit]
    for x_before in (input_of, planned):
        module = made(name)
        x = x_before(module)
        change(module)
        assert_same_as_one_by_one(module, x)
        assert (outcome(is_planned, module, x) is True) == (edit in STILL_IN_ONE)


@pytest.mark.parametrize("target", [nn.Linear, nn.RMSNorm, nn.GELU, mingru.models.Block, type(made("plain").layers[0])])
def test_forward_patched_on_a_class(target):
    module = made("Block")
    x = planned(module)
    forward = target.forward

    def patched(self, *args):
        result = forward(self, *args)
        return (result[0] + 1, result[1]) if isinstance(result, tuple) else result + 1

    with mock.patch.object(target, "forward", patched):
        assert_same_as_one_by_one(module, x)
        assert not is_planned(module, x)
    assert is_planned(module, x)


def test_functional_call():
    module = made("Block")
    x = planned(module)
    other = {name: 2 * parameter.detach() for name, parameter in module.named_parameters()}
    assert_same_as_one_by_one(lambda x: torch.func.functional_call(module, other, (x,)), x)
    assert_same_as_one_by_one(module, x)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_freed_although_a_child_refers_to_it(name):
    module = made(name)
    for child in module.modules():
        vars(child)["owner"] = (module,)
    planned(module)
    found = weakref.ref(module)
    del module, child
    gc.collect()
    assert found() is None


def test_a_plan_is_no_part_of_copies():
    module = made("MinGRU")
    planned(module)
    for other in (copy.deepcopy(module), copy.copy(module)):
        assert not hasattr(other, "_plan")
    assert "_plan" not in str(module.__reduce_ex__(2))


@pytest.mark.parametrize("name", MODULES)
def test_the_class_of_a_module_can_be_changed(name):
    module = made(name)
    x = planned(module)
    module.__class__ = type("Sharded", (type("Mixin", (), {}), type(module)), {})
    assert_same_as_one_by_one(module, x)


STATES = {
    "none": lambda h: None,
    "right": lambda h: h,
    "ones": torch.ones_like,
    "first dimension": lambda h: torch.ones(h.shape[0] + 2, *h.shape[1:]),
    "batch": lambda h: torch.ones(*h.shape[:1], h.shape[1] + 1, *h.shape[2:]),
    "broadcast": lambda h: h[..., :1, :],
    "one number": lambda h: h[..., :1],
    "features": lambda h: torch.cat([h, h], -1),
    "leading one": lambda h: h.unsqueeze(0),
    "fewer dimensions": lambda h: h[0],
    "vector": lambda h: torch.ones(h.shape[-1]),
    "scalar": lambda h: torch.ones(()),
    "one more dimension": lambda h: h.unsqueeze(-2),
    "flat": lambda h: h.flatten(0, -2),
    "double": lambda h: h.double(),
    "bfloat16": lambda h: h.bfloat16(),
    "strided": lambda h: torch.stack([h, h], -1)[..., 0],
    "meta": lambda h: h.to("meta"),
    "array": lambda h: h.detach().numpy(),
    "number": lambda h: 0.5,
    "pair": lambda h: (h, h),
    "list": lambda h: [h],
    "set": lambda h: {h},
}
INPUTS = {
    "right": lambda x: x,
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "features": lambda x: x[..., :3],
    "more dimensions": lambda x: x.unsqueeze(0),
    "fewer dimensions": lambda x: x[0],
    "double": lambda x: x.double(),
    "int": lambda x: x.long(),
    "empty": lambda x: x[:0],
    "no features": lambda x: x[..., :0],
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "list": lambda x: x.tolist(),
    "none": lambda x: None,
}
MASKS = {
    "none": lambda x: None,
    "right": lambda x: x[..., 0] > 0,
    "shape": lambda x: x[..., 0].unsqueeze(0) > 0,
    "transposed": lambda x: (x[..., 0] > 0).transpose(0, -1).contiguous(),
    "uint8": lambda x: (x[..., 0] > 0).byte(),
    "list": lambda x: [True],
    "times": lambda x: x[..., 0].abs(),
}
TIMES = {
    "none": lambda x: None,
    "right": lambda x: x[..., 0].abs(),
    "negative": lambda x: x[..., 0],
    "nan": lambda x: x[..., 0] * float("nan"),
    "shape": lambda x: x.abs(),
    "double": lambda x: x[..., 0].abs().double(),
    "mask": lambda x: x[..., 0] > 0,
    "number": lambda x: 1.0,
}


def given_states(module, x, changes):
    """Return the state argument of a module, whose tensors are changed."""
    states = module.default_states(x, len(x))
    changed = [STATES[change](state) for change, state in zip(changes, states, strict=False)]
    if isinstance(module, mingru.Stack | mingru.models.Block):
        return None if changes[0] == "none" else changed
    return changed[0]


@pytest.mark.parametrize("name", MODULES)
def test_right_and_wrong_arguments(name):
    module = made(name)
    x = planned(module)
    for change in INPUTS.values():
        assert_same_as_one_by_one(module, change(x))
    for wrong_kind in ({1, 2}, "text", (), [], 3):
        assert_same_as_one_by_one(module, x, wrong_kind)
    for state in STATES:
        assert_same_as_one_by_one(module, x, given_states(module, x, [state] * 4), context=torch.inference_mode)
    for state in ("none", "right", "features"):
        h = given_states(module, x, ["right", state, "right", "right"])
        for mask in MASKS.values():
            assert_same_as_one_by_one(module, x, h, reset=mask(x))
        for times in TIMES.values():
            assert_same_as_one_by_one(module, x, h, dt=times(x), reset=MASKS["right"](x))


PARTS = [
    lambda: nn.Linear(DIMS, DIMS),
    lambda: nn.Linear(DIMS, DIMS, bias=False),
    lambda: nn.Linear(DIMS, 2 * DIMS),
    lambda: nn.Linear(2 * DIMS, DIMS),
    lambda: Shifted(DIMS, 2 * DIMS),
    lambda: nn.RMSNorm(DIMS),
    lambda: nn.RMSNorm(DIMS, eps=0.1),
    lambda: nn.LayerNorm(DIMS),
    lambda: nn.LayerNorm(DIMS, bias=False),
    nn.Identity,
    nn.GELU,
    lambda: nn.GELU("tanh"),
    nn.ReLU,
    Doubled,
    lambda: nn.Dropout(1.0),
    lambda: mingru.MinGRU(DIMS, DIMS),
    lambda: mingru.MinGRUCell(DIMS, DIMS),
    lambda: mingru.drop_in.GRU(DIMS, DIMS),
    lambda: mingru.models.Block(DIMS),
    lambda: CausalConv(DIMS, 2, True),
    lambda: None,
]
VALUES = [True, False, None, 0, 1, 2, 0.25, "tanh", "none", "linear", "minlstm", "mingru_signed", (DIMS,)]
FIXED = {"training", "name"}


KINDS = ["child", "child", "attribute", "attribute", "insert", "parameter", "hook", "patch", "class"]


def mutate(data, module):
    """Change the module at random: a submodule, an attribute, a parameter, a hook."""
    parts = list(module.modules())
    part = parts[data.draw(st.integers(0, len(parts) - 1))]
    kind = data.draw(st.sampled_from(KINDS))
    names = list(part._modules)
    if kind == "child" and names:
        setattr(part, data.draw(st.sampled_from(names)), data.draw(st.sampled_from(PARTS))())
    elif kind == "attribute":
        own = [name for name in vars(part) if not name.startswith("_") and name not in FIXED]
        if own:
            setattr(part, data.draw(st.sampled_from(own)), data.draw(st.sampled_from(VALUES)))
    elif kind == "insert" and isinstance(part, nn.ModuleList | nn.Sequential):
        part.insert(data.draw(st.integers(0, len(part))), data.draw(st.sampled_from(PARTS))())
    elif kind == "parameter" and part._parameters:
        name = data.draw(st.sampled_from(list(part._parameters)))
        old = part._parameters[name]
        new = None if old is None or data.draw(st.booleans()) else nn.Parameter(torch.randn_like(old))
        setattr(part, name, new)
    elif kind == "hook":
        part.register_forward_pre_hook(lambda module, args: None)
    elif kind == "patch":
        part.forward = lambda *args, **kwargs: (_ for _ in ()).throw(ValueError("patched"))
    elif kind == "class":
        part.__class__ = type("Sub", (type(part),), {})


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_edits(data):
    module = made(data.draw(st.sampled_from(list(MODULES))))
    x = planned(module)
    for _ in range(data.draw(st.integers(1, 3))):
        # Torch refuses some edits.
        with suppress(TypeError, AttributeError, KeyError, ValueError):
            mutate(data, module)
        assert_same_as_one_by_one(module, x)


class Calls:
    """Count the passes that run as one operator, or forbid them."""

    def __init__(self, monkeypatch):
        self.count, self.allowed = 0, True
        run = inference.run

        def counted(*args):
            done = run(*args) if self.allowed else None
            self.count += done is not None
            return done

        monkeypatch.setattr(inference, "run", counted)

    @contextmanager
    def forbidden(self):
        self.allowed = False
        try:
            yield
        finally:
            self.allowed = True

    def in_one(self, function, *args, **kwargs):
        """Return the result, and whether one operator computed it."""
        before = self.count
        with torch.no_grad():
            result = function(*args, **kwargs)
        assert self.count - before <= 1
        return result, self.count > before

    def one_by_one(self, function, *args, **kwargs):
        with torch.no_grad(), self.forbidden():
            return function(*args, **kwargs)


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def states(result):
    """Return the state in the result of a layer, or of a cell, whose result is the state."""
    return result if isinstance(result, torch.Tensor) else result[1]


def assert_same(got, expected, dtype, error=0):
    eps = torch.finfo(dtype).eps
    largest = max(float(each.abs().max()) for each in tensors(expected))
    for one, other in zip(tensors(got), tensors(expected), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=16 * eps, atol=(16 * max(1, largest) + 4 * error) * eps)


def error_in_eps(calls, module, *args):
    """Return the error of a float32 copy whose modules are called one by one, in units of eps."""
    results = []
    for dtype in (torch.float32, torch.float64):
        of_dtype = [arg.to(dtype) if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args]
        of_dtype = [[each.to(dtype) for each in arg] if isinstance(arg, list) else arg for arg in of_dtype]
        results.append(tensors(calls.one_by_one(copy.deepcopy(module).to(dtype), *of_dtype)))
    errors = [(one - other).abs().max() for one, other in zip(*results, strict=True)]
    return float(max(errors)) / torch.finfo(torch.float32).eps


def random_layer(pick, input_dims, dtype):
    options = {"candidate": pick(["positive", "linear", "tanh"]), "bias": pick([True, False]), "dtype": dtype}
    bounded = functools.partial(mingru.MinGRU, min_decay=0.25)
    kind = pick([mingru.MinGRU, mingru.MinLSTM, functools.partial(mingru.MinLSTM, normalize=False), bounded])
    return kind(
        input_dims,
        pick([1, 5, 16, 33]),
        pick([1, 1, 2, 3]),
        bidirectional=pick([True, False]),
        residual=pick([True, False]),
        norm=pick([None, "rms", "layer"]),
        learn_initial_state=pick([True, False]),
        dropout=0.0,
        **options,
    )


def random_module(pick, dtype):
    kind = pick(["layer", "layer", "stack", "block", "blocks", "cell", "drop_in"])
    dims = pick([1, 4, 7, 32])
    options = {"norm": pick([None, "rms", "layer"]), "dtype": dtype}
    if kind == "cell":
        return pick([mingru.MinGRUCell, mingru.MinLSTMCell])(dims, pick([1, 5, 33]), **options)
    if kind == "drop_in":
        if pick([True, False]):
            return mingru.drop_in.GRUCell(dims, pick([1, 5, 33]), **options)
        options.update(bidirectional=pick([True, False]), batch_first=pick([True, False]), residual=pick([True, False]))
        return mingru.drop_in.GRU(dims, pick([1, 5, 33]), pick([1, 2]), **options)
    if kind == "layer":
        return random_layer(pick, dims, dtype)
    if kind == "stack":
        layers = [random_layer(pick, dims, dtype)]
        layers.append(random_layer(pick, layers[0].output_dims, dtype))
        return mingru.Stack(layers, residual=pick([True, False]))
    blocks = [
        mingru.models.Block(
            dims,
            cell=pick(["mingru", "minlstm"]),
            expansion=pick([1.0, 1.5, 2.0]),
            conv=pick([None, 2, 4]),
            mlp=pick([None, 2]),
            norm=pick(["rms", "layer"]),
            bias=pick([True, False]),
            bidirectional=pick([True, False]),
            dtype=dtype,
        )
        for _ in range(2)
    ]
    return blocks[0] if kind == "block" else mingru.Stack(blocks, residual=pick([True, False]))


def moved_parameters(module):
    """Change each parameter, so that none is 0 or 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


@pytest.mark.parametrize("count", [50, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_configurations(calls, count):
    generator = random.Random(count)
    pick = generator.choice
    for _ in range(count):
        dtype = pick([torch.float32, torch.float32, torch.float64])
        module = random_module(pick, dtype)
        moved_parameters(module)
        batch, steps = pick([1, 2, 5]), pick([1, 1, 2, 3, 17])
        leading = (batch,) if module.role == "step" else (batch, steps)
        x = torch.randn(*leading, module.input_dims, dtype=dtype)
        if len(leading) == 2 and pick([True, False]):
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        given = []
        if not isinstance(module, mingru.drop_in.GRU | mingru.drop_in.GRUCell):
            is_timed = all(getattr(each, "cell", "mingru") in TIMED for each in module.modules())
            dt = pick([None, 2 * torch.rand(leading, dtype=dtype)]) if is_timed else None
            reset = pick([None, torch.rand(leading) < 0.3])
            given = [reset, dt] if module.role == "step" else [reset, None, dt]
        h = None
        if pick([True, False]):
            h = states(calls.one_by_one(module, x))
            h = [torch.rand_like(each) for each in h] if isinstance(h, list) else torch.rand_like(h)
        copies = [each.clone() for each in [x, *([] if h is None else h)]]
        result, is_one = calls.in_one(module, x, h, *given)
        assert is_one
        error = error_in_eps(calls, module, x, h, *given)
        assert_same(result, calls.one_by_one(module, x, h, *given), dtype, error)
        for before, after in zip(copies, [x, *([] if h is None else h)], strict=True):
            assert torch.equal(before, after)


def test_a_removed_hook_opens_the_way_again(calls):
    module = made("MinGRU")
    x, linear = input_of(module), module.layers[0].linear
    handle = linear.register_forward_pre_hook(lambda *_: None)
    assert not calls.in_one(module, x)[1]
    handle.remove()
    assert calls.in_one(module, x)[1]


def test_dropout(calls):
    module, x = mingru.MinGRU(8, 8, 2, dropout=0.5), torch.randn(2, 3, 8)
    assert not calls.in_one(module, x)[1]
    module.eval()
    assert calls.in_one(module, x)[1]
    module.train()
    assert not calls.in_one(module, x)[1]


def test_a_highway_is_called_one_by_one(calls):
    highway, x = mingru.MinGRU(8, 8, residual="highway"), torch.randn(2, 3, 8)
    for module in (highway, mingru.Stack([highway])):
        result, is_one = calls.in_one(module, x)
        assert not is_one
        assert not inference.plan_of(module).is_open()
        assert_same(result, calls.one_by_one(module, x), torch.float32)


def test_double(calls):
    module = made("Block")
    x = input_of(module)
    calls.in_one(module, x)
    module.double()
    result, is_one = calls.in_one(module, x.double())
    assert is_one
    assert_same(result, calls.one_by_one(module, x.double()), torch.float64)


def test_subclasses_run_their_own_code(calls):
    module, x = Wrong(8, 8), torch.randn(2, 3, 8)
    result, is_one = calls.in_one(module, x)
    assert not is_one
    assert result[0].min() > 1
    assert not calls.in_one(mingru.Stack([module]), x)[1]


@pytest.mark.parametrize("name", ["MinGRU", "Block"])
def test_contexts_in_which_modules_are_called_one_by_one(calls, name):
    module = made(name)
    x = input_of(module)

    def inside(context, **arguments):
        with context:
            return calls.in_one(module, x, **arguments)[1]

    assert inside(torch.no_grad())
    assert inside(torch.inference_mode())
    before = calls.count
    module(x)
    assert calls.count == before  # with gradients
    assert not inside(torch.autocast("cpu", torch.bfloat16))
    assert not inside(mingru.use_backend("torch"))
    assert not inside(FlopCounterMode(display=False))
    assert not inside(BaseTorchFunctionMode())
    # A device context changes no operation, except together with another mode.
    for device in ("cpu", "meta"):
        with torch.device(device):
            assert inside(torch.no_grad(), reset=torch.ones(2, 3, dtype=torch.bool, device="cpu"))
            assert not inside(BaseTorchFunctionMode())
    torch.set_default_device("meta")
    try:
        assert inside(torch.no_grad())
    finally:
        torch.set_default_device(None)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not inside(torch.no_grad())
    handle.remove()
    assert inside(torch.no_grad())
    assert not inside(torch.no_grad(), lengths=torch.tensor([3, 2]))
    assert not calls.in_one(torch.func.vmap(lambda x: module(x.unsqueeze(0))[0]), x)[1]
    assert not calls.in_one(module.to(torch.bfloat16), x.bfloat16())[1]


def test_results_do_not_depend_on_the_number_of_threads(calls):
    module, x = mingru.models.Block(64, conv=4, mlp=2, bidirectional=True), torch.randn(9, 200, 64)
    one, _ = calls.in_one(module, x)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 2)
    try:
        other, _ = calls.in_one(module, x)
    finally:
        torch.set_num_threads(threads)
    assert_same(one, other, torch.float32)


def test_nan_and_infinity_pass_through(calls):
    module, x = made("Block"), torch.randn(1, 9, DIMS)
    x[0, 4, 0], x[0, 5, 1] = float("nan"), float("inf")
    result, is_one = calls.in_one(module, x)
    assert is_one
    expected = calls.one_by_one(module, x)
    torch.testing.assert_close(tensors(result), tensors(expected), equal_nan=True)
    assert result[0][0, 4:].isnan().all()
