"""How the work of a Triton kernel is divided, and when the backend is chosen. Needs neither Triton nor a GPU."""

import importlib.util
import itertools
import re
import sys
import types
import warnings

import pytest
import torch
from cases import grid, in_a_process, refuses
from torch.utils._python_dispatch import TorchDispatchMode

import mingru
from mingru import ops
from mingru.ops import Context, route, spec_of
from mingru.ops.backends import triton
from mingru.ops.backends.triton import device, fallback, launch
from mingru.ops.backends.triton.tiling import Work, tiling_of
from mingru.ops.call import Call, Layout
from mingru.ops.cells import NUM_INPUTS
from mingru.ops.linear_map import are_recomputed

MINGRU = spec_of("mingru", "positive", False, 0.0)
NONE_HERE = not (torch.cuda.is_available() or torch.xpu.is_available())


# The last one: AMD GPUs for games.
@pytest.mark.parametrize(("wave", "is_amd"), [(32, False), (64, True), (32, True)])
@grid(backward=[False, True], itemsize=[2, 4, 8])
def test_tilings(wave, is_amd, itemsize, backward):
    options = itertools.product([1, 8, 64, 5000], [1, 2, 17, 200, 10**6], [1, 32, 100, 512], device.CELLS)
    for batch, steps, features, cell in options:
        for has_reset in (False, True):
            flags = {"has_reset": has_reset, "is_packed": has_reset, "is_timed": batch == 64, "is_amd": is_amd}
            tiling = tiling_of(Work(cell, itemsize, batch, steps, features, backward, wave=wave, **flags))
            assert all(number & (number - 1) == 0 for number in (tiling.chunks, tiling.features, tiling.warps))
            # A thread has at most 16 bytes of each step.
            assert tiling.chunks * tiling.features * itemsize <= tiling.warps * wave * 16 and 1 <= tiling.steps <= 8
            assert tiling.segments == 1 or (cell in NUM_INPUTS and tiling.chunks > 1)
            # Most steps of a tile are steps of the sequence, if it is not short.
            assert tiling.chunks * tiling.steps <= max(4 * steps, 8 * tiling.steps)
            assert tiling.segments == 1 or tiling.segments * tiling.chunks * tiling.steps <= steps
            if is_amd:
                assert tiling.warps == 1 and tiling.stages is None


class Launch:
    """A record of what would be launched, in place of a launch."""

    def __init__(self, monkeypatch):
        self.kernels = []
        monkeypatch.setattr(launch, "run", self)
        monkeypatch.setattr(device, "IS_INTERPRETED", True)
        backend = triton.BACKEND
        monkeypatch.setitem(route.BACKENDS, "triton", type(backend)(**{**vars(backend), "unavailable": lambda: None}))

    def __call__(self, name, num_programs, tiling, args):
        assert num_programs > 0
        # What selects a kernel.
        self.kernels.append((name, tiling._replace(segments=1), args["TYPES"]))
        self.args = args


def test_few_kernels(monkeypatch):
    """Another length compiles no other kernel, and another batch size rarely."""
    launched = Launch(monkeypatch)

    def kernels(batches, lengths):
        launched.kernels.clear()
        for batch, steps in itertools.product(batches, lengths):
            # Without memory.
            x = torch.zeros(1, 1, 256, requires_grad=True).expand(batch, steps, 256)
            out, _ = ops.recurrence(MINGRU, [x, x], Context(x[:, :1], x[:, :1], None), backend="triton")
            torch.autograd.grad(out, x, torch.zeros(1, 1, 256).expand_as(out))
        return sorted(kernel[0] for kernel in set(launched.kernels))

    assert kernels([64], [300, 500, 777, 4000]) == ["backward", "forward"]
    assert kernels(range(40, 65, 8), [500]) == ["backward", "forward"]
    assert len(kernels([1, 3, 8, 40, 200, 1000], [500])) <= 10 and len(kernels([64], range(1, 400, 7))) <= 10


@pytest.mark.parametrize("grad", [False, True])
def test_one_launch_for_a_step(grad, monkeypatch):
    launched = Launch(monkeypatch)
    with torch.set_grad_enabled(grad), mingru.use_backend("triton"):
        mingru.MinGRUCell(3, 8)(torch.zeros(2, 3))
        mingru.MinLSTM(3, 8, num_layers=2)(torch.zeros(2, 1, 3))
    assert [kernel[0] for kernel in launched.kernels] == ["forward"] * 3


def test_accesses_are_as_wide_as_sizes_strides_and_addresses_allow(monkeypatch):
    launched = Launch(monkeypatch)

    def unit(features, dtype=torch.float32, at=slice(None)):
        x = torch.zeros(2, 9, features, dtype=dtype)[..., at]
        ops.recurrence(MINGRU, [x, x], Context(torch.zeros(2, 1, x.shape[2]), x[:, :1], None), backend="triton")
        return launched.args["V"]

    assert [unit(features) for features in (100, 102, 101)] == [4, 2, 1]
    assert [unit(features, torch.bfloat16) for features in (100, 104)] == [4, 8] and unit(100, torch.float64) == 2
    assert [unit(202, at=slice(100)), unit(104, at=slice(1, 101))] == [2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decays_that_do_not_depend_on_time_and_half_widths_are_not_copied(dtype, monkeypatch):
    launched = Launch(monkeypatch)
    a, b = torch.rand(8, dtype=dtype).requires_grad_(), torch.rand(2, 9, 8, dtype=dtype)
    out = mingru.functional.linear_scan(a.expand_as(b), b, backend="triton")
    assert [x.data_ptr() for x, *_ in launched.args["inputs"]] == [a.data_ptr(), b.data_ptr()]
    out.backward(b)
    assert launched.args["inputs"][0][0].data_ptr() == a.data_ptr()
    assert launched.args["grad_out"][0].data_ptr() == b.data_ptr()


def test_batch_sizes_are_copied_once_to_each_stream_and_never_captured(monkeypatch):
    launched, made = Launch(monkeypatch), []
    launch._packing.cache_clear()
    check = launch.is_packing
    monkeypatch.setattr(launch, "is_packing", lambda *args: made.append(args) or check(*args))
    rnn = mingru.MinGRU(3, 8, num_layers=2, bidirectional=True)
    sequences = torch.nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    with mingru.use_backend("triton"):
        out, _ = rnn(sequences)
        out.data.sum().backward()
        assert [kernel[0] for kernel in launched.kernels] == ["forward"] * 4 + ["backward"] * 4 and len(made) == 1
        monkeypatch.setattr(device, "stream_of", lambda device: "another")
        rnn(sequences)
        assert len(made) == 2
        rnn(torch.nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)]))
        assert len(made) == 2
        rnn(torch.nn.utils.rnn.pack_sequence([torch.randn(4, 3)]))
        assert len(made) == 3
        # Also after a call before, because a graph would read the copies after they are freed with the batch sizes.
        monkeypatch.setattr(device, "is_capturing", lambda device: True)
        refuses(ValueError, "packed sequences cannot be captured in a CUDA graph", rnn, sequences)


def test_pre_activations_are_recomputed_only_on_the_cpu():
    found = [are_recomputed("mingru", torch.empty(1, 2, 63, device=kind), None) for kind in ("cpu", "meta")]
    assert found == [True, False]


def forgotten():
    for cached in (device._problem_of, device._why_not, route.warn_once, device.facts_of):
        cached.cache_clear()


@pytest.fixture
def card(monkeypatch):
    """Let the cards of this process be a kind of GPU, by its compute capability, or an error; `facts` are others."""

    def of(*capabilities, hip=None, **facts):
        def capability(device):
            if isinstance(capabilities[0], Exception):
                raise capabilities[0]
            return capabilities[device.index]

        names = {"is_available": lambda: True, "device_count": lambda: len(capabilities)}
        names |= {"get_device_capability": capability, "get_device_name": lambda device: f"card {device.index}"}
        names |= {"get_device_properties": lambda device: types.SimpleNamespace(**facts)}
        for owner, name, value in [*((torch.cuda, *each) for each in names.items()), (torch.version, "hip", hip)]:
            monkeypatch.setattr(owner, name, value)
        forgotten()

    monkeypatch.setattr(device, "IS_INTERPRETED", False)
    monkeypatch.delenv("MINGRU_BACKEND", raising=False)
    yield of
    monkeypatch.undo()
    forgotten()


@pytest.mark.skipif(not NONE_HERE or device.IS_INTERPRETED, reason="there is a device for Triton")
def test_without_a_device():
    assert mingru.backends()["triton"] == "torch finds no CUDA, ROCm or XPU device"


REASONS = [
    (None, "Triton is not installed; install the package triton"),
    ("raise OSError('libcuda.so.1 is missing')", "Triton cannot be imported (libcuda.so.1 is missing); reinstall it"),
    ("__version__ = '3.5.1'", "Triton 3.5.1 is too old; install Triton 3.6 or later"),
    ("__version__ = '3.10.0+git1234'", "True"),
    ("__version__ = '3.10.0'", "torch cannot use the GPU (Cannot re-initialize CUDA in forked subprocess."),
]


@pytest.mark.parametrize(("module", "why"), REASONS)
def test_why_triton_cannot_run(module, why, card, monkeypatch, tmp_path):
    card(RuntimeError("Cannot re-initialize CUDA in forked subprocess. To use ...") if "forked" in why else (8, 0))
    (tmp_path / "triton.py").write_text(module or "")
    monkeypatch.syspath_prepend(str(tmp_path))
    # Also what this test imports leaves again.
    monkeypatch.setitem(sys.modules, "triton", None)
    del sys.modules["triton"]
    if module is None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert str(mingru.backends()["triton"]).startswith(why)


@pytest.mark.parametrize(("processors", "shape"), [(132, (4, 8192, 256)), (148, (1, 65_536, 1024)), (64, (2, 9, 8))])
@pytest.mark.parametrize("backward", [False, True])
def test_few_programs_divide_time_until_all_processors_have_two(processors, shape, backward):
    """There are 64 programs of 16 features in the first two shapes, and the third one is short."""
    work = Work("mingru", 2, *shape, backward=backward, processors=processors)
    tiling = tiling_of(work)
    is_long = shape[1] > 9
    assert (tiling.segments > 1) == is_long
    # Segments have a whole number of tiles.
    assert not is_long or abs(64 * tiling.segments - 2 * processors) < 64
    assert tiling_of(work._replace(processors=64)).segments == 1


@pytest.mark.parametrize("processors", [40, 132, 160])
def test_a_long_sequence_of_few_features_has_large_programs(processors):
    """Where there are no more segments, smaller programs would leave a larger GPU with less to do."""
    tiling = tiling_of(Work("mingru", 4, 1, 10**6, 8, processors=processors))
    assert (tiling.warps, tiling.segments) == (8, 62)


@pytest.mark.parametrize("facts", [(32, 132), (64, 304)])
def test_what_a_tiling_knows_of_the_device(facts, card):
    card(warp_size=facts[0], multi_processor_count=facts[1], hip="7" if facts[0] == 64 else None)
    assert device.facts_of(torch.device("cuda", 0)) == (facts[0], facts[0] == 64, facts[1])
    assert device.facts_of(torch.device("cpu")) == (32, False, 132)


def test_dtypes_and_devices_without_a_kernel():
    on_meta = torch.zeros(1, 2, 3, device="meta")
    why = "it only runs on CUDA, ROCm and XPU devices, and the tensors are on meta"
    assert device.unsupported(on_meta, MINGRU) == why
    on_gpu = types.SimpleNamespace(device=types.SimpleNamespace(type="xpu"), dtype=torch.float32)
    assert device.unsupported(on_gpu, MINGRU) is None
    on_gpu.dtype = torch.complex64
    assert device.unsupported(on_gpu, spec_of("linear_scan", "linear", False, 0.0)) is None
    on_gpu.dtype = torch.complex32
    assert device.unsupported(on_gpu, MINGRU) == "it does not support torch.complex32"


OLD_CARDS = [
    ([(7, 0)], torch.float32, "need compute capability 7.5 or higher, and cuda:0 is a card 0 with 7.0$", False),
    ([(6, 1), (7, 0)], torch.float16, "and cuda:0 is a card 0 with 6.1$", False),
    ([(6, 1), (8, 0)], torch.float16, "and cuda:0 is a card 0 with 6.1$", True),
    ([(7, 5)], torch.bfloat16, "torch.bfloat16 need .* card 0 with 7.5, which runs torch.float16$", True),
    ([(7, 5)], torch.float16, None, True),
    ([(8, 0)], torch.bfloat16, None, True),
]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize(("capabilities", "dtype", "why", "available"), OLD_CARDS)
def test_old_cards_run_tensor_operations_and_say_so_once(capabilities, dtype, why, available, card):
    card(*capabilities)
    on_gpu = types.SimpleNamespace(is_cpu=False, dtype=dtype, device=torch.device("cuda", 0))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        chosen = {route.choose(MINGRU, on_gpu).backend for _ in range(2)}
    if why is None:
        assert (chosen, found) == ({"triton"}, [])
    else:
        assert chosen == {"torch"}
        (only,) = found
        assert re.search(f"using the slower backend 'torch' on GPUs, because .*{why}", str(only.message))
    assert (mingru.backends()["triton"] is True) is available
    if not available:
        assert mingru.backends()["triton"].endswith(f"cuda:0 is a card 0 with {'.'.join(map(str, capabilities[0]))}")


def test_import_does_not_load_triton():
    code = "import sys, mingru; mingru.MinGRU(3, 4)(__import__('torch').zeros(1, 2, 3)); print('triton' in sys.modules)"
    assert in_a_process(code).strip() == "False"


def test_the_address_of_a_state_makes_no_new_form(monkeypatch):
    launched = Launch(monkeypatch)
    x, memory = torch.zeros(2, 5, 8, requires_grad=True), torch.zeros(17)
    launch._recipes.clear()
    for at in (0, 1):
        mingru.functional.mingru(x, x, memory[at : at + 16].view(2, 1, 8), backend="triton")
    assert len(launched.kernels) == 2 and len(launch._recipes) == 1


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("has_reset", [False, True])
def test_the_fallback_takes_the_operations_of_the_backend_torch(has_reset):
    x, reset = torch.randn(2, 3, 200, 4), torch.rand(3, 200) < 0.1
    leaves = [*x.requires_grad_().unbind(), torch.rand(3, 1, 4, requires_grad=True)]
    with Operations() as expected:
        out = mingru.functional.mingru(*leaves, reset=reset if has_reset else None, backend="torch")
        grads = torch.autograd.grad(out.sum(), leaves)
    context = Context(leaves[-1].detach(), torch.full((3, 1, 4), 0.5), reset if has_reset else None, None, None, None)
    call = Call(MINGRU, [*x.detach().unbind()], context, Layout(False))
    with Operations() as found:
        states, last = fallback.forward(call)
        own = fallback.backward(call, [states, torch.ones_like(states), torch.zeros_like(last)], False, False)
    torch.testing.assert_close([states, *own[0].chunk(2, -1), own[1]], [out, *grads])
    assert found.count < expected.count + 20
