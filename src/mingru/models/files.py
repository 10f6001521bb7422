"""Models as folders: `config.json`, `model.safetensors` and a model card."""

import importlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..check import check_type, dims, expectation, require
from ..modules.marked import marks_of

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
LIBRARY = "library_name: mingru"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def save(model: Any, folder: str | os.PathLike[str], figures: dict[str, Any]) -> None:
    """Write the three files; see `LanguageModel.save_pretrained`."""
    safetensors = _required("safetensors", "save_pretrained")
    save_file = importlib.import_module("safetensors.torch").save_file
    target = _path("save_pretrained", "folder", folder)
    check_type("save_pretrained", "figures", figures, dict, "a dict or None")
    config = json.dumps({"model": type(model).__name__, "mingru": __version__, **model.config}, indent=2)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    saved = _without_data(type(model), model.config)
    difference = _difference(saved.state_dict(), tensors) or _changed(saved, model)
    expected, remedy = f"{type(model).__name__}(**config) without changes", "pass the change to the constructor"
    require("save_pretrained", "the model", not difference, expected, f"a model {difference}", remedy)
    shared = _shared(tensors)
    expected, remedy = "a model without shared tensors", "use tied=True for the head, and .clone() for other tensors"
    require("save_pretrained", "the model", not shared, expected, f"one {shared}", remedy)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target, ignore_cleanup_errors=True) as temporary:
            new = Path(temporary)
            # The weights contain the options too, so that `load` finds out if config.json is from another save.
            save_file(tensors, new / WEIGHTS, {"format": "pt", CONFIG: config})
            (new / CONFIG).write_text(config + "\n", encoding="utf-8")
            # safetensors gives the file to its owner only.
            shutil.copymode(new / CONFIG, new / WEIGHTS)
            names = [WEIGHTS, CONFIG]
            card = target / CARD
            # A README.md of something else, such as the project in whose folder a model is saved, remains.
            if not card.is_file() or LIBRARY in card.read_text(encoding="utf-8", errors="replace"):
                (new / CARD).write_text(_card(model, figures), encoding="utf-8")
                names.append(CARD)
            for name in names:
                if (target / name).is_dir():
                    raise IsADirectoryError(f"{name} is a folder")
                with (new / name).open("rb+") as file:
                    # Some file systems report a full disk only here.
                    os.fsync(file.fileno())
            for name in names:
                os.replace(new / name, target / name)
    except (OSError, safetensors.SafetensorError) as error:
        expected = "a folder that can be written"
        remedy = "name another folder, or check its permissions and the free space"
        raise ValueError(expectation("save_pretrained", "folder", expected, f"{target} ({error})", remedy)) from error


def load(cls: type, folder_or_name: str | os.PathLike[str], revision: str | None, device: Any) -> Any:
    """Build the model of a folder or a name on the hub; see `LanguageModel.from_pretrained`."""
    safetensors = _required("safetensors", "from_pretrained")
    device = torch.device("cpu" if device is None else device)
    config_path, weights_path = _paths(folder_or_name, revision)
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        with safetensors.safe_open(weights_path, "pt") as file:
            saved_config = json.loads((file.metadata() or {}).get(CONFIG, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a dict)
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise _invalid(folder_or_name, f"a file that cannot be read ({error})") from error
    if not isinstance(config, dict) or config.pop("model", None) != cls.__name__:
        raise _invalid(folder_or_name, f"{CONFIG} of something else")
    config.pop("mingru", None)
    if saved_config is not None:
        _check_same_save(folder_or_name, config, saved_config)
    num_layers = config.get("num_layers")
    if isinstance(num_layers, int) and num_layers > len(tensors):
        raise _invalid(folder_or_name, f"{num_layers} layers in {CONFIG} and {len(tensors)} tensors in {WEIGHTS}")
    for name in {"device", "dtype"} & config.keys():
        raise _invalid(folder_or_name, f"{CONFIG} with the unexpected option {name}")
    if config.get("gate", "sigmoid") != "sigmoid":
        # Older versions saved only options that were passed, and this was the default of all gates.
        config.setdefault("candidate", "positive")
    try:
        model = _without_data(cls, config)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise _invalid(folder_or_name, f"{CONFIG} with invalid options ({reason})") from error
    # Models of older versions were saved without marks.
    tensors = {**marks_of(model), **tensors}
    difference = _difference(model.state_dict(), tensors)
    if difference:
        raise _invalid(folder_or_name, f"{WEIGHTS} {difference}")
    # Copies, because the tensors are the file's memory, which changes if another program writes to the file.
    model.load_state_dict({name: tensor.to(device, copy=True) for name, tensor in tensors.items()}, assign=True)
    return model.eval()


def push(model: Any, name: str, figures: dict[str, Any], options: dict[str, Any]) -> str:
    """Upload the three files; see `LanguageModel.push_to_hub`."""
    api = _required("huggingface_hub", "push_to_hub").HfApi(token=options.pop("token", None))
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, figures)
        api.create_repo(name, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, **options))


def _path(name: str, argument: str, path: Any) -> Path:
    check_type(name, argument, path, (str, os.PathLike), "a str or a path")
    return Path(path)


def _paths(folder_or_name: str | os.PathLike[str], revision: str | None) -> tuple[Path, Path]:
    folder = _path("from_pretrained", "folder_or_name", folder_or_name)
    if folder.is_dir():
        require("from_pretrained", "revision", revision is None, "None for a folder", repr(revision))
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise _invalid(folder, f"no file {name}")
        return folder / CONFIG, folder / WEIGHTS
    # A path is never a name, so that a typing error in a path does not reach the network.
    if not isinstance(folder_or_name, str) or folder.exists() or not HUB_NAME.fullmatch(folder_or_name):
        expected = "a folder that save_pretrained wrote, or a name on the hub such as 'owner/name'"
        raise ValueError(expectation("from_pretrained", "folder_or_name", expected, repr(str(folder_or_name))))
    name = folder_or_name
    hub = _required("huggingface_hub", f"from_pretrained: {name!r} is not a folder; for a name on the hub it")
    config_path, weights_path = (Path(hub.hf_hub_download(name, file, revision=revision)) for file in (CONFIG, WEIGHTS))
    return config_path, weights_path


def _without_data(cls: type, options: dict[str, Any]) -> nn.Module:
    """Return a model whose parameters are on the device "meta"."""
    with torch.device("meta"):
        model: nn.Module = cls(**options)
    return model


def _check_same_save(source: object, config: dict[str, Any], saved: object) -> None:
    """Raise an error if config.json differs from the options in the file of the weights."""
    saved = saved if isinstance(saved, dict) else {}
    for name in [name for name in {**saved, **config} if name not in ("model", "mingru")]:
        if name not in config or name not in saved or config[name] != saved[name]:
            got = f"{name} {config.get(name)!r} in {CONFIG} and {saved.get(name)!r} in {WEIGHTS}"
            raise _invalid(source, f"{got}, which are from two different saves")


def _difference(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    """Return how the found tensors differ from the expected tensors; "" if they fit."""
    for name in expected:
        if name not in found:
            return f"without {name}"
    for name, tensor in found.items():
        if name not in expected:
            return f"with the unexpected {name}"
        if tensor.shape != expected[name].shape:
            return f"with {name} {dims(tensor.shape)} instead of {dims(expected[name].shape)}"
        if tensor.is_floating_point() != expected[name].is_floating_point():
            return f"with {name} of dtype {tensor.dtype}"
    dtypes = {tensor.dtype: name for name, tensor in found.items() if tensor.is_floating_point()}
    if len(dtypes) > 1:
        return "with " + " but ".join(f"{name} of dtype {dtype}" for dtype, name in dtypes.items())
    return ""


def _changed(saved: nn.Module, model: nn.Module) -> str:
    """Return which module or attribute of a model will not be the same after loading; "" if all will be."""
    found = dict(model.named_modules(remove_duplicate=False))
    for name, module in saved.named_modules():
        other = found.pop(name, None)
        if type(other) is not type(module):
            return f"with {name} {type(other).__name__} instead of {type(module).__name__}"
        for attribute, value in vars(module).items():
            if not attribute.startswith("_") and attribute != "training" and vars(other).get(attribute) != value:
                path = f"{name}.{attribute}".removeprefix(".")
                return f"with {path} {vars(other).get(attribute)!r} instead of {value!r}"
    return "".join(f"with the additional {name}" for name in list(found)[:1])


def _shared(tensors: dict[str, Tensor]) -> str:
    """Return which tensor has the memory of another, which safetensors does not save; "" if there is none."""
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        first = names.setdefault(tensor.untyped_storage().data_ptr(), name)
        if first != name and tensor.numel() > 0:
            return f"whose {name} is {first}"
    return ""


def _invalid(source: object, got: str) -> ValueError:
    expected = "a complete model that save_pretrained wrote"
    return ValueError(expectation("from_pretrained", "folder_or_name", expected, f"{source} with {got}"))


def _required(package: str, name: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{name} needs the package {package}: run pip install {package}, or ".[hub]" in a clone of the repository',
            name=error.name,
        ) from error


def _card(model: Any, figures: dict[str, Any]) -> str:
    """Return a model card: what the model is, its sizes, the given figures, and how to load it."""
    count = sum(parameter.numel() for parameter in model.parameters())
    rows = {**model.config, "parameters": f"{count:,}", **figures}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
{LIBRARY}
tags: [mingru, text-generation]
---

# Language model of minimal gated recurrent layers

| | |
| --- | --- |
{table}

Load it with [mingru](https://arxiv.org/abs/2410.01201) {__version__}:

```python
from mingru.models import LanguageModel

lm = LanguageModel.from_pretrained("FOLDER_OR_NAME")
ids = lm.generate(prompts, max_new_tokens=100)
```
"""
