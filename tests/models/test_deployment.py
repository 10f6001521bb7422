"""`Block` and `LanguageModel` compiled, exported, scripted, checkpointed and quantized.

Each way is compared with eager mode. tests/modes runs `Block` in every mode. These tests are about a model of several
blocks, its states and `generate`.
"""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.export import Dim
from torch.testing import assert_close

import mingru
from mingru.models import LanguageModel, map_state
from mingru.ops.backends import traceable

# PyTorch's compiler and exporter warn about PyTorch's own code.
pytestmark = [
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]

VOCAB, DIMS = 11, 8
# So many that each of the states changes a token of at least one sequence.
PROMPTS = (64, 3)
GIVEN = {
    "ids": (),
    "state": ("state",),
    "reset": ("state", "reset"),
    "lengths": ("state", "lengths"),
    "all": ("state", "reset", "lengths"),
}

both_cells = pytest.mark.parametrize("cell", ["mingru", "minlstm"])


def make(cell="mingru", **options):
    """Return a model of two blocks, the same for the same options."""
    torch.manual_seed(0)
    return LanguageModel(VOCAB, DIMS, 2, cell=cell, expansion=1.5, conv=4, mlp=2, **options)


def ids_of(batch, steps):
    return torch.randint(VOCAB, (batch, steps))


def arguments(lm, given, batch=2, steps=7):
    """Return keyword arguments of the model: ids, and random values of what is given."""
    values = {
        "ids": ids_of(batch, steps),
        "state": map_state(torch.randn_like, lm.initial_state(batch)),
        "reset": torch.rand(batch, steps) < 0.3,
        "lengths": torch.randint(1, steps + 1, (batch,)),
    }
    return {name: values[name] for name in ("ids", *given)}


def loss_of(outputs):
    logits, state = outputs
    return logits.square().mean() + sum(each.square().mean() for each in state)


def with_gradients(lm, args, call=None):
    """Return logits, states, and gradients of the parameters and the given states."""
    args = dict(args)
    leaves = [*lm.parameters()]
    if "state" in args:
        args["state"] = [each.detach().requires_grad_() for each in args["state"]]
        leaves += args["state"]
    logits, state = (lm if call is None else call)(**args)
    return [logits, *state, *torch.autograd.grad(loss_of((logits, state)), leaves)]


# States


@pytest.mark.parametrize("given", [(), ("reset",), ("lengths",), ("reset", "lengths")])
def test_states_are_not_views(given):
    """Otherwise they could not be detached in place."""
    lm = make()
    logits, state = lm(**arguments(lm, given))
    for each in [logits, *state]:
        assert each.grad_fn is not None and each.is_contiguous()
        each.detach_()


# torch.compile


@pytest.fixture
def _fresh_compiler():
    """Free what a test compiled or exported."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    gc.collect()


compiling = pytest.mark.usefixtures("_fresh_compiler")


def check_compiled(lm, given, sizes, backend):
    """Check outputs and gradients at all sizes, with one graph for the first size and one for all others."""
    compiled = torch.compile(lm, fullgraph=True, backend=backend)
    for batch, steps in sizes:
        args = arguments(lm, given, batch, steps)
        assert_close(with_gradients(lm, args, compiled), with_gradients(lm, args))
    assert counters["stats"]["unique_graphs"] == 2


@compiling
def test_compile_quickly():
    check_compiled(make(dtype=torch.float64), ("state",), [(2, 7), (3, 9), (4, 40)], "eager")


@compiling
@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [False, True])
def test_compile(checkpoint):
    # tests/modes compiles a block with inductor.
    check_compiled(
        make(dtype=torch.float64, checkpoint=checkpoint), GIVEN["all"], [(2, 7), (3, 9), (4, 40)], "aot_eager"
    )


@compiling
@pytest.mark.slow
def test_generate_with_compiled_blocks():
    lm = make().eval()
    prompts = ids_of(3, 9)
    expected = lm.generate(prompts, 8, temperature=0)
    for block in lm.blocks.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    assert_close(lm.generate(prompts, 8, temperature=0), expected)
    num_graphs = counters["stats"]["unique_graphs"]
    lm.generate(prompts, 20, temperature=0)
    assert counters["stats"]["unique_graphs"] == num_graphs > 0


# torch.export and ONNX


def export(lm, steps):
    """Export (ids, state) -> (logits, state), with any batch, and any length if `steps` is not 1."""
    batch = Dim("batch")
    of_ids = {0: batch} if steps == 1 else {0: batch, 1: Dim("steps")}
    example = arguments(lm, ("state",), 2, steps)
    return torch.export.export(
        lm, (), example, dynamic_shapes={"ids": of_ids, "state": [{1: batch} for _ in example["state"]]}
    ).module()


def one_by_one(step, args):
    """Return the logits and the state after a call for each token."""
    state = args["state"]
    logits = []
    for token in args["ids"].split(1, 1):
        out, state = step(ids=token, state=state)
        logits.append(out)
    return torch.cat(logits, 1), state


@compiling
@both_cells
def test_export_of_a_step(cell):
    lm = make(cell).eval()
    step = export(lm, 1)
    for batch in (1, 3):
        args = arguments(lm, ("state",), batch, 9)
        assert_close(one_by_one(step, args), lm(**args))


class Session:
    """An exported model, called as the model is: the file's inputs and outputs by name."""

    def __init__(self, lm, args, folder, **options):
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        path = str(folder / "model.onnx")
        mingru.export.onnx(lm, args, path, **options)
        threads = onnxruntime.SessionOptions()
        threads.intra_op_num_threads = threads.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, threads, providers=["CPUExecutionProvider"])

    def sizes(self):
        return {each.name: each.shape for each in [*self.session.get_inputs(), *self.session.get_outputs()]}

    def __call__(self, ids, state):
        given = {f"state_{index}": each.numpy() for index, each in enumerate(state)}
        names = ["out", *(f"h_out_{index}" for index in range(len(state)))]
        logits, *state = map(torch.from_numpy, self.session.run(names, {"ids": ids.numpy(), **given}))
        return logits, state


STATE_SIZES = [[1, "batch", 1, 12], [1, "batch", 3, DIMS]] * 2


def sizes_of_file(steps):
    sizes = {"ids": ["batch", steps], "out": ["batch", steps, VOCAB]}
    for name in ("state", "h_out"):
        sizes |= {f"{name}_{index}": size for index, size in enumerate(STATE_SIZES)}
    return sizes


@compiling
@pytest.mark.slow
def test_onnx_of_the_whole_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(traceable, "chunk_size", lambda: 4)
    lm = make().requires_grad_(False)
    session = Session(lm, tuple(arguments(lm, ("state",)).values()), tmp_path, max_steps=20)
    assert session.sizes() == sizes_of_file("time")
    for batch, steps in [(1, 1), (2, 7), (3, 20)]:
        args = arguments(lm, ("state",), batch, steps)
        assert_close(session(**args), lm(**args))


@compiling
@pytest.mark.slow
def test_onnx_of_a_step(tmp_path):
    lm = make("minlstm").requires_grad_(False)
    session = Session(lm, ids_of(2, 1), tmp_path, kind="step")
    assert session.sizes() == sizes_of_file(1)
    args = arguments(lm, ("state",), 3, 9)
    assert_close(one_by_one(session, args), lm(**args))


# TorchScript


@pytest.mark.usefixtures("_scripts_are_freed")
def test_a_scripted_model_equals_eager_and_rejects_a_wrong_number_of_states():
    lm = make()
    run = torch.jit.script(lm)
    args = arguments(lm, GIVEN["all"])
    with torch.no_grad():
        assert_close(run(**args), lm(**args))
    args["state"].pop()
    with pytest.raises(torch.jit.Error, match="must be 4 tensors, got 3"):
        run(**args)


# Activation checkpointing


@both_cells
def test_checkpoint_has_equal_gradients(cell):
    """The recomputation uses the same random numbers for dropout."""
    options = {"dropout": 0.4, "dtype": torch.float64}
    for given in GIVEN.values():
        stored, recomputed = make(cell, **options), make(cell, checkpoint=True, **options)
        args = arguments(stored, given)
        torch.manual_seed(1)
        expected = with_gradients(stored, args)
        torch.manual_seed(1)
        assert_close(with_gradients(recomputed, args), expected)


def stored_bytes(lm, args):
    """Return the size of what a forward pass stores for the backward pass, without the parameters."""
    known = {weight.untyped_storage().data_ptr() for weight in lm.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = lm(**args)
    assert outputs[0].grad_fn is not None
    return sum(found.values())


def test_checkpoint_stores_the_input_of_a_block():
    """Without checkpointing, a block stores more than 8 times as much."""
    ids = {"ids": ids_of(2, 64)}
    of_input = 2 * 64 * DIMS * 4

    def by_block(checkpoint):
        one, many = (
            stored_bytes(LanguageModel(VOCAB, DIMS, layers, conv=4, mlp=2, checkpoint=checkpoint), ids)
            for layers in (1, 5)
        )
        return (many - one) / 4

    assert by_block(True) == of_input
    assert by_block(False) > 8 * of_input


@pytest.mark.parametrize(("mode", "calls"), [("training", 2), ("eval", 1), ("no_grad", 1)])
def test_checkpoint_recomputes_only_in_training(mode, calls):
    lm = make(checkpoint=True).train(mode != "eval")
    found = []
    lm.blocks.layers[0].rnn.register_forward_hook(lambda *_: found.append(1))
    with torch.set_grad_enabled(mode != "no_grad"):
        loss = loss_of(lm(ids_of(2, 7)))
    if mode != "no_grad":
        loss.backward()
    assert len(found) == calls


# Functions of parameters, and copies


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda lm: pickle.loads(pickle.dumps(lm))], ids=["copy", "pickle"])
@pytest.mark.parametrize("tied", [True, False])
def test_copies(copied, tied):
    lm = make(tied=tied)
    other = copied(lm)
    args = arguments(lm, GIVEN["all"])
    assert_close(with_gradients(other, args), with_gradients(lm, args), rtol=0, atol=0)
    with torch.no_grad():
        other.embedding.weight.zero_()
    assert lm.embedding.weight.abs().min() > 0
    # The output layer of a tied copy is the copy's own embedding.
    assert (other(**args)[0].abs().max() == 0) == tied


def linear_maps(lm):
    return [each for each in lm.modules() if isinstance(each, nn.Linear)]


# Quantization and hooks


def check_quantized(quantized, dequantized):
    """Check logits and generated tokens, with a given state, against a model of the same rounded weights."""
    args = arguments(dequantized, GIVEN["all"])
    prompts = [torch.arange(5), torch.arange(3)]
    with torch.no_grad():
        assert_close(quantized(**args), dequantized(**args))
    found, expected = (
        lm.generate(prompts, 6, temperature=0, state=lm.initial_state(2)) for lm in (quantized, dequantized)
    )
    assert_close(found, expected)


def test_torchao_int8_weights():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantized, dequantized = (make(tied=False).eval() for _ in range(2))
    quantize_(quantized, Int8WeightOnlyConfig(set_inductor_config=False))
    for one, other in zip(linear_maps(quantized), linear_maps(dequantized), strict=True):
        assert type(one.weight.data) is not torch.Tensor
        rounded = one.weight.dequantize()
        assert not torch.equal(rounded, other.weight)
        other.weight.data = rounded
    check_quantized(quantized, dequantized)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel and other:UserWarning")
def test_linear_maps_without_parameters():
    """The maps of torch.ao.quantization have their weights elsewhere."""
    quantized = torch.ao.quantization.quantize_dynamic(make().eval(), {nn.Linear}, dtype=torch.float16)
    assert not list(quantized.blocks.layers[0].out.parameters())
    dequantized = make().eval()
    for each in linear_maps(dequantized):
        each.weight.data = each.weight.half().float()
    check_quantized(quantized, dequantized)


def test_hook_of_a_block_runs_in_each_step():
    lm = make()
    prompts = ids_of(3, 5)
    before = lm.generate(prompts, 4, temperature=0)
    shapes = []

    def hook(block, args, outputs):
        shapes.append(tuple(args[0].shape[:2]))
        out, h = outputs
        return -out, h

    handle = lm.blocks.layers[-1].register_forward_hook(hook)
    after = lm.generate(prompts, 4, temperature=0)
    assert shapes == [(3, 5), (3, 1), (3, 1), (3, 1)]
    assert not torch.equal(after, before)
    handle.remove()
    assert_close(lm.generate(prompts, 4, temperature=0), before)


# Precision and devices


@pytest.mark.parametrize("tied", [True, False])
def test_meta_device(tied):
    """Materialized and re-initialized, a model has the parameters of a new one."""
    options = {"tied": tied, "learn_initial_state": True, "norm": "layer"}
    with torch.device("meta"):
        lm = make(**options)
        logits, state = lm(ids_of(2, 3))
    assert {each.device.type for each in [logits, *state, *lm.initial_state(2)]} == {"meta"}
    lm.to_empty(device="cpu")
    for weight in lm.parameters():
        nn.init.constant_(weight, torch.nan)
    lm.reset_parameters()
    expected = make(**options)
    torch.manual_seed(1)
    lm.reset_parameters()
    torch.manual_seed(1)
    expected.reset_parameters()
    args = arguments(lm, GIVEN["all"])
    assert lm(**args)[0].isfinite().all()
    assert_close(with_gradients(lm, args), with_gradients(expected, args), rtol=0, atol=0)
