"""What mkdocs runs while it builds the pages: links from names to their pages, and checks of the rendered reference."""

import logging
import re

log = logging.getLogger("mkdocs.hooks")

# Names in a code block, a link or a heading stay as they are.
NAME = re.compile(r"<(pre|a|h[1-6])\b.*?</\1>|<code>((?:mingru|torch)\.[\w.]+|Min\w+|Stack|drop_in\.\w+)</code>", re.DOTALL)
TORCH = "https://docs.pytorch.org/docs/stable/generated"
SECTIONS = "Args Called Example Examples Inputs Numerics Outputs Parameters Raises References Returns Source State"


def on_page_content(html, page, config, files):
    documented = {file.name: file for file in files.documentation_pages() if file.src_uri.startswith("reference/")}
    for fault in faults(html, reference=page.file.name in documented and page.file.name != "index"):
        log.warning("%s: %s", page.file.src_uri, fault)
    return linked(html, {f"mingru.{name}" for name in documented} - {f"mingru.{page.file.name}"})


def linked(html, documented):
    """Return the page with a link at each name of the library, and of torch.nn, that has a page."""

    def link(match):
        name = match[2]
        if name is None:
            return match[0]
        if name.startswith("torch.nn.") and name.rpartition(".")[2][0].isupper():
            return f'<a href="{TORCH}/{name}.html">{match[0]}</a>'
        identifier = name if name.startswith("mingru.") else f"mingru.{name}"
        return f'<autoref identifier="{identifier}" optional>{match[0]}</autoref>' if identifier in documented else match[0]

    return NAME.sub(link, html)


def faults(html, reference):
    """Return what was not rendered as the docstring means it, which a strict build does not notice."""
    prose = re.sub(r"<pre\b.*?</pre>", "", html, flags=re.DOTALL)
    found = [f"the section {name!r} is a paragraph of text" for name in re.findall(rf"<p>({'|'.join(SECTIONS.split())})\b[\w ]*:", prose)]
    if reference:
        if "<blockquote" in prose or "&gt;&gt;&gt;" in prose:
            found.append("an example is not rendered as code")
        if "&gt;&gt;&gt;" not in html:
            found.append("there is no example")
        found += [
            f"the section {title!r} is not a list"
            for title, rest in re.findall(r'<p class="admonition-title">(Inputs|Outputs)</p>\s*(<\w+)', html)
            if rest != "<ul"
        ]
    return found
