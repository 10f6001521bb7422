"""Flags and names: a call may pass the values that the annotations of its signature have."""

import inspect
import itertools
import textwrap
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from .values import expectation, is_number


class Brief(inspect.Signature):
    """A signature whose text has names and defaults, in lines that `help` does not cut. Its parameters keep types."""

    def format(self, **options: Any) -> str:
        parameters = [each.replace(annotation=each.empty) for each in self.parameters.values()]
        return textwrap.fill(str(inspect.Signature(parameters)), 90, subsequent_indent="    ", break_on_hyphens=False)

    __str__ = format


def values_of(annotation: Any) -> tuple[Any, ...]:
    """Return the values that an annotation such as `bool | Literal["highway"]` allows; () if it is of another kind."""
    if annotation in (bool, NoneType):
        return (True, False) if annotation is bool else (None,)
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return parts
    found = [values_of(part) for part in parts] if get_origin(annotation) in (Union, UnionType) else []
    return tuple(itertools.chain(*found)) if all(found) else ()


def check_values(
    name: str, values_by_argument: dict[str, tuple[Any, ...]], bound: inspect.BoundArguments, kwargs: dict[str, Any]
) -> None:
    """Raise an error if an argument of a call has another value."""
    for argument, values in values_by_argument.items():
        value = bound.arguments.get(argument, values[0])
        # First by its type, because 1 equals True, and an array would compare its elements.
        if not (isinstance(value, (bool, str, NoneType)) and value in values):
            if True not in values:
                raise ValueError(expectation(name, argument, f"one of {values}", repr(value)))
            expected = " or ".join(["a bool", *(repr(each) for each in values if not isinstance(each, bool))])
            # Such as a dropout in the place of `bias`.
            remedy = by_position(bound.signature) if is_number(value) and argument not in kwargs else ""
            raise TypeError(expectation(name, argument, expected, repr(value), remedy))


def by_position(signature: inspect.Signature) -> str:
    names = [each.name for each in signature.parameters.values() if each.kind is each.POSITIONAL_OR_KEYWORD]
    return f"the positional arguments are {', '.join(name for name in names if name != 'self')}"
