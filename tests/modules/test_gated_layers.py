"""The gates but "sigmoid" in every class that has them: values, states, packing, graphs, errors."""

import copy
import functools
import io
import math
import re

import pytest
import reference
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

import mingru

B, S, IN, H = 3, 21, 4, 8
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
GATES = ("signed", "rotation", "quaternion")
BACKENDS = [name for name, can_run in mingru.backends().items() if can_run is True and name not in ("log", "triton")]
ALL = {
    "num_layers": 2,
    "bidirectional": True,
    "residual": True,
    "norm": "rms",
    "learn_initial_state": True,
    "candidate": "linear",
}
HIGHWAY = {"candidate": "tanh", "num_layers": 2, "residual": "highway", "norm": "layer"}
OPTIONS = [{"candidate": "tanh"}, {"candidate": "positive", "bias": False, "recompute": False}, HIGHWAY, ALL]


# Dynamo's own way of tracing a function, in torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


every_gate = pytest.mark.parametrize("gate", GATES)
each_option = pytest.mark.parametrize("options", OPTIONS, ids=["plain", "positive", "highway", "all"])
# Capturing a graph takes long. `test_elapsed_time.py` captures rotations.
in_graphs = pytest.mark.parametrize(
    ("gate", "options"),
    [pytest.param("signed", {**HIGHWAY, "num_layers": 1}, marks=pytest.mark.slow, id="signed-highway")],
)


def make(gate, kind=mingru.MinGRU, dtype=torch.double, **options):
    input_dims = H if options.get("residual") == "highway" else IN
    rnn = kind(input_dims, H, gate=gate, **options, dtype=dtype)
    with torch.no_grad():
        for name, weight in rnn.named_parameters():
            if "norm" in name or name == "initial_state":
                weight.add_(torch.randn_like(weight) / 4)
    return rnn


def inputs(rnn, dtype=torch.double):
    reset = torch.rand(B, S) < 0.2
    h = torch.randn(rnn.num_layers * rnn.num_directions, B, 1, H, dtype=dtype)
    return torch.randn(B, S, rnn.input_dims, dtype=dtype), h, reset


def graded(rnn, function, x, h, reset):
    """Return the outputs, and the gradients of x, h and all parameters."""
    leaves = [x.clone().requires_grad_(), h.clone().requires_grad_()]
    out, last = function(*leaves, reset)
    weights = [torch.randn(each.shape, generator=torch.Generator().manual_seed(0)).double() for each in (out, last)]
    loss = (out * weights[0]).sum() + (last * weights[1]).sum()
    return out, last, *torch.autograd.grad(loss, [*leaves, *rnn.parameters()], materialize_grads=True)


@pytest.mark.parametrize("backend", BACKENDS)
@each_option
@every_gate
def test_layer_against_the_reference(gate, options, backend):
    rnn = make(gate, **options)
    given = inputs(rnn)
    expected = graded(rnn, lambda *args: reference.layers(rnn, *args), *given)
    with mingru.use_backend(backend):
        assert_close(graded(rnn, rnn, *given), expected, **TIGHT)
        assert_close(rnn(given[0]), reference.layers(rnn, given[0]), **TIGHT)


@pytest.mark.parametrize(("gate", "options"), [*zip(GATES, (HIGHWAY, ALL, ALL), strict=True)], ids=GATES)
def test_scripted_layer_against_the_reference(gate, options):
    rnn = make(gate, **options)
    given = inputs(rnn)
    expected = graded(rnn, lambda *args: reference.layers(rnn, *args), *given)
    assert_close(graded(rnn, torch.jit.script(rnn), *given), expected, **TIGHT)


@every_gate
def test_time_first(gate):
    rnn = make(gate, **ALL)
    x, h, reset = inputs(rnn)
    swapped = mingru.MinGRU(IN, H, gate=gate, batch_first=False, dtype=torch.double, **ALL)
    swapped.load_state_dict(rnn.state_dict())
    out, last = swapped(x.transpose(0, 1), h, reset.transpose(0, 1))
    expected, expected_last = rnn(x, h, reset)
    assert_close(out.transpose(0, 1), expected, **TIGHT)
    assert_close(last, expected_last, **TIGHT)


@every_gate
def test_pieces_equal_the_whole_and_a_cell_equals_the_layer(gate):
    rnn = make(gate, norm="layer", learn_initial_state=True, candidate="tanh")
    x, h, reset = inputs(rnn)
    out, last = rnn(x, h, reset)
    state, outs = h, []
    for part in (slice(0, 1), slice(1, 9), slice(9, S)):
        piece, state = rnn(x[:, part], state, reset[:, part])
        outs.append(piece)
    assert_close(torch.cat(outs, 1), out, **TIGHT)
    assert_close(state, last, **TIGHT)

    cell = make(gate, mingru.MinGRUCell, norm="layer", learn_initial_state=True, candidate="tanh")
    cell.load_state_dict(rnn.state_dict())
    for step in (cell, torch.jit.script(cell)):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                state = h[0, :, 0]
                for t in range(S):
                    state = step(x[:, t], state, reset[:, t])
                    assert_close(state, out[:, t], **TIGHT)
    assert_close(cell(x[:, 0]), rnn(x[:, :1])[0][:, 0], **TIGHT)


@each_option
@every_gate
def test_inference_in_one_operator(gate, options):
    rnn = make(gate, **options)
    x, h, reset = inputs(rnn)
    expected = rnn(x, h, reset), rnn(x[:, :1]), mingru.Stack([rnn])(x)
    with torch.no_grad():
        assert_close((rnn(x, h, reset), rnn(x[:, :1]), mingru.Stack([rnn])(x)), expected, **TIGHT)


@each_option
@every_gate
def test_packed_and_lengths(gate, options):
    rnn = make(gate, **options)
    x, h, reset = inputs(rnn)
    lengths = torch.tensor([9, S, 1])
    for backend in BACKENDS:
        with mingru.use_backend(backend):
            out, last = rnn(x, h, reset, lengths)
            packed, packed_last = rnn(
                pack_padded_sequence(x, lengths, True, False), h, pack_padded_sequence(reset, lengths, True, False)
            )
            assert_close(pad_packed_sequence(packed, True)[0], out, **TIGHT)
            assert_close(packed_last, last, **TIGHT)
            for index, length in enumerate(lengths):
                one = slice(index, index + 1)
                expected, state = reference.layers(rnn, x[one, :length], h[:, one], reset[one, :length])
                assert_close(out[one, :length], expected, **TIGHT)
                assert_close(last[:, one], state, **TIGHT)
                assert not out[one, length:].any()


@in_graphs
def test_lengths_in_graphs(gate, options):
    rnn = make(gate, **options)
    x, h, reset = inputs(rnn)
    lengths = torch.tensor([9, S, 1])
    expected = rnn(x, h, reset, lengths)
    assert_close(torch.jit.script(rnn)(x, h, reset, lengths), expected, **TIGHT)
    compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x, h, reset, lengths), expected, **TIGHT)


@pytest.mark.parametrize("backend", ["native", "torch"])
@in_graphs
def test_compiled(gate, options, backend):
    if backend not in BACKENDS:
        pytest.skip("the kernels were not built")
    rnn = make(gate, **options)
    given = inputs(rnn)
    with mingru.use_backend(backend):
        expected = graded(rnn, rnn, *given)
        compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True)
        assert_close(graded(rnn, compiled, *given), expected, **TIGHT)


@in_graphs
def test_exported_and_traced(gate, options):
    rnn = make(gate, **options).eval()
    x, h, reset = inputs(rnn)
    batch, steps = torch.export.Dim("batch", max=100), torch.export.Dim("steps", max=1000)
    shapes = ({0: batch, 1: steps}, {1: batch}, {0: batch, 1: steps})
    program = torch.export.export(rnn, (x, h, reset), dynamic_shapes=shapes)
    assert "complex" not in str(program)
    traced = torch.jit.trace(rnn, (x, h, reset), check_trace=False)
    for size in (1, 5, 40, 77):
        given = torch.randn(2, size, rnn.input_dims).double(), h[:, :2], torch.rand(2, size) < 0.2
        for run in (program.module(), traced):
            assert_close(run(*given), rnn(*given), **TIGHT)


@pytest.mark.slow
def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    rnn = make("rotation", dtype=torch.float32, candidate="tanh")
    path = tmp_path / "model.onnx"
    mingru.export.onnx(rnn, (torch.randn(2, 9, IN),), path, max_steps=64)
    session = onnxruntime.InferenceSession(path)
    for size in (1, 9, 40):
        x = torch.randn(3, size, IN)
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for one, other in zip(got, rnn(x), strict=True):
            assert_close(torch.from_numpy(one), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_gate
def test_half_widths_and_autocast(gate, dtype):
    rnn = make(gate, dtype=torch.float32, candidate="tanh")
    x, h, _ = inputs(rnn, torch.float32)
    expected, last = rnn(x, h)
    half = copy.deepcopy(rnn).to(dtype)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out, state = half(x.to(dtype), h.to(dtype))
            assert out.dtype == state.dtype == dtype
            assert_close(out.float(), expected, rtol=0.05, atol=0.05)
            with torch.autocast("cpu", dtype):
                out, state = rnn(x, h)
            assert out.dtype == dtype
            assert state.dtype == torch.float32
            assert_close(state, last, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("residual", [False, "highway"])
@every_gate
def test_second_derivatives_and_per_sample_gradients(gate, residual):
    rnn = make(gate, candidate="tanh", residual=residual)
    x, h, _ = inputs(rnn)
    parameters = {name: weight.detach() for name, weight in rnn.named_parameters()}

    def loss(parameters, x, h):
        return torch.func.functional_call(rnn, parameters, (x[None], h[:, None]))[0].square().sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 1))(parameters, x, h)
    whole = torch.autograd.grad(rnn(x, h)[0].square().sum(), rnn.parameters())
    for per_sample, total in zip(each.values(), whole, strict=True):
        assert_close(per_sample.sum(0), total, **TIGHT)
    leaf = x[:, :4].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: rnn(x, h)[0], leaf, fast_mode=True)


# Convolutions


def by_steps(rnn, x):
    """Compute a one-layer convolutional layer in one direction from its weights, by the reference."""
    pre = rnn.layers[0].conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    if rnn.groups > 1:
        pre = pre.unflatten(2, (rnn.groups, 2, -1)).transpose(2, 3).flatten(2, 4)
    return reference.CELLS[f"mingru_{rnn.gate}"](*pre.chunk(2, 2), None, None, rnn.candidate)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate", "space", "options"),
    [
        pytest.param("signed", 2, {}, id="signed-plain"),
        pytest.param("rotation", 1, {"groups": 2, "candidate": "tanh"}, id="rotation-groups"),
        pytest.param("quaternion", 1, {"groups": 2}, id="quaternion-groups"),
    ],
)
def test_convolutions(gate, space, options):
    size = (5, 4)[:space]
    kind, cell_kind = (getattr(mingru, f"MinConv{space}dGRU{end}") for end in ("", "Cell"))
    rnn = kind(IN, 8, 3, padding=1, gate=gate, dtype=torch.double, **options)
    x, reset = torch.randn(B, 9, IN, *size).double(), torch.rand(B, 9) < 0.3
    leaves = [x.requires_grad_(), *rnn.parameters()]
    scripted = torch.jit.script(rnn)
    for backend in BACKENDS:
        with mingru.use_backend(backend):
            out, (last,) = rnn(x)
            expected = by_steps(rnn, x)
            assert_close(out, expected, **TIGHT)
            assert_close(last, expected[:, -1:], **TIGHT)
            grads = [torch.autograd.grad(each.square().sum(), leaves) for each in (out, expected)]
            assert_close(*grads, **TIGHT)
            with torch.no_grad():
                assert_close(rnn(x, None, reset), scripted(x, None, reset), **TIGHT)
    cell = cell_kind(IN, 8, 3, padding=1, gate=gate, dtype=torch.double, **options)
    cell.load_state_dict(rnn.state_dict())
    state = None
    for t in range(9):
        state = cell(x[:, t], state)
        assert_close(state, out[:, t], **TIGHT)
    compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x.detach()), rnn(x.detach()), **TIGHT)
    program = torch.export.export(
        rnn, (x.detach(),), dynamic_shapes=({0: torch.export.Dim("b"), 1: torch.export.Dim("s")},)
    )
    assert_close(program.module()(x[:2, :7].detach()), rnn(x[:2, :7].detach()), **TIGHT)


# In place of nn.GRU


@every_gate
def test_drop_in(gate):
    gru = mingru.drop_in.GRU(IN, H, 2, gate=gate, candidate="tanh", dtype=torch.double)
    rnn = make(gate, num_layers=2, candidate="tanh")
    rnn.load_state_dict(gru.state_dict())
    x, h, _ = inputs(rnn)
    out, last = gru(x.transpose(0, 1), h.squeeze(2))
    expected, expected_last = rnn(x, h)
    assert_close(out.transpose(0, 1), expected, **TIGHT)
    assert_close(last, expected_last.squeeze(2), **TIGHT)
    cell = mingru.drop_in.GRUCell(IN, H, gate=gate, candidate="linear", dtype=torch.double)
    with torch.no_grad():
        assert_close(cell(x[:, 0], h[0, :, 0]), copy.deepcopy(cell)(x[:, 0], h[0, :, 0]), **TIGHT)
    assert repr(cell) == f"GRUCell(4, 8, candidate='linear', gate='{gate}')"


# States, files, errors


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
    for theirs, source in layers.items():
        saved = io.BytesIO()
        torch.save(source.state_dict(), saved)
        saved.seek(0)
        for state in (source.state_dict(), torch.load(saved)):
            for ours, rnn in layers.items():
                if ours == theirs:
                    rnn.load_state_dict(state)
                    continue
                with pytest.raises(
                    RuntimeError, match=f"layers.0: weights trained with gate='{theirs}' cannot be used"
                ):
                    rnn.load_state_dict(state, strict=False)


@every_gate
def test_weights_without_a_mark_load_with_a_warning(gate):
    """State dicts of older versions have no mark, and those of safetensors and of dict comprehensions no version."""
    rnn = make(gate, num_layers=2)
    state = rnn.state_dict()
    for key in ("layers.0.gate", "layers.1.gate"):
        del state[key]
    for layer in ("layers.0", "layers.1"):
        state._metadata[layer]["version"] = 1
    for old in (state, dict(state)):
        for assign in (False, True):
            new = make(gate, num_layers=2)
            with pytest.warns(UserWarning, match=f"^load_state_dict: the weights do not say .* gate='{gate}'"):
                assert str(new.load_state_dict(old, assign=assign)) == "<All keys matched successfully>"
            assert new.state_dict().keys() == rnn.state_dict().keys()
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
    x = torch.randn(2, 5, IN)
    for candidate in ("positive", "tanh"):
        rnn = make(gate, dtype=torch.float32, candidate=candidate)
        assert_close(rnn(x), rnn(x, torch.full((1, 1, 1, H), 0.5 if gate == "quaternion" else 0.0)))
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


MEMORIES = {
    **{gate: lambda gate=gate, **options: mingru.MinGRU(4, H, gate=gate, **options) for gate in ("sigmoid", *GATES)},
    "two directions": lambda **options: mingru.drop_in.GRU(4, H, batch_first=True, bidirectional=True, **options),
    "minlstm": lambda **options: mingru.MinLSTM(4, H, **options),
    "unnormalized": lambda **options: mingru.MinLSTM(4, H, normalize=False, **options),
    "groups": lambda **options: mingru.MinConv1dGRU(4, H, 1, gate="quaternion", groups=2, **options),
}


@pytest.mark.parametrize("kind", MEMORIES.values(), ids=MEMORIES)
def test_memory_is_the_number_of_steps_that_a_state_lasts_at_first(kind):
    for memory in (1.5, 10.0):
        rnn = kind(memory=memory, candidate="linear")
        for weight in rnn.parameters():
            nn.init.zeros_(weight)
        rnn.layers[0].add_gate_bias()
        space = (1,) if isinstance(rnn, mingru.MinConv1dGRU) else ()
        h = torch.ones(rnn.num_directions, 1, *[1] * (not isinstance(rnn, mingru.drop_in.GRU)), H, *space)
        out, _ = rnn(torch.zeros(1, 1, 4, *space), [h[0]] if space else h)
        assert_close(out, torch.full_like(out, 1 - 1 / memory))
    torch.manual_seed(0)
    drawn = dict(kind(memory=7).named_parameters())
    torch.manual_seed(0)
    rnn = kind(memory=7)
    torch.manual_seed(0)
    rnn.reset_parameters()
    assert_close(dict(rnn.named_parameters()), drawn, rtol=0, atol=0)
    for wrong, error in ((1, ValueError), (torch.inf, ValueError), ("long", TypeError), (True, TypeError)):
        with pytest.raises(error, match=f": memory must be a number above 1, or None, got {wrong!r}"):
            kind(memory=wrong)
    with pytest.raises(ValueError, match="memory must be None because bias is False, got 2"):
        kind(memory=2, bias=False)


def test_the_memory_of_quaternions_is_21_steps_by_default():
    for gate, bias in (("rotation", 0.0), ("quaternion", -math.log(20))):
        found = mingru.MinGRU(64, 400, gate=gate).layers[0].linear.bias[:400:4]
        assert abs(found.mean() - bias) < 0.05
        assert "memory" not in repr(mingru.MinGRU(4, 8, gate=gate, bias=False))


@every_gate
def test_saved_and_copied(gate):
    rnn = make(gate, dtype=torch.float32, candidate="tanh")
    assert f"gate='{gate}'" in repr(rnn)
    assert [tuple(weight.shape) for weight in rnn.parameters()] == [(2 * H, IN), (2 * H,)]
    x = torch.randn(2, 5, IN)
    buffer = io.BytesIO()
    torch.save(rnn, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(rnn), torch.load(buffer, weights_only=False)):
        assert_close(other(x), rnn(x))


def test_rotations_begin_near_no_turn():
    """With inputs of variance 1, most angles are below a quarter of a turn at initialization."""
    rnn = mingru.MinGRU(64, 256, gate="rotation")
    angles = rnn.layers[0].linear(torch.randn(1000, 64))[:, 1:256:2] * torch.pi / 4
    assert 0.2 < angles.std() < 0.8
    assert (angles.abs() < torch.pi / 2).double().mean() > 0.99


@pytest.mark.parametrize("kind", [mingru.MinGRU, mingru.MinGRUCell, mingru.drop_in.GRU, mingru.drop_in.GRUCell])
def test_errors(kind):
    for gate in ("tanh", None, ["signed"], 1):
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


def test_minlstm_has_no_gate():
    with pytest.raises(TypeError, match="MinLSTM: no argument 'gate'"):
        mingru.MinLSTM(3, 4, gate="signed")


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
