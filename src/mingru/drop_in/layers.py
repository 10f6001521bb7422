"""The layers: minGRU inside, torch's names, shapes and errors outside."""

import inspect
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
    check_like,
    dims,
    embed_remedy,
    expectation,
)
from ..modules import MinGRU
from ..modules.base import Dims
from ..modules.recurrent import NORMS, RecurrentLayer
from ..modules.shared import copied, not_default, weight_of, without_dims
from ..ops import Layout, States
from ..ops.graph import is_autocast, is_scripting, untraced

Layer = TypeVar("Layer", bound="_DropIn")

# The modules that the constructors put into a layer.
OWN = (nn.ModuleList, RecurrentLayer, nn.Linear, *NORMS.values())


class _DropIn(MinGRU):
    """What `GRU` and `GRUCell` share: torch's names and repr, 0 as initial state, and the kinds of torch's errors."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        too_small: type[Exception],
        dtype: torch.dtype | None,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        for argument, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(expectation(name, argument, "an int", repr(size)))
            if size < 1:
                raise too_small(expectation(name, argument, "at least 1", str(size)))
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
            raise RuntimeError(expectation(name, "dtype", "a floating dtype", str(dtype)))
        super().__init__(input_size, hidden_size, dtype=dtype, **options)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.zero_state = 0.0

    def _check_tensor(self, argument: str, x: Any) -> None:
        """What torch meets with an AttributeError, as it asks for the dimensions of anything."""
        if isinstance(x, Tensor):
            return
        remedy = "torch.as_tensor makes one"
        if isinstance(x, tuple):
            remedy = "unlike the (h, c) of an LSTM, the state is one tensor" if argument == "hx" else ""
        raise AttributeError(expectation(self.name, argument, "a tensor", type(x).__name__, remedy))

    def _check_input(self, x: Tensor, wrong_dtype: type[Exception]) -> None:
        if x.shape[-1] != self.input_size:
            expected = f"of {self.input_size} features as input_size is {self.input_size}"
            raise RuntimeError(expectation(self.name, "input", expected, dims(x.shape), embed_remedy(x)))
        layer: Any = self.layers[0]
        weight = weight_of(layer.linear)
        if weight is not None:
            self._check_as("input", x, weight, "the layer's weight", wrong_dtype)

    def _check_hx(self, hx: Tensor, x: Tensor, shape: tuple[int, ...], letters: str) -> None:
        if hx.shape != shape:
            expected = f"({letters}) = {dims(shape)}"
            remedy = ""
            if hx.dim() == len(shape) + 1 and hx.shape[-2] == 1:
                remedy = "a state of mingru's own layers becomes one by hx.squeeze(-2)"
            elif hx.dim() == 3 and (hx.shape[1], hx.shape[0], hx.shape[2]) == shape:
                remedy = "batch_first is about the input, states are never so"
            raise RuntimeError(expectation(self.name, "hx", expected, dims(hx.shape), remedy))
        self._check_as("hx", hx, x, "input", RuntimeError)

    def _check_as(self, argument: str, x: Tensor, like: Tensor, like_name: str, wrong_dtype: type[Exception]) -> None:
        if x.dtype == like.dtype and x.device == like.device:
            return
        autocast = is_autocast(x)
        try:
            check_like(self.name, argument, x, like, like_name, autocast=autocast, ids=argument == "input")
        except TypeError as error:
            raise (RuntimeError if autocast else wrong_dtype)(str(error)) from None
        except ValueError as error:
            raise RuntimeError(str(error)) from None

    def apply(self: Layer, fn: Callable[[nn.Module], None]) -> Layer:
        """Apply `fn` to this layer as one module, as to torch's, and not to its linear maps and norms.

        A function that initializes each `torch.nn.Linear` of a model therefore leaves the layer alone. Modules put into
        the layer since its construction, such as observers of quantization, get `fn` as usual.
        """
        for module in _put_into(self):
            module.apply(fn)
        fn(self)
        return self

    def __repr__(self) -> str:
        # On one line as torch's, which have no modules inside.
        return f"{self.name}({self.extra_repr()})"

    def extra_repr(self) -> str:
        constructor = GRU if isinstance(self, GRU) else GRUCell
        options = list(inspect.signature(constructor).parameters.items())[2:]
        defaults = {argument: parameter.default for argument, parameter in options} | {"proj_size": 0}
        return f"{self.input_size}, {self.hidden_size}" + not_default(self, defaults)


def _put_into(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules inside that no constructor of ours put there."""
    for child in module.children():
        if type(child) in OWN:
            yield from _put_into(child)
        else:
            yield child


class GRU(_DropIn, role="torch"):
    """`torch.nn.GRU` with minGRU inside: all steps in parallel, since no gate sees the state.

    Args:
        input_size: I, features of the input; at least 1.
        hidden_size: H, features of the state; at least 1.
        num_layers: L.
        bias: whether the linear maps have one (one, where torch has two).
        batch_first: x is (B, S, I), as against (S, B, I). States don't change with it.
        dropout: probability with which each element of each layer's output but the last's is dropped in training.
        bidirectional: a second direction in each layer; D = 2, else 1.
        device: of the parameters.
        dtype: of the parameters, a floating one.
        proj_size: refused, as by torch.
        residual: what torch has not; as of `mingru.MinGRU`.
        norm: what torch has not; as of `mingru.MinGRU`.
        candidate: what torch has not; as of `mingru.MinGRU`.

    Called with:
        input: (S, B, I), (B, S, I) with `batch_first`, (S, I) without a batch, or a
            `torch.nn.utils.rnn.PackedSequence`; dtype and device of the parameters; S at least 1.
        hx: state before the first step, any real numbers, (L * D, B, H), or (L * D, H) without a batch. Index l * D is
            layer l forward, l * D + 1 backward. Default: 0.

    Returns:
        Two tensors. `output`, (S, B, D * H), (B, S, D * H), (S, D * H) or packed, as input is; `h_n`, like hx, is each
        layer's state after its sequence's last step.

    Raises:
        ValueError, RuntimeError, TypeError, AttributeError: where torch.nn.GRU raises the same.

    Parameters: those of `mingru.MinGRU` by the same names; state dicts go from one to the other. `reset_parameters`
    draws as `torch.nn.Linear` does. `all_weights` is a list for each layer and direction, in the order of `h_n`, with
    the weight and the bias of its linear map.

    Attributes: all arguments, as `torch.nn.GRU` has them; `proj_size` is 0 and `mode` is "GRU".

    Differs from `torch.nn.GRU` in the mathematics, so that its weights can't be loaded and `weight_ih_l0` and the like
    are not there, nor are torch's private lists of these names such as `_flat_weights_names`; and from `mingru.MinGRU`
    in the names, the order of input, the shape of states and their default. Under autocast, `output` has autocast's
    dtype and `h_n` is float32. `flatten_parameters` does nothing. `apply` takes the layer for one module.
    `isinstance(rnn, torch.nn.GRU)` is false, because `torch.compile` refuses every instance of `torch.nn.GRU`.

    Example:
        >>> rnn = mingru.drop_in.GRU(10, 20, num_layers=2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10), torch.zeros(2, 3, 20))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
        >>> rnn
        GRU(10, 20, num_layers=2)
    """

    # TorchScript has no such lists.
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
    ) -> None:
        name = type(self).__name__
        if proj_size is not None:
            raise ValueError(expectation(name, "proj_size", "left out", repr(proj_size), LINEAR_BEHIND))
        check_bias(name, bias)
        check_flags(name, batch_first=batch_first, bidirectional=bidirectional, residual=residual)
        if isinstance(dropout, (bool, str)):
            raise ValueError(expectation(name, "dropout", "a number from 0 to 1", repr(dropout)))
        super().__init__(
            input_size,
            hidden_size,
            ValueError,
            dtype,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            residual=residual,
            norm=norm,
            candidate=candidate,
            device=device,
        )
        self.mode = "GRU"
        self.proj_size = 0

    def forward(self, input: Tensor, hx: Tensor | None = None) -> States:  # type: ignore[override]
        if is_scripting():
            if input.dim() not in (2, 3) or input.size(-1) != self.input_size or input.size(self._time(input)) == 0:
                letters = "(B, S, " if self.batch_first else "(S, B, "
                raise ValueError(f"{self.name}: input must be {letters}{self.input_size}), S > 0, got {input.shape}")
            if hx is not None and list(hx.shape) != self._state_shape(input):
                raise ValueError(f"{self.name}: hx must be {self._state_shape(input)}, got {hx.shape}")
        else:
            if isinstance(input, PackedSequence):
                return self._packed_call(input, hx)
            self._check_call(input, hx)
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        x = input if batched else input.unsqueeze(batch_dim)
        h = hx
        if hx is not None:
            h = (hx if batched else hx.unsqueeze(1)).unsqueeze(2)
        order = Layout(not self.batch_first, None, None)
        out, last = self._run(x, self._state(x, h, x.size(batch_dim)), None, order)
        if batched:
            return out, without_dims(last, [2])
        return copied(out.squeeze(batch_dim)), without_dims(last, [2, 1])

    def _packed_call(self, input: PackedSequence, hx: Tensor | None) -> Any:
        data = input.data
        if data.dim() != 2:
            raise RuntimeError(
                expectation(self.name, "input", "packed rows (rows, I)", dims(data.shape), embed_remedy(data))
            )
        self._check_input(data, ValueError)
        if hx is not None:
            self._check_tensor("hx", hx)
            shape = (self.num_layers * self.num_directions, int(input.batch_sizes[0]), self.hidden_size)
            self._check_hx(hx, data, shape, "L * D, B, H")
        out, last = self._packed(input, None if hx is None else hx.unsqueeze(2), None, None)
        return out, without_dims(last, [2])

    @untraced
    def _check_call(self, input: Tensor, hx: Tensor | None) -> None:
        self._check_tensor("input", input)
        if input.dim() not in (2, 3):
            letters = "(B, S, {})" if self.batch_first else "(S, B, {})"
            expected = f"{letters} or (S, {{}})".format(*[self.input_size] * 2)
            raise ValueError(expectation(self.name, "input", expected, dims(input.shape), embed_remedy(input)))
        self._check_input(input, ValueError)
        if input.shape[self._time(input)] == 0:
            raise RuntimeError(expectation(self.name, "input", "of at least 1 step", dims(input.shape)))
        if hx is not None:
            self._check_tensor("hx", hx)
            letters = "L * D, B, H" if input.dim() == 3 else "L * D, H"
            self._check_hx(hx, input, tuple(self._state_shape(input)), letters)

    def _time(self, input: Tensor) -> int:
        return 1 if self.batch_first and input.dim() == 3 else 0

    def _state_shape(self, input: Tensor) -> list[int]:
        count = self.num_layers * self.num_directions
        if input.dim() == 2:
            return [count, self.hidden_size]
        else:
            return [count, input.size(0 if self.batch_first else 1), self.hidden_size]

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The weight, and the bias if there is one, of each layer and direction, in the order of `h_n`."""
        maps = [each for layer in self.layers for each in (layer.linear, layer.linear_reverse)]
        return [list(each.parameters()) for each in maps if isinstance(each, nn.Module)]

    def dims_of(self, x: Tensor) -> Dims:
        """Return the dimensions of x and of the states."""
        return Dims(None, 0, None) if x.dim() == 2 else super().dims_of(x)

    def flatten_parameters(self) -> None:
        """Nothing: there is no other order of the weights."""


class GRUCell(_DropIn, role="step"):
    """`torch.nn.GRUCell` with minGRU inside: one step of a one-layer `GRU`.

    Args:
        input_size: I, features of the input; at least 1.
        hidden_size: H, features of the state; at least 1.
        bias: whether the linear map has one.
        device: of the parameters.
        dtype: of the parameters, a floating one.
        norm: what torch has not; as of `mingru.MinGRU`.
        candidate: what torch has not; as of `mingru.MinGRU`.

    Called with:
        input: (B, I), or (I,) without a batch; dtype and device of the parameters.
        hx: state before the step, any real numbers, (B, H) or (H,). Default: 0.

    Returns:
        The state after the step, like hx; float32 under autocast.

    Raises:
        ValueError, RuntimeError, TypeError, AttributeError: where torch.nn.GRUCell raises the same; RuntimeError too
            for a size of 0, which torch takes.

    Parameters: those of a one-layer `GRU` by the same names; state dicts go from one to the other.

    Differs from `torch.nn.GRUCell` as `GRU` does from `torch.nn.GRU`: there is no `weight_ih`, `apply` takes the cell
    for one module, and `isinstance(cell, torch.nn.GRUCell)` is false.

    Example:
        >>> cell = mingru.drop_in.GRUCell(10, 20)
        >>> hx = None
        >>> for x in torch.randn(6, 3, 10):  # six steps
        ...     hx = cell(x, hx)
        >>> hx.shape
        torch.Size([3, 20])
    """

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
    ) -> None:
        check_flags(type(self).__name__, bias=bias)
        options = {"bias": bias, "norm": norm, "candidate": candidate, "device": device}
        super().__init__(input_size, hidden_size, RuntimeError, dtype, **options)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if is_scripting():
            if input.dim() not in (1, 2) or input.size(-1) != self.input_size:
                raise ValueError(f"{self.name}: input must be (B, {self.input_size}), got {input.shape}")
            if hx is not None and (hx.shape[:-1] != input.shape[:-1] or hx.size(-1) != self.hidden_size):
                raise ValueError(f"{self.name}: hx must be (B, {self.hidden_size}) as input has B, got {hx.shape}")
        else:
            self._check_call(input, hx)
        batched = input.dim() == 2
        x = input.unsqueeze(1) if batched else input.unsqueeze(0).unsqueeze(0)
        h = hx
        if hx is not None:
            h = (hx if batched else hx.unsqueeze(0)).unsqueeze(1)
        _, states = self._run_layers(x, self._state(x, h, x.size(0)), None, Layout(False, None, None))
        last = states[0].squeeze(1) if batched else states[0].squeeze(1).squeeze(0)
        return copied(last)

    @untraced
    def _check_call(self, input: Tensor, hx: Tensor | None) -> None:
        self._check_tensor("input", input)
        if input.dim() not in (1, 2):
            expected = f"(B, {self.input_size}) or ({self.input_size},)"
            raise ValueError(expectation(self.name, "input", expected, dims(input.shape), embed_remedy(input)))
        self._check_input(input, RuntimeError)
        if hx is not None:
            self._check_tensor("hx", hx)
            if hx.dim() not in (1, 2):
                raise ValueError(expectation(self.name, "hx", "(B, H) or (H,)", dims(hx.shape)))
            self._check_hx(hx, input, (*input.shape[:-1], self.hidden_size), "B, H" if input.dim() == 2 else "H,")
