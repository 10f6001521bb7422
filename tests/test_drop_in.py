"""In place of nn.GRU, nn.LSTM and their cells: the same calls, good and bad, on torch's classes and on ours.

Those of torch's names give what torch's do, errors included. Those of our own cells have the same interface.
"""

import ast
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import refuses
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.testing import assert_close

import mingru
from mingru import drop_in
from mingru.drop_in.interface import states_of

S, B, IN, H = 5, 2, 3, 4


def table(title):
    """Return the calls of a section of data/drop_in_calls.txt, and what each is under: None for good ones."""
    section = re.search(rf"\n{title}\n-+\n((?:(?!.*\n---).*\n)*)", TEXT)[1]
    rows = re.findall(r"^(\w+):\n((?:    .*\n)+)", section, re.MULTILINE)
    return {call: None if key == "good" else key for key, calls in rows for call in re.split(r"\s{2,}", calls.strip())}


def like(cell):
    """Return the classes of a cell of ours, by torch's names."""
    names = ("GRU", "GRUCell", "LSTM", "LSTMCell")
    kinds = (drop_in.GRULike, drop_in.GRULikeCell, drop_in.LSTMLike, drop_in.LSTMLikeCell)
    return SimpleNamespace(**{name: partial(kind, cell=cell) for name, kind in zip(names, kinds, strict=True)})


LIKE = like("mingru")
TEXT = (Path(__file__).parent / "data/drop_in_calls.txt").read_text(encoding="utf-8")
CALLS = table("Constructors") | table("Calls")


def of_lstm(calls):
    """The same calls of LSTM, with each state twice, as a pair; without those that pass something else as a state.

    Without wrong packed calls too: nn.LSTM checks little there, and takes the process down if states have 4 dimensions.
    """
    found = {}
    for of_gru, argument in calls.items():
        if argument and "sorted" in of_gru:
            continue
        call = of_gru.replace("GRU", "LSTM").replace("gru", "lstm")
        tree = ast.parse(call, mode="eval").body
        states = [*tree.args[1:2], *(each.value for each in tree.keywords if each.arg == "hx")]
        if states and not call.startswith("LSTM"):
            state = ast.get_source_segment(call, states[0])
            if isinstance(states[0], (ast.List, ast.Tuple)) or state == "0.0" or "numpy" in state:
                continue
            before, _, after = call.rpartition(state)
            call = call if state == "None" else f"{before}({state}, {state}){after}"
        found[call] = argument
    return found


FACTORIES = {"wide": {"dtype": torch.double}, "half": {"dtype": torch.bfloat16}, "meta": {"device": "meta"}}


def names_of(home, kind="GRU"):
    """What calls are written with; `home` has a class of this name and its cell."""
    x = torch.randn(S, B, IN)
    layer, cell = getattr(home, kind), getattr(home, f"{kind}Cell")
    names = {"torch": torch, "PackedSequence": PackedSequence, kind: layer, f"{kind}Cell": cell, "cell": cell(IN, H)}
    names |= {kind.lower(): layer(IN, H), "first": layer(IN, H, batch_first=True), "x": x, "h": torch.randn(1, B, H)}
    names |= {"h4": torch.randn(4, B, H), "y": torch.randn(B, IN), "k": torch.randn(B, H)}
    names |= {name: layer(IN, H, **factory) for name, factory in FACTORIES.items()}
    names |= {f"{name}_cell": cell(IN, H, **factory) for name, factory in FACTORIES.items()}
    return names | {
        "deep": layer(IN, H, 2, bidirectional=True),
        "deep_first": layer(IN, H, 2, batch_first=True, dropout=0.5, bidirectional=True),
        "projected": layer(IN, H, 2, True, False, 0.0, True, 2),
        "sorted_": pack_sequence([x[:, 0], x[:2, 1]]),
        "unsorted": pack_sequence([x[:2, 0], x[:, 1]], enforce_sorted=False),
    }


def outcome(call, names):
    """What a call gives: types, shapes, dtypes and devices, or a repr, or the error itself."""
    try:
        return described(eval(call, names))
    except Exception as error:
        return error


def described(value):
    if isinstance(value, nn.Module):
        return re.sub(r"Like|, cell='\w+'", "", repr(value))
    if isinstance(value, PackedSequence):
        indices = [None if each is None else each.tolist() for each in value[1:]]
        return PackedSequence, described(value.data), indices
    if isinstance(value, tuple):
        return [type(value), *map(described, value)]
    # Where there is no sequence, our last state is the one that came in, and torch's a function of the weights.
    return type(value), value.shape, value.dtype, value.device, value.requires_grad or value.numel() == 0


def same_outcome(both, call, argument):
    theirs, ours = (outcome(call, names) for names in both)
    if argument is None:
        assert not isinstance(theirs, Exception), (call, theirs)
        assert ours == theirs, call
        return
    assert isinstance(theirs, Exception) and isinstance(ours, Exception), call
    if argument != "other":
        kind = ("LSTM" if "LSTM" in both[1] else "GRU") + "Like" + "Cell" * ("cell" in call.lower())
        assert re.match(rf"mingru\.drop_in\.{kind}: {argument} must be .+, got .+", str(ours)), (call, ours)


OF_KINDS = [("GRU", CALLS), ("LSTM", of_lstm(CALLS)), ("LSTM", table("The pair of an LSTM"))]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("cell", ["gru", "mingru", "minlstm"])
@pytest.mark.parametrize(("kind", "calls"), OF_KINDS, ids=["GRU", "LSTM", "pairs"])
def test_calls_have_the_same_outcome(kind, calls, cell):
    both = names_of(nn, kind), names_of(like(cell), kind)
    for call, argument in calls.items():
        same_outcome(both, call, argument)


ONLY = table("What only torch takes"), table("What only ours take")


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize(("kind", "calls"), [*OF_KINDS, ("GRU", ONLY[0] | ONLY[1])])
def test_torchs_classes_give_what_torchs_do(kind, calls):
    theirs, ours = (names_of(home, kind) for home in (nn, drop_in))
    for call in calls:
        expected, got = (outcome(call, names) for names in (theirs, ours))
        if isinstance(expected, Exception):
            expected, got = ((type(each), str(each)) for each in (expected, got))
        assert got == expected, call


def test_the_comparison_can_fail():
    both = names_of(nn), names_of(LIKE)
    wrong = lambda x: (LIKE.GRU(IN, H)(x)[0], torch.zeros(B, 1, H))  # noqa: E731
    for gru, call, argument in ((wrong, "gru(x)", None), (mingru.MinGRU(IN, H), "gru(x.double())", "input")):
        refuses(AssertionError, "", same_outcome, (both[0], both[1] | {"gru": gru}), call, argument)


def test_what_only_one_takes():
    both = names_of(nn), names_of(LIKE)
    for refuses_it, calls in zip((1, 0), ONLY, strict=True):
        for call in calls:
            failed = [isinstance(outcome(call, names), Exception) for names in both]
            assert failed == [not refuses_it, bool(refuses_it)], call


def test_autocast():
    def without_dtypes(value):
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            return [without_dtypes(each) for each in value if not isinstance(each, torch.dtype)]
        return value

    both = names_of(nn), names_of(LIKE)
    with torch.autocast("cpu", torch.bfloat16):
        for call, argument in table("Under autocast").items():
            if argument is not None:
                same_outcome(both, call, argument)
                continue
            theirs, ours = (without_dtypes(outcome(call, names)) for names in both)
            assert ours == theirs and torch.Tensor in (theirs if "cell" in call else theirs[2])


@pytest.mark.parametrize("home", [nn, LIKE])
def test_the_pair_may_have_two_dtypes_under_autocast(home):
    """As an encoder's output and zeros have."""
    if home is nn and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("torch computes no LSTM in bfloat16 on this processor")
    lstm, x = home.LSTM(IN, H), torch.randn(S, B, IN)
    h, c = torch.randn(1, B, H), torch.zeros(1, B, H)
    with torch.autocast("cpu", torch.bfloat16):
        got = lstm(x, (h.bfloat16(), c))
        assert_close(got, lstm(x, (h.bfloat16(), c.bfloat16())))


# What is computed


# The state is the mean of the pair


@pytest.mark.parametrize("home", [nn, drop_in, LIKE])
def test_programs_that_keep_the_pair(home):
    """What programs do with (h, c), with nn.LSTM itself as the model."""
    rnn, x = home.LSTM(IN, H, 2, dtype=torch.double), torch.randn(6, 3, IN).double()
    out, (h, _) = rnn(x)
    first, pair = rnn(x[:4])
    assert_close(torch.cat([first, rnn(x[4:], pair)[0]]), out)
    # Repackaged: the same numbers, without a gradient into the first segment.
    detached = tuple(each.detach() for each in pair)
    assert_close(rnn(x[4:], detached)[0], out[4:])
    for each in pair:
        each.detach_()
    assert not pair[0].requires_grad
    # Some sequences start again, written in place.
    for each in detached:
        each[:, 1] = 0.0
    again = rnn(x[4:], detached)[0]
    assert_close((again[:, [0, 2]], again[:, 1]), (out[4:, [0, 2]], rnn(x[4:, 1])[0]))
    # The two tensors are not one.
    kept, changed = (each.detach() for each in rnn(x)[1])
    changed.zero_()
    assert_close(kept, h)
    # A program that has one state only, or learns it, passes it with zeros: it counts, and gets a gradient.
    for at in (0, 1):
        state = [torch.zeros(2, 3, H).double() for _ in range(2)]
        state[at] = torch.randn(2, 3, H).double().requires_grad_()
        changed = rnn(x, tuple(state))[0]
        assert not torch.equal(changed, out) and torch.autograd.grad(changed.sum(), state[at])[0].abs().min() > 0


def test_the_mean_of_a_pair_is_exact():
    """A program that passes the pair on continues with the same bits, in every precision."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        h = torch.randn(1000).to(dtype) * torch.tensor(2.0).to(dtype) ** torch.randint(-20, 14, (1000,))
        assert torch.equal(states_of("LSTM", (h, h), 0)[0], h)


# A module among modules


OPTIONS = [{}, {"num_layers": 2, "batch_first": True, "bidirectional": True}, {"num_layers": 2, "bias": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attributes(options):
    ours, theirs = LIKE.GRU(IN, H, **options), nn.GRU(IN, H, **options)
    for name in ("input_size", "hidden_size", "mode", "proj_size", "training", "dropout", *options):
        assert getattr(ours, name) == getattr(theirs, name), name
        assert type(getattr(ours, name)) is type(getattr(theirs, name)), name
    assert ours.flatten_parameters() is None
    cell = LIKE.GRUCell(IN, H, False)
    assert (cell.input_size, cell.hidden_size, cell.bias) == (IN, H, False)
    names = ("weight_ih_l0", "weight_ih", "_flat_weights_names", "_all_weights", "all_weights")
    assert not any(hasattr(each, name) for name in names for each in (ours, cell))


def test_apply_takes_a_layer_for_one_module():
    def init(module):
        if isinstance(module, nn.Linear | nn.Conv1d):
            module.weight.data.zero_()

    conv = partial(mingru.MinConv1dGRU, kernel_size=1, norm="group")
    for kind in (nn.LSTM, nn.GRUCell, LIKE.LSTM, LIKE.GRUCell, mingru.MinLSTM, mingru.MinGRUCell, conv):
        rnn = kind(IN, H)
        model, seen = nn.Sequential(nn.ModuleList([rnn]), nn.Linear(H, 1)), []
        before = [weight.clone() for weight in rnn.parameters()]
        assert model.apply(seen.append) is model and seen == [rnn, model[0], model[1], model]
        assert not model.apply(init)[1].weight.any()
        assert_close(list(rnn.parameters()), before, rtol=0, atol=0)
        rnn.head, seen = nn.Linear(H, 1), []  # as the constructor of a subclass does
        assert rnn.apply(seen.append) is rnn and seen == [rnn.head, rnn]
    rnn.layers[0].observer = nn.Identity()
    assert rnn.apply(seen.append) is rnn and seen[2:] == [rnn.layers[0].observer, rnn.head, rnn]
