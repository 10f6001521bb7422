"""Marks in a state_dict: the options that change what weights of equal shapes mean.

All gates, for example, have weights of the same shapes. Without the mark, weights trained with one gate would load
without an error into a layer with another gate, and its outputs would be wrong. A mark is a buffer, so that every tool
that saves a model saves it. An option with its first value has none.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..check.values import dims
from ..ops.activation import ACTIVATIONS
from ..ops.cells import GATES

# The values of each option in the order of their numbers. Files contain the numbers, so new values come last. The first
# has no mark.
MARKS: dict[str, tuple[Any, ...]] = {
    "gate": tuple(GATES),
    # None is the default of the gate.
    "candidate": (None, *ACTIVATIONS),
    "normalize": (True, False),
    # A fraction, whose number is `value * 2**53`.
    "min_decay": (),
    "residual": (False, True, "highway"),
    "output_gate": (None, "silu"),
    # A module takes this one from the weights, as the attribute `_zero_state`. It refuses weights with others.
    "zero_state": (0.0, 0.5),
}

# A state_dict of `drop_in` has two buffers more, so that torch's layers refuse it. The first says what to do, and torch
# names it if it is strict. The other has the name of a bias or weight of torch, and another shape, which torch refuses
# even if it is not strict. Their values mean nothing.
GUARDS = ("load_in_mingru_drop_in_patch", "bias_hh_l0", "weight_hh_l0", "bias_hh", "weight_hh")


def key_of(option: str) -> str:
    """Return the key of a mark. Layers have attributes with the names of the options."""
    return option if option == "gate" else f"{option}_mark"


def described(numbers: dict[str, int], options: Iterable[str], separator: str = " and ") -> str:
    """Return the values of these options as a constructor takes them; unknown values as numbers."""
    texts = []
    for option in options:
        number, values = numbers[option], MARKS[option]
        text = f"{number}" if values else f"{number / 2**53:.15g}"
        texts.append(f"{option}={values[number]!r}" if 0 <= number < len(values) else f"{option}={text}")
    return separator.join(texts)


def number_in(found: Any) -> int | None:
    """Return the number that a mark contains, or None if it does not contain a whole number."""
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()
    is_whole = isinstance(found, int) or (isinstance(found, float) and found.is_integer())
    return int(found) if is_whole else None


def marks_in(module: Any) -> dict[str, int]:
    """Return the number of each option of a module."""
    options = module._marked_options().items()
    return {name: MARKS[name].index(value) if MARKS[name] else round(value * 2**53) for name, value in options}


def add_marks(module: Any, device: Any) -> None:
    """Add the marks that the module does not have yet."""
    for option, number in marks_in(module).items():
        if number and module._buffers.get(key := key_of(option)) is None:
            module.register_buffer(key, torch.tensor(number, device=device))


class Marked(nn.Module):
    """A module with marks, of the options that its method `_marked_options` returns."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Again, because the buffers are undefined after `to_empty` and `skip_init`.
        for option, number in marks_in(self).items():
            mark = destination.get(prefix + key_of(option))
            if mark is not None:
                destination[prefix + key_of(option)] = torch.full_like(mark, number)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, *args: Any) -> None:
        if take_marks(self, state_dict, prefix, metadata, args[-1]):
            super()._load_from_state_dict(state_dict, prefix, metadata, *args)


def take_marks(
    module: Any, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], error_msgs: list[str]
) -> bool:
    """Compare the marks of a state_dict with those of a module. Return False if its weights cannot be used."""
    own, found, wrong, unknown = marks_in(module), {}, [], []
    names = [name for name in state_dict if name.startswith(prefix)]
    # Parameters alone, such as moving averages, have neither metadata nor marks, and say nothing. Otherwise, an option
    # without a mark has its first value. A caller who is not strict may pass no weights of this module.
    has_marks = not {name.rpartition(".")[2] for name in names}.isdisjoint(map(key_of, MARKS))
    is_silent = not names or ("version" not in metadata and not has_marks)
    for option in own:
        key = prefix + key_of(option)
        mark = state_dict.pop(key, None)
        # On the device "meta", a mark has no value.
        is_meta = isinstance(mark, Tensor) and mark.is_meta
        device = "cpu" if is_meta else getattr(mark, "device", None)
        if is_meta or (mark is None and is_silent):
            of_weights: int | None = own[option]
        else:
            of_weights = 0 if mark is None else number_in(mark)
        if of_weights is None:
            got = f"a tensor {dims(mark.shape)}" if isinstance(mark, Tensor) and mark.numel() != 1 else repr(mark)
            error_msgs.append(f"{key} must be one whole number, the mark of {option}, got {got}; the file is damaged")
            return False
        if option == "zero_state" and 0 <= of_weights < len(MARKS[option]):
            own[option], module._zero_state = of_weights, MARKS[option][of_weights]
            add_marks(module, device)
        number = own[option]
        found[option] = of_weights
        wrong += [option] if of_weights != number else []
        # The map of a residual between different sizes shows that there is one.
        is_shown = option == "residual" and any(name.startswith(f"{prefix}align") for name in names)
        unknown += [option] if mark is None and is_silent and names and number and not is_shown else []
        if module._buffers.get(key_of(option)) is not None:
            state_dict[key] = torch.tensor(number, device=device)
    if wrong:
        trained, here = described(found, wrong), described(own, wrong)
        problem = f"weights trained with {trained} cannot be used in a layer with {here}; construct it with their"
        error_msgs.append(f"{prefix[:-1] or type(module).__name__}: {problem} {' and '.join(wrong)}")
        return False
    if unknown:
        # Without the name of the layer, so that it is shown once.
        problem = f"the weights do not say with which {' and '.join(unknown)} they were trained"
        used = f"because they have no metadata; they are used with {described(own, unknown, ', ')}"
        warnings.warn(f"load_state_dict: {problem}, {used}", stacklevel=2)
    return True
