"""The programs of examples/: a short run of each, the same from its checkpoint, and what they refuse."""

import csv
import os
import pickle
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import programs
import pytest
import small_program
import torch
from cases import refuses
from common import widest
from programs import ROOT, load, refusal
from torch.testing import assert_close

# As in subprocesses.
pytestmark = pytest.mark.usefixtures("_one_thread")


class Program(NamedTuple):
    options: str
    names: str
    """What the lines begin with."""
    data: object = programs.nothing
    needs: tuple[str, ...] = ()
    smaller: object = None
    """Other values of names in the module."""


def as_images(name):
    """Return sequences whose class is their mean."""
    classes, noise = torch.arange(40) % 10, torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    return [(classes[:, None] - 4.5 + noise) / 3, classes] * 2


SHORT = {"NUM_LAGS": 20, "NUM_WARMUP": 300}
# A function of a module that is loaded from a path cannot be sent to another process.
SHORT |= {"apart": lambda function, *arguments: function(*arguments)}
PROGRAMS = {
    "action": Program(
        "--size 32 --num-frames 3 --num-steps 60 --learning-rate 0.01 --batch-size 8 --hidden-dims 16 --seeds 0",
        "2 chance mingru.GRU mean",
        programs.action,
        ("av", "torchvision"),
        {"read": lambda path, count, size: torch.randn(count, 3, size, size) - 3.0 * (path.parent.name == "Dark")},
    ),
    "denoise": Program(
        "--num-steps 100 --num-parameters 10000 --learning-rate 0.02 --batch-size 4 --seconds 1 --num-test 2 --seeds 0",
        "0 noisy Wiener mingru.GRU minGRU mixed",
        programs.denoise,
        # The export takes some seconds.
        smaller={"export": programs.Session},
    ),
    "irregular": Program(
        "--num-steps 2 --batch-size 4 --hidden-dims 8 --seeds 0 4 --models minGRU-dt mingru.GRU",
        "model no daily minGRU-dt minGRU-dt mingru.GRU mingru.GRU mean no daily minGRU-dt mingru.GRU",
        programs.irregular,
    ),
    "long_signal": Program(
        "--num-steps 3 --num-parameters 1000 --batch-size 4 --segment 64 --num-layers 1 --seeds 0 --limit 10",
        "4,000 mean no linear mingru.GRU, mingru.GRU, minGRU, minGRU, forward mingru.GRU minGRU nn.GRU attention",
        programs.long_signal,
        smaller=SHORT,
    ),
    "memory_cartpole": Program(
        "--num-steps 500 --num-envs 4 --hidden-dims 8 --seeds 1",
        "policy mingru.GRU minGRU nn.LSTM no",
        smaller={"MAX_STEPS": 20},
    ),
    "pixels": Program(
        "--data digits --num-steps 3 --num-parameters 1000 --batch-size 4 --seeds 0 3",
        "digits: logistic logistic mingru.GRU minGRU mixed",
        smaller={"read": as_images},
    ),
    "speakers": Program(
        "--num-steps 60 --batch-size 8 --num-parameters 2000 --seeds 0",
        "mingru.GRU minGRU nn.GRU mean",
        programs.speakers,
    ),
    "video": Program(
        "--num-steps 40 --num-parameters 2000 --batch-size 2 --length 6 --size 16 --width 48 --num-test 24 --seeds 0",
        "all, copy minGRU ConvGRU",
        programs.video,
        ("av",),
    ),
}


def made(name, folder, monkeypatch):
    """Return a program, and the options of a short run."""
    options, _, data, needs, smaller = PROGRAMS[name]
    for package in needs:
        pytest.importorskip(package)
    script = load(f"examples/{name}.py")
    for key, value in (smaller or {}).items():
        monkeypatch.setattr(script, key, value)
    return script, [*options.split(), "--accelerator", "cpu", *data(folder)]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_short_run_and_its_results_from_the_checkpoint(name, tmp_path, capsys, monkeypatch):
    script, arguments = made(name, tmp_path, monkeypatch)
    plot = [] if name == "action" else ["--plot", str(tmp_path / "plot.png")]
    arguments += ["--checkpoint", str(tmp_path / "run.pt"), *plot]
    script.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line] == PROGRAMS[name].names.split()
    assert not plot or (tmp_path / "plot.png").stat().st_size > 5000
    last = {line.split()[0]: line.split() for line in lines if line}
    if name == "action":
        # One class is darker.
        assert last["mingru.GRU"][1] == last["mean"][1] == "100.00%"
    elif name == "speakers":
        # Each speaker has other signs, so that half of them are found soon.
        assert all(float(row[1]) >= 4 for row in last.values())
    elif name == "video":
        # The square moves always in the same way.
        assert float(last["minGRU"][1]) > float(last["copy"][1]) + 1 < float(last["ConvGRU"][1])
    elif name == "denoise":
        # The music has other frequencies, so that it is soon removed.
        assert float(last["noisy"][1]) == pytest.approx(0, abs=0.2)
        assert float(last["minGRU"][1]) > 10 < float(last["mingru.GRU"][1])
    elif name == "memory_cartpole":
        # The pole needs 8 steps to fall.
        assert all(8 <= float(line.split()[-1]) <= 20 for line in lines[1:])
    elif name == "irregular":
        first, second = ([float(number) for number in line.split()[3:]] for line in lines[3:5])
        means = [[(a + b) / 2, abs(a - b) / 2] for a, b in zip(first, second, strict=True)]
        found = [float(number) for number in last["minGRU-dt"][1:] if number != "±"]
        assert found == pytest.approx([number for pair in means for number in pair], abs=1.1e-3)
    monkeypatch.setattr(script, "train", None)
    script.main([*arguments, "--resume"])
    # The times of lengths are printed when they are measured.
    assert capsys.readouterr().out.splitlines() == lines[: -4 if name == "long_signal" else None]


TABLE = (programs.ROOT / "tests/data/refusals_of_programs.txt").read_text(encoding="utf-8")
REFUSALS = re.findall(r"^(\w+) (--.*) -> (.*)$", TABLE, re.MULTILINE)


@pytest.mark.parametrize(("name", "more", "message"), REFUSALS)
def test_refusals(name, more, message, tmp_path, monkeypatch):
    if name in PROGRAMS:
        script, arguments = made(name, tmp_path, monkeypatch)
    else:
        script = load("selective_copying.py" if name == "selective_copying" else f"examples/{name}.py")
        arguments = []
    monkeypatch.chdir(programs.ROOT)
    assert message in refusal(script.main, [*arguments, *more.split()])


# speakers.py

speakers = load("examples/speakers.py")


@pytest.mark.parametrize("name", speakers.MODELS)
def test_speakers_padding_does_not_count(name):
    model = speakers.Mean(8) if name == "mean" else speakers.Recurrent(name, 8)
    x, lengths = torch.randn(3, 7, 12), torch.tensor([7, 2, 5])
    x = x * (torch.arange(7) < lengths.unsqueeze(1)).unsqueeze(2)
    for row, length in enumerate(lengths):
        alone = model(x[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(model(x, lengths)[row : row + 1], alone, rtol=1e-4, atol=1e-5)


# denoise.py

denoise = load("examples/denoise.py")


@pytest.mark.parametrize("name", denoise.MODELS)
def test_denoise_a_stream_equals_the_whole_sequence(name):
    model, noisy = widest(partial(denoise.Denoiser, name), 3000, 8, 8).eval(), torch.randn(20 * denoise.HOP)
    assert denoise.check_stream(programs.Session(model), model, noisy) > 0
    with pytest.raises(SystemExit, match="the stream differs from the whole sequence by"):
        denoise.check_stream(programs.Session(model, 1.01), model, noisy)
    # The initial state is that of a call without a state.
    x = torch.rand(2, 7, denoise.NUM_FREQUENCIES)
    state = model.initial_state.expand(-1, 2, *model.initial_state.shape[2:]).contiguous()
    torch.testing.assert_close(model(x, state)[0], model(x)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", denoise.MODELS)
def test_denoise_an_exported_stream_equals_the_whole_sequence(name):
    model = widest(partial(denoise.Denoiser, name), 3000, 8, 8).eval()
    denoise.check_stream(denoise.export(model), model, torch.randn(20 * denoise.HOP))


# long_signal.py

long_signal = load("examples/long_signal.py")


@pytest.mark.parametrize("name", long_signal.TIMED)
def test_long_signal_models_are_causal_and_continue(name):
    model, x = long_signal.make(name, 3000, 2).eval(), torch.randn(2, 50)
    whole, changed = model(x)[0], x.clone()
    changed[:, 30:] += 1
    torch.testing.assert_close(whole[:, :30], model(changed)[0][:, :30])
    assert not torch.allclose(whole[:, 30:], model(changed)[0][:, 30:])
    if name in long_signal.MODELS:
        first, state = model(x[:, :20])
        torch.testing.assert_close(torch.cat([first, model(x[:, 20:], state)[0]], 1), whole)


# common.py


ON_CPU = ["--accelerator", "cpu"]


def program(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT / "examples")])}
    command = [sys.executable, "-W", "error", small_program.__file__, *ON_CPU, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def main(*arguments):
    return small_program.main([*ON_CPU, *map(str, arguments)])


def refused(*arguments):
    return refusal(main, *arguments)


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
    assert list(saved["results"]) == ["first"] and saved["unfinished"]["second"]["step"] == 3
    path.with_name("run.pt.tmp").write_bytes(b"half a checkpoint")
    # The unfinished model is kept while others are trained.
    main("--checkpoint", path, "--resume", "--models", "third")
    resumed = program("--checkpoint", path, "--log", log, "--resume")
    assert resumed.stdout == whole.stdout != "" and sorted(tmp_path.iterdir()) == [log, path]
    found = torch.load(path, weights_only=True)["results"]
    assert_close({name: found[name] for name in results}, results, rtol=0, atol=0)

    def rows(folder):
        assert any(file.name.startswith("events.") for file in (log / folder).iterdir())
        with (log / folder / "metrics.csv").open() as file:
            return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]

    assert rows("first/version_0") == [*enumerate(results["first"]["losses"], 1)]
    assert rows("second/version_0") + rows("second/version_1") == [*enumerate(results["second"]["losses"], 1)]


def test_the_last_checkpoint_is_kept(checkpoint, monkeypatch):
    before, written = checkpoint.read_bytes(), Path.write_bytes

    def half_written(path, content):
        written(path, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    expected = f"--checkpoint must be a new file, got {checkpoint}; add --resume, or name another file"
    assert refused("--checkpoint", checkpoint) == expected
    monkeypatch.setattr(small_program, "train", lambda run, name: Path(name))
    refuses(pickle.UnpicklingError, "Path", main, "--checkpoint", checkpoint, "--resume", "--models", "third")
    monkeypatch.setattr(small_program, "train", lambda run, name: name)
    monkeypatch.setattr(Path, "write_bytes", half_written)
    found = refused("--checkpoint", checkpoint, "--resume", "--models", "third")
    assert found == f"cannot write {checkpoint} (No space left on device); check the disk, or name another file"
    assert checkpoint.read_bytes() == before and list(checkpoint.parent.iterdir()) == [checkpoint]


def change(path, **changes):
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


SPOILED = [
    (Path.unlink, [], "[Errno 2] No such file or directory"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1000]), [], "failed finding central directory"),
    (lambda path: torch.save({"model": {}}, path), [], "'settings'"),
    (lambda path: change(path, settings={"program": "a.py"}), [], "a checkpoint of a.py with other options"),
    (Path.touch, ["--lr", "0.2"], "--lr must be 0.1, as in"),
    (Path.touch, ["--quick"], "--num-steps must be 8, as in"),
]


@pytest.mark.parametrize(("spoil", "more", "reason"), SPOILED)
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
    refuses(TypeError, "", main, option, tmp_path / "a.png")
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]
    assert refused("--plot", "a.xyz").startswith("--plot must end in one of .")
