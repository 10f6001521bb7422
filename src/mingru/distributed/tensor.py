"""Tensor parallel: each rank has a part of the features of the states, and the rows of the weights that compute it.

A layer's input is equal on all ranks. Each rank computes the recurrence of its own features, which need no others, and
all ranks gather the outputs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from .. import ops
from ..check.values import require
from ..modules.level import Level, LinearLevel
from ..modules.stacked import Recurrent
from ..ops.call import Context, Layout, Spec
from ..ops.cells import MIXTURES, parts_of
from ..ops.shape import MaybeTensor, States
from .ranks import Part, derive, eager, outermost

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
            has `proj_size` or `gate="mixed"`.

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

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layers = outermost(_NAME, module, device_mesh)
        found: list[Any] = [each for layer in layers for each in layer.modules() if isinstance(each, Level)]
        for each in found:
            _check_divisible(each, device_mesh.size())
        if self.is_sharded:
            last, is_layer = found[-1], len(layers) == 1 and isinstance(layers[0], Recurrent)
            is_plain = is_layer and not last.residual and not last.highway and len(last.maps()) == 1
            expected = "Replicate() unless the module is a layer with one direction and no residual"
            require(_NAME, "output_layouts", is_plain, expected, "Shard(-1)")
        for each in found:
            parts = each.num_parts if isinstance(each, LinearLevel) else 2
            for linear in each.maps():
                derive(linear, _Rows, device_mesh)
                linear.divide(parts, self.src_data_rank)
            derive(each, _Layer, device_mesh)
            each.is_sharded = self.is_sharded and each is found[-1]
        return module


def _check_divisible(layer: Level, size: int) -> None:
    numbers = layer.hidden_dims // parts_of(layer.cell)
    sizes = f"{numbers} numbers as its state (hidden_dims {layer.hidden_dims}), no multiple of {size} ranks"
    remedy = "apply a RowwiseParallel Linear to its output"
    reasons = {
        "is already parallel": hasattr(layer, "mesh"),
        f"has proj_size, whose map needs the states of all ranks; {remedy}": getattr(layer, "projections", None),
        "has features of two kinds, in other places than those of a rank": layer.cell in MIXTURES,
        "has recurrent weights, which would be divided too": layer.cell == "gru",
        f"has {sizes}": numbers % size,
    }
    for why in (why for why, holds in reasons.items() if holds):
        raise ValueError(f"{_NAME}: module cannot be divided: a layer with the cell {layer.cell!r} {why}")


class _Layer(Part):
    """A layer that computes the features of its rank."""

    is_sharded: bool

    @eager
    def _inputs(self, y: Tensor, reverse: bool) -> list[Tensor]:
        # Each rank computes a part of the gradient of y, which is their sum.
        y = DTensor.from_local(y, self.mesh, [Replicate()]).to_local(grad_placements=[Partial()])
        inputs = super()._inputs(y, reverse)
        # That of the highway or of the output gate.
        has_more = getattr(self, "highway", False) or (self.has_output_gate and not self.is_sharded)
        return [*inputs[:-1], self._join(inputs[-1])] if has_more else inputs

    @eager
    def _run_cell(self, spec: Spec, inputs: list[Tensor], context: Context, layout: Layout) -> States:
        h, initial_state = map(self._divide, context[:2])
        out, last = ops.recurrence(spec, inputs, context._replace(h=h, initial_state=initial_state), layout)
        return out if self.is_sharded else self._join(out), self._join(last)

    def _join(self, x: Tensor) -> Tensor:
        """Return the features of all ranks, from those of this rank."""
        return DTensor.from_local(x, self.mesh, [_of_features(x)]).full_tensor()

    def _divide(self, x: Tensor) -> Tensor:
        """Return the features of this rank."""
        return DTensor.from_local(x, self.mesh, [Replicate()]).redistribute(placements=[_of_features(x)]).to_local()


def _of_features(x: Tensor) -> Shard:
    # Packed steps are (P, H), all others (B, S, H, *) or (S, B, H, *).
    return Shard(min(2, x.dim() - 1))


class _Rows(nn.Module):
    """A linear map or a convolution with a part of the rows of each input of a cell."""

    mesh: DeviceMesh
    parts: int
    # The rows of this rank, with which the methods of torch compute.
    weight = property(lambda self: self._own("weight"))
    bias = property(lambda self: self._own("bias"))

    def divide(self, parts: int, src_data_rank: int | None) -> None:
        self.parts = parts
        for name, whole in [*self.named_parameters(recurse=False)]:
            rows = self._divided(whole.detach(), src_data_rank)
            self.register_parameter(name, nn.Parameter(rows, whole.requires_grad))

    def _divided(self, whole: Tensor, src_data_rank: int | None = None) -> Tensor:
        """Return rows as a DTensor (parts, H, *), of which each rank has a part of H."""
        rows = torch.unflatten(whole, 0, (self.parts, -1))
        return distribute_tensor(rows, self.mesh, [Shard(1)], src_data_rank=src_data_rank)

    def _own(self, name: str) -> MaybeTensor:
        rows: Any = self._parameters[name]
        return None if rows is None else rows.to_local().flatten(0, 1)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        parameters: Any = self.named_parameters(recurse=False)
        destination.update((prefix + name, rows.detach().full_tensor().flatten(0, 1)) for name, rows in parameters)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        for name, rows in self.named_parameters(recurse=False):
            whole = state_dict.get(prefix + name)
            if whole is not None and whole.shape == (rows.shape[:2].numel(), *rows.shape[2:]):
                state_dict[prefix + name] = self._divided(whole.to(rows.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
