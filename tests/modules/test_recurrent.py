"""MinGRU, MinLSTM and GRU: values by hand, memory, derivatives, weights, lengths. The rest: tests/properties."""

import functools
import math

import pytest
import torch
from cases import ALL_BACKENDS, BACKENDS, DOUBLE, TIGHT, graded, grid, needs_kernels, refuses, with_threads
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import mingru
from mingru import functional
from mingru.functional import reset_from_lengths

B, S, IN, H = 3, 21, 4, 5


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


class Casts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.shapes += [args[0].shape] if function is torch.ops.aten._to_copy.default else []
        return function(*args, **(kwargs or {}))


def test_autocast_casts_weights_once_for_all_steps():
    rnn, x = mingru.MinGRU(32, 64), torch.randn(2, 5, 32)
    weights, h, grads = {p.shape for p in rnn.parameters()}, None, []
    with torch.autocast("cpu", torch.bfloat16):
        with Casts() as casts:
            with torch.no_grad():
                rnn(x[:, :1])
            for t in range(5):
                _, h = rnn(x[:, t : t + 1], h)
        assert sum(shape in weights for shape in casts.shapes) == len(weights)
        grads += [torch.autograd.grad(last.square().sum(), rnn.parameters()) for last in (h, rnn(x)[1])]
    assert_close(*grads, rtol=2e-2, atol=2e-2)
    assert all(grad.dtype == torch.float32 for grad in grads[0])


@grid(batch_first=[True, False], num_layers=[1, 3], recompute=[None, False, True], hidden=[32, 64])
@pytest.mark.parametrize("case", ["MinGRU native", "MinGRU torch", "GRU native"])
def test_what_is_kept_for_the_backward_pass(case, hidden, recompute, num_layers, batch_first):
    batch, steps, (layer, backend) = 4, 256, case.split()
    if backend not in ALL_BACKENDS:
        pytest.skip(f"{backend} is not here")
    rnn = getattr(mingru, layer)(hidden, hidden, num_layers, batch_first=batch_first, recompute=recompute)
    x = torch.randn(batch, steps, hidden)
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *rnn.parameters())}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes() // 4
        return tensor  # which keeps the storage alive, so that no address comes twice

    with mingru.use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, _ = rnn(x if batch_first else x.view(steps, batch, hidden))
    # Per layer the states and, unless they are quicker computed again, two pre-activations, or of a GRU 4 values.
    kept = 3 if layer == "MinGRU" else 5
    values = 1 if backend == "native" and (hidden < 64 and kept == 3 if recompute is None else recompute) else kept
    assert out.requires_grad and values <= sum(found.values()) / (num_layers * batch * steps * hidden) <= values + 0.1


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_gradients_when_one_input_is_made_from_another(backend):
    """With `create_graph`, each path is counted once."""
    rnn, encoder = mingru.MinGRU(3, 4).double(), torch.nn.Linear(3, 4).double()
    x = torch.randn(2, 7, 3, dtype=torch.double, requires_grad=True)

    def derivatives(name):
        with mingru.use_backend(name):
            loss = rnn(x, encoder(x.mean(1))[None, :, None])[0].square().sum()
            (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
            (graphed,) = torch.autograd.grad(loss, x, create_graph=True)
            return plain, graphed, *torch.autograd.grad(graphed.square().sum(), x)

    found = derivatives(backend)
    assert_close((found[0], found), (found[1], derivatives("sequential")))


class Counted(torch.nn.Module):
    count = 0

    def forward(self, weight):
        self.count += 1
        return 2 * weight


def test_weights_that_do_not_lie_dense_or_are_computed():
    rnn, twin, x = mingru.MinGRU(IN, H), mingru.MinGRU(IN, H), torch.randn(B, S, IN)
    twin.load_state_dict(rnn.state_dict())
    linear = twin.layers[0].linear
    linear.weight = torch.nn.Parameter(linear.weight.detach().t().contiguous().t())
    linear.bias = torch.nn.Parameter(torch.stack([linear.bias.detach()] * 2, 1)[:, 0])
    assert not linear.weight.is_contiguous() and not linear.bias.is_contiguous()
    assert_close(twin(x), rnn(x))
    assert_close(*(torch.autograd.grad(each(x)[0].square().sum(), each.parameters()) for each in (twin, rnn)))
    linear.bias = torch.nn.Parameter(torch.tensor([0.5]).expand(2 * H))
    found, linear.bias = twin(x), torch.nn.Parameter(torch.full((2 * H,), 0.5))
    assert_close(found, twin(x))
    linear.bias = torch.nn.Parameter(linear.bias.half())
    for given in ({}, {"dt": torch.rand(B, S)}):
        refuses(RuntimeError, "dtype", twin, x, **given)
    counted = Counted()
    torch.nn.utils.parametrize.register_parametrization(rnn.layers[0].linear, "weight", counted)
    counted.count = 0
    rnn(x)
    assert counted.count == 1


@grid(hidden=[12, 20, 64, 100, 130, 256], bidirectional=[True, False], bias=[True, False])
def test_one_block_is_the_gru_of_torch(hidden, bidirectional, bias):
    """Values and gradients, for random sizes of x. test_what_is_drawn_by_default has the initialization."""
    batch, steps, inputs = torch.randint(1, 40, (3,)).tolist()
    gru = torch.nn.GRU(inputs, hidden, 2, bias, True, 0.2, bidirectional).eval()
    rnn, x = mingru.GRU.from_torch(gru), torch.randn(batch, steps, inputs, requires_grad=True)
    assert (rnn.dropout, rnn.training) == (0.2, False)
    (out, h), (expected, expected_h) = rnn(x), gru(x)
    assert_close((out, h.squeeze(2)), (expected, expected_h))
    kinds, grad = ("weight", "bias") if bias else ("weight",), torch.randn_like(out) / out.numel()
    ends = ("", "_reverse")[: 1 + bidirectional]
    names = [f"{name}{end}.{kind}" for end in ends for kind in kinds for name in ("linear", "recurrent")]
    own = [layer.get_parameter(name) for layer in rnn.layers for name in names]
    grads = torch.autograd.grad(expected, [x, *gru.parameters()], grad)
    # The second biases of r and z are a part of the first ones here.
    wanted = [each[-len(given) :] for each, given in zip(grads, [x, *own], strict=True)]
    assert_close(torch.autograd.grad(out, [x, *own], grad), tuple(wanted))


@grid(bidirectional=[True, False], bias=[True, False])
def test_exchange_with_torch(bias, bidirectional):
    x = torch.randn(4, 9, 3)
    blocks = mingru.GRU(3, 12, 2, bias, True, 0.2, bidirectional, block_size=4).eval()
    assert_close((blocks(x)[0], blocks(x)[1].squeeze(2)), blocks.to_torch()(x))
    again = mingru.GRU.from_torch(blocks.to_torch(), block_size=4)
    assert_close(list(again.state_dict().values()), list(blocks.state_dict().values()), rtol=0, atol=0)


def test_exchange_with_torch_keeps_what_is_trained_and_computed():
    gru = torch.nn.GRU(IN, 48, 2, batch_first=True)
    for frozen in (gru.weight_hh_l0, gru.bias_ih_l1, gru.bias_hh_l1):
        frozen.requires_grad_(False)
    with torch.no_grad():
        rnn = mingru.GRU.from_torch(gru)
        again = mingru.GRU.from_torch(rnn.to_torch(), block_size=64)
    names = [[name for name, each in model.named_parameters() if not each.requires_grad] for model in (rnn, again)]
    assert names == [["layers.0.recurrent.weight", "layers.1.linear.bias", "layers.1.recurrent.bias"]] * 2
    assert (rnn.block_size, again.layers[0].recurrent.weight.shape) == (None, (144, 48))
    on_meta = mingru.GRU.from_torch(torch.nn.GRU(IN, 48, bias=False, device="meta"), block_size=16)
    assert {each.shape for each in on_meta.to_torch().parameters() if each.is_meta} == {(144, IN), (144, 48)}
    assert [each.shape for each in on_meta(torch.zeros(6, B, IN, device="meta"))] == [(6, B, 48), (1, B, 1, 48)]
    torch.nn.utils.parametrize.register_parametrization(rnn.layers[0].recurrent, "weight", Counted())
    rnn.layers[1].recurrent.register_forward_hook(lambda module, args, out: (3 * out[0], -out[1]))
    x = torch.randn(B, S, IN)
    assert_close(rnn.to_torch()(x)[0], rnn(x)[0])
    rnn.layers[0].linear.bias = None
    assert_close(rnn.to_torch()(x)[0], rnn(x)[0])


# Derivatives: saved tensors, which inputs need a gradient, and in which dtype it is summed


def test_a_saved_tensor_hook_may_change_the_order_in_memory():
    """The pre-activations that are kept lie in the order of x."""
    rnn, x = mingru.MinGRU(64, 8), torch.randn(5, 3, 64).transpose(0, 1)

    def gradients(x, pack):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: pack(x) if x.dim() == 3 else x, lambda x: x):
            return torch.autograd.grad(rnn(x)[0].square().sum(), list(rnn.parameters()))

    expected = gradients(x.contiguous(), lambda x: x)
    for pack in (lambda x: x, lambda x: x.contiguous(), lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert_close(gradients(x, pack), expected)


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_tensor_subclass_goes_in(backend):
    rnn, x, h = mingru.MinGRU(3, 4), torch.randn(2, 5, 3), torch.rand(1, 2, 1, 4)
    expected = rnn(x, h)
    with mingru.use_backend(backend):
        for given in ((x.as_subclass(Tagged), h), (x, h.as_subclass(Tagged))):
            assert_close([each.as_subclass(torch.Tensor) for each in rnn(*given)], [*expected])


def test_what_a_hook_sees_keeps_its_shape():
    seen = []
    for rnn, x, shape in (
        (mingru.MinGRU(3, 4), torch.randn(2, 5, 3), (2, 1, 4)),
        (mingru.MinGRUCell(3, 4), torch.randn(2, 3), (2, 1, 4)),
        (mingru.MinConv1dGRUCell(3, 4, 1), torch.randn(2, 3, 6), (2, 1, 4, 6)),
    ):
        rnn.layers[0].register_forward_hook(lambda module, args, out: seen.append(out[1][0]))
        rnn(x)
        assert seen.pop().shape == shape
    given = torch.rand(2, 1, 4)
    rnn = mingru.MinGRU(3, 4)
    rnn.layers[0].register_forward_hook(lambda module, args, out: (out[0], [given]))
    assert rnn(torch.randn(2, 5, 3))[1].shape == (1, 2, 1, 4) and given.shape == (2, 1, 4)


def test_a_learned_state_of_images_compiles_with_resets():
    rnn = mingru.MinConv2dGRU(3, 4, 1, learn_initial_state=True)
    x, reset = torch.randn(2, 5, 3, 6, 7), torch.rand(2, 5) < 0.4
    compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x, None, reset), rnn(x, None, reset))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_state_of_float32_beside_bfloat16_keeps_its_precision_in_backward(backend):
    gate, candidate = torch.zeros(1, 1, 1), torch.full((1, 1, 1), 100.0)
    gate, candidate = (x.bfloat16().requires_grad_() for x in (gate, candidate))
    functional.mingru(gate, candidate, torch.full((1, 1, 1), 100.4), backend=backend).sum().backward()
    # (g(100) - 100.4) z (1 - z)
    assert gate.grad.item() == pytest.approx(0.025, rel=0.01)


@pytest.mark.parametrize("backend", [name for name in ALL_BACKENDS if name in ("native", "torch")])
def test_the_gradient_of_a_half_width_initial_state_is_summed_in_float32(backend):
    # Many steps, each of which adds less than the spacing of bfloat16 at the sum.
    gate, candidate = torch.zeros(8, 20_000, 4).bfloat16(), torch.zeros(8, 20_000, 4).bfloat16()
    initial = torch.zeros(1, 1, 4, dtype=torch.bfloat16).requires_grad_()
    reset = torch.ones(8, 20_000, dtype=torch.bool)
    functional.mingru(gate, candidate, reset=reset, initial_state=initial, backend=backend).sum().backward()
    # Each of 160,000 steps adds 1 - z = 0.5.
    assert_close(initial.grad.float(), torch.full((1, 1, 4), 80_000.0), rtol=0.01, atol=0)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_an_initial_state_without_resets_has_no_gradient(backend):
    gate, candidate, h = torch.randn(3, 2, 5, 4)
    initial = torch.rand(1, 1, 4, requires_grad=True)
    out = functional.mingru(gate, candidate, h[:, :1], initial_state=initial, backend=backend)
    assert not out.requires_grad
    gate.requires_grad_()
    out = functional.mingru(gate, candidate, h[:, :1], initial_state=initial, backend=backend)
    grads = torch.autograd.grad(out.sum(), [gate, initial], create_graph=True, allow_unused=True)
    assert grads[0] is not None and grads[1] is None


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_batched_gradients_keep_no_graph(backend):
    rnn = mingru.MinGRU(3, 4)
    with mingru.use_backend(backend):
        out, _ = rnn(torch.randn(2, 5, 3))
    grads = torch.autograd.grad(out, list(rnn.parameters()), torch.randn(3, *out.shape), is_grads_batched=True)
    assert not any(grad.requires_grad for grad in grads)


# Sequences of different lengths

LENGTHS = torch.tensor([9, 1, S])
KINDS = {"mingru": mingru.MinGRU, "minlstm": mingru.MinLSTM}
KINDS["minlstm_unnormalized"] = functools.partial(mingru.MinLSTM, normalize=False)
packed = functools.partial(pack_padded_sequence, batch_first=True, enforce_sorted=False)


def make(cell="mingru", **options):
    return KINDS[cell](IN, H, **options, **DOUBLE)


def inputs(lengths, num_steps=S, features=IN):
    """x with NaN in the padding, and resets."""
    x = torch.randn(len(lengths), num_steps, features).double()
    x[torch.arange(num_steps) >= lengths.unsqueeze(1)] = torch.nan
    return x, torch.rand(len(lengths), num_steps) < 0.1


# Devices and dtypes


@grid(backend=BACKENDS, form=["lengths", "packed"])
def test_another_default_device(backend, form):
    rnn, h = make(bidirectional=True), torch.randn(2, 3, 1, H).double()
    x, reset = inputs(LENGTHS)
    given = [packed(x, LENGTHS), h, packed(reset, LENGTHS)] if form == "packed" else [x, h, reset, LENGTHS]
    with mingru.use_backend(backend):
        expected = rnn(*given)
        with torch.device("meta"):
            out, last = rnn(*given)
    assert_close((out[0], last), (expected[0][0], expected[1]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_lengths_of_each_integer_dtype(dtype):
    rnn, (x, _), lengths = make(), inputs(LENGTHS), LENGTHS.to(dtype)
    assert_close(rnn(x, lengths=lengths), rnn(x, lengths=LENGTHS), **TIGHT)
    assert torch.equal(lengths, LENGTHS.to(dtype))
    # More steps than a narrow dtype could hold.
    steps, length = {torch.uint8: (600, 200), torch.int16: (40_000, 30_000)}.get(dtype, (300, 100))
    rnn, x = mingru.MinGRU(1, 1), torch.randn(1, steps, 1)
    out, h = rnn(x, lengths=torch.tensor([length], dtype=dtype))
    assert_close(h[0], rnn(x[:, :length])[1][0])
    assert not out[:, length:].any()


# Padding is skipped, in blocks of 2048 rows, by several threads


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"cell": "minlstm", "bidirectional": True, "num_layers": 2}])
def test_padding_is_skipped_without_packing(options, monkeypatch):
    rnn, (x, reset) = make(**options), inputs(LENGTHS)
    monkeypatch.setattr("mingru.modules.stacked.packing_of", lambda *args: 1 / 0)
    rnn(x, None, reset, LENGTHS)
    # A hook must see the steps, so this call packs them.
    rnn.layers[0].linear.register_forward_hook(lambda *args: None)
    refuses(ZeroDivisionError, "", rnn, x, None, reset, LENGTHS)


@pytest.mark.parametrize("name", ["reset", "dt"])
def test_padding_reaches_no_gradient_if_steps_are_of_another_class(name):
    rnn, (x, reset) = make(), inputs(LENGTHS)
    given = {"reset": reset, "dt": torch.rand(reset.shape).double()}[name]
    rnn(x, lengths=LENGTHS, **{name: given.as_subclass(type("Other", (torch.Tensor,), {}))})[0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in rnn.parameters())


@grid(cell=KINDS, kind=["long", "many", "one"])
def test_many_blocks_by_several_threads(cell, kind):
    """Of long sequences, of many that end within a step, and of one whose time is divided."""
    gate = None if kind == "many" else "silu"
    rnn = KINDS[cell](24, 40, bidirectional=True, learn_initial_state=True, output_gate=gate, **DOUBLE)
    lengths = torch.tensor([2049, 1, 2047, 700] if kind == "long" else [5000])
    lengths = torch.randint(1, 5, (3000,)) if kind == "many" else lengths
    x, reset = inputs(lengths, lengths.max(), 24)
    run = functools.partial(graded, rnn, rnn, {"x": x, "reset": reset, "lengths": lengths})
    first, *others = with_threads((1, 2, 3), run)
    # The sums of torch's products depend on the threads.
    for other in others:
        assert_close(other, first, rtol=1e-9, atol=1e-8)
    with mingru.use_backend("torch"):
        assert_close(first, run(), rtol=1e-9, atol=1e-7)


# Sequences end to end


def test_reset_from_lengths():
    lengths = torch.tensor([2, 1, 3])
    assert reset_from_lengths(lengths).tolist() == [[True, False, True, True, False, False]]
    # What is behind the last sequence is cut off from it.
    assert reset_from_lengths(lengths, 8).tolist() == [[True, False, True, True, False, False, True, False]]
    assert torch.equal(reset_from_lengths(lengths, 6), reset_from_lengths(lengths))
    assert reset_from_lengths(lengths[:0]).shape == (1, 0)
    assert reset_from_lengths(lengths[:0], 3).tolist() == [[True, False, False]]
    # The sum outgrows the dtype.
    mask = reset_from_lengths(torch.full((300,), 200, dtype=torch.uint8))
    assert mask.dtype == torch.bool and torch.equal(mask.flatten().nonzero().flatten(), torch.arange(0, 60_000, 200))
