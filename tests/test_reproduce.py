"""benchmarks/reproduce: the tasks, short runs of each program, runs that are continued, and the page."""

import itertools
import json
import re

import pytest
import torch

from benchmarks.reproduce import chomsky, common, copying, layers, page, speed, words

SHORT = {
    "copying": (copying, ["--layers", "1", "--num-steps", "2", "--num-test", "8", "--seq-len", "32"], 2, 2),
    "chomsky": (chomsky, ["--num-steps", "2", "--num-test", "8", "--tasks", "parity", "bucket sort"], 24, 12),
    "words": (words, ["--num-steps", "2", "--tasks", "parity", "A5, short first"], 16, 16),
    "layers": (layers, ["--steps", "1", "2", "--num-test", "8"], 5, 5),
    "speed": (speed, ["--lengths", "4", "--seconds", "0.001"], 2, 2),
}


@pytest.fixture(scope="module", autouse=True)
def _as_many_threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SHORT)
def test_a_short_run_is_recorded_and_not_repeated(name, tmp_path, monkeypatch, capsys):
    program, arguments, count, num_rows = SHORT[name]
    monkeypatch.setattr(words, "LENGTHS", (8, 16, 24, 32))
    monkeypatch.setattr(words, "SHORT_FIRST_STEPS", {"A5": 2})
    monkeypatch.setattr(chomsky, "FAR", (40, 44))
    path = tmp_path / f"{name}.json"
    arguments = [*arguments, "--json", str(path), *([] if name == "speed" else ["--seeds", "3"])]
    program.main(arguments)
    found = json.loads(path.read_text())
    assert len(found["runs"]) == count == len(capsys.readouterr().out.splitlines())
    assert all(run["processor_seconds"] >= 0 and run["seconds"] >= 0 for run in found["runs"].values())
    assert found["where"]["torch"] == torch.__version__ and found["settings"]["device"] == "cpu"
    table = page.TABLES[name](found["runs"], found["settings"])
    assert len(re.findall(r"^\| ", table, re.MULTILINE)) == num_rows + 2 * (2 if name == "chomsky" else 1)

    program.main(arguments)
    assert capsys.readouterr().out == "" and json.loads(path.read_text()) == found
    option = "--hidden-dims" if name in ("copying", "chomsky", "speed") else "--batch-size"
    with pytest.raises(SystemExit, match="name a new file by --json"):
        program.main([*arguments, option, "8"])


def test_another_machine_is_refused(tmp_path, monkeypatch):
    results = common.Results(tmp_path / "x.json", {"seq_len": 3})
    assert results.run("a", lambda: {"value": 1})["value"] == 1
    assert common.Results(tmp_path / "x.json", {"seq_len": 3}).run("a", lambda: {"value": 2})["value"] == 1
    monkeypatch.setattr(common, "where", lambda: {"processor": "other", "commit": "", "mingru": ""})
    with pytest.raises(SystemExit, match="of another machine"):
        common.Results(tmp_path / "x.json", {"seq_len": 3})


def naive(task, symbols):
    """Return the output of a task for a list of symbols."""
    if task == "parity":
        return sum(symbols) % 2
    if task == "even pairs":
        return sum(a != b for a, b in itertools.pairwise(symbols)) % 2
    if task == "cycle navigation":
        return sum({0: 0, 1: 1, 2: -1}[symbol] for symbol in symbols) % 5
    if task == "majority":
        return int(symbols.count(1) > symbols.count(0))
    return eval("".join("01234+-*"[symbol] for symbol in symbols).rstrip("+-*")) % 5


@pytest.mark.parametrize("task", chomsky.TASKS)
def test_the_outputs_of_formal_languages(task):
    generator = torch.Generator().manual_seed(0)
    if task == "bucket sort":
        lengths = set()
        for _ in range(20):
            tokens, targets = chomsky.sample_of(task, (3, 5))(7, generator)
            length = targets.shape[1]
            assert [sorted(row) for row in tokens[:, :length].tolist()] == targets.tolist()
            assert tokens.shape[1] == 2 * length and (tokens[:, length:] == chomsky.MARKER).all()
            lengths.add(length)
        assert lengths == {3, 4, 5}
        return
    for longest in (10, 11):
        tokens, targets = chomsky.sample_of(task, (3, longest))(40, generator)
        for row, outputs in zip(tokens.tolist(), targets.tolist(), strict=True):
            assert outputs == [naive(task, row[:length]) for length in range(3, longest + 1)]
    assert set(targets.flatten().tolist()) == set(range(5 if task in ("cycle navigation", "modular arithmetic") else 2))


def test_the_word_problems():
    generator = torch.Generator().manual_seed(0)
    for task, modulus in words.MODULI.items():
        tokens, targets = words.generate(20, generator, task, 9)
        sums = [[total % modulus for total in itertools.accumulate(row)] for row in tokens.tolist()]
        assert sums == targets.tolist() and set(tokens.flatten().tolist()) == set(range(modulus))
    for task, size in (("S3", 6), ("A5", 60)):
        tokens, targets = words.generate(200, generator, task, 7)
        group = words.GROUPS[task]
        for row, states in zip(tokens.tolist(), targets.tolist(), strict=True):
            objects = range(len(group[0]))
            for token, state in zip(row, states, strict=True):
                objects = [group[token][place] for place in objects]
                assert group[state] == tuple(objects)
        assert set(tokens.flatten().tolist()) == set(targets.flatten().tolist()) == set(range(size))


def test_accuracy_and_training():
    """A model that copies its input is right; one that is trained becomes right."""

    def sample(batch_size, generator):
        tokens = torch.randint(4, (batch_size, 5), generator=generator)
        return tokens, tokens[:, -2:]

    torch.manual_seed(0)
    model = common.build(common.LAYERS["minGRU"](8, 8), 4, 8, "cpu")
    assert common.accuracy(model, sample, 100, 0) < 0.6
    found = dict(common.training(model, sample, 60, 32, 0.05, 0))
    assert list(found) == list(range(1, 61)) and found[60] > 0.95
    assert common.accuracy(model, sample, 100, 0) > 0.95


def test_sizes_of_the_models_of_layers():
    for title in layers.DEFAULTS["models"]:
        assert abs(layers.size(layers.model_of(title, 60_000, "cpu")) - 60_000) < 1000


def test_the_package_of_a_folder_must_be_there(tmp_path):
    with pytest.raises(SystemExit, match="pip install --no-deps --target"):
        words.layers("mingru-scans log", str(tmp_path))
    (tmp_path / "mingru").mkdir()
    (tmp_path / "mingru" / "__init__.py").write_text(
        "def MinGRUStack(*args, **options):\n    return (args, options)\n", encoding="utf-8"
    )
    assert words.layers("mingru-scans log", str(tmp_path)) == ((64, 64), {"n_layers": 1, "mixer": "log"})


def test_cells_have_mean_deviation_and_number_of_seeds():
    assert page.cell([0.5, 0.7, 0.9], 3) == "70.0 ± 20.0"
    assert page.cell([0.5], 1) == "50.0"
    assert page.cell([0.5], 3) == "50.0 (n = 1)"


def test_the_page_has_the_results():
    """Run python -m benchmarks.reproduce.page if this fails."""
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.MARKED.findall(text) == list(page.TABLES)
    assert page.filled(text, page.RESULTS) == text


def test_the_page_of_the_site_has_the_main_results():
    def percent(name, keys, index=None):
        runs = page.by_seed(json.loads((page.RESULTS / f"{name}.json").read_text(encoding="utf-8"))["runs"])[0]
        values = [[run["accuracy"] if index is None else run["accuracy"][index] for run in runs[key]] for key in keys]
        return [f"{100 * sum(each) / len(each):.0f}%" for each in values]

    text = " ".join((page.PAGE.parents[2] / "docs" / "reproduction.md").read_text(encoding="utf-8").split())
    one, two, three = percent("copying", [f"minGRU, {count} layers" for count in (1, 2, 3)])
    assert f"reach {one}, {two} and {three}" in text
    rotation, signed, plain = percent(
        "words", [f"S3: {name}" for name in ("mingru-scans rotation", "mingru-scans signed", "minGRU")], 3
    )
    assert f"in {rotation} by rotations and {signed} by signed gates" in text
    assert f"the default minGRU in {plain}" in text
    counts = percent("layers", [f"minGRU, {count} layer{'s' * (count > 1)}" for count in (2, 3, 4, 1)], 2)
    assert f"have {min(counts[:3])} to {max(counts[:3])} after 1,500, and one layer has {counts[3]}" in text


def test_a_table_has_the_rate_that_the_first_seed_chose():
    runs = {
        f"parity: m, learning rate {rate}, seed {seed}": {"near": near, "far": far}
        for rate, seed, near, far in [(0.1, 0, 0.5, 0.9), (0.2, 0, 0.6, 0.3), (0.2, 1, 0.1, 0.5)]
    }
    assert "| m | 40.0 ± 14.1 |" in page.chomsky(runs, {"learning_rates": [0.1, 0.2]})
