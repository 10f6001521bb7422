"""Print the largest error of each backend in float32 against float64, by sequence length.

    python benchmarks/accuracy.py

Pre-activations are sampled from N(0, 2^2). The first table has relative errors of the gate "sigmoid", whose states are
positive, and the second those with elapsed times from 0 to 3. States of the other gates may cancel, so the third table
has errors relative to the recurrence of absolute values, s_t = |a_t| s_{t-1} + |b_t|. There the gates are shifted, so
that a state lasts for hundreds of time steps. The last table has constant gates, by the number of time steps that a
state lasts, L = 1 / (1 - a).
"""

import torch
from torch import Tensor

import mingru
from mingru.bench import print_table

LENGTHS = [100, 1000, 10_000, 100_000, 1_000_000]
# The sequential backend takes a minute for the longest sequence, and its error does not depend on length. In the fourth
# table, it gets only this part of the sequence.
LONGEST = {"sequential": 100_000}
# The gates of the third table are from N(-8, 2^2).
SHIFT = 8.0
# The numbers of time steps that a state lasts in the fourth table.
LIFETIMES = [10, 100, 1000, 10_000, 100_000, 1_000_000]


def main() -> None:
    torch.manual_seed(0)
    every = [name for name, can_run in mingru.backends().items() if can_run is True]
    print_table("Largest relative error, float32", ["steps", *every], relative(every, with_dt=False))
    timed = [backend for backend in every if backend != "log"]
    print_table("Largest relative error with dt, float32", ["steps", *timed], relative(timed, with_dt=True))

    rows = []
    backends = [backend for backend in every if backend in ("native", "torch")]
    for steps in LENGTHS[:-1]:
        row = [f"{steps:,}"]
        gate, angle, candidate = (2 * torch.randn(1, steps, 4) for _ in range(3))
        signs = torch.randn(1, steps, 4).sign()
        inputs = {
            "signed": ((gate - SHIFT) * signs, candidate, None),
            "rotation": (gate[..., :2] - SHIFT, candidate, 2 * angle[..., :2]),
        }
        for kind, given in inputs.items():
            errors = relative_to_absolute(kind, *given, backends)
            row += [f"{error:.1e}" for error in errors]
        rows.append(row)
    names = [f"{kind}, {backend}" for kind in ("signed", "rotation") for backend in backends]
    print_table("Largest error relative to the recurrence of absolute values, float32", ["steps", *names], rows)

    header = ["L", *every, "native, constant candidate", "5e-7 sqrt(L)"]
    print_table("Largest relative error of constant gates at a million steps, float32", header, long(every))


def relative(backends: list[str], with_dt: bool) -> list[list[str]]:
    """Return a row for each length: the largest error of each backend, relative to the state."""
    rows = []
    for steps in LENGTHS:
        gate, candidate = (2 * torch.randn(1, steps, 4) for _ in range(2))
        dt = 3 * torch.rand(1, steps) if with_dt else None
        wide = None if dt is None else dt.double()
        # The tests compare this backend with a loop over time steps in float64.
        reference = mingru.functional.mingru(gate.double(), candidate.double(), dt=wide, backend="torch")
        row = [f"{steps:,}"]
        for backend in backends:
            if steps > LONGEST.get(backend, steps):
                row.append("")
                continue
            out = mingru.functional.mingru(gate, candidate, dt=dt, backend=backend)
            row.append(f"{((out - reference).abs() / reference).max().item():.1e}")
        rows.append(row)
    return rows


def long(backends: list[str]) -> list[list[str]]:
    """Return a row for each lifetime: the largest error of each backend, relative to the state."""
    rows = []
    for lifetime in LIFETIMES:
        gate = torch.tensor(lifetime - 1.0).log().neg().expand(1, LENGTHS[-1], 4)
        row = [f"{lifetime:,}"]
        varying, constant = 2 * torch.randn(gate.shape), torch.ones(gate.shape)
        for backend, candidate in [*((backend, varying) for backend in backends), ("native", constant)]:
            inputs = [x[:, : LONGEST.get(backend)] for x in (gate, candidate)]
            reference = mingru.functional.mingru(*(x.double() for x in inputs), backend="torch")
            out = mingru.functional.mingru(*inputs, backend=backend)
            row.append(f"{((out - reference).abs() / reference).max().item():.1e}")
        rows.append([*row, f"{5e-7 * lifetime**0.5:.1e}"])
    return rows


def relative_to_absolute(
    kind: str, gate: Tensor, candidate: Tensor, angle: Tensor | None, backends: list[str]
) -> list[float]:
    """Return the largest error of each backend, relative to the recurrence of absolute values."""
    wide = [None if x is None else x.double() for x in (gate, candidate, angle)]
    exact = mingru.functional.mingru(*wide[:2], kind=kind, angle=wide[2], activation="tanh", backend="torch")
    size = (0.5 * wide[0]).tanh().abs() if kind == "signed" else (-wide[0]).sigmoid()
    # 1 - size, without cancellation.
    rest = 2 * (-wide[0].abs()).sigmoid() if kind == "signed" else wide[0].sigmoid()
    terms = wide[1].tanh()
    terms = terms.abs() if kind == "signed" else torch.view_as_complex(terms.unflatten(2, (-1, 2))).abs()
    # The initial state, whose two parts are 0.5 in a rotation.
    h = torch.full_like(size[:, :1], 0.5 if kind == "signed" else 0.5**0.5)
    bound = mingru.functional.linear_scan(size, rest * terms, h, backend="torch")
    errors = []
    for backend in backends:
        out = mingru.functional.mingru(gate, candidate, kind=kind, angle=angle, activation="tanh", backend=backend)
        error = (out - exact).abs()
        if kind == "rotation":
            error = torch.view_as_complex(error.unflatten(2, (-1, 2))).abs()
        errors.append((error / bound).max().item())
    return errors


if __name__ == "__main__":
    main()
