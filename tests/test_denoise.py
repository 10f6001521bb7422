"""examples/denoise.py: its data, signals, models, refusals and a short run."""

import wave

import pytest
import torch
from programs import load

script = load("examples/denoise.py")

SMALL = "--num-steps 100 --num-parameters 10000 --learning-rate 0.02 --batch-size 4 --seconds 1 --num-test 2".split()
SMALL += "--seeds 0 --accelerator cpu".split()
TEST = ["--test", "second", "noise"]


@pytest.fixture
def folder(tmp_path):
    """Two speakers, whose voices are pulses of low tones, and two pieces of music, which are high tones."""
    seconds = torch.arange(9 * script.RATE) / script.RATE
    signals = {"moh/tune": (6000 * seconds).sin(), "moh/noise": (6500 * seconds).sin()}
    for index, name in enumerate(("first", "second")):
        voice = ((1500 + 300 * index) * seconds).sin() * ((3 + index) * seconds).sin().square()
        signals |= {f"sounds/{name}/digits/1": voice[:40000], f"sounds/{name}/2": voice[40000:]}
        signals[f"sounds/{name}/silence/1"] = torch.ones(10)
    for name, signal in signals.items():
        path = tmp_path / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        script.write_wav(path, 0.5 * signal)
    return tmp_path


def test_speakers_and_music_are_split(folder):
    (speech, music), (of_test, music_of_test) = script.read_folder(folder, ["second", "noise"], 8)
    assert [len(part) for part in (speech, music, of_test, music_of_test)] == [1] * 4
    # Files of silence, which are 0.5 here, are left out.
    assert len(speech[0]) == 9 * script.RATE
    assert (speech[0] < 0.5).all()
    assert not torch.equal(speech[0], of_test[0])
    assert music[0][1].item() == pytest.approx(0.5 * torch.tensor(0.75).sin().item(), abs=1e-4)


def test_ratio_of_speech_to_distortion():
    clean = torch.tensor([[1.0, -1.0, 2.0, -2.0]])
    orthogonal = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    # Powers of 10 and 2; the scale does not count.
    torch.testing.assert_close(script.ratio(3 * (clean + orthogonal), clean), torch.tensor([6.9897]))


def test_mixtures_have_their_ratio(folder):
    (speech, music), _ = script.read_folder(folder, ["second", "noise"], 8)
    clean, noisy = script.mix(speech, music, 3, 2, torch.full((3, 1), 5.0))
    assert clean.shape == (3, 2 * script.RATE)
    torch.testing.assert_close(script.ratio(noisy, clean), torch.full((3,), 5.0), rtol=0, atol=0.1)


def test_spectra_are_inverted():
    x = torch.randn(2, 10 * script.HOP)
    torch.testing.assert_close(script.signal(script.spectra(x)), x, rtol=1e-5, atol=1e-5)


def test_the_wiener_filter_removes_a_steady_noise():
    seconds = torch.arange(4 * script.RATE) / script.RATE
    clean = ((1500 * seconds).sin() * (3 * seconds).sin().clamp(min=0)).unsqueeze(0)
    noisy = clean + 0.1 * torch.randn(clean.shape)
    assert script.ratio(script.wiener(noisy), clean) > script.ratio(noisy, clean) + 3


@pytest.mark.parametrize("name", script.MODELS)
def test_models_have_the_size_and_ignore_the_future(name):
    model = script.make(name, 20000).eval()
    assert 18000 < sum(x.numel() for x in model.parameters()) <= 20000
    x = torch.rand(2, 7, script.NUM_FREQUENCIES)
    torch.testing.assert_close(model(x)[0][:, :4], model(x[:, :4])[0], rtol=1e-5, atol=1e-6)
    out, _ = model(x, model.initial_state.expand(-1, 2, *model.initial_state.shape[2:]).contiguous())
    torch.testing.assert_close(out, model(x)[0])


class Session:
    """Compute one frame with a model, in place of ONNX Runtime, and scale the gains."""

    def __init__(self, model, scale):
        self.model, self.scale = model, scale

    def run(self, names, inputs):
        with torch.no_grad():
            gain, state = self.model(torch.from_numpy(inputs["x"]), torch.from_numpy(inputs["h"]))
        return self.scale * gain.numpy(), state.numpy()


@pytest.mark.parametrize("name", script.MODELS)
def test_a_stream_equals_the_whole_sequence(name):
    model, noisy = script.make(name, 3000).eval(), torch.randn(20 * script.HOP)
    difference, _ = script.check_stream(Session(model, 1), model, noisy)
    assert difference < 1e-5
    with pytest.raises(SystemExit, match="the stream differs from the whole sequence by"):
        script.check_stream(Session(model, 1.01), model, noisy)


@pytest.mark.slow
@pytest.mark.parametrize("name", script.MODELS)
def test_an_exported_stream_equals_the_whole_sequence(name):
    model, noisy = script.make(name, 3000).eval(), torch.randn(20 * script.HOP)
    difference, _ = script.check_stream(script.export(model), model, noisy)
    assert difference < 1e-5


@pytest.mark.parametrize("name", script.MODELS)
def test_a_short_run(name, folder, tmp_path, capsys, monkeypatch):
    # The test above exports, which takes some seconds.
    monkeypatch.setattr(script, "export", lambda model: Session(model, 1))
    plot, listen = tmp_path / "plot.png", tmp_path / "listen"
    outputs = ["--plot", str(plot), "--listen", str(listen)]
    script.main([*SMALL, *TEST, "--models", name, "--folder", str(folder), *outputs])
    out, err = capsys.readouterr()
    ratios = {line.split()[0]: float(line.split()[1]) for line in out.splitlines()[1:]}
    assert list(ratios) == ["noisy", "Wiener", name]
    assert ratios["noisy"] == pytest.approx(0, abs=0.2)
    # The music has other frequencies, so that it is soon removed.
    assert ratios[name] > 10
    assert f"{name}: stream and whole sequence differ by at most" in err
    assert plot.stat().st_size > 1000
    assert [len(script.read(path)) for path in listen.iterdir()] == [8 * script.RATE] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-steps", "0"], "must be an integer of at least 1"),
        (["--plot", "plot.xyz"], "--plot must end in one of"),
        (["--folder", "missing"], "missing has no speaker for the training, but no wav files; install the packages"),
        (["--test", "first", "second"], "has no speaker for the training, but first second noise tune; install"),
        (["--test", "second"], "has no music for the test, but first second noise tune; install"),
        (["--seconds", "9"], "must have more than 9 s of sound, got 9.0 s; join short files"),
    ],
)
def test_refusals(arguments, message, folder):
    with pytest.raises(SystemExit) as error:
        script.main([*TEST, "--folder", str(folder), *arguments])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rate", [None, 16000])
def test_files_of_another_form(rate, tmp_path):
    path = tmp_path / "other.wav"
    if rate:
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, rate, 0, "NONE", ""))
    else:
        path.write_bytes(b"no sound")
    with pytest.raises(SystemExit, match=r"other.wav must be a wav file of 8,000 Hz, one channel"):
        script.read(path)
