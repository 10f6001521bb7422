"""What a recurrence call is: what is computed, what it starts from, and how its steps lie in memory.

NamedTuples without methods, because TorchScript compiles the functions that pass them on. An optional field must be
read into a local before it is compared with None. All of it scripts.
"""

from typing import NamedTuple

from torch import Tensor


class Spec(NamedTuple):
    """What is computed."""

    cell: str
    """One of `cells.NUM_INPUTS`."""
    activation: str
    """Activation of the candidate, one of `activation.ACTIVATIONS`."""
    reverse: bool
    """Whether the scan runs from the last step to the first."""


class Start(NamedTuple):
    """What the scan starts from, and starts from again."""

    h: Tensor
    """State before the first step, (B, 1, *)."""
    initial_state: Tensor
    """State after a reset, before that step consumes its input; expands to (B, 1, *)."""
    reset: Tensor | None
    """bool, the leading dimensions of the sequences."""


class Layout(NamedTuple):
    """How the steps of a sequence lie in memory: (B, S, *), (S, B, *) if `time_first`, or packed, (rows, *)."""

    time_first: bool
    batch_sizes: Tensor | None
    """(S), int64, on the CPU: the sequences are packed as `torch.nn.utils.rnn.PackedSequence` packs them."""
    padding: Tensor | None
    """(B, S) or (S, B) bool: the steps that do not exist. They keep the state."""


BATCH_FIRST = Layout(False, None, None)
