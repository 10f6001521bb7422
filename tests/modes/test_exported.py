"""`torch.export` and what is made of it, run where this package is not."""

import pytest
import torch
from cases import CASES_WITH_LENGTHS, assert_equal, selected_cases, small_chunks, tensors
from elsewhere import run_without_mingru
from mode import FEW, given, mode
from torch._inductor import aoti_compile_and_package
from torch.export import Dim

import mingru

BATCH, STEPS = Dim("batch"), Dim("steps", max=20)
# Beside the sizes that were exported: one alone, one chunk of steps and its neighbour, many chunks.
SIZES = [(2, 7), (1, 1), (3, 4), (2, 5), (1, 20)]

pytestmark = pytest.mark.usefixtures("_fresh_compiler")


def export(case, module, reset=False, strict=False):
    of_x, of_h = case.dynamic(BATCH, None if case.unrolls and strict else STEPS)
    shapes = (of_x, of_h, of_x)[: 2 + reset]
    with small_chunks():
        inputs = given(case, count=2 + reset)
        return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=strict)


def check(case, run, module, reset=False, steps=None):
    for batch, any_steps in SIZES:
        inputs = given(case, batch, steps or any_steps, 2 + reset)
        assert_equal(run(*inputs), module(*inputs))


@pytest.fixture(scope="module")
def exported():
    """What was exported of each case, with its module; made once, when asked for."""
    made = {}

    def of(case):
        if case.name not in made:
            module = case.make().eval()
            made[case.name] = module, export(case, module)
        return made[case.name]

    return of


@mode("torch.export, any batch and length", FEW)
def test_export(case, exported):
    module, program = exported(case)
    check(case, program.module(), module)


@mode("torch.export, strict, with resets (mingru.GRU: the length of the example)", [])
def test_export_strictly(case):
    module = case.make()
    program = export(case, module, True, strict=True).module()
    check(case, program, module, reset=True, steps=7 if case.unrolls else None)


@mode("torch.export, core ATen", [])
def test_core_aten(case, exported):
    """No operator of ours is left, and none that a runtime for core ATen would not know."""
    module, program = exported(case)
    core = program.run_decompositions()
    # The loop of a GRU has a graph of its own.
    graphs = [each.graph for each in core.graph_module.modules() if isinstance(each, torch.fx.GraphModule)]
    operators = {node.target for graph in graphs for node in graph.nodes if node.op == "call_function"}
    operators -= {torch.ops.higher_order.scan}
    of_torch = {each for each in operators if isinstance(each, torch._ops.OperatorBase)}
    # The others count sizes.
    assert of_torch and {each.__module__ for each in operators - of_torch} <= {"_operator", "math"}
    assert not [each for each in of_torch if torch.Tag.core not in each.tags]
    check(case, core.module(), module)


@pytest.fixture(scope="module")
def loaded(exported, tmp_path_factory, request):
    """What a process without this package computes with each case's saved program."""
    folder = tmp_path_factory.mktemp("exported")
    inputs = {}
    for index, case in enumerate(selected_cases(request)):
        torch.export.save(exported(case)[1], folder / f"{index}.pt2")
        inputs[case.name] = [given(case, *size, 2) for size in SIZES]
    script = """
        for index, (name, examples) in enumerate(given.items()):
            run = torch.export.load(f"{index}.pt2").module()
            results[name] = [run(*inputs) for inputs in examples]
    """
    return inputs, run_without_mingru(script, folder, inputs)


@mode("torch.export, saved, run without mingru", [])
def test_saved(case, exported, loaded):
    inputs, results = loaded
    module, _ = exported(case)
    for example, result in zip(inputs[case.name], results[case.name], strict=True):
        assert_equal(result, module(*example))


@mode("AOTInductor, run without mingru", [])
def test_aot_inductor(case, exported, tmp_path):
    module, program = exported(case)
    # Not vectorised, which takes g++ half the time.
    plain = {"cpp.simdlen": 1}
    aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"), inductor_configs=plain)
    examples = [given(case, *size, 2) for size in SIZES]
    script = """
        run = torch._inductor.aoti_load_package("model.pt2")
        results["all"] = [run(*inputs) for inputs in given]
    """
    results = run_without_mingru(script, tmp_path, examples)["all"]
    for example, result in zip(examples, results, strict=True):
        assert_equal(result, module(*example))


@pytest.mark.slow
def test_a_sum_after_a_loop(tmp_path):
    """AOTInductor would write it into an output of the loop, and fail."""
    module, x = mingru.GRU(3, 3, residual=True).eval(), torch.randn(2, 7, 3)
    program = torch.export.export(module, (x,), dynamic_shapes=({1: STEPS},))
    run = torch._inductor.aoti_load_package(aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2")))
    x = torch.randn(2, 20, 3)
    assert_equal(run(x), module(x))


@pytest.mark.slow
def test_kernels_stay_where_they_are_asked_for():
    """`use_backend` is the switch: kernels in the graph, for processes that have this package."""
    module, targets = mingru.MinLSTM(3, 4), {}
    for name in ("auto", "torch", "native"):
        with mingru.use_backend(name):
            # Without a bound on the length.
            shapes = ({1: Dim("steps")},)
            program = torch.export.export(module, (torch.randn(2, 7, 3),), dynamic_shapes=shapes)
        targets[name] = {str(node.target).partition(".")[0] for node in program.graph.nodes}
        for x in (torch.randn(2, steps, 3) for steps in (1, 40, 5000)):
            assert_equal(program.module()(x), module(x))
    assert "mingru" in targets["native"] and "mingru" not in targets["torch"] | targets["auto"]


@mode("torch.export, lengths", [], CASES_WITH_LENGTHS)
def test_lengths(case):
    module, (x, h, _, *dt) = case.make(), case.args().values()
    of_x, of_h = case.dynamic(BATCH, Dim("steps", max=40))
    shapes = of_x, of_h, None, {0: BATCH}, *(of_x for _ in dt)
    program = torch.export.export(module, (x, h, None, torch.tensor([3, 7]), *dt), dynamic_shapes=shapes)
    for batch, steps in [(2, 7), (1, 1), (3, 16), (2, 17), (1, 40)]:
        lengths = torch.randint(0, steps + 1, (batch,))
        x, h, _, *dt = case.args(batch, steps).values()
        args = x, h, None, lengths, *dt
        args[0].select(case.batch_dim, 0)[lengths[0] :] = torch.nan
        assert_equal(program.module()(*args), module(*args))
    assert tensors(program.module()(*args))
