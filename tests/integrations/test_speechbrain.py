"""SpeechBrain's models with an rnn_class: relative lengths, YAML, training, saving and loading.

PyPI's torchaudio for Linux, which SpeechBrain imports, is built for CUDA: beside torch for the CPU, delete its file
`lib/_torchaudio.abi3.so`, as `make slow-integrations` does.
"""

import pytest
import torch
from cases import grid, refuses, tensors

pytest.importorskip("speechbrain", reason="pip install speechbrain, and see above", exc_type=(ImportError, OSError))
from hyperpyyaml import load_hyperpyyaml
from speechbrain.nnet import RNN
from speechbrain.nnet.containers import LengthsCapableSequential
from speechbrain.utils.checkpoints import Checkpointer
from torch.testing import assert_close

from mingru.integrations import speechbrain

# Of the libraries that SpeechBrain uses.
pytestmark = pytest.mark.filterwarnings("ignore")

B, S, IN, H = 3, 12, 4, 5
KINDS = {"GRU": speechbrain.MinGRU, "LSTM": speechbrain.MinLSTM}
YAML = """
model: !new:speechbrain.lobes.models.CRDNN.CRDNN
    input_shape: [null, null, 16]
    cnn_channels: [4, 4]
    rnn_class: !name:mingru.integrations.speechbrain.Min{kind}
        candidate: tanh
    rnn_layers: 2
    rnn_neurons: 8
    dnn_neurons: 8
    use_rnnp: {use_rnnp}
"""


@grid(bidirectional=[False, True], kind=KINDS)
def test_calls_as_with_speechbrain(kind, bidirectional):
    """The class of SpeechBrain, which packs the sequences, has the same results with these layers inside."""
    options = {"input_shape": (None, None, IN // 2, 2), "num_layers": 2, "bidirectional": bidirectional}
    rnn, old = KINDS[kind](H, **options), getattr(RNN, kind)(H, **options)
    old.rnn = rnn.rnn
    x, hx = torch.randn(B, S, IN // 2, 2), torch.randn(2 * (1 + bidirectional), B, H)
    hx = hx if kind == "GRU" else (hx, hx)
    for lengths in (None, torch.tensor([0.5, 1.0, 0.3]), torch.tensor([0.5, 0.7, 0.1])):
        for h in (None, hx):
            (out, states), (expected, old_states) = (each(x, h, lengths=lengths) for each in (rnn, old))
            assert_close((out, tensors(states)), (expected, tensors(old_states)))


@pytest.mark.parametrize("kind", KINDS)
def test_options(kind):
    rnn = KINDS[kind](
        H, input_size=IN, num_layers=2, bias=False, dropout=0.1, re_init=True, norm=None, gate="sigmoid"
    ).rnn
    assert (rnn.num_layers, rnn.bias, rnn.dropout, rnn.norm, rnn.residual) == (2, False, 0.1, None, True)
    refuses(ValueError, "Expected one of input_shape or input_size", KINDS[kind], H)


@grid(use_rnnp=[False, True], kind=KINDS)
def test_training_saving_and_loading(kind, use_rnnp, tmp_path):
    def make():
        return load_hyperpyyaml(YAML.format(kind=kind, use_rnnp=use_rnnp))["model"]

    torch.manual_seed(0)
    model, x, labels = make(), torch.randn(B, S, 16), torch.randn(B, S, 8)
    layers = [each for each in model.modules() if isinstance(each, KINDS[kind])]
    assert [layer.rnn.num_layers for layer in layers] == ([1, 1] if use_rnnp else [2])
    assert all(layer.rnn.candidate == "tanh" for layer in layers)
    # Two steps, which change also what the batch norms know.
    for _ in range(2):
        (model(x) - labels).square().mean().backward()
        torch.optim.SGD(model.parameters(), 0.01).step()
    assert all(weight.grad.any() for layer in layers for weight in layer.parameters())
    Checkpointer(tmp_path, {"model": model}).save_checkpoint()
    loaded = make()
    Checkpointer(tmp_path, {"model": loaded}).recover_if_possible()
    assert_close(loaded.eval()(x), model.eval()(x), rtol=0, atol=0)


def test_lengths_in_a_sequential():
    """The container passes lengths only to layers whose `forward` names them."""
    model = LengthsCapableSequential(input_shape=[None, None, IN])
    model.append(speechbrain.MinGRU, hidden_size=H)
    x, lengths = torch.randn(B, S, IN), torch.tensor([1.0, 0.5, 0.8])
    assert not model(x, lengths)[1, S // 2 :].any() and model(x)[1, S // 2 :].any()
