"""Compute the `torch.nn.GRU` inside a model by the CPU kernels of this package, where these take less time."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..check import check_flag, check_type, expectation
from ..ops import autograd, route
from ..ops.call import Call, Layout, Spec, Start
from ..ops.cells import BLOCKS
from ..ops.graph import are_eager, is_autocast, is_compiling
from ..ops.linear_map import are_recomputed
from ..ops.private import len_torch_dispatch_stack
from ..ops.route import Choice
from .twins import SUBCLASS, described

_DTYPES = (torch.float32, torch.float64)
# Not `nn.GRU`, which is another class in a block of `patch`.
_GRU, _GRUCell, _LSTMS = nn.modules.GRU, nn.modules.GRUCell, (nn.modules.LSTM, nn.modules.LSTMCell)


def is_faster(features: int, batch: int, steps: int, trains: bool) -> bool:
    """Return whether the kernels take less time than torch for H features.

    For few steps, the calls are most of the time. In training, the kernels compute the products of the states again,
    and torch calls many small operators, which is longer from some steps on.
    """
    if trains:
        return steps >= (4 if features >= 192 or batch >= 32 else 3)
    return steps >= 2 or (features >= 256 and batch <= 8)


class _Equal(type):
    """A class that is equal to its first base, so that tables of classes, as those of quantization, have it."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__base__

    def __hash__(cls) -> int:
        return hash(cls.__base__)


def _with_own_class(layer: Any) -> nn.Module:
    """Return the layer with torch's class, whose `forward` TorchScript compiles."""
    layer.__class__ = type(layer).__base__
    own: nn.Module = layer
    return own


class AcceleratedGRU(_GRU, metaclass=_Equal):
    """A `torch.nn.GRU` with its own weights, which computes by the kernels where these take less time."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        found = None if is_compiling() else _sequence(self, input, hx)
        return super().forward(input, hx) if found is None else found

    __prepare_scriptable__ = _with_own_class


class AcceleratedGRUCell(_GRUCell, metaclass=_Equal):
    """The same for a `torch.nn.GRUCell`."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        found = None if is_compiling() else _step(self, input, hx)
        return super().forward(input, hx) if found is None else found

    __prepare_scriptable__ = _with_own_class


_ACCELERATED: dict[type, type] = {AcceleratedGRU: _GRU, AcceleratedGRUCell: _GRUCell}


class Acceleration(NamedTuple):
    """Printable report of `accelerate`."""

    changed: list[tuple[str, str]]
    """Qualified name and layer of each layer whose class was changed."""
    left: list[tuple[str, str, str]]
    """Qualified name, layer and reason of each other recurrent layer of torch."""

    def __str__(self) -> str:
        lines = [f"{name}: {layer} changed" for name, layer in self.changed]
        return "\n".join(lines + [f"{name}: {layer} left: {why}" for name, layer, why in self.left]) or "no layers"


def accelerate(model: nn.Module, *, undo: bool = False) -> Acceleration:
    """Let each `torch.nn.GRU` and `torch.nn.GRUCell` of a model compute by the CPU kernels, where these are faster.

    The layers stay the same objects with the same parameters, names, `state_dict`, hooks, states and outputs. Only
    their class becomes a subclass, whose `forward` calls torch's on other devices, in other dtypes, in graphs, under
    autocast and transforms, and for sizes for which torch takes less time. A copied or saved model stays accelerated,
    so a program that loads the whole model needs this package: call this with `undo=True` before saving it for others.
    `torch.jit.script` gives the layers their own class again.

    Args:
        model: Model, or a layer itself.
        undo: If True, give the layers their own class again.

    Returns:
        An `Acceleration`, which can be printed. `changed` has (qualified name, layer) for each layer whose class was
        changed, `left` has (qualified name, layer, reason) for each other recurrent layer of torch: layers that are
        changed already, subclasses, scripted layers, and `torch.nn.LSTM`, which is as fast by itself.

    Raises:
        TypeError: `model` is not a torch.nn.Module, or `undo` is not a bool.
        ValueError: `model` is scripted as a whole.

    Examples:
        >>> model = torch.nn.ModuleDict({"rnn": torch.nn.GRU(3, 4), "head": torch.nn.Linear(4, 1)})
        >>> print(mingru.drop_in.accelerate(model))
        rnn: torch.nn.GRU(3, 4) changed
    """
    check_type("accelerate", "model", model, nn.Module, "a torch.nn.Module")
    check_flag("accelerate", "undo", undo)
    if isinstance(model, torch.jit.ScriptModule):
        remedy = "call accelerate for layers outside of scripts; a scripted model computes by torch"
        raise ValueError(expectation("accelerate", "model", "not scripted", "a ScriptModule", remedy))
    wanted = {old: new for new, old in _ACCELERATED.items()} if not undo else _ACCELERATED
    report = Acceleration([], [])
    for name, layer in model.named_modules():
        kind = next((kind for kind in wanted if type(layer) is kind), None)
        if kind is not None:
            report.changed.append((name, described(layer)))
            layer.__class__ = wanted[kind]
        elif isinstance(layer, (nn.RNNBase, nn.RNNCellBase)) or _is_scripted(layer):
            report.left.append((name, described(layer), _why_left(layer, undo)))
    return report


def _why_left(layer: nn.Module, undo: bool) -> str:
    if isinstance(layer, torch.jit.ScriptModule):
        return "call accelerate before torch.jit.script or torch.jit.trace"
    if undo or any(type(layer) is kind for kind in _ACCELERATED):
        return "it is torch's own" if undo else "it was changed before"
    if type(layer) in _LSTMS:
        return "torch computes LSTMs as fast"
    return SUBCLASS if isinstance(layer, (_GRU, _GRUCell)) else "only GRUs are changed"


def _is_scripted(module: Any) -> bool:
    names = [name for name, _ in module.named_parameters(recurse=False)]
    return isinstance(module, torch.jit.ScriptModule) and ("weight_ih" in names or "weight_ih_l0" in names)


def _is_possible(x: Any, h: Any, weights: list[Any]) -> bool:
    """Return whether kernels can compute the recurrence of these tensors, which are checked as torch does."""
    if not (type(x) is Tensor and x.is_cpu and x.dtype in _DTYPES and x.numel() > 0 and route.is_native()):
        return False
    is_seen = is_autocast(x) or len_torch_dispatch_stack()
    if is_seen or not are_eager(x, h, *weights) or not all(isinstance(each, Tensor) for each in weights):
        return False
    given = [*weights, x if h is None else h]
    fits = len(weights[1]) == 3 * weights[1].shape[-1] and x.shape[-1] == weights[0].shape[-1]
    return fits and all(each.is_cpu and each.dtype == x.dtype for each in given)


def _trains(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)


def _recurrence(x: Tensor, h: Tensor, weights: list[Tensor], reverse: bool, layout: Layout) -> tuple[Tensor, Tensor]:
    """Compute a layer in one direction, from and to a state (B, H)."""
    of_input, of_state, *biases = weights
    bias = own = None
    if biases:
        features = of_state.shape[-1]
        bias, own = biases[0] + F.pad(biases[1][: 2 * features], (0, features)), biases[1][2 * features :]
    before = h.unsqueeze(1)
    start = Start(before, before, None, None, of_state, own)
    call = Call(Spec(BLOCKS, "tanh", reverse), [x, of_input, bias], start, layout)
    keep = not are_recomputed(x, None)
    out, last = autograd.run_kernel("linear_kernel", Choice("native", False), call, keep)
    return out, last.squeeze(1)


def _sequence(layer: Any, given: Any, hx: Any) -> Any:
    """Return the outputs of a layer by the kernels, or None if torch's own code must compute them."""
    is_packed = isinstance(given, PackedSequence)
    x, batch_sizes, order, original = given if is_packed else (given, None, None, None)
    weights, directions = layer._flat_weights, 2 if layer.bidirectional else 1
    if not _is_possible(x, hx, weights) or x.dim() != (2 if is_packed else 3):
        return None
    batch, steps = x.shape[:2] if layer.batch_first else (x.shape[1], x.shape[0])
    if batch_sizes is not None:
        batch, steps = int(batch_sizes[0]), len(batch_sizes)
    shape = (layer.num_layers * directions, batch, layer.hidden_size)
    trains = _trains(x, hx, *weights)
    if (hx is not None and hx.shape != shape) or not is_faster(layer.hidden_size, batch, steps, trains):
        return None
    h = x.new_zeros(shape) if hx is None else layer.permute_hidden(hx, order)
    layout = Layout(not (layer.batch_first or is_packed), batch_sizes)
    count, lasts = 4 if layer.bias else 2, []
    for index in range(layer.num_layers):
        outs = []
        for at in range(index * directions, (index + 1) * directions):
            own = weights[at * count : (at + 1) * count]
            out, last = _recurrence(x, h[at], own, at % directions == 1, layout)
            outs.append(out)
            lasts.append(last)
        x = outs[0] if directions == 1 else torch.cat(outs, -1)
        if index < layer.num_layers - 1 and layer.dropout > 0:
            x = F.dropout(x, layer.dropout, layer.training)
    last = layer.permute_hidden(torch.stack(lasts), original)
    return (PackedSequence(x, batch_sizes, order, original) if is_packed else x), last


def _step(cell: Any, x: Any, h: Tensor | None) -> Tensor | None:
    """Return the next state of a cell by the kernels, or None."""
    weights = [cell.weight_ih, cell.weight_hh, *([cell.bias_ih, cell.bias_hh] if cell.bias else [])]
    shape = (len(x), cell.hidden_size) if isinstance(x, Tensor) and x.dim() == 2 else None
    if shape is None or (h is not None and h.shape != shape) or not _is_possible(x, h, weights):
        return None
    if not is_faster(cell.hidden_size, len(x), 1, _trains(x, h, *weights)):
        return None
    before = x.new_zeros(shape) if h is None else h
    return _recurrence(x.unsqueeze(1), before, weights, False, Layout(False))[1]
