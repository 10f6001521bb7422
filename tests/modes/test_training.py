"""Training in several processes, and with weights that are not plain parameters: every class, every way.

Two processes are started once for all classes and ways. They hand back numbers, or the text of the error, for each, so
that every test speaks for itself alone.
"""

import copy
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import CASES, assert_equal, join_processes, selected_cases, tensors
from mode import each_case, in_mode, mode
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
    return module, list(case.args(batch, **factory).values())[:3]


def rows(case, args, first, end):
    """These of the batch, of all that a module is called with."""
    x, h, *reset = args
    states = zip(tensors(h), case.state_dims, strict=True)
    parts = case.of_states(state.narrow(dim, first, end - first) for state, dim in states)
    x, *reset = (each.narrow(case.batch_dim, first, end - first) for each in (x, *reset))
    return [x, parts, *reset]


def maps(module):
    """Every linear map and convolution inside, by name."""
    return {name: each for name, each in module.named_modules() if isinstance(each, MAPS)}


def loss_of(outputs):
    """A mean over the batch, of all outputs and states."""
    return sum(each.square().mean() for each in tensors(outputs))


def train(model, args, weights=None):
    optimizer = torch.optim.SGD(model.parameters() if weights is None else weights, lr=0.1)
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
    return in_parts(DistributedDataParallel(module), case, args), list(module.parameters())


def compiled_ddp(case, folder):
    torch._dynamo.reset()
    module, args = make(case, dtype=torch.float64)
    # The graph is cut where a bucket is full, and a small model fills none of the usual size.
    dist._DEFAULT_FIRST_BUCKET_BYTES = 100
    model = DistributedDataParallel(module, bucket_cap_mb=1e-4)
    return in_parts(torch.compile(model, backend="aot_eager"), case, args), list(module.parameters())


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
    join_processes(rank, folder, PROCESSES, 60)
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


IN_MODES = [
    in_mode("DDP (gloo, 2 processes)", "ddp"),
    in_mode("torch.compile with DDP", "compiled_ddp"),
    in_mode("FSDP2 (fully_shard)", "fsdp"),
]


@pytest.mark.parametrize("way", IN_MODES)
@each_case([])
def test_training_in_two_processes(case, way, of_processes):
    """The losses, and the weights after them, are those of one process with the whole batch."""
    module, args = make(case, dtype=torch.float64)
    before = [weight.clone() for weight in module.parameters()]
    losses = train(module, args)
    assert losses[-1] < losses[0]
    assert not any(torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True))
    assert_equal(of_processes(way, case), [losses, *module.parameters()], rtol=1e-10, atol=1e-12)


@mode("torch.distributed.checkpoint", [])
def test_checkpoints_of_one_process_and_of_a_sharded_module(case, of_processes):
    expected, args = make(case, dtype=torch.float64)
    whole, of_one = (make(case, seed, dtype=torch.float64)[0] for seed in (2, 1))
    assert_equal(of_processes("checkpoint", case), of_one(*args), rtol=1e-12, atol=1e-12)
    state = whole.state_dict()
    dcp.load(state, checkpoint_id=of_processes.folder / f"sharded {case.name}", no_dist=True)
    whole.load_state_dict(state)
    assert_equal(whole(*args), expected(*args), rtol=0, atol=0)


# Weights that are made of others


def check_made_weights(module, plain, args, weights_of):
    """Training is that of the leaves from which the weights are made, by the plainest back end."""
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in module.named_parameters()}
    with mingru.use_backend("sequential"):
        losses = train(lambda *args: functional_call(plain, weights_of(dict(leaves)), args), args, leaves.values())
    assert losses[-1] < losses[0]
    assert_equal(train(module, args), losses, rtol=1e-10, atol=1e-12)
    for name, weight in module.named_parameters():
        assert weight.grad.abs().max() > 0
        assert_equal(weight.grad, leaves[name].grad, rtol=1e-9, atol=1e-12)
        assert_equal(weight, leaves[name], rtol=1e-10, atol=1e-12)


@mode("parametrize (weight norm)")
def test_weight_norm(case):
    plain, args = make(case, dtype=torch.float64)
    module = copy.deepcopy(plain)
    for each in maps(module).values():
        weight_norm(each)
    assert_equal(module(*args), plain(*args), rtol=1e-12, atol=1e-12)

    def weights_of(weights):
        for name in maps(plain):
            scale, direction = (weights.pop(f"{name}.parametrizations.weight.original{index}") for index in (0, 1))
            norm = direction.flatten(1).norm(dim=1).reshape(scale.shape)
            weights[f"{name}.weight"] = scale * direction / norm
        return weights

    check_made_weights(module, plain, args, weights_of)


@mode("prune")
def test_prune(case):
    plain, args = make(case, dtype=torch.float64)
    module = copy.deepcopy(plain)
    for each in maps(module).values():
        prune.l1_unstructured(each, "weight", amount=0.4)
    masks = {name: each.weight_mask for name, each in maps(module).items()}
    assert all(0 < mask.mean() < 1 for mask in masks.values())

    def weights_of(weights):
        return weights | {f"{name}.weight": mask * weights.pop(f"{name}.weight_orig") for name, mask in masks.items()}

    check_made_weights(module, plain, args, weights_of)
    pruned = module(*args)
    for name, each in maps(module).items():
        prune.remove(each, "weight")
        assert (each.weight[masks[name] == 0] == 0).all()
    assert set(module.state_dict()) == set(plain.state_dict())
    assert_equal(module(*args), pruned, rtol=1e-12, atol=1e-12)


# Numbers of eight bits


def check_accuracy(quantised, expected, args):
    """Some is lost. By rounding alone, it is up to 2 %."""
    pairs = zip(tensors(quantised(*args)), tensors(expected), strict=True)
    errors, numbers = zip(*((one - other, other) for one, other in pairs), strict=True)
    lost, size = (torch.cat([each.flatten() for each in every]).norm() for every in (errors, numbers))
    assert 0 < lost < 0.03 * size


@mode("int8 dynamic quantization")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The current implementation of the DynamicQuantizedConv:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel and other:UserWarning")
def test_int8_by_torch(case):
    plain, args = make(case)
    expected = plain.eval()(*args)
    # Convolutions are off by default, for their accuracy: https://github.com/pytorch/pytorch/issues/70480
    dynamic = torch.ao.nn.quantized.dynamic
    mapping = {each: getattr(dynamic, each.__name__) for each in MAPS if each is not WeightAndBias}
    quantised = torch.ao.quantization.quantize_dynamic(plain, set(mapping), mapping=mapping)
    kinds = [type(quantised.get_submodule(name)) for name in maps(plain)]
    assert kinds == [mapping.get(type(each), WeightAndBias) for each in maps(plain).values()]
    if set(kinds) == {WeightAndBias}:
        assert_equal(quantised(*args), expected, rtol=0, atol=0)
        pytest.skip(
            "The linear maps of drop_in are no `nn.Linear`. torchao quantizes them if it gets their names, see "
            "Deployment; torch.ao.quantization does not."
        )
    check_accuracy(quantised, expected, args)


@mode("int8 dynamic quantization")
def test_int8_by_torchao(case):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    plain, args = make(case)
    expected = plain.eval()(*args)
    quantised = copy.deepcopy(plain)
    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantize_(quantised, config, lambda module, name: isinstance(module, LINEAR_MAPS))
    linear = [name for name, each in maps(plain).items() if isinstance(each, LINEAR_MAPS)]
    assert linear == [name for name, each in maps(quantised).items() if type(each.weight.data) is not torch.Tensor]
    if not linear:
        assert_equal(quantised(*args), expected, rtol=0, atol=0)
        pytest.skip(
            "torchao quantizes linear maps only. torch.ao.quantization quantizes convolutions too, if its `mapping` "
            "contains them: https://github.com/pytorch/pytorch/issues/70480"
        )
    check_accuracy(quantised, expected, args)


# A gradient for each sequence of the batch


NO_SAMPLER = pytest.mark.xfail(reason="Opacus has no sampler for recurrent weights.", strict=True)


@mode("per-sample hooks (Opacus)", marks=[("mingru.GRU", NO_SAMPLER)])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed:UserWarning")
def test_opacus(case):
    from opacus.grad_sample import GradSampleModule, register_grad_sampler

    module, args = make(case, dtype=torch.float64)
    unhooked, batch = copy.deepcopy(module), 2 * PROCESSES

    def by_vmap(call, weights, inputs, grad_out, in_dims):
        """By one call for each sequence, because the parameter is beside the maps, which have samplers."""

        def loss(weights, *inputs):
            one = [each.unsqueeze(dim) for each, dim in zip(inputs[:-1], in_dims, strict=True)]
            return (functional_call(call, weights, tuple(one))[0].squeeze(0) * inputs[-1]).sum()

        return vmap(grad(loss), (None, *in_dims, 0))(weights, *inputs, grad_out)

    @register_grad_sampler(mingru.MinLSTM)
    def of_initial_state(rnn, activations, backprops):
        found = by_vmap(unhooked, {"initial_state": rnn.initial_state}, activations, backprops, (0, 1, 0))
        return {rnn.initial_state: found["initial_state"]}

    @register_grad_sampler(CausalConv)
    def of_causal_conv(conv, activations, backprops):
        """The convolution of a block, which takes its state and the resets by name."""
        _, (_, state), reset = args
        weights = dict(conv.named_parameters())
        found = by_vmap(unhooked.conv, weights, (*activations, state, reset), backprops, (0, 1, 0))
        return {weight: found[name] for name, weight in weights.items()}

    def loss(outputs):
        return tensors(outputs)[0].square().sum()

    with mingru.use_backend("sequential"):
        losses = [loss(module(*rows(case, args, index, index + 1))) for index in range(batch)]
        of_each = [torch.autograd.grad(each, list(module.parameters())) for each in losses]
    hooked = GradSampleModule(module, batch_first=case.batch_dim == 0, loss_reduction="sum")
    loss(hooked(*args)).backward()
    for weight, *truth in zip(module.parameters(), *of_each, strict=True):
        # A convolution takes every step of every sequence for a sample.
        found = weight.grad_sample.unflatten(0, [batch, -1]).sum(1)
        assert found.abs().max() > 0
        assert_equal(found, torch.stack(truth), rtol=1e-9, atol=1e-12)
    hooked.remove_hooks()
