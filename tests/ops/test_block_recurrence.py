"""GRU with blocks and batches of every size: against the float64 reference, and `torch.nn.GRU`."""

import pytest
import reference
import torch
from cases import WRAPS, assert_equal, graded, in_a_process, needs_kernels, tensors, with_threads
from options import CALLS, cover, lengths_of, named
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import mingru

# Around the lanes of a vector (16, or 8 and 4 of float64) and the three vectors that are summed in registers, the
# sequences in registers (8, or 4), the rows whose products are summed (64), and the rows of a block of pre-activations.
FACTORS = {
    "block_size": [1, 7, 8, 15, 16, 17, 33, 64],
    "num_blocks": [1, 2, 3],
    "batch": [1, 2, 5, 9],
    "steps": [1, 2, 65, 300],
    "dtype": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    **CALLS,
    **{name: [True, False] for name in ("bias", "bidirectional", "recompute", "norm", "hook")},
}
# From 192 features on, threads share a step of all sequences, and 128 rows are summed.
WIDE = FACTORS | {"block_size": [192, 200], "num_blocks": [1, 2], "batch": [1, 3, 33], "steps": [1, 2, 19]}
# Of values and gradients near 1.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5, torch.bfloat16: 0.06, torch.float16: 0.01}


@pytest.fixture
def _cudnn_takes_the_weights(monkeypatch):
    """Refuse weights that are not one piece of memory; of those, cuDNN makes one, with a warning."""
    gru = torch.gru

    def run(*args):
        (weights,) = (each for each in args if isinstance(each, list))
        ends = [each.data_ptr() + each.nbytes for each in weights]
        assert [each.data_ptr() for each in weights[1:]] == ends[:-1]
        assert weights[0].untyped_storage().nbytes() == ends[-1] - weights[0].data_ptr()
        return gru(*args)

    monkeypatch.setattr(torch, "gru", run)


@pytest.mark.usefixtures("_cudnn_takes_the_weights")
@pytest.mark.parametrize("row", [*cover(FACTORS), *cover(WIDE)], ids=named)
def test_equals_the_reference(row):
    batch, steps, dtype, batch_first = (row[name] for name in ("batch", "steps", "dtype", "batch_first"))
    options = {name: row[name] for name in ("block_size", "bias", "batch_first", "bidirectional", "recompute")}
    options["norm"] = "rms" if row["norm"] else None
    rnn = mingru.GRU(3, row["block_size"] * row["num_blocks"], **options, dtype=dtype)
    if row["hook"]:
        # Then the kernel takes pre-activations.
        WRAPS["hook"](rnn)
    # Few different ones, because the reference computes those of one length together.
    lengths = lengths_of(3, steps, 1)[torch.arange(batch) % 3]
    h = torch.randn(1 + rnn.bidirectional, batch, 1, rnn.hidden_dims).to(torch.promote_types(dtype, torch.float32))
    given = {"x": torch.randn(batch, steps, 3, dtype=dtype), "h": h}
    reset = torch.rand(batch, steps) < 0.1 if row["reset"] else None

    def turned(each):
        return each if batch_first else each.transpose(0, 1)

    def packed(each):
        return pack_padded_sequence(turned(each), lengths, batch_first, enforce_sorted=False)

    def run(x, h):
        options = {"lengths": lengths} if row["layout"] == "lengths" else {}
        form = packed if row["layout"] == "packed" else turned
        out, h = rnn(form(x), h, None if reset is None else form(reset), **options)
        out = pad_packed_sequence(out, batch_first)[0] if row["layout"] == "packed" else out
        return turned(out), h

    def truth(x, h):
        outs, states = torch.zeros(batch, steps, rnn.output_dims, dtype=torch.double), h.double()
        ends = torch.full((batch,), steps) if row["layout"] == "padded" else lengths
        eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        for length in ends.unique():
            at = (ends == length).nonzero().squeeze(1)
            own = None if reset is None else reset[at, :length]
            out, last = reference.layers(rnn, x[at, :length], h[:, at], own, eps)
            outs[at, :length], states = out, states.index_copy(1, at, last)
        return outs, states

    expected = graded(rnn, truth, given)
    for backend in ("native", "torch"):
        with mingru.use_backend(backend):
            got = graded(rnn, run, given)
        for name, each in expected.items():
            error = (got[name].double() - each).abs().max() / each.abs().max().clamp(min=1.0)
            assert error < TOLERANCE[dtype], f"{backend}, {name}: {error}"


def test_long_sequences_are_accurate():
    rnn = mingru.GRU(4, 64, memory=(2, 1000))
    wide = mingru.GRU(4, 64, memory=(2, 1000), dtype=torch.double)
    wide.load_state_dict(rnn.state_dict())
    x = torch.randn(2, 4096, 4)
    assert (rnn(x)[0] - wide(x.double())[0]).abs().max() < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_threads_do_not_change_the_results(packed):
    """With one input. The sums of torch's products, such as of the gradient of its weight, depend on the threads."""
    rnn, x = mingru.GRU(1, 64, block_size=16), torch.randn(9, 300, 1)
    if packed:
        x, rnn = pack_sequence([each[at:] for at, each in enumerate(x)]), mingru.drop_in.LSTM(1, 64)
    weights = [each for name, each in rnn.named_parameters() if not name.endswith(("linear.weight", "weight_ih_l0"))]

    def results():
        out, *others = tensors(rnn(x))
        return [out, *others, *torch.autograd.grad(out.square().sum(), weights)]

    one, two = with_threads((1, 2), results)
    assert len(weights) == 3 and all(map(torch.equal, one, two))


@pytest.mark.parametrize("recompute", [True, False])
def test_frozen_recurrent_weights(recompute):
    rnn, x = mingru.GRU(3, 40, block_size=20, recompute=recompute), torch.randn(9, 300, 3, requires_grad=True)
    others = [x, *(each for name, each in rnn.named_parameters() if "recurrent" not in name)]
    before = torch.autograd.grad(rnn(x)[0].square().sum(), others)
    rnn.layers[0].recurrent.requires_grad_(False)
    out = rnn(x)[0]
    assert_equal(torch.autograd.grad(out.square().sum(), others), before, rtol=0, atol=0)


def test_a_reset_before_one_training_step():
    rnn, given = mingru.GRU(3, 4), (torch.randn(1, 1, 3), torch.randn(1, 1, 1, 4), torch.tensor([[True]]))
    assert_equal(rnn(*given), mingru.use_backend("sequential")(rnn)(*given))


# Layers of float32 whose products round their operands to bfloat16, against float64 steps that round the same. Prints a
# number of all bits.
ROUNDED = """
import hashlib
import torch
import mingru

def rounded(x):
    return x + (x.detach().bfloat16() - x.detach())

def steps(rnn, x, *states):
    w_x, w_h, b_x, b_h = rnn.parameters()
    outs, num_gates = [], 2 + len(states)
    for of_x in (rounded(x) @ rounded(w_x).t() + b_x).unbind(1):
        gates, sums = of_x.chunk(num_gates, 1), (rounded(states[0]) @ rounded(w_h).t() + b_h).chunk(num_gates, 1)
        i, f, o = (torch.sigmoid(gates[at] + sums[at]) for at in (0, 1, -1))
        if len(states) == 1:
            states = [(1 - f) * torch.tanh(gates[2] + i * sums[2]) + f * states[0]]
        else:
            c = f * states[1] + i * torch.tanh(gates[2] + sums[2])
            states = [o * torch.tanh(c), c]
        outs.append(states[0])
    return torch.stack(outs, 1), *states

torch.manual_seed(0), torch.set_num_threads(1)
torch.set_float32_matmul_precision("medium")
digest = hashlib.sha256()
sizes = [(1, 12, 5, 32), (5, 11, 32, 40), (17, 10, 33, 96), (33, 12, 64, 64), (50, 10, 32, 200)]
for kind, (batch, num_steps, inputs, features) in [(kind, each) for kind in ("GRU", "LSTM") for each in sizes]:
    if mingru.ops.backends.native.is_slower_in_bfloat16(kind.lower(), features, num_steps):
        continue
    rnn = getattr(mingru.drop_in, kind)(inputs, features, batch_first=True)
    wide = getattr(torch.nn, kind)(inputs, features, batch_first=True, dtype=torch.double)
    wide.load_state_dict(rnn.state_dict())
    x, weight = torch.randn(batch, num_steps, inputs), torch.randn(batch, num_steps, features)
    states = torch.randn(1 if kind == "GRU" else 2, 1, batch, features).unbind()

    def results(run, module, dtype):
        leaves = [each.to(dtype).requires_grad_() for each in (x, *states)]
        outs = run(*leaves)
        leaves += module.parameters()
        return [*outs, *torch.autograd.grad((outs[0] * weight.to(dtype)).sum() + outs[-1].sum(), leaves)]

    def call(x, *states):
        out, last = rnn(x, states if kind == "LSTM" else states[0])
        return out, *(each.squeeze(0) for each in (last if kind == "LSTM" else [last]))

    found = results(call, rnn, torch.float32)
    truth = results(lambda x, *states: steps(wide, x, *(each[0] for each in states)), wide, torch.double)
    for at, (one, exact) in enumerate(zip(found, truth)):
        # Gradients of gates are rounded too.
        most = 1e-4 if at <= len(states) else 4e-3
        assert (one - exact).norm() < most * exact.norm(), (kind, batch, at)
        digest.update(one.detach().numpy().tobytes())
    with torch.no_grad():
        assert torch.equal(call(x, *states)[0], found[0])
        bad = x.index_fill(0, torch.tensor([0]), float("nan") if kind == "GRU" else float("inf"))
        out, is_bad = call(bad, *states)[0], x.new_zeros(batch, dtype=torch.bool).index_fill(0, torch.tensor([0]), True)
        assert torch.equal(out[~is_bad], found[0][~is_bad]) and (kind == "LSTM" or out[is_bad].isnan().all())
print(digest.hexdigest())
"""


@needs_kernels
def test_products_of_bfloat16_are_emulated_to_the_bit():
    here = torch.ops.mingru.instruction_sets().split()
    digests = [in_a_process(ROUNDED, MINGRU_ISA=each) for each in ("avx512_bf16", "emulated", "amx") if each in here]
    # The first adds in another order.
    assert len({*digests[here.count("avx512_bf16") :]}) == 1
