"""The state_dict of a layer of another package, and the errors about it."""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..check.forms import Form, Function
from ..check.values import check_floating, check_type, dims, expectation, not_a_tensor, require


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
        check_floating(self.name, argument, weight)
        like = Function(self.name, {"x": "*"}, x=argument)
        for key, x in self.items():
            if isinstance(x, Tensor) and x.layout != torch.strided:
                raise not_a_tensor(self.name, self.prefix + key, x)
            Form(self.prefix + key, "", []).check(like, x, weight, None)

    def check_shape(self, key: str, valid: bool, expected: str) -> None:
        require(self.name, self.prefix + key, valid, expected, dims(self[key].shape))

    def check_size(self, key: str, shape: tuple[int, ...], first: str) -> None:
        """Check a shape that follows from that of the first tensor."""
        expected = f"{dims(shape)} because {self.prefix}{first} is {dims(self[first].shape)}"
        self.check_shape(key, self[key].shape == shape, expected)

    def into(
        self,
        layer: nn.Module,
        keys: dict[str, str],
        change: Callable[[str, Tensor], Tensor] = lambda key, x: x.clone(),
        more: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Load the tensors into a layer. `keys` has the key of each parameter, the first one that says the sizes.

        The layer is on "meta": this skips the initialization, which would also change the state of the caller's random
        generator. `change` converts a tensor with a key to another one of its shape; `more` has further parameters.
        """
        first = next(iter(keys.values()))
        for name, key in keys.items():
            self.check_size(key, layer.get_parameter(name).shape, first)
        state = {name: change(key, self[key].detach()) for name, key in keys.items()}
        # With its own marks.
        layer.load_state_dict({**layer.state_dict(), **state, **(more or {})}, assign=True)
