"""The mark of a layer's gate in its state_dict."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.cells import GATES
from .layer import reset_all

NUMBERS = {cell: number for number, cell in enumerate(GATES.values())}
NAMES = dict(enumerate(GATES))


class Marked(nn.Module):
    """A layer whose state_dict contains the number of its gate, as `gate`, unless the gate is "sigmoid".

    The weights of all gates have the same shapes. Without the mark, weights trained with one gate would load without an
    error into a layer with another gate, and its outputs would be wrong.
    """

    # In state_dicts of version 1, weights of all gates are without a mark.
    _version = 2
    gate: Tensor | None

    def __init__(self, cell: str, device: Any) -> None:
        super().__init__()
        self.cell = cell
        number = NUMBERS.get(cell, 0)
        self.register_buffer("gate", torch.tensor(number, device=device) if number else None)

    def reset_parameters(self) -> None:
        """Re-initialize all parameters."""
        reset_all(self.children())
        mark = self._buffers.get("gate")
        if mark is not None:
            # It is undefined after `to_empty`.
            mark.fill_(NUMBERS[self.cell])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        metadata, *_, error_msgs = args
        key, own = prefix + "gate", NUMBERS.get(self.cell, 0)
        found = state_dict.get(key)
        is_known = found is not None or metadata.get("version", 1) > 1
        # On the device "meta", a mark has no value.
        number = own if found is not None and found.is_meta else int(found or 0)
        if is_known and number != own:
            of_weights, of_layer = NAMES.get(number, number), NAMES[own]
            error_msgs.append(
                f"{prefix[:-1]}: weights trained with gate={of_weights!r} cannot be used in a layer with "
                f"gate={of_layer!r}; construct it with their gate"
            )
            return
        if own and not is_known:
            # Without the name of the layer, so that it is shown once.
            warnings.warn(
                "load_state_dict: the weights do not say with which gate they were trained, because an older version "
                f"saved them, or they have no metadata; they are used with gate={NAMES[own]!r}. In older versions, the "
                "default candidate of this gate was 'positive'",
                stacklevel=2,
            )
            state_dict = {**state_dict, key: torch.tensor(own)}
        super()._load_from_state_dict(state_dict, prefix, *args)


def marks_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the marks in the state_dict of a model."""
    return {
        f"{name}.gate": torch.tensor(NUMBERS[module.cell], device="cpu")
        for name, module in model.named_modules()
        if isinstance(module, Marked) and module.gate is not None
    }
