"""A hook of MkDocs: renders the formulas of the pages, LaTeX between dollars, as MathML.

`pymdownx.arithmatex` marks the formulas. The browser needs no script.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

MARKED = re.compile(
    r'<(?P<tag>div|span) class="arithmatex">\\[\[(](?P<latex>.*?)\\[\])]</(?P=tag)>', re.DOTALL
)
BLOCK = re.compile(r'<math [^>]*display="block".*?</math>\n?', re.DOTALL)
PLAIN_TEXT = re.compile(
    r'(<div class="doc doc-contents first">.*?)<div class="[^"]*highlight">.*?</div>', re.DOTALL
)


def render(mark: re.Match[str]) -> str:
    display = "block" if mark["tag"] == "div" else "inline"
    return convert(html.unescape(mark["latex"]), display=display)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Render the formulas. In the reference, the first one replaces the plain text in the docstring."""
    content = MARKED.sub(render, content)
    formula = BLOCK.match(content)
    if page.file.src_uri.startswith("reference/") and formula:
        rest = content[formula.end() :]
        content, count = PLAIN_TEXT.subn(lambda match: match[1] + formula[0], rest, count=1)
        if not count:
            raise PluginError(f"{page.file.src_uri} has a formula, but the docstring has none to replace")
    return content
