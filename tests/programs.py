"""What the tests of the programs share."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def load(path: str | Path) -> ModuleType:
    """Return the module of a program, given its path in the repository."""
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_program", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(function: Callable, *arguments: object) -> str:
    """Return the message with which a call stops the program: one line, which Python prints, with the exit status 1."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    assert isinstance(stop.value.code, str)
    assert "\n" not in stop.value.code
    return stop.value.code.split(": ", 1)[1]
