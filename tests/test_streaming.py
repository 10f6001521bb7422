"""Many sessions in one tensor of states: each as if it were alone."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import ROWS, parametrized, some
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map

import mingru
from mingru.models import Block, LanguageModel
from mingru.streaming import Sessions

MODELS = {
    "MinGRU": lambda: mingru.MinGRU(3, 8, 2, residual=True, learn_initial_state=True),
    "Stack": lambda: mingru.Stack([mingru.MinLSTM(3, 5), Block(5, conv=4, mlp=2)]),
    "LanguageModel": lambda: LanguageModel(11, 8, 2, conv=3),
    "drop_in.LSTMLike": lambda: mingru.drop_in.LSTMLike(3, 8, batch_first=True, cell="minlstm"),
}


def inputs(model, *leading):
    return torch.randint(11, leading) if isinstance(model, LanguageModel) else torch.randn(*leading, 3)


def joined(states):
    """The state of a batch, from those of its sequences."""
    return tree_map(lambda *each: torch.cat(each, 1), *states)


@pytest.mark.parametrize("name", MODELS)
def test_many_sessions(name):
    """The bits are those of a call with the states of the sessions, and the values those of each session alone.

    The bits of a session alone may be others, because products round by the size of the batch.
    """
    draw, model = random.Random(0), MODELS[name]().eval()
    sessions, held, alone, opened = Sessions(model, 40), {}, {}, 0
    while opened < (1000 if name == "MinGRU" else 200):
        while len(held) < 40 and draw.random() < 0.9:
            slot, opened = sessions.open(), opened + 1
            held[slot] = model.initial(1)
            # Only some, because a call for one session takes as long as one for many.
            alone[slot] = held[slot] if opened % 8 == 0 else None
        slots = draw.sample(sorted(held), draw.randint(1, len(held)))
        steps, num_padded = draw.randint(1, 4), draw.randint(0, 2)
        x = inputs(model, len(slots) + num_padded, steps)
        lengths = torch.tensor([draw.randint(0, steps) for _ in x])
        given = {"lengths": lengths} if draw.random() < 0.5 else {}
        named = [*slots, *[-1] * num_padded]
        out = sessions.step(x, torch.tensor(named) if given else named, **given)
        with torch.no_grad():
            states = joined([*(held[slot] for slot in slots), *[model.initial(1)] * num_padded])
            expected, after = model(x, states, **given)
            assert torch.equal(out[: len(slots)], expected[: len(slots)])
            for row, slot in enumerate(slots):
                held[slot] = tree_map(lambda each, row=row: each[:, row : row + 1], after)
                length = lengths[row] if given else steps
                if length > 0 and alone[slot] is not None:
                    one, alone[slot] = model(x[row : row + 1, :length], alone[slot])
                    assert_close(out[row, :length], one[0])
        for slot in draw.sample(slots, len(slots) // 3):
            snapshot = sessions.snapshot(slot)
            sessions.close(slot)
            states, one = held.pop(slot), alone.pop(slot)
            assert torch.equal(snapshot, torch.cat([each.flatten() for each in tree_leaves(states)]))
            if draw.random() < 0.5:
                again = sessions.restore(snapshot)
                held[again], alone[again] = states, one


def test_other_sessions_keep_their_states_also_after_an_error():
    model = MODELS["MinGRU"]().eval()
    with torch.inference_mode():
        sessions = Sessions(model, 3)
    slots = [sessions.open() for _ in range(3)]
    sessions.step(torch.randn(3, 5, 3), slots)
    before = [sessions.snapshot(slot) for slot in slots]
    for wrong in ({"slots": [0, 0]}, {"slots": [0, 3]}, {"x": torch.randn(2, 5, 4)}):
        with pytest.raises(ValueError, match=r"slots must be|x must be"):
            sessions.step(**{"x": torch.randn(2, 5, 3), "slots": [0, 1], **wrong})
    sessions.step(torch.full((2, 5, 3), torch.nan), [1, -1])
    after = [sessions.snapshot(slot) for slot in slots]
    assert after[1].isnan().all() and torch.equal(after[0], before[0]) and torch.equal(after[2], before[2])
    sessions.close(1)
    assert sessions.open() == 1 and torch.equal(sessions.snapshot(1), model.initial(1).flatten())


def test_threads_take_turns():
    model = MODELS["Stack"]().eval()
    sessions, x = Sessions(model, 20), torch.randn(50, 1, 1, 3)
    found = {}

    def run(_):
        slot = sessions.open()
        found[slot] = torch.cat([sessions.step(each, [slot]) for each in x], 1)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(run, range(20)))
    assert sorted(found) == list(range(20))
    for out in found.values():
        assert torch.equal(out, found[0])
    with torch.no_grad():
        assert_close(found[0], model(x.view(1, 50, 3))[0])


def test_a_learned_state_is_copied():
    model, x = MODELS["MinGRU"]().eval(), torch.randn(1, 5, 3)
    sessions, expected, trained = Sessions(model, 2), model(x)[0], model.initial_state.requires_grad_()
    for batch in (1, 2):
        h = model.initial(batch)
        assert h.is_contiguous()
        h.detach_().zero_()
    sessions.restore(torch.zeros(16, requires_grad=True))
    assert trained.requires_grad and torch.equal(model(x)[0], expected)
    assert not any(sessions.snapshot(slot).requires_grad for slot in (0, sessions.open()))


@parametrized(some([row for row in ROWS if "Conv" not in row.name and "images" not in row.name], 3))
def test_initial_states(case):
    """A call from them is one without a state."""
    module, x = case.varied(), case.given(3)["x"]
    h = tree_leaves(module.initial(3))
    assert_close(case.call(module, x, h), case.call(module, x), rtol=0, atol=0)
