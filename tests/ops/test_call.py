"""A call is passed on with all its fields, so that no option is lost before a kernel."""

import torch

from mingru.ops.call import Call, Layout, Start, call_of, flattened, from_flat, spec_of, with_steps

SPEC = spec_of("mingru", "tanh", True, 0.25)
START = Start(*(torch.tensor(number) for number in range(len(Start._fields))))
LAYOUT = Layout(True, *(torch.tensor(number) for number in range(len(Layout._fields) - 1)))


def test_as_tuples():
    call = Call(SPEC, [torch.ones(2)], START, LAYOUT)
    assert call_of(*(part if type(part) is list else tuple(part) for part in call)) == call


def test_as_a_list():
    given = [*flattened(START, LAYOUT), "more"]
    assert from_flat(SPEC, given, time_first=True) == (SPEC, ["more"], START, LAYOUT)


def test_with_other_steps():
    reset, dt = torch.tensor(7), torch.tensor(8)
    assert with_steps(START, reset, dt) == START._replace(reset=reset, dt=dt)
