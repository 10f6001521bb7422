"""Group normalization with a number of groups that can be changed after construction."""

from typing import Any

import torch
from torch import Tensor, nn

from ..check.values import check_int, require


class GroupNorm(nn.GroupNorm):
    """Apply `torch.nn.GroupNorm`. After `regroup`, the state_dict contains the number of groups, as `groups`.

    The weights fit any number of groups. Without `groups`, weights trained with one number would load without an
    error into a module with another number, and its outputs would be wrong.
    """

    groups: Tensor | None

    def __init__(self, num_groups: int, num_channels: int, **factory: Any) -> None:
        super().__init__(num_groups, num_channels, **factory)
        self.register_buffer("groups", None)

    def regroup(self, num_groups: int) -> None:
        """Change the number of groups."""
        check_int("GroupNorm", "num_groups", num_groups)
        expected = f"a divisor of the number of channels, {self.num_channels}"
        require("GroupNorm", "num_groups", self.num_channels % num_groups == 0, expected, str(num_groups))
        self.num_groups = num_groups
        self.groups = torch.tensor(num_groups, device=self.weight.device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.groups is not None:
            # The buffer is undefined after `to_empty`.
            destination[prefix + "groups"] = torch.full_like(self.groups, self.num_groups)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        groups = state_dict.get(prefix + "groups")
        if groups is not None:
            self.regroup(int(groups))
        super()._load_from_state_dict(state_dict, prefix, *args)
