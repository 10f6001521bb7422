"""Time of a training step by length, of minGRU and minLSTM beside nn.GRU and nn.LSTM, and beside a loop in Python.

    python -m benchmarks.reproduce.speed
    python -m benchmarks.reproduce.speed --batch-size 64 --device cuda --json gpu.json    # the batch of the paper

The loop calls torch's cell for one time step after the other, as the baseline in figure 1 of Feng et al. 2024 does.
nn.GRU and nn.LSTM have the same weights, and are one call for all time steps. Times are medians of interleaved forward
and backward passes of one layer.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

import mingru
from mingru.bench import forward_backward, medians_ms, output

from .common import start

DEFAULTS: dict[str, Any] = {"lengths": [64, 256, 512, 1024, 4096], "batch_size": 16, "hidden_dims": 64, "seconds": 4.0}
PAIRS = {"GRU": (mingru.MinGRU, nn.GRU, nn.GRUCell), "LSTM": (mingru.MinLSTM, nn.LSTM, nn.LSTMCell)}


def loop(cell: nn.Module, x: Tensor) -> Tensor:
    """Return the states of all time steps, computed by one call for each."""
    state, states = None, []
    for step in x.unbind(1):
        state = cell(step, state)
        states.append(output(state))
    return torch.stack(states, 1)


def main(arguments: list[str] | None = None) -> None:
    args, results = start("speed", __doc__, DEFAULTS, arguments)
    dims = args.hidden_dims

    def compute(kind: str, length: int) -> dict[str, Any]:
        torch.manual_seed(0)
        x = torch.randn(args.batch_size, length, dims, device=args.device, requires_grad=True)
        minimal, layer, cell = PAIRS[kind]
        modules = {"minimal": minimal(dims, dims), "layer": layer(dims, dims, batch_first=True)}
        modules["loop"] = cell(dims, dims)

        def call(name: str, module: nn.Module) -> Any:
            leaves = [x, *module.to(args.device).parameters()]
            return forward_backward(lambda: loop(module, x) if name == "loop" else output(module(x)), leaves)

        calls = {name: call(name, x) for name, x in modules.items()}
        return {"ms": medians_ms(calls, args.seconds, device=args.device)}

    for length, kind in itertools.product(args.lengths, PAIRS):
        results.run(f"{kind}, {length}", compute, kind, length)


if __name__ == "__main__":
    main()
