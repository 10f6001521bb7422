"""`torch.compile`: one graph, whatever the batch and the length, and the numbers of eager."""

import pytest
import torch
from cases import CASES_WITH_LENGTHS, assert_equal, every_case_of_few_quick, every_case_slowly, parametrized, tensors
from torch import nn
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

import mingru

# Where a convolution follows, inductor takes sequences of signals for images, lays them out for that,
# and then compiles anew for each longer sequence.
OPTIONS = {"MinConv1dGRU": {"layout_optimization": False}}
SIZES = [(2, 7), (3, 9), (4, 40), (5, 17), (2, 33)]

pytestmark = [
    # Dynamo makes a context for each autograd function, in a way that torch warns of.
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning"),
]


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


def losses(run, inputs):
    return sum(tensor.square().sum() for tensor in tensors(run(*inputs)))


def assert_equal_with_gradients(case, module, compiled, sizes, reset=False, free=False):
    """At all sizes: outputs, and gradients of x, the states and the parameters."""
    for batch, steps in sizes:
        x, h = case.x(batch, steps, dtype=torch.double), case.h(batch, dtype=torch.double)
        inputs = [x, h, case.reset(batch, steps)] if reset else [x, h]
        if free:
            with_free_sizes(case, inputs)
        leaves = [leaf.requires_grad_() for leaf in tensors([x, h])] + list(module.parameters())
        assert_equal(compiled(*inputs), module(*inputs))
        # Without a reset, a learned initial state has no part in it.
        got, expected = (
            torch.autograd.grad(losses(run, inputs), leaves, allow_unused=True) for run in (compiled, module)
        )
        assert_equal(got, expected)


@pytest.mark.mode("torch.compile, one graph, any batch and length")
@every_case_of_few_quick
def test_any_size(case):
    module = case.make(dtype=torch.double)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    # `test_inductor` compiles without resets.
    assert_equal_with_gradients(case, module, compiled, SIZES, True)
    # One for the first sizes, one for all.
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.mode("torch.compile, inductor, training")
@every_case_slowly
def test_inductor(case):
    module = case.make(dtype=torch.double)
    compiled = torch.compile(module, fullgraph=True, options=OPTIONS.get(case.name))
    assert_equal_with_gradients(case, module, compiled, SIZES[:3], free=True)
    assert counters["stats"]["unique_graphs"] == 1


class UnderAutocast(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return self.module(*inputs)


@pytest.mark.mode("torch.compile, reduce-overhead, autocast inside")
@every_case_slowly
def test_autocast_inside(case):
    module = UnderAutocast(case.make())
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for batch, steps in SIZES[:3]:
            inputs = with_free_sizes(case, [case.x(batch, steps), case.h(batch)])
            got, expected = tensors(compiled(*inputs)), tensors(module(*inputs))
            assert [each.dtype for each in got] == [each.dtype for each in expected]
            # Products are rounded to 8 bits, in whatever order they are added up.
            assert_equal(got, expected, rtol=2**-6, atol=2**-6)
            in_float32 = ("drop_in.GRUCell", "drop_in.LSTMCell", "MinGRUCell", "MinLSTMCell", "models.Block")
            if case.name not in in_float32 and "Conv" not in case.name:
                assert torch.bfloat16 in {each.dtype for each in got}


@pytest.mark.parametrize(
    ("name", "reverse"),
    [
        *(pytest.param("torch", reverse, marks=pytest.mark.slow) for reverse in (False, True)),
        pytest.param("native", False, marks=pytest.mark.slow),
        ("native", True),
    ],
)
def test_functions(name, reverse):
    """Any trailing sizes, gradients of everything, from both bodies that "auto" may take."""

    def run(a, b, gate, candidate, h, reset):
        lengths = torch.full([a.shape[0]], a.shape[1] // 2) if reverse else None
        scanned = mingru.functional.linear_scan(a, b, h, reverse=reverse, reset=reset, lengths=lengths, backend=name)
        scanned = scanned[0] + scanned[1] if reverse else scanned
        return scanned, mingru.functional.mingru(gate, candidate, h, reset=reset, backend=name)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for batch, steps in SIZES[:3]:
        sequences = [torch.rand(batch, steps, 2, 3, dtype=torch.double) for _ in range(4)]
        inputs = [each.requires_grad_() for each in [*sequences, torch.randn(batch, 1, 2, 3, dtype=torch.double)]]
        reset = torch.rand(batch, steps) < 0.2
        assert_equal(compiled(*inputs, reset), run(*inputs, reset))
        assert_equal(*(torch.autograd.grad(losses(each, [*inputs, reset]), inputs) for each in (compiled, run)))
    assert counters["stats"]["unique_graphs"] == 2
    # Without gradients, and in a transform that needs them.
    a, b = torch.rand(2, 2, 20, 3, dtype=torch.double)
    for function in (run_scan, torch.func.grad(lambda a, b: run_scan(a, b).square().sum())):
        assert_equal(torch.compile(function, fullgraph=True, backend="eager")(a, b), function(a, b))


def run_scan(a, b):
    return mingru.functional.linear_scan(a, b)


@pytest.mark.slow
def test_one_more_graph_over_4096_steps():
    """Where the portable body is compiled, a bound on the length makes most of its graph."""

    def run(a, b):
        return mingru.functional.linear_scan(a, b, backend="torch")

    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=True)
    for steps, num_graphs in [(40, 1), (4000, 1), (5000, 2), (300, 2)]:
        inputs = [torch.rand(1, steps, 1, dtype=torch.double) for _ in range(2)]
        assert_equal(compiled(*inputs), run(*inputs))
        assert counters["stats"]["unique_graphs"] == num_graphs


@pytest.mark.mode("torch.compile, lengths")
@parametrized(CASES_WITH_LENGTHS, quick=[])
def test_lengths(case):
    """Padding takes no part, whatever lies there, and gradients know nothing of it."""
    module = case.make(dtype=torch.double)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch, steps in SIZES:
        x, h = case.x(batch, steps, dtype=torch.double), case.h(batch, dtype=torch.double)
        reset, dt = case.reset(batch, steps), case.dt(batch, steps, dtype=torch.double)
        lengths = torch.randint(0, steps, (batch,))
        x.select(case.batch_dim, 0)[lengths[0] :] = torch.nan
        leaves = [leaf.requires_grad_() for leaf in tensors([x, h, dt])] + list(module.parameters())
        results = []
        for run in (compiled, module):
            out = run(x, h, reset, lengths=lengths, **dt)
            loss = sum(tensor.square().sum() for tensor in tensors(out))
            results.append((out, torch.autograd.grad(loss, leaves)))
        assert_equal(*results)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("argument", ["dt", "reset"])
def test_lengths_of_both_directions(argument):
    module, x, lengths = mingru.MinGRU(3, 4, bidirectional=True), torch.randn(2, 5, 3), torch.tensor([3, 5])
    given = {argument: torch.rand(2, 5) if argument == "dt" else torch.rand(2, 5) < 0.3, "lengths": lengths}
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    assert_equal(compiled(x, **given), module(x, **given))


@pytest.mark.parametrize(
    ("backend", "options"),
    [("auto", {}), ("auto", {"tracing_mode": "symbolic"}), ("torch", {}), ("torch", {"pre_dispatch": True})],
)
@parametrized(CASES_WITH_LENGTHS, quick=["MinGRU"])
def test_make_fx(case, backend, options):
    """The graph has no values to check, and is that of any others."""
    module = case.make()

    def given(lengths):
        return case.x(2, 7), case.h(2), case.reset(2, 7), torch.tensor(lengths), case.dt(2, 7).get("dt")

    def run(*args):
        return tensors(module(*args))

    with mingru.use_backend(backend):
        graph = make_fx(run, _allow_non_fake_inputs=True, **options)(*given([3, 5]))
        for lengths in ([3, 5], [7, 0]):
            args = given(lengths)
            assert_equal(graph(*args), module(*args))


@pytest.mark.slow
def test_a_layer_after_a_cell():
    """The graph for any number of features, which inputs of other dimensions bring about, has the same kernel."""
    cell, y = mingru.MinLSTMCell(3, 4), torch.randn(2, 3)
    torch.compile(cell, fullgraph=True, backend="eager")(y, cell(y))
    for module, x in ((mingru.MinGRU(3, 4), torch.randn(7, 2, 3)), (mingru.MinGRU(5, 4, 2), torch.randn(7, 2, 5))):
        h = module(x)[1]
        assert_equal(torch.compile(module, fullgraph=True, backend="eager")(x, h), module(x, h))


def test_fused_kernel_is_in_the_graph():
    """A compiled layer calls the same kernel as eager, products and recurrence in one."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(str(graph))
        return graph

    rnn = mingru.MinGRU(3, 4)
    with torch.no_grad():
        torch.compile(rnn, fullgraph=True, backend=backend)(torch.randn(2, 5, 3))
    assert any("mingru.linear_recurrence_forward" in graph for graph in graphs)
