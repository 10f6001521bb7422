"""Replace the layers of an existing model."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ..check import expectation
from .layers import GRU, GRUCell


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


def replace(module: nn.Module) -> Report:
    """Replace every `torch.nn.GRU` and `torch.nn.GRUCell` inside a model, in place, by minGRU layers.

    The new layers keep options, device, dtype and training mode. A layer that is shared stays shared. All weights are
    newly initialized and require gradients, because a GRU's weights have no meaning in a minGRU. Train the model, with
    an optimizer created after this call.

    Args:
        module: Model. Layers are found among its submodules, not in plain lists and other attributes.

    Returns:
        A `Report`, which can be printed. `replaced` has (qualified name, old layer, new layer) for each replaced layer.
        `left` has (qualified name, layer, reason) for each subclass of torch's layers, which is not replaced.

    Raises:
        TypeError: `module` is not a torch.nn.Module.
        ValueError: `module` itself is a `torch.nn.GRU` or `torch.nn.GRUCell`, which cannot be replaced in place, or a
            layer has hooks, which may not suit other weights. In both cases nothing is replaced.

    Examples:
        >>> model = torch.nn.ModuleDict({"rnn": torch.nn.GRU(3, 4), "head": torch.nn.Linear(4, 1)})
        >>> print(mingru.drop_in.replace(model))
        rnn: torch.nn.GRU(3, 4) -> mingru.drop_in.GRU(3, 4)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(expectation("replace", "module", "a torch.nn.Module", type(module).__name__))
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        got = f"{_described(module)} itself"
        remedy = "construct a mingru.drop_in layer instead of it"
        raise ValueError(expectation("replace", "module", "a model that contains the layers", got, remedy))
    found = [
        (parent, key, f"{prefix}.{key}" if prefix else key, layer)
        for prefix, parent in module.named_modules()
        for key, layer in parent._modules.items()
        if isinstance(layer, (nn.GRU, nn.GRUCell))
    ]
    new_layers: dict[nn.Module, nn.Module] = {}
    for _, _, name, layer in found:
        if type(layer) not in MAKERS:
            continue
        if any(hooks for key, hooks in vars(layer).items() if key.endswith("_hooks")):
            remedy = "remove them, and register suitable hooks on the new layer"
            raise ValueError(expectation("replace", name, "a layer without hooks", "hooks", remedy))
        if layer not in new_layers:
            new_layers[layer] = MAKERS[type(layer)](layer)
    report = Report([], [])
    for parent, key, name, layer in found:
        if layer in new_layers:
            parent._modules[key] = new_layers[layer]
            report.replaced.append((name, _described(layer), _described(new_layers[layer])))
        else:
            report.left.append((name, _described(layer), "a subclass may compute something else"))
    return report


def _make_layer(old: Any) -> GRU:
    sizes = (old.input_size, old.hidden_size, old.num_layers, old.bias, old.batch_first)
    weight = old.weight_ih_l0
    new = GRU(*sizes, bidirectional=bool(old.bidirectional), device=weight.device, dtype=weight.dtype)
    # Set here, because the constructor would warn again about a dropout without effect.
    new.dropout = old.dropout
    return new.train(old.training)


def _make_cell(old: Any) -> GRUCell:
    weight = old.weight_ih
    return GRUCell(old.input_size, old.hidden_size, bool(old.bias), weight.device, weight.dtype).train(old.training)


MAKERS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {nn.GRU: _make_layer, nn.GRUCell: _make_cell}


def _described(layer: nn.Module) -> str:
    """Return the repr on one line, with the module of the class."""
    cls = type(layer)
    module_name = cls.__module__
    if cls in MAKERS or cls in (GRU, GRUCell):
        module_name = "torch.nn" if cls in MAKERS else "mingru.drop_in"
    return f"{module_name}.{cls.__name__}({layer.extra_repr()})"
