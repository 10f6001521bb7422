"""The files from which Triton Inference Server runs the step of a model, and keeps the states of sequences."""

from pathlib import Path
from typing import Any

import onnx
import torch

from .check import require

# The other types have the same names as in ONNX.
_TYPES = {"FLOAT": "FP32", "DOUBLE": "FP64", "FLOAT16": "FP16", "BFLOAT16": "BF16"}


def configure(name: str, folder: Path, states: list[torch.Tensor], batch: int, sequences: int, seconds: int) -> None:
    """Write config.pbtxt and the initial states of one sequence into the folder that has the step as 1/model.onnx.

    The states are the inputs after the first one, and the last outputs. The batch becomes the first dimension of all
    inputs and outputs, because the server joins and divides tensors in that dimension.
    """
    path, count = folder / "1" / "model.onnx", len(states)
    file = onnx.load(path, load_external_data=False)
    inputs, outputs = [*file.graph.input], [*file.graph.output]
    symbol = next((size for size in _shape(inputs[0]) if isinstance(size, str)), "")
    batch_dims = [_move_batch(name, file.graph, value, symbol) for value in inputs + outputs]
    onnx.save(file, path)
    text = f'backend: "onnxruntime"\nmax_batch_size: {batch}\n'
    for kind, values in (("input", inputs[:1] + inputs[1 + count :]), ("output", outputs[:-count] or outputs)):
        text += "".join(f'{kind} {{ name: "{value.name}" {_described(value)} }}\n' for value in values)
    text += f"sequence_batching {{\n  max_sequence_idle_microseconds: {seconds * 10**6}\n"
    text += f"  oldest {{ max_candidate_sequences: {sequences} }}\n"
    (folder / "initial_state").mkdir()
    for before, after, state, dim in zip(inputs[1:], outputs[-count:], states, batch_dims[1:], strict=False):
        first = state.transpose(0, dim)[0].contiguous().cpu()
        (folder / "initial_state" / before.name).write_bytes(first.view(torch.uint8).numpy().tobytes())
        described = _described(before, [*first.shape])
        text += f'  state {{\n    input_name: "{before.name}" output_name: "{after.name}" {described}\n'
        text += f'    initial_state {{ name: "{before.name}" {described} data_file: "{before.name}" }}\n  }}\n'
    (folder / "config.pbtxt").write_text(text + "}\n", encoding="utf-8")


def _move_batch(name: str, graph: Any, value: Any, symbol: str) -> int:
    """Exchange the first dimension of an input or output with the batch, and return which one the batch was."""
    sizes = _shape(value)
    require(name, value.name, symbol in sizes[:-1], "of a batch and features", str(sizes))
    dim = sizes.index(symbol)
    if dim > 0:
        inside, is_input = f"{value.name}_inside", value in graph.input
        for names in (each for node in graph.node for each in (node.input, node.output)):
            names[:] = [inside if each == value.name else each for each in names]
        order = [dim, *range(1, dim), 0, *range(dim + 1, len(sizes))]
        ends = [value.name, inside] if is_input else [inside, value.name]
        node = onnx.helper.make_node("Transpose", ends[:1], ends[1:], perm=order)
        graph.node.insert(0 if is_input else len(graph.node), node)
        moved = [sizes[other] for other in order]
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, moved))
    return dim


def _shape(value: Any) -> list[int | str]:
    return [size.dim_value or size.dim_param for size in value.type.tensor_type.shape.dim]


def _described(value: Any, sizes: list[int] | None = None) -> str:
    """Return type and sizes of an input or output, without the batch, as the configuration has them."""
    kind = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
    shape = sizes or [-1 if isinstance(size, str) else size for size in _shape(value)[1:]]
    return f"data_type: TYPE_{_TYPES.get(kind, kind)} dims: {shape}"
