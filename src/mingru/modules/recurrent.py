"""What minGRU and its siblings share: layers over layers, directions, state in and out, options.

A kind of layer (see `mingru.py` beside this file) adds its recurrence and nothing else. `forward` and what it calls
scripts, but for the checks, which a scripted module leaves to torch.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..check import check_like, check_reset, dims, expanded, expectation
from ..ops import States
from ..ops.activation import ACTIVATIONS, zero_state
from ..ops.shape import accumulate_dtype

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class RecurrentLayer(nn.Module):
    """Norm, linear, recurrence and residual of one layer, in one direction or both."""

    num_gates: int

    def __init__(
        self,
        input_dims: int,
        hidden_dims: int,
        bias: bool,
        bidirectional: bool,
        residual: bool,
        norm: str | None,
        candidate: str,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        output_dims = hidden_dims * (2 if bidirectional else 1)
        pre_dims = hidden_dims * self.num_gates
        self.candidate = candidate
        self.residual = residual
        self.norm: nn.Module | None = None if norm is None else NORMS[norm](input_dims, **factory)
        self.linear = nn.Linear(input_dims, pre_dims, bias, **factory)
        self.linear_reverse = nn.Linear(input_dims, pre_dims, bias, **factory) if bidirectional else None
        self.align = None
        if residual and input_dims != output_dims:
            self.align = nn.Linear(input_dims, output_dims, bias=False, **factory)

    def recur(self, pre: Tensor, h: Tensor, initial: Tensor, reset: Tensor | None, reverse: bool) -> States:
        """From pre-activations (B, S, num_gates * H) and a state (B, 1, H) to all states and the last."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, h: list[Tensor], initial: list[Tensor], reset: Tensor | None, batch_first: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """x (B, S, I) or (S, B, I), for each direction h (B, 1, H) and initial (1, 1, H): output like x, and states."""
        y = x
        if self.norm is not None:
            y = self.norm(x)
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            pre = self.linear(y)
            out, last = self.recur(pre if batch_first else pre.transpose(0, 1), h[0], initial[0], reset, False)
        else:
            out, last = self._direction(self.linear, y, h[0], initial[0], reset, False, batch_first)
        out = out if batch_first else out.transpose(0, 1)
        states = [last]
        if self.linear_reverse is not None:
            # Seen from the end, the boundary before step t comes before step t - 1.
            cut = None if reset is None else F.pad(reset[:, 1:], [0, 1], value=0.0)
            if torch.jit.is_scripting():  # type: ignore[attr-defined]
                pre = self.linear_reverse(y)
                back, last = self.recur(pre if batch_first else pre.transpose(0, 1), h[1], initial[1], cut, True)
            else:
                back, last = self._direction(self.linear_reverse, y, h[1], initial[1], cut, True, batch_first)
            # Joined in the order of x, or the copy that this makes would lie in the other one.
            out = torch.cat([out, back if batch_first else back.transpose(0, 1)], -1)
            states.append(last)
        if self.residual:
            out = out + (x if self.align is None else self.align(x))
        return out, states

    def _direction(
        self,
        linear: Any,
        y: Tensor,
        h: Tensor,
        initial: Tensor,
        reset: Tensor | None,
        reverse: bool,
        batch_first: bool,
    ) -> States:
        """Linear and recurrence, in one go where that can be had; out is (B, S, H)."""
        if _is_plain(linear):
            x = y if batch_first else y.transpose(0, 1)
            states = self.linear_recur(x, linear.weight, linear.bias, h, initial, reset, reverse)
            if states is not None:
                return states
        pre = linear(y)
        return self.recur(pre if batch_first else pre.transpose(0, 1), h, initial, reset, reverse)

    def linear_recur(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        h: Tensor,
        initial: Tensor,
        reset: Tensor | None,
        reverse: bool,
    ) -> States | None:
        """`recur` of F.linear(x, weight, bias) in one go, x (B, S, I); None where no body can."""
        return None


def _is_plain(linear: nn.Module) -> bool:
    """Whether a call of it comes to F.linear(x, weight, bias): no quantised or parametrised one, and nothing hooked."""
    return (
        type(linear) is nn.Linear
        and not _has_any_global_hook()  # type: ignore[no-untyped-call]
        and "forward" not in linear.__dict__
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and not linear._backward_hooks
        and not linear._backward_pre_hooks
    )


class Recurrent(nn.Module):
    """Layers of one kind, one over the other; the base of `MinGRU` and its siblings."""

    layer_class: type[RecurrentLayer]

    def __init__(
        self,
        input_dims: int,
        hidden_dims: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        residual: bool = False,
        norm: str | None = None,
        candidate: str = "positive",
        learn_initial_state: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.name = type(self).__name__
        for argument, size in (("input_dims", input_dims), ("hidden_dims", hidden_dims), ("num_layers", num_layers)):
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(expectation(self.name, argument, "an int", f"{size!r}"))
            if size < 1:
                raise ValueError(expectation(self.name, argument, "at least 1", str(size)))
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
            raise TypeError(expectation(self.name, "dropout", "a number from 0 to 1", repr(dropout)))
        if not 0 <= dropout <= 1:
            raise ValueError(expectation(self.name, "dropout", "a number from 0 to 1", repr(dropout)))
        if norm is not None and norm not in tuple(NORMS):
            raise ValueError(expectation(self.name, "norm", f"None or one of {tuple(NORMS)}", repr(norm)))
        if candidate not in ACTIVATIONS:
            raise ValueError(expectation(self.name, "candidate", f"one of {ACTIVATIONS}", repr(candidate)))
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(expectation(self.name, "dtype", "a floating dtype", repr(dtype)))
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                f"{self.name}: dropout={dropout} has no effect with num_layers=1, as the last layer's output is never "
                "dropped; set num_layers above 1 or dropout to 0",
                stacklevel=2,
            )
        self.input_dims = input_dims
        self.hidden_dims = hidden_dims
        self.num_layers = num_layers
        self.bias = bool(bias)
        self.batch_first = bool(batch_first)
        self.dropout = float(dropout)
        self.bidirectional = bool(bidirectional)
        self.residual = bool(residual)
        self.norm = norm
        self.candidate = candidate
        self.learn_initial_state = bool(learn_initial_state)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_directions = 2 if bidirectional else 1
        output_dims = self.num_directions * hidden_dims
        self.layers = nn.ModuleList(
            self.layer_class(
                input_dims if index == 0 else output_dims,
                hidden_dims,
                self.bias,
                self.bidirectional,
                self.residual,
                norm,
                candidate,
                factory,
            )
            for index in range(num_layers)
        )
        self.zero_state = zero_state(candidate)
        shape = (num_layers * self.num_directions, 1, 1, hidden_dims)
        self.initial_state = (
            nn.Parameter(torch.full(shape, self.zero_state, **factory)) if learn_initial_state else None
        )

    def reset_parameters(self) -> None:
        """Draw all weights anew, as the constructor did."""
        for module in self.layers.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
        if self.initial_state is not None:
            nn.init.constant_(self.initial_state, self.zero_state)

    def forward(self, x: Tensor, h: Tensor | None = None, reset: Tensor | None = None) -> States:
        autocast = False
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            if x.dim() != 3 or x.size(2) != self.input_dims:
                letters = "(B, S, " if self.batch_first else "(S, B, "
                raise ValueError(f"{self.name}: x must be {letters}{self.input_dims}), got {x.shape}")
            if reset is not None and reset.shape != x.shape[:2]:
                raise ValueError(f"{self.name}: reset must be {x.shape[:2]}, got {reset.shape}")
        else:
            autocast = self._check(x, h, reset)
        dtype = accumulate_dtype(x.dtype) if autocast else x.dtype
        count = self.num_layers * self.num_directions
        batch = x.size(0) if self.batch_first else x.size(1)
        if self.initial_state is None:
            zero = torch.full([1, 1, 1, 1], self.zero_state, dtype=dtype, device=x.device)
            initial = zero.expand(count, 1, 1, self.hidden_dims)
        else:
            initial = self.initial_state
        state = (initial if h is None else h).expand(count, batch, 1, self.hidden_dims)
        if autocast:
            state = state.to(dtype)
        if reset is not None and not self.batch_first:
            reset = reset.transpose(0, 1)

        before, initials = list(state.unbind(0)), list(initial.unbind(0))
        states: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            first = index * self.num_directions
            end = first + self.num_directions
            x, last = layer(x, before[first:end], initials[first:end], reset, self.batch_first)
            states += last
            if index < self.num_layers - 1 and self.dropout > 0:
                x = F.dropout(x, self.dropout, self.training)
        return x, torch.stack(states)

    def _check(self, x: Tensor, h: Tensor | None, reset: Tensor | None) -> bool:
        """Refuse what does not fit; tell whether autocast is on."""
        if not isinstance(x, Tensor):
            raise TypeError(expectation(self.name, "x", "a tensor", type(x).__name__, "torch.as_tensor makes one"))
        letters = "(B, S, {})" if self.batch_first else "(S, B, {})"
        if x.dim() != 3 or x.shape[2] != self.input_dims:
            expected = f"{letters.format(self.input_dims)} as input_dims is {self.input_dims}"
            raise ValueError(expectation(self.name, "x", expected, dims(x.shape)))
        first: Any = self.layers[0]
        weight = first.linear.weight
        # Asking about a device that has none, such as "meta", is an error in torch.
        kind = x.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        # A quantised linear's weight is a method, and its input any floating tensor.
        if isinstance(weight, Tensor):
            check_like(self.name, "x", x, weight, "the layer's weight", autocast=autocast)
        if h is not None:
            check_like(self.name, "h", h, x, "x", or_dtype=accumulate_dtype(x.dtype), autocast=autocast)
            count = self.num_layers * self.num_directions
            batch = x.shape[0] if self.batch_first else x.shape[1]
            remedy = "a state of nn.GRU, (L * D, B, H), becomes one by h.unsqueeze(2)"
            expanded(self.name, "h", h, (count, batch, 1, self.hidden_dims), "(L * D, B, 1, H)", remedy)
        check_reset(self.name, reset, x, "(B, S)" if self.batch_first else "(S, B)")
        return autocast

    def extra_repr(self) -> str:
        text = f"{self.input_dims}, {self.hidden_dims}"
        defaults = {
            "num_layers": 1,
            "bias": True,
            "batch_first": True,
            "dropout": 0.0,
            "bidirectional": False,
            "residual": False,
            "norm": None,
            "candidate": "positive",
            "learn_initial_state": False,
        }
        for argument, default in defaults.items():
            if getattr(self, argument) != default:
                text += f", {argument}={getattr(self, argument)!r}"
        return text
