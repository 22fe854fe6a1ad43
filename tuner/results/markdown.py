"""Text of others in a Markdown page: it stays text, whatever it holds."""

from __future__ import annotations

import html
import re

from tuner.results.plain import plain


def inline(text: object) -> str:
    """Text within a paragraph or a table's cell: on one line, without HTML, links, code or bars of its own."""
    escaped = html.escape(plain(" ".join(str(text).split())), quote=False)
    return re.sub(r"([\\`\[\]|])", r"\\\1", escaped)


def code(text: object) -> str:
    """Inline code, on one line; bars are escaped as a table's cell needs it."""
    inner = plain(" ".join(str(text).split())).replace("|", "\\|")
    fence = "`" * (_longest_run(inner) + 1)
    space = " " if inner.startswith("`") or inner.endswith("`") or not inner else ""
    return f"{fence}{space}{inner}{space}{fence}"


def fenced(text: str, language: str = "text") -> str:
    """A block of code whose fence is longer than any in the text."""
    text = plain(text)
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
