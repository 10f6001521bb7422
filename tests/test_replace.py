"""replace: which layers of a model are replaced, what the report says, and what is refused."""

import warnings

import pytest
import torch
from refusals import assert_refused
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import mingru
from mingru import drop_in

S, B, IN, H = 5, 2, 3, 4


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
    report = drop_in.replace(model, lstm=False)
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
    assert report.left == [("lstm", "torch.nn.LSTM(3, 4)", "lstm is False")]
    assert str(report).splitlines()[1] == (
        "encoder.a: torch.nn.GRU(3, 4, batch_first=True) -> mingru.drop_in.GRU(3, 4, batch_first=True)"
    )
    out, h = layer(torch.randn(S, B, IN).double())
    assert (out.shape, h.shape) == ((S, B, 2 * H), (4, B, H))
    with pytest.warns(
        UserWarning, match=r"^replace: no layer was replaced \(lstm: torch.nn.LSTM.* lstm is False\); use p"
    ):
        again = drop_in.replace(model, lstm=False)
    assert (again.replaced, again.left) == ([], report.left)
    assert [name for name, _, _ in drop_in.replace(model).replaced] == ["lstm"]
    assert type(model.lstm) is drop_in.LSTM
    with pytest.warns(UserWarning, match=r"^replace: no layer was replaced \(nothing to replace\)"):
        assert str(drop_in.replace(model)) == "nothing to replace"
    assert model.encoder["a"] is a


def test_replace_says_what_it_left_and_why():
    model = nn.ModuleList([Own(IN, H), nn.GRU(IN, H), nn.LSTM(IN, H), nn.RNNCell(IN, H)])
    report = drop_in.replace(model, lstm=False)
    assert type(model[0]) is Own
    assert [name for name, _, _ in report.replaced] == ["1"]
    assert report.left[0] == ("0", f"{__name__}.Own(3, 4)", "a subclass may compute something else")
    assert str(report).splitlines()[1:] == [
        f"0: {__name__}.Own(3, 4) not replaced: a subclass may compute something else",
        "2: torch.nn.LSTM(3, 4) not replaced: lstm is False",
        "3: torch.nn.RNNCell(3, 4) not replaced: only GRUs and LSTMs are replaced",
    ]


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_torch_are_refused(strict):
    block = r".* outside of mingru\.drop_in\.patch\(\)"
    for layer, old, remedy in (
        (drop_in.GRU(IN, H), nn.GRU(IN, H), block),
        (drop_in.GRUCell(IN, H), nn.GRUCell(IN, H), block),
        (drop_in.LSTM(IN, H), nn.LSTM(IN, H), block),
        (mingru.MinLSTM(IN, H), nn.LSTM(IN, H), ""),
    ):
        model, weights = nn.ModuleDict({"rnn": layer}), nn.ModuleDict({"rnn": old}).state_dict()
        message = rf"state_dict must be weights of .* got rnn\.weight_ih(_l0)? of torch\.nn;{remedy}"
        with pytest.raises(RuntimeError, match=message) as raised:
            model.load_state_dict(weights, strict=strict)
        assert str(raised.value).count("state_dict must be") == 1


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


def test_replace_refuses_what_it_cannot_replace_in_place():
    itself = r"model must be a model that contains the layers, got .+ itself; "
    cases = {
        "layer": ({"model": nn.GRU(IN, H)}, ValueError, itself),
        "cell": ({"model": nn.GRUCell(IN, H)}, ValueError, itself),
        "subclass": ({"model": Own(IN, H)}, ValueError, itself),
        "list": ({"model": [nn.GRU(IN, H)]}, TypeError, r"model must be a torch\.nn\.Module, got list$"),
    }
    assert_refused(drop_in.replace, cases, "replace: ")


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
