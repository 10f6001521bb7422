"""Time of a layer under torch.compile beside the same in eager, at the shapes of benchmarks/speed.py.

    python benchmarks/compiled.py

Medians of interleaved runs in one process, in milliseconds, forward in inference mode and forward + backward for all
inputs and parameters; float32.
"""

import argparse
from pathlib import Path

import torch
from measure import where, write_json

import mingru
from mingru.bench import SHAPES, forward, forward_backward, medians_ms, output, print_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each half of a row (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(where())
    rows, results = [], []
    for batch, steps, input_dims, hidden_dims in [*SHAPES, (16, 1024, 512, 512)]:
        torch._dynamo.reset()
        rnn = mingru.MinGRU(input_dims, hidden_dims)
        compiled = torch.compile(rnn, fullgraph=True)
        x = torch.randn(batch, steps, input_dims, requires_grad=True)
        functions = {
            "eager": lambda rnn=rnn, x=x: output(rnn(x)),
            "compiled": lambda compiled=compiled, x=x: output(compiled(x)),
        }
        leaves = [x, *rnn.parameters()]
        there = medians_ms({name: forward(function) for name, function in functions.items()}, args.seconds)
        back = medians_ms(
            {name: forward_backward(function, leaves) for name, function in functions.items()}, args.seconds
        )
        shape = (batch, steps, input_dims, hidden_dims)
        results.append({"shape": shape, "forward": there, "forward_backward": back})
        ratios = [f"{ms['compiled'] / ms['eager']:.2f}" for ms in (there, back)]
        rows.append([str(shape), *(f"{ms[name]:.3f}" for ms in (there, back) for name in functions), *ratios])
    columns = ["(B, S, I, H)", "eager", "compiled", "eager, fwd + bwd", "compiled, fwd + bwd", "ratio", "fwd + bwd"]
    print_table("torch.compile, ms, medians", columns, rows)
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
