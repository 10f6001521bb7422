"""Models as folders: `config.json` and `model.safetensors`.

`PyTorchModelHubMixin` of huggingface_hub is not used, because it must be a base when the class is defined, and `import
mingru` needs torch alone. It also keeps random numbers in place of missing tensors, may load a pickle, and deletes the
old options before the new weights are written.
"""

import importlib
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..check.values import check_type, expectation, require

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def save(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write the two files; see `LanguageModel.save_pretrained`."""
    safetensors = _required("safetensors", "save_pretrained", ".torch")
    target = _path("save_pretrained", "folder", folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    firsts: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        first = firsts.setdefault(tensor.untyped_storage().data_ptr(), name)
        remedy = "use tied=True for the head, and .clone() for other tensors"
        got = f"one whose {name} is {first}"
        require("save_pretrained", "the model", first == name, "a model without shared tensors", got, remedy)
    try:
        change = _change(_filled(type(model), model.config, tensors), model)
    except (TypeError, ValueError, RuntimeError) as error:
        change = f"whose tensors do not fit ({_line(error)})"
    expected, remedy = f"{type(model).__name__}(**config) without changes", "pass the change to the constructor"
    require("save_pretrained", "the model", not change, expected, f"a model {change}", remedy)
    config = json.dumps({"model": type(model).__name__, "mingru": __version__, **model.config}, indent=2)
    # The weights contain the options too, so that `load` finds out if config.json is from another save.
    frozen = json.dumps([name for name, parameter in model.named_parameters() if not parameter.requires_grad])
    metadata = {"format": "pt", CONFIG: config, "frozen": frozen}
    contents = {WEIGHTS: safetensors.save(tensors, metadata), CONFIG: f"{config}\n".encode()}
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target, ignore_cleanup_errors=True) as new:
            for name, content in contents.items():
                if (target / name).is_dir():
                    raise IsADirectoryError(f"{name} is a folder")
                with Path(new, name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    # Some file systems report a full disk only here.
                    os.fsync(file.fileno())
            for name in contents:
                os.replace(Path(new, name), target / name)
    except OSError as error:
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
            saved, frozen = (json.loads((file.metadata() or {}).get(key, "null")) for key in (CONFIG, "frozen"))
            # Copies, because get_tensor returns the file's memory, which changes if another program writes to the file.
            tensors = {name: file.get_tensor(name).to(device, copy=True) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise _invalid(folder_or_name, f"a file that cannot be read ({error})") from error
    if not isinstance(config, dict) or config.get("model") != cls.__name__:
        raise _invalid(folder_or_name, f"{CONFIG} of something else")
    options = {name: value for name, value in config.items() if name not in ("model", "mingru")}
    for name in ("device", "dtype"):
        # A device would allocate what the options ask for before the shapes of the tensors are compared with them.
        if name in options:
            raise _invalid(folder_or_name, f"{name} {options[name]!r} in {CONFIG}, which is no option of a saved model")
    saved = saved if isinstance(saved, dict) else config
    for name in (options.keys() | saved.keys()) - {"model", "mingru"}:
        if options.get(name) != saved.get(name):
            got = f"{name} {options.get(name)!r} in {CONFIG} and {saved.get(name)!r} in {WEIGHTS}"
            raise _invalid(folder_or_name, f"{got}, which are from two different saves")
    try:
        model = _filled(cls, options, tensors)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in (frozen or ()))
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise _invalid(folder_or_name, f"options and tensors that do not fit ({_line(error)})") from error
    nan = next((name for name, tensor in tensors.items() if not tensor.is_meta and tensor.isnan().any()), None)
    if nan is not None:
        warnings.warn(f"from_pretrained: {nan} of {folder_or_name} has NaN, and so have all logits", stacklevel=3)
    return model.to(device).eval()


def _filled(cls: type, options: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """Return a model of these options with these tensors; raise an error if they do not fit."""
    num_layers = options.get("num_layers")
    if isinstance(num_layers, int) and num_layers > len(tensors):
        raise ValueError(f"{num_layers} layers and {len(tensors)} tensors")
    with torch.device("meta"):
        model: nn.Module = cls(**options)
    model.load_state_dict(tensors, assign=True)
    dtypes = {parameter.dtype: name for name, parameter in model.named_parameters()}
    if len(dtypes) > 1:
        raise ValueError(", ".join(f"{name} of {dtype}" for dtype, name in dtypes.items()))
    return model


def _change(saved: nn.Module, model: nn.Module) -> str:
    """Return which type or attribute of a module will be another one after loading; "" if none will."""
    expected, found = _attributes(saved), _attributes(model)
    changed = [path for path in {**expected, **found} if expected.get(path) != found.get(path)]
    return "".join(f"with {path} {found.get(path)!r} instead of {expected.get(path)!r}" for path in changed[:1])


def _attributes(model: nn.Module) -> dict[str, Any]:
    """Return the types and the attributes of all modules, by their paths."""
    return {
        f"{name}.{key}".strip("."): value
        for name, module in model.named_modules(remove_duplicate=False)
        for key, value in {"": type(module).__name__, **vars(module)}.items()
        if not key.startswith("_") and key != "training"
    }


def _path(name: str, argument: str, path: Any) -> Path:
    check_type(name, argument, path, (str, os.PathLike), "a str or a path")
    require(name, argument, os.fspath(path) != "", "a path", "''", "use '.' for the current folder")
    return Path(path)


def _paths(folder_or_name: str | os.PathLike[str], revision: str | None) -> tuple[Path, ...]:
    folder = _path("from_pretrained", "folder_or_name", folder_or_name)
    if folder.is_dir():
        require("from_pretrained", "revision", revision is None, "None for a folder", repr(revision))
        return folder / CONFIG, folder / WEIGHTS
    # A path is never a name, so that a typing error in a path does not reach the network.
    is_name = isinstance(folder_or_name, str) and not folder.exists() and HUB_NAME.fullmatch(folder_or_name) is not None
    expected = "a folder that save_pretrained wrote, or a name on the hub such as 'owner/name'"
    require("from_pretrained", "folder_or_name", is_name, expected, repr(str(folder_or_name)))
    needs = f"from_pretrained: {folder_or_name!r} is not a folder; for a name on the hub it"
    download = _required("huggingface_hub", needs).hf_hub_download
    return tuple(Path(download(folder_or_name, file, revision=revision)) for file in (CONFIG, WEIGHTS))


def _invalid(source: object, got: str) -> ValueError:
    expected = "a complete model that save_pretrained wrote"
    return ValueError(expectation("from_pretrained", "folder_or_name", expected, f"{source} with {got}"))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _required(package: str, name: str, module: str = "") -> Any:
    try:
        return importlib.import_module(package + module)
    except ModuleNotFoundError as error:
        remedy = f'run pip install {package}, or ".[hub]" in a clone of the repository'
        raise ModuleNotFoundError(f"{name} needs the package {package}: {remedy}", name=error.name) from error
