"""A missing library, or another version of it: the error names what to install, and the version that was tested."""

import importlib
import sys
import types

import pytest

# The version that was tested; names of packages, of modules and in errors, where they differ.
TESTED = {"rsl_rl": "5.5", "sb3": "2.9", "torchrl": "0.14"}
PACKAGES = {"rsl_rl": "rsl-rl-lib", "sb3": "sb3-contrib"}


def without(monkeypatch, *names):
    for loaded in list(sys.modules):
        if any(loaded == name or loaded.startswith(f"{name}.") for name in names):
            monkeypatch.delitem(sys.modules, loaded)


@pytest.mark.parametrize("name", TESTED)
def test_missing_library(name, monkeypatch):
    library, package = {"sb3": "sb3_contrib"}.get(name, name), PACKAGES.get(name, name)
    without(monkeypatch, library, f"mingru.integrations.{name}")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module(f"mingru.integrations.{name}")
    assert str(caught.value).startswith(
        f"mingru.integrations.{name} was tested with {'sb3-contrib' if name == 'sb3' else name} {TESTED[name]}: "
    )
    assert str(caught.value).endswith(f'Run pip install "{package}"')


def test_another_version(monkeypatch):
    without(monkeypatch, "torchrl", "mingru.integrations.torchrl")
    for name in ("torchrl", "torchrl.modules"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(ImportError, match=r"tested with torchrl 0\.14: cannot import name 'GRUModule'"):
        importlib.import_module("mingru.integrations.torchrl")
