"""Layers and stacks: dropout, memory of outputs and states, modules inside, own layers. Values: tests/properties."""

import copy
import functools
import itertools
import pickle
import re
from pathlib import Path

import pytest
import torch
from cases import BACKENDS, BLOCKS, ROWS, Doubled, case, conv, parametrized, refuses, some, stack, tensors
from options import DOUBLE, TIGHT
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import mingru
from mingru.modules import Layer

# Dropout

OPTIONS = {"num_layers": 3, "bidirectional": True}
SEVERAL = [
    case("MinGRU", mingru.MinGRU, 3, 5, **OPTIONS),
    case("MinLSTM, time first", mingru.MinLSTM, 3, 5, batch_first=False, residual=True, **OPTIONS),
    conv("MinConv1dGRU", 1, 5, **OPTIONS),
    conv("MinConv2dGRU", 2, 4, num_layers=2, batch_first=False),
    case("drop_in.LSTMLike", mingru.drop_in.LSTMLike, 3, 5, **OPTIONS, cell="minlstm"),
    stack("Stack", *(lambda **factory: mingru.MinGRU(3, 3, bidirectional=False, **factory),) * 3),
]


def each_layer(module):
    """Each of its layers in a module of its own."""
    for index, layer in enumerate(module.layers):
        if isinstance(module, mingru.Stack):
            yield mingru.Stack([layer], residual=module.residual)
            continue
        single = copy.copy(module)
        single._modules = dict(module._modules)
        single.layers, single.num_layers = torch.nn.ModuleList([layer]), 1
        if index > 0:
            single.input_dims = single.input_size = module.output_dims
        yield single


@parametrized(SEVERAL)
def test_dropout_is_on_every_layers_output_but_the_last(case):
    module, given = case.varied(**DOUBLE), case.given(**DOUBLE)
    x, reset = given["x"], given["reset"]
    plain, _ = case.call(module, x)
    module.dropout = 0.4
    *singles, last = each_layer(module)

    def by_hand():
        y = x
        for single in singles:
            y, _ = case.call(single, y, reset=reset)
            order = (lambda each: each) if case.batch_dim == 0 else (lambda each: each.transpose(0, 1))
            # As nn.GRU drops: each element kept with probability 0.6, and divided by it.
            y = y * order(torch.empty_like(order(y), memory_format=torch.contiguous_format).bernoulli_(0.6)) / 0.6
        return case.call(last, y, reset=reset)

    outs = []
    for function in (by_hand, *[lambda: case.call(module, x, reset=reset)] * 2):
        torch.manual_seed(3)
        out, states = function()
        # Nothing is dropped from the states, of which the last is that of the last layer.
        outs.append((out, states[-1][-1:]))
    assert_close(outs[1:], [outs[0]] * 2, **TIGHT)
    assert not torch.equal(case.call(module, x, reset=reset)[0], outs[1][0]), "another seed gave the same mask"
    module.eval()
    assert_close(case.call(module, x)[0], plain, **TIGHT)


# Outputs and states are contiguous tensors of their own, in every class and by every backend.


def calls(case):
    """What to call the module with: no state, a state and resets, lengths, packed sequences, and no steps."""
    x, h, reset, *_ = case.args(2, 5).values()
    yield x, None
    yield x, h, reset
    if "lengths" in case.takes:
        yield x, None, None, torch.tensor([3, 5])
        if "lock" not in case.name:
            yield pack_padded_sequence(x, torch.tensor([3, 5]), case.batch_dim == 0, enforce_sorted=False), None
    if not case.is_cell and not case.of_torch:
        yield x.narrow(case.time_dim, 0, 0), None
    # Laid out with the other dimension first, and expanded.
    yield x.transpose(0, 1).contiguous().transpose(0, 1), None
    yield x.narrow(case.batch_dim, 0, 1).expand_as(x), None


@pytest.mark.parametrize("backend", BACKENDS)
@parametrized([case("MinGRU, wide", mingru.MinGRU, 64, 4), BLOCKS[0], *some(ROWS, 3)])
def test_no_output_is_a_view(case, backend):
    module = case.make()
    for args, grad in itertools.product(calls(case), (True, False)):
        with torch.set_grad_enabled(grad), mingru.use_backend(backend):
            outputs = tensors(module(*args))
        values = [each.detach().clone() for each in outputs]
        storages = [each.untyped_storage().data_ptr() for each in outputs if each.numel()]
        assert len(set(storages)) == len(storages), "two outputs share memory"
        # The state of a causal convolution consists of inputs.
        assert all(each.requires_grad == grad for each in outputs[:2] if each.is_floating_point())
        assert all(each._base is None and each.is_contiguous() for each in outputs), "a view"
        # A state detached in place cuts the gradient and nothing else.
        for each in outputs[1:]:
            each.detach_()
        if grad:
            module.zero_grad()
            # Activation checkpointing computes the forward pass again.
            with mingru.use_backend(backend):
                outputs[0].sum().backward()
            weights = [weight for name, weight in module.named_parameters() if "initial" not in name]
            assert all(weight.grad is not None for weight in weights)
        assert all(map(torch.equal, outputs, values))
        outputs[0].detach_()


@pytest.mark.parametrize("time_first", [False, True])
def test_the_state_of_a_step_does_not_come_from_its_output(time_first):
    """Otherwise a hook of the output would see the gradient of the state too."""
    out, h = mingru.GRU(3, 4, batch_first=not time_first)(torch.randn(1, 1, 3))
    assert torch.autograd.grad(h.sum(), out, allow_unused=True) == (None,)


# A stack: its states, residuals and hooks

X = torch.zeros(2, 5, 3)


class Wide(mingru.MinGRU):
    """A subclass that keeps `forward` is a layer."""

    def __init__(self, input_dims):
        super().__init__(input_dims, 4 * input_dims)


def test_a_module_among_modules():
    stack = mingru.Stack(layer for layer in (Wide(3), mingru.MinLSTM(12, 5)))
    assert stack(X)[0].shape == (2, 5, 5) and stack.extra_repr() == ""
    stack = mingru.Stack([mingru.MinGRU(3, 4), mingru.MinLSTM(4, 5)], dropout=0.25, residual=True)
    assert stack.extra_repr() == "dropout=0.25, residual=True" and "MinGRU(\n      3, 4\n" in repr(stack)
    # Weights can be shared: the same layer twice is one set of parameters.
    layer = mingru.MinGRU(3, 3)
    stack, x = mingru.Stack([layer, layer]), torch.randn(2, 5, 3)
    assert len(list(stack.parameters())) == 2
    below, first = layer(x)
    out, second = layer(below)
    assert_close(stack(x), (out, [first, second]), rtol=0, atol=0)
    # Modules of torch get no dropout.
    stack = mingru.Stack([torch.nn.Linear(3, 6), mingru.MinGRU(6, 6)], dropout=1.0)
    assert torch.equal(stack(x)[0], stack.eval()(x)[0])


def test_dropout_of_a_packed_sequence():
    stack = mingru.Stack([mingru.MinGRU(3, 6, 2), mingru.MinLSTM(6, 6)], dropout=0.5)
    packed = pack_padded_sequence(torch.randn(3, 9, 3), [9, 4, 1], batch_first=True)
    dropped = stack(packed)[0].data
    assert not torch.equal(stack(packed)[0].data, dropped)
    assert torch.equal(stack.eval()(packed)[0].data, stack(packed)[0].data)


# Layers of a user's own in a stack: the protocol of `mingru.modules.Layer`


STEPS = ("reset", "lengths", "dt")
BATCH, S, DIMS = 3, 7, 4
RESET = torch.zeros(BATCH, S, dtype=torch.bool)
RESET[0, 2] = RESET[1, 0] = RESET[2, 5] = True
LENGTHS = torch.tensor([S, 0, 4])


def sequence():
    return torch.randn(BATCH, S, DIMS, dtype=torch.double)


def stack_of(**options):
    layers = [mingru.MinGRU(DIMS, DIMS), Doubled(DIMS), mingru.Stack([mingru.MinLSTM(2 * DIMS, 5)])]
    return mingru.Stack(layers, **options).double()


def test_a_layer_of_ones_own_among_modules():
    stack, other, x = stack_of(residual=True), stack_of(residual=True), sequence()
    assert [type(align) for align in stack.aligns] == [nn.Identity, nn.Linear, nn.Linear]
    other.load_state_dict(stack.state_dict())
    for twin in (other, copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert_close(twin(x), stack(x), rtol=0, atol=0)
    stack.reset_parameters()
    assert not stack.layers[1].decay.any()
    assert not torch.equal(stack.layers[0].layers[0].linear.weight, other.layers[0].layers[0].linear.weight)


def documented(page: str, name: str) -> type:
    """Return a layer from the block of code of a page that defines it."""
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    names = {"mingru": mingru, "torch": torch, "Block": mingru.models.Block}
    exec(next(each for each in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if f"class {name}(" in each), names)
    return names[name]


def test_the_documented_layer_with_lengths():
    layer = documented("models.md", "Smooth")(DIMS)
    stack, x = mingru.Stack([layer, mingru.MinGRU(DIMS, DIMS)]).double(), sequence()
    options = {"reset": RESET, "dt": torch.rand(BATCH, S, dtype=torch.double)}
    h = [torch.randn(1, BATCH, DIMS, dtype=torch.double), torch.randn(1, BATCH, 1, DIMS, dtype=torch.double)]
    out, last = stack(x, h, lengths=LENGTHS, **options)
    for index, end in enumerate(LENGTHS.tolist()):
        each, states = slice(index, index + 1), [state[:, index : index + 1] for state in h]
        alone = torch.zeros(1, 0, DIMS, dtype=torch.double), states
        if end > 0:
            alone = stack(x[each, :end], states, **{key: value[each, :end] for key, value in options.items()})
        assert_close((out[each, :end], [state[:, each] for state in last]), alone)
        assert not out[index, end:].any()
    # The time of two steps is the time of one.
    twice = torch.full((BATCH, S), 2.0, dtype=torch.double)
    assert_close(layer(x, dt=twice)[1], layer(x.repeat_interleave(2, 1))[1])


class OnlyStates(Doubled, role="sequence"):
    def forward(self, x, h=None):
        return super().forward(x, h)


class Stateless(Layer, role="sequence"):
    num_states = 0
    input_dims = output_dims = DIMS

    def forward(self, x, h=None, dt=None, reset=None):
        return x * 2, []


class ByKeyword(Doubled, role="sequence"):
    def forward(self, x, h=None, *, dt=None, lengths=None, reset=None):
        return super().forward(x, h, reset, lengths, dt)


class Wrapped(Doubled, role="sequence"):
    @functools.wraps(Doubled.forward)
    def forward(self, *args, **options):
        return super().forward(*args, **options)


USED = {OnlyStates: (), Stateless: ("reset", "dt"), ByKeyword: STEPS, Wrapped: STEPS, Doubled: STEPS}


@pytest.mark.parametrize("cls", USED)
def test_what_a_layer_does_not_use_is_refused(cls):
    layers = [mingru.MinGRU(DIMS, DIMS), cls() if cls is Stateless else cls(DIMS)]
    stack, x = mingru.Stack([mingru.Stack(layers)]), torch.randn(BATCH, S, DIMS)
    assert cls._step_arguments == USED[cls]
    _, h = stack(x)
    assert len(h) == stack.num_states == 1 + layers[1].num_states
    steps = [{}, {"reset": RESET}][: 1 + ("reset" in USED[cls])]
    for grad, state, options in itertools.product((True, False), (None, h, tuple(h)), steps):
        with torch.set_grad_enabled(grad):
            below, first = layers[0](x, state and state[0], **options)
            out, rest = layers[1](below, state and state[1:], **options)
            assert_close(stack(x, state, **options), (out, [first, *rest]))
    for argument, value in (("reset", RESET), ("lengths", LENGTHS), ("dt", torch.ones(BATCH, S))):
        if argument not in USED[cls]:
            message = (
                f"^Stack: {argument} must be None because the forward of layers\\[1\\], {cls.__name__}, does not use "
                f"it, got Tensor; add {argument}=None to the arguments of that forward, and use it there$"
            )
            refuses(ValueError, message, stack, x, **{argument: value})


@pytest.mark.slow
def test_it_compiles():
    stack, x = stack_of(), sequence()
    expected = stack(x, None, RESET)
    torch.compiler.reset()
    compiled = torch.compile(stack, fullgraph=True, backend="eager")
    assert_close(compiled(x, None, RESET), expected)


class Plain(Layer, role="sequence"):
    """Not even parameters, and states as it is told."""

    input_dims = output_dims = DIMS

    def __init__(self, states=None):
        super().__init__()
        self.states = states

    def forward(self, x, h=None, reset=None, lengths=None, dt=None):
        return x, [x[:, -1:].transpose(0, 1)] if self.states is None else self.states


def made(name, role=None, **attributes):
    return type(name, (Layer,), {"forward": Plain.forward, **attributes}, role=role)


NO_SIZES = r"layers\[0\] must be a layer that sets input_dims and output_dims, got NoSizes wit"
BAD = {
    made("NoRole"): r'layers\[0\] must be a MinGRU, .*, got NoRole; if .*, pass role="sequence" to the class',
    made("NoSizes", role="sequence"): NO_SIZES,
    made("NoOutput", role="sequence", input_dims=4): r"layers\[0\] must be .*, got NoOutput without output_dims$",
}


@pytest.mark.parametrize("cls", BAD)
def test_what_is_missing_is_named(cls):
    refuses(TypeError, BAD[cls], mingru.Stack, [cls()])
    message = r"layers\[1\] must be a layer with input_dims=8, the output features of"
    refuses(ValueError, message, mingru.Stack, [Doubled(4), Plain()])
    refuses(ValueError, r"Wrong: role must be one of \('sequence', 'step', .*, got 'seq'", made, "Wrong", role="seq")


STATE = torch.zeros(1, BATCH, DIMS)
RETURNED = [
    (STATE, TypeError, r"^Stack: layers\[1\] must return its states in a list, .*\(out, \[state\]\)$"),
    ([], ValueError, r"^Stack: layers\[1\] must return num_states = 1 states, got 0; set num_states$"),
    ([STATE] * 2, ValueError, "num_states = 1 states, got 2"),
]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("states", "error", "message"), RETURNED)
def test_other_states_than_it_says(states, error, message, grad):
    stack = mingru.Stack([mingru.MinGRU(DIMS, DIMS), Plain(states)])
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        stack(torch.randn(BATCH, S, DIMS))
