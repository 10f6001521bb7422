"""Checks of the numbers in tensors, and warnings of elapsed times that are probably a mistake."""

import functools
import math
import warnings

import torch
from torch import Tensor

from .values import expectation, level_of_the_caller


def check_range(name: str, argument: str, values: Tensor, most: float, expected: str) -> float:
    """Raise an error for the first value that is not from 0 to `most`; otherwise return the largest."""
    if values.numel() == 0:
        return 0.0
    least, largest = (each.item() for each in torch.aminmax(values))
    if not (least >= 0 and largest <= most):
        wrong = values[~((values >= 0) & (values <= most))]
        raise ValueError(expectation(name, argument, expected, str(wrong[0].item())))
    return largest


# Above it, an elapsed time is probably in another unit, such as nanoseconds. Also in csrc/inference.cpp.
MOST_USUAL_TIME = 1e6
# Gaps of so many steps in a row do not increase by chance.
LEAST_INCREASES = 7
# What has been called with more steps. Only the first such call tests for increases, which takes time.
_WITH_LONG_SEQUENCES: set[str] = set()


def check_times(name: str, dt: Tensor, time: int | None) -> None:
    """Check the values of elapsed times; `time` is the dimension of the steps, or None for one step."""
    # A checkpoint counts what is saved for backward, and not each call is checked for increases.
    dt = dt.detach()
    most = check_range(name, "dt", dt, math.inf, "at least 0")
    num_steps = 1 if time is None else dt.shape[time]
    is_new = name not in _WITH_LONG_SEQUENCES and num_steps > LEAST_INCREASES
    # Two events of a stream may have one time.
    if is_new or most > MOST_USUAL_TIME or (most == 0 and num_steps > 1):
        _check_usual(name, dt, time if is_new else None, most)


def _check_usual(name: str, dt: Tensor, time: int | None, most: float) -> None:
    """Warn once of elapsed times that look like a mistake; `most` is the largest, `time` the dimension of time."""
    if most == 0:
        _warn_once(name, "0 at all steps, which ignores x; pass the time between two steps")
    elif MOST_USUAL_TIME < dt[dt > 0].min() < math.inf:
        _warn_once(name, f"above {MOST_USUAL_TIME:g} at all steps, which erases the state; divide dt by a typical gap")
    elif time is not None:
        increases, later = dt.diff(dim=time) > 0, dt.narrow(time, 1, dt.shape[time] - 1)
        # 0 is padding.
        if increases.sum() >= LEAST_INCREASES and (increases | (later == 0)).all():
            _warn_once(name, "increasing at all steps, as times are; use mingru.functional.elapsed_times")
    if time is not None:
        _WITH_LONG_SEQUENCES.add(name)


@functools.cache
def _warn_once(name: str, problem: str) -> None:
    warnings.warn(f"{name}: dt is {problem}", RuntimeWarning, stacklevel=level_of_the_caller())
