"""Many sequences that one process continues step by step, such as the streams of a server."""

import heapq
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .check.values import check_int, check_type, dims, expectation, not_a_tensor, require
from .modules.layer import is_bidirectional

__all__ = ["Sessions"]
States = Tensor | Sequence[Tensor]


class Sessions:
    """Keep the states of many sessions, and continue any of them in one call of the model.

        out_i, state[slot_i] = model(x_i, state[slot_i])

    A session is a slot, an int from 0 to `slots` - 1. The states of all slots are tensors on the device of the
    model, of which a step reads and writes only the entries that it names.

    Args:
        model: A layer or model of this library in eval mode, or a module with the same methods: `initial(batch)`, and
            `forward(x, h, ...)`, which returns the output and the new state. A state is a tensor, or a list of tensors,
            of a fixed size for each sequence.
        slots: Number of slots.

    Raises:
        TypeError: `model` has no `initial`, or an argument has the wrong type.
        ValueError: `model` is bidirectional, a slot is out of range, not open or named twice, all slots are open, or a
            snapshot is of another model. The states are then unchanged.

    Warns:
        UserWarning: `model` is in training mode, in which dropout would change the outputs.

    All methods can be called from several threads; they wait for each other. Two chunks of one session can not be in
    one step, because nothing would say which comes first. NaN in x stays in the state of its session: reject it before.

    Examples:
        >>> from mingru.streaming import Sessions
        >>> rnn = mingru.MinGRU(3, 16, num_layers=2).eval()
        >>> sessions = Sessions(rnn, slots=1000)
        >>> anna, ben = sessions.open(), sessions.open()
        >>> out = sessions.step(torch.randn(2, 5, 3), [anna, ben])  # five steps of both
        >>> out = sessions.step(torch.randn(2, 4, 3), [ben, -1], lengths=torch.tensor([4, 0]))
        >>> torch.save(sessions.snapshot(anna), "anna.pt")  # doctest: +SKIP
        >>> sessions.close(anna)
    """

    def __init__(self, model: nn.Module, slots: int) -> None:
        expected, remedy = "a layer or model with initial(batch)", "give it a method that returns its first state"
        is_known = hasattr(model, "initial") and getattr(model, "role", None) != "step"
        require("Sessions", "model", is_known, expected, type(model).__name__, remedy, TypeError)
        expected = "of one direction, because a reverse direction needs future steps"
        require("Sessions", "model", not is_bidirectional(model), expected, f"a bidirectional {type(model).__name__}")
        check_int("Sessions", "slots", slots)
        if model.training:
            text = "Sessions: the model is in training mode, where dropout is active; call model.eval()"
            warnings.warn(text, stacklevel=2)
        self.model, self.slots = model, slots
        # Not inference tensors, which no step outside of inference mode could change.
        with torch.inference_mode(False):
            self._make_pools()
        self._batch_of_x = 0 if getattr(model, "batch_first", True) else 1
        self._free = list(range(slots))
        self._open: set[int] = set()
        self._lock = threading.RLock()

    def _make_pools(self) -> None:
        initial = self._initial(1)
        self._is_tensor = isinstance(initial, Tensor)
        one, two = _listed(initial), _listed(self._initial(2))
        # The batch is the dimension in which the states of one and of two sessions differ.
        pairs = [zip(x.shape, y.shape, strict=True) for x, y in zip(one, two, strict=True)]
        batch_dims = [[a == b for a, b in sizes].index(False) for sizes in pairs]
        self._device = one[0].device
        # An entry for each slot, and one for the padding.
        index = torch.zeros(self.slots + 1, dtype=torch.int64, device=self._device)
        self._pools = [(x.index_select(dim, index), dim) for x, dim in zip(one, batch_dims, strict=True)]

    def open(self) -> int:
        """Begin a session from the initial state, and return its slot."""
        return self.restore(_flat(_listed(self._initial(1))))

    def close(self, slot: int) -> None:
        """End a session. Its slot is then free."""
        with self._lock:
            self._check_open(slot)
            self._open.remove(slot)
            heapq.heappush(self._free, slot)

    def snapshot(self, slot: int) -> Tensor:
        """Return a copy of the state of a session, as one tensor of one dimension."""
        with self._lock:
            self._check_open(slot)
            return _flat(self._of_slot(slot))

    @torch.no_grad()
    def restore(self, snapshot: Tensor) -> int:
        """Begin a session from a snapshot, and return its slot."""
        check_type("Sessions", "snapshot", snapshot, Tensor, "a tensor that snapshot returned")
        like = _flat(self._of_slot(self.slots))
        if snapshot.shape != like.shape or snapshot.dtype != like.dtype:
            expected, got = (f"{dims(each.shape)} of {each.dtype}" for each in (like, snapshot))
            raise ValueError(expectation("Sessions", "snapshot", f"{expected}, as those of this model", got))
        with self._lock:
            if not self._free:
                raise ValueError(f"Sessions: all {self.slots} slots are open; close one, or make more slots")
            slot = heapq.heappop(self._free)
            self._open.add(slot)
            states = self._of_slot(slot)
            for state, saved in zip(states, torch.split(snapshot, [each.numel() for each in states]), strict=True):
                state.copy_(saved.view(state.shape))
            return slot

    def step(self, x: Tensor, slots: Sequence[int] | Tensor, **given: object) -> Any:
        """Continue sessions by one step or several, without gradients, and return the output of the model.

        Args:
            x: Input of the model, with a sequence of each session.
            slots: Slot of each sequence, ints or an int64 tensor (B,), no two equal. -1 is padding, whose output has
                no meaning.
            **given: Further arguments of the model, such as `lengths` for chunks of different lengths: 0 steps leave a
                session as it is.
        """
        expected = "ints, or an int64 tensor (B,)"
        try:
            # Torch gives an empty list another dtype.
            index = torch.as_tensor(slots if len(slots) > 0 else torch.empty(0, dtype=torch.int64))
        except (RuntimeError, TypeError, ValueError):
            raise TypeError(expectation("Sessions", "slots", expected, repr(slots))) from None
        if index.dtype != torch.int64 or index.dim() != 1:
            raise TypeError(expectation("Sessions", "slots", expected, f"{dims(index.shape)} of {index.dtype}"))
        if not isinstance(x, Tensor):
            raise not_a_tensor("Sessions", "x", x)
        named, batch = index.tolist(), x.shape[self._batch_of_x]
        if len(named) != batch:
            expected = f"{batch} slots, one for each sequence of x"
            raise ValueError(expectation("Sessions", "slots", expected, str(len(named))))
        with self._lock, torch.no_grad():
            self._check(named if -1 not in named else [slot for slot in named if slot != -1])
            if index.device != self._device or -1 in named:
                index = index.to(self._device).remainder(self.slots + 1)  # -1 becomes the last index
            states = [pool.index_select(dim, index) for pool, dim in self._pools]
            out, after = self.model(x, states[0] if self._is_tensor else states, **given)
            for (pool, dim), state in zip(self._pools, _listed(after), strict=True):
                pool.index_copy_(dim, index, state)
        return out

    def _check_open(self, slot: int) -> None:
        check_int("Sessions", "slot", slot, "an int that open returned", least=0)
        self._check([slot])

    def _check(self, slots: Sequence[int]) -> None:
        if not self._open.issuperset(slots):
            wrong = next(slot for slot in slots if slot not in self._open)
            raise ValueError(expectation("Sessions", "slots", "open slots", repr(wrong), "open returns a slot"))
        if len(set(slots)) < len(slots):
            remedy = "pass the chunks of one session one after the other"
            raise ValueError(expectation("Sessions", "slots", "different slots", str([*slots]), remedy))

    @torch.no_grad()
    def _initial(self, batch: int) -> States:
        return self.model.initial(batch)  # type: ignore[operator, no-any-return]

    def _of_slot(self, slot: int) -> list[Tensor]:
        return [pool.select(dim, slot) for pool, dim in self._pools]


def _listed(state: States) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state)


def _flat(states: Sequence[Tensor]) -> Tensor:
    return torch.cat([state.flatten() for state in states])
