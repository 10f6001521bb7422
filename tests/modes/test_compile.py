"""`torch.compile`: one graph, whatever the batch and the length, and the numbers of eager."""

import functools

import pytest
import torch
from cases import CASES_WITH_LENGTHS, DOUBLE, assert_equal, graded, tensors
from mode import FEW, each_case, given, mode
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

import mingru

# Where a convolution follows, inductor takes sequences of signals for images, lays them out for that,
# and then compiles anew for each longer sequence.
OPTIONS = {"MinConv1dGRU": {"layout_optimization": False}}
SIZES = [(2, 7), (3, 9), (4, 40), (5, 17), (2, 33)]


@pytest.fixture(autouse=True)
def _nothing_compiled_before(_fresh_compiler):
    counters.clear()


def with_free_sizes(case, inputs):
    """Batch and time marked so that the first graph serves all; where it could not, torch raises."""
    of_x, of_h = case.dynamic("batch", "steps")
    of_all = [of_x, *(of_h if isinstance(of_h, (list, tuple)) else [of_h])]
    for tensor, sizes in zip(tensors(inputs), of_all, strict=True):
        for dim in sizes:
            torch._dynamo.mark_dynamic(tensor, dim)
    return inputs


def assert_equal_with_gradients(case, module, compiled, sizes, count):
    """At all sizes: outputs, and gradients of x, the states and the parameters."""
    for batch, steps in sizes:
        args = given(case, batch, steps, count, **DOUBLE)
        assert_equal(graded(module, compiled, args), graded(module, module, args))


@mode("torch.compile, one graph, any batch and length", FEW)
def test_any_size(case):
    module = case.make(**DOUBLE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    # `test_inductor` compiles without resets.
    assert_equal_with_gradients(case, module, compiled, SIZES, 3)
    # One for the first sizes, one for all.
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@mode("torch.compile, inductor, training", [])
def test_inductor(case):
    module = case.make(**DOUBLE)
    compiled = torch.compile(module, fullgraph=True, options=OPTIONS.get(case.name))
    run = lambda *inputs: compiled(*with_free_sizes(case, inputs))  # noqa: E731
    assert_equal_with_gradients(case, module, run, SIZES[:3], 2)
    assert counters["stats"]["unique_graphs"] == 1


@mode("torch.compile, reduce-overhead, autocast inside", [])
def test_autocast_inside(case):
    module = case.make()

    def run(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return module(*inputs)

    compiled = torch.compile(run, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for batch, steps in SIZES[:3]:
            inputs = with_free_sizes(case, list(case.args(batch, steps).values())[:2])
            # Products are rounded to 8 bits, in whatever order they are added up. Dtypes are compared too.
            assert_equal(compiled(*inputs), run(*inputs), rtol=2**-6, atol=2**-6)


BODIES = [*(pytest.param(name, False, marks=pytest.mark.slow) for name in ("torch", "native")), ("native", True)]


@pytest.mark.parametrize(("name", "reverse"), BODIES)
def test_functions(name, reverse):
    """Any trailing sizes, gradients of everything, from both bodies that "auto" may take."""

    def run(a, b, gate, candidate, h, reset):
        lengths = torch.full([a.shape[0]], a.shape[1] // 2) if reverse else None
        scanned = mingru.functional.linear_scan(a, b, h, reverse=reverse, reset=reset, lengths=lengths, backend=name)
        return scanned, mingru.functional.mingru(gate, candidate, h, reset=reset, backend=name)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for batch, steps in SIZES[:3]:
        inputs = [*torch.rand(4, batch, steps, 2, 3, **DOUBLE), torch.randn(batch, 1, 2, 3, **DOUBLE)]
        inputs.append(torch.rand(batch, steps) < 0.2)
        assert_equal(*(graded(torch.nn.Module(), each, inputs) for each in (compiled, run)))
    assert counters["stats"]["unique_graphs"] == 2
    # Without gradients, and in a transform that needs them.
    a, b = torch.rand(2, 2, 20, 3, **DOUBLE)
    for function in (scan, torch.func.grad(lambda a, b: scan(a, b).square().sum())):
        assert_equal(torch.compile(function, fullgraph=True, backend="eager")(a, b), function(a, b))


def scan(a, b, backend="auto"):
    return mingru.functional.linear_scan(a, b, backend=backend)


@pytest.mark.slow
def test_one_more_graph_over_4096_steps():
    """Where the portable body is compiled, a bound on the length makes most of its graph."""
    run = functools.partial(scan, backend="torch")
    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=True)
    for steps, num_graphs in [(40, 1), (4000, 1), (5000, 2), (300, 2)]:
        inputs = torch.rand(2, 1, steps, 1, **DOUBLE).unbind()
        assert_equal(compiled(*inputs), run(*inputs))
        assert counters["stats"]["unique_graphs"] == num_graphs


@mode("torch.compile, lengths", [], CASES_WITH_LENGTHS)
def test_lengths(case):
    """Padding takes no part, whatever lies there, and gradients know nothing of it."""
    module = case.make(**DOUBLE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch, steps in SIZES:
        x, h, reset, *dt = case.args(batch, steps, **DOUBLE).values()
        lengths = torch.randint(0, steps, (batch,))
        x.select(case.batch_dim, 0)[lengths[0] :] = torch.nan
        args = x, h, reset, lengths, *dt
        assert_equal(*(graded(module, run, args) for run in (compiled, module)))
    assert counters["stats"]["unique_graphs"] == 2


def test_lengths_of_any_size():
    """The spec of a scan is a constant, because a symbol cannot be shared by two functions."""
    module, x, lengths = mingru.MinGRU(3, 4, 2, bidirectional=True), torch.randn(2, 5, 3), torch.tensor([3, 5])
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    for own in ({"dt": torch.rand(2, 5)}, {"reset": torch.rand(2, 5) < 0.3}):
        assert_equal(compiled(x, lengths=lengths, **own), module(x, lengths=lengths, **own))


TRACES = [("auto", {}), ("auto", {"tracing_mode": "symbolic"}), ("torch", {}), ("torch", {"pre_dispatch": True})]


@pytest.mark.parametrize(("backend", "options"), TRACES)
@each_case(["MinGRU"], CASES_WITH_LENGTHS)
def test_make_fx(case, backend, options):
    """The graph has no values to check, and is that of any others."""
    module = case.make()

    def args_of(lengths):
        return *given(case), torch.tensor(lengths), case.args().get("dt")

    def run(*args):
        return tensors(module(*args))

    with mingru.use_backend(backend):
        graph = make_fx(run, _allow_non_fake_inputs=True, **options)(*args_of([3, 5]))
        for lengths in ([3, 5], [7, 0]):
            args = args_of(lengths)
            assert_equal(graph(*args), module(*args))


@pytest.mark.slow
def test_a_layer_after_a_cell():
    """The graph for any number of features, which inputs of other dimensions bring about, has the same kernel."""
    cell, y = mingru.MinLSTMCell(3, 4), torch.randn(2, 3)
    torch.compile(cell, fullgraph=True, backend="eager")(y, cell(y).detach())
    for module, x in ((mingru.MinGRU(3, 4), torch.randn(7, 2, 3)), (mingru.MinGRU(5, 4, 2), torch.randn(7, 2, 5))):
        h = module(x)[1].detach()
        assert_equal(torch.compile(module, fullgraph=True, backend="eager")(x, h), module(x, h))


def test_fused_kernel_is_in_the_graph():
    """A compiled layer calls the same kernel as eager, products and recurrence in one."""
    rnn, graphs = mingru.MinGRU(3, 4), []
    compiled = torch.compile(rnn, fullgraph=True, backend=lambda graph, _: graphs.append(str(graph)) or graph)
    torch.no_grad()(compiled)(torch.randn(2, 5, 3))
    assert "mingru.linear_recurrence_forward" in graphs[0]
