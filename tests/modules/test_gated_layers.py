"""Defaults of gates, initial states, `memory`, and marks of options in state dicts. For values: tests/properties."""

import copy
import functools
import io
import itertools
import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import mingru

B, S, IN, H = 3, 21, 4, 8
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
GATES = ("signed", "rotation", "quaternion")


every_gate = pytest.mark.parametrize("gate", GATES)


def make(gate, dtype=torch.double, **options):
    return mingru.MinGRU(IN, H, gate=gate, **options, dtype=dtype)


KINDS = {
    "MinGRU": lambda **options: mingru.MinGRU(4, H, **options),
    "MinGRUCell": lambda **options: mingru.MinGRUCell(4, H, **options),
    "MinConv1dGRU": lambda **options: mingru.MinConv1dGRU(4, H, 3, **options),
    "MinConv2dGRUCell": lambda **options: mingru.MinConv2dGRUCell(4, H, 3, **options),
    "drop_in.GRU": lambda **options: mingru.drop_in.GRU(4, H, **options),
    "drop_in.GRUCell": lambda **options: mingru.drop_in.GRUCell(4, H, **options),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_gate_chooses_the_candidate(kind):
    for gate, candidate in (("sigmoid", "positive"), *((gate, "tanh") for gate in GATES)):
        rnn = KINDS[kind](gate=gate)
        assert rnn.candidate == rnn.layers[0].candidate == candidate
        assert "candidate" not in repr(rnn)
        for given in ("positive", "linear"):
            other = KINDS[kind](gate=gate, candidate=given)
            assert other.candidate == given
            assert ("candidate" in repr(other)) == (given != candidate)


@every_gate
def test_the_kind_of_a_function_chooses_its_candidate(gate):
    inputs = {"gate": torch.randn(2, 3, 4), "candidate": torch.randn(2, 3, 8 if gate == "rotation" else 4)}
    options = {"kind": gate, "angle": torch.randn(2, 3, 4) if gate == "rotation" else None}
    out = mingru.functional.mingru(**inputs, **options)
    assert_close(out, mingru.functional.mingru(**inputs, **options, activation="tanh"), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_gate_are_refused(kind):
    layers = {gate: KINDS[kind](gate=gate) for gate in ("sigmoid", *GATES)}
    assert not any("gate" in key for key in layers["sigmoid"].state_dict())
    for theirs, ours in itertools.product(layers, layers):
        state = layers[theirs].state_dict()
        if ours == theirs:
            layers[ours].load_state_dict(state)
            continue
        with pytest.raises(RuntimeError, match=f"layers.0: weights trained with gate='{theirs}' cannot be used"):
            layers[ours].load_state_dict(state, strict=False)


@every_gate
def test_weights_without_a_mark_load_with_a_warning(gate):
    """State dicts of older versions have no mark, and those of safetensors and of dict comprehensions no version."""
    rnn = make(gate, num_layers=2)
    state = rnn.state_dict()
    for layer in ("layers.0", "layers.1"):
        del state[f"{layer}.gate"]
        state._metadata[layer]["version"] = 1
    for old, assign in itertools.product((state, dict(state)), (False, True)):
        new = make(gate, num_layers=2)
        with pytest.warns(UserWarning, match=f"^load_state_dict: the weights do not say .* gate='{gate}'"):
            assert str(new.load_state_dict(old, assign=assign)) == "<All keys matched successfully>"
        assert_close(dict(new.state_dict()), dict(rnn.state_dict()), rtol=0, atol=0)
    plain = mingru.MinGRU(3, 4)
    state = plain.state_dict()
    state._metadata["layers.0"]["version"] = 1
    for old in (state, dict(state)):
        plain.load_state_dict(old)


@every_gate
def test_a_mark_without_a_value_or_a_name(gate):
    """The device "meta" has shapes only, and a later version may have more gates."""
    rnn = make(gate)
    with torch.device("meta"):
        empty = make(gate)
    assert str(empty.load_state_dict(empty.state_dict(), assign=True)) == "<All keys matched successfully>"
    state = {**rnn.state_dict(), "layers.0.gate": torch.tensor(9)}
    with pytest.raises(RuntimeError, match="weights trained with gate=9 cannot be used in a layer with gate="):
        rnn.load_state_dict(state)


# Options that change what weights of the same shapes mean, and the mark of each.
CHANGED = {
    "candidate": (mingru.MinGRU, {"candidate": "linear"}, 2),
    "candidate of minLSTM": (mingru.MinLSTM, {"candidate": "tanh"}, 3),
    "candidate of another gate": (functools.partial(mingru.MinGRU, gate="signed"), {"candidate": "positive"}, 1),
    "normalize": (mingru.MinLSTM, {"normalize": False}, 1),
    "min_decay": (mingru.MinGRU, {"min_decay": 0.3}, 2702159776422298),
    "residual": (mingru.MinGRU, {"residual": True}, 1),
    "residual of a stack": (
        lambda *sizes, **options: mingru.Stack([mingru.MinGRU(*sizes)], **options),
        {"residual": True},
        1,
    ),
    "residual of a convolution": (
        lambda *sizes, **options: mingru.MinConv1dGRU(*sizes, 1, **options),
        {"residual": True},
        1,
    ),
    "cell": (mingru.MinGRUCell, {"candidate": "tanh"}, 3),
    "drop_in": (mingru.drop_in.LSTM, {"candidate": "tanh"}, 3),
    "block": (lambda dims, _, **options: mingru.models.Block(dims, **options), {"min_decay": 0.5}, 2**52),
}


@pytest.mark.parametrize(("kind", "options", "number"), CHANGED.values(), ids=CHANGED)
def test_weights_of_another_option_are_refused(kind, options, number):
    plain, changed = kind(IN, IN), kind(IN, IN, **options)
    ((option, value),) = options.items()
    (key,) = changed.state_dict().keys() - plain.state_dict().keys()
    assert key.endswith(f"{option}_mark") and int(changed.state_dict()[key]) == number
    saved = io.BytesIO()
    torch.save(changed.state_dict(), saved)
    saved.seek(0)
    for state in (changed.state_dict(), dict(changed.state_dict()), torch.load(saved)):
        changed.load_state_dict(state)
        with pytest.raises(
            RuntimeError, match=f"weights trained with {option}={value!r} cannot be used in a layer with"
        ):
            plain.load_state_dict(state, strict=False)
    message = f"cannot be used in a layer with {option}={value!r}; construct it with their {option}"
    with pytest.raises(RuntimeError, match=message):
        changed.load_state_dict(plain.state_dict(), strict=False)
    # Without metadata, or with those of the version that had marks of gates only.
    old = {name: tensor for name, tensor in changed.state_dict().items() if name != key}
    of_version_2 = plain.state_dict()
    for metadata in of_version_2._metadata.values():
        metadata["version"] = 2
    for state in (old, of_version_2):
        with pytest.warns(
            UserWarning, match=rf"^load_state_dict: .* with which {option} they .* with {option}={value!r}$"
        ):
            changed.load_state_dict(state)
        plain.load_state_dict(dict(state))
    copied = copy.deepcopy(changed)
    copied.reset_parameters()
    changed.load_state_dict(copied.state_dict())


def test_the_map_of_a_residual_shows_it():
    rnn = mingru.Stack([mingru.MinGRU(IN, H, residual=True)], residual=True)
    rnn.load_state_dict({name: tensor for name, tensor in rnn.state_dict().items() if not name.endswith("mark")})


def test_a_mark_of_a_gate_alone_says_which_gate():
    rnn = make("signed", candidate="tanh")
    state = rnn.state_dict()
    state._metadata["layers.0"]["version"] = 2
    rnn.load_state_dict(state)
    with pytest.raises(RuntimeError, match="weights trained with gate='signed' cannot be used"):
        mingru.MinGRU(IN, H).load_state_dict(state)


def test_a_cell_takes_weights_of_a_layer_with_a_residual():
    """Because it returns the state, without the residual."""
    for kind, cell in ((mingru.MinGRU, mingru.MinGRUCell), (mingru.MinConv1dGRU, mingru.MinConv1dGRUCell)):
        sizes = (IN, IN) if kind is mingru.MinGRU else (IN, IN, 1)
        cell(*sizes).load_state_dict(kind(*sizes, residual=True).state_dict())


@pytest.mark.parametrize(
    ("mark", "got"),
    [
        (torch.tensor([1, 2, 3]), r"a tensor \(3,\)"),
        (torch.tensor([]), r"a tensor \(0,\)"),
        (torch.tensor(torch.nan), r"tensor\(nan\)"),
        (torch.tensor(torch.inf), r"tensor\(inf\)"),
        ("signed", "'signed'"),
        (0.5, "0.5"),
    ],
)
def test_a_damaged_mark(mark, got):
    rnn = make("signed")
    with pytest.raises(RuntimeError) as raised:
        rnn.load_state_dict({**rnn.state_dict(), "layers.0.gate": mark})
    text = f"layers.0.gate must be one whole number, the mark of gate, got {got}; the file is damaged"
    assert re.search(text, str(raised.value)) and str(raised.value).count("\n") == 1


@every_gate
def test_a_mark_is_no_parameter_and_is_there_after_to_empty(gate):
    with torch.device("meta"):
        empty = make(gate)
    rnn = make(gate)
    assert [name for name, _ in rnn.named_parameters()] == ["layers.0.linear.weight", "layers.0.linear.bias"]
    empty.to_empty(device="cpu")
    empty.layers[0].gate.fill_(77)
    empty.reset_parameters()
    rnn.load_state_dict(empty.state_dict())
    assert rnn.half().state_dict()["layers.0.gate"].dtype == torch.int64
    x = torch.randn(2, 5, IN, dtype=torch.double)
    rnn = make(gate)
    assert_close(torch.func.functional_call(rnn, dict(rnn.state_dict()), x), rnn(x), rtol=0, atol=0)


@every_gate
def test_the_initial_state(gate):
    """A learned one is drawn, so that blocks differ, and again by `reset_parameters`."""
    x, reset = torch.randn(2, 5, IN), torch.rand(2, 5) < 0.5
    for candidate in ("positive", "tanh"):
        rnn = make(gate, dtype=torch.float32, candidate=candidate)
        half = torch.full((1, 1, 1, H), 0.5)
        assert_close(rnn(x), rnn(x, half))
        conv = mingru.MinConv1dGRU(IN, H, 1, gate=gate, candidate=candidate)
        assert_close(conv(x.unsqueeze(-1)), conv(x.unsqueeze(-1), [half.view(1, 1, H, 1)]))
        gate_, angle = (
            (torch.randn(2, 5, 4), torch.randn(2, 5, 4)) if gate == "rotation" else (torch.randn(2, 5, 8), None)
        )
        given, options = (
            (gate_, torch.randn(2, 5, 8)),
            {"angle": angle, "kind": gate, "activation": candidate, "reset": reset},
        )
        expected = mingru.functional.mingru(*given, half[0], initial_state=half[0], **options)
        assert_close(mingru.functional.mingru(*given, **options), expected)
    options = {"gate": gate, "learn_initial_state": True}
    for kind, rest in ((mingru.MinGRU, ()), (mingru.MinConv1dGRU, (1,)), (mingru.drop_in.GRU, ())):
        rnn = kind(IN, 400, *rest, **options)
        (found,) = (each for name, each in rnn.named_parameters() if name.endswith("initial_state"))
        first = found.detach().clone()
        rnn.reset_parameters()
        for drawn in (first, found.detach()):
            assert abs(drawn.mean()) < 0.2
            assert 0.8 < drawn.std() < 1.2
        assert not torch.equal(first, found)


@pytest.mark.parametrize("kind", KINDS)
@every_gate
def test_weights_say_the_initial_state(gate, kind):
    """Those of older versions do not, and begin with 0. The layers of `drop_in` always do, as those of torch."""

    def start_of(rnn):
        (found,) = {owner.zero_state for owner in (rnn, *rnn.layers) if hasattr(owner, "zero_state")}
        return found

    default = 0.0 if "drop_in" in kind else 0.5
    for assign in (False, True):
        rnn, other = KINDS[kind](gate=gate), KINDS[kind](gate=gate)
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
    mingru.drop_in.GRU(4, H, gate=gate).load_state_dict(mingru.MinGRU(4, H, gate=gate).state_dict())


MEMORIES = {
    **{gate: lambda gate=gate, **options: mingru.MinGRU(4, H, gate=gate, **options) for gate in ("sigmoid", *GATES)},
    "two directions": lambda **options: mingru.drop_in.GRU(4, H, batch_first=True, bidirectional=True, **options),
    "minlstm": lambda **options: mingru.MinLSTM(4, H, **options),
    "unnormalized": lambda **options: mingru.MinLSTM(4, H, normalize=False, **options),
    "groups": lambda **options: mingru.MinConv1dGRU(4, H, 1, gate="quaternion", groups=2, **options),
}


@pytest.mark.parametrize("kind", MEMORIES.values(), ids=MEMORIES)
def test_memory_is_the_number_of_steps_that_a_state_lasts_at_first(kind):
    for memory in (1.5, 10.0, (2, 50)):
        rnn = kind(memory=memory, candidate="linear")
        for weight in rnn.parameters():
            nn.init.zeros_(weight)
        rnn.layers[0].add_gate_bias()
        space = (1,) if isinstance(rnn, mingru.MinConv1dGRU) else ()
        h = torch.ones(rnn.num_directions, 1, *[1] * (not isinstance(rnn, mingru.drop_in.GRU)), H, *space)
        out, _ = rnn(torch.zeros(1, 1, 4, *space), [h[0]] if space else h)
        first, last = memory if isinstance(memory, tuple) else (memory, memory)
        parts, groups = {"rotation": 2, "quaternion": 4}.get(rnn.gate, 1), rnn.layers[0].groups
        count = H // groups // parts
        expected = first * (last / first) ** ((torch.arange(count) + 0.5) / count)
        expected = expected.repeat_interleave(parts).repeat(groups * rnn.num_directions)
        assert_close(out, 1 - 1 / expected.view(1, 1, -1, *space))
    torch.manual_seed(0)
    drawn = dict(kind(memory=(2, 7)).named_parameters())
    torch.manual_seed(0)
    rnn = kind(memory=(2, 7))
    torch.manual_seed(0)
    rnn.reset_parameters()
    assert_close(dict(rnn.named_parameters()), drawn, rtol=0, atol=0)
    expected = "memory must be a number above 1, a pair of two such numbers, or None, got"
    for wrong, error in ((1, ValueError), (torch.inf, ValueError), ("long", TypeError), (True, TypeError)):
        for given in (wrong, (2, wrong)):
            with pytest.raises(error, match=f": {expected} {wrong!r}"):
                kind(memory=given)
    for given in ((2,), [2, 3, 4]):
        with pytest.raises(TypeError, match=f": {expected} {re.escape(repr(given))}"):
            kind(memory=given)
    with pytest.raises(ValueError, match="memory must be None because bias is False, got 2"):
        kind(memory=2, bias=False)


def test_the_default_memory():
    for gate, memory in (("sigmoid", 2), ("rotation", 2), ("quaternion", (21, 21))):
        found = []
        for options in ({}, {"memory": memory}):
            torch.manual_seed(0)
            found.append(mingru.MinGRU(4, 16, gate=gate, **options).state_dict())
        assert_close(*found, rtol=0, atol=0)
        assert "memory" not in repr(mingru.MinGRU(4, 8, gate=gate, bias=False))


def test_rotations_begin_near_no_turn():
    """With inputs of variance 1, most angles are below a quarter of a turn at initialization."""
    rnn = mingru.MinGRU(64, 256, gate="rotation")
    angles = rnn.layers[0].linear(torch.randn(1000, 64))[:, 1:256:2] * torch.pi / 4
    assert 0.2 < angles.std() < 0.8
    assert (angles.abs() < torch.pi / 2).double().mean() > 0.99


@pytest.mark.parametrize("kind", [mingru.MinGRU, mingru.MinGRUCell, mingru.drop_in.GRU, mingru.drop_in.GRUCell])
def test_errors(kind):
    with pytest.raises(ValueError, match=r"gate must be one value, or a list of 1, one for each layer, got \['sig"):
        kind(3, 4, gate=["sigmoid", "signed"])
    for gate in ("tanh", None, [["signed"]], 1):
        with pytest.raises(
            ValueError,
            match=rf"^(mingru.drop_in.)?{kind.__name__}: gate must be one of \('sigmoid', 'signed', .*\), got",
        ):
            kind(3, 4, gate=gate)
    name = "hidden_size" if kind.__module__.startswith("mingru.drop_in") else "hidden_dims"
    with pytest.raises(
        ValueError,
        match=f"^(mingru.drop_in.)?{kind.__name__}: {name} must be even because gate='rotation' turns pairs of fe",
    ):
        kind(3, 5, gate="rotation")
    with pytest.raises(
        ValueError, match=f"{name} must be divisible by 4 because gate='quaternion' turns groups of 4 fe"
    ):
        kind(3, 6, gate="quaternion")
    kind(3, 5, gate="signed")


@pytest.mark.parametrize("kind", [mingru.MinConv2dGRU, mingru.MinConv1dGRUCell])
def test_errors_of_convolutions(kind):
    with pytest.raises(ValueError, match=f"^{kind.__name__}: gate must be one of .* got 'sign'"):
        kind(3, 4, 3, gate="sign")
    with pytest.raises(ValueError, match=f"^{kind.__name__}: hidden_dims must be even because gate='rotation'.* got 5"):
        kind(3, 5, 3, gate="rotation")
    with pytest.raises(ValueError, match=f"^{kind.__name__}: hidden_dims / groups must be even because .* got 3"):
        kind(4, 6, 3, groups=2, gate="rotation")
    with pytest.raises(ValueError, match=r"hidden_dims / groups must be divisible by 4 because .* got 6"):
        kind(4, 12, 3, groups=2, gate="quaternion")


def test_a_model_can_count():
    """One state that flips at each 1 computes parity at any length."""
    rnn = mingru.MinGRU(1, 1, gate="signed", candidate="linear")
    with torch.no_grad():
        rnn.layers[0].linear.weight.copy_(torch.tensor([[400.0], [0.0]]))
        rnn.layers[0].linear.bias.copy_(torch.tensor([-200.0, 0.0]))
    bits = torch.randint(2, (4, 5000))
    out, _ = rnn(bits.unsqueeze(2).float(), torch.ones(1))
    assert torch.equal(out.squeeze(2) < 0, bits.cumsum(1) % 2 == 1)
    assert isinstance(rnn.layers[0].linear, nn.Linear)
