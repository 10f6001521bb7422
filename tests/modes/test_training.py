"""Training in several processes, and with weights that are not plain parameters: every class, every way.

Two processes are started once for all classes and ways. They hand back numbers, or the text of the error, for each, so
that every test speaks for itself alone.
"""

import copy
import datetime
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import CASES, assert_equal, every_case, parametrized, selected_cases, tensors
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import mingru
from mingru.models.causal_conv import CausalConv
from mingru.ops.linear_map import LINEAR_MAPS, WeightAndBias

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninit:UserWarning")

PROCESSES = 2
STEPS = 3
MAPS = (*LINEAR_MAPS, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def make(case, seed=0, batch=2 * PROCESSES, **factory):
    """A module, the same in every process, and what it is called with."""
    torch.manual_seed(seed)
    module = case.make(**factory)
    args = [case.x(batch, **factory), case.h(batch, **factory)]
    return module, [*args, case.reset(batch)]


def rows(case, args, first, end):
    """These of the batch, of all that a module is called with."""
    x, h, *reset = args
    _, dims = case.dynamic(None, None)
    is_one = isinstance(h, torch.Tensor)
    states = [h] if is_one else h
    of_h = [next(iter(dim)) for dim in ([dims] if is_one else dims)]
    parts = [state.narrow(dim, first, end - first) for state, dim in zip(states, of_h, strict=True)]
    cut = [mask.narrow(case.batch_dim, first, end - first) for mask in reset]
    return [x.narrow(case.batch_dim, first, end - first), parts[0] if is_one else case.of_states(parts), *cut]


def maps(module):
    """Every linear map and convolution inside, by name."""
    return {name: each for name, each in module.named_modules() if isinstance(each, MAPS)}


def loss_of(outputs):
    """A mean over the batch, of all outputs and states."""
    return sum(each.square().mean() for each in tensors(outputs))


def train(model, args):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model(*args))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


# What each of the processes does


def in_parts(model, case, args):
    rank = dist.get_rank()
    losses = train(model, rows(case, args, 2 * rank, 2 * rank + 2))
    dist.all_reduce(losses)
    return losses / PROCESSES


def ddp(case, folder):
    module, args = make(case, dtype=torch.float64)
    losses = in_parts(DistributedDataParallel(module), case, args)
    return losses, list(module.parameters())


def compiled_ddp(case, folder):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    module, args = make(case, dtype=torch.float64)
    # The graph is cut where a bucket is full, and a small model fills none of the usual size.
    dist._DEFAULT_FIRST_BUCKET_BYTES = 100
    model = DistributedDataParallel(module, bucket_cap_mb=1e-4)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    losses = in_parts(torch.compile(model, backend=backend), case, args)
    assert len(graphs) > 1 or len(maps(module)) == 1
    # What can't be traced is DDP's own.
    assert all("Logger" in why or "DistributedDataParallel" in why for why in counters["graph_break"])
    return losses, list(module.parameters())


def sharded(case, seed=0):
    """Every layer by itself, and what is left with the whole."""
    module, args = make(case, seed, dtype=torch.float64)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layers in [each for each in module.modules() if isinstance(each, nn.ModuleList)][::-1]:
        for layer in layers:
            if next(layer.parameters(), None) is not None:
                fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh), args


def fsdp(case, folder):
    module, args = sharded(case)
    losses = in_parts(module, case, args)
    return losses, [weight.full_tensor() for weight in module.parameters()]


def checkpoint(case, folder):
    """Save a sharded one, then load what one process saved into it."""
    module, args = sharded(case)
    dcp.save(get_model_state_dict(module), checkpoint_id=folder / f"sharded {case.name}")
    state = get_model_state_dict(module)
    dcp.load(state, checkpoint_id=folder / f"whole {case.name}")
    set_model_state_dict(module, state)
    return module(*args)


WAYS = {each.__name__: each for each in (ddp, fsdp, checkpoint, compiled_ddp)}


def work(rank, folder, names):
    warnings.simplefilter("error")
    # Ours are views, as those of every layer are that has a state, and nothing here writes into them.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w+\) returned a view tensor", UserWarning)
    # Dynamo does so itself, to trace one.
    instance = r"<class 'torch.autograd.function.Function'> should not be instantiated"
    warnings.filterwarnings("ignore", instance, DeprecationWarning)
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), PROCESSES)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timeout)
    found = {}
    for name, way in WAYS.items():
        for case in [case for case in CASES if case.name in names]:
            try:
                found[name, case.name] = [each.detach() for each in tensors(way(case, folder))]
            except Exception:
                found[name, case.name] = traceback.format_exc()
    torch.save(found, folder / f"rank {rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_processes(tmp_path_factory, request):
    """What both found, by way and class."""
    folder = tmp_path_factory.mktemp("processes")
    cases = selected_cases(request)
    for case in cases:
        module, _ = make(case, seed=1, dtype=torch.float64)
        dcp.save(module.state_dict(), checkpoint_id=folder / f"whole {case.name}", no_dist=True)
    torch.multiprocessing.spawn(work, (folder, [case.name for case in cases]), PROCESSES)
    found = [torch.load(folder / f"rank {rank}") for rank in range(PROCESSES)]

    def of(way, case):
        both = [by_way[way, case.name] for by_way in found]
        for text in both:
            assert not isinstance(text, str), text
        assert_equal(both[0], both[1], rtol=0, atol=0)
        return both[0]

    of.folder = folder
    return of


def check_training(found, case):
    """The losses, and the weights after them, as those of one process with the whole batch."""
    module, args = make(case, dtype=torch.float64)
    before = [weight.clone() for weight in module.parameters()]
    losses = train(module, args)
    assert losses[-1] < losses[0]
    assert not any(torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True))
    assert_equal(found, [losses, *module.parameters()], rtol=1e-10, atol=1e-12)


@pytest.mark.mode("DDP (gloo, 2 processes)")
@parametrized(CASES, quick=[])
def test_ddp(case, of_processes):
    check_training(of_processes("ddp", case), case)


@pytest.mark.mode("torch.compile with DDP")
@parametrized(CASES, quick=[])
def test_compiled_ddp(case, of_processes):
    check_training(of_processes("compiled_ddp", case), case)


@pytest.mark.mode("FSDP2 (fully_shard)")
@parametrized(CASES, quick=[])
def test_fsdp(case, of_processes):
    check_training(of_processes("fsdp", case), case)


@pytest.mark.mode("torch.distributed.checkpoint")
@parametrized(CASES, quick=[])
def test_checkpoint_of_one_process_into_a_sharded_module(case, of_processes):
    module, _ = make(case, seed=1, dtype=torch.float64)
    _, args = make(case, dtype=torch.float64)
    assert_equal(of_processes("checkpoint", case), module(*args), rtol=1e-12, atol=1e-12)


@pytest.mark.mode("torch.distributed.checkpoint")
@parametrized(CASES, quick=[])
def test_checkpoint_of_a_sharded_module_into_one_process(case, of_processes):
    of_processes("checkpoint", case)
    expected, args = make(case, dtype=torch.float64)
    module, _ = make(case, seed=2, dtype=torch.float64)
    state = module.state_dict()
    dcp.load(state, checkpoint_id=of_processes.folder / f"sharded {case.name}", no_dist=True)
    module.load_state_dict(state)
    assert_equal(module(*args), expected(*args), rtol=0, atol=0)


# Weights that are made of others


def train_functional(module, args, leaves, weights_of):
    """`train` of these leaves, from which the weights are made, by the plainest back end."""
    optimizer = torch.optim.SGD(leaves.values(), lr=0.1)
    losses, grads = [], []
    for _ in range(STEPS):
        with mingru.use_backend("sequential"):
            loss = loss_of(functional_call(module, weights_of(leaves), tuple(args)))
        optimizer.zero_grad()
        loss.backward()
        grads.append({name: leaf.grad.clone() for name, leaf in leaves.items()})
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), grads[-1]


@pytest.mark.mode("parametrize (weight norm)")
@every_case
def test_weight_norm(case):
    plain, args = make(case, dtype=torch.float64)
    expected = plain(*args)
    module = copy.deepcopy(plain)
    for each in maps(module).values():
        weight_norm(each)
    assert_equal(module(*args), expected, rtol=1e-12, atol=1e-12)

    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in module.named_parameters()}

    def weights_of(leaves):
        weights = dict(leaves)
        for name in maps(plain):
            scale, direction = (weights.pop(f"{name}.parametrizations.weight.original{index}") for index in (0, 1))
            norm = direction.flatten(1).norm(dim=1).reshape(scale.shape)
            weights[f"{name}.weight"] = scale * direction / norm
        return weights

    losses, grads = train_functional(plain, args, leaves, weights_of)
    assert losses[-1] < losses[0]
    assert_equal(train(module, args), losses, rtol=1e-10, atol=1e-12)
    for name, weight in module.named_parameters():
        assert weight.grad.abs().max() > 0
        assert_equal(weight.grad, grads[name], rtol=1e-9, atol=1e-12)
        assert_equal(weight, leaves[name], rtol=1e-10, atol=1e-12)


@pytest.mark.mode("prune")
@every_case
def test_prune(case):
    plain, args = make(case, dtype=torch.float64)
    before = plain(*args)
    module = copy.deepcopy(plain)
    for each in maps(module).values():
        prune.l1_unstructured(each, "weight", amount=0.4)
    masks = {name: each.weight_mask for name, each in maps(module).items()}
    assert all(0 < mask.mean() < 1 for mask in masks.values())
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in module.named_parameters()}

    def weights_of(leaves):
        weights = dict(leaves)
        for name, mask in masks.items():
            weights[f"{name}.weight"] = mask * weights.pop(f"{name}.weight_orig")
        return weights

    losses, grads = train_functional(plain, args, leaves, weights_of)
    assert losses[-1] < losses[0]
    assert_equal(train(module, args), losses, rtol=1e-10, atol=1e-12)
    for name, weight in module.named_parameters():
        assert_equal(weight.grad, grads[name], rtol=1e-9, atol=1e-12)
    for name, mask in masks.items():
        grad = maps(module)[name].weight_orig.grad
        assert (grad[mask == 0] == 0).all() and (grad[mask == 1] != 0).any()

    pruned = module(*args)
    with pytest.raises(AssertionError):
        assert_equal(pruned, before)
    for name, each in maps(module).items():
        prune.remove(each, "weight")
        assert (each.weight[masks[name] == 0] == 0).all()
    assert set(module.state_dict()) == set(plain.state_dict())
    assert_equal(module(*args), pruned, rtol=1e-12, atol=1e-12)


# Numbers of eight bits


class Rounded(nn.Module):
    """A linear map or a convolution of numbers that a step of eight bits, and of seven for x, tells apart."""

    def __init__(self, inner):
        super().__init__()
        self.inner = copy.deepcopy(inner)
        step = inner.weight.abs().max() / 127
        self.inner.weight.data = (inner.weight / step).round() * step

    def forward(self, x):
        low, high = x.min().clamp(max=0), x.max().clamp(min=0)
        step = (high - low) / 127
        y = self.inner((x / step).round() * step)
        # Torch's convolutions put out eight bits too, in the steps of x; its linear maps float32.
        return y if isinstance(self.inner, LINEAR_MAPS) else (y / step).round() * step


def rounded(module):
    for child in list(module.modules()):
        for name, each in list(child.named_children()):
            if isinstance(each, MAPS):
                setattr(child, name, Rounded(each))
    return module


def distance(got, truth):
    parts = [[each.double().flatten() for each in tensors(outputs)] for outputs in (got, truth)]
    got, truth = (torch.cat(part) for part in parts)
    return ((got - truth).norm() / truth.norm()).item()


def check_loss_of_accuracy(case, tool, record_property, quantised, expected, plain, args):
    """Some, and no more than twice what rounding the numbers of every map costs, by the plainest tools."""
    with torch.no_grad():
        lost = distance(quantised(*args), expected)
        by_rounding = distance(rounded(plain)(*args), expected)
    record_property("relative error", lost)
    print(f"{case.name}, {tool}: {lost:.2%} lost, {by_rounding:.2%} by rounding")
    assert 0 < lost <= 2 * by_rounding


@pytest.mark.mode("int8 dynamic quantization")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The current implementation of the DynamicQuantizedConv:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel and other:UserWarning")
@every_case
def test_int8_by_torch(case, record_property):
    plain, args = make(case)
    plain.eval()
    with mingru.use_backend("sequential"):
        expected = plain(*args)
    # Convolutions are off by default, for their accuracy: https://github.com/pytorch/pytorch/issues/70480
    dynamic = torch.ao.nn.quantized.dynamic
    mapping = {each: getattr(dynamic, each.__name__) for each in MAPS if each is not WeightAndBias}
    quantised = torch.ao.quantization.quantize_dynamic(plain, set(mapping), mapping=mapping)
    if all(isinstance(each, WeightAndBias) for each in maps(plain).values()):
        assert_equal(quantised(*args), plain(*args), rtol=0, atol=0)
        pytest.skip(
            "The linear maps of drop_in are no `nn.Linear`, so that programs that initialize each of those leave these "
            "alone. torchao quantizes them if it is told their names, see Deployment; torch.ao.quantization does not."
        )
    kinds = [type(quantised.get_submodule(name)) for name in maps(plain)]
    assert kinds == [mapping.get(type(each), WeightAndBias) for each in maps(plain).values()]
    check_loss_of_accuracy(case, "torch", record_property, quantised, expected, plain, args)


@pytest.mark.mode("int8 dynamic quantization")
@every_case
def test_int8_by_torchao(case, record_property):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    plain, args = make(case)
    plain.eval()
    with mingru.use_backend("sequential"):
        expected = plain(*args)
    quantised = copy.deepcopy(plain)
    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantize_(quantised, config, lambda module, name: isinstance(module, LINEAR_MAPS))
    linear = [name for name, each in maps(plain).items() if isinstance(each, LINEAR_MAPS)]
    for name, each in maps(quantised).items():
        assert (type(each.weight.data) is not torch.Tensor) == (name in linear)
    if not linear:
        assert_equal(quantised(*args), plain(*args), rtol=0, atol=0)
        pytest.skip(
            "torchao's int8 quantization supports linear maps only and leaves convolutions in float32. "
            "torch.ao.quantization quantizes convolutions if its `mapping` contains them: "
            "https://github.com/pytorch/pytorch/issues/70480"
        )
    check_loss_of_accuracy(case, "torchao", record_property, quantised, expected, plain, args)


# A gradient for each sequence of the batch


def of_each(case, module, args, loss):
    """The gradients by parameter, from one sequence after the other."""
    batch = args[0].shape[case.batch_dim]
    found = []
    for index in range(batch):
        with mingru.use_backend("sequential"):
            outputs = module(*rows(case, args, index, index + 1))
        found.append(torch.autograd.grad(loss(outputs), list(module.parameters())))
    return [torch.stack(grads) for grads in zip(*found, strict=True)]


@pytest.mark.mode("per-sample hooks (Opacus)")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed:UserWarning")
@every_case
def test_opacus(case, monkeypatch):
    from opacus.grad_sample import GradSampleModule

    def of_initial_state(rnn, activations, backprops):
        """The parameter of the layer itself, beside its maps, which have samplers: by one call for each sequence."""

        def loss(initial, x, h, reset, grad_out):
            args = (x.unsqueeze(0), h.unsqueeze(1), reset.unsqueeze(0))
            out, _ = functional_call(unhooked, {"initial_state": initial}, args)
            return (out.squeeze(0) * grad_out).sum()

        dims = (None, 0, 1, 0, 0)
        return {rnn.initial_state: vmap(grad(loss), dims)(rnn.initial_state, *activations, backprops)}

    def of_causal_conv(conv, activations, backprops):
        """The convolution of a block, which takes its state and the resets by name: likewise."""
        weights = dict(conv.named_parameters())

        def loss(weights, x, state, reset, grad_out):
            inputs = (x.unsqueeze(0), state.unsqueeze(1), reset.unsqueeze(0))
            y, _ = functional_call(unhooked.conv, weights, inputs)
            return (y.squeeze(0) * grad_out).sum()

        _, (_, state), reset = args
        found = vmap(grad(loss), (None, 0, 1, 0, 0))(weights, *activations, state, reset, backprops)
        return {weight: found[name] for name, weight in weights.items()}

    monkeypatch.setitem(GradSampleModule.GRAD_SAMPLERS, mingru.MinLSTM, of_initial_state)
    monkeypatch.setitem(GradSampleModule.GRAD_SAMPLERS, CausalConv, of_causal_conv)
    module, args = make(case, dtype=torch.float64)

    def loss(outputs):
        return tensors(outputs)[0].square().sum()

    expected = of_each(case, module, args, loss)
    unhooked = copy.deepcopy(module)
    hooked = GradSampleModule(module, batch_first=case.batch_dim == 0, loss_reduction="sum")
    loss(hooked(*args)).backward()
    batch = args[0].shape[case.batch_dim]
    for weight, truth in zip(module.parameters(), expected, strict=True):
        # A convolution takes every step of every sequence for a sample.
        found = weight.grad_sample.unflatten(0, [batch, -1]).sum(1)
        assert truth.abs().max() > 0
        assert_equal(found, truth, rtol=1e-9, atol=1e-12)
    hooked.remove_hooks()
