"""What is rounded to half width, and what is not: layers and cells of one linear map or convolution."""

import pytest
import reference
import torch
from cases import ONE_MAP, Case, parametrized
from torch.testing import assert_close

every_map = parametrized(ONE_MAP)
half_widths = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def truth(case: Case, module, x, h=None):
    """The states in float64, from what the module's own map makes of x."""
    maps = module.layers[0]
    if module.num_space_dims > 0:
        inputs = maps.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2]).double().chunk(2, 2)
        cell = "mingru"
    else:
        inputs, cell = maps.linear(x).double().chunk(maps.num_parts, 2), module.cell
    initial = dict(module.named_parameters()).get("initial_state")
    initial = None if initial is None else initial[0].double()
    h = None if h is None else h[0].double().reshape(len(x), 1, *inputs[0].shape[2:])
    return reference.CELLS[cell](*inputs, initial if h is None else h, initial=initial)


def assert_last(states, out):
    assert states[0].dtype == torch.float32
    assert reference.relative_error(states[0].flatten(), out[:, -1].flatten()) <= 2e-6


@half_widths
@every_map
def test_half_width_layers_round_once_after_the_map(case, dtype):
    module, x = case.make(dtype=dtype), torch.randn(2, 300, *case.features, dtype=dtype)
    expected = truth(case, module, x)
    if case.is_cell:
        # Its output is its state, which is in float32 if it begins there.
        out, _ = case.call(module, x[:, :1])
        assert reference.relative_error(out, expected[:, :1]) <= 1.001 * torch.finfo(dtype).eps / 2
    else:
        out, _ = case.call(module, x)
        assert reference.relative_error(out, expected) <= 1.001 * torch.finfo(dtype).eps / 2
    if "lengths" in case.takes:
        out, _ = case.call(module, x, lengths=torch.tensor([200, 300]))
        assert reference.relative_error(out[0, :200], expected[0, :200]) <= 1.001 * torch.finfo(dtype).eps / 2
    h = [torch.rand_like(state, dtype=torch.float32) for state in case.call(module, x)[1]]
    _, states = case.call(module, x, h)
    assert_last(states, truth(case, module, x, h))


@every_map
def test_autocast_keeps_the_state_in_float32(case):
    module = case.make()
    for dtype in [torch.float32, torch.bfloat16]:
        x = torch.randn(2, 300, *case.features, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            out, states = case.call(module, x)
            expected = truth(case, module, x)
            pieces = None
            for piece in x.split([100, 1, 199], 1):
                _, pieces = case.call(module, piece, pieces)
            _, again = case.call(module, x, [state.bfloat16() for state in states])
            assert again[0].dtype == torch.float32
        assert out.dtype == (torch.float32 if case.is_cell else torch.bfloat16)
        # Float32 in more than name: nothing was rounded to half width on the way.
        assert_last(states, expected)
        assert_close(pieces, states)
