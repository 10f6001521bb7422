"""The base class of layers, cells and stacks: everything that `Stack`, plans and export ask of them."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..check import names as meant
from ..check.calls import MISTAKES, explain, explained
from ..check.forms import LAYER, Form, Shape, Table, check_call
from ..check.values import check_choice, check_int, expectation, name_of
from ..ops import names_of_torch
from ..ops.modes import is_compiling, is_scripting
from ..ops.shape import MaybeList, MaybeTensor, Outputs
from . import plan
from .saved import Saved

# What a call takes and returns, for type checkers: TorchScript reads the types of `forward`.
Steps = TypeVar("Steps", Tensor, PackedSequence)
M = TypeVar("M", bound=nn.Module)
Forward = TypeVar("Forward", bound=Callable[..., Any])
ROLES = ("sequence", "step", "torch", "custom")
STEP_ARGUMENTS = ("reset", "lengths", "dt")


def typed_as(forward: Forward) -> Callable[[Any], Forward]:
    """Give `__call__` the type of `forward`, for type checkers: some of them ignore what `__call__ = forward` says."""
    return lambda _: forward


class Layer(Saved):
    """Base class of all layers, cells and stacks, and of layers of your own in a `mingru.Stack`.

    A layer of your own is a direct subclass with `role="sequence"`. It sets `input_dims` and `output_dims` and defines

        forward(x, h=None, reset=None, lengths=None, dt=None) -> (out, states)

    where h is None, which means the initial state, or a list of `num_states` tensors like `states`, with the batch in
    dimension 1. `reset`, `lengths` and `dt` are those of `mingru.MinGRU`, and None unless the caller of the stack
    passes them. `forward` names those of the three that it uses; if the caller passes another one, the stack raises an
    error. To be scripted, it names all of them. With `lengths`, `out` is 0 in the padding, and the states are those
    after the last valid steps, as `mingru.functional.linear_scan` returns them. All other attributes and methods have
    defaults; override those that do not fit, such as `num_states`. Residual and dropout are the stack's. A stack with a
    layer of your own calls its layers one by one, also without gradients. Because layers have slots, Python accepts no
    class with slots of its own as another base: it raises "instance lay-out conflict".

    Examples:
        >>> class Sum(mingru.modules.Layer, role="sequence"):
        ...     def __init__(self, dims):
        ...         super().__init__()
        ...         self.input_dims = self.output_dims = dims
        ...
        ...     def forward(self, x, h=None):
        ...         before = 0 if h is None else h[0].transpose(0, 1)
        ...         out = before + x.cumsum(1)
        ...         return out, [out[:, -1:].transpose(0, 1)]
        >>> stack = mingru.Stack([mingru.MinGRU(3, 8), Sum(8)])
        >>> out, states = stack(torch.randn(10, 128, 3))
        >>> [state.shape for state in states]
        [torch.Size([1, 10, 1, 8]), torch.Size([1, 10, 8])]
    """

    # See `modules.plan`.
    __slots__ = ("_plans",)
    _plans: "tuple[plan.LayerPlan, ...]"

    name: str
    """Name of the class, for errors."""
    role = "custom"
    """"sequence": forward(x, h, reset, ...) -> (out, h); "step": forward(x, h, ...) -> h; "torch": as `torch.nn.GRU`.
    A subclass that defines `forward` is "custom" unless it passes `role`."""
    input_dims: int
    """Number of features of x."""
    output_dims: int
    """Number of features of the output."""
    dropout: float
    """Dropout probability of a class that has it, between its layers."""
    num_states = 1
    """Number of tensors in the list of states."""
    num_space_dims = 0
    """Number of spatial dimensions, which follow the features."""
    batch_first = True
    """Whether x is (B, S, *), otherwise (S, B, *)."""
    _step_arguments: tuple[str, ...] = STEP_ARGUMENTS
    """Which of `reset`, `lengths` and `dt` a stack passes to a layer of your own: those that `forward` names. A stack
    says for other layers which they do not take."""
    _planned = False
    """Whether a plan can replace the modules inside this class; see `modules.plan`. Subclasses are not."""
    _forms = LAYER
    """What the tensors of a call must be."""
    _hint = meant.of_layers
    """Remedies for arguments of another type or shape."""

    def __init_subclass__(cls, role: str | None = None, planned: bool = False, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls._planned = planned
        if planned:
            plan.plannable(cls)
        if role is not None:
            check_choice(cls.__name__, "role", role, ROLES)
        if role is not None or "forward" in cls.__dict__:
            cls.role = role or "custom"
        names = tuple(inspect.signature(cls.forward).parameters)
        # Not of a class with its own `_with_states`, such as `MinGRU`.
        if cls.role == "sequence" and cls._with_states in (Layer._with_states, with_named):
            own: Any = cls
            own._step_arguments = tuple(name for name in STEP_ARGUMENTS if name in names)
            own._with_states = Layer._with_states if names[3:] == STEP_ARGUMENTS else with_named

    def __init__(self) -> None:
        super().__init__()
        self.name = name_of(type(self))

    def __getstate__(self) -> dict[str, object]:
        """Return what copies and pickles contain: all attributes, without the plan."""
        return self.__dict__

    def reset_parameters(self) -> None:
        """Re-initialize all parameters."""
        reset_all(self.children())

    def _with_states(
        self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor
    ) -> Outputs:
        """Call the layer as `Stack` does: with its states in a list, and all arguments by position."""
        out, states = self(x, h, reset, lengths, dt)
        return out, states

    def flatten_parameters(self) -> None:
        """Do nothing: programs for `torch.nn.GRU` call it."""

    def all_states(self, x: object = None, *args: object, **kwargs: object) -> Tensor:
        """Raise an error: only MinGRU, MinLSTM and GRU return the states of all steps, of padded sequences."""
        got = type(x if isinstance(x, PackedSequence) else self).__name__
        expected = "called on a mingru.MinGRU, MinLSTM or GRU, with a padded x"
        raise TypeError(expectation(self.name, "all_states", expected, got))

    def _record(self, x: Any, h: Any) -> Any:
        """Compute a call whose instructions are recorded, if the class is `planned`; see `ops.recorded`."""
        return self._compute(x, h, None, None, None)

    def _tables(self) -> list[Table]:
        """Return the forms of all arguments, for each form of x."""
        return self._forms.batch_first if self.batch_first else self._forms.time_first

    def _state_forms(self, x: Shape) -> "list[tuple[Form, Layer, Shape]]":
        """Return the form of each state, what has its sizes, and the shape of x."""
        return [(self._tables()[0]["h"], self, x)]

    def _state_shapes(self, batch: int) -> list[tuple[int, ...]]:
        """Return the shapes of the states of a batch, if they do not depend on x."""
        # Either of the first dimensions of x may be the batch.
        return [form.shape(x, of) for form, of, x in self._state_forms((batch, batch))]

    def _weight_of_x(self) -> Tensor | None:
        """Return a tensor with the dtype and the device of x, or None if a layer inside checks them."""
        return None

    def default_states(self, x: Tensor, batch: int) -> list[Tensor]:
        """Return the states that replace h=None; required by `initial`, and if the class is `planned`."""
        remedy = "define default_states(x, batch)"
        if self.num_space_dims > 0:
            remedy = "pass h=None in the first call, and keep the states of many sessions in a dict"
        raise NotImplementedError(f"{self.name}: no initial state without x, on which its size may depend; {remedy}")

    @explained
    def initial(self, batch: int) -> Any:
        """Return the state of a batch before the first step, which h=None stands for, in the form of the last state.

        It is a copy without gradients, also of a learned state, which is trained by calls with h=None.

        Args:
            batch: Number of sequences, B.

        Examples:
            >>> mingru.MinGRU(3, 16, num_layers=2).initial(10).shape
            torch.Size([2, 10, 1, 16])
        """
        check_int(self.name, "batch", batch, least=0)
        # A quantized linear map may have no parameters, and `new_zeros` of a sharded parameter would be sharded.
        states = self.default_states(next(self.parameters()), batch)
        return [state.detach().clone(memory_format=torch.contiguous_format) for state in states]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return nn.Module.__call__(self, *args, **kwargs)
        except MISTAKES as error:
            # After the call, because a pre-hook may change the arguments.
            explain(error, self.name, type(self).forward, (self, *args), kwargs)
            raise

    def _forward(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> Outputs:
        """Check the arguments of a call, and compute it: by its plan if possible, otherwise by `_compute`."""
        if is_scripting():
            self._check_scripted(x, h, reset, dt)
        else:
            if lengths is None and self._planned:
                done = plan.run(self, x, h, reset, not self.batch_first, dt)
                if done is not None:
                    return done
            self._check_all(x, h, reset, lengths, dt)
        return self._compute(x, h, reset, lengths, dt)

    def _compute(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> Outputs:
        """Return the output and the states of a call whose arguments are checked."""
        raise NotImplementedError

    def _dropped(self, x: Tensor) -> Tensor:
        """Apply dropout: all classes that have it draw it here, of what is between layers."""
        return F.dropout(x, self.dropout, self.training) if self.dropout != 0 else x

    def _check_scripted(self, x: Tensor, h: MaybeList, reset: MaybeTensor, dt: MaybeTensor) -> None:
        """Check the shapes of the arguments of a scripted module; torch raises all other errors."""
        if h is not None and len(h) != self.num_states:
            raise ValueError(f"{self.name}: h must be {self.num_states} tensors, got {len(h)}")

    def _check_all(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> None:
        if not names_of_torch.is_tracing():
            self._check(x, h, reset, lengths, dt)
            self._check_parameters(x)

    def _check(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> object:
        """Raise an error if an argument is invalid. A trace does not record it."""
        return check_call(self, x, h, reset, lengths, dt)

    def _check_parameters(self, x: object) -> None:
        """Raise an error if parameters are on "meta" and x is not: torch's linear maps return unwritten memory then."""
        data = x if isinstance(x, Tensor) else getattr(x, "data", None)
        if not isinstance(data, Tensor) or data.is_meta or is_compiling():
            return  # A layer inside refuses x, or a graph has no memory.
        modules: list[nn.Module] = [self]
        for module in modules:
            for found in module._parameters.values():
                if found is not None and found.is_meta:
                    name = next(name for name, each in self.named_parameters() if each is found)
                    remedy = "load a state_dict that has it, with assign=True"
                    expected, got = f"on {data.device} like x", "a tensor on meta"
                    raise ValueError(expectation(self.name, name, expected, got, remedy))
            for child in module._modules.values():
                # Layers inside check their own. The loop goes on with all others.
                if child is not None and not isinstance(child, Layer):
                    modules.append(child)


class Composite(Layer):
    """Base class of layers that contain other modules, with a list of states."""

    def forward(
        self,
        x: Tensor,
        h: list[Tensor] | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the output of all steps and the state after the last: see `Inputs` and `Outputs` of the class."""
        return self._forward(x, h, reset, lengths, dt)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self) -> Any: ...


def data_of(x: Tensor) -> Tensor:
    """Return a tensor unchanged, or the data of a PackedSequence, whose branch TorchScript leaves out."""
    if isinstance(x, PackedSequence):
        return x.data
    return x


def with_data(x: Tensor, data: Tensor) -> Tensor:
    """Return data, packed like x if x is a PackedSequence."""
    if isinstance(x, PackedSequence):
        return PackedSequence(data, *x[1:])
    return data


def with_named(
    layer: Layer, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor
) -> Outputs:
    """Call a layer with the arguments that it has, by their names; the stack has refused all others."""
    given = {"reset": reset, "lengths": lengths, "dt": dt}
    found: Outputs = layer(x, h, **{name: given[name] for name in layer._step_arguments})
    if isinstance(found, Tensor):
        raise TypeError(f"{layer.name}: forward must return the output and a list of states; return (out, [state])")
    return found


def is_bidirectional(model: object) -> bool:
    """Return whether a layer, or one inside a stack or block, also runs backward in time, and cannot take steps."""
    inside = (getattr(model, "rnn", None), *getattr(model, "layers", ()))
    return isinstance(model, Layer) and (getattr(model, "bidirectional", False) or any(map(is_bidirectional, inside)))


def weight_of(module: nn.Module) -> Tensor | None:
    """Return a tensor with the dtype and device of the weight, or None if a (quantized) module has no parameters.

    It does not read `module.weight`, which a parametrized module computes at each access.
    """
    weight = module._parameters.get("weight")
    return next(module.parameters(), None) if weight is None else weight


def take_weights(module: M, other: nn.Module) -> M:
    """Give a module the weights of another with equal parameters, trainable where those are, and return it."""
    module.load_state_dict(other.state_dict())
    for own, given in zip(module.parameters(), other.parameters(), strict=True):
        own.requires_grad_(given.requires_grad)
    return module.train(other.training)


def reset_all(modules: Iterable[nn.Module]) -> None:
    """Re-initialize the parameters of modules, and of their children if they have no method for that."""
    for module in modules:
        getattr(module, "reset_parameters", functools.partial(reset_all, module.children()))()
