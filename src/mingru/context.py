"""Context managers that warn if they are called without `with`, which has no effect."""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import _GeneratorContextManager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def context_manager(function: Callable[P, Iterator[T]]) -> Callable[P, _GeneratorContextManager[T]]:
    """Decorate a function as `contextlib.contextmanager` does, and warn of a call that is never entered."""

    generator: Any = function

    @functools.wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> _GeneratorContextManager[T]:
        return _Block(generator, args, kwargs)

    return make


class _Block(_GeneratorContextManager[Any]):
    _decorates = False

    def __call__(self, function: Any) -> Any:
        self._decorates = True
        return super().__call__(function)

    def __del__(self) -> None:
        # A call with wrong arguments has no generator.
        gen = getattr(self, "gen", None)
        if gen is not None and inspect.getgeneratorstate(gen) == inspect.GEN_CREATED and not self._decorates:
            name = gen.__name__
            text = f"{name}: no effect without a block; put the code into `with {name}(...):`"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
