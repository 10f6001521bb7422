"""benchmarks/gpu on the CPU: the programs run, find wrong values, and write the page."""

import itertools
import json
import math
import os
import shutil
import subprocess

import pytest
import torch
from cases import refuses

from benchmarks import measure
from benchmarks.gpu import device, page, smoke, speed, tests, tilings
from benchmarks.gpu.device import Clock
from mingru.ops.backends.triton import launch
from mingru.ops.backends.triton.tiling import Tiling, Work

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--seconds", "0.001"]
BACKEND = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "torch"
calls = smoke.calls
ROW = calls.Row(layout="packed", candidate="tanh", min_decay=0.1, reverse=True, reset=True, dt=True, steps=7)


@pytest.fixture(autouse=True, scope="module")
def _one_dtype():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "DTYPES", (torch.float32,))
        yield


def test_two_runs_that_differ_and_a_call_that_does_not_run_in_triton_are_found(monkeypatch):
    assert 0 < smoke.check(ROW, CPU, BACKEND) < 1
    run, counter = calls.run, itertools.count()
    monkeypatch.setattr(calls, "run", lambda *args: [x + 1e-4 * next(counter) for x in run(*args)])
    assert smoke.check(ROW, CPU, BACKEND) == float("inf")
    monkeypatch.setattr(calls, "run", lambda backend, *rest: run("torch", *rest))
    refuses(AssertionError, "only the passes", smoke.check, ROW, CPU, "triton")
    method = speed.Method(lambda x: 2 * x, [torch.randn(1, 2, 3, requires_grad=True)])
    refuses(AssertionError, "only the passes", speed.measure, Clock(CPU, 0.001), method, "triton", 1.0)


def test_a_tiling_is_used_for_its_pass_only_and_wrong_values_are_found(monkeypatch):
    task = tilings.Task((1, 64, 8), torch.float32, True, Tiling(2, 2, 8, 1, 1, None))
    work = Work("mingru", 4, 1, 64, 8)
    usual = launch.tiling_of(work)
    with tilings.using(task) as used:
        assert launch.tiling_of(work) == usual and launch.tiling_of(work._replace(backward=True)) == task.tiling
    assert used == [task.tiling]
    inputs = [torch.randn(task.shape, requires_grad=True) for _ in range(2)]
    clock, exact = Clock(CPU, 0.001), tilings.results_of(inputs, True, "torch")
    for tiling in tilings.candidates(tilings.Task((64, 1000, 100), torch.bfloat16, True, None), 32):
        assert tiling.chunks * tiling.features * 2 <= tiling.warps * 32 * 16
        assert tiling.segments == 1 or tiling.segments * tiling.chunks * tiling.steps <= 1000
    assert tilings.timed(clock, task, inputs, exact, "torch")["us"] > 0
    wrong = [x + 1 for x in exact]
    assert tilings.timed(clock, task, inputs, wrong, "torch")["why"] == "its values are wrong"
    with pytest.raises(AssertionError, match="the tiling that `tiling_of` chooses are wrong"):
        tilings.timed(clock, task._replace(tiling=None), inputs, wrong, "torch")
    monkeypatch.setattr(tilings, "results_of", lambda *args: inputs)
    refuses(AssertionError, "its tiling is unknown", tilings.timed, clock, task, inputs, inputs, "triton")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("wrong", ["", "smoke"])
def test_all_programs_run_whatever_one_finds(wrong, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/run\n[ "$2" != "benchmarks.gpu.{wrong}" ]\n')
    python.chmod(0o755)
    command = ["make", "gpu", f"PYTHON={python}", "RESULTS=here", "MINUTES=3"]
    done = subprocess.run(command, cwd=device.ROOT, capture_output=True, check=False)
    assert (done.returncode != 0) == bool(wrong)
    options = ["speed --shape 64 1000 10 100 --shape 8 4096 256 256", "smoke", "speed", "tilings", "tests"]
    lines = [f"-m benchmarks.gpu.{each} --results here --minutes 3" for each in options]
    assert (tmp_path / "run").read_text().splitlines() == [*lines, "-m benchmarks.gpu.page --results here"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the results of the programs, as if they had run on a GPU."""
    folder = tmp_path_factory.mktemp("results")

    def run(program, *options):
        assert not program.main([*options, "--results", str(folder)])
        path = folder / f"{program.__name__.rpartition('.')[2]}.json"
        results = json.loads(path.read_text())
        results |= {"backend": "triton", "device": results["device"] | {"device": "cuda"}}
        path.write_text(json.dumps(results))

    run(smoke, "--device", "cpu", "--small", "--configurations", "3")
    run(speed, *TINY, "--shape", "2", "6", "4", "4")
    run(tilings, *TINY, "--shape", "1", "64", "8", "--most", "2")
    return folder


def test_results_become_a_page(folder, tmp_path):
    results = page.read(folder)
    text = page.tables(results)
    for part in ("**layers, (B, S, I, H) = (2, 6, 4, 4), float32**", "| 3 random configurations | at most"):
        assert part in text
    row = results["speed"]["recurrences, (B, S, I, H) = (2, 6, 4, 4), float32"]["minGRU"]
    copied = results["speed"]["copies"]["large and small"]["bandwidth"] / (2 * 6 * 4 * 4)
    assert [row[name]["floor"] * copied for name in ("forward", "training")] == pytest.approx([3, 9])
    assert page.sentence(results).endswith("8 checks were all right.")
    # A copy that failed.
    assert "### Recurrences" not in page.tables(results | {"speed": results["speed"] | {"copies": {}}})
    graphs = {"inference": "WRONG; after a call, right", "packed sequences": "right; after a call, right"}
    results["smoke"] |= {"failed": {"x": "a fault"}, "shares": {"y": math.nan}, "graphs": graphs}
    results["smoke"]["errors"]["mingru, one step"] = {"states": 2e-6}
    assert page.sentence(results).endswith("9 checks gave 5 wrong results.")
    text = page.tables(results)
    for row in ("x | a fault", "y | ", "mingru, one step, states | ", *(f"{name} | " for name in graphs)):
        assert f"| **wrong**: {row} |" in text
    for path in page.PAGES:
        before = path.read_text(encoding="utf-8")
        assert before.count("<!-- gpu: end -->") == len(measure.marked("gpu").findall(before))
        # Run python -m benchmarks.gpu.page if this fails.
        now = page.texts_of(page.read(page.RESULTS))
        assert measure.filled(before, "gpu", now) == before
        other = measure.filled(before, "gpu", page.texts_of(page.read(folder)))
        assert "8 checks were all right." in " ".join(other.split()) and measure.filled(other, "gpu", now) == before


def test_a_run_goes_on_where_another_one_stopped(tmp_path, monkeypatch, capsys):
    path, measured = tmp_path / "speed.json", []
    monkeypatch.setattr(speed, "measure", lambda clock, method, *rest: measured.append(method) or {})
    now = itertools.count()
    monkeypatch.setattr(device.time, "monotonic", lambda: next(now))

    def run(minutes, sources="same"):
        measured.clear()
        monkeypatch.setattr(device, "about", lambda device: {"sources": sources})
        options = f"--shape 2 6 4 4 --shape 1 3 2 2 --minutes {minutes} --results {tmp_path}"
        assert speed.main([*TINY, *options.split()]) == 0
        return len(measured), "goes on from there" in capsys.readouterr().out

    assert run(10.5 / 60) == (9, True)
    assert len(json.loads(path.read_text())["recurrences, (B, S, I, H) = (2, 6, 4, 4), float32"]) == 8
    assert [run(9), run(9), run(9, "others")] == [(21, False), (0, False), (30, False)]
    # What others found is kept under another name.
    assert len(json.loads((tmp_path / "speed-same.json").read_text())) == len(json.loads(path.read_text()))


@pytest.mark.slow
def test_tests_that_passed_are_not_run_again(tmp_path, monkeypatch, capfd):
    (tmp_path / "pytest.ini").touch()
    code = "import os\ndef test_right(): pass\ndef test_other(): assert os.path.exists('mended')\n"
    (tmp_path / "test_some.py").write_text(code)
    monkeypatch.setattr(tests, "ROOT", tmp_path)
    monkeypatch.setattr(tests, "FILES", ["test_some.py"])
    options = ["--device", "cpu", "-k", "test", "--results", str(tmp_path)]
    assert tests.main(options) == 1
    (tmp_path / "mended").touch()
    capfd.readouterr()
    assert [tests.main(options), tests.main(options)] == [0, 0]
    assert "PASSED test_some.py::test_right" not in capfd.readouterr().out
    found = json.loads((tmp_path / "tests.json").read_text())
    assert (list(found["outcomes"].values()), found["failed"]) == (["passed"] * 2, {})
