"""Print the largest error of each backend in float32 against float64, by sequence length.

    python benchmarks/accuracy.py

Pre-activations are sampled from N(0, 2^2). The first table has relative errors of the gate "sigmoid", whose states are
positive, and the second those with elapsed times from 0 to 3. States of the other gates may cancel, so the third table
has errors relative to the recurrence of absolute values, s_t = |a_t| s_{t-1} + |b_t|. There the gates are shifted, so
that a state lasts for hundreds of time steps. The last table has constant gates, by the number of time steps that a
state lasts, L = 1 / (1 - a).
"""

import copy
from typing import Any

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
KINDS = {"": 0.0, ", slow gates": 4.6}
LAYERS: dict[str, Any] = {"mingru.drop_in.GRU": mingru.drop_in.GRU, "nn.GRU": torch.nn.GRU}
LAYERS |= {"mingru.drop_in.LSTM": mingru.drop_in.LSTM, "nn.LSTM": torch.nn.LSTM}
LIFETIMES = [10, 100, 1000, 10_000, 100_000, 1_000_000]


def main() -> None:
    torch.manual_seed(0)
    every = [name for name, can_run in mingru.backends().items() if can_run is True]
    for title, backends, most in (("", every, None), (" with dt", [name for name in every if name != "log"], 3.0)):
        rows = []
        for steps in LENGTHS:
            gate, candidate = (2 * torch.randn(1, steps, 4) for _ in range(2))
            dt = most and most * torch.rand(1, steps)
            rows.append([f"{steps:,}", *errors(backends, gate, candidate, dt=dt)])
        print_table(f"Largest relative error{title}, float32", ["steps", *backends], rows)

    rows = []
    backends = [backend for backend in every if backend in ("native", "torch")]
    for steps in LENGTHS[:-1]:
        gate, angle, candidate = (2 * torch.randn(1, steps, 4) for _ in range(3))
        signed = (gate - SHIFT) * torch.randn(1, steps, 4).sign(), candidate
        turned = gate[..., :2] - SHIFT, candidate
        options = {"bound": bound(*turned), "kind": "rotation", "angle": 2 * angle[..., :2], "activation": "tanh"}
        cells = errors(backends, *signed, bound=bound(*signed), kind="signed", activation="tanh")
        rows.append([f"{steps:,}", *cells, *errors(backends, *turned, **options)])
    names = [f"{kind}, {backend}" for kind in ("signed", "rotation") for backend in backends]
    print_table("Largest error relative to the recurrence of absolute values, float32", ["steps", *names], rows)

    rows = []
    for lifetime in LIFETIMES:
        gate = torch.tensor(lifetime - 1.0).log().neg().expand(1, LENGTHS[-1], 4)
        varying, constant = 2 * torch.randn(gate.shape), torch.ones(gate.shape)
        cells = []
        for backend in every:
            cells += errors([backend], *(x[:, : LONGEST.get(backend)] for x in (gate, varying)))
        rows.append([f"{lifetime:,}", *cells, *errors(["native"], gate, constant), f"{5e-7 * lifetime**0.5:.1e}"])
    header = ["L", *every, "native, constant candidate", "5e-7 sqrt(L)"]
    print_table("Largest relative error of constant gates at a million steps, float32", header, rows)
    columns = ["layer", "steps 1 to 10", "steps 991 to 1,000", "last state", "gradient of x", "of recurrent weights"]
    rows = [[f"{name}{kind}", *in_bfloat16(name, bias)] for kind, bias in KINDS.items() for name in LAYERS]
    print_table("Relative error under autocast to bfloat16", columns, rows)


def in_bfloat16(name: str, bias: float) -> list[str]:
    """Return the errors of a layer under autocast, whose biases of the update or forget gate are larger by `bias`."""
    torch.manual_seed(0)
    rnn = LAYERS[name](32, 128, batch_first=True)
    with torch.no_grad():
        rnn.bias_ih_l0[128:256] += bias
    exact = copy.deepcopy(rnn).double()
    x, found = torch.randn(16, 1000, 32), []
    for module, given in ((exact, x.double().requires_grad_()), (rnn, x.requires_grad_())):
        with torch.autocast("cpu", torch.bfloat16, enabled=module is rnn):
            out, last = module(given)
        last = last[0] if isinstance(last, tuple) else last
        grads = torch.autograd.grad(out[:, ::10].float().square().sum(), [given, module.weight_hh_l0])
        found.append([out[:, :10], out[:, 990:], last, *grads])
    return [f"{((one - true).norm() / true.norm()).item():.1e}" for true, one in zip(*found, strict=True)]


def errors(backends: list[str], gate: Tensor, candidate: Tensor, bound: Any = None, **options: Any) -> list[str]:
    """Return the largest error of each backend, relative to the state, or to `bound`."""
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    # The tests compare this backend with a loop over time steps in float64.
    exact = mingru.functional.mingru(gate.double(), candidate.double(), backend="torch", **wide)
    cells = []
    for backend in backends:
        if gate.shape[1] > LONGEST.get(backend, gate.shape[1]):
            cells.append("")
            continue
        error = (mingru.functional.mingru(gate, candidate, backend=backend, **options) - exact).abs()
        if "angle" in options:
            error = torch.view_as_complex(error.unflatten(2, (-1, 2))).abs()
        cells.append(f"{(error / (exact if bound is None else bound)).max().item():.1e}")
    return cells


def bound(gate: Tensor, candidate: Tensor) -> Tensor:
    """Return the recurrence of absolute values, of pairs if there is a gate for two candidates."""
    is_turned, gate, terms = gate.shape != candidate.shape, gate.double(), candidate.double().tanh()
    size = (-gate).sigmoid() if is_turned else (0.5 * gate).tanh().abs()
    # 1 - size, without cancellation.
    rest = gate.sigmoid() if is_turned else 2 * (-gate.abs()).sigmoid()
    terms = torch.view_as_complex(terms.unflatten(2, (-1, 2))).abs() if is_turned else terms.abs()
    # The initial state, whose two parts are 0.5 in a rotation.
    h = torch.full_like(size[:, :1], 0.5**0.5 if is_turned else 0.5)
    return mingru.functional.linear_scan(size, rest * terms, h, backend="torch")


if __name__ == "__main__":
    main()
