"""A stack: the layers run by hand, whatever they are, and what it refuses."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from refusals import assert_refused
from test_recurrent import TIGHT
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

import mingru
from mingru import MinConv1dGRU, MinConv1dGRUCell, MinConv2dGRU, MinGRU, MinLSTM
from mingru.drop_in import GRU
from mingru.modules.cells import MinGRUCell
from mingru.modules.stack import Stack

B, S, IN = 3, 9, 4

DOUBLE = {"dtype": torch.double}


def one():
    return [MinGRU(IN, 5, **DOUBLE)]


def mixed():
    return [
        MinGRU(IN, 6, num_layers=2, bidirectional=True, norm="rms", **DOUBLE),
        MinLSTM(12, 5, learn_initial_state=True, **DOUBLE),
        MinLSTM(5, 5, residual=True, **DOUBLE),
        MinGRU(5, 3, candidate="tanh", bias=False, **DOUBLE),
    ]


def ahead():
    """What can be run in pieces."""
    return [MinGRU(IN, 6, 2, **DOUBLE), MinLSTM(6, 6, **DOUBLE), MinGRU(6, 2, learn_initial_state=True, **DOUBLE)]


def time_first():
    return [MinGRU(IN, 5, batch_first=False, **DOUBLE), MinLSTM(5, 4, bidirectional=True, batch_first=False, **DOUBLE)]


def nested():
    return [MinGRU(IN, 6, **DOUBLE), Stack([MinLSTM(6, 4, **DOUBLE), Stack([MinGRU(4, 7, **DOUBLE)])], residual=True)]


def convolutional():
    return [
        MinConv1dGRU(IN, [6, 4], 3, num_layers=2, padding=[1, 0], stride=[1, 2], bidirectional=True, **DOUBLE),
        MinConv1dGRU(8, 5, 1, **DOUBLE),
        Stack([MinConv1dGRU(5, 5, 3, padding=1, **DOUBLE)], residual=True),
    ]


STACKS = [one, mixed, ahead, time_first, nested, convolutional]
OF_FEATURES = [one, mixed, ahead, time_first, nested]

# TorchScript takes long to compile.
SCRIPTED = [mixed, time_first, convolutional]

each_stack = pytest.mark.parametrize("layers", STACKS)
scripted_slowly_or_not = pytest.mark.parametrize("scripted", [False, pytest.param(True, marks=pytest.mark.slow)])


def inputs(stack):
    """x, states and reset that fit it."""
    space = [7] * stack.num_space_dims
    x, reset = torch.randn(B, S, stack.input_dims, *space).double(), torch.rand(B, S) < 0.2
    if not stack.batch_first:
        x, reset = x.transpose(0, 1), reset.transpose(0, 1)
    return x, [torch.randn_like(state) for state in stack(x)[1]], reset


def num_tensors(layer):
    if isinstance(layer, Stack):
        return sum(map(num_tensors, layer.layers))
    return layer.num_layers * layer.num_directions if isinstance(layer, (MinConv1dGRU, MinConv2dGRU)) else 1


def by_hand(stack, x, h, reset):
    """The layers one after the other, each called as itself."""
    states, rest = [], None if h is None else list(h)
    for index, layer in enumerate(stack.layers):
        mine = None if rest is None else [rest.pop(0) for _ in range(num_tensors(layer))]
        if isinstance(layer, Stack):
            out, last = by_hand(layer, x, mine, reset)
        elif isinstance(layer, MinConv1dGRU):
            out, last = layer(x, mine, reset)
        else:
            out, last = layer(x, None if mine is None else mine[0], reset)
            last = [last]
        if stack.residual:
            align = stack.aligns[index]
            out = out + (x @ align.weight.T if isinstance(align, nn.Linear) else x)
        states += last
        x = out
    assert not rest
    return x, states


def graded(function, module, x, h, reset):
    """All outputs, and the gradients of x, all states and all weights through all outputs."""
    x = x.detach().clone().requires_grad_()
    h = None if h is None else [state.detach().clone().requires_grad_() for state in h]
    out, last = function(x, h, reset)
    assert isinstance(last, list)
    loss = 0
    for index, each in enumerate([out, *last]):
        # Not all alike, so that no two outputs can be swapped.
        loss = loss + (each.square() * torch.linspace(-1, 2 + index, each.numel()).double().view(each.shape)).sum()
    leaves = {"x": x, **{f"h{index}": state for index, state in enumerate(h or [])}, **dict(module.named_parameters())}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    got = {"out": out, **{f"last{index}": state for index, state in enumerate(last)}}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        got["grad of " + name] = torch.zeros_like(leaf) if grad is None else grad
    return got


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert_close(got[name], expected[name], msg=lambda m, name=name: f"{name}: {m}", **TIGHT)


# Against the layers themselves


@pytest.mark.parametrize(
    ("layers", "residual", "scripted"),
    [
        *((layers, False, False) for layers in STACKS),
        *((layers, True, False) for layers in OF_FEATURES),
        pytest.param(nested, True, True, marks=pytest.mark.slow),
        *(pytest.param(layers, layers is not convolutional, True, marks=pytest.mark.slow) for layers in SCRIPTED),
    ],
)
def test_equals_the_layers_by_hand(layers, residual, scripted):
    stack = Stack(layers(), residual=residual)
    run = torch.jit.script(stack) if scripted else stack
    x, h, reset = inputs(stack)
    for args in [(None, None), (h, reset)] if scripted else [(None, None), (h, reset), (h, None), (None, reset)]:
        expected = graded(lambda *args: by_hand(stack, *args), stack, x, *args)
        assert any(grad.any() for name, grad in expected.items() if name.startswith("grad of layers"))
        assert_same(graded(run, run, x, *args), expected)


def test_the_comparison_with_the_layers_can_fail():
    stack = Stack(mixed())
    x, h, reset = inputs(stack)
    expected = graded(lambda *args: by_hand(stack, *args), stack, x, h, reset)
    with torch.no_grad():
        stack.layers[2].layers[0].linear.bias[0] += 1e-6
    with pytest.raises(AssertionError, match="out"):
        assert_same(graded(stack, stack, x, h, reset), expected)


@each_stack
def test_the_states_are_those_of_the_layers_in_order(layers):
    stack = Stack(layers())
    x, _, _ = inputs(stack)
    _, h = stack(x)
    assert len(h) == stack.num_states == sum(map(num_tensors, stack.layers))
    if layers is mixed:
        assert [tuple(state.shape) for state in h] == [(4, B, 1, 6), (1, B, 1, 5), (1, B, 1, 5), (1, B, 1, 3)]
    if layers is convolutional:
        shapes = [*[(B, 1, 6, 7)] * 2, *[(B, 1, 4, 3)] * 2, *[(B, 1, 5, 3)] * 2]
        assert [tuple(state.shape) for state in h] == shapes


@pytest.mark.parametrize("residual", [False, True])
def test_pieces_and_steps_equal_the_whole(residual):
    stack = Stack(ahead(), residual=residual)
    x, h, reset = inputs(stack)

    def joined(sizes):
        def function(x, h, reset):
            outs = []
            for piece, cuts in zip(x.split(sizes, 1), reset.split(sizes, 1), strict=True):
                out, h = stack(piece, h, cuts)
                outs.append(out)
            return torch.cat(outs, 1), h

        return function

    expected = graded(stack, stack, x, h, reset)
    for sizes in ([1] * S, [4, 0, 5]):
        assert_same(graded(joined(sizes), stack, x, h, reset), expected)


@pytest.mark.parametrize("layers", [mixed, nested, time_first])
def test_nothing_crosses_a_reset(layers):
    stack = Stack(layers(), residual=True)
    x, h, _ = inputs(stack)
    cuts = [0, 3, 5, S]
    reset = torch.zeros(B, S, dtype=torch.bool)
    reset[1, cuts[1:-1]] = True

    def outputs(x):
        out, _ = stack(x, h, reset if stack.batch_first else reset.T)
        return out if stack.batch_first else out.transpose(0, 1)

    before = outputs(x)
    for start, end in itertools.pairwise(cuts):
        for at in (start, end - 1):
            other = x.clone()
            (other if stack.batch_first else other.transpose(0, 1))[1, at] += 1
            changed = (outputs(other) != before).any(-1)
            assert changed[1].any()
            changed[1, start:end] = False
            assert not changed.any()


# Residual


def test_residual_adds_aligned_inputs_to_outputs_and_not_to_states():
    stack = Stack(ahead(), residual=True)
    assert [type(align) for align in stack.aligns] == [nn.Linear, nn.Identity, nn.Linear]
    assert {name: tuple(weight.shape) for name, weight in stack.named_parameters() if "aligns" in name} == {
        "aligns.0.weight": (6, IN),
        "aligns.2.weight": (2, 6),
    }
    x, h, _ = inputs(stack)
    first, state = stack.layers[0](x, h[0])
    assert_close(Stack([stack.layers[0]])(x, h[:1]), (first, [state]), rtol=0, atol=0)
    out, states = stack(x, h)
    assert torch.equal(states[0], state)
    second = first + x @ stack.aligns[0].weight.T
    third, state = stack.layers[1](second, h[1])
    assert torch.equal(states[1], state)
    third = third + second
    last, state = stack.layers[2](third, h[2])
    assert torch.equal(states[2], state)
    assert_close(out, last + third @ stack.aligns[2].weight.T, **TIGHT)


def test_no_residual_makes_no_parameter():
    stack = Stack(ahead())
    assert list(stack.state_dict()) == [
        f"layers.{index}.{name}" for index, layer in enumerate(stack.layers) for name in layer.state_dict()
    ]


def test_residual_of_convolutions_that_keep_the_shape():
    layers = [MinConv2dGRU(2, 2, 3, padding=1), MinConv2dGRU(2, 1, (1, 5), padding=(0, 2), bidirectional=True)]
    stack = Stack(layers, residual=True)
    x = torch.randn(2, 4, 2, 5, 6)
    first, _ = layers[0](x)
    second, _ = layers[1](first + x)
    assert_close(stack(x)[0], second + first + x)


@scripted_slowly_or_not
def test_residual_of_convolutions_that_change_space_is_refused(scripted):
    stack = Stack([MinConv2dGRU(2, 2, 3, padding=1), MinConv2dGRU(2, 2, 3)], residual=True)
    run = torch.jit.script(stack) if scripted else stack
    with pytest.raises((ValueError, torch.jit.Error)) as caught:
        run(torch.randn(2, 4, 2, 5, 6))
    assert "Stack: layers[1] must keep the shape of x because residual is True, got from " in str(caught.value)
    assert "[2, 4, 2, 5, 6] to [2, 4, 2, 3, 4]" in str(caught.value).replace("(", "[").replace(")", "]")
    assert "; pass residual=True to the layer instead" in str(caught.value)


# Dropout


@pytest.mark.parametrize("layers", [mixed, time_first, convolutional])
def test_dropout_is_on_every_layers_output_but_the_last(layers):
    stack = Stack(layers(), dropout=0.4, residual=layers is not convolutional)
    x, _, reset = inputs(stack)

    alone = [Stack([layer], residual=stack.residual) for layer in stack.layers]
    for single, align in zip(alone, stack.aligns, strict=True):
        single.aligns[0] = align

    def expected():
        y = x
        for index, single in enumerate(alone):
            y, _ = single(y, None, reset)
            if index < len(stack.layers) - 1:
                # As nn.GRU drops: each element kept with probability 0.6, and divided by it.
                y = y * torch.empty_like(y).bernoulli_(0.6) / 0.6
        return y

    outs = []
    for function in (expected, lambda: stack(x, None, reset)[0]):
        torch.manual_seed(3)
        outs.append(function())
    assert_close(outs[1], outs[0], **TIGHT)
    assert not torch.equal(stack(x, None, reset)[0], outs[1]), "another seed gave the same mask"
    plain = Stack(stack.layers, residual=stack.residual)
    plain.aligns = stack.aligns
    assert_close(stack.eval()(x, None, reset)[0], plain.eval()(x, None, reset)[0], **TIGHT)


def test_dropout_of_everything_gives_the_next_layer_zeros():
    stack = Stack(ahead(), dropout=1.0, residual=True)
    x, _, _ = inputs(stack)
    seen = []
    for layer in stack.layers[1:]:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out, h = stack(x)
    assert not any(each.any() for each in seen)
    # The last layer's output is whole, and so are all states.
    assert out.all()
    assert all(state.all() for state in h)
    stack.eval()(x)
    assert all(each.any() for each in seen[2:])


def test_dropout_without_a_layer_to_drop_warns():
    with pytest.warns(UserWarning, match=r"^Stack: dropout=0\.5 has no effect on one layer") as seen:
        Stack(one(), dropout=0.5)
    assert [warning.filename for warning in seen] == [__file__]


def test_dropout_of_a_packed_sequence():
    stack = Stack(ahead(), dropout=0.5)
    packed = pack_padded_sequence(torch.randn(B, S, IN).double(), [S, 4, 1], batch_first=True)
    dropped = stack(packed)[0].data
    assert not torch.equal(stack(packed)[0].data, dropped)
    assert torch.equal(stack.eval()(packed)[0].data, stack(packed)[0].data)


# Lengths


@pytest.mark.parametrize(
    ("layers", "form", "residual"),
    [
        *itertools.product(OF_FEATURES, ["lengths", "packed"], [False, True]),
        pytest.param(mixed, "scripted", True, marks=pytest.mark.slow),
    ],
)
def test_sequences_of_different_lengths_equal_each_alone(layers, form, residual):
    stack = Stack(layers(), residual=residual)
    time = 1 if stack.batch_first else 0
    x, h, reset = inputs(stack)
    # `torch.nn.utils.rnn` packs no empty sequences.
    lengths = torch.tensor([4, S, 1 if form == "packed" else 0])

    def alone(x, h, reset):
        outs, states = [], []
        for at, length in enumerate(lengths.tolist()):
            mine = [state.narrow(1, at, 1) for state in h]
            parts = (each.narrow(1 - time, at, 1).narrow(time, 0, length) for each in (x, reset))
            part, cut = parts
            out, last = stack(part, mine, cut)
            outs.append(torch.cat([out, out.new_zeros([*out.shape[:time], S - length, *out.shape[time + 1 :]])], time))
            states.append(last)
        return torch.cat(outs, 1 - time), [torch.cat(states, 1) for states in zip(*states, strict=True)]

    def together(x, h, reset):
        if form != "packed":
            return run(x, h, reset, lengths)
        packed = [
            pack_padded_sequence(each, lengths, batch_first=stack.batch_first, enforce_sorted=False)
            for each in (x, reset)
        ]
        out, last = run(packed[0], h, packed[1])
        assert isinstance(out, PackedSequence)
        return pad_packed_sequence(out, batch_first=stack.batch_first)[0], last

    run = torch.jit.script(stack) if form == "scripted" else stack
    expected = graded(alone, stack, x, h, reset)
    assert_same(graded(together, stack, x, h, reset), expected)
    if form == "packed":
        return
    # Nothing comes out of the padding, not even NaN, in values or gradients.
    spoilt = x.clone()
    real = torch.arange(S) < lengths.unsqueeze(1)
    (spoilt if stack.batch_first else spoilt.transpose(0, 1))[~real] = float("nan")
    assert_same(graded(together, stack, spoilt, h, reset), expected)


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_goes_in_comes_out_in_each_dtype(dtype):
    stack = Stack([MinGRU(IN, 6, dtype=dtype), MinLSTM(6, 5, dtype=dtype)], dropout=0.1, residual=True)
    assert stack.aligns[0].weight.dtype == dtype
    out, h = stack(torch.randn(B, S, IN, dtype=dtype))
    assert {out.dtype, *(state.dtype for state in h)} == {dtype}
    assert out.isfinite().all()


def test_autocast_keeps_the_states_in_float32():
    stack = Stack([MinGRU(IN, 6), MinLSTM(6, 6)])
    with torch.autocast("cpu", torch.bfloat16):
        out, h = stack(torch.randn(B, S, IN))
        out, h = stack(torch.randn(B, S, IN), h)
    assert out.dtype == torch.bfloat16
    assert [state.dtype for state in h] == [torch.float32] * 2


def test_meta_device():
    stack = Stack([MinGRU(IN, 6, device="meta"), MinLSTM(6, 5, device="meta")], residual=True)
    assert all(weight.is_meta for weight in stack.parameters())
    out, h = stack(torch.zeros(B, S, IN, device="meta"))
    assert out.is_meta
    assert out.shape == (B, S, 5)
    assert [tuple(state.shape) for state in h] == [(1, B, 1, 6), (1, B, 1, 5)]


@scripted_slowly_or_not
@pytest.mark.parametrize(("batch", "steps"), [(0, 5), (3, 0)])
def test_empty(batch, steps, scripted):
    stack = Stack(ahead(), residual=True)
    run = torch.jit.script(stack) if scripted else stack
    out, h = run(torch.randn(batch, steps, IN).double())
    assert out.shape == (batch, steps, 2)
    assert [tuple(state.shape) for state in h] == [(2, batch, 1, 6), (1, batch, 1, 6), (1, batch, 1, 2)]


# A module among modules


@each_stack
def test_copies_and_state_dicts(layers):
    stack = Stack(layers(), residual=layers is not convolutional).eval()
    x, h, reset = inputs(stack)
    expected = stack(x, h, reset)
    saved = io.BytesIO()
    torch.save(stack.state_dict(), saved)
    saved.seek(0)
    other = Stack(layers(), residual=stack.residual)
    assert not torch.equal(other(x, h, reset)[0], expected[0])
    other.load_state_dict(torch.load(saved), strict=True)
    for twin in (other, copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert_close(twin(x, h, reset), expected, rtol=0, atol=0)


def test_reset_parameters_draws_all_anew():
    torch.manual_seed(5)
    stack = Stack(ahead(), residual=True)
    drawn = copy.deepcopy(stack.state_dict())
    with torch.no_grad():
        for weight in stack.parameters():
            weight.fill_(9.0)
    torch.manual_seed(5)
    stack.reset_parameters()
    assert_close(dict(stack.state_dict()), dict(drawn), rtol=0, atol=0)


def test_hooks_of_layers_run():
    stack = Stack(ahead())
    x, _, _ = inputs(stack)
    seen = []
    for layer in stack.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(module))
    stack(x)
    assert seen == list(stack.layers)


def test_a_subclass_that_keeps_forward_is_a_layer():
    class Wide(MinGRU):
        def __init__(self, input_dims):
            super().__init__(input_dims, 4 * input_dims)

    out, _ = Stack(layer for layer in (Wide(2), MinGRU(8, 3)))(torch.randn(1, 2, 2))
    assert out.shape == (1, 2, 3)


def test_repr_says_what_is_not_default():
    assert Stack([MinGRU(3, 4)]).extra_repr() == ""
    stack = Stack([MinGRU(3, 4), MinLSTM(4, 5)], dropout=0.25, residual=True)
    assert stack.extra_repr() == "dropout=0.25, residual=True"
    assert "MinGRU(\n      3, 4\n" in repr(stack)


# What is refused

BAD_LAYERS = {
    "none": ([], {}, ValueError, r"layers must be a list of at least one layer, got an empty list"),
    "a layer without its list": (MinGRU(3, 4), {}, TypeError, r"layers must be a list of layers, got MinGRU"),
    "nn.GRU": ([nn.GRU(3, 4)], {}, TypeError, r"layers\[0\] must be a MinGRU, MinLSTM, .* or models.Block, got GRU"),
    "nn.Linear": ([MinGRU(3, 4), nn.Linear(4, 5)], {}, TypeError, r"layers\[1\] must be a MinGRU, .*got Linear"),
    "no module": (["MinGRU"], {}, TypeError, r"layers\[0\] must be a MinGRU, .*got str"),
    "a class": ([MinGRU], {}, TypeError, r"layers\[0\] must be a MinGRU, .*got type"),
    "a cell": ([MinGRUCell(3, 4)], {}, TypeError, r"layers\[0\] must be a MinGRU, .*got MinGRUCell"),
    "a convolutional cell": ([MinConv1dGRUCell(3, 4, 1)], {}, TypeError, r"layers\[0\] .*got MinConv1dGRUCell"),
    "drop_in.GRU": ([GRU(3, 4)], {}, TypeError, r"layers\[0\] must be a MinGRU, .*got GRU"),
    "other features": (
        [MinGRU(3, 4, bidirectional=True), MinGRU(4, 5)],
        {},
        ValueError,
        r"layers\[1\] must be a layer with input_dims=8, the output features of layers\[0\], got 4",
    ),
    "other features of a stack": (
        [Stack([MinGRU(3, 4), MinGRU(4, 6)]), MinGRU(4, 5)],
        {},
        ValueError,
        r"layers\[1\] must be a layer with input_dims=6, the output features of layers\[0\], got 4",
    ),
    "other channels": (
        [MinConv1dGRU(3, [4, 6], 1, 2), MinConv1dGRU(4, 5, 1)],
        {},
        ValueError,
        r"layers\[1\] must be a layer with input_dims=6, the output features of layers\[0\], got 4",
    ),
    "other order": (
        [MinGRU(3, 4), MinLSTM(4, 5), MinGRU(5, 6, batch_first=False)],
        {},
        ValueError,
        r"layers\[2\] must be a layer with batch_first=True like layers\[1\], got False",
    ),
    "other space": (
        [MinConv1dGRU(3, 4, 1), MinConv2dGRU(4, 5, 1)],
        {},
        ValueError,
        r"layers\[1\] must be a layer with 1 spatial dimensions like layers\[0\], got 2",
    ),
    "space and none": (
        [MinConv1dGRU(3, 4, 1), MinGRU(4, 5)],
        {},
        ValueError,
        r"layers\[1\] must be a layer with 1 spatial dimensions like layers\[0\], got 0",
    ),
    "residual of other channels": (
        [MinConv1dGRU(3, 3, 1), MinConv1dGRU(3, 4, 1)],
        {"residual": True},
        ValueError,
        r"layers\[1\] must be a layer with as many output as input channels because residual is True, "
        r"got 3 input and 4 output channels; pass residual=True to",
    ),
    "dropout above 1": ([MinGRU(3, 4)], {"dropout": 1.5}, ValueError, r"dropout must be a number from 0 to 1, got 1"),
    "dropout NaN": ([MinGRU(3, 4)], {"dropout": float("nan")}, ValueError, r"dropout must be a number from 0 to 1"),
    "dropout a string": ([MinGRU(3, 4)], {"dropout": "0"}, TypeError, r"dropout must be a number from 0 to 1, got '0'"),
}


def test_bad_layers():
    cases = {
        case: ({"layers": layers, **options}, error, message)
        for case, (layers, options, error, message) in BAD_LAYERS.items()
    }
    assert_refused(Stack, cases, "Stack: ")


X = torch.zeros(2, 5, 3)
H = [torch.zeros(2, 2, 1, 4), torch.zeros(1, 2, 1, 5)]

BAD_CALLS = {
    "h is one tensor": (
        {"h": H[0]},
        TypeError,
        r"Stack: h must be a list of 2 tensors, got Tensor; pass 1 for MinGRU, 1 for MinLSTM",
    ),
    "h of one": ({"h": H[:1]}, ValueError, r"Stack: h must be 2 tensors, got 1; pass 1 for MinGRU, 1 for MinLSTM"),
    "h of too many": ({"h": [*H, H[0]]}, ValueError, r"Stack: h must be 2 tensors, got 3"),
    "h with None": ({"h": [H[0], None]}, TypeError, r"Stack: h\[1\] must be a tensor, got NoneType"),
    "h nested": ({"h": [[H[0]], H[1]]}, TypeError, r"Stack: h\[0\] must be a tensor, got list"),
    "h swapped": ({"h": H[::-1]}, ValueError, r"MinGRU: h must be expandable to .* = \(2, 2, 1, 4\)"),
    "h of float64": ({"h": [H[0], H[1].double()]}, TypeError, r"MinLSTM: h must be torch\.float32 like x"),
    "x of other features": ({"x": X[..., :2]}, ValueError, r"MinGRU: x must be \(B, S, 3\)"),
    "x is a list": ({"x": [X]}, TypeError, r"MinGRU: x must be a tensor, got list"),
    "reset of other length": (
        {"reset": torch.zeros(2, 4, dtype=torch.bool)},
        ValueError,
        r"MinGRU: reset must be \(B, S\)",
    ),
    "lengths above": ({"lengths": torch.tensor([6, 1])}, ValueError, r"MinGRU: lengths must be from 0 to S = 5"),
    "lengths in a list": ({"lengths": [5, 1]}, TypeError, r"MinGRU: lengths must be an integer tensor"),
}


@each_stack
def test_states_may_be_a_tuple(layers):
    stack = Stack(layers())
    x, h, reset = inputs(stack)
    expected = stack(x, h, reset)
    assert_close(stack(x, tuple(h), reset), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"^Stack: h must be {stack.num_states} tensors, got {stack.num_states + 1}; "):
        stack(x, (*h, h[0]))


def test_layers_go_into_one_list():
    for layers in ((MinGRU(3, 4), MinLSTM(4, 5)), (MinGRU(3, 4), MinGRU(4, 4), MinGRU(4, 4))):
        with pytest.raises(TypeError, match=r"^Stack: too many positional arguments; pass the layers in one list$"):
            Stack(*layers)
    with pytest.raises(TypeError, match=r"^Stack: layers must be a list .*, got MinGRU; pass the layers in one list$"):
        Stack(MinGRU(3, 4))


@pytest.mark.parametrize("residual", [False, True])
def test_bad_calls(residual):
    stack = Stack([MinGRU(3, 4, num_layers=2), MinLSTM(4, 5)], residual=residual)
    assert_refused(lambda **args: stack(**{"x": X, **args}), BAD_CALLS)


@scripted_slowly_or_not
def test_bad_calls_of_convolutions(scripted):
    stack = Stack([MinConv1dGRU(3, 4, 1, 2), MinConv1dGRU(4, 5, 1)])
    run = torch.jit.script(stack) if scripted else stack
    x = torch.zeros(2, 5, 3, 6)
    with pytest.raises((ValueError, torch.jit.Error)) as caught:
        run(x, lengths=torch.tensor([5, 2]))
    assert "Stack: lengths must be None because convolutional layers do not support lengths" in str(caught.value)
    with pytest.raises((ValueError, torch.jit.Error)) as caught:
        run(x, [torch.zeros(1)] * 2)
    assert "Stack: h must be 3 tensors, got 2" in str(caught.value)
    if not scripted:
        assert str(caught.value).endswith("; pass 2 for MinConv1dGRU, 1 for MinConv1dGRU")


def test_a_layer_may_be_hooked_into_two_stacks():
    """Weights can be shared: the same layer twice is one set of parameters."""
    layer = MinGRU(3, 3)
    stack = Stack([layer, layer])
    assert len(list(stack.parameters())) == 2
    x = torch.randn(2, 5, 3)
    out, (first, second) = stack(x)
    below, expected = layer(x)
    assert torch.equal(first, expected)
    assert_close((out, second), layer(below), rtol=0, atol=0)


@pytest.mark.parametrize("backend", [name for name, can_run in mingru.backends().items() if can_run is True])
def test_every_back_end(backend):
    stack = Stack([MinGRU(IN, 6, **DOUBLE), MinLSTM(6, 5, **DOUBLE)], residual=True)
    x, h, reset = inputs(stack)
    expected = graded(stack, stack, x, h, reset)
    with mingru.use_backend(backend):
        assert_same(graded(stack, stack, x, h, reset), expected)
