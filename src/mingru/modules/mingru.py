"""minGRU."""

from .recurrent import Recurrent


class MinGRU(Recurrent, planned=True):
    """Apply a stack of minimal gated recurrent unit (minGRU) layers to a sequence.

    All time steps are computed in parallel. Each layer and direction computes

        z_t = sigma(W_z x_t + b_z)
        h_t = (1 - z_t) h_{t-1} + z_t g(W_h x_t + b_h)

    where x_t is the input of the layer, z_t the update gate and h_t the state. [mingru.functional.g][] keeps the
    candidate positive: g(v) is v + 0.5 for v >= 0 and sigma(v) for v < 0.

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
            The returned state does not include the residual.
        norm: "layer", "rms" or None: norm of each layer's input.
        candidate: Activation of the candidate: "positive" (g, as in the paper's log-space version), "linear" (none, as
            in the paper's vanilla version) or "tanh".
        learn_initial_state: If True, the initial state is a parameter, (L * D, 1, 1, H).
        recompute: If True, the backward pass recomputes the pre-activations instead of storing them, which saves two
            thirds of the stored values. Default: whichever is faster. Only the "native" backend supports this; the
            other backends always store them.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.

    Inputs:
        - **x**: Sequence, (B, S, I), or (S, B, I) if `batch_first` is False. It has the dtype and device of the
          parameters. B or S may be 0. A `torch.nn.utils.rnn.PackedSequence`, sorted or not, is accepted too.
        - **h**: State before the first step, any real numbers, expandable to (L * D, B, 1, H). Index l * D is layer l
          forward, l * D + 1 its reverse direction. The dtype is that of x, or float32 if x is bfloat16 or float16.
          Default: the initial state, which is g(0) = 0.5 (0 if `candidate` is not "positive") or learned.
        - **reset**: Boolean mask, (B, S) or (S, B) like x; packed if x is packed. Where True, the state is set to the
          initial state before that step. The reverse direction is reset at the same boundary, between that step and the
          previous one.
        - **lengths**: Number of valid steps of each sequence, integers (B,) from 1 to S. Padded steps are skipped, and
          `out` is 0 there. Must be None if x is packed.

    Outputs:
        - **out**: Output of the last layer, (B, S, D * H) or (S, B, D * H), with both directions in the order of time.
          It is packed if x is packed.
        - **h**: State of each layer and direction after its last valid step, (L * D, B, 1, H), so that `rnn(x2, h)`
          continues the sequence. The batch is in the order that it had before packing.

        Both outputs are differentiable.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A size, shape, device, length, norm, candidate or dropout is invalid.

    State dict:
        - `layers.{l}.linear.weight` (2H, I) and `layers.{l}.linear.bias` (2H,): gate rows first, then candidate rows.
          They are initialized as in `torch.nn.Linear`.
        - `layers.{l}.linear_reverse`, `layers.{l}.norm`, `layers.{l}.align` (the residual's linear map) and
          `initial_state`: only if an option needs them.

    Numerics:
        The recurrence of bfloat16 and float16 inputs is computed in float32. The returned state has the dtype of `h`;
        under autocast it is float32. The relative error of the recurrence in float32 stays below 2e-6 at a million
        steps.

    Differences from `torch.nn.GRU`: z_t = 1 takes the candidate, not the old state. There are no weights from state to
    state, so one layer cannot count or compare; stack layers instead. The shape and default of the state and the
    default of `batch_first` differ too. Unlike in the paper, the initial state may be any real numbers.

    Examples:
        >>> rnn = mingru.MinGRU(input_dims=3, hidden_dims=64, num_layers=2, residual=True)
        >>> out, h = rnn(torch.randn(10, 128, 3))
        >>> out.shape, h.shape
        (torch.Size([10, 128, 64]), torch.Size([2, 10, 1, 64]))
        >>> out, h = rnn(torch.randn(10, 1, 3), h)  # the next step

    References:
        Feng et al. 2024, "Were RNNs All We Needed?", section 3.1 and appendix B.
    """

    cell = "mingru"
