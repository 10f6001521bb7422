"""Decorators of public functions and constructors: wrong arguments of a call raise errors that say what to do."""

import functools
import inspect
import itertools
import numbers
import operator
import textwrap
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .names import counterpart, unknown_argument
from .values import expectation, name_of, not_a_tensor, require

P = ParamSpec("P")
T = TypeVar("T")
Args = tuple[object, ...]
Kwargs = dict[str, Any]

# What a call raises for wrong arguments. Not all exceptions, because some of torch end a valid call early.
MISTAKES = (AttributeError, RuntimeError, TypeError, ValueError)


def explain(error: Exception, name: str, function: Callable[..., object], args: Args, kwargs: Kwargs) -> None:
    """Raise the error that says what is wrong with the arguments of a call that raised this one, if something is.

    It is called after a call has failed, so that valid calls cost nothing.
    """
    signature = inspect.signature(function)
    if isinstance(error, TypeError) and f"{function.__name__}() " in str(error):
        problem = misfit(name, signature, args, kwargs)
        if problem:
            raise TypeError(problem) from None
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
            name = args[0].name if args and isinstance(args[0], torch.nn.Module) else function.__name__
            explain(error, str(name), function, args, kwargs)
            raise

    run.__signature__ = Brief.from_callable(function)  # type: ignore[attr-defined]
    return run


def arguments_checked(remedy: str = "", function: str = "") -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a constructor or method so that errors about its arguments name the class of the object.

    Python would name the base class that defines the constructor. `remedy` replaces the list of positional arguments;
    `function` is the name of a function, which has no self. Flags and names have the values of their annotations.
    Numbers of numpy, such as the size of a space of gymnasium, become numbers of Python.
    """

    def decorated(init: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(init)
        values = {each.name: found for each in signature.parameters.values() if (found := values_of(each.annotation))}

        @functools.wraps(init)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            name = function or name_of(type(args[0]))
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                raise TypeError(misfit(name, signature, args, kwargs, remedy)) from None
            check_values(name, values, bound, kwargs)
            return init(*map(_builtin, args), **{option: _builtin(value) for option, value in kwargs.items()})

        run.__signature__ = Brief.from_callable(init)  # type: ignore[attr-defined]
        run.__doc__ = init.__doc__ or "The arguments are explained in the docstring of the class."
        return run

    return decorated


def _builtin(value: Any) -> Any:
    """Return a number of another library, such as a scalar of numpy, as an int or float."""
    if isinstance(value, numbers.Real) and not isinstance(value, (int, float)):
        return operator.index(value) if isinstance(value, numbers.Integral) else float(value)
    return value


def misfit(name: str, signature: inspect.Signature, args: Args, kwargs: Kwargs, remedy: str = "") -> str:
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
        return f"{name}: {error}; {remedy or by_position(signature)}"
    return ""


class Brief(inspect.Signature):
    """A signature whose text has names and defaults, in lines that `help` does not cut. Its parameters keep types."""

    def format(self, **options: object) -> str:
        parameters = [each.replace(annotation=each.empty) for each in self.parameters.values()]
        return textwrap.fill(str(inspect.Signature(parameters)), 90, subsequent_indent="    ", break_on_hyphens=False)

    __str__ = format


def values_of(annotation: object) -> tuple[object, ...]:
    """Return the values that an annotation such as `bool | Literal["highway"]` allows; () if it is of another kind."""
    if annotation in (bool, NoneType):
        return (True, False) if annotation is bool else (None,)
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return parts
    found = [values_of(part) for part in parts] if get_origin(annotation) in (Union, UnionType) else []
    return tuple(itertools.chain(*found)) if all(found) else ()


def check_values(name: str, allowed: dict[str, Args], bound: inspect.BoundArguments, kwargs: Kwargs) -> None:
    """Raise an error if an argument of a call has another value."""
    for argument, values in allowed.items():
        value = bound.arguments.get(argument, values[0])
        # First by its type, because 1 equals True, and an array would compare its elements.
        if not (isinstance(value, (bool, str, NoneType)) and value in values):
            if True not in values:
                raise ValueError(expectation(name, argument, f"one of {values}", repr(value)))
            expected = " or ".join(["a bool", *(repr(each) for each in values if not isinstance(each, bool))])
            # Such as a dropout in the place of `bias`.
            remedy = "" if argument in kwargs else by_position(bound.signature)
            raise TypeError(expectation(name, argument, expected, repr(value), remedy))


def by_position(signature: inspect.Signature) -> str:
    names = [each.name for each in signature.parameters.values() if each.kind is each.POSITIONAL_OR_KEYWORD]
    return f"the positional arguments are {', '.join(name for name in names if name != 'self')}"
