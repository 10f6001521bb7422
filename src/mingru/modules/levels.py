"""Stacked layers of one cell type: what MinGRU, MinLSTM and the convolutional layers have in common."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.call import Context, Layout, Spec, spec_of
from ..ops.cells import default_candidate, gate_biases, parts_of
from ..ops.layout import in_reverse
from ..ops.linear_map import gated
from ..ops.shape import MaybeList, MaybeTensor, Outputs, States
from .layer import Layer, reset_all, weight_of
from .options import Options, defaults_of, not_default, one_or_all
from .saved import GATE_OF, OF_LEVELS, Saved, note_values, take_marks

Self = TypeVar("Self", bound="Levels")
# Models of transformers initialize each module and each parameter without this attribute, and then set it.
INITIALIZED = "_is_hf_initialized"


class Level(Saved):
    """The recurrence of one layer, in one direction or both. Subclasses compute the pre-activations."""

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

    def _said(self) -> dict[str, Any]:
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


class Levels(Layer):
    """Apply stacked layers of one cell type. `Options` become attributes."""

    __jit_unused_properties__: tuple[str, ...] = (INITIALIZED,)
    _loading = note_values, take_marks
    _is_empty = False
    """Whether the parameters have no values yet, because the layer was constructed on the device "meta"."""
    num_layers: int
    bias: bool
    dropout: float
    bidirectional: bool
    norm: str | None
    learn_initial_state: bool

    def __init__(self, options: Options, layers: list[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        for option, value in options.arguments.items():
            if option not in options.factory:
                # A copy, so that later changes to the caller's list have no effect.
                own: Any = list(value) if isinstance(value, list) else value
                setattr(self, option, float(own) if option in ("dropout", "forget_bias") else own)
        self.gate = one_or_all(options.gates)
        self.candidate = one_or_all([layer.candidate for layer in layers])
        self.num_directions = options.num_directions
        self.output_dims: int = self.num_directions * layers[-1].hidden_dims
        # Also set on the instance: TorchScript ignores class attributes.
        self.num_space_dims = type(self).num_space_dims
        self._is_empty = next(self.parameters()).is_meta
        for module in self.layers.modules():
            vars(module)[INITIALIZED] = True

    @property
    def _is_hf_initialized(self) -> bool:
        return not self._is_empty or all(hasattr(each, INITIALIZED) for each in self.parameters())

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        """Initialize the parameters that `from_pretrained` has found in no file, after the program's initializer."""
        if not self._is_hf_initialized:
            found = [(each, each.detach().clone()) for each in self.parameters() if hasattr(each, INITIALIZED)]
            self.reset_parameters()
            for parameter, values in found:
                parameter.detach().copy_(values)
        self._is_empty = False

    def apply(self: Self, fn: Callable[[nn.Module], None]) -> Self:
        """Apply `fn` to this layer as one module, as to a `torch.nn.GRU`, and not to its linear maps and norms.

        A function that initializes each module with a weight therefore does not change the layer. `fn` is also applied
        to modules that a program has put into the layer, such as observers for quantization.
        """
        for name, child in self.named_children():
            for module in _modules_put_into(child) if name == "layers" else [child]:
                module.apply(fn)
        fn(self)
        return self

    def _weight_of_x(self) -> MaybeTensor:
        return weight_of(next(iter(self._modules["layers"]._modules.values())).maps()[0])  # type: ignore[operator, union-attr]

    def extra_repr(self) -> str:
        required = [name for name, default in defaults_of(self).items() if default is inspect.Parameter.empty]
        return ", ".join(str(getattr(self, name)) for name in required) + not_default(self)


def _modules_put_into(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules inside that the constructors did not create."""
    for child in module.children():
        if INITIALIZED in vars(child):
            yield from _modules_put_into(child)
        else:
            yield child


def as_sequence(
    x: Tensor, h: MaybeTensor, reset: MaybeTensor, dt: MaybeTensor, num_dims: int
) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor]:
    """Return the arguments of a cell as those of a sequence of one step.

    `num_dims` is the number of dimensions of x with a batch. The batch has size 1 if x has none.
    """
    batched = x.dim() == num_dims
    if h is not None:
        # Before the time dimension is added, because h may have fewer dimensions than x.
        while h.dim() < x.dim():
            h = h.unsqueeze(0)
        h = _with_time(h, batched)
    reset = None if reset is None else _with_time(reset, batched)
    dt = None if dt is None else _with_time(dt, batched)
    return _with_time(x, batched), h, reset, dt


def _with_time(x: Tensor, batched: bool) -> Tensor:
    return x.unsqueeze(1) if batched else x.unsqueeze(0).unsqueeze(0)
