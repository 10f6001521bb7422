"""MinGRU, MinLSTM and BlockGRU: memory, values by hand, and weights. What holds for every class: tests/properties."""

import math

import pytest
import torch
from cases import ALL_BACKENDS
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import mingru

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
    # A test before may have left the cache of casts disabled.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
        with Casts() as casts:
            with torch.no_grad():
                rnn(x[:, :1])
            for t in range(5):
                _, h = rnn(x[:, t : t + 1], h)
        assert sum(shape in weights for shape in casts.shapes) == len(weights)
        for last in (h, rnn(x)[1]):
            grads.append(torch.autograd.grad(last.square().sum(), rnn.parameters()))
    assert_close(*grads, rtol=2e-2, atol=2e-2)
    assert all(grad.dtype == torch.float32 for grad in grads[0])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("recompute", [None, False, True])
@pytest.mark.parametrize("hidden", [32, 64])
@pytest.mark.parametrize("backend", [name for name in ("native", "torch") if name in ALL_BACKENDS])
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
    assert_close(found[0], found[1])
    assert_close(found, derivatives("sequential"))


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
    counted = Counted()
    torch.nn.utils.parametrize.register_parametrization(rnn.layers[0].linear, "weight", counted)
    counted.count = 0
    rnn(x)
    assert counted.count == 1


def test_exchange_with_torch_keeps_what_is_trained_and_computed():
    gru = torch.nn.GRU(IN, 48, 2, batch_first=True)
    for frozen in (gru.weight_hh_l0, gru.bias_ih_l1, gru.bias_hh_l1):
        frozen.requires_grad_(False)
    with torch.no_grad():
        rnn = mingru.BlockGRU.from_torch(gru)
        again = mingru.BlockGRU.from_torch(rnn.to_torch(), block_size=64)
    names = [[name for name, each in model.named_parameters() if not each.requires_grad] for model in (rnn, again)]
    assert names == [["layers.0.recurrent.weight", "layers.1.linear.bias", "layers.1.recurrent.bias"]] * 2
    assert (rnn.block_size, again.layers[0].recurrent.weight.shape) == (48, (144, 48))
    on_meta = mingru.BlockGRU.from_torch(torch.nn.GRU(IN, 48, bias=False, device="meta"), block_size=16)
    assert {each.shape for each in on_meta.to_torch().parameters() if each.is_meta} == {(144, IN), (144, 48)}
    assert [each.shape for each in on_meta(torch.zeros(6, B, IN, device="meta"))] == [(6, B, 48), (1, B, 1, 48)]
    torch.nn.utils.parametrize.register_parametrization(rnn.layers[0].recurrent, "weight", Counted())
    rnn.layers[1].recurrent.register_forward_hook(lambda module, args, out: (3 * out[0], -out[1]))
    x = torch.randn(B, S, IN)
    assert_close(rnn.to_torch()(x)[0], rnn(x)[0])
    rnn.layers[0].linear.bias = None
    assert_close(rnn.to_torch()(x)[0], rnn(x)[0])
