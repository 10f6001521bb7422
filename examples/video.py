"""Predict the next frame of a video with convolutional layers: minGRU, a ConvGRU, and the last frame.

    pip install ".[examples]"                                # in a clone of the repository
    pip install av && pip install --no-deps idtrackerai==6.0.14    # a reader of videos, and two videos
    python examples/video.py                                 # both models, three seeds, with frames in video.png
    python examples/video.py --quick                         # less than a minute
    python examples/video.py --train a.mp4 --test b.mp4      # other videos

The videos show fish from above, 501 and 508 frames. They come from the PyPI package idtrackerai 6.0.14 (GPL-3). One is
for training, the other for the test. Frames are reduced to a width of 288 pixels, and the median of each frame is
subtracted, because the light flickers.

- minGRU: two layers of `mingru.MinConv2dGRU`, which compute all frames of a sequence in parallel.
- ConvGRU: two convolutional GRU layers (Ballas et al. 2016), one frame after the other. Their convolutions read the
  state too.
- copy: the last frame.

Both models have as many parameters, compute at half of the resolution, and predict the change from the last frame. The
table has the peak signal-to-noise ratio (higher is better) of all pixels and of those that show a fish, mean of three
seeds and half of their range, and the processor seconds of training, with the default options:

                  all, dB      fish, dB   training
    copy     41.07 ± 0.00  21.11 ± 0.00
    minGRU   42.56 ± 0.05  24.02 ± 0.03     34.5 s
    ConvGRU  42.65 ± 0.13  23.69 ± 0.12     46.0 s
"""

import itertools
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Parser, Run, at_least, drawing, fail, installed, reading, spread, widest
from torch import Tensor, nn

import mingru

MODELS = ("minGRU", "ConvGRU")
# Frames of one call in the test; the state continues in the next call.
SEGMENT = 16
# Pixels that differ by so much from their median over time show a fish. White is 1.
CONTRAST = 0.1
# Frames and pixels in the picture.
NUM_SHOWN, SIZE_SHOWN = 4, 64
QUICK = {"num_steps": 10, "batch_size": 2, "num_test": 16, "width": 144, "seeds": [0]}


def decode(path: Path) -> Iterator[Any]:
    """Yield the frames of a video."""
    import av

    with reading(path, "a video"), av.open(str(path)) as file:
        frame = None
        for frame in file.decode(video=0) if file.streams.video else ():
            yield frame
        if frame is None:
            raise ValueError("a file without frames")


def read(path: Path, width: int, num_frames: int | None = None) -> Tensor:
    """Return the frames (S, 1, height, width) of a video in gray, from 0 to 1, minus their medians."""
    frames = []
    for frame in itertools.islice(decode(path), num_frames):
        # Even, because the models compute at half of the resolution.
        height = 2 * round(frame.height * width / frame.width / 2)
        reduced = frame.reformat(width=width, height=height, format="gray", interpolation="AREA")
        frames.append(torch.from_numpy(reduced.to_ndarray()))
    pixels = torch.stack(frames).unsqueeze(1).float() / 255
    return pixels - pixels.flatten(1).median(1).values.view(-1, 1, 1, 1)


class ConvGRU(nn.Module):
    """Apply convolutional GRU layers, whose outputs are added to their inputs, one frame after the other."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(2 * width, n * width, 3, padding=1) for n in [2, 1] * num_layers)

    def forward(self, x: Tensor, h: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        last = []
        for layer, (gates, candidate) in enumerate(zip(self.convs[::2], self.convs[1::2], strict=True)):
            state, states = h[layer] if h else torch.zeros_like(x[:, 0]), []
            for frame in x.unbind(1):
                update, reset = gates(torch.cat([frame, state], 1)).sigmoid().chunk(2, 1)
                state = state + update * (candidate(torch.cat([frame, reset * state], 1)).tanh() - state)
                states.append(state)
            x = x + torch.stack(states, 1)
            last.append(state)
        return x, last


class Model(nn.Module):
    """Predict the frame after each frame of x (B, S, 1, height, width)."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, width, 3, padding=1)
        if name == "minGRU":
            self.rnn: nn.Module = mingru.MinConv2dGRU(width, width, 3, 2, padding=1, norm="group", residual=True)
        else:
            self.rnn = ConvGRU(width, 2)
        self.head = nn.Conv2d(width, 4, 3, padding=1)
        # The first prediction is the last frame.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        before, h = state or (x[:, :1], None)
        change = x - torch.cat([before, x[:, :-1]], 1)
        pixels = F.pixel_unshuffle(torch.cat([x, 2 * change], 2).flatten(0, 1), 2)
        out, h = self.rnn(F.relu(self.first(pixels)).unflatten(0, x.shape[:2]), h)
        return x + F.pixel_shuffle(self.head(out.flatten(0, 1)), 2).unflatten(0, x.shape[:2]), (x[:, -1:], h)


def sections(frames: Tensor, args: Any) -> Tensor:
    """Return random sections (B, S + 1, 1, size, size) of the frames. Of four, the one with most change is taken."""
    *_, height, width = frames.shape
    chosen = []
    for _ in range(args.batch_size):
        candidates = []
        for _ in range(4):
            limits = len(frames) - args.length, height - args.size + 1, width - args.size + 1
            start, top, left = (int(torch.randint(limit, ())) for limit in limits)
            part = frames[start : start + args.length + 1, :, top : top + args.size, left : left + args.size]
            candidates.append(part)
        most = max(candidates, key=lambda part: float((part[1:] - part[:-1]).square().sum()))
        chosen.append(most.flip([dim for dim in (2, 3) if torch.rand(()) < 0.5]))
    return torch.stack(chosen)


def train(run: Run, name: str, frames: Tensor, test: Tensor, seed: int) -> dict[str, Any]:
    """Train a model, and return its error in the test, its processor seconds and its predictions in the picture."""
    args, scale = run.args, frames.std()
    torch.manual_seed(seed)

    def loss_of(model: nn.Module, step: int) -> Tensor:
        x = run.fabric.to_device(sections(frames, args) / scale)
        # The first predictions have no past.
        return (model(x[:, :-1])[0] - x[:, 1:])[:, 2:].square().mean()

    trained = run.train(args.num_steps, loss_of, widest(partial(Model, name), args.num_parameters))
    predicted, state = [], None
    with torch.no_grad():
        for segment in test[:-1].unsqueeze(0).split(SEGMENT, 1):
            out, state = trained(run.fabric.to_device(segment / scale), state)
            predicted.append(out[0].cpu() * scale)
    found = torch.cat(predicted)
    return {"errors": errors(found, test), "seconds": run.processor_seconds, "shown": shown(found, test)}


def errors(predicted: Tensor, test: Tensor) -> list[float]:
    """Return the peak signal-to-noise ratio in dB: of all pixels, and of those that show a fish before or after."""
    is_fish = (test - test.median(0).values).abs() > CONTRAST
    is_fish = is_fish[1:] | is_fish[:-1]
    # The first predictions have no past.
    square = (predicted - test[1:]).square()[2:]
    return [-10 * float(x.mean().log10()) for x in (square, square[is_fish[2:]])]


def shown(predicted: Tensor, test: Tensor) -> Tensor:
    """Return the part of the last predictions that is in the picture: the one that changes most in the test."""
    change = (test[-NUM_SHOWN:] - test[-NUM_SHOWN - 1 : -1]).square().mean(0)
    size = [min(SIZE_SHOWN, side) for side in change.shape[1:]]
    means = F.avg_pool2d(change, size, 1)[0]
    top, left = divmod(int(means.argmax()), means.shape[1])
    return predicted[-NUM_SHOWN:, 0, top : top + size[0], left : left + size[1]].clone()


def plot(path: Path, true: Tensor, predictions: dict[str, Tensor]) -> None:
    """Draw frames (S, height, width), predictions and their errors, a row each."""
    # The predictions of the second model look like those of the first.
    rows = {"true": true, **dict(itertools.islice(predictions.items(), 2))}
    rows |= {f"error: {name}": (predicted - true).abs() for name, predicted in predictions.items()}
    with drawing(path, 8, 1.7 * len(rows), dpi=100, axes_grid=False) as figure:
        most = max(float(rows[name].max()) for name in rows if name.startswith("error"))
        for line, (name, frames) in zip(figure.subplots(len(rows), len(true)), rows.items(), strict=True):
            is_error = name.startswith("error")
            low, high = (0, most) if is_error else (float(true.min()), float(true.max()))
            for axes, frame in zip(line, frames, strict=True):
                axes.imshow(frame.numpy(), cmap="magma" if is_error else "gray", vmin=low, vmax=high)
                axes.set(xticks=[], yticks=[])
            line[0].set_ylabel(name.replace(": ", ":\n"), fontsize=15)


def main(argv: list[str] | None = None) -> None:
    defaults = {"num_steps": 400, "num_parameters": 16_000, "batch_size": 4, "learning_rate": 1e-2}
    parser = Parser(__file__, __doc__, QUICK, models=MODELS, plot=Path("video.png"), **defaults)
    add = parser.add_argument
    add("--train", type=Path, help="video for training; if omitted, test_A.avi in the package idtrackerai")
    add("--test", type=Path, help="video for the test; if omitted, test_B.avi in the package idtrackerai")
    add("--length", type=at_least(4), default=16, help="frames of a section")
    add("--size", type=at_least(8), default=48, help="height and width of a section, even")
    add("--width", type=at_least(16), default=288, help="width of the frames, even")
    add("--num-test", type=at_least(8), default=128, help="frames of the test")
    args = parser.parse_args(argv)
    for option in ("size", "width"):
        if getattr(args, option) % 2:
            fail(f"--{option} must be even, got {getattr(args, option)}")
    installed("av", "run `pip install av`")
    if not (args.train and args.test):
        fix = "run `pip install --no-deps idtrackerai==6.0.14`, or use --train and --test"
        folder = installed("idtrackerai", fix) / "data"
        args.train, args.test = args.train or folder / "test_A.avi", args.test or folder / "test_B.avi"
    run = Run(parser, args)
    frames, test = read(args.train, args.width), read(args.test, args.width, args.num_test)
    for option, path, video, least in (("train", args.train, frames, args.length + 1), ("test", args.test, test, 8)):
        if len(video) < least or min(video.shape[2:]) < args.size:
            shape = " x ".join(map(str, (len(video), *video.shape[2:])))
            least_shape = f"{least} frames of {args.size} x {args.size} pixels"
            fail(f"--{option} must have at least {least_shape}, got {shape} in {path}; reduce --length or --size")

    run.print("  ".join([" " * 7, f"{'all, dB':>12}", f"{'fish, dB':>12}", " training"]))
    found = {"copy": [{"errors": errors(test[:-1], test), "shown": shown(test[:-1], test)}]}
    for name in ("copy", *args.models):
        found[name] = found.get(name) or run.each_seed(name, train, name, frames, test)
        cells = [spread(x, 5, ".2f") for x in zip(*(each["errors"] for each in found[name]), strict=True)]
        if name != "copy":
            cells.append(f"{statistics.mean(each['seconds'] for each in found[name]):7.1f} s")
        run.print("  ".join([f"{name:7}", *cells]))
    plot(args.plot, shown(test[1:], test), {name: results[0]["shown"] for name, results in found.items()})


if __name__ == "__main__":
    main()
