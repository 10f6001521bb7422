"""pytorch-forecasting's recurrent models: lengths of 0, training, checkpoints and equal predictions."""

import numpy as np
import pytest
import torch

pytest.importorskip("pytorch_forecasting", reason="pip install pytorch-forecasting")
import lightning.pytorch as lightning
import pandas as pd
from cases import grid, tensors
from pytorch_forecasting import NormalDistributionLoss, TimeSeriesDataSet
from pytorch_forecasting.models.nn import rnn as original

from mingru import drop_in
from mingru.integrations import pytorch_forecasting

# Of the libraries that pytorch-forecasting uses.
pytestmark = pytest.mark.filterwarnings("ignore")

B, S, IN, H = 3, 6, 4, 5
KINDS = ("GRU", "LSTM")
MODELS = {
    "RecurrentNetwork": {"cell_type": "GRU", "rnn_layers": 2},
    "DeepAR": {"cell_type": "LSTM", "rnn_layers": 2, "loss": NormalDistributionLoss()},
    "TemporalFusionTransformer": {"lstm_layers": 1},
}
OPTIONS = {"RecurrentNetwork": ("gru", False, "tanh"), "DeepAR": ("minlstm", True, "tanh")}


@pytest.fixture(scope="module")
def dataset():
    frame = pd.DataFrame({"value": np.sin(np.arange(80) * 0.5).astype(np.float32), "time": [*range(40)] * 2})
    frame["series"] = ["a"] * 40 + ["b"] * 40
    # Sequences of one step have nothing to encode.
    lengths = {"min_encoder_length": 1, "max_encoder_length": 12, "max_prediction_length": 4, "randomize_length": True}
    of_time = {"time_varying_known_reals": ["time"], "time_varying_unknown_reals": ["value"]}
    return TimeSeriesDataSet(frame, "time", "value", ["series"], **lengths, **of_time)


@grid(bidirectional=[False, True], batch_first=[False, True], kind=KINDS)
def test_the_methods_of_states(kind, batch_first, bidirectional):
    """Shapes are those of the original class; its states of empty sequences are compared with one sequence only."""
    options = {"num_layers": 2, "batch_first": batch_first, "bidirectional": bidirectional}
    rnn, old = getattr(pytorch_forecasting, kind)(IN, H, **options), getattr(original, kind)(IN, H, **options)
    x = torch.randn(*((B, S) if batch_first else (S, B)), IN)
    initial = rnn.init_hidden_state(x)
    expected = old.init_hidden_state(x)
    torch.testing.assert_close(initial, expected)
    hx = torch.randn(2 * (1 + bidirectional), B, H)
    hx = hx if kind == "GRU" else (hx, hx)
    torch.testing.assert_close(rnn.repeat_interleave(hx, 3), old.repeat_interleave(hx, 3))
    empty = torch.tensor([False, True, False])[None, :, None]
    for new, state, start in zip(*map(tensors, (rnn.handle_no_encoding(hx, empty, initial), hx, initial)), strict=True):
        assert torch.equal(new[:, [0, 2]], state[:, [0, 2]]) and torch.equal(new[:, 1], start[:, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_of_0(kind):
    rnn, own = (getattr(module, kind)(IN, H) for module in (pytorch_forecasting, drop_in))
    own.load_state_dict(rnn.state_dict())
    x, hx = torch.randn(S, B, IN), torch.randn(1, B, H)
    hx = hx if kind == "GRU" else (hx, hx)
    for lengths in (torch.tensor([4, 0, 2]), torch.tensor([0, 0, 0])):
        found = rnn(x, hx, lengths=lengths, enforce_sorted=False)
        torch.testing.assert_close(found, own(x, hx, lengths=lengths))


@pytest.mark.parametrize("kind", KINDS)
def test_no_steps(kind):
    """The original class returns zeros and the initial state, where nn.GRU raises an error."""
    rnn, old = (getattr(module, kind)(IN, H, batch_first=True) for module in (pytorch_forecasting, original))
    found, expected = (each(torch.randn(B, 0, IN), lengths=torch.zeros(B, dtype=torch.long)) for each in (rnn, old))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", MODELS)
def test_training_saving_and_loading(name, dataset, tmp_path):
    model_class = getattr(pytorch_forecasting, name)
    torch.manual_seed(0)
    model = model_class.from_dataset(dataset, hidden_size=8, learning_rate=0.01, **MODELS[name])
    layers = [each for each in model.modules() if isinstance(each, (drop_in.GRU, drop_in.LSTM))]
    assert not any(isinstance(each, torch.nn.RNNBase) for each in model.modules())
    num_layers = MODELS[name].get("rnn_layers", 1)
    assert len(layers) == 3 - num_layers
    for rnn in layers:
        assert type(rnn) is getattr(pytorch_forecasting, MODELS[name].get("cell_type", "LSTM"))
        options = OPTIONS.get(name, ("minlstm", False, "positive"))
        assert (rnn.num_layers, rnn.cell, rnn.residual, rnn.candidate, rnn.batch_first) == (num_layers, *options, True)
    before = [x.detach().clone() for rnn in layers for x in rnn.parameters()]
    options = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=1, limit_train_batches=2, default_root_dir=tmp_path, **options)
    trainer.fit(model, dataset.to_dataloader(batch_size=8, num_workers=0))
    after = [x for rnn in layers for x in rnn.parameters()]
    assert not any(torch.equal(x, old) for x, old in zip(after, before, strict=True))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = model_class.load_from_checkpoint(tmp_path / "model.ckpt")
    assert repr(loaded) == repr(model)
    batch, _ = next(iter(dataset.to_dataloader(train=False, batch_size=8, num_workers=0)))
    predictions = []
    for each in (model, loaded):
        torch.manual_seed(0)
        with torch.no_grad():
            predictions.append(each.cpu().eval()(batch).prediction)
    assert torch.equal(*predictions)
