"""Modules that compute a linear map or the norm before it, which kernels include."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .call import Spec
from .shape import MaybeTensor, States, accumulate_dtype


class WeightAndBias(nn.Module):
    """Compute what `torch.nn.Linear` computes.

    Programs that initialize each `nn.Linear` of a model do not find this module. Neither do those that look for classes
    with "Linear" in their names.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        vars(self).update(vars(nn.Linear(*args, **kwargs)))

    forward = nn.Linear.forward
    reset_parameters = nn.Linear.reset_parameters
    extra_repr = nn.Linear.extra_repr


class RecurrentMap(nn.Module):
    """The recurrent weights of one direction, and the bias of the candidate's; see `ops.block_recurrence`."""

    def __init__(self, hidden_dims: int, size: int, bias: bool, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * hidden_dims, size, **factory))
        self.bias = nn.Parameter(torch.empty(hidden_dims, **factory)) if bias else None
        self.reset_parameters()

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Return both. A call, so that hooks run, which compute weights."""
        return self.weight, self.bias

    def reset_parameters(self) -> None:
        """Re-initialize as `torch.nn.GRU` does with K features."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0] // 3}, block_size={self.weight.shape[1]}, bias={self.bias is not None}"


LINEAR_MAPS = (nn.Linear, WeightAndBias)
NORMS: dict[type[nn.Module], str] = {nn.RMSNorm: "rms", nn.LayerNorm: "layer"}
# Of every class that a kernel or a plan may replace, to notice if a program patches it.
FORWARDS: dict[Any, Any] = {cls: vars(cls)["forward"] for cls in (*LINEAR_MAPS, *NORMS)}
# Attributes of a module: what sees its inputs and outputs, and may change them.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# With fewer input features, it takes less time on the CPU to compute pre-activations again than to store them. A
# GRU would also compute the products of its states again, which takes longer.
_WIDE = 64


def weights_of(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the weight and the bias of a linear map or a norm, in a tenth of the time if they are parameters."""
    own, has_bias = module.__dict__, type(module) is not nn.RMSNorm
    found = own["_parameters"]
    # Something else than a parameter may have the name, and hide a parameter.
    if "weight" in found and "weight" not in own and (not has_bias or ("bias" in found and "bias" not in own)):
        return found["weight"], found["bias"] if has_bias else None
    return module.weight, module.bias if has_bias else None


def with_norm(spec: Spec, kind: str, eps: float | None, dtype: torch.dtype) -> Spec:
    """Return a spec that includes the norm of an x of this dtype."""
    eps = torch.finfo(accumulate_dtype(dtype)).eps if eps is None else eps
    return Spec(*spec[:4], kind, eps, *spec[6:])


def map_with_norm(weight: Tensor, bias: MaybeTensor, scale: MaybeTensor, shift: MaybeTensor) -> Any:
    """Return the map with weights w and b of a norm before it: W (w x + b) + c = (W diag(w)) x + (W b + c)."""
    if shift is not None:
        bias = weight @ shift if bias is None else torch.addmv(bias, weight, shift)
    return weight if scale is None else weight * scale, bias


def normalized(x: Tensor, norm: str, eps: float) -> Tensor:
    """Return x after a norm without weights."""
    return F.rms_norm(x, x.shape[-1:], None, eps) if norm == "rms" else F.layer_norm(x, x.shape[-1:], eps=eps)


def gated(states: States, gate: Tensor | None) -> States:
    """Return the states of all steps after an output gate, if there is one, and the last state."""
    return states if gate is None else (states[0] * F.silu(gate), states[1])


def are_recomputed(cell: str, x: Tensor, recompute: bool | None) -> bool:
    """Return whether backward computes the linear map of x again. `recompute` is the option of a layer."""
    return x.is_cpu and x.shape[-1] < _WIDE and cell != "gru" if recompute is None else recompute
