"""Classify the actions in videos: features of frames from a network for images, and mingru.GRU over the frames.

    pip install ".[examples]" && pip install av torchvision     # in a clone of the repository
    python examples/action.py --data UCF-101 --backbone resnet18 --weights DEFAULT
    python examples/action.py --data UCF-101 --lists ucfTrainTestlist --split 2     # the official split 2
    python examples/action.py --data UCF-101 --quick                                # 3 classes, less than a minute

`--data` has a folder for each class, with videos named `v_CLASS_gGROUP_cCLIP.avi`, as in UCF101 (Soomro et al. 2012).
The clips of a group are parts of one video, so that no group may be in training and test. Without `--lists`, groups 1
to 7 are the test, as in the official split 1. Lists with a group in both parts are refused.

`--backbone` is the name of a model in torchvision. `--weights` is DEFAULT, which downloads weights trained on ImageNet,
or a file with a state dict; without it, the weights are random. The backbone is not trained: its features of each clip
are computed once, from frames at equal distances. The models are small:

- mingru.GRU: two layers, whose outputs are averaged over the frames.
- mean: the mean of the features, so that the order of the frames is lost.

UCF101 is in no package, and no accuracy on it has been measured.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Parser, Run, at_least, fail, installed, reading, spread
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from video import decode

import mingru

MODELS = ("mingru.GRU", "mean")
NAME = re.compile(r"v_(\w+)_g(\d+)_c\d+\.\w+")
TEST_GROUPS = range(1, 8)
QUICK = {"num_classes": 3, "clips": 8, "num_frames": 4, "size": 64, "num_steps": 30, "seeds": [0]}

Clips = list[tuple[Path, int]]


def group(path: Path) -> tuple[str, int]:
    """Return the class and the group of a video."""
    match = NAME.fullmatch(path.name)
    if not match:
        fail(f"a video must be named v_CLASS_gGROUP_cCLIP.avi, got {path}; rename it, or remove it from the folder")
    return match[1], int(match[2])


def split(args: Any) -> tuple[list[str], Clips, Clips]:
    """Return the classes, and the clips of the training and of the test with the index of their class."""
    classes = sorted(path.name for path in args.data.glob("*") if path.is_dir())[: args.num_classes]
    if len(classes) < 2:
        fail(f"--data must be a folder with a folder of videos for each class, got {args.data}; check the path")
    paths = [path for name in classes for path in sorted((args.data / name).glob("*.*"))]
    if args.lists:
        parts = [named(args, f"{part}list{args.split:02}.txt", classes) for part in ("train", "test")]
    else:
        is_test = [group(path)[1] in TEST_GROUPS for path in paths]
        parts = [[path for path, test in zip(paths, is_test, strict=True) if test == part] for part in (False, True)]
    if both := {group(path) for path in parts[0]} & {group(path) for path in parts[1]}:
        name, number = min(both)
        fail(f"group {number} of {name} is in training and test; the clips of a group must be in one of them")
    for part, found in zip(("training", "test"), parts, strict=True):
        if missing := set(classes) - {path.parent.name for path in found}:
            fail(f"the {part} has no video of class {min(missing)}; the test has groups 1 to 7 if --lists is omitted")
    train, test = ([(path, classes.index(path.parent.name)) for path in part] for part in parts)
    return classes, few(train, args.clips), few(test, args.clips)


def named(args: Any, file: str, classes: list[str]) -> list[Path]:
    """Return the videos in a list of the official splits: a line has CLASS/VIDEO, and in training a number."""
    path = args.lists / file
    with reading(path, "a list of videos", "check --lists and --split"):
        lines = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [args.data / line for line in lines if Path(line).parent.name in classes]


def few(clips: Clips, most: int | None) -> Clips:
    """Return at most so many clips of each class, of all groups."""
    by_class: dict[int, Clips] = {}
    for clip in clips:
        by_class.setdefault(clip[1], []).append(clip)
    return [clip for part in by_class.values() for clip in part[:: max(1, len(part) // (most or len(part)))][:most]]


def read(path: Path, num_frames: int, size: int) -> Tensor:
    """Return frames at equal distances, (num_frames, 3, size, size), normalized as for ImageNet."""
    frames = list(decode(path))
    chosen = [frames[i * (len(frames) - 1) // max(1, num_frames - 1)] for i in range(num_frames)]
    pixels = torch.stack([torch.from_numpy(frame.reformat(size, size, "rgb24").to_ndarray()) for frame in chosen])
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    return (pixels.permute(0, 3, 1, 2) / 255 - mean) / deviation


def make_backbone(name: str, weights: str | None) -> nn.Module:
    """Return a model of torchvision without its last linear map."""
    import torchvision
    from torchvision.models import get_model, list_models

    if name not in list_models(torchvision.models):
        fail(f"--backbone must be a model of torchvision, such as resnet18 or mobilenet_v3_small, got {name}")
    torch.manual_seed(0)
    backbone = get_model(name, weights="DEFAULT" if weights == "DEFAULT" else None)
    if weights and weights != "DEFAULT":
        try:
            backbone.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except Exception as error:  # files of other programs raise errors of many types
            fail(f"--weights must be DEFAULT or a file with a state dict of {name}, got {weights} ({error})")
    last = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)][-1]
    backbone.set_submodule(last, nn.Identity())
    return backbone.eval().requires_grad_(False)


def features(run: Run, clips: Clips) -> Tensor:
    """Return the backbone's features of all frames, (clips, frames, features)."""
    args = run.args
    backbone = run.fabric.to_device(make_backbone(args.backbone, args.weights))
    found: list[Tensor] = []
    for index in run.steps(len(clips), found):
        frames = run.fabric.to_device(read(clips[index][0], args.num_frames, args.size))
        found.append(backbone(frames).float().cpu())
    return torch.stack(found)


class Classifier(nn.Module):
    """Map the features of frames (B, S, I) to classes (B, num_classes)."""

    def __init__(self, name: str, input_dims: int, hidden_dims: int, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.LayerNorm(input_dims), nn.Linear(input_dims, hidden_dims))
        self.rnn = mingru.GRU(hidden_dims, hidden_dims, 2) if name == "mingru.GRU" else None
        self.head = nn.Sequential(nn.GELU(), nn.Dropout(0.3), nn.Linear(hidden_dims, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head((x if self.rnn is None else self.rnn(x)[0]).mean(1))


def train(run: Run, name: str, data: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int) -> float:
    """Train a classifier and return the share of the test that is right."""
    args, (x, labels) = run.args, run.fabric.to_device(data)
    torch.manual_seed(seed)
    model = Classifier(name, x.shape[2], args.hidden_dims, int(labels.max()) + 1)

    def loss_of(model: nn.Module, step: int) -> Tensor:
        rows = torch.randint(len(x), (args.batch_size,))
        return F.cross_entropy(model(x[rows]), labels[rows], label_smoothing=0.1)

    trained = run.train(args.num_steps, loss_of, model, schedule_of=CosineAnnealingLR, max_norm=math.inf)
    with torch.no_grad():
        found = trained(run.fabric.to_device(test[0])).argmax(1).cpu()
    return float((found == test[1]).double().mean())


def main(argv: list[str] | None = None) -> None:
    defaults = {"num_steps": 2000, "batch_size": 64, "hidden_dims": 256, "learning_rate": 1e-3, "save_every": 1000}
    parser = Parser(__file__, __doc__, QUICK, models=MODELS, **defaults)
    parser.add("--data", type=Path, required=True, help="folder with a folder of videos for each class")
    parser.add("--lists", type=Path, help="folder with trainlist01.txt, testlist01.txt, ...; else, split by group")
    parser.add("--split", type=at_least(1), default=1, help="number of the lists")
    parser.add("--num-classes", type=at_least(2), help="use only the first classes")
    parser.add("--clips", type=at_least(1), help="use at most so many clips of each class in training, and in the test")
    parser.add("--backbone", default="resnet18", help="name of a model in torchvision")
    parser.add("--weights", help="DEFAULT or a file with a state dict; if omitted, the weights are random")
    parser.add("--num-frames", type=at_least(1), default=16, help="frames of each clip")
    parser.add("--size", type=at_least(32), default=112, help="height and width of the frames")
    args = parser.parse_args(argv)
    for package in ("av", "torchvision"):
        installed(package, f"run `pip install {package}`")
    run = Run(parser, args)
    classes, *parts = split(args)
    data, test = (
        (run.once(f"features, {part}", features, clips), torch.tensor([label for _, label in clips]))
        for part, clips in zip(("training", "test"), parts, strict=True)
    )
    run.print(f"{len(classes)} classes, {len(data[1])} clips for training, {len(test[1])} for the test")
    run.print(f"{'chance':10} {1 / len(classes):7.2%}")
    for name in args.models:
        run.print(f"{name:10} {spread(run.each_seed(name, train, name, data, test), 7, '.2%')}")


if __name__ == "__main__":
    main()
