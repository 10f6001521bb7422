"""Remove music from speech, trained on whole sequences and run as a stream in ONNX Runtime: mingru.GRU and minGRU.

    pip install ".[examples,onnx]"       # in a clone of the repository
    apt-get install asterisk-core-sounds-{en,es,fr,it,ru}-wav asterisk-moh-opsound-wav    # Debian and Ubuntu
    python examples/denoise.py           # all models, three seeds, with spectrograms in denoise.png
    python examples/denoise.py --quick   # less than a minute
    python examples/denoise.py --listen out    # also writes noisy, denoised and clean speech as wav files

The data are announcements and hold music of telephone systems, 8,000 Hz. Speakers and musicians of the test are not in
training:

- training: Allison Smith (English and Spanish, CC-BY-SA 3.0), Carlo Flora (Italian, CC-BY 3.0), music by Paul Shuler
  (CC-BY-SA 3.0).
- test: June Wallack (French, CC-BY-SA 3.0), ivrvoice.ru (Russian, CC-BY 3.0), and music by Manolo Camp and by Reno
  Project (CC-BY-SA 3.0).

Without root, `apt-get download` the packages, unpack each one with `dpkg-deb -x PACKAGE data`, and pass `--folder
data/usr/share/asterisk`. A folder of your own needs a folder `sounds/SPEAKER` for each speaker, and a folder `moh` of
music.

A model gets the spectrum of one frame (32 ms, every 16 ms) and computes a gain for each frequency. It has no input from
later frames. After training, the model is exported for one frame, and a mixture is denoised frame by frame in ONNX
Runtime, with the state as input and output. The program stops if the result differs from that of one call for the whole
sequence. For comparison:

- noisy: the mixture of speech and music.
- Wiener: a Wiener filter whose noise is the minimum of the smoothed spectrum in the last 1.5 s.

The table has the ratio of speech to distortion (SI-SDR, higher is better) at three ratios of speech to music, mean of
three seeds and half of their range, with the default options. Then come the processor seconds of training, and the
processor time of the stream on one thread, with its Fourier transforms, as a share of the duration of the sound:

                        0 dB          5 dB         10 dB   training  stream
    noisy        0.00 ± 0.00   4.99 ± 0.00  10.00 ± 0.00
    Wiener       0.66 ± 0.00   6.15 ± 0.00  11.17 ± 0.00
    mingru.GRU   2.33 ± 0.07   7.65 ± 0.04  12.49 ± 0.12     13.9 s   0.48%
    minGRU       2.41 ± 0.02   7.78 ± 0.04  12.77 ± 0.10     17.1 s   0.53%
    mixed        2.75 ± 0.12   8.10 ± 0.13  13.07 ± 0.12     18.5 s   0.76%

mingru.GRU has two layers, and minGRU three, with norms; "mixed" is minGRU with gate="mixed". Much of the music stays.
"""

import io
import statistics
import tempfile
import time
import wave
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import LABELS, Parser, Run, at_least, check_folder, drawing, fail, installed, reading, spread, widest, write
from torch import Tensor, nn

import mingru

Sources = tuple[list[Tensor], list[Tensor]]
# With the gate of the layer.
MODELS = {"mingru.GRU": None, "minGRU": "sigmoid", "mixed": "mixed"}
RATE, FRAME, HOP = 8000, 256, 128
NUM_FREQUENCIES = FRAME // 2 + 1
# The square root of the window is applied before and after the gains. Windows that overlap by half add up to 1.
WINDOW = torch.hann_window(FRAME).sqrt()
RATIOS_DB = (0, 5, 10)
LEAST = 1e-8
NUM_SHOWN = 4  # seconds in the picture
SPEAKERS, MUSIC = ("fr_CA_f_June", "ru_RU_f_IvrvoiceRU"), ("reno_project-system", "manolo_camp-morning_coffee")
PACKAGES = "install the packages (first lines of the program), or name other --folder"
QUICK = {"num_steps": 20, "batch_size": 4, "seconds": 2, "num_test": 4, "seeds": [0]}


def read(path: Path) -> Tensor:
    """Return the samples of a wav file, from -1 to 1."""
    expected = "a wav file of 8,000 Hz, one channel and two bytes for each sample"
    with reading(path, expected), wave.open(str(path)) as file:
        form = (file.getframerate(), file.getnchannels(), file.getsampwidth())
        if form != (RATE, 1, 2):
            raise ValueError("rate {}, channels {}, bytes {}".format(*form))
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return torch.from_numpy(samples.astype(np.float32) / 2**15)


def write_wav(path: Path, samples: Tensor) -> None:
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((samples.clamp(-1, 1) * (2**15 - 1)).numpy().astype("<i2").tobytes())
    write(path, content.getvalue())


def read_folder(folder: Path, test: list[str], seconds: int) -> tuple[Sources, Sources]:
    """Return speech and music of the training and of the test: a signal of each speaker and of each piece."""
    parts: tuple[Sources, Sources] = (([], []), ([], []))
    speakers = sorted(path for path in folder.glob("sounds/*") if path.is_dir())
    pieces = sorted(folder.glob("moh/*.wav"))
    for kind, paths in enumerate((speakers, pieces)):
        for path in paths:
            # Files of silence have no speech.
            files = [file for file in sorted(path.rglob("*.wav")) if file.parent.name != "silence"] or [path]
            joined = torch.cat([torch.zeros(0), *map(read, files)])
            if len(joined) <= seconds * RATE:
                fail(f"{path} must have more than {seconds} s of sound, got {len(joined) / RATE:.1f}; join short files")
            parts[path.stem in test][kind].append(joined)
    for part, sources in zip(("training", "test"), parts, strict=True):
        for kind, signals in zip(("speaker", "music"), sources, strict=True):
            if not signals:
                names = " ".join(path.stem for path in (*speakers, *pieces)) or "no wav files"
                fail(f"{folder} has no {kind} for the {part}, but {names}; {PACKAGES} or --test")
    return parts


def mix(speech: list[Tensor], music: list[Tensor], num: int, seconds: int, ratio_db: Tensor) -> tuple[Tensor, Tensor]:
    """Return random sections of speech (num, samples), and the same with music at these ratios (num, 1) of powers."""
    length = seconds * RATE // HOP * HOP

    def sections(signals: list[Tensor]) -> Tensor:
        chosen = [signals[int(torch.randint(len(signals), ()))] for _ in range(num)]
        starts = [int(torch.randint(len(signal) - length, ())) for signal in chosen]
        return torch.stack([signal[start : start + length] for signal, start in zip(chosen, starts, strict=True)])

    clean, noise = sections(speech), sections(music)
    power, power_of_noise = (x.square().mean(1, keepdim=True).clamp(min=LEAST) for x in (clean, noise))
    return clean, clean + noise * (power / power_of_noise).sqrt() * 10 ** (-ratio_db / 20)


def ratio(found: Tensor, clean: Tensor) -> Tensor:
    """Return the scale-invariant signal-to-distortion ratio, in dB."""
    scale = (found * clean).sum(1, keepdim=True) / clean.square().sum(1, keepdim=True).clamp(min=LEAST)
    power, error = (scale * clean).square().sum(1), (found - scale * clean).square().sum(1)
    return 10 * torch.log10(power.clamp(min=LEAST) / error.clamp(min=LEAST))


def spectra(x: Tensor) -> Tensor:
    """Return the spectra of all frames, (B, S, frequencies)."""
    options = {"window": WINDOW.to(x.device), "pad_mode": "constant", "return_complex": True}
    return torch.stft(x, FRAME, HOP, **options).transpose(1, 2)


def signal(spectrum: Tensor) -> Tensor:
    """Return the signals (B, samples) of the spectra of all frames."""
    length = HOP * (spectrum.shape[1] - 1)
    return torch.istft(spectrum.transpose(1, 2), FRAME, HOP, window=WINDOW.to(spectrum.device), length=length)


class Denoiser(nn.Module):
    """Compute the gain of each frequency from the magnitudes: (B, S, frequencies) to the same shape."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(NUM_FREQUENCIES, width)
        options: dict[str, Any] = {"norm": "rms", "residual": True, "gate": MODELS[name]}
        is_min = name != "mingru.GRU"
        self.rnn = mingru.MinGRU(width, width, 3, **options) if is_min else mingru.GRU(width, width, 2)
        self.initial_state = self.rnn.initial(1)
        self.head = nn.Linear(width, NUM_FREQUENCIES)

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # Small magnitudes are raised, as in hearing.
        out, h = self.rnn(F.gelu(self.first(x**0.3)), h)
        return self.head(out).sigmoid(), h


def denoise(model: nn.Module, noisy: Tensor) -> Tensor:
    """Denoise signals (B, samples), whose length is a multiple of HOP, in one call."""
    spectrum = spectra(noisy)
    return signal(spectrum * model(spectrum.abs())[0])


def wiener(noisy: Tensor) -> Tensor:
    """Denoise with a Wiener filter, whose noise is the minimum of the smoothed power in the last 1.5 s."""
    spectrum = spectra(noisy)
    powers = spectrum.abs().square().unbind(1)
    smoothed, before, gains = [powers[0]], torch.zeros_like(powers[0]), []
    for power in powers:
        smoothed = [*smoothed[-94:], 0.8 * smoothed[-1] + 0.2 * power]
        # The minimum is about half of the mean.
        noise = 2 * torch.stack(smoothed).amin(0) + LEAST
        speech = 0.9 * before + 0.1 * (power - noise).clamp(min=0)
        gains.append((speech / (speech + noise)).clamp(min=0.1))
        before = gains[-1].square() * power
    return signal(spectrum * torch.stack(gains, 1))


def train(run: Run, name: str, sources: Sources, tests: list[tuple[Tensor, Tensor]], seed: int) -> tuple[Any, ...]:
    """Train a model.

    Return the ratios of the test, the processor seconds of training and of each second of the stream, and a denoised
    mixture.
    """
    args = run.args
    torch.manual_seed(seed)
    module = widest(partial(Denoiser, name), args.num_parameters, 8, 8)  # the mixture needs multiples of 8

    def loss_of(model: nn.Module, step: int) -> Tensor:
        # Ratios from -2.5 to 12.5 dB, and a volume from -6 to 6 dB.
        ratios_db = 15 * torch.rand(args.batch_size, 1) - 2.5
        clean, noisy = run.fabric.to_device(mix(*sources, args.batch_size, args.seconds, ratios_db))
        volume = run.fabric.to_device(10 ** (0.6 * torch.rand(args.batch_size, 1) - 0.3))
        return -ratio(denoise(model, volume * noisy), clean).mean()

    run.train(args.num_steps, loss_of, module)
    module = module.cpu().float().eval()
    with torch.no_grad():
        found = [denoise(module, noisy) for _, noisy in tests]
    ratios = [float(ratio(x, clean).mean()) for x, (clean, _) in zip(found, tests, strict=True)]
    # The last mixture with most music is the one in the picture.
    share = check_stream(export(module), module, tests[0][1][-1])
    return ratios, run.processor_seconds, share, found[0][-1]


def export(model: Denoiser) -> Any:
    """Return a session of ONNX Runtime that computes one frame."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "step.onnx")
        example = (torch.rand(1, 1, NUM_FREQUENCIES), model.initial_state)
        mingru.export.onnx(model, example, path, kind="step")
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def stream(session: Any, state: np.ndarray, hops: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the denoised hops, one hop later, because a frame has two hops."""
    window = WINDOW.numpy()
    frame, rest = np.zeros(FRAME, np.float32), np.zeros(HOP, np.float32)
    for hop in hops:
        frame = np.concatenate([frame[HOP:], hop])
        spectrum = np.fft.rfft(frame * window)
        gain, state = session.run(None, {"x": np.abs(spectrum).astype(np.float32)[None, None], "h": state})
        denoised = np.fft.irfft(spectrum * gain[0, 0]).astype(np.float32) * window
        yield rest + denoised[:HOP]
        rest = denoised[HOP:]


def check_stream(session: Any, model: Denoiser, noisy: Tensor) -> float:
    """Denoise a signal (samples,) frame by frame in a session, and compare the result with that of the model.

    Returns the processor seconds for each second of sound.
    """
    # A last hop of zeros returns the last samples; the first hop of the output is before the first sample.
    hops = F.pad(noisy, (0, HOP)).view(-1, HOP).numpy()
    start = time.process_time()
    found = np.concatenate(list(stream(session, model.initial_state.numpy(), hops))[1:])
    seconds = time.process_time() - start
    with torch.no_grad():
        expected = denoise(model, noisy.unsqueeze(0))[0]
    difference = float((torch.from_numpy(found) - expected).abs().max())
    if not difference < 1e-4:
        fail(f"the stream differs from the whole sequence by {difference:.1e}, expected less than 1e-4")
    return seconds * RATE / len(noisy)


def plot(path: Path, ratios: dict[str, Sequence[list[float]]], signals: dict[str, Tensor]) -> None:
    """Draw the improvement over the mixture, mean and range over the seeds, and the spectrogram of each signal."""
    with drawing(path, 8, 3 + 1.6 * len(signals), dpi=66, axes_grid=False, font_size=13) as figure:
        chart, *rows = figure.subplots(1 + len(signals), 1, height_ratios=[1.5] + [1] * len(signals))
        noisy = torch.tensor(ratios["noisy"])
        others = {name: torch.tensor(runs) - noisy for name, runs in ratios.items() if name != "noisy"}
        places = torch.arange(len(RATIOS_DB))
        for index, (name, gains) in enumerate(others.items()):
            mean = gains.mean(0)
            errors = torch.stack([mean - gains.amin(0), gains.amax(0) - mean])
            left, label = places + 0.2 * (index - 1.5), LABELS.get(name, name)
            chart.bar(left.tolist(), mean.tolist(), 0.18, yerr=errors.tolist(), label=label)
        chart.set_xticks(places.tolist(), [f"{db} dB" for db in RATIOS_DB])
        most = float(torch.cat(list(others.values())).max().clamp(min=0.5))
        chart.set(xlabel="speech to music in the mixture", ylabel="improvement (dB)", ylim=(0, 1.1 * most))
        figure.legend(*chart.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
        for axes, (name, samples) in zip(rows, signals.items(), strict=True):
            power = 10 * torch.log10(spectra(samples.unsqueeze(0))[0].abs().square() + 1e-6)
            extent = (0, len(samples) / RATE, 0, RATE / 2000)
            axes.imshow(power.t().numpy(), origin="lower", aspect="auto", extent=extent, vmin=-25, vmax=20)
            axes.set_title(name, fontsize=14)
            axes.set_ylabel("kHz")
        axes.set_xlabel("seconds")


def main(argv: list[str] | None = None) -> None:
    defaults = {"num_steps": 300, "num_parameters": 100_000, "batch_size": 16, "learning_rate": 5e-3}
    parser = Parser(__file__, __doc__, QUICK, models=tuple(MODELS), plot=Path("denoise.png"), **defaults)
    parser.add("--folder", type=Path, default=Path("/usr/share/asterisk"), help="folder that contains sounds and moh")
    parser.add("--test", nargs="+", default=[*SPEAKERS, *MUSIC], metavar="NAME", help="speakers and music of the test")
    parser.add("--seconds", type=at_least(1), default=4, help="length of a mixture in training")
    parser.add("--num-test", type=at_least(1), default=64, help="mixtures of 8 s in the test, for each ratio")
    parser.add("--listen", type=Path, help="folder for wav files of one mixture of the test")
    args = parser.parse_args(argv)
    run = Run(parser, args, free=["listen"])
    if args.listen:
        check_folder(args.listen)
    for package in ("onnx", "onnxruntime", "onnxscript"):
        installed(package, 'run `pip install ".[onnx]"` in a clone of the repository')
    sources, of_test = read_folder(args.folder, args.test, max(8, args.seconds))
    # The test is the same for all seeds.
    torch.manual_seed(1234)
    tests = [mix(*of_test, args.num_test, 8, torch.full((args.num_test, 1), float(db))) for db in RATIOS_DB]

    of_ratios: dict[str, Sequence[list[float]]] = {}

    def show(name: str, ratios: Sequence[list[float]], *others: str) -> None:
        of_ratios[name] = ratios
        cells = [spread(each, 5, ".2f") for each in zip(*ratios, strict=True)]
        run.print("  ".join([f"{name:10}", *cells, *others]))

    run.print("  ".join([" " * 10, *(f"{f'{db} dB':>12}" for db in RATIOS_DB), " training", "stream"]))
    show("noisy", [[float(ratio(noisy, clean).mean()) for clean, noisy in tests]])
    show("Wiener", [[float(ratio(wiener(noisy), clean).mean()) for clean, noisy in tests]])
    clean, noisy = (x[-1] for x in tests[0])
    signals = {f"speech and music, {RATIOS_DB[0]} dB": noisy}
    for name in args.models:
        results = zip(*run.each_seed(name, train, name, sources, tests), strict=True)
        ratios, seconds, share, (signals[name], *_) = results
        show(name, ratios, f"{statistics.mean(seconds):7.1f} s", f"{statistics.median(share):6.2%}")
    signals["speech"] = clean
    # The results of the other models look like that of the first.
    first, model, *_, last = signals
    plot(
        args.plot,
        of_ratios,
        {LABELS.get(name, name): signals[name][: NUM_SHOWN * RATE] for name in (first, model, last)},
    )
    if args.listen:
        for name, samples in signals.items():
            write_wav(args.listen / f"{name.replace(',', '').replace(' ', '_')}.wav", samples)


if __name__ == "__main__":
    main()
