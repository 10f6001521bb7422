"""Common idioms, the table in idioms.md: with the classes of mingru.drop_in, each gives what it gives with torch's.

    python tests/test_idioms.py    # writes the results into the table

Two classes agree on an idiom if both return equal values and leave equal gradients, or raise the same type of error.
Each idiom runs time first and batch first, of a GRU and of an LSTM, in float32 and in float64, and by the kernels.
"""

import copy
import pickle
import re
import warnings
from functools import partial
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
from mingru.ops import autograd
from mingru.ops.backends import native

# What idioms are written with.
NAMES = {"copy": copy, "pickle": pickle, "F": F, "prune": prune, "parametrizations": parametrizations, "mingru": mingru}
PAGE = Path(__file__).with_name("idioms.md")
# So many steps and inputs that the kernels compute them.
S, B, IN, H = 40, 2, 8, 4
DTYPES = [torch.float32, torch.float64]
# The columns of an idiom, by its class.
COLUMNS = {
    "GRUCell": [("GRUCell", False)],
    "GRU": [(kind, first) for kind in ("GRU", "LSTM") for first in (False, True)],
}


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


def outcome(kind, options, code, is_batch_first=False, dtype=torch.float32):
    """Return what a user would see, a value, "runs" or the type of an error; and all numbers."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_default_dtype(dtype)
        try:
            return outcome_of(kind, [options] * (options != "") + ["batch_first=True"] * is_batch_first, code)
        except Exception as error:
            return type(error).__name__, torch.tensor(0)
        finally:
            torch.set_default_dtype(torch.float32)


def outcome_of(kind, options, code):
    is_lstm, x, h = issubclass(kind, nn.LSTM), torch.randn(S, B, IN), torch.zeros(1, B, H)
    names = {**globals(), **NAMES, "GRU": kind, "LSTM": kind, "y": torch.randn(B, IN)}
    names["x"] = x.transpose(0, 1).contiguous() if "batch_first=True" in options else x
    names |= {"h": (h, h.clone()) if is_lstm else h, "packed": pack_sequence([torch.randn(S, IN), torch.randn(3, IN)])}
    first = "rnn = GRU({}); output, h_n = rnn(x); model = Model(rnn)"
    first = "rnn = cell = GRU({}); h = cell(y)" if issubclass(kind, nn.RNNCellBase) else first
    first = first.replace("h_n", "(h_n, c_n)") if is_lstm else first
    *statements, last = code.split("; ")
    exec(first.format(", ".join(["IN, H", *options])), names)
    names["untouched"] = lambda apply, init: same_weights(names["rnn"], lambda: apply(init))
    exec("; ".join(statements), names)
    value = exec(last, names) if re.search(r" [-+*]?= ", last) else eval(last, names)
    is_text = type(value) in (bool, int, str, tuple, torch.Size) and not tensors(value)
    text = str(value) if is_text else "runs"
    found = value if isinstance(value, (torch.Tensor, list, tuple)) else []
    grads = [each.grad for each in names["rnn"].parameters() if each.grad is not None]
    return text, tensors([names["rnn"].state_dict(), grads, found])


def table():
    """Return the page with the results of all idioms with torch's classes, and the rows of tests."""
    found = []

    def filled(row):
        name, options, code = row.groups()
        rows = [(*column, options, code.replace(name, column[0])) for column in COLUMNS[name]]
        texts = [outcome(getattr(nn, kind), options, code, first)[0] for kind, first, _, code in rows]
        found.extend(rows)
        texts = texts[:1] if len({*texts}) == 1 else texts
        return f"| {name} | {options and f'`{options}`'} | `{code}` | {', '.join(texts)} |"

    page = re.sub(r"(?m)^\| (GRU|GRUCell) \| `?(.*?)`? \| `(.*?)` \| .*$", filled, PAGE.read_text(encoding="utf-8"))
    return page, found


PAGE_NOW, ROWS = table()


def test_the_table():
    assert PAGE.read_text(encoding="utf-8") == PAGE_NOW, "run python tests/test_idioms.py"


@pytest.fixture
def calls(monkeypatch):
    """The calls of kernels, on any processor."""
    found, kernel = [], autograd.run_kernel
    monkeypatch.setattr(native, "ISA", "avx512")
    monkeypatch.setattr(autograd, "run_kernel", lambda *args: found.append(args) or kernel(*args))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "is_batch_first", "options", "code"), ROWS)
def test_the_classes_agree(kind, is_batch_first, options, code, dtype, calls):
    own, of_torch = (
        partial(outcome, getattr(home, kind), options, code, is_batch_first, dtype) for home in (drop_in, nn)
    )
    got, expected = own(), of_torch()
    assert calls or "Cell" in kind
    if got[0] != expected[0] == "RuntimeError" and kind == "LSTM":
        # oneDNN refuses what was changed. Ours computes it, and torch without oneDNN.
        with torch.backends.mkldnn.flags(enabled=False):
            expected = of_torch()
    assert got[0] == expected[0]
    assert_equal(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_batch_first", [False, True])
def test_an_lstm_keeps_what_it_computed_with(is_batch_first, dtype, calls):
    """Gradients are those of the values as they were, where torch refuses what has been changed in place."""
    code = "output, (h_n, c_n) = rnn(x, h); total = (output * x[..., :1]).sum() + h_n.sum(); {}total.backward(); {}None"
    changes = "output.zero_(); h_n.zero_(); c_n.zero_(); [each.fill_(3.0) for each in h]; "
    biases = "torch.no_grad()(torch._foreach_{}_)([rnn.bias_ih_l0, rnn.bias_hh_l0], 2.0)"
    changed = code.format(f"{changes}{biases.format('add')}; ", biases.format("sub") + "; ")
    got, expected = (outcome(drop_in.LSTM, "", each, is_batch_first, dtype) for each in (changed, code.format("", "")))
    assert got[0] == expected[0] == "runs" and len(calls) == 4
    assert_equal(got, expected, rtol=1e-4, atol=1e-5)
    assert outcome(nn.LSTM, "", changed, is_batch_first, dtype)[0] == "RuntimeError"


if __name__ == "__main__":
    PAGE.write_text(PAGE_NOW, encoding="utf-8")
