"""The vocabulary of all tables of tests: options and their values, few combinations of them, and what calls are given.

`cases.py` has rows of modules, `ops/calls.py` rows of recurrences, and `ops/compiling.py` rows of compiled kernels.
pytest is not needed, because benchmarks/gpu/smoke.py may have none.
"""

import itertools
import random

import torch

# The cells of a gate, and all.
GATED = ["mingru", "mingru_signed", "mingru_rotation", "mingru_quaternion", "mingru_mixed"]
CELLS = [*GATED, "minlstm", "minlstm_unnormalized", "gru"]
CANDIDATES = ["positive", "linear", "tanh"]
DOUBLE, TIGHT, EXACT = {"dtype": torch.double}, {"rtol": 1e-9, "atol": 1e-9}, {"rtol": 0, "atol": 0}
# A layer of these options, or a recurrence, may be called in these ways.
CALLS = {"batch_first": [True, False], "layout": ["padded", "lengths", "packed"], "reset": [False, True]}


def cover(factors, allowed=lambda row: True, strength=2):
    """Return few rows, with a value of each factor, in which each two values of two factors meet in an allowed row.

    `strength` is the number of values that meet, two or more. Greedily: each next row is the best of thirty that are
    drawn around values that have not met.
    """
    draw = random.Random(0)

    def met(row):
        return set(itertools.combinations(row.items(), strength))

    def drawn(start):
        rows = ({name: start.get(name, draw.choice(factors[name])) for name in factors} for _ in range(200))
        return list(itertools.islice(filter(allowed, rows), 30))

    missing = {
        tuple(zip(names, values, strict=True))
        for names in itertools.combinations(factors, strength)
        for values in itertools.product(*(factors[name] for name in names))
    }
    rows, order = [], sorted(missing, key=repr)
    while missing:
        order = [values for values in order if values in missing]
        values = draw.choice(order)
        candidates = drawn(dict(values))
        if candidates:
            rows.append(max(candidates, key=lambda row: len(missing & met(row))))
            missing -= met(rows[-1])
        # Otherwise no allowed row has all of these values.
        missing.discard(values)
    return rows


def named(options):
    """Return the id of a test case with these options."""
    return " ".join(f"{name}={value}" for name, value in options.items()) or "plain"


# What a call is given, each with the batch first.

# Orders in memory. In packed sequences, the second dimension has the features.
MEMORY = {
    "contiguous": lambda x: x,
    "other dimension first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "features before steps": lambda x: x.mT.contiguous().mT,
    "every other feature": lambda x: torch.stack([x, x], -1)[..., 1],
    "every other step": lambda x: torch.stack([x, x], 2)[:, :, 1],
    "an odd address": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),
    "one row for all": lambda x: x[:1].expand_as(x),
    "one column for all": lambda x: x[:, :1].expand_as(x),
    "one feature for all": lambda x: x[..., :1].expand_as(x),
}


def steps_of(batch, steps, **factory):
    """Return resets, of which there is one at the first step and one at the last, and elapsed times from 0 to 3."""
    reset = torch.rand(batch, steps) < 0.2
    reset[:1, :1] = reset[1:2, -1:] = True
    return reset, 3 * torch.rand(batch, steps, **factory)


def lengths_of(batch, steps, shortest=0):
    """Return lengths of which the first is the longest, with all steps, and the last the shortest."""
    lengths = torch.randint(shortest, steps + 1, (batch,)).sort(descending=True).values
    lengths[0], lengths[-1] = steps, steps if batch == 1 else shortest
    return lengths
