"""The convolutional layers and cells: against a float64 reference, in blocks, geometry, and wrong calls.

`test_layers.py` tests what also holds for layers of features.
"""

import copy
import itertools
import warnings

import pytest
import reference
import torch
import torch.nn.functional as F
from cover import cover, named
from refusals import WRONG_LAYER_OPTIONS, assert_refused, wrong_resets, wrong_tensors, wrong_values
from test_recurrent import TIGHT, assert_same
from torch import nn
from torch.testing import assert_close

from mingru import (
    MinConv1dGRU,
    MinConv1dGRUCell,
    MinConv2dGRU,
    MinConv2dGRUCell,
    MinConv3dGRU,
    MinConv3dGRUCell,
    ops,
)
from mingru.ops import blocks

B, S, IN = 3, 5, 4

# By the number of space dimensions.
LAYERS = {1: MinConv1dGRU, 2: MinConv2dGRU, 3: MinConv3dGRU}
CELLS = {1: MinConv1dGRUCell, 2: MinConv2dGRUCell, 3: MinConv3dGRUCell}
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# All options together.
ALL = {
    "num_layers": 2,
    "hidden_dims": [4, 6],
    "kernel_size": [3, (2, 1)],
    "stride": [1, 2],
    "padding": ["same", (1, 0)],
    "groups": 2,
    "batch_first": False,
    "bidirectional": True,
    "residual": True,
    "norm": "group",
    "learn_initial_state": True,
}
# Those that matter to blocks of steps and batch elements.
BLOCKED = [
    {},
    {"batch_first": False},
    {"bidirectional": True},
    {"learn_initial_state": True},
    {"candidate": "tanh"},
    ALL,
]

# What "tuple" and "list" stand for depends on the number of dimensions and of layers.
TUPLES = {"kernel_size": (2, 1, 3), "stride": (1, 2, 1), "padding": (1, 0, 2), "dilation": (2, 1, 1)}
LISTS = {"hidden_dims": [4, 6], "kernel_size": [3, TUPLES["kernel_size"]], "stride": [2, 1], "padding": [0, "same"]}
LISTS["dilation"] = [1, TUPLES["dilation"]]
FACTORS = {
    "space": [1, 2, 3],
    "num_layers": [1, 2],
    "hidden_dims": [IN, 2, "list"],
    "kernel_size": [1, 3, "tuple", "list"],
    "stride": [1, 2, "tuple", "list"],
    "padding": [0, 1, "same", "tuple", "list"],
    "dilation": [1, 2, "tuple", "list"],
    "groups": [1, 2],
    "bias": [True, False],
    "batch_first": [True, False],
    "bidirectional": [False, True],
    "residual": [False, True],
    "norm": [None, "group"],
    "candidate": ["positive", "linear", "tanh"],
    "learn_initial_state": [False, True],
    "h": [None, "full", "zero", "negative", "one", "channels"],
    "reset": [False, True],
}

# TorchScript takes long to compile.
scripted_slowly_or_not = pytest.mark.parametrize("scripted", [False, pytest.param(True, marks=pytest.mark.slow)])
both_orders = pytest.mark.parametrize("batch_first", [True, False])


def spelled_out(case):
    """The options that a row of FACTORS stands for, those that contradict one another put right."""
    count, options = case["space"], dict(case)
    for name, value in case.items():
        if value == "tuple":
            options[name] = TUPLES[name][:count]
        if value == "list":
            entries = LISTS[name][: case["num_layers"]]
            options[name] = [entry[:count] if isinstance(entry, tuple) else entry for entry in entries]
    for layer in range(case["num_layers"]):
        if of_layer(options["padding"], layer) == "same" and of_layer(options["stride"], layer) != 1:
            options["stride"] = 1
        # Torch warns where one side is padded more than the other.
        if of_layer(options["padding"], layer) == "same" and any(
            size % 2 == 0 for size in of_each(of_layer(options["kernel_size"], layer), count)
        ):
            options["kernel_size"] = 3
    return options


def of_layer(value, layer):
    return value[layer] if isinstance(value, list) else value


def of_each(value, count):
    return value if isinstance(value, tuple) else (value,) * count


def build(space=2, hidden_dims=6, kernel_size=3, num_layers=1, *, kinds=LAYERS, **options):
    many = {"num_layers": num_layers} if kinds is LAYERS else {}
    return kinds[space](IN, hidden_dims, kernel_size, **many, **options)


def make(dtype=torch.double, **options):
    rnn = build(**options, dtype=dtype)
    with torch.no_grad():
        # Away from the values where a forgotten norm weight or a forgotten initial state would not show.
        for name, weight in rnn.named_parameters():
            if "norm" in name or "initial_state" in name:
                weight.add_(torch.randn_like(weight) / 4)
    return rnn


def make_space(rnn):
    """The smallest space of which the last layer makes 2 x 3 x 2 places."""
    count = rnn.num_space_dims
    sizes = [2, 3, 2][:count]
    for layer in reversed(range(rnn.num_layers)):
        kernel, stride, dilation, padding = (
            of_each(of_layer(getattr(rnn, option), layer), count)
            for option in ("kernel_size", "stride", "dilation", "padding")
        )
        for at in range(count):
            span = dilation[at] * (kernel[at] - 1)
            padded = span if padding[at] == "same" else 2 * padding[at]
            sizes[at] = max(1, (sizes[at] - 1) * stride[at] + span + 1 - padded)
    return sizes


def make_input(rnn, dtype=torch.double, batch=B, steps=S):
    """x and reset in the module's own order."""
    x = torch.randn(batch, steps, IN, *make_space(rnn), dtype=dtype)
    reset = torch.rand(batch, steps) < 0.3
    reset[:1, :1] = reset[1:2, -1:] = True
    return in_order(rnn, x), in_order(rnn, reset)


def make_states(rnn, x, kind="full"):
    with torch.no_grad():
        states = [torch.randn_like(state) for state in rnn(x)[1]]
    if kind == "zero":
        return [torch.zeros_like(state) for state in states]
    if kind == "negative":
        return [-state.abs() for state in states]
    if kind == "one":
        return [state[:1, 0] for state in states]
    if kind == "channels":
        return [state.flatten(3)[0, 0, :, 0].reshape(-1, *[1] * rnn.num_space_dims) for state in states]
    return states


# What `test_layers.py` needs: a class and its sizes, a layer of another size, the input channels of a layer, and cells.
KIND_AND_SIZES = (MinConv2dGRU, (IN, 6, 3))


def wider(**options):
    return build(**{**options, "hidden_dims": 8})


def input_dims_of(layer):
    return layer.conv.in_channels


def cells():
    return [make(torch.float32, kinds=CELLS, space=space) for space in CELLS]


def in_order(rnn, sequence):
    return sequence if rnn.batch_first else sequence.transpose(0, 1)


def graded(function, rnn, x, h, reset):
    """out, states and the gradients of x, h and all weights, through out and through the returned states."""
    x = x.detach().clone().requires_grad_()
    h = None if h is None else [state.detach().clone().requires_grad_() for state in h]
    out, last = function(x, h, reset)
    loss = 0
    for power, result in enumerate([out, *last], 1):
        # Not all alike, so that no two outputs can be swapped, and made without a seed of its own.
        weight = torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view(result.shape)
        loss = loss + (result.pow(power) * weight).sum()
    leaves = {"x": x, **{f"h[{at}]": state for at, state in enumerate(h or [])}, **dict(rnn.named_parameters())}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    got = {"out": out, **{f"last[{at}]": state for at, state in enumerate(last)}}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        # A leaf that took no part: no gradient and a gradient of 0 mean the same.
        got["grad of " + name] = torch.zeros_like(leaf) if grad is None else grad
    return got


def truth(rnn, x, h=None, reset=None):
    """What a layer computes, one step and one part of the channels after the other, in float64, batch first."""
    weights = {name: weight.double() for name, weight in rnn.named_parameters()}
    convolve, groups = CONVOLVE[rnn.num_space_dims], rnn.groups
    x, last = x.double(), []
    for layer in range(rnn.num_layers):
        prefix = f"layers.{layer}."
        geometry = {name: of_layer(getattr(rnn, name), layer) for name in ("stride", "padding", "dilation")}
        hidden, num_directions = of_layer(rnn.hidden_dims, layer), rnn.num_directions

        def parts(y, name, count, prefix=prefix, geometry=geometry):
            """The `count` results of a convolution, each for all steps and with all its channels."""
            weight, bias = weights[f"{prefix}{name}.weight"], weights.get(f"{prefix}{name}.bias")
            rows = weight.shape[0] // (groups * count)
            found = [[] for _ in range(count)]
            for group, part in itertools.product(range(groups), range(count)):
                at = (group * count + part) * rows
                own = y.chunk(groups, 2)[group]
                bias_rows = None if bias is None else bias[at : at + rows]
                steps = [convolve(own[:, t], weight[at : at + rows], bias_rows, **geometry) for t in range(y.shape[1])]
                found[part].append(torch.stack(steps, 1))
            return [torch.cat(of_part, 2) for of_part in found]

        y = x
        if rnn.norm == "group":
            count = rnn.layers[layer].norm.num_groups
            apart = y.reshape(*y.shape[:2], count, -1)
            deviation = apart - apart.mean(-1, keepdim=True)
            y = (deviation / (deviation.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view(y.shape)
            over_space = (-1, *[1] * rnn.num_space_dims)
            y = y * weights[prefix + "norm.weight"].view(over_space) + weights[prefix + "norm.bias"].view(over_space)
        outs = []
        for direction, name in enumerate(["conv", "conv_reverse"][:num_directions]):
            gate, candidate = parts(y, name, 2)
            assert gate.shape[2] == hidden
            initial = weights.get(prefix + "initial_state")
            if initial is not None:
                initial = initial[direction]
            before = initial if h is None else h[layer * num_directions + direction].double()
            cut = reset
            if direction == 1 and reset is not None:
                cut = torch.cat([reset[:, 1:], torch.zeros_like(reset[:, :1])], 1)
            out = reference.mingru(gate, candidate, before, cut, rnn.candidate, initial, reverse=direction == 1)
            outs.append(out)
            last.append(out[:, :1] if direction else out[:, -1:])
        out = torch.cat(outs, 2)
        if rnn.residual:
            aligned = prefix + "align.weight" in weights
            out = out + (torch.cat(parts(x, "align", num_directions), 2) if aligned else x)
        x = out
    return x, last


def true_of(rnn):
    """`truth` in the module's own order."""

    def function(x, h=None, reset=None):
        out, last = truth(rnn, in_order(rnn, x), h, None if reset is None else in_order(rnn, reset))
        return in_order(rnn, out), last

    return function


# The reference


@pytest.mark.parametrize("case", cover(FACTORS), ids=lambda case: named(spelled_out(case)))
def test_equals_the_reference(case):
    options = {name: value for name, value in spelled_out(case).items() if name not in ("h", "reset")}
    rnn = make(**options)
    x, reset = make_input(rnn)
    h = None if case["h"] is None else make_states(rnn, x, case["h"])
    reset = reset if case["reset"] else None
    got = graded(rnn, rnn, x, h, reset)
    assert got["out"].dtype == got["last[0]"].dtype == torch.double
    assert_same(got, graded(true_of(rnn), rnn, x, h, reset), **TIGHT)


# What ALL does not have.
SCRIPTED_SLOWLY = [
    {"space": 1, "dilation": 2, "bias": False, "candidate": "tanh"},
    {"space": 3, "padding": 1, "residual": True, "hidden_dims": IN, "candidate": "linear"},
]


@pytest.mark.parametrize(
    "options", [{}, ALL, *(pytest.param(options, marks=pytest.mark.slow) for options in SCRIPTED_SLOWLY)], ids=named
)
def test_scripted_equals_the_reference(options):
    """S is enough for the chunks of TorchScript's own scan."""
    rnn = make(**options)
    scripted = torch.jit.script(rnn)
    assert scripted.state_dict().keys() == rnn.state_dict().keys()
    x, reset = make_input(rnn, steps=18)
    h = make_states(rnn, x)
    assert_close(scripted(x), rnn(x), **TIGHT)
    expected = graded(true_of(rnn), rnn, x, h, reset)
    # Twice: TorchScript runs other code once it has seen the shapes.
    for _ in range(2):
        assert_same(graded(scripted, scripted, x, h, reset), expected, **TIGHT)


def test_the_comparison_with_the_reference_can_fail():
    rnn = make(**ALL)
    x, reset = make_input(rnn)
    expected = graded(true_of(rnn), rnn, x, None, reset)
    with torch.no_grad():
        rnn.layers[1].conv_reverse.bias[0] += 1e-6
    with pytest.raises(AssertionError, match="out"):
        assert_same(graded(rnn, rnn, x, None, reset), expected, **TIGHT)


def test_float32_is_as_exact_as_plain_float32():
    rnn = make(torch.float32, num_layers=2, padding=1)
    x = torch.randn(B, 200, IN, 4, 4)
    reset = torch.rand(B, 200) < 0.01

    def plain(x):
        for layer in rnn.layers:
            gate, candidate = layer.conv(x.flatten(0, 1)).view(B, 200, 2, 6, 4, 4).unbind(2)
            x = reference.mingru(gate, candidate, reset=reset)
        return x

    exact, _ = truth(rnn, x, reset=reset)
    error, allowed = ((got.double() - exact).abs().max() for got in (rnn(x, reset=reset)[0], plain(x)))
    assert 0 < error <= 2 * allowed


# Blocks, which stand in for the whole where no gradient is wanted


def count_convolutions(module, monkeypatch):
    """A list to which each call's batch is added."""
    seen = []
    inner = type(module).forward

    def counted(self, x):
        if self is module:
            seen.append(len(x))
        return inner(self, x)

    # Of the class: a module with a `forward` of its own is not taken apart.
    monkeypatch.setattr(type(module), "forward", counted)
    return seen


@pytest.mark.parametrize(("images", "with_reset"), [(2, True), (3, False), (10, True)])
@pytest.mark.parametrize("options", BLOCKED, ids=named)
def test_blocks_equal_the_whole(options, with_reset, images, monkeypatch):
    rnn = make(**options)
    x, reset = make_input(rnn, steps=9, batch=5)
    h = make_states(rnn, x)
    args = (x, h, reset) if with_reset else (x, None, None)
    whole = rnn(*args)
    # So many images of the first layer's pre-activations are a block.
    last = whole[1][0]
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", images * 2 * last[0].numel() * last.element_size())
    seen = count_convolutions(rnn.layers[0].conv, monkeypatch)
    with torch.inference_mode():
        in_blocks = rnn(*args)
    assert len(seen) > 1
    assert sum(seen) == 45
    assert max(seen) <= images
    assert_close(in_blocks, whole, **TIGHT)
    seen.clear()
    rnn(*args)
    assert seen == [45], "with a gradient"


def test_blocks_are_no_smaller_than_two_images_and_no_larger_than_the_cache(monkeypatch):
    rnn = build(padding=1)
    x = torch.randn(4, 8, IN, 5, 5)
    size = 4 * 12 * 25
    seen = count_convolutions(rnn.layers[0].conv, monkeypatch)
    # Four images in a block; fewer than four blocks; two images of half the size; of twice; far too large.
    for block, batches in ((4 * size, [4] * 8), (9 * size, [32]), (size, [2] * 16), (size / 2, [2] * 16), (1, [32])):
        monkeypatch.setattr(blocks, "_BLOCK_BYTES", block)
        seen.clear()
        with torch.no_grad():
            rnn(x)
        assert seen == batches


def test_a_state_is_not_rounded_between_blocks(monkeypatch):
    rnn = make(torch.bfloat16, kernel_size=1)
    x = torch.randn(2, 300, IN, 2, 2, dtype=torch.bfloat16)
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 1 << 10)
    seen = count_convolutions(rnn.layers[0].conv, monkeypatch)
    with torch.no_grad():
        out, states = rnn(x)
        assert len(seen) > 50
        gate, candidate = rnn.layers[0].conv(x.flatten(0, 1)).double().view(2, 300, 2, 6, 2, 2).unbind(2)
    assert out.dtype == states[0].dtype == torch.bfloat16
    truth = reference.mingru(gate, candidate)
    assert reference.relative_error(out, truth) <= 1.001 * torch.finfo(torch.bfloat16).eps / 2
    with torch.no_grad():
        _, states = rnn(x, [torch.full((1,), 0.5)])
    assert states[0].dtype == torch.float32
    assert reference.relative_error(states[0], truth[:, -1:]) <= 2e-6


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_see_the_whole_batch(kind, monkeypatch):
    rnn = build(padding=1)
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 1 << 12)
    seen = []
    getattr(rnn.layers[0].conv, kind)(lambda module, args, *_: seen.append(len(args[0])))
    with torch.no_grad():
        rnn(torch.randn(4, 8, IN, 5, 5))
    assert seen == [32]


def test_blocks_make_way_for_transforms_autocast_and_traces(monkeypatch):
    rnn = make(padding=1)
    x = torch.randn(2, 4, 8, IN, 5, 5).double()
    expected = torch.stack([rnn(one)[0] for one in x])
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 1 << 13)
    with torch.no_grad():
        assert_close(torch.func.vmap(lambda one: rnn(one)[0])(x), expected, **TIGHT)
        with torch.autocast("cpu", torch.bfloat16):
            assert copy.deepcopy(rnn).float()(x[0].float())[0].dtype == torch.bfloat16
        with warnings.catch_warnings():
            # Of the checks, that they are not traced.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(rnn, (x[0],))
        longer = torch.randn(5, 9, IN, 5, 5).double()
        assert_close(traced(longer), rnn(longer), **TIGHT)


# What the states and outputs mean


def test_each_group_of_channels_is_a_layer_of_its_own():
    """Weights and all: the rows of a group lie together, its gates before its candidates."""
    rnn = make(groups=2, bidirectional=True, residual=True)
    x, _ = make_input(rnn)
    out, states = rnn(x)
    for group in range(2):
        one = MinConv2dGRU(2, 3, 3, bidirectional=True, residual=True, dtype=torch.double)
        weights = {name: weight.chunk(2)[group] for name, weight in rnn.named_parameters()}
        one.load_state_dict({**one.state_dict(), **weights})
        out_of_group, states_of_group = one(x.chunk(2, 2)[group])
        # Forward channels first, then backward ones; each in the order of groups.
        halves = [half.chunk(2, 2)[group] for half in out.chunk(2, 2)]
        assert_close(torch.cat(halves, 2), out_of_group, **TIGHT)
        assert_close([state.chunk(2, 2)[group] for state in states], states_of_group, **TIGHT)


def test_gate_rows_come_first():
    rnn = MinConv1dGRU(1, 1, 1)
    with torch.no_grad():
        rnn.layers[0].conv.weight.copy_(torch.tensor([0.0, 1.0]).view(2, 1, 1))
        rnn.layers[0].conv.bias.copy_(torch.tensor([-100.0, 0.0]))
    x, h = torch.full((1, 1, 1, 1), 3.0), [torch.tensor([7.0])]
    # A gate of 0 keeps the state, whatever the candidate.
    assert rnn(x, h)[0].item() == 7.0
    with torch.no_grad():
        rnn.layers[0].conv.bias[0] = 100.0
    # A gate of 1 takes g(3).
    assert rnn(x, h)[0].item() == 3.5


# Geometry


@pytest.mark.parametrize("padding", [0, 1, 2, (1, 2), "same"])
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)])
def test_space_is_what_the_convolution_makes(dilation, padding):
    for stride, kernel_size in itertools.product([1] if padding == "same" else [1, 2, (2, 1)], [1, 3, (3, 5)]):
        # Not on "meta", where torch 2.11 takes a kernel that is larger than the space.
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        module = nn.Conv2d(1, 1, kernel_size, **options)
        layer = MinConv2dGRU(1, 1, kernel_size, residual=True, **options).layers[0]
        made = {}
        for size in range(1, 17):
            for space in ((size, 20), (20, size)):
                try:
                    made[space] = tuple(module(torch.zeros(1, 1, *space)).shape[2:])
                except RuntimeError:
                    made[space] = None
        for space, expected in made.items():
            fits = all(size >= reach for size, reach in zip(space, layer.geometry.reach(), strict=True))
            assert (layer.geometry.space(space) if fits else None) == expected
        # The residual needs no map where no space comes out in another size.
        assert (layer.align is None) == all(space == expected for space, expected in made.items())


def test_even_kernels_that_keep_their_space():
    rnn = MinConv1dGRU(IN, IN, 2, padding="same", residual=True, dtype=torch.double)
    assert rnn.layers[0].align is None
    x = torch.randn(B, S, IN, 7).double()
    with warnings.catch_warnings():
        # Torch says that it copies.
        warnings.simplefilter("ignore")
        out, states = rnn(x)
        assert_close((out, states), truth(rnn, x), **TIGHT)
    assert out.shape == x.shape


def test_norm_has_groups_of_sixteen_channels_or_more():
    # By hand: one for few channels; then as many as divide evenly; 32 at most.
    for channels, groups in (
        (1, 1),
        (3, 1),
        (31, 1),
        (32, 2),
        (37, 1),
        (48, 3),
        (50, 2),
        (64, 4),
        (512, 32),
        (2048, 32),
    ):
        rnn = MinConv1dGRU(channels, 1, 1, norm="group", device="meta")
        assert (rnn.layers[0].norm.num_groups, rnn.layers[0].norm.num_channels) == (groups, channels)


# Memory


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("space", [1, 2, 3])
@both_orders
def test_gates_and_candidates_are_views_of_the_convolution(batch_first, space, grad, monkeypatch):
    rnn = build(space=space, batch_first=batch_first)
    x = torch.randn(B, S, IN, *make_space(rnn))
    made, given = [], []
    inner_conv, inner_run = rnn.layers[0].conv.forward, ops.autograd.run_kernel
    monkeypatch.setattr(rnn.layers[0].conv, "forward", lambda x: made.append((x, inner_conv(x))) or made[-1][1])
    monkeypatch.setattr(
        ops.autograd,
        "run_kernel",
        lambda which, call, keep: given.append(call.tensors) or inner_run(which, call, keep),
    )
    x = in_order(rnn, x).contiguous()
    with torch.set_grad_enabled(grad):
        out, _ = rnn(x)
    ((images, pre),), (inputs,) = made, given
    assert images.data_ptr() == x.data_ptr(), "x was copied"
    for index, half in enumerate(inputs):
        assert half.data_ptr() == pre[:, 6 * index].data_ptr(), "copied"
        assert half[0, 0].is_contiguous()
        assert half.shape[:2] == x.shape[:2]
    assert out.is_contiguous(), "the output lies in another order than the input"


@pytest.mark.parametrize("options", [{}, ALL], ids=named)
def test_strided_and_expanded_input(options):
    rnn = make(**options)
    space = make_space(rnn)
    x = torch.randn(2 * B, 2 * S, 2 * IN, *space).double()
    own = x[:B, :S, :IN]
    strided = x[::2, ::2, ::2]
    swapped = own.transpose(0, 1).contiguous().transpose(0, 1)
    channels_last = own.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    expanded = x[:1, :1, :IN].expand(B, S, IN, *space)
    reset = in_order(rnn, (torch.rand(1, 2 * S) < 0.3)[:, ::2].expand(B, S))
    for given in (strided, swapped, channels_last, expanded):
        one = in_order(rnn, given).requires_grad_()
        dense = one.detach().contiguous().requires_grad_()
        results = rnn(one, reset=reset), rnn(dense, reset=reset.contiguous())
        assert_close(*results, **TIGHT)
        leaves = [[leaf, *rnn.parameters()] for leaf in (one, dense)]
        grads = [
            torch.autograd.grad(out.square().sum() + h[0].sum(), of_case, allow_unused=True)
            for (out, h), of_case in zip(results, leaves, strict=True)
        ]
        assert_close(*grads, **TIGHT)
        with torch.no_grad():
            assert_close(rnn(one, reset=reset), results[1], **TIGHT)
        assert torch.equal(one, dense), "the input was written to"


# Cells

CELL_OPTIONS = [
    {},
    {"space": 1, "padding": "same"},
    {"space": 3},
    {"stride": (1, 2), "padding": 1, "dilation": (2, 1)},
    {"groups": 2},
    {"bias": False, "candidate": "tanh"},
    {"norm": "group", "learn_initial_state": True},
]


def pair(dtype=torch.double, **options):
    """A cell, and the layer with its weights."""
    cell, layer = make(dtype, kinds=CELLS, **options), make(dtype, **options)
    assert cell.state_dict().keys() == layer.state_dict().keys()
    layer.load_state_dict(cell.state_dict())
    return cell, layer


def looped(cell):
    def function(x, h, reset):
        state, outs = None if h is None else h[0].squeeze(1), []
        for t in range(x.shape[1]):
            state = cell(x[:, t], state, None if reset is None else reset[:, t])
            outs.append(state)
        return torch.stack(outs, 1), [state.unsqueeze(1)]

    return function


@pytest.mark.parametrize(
    ("options", "scripted"),
    [
        *((options, False) for options in CELL_OPTIONS),
        *(pytest.param(options, True, marks=pytest.mark.slow) for options in CELL_OPTIONS[1:-1:2]),
        (CELL_OPTIONS[-1], True),
    ],
    ids=lambda value: named(value) if isinstance(value, dict) else "scripted" if value else "",
)
def test_a_cell_is_the_layer_step_by_step(options, scripted):
    cell, layer = pair(**options)
    run = torch.jit.script(cell) if scripted else cell
    x, reset = make_input(layer)
    h = make_states(layer, x)
    for args in ((x, None, None), (x, h, reset), (x, h, None), (x, None, reset)):
        expected = graded(true_of(layer), layer, *args)
        assert_same(graded(looped(run), run, *args), expected, **TIGHT)


@pytest.mark.parametrize(
    ("space", "learned", "scripted"),
    [
        *((space, learned, False) for space in (1, 2, 3) for learned in (False, True)),
        pytest.param(1, True, True, marks=pytest.mark.slow),
    ],
)
def test_a_cells_state_expands(space, learned, scripted):
    cell, _ = pair(space=space, stride=2, padding=1, learn_initial_state=learned)
    run = torch.jit.script(cell) if scripted else cell
    x = make_input(cell)[0][:, 0]
    shape, reset = cell(x).shape, torch.tensor([False, True, False])
    full = torch.randn(shape).double()
    places = [1] * space
    for h in (
        full,
        full[:1],
        full[:, :1],
        full[0],
        full[0].flatten(1)[:, 0].reshape(-1, *places),
        full[:1].flatten(2)[:, :, 0].reshape(1, -1, *places),
        full[0, 0],
        full.flatten()[0],
    ):
        for cut in (None, reset):
            assert_close(run(x, h, cut), cell(x, h.expand(shape).clone(), cut), **TIGHT)
        if h.dim() <= space + 1:
            expected = cell(x[0], h.expand(shape[1:]).clone())
            assert expected.shape == shape[1:]
            assert_close(run(x[0], h), expected, **TIGHT)


@scripted_slowly_or_not
def test_a_cell_without_a_batch(scripted):
    cell, layer = pair(learn_initial_state=True)
    run = torch.jit.script(cell) if scripted else cell
    x, _ = make_input(layer)
    h = make_states(layer, x)[0][:, 0]
    for reset in (None, torch.tensor([True, False, True])):
        for state in (None, h):
            together = run(x[:, 0], state, reset)
            assert together.shape == h.shape
            for at in range(B):
                one = run(x[at, 0], None if state is None else state[at], None if reset is None else reset[at])
                assert_close(one, together[at], **TIGHT)


def test_a_cell_without_a_batch_is_told_from_one():
    """A batch of IN images, and one image with IN channels, have their channels in different places."""
    cell = build(kinds=CELLS, space=1, kernel_size=1)
    assert cell(torch.zeros(IN, IN, 7)).shape == (IN, 6, 7)
    assert cell(torch.zeros(IN, 7)).shape == (6, 7)


def test_weights_go_from_cell_to_layer_and_back():
    cell, layer = pair(norm="group", learn_initial_state=True)
    x, _ = make_input(layer)
    assert_close(cell(x[:, 0]), layer(x[:, :1])[1][0][:, 0], **TIGHT)
    other = make(norm="group", learn_initial_state=True)
    cell.load_state_dict(other.state_dict())
    assert_close(cell(x[:, 0]), other(x[:, :1])[1][0][:, 0], **TIGHT)


@scripted_slowly_or_not
def test_a_cells_state_stays_in_float32_under_autocast(scripted):
    cell = make(torch.float32, kinds=CELLS, padding=1)
    run = torch.jit.script(cell) if scripted else cell
    h = None
    with torch.autocast("cpu", torch.bfloat16):
        for x in torch.randn(3, B, IN, 4, 4):
            h = run(x, h)
            assert h.dtype == torch.float32
            assert (h != h.bfloat16()).any(), "rounded"


@scripted_slowly_or_not
def test_an_empty_batch_of_a_cell(scripted):
    cell = build(kinds=CELLS, padding=1)
    run = torch.jit.script(cell) if scripted else cell
    x = torch.randn(0, IN, 5, 5)
    assert run(x).shape == (0, 6, 5, 5)
    run(x, run(x), torch.zeros(0, dtype=torch.bool)).sum().backward()
    assert not cell.layers[0].conv.weight.grad.any()


# Scripting, copies, dtypes, devices


def test_scripted_refuses_what_would_pass_unseen():
    x = torch.zeros(2, 3, IN, 5, 5)
    for batch_first, letters in ((True, "(B, S, 4"), (False, "(S, B, 4")):
        scripted = torch.jit.script(build(batch_first=batch_first, bidirectional=True))
        reset = torch.zeros(1, 3, dtype=torch.bool)
        for args, message in (
            ((torch.zeros(2, 3, 7, 5, 5),), f"MinConv2dGRU: x must be {letters}"),
            ((x[0],), f"MinConv2dGRU: x must be {letters}"),
            ((x, [torch.zeros(1)]), "MinConv2dGRU: h must have one state per layer and direction"),
            ((x, None, reset), "MinConv2dGRU: reset must be"),
        ):
            with pytest.raises(torch.jit.Error) as caught:
                scripted(*args)
            assert message in str(caught.value)
    cell = torch.jit.script(build(kinds=CELLS))
    for args, message in (
        ((x,), "MinConv2dGRUCell: x must be (B, 4, *space)"),
        ((torch.zeros(2, 7, 5, 5),), "MinConv2dGRUCell: x must be (B, 4, *space)"),
        ((x[0], torch.zeros(1, 3, 6, 3, 3)), "MinConv2dGRUCell: h must be expandable to (B, H, *space)"),
        ((x[0, 0], torch.zeros(1, 6, 3, 3)), "MinConv2dGRUCell: h must be expandable to (B, H, *space)"),
        ((x[0], None, torch.zeros(2, dtype=torch.bool)), "MinConv2dGRUCell: reset must be"),
    ):
        with pytest.raises(torch.jit.Error) as caught:
            cell(*args)
        assert message in str(caught.value)


@scripted_slowly_or_not
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_width_layers_round_once_after_the_convolution(dtype, scripted):
    rnn = make(dtype, kernel_size=1)
    run = torch.jit.script(rnn) if scripted else rnn
    x = torch.randn(2, 300, IN, 2, 2, dtype=dtype)
    out, _ = run(x)
    gate, candidate = rnn.layers[0].conv(x.flatten(0, 1)).double().view(2, 300, 2, 6, 2, 2).unbind(2)
    assert reference.relative_error(out, reference.mingru(gate, candidate)) <= 1.001 * torch.finfo(dtype).eps / 2


@scripted_slowly_or_not
@pytest.mark.parametrize("learned", [False, True])
def test_autocast_keeps_the_states_in_float32(scripted, learned):
    rnn = make(torch.float32, num_layers=2, kernel_size=1, learn_initial_state=learned)
    run = torch.jit.script(rnn) if scripted else rnn
    for dtype in [torch.float32] if scripted else [torch.float32, torch.bfloat16]:
        x = torch.randn(2, 200, IN, 2, 2, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            out, states = run(x)
            gate, candidate = rnn.layers[0].conv(x.flatten(0, 1)).double().view(2, 200, 2, 6, 2, 2).unbind(2)
            pieces = None
            for piece in x.split([100, 1, 99], 1):
                _, pieces = run(piece, pieces)
        assert out.dtype == torch.bfloat16
        assert {state.dtype for state in states} == {torch.float32}
        initial = rnn.layers[0].initial_state[0].double() if learned else 0.5
        true_state = reference.mingru(gate, candidate, None, None, "positive", initial)[:, -1:]
        # Float32 in more than name: nothing was rounded to half width on the way.
        assert reference.relative_error(states[0], true_state) <= 2e-6
        assert_close(pieces[0], states[0])
    if not scripted:
        with torch.autocast("cpu", torch.bfloat16):
            _, states = rnn(x, [state.bfloat16() for state in states])
        assert {state.dtype for state in states} == {torch.float32}


def test_parameter_names_and_shapes():
    def shapes(hidden_dims=8, kernel_size=(3, 5), **options):
        rnn = MinConv2dGRU(4, hidden_dims, kernel_size, **options)
        names = [name for name in rnn.state_dict() if not name.endswith("_mark")]
        assert names == [name for name, _ in rnn.named_parameters()]
        return {name.removeprefix("layers."): tuple(weight.shape) for name, weight in rnn.named_parameters()}

    first = {"0.conv.weight": (16, 4, 3, 5), "0.conv.bias": (16,)}
    assert shapes() == first
    assert shapes(bias=False) == {"0.conv.weight": (16, 4, 3, 5)}
    assert shapes(groups=2) == {"0.conv.weight": (16, 2, 3, 5), "0.conv.bias": (16,)}
    second = {"1.conv.weight": (12, 8, 1, 1), "1.conv.bias": (12,)}
    assert shapes([8, 6], [(3, 5), 1], num_layers=2) == {**first, **second}
    back = {"0.conv_reverse.weight": (16, 4, 3, 5), "0.conv_reverse.bias": (16,)}
    assert shapes(bidirectional=True) == {**first, **back}
    align = {"0.align.weight": (8, 4, 3, 5)}
    assert shapes(residual=True) == {**first, **align}
    assert shapes(residual=True, groups=2)["0.align.weight"] == (8, 2, 3, 5)
    assert shapes(residual=True, bidirectional=True)["0.align.weight"] == (16, 4, 3, 5)
    assert shapes(residual=True, padding="same")["0.align.weight"] == (8, 4, 3, 5)
    # Channels and space as they were: no map. A kernel of 1 with padding makes space grow.
    assert "0.align.weight" not in shapes(4, residual=True, padding="same")
    assert "0.align.weight" not in shapes(4, residual=True, padding=(1, 2))
    assert "0.align.weight" not in shapes(2, residual=True, padding=(1, 2), bidirectional=True)
    assert "0.align.weight" in shapes(4, residual=True, padding=(1, 1))
    assert "0.align.weight" in shapes(4, 1, residual=True, padding=1)
    assert "0.align.weight" in shapes(4, 1, residual=True, stride=(1, 2))
    assert shapes(norm="group") == {"0.norm.weight": (4,), "0.norm.bias": (4,), **first}
    assert shapes(learn_initial_state=True) == {"0.initial_state": (1, 1, 1, 8, 1, 1), **first}
    learned = shapes([8, 6], [(3, 5), 1], num_layers=2, bidirectional=True, learn_initial_state=True)
    assert learned["0.initial_state"] == (2, 1, 1, 8, 1, 1)
    assert learned["1.initial_state"] == (2, 1, 1, 6, 1, 1)
    assert shapes(candidate="tanh", batch_first=False) == shapes()


@pytest.mark.parametrize("kinds", [LAYERS, CELLS], ids=["layers", "cells"])
def test_repr_says_what_is_not_default(kinds):
    assert kinds[2](3, 8, 3).extra_repr() == "3, 8, 3"
    options = {"stride": (1, 2), "padding": 1, "dilation": (2, 1), "groups": 2, "bias": False}
    if kinds is LAYERS:
        options = {"num_layers": 2, **options, "dropout": 0.25, "bidirectional": True, "residual": True}
        options["stride"], options["padding"] = [(1, 2), 1], [1, "same"]
    options |= {"norm": "group", "candidate": "tanh", "learn_initial_state": True}
    if kinds is LAYERS:
        options["batch_first"] = False
    rnn = kinds[2](4, [8, 6][: options.get("num_layers", 1)], 3, **options)
    hidden = [8, 6][: options.get("num_layers", 1)]
    assert rnn.extra_repr() == f"4, {hidden}, 3, " + ", ".join(f"{name}={value!r}" for name, value in options.items())
    again = eval(f"kinds[2]({rnn.extra_repr()})", {"kinds": kinds})
    assert repr(again) == repr(rnn)


def test_lists_are_the_callers_own():
    stride = [1, 2]
    rnn = MinConv1dGRU(2, 2, 1, 2, stride=stride)
    before = repr(rnn)
    stride[0] = 5
    assert repr(rnn) == before


# What is refused

X = torch.zeros(2, 5, 3, 6, 6)
NO = torch.zeros(2, 5, dtype=torch.bool)
H = torch.zeros(2, 1, 8, 6, 6)

BAD_CALLS = {
    **wrong_tensors("x", X, "the layer's weight"),
    **wrong_resets("(B, S)", 2, 5),
    "x without batch": (
        {"x": X[0]},
        ValueError,
        r"x must be \(B, S, 3, \*space\) because input_dims is 3 and space is 2-dimensional, got \(5, 3, 6, 6\)",
    ),
    "x of other channels": (
        {"x": X[:, :, :2]},
        ValueError,
        r"x must be \(B, S, 3, \*space\) .*, got \(2, 5, 2, 6, 6\)",
    ),
    "x with channels last": ({"x": X.movedim(2, -1)}, ValueError, r"x must be .*, got \(2, 5, 6, 6, 3\)"),
    "x is None": ({"x": None}, TypeError, r"x must be a tensor, got NoneType"),
    "x too small for the first layer": (
        {"x": X[..., :0]},
        ValueError,
        r"x must be at least \(1, 1\) in space at the input of layer 0, .*, got \(6, 0\); pad more",
    ),
    "x too small for the second layer": (
        {"x": X[..., :3]},
        ValueError,
        r"x must be at least \(3, 5\) in space at the input of layer 1, which has kernel_size \(3, 5\), "
        r"stride \(1, 1\), padding \(0, 0\), dilation \(1, 1\), got \(6, 3\)",
    ),
    "h is a tensor": (
        {"h": H},
        TypeError,
        r"h must be a list of 2 states, one for each layer and direction, got Tensor",
    ),
    "h is a number": ({"h": 0.5}, TypeError, r"h must be a list of 2 states, .*, got float"),
    "h of one layer": ({"h": [H]}, ValueError, r"h must be a list of 2 states, .*, got 1"),
    "h of three layers": ({"h": [H] * 3}, ValueError, r"h must be a list of 2 states, .*, got 3"),
    "h with None": ({"h": [H, None]}, TypeError, r"h\[1\] must be a tensor, got NoneType"),
    "h of another layer": (
        {"h": [H, H]},
        ValueError,
        r"h\[1\] must be expandable to \(B, 1, H, \*space\) = \(2, 1, 4, 4, 2\), got \(2, 1, 8, 6, 6\)",
    ),
    "h of other batch": ({"h": [H[:1].expand(3, 1, 8, 6, 6)] * 2}, ValueError, r"h\[0\] must be expandable to"),
    "h of too many dimensions": ({"h": [H[None]] * 2}, ValueError, r"h\[0\] must be expandable to"),
    "h of float64": ({"h": [H.double()] * 2}, TypeError, r"h\[0\] must be torch\.float32 like x, got torch\.float64"),
    "h on another device": ({"h": [H.to("meta")] * 2}, ValueError, r"h\[0\] must be on cpu like x, .*meta"),
}


def test_bad_calls():
    rnn = MinConv2dGRU(3, [8, 4], [3, (3, 5)], 2, padding=[1, 0])
    x = torch.randn(2, 5, 3, 6, 6)
    expected = rnn(x)
    assert_refused(lambda **args: rnn(**{"x": x, **args}), BAD_CALLS, "MinConv2dGRU: ")
    assert_close(rnn(x), expected, rtol=0, atol=0)
    # A tuple of valid states is valid too.
    assert_close(rnn(x, tuple(expected[1])), rnn(x, expected[1]), rtol=0, atol=0)


def test_bad_calls_in_the_order_of_time():
    rnn = MinConv1dGRU(3, 8, 1, batch_first=False)
    with pytest.raises(
        ValueError, match=r"^MinConv1dGRU: x must be \(S, B, 3, \*space\) because input_dims is 3 and space is 1-"
    ):
        rnn(torch.zeros(5, 3, 6))
    with pytest.raises(ValueError, match=r"^MinConv1dGRU: reset must be \(S, B\) = \(5, 2\), got \(2, 5\)"):
        rnn(torch.zeros(5, 2, 3, 6), reset=NO)
    with pytest.raises(ValueError, match=r"^MinConv1dGRU: h\[0\] must be .* = \(2, 1, 8, 6\), got \(5, 1, 8, 6\)"):
        rnn(torch.zeros(5, 2, 3, 6), [torch.zeros(5, 1, 8, 6)])


BAD_CELL_CALLS = {
    **wrong_tensors("x", X[:, 0], "the layer's weight"),
    **wrong_tensors("h", H[:, 0, :, :4, :4], "x"),
    **wrong_resets("(B,)", 2),
    "x of a sequence": (
        {"x": torch.zeros(2, 5, 3, 6, 6)},
        ValueError,
        r"x must be \(B, 3, \*space\) because input_dims is 3 and space is 2-dimensional, got \(2, 5, 3, 6, 6\)",
    ),
    "x of other channels": (
        {"x": torch.zeros(2, 4, 6, 6)},
        ValueError,
        r"x must be \(B, 3, \*space\) .*, got \(2, 4, 6, 6\)",
    ),
    "x of other channels, unbatched": (
        {"x": torch.zeros(4, 6, 6)},
        ValueError,
        r"x must be \(3, \*space\) .*, got \(4, 6, 6\)",
    ),
    "x is None": ({"x": None}, TypeError, r"x must be a tensor, got NoneType"),
    "x too small": (
        {"x": torch.zeros(2, 3, 2, 6)},
        ValueError,
        r"x must be at least \(3, 3\) in space .*, got \(2, 6\)",
    ),
    "h of a layer": (
        {"h": torch.zeros(2, 1, 8, 4, 4)},
        ValueError,
        r"h must be expandable to \(B, H, \*space\) = \(2, 8, 4, 4\), got \(2, 1, 8, 4, 4\)",
    ),
    "h of the input's space": (
        {"h": torch.zeros(2, 8, 6, 6)},
        ValueError,
        r"h must be .* = \(2, 8, 4, 4\), got \(2, 8, 6, 6\)",
    ),
    "h with a batch beside x without": (
        {"x": torch.zeros(3, 6, 6), "h": torch.zeros(1, 8, 4, 4)},
        ValueError,
        r"h must be expandable to \(H, \*space\) = \(8, 4, 4\), got \(1, 8, 4, 4\)",
    ),
    "reset with a batch beside x without": (
        {"x": torch.zeros(3, 6, 6), "reset": NO[0, :1]},
        ValueError,
        r"reset must be a scalar = \(\), got \(1,\)",
    ),
}


def test_bad_calls_of_a_cell():
    cell, x = MinConv2dGRUCell(3, 8, 3), torch.zeros(2, 3, 6, 6)
    assert_refused(lambda **args: cell(**{"x": x, **args}), BAD_CELL_CALLS, "MinConv2dGRUCell: ")


NUMBERS = "an int, a tuple of 2 ints, or a list of these with one for each layer"
BAD_OPTIONS = {
    **WRONG_LAYER_OPTIONS,
    **wrong_values("norm", "one of None, 'group'", values=("layer",)),
    **wrong_values("hidden_dims", "an int, or a list of ints with one for each layer", types=((8, 8),)),
    **wrong_values("hidden_dims", "a list of 2 entries because num_layers is 2", values=([8],)),
    **wrong_values("kernel_size", "a list of 2 entries because num_layers is 2", values=([3, 3, 3],)),
    **wrong_values("stride", "a list of 2 entries because num_layers is 2", values=([1],)),
    **wrong_values("padding", "a list of 2 entries because num_layers is 2", values=(["same"],)),
    **wrong_values("dilation", "a list of 2 entries because num_layers is 2", values=([],)),
    **wrong_values("kernel_size", NUMBERS, types=(3.0, None, "same"), values=((3, 3, 3),)),
    **wrong_values("padding", NUMBERS, types=("full",)),
    **wrong_values("padding", "at least 0", values=(-1,)),
    **wrong_values("groups", "at least 1", values=(0,)),
    **wrong_values("groups", "a divisor of input_dims=4 and hidden_dims=8", values=(3,)),
    "hidden_dims of 0": ({"hidden_dims": [8, 0]}, ValueError, "hidden_dims must be at least 1, got 0"),
    "kernel_size of 0": ({"kernel_size": (3, 0)}, ValueError, "kernel_size must be at least 1, got 0"),
    "kernel_size twice listed": ({"kernel_size": [[3, 3], 3]}, TypeError, r"kernel_size must be .*, got \[3, 3\]"),
    "stride of 0": ({"stride": [1, (0, 1)]}, ValueError, "stride must be at least 1, got 0"),
    "padding 'same' with a stride": (
        {"padding": [0, "same"], "stride": [2, (1, 2)]},
        ValueError,
        r"padding must be a number because stride is \(1, 2\), got 'same'; 'same' needs a stride of 1",
    ),
    "groups that divide one layer": (
        {"hidden_dims": [8, 5], "groups": 2},
        ValueError,
        r"groups must be a divisor .*\[8, 5\]",
    ),
}


def test_bad_options():
    sizes = {"input_dims": 4, "hidden_dims": 8, "kernel_size": 1, "num_layers": 2}
    assert_refused(lambda **options: MinConv2dGRU(**{**sizes, **options}), BAD_OPTIONS, "MinConv2dGRU: ")


def test_space_of_one_dimension_takes_a_tuple_of_one():
    assert repr(MinConv1dGRU(2, 2, (3,), padding=(1,)).layers) == repr(MinConv1dGRU(2, 2, 3, padding=1).layers)
    with pytest.raises(ValueError, match=r"kernel_size must be an int, or a list of these .*, got \(3, 3\)"):
        MinConv1dGRU(2, 2, (3, 3))


def test_a_convolution_of_another_class_sees_the_whole_batch(monkeypatch):
    class Centred(torch.nn.Conv2d):
        def forward(self, x):
            out = super().forward(x)
            return out - out.mean(0, keepdim=True)

    rnn = build(padding=1)
    old = rnn.layers[0].conv
    rnn.layers[0].conv = Centred(old.in_channels, old.out_channels, old.kernel_size, padding=1).to(old.weight.dtype)
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 1 << 12)
    x = torch.randn(4, 8, IN, 5, 5, dtype=old.weight.dtype)
    expected, _ = rnn(x)
    with torch.no_grad():
        assert_close(rnn(x)[0], expected)
