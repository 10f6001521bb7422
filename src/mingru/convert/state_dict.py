"""Check a state_dict of another package; errors name the first wrong key."""

from collections.abc import Mapping

from torch import Tensor

from ..check import check_like, dims, expectation


def check_keys(
    name: str, prefix: str, found: Mapping[str, Tensor], wanted: list[str], optional: tuple[str, ...] | None = ()
) -> None:
    """Raise an error if a wanted key is missing, or another is not optional; with `optional=None`, all others are."""
    wrong = [f"no key {prefix}{key}" for key in wanted if key not in found]
    if optional is not None:
        wrong += [f"the unexpected key {prefix}{key}" for key in found if key not in (*wanted, *optional)]
    if wrong:
        more = f" and {len(wanted) - 8} more" if len(wanted) > 8 else ""
        expected = f"a mapping with the keys {', '.join(prefix + key for key in wanted[:8])}{more}"
        if optional:
            expected += f" and optionally {', '.join(prefix + key for key in optional)}"
        raise ValueError(expectation(name, "state_dict", expected, wrong[0]))


def check_shapes(
    name: str, prefix: str, tensors: Mapping[str, Tensor], keys: list[str], shape: tuple[int, ...], first: str
) -> None:
    for key in keys:
        if tensors[key].shape != shape:
            expected = f"{dims(shape)} because {prefix}{first} is {dims(tensors[first].shape)}"
            raise ValueError(expectation(name, prefix + key, expected, dims(tensors[key].shape)))


def under(name: str, state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries under the prefix, which is removed; raise an error if there are none."""
    if not isinstance(state_dict, Mapping):
        got = type(state_dict).__name__
        raise TypeError(expectation(name, "state_dict", "a mapping of names to tensors", got, "use .state_dict()"))
    if not isinstance(prefix, str):
        raise TypeError(expectation(name, "prefix", "a str", repr(prefix)))
    found = {key[len(prefix) :]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    if not found:
        got = f"the key {next(iter(state_dict))}" if state_dict else "an empty mapping"
        raise ValueError(expectation(name, "state_dict", f"a mapping with keys that begin with {prefix!r}", got))
    return found


def check_alike(name: str, prefix: str, tensors: Mapping[str, Tensor], first: str) -> None:
    """Check that all are tensors with the dtype and device of the first, and that its dtype is floating."""
    weight = tensors[first]
    for key in (first, *tensors):
        # Comparing the first tensor with itself only checks that it is a tensor.
        check_like(name, prefix + key, tensors[key], weight, prefix + first)
    if not weight.is_floating_point():
        raise TypeError(expectation(name, prefix + first, "of a floating-point dtype", str(weight.dtype)))


def hint(state_dict: Mapping[str, Tensor], firsts: tuple[str, ...]) -> str:
    """Return the remedy that names the prefix of a layer in the state_dict, or "" if there is none."""
    prefixes = [key[: -len(first)] for key in state_dict for first in firsts if key.endswith("." + first)]
    return f"use prefix={prefixes[0]!r}" if prefixes else ""
