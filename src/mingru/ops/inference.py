"""One operator for the whole inference pass of a module: norms, linear maps, recurrences and residuals.

A module writes its instructions, weights and everything that they depend on into a `Plan` (its method `plan`). The plan
is kept until something of that has changed. `run` returns None whenever the modules must be called one by one: with
gradients, hooks, autocast, transforms, graph capture or arguments that do not fit. Those calls also name wrong
arguments.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import route
from .call import Layout, Spec
from .cells import TIMED
from .graph import is_compiling, is_untransformed
from .layout import dt_seen_in_reverse, reset_seen_in_reverse

_DTYPES = (torch.float32, torch.float64)
# The order of `Operation` in csrc/inference.cpp.
_OPERATIONS = {
    name: number
    for number, name in enumerate(
        (
            *("keep", "add", "add_linear", "rms_norm", "layer_norm", "linear", "linear_with_bias", "gelu"),
            *("causal_conv", "causal_conv_with_bias"),
            *("scan", "scan_with_bias", "scan_both", "scan_both_with_bias"),
        )
    )
}


class Plan:
    """The instructions and weights of a module, and what must not change as long as they are used."""

    def __init__(self) -> None:
        self.is_supported = True
        self.num_states = 0
        self.weights: list[Tensor] = []
        self._cells: list[str] = []
        self._instructions: list[tuple[int, int, int, int]] = []
        self._numbers: list[float] = []
        self.spec: Spec | None = None
        self.is_bidirectional = False
        self._hooks: list[dict[Any, Any]] = []
        # Entries of dictionaries that must stay the same objects.
        self._dicts: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self._values: list[Any] = []

    def finish(self) -> None:
        """Bring the instructions into the form that the operator reads."""
        self.code = torch.tensor(self._instructions, dtype=torch.int64, device="cpu").view(-1, 4)
        self.cells = " ".join(self._cells)
        self.numbers = torch.tensor(self._numbers, dtype=torch.float64, device="cpu")

    def is_current(self) -> bool:
        return all(map(operator.is_, map(dict.get, self._dicts, self._keys), self._values))

    def is_open(self) -> bool:
        return self.is_supported and not any(self._hooks)

    def watch(self, entries: dict[str, Any], *keys: str) -> None:
        """Make the plan invalid as soon as one of these entries is another object."""
        for key in keys:
            self._dicts.append(entries)
            self._keys.append(key)
            self._values.append(entries.get(key))

    def child(self, parent: nn.Module, name: str, *types: type[nn.Module]) -> Any:
        """Return a submodule that the instructions replace, which is of one of these types or planned."""
        self.watch(parent._modules, name)
        module = parent._modules.get(name)
        if module is not None:
            self.watch(vars(module), "forward", "_compiled_call_impl")
            self._hooks += [
                *(module._forward_hooks, module._forward_pre_hooks),
                *(module._backward_hooks, module._backward_pre_hooks),
            ]
            is_known = type(module) in types or getattr(module, "planned", False)
            # `module.compile()` sets this attribute.
            is_compiled = vars(module).get("_compiled_call_impl") is not None
            self.is_supported &= is_known and not is_compiled and "forward" not in vars(module)
        return module

    def children(self, parent: nn.Module, name: str, *types: type[nn.Module]) -> list[Any]:
        """Return the submodules of a `ModuleList` or `Sequential`."""
        container = self.child(parent, name, nn.ModuleList, nn.Sequential)
        self.watch(vars(container), "_modules")
        return [self.child(container, index, *types) for index in container._modules]

    def add(self, operation: str, state: int = 0, layer: int = 0, cell: int = 0) -> None:
        self._instructions.append((_OPERATIONS[operation], state, layer, cell))

    def dropout(self, module: Any) -> None:
        """Reject the plan if dropout is active."""
        self.watch(vars(module), "dropout", "training")
        self.is_supported &= not (module.training and module.dropout > 0)

    def add_norm(self, parent: nn.Module, name: str) -> None:
        norm = self.child(parent, name, nn.RMSNorm, nn.LayerNorm)
        self.watch(vars(norm), "eps")
        is_rms = isinstance(norm, nn.RMSNorm)
        self.add("rms_norm" if is_rms else "layer_norm")
        self.weight(norm, "weight")
        if not is_rms:
            self.weight(norm, "bias")
        # A negative number is the default of RMSNorm, which depends on the dtype.
        self._numbers.append(-1.0 if norm.eps is None else norm.eps)

    def add_linear(self, parent: nn.Module, name: str, operation: str = "linear") -> None:
        has_bias = self.linear(parent, name)
        self.add(f"{operation}_with_bias" if has_bias else operation)

    def add_scan(self, parent: Any, spec: Spec, state: int, layer: int) -> None:
        self.spec = spec
        cell = f"{spec.cell}_{spec.activation}"
        if cell not in self._cells:
            self._cells.append(cell)
        has_bias = self.linear(parent, "linear")
        self._numbers.append(spec.min_decay)
        both = parent.linear_reverse is not None
        if both:
            self.is_bidirectional = True
            self.is_supported &= self.linear(parent, "linear_reverse") == has_bias
        else:
            self.watch(parent._modules, "linear_reverse")
        self.add(f"scan{'_both' * both}{'_with_bias' * has_bias}", state, layer, self._cells.index(cell))

    def linear(self, parent: nn.Module, name: str) -> bool:
        """Take the weight and the bias of a linear map, and return whether it has a bias."""
        module = self.child(parent, name, nn.Linear)
        self.weight(module, "weight")
        return self.bias(module)

    def bias(self, module: nn.Module) -> bool:
        has_bias = module._parameters.get("bias") is not None
        if has_bias:
            self.weight(module, "bias")
        else:
            self.watch(module._parameters, "bias")
        return has_bias

    def weight(self, module: nn.Module, name: str) -> None:
        """Take a parameter; a missing one, or a subclass such as a quantized tensor, is not supported."""
        self.watch(module._parameters, name)
        weight = module._parameters.get(name)
        if weight is not None and type(weight) is nn.Parameter:
            self.weights.append(weight)
        else:
            self.is_supported = False


_plans: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()


def _plan_of(module: Any) -> Plan:
    plan = _plans.get(module)
    if plan is None or not plan.is_current():
        plan = Plan()
        module.plan(plan)
        plan.finish()
        _plans[module] = plan
    return plan


@functools.cache
def _operator() -> Any:
    return torch.ops.mingru.inference.default


def is_open(x: Any) -> bool:
    """Return whether an inference pass on x may run as one operator."""
    return (
        not is_compiling()
        and not torch.is_grad_enabled()
        and type(x) is Tensor
        and x.is_cpu
        and x.dtype in _DTYPES
        and is_untransformed()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def run(
    module: Any, x: Any, states: Sequence[Any] | None, reset: Any, time_first: bool, dt: Any = None
) -> tuple[Tensor, list[Tensor]] | None:
    """Return the output and the last states of a module, or None if it must be called in the ordinary way."""
    if not module.planned or not is_open(x) or x.dim() != (2 if module.role == "step" else 3):
        return None
    plan = _plan_of(module)
    if not plan.is_open() or plan.spec is None or route.choose(plan.spec, x) != "native":
        return None
    batch = x.shape[1 if time_first else 0]
    if states is None:
        states = module.default_states(x, batch)
    elif len(states) != plan.num_states or {*map(type, states)} != {Tensor}:
        return None
    initial_states = resets = times = []
    if reset is not None or dt is not None:
        fit = all(each is None or (type(each) is Tensor and each.shape == x.shape[:-1]) for each in (reset, dt))
        if not fit or (dt is not None and plan.spec.cell not in TIMED):
            return None
        if reset is not None:
            initial_states = module.default_states(x, batch)
        order = Layout(time_first, None, None)
        resets, times = (
            _of_both_directions(values, in_reverse, module, plan, order)
            for values, in_reverse in ((reset, reset_seen_in_reverse), (dt, dt_seen_in_reverse))
        )
    try:
        out, last = _operator()(
            x, plan.weights, states, initial_states, resets, times, plan.code, plan.numbers, plan.cells, time_first
        )
    except NotImplementedError:  # a tensor on another device
        return None
    return (out, last) if last else None


def _of_both_directions(
    values: Tensor | None, in_reverse: Callable[[Tensor, Layout], Tensor], module: Any, plan: Plan, order: Layout
) -> list[Tensor]:
    """Return resets or elapsed times as both directions see them, with a time dimension; an empty list for None."""
    if values is None:
        return []
    if module.role == "step":
        values = values.unsqueeze(-1)
    return [values, in_reverse(values, order) if plan.is_bidirectional else values]
