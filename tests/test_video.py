"""examples/video.py: its videos, models, refusals and a short run."""

import argparse
import wave

import pytest
import torch
from programs import load, refusal

av = pytest.importorskip("av")
script = load("examples/video.py")

SMALL = "--num-steps 40 --num-parameters 2000 --batch-size 2 --length 6 --size 16 --width 48 --num-test 24".split()
SMALL += "--seeds 0 --accelerator cpu".split()


def write(path, frames):
    """Write gray frames (S, height, width), from 0 to 255, without loss."""
    with av.open(str(path), "w") as video:
        stream = video.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:], "gray"
        for frame in frames:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(frame.byte().numpy(), format="gray")))
        video.mux(stream.encode(None))


@pytest.fixture
def videos(tmp_path):
    """Two videos of a dark square that moves to the right by two pixels in each frame."""
    for index, name in enumerate(("a.avi", "b.avi")):
        frames = torch.full((40, 32, 48), 200.0)
        for step, frame in enumerate(frames):
            columns = (torch.arange(6) + 2 * step + 7 * index) % 48
            frame[10 : 16 + index, columns] = 20.0
        write(tmp_path / name, frames)
    return ["--train", str(tmp_path / "a.avi"), "--test", str(tmp_path / "b.avi")]


def test_frames_are_read(videos):
    frames = script.read(videos[1], 48)
    assert frames.shape == (40, 1, 32, 48)
    # The median, 200, is subtracted.
    assert frames[3, 0, 12, 6].item() == pytest.approx(-180 / 255)
    assert frames[3, 0, 0, 0].item() == 0
    assert script.read(videos[1], 24, 5).shape == (5, 1, 16, 24)


def test_a_file_without_frames(tmp_path):
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    assert "sound.wav must be a video, got a file without frames" in refusal(script.read, tmp_path / "sound.wav", 48)


def test_sections_are_parts_of_the_video():
    frames = torch.arange(20.0).view(20, 1, 1, 1) + torch.arange(12).view(12, 1) / 100 + torch.arange(14) / 10000
    args = argparse.Namespace(batch_size=5, length=6, size=8)
    parts = script.sections(frames, args)
    assert parts.shape == (5, 7, 1, 8, 8)
    torch.testing.assert_close(parts[:, 1:] - parts[:, :-1], torch.ones(5, 6, 1, 8, 8))


@pytest.mark.parametrize("name", script.MODELS)
def test_models_have_the_size_and_continue(name):
    model = script.make(name, 5000).eval()
    assert 4000 < sum(x.numel() for x in model.parameters()) <= 5000
    x = torch.randn(2, 7, 1, 8, 10)
    # An untrained model predicts the last frame.
    assert torch.equal(model(x)[0], x)
    torch.nn.init.normal_(model.head.weight)
    with torch.no_grad():
        whole, _ = model(x)
        first, state = model(x[:, :3])
        second, _ = model(x[:, 3:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-5)


def test_conv_gru_computes_its_equations():
    layer = script.ConvGRU(3)
    x, h = torch.randn(2, 1, 3, 5, 6), torch.randn(2, 3, 5, 6)
    update, reset = torch.sigmoid(layer.gates(torch.cat([x[:, 0], h], 1))).split(3, 1)
    candidate = torch.tanh(layer.candidate(torch.cat([x[:, 0], reset * h], 1)))
    out, last = layer(x, h)
    torch.testing.assert_close(last, (1 - update) * h + update * candidate)
    torch.testing.assert_close(out[:, 0], x[:, 0] + last)


def test_errors_of_all_pixels_and_of_fish():
    test = torch.zeros(8, 1, 4, 4)
    test[5, 0, 0, 0] = 0.5
    predicted = torch.full((7, 1, 4, 4), 0.1)
    predicted[4, 0, 0, 0] = predicted[5, 0, 0, 0] = 0.01
    # The pixel shows a fish before frame 6 and in frame 5; the square errors are 0.01² and 0.49².
    expected = torch.tensor([(0.01**2 + 0.49**2 + 78 * 0.1**2) / 80, (0.01**2 + 0.49**2) / 2])
    torch.testing.assert_close(torch.tensor(script.errors(predicted, test)), -10 * expected.log10())


def test_a_short_run(videos, tmp_path, capsys):
    plot = tmp_path / "plot.png"
    script.main([*SMALL, *videos, "--plot", str(plot)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    decibels = {name: float(value) for name, value, *_ in lines}
    assert list(decibels) == ["copy", *script.MODELS]
    # The square moves always in the same way.
    assert all(decibels[name] > decibels["copy"] + 1 for name in script.MODELS)
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "15"], "--size must be even, got 15"),
        (["--plot", "plot.xyz"], "--plot must end in one of"),
        (["--test", __file__], f"{__file__} must be a video, got"),
        (["--length", "40"], "--train must have at least 41 frames of 16 x 16 pixels, got 40 x 32 x 48 in"),
        (["--size", "40"], "--train must have at least 7 frames of 40 x 40 pixels, got 40 x 32 x 48 in"),
    ],
)
def test_refusals(arguments, message, videos):
    assert message in refusal(script.main, [*SMALL, *videos, *arguments])
