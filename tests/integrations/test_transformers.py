"""Models of Hugging Face's transformers leave the initialization of our layers to them, and load them."""

import copy
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import nn

import mingru

# Of the libraries that transformers uses.
pytestmark = pytest.mark.filterwarnings("ignore")
transformers = pytest.importorskip("transformers", reason='pip install "transformers[torch]"')
LAYERS = {
    "rnn": lambda: nn.LSTM(8, 16),
    "lstm": partial(mingru.MinLSTM, 16, 16, norm="rms", forget_bias=1.0),
    "gru": partial(mingru.MinGRU, 16, 16, gate="mixed", memory=(2, 60)),
    "conv": partial(mingru.MinConv1dGRU, 16, 16, 1, norm="group", memory=60),
    "head": partial(nn.Linear, 16, 2),
}


class Pretrained(transformers.PreTrainedModel):
    config_class = transformers.PretrainedConfig
    made: ClassVar = LAYERS

    def __init__(self, config):
        super().__init__(config)
        for name, make in self.made.items():
            setattr(self, name, make())
        self.drawn = copy.deepcopy(self.state_dict())
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.LSTM):  # as programs do
            for parameter in module.parameters():
                parameter.data.zero_()


class Larger(Pretrained):
    """One with layers that are not in the file, and a layer that has one parameter more."""

    made: ClassVar = {
        **LAYERS,
        "gru": partial(LAYERS["gru"], learn_initial_state=True),
        **{f"new_{name}": make for name, make in LAYERS.items()},
    }


def test_models_of_transformers_leave_layers_alone(tmp_path):
    with mingru.drop_in.patch(cell="minlstm", norm="rms"):
        model = Pretrained(transformers.PretrainedConfig())
        model.save_pretrained(tmp_path)
        again, larger = Pretrained.from_pretrained(tmp_path), Larger.from_pretrained(tmp_path)
        drawn = Larger(transformers.PretrainedConfig()).drawn
    for found in (model, again, larger):
        for name, _ in model.named_parameters():
            assert "head" in name or torch.equal(found.get_parameter(name), model.drawn[name]), name
        assert not found.head.bias.any()
    # What the file does not have is drawn, as by the constructors: uniformly, around the same numbers.
    for name, each in larger.named_parameters():
        if name == "gru.initial_state":
            assert 0.3 < each.std() < 3
        elif "new_" in name and "head" not in name:
            assert (each - drawn[name]).abs().max() <= 2 * 8**-0.5, name
            assert ("norm" in name) == (each.std() < 0.05), name
    with torch.device("meta"):
        model.gru = Pretrained.made["gru"]()
    model.gru.load_state_dict(again.gru.state_dict(), assign=True)
    model.init_weights()
    assert torch.equal(model.gru.layers[0].linear.weight, again.gru.layers[0].linear.weight)
    with pytest.raises(RuntimeError, match=r"bias_hh_l0|ignore_mismatched_sizes"):
        Pretrained.from_pretrained(tmp_path)  # builds torch's layer


def test_a_model_of_transformers_with_recurrent_layers():
    sizes = {"num_filters": 2, "hidden_size": 8, "upsampling_ratios": [2, 2], "codebook_size": 4, "codebook_dim": 8}
    with mingru.drop_in.patch(cell="minlstm", norm="rms", residual=True) as report:
        model = transformers.EncodecModel(transformers.EncodecConfig(**sizes))
    assert report.built
    for rnn in (each for each in model.modules() if isinstance(each, mingru.drop_in.LSTMLike)):
        # The forget bias.
        assert all((layer.linear.bias[: rnn.hidden_size] > 0).all() for layer in rnn.layers)
