"""The base class of MinGRU, MinLSTM and their cells: stacked layers, directions, states and options.

TorchScript compiles `forward` and the functions that it calls. A scripted module checks only shapes; other errors are
raised by torch.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import ops
from ..check import (
    arguments_checked,
    check_bias,
    check_dropout,
    check_flag,
    check_flags,
    check_gate,
    check_int,
    check_min_decay,
    check_options,
    check_pairs,
    check_residual,
)
from ..ops import Layout, Spec, Start, States, inference, layout, traceable
from ..ops.cells import CELLS, GATES, zero_state
from ..ops.graph import is_autocast, is_captured, is_compiling, is_scripting
from ..ops.inference import Plan, plannable
from ..ops.shape import accumulate_dtype, as_dtype
from .checked_calls import CheckedCalls
from .shared import not_default, reshaped

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


@plannable
class RecurrentLayer(nn.Module):
    """Apply norm, linear map, recurrence and residual or highway of one layer, in one direction or both."""

    def __init__(
        self,
        cell: str,
        input_dims: int,
        hidden_dims: int,
        bias: bool,
        bidirectional: bool,
        residual: bool | str,
        norm: str | None,
        candidate: str,
        min_decay: float,
        recompute: bool | None,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        output_dims = hidden_dims * (2 if bidirectional else 1)
        self.cell = cell
        self.hidden_dims = hidden_dims
        self.num_inputs = ops.NUM_INPUTS[cell]
        self.candidate = candidate
        self.min_decay = min_decay
        self.recompute = recompute
        self.residual = residual is True
        self.highway = residual == "highway"
        # The highway's rows are the last.
        pre_dims = hidden_dims * (self.num_inputs + self.highway)
        self.norm: nn.Module | None = None if norm is None else NORMS[norm](input_dims, **factory)
        self.linear = nn.Linear(input_dims, pre_dims, bias, **factory)
        self.linear_reverse = nn.Linear(input_dims, pre_dims, bias, **factory) if bidirectional else None
        self.align = None
        if self.residual and input_dims != output_dims:
            self.align = nn.Linear(input_dims, output_dims, bias=False, **factory)

    def forward(self, x: Tensor, starts: list[Start], order: Layout) -> tuple[Tensor, list[Tensor]]:
        """Return the output in the layout of x, and the last states; `starts` has one entry for each direction."""
        y = x
        if self.norm is not None:
            y = self.norm(x)
        if self.highway:
            return self._with_highway(x, y, starts[0], order)
        out, last = self._direction(y, starts[0], order, False)
        states = [last]
        if self.linear_reverse is not None:
            back, last = self._direction(y, layout.in_reverse(starts[1], order), order, True)
            out = torch.cat([out, back], -1)
            states.append(last)
        if self.residual:
            out = out + (x if self.align is None else self.align(x))
        return out, states

    def plan(self, plan: Plan, state: int) -> None:
        """Write the instructions of an inference pass."""
        plan.require(not self.highway, self.num_inputs == ops.NUM_INPUTS[self.cell])
        features = plan.keep() if self.residual else 0
        if self.norm is not None:
            plan.norm(self.norm)
        plan.scan(self._spec(False), state, self.hidden_dims, self.linear, self.linear_reverse)
        if self.residual and self.align is None:
            plan.add(features)
        elif self.residual:
            plan.add_linear(self.align, features)

    def _spec(self, reverse: bool) -> Spec:
        return Spec(self.cell, self.candidate, reverse, self.min_decay)

    def _with_highway(self, x: Tensor, y: Tensor, start: Start, order: Layout) -> tuple[Tensor, list[Tensor]]:
        inputs = list(self.linear(y).chunk(self.num_inputs + 1, -1))
        gate = inputs.pop()
        spec = self._spec(False)
        if is_scripting():
            out, last = traceable.recurrence(spec, inputs, start, order)
        else:
            out, last = ops.recurrence(spec, inputs, start, order)
        # sigma(-gate), because 1 - sigma(gate) would cancel near 1.
        return gate.sigmoid() * out + (-gate).sigmoid() * x, [last]

    def _direction(self, y: Tensor, start: Start, order: Layout, reverse: bool) -> States:
        spec = self._spec(reverse)
        if is_scripting():
            pre = y
            if not reverse:
                pre = self.linear(y)
            elif self.linear_reverse is not None:
                pre = self.linear_reverse(y)
            return traceable.recurrence(spec, list(pre.chunk(self.num_inputs, -1)), start, order)
        else:
            linear: Any = self.linear_reverse if reverse else self.linear
            return ops.linear_recurrence(spec, y, linear, start, order, self.recompute)


class Recurrent(CheckedCalls, role="sequence"):
    """Apply stacked layers of one cell type; the base class of `MinGRU` and `MinLSTM`."""

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
        residual: bool | str = False,
        norm: str | None = None,
        candidate: str = "positive",
        gate: str = "sigmoid",
        min_decay: float | Sequence[float] = 0.0,
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
        check_flags(self.name, batch_first=batch_first, bidirectional=bidirectional)
        check_flags(self.name, learn_initial_state=learn_initial_state)
        if recompute is not None:
            check_flag(self.name, "recompute", recompute, expected="a bool or None")
        check_dropout(self.name, dropout, num_layers)
        check_options(self.name, norm, NORMS, candidate, dtype)
        check_gate(self.name, "gate", gate)
        check_pairs(self.name, "hidden_dims", hidden_dims, gate)
        bounds = check_min_decay(self.name, min_decay, num_layers, gate)
        check_residual(self.name, residual, input_dims, hidden_dims, bidirectional)
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
        self.gate = gate
        # A number, or a tuple with one for each layer.
        self.min_decay = bounds[0] if len(set(bounds)) == 1 else tuple(bounds)
        if self.cell == "mingru":
            self.cell = GATES[gate]
        self.is_timed = CELLS[self.cell].not_timed is None
        self.learn_initial_state = learn_initial_state
        self.recompute = recompute

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_directions = 2 if bidirectional else 1
        self.num_states = 1
        self.output_dims = output_dims = self.num_directions * hidden_dims
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
                bounds[index],
                self.recompute,
                factory,
            )
            for index in range(num_layers)
        )
        self.zero_state = zero_state(self.cell, candidate)
        shape = (num_layers * self.num_directions, 1, 1, hidden_dims)
        self.initial_state = (
            nn.Parameter(torch.full(shape, self.zero_state, **factory)) if learn_initial_state else None
        )

    def reset_parameters(self) -> None:
        """Re-initialize all parameters."""
        for module in self.layers.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
        if self.initial_state is not None:
            nn.init.constant_(self.initial_state, self.zero_state)

    def forward(
        self,
        x: Tensor,
        h: Tensor | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | None = None,
    ) -> States:
        if is_scripting():
            self._check_scripted_call(x, reset, dt)
        else:
            if lengths is None:
                done = inference.run(self, x, None if h is None else [h], reset, not self.batch_first, dt)
                if done is not None:
                    return done[0], done[1][0]
            if isinstance(x, PackedSequence):
                return self._packed(x, h, reset, lengths, dt)
            self._check(x, h, reset, lengths, dt)
        state = self._state(x, h, x.size(0 if self.batch_first else 1))
        if lengths is None:
            return self._run(x, state, reset, dt, Layout(not self.batch_first))
        if not is_scripting():
            if self._takes_lengths(x, lengths, dt):
                x, order = layout.with_lengths(x, lengths, not self.batch_first)
                return self._run(x, state, reset, dt, order)
        return self._run_packed(x, state, reset, dt, lengths)

    def with_states(
        self, x: Tensor, h: list[Tensor] | None, reset: Tensor | None, lengths: Tensor | None, dt: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Call the layer with its state in a list, and return the new state in a list."""
        out, last = self(x, None if h is None else h[0], reset, lengths, dt)
        return out, [last]

    def default_states(self, x: Tensor, batch: int) -> list[Tensor]:
        """Return the states that replace h=None."""
        return [self._state(x, None, batch)]

    def state_shapes(self, batch: int) -> list[tuple[int, ...]]:
        """Return the shape of the state in a list."""
        return [(self.num_layers * self.num_directions, batch, 1, self.hidden_dims)]

    def plan(self, plan: Plan) -> None:
        """Write the instructions of an inference pass."""
        layers = plan.children(self.layers, nn.ModuleList, RecurrentLayer)
        plan.require(len(layers) == self.num_layers)
        if len(layers) > 1:
            plan.dropout(self)
        for layer in layers:
            plan.require(
                layer.hidden_dims == self.hidden_dims, (layer.linear_reverse is not None) == (self.num_directions == 2)
            )
            layer.plan(plan, plan.num_states)
        plan.num_states += 1

    def _takes_lengths(self, x: Tensor, lengths: Tensor, dt: Tensor | None) -> bool:
        """Return whether all layers take padded sequences with lengths. Otherwise the sequences are packed.

        A compiled graph masks the padding, because it cannot depend on the number of valid steps. A kernel that skips
        the padding computes a linear map and its recurrence, but no norm and no residual.
        """
        if is_compiling():
            return True
        layers: Any = self.layers
        if any(layer.norm is not None or layer.residual or layer.highway for layer in layers):
            return False
        linears = [each for layer in layers for each in (layer.linear, layer.linear_reverse) if each is not None]
        return ops.takes_lengths(layers[0]._spec(False), linears, x, dt, Layout(False, None, lengths))

    def _run_packed(self, x: Tensor, state: Tensor, reset: Tensor | None, dt: Tensor | None, lengths: Tensor) -> States:
        """Pack the valid steps once for all layers."""
        batch_sizes, order, index = layout.packing_of(lengths, x, not self.batch_first)
        index, order = index.to(x.device), order.to(x.device)
        reset = None if reset is None else layout.pack(reset, index)
        dt = None if dt is None else layout.pack(dt, index)
        packed = layout.pack(x, index)
        out, last = self._run(packed, state.index_select(1, order), reset, dt, Layout(False, batch_sizes))
        padded = layout.unpack(out, index, x.size(0) * x.size(1))
        # The state of an empty sequence stays.
        return reshaped(padded, [x.size(0), x.size(1), out.size(1)]), state.index_copy(1, order, last)

    def _packed(self, x: PackedSequence, h: Tensor | None, reset: Any, lengths: Any, dt: Any) -> Any:
        """Return a PackedSequence, and the states in the order of the batch before packing."""
        data, batch_sizes, order, original_order = x
        packed_reset, packed_dt = self._check_packed(x, h, reset, lengths, dt)
        state = self._state(data, h, int(batch_sizes[0]))
        state = state if order is None else state.index_select(1, order)
        out, last = self._run(data, state, packed_reset, packed_dt, Layout(False, batch_sizes))
        if original_order is not None:
            last = last.index_select(1, original_order)
        return PackedSequence(out, batch_sizes, order, original_order), last

    def _state(self, x: Tensor, h: Tensor | None, batch: int) -> Tensor:
        """Return h expanded to (L * D, B, 1, H), or the initial state if h is None."""
        shape = (self.num_layers * self.num_directions, batch, 1, self.hidden_dims)
        autocast = False
        if not is_scripting():
            autocast = is_autocast(x)
        dtype = accumulate_dtype(x.dtype) if autocast else x.dtype
        if h is None and self.initial_state is None:
            return torch.full(shape, self.zero_state, dtype=dtype, device=x.device)
        if h is None:
            h = self.initial_state
        assert h is not None
        state = h
        # In a graph, h is always expanded, because a trace records the comparison as a constant.
        if is_captured() or h.shape != shape:
            state = h.expand(shape)
        return state.to(dtype) if autocast else state

    def _run(self, x: Tensor, state: Tensor, reset: Tensor | None, dt: Tensor | None, order: Layout) -> States:
        """Run all layers, and return their states as one new tensor, which is never a view."""
        out, states = self._run_layers(x, state, reset, dt, order)
        return out, torch.stack(states)

    def _run_layers(
        self, x: Tensor, state: Tensor, reset: Tensor | None, dt: Tensor | None, order: Layout
    ) -> tuple[Tensor, list[Tensor]]:
        """Run all layers, and return a state (B, 1, H) for each; reset and dt have the leading dimensions of x."""
        if dt is not None:
            dt = as_dtype(dt, accumulate_dtype(x.dtype))
        constant = state
        if reset is not None and self.initial_state is None:
            constant = torch.full([1, 1, state.size(3)], self.zero_state, dtype=state.dtype, device=state.device)
        starts: list[Start] = []
        for index, h in enumerate(state.unbind(0)):
            initial_state = constant if self.initial_state is None else self.initial_state[index]
            starts.append(Start(h, h if reset is None else initial_state, reset, dt))
        states: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            first = index * self.num_directions
            x, last = layer(x, starts[first : first + self.num_directions], order)
            states += last
            if index < self.num_layers - 1 and self.dropout > 0:
                x = F.dropout(x, self.dropout, self.training)
        return x, states

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
            "gate": "sigmoid",
            "min_decay": 0.0,
            "learn_initial_state": False,
            "recompute": None,
            "forget_bias": 0.0,
            "normalize": True,
        }
        return text + not_default(self, defaults)
