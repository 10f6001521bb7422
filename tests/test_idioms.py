"""Common idioms with nn.GRU and nn.GRUCell and with mingru.drop_in: the table in idioms.md, which has the code too.

    python tests/test_idioms.py    # writes the results into the table

Two classes agree on an idiom if both return equal values or both raise the same type of error.
"""

import copy
import io
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_sequence

import mingru
from mingru import drop_in

# What idioms are written with.
NAMES = {"copy": copy, "pickle": pickle, "F": F, "prune": prune, "parametrizations": parametrizations, "mingru": mingru}
PAGE = Path(__file__).with_name("idioms.md")
GUIDE = Path(__file__).parents[1] / "docs" / "coming_from_gru.md"
S, B, IN, H = 5, 2, 3, 4


class Model(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(H, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def loaded(rnn, allowed=(), weights_only=True):
    file = io.BytesIO()
    torch.save(rnn, file)
    file.seek(0)
    with torch.serialization.safe_globals(list(allowed)):
        return torch.load(file, weights_only=weights_only)


def init(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        module.bias.data.zero_()


def stacked(rnn):
    return torch.func.stack_module_state([rnn, type(rnn)(IN, H)])[0]


def of_transformers(module):
    """As `PreTrainedModel._init_weights` of many models, and fairseq's `init_bert_params`."""
    if isinstance(module, nn.Linear):
        module.weight.data.normal_(0.0, 0.02)
        if module.bias is not None:
            module.bias.data.zero_()
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.weight.data.fill_(1.0)


def same_weights(rnn, function):
    before = copy.deepcopy(rnn)
    function()
    return all(torch.equal(*pair) for pair in zip(before.parameters(), rnn.parameters(), strict=True))


def outcome(kind, options, code):
    """Return what a user would see: a value, "runs", or the type of an error."""
    torch.manual_seed(0)
    names = (
        globals()
        | NAMES
        | {"GRU": kind, "x": torch.randn(S, B, IN), "y": torch.randn(B, IN), "h": torch.zeros(1, B, H)}
    )
    names["packed"] = pack_sequence([torch.randn(5, IN), torch.randn(3, IN)])
    first = "rnn = GRU(IN, H, {}); output, h_n = rnn(x); model = Model(rnn)"
    first = "cell = GRU(IN, H, {}); h = cell(y)" if issubclass(kind, nn.RNNCellBase | drop_in.GRUCell) else first
    *statements, last = code.split("; ")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(first.format(options), names)
            names["untouched"] = lambda apply, init: same_weights(names["rnn"], lambda: apply(init))
            exec("; ".join(statements), names)
            value = exec(last, names) if " = " in last or "+=" in last else eval(last, names)
    except Exception as error:
        return type(error).__name__
    return str(value) if type(value) in (bool, int, str, tuple, torch.Size) else "runs"


def table():
    """Return the page with the results of all idioms, and the sentence that counts those that agree."""
    agree = []

    def filled(row):
        kind, options, code = row.groups()
        results = [outcome(getattr(home, kind), options, code) for home in (nn, drop_in)]
        agree.append(results[0] == results[1])
        return f"| {kind} | {options and f'`{options}`'} | `{code}` | {' | '.join(results)} |"

    page = re.sub(r"(?m)^\| (GRU|GRUCell) \| `?(.*?)`? \| `(.*?)` \| .*$", filled, PAGE.read_text(encoding="utf-8"))
    count = f"Of {len(agree)} idioms, {sum(agree)} give the same result with both classes."
    return re.sub(r"(?m)^Of .*$", count, page), count


def test_the_table_and_the_guide():
    page, count = table()
    assert page == PAGE.read_text(encoding="utf-8"), "run python tests/test_idioms.py"
    assert count in " ".join(GUIDE.read_text(encoding="utf-8").split())


@pytest.mark.parametrize(("code", "seen"), [("repr(rnn)", "GRU(3, 4)"), ("output", "runs"), ("nothing", "NameError")])
def test_outcomes(code, seen):
    assert outcome(nn.GRU, "", code) == seen


if __name__ == "__main__":
    PAGE.write_text(table()[0], encoding="utf-8")
