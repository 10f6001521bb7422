"""One layer of MinGRU and MinLSTM: norm, linear map, recurrence, output gate and residual or highway."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..check.values import check_int, check_parts, is_number, level_of_the_caller, require
from ..ops.call import Context, Layout, Spec
from ..ops.cells import CELLS, GATES
from ..ops.modes import is_scripting
from ..ops.shape import MaybeList, States
from .levels import Level
from .options import Options
from .plan import plannable
from .saved import add_marks, refuse_other_cells, take_marks

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class RecurrentOptions(Options):
    """The options of MinGRU and MinLSTM."""

    # Of options that not all classes have.
    gate, min_decay, normalize, forget_bias, block_size = "sigmoid", 0.0, True, 0.0, None
    candidate: Any = None
    output_gate: Any = None
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
        expected, remedy = (
            "at least 2 because norm is 'layer', which makes one feature 0",
            "use more, or leave norm out",
        )
        require(self.name, argument, self.norm != "layer", expected, str(size), remedy)
        text = f"{self.name}: norm='rms' leaves only the sign of one feature, and {argument} is {size}; {remedy}"
        warnings.warn(text, stacklevel=level_of_the_caller())


@plannable
class RecurrentLevel(Level):
    """Apply norm, linear map, recurrence, output gate and residual of one layer, in one direction or both."""

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
        self._add_recurrent(options)
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

    def _add_recurrent(self, options: Any) -> None:
        """Add the recurrent weights of each direction, if the cell has any."""

    def initialize_maps(self) -> None:
        super().initialize_maps()
        for linear in self.maps() if self.forget_bias != 0 else []:
            linear.bias.detach()[: self.hidden_dims] += self.forget_bias

    def maps(self) -> list[Any]:
        """Return the linear map of each direction."""
        return [self.linear] if self.linear_reverse is None else [self.linear, self.linear_reverse]

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
        linear: Any = self.linear_reverse if spec.reverse else self.linear
        norm = self.norm if self.linear_reverse is None else None
        return ops.linear_recurrence(spec, y, linear, context, layout, self.recompute, norm, self.has_output_gate)

    def _with_recurrent(self, context: Context, reverse: bool) -> Context:
        """Return the context with the recurrent weights of a direction, if the cell has any."""
        return context

    def _inputs(self, y: Tensor, reverse: bool) -> list[Tensor]:
        """Return the pre-activations of one direction; those of the highway or of the output gate are the last."""
        pre = y
        if not reverse:
            pre = self.linear(y)
        elif self.linear_reverse is not None:
            pre = self.linear_reverse(y)
        return list(pre.chunk(self.num_parts, -1))
