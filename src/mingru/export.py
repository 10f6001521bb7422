"""Export models to files for other runtimes."""

import importlib
import inspect
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .check.calls import arguments_checked
from .check.values import check_int, check_type, dims, imported, not_a_tensor, require
from .models import LanguageModel
from .models.generation import in_eval_mode
from .modules.layer import Layer, is_bidirectional
from .ops.backends import in_onnx, torch_in_graphs
from .ops.names_of_torch import ONNX_REGISTRATION_LOG, pytree

__all__ = ["onnx"]

_NAME = "export.onnx"
Inputs = tuple[Any, ...]


def __getattr__(name: str) -> Any:
    remedy = "; see 'Serving streams' in the documentation, which writes its files with export.onnx"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}" + remedy * (name == "triton"))


@arguments_checked(function=_NAME)
def onnx(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kind: Literal["sequence", "step"] = "sequence",
    max_steps: int | None = None,
    dynamic_shapes: Any = None,
) -> None:
    """Export a model to an ONNX file, for whole sequences or for one step.

    Of a class of this library, the batch size is dynamic, and so is the number of steps of a sequence. The file has no
    custom operators, and runs without this library. It has no loops, except of a `GRU`: one node, `GRU`, for each
    layer and direction, or with resets `Scan`. The model is exported in eval mode; its training mode is restored
    afterwards.

    Args:
        model: Layer, cell or stack of this library or of `mingru.drop_in`, or your own model that contains such
            modules. Parameters become constants.
        example_inputs: x, or a tuple of the arguments of `forward` in order, such as (x, h, reset, lengths, dt). Each
            is a tensor or None; a state can be a list of tensors. Arguments other than None become inputs of the file.
            Their values do not matter, nor, for a class of this library, do the batch size and the number of steps.
            Arguments of your own model are passed by name.
        path: Path of the file, in an existing folder. An existing file is replaced only if the export succeeds. If
            the model exceeds 2 GB, its weights are in a second file, with `.data` added to the name.
        kind: "sequence": x has any number of steps. "step": x is one step, (B, 1, I) for a layer and (B, I) for a cell,
            and the state is an input and an output. If `example_inputs` has no state, the state that the model returns
            is used as the example; the example of your own model must have one. For a cell, both kinds give the same
            graph, except for that state. A bidirectional layer cannot compute steps.
        max_steps: Longest sequence that layers in the file support, at least 2; only for "sequence". A lower maximum
            makes the file smaller and faster: each doubling adds some seven operations for each layer and direction, of
            quaternions eleven. Longer sequences give NaN, except in the states of a chunk that follow a reset in it,
            which are right. It does not matter for a `GRU`, nor for a layer whose number of steps is fixed.
            Default: 268 million.
        dynamic_shapes: Dynamic dimensions of all inputs, as `torch.export.export` takes them, including a state that is
            added for "step". Default for classes of this library: batch and time. Default for your own model: none, so
            that all sizes are those of the example. The exporter fixes a size of 1 in the example.

    Returns:
        None. The names in the file are:

        - Inputs, in the order of `forward`: `x`, `h`, `reset`, `lengths` and `dt`, if the example has them. Inputs of
          your own model have the argument names of its `forward`. Lists are numbered: `h_0`, `h_1`.
        - Outputs: `out` and `h_out`; a cell has only `h_out`. Lists are numbered: `h_out_0`, `h_out_1`. Of a
          `LanguageModel`, `state_out_0` is the next `state_0`. A model that returns neither one tensor nor a pair has
          `out_0`, `out_1`, ...

    Raises:
        ModuleNotFoundError: onnx or onnxscript is missing; run `pip install ".[onnx]"` in a clone of the repository.
        TypeError: An argument has the wrong type.
        ValueError: The kind is unknown, the folder does not exist, x has more than one step or the model is
            bidirectional for "step", the example of your own model has no state for "step", or `max_steps` is below 2
            or the length of the example, or is given for "step". Errors of the model's `forward` pass through.
        torch.onnx.errors.OnnxExporterError: PyTorch cannot export the model.

    Numerics:
        The file computes what the "torch" backend computes, in the dtype of the parameters. Its outputs differ from
        those of the model only by rounding. ONNX Runtime has no bfloat16 on the CPU: export `model.float()` for it. The
        file does not check the values of `lengths`.

    An exported `torch.nn.GRU` loops over the steps of a sequence; this file does not.

    Examples:
        >>> import os, tempfile
        >>> rnn = mingru.MinGRU(3, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mingru.export.onnx(rnn, torch.randn(1, 1, 3), os.path.join(folder, "step.onnx"), kind="step")
        ...     os.listdir(folder)
        ['step.onnx']
    """
    args, target = _checked(model, example_inputs, path, kind, max_steps)
    with in_eval_mode(list(model.modules())), torch.no_grad(), _exporting(max_steps):
        # Not only the attribute `training`, because a module may define `eval` or `train`.
        model.eval()
        # Called before all other checks, so that an error of the model is raised first.
        outputs = model(*args)
        if kind == "step" or (len(args) > 1 and args[1] is not None):
            args = _with_state(model, args, outputs)
        if _is_ours(model) and dynamic_shapes is None:
            args, dynamic_shapes = _with_dynamic_shapes(model, args, kind, max_steps)
        named = inspect.signature(model.forward).bind(*args).arguments
        given = {name: arg for name, arg in named.items() if arg is not None}
        if isinstance(dynamic_shapes, (tuple, list)):
            shapes = zip(named, dynamic_shapes, strict=True)
            dynamic_shapes = {name: sizes for name, sizes in shapes if name in given}
        # The classes of `drop_in` have other names for x and h.
        ours = {"input": "x", "hx": "h"} if _is_ours(model) else {}
        inputs = [each for name, arg in given.items() for each in _numbered(ours.get(name, name), arg)]
        program = torch.onnx.export(
            model,
            kwargs=given,
            dynamic_shapes=dynamic_shapes,
            input_names=inputs,
            output_names=_output_names(model, outputs, inputs),
            custom_translation_table=in_onnx.translation(),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        # Weights that are computed from others become weights, of any size.
        fold_constants = importlib.import_module("onnxscript.optimizer").fold_constants
        fold_constants(program.model, input_size_limit=1 << 40, output_size_limit=1 << 40)
        # PyTorch records the source line of each operation: a quarter of the file, with paths of this machine.
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()
        # There may be two files. A failure while they are written must leave existing files unchanged.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            program.save(Path(folder) / target.name, external_data=False)
            for written in sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name):
                written.replace(target.parent / written.name)


def _is_ours(model: nn.Module) -> TypeGuard[Layer]:
    """Return whether this is a class of this library, or a layer that says that its `forward` has the same form."""
    is_language_model = getattr(type(model), "forward", None) is LanguageModel.forward
    return isinstance(model, Layer) and (model.role != "custom" or is_language_model)


def _with_state(model: nn.Module, args: Inputs, outputs: Any) -> Inputs:
    """Return the inputs with a state: for a class of this library, one of the shape that the model returns."""
    h = args[1] if len(args) > 1 else None
    if not _is_ours(model):
        expected = "(x, h, ...) because kind is 'step' and the model is not a class of this library"
        require(_NAME, "example_inputs", h is not None, expected, "only x")
        return args
    state = outputs if model.role == "step" else outputs[1]
    # The example state may have size 1 instead of the number of layers or sequences.
    return (args[0], state if h is None else pytree.tree_map(Tensor.expand_as, h, state), *args[2:])


def _with_dynamic_shapes(
    model: Layer, args: Inputs, kind: str, max_steps: int | None
) -> tuple[Inputs, tuple[object, ...]]:
    """Return the inputs, large enough to keep their sizes dynamic, and their dynamic dimensions."""
    from torch.export import Dim

    x, tables = args[0], model._tables()
    forms = next((each for each in tables if each["x"].num_dims + model.num_space_dims == x.dim()), tables[0])
    batch, time = forms["x"].dim("B"), forms["x"].dim("S")
    of_state = 0 if model.num_space_dims > 0 else forms["h"].dim("B")
    # Only x names its dimensions, because the exporter warns about a name that is used twice.
    of_x: dict[int, object] = {} if batch is None else {batch: Dim("batch")}
    if time is None:
        require(_NAME, "max_steps", max_steps is None, "None because x has no time dimension", str(max_steps))
    elif kind == "sequence":
        num_steps = x.shape[time]
        is_enough = max_steps is None or num_steps <= max_steps
        require(_NAME, "max_steps", is_enough, f"at least the {num_steps} steps of the example", str(max_steps))
        of_x[time] = Dim("time")
    else:
        expected = f"of one step in dimension {time} because kind is 'step'"
        remedy = f"use x.narrow({time}, 0, 1)"
        require(_NAME, "x", x.shape[time] == 1, expected, dims(x.shape), remedy)
    enlarged, shapes = [], []
    for index, (name, arg) in enumerate(inspect.signature(model.forward).bind(*args).arguments.items()):
        of_others = [of_state] if index == 1 else [0] if name == "lengths" else list(of_x)
        dynamic = of_x if index == 0 else {dim: Dim.AUTO for dim in of_others if dim is not None}
        enlarged.append(None if arg is None else pytree.tree_map(partial(_enlarged, dynamic), arg))
        shapes.append(pytree.tree_map(lambda _, dynamic=dynamic: dynamic, arg))
    return tuple(enlarged), tuple(shapes)


def _enlarged(dynamic: Iterable[int], x: Tensor) -> Tensor:
    """Return x with dynamic dimensions of at least 2, because the exporter would fix a size of 0 or 1."""
    for dim in dynamic:
        sizes = [2 if at == dim else size for at, size in enumerate(x.shape)]
        x = torch.cat([x, x], dim) if x.shape[dim] == 1 else x.new_zeros(sizes) if x.shape[dim] == 0 else x
    return x


def _output_names(model: nn.Module, outputs: object, inputs: list[str]) -> list[str]:
    if _is_ours(model) and model.role == "step":
        names = _numbered("h_out", outputs)
    elif isinstance(outputs, tuple) and len(outputs) == 2 and isinstance(outputs[0], Tensor):
        is_language_model = getattr(type(model), "forward", None) is LanguageModel.forward
        names = ["out", *_numbered("state_out" if is_language_model else "h_out", outputs[1])]
    else:
        names = _numbered("out", outputs)
    # An input and an output of a graph cannot share a name.
    return [f"{name}_" if name in inputs else name for name in names]


def _numbered(name: str, value: object) -> list[str]:
    if value is None or isinstance(value, Tensor):
        return [] if value is None else [name]
    return [f"{name}_{index}" for index in range(len(pytree.tree_leaves(value)))]


@contextmanager
def _exporting(max_steps: int | None) -> Iterator[None]:
    """Set the longest sequence, and silence messages about PyTorch's internals."""
    logger, in_export = logging.getLogger(ONNX_REGISTRATION_LOG), torch_in_graphs.in_export
    logger.addFilter(_is_relevant)
    in_export.scan = partial(in_onnx.scan, most_steps=max_steps or torch_in_graphs.most_steps())
    in_export.mixed_step = in_onnx.mixed_step
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        in_export.scan = in_export.mixed_step = None
        logger.removeFilter(_is_relevant)


def _is_relevant(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("torchvision is not installed. Skipping torchvision::")


def _checked(model: nn.Module, example_inputs: object, path: Any, kind: str, max_steps: Any) -> tuple[Inputs, Path]:
    """Check the arguments, and return those of `forward` and the path of the file."""
    wrapped = isinstance(model, torch.jit.ScriptModule) or "_orig_mod" in getattr(model, "_modules", {})
    remedy = "pass the original module, not the scripted or compiled one" if wrapped else ""
    is_module = isinstance(model, nn.Module) and not wrapped
    require(_NAME, "model", is_module, "a torch.nn.Module", type(model).__name__, remedy, TypeError)
    is_possible = kind == "sequence" or not is_bidirectional(model)
    require(_NAME, "kind", is_possible, "'sequence' because the model is bidirectional", repr(kind))
    args = _checked_example(example_inputs)
    if max_steps is not None:
        check_int(_NAME, "max_steps", max_steps, least=2)
        require(_NAME, "max_steps", kind != "step", "None because kind is 'step'", repr(max_steps))
    target, got = Path(path), repr(str(path))
    require(_NAME, "path", target.parent.is_dir(), "in an existing folder", got, "create the folder first")
    # Not a device, such as /dev/null, which a file would replace for the whole system.
    is_possible = target.is_file() or not target.exists()
    require(_NAME, "path", is_possible, "of a file", got, "add a name, such as 'model.onnx'")
    for package in ("onnx", "onnxscript"):
        imported(package, _NAME, "onnx")
    return args, target.resolve()


def _checked_example(example_inputs: object) -> Inputs:
    expected = "a tensor x, or a tuple such as (x, h, reset, lengths, dt)"
    packed = isinstance(example_inputs, PackedSequence)
    remedy = "ONNX has no packed sequences; pass the padded tensor" if packed else ""
    is_valid = isinstance(example_inputs, (Tensor, tuple)) and not packed
    require(_NAME, "example_inputs", is_valid, expected, type(example_inputs).__name__, remedy, TypeError)
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    require(_NAME, "example_inputs", len(args) > 0, expected, "()")
    if not isinstance(args[0], Tensor):
        raise not_a_tensor(_NAME, "example_inputs[0]", args[0])
    for index, arg in enumerate(args):
        argument = f"example_inputs[{index}]"
        for leaf in pytree.tree_leaves(arg):
            remedy = "set constant arguments in a module around the model"
            check_type(_NAME, argument, leaf, (Tensor, type(None)), "tensors or None", remedy)
    return args
