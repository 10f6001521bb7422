"""The plan of a module: what it computes, asked once. Norms, linear maps, recurrences and residuals.

A `LayerPlan` records what the `forward` of a layer does; see `ops.traced`. All modules inside are of known classes,
whose `forward` has no other effect. After any change of a module or its submodules, the plan is made again. Without
gradients, one operator computes all instructions, and checks the sizes. With gradients, or on a GPU, `_trained`
computes them one by one, each recurrence by one autograd function.

`run` returns None whenever the modules must be called one by one: with hooks, autocast, transforms, graph capture, a
refused module or unusual arguments. If an argument is wrong, that ordinary call raises the error.
"""

import functools
import inspect
import itertools
import operator
import weakref
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import autograd, linear_map, names_of_torch, route
from ..ops.backends.triton import CELLS as CELLS_OF_TRITON
from ..ops.call import Context, Layout
from ..ops.causal_conv import causal_conv
from ..ops.layout import in_reverse
from ..ops.linear_map import FORWARDS, HOOKS, RecurrentMap
from ..ops.modes import is_compiling, is_device_context, mode_of
from ..ops.shape import MaybeList, MaybeTensor, Outputs, States
from ..ops.traced import Direction, Recording, Row, State, Traced

_DTYPES = (torch.float32, torch.float64)
_OF_GPU = "triton", "triton alone"
_CALL = nn.Module.__call__
_forward_of, _shape_of, _dtype_of, _is_cpu = map(operator.attrgetter, ("forward", "shape", "dtype", "is_cpu"))
_device_of = operator.attrgetter("device")
FORWARDS.update({cls: cls.forward for cls in (nn.GELU, nn.Identity, nn.ModuleList, nn.Sequential, RecurrentMap)})


class Planned(Protocol):
    """What a plan asks of a layer or a cell."""

    role: str
    input_dims: int
    num_states: int
    batch_first: bool
    _plans: "tuple[LayerPlan, ...]"

    def modules(self) -> Iterator[nn.Module]: ...
    def _trace(self, x: Traced, h: list[State]) -> tuple[Traced, list[State]]: ...
    def _state_shapes(self, batch: int) -> list[tuple[int, ...]]: ...
    def default_states(self, x: Tensor, batch: int) -> list[Tensor]: ...


def plannable(cls: type[nn.Module]) -> type[nn.Module]:
    """Register a class whose `forward` may be recorded, because it has no other effect."""
    FORWARDS[cls] = cls.forward
    return cls


@functools.cache
def _methods(cls: Any) -> frozenset[str]:
    """Return the names for which an attribute of an instance would stand in for a method of its class."""
    return frozenset(name for name in dir(cls) if callable(getattr(cls, name, None)))


# Functions to which a name is given as a string, and types of notes that need no care before they change.
_BY_NAME, _CONSTANTS = {"getattr", "setattr", "vars"}, {bool, int, float, str, type(None)}


@functools.cache
def _names(cls: type) -> frozenset[str]:
    """Return all attributes that the code of a class may name. Another one is a note: a program set it for itself."""
    found = {*dir(cls)}
    values = [getattr(value, "fget", value) for each in cls.__mro__ for value in vars(each).values()]
    codes = [inspect.unwrap(each).__code__ for each in values if hasattr(each, "__code__")]
    for code in codes:
        num_arguments = code.co_argcount + code.co_kwonlyargcount if code.co_name == "__init__" else 0
        found |= {*code.co_names, *code.co_varnames[:num_arguments]}
        if not _BY_NAME.isdisjoint(code.co_names):
            found |= {each for each in code.co_consts if isinstance(each, str)}
        codes += [each for each in code.co_consts if inspect.iscode(each)]
    return frozenset(found)


def _record(module: Planned, modules: list[nn.Module], recorded: Recording) -> tuple[list[Row], list[float]]:
    """Record a module, and return the code and the numbers of the operator; refuse modules of unknown classes."""
    for each in modules:
        cls: Any = type(each)
        recorded.require(cls in FORWARDS, each._compiled_call_impl is None, not any(map(vars(each).get, HOOKS)))
        recorded.require(_methods(cls).isdisjoint(vars(each)))
    states = [(index, 0) for index in range(module.num_states)]
    # Also inside of what a device context is spared, because `Traced` sees operations by their functions.
    with names_of_torch.EnableTorchFunction():
        _, found = module._trace(Traced(recorded), states)
    recorded.require(found == states)
    return recorded.finish()


def _forget(plan: "weakref.ref[LayerPlan]", _: object) -> None:
    found = plan()
    if found is not None:
        found.forget()


class LayerPlan:
    """The instructions of a module, and everything from which they were made.

    It keeps no module and no weight alive: it takes the weights from the modules that there are, and forgets everything
    when one of these modules is freed.
    """

    def __init__(self, module: Planned) -> None:
        # For the batch size of the last call.
        self._state_shapes: dict[int, list[tuple[int, ...]]] = {}
        self._type: type | None = type(module)
        modules = list(module.modules())
        owned: list[tuple[Any, str]] = [(each._parameters, name) for each in modules for name in each._parameters]
        recorded = Recording({id(place[name]): at for at, (place, name) in enumerate(owned)}, not module.batch_first)
        try:
            rows, numbers = _record(module, modules, recorded)
            self.code = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 4)
            self.numbers = torch.tensor(numbers, dtype=torch.float64, device="cpu")
            self.is_supported = True
        except Exception:
            # Refused, or an attribute has a wrong type: the ordinary call then raises the error.
            self.is_supported, recorded = False, Recording({}, False)
        self.steps, used = recorded.steps, recorded.used
        scans, names = [of[0] for name, of, _ in self.steps if name == "scan"], {name for name, *_ in self.steps}
        self.is_bidirectional = any(len(directions) == 2 for directions in scans)
        # Whether one operator can compute all, and whether all are recurrences.
        self.is_operator = "dropout" not in names
        self.is_scan = names <= {"scan", "dropout"} and not any(first.norm for first, *_ in scans)
        # Whether recurrences with gradients, and the kernels of GPUs, compute them.
        self.is_trained = not any(getattr(each, "checkpoint", False) and each.training for each in modules)
        specs = [each.spec for directions in scans for each in directions]
        self.is_for_gpu = all(spec.cell in CELLS_OF_TRITON and not spec.output_gate for spec in specs)
        # The attributes of each module; copies of them without the notes; the names of notes, by index of the module.
        watched = [each for each in modules if type(each) is not nn.ModuleList]
        self._now, self._types_now = list(map(vars, watched)), list(map(type, watched))
        self._then, self._notes = list(map(dict, self._now)), dict[int, set[str]]()
        self._finds_notes()
        self.hooks = list(itertools.chain(*(map(each.get, HOOKS, repeat({})) for each in self._now)))
        # No other module gets more modules and keeps its attributes.
        self._lists = [each._modules for each in modules if type(each) in (nn.ModuleList, nn.Sequential)]
        self._lengths = list(map(len, self._lists))
        # The places of all parameters, first of the weights, and of all modules. The ids and types tell whether the
        # same is there, because the plan keeps neither modules nor weights.
        self._num_weights = len(used)
        owned = [owned[at] for at in (*used, *{*range(len(owned))}.difference(used))]
        children = [(each._modules, name) for each in modules for name in each._modules]
        children.sort(key=lambda place: place[0][place[1]] is None)
        found = [place[name] for place, name in children if place[name] is not None]
        # The modules among them, and whose attributes these must be.
        self._modules = slice(len(owned), len(owned) + len(found))
        self._attributes = [vars(module), *map(vars, found)]
        owned += children
        owned += [(vars(each), "_modules") for each in modules if type(each) is nn.ModuleList]
        owned += [(vars(each), "_parameters") for each in modules if each._parameters]
        self._places = tuple(zip(*owned, strict=True))
        values: list[Any] = list(map(operator.getitem, *self._places)) if self._places else []
        self._ids, self._types = list(map(id, values)), list(map(type, values))
        # Recurrences take weights of these shapes; of other modules, torch raises the errors.
        self._shapes = list(map(_shape_of, values[: self._num_weights]))
        classes = {*map(type, modules)}
        self._classes = [cls for cls in FORWARDS if cls in classes]
        self._forwards = [FORWARDS[cls] for cls in self._classes]
        own = weakref.ref(self)
        self._references = [weakref.ref(each, functools.partial(_forget, own)) for each in modules[1:]]

    def forget(self) -> None:
        """Forget all modules, after which the plan is made again."""
        self._type, self._places, self.hooks, self._lists = None, (), [], []
        self._now, self._then, self._types_now, self._notes, self._attributes = [], [], [], {}, []

    def weights_now(self, module: Planned) -> list[Tensor] | None:
        """Return the weights of the instructions, or None if something has changed."""
        try:
            if self._is_as_then() and type(module) is self._type:
                values: list[Any] = list(map(operator.getitem, *self._places))
                is_same = list(map(id, values)) == self._ids and list(map(type, values)) == self._types
                own = map(vars, (module, *values[self._modules]))
                if is_same and all(map(operator.is_, own, self._attributes)):
                    return values[: self._num_weights] if list(map(len, self._lists)) == self._lengths else None
        except Exception:
            pass  # values that cannot be compared are new, or a parameter was deleted
        return None

    def _is_as_then(self) -> bool:
        """Return whether no attributes but notes have changed."""
        now: list[Any] = self._now
        if self._notes:
            now = [*now]
            for index, names in self._notes.items():
                now[index] = now[index].copy()
                for name in names:
                    now[index].pop(name, None)
        return now == self._then or (self._finds_notes() and self._is_as_then())

    def _finds_notes(self) -> bool:
        """Return whether there are more notes. They are then neither compared nor kept alive."""
        found = False
        for index, (now, then, cls) in enumerate(zip(self._now, self._then, self._types_now, strict=True)):
            for name in (now.keys() | then.keys()) - _names(cls) - self._notes.get(index, set()):
                value = now.get(name, self)
                if type(value) not in _CONSTANTS or value != then.get(name, self):
                    self._notes.setdefault(index, set()).add(name)
                    then.pop(name, None)
                    found = True
        return found

    def is_open(self) -> bool:
        """Return whether the instructions compute what the modules would compute if they were called now."""
        return (
            self.is_supported
            and list(map(_forward_of, self._classes)) == self._forwards
            and nn.Module.__call__ is _CALL
        )

    def can_train(self, x: Tensor, backend: str, weights: list[Tensor]) -> bool:
        """Return whether recurrences of x with gradients take the weights that there are now."""
        fits = self.is_trained and (backend == "native" or self.is_for_gpu) and _fit(x, weights)
        return fits and list(map(_shape_of, weights)) == self._shapes

    def takes(self, module: Planned, states: list[Tensor], batch: int) -> bool:
        """Return whether a module takes these states."""
        if type(states) not in (list, tuple):
            return False
        shapes = self._state_shapes.get(batch)
        if shapes is None:
            shapes = module._state_shapes(batch)
            self._state_shapes = {batch: shapes}
        return list(map(type, states)) == [Tensor] * len(shapes) and list(map(_shape_of, states)) == shapes


def current_plan(module: Planned) -> tuple[LayerPlan, list[Tensor]] | None:
    """Return the plan of a module, made again if it has changed, and its weights; or None if a class is patched."""
    # In a slot of the module: plans are freed with it, and are no part of its copies and pickles. The last two stay,
    # because many programs switch between `train()` and `eval()` all the time.
    plans = getattr(module, "_plans", ())
    for plan in plans:
        # The program of a hook may set weights before each call.
        if any(plan.hooks):
            return None
        weights = plan.weights_now(module)
        if weights is not None:
            return plan, weights
    if nn.Module.__call__ is not _CALL or any(cls.forward is not forward for cls, forward in FORWARDS.items()):
        return None
    plan = LayerPlan(module)
    module._plans = (plan, *plans[:1])
    return plan, plan.weights_now(module) or []


def _fit(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Return whether tensors have the dtype and the device of x."""
    are_there = all(map(_is_cpu, tensors)) if x.is_cpu else {*map(_device_of, tensors)} <= {x.device}
    return are_there and {*map(_dtype_of, tensors)} == {x.dtype}


def _backend_of(x: Any) -> str | None:
    """Return whose kernels compute x, if nothing sees operations: no trace, transform, dispatch mode or hook."""
    is_seen = names_of_torch.len_torch_dispatch_stack() or names_of_torch.has_any_global_hook()
    return route.kernels_for(x) if type(x) is Tensor and mode_of(x).is_eager and not is_seen else None


def skips_padding(module: Planned, x: Tensor, *others: MaybeTensor) -> bool:
    """Return whether a module computes only recurrences of linear maps, by kernels that take lengths."""
    is_plain = all(each is None or type(each) is Tensor for each in others) and _backend_of(x) == "native"
    found = current_plan(module) if is_plain else None
    if found is None:
        return False
    plan, weights = found
    return plan.is_scan and plan.is_open() and plan.can_train(x, "native", weights)


# None without the kernels.
_operator: Any = getattr(getattr(torch.ops.mingru, "inference", None), "default", None)


def run(
    module: Planned, x: Any, states: Any, reset: MaybeTensor, time_first: bool, dt: MaybeTensor = None
) -> Outputs | None:
    """Return the output and the last states of a module, or None if it must be called in the ordinary way."""
    if is_compiling():
        return None
    if type(x) is Traced:
        x.recording.require(module.role == "sequence", time_first == x.recording.time_first)
        return module._trace(x, states)  # type: ignore[return-value]
    if not names_of_torch.is_torch_function_mode_enabled():
        return _run(module, x, states, reset, time_first, dt)
    if not is_device_context():
        return None
    # Otherwise the context would be called for every attribute of a tensor.
    with names_of_torch.DisableTorchFunction():
        return _run(module, x, states, reset, time_first, dt)


def _run(
    module: Planned, x: Tensor, states: MaybeList, reset: MaybeTensor, time_first: bool, dt: MaybeTensor
) -> Outputs | None:
    backend = _backend_of(x)
    # On a GPU, each recurrence is one kernel without gradients too.
    trains = torch.is_grad_enabled() or backend in _OF_GPU
    if backend is None or x.dtype not in _DTYPES or (trains and dt is not None):
        return None
    found, shape = current_plan(module), x.shape
    if found is None:
        return None
    plan, weights = found
    if not plan.is_open() or len(shape) != (2 if module.role == "step" else 3) or shape[-1] != module.input_dims:
        return None
    if (0 in shape or not plan.can_train(x, backend, weights)) if trains else not plan.is_operator:
        return None
    time_first = time_first and len(shape) == 3  # a cell has no time dimension
    batch = shape[1 if time_first else 0]
    if states is None:
        states = module.default_states(x, batch)
    elif not plan.takes(module, states, batch):
        return None
    initial_states = [] if reset is None else module.default_states(x, batch)
    resets = times = []
    if reset is not None or dt is not None:
        if not all(each is None or (type(each) is Tensor and each.shape == shape[:-1]) for each in (reset, dt)):
            return None
        if module.role == "step":
            reset, dt = (None if each is None else each.unsqueeze(-1) for each in (reset, dt))
        start = Context(x, x, reset, dt)
        others = in_reverse(start, Layout(time_first)) if plan.is_bidirectional else start
        # As both directions see them.
        pairs = zip(start[2:4], others[2:4], strict=True)
        resets, times = ([] if pair[0] is None else [*pair] for pair in pairs)
    if trains:
        return _trained(plan, backend, weights, x, states, initial_states, resets, time_first)
    try:
        out, last = _operator(x, weights, states, initial_states, resets, times, plan.code, plan.numbers, time_first)
    except NotImplementedError:  # a tensor on another device
        return None
    return (out, last) if last else None


def _trained(
    plan: Any, backend: str, weights: Any, x: Any, h: Any, initials: Any, resets: Any, time_first: bool
) -> Outputs | None:
    """Compute the instructions one by one, or return None for tensors that the ordinary call refuses."""
    if not _fit(x, [*h, *initials]) or any((y.dtype, y.device) != (torch.bool, x.device) for y in resets):
        return None
    befores, starts = [*map(_layers_of, h)], [*map(_layers_of, initials)]
    kept: list[Tensor] = []
    found: list[Any] = [[] for _ in h]
    w = [*weights, None]
    x = x.unsqueeze(1) if x.dim() == 2 else x
    for name, of, at in plan.steps:
        if name == "scan":
            directions, state = of
            if any(w[own.map[0]].shape[1:] != x.shape[2:] for own in directions):
                return None
            outs = []
            for own, reset in zip(directions, resets or [None, None], strict=False):
                start = None if reset is None else next(starts[state])
                out, last = _direction(own, x, w, (next(befores[state]), start, reset), backend, time_first)
                outs.append(out)
                found[state].append(last)
            x = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
        elif name == "keep":
            kept.append(x)
        elif name in ("add", "add_linear"):
            before = kept.pop()
            before = before if of is None else of(before, w[at[0]], w[at[1]])
            if before.shape != x.shape:
                return None
            # x is the first, because a sum has the strides of the first, and outputs are contiguous.
            x = x + before
        elif name == "causal_conv":
            weight, bias = w[at[0]], w[at[1]]
            reset = resets[0] if resets else None
            x, found[of] = causal_conv(x, weight, bias, h[of], reset, None, len(weight) - 1, True)
        else:
            x = of(x, *[w[index] for index in at])
    return x, [_state_of(*each) for each in zip(found, h, strict=True)]


def _direction(own: Direction, x: Tensor, w: list[Any], states: Any, backend: str, time_first: bool) -> States:
    """Compute one direction with the weights w, from the state before, the initial state and resets."""
    (at, at_bias), (at_recurrent, at_other) = own.map, own.recurrent
    linear, weight, bias = (w[at], w[at_bias]), w[at_recurrent], w[at_other]
    if own.norm is not None:
        at, at_bias = own.norm.weights
        of_norm = w[at], w[at_bias]
        if backend == "native":
            linear = linear_map.map_with_norm(*linear, *of_norm)
        else:
            x = own.norm(x, *of_norm)
    given, call = [*states, None, weight, bias, None, None, x, *linear], own.calls.get((backend, x.dtype, time_first))
    if call is None:
        is_native, spec = backend == "native", own.spec
        if own.norm is not None and is_native:
            spec = linear_map.with_norm(spec, own.norm.kind, own.norm.eps, x.dtype)
        keep = not (linear_map.are_recomputed(spec.cell, x, own.recompute) if is_native else own.recompute)
        call = autograd.KernelCall("linear_kernel", backend, spec, time_first, keep)
        own.calls[backend, x.dtype, time_first] = call
    if own.norm is None and weight is not None and 3 * weight.shape[1] == len(weight):
        # A GRU of torch, whose cell takes a third of the time of the kernel with 512 features.
        if x.shape[0 if time_first else 1] == 1:
            return _cell_of_torch(given, time_first)
    found: States = autograd.apply(call, *given)
    return found


def _cell_of_torch(given: list[Any], time_first: bool) -> States:
    """Compute one step of a GRU by the cell of torch."""
    h, start, reset, _, weight, bias, _, _, x, *linear = given
    if start is not None and reset is not None:
        h = torch.where(reset.view(-1, 1, 1), start, h)
    of_state = None if bias is None else F.pad(bias, (2 * len(bias), 0))
    step = torch.gru_cell(x.flatten(0, 1), h.squeeze(1), linear[0], weight, linear[1], of_state)
    # Two tensors, because what a program does with one must not show in the other.
    return torch.stack([step], 0 if time_first else 1), torch.stack([step], 1)


def _layers_of(state: Tensor) -> Iterator[Tensor]:
    """Return the state (B, 1, *) of each layer and direction."""
    whole = state if state.dim() == 4 else state.unsqueeze(-2)
    return iter([whole] if state.dim() == 2 else whole.unbind())


def _state_of(found: Any, like: Tensor) -> Tensor:
    """Return the last states of all layers as one new tensor, which is no view. That of a convolution is one."""
    if isinstance(found, Tensor):
        return found
    whole = found[0] if like.dim() == 2 else torch.stack(found)
    return whole if like.dim() == 4 else names_of_torch.unsafe_view(whole, like.shape)
