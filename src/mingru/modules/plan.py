"""The plan of a module: what it computes, asked once. Norms, linear maps, recurrences and residuals.

A `LayerPlan` records what the `forward` of a layer does; see `ops.recorded`. All modules inside are of known classes,
whose `forward` has no other effect. After any change of a module or its submodules, the plan is made again. One
operator computes all instructions, and checks the sizes.

`run` returns None whenever the modules must be called one by one: if an argument or a weight needs a gradient, with
hooks, autocast, transforms or graph capture, a refused module or unusual arguments. If an argument is wrong, that
ordinary call raises the error.
"""

import functools
import inspect
import itertools
import operator
import weakref
from collections.abc import Iterator
from itertools import repeat
from types import NoneType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..ops import names_of_torch
from ..ops.backends.native import rounds_products
from ..ops.call import Context, Layout
from ..ops.layout import in_reverse
from ..ops.linear_map import FORWARDS, HOOKS, RecurrentMap
from ..ops.modes import is_compiling, is_device_context, mode_of
from ..ops.recorded import Recorded, Recording, Row, State
from ..ops.route import is_native
from ..ops.shape import MaybeList, MaybeTensor, Outputs

_DTYPES = (torch.float32, torch.float64)
_CALL = nn.Module.__call__
_forward_of, _shape_of, _dtype_of, _is_cpu = map(operator.attrgetter, ("forward", "shape", "dtype", "is_cpu"))
_requires_grad = operator.attrgetter("requires_grad")
FORWARDS.update({cls: cls.forward for cls in (nn.GELU, nn.Identity, nn.ModuleList, nn.Sequential, RecurrentMap)})


class Planned(Protocol):
    """What a plan asks of a layer or a cell."""

    role: str
    input_dims: int
    num_states: int
    batch_first: bool
    _plans: "tuple[LayerPlan, ...]"

    def modules(self) -> Iterator[nn.Module]: ...
    def _record(self, x: Recorded, h: list[State]) -> tuple[Recorded, list[State]]: ...
    def _state_shapes(self, batch: int) -> list[tuple[int, ...]]: ...
    def default_states(self, x: Tensor, batch: int) -> list[Tensor]: ...
    def _weight_of_x(self) -> Tensor | None: ...
    def _check_all(
        self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor
    ) -> None: ...
    def _compute(
        self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor
    ) -> Outputs: ...


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


def _code_of(module: Planned, modules: list[nn.Module], recorded: Recording) -> tuple[list[Row], list[float]]:
    """Record a module, and return the code and the numbers of the operator; refuse modules of unknown classes."""
    for each in modules:
        cls: Any = type(each)
        recorded.require(cls in FORWARDS, each._compiled_call_impl is None, not any(map(vars(each).get, HOOKS)))
        recorded.require(_methods(cls).isdisjoint(vars(each)))
    states = [(index, 0) for index in range(module.num_states)]
    # Also inside of what a device context is spared, because `Recorded` sees operations by their functions.
    with names_of_torch.EnableTorchFunction():
        _, found = module._record(Recorded(recorded), states)
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
            rows, numbers = _code_of(module, modules, recorded)
            self.code = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 4)
            self.numbers = torch.tensor(numbers, dtype=torch.float64, device="cpu")
            self.is_supported = True
        except Exception:
            # Refused, or an attribute has a wrong type: the ordinary call then raises the error.
            self.is_supported, recorded = False, Recording({}, False)
        steps, used = recorded.steps, recorded.used
        scans, names = [of[0] for name, of, _ in steps if name == "scan"], {name for name, *_ in steps}
        self.is_bidirectional = any(len(directions) == 2 for directions in scans)
        # Whether one operator can compute all, and whether all are recurrences.
        self.is_operator = "dropout" not in names
        self.is_scan = names <= {"scan", "dropout"} and not any(first.norm for first, *_ in scans)
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
        # Recurrences of padded sequences take weights of these shapes.
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

    def skips_padding(self, x: Tensor, weights: list[Tensor]) -> bool:
        """Return whether kernels that take lengths compute all instructions with the weights that there are now."""
        fits = all(map(_is_cpu, weights)) and {*map(_dtype_of, weights)} == {x.dtype}
        return fits and self.is_scan and self.is_open() and list(map(_shape_of, weights)) == self._shapes

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


def _is_for_native(x: Any) -> bool:
    """Return whether kernels of the CPU compute x, and nothing sees operations: no trace, transform, mode or hook."""
    is_seen = names_of_torch.len_torch_dispatch_stack() or names_of_torch.has_any_global_hook()
    return type(x) is Tensor and not is_seen and mode_of(x).is_eager and is_native(x)


def skips_padding(module: Planned, x: Tensor, *others: MaybeTensor) -> bool:
    """Return whether a module computes only recurrences of linear maps, by kernels that take lengths."""
    is_plain = all(each is None or type(each) is Tensor for each in others) and _is_for_native(x)
    found = current_plan(module) if is_plain else None
    return found is not None and found[0].skips_padding(x, found[1])


def _is_trained(module: Planned, x: Any) -> bool:
    """Return whether x or the first weight needs a gradient, which is asked first, because training is usual."""
    weight = module._weight_of_x()
    return weight is None or weight.requires_grad or getattr(x, "requires_grad", True)


# None without the kernels.
_operator: Any = getattr(getattr(torch.ops.mingru, "inference", None), "default", None)


def run(
    module: Planned, x: Any, states: Any, reset: MaybeTensor, time_first: bool, dt: MaybeTensor = None
) -> Outputs | None:
    """Return the output and the last states of a module, or None if it must be called in the ordinary way."""
    if type(x) is Recorded:
        x.recording.require(module.role == "sequence", time_first == x.recording.time_first)
        return module._record(x, states)  # type: ignore[return-value]
    if is_compiling():
        return None
    if not names_of_torch.is_torch_function_mode_enabled():
        return _run(module, x, states, reset, time_first, dt)
    if not is_device_context():
        return None
    # Otherwise the context would be called for every attribute of a tensor.
    with names_of_torch.DisableTorchFunction():
        done = _run(module, x, states, reset, time_first, dt)
        return _run_known(module, x, states, reset, dt) if done is None and torch.is_grad_enabled() else done


def _run_known(module: Planned, x: Tensor, states: MaybeList, reset: MaybeTensor, dt: MaybeTensor) -> Outputs | None:
    """Call a module without its device context, if it contains no code of a program, which may rely on the context."""
    given = [x, reset, dt, *(states if isinstance(states, (list, tuple)) else ())]
    found = current_plan(module) if {*map(type, given)} <= {Tensor, NoneType} and _is_for_native(x) else None
    if found is None or not found[0].is_open():
        return None
    module._check_all(x, states, reset, None, dt)
    return module._compute(x, states, reset, None, dt)


def _run(
    module: Planned, x: Tensor, states: MaybeList, reset: MaybeTensor, time_first: bool, dt: MaybeTensor
) -> Outputs | None:
    has_gradients = torch.is_grad_enabled()
    if (has_gradients and _is_trained(module, x)) or not _is_for_native(x) or x.dtype not in _DTYPES:
        return None
    found, shape = current_plan(module), x.shape
    if found is None:
        return None
    plan, weights = found
    if not (plan.is_operator and plan.is_open()) or shape[-1:] != (module.input_dims,):
        return None
    if len(shape) != (2 if module.role == "step" else 3):
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
    if has_gradients and any(map(_requires_grad, (*weights, *states, *initial_states, *times))):
        return None
    try:
        given = x, weights, states, initial_states, resets, times, plan.code, plan.numbers
        # Not of one step, which is never rounded, and is over as soon as the question.
        is_rounded = len(shape) == 3 and shape[0 if time_first else 1] > 1 and rounds_products(x.dtype)
        out, last = _operator(*given, time_first, is_rounded)
    except NotImplementedError:  # a tensor on another device
        return None
    return (out, last) if last else None
