"""Export models to files for other runtimes."""

import importlib
import inspect
import logging
import os
import shutil
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

from .check import arguments_checked, check_int, check_type, dims, not_a_tensor, require
from .models import LanguageModel
from .models.generation import in_eval_mode
from .modules.layer import Dims, Layer, is_bidirectional
from .ops.private import ONNX_REGISTRATION_LOG, pytree

__all__ = ["onnx", "triton"]

_NAME = "export.onnx"


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

    The batch size is dynamic, and so is the number of steps of a sequence. The file has no custom operators and no
    loops, and runs without this library. The model is exported in eval mode; its training mode is restored afterwards.

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
            is used as the example. The `forward` of your own model must then name that argument `h`, `hx`, `state` or
            `hidden`. For a cell, both kinds give the same graph, except for that state. A bidirectional layer cannot
            compute steps.
        max_steps: Longest sequence that the file supports, at least 2; only for "sequence". A lower maximum makes the
            file smaller and faster: each doubling adds about twelve operations for each layer and direction. Longer
            sequences may give NaN. Default: 268 million.
        dynamic_shapes: Dynamic dimensions of all inputs, as `torch.export.export` takes them, including a state that is
            added for "step". Default for classes of this library: batch and time. Default for your own model: dimension
            0 of x (batch), dimension 1 for "sequence" (time), and every dimension of another input whose size equals
            one of these in the example, unless `forward` fixes it. If the example of your own model has other inputs
            than x, a batch or time of 1 is fixed.

    Returns:
        None. The names in the file are:

        - Inputs, in the order of `forward`: `x`, `h`, `reset`, `lengths` and `dt`, if the example has them. Inputs of
          your own model have the argument names of its `forward`. Lists are numbered: `h_0`, `h_1`.
        - Outputs: `out` and `h_out`; a cell has only `h_out`. Lists are numbered: `h_out_0`, `h_out_1`. A model that
          returns neither one tensor nor a pair has `out_0`, `out_1`, ...

    Raises:
        ModuleNotFoundError: onnx or onnxscript is missing; run `pip install ".[onnx]"` in a clone of the repository.
        TypeError: An argument has the wrong type.
        ValueError: The kind is unknown, the folder does not exist, x has more than one step or the model is
            bidirectional for "step", or `max_steps` is below the length of the example. Errors of the model's `forward`
            pass through.
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
    target = _checked(model, example_inputs, path, kind, max_steps, dynamic_shapes)
    with in_eval_mode(list(model.modules())), torch.no_grad(), _quiet():
        # Not only the attribute `training`, because a module may define `eval` or `train`.
        model.eval()
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        if dynamic_shapes is None and not _is_ours(model) and all(arg is None for arg in args[1:]):
            # The exporter would fix a size of 1. With other inputs, their sizes would have to change too.
            args = (_enlarged(range(min(args[0].dim(), 2 if kind == "sequence" else 1)), args[0]), *args[1:])
        args, outputs = _with_state(model, args, kind)
        if dynamic_shapes is None:
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
            dynamo=True,
            verbose=False,
        )
        assert program is not None
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


def _with_state(model: nn.Module, args: tuple[Any, ...], kind: str) -> tuple[tuple[Any, ...], Any]:
    """Return the inputs, with a state for "step", and the outputs."""
    # Called before all other checks, so that an error of the model is raised first.
    outputs = model(*args)
    has_state = len(args) > 1 and args[1] is not None
    if not has_state and kind == "sequence":
        return args, outputs
    is_pair = isinstance(outputs, tuple) and len(outputs) == 2
    is_state = isinstance(outputs, Tensor) or (_is_ours(model) and model.role == "step")
    state = outputs if is_state else outputs[1] if is_pair else None
    if not has_state:
        second = list(inspect.signature(model.forward).parameters)[1:2]
        is_valid = state is not None and (_is_ours(model) or second in (["h"], ["hx"], ["state"], ["hidden"]))
        expected = "(x, h) because kind is 'step' and the model does not have the form forward(x, h) -> (out, h)"
        require(_NAME, "example_inputs", is_valid, expected, "only x")
    elif _is_ours(model):
        # The example state may have size 1 instead of the number of layers or sequences.
        state = pytree.tree_map(Tensor.expand_as, args[1], state)
    else:
        return args, outputs
    return (args[0], state, *args[2:]), outputs


def _with_dynamic_shapes(
    model: nn.Module, args: tuple[Any, ...], kind: str, max_steps: int | None
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the inputs, large enough to keep their sizes dynamic, and their dynamic dimensions."""
    from torch.export import Dim

    x = args[0]
    layout = model.dims_of(x) if _is_ours(model) else Dims(0, 1 if x.dim() > 1 else None, None)
    # Only x names its dimensions, because the exporter warns about a name that is used twice.
    of_x: dict[int, Any] = {} if layout.batch is None else {layout.batch: Dim("batch")}
    if kind == "sequence" and layout.time is not None:
        num_steps = x.shape[layout.time]
        is_enough = max_steps is None or num_steps <= max_steps
        expected = f"at least the {num_steps} steps of the example"
        require(_NAME, "max_steps", is_enough, expected, str(max_steps))
        of_x[layout.time] = Dim("time", max=max_steps)
    else:
        require(_NAME, "max_steps", max_steps is None, "None because x has no time dimension", str(max_steps))
    if not _is_ours(model):
        of_x = {dim: name for dim, name in of_x.items() if x.shape[dim] > 1}
        sizes = [x.shape[dim] for dim in of_x]

        def of_other(other: Any) -> dict[int, Any]:
            return {dim: Dim.AUTO for dim, size in enumerate(getattr(other, "shape", ())) if size in sizes}

        return args, (of_x, *pytree.tree_map(of_other, args[1:]))
    if kind == "step" and layout.time is not None:
        expected = f"of one step in dimension {layout.time} because kind is 'step'"
        remedy = f"use x.narrow({layout.time}, 0, 1)"
        require(_NAME, "x", x.shape[layout.time] == 1, expected, dims(x.shape), remedy)
    enlarged, shapes = [], []
    for index, (name, arg) in enumerate(inspect.signature(model.forward).bind(*args).arguments.items()):
        of_others = [layout.state] if index == 1 else [0] if name == "lengths" else list(of_x)
        dynamic = of_x if index == 0 else {dim: Dim.AUTO for dim in of_others if dim is not None}
        enlarged.append(None if arg is None else pytree.tree_map(partial(_enlarged, dynamic), arg))
        shapes.append(pytree.tree_map(lambda _, dynamic=dynamic: dynamic, arg))
    return tuple(enlarged), tuple(shapes)


def _enlarged(dynamic: Iterable[int], x: Tensor) -> Tensor:
    """Return x with dynamic dimensions of size 1 doubled, because the exporter would fix them."""
    for dim in dynamic:
        x = torch.cat([x, x], dim) if x.shape[dim] == 1 else x
    return x


def _output_names(model: nn.Module, outputs: object, inputs: list[str]) -> list[str]:
    if _is_ours(model) and model.role == "step":
        names = _numbered("h_out", outputs)
    elif isinstance(outputs, tuple) and len(outputs) == 2 and isinstance(outputs[0], Tensor):
        names = ["out", *_numbered("h_out", outputs[1])]
    else:
        names = _numbered("out", outputs)
    # An input and an output of a graph cannot share a name.
    return [f"{name}_" if name in inputs else name for name in names]


def _numbered(name: str, value: object) -> list[str]:
    if value is None or isinstance(value, Tensor):
        return [] if value is None else [name]
    return [f"{name}_{index}" for index in range(len(pytree.tree_leaves(value)))]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence messages about PyTorch's internals."""
    logger = logging.getLogger(ONNX_REGISTRATION_LOG)
    logger.addFilter(_is_relevant)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        logger.removeFilter(_is_relevant)


def _is_relevant(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("torchvision is not installed. Skipping torchvision::")


def _checked(model: Any, example_inputs: Any, path: Any, kind: Any, max_steps: Any, dynamic_shapes: Any) -> Path:
    """Check the arguments and return the path of the file."""
    require(_NAME, "kind", kind in ("sequence", "step"), "'sequence' or 'step'", repr(kind))
    wrapped = isinstance(model, torch.jit.ScriptModule) or "_orig_mod" in getattr(model, "_modules", {})
    remedy = "pass the original module, not the scripted or compiled one" if wrapped else ""
    is_module = isinstance(model, nn.Module) and not wrapped
    require(_NAME, "model", is_module, "a torch.nn.Module", type(model).__name__, remedy, TypeError)
    is_possible = kind == "sequence" or not is_bidirectional(model)
    require(_NAME, "kind", is_possible, "'sequence' because the model is bidirectional", repr(kind))
    _check_example(example_inputs)
    if max_steps is not None:
        got, remedy = repr(max_steps), f"use Dim(..., max={max_steps})"
        require(_NAME, "max_steps", kind != "step", "None because kind is 'step'", got)
        require(_NAME, "max_steps", dynamic_shapes is None, "None because dynamic_shapes is given", got, remedy)
        check_int(_NAME, "max_steps", max_steps, least=2)
    is_path = isinstance(path, (str, os.PathLike)) and isinstance(os.fspath(path), str)
    require(_NAME, "path", is_path, "a str or os.PathLike", type(path).__name__, error=TypeError)
    target = Path(path)
    is_file = not target.is_dir() and target.name != ""
    require(_NAME, "path", is_file, "the path of a file", f"the folder {str(target)!r}")
    remedy = "create the folder first"
    require(_NAME, "path", target.parent.is_dir(), "in an existing folder", repr(str(target)), remedy)
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f'{_NAME}: needs the packages onnx and onnxscript ({error}); run pip install ".[onnx]" in a clone of '
                "the repository, or use torch.export.export or torch.jit.script, which do not need them",
                name=error.name,
            ) from None
    return target


def _check_example(example_inputs: object) -> None:
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
        if isinstance(arg, Tensor):
            require(_NAME, argument, arg.numel() > 0, "a non-empty tensor", dims(arg.shape))


@arguments_checked(function="export.triton")
def triton(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    folder: str | os.PathLike[str],
    *,
    max_batch_size: int = 32,
    max_sequences: int = 1024,
    max_idle_seconds: int = 60,
) -> None:
    """Export one step of a model for Triton Inference Server, which then keeps the state of each sequence.

    The server begins each sequence with `model.initial(1)`, and passes the state that a step returns to the next step
    of the same sequence. It computes steps of different sequences in one batch.

    Args:
        model: Layer, cell or model of this library, except convolutional ones, or a module with the same methods:
            `initial(batch)`, and `forward(x, h, ...)`, which returns the output and the new state.
        example_inputs: Arguments of one step, as of `export.onnx` with kind="step". A state is not used.
        folder: Folder of the model in the server's repository. Its name is that of the model. If the folder does not
            exist, it is created, and if it does, its files are replaced when the export has succeeded.
        max_batch_size: Largest number of sequences in a batch.
        max_sequences: Largest number of sequences whose states an instance of the model keeps. Others wait until one
            ends.
        max_idle_seconds: Seconds without a step after which the server ends a sequence, and forgets its state.

    Returns:
        None. The folder contains:

        - `1/model.onnx`: The step, as of `export.onnx`, except that the batch is the first dimension of all inputs and
          outputs: the state of a layer is (B, L * D, 1, H).
        - `config.pbtxt`: The configuration, with the strategy "oldest" and without control inputs. Clients send all
          inputs except the states, and receive all outputs except the states. From a cell, they receive the state.
        - `initial_state`: A file with the initial value of each state.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is missing, as for `export.onnx`.
        TypeError: The model has no `initial`, or is bidirectional, or an argument has the wrong type.
        ValueError: A number is below 1, or an input or output has no batch dimension, or only that one. Errors of
            `export.onnx` and of the model pass through.
        NotImplementedError: The model is convolutional.

    Examples:
        >>> import os, tempfile
        >>> rnn = mingru.MinGRU(3, 8)
        >>> with tempfile.TemporaryDirectory() as repository:
        ...     folder = os.path.join(repository, "rnn")
        ...     mingru.export.triton(rnn, torch.randn(1, 1, 3), folder)
        ...     sorted(os.listdir(folder))
        ['1', 'config.pbtxt', 'initial_state']
    """
    name = "export.triton"
    check_int(name, "max_batch_size", max_batch_size)
    check_int(name, "max_sequences", max_sequences)
    check_int(name, "max_idle_seconds", max_idle_seconds)
    check_type(name, "folder", folder, (str, os.PathLike), "a str or os.PathLike")
    initial: Any = getattr(model, "initial", None)
    is_stream = initial is not None and not any(getattr(each, "bidirectional", False) for each in model.modules())
    expected = "of one direction, with a method initial(batch)"
    require(name, "model", is_stream, expected, type(model).__name__, error=TypeError)
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        states, written = pytree.tree_leaves(initial(1)), Path(temporary) / "model"
        (written / "1").mkdir(parents=True)
        onnx(model, (*args[:1], None, *args[2:]), written / "1" / "model.onnx", kind="step")
        # Needs onnx, which `import mingru` does not.
        from .model_repository import configure

        configure(name, written, states, max_batch_size, max_sequences, max_idle_seconds)
        shutil.copytree(written, folder, dirs_exist_ok=True)
