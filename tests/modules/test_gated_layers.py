"""Defaults of gates, initial states, `memory`, and marks of options in state dicts. For values: tests/properties."""

import copy
import functools
import inspect
import re

import pytest
import torch
from cases import ALL_BACKENDS, ROWS, refuses, tensors, through_a_file
from torch import nn
from torch.testing import assert_close

import mingru
from mingru.models.block import BlockOptions, LayerOptions
from mingru.modules.options import arguments_of_class
from mingru.modules.saved import MARKS

H = 8
GATES = ("signed", "rotation", "quaternion", "mixed")
MATCHED = "<All keys matched successfully>"
UNKNOWN = "^load_state_dict: the weights do not say with which .* because they have no metadata; they are used with"
every_gate = pytest.mark.parametrize("gate", GATES)
make = functools.partial(mingru.MinGRU, 4, H)
KINDS = {
    "MinGRU": mingru.MinGRU,
    "MinGRUCell": mingru.MinGRUCell,
    "MinConv1dGRU": functools.partial(mingru.MinConv1dGRU, kernel_size=3),
    "MinConv2dGRUCell": functools.partial(mingru.MinConv2dGRUCell, kernel_size=3),
    "drop_in.GRULike": functools.partial(mingru.drop_in.GRULike, cell="mingru"),
    "drop_in.GRULikeCell": functools.partial(mingru.drop_in.GRULikeCell, cell="mingru"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def all_exact(*pairs):
    for pair in pairs:
        assert_close(*pair, rtol=0, atol=0)


@every_kind
def test_the_gate_chooses_the_candidate(kind):
    for gate, default in (("sigmoid", "positive"), *((gate, "tanh") for gate in GATES)):
        for given in ({}, {"candidate": "positive"}, {"candidate": "linear"}):
            rnn = KINDS[kind](4, H, gate=gate, **given)
            assert rnn.candidate == rnn.layers[0].candidate == given.get("candidate", default)
            assert ("candidate" in repr(rnn)) == (rnn.candidate != default)


# Marks


@every_gate
def test_marks_of_gates_that_are_missing_or_have_no_value(gate):
    """Parameters alone, such as moving averages, have no marks and no metadata."""
    rnn = make(gate=gate, num_layers=2)
    for assign in (False, True):
        new = make(gate=gate, num_layers=2)
        with pytest.warns(UserWarning, match=UNKNOWN) as found:
            assert str(new.load_state_dict(dict(rnn.named_parameters()), assign=assign)) == MATCHED
        assert any(f"; they are used with gate='{gate}'" in str(each.message) for each in found)
        all_exact((dict(new.state_dict()), dict(rnn.state_dict())))
    plain = make()
    plain.load_state_dict(dict(plain.state_dict()))
    # The device "meta" has shapes only, and a file may be of a program with more gates.
    with torch.device("meta"):
        empty = make(gate=gate)
    assert str(empty.load_state_dict(empty.state_dict(), assign=True)) == MATCHED
    rnn = make(gate=gate)
    state, message = rnn.state_dict(), "weights trained with gate=9 cannot be used in a layer with gate="
    refuses(RuntimeError, message, rnn.load_state_dict, {**state, "layers.0.gate": torch.tensor(9)})
    # A mark is no parameter, no number of a dtype, and is there after `to_empty`.
    assert [name for name, _ in rnn.named_parameters()] == ["layers.0.linear.weight", "layers.0.linear.bias"]
    empty.to_empty(device="cpu")
    for mark in (empty.layers[0].gate, empty.zero_state_mark):
        mark.fill_(77)
    marks = {name: mark for name, mark in empty.state_dict().items() if "linear" not in name}
    assert marks == {name: rnn.state_dict()[name] for name in marks}
    empty.reset_parameters()
    rnn.load_state_dict(empty.state_dict())
    x = torch.randn(2, 5, 4)
    all_exact((torch.func.functional_call(rnn, dict(rnn.state_dict()), x), rnn(x)))
    assert rnn.half().state_dict()["layers.0.gate"].dtype == torch.int64


def stack_of(*sizes, **options):
    return mingru.Stack([mingru.MinGRU(*sizes)], **options)


# Options that change what weights of the same shapes mean, and the mark of each.
CHANGED = [
    (mingru.MinGRU, "candidate", "linear", 2),
    (mingru.MinLSTM, "candidate", "tanh", 3),
    (functools.partial(mingru.MinGRU, gate="signed"), "candidate", "positive", 1),
    *((kind, "gate", gate, number) for kind in KINDS.values() for number, gate in enumerate(GATES, 1)),
    (mingru.MinLSTM, "normalize", False, 1),
    (mingru.MinGRU, "min_decay", 0.3, 2702159776422298),
    (mingru.MinGRU, "residual", True, 1),
    (stack_of, "residual", True, 1),
    (functools.partial(mingru.MinConv1dGRU, kernel_size=1), "residual", True, 1),
    (mingru.MinGRUCell, "candidate", "tanh", 3),
    (functools.partial(mingru.drop_in.LSTMLike, cell="minlstm"), "candidate", "tanh", 3),
    (lambda dims, _, **options: mingru.models.Block(dims, **options), "min_decay", 0.5, 2**52),
]
# All options with other values than their defaults: those of marks, those that names and shapes of weights show, and
# those with which weights mean the same. A convolution has the last three, which torch's state_dicts do not say either.
MARKED = {"candidate": "linear", "gate": "signed", "normalize": False, "min_decay": 0.3, "residual": True}
MARKED["output_gate"] = "silu"
SHOWN = {"num_layers": 2, "bias": False, "bidirectional": True, "cell": "minlstm", "proj_size": 2, "norm": "layer"}
SHOWN |= {"block_size": 2, "conv": 3, "expansion": 2, "mlp": 2, "learn_initial_state": True, "tied": False}
ALIKE = {"batch_first": True, "dropout": 0.5, "recompute": True, "checkpoint": True, "memory": 9, "forget_bias": 2.0}
ALIKE |= {"device": "meta", "dtype": torch.double, "stride": 2, "padding": 1, "dilation": 2}
VALUES = {**MARKED, **SHOWN, **ALIKE}
# What else is given with an option: the cell that has it, and layers between which there is dropout.
BESIDE = {option: {"cell": "mingru"} for option in ("candidate", "gate", "min_decay", "output_gate")}
BESIDE |= {option: {"cell": "minlstm"} for option in ("normalize", "forget_bias", "proj_size")}
BESIDE |= {"block_size": {"cell": "gru"}, "dropout": {"num_layers": 2}}
SIZES = {"input_dims": H, "hidden_dims": H, "input_size": H, "hidden_size": H, "dims": H, "kernel_size": 3}
SIZES |= {"layers": [mingru.MinGRU(H, H), mingru.MinGRU(H, H)], "vocab_size": 9, "num_layers": 2}
UNMARKED = {"zero_state", "groups"}
# The options behind `**layer_options` and `**block_options`.
PASSED_ON = {"Block": LayerOptions.__annotations__, "LanguageModel": BlockOptions.__annotations__}
EVERY_CLASS = sorted({*(type(each.module) for each in ROWS), mingru.models.LanguageModel}, key=lambda cls: cls.__name__)


def effects(kind, sizes, options):
    """What a program sees of a module in training: its weights; and what it computes and keeps for gradients."""
    torch.manual_seed(0)
    module, kept = kind(**{**sizes, **options}), []
    weights = module.state_dict()
    shapes = {name: each.shape for name, each in weights.items()}
    if options.get("device"):
        return shapes, [each.device for each in weights.values()]
    x = torch.randn(2, 5, H, *[5] * getattr(module, "num_space_dims", 0), dtype=options.get("dtype"))
    x = x[:, 0] if kind.__name__.endswith("Cell") else x[..., 0].long() % 9 if "vocab_size" in sizes else x
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.shape) or each, lambda each: each):
        outputs = tensors(module(x))
    return shapes, [(each.dtype, each.tolist()) for each in (*weights.values(), *outputs)], kept


@pytest.mark.parametrize("kind", EVERY_CLASS, ids=lambda kind: kind.__name__)
def test_every_option_has_an_effect_and_is_said_by_weights_or_need_not_be(kind):
    """A new option is a row of `saved.MARKS` and of `CHANGED` and `MARKED`, or is in `SHOWN` or in `ALIKE`."""
    assert {option for _, option, *_ in CHANGED} | {"output_gate"} == MARKED.keys() == MARKS.keys() - UNMARKED
    defaults = arguments_of_class(kind) | dict.fromkeys(PASSED_ON.get(kind.__name__, ()))
    defaults = {name: default for name, default in defaults.items() if not name.endswith("_options")}
    sizes = {name: SIZES[name] for name, default in defaults.items() if default is inspect.Parameter.empty}
    # A language model refuses both directions, and only kernels compute anything again.
    excluded = {"bidirectional"} if kind is mingru.models.LanguageModel else set()
    excluded |= {"recompute"} if "native" not in ALL_BACKENDS else set()
    for option in defaults.keys() - sizes.keys() - excluded:
        value = VALUES[option]
        beside = {name: each for name, each in BESIDE.get(option, {}).items() if name in defaults}
        plain = effects(kind, sizes, beside | ({option: not value} if option in ("batch_first", "recompute") else {}))
        value = "group" if option == "norm" and "kernel_size" in sizes else value
        changed = effects(kind, sizes, {**beside, option: value})
        assert plain != changed, f"{option} has no effect"
        assert (plain[0] != changed[0]) == (option not in ALIKE), option


@pytest.mark.parametrize(("kind", "option", "value", "number"), CHANGED)
def test_weights_of_another_option_are_refused(kind, option, value, number):
    sizes = (4, H) if option == "gate" else (4, 4)
    plain, changed = kind(*sizes), kind(*sizes, **{option: value})
    more = changed.state_dict().keys() - plain.state_dict().keys()
    (key,) = (key for key in more if re.search(rf"\b{option}(_mark)?$", key))
    assert int(changed.state_dict()[key]) == number and len(more) <= 1 + (option == "gate")
    theirs = f"weights trained with {option}={value!r} cannot be used in a layer with"
    for state in (changed.state_dict(), dict(changed.state_dict()), through_a_file(changed.state_dict())):
        changed.load_state_dict(state)
        refuses(RuntimeError, theirs, plain.load_state_dict, state, strict=False)
    message = f"cannot be used in a layer with {option}={value!r}; construct it with their {option}"
    refuses(RuntimeError, message, changed.load_state_dict, plain.state_dict(), strict=False)
    with pytest.warns(UserWarning, match=UNKNOWN) as found:
        changed.load_state_dict(dict(plain.named_parameters()), strict=False)
    assert any(f"{option}={value!r}" in str(each.message) for each in found)
    copied = copy.deepcopy(changed)
    copied.reset_parameters()
    changed.load_state_dict(copied.state_dict())


def test_weights_that_say_enough():
    # The map of a residual shows it.
    rnn = mingru.Stack([mingru.MinGRU(4, H, residual=True)], residual=True)
    rnn.load_state_dict({name: tensor for name, tensor in rnn.state_dict().items() if not name.endswith("mark")})
    # With one mark, missing ones mean the defaults, also without metadata.
    with pytest.raises(RuntimeError, match="weights trained with candidate=None cannot be used in a layer with cand"):
        make(gate="signed", candidate="linear").load_state_dict(dict(make(gate="signed").state_dict()))
    # A cell returns the state, which does not include the residual of a layer.
    mingru.MinGRUCell(4, 4).load_state_dict(mingru.MinGRU(4, 4, residual=True).state_dict())
    mingru.MinConv1dGRUCell(4, 4, 1).load_state_dict(mingru.MinConv1dGRU(4, 4, 1, residual=True).state_dict())
    # But the map of a highway has as many rows as that of a minLSTM.
    highway = mingru.MinGRU(4, 4, residual="highway").state_dict()
    for cell in (mingru.MinLSTMCell(4, 4), mingru.drop_in.LSTMLikeCell(4, 4, cell="minlstm")):
        refuses(RuntimeError, "residual='highway' cannot be used", cell.load_state_dict, highway)


@pytest.mark.parametrize(("option", "value"), [("residual", True), ("candidate", "tanh"), ("min_decay", 0.5)])
def test_options_that_a_program_has_changed(option, value):
    rnn = mingru.MinGRU(4, 4)
    setattr(rnn.layers[0], option, value)
    rnn.load_state_dict(rnn.state_dict())
    refuses(RuntimeError, f"trained with {option}={value!r} ", mingru.MinGRU(4, 4).load_state_dict, rnn.state_dict())


# Initial states


@every_gate
def test_a_learned_initial_state_is_drawn(gate):
    """So that blocks of features differ."""
    for kind in KINDS.values():
        rnn = kind(4, 400, gate=gate, learn_initial_state=True)
        (found,) = (each for name, each in rnn.named_parameters() if name.endswith("initial_state"))
        assert abs(found.mean()) < 0.2 and 0.8 < found.std() < 1.2


@every_kind
@every_gate
def test_weights_say_the_initial_state(gate, kind):
    """Those that do not begin with 0, as layers of `drop_in` do."""

    def start_of(rnn):
        (found,) = {owner._zero_state for owner in (rnn, *rnn.layers) if hasattr(owner, "_zero_state")}
        return found

    default = 0.0 if "drop_in" in kind else 0.5
    for assign in (False, True):
        rnn, other = KINDS[kind](4, H, gate=gate), KINDS[kind](4, H, gate=gate)
        new, old = copy.deepcopy(rnn.state_dict()), rnn.state_dict()
        keys = [key for key in old if key.endswith("zero_state_mark")]
        assert start_of(rnn) == default and len(keys) == (default > 0)
        for key in keys:
            del old[key]
        rnn.load_state_dict(old, assign=assign)
        assert start_of(rnn) == 0
        other.load_state_dict(rnn.state_dict(), assign=assign)
        assert start_of(other) == start_of(copy.deepcopy(other)) == 0
        for loaded in (rnn, other):
            loaded.load_state_dict(new, assign=assign)
            loaded.load_state_dict(loaded.state_dict())
            assert start_of(loaded) == default
        # Parameters without marks, such as moving averages, keep the start of the layer.
        parameters = dict(rnn.named_parameters())
        for given in (parameters, dict([*parameters.items()][:1])):
            with pytest.warns(UserWarning, match=UNKNOWN) as found:
                rnn.load_state_dict(given, strict=False)
            assert any("zero_state=0.5" in str(each.message) for each in found) == (default > 0)
            assert start_of(rnn) == default


@every_gate
def test_drop_in_takes_the_initial_state_of_weights(gate):
    rnn, x = make(gate=gate), torch.randn(2, 5, 4)
    other = mingru.drop_in.GRULike(4, H, batch_first=True, gate=gate, cell="mingru")
    other.load_state_dict(rnn.state_dict())
    all_exact((other(x)[0], rnn(x)[0]))


# Memory

MEMORIES = {
    **{gate: functools.partial(make, gate=gate) for gate in ("sigmoid", *GATES)},
    "two directions": functools.partial(KINDS["drop_in.GRULike"], 4, H, batch_first=True, bidirectional=True),
    "minlstm": functools.partial(mingru.MinLSTM, 4, H),
    "unnormalized": functools.partial(mingru.MinLSTM, 4, H, normalize=False),
    "images": functools.partial(mingru.MinConv1dGRU, 4, H, 1, gate="quaternion"),
    "bounded": functools.partial(mingru.MinGRU, 4, H, min_decay=0.25),
    "bounded, mixed": functools.partial(mingru.MinGRU, 4, H, gate="mixed", min_decay=0.25),
}


def drawn(make, *, again=False, **options):
    torch.manual_seed(0)
    rnn = make(**options)
    torch.manual_seed(0)
    rnn.reset_parameters() if again else None
    return dict(rnn.named_parameters())


@pytest.mark.parametrize("kind", MEMORIES.values(), ids=MEMORIES)
def test_memory_is_the_number_of_steps_that_a_state_lasts_at_first(kind):
    for memory in (1.5, 10.0, (2, 50)):
        rnn = kind(memory=memory, candidate="linear")
        for weight in rnn.parameters():
            nn.init.zeros_(weight)
        rnn.layers[0].initialize_maps()
        space = (1,) if isinstance(rnn, mingru.MinConv1dGRU) else ()
        h = torch.ones(rnn.num_directions, 1, *[1] * (not isinstance(rnn, mingru.drop_in.GRULike)), H, *space)
        out, _ = rnn(torch.zeros(1, 1, 4, *space), [h[0]] if space else h)
        first, last = memory if isinstance(memory, tuple) else (memory, memory)
        expected = torch.empty(0)
        cells = {"rotation": [2], "quaternion": [4], "mixed": [1, 4]}.get(rnn.gate, [1])
        for parts in cells:
            count = H // parts // len(cells)
            steps = first * (last / first) ** ((torch.arange(count) + 0.5) / count)
            expected = torch.cat([expected, steps.repeat_interleave(parts)])
        expected = expected.repeat(rnn.num_directions)
        assert_close(out, 1 - 1 / expected.view(1, 1, -1, *space))
    all_exact((drawn(kind, memory=(2, 7), again=True), drawn(kind, memory=(2, 7))))


def test_what_is_drawn_by_default():
    for gate, memory in (("sigmoid", 2), ("rotation", 2), ("quaternion", (21, 21))):
        all_exact((drawn(make, gate=gate), drawn(make, gate=gate, memory=memory)))
        assert "memory" not in repr(make(gate=gate, bias=False))
    bias, *others = (drawn(make, gate="mixed", **given)["layers.0.linear.bias"] for given in ({}, {"memory": (2, 60)}))
    all_exact((bias[H // 2 :], others[0][H // 2 :]), (bias[: H // 2], drawn(make)["layers.0.linear.bias"][: H // 2]))
    # A GRU has the distribution of nn.GRU: all weights, and sums of two for the biases of r and z.
    for dims in (64, 100):
        for name, weight in drawn(mingru.GRU, input_dims=4, hidden_dims=dims, bidirectional=True, again=True).items():
            two = weight[: 2 * dims * ("linear" in name and weight.dim() == 1)]
            for own, each in ((weight[len(two) :], 3), (two, 1.5))[: 1 + (len(two) > 0)]:
                assert (own.std() * (each * dims) ** 0.5 - 1).abs() < 0.2 and own.abs().max() <= 2 / dims**0.5
    # With inputs of variance 1, most angles are below a quarter of a turn.
    rnn = mingru.MinGRU(64, 256, gate="rotation")
    angles = rnn.layers[0].linear(torch.randn(1000, 64))[:, 1:256:2] * torch.pi / 4
    assert 0.2 < angles.std() < 0.8 and (angles.abs() < torch.pi / 2).double().mean() > 0.99
