"""Time small work, half precision and matrix products.

One step of layers and cells, and bfloat16 layers, beside linear maps and nn.GRU; and the three products of a linear map
by torch (MKL on x86), by oneDNN, and by this library, whose own product MINGRU_PRODUCT chooses.

    python benchmarks/small.py
    MINGRU_PRODUCT=mingru python benchmarks/small.py --products    # only the products

Times are medians of interleaved runs in one process. Before each timed run, the same call runs once. Steps are timed in
inference mode, with float32. On processors without bfloat16 matrix instructions, nn.Linear itself is slow in bfloat16.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from measure import add_shape_option, where, write_json
from torch import Tensor, nn

import mingru
from mingru.bench import forward, forward_backward, medians_ms, output, print_table

DIMS = 256
SHAPES = [(8, 512, 256, 256), (16, 1024, 512, 512)]
# Rows, features, columns.
PRODUCTS = [(4096, 256, 512), (2048, 512, 1024), (2048, 64, 128), (2048, 10, 200), (64, 256, 512), (8, 256, 512)]


def steps(seconds: float) -> dict[str, dict[str, float]]:
    """Time one step of one sequence; the first entry of each group is the baseline."""
    x, vector = torch.randn(1, 1, DIMS), torch.randn(1, DIMS)
    linear = nn.Linear(DIMS, 2 * DIMS)
    layer, gru = mingru.MinGRU(DIMS, DIMS), nn.GRU(DIMS, DIMS, batch_first=True)
    deep = mingru.MinGRU(DIMS, DIMS, 3, norm="rms", residual=True)
    linears = [nn.Linear(DIMS, 2 * DIMS) for _ in range(3)]
    cell, gru_cell = mingru.MinGRUCell(DIMS, DIMS), nn.GRUCell(DIMS, DIMS)
    h, h_gru, h_deep = torch.rand(1, 1, 1, DIMS), torch.zeros(1, 1, DIMS), torch.rand(3, 1, 1, DIMS)
    h_cell = torch.rand(1, DIMS)

    def three_linears() -> None:
        for each in linears:
            each(x)

    groups = {
        "one step of a layer": {
            "nn.Linear(I, 2H)": lambda: linear(x),
            "MinGRU": lambda: layer(x, h),
            "nn.GRU": lambda: gru(x, h_gru),
        },
        "one step of three layers, norm='rms', residual=True": {
            "three nn.Linear(I, 2H)": three_linears,
            "MinGRU": lambda: deep(x, h_deep),
        },
        "one step of a cell": {
            "nn.GRUCell": lambda: gru_cell(vector, h_cell),
            "MinGRUCell": lambda: cell(vector, h_cell),
        },
    }
    return {
        title: medians_ms({name: forward(call) for name, call in calls.items()}, seconds)
        for title, calls in groups.items()
    }


def half(shape: Sequence[int], seconds: float) -> dict[str, dict[str, float]]:
    """Time a bfloat16 module, and a float32 module under autocast, against their linear maps."""
    batch, num_steps, input_dims, hidden_dims = shape
    groups = {}
    for name, dtype in (("bfloat16 module", torch.bfloat16), ("float32 module, bfloat16 autocast", torch.float32)):
        autocast = dtype == torch.float32
        x = torch.randn(batch, num_steps, input_dims, dtype=dtype, requires_grad=True)
        modules: dict[str, nn.Module] = {
            "nn.Linear(I, 2H)": nn.Linear(input_dims, 2 * hidden_dims, dtype=dtype),
            "MinGRU": mingru.MinGRU(input_dims, hidden_dims, dtype=dtype),
        }

        def call(module: nn.Module, x: Tensor = x, autocast: bool = autocast) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return output(module(x))

        functions = {key: (lambda module=module, call=call: call(module)) for key, module in modules.items()}
        groups[f"{name}, forward"] = medians_ms({key: forward(f) for key, f in functions.items()}, seconds)
        groups[f"{name}, forward + backward"] = medians_ms(
            {key: forward_backward(f, [x, *modules[key].parameters()]) for key, f in functions.items()}, seconds
        )
    return groups


def products(seconds: float) -> dict[str, dict[str, float]]:
    """Time the product of a linear map, and those of the gradients of its input and of its weight."""
    groups = {}
    for rows, features, columns in PRODUCTS:
        x, weight, grad = torch.randn(rows, features), torch.randn(columns, features), torch.randn(rows, columns)
        factors = {"forward": (x, weight.t()), "gradient of x": (grad, weight), "of the weight": (grad.t(), x)}
        for name, (left, right) in factors.items():
            calls = {
                "torch.mm": partial(torch.mm, left, right),
                "mingru": partial(torch.ops.mingru.multiply, left, right, None),
            }
            if torch.backends.mkldnn.is_available():
                linear = torch.ops.mkldnn._linear_pointwise
                calls["oneDNN"] = partial(linear, left, right.t(), None, "none", [], "")
            groups[f"{(rows, features, columns)}, {name}"] = medians_ms(
                {key: forward(call) for key, call in calls.items()}, seconds
            )
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each table (default: %(default)s)")
    add_shape_option(parser, "two shapes, for the layers in bfloat16")
    parser.add_argument("--products", action="store_true", help="print only the table of matrix products")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(where())
    results = {} if args.products else steps(args.seconds)
    results |= products(args.seconds / 4)
    for shape in [] if args.products else args.shape or SHAPES:
        titled = half(shape, args.seconds).items()
        results |= {f"(B, S, I, H) = {tuple(shape)}, {title}": times for title, times in titled}
    for title, times in results.items():
        baseline = next(iter(times))
        rows = [[name, f"{ms:.4f}", f"{ms / times[baseline]:.2f}"] for name, ms in times.items()]
        print_table(title, ["", "median ms", f"relative to {baseline}"], rows)
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
