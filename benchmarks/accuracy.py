"""Print the largest relative error of each backend in float32 against float64, by sequence length.

    python benchmarks/accuracy.py

Pre-activations are sampled from N(0, 2^2), and all states are positive.
"""

import torch

import mingru
from mingru.bench import print_table

LENGTHS = [100, 1000, 10_000, 100_000, 1_000_000]
# The sequential backend takes a minute for the longest sequence, and its error does not depend on length.
LONGEST = {"sequential": 100_000}


def main() -> None:
    torch.manual_seed(0)
    backends = [name for name, can_run in mingru.backends().items() if can_run is True]
    rows = []
    for steps in LENGTHS:
        gate, candidate = (2 * torch.randn(1, steps, 4) for _ in range(2))
        # The tests compare this backend with a loop over time steps in float64.
        reference = mingru.functional.mingru(gate.double(), candidate.double(), backend="torch")
        row = [f"{steps:,}"]
        for backend in backends:
            if steps > LONGEST.get(backend, steps):
                row.append("")
                continue
            out = mingru.functional.mingru(gate, candidate, backend=backend)
            row.append(f"{((out - reference).abs() / reference).max().item():.1e}")
        rows.append(row)
    print_table("Largest relative error, float32", ["steps", *backends], rows)


if __name__ == "__main__":
    main()
