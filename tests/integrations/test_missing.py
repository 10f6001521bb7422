"""A missing library, or another version of it: the error names what to install, and the version that was tested."""

import importlib
import sys
import types

import pytest

LIBRARIES = {
    "darts": ("darts", "darts[torch]", "darts 0.48"),
    "flair": ("flair", "flair", "flair 0.15"),
    "gluonts": ("gluonts", "gluonts[torch]", "gluonts 0.17"),
    "neuralforecast": ("neuralforecast", "neuralforecast", "neuralforecast 3.3"),
    "pytorch_forecasting": ("pytorch_forecasting", "pytorch-forecasting", "pytorch-forecasting 1.8"),
    "rsl_rl": ("rsl_rl", "rsl-rl-lib", "rsl_rl 5.5"),
    "sb3": ("sb3_contrib", "sb3-contrib", "sb3-contrib 2.9"),
    "speechbrain": ("speechbrain", "speechbrain", "speechbrain 1.1"),
    "torchrl": ("torchrl", "torchrl", "torchrl 0.14"),
}


def without(monkeypatch, *names):
    for loaded in list(sys.modules):
        if any(loaded == name or loaded.startswith(f"{name}.") for name in names):
            monkeypatch.delitem(sys.modules, loaded)


@pytest.mark.parametrize("name", LIBRARIES)
def test_missing_library(name, monkeypatch):
    library, package, tested = LIBRARIES[name]
    without(monkeypatch, library, f"mingru.integrations.{name}")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module(f"mingru.integrations.{name}")
    assert str(caught.value).startswith(f"mingru.integrations.{name} was tested with {tested}: ")
    assert str(caught.value).endswith(f'Run pip install "{package}"')


def test_another_version(monkeypatch):
    without(monkeypatch, "flair", "mingru.integrations.flair")
    for name in ("flair", "flair.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(ImportError, match=r"tested with flair 0\.15: cannot import name 'SequenceTagger'"):
        importlib.import_module("mingru.integrations.flair")
