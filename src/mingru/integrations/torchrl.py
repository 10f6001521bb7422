"""Recurrent modules for TorchRL, which compute all trajectories of a batch in one pass."""

from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import drop_in
from . import require

with require("torchrl", "torchrl 0.14", __name__):
    from torchrl.modules import GRUModule, LSTMModule

__all__ = ["MinGRUModule", "MinLSTMModule"]


class _OnePass:
    """Replaces the layers of a module of TorchRL, and its scan with resets."""

    name = "GRU"

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, **options: Any) -> None:
        kind = getattr(drop_in, f"{self.name}Like")
        names = signature(super().__init__).parameters.keys() - signature(kind).parameters.keys()
        of_module = {name: options.pop(name) for name in names & options.keys()}
        layer = kind(
            input_size, hidden_size, num_layers, **{"batch_first": True, "cell": f"min{self.name.lower()}", **options}
        )
        super().__init__(**{self.name.lower(): layer}, **of_module)
        # The form of a call with all its resets. Set here, because the constructor would compile TorchRL's own scan.
        self.recurrent_backend = "scan"


class MinGRUModule(_OnePass, GRUModule):
    """Apply minGRU layers to a tensordict, as TorchRL's `GRUModule` does.

    In recurrent mode, all trajectories in the rows of a batch are computed in one call. The state before a step with
    `is_init` is 0. As in TorchRL, the state after the last step of a trajectory is written at that step; elsewhere, 0
    is written.

    Args:
        input_size: Number of input features.
        hidden_size: Number of state features.
        num_layers: Number of layers.
        **options: Arguments of TorchRL's module: `in_key` or `in_keys`, such as ["observation", "state"], `out_key` or
            `out_keys`, such as ["features", ("next", "state")], and `default_recurrent_mode`. `recurrent_backend`,
            and what else chooses among TorchRL's own computations, has no effect. Others are options of
            `mingru.drop_in.GRULike`, such as `candidate="tanh"`.

    Examples:
        >>> from tensordict import TensorDict  # doctest: +SKIP
        >>> module = MinGRUModule(3, 8, in_keys=["obs", "h"], out_keys=["y", ("next", "h")])  # doctest: +SKIP
        >>> data = TensorDict({"obs": torch.randn(2, 3), "is_init": torch.ones(2, 1).bool()}, [2])  # doctest: +SKIP
        >>> module(data)["y"].shape  # doctest: +SKIP
        torch.Size([2, 8])

    References:
        TorchRL 0.14, `torchrl/modules/tensordict_module/rnn.py`.
    """

    def _gru_scan_with_resets(
        self, input: Tensor, hidden_in: Tensor, hidden: Tensor, is_init: Tensor
    ) -> tuple[Tensor, ...]:
        return _in_one_pass(self.gru, input, (hidden,), is_init)


class MinLSTMModule(_OnePass, LSTMModule):
    """Apply minLSTM layers to a tensordict, as TorchRL's `LSTMModule` does; see `MinGRUModule`.

    The keys are those of the input and of the two states. `options` are arguments of `mingru.drop_in.LSTMLike`.
    """

    name = "LSTM"

    def _lstm_scan_with_resets(
        self, input: Tensor, hidden0_in: Tensor, hidden1_in: Tensor, hidden: tuple[Tensor, Tensor], is_init: Tensor
    ) -> tuple[Tensor, ...]:
        return _in_one_pass(self.lstm, input, hidden, is_init)


def _in_one_pass(rnn: Any, x: Tensor, h: tuple[Tensor, ...], is_init: Tensor) -> tuple[Tensor, ...]:
    """Return the outputs (B, S, *), and the states (B, S, L, H) at the last step of each trajectory, 0 elsewhere.

    h (L, B, H) is the state of each row.
    """
    batch, num_steps = is_init.shape
    if rnn.num_layers == 1 and not (rnn.residual or rnn.proj_size or rnn.bidirectional or rnn.learn_initial_state):
        # The output is the state, and a reset sets it to 0.
        y, _ = rnn(x, h if len(h) > 1 else h[0], reset=is_init)
        goes_on = F.pad(~is_init[:, 1:], (0, 1)).unsqueeze(2)
        return y, *(y.masked_fill(goes_on, 0.0).unsqueeze(2) for _ in h)
    # The trajectories are packed, so that the layer returns the last states of all.
    begins = is_init.clone()
    begins[:, 0] = True
    starts = begins.flatten().nonzero().squeeze(1)
    lengths = starts.diff(append=starts.new_tensor([batch * num_steps]))
    lengths, order = lengths.sort(descending=True, stable=True)
    starts = starts[order]
    steps = torch.arange(int(lengths[0]), device=x.device).unsqueeze(1)
    index = (starts + steps)[steps < lengths]
    packed = PackedSequence(x.flatten(0, 1).index_select(0, index), (steps < lengths).sum(1).cpu())
    is_new = is_init.flatten()[starts].unsqueeze(1)
    begin = tuple(each[:, starts // num_steps].masked_fill(is_new, 0.0) for each in h)
    out, last = rnn(packed, begin if len(begin) > 1 else begin[0])
    y = torch.zeros_like(out.data).index_copy(0, index, out.data)
    states = []
    for state in (last,) if isinstance(last, Tensor) else last:
        by_trajectory = state.transpose(0, 1)
        everywhere = by_trajectory.new_zeros(batch * num_steps, *by_trajectory.shape[1:])
        states.append(everywhere.index_copy(0, starts + lengths - 1, by_trajectory))
    return tuple(torch.unflatten(each, 0, (batch, num_steps)) for each in (y, *states))
