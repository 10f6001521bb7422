"""`torch.export` and what is made of it, run where this package is not."""

import pytest
import torch
from cases import (
    CASES_WITH_LENGTHS,
    assert_equal,
    every_case_of_few_quick,
    every_case_slowly,
    parametrized,
    selected_cases,
    small_chunks,
    tensors,
)
from elsewhere import run_without_mingru
from torch._inductor import aoti_compile_and_package
from torch.export import Dim

import mingru

BATCH, STEPS = Dim("batch"), Dim("steps", max=20)
# Beside the sizes that were exported: one alone, one chunk of steps and its neighbour, many chunks.
SIZES = [(2, 7), (1, 1), (3, 4), (2, 5), (1, 20)]

pytestmark = [
    pytest.mark.usefixtures("_fresh_compiler"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning"),
]


def export(case, module, reset=False, strict=False):
    inputs, shapes = [case.x(), case.h()], list(case.dynamic(BATCH, STEPS))
    if reset:
        inputs.append(case.reset())
        shapes.append(shapes[0])
    with small_chunks():
        return torch.export.export(module, tuple(inputs), dynamic_shapes=tuple(shapes), strict=strict)


def inputs_of(case, size, reset=False):
    return [case.x(*size), case.h(size[0]), *([case.reset(*size)] if reset else [])]


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


@pytest.mark.mode("torch.export, any batch and length")
@every_case_of_few_quick
def test_export(case, exported):
    module, program = exported(case)
    run = program.module()
    for size in SIZES:
        inputs = inputs_of(case, size)
        assert_equal(run(*inputs), module(*inputs))


@pytest.mark.mode("torch.export, strict, with resets")
@every_case_slowly
def test_export_strictly(case):
    module = case.make()
    run = export(case, module, True, strict=True).module()
    for size in SIZES:
        inputs = inputs_of(case, size, True)
        assert_equal(run(*inputs), module(*inputs))


@pytest.mark.mode("torch.export, core ATen")
@every_case_slowly
def test_core_aten(case, exported):
    """No operator of ours is left, and none that a runtime for core ATen would not know."""
    module, program = exported(case)
    core = program.run_decompositions()
    operators = {node.target for node in core.graph.nodes if node.op == "call_function"}
    of_torch = {each for each in operators if isinstance(each, torch._ops.OperatorBase)}
    # The others count sizes.
    assert of_torch and {each.__module__ for each in operators - of_torch} <= {"_operator", "math"}
    assert not [each for each in of_torch if torch.Tag.core not in each.tags]
    inputs = inputs_of(case, (3, 20))
    assert_equal(core.module()(*inputs), module(*inputs))


@pytest.fixture(scope="module")
def loaded(exported, tmp_path_factory, request):
    """What a process without this package computes with each case's saved program."""
    folder = tmp_path_factory.mktemp("exported")
    inputs = {}
    for index, case in enumerate(selected_cases(request)):
        torch.export.save(exported(case)[1], folder / f"{index}.pt2")
        inputs[case.name] = [inputs_of(case, size) for size in SIZES]
    script = """
        for index, (name, examples) in enumerate(given.items()):
            run = torch.export.load(f"{index}.pt2").module()
            results[name] = [run(*inputs) for inputs in examples]
    """
    return inputs, run_without_mingru(script, folder, inputs)


@pytest.mark.mode("torch.export, saved, run without mingru")
@every_case_slowly
def test_saved(case, exported, loaded):
    inputs, results = loaded
    module, _ = exported(case)
    for example, result in zip(inputs[case.name], results[case.name], strict=True):
        assert_equal(result, module(*example))


@pytest.mark.mode("AOTInductor, run without mingru")
@every_case_slowly
def test_aot_inductor(case, exported, tmp_path):
    module, program = exported(case)
    # Not vectorised, which takes g++ half the time.
    plain = {"cpp.simdlen": 1}
    aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"), inductor_configs=plain)
    examples = [inputs_of(case, size) for size in SIZES]
    script = """
        run = torch._inductor.aoti_load_package("model.pt2")
        results["all"] = [run(*inputs) for inputs in given]
    """
    results = run_without_mingru(script, tmp_path, examples)["all"]
    for example, result in zip(examples, results, strict=True):
        assert_equal(result, module(*example))


@pytest.mark.slow
def test_no_bound_on_the_length():
    module = mingru.MinGRU(3, 4)
    program = torch.export.export(module, (torch.randn(2, 7, 3),), dynamic_shapes=({1: Dim("steps")},))
    for steps in (1, 40, 5000):
        x = torch.randn(2, steps, 3)
        assert_equal(program.module()(x), module(x))


@pytest.mark.slow
def test_kernels_stay_where_they_are_asked_for():
    """`use_backend` is the switch: kernels in the graph, for processes that have this package."""
    module, x = mingru.MinLSTM(3, 4), torch.randn(2, 7, 3)
    targets = {}
    for name in ("auto", "torch", "native"):
        with mingru.use_backend(name):
            program = torch.export.export(module, (x,), dynamic_shapes=({1: Dim("steps")},))
        targets[name] = {str(node.target).partition(".")[0] for node in program.graph.nodes}
        x2 = torch.randn(2, 40, 3)
        assert_equal(program.module()(x2), module(x2))
    assert "mingru" in targets["native"]
    assert "mingru" not in targets["torch"] | targets["auto"]


@pytest.mark.mode("torch.export, lengths")
@parametrized(CASES_WITH_LENGTHS, quick=[])
def test_lengths(case):
    module, dt = case.make(), case.dt()
    of_x, of_h = case.dynamic(BATCH, Dim("steps", max=40))
    program = torch.export.export(
        module,
        (case.x(), case.h(), None, torch.tensor([3, 7]), dt.get("dt")),
        dynamic_shapes=(of_x, of_h, None, {0: BATCH}, of_x if dt else None),
    )
    for batch, steps in [(2, 7), (1, 1), (3, 16), (2, 17), (1, 40)]:
        lengths = torch.randint(0, steps + 1, (batch,))
        args = case.x(batch, steps), case.h(batch), None, lengths, case.dt(batch, steps).get("dt")
        args[0].select(case.batch_dim, 0)[lengths[0] :] = torch.nan
        assert_equal(program.module()(*args), module(*args))
    assert tensors(program.module()(*args))
