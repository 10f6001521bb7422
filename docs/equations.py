"""Hook of mkdocs: typeset the equations, which are plain text in the sources, as MathML.

The text of an equation is readable in a terminal, where docstrings are read too. MathML needs no script and no network.

- A block of code that is indented, and has no colors, consists of equations if each of its lines has " = ". Two or more
  spaces begin a new column.
- In other text, single letters with an index are typeset, such as h_{t-1}.
"""

import html
import re

BLOCK = re.compile(r'<div class="highlight"><pre><span></span><code>([^<]*)</code></pre></div>')
# What stays as it is, or a letter with its index.
INLINE = re.compile(
    r"<(?:(pre|code|a|strong|h[1-6]|math|svg)\b.*?</\1|[^>]+)>"
    r"|(?<![\w.])(?P<letter>[^\W\d_]|dt|sigma|theta)(?P<prime>'?)_(?:\{(?P<indices>[^{}]+)\}|(?P<index>[^\W_])(?!\w))",
    re.DOTALL,
)
TOKEN = re.compile(r"\s+|`[^`]+`|\.\.\.|[<>]=|\d[\d.]*|[^\W\d_][^\W_]*'?|.")
SYMBOLS = {"sigma": "σ", "theta": "θ", "pi": "π", "-": "−", "*": "∗", "<=": "≤", ">=": "≥", "...": "…"}


def on_page_content(page_html, **_):
    return INLINE.sub(inline, BLOCK.sub(block, page_html))


def inline(match):
    if not match["letter"]:
        return match[0]
    index = (match["indices"] or match["index"]).replace("-", "−")
    return f"<i>{symbol(match['letter'] + match['prime'])}</i><sub>{html.escape(index)}</sub>"


def block(match):
    lines = html.unescape(match[1]).strip("\n").split("\n")
    if any(line and " = " not in line for line in lines):
        return match[0]
    # An empty line begins a new table.
    rows = [line and "".join(f"<td>{mathml(cell)}</td>" for cell in re.split(r" {2,}(?!=)", line)) for line in lines]
    tables = "".join(f"<tr>{cells}</tr>" if cells else "</table><table class='equations'>" for cells in rows)
    return f"<div class='equations'><table class='equations'>{tables}</table></div>"


def mathml(text):
    return f"<math>{row(TOKEN.findall(text))}</math>"


def row(tokens, end=None):
    """Take the tokens before `end` from the list, and return their MathML."""
    parts, before = [], ""
    while tokens and tokens[0] != end:
        if tokens[0].isspace():
            del tokens[0]
            if is_factor(before, ")]|") and is_factor("".join(tokens[:1]), "(["):
                parts.append('<mspace width="0.2em"/>')
        else:
            is_first, before = before in ("", "=", "(", ","), tokens[0]
            parts.append(term(tokens, is_first))
    del tokens[:1]
    # Words that follow one another are one text.
    return re.sub("&nbsp;</mtext><mspace[^>]*/><mtext>&nbsp;", "&nbsp;", "".join(parts))


def is_factor(token, brackets):
    """Return whether a space beside this token is a product."""
    return token[:1].isalnum() or (token != "" and token in brackets)


def term(tokens, is_first=False):
    """Take a name, a number or an operator from the list, with its index and its exponent, and return the MathML."""
    token, indices = tokens.pop(0), []
    while tokens and tokens[0] == "_":
        del tokens[0]
        indices.append(group(tokens))
    if len(indices) == 2:
        # The name log_a, with an index.
        token = f"{token}_{re.sub('<.*?>', '', indices.pop(0))}"
    base = atom(token, is_name=bool(indices) or tokens[:1] in (["("], ["^"]), is_first=is_first)
    if indices:
        base = f"<msub>{base}{indices[0]}</msub>"
    if tokens and tokens[0] == "^":
        del tokens[0]
        base = f"<msup>{base}{group(tokens, with_index=True)}</msup>"
    return base


def group(tokens, with_index=False):
    """Take what is in braces from the list, or one name or number, and return the MathML."""
    if tokens[0] == "{":
        del tokens[0]
        return f"<mrow>{row(tokens, '}')}</mrow>"
    return term(tokens) if with_index else atom(tokens.pop(0), is_name=True)


def atom(token, is_name=False, is_first=False):
    text = symbol(token.removesuffix("'"))
    if token[0].isdigit():
        return f"<mn>{text}</mn>"
    if token[0] == "`" or (len(text) > 1 and token[0].isalpha() and not is_name):
        return f"<mtext>&nbsp;{text.strip('`')}&nbsp;</mtext>"
    if token[0].isalpha():
        return f"<mi>{text}</mi>" if "'" not in token else f"<mrow><mi>{text}</mi><mo>′</mo></mrow>"
    options = ' form="prefix"' if is_first and text == "−" else ' lspace="0" rspace="0"' if text in "|:" else ""
    return f'<mo stretchy="false"{options}>{text}</mo>'


def symbol(token):
    """Return a token as it is shown."""
    return html.escape(SYMBOLS.get(token, token), quote=False).replace("'", "′")
