"""examples/encoder_decoder.py, written for nn.GRU: its data, its model with either GRU, and short runs both ways."""

import datetime
import random
import re

import pytest
import torch
from programs import ROOT, load
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from mingru import drop_in

SCRIPT = ROOT / "examples" / "encoder_decoder.py"
script = load(SCRIPT)

SMALL = "--accelerator cpu --steps 3 --batch 8 --num-tests 20 --hidden-dims 16".split()
LINE = re.compile(r"(\w+\.?\w+): step (\d+), training loss (\d+\.\d{4}), (\d+\.\d{2})% of unseen dates right, .+ steps")

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
        if month is None:
            assert numbers[1] == date.month
        else:
            assert script.MONTHS[date.month - 1][:3] == month[0]
        for day in script.DAYS:
            assert day not in text or script.DAYS[date.weekday()] == day
        seen.add(re.sub(r"\d+", "0", re.sub(r"[A-Z]\w+", "A", re.sub(r"(?<=\d)(st|nd|rd)", "th", text))))
    # "May" is as long as its short form, and "th" hides the rest: as many forms as there are.
    assert len(seen) == len(script.FORMS)


def test_ordinals():
    found = {}
    for text, date in zip(*texts_and_dates(400, False), strict=True):
        ending = re.search(r"\d(st|nd|rd|th)", text)
        if ending:
            found[date.day] = ending[1]
    assert len(found) > 20
    for day, ending in found.items():
        assert ending == {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st"}.get(day, "th")


def test_no_date_of_a_test_is_in_training():
    kinds = [
        {(date.toordinal() - script.FIRST) % 10 for date in texts_and_dates(2000, out)[1]} for out in (True, False)
    ]
    assert kinds == [{0}, set(range(1, 10))]
    for held_out in (True, False):
        years = {date.year for date in texts_and_dates(2000, held_out)[1]}
        assert years == set(range(1900, 2100))


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


@either
def test_padding_is_not_read(gru):
    model = script.Translator(gru, 8, 2).double()
    characters, lengths, isos = data()
    assert len(set(lengths.tolist())) > 1
    together = model(characters, lengths, isos)
    for at, length in enumerate(lengths):
        one = slice(at, at + 1)
        assert_close(model(characters[one, :length], lengths[one], isos[one]), together[one])


@either
def test_the_encoder_takes_the_last_states_of_both_directions(gru):
    encoder = script.Encoder(gru, 8, 2)
    characters, lengths, _ = data(1)
    out, _ = encoder.rnn(encoder.embedding(characters))
    top = torch.cat([out[:, -1, :8], out[:, 0, 8:]], -1)
    assert_close(encoder(characters, lengths)[-1], torch.tanh(encoder.join(top)))


def test_only_the_import_changes():
    source = SCRIPT.read_text(encoding="utf-8")
    assert re.findall(r"^ +from .+ import GRU$", source, re.MULTILINE) == [
        "        from torch.nn import GRU",
        "        from mingru.drop_in import GRU",
    ]
    assert script.import_gru(True) is nn.GRU
    assert script.import_gru(False) is drop_in.GRU
    # Which of the two it is, the model is never told.
    assert not re.search("use_torch|mingru|drop_in", source.partition("class Encoder")[2].partition("def train")[0])


@pytest.mark.parametrize(("option", "names"), [([], ["minGRU"]), (["--torch"], ["nn.GRU"]), (["--both"], None)])
def test_short_runs(option, names, capsys, monkeypatch):
    monkeypatch.setattr(script, "EPOCH", 2)
    script.main([*SMALL, *option])
    lines = capsys.readouterr().out.splitlines()
    found = [LINE.fullmatch(line) for line in lines if ": step " in line]
    assert all(found)
    names = ["minGRU", "nn.GRU"] if names is None else names
    assert [(match[1], match[2]) for match in found] == [(name, step) for name in names for step in ("2", "3")]
    for match in found:
        assert 2.0 < float(match[3]) < 2.8  # near log(11)


def test_learns(capsys):
    """What dates have in common, such as the dashes and most first digits, comes first."""
    script.main([*SMALL, "--steps", "150", "--batch", "32", "--hidden-dims", "32", "--lr", "0.01"])
    loss = float(LINE.fullmatch(capsys.readouterr().out.splitlines()[-1])[3])
    assert loss < 1.8
