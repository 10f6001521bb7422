"""Sequences of different lengths: kernels that skip padding, devices and dtypes.

tests/properties checks that each sequence is what it is alone.
"""

import functools

import pytest
import torch
from cases import BACKENDS, DOUBLE, TIGHT, graded, needs_kernels, with_threads
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import mingru
from mingru.functional import reset_from_lengths

IN, H, S = 4, 5, 21
LENGTHS = torch.tensor([9, 1, S])
KINDS = {
    "mingru": mingru.MinGRU,
    "minlstm": mingru.MinLSTM,
    "minlstm_unnormalized": functools.partial(mingru.MinLSTM, normalize=False),
}
each_cell = pytest.mark.parametrize("cell", KINDS)
packed = functools.partial(pack_padded_sequence, batch_first=True, enforce_sorted=False)


def make(cell="mingru", **options):
    return KINDS[cell](IN, H, **options, **DOUBLE)


def inputs(lengths, num_steps=S, features=IN):
    """x with NaN in the padding, and resets."""
    x = torch.randn(len(lengths), num_steps, features).double()
    x[torch.arange(num_steps) >= lengths.unsqueeze(1)] = torch.nan
    return x, torch.rand(len(lengths), num_steps) < 0.1


# Devices and dtypes


@pytest.mark.parametrize("form", ["lengths", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
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
    monkeypatch.setattr("mingru.modules.recurrent_levels.packing_of", lambda *args: 1 / 0)
    rnn(x, None, reset, LENGTHS)
    # A hook must see the steps, so this call packs them.
    rnn.layers[0].linear.register_forward_hook(lambda *args: None)
    with pytest.raises(ZeroDivisionError):
        rnn(x, None, reset, LENGTHS)


@pytest.mark.parametrize("name", ["reset", "dt"])
def test_padding_reaches_no_gradient_if_steps_are_of_another_class(name):
    rnn, (x, reset) = make(), inputs(LENGTHS)
    given = {"reset": reset, "dt": torch.rand(reset.shape).double()}[name]
    rnn(x, lengths=LENGTHS, **{name: given.as_subclass(type("Other", (torch.Tensor,), {}))})[0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in rnn.parameters())


@pytest.mark.parametrize("kind", ["long", "many", "one"])
@each_cell
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
    assert mask.dtype == torch.bool
    assert torch.equal(mask.flatten().nonzero().flatten(), torch.arange(0, 60_000, 200))
