"""minGRU layers with torch's interface: names, shapes and types of errors."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..check import (
    LINEAR_BEHIND,
    arguments_checked,
    check_bias,
    check_flags,
    check_gate,
    check_int,
    check_like,
    check_pairs,
    converted,
    dims,
    embed_remedy,
    expectation,
)
from ..modules import scripted
from ..modules.cells import RecurrentCell
from ..modules.layer import Dims
from ..modules.mingru import MinGRU
from ..modules.options import arguments_of
from ..modules.recurrent import NORMS, RecurrentLayer
from ..modules.shared import MaybeList, MaybeTensor, Result, copied, weight_of, without_dims
from ..ops.call import Layout
from ..ops.graph import untraced
from ..ops.shape import States

Layer = TypeVar("Layer", bound="_DropIn")

CREATED_BY_CONSTRUCTORS = (nn.ModuleList, RecurrentLayer, nn.Linear, *NORMS.values())


class _DropIn(MinGRU):
    """Base class of `GRU` and `GRUCell`: torch's names, repr and types of errors, and 0 as the initial state."""

    mistake: type[Exception]
    """What torch raises for a size of 0 and for an input of another dtype."""

    def __init__(self, input_size: int, hidden_size: int, **options: Any) -> None:
        name, dtype = type(self).__name__, options["dtype"]
        for argument, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            try:
                check_int(name, argument, size)
            except ValueError as error:
                raise self.mistake(str(error)) from None
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
            raise RuntimeError(expectation(name, "dtype", "a floating-point dtype", str(dtype)))
        check_gate(name, "gate", options["gate"])
        check_pairs(name, "hidden_size", hidden_size, options["gate"])
        super().__init__(input_size, hidden_size, **options)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.zero_state = 0.0

    def _check_tensor(self, argument: str, x: Any) -> None:
        """Raise AttributeError if x is not a tensor, as torch's layers do."""
        if isinstance(x, Tensor):
            return
        remedy = "use torch.as_tensor"
        if isinstance(x, tuple):
            remedy = "unlike the (h, c) of an LSTM, the state is one tensor" if argument == "hx" else ""
        raise AttributeError(expectation(self.name, argument, "a tensor", type(x).__name__, remedy))

    def _check_input(self, x: Tensor) -> None:
        if x.shape[-1] != self.input_size:
            expected = f"of {self.input_size} features because input_size is {self.input_size}"
            raise RuntimeError(expectation(self.name, "input", expected, dims(x.shape), embed_remedy(x)))
        layer: Any = next(iter(self.layers))
        weight = weight_of(layer.linear)
        if weight is not None:
            self._check_as("input", x, weight, "the layer's weight", self.mistake)

    def _check_hx(self, hx: Tensor, x: Tensor, shape: tuple[int, ...], letters: str) -> None:
        if hx.shape != shape:
            expected = f"({letters}) = {dims(shape)}"
            remedy = ""
            if hx.dim() == len(shape) + 1 and hx.shape[-2] == 1:
                remedy = "use hx.squeeze(-2) for a state of mingru.MinGRU"
            elif hx.dim() == 3 and (hx.shape[1], hx.shape[0], hx.shape[2]) == shape:
                remedy = "batch_first applies to the input only; the state is always (L * D, B, H)"
            raise RuntimeError(expectation(self.name, "hx", expected, dims(hx.shape), remedy))
        self._check_as("hx", hx, x, "input", RuntimeError)

    def _check_as(self, argument: str, x: Tensor, like: Tensor, like_name: str, wrong_dtype: type[Exception]) -> None:
        if x.dtype == like.dtype and x.device == like.device:
            return
        others = converted(x)
        try:
            check_like(self.name, argument, x, like, like_name, others, ids=argument == "input")
        except TypeError as error:
            raise (RuntimeError if others else wrong_dtype)(str(error)) from None
        except ValueError as error:
            raise RuntimeError(str(error)) from None

    def apply(self: Layer, fn: Callable[[nn.Module], None]) -> Layer:
        """Apply `fn` to this layer as one module, as with torch's layer, and not to its linear maps and norms.

        A function that initializes each `torch.nn.Linear` of a model therefore does not change the layer. `fn` is also
        applied to modules that were added to the layer after its construction, such as observers for quantization.
        """
        for module in _modules_added_to(self):
            module.apply(fn)
        fn(self)
        return self

    def __repr__(self) -> str:
        return f"{self.name}({self.extra_repr()})"


def _modules_added_to(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules inside that the constructors did not create."""
    for child in module.children():
        if type(child) in CREATED_BY_CONSTRUCTORS:
            yield from _modules_added_to(child)
        else:
            yield child


class GRU(_DropIn, role="torch", planned=True):
    """Apply a stack of minGRU layers to a sequence, with the interface of `torch.nn.GRU`.

    All time steps are computed in parallel, because no gate depends on the state.

    Args:
        input_size: Number of input features, I; at least 1.
        hidden_size: Number of state features, H; at least 1.
        num_layers: Number of stacked layers, L.
        bias: If False, the linear maps have no bias. `torch.nn.GRU` has two biases for each gate, this layer one.
        batch_first: If True, input and output are (B, S, *) instead of (S, B, *). States keep their shape.
        dropout: Dropout probability on the output of every layer except the last.
        bidirectional: If True, each layer has a reverse direction (D = 2, else 1).
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.
        proj_size: Raises ValueError, as in `torch.nn.GRU`.
        residual: Not in `torch.nn.GRU`. If True, add each layer's input to its output.
        norm: Not in `torch.nn.GRU`. "layer", "rms" or None: norm of each layer's input.
        candidate: Not in `torch.nn.GRU`. Activation of the candidate: "positive" (g), "linear" or "tanh".
        gate: Not in `torch.nn.GRU`. "sigmoid", "signed" or "rotation", see [mingru.MinGRU][].

    Inputs:
        - **input**: Sequence, (S, B, I), (B, S, I) with `batch_first`, (S, I) without a batch, or a
          `torch.nn.utils.rnn.PackedSequence`; dtype and device of the parameters. S is at least 1.
        - **hx**: State before the first step, any real numbers; (L * D, B, H), or (L * D, H) without a batch. Index l *
          D is layer l forward, l * D + 1 its reverse direction. Default: 0.

    Outputs:
        - **output**: Output of the last layer, (S, B, D * H), (B, S, D * H), (S, D * H) or packed, like `input`.
        - **h_n**: State of each layer and direction after the last step of its sequence, with the shape of `hx`.

    Raises:
        ValueError, RuntimeError, TypeError, AttributeError: Same type as `torch.nn.GRU` raises for the same mistake.

    State dict:
        As in [mingru.MinGRU][]: the state_dict of one loads into the other. `reset_parameters` initializes as
        `torch.nn.Linear` does. `all_weights` has a list [weight, bias] for each layer and direction, in the order of
        `h_n`.

    All arguments except `device` and `dtype` are attributes, as in `torch.nn.GRU`; `proj_size` is 0 and `mode` "GRU".

    Differences from `torch.nn.GRU`:

    - The equations differ, so the weights of a GRU cannot be loaded. There are no attributes such as `weight_ih_l0` or
      private lists of their names such as `_flat_weights_names`.
    - Under autocast, `output` has autocast's dtype and `h_n` is float32.
    - `flatten_parameters` does nothing. `apply` treats the layer as one module.
    - `isinstance(rnn, torch.nn.GRU)` is false, because `torch.compile` rejects every instance of `torch.nn.GRU`.

    Differences from `mingru.MinGRU`: names, order of input dimensions, shape of states and initial state.

    Examples:
        >>> rnn = mingru.drop_in.GRU(10, 20, num_layers=2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10), torch.zeros(2, 3, 20))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
        >>> rnn
        GRU(10, 20, num_layers=2)
    """

    mistake = ValueError
    # TorchScript does not support nested lists of parameters.
    __jit_unused_properties__ = ("all_weights",)

    @arguments_checked()
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        proj_size: int | None = None,
        residual: bool = False,
        norm: str | None = None,
        candidate: str = "positive",
        gate: str = "sigmoid",
    ) -> None:
        name = type(self).__name__
        if proj_size is not None:
            raise ValueError(expectation(name, "proj_size", "left out", repr(proj_size), LINEAR_BEHIND))
        check_bias(name, bias)
        check_flags(name, batch_first=batch_first, bidirectional=bidirectional, residual=residual)
        if isinstance(dropout, (bool, str)):
            raise ValueError(expectation(name, "dropout", "a number from 0 to 1", repr(dropout)))
        super().__init__(**arguments_of(locals(), "name", "proj_size"))
        self.mode = "GRU"
        self.proj_size = 0

    def forward(self, input: Tensor, hx: Tensor | None = None) -> States:  # type: ignore[override]
        done = self._begin(input, None if hx is None else [hx], None, None, None)
        if done is not None:
            return done[0], done[1][0]
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        x = input if batched else input.unsqueeze(batch_dim)
        h = hx
        if hx is not None:
            h = (hx if batched else hx.unsqueeze(1)).unsqueeze(2)
        out, last = self._run(x, self._state(x, h, x.size(batch_dim)), None, None, Layout(not self.batch_first))
        if batched:
            return out, without_dims(last, [2])
        return copied(out.squeeze(batch_dim)), without_dims(last, [2, 1])

    def state_shapes(self, batch: int) -> list[tuple[int, ...]]:
        """Return the shape of the state in a list."""
        return [(self.num_layers * self.num_directions, batch, self.hidden_size)]

    def extra_repr(self) -> str:
        # `proj_size` is 0, as in torch.nn.GRU, and cannot be passed.
        return super().extra_repr().replace(", proj_size=0", "")

    def _check_scripted(self, x: Tensor, h: MaybeList, reset: MaybeTensor, dt: MaybeTensor) -> None:
        if x.dim() not in (2, 3) or x.size(-1) != self.input_size or x.size(self._time(x)) == 0:
            letters = "(B, S, " if self.batch_first else "(S, B, "
            raise ValueError(f"{self.name}: input must be {letters}{self.input_size}), S > 0, got {x.shape}")
        scripted.check_shape(self.name, "hx", None if h is None else h[0], self._state_shape(x))

    @untraced
    def _check(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> None:
        packed_batch = int(x.batch_sizes[0]) if isinstance(x, PackedSequence) else None
        data = x if packed_batch is None else x.data
        self._check_tensor("input", data)
        if packed_batch is not None and data.dim() != 2:
            expected = "packed steps (sum of lengths, I)"
            raise RuntimeError(expectation(self.name, "input", expected, dims(data.shape), embed_remedy(data)))
        if data.dim() not in (2, 3):
            letters = "(B, S, {})" if self.batch_first else "(S, B, {})"
            expected = f"{letters} or (S, {{}})".format(*[self.input_size] * 2)
            raise ValueError(expectation(self.name, "input", expected, dims(data.shape), embed_remedy(data)))
        self._check_input(data)
        if packed_batch is None and data.shape[self._time(data)] == 0:
            raise RuntimeError(expectation(self.name, "input", "of at least 1 step", dims(data.shape)))
        if h is not None:
            (hx,) = h
            self._check_tensor("hx", hx)
            shape = tuple(self._state_shape(x)) if packed_batch is None else self.state_shapes(packed_batch)[0]
            self._check_hx(hx, data, shape, "L * D, B, H" if len(shape) == 3 else "L * D, H")

    def _eager(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> Result:
        if not isinstance(x, PackedSequence):
            return None
        out, (last,) = self._packed(x, None if h is None else [h[0].unsqueeze(2)], None, None)
        return out, [without_dims(last, [2])]

    def _time(self, input: Tensor) -> int:
        return 1 if self.batch_first and input.dim() == 3 else 0

    def _state_shape(self, input: Tensor) -> list[int]:
        batch = list(input.shape[:-1])
        batch.pop(self._time(input))
        return [self.num_layers * self.num_directions] + batch + [self.hidden_size]  # noqa: RUF005 (not in TorchScript)

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """Return the weight, and the bias if there is one, of each layer and direction, in the order of `h_n`."""
        layers: Any = self.layers
        return [list(linear.parameters()) for layer in layers for linear in layer.maps()]

    def dims_of(self, x: Tensor) -> Dims:
        """Return the dimensions of x and of the states."""
        return Dims(None, 0, None) if x.dim() == 2 else super().dims_of(x)

    def flatten_parameters(self) -> None:
        """Do nothing; present for compatibility with torch.nn.GRU."""


class GRUCell(_DropIn, RecurrentCell, role="step", planned=True):
    """Compute one step of a one-layer minGRU, with the interface of `torch.nn.GRUCell`.

    Args:
        input_size: Number of input features, I; at least 1.
        hidden_size: Number of state features, H; at least 1.
        bias: If False, the linear map has no bias.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.
        norm: Not in `torch.nn.GRUCell`. "layer", "rms" or None: norm of the input.
        candidate: Not in `torch.nn.GRUCell`. Activation of the candidate: "positive" (g), "linear" or "tanh".
        gate: Not in `torch.nn.GRUCell`. "sigmoid", "signed" or "rotation", see [mingru.MinGRU][].

    Inputs:
        - **input**: Input, (B, I), or (I,) without a batch; dtype and device of the parameters.
        - **hx**: State before the step, any real numbers; (B, H) or (H,). Default: 0.

    Outputs:
        - **hx**: State after the step, with the shape of the input `hx`; float32 under autocast.

    Raises:
        ValueError, RuntimeError, TypeError, AttributeError: Same type as `torch.nn.GRUCell` raises for the same
            mistake. Also RuntimeError for a size of 0, which torch accepts.

    State dict:
        As in a one-layer `GRU`: the state_dict of one loads into the other.

    As with `GRU`, there is no `weight_ih`, `apply` treats the cell as one module, and `isinstance(cell,
    torch.nn.GRUCell)` is false.

    Examples:
        >>> cell = mingru.drop_in.GRUCell(10, 20)
        >>> hx = None
        >>> for x in torch.randn(6, 3, 10):  # six steps
        ...     hx = cell(x, hx)
        >>> hx.shape
        torch.Size([3, 20])
    """

    mistake = RuntimeError

    @arguments_checked()
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        norm: str | None = None,
        candidate: str = "positive",
        gate: str = "sigmoid",
    ) -> None:
        check_flags(type(self).__name__, bias=bias)
        super().__init__(**arguments_of(locals()))

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:  # type: ignore[override]
        done = self._begin(input, None if hx is None else [hx], None, None, None)
        return self._new_state(input, hx, None, None) if done is None else done[1][0]

    def _check_scripted(self, x: Tensor, h: MaybeList, reset: MaybeTensor, dt: MaybeTensor) -> None:
        if x.dim() not in (1, 2) or x.size(-1) != self.input_size:
            raise ValueError(f"{self.name}: input must be (B, {self.input_size}), got {x.shape}")
        if h is not None and (h[0].shape[:-1] != x.shape[:-1] or h[0].size(-1) != self.hidden_size):
            raise ValueError(f"{self.name}: hx must be (B, {self.hidden_size}) with the B of input, got {h[0].shape}")

    @untraced
    def _check(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> None:
        self._check_tensor("input", x)
        if x.dim() not in (1, 2):
            expected = f"(B, {self.input_size}) or ({self.input_size},)"
            raise ValueError(expectation(self.name, "input", expected, dims(x.shape), embed_remedy(x)))
        self._check_input(x)
        if h is not None:
            (hx,) = h
            self._check_tensor("hx", hx)
            if hx.dim() not in (1, 2):
                raise ValueError(expectation(self.name, "hx", "(B, H) or (H,)", dims(hx.shape)))
            self._check_hx(hx, x, (*x.shape[:-1], self.hidden_size), "B, H" if x.dim() == 2 else "H,")
