"""GRU with blocks and batches of every size: against the float64 reference, and `torch.nn.GRU`."""

import pytest
import reference
import torch
from cases import WRAPS, assert_equal, graded, tensors, with_threads
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
