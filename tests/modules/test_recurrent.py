"""MinGRU and MinLSTM: memory, names, values by hand and wrong calls. What holds for every class: tests/properties."""

import copy
import math

import pytest
import torch
from refusals import WRONG_LAYER_OPTIONS, assert_refused, wrong_resets, wrong_shapes, wrong_tensors, wrong_values
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import mingru

B, S, IN, H = 3, 21, 4, 5


# The backends whose use of memory is promised.
FAST = [name for name in ("native", "torch") if mingru.backends().get(name) is True]


def test_a_highway_by_hand():
    rnn = mingru.MinGRU(1, 1, residual="highway", candidate="linear")
    with torch.no_grad():
        # z = sigma(0) = 1/2, the candidate is x, and sigma(ln 3) = 3/4.
        rnn.layers[0].linear.weight.copy_(torch.tensor([[0.0], [1.0], [0.0]]))
        rnn.layers[0].linear.bias.copy_(torch.tensor([0.0, 0.0, math.log(3.0)]))
    # States 1/2*8 + 1/2*2 = 5 and 1/2*5 + 1/2*3 = 4; outputs 3/4*5 + 1/4*2 and 3/4*4 + 1/4*3.
    out, h = rnn(torch.tensor([[[2.0], [3.0]]]), torch.tensor(8.0))
    assert_close(out.flatten(), torch.tensor([4.25, 3.75]))
    assert h.item() == 4.0
    # A highway that is far on one side is exact there.
    for bias, expected in ((200.0, 4.0), (-200.0, 3.0)):
        with torch.no_grad():
            rnn.layers[0].linear.bias[2] = bias
        assert rnn(torch.tensor([[[2.0], [3.0]]]), torch.tensor(8.0))[0][0, 1].item() == expected


# Scripting


def test_scripted_refuses_a_wrong_x():
    for batch_first, letters in ((True, "(B, S, 4)"), (False, "(S, B, 4)")):
        scripted = torch.jit.script(mingru.MinGRU(IN, H, batch_first=batch_first))
        with pytest.raises(torch.jit.Error) as caught:
            scripted(torch.zeros(10, 128, 7))
        assert f"MinGRU: x must be {letters}" in str(caught.value)
        assert "[10, 128, 7]" in str(caught.value)


# Dtypes


def test_autocast_casts_weights_once_for_all_steps():
    rnn, x = mingru.MinGRU(32, 64), torch.randn(2, 5, 32)
    weights = {p.shape for p in rnn.parameters()}
    casts = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].shape in weights:
                casts.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    h, grads = None, []
    with torch.autocast("cpu", torch.bfloat16):
        with Casts():
            with torch.no_grad():
                rnn(x[:, :1])
            for t in range(5):
                _, h = rnn(x[:, t : t + 1], h)
        assert len(casts) == len(weights)
        for last in (h, rnn(x)[1]):
            grads.append(torch.autograd.grad(last.square().sum(), rnn.parameters()))
    for one, other in zip(*grads, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


# Memory


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "residual": True, "norm": "rms"}, {"bidirectional": True}])
@pytest.mark.parametrize("steps", [5, 64])
@pytest.mark.parametrize("backend", FAST)
def test_time_first_is_not_copied_to_batch_first(backend, steps, options, with_reset):
    rnn = mingru.MinGRU(IN, H, batch_first=False, **options)
    with mingru.use_backend(backend):
        out, _ = rnn(torch.randn(steps, B, IN), reset=torch.rand(steps, B) < 0.2 if with_reset else None)
    assert out.shape == (steps, B, H * rnn.num_directions)
    assert out.is_contiguous()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("recompute", [None, False, True])
@pytest.mark.parametrize("hidden", [32, 64])
@pytest.mark.parametrize("backend", FAST)
def test_what_is_kept_for_the_backward_pass(backend, hidden, recompute, num_layers, batch_first):
    batch, steps = 4, 256
    rnn = mingru.MinGRU(hidden, hidden, num_layers, batch_first=batch_first, recompute=recompute)
    x = torch.randn(batch, steps, hidden)
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *rnn.parameters())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor  # which keeps the storage alive, so that no address comes twice

    with mingru.use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, _ = rnn(x if batch_first else x.view(steps, batch, hidden))
    # Per layer the states and, unless they are quicker computed again, the two pre-activations.
    values = 1 if backend == "native" and (hidden < 64 if recompute is None else recompute) else 3
    assert out.requires_grad
    assert values <= sum(kept.values()) / (num_layers * batch * steps * hidden) <= values + 0.1


# A module among modules


def test_parameter_names_and_shapes():
    def shapes(**options):
        return {name: tuple(weight.shape) for name, weight in mingru.MinGRU(3, 8, **options).named_parameters()}

    first = {"layers.0.linear.weight": (16, 3), "layers.0.linear.bias": (16,)}
    assert shapes() == first
    assert shapes(bias=False) == {"layers.0.linear.weight": (16, 3)}
    assert shapes(num_layers=2) == {**first, "layers.1.linear.weight": (16, 8), "layers.1.linear.bias": (16,)}
    back = {"layers.0.linear_reverse.weight": (16, 3), "layers.0.linear_reverse.bias": (16,)}
    assert shapes(bidirectional=True) == {**first, **back}
    assert shapes(num_layers=2, bidirectional=True)["layers.1.linear_reverse.weight"] == (16, 16)
    assert shapes(num_layers=2, residual=True).keys() - shapes(num_layers=2).keys() == {"layers.0.align.weight"}
    assert shapes(residual=True)["layers.0.align.weight"] == (8, 3)
    assert shapes(residual=True, bidirectional=True)["layers.0.align.weight"] == (16, 3)
    assert shapes(norm="rms") == {**first, "layers.0.norm.weight": (3,)}
    assert shapes(norm="layer") == {**first, "layers.0.norm.weight": (3,), "layers.0.norm.bias": (3,)}
    assert shapes(learn_initial_state=True) == {**first, "initial_state": (1, 1, 1, 8)}
    learned = {"learn_initial_state": True, "num_layers": 3, "bidirectional": True}
    assert shapes(**learned)["initial_state"] == (6, 1, 1, 8)
    # No candidate, dropout or order of time makes a parameter, and there are no buffers.
    assert shapes(candidate="tanh", dropout=0.1, num_layers=2, batch_first=False) == shapes(num_layers=2)
    rnn = mingru.MinGRU(3, 8, 2, bidirectional=True, learn_initial_state=True)
    assert list(rnn.state_dict()) == [name for name, _ in rnn.named_parameters()]


def test_gate_rows_come_first():
    rnn = mingru.MinGRU(1, 1)
    with torch.no_grad():
        rnn.layers[0].linear.weight.copy_(torch.tensor([[0.0], [1.0]]))
        rnn.layers[0].linear.bias.copy_(torch.tensor([-100.0, 0.0]))
    # A gate of 0 keeps the state, whatever the candidate.
    out, _ = rnn(torch.tensor([[[3.0]]]), torch.tensor([7.0]))
    assert out.item() == 7.0
    with torch.no_grad():
        rnn.layers[0].linear.bias[0] = 100.0
    # A gate of 1 takes g(3).
    assert rnn(torch.tensor([[[3.0]]]), torch.tensor([7.0]))[0].item() == 3.5


def test_repr_says_what_is_not_default():
    assert mingru.MinGRU(3, 8).extra_repr() == "3, 8"
    options = {"num_layers": 2, "bias": False, "batch_first": False, "dropout": 0.25, "bidirectional": True}
    options |= {"residual": True, "norm": "rms", "candidate": "tanh", "learn_initial_state": True}
    rnn = mingru.MinGRU(3, 8, **options)
    assert rnn.extra_repr() == "3, 8, " + ", ".join(f"{name}={value!r}" for name, value in options.items())
    assert repr(rnn).startswith("MinGRU(\n  3, 8, num_layers=2, ")


# What is refused

X = torch.zeros(2, 5, 3)
NO = torch.zeros(2, 5, dtype=torch.bool)

BAD_CALLS = {
    **wrong_tensors("x", X, "the layer's weight"),
    **wrong_tensors("h", torch.zeros(1, 1, 8), "x"),
    **wrong_resets("(B, S)", 2, 5),
    **wrong_shapes("x", r"\(B, S, 3\) because input_dims is 3", X[0], X[None], torch.zeros(10, 128, 4)),
    "x is None": ({"x": None}, TypeError, r"x must be a tensor, got NoneType"),
    "x of integers": ({"x": X.long()}, TypeError, r"x must be torch\.float32 .*, got torch\.int64"),
    "x of complex": ({"x": X.cfloat()}, TypeError, r"x must be torch\.float32 .*, got torch\.complex64"),
    **wrong_shapes(
        "h",
        r"expandable to \(L \* D, B, 1, H\) = \(2, 2, 1, 8\)",
        *(torch.zeros(shape) for shape in ((3, 1, 8), (3, 2, 1, 8), (2, 2, 1, 7), (2, 2, 5, 8), (1, 2, 2, 1, 8))),
    ),
    "h of integers": (
        {"h": torch.zeros(1, 1, 8).long()},
        TypeError,
        r"h must be torch\.float32 like x, got torch\.int64",
    ),
}


def test_bad_calls():
    rnn = mingru.MinGRU(3, 8, num_layers=2)
    x = torch.randn(2, 5, 3)
    expected, before = rnn(x), copy.deepcopy(BAD_CALLS)
    assert_refused(lambda **args: rnn(**{"x": x, **args}), BAD_CALLS, "MinGRU: ")
    assert_close(rnn(x), expected, rtol=0, atol=0)
    # No argument was changed.
    for case, (args, _, _) in BAD_CALLS.items():
        for name, value in args.items():
            if isinstance(value, torch.Tensor) and not value.is_meta:
                assert torch.equal(value, before[case][0][name]), (case, name)


def test_states_of_all_steps_are_those_of_layers():
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(S, IN)])
    for rnn, x, got in (
        (mingru.MinGRUCell(IN, H), torch.randn(B, IN), "MinGRUCell"),
        (mingru.drop_in.LSTM(IN, H), torch.randn(S, B, IN), "LSTM"),
        (mingru.MinLSTM(IN, H), packed, "PackedSequence"),
    ):
        with pytest.raises(TypeError, match=f"all_states must be called on a mingru.MinGRU .* got {got}$"):
            rnn.all_states(x)


def test_bad_calls_in_the_order_of_time():
    rnn = mingru.MinGRU(3, 8, batch_first=False)
    with pytest.raises(ValueError, match=r"^MinGRU: x must be \(S, B, 3\) because input_dims is 3, got \(5, 3\)"):
        rnn(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"^MinGRU: reset must be \(S, B\) = \(5, 2\), got \(2, 5\)"):
        rnn(torch.zeros(5, 2, 3), reset=NO)
    with pytest.raises(ValueError, match=r"^MinGRU: h must be expandable to .* = \(1, 2, 1, 8\), got \(5, 1, 8\)"):
        rnn(torch.zeros(5, 2, 3), torch.zeros(5, 1, 8))


BAD_OPTIONS = {
    **WRONG_LAYER_OPTIONS,
    **wrong_values("hidden_dims", "an int", types=(None, [8, 8])),
    **wrong_values("hidden_dims", "at least 1", values=(-1,)),
    **wrong_values("residual", "a bool or 'highway'", types=("gated",)),
    "highway of other sizes": (
        {"residual": "highway"},
        ValueError,
        r"hidden_dims must be 3 like input_dims because residual is 'highway', got 8; change the size of x by a torch",
    ),
    "highway in both directions": (
        {"residual": "highway", "hidden_dims": 3, "bidirectional": True},
        ValueError,
        r"bidirectional must be False because residual is 'highway', got True; use a layer for each direction",
    ),
}


def test_bad_options():
    sizes = {"input_dims": 3, "hidden_dims": 8, "num_layers": 2}
    assert_refused(lambda **options: mingru.MinGRU(**{**sizes, **options}), BAD_OPTIONS, "MinGRU: ")


def test_dropout_may_be_an_integer_and_sits_at_the_bounds():
    for dropout in (0, 1, 0.0, 1.0):
        assert mingru.MinGRU(3, 8, 2, dropout=dropout).dropout == dropout


@pytest.mark.parametrize("backend", [name for name, can_run in mingru.backends().items() if can_run is True])
def test_gradients_when_one_input_is_made_from_another(backend):
    """With `create_graph`, each path is counted once."""
    rnn = mingru.MinGRU(3, 4).double()
    encoder = torch.nn.Linear(3, 4).double()
    x = torch.randn(2, 7, 3, dtype=torch.double, requires_grad=True)
    with mingru.use_backend(backend):
        loss = rnn(x, encoder(x.mean(1))[None, :, None])[0].square().sum()
        (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
        (graphed,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(graphed.square().sum(), x)
    torch.testing.assert_close(graphed, plain)
    with mingru.use_backend("sequential"):
        loss = rnn(x, encoder(x.mean(1))[None, :, None])[0].square().sum()
        (graphed,) = torch.autograd.grad(loss, x, create_graph=True)
        (truth,) = torch.autograd.grad(graphed.square().sum(), x)
    torch.testing.assert_close(second, truth)


def test_a_saved_tensor_hook_may_lay_tensors_out_anew():
    rnn = mingru.MinGRU(64, H, batch_first=False)
    x = torch.randn(S, B, 64)

    def grads(pack):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out, _ = rnn(x)
        return torch.autograd.grad(out.square().sum(), list(rnn.parameters()))

    assert_close(grads(lambda tensor: tensor.contiguous()), grads(lambda tensor: tensor))


def test_weights_that_do_not_lie_dense():
    rnn, twin = mingru.MinGRU(IN, H), mingru.MinGRU(IN, H)
    twin.load_state_dict(rnn.state_dict())
    linear = twin.layers[0].linear
    linear.weight = torch.nn.Parameter(linear.weight.detach().t().contiguous().t())
    linear.bias = torch.nn.Parameter(torch.stack([linear.bias.detach()] * 2, 1)[:, 0])
    assert not linear.weight.is_contiguous()
    assert not linear.bias.is_contiguous()
    x = torch.randn(B, S, IN)
    assert_close(twin(x), rnn(x))
    assert_close(*(torch.autograd.grad(each(x)[0].square().sum(), each.parameters()) for each in (twin, rnn)))


def test_a_parametrised_weight_is_computed_once():
    rnn = mingru.MinGRU(IN, H)
    count = []

    class Counted(torch.nn.Module):
        def forward(self, weight):
            count.append(1)
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(rnn.layers[0].linear, "weight", Counted())
    count.clear()
    rnn(torch.randn(B, S, IN))
    assert len(count) == 1
