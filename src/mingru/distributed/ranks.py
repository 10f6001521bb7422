"""The ranks that divide the work, what they tell each other, and how a module becomes a part of it."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..check import check_type, expectation, require
from ..modules.layer import Layer

P = ParamSpec("P")
T = TypeVar("T")


def eager(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that communicates, which `torch.compile` leaves out of its graphs."""
    disabled: Callable[P, T] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


class Ranks:
    """The ranks of a mesh with one dimension."""

    def __init__(self, name: str, mesh: Any) -> None:
        check_type(name, "device_mesh", mesh, DeviceMesh, "a DeviceMesh", "use init_device_mesh")
        remedy = f"pass one of its dimensions, such as mesh[{(mesh.mesh_dim_names or ['name'])[-1]!r}]"
        require(name, "device_mesh", mesh.ndim == 1, "a mesh with one dimension", f"{mesh.ndim} dimensions", remedy)
        self.mesh = mesh
        self.group = mesh.get_group()
        self.rank: int = mesh.get_local_rank()
        self.size: int = mesh.size()

    def gather(self, x: Tensor) -> Tensor:
        """Return x of all ranks, (size, *x.shape). The gradient of x is the sum of the gradients on all ranks."""
        return _exchange(self._collect, lambda grad: self._sum(grad)[self.rank], x)

    def gather_objects(self, value: Any) -> list[Any]:
        """Return a value of all ranks."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, self.group)
        return found

    def copy(self, x: Tensor) -> Tensor:
        """Return x, which is equal on all ranks. Each computes a part of its gradient, which is their sum."""
        return _exchange(lambda x: x.view_as(x), self._sum, x)

    def join(self, x: Tensor) -> Tensor:
        """Return the features of all ranks, from those of this rank."""
        return _exchange(self._join, self._divide, x)

    def divide(self, x: Tensor) -> Tensor:
        """Return the features of this rank."""
        return _exchange(self._divide, self._join, x)

    def _collect(self, x: Tensor) -> Tensor:
        found = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(found.unbind()), x.contiguous(), self.group)
        return found

    def _sum(self, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=self.group)
        return x

    def _join(self, x: Tensor) -> Tensor:
        return torch.cat(self._collect(x).unbind(), _features(x))

    def _divide(self, x: Tensor) -> Tensor:
        return x.chunk(self.size, _features(x))[self.rank].contiguous()


def _features(x: Tensor) -> int:
    """Return the dimension of the features: packed steps are (P, H), all others (B, S, H, *) or (S, B, H, *)."""
    return min(2, x.dim() - 1)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, there: Callable[..., Tensor], back: Callable[..., Tensor], x: Tensor) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.back(grad)


def _exchange(there: Callable[..., Tensor], back: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Return there(x), whose gradient is computed by `back`."""
    found: Tensor = _Exchange.apply(there, back, x)  # type: ignore[no-untyped-call]
    return found


def outermost(name: str, module: nn.Module) -> list[Any]:
    """Return the layers of this library in a module that are in no other such layer."""
    check_type(name, "module", module, nn.Module, "a module")
    layers = [each for each in module.modules() if isinstance(each, Layer)]
    inner = {each for layer in layers for each in layer.modules() if each is not layer}
    found = [layer for layer in layers if layer not in inner]
    if not found:
        expected = "a layer or model of this library, or a module that contains one"
        raise ValueError(expectation(name, "module", expected, type(module).__name__))
    return found


def derive(module: Any, part: type, ranks: Ranks) -> None:
    """Let a module be of a class whose methods are those of `part`, and otherwise those of its own class."""
    module.__class__ = _derived(part, type(module))  # type: ignore[arg-type]
    module.ranks = ranks


@functools.cache
def _derived(part: Any, cls: Any) -> type:
    return type(cls.__name__, (part, cls), {})
