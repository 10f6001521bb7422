"""A call is passed on with all its fields, so that no option is lost before a kernel; wrong calls are refused."""

import math
import re

import torch
from refusals import assert_refused

from mingru import functional
from mingru.ops.call import Call, Layout, Spec, Start, call_of, flattened, from_flat, with_steps

SPEC = Spec("mingru", "tanh", True, 0.25)
START = Start(*(torch.tensor(number) for number in range(len(Start._fields))))
LAYOUT = Layout(True, *(torch.tensor(number) for number in range(len(Layout._fields) - 1)))


def test_as_tuples():
    call = Call(SPEC, [torch.ones(2)], START, LAYOUT)
    assert call_of(*(part if type(part) is list else tuple(part) for part in call)) == call


def test_as_a_list():
    given = [*flattened(START, LAYOUT), "more"]
    assert from_flat(given, time_first=True) == (START, LAYOUT, ["more"])


def test_with_other_steps():
    reset, dt = torch.tensor(7), torch.tensor(8)
    assert with_steps(START, reset, dt) == START._replace(reset=reset, dt=dt)


X, DT = torch.zeros(2, 5, 4), torch.ones(2, 5)
OF_MINGRU = [
    ({"kind": "tanh"}, "kind must be one of ('sigmoid', 'signed', 'rotation', 'quaternion'), got 'tanh'"),
    ({"kind": ["signed"]}, "kind must be one of ('sigmoid', 'signed', 'rotation', 'quaternion'), got ['signed']"),
    ({"kind": "signed", "angle": X}, "angle must be None because kind is 'signed', got Tensor; pass kind='rotation'"),
    (
        {"gate": X[..., :3], "kind": "quaternion"},
        "gate must be (B, S, H, *) with H divisible by 4 because kind is 'quaternion', got (2, 5, 3)",
    ),
    ({"kind": "rotation"}, "angle must be a tensor like gate because kind is 'rotation', got None"),
    ({"kind": "rotation", "angle": X[:, :4]}, "angle must be (2, 5, 4) because gate is (2, 5, 4), got (2, 4, 4)"),
    ({"kind": "rotation", "angle": X}, "candidate must be (2, 5, 8) because gate is (2, 5, 4), got (2, 5, 4)"),
    ({"kind": "rotation", "angle": X.double()}, "angle must be torch.float32 like gate"),
    (
        {"gate": X[..., 0], "kind": "rotation", "angle": X[..., 0]},
        "gate must be (B, S, H / 2, *) because kind is 'rotation', got (2, 5)",
    ),
    ({"kind": "signed", "dt": DT}, "dt must be None because the gate is 'signed'"),
    ({"kind": "signed", "min_decay": 0.5}, "min_decay must be 0 because"),
    ({"min_decay": 1.0}, "min_decay must be a number from 0 to 1"),
]
OF_BOTH = [
    ({"dt": 1.0}, "dt must be a tensor"),
    ({"dt": DT.t()}, "dt must be (B, S) = (2, 5), got (5, 2)"),
    ({"dt": -DT}, "dt must be at least 0, got -1.0"),
    ({"dt": math.nan * DT}, "dt must be at least 0, got nan"),
]


def test_errors():
    def cases(name, table):
        of_types = ("like gate", "like forget", "must be a tensor, got", "must be a tensor")
        return {
            text: (given, TypeError if text.endswith(of_types) else ValueError, re.escape(f"{name}: {text}"))
            for given, text in table
        }

    def of_dtype(like):
        return {"dt": DT.long()}, f"dt must be torch.float32 like {like}"

    of_mingru = cases("mingru", [*OF_MINGRU, *OF_BOTH, of_dtype("gate")])
    assert_refused(lambda **given: functional.mingru(**{"gate": X, "candidate": X, **given}), of_mingru)
    of_minlstm = cases("minlstm", [*OF_BOTH, of_dtype("forget")])
    assert_refused(lambda **given: functional.minlstm(X, X, X, **given), of_minlstm)
