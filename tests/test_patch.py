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

import numpy as np
import pytest
import safetensors.torch
import torch
from cases import grid, refuses, through_a_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn import GRU

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
        out, (h, c) = self.decoder(out) if isinstance(self.decoder, nn.LSTM) else None
        return self.head(self.cell(out[:, -1], (h[-1], c[-1]))[0])


def are_torchs():
    names = [getattr(nn, name) is OF_TORCH[name] for name in NAMES]
    return all(names) and GRU is OF_TORCH["GRU"]


def test_what_a_program_builds():
    with patch(norm="rms", forget_bias=2.0, num_layers=2, cell="minlstm") as report:
        model = Program()
        kinds = [type(each) for each in (model.encoder, model.decoder, model.cell)]
        of_torch = OF_TORCH["GRU"](IN, H)
        assert isinstance(model.encoder, nn.GRU) and isinstance(of_torch, nn.GRU)
        assert not isinstance(model.encoder, nn.LSTM) and not isinstance(model.head, nn.GRU)
        assert issubclass(type(model.encoder), nn.GRU) and issubclass(nn.GRU, nn.Module) and nn.GRU.__name__ == "GRU"
        assert type(GRU(IN, H)) is OF_TORCH["GRU"]  # bound before the block
        assert model(torch.randn(2, 5, IN)).shape == (2, 1)
    assert are_torchs() and kinds == [drop_in.GRU, drop_in.LSTM, drop_in.LSTMCell]
    text = [
        "mingru.drop_in.GRU(3, 4, num_layers=2, batch_first=True, norm='rms')",
        "mingru.drop_in.LSTM(4, 4, num_layers=2, batch_first=True, forget_bias=2.0, norm='rms')",
        "mingru.drop_in.LSTMCell(4, 4, forget_bias=2.0, norm='rms')",
    ]
    line = Program.__init__.__code__.co_firstlineno + 3
    assert report.built == [(each, f"{__file__}:{line + at} in __init__") for at, each in enumerate(text)]
    assert str(report).splitlines()[0] == f"{__file__}:{line} in __init__: {text[0]}"
    assert not isinstance(model.encoder, nn.GRU) and isinstance(Program().encoder, nn.GRU)
    hint = "a loop that sets biases to 0 undoes forget_bias and memory: call reset_parameters() of these layers"
    assert str(report).splitlines()[-1] == f"{hint} after it"


def test_the_default_is_torchs_gru():
    """One block: values, weights of torch, and their names. An LSTM has a pair, and other equations."""
    gru, cell, x = nn.GRU(IN, H, 2, bidirectional=True), nn.GRUCell(IN, H), torch.randn(5, 2, IN)
    with patch() as report:
        model = nn.ModuleDict({"gru": nn.GRU(IN, H, 2, bidirectional=True), "cell": nn.GRUCell(IN, H)})
        lstm = nn.LSTM(IN, H)
    assert "loop" not in str(report) and lstm.cell == "gru" and lstm.block_size is None
    model.load_state_dict(nn.ModuleDict({"gru": gru, "cell": cell}).state_dict())
    torch.testing.assert_close((model["gru"](x), model["cell"](x[0])), (gru(x), cell(x[0])))
    ours = drop_in.GRU.from_torch(gru)
    for each in (model["gru"], ours, ours.to_torch()):
        torch.testing.assert_close(each(x), gru(x))
        for name, weight in gru.named_parameters():
            if "weight" in name:
                torch.testing.assert_close(getattr(each, name), weight, rtol=0, atol=0)
        both = ours.bias_ih_l1_reverse + ours.bias_hh_l1_reverse
        torch.testing.assert_close(both, gru.bias_ih_l1_reverse + gru.bias_hh_l1_reverse)
    torch.testing.assert_close(mingru.GRUCell.from_torch(cell)(x[0]), cell(x[0]))
    assert not hasattr(lstm, "weight_ih_l0") and not hasattr(ours, "weight_ih_l2")
    refuses(RuntimeError, "Missing key", ours.load_state_dict, {"weight_ih_l0": gru.weight_ih_l0})


# What a program may do with a bias that is mostly a part of the other one.
WRITES = {
    "data.copy_": lambda bias: bias.data.copy_(torch.ones(3 * H)),
    "data =": lambda bias: setattr(bias, "data", torch.ones(3 * H)),
    "init": lambda bias: nn.init.constant_(bias, 0.0),
    "copy_": torch.no_grad()(lambda bias: bias.copy_(torch.ones(3 * H))),
    "a slice": lambda bias: bias.detach()[:H].fill_(1.0),
    "an index": lambda bias: bias.data.__setitem__(0, 1.0),
    "+=": torch.no_grad()(lambda bias: bias.__iadd__(1.0)),
    "out=": torch.no_grad()(lambda bias: torch.ones(3 * H, out=bias.data)),
    "foreach": torch.no_grad()(lambda bias: torch._foreach_zero_([bias])),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_bias_that_is_computed_refuses_to_be_changed(write):
    with patch():
        model = nn.ModuleList([nn.GRU(IN, H), nn.GRUCell(IN, H)])
    for bias in (model[0].bias_hh_l0, model[1].bias_hh):
        refuses(RuntimeError, r"bias_hh cannot be changed, .* load_state_dict", WRITES[write], bias)
    model[1].weight_ih.data.fill_(2.0)
    assert model[1].layers[0].linear.weight.eq(2.0).all() and type(bias + 1) is torch.Tensor


def test_cells_can_be_left():
    with patch(cells=False) as report:
        assert type(nn.GRUCell(IN, H)) is OF_TORCH["GRUCell"] and type(nn.GRU(IN, H)) is drop_in.GRU
    assert len(report.built) == 1


def test_errors_are_those_of_the_class():
    with patch(gru=False, cell="mingru"):
        assert type(nn.GRU(IN, H)) is OF_TORCH["GRU"] and nn.LSTM(IN, H, 2).cell == "mingru"
        refuses(TypeError, r"^mingru\.drop_in\.LSTM: no argument 'input_dims'; use input_size$", nn.LSTM, input_dims=3)


def test_numbers_that_torch_takes():
    """A program that passes them is not to be changed. The classes themselves take bools only."""
    given = {"num_layers": np.int64(2), "bidirectional": 0}
    model = nn.ModuleDict({"rnn": nn.GRU(IN, H, **given)})
    drop_in.replace(model)
    with patch():
        for rnn in (model["rnn"], nn.GRU(IN, H, **given), nn.GRU(IN, H, np.int64(2), True)):
            assert repr(rnn) == "GRU(3, 4, num_layers=2, cell='gru')"
            assert rnn(torch.randn(2, 5, IN))[1].shape == (2, 5, H)
        for wrong in ((1.5,), (1, 0.5)):
            refuses(TypeError, "", nn.GRU, IN, H, *wrong)


def test_every_way_out():
    def generates():
        with patch():
            yield nn.GRU(IN, H)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "patch: no layer was built")
        with pytest.raises(ZeroDivisionError), patch():
            _ = 1 / 0
    assert are_torchs()
    assert type(next(generates())) is drop_in.GRU  # the generator is closed
    assert are_torchs()


def test_blocks_in_blocks():
    with patch(norm="rms") as outer:
        with patch(lstm=False, norm="layer") as inner:
            assert nn.GRU(IN, H).norm == "layer" and nn.LSTM(IN, H).norm == "rms"
        assert nn.GRU(IN, H).norm == nn.LSTM(IN, H).norm == "rms"
    assert are_torchs() and (len(inner.built), len(outer.built)) == (1, 3)


class ReadOnly(types.ModuleType):
    def __setattr__(self, name, value):
        raise AttributeError(name)


def test_everywhere(monkeypatch):
    late, early = types.ModuleType("late"), ReadOnly("early")
    vars(early)["GRU"] = nn.GRU
    monkeypatch.setitem(sys.modules, "early", early)
    monkeypatch.setitem(sys.modules, "late", late)
    with patch():
        late.__dict__.update(kind=nn.LSTM)  # as an import in the block does
        assert type(early.GRU(IN, H)) is OF_TORCH["GRU"]
        with patch(everywhere=True):
            assert type(early.GRU(IN, H)) is type(GRU(IN, H)) is drop_in.GRU
        assert early.GRU is GRU is OF_TORCH["GRU"]
        with patch():
            nn.GRU(IN, H)
        assert type(late.kind(IN, H)) is drop_in.LSTM  # still in the block that has bound it
        kept = nn.GRU
        assert type(kept(IN, H)) is drop_in.GRU
    assert late.kind is OF_TORCH["LSTM"] and are_torchs()
    # A name that stays bound is torch's class.
    assert type(kept(IN, H)) is OF_TORCH["GRU"]
    assert isinstance(GRU(IN, H), kept) and not isinstance(drop_in.GRU(IN, H), kept)


def test_a_block_ends_in_every_context():
    """A copy of the context, such as a task's, may outlive the block, and another thread may leave it."""
    block = patch()
    block.__enter__()
    kept, copy_of_context = nn.GRU, contextvars.copy_context()
    assert type(kept(IN, H)) is copy_of_context.run(lambda: type(kept(IN, H))) is drop_in.GRU
    thread = threading.Thread(target=block.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert are_torchs() and type(kept(IN, H)) is copy_of_context.run(lambda: type(kept(IN, H))) is OF_TORCH["GRU"]


def test_threads_do_not_see_each_other():
    """Each builds what its own block says, in whatever order the blocks are left."""
    barrier, found = threading.Barrier(3, timeout=20), {}

    def run(name):
        with nullcontext() if name == "torch" else patch(norm=name):
            barrier.wait()
            found[name] = nn.GRU(IN, H)
            barrier.wait()

    threads = [threading.Thread(target=run, args=(name,)) for name in ("rms", "layer", "torch")]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert (found["rms"].norm, found["layer"].norm) == ("rms", "layer") and type(found["torch"]) is OF_TORCH["GRU"]
    assert are_torchs()


def defined_in_a_block():
    with patch() as report:
        # As pytorch-forecasting does.
        class Base(abc.ABC, nn.RNNBase):
            pass

        class Inside(Base, nn.GRU):
            pass

        nn.GRU(IN, H)
    return Inside, report


def test_subclasses_stay_what_they_are():
    with pytest.warns(UserWarning, match="Inside is not replaced, because a subclass may compute something") as seen:
        inside, report = defined_in_a_block()
    assert {warning.filename for warning in seen} == {__file__}
    assert isinstance(inside(IN, H), GRU) and drop_in.GRU not in inside.__mro__
    left = (f"{__name__}.{inside.__qualname__}", "a subclass may compute something else")
    assert report.left[-1] == left and not any("mingru" in name for name, _ in report.left)
    with pytest.warns(UserWarning, match="Inside is not replaced"), patch(lstm=False) as report:
        nn.GRU(IN, H)
    assert left in report.left


def test_a_block_that_builds_nothing_warns():
    message = r"^patch: no layer was built in the block; .* fit or train"
    with pytest.warns(UserWarning, match=message) as seen, patch():
        nn.Linear(1, 1)
    assert seen[-1].filename == __file__ and str(drop_in.PatchReport([], [])) == "nothing built"


# What was saved comes back


def test_what_was_saved_comes_back():
    options = {"norm": "rms", "num_layers": 2}
    x = torch.randn(2, 5, IN)
    with patch(**options):
        model = Program()
        expected = model(x)
        pickled, weights, again = pickle.dumps(model), through_a_file(model.state_dict()), Program()
        again.load_state_dict(weights)
        loaded = [again, copy.deepcopy(model), pickle.loads(pickled), through_a_file(model, weights_only=False)]
        for other in loaded:
            torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        assert all(other.kind is nn.GRU for other in loaded)
    # Outside: the class that the program stored is torch's again, the layers are ours.
    outside = pickle.loads(pickled)
    assert outside.kind is OF_TORCH["GRU"] and type(outside.encoder) is drop_in.GRU
    # The program builds torch's layers, until they are replaced.
    refuses(RuntimeError, r"encoder\.load_in_mingru_drop_in_patch", Program().load_state_dict, weights)
    other = Program()
    drop_in.replace(other, **options)
    other.load_state_dict(weights)
    torch.testing.assert_close([*other.parameters()], [*model.parameters()], rtol=0, atol=0)


REFUSED = "size mismatch for rnn.{}_hh.*: copying a param with shape torch.Size.* from checkpoint"


@grid(name=NAMES, bias=[True, False], strict=[True, False])
def test_torchs_layers_refuse_our_weights(name, bias, strict):
    """RLlib, for example, is not strict, and would play with weights of torch's initialization."""
    ours, of_torch = (nn.ModuleDict({"rnn": getattr(each, name)(IN, H, bias=bias)}) for each in (drop_in, nn))
    state_dict = ours.state_dict()
    message = REFUSED.format("bias" if bias else "weight")
    with pytest.raises(RuntimeError, match=f"(?s){'rnn.load_in_mingru_drop_in_patch.*' * strict}{message}"):
        of_torch.load_state_dict(state_dict, strict=strict)
    with pytest.raises(RuntimeError, match=r"state_dict must be weights of .*, got rnn.weight_ih.*replace"):
        ours.load_state_dict(of_torch.state_dict(), strict=strict)
    # Files of our other layers load, which have no guards, and ours load there.
    old = {key: value for key, value in state_dict.items() if "layers" in key}
    assert len(old) == len(state_dict) - 2 == len([*ours.parameters()])
    with torch.device("meta"):
        empty = nn.ModuleDict({"rnn": getattr(drop_in, name)(IN, H, bias=bias)})
    for each in (state_dict, old):
        copy.deepcopy(ours).load_state_dict(each, strict=strict)
        assert not any(value.is_meta for value in empty.load_state_dict(each, assign=True) and empty.buffers())
    other = nn.ModuleDict({"rnn": getattr(mingru, f"Min{name}")(IN, H, bias=bias)})
    other.load_state_dict(state_dict)
    ours.load_state_dict(other.state_dict())


def test_the_guards_are_saved_as_other_buffers_are(tmp_path):
    model = nn.Sequential(drop_in.GRU(IN, H))
    state_dict = get_model_state_dict(model)  # of torch.distributed: it asks for each key as an attribute
    set_model_state_dict(model, state_dict)
    assert [*state_dict] == [*model.state_dict()]
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    safetensors.torch.load_model(model, tmp_path / "model.safetensors")


# Torch's own code


def test_torch_does_not_take_our_layers_for_its_own():
    """torch.compile rejects its own; whoever asks is known by the name of the module."""
    with patch():
        names = {"nn": nn, "rnn": nn.GRU(IN, H), "of_torch": GRU(IN, H)}
        for module, expected in (("torch._dynamo.variables.builder", False), ("torchrl.modules", True)):
            names["__name__"] = module
            assert eval("isinstance(rnn, nn.GRU)", names) is eval("issubclass(type(rnn), nn.GRU)", names) is expected
            assert eval("isinstance(of_torch, nn.GRU)", names)


def test_compiled_in_the_block():
    def output_of(rnn, x):
        single, several = isinstance(rnn, nn.GRU), isinstance(rnn, (nn.GRU, nn.LSTM))
        return rnn(x)[0] if single and several and issubclass(type(rnn), nn.GRU) else None

    torch.compiler.reset()
    x = torch.randn(2, 5, IN)
    with patch():
        rnn = nn.GRU(IN, H)
        compiled = torch.compile(output_of, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(rnn, x), output_of(rnn, x))
