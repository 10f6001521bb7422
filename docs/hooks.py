"""Hooks of mkdocs: link names to their pages, check the rendered reference, and add pages from other files."""

import logging
import re
from pathlib import Path

log = logging.getLogger("mkdocs.hooks")

# Names in a code block, a link or a heading stay as they are.
NAME = re.compile(r"<(pre|a|h[1-6])\b.*?</\1>|<code>((?:mingru|torch\.nn)\.[\w.]+)</code>", re.DOTALL)
# Between two words of a name, as in MinGRU|Module and learn_|initial_|state.
WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[a-z][_.])(?=\w)")
TORCH = "https://docs.pytorch.org/docs/stable/generated"
SECTIONS = "Args|Example|Examples|Inputs|Numerics|Outputs|Parameters|Raises|References|Returns|Source|State dict"

ROOT = Path(__file__).parents[1]
# Pages that are files of the repository.
PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_config(config):
    version = re.search(r'"(.*)"', (ROOT / "src/mingru/_version.py").read_text(encoding="utf-8"))
    config.copyright = f"torch-mingru {version[1]}, MIT license"
    if not config.repo_url:
        config.edit_uri = None  # otherwise the links that edit a page would lead nowhere


def on_files(files, config):
    from mkdocs.structure.files import File  # the tests need this module without mkdocs

    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        generated = File.generated(config, page, content=text)
        generated.edit_uri = f"../{source}"
        files.append(generated)
    for file in files.documentation_pages():
        # The others of these pages only name an object, whose docstring is their text.
        if file.src_uri.startswith("reference/") and file.name not in ("index", "integrations"):
            file.edit_uri = None


def on_page_markdown(markdown, page, config, files):
    # In the repository, where GitHub shows the pages, these files are beside the folder docs, and docstrings in src.
    for name, source in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({name}")
    markdown = with_readme(markdown)
    return markdown.partition("<!-- on GitHub -->")[0]


def with_readme(markdown):
    """Return the page of the site that begins as the README does, up to how to run it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n")[2].partition("**Run it**")[0]
    return re.sub(
        "<!-- README -->.*<!-- README: end -->", lambda _: readme.replace("](docs/", "]("), markdown, flags=re.DOTALL
    )


def on_post_build(config):
    """Write llms.txt: a list of all pages, and then their text."""
    paths = sorted(Path(config.docs_dir).rglob("*.md"), key=lambda path: ("reference" in path.parts, path))
    texts = {
        path.relative_to(config.docs_dir).as_posix(): with_readme(path.read_text(encoding="utf-8")) for path in paths
    }
    guides = {name: text for name, text in texts.items() if not name.startswith("reference/")}
    links = "\n".join(f"- [{title_of(name, text)}]({address_of(name)})" for name, text in texts.items())
    parts = [f"# {config.site_name}", f"> {config.site_description}", "## Pages", links, *guides.values()]
    Path(config.site_dir, "llms.txt").write_text("\n\n".join(parts), encoding="utf-8")


def address_of(name):
    return name.removesuffix(".md").removesuffix("index") or "."


def title_of(name, text):
    """Return the title of a page. A page of the reference has that of the object that it documents."""
    found = re.search(r"^(?:# |::: )(.+)$", text, re.MULTILINE)
    return found[1] if found else name


def on_page_content(html, page, config, files):
    is_reference = page.file.src_uri.startswith("reference/") and page.file.name != "index"
    for fault in faults(html, is_reference):
        log.warning("%s: %s", page.file.src_uri, fault)
    names = [file.name for file in files.documentation_pages() if file.src_uri.startswith("reference/")]
    documented = {f"mingru.{name}" for name in names if name not in ("index", page.file.name)}
    html = guides_linked(html, page, files) if is_reference else html
    return breakable(linked(html, documented))


def guides_linked(html, page, files):
    """Return the page with links to the guides that docstrings name by their titles, such as the guide "Gates"."""
    guides = {title_of(file.name, file.content_string): file for file in files.documentation_pages()}

    def link(match):
        title = " ".join(match[1].split())
        if title not in guides:
            log.warning("%s: there is no %s", page.file.src_uri, match[0])
            return match[0]
        return f'guide <a href="{guides[title].url_relative_to(page.file)}">{title}</a>'

    return re.sub(r'guide\s"([^"]+)"', link, html)


def breakable(html):
    """Let a name in a table break between its words, but not a mean from its deviation, or a number from its unit."""

    def in_cell(cell):
        text = re.sub("<code>[^<]+</code>", lambda code: WORDS.sub("<wbr>", code[0]), cell[0])
        return re.sub(r"(?<=\d) (m?s|[kd]B)\b", r"&nbsp;\1", text.replace(" ± ", "&nbsp;±&nbsp;"))

    return re.sub(r"<t[dh]\b.*?</t[dh]>", in_cell, html, flags=re.DOTALL)


def linked(html, documented):
    """Return the page with links from names in `documented`, and from classes of torch.nn, to their pages."""

    def link(match):
        code, name = match[0], match[2] or ""
        if name in documented:
            return f'<autoref identifier="{name}">{code}</autoref>'
        is_class_of_torch = name.startswith("torch.nn.") and name.rpartition(".")[2][:1].isupper()
        return f'<a href="{TORCH}/{name}.html">{code}</a>' if is_class_of_torch else code

    return NAME.sub(link, html)


def faults(html, is_reference):
    """Return the faults of a page that a strict build does not report, such as sections that are rendered as text."""
    text = re.sub(r"<pre\b.*?</pre>", "", html, flags=re.DOTALL)
    found = [f"{title!r} is text, not a section" for title in re.findall(rf"<p>({SECTIONS})\b[\w ]*:", text)]
    if is_reference:
        if "<blockquote" in text or "&gt;&gt;&gt;" in text:
            found.append("an example is text, not code")
        if "&gt;&gt;&gt;" not in html:
            found.append("there is no example")
        for title, following in re.findall(r"<summary>(Inputs|Outputs)</summary>\s*(<\w+)", html):
            if following != "<ul":
                found.append(f"{title!r} is text, not a list")
    return found
