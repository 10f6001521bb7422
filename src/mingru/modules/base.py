"""The base class of layers, cells and stacks."""

import inspect
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..check import misfit
from ..ops.inference import Plan, plannable


class Dims(NamedTuple):
    """Indices of the batch and time dimensions of x, and of the batch dimension of each state; None if absent."""

    batch: int | None
    time: int | None
    state: int | None


class Base(nn.Module):
    """Base class of all modules. It describes how a module is called, so that no other code tests for its class."""

    # The plan of an inference pass, see `ops.inference`.
    __slots__ = ("_plan",)

    name: str
    role = "custom"
    """"sequence": forward(x, h, reset, ...) -> (out, h); "step": forward(x, h, ...) -> h; "torch": as `torch.nn.GRU`.
    A subclass that defines `forward` is "custom" unless it passes `role`."""
    num_space_dims = 0
    planned = False
    """Whether one operator can compute the inference pass of this class; see `ops.inference`. Subclasses are not."""

    def __init_subclass__(cls, role: str | None = None, planned: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.planned = planned
        if planned:
            plannable(cls)
        if role is not None or "forward" in cls.__dict__:
            cls.role = role or "custom"

    def plan(self, plan: Plan) -> None:
        """Write the instructions of an inference pass; see `ops.inference`."""
        raise NotImplementedError

    def state_shapes(self, batch: int) -> list[tuple[int, ...]]:
        """Return the shapes of the states of a batch."""
        raise NotImplementedError

    def default_states(self, x: Tensor, batch: int) -> list[Tensor]:
        """Return the states that replace h=None."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return nn.Module.__call__(self, *args, **kwargs)
        except TypeError as error:
            # Checked after the call, because valid calls then cost nothing, and a pre-hook may change the arguments.
            if "forward() " not in str(error):
                raise
            signature = inspect.signature(type(self).forward)
            problem = misfit(self.name, signature, (self, *args), kwargs)
            if not problem:
                raise
            raise TypeError(problem) from None

    def dims_of(self, x: Tensor) -> Dims:
        """Return the dimensions of x and of the states; the role must not be "custom"."""
        if self.role == "step":
            return Dims(0, None, 0) if x.dim() == 2 + self.num_space_dims else Dims(None, None, None)
        batch, time = (0, 1) if self.batch_first else (1, 0)
        return Dims(batch, time, 0 if self.num_space_dims else 1)


# Without the name, so that copies and pickles do not take the plan along.
del Base.__slots__
