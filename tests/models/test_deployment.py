"""`Block` and `LanguageModel` compiled, checkpointed and quantized.

Each way is compared with eager mode. tests/modes runs `Block` in every mode. These tests are about a model of several
blocks, its states and `generate`.
"""

import copy
import pickle

import pytest
import torch
from cases import graded, loss_of, tensors
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

from mingru.models import LanguageModel, map_state

VOCAB, DIMS = 11, 8
GIVEN = {
    "ids": (),
    "state": ("state",),
    "reset": ("state", "reset"),
    "lengths": ("state", "lengths"),
    "all": ("state", "reset", "lengths"),
}


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
        "state": map_state(torch.randn_like, lm.initial(batch)),
        "reset": torch.rand(batch, steps) < 0.3,
        "lengths": torch.randint(1, steps + 1, (batch,)),
    }
    return {name: values[name] for name in ("ids", *given)}


# torch.compile


compiling = pytest.mark.usefixtures("_fresh_compiler")


@compiling
@pytest.mark.parametrize("checkpoint", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compile(checkpoint):
    """One graph for the first size and one for all others. tests/modes compiles a block with inductor."""
    lm = make(dtype=torch.float64, checkpoint=checkpoint)
    compiled = torch.compile(lm, fullgraph=True, backend="aot_eager" if checkpoint else "eager")
    for batch, steps in [(2, 7), (3, 9), (4, 40)]:
        args = arguments(lm, GIVEN["all"] if checkpoint else ("state",), batch, steps)
        assert_close(graded(lm, compiled, args), graded(lm, lm, args))
    assert counters["stats"]["unique_graphs"] == 2


@compiling
@pytest.mark.slow
def test_generate_with_compiled_blocks():
    lm = make().eval()
    prompts = ids_of(3, 9)
    expected = lm.generate(prompts, 8, temperature=0)
    for block in lm.blocks.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    assert_close(lm.generate(prompts, 8, temperature=0), expected)
    num_graphs = counters["stats"]["unique_graphs"]
    lm.generate(prompts, 20, temperature=0)
    assert counters["stats"]["unique_graphs"] == num_graphs > 0


# Activation checkpointing


def test_checkpoint_has_equal_gradients():
    """The recomputation uses the same random numbers for dropout."""
    for given in GIVEN.values():
        stored, recomputed = (make("minlstm", checkpoint=checkpoint, dropout=0.4) for checkpoint in (False, True))
        args, found = arguments(stored, given), []
        for lm in (stored, recomputed):
            torch.manual_seed(1)
            found.append(graded(lm, lm, args))
        assert_close(*found)


@pytest.mark.parametrize(("mode", "calls"), [("training", 2), ("eval", 1), ("no_grad", 1)])
def test_checkpoint_recomputes_only_in_training(mode, calls):
    lm = make(checkpoint=True).train(mode != "eval")
    found = []
    lm.blocks.layers[0].rnn.register_forward_hook(lambda *_: found.append(1))
    with torch.set_grad_enabled(mode != "no_grad"):
        loss = loss_of(tensors(lm(ids_of(2, 7))))
    if mode != "no_grad":
        loss.backward()
    assert len(found) == calls


# Copies


def test_copies_are_tied():
    lm = make()
    args = arguments(lm, GIVEN["all"])
    for other in (copy.deepcopy(lm), pickle.loads(pickle.dumps(lm))):
        with torch.no_grad():
            other.embedding.weight.zero_()
        assert lm.embedding.weight.abs().min() > 0
        assert other(**args)[0].abs().max() == 0, "the output layer is the copy's own embedding"


# Quantization


def linear_maps(lm):
    return [each for each in lm.modules() if isinstance(each, nn.Linear)]


def check_quantized(quantized, dequantized):
    """Check logits and generated tokens, with a given state, against a model of the same rounded weights."""
    args, prompts = arguments(dequantized, GIVEN["all"]), [torch.arange(5), torch.arange(3)]
    with torch.no_grad():
        assert_close(quantized(**args), dequantized(**args))
    models = (quantized, dequantized)
    assert_close(*(lm.generate(prompts, 6, temperature=0, state=lm.initial(2)) for lm in models))


def test_torchao_int8_weights():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantized, dequantized = (make(tied=False).eval() for _ in range(2))
    quantize_(quantized, Int8WeightOnlyConfig(set_inductor_config=False))
    for one, other in zip(linear_maps(quantized), linear_maps(dequantized), strict=True):
        assert type(one.weight.data) is not torch.Tensor
        rounded = one.weight.dequantize()
        assert not torch.equal(rounded, other.weight)
        other.weight.data = rounded
    check_quantized(quantized, dequantized)


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
