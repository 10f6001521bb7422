"""The language model: compiled, checkpointed and quantized, its values, arguments, and groups of an optimizer."""

import copy
import math
import pickle

import pytest
import torch
from cases import graded, loss_of, tensors
from options import named
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

from mingru.models import LanguageModel, map_state

VOCAB, DIMS = 11, 8
ALL = ("state", "reset", "lengths")
GIVEN = [(), ("state",), ("state", "reset"), ("state", "lengths"), ALL]


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


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("checkpoint", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compile(checkpoint):
    """One graph for the first size and one for all others. tests/modes compiles a block with inductor."""
    lm = make(dtype=torch.float64, checkpoint=checkpoint)
    compiled = torch.compile(lm, fullgraph=True, backend="aot_eager" if checkpoint else "eager")
    for batch, steps in [(2, 7), (3, 9), (4, 40)]:
        args = arguments(lm, ALL if checkpoint else ("state",), batch, steps)
        assert_close(graded(lm, compiled, args), graded(lm, lm, args))
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.usefixtures("_fresh_compiler")
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
    args = arguments(lm, ALL)
    for other in (copy.deepcopy(lm), pickle.loads(pickle.dumps(lm))):
        with torch.no_grad():
            other.embedding.weight.zero_()
        assert lm.embedding.weight.abs().min() > 0
        assert other(**args)[0].abs().max() == 0, "the output layer is the copy's own embedding"


# Quantization


def test_torchao_int8_weights():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantized, dequantized = (make(tied=False).eval() for _ in range(2))
    quantize_(quantized, Int8WeightOnlyConfig(set_inductor_config=False))
    maps = [[each for each in lm.modules() if isinstance(each, nn.Linear)] for lm in (quantized, dequantized)]
    for one, other in zip(*maps, strict=True):
        assert type(one.weight.data) is not torch.Tensor
        rounded = one.weight.dequantize()
        assert not torch.equal(rounded, other.weight)
        other.weight.data = rounded
    args, prompts = arguments(dequantized, ALL), [torch.arange(5), torch.arange(3)]
    with torch.no_grad():
        assert_close(quantized(**args), dequantized(**args))
    given = {"temperature": 0, "state": quantized.initial(2)}
    assert_close(*(lm.generate(prompts, 6, **given) for lm in (quantized, dequantized)))


# Values and arguments


B, S = 3, 9
OPTIONS = [
    {},
    {"conv": 3, "norm": "layer", "tied": False},
    {"cell": "minlstm", "expansion": 1.5, "learn_initial_state": True, "conv": 4, "mlp": 2},
    {"bias": False, "candidate": "tanh", "mlp": 1, "checkpoint": True},
]
EVERYTHING = {"conv": 3, "mlp": 2, "norm": "layer", "learn_initial_state": True, "tied": False}


def varied(**options):
    lm = LanguageModel(VOCAB, DIMS, 2, **options)
    with torch.no_grad():
        # Norms and initial states that would show if they were forgotten.
        for weight in lm.parameters():
            weight.add_(torch.randn_like(weight) / 4)
    return lm


def test_reset_parameters():
    lm = varied(**EVERYTHING)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.fill_(math.nan)
    lm.reset_parameters()
    fresh = LanguageModel(VOCAB, DIMS, 2, **EVERYTHING)
    for name, parameter in lm.named_parameters():
        assert parameter.isfinite().all(), name
        assert (parameter.std(correction=0) == 0) == (fresh.get_parameter(name).std(correction=0) == 0), name


def test_the_logits_of_the_first_steps():
    """The scale of the logits at initialization is about 1, with the embedding's weight in the output layer or not."""
    for dims in (16, 256):
        lm = LanguageModel(50, dims, 2)
        logits, _ = lm(torch.randint(50, (8, 20)))
        assert 0.5 < logits.std() < 2


def test_states_and_forms_of_arguments():
    lm, ids = varied(conv=3, learn_initial_state=True), ids_of(B, S)
    _, state = lm(ids)
    doubled = map_state(lambda each: each * 2, tuple(state))
    assert isinstance(doubled, list)
    assert all(torch.equal(one, 2 * other) for one, other in zip(doubled, state, strict=True))
    assert not any(each.requires_grad for each in map_state(torch.Tensor.detach, state))
    assert_close((lm(ids.int()), lm(ids, lm.initial(B))), (lm(ids), lm(ids)), rtol=0, atol=0)
    # Views could not be detached in place.
    assert not any(each._is_view() for each in lm(ids, lengths=torch.tensor([4, 1, S]))[1])


# Groups of an optimizer

WITH_DECAY = "embedding head conv rnn.layers.0.linear out mlp.1 mlp.3".split()


@pytest.mark.parametrize("options", [*OPTIONS, EVERYTHING], ids=named)
def test_groups_of_an_optimizer(options):
    """They have each parameter once, also if it is frozen."""
    lm = varied(**options)
    lm.blocks.layers[0].requires_grad_(False)
    groups = lm.parameter_groups(0.25)
    found = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(list(lm.parameters()))
    for name, parameter in lm.named_parameters():
        part = name.removesuffix(".weight").removeprefix("blocks.layers.0.").removeprefix("blocks.layers.1.")
        assert found[id(parameter)] == (0.25 if part in WITH_DECAY else 0.0), name
    torch.optim.AdamW(groups)


def test_each_block_has_its_bound():
    bounds = [0.0, 0.75]
    lm = LanguageModel(7, 4, 2, min_decay=bounds)
    bounds[1] = 0.5
    assert [block.rnn.min_decay for block in lm.blocks.layers] == lm.config["min_decay"] == [0.0, 0.75]
    assert [block.rnn.min_decay for block in LanguageModel(7, 4, 2, min_decay=0.5).blocks.layers] == [0.5, 0.5]
