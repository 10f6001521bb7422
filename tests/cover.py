"""Few test cases in place of a grid: every two values of two options meet."""

import itertools
import random


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
