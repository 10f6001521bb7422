"""Relative error of each form in float32 against float64, by length.

    python benchmarks/accuracy.py

Pre-activations are drawn from N(0, 2^2), the state is positive; the worst of all elements is shown.
"""

import torch

import mingru
from mingru.bench import print_table

LENGTHS = [100, 1000, 10_000, 100_000, 1_000_000]
# One step after the other takes a minute for the longest; its error does not depend on length.
LONGEST = {"sequential": 100_000}


def main() -> None:
    torch.manual_seed(0)
    bodies = [name for name, can_run in mingru.backends().items() if can_run is True]
    rows = []
    for steps in LENGTHS:
        gate, candidate = (2 * torch.randn(1, steps, 4) for _ in range(2))
        # The float64 of the same form: `tests` hold it against step-by-step float64.
        truth = mingru.functional.mingru(gate.double(), candidate.double(), backend="torch")
        row = [f"{steps}"]
        for body in bodies:
            if steps > LONGEST.get(body, steps):
                row.append("")
                continue
            out = mingru.functional.mingru(gate, candidate, backend=body)
            row.append(f"{((out - truth).abs() / truth).max().item():.1e}")
        rows.append(row)
    print_table("Worst relative error, float32", ["steps", *bodies], rows)


if __name__ == "__main__":
    main()
