"""A missing library, or another version of it: the error names what to install, and the version that was tested."""

import importlib
import re
import sys
import types

import pytest

PACKAGES = {"darts": "darts[torch]", "gluonts": "gluonts[torch]", "pytorch_forecasting": "pytorch-forecasting"}
PACKAGES |= {"rsl_rl": "rsl-rl-lib", "sb3": "sb3-contrib"}
PACKAGES |= {name: name for name in ("flair", "neuralforecast", "speechbrain", "torchrl")}


def without(monkeypatch, *names):
    for loaded in list(sys.modules):
        if any(loaded == name or loaded.startswith(f"{name}.") for name in names):
            monkeypatch.delitem(sys.modules, loaded)


@pytest.mark.parametrize(("name", "package"), PACKAGES.items())
def test_missing_library(name, package, monkeypatch):
    library = "sb3_contrib" if name == "sb3" else name
    without(monkeypatch, library, f"mingru.integrations.{name}")
    monkeypatch.setitem(sys.modules, library, None)
    form = rf'^mingru.integrations.{name} was tested with [\w-]+ \d+\.\d+: .*Run pip install "{re.escape(package)}"$'
    with pytest.raises(ModuleNotFoundError, match=form):
        importlib.import_module(f"mingru.integrations.{name}")


def test_another_version(monkeypatch):
    without(monkeypatch, "flair", "mingru.integrations.flair")
    for name in ("flair", "flair.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(ImportError, match=r"tested with flair 0\.15: cannot import name 'SequenceTagger'"):
        importlib.import_module("mingru.integrations.flair")
