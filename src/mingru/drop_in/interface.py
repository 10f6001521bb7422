"""What the classes of our own cells with torch's interface have in common: constructors, states, and the pair."""

import re
from typing import Any

from torch import Tensor, nn

from ..check import names as meant
from ..check.values import check_int, expectation, name_of, require, reworded
from ..modules.options import arguments_of_class, defaults_of, not_default
from ..modules.saved import add_guards
from ..modules.stacked import Recurrent
from ..ops.linear_map import WeightAndBias
from ..ops.modes import scripted_as, untraced
from ..ops.shape import MaybeList

Pair = tuple[Tensor, Tensor]

# Attributes of torch with its weights and with their names.
OF_TORCH = re.compile(r"_?(flat|all)_weights(_names)?|(weight|bias)_(ih|hh|hr)(_l\d+)?(_reverse)?")
# The cells that have an option that not all cells have. With the others, it must be its default.
CELLS_WITH = {
    **dict.fromkeys(("normalize", "forget_bias"), ("minlstm",)),
    **dict.fromkeys(("gate", "min_decay"), ("mingru",)),
    "output_gate": ("mingru", "minlstm"),
    "block_size": ("gru",),
}


class DropIn(Recurrent):
    """Base class of all: torch's names and repr, and 0 as the initial state."""

    cell, _start = "mingru", 0.0
    _linear_map = WeightAndBias
    _remedy_for_weights = "keep torch's layer, which mingru.drop_in.accelerate(model) computes in less time"
    has_pair = False
    """Whether the state is the pair of an LSTM."""
    __call__: Any

    def __init__(self, input_size: int, hidden_size: int, proj_size: int = 0, **options: Any) -> None:
        name, cell, defaults = name_of(type(self)), options["cell"], arguments_of_class(type(self))
        check_int(name, "input_size", input_size)
        check_int(name, "hidden_size", hidden_size)
        for option in [option for option in options if cell not in CELLS_WITH.get(option, (cell,))]:
            expected, remedy = f"left out because cell is {cell!r}", f"pass cell={CELLS_WITH[option][0]!r} to use it"
            require(name, option, options[option] == defaults[option], expected, repr(options[option]), remedy)
        given, size = options["forget_bias"], options["block_size"]
        has_default = given == defaults["forget_bias"]
        options["forget_bias"] = 0.0 if has_default and (cell != "minlstm" or not options["bias"]) else given
        if size is not None:
            check_int(name, "block_size", size)
            # `patch` has one option for layers of all sizes.
            options["block_size"] = max(n for n in range(1, min(size, hidden_size) + 1) if hidden_size % n == 0)
        check_int(name, "proj_size", proj_size, least=0)
        require(name, "proj_size", proj_size < hidden_size, "smaller than hidden_size", str(proj_size))
        is_possible = proj_size == 0 or options["residual"] != "highway"
        require(name, "proj_size", is_possible, "0 because residual is 'highway'", str(proj_size))
        with reworded({"input_dims": "input_size", "hidden_dims": "hidden_size"}):
            super().__init__(input_dims=input_size, hidden_dims=hidden_size, proj_size=proj_size, **options)
        self.input_size, self.hidden_size, self.forget_bias = input_size, hidden_size, float(given)
        self.output_dims = self.num_directions * (proj_size or hidden_size)
        add_guards(self, options["device"])

    def initial(self, batch: int) -> Any:
        """Return the state, or the pair, of a batch before the first step."""
        c = super().initial(batch)
        zeros = c.new_zeros(*c.shape[:-1], self.proj_size)
        return c if not self.has_pair else (zeros if self.proj_size > 0 else c.clone(), c)

    def __getattr__(self, name: str) -> Any:
        if OF_TORCH.fullmatch(name) is None or name in self._buffers:
            return super().__getattr__(name)
        remedy = "let the program construct torch's layer, and then call mingru.drop_in.replace(model, cell=...)"
        raise AttributeError(f"{self.name}: no attribute {name!r}, because the weights are others; {remedy}")

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        # A parameter that nothing reads would be trained and saved. Torch sets buffers by their names.
        if OF_TORCH.fullmatch(name) and (isinstance(value, nn.Parameter) or name not in self._buffers):
            remedy = "initialize or share the parameters of rnn.layers"
            raise AttributeError(f"{self.name}: {name!r} cannot be set, because the weights are others; {remedy}")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        # `self.cell` is more than the argument: it includes the gate.
        cell = self.cell.partition("_")[0]
        # As in torch, `proj_size` is the first option.
        names = sorted(defaults_of(self).keys() - {"cell"}, key=["proj_size", *defaults_of(self)].index)
        return f"{self.input_size}, {self.hidden_size}{not_default(self, *names)}, cell={cell!r}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def states_of(name: str, hx: Pair | None, proj_size: int) -> MaybeList:
    """Return the one state that stands for the pair (h, c), in a list."""
    if hx is None:
        return None
    check_pair(name, hx, proj_size)
    return [hx[1] if proj_size > 0 else (hx[0] + hx[1]) / 2]


def _check_scripted_pair(name: str, hx: Pair, proj_size: int) -> None:
    h, c = hx
    expected = list(c.shape) if proj_size == 0 else list(c.shape[:-1]) + [proj_size]  # noqa: RUF005
    if list(h.shape) != expected:
        raise ValueError(f"{name}: hx must be (h, c) with h {expected}, got h {list(h.shape)}")


@scripted_as(_check_scripted_pair)
@untraced
def check_pair(name: str, hx: Pair, proj_size: int) -> None:
    """Raise an error if hx is not a pair (h, c) of tensors that belong together."""
    is_pair = isinstance(hx, (tuple, list)) and len(hx) == 2
    if not is_pair or not all(isinstance(each, Tensor) and each.is_floating_point() for each in hx):
        asks = "a program that asks isinstance(rnn, nn.LSTM) must ask for mingru.drop_in.LSTMLike"
        remedy = meant.of_mask(hx) or f"h alone is passed as (h, h); {asks}, or keep its LSTMs by lstm=False"
        raise TypeError(expectation(name, "hx", "a pair (h, c) of floating-point tensors", type(hx).__name__, remedy))
    _check_scripted_pair(name, hx, proj_size)
