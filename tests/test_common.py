"""examples/common.py: options, refusals, files, checkpoints, progress and logs, by a small program."""

import csv
import importlib.util
import io
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import common
import pytest
import small_program
import torch
from programs import ROOT, load, refusal
from torch.testing import assert_close

ON_CPU = ["--accelerator", "cpu"]


def program(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT / "examples")])}
    command = [sys.executable, "-W", "error", small_program.__file__, *ON_CPU, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def main(*arguments):
    return small_program.main([*ON_CPU, *map(str, arguments)])


def refused(*arguments):
    return refusal(main, *arguments)


@pytest.fixture(autouse=True)
def one_thread():
    """As in the subprocess: sums are in another order with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def checkpoint(tmp_path):
    main("--checkpoint", tmp_path / "run.pt")
    return tmp_path / "run.pt"


def test_a_killed_run_goes_on_as_if_uninterrupted(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    path, log = tmp_path / "run.pt", tmp_path / "log"
    whole, results = program(), main()[1]
    assert whole.returncode == 0, whole.stderr
    assert whole.stderr == ""  # no bar in a pipe
    assert program("--checkpoint", path, "--log", log, "--kill", "second 4").returncode == -signal.SIGKILL
    saved = torch.load(path, weights_only=True)
    assert list(saved["results"]) == ["first"]
    assert saved["unfinished"]["second"]["step"] == 3
    path.with_name("run.pt.tmp").write_bytes(b"half a checkpoint")
    # The unfinished model is kept while others are trained.
    main("--checkpoint", path, "--resume", "--models", "third")
    resumed = program("--checkpoint", path, "--log", log, "--resume")
    assert resumed.stdout == whole.stdout != ""
    assert sorted(tmp_path.iterdir()) == [log, path]
    found = torch.load(path, weights_only=True)["results"]
    assert_close({name: found[name] for name in results}, results, rtol=0, atol=0)

    def rows(folder):
        assert any(file.name.startswith("events.") for file in (log / folder).iterdir())
        with (log / folder / "metrics.csv").open() as file:
            return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]

    assert rows("first/version_0") == [*enumerate(results["first"]["losses"], 1)]
    assert rows("second/version_0") + rows("second/version_1") == [*enumerate(results["second"]["losses"], 1)]


def test_seconds_go_on():
    run, _ = main("--models", "first", "--num-steps", 1)
    start = {"step": 5, "seconds": (100.0, 50.0), "random": [torch.get_rng_state()], "objects": []}
    run.unfinished["next"], run.name = start, "next"
    assert list(run.steps(7)) == [5, 6]
    assert 100 <= run.seconds < 160
    assert 50 <= run.processor_seconds < 110


def test_the_last_checkpoint_is_kept(checkpoint, monkeypatch):
    before, written = checkpoint.read_bytes(), Path.write_bytes

    def half_written(path, content):
        written(path, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    expected = f"--checkpoint must be a new file, got {checkpoint}; add --resume, or name another file"
    assert refused("--checkpoint", checkpoint) == expected
    monkeypatch.setattr(small_program, "train", lambda run, name: Path(name))
    with pytest.raises(pickle.UnpicklingError, match="Path"):
        main("--checkpoint", checkpoint, "--resume", "--models", "third")
    monkeypatch.setattr(small_program, "train", lambda run, name: name)
    monkeypatch.setattr(Path, "write_bytes", half_written)
    found = refused("--checkpoint", checkpoint, "--resume", "--models", "third")
    assert found == f"cannot write {checkpoint} (No space left on device); check the disk, or name another file"
    assert checkpoint.read_bytes() == before
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def change(path, **changes):
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


@pytest.mark.parametrize(
    ("spoil", "more", "reason"),
    [
        (Path.unlink, [], "[Errno 2] No such file or directory"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), [], "failed finding central directory"),
        (lambda path: torch.save({"model": {}}, path), [], "'settings'"),
        (lambda path: change(path, settings={"program": "a.py"}), [], "a checkpoint of a.py with other options"),
        (Path.touch, ["--lr", "0.2"], "--lr must be 0.1, as in"),
        (Path.touch, ["--quick"], "--num-steps must be 8, as in"),
    ],
)
def test_a_bad_checkpoint_is_refused(checkpoint, spoil, more, reason):
    spoil(checkpoint)
    assert reason in refused("--checkpoint", checkpoint, "--resume", *more)
    assert refused("--resume", *more) == "--resume needs --checkpoint; name the file to continue from"


@pytest.mark.parametrize("option", ["--checkpoint", "--plot", "--results"])
def test_unwritable_files_are_refused_before_the_training(tmp_path, option, monkeypatch):
    monkeypatch.setattr(small_program, "train", None)
    (tmp_path / "folder.png").mkdir()
    for name, why in [
        ("missing/x.png", "No such file or directory"),
        (f"{'x' * 249}.png", "File name too long"),
        ("folder.png", "it is not a regular file"),
    ]:
        path = tmp_path / name
        expected = f"cannot write {path} ({why}); check the disk, or name another file"
        assert refused(option, path) == expected
    with pytest.raises(TypeError):
        main(option, tmp_path / "a.png")
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]
    assert refused("--plot", "a.xyz").startswith("--plot must end in one of .")


def test_a_file_is_replaced_in_one_operation_also_through_a_link(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"old")
    link.symlink_to(path)
    # The old file is not written to: who has it open reads it to its end.
    with path.open("rb") as reader:
        common.write(link, b"new")
        assert reader.read() == b"old"
    assert link.is_symlink()
    assert path.read_bytes() == b"new"


def test_missing_packages_are_named(monkeypatch, tmp_path):
    assert common.installed("torch", "") == Path(torch.__file__).parent
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    expected = "the package tensorboard is not installed; run `pip install tensorboard`, or omit --log"
    assert refused("--log", tmp_path / "log") == expected
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert refusal(load, common.__file__).endswith('run `pip install ".[examples]"` in a clone of the repository')


def test_options_reach_the_training_which_has_a_bar_on_a_terminal(monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    run, results = main("--precision", "bf16-true", "--models", "first", "--quick")
    assert (run.args.num_steps, len(results["first"]["losses"])) == (2, 2)
    assert results["first"]["weights"]["0.weight"].dtype == torch.bfloat16
    assert main("--quick", "--num-steps", "3", "--models", "first")[0].args.num_steps == 3
    assert "first:   0%|" in terminal.getvalue()
    assert "\n" not in terminal.getvalue()
    assert capsys.readouterr().out.startswith("first ")


@pytest.mark.parametrize(
    ("schedule_of", "num_steps", "top"),
    [(common.one_cycle, 1, 0), (common.one_cycle, 50, 4), (lambda *x: common.warmup_cosine(*x, share=0.1), 50, 4)],
)
def test_the_learning_rate_rises_and_falls(schedule_of, num_steps, top):
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.5)
    schedule, rates = schedule_of(optimizer, num_steps), []
    for _ in range(num_steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates.index(max(rates)) == top
    assert rates[0] > 0
    assert num_steps == 1 or (rates[top] == 0.5 and rates[-1] < 0.01)
