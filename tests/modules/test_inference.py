"""Inference passes that run as one operator, and the same modules called one by one.

Whatever is called, and however a module was changed, both give the same values, shapes and errors.
"""

import copy
import gc
import itertools
import weakref
from contextlib import suppress
from unittest import mock

import pytest
import torch
from cases import DOUBLE, ROWS, case, needs_kernels, outcome, parametrized, some, tensors, with_threads
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import BaseTorchFunctionMode
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import mingru
from mingru.models.causal_conv import CausalConv
from mingru.modules import plan

pytestmark = [
    needs_kernels,
    # An edit may name a cell that the kernels lack.
    pytest.mark.filterwarnings("ignore:mingru. using the slower backend:RuntimeWarning"),
]
DIMS = 4


def trained(function, x, *args):
    """Return the outcome of a call, and the gradients of x and of the parameters."""
    leaves = [x.clone().requires_grad_(), *(function.parameters() if isinstance(function, nn.Module) else [])]
    found = outcome(function, leaves[0], *args)
    results = [each for each in tensors(found) if each.requires_grad]
    if results:
        # Squares, because the gradient of a sum after a norm is nearly 0.
        loss = sum(each.square().sum() for each in results)
        found = [*tensors(found), *torch.autograd.grad(loss, leaves, allow_unused=True)]
    return found


def assert_same_as_one_by_one(module, *args, tolerance=(1e-4, 1e-5), **kwargs):
    """Compare with the modules called one by one, and in training with tensor operations, which include no module."""
    with torch.no_grad():
        found = outcome(module, *args, **kwargs)
        with mock.patch.object(plan, "run", return_value=None):
            expected = outcome(module, *args, **kwargs)
    pairs = [(found, expected, tolerance)]
    parts = module.modules() if isinstance(module, nn.Module) else []
    # PyTorch warns when it compiles after a mock.
    if tensors(expected) and not kwargs and not any(each._compiled_call_impl for each in parts):
        with mingru.use_backend("torch"):
            expected = trained(module, *args)
        # Gradients of a norm of few features differ by more.
        pairs.append((trained(module, *args), expected, (1e-3, 1e-3)))
    for found, expected, (rtol, atol) in pairs:
        if not tensors(found) or not tensors(expected):
            assert found == expected
            return
        assert type(found) is type(expected)
        for one, other in zip(tensors(found), tensors(expected), strict=True):
            assert_close(one, other, rtol=rtol, atol=atol, equal_nan=True)


def is_in_one(function, *args, **kwargs):
    """Return whether one operator computes a call without gradients."""
    run, done = plan.run, []
    with torch.no_grad(), mock.patch.object(plan, "run", lambda *args: done.append(run(*args)) or done[-1]):
        function(*args, **kwargs)
    # A module that is called one by one calls those inside, which may be in one.
    return bool(done) and done[0] is not None


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
    "drop_in.GRULike": lambda: mingru.drop_in.GRULike(DIMS, DIMS, 2, norm="rms", batch_first=True, cell="mingru"),
    "drop_in.GRULikeCell": lambda: mingru.drop_in.GRULikeCell(DIMS, DIMS, cell="mingru"),
    "GRU": lambda: mingru.GRU(DIMS, DIMS, 2, block_size=2, norm="layer"),
    "signed": lambda: mingru.MinGRU(DIMS, DIMS, gate="signed", norm="rms"),
    "gated": lambda: mingru.MinGRU(DIMS, 8, 2, gate=["mixed", "sigmoid"], output_gate="silu", norm="rms"),
    "projected": lambda: mingru.drop_in.GRULike(DIMS, DIMS, 2, batch_first=True, proj_size=2, cell="mingru"),
}
each_module = pytest.mark.parametrize("name", MODULES)


def made(name):
    torch.manual_seed(0)
    module = MODULES[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module


def input_of(module):
    torch.manual_seed(1)
    return torch.randn(2, DIMS) if module.role == "step" else torch.randn(2, 3, DIMS)


def planned(module):
    """Call a module once, so that it has a plan, and return its input."""
    x = input_of(module)
    assert is_in_one(module, x)
    return x


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class Negative(nn.Parameter):
    """A weight whose class changes what is computed."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        found = super().__torch_function__(function, types, args, kwargs)
        return -found if function is nn.functional.linear else found


class Wrong(mingru.MinGRU):
    def _run(self, *args):
        out, last = super()._run(*args)
        return out + 1, last


def mlp(*parts):
    return nn.Sequential(*parts, nn.Linear(DIMS, 8), nn.GELU(), nn.Linear(8, DIMS))


def order_without_conv(block):
    block.conv, block.num_states, block.batch_first = None, 1, False


def negated(module, args, outputs):
    return -outputs[0], outputs[1]


def replace_hooks(linear):
    linear._forward_hooks = type(linear._forward_hooks)({0: lambda module, args, out: out + 1})


def as_tensor(owner, name, value):
    delattr(owner, name)
    setattr(owner, name, value)


def as_buffer(owner, name, value):
    delattr(owner, name)
    owner.register_buffer(name, value)


# Ways to put something in the place of a parameter; the last hides it.
WAYS = [setattr, as_tensor, as_buffer, lambda owner, name, value: vars(owner).update({name: value})]


LINEAR, NORM = "layers.0.linear", "layers.0.norm"
# Edits of the module or of its first linear map, after which the modules are called one by one.
ONE_BY_ONE = {
    "more layers": ("MinGRU", lambda module, linear: module.layers.append(copy.deepcopy(module.layers[0]))),
    "fewer layers": ("MinGRU", lambda module, linear: module.layers.pop(1)),
    "compiled layer": ("Stack", lambda module, linear: module.layers[0].compile(backend="eager")),
    "compiled": ("Block", lambda module, linear: module.rnn.compile(backend="eager")),
    "hook of a layer": ("Stack of blocks", lambda module, _: module.layers[1].register_forward_hook(negated)),
    "hook": ("Block", lambda module, linear: module.mlp.register_forward_hook(lambda module, args, out: out + 1)),
    "replaced hooks": ("MinGRU", lambda module, linear: replace_hooks(linear)),
    "weight norm": ("plain", lambda module, linear: parametrizations.weight_norm(linear)),
    "norm": ("MinGRU", lambda m, _: parametrize.register_parametrization(m.layers[0].norm, "weight", Doubled())),
    "bias of an align": ("Stack", lambda module, _: as_buffer(module.aligns[0], "bias", torch.randn(6))),
    "class of a weight": ("plain", lambda module, linear: setattr(linear.weight, "__class__", Negative)),
    "swapped": ("MinGRU", lambda module, linear: torch.utils.swap_tensors(linear.weight, Negative(linear.weight.data))),
    "more features": ("plain", lambda module, linear: setattr(linear.weight, "data", torch.randn(2 * DIMS, 5))),
    "another class": ("plain", lambda module, linear: setattr(linear, "__class__", Shifted)),
    "another class of the layer": ("plain", lambda module, linear: setattr(module, "__class__", Wrong)),
    "patched": ("plain", lambda module, linear: setattr(linear, "forward", lambda x: x.new_ones(2, 3, 2 * DIMS))),
    "other features": ("plain", lambda module, linear: setattr(module, "input_dims", 9)),
    "order in a block": ("Block", lambda module, linear: setattr(module.rnn, "batch_first", False)),
    "order of a block": ("Block", lambda module, linear: order_without_conv(module)),
    "order in a stack": ("Stack", lambda module, linear: setattr(module.layers[0], "batch_first", False)),
    "a method of the block": ("Block", lambda module, linear: setattr(module, "_run", lambda x, *args: (x + 1, []))),
}
# After these, one operator computes the pass all the same: by hand, or by setting an attribute.
STILL_IN_ONE = [
    ("Block", "in place", lambda module, linear: linear.weight.data.mul_(2)),
    ("Block", "data", lambda module, linear: setattr(linear.weight, "data", torch.randn(2 * DIMS, DIMS))),
    ("Block", "load", lambda module, linear: module.load_state_dict(MODULES["Block"]().state_dict())),
    ("Block", "assign", lambda module, linear: module.load_state_dict(MODULES["Block"]().state_dict(), assign=True)),
    ("Block", "longer MLP", lambda module, linear: module.mlp.append(nn.Linear(DIMS, DIMS))),
    ("Block", "mlp", mlp(nn.LayerNorm(DIMS))),
    ("MinGRU", NORM, None),
    ("MinGRU", f"{NORM}.eps", 0.5),
    ("MinGRU", "layers.0.align", nn.Linear(DIMS, DIMS)),
    ("MinGRUCell", "batch_first", False),
    ("Block", f"rnn.{LINEAR}", nn.Linear(DIMS, 2 * DIMS)),
    ("Block", f"rnn.{LINEAR}.weight", nn.Parameter(torch.randn(2 * DIMS, DIMS))),
    ("plain", f"{LINEAR}.bias", None),
    ("MinLSTM", "layers.0.candidate", "tanh"),
    ("plain", "layers.0.cell", "mingru_signed"),
    ("plain", "layers.0.min_decay", 0.5),
    ("MinGRU", "layers.0.residual", False),
    ("plain", f"{LINEAR}._parameters", dict(nn.Linear(DIMS, 2 * DIMS)._parameters)),
    ("Block", "_modules", MODULES["Block"]()._modules),
    ("Block", "attributes", lambda module, linear: setattr(module, "__dict__", vars(MODULES["Block"]()))),
    ("plain", "attributes of a map", lambda _, linear: setattr(linear, "__dict__", vars(nn.Linear(DIMS, 2 * DIMS)))),
]


def edit(module, what, value):
    if type(value) is type(edit):
        value(module, next(each for each in module.modules() if isinstance(each, nn.Linear)))
    else:
        owner, _, name = what.rpartition(".")
        setattr(module.get_submodule(owner), name, copy.deepcopy(value))


EDITS = [
    *((name, what, value, False) for what, (name, value) in ONE_BY_ONE.items()),
    *((*row, True) for row in STILL_IN_ONE),
    *((name, "dropout", 0.5, False) for name in ("MinGRU", "Stack", "Block", "drop_in.GRULike")),
    ("Block", "checkpoint", True, True),
    ("Block", "dropout", -1.0, False),
    *((name, f"{LINEAR}.weight", nn.Parameter(torch.randn(2 * DIMS, 1)), False) for name in ("plain", "MinGRU")),
]


@pytest.mark.parametrize("is_first_call", [True, False])
@pytest.mark.parametrize(("name", "what", "value", "in_one"), EDITS)
def test_edits(name, what, value, in_one, is_first_call):
    module = made(name)
    x = input_of(module) if is_first_call else planned(module)
    edit(module, what, value)
    assert_same_as_one_by_one(module, x)
    assert (outcome(is_in_one, module, x) is True) == in_one


TENSORS = nn.LayerNorm(DIMS, elementwise_affine=False)
for each in ("weight", "bias"):
    as_tensor(TENSORS, each, torch.randn(DIMS))
SETTABLE = [
    *(None, TENSORS, nn.Identity(), Doubled(), nn.ReLU(), nn.GELU("tanh"), mlp(), CausalConv(DIMS, 2, True)),
    *(nn.Linear(DIMS, DIMS), nn.Linear(2 * DIMS, DIMS), nn.Linear(DIMS, 2 * DIMS), Shifted(DIMS, 2 * DIMS)),
    *(nn.RMSNorm(DIMS), nn.RMSNorm(3), nn.RMSNorm(DIMS, elementwise_affine=False), nn.LayerNorm((3, DIMS))),
    *(Wrong(DIMS, 6), mingru.MinGRU(5, DIMS), mingru.MinGRUCell(DIMS, 6)),
    mingru.drop_in.GRULike(DIMS, DIMS, cell="mingru"),
]


def replacements(old):
    """Return ways to replace an attribute, and values."""
    if isinstance(old, nn.Parameter):
        drawn, turned = torch.randn_like(old), torch.randn(old.transpose(0, -1).shape).transpose(0, -1)
        others = [drawn, turned, drawn.double(), torch.ones(1), torch.cat([drawn, drawn], -1)]
        return [*((setattr, nn.Parameter(each)) for each in others), *itertools.product(WAYS, [None, drawn])]
    # Other cells have no recurrent weights.
    texts = ["tanh", "linear", "minlstm", "sine"] if old != "gru" else []
    by_type = {bool: [not old], int: [2, 9], float: [1.0, None], str: texts, list: [[0, 1, 1]]}
    is_module = old is None or isinstance(old, nn.Module)
    return [(setattr, value) for value in (SETTABLE if is_module else by_type.get(type(old), []))]


# Sizes, and the order of a block, which follow from those of the modules inside.
NEVER_SET = {"input_dims", "input_size", "hidden_size", "num_space_dims", "num_directions", "batch_first"}


@each_module
@pytest.mark.parametrize("share", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_every_attribute(name, share):
    """Each attribute, parameter and submodule of each submodule, in turn; quickly another sixth of each module."""
    turns = itertools.count([*MODULES].index(name))
    for part, each in made(name).named_modules():
        for attribute, old in {**vars(each), **each._parameters, **each._modules}.items():
            if attribute in NEVER_SET or (attribute[0] == "_" and hasattr(nn.Module(), attribute)):
                continue
            for way, value in (each for each in replacements(old) if next(turns) % share == 0):
                module = made(name)
                x = planned(module)
                # Torch refuses some.
                with suppress(TypeError, AttributeError, KeyError, ValueError):
                    way(module.get_submodule(part), attribute, copy.deepcopy(value))
                assert_same_as_one_by_one(module, x)


PATCHED = [nn.Linear, nn.RMSNorm, nn.GELU, CausalConv, mingru.models.Block, type(made("plain").layers[0])]


@pytest.mark.parametrize("target", PATCHED)
def test_forward_patched_on_a_class(target):
    module, forward = made("Block"), target.forward
    x = planned(module)

    def patched(self, *args, **kwargs):
        result = forward(self, *args, **kwargs)
        return (result[0] + 1, result[1]) if isinstance(result, tuple) else result + 1

    with mock.patch.object(target, "forward", patched):
        assert_same_as_one_by_one(module, x)
        with torch.no_grad():
            assert plan.run(module, x, None, None, False) is None
    assert is_in_one(module, x)


def test_functional_call():
    module = made("Block")
    x = planned(module)
    other = {name: 2 * parameter.detach() for name, parameter in module.named_parameters()}
    assert_same_as_one_by_one(lambda x: torch.func.functional_call(module, other, (x,)), x)
    assert_same_as_one_by_one(module, x)
    assert is_in_one(module, x)


@each_module
def test_a_module_can_have_another_class_and_is_freed_although_a_child_refers_to_it(name):
    module = made(name)
    x = planned(module)
    module.__class__ = type("Sharded", (type("Mixin", (), {}), type(module)), {})
    assert_same_as_one_by_one(module, x)
    module = made(name)
    for child in module.modules():
        vars(child)["owner"] = (module,)
    planned(module)
    # The plan is no part of copies.
    assert not hasattr(copy.deepcopy(module), "_plans") and not hasattr(copy.copy(module), "_plans")
    assert "_plans" not in str(module.__reduce_ex__(2))
    found = weakref.ref(module)
    del module, child
    gc.collect()
    assert found() is None


@each_module
def test_both_modes_have_a_plan_which_keeps_nothing_alive(name):
    module = made(name)
    x = planned(module)
    for part in module.modules():
        vars(part).update({"dropout": 0.5} if "dropout" in vars(part) else {})
    plans = []
    for trains in (False, True) * 2:
        assert_same_as_one_by_one(module.train(trains), x)
        assert trains or is_in_one(module, x)
        plans.append({*module._plans})
    assert plans[1] == plans[2] == plans[3]
    found = [weakref.ref(each) for each in (*module.parameters(), *module.modules()) if each is not module]
    for each in list(module.modules()):
        each._parameters.update(dict.fromkeys(each._parameters))
        each._modules.clear()
    del part, each
    gc.collect()
    assert not any(each() for each in found)


@each_module
def test_what_a_program_notes_changes_no_plan_and_is_not_kept(name):
    module = made(name)
    x = planned(module)
    plans, found = module._plans, []
    for value in (torch.randn(DIMS), torch.randn(DIMS), 1, 2, None, [torch.ones(DIMS)]):
        # Also a name that code of this package has for something else.
        module.h = value
        for part in module.modules():
            vars(part)["hidden"] = value
        assert is_in_one(module, x) and module._plans == plans
        found += [weakref.ref(value)] if isinstance(value, torch.Tensor) else []
    module.h = module.hidden = torch.randn(DIMS)
    assert_same_as_one_by_one(module.train(), x)
    found.append(weakref.ref(module.h))
    del module.h, module.hidden, value
    assert not any(each() for each in found)


WIDE = {"norm": "rms", "residual": True, "bidirectional": True}
SIZES = [
    *(case(f"MinGRU {dims}, {hidden}", mingru.MinGRU, dims, hidden, 3, **WIDE) for dims, hidden in ((2, 1), (7, 33))),
    case("MinLSTM 32, 16", mingru.MinLSTM, 32, 16, 2, norm="layer"),
    case("Block 32", mingru.models.Block, 32, expansion=1.5, conv=4, mlp=2),
    case("MinGRUCell 32, 33", mingru.MinGRUCell, 32, 33),
]


NOT_IN_ONE = ("highway", "images", "both directions", "projection", "modules of torch")
PLANNED = [row for row in ROWS if row.module._planned and not any(part in row.name for part in NOT_IN_ONE)]


@parametrized([*SIZES, *some(PLANNED, 2)])
def test_every_option_in_one(case):
    module = case.varied()
    for factory, tolerance in (({}, (1e-4, 1e-4)), (DOUBLE, (1e-9, 1e-9))):
        module = module.to(**factory)
        for batch, steps in ((3, 17), (1, 1), (2, 2)):
            given = case.given(batch, steps, **factory)
            copies = [each.clone() for each in tensors(given)]
            for names in ((), ("h",), ("reset", "dt")):
                some_given = {name: each for name, each in given.items() if name not in names}
                assert is_in_one(case.call, module, **some_given)
                assert_same_as_one_by_one(case.call, module, tolerance=tolerance, **some_given)
            assert all(map(torch.equal, copies, tensors(given)))


def with_gradients(call, module, leaf, **given):
    """Return the tensors of a call that need no gradient, those that do, and the gradient of a leaf, if it has one."""
    found = tensors(call(module, **given))
    trained = [each for each in found if each.requires_grad]
    loss = sum(each.square().sum() for each in trained)
    grads = torch.autograd.grad(loss, leaf, allow_unused=True) if trained else []
    return [each for each in found if not each.requires_grad], trained, grads


@parametrized(some(PLANNED, 2))
def test_frozen_layers_are_in_one_until_anything_needs_a_gradient(case):
    module, given = case.varied().requires_grad_(False), case.given(2, 2)
    assert module._weight_of_x() is None or is_in_one(torch.enable_grad()(case.call), module, **given)
    leaves = [each for each in (torch.zeros(()), *module.parameters(), *tensors(given)) if each.is_floating_point()]
    for names, leaf in itertools.product(((), ("h",)), leaves):
        some_given = {name: each for name, each in given.items() if name not in names}
        leaf.requires_grad_()
        found = with_gradients(case.call, module, leaf, **some_given)
        with mock.patch.object(plan, "run", return_value=None):
            assert_close(found, with_gradients(case.call, module, leaf, **some_given), rtol=1e-3, atol=1e-3)
        leaf.requires_grad_(False)


@pytest.mark.parametrize("name", ["MinGRU", "Block"])
def test_contexts_in_which_modules_are_called_one_by_one(name):
    module = made(name)
    x = planned(module)

    def inside(context, **arguments):
        with context:
            return is_in_one(module, x, **arguments)

    assert torch.inference_mode()(is_in_one)(module, x)
    others = torch.autocast("cpu", torch.bfloat16), mingru.use_backend("torch"), FlopCounterMode(display=False)
    assert not any(map(inside, (*others, BaseTorchFunctionMode())))
    # A device context changes no operation, except together with another mode.
    for device in ("cpu", "meta"):
        module._plans = ()  # the plan is made inside
        with torch.device(device):
            assert inside(torch.no_grad(), reset=torch.ones(2, 3, dtype=torch.bool, device="cpu"))
            assert not inside(BaseTorchFunctionMode())
            # With gradients, it is left for the modules, unless a hook may rely on it.
            assert_same_as_one_by_one(module, x)
            assert plan.run(module, x, None, None, False) is not None
            handle = [*module.modules()][-1].register_forward_hook(lambda *_: None)
            assert plan.run(module, x, None, None, False) is None
            handle.remove()
    assert plan.run(module, x, None, None, False) is None
    for register in (nn.modules.module.register_module_forward_hook, module.register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert not inside(torch.no_grad())
        handle.remove()
        assert inside(torch.no_grad())
    assert not inside(torch.no_grad(), lengths=torch.tensor([3, 2]))
    assert not is_in_one(torch.func.vmap(lambda x: module(x.unsqueeze(0))[0]), x)
    assert not is_in_one(module.to(torch.bfloat16), x.bfloat16())


def test_results_do_not_depend_on_the_number_of_threads():
    module, x = mingru.models.Block(64, conv=4, mlp=2, bidirectional=True), torch.randn(9, 200, 64)
    assert_close(*with_threads((1, 3), torch.no_grad()(lambda: module(x))), rtol=2e-6, atol=2e-5)
