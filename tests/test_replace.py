"""replace: which layers of a model are replaced, what the report says, and what is refused."""

import warnings

import pytest
import torch
from torch import nn

from mingru import drop_in

S, B, IN, H = 5, 2, 3, 4


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        shared = nn.GRU(IN, H, batch_first=True)
        self.encoder = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(1, 1))})
        self.layers = nn.ModuleList([nn.GRU(IN, H, 2, False, False, 0.25, True, dtype=torch.double).eval()])
        self.cell = nn.GRUCell(IN, H, bias=False, device="meta")
        self.lstm, self.own, self.rnn = nn.LSTM(IN, H), Own(IN, H), nn.RNNCell(IN, H)
        self.missing = None


class Own(nn.GRU):
    pass


def test_replace():
    model = Model()
    model.encoder.register_forward_hook(lambda *args: None)  # not on a layer
    report = drop_in.replace(model, lstm=False)
    a, layer, cell = model.encoder["a"], model.layers[0], model.cell
    assert type(a) is type(layer) is drop_in.GRU and type(cell) is drop_in.GRUCell
    assert a is model.encoder["b"][0] and type(model.lstm) is nn.LSTM and type(model.own) is Own
    assert a.training and not layer.training
    assert [next(each.parameters()).dtype for each in (a, layer)] == [torch.float, torch.double]
    assert cell.layers[0].linear.weight.is_meta
    assert all(weight.requires_grad for weight in model.parameters())
    replaced = {
        "cell": "GRUCell(3, 4, bias=False)",
        "encoder.a": "GRU(3, 4, batch_first=True)",
        "encoder.b.0": "GRU(3, 4, batch_first=True)",
        "layers.0": "GRU(3, 4, num_layers=2, bias=False, dropout=0.25, bidirectional=True)",
    }
    assert report.replaced == [(key, f"torch.nn.{name}", f"mingru.drop_in.{name}") for key, name in replaced.items()]
    left = {
        ("lstm", "torch.nn.LSTM(3, 4)"): "lstm is False",
        ("own", f"{__name__}.Own(3, 4)"): "a subclass may compute something else",
        ("rnn", "torch.nn.RNNCell(3, 4)"): "only GRUs and LSTMs are replaced",
    }
    assert report.left == [(*layer, why) for layer, why in left.items()]
    assert str(report).splitlines() == [
        *(f"{key}: torch.nn.{name} -> mingru.drop_in.{name}" for key, name in replaced.items()),
        *(f"{key}: {name} not replaced: {why}" for (key, name), why in left.items()),
    ]
    out, h = layer(torch.randn(S, B, IN).double())
    assert (out.shape, h.shape) == ((S, B, 2 * H), (4, B, H))
    with pytest.warns(UserWarning, match=r"^replace: no layer was replaced \(lstm: torch.nn.LSTM.* lstm is False; own"):
        again = drop_in.replace(model, lstm=False)
    assert (again.replaced, again.left) == ([], report.left)
    assert [name for name, _, _ in drop_in.replace(model).replaced] == ["lstm"]
    assert type(model.lstm) is drop_in.LSTM and model.encoder["a"] is a
    with pytest.warns(UserWarning, match=r"^replace: no layer was replaced \(nothing to replace\); use patch"):
        assert str(drop_in.replace(nn.Linear(1, 1))) == "nothing to replace"


def test_replace_does_not_warn_again():
    with pytest.warns(UserWarning, match="dropout"):
        model = nn.Sequential(nn.GRU(IN, H, dropout=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drop_in.replace(model)
    assert model[0].dropout == 0.5


@pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward", "state_dict_pre", "load_state_dict_post"])
def test_replace_refuses_hooks_and_then_changes_nothing(hook):
    model = nn.ModuleDict({"plain": nn.GRU(IN, H), "hooked": nn.GRU(IN, H)})
    before = list(model.values())
    handle = getattr(model["hooked"], f"register_{hook}_hook")(print)
    with pytest.raises(ValueError, match=r"^replace: hooked must be a layer without hooks, got hooks; remove them"):
        drop_in.replace(model)
    assert list(model.values()) == before
    handle.remove()
    assert len(drop_in.replace(model).replaced) == 2
