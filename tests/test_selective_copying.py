"""The front door, selective_copying.py: its task, its options, its files and its refusals."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

SCRIPT = Path(__file__).parents[1] / "selective_copying.py"
spec = importlib.util.spec_from_file_location("selective_copying", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

SMALL = ["--seq-len=6", "--num-tokens=2", "--hidden-dims=16", "--num-layers=2", "--batch-size=16"]
SMALL += ["--num-validation=100"]
STEP_LINE = re.compile(r"Step \[(\d+)/(\d+)\], Loss: (\d+\.\d{4}), Accuracy: (\d+\.\d{2})%")
LAST_LINE = re.compile(r"Validation Accuracy: (\d+\.\d{2})%")


def config(**changes):
    return {**script.cfg, **changes}


def batch(seed, size=16, **changes):
    return script.generate(size, config(**changes), torch.Generator().manual_seed(seed))


def run(capsys, *arguments):
    script.main([*SMALL, *map(str, arguments)])
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refused(capsys, *arguments):
    """The one line on stderr of a run that must not begin."""
    with pytest.raises(SystemExit) as caught:
        script.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("selective_copying.py: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture
def checkpoint(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    run(capsys, "--num-steps", 3, "--save", path)
    return path


def test_sequences_hold_their_tokens_among_noise_then_markers():
    tokens, targets = batch(0, size=200, seq_len=9, vocab_size=7, num_tokens=3)
    assert tokens.shape == (200, 12)
    assert targets.shape == (200, 3)
    for sequence, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert sequence[9:] == [6, 6, 6]
        assert [token for token in sequence[:9] if token != 0] == target
        assert all(1 <= token <= 5 for token in target)


def test_a_sequence_without_noise_is_its_own_target():
    tokens, targets = batch(0, seq_len=3, num_tokens=3)
    assert torch.equal(tokens[:, :3], targets)
    assert torch.equal(tokens[:, 3:], torch.full((16, 3), 5))


def test_tokens_and_places_are_uniform():
    tokens, targets = batch(0, size=20_000, seq_len=10)
    for column in targets.T:
        assert torch.bincount(column, minlength=6)[1:5].sum() == 20_000
        torch.testing.assert_close(torch.bincount(column)[1:] / 20_000, torch.full((4,), 0.25), atol=0.02, rtol=0)
    torch.testing.assert_close((tokens[:, :10] > 0).float().mean(0), torch.full((10,), 0.4), atol=0.02, rtol=0)
    # Drawn independently: the second token repeats the first as often as chance says.
    assert (targets[:, 0] == targets[:, 1]).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_batches_are_fresh_and_follow_the_seed():
    generator = torch.Generator().manual_seed(0)
    first, second = (script.generate(16, script.cfg, generator)[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, batch(0)[0])
    assert not torch.equal(first, batch(1)[0])


def test_the_default_task_is_the_one_promised():
    sizes = ("seq_len", "vocab_size", "num_tokens", "embedding_dims", "hidden_dims", "num_layers", "residual")
    assert [script.cfg[name] for name in sizes] == [64, 6, 4, 4, 64, 3, True]
    assert (script.cfg["batch_size"], script.cfg["num_steps"]) == (64, 1500)
    assert script.cfg["num_validation"] >= 4096


def test_every_entry_of_cfg_is_an_option_of_its_type():
    parser = script.make_parser()
    help_text = " ".join(parser.format_help().split())
    for name, default in script.cfg.items():
        option = "--" + name.replace("_", "-")
        assert re.search(rf" {option}[ ,].*?default: (\S+)", help_text)[1] == str(default)
        if isinstance(default, bool):
            assert parser.parse_args([option.replace("--", "--no-")]) == Namespace(**{name: False})
            assert parser.parse_args([option]) == Namespace(**{name: True})
        else:
            value = script.CHOICES[name][-1] if name in script.CHOICES else type(default)(7)
            assert parser.parse_args([option, str(value)]) == Namespace(**{name: value})
    assert vars(parser.parse_args([])) == {}


def test_options_reach_the_model_and_the_file(tmp_path, capsys):
    path = tmp_path / "model"
    run(capsys, "--num-steps", 1, "--no-residual", "--norm", "none", "--vocab-size", 9, "--save", path)
    saved, tensors = script.load(path)
    changes = {"seq_len": 6, "num_tokens": 2, "hidden_dims": 16, "num_layers": 2, "batch_size": 16, "num_steps": 1}
    changes |= {"num_validation": 100, "residual": False, "norm": "none", "vocab_size": 9}
    assert saved == config(**changes)
    assert tensors["embedding.weight"].shape == (9, 4)
    assert tensors["head.weight"].shape == (9, 16)
    assert not any("norm" in name or "align" in name for name in tensors)


def test_lines_and_what_they_count(capsys):
    *steps, last = run(capsys, "--num-steps", 45).splitlines()
    found = [STEP_LINE.fullmatch(line).groups() for line in steps]
    assert [(step, total) for step, total, _, _ in found] == [("1", "45"), ("21", "45"), ("41", "45")]
    # 32 tokens a batch, 200 in validation: accuracy is per token.
    for accuracy, count in [*((line[3], 32) for line in found), (LAST_LINE.fullmatch(last)[1], 200)]:
        assert f"{round(float(accuracy) / 100 * count) / count:.2%}" == f"{accuracy}%"


def test_loss_and_accuracy_are_over_the_markers(capsys):
    line = run(capsys, "--num-steps", 1).splitlines()[0]
    settings = config(seq_len=6, num_tokens=2, hidden_dims=16, num_layers=2)
    generator = torch.manual_seed(settings["seed"])
    model = script.Model(settings)
    tokens, targets = script.generate(16, settings, generator)
    right, surprise = 0, 0.0
    for sequence, target in zip(model(tokens).tolist(), targets.tolist(), strict=True):
        for logits, token in zip(sequence[6:], target, strict=True):
            right += max(range(6), key=logits.__getitem__) == token
            surprise += math.log(sum(map(math.exp, logits))) - logits[token]
    loss, accuracy = STEP_LINE.fullmatch(line).groups()[2:]
    assert float(loss) == pytest.approx(surprise / 32, abs=1e-4)
    assert accuracy == f"{right / 32:.2%}"[:-1]


def test_it_learns(capsys):
    options = ["--num-steps", 400, "--hidden-dims", 32, "--batch-size", 32, "--learning-rate", 0.01]
    *steps, last = run(capsys, *options).splitlines()
    losses = [float(STEP_LINE.fullmatch(line)[3]) for line in steps]
    assert losses[-1] < losses[0] / 5
    assert float(LAST_LINE.fullmatch(last)[1]) >= 90


def test_validation_counts_right_tokens_on_data_of_its_own():
    settings = config(seq_len=6, num_tokens=2, batch_size=16, num_validation=40)
    fabric = script.Fabric(accelerator="cpu", devices=1)
    seen = []

    class AlwaysOne(torch.nn.Module):
        def forward(self, tokens):
            seen.append(tokens)
            return torch.nn.functional.one_hot(torch.ones_like(tokens), 6).float()

    accuracy = script.evaluate(AlwaysOne(), settings, fabric)
    tokens = torch.cat(seen)
    assert tokens.shape == (40, 8)
    # The markers' positions ask for all of the data tokens and nothing else.
    assert accuracy == (tokens == 1).sum().item() / 80
    assert not torch.equal(seen[0], script.generate(16, settings, torch.Generator().manual_seed(settings["seed"]))[0])


def test_same_seed_same_numbers(capsys):
    first, again, other = (run(capsys, "--num-steps", 21, "--seed", seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_saved_is_loaded_and_validates_the_same(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    trained = run(capsys, "--num-steps", 30, "--save", path)
    script.main(["--load", str(path)])
    loaded = capsys.readouterr().out
    assert loaded == trained.splitlines(keepends=True)[-1]
    script.main(["--load", str(path), "--num-validation", "1"])
    assert float(LAST_LINE.fullmatch(capsys.readouterr().out.strip())[1]) in (0, 50, 100)
    assert list(tmp_path.iterdir()) == [path]


def test_plot_writes_a_picture(tmp_path, capsys):
    path = tmp_path / "curves.png"
    run(capsys, "--num-steps", 3, "--plot", path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) > 10_000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-tokens 65", "num_tokens must be at most seq_len (64), got 65"),
        ("--num-tokens 0", "num_tokens must be above 0, got 0"),
        ("--vocab-size 3", "vocab_size must be at least 4 (noise, marker, two data tokens), got 3"),
        ("--num-steps 0", "num_steps must be above 0, got 0"),
        ("--batch-size -1", "batch_size must be above 0, got -1"),
        ("--hidden-dims 0", "hidden_dims must be above 0, got 0"),
        ("--num-validation 0", "num_validation must be above 0, got 0"),
        ("--learning-rate nan", "learning_rate must be above 0, got nan"),
        ("--learning-rate inf", "learning_rate must be above 0, got inf"),
        ("--weight-decay -1", "weight_decay must be 0 or more, got -1.0"),
        ("--warmup 2", "warmup must be a fraction of the training steps, at most 1, got 2.0"),
        ("--seed -1", "seed must be 0 or more, got -1"),
        ("--seed 2147483648", "seed must be below 2147483648, got 2147483648"),
        ("--seq-len long", "argument --seq-len: invalid int value: 'long'"),
        ("--norm batch", "argument --norm: invalid choice: 'batch'"),
        ("--colour red", "unrecognized arguments: --colour red"),
        ("--load a --save b", "--load does not train, so it cannot be combined with --save or --plot"),
        ("--save a.png --plot ./a.png", "--save and --plot must be different files, got a.png for both"),
        ("--plot curves.xyz", "--plot must end in one of ."),
    ],
)
def test_senseless_options_are_refused(capsys, arguments, message):
    assert refused(capsys, *arguments.split()).startswith(f"selective_copying.py: {message}")


@pytest.mark.parametrize("option", ["--save", "--plot"])
def test_unwritable_paths_are_refused_before_training(tmp_path, capsys, option):
    (tmp_path / "file").touch()
    assert refused(capsys, option, tmp_path) == f"selective_copying.py: cannot write {tmp_path}: it is a folder\n"
    path = tmp_path / "missing" / "x.png"
    assert refused(capsys, option, path) == f"selective_copying.py: cannot write {path}: No such file or directory\n"
    path = tmp_path / "file" / "x.png"
    assert refused(capsys, option, path) == f"selective_copying.py: cannot write {path}: Not a directory\n"
    path = tmp_path / f"{'x' * 252}.png"
    assert refused(capsys, option, path) == f"selective_copying.py: cannot write {path}: File name too long\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("option", ["--save", "--plot"])
def test_what_is_no_file_or_read_only_is_refused_and_left_alone(tmp_path, capsys, monkeypatch, option):
    path = tmp_path / "x.png"
    os.mkfifo(path)
    message = f"selective_copying.py: cannot write {path}: it is not a regular file\n"
    assert refused(capsys, option, path) == message
    assert path.is_fifo()
    path.unlink()
    path.write_text("old")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anything
    assert refused(capsys, option, path) == f"selective_copying.py: cannot write {path}: it is read-only\n"
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_written_through(tmp_path, capsys):
    path, link = tmp_path / "model", tmp_path / "link"
    link.symlink_to(path)
    run(capsys, "--num-steps", 1, "--warmup", 0, "--save", link)
    assert link.is_symlink()
    assert script.load(path)[0]["warmup"] == 0


def test_without_warm_up_the_first_step_has_the_full_learning_rate():
    script.check(config(warmup=0))
    assert script.learning_rate_factor(0, config(warmup=0)) == 1


def test_a_missing_or_foreign_checkpoint_is_refused(tmp_path, capsys):
    path = tmp_path / "x"
    assert refused(capsys, "--load", path).endswith(f"cannot read {path}: No such file or directory\n")
    assert refused(capsys, "--load", tmp_path).endswith(f"cannot read {tmp_path}: Is a directory\n")
    for content in (b"", b"no tensors in here", b"\xff" * 100):
        path.write_bytes(content)
        assert f"{path} is damaged or not a checkpoint of this program: " in refused(capsys, "--load", path)
    for metadata in (None, {"config": "null"}, {"config": "[]"}, {"config": '{"seq_len": 64}'}):
        path.write_bytes(safetensors.torch.save({"weight": torch.ones(2)}, metadata))
        message = f"{path} is not a checkpoint of this program: its config is missing or incomplete\n"
        assert refused(capsys, "--load", path).endswith(message)
    path.write_bytes(safetensors.torch.save({"weight": torch.ones(2)}, {"config": "{"}))
    assert f"{path} is damaged or not a checkpoint of this program: " in refused(capsys, "--load", path)


@pytest.mark.parametrize("kept", [4, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(checkpoint, capsys, kept):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    assert f"{checkpoint} is damaged or not a checkpoint" in refused(capsys, "--load", checkpoint)


def test_a_checkpoint_that_does_not_fit_its_sizes_is_refused(checkpoint, capsys):
    with safetensors.safe_open(checkpoint, framework="pt") as file:
        saved = json.loads(file.metadata()["config"])
    tensors = safetensors.torch.load_file(checkpoint)

    def rewrite(tensors, **changes):
        checkpoint.write_bytes(safetensors.torch.save(tensors, {"config": json.dumps({**saved, **changes})}))
        return refused(capsys, "--load", checkpoint)

    message = f"{checkpoint} does not match the config: "
    assert f"{message}head.weight is (6, 16), expected (6, 32)\n" in rewrite(tensors, hidden_dims=32)
    assert f"{message}rnn.layers.2.linear.bias is missing, expected (32,)\n" in rewrite(tensors, num_layers=3)
    fewer = {name: tensor for name, tensor in tensors.items() if name != "head.bias"}
    assert f"{message}head.bias is missing, expected (6,)\n" in rewrite(fewer)
    assert f"{message}more is (1,), expected no such tensor\n" in rewrite({**tensors, "more": torch.ones(1)})
    assert "hidden_dims must be of type int, got '16'" in rewrite(tensors, hidden_dims="16")
    assert "norm must be one of layer, rms, none, got batch" in rewrite(tensors, norm="batch")


def test_a_failed_save_leaves_the_old_checkpoint_whole(checkpoint, capsys, monkeypatch):
    before = checkpoint.read_bytes()

    def half_written(path, content):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half_written)
    with pytest.raises(SystemExit) as caught:
        script.main([*SMALL, "--num-steps", "1", "--seed", "5", "--save", str(checkpoint)])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"selective_copying.py: cannot write {checkpoint}: No space left on device\n"
    assert checkpoint.read_bytes() == before
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_bugs_are_not_swallowed(monkeypatch):
    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr(script, "train", broken)
    with pytest.raises(ValueError, match="a bug"):
        script.main(SMALL)


def test_as_a_program():
    command = [sys.executable, "-W", "error", SCRIPT]
    done = subprocess.run([*command, *SMALL, "--num-steps", "21"], capture_output=True, text=True, check=True)
    assert [line.split(",")[0] for line in done.stdout.splitlines()[:-1]] == ["Step [1/21]", "Step [21/21]"]
    assert LAST_LINE.fullmatch(done.stdout.splitlines()[-1])
    # No bar where stderr is no terminal.
    assert done.stderr == ""
