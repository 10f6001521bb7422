"""minGRU."""

from .recurrent import Recurrent


class MinGRU(Recurrent):
    """Stacked minimal gated recurrent units, parallel over time.

    Each layer and direction computes, from its input x_t,

        z_t = sigma(W_z x_t + b_z)
        h_t = (1 - z_t) h_{t-1} + z_t g(W_h x_t + b_h)

    where z is the gate that admits the candidate, h the state, and g keeps the candidate positive: g(v) = v + 0.5 for
    v >= 0 and sigma(v) below (`mingru.functional.g`).

    Args:
        input_dims: I, features of the input; at least 1.
        hidden_dims: H, features of the state; at least 1.
        num_layers: L; layer l + 1 takes the output of layer l.
        bias: whether the linear maps have one.
        batch_first: x is (B, S, I), as against (S, B, I). No data is copied for either.
        dropout: probability in [0, 1] with which each element of each layer's output but the last's is dropped, in
            training only.
        bidirectional: a second direction in each layer, with weights of its own, reads from the end; D = 2, else 1.
        residual: adds each layer's input to its output, through a linear map without bias where sizes differ. The state
            that comes out is the one without it.
        norm: "layer" or "rms" on the input of every layer, or None.
        candidate: "positive": g, the paper's log-space form; "linear": v itself, its plain form; "tanh".
        learn_initial_state: makes the state that stands for 'nothing seen yet' a parameter, (L * D, 1, 1, H).
        recompute: whether backward computes pre-activations once more rather than keep them, which saves two thirds of
            the memory that training needs. Default: whichever is quicker. For the back end "native"; the others keep.
        device: of the parameters.
        dtype: of the parameters, a floating one.

    Called with:
        x: (B, S, I), or (S, B, I) with `batch_first=False`; dtype and device of the parameters. S may be 0.
        h: state before the first step, any real numbers; dtype of x, or float32 beside half-width x; expands to
            (L * D, B, 1, H). Index l * D is layer l forward, l * D + 1 backward. Default: the 'zero' state g(0) = 0.5
            (0 where `candidate` is not "positive"), or the learned one.
        reset: bool, the first two dimensions of x. Where true, the state is put back to the zero or learned state
            before that step consumes its input. The backward direction is cut at the same place: between that step and
            the one before it.
        lengths: integers (B,) from 1 to S, by keyword: how many steps of each sequence are real. Nothing is computed on
            the others; `out` is 0 there.

    Instead of a tensor, x may be a `torch.nn.utils.rnn.PackedSequence`, sorted or not, and `reset` then one too. It
    comes out packed, and states are in the order of the batch before packing, each from its sequence's own end.

    Returns:
        Two tensors. `out`, (B, S, D * H) or (S, B, D * H), is the last layer's output, both directions in the order of
        time. `h`, (L * D, B, 1, H), is each layer's state after its last step, so that `rnn(x2, h)` continues. Both are
        differentiable.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a size, shape, device, length, norm, candidate or dropout that does not fit.

    Parameters: `layers.{l}.linear.weight` (2H, I), gate rows first, candidate rows second, and `.bias` (2H);
    `layers.{l}.linear_reverse`, `.norm`, `.align` (the residual's map) and `initial_state` where asked for. Drawn as
    `torch.nn.Linear` draws them.

    Numerics: half-width types are computed in float32 inside. A state comes back in the dtype of `h`, under autocast in
    float32. The relative error of the recurrence in float32 stays below 2e-6 at a million steps.

    Differs from the paper in allowing any initial state, and from `torch.nn.GRU` in that z means the opposite, that no
    weights go from state to state (so one layer can't count or compare; stack layers), in the shape and the default of
    the state, and in `batch_first`.

    Example:
        >>> rnn = mingru.MinGRU(input_dims=3, hidden_dims=64, num_layers=2, residual=True)
        >>> out, h = rnn(torch.randn(10, 128, 3))
        >>> out.shape, h.shape
        (torch.Size([10, 128, 64]), torch.Size([2, 10, 1, 64]))
        >>> out, h = rnn(torch.randn(10, 1, 3), h)  # the next step

    Source: Feng et al. 2024, "Were RNNs All We Needed?", section 3.1 and appendix B.
    """

    cell = "mingru"
