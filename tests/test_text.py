"""examples/text.py: the data, the n-gram, models, training, resuming, sampling, files and errors."""

import itertools
import json
import math
import re

import pytest
import torch
from common import Run
from programs import load, refusal

text = load("examples/text.py")

SMALL = "--accelerator cpu --dims 48 --num-layers 2 --dropout 0.1 --batch 8 --length 32 --lr 1e-2 --warmup 10".split()
# Many symbols, which repeat in other orders.
WORDS = "".join(f"{chr(97 + i * i % 26)}{'größer' if i % 7 else 'wëm €'} {i % 13}\n" for i in range(900))


@pytest.fixture
def excerpt(tmp_path):
    path = tmp_path / "excerpt.txt"
    path.write_text(WORDS, encoding="utf-8")
    return ["--text", str(path)]


def parse(*arguments):
    return text.parse_args(list(arguments))[1]


def losses(printed):
    return [line for line in printed.splitlines() if line.startswith("step ")]


def build(cell, vocab_size, *more):
    return text.build(vars(parse("--dims", "24", "--num-layers", "2", "--cell", cell, *more)), vocab_size)


@pytest.mark.parametrize(
    "symbols",
    [text.Alphabet("".join(sorted(set(WORDS)))), text.Alphabet(text.ALL_BYTES), "subwords"],
    ids=["characters", "bytes", "subwords"],
)
def test_encode_and_decode_undo_each_other(symbols):
    symbols = text.Subwords.of_text(WORDS, 300) if symbols == "subwords" else symbols
    corpus = text.Corpus((WORDS, "€"), symbols)
    assert symbols.decode(corpus.train) == WORDS and 0 <= corpus.train.min() < corpus.train.max() < len(symbols)
    assert corpus.per_character == (len(corpus.train) / len(WORDS), len(corpus.heldout))
    assert symbols.unknown("größer 日") == ("日" if symbols.unit == "character" else "")
    if symbols.unit == "byte":
        assert symbols.encode("a€\udcff").tolist() == [97, *"€".encode(), 255]
    assert symbols.unit != "sub-word" or len(symbols.encode("größer")) < 3


@pytest.mark.parametrize("cell", ["mingru", "minlstm", "gru", "nn.GRU", "nn.LSTM"])
def test_heldout_loss_is_that_of_one_pass(cell):
    codes, model = torch.randint(7, (50,)), build(cell, 7, "--dropout", "0.5")
    found = text.heldout_loss(model, codes, chunk=8)
    logits = model.eval()(codes[None, :-1])[0][0]
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits, codes[1:]).item(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("more", ["", "--cell nn.LSTM", "--cell minlstm --conv 0 --mlp 1.5 --bytes"])
def test_a_resumed_run_equals_an_uninterrupted_run(excerpt, tmp_path, capsys, monkeypatch, more):
    def run(name, *extra):
        files = ["--checkpoint", str(tmp_path / f"{name}.pt"), "--curve", str(tmp_path / f"{name}.json")]
        every = "--steps 24 --eval-every 6 --save-every 10".split()
        text.main([*SMALL, *excerpt, *every, *more.split(), *files, *extra])
        return capsys.readouterr().out

    kept, sample = Run.steps, [] if "nn.LSTM" in more else ["--sample", "20"]
    whole = run("whole", *sample)
    with monkeypatch.context() as patch:
        # The last checkpoint is that of 10 steps.
        patch.setattr(Run, "steps", lambda *rest: itertools.islice(kept(*rest), 12))
        run("resumed")
    resumed = run("resumed", "--resume", *sample)
    # The report of the sixth step was before it.
    assert losses(resumed) == losses(whole)[2:] and resumed.split("\n")[-3:] == whole.split("\n")[-3:]
    found, expected = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("resumed", "whole"))
    for point in found["points"] + expected["points"]:
        assert point.pop("seconds") > 0
    assert found == expected
    # The training learns, and its loss is that of the streams' text, so that the states are carried.
    assert [point["step"] for point in found["points"]] == [6, 12, 18, 24]
    assert found["points"][-1]["held_out"] < 0.9 * found["points"][0]["held_out"]
    per = 1 if "bytes" not in more else len(WORDS.encode()) / len(WORDS)
    expected = [loss for point in found["points"] for loss in (point["training"], point["held_out"])]
    for line, loss in zip(losses(whole), expected, strict=True):
        nats, *_, bits = (float(word) for word in line.split() if re.fullmatch(r"\d+\.\d+", word))
        assert (nats * per, bits) == pytest.approx((loss, loss / math.log(2)), rel=0.01)


@pytest.mark.parametrize("more", ["", "--bytes", "--subwords 300"])
def test_a_saved_model_is_the_trained_one_and_continues_the_same_text(more, excerpt, tmp_path, capsys):
    folder = tmp_path / "models" / "a"
    sampling = "--sample 12 --prompt gr --temperature 0.5 --top-k 5 --top-p 0.9 --sample-seed 2".split()
    text.main([*SMALL, *excerpt, "--steps", "2", *more.split(), "--save", str(folder), *sampling])
    out = capsys.readouterr().out
    text.main([*SMALL[:2], "--load", str(folder), *sampling])
    loaded = capsys.readouterr().out
    assert loaded.startswith("gr") and out.endswith(loaded)
    model, symbols = text.load_model(folder)
    options = {"temperature": 0.5, "top_k": 5, "top_p": 0.9, "seed": 2}
    assert loaded == symbols.decode(model.generate(symbols.encode("gr")[None], 12, **options)[0]) + "\n"
    refused = ["--load", str(folder), "--sample", "1"]
    if not more:
        (folder / "symbols.json").write_text('"abc"')
        assert f"got {folder}: 3 symbols for a model of" in refusal(text.main, refused)
    (folder / "config.json").write_text("{}")
    assert refusal(text.main, refused).startswith("--load must be a folder that --save wrote")
