"""Helpers that all layers share: states that are not views, options in a repr, weights."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..ops.cells import BLOCKS, GATES, default_candidate
from ..ops.graph import is_captured
from ..ops.names_of_torch import unsafe_view

MaybeTensor = Tensor | None
MaybeList = list[Tensor] | None
# What a call takes and returns, for type checkers: TorchScript reads the types of `forward`.
Steps = TypeVar("Steps", Tensor, PackedSequence)
M = TypeVar("M", bound=nn.Module)
Forward = TypeVar("Forward", bound=Callable[..., Any])
# The output of a layer, and its last states.
Outputs = tuple[Tensor, list[Tensor]]


def typed_as(forward: Forward) -> Callable[[Any], Forward]:
    """Give `__call__` the type of `forward`, for type checkers: some of them ignore what `__call__ = forward` says."""
    return lambda _: forward


def reshaped(x: Tensor, shape: list[int]) -> Tensor:
    """Return x in another shape as a tensor that autograd does not treat as a view, so that `detach_` works.

    Autograd does not detect in-place changes of the result. Call it only if no operation has saved x for the backward
    pass.
    """
    return x.view(shape) if is_captured() else unsafe_view(x, shape)


def copied(view: Tensor) -> Tensor:
    """Return a copy of a view, because a view cannot be detached in place. In a graph, return the view."""
    return view if is_captured() else view.clone()


def without_dims(state: Tensor, dims: list[int]) -> Tensor:
    """Remove dimensions of size 1 from a new state that has no other references; `dims` must be in descending order."""
    for dim in dims:
        # In place, because `squeeze` would return a view, which cannot be detached in place.
        state = state.squeeze(dim) if is_captured() else state.squeeze_(dim)
    return state


def one_or_all(values: Sequence[Any]) -> Any:
    """Return the value that all layers have, or a tuple with one for each layer."""
    return values[0] if values.count(values[0]) == len(values) else tuple(values)


def arguments_of_class(cls: type) -> dict[str, Any]:
    """Return the default of each argument of the constructor, from the class of this package that defines it.

    The default of a required argument is `inspect.Parameter.empty`. Subclasses elsewhere may have other arguments.
    """
    package = __name__.partition(".")[0]
    return _defaults(next(each for each in cls.__mro__ if each.__module__.partition(".")[0] == package))


@functools.cache
def _defaults(own: type) -> dict[str, Any]:
    return {name: each.default for name, each in inspect.signature(own).parameters.items()}


def defaults_of(module: nn.Module) -> dict[str, Any]:
    """Return the default of each argument of the constructor; of `candidate`, the one for the module's gates."""
    defaults = {**arguments_of_class(type(module))}
    if "candidate" in defaults and "gate" in defaults:
        gates = vars(module)["gate"]
        gates = [gates] if isinstance(gates, str) else gates
        of_gates = [default_candidate(GATES[gate]) for gate in gates]
        defaults["candidate"] = "tanh" if vars(module).get("cell") == BLOCKS else one_or_all(of_gates)
    return defaults


def not_default(module: nn.Module, *names: str) -> str:
    """Return ", name=value" for each of these options that differs from its default; without names, for all options."""
    defaults = defaults_of(module)
    text = ""
    for name in names or defaults:
        value = getattr(module, name, defaults[name])
        if defaults[name] is not inspect.Parameter.empty and value != defaults[name]:
            text += f", {name}={value!r}"
    return text


def weight_of(module: nn.Module) -> Tensor | None:
    """Return a tensor with the dtype and device of the weight, or None if a (quantized) module has no parameters.

    It does not read `module.weight`, which a parametrized module computes at each access.
    """
    weight = module._parameters.get("weight")
    return next(module.parameters(), None) if weight is None else weight


def take_weights(module: M, other: nn.Module) -> M:
    """Give a module the weights of another with equal parameters, trainable where those are, and return it."""
    module.load_state_dict(other.state_dict())
    for own, given in zip(module.parameters(), other.parameters(), strict=True):
        own.requires_grad_(given.requires_grad)
    return module.train(other.training)


def reset_all(modules: Iterable[nn.Module]) -> None:
    """Re-initialize the parameters of modules, and of their children if they have no method for that."""
    for module in modules:
        getattr(module, "reset_parameters", functools.partial(reset_all, module.children()))()
