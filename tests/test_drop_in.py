"""In place of nn.GRU and nn.GRUCell: the same calls, good and bad, on torch's and on ours; and the guide's code."""

import copy
import io
import pickle
import re
import warnings

import pytest
import reference
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.testing import assert_close

import mingru
from mingru import drop_in

S, B, IN, H = 5, 2, 3, 4
TIGHT = {"rtol": 1e-9, "atol": 1e-9}

# Calls, written with GRU, GRUCell and the names below. Behind a bad one stands the argument that ours complains of, or
# "" where Python or torch itself speaks.

CONSTRUCTORS = {
    "GRU(3, 4)": None,
    "GRU(3, 4, 2)": None,
    "GRU(input_size=3, hidden_size=4, num_layers=2)": None,
    "GRU(3, 4, 2, False)": None,
    "GRU(3, 4, 2, True, True)": None,
    "GRU(3, 4, 2, True, False, 0.25)": None,
    "GRU(3, 4, 2, True, False, 0.25, True)": None,
    "GRU(3, 4, 2, dropout=1)": None,
    "GRU(3, 4, 2, dropout=0)": None,
    "GRU(3, 4, device='meta', dtype=torch.float64)": None,
    "GRU(3, 4, device=torch.device('cpu'))": None,
    "GRU(3, 4, dtype=torch.bfloat16)": None,
    "GRU(3, 4, bias=False, batch_first=True, bidirectional=True)": None,
    "GRUCell(3, 4)": None,
    "GRUCell(3, 4, False)": None,
    "GRUCell(3, 4, True, 'meta', torch.float64)": None,
    "GRUCell(input_size=3, hidden_size=4, bias=True, device=None, dtype=torch.float64)": None,
    "GRU()": "",
    "GRU(3)": "",
    "GRU(3, 4, foo=1)": "",
    "GRU(3, 4, input_size=3)": "",
    "GRU(3, 4, device='nonsense')": "",
    "GRU(3, 4, device=3.5)": "",
    "GRU('3', 4)": "input_size",
    "GRU(3.0, 4)": "input_size",
    "GRU(None, 4)": "input_size",
    "GRU(0, 4)": "input_size",
    "GRU(-1, 4)": "input_size",
    "GRU(3, '4')": "hidden_size",
    "GRU(3, 4.0)": "hidden_size",
    "GRU(3, 0)": "hidden_size",
    "GRU(3, -1)": "hidden_size",
    "GRU(3, 4, 0)": "num_layers",
    "GRU(3, 4, -1)": "num_layers",
    "GRU(3, 4, '2')": "num_layers",
    "GRU(3, 4, 2.0)": "num_layers",
    "GRU(3, 4, None)": "num_layers",
    "GRU(3, 4, bias=1)": "bias",
    "GRU(3, 4, bias=None)": "bias",
    "GRU(3, 4, batch_first=1)": "batch_first",
    "GRU(3, 4, batch_first=None)": "batch_first",
    "GRU(3, 4, 2, dropout=1.5)": "dropout",
    "GRU(3, 4, 2, dropout=-0.1)": "dropout",
    "GRU(3, 4, 2, dropout=float('nan'))": "dropout",
    "GRU(3, 4, 2, dropout=True)": "dropout",
    "GRU(3, 4, 2, dropout='0.1')": "dropout",
    "GRU(3, 4, 2, dropout='half')": "dropout",
    "GRU(3, 4, 2, dropout=None)": "dropout",
    "GRU(3, 4, 2, dropout=1j)": "dropout",
    "GRU(3, 4, proj_size=2)": "proj_size",
    "GRU(3, 4, proj_size=0)": "proj_size",
    "GRU(3, 4, dtype=torch.int32)": "dtype",
    "GRU(3, 4, dtype=torch.bool)": "dtype",
    "GRU(3, 4, dtype='float32')": "dtype",
    # Torch's constructor takes it, its forward then doesn't.
    "GRU(3, 4, bidirectional=1)(x)": "bidirectional",
    "GRU(3, 4, bidirectional=None)(x)": "bidirectional",
    "GRUCell()": "",
    "GRUCell(3)": "",
    "GRUCell(3, 4, num_layers=1)": "",
    "GRUCell(3, 4, proj_size=1)": "",
    "GRUCell(3, 4, True, None, None, None)": "",
    "GRUCell(3, 4, device='nonsense')": "",
    "GRUCell('3', 4)": "input_size",
    "GRUCell(3.0, 4)": "input_size",
    "GRUCell(None, 4)": "input_size",
    "GRUCell(-3, 4)": "input_size",
    "GRUCell(3, '4')": "hidden_size",
    "GRUCell(3, 4.0)": "hidden_size",
    "GRUCell(3, -4)": "hidden_size",
    "GRUCell(3, 4, dtype=torch.int32)": "dtype",
    "GRUCell(3, 4, dtype='float32')": "dtype",
}

CALLS = {
    "gru(x)": None,
    "gru(x, h)": None,
    "gru(x, None)": None,
    "gru(input=x, hx=h)": None,
    "gru(x[:1])": None,
    "gru(x[:, :0])": None,
    "gru(x[:, :0], h[:, :0])": None,
    "gru(x[:, 0])": None,
    "gru(x[:, 0], h[:, 0])": None,
    "gru(x[:, :1].expand(5, 2, 3), h[:, :1].expand(1, 2, 4))": None,
    "first(x)": None,
    "first(x, torch.ones(1, 5, 4))": None,
    "first(x[:0])": None,
    "first(x[0])": None,
    "first(x[0], h[:, 0])": None,
    "deep(x)": None,
    "deep(x, h4)": None,
    "deep(x[:, 0])": None,
    "deep(x[:, 0], h4[:, 0])": None,
    "deep_first(x)": None,
    "deep_first(x, h4[:, :1].expand(4, 5, 4))": None,
    "deep_first(x[:, 0], h4[:, 0])": None,
    "gru(sorted_)": None,
    "gru(unsorted)": None,
    "gru(sorted_, h)": None,
    "gru(unsorted, h)": None,
    "first(unsorted, h)": None,
    "deep(sorted_, h4)": None,
    "deep_first(unsorted)": None,
    "deep_first(unsorted, h4)": None,
    "wide(x.double())": None,
    "wide(x.double(), h.double())": None,
    "wide(unsorted.double(), h.double())": None,
    "half(x.bfloat16())": None,
    "half(x.bfloat16(), h.bfloat16())": None,
    "half(unsorted.to(torch.bfloat16))": None,
    "meta(x.to('meta'))": None,
    "meta(x.to('meta'), h.to('meta'))": None,
    "meta(x[:, 0].to('meta'))": None,
    "cell(y)": None,
    "cell(y, k)": None,
    "cell(input=y, hx=k)": None,
    "cell(y, None)": None,
    "cell(y[0])": None,
    "cell(y[0], k[0])": None,
    "cell(y[:0])": None,
    "cell(y[:0], k[:0])": None,
    "wide_cell(y.double(), k.double())": None,
    "half_cell(y.bfloat16())": None,
    "meta_cell(y.to('meta'))": None,
    "meta_cell(y.to('meta'), k.to('meta'))": None,
    "gru()": "",
    "gru(x, h, None)": "",
    "gru(x=x)": "",
    "gru(x, h=h)": "",
    "gru(None)": "input",
    "gru([x])": "input",
    "gru(x.tolist())": "input",
    "gru(x.numpy())": "input",
    "gru(tuple(sorted_))": "input",
    "gru(x[0, 0])": "input",
    "gru(x[None])": "input",
    "gru(torch.tensor(1.0))": "input",
    "gru(x[..., :2])": "input",
    "gru(x[:, 0, :2])": "input",
    "gru(x[:0])": "input",
    "gru(x[:0, :0])": "input",
    "gru(x[:0, 0])": "input",
    "gru(x.double())": "input",
    "gru(x.half())": "input",
    "gru(x.long())": "input",
    "gru(x.bool())": "input",
    "gru(x.cfloat())": "input",
    "gru(x.to('meta'))": "input",
    "gru(x.to('meta'), h.to('meta'))": "input",
    "meta(x)": "input",
    "gru(x, [h])": "hx",
    "gru(x, (h, h))": "hx",
    "gru(x, 0.0)": "hx",
    "gru(x, h.numpy())": "hx",
    "gru(x, h[0])": "hx",
    "gru(x, h[..., None])": "hx",
    "gru(x, h[:, :1])": "hx",
    "gru(x, h[..., :3])": "hx",
    "gru(x, h4)": "hx",
    "gru(x, h.double())": "hx",
    "gru(x, h.half())": "hx",
    "gru(x, h.long())": "hx",
    "gru(x, h.to('meta'))": "hx",
    "gru(x[:, 0], h)": "hx",
    "gru(x[:, 0], h[0, 0])": "hx",
    "gru(x[:, 0], torch.zeros(2, 4))": "hx",
    "half(x.bfloat16(), h)": "hx",
    "meta(x.to('meta'), h)": "hx",
    "first(x[:, :0])": "input",
    "first(x[:0, 0])": "input",
    "first(x, h)": "hx",
    "first(x, torch.zeros(5, 1, 4))": "hx",
    "deep(x, h)": "hx",
    "deep(x[:, 0], h[:, 0])": "hx",
    "gru(PackedSequence(sorted_.data[:, :2], sorted_.batch_sizes))": "input",
    "gru(PackedSequence(sorted_.data[:, 0], sorted_.batch_sizes))": "input",
    "gru(PackedSequence(sorted_.data[..., None], sorted_.batch_sizes))": "input",
    "gru(sorted_.double())": "input",
    "gru(sorted_.long())": "input",
    "gru(sorted_.to('meta'))": "input",
    "meta(sorted_)": "input",
    "gru(sorted_, h[0])": "hx",
    "gru(unsorted, h[0])": "hx",
    "gru(sorted_, h[None])": "hx",
    "gru(unsorted, h[..., None])": "hx",
    "gru(sorted_, h[:, :1])": "hx",
    "gru(unsorted, h[:, :1])": "hx",
    "gru(sorted_, torch.zeros(1, 5, 4))": "hx",
    "gru(unsorted, torch.zeros(2, 2, 4))": "hx",
    "gru(unsorted, h[..., :3])": "hx",
    "gru(sorted_, h.double())": "hx",
    "gru(unsorted, h.double())": "hx",
    "gru(sorted_, h.to('meta'))": "hx",
    "gru(sorted_, [h])": "hx",
    "gru(unsorted, [h])": "hx",
    "gru(sorted_, (h, h))": "hx",
    "gru(unsorted, 0.0)": "hx",
    "cell()": "",
    "cell(y, k, k)": "",
    "cell(y, h=k)": "",
    "cell(None)": "input",
    "cell([y])": "input",
    "cell(y.numpy())": "input",
    "cell(sorted_)": "input",
    "cell(x)": "input",
    "cell(y[0, 0])": "input",
    "cell(y[:, :2])": "input",
    "cell(y[0, :2])": "input",
    "cell(y.double())": "input",
    "cell(y.half())": "input",
    "cell(y.long())": "input",
    "cell(y.to('meta'))": "input",
    "meta_cell(y)": "input",
    "cell(y, [k])": "hx",
    "cell(y, (k, k))": "hx",
    "cell(y, 0.0)": "hx",
    "cell(y, h)": "hx",
    "cell(y, k[0])": "hx",
    "cell(y[:1], k[0])": "hx",
    "cell(y[0], k)": "hx",
    "cell(y[0], k[:1])": "hx",
    "cell(y, k[:1])": "hx",
    "cell(y, k[:, :3])": "hx",
    "cell(y, k[0, 0])": "hx",
    "cell(y, k.double())": "hx",
    "cell(y, k.long())": "hx",
    "cell(y, k.to('meta'))": "hx",
    "meta_cell(y.to('meta'), k)": "hx",
}

# What torch takes by accident, or for mathematics that are not ours.
STRICTER = {
    "GRU(True, 4)": TypeError,
    "GRU(3, 4, True)": TypeError,
    "GRU(3, 4, bidirectional=1)": TypeError,
    "GRUCell(3, 4, 1)": TypeError,
    "GRU(3, 4, dtype=torch.complex64)": RuntimeError,
    "GRUCell(0, 4)": RuntimeError,
    "GRUCell(3, 0)": RuntimeError,
    "GRUCell(True, 4)": TypeError,
    "GRUCell(3, 4, dtype=torch.complex64)": RuntimeError,
    # A state for five sequences beside two.
    "gru(unsorted, torch.zeros(1, 5, 4))": RuntimeError,
}

AUTOCAST = {
    "gru(x)": None,
    "gru(x.bfloat16())": None,
    "gru(x, h)": None,
    "gru(x, h.bfloat16())": None,
    "gru(x.bfloat16(), h)": None,
    "gru(unsorted, h)": None,
    "deep_first(x)": None,
    "cell(y)": None,
    "cell(y.bfloat16())": None,
    "cell(y, k.bfloat16())": None,
    "gru(x.double())": "input",
    "gru(x.long())": "input",
    "gru(x, h.double())": "hx",
    "gru(x, h.long())": "hx",
    "cell(y.double())": "input",
    "cell(y, k.double())": "hx",
}


def names_of(home):
    """What calls are written with; `home` has GRU and GRUCell."""
    x = torch.randn(S, B, IN)
    gru, cell = home.GRU, home.GRUCell
    return {
        "torch": torch,
        "PackedSequence": PackedSequence,
        "GRU": gru,
        "GRUCell": cell,
        "gru": gru(IN, H),
        "first": gru(IN, H, batch_first=True),
        "deep": gru(IN, H, 2, bidirectional=True),
        "deep_first": gru(IN, H, 2, batch_first=True, dropout=0.5, bidirectional=True),
        "wide": gru(IN, H, dtype=torch.double),
        "half": gru(IN, H, dtype=torch.bfloat16),
        "meta": gru(IN, H, device="meta"),
        "cell": cell(IN, H),
        "wide_cell": cell(IN, H, dtype=torch.double),
        "half_cell": cell(IN, H, dtype=torch.bfloat16),
        "meta_cell": cell(IN, H, device="meta"),
        "x": x,
        "h": torch.randn(1, B, H),
        "h4": torch.randn(4, B, H),
        "y": torch.randn(B, IN),
        "k": torch.randn(B, H),
        "sorted_": pack_sequence([x[:, 0], x[:2, 1]]),
        "unsorted": pack_sequence([x[:2, 0], x[:, 1]], enforce_sorted=False),
    }


@pytest.fixture(scope="module")
def both():
    torch.manual_seed(0)
    return names_of(nn), names_of(drop_in)


def outcome(call, names):
    """What a call gives: types, shapes, dtypes and devices, or a repr, or the error itself."""
    try:
        return described(eval(call, names))
    except Exception as error:
        return error


def described(value):
    if isinstance(value, nn.Module):
        return repr(value)
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
    assert isinstance(theirs, Exception), call
    assert type(ours) is type(theirs), (call, ours, theirs)
    if argument:
        kind = "GRUCell" if "cell" in call.lower() else "GRU"
        assert re.match(rf"{kind}: {argument} must be .+, got .+", str(ours)), (call, ours)


@pytest.mark.parametrize("calls", [CONSTRUCTORS, CALLS], ids=["constructors", "calls"])
def test_calls_have_the_same_outcome(both, calls):
    for call, argument in calls.items():
        same_outcome(both, call, argument)


def test_the_comparison_can_fail(both):
    ours = names_of(drop_in)
    ours["gru"] = lambda x: (drop_in.GRU(IN, H)(x)[0], torch.zeros(B, 1, H))
    with pytest.raises(AssertionError):
        same_outcome((both[0], ours), "gru(x)", None)
    ours["gru"] = mingru.MinGRU(IN, H)
    with pytest.raises(AssertionError):
        same_outcome((both[0], ours), "gru(x.double())", "input")


def test_what_only_ours_refuses(both):
    for call, kind in STRICTER.items():
        theirs, ours = (outcome(call, names) for names in both)
        assert not isinstance(theirs, Exception), call
        assert type(ours) is kind, call


@pytest.mark.parametrize(("call", "argument"), AUTOCAST.items())
def test_autocast(both, call, argument):
    def without_dtypes(value):
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            return [without_dtypes(each) for each in value if not isinstance(each, torch.dtype)]
        return value

    with torch.autocast("cpu", torch.bfloat16):
        if argument is None:
            theirs, ours = (without_dtypes(outcome(call, names)) for names in both)
            assert ours == theirs
            assert torch.Tensor in (theirs if "cell" in call else theirs[2])
        else:
            same_outcome(both, call, argument)


def test_autocast_dtypes():
    """nn.GRU has the dtype of its state on a CPU, and half width on a GPU; ours is alike on both."""
    rnn, cell = drop_in.GRU(IN, H), drop_in.GRUCell(IN, H)
    x, h = torch.randn(S, B, IN), torch.randn(1, B, H)
    with torch.autocast("cpu", torch.bfloat16):
        for each in (x, x.bfloat16()):
            for hx in (None, h):
                out, last = rnn(each, hx)
                assert (out.dtype, last.dtype) == (torch.bfloat16, torch.float32)
                assert cell(each[0], None if hx is None else hx[0]).dtype == torch.float32
        packed, last = rnn(pack_sequence([x.bfloat16()[:, 0]]), h[:, :1])
        assert (packed.data.dtype, last.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_width(half):
    rnn = drop_in.GRU(IN, H, 2, dtype=half)
    wide = copy.deepcopy(rnn).double()
    x, h = torch.randn(50, B, IN, dtype=half), torch.randn(2, B, H, dtype=half)
    for hx in (None, h):
        got = rnn(x, hx)
        expected = wide(x.double(), None if hx is None else hx.double())
        assert {each.dtype for each in got} == {half}
        assert_close([each.double() for each in got], list(expected), rtol=0.02, atol=0.02)


def test_messages_tell_the_remedy():
    first, x = drop_in.GRU(IN, H, batch_first=True), torch.randn(B, S, IN)
    for call, remedy in {
        "first(x, (h, h))": "unlike the (h, c) of an LSTM, the state is one tensor",
        "first(x, h.transpose(0, 1))": "batch_first applies to the input only; the state is always (L * D, B, H)",
        "first(x, h[:, :, None])": "use hx.squeeze(-2) for a state of mingru.MinGRU",
        "first(x.numpy())": "use torch.as_tensor",
        "first(x.double())": "use input.to(torch.float32)",
        "first(x, h.double())": "use hx.to(torch.float32)",
        "drop_in.GRU(3, 4, proj_size=2)": "apply a torch.nn.Linear to the output",
    }.items():
        error = outcome(call, {"first": first, "x": x, "h": torch.zeros(1, B, H), "drop_in": drop_in})
        assert str(error).endswith("; " + remedy), error


def test_dropout_without_a_layer_to_drop_warns_as_torch_does():
    for home in (nn, drop_in):
        with pytest.warns(UserWarning, match="dropout=0.5"):
            home.GRU(IN, H, dropout=0.5)


# What is computed


def make(kind=drop_in.GRU, **options):
    return kind(IN, H, **options, dtype=torch.double)


OPTIONS = [
    {},
    {"num_layers": 3},
    {"bias": False},
    {"batch_first": True},
    {"bidirectional": True},
    {"num_layers": 2, "batch_first": True, "bidirectional": True},
    {"num_layers": 2, "residual": True, "norm": "rms"},
    {"candidate": "linear"},
    {"candidate": "tanh", "num_layers": 2},
]
options_of = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "plain")


def arguments(rnn, steps=23):
    """x in the module's order, and a state (L * D, B, H) of any sign."""
    shape = (B, steps, IN) if rnn.batch_first else (steps, B, IN)
    count = rnn.num_layers * (2 if rnn.bidirectional else 1)
    return torch.randn(shape).double(), torch.randn(count, B, H).double()


@options_of
@pytest.mark.parametrize("with_h", [False, True])
def test_equals_the_reference(options, with_h):
    rnn = make(**options)
    x, h = arguments(rnn)

    def batched(sequence):
        return sequence if rnn.batch_first else sequence.transpose(0, 1)

    def truth(x, h):
        out, last = reference.layers(rnn, batched(x), h.unsqueeze(2))
        return batched(out), last.squeeze(2)

    results = []
    for function in (rnn, truth):
        leaf = x.clone().requires_grad_()
        state = h.clone().requires_grad_() if with_h else None
        zeros = torch.zeros_like(h) if function is truth else None
        out, last = function(leaf, zeros if state is None else state)
        weight = torch.linspace(-1, 2, out.numel()).double().view(out.shape)
        leaves = [leaf, *rnn.parameters(), *([state] if with_h else [])]
        results.append([out, last, *torch.autograd.grad((out * weight).sum() + last.square().sum(), leaves)])
    assert_close(*results, **TIGHT)


@options_of
def test_is_a_mingru_that_starts_at_zero(options):
    rnn = make(**options)
    plain = make(mingru.MinGRU, **{"batch_first": False, **options})
    plain.load_state_dict(rnn.state_dict())
    x, h = arguments(rnn)
    for hx in (h, None, torch.zeros_like(h)):
        out, last = plain(x, (torch.zeros_like(h) if hx is None else hx).unsqueeze(2))
        assert_close(rnn(x, hx), (out, last.squeeze(2)), rtol=0, atol=0)
    if rnn.candidate == "positive":
        assert not torch.equal(rnn(x)[0], plain(x)[0])  # which starts at 0.5
    drawn = [weight.clone() for weight in plain.parameters()]
    torch.manual_seed(1)
    plain.reset_parameters()
    torch.manual_seed(1)
    rnn.reset_parameters()
    assert_close(list(rnn.parameters()), list(plain.parameters()), rtol=0, atol=0)
    assert not torch.equal(drawn[0], plain.layers[0].linear.weight)


def test_gradients():
    rnn = make(num_layers=2, bidirectional=True)
    packed = pack_sequence([torch.randn(2, IN).double(), torch.randn(4, IN).double()], enforce_sorted=False)
    x, h = torch.randn(4, B, IN).double(), torch.randn(4, B, H).double()
    weights = dict(rnn.named_parameters())

    def run(x, h, *values):
        return torch.func.functional_call(rnn, dict(zip(weights, values, strict=True)), (x, h))

    def run_packed(rows, h, *values):
        out, last = run(PackedSequence(rows, *packed[1:]), h, *values)
        return out.data, last

    for function, leaf in ((run, x), (run_packed, packed.data)):
        leaves = [each.detach().clone().requires_grad_() for each in (leaf, h, *weights.values())]
        assert torch.autograd.gradcheck(function, leaves)
    cell = make(drop_in.GRUCell)
    assert torch.autograd.gradcheck(cell, [torch.randn(B, n).double().requires_grad_() for n in (IN, H)])


@pytest.mark.parametrize("sort", [False, True])
@options_of
def test_packed_equals_each_sequence_alone(options, sort):
    rnn = make(**options)
    lengths = [7, 4, 4, 1] if sort else [4, 1, 7, 4]
    sequences = [torch.randn(length, IN).double() for length in lengths]
    h = torch.randn(arguments(rnn)[1].shape[0], len(lengths), H).double()
    for hx in (None, h):
        packed, last = rnn(pack_sequence(sequences, enforce_sorted=sort), hx)
        outs, counted = pad_packed_sequence(packed, batch_first=True)
        assert counted.tolist() == lengths
        for at, sequence in enumerate(sequences):
            out, state = rnn(sequence, None if hx is None else hx[:, at])
            assert_close(outs[at, : lengths[at]], out, **TIGHT)
            assert_close(last[:, at], state, **TIGHT)


@pytest.mark.parametrize("batch_first", [False, True])
def test_state_goes_on(batch_first):
    rnn = make(num_layers=2, batch_first=batch_first)
    x, h = arguments(rnn)
    out, last = rnn(x, h)
    pieces, state = [], h
    for piece in x.split([1, 20, 2], 1 if batch_first else 0):
        piece_out, state = rnn(piece, state)
        pieces.append(piece_out)
    assert_close((torch.cat(pieces, 1 if batch_first else 0), state), (out, last), **TIGHT)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"candidate": "tanh", "norm": "layer"}], ids=str)
def test_cell_steps_through_the_layer(options):
    rnn, cell = make(**options), make(drop_in.GRUCell, **options)
    cell.load_state_dict(rnn.state_dict())
    x, h = arguments(rnn)
    for hx in (None, h[0]):
        out, last = rnn(x, None if hx is None else hx[None])
        state = hx
        for step, expected in zip(x, out, strict=True):
            before, state = state, cell(step, state)
            assert_close(state, expected, **TIGHT)
            assert_close(cell(step[1], None if before is None else before[1]), expected[1], **TIGHT)
        assert_close(state, last[0], **TIGHT)


def test_dropout_is_between_the_layers():
    rnn = make(num_layers=2, dropout=1.0)
    x, h = arguments(rnn)
    dropped = make()
    upper = {name.replace("layers.1", "layers.0"): weight for name, weight in rnn.layers[1].state_dict().items()}
    top = drop_in.GRU(H, H, dtype=torch.double)
    top.layers[0].load_state_dict(upper)
    out, _ = rnn(x, h)
    assert_close(out, top(torch.zeros(23, B, H).double(), h[1:])[0], **TIGHT)
    dropped.layers[0].load_state_dict(rnn.layers[0].state_dict())
    assert_close(rnn.eval()(x, h)[0], top(dropped(x, h[:1])[0], h[1:])[0], **TIGHT)


# A module among modules


class Around(nn.Module):
    """nn.GRU itself can't be called when scripted on its own."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, h: torch.Tensor | None = None):
        return self.rnn(x, h)


@pytest.mark.slow
@options_of
def test_scripted(options):
    rnn = make(**options)
    x, h = arguments(rnn)
    for module in (Around(rnn), rnn):
        saved = io.BytesIO()
        torch.jit.save(torch.jit.script(module), saved)
        saved.seek(0)
        run = torch.jit.load(saved)
        for _ in range(3):
            for call in ((x,), (x, h), (x[0],), (x[0], h[:, 0])):
                assert_close(run(*call), rnn(*call), **TIGHT)
        for call in ((x[..., :2],), (x[None],), (x[:0, :0],), (x, h[:, :1]), (x, h[:, 0]), (x[0], h)):
            with pytest.raises(torch.jit.Error, match=r"GRU: (input|hx) must be"):
                run(*call)


@pytest.mark.parametrize("home", [nn, drop_in])
def test_scripts_as_torch_does(home):
    torch.jit.script(Around(home.GRU(IN, H, 2, bidirectional=True)))(torch.randn(S, B, IN))
    cell = torch.jit.script(home.GRUCell(IN, H))
    assert cell(torch.randn(B, IN), torch.randn(B, H)).shape == (B, H)
    assert cell(torch.randn(IN)).shape == (H,)
    for call in ((torch.randn(B, IN - 1),), (torch.randn(B, IN), torch.randn(1, H)), (torch.randn(1, B, IN),)):
        with pytest.raises((RuntimeError, torch.jit.Error)):
            cell(*call)


@options_of
def test_copies_and_state_dicts(options):
    rnn = make(**options).eval()
    x, h = arguments(rnn)
    saved = io.BytesIO()
    torch.save(rnn.state_dict(), saved)
    saved.seek(0)
    other = make(**options)
    other.load_state_dict(torch.load(saved), strict=True)
    for twin in (other, copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert_close(twin(x), rnn(x), rtol=0, atol=0)
        assert_close(twin(x, h), rnn(x, h), rtol=0, atol=0)
        assert repr(twin) == repr(rnn)
        assert not {each.data_ptr() for each in twin.parameters()} & {each.data_ptr() for each in rnn.parameters()}
    cell = make(drop_in.GRUCell)
    y = torch.randn(B, IN).double()
    for twin in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert_close(twin(y), cell(y), rtol=0, atol=0)
        assert repr(twin) == repr(cell) == "GRUCell(3, 4)"


def test_attributes():
    options = {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.25, "bidirectional": True}
    for values in ({}, options):
        theirs, ours = nn.GRU(IN, H, **values), drop_in.GRU(IN, H, **values)
        for name in ("input_size", "hidden_size", "mode", "proj_size", "training", *options):
            assert getattr(ours, name) == getattr(theirs, name), name
            assert type(getattr(ours, name)) is type(getattr(theirs, name)), name
        assert ours.flatten_parameters() is theirs.flatten_parameters() is None
    theirs, ours = nn.GRUCell(IN, H, False), drop_in.GRUCell(IN, H, False)
    assert [getattr(ours, name) for name in ("input_size", "hidden_size", "bias")] == [IN, H, False]
    assert not hasattr(theirs, "mode")


@options_of
def test_all_weights(options):
    rnn = make(**options)
    theirs = nn.GRU(IN, H, rnn.num_layers, rnn.bias, bidirectional=rnn.bidirectional)
    assert len(rnn.all_weights) == len(theirs.all_weights)
    found = [weight for weights in rnn.all_weights for weight in weights]
    ends = ("linear.weight", "linear.bias", "linear_reverse.weight", "linear_reverse.bias")
    named = {name: weight for name, weight in rnn.named_parameters() if name.endswith(ends)}
    assert [id(weight) for weight in found] == [id(weight) for weight in named.values()]
    assert [len(weights) for weights in rnn.all_weights] == [1 + rnn.bias] * len(rnn.all_weights)
    torch.jit.script(rnn)


def test_no_names_of_weights_that_are_not_there():
    for rnn, names in (
        (drop_in.GRU(IN, H), ("weight_ih_l0", "bias_hh_l0", "_flat_weights", "_flat_weights_names", "_all_weights")),
        (drop_in.GRUCell(IN, H), ("weight_ih", "bias_hh", "all_weights", "proj_size", "mode")),
    ):
        for name in names:
            assert not hasattr(rnn, name)


@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
def test_apply_takes_a_layer_for_one_module(name):
    def init(module):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            module.bias.data.zero_()

    for home in (nn, drop_in):
        rnn = getattr(home, name)(IN, H, bias=False)
        model = nn.Sequential(nn.ModuleList([rnn]), nn.Linear(H, 1))
        before = [weight.clone() for weight in rnn.parameters()]
        seen = []
        assert model.apply(seen.append) is model
        assert seen == [rnn, model[0], model[1], model]
        model.apply(init)
        assert not model[1].bias.any()
        assert_close(list(rnn.parameters()), before, rtol=0, atol=0)
        assert rnn.apply(init) is rnn


def test_apply_reaches_what_was_put_into_a_layer():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

    rnn = drop_in.GRU(IN, H, 2, norm="layer", residual=True)
    adapter = rnn.layers[0].linear = Adapter(rnn.layers[0].linear)
    observer = rnn.layers[1].linear.observer = nn.Identity()
    seen = []
    rnn.apply(seen.append)
    assert seen == [adapter.base, adapter, observer, rnn]


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning")
def test_apply_reaches_fake_quantization():
    rnn = drop_in.GRU(IN, H)
    rnn.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    torch.ao.quantization.prepare_qat(rnn, inplace=True)
    quantizers = [each for each in rnn.modules() if isinstance(each, torch.ao.quantization.FakeQuantizeBase)]
    assert quantizers
    assert all(each.fake_quant_enabled for each in quantizers)
    rnn.apply(torch.ao.quantization.disable_fake_quant)
    assert not any(each.fake_quant_enabled for each in quantizers)


def test_is_no_instance_of_torchs_since_none_compiles():
    assert not isinstance(drop_in.GRU(IN, H), nn.RNNBase)
    assert not isinstance(drop_in.GRUCell(IN, H), nn.RNNCellBase)

    class Alike(nn.GRU):
        def forward(self, x):
            return x * self.hidden_size

    x = torch.randn(S, B, IN)
    torch.compiler.reset()
    # Where this passes, an instance of nn.GRU may be one graph, and ours may be instances.
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        torch.compile(Alike(IN, H), fullgraph=True, backend="eager")(x)


def test_repr_tells_what_torch_has_not():
    rnn = drop_in.GRU(3, 4, 2, residual=True, norm="rms", candidate="tanh")
    assert repr(rnn) == "GRU(3, 4, num_layers=2, residual=True, norm='rms', candidate='tanh')"
    assert repr(eval(repr(rnn), vars(drop_in))) == repr(rnn)

    class Other(drop_in.GRU):
        pass

    assert repr(Other(3, 4)) == "Other(3, 4)"
    with pytest.raises(ValueError, match=r"^Other: input must be"):
        Other(3, 4)(torch.zeros(3))


# replace


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        shared = nn.GRU(IN, H, batch_first=True)
        self.encoder = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(1, 1))})
        self.layers = nn.ModuleList([nn.GRU(IN, H, 2, False, False, 0.25, True, dtype=torch.double).eval()])
        self.cell = nn.GRUCell(IN, H, bias=False, device="meta")
        self.lstm = nn.LSTM(IN, H)
        self.missing = None


class Own(nn.GRU):
    pass


def test_replace():
    model = Model()
    model.encoder.register_forward_hook(lambda *args: None)  # not on a layer
    report = drop_in.replace(model)
    a, layer, cell = model.encoder["a"], model.layers[0], model.cell
    assert type(a) is type(layer) is drop_in.GRU
    assert type(cell) is drop_in.GRUCell
    assert a is model.encoder["b"][0]
    assert type(model.lstm) is nn.LSTM
    assert a.training
    assert not layer.training
    assert [next(each.parameters()).dtype for each in (a, layer)] == [torch.float, torch.double]
    assert cell.layers[0].linear.weight.is_meta
    assert all(weight.requires_grad for weight in model.parameters())
    in_full = "num_layers=2, bias=False, dropout=0.25, bidirectional=True"
    assert report.replaced == [
        ("cell", "torch.nn.GRUCell(3, 4, bias=False)", "mingru.drop_in.GRUCell(3, 4, bias=False)"),
        ("encoder.a", "torch.nn.GRU(3, 4, batch_first=True)", "mingru.drop_in.GRU(3, 4, batch_first=True)"),
        ("encoder.b.0", "torch.nn.GRU(3, 4, batch_first=True)", "mingru.drop_in.GRU(3, 4, batch_first=True)"),
        ("layers.0", f"torch.nn.GRU(3, 4, {in_full})", f"mingru.drop_in.GRU(3, 4, {in_full})"),
    ]
    assert report.left == []
    assert str(report).splitlines()[1] == (
        "encoder.a: torch.nn.GRU(3, 4, batch_first=True) -> mingru.drop_in.GRU(3, 4, batch_first=True)"
    )
    out, h = layer(torch.randn(S, B, IN).double())
    assert (out.shape, h.shape) == ((S, B, 2 * H), (4, B, H))
    again = drop_in.replace(model)
    assert (again.replaced, again.left, str(again)) == ([], [], "nothing to replace")
    assert model.encoder["a"] is a


def test_replace_leaves_subclasses():
    model = nn.ModuleList([Own(IN, H), nn.GRU(IN, H)])
    report = drop_in.replace(model)
    assert type(model[0]) is Own
    assert [name for name, _, _ in report.replaced] == ["1"]
    assert report.left == [("0", f"{__name__}.Own(3, 4)", "a subclass may compute something else")]
    assert str(report).endswith(f"0: {__name__}.Own(3, 4) not replaced: a subclass may compute something else")


def test_replace_does_not_warn_again():
    with pytest.warns(UserWarning, match="dropout"):
        model = nn.Sequential(nn.GRU(IN, H, dropout=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drop_in.replace(model)
    assert model[0].dropout == 0.5


@pytest.mark.parametrize(
    "hook",
    [
        lambda rnn: rnn.register_forward_hook(print),
        lambda rnn: rnn.register_forward_pre_hook(print),
        lambda rnn: rnn.register_full_backward_hook(print),
        lambda rnn: rnn.register_state_dict_pre_hook(print),
        lambda rnn: rnn.register_load_state_dict_post_hook(print),
    ],
)
def test_replace_refuses_hooks_and_then_changes_nothing(hook):
    model = nn.ModuleDict({"plain": nn.GRU(IN, H), "hooked": nn.GRU(IN, H)})
    before = list(model.values())
    handle = hook(model["hooked"])
    with pytest.raises(ValueError, match=r"^replace: hooked must be a layer without hooks, got hooks; remove them"):
        drop_in.replace(model)
    assert list(model.values()) == before
    handle.remove()
    assert len(drop_in.replace(model).replaced) == 2


@pytest.mark.parametrize("layer", [nn.GRU(IN, H), nn.GRUCell(IN, H), Own(IN, H)])
def test_replace_refuses_a_layer_itself(layer):
    with pytest.raises(ValueError, match=r"^replace: module must be a model that contains the layers, got .+ itself; "):
        drop_in.replace(layer)


def test_replace_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"^replace: module must be a torch\.nn\.Module, got list$"):
        drop_in.replace([nn.GRU(IN, H)])


def test_replaced_models_run_as_before():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(IN, H, 2, batch_first=True, bidirectional=True)
            self.head = nn.Linear(2 * H, 7)

        def forward(self, x, lengths):
            self.rnn.flatten_parameters()
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            h = x.new_zeros(self.rnn.num_layers * 2, x.size(0), self.rnn.hidden_size)
            out, _ = self.rnn(packed, h)
            return self.head(pad_packed_sequence(out, batch_first=True)[0])

    model, x, lengths = Tagger(), torch.randn(3, 6, IN), torch.tensor([2, 6, 5])
    before = model(x, lengths)
    drop_in.replace(model)
    after = model(x, lengths)
    assert after.shape == before.shape
    after.sum().backward()
    assert all(weight.grad.any() for weight in model.parameters())


# The guide
