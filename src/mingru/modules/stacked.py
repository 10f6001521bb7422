"""Stacked levels of one cell type: the base classes of all layers, and of MinGRU, MinLSTM, GRU and their cells.

TorchScript compiles `forward` and the functions that it calls. A scripted module checks only shapes; other errors are
raised by torch.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..check.calls import explained
from ..check.values import check_min_decay, name_of
from ..ops.call import Context, Layout
from ..ops.cells import CELLS
from ..ops.layout import pack, packing_of, unpack, with_lengths, without_padding
from ..ops.modes import is_autocast, is_captured, is_scripting
from ..ops.names_of_torch import is_symbolic
from ..ops.shape import MaybeList, MaybeTensor, Outputs, States, accumulate_dtype, as_dtype, reshaped
from . import plan, scripted
from .initial_state import default_start, learned_state, reset_initial_state
from .layer import Layer, Steps, weight_of
from .level import GRUOptions, LinearLevel, RecurrentOptions
from .options import Options, defaults_of, not_default, one_or_all
from .saved import add_marks, note_values, refuse_weights_of_torch, renew_guards, start_said_by, take_marks

Self = TypeVar("Self", bound="Stacked")
# Models of transformers initialize each module and each parameter without this attribute, and then set it.
INITIALIZED = "_is_hf_initialized"


class Stacked(Layer):
    """Apply stacked levels of one cell type. `Options` become attributes."""

    __jit_unused_properties__: tuple[str, ...] = (INITIALIZED, "min_decay")
    _loading = note_values, take_marks
    _is_empty = False
    """Whether the parameters have no values yet, because the layer was constructed on the device "meta"."""
    num_layers: int
    bias: bool
    bidirectional: bool
    norm: str | None
    learn_initial_state: bool

    def __init__(self, options: Options, layers: list[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        for option, value in options.arguments.items():
            if option not in (*options.factory, "min_decay"):
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


class Recurrent(Stacked, role="sequence"):
    """The base class of `MinGRU`, `MinLSTM`, `GRU` and their cells."""

    cell: str
    """"mingru", "minlstm" or "gru"."""
    hidden_dims: int
    proj_size = 0
    _start: float | None = None
    """The initial state if it is not learned; None for that of the gates."""
    _marks = ("zero_state",)
    _loading: tuple[Any, ...] = refuse_weights_of_torch, renew_guards, note_values, take_marks
    _linear_map: type[nn.Module] = nn.Linear
    """Class of the linear maps inside."""
    _remedy_for_weights = "train the layer from its initialization"
    """What to do about a state_dict of torch.nn."""
    # Without a setter: another bound would need other weights, and only be shown.
    min_decay = property(lambda self: one_or_all([each.min_decay for each in self.layers]))

    def __init__(self, **arguments: Any) -> None:
        cell = arguments.get("cell", self.cell)
        own_options = GRUOptions if cell == "gru" else RecurrentOptions
        options = own_options(name_of(type(self)), **{**arguments, "cell": cell})
        bounds = check_min_decay(options.name, options.min_decay, options.gates)
        inner = options.num_directions * (options.proj_size or options.hidden_dims)
        sizes = [options.input_dims, *[inner] * (options.num_layers - 1)]
        layers = zip(options.cells, sizes, bounds, strict=True)
        super().__init__(options, [LinearLevel(*layer, options, self._linear_map) for layer in layers])
        # One that takes no elapsed times, if there is one.
        self.cell = next((cell for cell in options.cells if CELLS[cell].not_timed is not None), options.cells[0])
        self._is_timed = CELLS[self.cell].not_timed is None
        self._zero_state = default_start(options) if self._start is None else self._start
        self.initial_state = learned_state(self._shape_of_initial_state(), options)
        reset_initial_state(self, list(self.layers))
        add_marks(self, options.device)

    def forward(
        self,
        x: Tensor,
        h: Tensor | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | None = None,
    ) -> States:
        """Return the output of all steps and the state after the last: see `Inputs` and `Outputs` of the class."""
        out, states = self._forward(x, None if h is None else [h], reset, lengths, dt)
        return out, states[0]

    if TYPE_CHECKING:

        def __call__(
            self,
            x: Steps,
            h: MaybeTensor = None,
            reset: Steps | None = None,
            lengths: MaybeTensor = None,
            dt: Steps | None = None,
        ) -> tuple[Steps, Tensor]: ...

    def all_states(  # type: ignore[override]
        self,
        x: Tensor,
        h: MaybeTensor = None,
        reset: MaybeTensor = None,
        lengths: MaybeTensor = None,
        dt: MaybeTensor = None,
    ) -> Tensor:
        """Compute the state of each layer and direction after each step, (L * D, B, S, H).

        It is (L * D, S, B, H) if `batch_first` is False, and 0 in the padding. The arguments are those of a call, but x
        is no PackedSequence: pass `lengths`.
        """
        if self.role in ("step", "torch") or isinstance(x, PackedSequence):
            return super().all_states(x)
        states = None if h is None else [h]
        self._check_all(x, states, reset, lengths, dt)
        before, layout = self._states(x, states, x.size(0 if self.batch_first else 1)), Layout(not self.batch_first)
        if lengths is not None:
            # Layers without a kernel compute the padding too. A NaN there would reach the gradients of the weights.
            x, layout = with_lengths(without_padding(x, lengths, not self.batch_first), lengths, not self.batch_first)
        found: list[Tensor] = []
        self._run_layers(x, before, reset, dt, layout, found)
        return torch.stack(found)

    def _with_states(
        self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor
    ) -> Outputs:
        """Call the layer with its state in a list, and return the new state in a list."""
        out, last = self(x, None if h is None else h[0], reset, lengths, dt)
        return out, [last]

    def default_states(self, x: Tensor, batch: int) -> list[Tensor]:
        """Return the states that replace h=None."""
        state = self._state(x, None, batch)
        # A view would take longer than the state.
        return [state if self.role == "sequence" else state.view(*self._state_shapes(batch))]

    @explained
    def initial(self, batch: int) -> Tensor:
        """Return the state of a batch before the first step."""
        state: Tensor = super().initial(batch)[0]
        return state

    def _record(self, x: Any, h: Any) -> Any:
        (state, _), layers = h[0], self.layers
        x.recording.require(len(layers) == self.num_layers, {each.hidden_dims for each in layers} == {self.hidden_dims})
        x.recording.require(type(self.initial_state) in (nn.Parameter, type(None)))
        each_layer: Any = [(state, index) for index in range(self.num_layers * self.num_directions)]
        return self._run_layers(x, each_layer, None, None, Layout(False))[0], h

    def _check_scripted(self, x: Tensor, h: MaybeList, reset: MaybeTensor, dt: MaybeTensor) -> None:
        order = "B, S" if self.batch_first else "S, B"
        scripted.check_x(self.name, x, [2], order, self.input_dims, self.num_space_dims)
        scripted.check_steps(self.name, list(x.shape[:2]), reset, dt)

    def _said(self) -> dict[str, object]:
        return {"zero_state": start_said_by(self)}

    def reset_parameters(self) -> None:
        """Re-initialize all parameters."""
        super().reset_parameters()
        reset_initial_state(self, list(self.layers))

    def _shape_of_initial_state(self) -> tuple[int, ...]:
        return (self.num_layers * self.num_directions, 1, 1, self.hidden_dims)

    def _compute(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> Outputs:
        return self._sequences(x, h, reset, lengths, dt)

    def _sequences(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> Outputs:
        """Run all layers on sequences of any layout; h has one state (L * D, B, 1, H)."""
        if isinstance(x, PackedSequence):
            return self._packed(x, h, reset, dt)
        batch = x.size(0 if self.batch_first else 1)
        if lengths is None:
            return self._run(x, self._states(x, h, batch), reset, dt, Layout(not self.batch_first))
        if not is_scripting():
            if self._takes_lengths(x, reset, dt):
                x, layout = with_lengths(x, lengths, not self.batch_first)
                return self._run(x, self._states(x, h, batch), reset, dt, layout)
        return self._run_packed(x, self._state(x, h, batch), reset, dt, lengths)

    def _takes_lengths(self, x: Tensor, reset: MaybeTensor, dt: MaybeTensor) -> bool:
        """Return whether all layers take padded sequences with lengths. Otherwise the sequences are packed."""
        # A GPU would have to wait for the lengths to pack them. A captured graph masks the padding, because it cannot
        # depend on the number of valid steps. A kernel skips it, but computes only a linear map and its recurrence.
        return not x.is_cpu or is_symbolic() or (self._planned and plan.skips_padding(self, x, reset, dt))

    def _run_packed(self, x: Tensor, state: Tensor, reset: MaybeTensor, dt: MaybeTensor, lengths: Tensor) -> Outputs:
        """Pack the valid steps once for all layers."""
        batch_sizes, order, index = packing_of(lengths, x, not self.batch_first)
        index, order = index.to(x.device), order.to(x.device)
        reset = None if reset is None else pack(reset, index)
        dt = None if dt is None else pack(dt, index)
        before, layout = state.index_select(1, order).unbind(0), Layout(False, batch_sizes)
        out, states = self._run(pack(x, index), list(before), reset, dt, layout)
        padded = unpack(out, index, x.size(0) * x.size(1))
        # The state of an empty sequence stays.
        last = state.index_copy(1, order, states[0])
        return reshaped(padded, [x.size(0), x.size(1), out.size(1)]), [last]

    def _packed(self, x: PackedSequence, h: Any, reset: Any, dt: Any) -> Any:
        """Return a PackedSequence, and the states in the order of the batch before packing."""
        data, batch_sizes, order, original_order = x
        reset, dt = (None if each is None else each.data for each in (reset, dt))
        state = self._state(data, h, int(batch_sizes[0]))
        state = state if order is None else state.index_select(1, order)
        out, (last,) = self._run(data, list(state.unbind(0)), reset, dt, Layout(False, batch_sizes))
        if original_order is not None:
            last = last.index_select(1, original_order)
        return PackedSequence(out, batch_sizes, order, original_order), [last]

    def _state(self, x: Tensor, h: MaybeList, batch: int) -> Tensor:
        """Return the state in h expanded to (L * D, B, 1, H), or the initial state if h is None."""
        shape = [self.num_layers * self.num_directions, batch, 1, self.hidden_dims]
        state = self.initial_state if h is None else h[0]
        return self._default_state(x, shape) if state is None else self._as_state(x, state, shape)

    def _states(self, x: Tensor, h: MaybeList, batch: int) -> list[Tensor]:
        """Return the state of each layer and direction, (B, 1, H)."""
        if h is None and self.initial_state is None:
            # One for all, because nothing writes into it.
            return [self._default_state(x, [batch, 1, self.hidden_dims])] * (self.num_layers * self.num_directions)
        return list(self._state(x, h, batch).unbind(0))

    def _default_state(self, x: Tensor, shape: list[int]) -> Tensor:
        dtype = accumulate_dtype(x.dtype) if is_autocast(x) else x.dtype
        return torch.full(shape, self._zero_state, dtype=dtype, device=x.device)

    def _as_state(self, x: Tensor, h: Tensor, shape: list[int]) -> Tensor:
        """Return h in this shape, and in the dtype of the states of x."""
        # In a graph, h is always expanded, because a trace records the comparison as a constant.
        if is_captured() or list(h.shape) != shape:
            h = h.expand(shape)
        return h.to(accumulate_dtype(x.dtype)) if is_autocast(x) else h

    def _run(self, x: Tensor, h: list[Tensor], reset: MaybeTensor, dt: MaybeTensor, layout: Layout) -> Outputs:
        """Run all layers, and return their states as one new tensor, which is never a view."""
        out, states = self._run_layers(x, h, reset, dt, layout)
        return out, [torch.stack(states)]

    def _run_layers(
        self, x: Tensor, h: list[Tensor], reset: MaybeTensor, dt: MaybeTensor, layout: Layout, found: MaybeList = None
    ) -> Outputs:
        """Run all layers, from and to a state (B, 1, H) for each; reset and dt have the leading dimensions of x.

        Append the states of all steps, of each layer and direction, to `found`.
        """
        if dt is not None:
            if not self._is_timed:  # also in scripted modules and traces, which leave out other checks
                raise ValueError(f"{self.name}: dt must be None because this cell takes no elapsed times")
            dt = as_dtype(dt, accumulate_dtype(x.dtype))
        initial = h if reset is None else self._states(x, None, 1)
        contexts: list[Context] = []
        for index, first in enumerate(h):
            contexts.append(Context(first, initial[index], reset, dt))
        states: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            at = index * self.num_directions
            x, last = layer(x, contexts[at : at + self.num_directions], layout, found)
            if index < self.num_layers - 1:
                x = self._dropped(x)
            states += last
        return x, states
