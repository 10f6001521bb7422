"""benchmarks/gpu on the CPU: the programs run, find wrong values, and write the page."""

import itertools
import json
import os
import shutil
import sys
import types
from contextlib import contextmanager, nullcontext

import pytest
import torch

import mingru
from benchmarks.gpu import device, page, plans, smoke, speed
from benchmarks.gpu.device import Clock, launches
from mingru.ops.backends.triton import launch
from mingru.ops.backends.triton.plan import Plan, Work

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--seconds", "0.001"]
BACKEND = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "torch"
calls = smoke.calls
ROW = calls.Row(layout="packed", activation="tanh", min_decay=0.1, reverse=True, reset=True, dt=True, steps=7)


def test_random_configurations_have_all_options():
    found = list(smoke.configurations(80, 0))
    for name, values in calls.FACTORS.items():
        assert {getattr(row, name) for row in found} == set(values)
    assert found == list(smoke.configurations(80, 0)) != list(smoke.configurations(80, 1))


def test_two_runs_that_differ_and_a_call_that_does_not_run_in_triton_are_found(monkeypatch):
    assert 0 < smoke.check(ROW, CPU, BACKEND) < 1
    run, counter = calls.run, itertools.count()
    monkeypatch.setattr(calls, "run", lambda *args: [x + 1e-4 * next(counter) for x in run(*args)])
    assert smoke.check(ROW, CPU, BACKEND) == float("inf")
    monkeypatch.setattr(calls, "run", lambda backend, *rest: run("torch", *rest))
    with pytest.raises(AssertionError, match="only the passes"):
        smoke.check(ROW, CPU, "triton")
    method = speed.Method(lambda x: 2 * x, [torch.randn(1, 2, 3, requires_grad=True)], num_sums=64)
    with pytest.raises(AssertionError, match="forward and backward are expected"):
        speed.measure(Clock(CPU, 0.001), method, "triton", 1.0)


def test_launches_are_counted(monkeypatch):
    monkeypatch.setattr(launch, "run", lambda name, *rest: rest)
    with launches() as names:
        assert launch.run("forward", 1, 2) == (1, 2)
    launch.run("backward")
    assert names == ["forward"]


def test_the_cache_is_flushed_before_each_replay_and_not_timed(monkeypatch):
    happened, now = [], itertools.count(0.0, 0.25)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("event")
            self.at = next(now)

        def elapsed_time(self, end):
            return end.at - self.at

    clock = Clock(CPU, 0.0)
    clock.event = Event
    monkeypatch.setattr(clock, "flush", lambda: happened.append("flush"))
    assert clock.replay_us(lambda: happened.append("replay")) == 250.0
    assert happened == 5 * ["flush", "event", "replay", "event"]


def test_a_call_that_cannot_be_captured_has_a_reason(monkeypatch):
    @contextmanager
    def graph(graph, stream):
        graph.replay = lambda: None
        yield

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", types.SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    clock = Clock(CPU, 0.0)
    clock.device = torch.device("cuda")
    monkeypatch.setattr(clock, "wait", lambda: None)
    replay, why = clock.capture(lambda: None)
    assert (replay(), why) == (None, "")
    calls = itertools.count()

    def fails_in_the_capture():
        if next(calls) > 0:
            raise ValueError("packed sequences cannot be captured\nmore")

    assert clock.capture(fails_in_the_capture) == (None, "packed sequences cannot be captured")


def test_what_a_card_refuses_is_skipped(monkeypatch, capsys, tmp_path):
    """A T4 has no kernels of bfloat16."""

    def unsupported(x, spec):
        return "a T4 has no bfloat16" if x.dtype == torch.bfloat16 else None

    monkeypatch.setattr(device, "unsupported", unsupported)
    dtypes = [torch.float16, torch.bfloat16]
    assert device.supported(dtypes, CPU, "triton") == [torch.float16]
    assert capsys.readouterr().out == "skipped, because a T4 has no bfloat16\n"
    assert device.supported(dtypes, CPU, "torch") == dtypes
    for program, options in (
        (smoke, ["--device", "cpu", "--small", "--configurations", "6"]),
        (speed, [*TINY, "--shape", "1", "2", "2", "2"]),
        (plans, [*TINY, "--shape", "1", "8", "8", "--most", "1"]),
    ):
        monkeypatch.setattr(program, "supported", lambda dtypes, *_: [torch.float32])
        path = tmp_path / "results.json"
        assert not program.main([*options, "--json", str(path)])
        assert "float32" in path.read_text()
        assert "bfloat16" not in path.read_text()


def test_wrong_values_of_a_benchmark_are_marked():
    x = torch.randn(1, 2, 3, requires_grad=True)
    for factor, wrong in ((1.0, False), (1.001, True)):
        method = speed.Method(lambda x, factor=factor: factor * x, [x], lambda x: x, (2, 4), 64)
        row = speed.measure(Clock(CPU, 0.001), method, BACKEND if BACKEND == "torch" else "", 1.0)
        assert row["wrong"] is wrong
        assert ("WRONG" in speed.cells(row)[-1]) is wrong
        assert row["forward"]["floor"] == 2 * 6 * 4
        assert row["training"]["floor"] == 4 * 6 * 4


def test_other_libraries_get_the_arguments_that_they_need(monkeypatch, capsys):
    """Time last and padded to a power of 2; logarithms of the decays."""

    def scan(a, b):
        assert a.is_contiguous()
        assert a.shape == (2, 3, 64)
        return mingru.functional.linear_scan(a.mT, b.mT).mT

    def hgrn(x, g):
        return mingru.functional.linear_scan(g.exp(), x), None

    modules = {
        "accelerated_scan": {},
        "accelerated_scan.warp": {"scan": scan},
        "fla": {},
        "fla.ops": {},
        "fla.ops.hgrn": {"chunk_hgrn": hgrn, "fused_recurrent_hgrn": hgrn},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    a, b = torch.rand(2, 40, 3, requires_grad=True), torch.randn(2, 40, 3, requires_grad=True)
    # Without the cache of what is installed here.
    monkeypatch.setattr(speed, "imported", speed.imported.__wrapped__)
    rows = speed.measure_all(Clock(CPU, 0.001), speed.others(a, b), "torch", 1.0)
    assert len(rows) == 3
    assert all(row["error"] < 1e-6 for row in rows.values())
    monkeypatch.setitem(sys.modules, "fla.ops.hgrn", None)
    assert len(speed.others(a, b)) == 1
    assert "not timed: fla.ops.hgrn (" in capsys.readouterr().out


def test_a_library_that_fails_has_a_reason_and_our_failure_is_an_error():
    def fails(x):
        raise RuntimeError("only powers of 2\nmore")

    method = speed.Method(fails, [torch.zeros(1)])
    rows = speed.measure_all(Clock(CPU, 0.001), {"other": method}, "torch", 1.0)
    assert rows == {"other": {"why": "only powers of 2"}}
    assert speed.cells(rows["other"])[0] == "only powers of 2"
    with pytest.raises(RuntimeError, match="only powers"):
        speed.measure_all(Clock(CPU, 0.001), {"own": method._replace(num_sums=64)}, "torch", 1.0)


@pytest.mark.parametrize("shape", plans.SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backward", [False, True])
def test_candidates_are_plans_that_a_kernel_takes(shape, dtype, backward):
    found = plans.candidates(plans.Task(shape, dtype, backward, None), 32)
    assert len(set(found)) == len(found) > 20
    for plan in found:
        assert plan.chunks * plan.features * dtype.itemsize <= plan.warps * 32 * 16
        assert plan.segments == 1 or plan.segments * plan.chunks * plan.steps <= shape[1]


def test_a_plan_is_used_for_its_pass_only(monkeypatch):
    task = plans.Task((1, 64, 8), torch.float32, True, Plan(2, 2, 8, 1, 1, None))
    work = Work("mingru", 4, 1, 64, 8)
    usual = launch.plan_of(work)
    with plans.using(task) as used:
        assert launch.plan_of(work) == usual
        assert launch.plan_of(work._replace(backward=True)) == task.plan
    assert used == [task.plan]
    assert launch.plan_of(work._replace(backward=True)) != task.plan
    inputs = plans.inputs_of(task, CPU)
    monkeypatch.setattr(plans, "results_of", lambda *args: inputs)
    with pytest.raises(AssertionError, match="its plan is unknown"):
        plans.timed(Clock(CPU, 0.001), task, inputs, inputs, "triton")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the results of the programs, as if they had run on a GPU."""
    folder = tmp_path_factory.mktemp("results")

    def run(program, *options):
        path = folder / f"{program.__name__.rpartition('.')[2]}.json"
        assert not program.main([*options, "--json", str(path)])
        results = json.loads(path.read_text())
        results["results"]["backend"] = "triton"
        results["results"]["device"]["device"] = "cuda"
        path.write_text(json.dumps(results))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "DTYPES", (torch.float32,))
        run(smoke, "--device", "cpu", "--small", "--configurations", "3")
        run(speed, *TINY, "--shape", "2", "6", "4", "4")
        run(plans, *TINY, "--shape", "1", "64", "8", "--most", "2")
    return folder


def test_results_become_a_page(folder):
    results = page.read(folder)
    text = page.tables(results)
    layers = results["speed"]["layers"]["(B, S, I, H) = (2, 6, 4, 4), float32"]
    ratio = layers["nn.GRU"]["training"]["call"] / layers["MinGRU"]["training"]["call"]
    assert f"| {ratio:.2f} |" in text
    assert "| 3 random configurations | at most" in text
    assert "| nn.GRU, packed |" in text
    assert text.count("\n| (1, 64, 8), ") == 4
    assert "GPU, CPU (torch " in page.sentence(results)
    assert page.sentence(results).endswith("8 checks were all right.")
    results["smoke"]["wrong"] = ["x"]
    assert page.sentence(results).endswith("8 checks gave 1 wrong results.")
    assert "| **wrong**: x |" in page.tables(results)


def test_a_run_goes_on_where_another_one_stopped(tmp_path, monkeypatch, capsys):
    path, measured = tmp_path / "speed.json", []
    monkeypatch.setattr(speed, "measure_all", lambda clock, methods, *rest: measured.append(list(methods)) or {})
    monkeypatch.setattr(speed, "DTYPES", (torch.float32,))
    now = itertools.count()
    monkeypatch.setattr(device.time, "monotonic", lambda: next(now))

    def run(minutes, commit="same"):
        measured.clear()
        monkeypatch.setattr(device, "where", lambda: {"commit": commit, "torch": torch.__version__})
        options = ["--shape", "2", "6", "4", "4", "--shape", "1", "3", "2", "2", "--minutes", str(minutes)]
        assert not speed.main([*TINY, *options, "--json", str(path)])
        return len(measured), "goes on from there" in capsys.readouterr().out

    assert run(3.5 / 60) == (3, True)
    assert list(json.loads(path.read_text())["results"]["layers"]) == ["(B, S, I, H) = (2, 6, 4, 4), float32"]
    assert run(9) == (1, False)
    assert run(9) == (0, False)
    assert run(9, "another commit") == (4, False)


def test_results_must_belong_together(folder, tmp_path):
    assert page.read(tmp_path) is None
    path = tmp_path / "plans.json"
    shutil.copy(folder / path.name, path)
    with pytest.raises(FileNotFoundError, match=r"no smoke.json; run `make gpu`"):
        page.read(tmp_path)
    shutil.copy(folder / "smoke.json", tmp_path)
    assert "### Plans" in page.tables(page.read(tmp_path))
    assert "### Training" not in page.tables(page.read(tmp_path))
    whole = path.read_text()
    for right, wrong in (
        ('"backend": "triton"', '"backend": "torch"'),
        ('"device": "cuda"', '"device": "cpu"'),
        ('"name": "CPU"', '"name": "another"'),
    ):
        path.write_text(whole.replace(right, wrong))
        assert path.read_text() != whole
        with pytest.raises(ValueError, match="on one GPU, of one commit"):
            page.read(tmp_path)


def test_the_pages_have_the_results(folder):
    """Run python -m benchmarks.gpu.page if this fails."""
    for path in page.PAGES:
        text = path.read_text(encoding="utf-8")
        assert text.count("<!-- gpu: end -->") == len(page.MARKED.findall(text)) == 1 + (path.name == "gpu.md")
        assert page.filled(text, page.read(page.RESULTS)) == text, path
        # There and back.
        other = page.filled(text, page.read(folder))
        assert "8 checks were all right." in " ".join(other.split())
        assert page.filled(other, page.read(page.RESULTS)) == text
