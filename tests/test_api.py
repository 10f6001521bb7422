"""The public names and their signatures, as the contract has them; what an import costs; what the package carries."""

import importlib.metadata
import importlib.resources
import importlib.util
import inspect
import operator
import re
import sys
import types
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from cases import in_a_process, refuses

import mingru
from mingru.models import block
from mingru.modules import options
from mingru.modules.level import NORMS
from mingru.ops import names_of_torch, route
from mingru.ops.activation import ACTIVATIONS
from mingru.ops.cells import GATES

LINES = Path(__file__).with_name("data").joinpath("signatures.txt").read_text("utf-8").splitlines()[2:]
# Name, and what stands between the brackets of its signature.
CONTRACT = dict(line.removesuffix(")").split("(", 1) for line in LINES)
# Their arguments are those of another class, which tells them.
THIN = {f"MinConv{dims}dGRU{end}" for dims in (1, 3) for end in ("", "Cell")} | {"MinConv2dGRUCell"}
MODULES = ("convert", "drop_in", "export", "functional", "models")


def plain(signature):
    return [(each.name, each.kind, each.default) for each in signature.parameters.values()]


def found(name):
    return operator.attrgetter(name)(mingru)


@pytest.mark.parametrize("name", CONTRACT)
def test_signatures(name):
    assert plain(inspect.signature(found(name))) == plain(inspect.signature(eval(f"lambda {CONTRACT[name]}: None")))


def test_public_names():
    assert {name.partition(".")[0] for name in CONTRACT} | {"__version__"} == set(mingru.__all__)
    functions = {name.partition(".")[2] for name in CONTRACT if name.startswith("functional.")}
    # Not `mingru`, because `from mingru.functional import *` would bind the name of the package to the function.
    assert functions - {"mingru"} == set(mingru.functional.__all__)
    assert functions == set(dir(mingru.functional)) and dir(mingru.export) == ["onnx"]
    for module in (mingru, *map(found, MODULES)):
        assert len(module.__all__) == len(set(module.__all__))
        assert all(getattr(module, name) is not None for name in module.__all__)
    names = {name for name, value in vars(mingru).items() if not isinstance(value, types.ModuleType) or name in MODULES}
    assert {name for name in names if not name.startswith("_")} == set(mingru.__all__) - {"__version__"}
    # Modules that are imported by their names only stand beside them.
    seen = set(dir(mingru)) - {"bench", "distributed", "integrations", "modules", "streaming"}
    assert {name for name in seen if not name.startswith("_")} == set(mingru.__all__) - {"__version__"}
    assert mingru.__version__ == importlib.metadata.version("torch-mingru")
    assert importlib.resources.files("mingru").joinpath("py.typed").is_file()


@pytest.mark.parametrize("name", [name for name in CONTRACT if not name.endswith((".forward", ".generate"))])
def test_public_names_are_documented(name):
    """Each public function and class has a docstring, with its example; arguments are all named in it."""
    text, home = inspect.getdoc(found(name)), vars(torch.nn.Module)
    assert ">>> " in text and "docs/" not in text, "a wheel has no docs"
    for method in {"__init__", "forward"} & set(dir(found(name))):
        own = getattr(found(name), method)
        assert str(getattr(own, "__module__", "")).startswith("torch.") or inspect.getdoc(own) != home[method].__doc__
    if name in THIN:
        assert "MinConv2dGRU" in text
        return
    for parameter in inspect.signature(found(name)).parameters:
        assert parameter == "self" or parameter in text.partition("Args:")[2], parameter


def test_signatures_have_short_lines_and_keep_types():
    for name in ("MinGRU", "drop_in.LSTMLike", "functional.mingru", "export.onnx", "models.LanguageModel.generate"):
        assert max(map(len, str(inspect.signature(found(name))).splitlines())) <= 90
    assert inspect.signature(mingru.MinGRU).parameters["num_layers"].annotation is int


def test_import_brings_nothing_but_the_package():
    code = "import sys, torch; before = set(sys.modules); import mingru; print(*sorted(set(sys.modules) - before))"
    loaded = in_a_process(code).split()
    assert "mingru" in loaded
    # Not matplotlib, not numpy, not Triton, not Lightning, and of torch nothing that `import torch` leaves for later,
    # such as its compiler.
    assert not {name.partition(".")[0] for name in loaded} - {"mingru", *sys.stdlib_module_names}


def test_private_names_of_torch_stand_in_one_file():
    name = re.compile(
        r"\btorch\.([\w.]+\.)?_[a-zA-Z]|\bfrom torch[\w.]* import .*\b_[a-zA-Z]|\bforward_ad\._"
        r"|__(prepare_scriptable|script_if_tracing|original_fn)|\b_dynamo_"
    )
    files = Path(mingru.__file__).parent.rglob("*.py")
    assert [file.name for file in files if name.search(file.read_text("utf-8"))] == ["names_of_torch.py"]


def computed(rnn, x):
    """What a layer computes, in ways that ask for private names."""
    with torch.no_grad():
        plain = rnn(x)
        steps = rnn(x[:, :1]), torch.vmap(lambda row: rnn(row.unsqueeze(0))[0])(x)
    out, h = rnn(x)
    grads = torch.autograd.grad(out.square().sum() + h.square().sum(), list(rnn.parameters()))
    several = torch.ones(2, *out.shape).double()
    batched = torch.autograd.grad(rnn(x)[0], rnn.layers[0].linear.bias, several, is_grads_batched=True)
    return plain, steps, (out, h), grads, batched, torch.jit.script(rnn)(x), torch.jit.trace(rnn, (x,))(x)


def gone(path):
    raise AttributeError(path)


def test_without_the_private_names_of_torch_results_are_the_same(monkeypatch):
    rnn, x = mingru.MinGRU(3, 4).double(), torch.randn(2, 20, 3).double()
    expected = computed(rnn, x)
    spec = importlib.util.spec_from_file_location("without", names_of_torch.__file__)
    without = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(operator, "attrgetter", gone)
        spec.loader.exec_module(without)
    without.forward_ad = None
    names = {name: value for name, value in vars(names_of_torch).items() if not name.startswith("_")}
    assert None not in names.values()
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "mingru"]:
        for name, value in names.items():
            if vars(module).get(name) is value:
                monkeypatch.setattr(module, name, getattr(without, name))
    assert not names_of_torch.is_untransformed()
    torch.testing.assert_close(computed(rnn, x), expected)
    # Of these two, no right result is known.
    refuses(RuntimeError, "forward mode over forward mode", torch.func.jvp, lambda x: rnn(x)[0], (x,), (x,))
    refuses(ImportError, "which this function needs", mingru.export.onnx, rnn, x, "rnn.onnx")


def test_numbers_of_numpy_are_numbers():
    rnn = mingru.MinGRU(np.int64(3), 4, num_layers=np.int32(2), dropout=np.float32(0.5))
    assert all(type(size) is int for size in (rnn.input_dims, rnn.num_layers)) and type(rnn.dropout) is float
    refuses(AttributeError, "min_decay", setattr, rnn, "min_decay", 0.5)


def test_what_type_checkers_accept_is_what_there_is():
    assert get_args(options.Gate) == tuple(GATES) and get_args(route.BackendName) == ("auto", *route.BACKENDS)
    of_layers = {name for cls in block.LAYERS.values() for name in inspect.signature(cls).parameters}
    of_layers -= {*block.SET_BY_THE_BLOCK, "norm", "dropout"}
    of_blocks = inspect.signature(mingru.models.Block).parameters.keys() - {"dims", "layer_options"}
    assert block.LayerOptions.__annotations__.keys() == of_layers
    assert block.BlockOptions.__annotations__.keys() == of_layers | of_blocks
    assert set(get_args(options.Candidate)) == set(ACTIVATIONS) and get_args(options.Norm) == tuple(NORMS)
