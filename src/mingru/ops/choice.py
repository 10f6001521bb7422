"""The one place that chooses which body runs a recurrence."""

import functools
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from . import body_log, body_native, body_sequential, body_torch, portable
from .shape import States


class Body(Protocol):
    """A way to compute the recurrences: one module for each; `ops` tells what the arguments mean."""

    # Whether it is made of differentiable operations; where it isn't, `autograd` gives it its gradients, by the body's
    # own `linear_scan_backward` and `mingru_backward` if it has them.
    DIFFERENTIABLE: bool

    def unavailable(self) -> str | None:
        """Why this body cannot run in this process; None where it can."""

    def refuses(self, sequence: Tensor, activation: str | None, /) -> str | None:
        """Why it cannot run on this tensor with this activation (None for `linear_scan`); None where it can."""

    def linear_scan(self, a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool, /) -> States: ...

    def mingru(
        self,
        gate: Tensor,
        candidate: Tensor,
        h: Tensor,
        initial: Tensor,
        reset: Tensor | None,
        activation: str,
        reverse: bool,
        /,
    ) -> States: ...


BODIES: dict[str, Body] = {
    "native": body_native,
    "torch": body_torch,
    "log": body_log,
    "sequential": body_sequential,
}
# What "auto" tries, in this order; "torch" serves everything.
FASTEST_FIRST = ("native", "torch")
VARIABLE = "MINGRU_BACKEND"


class _Chosen(threading.local):
    """What `use_backend` says in this thread."""

    name = "auto"


_chosen = _Chosen()


def backends() -> dict[str, bool | str]:
    """Tell which back ends can run here.

    Returns:
        For each name, `True`, or a sentence that says why not.

    Example:
        >>> mingru.backends()["torch"]
        True
    """
    return {name: body.unavailable() or True for name, body in BODIES.items()}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Let `"auto"` mean this back end, in this thread, until the block ends.

    It stands over the environment variable `MINGRU_BACKEND`, which does the same for a whole process.

    Args:
        name: one of the names that `backends` lists, or `"auto"`.

    Raises:
        ValueError: there is no such back end.

    Example:
        >>> rnn = mingru.MinGRU(3, 8)
        >>> with mingru.use_backend("sequential"):
        ...     out, h = rnn(torch.zeros(2, 5, 3))
    """
    _check_name(name, "use_backend: name")
    before, _chosen.name = _chosen.name, name
    try:
        yield
    finally:
        _chosen.name = before


def body(name: str) -> Body:
    """The body of this name; while a graph is captured, "torch" is `portable`, which every graph can hold."""
    return portable if name == "torch" and torch.compiler.is_compiling() else BODIES[name]


def choose(function: str, backend: str, sequence: Tensor, activation: str | None) -> str:
    """The name of the body that runs this function on this tensor."""
    asked_by = "backend"
    if backend == "auto":
        backend, asked_by = _chosen.name, "use_backend"
    if backend == "auto":
        backend, asked_by = os.environ.get(VARIABLE) or "auto", f"the environment variable {VARIABLE}"
    if backend == "auto":
        if torch.compiler.is_exporting():
            # It leaves this process, for one that may not have our kernels.
            return "torch"
        if sequence.device.type == "cpu" and not torch.compiler.is_compiling():
            _say_once_what_is_missing()
        for name in FASTEST_FIRST:
            if _refusal(name, sequence, activation) is None:
                return name
    asked_by = f"{function}: {asked_by}"
    _check_name(backend, asked_by)
    why = _refusal(backend, sequence, activation)
    if why is not None:
        raise ValueError(f"{asked_by} asks for {backend!r}, which can't run this: {why}; use 'auto'")
    return backend


@functools.cache
def _say_once_what_is_missing() -> None:
    why = body_native.unavailable()
    if why is not None:
        warnings.warn(
            f"mingru: running its portable back end 'torch' on the CPU, as {why}", RuntimeWarning, stacklevel=2
        )


def _refusal(name: str, sequence: Tensor, activation: str | None) -> str | None:
    body = BODIES[name]
    return body.unavailable() or body.refuses(sequence, activation)


def _check_name(name: str, asked_by: str) -> None:
    if name not in ("auto", *BODIES):
        names = ", ".join(repr(known) for known in ("auto", *BODIES))
        raise ValueError(f"{asked_by} must be one of {names}, got {name!r}")
