"""The plan of a module: what it computes, asked once. Norms, linear maps, recurrences and residuals.

The method `_write_plan` of a class with `planned=True` writes the instructions of its modules into a `LayerPlan`. An
instruction checks that the module that it replaces is exactly what it computes, and refuses every other one. After any
change of a module or its submodules, the plan is made again. Without gradients, one operator computes all instructions,
and checks the sizes. With gradients, or on a GPU, `_trained` computes them one by one, each recurrence by one autograd
function.

`run` returns None whenever the modules must be called one by one: with hooks, autocast, transforms, graph capture, a
refused module or unusual arguments. If an argument is wrong, that ordinary call raises the error.
"""

import functools
import itertools
import math
import operator
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import autograd, linear_map, names_of_torch, route
from .backends import native
from .backends.triton.plan import KEEPING
from .call import Layout, Spec, Start
from .causal_conv import causal_conv
from .cells import CELLS
from .graph import is_autocast, is_compiling, is_device_context
from .layout import in_reverse
from .linear_map import FORWARDS, HOOKS, LINEAR_MAPS, NORMS, RecurrentMap
from .shape import MaybeTensor, Outputs, States

_DTYPES = (torch.float32, torch.float64)
_OF_GPU = "triton", "triton alone"
_CALL, _SCANS = nn.Module.__call__, ("scan", "scan_both")
_forward_of, _shape_of, _dtype_of, _is_cpu = map(operator.attrgetter, ("forward", "shape", "dtype", "is_cpu"))
_device_of = operator.attrgetter("device")
FORWARDS.update({cls: cls.forward for cls in (nn.GELU, nn.Identity, nn.ModuleList, nn.Sequential, RecurrentMap)})


def plannable(cls: type[nn.Module]) -> type[nn.Module]:
    """Register a class whose `forward` instructions may replace."""
    FORWARDS[cls] = cls.forward
    return cls


class Direction:
    """What the recurrence of one layer and direction is computed from, except x and the states.

    Weights are indices into those of the plan; -1 means None.
    """

    def __init__(self, spec: Spec, norm: Any, weights: list[int], recompute: bool | None) -> None:
        self.spec, self.recompute = spec, recompute
        self.norm: _Norm | None = norm
        """Norm before the linear map. The kernels of the CPU include it."""
        self.map, self.recurrent = weights[:2], weights[2:] or [-1, -1]
        self._how: dict[Any, autograd.How] = {}

    def run(self, x: Tensor, w: list[Any], states: Any, backend: str, time_first: bool) -> States:
        """Compute it with the weights w, from the state before, the initial state and resets."""
        linear, recurrent = [w[index] for index in self.map], [w[index] for index in self.recurrent]
        if self.norm is not None:
            of_norm = [w[index] for index in self.norm.weights]
            if backend == "native":
                linear = linear_map.map_with_norm(*linear, *of_norm)
            else:
                x = self.norm(x, *of_norm)
        given, how = [*states, None, *recurrent, None, None, x, *linear], self._how_of(x, backend, time_first)
        if self.norm is None and recurrent[0] is not None and 3 * recurrent[0].shape[1] == len(recurrent[0]):
            # A GRU of torch, whose cell takes less time than the kernel.
            if x.shape[0 if time_first else 1] == 1:
                return _cell_of_torch(given, time_first)
        found: States = autograd.apply(how, *given)
        return found

    def _how_of(self, x: Tensor, backend: str, time_first: bool) -> autograd.How:
        """Return how a kernel computes it. The default of eps depends on the dtype of x."""
        found = self._how.get(key := (backend, x.dtype, time_first))
        if found is None:
            is_native, spec = backend == "native", self.spec
            if self.norm is not None and is_native:
                spec = linear_map.with_norm(spec, self.norm.kind, self.norm.eps, x.dtype)
            keep = not (linear_map.are_recomputed(x, self.recompute) if is_native else self.recompute)
            found = self._how[key] = "linear_kernel", backend, spec, time_first, keep
        return found


class _Norm(NamedTuple):
    kind: str
    shape: tuple[int, ...]
    eps: float | None
    weights: list[int]

    def __call__(self, x: Tensor, weight: Any, bias: Any) -> Tensor:
        if self.kind == "rms":
            return F.rms_norm(x, self.shape, weight, self.eps)
        return F.layer_norm(x, self.shape, weight, bias, self.eps)  # type: ignore[arg-type]


@functools.cache
def _methods(cls: Any) -> frozenset[str]:
    """Return the names for which an attribute of an instance would stand in for a method of its class."""
    return frozenset(name for name in dir(cls) if callable(getattr(cls, name, None)))


def _forget(plan: weakref.ref[Any], _: object) -> None:
    found = plan()
    if found is not None:
        found.forget()


class LayerPlan:
    """The instructions of a module, and everything from which they were made.

    It keeps no module and no weight alive: it takes the weights from the modules that there are, and forgets everything
    when one of these modules is freed.
    """

    def __init__(self, module: Any) -> None:
        self.num_states = 0
        # For the batch size of the last call.
        self._state_shapes: dict[int, list[tuple[int, ...]]] = {}
        self.is_bidirectional = False
        # Parameters with the shapes that they must have at each call, because the operator takes others too.
        self.shapes: list[tuple[dict[str, Any], str, tuple[int, ...]]] = []
        # The instructions with gradients: a name, what it computes with, and the indices of its weights.
        self.steps: list[tuple[str, Any, list[int]]] = []
        # Whether one operator can compute them, whether they hold with gradients, and whether all are recurrences.
        self.is_operator = self.is_trained = self.is_scan = True
        # Whether the kernels of GPUs compute the recurrences.
        self.is_for_gpu = True
        self._instructions: list[tuple[int, int, int, int]] = []
        self._numbers: list[float] = []
        # The dictionary and the name of each weight of the instructions, in their order.
        self._used: list[tuple[dict[str, Any], str]] = []
        # The same of what must stay: parameters that are None, an initial state, and the dictionaries themselves.
        self._others: list[tuple[dict[str, Any], str]] = []
        self.is_supported = True
        self._type: type | None = type(module)
        modules = list(module.modules())
        try:
            for each in modules:
                cls: Any = type(each)
                attributes = vars(each)
                self.require(cls in FORWARDS, attributes.get("_compiled_call_impl") is None)
                self.require(_methods(cls).isdisjoint(attributes))
            module._write_plan(self)
            self.code = torch.tensor(self._instructions, dtype=torch.int64, device="cpu").view(-1, 4)
            self.numbers = torch.tensor(self._numbers, dtype=torch.float64, device="cpu")
        except Exception:
            # Refused, or an attribute has a wrong type: the ordinary call then raises the error.
            self.is_supported = False
            self._used = []
            self._others = [(vars(each), "_parameters") for each in modules]
            self._others += [(each._parameters, name) for each in modules for name in each._parameters]
        # The attributes of each module, and copies of them.
        self._now = [vars(each) for each in modules if type(each) is not nn.ModuleList]
        self._then = list(map(dict, self._now))
        self.hooks = list(itertools.chain(*(map(each.get, HOOKS, repeat({})) for each in self._now)))
        # No other module gets more modules and keeps its attributes.
        self._lists = [each._modules for each in modules if type(each) in (nn.ModuleList, nn.Sequential)]
        self._lengths = list(map(len, self._lists))
        # The places of the weights, of all modules and of what must stay. The ids and types tell whether the same is
        # there, because the plan keeps neither modules nor weights.
        self._num_weights = len(self._used)
        self._others += [(vars(each), "_modules") for each in modules if type(each) is nn.ModuleList]
        children = [(each._modules, name) for each in modules for name in each._modules]
        self._places = tuple(zip(*self._used, *children, *self._others, strict=True))
        values = list(map(operator.getitem, *self._places)) if self._places else []
        self._ids, self._types = list(map(id, values)), list(map(type, values))
        # Recurrences take weights of these shapes; of other modules, torch raises the errors.
        self._shapes_of_weights = list(map(_shape_of, values[: self._num_weights]))
        classes = {*map(type, modules)}
        self._classes = [cls for cls in FORWARDS if cls in classes]
        self._forwards = [FORWARDS[cls] for cls in self._classes]
        own = weakref.ref(self)
        self._references = [weakref.ref(each, functools.partial(_forget, own)) for each in modules[1:]]

    def forget(self) -> None:
        """Forget all modules, after which the plan is made again."""
        self._type, self._places, self.hooks, self._lists, self.shapes = None, (), [], [], []
        self._now, self._then, self._used, self._others = [], [], [], []

    def weights_now(self, module: nn.Module) -> list[Tensor] | None:
        """Return the weights of the instructions, or None if something has changed."""
        try:
            if self._now == self._then and type(module) is self._type:
                values: list[Any] = list(map(operator.getitem, *self._places))
                if list(map(id, values)) == self._ids and list(map(type, values)) == self._types:
                    return values[: self._num_weights] if list(map(len, self._lists)) == self._lengths else None
        except Exception:
            pass  # values that cannot be compared, such as tensors, are new, or a parameter was deleted
        return None

    def is_hooked(self) -> bool:
        """Return whether the same modules are there, and some have hooks."""
        ids = [id(place.get(name)) for place, name in zip(*self._places, strict=True)]
        return any(self.hooks) and ids[self._num_weights :] == self._ids[self._num_weights :]

    def is_open(self) -> bool:
        """Return whether the instructions compute what the modules would compute if they were called now."""
        return (
            self.is_supported
            and not any(self.hooks)
            and list(map(_forward_of, self._classes)) == self._forwards
            and nn.Module.__call__ is _CALL
            and not (self.shapes and any(x[key].shape != shape for x, key, shape in self.shapes))
        )

    def can_train(self, x: Tensor, backend: str, weights: list[Tensor]) -> bool:
        """Return whether recurrences of x with gradients take the weights that there are now."""
        fits = self.is_trained and (backend == "native" or self.is_for_gpu) and _fit(x, weights)
        return fits and list(map(_shape_of, weights)) == self._shapes_of_weights

    def takes(self, module: Any, states: Any, batch: int) -> bool:
        """Return whether a module takes these states."""
        if not isinstance(states, (list, tuple)) or {*map(type, states)} != {Tensor}:
            return False
        shapes = self._state_shapes.get(batch)
        if shapes is None:
            shapes = module._state_shapes(batch)
            self._state_shapes = {batch: shapes}
        return list(map(_shape_of, states)) == shapes

    def require(self, *conditions: bool) -> None:
        """Refuse the module if an assumption of the instructions does not hold."""
        if not all(conditions):
            raise ValueError("the instructions cannot describe this module")

    def shape(self, module: Any, name: str, shape: tuple[int, ...]) -> None:
        """Require a shape of a parameter that is no weight of an instruction, if there is one."""
        if getattr(module, name) is not None:
            self.require(name in module._parameters)
            self.shapes.append((module._parameters, name, shape))
            self._others += [(vars(module), "_parameters"), (module._parameters, name)]

    def child(self, module: Any, *types: type) -> Any:
        """Return a submodule, and refuse all but these types."""
        self.require(type(module) in types)
        return module

    def children(self, container: Any, type_of_container: type, *types: type) -> list[Any]:
        """Return the submodules of a list or sequence of modules."""
        self.child(container, type_of_container)
        return [self.child(module, *types) for module in container._modules.values()]

    def dropout(self, module: Any) -> None:
        """Add dropout if it is active, which is no instruction of the operator."""
        self.require(0 <= module.dropout <= 1)
        if module.training and module.dropout > 0:
            self.is_operator = False
            self.steps.append(("dropout", partial(F.dropout, p=module.dropout), []))

    def keep(self) -> None:
        """Remember x, for `add`."""
        self._add("keep", None)

    def add(self, linear: Any = None) -> None:
        """Add what was remembered last, or a linear map of it."""
        if linear is None:
            self._add("add", None)
        else:
            self._add("add_linear", F.linear, self._map(linear))

    def linear(self, linear: object, gelu: Any = None) -> None:
        """Add a linear map of x, and GELU of it if there is one."""
        self._add("linear" if gelu is None else "linear_gelu", F.linear, self._map(linear))
        if gelu is not None:
            self.require(self.child(gelu, nn.GELU).approximate == "none")
            self.steps.append(("gelu", F.gelu, []))

    def norm(self, norm: Any) -> None:
        kind, eps = NORMS[type(self.child(norm, *NORMS))], norm.eps
        own = [self._weight(norm, "weight"), self._weight(norm, "bias") if kind == "layer" else -1]
        self.require(own[0] >= 0, kind == "rms" or own[1] >= 0, norm.normalized_shape == norm.weight.shape)
        is_number = type(eps) is float and not math.isnan(eps)
        self.require(is_number or (kind == "rms" and eps is None))
        # NaN is the default of RMSNorm, which depends on the dtype.
        self._numbers.append(math.nan if eps is None else eps)
        # In C++, the norm with a bias is the layer norm.
        self._add("norm", _Norm(kind, norm.normalized_shape, eps, own), own)

    def causal_conv(self, conv: Any, state: int) -> None:
        """Add the convolution of x; the caller has checked its type."""
        own = [self._weight(conv, "weight"), self._weight(conv, "bias")]
        self.require(own[0] >= 0, len(conv.weight) == conv.kernel_size)
        self._add("causal_conv", state, own, state)

    def scan(
        self, spec: Spec, output_gate: bool, state: int, directions: list[list[Any]], recompute: bool | None
    ) -> None:
        """Add a recurrence with the linear map of each direction, and its recurrent weights if it has some."""
        # A cell without a kernel has no number.
        number = native.NUMBERS[spec.cell, spec.activation] | output_gate * native.FLAGS["output_gate"]
        self.require(spec.min_decay == 0 or (CELLS[spec.cell].not_timed is None and 0 < spec.min_decay < 1))
        weights = [[index for each in own for index in self._map(each, RecurrentMap)] for own in directions]
        has_bias = {index >= 0 for own in weights for index in own[1::2]}
        both = len(directions) == 2
        self.require(len(has_bias) == 1)
        self._numbers.append(spec.min_decay)
        self.is_bidirectional |= both
        spec, before = spec._replace(output_gate=output_gate), self.steps[-1] if self.steps else ("",)
        self.is_for_gpu &= spec.cell in KEEPING and not output_gate
        # Kernels include the norm, unless several maps read its result.
        norm = self.steps.pop()[1] if before[0] == "norm" and not both else None
        for linear, *_ in directions:
            of_norm = [] if norm is None else [self._used_weight(index) for index in norm.weights]
            sizes = zip((linear.bias, *of_norm), (0, 1, 1), strict=False)
            # Of other sizes, the modules raise the errors.
            self.is_trained &= all(x is None or x.shape == linear.weight.shape[dim : dim + 1] for x, dim in sizes)
        of = [Direction(spec._replace(reverse=way == 1), norm, own, recompute) for way, own in enumerate(weights)]
        self._add("scan_both" if both else "scan", (of, state), [0 if has_bias == {True} else -1] * 2, state, number)

    def _used_weight(self, index: int) -> Any:
        return None if index < 0 else operator.getitem(*self._used[index])

    def _map(self, linear: Any, *others: type) -> list[int]:
        """Take the weights of a linear map, or of a module of these types; return the indices of weight and bias."""
        self.child(linear, *LINEAR_MAPS, *others)
        own = [self._weight(linear, "weight"), self._weight(linear, "bias")]
        self.require(own[0] >= 0)
        return own

    def _weight(self, module: nn.Module, name: str) -> int:
        """Take a parameter; return its index, or -1 for None. A subclass, such as a quantized tensor, is refused."""
        weight = getattr(module, name)
        self.require(weight is module._parameters.get(name), type(weight) in (nn.Parameter, type(None)))
        if name == "weight":
            self._others.append((vars(module), "_parameters"))
        if weight is None:
            self._others += [(module._parameters, name)] if name in module._parameters else []
            return -1
        self._used.append((module._parameters, name))
        return len(self._used) - 1

    def _add(self, operation: str, of: Any, weights: Sequence[int] = (), state: int = 0, cell: int = 0) -> None:
        has_bias = len(weights) > 1 and weights[1] >= 0
        self._instructions.append((native.INSTRUCTION_NUMBERS[operation], has_bias, state, cell))
        self.steps.append((operation, of, [*weights]))
        self.is_scan &= operation in _SCANS


def current_plan(module: Any) -> tuple[LayerPlan, list[Tensor]]:
    """Return the plan of a module, made again if the module has changed, and the weights that it has now."""
    # In a slot of the module: plans are freed with it, and are no part of its copies and pickles. The last two stay,
    # because many programs switch between `train()` and `eval()` all the time.
    plans: tuple[LayerPlan, ...] = getattr(module, "_plans", ())
    for plan in plans:
        weights = plan.weights_now(module)
        if weights is not None:
            return plan, weights
        # With hooks, whose program may set weights before each call, the plan is not open whatever else has changed.
        if plan.is_hooked():
            return plan, []
    plan = LayerPlan(module)
    module._plans = (plan, *plans[:1])
    return plan, plan.weights_now(module) or []


def _fit(x: Tensor, tensors: Any) -> bool:
    """Return whether tensors have the dtype and the device of x."""
    are_there = all(map(_is_cpu, tensors)) if x.is_cpu else {*map(_device_of, tensors)} <= {x.device}
    return are_there and {*map(_dtype_of, tensors)} == {x.dtype}


def _backend_of(x: Any) -> str | None:
    """Return whose kernels compute x, if nothing sees operations: no trace, transform, dispatch mode or hook."""
    is_seen = names_of_torch.len_torch_dispatch_stack() or names_of_torch.has_any_global_hook()
    is_plain = type(x) is Tensor and names_of_torch.is_untransformed() and not is_autocast(x)
    return route.kernels_for(x) if is_plain and not is_seen else None


def skips_padding(module: Any, x: Tensor, *others: MaybeTensor) -> bool:
    """Return whether a module computes only recurrences of linear maps, by kernels that take lengths."""
    is_plain = all(each is None or type(each) is Tensor for each in others) and _backend_of(x) == "native"
    plan, weights = current_plan(module) if is_plain else (None, [])
    return plan is not None and plan.is_scan and plan.is_open() and plan.can_train(x, "native", weights)


# None without the kernels.
_operator: Any = getattr(getattr(torch.ops.mingru, "inference", None), "default", None)


def run(module: Any, x: Any, states: Any, reset: Any, time_first: bool, dt: Any = None) -> Outputs | None:
    """Return the output and the last states of a module, or None if it must be called in the ordinary way."""
    if is_compiling():
        return None
    if not names_of_torch.is_torch_function_mode_enabled():
        return _run(module, x, states, reset, time_first, dt)
    if not is_device_context():
        return None
    # Otherwise the context would be called for every attribute of a tensor.
    with names_of_torch.DisableTorchFunction():
        return _run(module, x, states, reset, time_first, dt)


def _run(module: Any, x: Any, states: Any, reset: Any, time_first: bool, dt: Any) -> Outputs | None:
    backend = _backend_of(x)
    # On a GPU, each recurrence is one kernel without gradients too.
    trains = torch.is_grad_enabled() or backend in _OF_GPU
    if backend is None or x.dtype not in _DTYPES or (trains and dt is not None):
        return None
    shape, (plan, weights) = x.shape, current_plan(module)
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
        start = Start(x, x, reset, dt)
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
        if name in _SCANS:
            directions, state = of
            if any(w[own.map[0]].shape[1:] != x.shape[2:] for own in directions):
                return None
            outs = []
            for own, reset in zip(directions, resets or [None, None], strict=False):
                start = None if reset is None else next(starts[state])
                out, last = own.run(x, w, (next(befores[state]), start, reset), backend, time_first)
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
