"""Sequences and features that several processes divide: each has its part of what one process computes."""

import itertools
import os
import re
import zlib

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import BLOCKS, DOUBLE, FEATURES, IMAGES, MODELS, STACKS, case, join_processes, refuses, some
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close

import mingru
from mingru.distributed import SequenceParallel, TensorParallel
from mingru.models import Block, LanguageModel

PROCESSES = 4
STEPS = 13


GATES = ["rotation", "quaternion", "signed"]
WIDE = {"residual": True, "learn_initial_state": True, "norm": "rms"}
FEATURES_OF_EACH = [
    case("MinGRU", mingru.MinGRU, 3, 8, 2, bidirectional=True, dropout=0.4, **WIDE),
    case("highway", mingru.MinGRU, 16, 16, 3, residual="highway", gate=GATES, bias=False),
    case("MinLSTM", mingru.MinLSTM, 3, 4, 2, batch_first=False, normalize=False, output_gate="silu"),
    case("MinGRUCell", mingru.MinGRUCell, 3, 4, norm="layer"),
    case("drop_in.LSTMLike", mingru.drop_in.LSTMLike, 3, 8, 2, bidirectional=True, cell="minlstm"),
    case("MinConv2dGRU", mingru.MinConv2dGRU, 3, 8, 3, 2, space=2, padding=1, bidirectional=True, norm="group"),
    case("Block", Block, 8, cell="minlstm", conv=3, mlp=2, checkpoint=True, dropout=0.4),
]
LAYERS = [case for case in [*FEATURES, *IMAGES, *STACKS[1:], *BLOCKS, *MODELS] if not case.unrolls]
# A fused norm rounds bfloat16 elsewhere than the norm before a part.
WITHOUT_NORM = [case for case in FEATURES if not case.unrolls and case.module.norm is None]


def assert_refused(call, cases, prefix=""):
    """Check that `call(**arguments)` raises the error of each case, (arguments, error, message).

    The message begins with the prefix and the text of the case, in which "..." stands for any text.
    """
    for arguments, error, message in cases:
        refuses(error, "^" + prefix + re.escape(message).replace(re.escape("..."), ".*"), call, **arguments)


def random_parts(size):
    """Some are empty, or shorter than a convolution."""
    cuts = torch.randint(STEPS + 1, (size - 1,)).sort().values.tolist()
    return [slice(*ends) for ends in zip([0, *cuts], [*cuts, STEPS], strict=True)]


def arguments(case, dtype):
    """Some of the arguments of a call."""
    given = case.given(3, STEPS, dtype=dtype)
    if "lengths" in case.takes:
        given["lengths"] = torch.tensor([STEPS, 0, 6])[torch.randperm(3)]
    return {name: each for name, each in given.items() if name == "x" or torch.rand(()) < 0.7}


def computed(case, module, given, part, share=1.0):
    """Return outputs, states, gradient of x, and all other gradients. The loss has this share of that of the states."""
    # Of dropout, whose mask is that of one process.
    torch.manual_seed(2)
    given = {name: each if name in ("h", "lengths") else each[:, part].clone() for name, each in given.items()}
    x, h = given["x"], [each.clone().requires_grad_() for each in given.get("h", [])]
    out, states = case.call(module, **given | {"x": x.requires_grad_(x.is_floating_point())} | ({"h": h} if h else {}))
    torch.manual_seed(1)
    loss = (out * torch.randn(3, STEPS, *out.shape[2:], dtype=out.dtype)[:, part]).sum()
    loss = loss + share * sum((each * torch.randn_like(each)).sum() for each in states)
    loss.backward()
    grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in (*h, *module.parameters())]
    return out.detach(), [each.detach() for each in states], x.grad, grads


def check_parts(case, mesh, dtype, wrap):
    """Outputs and gradients of each rank are a part of those of one process; the gradients of weights are summed."""
    module, given = case.varied(dtype=dtype), arguments(case, dtype)
    parts = random_parts(mesh.size())
    part = parts[mesh.get_local_rank()]
    expected = computed(case, module, given, slice(None))
    module.zero_grad()
    module = wrap(parallelize_module(module, mesh, SequenceParallel()))
    out, states, grad_x, grads = computed(case, module, given, part, 1 / mesh.size())
    # Gradients of ranks may cancel each other; their rounding errors do not.
    sizes = [each.abs() for each in grads]
    for each in (*grads, *sizes):
        dist.all_reduce(each, group=mesh.get_group())
    got = [out, *states, *([] if grad_x is None else [grad_x])]
    wanted = [expected[0][:, part], *expected[1], *([] if grad_x is None else [expected[2][:, part]])]
    bounds = {torch.double: (1e-12, 1e-12), torch.float32: (2e-6, 1e-5)}.get(dtype, (2 * torch.finfo(dtype).eps,) * 2)
    for each, bound in zip(((got, wanted, wanted), (grads, expected[3], sizes)), bounds, strict=True):
        for one, other, size in zip(*each, strict=True):
            scale = max([1.0, *size.abs().flatten().tolist()])
            assert_close(one, other, rtol=0, atol=bound * scale)


def on_each(cases, meshes, check):
    """On one mesh after the other."""
    for row, mesh in zip(cases, itertools.cycle(meshes), strict=False):
        torch.manual_seed(zlib.crc32(row.name.encode()) + mesh.size())
        try:
            check(row, mesh)
        except Exception as error:
            raise AssertionError(f"{row.name}, {mesh}") from error


def rows(cases, dtype=torch.double, wrap=lambda module: module):
    def check(four, pairs):
        on_each(cases, (four, pairs["sequence"]), lambda row, mesh: check_parts(row, mesh, dtype, wrap))

    return check


def check_features(case, mesh):
    """The whole output, and all gradients, on each rank."""
    module, given = case.varied(**DOUBLE), arguments(case, torch.double)
    expected = computed(case, module, given, slice(None))
    state = module.state_dict()
    module.zero_grad()
    parallelize_module(module, mesh, TensorParallel())
    divided = [each for each in module.parameters() if isinstance(each, DTensor)]
    assert divided and all(each.to_local().numel() * mesh.size() == each.numel() for each in divided)
    found = computed(case, module, given, slice(None))
    grads = zip(found[3], expected[3], strict=True)
    grads = [each.full_tensor().view_as(like) if isinstance(each, DTensor) else each for each, like in grads]
    assert_close([*found[:3], grads], [*expected[:3], expected[3]], rtol=1e-12, atol=1e-12)
    assert_close(module.state_dict(), state, rtol=0, atol=0)


def sharded_outputs(four, pairs):
    block, x = Block(8, conv=3, **DOUBLE), torch.randn(2, 5, 8, **DOUBLE)
    expected = block(x)
    plan = {"rnn": TensorParallel(output_layouts=Shard(-1)), "out": RowwiseParallel()}
    assert_close(parallelize_module(block, four, plan)(x), expected, rtol=1e-12, atol=1e-12)


def checkpoints(four, pairs):
    """Weights divided by four, by two and by none."""
    x, models = torch.randn(2, 5, 3), [mingru.MinGRU(3, 8, 2, bidirectional=True) for _ in range(3)]
    for model, mesh in zip(models, (four, pairs["sequence"]), strict=False):
        parallelize_module(model, mesh, TensorParallel())
    dcp.save(get_model_state_dict(models[0]), checkpoint_id="checkpoint")
    for model in models[1:]:
        state = get_model_state_dict(model)
        dcp.load(state, checkpoint_id="checkpoint")
        set_model_state_dict(model, state)
        assert_close(model(x), models[0](x))


def features_refused(four, pairs):
    parallel, wrong = parallelize_module(mingru.MinGRU(3, 4), four, TensorParallel()), "module cannot be divided: ..."
    shard, layouts = {"output_layouts": Shard(-1)}, "output_layouts must be Replicate"
    cases = [
        ({"module": mingru.MinGRU(3, 6)}, ValueError, f"{wrong} has 6 numbers ...(hidden_dims 6), no multiple of 4"),
        ({"module": mingru.MinGRU(3, 4, gate="rotation")}, ValueError, f"{wrong} has 2 numbers ...(hidden_dims 4)"),
        ({"module": mingru.drop_in.GRULike(3, 8, proj_size=4, cell="mingru")}, ValueError, f"{wrong} has proj_size"),
        ({"module": mingru.MinGRU(4, 32, gate="mixed")}, ValueError, f"{wrong} has features of two kinds"),
        ({"module": mingru.GRU(3, 8)}, ValueError, f"{wrong} has recurrent weights"),
        ({"module": parallel}, ValueError, f"{wrong} is already parallel"),
        ({"module": mingru.MinGRU(3, 4, bidirectional=True), **shard}, ValueError, layouts),
        ({"module": mingru.MinGRU(3, 4, residual=True), **shard}, ValueError, layouts),
        ({"module": mingru.MinGRU(3, 4), "output_layouts": Shard(0)}, ValueError, layouts),
    ]
    assert_refused(
        lambda module, **options: parallelize_module(module, four, TensorParallel(**options)), cases, "TensorParallel: "
    )
    with pytest.raises(TypeError, match=r"MinGRU: arguments must not be DTensors, .*; pass x.to_local\(\)"):
        mingru.MinGRU(3, 4)(DTensor.from_local(torch.randn(2, 5, 3), four))


def pyramid(**factory):
    torch.manual_seed(0)
    return mingru.Stack([Block(6, conv=3, mlp=2, **factory), mingru.MinGRU(6, 5, bidirectional=True, **factory)])


def gradients(model):
    return [getattr(each.grad, "full_tensor", lambda each=each: each.grad)() for each in model.parameters()]


def beside_data_parallel(wrap):
    """Each pair has a half of the batch, and each rank of it a half of the steps."""

    def check(four, pairs):
        model = pyramid(**DOUBLE)
        x, target = torch.randn(4, 10, 6, requires_grad=True, **DOUBLE), torch.randn(4, 10, 10, **DOUBLE)
        mse_loss(model(x)[0], target).backward()
        expected = [each.grad.clone() for each in model.parameters()]
        model.zero_grad()
        batch, step = pairs.get_coordinate()
        parts = slice(2 * batch, 2 * batch + 2), slice(5 * step, 5 * step + 5)
        model = wrap(parallelize_module(model, pairs["sequence"], SequenceParallel()), four)
        mse_loss(model(x[parts])[0], target[parts]).backward()
        assert_close(gradients(model), expected, rtol=1e-12, atol=1e-14)

    return check


def with_fsdp(model, mesh):
    for layer in getattr(model, "blocks", model).layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def generation(four, pairs):
    """Of a language model whose parameters are divided."""
    model, prompts = MODELS[1].make(), torch.randint(11, (3, 5))
    expected = model.generate(prompts, 8, temperature=0)
    model = with_fsdp(model, four)
    register_fsdp_forward_method(model, "generate")
    assert all(type(each) is torch.Tensor for each in model.initial(3))
    assert torch.equal(model.generate(prompts, 8, temperature=0, state=model.initial(3)), expected)


def refusals(four, pairs):
    """Each rank names what is wrong, also on another one, and all can go on."""
    rank, parallel = four.get_local_rank(), parallelize_module(mingru.MinGRU(3, 4), four, SequenceParallel())
    rnn, wrong, error = mingru.MinGRU(3, 4), "SequenceParallel: module must be MinGRU, ..., got", ValueError
    cases = [
        ({"mesh": pairs}, error, "... a mesh with one dimension, got 2 dimensions; pass ... mesh['sequence']"),
        ({"module": torch.nn.Linear(3, 4)}, error, "... or a module that contains one, got Linear"),
        ({"module": mingru.MinGRUCell(3, 4)}, error, f"{wrong} MinGRUCell; "),
        ({"module": mingru.drop_in.GRULike(3, 4, cell="mingru")}, error, f"{wrong} mingru.drop_in.GRULike; "),
        ({"module": mingru.GRU(3, 4)}, error, f"{wrong} mingru.GRU; "),
        ({"module": parallel}, error, f"{wrong} MinGRU that is already parallel"),
    ]
    assert_refused(lambda module=rnn, mesh=four: parallelize_module(module, mesh, SequenceParallel()), cases)
    x, zeros, is_one = torch.randn(2, 5, 3), torch.zeros(2, 20), rank == 1
    expected, _ = rnn(x.repeat(1, 4, 1))
    parallelize_module(rnn, four, SequenceParallel())
    one_wrong = x[..., :2] if is_one else x
    of_one = f"{'' if is_one else 'rank 1 of SequenceParallel: '}MinGRU: x must be (B, S, 3)"
    cases = [
        ({"x": pack_sequence([x[0]])}, TypeError, "MinGRU: x must be a tensor, of which each rank"),
        ({"x": one_wrong}, error, of_one),
        ({"x": x[: 1 + rank % 2]}, error, "MinGRU: batch must be equal on all ranks ..., got 1, 2, 1, 2"),
        ({"dt": x[..., 0].abs() if is_one else None}, error, "MinGRU: arguments must be equal ...('x', 'dt')"),
        ({"lengths": torch.tensor([5 * rank, 1])}, error, "MinGRU: lengths must be equal on all ranks"),
        ({"lengths": torch.tensor([21, 1])}, error, "MinGRU: lengths must be from 0 to S = 20"),
        ({"lengths": zeros[:, 0]}, TypeError, "MinGRU: lengths must be of a signed integer dtype or uint8"),
        ({"h": torch.zeros(2, 2, 1, 4)}, error, "MinGRU: h must be ... = (1, 2, 1, 4)"),
    ]
    assert_refused(lambda x=x, **given: rnn(x, **given), cases)
    assert_close(rnn(x)[0], expected[:, 5 * rank : 5 * rank + 5])
    stack = parallelize_module(mingru.Stack([mingru.Stack([mingru.MinGRU(3, 4)])]), four, SequenceParallel())
    assert_refused(stack, [({"x": one_wrong}, error, of_one)])
    lm = parallelize_module(LanguageModel(5, 4, 1), four, SequenceParallel())
    problem, ids = "generate and stream need a model without SequenceParallel", torch.zeros(1, 2, dtype=torch.long)
    refuses(ValueError, problem, lm.generate, ids, 1)


def values(four, pairs):
    """A reset stops NaN of an earlier part, and nothing else does. Pre-activations of narrow layers are not stored."""
    rnn, rank = mingru.MinGRU(3, 4, 2, bidirectional=True), four.get_local_rank()
    x, lengths = torch.randn(2, 20, 3), torch.tensor([20, 7])
    states = rnn.all_states(x, lengths=lengths).chunk(4, 2)[rank]
    parallelize_module(rnn, four, SequenceParallel())
    assert_close(rnn.all_states(x.chunk(4, 1)[rank], lengths=lengths), states)
    rnn = parallelize_module(mingru.MinGRU(3, 4), four, SequenceParallel())
    x, reset = torch.randn(2, 400, 3), torch.zeros(2, 400, dtype=torch.bool)
    if rank == 0:
        x[:, 0] = torch.nan
    reset[0, 7] = rank == 2
    out, h = rnn(x, reset=reset)
    is_nan = out.isnan().all(2)
    assert is_nan[1].all() and h[:, 1].isnan().all()
    assert is_nan[0].sum() == [400, 400, 7, 0][rank] and not h[:, 0].isnan().any()
    for features, stored in [(63, False), (64, True)]:  # as in a layer that is not parallel
        rnn, sizes = parallelize_module(mingru.MinGRU(features, 80), four, SequenceParallel()), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            rnn(torch.randn(1, 8, features))
        assert (8 * 80 in sizes) == stored


CHECKS = {
    "quick": [
        *(rows(some(LAYERS, 4)), rows(some(LAYERS, 12), torch.float32), rows(some(WITHOUT_NORM, 8), torch.bfloat16)),
        beside_data_parallel(lambda model, _: DistributedDataParallel(model, gradient_as_bucket_view=True)),
        *(beside_data_parallel(with_fsdp), refusals, values),
        lambda four, pairs: on_each(FEATURES_OF_EACH, (four, pairs["sequence"]), check_features),
        *(sharded_outputs, features_refused, checkpoints),
    ],
    "slow": [*(generation, rows(LAYERS), rows([*STACKS[2:3], *BLOCKS[2:3]], wrap=torch.compile))],
}


def work(rank, folder, name):
    os.chdir(folder)
    join_processes(rank, folder, PROCESSES, 300)
    four = init_device_mesh("cpu", (4,))
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    for check in CHECKS[name]:
        torch.manual_seed(0)
        check(four, pairs)
    dist.barrier()  # No process ends while a thread of another still communicates.
    dist.destroy_process_group()
    # Without the end of Python, at which a thread of gloo that still runs would abort the process.
    os._exit(0)


@pytest.mark.parametrize("name", ["quick", pytest.param("slow", marks=pytest.mark.slow)])
def test_each_process_computes_its_part(name, tmp_path):
    """The processes are started once for all checks; the first error stops them, and its traceback is shown."""
    torch.multiprocessing.spawn(work, (tmp_path, name), PROCESSES)
