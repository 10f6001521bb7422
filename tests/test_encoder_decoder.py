"""examples/encoder_decoder.py, written for nn.GRU: its data, its model with either GRU, and short runs both ways."""

import datetime
import random
import re

import pytest
import torch
from programs import load
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from mingru import drop_in

script = load("examples/encoder_decoder.py")

LINE = re.compile(r"(\w+\.?\w+): step (\d+), training loss (\d+\.\d{4}), \d+\.\d{2}% of unseen dates right, .+ s")

either = pytest.mark.parametrize("gru", [nn.GRU, drop_in.GRU], ids=["torch", "mingru"])


def texts_and_dates(size, held_out):
    texts, isos = script.draw(size, held_out, random.Random(0))
    digits = ["".join(script.DIGITS[code] for code in row) for row in isos.tolist()]
    return [bytes(text.tolist()).decode() for text in texts], [datetime.date.fromisoformat(text) for text in digits]


@pytest.mark.parametrize("held_out", [False, True])
def test_texts_say_the_date(held_out):
    seen = set()
    for text, date in zip(*texts_and_dates(400, held_out), strict=True):
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        assert numbers[0] == date.day
        assert numbers[-1] == date.year
        month = re.search("|".join(name[:3] for name in script.MONTHS), text)
        assert numbers[1] == date.month if month is None else script.MONTHS[date.month - 1][:3] == month[0]
        for day in script.DAYS:
            assert day not in text or script.DAYS[date.weekday()] == day
        if ending := re.search(r"\d(st|nd|rd|th)", text):
            assert ending[1] == {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st"}.get(date.day, "th")
        seen.add(re.sub(r"\d+", "0", re.sub(r"[A-Z]\w+", "A", re.sub(r"(?<=\d)(st|nd|rd)", "th", text))))
    # "May" is as long as its short form, and "th" hides the rest: as many forms as there are.
    assert len(seen) == len(script.FORMS)


def test_no_date_of_a_test_is_in_training():
    for held_out, kinds in ((True, {0}), (False, set(range(1, 10)))):
        dates = texts_and_dates(2000, held_out)[1]
        assert {(date.toordinal() - script.FIRST) % 10 for date in dates} == kinds
        assert {date.year for date in dates} == set(range(1900, 2100))


def data(size=6):
    texts, isos = script.draw(size, False, random.Random(0))
    return pad_sequence(texts, batch_first=True), torch.tensor([len(text) for text in texts]), isos


@either
def test_told_its_own_digits_it_says_the_same(gru):
    model = script.Translator(gru, 8, 2).double()
    characters, lengths, isos = data()
    alone = model(characters, lengths)
    assert alone.shape == (6, script.LENGTH, len(script.DIGITS))
    assert_close(model(characters, lengths, alone.argmax(-1)), alone)
    told = model(characters, lengths, isos)
    # Not to the last bit, because a matrix product rounds differently for another number of rows.
    assert_close(told[:, 0], alone[:, 0])
    assert not torch.allclose(told[:, 1:], alone[:, 1:])


def test_short_runs_of_both(capsys, monkeypatch, tmp_path):
    """What dates have in common, such as the dashes and most first digits, is learned first."""
    monkeypatch.setattr(script, "EPOCH", 60)
    small = "--accelerator cpu --steps 100 --batch 32 --num-tests 20 --hidden-dims 32 --lr 0.01 --both".split()
    script.main([*small, "--checkpoint", str(tmp_path / "run.pt"), "--save-every", "60"])
    lines = [line for line in capsys.readouterr().out.splitlines() if ": step " in line]
    found = [LINE.fullmatch(line).groups() for line in lines]
    expected = [(name, step) for name in ("minGRU", "nn.GRU") for step in ("60", "100")]
    assert [(name, step) for name, step, *_ in found] == expected
    for first, last in (found[:2], found[2:]):
        assert 2.5 > float(first[2]) > float(last[2]) < 2.0  # near log(11) at first
    assert script.import_gru(True) is nn.GRU
    assert script.import_gru(False) is drop_in.GRU
