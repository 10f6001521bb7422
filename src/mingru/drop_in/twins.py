"""Which class takes the place of which class of torch, and with which options."""

import inspect
from typing import Any

import torch
from torch import nn

from ..check.names import unknown_argument
from ..check.values import check_flag, check_int, require
from .cells import GRUCell, LSTMCell
from .interface import ONE_BLOCK
from .layers import GRU, LSTM

TWINS: dict[type[nn.Module], Any] = {nn.GRU: GRU, nn.GRUCell: GRUCell, nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}
SUBCLASS = "a subclass may compute something else"
# The options for each class of torch that is replaced.
Wanted = dict[type[nn.Module], dict[str, Any]]


def wanted_twins(
    name: str, /, gru: bool, lstm: bool, cells: bool, num_layers: int | None = None, **options: Any
) -> Wanted:
    """Return torch's classes to replace, each with those of the options that its twin has.

    Raise an error if no twin has an option.
    """
    check_flag(name, "gru", gru, f"{name} with gru=False replaces LSTMs alone, and with lstm=False GRUs alone")
    check_flag(name, "lstm", lstm)
    check_flag(name, "cells", cells)
    require(name, "gru or lstm", gru or lstm, "True", "False for both")
    # By their names, because `torch.nn.GRU` is another class in a block of `patch`.
    all_of = [(of_torch, twin) for of_torch, twin in TWINS.items() if (gru if "GRU" in twin.__name__ else lstm)]
    twins = [pair for pair in all_of if cells or "Cell" not in pair[1].__name__]
    known = {of_torch: inspect.signature(twin).parameters for of_torch, twin in twins}
    parameters = [each for of_twin in known.values() for each in of_twin.values()]
    names = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    for option in options:
        if option not in names:
            raise TypeError(unknown_argument(name, option, ["num_layers", *dict.fromkeys(names)]))
    if num_layers is not None:
        check_int(name, "num_layers", num_layers)
        options = {**options, "num_layers": num_layers}
    options = options if "cell" in options else ONE_BLOCK | options
    # The cell "minlstm" is the default of an LSTM, and a GRU has none.
    options = {key: value for key, value in options.items() if (key, value) != ("cell", "minlstm")}
    return {of_torch: {key: options[key] for key in options if key in each} for of_torch, each in known.items()}


def is_recurrent(module: Any) -> bool:
    """Return whether a module is a recurrent layer or cell of torch, which may be scripted or traced."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    is_script = isinstance(module, torch.jit.ScriptModule) and ("weight_ih" in names or "weight_ih_l0" in names)
    return is_script or isinstance(module, (nn.RNNBase, nn.RNNCellBase))


def described(layer: nn.Module) -> str:
    """Return the repr on one line, with the module of the class."""
    cls = type(layer)
    module_name = "mingru.drop_in" if cls in TWINS.values() else cls.__module__.removesuffix(".modules.rnn")
    return f"{module_name}.{cls.__name__}({layer.extra_repr()})"
