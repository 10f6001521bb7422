"""The language model: texts, padding, its state, options, groups and errors. `test_routes.py` has all routes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from cover import named
from hypothesis import strategies as st
from refusals import DTYPE, assert_refused, literal, wrong_ids, wrong_resets, wrong_states, wrong_values
from routes import varied
from torch.testing import assert_close

from mingru.models import Block, LanguageModel, map_state

V, DIMS, LAYERS, B, S = 7, 4, 2, 3, 9

OPTIONS = [
    {},
    {"tied": False},
    {"conv": 4, "mlp": 2},
    {"conv": 3, "norm": "layer", "tied": False},
    {"cell": "minlstm", "expansion": 1.5, "learn_initial_state": True, "conv": 2},
    {"bias": False, "candidate": "tanh", "mlp": 1, "checkpoint": True},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=named)
some_options = st.fixed_dictionaries(
    {
        "cell": st.sampled_from(["mingru", "minlstm"]),
        "conv": st.sampled_from([None, 2, 4]),
        "mlp": st.sampled_from([None, 1.5]),
        "norm": st.sampled_from(["rms", "layer"]),
        "tied": st.booleans(),
        "learn_initial_state": st.booleans(),
    }
)


EVERYTHING = {"conv": 3, "mlp": 2, "norm": "layer", "learn_initial_state": True, "tied": False}


def build(**options):
    return LanguageModel(V, DIMS, LAYERS, **options)


def make(dtype=torch.float32, **options):
    lm = varied(build(dtype=dtype, **options))
    with torch.no_grad():
        # At first, the features that enter the blocks are so small that the blocks' norms divide by them.
        lm.embedding.weight.mul_(2)
    return lm


def make_inputs(lm, case):
    torch.manual_seed(case.seed)
    ids = torch.randint(V, (len(case.lengths), case.num_steps))
    state = [torch.randn_like(each) for each in lm.initial_state(len(ids))]
    return ids, state if case.with_state else None


# Texts and padding


def test_a_list_of_texts_in_one_row():
    """Texts of any lengths, one after the other, with a reset before each."""
    lm = make(torch.double, conv=4, mlp=2)
    texts = [torch.randint(V, (length,)) for length in (5, 1, 2, 7)]
    ids = torch.cat(texts).unsqueeze(0)
    reset = torch.zeros_like(ids, dtype=torch.bool)
    reset[0, [0, 5, 6, 8]] = True
    logits, _ = lm(ids, reset=reset)
    alone = torch.cat([lm(text.unsqueeze(0))[0] for text in texts], 1)
    assert_close(logits, alone)


@each_option
def test_padding_has_no_effect(options):
    lm = make(torch.double, **options)
    lengths = torch.tensor([4, 1, S])
    ids = torch.randint(V, (B, S))
    padding = torch.arange(S) >= lengths.unsqueeze(1)
    results = []
    for other, marks in ((0, False), (V - 1, True)):
        reset = padding & torch.tensor(marks)
        logits, state = lm(ids.masked_fill(padding, other), lengths=lengths, reset=reset)
        loss = F.cross_entropy(logits[~padding], ids[~padding])
        results.append([logits[~padding], *state, *torch.autograd.grad(loss, list(lm.parameters()))])
    for one, another in zip(*results, strict=True):
        assert torch.equal(one, another)


def test_ids_of_int32():
    lm = make(conv=3)
    ids = torch.randint(V, (B, S))
    assert_close(lm(ids.int()), lm(ids), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(B, 0), (0, S), (0, 0)])
def test_empty_input(shape):
    lm = make(conv=3, mlp=2)
    ids = torch.zeros(shape, dtype=torch.int64)
    state = [torch.randn_like(each) for each in lm.initial_state(shape[0])]
    logits, after = lm(ids, state)
    assert logits.shape == (*shape, V)
    assert_close(after, state, rtol=0, atol=0)


def test_the_logits_of_the_first_steps():
    """The scale of the logits at initialization is about 1, with the embedding's weight in the output layer or not."""
    for dims in (16, 256):
        lm = LanguageModel(50, dims, 2)
        logits, _ = lm(torch.randint(50, (8, 20)))
        assert 0.5 < logits.std() < 2


# The state


@pytest.mark.parametrize(("conv", "expansion"), [(None, 1), (4, 1.5)])
def test_memory_of_a_state(conv, expansion):
    """A sequence has num_layers * (H + (conv - 1) * dims) numbers, however many tokens were read."""
    lm = LanguageModel(V, 8, 3, conv=conv, expansion=expansion)
    numbers = 3 * (round(8 * expansion) + (0 if conv is None else (conv - 1) * 8))
    for num_steps in (1, 2, 300):
        for arguments in ({}, {"lengths": torch.tensor([1, num_steps])}, {"reset": torch.rand(2, num_steps) < 0.2}):
            with torch.no_grad():
                _, state = lm(torch.randint(V, (2, num_steps)), **arguments)
            assert sum(each.untyped_storage().nbytes() for each in state) == 2 * numbers * 4


def test_states_of_selected_and_repeated_sequences():
    lm = make(torch.double, conv=3)
    ids, following = torch.randint(V, (B, S)), torch.randint(V, (4, 5))
    rows = torch.tensor([2, 0, 0, 1])
    _, state = lm(ids)
    logits, _ = lm(following, map_state(lambda each: each.index_select(1, rows), state))
    whole, _ = lm(torch.cat([ids[rows], following], 1))
    assert_close(logits, whole[:, S:])


def test_map_state():
    lm = make(conv=3)
    _, state = lm(torch.randint(V, (B, S)))
    doubled = map_state(lambda each: each * 2, tuple(state))
    assert isinstance(doubled, list)
    assert all(torch.equal(one, 2 * other) for one, other in zip(doubled, state, strict=True))
    assert not any(each.requires_grad for each in map_state(torch.Tensor.detach, state))


# Options


def test_a_tied_output_layer_has_no_parameters():
    tied, untied = make(), make(tied=False)
    names = {name for name, _ in tied.named_parameters()}
    assert names | {"head.weight"} == {name for name, _ in untied.named_parameters()}
    untied.load_state_dict({**tied.state_dict(), "head.weight": tied.embedding.weight})
    ids = torch.randint(V, (B, S))
    assert torch.equal(tied(ids)[0], untied(ids)[0])


def test_dropout_is_used_in_training_only():
    lm = make(dropout=0.5)
    ids = torch.randint(V, (B, S))
    assert not torch.equal(lm(ids)[0], lm(ids)[0])
    assert torch.equal(lm.eval()(ids)[0], lm(ids)[0])


# Groups of an optimizer

WITH_DECAY = {"embedding.weight", "head.weight", "conv.weight", "out.weight", "mlp.1.weight", "mlp.3.weight"}


def decays(lm, weight_decay=0.1):
    """Return the weight decay of each parameter by name."""
    groups = lm.parameter_groups(weight_decay)
    found = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(list(lm.parameters()))
    return {name: found[id(parameter)] for name, parameter in lm.named_parameters()}


@each_option
def test_groups_have_each_parameter_once(options):
    lm = make(**options)
    assert set(decays(lm).values()) == {0.0, 0.1}


def test_parameters_with_weight_decay():
    for name, decay in decays(make(**EVERYTHING)).items():
        expected = name.removeprefix("blocks.layers.0.").removeprefix("blocks.layers.1.") in WITH_DECAY
        assert decay == (0.1 if expected else 0.0), name


def test_groups_of_frozen_parameters():
    """The groups do not depend on `requires_grad`, and an optimizer skips parameters without a gradient."""
    lm = make(**EVERYTHING)
    all_decays = decays(lm)
    lm.embedding.requires_grad_(False)
    lm.blocks.layers[0].requires_grad_(False)
    assert decays(lm) == all_decays
    before = copy.deepcopy(lm.state_dict())
    optimizer = torch.optim.AdamW(lm.parameter_groups(0.1), lr=0.1)
    lm(torch.randint(V, (B, S)))[0].square().sum().backward()
    optimizer.step()
    for name, parameter in lm.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_the_groups_in_adamw():
    lm = make(**EVERYTHING)
    optimizer = torch.optim.AdamW(lm.parameter_groups(0.25), lr=0.5)
    for parameter in lm.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = copy.deepcopy(lm.state_dict())
    optimizer.step()
    for name, decay in decays(lm, 0.25).items():
        assert_close(lm.get_parameter(name).detach(), before[name] * (1 - 0.5 * decay))


def test_bad_weight_decay():
    cases = wrong_values("weight_decay", "a number, at least 0", types=(True, "0.1", None), values=(-0.1, math.nan))
    assert_refused(make().parameter_groups, cases, "LanguageModel: ")


# Bad input

# By the class that refuses them.
BAD_OPTIONS = {
    "LanguageModel": {
        **wrong_values("vocab_size", "at least 1", values=(0,)),
        **wrong_values("vocab_size", "an int", types=(7.0,)),
        **wrong_values("dims", "at least 1", values=(-1,)),
        **wrong_values("dims", "an int", types=("4",)),
        **wrong_values("num_layers", "at least 1", values=(0,)),
        **wrong_values("num_layers", "an int", types=(True,)),
        **wrong_values("tied", "a bool", types=(1,)),
        **wrong_values("bidirectional", "False", values=(True, 1)),
        "why": ({"bidirectional": True}, ValueError, ".*, got True; the reverse direction would read the tokens"),
        "min_decay": ({"min_decay": [0.5] * 3}, ValueError, "min_decay must be a number from 0 to 1"),
        "a bound of a minLSTM": (
            {"cell": "minlstm", "min_decay": 0.5},
            TypeError,
            "no argument 'min_decay'; only MinGRU",
        ),
        "residual": ({"residual": True}, TypeError, "no argument 'residual'; a block has"),
        "unknown": ({"heads": 2}, TypeError, "no argument 'heads'; the arguments are vocab_size, dims, "),
        "typing error": ({"droput": 0.1}, TypeError, "no argument 'droput'; use dropout"),
    },
    "Block": {
        **wrong_values("cell", "one of ('mingru', 'minlstm')", values=("lstm",)),
        **wrong_values("norm", "one of ('layer', 'rms')", values=(["rms"],)),
    },
    "MinGRU": DTYPE,
}


def test_bad_options():
    sizes = {"vocab_size": V, "dims": DIMS, "num_layers": 2}
    for name, cases in BAD_OPTIONS.items():
        assert_refused(lambda **options: LanguageModel(**{**sizes, **options}), cases, f"{name}: ")


def test_wrong_names_of_arguments():
    with pytest.raises(TypeError, match=r"^LanguageModel: no argument 'num_layer'; use num_layers$"):
        LanguageModel(V, DIMS, num_layer=2)
    with pytest.raises(
        TypeError, match=r"^LanguageModel: missing a required argument: 'num_layers'; the positional arg"
    ):
        LanguageModel(V, DIMS, conv=2)
    lm = LanguageModel(V, DIMS, 2)
    with pytest.raises(
        TypeError, match=r"^LanguageModel: no argument 'dt'; the arguments are ids, state, reset, length"
    ):
        lm(IDS, dt=torch.ones(2, 3))


IDS = torch.zeros(2, 3, dtype=torch.int64)
BAD_IDS = {
    "ids in a list": ({"ids": [[1, 2]]}, TypeError, "ids must be an integer tensor (B, S), got list; use torch.as"),
    "a text": ({"ids": "hello"}, TypeError, "ids must be an integer tensor (B, S), got str; encode the text"),
}
BAD_MASKS = {
    "lengths": ({"lengths": torch.tensor([4, 3])}, ValueError, "lengths must be from 0 to S = 3, got [4, 3]"),
    "lengths of a list": ({"lengths": [3, 3]}, TypeError, "lengths must be an integer tensor (B,), got list"),
}


@pytest.mark.parametrize("with_grad", [True, False])
def test_bad_calls(with_grad):
    lm = LanguageModel(V, DIMS, 2, conv=3)
    states = wrong_states("state", lm.initial_state(2), "the weights")
    with torch.set_grad_enabled(with_grad):
        cases = {**literal(BAD_IDS | BAD_MASKS), **wrong_ids("ids", IDS, V), **states, **wrong_resets("(B, S)", 2, 3)}
        assert_refused(lambda **arguments: lm(**{"ids": IDS, **arguments}), cases, "LanguageModel: ")
    assert_refused(lambda **arguments: lm.generate(IDS, 0, **arguments), states, "LanguageModel: ")


@pytest.mark.parametrize("batch", [-1, 2.0, True, None])
def test_bad_batch_of_the_default_state(batch):
    for module, name in ((LanguageModel(V, DIMS, 2), "LanguageModel"), (Block(DIMS), "Block")):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: batch must be "):
            module.initial_state(batch)


def test_each_block_has_its_bound():
    lm = LanguageModel(7, 4, 2, min_decay=[0.0, 0.75])
    assert [block.rnn.min_decay for block in lm.blocks.layers] == [0.0, 0.75]
    assert [block.rnn.min_decay for block in LanguageModel(7, 4, 2, min_decay=0.5).blocks.layers] == [0.5, 0.5]
