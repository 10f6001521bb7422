"""Replace the layers of an existing model by layers of other cells."""

import inspect
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from ..check.calls import arguments_checked
from ..check.names import unknown_argument
from ..check.values import check_choice, check_int, check_type, expectation, require
from .accelerating import described, is_recurrent, why_left
from .interface import DropIn
from .layers import GRULike, GRULikeCell, LSTMLike, LSTMLikeCell
from .of_torch import OWN

# For torch's classes and ours.
_LIKE = GRULike, LSTMLike, GRULikeCell, LSTMLikeCell
LIKE: dict[type, type[DropIn]] = dict(zip((*OWN, *OWN.values()), 2 * _LIKE, strict=True))
_NO_CELL = "accelerate(model) computes the layers in less time, and cell='gru', 'mingru' or 'minlstm' names others"
# The options for each class of torch that is replaced.
Wanted = dict[type, dict[str, Any]]


class Report(NamedTuple):
    """Printable report of `replace`."""

    replaced: list[tuple[str, str, str]]
    """Qualified name, old layer and new layer of each replacement."""
    left: list[tuple[str, str, str]]
    """Qualified name, layer and reason of each layer that was not replaced."""

    def __str__(self) -> str:
        lines = [f"{name}: {old} -> {new}, with new weights" for name, old, new in self.replaced]
        lines += [f"{name}: {old} not replaced: {why}" for name, old, why in self.left]
        return "\n".join(lines) or "nothing to replace"


def wanted(name: str, gru: bool, lstm: bool, cells: bool, num_layers: int | None, options: dict[str, Any]) -> Wanted:
    """Return torch's classes to replace, each with those of the options that its class here has.

    Raise an error if no class has an option. Without `cell`, there are no options.
    """
    require(name, "gru or lstm", gru or lstm, "True", "False for both")
    flags = {"GRU": gru, "LSTM": lstm, "GRUCell": gru and cells, "LSTMCell": lstm and cells}
    kinds = [of_torch for of_torch in LIKE if flags[of_torch.__name__]]
    known = {of_torch: inspect.signature(LIKE[of_torch]).parameters for of_torch in kinds}
    names = [each.name for each in known[kinds[0]].values() if each.kind is each.KEYWORD_ONLY]
    if unknown := [option for option in options if option not in names]:
        raise TypeError(unknown_argument(name, unknown[0], ["num_layers", *names]))
    if num_layers is not None:
        check_int(name, "num_layers", num_layers)
        options = {**options, "num_layers": num_layers}
    if "cell" not in options and (options or name == "replace"):
        raise TypeError(f"{name}: no cell is named; {_NO_CELL}")
    check_choice(name, "cell", options.get("cell", "gru"), ("gru", "mingru", "minlstm"))
    return {of_torch: {key: options[key] for key in options if key in each} for of_torch, each in known.items()}


@arguments_checked(function="replace")
def replace(
    model: nn.Module,
    gru: bool = True,
    lstm: bool = True,
    *,
    cells: bool = True,
    num_layers: int | None = None,
    **options: Any,
) -> Report:
    """Replace every `torch.nn.GRU` and `torch.nn.LSTM` inside a model by layers of another cell, in place; cells too.

    The new layers keep sizes, options, device, dtype and training mode. A layer that is shared stays shared. Weights
    are new: train them, with an optimizer created after this call. To compute the same with the same weights in less
    time, call `mingru.drop_in.accelerate` instead.

    Args:
        model: Model. Layers are found among its submodules, not in plain lists and other attributes.
        gru: If True, replace `torch.nn.GRU` and `torch.nn.GRUCell`.
        lstm: If True, replace `torch.nn.LSTM` and `torch.nn.LSTMCell`.
        cells: If False, leave `torch.nn.GRUCell` and `torch.nn.LSTMCell`, which take less time to train.
        num_layers: Number of layers of each new layer, for a model that neither passes states nor reads `h_n`.
            Default: as many as the old one has.
        options: `cell`, which is required: "gru", "mingru" or "minlstm". Other keyword options of
            `mingru.drop_in.GRULike`; a cell gets those that it has.

    Returns:
        A `Report`, which can be printed. `replaced` has (qualified name, old layer, new layer) for each replaced layer.
        `left` has (qualified name, layer, reason) for each recurrent layer of torch that is not replaced: subclasses,
        scripted layers, those that `gru`, `lstm` or `cells` exclude, and `torch.nn.RNN`. If nothing is replaced, a
        warning says so.

    Raises:
        TypeError: `model` is not a torch.nn.Module, `cell` is missing, or no class has an option of this name.
        ValueError: `model` itself is a layer or cell, which cannot be replaced in place, or a layer has hooks, which
            may not suit other weights, or `gru` and `lstm` are both False. In these cases nothing is replaced.

    Examples:
        >>> model = torch.nn.ModuleDict({"rnn": torch.nn.GRU(3, 4), "head": torch.nn.Linear(4, 1)})
        >>> print(mingru.drop_in.replace(model, cell="mingru"))
        rnn: torch.nn.GRU(3, 4) -> mingru.drop_in.GRULike(3, 4, cell='mingru'), with new weights
    """
    check_type("replace", "model", model, nn.Module, "a torch.nn.Module")
    kinds = wanted("replace", gru, lstm, cells, num_layers, options)
    if isinstance(model, (*LIKE,)) or (isinstance(model, torch.jit.ScriptModule) and is_recurrent(model)):
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
        if type(layer) in kinds and layer not in new_layers:
            has_hooks = any(hooks for key, hooks in vars(layer).items() if key.endswith("_hooks"))
            remedy = "remove them, and register suitable hooks on the new layer"
            require("replace", name, not has_hooks, "a layer without hooks", "hooks", remedy)
            new_layers[layer] = _built_like(layer, kinds[type(layer)])
    report = Report([], [])
    for parent, key, name, layer in found:
        if layer in new_layers:
            parent._modules[key] = new_layers[layer]
            report.replaced.append((name, described(layer), described(new_layers[layer])))
        else:
            kind, is_known = type(layer).__name__, type(layer) in LIKE
            own = {"cells is False": is_known and "Cell" in kind and not cells}
            own[f"{kind.lower().removesuffix('cell')} is False"] = is_known
            report.left.append((name, described(layer), why_left(layer, own, "replaced", "replace")))
    if not report.replaced:
        text, remedy = str(report).replace("\n", "; "), "use patch() for a model that constructs its layers later"
        warnings.warn(f"replace: no layer was replaced ({text}); {remedy}", stacklevel=2)
    return report


def converted(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of a class of torch as those of ours: torch also takes numbers as this flag."""
    return {name: bool(value) if name == "bidirectional" else value for name, value in arguments.items()}


def _built_like(layer: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Return the layer or cell with the arguments of one of torch, of which options replace some."""
    twin, weight = LIKE[type(layer)], next(layer.parameters())
    given = {name: getattr(layer, name) for name in inspect.signature(twin).parameters if name in vars(layer)}
    # Set afterwards, because the constructor would warn again about a dropout without effect.
    dropout = given.pop("dropout", 0.0)
    given |= {"bias": bool(layer.bias), "device": weight.device, "dtype": weight.dtype}
    rnn = twin(**converted(given) | options)
    rnn.dropout = dropout
    return rnn.train(layer.training)
