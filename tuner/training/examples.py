"""From a data file to numbered examples: the user's renaming, template or formatter first, then the format."""

from __future__ import annotations

import importlib
import os
import re
import string
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tuner.errors import DataError
from tuner.spec.drops import Drops, drop
from tuner.training.data import Row, read_rows, refuse_many_columns
from tuner.training.formats import (
    COLUMNS_OF_FORMAT,
    MISSING,
    TOO_LONG,
    WRONG_TYPE,
    as_json,
    columns_used,
    to_example,
)

SAMPLE_ROWS = 100
MOST_CHARACTERS = 10_000_000
"""Of one example: to tokenise so many takes some 2 GB of memory and 20 seconds."""
_WAYS_OUT = (
    "ways out: data.format names the format, data.columns renames (expected: actual), data.template makes a text of "
    "{column} fields, data.formatter converts rows in Python"
)


def read_examples(
    data: Mapping[str, Any], path: str, text_field: str, drops: Drops
) -> tuple[str, list[str], Iterator[tuple[int, str]]]:
    """Return the format of `path`, the columns it does not use, and an iterator of (row number, example as JSON).

    `data` is `DataSpec.model_dump()`; `text_field` is the file's column of plain text, TRL's `dataset_text_field`.
    Rows that cannot be used are added to `drops` while the iterator runs. Raises `DataError` when the rows cannot be
    read or their format is not clear.
    """
    name = Path(path).name
    if data["template"] or data["formatter"] or "text" in data["columns"]:
        text_field = "text"
    rows = read_rows(data, path)
    raw = list(islice(rows, SAMPLE_ROWS))
    if not raw:
        raise DataError(f"{name}: holds no rows")
    columns = _columns_of(row for _, row in raw)
    refuse_many_columns(columns, name)
    shape = _shaper(data, columns, name)
    sample = [(number, shape(number, row)) for number, row in raw]
    shaped = [row for _, row in sample if isinstance(row, dict)]
    kind = recognise(data["format"], shaped, text_field, name)
    used = columns_used(kind, shaped, text_field)

    def examples() -> Iterator[tuple[int, str]]:
        for number, row in chain(sample, ((number, shape(number, row)) for number, row in rows)):
            example = to_example(kind, row, text_field)
            text = as_json(example) if isinstance(example, dict) else None
            if text is None:
                drop(drops, example if isinstance(example, str) else WRONG_TYPE, number)
            elif len(text) > MOST_CHARACTERS:
                drop(drops, TOO_LONG, number)
            else:
                yield number, text

    return kind, [column for column in _columns_of(shaped) if column not in used], examples()


def recognise(asked: str, sample: list[Row], text_field: str, name: str) -> str:
    """Return the one format that the sample fits, or the one asked for if it can be at all; raises `DataError`."""
    formats = list(COLUMNS_OF_FORMAT) if asked == "auto" else [asked]
    results = {kind: {_outcome(to_example(kind, row, text_field)) for row in sample} for kind in formats}
    if asked != "auto" and results[asked] - {MISSING}:
        return asked
    fitting = [kind for kind in formats if "usable" in results[kind]]
    fitting = fitting or [kind for kind in formats if results[kind] - {MISSING, WRONG_TYPE}]
    if len(fitting) == 1:
        return fitting[0]
    problem = f"fits more than one format ({', '.join(fitting)})" if fitting else "fits no known format"
    if asked != "auto":
        problem = f"does not fit format {asked}"
    found = ", ".join(f"{column} ({_types(sample, column)})" for column in _columns_of(sample)) or "none"
    known = ", ".join(f"{kind} ({', '.join(needed)})" for kind, needed in COLUMNS_OF_FORMAT.items())
    raise DataError(f"{name}: {problem}; columns: {found}; formats: {known}; {_WAYS_OUT}")


def _columns_of(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _outcome(example: Row | str) -> str:
    return example.partition(":")[0] if isinstance(example, str) else "usable"


def _types(sample: list[Row], column: str) -> str:
    return " or ".join(sorted({type(row[column]).__name__ for row in sample if column in row}))


# --- the user's own shaping


def _shaper(data: Mapping[str, Any], present: list[str], name: str) -> Callable[[int, Row], Any]:
    """Return the function that every row goes through first; `present` are the columns of the file."""
    given = [f"data.{key}" for key in ("columns", "template", "formatter") if data[key]]
    if len(given) > 1:
        raise DataError(f"{' and '.join(given)}: only one of them may be given")
    if data["formatter"]:
        return _formatter_shaper(data["formatter"], name)
    if data["template"] is not None:
        return _template_shaper(data["template"], present, name)
    return _renaming_shaper(data["columns"], present, name)


def _renaming_shaper(columns: Mapping[str, str], present: list[str], name: str) -> Callable[[int, Row], Row]:
    _refuse_missing("data.columns", columns.values(), present, name)

    def rename(_: int, row: Row) -> Row:
        kept = {key: value for key, value in row.items() if key not in columns.values()}
        return {**kept, **{expected: row[actual] for expected, actual in columns.items() if actual in row}}

    return rename


class _Template(string.Formatter):
    """str.format whose fields are columns by their whole name: no attributes, no indexing."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        return kwargs[field_name], field_name


def _template_shaper(template: str, present: list[str], name: str) -> Callable[[int, Row], Row]:
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise DataError(f"data.template: {error}; a literal brace is written twice") from error
    fields = [str(field) for _, field, _, _ in parts]
    if not fields or "" in fields:
        raise DataError("data.template: needs {column} fields, each with a column's name")
    if wide := [form for _, _, form, _ in parts if form and re.search(r"\d{4}|[{}]", form)]:
        raise DataError(f"data.template: {wide[0]!r} is no width or precision below 1000")
    _refuse_missing("data.template", fields, present, name)

    def fill(number: int, row: Row) -> Row:
        if any(field not in row for field in fields):
            return {}
        if any(row[field] is None for field in fields):
            return {"text": None}
        try:
            return {"text": _Template().vformat(template, (), row)}
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{name}, row {number}: data.template: {error}") from error

    return fill


def _refuse_missing(key: str, wanted: Iterable[str], present: list[str], name: str) -> None:
    missing = [column for column in wanted if column not in present]
    if missing:
        raise DataError(f"{key}: {name} has no column {', '.join(map(repr, missing))}; it has {', '.join(present)}")


def _formatter_shaper(formatter: str, name: str) -> Callable[[int, Row], Any]:
    function = load_formatter(formatter)

    def apply(number: int, row: Row) -> Any:
        try:
            return function(row)
        except Exception as error:  # the border to the user's own code
            raise DataError(f"{name}, row {number}: {formatter} raised {type(error).__name__}: {error}") from error

    return apply


def load_formatter(formatter: str) -> Callable[[Row], Any]:
    """Import `module:function`, from the current folder too; raises `DataError` when there is no such function."""
    module_name, _, function_name = formatter.partition(":")
    if os.getcwd() not in sys.path:  # an installed command, unlike `python -m`, does not look there
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # as above
        raise DataError(f"data.formatter: cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise DataError(f"data.formatter: {module_name!r} has no function {function_name!r}")
    return function


def formatter_source(formatter: str) -> bytes:
    """Return the source of the formatter's module: another source may format rows otherwise."""
    load_formatter(formatter)
    module_name = formatter.partition(":")[0]
    file = getattr(sys.modules[module_name], "__file__", None)
    if file is None:
        raise DataError(f"data.formatter: {module_name!r} is not a module with a source file")
    return Path(file).read_bytes()
