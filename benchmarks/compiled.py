"""Time a layer, and a linear map of its size, under torch.compile and in eager mode.

    python benchmarks/compiled.py

Times are medians of interleaved runs in one process, in milliseconds, with float32. Forward is timed in inference mode.
Forward + backward includes the gradients of all inputs and parameters.
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
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each set of calls (default: %(default)s)")
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
        forward_ms = medians_ms({how: forward(call) for how, call in calls.items()}, args.seconds)
        both_ms = medians_ms({how: forward_backward(call, leaves[how]) for how, call in calls.items()}, args.seconds)
        results.append({"shape": shape, "forward": forward_ms, "forward_backward": both_ms})
        times = (forward_ms, both_ms)
        row = [str(shape), *(f"{ms[f'MinGRU, {how}']:.3f}" for ms in times for how in ("eager", "compiled"))]
        row += [f"{ms[f'{name}, compiled'] / ms[f'{name}, eager']:.2f}" for name in modules for ms in times]
        rows.append(row)
    columns = ["(B, S, I, H)", "eager", "compiled", "eager, fwd + bwd", "compiled, fwd + bwd"]
    columns += ["compiled / eager", "fwd + bwd", "compiled / eager, nn.Linear", "fwd + bwd"]
    print_table("torch.compile, ms, medians", columns, rows)
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
