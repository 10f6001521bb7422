"""`Block` and `LanguageModel` in training and deployment."""

import pytest
import torch
from torch import nn

from mingru.models import Block, LanguageModel, map_state

VOCAB, DIMS = 11, 8
GIVEN = {"all": ("state", "reset", "lengths")}


def make(cell="mingru", **options):
    """Return a model of two blocks, the same for the same options."""
    torch.manual_seed(0)
    return LanguageModel(VOCAB, DIMS, 2, cell=cell, expansion=1.5, conv=4, mlp=2, **options)


def ids_of(batch, steps):
    return torch.randint(VOCAB, (batch, steps))


def arguments(lm, given, batch=2, steps=7):
    """Return keyword arguments of the model: ids, and random values of what is given."""
    values = {
        "ids": ids_of(batch, steps),
        "state": map_state(torch.randn_like, lm.initial_state(batch)),
        "reset": torch.rand(batch, steps) < 0.3,
        "lengths": torch.randint(1, steps + 1, (batch,)),
    }
    return {name: values[name] for name in ("ids", *given)}


def loss_of(outputs):
    logits, state = outputs
    return logits.square().mean() + sum(each.square().mean() for each in state)


def assert_equal(got, expected, **tolerance):
    torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("given", [(), ("reset",), ("lengths",), ("reset", "lengths")])
def test_states_are_not_views(given):
    """Otherwise they could not be detached in place."""
    lm = make()
    logits, state = lm(**arguments(lm, given))
    for each in [logits, *state]:
        assert each.grad_fn is not None and each.is_contiguous()
        each.detach_()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_values_in_the_padding_do_not_matter(checkpoint):
    block = Block(DIMS, conv=3, mlp=2, checkpoint=checkpoint, dtype=torch.float64)
    x, lengths = torch.randn(2, 7, DIMS, dtype=torch.float64), torch.tensor([3, 7])
    results = []
    for value in (0.0, torch.nan):
        x = x.detach()
        x[0, 3:] = value
        x.requires_grad_()
        out, h = block(x, lengths=lengths)
        results.append([out, *h, *torch.autograd.grad(loss_of((out, h)), [x, *block.parameters()])])
    assert_equal(results[1], results[0], rtol=0, atol=0)


def linear_maps(lm):
    return [each for each in lm.modules() if isinstance(each, nn.Linear)]


def check_quantized(quantized, dequantized):
    """Check logits and generated tokens, with a given state, against a model of the same rounded weights."""
    args = arguments(dequantized, GIVEN["all"])
    prompts = [torch.arange(5), torch.arange(3)]
    with torch.no_grad():
        assert_equal(quantized(**args), dequantized(**args))
    found, expected = (
        lm.generate(prompts, 6, temperature=0, state=lm.initial_state(2)) for lm in (quantized, dequantized)
    )
    assert_equal(found, expected)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel and other:UserWarning")
def test_linear_maps_without_parameters():
    """The maps of torch.ao.quantization have their weights elsewhere."""
    quantized = torch.ao.quantization.quantize_dynamic(make().eval(), {nn.Linear}, dtype=torch.float16)
    assert not list(quantized.blocks.layers[0].out.parameters())
    dequantized = make().eval()
    for each in linear_maps(dequantized):
        each.weight.data = each.weight.half().float()
    check_quantized(quantized, dequantized)
