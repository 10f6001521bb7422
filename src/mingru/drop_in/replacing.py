"""Swap the layers of a model that exists."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ..check import expectation
from .layers import GRU, GRUCell


class Report(NamedTuple):
    """What `replace` did; `print` it."""

    replaced: list[tuple[str, str, str]]
    """Qualified name, what was there, what is there now."""
    left: list[tuple[str, str, str]]
    """Qualified name, what is there, why it was left."""

    def __str__(self) -> str:
        lines = [f"{name}: {old} -> {new}" for name, old, new in self.replaced]
        lines += [f"{name}: {old} left as it is: {why}" for name, old, why in self.left]
        return "\n".join(lines) or "nothing to replace"


def replace(module: nn.Module) -> Report:
    """Swap every `torch.nn.GRU` and `torch.nn.GRUCell` inside a model, in place, for those of this module.

    The new layers have the options, device, dtype and mode (training or not) of the old ones, and are shared where
    those were. Their weights are fresh, and all of them learn, since those of a GRU have no meaning in a minGRU: train
    the model, with an optimizer made after this call.

    Args:
        module: a model. Layers are found where it has them as submodules, not in its lists and other attributes.

    Returns:
        A `Report`, which prints well. `replaced` has a (qualified name, what was there, what is there now) for each
        place; `left` a (qualified name, what is there, why) for each subclass of torch's layers, which are left alone.

    Raises:
        TypeError: module is none.
        ValueError: module is itself such a layer, which can't be swapped in place; or a layer has hooks, whose meaning
            for other weights is unknown. Nothing has been replaced then.

    Example:
        >>> model = torch.nn.ModuleDict({"rnn": torch.nn.GRU(3, 4), "head": torch.nn.Linear(4, 1)})
        >>> print(mingru.drop_in.replace(model))
        rnn: torch.nn.GRU(3, 4) -> mingru.drop_in.GRU(3, 4)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(expectation("replace", "module", "a torch.nn.Module", type(module).__name__))
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        got = f"{_described(module)} itself"
        remedy = "where it is made, make a mingru.drop_in layer instead"
        raise ValueError(expectation("replace", "module", "a model that holds the layers", got, remedy))
    places = [
        (parent, key, f"{prefix}.{key}" if prefix else key, layer)
        for prefix, parent in module.named_modules()
        for key, layer in parent._modules.items()
        if isinstance(layer, (nn.GRU, nn.GRUCell))
    ]
    made: dict[nn.Module, nn.Module] = {}
    for _, _, name, layer in places:
        if type(layer) not in MAKERS:
            continue
        if any(hooks for key, hooks in vars(layer).items() if key.endswith("_hooks")):
            remedy = "remove them, and register those that make sense on the new layer"
            raise ValueError(expectation("replace", name, "without hooks", "some", remedy))
        if layer not in made:
            made[layer] = MAKERS[type(layer)](layer)
    report = Report([], [])
    for parent, key, name, layer in places:
        if layer in made:
            parent._modules[key] = made[layer]
            report.replaced.append((name, _described(layer), _described(made[layer])))
        else:
            report.left.append((name, _described(layer), "a subclass, whose forward may be anything"))
    return report


def _make_layer(old: Any) -> GRU:
    sizes = (old.input_size, old.hidden_size, old.num_layers, old.bias, old.batch_first)
    weight = old.weight_ih_l0
    new = GRU(*sizes, bidirectional=bool(old.bidirectional), device=weight.device, dtype=weight.dtype)
    # Not through the constructor, which would warn again of a dropout without effect.
    new.dropout = old.dropout
    return new.train(old.training)


def _make_cell(old: Any) -> GRUCell:
    weight = old.weight_ih
    return GRUCell(old.input_size, old.hidden_size, bool(old.bias), weight.device, weight.dtype).train(old.training)


MAKERS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {nn.GRU: _make_layer, nn.GRUCell: _make_cell}


def _described(layer: nn.Module) -> str:
    """Its repr on one line, with where it is from."""
    kind = type(layer)
    home = kind.__module__
    if kind in MAKERS or kind in (GRU, GRUCell):
        home = "torch.nn" if kind in MAKERS else "mingru.drop_in"
    return f"{home}.{kind.__name__}({layer.extra_repr()})"
