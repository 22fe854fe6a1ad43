"""How rows are read: whether the data section can be followed at all."""

from __future__ import annotations

import os
import re
import string
import sys
from pathlib import Path

from tuner.errors import Problem
from tuner.spec.checks.peek import COLUMNS
from tuner.spec.checks.words import any_of, nearest, show
from tuner.spec.sweep import DataSpec, SweepSpec

FILE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
OPTIONAL_COLUMNS = ("tools", "chat_template_kwargs", "input", "labels", "completion_mask", "assistant_masks")
_FORMATTER = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def check_data(spec: SweepSpec) -> list[Problem]:
    """Find everything in the data section that reading the rows would stumble over."""
    data = spec.data
    found = [*_check_files(data), *_check_columns(data, spec.train.get("dataset_text_field", "text"))]
    given = [f"data.{name}" for name in ("columns", "template", "formatter") if getattr(data, name)]
    if len(given) > 1:
        found.append(Problem(given[-1], f"{given[-1]} beside {given[0]}", "one of columns, template and formatter"))
    if data.formatter is not None and not _FORMATTER.fullmatch(data.formatter):
        found.append(Problem("data.formatter", show(data.formatter), "module:function, such as mine.rows:to_chat"))
    elif data.formatter is not None and data.formatter.partition(".")[0].partition(":")[0] in sys.stdlib_module_names:
        found.append(Problem("data.formatter", show(data.formatter), "a module of your own: it is run on every row"))
    if data.template is not None and (problem := _wrong_template(data.template)):
        found.append(Problem("data.template", show(data.template), problem))
    return found


def _check_files(data: DataSpec) -> list[Problem]:
    found = []
    for key, place in (("data.path", data.path), ("data.eval_path", data.eval_path)):
        if place is not None and os.path.isfile(place) and Path(place).suffix.lower() not in FILE_SUFFIXES:
            found.append(Problem(key, show(place), f"a file ending in {any_of(FILE_SUFFIXES)}"))
    if data.eval_path == data.path:
        found.append(Problem("data.eval_path", "the same as data.path", "other rows than those trained on, or null"))
    return found


def _check_columns(data: DataSpec, text_field: object) -> list[Problem]:
    formats = list(COLUMNS) if data.format == "auto" else [data.format]
    known = [column for format_ in formats for column in COLUMNS[format_]]
    if isinstance(text_field, str):
        known.append(text_field)
    return [
        Problem(f"data.columns.{column}", "an unknown key", any_of(dict.fromkeys(known)), nearest(column, known))
        for column in data.columns
        if column not in known and column not in OPTIONAL_COLUMNS
    ]


def _wrong_template(template: str) -> str | None:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError:
        return "{column} fields, a literal brace written twice"
    return None if fields and all(fields) else "{column} fields, each with a column's name"
