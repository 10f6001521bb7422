"""examples/speakers.py: its data, models, refusals and a short run."""

import pytest
import torch
from programs import load, refusal

script = load("examples/speakers.py")

SMALL = "--accelerator cpu --num-steps 60 --batch-size 8 --num-parameters 2000 --seeds 0".split()


def utterance(speaker, num_steps):
    """A line of a .ts file: the binary digits of the speaker give the signs of the coefficients."""
    coefficients = [
        ",".join(f"{(-1) ** (speaker >> index % 4)}.{index:02}{step}" for step in range(num_steps))
        for index in range(12)
    ]
    return ":".join([*coefficients, str(speaker)])


@pytest.fixture
def folder(tmp_path):
    lines = ["#a comment", "@classLabel true 1 2 3", "@data"]
    lines += [utterance(speaker, 2 + speaker) for speaker in range(1, 10)]
    for part in ("TRAIN", "TEST"):
        (tmp_path / f"JapaneseVowels_{part}.ts").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def test_utterances_are_read(folder):
    x, lengths, speakers = script.read(folder / "JapaneseVowels_TRAIN.ts")
    assert x.shape == (9, 11, 12)
    assert lengths.tolist() == list(range(3, 12))
    assert speakers.tolist() == list(range(9))
    assert x[1, 2, 5].item() == pytest.approx(-1.052)
    assert not x[0, 3:].any()


@pytest.mark.parametrize("name", script.MODELS)
def test_padding_does_not_count(name):
    model = script.make(name, 2000).eval()
    assert 1500 < sum(x.numel() for x in model.parameters()) <= 2000
    x, lengths = torch.randn(3, 7, 12), torch.tensor([7, 2, 5])
    x = x * (torch.arange(7) < lengths.unsqueeze(1)).unsqueeze(2)
    for row, length in enumerate(lengths):
        alone = model(x[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(model(x, lengths)[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_short_run(folder, tmp_path, capsys):
    plot = tmp_path / "plot.png"
    script.main([*SMALL, "--folder", str(folder), "--plot", str(plot)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(script.MODELS)
    # Each speaker has other signs, so that half of them are found soon.
    assert all(float(line.split()[1]) >= 4 for line in lines)
    assert plot.stat().st_size > 1000


def test_refusals(folder, tmp_path):
    assert refusal(script.main, ["--folder", "missing"]).startswith("there is no file missing")
    path = tmp_path / "other.ts"
    path.write_text("@data\n1.0,2.0:3.0:1\n", encoding="utf-8")
    says = refusal(script.read, path)
    assert says.startswith(f"{path} must be a .ts file with 12 coefficients of 9 speakers, got ")
