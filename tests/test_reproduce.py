"""benchmarks/reproduce: the tasks, short runs of each program, runs that are continued, and the page."""

import itertools
import json

import pytest
import torch
from cases import refuses

from benchmarks import measure
from benchmarks.reproduce import chomsky, common, copying, page, words

# A program, its options, and the numbers of runs and of rows in its table.
SHORT = {
    "copying": (copying, "--layers 1 --num-steps 2 --num-test 8 --seq-len 32", 2, 2),
    "chomsky": (chomsky, "--num-steps 2 --num-test 8 --models minGRU nn.GRU --tasks parity --seeds 3 4", 6, 2 * 2),
    "words": (words, "--num-steps 2 --models minGRU nn.GRU --tasks S3 --seeds 3", 2, 2),
}


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("name", SHORT)
def test_a_short_run_is_recorded_and_not_repeated(name, tmp_path, monkeypatch, capsys):
    program, options, count, num_rows = SHORT[name]
    monkeypatch.setattr(words, "LENGTHS", (8, 16, 24, 32))
    monkeypatch.setattr(chomsky, "FAR", (40, 44))
    path = tmp_path / f"{name}.json"
    arguments = [*options.split(), "--json", str(path), *(["--seeds", "3"] if name == "copying" else [])]
    program.main(arguments)
    found = json.loads(path.read_text())
    assert len(found["runs"]) == count == len(capsys.readouterr().out.splitlines())
    assert all(run["processor_seconds"] >= 0 and run["seconds"] >= 0 for run in found["runs"].values())
    assert found["where"]["torch"] == torch.__version__ and found["settings"]["device"] == "cpu"
    table = page.TABLES[name](found["runs"], found["settings"])
    assert table.count("\n| ") - table.count("\n| ---") - table.count("\n\n| ") == num_rows

    program.main(arguments)
    assert capsys.readouterr().out == "" and json.loads(path.read_text()) == found
    for processor, device in ((found["where"]["processor"], "other"), ("other", "cpu")):
        monkeypatch.setattr(common, "where", lambda each=processor: {**found["where"], "processor": each})
        refuses(SystemExit, "name a new file by --json", program.main, [*arguments, "--device", device])


# The output of a task for a list of symbols.
NAIVE = {
    "parity": lambda symbols: sum(symbols) % 2,
    "even pairs": lambda symbols: sum(a != b for a, b in itertools.pairwise(symbols)) % 2,
    "cycle navigation": lambda symbols: sum((0, 1, -1)[symbol] for symbol in symbols) % 5,
    "majority": lambda symbols: int(symbols.count(1) > symbols.count(0)),
    "modular arithmetic": lambda symbols: eval("".join("01234+-*"[each] for each in symbols).rstrip("+-*")) % 5,
}


@pytest.mark.parametrize("task", chomsky.TASKS)
def test_the_outputs_of_formal_languages(task):
    generator = torch.Generator().manual_seed(0)
    if task == "bucket sort":
        tokens, targets = chomsky.sample_of(task, (3, 5))(7, generator)
        length = targets.shape[1]
        assert [sorted(row) for row in tokens[:, :length].tolist()] == targets.tolist()
        assert tokens.shape[1] == 2 * length and (tokens[:, length:] == chomsky.MARKER).all()
        return
    for longest in (10, 11):
        tokens, targets = chomsky.sample_of(task, (3, longest))(40, generator)
        for row, outputs in zip(tokens.tolist(), targets.tolist(), strict=True):
            assert outputs == [NAIVE[task](row[:length]) for length in range(3, longest + 1)]
    assert set(targets.flatten().tolist()) == set(range(5 if task in ("cycle navigation", "modular arithmetic") else 2))


@pytest.mark.parametrize(("task", "size"), [("modulo 3", 3), ("S3", 6), ("A5", 60)])
def test_the_word_problems(task, size):
    tokens, targets = words.generate(200, torch.Generator().manual_seed(0), task, 7)
    assert set(tokens.flatten().tolist()) == set(targets.flatten().tolist()) == set(range(size))
    if task in words.MODULI:
        assert [[total % size for total in itertools.accumulate(row)] for row in tokens.tolist()] == targets.tolist()
        return
    group = words.GROUPS[task]
    for row, states in zip(tokens.tolist(), targets.tolist(), strict=True):
        objects = range(len(group[0]))
        for token, state in zip(row, states, strict=True):
            objects = [group[token][place] for place in objects]
            assert group[state] == tuple(objects)


def test_the_page_has_the_results():
    """Run python -m benchmarks.reproduce.page if this fails."""
    assert page.cell([0.5, 0.7, 0.9], 3) == "70.0 ± 20.0" and page.cell([0.5], 3) == "50.0 (n = 1)"
    text = page.PAGE.read_text(encoding="utf-8")
    assert [name for _, name in measure.marked("reproduce").findall(text)] == list(page.TABLES)
    assert measure.filled(text, "reproduce", page.texts(page.RESULTS)) == text
    # A table has the learning rate that the first seed chose.
    found = [(0.1, 0, 0.5, 0.9), (0.2, 0, 0.6, 0.3), (0.2, 1, 0.1, 0.5)]
    runs = {f"parity: m, learning rate {rate}, seed {seed}": {"near": x, "far": y} for rate, seed, x, y in found}
    assert "| m | 40.0 ± 14.1 |" in page.chomsky(runs, {"learning_rates": [0.1, 0.2]})


def test_the_page_of_the_site_has_the_main_results():
    def percent(name, keys, index=None):
        runs = page.by_seed(json.loads((page.RESULTS / f"{name}.json").read_text(encoding="utf-8"))["runs"])[0]
        values = [[run["accuracy"] if index is None else run["accuracy"][index] for run in runs[key]] for key in keys]
        return [f"{100 * sum(each) / len(each):.0f}%" for each in values]

    text = " ".join((page.PAGE.parents[2] / "docs" / "more" / "reproduction.md").read_text(encoding="utf-8").split())
    one, two, three = percent("copying", [f"minGRU, {count} layers" for count in (1, 2, 3)])
    assert f"reach {one}, {two} and {three}" in text
    names = ("mingru-scans rotation", "mingru-scans signed", "minGRU")
    rotation, signed, plain = percent("words", [f"S3: {name}" for name in names], 3)
    assert f"in {rotation} by rotations and {signed} by signed gates" in text
    assert f"the default minGRU in {plain}" in text
