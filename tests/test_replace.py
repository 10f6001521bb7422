"""replace: which layers of a model are replaced, what the report says, what is refused; accelerate: what it keeps."""

import copy
import inspect
import math
import operator
import pickle
from functools import partial

import pytest
import torch
from cases import assert_equal, graded, grid, on_meta, one_process, outcome, tensors, with_threads
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import mingru
from mingru import drop_in
from mingru.ops import autograd
from mingru.ops.backends import native

S, B, IN, H = 5, 2, 3, 4
DTYPES = [torch.float, torch.double]


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
    report = drop_in.replace(model, lstm=False, cell="gru")
    a, layer, cell = model.encoder["a"], model.layers[0], model.cell
    assert type(a) is type(layer) is drop_in.GRULike and type(cell) is drop_in.GRULikeCell
    assert a is model.encoder["b"][0] and type(model.lstm) is nn.LSTM and type(model.own) is Own
    assert a.training and not layer.training
    assert [next(each.parameters()).dtype for each in (a, layer)] == [torch.float, torch.double]
    assert cell.layers[0].linear.weight.is_meta
    replaced = {
        "cell": "GRUCell(3, 4, bias=False)",
        "encoder.a": "GRU(3, 4, batch_first=True)",
        "encoder.b.0": "GRU(3, 4, batch_first=True)",
        "layers.0": "GRU(3, 4, num_layers=2, bias=False, dropout=0.25, bidirectional=True)",
    }
    ours = {key: f"mingru.drop_in.{name[:-1]}, cell='gru')" for key, name in replaced.items()}
    ours = {key: name.replace("GRU", "GRULike") for key, name in ours.items()}
    assert report.replaced == [(key, f"torch.nn.{name}", ours[key]) for key, name in replaced.items()]
    left = {
        ("lstm", "torch.nn.LSTM(3, 4)"): "lstm is False",
        ("own", f"{__name__}.Own(3, 4)"): "a subclass may compute something else",
        ("rnn", "torch.nn.RNNCell(3, 4)"): "only GRUs and LSTMs are replaced",
    }
    assert report.left == [(*layer, why) for layer, why in left.items()]
    assert str(report).splitlines() == [
        *(f"{key}: torch.nn.{name} -> {ours[key]}, with new weights" for key, name in replaced.items()),
        *(f"{key}: {name} not replaced: {why}" for (key, name), why in left.items()),
    ]
    out, h = layer(torch.randn(S, B, IN).double())
    assert (out.shape, h.shape) == ((S, B, 2 * H), (4, B, H))
    with pytest.warns(UserWarning, match=r"^replace: no layer was replaced \(lstm: torch.nn.LSTM.* lstm is False; own"):
        again = drop_in.replace(model, lstm=False, cell="gru")
    assert (again.replaced, again.left) == ([], report.left)
    assert [name for name, _, _ in drop_in.replace(model, cell="minlstm").replaced] == ["lstm"]
    assert type(model.lstm) is drop_in.LSTMLike and model.encoder["a"] is a
    other = Model()
    drop_in.accelerate(other)  # whose layers are torch's
    left = dict(each[::2] for each in drop_in.replace(other, cells=False, cell="mingru").left)
    assert left["cell"] == "cells is False" and type(other.cell) is drop_in.GRUCell
    assert type(other.lstm) is drop_in.LSTMLike
    with pytest.warns(UserWarning, match=r"^replace: no layer was replaced \(nothing to replace\); use patch"):
        assert str(drop_in.replace(nn.Linear(1, 1), cell="gru")) == "nothing to replace"


def test_replace_does_not_warn_again():
    with pytest.warns(UserWarning, match="dropout"):
        model = nn.Sequential(nn.GRU(IN, H, dropout=0.5))
    drop_in.replace(model, cell="mingru")
    assert model[0].dropout == 0.5


@pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward", "state_dict_pre", "load_state_dict_post"])
def test_replace_refuses_hooks_and_then_changes_nothing(hook):
    model = nn.ModuleDict({"plain": nn.GRU(IN, H), "hooked": nn.GRU(IN, H)})
    before = list(model.values())
    handle = getattr(model["hooked"], f"register_{hook}_hook")(print)
    with pytest.raises(ValueError, match=r"^replace: hooked must be a layer without hooks, got hooks; remove them"):
        drop_in.replace(model, cell="mingru")
    assert list(model.values()) == before
    handle.remove()
    assert len(drop_in.replace(model, cell="mingru").replaced) == 2


class Rnn(nn.Module):
    """A recurrent layer of these options, and a head."""

    def __init__(self, kind, *args, **options):
        super().__init__()
        self.rnn = kind(IN, *args, batch_first=True, **options)
        self.head = nn.Linear(self.rnn.hidden_size * (1 + self.rnn.bidirectional), 2)

    def forward(self, x, h: Tensor | None = None):
        out, h = self.rnn(x, h if h is None or isinstance(self.rnn, nn.GRU) else (h, 2 * h))
        out = pad_packed_sequence(out, True)[0] if isinstance(out, PackedSequence) else out
        return self.head(out), h


class Packed(Rnn):
    """The same for an LSTM, of sequences that it packs."""

    def forward(self, x, h=None):
        return super().forward(pack_padded_sequence(x, LENGTHS, True, enforce_sorted=False), h)


def trained(model, x):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(10):
        optimizer.zero_grad()
        model(x)[0].square().mean().backward()
        optimizer.step()
    return model(x)


def after(edit, run=None):
    """Return a mode that edits the model before it runs."""

    def mode(model, x):
        edited = edit(model)
        model = edited if isinstance(edited, nn.Module) else model
        return model(x) if run is None else run(model, x)

    return mode


def second_derivatives(model, x):
    x = x.requires_grad_()
    (grad,) = torch.autograd.grad(model(x)[0].square().sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), [x, *model.rnn.parameters()])


def doubled(model, x):
    return torch.func.functional_call(model, {name: 2 * each for name, each in model.named_parameters()}, x)


def changed_before_backward(model, x):
    """Change what the backward of torch's layers does not need, the output among it."""
    rnn, h, outputs = model.rnn, torch.ones(len(model.rnn.all_weights), THREE, H), []
    rnn.register_forward_hook(lambda rnn, given, results: outputs.append(results[0]))
    for name, weight in rnn.named_parameters():
        weight.requires_grad_("weight_hh" not in name)
    model(x, h)
    output = outputs[0][0] if isinstance(outputs[0], PackedSequence) else outputs[0]
    kept = (output * torch.arange(output.shape[-1])).sum()
    output += 1
    for name, weight in rnn.named_parameters():
        if "bias" in name or name == "weight_ih_l0":
            torch.no_grad()(weight.zero_)()
    if isinstance(rnn, nn.GRU):
        h.zero_()
    return torch.autograd.grad(kept, rnn.weight_ih_l0)


STEPS, THREE = 12, 3
LENGTHS = torch.tensor([4, STEPS, 9])
# What a program does with a model. The result is the same, whether its layers are accelerated or not.
MODES = {
    "state": lambda model, x: model(x, torch.ones(len(model.rnn.all_weights), THREE, H)),
    "packed": lambda model, x: model(pack_padded_sequence(x, torch.tensor([4, STEPS, 9]), True, enforce_sorted=False)),
    "inference mode": torch.inference_mode()(lambda model, x: model(x)),
    "gradients": lambda model, x: list(graded(model, model, (x,)).values()),
    "ten training steps": trained,
    "second derivatives": second_derivatives,
    "forward mode": lambda model, x: torch.func.jvp(model, (x,), (torch.ones_like(x),))[1],
    "float64": after(nn.Module.double, lambda model, x: model(x.double())),
    "bfloat16": after(nn.Module.bfloat16, lambda model, x: model(x.bfloat16())),
    "autocast": torch.autocast("cpu", torch.bfloat16)(lambda model, x: model(x)),
    "one step": lambda model, x: model(x[:, :1]),
    "huge numbers": lambda model, x: model(x * 1e7),
    "one sequence": lambda model, x: model(x[0]),
    "dropout of everything": after(lambda model: setattr(model.rnn, "dropout", 1.0)),
    "16 threads": lambda model, x: with_threads((16,), lambda: model(x))[0],
    "edited weight": after(lambda model: nn.init.normal_(model.rnn.weight_hh_l0)),
    "new weight": after(lambda model: setattr(model.rnn, "weight_hh_l0", nn.Parameter(model.rnn.weight_hh_l0 * 2))),
    "functional_call": lambda model, x: list(graded(model, lambda x: doubled(model, x), (x,)).values()),
    "parametrizations": after(lambda model: parametrizations.orthogonal(model.rnn, "weight_hh_l0"), trained),
    "prune": after(lambda model: prune.l1_unstructured(model.rnn, "weight_hh_l0", 0.5)),
    "DDP": one_process()(lambda model, x: trained(nn.parallel.DistributedDataParallel(model), x)),
    "weight_norm": after(lambda model: weight_norm(model.rnn, "weight_hh_l0"), trained),
    "export": lambda model, x: torch.export.export(model, (x,)).module()(x + 1),
    "make_fx": lambda model, x: make_fx(model)(x)(x + 1),
    "compile": lambda model, x: torch.compile(model, backend="eager")(x),
    "compile of the layer": torch._dynamo.config.patch(allow_rnn=True)(
        lambda model, x: torch.compile(model, backend="eager")(x)
    ),
    "other default device": on_meta,
    "a hook": after(lambda model: model.rnn.register_forward_hook(lambda *given: (given[2][0] * 2, given[2][1]))),
    "deepcopy": after(copy.deepcopy),
    "pickle": after(lambda model: pickle.loads(pickle.dumps(model))),
    "undo": after(lambda model: drop_in.accelerate(model, undo=True)),
    "dropout": after(lambda model: setattr(model.rnn, "dropout", 0.5)),
    "strides": lambda model, x: torch.tensor(model.rnn(x)[0].stride()),
    "changes before backward": changed_before_backward,
    "fx": after(torch.fx.symbolic_trace),
}


PACKS = {"packed", "forward mode", "one sequence", "one step", "export", "make_fx"}
PACKS |= {"strides", "fx", "a hook"}
# oneDNN has no forward mode, and refuses what was changed before backward.
NOT_BY_ONEDNN = {"forward mode", "changes before backward", "fx"}
MODELS = {"gru": (Rnn, nn.GRU, set()), "packed lstm": (Packed, nn.LSTM, PACKS), "lstm": (Rnn, nn.LSTM, NOT_BY_ONEDNN)}
IN_MODES = [(name, mode) for name in MODELS for mode in MODES if mode not in MODELS[name][2]]


@pytest.fixture
def _always(monkeypatch):
    """Run the kernels where they are slower, too."""
    for name in ("is_slower", "is_slower_lstm"):
        monkeypatch.setattr(drop_in.operators, name, lambda *args: False)


@pytest.mark.usefixtures("_always")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize(("name", "mode"), IN_MODES)
def test_accelerated_layers_compute_the_same(name, mode, options):
    around, kind, _ = MODELS[name]
    model, x = around(kind, H, **options), torch.randn(THREE, STEPS, IN)
    own = copy.deepcopy(model)
    report = drop_in.accelerate(own)
    assert [name for name, _ in report.changed] == ["rnn"] and type(own.rnn) is not kind
    assert isinstance(own.rnn, kind) and list(own.state_dict()) == list(model.state_dict())
    expected, got = (tensors(MODES[mode](each, x.clone())) for each in (model, own) if torch.manual_seed(1))
    tolerance = 0.05 if "bfloat16" in mode or mode == "autocast" else 1e-4
    assert_equal(got, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def kernel_calls(monkeypatch):
    """The calls of kernels since the test began."""
    calls, kernel = [], autograd.run_kernel
    monkeypatch.setattr(autograd, "run_kernel", lambda *args: calls.append(args) or kernel(*args))
    return calls


@grid(kind=[nn.GRU, nn.LSTM], hidden=[H, 200], bias=[True, False])
def test_accelerated_layers_use_the_kernels(bias, hidden, kind, kernel_calls, monkeypatch):
    monkeypatch.setattr(native, "ISA", "avx512")
    rnn = kind(8, hidden, 2, bias=bias)
    own, x = copy.deepcopy(rnn), torch.randn(40, THREE, 8)
    before = list(own.parameters())
    drop_in.accelerate(own)
    assert all(map(operator.is_, own.parameters(), before))
    assert_equal(graded(own, own, (x,)), graded(rnn, rnn, (x,)), rtol=1e-4, atol=1e-4)
    assert len(kernel_calls) == 2
    with mingru.use_backend("torch"):
        own(x)
    own(x[:2]), own(x[:, :1])
    assert len(kernel_calls) == 4
    torch.compile(own, backend="eager")(x)
    assert len(kernel_calls) == 6


def with_contiguous(run):
    """Return a function that saves all tensors as contiguous ones, among them x, whose memory order was another."""

    def other(*args):
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda x: x):
            return run(*args)

    return other


@pytest.mark.usefixtures("_always")
@grid(kind=[nn.GRU, nn.LSTM], features=[H, 48, 200], batch=[1, 9, 70], packed=[True, False], dtype=DTYPES)
def test_accelerated_layers_are_accurate(dtype, packed, batch, features, kind, kernel_calls):
    rnn = kind(IN, features, 2, bidirectional=True, batch_first=True, dtype=dtype)
    wide, lengths = copy.deepcopy(rnn).double(), torch.randint(1, STEPS, (batch,)).index_fill(0, torch.tensor(0), STEPS)
    drop_in.accelerate(rnn)
    x = torch.randn(batch, STEPS, IN, dtype=dtype)
    states = [torch.randn(4, batch, features, dtype=dtype) * 3 for _ in range(1 + (kind is nn.LSTM))]

    def run(rnn, x, *states):
        x = pack_padded_sequence(x, lengths, True, enforce_sorted=False) if packed else x
        out, states = rnn(x, *(states if kind is nn.GRU else (states,)))
        return (out.data if packed else out), states

    expected = graded(wide, partial(run, wide), (x.double(), *(each.double() for each in states)))
    for form in (lambda run: run, with_contiguous):
        got = graded(rnn, form(partial(run, rnn)), (x, *states))
        for name, each in expected.items():
            error = (got[name].double() - each).abs().max() / each.abs().max().clamp(min=1.0)
            assert error < (1e-13 if dtype == torch.double else 1e-5), f"{name}: {error}"
    assert len(kernel_calls) == 8


@pytest.mark.usefixtures("_always")
@grid(value=[math.nan, math.inf, -math.inf, 3e38, -1e30], of=["x", "state", "weight", "bias"], kind=[nn.GRU, nn.LSTM])
def test_accelerated_layers_take_any_numbers(of, value, kind):
    rnn, x, lengths = kind(IN, 20, 2), torch.randn(STEPS, 9, IN), torch.arange(9, 0, -1)
    states = [torch.randn(2, 9, 20) for _ in range(1 + (kind is nn.LSTM))]
    at = {"x": x[3, 2], "state": states[-1][0, 1], "weight": rnn.weight_hh_l0.data[3], "bias": rnn.bias_hh_l0.data[-3:]}
    at[of][0] = value
    own = copy.deepcopy(rnn)
    drop_in.accelerate(own)
    for each in (x, pack_padded_sequence(x, lengths)):
        given = each, *(states if kind is nn.GRU else [tuple(states)])
        assert_equal(own(*given), rnn(*given), rtol=1e-4, atol=1e-4, equal_nan=True)


# What a program may do to a layer, or pass to it.
WRONG = {
    "a deleted weight": lambda rnn: delattr(rnn, "weight_hh_l0"),
    "flat weights": lambda rnn: rnn._flat_weights.__setitem__(1, torch.zeros(3, 2)),
    "no flat weights": lambda rnn: rnn._flat_weights.clear(),
    "weights of blocks": lambda rnn: setattr(rnn, "weight_hh_l0", nn.Parameter(rnn.weight_hh_l0[:, :2])),
    "a weight of another size": lambda rnn: setattr(rnn, "weight_ih_l0", nn.Parameter(torch.zeros(4 * H + 1, IN))),
    "a bias that is broadcast": lambda rnn: setattr(rnn, "bias_ih_l0", nn.Parameter(torch.ones(1))),
    "a sparse x": lambda rnn: rnn.register_forward_pre_hook(lambda rnn, given: (given[0].to_sparse(),)),
}
# Batch sizes, number of rows, and the shape of the states, of packed sequences that are not as usual.
UNUSUAL = {
    "states of more sequences": ([3, 3, 1], 7, (1, 4, H)),
    "states of fewer sequences": ([3, 3, 1], 7, (1, 2, H)),
    "states of two layers": ([3, 3, 1], 7, (2, 3, H)),
    "states of other features": ([3, 3, 1], 7, (1, 3, H + 1)),
    "batch sizes that increase": ([2, 3, 1], 6, (1, 3, H)),
    "int32": (torch.tensor([3, 1], dtype=torch.int32), 4, (1, 3, H)),
    "zeros at the end": ([3, 2, 0], 5, (1, 3, H)),
    "more rows": ([3, 2], 7, (1, 3, H)),
}


@pytest.mark.usefixtures("_always")
# oneDNN reads beyond weights of states that are too small.
@pytest.mark.parametrize(
    ("edit", "kind"),
    [(edit, nn.GRU) for edit in (*WRONG, *UNUSUAL)]
    + [(edit, nn.LSTM) for edit in (*WRONG, *UNUSUAL) if edit not in ("flat weights", "weights of blocks")],
)
def test_what_is_wrong_is_as_torchs(edit, kind):
    rnn, x, h = kind(IN, H), torch.randn(STEPS, THREE, IN), None
    own = copy.deepcopy(rnn)
    drop_in.accelerate(own)
    if edit in UNUSUAL:
        sizes, num_rows, shape = UNUSUAL[edit]
        x, h = PackedSequence(torch.randn(num_rows, IN), torch.as_tensor(sizes)), torch.randn(shape)
        h = h if kind is nn.GRU else (h, h + 1)
    else:
        WRONG[edit](rnn), WRONG[edit](own)
    expected, got = (outcome(each, x, h) for each in (rnn, own))
    if tensors(expected):
        assert_equal(got, expected, rtol=1e-4, atol=1e-4)
    else:
        assert got == expected


class Meta(type):
    """Metaclass of the classes that Pyro makes, among them one for a layer that exists."""


class OfMeta(nn.Module, metaclass=Meta):
    pass


@pytest.mark.filterwarnings("ignore")
def test_programs_make_classes_of_ours(kernel_calls):
    own, x = drop_in.GRU(IN, H), torch.randn(STEPS, THREE, IN)

    class Derived(drop_in.GRU):
        pass

    assert type(drop_in.GRU) is type and Derived.__module__ == Derived(IN, H).__module__ == __name__
    assert not isinstance(own, Derived) and not isinstance(own, drop_in.GRULike)
    assert type(drop_in.accelerate(nn.Sequential(Derived(IN, H)), undo=True).left[0]) is tuple
    for kind in (nn.GRU, nn.LSTM, nn.GRUCell, nn.LSTMCell):
        with drop_in.patch() as report:
            ours = getattr(nn, kind.__name__)
            for bases in ((OfMeta, ours), (ours, OfMeta)):
                layer, theirs = Meta("Made", bases, {})(IN, H, bias=False), kind(IN, H)
                assert isinstance(layer, kind) and [*layer.state_dict()] == [*kind(IN, H, bias=False).state_dict()]
                drop_in.accelerate(theirs)
                theirs.__class__ = Meta("Made", (type(theirs), OfMeta), {})
                theirs(x if "Cell" not in kind.__name__ else x[0])
            ours(IN, H)
        # Layers of classes that programs derive are not reported.
        assert len(report.built) == 1 and inspect.signature(ours) == inspect.signature(kind)
    assert len(kernel_calls) == 2  # those of GRUs
    quantize = torch.ao.quantization.quantize_dynamic
    for each, kind in ((own, nn.GRU), (drop_in.GRUCell(IN, H), nn.GRUCell)):
        # It asks for the type itself.
        model = nn.Sequential(each)
        assert type(quantize(model, {kind})[0]) is type(each)
        drop_in.accelerate(model, undo=True)
        assert type(quantize(model, {kind})[0]) is getattr(torch.ao.nn.quantized.dynamic, kind.__name__)
        assert "__module__" not in vars(each) and drop_in.accelerate(model).changed
    with one_process() as mesh:
        layer = copy.deepcopy(own)
        fully_shard(layer, mesh=mesh)
        assert_equal(layer(x), own(x), rtol=1e-4, atol=1e-4)
        assert drop_in.accelerate(layer, undo=True).changed
        assert isinstance(layer, FSDPModule) and type(layer).__bases__ == (FSDPModule, nn.GRU)
        assert_equal(layer(x), own(x), rtol=1e-4, atol=1e-4)


@grid(features=[127, 128, 256], with_gradients=[True, False], dtype=DTYPES)
def test_torch_computes_few_steps(dtype, features, with_gradients, kernel_calls):
    gru = nn.GRU(1, features, dtype=dtype)
    drop_in.accelerate(gru)
    least = 20 if dtype == torch.double else 6 if with_gradients else 10
    least *= 4 if features == 256 and not with_gradients else 1 + (features >= 128)
    with torch.set_grad_enabled(with_gradients):
        for steps in (least - 1, least):
            gru(torch.ones(steps, 1, 1, dtype=dtype))
            assert len(kernel_calls) == (steps == least)
        # Of two sequences, fewer steps are enough.
        gru(torch.ones(least // 2, 2, 1, dtype=dtype))
        assert len(kernel_calls) == 1 + (features == 256 and not with_gradients)


# Inputs, features, sequences and steps of an LSTM, and whether the kernels compute it if x and weights are trained,
# only weights, and nothing.
RULE = {
    (8, 128, 4, 40): (True, True, False),
    (8, 128, 4, 39): (False, False, False),
    (8, 128, 5, 40): (False, False, False),
    (7, 48, 1, 40): (False, False, True),
    (8, 47, 1, 40): (True, True, False),
    (8, 191, 1, 40): (True, True, True),
    (8, 192, 1, 40): (True, True, False),
    (8, 64, 192, 64): (True, True, False),
    (8, 64, 192, 63): (False, False, False),
    (128, 64, 9, 40): (False, True, False),
    (127, 63, 9, 40): (False, False, False),
    (128, 65, 9, 40): (False, False, False),
    (512, 64, 4, 40): (True, True, True),
    (511, 64, 3, 40): (True, True, False),
    (1024, 64, 8, 40): (False, True, True),
    (1024, 64, 9, 40): (False, True, False),
    (1024, 256, 17, 40): (False, True, False),
}


@grid(trained=["all", "weights", ""], isa=["avx512", "avx2"])
@pytest.mark.parametrize("sizes", RULE)
def test_torch_computes_lstms_where_it_is_faster(sizes, isa, trained, kernel_calls, monkeypatch):
    monkeypatch.setattr(native, "ISA", isa)
    inputs, features, batch, steps = sizes
    lstm, x = nn.LSTM(inputs, features), torch.ones(steps, batch, inputs, requires_grad=trained == "all")
    drop_in.accelerate(lstm)
    with torch.set_grad_enabled(trained != ""):
        # All have the same length, which torch computes as padded sequences.
        lstm(x), lstm(pack_padded_sequence(x, [steps] * batch))
    assert len(kernel_calls) == (isa == "avx512") * 2 * RULE[sizes][["all", "weights", ""].index(trained)]


@grid(with_gradients=[True, False])
def test_torch_computes_packed_lstms_where_it_is_faster(with_gradients, kernel_calls):
    rule = {(torch.float32, 4, 2, 10): True, (torch.float32, 4, 2, 9): False, (torch.float32, 3, 2, 10): with_gradients}
    rule |= {(torch.double, *sizes): True for sizes in ((63, 99, 20), (64, 20, 20), (64, 64, 64))}
    rule |= {(torch.double, *sizes): with_gradients for sizes in ((63, 99, 19), (64, 21, 20), (64, 65, 70))}
    for (dtype, features, batch, steps), is_used in (rule | {(torch.double, 64, 21, 10): False}).items():
        lstm, x = nn.LSTM(2, features, dtype=dtype), torch.ones(steps, batch, 2, dtype=dtype)
        drop_in.accelerate(lstm)
        with torch.set_grad_enabled(with_gradients):
            lstm(pack_padded_sequence(x, [steps] + [1] * (batch - 1)))
            lstm(x if dtype == torch.double else x[:1])
        assert len(kernel_calls) == is_used * (1 + (dtype == torch.double)), (dtype, features, batch, steps)
        kernel_calls.clear()


def test_accelerate_reports_each_layer():
    model = Model()
    report, changed = drop_in.accelerate(model), ["cell", "encoder.a", "layers.0", "lstm"]
    assert sorted(name for name, _ in report.changed) == changed
    assert all("changed" in line for line in str(report).splitlines()[:4])
    left = {name: why for name, _, why in report.left}
    assert list(left) == ["own", "rnn"]
    assert str(report).splitlines()[0] == "encoder.a: torch.nn.GRU(3, 4, batch_first=True) changed"
    assert drop_in.accelerate(model).changed == [] and type(model.own) is Own
    parametrizations.orthogonal(model.lstm, "weight_hh_l0")
    name = type(model.lstm).__name__
    assert sorted(name for name, _ in drop_in.accelerate(model, undo=True).changed) == changed
    assert type(model.encoder["a"]) is nn.GRU and type(model.lstm).__bases__ == (nn.LSTM,)
    assert type(model.lstm).__name__ == name == "ParametrizedLSTM"
    assert sorted(name for name, _ in drop_in.accelerate(model).changed) == changed
    reasons = [drop_in.accelerate(each).left[0][2] for each in (nn.LSTM(IN, H, proj_size=2), nn.LSTMCell(IN, H))]
    assert reasons == ["there is no kernel for projections", "torch computes it as fast"]


@grid(bias=[True, False], dtype=DTYPES)
def test_cells(bias, dtype, kernel_calls):
    """Without gradients, and if there are many sequences, by the kernel."""
    cell, own = (home.GRUCell(128, 128, bias, dtype=dtype) for home in (nn, drop_in))
    own.load_state_dict(cell.state_dict())
    for batch, with_gradients, calls in ((64, False, 1), (63, False, 1), (64, True, 1)):
        x, h = torch.randn(batch, 128, dtype=dtype), torch.randn(batch, 128, dtype=dtype)
        with torch.set_grad_enabled(with_gradients):
            assert_equal(own(x, h), cell(x, h), rtol=1e-4, atol=1e-5)
            assert_equal(own(x[0]), cell(x[0]), rtol=1e-4, atol=1e-5)
        assert len(kernel_calls) == calls
