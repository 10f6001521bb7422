"""minGRU."""

from collections.abc import Sequence

import torch
from torch.types import Device

from ..check.calls import arguments_checked
from .options import Candidate, Gates, Memory, Norm, OutputGate, Residual, arguments_of
from .stacked import Recurrent


class MinGRU(Recurrent, planned=True):
    """Apply a stack of minimal gated recurrent unit (minGRU) layers to a sequence.

    All time steps are computed in parallel, because the gates do not see the state: with long sequences it takes less
    time than `mingru.GRU`, and it learns less. With the default gate, no number of layers can count, and one layer
    cannot compare its input with its state. Begin with `GRU`, or with the options of the example: the guide "Choosing
    a layer and its options" compares them. Each layer and direction computes

        z_t = sigma(W_z x_t + b_z)
        h_t = (1 - z_t) h_{t-1} + z_t g(W_h x_t + b_h)

    where x_t is the input of the layer, z_t the update gate and h_t the state. `mingru.functional.g` keeps the
    candidate positive: g(v) is v + 0.5 for v >= 0 and sigma(v) for v < 0.

    The guide "Gates in detail" has the equations of the other values of `gate`, which flip or turn the state so that
    it can count. With elapsed times `dt` and a lower bound m of the decay, `min_decay`, 1 - z_t becomes r_t =
    (m + (1 - m) (1 - z_t))^dt_t, and z_t becomes 1 - r_t; see the guide "Irregular time series".

    `residual="highway"` computes the output y of a layer from its state and its input, without the norm, with p_t = W_p
    x_t + b_p: y_t = sigma(p_t) h_t + (1 - sigma(p_t)) x_t.

    `output_gate="silu"` multiplies the states of a layer by a gate: y_t = h_t silu(v_t), with v_t = W_v x_t + b_v and
    silu(v) = v sigma(v). The next states do not depend on it. Language models learn better with it.

    Args:
        input_dims: Number of input features, I.
        hidden_dims: Number of state features, H.
        num_layers: Number of stacked layers, L. Layer l + 1 takes the output of layer l.
        bias: If False, the linear maps have no bias.
        batch_first: If False, x is (S, B, I) instead of (B, S, I). Neither order needs a copy of x.
        dropout: Dropout probability, from 0 to 1, on the output of every layer except the last. Used in training only.
        bidirectional: If True, each layer has a reverse direction with its own weights, which runs from the last step
            to the first. D is 2 if True, otherwise 1.
        residual: If True, add each layer's input to its output, through a linear map without bias if the sizes differ.
            "highway" mixes both by a gate, see above; it needs `hidden_dims` equal to `input_dims` and one direction.
            The returned state does not include the residual.
        output_gate: "silu" or None: gate of each layer's output, see above. It is applied before the residual, excludes
            `residual="highway"`, and takes half as many weights more. The returned state does not include it.
        norm: "layer", "rms" or None: norm of each layer's input. For a single feature, use None: "layer"
            raises an error, and "rms" leaves only the sign, with a warning.
        candidate: Activation of the candidate: "positive" (g, as in the paper's log-space version), "linear" (none, as
            in the paper's vanilla version) or "tanh". Default: "positive" if `gate` is "sigmoid", otherwise "tanh".
        gate: "sigmoid", "signed", "rotation", "quaternion" or "mixed", see above, or a list with one for each layer.
            "rotation" needs an even `hidden_dims`, "quaternion" one divisible by 4, and "mixed" one divisible by 8.
        min_decay: Lower bound of the decay per unit of time, from 0 to 1 (exclusive): a number, or a list with one for
            each layer. Upper layers usually get larger bounds. Must be 0 with "signed".
        learn_initial_state: If True, the initial state is a parameter, (L * D, 1, 1, H). It begins at the default, or
            if `gate` is not "sigmoid", it is drawn from N(0, 1).
        memory: Number of time steps, above 1, that a state lasts at first, 1 / (1 - |a|), or a pair of them; see
            the guide "Gates". It shifts the bias of the gate at initialization, and requires `bias=True`.
        recompute: If True, the backward pass of the backends "native" and "triton" recomputes the pre-activations
            instead of storing them, which saves two thirds of the memory. Default: whichever is faster. It has no
            effect with `residual="highway"`, and on GPUs with `output_gate` or `gate="mixed"`.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.

    Inputs:
        - **x**: Sequence, (B, S, I), or (S, B, I) if `batch_first` is False. It has the dtype and device of the
          parameters. B or S may be 0. A `torch.nn.utils.rnn.PackedSequence`, sorted or not, is accepted too.
        - **h**: State before the first step, any real numbers, expandable to (L * D, B, 1, H). Index l * D is layer l
          forward, l * D + 1 its reverse direction. The dtype is that of x, or float32 if x is bfloat16 or float16.
          Default: the initial state, see the guide "States".
        - **reset**: Boolean mask, (B, S) or (S, B) like x; packed if x is packed. Where True, the state is set to the
          initial state before that step, and in the reverse direction after it.
        - **lengths**: Number of valid steps of each sequence, integers (B,) from 0 to S. Padded steps are skipped, and
          `out` is 0 there. The state of an empty sequence is its initial state. Must be None if x is packed.
        - **dt**: Time since the step before, (B, S) or (S, B) like x, at least 0, in a unit in which usual values are
          near 1; see the guide "Irregular time series" for its first value. `mingru.functional.elapsed_times`
          computes `dt` from times. It is packed if x is packed. The dtype is that of x or float32. Default: 1.

    Outputs:
        - **out**: Output of the last layer, (B, S, D * H) or (S, B, D * H), with both directions in the order of time.
          It is packed if x is packed.
        - **h**: State of each layer and direction after its last valid step, (L * D, B, 1, H), so that `rnn(x2, h)`
          continues the sequence. The batch has the order before packing. Both outputs are differentiable.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A size, shape, device, length, time or option is invalid, or options do not fit.

    State dict:
        - `layers.{l}.linear.weight` (2H, I) and `layers.{l}.linear.bias` (2H,): gate rows first, then candidate rows.
          With `residual="highway"` or `output_gate`, (3H, I) and (3H,), the rows of W_p or W_v last. Initialized as in
          `torch.nn.Linear`.
        - `layers.{l}.linear_reverse`, `layers.{l}.norm`, `layers.{l}.align` (the residual's linear map) and
          `initial_state`: only if an option needs them.
        - Marks: numbers of options that change what weights of the same shapes mean. Defaults have no marks.

    Numerics:
        The recurrence of bfloat16 and float16 inputs is computed in float32. The returned state has the dtype of `h`;
        under autocast it is float32. If a state lasts L = 1 / (1 - |a|) steps, the relative error of the recurrence in
        float32 stays below 5e-7 + 1e-7 L, and below 5e-7 sqrt(L) with the backend "native" and inputs that vary.
        The guide "Accuracy" has the errors of the other gates, in which terms of both signs may cancel.

    Differences from `torch.nn.GRU`: z_t = 1 takes the candidate, not the old state. One layer cannot compare its input
    with its state, because no weights lead from state to state. The shape and default of the state and the default of
    `batch_first` differ too. Unlike in the paper, the initial state may be any real numbers.

    Examples:
        >>> rnn = mingru.MinGRU(3, 64, num_layers=2, norm="rms", residual=True, gate="mixed")
        >>> out, h = rnn(torch.randn(10, 128, 3))
        >>> out.shape, h.shape
        (torch.Size([10, 128, 64]), torch.Size([2, 10, 1, 64]))
        >>> out, h = rnn(torch.randn(10, 1, 3), h)  # the next step

    References:
        - Feng et al. 2024, "Were RNNs All We Needed?", section 3.1 and appendix B.
        - Qin et al. 2023, "Hierarchically Gated Recurrent Neural Network for Sequence Modeling" (arXiv 2311.04823),
          section 3.2, for `min_decay`.
        - Srivastava et al. 2015, "Highway Networks" (arXiv 1505.00387), equation 3, for `residual="highway"`.
        - Gu and Dao 2023, "Mamba" (arXiv 2312.00752), section 3.4, for `output_gate`.
    """

    cell = "mingru"

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
        residual: Residual = False,
        norm: Norm | None = None,
        candidate: Candidate | None = None,
        gate: Gates = "sigmoid",
        min_decay: float | Sequence[float] = 0.0,
        output_gate: OutputGate | None = None,
        learn_initial_state: bool = False,
        memory: Memory | None = None,
        recompute: bool | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(**arguments_of(locals()))
