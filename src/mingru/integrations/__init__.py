"""Layers in the form that other libraries expect. Each module needs its library, and is imported by its name."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def require(package: str, tested: str, name: str) -> Iterator[None]:
    """Add to an ImportError in the block: what `pip` installs, and the version with which module `name` was tested."""
    try:
        yield
    except ImportError as error:
        raise type(error)(
            f'{name} was tested with {tested}: {error}. Run pip install "{package}"', name=error.name
        ) from error
