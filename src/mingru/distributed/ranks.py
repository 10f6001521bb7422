"""The ranks that divide the work, what they tell each other, and how a module becomes a part of it."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..check.values import check_type, require
from ..modules.layer import Layer
from ..modules.level import Level
from ..ops.call import Context, Layout, Spec
from ..ops.shape import MaybeList, States

F = TypeVar("F", bound=Callable[..., Any])
# Decorates a function that communicates, which `torch.compile` leaves out of its graphs.
eager: Callable[[F], F] = torch.compiler.disable


def outermost(name: str, module: nn.Module, mesh: DeviceMesh) -> list[Layer]:
    """Return the layers of this library in a module that are in no other such layer, to divide them among a mesh.

    Raise an error if there is none, or if the mesh does not have one dimension.
    """
    check_type(name, "device_mesh", mesh, DeviceMesh, "a DeviceMesh", "use init_device_mesh")
    remedy = f"pass one of its dimensions, such as mesh[{(mesh.mesh_dim_names or ['name'])[-1]!r}]"
    require(name, "device_mesh", mesh.ndim == 1, "a mesh with one dimension", f"{mesh.ndim} dimensions", remedy)
    check_type(name, "module", module, nn.Module, "a module")
    layers = [each for each in module.modules() if isinstance(each, Layer)]
    inner = {each for layer in layers for each in layer.modules() if each is not layer}
    found = [layer for layer in layers if layer not in inner]
    expected = "a layer or model of this library, or a module that contains one"
    require(name, "module", bool(found), expected, type(module).__name__)
    return found


class Part(Level):
    """A level that computes a part of a recurrence: other recurrences, in what is otherwise its own `forward`."""

    mesh: DeviceMesh

    def _fuses_norm(self, found: MaybeList) -> bool:
        return False  # The norm is computed before the linear map of a part.

    def _mapped(self, spec: Spec, y: Tensor, context: Context, layout: Layout) -> States:
        return self._from_inputs(spec, y, context, layout)


def derive(module: Any, part: type, mesh: DeviceMesh) -> None:
    """Let a module be of a class whose methods are those of `part`, and otherwise those of its own class."""
    module.__class__ = _derived(part, type(module))  # type: ignore[arg-type]
    module.mesh = mesh


@functools.cache
def _derived(part: type, cls: type) -> type:
    return type(cls.__name__, (part, cls), {})
