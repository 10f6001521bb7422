"""One level of a layer: norm, map of x, recurrence in one direction or both, output gate, and residual or highway."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..check.values import check_flag, check_int, check_parts, is_number, level_of_the_caller, require
from ..ops.call import Context, Layout, Spec, spec_of
from ..ops.cells import CELLS, GATES, default_candidate, gate_biases, parts_of
from ..ops.layout import in_reverse
from ..ops.linear_map import RecurrentMap, gated
from ..ops.modes import is_scripting
from ..ops.shape import MaybeList, MaybeTensor, Outputs, States
from .layer import reset_all
from .options import Options
from .plan import plannable
from .saved import GATE_OF, OF_LEVELS, Saved, add_marks, refuse_other_cells, take_marks

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class RecurrentOptions(Options):
    """The options of MinGRU and MinLSTM."""

    # Of options that not all classes have.
    gate, min_decay, normalize, forget_bias, block_size = "sigmoid", 0.0, True, 0.0, None
    candidate: str | None = None
    output_gate: str | None = None
    proj_size = 0
    """Number of features to which each layer and direction maps its output, or 0; only `drop_in` has this option."""

    def check(self) -> None:
        check_int(self.name, "hidden_dims", self.hidden_dims)
        super().check()
        for gate in dict.fromkeys(self.gates):
            check_parts(self.name, "hidden_dims", self.hidden_dims, gate)
        if self.residual == "highway":
            expected, remedy = "False because residual is 'highway'", "use a layer for each direction"
            require(self.name, "bidirectional", not self.bidirectional, expected, "True", remedy)
            expected = f"{self.input_dims} like input_dims because residual is 'highway'"
            is_equal, remedy = self.hidden_dims == self.input_dims, "change the size of x by a torch.nn.Linear before"
            require(self.name, "hidden_dims", is_equal, expected, str(self.hidden_dims), remedy)
        gate = self.output_gate
        remedy = "gate the output yourself, by a torch.nn.Linear"
        excluding = {"residual": self.residual == "highway", "proj_size": self.proj_size > 0} if gate else {}
        for option, is_used in excluding.items():
            expected = f"None because {option} is {getattr(self, option)!r}"
            require(self.name, "output_gate", not is_used, expected, repr(gate), remedy)
        got = repr(self.forget_bias)
        require(self.name, "forget_bias", is_number(self.forget_bias), "a number", got, error=TypeError)
        require(self.name, "forget_bias", self.bias or self.forget_bias == 0, "0 because bias is False", got)
        self.check_norm(self.input_dims, "input_dims")
        if self.num_layers > 1:
            inner = self.proj_size or self.hidden_dims
            self.check_norm(inner * (1 + self.bidirectional), "proj_size" if self.proj_size else "hidden_dims")
        # The cell of each layer.
        cell = self.cell if self.normalize else f"{self.cell}_unnormalized"
        self.cells = [GATES[gate] if cell == "mingru" else cell for gate in self.gates]

    def check_norm(self, size: int, argument: str) -> None:
        """Raise an error if a layer has one input feature and its norm is 0; warn if its norm is a sign."""
        if size > 1 or self.norm is None:
            return
        expected = "at least 2 because norm is 'layer', which makes one feature 0"
        remedy = "use more, or leave norm out"
        require(self.name, argument, self.norm != "layer", expected, str(size), remedy)
        text = f"{self.name}: norm='rms' leaves only the sign of one feature, and {argument} is {size}; {remedy}"
        warnings.warn(text, stacklevel=level_of_the_caller())


class GRUOptions(RecurrentOptions):
    """The options of GRU."""

    def check(self) -> None:
        if self.block_size is not None:
            check_int(self.name, "block_size", self.block_size)
        check_flag(self.name, "residual", self.residual)
        expected, got = f"left out because cell is {self.cell!r}", self.candidate
        require(self.name, "candidate", got in (None, "tanh"), expected, repr(got), "pass cell='mingru' to use it")
        self.candidate = "tanh"
        super().check()
        size = self.block_size or self.hidden_dims
        fits = self.hidden_dims <= size or self.hidden_dims % size == 0
        expected, got = f"divisible by block_size = {size}", str(self.hidden_dims)
        divisors = (each for each in range(1, size) if self.hidden_dims % each == 0)
        require(self.name, "hidden_dims", fits, expected, got, f"pass block_size={max(divisors, default=1)}")


class Level(Saved):
    """The recurrence of one level, in one direction or both. Subclasses compute the pre-activations."""

    _marks = OF_LEVELS

    def __init__(self, cell: str, hidden_dims: int, min_decay: float, options: Options) -> None:
        super().__init__()
        self.cell = cell
        self.hidden_dims = hidden_dims
        self.has_output_gate: bool = getattr(options, "output_gate", None) is not None
        self.candidate = options.candidate or default_candidate(cell)
        self.min_decay = min_decay
        self.memories = options.memories_of(cell, min_decay)

    def reset_parameters(self) -> None:
        """Re-initialize all parameters."""
        reset_all(self.children())
        self.initialize_maps()

    def initialize_maps(self) -> None:
        """Change the initial weights of the maps as options need: add to the bias of the gates what `memory` needs."""
        for linear in self.maps() if any(self.memories.values()) else []:
            rows = linear.bias.detach().view(-1, self.hidden_dims).chunk(len(self.memories), 1)
            for (cell, memory), own in zip(self.memories.items(), rows, strict=True):
                if memory is None:
                    continue
                numbers, (first, last) = own[:, :: parts_of(cell)], memory
                count, half = numbers.size(1), 0.5 / numbers.size(1)
                steps = first * torch.logspace(half, 1 - half, count, last / first, dtype=torch.float64, device="cpu")
                for row, biases in zip(numbers, gate_biases(cell, steps), strict=False):
                    row.add_(biases.to(row))

    def _said(self) -> dict[str, object]:
        is_default = self.candidate == default_candidate(self.cell)
        return {
            "gate": GATE_OF.get(self.cell, "sigmoid"),
            "candidate": None if is_default else self.candidate,
            "normalize": self.cell != "minlstm_unnormalized",
            "residual": "highway" if getattr(self, "highway", False) else self.residual,
            "output_gate": "silu" if self.has_output_gate else None,
        }

    def maps(self) -> list[Any]:
        """Return the linear map of each direction."""
        raise NotImplementedError

    def spec(self, reverse: bool) -> Spec:
        """Return the recurrence of one direction."""
        return spec_of(self.cell, self.candidate, reverse, self.min_decay)

    def _directions(self, y: Tensor, contexts: list[Context], layout: Layout, found: MaybeList = None) -> Outputs:
        """Return the output and the last states; `contexts` has one entry for each direction.

        Append the states of all steps in each direction to `found`.
        """
        out, last = self._direction(y, contexts[0], layout, False, found)
        states = [last]
        if len(contexts) > 1:
            back, last = self._direction(y, self._in_reverse(contexts[1], layout), layout, True, found)
            # The features of packed steps are dimension 1.
            out = torch.cat([out, back], min(2, y.dim() - 1))
            states.append(last)
        return out, states

    def _direction(self, y: Tensor, context: Context, layout: Layout, reverse: bool, found: MaybeList) -> States:
        """Run one direction: by one kernel if possible, scripted by operations that TorchScript can compile."""
        raise NotImplementedError

    def _from_inputs(self, spec: Spec, y: Tensor, context: Context, layout: Layout, found: MaybeList = None) -> States:
        """Run one direction from its pre-activations."""
        inputs = self._inputs(y, spec.reverse)
        gate: MaybeTensor = None
        if self.has_output_gate:
            gate = inputs.pop()
        if layout.batch_sizes is None:
            # A convolution may have states of any batch, features and space.
            sizes = list(inputs[0].shape)
            sizes = [sizes[1 if layout.time_first else 0], 1, self.hidden_dims] + sizes[3:]  # noqa: RUF005 (not in TorchScript)
            own = context.h.expand(sizes), context.initial_state.expand(sizes)
            context = Context(own[0], own[1], *context[2:])
        out, last = self._run_cell(spec, inputs, context, layout)
        if found is not None:
            found.append(out)
        return gated((out, last), gate)

    def _inputs(self, y: Tensor, reverse: bool) -> list[Tensor]:
        """Return the pre-activations of one direction, and its output gate if it has one."""
        raise NotImplementedError

    def _run_cell(self, spec: Spec, inputs: list[Tensor], context: Context, layout: Layout) -> States:
        """Compute the recurrence from its pre-activations. `mingru.distributed` replaces it."""
        return ops.recurrence(spec, inputs, context, layout)

    def _in_reverse(self, context: Context, layout: Layout) -> Context:
        return in_reverse(context, layout)


@plannable
class LinearLevel(Level):
    """A level whose input is mapped by `torch.nn.Linear`: that of MinGRU, MinLSTM, GRU and their cells."""

    _loading = refuse_other_cells, take_marks

    def __init__(
        self, cell: str, input_dims: int, min_decay: float, options: RecurrentOptions, linear: type[nn.Module]
    ) -> None:
        super().__init__(cell, options.hidden_dims, min_decay, options)
        factory, proj_size = options.factory, options.proj_size
        output_dims = (proj_size or options.hidden_dims) * options.num_directions
        self.forget_bias = float(options.forget_bias)
        self.recompute = options.recompute
        self.residual = options.residual is True
        self.highway = options.residual == "highway"
        # The rows of the highway or of the output gate are the last.
        self.num_parts = CELLS[cell].num_inputs + int(self.highway or self.has_output_gate)
        pre_dims = self.hidden_dims * self.num_parts
        self.norm: nn.Module | None = None if options.norm is None else NORMS[options.norm](input_dims, **factory)
        self.linear = linear(input_dims, pre_dims, options.bias, **factory)
        self.linear_reverse = linear(input_dims, pre_dims, options.bias, **factory) if options.bidirectional else None
        self.projections: nn.ModuleList | None = None
        if proj_size > 0:
            maps = [linear(self.hidden_dims, proj_size, False, **factory) for _ in range(options.num_directions)]
            self.projections = nn.ModuleList(maps)
        self.align = None
        if self.residual and input_dims != output_dims:
            self.align = linear(input_dims, output_dims, False, **factory)
        self.recurrent: nn.Module | None = None
        self.recurrent_reverse: nn.Module | None = None
        if cell == "gru":
            size = min(options.block_size or self.hidden_dims, self.hidden_dims)
            sizes = self.hidden_dims, size, options.bias
            self.recurrent = RecurrentMap(*sizes, **factory)
            self.recurrent_reverse = RecurrentMap(*sizes, **factory) if options.bidirectional else None
        self.initialize_maps()
        add_marks(self, options.device)

    def forward(
        self, x: Tensor, contexts: list[Context], layout: Layout, found: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the output in the layout of x, and the last states; `contexts` has one entry for each direction.

        Append the states of all steps in each direction to `found`.
        """
        y = x
        if self.norm is not None and not self._fuses_norm(found):
            y = self.norm(x)
        if self.highway:
            inputs = self._inputs(y, False)
            gate = inputs.pop()
            out, last = self._run_cell(self.spec(False), inputs, contexts[0], layout)
            if found is not None:
                found.append(out)
            # sigma(-gate), because 1 - sigma(gate) would cancel near 1.
            return gate.sigmoid() * out + (-gate).sigmoid() * x, [last]
        out, states = self._directions(y, contexts, layout, found)
        if self.projections is not None:
            out = torch.cat(self.projected(list(out.chunk(len(self.projections), -1))), -1)
        if self.residual:
            out = out + (x if self.align is None else self.align(x))
        return out, states

    def initialize_maps(self) -> None:
        """Begin a GRU as `torch.nn.GRU`, whose two biases of r and z are here their sum; add what options need."""
        bound = self.hidden_dims**-0.5
        for linear in [] if self.recurrent is None else self.maps():
            for parameter in linear.parameters():
                nn.init.uniform_(parameter, -bound, bound)
            if linear.bias is not None:
                both = linear.bias.detach()[: 2 * self.hidden_dims]
                both += both.new_empty(len(both)).uniform_(-bound, bound)
        super().initialize_maps()
        for linear in self.maps() if self.forget_bias != 0 else []:
            linear.bias.detach()[: self.hidden_dims] += self.forget_bias

    def maps(self) -> list[Any]:
        """Return the linear map of each direction."""
        # Not by attributes, which take longer.
        first = self._modules["linear"]
        return [first] if self.linear_reverse is None else [first, self.linear_reverse]

    def projected(self, states: list[Tensor]) -> list[Tensor]:
        """Return the projection of the states of each direction."""
        found: list[Tensor] = []
        if self.projections is not None:
            for index, projection in enumerate(self.projections):
                found.append(projection(states[index]))
        return found

    def _is_one_kernel(self, found: MaybeList) -> bool:
        """Return whether linear map, recurrence and output gate may be one kernel, which has no states to find."""
        return not is_scripting() and not self.highway and (found is None or not self.has_output_gate)

    def _fuses_norm(self, found: MaybeList) -> bool:
        """Return whether the norm is computed with the linear map: not if several maps read its result."""
        return self._is_one_kernel(found) and self.linear_reverse is None

    def _direction(self, y: Tensor, context: Context, layout: Layout, reverse: bool, found: MaybeList) -> States:
        spec, context = self.spec(reverse), self._with_recurrent(context, reverse)
        if not is_scripting():
            if self._is_one_kernel(found):
                out, last = self._mapped(spec, y, context, layout)
                if found is not None:
                    found.append(out)
                return out, last
        return self._from_inputs(spec, y, context, layout, found)

    def _mapped(self, spec: Spec, y: Tensor, context: Context, layout: Layout) -> States:
        """Compute the map and the recurrence, by one kernel if possible. `mingru.distributed` replaces this."""
        linear = self.maps()[spec.reverse]
        norm = self.norm if self.linear_reverse is None else None
        return ops.linear_recurrence(spec, y, linear, context, layout, self.recompute, norm, self.has_output_gate)

    def _with_recurrent(self, context: Context, reverse: bool) -> Context:
        """Return the context with the recurrent weights of a direction, if the cell has any."""
        if self.recurrent is None:
            return context
        # By calls, because hooks may compute the weights.
        weight, bias = self.recurrent()
        if self.recurrent_reverse is not None:
            if reverse:
                weight, bias = self.recurrent_reverse()
        return Context(context.h, context.initial_state, context.reset, context.dt, weight, bias)

    def _inputs(self, y: Tensor, reverse: bool) -> list[Tensor]:
        """Return the pre-activations of one direction; those of the highway or of the output gate are the last."""
        pre = y
        if not reverse:
            pre = self.linear(y)
        elif self.linear_reverse is not None:
            pre = self.linear_reverse(y)
        return list(pre.chunk(self.num_parts, -1))
