"""The front door, selective_copying.py: its task, its options, its files and its refusals."""

import itertools
import json
import re

import pytest
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


def run(capsys, *arguments):
    script.main([*SMALL, *map(str, arguments)])
    return capsys.readouterr().out


def refused(*arguments):
    return refusal(script.main, [str(argument) for argument in arguments])


def test_sequences_hold_their_tokens_among_noise_then_markers():
    generator = torch.Generator().manual_seed(0)
    tokens, targets = script.generate(20_000, config(seq_len=10, num_tokens=3), generator)
    assert (tokens.shape, targets.shape) == ((20_000, 13), (20_000, 3))
    for sequence, target in zip(tokens[:200].tolist(), targets.tolist(), strict=False):
        assert sequence[10:] == [5, 5, 5] and [token for token in sequence[:10] if token != 0] == target
    # Tokens and places are uniform, and the second token repeats the first as often as chance says.
    for column in targets.T:
        torch.testing.assert_close(torch.bincount(column)[1:] / 20_000, torch.full((4,), 0.25), atol=0.02, rtol=0)
    torch.testing.assert_close((tokens[:, :10] > 0).float().mean(0), torch.full((10,), 0.3), atol=0.02, rtol=0)
    assert (targets[:, 0] == targets[:, 1]).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(script.generate(20_000, config(seq_len=10, num_tokens=3), generator)[0], tokens)


def test_every_entry_of_cfg_is_an_option_of_its_type():
    parser = script.make_parser()
    help_text = " ".join(parser.format_help().split())
    for name, default in script.cfg.items():
        option = "--" + name.replace("_", "-")
        assert re.search(rf" {option}[ ,].*?\(default: (\S+)\)", help_text)[1] == str(default)
        value = {"norm": "rms", "vocab_size": 4, "residual": False}.get(name, 1)
        given = [option.replace("--", "--no-")] if value is False else [option, str(value)]
        found = getattr(parser.parse_args(given), name)
        assert found == value and type(found) is type(default)


def test_lines_and_what_they_count(capsys):
    *steps, last = run(capsys, "--num-steps", 390, "--learning-rate", 0.01).splitlines()
    found = [STEP_LINE.fullmatch(line).groups() for line in steps]
    assert [(step, total) for step, total, _, _ in found] == [(str(20 * i + 1), "390") for i in range(20)]
    # It learns.
    assert float(found[-1][2]) < float(found[0][2]) / 4 and float(LAST_LINE.fullmatch(last)[1]) >= 80
    # The first loss and accuracy are those of the untrained model at the markers.
    settings = config(seq_len=6, num_tokens=2, hidden_dims=16, num_layers=2)
    generator = torch.manual_seed(settings["seed"])
    model = script.Model(settings)
    tokens, targets = script.generate(16, settings, generator)
    logits = model(tokens)[:, 6:]
    loss = -logits.log_softmax(-1).gather(2, targets.unsqueeze(2)).mean()
    assert float(found[0][2]) == pytest.approx(loss.item(), abs=1e-4)
    assert found[0][3] == f"{(logits.argmax(-1) == targets).float().mean():.2%}"[:-1]


def test_a_killed_run_goes_on_and_is_saved_and_loaded(tmp_path, capsys, monkeypatch):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = ["--num-steps", 60, "--no-residual", "--norm", "none", "--vocab-size", 9]
    expected = run(capsys, *options, "--save", whole).splitlines()
    files = ["--checkpoint", tmp_path / "run.pt", "--save", resumed, "--save-every", 7]

    kept = Run.steps
    with monkeypatch.context() as patch:
        # Without a last checkpoint: 28 is the last multiple of 7.
        patch.setattr(Run, "steps", lambda *rest: itertools.islice(kept(*rest), 30))
        run(capsys, *options, *files)
    found = run(capsys, *options, *files, "--resume", "--plot", tmp_path / "a.png")
    assert found.splitlines() == expected[2:] and (tmp_path / "a.png").stat().st_size > 10_000
    assert resumed.read_bytes() == whole.read_bytes()
    saved, tensors = script.load(whole)
    assert saved.items() >= {"seq_len": 6, "num_steps": 60, "residual": False, "norm": "none"}.items()
    assert (tensors["embedding.weight"].shape, tensors["head.weight"].shape) == ((9, 4), (9, 16))
    script.main(["--load", str(whole)])
    assert capsys.readouterr().out.splitlines() == expected[-1:]


# A file without metadata, whose marks of a layer are missing.
@pytest.mark.filterwarnings("ignore:load_state_dict. the weights do not say")
def test_a_file_that_does_not_fit_is_refused(tmp_path, capsys, monkeypatch):
    path = tmp_path / "model"
    run(capsys, "--num-steps", 3, "--save", path)
    saved, tensors = script.load(path)
    # Copies, because the file is in the memory of its tensors.
    content, tensors = path.read_bytes(), {name: x.clone() for name, x in tensors.items()}
    for damaged in (b"", b"no tensors in here", content[: len(content) // 2]):
        path.write_bytes(damaged)
        assert f"{path} is damaged or not a checkpoint of this program: " in refused("--load", path)

    def rewritten(tensors, config):
        path.write_bytes(safetensors.torch.save(tensors, {"config": json.dumps(config)}))
        return refused("--load", path)

    for other in (None, [], {"seq_len": 64}):
        message = f"{path} is not a checkpoint of this program: its config is missing or incomplete"
        assert rewritten(tensors, other) == message
    message = f"{path} does not match this model: Error(s) in loading state_dict for Model: "
    assert f"{message}size mismatch for rnn.layers.0." in rewritten(tensors, {**saved, "hidden_dims": 32})
    assert f'{message}Unexpected key(s) in state_dict: "more"' in rewritten({**tensors, "more": torch.ones(1)}, saved)
    assert "--norm: invalid choice: 'batch'" in rewritten(tensors, {**saved, "norm": "batch"})
    monkeypatch.setitem(script.cfg, "num_steps", 0)
    assert refused() == "argument --num-steps: must be an integer of at least 1, got '0'"
