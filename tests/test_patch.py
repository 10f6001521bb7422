"""patch: what a program builds in a block, and that nothing of it remains afterwards."""

import abc
import contextvars
import copy
import pickle
import sys
import threading
import types
import warnings
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
from cases import graded, grid, refuses, through_a_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn import GRU
from torch.testing import assert_close

import mingru
from mingru import drop_in
from mingru.drop_in import patch

IN, H = 3, 4
NAMES = ("GRU", "GRUCell", "LSTM", "LSTMCell")
OF_TORCH = {name: getattr(nn, name) for name in NAMES}


class Program(nn.Module):
    """Builds its layers in each way that programs do."""

    def __init__(self):
        super().__init__()
        self.kind = nn.GRU
        self.encoder = getattr(nn, "GRU")(IN, H, num_layers=1, batch_first=True)  # noqa: B009
        self.decoder = nn.LSTM(H, H, 1, True, True)
        self.cell = torch.nn.LSTMCell(input_size=H, hidden_size=H)
        self.head = nn.Linear(H, 1)

    def forward(self, x):
        out, _ = self.encoder(x)
        out, (h, c) = self.decoder(out)
        return self.head(self.cell(out[:, -1], (h[-1], c[-1]))[0])


def are_torchs():
    names = [getattr(nn, name) is OF_TORCH[name] for name in NAMES]
    return all(names) and GRU is OF_TORCH["GRU"]


def test_what_a_program_builds():
    with patch(norm="rms", forget_bias=2.0, num_layers=2, cell="minlstm") as report:
        model = Program()
        of_torch = OF_TORCH["GRU"](IN, H)
        assert not isinstance(model.encoder, nn.GRU) and not isinstance(of_torch, nn.GRU)
        assert nn.GRU is drop_in.GRU and type(GRU(IN, H)) is OF_TORCH["GRU"]  # bound before the block
        assert model(torch.randn(2, 5, IN)).shape == (2, 1)
    kinds = [type(each) for each in (model.encoder, model.decoder, model.cell)]
    assert are_torchs() and kinds == [drop_in.GRULike, drop_in.LSTMLike, drop_in.LSTMLikeCell]
    end = "norm='rms', cell='minlstm')"
    text = [
        f"mingru.drop_in.GRULike(3, 4, num_layers=2, batch_first=True, forget_bias=2.0, {end}",
        f"mingru.drop_in.LSTMLike(4, 4, num_layers=2, batch_first=True, forget_bias=2.0, {end}",
        f"mingru.drop_in.LSTMLikeCell(4, 4, forget_bias=2.0, {end}",
    ]
    line = Program.__init__.__code__.co_firstlineno + 3
    assert report.built == [(each, f"{__file__}:{line + at} in __init__") for at, each in enumerate(text)]
    assert str(report).splitlines()[0] == f"{__file__}:{line} in __init__: {text[0]}"


def test_the_default_keeps_its_promise():
    """What a program builds in a block is torch's, for all that it does, with and without the block."""
    torch.manual_seed(0)
    of_torch, x = Program(), torch.randn(2, 12, IN)
    torch.manual_seed(0)
    with patch() as report:
        model = Program()
    kinds = [type(each) for each in (model.encoder, model.decoder, model.cell)]
    assert kinds == [drop_in.GRU, drop_in.LSTM, drop_in.LSTMCell] and repr(model) == repr(of_torch)
    assert [layer for layer, _ in report.built] == [f"mingru.drop_in.{each!r}" for each in [*model.children()][:3]]
    assert_close(model.state_dict(), of_torch.state_dict(), rtol=0, atol=0)
    for module in (model, of_torch):  # as d2l does
        module.apply(lambda m: isinstance(m, (nn.GRU, nn.LSTM)) and nn.init.ones_(m.weight_hh_l0))
    assert_close(graded(model, model, (x,)), graded(of_torch, of_torch, (x,)), rtol=1e-4, atol=1e-5)
    again = Program()
    again.load_state_dict(through_a_file(model.state_dict()))
    with patch():
        inside = Program()
        inside.load_state_dict(through_a_file(of_torch.state_dict()))
        twins = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model), through_a_file(model, weights_only=False)]
        for each in twins:
            assert type(each.encoder) is drop_in.GRU and each.kind is drop_in.GRU
            assert_close(each(x), of_torch(x), rtol=1e-4, atol=1e-5)
    for each in (again, inside):
        assert_close(each(x), of_torch(x), rtol=1e-4, atol=1e-5)


def test_cells_can_be_left():
    with patch(cells=False, cell="gru") as report:
        assert type(nn.GRUCell(IN, H)) is OF_TORCH["GRUCell"] and type(nn.GRU(IN, H)) is drop_in.GRULike
    assert len(report.built) == 1


def test_errors_are_those_of_the_class():
    with patch(gru=False, cell="mingru"):
        assert type(nn.GRU(IN, H)) is OF_TORCH["GRU"] and nn.LSTM(IN, H, 2).cell == "mingru"
        message = r"^mingru\.drop_in\.LSTMLike: no argument 'input_dims'; use input_size$"
        refuses(TypeError, message, nn.LSTM, input_dims=3)


def test_numbers_that_torch_takes():
    """A program that passes them is not to be changed. The classes themselves take bools only."""
    given = {"num_layers": np.int64(2), "bidirectional": 0}
    model = nn.ModuleDict({"rnn": nn.GRU(IN, H, **given)})
    drop_in.replace(model, cell="mingru")
    with patch(cell="mingru"):
        for rnn in (model["rnn"], nn.GRU(IN, H, **given), nn.GRU(IN, H, np.int64(2), True)):
            assert repr(rnn).startswith("GRULike(3, 4, num_layers=2, cell='mingru')")
            assert rnn(torch.randn(2, 5, IN))[1].shape == (2, 5, H)
        for wrong in ((1.5,), (1, 0.5)):
            refuses(TypeError, "", nn.GRU, IN, H, *wrong)


def test_every_way_out():
    def generates():
        with patch():
            yield nn.GRU(IN, H)

    with pytest.raises(ZeroDivisionError), patch():
        _ = 1 / 0
    assert are_torchs()
    assert type(next(generates())) is drop_in.GRU  # the generator is closed
    assert are_torchs()


def test_blocks_in_blocks():
    with patch(norm="rms", cell="gru") as outer:
        with patch(lstm=False, norm="layer", cell="gru") as inner:
            assert nn.GRU(IN, H).norm == "layer" and nn.LSTM(IN, H).norm == "rms"
        assert nn.GRU(IN, H).norm == nn.LSTM(IN, H).norm == "rms"
        with patch(lstm=False):
            assert type(nn.GRU(IN, H)) is drop_in.GRU
    assert are_torchs() and (len(inner.built), len(outer.built)) == (1, 3)


class ReadOnly(types.ModuleType):
    def __setattr__(self, name, value):
        raise AttributeError(name)


def test_everywhere(monkeypatch):
    late, early = types.ModuleType("late"), ReadOnly("early")
    vars(early)["GRU"] = nn.GRU
    monkeypatch.setitem(sys.modules, "early", early)
    monkeypatch.setitem(sys.modules, "late", late)
    with patch(cell="mingru"):
        late.__dict__.update(kind=nn.LSTM)  # as an import in the block does
        assert type(early.GRU(IN, H)) is OF_TORCH["GRU"]
        with patch(everywhere=True, cell="mingru"):
            assert type(early.GRU(IN, H)) is type(GRU(IN, H)) is drop_in.GRULike
        assert early.GRU is GRU is OF_TORCH["GRU"]
        kept = nn.GRU
        assert type(late.kind(IN, H)) is drop_in.LSTMLike and type(kept(IN, H)) is drop_in.GRULike
    # A name that stays bound is the class that computes the same as torch's.
    assert type(late.kind(IN, H)) is drop_in.LSTM and type(kept(IN, H)) is drop_in.GRU and are_torchs()


def test_a_block_ends_in_every_context():
    """A copy of the context, such as a task's, may outlive the block, and another thread may leave it."""
    block = patch(cell="gru")
    block.__enter__()
    kept, copy_of_context = nn.GRU, contextvars.copy_context()
    assert type(kept(IN, H)) is copy_of_context.run(lambda: type(kept(IN, H))) is drop_in.GRULike
    thread = threading.Thread(target=block.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert are_torchs() and type(kept(IN, H)) is copy_of_context.run(lambda: type(kept(IN, H))) is drop_in.GRU


def test_threads_do_not_see_each_other():
    """Each builds what its own block says, in whatever order the blocks are left."""
    barrier, found = threading.Barrier(3, timeout=20), {}

    def run(name):
        with nullcontext() if name == "torch" else patch(norm=name, cell="gru"):
            barrier.wait()
            found[name] = nn.GRU(IN, H)
            barrier.wait()

    threads = [threading.Thread(target=run, args=(name,)) for name in ("rms", "layer", "torch")]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert (found["rms"].norm, found["layer"].norm) == ("rms", "layer") and type(found["torch"]) is drop_in.GRU
    assert are_torchs()


def defined_in_a_block(**options):
    with patch(**options) as report:
        # As pytorch-forecasting does.
        class Base(abc.ABC, nn.RNNBase):
            pass

        class Inside(Base, nn.GRU):
            pass

        nn.GRU(IN, H)
    return Inside, report


def test_subclasses_stay_what_they_are():
    with pytest.warns(UserWarning, match="Inside is not replaced, because a subclass may compute something") as seen:
        inside, report = defined_in_a_block(cell="gru")
    assert __file__ in {warning.filename for warning in seen}
    assert isinstance(inside(IN, H), GRU) and drop_in.GRULike not in inside.__mro__
    left = (f"{__name__}.{inside.__qualname__}", "a subclass may compute something else")
    assert left in report.left and not any("mingru" in name for name, _ in report.left)
    with warnings.catch_warnings():
        # The configuration ignores this warning.
        warnings.simplefilter("error")  # because nothing changes
        assert defined_in_a_block()[1].left == []


def test_a_block_that_builds_nothing_warns():
    message = r"^patch: no layer was built in the block; .* fit or train"
    with pytest.warns(UserWarning, match=message) as seen, patch():
        nn.Linear(1, 1)
    assert seen[-1].filename == __file__ and str(drop_in.PatchReport([], [])) == "nothing built"


# What was saved comes back


def test_what_was_saved_comes_back():
    options = {"norm": "rms", "num_layers": 2, "cell": "minlstm"}
    x = torch.randn(2, 5, IN)
    with patch(**options):
        model = Program()
        expected = model(x)
        pickled, weights, again = pickle.dumps(model), through_a_file(model.state_dict()), Program()
        again.load_state_dict(weights)
        loaded = [again, copy.deepcopy(model), pickle.loads(pickled), through_a_file(model, weights_only=False)]
        for other in loaded:
            assert_close(other(x), expected, rtol=0, atol=0)
        assert all(other.kind is nn.GRU for other in loaded)
    assert type(pickle.loads(pickled).encoder) is drop_in.GRULike
    # The program builds torch's layers, until they are replaced.
    refuses(RuntimeError, r"encoder\.load_in_mingru_drop_in_patch", Program().load_state_dict, weights)
    other = Program()
    drop_in.replace(other, **options)
    other.load_state_dict(weights)
    assert_close([*other.parameters()], [*model.parameters()], rtol=0, atol=0)


REFUSED = "size mismatch for rnn.{}_hh.*: copying a param with shape torch.Size.* from checkpoint"


@grid(name=NAMES, bias=[True, False], strict=[True, False])
def test_torchs_layers_refuse_weights_of_other_cells(name, bias, strict):
    """RLlib, for example, is not strict, and would play with weights of torch's initialization."""
    kind, cell, _ = name.partition("Cell")
    make = partial(getattr(drop_in, f"{kind}Like{cell}"), IN, H, bias=bias, cell=f"min{kind.lower()}")
    ours, of_torch = (nn.ModuleDict({"rnn": rnn}) for rnn in (make(), getattr(nn, name)(IN, H, bias=bias)))
    state_dict = ours.state_dict()
    message = "(?s)" + "rnn.load_in_mingru_drop_in_patch.*" * strict + REFUSED.format("bias" if bias else "weight")
    for other in (of_torch, nn.ModuleDict({"rnn": getattr(drop_in, name)(IN, H, bias=bias)})):
        refuses(RuntimeError, message, other.load_state_dict, state_dict, strict=strict)
    message = r"state_dict must be weights of .*, got rnn.weight_ih.*accelerate"
    refuses(RuntimeError, message, ours.load_state_dict, of_torch.state_dict(), strict=strict)
    # Files of our other layers load, which have no guards, and ours load there.
    old = {key: value for key, value in state_dict.items() if "layers" in key}
    assert len(old) == len(state_dict) - 2 == len([*ours.parameters()])
    with torch.device("meta"):
        empty = nn.ModuleDict({"rnn": make()})
    for each in (state_dict, old):
        copy.deepcopy(ours).load_state_dict(each, strict=strict)
        assert not any(value.is_meta for value in empty.load_state_dict(each, assign=True) and empty.buffers())
    other = nn.ModuleDict({"rnn": getattr(mingru, f"Min{name}")(IN, H, bias=bias)})
    other.load_state_dict(state_dict)
    ours.load_state_dict(other.state_dict())


def test_the_guards_are_saved_as_other_buffers_are(tmp_path):
    model = nn.Sequential(drop_in.GRULike(IN, H))
    state_dict = get_model_state_dict(model)  # of torch.distributed: it asks for each key as an attribute
    set_model_state_dict(model, state_dict)
    assert [*state_dict] == [*model.state_dict()]
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    safetensors.torch.load_model(model, tmp_path / "model.safetensors")


def test_compiled_layers_of_another_cell():
    torch.compiler.reset()
    x = torch.randn(2, 5, IN)
    with patch(cell="mingru"):
        rnn = nn.GRU(IN, H)
        compiled = torch.compile(rnn, fullgraph=True, backend="eager")
        assert_close(compiled(x), rnn(x))
