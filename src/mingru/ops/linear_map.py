"""Modules that compute a linear map, which kernels include."""

from typing import Any

from torch import nn


class WeightAndBias(nn.Module):
    """Compute what `torch.nn.Linear` computes.

    Programs that initialize each `nn.Linear` of a model do not find this module. Neither do those that look for classes
    with "Linear" in their names.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        vars(self).update(vars(nn.Linear(*args, **kwargs)))

    forward = nn.Linear.forward
    reset_parameters = nn.Linear.reset_parameters
    extra_repr = nn.Linear.extra_repr


LINEAR_MAPS = (nn.Linear, WeightAndBias)
