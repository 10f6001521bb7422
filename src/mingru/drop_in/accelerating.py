"""Compute each `torch.nn.GRU`, and each packed `torch.nn.LSTM`, of a model in less time on the CPU."""

import sys
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..check.values import check_flag, check_type
from ..ops.names_of_torch import PREPARE_SCRIPTABLE
from . import operators
from .twins import SUBCLASS, described, is_recurrent


class _Named(type):
    """The class of classes that torch's tools take for their bases: by the module's name, and as keys of tables."""

    __module__ = property(lambda cls: __name__)

    def __eq__(cls, other: object) -> bool:
        # FSDP has a table of the classes that it makes, where each class needs its own.
        is_table = not sys._getframe(1).f_globals.get("__name__", "").startswith("torch.distributed.")
        return other is cls or (is_table and other is cls.__base__)

    def __hash__(cls) -> int:
        return hash(cls.__base__)


def _with_own_operators(forward: Any) -> Any:
    """Return torch's `forward`, in which the module of torch's operators is ours."""
    names = {**forward.__globals__, "_VF": operators}
    return FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)


def _with_own_class(layer: Any) -> Any:
    """Return the layer with torch's class, whose `forward` TorchScript compiles."""
    layer.__class__ = type(layer).__base__
    return layer


class AcceleratedGRU(nn.modules.GRU, metaclass=_Named):
    """A `torch.nn.GRU` with its own weights, which computes by the kernels where these take less time."""

    __module__ = nn.modules.GRU.__module__  # of an instance, which torch.fx asks
    forward = _with_own_operators(nn.modules.GRU.forward)


class AcceleratedLSTM(nn.modules.LSTM, metaclass=_Named):
    """A `torch.nn.LSTM` with its own weights, which computes packed sequences as padded where this takes less time."""

    __module__ = nn.modules.LSTM.__module__
    forward = _with_own_operators(nn.modules.LSTM.forward)


# Not `nn.GRU`, which is another class in a block of `patch`.
_KINDS = (nn.modules.GRU, AcceleratedGRU), (nn.modules.LSTM, AcceleratedLSTM)
for _, _kind in _KINDS:
    setattr(_kind, PREPARE_SCRIPTABLE, _with_own_class)


class Acceleration(NamedTuple):
    """Printable report of `accelerate`."""

    changed: list[tuple[str, str]]
    """Qualified name and layer of each layer whose class was changed."""
    left: list[tuple[str, str, str]]
    """Qualified name, layer and reason of each other recurrent layer of torch."""

    def __str__(self) -> str:
        lines = [f"{name}: {layer} changed" for name, layer in self.changed]
        return "\n".join(lines + [f"{name}: {layer} left: {why}" for name, layer, why in self.left]) or "no layers"


def accelerate(model: nn.Module, *, undo: bool = False) -> Acceleration:
    """Let each `torch.nn.GRU`, and each packed `torch.nn.LSTM`, of a model take less time on the CPU.

    The layers stay the same objects with the same parameters, names, `state_dict`, hooks, states and outputs. Only
    their class becomes a subclass, whose `forward` is torch's, but computes a GRU by the kernels, and the packed
    sequences of an LSTM by torch's code for padded ones, where these take less time. On other devices, in other dtypes,
    in graphs, under autocast and transforms, it computes what torch does. A copied or saved model stays accelerated, so
    a program that loads the whole model needs this package: call this with `undo=True` before saving it for others.
    `torch.jit.script` gives the layers their own class again.

    Args:
        model: Model, or a layer itself.
        undo: If True, give the layers their own class again.

    Returns:
        An `Acceleration`, which can be printed. `changed` has (qualified name, layer) for each layer whose class was
        changed, `left` has (qualified name, layer, reason) for each other recurrent layer of torch: layers that were
        changed before, subclasses, scripted layers, cells, and LSTMs with `proj_size`, for which torch has no faster
        code.

    Raises:
        TypeError: `model` is not a torch.nn.Module, or `undo` is not a bool.

    Examples:
        >>> model = torch.nn.ModuleDict({"rnn": torch.nn.GRU(3, 4), "head": torch.nn.Linear(4, 1)})
        >>> print(mingru.drop_in.accelerate(model))
        rnn: torch.nn.GRU(3, 4) changed
    """
    check_type("accelerate", "model", model, nn.Module, "a torch.nn.Module")
    check_flag("accelerate", "undo", undo)
    report = Acceleration([], [])
    for name, layer in model.named_modules():
        found = _other_class(layer, undo)
        if found is not None:
            report.changed.append((name, described(layer)))
            layer.__class__ = found
        elif is_recurrent(layer):
            reasons = {
                "torch computes it as fast": isinstance(layer, nn.RNNCellBase),
                "torch has no faster code for projections": getattr(layer, "proj_size", 0) > 0,
                "it has this class already": any(type(layer) is kind for pair in _KINDS for kind in pair),
                "call accelerate before torch.jit.script or torch.jit.trace": isinstance(layer, torch.jit.ScriptModule),
                SUBCLASS: isinstance(layer, (nn.modules.GRU, nn.modules.LSTM)),
                "only GRUs and LSTMs are changed": True,
            }
            why = next(reason for reason, holds in reasons.items() if holds)
            report.left.append((name, described(layer), why))
    return report


def _other_class(layer: Any, undo: bool) -> Any:
    """Return the class that replaces that of a layer, or None."""
    kind = type(layer)
    for pair in _KINDS:
        old, new = reversed(pair) if undo else pair
        if kind is old and (undo or layer.proj_size == 0):
            return new
        # A class that torch made for this layer's parametrizations, or FSDP for ours.
        if any(base is old for base in kind.__bases__) and (undo or is_parametrized(layer)):
            return type(kind.__name__, tuple(new if base is old else base for base in kind.__bases__), {**vars(kind)})
    return None
