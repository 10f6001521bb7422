"""Models as folders: `config.json`, `model.safetensors` and a model card."""

import importlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..check import dims, expectation

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def save(model: Any, folder: str | os.PathLike[str], figures: dict[str, Any]) -> None:
    """Write the three files; see `LanguageModel.save_pretrained`."""
    safetensors = _required("safetensors", "save_pretrained")
    save_file = importlib.import_module("safetensors.torch").save_file
    target = Path(folder)
    config = {"model": type(model).__name__, "mingru": __version__, **model.config}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    temporary = {name: target / f".{name}.{os.getpid()}.tmp" for name in (WEIGHTS, CONFIG, CARD)}
    try:
        target.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary[WEIGHTS], {"format": "pt"})
        temporary[CONFIG].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        temporary[CARD].write_text(_card(model, figures), encoding="utf-8")
        for name, path in temporary.items():
            os.replace(path, target / name)
    except (OSError, safetensors.SafetensorError) as error:
        remedy = "name another folder, or check its permissions and the free space"
        message = expectation(
            "save_pretrained", "folder", "a folder that can be written", f"{target} ({error})", remedy
        )
        raise ValueError(message) from error
    finally:
        for path in temporary.values():
            if path.parent.is_dir():
                path.unlink(missing_ok=True)


def load(cls: type, folder_or_name: str | os.PathLike[str], revision: str | None, device: Any) -> Any:
    """Build the model of a folder or a name on the hub; see `LanguageModel.from_pretrained`."""
    safetensors = _required("safetensors", "from_pretrained")
    config_path, weights_path = _paths(folder_or_name, revision)
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        with safetensors.safe_open(weights_path, "pt", device=str(device or "cpu")) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a dict)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise _invalid(folder_or_name, f"a file that cannot be read ({error})") from error
    if not isinstance(config, dict) or config.pop("model", None) != cls.__name__:
        raise _invalid(folder_or_name, f"{CONFIG} of something else")
    config.pop("mingru", None)
    try:
        with torch.device("meta"):
            model: nn.Module = cls(**config)
    except (TypeError, ValueError) as error:
        raise _invalid(folder_or_name, f"{CONFIG} with invalid options ({error})") from error
    _check_tensors(folder_or_name, model.state_dict(), tensors)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def push(model: Any, name: str, figures: dict[str, Any], options: dict[str, Any]) -> str:
    """Upload the three files; see `LanguageModel.push_to_hub`."""
    api = _required("huggingface_hub", "push_to_hub").HfApi(token=options.pop("token", None))
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, figures)
        api.create_repo(name, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, **options))


def _paths(folder_or_name: str | os.PathLike[str], revision: str | None) -> tuple[Path, Path]:
    folder = Path(folder_or_name)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(expectation("from_pretrained", "revision", "None for a folder", repr(revision)))
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise _invalid(folder, f"no file {name}")
        return folder / CONFIG, folder / WEIGHTS
    name = str(folder_or_name)
    if folder.exists() or not HUB_NAME.fullmatch(name):
        expected = "a folder that save_pretrained wrote, or a name on the hub such as 'owner/name'"
        raise ValueError(expectation("from_pretrained", "folder_or_name", expected, repr(name)))
    hub = _required("huggingface_hub", f"from_pretrained: {name!r} is not a folder; for a name on the hub it")
    config_path, weights_path = (Path(hub.hf_hub_download(name, file, revision=revision)) for file in (CONFIG, WEIGHTS))
    return config_path, weights_path


def _check_tensors(source: Any, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name in expected:
        if name not in found:
            raise _invalid(source, f"{WEIGHTS} without {name}")
    for name, tensor in found.items():
        if name not in expected:
            raise _invalid(source, f"{WEIGHTS} with the unexpected {name}")
        if tensor.shape != expected[name].shape:
            got = f"{name} {dims(tensor.shape)} instead of {dims(expected[name].shape)}"
            raise _invalid(source, got)
        if not tensor.is_floating_point():
            raise _invalid(source, f"{name} of dtype {tensor.dtype}")


def _invalid(source: Any, got: str) -> ValueError:
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
library_name: mingru
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
