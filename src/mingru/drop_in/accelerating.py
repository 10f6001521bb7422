"""Change the recurrent layers of a model to classes that compute the same in less time on the CPU."""

from typing import NamedTuple

import torch
from torch import nn

from ..check.values import check_flag, check_type
from .of_torch import OWN, TORCHS, as_torchs

SUBCLASS = "a subclass may compute something else"


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
    """Let each `torch.nn.GRU`, `GRUCell` and `LSTM` of a model take less time on the CPU.

    The layers stay the same objects with the same parameters, names, `state_dict`, hooks, states and outputs. Only
    their class becomes that of `mingru.drop_in`, a subclass, which computes by the kernels where these take less time.
    On other devices, in other dtypes, in graphs and under transforms, it computes what torch does, and in bfloat16 and
    under autocast too if the processor does not multiply bfloat16. A copied or saved model stays accelerated, so a
    program that loads the whole model needs this package: call this with `undo=True` before saving it for others.
    `torch.jit.script` gives the layers their own class again.

    Args:
        model: Model, or a layer itself.
        undo: If True, give the layers their own class again.

    Returns:
        An `Acceleration`, which can be printed. `changed` has (qualified name, layer) for each layer whose class was
        changed, `left` has (qualified name, layer, reason) for each other recurrent layer of torch: layers that were
        changed before, subclasses, scripted layers, `torch.nn.LSTMCell`, and LSTMs with `proj_size`.

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
        text, why_slow = described(layer), "" if undo else _why_slow(layer)
        found = None if why_slow else _other_class(layer, undo)
        if found is not None:
            layer.__class__ = found
            as_torchs(layer) if not undo else vars(layer).pop("__module__", None)
            report.changed.append((name, text))
        elif is_recurrent(layer):
            own = {why_slow: why_slow != "", "it has this class already": type(layer) in (*OWN, *TORCHS)}
            report.left.append((name, text, why_left(layer, own, "changed", "accelerate")))
    return report


def _other_class(layer: nn.Module, undo: bool) -> type | None:
    """Return the class that replaces that of a layer, or None."""
    kind, others = type(layer), TORCHS if undo else OWN
    bases = tuple(others.get(base, base) for base in kind.__bases__)
    # A class that torch has made for this layer, for parametrizations or FSDP.
    is_made = bases != kind.__bases__ and kind.__module__.startswith("torch.")
    return others.get(kind, type(kind.__name__, bases, {**vars(kind)}) if is_made else None)


def _why_slow(layer: nn.Module) -> str:
    """Return why torch computes a layer as fast, or ""."""
    if isinstance(layer, nn.modules.LSTMCell):
        return "torch computes it as fast"
    return "there is no kernel for projections" if getattr(layer, "proj_size", 0) > 0 else ""


def why_left(layer: nn.Module, own: dict[str, bool], done: str, name: str) -> str:
    """Return why a function leaves a layer: the first reason that holds, of its own or of all."""
    reasons = own | {
        f"call {name} before torch.jit.script or torch.jit.trace": isinstance(layer, torch.jit.ScriptModule),
        SUBCLASS: isinstance(layer, (*OWN,)),
        f"only GRUs and LSTMs are {done}": True,
    }
    return next(reason for reason, holds in reasons.items() if holds)


def is_recurrent(module: nn.Module) -> bool:
    """Return whether a module is a recurrent layer or cell of torch, which may be scripted or traced."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    is_script = isinstance(module, torch.jit.ScriptModule) and ("weight_ih" in names or "weight_ih_l0" in names)
    return is_script or isinstance(module, (nn.RNNBase, nn.RNNCellBase))


def described(layer: nn.Module) -> str:
    """Return the repr on one line, with the module of the class."""
    cls = type(layer)
    home = "mingru.drop_in" if cls.__module__.startswith("mingru.drop_in.") else cls.__module__
    return f"{home.removesuffix('.modules.rnn')}.{cls.__name__}({layer.extra_repr()})"
