"""Compute the `torch.nn.GRU` inside a model by the CPU kernels of this package, where these take less time."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..check.values import check_flag, check_type
from ..ops import autograd, route
from ..ops.backends.native import is_slower
from ..ops.call import Call, Layout, Start, spec_of
from ..ops.cells import BLOCKS
from ..ops.graph import is_compiling
from ..ops.linear_map import are_recomputed
from ..ops.names_of_torch import PREPARE_SCRIPTABLE, len_torch_dispatch_stack
from .twins import SUBCLASS, described, is_recurrent

_FORWARD = nn.modules.GRU.forward


class _Equal(type):
    """A class that is equal to its first base, so that tables of classes, as those of quantization, have it."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__base__

    def __hash__(cls) -> int:
        return hash(cls.__base__)


def _with_own_class(layer: Any) -> Any:
    """Return the layer with torch's class, whose `forward` TorchScript compiles."""
    layer.__class__ = type(layer).__base__
    return layer


class AcceleratedGRU(nn.modules.GRU, metaclass=_Equal):
    """A `torch.nn.GRU` with its own weights, which computes by the kernels where these take less time."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        found = None if is_compiling() else _outputs(self, input, hx)
        return _FORWARD(self, input, hx) if found is None else found


setattr(AcceleratedGRU, PREPARE_SCRIPTABLE, _with_own_class)


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
    """Let each `torch.nn.GRU` of a model compute by the CPU kernels, where these take less time.

    The layers stay the same objects with the same parameters, names, `state_dict`, hooks, states and outputs. Only
    their class becomes a subclass, whose `forward` calls torch's on other devices, in other dtypes, in graphs, under
    autocast and transforms. For few steps, it calls `torch.gru`. A copied or saved model stays accelerated, so a
    program that loads the whole model needs this package: call this with `undo=True` before saving it for others.
    `torch.jit.script` gives the layers their own class again.

    Args:
        model: Model, or a layer itself.
        undo: If True, give the layers their own class again.

    Returns:
        An `Acceleration`, which can be printed. `changed` has (qualified name, layer) for each layer whose class was
        changed, `left` has (qualified name, layer, reason) for each other recurrent layer of torch: layers that were
        changed before, subclasses, scripted layers, LSTMs and cells, which torch computes as fast.

    Raises:
        TypeError: `model` is not a torch.nn.Module, or `undo` is not a bool.

    Examples:
        >>> model = torch.nn.ModuleDict({"rnn": torch.nn.GRU(3, 4), "head": torch.nn.Linear(4, 1)})
        >>> print(mingru.drop_in.accelerate(model))
        rnn: torch.nn.GRU(3, 4) changed
    """
    check_type("accelerate", "model", model, nn.Module, "a torch.nn.Module")
    check_flag("accelerate", "undo", undo)
    # Not `nn.GRU`, which is another class in a block of `patch`.
    kinds: tuple[type, type] = nn.modules.GRU, AcceleratedGRU
    old, new = reversed(kinds) if undo else kinds
    report = Acceleration([], [])
    for name, layer in model.named_modules():
        kind = type(layer)
        if kind is old:
            report.changed.append((name, described(layer)))
            layer.__class__ = new
        elif is_recurrent(layer):
            why = SUBCLASS if isinstance(layer, nn.modules.GRU) else "only GRUs are changed"
            if isinstance(layer, (nn.modules.LSTM, nn.RNNCellBase)):
                why = "torch computes it as fast"
            elif kind is new:
                why = "it has this class already"
            elif isinstance(layer, torch.jit.ScriptModule):
                why = "call accelerate before torch.jit.script or torch.jit.trace"
            report.left.append((name, described(layer), why))
    return report


def _is_possible(x: Tensor, *others: Any) -> bool:
    """Return whether kernels can compute the recurrence of these tensors."""
    fits = x.dtype in (torch.float32, torch.float64) and x.numel() > 0 and not len_torch_dispatch_stack()
    fits = fits and route.is_for_native(x, *others)
    return fits and all(each is None or (each.is_cpu and each.dtype == x.dtype) for each in others)


def _recurrence(x: Tensor, h: Tensor, weights: list[Any], reverse: bool, layout: Layout) -> tuple[Tensor, Tensor]:
    """Compute a layer in one direction, from and to a state (B, H)."""
    of_input, of_state, *biases = weights
    size = of_state.shape[-1]
    own: Any = (biases[0] + F.pad(biases[1][:-size], (0, size)), biases[1][-size:]) if biases else (None, None)
    before = h.unsqueeze(1)
    start = Start(before, before, None, None, of_state, own[1])
    call = Call(spec_of(BLOCKS, "tanh", reverse, 0.0), [x, of_input, own[0]], start, layout)
    keep = not are_recomputed(x, None)
    out, last = autograd.run_kernel("linear_kernel", "native", call, keep)
    return out, last.squeeze(1)


def _outputs(layer: Any, given: Any, hx: Any) -> Any:
    """Return the outputs of a layer, or None if torch's `forward` must compute them, or raise an error."""
    is_packed = isinstance(given, PackedSequence)
    if is_packed:
        batch, steps = int(given.batch_sizes[0]), len(given.batch_sizes)
    elif type(given) is Tensor and given.dim() == 3:
        batch, steps = given.size(1 - layer.batch_first), given.size(int(layer.batch_first))
    else:
        return None
    x, batch_sizes, order, original = given if is_packed else (given, None, None, None)
    # As they are now: `functional_call` and parametrizations do not edit `_flat_weights`.
    weights, directions = layer.all_weights, 2 if layer.bidirectional else 1
    shape = (layer.num_layers * directions, batch, layer.hidden_size)
    fits = x.shape[-1] == layer.input_size and x.dtype == weights[0][0].dtype
    if not fits or not (hx is None or (isinstance(hx, Tensor) and hx.shape == shape)):
        return None
    h = x.new_zeros(shape) if hx is None else layer.permute_hidden(hx, order)
    flat = [each for own in weights for each in own]
    if is_slower(layer.hidden_size, steps, x.dtype, torch.is_grad_enabled()):
        # The rest of torch's `forward` takes a third of the time of a step.
        options = layer.bias, layer.num_layers, layer.dropout, layer.training, layer.bidirectional, layer.batch_first
        return None if is_packed else torch.gru(x, h, flat, *options)
    # Recurrent weights of other shapes would be those of blocks.
    fits = all(own[1].shape == (3 * layer.hidden_size, layer.hidden_size) for own in weights)
    if not fits or not _is_possible(x, hx, *flat):
        return None
    layout = Layout(not (layer.batch_first or is_packed), batch_sizes)
    lasts: list[Tensor] = []
    for index in range(layer.num_layers):
        both = range(index * directions, (index + 1) * directions)
        found = [_recurrence(x, h[at], weights[at], at % directions == 1, layout) for at in both]
        lasts += [last for _, last in found]
        x = found[0][0] if directions == 1 else torch.cat([out for out, _ in found], -1)
        if index < layer.num_layers - 1 and layer.dropout > 0:
            x = F.dropout(x, layer.dropout, layer.training)
    last = layer.permute_hidden(torch.stack(lasts), original)
    return (PackedSequence(x, batch_sizes, order, original) if is_packed else x), last
