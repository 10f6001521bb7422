"""Tensor parallel: each rank has a part of the features of the states, and the rows of the weights that compute it.

A layer's input is equal on all ranks. Each rank computes the recurrence of its own features, which need no others, and
all ranks gather the outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from .. import ops
from ..check import require
from ..modules.recurrent import Recurrent, RecurrentLayer
from ..modules.stacked import Directions
from ..ops.call import Layout, Spec, Start
from ..ops.cells import parts_of
from ..ops.shape import States
from .ranks import Ranks, derive, eager, outermost

_NAME = "TensorParallel"


class TensorParallel(ParallelStyle):
    """Divide the features of the states of layers among the ranks of a mesh.

    It is a `ParallelStyle` for `torch.distributed.tensor.parallel.parallelize_module`:

        parallelize_module(model, mesh, TensorParallel())
        parallelize_module(block, mesh, {"rnn": TensorParallel(output_layouts=Shard(-1)), "out": RowwiseParallel()})

    The style applies to every layer and cell of this library in the module, convolutional ones and those in `Stack`,
    `models.Block` and `models.LanguageModel` included. Of each linear map, rank r gets part r of the rows of the gate,
    part r of the rows of the candidate, and so on, so that it computes all inputs of its own features. All other
    parameters stay as they are, equal on all ranks.

    The arguments of a call are equal on all ranks, states included, and so are all results. Each layer gathers its
    output, B S H numbers, and its state, and sums the gradient of its input over the ranks.

    Args:
        output_layouts: `Replicate()` for the whole output on each rank, or `Shard(-1)` for the features of the rank,
            which a following `RowwiseParallel` takes. The latter needs one direction and no residual in the last layer.

    Raises:
        TypeError: `device_mesh` is no mesh.
        ValueError: The mesh has several dimensions, or a layer cannot be divided: its `hidden_dims` (or the pairs and
            groups of four of `gate="rotation"` and `gate="quaternion"`) are no multiple of the number of ranks, or it
            has `proj_size` or `groups`.

    State dict:
        The state_dict has the whole weights, equal on all ranks, and is that of one process, so that
        `torch.distributed.checkpoint` loads it with any number of ranks. The parameters are DTensors, (parts, H, I)
        divided in dimension 1, and an optimizer has such states.

    Numerics:
        Outputs and gradients are those of one process, up to the rounding of products and sums of other sizes. All
        ranks must compute the same loss, whose gradients are then whole, and not a part of a sum.

    Examples:
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from mingru.distributed import TensorParallel
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # one process; see the guide
        >>> mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        >>> rnn = parallelize_module(mingru.MinGRU(3, 64), mesh, TensorParallel())
        >>> out, h = rnn(torch.randn(10, 128, 3))
        >>> out.shape, h.shape
        (torch.Size([10, 128, 64]), torch.Size([1, 10, 1, 64]))
        >>> dist.destroy_process_group()
    """

    def __init__(self, *, output_layouts: Placement | None = None) -> None:
        super().__init__()
        expected, got = "Replicate() or Shard(-1)", repr(output_layouts)
        require(_NAME, "output_layouts", output_layouts in (None, Replicate(), Shard(-1)), expected, got)
        self.is_sharded = output_layouts == Shard(-1)

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        ranks, layers = Ranks(_NAME, device_mesh), outermost(_NAME, module)
        found: list[Any] = [each for layer in layers for each in layer.modules() if isinstance(each, Directions)]
        for each in found:
            _check_divisible(each, ranks)
        if self.is_sharded:
            last, is_layer = found[-1], len(layers) == 1 and isinstance(layers[0], Recurrent)
            is_plain = is_layer and not last.residual and not last.highway and len(last.maps()) == 1
            expected = "Replicate() unless the module is a layer with one direction and no residual"
            require(_NAME, "output_layouts", is_plain, expected, "Shard(-1)")
        for each in found:
            is_linear = isinstance(each, RecurrentLayer)
            parts = each.num_inputs + each.highway if is_linear else 2
            for linear in each.maps():
                derive(linear, _Linear if is_linear else _Conv, ranks)
                linear.divide(parts, self.src_data_rank)
            derive(each, _Layer, ranks)
            each.is_sharded = self.is_sharded and each is found[-1]
        return module


def _check_divisible(layer: Any, ranks: Ranks) -> None:
    numbers = layer.hidden_dims // parts_of(layer.cell)
    why = None
    if hasattr(layer, "ranks"):
        why = "is already parallel"
    elif getattr(layer, "projections", None) is not None:
        why = "has proj_size, whose map needs the states of all ranks; apply a RowwiseParallel Linear to its output"
    elif layer.groups > 1:
        why = "has groups, whose channels are in other places than those of a rank"
    elif numbers % ranks.size:
        why = f"has {numbers} numbers as its state (hidden_dims {layer.hidden_dims}), no multiple of {ranks.size} ranks"
    if why is not None:
        raise ValueError(f"{_NAME}: module cannot be divided: a layer with gate {layer.cell!r} {why}")


class _Layer(Directions):
    """A layer that computes the features of its rank."""

    ranks: Ranks
    is_sharded: bool

    def _direction(self, y: Tensor, start: Start, layout: Layout, reverse: bool) -> States:
        return self._recurrence(self.spec(reverse), self._inputs(y, reverse), start, layout)

    @eager
    def _inputs(self, y: Tensor, reverse: bool) -> list[Tensor]:
        inputs = super()._inputs(self.ranks.copy(y), reverse)
        return [*inputs[:-1], self.ranks.join(inputs[-1])] if getattr(self, "highway", False) else inputs

    @eager
    def _recurrence(self, spec: Spec, inputs: list[Tensor], start: Start, layout: Layout) -> States:
        is_packed, own = layout.batch_sizes is not None, inputs[0]
        batch = start.h.shape[0] if is_packed else own.shape[1 if layout.time_first else 0]
        shape = (batch, 1, self.hidden_dims, *(() if is_packed else own.shape[3:]))
        h, initial_state = (self.ranks.divide(each.expand(shape)) for each in start[:2])
        out, last = ops.recurrence(spec, inputs, start._replace(h=h, initial_state=initial_state), layout)
        return out if self.is_sharded else self.ranks.join(out), self.ranks.join(last)


class _Rows(nn.Module):
    """A linear map or a convolution with a part of the rows of each input of a cell."""

    ranks: Ranks
    parts: int

    def divide(self, parts: int, src_data_rank: int | None) -> None:
        self.parts = parts
        for name, whole in [*self._parameters.items()]:
            if whole is not None:
                rows = nn.Parameter(self._divided(whole.detach(), src_data_rank), whole.requires_grad)
                self.register_parameter(name, rows)

    def _divided(self, whole: Tensor, src_data_rank: int | None = None) -> Tensor:
        """Return rows as a DTensor (parts, H, *), of which each rank has a part of H."""
        rows = torch.unflatten(whole, 0, (self.parts, -1))
        return distribute_tensor(rows, self.ranks.mesh, [Shard(1)], src_data_rank=src_data_rank)

    def _own(self) -> list[Any]:
        rows: list[Any] = [self._parameters["weight"], self._parameters["bias"]]
        return [None if each is None else each.to_local().flatten(0, 1) for each in rows]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        rows: dict[str, Any] = {name: each for name, each in self._parameters.items() if each is not None}
        destination.update((prefix + name, each.detach().full_tensor().flatten(0, 1)) for name, each in rows.items())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, rows in self._parameters.items():
            whole = state_dict.get(prefix + name)
            if rows is not None and whole is not None and whole.shape == rows.flatten(0, 1).shape:
                state_dict[prefix + name] = self._divided(whole.to(rows.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Linear(_Rows):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self._own())


class _Conv(_Rows):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super()._conv_forward(x, *self._own())  # type: ignore[misc]
        return out
