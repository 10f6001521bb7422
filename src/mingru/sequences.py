"""Arguments of a layer's call that are computed from a description of the sequences, and a check of resets."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .check.calls import explained
from .check.forms import CHECK_RESETS, ELAPSED_TIMES, RESET_FROM_LENGTHS, check_given
from .check.values import check_flag, check_int, check_number, dims, expectation, instead_of_a_tensor, require
from .ops.layout import padding_of
from .ops.modes import are_eager


@explained
def elapsed_times(
    t: Tensor,
    first: float | Tensor,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    batch_first: bool = True,
) -> Tensor:
    """Compute the elapsed times `dt` of a layer from the times of its observations.

        dt_1 = first      dt_t = t_t - t_{t-1}

    `first` is the time from the state to the first observation. A first time of 0, which is what a difference padded
    with zeros has, would make the layer ignore the first observation.

    Args:
        t: Times of the observations, (B, S), which do not decrease; floating-point or integers, such as Unix times.
            Pass large times as integers or float64, because float32 has only 7 digits; above 2**24 it warns.
        first: Time from the state before the sequence to the first observation, at least 0: a number, or a tensor with
            one for each sequence, (B,). A typical gap is a good choice for the initial state. To continue a sequence,
            pass `t[:, 0]` minus the time of its last observation.
        reset: Boolean mask, (B, S), of the steps that start from the initial state. Their elapsed time is `first`, and
            their times may be less than those before.
        lengths: Number of valid steps, integers (B,). Times in the padding are ignored, and their elapsed time is 0.
        batch_first: If False, `t`, `reset` and the result are (S, B).

    Returns:
        Elapsed times in the unit of `t`, (B, S); divide them by a typical gap. The dtype is that of `t`, or the default
        dtype if `t` has integers. A float32 layer needs `.float()` if `t` is float64.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape or device is invalid, `first` is below 0, or times decrease or are NaN. Values of tensors
            are only checked in eager mode on the CPU.

    Examples:
        >>> t = torch.tensor([[10, 12, 15, 15]])
        >>> mingru.functional.elapsed_times(t, first=2)
        tensor([[2., 2., 3., 0.]])
        >>> rnn = mingru.MinGRU(3, 8)
        >>> out, h = rnn(torch.randn(1, 4, 3), dt=mingru.functional.elapsed_times(t, first=2) / 2)
        >>> later = torch.tensor([[18, 19]])
        >>> mingru.functional.elapsed_times(later, first=later[:, 0] - t[:, -1])
        tensor([[3., 1.]])
    """
    name, letters = "elapsed_times", "(B, S)" if batch_first else "(S, B)"
    check_flag(name, "batch_first", batch_first)
    remedy = instead_of_a_tensor("t", t)[1]
    remedy += "; convert numpy.datetime64 with .astype('int64') before" * hasattr(t, "__array__")
    require(name, "t", isinstance(t, Tensor), f"a tensor {letters}", type(t).__name__, remedy, TypeError)
    is_valid = not t.is_complex() and t.dtype != torch.bool
    require(name, "t", is_valid, "of a floating-point or integer dtype", str(t.dtype), error=TypeError)
    if t.dim() != 2:
        raise ValueError(expectation(name, "t", letters, dims(t.shape)))
    table = ELAPSED_TIMES.table(batch_first)
    check_given(ELAPSED_TIMES, table, t, t.shape, "mingru", reset=reset, lengths=lengths)
    if not batch_first:
        t, reset = t.t(), None if reset is None else reset.t()
    batch, steps = t.shape
    # Narrow integers could not hold the differences.
    t = t if t.is_floating_point() else t.long()
    between = t - t.roll(1, 1)
    between = between if t.is_floating_point() else between.to(torch.get_default_dtype())
    if not isinstance(first, Tensor):
        check_number(name, "first", first, "a number of at least 0, or a tensor (B,)", lambda time: time >= 0)
        before = torch.full((batch, 1), first, dtype=between.dtype, device=t.device)
    else:
        before = first.to(between.dtype)
        table["first"].check(ELAPSED_TIMES, before, between, between.shape)
        before = before.unsqueeze(1)
    starts = (torch.arange(steps, device=t.device) == 0).expand(batch, steps)
    starts = starts if reset is None else starts | reset
    dt = torch.where(starts, before, between)
    if lengths is not None:
        dt = dt.masked_fill(padding_of(lengths, dt), 0.0)
    # On a GPU, the test would synchronize.
    if dt.is_cpu and are_eager(dt):
        if t.dtype == torch.float32 and (t.abs() > 2**24).any():
            warnings.warn(f"{name}: float32 rounds times above 2**24; use float64 or int64", stacklevel=2)
        _check_elapsed(name, dt, t, starts, batch_first)
    return dt if batch_first else dt.t()


def _check_elapsed(name: str, dt: Tensor, t: Tensor, starts: Tensor, batch_first: bool) -> None:
    """Raise an error for the first time that is negative or NaN."""
    for index, step in (~(dt >= 0)).nonzero().tolist()[:1]:
        got = f"{dt[index, step].item()} for sequence {index}"
        require(name, "first", not starts[index, step], "at least 0", got)
        place = f"[{index}, {step}]" if batch_first else f"[{step}, {index}]"
        got = f"{t[index, step].item()} after {t[index, step - 1].item()} at t{place}"
        remedy = "sort the observations; for padding pass lengths, for concatenated sequences reset"
        raise ValueError(expectation(name, "t", "times that do not decrease", got, remedy))


def reset_from_lengths(lengths: Tensor, num_steps: int | None = None) -> Tensor:
    """Return the reset mask for sequences that are concatenated along time.

        reset_t = True if t = lengths_0 + ... + lengths_{n-1} for an n from 0 to N

    With this mask, one long sequence gives the results of N sequences of different lengths, in both directions and
    without padding.

    Args:
        lengths: Number of steps of each sequence, (N,); integers, at least 1.
        num_steps: Total number of steps S, at least the sum of `lengths`. Default: the sum. The first step after the
            last sequence is a reset too, so that padding cannot influence this sequence in the reverse direction.

    Returns:
        Boolean mask, (1, S), on the device of `lengths`: the argument `reset` of a layer, `mingru`, `minlstm` or
        `linear_scan`. On a GPU, the call synchronizes with the host.

    Raises:
        TypeError: `lengths` is not an integer tensor, or `num_steps` is not an int.
        ValueError: `lengths` has another shape or a value below 1, or `num_steps` is below the sum.

    Examples:
        >>> sequences = [torch.randn(length, 3) for length in (2, 1, 3)]
        >>> reset = mingru.functional.reset_from_lengths(torch.tensor([2, 1, 3]))
        >>> reset
        tensor([[ True, False,  True,  True, False, False]])
        >>> rnn = mingru.MinGRU(3, 8, bidirectional=True)
        >>> out, h = rnn(torch.cat(sequences).unsqueeze(0), reset=reset)
        >>> torch.testing.assert_close(out[:, 3:], rnn(sequences[2].unsqueeze(0))[0])
    """
    name = "reset_from_lengths"
    table, count = RESET_FROM_LENGTHS.table(), lengths.numel() if isinstance(lengths, Tensor) else 0
    table["lengths"].check(RESET_FROM_LENGTHS, lengths, lengths, (count,))
    require(name, "lengths", bool((lengths >= 1).all()), "at least 1 each", str(lengths.tolist()))
    total = int(lengths.sum())
    num_steps = total if num_steps is None else num_steps
    check_int(name, "num_steps", num_steps, least=0)
    require(name, "num_steps", num_steps >= total, f"at least {total}, the sum of lengths", str(num_steps))
    # One more element, for the reset after the last sequence.
    reset = torch.zeros(1, num_steps + 1, dtype=torch.bool, device=lengths.device)
    reset[0, lengths.cumsum(0) - lengths] = True
    reset[0, total] = True
    return reset[:, :num_steps]


@torch.no_grad()
def check_resets(rnn: Callable[..., Any], x: Tensor, h: object, reset: Tensor, out: Tensor) -> None:
    """Raise an error unless one pass over a stored rollout, with its reset flags, gives the outputs of the rollout.

    The error says what is wrong with the flags: one step early or late, inverted, or not used in the rollout. Call this
    function once, after the first rollout of a program and before its first update.

    Args:
        rnn: Layer, or a function that returns the output first. It is called as `rnn(x, h, reset=...)`, and must be as
            it was in the rollout, without dropout. Time is dimension 1, or 0 if `rnn.batch_first` is False.
        x: Stored observations, (B, S, *).
        h: State before the rollout, as `rnn` takes it, or None.
        reset: Stored flags, (B, S), bool. True somewhere after the first step.
        out: Outputs of the rollout, (B, S, *), computed one step at a time.

    Raises:
        TypeError: `reset` is not a bool tensor.
        ValueError: A shape is wrong, no episode begins after the first step, or the pass gives other outputs.

    Examples:
        >>> rnn, x, done = mingru.MinGRU(3, 8), torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool)
        >>> done[:, 2] = True  # the action of step 2 ended an episode
        >>> rollout, _ = rnn(x, reset=done.roll(1, 1))
        >>> mingru.functional.check_resets(rnn, x, None, done, rollout)
        Traceback (most recent call last):
        ...
        ValueError: check_resets: reset must be True where an observation is the first of an episode, got flags one step
        early; pass reset[t] = flags[t - 1]
    """
    name, time = "check_resets", 1 if getattr(rnn, "batch_first", True) else 0
    CHECK_RESETS.table(time == 1)["reset"].check(CHECK_RESETS, reset, x, x.shape)
    expected, remedy = "True somewhere after the first step", "pass a rollout in which episodes begin"
    has_starts = bool(reset.narrow(time, 1, reset.shape[time] - 1).any())
    require(name, "reset", has_starts, expected, "no such flag", remedy)

    def errors(flags: Tensor) -> Tensor:
        """Return the largest error in each sequence."""
        found: Tensor = rnn(x, h, reset=flags)[0]
        expected = f"of the shape of a pass, {dims(found.shape)}"
        require(name, "out", found.shape == out.shape, expected, dims(out.shape))
        return (found - out).abs().movedim(1 - time, 0).flatten(1).amax(1)

    def fits(flags: Tensor, unknown: int) -> bool:
        """Return whether the flags reproduce each sequence, with one of both values at the unknown step."""
        step = torch.tensor([unknown], device=flags.device)
        tried = [errors(flags.index_fill(time, step, value)) for value in (False, True)]
        return bool((torch.minimum(*tried) <= tolerance).all())

    tolerance = torch.finfo(out.dtype).eps ** 0.5 * out.abs().max()
    if (errors(reset) <= tolerance).all():
        return
    causes = [
        ("flags one step early; pass reset[t] = flags[t - 1]", reset.roll(1, time), 0),
        ("flags one step late; pass reset[t] = flags[t + 1]", reset.roll(-1, time), reset.shape[time] - 1),
        ("inverted flags; pass ~reset", ~reset, 0),
        ("a rollout without resets; pass each step its flags there too", torch.zeros_like(reset), 0),
    ]
    unknown = "flags that do not reproduce the rollout; check h, and that rnn has not changed and has no dropout"
    got = next((cause for cause, flags, step in causes if fits(flags, step)), unknown)
    raise ValueError(expectation(name, "reset", "True where an observation is the first of an episode", got))
