"""Models as files for other runtimes."""

import importlib
import inspect
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from .check import check_int, dims, expectation
from .modules.base import Base, Dims

__all__ = ["onnx"]

_NAME = "export.onnx"


def onnx(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kind: str = "sequence",
    max_steps: int | None = None,
    dynamic_shapes: Any = None,
) -> None:
    """Write a model as an ONNX file, for whole sequences or for one step.

    Sizes of the batch, and of time in a sequence, are free in the file. There are no custom operators in it, no loops,
    and nothing that needs this library. It holds the model as `eval()` has it, which afterwards is in the mode in which
    it was.

    Args:
        model: a layer, cell or stack of this library, one of `mingru.drop_in`, or a model of your own that contains
            any. Parameters become constants.
        example_inputs: x, or a tuple of what `forward` takes in its order, (x, h, reset, lengths) or less; tensors,
            None, lists of tensors where a state is one. Each that is given is an input of the file. The numbers don't
            matter, nor does the size of batch and time.
        path: of the file, in a folder that exists. What was there is replaced when all is done, and stays if anything
            fails. Beyond 2 GB, weights are beside it, in a file of the same name and `.data`.
        kind: "sequence": all steps of x, of any number of them. "step": x is one step, (B, 1, I) for a layer and (B, I)
            for a cell, and the state goes in and comes out. Where `example_inputs` has no h, the one that the model
            returns is its example; a model of your own must call it `h`, `hx`, `state` or `hidden` then. Cells are the
            same in either but for that state. A backward direction sees the one step alone, as it does here.
        max_steps: the longest sequence that the file has to serve, at least 2. The fewer, the smaller and quicker it
            is: each doubling costs some twelve operations for each layer and direction. What is longer may come out as
            NaN. Default: as many as 268 million. For "sequence".
        dynamic_shapes: which sizes are free, as `torch.export.export` takes it, for all inputs, h included where it is
            made. Default: of this library's own classes, what is batch and time; of other models, the first dimension
            of x, the second in a sequence, and those of other inputs that have the size of one of these in the example
            and that `forward` doesn't hold to it. An example of other inputs needs a batch, and a time, of at least 2.

    Returns:
        Nothing; the file has

        - inputs in the order of `forward`: `x`, `h`, `reset`, those of the example among them; other models have the
          names of the arguments of `forward`. Lists are numbered: `h_0`, `h_1`.
        - outputs `out` and `h_out`, and `h_out` alone for a cell. Lists are numbered: `h_out_0`, `h_out_1`. Models that
          return neither one tensor nor a pair have `out_0`, `out_1`, ...

    Raises:
        ModuleNotFoundError: onnx or onnxscript is missing: `pip install "torch-mingru[onnx]"`.
        TypeError: an argument of the wrong type.
        ValueError: a kind that there isn't; no folder for the file; a step that is none; bounds that don't fit; and
            what the model raises.
        torch.onnx.errors.OnnxExporterError: the model can't be exported, by reasons of its own.

    Numerics: those of the back end "torch" in the dtype of the parameters; outputs differ from the model's by rounding.
    ONNX Runtime has no bfloat16 on the CPU: write `model.float()` for it. Values of `lengths` are not checked there.

    Differs from an exported `torch.nn.GRU` in that a sequence isn't a loop over its steps.

    Example:
        >>> import os, tempfile
        >>> rnn = mingru.MinGRU(3, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mingru.export.onnx(rnn, torch.randn(1, 1, 3), os.path.join(folder, "step.onnx"), kind="step")
        ...     os.listdir(folder)
        ['step.onnx']
    """
    target = _checked(model, example_inputs, path, kind, max_steps, dynamic_shapes)
    given = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    with _as_in_use(model), _quiet():
        if dynamic_shapes is None:
            args, dynamic_shapes = _with_free_sizes(model, given, kind, max_steps)
        else:
            args = _with_state(model, given, kind)
        names = _parameters(model, args)
        # Where one is left out, those behind it go by name.
        first = next((index for index, arg in enumerate(args) if arg is None), len(args))
        by_name = {name: arg for name, arg in list(zip(names, args, strict=True))[first:] if arg is not None}
        if by_name and not isinstance(dynamic_shapes, dict):
            shapes = zip(names, args, dynamic_shapes, strict=True)
            dynamic_shapes = {name: sizes for name, arg, sizes in shapes if arg is not None}
        elif not by_name and isinstance(dynamic_shapes, tuple):
            dynamic_shapes = dynamic_shapes[:first]
        inputs = [
            name for name, arg in zip(_input_names(model, names), args, strict=True) for name in _numbered(name, arg)
        ]
        program = torch.onnx.export(
            model,
            args[:first],
            kwargs=by_name,
            dynamic_shapes=dynamic_shapes,
            input_names=inputs,
            output_names=_output_names(model, model(*args), inputs),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        # Upstream notes where each operation comes from: a quarter of the file, and the paths of this machine.
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()
        # In a folder of its own until all is written, since there may be a second file.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            program.save(Path(folder) / target.name, external_data=False)
            for written in sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name):
                written.replace(target.parent / written.name)


def _dims_of(model: nn.Module, x: Tensor) -> Dims | None:
    """Return None for a model of the caller's own, which may be a class of this library with another `forward`."""
    return model.dims_of(x) if isinstance(model, Base) and model.role != "custom" else None


def _with_free_sizes(
    model: nn.Module, args: tuple[Any, ...], kind: str, max_steps: int | None
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """All inputs, of sizes that no graph takes for fixed, and which of these are free."""
    from torch.export import Dim

    x = args[0]
    # An example that doesn't fit is the model's to refuse.
    outputs = model(*args)
    layout = _dims_of(model, x)
    if layout is None:
        args = _of_own_model(args, kind)
        batch: int | None = 0
        time: int | None = 1
    else:
        if kind == "step" and layout.time is not None and x.shape[layout.time] != 1:
            expected = f"of one step in dimension {layout.time} for kind='step'"
            remedy = f"use x.narrow({layout.time}, 0, 1)"
            raise ValueError(expectation(_NAME, "x", expected, dims(x.shape), remedy))
        args = _enlarged(args, _state_of(outputs), layout, kind)
        batch, time = layout.batch, layout.time
    of_x: dict[int, Any] = {} if batch is None else {batch: Dim("batch")}
    if kind == "sequence" and time is not None:
        if max_steps is not None and x.shape[time] > max_steps:
            expected = f"at least the {x.shape[time]} steps of the example"
            raise ValueError(expectation(_NAME, "max_steps", expected, str(max_steps)))
        of_x[time] = Dim("time", max=max_steps)
    elif max_steps is not None:
        raise ValueError(expectation(_NAME, "max_steps", "None where there is no time", str(max_steps)))
    args = _with_state(model, args, kind)

    def free(other: Tensor, index: int) -> dict[int, Any]:
        if layout is None:
            sizes = [args[0].shape[dim] for dim in of_x]
            found = [dim for dim, size in enumerate(other.shape) if size in sizes]
        else:
            of_states = [] if layout.state is None else [layout.state]
            found = {1: of_states, 2: [*of_x], 3: [0]}[index]
        # Named in x alone, as the exporter warns of two of one name; these turn out the same.
        return dict.fromkeys(found, Dim.AUTO)

    others = [
        pytree.tree_map(lambda other, index=index: free(other, index), arg) for index, arg in enumerate(args[1:], 1)
    ]
    return args, (of_x, *others)


def _of_own_model(args: tuple[Any, ...], kind: str) -> tuple[Any, ...]:
    x, others = args[0], pytree.tree_leaves(args[1:])
    least = 2 if kind == "sequence" else 1
    if x.dim() < least:
        expected = "(B, S, ...)" if kind == "sequence" else "(B, ...)"
        raise ValueError(expectation(_NAME, "x", expected, dims(x.shape), "or tell what is free by dynamic_shapes"))
    if any(isinstance(other, Tensor) for other in others):
        for dim in range(least):
            if x.shape[dim] < 2:
                expected = f"of at least 2 in dimension {dim}, beside other inputs, which tell by it what is their own"
                remedy = "or tell what is free by dynamic_shapes"
                raise ValueError(expectation(_NAME, "x", expected, dims(x.shape), remedy))
        return args
    for dim in range(least):
        x = _at_least_two(x, dim)
    return (x, *args[1:])


def _enlarged(args: tuple[Any, ...], state: Any, layout: Dims, kind: str) -> tuple[Any, ...]:
    """What this library's classes take, where batch and time are known."""
    enlarged = [*args]
    if len(args) > 1 and args[1] is not None:
        # A state may have come as one for all sequences, or for all layers.
        enlarged[1] = pytree.tree_map(lambda h, full: h.expand_as(full), args[1], state)
        if layout.state is not None:
            enlarged[1] = pytree.tree_map(lambda h: _at_least_two(h, layout.state), enlarged[1])
    for index in (0, 2):
        if index < len(args) and args[index] is not None:
            if layout.batch is not None:
                enlarged[index] = _at_least_two(enlarged[index], layout.batch)
            if layout.time is not None and kind == "sequence":
                enlarged[index] = _at_least_two(enlarged[index], layout.time)
    if len(args) > 3 and args[3] is not None:
        enlarged[3] = _at_least_two(args[3], 0)
    return tuple(enlarged)


def _at_least_two(x: Tensor, dim: int | None) -> Tensor:
    """One of 1 would be taken for fixed."""
    assert dim is not None
    return torch.cat([x, x], dim) if x.shape[dim] == 1 else x


def _with_state(model: nn.Module, args: tuple[Any, ...], kind: str) -> tuple[Any, ...]:
    if kind == "sequence" or (len(args) > 1 and args[1] is not None):
        return args
    state = _state_of(model(*args))
    if not _is_ours(model) and _parameters(model, (None, None))[1:] not in [["h"], ["hx"], ["state"], ["hidden"]]:
        state = None
    if state is None:
        expected = "(x, h) for kind='step', as forward has not the form forward(x, h) -> (out, h)"
        raise ValueError(expectation(_NAME, "example_inputs", expected, "x alone"))
    return (args[0], state, *args[2:])


def _state_of(outputs: Any) -> Any:
    """Of a layer's pair (out, h), or of a cell, which returns its state; None of anything else."""
    if isinstance(outputs, Tensor):
        return outputs
    return outputs[1] if isinstance(outputs, tuple) and len(outputs) == 2 else None


def _parameters(model: nn.Module, args: tuple[Any, ...]) -> list[str]:
    """What `forward` calls each of these."""
    names: list[str] = []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{name}_{index}" for index in range(len(args) - len(names))]
        elif parameter.kind is not parameter.KEYWORD_ONLY:
            names.append(name)
    return names[: len(args)]


def _input_names(model: nn.Module, names: list[str]) -> list[str]:
    return ["x", "h", "reset", "lengths"][: len(names)] if _is_ours(model) else names


def _is_ours(model: nn.Module) -> bool:
    return _dims_of(model, torch.empty(0)) is not None


def _output_names(model: nn.Module, outputs: Any, inputs: list[str]) -> list[str]:
    if isinstance(outputs, Tensor):
        names = ["h_out" if _dims_of(model, outputs) is not None else "out"]
    elif isinstance(outputs, tuple) and len(outputs) == 2 and isinstance(outputs[0], Tensor):
        names = ["out", *_numbered("h_out", outputs[1])]
    else:
        names = [f"out_{index}" for index in range(len(pytree.tree_leaves(outputs)))]
    # In one graph a name stands for one thing.
    return [f"{name}_" if name in inputs else name for name in names]


def _numbered(name: str, value: Any) -> list[str]:
    if value is None or isinstance(value, Tensor):
        return [] if value is None else [name]
    return [f"{name}_{index}" for index in range(len(pytree.tree_leaves(value)))]


@contextmanager
def _as_in_use(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what upstream says of its own making."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    logger.addFilter(_is_of_interest)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        logger.removeFilter(_is_of_interest)


def _is_of_interest(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("torchvision is not installed. Skipping torchvision::")


def _checked(model: Any, example_inputs: Any, path: Any, kind: Any, max_steps: Any, dynamic_shapes: Any) -> Path:
    """Refuse what does not fit; the file's path."""
    if kind not in ("sequence", "step"):
        raise ValueError(expectation(_NAME, "kind", "'sequence' or 'step'", repr(kind)))
    wrapped = isinstance(model, torch.jit.ScriptModule) or "_orig_mod" in getattr(model, "_modules", {})
    if not isinstance(model, nn.Module) or wrapped:
        remedy = "export the module that was scripted or compiled" if wrapped else ""
        raise TypeError(expectation(_NAME, "model", "a torch.nn.Module", type(model).__name__, remedy))
    _check_example(example_inputs)
    if max_steps is not None:
        if kind == "step" or dynamic_shapes is not None:
            beside = "kind='step'" if kind == "step" else "dynamic_shapes, whose Dim has a max"
            raise ValueError(expectation(_NAME, "max_steps", f"None beside {beside}", repr(max_steps)))
        check_int(_NAME, "max_steps", max_steps, least=2)
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise TypeError(expectation(_NAME, "path", "a str or os.PathLike", type(path).__name__))
    target = Path(path)
    if target.is_dir() or not target.name:
        raise ValueError(expectation(_NAME, "path", "of a file", f"the folder {str(target)!r}"))
    if not target.parent.is_dir():
        remedy = "create it first"
        raise ValueError(expectation(_NAME, "path", "in a folder that exists", repr(str(target)), remedy))
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f'{_NAME}: needs the packages onnx and onnxscript ({error}); pip install "torch-mingru[onnx]" brings '
                "them, and torch.export.export and torch.jit.script do without",
                name=error.name,
            ) from None
    return target


def _check_example(example_inputs: Any) -> None:
    expected = "a tensor x, or a tuple (x, h, reset) or (x, h)"
    if isinstance(example_inputs, PackedSequence):
        remedy = "files hold no such thing, give x padded"
        raise TypeError(expectation(_NAME, "example_inputs", expected, "PackedSequence", remedy))
    if not isinstance(example_inputs, (Tensor, tuple)):
        raise TypeError(expectation(_NAME, "example_inputs", expected, type(example_inputs).__name__))
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if not args:
        raise ValueError(expectation(_NAME, "example_inputs", expected, "()"))
    if not isinstance(args[0], Tensor):
        remedy = "torch.as_tensor makes one"
        raise TypeError(expectation(_NAME, "example_inputs[0]", "a tensor", type(args[0]).__name__, remedy))
    for index, arg in enumerate(args):
        for leaf in pytree.tree_leaves(arg):
            if leaf is not None and not isinstance(leaf, Tensor):
                expected, remedy = "tensors or None", "let a module of your own hold what is fixed"
                argument = f"example_inputs[{index}]"
                raise TypeError(expectation(_NAME, argument, expected, type(leaf).__name__, remedy))
        if isinstance(arg, Tensor) and arg.numel() == 0:
            raise ValueError(expectation(_NAME, f"example_inputs[{index}]", "of some elements", dims(arg.shape)))
