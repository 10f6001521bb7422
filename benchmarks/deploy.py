"""Measure file size and time of exported layers in ONNX Runtime, and compare them with an exported nn.GRU.

    python benchmarks/deploy.py

Each file has one float32 layer, with its state as input and output. The batch size is dynamic; in files for sequences
the length is dynamic too, up to 512 steps. Times are medians of interleaved runs in one process, in milliseconds. The
inputs exist before a call, and each call allocates its outputs. Calls on one thread and on two are timed separately.
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
    """Return x and h for the module of this name."""
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
    # The batch size is dynamic; the number of steps is 1 for kind "step", else dynamic.
    dynamic = ({0: "batch"} if is_step else {0: "batch", 1: "time"}, {1: Dim.AUTO})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            example(name, 2, min(steps, 20), *dims),
            path,
            input_names=["x", "h"],
            output_names=["out", "h_out"],
            dynamic_shapes=dynamic,
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
    # Otherwise the threads of a session keep spinning while another session is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Hides the warnings about nn.GRU's file; `limits` shows which inputs the file takes.
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def call(runs: Any, args: tuple[Tensor, ...]) -> Callable[[], list[Any]]:
    given = {each.name: arg.numpy() for each, arg in zip(runs.get_inputs(), args, strict=True)}
    return partial(runs.run, None, given)


def deployed(shape: tuple[int, ...], folder: Path, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """Return the bytes of each file, and its milliseconds by name and number of threads."""
    modules = layers(*shape[2:], is_step=shape[1] == 1)
    paths = {name: folder / f"{name}.onnx" for name in modules}
    inputs = {name: example(name, *shape) for name in modules}
    for name, module in modules.items():
        export(name, module, shape, paths[name])
    times_ms = {}
    for threads in THREADS:
        calls = {name: call(session(path, threads), inputs[name]) for name, path in paths.items()}
        # Timing a wrong result is meaningless.
        for name, module in modules.items():
            with torch.no_grad():
                outputs = module(*inputs[name])
            expected = (outputs,) if isinstance(outputs, Tensor) else outputs
            for got, output in zip(calls[name](), expected, strict=True):
                torch.testing.assert_close(torch.from_numpy(got), output, rtol=1e-4, atol=1e-5)
        times_ms |= {f"{name}, {threads}": ms for name, ms in medians_ms(calls, seconds / len(THREADS)).items()}
    return {name: path.stat().st_size for name, path in paths.items()}, times_ms


def show(shape: tuple[int, ...], sizes: dict[str, float], times_ms: dict[str, float]) -> None:
    counts = [f"{threads} thread{'s'[: threads - 1]}" for threads in THREADS]
    columns = ["file, kB", *(f"{count}, ms" for count in counts)]
    columns += [f"speed-up over {GRU}, {count}" for count in counts]
    print(
        f"\n(B, S, I, H) = {shape}, {kind(shape[1])}\n\n| | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}"
    )
    for name, size in sizes.items():
        own = [times_ms[f"{name}, {threads}"] for threads in THREADS]
        gru = [times_ms[f"{GRU}, {threads}"] for threads in THREADS]
        cells = [f"{size / 1000:.0f}", *(f"{ms:.3f}" for ms in own)]
        cells += [f"{gru_ms / ms:.2f}" for gru_ms, ms in zip(gru, own, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def limits(folder: Path) -> dict[str, str]:
    """Return the signature of each file for sequences, and its outcome for several (B, S)."""
    found = {}
    shape = (2, 512, 16, 16)
    for name, module in layers(*shape[2:], is_step=False).items():
        path = folder / f"{name}.onnx"
        export(name, module, shape, path)
        runs = session(path, 1)
        signature = ", ".join(f"{each.name} {each.shape}" for each in [*runs.get_inputs(), *runs.get_outputs()])
        outcomes = []
        for batch, steps in [(2, 20), (3, 20), (3, 7), (1, 1), (1, 512)]:
            args = example(name, batch, steps, *shape[2:])
            with torch.no_grad():
                expected = module(*args)[0]
            try:
                out = torch.from_numpy(call(runs, args)()[0])
                right = out.shape == expected.shape and torch.allclose(out, expected, rtol=1e-4, atol=1e-5)
                outcomes.append(f"({batch}, {steps}) {'right' if right else 'WRONG'}")
            except Exception as error:
                outcomes.append(f"({batch}, {steps}) {type(error).__name__}")
        found[name] = f"{signature}; for (B, S): {', '.join(outcomes)}"
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
    print("\nInputs and outputs of the files for sequences, which were exported with (B, S) = (2, 20):\n")
    for name, text in results["limits"].items():
        print(f"- {name}: {text}")
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
