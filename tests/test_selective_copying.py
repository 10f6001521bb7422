"""The front door, selective_copying.py: its task, its options, its files and its refusals."""

import json
import math
import re
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch
from programs import ROOT, load, refusal

from examples.common import Run

SCRIPT = ROOT / "selective_copying.py"
script = load(SCRIPT)

SMALL = ["--accelerator=cpu", "--seq-len=6", "--num-tokens=2", "--hidden-dims=16", "--num-layers=2", "--batch-size=16"]
SMALL += ["--num-validation=100"]
STEP_LINE = re.compile(r"Step \[(\d+)/(\d+)\], Loss: (\d+\.\d{4}), Accuracy: (\d+\.\d{2})%")
LAST_LINE = re.compile(r"Validation Accuracy: (\d+\.\d{2})%")


def config(**changes):
    return {**script.cfg, "precision": "32-true", **changes}


def batch(seed, size=16, **changes):
    return script.generate(size, config(**changes), torch.Generator().manual_seed(seed))


def run(capsys, *arguments):
    script.main([*SMALL, *map(str, arguments)])
    captured = capsys.readouterr()
    # A slow machine also shows lines of progress.
    assert [line for line in captured.err.splitlines() if not line.startswith("training: step ")] == []
    return captured.out


def refused(capsys, *arguments):
    """The one line of a run that must not begin."""
    line = refusal(script.main, [str(argument) for argument in arguments])
    assert capsys.readouterr().out == ""
    return line


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
        assert re.search(rf" {option}[ ,].*?\(default: (\S+)\)", help_text)[1] == str(default)
        assert getattr(parser.parse_args([]), name) == default
        if isinstance(default, bool):
            assert getattr(parser.parse_args([option.replace("--", "--no-")]), name) is False
            assert getattr(parser.parse_args([option]), name) is True
        else:
            value = "rms" if name == "norm" else 1
            found = getattr(parser.parse_args([option, str(value)] if name != "vocab_size" else [option, "4"]), name)
            assert found == (4 if name == "vocab_size" else value)
            assert type(found) is type(default)


def test_an_edited_entry_of_cfg_is_checked(monkeypatch, capsys):
    monkeypatch.setitem(script.cfg, "num_steps", 0)
    assert refused(capsys) == "argument --num-steps: must be an integer of at least 1, got '0'"


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
        ("--num-tokens 65", "--num-tokens must be at most --seq-len (64), got 65"),
        ("--num-tokens 0", "argument --num-tokens: must be an integer of at least 1, got '0'"),
        ("--vocab-size 3", "argument --vocab-size: must be an integer of at least 4, got '3'"),
        ("--learning-rate nan", "argument --learning-rate/--lr: must be a number above 0, got 'nan'"),
        ("--lr 0", "argument --learning-rate/--lr: must be a number above 0, got '0'"),
        ("--weight-decay -1", "argument --weight-decay: must be a number of at least 0, got '-1'"),
        ("--warmup 2", "argument --warmup: must be a number from 0 to 1, got '2'"),
        ("--seed 2147483648", "argument --seed: must be an integer from 0 to 2147483647, got '2147483648'"),
        ("--norm batch", "argument --norm: invalid choice: 'batch'"),
        ("--load a --save b", "--load does not train, so it cannot be combined with --save, --plot or --checkpoint"),
    ],
)
def test_senseless_options_are_refused(capsys, arguments, message):
    assert refused(capsys, *arguments.split()).startswith(message)


def test_a_missing_or_foreign_checkpoint_is_refused(tmp_path, capsys):
    path = tmp_path / "x"
    assert refused(capsys, "--load", path) == f"cannot read {path}: No such file or directory"
    assert refused(capsys, "--load", tmp_path) == f"cannot read {tmp_path}: Is a directory"
    for content in (b"", b"no tensors in here", b"\xff" * 100):
        path.write_bytes(content)
        assert f"{path} is damaged or not a checkpoint of this program: " in refused(capsys, "--load", path)
    for metadata in (None, {"config": "null"}, {"config": "[]"}, {"config": '{"seq_len": 64}'}):
        path.write_bytes(safetensors.torch.save({"weight": torch.ones(2)}, metadata))
        message = f"{path} is not a checkpoint of this program: its config is missing or incomplete"
        assert refused(capsys, "--load", path) == message
    path.write_bytes(safetensors.torch.save({"weight": torch.ones(2)}, {"config": "{"}))
    assert f"{path} is damaged or not a checkpoint of this program: " in refused(capsys, "--load", path)


@pytest.mark.parametrize("kept", [4, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(checkpoint, capsys, kept):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    assert f"{checkpoint} is damaged or not a checkpoint" in refused(capsys, "--load", checkpoint)


# A file without metadata, whose marks of a layer are missing.
@pytest.mark.filterwarnings("ignore:load_state_dict. the weights do not say")
def test_a_checkpoint_that_does_not_fit_its_sizes_is_refused(checkpoint, capsys):
    with safetensors.safe_open(checkpoint, framework="pt") as file:
        saved = json.loads(file.metadata()["config"])
    tensors = safetensors.torch.load_file(checkpoint)

    def rewrite(tensors, **changes):
        checkpoint.write_bytes(safetensors.torch.save(tensors, {"config": json.dumps({**saved, **changes})}))
        return refused(capsys, "--load", checkpoint)

    message = f"{checkpoint} does not match this model: Error(s) in loading state_dict for Model: "
    assert f"{message}size mismatch for rnn.layers.0." in rewrite(tensors, hidden_dims=32)
    assert f'{message}Missing key(s) in state_dict: "rnn.layers.2.' in rewrite(tensors, num_layers=3)
    fewer = {name: tensor for name, tensor in tensors.items() if name != "head.bias"}
    assert f'{message}Missing key(s) in state_dict: "head.bias"' in rewrite(fewer)
    assert f'{message}Unexpected key(s) in state_dict: "more"' in rewrite({**tensors, "more": torch.ones(1)})
    assert "--hidden-dims: must be an integer of at least 1, got 'x'" in rewrite(tensors, hidden_dims="x")
    assert "--norm: invalid choice: 'batch'" in rewrite(tensors, norm="batch")


def test_a_killed_run_goes_on_as_if_uninterrupted(tmp_path, capsys, monkeypatch):
    files = ["--checkpoint", tmp_path / "run.pt", "--save"]
    expected = run(capsys, "--num-steps", 60, "--save", tmp_path / "whole").splitlines()

    class Killed(BaseException):
        pass

    def steps(self, *arguments):
        for step in kept(self, *arguments):
            if step == 30:
                raise Killed
            yield step

    kept = Run.steps
    monkeypatch.setattr(Run, "steps", steps)
    with pytest.raises(Killed):
        run(capsys, "--num-steps", 60, *files, tmp_path / "resumed", "--save-every", 7)
    capsys.readouterr()
    monkeypatch.setattr(Run, "steps", kept)
    found = run(capsys, "--num-steps", 60, *files, tmp_path / "resumed", "--resume", "--plot", tmp_path / "a.png")
    assert found.splitlines() == expected[2:]
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


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
