"""Rows of the data that cannot be used: counted by reason, the first few named, and put into words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Drops = dict[str, dict[str, Any]]
"""Reason -> its `count`, `rows` (numbers of the first few), and `says`, a sentence on the first, if there is one."""

NAMED_ROWS = 5
SENTENCE_CHARACTERS = 300


def drop(drops: Drops, reason: str, number: int) -> None:
    """Count a row that cannot be used, and remember the first few by number.

    `reason` may go on with a sentence, as `reason: sentence`; that of the first row is kept.
    """
    reason, _, sentence = reason.partition(": ")
    says = {"says": " ".join(sentence.split())[:SENTENCE_CHARACTERS]} if sentence else {}
    entry = drops.setdefault(reason, {"count": 0, "rows": [], **says})
    entry["count"] += 1
    if len(entry["rows"]) < NAMED_ROWS:
        entry["rows"].append(number)


def describe_drops(drops: Mapping[str, Mapping[str, Any]], done: str = "dropped") -> str:
    """Return e.g. `dropped: 2 empty (rows 3, 9), 1 not_json (rows 4: the tools: '{')`, for people to read."""
    if not drops:
        return f"none {done}"
    parts = []
    for reason, entry in drops.items():
        more = ", ..." if entry["count"] > len(entry["rows"]) else ""
        says = f": {entry['says']}" if "says" in entry else ""
        parts.append(f"{entry['count']:,} {reason} (rows {', '.join(map(str, entry['rows']))}{more}{says})")
    return f"{done}: " + ", ".join(parts)
