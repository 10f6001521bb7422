"""The state_dict of a layer of another package, and the errors about it."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..check.values import check_type, dims, expectation, not_a_tensor, require
from ..modules.mingru import MinGRU
from ..modules.minlstm import MinLSTM

AnyLayer = TypeVar("AnyLayer", bound=MinGRU | MinLSTM)


class Checkpoint(dict[str, Tensor]):
    """The tensors under a prefix, which is removed from their keys. Errors name the first wrong key."""

    def __init__(self, name: str, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        remedy = "load the file with torch.load(path)" if isinstance(state_dict, str) else "use .state_dict()"
        check_type(name, "state_dict", state_dict, Mapping, "a mapping of names to tensors", remedy)
        require(name, "prefix", isinstance(prefix, str), "a str", repr(prefix), error=TypeError)
        for key in state_dict:
            check_type(name, f"the key {key!r} of state_dict", key, str, "a str", "use .state_dict()")
        self.name, self.state_dict, self.prefix = name, state_dict, prefix
        super().__init__((key[len(prefix) :], x) for key, x in state_dict.items() if key.startswith(prefix))
        got = f"the key {next(iter(state_dict))}" if state_dict else "an empty mapping"
        expected = f"a mapping with keys that begin with {prefix!r}"
        require(name, "state_dict", len(self) > 0, expected, got)

    def listed(self, keys: Iterable[str], separator: str = ", ") -> str:
        return separator.join(self.prefix + key for key in keys)

    def without(self, firsts: Iterable[str], remedy: str = "") -> ValueError:
        """Return the error for a checkpoint with none of these keys, which names the prefix of a layer, if any."""
        prefixes = [key[: -len(first)] for key in self.state_dict for first in firsts if key.endswith("." + first)]
        inner = [key for key, x in self.state_dict.items() if isinstance(x, Mapping)]
        if prefixes or inner:
            remedy = f"use prefix={prefixes[0]!r}" if prefixes else f"pass the mapping under {inner[0]!r}"
        expected = f"a mapping with keys such as {self.listed(firsts, ' or ')}"
        got = f"the key {self.prefix}{next(iter(self))}"
        return ValueError(expectation(self.name, "state_dict", expected, got, remedy))

    def count(self, form: str) -> int:
        """Return how many keys have this form, in which {} stands for a number."""
        pattern = re.escape(form).replace(r"\{\}", r"\d+")
        return sum(re.fullmatch(pattern, key) is not None for key in self)

    def check(self, wanted: list[str], optional: tuple[str, ...] | None = ()) -> None:
        """Raise an error if a wanted key is missing, or another is not optional; with None, all others are.

        All must be tensors with the dtype and device of the first wanted one, whose dtype must be floating.
        """
        wrong = [f"no key {self.prefix}{key}" for key in wanted if key not in self]
        if optional is not None:
            wrong += [f"the unexpected key {self.prefix}{key}" for key in self if key not in (*wanted, *optional)]
        if wrong:
            more = f" and {len(wanted) - 8} more" if len(wanted) > 8 else ""
            expected = f"a mapping with the keys {self.listed(wanted[:8])}{more}"
            if optional:
                expected += f" and optionally {self.listed(optional)}"
            raise ValueError(expectation(self.name, "state_dict", expected, wrong[0]))
        weight, argument = self[wanted[0]], self.prefix + wanted[0]
        for key in (wanted[0], *self):
            # Comparing the first tensor with itself only checks that it is a tensor.
            x, name = self[key], self.prefix + key
            if not isinstance(x, Tensor) or x.layout != torch.strided:
                raise not_a_tensor(self.name, name, x)
            expected, got, remedy = f"{weight.dtype} like {argument}", str(x.dtype), f"use {name}.to({weight.dtype})"
            require(self.name, name, x.dtype == weight.dtype, expected, got, remedy, TypeError)
            expected, got = f"on {weight.device} like {argument}", f"a tensor on {x.device}"
            require(self.name, name, x.device == weight.device, expected, got, f"use {name}.to({str(weight.device)!r})")
        is_valid = weight.is_floating_point()
        require(self.name, argument, is_valid, "of a floating-point dtype", str(weight.dtype), error=TypeError)

    def check_shape(self, key: str, valid: bool, expected: str) -> None:
        require(self.name, self.prefix + key, valid, expected, dims(self[key].shape))

    def check_shapes(self, keys: Iterable[str], shape: tuple[int, ...], first: str) -> None:
        expected = f"{dims(shape)} because {self.prefix}{first} is {dims(self[first].shape)}"
        for key in keys:
            self.check_shape(key, self[key].shape == shape, expected)


def loaded(
    layer: type[AnyLayer], state: dict[str, Tensor], start: Tensor, is_learned: bool, **options: Any
) -> AnyLayer:
    """Return a layer with these parameters and this initial state, (L, 1, 1, H)."""
    # "meta" skips the initialization, which would also change the state of the caller's random generator.
    rnn = layer(learn_initial_state=True, device="meta", dtype=start.dtype, **options)
    # The initial state is set even if it is 0, because the default of this package is 0.5. Resets use it too.
    # With its own marks.
    rnn.load_state_dict({**rnn.state_dict(), **state, "initial_state": start}, assign=True)
    assert rnn.initial_state is not None
    rnn.initial_state.requires_grad_(is_learned)
    return rnn
