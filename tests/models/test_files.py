"""Models as folders and on the hub: round trips, damaged and foreign files, and failures while writing."""

import errno
import json
import math
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mingru import models
from mingru.models import LanguageModel

FILES = {"README.md", "config.json", "model.safetensors"}
MODELS = {
    "plain": {},
    "untied": {"tied": False},
    "all options": {
        "tied": False,
        "cell": "minlstm",
        "expansion": 1.5,
        "conv": 3,
        "mlp": 2,
        "norm": "layer",
        "dropout": 0.25,
        "checkpoint": True,
        "bias": True,
        "bidirectional": False,
        "candidate": "tanh",
        "learn_initial_state": True,
        "recompute": False,
        "forget_bias": 1.0,
        "normalize": False,
    },
    "bounds": {"gate": "rotation", "min_decay": [0.0, 0.75]},
    "gates": {"gate": ["sigmoid", "quaternion"], "memory": [2.0, 50.0]},
    "without bias": {"bias": False, "conv": 2},
    "bfloat16": {"dtype": torch.bfloat16, "conv": 2},
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
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_model(loaded, lm):
    assert type(loaded) is type(lm)
    assert loaded.config == lm.config
    assert not any(module.training for module in loaded.modules())
    assert loaded.state_dict().keys() == lm.state_dict().keys()
    for name, parameter in loaded.named_parameters():
        assert parameter.requires_grad
        assert parameter.dtype == lm.get_parameter(name).dtype
        assert torch.equal(parameter, lm.get_parameter(name))
    ids = torch.randint(7, (2, 5))
    assert torch.equal(loaded(ids)[0], lm.eval()(ids)[0])


# Round trips


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_the_same(name, tmp_path):
    lm = make(name)
    lm.save_pretrained(tmp_path)
    assert set(contents(tmp_path)) == FILES
    for path in (tmp_path, str(tmp_path)):
        assert_same_model(LanguageModel.from_pretrained(path), lm)
    # A loaded model can be saved and trained.
    loaded = LanguageModel.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert_same_model(LanguageModel.from_pretrained(tmp_path), lm)
    loaded.train()(torch.randint(7, (2, 5)))[0].square().sum().backward()
    torch.optim.AdamW(loaded.parameter_groups(0.1)).step()
    assert not torch.equal(loaded.embedding.weight, lm.embedding.weight)


def test_the_file_of_the_weights(tmp_path):
    """Other programs read the standard file by the names of the state dict. The shared weight is in it once."""
    for name, head in (("plain", set()), ("untied", {"head.weight"})):
        lm = make(name)
        lm.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        assert tensors.keys() == lm.state_dict().keys()
        assert {name for name in tensors if tensors[name].shape == (7, 4)} == {"embedding.weight", *head}
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            assert file.metadata()["format"] == "pt"


def test_config(tmp_path):
    make("all options").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("model") == "LanguageModel"
    assert config.pop("mingru") == models.files.__version__
    assert config == {"vocab_size": 7, "dims": 4, "num_layers": 2, **MODELS["all options"]}


def test_the_model_card(tmp_path):
    lm = make("plain")
    lm.save_pretrained(tmp_path / "new" / "folders", figures={"held-out loss in nats": 1.42})
    card = (tmp_path / "new" / "folders" / "README.md").read_text()
    assert "library_name: mingru" in card.split("---")[1]
    assert "| held-out loss in nats | 1.42 |" in card
    assert f"| parameters | {sum(each.numel() for each in lm.parameters())} |" in card
    assert "LanguageModel.from_pretrained(" in card


def test_a_readme_of_something_else_remains(tmp_path):
    (tmp_path / "README.md").write_text("My project")
    make().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "My project"
    (tmp_path / "README.md").unlink()
    for loss in (1.5, 1.4):
        make().save_pretrained(tmp_path, figures={"loss": loss})
        assert f"| loss | {loss} |" in (tmp_path / "README.md").read_text()


def test_other_files_remain(folder):
    (folder / "notes.txt").write_text("notes")
    make().save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "notes"


def test_permissions_are_those_of_a_new_file(folder):
    (folder / "new").write_text("")
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1


def test_the_device(folder):
    assert LanguageModel.from_pretrained(folder, device="meta").embedding.weight.is_meta
    assert LanguageModel.from_pretrained(folder, device=torch.device("cpu")).embedding.weight.is_cpu
    with torch.device("meta"):
        assert LanguageModel.from_pretrained(folder).embedding.weight.is_cpu
    with pytest.raises(RuntimeError, match="mtea"):
        LanguageModel.from_pretrained(folder, device="mtea")


def test_loading_leaves_the_global_random_state(folder):
    before = torch.get_rng_state()
    LanguageModel.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaded_model_does_not_depend_on_its_file(folder):
    lm = LanguageModel.from_pretrained(folder)
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
        LanguageModel.from_pretrained(tmp_path)


# Models that the options do not describe


def test_later_changes_of_the_callers_list_do_not_reach_the_config(tmp_path):
    bounds = [0.0, 0.75]
    lm = LanguageModel(7, 4, 2, min_decay=bounds)
    bounds[1] = 0.5
    assert lm.config["min_decay"] == [0.0, 0.75]
    lm.save_pretrained(tmp_path)
    assert_same_model(LanguageModel.from_pretrained(tmp_path), lm)


def tie(lm):
    lm.head.weight = lm.embedding.weight


def set_attribute(path, name, value):
    return lambda lm: setattr(lm.get_submodule(path), name, value)


UNCHANGED = "LanguageModel(**config) without changes, got a model"
CHANGED = {
    "a tied head": (
        tie,
        "a model without shared tensors, got one whose head.weight is embedding.weight; use tied=True",
    ),
    "dropout": (
        set_attribute("blocks.layers.0", "dropout", 0.5),
        f"{UNCHANGED} with blocks.layers.0.dropout 0.5 instead of 0.0; pass the change to the constructor",
    ),
    "another activation": (
        set_attribute("blocks.layers.0.mlp", "2", torch.nn.ReLU()),
        f"{UNCHANGED} with blocks.layers.0.mlp.2 'ReLU' instead of 'GELU'",
    ),
    "another module": (
        lambda lm: lm.blocks.layers[0].mlp.append(torch.nn.Dropout()),
        f"{UNCHANGED} with blocks.layers.0.mlp.4 'Dropout' instead of None",
    ),
    "a parametrization": (
        lambda lm: torch.nn.utils.parametrizations.weight_norm(lm.head),
        f"{UNCHANGED} whose tensors do not fit (Error(s) in loading state_dict for LanguageModel: Missing key(s)",
    ),
    "mixed dtypes": (
        lambda lm: lm.norm.double(),
        f"{UNCHANGED} whose tensors do not fit (head.weight of torch.float32, norm.weight of torch.float64)",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_changed_model_is_not_saved(case, folder):
    change, message = CHANGED[case]
    before, lm = contents(folder), make(mlp=2)
    change(lm)
    with pytest.raises(ValueError, match="^" + re.escape(f"save_pretrained: the model must be {message}")):
        lm.save_pretrained(folder)
    assert contents(folder) == before


def test_a_changed_option_is_saved_if_the_config_has_it(tmp_path):
    lm = make("plain")
    for block in lm.blocks.layers:
        block.dropout = 0.5
    lm.config["dropout"] = 0.5
    lm.save_pretrained(tmp_path)
    assert LanguageModel.from_pretrained(tmp_path).blocks.layers[1].dropout == 0.5


def test_a_model_of_an_older_version(tmp_path):
    """It has no marks of its gates, "positive" was the default candidate, and states began with 0."""
    lm = make("bounds", candidate="positive")
    lm.save_pretrained(tmp_path)
    marks = [f"blocks.layers.{index}.rnn.{key}" for index in (0, 1) for key in ("layers.0.gate", "zero_state_mark")]
    rewrite_tensors(lambda tensors: [tensors.pop(mark) for mark in marks])(tmp_path)
    rewrite_config(lambda config: config.pop("candidate"))(tmp_path)
    found = LanguageModel.from_pretrained(tmp_path)
    assert [block.rnn.zero_state for block in found.blocks.layers] == [0.0, 0.0]
    ids = torch.randint(7, (2, 5))
    zeros = models.map_state(torch.zeros_like, lm.initial_state(2))
    torch.testing.assert_close(found(ids)[0], lm.eval()(ids, zeros)[0])
    found.save_pretrained(tmp_path)
    assert_same_model(LanguageModel.from_pretrained(tmp_path), found)
    assert make("bounds").config["candidate"] == "tanh"


# Files that are no model


def rewrite_config(change):
    """Change config.json and the options in the weights, as if the model had been saved so."""

    def function(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors, folder / "model.safetensors", {"format": "pt", "config.json": json.dumps(config)})

    return function


def set_option(**options):
    return rewrite_config(lambda config: config.update(options))


def rewrite_tensors(change):
    def function(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return function


def set_tensor(name, change):
    return rewrite_tensors(lambda tensors: tensors.update({name: change(tensors[name])}))


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


class Trap:
    """An object whose unpickling is an error, because loading must not run code of a file."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file ran')",))


def pickled(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap()))


def only_a_pickle(folder):
    pickled(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


UNREADABLE = "with a file that cannot be read ("
FIT = "with options and tensors that do not fit ("
OF_MODEL = f"{FIT}Error(s) in loading state_dict for LanguageModel: "
DAMAGES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), f"{UNREADABLE}[Errno 2] No such file"),
    "only a pickle": (only_a_pickle, f"{UNREADABLE}No such file or directory: "),
    "an empty config": (write("config.json", b""), UNREADABLE),
    "a nested config": (write("config.json", b"[" * 200_000), UNREADABLE),
    "a list as config": (write("config.json", b"[1, 2]"), "with config.json of something else"),
    "the config of a block": (set_option(model="Block"), "with config.json of something else"),
    "a missing option": (rewrite_config(lambda config: config.pop("dims")), FIT),
    "an unknown option": (set_option(heads=2), f"{FIT}LanguageModel: no argument 'heads'; "),
    "an invalid option": (set_option(cell="gru"), f"{FIT}Block: cell must be one of "),
    "NaN as an option": (set_option(dropout=math.nan), "with dropout nan in config.json and nan in model.safetensors"),
    "many layers": (set_option(num_layers=10**12), f"{FIT}1000000000000 layers and 13 tensors"),
    "many features": (set_option(dims=10**12), FIT),
    "more features than an integer holds": (set_option(dims=10**30), FIT),
    "a large vocabulary": (set_option(vocab_size=10**15), f"{OF_MODEL}size mismatch for embedding.weight"),
    "other options in the config": (
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace('"tied": false', '"tied": false, "candidate": "tanh"')
        ),
        "with candidate 'tanh' in config.json and None in model.safetensors, which are from two different saves",
    ),
    "truncated weights": (lambda folder: os.truncate(folder / "model.safetensors", 900), UNREADABLE),
    "a pickle as weights": (pickled, UNREADABLE),
    "a missing tensor": (
        rewrite_tensors(lambda tensors: tensors.pop("norm.weight")),
        f'{OF_MODEL}Missing key(s) in state_dict: "norm.weight"',
    ),
    "an unexpected tensor": (
        rewrite_tensors(lambda tensors: tensors.update(extra=torch.ones(1))),
        f'{OF_MODEL}Unexpected key(s) in state_dict: "extra"',
    ),
    "a tensor of another dtype": (set_tensor("norm.weight", torch.Tensor.double), "norm.weight of torch.float64"),
    "a tensor of integers": (set_tensor("norm.weight", torch.Tensor.long), OF_MODEL),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(folder, damage):
    function, message = DAMAGES[damage]
    assert LanguageModel.from_pretrained(folder) is not None
    function(folder)
    expected = f"from_pretrained: folder_or_name must be a complete model that save_pretrained wrote, got {folder} "
    with pytest.raises(ValueError, match="^" + re.escape(expected) + ".*" + re.escape(message)) as error:
        LanguageModel.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_weights_without_options_load(folder):
    """Another program may have written the tensors, which are checked by name and shape."""
    expected = LanguageModel.from_pretrained(folder)
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")
    assert_same_model(LanguageModel.from_pretrained(folder), expected)


def test_files_of_another_version_load(folder):
    expected = LanguageModel.from_pretrained(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace(f'"{models.files.__version__}"', '"99.0"'))
    assert_same_model(LanguageModel.from_pretrained(folder), expected)


NEITHER = "folder_or_name must be a folder that save_pretrained wrote, or a name on the hub such as 'owner/name', got"


@pytest.mark.parametrize("name", ["missing", "a/b/c", "../model", "/nowhere/model", "owner/na me", "owner/name\n"])
def test_names_that_are_neither_a_folder_nor_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^" + re.escape(f"from_pretrained: {NEITHER} {name!r}")):
        LanguageModel.from_pretrained(name)


def test_a_file_or_a_path_is_no_name(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    for path in (folder / "config.json", Path("owner/name")):
        with pytest.raises(ValueError, match="^" + re.escape(f"from_pretrained: {NEITHER} ")):
            LanguageModel.from_pretrained(path)


BAD_ARGUMENTS = [
    *(
        (LanguageModel.from_pretrained, path, "from_pretrained: folder_or_name must be a str or a path")
        for path in (3, b"a")
    ),
    *(
        (lambda path: make().save_pretrained(path), path, "save_pretrained: folder must be a str or a path")
        for path in (3, None)
    ),
    *(
        (
            lambda figures: make().save_pretrained("no folder", figures=figures),
            figures,
            "figures must be a dict or None",
        )
        for figures in ([("loss", 1.4)], "loss")
    ),
]


@pytest.mark.parametrize(("call", "argument", "message"), BAD_ARGUMENTS)
def test_arguments_of_a_wrong_type(call, argument, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=f"{message}, got {type(argument).__name__}"):
        call(argument)
    assert contents(tmp_path) == {}


def test_a_revision_of_a_folder(folder):
    with pytest.raises(ValueError, match=r"^from_pretrained: revision must be None for a folder, got 'main'"):
        LanguageModel.from_pretrained(folder, revision="main")


# Failures while writing

CANNOT = "save_pretrained: folder must be a folder that can be written, got "


def assert_cannot_save(lm, folder, message=""):
    with pytest.raises(
        ValueError, match="^" + re.escape(CANNOT) + ".*" + re.escape(message) + ".*; name another folder"
    ):
        lm.save_pretrained(folder)


def test_a_file_in_place_of_a_folder(folder):
    before = contents(folder)
    assert_cannot_save(make(), folder / "config.json")
    assert_cannot_save(make(), folder / "config.json" / "model")
    assert contents(folder) == before


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_folder_in_place_of_a_file(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert_cannot_save(make(), folder, f"{name} is a folder")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert set(os.listdir(folder)) == FILES


def fail(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("function", ["tempfile.TemporaryDirectory", "os.fsync", "os.replace"])
def test_a_full_disk_before_the_first_replacement(folder, monkeypatch, function):
    before = contents(folder)
    monkeypatch.setattr(function, fail)
    assert_cannot_save(make("all options"), folder, "No space left on device")
    monkeypatch.undo()
    assert contents(folder) == before


@pytest.mark.parametrize("replaced", [1, 2])
@pytest.mark.parametrize("options", [{}, {"candidate": "tanh"}, {"norm": "layer"}], ids=str)
def test_a_failure_between_two_replacements(folder, monkeypatch, replaced, options):
    """A model is loaded if it is the new model whole, and otherwise the files are an error."""
    replace, calls = os.replace, []

    def replace_some(source, target):
        calls.append(target)
        if len(calls) > replaced:
            fail()
        replace(source, target)

    lm = make(**options)
    monkeypatch.setattr(os, "replace", replace_some)
    assert_cannot_save(lm, folder, "No space left on device")
    monkeypatch.undo()
    assert set(contents(folder)) == FILES
    if replaced == 2 or not options:
        assert_same_model(LanguageModel.from_pretrained(folder), lm)
    else:
        (name, value), *_ = options.items()
        message = f"{name} None in config.json and {value!r} in model.safetensors, which are from two different saves"
        with pytest.raises(ValueError, match=re.escape(message)):
            LanguageModel.from_pretrained(folder)
    lm.save_pretrained(folder)
    assert_same_model(LanguageModel.from_pretrained(folder), lm)


def test_an_interrupted_save_leaves_no_files(folder, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    before = contents(folder)
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make().save_pretrained(folder)
    assert contents(folder) == before


# The hub


@pytest.fixture
def hub(folder, monkeypatch):
    """Replace the functions of huggingface_hub by a hub with the model "owner/name"; return what was uploaded."""
    uploaded = {}

    class Api:
        def __init__(self, token=None):
            uploaded["token"] = token

        def create_repo(self, name, *, exist_ok):
            uploaded.update(name=name, exist_ok=exist_ok)

        def upload_folder(self, *, repo_id, folder_path, **options):
            uploaded.update(repo_id=repo_id, options=options)
            shutil.copytree(folder_path, folder.parent / "uploaded")
            return huggingface_hub.CommitInfo(
                commit_url=f"https://huggingface.co/{repo_id}/commit/1",
                commit_message="",
                commit_description="",
                oid="1",
            )

    def download(name, file, *, revision):
        uploaded.setdefault("downloads", []).append((name, file, revision))
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return uploaded


@pytest.mark.parametrize("revision", [None, "v1.0"])
def test_a_name_on_the_hub(hub, folder, revision):
    lm = LanguageModel.from_pretrained("owner/name", revision=revision)
    assert_same_model(lm, LanguageModel.from_pretrained(folder))
    files = ("config.json", "model.safetensors")
    assert hub["downloads"] == [("owner/name", file, revision) for file in files]


def test_a_damaged_model_on_the_hub(hub, folder):
    os.truncate(folder / "model.safetensors", 900)
    with pytest.raises(
        ValueError, match=r"^from_pretrained: folder_or_name .*, got owner/name with a file that cannot"
    ):
        LanguageModel.from_pretrained("owner/name")


def test_a_folder_comes_before_a_name(hub, folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    name = f"{folder.parent.name}/{folder.name}"
    assert models.files.HUB_NAME.fullmatch(name)
    LanguageModel.from_pretrained(name)
    assert "downloads" not in hub


def test_errors_of_the_hub_pass_through(monkeypatch):
    def missing(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
    with pytest.raises(huggingface_hub.errors.LocalEntryNotFoundError, match="no connection"):
        LanguageModel.from_pretrained("owner/name")


def test_push_to_hub(hub, tmp_path):
    lm = make("plain")
    address = lm.push_to_hub("owner/new", figures={"loss": 1.5}, token="secret", commit_message="First", revision="dev")
    assert address == "https://huggingface.co/owner/new/commit/1"
    assert type(address) is str
    assert hub == {
        "token": "secret",
        "name": "owner/new",
        "exist_ok": True,
        "repo_id": "owner/new",
        "options": {"commit_message": "First", "revision": "dev"},
    }
    assert set(contents(tmp_path / "uploaded")) == FILES
    assert "| loss | 1.5 |" in (tmp_path / "uploaded" / "README.md").read_text()
    assert_same_model(LanguageModel.from_pretrained(tmp_path / "uploaded"), lm)


# Missing packages

INSTALL = 'run pip install {}, or ".[hub]" in a clone of the repository'


@pytest.fixture
def without(monkeypatch):
    def remove(package):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)

    return remove


def test_without_safetensors(folder, without):
    without("safetensors")
    install = re.escape(INSTALL.format("safetensors"))
    with pytest.raises(ModuleNotFoundError, match=f"^save_pretrained needs the package safetensors: {install}"):
        make().save_pretrained(folder)
    with pytest.raises(ModuleNotFoundError, match=f"^from_pretrained needs the package safetensors: {install}"):
        LanguageModel.from_pretrained(folder)
    with pytest.raises(ModuleNotFoundError, match=f"^save_pretrained needs the package safetensors: {install}"):
        make().push_to_hub("owner/name")


def test_without_huggingface_hub(folder, without):
    without("huggingface_hub")
    make().save_pretrained(folder)
    assert LanguageModel.from_pretrained(folder) is not None
    install = re.escape(INSTALL.format("huggingface_hub"))
    with pytest.raises(ModuleNotFoundError, match=f"'owner/name' is not a folder; .* needs the package .*: {install}"):
        LanguageModel.from_pretrained("owner/name")
    with pytest.raises(ModuleNotFoundError, match=f"^push_to_hub needs the package huggingface_hub: {install}"):
        make().push_to_hub("owner/name")
