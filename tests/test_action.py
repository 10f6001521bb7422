"""examples/action.py: its splits, frames, models, refusals and a short run, with a small folder of videos."""

import importlib.util

import pytest
import torch
from programs import load, refusal

pytest.importorskip("av")
pytest.importorskip("torchvision")
script = load("examples/action.py")
write = load("tests/test_video.py").write

SMALL = "--backbone resnet18 --size 32 --num-frames 3 --num-steps 60 --learning-rate 0.01 --batch-size 8".split()
SMALL += "--hidden-dims 16 --seeds 0 --accelerator cpu".split()
CLASSES = {"Dark": 40, "Light": 210}


@pytest.fixture
def folder(tmp_path):
    """Videos of two classes, of which one is dark: groups 6 to 9, with two clips each."""
    for name, gray in CLASSES.items():
        (tmp_path / "videos" / name).mkdir(parents=True)
        for group in range(6, 10):
            for clip in (1, 2):
                frames = gray + 4 * group + torch.randn(5, 16, 16)
                write(tmp_path / "videos" / name / f"v_{name}_g{group:02}_c{clip:02}.avi", frames.clamp(0, 255))
    for part, groups in (("train", (6, 8)), ("test", (7, 9))):
        lines = [
            f"{name}/v_{name}_g{group:02}_c01.avi" + f" {number + 1}" * (part == "train")
            for number, name in enumerate(CLASSES)
            for group in groups
        ]
        (tmp_path / f"{part}list02.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def arguments(folder, *more):
    return [*SMALL, "--data", str(folder / "videos"), *more]


def groups(clips):
    return {script.group(path)[1] for path, _ in clips}


def test_groups_are_split(folder):
    classes, train, test = script.split(script.make_parser().parse_args(arguments(folder)))
    assert classes == ["Dark", "Light"]
    assert groups(train) == {8, 9}
    assert groups(test) == {6, 7}
    assert len(train) == len(test) == 8
    assert all(path.parent.name == classes[label] for path, label in train + test)


def test_official_lists(folder):
    given = script.make_parser().parse_args(arguments(folder, "--lists", str(folder), "--split", "2"))
    _, train, test = script.split(given)
    assert (groups(train), groups(test)) == ({6, 8}, {7, 9})
    assert [label for _, label in train] == [0, 0, 1, 1]
    given.clips = 1
    assert [label for _, label in script.split(given)[1]] == [0, 1]


def test_frames_are_at_equal_distances(folder):
    path = folder / "steps.avi"
    write(path, torch.arange(5).view(5, 1, 1).expand(5, 16, 16) * 50.0)
    frames = script.read(path, 3, 32)
    assert frames.shape == (3, 3, 32, 32)
    # Frames 0, 2 and 4, minus the mean of ImageNet's red, divided by its deviation.
    expected = (torch.tensor([0, 100, 200]) / 255 - 0.485) / 0.229
    torch.testing.assert_close(frames[:, 0, 5, 5], expected, rtol=0, atol=0.03)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 512), ("mobilenet_v3_small", 1024)])
def test_backbones_return_features(name, size):
    assert script.make_backbone(name, None)(torch.randn(2, 3, 32, 32)).shape == (2, size)


def test_weights_of_a_file_are_loaded(tmp_path):
    from torchvision.models import get_model

    model = get_model("resnet18").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    backbone = script.make_backbone("resnet18", str(tmp_path / "weights.pth"))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.fc(backbone(x)), model(x))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    message = refusal(script.make_backbone, "resnet18", str(tmp_path / "other.pth"))
    assert "got " in message and "Missing key(s)" in message


def test_a_short_run(folder, capsys):
    checkpoint = ["--checkpoint", str(folder / "run.pt")]
    script.main(arguments(folder, *checkpoint))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 classes, 8 clips for training, 8 for the test"
    assert [line.split()[:2] for line in lines[1:]] == [["chance", "50.00%"], *([x, "100.00%"] for x in script.MODELS)]
    script.main(arguments(folder, *checkpoint, "--resume"))
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--backbone", "resnet"], "--backbone must be a model of torchvision, such as resnet18 or"),
        (["--weights", "missing.pth"], "DEFAULT or a file with a state dict of resnet18, got missing.pth"),
        (["--data", "missing"], "--data must be a folder with a folder of videos for each class, got missing"),
        (["--lists", "missing"], "there is no file missing/trainlist01.txt; check --lists and --split"),
    ],
)
def test_refusals(more, message, folder):
    assert message in refusal(script.main, arguments(folder, *more))


def test_a_group_in_both_parts(folder):
    (folder / "testlist02.txt").write_text("Light/v_Light_g08_c02.avi\nDark/v_Dark_g07_c01.avi\n", encoding="utf-8")
    message = refusal(script.main, arguments(folder, "--lists", str(folder), "--split", "2"))
    assert message.startswith("group 8 of Light is in training and test")


def test_a_file_that_is_no_video(folder):
    (folder / "videos" / "Dark" / "v_Dark_g08_c01.avi").write_bytes(b"no video")
    assert "v_Dark_g08_c01.avi must be a video, got" in refusal(script.main, arguments(folder))
    (folder / "videos" / "Dark" / "notes.txt").touch()
    assert "a video must be named v_CLASS_gGROUP_cCLIP.avi, got" in refusal(script.main, arguments(folder))


def test_torchvision_is_missing(folder, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torchvision" else find_spec(name))
    message = refusal(script.main, arguments(folder))
    assert message == "the package torchvision is not installed; run `pip install torchvision`"
