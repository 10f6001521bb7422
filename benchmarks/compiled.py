"""Time of a layer under torch.compile beside the same in eager, and of its linear map alone likewise.

    python benchmarks/compiled.py

Medians of interleaved runs in one process, in milliseconds, forward in inference mode and forward + backward for all
inputs and parameters; float32.
"""

import argparse
from pathlib import Path

import torch
from measure import where, write_json
from torch import nn

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
    for shape in [*SHAPES, (16, 1024, 512, 512)]:
        batch, steps, input_dims, hidden_dims = shape
        torch._dynamo.reset()
        modules = {
            "MinGRU": mingru.MinGRU(input_dims, hidden_dims),
            "nn.Linear": nn.Linear(input_dims, 2 * hidden_dims),
        }
        x = torch.randn(batch, steps, input_dims, requires_grad=True)
        calls, leaves = {}, {}
        for name, module in modules.items():
            compiled = torch.compile(module, fullgraph=True)
            for how, run in ((f"{name}, eager", module), (f"{name}, compiled", compiled)):
                calls[how] = lambda run=run, x=x: output(run(x))
                leaves[how] = [x, *module.parameters()]
        there = medians_ms({how: forward(call) for how, call in calls.items()}, args.seconds)
        back = medians_ms({how: forward_backward(call, leaves[how]) for how, call in calls.items()}, args.seconds)
        results.append({"shape": shape, "forward": there, "forward_backward": back})
        row = [str(shape), *(f"{ms[f'MinGRU, {how}']:.3f}" for ms in (there, back) for how in ("eager", "compiled"))]
        row += [f"{ms[f'{name}, compiled'] / ms[f'{name}, eager']:.2f}" for name in modules for ms in (there, back)]
        rows.append(row)
    columns = ["(B, S, I, H)", "eager", "compiled", "eager, fwd + bwd", "compiled, fwd + bwd"]
    columns += ["ratio", "fwd + bwd", "ratio of nn.Linear", "fwd + bwd"]
    print_table("torch.compile, ms, medians", columns, rows)
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
