"""The public names and their signatures, as the contract has them; what an import costs; what the package carries."""

import importlib.metadata
import importlib.resources
import inspect
import subprocess
import sys
import types

import pytest

import mingru

# Name, and what stands between the brackets of its signature.
CONTRACT = {
    "MinGRU": (
        "input_dims, hidden_dims, num_layers=1, bias=True, batch_first=True, dropout=0.0, bidirectional=False, "
        "*, residual=False, norm=None, candidate='positive', learn_initial_state=False, device=None, dtype=None"
    ),
    "MinGRU.forward": "self, x, h=None, reset=None, lengths=None",
    "MinLSTM": (
        "input_dims, hidden_dims, num_layers=1, bias=True, batch_first=True, dropout=0.0, bidirectional=False, "
        "*, forget_bias=0.0, residual=False, norm=None, candidate='positive', learn_initial_state=False, device=None, "
        "dtype=None"
    ),
    "MinLSTM.forward": "self, x, h=None, reset=None, lengths=None",
    "functional.g": "x",
    "functional.log_g": "x",
    "functional.mingru": "gate, candidate, h=None, *, reset=None, backend='auto'",
    "functional.minlstm": "forget, input, candidate, h=None, *, reset=None, backend='auto'",
    "functional.linear_scan": "a, b, h=None, *, reverse=False, reset=None, backend='auto'",
    "functional.parallel_scan_log": "log_a, log_b",
    "backends": "",
    "use_backend": "name",
}
# Keywords that the library adds behind those of the contract.
ADDED = dict.fromkeys(["functional.mingru", "functional.minlstm"], "*, activation='positive', initial_state=None")


def parameters(text):
    return plain(inspect.signature(eval(f"lambda {text}: None")))


def plain(signature):
    return [(each.name, each.kind, each.default) for each in signature.parameters.values()]


def found(name):
    value = mingru
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", CONTRACT)
def test_signatures(name):
    expected = parameters(CONTRACT[name]) + parameters(ADDED.get(name, ""))
    assert plain(inspect.signature(found(name))) == expected


def test_public_names():
    assert set(mingru.__all__) == {"MinGRU", "MinLSTM", "__version__", "backends", "functional", "use_backend"}
    assert set(mingru.functional.__all__) == {"g", "linear_scan", "log_g", "mingru", "minlstm", "parallel_scan_log"}
    assert {name.partition(".")[0] for name in CONTRACT} | {"__version__"} == set(mingru.__all__)
    for module in (mingru, mingru.functional):
        assert list(module.__all__) == sorted(module.__all__)
        for name in module.__all__:
            assert getattr(module, name) is not None


def test_nothing_else_is_in_the_package():
    public = {
        name
        for name, value in vars(mingru).items()
        if not name.startswith("_") and not (isinstance(value, types.ModuleType) and name != "functional")
    }
    assert public == set(mingru.__all__) - {"__version__"}


@pytest.mark.parametrize("name", [name for name in CONTRACT if not name.endswith(".forward")])
def test_public_names_are_documented(name):
    """Each public function and class has a docstring, with its example; arguments are all named in it."""
    value = found(name)
    text = inspect.getdoc(value)
    assert ">>> " in text
    for parameter in inspect.signature(value).parameters:
        assert parameter in text.partition("Args:")[2], parameter


def imported(statement):
    """The modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys, torch; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split())


def test_import_brings_nothing_but_the_package():
    loaded = imported("import mingru")
    assert "mingru" in loaded
    others = {name for name in loaded if name.partition(".")[0] not in {"mingru", *sys.stdlib_module_names}}
    # Not matplotlib, not numpy, not Triton, not Lightning, and of torch nothing that `import torch` leaves for later,
    # such as its compiler.
    assert others == set()


def test_version():
    assert mingru.__version__ == importlib.metadata.version("torch-mingru")


def test_types_are_shipped():
    assert importlib.resources.files("mingru").joinpath("py.typed").is_file()
