"""Few test cases in place of a grid: every two values of two options meet."""

import itertools
import random


def cover(factors, allowed=lambda row: True):
    """Return few rows, with a value of each factor, in which each two values of two factors meet in an allowed row.

    Greedily: each next row is the best of thirty that are drawn around a pair that is missing.
    """
    draw = random.Random(0)

    def pairs(row):
        return set(itertools.combinations(row.items(), 2))

    def drawn(start):
        rows = ({name: start.get(name, draw.choice(factors[name])) for name in factors} for _ in range(200))
        return list(itertools.islice(filter(allowed, rows), 30))

    missing = {
        ((one, v), (two, w))
        for one, two in itertools.combinations(factors, 2)
        for v, w in itertools.product(factors[one], factors[two])
    }
    rows = []
    while missing:
        pair = draw.choice(sorted(missing, key=repr))
        candidates = drawn(dict(pair))
        if candidates:
            rows.append(max(candidates, key=lambda row: len(missing & pairs(row))))
            missing -= pairs(rows[-1])
        # Otherwise no allowed row has both values.
        missing.discard(pair)
    return rows


def named(options):
    """Return the id of a test case with these options."""
    return " ".join(f"{name}={value}" for name, value in options.items()) or "plain"
