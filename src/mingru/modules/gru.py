"""The GRU of torch.nn, whose features see each other, or in blocks."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device
from typing_extensions import Self

from ..check.calls import arguments_checked
from ..check.values import check_type, expectation, name_of, require, reworded
from ..ops import names_of_torch
from ..ops.block_recurrence import blocks_of, dense
from ..ops.linear_map import RecurrentMap
from ..ops.recorded import Recorded, Recording
from ..ops.route import is_hooked
from .cells import RecurrentCell
from .layer import take_weights
from .options import Memory, Norm, arguments_of, defaults_of
from .stacked import Recurrent

# Options that `torch.nn.GRU` has, or that do not change what trained weights compute.
_OF_TORCH = "input_dims hidden_dims num_layers bias batch_first dropout bidirectional device dtype".split()
_OF_TORCH += ["block_size", "memory", "recompute"]


class _Weights(Recording):
    """What `forward` does, with the weights themselves, which hooks may have computed."""

    def weights(self, *found: Any) -> list[Any]:
        return [*found]


class GRU(Recurrent, planned=True):
    """Apply a stack of GRU layers, as `torch.nn.GRU`, to a sequence.

    Each layer and direction computes

        r_t = sigma(W_r x_t + b_r + U_r h_{t-1})
        z_t = sigma(W_z x_t + b_z + U_z h_{t-1})
        n_t = tanh(W_n x_t + b_n + r_t (U_n h_{t-1} + c_n))
        h_t = (1 - z_t) n_t + z_t h_{t-1}

    which is `torch.nn.GRU`: the same function, with the same initialization. With `block_size=K`, the features see each
    other only in blocks: U_r, U_z and U_n are block-diagonal, with H / K blocks of K x K weights. Its gates see the
    state, so the steps are computed one after the other: on CPUs by kernels, elsewhere and where these were not built
    by `torch.gru` with the dense weights. In an ONNX file, each layer and direction is one node, `GRU`, of any length.
    Where these kernels cannot run, `torch.compile` makes a graph for each length.

    `mingru.MinGRU` explains the other arguments, inputs, outputs and errors.

    Args:
        input_dims: Number of input features, I.
        hidden_dims: Number of state features, H.
        num_layers: Number of stacked layers, L.
        bias: If False, the maps have no bias.
        batch_first: If False, x is (S, B, I).
        dropout: Dropout probability between layers.
        bidirectional: If True, add a reverse direction (D = 2).
        residual: If True, add each layer's input to its output.
        norm: "layer", "rms" or None: norm of each layer's input. For a single feature, use None: "layer"
            raises an error, and "rms" leaves only the sign, with a warning.
        block_size: Number of features that see each other, K, a divisor of `hidden_dims`, or above it. Smaller blocks
            take less time, and learn less. Default: all of them, one block, which is `torch.nn.GRU`.
        learn_initial_state: If True, the initial state is a parameter, which begins at 0.
        memory: Number of time steps that a state lasts at first, see `mingru.MinGRU`. It shifts b_z.
        recompute: If True, backward recomputes the gates, which saves four fifths of the memory and takes longer.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.

    Inputs:
        - **x**: Sequence, (B, S, I).
        - **h**: State before the first step, (L * D, B, 1, H). Default: 0, or the learned state.
        - **reset**: Boolean mask of steps that start from the initial state.
        - **lengths**: Number of valid steps, (B,).
        - **dt**: Must be None: gates that see the state have no decay per unit of time.

    Outputs:
        - **out**: Output of the last layer, (B, S, D * H).
        - **h**: State after the last step, (L * D, B, 1, H).

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A size, shape, device, length or option is invalid, or options do not fit.

    State dict:
        - `layers.{l}.linear.weight` (3H, I) and `layers.{l}.linear.bias` (3H,): rows of r, z and n, as in
          `torch.nn.GRU`. Initialized as there, uniform up to 1 / sqrt(H); the biases of r and z are the sum of two.
        - `layers.{l}.recurrent.weight` (3H, K) and `layers.{l}.recurrent.bias` (H,): U, each row without the zeros
          outside of its block, and c_n. Initialized as in a `torch.nn.GRU` of K features, uniform up to 1 / sqrt(K).
        - `linear_reverse`, `recurrent_reverse`, `norm`, `align` and `initial_state`: only if an option needs them.

    Numerics:
        As in `MinGRU`: bfloat16 and float16 inputs are computed in float32.

    Differences from `torch.nn.GRU`: one bias of r and of z instead of two, whose sum is the same; the shape of the
    state; the default of `batch_first`.

    Examples:
        >>> rnn = mingru.GRU(input_dims=3, hidden_dims=64, num_layers=2)
        >>> out, h = rnn(torch.randn(10, 128, 3))
        >>> out.shape, h.shape
        (torch.Size([10, 128, 64]), torch.Size([2, 10, 1, 64]))

    References:
        Cho et al. 2014 (arXiv 1406.1078) for the GRU, in the form of `torch.nn.GRU`; Pöppel et al. 2024, "FlashRNN"
        (arXiv 2412.07752), for blocks.
    """

    cell = "gru"
    _remedy_for_weights = "use mingru.GRU.from_torch"

    @arguments_checked()
    def __init__(
        self,
        input_dims: int,
        hidden_dims: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        residual: bool = False,
        norm: Norm | None = None,
        block_size: int | None = None,
        learn_initial_state: bool = False,
        memory: Memory | None = None,
        recompute: bool | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(**arguments_of(locals()))

    @torch.enable_grad()
    def to_torch(self) -> nn.GRU:
        """Return the `torch.nn.GRU` with the same weights, which are 0 outside of the blocks, and trainable as here.

        It computes the same as this layer. Its state is (L * D, B, H), without the dimension of time. Of the two biases
        of r, and of z, the second is 0.

        Raises:
            ValueError: The layer has an option that `torch.nn.GRU` has not, such as a norm, or a module in it has hooks
                or another `forward`. Only `recurrent` may have them.

        Examples:
            >>> rnn, x = mingru.GRU(3, 64), torch.randn(10, 128, 3)
            >>> bool(torch.allclose(rnn.to_torch()(x)[0], rnn(x)[0], atol=1e-5))
            True
        """
        name = f"{self.name}.to_torch"
        for option, default in defaults_of(self).items():
            value = getattr(self, option, default)
            is_known = option in _OF_TORCH or value == default
            require(name, option, is_known, f"left out because torch.nn.GRU has no {option}", repr(value))
        weights = self._weights(name)
        has_bias = any(bias is not None for own in weights for bias in own[1::2])
        sizes = self.input_dims, self.hidden_dims, self.num_layers, has_bias, self.batch_first
        factory = {"device": weights[0][0].device, "dtype": weights[0][0].dtype}
        # Not `nn.GRU`, which is another class in a block of `drop_in.patch`.
        gru = nn.modules.GRU(*sizes, self.dropout, self.bidirectional, **factory)
        for (weight, bias, recurrent, own), parameters in zip(weights, gru.all_weights, strict=True):
            second = None if own is None else F.pad(own, (2 * self.hidden_dims, 0))
            _assign(parameters, weight, dense(recurrent), bias, second)
        return gru.train(self.training)

    @classmethod
    @torch.enable_grad()
    def from_torch(cls, gru: nn.GRU, *, block_size: int | None = None) -> Self:
        """Return the layer with the weights of a `torch.nn.GRU`, trainable where those are.

        It computes the same. The two biases of r become their sum, and so do those of z.

        Args:
            gru: Layer without hooks. With a `block_size` below its hidden_size, its recurrent weights must be 0 outside
                of the blocks, as those of `to_torch` are.
            block_size: Number of features of a block, a divisor of hidden_size. Default: hidden_size.

        Raises:
            TypeError: `gru` is no `torch.nn.GRU`, or it has hooks or another `forward`.
            ValueError: `block_size` is no divisor, or a weight outside of the blocks is not 0.

        Examples:
            >>> mingru.GRU.from_torch(torch.nn.GRU(3, 48)).hidden_dims
            48
        """
        name, of_torch = f"{name_of(cls)}.from_torch", nn.modules.GRU
        check_type(name, "gru", gru, of_torch, "a torch.nn.GRU", "pass a plain one; drop_in.accelerate takes LSTMs")
        got, remedy = f"{type(gru).__name__} with hooks or a forward of its own", "copy its weights to a torch.nn.GRU"
        is_gru = getattr(type(gru).forward, "__code__", None) is of_torch.forward.__code__ and not is_hooked(gru)
        require(name, "gru", is_gru, "a torch.nn.GRU without hooks", got, remedy, TypeError)
        (weight, *_), hidden = gru.all_weights[0], gru.hidden_size
        sizes = gru.input_size, hidden, gru.num_layers, gru.bias, gru.batch_first, gru.dropout, gru.bidirectional
        with reworded({f"{name_of(cls)}: hidden_dims": f"{name}: hidden_size"}):
            rnn = cls(*sizes, block_size=block_size, device=weight.device, dtype=weight.dtype)
        for ours, (of_input, of_state, *biases) in zip(rnn._weights(name), gru.all_weights, strict=True):
            width = ours[2].shape[1]
            blocks = blocks_of(of_state, width)
            is_whole = of_state.is_meta or bool(of_state.count_nonzero() == blocks.count_nonzero())
            expected = f"a GRU whose recurrent weights are 0 outside of blocks of {width}"
            require(name, "gru", is_whole, expected, "others", "leave block_size out to keep all weights")
            own = (biases[0] + F.pad(biases[1][:-hidden], (0, hidden)), biases[1][-hidden:]) if biases else ()
            _assign(ours[::2] + ours[1::2], of_input, blocks, *own)
        return rnn.train(gru.training)

    def _weights(self, name: str) -> list[list[Any]]:
        """Return weight and bias of x, and of the state, of each direction, if `forward` computes a GRU with them."""
        seen = _Weights({}, not self.batch_first)
        others = (each for each in self.layers.modules() if not isinstance(each, RecurrentMap))
        try:
            seen.require(type(self).forward is Recurrent.forward, not any(map(is_hooked, others)))
            with names_of_torch.EnableTorchFunction():
                self._record(Recorded(seen), [(0, 0)])
            found = [each for step, of, _ in seen.steps if step == "scan" for each in of[0]]
            between = " dropout " if self.training and self.dropout > 0 else " "
            seen.require(" ".join(step for step, *_ in seen.steps) == between.join(["scan"] * self.num_layers))
            seen.require(all(each.spec.cell == "gru" and each.norm is None for each in found))
        except Exception:  # any, because what is unknown fails with a `Recorded` in its own way
            expected, got = "as constructed, except for recurrent", "hooks, or other modules or computations inside"
            raise ValueError(expectation(name, "layers", expected, got, "remove them")) from None
        return [each.map + each.recurrent for each in found]


def _assign(parameters: Iterable[Any], *values: Tensor | None) -> None:
    """Copy values, of which None means 0, to parameters, which are trainable if their values are."""
    for parameter, value in zip(parameters, values, strict=False):
        parameter.requires_grad_(value is None or value.requires_grad)
        parameter.detach().copy_(torch.zeros_like(parameter) if value is None else value.detach())


class GRUCell(RecurrentCell, planned=True):
    """Compute one step of a one-layer `mingru.GRU`, as `torch.nn.GRUCell`.

    Args:
        input_dims: Number of input features, I.
        hidden_dims: Number of state features, H.
        bias: If False, the maps have no bias.
        norm: "layer", "rms" or None: norm of the input.
        block_size: Number of features that see each other, as in `mingru.GRU`. Default: all of them.
        learn_initial_state: If True, the initial state is a parameter.
        memory: Number of time steps that a state lasts at first, see `mingru.MinGRU`.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.

    Inputs:
        - **x**: Input, (B, I) or (I,).
        - **h**: State before the step, (B, H) or (H,). Default: 0, or the learned state.
        - **reset**: Boolean mask of sequences to reset.
        - **dt**: Must be None.

    Outputs:
        - **h'**: State after the step, (B, H) or (H,).

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A size, shape, device or norm is invalid.

    State dict:
        As in a one-layer `GRU` without `residual`: the state_dict of one loads into the other.

    Examples:
        >>> cell = mingru.GRUCell(input_dims=3, hidden_dims=64)
        >>> h = cell(torch.randn(10, 3))
        >>> cell(torch.randn(10, 3), h).shape
        torch.Size([10, 64])
    """

    cell = "gru"

    @arguments_checked()
    def __init__(
        self,
        input_dims: int,
        hidden_dims: int,
        bias: bool = True,
        *,
        norm: Norm | None = None,
        block_size: int | None = None,
        learn_initial_state: bool = False,
        memory: Memory | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(**arguments_of(locals()))

    @classmethod
    def from_torch(cls, cell: nn.GRUCell, *, block_size: int | None = None) -> Self:
        """Return the cell with the weights of a `torch.nn.GRUCell`, trainable where those are.

        It computes the same. The two biases of r become their sum, and so do those of z.

        Args:
            cell: Cell whose recurrent weights are 0 outside of the blocks. With one block, any cell.
            block_size: Number of features of a block. Default: hidden_size, one block.

        Raises:
            TypeError: `cell` is no `torch.nn.GRUCell`.
            ValueError: A weight outside of the blocks is not 0.
        """
        check_type(f"{name_of(cls)}.from_torch", "cell", cell, nn.modules.GRUCell, "a torch.nn.GRUCell", "")
        gru = nn.modules.GRU(cell.input_size, cell.hidden_size, bias=bool(cell.bias)).train(cell.training)
        for name, weight in cell.named_parameters():
            setattr(gru, f"{name}_l0", weight)
        layer, weight = GRU.from_torch(gru, block_size=block_size), next(cell.parameters())
        rnn = cls(cell.input_size, cell.hidden_size, gru.bias, block_size=block_size)
        return take_weights(rnn.to(weight.device, weight.dtype), layer)
