"""What holds for every class and all of its options: values, gradients, states, resets, lengths, layouts, rounding."""

import copy
import itertools
from functools import partial

import pytest
import reference
import torch
from cases import BACKENDS, FEATURES, MODELS, ONE_MAP, ROWS, graded, padded, parametrized, refuses, some
from options import DOUBLE, TIGHT
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import mingru
from mingru.ops.linear_map import LINEAR_MAPS

WITH_LENGTHS = [case for case in ROWS if "lengths" in case.takes]


def assert_same(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for name, each in expected.items():
        assert_close(got[name], each, msg=lambda message, name=name: f"{name}: {message}", **(tolerance or TIGHT))


def without(given, *names):
    return {name: each for name, each in given.items() if name not in names}


# Against the reference


@pytest.mark.parametrize("backend", ["auto", "torch"])
@parametrized([*ROWS, *MODELS])
def test_equals_the_reference(case, backend):
    module = case.varied(**DOUBLE)
    everything = case.given(**DOUBLE)
    for given in (everything, {"x": everything["x"]}) if backend == "auto" else (everything,):
        expected = graded(module, partial(reference.module, module), given)
        with mingru.use_backend(backend):
            got = graded(module, partial(case.call, module), given)
            assert_same(got, expected)
            # Other code runs without gradients.
            with torch.no_grad():
                out, states = case.call(module, **given)
        assert_close([out, *states], [each for name, each in expected.items() if not name.startswith("grad")], **TIGHT)


@parametrized(some(ROWS, 12))
def test_the_comparison_can_fail(case):
    module, given = case.varied(**DOUBLE), case.given(**DOUBLE)
    expected = graded(module, partial(reference.module, module), given)
    name, weight = next(iter(module.named_parameters()))
    with torch.no_grad():
        # A corner of a kernel may see only padding.
        weight.view(-1)[expected[f"gradient of {name}"].abs().argmax()] += 1e-6
    refuses(AssertionError, r"^out: ", assert_same, graded(module, partial(case.call, module), given), expected)


# Calls that follow each other


def is_of_both_directions(module):
    return any(getattr(each, "num_directions", 1) == 2 for each in module.modules())


def in_pieces(case, module, sizes):
    def run(x, h=None, **steps):
        outs = []
        parts = {name: each.split(sizes, 1) for name, each in steps.items()}
        for index, piece in enumerate(x.split(sizes, 1)):
            out, h = case.call(module, piece, h, **{name: each[index] for name, each in parts.items()})
            outs.append(out)
        return torch.cat(outs, 1), h

    return run


@parametrized([case for case in [*ROWS, *MODELS] if not case.is_cell and not is_of_both_directions(case.module)])
def test_pieces_and_steps_are_the_whole(case):
    module, given = case.varied(**DOUBLE), case.given(**DOUBLE)
    expected = graded(module, partial(case.call, module), given)
    for sizes in ([1] * case.steps, [case.steps - 4, 0, 3, 1]):
        run = in_pieces(case, module, sizes)
        assert_same(graded(module, run, given), expected)
        with torch.no_grad():
            assert_close(run(**given)[0], expected["out"], **TIGHT)


# What a step depends on


@parametrized(ROWS)
def test_a_step_reaches_its_own_sequence_up_to_a_reset(case):
    """NaN at a step is what shows it."""
    module, given = case.varied(**DOUBLE), without(case.given(**DOUBLE), "dt")
    first, at, end = 1, 3, case.steps - 1
    given["reset"].fill_(False)
    given["reset"][1, [first, end]] = True
    both = is_of_both_directions(module)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            x = given["x"].clone()
            before, _ = case.call(module, **given)
            x[1, at] = torch.nan
            out, states = case.call(module, **{**given, "x": x})
        reached = out.isnan().flatten(2).any(2)
        expected = torch.zeros_like(reached)
        expected[1, first if both else at : end] = True
        assert torch.equal(reached, expected) and torch.equal(out[~expected], before[~expected])
        # The states too, but that of a causal convolution, which has the last steps.
        assert not any(state.isnan().any() for state in states[:1])
    # Likewise backward: no gradient from elsewhere.
    leaf = given["x"].clone().requires_grad_()
    out, _ = case.call(module, **{**given, "x": leaf})
    (grad,) = torch.autograd.grad(out[1, at].square().sum(), leaf)
    reached = grad.flatten(2).any(2)
    expected = torch.zeros_like(reached)
    expected[1, first : end if both else at + 1] = True
    assert torch.equal(reached, expected)


# Sequences of different lengths


def each_alone(case, call, lengths):
    """Each sequence up to its length."""

    def run(**given):
        outs, states = [], []
        for index, length in enumerate(lengths):
            one = case.alone(given, index, length)
            out, last = call(**one)
            outs.append(torch.cat([out, out.new_zeros(1, case.steps - length, *out.shape[2:])], 1))
            states.append(last)
        joined = zip(zip(*states, strict=True), case.state_dims, strict=True)
        return torch.cat(outs), [torch.cat(each, dim) for each, dim in joined]

    return run


ENDS = [*(((9, 1, 0, 21), backend) for backend in BACKENDS), ((0, 0), "auto"), ((21, 4, 2), "auto")]


@pytest.mark.parametrize(("lengths", "backend"), ENDS, ids=str)
@parametrized([*WITH_LENGTHS, *MODELS])
def test_each_sequence_is_as_alone(case, lengths, backend):
    module, (everything, padding) = case.varied(**DOUBLE), padded(case, lengths, **DOUBLE)
    clean = {**everything, "x": everything["x"].nan_to_num(7.0)}
    alone = each_alone(case, partial(reference.module, module), lengths)

    def together(**given):
        out, states = case.call(module, lengths=torch.tensor(lengths), **given)
        # The logits of padding are any.
        return out.masked_fill(padding.unsqueeze(2), 0.0) if case in MODELS else out, states

    with mingru.use_backend(backend):
        for names in (("h", "reset", "dt"), ())[backend == "auto" :]:
            given = without(everything, *names)
            expected = graded(module, alone, without(clean, *names))
            got = graded(module, together, given)
            assert_same(got, expected)
            assert not any(got[name][padding].any() for name in ("out", "gradient of x") if name in got)
            with torch.no_grad():
                out, states = together(**given)
            assert_close([out, *states], list(got.values())[: 1 + len(states)], **TIGHT)
        # What the fused path does not serve: a linear map with a hook.
        linear = next(each for each in module.modules() if isinstance(each, LINEAR_MAPS))
        linear.register_forward_hook(lambda *_: None)
        assert_same(graded(module, together, everything), expected)


@parametrized(FEATURES)
def test_states_of_all_steps(case):
    """The last ones are those of the call, the last layer's are its output, and those before are those of a prefix."""
    rnn, given = case.varied(**DOUBLE), case.given(**DOUBLE)
    directions, rows = rnn.num_directions, torch.arange(3)

    def every(x, h, **steps):
        states = rnn.all_states(x, h, **steps)
        return rnn(x, h, **steps)[0], states if rnn.batch_first else states.transpose(1, 2)

    for lengths in ((21, 21, 21), (9, 0, 21)):
        ends = torch.tensor(lengths)
        out, (states,) = case.call(every, **given, lengths=None if 0 not in lengths else ends)
        _, (h,) = case.call(rnn, **given, lengths=None if 0 not in lengths else ends)
        last = states[:, rows, (ends - 1).clamp(min=0)].unsqueeze(2)
        last[1::directions] = states[1::directions, :, :1] if directions == 2 else last[1::directions]
        assert_close(last[:, ends > 0], h[:, ends > 0], **TIGHT)
        if not rnn.residual and not getattr(rnn, "output_gate", None):
            assert_close(torch.cat(list(states[-directions:]), -1), out, **TIGHT)
        if directions == 1 and 0 not in lengths:
            prefix = {name: each if name == "h" else each[:, :5] for name, each in given.items()}
            assert_close(states[:, :, 4:5], case.call(rnn, **prefix)[1][0], **TIGHT)
    given, _ = padded(case, lengths, **DOUBLE)
    found = graded(rnn, lambda **given: case.call(every, lengths=ends, **given), given)
    assert all(each.isfinite().all() for name, each in found.items() if name != "gradient of x")


@parametrized([case for case in WITH_LENGTHS if "Block" not in case.name and "blocks" not in case.name])
def test_packed_is_padded(case):
    module = case.varied(**DOUBLE)
    for lengths, is_sorted in (((9, 1, 21), False), ((21, 9, 1), True)):
        ends = torch.tensor(lengths)
        given, _ = padded(case, lengths, **DOUBLE)

        def packed(ends=ends, is_sorted=is_sorted, h=None, **given):
            x, *steps = (pack_padded_sequence(each, ends, True, is_sorted) for each in given.values())
            out, states = case.call(module, x, h, **dict(zip(list(given)[1:], steps, strict=True)))
            assert isinstance(out, PackedSequence)
            # Whatever unpacks x, unpacks it.
            assert all(one is other for one, other in zip(out[1:], x[1:], strict=True))
            return pad_packed_sequence(out, True, total_length=case.steps)[0], states

        expected = graded(module, lambda ends=ends, **given: case.call(module, lengths=ends, **given), given)
        assert_same(graded(module, packed, given), expected)


# Forms of what is given


def ways(case, run, lengths=(4, 0, 3)):
    """The call, and the call with lengths if there are any."""
    yield partial(case.call, run)
    if "lengths" in case.takes:
        yield lambda **given: case.call(run, lengths=torch.tensor(lengths, dtype=torch.int64), **given)


WIDE = [case for case in ROWS if not case.is_cell or len(case.features) > 1]
EXPANDING = [case for case in WIDE if not case.of_torch and "lock" not in case.name]


@parametrized(some(EXPANDING, 2))
def test_a_state_is_what_expands(case):
    module, given = case.varied(**DOUBLE), case.given(steps=4, **DOUBLE)
    for form in (
        lambda state: state[:1],
        lambda state: state[0],
        lambda state: state.narrow(-1, 0, 1),
        lambda state: state[:, :1],
        lambda state: state.flatten()[0],
    ):
        states = [form(state) for state in given["h"]]
        expanded = [state.expand_as(each).clone() for state, each in zip(states, given["h"], strict=True)]
        for run, grad in itertools.product(ways(case, module), (True, False)):
            with torch.set_grad_enabled(grad):
                got, expected = (run(**{**given, "h": each}) for each in (states, expanded))
            # Without gradients, other code runs for one of them.
            assert_close(got, expected, **({"rtol": 0, "atol": 0} if grad else TIGHT))


@parametrized(some(ROWS, 4))
def test_strided_and_expanded_input(case):
    module, given = case.varied(**DOUBLE), case.given(**DOUBLE)
    given["reset"] = given["reset"][:1].expand(3, -1)
    x = given["x"]
    wide = torch.zeros([2 * size for size in x.shape]).double()
    places = tuple(slice(None, None, 2) for _ in x.shape)
    wide[places] = x
    forms = [wide[places], x[:1, :1].expand_as(x)]
    forms += [x.transpose(*dims).contiguous().transpose(*dims) for dims in ((0, 1), (0, 2), (1, -1))]
    for one, run in itertools.product(forms, ways(case, module)):
        before = one.clone()
        expected = run(**{**given, "x": before})
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert_close(run(**{**given, "x": one}), expected, **TIGHT)
        assert torch.equal(one, before), "the input was written to"
        dense, leaf = before.clone().requires_grad_(), one.detach().requires_grad_()
        grads = (torch.autograd.grad(run(**{**given, "x": each})[0].square().sum(), each)[0] for each in (dense, leaf))
        assert_close(*grads, **TIGHT)


@parametrized(some(ROWS, 2))
def test_nothing_in_nothing_out(case):
    module = case.varied(**DOUBLE)
    shape = case.call(module, **case.given(**DOUBLE))[0].shape[2:]
    empty = [] if case.of_torch else [(0, 5)] if case.is_cell else [(0, 5), (3, 0), (0, 0)]
    for batch, steps in empty:
        for run in ways(case, module, (0,) * batch):
            given = case.given(batch, steps, **DOUBLE)
            got = graded(module, run, given)
            assert got["out"].shape == (batch, steps, *shape)
            module.requires_grad_(False)
            for name, each in given.items():
                leaf = pytree.tree_map(lambda each: each.clone().requires_grad_(each.is_floating_point()), each)
                assert name == "reset" or run(**{**given, name: leaf})[0].requires_grad, name
            module.requires_grad_(True)
            assert not any(got[f"gradient of {name}"].any() for name, _ in module.named_parameters())
            if steps == 0:
                # Not even a reset changes the state.
                states = [each for name, each in got.items() if name.startswith("state")]
                assert_close(states, given["h"], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@parametrized(some(ROWS, 2))
def test_what_goes_in_comes_out_in_each_dtype(case, dtype):
    # Without oneDNN, because test_precision.py skips what it gets wrong.
    with torch.backends.mkldnn.flags(len(case.features) == 1):
        check_dtype(case, dtype)


def check_dtype(case, dtype):
    module, given = case.varied(dtype=dtype), case.given(dtype=dtype)
    wide = copy.deepcopy(module).double()
    for norm in (each for each in wide.modules() if isinstance(each, torch.nn.RMSNorm) and each.eps is None):
        norm.eps = torch.finfo(torch.float32).eps
    exact = {name: each if name in ("reset", "h") else each.double() for name, each in given.items()}
    exact["h"] = [each.double() for each in given["h"]]
    got, expected = graded(module, partial(case.call, module), given), partial(case.call, wide)(**exact)
    assert {each.dtype for each in got.values()} == {dtype} and all(each.isfinite().all() for each in got.values())
    eps = torch.finfo(dtype).eps
    # A norm of a few pixels or features enlarges rounding errors: those of torch's operations are up to 10 eps here.
    norms = {type(each).__name__ for each in module.modules()}
    most = 128 if "GroupNorm" in norms else 32 if "LayerNorm" in norms else 16
    for one, other in zip(list(got.values()), [expected[0], *expected[1]], strict=False):
        assert (one.double() - other).abs().max() <= most * eps * other.abs().max()
    if "lengths" not in case.takes:
        return
    # The gradient of each weight is summed in another order. Products of fewer rows round otherwise, and a norm of few
    # features enlarges that.
    most = 32 if dtype == torch.float32 else 8
    got = graded(module, lambda **given: case.call(module, lengths=torch.tensor([9, 1, 21]), **given), given)
    for name, other in graded(module, each_alone(case, partial(case.call, module), (9, 1, 21)), given).items():
        assert got[name].dtype == dtype
        assert (got[name].double() - other.double()).abs().max() <= most * eps * other.double().abs().max(), name


# Rounding to half width: layers and cells of one linear map or convolution


every_map = parametrized(ONE_MAP)
half_widths = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def of_map(module, x, h=None):
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
    expected = of_map(module, x)
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
    assert_last(states, of_map(module, x, h))


@every_map
def test_autocast_keeps_the_state_in_float32(case):
    module = case.make()
    for dtype in [torch.float32, torch.bfloat16]:
        x = torch.randn(2, 300, *case.features, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            out, states = case.call(module, x)
            expected = of_map(module, x)
            pieces = None
            for piece in x.split([100, 1, 199], 1):
                _, pieces = case.call(module, piece, pieces)
            _, again = case.call(module, x, [state.bfloat16() for state in states])
            assert again[0].dtype == torch.float32
        assert out.dtype == (torch.float32 if case.is_cell else torch.bfloat16)
        # Float32 in more than name: nothing was rounded to half width on the way.
        assert_last(states, expected)
        assert_close(pieces, states)
