"""Layers in the form that other libraries expect. Each module needs its library, and is imported by its name."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from .. import drop_in
from ..ops.cells import GATES, multiple_of

# What the layers of policies and of most forecasters have by default: a state of both signs, as that of an LSTM, and
# beside it the input. Their difference is a change over time.
OPTIONS: dict[str, Any] = {"candidate": "tanh", "residual": True}


def mixed(size: int) -> dict[str, Any]:
    """Return the options of a minGRU half of whose features turn, or nothing if it cannot divide so many features."""
    return {} if size % multiple_of(GATES["mixed"]) else {"cell": "mingru", "gate": "mixed"}


class Replaced:
    """Replaces the layers of a model that its library has constructed."""

    options: ClassVar[dict[str, Any]] = OPTIONS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A minGRU for a GRU, and a minLSTM for an LSTM, unless the options say otherwise.
        given: dict[str, Any] = {"cell": "minlstm", **self.options}
        drop_in.replace(self, **given)  # type: ignore[arg-type]


@contextmanager
def require(package: str, tested: str, name: str) -> Iterator[None]:
    """Add to an ImportError in the block: what `pip` installs, and the version with which module `name` was tested."""
    try:
        yield
    except ImportError as error:
        text = f'{name} was tested with {tested}: {error}. Run pip install "{package}"'
        raise type(error)(text, name=error.name) from error
