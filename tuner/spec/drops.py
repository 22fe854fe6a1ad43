"""Rows of the data that cannot be used: counted by reason, the first few named, and put into words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Drops = dict[str, dict[str, Any]]
"""Reason -> its `count`, and `rows`, the numbers of the first few."""

NAMED_ROWS = 5


def drop(drops: Drops, reason: str, number: int) -> None:
    """Count a row that cannot be used, and remember the first few by number."""
    entry = drops.setdefault(reason, {"count": 0, "rows": []})
    entry["count"] += 1
    if len(entry["rows"]) < NAMED_ROWS:
        entry["rows"].append(number)


def describe_drops(drops: Mapping[str, Mapping[str, Any]], done: str = "dropped") -> str:
    """Return e.g. `dropped: 2 empty (rows 3, 9)`, as an error message and the command line show it."""
    if not drops:
        return f"none {done}"
    parts = []
    for reason, entry in drops.items():
        more = ", ..." if entry["count"] > len(entry["rows"]) else ""
        parts.append(f"{entry['count']:,} {reason} (rows {', '.join(map(str, entry['rows']))}{more})")
    return f"{done}: " + ", ".join(parts)
