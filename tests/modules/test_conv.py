"""Convolutional layers and cells: blocks, geometry, memory, names and wrong calls. For the rest: tests/properties."""

import copy
import itertools
import warnings

import pytest
import torch
from cases import DOUBLE, IMAGES, parametrized, some
from refusals import (
    WRONG_LAYER_OPTIONS,
    assert_refused,
    by_message,
    wrong_resets,
    wrong_shapes,
    wrong_tensors,
    wrong_values,
)
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
TIGHT = {"rtol": 1e-9, "atol": 1e-9}

# By the number of space dimensions.
LAYERS = {1: MinConv1dGRU, 2: MinConv2dGRU, 3: MinConv3dGRU}
CELLS = {1: MinConv1dGRUCell, 2: MinConv2dGRUCell, 3: MinConv3dGRUCell}


def build(space=2, hidden_dims=6, kernel_size=3, num_layers=1, *, kinds=LAYERS, **options):
    many = {"num_layers": num_layers} if kinds is LAYERS else {}
    return kinds[space](IN, hidden_dims, kernel_size, **many, **options)


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


@parametrized(some(IMAGES, 3))
def test_blocks_equal_the_whole(case, monkeypatch):
    rnn, given = case.varied(**DOUBLE), case.given(5, 9, **DOUBLE)
    for images in (2, 3, 10):
        whole = case.call(rnn, **given)
        # So many images of the first layer's pre-activations are a block.
        state = whole[1][0][0]
        monkeypatch.setattr(blocks, "_BLOCK_BYTES", images * 2 * state.numel() * state.element_size())
        with monkeypatch.context() as patch:
            seen = count_convolutions(rnn.layers[0].conv, patch)
            with torch.inference_mode():
                in_blocks = case.call(rnn, **given)
            assert len(seen) > 1
            assert sum(seen) == 45
            assert max(seen) <= images
            assert_close(in_blocks, whole, **TIGHT)
            seen.clear()
            case.call(rnn, **given)
            assert seen == [45], "with a gradient"


def test_a_state_is_not_rounded_between_blocks(monkeypatch):
    rnn = build(kernel_size=1, dtype=torch.bfloat16)
    x = torch.randn(2, 300, IN, 2, 2, dtype=torch.bfloat16)
    expected = rnn(x), rnn(x, [torch.full((1,), 0.5)])
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 1 << 10)
    seen = count_convolutions(rnn.layers[0].conv, monkeypatch)
    with torch.no_grad():
        assert_close((rnn(x), rnn(x, [torch.full((1,), 0.5)])), expected, rtol=0, atol=0)
    assert len(seen) > 100


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
    rnn = build(padding=1).double()
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
    rnn, x = build(groups=2, bidirectional=True, residual=True).double(), torch.randn(B, S, IN, 4, 4).double()
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


def test_norm_has_groups_of_sixteen_channels_or_more():
    # By hand: one for few channels; then as many as divide evenly; 32 at most.
    expected = {1: 1, 3: 1, 31: 1, 32: 2, 37: 1, 48: 3, 50: 2, 64: 4, 512: 32, 2048: 32}
    for channels, groups in expected.items():
        rnn = MinConv1dGRU(channels, 1, 1, norm="group", device="meta")
        assert (rnn.layers[0].norm.num_groups, rnn.layers[0].norm.num_channels) == (groups, channels)


# Memory


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("space", [1, 2, 3])
@pytest.mark.parametrize("batch_first", [True, False])
def test_gates_and_candidates_are_views_of_the_convolution(batch_first, space, grad, monkeypatch):
    rnn = build(space=space, batch_first=batch_first)
    x = torch.randn(B, S, IN, *[4] * space)
    made, given = [], []
    inner_conv, inner_run = rnn.layers[0].conv.forward, ops.autograd.run_kernel
    monkeypatch.setattr(rnn.layers[0].conv, "forward", lambda x: made.append((x, inner_conv(x))) or made[-1][1])
    monkeypatch.setattr(
        ops.autograd,
        "run_kernel",
        lambda which, call, keep: given.append(call.tensors) or inner_run(which, call, keep),
    )
    x = x if batch_first else x.transpose(0, 1).contiguous()
    with torch.set_grad_enabled(grad):
        out, _ = rnn(x)
    ((images, pre),), (inputs,) = made, given
    assert images.data_ptr() == x.data_ptr(), "x was copied"
    for index, half in enumerate(inputs):
        assert half.data_ptr() == pre[:, 6 * index].data_ptr(), "copied"
        assert half[0, 0].is_contiguous()
        assert half.shape[:2] == x.shape[:2]
    assert out.is_contiguous(), "the output lies in another order than the input"


# Cells


def test_a_cell_without_a_batch_is_told_from_one():
    """A batch of IN images, and one image with IN channels, have their channels in different places."""
    cell = build(kinds=CELLS, space=1, kernel_size=1)
    assert cell(torch.zeros(IN, IN, 7)).shape == (IN, 6, 7)
    assert cell(torch.zeros(IN, 7)).shape == (6, 7)


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
SPACE = r"\*space\) because input_dims is 3 and space is 2-dimensional"

COUNT, SPACE_AT = (
    "h must be a list of 2 states, one for each layer and direction, got",
    "in space at the input of layer",
)
EXPANDABLE = "h[{}] must be expandable to (B, 1, H, *space) = (2, 1, {}), got"
OF_LAYER_1 = "which has kernel_size (3, 5), stride (1, 1), padding (0, 0), dilation (1, 1), got (6, 3)"
BAD_CALLS = {
    **wrong_tensors("x", X, "the layer's weight"),
    **wrong_resets("(B, S)", 2, 5),
    **wrong_shapes("x", rf"\(B, S, 3, {SPACE}", X[0], X[:, :, :2], X.movedim(2, -1)),
    "x too small": ({"x": X[..., :0]}, ValueError, rf"x must be at least \(1, 1\) {SPACE_AT} 0, .*, got \(6, 0\); pad"),
    **by_message(
        [
            ({"x": X[..., :3]}, ValueError, f"x must be at least (3, 5) {SPACE_AT} 1, {OF_LAYER_1}"),
            ({"h": H}, TypeError, f"{COUNT} Tensor"),
            ({"h": 0.5}, TypeError, f"{COUNT} float"),
            ({"h": [H]}, ValueError, f"{COUNT} 1"),
            ({"h": [H] * 3}, ValueError, f"{COUNT} 3"),
            ({"h": [H, None]}, TypeError, "h[1] must be a tensor, got NoneType"),
            ({"h": [H, H]}, ValueError, f"{EXPANDABLE.format(1, '4, 4, 2')} (2, 1, 8, 6, 6)"),
            ({"h": [H[:1].expand(3, 1, 8, 6, 6), H]}, ValueError, f"{EXPANDABLE.format(0, '8, 6, 6')} (3, 1, 8, 6, 6)"),
            ({"h": [H[None], H]}, ValueError, f"{EXPANDABLE.format(0, '8, 6, 6')} (1, 2, 1, 8, 6, 6)"),
            ({"h": [H.double()] * 2}, TypeError, "h[0] must be torch.float32 like x, got torch.float64"),
            ({"h": [H.to("meta")] * 2}, ValueError, "h[0] must be on cpu like x, got a tensor on meta"),
        ]
    ),
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
    **wrong_shapes("x", rf"\(B, 3, {SPACE}", X, X[:, 0, :2]),
    **wrong_shapes("x", r"\(3, \*space\)", X[0, 0, :2]),
    **wrong_shapes("h", r"expandable to \(B, H, \*space\) = \(2, 8, 4, 4\)", H[..., :4, :4], H[:, 0]),
    "x too small": ({"x": X[:, 0, :, :2]}, ValueError, r"x must be at least \(3, 3\) in space .*, got \(2, 6\)"),
    **by_message(
        [
            (
                {"x": X[0, 0], "h": torch.zeros(1, 8, 4, 4)},
                ValueError,
                "h must be expandable to (H, *space) = (8, 4, 4), got (1, 8, 4, 4)",
            ),
            ({"x": X[0, 0], "reset": NO[0, :1]}, ValueError, "reset must be a scalar = (), got (1,)"),
        ]
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
