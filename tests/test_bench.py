"""`python -m mingru.bench`: it runs, and its numbers fit together."""

import re
import subprocess
import sys

import pytest
import torch
from cases import with_threads

from mingru import bench
from mingru.ops.backends import native

NAMES = ["mingru.GRU", "blocks of 2", "blocks of 4", "MinGRU", "nn.GRU", "nn.LSTM"]


def test_it_runs_and_prints_numbers():
    options = "--seconds .05 --threads 1 --shape 2 7 3 8 --shape 1 1 4 16 --block-size 2 4 --autocast --last"
    command = [sys.executable, "-m", "mingru.bench", *options.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    head, *tables = result.stdout.split("\n\n")
    facts = dict(line.split(": ", 1) for line in head.splitlines() if ": " in line)
    assert (facts["threads"], facts["torch"], facts["backend torch"]) == ("1", torch.__version__, "can run")
    assert {"processor", "backend native"} <= set(facts) and re.fullmatch(r"mingru .* '\w+'", facts["device cpu"])
    assert facts["bfloat16 products"].startswith(native.ISA if native.HAS_BFLOAT16 else "none on this processor; ")
    assert (facts["MinGRU"], facts["all models"]) == ("norm='rms', residual=True, gate='mixed'", "two layers")
    for shape, table in zip([(2, 7, 3, 8), (1, 1, 4, 16)], tables, strict=True):
        title, _, *rows = table.splitlines()
        assert title == f"(B, S, I, H) = {shape} in bfloat16: medians (middle half of the rounds)"
        assert [row.split("  ")[0] for row in rows] == NAMES
        numbers = [[float(number) for number in re.findall(r"(?<=[ (-])[\d.]+", row[12:])] for row in rows]
        for figures in numbers:
            # Of both passes: a time and a ratio, each before the ends of its middle half. All have three digits.
            for way in (0, 3):
                ms, low, high, longer, least, most = *figures[way : way + 3], *figures[way + 6 : way + 9]
                assert 0 < low <= ms <= high < 1e5 and least <= most
                assert ms / longer == pytest.approx(numbers[0][way], rel=0.02)


def test_the_middle_half_of_rounds_and_three_digits():
    figures = {0.001234: "0.00123", 1.0: "1.00", 9.5: "9.50", 123.4: "123", 4321.0: "4321"}
    assert [bench._figure(number) for number in figures] == list(figures.values())
    assert bench._spread([1.0, 2.0, 3.0, 4.0, 5.0], [2.0] * 5) == "1.50 (0.750-2.25)"
    # A slow round is slow for both, and does not widen their ratio.
    assert bench._spread([2.0, 2.0, 20.0], [1.0, 1.0, 10.0]) == "2.00 (2.00-2.00)"


def test_calls_take_turns():
    order = []
    taken = bench.medians_ms({name: (lambda name=name: order.append(name)) for name in "abc"}, seconds=0.0, least=4)
    assert order[::2] == order[1::2], "each call runs once before it is timed"
    rounds = ["".join(order[start : start + 6 : 2]) for start in range(0, len(order), 6)]
    assert len(rounds) == 4 and all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 1 and [*taken] == ["a", "b", "c"], "each round has an order of its own"


@pytest.mark.parametrize(("threads", "clock", "factor"), [(2, "perf_counter", 1.0), (1, "process_time", 3.0)])
def test_medians_in_milliseconds(threads, clock, factor, monkeypatch):
    # The clock is read once for the end, then before each round, and before and after each call.
    readings = iter([0.0, 0.0, 10.0, 10.5, 0.0, 20.0, 20.1, 0.0, 30.0, 39.0, 5.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(readings))
    monkeypatch.setattr(bench.time, clock, lambda: factor * next(readings))
    (found,) = with_threads((threads,), lambda: bench.medians_ms({"a": lambda: None}, seconds=4.0, least=1))
    assert found == {"a": pytest.approx(factor * 500.0)}


def test_what_is_timed():
    x, seen = torch.randn(3, requires_grad=True), []

    def function():
        seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return x * 2

    bench.forward(function)()
    bench.forward_backward(function, [x])()
    assert seen == [(True, False), (False, True), (False, True)] and x.grad is None
