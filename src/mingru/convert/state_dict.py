"""Checks of a foreign state_dict, which name the first key that is wrong."""

from collections.abc import Mapping

from torch import Tensor

from ..check import check_like, dims, expectation


def check_keys(
    name: str, prefix: str, found: Mapping[str, Tensor], wanted: list[str], perhaps: tuple[str, ...] | None = ()
) -> None:
    """All wanted keys must be found, and no others but those of `perhaps`; None allows any other."""
    wrong = [f"no key {prefix}{key}" for key in wanted if key not in found]
    if perhaps is not None:
        wrong += [f"the key {prefix}{key}" for key in found if key not in (*wanted, *perhaps)]
    if wrong:
        more = f" and {len(wanted) - 8} more" if len(wanted) > 8 else ""
        expected = f"of the keys {', '.join(prefix + key for key in wanted[:8])}{more}"
        if perhaps:
            expected += f" and perhaps {', '.join(prefix + key for key in perhaps)}"
        raise ValueError(expectation(name, "state_dict", expected, wrong[0]))


def check_shapes(
    name: str, prefix: str, tensors: Mapping[str, Tensor], keys: list[str], shape: tuple[int, ...], first: str
) -> None:
    for key in keys:
        if tensors[key].shape != shape:
            expected = f"{dims(shape)} as {prefix}{first} is {dims(tensors[first].shape)}"
            raise ValueError(expectation(name, prefix + key, expected, dims(tensors[key].shape)))


def under(name: str, state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under the prefix, without it; at least one."""
    if not isinstance(state_dict, Mapping):
        got = type(state_dict).__name__
        raise TypeError(expectation(name, "state_dict", "a mapping of names to tensors", got, "use .state_dict()"))
    if not isinstance(prefix, str):
        raise TypeError(expectation(name, "prefix", "a str", repr(prefix)))
    found = {key[len(prefix) :]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    if not found:
        got = f"the key {next(iter(state_dict))}" if state_dict else "an empty one"
        raise ValueError(expectation(name, "state_dict", f"one with keys that begin with {prefix!r}", got))
    return found


def check_alike(name: str, prefix: str, tensors: Mapping[str, Tensor], first: str) -> None:
    """All must be tensors of the dtype, a floating one, and the device of the first."""
    weight = tensors[first]
    for key in (first, *tensors):
        # Against itself the first is asked whether it is a tensor.
        check_like(name, prefix + key, tensors[key], weight, prefix + first)
    if not weight.is_floating_point():
        raise TypeError(expectation(name, prefix + first, "of a floating dtype", str(weight.dtype)))


def hint(state_dict: Mapping[str, Tensor], firsts: tuple[str, ...]) -> str:
    """A prefix under which there is a layer, if there is any."""
    prefixes = [key[: -len(first)] for key in state_dict for first in firsts if key.endswith("." + first)]
    return f"a layer of theirs has prefix={prefixes[0]!r}" if prefixes else ""
