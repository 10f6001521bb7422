"""Launches of the Triton kernels: each has the kernel that was compiled for the types of its arguments.

The driver and the compiler are replaced by some that only write down what they are asked for. Triton must not be in
interpreter mode.
"""

import functools
import importlib.util
import os
import re
from contextlib import nullcontext
from unittest import mock

import calls
import pytest
import torch
from cases import refuses
from torch import Tensor

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton, and not its interpreter", allow_module_level=True)

from triton.compiler import CompiledKernel

from benchmarks.gpu import smoke
from benchmarks.gpu.host import NoDriver, without_gpu
from mingru.ops.backends.triton import device, kernels, launch

CPU = torch.device("cpu")
SIZES = ((40, 3, 40), (3, 400, 70), (1, 1, 9), (2, 3000, 20))


class Driver(NoDriver):
    """Writes down the launches: the compiled kernel, the grid and the arguments."""

    def __init__(self):
        self.launches, self.compiled = [], []
        # What compiling and launching raise, and how often loading finds no memory.
        self.error, self.times = None, 0

    def compile(self, source, target, options):
        self.check()
        kernel = Kernel.__new__(Kernel)
        kernel.driver = self
        kernel.what = repr((source.signature, source.constants, source.attrs, options))
        kernel.name, kernel.src, kernel.module, kernel.function, kernel.packed_metadata = "", source, object(), 0, ()
        kernel._run = functools.partial(self.launch, kernel)
        self.compiled.append(kernel)
        return kernel

    def launch(self, kernel, *args):
        self.check()
        self.launches.append((kernel, args[:3], args[9:]))

    def check(self):
        if self.error is not None:
            raise self.error


class Kernel(CompiledKernel):
    def _init_handles(self):
        if self.driver.times > 0:
            self.driver.times -= 1
            raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY")

    def __del__(self):
        """Nothing was loaded."""


@pytest.fixture
def driver():
    driver = Driver()
    with mock.patch("triton.compiler.compile", driver.compile), without_gpu(driver):
        kernels.recurrence_kernel.device_caches.clear()
        yield driver
    kernels.recurrence_kernel.device_caches.clear()


TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
TYPES |= {torch.bool: "u1", torch.int64: "i64"}


def type_of(x):
    """Return Triton's name of the type of an operand, whatever its value."""
    if isinstance(x, tuple):
        return tuple(map(type_of, x))
    if isinstance(x, Tensor):
        return "*" + TYPES[x.dtype]
    if isinstance(x, int):
        return "i32" if -(2**31) <= x < 2**31 else "i64"
    return "fp32" if isinstance(x, float) else "constexpr"


def launches_of(config, driver):
    """Return the launches of both passes of a call."""
    given, weights = calls.drawn(config)
    driver.launches.clear()
    calls.graded(lambda *leaves: calls.run("triton", config, given.of(*leaves)), given.leaves(), weights)
    return [(kernel.what, grid, list(map(type_of, values))) for kernel, grid, values in driver.launches]


def test_random_calls_are_launched_with_a_kernel_for_their_types(driver):
    for config in smoke.configurations(200, 0, SIZES):
        first = launches_of(config, driver)
        assert len(first) in (2, 3, 4)
        for kernel, _, values in driver.launches:
            count = sum(name.isupper() for name in kernels.PARAMETERS)
            constants, operands = values[:count], values[count:]
            types = [kernel.src.signature[name] for name in kernels.PARAMETERS]
            assert types == ["constexpr"] * len(constants) + list(map(type_of, operands))
            assert [kernel.src.constants[(index,)] for index in range(len(constants))] == list(constants)
            # The compiler assumes nothing of addresses and numbers.
            assert not any(kernel.src.attrs.values())
        assert launches_of(config, driver) == first
    assert len({kernel.what for kernel in driver.compiled}) == len(launch._compiled) == len(driver.compiled)


TILING, X = launch.Tiling(1, 1, 32, 1, 1, None), torch.zeros(32)
SEQUENCE = (X[1:], 5, 3)
ARGS = launch.NOTHING | {"CELL": "mingru", "EVEN": False, "inputs": (SEQUENCE,), "num_steps": 5, "backwards": 1}
ARGS |= dict.fromkeys(("ACTIVATION", "KEEPING", "TILING", "V", "bound"), ())
# Other types and constants.
SELECTING = [
    *[{"inputs": ((X, number, 3),)} for number in (2**31, -(2**31) - 1)],
    *[{"inputs": (SEQUENCE, (X,))}, {"inputs": ((X.half(), 5, 3),)}, {"out": SEQUENCE}, {"bound": (0.0,) * 4}],
    *[{"CELL": "minlstm"}, {"EVEN": True}, {"tiling": TILING._replace(warps=2)}, {"TILING": TILING}],
]
# Other values.
NOT_SELECTING = [
    *[{"inputs": ((X, number, 3),)} for number in (0, 1, 16, 2**31 - 1, -(2**31))],
    *[{"num_steps": 1}, {"num_steps": 16}, {"backwards": 0}],
]


@pytest.mark.parametrize(("change", "count"), [(each, 2) for each in SELECTING] + [(each, 1) for each in NOT_SELECTING])
def test_types_and_constants_select_a_kernel_and_values_do_not(change, count, driver):
    for changed in ({}, change, {}, change):
        args = ARGS | changed
        tiling = args.pop("tiling", TILING)
        launch.run("forward", 1, tiling, args | {"TYPES": launch.types_of(args)})
    assert len(driver.compiled) == count
    assert [kernel for kernel, *_ in driver.launches] == [driver.compiled[0], driver.compiled[-1]] * 2


NO_MEMORY = ["Triton Error [CUDA]: out of memory", "CUDA_ERROR_OUT_OF_MEMORY", "hipErrorOutOfMemory"]
NO_MEMORY += ["UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY", "UR_RESULT_ERROR_OUT_OF_HOST_MEMORY"]


@pytest.mark.parametrize("why", NO_MEMORY)
def test_a_kernel_that_found_no_memory(why, driver):
    config, driver.error = next(smoke.configurations(1, 0, SIZES)), RuntimeError(why)
    refuses(torch.OutOfMemoryError, re.escape(why), launches_of, config, driver)
    assert not launch._failures
    driver.error = None
    kernels.recurrence_kernel.device_caches.clear()
    assert launches_of(config, driver)


@pytest.mark.parametrize("times", [1, 2])
def test_a_kernel_is_loaded_again_without_the_memory_that_torch_keeps(times, driver):
    driver.times = times
    raises = pytest.raises(torch.OutOfMemoryError, match="cpu has no memory") if times > 1 else nullcontext()
    with mock.patch.object(device, "free") as free, raises:
        assert launches_of(next(smoke.configurations(1, 0, SIZES)), driver)
    assert free.mock_calls == [mock.call(CPU)]


def test_a_failed_launch_of_a_known_kernel_is_an_error(driver):
    config = next(smoke.configurations(1, 0, SIZES))
    launches_of(config, driver)
    driver.error = RuntimeError("no such device")
    kernels.recurrence_kernel.device_caches.clear()
    refuses(RuntimeError, "no such device", launches_of, config, driver)
    assert not launch._failures
