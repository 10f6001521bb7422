"""Routes through a module with a state, which all compute the same, and their comparison with the reference.

A route is a function of (module, x, h, case) that returns (out, states), with features or ids x, and a list of states
or None as h. `out` is 0 in the padding.
"""

import copy
from itertools import pairwise
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from mingru.models import map_state

EPS = torch.finfo(torch.float32).eps


class Case(NamedTuple):
    """A batch that Hypothesis has chosen."""

    lengths: list[int]
    cuts: list[int]
    resets: list[tuple[int, int]]
    with_state: bool
    seed: int

    @property
    def num_steps(self):
        return max(self.lengths)

    @property
    def sizes(self):
        """Sizes of the pieces, of which some may be 0."""
        return [end - start for start, end in pairwise([0, *sorted(self.cuts), self.num_steps])]

    @property
    def reset(self):
        if not self.resets:
            return None
        mask = torch.zeros(len(self.lengths), self.num_steps, dtype=torch.bool)
        for row, step in self.resets:
            mask[row, step] = True
        return mask

    @property
    def padding(self):
        return (torch.arange(self.num_steps) >= torch.tensor(self.lengths).unsqueeze(1)).unsqueeze(2)


@st.composite
def cases(draw, equal_lengths=False):
    batch, num_steps = draw(st.integers(1, 3)), draw(st.integers(1, 10))
    lengths = [num_steps] * batch
    if not equal_lengths and draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, num_steps), min_size=batch, max_size=batch).filter(any))
    last = max(lengths) - 1
    cuts = draw(st.lists(st.integers(0, last + 1), max_size=4))
    resets = draw(st.lists(st.tuples(st.integers(0, batch - 1), st.integers(0, last)), max_size=6))
    return Case(lengths, cuts, resets, draw(st.booleans()), draw(st.integers(0, 2**31)))


# Routes for rows of the same length


def one_pass(module, x, h, case):
    return module(x, h, case.reset)


def pieces(module, x, h, case):
    return joined(module, x, h, case.reset, case.sizes)


def steps(module, x, h, case):
    return joined(module, x, h, case.reset, [1] * case.num_steps)


def detached_pieces(module, x, h, case):
    return joined(module, x, h, case.reset, case.sizes, torch.Tensor.detach)


def joined(module, x, h, reset, sizes, between=lambda state: state):
    resets = [None] * len(sizes) if reset is None else reset.split(sizes, 1)
    outs = []
    for piece, piece_reset in zip(x.split(sizes, 1), resets, strict=True):
        out, h = module(piece, h, piece_reset)
        outs.append(out)
        h = map_state(between, h)
    return torch.cat(outs, 1), h


def calls_between_resets(module, x, h, case):
    """Each row alone, with a call from each reset to the next, which starts without a state."""
    rows = []
    for row in range(len(x)):
        starts = sorted({0, *(step for index, step in case.resets if index == row)})
        state = None if h is None or (row, 0) in case.resets else map_state(lambda each, row=row: each[:, [row]], h)
        outs = []
        for start, end in pairwise([*starts, case.num_steps]):
            out, last = module(x[[row], start:end], state)
            outs.append(out)
            state = None
        rows.append((torch.cat(outs, 1), last))
    return stacked(rows)


EQUAL_LENGTHS = {"pieces": pieces, "steps": steps, "calls between resets": calls_between_resets}

# Routes for rows of different lengths


def alone(module, x, h, case):
    """Each row in a call of its own."""
    rows = []
    for row, length in enumerate(case.lengths):
        state = None if h is None else map_state(lambda each, row=row: each[:, [row]], h)
        rows.append(module(x[[row], :length], state, None if case.reset is None else case.reset[[row], :length]))
    return stacked(rows)


def padded(module, x, h, case):
    if x.is_floating_point():
        x = x.masked_fill(case.padding, float("nan"))
    out, h = module(x, h, case.reset, torch.tensor(case.lengths))
    return out.masked_fill(case.padding, 0.0), h


def padded_pieces(module, x, h, case):
    """Call the module for each piece, in which some sequences have no steps."""
    outs = []
    for start, size in zip([0, *sorted(case.cuts)], case.sizes, strict=True):
        steps = slice(start, start + size)
        lengths = (torch.tensor(case.lengths) - start).clamp(0, size)
        part, h = module(x[:, steps], h, None if case.reset is None else case.reset[:, steps], lengths)
        outs.append(part)
    return torch.cat(outs, 1).masked_fill(case.padding, 0.0), h


def stacked(rows):
    """Return the outputs of single rows as a padded batch, and their states."""
    out = pad_sequence([out.squeeze(0) for out, _ in rows], batch_first=True)
    return out, [torch.cat(states, 1) for states in zip(*(states for _, states in rows), strict=True)]


ANY_LENGTHS = {"padded": padded, "padded pieces": padded_pieces}

# Comparison


def varied(module):
    """Return the module after a change of the parameters that are 0, 1 or equal at first."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.dim() == 1 or "initial_state" in name:
                weight.add_(torch.randn_like(weight) / 4)
    return module


def graded(route, module, x, h, case):
    """Return out and the states of a route, and the gradients of x, h and all parameters."""
    leaves = dict(module.named_parameters())
    if x.is_floating_point():
        leaves["x"] = x = x.detach().clone().requires_grad_()
    if h is not None:
        h = [each.detach().clone().requires_grad_() for each in h]
        leaves |= {f"h[{index}]": each for index, each in enumerate(h)}
    out, states = route(module, x, h, case)
    values = named(out, states)
    # Each number has another weight, so that a test fails if two numbers are exchanged.
    weights = [torch.linspace(-1, 2, each.numel(), dtype=each.dtype).view(each.shape) for each in values.values()]
    loss = sum((each.square() * weight).sum() for each, weight in zip(values.values(), weights, strict=True))
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return values, dict(zip(leaves, grads, strict=True))


def named(out, states):
    return {"out": out, **{f"state {index}": each for index, each in enumerate(states)}}


def graded_reference(function, route, module, x, h, case):
    """Return the same of the reference `function`, in float64 and with the eps of the module's norms."""
    model = copy.deepcopy(module).double()
    x = x.double() if x.is_floating_point() else x
    h = None if h is None else map_state(torch.Tensor.double, h)
    eps = torch.finfo(next(module.parameters()).dtype).eps
    return graded(
        lambda _, x, h, case: route(lambda x, h, reset=None: function(model, x, h, reset, eps), x, h, case),
        model,
        x,
        h,
        case,
    )


def errors(got, expected):
    """Return the largest error of each value and of each gradient, relative to the largest value and gradient.

    A gradient is not divided by its own largest number, because the terms of its sum may cancel.
    """
    found = []
    for tensors, others in zip(got, expected, strict=True):
        largest = max(other.abs().max() for other in others.values())
        found.append({name: ((tensors[name] - other).abs().max() / largest).item() for name, other in others.items()})
    return found


def assert_as_exact(route, got, expected, allowed):
    """Check that the errors of a route are at most a few times the errors of a plain route, `allowed`.

    A value may have three times the largest error of all values of the plain route, and one unit in the last place
    more; likewise a gradient.
    """
    kinds = ("value", "gradient")[: len(allowed)]
    for kind, found, plain in zip(kinds, errors(got, expected), allowed, strict=True):
        bound = 3 * max(plain.values()) + EPS
        for name, error in found.items():
            assert error <= bound, f"{route}, {kind} {name}: error {error:.1e}, allowed {bound:.1e}"


def assert_routes_equal(function, module, x, h, case):
    """Check all routes that fit the lengths of the rows, against the reference `function`."""
    if len(set(case.lengths)) == 1:
        plain, routes = one_pass, {**EQUAL_LENGTHS, **ANY_LENGTHS}
    else:
        plain, routes = alone, ANY_LENGTHS
    expected = graded_reference(function, plain, module, x, h, case)
    allowed = errors(graded(plain, module, x, h, case), expected)
    for name, route in routes.items():
        assert_as_exact(name, graded(route, module, x, h, case), expected, allowed)
    # Other code runs without gradients.
    with torch.no_grad():
        for name, route in {**routes, "one pass": plain}.items():
            got = named(*route(module, x, h, case))
            assert_as_exact(f"{name} without gradients", [got], expected[:1], allowed[:1])


def assert_equals_the_reference(function, module, x, h, case, route=padded, plain=alone):
    """Check a route in float64: values, also without gradients, and the gradients of x, h and all parameters."""
    values, gradients = graded_reference(function, plain, module, x, h, case)
    got = graded(route, module, x, h, case)
    with torch.no_grad():
        without_gradients = named(*plain(module, x, h, case))
    for tensors, others in ((got[0], values), (got[1], gradients), (without_gradients, values)):
        assert tensors.keys() == others.keys()
        for name, other in others.items():
            assert_close(tensors[name], other, msg=lambda message, name=name: f"{name}: {message}")
