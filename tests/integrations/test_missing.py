"""A missing library, or another version of it: the error names what to install, and the version that was tested."""

import importlib
import re
import sys
import types

import pytest
from cases import refuses

# Our module, the library, its package, and its name and the version that was tested, as in errors.
LIBRARIES = [
    ("rsl_rl", "rsl_rl", "rsl-rl-lib", "rsl_rl 5.5"),
    ("sb3", "sb3_contrib", "sb3-contrib", "sb3-contrib 2.9"),
    ("torchrl", "torchrl", "torchrl", "torchrl 0.14"),
]


def without(monkeypatch, *names):
    for loaded in list(sys.modules):
        if any(loaded == name or loaded.startswith(f"{name}.") for name in names):
            monkeypatch.delitem(sys.modules, loaded)


@pytest.mark.parametrize(("name", "library", "package", "tested"), LIBRARIES)
def test_missing_library(name, library, package, tested, monkeypatch):
    without(monkeypatch, library, f"mingru.integrations.{name}")
    monkeypatch.setitem(sys.modules, library, None)
    first, last = f"mingru.integrations.{name} was tested with {tested}: ", f'Run pip install "{package}"'
    refuses(
        ModuleNotFoundError,
        f"^{re.escape(first)}.*{re.escape(last)}$",
        importlib.import_module,
        f"mingru.integrations.{name}",
    )


def test_another_version(monkeypatch):
    without(monkeypatch, "torchrl", "mingru.integrations.torchrl")
    for name in ("torchrl", "torchrl.modules"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    message = r"tested with torchrl 0\.14: cannot import name 'GRUModule'"
    refuses(ImportError, message, importlib.import_module, "mingru.integrations.torchrl")
