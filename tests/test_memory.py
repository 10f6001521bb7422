"""Calls of operators, layers, cells, stacks, blocks and models keep no memory, with and without gradients."""

import ctypes
import gc
import sys
import threading
from functools import partial

import pytest
import torch
from torch import nn

import mingru
from mingru.ops import Layout, Spec, Start, autograd, route
from mingru.ops.scan import LinearScan

C = ctypes.CDLL(None) if sys.platform == "linux" else None
pytestmark = [
    pytest.mark.skipif(not hasattr(C, "mallinfo2"), reason="the C library does not count its memory"),
    pytest.mark.skipif(mingru.backends()["native"] is not True, reason="the kernels were not built"),
]


# A string as an argument kept 48 bytes for each call.
LEAST_LEAK = 8


@pytest.fixture(scope="module", autouse=True)
def _only_new_objects():
    """Let the garbage collector skip the objects of tests before, which would take most of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def used():
    """Return the number of bytes that the process has allocated and not freed."""
    gc.collect()
    C.mallinfo2.restype = Mallinfo2
    found = C.mallinfo2()
    return found.uordblks + found.hblkhd


def kept_by(call, num_calls):
    """Return the number of bytes that a call keeps: the least of several series, because caches grow now and then."""
    least = float("inf")
    for _ in range(10):
        before = used()
        for _ in range(num_calls):
            call()
        least = min(least, (used() - before) / num_calls)
        if least < LEAST_LEAK:
            break
    return least


def test_a_leak_is_found():
    leak = []
    assert kept_by(lambda: leak.append(torch.empty(2)), 100) > LEAST_LEAK


LAYERS = {
    "MinGRU": lambda: mingru.MinGRU(4, 4, 2),
    "all options": lambda: mingru.MinGRU(3, 4, 2, norm="rms", residual=True, bidirectional=True, candidate="tanh"),
    "rotation": lambda: mingru.MinGRU(4, 4, gate="rotation"),
    "highway": lambda: mingru.MinGRU(4, 4, residual="highway"),
    "MinLSTM": lambda: mingru.MinLSTM(4, 4),
    "MinGRUCell": lambda: mingru.MinGRUCell(4, 4),
    "MinLSTMCell": lambda: mingru.MinLSTMCell(4, 4, norm="layer"),
    "MinConv1dGRU": lambda: mingru.MinConv1dGRU(2, 2, 3, padding=1),
    "MinConv1dGRUCell": lambda: mingru.MinConv1dGRUCell(2, 2, 3, padding=1),
    "Stack": lambda: mingru.Stack([mingru.MinGRU(4, 4), mingru.MinLSTM(4, 3)], residual=True),
    "Block": lambda: mingru.models.Block(4, conv=3, mlp=2),
    "LanguageModel": lambda: mingru.models.LanguageModel(5, 4, 2, conv=2, mlp=2),
    "drop_in.GRU": lambda: mingru.drop_in.GRU(4, 4),
    "drop_in.GRUCell": lambda: mingru.drop_in.GRUCell(4, 4),
}


def input_of(module):
    if isinstance(module, mingru.models.LanguageModel):
        return torch.randint(5, (2, 3))
    if isinstance(module, mingru.MinConv1dGRU):
        return torch.randn(2, 3, 2, 6)
    if isinstance(module, mingru.MinConv1dGRUCell):
        return torch.randn(2, 2, 6)
    dims = module.input_dims
    return torch.randn(2, dims) if module.role == "step" else torch.randn(2, 3, dims)


def first(result):
    return result if isinstance(result, torch.Tensor) else result[0]


def in_inference(module, x):
    """Return a call that passes the state on."""
    state = None

    @torch.no_grad()
    def call():
        nonlocal state
        result = module(x, state)
        state = result if isinstance(result, torch.Tensor) else result[1]

    return call


def in_training(module, x):
    def call():
        first(module(x)).sum().backward()
        module.zero_grad()

    return call


@pytest.mark.parametrize(("mode", "num_calls"), [(in_inference, 300), (in_training, 60)])
@pytest.mark.parametrize("name", LAYERS)
def test_modules(name, mode, num_calls):
    module = LAYERS[name]()
    if mode is in_inference:
        module.eval()
    assert kept_by(mode(module, input_of(module)), num_calls) < LEAST_LEAK


def test_many_states():
    stack = mingru.Stack([mingru.MinGRU(2, 2) for _ in range(100)])
    assert kept_by(in_inference(stack, torch.randn(1, 1, 2)), 400) < LEAST_LEAK


def test_lengths_and_packed_sequences():
    rnn, x = mingru.MinGRU(4, 4), torch.randn(2, 3, 4)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2]), batch_first=True)
    dt = torch.rand(2, 3)
    for call in (partial(rnn, x, lengths=torch.tensor([3, 2])), partial(rnn, packed), partial(rnn, x, dt=dt)):
        with torch.no_grad():
            assert kept_by(call, 300) < LEAST_LEAK


@pytest.mark.parametrize("cell", ["mingru", "mingru_signed", "mingru_rotation", "minlstm", "minlstm_unnormalized"])
def test_recurrences(cell):
    inputs = [torch.randn(2, 5, 4, requires_grad=True) for _ in range(mingru.ops.NUM_INPUTS[cell])]
    start = Start(torch.zeros(2, 1, 4), torch.zeros(2, 1, 4), torch.rand(2, 5) < 0.5)

    def call():
        out, _ = mingru.ops.recurrence(Spec(cell, "tanh", True), inputs, start, Layout(False), "native")
        torch.autograd.grad(out.sum(), inputs)

    assert kept_by(call, 200) < LEAST_LEAK


def test_idle_threads_keep_a_bounded_amount():
    """The values of a call have 3 to 6 MiB. Each of the threads would keep that."""
    stack, x = mingru.Stack([mingru.MinGRU(64, 128, norm="rms"), mingru.MinGRU(128, 64)]), torch.randn(3, 4096, 64)
    num_threads = 24
    called, end = threading.Barrier(num_threads + 1), threading.Event()

    def call():
        with torch.no_grad():
            stack(x)
        called.wait()
        end.wait()

    before_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = used()
    threads = [threading.Thread(target=call) for _ in range(num_threads)]
    try:
        for thread in threads:
            thread.start()
        called.wait()
        assert used() - before < 2**27 + 2**24
    finally:
        end.set()
        for thread in threads:
            thread.join()
        torch.set_num_threads(before_threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_scans(dtype):
    a, b, h = (torch.randn(2, 5, 3, dtype=dtype, requires_grad=True) for _ in range(3))

    def call():
        out, _ = autograd.scan(route.Choice("native", True), LinearScan(a, b, h[:, :1], None, False))
        torch.autograd.grad(out.abs().sum(), (a, b, h))

    assert kept_by(call, 200) < LEAST_LEAK
