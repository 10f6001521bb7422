"""Size and time of an exported layer in ONNX Runtime, beside an exported nn.GRU.

    python benchmarks/deploy.py

One layer, float32, state in and out, each file written once for any batch (and any length, for sequences up to 512
steps). Medians of interleaved runs in one process, in milliseconds; every session has its inputs ready, and its outputs
are made anew by each call. What runs on one thread is timed apart from what runs on two.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from measure import where, write_json
from torch import Tensor, nn
from torch.export import Dim

import mingru
from mingru.bench import medians_ms

GRU = "nn.GRU"
STEPS = [(1, 1, 256, 256)]
SEQUENCES = [(1, 512, 256, 256), (8, 512, 256, 256)]
THREADS = [1, 2]


def layers(input_dims: int, hidden_dims: int, is_step: bool) -> dict[str, nn.Module]:
    modules = {
        GRU: nn.GRU(input_dims, hidden_dims, batch_first=True),
        "MinGRU": mingru.MinGRU(input_dims, hidden_dims),
        "drop_in.GRU": mingru.drop_in.GRU(input_dims, hidden_dims, batch_first=True),
    }
    if is_step:
        modules["MinGRUCell"] = mingru.MinGRUCell(input_dims, hidden_dims)
    return modules


def example(name: str, batch: int, steps: int, input_dims: int, hidden_dims: int) -> tuple[Tensor, Tensor]:
    """x and h as the module of this name takes them."""
    if name == "MinGRUCell":
        return torch.randn(batch, input_dims), torch.rand(batch, hidden_dims)
    state = (1, batch, 1, hidden_dims) if name == "MinGRU" else (1, batch, hidden_dims)
    return torch.randn(batch, steps, input_dims), torch.rand(state)


def export(name: str, module: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    _, steps, *dims = shape
    is_step = steps == 1
    if name != GRU:
        bound = {} if is_step else {"max_steps": steps}
        mingru.export.onnx(module, example(name, 2, min(steps, 20), *dims), path, kind=kind(steps), **bound)
        return
    # Of any batch; its graph holds the example's steps where a step is one, else as many as come.
    free = ({0: "batch"} if is_step else {0: "batch", 1: "time"}, {1: Dim.AUTO})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            example(name, 2, min(steps, 20), *dims),
            path,
            input_names=["x", "h"],
            output_names=["out", "h_out"],
            dynamic_shapes=free,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def kind(steps: int) -> str:
    return "step" if steps == 1 else "sequence"


def session(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Or the threads of one session would go on waiting busily while another is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Of nn.GRU's file: see `limits`.
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def call(runs: Any, args: tuple[Tensor, ...]) -> Callable[[], list[Any]]:
    given = {each.name: arg.numpy() for each, arg in zip(runs.get_inputs(), args, strict=True)}
    return partial(runs.run, None, given)


def deployed(shape: tuple[int, ...], folder: Path, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes of each file, and milliseconds of each by name and number of threads."""
    modules = layers(*shape[2:], is_step=shape[1] == 1)
    paths = {name: folder / f"{name}.onnx" for name in modules}
    inputs = {name: example(name, *shape) for name in modules}
    for name, module in modules.items():
        export(name, module, shape, paths[name])
    times_ms = {}
    for threads in THREADS:
        calls = {name: call(session(path, threads), inputs[name]) for name, path in paths.items()}
        # A figure for something else would be none.
        for name, module in modules.items():
            with torch.no_grad():
                outputs = module(*inputs[name])
            expected = (outputs,) if isinstance(outputs, Tensor) else outputs
            for got, one in zip(calls[name](), expected, strict=True):
                torch.testing.assert_close(torch.from_numpy(got), one, rtol=1e-4, atol=1e-5)
        times_ms |= {f"{name}, {threads}": ms for name, ms in medians_ms(calls, seconds / len(THREADS)).items()}
    return {name: path.stat().st_size for name, path in paths.items()}, times_ms


def show(shape: tuple[int, ...], sizes: dict[str, float], times_ms: dict[str, float]) -> None:
    columns = ["file, kB", *(f"{threads} thread{'s'[: threads - 1]}, ms" for threads in THREADS)]
    columns += [f"{GRU} / it, {threads}" for threads in THREADS]
    print(
        f"\n(B, S, I, H) = {shape}, {kind(shape[1])}\n\n| | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}"
    )
    for name, size in sizes.items():
        taken = [times_ms[f"{name}, {threads}"] for threads in THREADS]
        against = [times_ms[f"{GRU}, {threads}"] for threads in THREADS]
        cells = [f"{size / 1000:.0f}", *(f"{ms:.3f}" for ms in taken)]
        cells += [f"{base / ms:.2f}" for base, ms in zip(against, taken, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def limits(folder: Path) -> dict[str, str]:
    """What an exported sequence takes that is other than its example, of 2 by 20."""
    found = {}
    shape = (2, 512, 16, 16)
    for name, module in layers(*shape[2:], is_step=False).items():
        path = folder / f"{name}.onnx"
        export(name, module, shape, path)
        runs = session(path, 1)
        told = ", ".join(f"{each.name} {each.shape}" for each in [*runs.get_inputs(), *runs.get_outputs()])
        came = []
        for batch, steps in [(2, 20), (3, 20), (3, 7), (1, 1), (1, 512)]:
            args = example(name, batch, steps, *shape[2:])
            with torch.no_grad():
                expected = module(*args)[0]
            try:
                out = torch.from_numpy(call(runs, args)()[0])
                right = out.shape == expected.shape and torch.allclose(out, expected, rtol=1e-4, atol=1e-5)
                came.append(f"({batch}, {steps}) {'right' if right else 'WRONG'}")
            # Whatever the runtime raises is the answer.
            except Exception as error:
                came.append(f"({batch}, {steps}) {type(error).__name__}")
        found[name] = f"{told}; at (B, S) {', '.join(came)}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each table (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    print({**where(), "onnxruntime": onnxruntime.__version__})
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for shape in [*STEPS, *SEQUENCES]:
            sizes, times_ms = deployed(shape, Path(name), args.seconds)
            results[str(shape)] = {"bytes": sizes, "ms": times_ms}
            show(shape, sizes, times_ms)
        results["limits"] = limits(Path(name))
    print("\nWhat the files of sequences take, exported with an example of (B, S) = (2, 20):\n")
    for name, told in results["limits"].items():
        print(f"- {name}: {told}")
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
