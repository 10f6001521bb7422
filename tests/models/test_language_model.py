"""The language model: values, groups of an optimizer, and errors."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import graded
from options import named
from torch.testing import assert_close

from mingru.models import LanguageModel, map_state

V, DIMS, LAYERS, B, S = 7, 4, 2, 3, 9

OPTIONS = [
    {},
    {"conv": 3, "norm": "layer", "tied": False},
    {"cell": "minlstm", "expansion": 1.5, "learn_initial_state": True, "conv": 4, "mlp": 2},
    {"bias": False, "candidate": "tanh", "mlp": 1, "checkpoint": True},
]
EVERYTHING = {"conv": 3, "mlp": 2, "norm": "layer", "learn_initial_state": True, "tied": False}


def make(**options):
    lm = LanguageModel(V, DIMS, LAYERS, **options)
    with torch.no_grad():
        # Norms and initial states that would show if they were forgotten.
        for weight in lm.parameters():
            weight.add_(torch.randn_like(weight) / 4)
    return lm


def ids_of(batch=B, steps=S):
    return torch.randint(V, (batch, steps))


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_padded_sequences_are_as_alone(options):
    lm, ids, reset, lengths = make(dtype=torch.double, **options), ids_of(), torch.rand(B, S) < 0.3, [4, 1, S]

    def alone(ids, state, reset):
        rows = []
        for row, end in enumerate(lengths):
            before = state and map_state(lambda each, row=row: each[:, [row]], state)
            out, after = reference.language_model(lm, ids[[row], :end], before, reset[[row], :end])
            rows.append((F.pad(out, (0, 0, 0, S - end)), after))
        outs, states = zip(*rows, strict=True)
        return torch.cat(outs), [torch.cat(each, 1) for each in zip(*states, strict=True)]

    def padded(ids, state, reset):
        out, after = lm(ids, state, reset, torch.tensor(lengths))
        return out.masked_fill((torch.arange(S) >= torch.tensor(lengths)[:, None]).unsqueeze(2), 0.0), after

    for state in (None, [torch.randn_like(each) for each in lm.initial(B)]):
        given = {"ids": ids, "state": state, "reset": reset}
        assert_close(graded(lm, padded, given), graded(lm, alone, given))
        # Views could not be detached in place.
        assert not any(each._is_view() for each in lm(**given)[1])
    assert torch.equal(lm(ids, lm.initial(B))[0], lm(ids)[0])
    assert_close(lm(ids.int()), lm(ids), rtol=0, atol=0)


def test_reset_parameters():
    lm = make(**EVERYTHING)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.fill_(math.nan)
    lm.reset_parameters()
    fresh = LanguageModel(V, DIMS, LAYERS, **EVERYTHING)
    for name, parameter in lm.named_parameters():
        assert parameter.isfinite().all(), name
        assert (parameter.std(correction=0) == 0) == (fresh.get_parameter(name).std(correction=0) == 0), name


def test_the_logits_of_the_first_steps():
    """The scale of the logits at initialization is about 1, with the embedding's weight in the output layer or not."""
    for dims in (16, 256):
        lm = LanguageModel(50, dims, 2)
        logits, _ = lm(torch.randint(50, (8, 20)))
        assert 0.5 < logits.std() < 2


def test_map_state():
    lm = make(conv=3)
    _, state = lm(ids_of())
    doubled = map_state(lambda each: each * 2, tuple(state))
    assert isinstance(doubled, list)
    assert all(torch.equal(one, 2 * other) for one, other in zip(doubled, state, strict=True))
    assert not any(each.requires_grad for each in map_state(torch.Tensor.detach, state))


# Groups of an optimizer

WITH_DECAY = "embedding head conv rnn.layers.0.linear out mlp.1 mlp.3".split()


@pytest.mark.parametrize("options", [*OPTIONS, EVERYTHING], ids=named)
def test_groups_of_an_optimizer(options):
    """They have each parameter once, also if it is frozen."""
    lm = make(**options)
    lm.blocks.layers[0].requires_grad_(False)
    groups = lm.parameter_groups(0.25)
    found = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(list(lm.parameters()))
    for name, parameter in lm.named_parameters():
        part = name.removesuffix(".weight").removeprefix("blocks.layers.0.").removeprefix("blocks.layers.1.")
        assert found[id(parameter)] == (0.25 if part in WITH_DECAY else 0.0), name
    torch.optim.AdamW(groups)


def test_each_block_has_its_bound():
    lm = LanguageModel(7, 4, 2, min_decay=[0.0, 0.75])
    assert [block.rnn.min_decay for block in lm.blocks.layers] == [0.0, 0.75]
    assert [block.rnn.min_decay for block in LanguageModel(7, 4, 2, min_decay=0.5).blocks.layers] == [0.5, 0.5]
