"""Decorators of public functions and constructors: wrong arguments of a call raise errors that say what to do."""

import functools
import inspect
import numbers
import operator
import traceback
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .annotations import Brief, by_position, check_values, values_of
from .names import FORGOTTEN, counterpart, unknown_argument
from .values import check_device, name_of, not_a_tensor, require

P = ParamSpec("P")
T = TypeVar("T")

# What a call raises for wrong arguments. Not all exceptions, because some of torch end a valid call early.
MISTAKES = (AttributeError, RuntimeError, TypeError, ValueError)
# Types of arguments that are no numbers of other libraries.
PLAIN = (int, float, str)


def explain(error: Exception, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise the error that says what is wrong with the arguments of a call that raised this one, if something is.

    It is called after a call has failed, so that valid calls cost nothing.
    """
    signature = inspect.signature(function)
    if isinstance(error, TypeError) and f"{function.__name__}() " in str(error):
        problem = misfit(name, signature, args, kwargs)
        if problem:
            raise TypeError(problem) from None
    if isinstance(error, AttributeError) and isinstance(error.obj, torch.nn.Module):
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name != "__getattr__"]
        packages = {frames[-1].f_globals.get("__name__", ""), type(error.obj).__module__}
        # Not a hook that asks for a name that no layer has.
        if {each.partition(".")[0] for each in packages} == {__name__.partition(".")[0]} and "object has" in str(error):
            problem = f"{type(error.obj).__name__} has no attribute {error.name!r}"
            problem += ", as after torch.load of a whole module that another version of mingru saved"
            remedy = "save its state_dict with that version, and load it into a new module"
            raise AttributeError(f"{name}: {problem}; {remedy}") from error
    if "mixed torch.Tensor and DTensor" in str(error):
        problem = "arguments must not be DTensors, whose weights are tensors of one process"
        remedy = "pass x.to_local(), and divide the layer by mingru.distributed.TensorParallel"
        raise TypeError(f"{name}: {problem}; {remedy}") from error
    for argument, value in {**dict(zip(signature.parameters, args, strict=False)), **kwargs}.items():
        if isinstance(value, PackedSequence):
            if "'PackedSequence' object" in str(error):
                raise not_a_tensor(name, argument, value) from error
            for order in [each.tolist() for each in value[2:] if each is not None and not each.is_meta]:
                expected, remedy = "packed with each index once in its orders", "use pack_padded_sequence"
                require(name, argument, sorted(order) == [*range(len(order))], expected, str(order), remedy)
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(each, Tensor) and (each.is_nested or each.layout != torch.strided):
                raise not_a_tensor(name, argument, each) from error


def explained(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a public function or method so that errors about its arguments say what to do."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except MISTAKES as error:
            own: Any = function
            name = args[0].name if args and isinstance(args[0], torch.nn.Module) else own.__name__
            explain(error, str(name), function, args, kwargs)
            raise

    run.__signature__ = Brief.from_callable(function)  # type: ignore[attr-defined]
    return run


def arguments_checked(remedy: str = "", function: str = "") -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a constructor or method so that errors about its arguments name the class of the object.

    Python would name the base class that defines the constructor. `remedy` replaces the list of positional arguments;
    `function` is the name of a function, which has no self. Flags and names have the values of their annotations.
    Numbers of numpy become numbers of Python.
    """

    def decorated(init: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(init)
        parameters = signature.parameters.values()
        values = {each.name: found for each in parameters if (found := values_of(each.annotation))}

        @functools.wraps(init)
        def run(*args: Any, **kwargs: Any) -> T:
            name = function or name_of(type(args[0]))
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                raise TypeError(misfit(name, signature, args, kwargs, remedy)) from None
            check_values(name, values, bound, kwargs)
            check_device(name, kwargs.get("device"))
            given: list[Any] = [v if isinstance(v, PLAIN) else _builtin(v) for v in (*args, *kwargs.values())]
            return init(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))

        run.__signature__ = Brief.from_callable(init)  # type: ignore[attr-defined]
        run.__doc__ = init.__doc__ or "The arguments are explained in the docstring of the class."
        return run

    return decorated


def _builtin(value: Any) -> Any:
    """Return a number of another library, such as a scalar of numpy, as an int or float."""
    if isinstance(value, numbers.Real):
        return operator.index(value) if isinstance(value, numbers.Integral) else float(value)
    return value


def misfit(
    name: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], remedy: str = ""
) -> str:
    """Return why a function cannot be called with these arguments, or a method, whose first is self; "" if it can."""
    known = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
    names = [parameter.name for parameter in known]
    has_options = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known)
    for argument in kwargs:
        if argument not in names and (not has_options or counterpart(argument, names)):
            return unknown_argument(name, argument, names)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        forgotten = FORGOTTEN.get(str(error).split("'")[-2]) if "'" in str(error) else None
        return f"{name}: {error}; {remedy or forgotten or by_position(signature)}"
    return ""
