"""What the tests of the programs share: small data, and short runs."""

import importlib.util
import itertools
import math
import wave
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]


def load(path: str | Path) -> ModuleType:
    """Return the module of a program, given its path in the repository."""
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_program", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(function: Callable, *arguments: object) -> str:
    """Return the message with which a call stops the program: one line, which Python prints, with the exit status 1."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code.split(": ", 1)[1]


# Each of these functions writes the data of a program into a folder, and returns the options for them.


def irregular(folder: Path) -> list[str]:
    """1,000 hours at two places, without the hours 400 to 419, and with one missing temperature."""
    lines = ["origin,time_hour,temp"]
    for hour in [*range(400), *range(420, 1000)]:
        time = (datetime(2013, 1, 1, 6) + timedelta(hours=hour)).strftime("%Y-%m-%dT%H:%M:%SZ")
        temp = "NA" if hour == 7 else 50 + 18 * math.sin(hour * 2 * math.pi / 24) + hour % 5
        lines += [f"EWR,{time},{temp}", f"JFK,{time},{temp}"]
    (folder / "weather.csv").write_text("\n".join(lines), encoding="utf-8")
    return ["--csv", str(folder / "weather.csv")]


def long_signal(folder: Path) -> list[str]:
    np.save(folder / "signal.npy", 3 + 2 * np.sin(np.arange(4000) / 7))
    return ["--file", str(folder / "signal.npy")]


def speakers(folder: Path) -> list[str]:
    """Nine speakers; their binary digits give the signs of the coefficients of 3 to 11 time steps."""
    lines = ["#a comment", "@classLabel true 1 2 3", "@data"]
    for speaker in range(1, 10):
        signs = [(-1) ** (speaker >> index % 4) for index in range(12)]
        rows = [",".join(f"{sign}.{index:02}{step}" for step in range(2 + speaker)) for index, sign in enumerate(signs)]
        lines.append(":".join([*rows, str(speaker)]))
    for part in ("TRAIN", "TEST"):
        (folder / f"JapaneseVowels_{part}.ts").write_text("\n".join(lines), encoding="utf-8")
    return ["--folder", str(folder)]


def denoise(folder: Path) -> list[str]:
    """Two speakers, whose voices are pulses of low tones, and two pieces of music, which are high tones."""
    seconds = torch.arange(9 * 8000) / 8000
    signals = {"moh/tune": (6000 * seconds).sin(), "moh/noise": (6500 * seconds).sin()}
    for index, name in enumerate(("first", "second")):
        voice = ((1500 + 300 * index) * seconds).sin() * ((3 + index) * seconds).sin().square()
        signals |= {f"sounds/{name}/digits/1": voice[:40000], f"sounds/{name}/2": voice[40000:]}
        signals[f"sounds/{name}/silence/1"] = torch.ones(10)
    for name, signal in signals.items():
        path = folder / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes((0.5 * signal * (2**15 - 1)).numpy().astype("<i2").tobytes())
    return ["--folder", str(folder), "--test", "second", "noise"]


def write_video(path: Path, frames: torch.Tensor) -> None:
    """Write gray frames (S, height, width), from 0 to 255, without loss."""
    import av

    with av.open(str(path), "w") as video:
        stream = video.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:], "gray"
        for frame in frames:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(frame.byte().numpy(), format="gray")))
        video.mux(stream.encode(None))


def video(folder: Path) -> list[str]:
    """Two videos of a dark square that moves to the right by two pixels in each frame."""
    for index, name in enumerate(("a.avi", "b.avi")):
        frames = torch.full((40, 32, 48), 200.0)
        for step, frame in enumerate(frames):
            frame[10 : 16 + index, (torch.arange(6) + 2 * step + 7 * index) % 48] = 20.0
        write_video(folder / name, frames)
    return ["--train", str(folder / "a.avi"), "--test", str(folder / "b.avi")]


def action(folder: Path) -> list[str]:
    """Empty files of two classes: groups 6 to 9, with two clips each."""
    for name, group, clip in itertools.product(("Dark", "Light"), range(6, 10), (1, 2)):
        (folder / "videos" / name).mkdir(parents=True, exist_ok=True)
        (folder / "videos" / name / f"v_{name}_g{group:02}_c{clip:02}.avi").touch()
    return ["--data", str(folder / "videos")]


def nothing(folder: Path) -> list[str]:
    return []


class Session:
    """Compute one frame with a model, in place of ONNX Runtime, and scale the gains."""

    def __init__(self, model, scale=1):
        self.model, self.scale = model, scale

    def run(self, names, inputs):
        with torch.no_grad():
            gain, state = self.model(torch.from_numpy(inputs["x"]), torch.from_numpy(inputs["h"]))
        return self.scale * gain.numpy(), state.numpy()
