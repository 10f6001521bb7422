"""Darts' RNNModel and BlockRNNModel: training, saving, checkpoints and loading."""

import numpy as np
import pytest
import torch

pytest.importorskip("darts", reason='pip install "darts[torch]"')
pytest.importorskip("pytorch_lightning", reason='pip install "darts[torch]"')
from darts import TimeSeries
from darts.models import BlockRNNModel, RNNModel

from mingru import drop_in
from mingru.integrations import darts

# Of the libraries that Darts uses.
pytestmark = pytest.mark.filterwarnings("ignore")

SERIES = TimeSeries.from_values(np.sin(np.arange(60) * 0.5).astype(np.float32))
COVARIATES = TimeSeries.from_values(np.cos(np.arange(90) * 0.5).astype(np.float32))
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_model_summary": False}


class Normed(darts.MinGRUModule):
    options = {"norm": "rms"}  # noqa: RUF012


def make(module, folder, **options):
    common = {"n_rnn_layers": 2, "hidden_dim": 8, "n_epochs": 2, "random_state": 0, "pl_trainer_kwargs": QUIET}
    common |= {"work_dir": str(folder), "model_name": "model", "save_checkpoints": True, **options}
    if "Block" in module.__name__:
        return BlockRNNModel(12, 6, model=module, **common)
    return RNNModel(12, model=module, training_length=18, **common)


@pytest.mark.parametrize(
    "module", [darts.MinGRUModule, darts.MinLSTMModule, darts.MinGRUBlockModule, darts.MinLSTMBlockModule, Normed]
)
def test_training_saving_and_loading(module, tmp_path):
    model = make(module, tmp_path)
    model.fit(SERIES, future_covariates=COVARIATES)
    rnn = model.model.rnn
    assert type(rnn) is getattr(drop_in, module.name)
    assert (rnn.num_layers, rnn.hidden_size, rnn.residual) == (2, 8, module is not Normed)
    assert (rnn.candidate, rnn.norm) == (("positive", "rms") if module is Normed else ("tanh", None))
    expected = model.predict(10, future_covariates=COVARIATES).values()
    model.save(str(tmp_path / "model.pt"))
    for loaded in (
        type(model).load(str(tmp_path / "model.pt")),
        type(model).load_from_checkpoint("model", str(tmp_path), best=False),
    ):
        assert loaded.model.rnn.extra_repr() == rnn.extra_repr()
        np.testing.assert_array_equal(loaded.predict(10, future_covariates=COVARIATES).values(), expected)


def test_training_lowers_the_error(tmp_path):
    errors = []
    for epochs in (1, 30):
        model = make(
            darts.MinGRUModule, tmp_path, n_epochs=epochs, save_checkpoints=False, optimizer_kwargs={"lr": 0.02}
        )
        model.fit(SERIES[:48])
        errors.append(np.abs(model.predict(12).values() - SERIES[48:].values()).mean())
    assert errors[1] < 0.3 * errors[0]


def test_steps_equal_one_pass(tmp_path):
    """`predict` passes one step and the state, training a whole sequence."""
    model = make(darts.MinGRUModule, tmp_path)
    model.fit(SERIES)
    rnn, x = model.model.rnn, torch.randn(3, 9, 1)
    state, outputs = None, []
    for step in x.split(1, 1):
        out, state = rnn(step, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), rnn(x)[0])
