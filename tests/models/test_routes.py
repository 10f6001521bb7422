"""`Block` and `LanguageModel` alike: all routes against the float64 reference, default states and parameters."""

import math

import pytest
import reference
import test_block
import test_language_model
import torch
from cover import named
from hypothesis import Phase, given, settings
from routes import Case, assert_equals_the_reference, assert_routes_equal, cases, detached_pieces
from torch.testing import assert_close

# Each has the same helpers: `make` makes a module with options, `make_inputs` its x or ids and its states.
FAMILIES = {"block": test_block, "language_model": test_language_model}

each_family = pytest.mark.parametrize("family", FAMILIES)
each_option = pytest.mark.parametrize(
    ("family", "options"),
    [(family, options) for family, models in FAMILIES.items() for options in models.OPTIONS],
    ids=lambda value: value if isinstance(value, str) else named(value),
)


@each_option
@pytest.mark.parametrize("with_state", [False, True])
def test_equals_the_reference(family, options, with_state):
    models = FAMILIES[family]
    module, num_steps = models.make(torch.double, **options), models.S
    for lengths, resets in (
        ([num_steps] * 3, []),
        ([num_steps - 2, 1, num_steps], [(0, 0), (0, 1), (2, 4), (2, 5), (2, num_steps - 1)]),
    ):
        case = Case(lengths, [], resets, with_state, 0)
        assert_equals_the_reference(getattr(reference, family), module, *models.make_inputs(module, case), case)


@pytest.mark.parametrize("examples", [15, pytest.param(200, marks=pytest.mark.slow)])
@each_family
def test_all_routes_are_equal(family, examples):
    models = FAMILIES[family]

    # No shrinking, because it takes minutes and the cases are small.
    @settings(deadline=None, derandomize=True, max_examples=examples, phases=[Phase.generate])
    @given(case=cases(), options=models.some_options)
    def check(case, options):
        module = models.make(**options)
        assert_routes_equal(getattr(reference, family), module, *models.make_inputs(module, case), case)

    check()


@pytest.mark.parametrize("examples", [6, pytest.param(100, marks=pytest.mark.slow)])
@each_family
def test_pieces_with_detached_states(family, examples):
    """Truncated backpropagation through time."""
    models, function = FAMILIES[family], getattr(reference, family)

    @settings(deadline=None, derandomize=True, max_examples=examples, phases=[Phase.generate])
    @given(case=cases(equal_lengths=True), options=models.some_options)
    def check(case, options):
        module = models.make(torch.double, **options)
        inputs = models.make_inputs(module, case)
        assert_equals_the_reference(function, module, *inputs, case, detached_pieces, detached_pieces)

    check()


@each_option
def test_the_default_state(family, options):
    models = FAMILIES[family]
    module = models.make(torch.double, **options)
    x, random = models.make_inputs(module, Case([models.S] * 3, [], [], True, 0))
    h, (out, last) = module.initial_state(3), module(x)
    assert isinstance(last, list)
    assert [each.shape for each in h] == [each.shape for each in last]
    for states in (h, tuple(h)):
        assert torch.equal(module(x, states)[0], out)
    reset = torch.zeros(3, models.S, dtype=torch.bool)
    reset[:, 0] = True
    if not options.get("bidirectional"):
        assert_close(module(x, random, reset), (out, last))


@each_family
def test_reset_parameters(family):
    models = FAMILIES[family]
    fresh, module = (make(**models.EVERYTHING) for make in (models.build, models.make))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(math.nan)
    module.reset_parameters()
    for name, parameter in module.named_parameters():
        assert parameter.isfinite().all(), name
        assert (parameter.std(correction=0) == 0) == (fresh.get_parameter(name).std(correction=0) == 0), name
