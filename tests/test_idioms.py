"""Common idioms with nn.GRU and nn.GRUCell and with mingru.drop_in, and a table of those that differ, idioms.md.

    python tests/test_idioms.py    # writes the table

Two classes agree on an idiom if both return equal values or both raise the same type of error.
"""

import copy
import io
import pickle
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
NAMES = {"copy": copy, "pickle": pickle, "torch": torch, "F": F, "nn": nn, "prune": prune, "mingru": mingru}
NAMES |= {"parametrizations": parametrizations}
PAGE = Path(__file__).with_name("idioms.md")
GUIDE = Path(__file__).parents[1] / "docs" / "coming_from_gru.md"
S, B, IN, H = 5, 2, 3, 4
TWO = "2, bidirectional=True"
# What a user sees, further arguments of the class, and what is done after `output, h_n = rnn(x)`: statements, or an
# expression with a value.
LAYER = [
    ("`h_n.detach_()` between chunks of truncated backpropagation", "", "output.sum().backward(); h_n.detach_()"),
    ("`h_n.detach_()` before `backward`", "2", "h_n.detach_(); output.sum().backward()"),
    ("`h_n.detach_()` of two bidirectional layers", TWO, "output.sum().backward(); h_n.detach_()"),
    ("`output.detach_()`", "", "output.detach_().requires_grad"),
    ("`output.relu_()` before `backward`", "", "output.relu_().sum().backward()"),
    ("`output.relu_()` of a bidirectional layer before `backward`", TWO, "output.relu_().sum().backward()"),
    ("`output.relu_()` with `batch_first` before `backward`", "batch_first=True", "output.relu_().sum().backward()"),
    ("`packed.data.relu_()` before `backward`", "", "rnn(packed)[0].data.relu_().sum().backward()"),
    (
        "`F.dropout(output, inplace=True)` before `backward`",
        "",
        "F.dropout(output, 0.5, inplace=True).sum().backward()",
    ),
    ("`output += x` before `backward`", "", "output += x[..., :1]; output.sum().backward()"),
    (
        "`output.masked_fill_(padding, 0)` before `backward`",
        "",
        "output.masked_fill_(x[..., :1] > 0, 0).sum().backward()",
    ),
    ("`h_n.detach().zero_()` before `backward`", "", "h_n.detach().zero_(); output.sum().backward()"),
    ("`h_n[:, done] = 0` between steps, before `backward`", "", "h_n[:, [0]] = 0; rnn(x, h_n)[0].sum().backward()"),
    ("`h_n *= mask` between steps, before `backward`", "", "h_n *= y[:, :1]; rnn(x, h_n)[0].sum().backward()"),
    ("`h_0.zero_()` between the call and `backward`", "", "output, _ = rnn(x, h); h.zero_(); output.sum().backward()"),
    ("`input.zero_()` between the call and `backward`", "", "x.zero_(); output.sum().backward()"),
    ("`output.is_contiguous()`, `output._base`", "", "output.is_contiguous(), output._base"),
    ("`output.is_contiguous()`, `output._base` of two layers", TWO, "output.is_contiguous(), output._base"),
    ("`output.is_contiguous()` with `batch_first`", "batch_first=True", "output.is_contiguous()"),
    ("`output.view(-1, H)` with `batch_first`", "batch_first=True", "output.view(-1, H)"),
    ("`output.view(-1, H)` after `rnn(x.transpose(0, 1))`", "", "rnn(x.transpose(0, 1))[0].view(-1, H)"),
    ("`output.view(S, B, 2, H)` of a bidirectional layer", "bidirectional=True", "output.view(S, B, 2, H)"),
    ("`h_n.view(L, D, B, H)`", TWO, "h_n.view(2, 2, B, H)"),
    ("`h_n.is_contiguous()`, `h_n._base`", "", "h_n.is_contiguous(), h_n._base"),
    ("`rnn(x)` equals `rnn(x, zeros)`", "2", "torch.equal(output, rnn(x, torch.zeros(2, B, H))[0])"),
    ("`rnn.batch_first = True` after construction", "", "setattr(rnn, 'batch_first', True); rnn(x)[1].shape"),
    ("`rnn.dropout = 1.0` after construction", "2", "setattr(rnn, 'dropout', 1.0); torch.equal(output, rnn(x)[0])"),
    (
        "`torch.func.vmap` over stacked models",
        "",
        "weights, _ = torch.func.stack_module_state([rnn, GRU(IN, H)]); call = torch.func.functional_call; "
        "torch.func.vmap(lambda each: call(rnn, each, (x,))[0])(weights).shape",
    ),
    ("`repr(rnn)`", "2, dropout=0.5", "repr(rnn)"),
    ("`isinstance(rnn, nn.GRU)`", "", "isinstance(rnn, nn.GRU)"),
    ("`isinstance(rnn, nn.RNNBase)`", "", "isinstance(rnn, nn.RNNBase)"),
    ("`rnn.flatten_parameters()`", "", "rnn.flatten_parameters()"),
    (
        "`rnn.check_forward_args(x, h, None)`, `rnn.permute_hidden(h, order)`",
        "",
        "rnn.check_forward_args(x, h, None); rnn.permute_hidden(h, torch.tensor([1, 0]))",
    ),
    ("`len(rnn.all_weights)` of two bidirectional layers", TWO, "len(rnn.all_weights)"),
    ("`for w_ih, w_hh, b_ih, b_hh in rnn.all_weights`", "", "[w_ih for w_ih, w_hh, b_ih, b_hh in rnn.all_weights]"),
    (
        "`for name in rnn._flat_weights_names: getattr(rnn, name)`",
        "",
        "[getattr(rnn, name) for name in rnn._flat_weights_names]",
    ),
    ("`rnn._flat_weights`", "", "rnn._flat_weights"),
    ("`nn.init.orthogonal_(rnn.weight_hh_l0)`", "", "nn.init.orthogonal_(rnn.weight_hh_l0)"),
    (
        '`if "weight_ih" in name` in a loop over `named_parameters` finds a weight',
        "",
        "any('weight_ih' in name for name, _ in rnn.named_parameters())",
    ),
    ("`model.apply(init)`, with an `init` for `nn.Linear`, does not change the weights", "", "untouched(model.apply)"),
    (
        "`for m in model.modules()`, with an `init` for `nn.Linear`, does not change the weights",
        "",
        "untouched(lambda init: [init(m) for m in model.modules()])",
    ),
    (
        "`for m in model.modules()`, with `bias=False` and an `init` for `nn.Linear` that zeroes `m.bias.data`",
        "bias=False",
        "untouched(lambda init: [init(m) for m in model.modules()])",
    ),
    (
        "the same for each `m` with `Linear` in the name of its class",
        "",
        "untouched(lambda init: [init(m) for m in model.modules() if 'Linear' in type(m).__name__])",
    ),
    (
        "transformers: `_init_weights` of each child, and of its children",
        "",
        "visit = lambda m: [visit(each) for each in m.children()] + [of_transformers(m)]; "
        "untouched(lambda init: visit(model))",
    ),
    ("fairseq: `model.apply(init_bert_params)`", "", "untouched(lambda init: model.apply(of_transformers))"),
    (
        "d2l: `xavier_uniform_(m._parameters[name])` for each of `m._flat_weights_names` if `type(m) == nn.GRU`",
        "",
        "model.apply(lambda m: type(m) == nn.GRU and [nn.init.xavier_uniform_(m._parameters[name]) "
        "for name in m._flat_weights_names if 'weight' in name])",
    ),
    (
        "fairseq: `param.data.uniform_(-0.1, 0.1)` for each `weight` in `rnn.named_parameters()`",
        "",
        "[param.data.uniform_(-0.1, 0.1) for name, param in rnn.named_parameters() if 'weight' in name]; "
        "rnn(x)[0].shape",
    ),
    (
        "CleanRL: `orthogonal_` for each `weight`, and 0 for each `bias` in `rnn.named_parameters()`",
        "",
        "[nn.init.orthogonal_(param) if 'weight' in name else nn.init.zeros_(param) for name, param in "
        "rnn.named_parameters()]; rnn(x)[0].shape",
    ),
    ("`list(rnn.children())` is empty", "", "not list(rnn.children())"),
    ('`prune.l1_unstructured(rnn, "weight_ih_l0", 0.5)`', "", "prune.l1_unstructured(rnn, 'weight_ih_l0', 0.5)"),
    ('`weight_norm(rnn, "weight_hh_l0")`', "", "parametrizations.weight_norm(rnn, 'weight_hh_l0')"),
    ("`copy.deepcopy(rnn)`", "", "torch.equal(output, copy.deepcopy(rnn)(x)[0])"),
    ("`pickle.dumps(rnn)`", "", "torch.equal(output, pickle.loads(pickle.dumps(rnn))(x)[0])"),
    (
        "`torch.save(rnn)`, `torch.load(weights_only=False)`",
        "",
        "torch.equal(output, loaded(rnn, weights_only=False)(x)[0])",
    ),
    ("`torch.save(rnn)`, `torch.load(weights_only=True)`", "", "loaded(rnn)"),
    (
        "`torch.save(rnn)`, `torch.load(weights_only=True)` within `torch.serialization.safe_globals([GRU])`",
        "",
        "loaded(rnn, [GRU])",
    ),
    (
        "`torch.save(rnn)`, `torch.load(weights_only=True)` within `safe_globals([nn.GRU, *mingru.safe_globals()])`",
        "",
        "loaded(rnn, [nn.GRU, *mingru.safe_globals()])",
    ),
    ("`load_state_dict` of a trained `nn.GRU`", "", "rnn.load_state_dict(nn.GRU(IN, H).state_dict())"),
    ("`torch.jit.script(rnn)(x)`", "", "torch.jit.script(rnn)(x)[0].shape"),
    ("`torch.jit.trace(model, x)`", "", "torch.jit.trace(model, x)(x).shape"),
    (
        "`torch.compile(model, fullgraph=True)`",
        "",
        "torch.compiler.reset(); torch.compile(model, fullgraph=True, backend='eager')(x).shape",
    ),
    ("`torch.fx.symbolic_trace(model)`", "", "torch.fx.symbolic_trace(model)(x).shape"),
    (
        "`torch.ao.quantization.quantize_dynamic(model, {nn.GRU, nn.Linear})`",
        "",
        "torch.ao.quantization.quantize_dynamic(model, {nn.GRU, nn.Linear})(x).shape",
    ),
]
# The same of cells, after `h = cell(y)`.
CELL = [
    ("cell: `h.detach_()` between steps", "", "h.sum().backward(); h.detach_(); cell(y, h).sum().backward()"),
    ("cell: `h.relu_()` before `backward`", "", "h.relu_().sum().backward()"),
    ("cell: `h[done] = 0` between steps, before `backward`", "", "h[[0]] = 0; cell(y, h).sum().backward()"),
    (
        "cell: `outputs[t] = h` for each step",
        "",
        "outputs = torch.zeros(1, B, H); outputs[0] = h; outputs.sum().backward()",
    ),
    ("cell: `h.is_contiguous()`, `h._base`", "", "h.is_contiguous(), h._base"),
    ("cell: `repr(cell)`", "bias=False", "repr(cell)"),
    ("cell: `isinstance(cell, nn.GRUCell)`", "", "isinstance(cell, nn.GRUCell)"),
    ("cell: `nn.init.orthogonal_(cell.weight_hh)`", "", "nn.init.orthogonal_(cell.weight_hh)"),
    ("cell: `torch.jit.script(cell)(x, h)`", "", "torch.jit.script(cell)(y, h).shape"),
]


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


def of_transformers(module):
    """As `PreTrainedModel._init_weights` of many models, and fairseq's `init_bert_params`."""
    if isinstance(module, nn.Linear):
        module.weight.data.normal_(0.0, 0.02)
        if module.bias is not None:
            module.bias.data.zero_()
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.weight.data.fill_(1.0)


def outcome(kind, options, code):
    """Return what a user would see: a value, "runs", or the type of an error."""
    torch.manual_seed(0)
    names = NAMES | {
        "GRU": kind,
        "Model": Model,
        "loaded": loaded,
        "of_transformers": of_transformers,
        "S": S,
        "B": B,
        "IN": IN,
        "H": H,
    }
    names |= {"x": torch.randn(S, B, IN), "y": torch.randn(B, IN), "h": torch.zeros(1, B, H)}
    names["packed"] = pack_sequence([torch.randn(5, IN), torch.randn(3, IN)])
    first = "rnn = GRU(IN, H, {}); output, h_n = rnn(x); model = Model(rnn)"
    first = "cell = GRU(IN, H, {}); h = cell(y)" if issubclass(kind, nn.RNNCellBase | drop_in.GRUCell) else first
    *statements, last = code.split("; ")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(first.format(options), names)
            names["untouched"] = lambda apply: same_weights(names["rnn"], lambda: apply(init))
            exec("; ".join(statements), names)
            value = exec(last, names) if " = " in last or "+=" in last else eval(last, names)
    except Exception as error:
        return type(error).__name__
    return str(value) if type(value) in (bool, int, str, tuple, torch.Size) else "runs"


def same_weights(rnn, function):
    before = copy.deepcopy(rnn)
    function()
    return all(torch.equal(*pair) for pair in zip(before.parameters(), rnn.parameters(), strict=True))


def rows():
    classes = [(LAYER, nn.GRU, drop_in.GRU), (CELL, nn.GRUCell, drop_in.GRUCell)]
    return [(idiom, *(outcome(kind, *how) for kind in kinds)) for idioms, *kinds in classes for idiom, *how in idioms]


def count(found):
    return f"Of {len(found)} idioms, {sum(row[1] == row[2] for row in found)} give the same result with both classes."


def table(found):
    """Return Markdown: the number of idioms that agree, and a table of the others."""
    lines = [
        "# Idioms with torch.nn and with mingru.drop_in",
        "",
        f"{count(found)} The others:",
        "",
        "| idiom | `torch.nn` | `mingru.drop_in` |",
        "| --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in found if row[1] != row[2]),
    ]
    return "\n".join(lines) + "\n"


def test_the_table_and_the_guide():
    found = rows()
    assert table(found) == PAGE.read_text(encoding="utf-8"), "run python tests/test_idioms.py"
    assert count(found) in " ".join(GUIDE.read_text(encoding="utf-8").split())


@pytest.mark.parametrize(("code", "seen"), [("repr(rnn)", "GRU(3, 4)"), ("output", "runs"), ("nothing", "NameError")])
def test_outcomes(code, seen):
    assert outcome(nn.GRU, "", code) == seen


if __name__ == "__main__":
    PAGE.write_text(table(rows()), encoding="utf-8")
