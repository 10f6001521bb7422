"""NeuralForecast and GluonTS: training, saving and loading. Equal forecasts: test_other_libraries.py."""

import numpy as np
import pytest

from mingru import drop_in

# Of these libraries.
pytestmark = pytest.mark.filterwarnings("ignore")

VALUES = np.sin(np.arange(60) * 0.5)
MIXED = {"residual": True, "cell": "mingru", "gate": "mixed"}
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def test_neuralforecast(tmp_path):
    kind = pytest.importorskip("neuralforecast", reason="pip install neuralforecast").NeuralForecast
    import pandas as pd

    from mingru.integrations.neuralforecast import MinDeepAR, MinGRU, MinLSTM

    given = {"h": 4, "input_size": 12, "max_steps": 2, **QUIET}
    forecaster = kind([MinDeepAR(**given), MinGRU(**given), MinLSTM(**given, recurrent=True)], 1)
    forecaster.fit(pd.DataFrame({"unique_id": "a", "ds": np.arange(60), "y": VALUES}))
    options = {"batch_first": True, "residual": True}
    tanh = {**options, "candidate": "tanh"}
    layers = [drop_in.LSTM(1, 128, 2, dropout=0.1, batch_first=True, **MIXED), drop_in.GRU(1, 200, 2, **tanh)]
    layers += [drop_in.LSTM(1, 128, 2, proj_size=1, **tanh), drop_in.LSTM(1, 6, 2, dropout=0.1, **options, norm="rms")]
    built = [*forecaster.models, MinDeepAR(**given, lstm_hidden_size=6)]
    assert [repr(each.hist_encoder) for each in built] == [repr(each) for each in layers]
    forecaster.predict()  # NeuralForecast cannot save its own DeepAR before
    forecaster.save(f"{tmp_path}/saved")
    loaded = kind.load(f"{tmp_path}/saved").models
    assert [repr(each) for each in loaded] == [repr(each) for each in forecaster.models]


@pytest.mark.parametrize(("size", "own"), [(8, None), (6, None), (8, {"candidate": "tanh", "cell": "mingru"})])
def test_gluonts(size, own, tmp_path):
    pytest.importorskip("gluonts.torch", reason='pip install "gluonts[torch]"')
    from gluonts.dataset.common import ListDataset
    from gluonts.model.predictor import Predictor

    from mingru.integrations.gluonts import DeepAREstimator

    trainer = {"max_epochs": 1, "default_root_dir": str(tmp_path), **QUIET}
    given = {"hidden_size": size, "num_batches_per_epoch": 2, "trainer_kwargs": trainer}
    estimator = type("Estimator", (DeepAREstimator,), {"options": own})(freq="M", prediction_length=4, **given)
    predictor = estimator.train(ListDataset([{"start": "2000-01", "target": VALUES}], freq="M"))
    rnn = predictor.prediction_net.model.rnn
    options = own or {"residual": True, "norm": "rms", **(MIXED if size == 8 else {})}
    assert repr(rnn) == repr(drop_in.LSTM(rnn.input_size, size, 2, batch_first=True, dropout=0.1, **options))
    predictor.serialize(tmp_path)
    loaded = Predictor.deserialize(tmp_path)
    assert repr(loaded.prediction_net.model.rnn) == repr(rnn)
