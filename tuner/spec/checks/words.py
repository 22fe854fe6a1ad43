"""How values and near misses are put into words, the same in every message."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

WIDTH = 60
LISTED = 16


def show(value: Any) -> str:
    """Return a value as a message quotes it: text in quotes, else as YAML writes it, cut in the middle when long."""
    if value is None:
        text = "null"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {show(part)}" for key, part in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(show(part) for part in value) + "]"
    else:
        text = repr(value)
    return text if len(text) <= WIDTH else f"{text[: WIDTH // 2 - 2]}...{text[1 - WIDTH // 2 :]}"


def any_of(options: Iterable[Any]) -> str:
    """Return `a, b or c`; of a long list the beginning."""
    words = [option if isinstance(option, str) else show(option) for option in options]
    if len(words) > LISTED:
        words = [*words[:LISTED], f"{len(words) - LISTED} more"]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def nearest(word: Any, options: Iterable[str]) -> str | None:
    """Return the option that a misspelt word most likely meant, or None where nothing is close."""
    by_folded = {_fold(option): option for option in options}
    folded = _fold(str(word))
    longer = [option for option in by_folded if len(folded) > 2 and option.startswith(folded)]
    close = longer or difflib.get_close_matches(folded, by_folded, n=1, cutoff=0.65)
    return by_folded[close[0]] if close else None


def _fold(word: str) -> str:
    return word.lower().replace("-", "_").replace(" ", "_")


def as_number(value: Any, whole: bool) -> str | None:
    """Return the number that a quoted or oddly written value stands for, as it should have been written."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number) or (whole and not number.is_integer()):
        return None
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)
