"""minLSTM."""

import torch
from torch.types import Device

from ..check.calls import arguments_checked
from .options import Candidate, Memory, Norm, OutputGate, Residual, arguments_of
from .stacked import Recurrent


class MinLSTM(Recurrent, planned=True):
    """Apply a stack of minimal long short-term memory (minLSTM) layers to a sequence.

    Each layer and direction computes

        f_t = sigma(W_f x_t + b_f)      i_t = sigma(W_i x_t + b_i)
        h_t = f_t / (f_t + i_t) h_{t-1} + i_t / (f_t + i_t) g(W_h x_t + b_h)

    where f_t is the forget gate, i_t the input gate and h_t the state. `mingru.functional.g` keeps the candidate
    positive. The normalized gates sum to 1, so that the state does not grow with length.

    With `normalize=False`, the gates are independent:

        h_t = f_t h_{t-1} + i_t g(W_h x_t + b_h)

    The state may then grow, because f + i may exceed 1: with constant gates and a constant candidate c, it approaches
    i c / (1 - f).

    `mingru.MinGRU` explains the arguments (except `forget_bias` and `normalize`), inputs, outputs and errors.

    Args:
        input_dims: Number of input features, I.
        hidden_dims: Number of state features, H.
        num_layers: Number of stacked layers, L.
        bias: If False, the linear maps have no bias.
        batch_first: If False, x is (S, B, I).
        dropout: Dropout probability between layers.
        bidirectional: If True, add a reverse direction (D = 2).
        residual: If True, add each layer's input to its output. "highway" mixes both; see `mingru.MinGRU`.
        output_gate: "silu" or None: gate of each layer's output; see `mingru.MinGRU`.
        norm: "layer", "rms" or None: norm of each layer's input. For a single feature, use None: "layer"
            raises an error, and "rms" leaves only the sign, with a warning.
        candidate: "positive" (g), "linear" or "tanh".
        learn_initial_state: If True, the initial state is a parameter.
        memory: Number of time steps that a state lasts at first, see `mingru.MinGRU`.
        recompute: If True, backward recomputes pre-activations.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.
        forget_bias: Number added to the forget gate's bias at initialization. With 1, states decay slowly at first.
            Requires `bias=True`.
        normalize: If False, the gates are not divided by their sum; see above.

    Inputs:
        - **x**: Sequence, (B, S, I).
        - **h**: State before the first step, (L * D, B, 1, H).
        - **reset**: Boolean mask of steps that start from the initial state.
        - **lengths**: Number of valid steps, (B,).
        - **dt**: Time since the step before, (B, S), at least 0; see the guide "Irregular time series". The
          normalized forget gate is raised to this power, and the input gate is 1 minus the result. Default: 1. Must be
          None if `normalize` is False.

    Outputs:
        - **out**: Output of the last layer, (B, S, D * H).
        - **h**: State after the last step, (L * D, B, 1, H).

    State dict:
        As in `MinGRU`, except `layers.{l}.linear.weight` (3H, I) and `layers.{l}.linear.bias` (3H,): forget gate rows
        first, then input gate rows, then candidate rows. With `residual="highway"` or `output_gate`, its H rows are the
        last.
        `layers.{l}.normalize_mark` is 1 if `normalize` is False.

    Numerics:
        As in `MinGRU`. The normalized gates sum to 1 even if both sigmoids underflow.

    Differences from `torch.nn.LSTM`: the state is one tensor, h. There is no cell state or recurrent weight. Defaults
    differ as in `MinGRU`.

    Examples:
        >>> rnn = mingru.MinLSTM(input_dims=3, hidden_dims=64, num_layers=2, forget_bias=1.0)
        >>> out, h = rnn(torch.randn(10, 128, 3))
        >>> out.shape, h.shape
        (torch.Size([10, 128, 64]), torch.Size([2, 10, 1, 64]))

    References:
        Feng et al. 2024, "Were RNNs All We Needed?", section 3.2 and appendix B; for `normalize=False`, the authors'
        code, https://github.com/BorealisAI/minRNNs, without its option `use_coeff_norm`.
    """

    cell = "minlstm"

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
        forget_bias: float = 0.0,
        normalize: bool = True,
        residual: Residual = False,
        norm: Norm | None = None,
        candidate: Candidate | None = "positive",
        output_gate: OutputGate | None = None,
        learn_initial_state: bool = False,
        memory: Memory | None = None,
        recompute: bool | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(**arguments_of(locals()))
