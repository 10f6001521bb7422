"""The C++ kernels in whatever surroundings: layouts and types drawn at random, extremes, threads, signals and forks.

How exact they must be is not picked by hand: plain PyTorch in the same type, one step after the other, has an error
against float64 too, and the kernels may have twice that (three times for gradients) and one unit in the last place.
"""

import itertools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

import mingru

WHY_NOT = mingru.backends()["native"]
pytestmark = pytest.mark.skipif(WHY_NOT is not True, reason=str(WHY_NOT))

SIZES = [1, 15, 16, 17, 63, 64, 65]
LAYOUTS = {
    "dense": lambda x: x,
    "every other lane": lambda x: torch.stack([x, x], -1).flatten(-2)[..., 1::2],
    "a stretch of steps": lambda x: torch.cat([x[:, :1], x, x[:, :1]], 1)[:, 1:-1],
    "time first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "lanes before steps": lambda x: x.mT.contiguous().mT,
    "batch last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "an odd place in memory": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),
    "one sequence for all": lambda x: x[:1].expand_as(x),
    "one step for all": lambda x: x[:, :1].expand_as(x),
    "one lane for all": lambda x: x[..., :1].expand_as(x),
}
CASES = {
    "seed": st.integers(0, 2**31),
    "shape": st.tuples(st.integers(1, 3), st.sampled_from(SIZES), st.sampled_from(SIZES)),
    "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    "layouts": st.tuples(*2 * [st.sampled_from(list(LAYOUTS))]),
    "with_reset": st.booleans(),
}


def run(kind, backend, *tensors, reset=None):
    """`linear_scan`, or `mingru` with an activation; what is not a back end is the truth."""
    if kind.startswith("linear_scan"):
        reverse = kind.endswith("reversed")
        if backend == "truth":
            return reference.linear_scan(*tensors, reverse, reset)
        return mingru.functional.linear_scan(*tensors, reverse=reverse, reset=reset, backend=backend)
    gate, candidate, h, initial = tensors
    if backend == "truth":
        return reference.mingru(gate, candidate, h, reset, kind, initial)
    options = {"activation": kind, "initial_state": initial, "reset": reset}
    return mingru.functional.mingru(gate, candidate, h, **options, backend=backend)


def graded(kind, backend, tensors, reset=None):
    """What comes out, and the gradients of all tensors, which are taken as they lie in memory; see `make`."""
    *inputs, grad_out = tensors
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = run(kind, backend, *leaves, reset=reset)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out, materialize_grads=True)


def make(kind, shape, dtype=torch.float32, layouts=("dense", "dense")):
    """The sequences and states that `kind` takes, and a gradient of what comes out."""
    batch, _, lanes = shape
    first, second = (LAYOUTS[layout](torch.randn(shape).to(dtype)) for layout in layouts)
    h, initial = torch.rand(batch, 1, lanes).to(dtype), torch.rand(lanes).to(dtype).expand(batch, 1, lanes)
    grad_out = torch.randn(shape).to(dtype)
    if kind.startswith("linear_scan"):
        # Above 1, decays grow what they meet.
        return first.clamp(-1, 1), second, h, grad_out
    return first, second, h, initial, grad_out


def doubles(tensors):
    return [tensor.double() for tensor in tensors]


def worst_units(kind, backend, dtype, draws, reset):
    """The worst error of what comes out and of each gradient, in units in the last place of `dtype`."""
    worst = []
    for drawn in draws:
        tensors = [tensor.to(dtype) for tensor in drawn]
        got = graded(kind, backend, tensors, reset)
        truth = graded(kind, "truth", doubles(tensors), reset)
        assert all(one.dtype == dtype for one in got)
        # All that is added up is of the order of 1 or more, whatever is left of it: 1 - tanh(v)^2, say.
        units = [torch.finfo(dtype).eps * other.abs().max().clamp_min(1.0) for other in truth]
        worst.append([(one - other).abs().max() / unit for one, other, unit in zip(got, truth, units, strict=True)])
    return torch.tensor(worst).amax(0).tolist()


@pytest.mark.parametrize("kind", ["positive", "linear", "tanh", "linear_scan", "linear_scan, reversed"])
# To shrink what fails takes minutes, and it is small as it is.
@settings(deadline=None, derandomize=True, max_examples=20, phases=[Phase.generate])
@given(case=st.fixed_dictionaries(CASES))
def test_as_exact_as_plain_pytorch(kind, case):
    torch.manual_seed(case["seed"])
    shape, dtype = case["shape"], case["dtype"]
    reset = torch.rand(shape[:2]) < 0.1 if case["with_reset"] else None
    # The worst of a few errors is luck, and there are fewer states than steps.
    draws = [make(kind, shape, dtype, case["layouts"]) for _ in range(3 + 64 // (shape[0] * shape[2]))]
    units = worst_units(kind, "native", dtype, draws, reset)
    # In float64 the truth errs as plain PyTorch does, by as many units as in float32: once more is allowed.
    plain = worst_units(kind, "sequential", torch.float32 if dtype == torch.float64 else dtype, draws, reset)
    times = 3 if dtype == torch.float64 else 2
    assert units[0] <= times * plain[0] + 1, "value"
    for index in range(1, len(units)):
        assert units[index] <= (times + 1) * plain[index] + 1, f"gradient {index}"


@pytest.mark.parametrize("extreme", [1e4, -1e4, float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("kind", ["positive", "linear", "tanh", "linear_scan", "linear_scan, reversed"])
def test_one_extreme_among_others(kind, extreme):
    """It reaches what the reference says it reaches, and nothing else, in values and in gradients."""
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[:, 30] = True
    for which, step in itertools.product((0, 1), (0, 15, 16, 39)):
        tensors = make(kind, (2, 40, 17))
        tensors[which][1, step, 7] = extreme
        got = graded(kind, "native", tensors, reset)
        truth = graded(kind, "truth", doubles(tensors), reset)
        for index, (one, other) in enumerate(zip(got, truth, strict=True)):
            told = f"{('first', 'second')[which]} sequence, step {step}, {f'gradient {index}' if index else 'value'}: "
            torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5, equal_nan=True, msg=told.__add__)


def in_child(code):
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_process_keeps_subnormals():
    """Flags of the processor belong to a thread, and new threads inherit them."""
    in_child("""
import threading
import torch

def check(when):
    assert (torch.tensor(1e-40) * 1.0).item() != 0.0, when
    assert (torch.full((1_000_000,), 1e-40) * 1.0 != 0.0).all(), when

def check_all(when):
    check(when)
    wrong = []
    threading.excepthook = lambda args: wrong.append(args.exc_value)
    thread = threading.Thread(target=check, args=(when + ", in a thread",))
    thread.start()
    thread.join()
    assert not wrong, wrong

torch.set_num_threads(3)
check_all("before import")
import mingru
check_all("after import")
for shape in [(3, 50, 300), (1, 20_000, 16)]:
    gate = torch.randn(shape, requires_grad=True)
    mingru.functional.mingru(gate, gate, backend="native").sum().backward()
    mingru.functional.linear_scan(gate.sigmoid(), gate, backend="native").sum().backward()
    check_all(f"after use with {shape}")
""")


@pytest.mark.parametrize("shape", [(3, 17, 5), (5, 60, 300), (1, 20_000, 16)])
@pytest.mark.parametrize("kind", ["positive", "linear_scan", "linear_scan, reversed"])
def test_threads_and_repetition_do_not_show_in_the_numbers(kind, shape):
    first, *rest = make(kind, shape)
    # What forgets slowly shows how pieces of time were joined.
    tensors = [first - 9.0 if kind == "positive" else 1.0 - 1e-4 * first.abs(), *rest]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2, 1):
            torch.set_num_threads(threads)
            results.append(graded(kind, "native", tensors))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for first, other in zip(results[0], result, strict=True):
            assert torch.equal(first, other)


def test_python_threads_do_not_know_each_other():
    kinds, shapes = ["positive", "tanh", "linear_scan", "linear_scan, reversed"], [(4, 100, 65), (1, 5000, 16)]
    jobs = [(kind, "native", make(kind, shape)) for kind, shape in itertools.product(kinds, shapes)]
    expected = [graded(*job) for job in jobs]
    together = threading.Barrier(len(jobs), timeout=60)

    def work(job):
        together.wait()
        return [graded(*job) for _ in range(10)]

    with ThreadPoolExecutor(len(jobs)) as pool:
        for once, often in zip(expected, pool.map(work, jobs), strict=True):
            for result in often:
                assert all(torch.equal(one, other) for one, other in zip(once, result, strict=True))


@pytest.mark.skipif(os.name == "nt", reason="no process can send itself Ctrl-C alone on this system")
def test_keyboard_interrupt():
    out = in_child("""
import os
import signal
import threading
import torch
import mingru

# A shell may have started us with the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(2)
pre = torch.randn(4, 20_000, 128, requires_grad=True)

def run():
    out = mingru.functional.mingru(*pre.chunk(2, -1), backend="native")
    return out.detach(), *torch.autograd.grad(out.square().sum(), pre)

expected = run()
for _ in range(3):
    try:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        while True:
            run()
    except KeyboardInterrupt:
        print("interrupted")
    for one, other in zip(run(), expected, strict=True):
        assert torch.equal(one, other)
""")
    assert out.split() == 3 * ["interrupted"]


class Recurrences(Dataset):
    """Made in a worker; lists go through a pipe, bit for bit."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        gate, candidate = torch.randn(2, 1, 50 + index, 8, generator=torch.Generator().manual_seed(index))
        return mingru.functional.mingru(gate, candidate, backend="native").tolist()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_loaders_workers_forked_after_use():
    dataset = Recurrences()
    expected = [dataset[index] for index in range(len(dataset))]
    graded("positive", "native", make("positive", (8, 200, 64)))
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert list(loader) == expected
