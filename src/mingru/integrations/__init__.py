"""Layers in the form that other libraries expect. Each module needs its library, and is imported by its name."""

import importlib


def require(package: str, tested: str, name: str) -> None:
    """Raise an error if a package is missing; `tested` is the version with which the module `name` was tested."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} needs the package {package} (tested with {tested}): run pip install {package}", name=error.name
        ) from error
