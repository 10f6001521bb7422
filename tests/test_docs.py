"""`docs/hooks.py`: the checks and links of the rendered documentation, on pages as mkdocs makes them."""

import importlib.util
import inspect
import json
import types
from pathlib import Path

import pytest

import mingru

DOCS = Path(__file__).parents[1] / "docs"
spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)

EXAMPLE = "<pre><code>&gt;&gt;&gt; rnn = mingru.MinGRU(3, 4)</code></pre>"
INPUTS = "<details><summary>Inputs</summary>\n<ul><li><strong>x</strong>: Sequence.</li></ul></details>"


def test_a_good_page_has_no_faults():
    assert hooks.faults(EXAMPLE + INPUTS, is_reference=True) == []


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        (INPUTS, "there is no example"),
        (EXAMPLE + "<blockquote><p>rnn = mingru.MinGRU(3, 4)</p></blockquote>", "an example is text, not code"),
        (EXAMPLE + "<p>&gt;&gt;&gt; rnn = mingru.MinGRU(3, 4)</p>", "an example is text, not code"),
        (EXAMPLE + "<p>Inputs: x is a sequence.</p>", "'Inputs' is text, not a section"),
        (EXAMPLE + "<p>State dict: weights.</p>", "'State dict' is text, not a section"),
        (EXAMPLE + INPUTS.replace("<ul>", "<p>x: Sequence.</p><ul>"), "'Inputs' is text, not a list"),
    ],
)
def test_text_in_place_of_a_section(html, fault):
    assert hooks.faults(html, is_reference=True) == [fault]


def test_names_become_links():
    documented = {"mingru.MinGRU"}
    assert hooks.linked("<code>mingru.MinGRU</code>", documented).startswith('<autoref identifier="mingru.MinGRU">')
    assert "torch.nn.GRU.html" in hooks.linked("<code>torch.nn.GRU</code>", documented)
    for html in ("<code>mingru.MinLSTM</code>", "<pre><code>mingru.MinGRU</code></pre>", "<code>torch.nn.utils</code>"):
        assert hooks.linked(html, documented) == html


def test_the_text_for_language_models(tmp_path):
    config = types.SimpleNamespace(site_name="NAME", site_description="WHAT", docs_dir=DOCS, site_dir=tmp_path)
    hooks.on_post_build(config)
    lines = (tmp_path / "llms.txt").read_text(encoding="utf-8").splitlines()
    for line in ("# NAME", "> WHAT", "- [torch-mingru](.)", "- [States](states)", "# States"):
        assert line in lines
    assert "- [mingru.MinGRU](reference/MinGRU)" in lines
    assert sum(line.startswith("- [") and "](reference/" in line for line in lines) == len(
        list(DOCS.glob("reference/*"))
    )


def test_each_public_name_has_a_page():
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    for path in (DOCS / "reference").glob("*.md"):
        assert f"reference/{path.name}\n" in navigation
    modules = {
        "": mingru,
        **{f"{name}.": getattr(mingru, name) for name in ("convert", "drop_in", "export", "functional", "models")},
    }
    for prefix, module in modules.items():
        for name in module.__all__:
            if name != "__version__" and not inspect.ismodule(getattr(module, name)):
                assert f"::: mingru.{prefix}{name}\n" in pages


def test_the_table_of_options_is_what_the_command_wrote():
    results = json.loads((DOCS / "choosing.json").read_text(encoding="utf-8"))["results"]
    page = (DOCS / "choosing.md").read_text(encoding="utf-8")
    assert f"| | {' | '.join(results)} |" in page
    for name in results["text (nats)"]:
        cells = []
        for found in results.values():
            metrics = found[name]["metrics"]
            digits = 1 if max(metrics) > 10 else 2
            mean, half = sum(metrics) / len(metrics), (max(metrics) - min(metrics)) / 2
            cells.append(f"{mean:.{digits}f} ± {half:.{digits}f}")
        assert f"\n| {name} | {' | '.join(cells)} |\n" in page
