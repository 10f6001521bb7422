"""Whole models as files, loaded with weights_only=True in a process of its own."""

import functools
import pickle
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from cases import CASES
from torch import nn

import mingru
from mingru import convert, drop_in, models
from mingru.modules.per_step import OF_TORCH

# Options that bring in every class that may be inside.
MODELS = {case.name: case.make for case in CASES if case.name.isidentifier() or "." in case.name} | {
    "all norms": lambda: mingru.MinLSTM(3, 4, 2, norm="rms", forget_bias=1.0, dtype=torch.bfloat16),
    "lists": lambda: mingru.MinConv2dGRU(3, [4, 5], [3, 1], num_layers=2, padding=["same", 0], residual=True),
    "Projected": lambda: convert.Projected(mingru.MinGRU(3, 4), nn.Linear(4, 2)),
    "Stack": lambda: mingru.Stack([mingru.MinGRU(3, 4), mingru.MinLSTM(4, 4)], residual=True),
    "modules of torch": lambda: mingru.Stack([mingru.MinGRU(3, 4), *(each() for each in OF_TORCH[:-3])]),
    "LanguageModel": lambda: models.LanguageModel(5, 4, 1, tied=False),
    "BlockGRUCell": lambda: mingru.BlockGRUCell(3, 4),
    "projections": lambda: drop_in.LSTM(3, 4, 2, proj_size=2, dropout=0.5),
}

LOAD = """
import sys
from contextlib import nullcontext
import torch
import mingru

torch.serialization.add_safe_globals(mingru.safe_globals())
loaded = {}
for path in sys.argv[2:]:
    model = torch.load(path, weights_only=True)
    loaded[path] = (type(model).__name__, repr(model), model.state_dict())
torch.save(loaded, sys.argv[1])
"""


def test_whole_models_load_in_a_fresh_process(tmp_path):
    made, named = {str(tmp_path / name): make() for name, make in MODELS.items()}, set()
    for path, model in made.items():
        torch.save(model, path)
        # Nothing is allowed by the import.
        with pytest.raises(pickle.UnpicklingError, match="safe_globals"):
            torch.load(path, weights_only=True)
        named |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    public = [getattr(home, name) for home in (mingru, convert, drop_in, models) for name in home.__all__]
    layers = {each for each in public if isinstance(each, type) and issubclass(each, nn.Module)}
    assert layers == {type(model) for model in made.values()} <= set(mingru.safe_globals())
    # A class that no file names would be trusted for nothing.
    assert named == {f"{each.__module__}.{each.__qualname__}" for each in mingru.safe_globals()}
    found = str(tmp_path / "found")
    subprocess.run([sys.executable, "-W", "ignore", "-c", LOAD, found, *made], check=True, timeout=120)
    for path, (kind, text, weights) in torch.load(found, weights_only=True).items():
        model = made[path]
        assert (kind, text) == (type(model).__name__, repr(model))
        torch.testing.assert_close(weights, model.state_dict(), rtol=0, atol=0)


CONV = functools.partial(mingru.MinConv1dGRUCell, kernel_size=1)


@pytest.mark.parametrize("kind", [mingru.MinGRU, CONV, lambda *dims: models.Block(4)])
def test_whole_modules_of_version_0_1_are_refused(kind):
    """Its layers had no buffer for the mark of the gate."""
    model = kind(3, 4)
    for module in model.modules():
        module._buffers.pop("gate", None)
    with pytest.raises(ValueError, match=r"ayer: this whole module was saved by mingru 0\.1, .* model\.state_dict\(\)"):
        pickle.loads(pickle.dumps(model))


def test_whole_modules_with_fewer_marks_get_them():
    model = mingru.Stack([mingru.MinGRU(4, 4, candidate="tanh", min_decay=0.5)], residual=True)
    expected = model.state_dict()
    for module in model.modules():
        for name in [name for name in module._buffers if name.endswith("_mark")]:
            del module._buffers[name]
    assert len(model.state_dict()) == len(expected) - 3
    torch.testing.assert_close(dict(pickle.loads(pickle.dumps(model)).state_dict()), dict(expected), rtol=0, atol=0)


def test_whole_modules_with_groups_are_refused():
    """Their convolutions have the rows of gate and candidate in another order."""
    model = CONV(2, 4)
    for groups in (1, 2):
        model.layers[0].groups = groups
        with (
            pytest.raises(ValueError, match="this whole module was saved with groups") if groups > 1 else nullcontext()
        ):
            assert repr(pickle.loads(pickle.dumps(model))) == repr(model)
