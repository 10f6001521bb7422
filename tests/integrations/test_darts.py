"""Darts' RNNModel and BlockRNNModel: training, saving, checkpoints and loading."""

import numpy as np
import pytest

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
    options = Normed.options if module is Normed else {"residual": True, "candidate": "tanh"}
    expected = getattr(drop_in, module.name)(rnn.input_size, 8, 2, batch_first=True, **options)
    assert repr(rnn) == repr(expected)
    expected = model.predict(10, future_covariates=COVARIATES).values()
    model.save(str(tmp_path / "model.pt"))
    for loaded in (
        type(model).load(str(tmp_path / "model.pt")),
        type(model).load_from_checkpoint("model", str(tmp_path), best=False),
    ):
        assert loaded.model.rnn.extra_repr() == rnn.extra_repr()
        np.testing.assert_array_equal(loaded.predict(10, future_covariates=COVARIATES).values(), expected)
