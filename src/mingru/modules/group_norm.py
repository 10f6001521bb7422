"""Group normalization with a number of groups that can be changed after construction."""

from typing import Any

import torch
from torch import Tensor, nn

from ..check.values import check_int, require
from .saved import Saved, take_groups


class GroupNorm(Saved, nn.GroupNorm):
    """Apply `torch.nn.GroupNorm`. After `regroup`, the state_dict contains the number of groups, as `groups`.

    The weights fit any number of groups. Without `groups`, weights trained with one number would load without an
    error into a module with another number, and its outputs would be wrong.
    """

    _marks, _loading = ("groups",), (take_groups,)
    groups: Tensor | None

    def __init__(self, num_groups: int, num_channels: int, **factory: Any) -> None:
        super().__init__(num_groups, num_channels, **factory)
        self.register_buffer("groups", None)

    def _said(self) -> dict[str, object]:
        return {"groups": self.num_groups}

    def regroup(self, num_groups: int) -> None:
        """Change the number of groups."""
        check_int("GroupNorm", "num_groups", num_groups)
        expected = f"a divisor of the number of channels, {self.num_channels}"
        require("GroupNorm", "num_groups", self.num_channels % num_groups == 0, expected, str(num_groups))
        self.num_groups = num_groups
        self.groups = torch.tensor(num_groups, device=self.weight.device)
