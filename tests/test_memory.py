"""Calls of operators, layers, cells, stacks, blocks and models keep no memory, with and without gradients."""

import ctypes
import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import BLOCKS, CASES, WRAPS, case, needs_kernels, parametrized, tensors, with_threads
from torch import nn

import mingru
from mingru.ops import autograd, route
from mingru.ops.scan import LinearScan

C = ctypes.CDLL(None) if sys.platform == "linux" else None
counts = pytest.mark.skipif(not hasattr(C, "mallinfo2"), reason="the C library does not count its memory")
pytestmark = [counts, needs_kernels]


# A string as an argument kept 48 bytes for each call.
LEAST_LEAK = 8


class Mallinfo2(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def used():
    """Return the number of bytes that the process has allocated and not freed."""
    gc.collect()
    C.mallinfo2.restype = Mallinfo2
    found = C.mallinfo2()
    return found.uordblks + found.hblkhd


def kept_by(call, num_calls):
    """Return the number of bytes that a call keeps: the least of several series, because caches grow now and then.

    What others free at the same time, such as the messages of pytest-xdist, counts as kept.
    """
    least = float("inf")
    for _ in range(10):
        before = used()
        for _ in range(num_calls):
            call()
        least = min(least, abs(used() - before) / num_calls)
        if least < LEAST_LEAK:
            break
    return least


def test_a_leak_is_found():
    leak = []
    assert kept_by(lambda: leak.append(torch.empty(2)), 100) > LEAST_LEAK


def in_inference(run, x, is_cell=False):
    """Return a call that passes the state on."""
    state = None

    @torch.no_grad()
    def call():
        nonlocal state
        result = run(x, state)
        state = result if is_cell else result[1]

    return call


MANY = case("Stack of 100", lambda *_: mingru.Stack([mingru.MinGRU(2, 2) for _ in range(100)]), 2)


@parametrized([*CASES, BLOCKS[1], MANY])
def test_modules(case):
    module, x = case.make(), case.args(2, 3)["x"]

    def train():
        sum(each.sum() for each in tensors(module(x))).backward()
        module.zero_grad()

    assert case is MANY or kept_by(train, 60) < LEAST_LEAK
    assert kept_by(in_inference(module.eval(), x, case.is_cell), 300) < LEAST_LEAK
    if case.name == "MinGRU":
        given = {"lengths": torch.tensor([3, 2]), "dt": case.args(2, 3)["dt"]}
        assert kept_by(in_inference(lambda x, h: module(x, h, **given), x), 300) < LEAST_LEAK


@pytest.mark.parametrize("way", WRAPS)
def test_wrapped_maps(way):
    module, x = mingru.GRU(3, 4), torch.randn(2, 3, 3)
    WRAPS[way](module)
    assert kept_by(lambda: module(x)[0].sum().backward() or module.zero_grad(), 60) < LEAST_LEAK
    assert kept_by(in_inference(module, x), 300) < LEAST_LEAK


def test_language_models_and_packed_sequences():
    lm, rnn = mingru.models.LanguageModel(5, 4, 2, conv=2, mlp=2), mingru.MinGRU(4, 4)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(2, 30, 4), torch.tensor([30, 2]), batch_first=True)
    for call in (in_inference(lm, torch.randint(5, (2, 3))), in_inference(rnn, packed)):
        assert kept_by(call, 300) < LEAST_LEAK
    for rnn in (mingru.drop_in.GRU(4, 4), mingru.drop_in.LSTM(4, 4)):
        assert kept_by(in_inference(rnn, packed), 300) < LEAST_LEAK
        assert kept_by(lambda rnn=rnn: rnn(packed)[0].data.sum().backward() or rnn.zero_grad(), 60) < LEAST_LEAK


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_scans(dtype):
    a, b, h = (torch.randn(2, 5, 3, dtype=dtype, requires_grad=True) for _ in range(3))

    def call():
        out, _ = autograd.scan(route.NATIVE, LinearScan(a, b, h[:, :1], None, False))
        torch.autograd.grad(out.abs().sum(), (a, b, h))

    assert kept_by(call, 200) < LEAST_LEAK


def test_idle_threads_keep_a_bounded_amount():
    """The values of a call have 3 to 6 MiB. Each of the threads would keep that.

    What a product of torch keeps for each thread is not counted: 4 to 9 MiB of MKL on Intel.
    """
    stack, x = mingru.Stack([mingru.MinGRU(64, 128, norm="rms"), mingru.MinGRU(128, 64)]), torch.randn(3, 4096, 64)
    products, num_threads, kept = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 128)), 24, []
    called = threading.Barrier(num_threads, lambda: kept.append(used()), timeout=60)

    @torch.no_grad()
    def call(_):
        for each in (products, stack):
            each(x)
            called.wait()

    with ThreadPoolExecutor(num_threads) as pool:
        with_threads((1,), lambda: list(pool.map(call, range(num_threads))))
    assert kept[1] - kept[0] < 2**27 + 2**24
