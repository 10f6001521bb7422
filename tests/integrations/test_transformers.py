"""Trainers that need no module of this library: Lightning, and the Trainer of Hugging Face's transformers."""

import pytest
import torch
from torch import nn

import mingru

IN, CLASSES = 3, 2

# Of the libraries that the trainers use.
pytestmark = pytest.mark.filterwarnings("ignore")


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = mingru.MinGRU(IN, 8, 2, norm="rms", residual=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, inputs, lengths, labels=None):
        _, h = self.rnn(inputs, lengths=lengths)
        logits = self.head(h[-1, :, 0])
        return {"logits": logits, **({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)})}


def examples():
    """Sequences of 1 to 9 steps; the class says whether the mean of the first feature is positive."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(48):
        x = torch.randn(9, IN, generator=generator)
        length = int(torch.randint(1, 10, (), generator=generator))
        made.append({"inputs": x, "lengths": torch.tensor(length), "labels": (x[:length, 0].mean() > 0).long()})
    return made


def loss_of(model):
    batch = torch.utils.data.default_collate(examples())
    with torch.no_grad():
        return model.eval()(**batch)["loss"]


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason="pip install lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Classifier()

        def training_step(self, batch, _):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 0.02)

    torch.manual_seed(0)
    module = Module()
    before = loss_of(module.model)
    options = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=6, default_root_dir=tmp_path, **options)
    trainer.fit(module, torch.utils.data.DataLoader(examples(), 8, shuffle=True))
    after = loss_of(module.model.cpu())
    assert after < 0.8 * before
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = Module.load_from_checkpoint(tmp_path / "model.ckpt")
    assert torch.equal(loss_of(loaded.model.cpu()), after)


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason='pip install "transformers[torch]"')
    torch.manual_seed(0)
    model = Classifier()
    before = loss_of(model)
    options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "epoch"}
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=6, per_device_train_batch_size=8, learning_rate=0.02, **options
    )
    transformers.Trainer(model, arguments, train_dataset=examples()).train()
    after = loss_of(model)
    assert after < 0.8 * before
    # `resume_from_checkpoint` continues after the last step, so that nothing is trained.
    resumed = Classifier()
    transformers.Trainer(resumed, arguments, train_dataset=examples()).train(resume_from_checkpoint=True)
    assert torch.equal(loss_of(resumed), after)


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
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        Pretrained.from_pretrained(tmp_path)  # builds torch's layer
