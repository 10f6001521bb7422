"""Activations and recurrences as functions of tensors, without parameters.

Notation, here and in the whole package: B batch, S sequence (time), I input features, H hidden features, L layers,
D directions (1 or 2), * any trailing sizes.
"""

from typing import Any

import torch
from torch import Tensor

from . import ops
from .check.calls import explained
from .check.forms import GRU, LINEAR_SCAN, MINGRU, MINLSTM, PARALLEL_SCAN_LOG, ROTATION, Function, check_given
from .check.values import check_choice, check_flag, check_floating, check_min_decay, dims, expectation, require
from .modules.options import Candidate, Gate
from .ops import activation as _activation
from .ops.backends import in_log_space as _in_log_space
from .ops.backends import torch_in_graphs as _in_graphs
from .ops.call import Context, Spec, spec_of
from .ops.cells import GATES, default_candidate, multiple_of, zero_state
from .ops.modes import scripted_as
from .ops.route import BackendName
from .ops.shape import accumulate_dtype, as_dtype, is_expandable
from .sequences import check_resets, elapsed_times, reset_from_lengths

__all__ = [
    "check_resets",
    "elapsed_times",
    "g",
    "gru",
    "linear_scan",
    "log_g",
    "minlstm",
    "parallel_scan_log",
    "reset_from_lengths",
]


def g(x: Tensor) -> Tensor:
    """Compute the activation that keeps the candidate state positive.

        g(x) = x + 0.5    for x >= 0
        g(x) = sigma(x)   for x < 0

    g is continuous and increasing. g(0) = 0.5 is the default initial state of a layer. The derivative of g is sigma(x)
    sigma(-x) for x < 0, else 1.

    Args:
        x: Tensor of any shape and floating-point dtype.

    Returns:
        Tensor with the shape and dtype of `x`.

    Examples:
        >>> mingru.functional.g(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([0.2689, 0.5000, 2.5000])

    References:
        Feng et al. 2024, "Were RNNs All We Needed?", appendix B.
    """
    check_floating("g", "x", x)
    return _activation.g(x)


def log_g(x: Tensor) -> Tensor:
    """Compute log g(x) without leaving log space: log(x + 0.5) for x >= 0, log sigma(x) for x < 0.

    Args:
        x: Tensor of any shape and floating-point dtype.

    Returns:
        Tensor with the shape and dtype of `x`.

    Examples:
        >>> mingru.functional.log_g(torch.tensor([-100.0, 0.5]))
        tensor([-100.,    0.])

    References:
        Feng et al. 2024, "Were RNNs All We Needed?", appendix B.
    """
    check_floating("log_g", "x", x)
    return _activation.log_g(x)


@explained
def mingru(
    gate: Tensor,
    candidate: Tensor,
    h: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    dt: Tensor | None = None,
    backend: BackendName = "auto",
    kind: Gate = "sigmoid",
    angle: Tensor | None = None,
    min_decay: float = 0.0,
    activation: Candidate | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:
    """Compute the states of a minGRU from its pre-activations.

        z_t = sigma(gate_t)
        h_t = (1 - z_t) h_{t-1} + z_t activation(candidate_t)

    This is the equation of the kind "sigmoid". `mingru.MinGRU` has the equations of the other kinds, and of `dt` and
    `min_decay`.

    Args:
        gate: Pre-activation of the update gate z, (B, S, *); float32, float64, bfloat16 or float16. For "rotation",
            (B, S, H / 2, *). For "quaternion", (B, S, H, *): features 4 j to 4 j + 3 are the gate and the vector v of
            quaternion j, in units of pi / 4; for "mixed", in the second half of the features only.
        candidate: Pre-activation of the candidate state; shape, dtype and device of `gate`. For "rotation", (B, S, H,
            *): features 2 j and 2 j + 1 are pair j.
        h: State before the first step, any real numbers; expandable to (B, 1, *). Its dtype is the dtype of `gate`, or
            float32 if `gate` is bfloat16 or float16. Default: `initial_state`.
        reset: Boolean mask, (B, S). Where True, the state is set to `initial_state` before that step.
        dt: Time since the step before, (B, S), at least 0; see the guide "Irregular time series". Dtype of
            `gate` or float32. Default: 1. Not for "signed".
        backend: Name listed by `mingru.backends`, or "auto" for the fastest backend that supports these tensors.
        kind: "sigmoid", "signed", "rotation", "quaternion" or "mixed": the layer's `gate`, which is a tensor here.
        angle: Pre-activation of the angle, in units of pi / 4; shape, dtype and device of `gate`. Required for
            "rotation", otherwise None.
        min_decay: Lower bound of the decay per unit of time, from 0 to 1 (exclusive). 0 for "signed".
        activation: Activation of the candidate: "positive" (`g`), "linear" (none) or "tanh". Default: "positive" for
            "sigmoid", "tanh" for the other kinds, whose states have both signs.
        initial_state: State after a reset, and default of `h`; expandable to (B, 1, *), dtype as for `h`. Default: g(0)
            = 0.5, or 0 if "sigmoid" has another activation.

    Returns:
        States h_1 ... h_S, with the shape of `candidate` and the dtype of `gate`. To continue the sequence, pass the
        last state as `h`.

    Raises:
        TypeError: An argument is not a tensor, or has the wrong dtype.
        ValueError: A shape, device, kind or activation is invalid, or the backend cannot compute this call.

    Numerics:
        bfloat16 and float16 are computed in float32. "native", "torch" and "sequential" compute in linear space. With
        kind "sigmoid", the activation "positive" and a positive state, all terms are positive, and the relative error
        in float32 does not grow with length. `mingru.MinGRU` has its bound by the number of steps that a state lasts,
        and that of the other kinds. The error of "log" grows with length, to 1e-3 at 10,000 steps.

    z = 1 takes the candidate. In `torch.nn.GRU`, z = 1 keeps the previous state.

    Examples:
        >>> gate, candidate = torch.randn(2, 10, 4, 8), torch.randn(2, 10, 4, 8)
        >>> whole = mingru.functional.mingru(gate, candidate)
        >>> head = mingru.functional.mingru(gate[:, :3], candidate[:, :3])
        >>> tail = mingru.functional.mingru(gate[:, 3:], candidate[:, 3:], head[:, -1:])
        >>> torch.testing.assert_close(torch.cat([head, tail], 1), whole)

    References:
        Feng et al. 2024, "Were RNNs All We Needed?", section 3.1 and appendix B.
    """
    name = "mingru"
    check_choice(name, "kind", kind, GATES)
    (bound,) = check_min_decay(name, min_decay, [kind])
    spec = spec_of(GATES[kind], default_candidate(GATES[kind]) if activation is None else activation, False, bound)
    forms = MINGRU
    inputs: dict[str, Any] = {"gate": gate, "candidate": candidate}
    if kind == "rotation":
        require(name, "angle", angle is not None, "a tensor like gate because kind is 'rotation'", "None")
        forms, inputs = ROTATION, {"gate": gate, "angle": angle, "candidate": candidate}
    else:
        expected = f"None because kind is {kind!r}"
        require(name, "angle", angle is None, expected, type(angle).__name__, "pass kind='rotation'")
    if (count := multiple_of(spec.cell)) > 1 and kind != "rotation":
        check_floating(name, "gate", gate)
        if gate.dim() < 3 or gate.shape[2] % count != 0:
            expected = f"(B, S, H, *) with H divisible by {count} because kind is {kind!r}"
            raise ValueError(expectation(name, "gate", expected, dims(gate.shape)))
    return _checked_states(spec, forms, inputs, h, reset, dt, backend, initial_state)


@explained
def minlstm(
    forget: Tensor,
    input: Tensor,
    candidate: Tensor,
    h: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    dt: Tensor | None = None,
    backend: BackendName = "auto",
    normalize: bool = True,
    activation: Candidate = "positive",
    initial_state: Tensor | None = None,
) -> Tensor:
    """Compute the states of a minLSTM from its pre-activations.

        f_t = sigma(forget_t)      i_t = sigma(input_t)
        h_t = f_t / (f_t + i_t) h_{t-1} + i_t / (f_t + i_t) activation(candidate_t)    if `normalize`
        h_t = f_t h_{t-1} + i_t activation(candidate_t)                                otherwise

    Without normalization, the state may grow, because f + i may exceed 1.

    Args:
        forget: Pre-activation of the forget gate f, (B, S, *); float32, float64, bfloat16 or float16.
        input: Pre-activation of the input gate i; shape, dtype and device of `forget`.
        candidate: Pre-activation of the candidate state; shape, dtype and device of `forget`.
        h: State before the first step. Default: `initial_state`.
        reset: Boolean mask, (B, S), of the steps that start from `initial_state`.
        dt: Time since the step before, (B, S), at least 0; see the guide "Irregular time series". Default: 1.
            Must be None if `normalize` is False.
        backend: Name of a backend, or "auto".
        normalize: If False, the gates are not divided by their sum.
        activation: "positive" (`g`), "linear" or "tanh".
        initial_state: State after a reset, and default of `h`.

    Returns:
        States h_1 ... h_S, (B, S, *), dtype of `forget`.

    Raises:
        TypeError: An argument is not a tensor or not a bool, or has the wrong dtype.
        ValueError: A shape, device or activation is invalid, or the backend cannot compute this call.

    Numerics:
        Same as `mingru.functional.mingru` with gate = log sigma(input) - log sigma(forget). The normalized gates sum
        to 1 even if both sigmoids underflow. Without normalization, the relative error has the same bound.

    Unlike `torch.nn.LSTM`, minLSTM has no output gate and no cell state.

    Examples:
        >>> forget, input, candidate = torch.randn(3, 2, 10, 8).unbind()
        >>> mingru.functional.minlstm(forget, input, candidate).shape
        torch.Size([2, 10, 8])

    References:
        Feng et al. 2024, "Were RNNs All We Needed?", section 3.2 and appendix B.
    """
    check_flag("minlstm", "normalize", normalize)
    spec = spec_of("minlstm" if normalize else "minlstm_unnormalized", activation, False, 0.0)
    inputs = {"forget": forget, "input": input, "candidate": candidate}
    return _checked_states(spec, MINLSTM, inputs, h, reset, dt, backend, initial_state)


@explained
def gru(
    reset_gate: Tensor,
    update_gate: Tensor,
    candidate: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    h: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    backend: BackendName = "auto",
    initial_state: Tensor | None = None,
) -> Tensor:
    """Compute the states of a GRU from its pre-activations, which contain everything but the state.

        r_t = sigma(reset_gate_t + U_r h_{t-1})
        z_t = sigma(update_gate_t + U_z h_{t-1})
        n_t = tanh(candidate_t + r_t (U_n h_{t-1} + c))
        h_t = (1 - z_t) n_t + z_t h_{t-1}

    This is the recurrence of `mingru.GRU` and, with one block, of `torch.nn.GRU`.

    Args:
        reset_gate: Pre-activation of r, (B, S, H); float32, float64, bfloat16 or float16.
        update_gate: Pre-activation of z; shape, dtype and device of `reset_gate`.
        candidate: Pre-activation of n; shape, dtype and device of `reset_gate`.
        weight: Recurrent weights, (3 H, K): rows of U_r, U_z and U_n, each without the zeros outside of its block of K
            features. With K = H, it is `weight_hh_l0` of `torch.nn.GRU`. Dtype and device of `reset_gate`.
        bias: c, (H,), the last third of `bias_hh_l0`. Default: 0.
        h: State before the first step, expandable to (B, 1, H). Default: `initial_state`.
        reset: Boolean mask, (B, S), of the steps that start from `initial_state`.
        backend: Name of a backend, or "auto".
        initial_state: State after a reset, and default of `h`; expandable to (B, 1, H). Default: 0.

    Returns:
        States h_1 ... h_S, (B, S, H), dtype of `reset_gate`. To continue the sequence, pass the last state as `h`.

    Raises:
        TypeError: An argument is not a tensor, or has the wrong dtype.
        ValueError: A shape or device is invalid, or the backend cannot compute this call.

    Numerics:
        bfloat16 and float16 are computed in float32.

    z = 1 keeps the state here, as in `torch.nn.GRU`. In `mingru.functional.mingru`, it takes the candidate.

    Examples:
        >>> rnn, x = torch.nn.GRU(3, 8, batch_first=True), torch.randn(2, 10, 3)
        >>> x_r, x_z, x_n = torch.nn.functional.linear(x, rnn.weight_ih_l0, rnn.bias_ih_l0).chunk(3, -1)
        >>> b_r, b_z, c = rnn.bias_hh_l0.chunk(3)
        >>> out = mingru.functional.gru(x_r + b_r, x_z + b_z, x_n, rnn.weight_hh_l0, c)
        >>> torch.testing.assert_close(out, rnn(x)[0])

    References:
        Cho et al. 2014 (arXiv 1406.1078), in the form of `torch.nn.GRU`.
    """
    name = "gru"
    inputs = {"reset_gate": reset_gate, "update_gate": update_gate, "candidate": candidate}
    table = GRU.bind(reset_gate)
    check_floating(name, "weight", weight)
    table["weight"].check(GRU, weight, reset_gate, None)
    features = reset_gate.shape[2]
    if weight.dim() != 2 or weight.shape[0] != 3 * features or not weight.shape[1] or features % weight.shape[1] != 0:
        expected = f"(3 H, K) with H = {features} because of reset_gate, and K a divisor of H"
        raise ValueError(expectation(name, "weight", expected, dims(weight.shape)))
    check_given(GRU, table, reset_gate, reset_gate.shape, "gru", bias=bias)
    spec = spec_of("gru", "tanh", False, 0.0)
    return _checked_states(spec, GRU, inputs, h, reset, None, backend, initial_state, weight, bias)


def _checked_states(
    spec: Spec,
    forms: Function,
    inputs: dict[str, Tensor],
    h: Tensor | None,
    reset: Tensor | None,
    dt: Tensor | None,
    backend: BackendName,
    initial_state: Tensor | None,
    *recurrent: Tensor | None,
) -> Tensor:
    """Check the tensors of a call, and compute the states."""
    tensors = [*inputs.values()]
    first, table = tensors[0], forms.bind(tensors[0])
    for argument, sequence in inputs.items():
        if argument in table:
            table[argument].check(forms, sequence, first, first.shape)
    check_choice(forms.name, "activation", spec.activation, _activation.ACTIVATIONS)
    given = {"reset": reset, "dt": dt, "h": h, "initial_state": initial_state}
    check_given(forms, table, first, first.shape, spec.cell, **given)
    if dt is not None:
        dt = as_dtype(dt, accumulate_dtype(first.dtype))
    if initial_state is None:
        value = zero_state(spec.cell, spec.activation)
        initial_state = torch.full((), value, dtype=first.dtype, device=first.device)
    shape = table["h"].shape(first.shape, None)
    initial = initial_state.expand(shape)
    context = Context(initial if h is None else h.expand(shape), initial, reset, dt, *recurrent)
    if "angle" in inputs:
        tensors = [torch.stack(tensors[:2], 3).flatten(2, 3), tensors[2]]
    return ops.recurrence(spec, tensors, context, backend=backend)[0]


def _scripted_linear_scan(
    a: Tensor, b: Tensor, h: Tensor | None = None, reverse: bool = False, reset: Tensor | None = None
) -> Tensor:
    # TorchScript knows no keyword-only arguments, and no result that depends on an argument.
    dtype = accumulate_dtype(b.dtype)
    state = torch.zeros([], dtype=b.dtype, device=b.device) if h is None else h
    state = as_dtype(state.expand([b.size(0), 1] + list(b.shape[2:])), dtype)  # noqa: RUF005 (not in TorchScript)
    return as_dtype(_in_graphs.linear_scan(as_dtype(a, dtype), as_dtype(b, dtype), state, reset, reverse)[0], b.dtype)


@scripted_as(_scripted_linear_scan)
@explained
def linear_scan(
    a: Tensor,
    b: Tensor,
    h: Tensor | None = None,
    *,
    reverse: bool = False,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: BackendName = "auto",
) -> Any:
    """Compute a linear recurrence over time.

        h_t = a_t h_{t-1} + b_t

    All operations are elementwise (diagonal transitions).

    Args:
        a: Decays, (B, S, *), any numbers; floating-point or complex. Two dimensions are (B, S): for a sequence (S, H)
            without a batch, pass (1, S, H). For decays that do not depend on time, pass
            `a.expand_as(b)`, which copies nothing.
        b: Inputs of the recurrence; shape, dtype and device of `a`.
        h: State before the first step; expandable to (B, 1, *). Its dtype is the dtype of `a`, or float32 if `a` is
            bfloat16 or float16. Default: 0.
        reverse: If True, run from the last step to the first: h_t = a_t h_{t+1} + b_t, from `h` after the last step.
        reset: Boolean mask, (B, S). Where True, the state is set to 0 before that step: h_t = b_t.
        lengths: Number of valid steps of each sequence, integers (B,) from 0 to S. The steps after them are padding,
            where the result is 0; with `reverse`, the scan begins at the last valid step.
        backend: Name listed by `mingru.backends`, or "auto" for the fastest backend.

    Returns:
        States in the order of time, (B, S, *), dtype of `b`. With `lengths`, a pair: these states, and the state after
        the last valid step of each sequence (with `reverse`, after the first step), (B, 1, *), dtype of `h`. The state
        of an empty sequence is `h`.

    Raises:
        TypeError: An argument is not a tensor, or has the wrong dtype.
        ValueError: A shape or device is invalid, or the backend cannot compute this call.

    Numerics:
        bfloat16 and float16 are computed in float32. A reset also stops NaN.

    In TorchScript, it takes neither `lengths` nor `backend`.

    Examples:
        >>> a, b = torch.full((1, 4), 0.5), torch.ones(1, 4)
        >>> mingru.functional.linear_scan(a, b)
        tensor([[1.0000, 1.5000, 1.7500, 1.8750]])
        >>> mingru.functional.linear_scan(a, b, reverse=True)
        tensor([[1.8750, 1.7500, 1.5000, 1.0000]])
        >>> mingru.functional.linear_scan(a, b, lengths=torch.tensor([2]))
        (tensor([[1.0000, 1.5000, 0.0000, 0.0000]]), tensor([[1.5000]]))
    """
    check_flag("linear_scan", "reverse", reverse)
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape != b.shape and is_expandable(a.shape, b.shape):
        expected, remedy = f"(B, S, *) = {dims(b.shape)} like b", "use a.expand_as(b), which copies nothing"
        raise ValueError(expectation("linear_scan", "a", expected, dims(a.shape), remedy))
    table = LINEAR_SCAN.bind(a, or_complex=True)
    table["b"].check(LINEAR_SCAN, b, a, a.shape)
    check_given(LINEAR_SCAN, table, a, a.shape, "linear_scan", reset=reset, lengths=lengths, h=h)
    state = torch.zeros((), dtype=a.dtype, device=a.device) if h is None else h
    state = state.expand(table["h"].shape(a.shape, None))
    states = ops.linear_scan(a, b, state, reset, reverse, backend, lengths)
    return states[0] if lengths is None else states


def parallel_scan_log(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Compute a linear recurrence of positive numbers in log space, the paper's parallel form.

        x_0 = exp(log_b_0)      x_t = exp(log_a_t) x_{t-1} + exp(log_b_t)

    The result is computed as exp(a* + logcumsumexp(log_b - a*)), where a* is the cumulative sum of `log_a`.

    Args:
        log_a: Logarithms of the decays, (B, S, *).
        log_b: Logarithms of the initial value and of the inputs, (B, S + 1, *); dtype and device of `log_a`.

    Returns:
        x_0 ... x_S, (B, S + 1, *), not their logarithms.

    Raises:
        TypeError: An argument is not a tensor, or has the wrong dtype.
        ValueError: A shape or device is invalid.

    Numerics:
        The relative error in float32 grows with length, because a* does: 1e-5 at 100 steps, 1e-3 at 10,000, 0.2 at a
        million. `mingru.functional.linear_scan` does not have this problem, and is faster.

    Examples:
        >>> log_a, log_b = torch.full((1, 3), 0.5).log(), torch.ones(1, 4).log()
        >>> mingru.functional.parallel_scan_log(log_a, log_b)
        tensor([[1.0000, 1.5000, 1.7500, 1.8750]])

    References:
        Heinsen 2023, "Efficient Parallelization of a Ubiquitous Sequential Computation"; Feng et al. 2024, appendix B.
    """
    PARALLEL_SCAN_LOG.bind(log_a)["log_b"].check(PARALLEL_SCAN_LOG, log_b, log_a, log_a.shape)
    return _in_log_space.parallel_scan_log(log_a, log_b)
