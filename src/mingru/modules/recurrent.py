"""What minGRU and its siblings share: layers over layers, directions, state in and out, options.

A kind of layer (see `mingru.py` beside this file) adds its recurrence and nothing else. `forward` and what it calls
scripts, but for the checks, which a scripted module leaves to torch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.rnn import PackedSequence

from .. import ops
from ..check import (
    arguments_checked,
    check_bias,
    check_dropout,
    check_flag,
    check_flags,
    check_int,
    check_lengths,
    check_like,
    check_one_state,
    check_options,
    check_reset,
    dims,
    embed_remedy,
    expanded,
    expectation,
)
from ..ops import States, packed, portable
from ..ops.activation import zero_state
from ..ops.shape import accumulate_dtype
from ..ops.tracing import for_trace, is_tracing, untraced
from .base import Base

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class RecurrentLayer(nn.Module):
    """Norm, linear, recurrence and residual of one layer, in one direction or both."""

    def __init__(
        self,
        cell: str,
        input_dims: int,
        hidden_dims: int,
        bias: bool,
        bidirectional: bool,
        residual: bool,
        norm: str | None,
        candidate: str,
        recompute: bool | None,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        output_dims = hidden_dims * (2 if bidirectional else 1)
        self.cell = cell
        self.num_inputs = ops.NUM_INPUTS[cell]
        pre_dims = hidden_dims * self.num_inputs
        self.candidate = candidate
        self.recompute = recompute
        self.residual = residual
        self.norm: nn.Module | None = None if norm is None else NORMS[norm](input_dims, **factory)
        self.linear = nn.Linear(input_dims, pre_dims, bias, **factory)
        self.linear_reverse = nn.Linear(input_dims, pre_dims, bias, **factory) if bidirectional else None
        self.align = None
        if residual and input_dims != output_dims:
            self.align = nn.Linear(input_dims, output_dims, bias=False, **factory)

    def forward(
        self,
        x: Tensor,
        h: list[Tensor],
        initial: list[Tensor],
        reset: Tensor | None,
        batch_first: bool,
        batch_sizes: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Output like x, and states.

        x is (B, S, I) or (S, B, I), or packed, (1, rows, I), with `batch_sizes`; h (B, 1, H) and initial (1, 1, H) for
        each direction.
        """
        y = x
        if self.norm is not None:
            y = self.norm(x)
        out, last = self._direction(y, h[0], initial[0], reset, batch_first, batch_sizes, False)
        out = out if batch_first else out.transpose(0, 1)
        states = [last]
        if self.linear_reverse is not None:
            # Seen from the end, the boundary before step t comes before step t - 1.
            cut = None if reset is None else packed.one_step_on(reset, batch_sizes)
            back, last = self._direction(y, h[1], initial[1], cut, batch_first, batch_sizes, True)
            # Joined in the order of x, or the copy that this makes would lie in the other one.
            out = torch.cat([out, back if batch_first else back.transpose(0, 1)], -1)
            states.append(last)
        if self.residual:
            out = out + (x if self.align is None else self.align(x))
        return out, states

    def _direction(
        self,
        y: Tensor,
        h: Tensor,
        initial: Tensor,
        reset: Tensor | None,
        batch_first: bool,
        batch_sizes: Tensor | None,
        reverse: bool,
    ) -> States:
        """Linear and recurrence, in one go where that can be had; out is (B, S, H)."""
        missing = batch_sizes if batch_sizes is not None and batch_sizes.dtype == torch.bool else None
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            linear: Any = self.linear_reverse if reverse else self.linear
            if missing is None and _is_plain(linear):
                x = y if batch_first else y.transpose(0, 1)
                tensors = (x, linear.weight, linear.bias, h, initial, reset)
                how = (self.candidate, reverse, batch_sizes, self.recompute)
                states = ops.linear_recurrence(self.cell, *tensors, *how)
                if states is not None:
                    return states
        pre = self._pre_activations(y, reverse)
        inputs = list((pre if batch_first else pre.transpose(0, 1)).chunk(self.num_inputs, -1))
        if missing is not None:
            inputs, batch_sizes = packed.shut(self.cell, inputs, missing), None
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            initial = initial.expand_as(h)
            return portable.recurrence(self.cell, inputs, h, initial, reset, self.candidate, reverse, batch_sizes)
        else:
            return ops.recurrence(self.cell, inputs, h, initial, reset, self.candidate, reverse, batch_sizes)

    def _pre_activations(self, y: Tensor, reverse: bool) -> Tensor:
        pre = y
        if not reverse:
            pre = self.linear(y)
        elif self.linear_reverse is not None:
            pre = self.linear_reverse(y)
        return pre


def is_autocast(x: Tensor) -> bool:
    # Asking about a device that has none, such as "meta", is an error in torch.
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def not_default(module: nn.Module, defaults: dict[str, Any]) -> str:
    """The options that differ from their defaults, as a repr has them behind the sizes; a missing one does not."""
    options = {name: getattr(module, name, default) for name, default in defaults.items()}
    return "".join(f", {name}={value!r}" for name, value in options.items() if value != defaults[name])


def weight_of(module: nn.Module) -> Tensor | None:
    """A tensor with the dtype and device of its weight; None where it has no parameters, as a quantised one.

    Asked for `.weight`, a parametrised module would compute it anew, and some count how often.
    """
    weight = module._parameters.get("weight")
    return next(module.parameters(), None) if weight is None else weight


def is_hooked(module: nn.Module) -> bool:
    """Whether calling it does more than its class's `forward`."""
    return bool(
        _has_any_global_hook()  # type: ignore[no-untyped-call]
        or "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _is_plain(linear: nn.Module) -> bool:
    """Whether a call of it comes to F.linear(x, weight, bias): no quantised or parametrised one, and nothing hooked."""
    return type(linear) is nn.Linear and not is_hooked(linear)


def _order_of(packed_x: PackedSequence) -> Tensor:
    """Which element of the batch each of the sorted sequences is."""
    order = packed_x.sorted_indices
    return torch.arange(int(packed_x.batch_sizes[0]), device="cpu") if order is None else order.cpu()


class Recurrent(Base):
    """Layers of one kind, one over the other; the base of `MinGRU` and its siblings."""

    cell: str

    @arguments_checked()
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
        recompute: bool | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.name = type(self).__name__
        for argument, size in (("input_dims", input_dims), ("hidden_dims", hidden_dims), ("num_layers", num_layers)):
            check_int(self.name, argument, size)
        check_bias(self.name, bias)
        check_flags(self.name, batch_first=batch_first, bidirectional=bidirectional, residual=residual)
        check_flags(self.name, learn_initial_state=learn_initial_state)
        if recompute is not None:
            check_flag(self.name, "recompute", recompute, expected="a bool or None")
        check_dropout(self.name, dropout, num_layers)
        check_options(self.name, norm, NORMS, candidate, dtype)
        self.input_dims = input_dims
        self.hidden_dims = hidden_dims
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.residual = residual
        self.norm = norm
        self.candidate = candidate
        self.learn_initial_state = learn_initial_state
        self.recompute = recompute

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_directions = 2 if bidirectional else 1
        output_dims = self.num_directions * hidden_dims
        self.layers = nn.ModuleList(
            RecurrentLayer(
                self.cell,
                input_dims if index == 0 else output_dims,
                hidden_dims,
                self.bias,
                self.bidirectional,
                self.residual,
                norm,
                candidate,
                self.recompute,
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

    def forward(
        self, x: Tensor, h: Tensor | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> States:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            if x.dim() != 3 or x.size(2) != self.input_dims:
                letters = "(B, S, " if self.batch_first else "(S, B, "
                raise ValueError(f"{self.name}: x must be {letters}{self.input_dims}), got {x.shape}")
            if reset is not None and reset.shape != x.shape[:2]:
                raise ValueError(f"{self.name}: reset must be {x.shape[:2]}, got {reset.shape}")
        else:
            if isinstance(x, PackedSequence):
                return self._packed(x, h, reset, lengths)
            self._check(x, h, reset, lengths)
        time = 1 if self.batch_first else 0
        batch = x.size(1 - time)
        # Where there is no sequence, there is none to pack; and a trace can't ask.
        if lengths is None or ((torch.jit.is_scripting() or not is_tracing()) and batch == 0):  # type: ignore[attr-defined]
            if reset is not None and not self.batch_first:
                reset = reset.transpose(0, 1)
            return self._run(x, self._state(x, h, batch), reset, self.batch_first, None)
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            batch_sizes, order, places = packed.pack_index(lengths, x, self.batch_first)
        elif torch.compiler.is_compiling():
            return self._padded(x, h, reset, lengths)
        else:
            batch_sizes, order, places = for_trace(packed.pack_index)(lengths, x, self.batch_first)
        places = places.to(x.device)
        order = order.to(x.device)
        rows = x.flatten(0, 1).index_select(0, places).unsqueeze(0)
        cuts = None if reset is None else reset.flatten().index_select(0, places).unsqueeze(0)
        state = self._state(x, h, batch).index_select(1, order)
        out, last = self._run(rows, state, cuts, True, batch_sizes)
        padded = out.new_zeros([x.size(0) * x.size(1), out.size(2)])
        padded[places] = out.squeeze(0)
        return torch.unflatten(padded, 0, [x.size(0), x.size(1)]), last.index_select(1, order.argsort())

    def _padded(self, x: Tensor, h: Tensor | None, reset: Tensor | None, lengths: Tensor) -> States:
        """With padding and all, for a captured graph, which can't know how many steps are real: none shows there."""
        missing = packed.padding(lengths, x, self.batch_first)
        x = x.masked_fill(missing, 0.0)
        if reset is not None and not self.batch_first:
            reset = reset.transpose(0, 1)
        by_batch = missing if self.batch_first else missing.transpose(0, 1)
        cuts = None if reset is None else reset & ~by_batch.squeeze(2)
        state = self._state(x, h, lengths.size(0))
        out, last = self._run(x, state, cuts, self.batch_first, by_batch)
        return out.masked_fill(missing, 0.0), last

    def _packed(self, x: PackedSequence, h: Tensor | None, reset: Any, lengths: Any) -> Any:
        """A PackedSequence comes out for the one that goes in; states are in the order of before packing."""
        rows, batch_sizes, order, back = x
        rows = rows.unsqueeze(0)
        cuts = self._check_packed(x, h, reset, lengths)
        state = self._state(rows, h, int(batch_sizes[0]))
        state = state if order is None else state.index_select(1, order)
        out, last = self._run(rows, state, cuts, True, batch_sizes)
        packed_out = PackedSequence(out.squeeze(0), batch_sizes, order, back)
        return packed_out, last if back is None else last.index_select(1, back)

    def _state(self, x: Tensor, h: Tensor | None, batch: int) -> Tensor:
        """The state (L * D, B, 1, H) that h, or its absence, stands for."""
        shape = (self.num_layers * self.num_directions, batch, 1, self.hidden_dims)
        autocast = False
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            autocast = is_autocast(x)
        dtype = accumulate_dtype(x.dtype) if autocast else x.dtype
        if h is None and self.initial_state is None:
            return torch.full(shape, self.zero_state, dtype=dtype, device=x.device)
        if h is None:
            h = self.initial_state
        assert h is not None
        state = h
        # Without an answer about sizes, which a trace would take for all sizes.
        if torch.jit.is_scripting() or is_tracing() or h.shape != shape:  # type: ignore[attr-defined]
            state = h.expand(shape)
        return state.to(dtype) if autocast else state

    def _initial(self, state: Tensor) -> Tensor:
        """What a reset means, (L * D, 1, 1, H)."""
        if self.initial_state is not None:
            return self.initial_state
        zero = torch.full([1, 1, 1, 1], self.zero_state, dtype=state.dtype, device=state.device)
        return zero.expand(state.size(0), 1, 1, state.size(3))

    def _run(
        self, x: Tensor, state: Tensor, reset: Tensor | None, batch_first: bool, batch_sizes: Tensor | None
    ) -> States:
        """All layers; reset is (B, S), or (1, rows) as x is where there are `batch_sizes`.

        In their place, a mask (B, S, 1) tells where there is no step.
        """
        before = state.unbind(0)
        initials = before if reset is None else self._initial(state).unbind(0)
        states: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            first = index * self.num_directions
            end = first + self.num_directions
            x, last = layer(x, before[first:end], initials[first:end], reset, batch_first, batch_sizes)
            states += last
            if index < self.num_layers - 1 and self.dropout > 0:
                x = F.dropout(x, self.dropout, self.training)
        return x, states[0].unsqueeze(0) if len(states) == 1 else torch.stack(states)

    @untraced
    def _check(self, x: Tensor, h: Tensor | None, reset: Tensor | None, lengths: Tensor | None) -> None:
        """Refuse what does not fit."""
        if not isinstance(x, Tensor):
            raise TypeError(expectation(self.name, "x", "a tensor", type(x).__name__, "torch.as_tensor makes one"))
        letters = "(B, S, {})" if self.batch_first else "(S, B, {})"
        if x.dim() != 3 or x.shape[2] != self.input_dims:
            expected = f"{letters.format(self.input_dims)} as input_dims is {self.input_dims}"
            raise ValueError(expectation(self.name, "x", expected, dims(x.shape), embed_remedy(x)))
        batch, steps = x.shape[:2] if self.batch_first else (x.shape[1], x.shape[0])
        self._check_beside(x, h, batch)
        check_reset(self.name, reset, x, "(B, S)" if self.batch_first else "(S, B)")
        if lengths is not None:
            check_lengths(self.name, lengths, batch, steps, x.device)

    def _check_packed(self, x: PackedSequence, h: Tensor | None, reset: Any, lengths: Any) -> Tensor | None:
        """Likewise; returns the mask of resets, (1, rows)."""
        if lengths is not None:
            expected = "None beside a PackedSequence, which has its own"
            raise ValueError(expectation(self.name, "lengths", expected, type(lengths).__name__))
        if x.data.dim() != 2 or x.data.shape[1] != self.input_dims:
            expected = f"packed rows of {self.input_dims} features as input_dims is {self.input_dims}"
            raise ValueError(expectation(self.name, "x", expected, dims(x.data.shape), embed_remedy(x.data)))
        self._check_beside(x.data, h, int(x.batch_sizes[0]))
        if reset is None:
            return None
        if not isinstance(reset, PackedSequence):
            expected = "a PackedSequence as x is"
            remedy = "pack it with the lengths of x"
            raise TypeError(expectation(self.name, "reset", expected, type(reset).__name__, remedy))
        if not torch.equal(reset.batch_sizes, x.batch_sizes):
            raise ValueError(expectation(self.name, "reset", "packed with the lengths of x", "other lengths"))
        if not torch.equal(_order_of(reset), _order_of(x)):
            raise ValueError(expectation(self.name, "reset", "packed in the order of x", "another order"))
        cuts: Tensor = reset.data.unsqueeze(0)
        check_reset(self.name, cuts, x.data.unsqueeze(0), "(1, rows)")
        return cuts

    def _check_beside(self, x: Tensor, h: Tensor | None, batch: int) -> None:
        """Refuse an x that does not fit to the weights, and an h that does not fit to x."""
        autocast = is_autocast(x)
        layer: Any = next(iter(self.layers))
        weight = weight_of(layer.linear)
        if weight is not None:
            check_like(self.name, "x", x, weight, "the layer's weight", autocast=autocast, ids=True)
        if h is not None:
            check_one_state(self.name, h, "(L * D, B, 1, H)", self.cell)
            check_like(self.name, "h", h, x, "x", or_dtype=accumulate_dtype(x.dtype), autocast=autocast)
            shape = (self.num_layers * self.num_directions, batch, 1, self.hidden_dims)
            if h.shape != shape:
                remedy = "a state of nn.GRU, (L * D, B, H), becomes one by h.unsqueeze(2)"
                expanded(self.name, "h", h, shape, "(L * D, B, 1, H)", remedy)

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
            "recompute": None,
            "forget_bias": 0.0,
        }
        return text + not_default(self, defaults)
