"""The pages: hooks of mkdocs, tables of results, and the code and links of guides and README."""

import functools
import hashlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from programs import load

import mingru

DOCS = Path(__file__).parents[1] / "docs"


hooks, equations = load("docs/hooks.py"), load("docs/equations.py")

EXAMPLE = "<pre><code>&gt;&gt;&gt; rnn = mingru.MinGRU(3, 4)</code></pre>"
INPUTS = "<details><summary>Inputs</summary>\n<ul><li><strong>x</strong>: Sequence.</li></ul></details>"


FAULTS = [
    (EXAMPLE + INPUTS, None),
    (INPUTS, "there is no example"),
    (EXAMPLE + "<blockquote><p>rnn = mingru.MinGRU(3, 4)</p></blockquote>", "an example is text, not code"),
    (EXAMPLE + "<p>&gt;&gt;&gt; rnn = mingru.MinGRU(3, 4)</p>", "an example is text, not code"),
    (EXAMPLE + "<p>Inputs: x is a sequence.</p>", "'Inputs' is text, not a section"),
    (EXAMPLE + "<p>State dict: weights.</p>", "'State dict' is text, not a section"),
    (EXAMPLE + INPUTS.replace("<ul>", "<p>x: Sequence.</p><ul>"), "'Inputs' is text, not a list"),
]


@pytest.mark.parametrize(("html", "fault"), FAULTS)
def test_faults_of_pages(html, fault):
    assert hooks.faults(html, is_reference=True) == ([fault] if fault else [])


def test_what_github_shows_in_place_of_the_site():
    text = "[Files](../CONTRIBUTING.md#files)\n<!-- on GitHub -->\nThis page"
    assert hooks.on_page_markdown(text, None, None, None) == "[Files](contributing.md#files)\n"
    pages = [(DOCS / "reference" / name).read_text(encoding="utf-8") for name in os.listdir(DOCS / "reference")]
    links = re.findall(r"docstring in .*\]\((.*)\)", "".join(pages))
    assert links and all((DOCS / "reference" / link).is_file() for link in links)


def test_names_become_links():
    documented = {"mingru.MinGRU"}
    assert hooks.linked("<code>mingru.MinGRU</code>", documented).startswith('<autoref identifier="mingru.MinGRU">')
    assert "torch.nn.GRU.html" in hooks.linked("<code>torch.nn.GRU</code>", documented)
    for html in ("<code>mingru.MinLSTM</code>", "<pre><code>mingru.MinGRU</code></pre>", "<code>torch.nn.utils</code>"):
        assert hooks.linked(html, documented) == html


def plain(text):
    return f'<div class="highlight"><pre><span></span><code>{text}\n</code></pre></div>'


def mathml(text):
    """Return the MathML of an equation in short form: without attributes, brackets and products as they are."""
    return re.sub(r' \w+="\w+"|</?mo[^>]*>|</?math>', "", equations.mathml(text))


TYPESET = [
    ("a = -b - 2", "<mi>a</mi>=−<mi>b</mi>−<mn>2</mn>"),
    ("h_{t-1}", "<msub><mi>h</mi><mrow><mi>t</mi>−<mn>1</mn></mrow></msub>"),
    ("f'_t", "<msub><mrow><mi>f</mi>′</mrow><mi>t</mi></msub>"),
    ("m)^dt_t", "<mi>m</mi><msup>)<msub><mi>dt</mi><mi>t</mi></msub></msup>"),
    ("sigma(log_a_t)", "<mi>σ</mi>(<msub><mi>log_a</mi><mi>t</mi></msub>)"),
    ("a else if b", "<mi>a</mi><mspace/><mtext>&nbsp;else&nbsp;if&nbsp;</mtext><mspace/><mi>b</mi>"),
    ("z if v >= 0", "<mi>z</mi><mspace/><mtext>&nbsp;if&nbsp;</mtext><mspace/><mi>v</mi>≥<mn>0</mn>"),
]


@pytest.mark.parametrize(("text", "typeset"), TYPESET)
def test_equations_are_typeset(text, typeset):
    assert mathml(text).replace('<mspace width="0.2em"/>', "<mspace/>") == typeset


def test_which_blocks_are_equations():
    typeset = equations.on_page_content(plain("a_t = 1    b = c\n\nd = 2"))
    assert "<pre" not in typeset
    assert [typeset.count(f"<{tag}") for tag in ("table", "tr", "td", "math")] == [2, 2, 3, 3]
    code = plain("pip install ."), plain("a = 1\nprint(a)"), '<pre><code><span class="n">a</span> = 1</code></pre>'
    assert all(equations.on_page_content(same) == same for same in code)


def test_indices_in_text():
    text = "<p>The state x_t, h_{t-1} and dt_t.</p>"
    typeset = "<p>The state <i>x</i><sub>t</sub>, <i>h</i><sub>t−1</sub> and <i>dt</i><sub>t</sub>.</p>"
    assert equations.on_page_content(text) == typeset
    tags = ("<code>h_n</code>", "<p>state_dict</p>", "<strong>h_n</strong>", '<a href="h_n">h_n</a>', "<p>x_dim</p>")
    assert all(equations.on_page_content(same) == same for same in tags)


@pytest.mark.parametrize(("address", "kept"), [(None, None), ("https://example.org/mingru", "edit/main/docs/")])
def test_pages_are_edited_only_where_the_repository_is(address, kept):
    config = types.SimpleNamespace(repo_url=address, edit_uri="edit/main/docs/")
    hooks.on_config(config)
    assert config.edit_uri == kept and mingru.__version__ in config.copyright


def test_the_text_for_language_models(tmp_path):
    config = types.SimpleNamespace(site_name="NAME", site_description="WHAT", docs_dir=DOCS, site_dir=tmp_path)
    hooks.on_post_build(config)
    lines = (tmp_path / "llms.txt").read_text(encoding="utf-8").splitlines()
    for line in ("# NAME", "> WHAT", "- [torch-mingru](.)", "- [States](states)", "# States"):
        assert line in lines
    assert "- [mingru.MinGRU](reference/MinGRU)" in lines
    of_reference = [line for line in lines if line.startswith("- [") and "](reference/" in line]
    assert len(of_reference) == len([*DOCS.glob("reference/*")])


def test_each_public_name_has_a_page():
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    for path in (DOCS / "reference").glob("*.md"):
        assert f"reference/{path.name}\n" in navigation and (f"({path.name})" in pages or "functional" not in path.name)
    modules = [mingru, *(getattr(mingru, name) for name in ("convert", "drop_in", "export", "functional", "models"))]
    for module in modules:
        for name in module.__all__:
            if name != "__version__" and not inspect.ismodule(getattr(module, name)):
                assert f"::: {module.__name__}.{name}\n" in pages


def test_the_tables_of_learning_are_what_the_command_wrote():
    learning = load("benchmarks/learning.py")
    found = json.loads((DOCS / "learning.json").read_text(encoding="utf-8"))["results"]
    page = "".join(path.read_text(encoding="utf-8") for path in learning.PAGES)
    assert learning.measure.filled(page, "learning", learning.tables(found)) == page, "run it with --page"
    assert page.count("<!-- learning: end -->") == len(learning.tables(found))
    # The claims on the pages are those of the tables.
    for dims, tasks in (("64", "20 tasks with 64 features"), ("256", "12 tasks")):
        gains = [*learning.gains_of(next(iter(found["equal"][dims].values())), "mingru.GRU").values()]
        ahead, equal, behind = (gains.count(sign) for sign in (1, 0, -1))
        assert f"ahead in {ahead} of {tasks}, equal in {equal} and behind in {behind}" in " ".join(page.split())


# The answer after some symbols.
ANSWERS = {
    "automaton": lambda task, row: functools.reduce(lambda state, symbol: task.maps[symbol, state].item(), row, 0),
    "overwriting": lambda _, row: next((each % 6 for each in reversed(row) if each // 6 == row[-1] - 36), -100),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_answers_of_tasks(name):
    task = load("benchmarks/learning_tasks.py").TASKS[name]()
    for row, answers in zip(*(each.tolist() for each in task.draw(0, 9, torch.Generator())), strict=True):
        assert [ANSWERS[name](task, row[: at + 1]) for at in range(len(row))] == answers


def test_the_tables_of_speed_are_what_the_command_wrote():
    speed = load("benchmarks/speed.py")
    rounded, *pages = (path.read_text(encoding="utf-8") for path in (speed.ROUNDED, speed.PAGE, speed.MORE))
    text = speed.tables(SPEED, json.loads(rounded))
    for page in pages:
        assert speed.measure.filled(page, "speed", text) == page, "run python benchmarks/speed.py --page, or --bfloat16"
    times = [figures.items() for each in SPEED for figures in each["results"]["times"]["2"].values()]
    faster = [by_name[1] < dict(each)["mingru"][1] for each in times for name, by_name in each if name != "mingru"]
    assert text["tables"].count("**") == 2 * sum(faster) > 0


# Guides


GUIDES = sorted(path.relative_to(DOCS).as_posix() for path in (*DOCS.glob("*.md"), *DOCS.glob("more/*.md")))


@pytest.fixture(autouse=True)
def _trusts_no_more_classes_afterwards():
    """A guide tells torch.load which classes to trust, for the whole process."""
    before = torch.serialization.get_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


WITH_CODE = [pytest.param(guide, marks=[pytest.mark.slow] * ("deploy" in guide)) for guide in GUIDES]


@pytest.mark.parametrize("guide", WITH_CODE)
# What torch's own tools say of torch.
@pytest.mark.filterwarnings("ignore:`torch.jit.(script_method|optimize_for_inference)` is deprecated")
def test_the_code_runs(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / guide).read_text(encoding="utf-8")
    for section, package in (("ExecuTorch", "executorch"), ("Lightning", "lightning")):
        if importlib.util.find_spec(package) is None:
            text = re.sub(rf"## {section}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == text.count("```python")
    names = {}
    for block in blocks:
        exec(compile(block, guide, "exec"), names)


@pytest.mark.parametrize("guide", [*GUIDES, "../README.md"])
def test_the_links_are_there(guide):
    for link in re.findall(r"\]\(([^)#:]+)\)", (DOCS / guide).read_text(encoding="utf-8")):
        assert ((DOCS / guide).parent / link).is_file(), link


def test_the_notebook_runs():
    cells = json.loads((DOCS / "first_hour.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), "first_hour.ipynb", "exec"), names)
    # The model remembers the first of ten times as many steps as in training. Guessing has an error of 1.
    x, target = names["sample"](256, 300)
    with torch.no_grad():
        assert torch.nn.functional.mse_loss(names["model"](x), target) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("index", range(4))
def test_two_processes(index, tmp_path):
    """The program of distributed.md, divided in each way; weights that are divided are saved too."""
    program, *ways = re.findall(r"```py\n(.*?)```", (DOCS / "distributed.md").read_text(encoding="utf-8"), re.DOTALL)
    program = program.replace("# Save\n", ways.pop(2) if index in (1, 3) else "")
    (tmp_path / "train.py").write_text(program.replace("# Divide\n", ways[index]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"]
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    # A thread of gloo that still runs may abort a process at its end (torch 2.13), when all is done.
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr
    assert "trained 2 processes" in done.stdout


# The README

# The usage code that this project was asked to run as it stands.
ASKED_FOR = "a2a4fdd80b43b33097f9e2f9dda071f31748a08e0bcd24d21d2fd3ff19512333"
README = (DOCS.parent / "README.md").read_text(encoding="utf-8")


def test_the_code_of_the_readme_runs():
    first, part = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    whole = (DOCS.parent / "tests" / "data" / "usage.txt").read_text()
    assert hashlib.sha256(whole.encode()).hexdigest() == ASKED_FOR
    for code, name in ((first, "out"), (part, "out_par"), (whole, "out_par")):
        names = {}
        exec(compile(code, "README.md", "exec"), names)
        assert names[name].shape == (10, 128, 64)
    assert set(part.splitlines()) <= set(whole.splitlines())


def test_the_pages_are_short_and_say_nothing_twice():
    pages = [README, *(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))]
    words = sum(len(re.sub(r"^\|.*", "", page, flags=re.MULTILINE).split()) for page in pages)
    assert len(README.split()) <= 600 and words <= 13_100
    # Code and tables may be alike, and what programs write.
    text = re.sub("```.*?```|<!-- gpu.*?end -->|\n( {4}|\\|).*?(?=\n)", "\n\n", "\n".join(pages), flags=re.DOTALL)
    counts = Counter(" ".join(each.split()) for each in re.split(r"[.:]\s|\n\n|\n- ", text))
    assert [each for each, count in counts.items() if count > 1 and len(each) > 40] == []


def test_kernels_were_built_where_this_project_checks_itself():
    assert mingru.backends()["native"] is True or not os.environ.get("CI")


SPEED = json.loads((DOCS / "speed.json").read_text(encoding="utf-8"))


def test_the_headline_is_true_for_all_shapes():
    text = " ".join(hooks.with_readme((DOCS / "index.md").read_text(encoding="utf-8")).split())
    for record in SPEED:
        times = [each for by_shape in record["results"]["equal"].values() for each in by_shape.values()]
        found = ([each[name][1] / each["mingru.GRU"][1] for each in times] for name in ("nn.GRU", "nn.LSTM"))
        gru, lstm = (f"{min(ratios):.2g} to {max(ratios):.2g}" for ratios in found)
        assert re.search(f"{gru}( times as long)?, and (of `nn.LSTM` )?{lstm}", text), record["where"]["processor"]


def test_citation_and_changelog_have_the_version():
    assert f"\nversion: {mingru.__version__}\n" in (DOCS.parent / "CITATION.cff").read_text()
    assert re.search(r"^## ([^\s]+)", (DOCS.parent / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == mingru.__version__
