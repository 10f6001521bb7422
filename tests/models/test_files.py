"""Models as folders and on the hub: round trips, damaged and foreign files, and failures while writing."""

import json
import math
import os
import pickle
import re
import sys

import huggingface_hub
import pytest
import torch
from cases import refuses
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mingru import models
from mingru.models import LanguageModel

FILES = {"config.json", "model.safetensors"}
ALL_OPTIONS = {"tied": False, "cell": "minlstm", "expansion": 1.5, "conv": 3, "mlp": 2, "norm": "layer"}
ALL_OPTIONS |= {"dropout": 0.25, "checkpoint": True, "bias": True, "bidirectional": False, "candidate": "tanh"}
ALL_OPTIONS |= {"recompute": False, "learn_initial_state": True, "forget_bias": 1.0, "normalize": False}
MODELS = {
    "plain": {},
    "untied": {"tied": False},
    "all options": ALL_OPTIONS,
    "bounds": {"gate": "rotation", "min_decay": [0.0, 0.75]},
    "gates": {"gate": ["sigmoid", "quaternion"], "memory": [2.0, 50.0]},
    "bfloat16": {"dtype": torch.bfloat16, "conv": 2, "bias": False},
    "float64": {"dtype": torch.float64, "tied": False},
}


def make(name="untied", **options):
    return LanguageModel(7, 4, 2, **{**MODELS[name], **options})


@pytest.fixture
def folder(tmp_path):
    """A folder with a model."""
    make().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def load(folder, **options):
    return LanguageModel.from_pretrained(folder, **options)


def assert_same_model(loaded, lm):
    assert type(loaded) is type(lm) and loaded.config == lm.config
    assert not any(module.training for module in loaded.modules())
    assert loaded.state_dict().keys() == lm.state_dict().keys()
    for name, parameter in loaded.named_parameters():
        assert parameter.requires_grad == lm.get_parameter(name).requires_grad
        assert parameter.dtype == lm.get_parameter(name).dtype and torch.equal(parameter, lm.get_parameter(name))
    ids = torch.randint(7, (2, 5))
    assert torch.equal(loaded(ids)[0], lm.eval()(ids)[0])


# Round trips


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_the_same(name, tmp_path):
    lm = make(name)
    for each, parameter in lm.named_parameters():
        parameter.requires_grad_(not each.endswith("initial_state"))  # as a converted model has it
    lm.save_pretrained(tmp_path)
    assert set(contents(tmp_path)) == FILES
    # Other programs read the standard file by the names of the state dict. The shared weight is in it once.
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == lm.state_dict().keys()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config.pop("model"), config.pop("mingru")) == ("LanguageModel", models.files.__version__)
    assert config.pop("frozen") == [each for each in tensors if each.endswith("initial_state")]
    assert config == lm.config and config.keys() >= {"vocab_size", "dims", "num_layers", *MODELS[name]} - {"dtype"}
    # A loaded model can be saved and trained.
    loaded = load(str(tmp_path))
    loaded.save_pretrained(tmp_path)
    assert_same_model(load(tmp_path), lm)
    loaded.train()(torch.randint(7, (2, 5)))[0].square().sum().backward()
    torch.optim.AdamW(loaded.parameter_groups(0.1)).step()
    assert not torch.equal(loaded.embedding.weight, lm.embedding.weight)


def test_other_files_remain(tmp_path):
    lm, folder = make("plain"), tmp_path / "new" / "folders"
    lm.save_pretrained(folder)
    (folder / "README.md").write_text("My model")
    lm.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "My model"
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "permissions are those of a new file"


def test_the_device_and_the_global_random_state(folder):
    before = torch.get_rng_state()
    assert load(folder, device="meta").embedding.weight.is_meta
    with torch.device("meta"):
        assert load(folder).embedding.weight.is_cpu and torch.equal(torch.get_rng_state(), before)
    refuses(RuntimeError, "mtea", load, folder, device="mtea")


def test_a_loaded_model_does_not_depend_on_its_file(folder):
    lm = load(folder)
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    path = folder / "model.safetensors"
    with path.open("rb+") as file:
        file.write(bytes(path.stat().st_size))
        file.truncate(10)
    for name, tensor in lm.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_subclass(tmp_path):
    class Model(LanguageModel):
        pass

    lm = Model(7, 4, 1)
    lm.save_pretrained(tmp_path)
    assert_same_model(Model.from_pretrained(tmp_path), lm)
    refuses(ValueError, r"config\.json is of something else", load, tmp_path)


# Files that are no model


def edited(config=None, tensors=None):
    """Change the options, or the tensors."""

    def function(folder):
        options, found = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        for change, values in ((config, options), (tensors, found)):
            if change is not None:
                change(values)
        (folder / "config.json").write_text(json.dumps(options))
        save_file(found, folder / "model.safetensors")

    return function


def set_option(**options):
    return edited(config=lambda config: config.update(options))


def set_tensor(name, change):
    return edited(tensors=lambda tensors: tensors.update({name: change(tensors.get(name))}))


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


class Trap:
    """An object whose unpickling is an error, because loading must not run code of a file."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file ran')",))


PICKLE = pickle.dumps(Trap())


OF_MODEL = "(Error(s) in loading state_dict for LanguageModel: "
DAMAGES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "([Errno 2] No such file"),
    "only a pickle": (
        lambda folder: [write("pytorch_model.bin", PICKLE)(folder), (folder / "model.safetensors").unlink()],
        "(No such file or directory: ",
    ),
    "an empty config": (write("config.json", b""), "(Expecting value"),
    "a nested config": (write("config.json", b"[" * 200_000), "while decoding a JSON array"),
    "a list as config": (write("config.json", b"[1, 2]"), "(config.json is of something else"),
    "the config of a block": (set_option(model="Block"), "(config.json is of something else"),
    "a missing option": (edited(lambda config: config.pop("dims")), "(LanguageModel: missing a required argument"),
    "an unknown option": (set_option(heads=2), "(LanguageModel: no argument 'heads'; "),
    "an invalid option": (set_option(cell="rnn"), "(LanguageModel: cell must be one of "),
    "NaN as an option": (set_option(dropout=math.nan), "(Block: dropout must be a number from 0 to 1"),
    "the gate of another save": (set_option(gate="signed"), f"{OF_MODEL}blocks.layers.0.rnn.layers.0: weights trained"),
    "a number as frozen": (set_option(frozen=3), "(frozen must be a list of names, got 3"),
    "a text as frozen": (set_option(frozen="norm.weight"), "(frozen must be a list of names, got 'norm.weight'"),
    "numbers as frozen": (set_option(frozen=[3]), "(frozen must be a list of names, got [3]"),
    "many layers": (set_option(num_layers=10**9), "(num_layers is 1000000000, and the file has "),
    "several dtypes": (set_tensor("norm.weight", torch.Tensor.half), "(the tensors must have one dtype, got torch.f"),
    "many features": (set_option(dims=10**12), "("),
    "more features than an integer holds": (set_option(dims=10**30), "("),
    "a large vocabulary": (set_option(vocab_size=10**15, device="cuda"), f"{OF_MODEL}size mismatch for embedding"),
    "truncated weights": (lambda folder: os.truncate(folder / "model.safetensors", 900), "(Error while deserializing"),
    "a pickle as weights": (write("model.safetensors", PICKLE), "(Error while deserializing"),
    "a missing tensor": (edited(tensors=lambda tensors: tensors.pop("norm.weight")), f"{OF_MODEL}Missing key(s) in st"),
    "an unexpected tensor": (set_tensor("extra", lambda _: torch.ones(1)), f"{OF_MODEL}Unexpected key(s) in"),
    "a tensor of integers": (set_tensor("norm.weight", torch.Tensor.long), OF_MODEL),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(folder, damage):
    function, message = DAMAGES[damage]
    assert load(folder) is not None
    function(folder)
    expected = f"from_pretrained: folder_or_name must be a complete model that save_pretrained wrote, got {folder} "
    with pytest.raises(ValueError, match="^" + re.escape(expected) + ".*" + re.escape(message)) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_files_of_other_programs_and_versions_load(folder):
    """Another program may have written the tensors, which are checked by name and shape."""
    expected = load(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace(f'"{models.files.__version__}"', '"99.0"'))
    assert_same_model(load(folder), expected)
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")
    assert_same_model(load(folder), expected)


# Failures while writing


def test_a_folder_in_place_of_a_file(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refuses(OSError, r"config\.json", make().save_pretrained, folder)
    assert set(os.listdir(folder)) == FILES


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize("function", ["safetensors.torch.save", "json.dumps", "os.replace"])
def test_a_failure_before_the_first_replacement(folder, monkeypatch, function):
    """A full disk, or Ctrl+C."""
    before = contents(folder)
    monkeypatch.setattr(function, failing(KeyboardInterrupt("No space")))
    refuses(KeyboardInterrupt, "No space", make("all options").save_pretrained, folder)
    assert contents(folder) == before


# The hub


@pytest.fixture
def hub(folder, monkeypatch):
    """Replace the hub by one with the model "owner/name"; return the list of its downloads."""
    downloads = []

    def download(name, file, *, revision):
        downloads.append((name, file, revision))
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return downloads


def test_a_name_on_the_hub(hub, folder, monkeypatch):
    for revision in (None, "v1.0"):
        assert_same_model(load("owner/name", revision=revision), load(folder))
    files = ("config.json", "model.safetensors")
    assert hub == [("owner/name", file, revision) for revision in (None, "v1.0") for file in files]
    os.truncate(folder / "model.safetensors", 900)
    refuses(ValueError, r"^from_pretrained: folder_or_name .*, got owner/name \(Error while", load, "owner/name")
    error = huggingface_hub.errors.LocalEntryNotFoundError
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", failing(error("no connection")))
    refuses(error, "no connection", load, "owner/name")
    # A folder comes before a name.
    monkeypatch.chdir(folder.parent.parent)
    make().save_pretrained(folder)
    name = f"{folder.parent.name}/{folder.name}"
    assert models.files.HUB_NAME.fullmatch(name)
    load(name)


# Missing packages

INSTALL = 'run pip install {}, or ".[hub]" in a clone of the repository'


@pytest.mark.parametrize("package", ["safetensors", "huggingface_hub"])
def test_without_a_package(package, folder, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    calls = {"from_pretrained": lambda: load("owner/name")}
    if package == "safetensors":
        calls = {"save_pretrained": lambda: make().save_pretrained(folder), "from_pretrained": lambda: load(folder)}
    else:
        make().save_pretrained(folder)
        assert load(folder) is not None
    for name, call in calls.items():
        expected = f"^{name}.* needs the package {package}: {re.escape(INSTALL.format(package))}"
        refuses(ModuleNotFoundError, expected, call)
