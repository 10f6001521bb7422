"""What the classes with torch's interface have in common: constructors, checks, and the state of an LSTM."""

import inspect
import operator
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..check import names as meant
from ..check.forms import Form, autocast_dtypes
from ..check.values import check_int, dims, expectation, is_number, name_of, require, reworded
from ..modules.options import arguments_of_class, defaults_of, not_default
from ..modules.recurrent_levels import RecurrentLevels
from ..modules.saved import add_guards, rename_weights_of_torch
from ..ops.graph import scripted_as, untraced
from ..ops.linear_map import WeightAndBias
from ..ops.names_of_torch import is_any_autocast_enabled
from ..ops.shape import MaybeList

Pair = tuple[Tensor, Tensor]

# Names of weights here, and attributes of torch with its weights and with their names.
_OWN = re.compile(r"(layers\.(\d+)\.(linear|recurrent)(_reverse)?\.(weight|bias))")
_PARTS = {"linear": "ih", "recurrent": "hh"}
OF_TORCH = re.compile(r"_(flat|all)_weights(_names)?|(weight|bias)_(ih|hh|hr)(_l\d+)?(_reverse)?")


# The options of `patch` and `replace` without `cell`: one block of any size, which is torch's GRU itself.
ONE_BLOCK = {"cell": "gru"}
# Torch's classes also take numbers as this flag, and integers of numpy.
CONVERTED = {"bidirectional": bool, "num_layers": operator.index}


def converted(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of a class of torch as those of ours."""
    return {name: CONVERTED[name](value) if name in CONVERTED else value for name, value in arguments.items()}


# The cells that have an option that not all cells have. With the others, it must be its default.
CELLS_WITH = {
    **dict.fromkeys(("normalize", "forget_bias"), ("minlstm",)),
    **dict.fromkeys(("gate", "min_decay"), ("mingru",)),
    "output_gate": ("mingru", "minlstm"),
    "block_size": ("gru",),
}

_raised_as = partial(reworded, names={"input_dims": "input_size", "hidden_dims": "hidden_size"})


# The names of functions that change their first argument: in place, by index, or an attribute.
_WRITES = re.compile(r"__set(item)?__|__i(?!nt|ndex|nvert)\w+__|\w*[^_]_")


class _Computed(Tensor):
    """A value that is computed when it is read, and refuses to be changed, because nothing would read it again."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _WRITES.fullmatch(func.__name__) or isinstance((kwargs or {}).get("out"), cls):
            why = "bias_hh cannot be changed, because most of it is a part of the other bias"
            remedy = (
                "copy all weights by load_state_dict, or let the program change torch's layer before replace(model)"
            )
            raise RuntimeError(f"mingru.drop_in: {why}; {remedy}")
        out = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if isinstance(out, cls):
            stores = [each.untyped_storage().data_ptr() for each in (out, *args) if isinstance(each, cls)]
            return out if stores[0] in stores[1:] else out.as_subclass(Tensor)
        return out


class DropIn(RecurrentLevels):
    """Base class of all: torch's names, repr and types of errors, and 0 as the initial state."""

    _loading = (rename_weights_of_torch, *RecurrentLevels._loading)
    _start, _device_error = 0.0, RuntimeError
    _linear_map = WeightAndBias
    _size_error: type[Exception]
    """What torch raises for a size of 0 and for an input of another dtype."""
    _remedy_for_weights = (
        "load them into torch's layer, and then call mingru.drop_in.replace(model), which keeps a GRU's"
    )

    def __init__(self, input_size: int, hidden_size: int, proj_size: int = 0, **options: Any) -> None:
        name, dtype, dropout = name_of(type(self)), options["dtype"], options.get("dropout")
        with _raised_as({ValueError: self._size_error}):
            check_int(name, "input_size", input_size)
            check_int(name, "hidden_size", hidden_size)
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
            raise RuntimeError(expectation(name, "dtype", "a floating-point dtype", str(dtype)))
        require(name, "dropout", not isinstance(dropout, (bool, str)), "a number from 0 to 1", repr(dropout))
        cell, size, defaults = options["cell"], options["block_size"], arguments_of_class(type(self))
        if size is not None:
            check_int(name, "block_size", size)
        for option in [option for option in options if cell not in CELLS_WITH.get(option, (cell,))]:
            expected, remedy = f"left out because cell is {cell!r}", f"pass cell={CELLS_WITH[option][0]!r} to use it"
            require(name, option, options[option] == defaults[option], expected, repr(options[option]), remedy)
        if "forget_bias" in options:
            given, bias = options["forget_bias"], options["bias"]
            require(name, "forget_bias", is_number(given), "a number", repr(given), error=TypeError)
            is_possible = bias or given == defaults["forget_bias"]
            require(name, "forget_bias", is_possible, "left out because bias is False", repr(given))
            options["forget_bias"] = given if bias and cell == "minlstm" else 0.0
        if cell == "gru" and size is not None:
            # `patch` has one option for layers of all sizes.
            sizes = range(1, min(size, hidden_size) + 1)
            options["block_size"] = max(count for count in sizes if hidden_size % count == 0)
        check_int(name, "proj_size", proj_size, least=0)
        require(name, "proj_size", proj_size < hidden_size, "smaller than hidden_size", str(proj_size))
        is_possible = proj_size == 0 or options["residual"] != "highway"
        require(name, "proj_size", is_possible, "0 because residual is 'highway'", str(proj_size))
        with _raised_as({ValueError: ValueError}):
            super().__init__(input_dims=input_size, hidden_dims=hidden_size, proj_size=proj_size, **options)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.output_dims = self.num_directions * (proj_size or hidden_size)
        add_guards(self, options["device"])

    def _error_for(self, argument: str, problem: str) -> type[Exception]:
        """Return what torch raises, for its own arguments."""
        if argument not in ("x", "h"):
            return super()._error_for(argument, problem)
        if argument == "x" and problem == "dtype" and not is_any_autocast_enabled():
            return self._size_error
        return {"type": AttributeError, "dims": ValueError}.get(problem, RuntimeError)

    def _hint(self, form: Form, value: Any, shape: Sequence[int]) -> str:
        """Return the remedy for an argument of another type or shape."""
        if form.argument == "x":
            return meant.of_ids(value) if isinstance(value, Tensor) else ""
        if form.argument != "h" or not shape:
            of_lstm = "unlike the (h, c) of an LSTM, the state is one tensor"
            return of_lstm if form.argument == "h" and isinstance(value, tuple) else ""
        if value.dim() == len(shape) + 1 and value.shape[-2] == 1:
            return "use hx.squeeze(-2) for a state of mingru.MinGRU"
        if value.dim() == 3 and (value.shape[1], value.shape[0], value.shape[2]) == shape:
            return "batch_first applies to the input only; the state is always (L * D, B, H)"
        return ""

    def _names_of_torch(self) -> dict[str, str]:
        """Return the name of each parameter by that of torch's class, if a GRU has one block, and so its equations.

        The bias of the state has here only the part of the candidate. The rest is in the other bias.
        """
        if type(self).cell != "mingru" or self.cell != "gru" or self.block_size not in (None, self.hidden_size):
            return {}
        end = "" if self.role == "step" else "_l{}"
        found = _OWN.findall(" ".join(name for name, _ in self.named_parameters()))
        return {f"{kind}_{_PARTS[part]}{end.format(at)}{way}": name for name, at, part, way, kind in found}

    @classmethod
    def _like(cls, of_torch: Any, options: dict[str, Any]) -> Any:
        """Return the layer or cell with the arguments of one of torch, of which options replace some.

        If it computes the same, it has the same weights, and trains those that are trained there.
        """
        names, weight = inspect.signature(cls).parameters, next(of_torch.parameters())
        # Torch's cells also take a number as `bias`.
        given = {name: getattr(of_torch, name) for name in names if name in vars(of_torch)}
        given |= {"bias": bool(of_torch.bias), "device": weight.device, "dtype": weight.dtype}
        # Set afterwards, because the constructor would warn again about a dropout without effect.
        dropout = given.pop("dropout", 0.0)
        rnn: Any = cls(**converted(given) | options)
        rnn.dropout = dropout
        if options == ONE_BLOCK and cls.cell == "mingru":
            if not weight.is_meta:
                rnn.load_state_dict(of_torch.state_dict())
            for name, own in rnn._names_of_torch().items():
                rnn.get_parameter(own).requires_grad_(getattr(of_torch, name).requires_grad)
        return rnn.train(of_torch.training)

    def __getattr__(self, name: str) -> Any:
        try:
            if "_hh" not in name:  # which a guard has in its name too
                return super().__getattr__(name)
        except AttributeError:
            if OF_TORCH.fullmatch(name) is None:
                raise
        own = self._names_of_torch().get(name)
        if own is not None:
            weight = self.get_parameter(own)
            return weight if "bias_hh" not in name else F.pad(weight, (2 * self.hidden_size, 0)).as_subclass(_Computed)
        if name in self._buffers:
            return self._buffers[name]
        remedy = "let the program construct torch's layer, and then call mingru.drop_in.replace(model)"
        if name == "_all_weights":
            remedy = "in place of TorchRL's GRUModule and LSTMModule, use those of mingru.integrations.torchrl"
        raise AttributeError(f"{self.name}: no attribute {name!r}, because the weights are others; {remedy}")

    def __setattr__(self, name: str, value: Any) -> None:
        # A parameter that nothing reads would be trained and saved. Torch sets buffers by their names.
        if OF_TORCH.fullmatch(name) and (isinstance(value, torch.nn.Parameter) or name not in self._buffers):
            remedy = "initialize or share the parameters of rnn.layers"
            raise AttributeError(f"{self.name}: {name!r} cannot be set, because the weights are others; {remedy}")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        defaults = defaults_of(self)
        # `self.cell` is more than the argument: it includes the gate.
        kind = self.cell.partition("_")[0]
        cell = "" if kind == defaults["cell"] else f", cell={kind!r}"
        # As in torch, `proj_size` is the first option.
        names = sorted(defaults.keys() - {"cell"}, key=["proj_size", *defaults].index)
        return f"{self.input_size}, {self.hidden_size}{not_default(self, *names)}{cell}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def as_pair(c: Tensor, proj_size: int) -> Pair:
    """Return the pair (h, c) of a state before the first step."""
    return (c.new_zeros(*c.shape[:-1], proj_size) if proj_size > 0 else c.clone()), c


def states_of(name: str, hx: Pair | None, proj_size: int) -> MaybeList:
    """Return the one state that stands for the pair (h, c), in a list."""
    if hx is None:
        return None
    check_pair(name, hx, proj_size)
    return [hx[1] if proj_size > 0 else (hx[0] + hx[1]) / 2]


def _check_scripted_pair(name: str, hx: Pair, proj_size: int) -> None:
    h, c = hx
    num_features = c.size(-1) if proj_size == 0 else proj_size
    if h.shape[:-1] != c.shape[:-1] or h.size(-1) != num_features:
        raise ValueError(f"{name}: hx must be (h, c) with {num_features} features in h, got {h.shape} and {c.shape}")


@scripted_as(_check_scripted_pair)
@untraced
def check_pair(name: str, hx: Any, proj_size: int) -> None:
    """Raise an error if hx is not a pair (h, c) of tensors that belong together."""
    if not isinstance(hx, (tuple, list)):
        asks = "a program that asks isinstance(rnn, nn.LSTM) must ask for (nn.LSTM, mingru.drop_in.LSTM)"
        remedy = meant.of_mask(hx) or f"h alone is passed as (h, h); {asks}, or keep its LSTMs by lstm=False"
        raise TypeError(expectation(name, "hx", "a pair (h, c)", type(hx).__name__, remedy))
    if len(hx) != 2:
        raise RuntimeError(expectation(name, "hx", "a pair (h, c)", f"{len(hx)} values"))
    for each in hx:
        if not isinstance(each, Tensor):
            raise AttributeError(expectation(name, "hx", "a pair (h, c) of tensors", type(each).__name__))
    h, c = hx
    shape = (*c.shape[:-1], proj_size) if proj_size > 0 else tuple(c.shape)
    if h.shape != shape:
        expected = f"(h, c) with h {dims(shape)} because c is {dims(c.shape)}"
        raise RuntimeError(expectation(name, "hx", expected, f"h {dims(h.shape)}"))
    # Under autocast, an encoder's output and new zeros have different dtypes.
    fits = h.dtype == c.dtype or {h.dtype, c.dtype} <= {*autocast_dtypes(c)}
    if not fits or h.device != c.device or not h.is_floating_point():
        got = f"{h.dtype} on {h.device}, and {c.dtype} on {c.device}"
        raise RuntimeError(expectation(name, "hx", "(h, c) of one floating-point dtype, on one device", got))
