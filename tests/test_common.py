"""examples/common.py: options, refusals, files, checkpoints, progress and logs, by a small program."""

import csv
import importlib.util
import io
import os
import pickle
import signal
import subprocess
import sys
import zipfile
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run.pt"
    main("--checkpoint", path)
    return path.read_bytes()


@pytest.fixture
def checkpoint(finished, tmp_path):
    path = tmp_path / "run.pt"
    path.write_bytes(finished)
    return path


def test_a_killed_run_goes_on_as_if_uninterrupted(tmp_path):
    path = tmp_path / "run.pt"
    whole = program()
    assert whole.returncode == 0, whole.stderr
    assert whole.stderr == ""  # no bar in a pipe
    assert program("--checkpoint", path, "--kill", "second 4").returncode == -signal.SIGKILL
    saved = torch.load(path, weights_only=True)
    assert list(saved["results"]) == ["first"]
    assert saved["unfinished"]["second"]["step"] == 3
    path.with_name("run.pt.tmp").write_bytes(b"half a checkpoint")
    resumed = program("--checkpoint", path, "--resume")
    assert resumed.stdout == whole.stdout != ""
    assert list(tmp_path.iterdir()) == [path]
    found, expected = torch.load(path, weights_only=True)["results"], main()[1]
    assert_close(found, expected, rtol=0, atol=0)


def test_finished_models_are_not_trained_again(checkpoint, monkeypatch):
    expected = torch.load(checkpoint, weights_only=True)["results"]
    monkeypatch.setattr(small_program, "train", None)
    assert_close(main("--checkpoint", checkpoint, "--resume")[1], expected, rtol=0, atol=0)
    monkeypatch.setattr(small_program, "train", lambda run, name: {"total": 0, "losses": [name]})
    _, results = main("--checkpoint", checkpoint, "--resume", "--models", "second", "third")
    assert results["third"] == {"total": 0, "losses": ["third"]}
    assert list(torch.load(checkpoint, weights_only=True)["results"]) == ["first", "second", "third"]


def test_an_unfinished_model_is_kept_while_others_are_trained(tmp_path):
    path = tmp_path / "run.pt"
    assert program("--checkpoint", path, "--kill", "first 4").returncode == -signal.SIGKILL
    main("--checkpoint", path, "--resume", "--models", "second")
    assert torch.load(path, weights_only=True)["unfinished"]["first"]["step"] == 3
    run, results = main("--checkpoint", path, "--resume")
    assert run.unfinished == {}
    assert_close(results, main()[1], rtol=0, atol=0)


def test_seconds_go_on(tmp_path):
    run, _ = main("--models", "first", "--num-steps", 1)
    run.unfinished["next"] = {
        "step": 5,
        "seconds": (100.0, 50.0),
        "random": [torch.get_rng_state()],
        "objects": [],
    }
    run.name = "next"
    assert list(run.steps(7)) == [5, 6]
    assert 100 <= run.seconds < 160
    assert 50 <= run.processor_seconds < 110


def test_a_full_disk_leaves_the_last_checkpoint(checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def half_written(path, content):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half_written)
    found = refused("--checkpoint", checkpoint, "--resume", "--models", "third")
    assert found == f"cannot write {checkpoint} (No space left on device); check the disk, or name another file"
    assert checkpoint.read_bytes() == before
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_result_that_could_not_be_read_again_is_not_saved(checkpoint, finished, monkeypatch):
    monkeypatch.setattr(small_program, "train", lambda run, name: Path(name))
    with pytest.raises(pickle.UnpicklingError, match="Path"):
        main("--checkpoint", checkpoint, "--resume", "--models", "third")
    assert checkpoint.read_bytes() == finished


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change(path, **changes):
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (Path.unlink, "[Errno 2] No such file or directory"),
        (truncate, "File is not a zip file"),
        (flip, "is damaged"),
        (zipped, ""),
        (lambda path: torch.save(torch.nn.Linear(2, 2), path), "Weights only load failed"),
        (lambda path: torch.save([1], path), "list indices"),
        (lambda path: torch.save({"model": {}}, path), "'settings'"),
        (lambda path: change(path, settings=None), "not subscriptable"),
        (lambda path: change(path, settings={"program": "a.py"}), "a checkpoint of a.py with other options"),
    ],
)
def test_a_bad_checkpoint_is_refused_and_left_alone(checkpoint, spoil, reason):
    spoil(checkpoint)
    before = checkpoint.read_bytes() if checkpoint.exists() else None
    found = refused("--checkpoint", checkpoint, "--resume")
    start = f"--checkpoint must be a file that small_program.py wrote, got {checkpoint} ("
    assert found.startswith(start)
    assert reason in found.removeprefix(start)
    assert found.endswith("; name a checkpoint of small_program.py, or start again without --resume")
    assert (checkpoint.read_bytes() if checkpoint.exists() else None) == before


def test_other_settings_are_refused(checkpoint):
    found = refused("--checkpoint", checkpoint, "--resume", "--lr", "0.2")
    assert found == f"--lr must be 0.1, as in {checkpoint}, got 0.2; give the same --lr"
    found = refused("--checkpoint", checkpoint, "--resume", "--quick")
    assert found.startswith(f"--num-steps must be 8, as in {checkpoint}, got 2; ")


def test_a_model_of_other_sizes_is_refused(checkpoint):
    states = [{"0.weight": torch.zeros(4, 2)}]
    unfinished = {"third": {"step": 3, "seconds": (0.0, 0.0), "random": []}}
    arguments = ["--checkpoint", checkpoint, "--resume", "--models", "third"]
    for objects, reason in ((states * 5, 'Missing key(s) in state_dict: "0.bias"'), ([], "zip() argument")):
        unfinished["third"]["objects"] = objects
        change(checkpoint, unfinished=unfinished)
        found = refused(*arguments)
        assert found.startswith(f"{checkpoint} does not match this program: ")
        assert reason in found


def test_a_checkpoint_is_not_overwritten_by_a_new_run(checkpoint, finished):
    found = refused("--checkpoint", checkpoint)
    assert found == f"--checkpoint must be a new file, got {checkpoint}; add --resume, or name another file"
    assert checkpoint.read_bytes() == finished
    assert refused("--resume") == "--resume needs --checkpoint; name the file to continue from"


@pytest.mark.parametrize("option", ["--checkpoint", "--plot", "--results"])
def test_unwritable_files_are_refused_before_the_training(tmp_path, monkeypatch, option):
    def why(path):
        return refused(option, path).removeprefix(f"cannot write {path} (").split(")")[0]

    path = tmp_path / "x.png"
    assert why(tmp_path / "missing" / "x.png") == "No such file or directory"
    assert why(tmp_path / f"{'x' * 249}.png") == "File name too long"
    os.mkfifo(path)
    assert why(path) == "it is not a regular file"
    path.unlink()
    (tmp_path / "folder.png").mkdir()
    assert why(tmp_path / "folder.png") == "it is not a regular file"
    path.write_text("old")
    opened = Path.open

    def denied(self, mode="r", *args, **kwargs):  # root may write anything
        if "+" in mode:
            raise PermissionError(13, "Permission denied")
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    assert why(path) == "Permission denied"
    assert path.read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.png", "x.png"]


def test_files_are_checked_and_not_created(tmp_path):
    common.Run(parser := small_program.make_parser(), parser.parse_args(["--plot", str(tmp_path / "a.png")]))
    assert list(tmp_path.iterdir()) == []
    assert refused("--plot", "a.xyz").startswith("--plot must end in one of .")
    assert refused("--plot", "a").startswith("--plot must end in one of .")


def test_a_file_is_replaced_in_one_operation(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    # The old file is not written to: who has it open reads it to its end.
    with path.open("rb") as reader:
        common.write(path, b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


def test_a_link_is_written_through(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(path)
    common.write(link, b"content")
    assert link.is_symlink()
    assert path.read_bytes() == b"content"


def test_missing_packages_are_named(monkeypatch, tmp_path):
    fix = "run `pip install nothing`"
    assert refusal(common.installed, "no_such_package", fix) == f"the package no_such_package is not installed; {fix}"
    assert common.installed("torch", fix) == Path(torch.__file__).parent
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    expected = "the package tensorboard is not installed; run `pip install tensorboard`, or omit --log"
    assert refused("--log", tmp_path / "log") == expected
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert refusal(load, common.__file__).endswith('run `pip install ".[examples]"` in a clone of the repository')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-steps 0", "argument --num-steps: must be an integer of at least 1, got '0'"),
        ("--num-steps 1.5", "argument --num-steps: must be an integer of at least 1, got '1.5'"),
        ("--lr 0", "argument --lr: must be a number above 0, got '0'"),
        ("--lr inf", "argument --lr: must be a number above 0, got 'inf'"),
        ("--lr nan", "argument --lr: must be a number above 0, got 'nan'"),
        ("--precision 8", "argument --precision: invalid choice: '8'"),
        ("--colour red", "unrecognized arguments: --colour red"),
    ],
)
def test_bad_options_are_refused(arguments, message):
    assert refused(*arguments.split()).startswith(message)


def test_numbers_in_a_range():
    parse = common.at_least(0.5, float, 1)
    assert parse("1") == 1.0
    with pytest.raises(common.argparse.ArgumentTypeError, match=r"must be a number from 0.5 to 1, got '2'"):
        parse("2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_accelerator_is_refused():
    found = refused("--accelerator", "cuda")
    assert found.startswith("--accelerator must be one of this machine, got cuda (")
    assert found.endswith("; use --accelerator auto")


def test_quick_replaces_defaults_only():
    parse = small_program.make_parser().parse_args
    assert (parse([]).num_steps, parse(["--quick"]).num_steps, parse(["--quick", "--num-steps", "5"]).num_steps) == (
        8,
        2,
        5,
    )


def test_precision_reaches_the_model():
    _, results = main("--precision", "bf16-true", "--models", "first", "--num-steps", 1)
    assert results["first"]["weights"]["0.weight"].dtype == torch.bfloat16


def test_lines_of_progress_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(common, "PLAIN_EVERY", 0)
    main("--num-steps", 2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[0] for line in lines] == [
        f"{name}: step {n}/2" for name in ("first", "second") for n in (1, 2)
    ]
    assert lines[1].split(", ")[1].startswith("loss=")
    assert lines[1].endswith(" steps/s, 00:00 left")


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    main("--models", "first")
    shown = terminal.getvalue()
    assert "first:   0%|" in shown
    assert "\n" not in shown
    assert capsys.readouterr().out.startswith("first ")


def test_logs_have_all_steps(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    path, log = tmp_path / "run.pt", tmp_path / "log"
    assert program("--checkpoint", path, "--log", log, "--kill", "second 4").returncode == -signal.SIGKILL
    _, results = main("--checkpoint", path, "--log", log, "--resume")

    def rows(folder):
        assert any(file.name.startswith("events.") for file in (log / folder).iterdir())
        with (log / folder / "metrics.csv").open() as file:
            return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]

    assert rows("first/version_0") == [*enumerate(results["first"]["losses"], 1)]
    assert rows("second/version_0") + rows("second/version_1") == [*enumerate(results["second"]["losses"], 1)]


def test_the_widest_model_has_at_most_the_given_parameters():
    def build(width):
        return torch.nn.Linear(width, 1, bias=False)

    assert common.num_parameters(common.widest(build, 10)) == 10
    assert common.num_parameters(common.widest(build, 10, 4, 4)) == 8


def test_the_learning_rate_rises_and_falls_also_in_few_steps():
    optimizer = torch.optim.SGD([torch.zeros(1)], 1.0)
    for num_steps in (1, 50):
        schedule, rates = common.one_cycle(optimizer, 0.5, num_steps), []
        for _ in range(num_steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    assert rates.index(max(rates)) == 4
    assert max(rates) == 0.5
    assert rates[-1] < 0.01


@pytest.mark.parametrize("num_warmup", [1, 10])
def test_the_learning_rate_rises_and_falls_along_a_cosine(num_warmup):
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.5)
    schedule, rates = common.warmup_cosine(optimizer, 200, num_warmup), []
    for _ in range(200):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:num_warmup] == pytest.approx([0.5 * (step + 1) / num_warmup for step in range(num_warmup)])
    assert rates[num_warmup] == max(rates)
    assert rates[(200 + num_warmup) // 2] == pytest.approx(0.25, abs=0.01)
    assert rates[-1] < 1e-3
