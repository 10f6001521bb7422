"""Common idioms, the table in idioms.md: with the classes of mingru.drop_in, each gives what it gives with torch's.

    python tests/test_idioms.py    # writes the results into the table

Two classes agree on an idiom if both return equal values and leave equal gradients, or raise the same type of error.
"""

import copy
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import assert_equal, tensors, through_a_file
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_sequence

import mingru
from mingru import drop_in

# What idioms are written with.
NAMES = {"copy": copy, "pickle": pickle, "F": F, "prune": prune, "parametrizations": parametrizations, "mingru": mingru}
PAGE = Path(__file__).with_name("idioms.md")
# So many steps that the kernels compute them.
S, B, IN, H = 12, 2, 3, 4


class Model(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(H, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def loaded(rnn, allowed=(), weights_only=True):
    with torch.serialization.safe_globals(list(allowed)):
        return through_a_file(rnn, weights_only=weights_only)


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


def outcome(kind, options, code, is_lstm=False):
    """Return what a user would see, a value, "runs" or the type of an error; and all numbers."""
    torch.manual_seed(0)
    h = torch.zeros(1, B, H)
    names = {**globals(), **NAMES, "GRU": kind, "LSTM": kind, "x": torch.randn(S, B, IN), "y": torch.randn(B, IN)}
    names |= {"h": (h, h) if is_lstm else h, "packed": pack_sequence([torch.randn(S, IN), torch.randn(3, IN)])}
    first = "rnn = GRU(IN, H, {}); output, h_n = rnn(x); model = Model(rnn)"
    first = "rnn = cell = GRU(IN, H, {}); h = cell(y)" if issubclass(kind, nn.RNNCellBase) else first
    first = first.replace("h_n", "(h_n, c_n)") if is_lstm else first
    *statements, last = code.split("; ")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(first.format(options), names)
            names["untouched"] = lambda apply, init: same_weights(names["rnn"], lambda: apply(init))
            exec("; ".join(statements), names)
            value = exec(last, names) if " = " in last or "+=" in last else eval(last, names)
    except Exception as error:
        return type(error).__name__, torch.tensor(0)
    text = str(value) if type(value) in (bool, int, str, tuple, torch.Size) else "runs"
    found = value if isinstance(value, (torch.Tensor, list, tuple)) else []
    grads = [each.grad for each in names["rnn"].parameters() if each.grad is not None]
    return text, tensors([names["rnn"].state_dict(), grads, found])


def table():
    """Return the page with the results of all idioms with torch's classes, and the idioms."""
    found = []

    def filled(row):
        kind, options, code = row.groups()
        found.append((kind, options, code))
        text, _ = outcome(getattr(nn, kind), options, code)
        return f"| {kind} | {options and f'`{options}`'} | `{code}` | {text} |"

    page = re.sub(r"(?m)^\| (GRU|GRUCell) \| `?(.*?)`? \| `(.*?)` \| .*$", filled, PAGE.read_text(encoding="utf-8"))
    return page, found


PAGE_NOW, IDIOMS = table()
OF_LSTM = [("LSTM", *row[1:]) for row in IDIOMS if row[0] == "GRU"]


def test_the_table():
    assert PAGE.read_text(encoding="utf-8") == PAGE_NOW, "run python tests/test_idioms.py"


@pytest.mark.parametrize(("kind", "options", "code"), IDIOMS + OF_LSTM)
def test_the_classes_agree(kind, options, code):
    code = code.replace("GRU", kind) if kind == "LSTM" else code
    expected, got = (outcome(getattr(home, kind), options, code, kind == "LSTM") for home in (nn, drop_in))
    assert got[0] == expected[0]
    assert_equal(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("code", "seen"), [("repr(rnn)", "GRU(3, 4)"), ("output", "runs"), ("nothing", "NameError")])
def test_outcomes(code, seen):
    assert outcome(nn.GRU, "", code)[0] == seen


if __name__ == "__main__":
    PAGE.write_text(PAGE_NOW, encoding="utf-8")
