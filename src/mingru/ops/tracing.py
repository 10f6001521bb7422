"""`torch.jit.trace` writes down operations, and takes Python's branches and numbers for those of all later inputs.

So what asks about sizes or values is scripted, and stands in a trace whole.
"""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.jit import _trace

P = ParamSpec("P")
T = TypeVar("T")


def is_tracing() -> bool:
    return bool(_trace.is_tracing())  # type: ignore[no-untyped-call]


def for_trace(function: Callable[P, T]) -> Callable[P, T]:
    """The function, scripted while a trace is made: with its branches and loops, it serves any size there."""
    return _scripted(function) if is_tracing() else function


@functools.cache
def _scripted(function: Callable[P, T]) -> Callable[P, T]:
    with warnings.catch_warnings():
        # Upstream's, of which whoever traces has heard.
        warnings.filterwarnings("ignore", "`torch.jit.script` is", DeprecationWarning)
        return torch.jit.script(function)


def untraced(check: Callable[P, None]) -> Callable[P, None]:
    """A check that leaves no mark in a trace."""

    @functools.wraps(check)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if not is_tracing():
            check(*args, **kwargs)
            return
        state = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            check(*args, **kwargs)
        finally:
            torch._C._set_tracing_state(state)  # type: ignore[attr-defined]

    return run
