"""Generation: each prompt as alone, streams, states and filters, and its errors."""

import gc
import math

import pytest
import torch
from cases import refuses
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from mingru.models import LanguageModel, generation, map_state
from mingru.models.generation import Sampling

V = 13
MODELS = {
    "plain": {},
    "conv": {"conv": 4, "mlp": 2},
    "minlstm": {"cell": "minlstm", "conv": 2, "norm": "layer", "tied": False, "learn_initial_state": True},
}
each_model = pytest.mark.parametrize("model", MODELS)


def make(model="conv", **options):
    torch.manual_seed(0)
    lm = LanguageModel(V, 16, 2, **{**MODELS[model], **options})
    with torch.no_grad():
        for block in lm.blocks.layers:
            # The next token then depends on the text before the last token.
            block.out.weight.mul_(8)
        if lm.head is not None:
            lm.head.weight.mul_(8)
    return lm


def make_prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (length,), generator=generator) for length in lengths]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Each prompt as alone


@each_model
@pytest.mark.parametrize("examples", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_each_prompt_is_as_alone(model, examples):
    lm = make(model)

    @settings(deadline=None, derandomize=True, max_examples=examples, phases=[Phase.generate])
    @given(
        lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
        seed=st.integers(0, 2**40),
        stop=st.sampled_from([None, 3, [0, 5, 6]]),
        temperature=st.sampled_from([0, 0.7, 1.5]),
        filters=st.sampled_from([{}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 6, "top_p": 0.9}]),
        with_state=st.booleans(),
    )
    def check(lengths, seed, stop, temperature, filters, with_state):
        prompts = make_prompts(*lengths, seed=seed)
        seeds = [seed + 7 * index for index in range(len(prompts))]
        state = [torch.randn_like(each) for each in lm.initial(len(prompts))] if with_state else None
        options = {"stop": stop, "temperature": temperature, **filters}
        together = lm.generate(prompts, 12, seed=seeds, state=state, **options)
        for row, prompt in enumerate(prompts):
            options["state"] = None if state is None else map_state(lambda each, row=row: each[:, [row]], state)
            (alone,) = lm.generate([prompt], 12, seed=[seeds[row]], **options)
            assert torch.equal(together[row], alone)
            assert torch.equal(lm.generate(prompt.unsqueeze(0), 12, seed=seeds[row], **options)[0], alone)

    check()


def test_forms_of_the_arguments(monkeypatch):
    lm, prompts = make(), torch.stack(make_prompts(4, 4, 4))
    texts = lm.generate(prompts, 10, seed=3)
    assert texts.shape == (3, 14) and torch.equal(texts[:, :4], prompts)
    for form in (list(prompts), tuple(prompts), [prompts[0].int(), *prompts[1:]]):
        found = lm.generate(form, 10, seed=[3, 4, 5])
        assert [text.dtype for text in found] == [prompt.dtype for prompt in form]
        assert same([text.long() for text in found], texts)
    assert lm.generate(prompts.int(), 3).dtype == torch.int32
    # Fewer tokens are the first of more, and a seed gives the same numbers in blocks of any size.
    assert torch.equal(lm.generate(prompts, 6, seed=3), texts[:, :10])
    monkeypatch.setattr(generation, "NUM_RANDOM", 4)
    assert torch.equal(lm.generate(prompts, 10, seed=3), texts)
    # Texts are not views of the prompts.
    for text in (*lm.generate(list(prompts), 2), lm.generate(prompts, 2)):
        text.fill_(0)
    assert prompts.any()


# Steps


@each_model
def test_temperature_0_is_the_most_likely_token_of_each_step(model):
    lm, prompts = make(model), make_prompts(4, 1, 7)
    expected = []
    for prompt in prompts:
        ids = prompt.unsqueeze(0)
        logits, state = lm(ids)
        for _ in range(9):
            token = logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], 1)
            logits, state = lm(token, state)
        expected.append(ids[0])
    for options in ({"temperature": 0}, {"temperature": 1e-45}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1}):
        assert same(lm.generate(prompts, 9, seed=4, **options), expected)


def test_the_most_likely_of_two_tokens_that_are_equal_in_float32():
    logits = torch.ones(1, V, dtype=torch.double)
    logits[0, 9] += 1e-12
    assert Sampling("test", temperature=0).sample(logits, torch.zeros(1)).tolist() == [9]


@each_model
def test_a_given_state_continues_the_text(model):
    lm = make(model)
    prompts, beginnings = make_prompts(4, 1, 6), torch.stack(make_prompts(5, 5, 5, seed=1))
    _, state = lm(beginnings)
    before = map_state(torch.clone, state)
    whole = [torch.cat(pair) for pair in zip(beginnings, prompts, strict=True)]
    texts = lm.generate(prompts, 10, seed=2, state=state)
    assert same(texts, [text[5:] for text in lm.generate(whole, 10, seed=2)])
    assert same(texts, lm.generate(prompts, 10, seed=2, state=tuple(state)))
    assert not same(texts, lm.generate(prompts, 10, seed=2))
    # It stays as it is.
    lm.generate(prompts, 5, seed=2, state=state, stop=1)
    assert same(state, before) and all(each.requires_grad for each in state)


# The end of a text


@each_model
def test_each_text_stops_on_its_own(model):
    lm, prompts = make(model), make_prompts(2, 5, 1, 3, 4, 2)
    free = lm.generate(prompts, 40, seed=9)
    stop = [3, 7]
    texts = lm.generate(prompts, 40, seed=9, stop=stop)
    ends = []
    for prompt, text, whole in zip(prompts, texts, free, strict=True):
        new = whole[len(prompt) :].tolist()
        end = next((index + 1 for index, token in enumerate(new) if token in stop), 40)
        ends.append(end)
        assert torch.equal(text, whole[: len(prompt) + end])
    # Texts go on after the end of an earlier and of a later text.
    assert len(set(ends)) > 2 and ends != sorted(ends) and ends != sorted(ends, reverse=True)
    assert same(texts, lm.generate(prompts, 40, seed=9, stop=set(stop)))


def test_a_tensor_is_filled_with_the_token_that_stopped():
    lm, prompts = make(), torch.stack(make_prompts(3, 3, 3, 3))
    texts, rows = (lm.generate(form, 40, seed=1, stop=[3, 7]) for form in (prompts, list(prompts)))
    assert len({len(row) for row in rows}) > 1 and texts.shape == (4, max(len(row) for row in rows))
    for text, row in zip(texts, rows, strict=True):
        assert torch.equal(text[: len(row)], row) and (text[len(row) :] == row[-1]).all()


def test_a_stop_token_at_the_first_step_and_in_the_prompt():
    lm, prompts = make(), make_prompts(2, 4)
    assert all(text[-1] < 3 for text in lm.generate(prompts, 10**15, stop=list(range(3)), seed=0))
    first = [text[-1].item() for text in lm.generate(prompts, 1, seed=0)]
    assert [len(text) for text in lm.generate(prompts, 10, seed=0, stop=first)] == [3, 5]
    assert len(list(lm.stream(prompts, 10, seed=0, stop=first))) == 1
    prompt = torch.tensor([5, 3, 5])
    free = lm.generate([prompt], 10, seed=0)[0]
    unused = next(token for token in range(V) if token not in free[3:])
    assert len(lm.generate([torch.tensor([unused, 3, unused])], 3, seed=0, stop=unused)[0]) > 4


def test_no_new_tokens_and_no_prompts():
    lm, prompts = make(), make_prompts(2, 4)
    for form in (prompts, torch.stack(make_prompts(3, 3))):
        assert same(lm.generate(form, 0, seed=0, stop=3), form) and list(lm.stream(form, 0, seed=0)) == []
    assert lm.generate([], 5, seed=[], state=lm.initial(0), stop=1) == []
    assert lm.generate(torch.zeros(0, 3, dtype=torch.int64), 5, seed=1).shape == (0, 3)
    assert list(lm.stream([], 5)) == []


# Streams


@each_model
def test_a_stream_and_a_streamer_get_the_tokens_of_each_step(model):
    lm, prompts, received = make(model), make_prompts(2, 5, 1), []
    texts = lm.generate(prompts, 20, seed=3, stop=[1, 2], streamer=received.append)
    # A streamer may write to its tokens.
    assert same(lm.generate(prompts, 20, seed=3, stop=[1, 2], streamer=lambda tokens: tokens.fill_(0)), texts)
    assert same(received, list(lm.stream(prompts, 20, seed=3, stop=[1, 2])))
    table = torch.stack(received, 1)
    assert table.dtype == torch.int64
    for prompt, text, row in zip(prompts, texts, table, strict=True):
        new = text[len(prompt) :]
        assert torch.equal(row[: len(new)], new) and (row[len(new) :] == -1).all()


def modes_of(lm):
    return [module.training for module in lm.modules()], torch.is_grad_enabled(), torch.is_inference_mode_enabled()


class OutOfPaperError(Exception):
    pass


@pytest.mark.parametrize("place", ["streamer", "model"])
def test_modes_after_an_error(place):
    lm = make()
    lm.blocks.layers[0].eval()
    before = modes_of(lm)

    def fail(*args):
        raise OutOfPaperError

    if place == "model":
        lm.blocks.layers[1].register_forward_hook(fail)
    refuses(OutOfPaperError, "", lm.generate, make_prompts(2, 3), 5, streamer=fail)
    assert modes_of(lm) == before


@pytest.mark.parametrize("with_grad", [True, False])
def test_the_modes_between_the_steps_of_a_stream(with_grad):
    """The caller's code runs between two steps, in the caller's modes; the steps run without gradients."""
    lm, inside = make(dropout=0.5), []
    lm.blocks.layers[0].eval()
    lm.blocks.layers[1].register_forward_hook(lambda *args: inside.append(torch.is_grad_enabled()))
    with torch.set_grad_enabled(with_grad):
        before = modes_of(lm)
        for tokens in lm.stream(make_prompts(2, 3), 5, seed=1):
            assert modes_of(lm) == before and not tokens.is_inference()
        abandoned = lm.stream(make_prompts(2, 3), 5, seed=1)
        next(abandoned)
        del abandoned
        gc.collect()
        assert modes_of(lm) == before
    assert inside == [False] * 6


def test_two_streams_at_the_same_time_while_modes_change():
    lm = make(dropout=0.5)
    expected = [list(lm.eval().stream(make_prompts(3, seed=seed), 6, seed=seed)) for seed in (1, 2)]
    found = []
    for pair in zip(*(lm.train().stream(make_prompts(3, seed=seed), 6, seed=seed) for seed in (1, 2)), strict=True):
        found.append(pair)
        lm.train(not lm.training)
        with torch.inference_mode():
            lm(make_prompts(2)[0].unsqueeze(0))
    assert all(map(same, zip(*found, strict=True), expected))


# Random numbers


def test_the_global_random_state():
    lm, prompts = make(dropout=0.5), make_prompts(2, 3)
    before = torch.get_rng_state()
    for seed in (1, [-(2**63), 2**64 - 1]):
        lm.generate(prompts, 10, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    texts = [lm.generate(prompts, 10) for _ in range(2)]
    assert not same(*texts)
    torch.set_rng_state(before)
    assert same(lm.generate(prompts, 10), texts[0])


# Dtypes and devices


def test_another_default_device():
    lm, prompts = make(), make_prompts(2, 5)
    expected = lm.generate(prompts, 6, seed=1, stop=2, top_p=0.9)
    with torch.device("meta"):
        assert same(lm.generate(prompts, 6, seed=1, stop=2, top_p=0.9), expected)
        assert len(lm.generate(prompts, 1)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_of_the_model(dtype):
    lm, prompts = make().to(dtype), make_prompts(2, 5)
    texts = lm.generate(prompts, 20, seed=1, top_k=5, top_p=0.9, min_p=0.01)
    alone = (lm.generate([each], 20, seed=seed, top_k=5, top_p=0.9, min_p=0.01) for seed, each in enumerate(prompts, 1))
    assert same(texts, [text for (text,) in alone])


# Distribution


def filtered(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Filter tokens in plain Python; return their probabilities, and how near a filter was to another decision."""
    weights = {token: math.exp((value - max(logits)) / temperature) for token, value in enumerate(logits)}
    margin = 1.0
    if top_k is not None:
        least = sorted(weights.values(), reverse=True)[min(top_k, len(weights)) - 1]
        weights = {token: weight for token, weight in weights.items() if weight >= least}
    if top_p is not None and top_p < 1:
        total, kept = sum(weights.values()), {}
        for token in sorted(weights, key=lambda token: (-weights[token], token)):
            share = sum(kept.values()) / total
            margin = min(margin, abs(share - top_p))
            if share >= top_p:
                break
            kept[token] = weights[token]
        weights = kept
    if min_p is not None:
        ratios = {token: weight / max(weights.values()) for token, weight in weights.items()}
        margin = min(margin, *(abs(ratio - min_p) for ratio in ratios.values() if ratio < 1), 1.0)
        weights = {token: weight for token, weight in weights.items() if ratios[token] >= min_p}
    total = sum(weights.values())
    return [weights.get(token, 0.0) / total for token in range(len(logits))], margin


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    # Few different numbers, so that some are equal.
    logits=st.lists(st.sampled_from([-30.0, -2.0, -1.0, 0.0, 0.5, 3.0, 100.0]), min_size=1, max_size=8),
    temperature=st.sampled_from([0.3, 1.0, 1, 7.0]),
    top_k=st.none() | st.integers(1, 10),
    top_p=st.none() | st.floats(1e-6, 1.0) | st.just(1),
    min_p=st.none() | st.floats(0.0, 1.0) | st.just(0),
)
def test_filters(logits, temperature, top_k, top_p, min_p):
    expected, margin = filtered(logits, temperature, top_k, top_p, min_p)
    assume(margin > 1e-9)  # Rounding must not decide.
    sampling = Sampling("test", temperature, top_k, top_p, min_p)
    # Another row, so that a filter must not compare rows.
    rows = torch.tensor([logits, [200.0, *[0.0] * (len(logits) - 1)]], dtype=torch.double)
    probabilities = sampling.probabilities(rows)[0]
    torch.testing.assert_close(probabilities / probabilities.sum(), torch.tensor(expected, dtype=torch.double))
    assert [probability > 0 for probability in probabilities.tolist()] == [each > 0 for each in expected]


def test_uniform_numbers_give_the_distribution():
    """Equally spaced random numbers give each token as often as its probability says, up to one."""
    logits = torch.randn(40) * 3
    logits[7] = -math.inf
    count = 100_000
    uniform = (torch.arange(count) + 0.5) / count
    for options in ({}, {"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.05}):
        sampling = Sampling("test", 0.8, **options)
        tokens = sampling.sample(logits.double().expand(count, -1), uniform)
        probabilities = sampling.probabilities(logits.double().unsqueeze(0))[0]
        expected = count * probabilities / probabilities.sum()
        assert ((torch.bincount(tokens, minlength=40) - expected).abs() <= 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.double])
def test_the_smallest_and_largest_random_number(dtype):
    """A token of probability 0 is never sampled."""
    logits = torch.tensor([[-math.inf, 3.0, -math.inf, 1.0, 0.3, -math.inf]] * 2, dtype=dtype)
    uniform = torch.tensor([0.0, 1 - 2**-24])
    for temperature in (1e-45, 0.5, 1.0, 1e30):
        tokens = Sampling("test", temperature).sample(logits, uniform)
        assert tokens.tolist() == ([1, 1] if temperature < 0.1 else [1, 4])


def test_rounding_of_the_sum_does_not_sample_a_filtered_token(monkeypatch):
    """A parallel sum, as on a GPU, adds in another order at each token."""
    exact, noise = torch.Tensor.cumsum, 1e-3 * torch.rand(1, 50)
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda self, dim: exact(self, dim) + noise)
    logits = torch.randn(1, 50).expand(20_000, -1)
    tokens = Sampling("test", top_k=5).sample(logits, torch.linspace(0, 1 - 2**-24, len(logits)))
    assert set(tokens.tolist()) == set(logits[0].topk(5).indices.tolist())


def test_samples_follow_the_distribution():
    """By the public method, of a model with known scores; all random numbers come from seeds."""
    lm, count, num_steps = LanguageModel(5, 5, 1, norm="layer", tied=False), 400, 25
    scores = torch.tensor([0.3, -1.0, 1.2, 0.0, 0.7])
    with torch.no_grad():
        lm.norm.weight.zero_()
        lm.norm.bias.copy_(scores)
        lm.head.weight.copy_(torch.eye(5))
    for options in ({"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.4}):
        expected = torch.tensor(filtered(scores.tolist(), **options)[0]) * count * num_steps
        new = lm.generate(torch.zeros(count, 1, dtype=torch.int64), num_steps, seed=100, **options)[:, 1:]
        found = torch.bincount(new.flatten(), minlength=5)
        assert torch.equal(found > 0, expected > 0)
        # Chi-square divided by its degrees of freedom.
        assert ((found - expected).square() / expected.clamp(min=1)).sum() < 5 * (expected > 0).sum()
        # Neither the steps of a sequence nor the sequences repeat.
        assert len(new.unique(dim=0)) > 0.9 * count and len(new.unique(dim=1).T) == num_steps


def test_logits_of_nan():
    lm = make()
    with torch.no_grad():
        lm.norm.weight.fill_(math.nan)
    message = "^LanguageModel: the logits after the prompts are NaN; check the parameters"
    refuses(ValueError, message, lm.generate, torch.zeros(2, 3, dtype=torch.int64), 2)
