"""Whole models as files, loaded with weights_only=True in a process of its own."""

import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import mingru
from mingru import convert, drop_in, models

# Options that bring in every class that may be inside.
MODELS = {
    "MinGRU": lambda: mingru.MinGRU(3, 4, 2, bidirectional=True, residual=True, norm="layer", learn_initial_state=True),
    "MinLSTM": lambda: mingru.MinLSTM(3, 4, norm="rms", forget_bias=1.0, dtype=torch.bfloat16),
    "MinGRUCell": lambda: mingru.MinGRUCell(3, 4),
    "MinLSTMCell": lambda: mingru.MinLSTMCell(3, 4),
    "MinConv1dGRU": lambda: mingru.MinConv1dGRU(3, 4, 3, num_layers=2, residual=True, norm="group"),
    "MinConv2dGRU": lambda: mingru.MinConv2dGRU(3, [4, 5], [3, (1, 3)], num_layers=2, bidirectional=True),
    "MinConv3dGRU": lambda: mingru.MinConv3dGRU(3, 4, 3, padding="same"),
    "MinConv1dGRUCell": lambda: mingru.MinConv1dGRUCell(3, 4, 3),
    "MinConv2dGRUCell": lambda: mingru.MinConv2dGRUCell(3, 4, 3),
    "MinConv3dGRUCell": lambda: mingru.MinConv3dGRUCell(3, 4, 3),
    "Stack": lambda: mingru.Stack([mingru.MinGRU(3, 4), mingru.MinLSTM(4, 4)], residual=True),
    "Projected": lambda: convert.Projected(mingru.MinGRU(3, 4), nn.Linear(4, 2)),
    "Block": lambda: models.Block(4, conv=3, mlp=2),
    "LanguageModel": lambda: models.LanguageModel(5, 4, 1, tied=False),
    "GRU": lambda: drop_in.GRU(3, 4, 2, bidirectional=True, dropout=0.5),
    "GRUCell": lambda: drop_in.GRUCell(3, 4),
    "LSTM": lambda: drop_in.LSTM(3, 4, 2, proj_size=2),
    "LSTMCell": lambda: drop_in.LSTMCell(3, 4),
}

LOAD = """
import sys
import torch
import mingru

torch.serialization.add_safe_globals(mingru.safe_globals())
loaded = {}
for path in sys.argv[2:]:
    model = torch.load(path, weights_only=True)
    loaded[path] = (type(model).__name__, repr(model), model.state_dict())
torch.save(loaded, sys.argv[1])
"""


def test_every_public_class_is_tried():
    homes = (mingru, convert, drop_in, models)
    public = [getattr(home, name) for home in homes for name in home.__all__]
    layers = {each for each in public if isinstance(each, type) and issubclass(each, nn.Module)}
    assert {each.__name__ for each in layers} == set(MODELS)
    assert layers <= set(mingru.safe_globals())


def test_whole_models_load_in_a_fresh_process(tmp_path):
    models = {str(tmp_path / name): make() for name, make in MODELS.items()}
    for path, model in models.items():
        torch.save(model, path)
    found = str(tmp_path / "found")
    command = [sys.executable, "-W", "ignore", "-c", LOAD, found, *models]
    subprocess.run(command, check=True, timeout=120)
    for path, (kind, text, weights) in torch.load(found, weights_only=True).items():
        model = models[path]
        assert (kind, text) == (type(model).__name__, repr(model))
        torch.testing.assert_close(weights, model.state_dict(), rtol=0, atol=0)


def test_whole_modules_of_version_0_1_are_refused():
    """Its layers had no buffer for the mark of the gate."""
    for make in (lambda: mingru.MinGRU(3, 4), lambda: mingru.MinConv1dGRUCell(3, 4, 1), lambda: models.Block(4)):
        model = make()
        for module in model.modules():
            module._buffers.pop("gate", None)
        with pytest.raises(
            ValueError, match=r"ayer: this whole module was saved by mingru 0\.1, .* model\.state_dict\(\)"
        ):
            pickle.loads(pickle.dumps(model))


def test_whole_modules_with_fewer_marks_get_them():
    model = mingru.Stack([mingru.MinGRU(4, 4, candidate="tanh", min_decay=0.5)], residual=True)
    expected = model.state_dict()
    for module in model.modules():
        for name in [name for name in module._buffers if name.endswith("_mark")]:
            del module._buffers[name]
    assert len(model.state_dict()) == len(expected) - 3
    torch.testing.assert_close(dict(pickle.loads(pickle.dumps(model)).state_dict()), dict(expected), rtol=0, atol=0)


def test_nothing_is_allowed_by_the_import(tmp_path):
    torch.save(mingru.MinGRU(3, 4), tmp_path / "rnn.pt")
    with pytest.raises(pickle.UnpicklingError, match="safe_globals"):
        torch.load(tmp_path / "rnn.pt", weights_only=True)


def test_each_class_is_needed(tmp_path):
    """By one of the models; a class that no file names would be trusted for nothing."""
    named = set()
    for name, make in MODELS.items():
        torch.save(make(), tmp_path / name)
        named |= set(torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / name))
    listed = [f"{each.__module__}.{each.__qualname__}" for each in mingru.safe_globals()]
    assert sorted(listed) == sorted(named)
