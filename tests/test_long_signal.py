"""examples/long_signal.py: its signal, models, linear filter, comparisons, times, refusals and a short run."""

import itertools
import os

import numpy as np
import pytest
import torch
from common import Run
from programs import load, refusal

script = load("examples/long_signal.py")
apart = script.apart

SMALL = "--num-steps 3 --num-parameters 1000 --batch-size 4 --segment 64 --num-layers 1 --seeds 0 2 --limit 10".split()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(script, "NUM_LAGS", 20)
    monkeypatch.setattr(script, "NUM_WARMUP", 300)
    monkeypatch.setattr(script, "SEGMENT", 700)
    # The functions of a module that is loaded from a path cannot be sent to another process.
    monkeypatch.setattr(script, "apart", lambda function, *arguments: function(*arguments))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "signal.npy"
    np.save(path, 3 + 2 * np.sin(np.arange(4000) / 7))
    return path


@pytest.fixture
def run(tmp_path):
    parser = script.make_parser()
    return Run(parser, parser.parse_args(["--plot", str(tmp_path / "plot.png")]))


def test_the_signal_is_normalized_and_targets_are_ahead(file):
    signal = script.read(file, 2000)
    assert len(signal.values) == 2000
    assert signal.num_train == 1500
    assert signal.values[:1500].mean().item() == pytest.approx(0, abs=1e-5)
    assert signal.values[:1500].std().item() == pytest.approx(1, abs=1e-5)
    assert signal.targets.shape == (1800, 3)
    for column, horizon in enumerate(script.HORIZONS):
        assert torch.equal(signal.targets[:, column], signal.values[horizon : horizon + 1800])


@pytest.mark.parametrize("name", script.TIMED)
def test_models_are_causal_and_of_the_given_size(name):
    model = script.make(name, 3000, 2).eval()
    assert 1500 < sum(x.numel() for x in model.parameters()) <= 3000
    x = torch.randn(2, 50)
    changed = x.clone()
    changed[:, 30:] += 1
    before, after = model(x)[0], model(changed)[0]
    assert before.shape == (2, 50, 3)
    torch.testing.assert_close(before[:, :30], after[:, :30])
    assert not torch.allclose(before[:, 30:], after[:, 30:])


@pytest.mark.parametrize("name", script.MODELS)
def test_segments_with_carried_state_equal_one_call(name):
    model, x = script.make(name, 3000, 2).eval(), torch.randn(2, 50)
    first, state = model(x[:, :20])
    second, _ = model(x[:, 20:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), model(x)[0])


def test_the_linear_filter_forecasts_a_sine(file):
    signal = script.read(file, None)
    rows = torch.arange(signal.num_train, len(signal.targets))
    errors = (script.fit_linear(signal)(rows) - signal.targets[signal.num_train :]).square().mean(0).sqrt()
    assert errors.max() < 0.01


def test_comparison_with_float64(run, capsys):
    model = script.make("minGRU", 500, 2).eval()
    script.compare(run, model, torch.randn(20_000))
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line[:10].strip() for line in lines] == ["one call,", "segments w"]
    assert all(1e-9 < float(value) < 1e-5 for line in lines for value in line.split()[-3:])
    with script.mingru.use_backend("log"):
        script.compare(run, model, torch.randn(20_000))
    assert float(capsys.readouterr().out.splitlines()[-2].split()[-1]) > 1e-5


@pytest.mark.parametrize(("name", "exponent"), [("nn.GRU", 1), ("attention", 2)])
def test_lengths_stop_at_the_limit(file, run, monkeypatch, capsys, name, exponent):
    signal = script.Signal(torch.zeros(300_000), torch.zeros(299_800, 3), 225_000)
    monkeypatch.setattr(script, "measure", lambda model, x, num_threads: ((len(x) / 4096) ** exponent, 2.0))
    run.args.limit = 20.0
    found = script.time_lengths(run, name, signal)
    lengths = [4096, 16384, 65536] if exponent == 1 else [4096, 16384]
    assert found == [[length, (length / 4096) ** exponent, 2.0] for length in lengths]
    expected = "262,144 not run, because about 64" if exponent == 1 else "65,536 not run, because about 256"
    assert expected in capsys.readouterr().out


def test_another_process():
    assert apart(os.getpid) != os.getpid()


def test_measure():
    seconds, memory = script.measure(script.make("minGRU", 500, 1), torch.randn(4096), torch.get_num_threads())
    assert seconds > 0
    assert memory >= 0 or not os.path.exists("/proc/self/status")


@pytest.mark.parametrize("growth", [0, 1])
def test_a_short_run(file, tmp_path, capsys, monkeypatch, growth):
    """Also if no sequence needs more memory than the ones before it in the process."""
    memory = itertools.count(1, growth)
    monkeypatch.setattr(script, "peak_memory", lambda: next(memory))
    plot, checkpoint = tmp_path / "plot.png", tmp_path / "run.pt"
    arguments = [*SMALL, "--models", *script.MODELS, "--file", str(file), "--plot", str(plot)]
    script.main([*arguments, "--checkpoint", str(checkpoint)])
    out = capsys.readouterr().out
    assert [out.count(f"\n{name}, seed ") for name in script.MODELS] == [2, 2]
    assert out.count("mean and half of the range") == 2
    assert "one call of 4,000 time steps" in out
    assert out.splitlines()[-1].startswith("attention       4,000 ")
    assert plot.stat().st_size > 10_000
    for name in ("train", "time_lengths"):
        monkeypatch.setattr(script, name, None)
    script.main([*arguments, "--checkpoint", str(checkpoint), "--resume", "--seeds", "2"])
    expected = next(line for line in out.splitlines() if line.startswith("minGRU, seed 2"))
    assert expected in capsys.readouterr().out


def test_refusals(file, tmp_path):
    def refused(*arguments):
        return refusal(script.main, ["--file", str(file), *arguments])

    assert refused("--segment", "800", "--batch-size", "4") == (
        "--segment must be at most 700 with --batch-size 4, got 800"
    )
    assert refused("--max-length", "10") == "argument --max-length: must be an integer of at least 1200, got '10'"
    np.save(file, np.full(2000, np.nan))
    assert refused() == f"{file} must have finite numbers, got nan"
    expected = f"{file} must have one axis of at least 1,200 numbers, got the shape "
    for values in (np.zeros(100), np.zeros((2000, 2))):
        np.save(file, values)
        assert refused() == f"{expected}{values.shape}"
    file.write_text("no numbers")
    assert refused().startswith(f"{file} must be a .npy file of numbers, got ")
