"""Whatever is called, and however a module was changed: with one operator and with its modules called one by one, an
inference pass gives the same values, shapes and errors."""

import copy
import gc
import weakref
from contextlib import nullcontext, suppress
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_inference import flat
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import mingru
from mingru.models.causal_conv import CausalConv
from mingru.ops import inference

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
    for one, other in zip(flat(found), flat(expected), strict=True):
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


def calls(module):
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


class Wrong(mingru.MinGRU):
    def _run(self, *args):
        out, last = super()._run(*args)
        return out + 1, last


@pytest.mark.parametrize("edit", EDITS)
def test_edits(edit):
    name, change = EDITS[edit]
    module = made(name)
    x = calls(module)
    change(module)
    assert_same_as_one_by_one(module, x)


@pytest.mark.parametrize("edit", EDITS)
def test_edits_before_the_first_call(edit):
    name, change = EDITS[edit]
    module = made(name)
    change(module)
    assert_same_as_one_by_one(module, input_of(module))


@pytest.mark.parametrize("target", [nn.Linear, nn.RMSNorm, nn.GELU, mingru.models.Block, type(made("plain").layers[0])])
def test_forward_patched_on_a_class(target):
    module = made("Block")
    x = calls(module)
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
    x = calls(module)
    other = {name: 2 * parameter.detach() for name, parameter in module.named_parameters()}
    assert_same_as_one_by_one(lambda x: torch.func.functional_call(module, other, (x,)), x)
    assert_same_as_one_by_one(module, x)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_freed_although_a_child_refers_to_it(name):
    module = made(name)
    for child in module.modules():
        vars(child)["owner"] = (module,)
    calls(module)
    found = weakref.ref(module)
    del module, child
    gc.collect()
    assert found() is None


def test_a_plan_is_no_part_of_copies():
    module = made("MinGRU")
    calls(module)
    for other in (copy.deepcopy(module), copy.copy(module)):
        assert not hasattr(other, "_plan")
    assert "_plan" not in str(module.__reduce_ex__(2))


@pytest.mark.parametrize("name", MODULES)
def test_the_class_of_a_module_can_be_changed(name):
    module = made(name)
    x = calls(module)
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


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_right_and_wrong_arguments(data):
    module = made(data.draw(st.sampled_from(list(MODULES))))
    x = calls(module)
    context = data.draw(st.sampled_from([torch.no_grad, torch.inference_mode]))
    h = given_states(module, x, data.draw(st.lists(st.sampled_from(list(STATES)), min_size=3, max_size=3)))
    wrong_kind = data.draw(st.sampled_from([None, None, None, None, {1, 2}, "text", (), [], 3]))
    h = h if wrong_kind is None else wrong_kind
    kwargs = {
        "reset": MASKS[data.draw(st.sampled_from(list(MASKS)))](x),
        "dt": TIMES[data.draw(st.sampled_from(list(TIMES)))](x),
    }
    given_x = INPUTS[data.draw(st.sampled_from(["right"] * 6 + list(INPUTS)))](x)
    assert_same_as_one_by_one(module, given_x, h, context=context, **kwargs)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", MODULES)
def test_states(name, state):
    module = made(name)
    x = calls(module)
    assert_same_as_one_by_one(module, x, given_states(module, x, [state] * 4))


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
    x = calls(module)
    for _ in range(data.draw(st.integers(1, 3))):
        # Torch refuses some edits.
        with suppress(TypeError, AttributeError, KeyError, ValueError):
            mutate(data, module)
        assert_same_as_one_by_one(module, x)


def test_a_converted_checkpoint_with_a_bias_in_its_residual():
    checkpoint = {
        "linear_gate_hidden.0.weight": torch.randn(12, 4),
        "linear_gate_hidden.0.bias": torch.randn(12),
        "input_residual_align.weight": torch.randn(6, 4),
        "input_residual_align.bias": torch.randn(6),
    }
    layer = mingru.convert.from_cheind(checkpoint)
    assert layer.layers[0].align.bias is not None
    assert_same_as_one_by_one(layer, torch.randn(2, 3, 4))
    assert is_planned(layer, torch.randn(2, 3, 4))


def test_contexts_do_not_matter():
    module = made("Block")
    x = calls(module)
    with torch.no_grad():
        expected = module(x)
    for context in (nullcontext, torch.inference_mode):
        with context():
            for one, other in zip(flat(module(x)), flat(expected), strict=True):
                torch.testing.assert_close(one, other)
