"""A GRU whose features see each other in blocks."""

from typing import Any

import torch
from torch import nn
from typing_extensions import Self, Unpack

from ..check import check_type, require
from ..ops.block_recurrence import dense
from .cells import RecurrentCell
from .options import BlockGRUCellOptions, BlockGRUOptions, arguments_of, constructor
from .recurrent import Recurrent
from .shared import take_weights


class BlockGRU(Recurrent, planned=True):
    """Apply a stack of GRU layers whose features see each other in blocks of K to a sequence.

    Each layer and direction computes

        r_t = sigma(W_r x_t + b_r + U_r h_{t-1})
        z_t = sigma(W_z x_t + b_z + U_z h_{t-1})
        n_t = tanh(W_n x_t + b_n + r_t (U_n h_{t-1} + c_n))
        h_t = (1 - z_t) n_t + z_t h_{t-1}

    which is `torch.nn.GRU` with block-diagonal U_r, U_z and U_n: H / K blocks of K x K weights. Its gates see the
    state, so the steps are computed one after the other: on CPUs by kernels, elsewhere and where these were not built
    by `torch.gru` with the dense weights. In an ONNX file, each layer and direction is one node, `GRU`, of any length.
    A graph of `torch.export`, or of ONNX with resets, has as many steps as its example.

    `mingru.MinGRU` explains the other arguments, inputs, outputs and errors.

    Args:
        input_dims: Number of input features, I.
        hidden_dims: Number of state features, H, divisible by `block_size`, or below it.
        num_layers: Number of stacked layers, L.
        bias: If False, the maps have no bias.
        batch_first: If False, x is (S, B, I).
        dropout: Dropout probability between layers.
        bidirectional: If True, add a reverse direction (D = 2).
        residual: If True, add each layer's input to its output.
        norm: "layer", "rms" or None: norm of each layer's input. Of a single feature, "rms" leaves the sign, and
            "layer" nothing: use None, see docs/choosing.md.
        block_size: Number of features that see each other, K. Larger blocks learn more and take longer. With
            `hidden_dims`, it is `torch.nn.GRU`.
        learn_initial_state: If True, the initial state is a parameter, which begins at 0.
        memory: Number of time steps that a state lasts at first, see `mingru.MinGRU`. It shifts b_z.
        recompute: If True, backward recomputes pre-activations.
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
          `torch.nn.GRU`. Initialized as in `torch.nn.Linear`.
        - `layers.{l}.recurrent.weight` (3H, K) and `layers.{l}.recurrent.bias` (H,): U, each row without the zeros
          outside of its block, and c_n. Initialized as in `torch.nn.GRU`, uniform up to 1 / sqrt(K).
        - `linear_reverse`, `recurrent_reverse`, `norm`, `align` and `initial_state`: only if an option needs them.

    Numerics:
        As in `MinGRU`: bfloat16 and float16 inputs are computed in float32.

    Differences from `torch.nn.GRU`: one bias of r and of z instead of two, whose sum is the same; the shape of the
    state; the default of `batch_first`.

    Examples:
        >>> rnn = mingru.BlockGRU(input_dims=3, hidden_dims=64, num_layers=2)
        >>> out, h = rnn(torch.randn(10, 128, 3))
        >>> out.shape, h.shape
        (torch.Size([10, 128, 64]), torch.Size([2, 10, 1, 64]))

    References:
        Cho et al. 2014 (arXiv 1406.1078) for the GRU, in the form of `torch.nn.GRU`; Pöppel et al. 2024, "FlashRNN"
        (arXiv 2412.07752), for blocks.
    """

    cell = "blockgru"
    _has_cells = True
    _remedy_for_weights = "use mingru.BlockGRU.from_torch"

    @constructor()
    def __init__(
        self,
        input_dims: int,
        hidden_dims: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        **options: Unpack[BlockGRUOptions],
    ) -> None:
        super().__init__(**arguments_of(locals()))

    def to_torch(self) -> nn.GRU:
        """Return the `torch.nn.GRU` with the same weights, which are 0 outside of the blocks.

        It computes the same as this layer. Its state is (L * D, B, H), without the dimension of time.

        Raises:
            ValueError: The layer has a norm, a residual or a learned initial state, which `torch.nn.GRU` has not.

        Examples:
            >>> rnn, x = mingru.BlockGRU(3, 64), torch.randn(10, 128, 3)
            >>> bool(torch.allclose(rnn.to_torch()(x)[0], rnn(x)[0], atol=1e-5))
            True
        """
        for option in ("norm", "residual", "learn_initial_state"):
            value = getattr(self, option)
            expected = f"left out because torch.nn.GRU has no {option}"
            require(f"{self.name}.to_torch", option, not value, expected, repr(value))
        sizes = self.input_dims, self.hidden_dims, self.num_layers, self.bias, self.batch_first
        weight = next(self.parameters())
        # Not `nn.GRU`, which is another class in a block of `drop_in.patch`.
        gru = nn.modules.GRU(*sizes, self.dropout, self.bidirectional, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            for (linear, recurrent), (of_input, of_state, *biases) in zip(self._maps(), gru.all_weights, strict=True):
                of_input.copy_(linear.weight)
                of_state.copy_(dense(recurrent.weight))
                if biases:
                    biases[0].copy_(linear.bias)
                    biases[1].zero_()[-self.hidden_dims :].copy_(recurrent.bias)
        return gru.train(self.training)

    @classmethod
    def from_torch(cls, gru: nn.GRU, *, block_size: int = 32) -> Self:
        """Return the layer with the weights of a `torch.nn.GRU`.

        Args:
            gru: Layer whose recurrent weights are 0 outside of the blocks, as that of `to_torch`. With a `block_size`
                of its hidden_size, any layer.
            block_size: Number of features of a block.

        Raises:
            TypeError: `gru` is no `torch.nn.GRU`.
            ValueError: A weight outside of the blocks is not 0.

        Examples:
            >>> mingru.BlockGRU.from_torch(torch.nn.GRU(3, 48), block_size=48).block_size
            48
        """
        name = f"{cls.__name__}.from_torch"
        check_type(name, "gru", gru, nn.modules.GRU, "a torch.nn.GRU", "")
        sizes = gru.input_size, gru.hidden_size, gru.num_layers, gru.bias, gru.batch_first
        weight: Any = gru.weight_ih_l0
        placement: Any = {"device": weight.device, "dtype": weight.dtype}
        rnn = cls(*sizes, gru.dropout, gru.bidirectional, block_size=block_size, **placement)
        with torch.no_grad():
            for (linear, recurrent), (of_input, of_state, *biases) in zip(rnn._maps(), gru.all_weights, strict=True):
                is_inside = dense(torch.ones_like(recurrent.weight)).bool()
                expected = f"a GRU whose recurrent weights are 0 outside of blocks of {block_size}"
                remedy = f"pass block_size={gru.hidden_size} to keep them"
                require(name, "gru", not of_state[~is_inside].any(), expected, "others", remedy)
                recurrent.weight.copy_(of_state[is_inside].view_as(recurrent.weight))
                linear.weight.copy_(of_input)
                if biases:
                    linear.bias.copy_(biases[0])
                    linear.bias[: -gru.hidden_size] += biases[1][: -gru.hidden_size]
                    recurrent.bias.copy_(biases[1][-gru.hidden_size :])
        return rnn.train(gru.training)

    def _maps(self) -> list[list[Any]]:
        """Return the map of the input and that of the state, of each layer and direction."""
        layers: Any = self.layers
        return [own for layer in layers for own in layer.maps_of_directions()]


class BlockGRUCell(RecurrentCell, planned=True):
    """Compute one step of a one-layer `mingru.BlockGRU`.

    Args:
        input_dims: Number of input features, I.
        hidden_dims: Number of state features, H, divisible by `block_size`, or below it.
        bias: If False, the maps have no bias.
        norm: "layer", "rms" or None: norm of the input.
        block_size: Number of features that see each other.
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
        As in a one-layer `BlockGRU` without `residual`: the state_dict of one loads into the other.

    Examples:
        >>> cell = mingru.BlockGRUCell(input_dims=3, hidden_dims=64)
        >>> h = cell(torch.randn(10, 3))
        >>> cell(torch.randn(10, 3), h).shape
        torch.Size([10, 64])
    """

    cell = "blockgru"
    _has_cells = True

    @constructor()
    def __init__(
        self, input_dims: int, hidden_dims: int, bias: bool = True, **options: Unpack[BlockGRUCellOptions]
    ) -> None:
        super().__init__(**arguments_of(locals()))

    @classmethod
    def from_torch(cls, cell: nn.GRUCell, *, block_size: int | None = None) -> Self:
        """Return the cell with the weights of a `torch.nn.GRUCell`, trainable where those are.

        Args:
            cell: Cell whose recurrent weights are 0 outside of the blocks. With one block, any cell.
            block_size: Number of features of a block. Default: hidden_size, one block.

        Raises:
            TypeError: `cell` is no `torch.nn.GRUCell`.
            ValueError: A weight outside of the blocks is not 0.
        """
        check_type(f"{cls.__name__}.from_torch", "cell", cell, nn.modules.GRUCell, "a torch.nn.GRUCell", "")
        gru = nn.modules.GRU(cell.input_size, cell.hidden_size, bias=bool(cell.bias)).train(cell.training)
        for name, weight in cell.named_parameters():
            setattr(gru, f"{name}_l0", weight)
        block_size = block_size or cell.hidden_size
        layer, weight = BlockGRU.from_torch(gru, block_size=block_size), next(cell.parameters())
        rnn = cls(cell.input_size, cell.hidden_size, gru.bias, block_size=block_size)
        return take_weights(rnn.to(weight.device, weight.dtype), layer)
