"""Launches of the Triton kernels: they use the compiled kernels and the arguments that Triton itself would use.

The driver and the compiler are replaced by some that only write down what they are asked for. Triton must not be in
interpreter mode.
"""

import importlib.util
import os
from unittest import mock

import calls
import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton, and not its interpreter", allow_module_level=True)

from triton.compiler import CompiledKernel

from benchmarks.gpu import smoke
from benchmarks.gpu.host import NoDriver, without_gpu
from mingru.ops.backends.triton import kernels, launch

CPU = torch.device("cpu")
SIZES = ((40, 3, 40), (3, 400, 70), (1, 1, 9), (2, 3000, 20))


class Driver(NoDriver):
    """Writes down the launches: the compiled kernel, the grid and the arguments."""

    def __init__(self):
        self.launches, self.compiled = [], []

    def compile(self, source, target, options):
        kernel = Kernel.__new__(Kernel)
        kernel.what = repr((source.signature, source.constants, options))
        kernel.name, kernel.src, kernel.module, kernel.function, kernel.packed_metadata = "", source, object(), 0, ()
        kernel._run = lambda *args: self.launches.append((kernel, args[:3], args[9:]))
        self.compiled.append(kernel)
        return kernel


class Kernel(CompiledKernel):
    def __del__(self):
        """Nothing was loaded."""


@pytest.fixture
def driver():
    driver = Driver()
    with mock.patch("triton.compiler.compile", driver.compile), without_gpu(driver):
        kernels.recurrence_kernel.device_caches.clear()
        yield driver
    kernels.recurrence_kernel.device_caches.clear()


def seen(launches):
    """Return what can be compared: addresses differ, because the results of every call are new tensors."""

    def of(x):
        return (x.dtype, x.shape, x.stride()) if isinstance(x, Tensor) else x

    return [(kernel.what, grid, [of(x) for x in values]) for kernel, grid, values in launches]


def launches_of(config, driver, compiled):
    """Return the launches of both passes of a call, with these compiled kernels."""
    given, weights = calls.drawn(config)
    driver.launches.clear()
    with mock.patch.object(launch, "_compiled", compiled):
        calls.graded(lambda *leaves: calls.run("triton", config, given.of(*leaves)), given.leaves(), weights)
    return seen(driver.launches)


def test_random_calls_are_launched_as_triton_launches_them(driver):
    compiled, configs = {}, list(smoke.configurations(200, 0, SIZES))
    for _ in range(2):
        for config in configs:
            by_triton = launches_of(config, driver, {})
            assert launches_of(config, driver, compiled) == by_triton
            assert len(by_triton) in (2, 3, 4)
    # All the kernels that Triton tells apart, and no others.
    assert len({kernel.what for kernel in compiled.values()}) == len(compiled) == len(driver.compiled)


PLAN = launch.Plan(1, 1, 32, 1, 1, None)
OWN_KERNELS = [
    *[{"x0_batch": number} for number in (2**31 - 1, 2**31, -(2**31), -(2**31) - 1)],
    *[{"x0_step": None}, {"x0": None, "out": torch.zeros(2)}, {"x0": torch.zeros(2).half()}],
    *[{"bound": (0.0, 0.0, 0.0, 0.0)}, {"CELL": "minlstm"}, {"EVEN": True}, {"plan": PLAN._replace(warps=2)}],
    *[{"plan": PLAN._replace(steps=2)}, {"plan": PLAN._replace(stages=2)}, {"x0_batch": 0}, {"x0_batch": 1}],
]


@pytest.mark.parametrize("change", OWN_KERNELS, ids=str)
def test_each_difference_selects_the_kernel_that_triton_selects(change, driver):
    compiled, found = {}, []
    for changed in ({}, change, {}):
        args = dict.fromkeys(kernels.PARAMETERS) | {"x0": torch.zeros(2), "x0_batch": 5, "x0_step": 1, "num_steps": 1}
        args |= {"CELL": "mingru", **changed}
        plan = args.pop("plan", PLAN)
        for kept in ({}, compiled):
            driver.launches.clear()
            with mock.patch.object(launch, "_compiled", kept):
                launch._launch(CPU, 1, plan, dict(args))
            found += seen(driver.launches)
    assert found[0] == found[1] == found[4] == found[5]
    assert found[2] == found[3]
    assert len(compiled) == len(driver.compiled)


def test_triton_launches_if_it_does_not_take_our_launch(driver):
    """Another version may want other arguments of a compiled kernel than those that we give it."""
    config = next(smoke.configurations(1, 0, SIZES))
    by_triton, compiled, refused = launches_of(config, driver, {}), {}, mock.Mock(side_effect=TypeError("arguments"))
    launches_of(config, driver, compiled)
    with mock.patch.object(Kernel, "__getitem__", refused):
        for _ in range(2):
            assert launches_of(config, driver, compiled) == by_triton
    # Each kernel tried it once.
    assert refused.call_count == len(compiled) > 1
    assert not launch._failures


def test_a_failed_launch_of_a_known_kernel_is_an_error(driver):
    config = next(smoke.configurations(1, 0, SIZES))
    compiled = {}
    launches_of(config, driver, compiled)
    for kernel in compiled.values():
        kernel._run = mock.Mock(side_effect=RuntimeError("no such device"))
    with mock.patch.dict(launch._failures, clear=True), pytest.raises(RuntimeError, match="no such device"):
        launches_of(config, driver, compiled)
