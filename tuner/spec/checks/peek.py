"""A look at the first row of a data file, enough to tell how it would be read, without any data library."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.spec.sweep import DataSpec

PEEK_BYTES = 64_000
COLUMNS = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "tokenized": ("input_ids",),
}
"""Columns without which a row is not of the format."""


def peek_format(data: DataSpec, text_field: str) -> tuple[str | None, bool]:
    """Return the format of the rows and whether the file was looked at for it.

    The format is None where it cannot be told from here. Prompts and completions made of chat turns are None, too:
    every loss works on them.
    """
    if data.template is not None:
        return "text", False
    if data.formatter is not None:
        return None, False
    if data.format not in ("auto", "prompt_completion"):
        return data.format, False
    row = first_row(Path(data.path))
    if row is None:
        return None, False
    row = {**row, **{wanted: row[has] for wanted, has in data.columns.items() if has in row}}
    return _format_of(row, text_field), True


def _format_of(row: Mapping[str, Any], text_field: str) -> str | None:
    needed = {**COLUMNS, "text": (text_field,)}
    fitting = [kind for kind, columns in needed.items() if all(column in row for column in columns)]
    if len(fitting) != 1 or (fitting == ["prompt_completion"] and not isinstance(row["completion"], str)):
        return None
    return fitting[0]


def first_row(path: Path) -> dict[str, Any] | None:
    """Return the first row of a JSON, JSONL, CSV or TSV file, or None where it cannot be told cheaply."""
    if not os.path.isfile(path):
        return None
    with path.open("rb") as stream:
        text = stream.read(PEEK_BYTES).decode("utf-8-sig", errors="ignore").lstrip()
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return next(csv.DictReader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ","), None)
    if suffix not in (".json", ".jsonl", ".ndjson"):
        return None
    try:
        row, _ = json.JSONDecoder().raw_decode(text.removeprefix("[").lstrip())
    except (ValueError, RecursionError):  # longer than the peek, or broken: reading the data will say which
        return None
    return row if isinstance(row, dict) else None
