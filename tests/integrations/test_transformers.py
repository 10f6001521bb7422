"""Models of Hugging Face's transformers initialize and load layers of `drop_in`."""

import pytest
import torch
from torch import nn

import mingru


# Of the libraries that transformers uses.
@pytest.mark.filterwarnings("ignore")
def test_models_of_transformers_leave_layers_of_drop_in_alone(tmp_path):
    transformers = pytest.importorskip("transformers", reason='pip install "transformers[torch]"')

    class Pretrained(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.rnn, self.head = nn.LSTM(8, 16), nn.Linear(16, 2)
            torch.manual_seed(0)
            self.rnn.reset_parameters()
            self.post_init()

        def _init_weights(self, module):
            if isinstance(module, nn.Linear):
                module.weight.data.normal_(0.0, 0.02)
                module.bias.data.zero_()

    with mingru.drop_in.patch():
        model, fresh = Pretrained(transformers.PretrainedConfig()), mingru.drop_in.LSTM(8, 16)
        torch.manual_seed(0)
        fresh.reset_parameters()
        model.save_pretrained(tmp_path)
        again = Pretrained.from_pretrained(tmp_path)
    for rnn in (model.rnn, again.rnn):
        torch.testing.assert_close(dict(rnn.state_dict()), dict(fresh.state_dict()), rtol=0, atol=0)
    assert not model.head.bias.any()
    with pytest.raises(RuntimeError, match=r"bias_hh_l0|ignore_mismatched_sizes"):
        Pretrained.from_pretrained(tmp_path)  # builds torch's layer
