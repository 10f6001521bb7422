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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mingru import models
from mingru.models import LanguageModel

FILES = {"config.json", "model.safetensors"}
ALL_OPTIONS = {
    "tied": False,
    "cell": "minlstm",
    "expansion": 1.5,
    "conv": 3,
    "mlp": 2,
    "norm": "layer",
    "dropout": 0.25,
}
ALL_OPTIONS |= {"checkpoint": True, "bias": True, "bidirectional": False, "candidate": "tanh", "recompute": False}
ALL_OPTIONS |= {"learn_initial_state": True, "forget_bias": 1.0, "normalize": False}
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


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch):
    # It takes seconds on a busy disk.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


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
    assert type(loaded) is type(lm)
    assert loaded.config == lm.config
    assert not any(module.training for module in loaded.modules())
    assert loaded.state_dict().keys() == lm.state_dict().keys()
    for name, parameter in loaded.named_parameters():
        assert parameter.requires_grad == lm.get_parameter(name).requires_grad
        assert parameter.dtype == lm.get_parameter(name).dtype
        assert torch.equal(parameter, lm.get_parameter(name))
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


def test_the_device(folder):
    assert load(folder, device="meta").embedding.weight.is_meta
    with torch.device("meta"):
        assert load(folder).embedding.weight.is_cpu
    with pytest.raises(RuntimeError, match="mtea"):
        load(folder, device="mtea")


def test_loading_leaves_the_global_random_state(folder):
    before = torch.get_rng_state()
    load(folder)
    assert torch.equal(torch.get_rng_state(), before)


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
    with pytest.raises(ValueError, match=r"config\.json of something else"):
        load(tmp_path)


def test_later_changes_of_the_callers_list_do_not_reach_the_config():
    bounds = [0.0, 0.75]
    lm = LanguageModel(7, 4, 2, min_decay=bounds)
    bounds[1] = 0.5
    assert lm.config["min_decay"] == [0.0, 0.75]


# Models that the options do not describe


def tie(lm):
    lm.head.weight = lm.embedding.weight


def set_attribute(path, name, value):
    return lambda lm: setattr(lm.get_submodule(path), name, value)


SHARED = "a model without shared tensors, got one whose head.weight is embedding.weight; use tied=True"
UNCHANGED = "LanguageModel(**config) without changes, got a model"
MISFIT = f"{UNCHANGED} whose tensors do not fit"
DROPOUT = "blocks.layers.0.dropout 0.5 instead of 0.0; pass the change to the constructor"
ACTIVATION = "blocks.layers.0.mlp.2 'ReLU' instead of 'GELU'"
WEIGHT_NORM = torch.nn.utils.parametrizations.weight_norm
CHANGED = {
    "a tied head": (tie, SHARED),
    "dropout": (set_attribute("blocks.layers.0", "dropout", 0.5), f"{UNCHANGED} with {DROPOUT}"),
    "another module": (set_attribute("blocks.layers.0.mlp", "2", torch.nn.ReLU()), f"{UNCHANGED} with {ACTIVATION}"),
    "a parametrization": (lambda lm: WEIGHT_NORM(lm.head), f"{MISFIT} (Error(s) in loading state_dict for LanguageM"),
    "mixed dtypes": (lambda lm: lm.norm.double(), f"{MISFIT} (head.weight of torch.float32, norm.weight of torch.flo"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_changed_model_is_not_saved(case, folder):
    change, message = CHANGED[case]
    before, lm = contents(folder), make(mlp=2)
    change(lm)
    with pytest.raises(ValueError, match="^" + re.escape(f"save_pretrained: the model must be {message}")):
        lm.save_pretrained(folder)
    assert contents(folder) == before


# Files that are no model


def edited(config=None, tensors=None):
    """Change the options in both files, as if the model had been saved so, or the tensors, without options then."""

    def function(folder):
        options, found = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        if config is not None:
            config(options)
        if tensors is not None:
            tensors(found)
        (folder / "config.json").write_text(json.dumps(options))
        metadata = {} if config is None else {"config.json": json.dumps(options)}
        save_file(found, folder / "model.safetensors", {"format": "pt", **metadata})

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


UNREADABLE = "with a file that cannot be read ("
FIT = "with options and tensors that do not fit ("
OF_MODEL = f"{FIT}Error(s) in loading state_dict for LanguageModel: "
DAMAGES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), f"{UNREADABLE}[Errno 2] No such file"),
    "only a pickle": (
        lambda folder: [write("pytorch_model.bin", PICKLE)(folder), (folder / "model.safetensors").unlink()],
        f"{UNREADABLE}No such file or directory: ",
    ),
    "an empty config": (write("config.json", b""), UNREADABLE),
    "a nested config": (write("config.json", b"[" * 200_000), UNREADABLE),
    "a list as config": (write("config.json", b"[1, 2]"), "with config.json of something else"),
    "the config of a block": (set_option(model="Block"), "with config.json of something else"),
    "a missing option": (edited(lambda config: config.pop("dims")), FIT),
    "an unknown option": (set_option(heads=2), f"{FIT}LanguageModel: no argument 'heads'; "),
    "an invalid option": (set_option(cell="gru"), f"{FIT}LanguageModel: cell must be one of "),
    "NaN as an option": (set_option(dropout=math.nan), "with dropout nan in config.json and nan in model.safetensors"),
    "a device": (set_option(device="cuda"), "with device 'cuda' in config.json, which is no option of a saved model"),
    "a dtype": (
        set_option(dtype="float32"),
        "with dtype 'float32' in config.json, which is no option of a saved model",
    ),
    "many layers": (set_option(num_layers=10**12), f"{FIT}1000000000000 layers and 13 tensors"),
    "many features": (set_option(dims=10**12), FIT),
    "more features than an integer holds": (set_option(dims=10**30), FIT),
    "a large vocabulary": (set_option(vocab_size=10**15), f"{OF_MODEL}size mismatch for embedding.weight"),
    "another save": (
        lambda folder: write("config.json", (folder / "config.json").read_bytes().replace(b" 4", b" 5"))(folder),
        "with dims 5 in config.json and 4 in model.safetensors, which are from two different saves",
    ),
    "truncated weights": (lambda folder: os.truncate(folder / "model.safetensors", 900), UNREADABLE),
    "a pickle as weights": (write("model.safetensors", PICKLE), UNREADABLE),
    "a missing tensor": (edited(tensors=lambda tensors: tensors.pop("norm.weight")), f"{OF_MODEL}Missing key(s) in st"),
    "an unexpected tensor": (set_tensor("extra", lambda _: torch.ones(1)), f"{OF_MODEL}Unexpected key(s) in"),
    "a tensor of another dtype": (set_tensor("norm.weight", torch.Tensor.double), "norm.weight of torch.float64"),
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


@pytest.mark.filterwarnings("error")
def test_weights_of_nan_load_with_a_warning(folder):
    load(folder)
    set_tensor("norm.weight", lambda weight: weight.index_fill(0, torch.tensor([1]), torch.nan))(folder)
    with pytest.warns(UserWarning, match=r"^from_pretrained: norm\.weight of .*model has NaN") as caught:
        assert load(folder).norm.weight.isnan().sum() == 1
    assert caught[0].filename == __file__
    assert load(folder, device="meta").norm.weight.is_meta


# Failures while writing

CANNOT = "save_pretrained: folder must be a folder that can be written, got "


def assert_cannot_save(lm, folder, message=""):
    expected = re.escape(CANNOT) + ".*" + re.escape(message) + ".*; name another folder"
    with pytest.raises(ValueError, match="^" + expected):
        lm.save_pretrained(folder)


def test_a_file_in_place_of_a_folder_and_a_folder_in_place_of_a_file(folder):
    before = contents(folder)
    assert_cannot_save(make(), folder / "config.json")
    assert_cannot_save(make(), folder / "config.json" / "model")
    assert contents(folder) == before
    for name in sorted(FILES):
        (folder / name).unlink()
        (folder / name).mkdir()
        assert_cannot_save(make("all options"), folder, " is a folder")
        assert {**before, **contents(folder)} == before
    assert set(os.listdir(folder)) == FILES


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize("function", ["tempfile.TemporaryDirectory", "os.fsync", "os.replace"])
def test_a_failure_before_the_first_replacement(folder, monkeypatch, function):
    """A full disk, or Ctrl+C."""
    before = contents(folder)
    for error, raised in ((OSError("No space"), ValueError), (KeyboardInterrupt("No space"), KeyboardInterrupt)):
        monkeypatch.setattr(function, failing(error))
        with pytest.raises(raised, match="No space"):
            make("all options").save_pretrained(folder)
        monkeypatch.undo()
        assert contents(folder) == before


@pytest.mark.parametrize("options", [{}, {"candidate": "tanh"}], ids=str)
def test_a_failure_between_the_replacements(folder, monkeypatch, options):
    """A model is loaded if it is the new model whole, and otherwise the files are an error."""
    replace, calls, lm = os.replace, [], make(**options)

    def replace_some(source, target):
        calls.append(target)
        return (failing(OSError("No space")) if len(calls) > 1 else replace)(source, target)

    monkeypatch.setattr(os, "replace", replace_some)
    assert_cannot_save(lm, folder, "No space")
    monkeypatch.undo()
    assert set(contents(folder)) == FILES
    if not options:
        assert_same_model(load(folder), lm)
    else:
        with pytest.raises(ValueError, match=r"candidate None in config\.json and 'tanh' in model\.safetensors, which"):
            load(folder)
    lm.save_pretrained(folder)
    assert_same_model(load(folder), lm)


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
    with pytest.raises(ValueError, match=r"^from_pretrained: folder_or_name .*, got owner/name with a file that can"):
        load("owner/name")
    error = huggingface_hub.errors.LocalEntryNotFoundError
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", failing(error("no connection")))
    with pytest.raises(error, match="no connection"):
        load("owner/name")
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
        with pytest.raises(ModuleNotFoundError, match=expected):
            call()
