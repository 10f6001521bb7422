"""Stacked layers of one cell type: what MinGRU, MinLSTM and the convolutional layers have in common."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..check import check_input, dims, embed_remedy, expectation, not_a_tensor
from ..ops.call import Layout, Spec, Start
from ..ops.cells import CELLS, GATES, cells_of, default_candidate, gate_biases, parts_of, zero_state
from ..ops.layout import in_reverse
from ..ops.shape import States
from .layer import Layer
from .marked import Marked, key_of
from .options import Options
from .shared import MaybeList, MaybeTensor, Outputs, defaults_of, not_default, one_or_all, weight_of

Self = TypeVar("Self", bound="Stacked")
# Models of transformers initialize each module and each parameter without this attribute, and then set it.
INITIALIZED = "_is_hf_initialized"

GATE_OF = {cell: gate for gate, cell in GATES.items()}


class Directions(Marked):
    """The recurrence of one layer, in one direction or both. Subclasses compute the pre-activations."""

    gate: Tensor | None

    def __init__(self, cell: str, hidden_dims: int, min_decay: float, options: Options) -> None:
        super().__init__()
        self.cell = cell
        # Not with the other marks, because modules of version 0.1 are recognized by its absence.
        self.register_buffer("gate", None)
        self.hidden_dims = hidden_dims
        self.candidate = options.candidate_of(GATE_OF.get(cell, "sigmoid"))
        self.min_decay = min_decay
        self.memories = options.memories_of(cell, min_decay)

    def reset_parameters(self) -> None:
        """Re-initialize all parameters."""
        super().reset_parameters()
        self.add_gate_bias()

    def add_gate_bias(self) -> None:
        """Add to the bias of the gates what `memory` needs."""
        cells = cells_of(self.cell)
        for linear in self.maps() if any(self.memories) else []:
            rows = linear.bias.detach().view(-1, self.hidden_dims)
            for cell, memory, own in zip(cells, self.memories, rows.chunk(len(cells), 1), strict=True):
                if memory is None:
                    continue
                numbers = own[:, :: parts_of(cell)]
                (first, last), count = memory, numbers.size(1)
                # The logarithms have even steps.
                steps = (first * (last / first) ** ((index + 0.5) / count) for index in range(count))
                for index, biases in enumerate(zip(*(gate_biases(cell, each) for each in steps), strict=True)):
                    numbers[index] += numbers.new_tensor(biases)

    def maps(self) -> list[Any]:
        """Return the linear map of each direction."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "gate" not in state["_buffers"]:
            raise ValueError(
                f"{type(self).__name__}: this whole module was saved by mingru 0.1, whose modules had other "
                "attributes; with that version, load it and save model.state_dict(); then construct the model with its "
                "options here, and load that file by load_state_dict"
            )
        super().__setstate__(state)

    def marked_options(self) -> dict[str, Any]:
        """Return the options that change what the weights mean, for the marks in the state_dict."""
        gate = GATE_OF.get(self.cell, "sigmoid")
        is_default = self.candidate == default_candidate(gate)
        layer: Any = self
        return {
            "gate": gate,
            "candidate": None if is_default else self.candidate,
            "normalize": self.cell != "minlstm_unnormalized",
            "min_decay": self.min_decay,
            "residual": "highway" if getattr(layer, "highway", False) else layer.residual,
        }

    def spec(self, reverse: bool) -> Spec:
        """Return the recurrence of one direction."""
        return Spec(self.cell, self.candidate, reverse, self.min_decay)

    def _directions(self, y: Tensor, starts: list[Start], layout: Layout, found: MaybeList = None) -> Outputs:
        """Return the states of all steps and the last states; `starts` has one entry for each direction.

        Append the states of all steps in each direction to `found`.
        """
        out, last = self._direction(y, starts[0], layout, False)
        states, directions = [last], [out]
        if len(starts) > 1:
            back, last = self._direction(y, self._in_reverse(starts[1], layout), layout, True)
            # The features of packed steps are dimension 1.
            out = torch.cat([out, back], min(2, y.dim() - 1))
            states.append(last)
            directions.append(back)
        if found is not None:
            found += directions
        return out, states

    def _direction(self, y: Tensor, start: Start, layout: Layout, reverse: bool) -> States:
        """Run one direction: by one kernel if possible, scripted by operations that TorchScript can compile."""
        raise NotImplementedError

    def _inputs(self, y: Tensor, reverse: bool) -> list[Tensor]:
        """Return the pre-activations of one direction."""
        raise NotImplementedError

    def _recurrence(self, spec: Spec, inputs: list[Tensor], start: Start, layout: Layout) -> States:
        return ops.recurrence(spec, inputs, start, layout)

    def _in_reverse(self, start: Start, layout: Layout) -> Start:
        return in_reverse(start, layout)


class Stacked(Layer):
    """Apply stacked layers of one cell type. `Options` become attributes."""

    __jit_unused_properties__: tuple[str, ...] = (INITIALIZED,)
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
        for option, value in vars(options).items():
            if option not in options.factory:
                # A copy, so that later changes to the caller's list have no effect.
                setattr(self, option, list(value) if isinstance(value, list) else value)
        self.gate = one_or_all(options.gates)
        self.candidate = one_or_all([layer.candidate for layer in layers])
        self.dropout = float(options.dropout)
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
        to modules that were added to the layer after its construction, such as observers for quantization.
        """
        for name, child in self.named_children():
            for module in _modules_added_to(child) if name == "layers" else [child]:
                module.apply(fn)
        fn(self)
        return self

    def _check_x(self, x: Any, leading: Sequence[int], letters: str, remedy: str = "") -> None:
        """Raise an error if x has another number of leading dimensions, or does not fit the weights."""
        if not isinstance(x, Tensor):
            raise not_a_tensor(self.name, "x", x)
        count = self.num_space_dims
        at = x.dim() - 1 - count
        if at not in leading or x.shape[at] != self.input_dims:
            space = f" and space is {count}-dimensional" if count else ""
            expected = f"{letters} because input_dims is {self.input_dims}{space}"
            raise ValueError(expectation(self.name, "x", expected, dims(x.shape), remedy or self._remedy_for(x)))
        self._check_weight(x)

    def _remedy_for(self, x: Tensor) -> str:
        """Return the fix for an input of another shape, or ""."""
        if embed_remedy(x) or self.num_space_dims > 0:
            return embed_remedy(x)
        if x.shape == (self.input_dims,):
            return "use x[None, None] for one step"
        if x.dim() == 2 and x.shape[1] == self.input_dims:
            batch, time = (0, 1) if self.batch_first else (1, 0)
            return f"use x.unsqueeze({batch}) for one sequence, or x.unsqueeze({time}) for one step of a batch"
        return "use x.transpose(1, 2) if time is last" if x.dim() == 3 and x.shape[1] == self.input_dims else ""

    def _check_weight(self, x: Tensor) -> None:
        """Raise an error if x does not have the dtype and device of the weights."""
        first: Any = next(iter(self._modules["layers"]._modules.values()))  # type: ignore[union-attr]
        weight = weight_of(first.maps()[0])
        if weight is not None and not (x.dtype == weight.dtype and x.device == weight.device):
            check_input(self.name, x, weight, "the layer's weight")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.role == "step":
            # A cell returns the state, which does not include the residual of a layer.
            state_dict.pop(f"{prefix}layers.0.{key_of('residual')}", None)
        # Models of transformers load one parameter after the other, also memory without values.
        is_whole = {prefix + name for name, _ in self.named_parameters()} <= state_dict.keys()
        self._is_empty = self._is_empty and not is_whole
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _dropped(self, x: Tensor, index: int) -> Tensor:
        """Return the output of a layer after dropout, which all layers except the last have."""
        if index < self.num_layers - 1 and self.dropout > 0:
            x = F.dropout(x, self.dropout, self.training)
        return x

    def extra_repr(self) -> str:
        required = [name for name, default in defaults_of(self).items() if default is inspect.Parameter.empty]
        return ", ".join(str(getattr(self, name)) for name in required) + not_default(self)


def _modules_added_to(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules inside that the constructors did not create."""
    for child in module.children():
        if INITIALIZED in vars(child):
            yield from _modules_added_to(child)
        else:
            yield child


class WithStart(Marked):
    """A layer, or several `layers`, with an initial state: a parameter if it is learned, otherwise `zero_state`.

    Weights of a layer that flips or turns its state say which number, because older versions began with 0.
    """

    zero_state: float

    def add_initial_state(self, shape: tuple[int, ...], options: Options) -> None:
        """Add the initial state, whose rows are divided among the layers, and the marks."""
        self.zero_state = self.default_start(options)
        self.initial_state = (
            nn.Parameter(torch.empty(shape, **options.factory)) if options.learn_initial_state else None
        )
        self.reset_initial_state()
        self.add_marks(options.device)

    def default_start(self, options: Options) -> float:
        """Return the initial state if it is not learned: of all stacked layers, that of the layer with the largest."""
        return max(zero_state(GATES[gate], options.candidate_of(gate)) for gate in options.gates)

    def reset_parameters(self) -> None:
        """Re-initialize all parameters."""
        super().reset_parameters()
        self.reset_initial_state()

    @torch.no_grad()
    def reset_initial_state(self) -> None:
        """Initialize a learned state. If the gate flips or turns it, it is drawn, so that blocks of features differ."""
        if self.initial_state is None:
            return
        layers = self._own_layers()
        for layer, rows in zip(layers, self.initial_state.chunk(len(layers)), strict=True):
            if CELLS[layer.cell].has_logarithms:
                nn.init.constant_(rows, self.zero_state)
            else:
                nn.init.normal_(rows)

    def marked_options(self) -> dict[str, Any]:
        options, layers = super().marked_options(), self._own_layers()
        # The state of a layer like the paper's begins with 0.5 in all versions.
        is_usual = all(CELLS[each.cell].has_logarithms and each.candidate == "positive" for each in layers)
        if self.initial_state is None and not is_usual:
            options["zero_state"] = self.zero_state
        return options

    def _own_layers(self) -> Any:
        return getattr(self, "layers", [self])


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
