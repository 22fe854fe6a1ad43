"""Text of others, made harmless for a terminal: data, reasons, logs and answers may hold what commands one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

_JOINERS = "\u200c\u200d"
"""Zero-width characters that some scripts and emoji need; they change no order and hide nothing."""
_KINDS = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of what a terminal obeys or does not show: control, format and direction marks, and the like."""
_COLOURS = re.compile(r"\x1b\[[0-9;:]*m")
_NOT_ASCII = re.compile(r"[^\x20-\x7e]")


def plain(text: str, one_line: bool = False) -> str:
    r"""Return the text with everything that a terminal would obey written out, such as `\x1b` or `\u202e`.

    Line ends and tabs stay, unless it is to be `one_line`. Colours, as in Ray's logs, are left out.
    """
    kept = "" if one_line else "\n\t"
    return _write_out(
        _COLOURS.sub("", text).replace("\r\n", "\n"), kept, lambda one: one.encode("unicode_escape").decode()
    )


def plain_json(text: str) -> str:
    """Return a JSON document with the same content, in which everything that a terminal would obey is escaped."""
    return _write_out(text, "\n", _in_json)


def _write_out(text: str, kept: str, written: Callable[[str], str]) -> str:
    def harmless(found: re.Match[str]) -> str:
        one = found[0]
        commands = unicodedata.category(one) in _KINDS and one not in _JOINERS and one not in kept
        return written(one) if commands else one

    return _NOT_ASCII.sub(harmless, text)


def _in_json(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
