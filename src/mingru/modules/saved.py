"""What a state_dict holds besides parameters: what is written, read, renamed and refused, for all layers.

All gates, for example, have weights of the same shapes. Without a mark, weights trained with one gate would load
without an error into a layer with another gate, and its outputs would be wrong. A mark is a buffer, so that every tool
that saves a model saves it. An option with its first value has none.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.types import Device

from ..check.values import expectation
from ..ops.activation import ACTIVATIONS
from ..ops.cells import CELLS, GATES

# A state_dict, or a part of it, which torch is about to copy.
Weights = dict[str, Tensor]
Metadata = dict[str, object]
GATE_OF = {cell: gate for gate, cell in GATES.items()}
RESIDUALS, STARTS = (False, True, "highway"), (0.0, 0.5)
# The options of layers: their values in the order of their numbers. Files contain the numbers, so new values come last.
# The first has no mark. Or the default of a number: the mark of x is `(x - default) * 2**53`.
MARKS: dict[str, Sequence[object] | float] = {
    "gate": (*GATES,),
    "candidate": (None, *ACTIVATIONS),
    "normalize": (True, False),
    "min_decay": 0.0,
    "residual": RESIDUALS,
    "output_gate": (None, "silu"),
}
OF_LEVELS = (*MARKS,)
# A module takes these two from the weights, and refuses no weights with others.
MARKS |= {"zero_state": STARTS, "groups": range(2**31)}
# A state_dict of `drop_in` has two buffers more, so that torch's layers refuse it. The first says what to do, and torch
# names it if it is strict. The other has the name of a bias or weight of torch, and another shape, which torch refuses
# even if it is not strict. Their values mean nothing.
GUARDS = ("load_in_mingru_drop_in_patch", "bias_hh_l0", "weight_hh_l0", "bias_hh", "weight_hh")


def start_said_by(module: "Saved") -> float | None:
    """Return the initial state if weights say it: not if they are like the paper's, which `drop_in` begins with 0."""
    levels = getattr(module, "layers", [module])
    is_usual = all(CELLS[each.cell].has_logarithms and each.candidate == "positive" for each in levels)
    return None if is_usual or module.initial_state is not None else module._zero_state


def key_of(option: str) -> str:
    """Return the key of a mark. Modules have attributes with the names of these."""
    return option if option in ("gate", "groups") else f"{option}_mark"


def marks_in(module: "Saved") -> dict[str, int]:
    """Return the number of each option that the state_dict of a module says."""
    found, said = {}, module._said()
    for option in module._marks:
        values = MARKS[option]
        if isinstance(values, float):
            found[option] = round((getattr(module, option, values) - values) * 2**53)
        elif option != "zero_state" or said[option] is not None:
            found[option] = values.index(said[option] if option in said else getattr(module, option, values[0]))
    return found


def add_marks(module: "Saved", device: Device) -> None:
    """Add the marks that the module does not have yet."""
    for option, number in marks_in(module).items():
        if number and module._buffers.get(key := key_of(option)) is None:
            module.register_buffer(key, torch.tensor(number, device=device))


def add_guards(module: Any, device: Device) -> None:
    """Add the guards of a layer or cell of `drop_in`."""
    of_torch = "bias_hh" if module.bias else "weight_hh"
    for guard in (of_torch if module.role == "step" else f"{of_torch}_l0", GUARDS[0]):
        # Not by register_buffer, which refuses the name of what can be read, as the bias of one block.
        module._buffers[guard] = torch.tensor(1, device=device)


def said(option: str, number: int) -> str:
    """Return an option as a constructor takes it, with an unknown value as a number."""
    values = MARKS[option]
    if isinstance(values, float):
        return f"{option}={values + number / 2**53:.15g}"
    return f"{option}={values[number]!r}" if 0 <= number < len(values) else f"{option}={number}"


def take_marks(module: "Saved", state_dict: Weights, prefix: str, metadata: Metadata) -> str:
    """Compare the marks with those of a module, and refuse weights with others."""
    wrong, unknown = list[tuple[str, str, str]](), dict[str, str]()
    names = [name for name in state_dict if name.startswith(prefix)]
    # Parameters alone, such as moving averages, have neither metadata nor marks, and say nothing. Otherwise, an option
    # without a mark has its first value. A caller who is not strict may pass no weights of this module.
    has_marks = not {name.rpartition(".")[2] for name in names}.isdisjoint(map(key_of, MARKS))
    is_silent = not names or ("version" not in metadata and not has_marks)
    # The map of a residual between different sizes shows that there is one.
    shown = ["residual"] if any(name.startswith(f"{prefix}align") for name in names) else []
    for option, number in marks_in(module).items():
        mark = state_dict.pop(key := prefix + key_of(option), None)
        # On the device "meta", a mark has no value.
        is_meta, device = getattr(mark, "is_meta", False), getattr(mark, "device", None)
        given = number if is_meta or (mark is None and is_silent) else int(mark or 0)
        if option == "zero_state" and 0 <= given < len(STARTS):
            module._zero_state, number = STARTS[given], given  # noqa: PLW2901
            add_marks(module, "cpu" if is_meta else device)
        if given != number:
            wrong.append((option, said(option, given), said(option, number)))
        if mark is None and is_silent and names and number and option not in shown:
            unknown[option] = said(option, number)
        if module._buffers.get(key_of(option)) is not None:
            state_dict[key] = torch.tensor(number, device="cpu" if is_meta else device)
    if wrong:
        options, trained, here = (" and ".join(each) for each in zip(*wrong, strict=True))
        problem = (
            f"weights trained with {trained} cannot be used in a layer with {here}; construct it with their {options}"
        )
        return f"{prefix[:-1] or type(module).__name__}: {problem}"
    if unknown:
        # Without the name of the layer, so that it is shown once.
        problem = f"the weights do not say with which {' and '.join(unknown)} they were trained"
        used = f"because they have no metadata; they are used with {', '.join(unknown.values())}"
        warnings.warn(f"load_state_dict: {problem}, {used}", stacklevel=2)
    return ""


def take_groups(norm: Any, state_dict: Weights, prefix: str, metadata: Metadata) -> None:
    """Change the number of groups to that of the weights, if they say one."""
    groups = state_dict.get(f"{prefix}groups")
    if groups is not None:
        norm.regroup(int(groups))


def note_values(module: Any, state_dict: Weights, prefix: str, metadata: Metadata) -> None:
    """Note whether all parameters get values: models of transformers load one after the other, also without values."""
    is_whole = {prefix + name for name, _ in module.named_parameters()} <= state_dict.keys()
    module._is_empty = module._is_empty and not is_whole
    if module.role == "step":
        # A cell returns the state, which does not include the residual of a layer; a highway has weights of its own.
        mark = state_dict.get(key := f"{prefix}layers.0.{key_of('residual')}")
        if mark is not None and (mark.is_meta or RESIDUALS[int(mark)] is True):
            del state_dict[key]


def refuse_other_cells(level: Any, state_dict: Weights, prefix: str, metadata: Metadata) -> str:
    """Refuse weights of a GRU or for one, because the linear map of a MinLSTM has the same shape."""
    names = {name[len(prefix) :].partition(".")[0] for name in state_dict if name.startswith(prefix)}
    is_other = "linear" in names and ("recurrent" in names) != (level.cell == "gru")
    if is_other:
        # The modules inside keep their weights.
        state_dict.update(level.state_dict(prefix=prefix, keep_vars=True))
    return f"{prefix}linear: a GRU, and no other, has recurrent weights; load a whole state_dict" * is_other


def refuse_weights_of_torch(module: Any, state_dict: Weights, prefix: str, metadata: Metadata) -> str:
    key = next((key for key in state_dict if key.startswith(f"{prefix}weight_ih")), None)
    expected = f"weights of {module.name}" + " because the equations differ" * (module.cell != "gru")
    got, remedy = f"{key} of torch.nn", module._remedy_for_weights
    return "" if key is None else expectation(module.name, "state_dict", expected, got, remedy)


def renew_guards(module: Any, state_dict: Weights, prefix: str, metadata: Metadata) -> None:
    """Add the guards of a module, because weights of layers that are not in `drop_in` have none; remove others."""
    for name in GUARDS:
        guard = state_dict.pop(prefix + name, None)
        if name in module._buffers:
            state_dict[prefix + name] = torch.tensor(1, device=getattr(guard, "device", None))


class Saved(nn.Module):
    """A module whose state_dict says more than its parameters."""

    _zero_state: float
    _marks: tuple[str, ...] = ()
    """The options that the state_dict says."""
    _loading: tuple[Callable[[Any, Weights, str, Metadata], str | None], ...] = (take_marks,)
    """What is done with the entries of a state_dict before torch copies them, by functions (module, state_dict, prefix,
    metadata), which change these entries, or return an error if the weights cannot be used."""

    def _said(self) -> dict[str, object]:
        """Return the values of options that are no attributes with their names."""
        return {}

    def _save_to_state_dict(self, destination: Weights, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Again, because the buffers are undefined after `to_empty` and `skip_init`, and options may have changed.
        for option, number in marks_in(self).items():
            mark = destination.get(key := prefix + key_of(option))
            if mark is not None:
                destination[key] = torch.full_like(mark, number)
            elif number and option in OF_LEVELS:
                destination[key] = torch.tensor(number, device=next(self.parameters()).device)

    def _load_from_state_dict(self, state_dict: Weights, prefix: str, metadata: Metadata, *args: Any) -> None:
        for step in self._loading:
            error = step(self, state_dict, prefix, metadata)
            if error:
                # Also if the caller is not strict, as torch does with weights of another shape.
                args[-1].append(error)
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)
