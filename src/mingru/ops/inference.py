"""The plan of a module: what it computes, asked once. Norms, linear maps, recurrences and residuals.

The method `_write_plan` of a class with `planned=True` writes the instructions of its modules into a `LayerPlan`. An
instruction checks that the module that it replaces is exactly what it computes, and refuses every other one. After any
change of a module or its submodules, the plan is made again. Without gradients, one operator computes all instructions,
and checks the sizes. With gradients, or on a GPU, `_trained` computes them one by one, each recurrence by one autograd
function.

`run` returns None whenever the modules must be called one by one: with hooks, autocast, transforms, graph capture, a
refused module or unusual arguments. If an argument is wrong, that ordinary call raises the error.
"""

import math
import operator
from collections.abc import Iterator
from functools import partial
from itertools import product, repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import autograd, block_recurrence, linear_map, names_of_torch, route
from .backends import native
from .backends.triton.plan import KEEPING
from .call import Layout, Spec, Start
from .cells import BLOCKS, CELLS
from .graph import is_autocast, is_compiling, is_device_context
from .layout import in_reverse
from .linear_map import FORWARDS, HOOKS, LINEAR_MAPS, NORMS, RecurrentMap
from .shape import Outputs, States

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


class Prepared(NamedTuple):
    """What the recurrence of one layer and direction is computed from, except x and the states."""

    how: dict[Any, autograd.How]
    """For each backend, dtype of x, on which the default of eps depends, and order of dimensions."""
    norm: Any
    """Norm before the linear map, or None. The kernels of the CPU include it."""
    map: tuple[Tensor, Tensor | None]
    """Weight and bias of the linear map."""
    of_norm: tuple[Tensor | None, Tensor | None]
    """Weight and bias of the norm before it."""
    recurrent: tuple[Any, Tensor | None]
    """Recurrent weight and bias."""
    is_of_torch: bool
    """Whether it is a GRU of torch, whose cell computes one step with gradients in less time than the kernel."""


class LayerPlan:
    """The instructions and weights of a module, and everything from which they were made."""

    def __init__(self, module: Any) -> None:
        self.weights: list[Tensor] = []
        self.num_states = 0
        # For the batch size of the last call.
        self.state_shapes: dict[int, list[tuple[int, ...]]] = {}
        self.is_bidirectional = False
        # Weights, or None, with the shapes that they must have, because the operator takes others too.
        self.shapes: list[tuple[Any, tuple[int, ...]]] = []
        # The instructions with gradients: a name, and what it computes with.
        self.steps: list[tuple[str, Any]] = []
        # Whether one operator can compute them, whether they hold with gradients, and whether all are recurrences.
        self.is_operator = self.is_trained = self.is_scan = True
        # Whether the kernels of GPUs compute the recurrences.
        self.is_for_gpu = True
        self._instructions: list[tuple[int, int, int, int]] = []
        self._numbers: list[float] = []
        self._type = type(module)
        self._submodules: list[nn.Module] = []
        self._types: list[type] = []
        # The attributes and the children of each module, and copies of them.
        self._now: list[dict[str, Any]] = []
        self._then: list[dict[str, Any]] = []
        self.hooks: list[dict[Any, Any]] = []
        # Parameters must be the same objects: equal ones could be changed later.
        self._parameters: tuple[list[dict[str, Any]], list[str], list[Any]] = ([], [], [])
        self.is_supported = True
        try:
            self._watch(module)
            module._write_plan(self)
            self.code = torch.tensor(self._instructions, dtype=torch.int64, device="cpu").view(-1, 4)
            self.numbers = torch.tensor(self._numbers, dtype=torch.float64, device="cpu")
        except Exception:
            # Refused, or an attribute has a wrong type: the ordinary call then raises the error.
            self.is_supported = False
        # Recurrences take weights of these shapes; of other modules, torch raises the errors.
        self._shapes_of_weights = list(map(_shape_of, self.weights))
        classes = {self._type, *self._types}
        self._classes = [cls for cls in FORWARDS if cls in classes]
        self._forwards = [FORWARDS[cls] for cls in self._classes]

    def is_current(self, module: nn.Module) -> bool:
        """Return whether nothing has changed."""
        try:
            return (
                type(module) is self._type
                and all(map(operator.is_, map(type, self._submodules), self._types))
                and self._now == self._then
                and all(map(operator.is_, map(operator.getitem, *self._parameters[:2]), self._parameters[2]))
            )
        except Exception:
            return False  # values that cannot be compared, such as tensors, are new, or a parameter was deleted

    def is_hooked(self) -> bool:
        """Return whether the same modules are there, and some have hooks."""
        return any(self.hooks) and self._now[1::2] == self._then[1::2]

    def is_open(self) -> bool:
        """Return whether the instructions compute what the modules would compute if they were called now."""
        return (
            self.is_supported
            and not any(self.hooks)
            and list(map(_forward_of, self._classes)) == self._forwards
            and nn.Module.__call__ is _CALL
            and not (self.shapes and any(x is not None and x.shape != shape for x, shape in self.shapes))
        )

    def can_train(self, x: Tensor, backend: str) -> bool:
        """Return whether recurrences of x with gradients take the weights that there are now."""
        fits = self.is_trained and (backend == "native" or self.is_for_gpu) and _fit(x, self.weights)
        return fits and list(map(_shape_of, self.weights)) == self._shapes_of_weights

    def require(self, *conditions: bool) -> None:
        """Refuse the module if an assumption of the instructions does not hold."""
        if not all(conditions):
            raise ValueError("the instructions cannot describe this module")

    def child(self, module: Any, *types: type) -> Any:
        """Return a submodule on which the plan depends, and refuse all but these types."""
        # `children` returns what other methods take as a child again.
        if all(module is not each for each in self._submodules):
            self._submodules.append(module)
            self._types.append(type(module))
            self._watch(module)
        self.require(type(module) in types)
        return module

    def children(self, container: Any, type_of_container: type, *types: type) -> list[Any]:
        """Return the submodules of a list or sequence of modules."""
        self.child(container, type_of_container)
        return [self.child(module, *types) for module in container._modules.values()]

    def _watch(self, module: Any) -> None:
        attributes = vars(module)
        for entries in (attributes, module._modules):
            self._now.append(entries)
            self._then.append(dict(entries))
        self.hooks += map(attributes.get, HOOKS, repeat({}))
        if module._parameters:
            dicts, keys, values = self._parameters
            for entries, key in ((attributes, "_parameters"), *zip(repeat(module._parameters), module._parameters)):
                dicts.append(entries)
                keys.append(key)
                values.append(entries[key])
        cls = type(module)
        self.require(cls in FORWARDS, attributes.get("_compiled_call_impl") is None)
        # An attribute of the instance may stand in for a method of its class.
        self.require(not any(callable(getattr(cls, name, None)) for name in attributes))

    def dropout(self, module: Any) -> None:
        """Add dropout if it is active, which is no instruction of the operator."""
        self.require(0 <= module.dropout <= 1)
        if module.training and module.dropout > 0:
            self.is_operator = False
            self.steps.append(("dropout", partial(F.dropout, p=module.dropout)))

    def keep(self) -> None:
        """Remember x, for `add`."""
        self._add("keep", None)

    def add(self, linear: Any = None) -> None:
        """Add what was remembered last, or a linear map of it."""
        self._add("add" if linear is None else "add_linear", linear, linear is not None and self._map(linear))

    def linear(self, linear: object, gelu: Any = None) -> None:
        """Add a linear map of x, and GELU of it if there is one."""
        self._add("linear" if gelu is None else "linear_gelu", linear, self._map(linear))
        if gelu is not None:
            self.require(self.child(gelu, nn.GELU).approximate == "none")
            self.steps.append(("gelu", gelu))

    def norm(self, norm: Any) -> None:
        self.child(norm, *NORMS)
        is_rms, eps = isinstance(norm, nn.RMSNorm), norm.eps
        self.require(self._weight(norm, "weight"), is_rms or self._weight(norm, "bias"))
        is_number = type(eps) is float and not math.isnan(eps)
        self.require(is_number or (is_rms and eps is None), norm.normalized_shape == norm.weight.shape)
        # NaN is the default of RMSNorm, which depends on the dtype.
        self._numbers.append(math.nan if eps is None else eps)
        # In C++, the norm with a bias is the layer norm.
        self._add("norm", norm, not is_rms)

    def causal_conv(self, conv: Any, state: int) -> None:
        """Add the convolution of x; the caller has checked its type."""
        self.require(self._weight(conv, "weight"), len(conv.weight) == conv.kernel_size)
        self._add("causal_conv", (conv, state), self._weight(conv, "bias"), state)

    def scan(
        self, spec: Spec, output_gate: bool, state: int, directions: list[list[Any]], recompute: bool | None
    ) -> None:
        """Add a recurrence with the linear map of each direction, and its recurrent weights if it has some."""
        # A cell without a kernel has no number.
        number = native.NUMBERS[spec.cell, spec.activation] | output_gate * native.FLAGS["output_gate"]
        self.require(spec.min_decay == 0 or (CELLS[spec.cell].not_timed is None and 0 < spec.min_decay < 1))
        has_bias, *others = [self._map(each, RecurrentMap) for own in directions for each in own]
        both = len(directions) == 2
        self.require({*others} <= {has_bias})
        self._numbers.append(spec.min_decay)
        self.is_bidirectional |= both
        spec, before = spec._replace(output_gate=output_gate), self.steps[-1][0] if self.steps else ""
        self.is_for_gpu &= spec.cell in KEEPING and not output_gate
        # Kernels include the norm, unless several maps read its result.
        norm = self.steps.pop()[1] if before == "norm" and not both else None
        ways = zip(directions, (False, True), strict=False)
        own = [self._prepared(spec._replace(reverse=way), norm, recompute, *modules) for modules, way in ways]
        self._add("scan_both" if both else "scan", (own, state), has_bias, state, number)

    def _prepared(self, spec: Spec, norm: Any, recompute: Any, linear: Any, recurrent: Any = None) -> Prepared:
        """Prepare the recurrence of a norm or None, a linear map, and recurrent weights if there are some."""
        how, none = {}, (None, None)
        for name, dtype, time_first in product(("native", *_OF_GPU), _DTYPES, (False, True)):
            own = spec if norm is None or name in _OF_GPU else linear_map.with_norm(spec, norm, dtype)
            keep = not (recompute if name in _OF_GPU else linear_map.are_recomputed(linear.weight, recompute))
            how[name, dtype, time_first] = "linear_kernel", name, own, time_first, keep
        of_norm = none if norm is None else linear_map.weights_of_norm(norm)
        sizes = zip((linear.bias, *of_norm), (0, 1, 1), strict=True)
        # Of other sizes, the modules raise the errors.
        self.is_trained &= all(x is None or x.shape == linear.weight.shape[dim : dim + 1] for x, dim in sizes)
        of_state = none if recurrent is None else (recurrent.weight, recurrent.bias)
        is_one_block = spec.cell == BLOCKS and 3 * recurrent.weight.shape[1] == len(recurrent.weight)
        return Prepared(how, norm, (linear.weight, linear.bias), of_norm, of_state, is_one_block and norm is None)

    def _map(self, linear: Any, *others: type) -> bool:
        """Take the weights of a linear map, or of a module of these types; return whether it has a bias."""
        self.child(linear, *LINEAR_MAPS, *others)
        self.require(self._weight(linear, "weight"))
        return self._weight(linear, "bias")

    def _weight(self, module: nn.Module, name: str) -> bool:
        """Take a parameter; return whether there is one. A subclass, such as a quantized tensor, is refused."""
        weight = getattr(module, name)
        self.require(weight is module._parameters.get(name), type(weight) in (nn.Parameter, type(None)))
        if weight is not None:
            self.weights.append(weight)
        return weight is not None

    def _add(self, operation: str, of: Any, has_bias: bool = False, state: int = 0, cell: int = 0) -> None:
        self._instructions.append((native.INSTRUCTION_NUMBERS[operation], has_bias, state, cell))
        self.steps.append((operation, of))
        self.is_scan &= operation in _SCANS


def current_plan(module: Any) -> LayerPlan:
    """Return the plan of a module, made again if the module has changed."""
    # In a slot of the module: a plan is freed with it, and is no part of its copies and pickles.
    plan: LayerPlan | None = getattr(module, "_plan", None)
    # With hooks, whose program may set weights before each call, the plan is not open whatever else has changed.
    if plan is None or not (plan.is_hooked() or plan.is_current(module)):
        module._plan = plan = LayerPlan(module)
    return plan


def _fit(x: Tensor, tensors: Any) -> bool:
    """Return whether tensors have the dtype and the device of x."""
    are_there = all(map(_is_cpu, tensors)) if x.is_cpu else {*map(_device_of, tensors)} <= {x.device}
    return are_there and {*map(_dtype_of, tensors)} == {x.dtype}


def _backend_of(x: Any) -> str | None:
    """Return whose kernels compute x, if nothing sees operations: no trace, transform, dispatch mode or hook."""
    is_seen = names_of_torch.len_torch_dispatch_stack() or names_of_torch.has_any_global_hook()
    is_plain = type(x) is Tensor and names_of_torch.is_untransformed() and not is_autocast(x)
    return route.kernels_for(x) if is_plain and not is_seen else None


def skips_padding(module: Any, x: Tensor) -> bool:
    """Return whether a module computes only recurrences of linear maps, by kernels that take lengths."""
    plan = current_plan(module) if _backend_of(x) == "native" else None
    return plan is not None and plan.is_scan and plan.is_open() and plan.can_train(x, "native")


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
    shape, plan = x.shape, current_plan(module)
    if not plan.is_open() or len(shape) != (2 if module.role == "step" else 3) or shape[-1] != module.input_dims:
        return None
    if (0 in shape or not plan.can_train(x, backend)) if trains else not plan.is_operator:
        return None
    time_first = time_first and len(shape) == 3  # a cell has no time dimension
    batch = shape[1 if time_first else 0]
    if states is None:
        states = module.default_states(x, batch)
    elif not isinstance(states, (list, tuple)) or {*map(type, states)} != {Tensor}:
        return None
    shapes = plan.state_shapes.get(batch)
    if shapes is None:
        shapes = module._state_shapes(batch)
        plan.state_shapes = {batch: shapes}
    if list(map(_shape_of, states)) != shapes:
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
        return _trained(plan, backend, x, states, initial_states, resets, time_first)
    try:
        out, last = _operator(
            x, plan.weights, states, initial_states, resets, times, plan.code, plan.numbers, time_first
        )
    except NotImplementedError:  # a tensor on another device
        return None
    return (out, last) if last else None


def _trained(plan: Any, backend: str, x: Any, h: Any, initials: Any, resets: Any, time_first: bool) -> Outputs | None:
    """Compute the instructions one by one, or return None for tensors that the ordinary call refuses."""
    if not _fit(x, [*h, *initials]) or any((y.dtype, y.device) != (torch.bool, x.device) for y in resets):
        return None
    befores, starts = [*map(_layers_of, h)], [*map(_layers_of, initials)]
    is_native = backend == "native"
    kept: list[Tensor] = []
    found: list[Any] = [[] for _ in h]
    x = x.unsqueeze(1) if x.dim() == 2 else x
    for name, of in plan.steps:
        if name in _SCANS:
            directions, state = of
            outs = []
            if any(own.map[0].shape[1:] != x.shape[2:] for own in directions):
                return None
            for own, reset in zip(directions, resets or [None, None], strict=False):
                start = None if reset is None else next(starts[state])
                linear = linear_map.map_with_norm(*own.map, *own.of_norm) if is_native else own.map
                y = x if is_native or own.norm is None else own.norm(x)
                given = next(befores[state]), start, reset, None, *own.recurrent, None, None, y
                is_step = x.shape[0 if time_first else 1] == 1
                if own.is_of_torch and (is_step or native.is_slower(len(given[0]), given[0].shape[2], x.dtype)):
                    out, last = _by_torch(own, [*given, *linear], is_step, time_first)
                else:
                    out, last = autograd.apply(own.how[backend, x.dtype, time_first], *given, *linear)
                outs.append(out)
                found[state].append(last)
            x = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
        elif name == "keep":
            kept.append(x)
        elif name in ("add", "add_linear"):
            before = kept.pop() if of is None else of(kept.pop())
            if before.shape != x.shape:
                return None
            # x is the first, because a sum has the strides of the first, and outputs are contiguous.
            x = x + before
        elif name == "causal_conv":
            conv, state = of
            x, found[state] = conv(x, h[state], resets[0] if resets else None, adds_x=True)
        else:
            x = of(x)
    return x, [_state_of(*each) for each in zip(found, h, strict=True)]


def _by_torch(own: Prepared, given: list[Any], is_step: bool, time_first: bool) -> States:
    """Compute a GRU of torch by torch, and one step by its cell, as new tensors."""
    h, start, reset, *_, x, _, _ = given
    if not is_step:
        return block_recurrence.by_torch(own.how["native", x.dtype, time_first][2], given, time_first)[:2]
    if start is not None and reset is not None:
        h = torch.where(reset.view(-1, 1, 1), start, h)
    weight, bias = own.recurrent
    of_state = None if bias is None else F.pad(bias, (2 * len(bias), 0))
    step = torch.gru_cell(x.flatten(0, 1), h.squeeze(1), own.map[0], weight, own.map[1], of_state)
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
