"""Whole models as files, loaded with weights_only=True in a process of its own."""

import pickle

import pytest
import torch
from cases import CASES, in_a_process
from torch import nn

import mingru
from mingru import convert, drop_in, models
from mingru.drop_in.accelerating import AcceleratedGRU, AcceleratedLSTM
from mingru.modules.per_step import OF_TORCH

# Options that bring in every class that may be inside.
MODELS = {case.name: case.make for case in CASES if case.name.isidentifier() or "." in case.name} | {
    "all norms": lambda: mingru.MinLSTM(3, 4, 2, norm="rms", forget_bias=1.0, dtype=torch.bfloat16),
    "lists": lambda: mingru.MinConv2dGRU(3, [4, 5], [3, 1], num_layers=2, padding=["same", 0], residual=True),
    "Stack": lambda: mingru.Stack([mingru.MinGRU(3, 4), mingru.MinLSTM(4, 4)], residual=True),
    "modules of torch": lambda: mingru.Stack([mingru.MinGRU(3, 4), *(each() for each in OF_TORCH[:-3])]),
    "LanguageModel": lambda: models.LanguageModel(5, 4, 1, tied=False),
    "BlockGRUCell": lambda: mingru.BlockGRUCell(3, 4),
    "projections": lambda: drop_in.LSTM(3, 4, 2, proj_size=2, dropout=0.5),
    "accelerated": lambda: (rnn := nn.GRU(3, 4), drop_in.accelerate(rnn))[0],
    "accelerated LSTM": lambda: (rnn := nn.LSTM(3, 4), drop_in.accelerate(rnn))[0],
}

LOAD = """
import sys
import torch

sys.modules["mingru"] = None
try:
    torch.load(sys.argv[-1], weights_only=False)
except ModuleNotFoundError:
    del sys.modules["mingru"]
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
    layers = {each for each in public if isinstance(each, type) and issubclass(each, nn.Module)} | {
        AcceleratedGRU,
        AcceleratedLSTM,
    }
    assert layers == {type(model) for model in made.values()} <= set(mingru.safe_globals())
    # A class that no file names would be trusted for nothing.
    assert named == {f"{each.__module__}.{each.__qualname__}" for each in mingru.safe_globals()}
    found = str(tmp_path / "found")
    in_a_process(LOAD, found, *made)
    for path, (kind, text, weights) in torch.load(found, weights_only=True).items():
        model = made[path]
        assert (kind, text) == (type(model).__name__, repr(model))
        torch.testing.assert_close(weights, model.state_dict(), rtol=0, atol=0)
