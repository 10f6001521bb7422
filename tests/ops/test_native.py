"""What only the C++ kernels promise: their operators, libraries and products, and safety in threads and processes.

`test_recurrence.py` tests their numbers, with those of all other backends.
"""

import itertools
import os
import platform
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import calls
import pytest
import torch
from calls import TIMED
from cases import in_a_process, needs_kernels, refuses, with_threads
from options import CANDIDATES, cover
from torch.utils.data import DataLoader, Dataset

import mingru
from mingru.ops.backends import native
from mingru.ops.call import spec_of
from mingru.ops.cells import NUM_INPUTS

ROOT = Path(__file__).parents[2]
pytestmark = needs_kernels


def call_of(cell, h, initial, reset=None, dt=None, batch_sizes=None, lengths=None, min_decay=0.0, **flags):
    """Return a call as the operators take it; `flags` are those of csrc/call.h."""
    optional = {"reset": reset, "dt": dt, "batch_sizes": batch_sizes, "lengths": lengths}
    flags |= {f"has_{name}": x is not None for name, x in optional.items()}
    bits = native.NUMBERS[cell, "positive"] | sum(native.FLAGS[name] for name, flag in flags.items() if flag)
    return [h, initial, *(x for x in optional.values() if x is not None)], bits, min_decay


CONTRACTS = {
    "cell": ["mingru", "minlstm", "minlstm_unnormalized"],
    "layout": ["batch first", "time first", "packed", "lengths"],
    "with_bias": [False, True],
    "with_reset": [False, True],
    "reverse": [False, True],
    "output_gate": [False, True],
}


@pytest.mark.parametrize(tuple(CONTRACTS), [tuple(row.values()) for row in cover(CONTRACTS)])
def test_operators_keep_torchs_contract(cell, layout, with_bias, with_reset, reverse, output_gate):
    count, order = NUM_INPUTS[cell], {"reverse": reverse, "time_first": layout == "time first"}
    batch_sizes = torch.tensor([3, 3, 2, 2, 1]) if layout == "packed" else None
    lengths = torch.tensor([20, 1, 7]) if layout == "lengths" else None
    parts = (count + output_gate) * 5
    leading = {"time first": (20, 3), "packed": (11,)}.get(layout, (3, 20))
    pre = [torch.randn(*leading, 5) for _ in range(count)]
    bias = torch.randn(parts) if with_bias else None
    # A permuted state.
    h, initial = torch.rand(5, 1, 3).permute(2, 1, 0), torch.rand(3, 1, 5)
    reset = torch.rand(*leading) < 0.2 if with_reset else None
    # dt selects the timed form of a cell.
    is_timed = cell in TIMED and with_bias and with_reset
    dt, min_decay = (torch.rand(*leading), 0.2) if is_timed else (None, 0.0)
    tensors = (h, initial, reset, dt, batch_sizes)
    call = call_of(cell, *tensors, min_decay=min_decay, **order)
    out, last = torch.ops.mingru.recurrence_forward(pre, *call)
    x, weight = torch.randn(*leading, 4), torch.randn(parts, 4)
    product = torch.randn(out[..., 0].numel() if lengths is None else 28, parts)
    grad = (torch.randn_like(out), last)
    _, bits, _ = backward = call_of(cell, *tensors, min_decay=min_decay, needs_dt=is_timed, **order)
    both = {"needs_dt": is_timed, "needs_weight": with_reset, "needs_bias": reverse and with_bias, **order}
    own = {"keep": with_bias, "rms_norm": reverse, "keep_states": output_gate and with_reset, "needs_x": with_bias}
    with_lengths = call_of(cell, *tensors, lengths, min_decay, output_gate=output_gate, **both, **own)
    checks = torch.library._OPCHECK_DEFAULT_UTILS if lengths is None else "test_schema"
    apart = [torch.randn(*leading, 10)[..., ::2] for _ in range(count)]
    signal, mask = torch.randn(3, 20, 5), None if reset is None else torch.rand(3, 20) < 0.2
    kernel, own_bias = torch.randn(2, 5), torch.randn(5) if with_bias else None
    conv = (signal, kernel, own_bias, *call_of("linear_scan", h, h, mask, lengths=lengths)[:2], reverse)
    scan = (pre[:2], *call_of("linear_scan", h, h, reset, **order))
    of_backward = with_lengths[0], out, product, *grad, *with_lengths[1:]
    for operator, args in (
        ("recurrence_forward", (pre, *call) if layout == "packed" else scan),
        ("recurrence_forward", (apart, *call)),
        ("recurrence_backward", (pre, backward[0], out, *grad, bits, min_decay)),
        ("linear_recurrence_forward", (x, weight, bias, *with_lengths)),
        ("linear_recurrence_forward", (torch.randn(*leading, parts), None, None, *with_lengths)),
        ("causal_conv_forward", conv),
        ("causal_conv_backward", (*conv, torch.randn(3, 20, 5), last)),
        ("linear_recurrence_backward", (x, weight, bias, *of_backward)),
        ("linear_recurrence_backward", (torch.randn(*leading, parts), None, None, *of_backward)),
    ):
        torch.library.opcheck(getattr(torch.ops.mingru, operator).default, args, test_utils=checks)


def test_the_operator_of_a_gru_keeps_torchs_contract():
    h, x, weight, bias = torch.rand(3, 1, 5), torch.randn(3, 20, 4), torch.randn(15, 4), torch.randn(15)
    given = [h, h, None, None, torch.randn(15, 5), torch.randn(5), None, None, x]
    call = native.arguments(spec_of("gru", "tanh", False, 0.0), given, False, True)
    torch.library.opcheck(torch.ops.mingru.linear_recurrence_forward.default, (x, weight, bias, *call, 0.0))


def test_operators_refuse_what_would_read_past_the_end():
    (gate, candidate), h = torch.randn(2, 3, 20, 5), torch.rand(3, 1, 5)
    pair, packed_pair = [gate, candidate], [gate[0], candidate[0]]
    mask, number = torch.zeros(3, 20, dtype=torch.bool), native.NUMBERS["mingru", "positive"]
    one = [h, h]
    ones, packed = torch.ones(3, 20), [torch.tensor(each) for each in ([3, 4, 13], [3, 3, 3], [20, 0])]
    optional = [{"time_first": True}, {"output_gate": True}, {"min_decay": 1.0}, {"min_decay": -0.5}]
    optional += [{"batch_sizes": torch.tensor([20])}, {"lengths": torch.tensor([20, 1, 7])}, {"dt": ones[:, :19]}]
    numbers = [number | 1 << bit for bit in (16, 16 + len(native.FLAGS), 40)]
    numbers += [number - 2**63, 255, len(native.CELL_NUMBERS), number | 3 << 8]
    for tensors, *call in [
        *(([gate, each], *call_of("mingru", h, h)) for each in (candidate[:, :19], candidate.double())),
        *((pair, *call_of("mingru", *each)) for each in ((h[:2], h), (h, h[:2], mask), (h.double(), h))),
        *((pair, *call_of("mingru", h, h, each)) for each in (mask[:, :19], mask.t(), mask.float())),
        *((pair, each, number, 0.0) for each in (one[:1], [*one, mask])),
        *((pair, one, each, 0.0) for each in numbers),
        *((pair, *call_of("mingru", h, h, **each)) for each in (*optional, {"dt": ones.t()}, {"dt": ones.double()})),
        *((packed_pair, *call_of("mingru", h, h, batch_sizes=each)) for each in packed),
        (packed_pair, *call_of("mingru", h, h, batch_sizes=torch.tensor([10, 10], dtype=torch.int32))),
        (pair, *call_of("minlstm", h, h)),
        *((each, *call_of("mingru", h, h)) for each in ([], [gate[0, 0], candidate[0, 0]])),
        ([gate[:0], candidate[:0]], *call_of("mingru", h[:0], h[:0])),
        (pair, *call_of("mingru_signed", h, h, dt=ones)),
        (pair, *call_of("linear_scan", h, h, min_decay=0.5)),
    ]:
        refuses(RuntimeError, r"mingru|recurrence", torch.ops.mingru.recurrence_forward, tensors, *call)

    x, weight = torch.randn(3, 20, 4), torch.randn(10, 4)
    wrong = [torch.tensor(each) for each in ([20, -1, 7], [21, 1, 7], [20, 7], [[20, 1, 7]])]
    wrong += [torch.tensor([20, 1, 7]).int(), torch.tensor([20, 0, 1, 0, 7, 0])[::2]]
    for lengths in wrong:
        call, operator = call_of("mingru", h, h, lengths=lengths), torch.ops.mingru.linear_recurrence_forward
        refuses(RuntimeError, "linear_recurrence_forward: lengths must be", operator, x, weight, None, *call)

    # Pre-activations, which have no bias.
    for x, bias in ((torch.randn(3, 20, 9), None), (gate, torch.randn(10)), (torch.randn(3, 20, 10), torch.randn(10))):
        call = x, None, bias, *call_of("mingru", h, h)
        refuses(RuntimeError, "linear_recurrence_forward: x must be", torch.ops.mingru.linear_recurrence_forward, *call)
    x, weight, state = torch.randn(3, 20, 4), torch.randn(3, 4), torch.randn(1, 3, 2, 4)
    call = call_of("linear_scan", state, state)[:2]
    for wrong in (
        *((x[0], weight, None, *call), (x[..., :3], weight, None, *call), (x[:2], weight, None, *call)),
        *((x, weight[:2], None, *call), (x, weight[..., :3], None, *call), (x, weight.double(), None, *call)),
        *((x, weight[0], None, *call), (x, weight[:0], None, *call), (x, weight, weight[0, :3], *call)),
        *((x.half(), weight.half(), None, *call), (x, weight, None, [state[:, :2]] * 2, call[1])),
        (x, weight, None, *call_of("linear_scan", state, state, mask[:, :19])[:2]),
        (x[0], weight, None, *call_of("linear_scan", state[:, :2], state, batch_sizes=torch.tensor([2, 1]))[:2]),
        (x, weight, None, *call_of("linear_scan", state, state, lengths=torch.tensor([20, 21, 7]))[:2]),
    ):
        refuses(RuntimeError, r"causal_conv_forward|mingru", torch.ops.mingru.causal_conv_forward, *wrong, False)


@pytest.mark.parametrize("cell", NUM_INPUTS)
def test_as_exact_as_plain_pytorch(cell):
    """Plain PyTorch, one step after the other, has an error too: three times that, and a unit in the last place."""
    dtypes = torch.float32, torch.bfloat16
    for candidate, dtype, timed in itertools.product(CANDIDATES, dtypes, {False, cell in TIMED}):
        row = calls.Row(cell, candidate, dtype, reset=True, dt=timed, steps=65, features=(16,), batch=16)
        given, weights = calls.drawn(row)
        wide = given.of(*(x.double() for x in given.leaves()))
        runs = [(calls.exact, wide), *((partial(calls.run, name), given) for name in ("native", "sequential"))]
        results = [calls.graded(lambda *x: run(row, each.of(*x)), each.leaves(), weights) for run, each in runs]  # noqa: B023
        for index, (exact, one, other) in enumerate(zip(*results, strict=True)):
            error, usual = ((x - exact).abs().max() for x in (one, other))
            assert error <= 3 * usual + torch.finfo(dtype).eps * exact.abs().max().clamp_min(1.0), index


CELL = native.NUMBERS.get(("mingru", "positive"), 0)
WRONG_CODE = {
    "nothing": [],
    "an unknown instruction": [(99, 0, 0, 0)],
    "no instruction that computes x": ["keep", "add"],
    "added to the caller's x": ["keep", "add", "norm"],
    "added to what is kept": ["norm", "keep", "keep", "add", "add"],
    "add without keep": ["norm", "add"],
    "more weights than there are": ["norm", "norm", "norm"],
    "an unknown state": [("scan", 0, 1, CELL)],
    "a negative state": [("scan", 0, -1, CELL)],
    "a state twice": [("scan", 0, 0, CELL), ("scan", 0, 0, CELL)],
    "an unknown cell": [("scan", 0, 0, 255)],
    "an unknown candidate": [("scan", 0, 0, CELL | 3 << 8)],
    **{f"bit {bit}": [("scan", 0, 0, CELL | 1 << bit)] for bit in range(16, 63)},
    "a negative cell": [("scan", 0, 0, CELL - 2**63)],
}


@pytest.mark.parametrize("wrong", WRONG_CODE)
def test_the_inference_operator_trusts_no_code(wrong):
    x, h, norm, weight = torch.randn(2, 5, 4), torch.randn(1, 2, 1, 4), torch.ones(4), torch.randn(8, 4)
    kept, rows = x.clone(), [row if isinstance(row, tuple) else (row, 0, 0, 0) for row in WRONG_CODE[wrong]]
    code = [(native.INSTRUCTION_NUMBERS.get(name, name), *rest) for name, *rest in rows]
    has_scan = any(name == "scan" for name, *_ in rows)
    weights, states = ([weight], [h]) if has_scan else ([norm, norm], [])
    args = torch.tensor(code, dtype=torch.int64).view(-1, 4), torch.zeros(2, dtype=torch.float64), False, False
    with pytest.raises(RuntimeError, match="unknown") if wrong.startswith("an unknown c") else nullcontext():
        out, _ = torch.ops.mingru.inference(x, weights, states, [], [], [], *args)
        assert out.numel() == 0
    assert torch.equal(x, kept)


def test_which_libraries_are_used(tmp_path, monkeypatch):
    package = tmp_path / "src" / "mingru"
    package.mkdir(parents=True)
    own = next(path for path in Path(native.__file__).parents[2].iterdir() if path.stem == "_kernels")
    content, library = own.read_bytes(), package / own.name
    monkeypatch.setattr(native, "__file__", str(package / "ops" / "backends" / "native.py"))
    damaged = "the compiled kernels were built from other sources, or their file is damaged"
    assert "not built" in native._load()
    library.write_bytes(b"not a library, but built from the mingru sources 1.")
    assert "cannot be loaded" in native._load()
    # The process would die of a part of a library.
    library.write_bytes(content[: len(content) // 2])
    assert native._load() == f"{damaged}; reinstall"
    library.unlink()
    library.symlink_to(own)
    assert native._load() is None  # installed without the sources
    for name, value, names in (("PRODUCT", "mkl", "'mingru', 'torch'"), ("ISA", "sse9", "of this processor")):
        monkeypatch.setenv(f"MINGRU_{name}", value)
        refuses(ValueError, f"_{name} .*{names}.*, got '{value}'", native._load)
        monkeypatch.delenv(f"MINGRU_{name}")
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.mingru, "instruction_sets", str)
        assert native._load() == "the compiled kernels need AVX2, which this processor does not have"
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "setup.py", tmp_path)
    assert native._load() is None
    (tmp_path / "csrc" / "scan.h").write_text("// of another commit")
    assert native._load() == f"{damaged}; build them again with 'pip install -e .'"


# Calls with errors of dtypes, while another thread converts the parameters.
CONVERSIONS = """
import threading, warnings, torch, mingru
warnings.simplefilter("ignore")
rnn, done = mingru.MinGRU(64, 64, 2, norm="rms", residual=True), threading.Event()
@torch.no_grad()
def call():
    while not done.is_set():
        for dtype in (torch.float, torch.double):
            try:
                rnn(torch.zeros(4, 3, 64, dtype=dtype))
            except (RuntimeError, TypeError):
                pass
for _ in range(3):
    threading.Thread(target=call).start()
for _ in range(2000):
    rnn.double().float()
done.set()
"""


@pytest.mark.slow
def test_a_thread_that_converts_the_parameters():
    """In a process of its own, because memory that is not the layer's would end it."""
    in_a_process(CONVERSIONS)


# Products of all sizes of tiles and panels, and of several parts of the memory: rows, columns, depth.
PRODUCTS = """
import itertools, torch, mingru
torch.manual_seed(0)
differs = False
multiply = torch.ops.mingru.multiply
shapes = [*itertools.product((31, 32, 97), (1, 15, 16, 17, 48, 65, 128), (1, 16, 255, 257)), *itertools.product(
    range(33, 45), (33, 62), (300,)), (40, 2100, 600), (100, 4200, 20), (2100, 70, 30), (64, 100, 9000)]
for (rows, columns, depth), flips in zip(shapes, itertools.cycle(itertools.product((0, 1), (0, 1), (0, 1)))):
    turned = lambda x, flip: x.t().contiguous().t() if flip else x
    left, right = turned(torch.randn(rows, depth), flips[0]), turned(torch.randn(depth, columns), flips[1])
    added = torch.randn(columns) if flips[2] else None
    truth, size = left.double() @ right.double(), left.abs().double() @ right.abs().double()
    truth = truth if added is None else truth + added
    torch.set_num_threads(1)
    out = multiply(left, right, added)
    assert ((out - truth).abs() <= 5e-7 * (size + truth.abs())).all(), (rows, columns, depth, flips)
    plain = left @ right if added is None else torch.addmm(added, left, right)
    differs |= not torch.equal(out, plain)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        in_tiles = differs and rows >= 32 and rows * columns * depth >= 2**17
        assert not in_tiles or torch.equal(multiply(left, right, added), out), (rows, columns, depth, threads)
    if in_tiles and rows >= 40 and (rows - 8) * columns * depth >= 2**17:
        assert torch.equal(multiply(left[8:], right, added), out[8:]), (rows, columns, depth)
for bad in ((left, left, None), (left, right, added.double()), (left[0], right, None), (left, right[:, ::2].t(), None)):
    try:
        multiply(*bad)
    except RuntimeError as error:
        assert "multiply: left and right must be" in str(error), error
    else:
        raise AssertionError(bad)
x = torch.full((40, 70), 2.0)
x[3, 5], x[7, 1] = float("nan"), float("inf")
out = multiply(x, torch.ones(70, 90), None)
assert out[3].isnan().all() and out[7].isinf().all() and (out.sum(1).isfinite().sum() == 38)
for module in (mingru.MinGRU(70, 90, 2), mingru.MinLSTM(64, 40, bias=False), mingru.models.Block(64, mlp=4)):
    width = 70 if isinstance(module, mingru.MinGRU) else 64
    x = torch.randn(3, 700, width, requires_grad=True)
    results = []
    for dtype in (torch.float32, torch.float64):
        module, x = module.to(dtype), x.detach().to(dtype).requires_grad_()
        out, _ = module(x)
        with torch.inference_mode():
            again, _ = module(x)
        results.append([out, again, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
    for one, truth in zip(*results):
        assert (one - truth).abs().max() < 2e-6 * truth.abs().max(), (module, one.shape)
print(differs)
"""


@pytest.mark.parametrize(("product", "isa"), [("mingru", ""), ("torch", ""), ("", ""), ("mingru", "avx2")])
def test_products(product, isa):
    here = torch.ops.mingru.instruction_sets().split()
    out = in_a_process(PRODUCTS, MINGRU_PRODUCT=product, MINGRU_ISA=isa if isa in here else "")
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    in_tiles = product == "mingru" or (product == "" and "AuthenticAMD" in info)
    in_tiles = in_tiles and "avx512" in here and not isa
    assert out.split() == [str(in_tiles)]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the memory")
def test_a_lack_of_memory_names_the_bytes():
    in_a_process("""
import resource
import mingru, torch

rnn, x = mingru.MinGRU(8, 4096), torch.zeros(8, 1000, 8)
rnn(x[:1, :1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26,) * 2)
for keeps in (True, False):
    try:
        with torch.inference_mode(not keeps):
            rnn(x)
    except RuntimeError as error:
        # The states.
        assert f"can't allocate memory: you tried to allocate {4 * 8000 * 4096} bytes" in str(error), error
    else:
        raise AssertionError(keeps)
""")


def test_the_process_keeps_subnormals():
    """Flags of the processor belong to a thread, and new threads inherit them."""
    in_a_process("""
from concurrent.futures import ThreadPoolExecutor
import torch

def check(when):
    assert (torch.tensor(1e-40) * 1.0).item() != 0.0, when
    assert (torch.full((1_000_000,), 1e-40) * 1.0 != 0.0).all(), when

def check_all(when):
    check(when)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(check, when + ", in a thread").result()

torch.set_num_threads(3)
check_all("before import")
import mingru
check_all("after import")
for shape in [(3, 50, 300), (1, 20_000, 16)]:
    gate = torch.randn(shape, requires_grad=True)
    mingru.functional.mingru(gate, gate, backend="native").sum().backward()
    mingru.functional.linear_scan(gate.sigmoid(), gate, backend="native").sum().backward()
    check_all(f"after use with {shape}")
# sigma(-95) = 5.5e-42
gate, candidate, h = torch.full((1, 1, 16), 100.0), torch.full((1, 1, 16), -95.0), torch.zeros(1, 1, 16)
out = mingru.functional.mingru(gate, candidate, h, backend="native")
torch.testing.assert_close(out, torch.full_like(out, 5.52e-42), rtol=1e-2, atol=0)
""")


@pytest.mark.parametrize(("cls", "features"), [(mingru.GRU, 64), (mingru.GRU, 256), (mingru.MinLSTM, 64)])
def test_gradients_that_decay_become_0(cls, features):
    """On x86, where computing with subnormal numbers takes up to 15 times as long."""
    rnn, x = cls(4, features), torch.randn(3, 600, 4, requires_grad=True)
    for grad in with_threads((1, 2), lambda: torch.autograd.grad(rnn(x)[0][:, -1].sum(), x)[0]):
        assert (grad == 0).any() and (grad != 0).any()
        # torch's own product with the weights may have some.
        assert platform.machine() == "aarch64" or ((grad != 0) & (grad.abs() < torch.finfo(x.dtype).tiny)).sum() < 60


def both_ways(pre):
    def run(pre):
        return (mingru.functional.mingru(*pre.chunk(2), activation="tanh", backend="native"),)

    return calls.graded(run, [pre], pre.chunk(2)[:1])


def test_python_threads_do_not_know_each_other():
    jobs = [torch.randn(2 * batch, *shape) for batch, *shape in [(4, 100, 65), (1, 5000, 16)] * 3]
    expected = [both_ways(job) for job in jobs]
    together = threading.Barrier(len(jobs), timeout=60)

    def work(job):
        together.wait()
        return [both_ways(job) for _ in range(10)]

    with ThreadPoolExecutor(len(jobs)) as pool:
        for once, often in zip(expected, pool.map(work, jobs), strict=True):
            assert all(torch.equal(one, other) for result in often for one, other in zip(once, result, strict=True))


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
    both_ways(torch.randn(16, 200, 64))
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert list(loader) == expected
