"""examples/counting.py: its task, its models and a short run."""

import pytest
import torch
from lightning_fabric import Fabric
from programs import load

script = load("examples/counting.py")

SMALL = "--accelerator cpu --num-steps 3 --batch-size 4 --hidden-dims 8 --num-test 4".split()


@pytest.mark.parametrize("modulus", [2, 3, 5])
def test_targets_are_sums(modulus):
    tokens, sums = script.generate(50, 12, modulus, torch.Generator().manual_seed(0))
    assert (tokens[:, 0] == modulus).all()
    assert set(tokens[:, 1:].flatten().tolist()) == set(range(modulus))
    for row, expected in zip(tokens[:, 1:].tolist(), sums.tolist(), strict=True):
        assert [sum(row[: t + 1]) % modulus for t in range(12)] == expected


@pytest.mark.parametrize("name", script.MODELS)
def test_each_model_is_causal(name):
    model = script.Model(name, 3, 8, 2).eval()
    tokens, _ = script.generate(2, 20, 3, torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % 3
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 20, 3)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_accuracy_of_a_perfect_and_of_a_blind_model():
    class Perfect(torch.nn.Module):
        def forward(self, tokens):
            return torch.nn.functional.one_hot(tokens[:, 1:].cumsum(1) % 3, 3).float()

    class Blind(torch.nn.Module):
        def forward(self, tokens):
            return torch.eye(3)[0].expand(*tokens[:, 1:].shape, 3)

    fabric = Fabric(accelerator="cpu")
    assert script.evaluate(fabric, Perfect(), 3, 0, 16) == [1.0] * len(script.LENGTHS)
    assert all(accuracy == pytest.approx(1 / 3, abs=0.1) for accuracy in script.evaluate(fabric, Blind(), 3, 0, 64))


def test_a_short_run(tmp_path, capsys):
    plot = tmp_path / "plot.png"
    script.main([*SMALL, "--tasks", "2", "3", "--seeds", "0", "4", "--plot", str(plot)])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + 2 * len(script.MODELS) * 2
    assert plot.stat().st_size > 10_000
