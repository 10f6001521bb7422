"""Models as folders: `config.json` and `model.safetensors`.

`PyTorchModelHubMixin` of huggingface_hub is not used, because it must be a base when the class is defined, and `import
mingru` needs torch alone. It also keeps random numbers in place of missing tensors, may load a pickle, and deletes the
old options before the new weights are written.
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from .._version import __version__
from ..check.values import check_type, expectation, imported, require

M = TypeVar("M", bound=nn.Module)
StrPath = str | os.PathLike[str]
CONFIG, WEIGHTS = "config.json", "model.safetensors"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def save(model: nn.Module, config: Mapping[str, object], folder: StrPath) -> None:
    """Write the two files; see `LanguageModel.save_pretrained`."""
    safetensors = imported("safetensors.torch", "save_pretrained", "hub")
    target = _path("save_pretrained", "folder", folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    config = {"model": type(model).__name__, "mingru": __version__, "frozen": frozen, **config}
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target, ignore_cleanup_errors=True) as new:
        Path(new, WEIGHTS).write_bytes(safetensors.save(tensors, {"format": "pt"}))
        Path(new, CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            os.replace(Path(new, name), target / name)


def load(cls: type[M], folder_or_name: StrPath, revision: str | None, device: str | torch.device | None) -> M:
    """Build the model of a folder or a name on the hub; see `LanguageModel.from_pretrained`."""
    safetensors = imported("safetensors.torch", "from_pretrained", "hub")
    device = torch.device("cpu" if device is None else device)
    config_path, weights_path = _paths(folder_or_name, revision)
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.pop("model", None) != cls.__name__:
            raise ValueError(f"{CONFIG} is of something else")
        frozen, num_layers = config.pop("frozen", []), config.get("num_layers")
        if type(frozen) is not list or not all(type(name) is str for name in frozen):
            raise ValueError(f"frozen must be a list of names, got {frozen!r}")
        tensors = safetensors.load_file(weights_path)
        dtypes = {str(x.dtype) for x in tensors.values() if x.is_floating_point()}
        if len(dtypes) > 1:
            raise ValueError(f"the tensors must have one dtype, got {' and '.join(sorted(dtypes))}")
        # Each layer has tensors. To build so many takes long.
        if type(num_layers) is int and num_layers > len(tensors):
            raise ValueError(f"num_layers is {num_layers}, and the file has {len(tensors)} tensors")
        # On the device "meta", whatever the file says, nothing is allocated before the shapes are compared.
        options = {name: value for name, value in config.items() if name != "mingru"} | {"device": "meta"}
        model = cls(**options)
        # With the metadata of a state_dict, without which a mark that is not there would say nothing.
        weights = model.state_dict()
        weights.clear()
        # Copies, because these tensors are the file's memory, which changes if another program writes to the file.
        weights.update((name, x.to(device, copy=True)) for name, x in tensors.items())
        model.load_state_dict(weights, assign=True)
    except Exception as error:
        expected, why = "a complete model that save_pretrained wrote", " ".join(str(error).split())
        got = f"{folder_or_name} ({why})"
        raise ValueError(expectation("from_pretrained", "folder_or_name", expected, got)) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return model.to(device).eval()


def _path(name: str, argument: str, path: StrPath) -> Path:
    check_type(name, argument, path, (str, os.PathLike), "a str or a path")
    require(name, argument, os.fspath(path) != "", "a path", "''", "use '.' for the current folder")
    return Path(path)


def _paths(folder_or_name: StrPath, revision: str | None) -> tuple[Path, ...]:
    folder = _path("from_pretrained", "folder_or_name", folder_or_name)
    if folder.is_dir():
        return folder / CONFIG, folder / WEIGHTS
    # A path is never a name, so that a typing error in a path does not reach the network.
    is_name = isinstance(folder_or_name, str) and not folder.exists() and HUB_NAME.fullmatch(folder_or_name) is not None
    expected = "a folder that save_pretrained wrote, or a name on the hub such as 'owner/name'"
    require("from_pretrained", "folder_or_name", is_name, expected, repr(str(folder_or_name)))
    needs = f"from_pretrained: {folder_or_name!r} is not a folder; for a name on the hub it"
    download = imported("huggingface_hub", needs, "hub").hf_hub_download
    return tuple(Path(download(folder_or_name, file, revision=revision)) for file in (CONFIG, WEIGHTS))
