"""minGRU."""

from .recurrent import Recurrent


class MinGRU(Recurrent, planned=True):
    """Apply a stack of minimal gated recurrent unit (minGRU) layers to a sequence.

    All time steps are computed in parallel. Each layer and direction computes

        z_t = sigma(W_z x_t + b_z)
        h_t = (1 - z_t) h_{t-1} + z_t g(W_h x_t + b_h)

    where x_t is the input of the layer, z_t the update gate and h_t the state. [mingru.functional.g][] keeps the
    candidate positive: g(v) is v + 0.5 for v >= 0 and sigma(v) for v < 0.

    `gate` selects other transitions, with k_t = W_z x_t + b_z and the candidate c_t = g(W_h x_t + b_h):

        sigmoid:   h_t = (1 - z_t) h_{t-1} + z_t c_t                            z_t = sigma(k_t)
        signed:    h_t = a_t h_{t-1} + (1 - |a_t|) c_t                          a_t = -tanh(k_t / 2)
        rotation:  h_t = (1 - z_t) exp(i theta_t) h_{t-1} + z_t c_t             theta_t = (pi / 4) u_t
        quaternion:  h_t = (1 - z_t) q_t h_{t-1} + z_t c_t        q_t = exp((pi / 4) (i v_1t + j v_2t + k v_3t))

    "rotation" has one gate and one angle for each pair of features 2 j and 2 j + 1, the real and the imaginary part of
    one complex number: rows 2 j and 2 j + 1 of W_z compute k and u. "quaternion" has one gate and one vector v for each
    four features 4 j to 4 j + 3, the parts of one quaternion: rows 4 j to 4 j + 3 of W_z compute k, v_1, v_2 and v_3.
    "signed" can compute parity, and "rotation" can count modulo any number. The turns of "quaternion" do not commute,
    as those of permutations, see [Gates](../gates.md). "mixed" has both: features 0 to H / 2 - 1 are those of
    "sigmoid", and the other half is "quaternion".

    `dt` in the call is the time since the step before, for irregularly sampled sequences; at the first step, it is the
    time since the state `h`. `min_decay` is a lower bound m of the decay, for a memory that must last (Qin et al.
    2023). Together they replace 1 - z_t by

        r_t = (m + (1 - m) (1 - z_t))^dt_t

    and z_t by 1 - r_t, which does not cancel for short times. theta_t and v_t become dt_t theta_t and dt_t v_t. Times
    of 1 give the ordinary layer. With the same x, a step with dt = 1 and one with dt = 2 give the state of one step
    with dt = 3 (not if the state turns, because the candidate does not). "signed" takes neither option, because a
    negative decay has no real power, and because the decay must pass 0 to change its sign.

    `residual="highway"` computes the output y of a layer from its state and its input, with a gate of its own:

        y_t = sigma(p_t) h_t + (1 - sigma(p_t)) x_t         p_t = W_p x_t + b_p

    With `norm`, the gates and the candidate are computed from the normalized input, and y from the input itself.

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
        norm: "layer", "rms" or None: norm of each layer's input.
        candidate: Activation of the candidate: "positive" (g, as in the paper's log-space version), "linear" (none, as
            in the paper's vanilla version) or "tanh". Default: "positive" if `gate` is "sigmoid", otherwise "tanh".
        gate: "sigmoid", "signed", "rotation", "quaternion" or "mixed", see above, or a list with one for each layer.
            "rotation" needs an even `hidden_dims`, "quaternion" one divisible by 4, and "mixed" one divisible by 8.
        min_decay: Lower bound of the decay per unit of time, from 0 to 1 (exclusive): a number, or a list with one for
            each layer. Upper layers usually get larger bounds. Must be 0 with "signed".
        learn_initial_state: If True, the initial state is a parameter, (L * D, 1, 1, H). It begins at the default, or
            if `gate` is not "sigmoid", it is drawn from N(0, 1).
        memory: Number of time steps that a state lasts at first, 1 / (1 - |a|), above 1: the initialization shifts the
            bias of the gate. With a pair of numbers, the first features last as long as its first number, the last
            ones as its second, and the logarithm grows evenly in between; with "mixed", in each half. Default: no
            shift, about 2 time steps, but 21 with "quaternion", and from 2 to 60 in the second half of "mixed".
            Requires `bias=True`.
        recompute: If True, the backward pass recomputes the pre-activations instead of storing them, which saves two
            thirds of the stored values. Default: whichever is faster. The backends "native" and "triton" support
            this; the others always store them, and so does `residual="highway"`.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.

    Inputs:
        - **x**: Sequence, (B, S, I), or (S, B, I) if `batch_first` is False. It has the dtype and device of the
          parameters. B or S may be 0. A `torch.nn.utils.rnn.PackedSequence`, sorted or not, is accepted too.
        - **h**: State before the first step, any real numbers, expandable to (L * D, B, 1, H). Index l * D is layer l
          forward, l * D + 1 its reverse direction. The dtype is that of x, or float32 if x is bfloat16 or float16.
          Default: the initial state, which is learned, or g(0) = 0.5, or 0 if "sigmoid" has another candidate. It
          is 0.5 if a layer has another gate, because 0 has nothing to flip or turn.
        - **reset**: Boolean mask, (B, S) or (S, B) like x; packed if x is packed. Where True, the state is set to the
          initial state before that step. The reverse direction is reset at the same boundary, between that step and the
          previous one.
        - **lengths**: Number of valid steps of each sequence, integers (B,) from 0 to S. Padded steps are skipped, and
          `out` is 0 there. The state of an empty sequence is its initial state. Must be None if x is packed.
        - **dt**: Time since the step before, (B, S) or (S, B) like x, at least 0. At the first step, it is the time
          since `h`; 0 there would ignore the first input, because a time of 0 keeps the state.
          [mingru.functional.elapsed_times][] computes `dt` from times. The dtype is that of x or float32. Scale it so
          that usual values are near 1. Default: 1. It is packed if x is packed. Negative times and NaN are only found
          in eager mode on the CPU. The reverse direction uses `dt[:, t + 1]` at step t, `dt[:, 0]` at the last step.

    Outputs:
        - **out**: Output of the last layer, (B, S, D * H) or (S, B, D * H), with both directions in the order of time.
          It is packed if x is packed.
        - **h**: State of each layer and direction after its last valid step, (L * D, B, 1, H), so that `rnn(x2, h)`
          continues the sequence. The batch is in the order that it had before packing.

        Both outputs are differentiable.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A size, shape, device, length, time, norm, candidate, gate, bound or dropout is invalid, or options
            do not fit.

    State dict:
        - `layers.{l}.linear.weight` (2H, I) and `layers.{l}.linear.bias` (2H,): gate rows first, then candidate rows.
          With `residual="highway"`, (3H, I) and (3H,): the rows of W_p are the last. They are initialized as in
          `torch.nn.Linear`.
        - `layers.{l}.linear_reverse`, `layers.{l}.norm`, `layers.{l}.align` (the residual's linear map) and
          `initial_state`: only if an option needs them.
        - Marks, numbers of options that change what weights of the same shapes mean, so that weights do not load into a
          layer with another option: `layers.{l}.gate` (1 for "signed", 2 for "rotation", 3 for "quaternion", 4 for
          "mixed"), `layers.{l}.candidate_mark`, `min_decay_mark` and `residual_mark`. Defaults have no marks. Weights
          of older versions load with a warning.
        - `zero_state_mark`: 1 if a gate is not "sigmoid", because the state then begins with 0.5, unless it is learned.
          Weights of older versions do not have this mark. A layer that loads them begins with 0, as they did.
          Parameters without any marks, such as moving averages, leave the initial state as it is, with a warning.

    Numerics:
        The recurrence of bfloat16 and float16 inputs is computed in float32. The returned state has the dtype of `h`;
        under autocast it is float32. If a state lasts L = 1 / (1 - |a|) steps, the relative error of the recurrence in
        float32 stays below 5e-7 + 1e-7 L, and with the backend "native" and inputs that vary, below 5e-7 sqrt(L). With
        the other gates, terms of both signs may cancel. Their error is bounded relative to the recurrence of
        absolute values, |a_t| s_{t-1} + |b_t|: below 5e-7 L, and usually far below.

    Differences from `torch.nn.GRU`: z_t = 1 takes the candidate, not the old state. There are no weights from state to
    state, so one layer cannot compare its input with its state; stack layers instead. The shape and default
    of the state and the default of `batch_first` differ too. Unlike in the paper, the initial state may be any real
    numbers.

    Examples:
        >>> rnn = mingru.MinGRU(input_dims=3, hidden_dims=64, num_layers=2, residual=True)
        >>> out, h = rnn(torch.randn(10, 128, 3))
        >>> out.shape, h.shape
        (torch.Size([10, 128, 64]), torch.Size([2, 10, 1, 64]))
        >>> out, h = rnn(torch.randn(10, 1, 3), h)  # the next step

    References:
        - Feng et al. 2024, "Were RNNs All We Needed?", section 3.1 and appendix B.
        - Grazzi et al. 2024, "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues" (arXiv 2411.12537),
          for what negative and complex transitions can compute.
        - Qin et al. 2023, "Hierarchically Gated Recurrent Neural Network for Sequence Modeling" (arXiv 2311.04823),
          section 3.2, for `min_decay`.
        - Srivastava et al. 2015, "Highway Networks" (arXiv 1505.00387), equation 3, for `residual="highway"`.
    """

    cell = "mingru"
