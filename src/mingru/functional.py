"""The mathematics that users call: activations and recurrences, without parameters.

Letters here and in all of this package: B batch, S sequence (time), * any trailing sizes.
"""

import torch
from torch import Tensor

from . import ops
from .check import check_reset, check_state, check_tensor, dims, expectation
from .ops import activation as _activation
from .ops.backends import in_log_space as _in_log_space

__all__ = ["g", "linear_scan", "log_g", "mingru", "minlstm", "parallel_scan_log", "reset_from_lengths"]


def g(x: Tensor) -> Tensor:
    """Keep a candidate state positive.

        g(x) = x + 0.5    for x >= 0
        g(x) = sigma(x)   for x < 0

    It is continuous, grows everywhere, and g(0) = 0.5 is the 'zero' state of a layer. Its derivative is 1 from 0 on
    and sigma(x) sigma(-x) below.

    Args:
        x: any shape, any floating dtype.

    Returns:
        The same shape and dtype.

    Example:
        >>> mingru.functional.g(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([0.2689, 0.5000, 2.5000])

    Source: Feng et al. 2024, "Were RNNs All We Needed?", appendix B.
    """
    _check_floating("g", "x", x)
    return _activation.g(x)


def log_g(x: Tensor) -> Tensor:
    """Compute log `g`(x) without leaving log space: log(x + 0.5) for x >= 0, log sigma(x) below.

    Args:
        x: any shape, any floating dtype.

    Returns:
        The same shape and dtype.

    Example:
        >>> mingru.functional.log_g(torch.tensor([-100.0, 0.5]))
        tensor([-100.,    0.])

    Source: Feng et al. 2024, "Were RNNs All We Needed?", appendix B.
    """
    _check_floating("log_g", "x", x)
    return _activation.log_g(x)


def mingru(
    gate: Tensor,
    candidate: Tensor,
    h: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    backend: str = "auto",
    activation: str = "positive",
    initial_state: Tensor | None = None,
) -> Tensor:
    """Run the minGRU recurrence over pre-activations.

        z_t = sigma(gate_t)
        h_t = (1 - z_t) h_{t-1} + z_t activation(candidate_t)

    Args:
        gate: (B, S, *), pre-activation of z. float32, float64, bfloat16 or float16.
        candidate: (B, S, *), pre-activation of the candidate state; shape, dtype and device of `gate`.
        h: state before the first step, any real numbers; expands to (B, 1, *), dtype of `gate` or float32.
            Default: `initial_state`.
        reset: (B, S) bool. Where true, the state is put back to `initial_state` before that step consumes its input.
        backend: one of the names that `mingru.backends` lists, or "auto", the fastest that serves these tensors.
        activation: "positive" (`g`), "linear" or "tanh".
        initial_state: what `h=None` and `reset` mean; expands to (B, 1, *), dtype as for `h`. Default: g(0) = 0.5 for
            "positive", else 0.

    Returns:
        h_1 ... h_S, (B, S, *), dtype of `gate`. The last of them is the `h` of a call that continues.

    Raises:
        TypeError: an argument that is no tensor, or of another dtype.
        ValueError: a shape or device that does not fit, or a back end that cannot run this.

    Numerics: half-width types are computed in float32 inside. "torch" and "sequential" run in linear space, where all
    terms are positive for a positive state: the relative error in float32 stays below 2e-6 at a million steps. "log"
    loses accuracy with length: 1e-3 at ten thousand steps.

    Differs from `torch.nn.GRU`: here z admits the candidate; there z keeps the old state.

    Example:
        >>> gate, candidate = torch.randn(2, 10, 4, 8), torch.randn(2, 10, 4, 8)
        >>> whole = mingru.functional.mingru(gate, candidate)
        >>> head = mingru.functional.mingru(gate[:, :3], candidate[:, :3])
        >>> tail = mingru.functional.mingru(gate[:, 3:], candidate[:, 3:], head[:, -1:])
        >>> torch.testing.assert_close(torch.cat([head, tail], 1), whole)

    Source: Feng et al. 2024, "Were RNNs All We Needed?", section 3.1 and appendix B.
    """
    inputs = {"gate": gate, "candidate": candidate}
    return _recurrence("mingru", inputs, h, reset, backend, activation, initial_state)


def minlstm(
    forget: Tensor,
    input: Tensor,
    candidate: Tensor,
    h: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    backend: str = "auto",
    activation: str = "positive",
    initial_state: Tensor | None = None,
) -> Tensor:
    """Run the minLSTM recurrence over pre-activations.

        f_t = sigma(forget_t)      i_t = sigma(input_t)
        h_t = f_t / (f_t + i_t) h_{t-1} + i_t / (f_t + i_t) activation(candidate_t)

    Args:
        forget: (B, S, *), pre-activation of the gate that keeps the state. float32, float64, bfloat16 or float16.
        input: (B, S, *), pre-activation of the gate that admits the candidate; shape, dtype and device of `forget`.
        candidate: (B, S, *), pre-activation of the candidate state; likewise.
        h: as for `mingru`, and so are `reset`, `backend`, `activation` and `initial_state`.

    Returns:
        h_1 ... h_S, (B, S, *), dtype of `forget`.

    Raises:
        TypeError: an argument that is no tensor, or of another dtype.
        ValueError: a shape or device that does not fit, or a back end that cannot run this.

    Numerics: as of `mingru`, which this is with a gate of log sigma(input) - log sigma(forget). Gates that are both
    shut still share 1.

    Differs from `torch.nn.LSTM`: no output gate, and no cell state beside h.

    Example:
        >>> forget, input, candidate = torch.randn(3, 2, 10, 8).unbind()
        >>> mingru.functional.minlstm(forget, input, candidate).shape
        torch.Size([2, 10, 8])

    Source: Feng et al. 2024, "Were RNNs All We Needed?", section 3.2 and appendix B.
    """
    inputs = {"forget": forget, "input": input, "candidate": candidate}
    return _recurrence("minlstm", inputs, h, reset, backend, activation, initial_state)


def _recurrence(
    name: str,
    inputs: dict[str, Tensor],
    h: Tensor | None,
    reset: Tensor | None,
    backend: str,
    activation: str,
    initial_state: Tensor | None,
) -> Tensor:
    (first_name, first), *others = inputs.items()
    _check_sequence(name, first_name, first)
    for argument, sequence in others:
        check_tensor(name, argument, sequence, like=first, like_name=first_name, shape=first.shape)
    if activation not in _activation.ACTIVATIONS:
        raise ValueError(expectation(name, "activation", f"one of {_activation.ACTIVATIONS}", repr(activation)))
    check_reset(name, reset, first, "(B, S)")
    if initial_state is None:
        zero = _activation.zero_state(activation)
        initial_state = torch.full((), zero, dtype=first.dtype, device=first.device)
    initial = check_state(name, "initial_state", initial_state, first)
    state = initial if h is None else check_state(name, "h", h, first)
    spec, start = ops.Spec(name, activation, False), ops.Start(state, initial, reset)
    return ops.recurrence(spec, list(inputs.values()), start, backend=backend)[0]


def linear_scan(
    a: Tensor,
    b: Tensor,
    h: Tensor | None = None,
    *,
    reverse: bool = False,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Run a linear recurrence with diagonal transitions, in parallel over all but time.

        h_t = a_t h_{t-1} + b_t

    Args:
        a: (B, S, *), any numbers; floating, or complex where the back end is "torch" or "sequential". For a transition
            that does not depend on time, `a.expand_as(b)`, which copies nothing.
        b: (B, S, *); shape, dtype and device of `a`.
        h: state before the first step; expands to (B, 1, *), dtype of `a` (or float32 for half-width
            types). Default: 0.
        reverse: go from the last step to the first: h_t = a_t h_{t+1} + b_t, `h` coming after the last step.
        reset: (B, S) bool. Where true, the state is put to 0 before that step: h_t = b_t.
        backend: as for `mingru`.

    Returns:
        All states in the order of time, (B, S, *), dtype of `b`.

    Raises:
        TypeError: an argument that is no tensor, or of another dtype.
        ValueError: a shape or device that does not fit, or a back end that cannot run this.

    Numerics: half-width types are computed in float32 inside. Not even NaN crosses a reset.

    Example:
        >>> a, b = torch.full((1, 4), 0.5), torch.ones(1, 4)
        >>> mingru.functional.linear_scan(a, b)
        tensor([[1.0000, 1.5000, 1.7500, 1.8750]])
        >>> mingru.functional.linear_scan(a, b, reverse=True)
        tensor([[1.8750, 1.7500, 1.5000, 1.0000]])
    """
    name = "linear_scan"
    _check_sequence(name, "a", a, or_complex=True)
    check_tensor(name, "b", b, like=a, like_name="a", shape=a.shape)
    check_reset(name, reset, a, "(B, S)")
    state = torch.zeros((), dtype=a.dtype, device=a.device) if h is None else h
    return ops.linear_scan(a, b, check_state(name, "h", state, a), reset, reverse, backend)[0]


def parallel_scan_log(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Run a linear recurrence of positive numbers in log space: the paper's parallel form.

        x_0 = exp(log_b_0)      x_t = exp(log_a_t) x_{t-1} + exp(log_b_t)

    computed as exp(a* + logcumsumexp(log_b - a*)), a* the running sum of `log_a`.

    Args:
        log_a: (B, S, *), logarithms of the decays.
        log_b: (B, S + 1, *), logarithms of the initial value (first) and of the inputs; dtype and device of `log_a`.

    Returns:
        x_0 ... x_S, (B, S + 1, *), not their logarithms.

    Raises:
        TypeError: an argument that is no tensor, or of another dtype.
        ValueError: shapes or devices that do not fit.

    Numerics: a* grows with length, so the relative error in float32 does: 1e-5 at 100 steps, 1e-3 at 10 000, 0.2 at a
    million. `linear_scan` does not have this fault, and is quicker.

    Example:
        >>> log_a, log_b = torch.full((1, 3), 0.5).log(), torch.ones(1, 4).log()
        >>> mingru.functional.parallel_scan_log(log_a, log_b)
        tensor([[1.0000, 1.5000, 1.7500, 1.8750]])

    Source: Heinsen 2023, "Efficient Parallelization of a Ubiquitous Sequential Computation"; Feng et al. 2024,
    appendix B.
    """
    name = "parallel_scan_log"
    _check_sequence(name, "log_a", log_a)
    shape = (log_a.shape[0], log_a.shape[1] + 1, *log_a.shape[2:])
    check_tensor(name, "log_b", log_b, like=log_a, like_name="log_a", shape=shape)
    return _in_log_space.parallel_scan_log(log_a, log_b)


def reset_from_lengths(lengths: Tensor, num_steps: int | None = None) -> Tensor:
    """Make the mask of resets for sequences that are laid end to end in one row.

        reset_t = true where t = lengths_0 + ... + lengths_{n-1} for an n from 0 to N

    With it, one long row computes what N rows of different lengths would, in both directions and without padding.

    Args:
        lengths: (N,), integers from 1 on: how many steps each sequence has.
        num_steps: S, at least the sum of `lengths`. Default: that sum. The steps beyond it are cut off too, so that
            padding reaches no sequence from behind either.

    Returns:
        (1, S) bool, on the device of `lengths`: the `reset` of a layer or of the functions above. On a GPU it waits for
        the numbers.

    Raises:
        TypeError: `lengths` that are no integer tensor, or a `num_steps` that is no int.
        ValueError: `lengths` of another shape, or below 1; a `num_steps` below their sum.

    Example:
        >>> sequences = [torch.randn(length, 3) for length in (2, 1, 3)]
        >>> reset = mingru.functional.reset_from_lengths(torch.tensor([2, 1, 3]))
        >>> reset
        tensor([[ True, False,  True,  True, False, False]])
        >>> rnn = mingru.MinGRU(3, 8, bidirectional=True)
        >>> out, h = rnn(torch.cat(sequences).unsqueeze(0), reset=reset)
        >>> torch.testing.assert_close(out[:, 3:], rnn(sequences[2].unsqueeze(0))[0])
    """
    name = "reset_from_lengths"
    if not isinstance(lengths, Tensor):
        remedy = "torch.as_tensor makes one"
        raise TypeError(expectation(name, "lengths", "an integer tensor (N,)", type(lengths).__name__, remedy))
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(expectation(name, "lengths", "of an integer dtype", str(lengths.dtype), "use lengths.long()"))
    if lengths.dim() != 1:
        raise ValueError(expectation(name, "lengths", "(N,)", dims(lengths.shape)))
    count = lengths.numel()
    if count and int(lengths.min()) < 1:
        raise ValueError(expectation(name, "lengths", "at least 1 each", str(lengths.tolist())))
    if num_steps is not None and (not isinstance(num_steps, int) or isinstance(num_steps, bool)):
        raise TypeError(expectation(name, "num_steps", "an int", repr(num_steps)))
    ends = lengths.cumsum(0)
    total = int(ends[-1]) if count else 0
    num_steps = total if num_steps is None else num_steps
    if num_steps < total:
        raise ValueError(expectation(name, "num_steps", f"at least {total}, the sum of lengths", str(num_steps)))
    # One place more, for the cut behind the last sequence.
    reset = torch.zeros(1, num_steps + 1, dtype=torch.bool, device=lengths.device)
    reset[0, ends - lengths] = True
    reset[0, total] = True
    return reset[:, :num_steps]


def _check_sequence(name: str, argument: str, sequence: Tensor, or_complex: bool = False) -> None:
    _check_floating(name, argument, sequence, or_complex)
    if sequence.dim() < 2:
        raise ValueError(expectation(name, argument, "(B, S, *)", dims(sequence.shape), "give it a batch dimension"))


def _check_floating(name: str, argument: str, x: Tensor, or_complex: bool = False) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(expectation(name, argument, "a tensor", type(x).__name__, "torch.as_tensor makes one"))
    if not (x.is_floating_point() or (or_complex and x.is_complex())):
        raise TypeError(
            expectation(name, argument, "of a floating dtype", str(x.dtype), f"{argument}.float() makes one")
        )
