"""The hooks of mkdocs in `docs`, on pages as mkdocs makes them, and what the pages say."""

import inspect
import json
import os
import re
import types
from pathlib import Path

import pytest
from programs import load

import mingru

DOCS = Path(__file__).parents[1] / "docs"


hooks, equations = load("docs/hooks.py"), load("docs/equations.py")

EXAMPLE = "<pre><code>&gt;&gt;&gt; rnn = mingru.MinGRU(3, 4)</code></pre>"
INPUTS = "<details><summary>Inputs</summary>\n<ul><li><strong>x</strong>: Sequence.</li></ul></details>"


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        (EXAMPLE + INPUTS, None),
        (INPUTS, "there is no example"),
        (EXAMPLE + "<blockquote><p>rnn = mingru.MinGRU(3, 4)</p></blockquote>", "an example is text, not code"),
        (EXAMPLE + "<p>&gt;&gt;&gt; rnn = mingru.MinGRU(3, 4)</p>", "an example is text, not code"),
        (EXAMPLE + "<p>Inputs: x is a sequence.</p>", "'Inputs' is text, not a section"),
        (EXAMPLE + "<p>State dict: weights.</p>", "'State dict' is text, not a section"),
        (EXAMPLE + INPUTS.replace("<ul>", "<p>x: Sequence.</p><ul>"), "'Inputs' is text, not a list"),
    ],
)
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


@pytest.mark.parametrize(
    ("html", "breaks"),
    [
        ("<td><code>nn.GRUCell</code> 1 ± 2</td>", "<td><code>nn.<wbr>GRU<wbr>Cell</code> 1&nbsp;±&nbsp;2</td>"),
        ("<td>98; 3.5 s, 2 kB</td>", "<td>98; 3.5&nbsp;s, 2&nbsp;kB</td>"),
        ("<th><code>h_n</code> GRUCell</th>", "<th><code>h_<wbr>n</code> GRUCell</th>"),
        ("<p><code>GRUCell</code> 1 ± 2</p>", "<p><code>GRUCell</code> 1 ± 2</p>"),
    ],
)
def test_where_the_cells_of_tables_break(html, breaks):
    assert hooks.breakable(html) == breaks


def plain(text):
    return f'<div class="highlight"><pre><span></span><code>{text}\n</code></pre></div>'


def mathml(text):
    """Return the MathML of an equation in short form: without attributes, brackets and products as they are."""
    return re.sub(r' \w+="\w+"|</?mo[^>]*>|</?math>', "", equations.mathml(text))


@pytest.mark.parametrize(
    ("text", "typeset"),
    [
        ("a = -b - 2", "<mi>a</mi>=−<mi>b</mi>−<mn>2</mn>"),
        ("h_{t-1}", "<msub><mi>h</mi><mrow><mi>t</mi>−<mn>1</mn></mrow></msub>"),
        ("f'_t", "<msub><mrow><mi>f</mi>′</mrow><mi>t</mi></msub>"),
        ("m)^dt_t", "<mi>m</mi><msup>)<msub><mi>dt</mi><mi>t</mi></msub></msup>"),
        ("sigma(log_a_t)", "<mi>σ</mi>(<msub><mi>log_a</mi><mi>t</mi></msub>)"),
        ("a else if b", "<mi>a</mi><mspace/><mtext>&nbsp;else&nbsp;if&nbsp;</mtext><mspace/><mi>b</mi>"),
        ("z if v >= 0", "<mi>z</mi><mspace/><mtext>&nbsp;if&nbsp;</mtext><mspace/><mi>v</mi>≥<mn>0</mn>"),
    ],
)
def test_equations_are_typeset(text, typeset):
    assert mathml(text).replace('<mspace width="0.2em"/>', "<mspace/>") == typeset


def test_signs_and_products():
    prefix = '<mo stretchy="false" form="prefix">−</mo>'
    assert [prefix in equations.mathml(text) for text in ("-a", "x = -a", "f(-a)", "b - a")] == [True] * 3 + [False]
    spaces = [equations.mathml(text).count("<mspace") for text in ("a b", "(a) b", "a (b)", "a + b", "f(a)")]
    assert spaces == [1, 1, 1, 0, 0]


def test_which_blocks_are_equations():
    typeset = equations.on_page_content(plain("a_t = 1    b = c\n\nd = 2"))
    assert "<pre" not in typeset
    assert [typeset.count(f"<{tag}") for tag in ("table", "tr", "td", "math")] == [2, 2, 3, 3]
    code = '<pre><code><span class="n">a</span> = 1</code></pre>'
    for block in (plain("pip install ."), plain("a = 1\nprint(a)"), code):
        assert equations.on_page_content(block) == block


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
    assert config.edit_uri == kept
    assert mingru.__version__ in config.copyright


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
        assert f"reference/{path.name}\n" in navigation
    modules = [mingru, *(getattr(mingru, name) for name in ("convert", "drop_in", "export", "functional", "models"))]
    for module in modules:
        for name in module.__all__:
            if name != "__version__" and not inspect.ismodule(getattr(module, name)):
                assert f"::: {module.__name__}.{name}\n" in pages


def test_the_tables_of_learning_are_what_the_command_wrote(monkeypatch):
    monkeypatch.syspath_prepend(DOCS.parent / "benchmarks")
    learning = load("benchmarks/learning.py")
    found = json.loads((DOCS / "learning.json").read_text(encoding="utf-8"))["results"]
    page = "".join(path.read_text(encoding="utf-8") for path in learning.PAGES)
    assert learning.measure.filled(page, "learning", learning.tables(found)) == page, "run it with --page"
    assert page.count("<!-- learning: end -->") == len(learning.tables(found))
    # The model to begin with is the one of the rule.
    of_start = [row.split(" | ")[2] for row in learning.table(found, learning.TABLES["start"]).splitlines()[2:]]
    assert len(of_start) == len(learning.TASKS) + 1 and "**" not in "".join(of_start)


def test_the_tables_of_speed_are_what_the_command_wrote(monkeypatch):
    monkeypatch.syspath_prepend(DOCS.parent / "benchmarks")
    speed = load("benchmarks/speed.py")
    record = json.loads((DOCS / "speed.json").read_text(encoding="utf-8"))
    page, text = (DOCS / "speed.md").read_text(encoding="utf-8"), speed.tables(record)
    assert speed.measure.filled(page, "speed", text) == page, "run python benchmarks/speed.py --page"
    times = [figures.items() for figures in record["results"]["times"]["2"].values()]
    faster = [by_name[1] < dict(each)["mingru"][1] for each in times for name, by_name in each if name != "mingru"]
    assert text["tables"].count("**") == 2 * sum(faster) > 0
