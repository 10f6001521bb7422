"""Convolutional layers and cells: slices, geometry and memory. For the rest: tests/properties."""

import copy
import functools
import itertools

import pytest
import torch
from cases import DOUBLE, IMAGES, TIGHT, grid, parametrized, some
from torch import nn
from torch.testing import assert_close

from mingru import MinConv1dGRU, MinConv2dGRU, MinConv3dGRU, ops
from mingru.ops import in_cache

IMAGE = (4, 8, 4, 5, 5)


# Slices, which stand in for the whole where no gradient is wanted


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


@pytest.fixture
def use_slices(monkeypatch):
    """Let slices have so many bytes."""
    return functools.partial(monkeypatch.setattr, in_cache, "_SLICE_BYTES")


@parametrized(some(IMAGES, 3))
def test_slices_equal_the_whole(case, use_slices, monkeypatch):
    rnn, given = case.varied(**DOUBLE), case.given(5, 9, **DOUBLE)
    for images in (2, 3, 10):
        whole = case.call(rnn, **given)
        # So many images of the first layer's pre-activations are a slice.
        state = whole[1][0][0]
        use_slices(images * 2 * state.numel() * state.element_size())
        with monkeypatch.context() as patch:
            seen = count_convolutions(rnn.layers[0].conv, patch)
            with torch.inference_mode():
                assert_close(case.call(rnn, **given), whole, **TIGHT)
            assert len(seen) > 1 and sum(seen) == 45 and max(seen) <= images
            seen.clear()
            case.call(rnn, **given)
            assert seen == [45], "with a gradient"


def test_a_state_is_not_rounded_between_slices(use_slices, monkeypatch):
    rnn, x = MinConv2dGRU(4, 6, 1, dtype=torch.bfloat16), torch.randn(2, 300, 4, 2, 2, dtype=torch.bfloat16)
    expected = rnn(x), rnn(x, [torch.full((1,), 0.5)])
    use_slices(1 << 10)
    seen = count_convolutions(rnn.layers[0].conv, monkeypatch)
    with torch.no_grad():
        assert_close((rnn(x), rnn(x, [torch.full((1,), 0.5)])), expected, rtol=0, atol=0)
    assert len(seen) > 100


def test_slices_are_no_smaller_than_two_images_and_no_larger_than_the_cache(use_slices, monkeypatch):
    rnn = MinConv2dGRU(4, 6, 3, padding=1)
    size = 4 * 12 * 25
    seen = count_convolutions(rnn.layers[0].conv, monkeypatch)
    # Four images in a slice; fewer than four slices; two images of half the size; of twice; far too large.
    for most, batches in ((4 * size, [4] * 8), (9 * size, [32]), (size, [2] * 16), (size / 2, [2] * 16), (1, [32])):
        use_slices(most)
        seen.clear()
        with torch.no_grad():
            rnn(torch.randn(IMAGE))
        assert seen == batches


class Centered(nn.Conv2d):
    def forward(self, x):
        out = super().forward(x)
        return out - out.mean(0, keepdim=True)


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "another class"])
def test_hooks_and_other_classes_see_the_whole_batch(kind, use_slices):
    rnn, x, seen = MinConv2dGRU(4, 6, 3, padding=1), torch.randn(IMAGE), []
    expected = rnn(x)
    use_slices(1 << 12)
    if kind == "another class":
        rnn.layers[0].conv.__class__ = Centered
        expected = rnn(x)
    else:
        getattr(rnn.layers[0].conv, kind)(lambda module, args, *_: seen.append(len(args[0])))
    with torch.no_grad():
        assert_close(rnn(x), expected)
    assert seen == ([] if kind == "another class" else [32])


def test_slices_make_way_for_transforms_and_autocast(use_slices):
    rnn, x = MinConv2dGRU(4, 6, 3, padding=1, **DOUBLE), torch.randn(2, *IMAGE, **DOUBLE)
    expected = torch.stack([rnn(one)[0] for one in x])
    use_slices(1 << 13)
    with torch.no_grad():
        assert_close(torch.func.vmap(lambda one: rnn(one)[0])(x), expected, **TIGHT)
        with torch.autocast("cpu", torch.bfloat16):
            assert copy.deepcopy(rnn).float()(x[0].float())[0].dtype == torch.bfloat16


# Geometry


@grid(dilation=[1, 2, (1, 3)], padding=[0, 1, 2, (1, 2), "same"])
def test_space_is_what_the_convolution_makes(dilation, padding):
    for stride, kernel_size in itertools.product([1] if padding == "same" else [1, 2, (2, 1)], [1, 3, (3, 5)]):
        # Not on "meta", where torch 2.11 takes a kernel that is larger than the space.
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        module = nn.Conv2d(1, 1, kernel_size, **options)
        layer = MinConv2dGRU(1, 1, kernel_size, residual=True, **options).layers[0]
        made = {}
        for space in itertools.chain(*(((size, 20), (20, size)) for size in range(1, 17))):
            try:
                made[space] = tuple(module(torch.zeros(1, 1, *space)).shape[2:])
            except RuntimeError:
                made[space] = None
            fits = all(size >= reach for size, reach in zip(space, layer.geometry.reach(), strict=True))
            assert (layer.geometry.space(space) if fits else None) == made[space]
        # The residual needs no map where no space comes out in another size.
        assert (layer.align is None) == all(space == expected for space, expected in made.items())


def test_norm_has_groups_of_sixteen_channels_or_more():
    # By hand: one for few channels; then as many as divide evenly; 32 at most.
    for channels, groups in {1: 1, 31: 1, 32: 2, 37: 1, 48: 3, 50: 2, 64: 4, 512: 32, 2048: 32}.items():
        norm = MinConv1dGRU(channels, 1, 1, norm="group", device="meta").layers[0].norm
        assert (norm.num_groups, norm.num_channels) == (groups, channels)


# Memory


@grid(batch_first=[True, False], kind=[MinConv1dGRU, MinConv2dGRU, MinConv3dGRU], grad=[False, True])
def test_gates_and_candidates_are_views_of_the_convolution(batch_first, kind, grad, monkeypatch):
    rnn, made, given = kind(4, 6, 3, batch_first=batch_first), [], []
    x = torch.randn(3, 5, 4, *[4] * rnn.num_space_dims)
    conv, run = rnn.layers[0].conv.forward, ops.autograd.run_kernel
    monkeypatch.setattr(rnn.layers[0].conv, "forward", lambda x: made.append((x, conv(x))) or made[-1][1])
    monkeypatch.setattr(ops.autograd, "run_kernel", lambda *args: given.append(args[2].tensors) or run(*args))
    with torch.set_grad_enabled(grad):
        out, _ = rnn(x)
    ((images, pre),), (inputs,) = made, given
    assert images.data_ptr() == x.data_ptr(), "x was copied"
    for index, half in enumerate(inputs):
        assert half.data_ptr() == pre[:, 6 * index].data_ptr(), "copied"
        assert half[0, 0].is_contiguous() and half.shape[:2] == x.shape[:2]
    assert out.is_contiguous(), "the output lies in another order than the input"


def test_lists_and_tuples_are_the_callers_own():
    stride, x = [1, 2], torch.randn(2, 5, 4, 6, 6)
    rnn = MinConv2dGRU(4, 8, 1, 2, stride=stride)
    before = repr(rnn)
    stride[0] = 5
    assert repr(rnn) == before
    _, states = rnn(x)
    assert_close(rnn(x, tuple(states)), rnn(x, states), rtol=0, atol=0)
