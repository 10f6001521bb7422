"""Replace the layers of an existing model."""

import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from ..check.values import check_type, expectation, require
from .twins import SUBCLASS, TWINS, described, is_recurrent, wanted_twins


class Report(NamedTuple):
    """Printable report of `replace`."""

    replaced: list[tuple[str, str, str]]
    """Qualified name, old layer and new layer of each replacement."""
    left: list[tuple[str, str, str]]
    """Qualified name, layer and reason of each layer that was not replaced."""

    def __str__(self) -> str:
        lines = [f"{name}: {old} -> {new}" for name, old, new in self.replaced]
        lines += [f"{name}: {old} not replaced: {why}" for name, old, why in self.left]
        return "\n".join(lines) or "nothing to replace"


def replace(
    model: nn.Module,
    gru: bool = True,
    lstm: bool = True,
    *,
    cells: bool = True,
    num_layers: int | None = None,
    **options: Any,
) -> Report:
    """Replace every `torch.nn.GRU` and `torch.nn.LSTM` inside a model, in place; cells too.

    The new layers keep options, device, dtype and training mode. A layer that is shared stays shared. Without options,
    a GRU becomes one block of `mingru.GRU`, which computes the same with the same weights, frozen where they
    were; the two biases of r, and of z, become their sum. An LSTM becomes such a GRU too, whose weights are new, as
    they are with options. Train those, with an optimizer created after this call.

    Args:
        model: Model. Layers are found among its submodules, not in plain lists and other attributes.
        gru: If True, replace `torch.nn.GRU` and `torch.nn.GRUCell`.
        lstm: If True, replace `torch.nn.LSTM` and `torch.nn.LSTMCell`.
        cells: If False, leave `torch.nn.GRUCell` and `torch.nn.LSTMCell`, which take less time to train.
        num_layers: Number of layers of each new layer, for a model that neither passes states nor reads `h_n`.
            Default: as many as the old one has.
        options: Keyword options of the classes of `mingru.drop_in`, such as `cell="minlstm"`, a minGRU for a GRU and a
            minLSTM for an LSTM. A class gets those that it has. Default: one block, `cell="gru"`.

    Returns:
        A `Report`, which can be printed. `replaced` has (qualified name, old layer, new layer) for each replaced layer.
        `left` has (qualified name, layer, reason) for each recurrent layer of torch that is not replaced: subclasses,
        scripted layers, those that `gru`, `lstm` or `cells` exclude, and `torch.nn.RNN`. If nothing is replaced, a
        warning says so.

    Raises:
        TypeError: `model` is not a torch.nn.Module, or no class has an option of this name.
        ValueError: `model` itself is a layer or cell, which cannot be replaced in place, or a layer has hooks, which
            may not suit other weights, or `gru` and `lstm` are both False. In these cases nothing is replaced.

    Examples:
        >>> model = torch.nn.ModuleDict({"rnn": torch.nn.GRU(3, 4), "head": torch.nn.Linear(4, 1)})
        >>> print(mingru.drop_in.replace(model))
        rnn: torch.nn.GRU(3, 4) -> mingru.drop_in.GRU(3, 4, cell='gru')
    """
    check_type("replace", "model", model, nn.Module, "a torch.nn.Module")
    wanted, of_torch = wanted_twins("replace", gru, lstm, cells, num_layers, **options), tuple(TWINS)
    if isinstance(model, of_torch) or (isinstance(model, torch.jit.ScriptModule) and is_recurrent(model)):
        got = f"{described(model)} itself"
        remedy = "construct a mingru.drop_in layer instead of it"
        raise ValueError(expectation("replace", "model", "a model that contains the layers", got, remedy))
    found = [
        (parent, key, f"{prefix}.{key}" if prefix else key, layer)
        for prefix, parent in model.named_modules()
        for key, layer in parent._modules.items()
        if is_recurrent(layer)
    ]
    new_layers: dict[nn.Module, nn.Module] = {}
    for _, _, name, layer in found:
        if type(layer) not in wanted:
            continue
        has_hooks = any(hooks for key, hooks in vars(layer).items() if key.endswith("_hooks"))
        remedy = "remove them, and register suitable hooks on the new layer"
        require("replace", name, not has_hooks, "a layer without hooks", "hooks", remedy)
        if layer not in new_layers:
            new_layers[layer] = TWINS[type(layer)]._like(layer, wanted[type(layer)])
    report = Report([], [])
    for parent, key, name, layer in found:
        if layer in new_layers:
            parent._modules[key] = new_layers[layer]
            report.replaced.append((name, described(layer), described(new_layers[layer])))
        else:
            kind, is_known = type(layer).__name__, type(layer) in TWINS
            reasons = {
                "cells is False": is_known and "Cell" in kind and not cells,
                f"{kind.lower().removesuffix('cell')} is False": is_known,
                "call replace before torch.jit.script or torch.jit.trace": isinstance(layer, torch.jit.ScriptModule),
                SUBCLASS: isinstance(layer, of_torch),
                "only GRUs and LSTMs are replaced": True,
            }
            why = next(reason for reason, holds in reasons.items() if holds)
            report.left.append((name, described(layer), why))
    if not report.replaced:
        text, remedy = str(report).replace("\n", "; "), "use patch() for a model that constructs its layers later"
        warnings.warn(f"replace: no layer was replaced ({text}); {remedy}", stacklevel=2)
    return report
