"""Read the rows of any data file a user may have, and say exactly where an unusable one breaks."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tuner.errors import DataError
from tuner.training.hub import refuse_silent_hub

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]
Numbered = Iterator[tuple[int, Row]]

FILE_FORMATS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
MOST_COLUMNS = 1000
MOST_EXPANDED = 256 * 10**6
"""Bytes in memory that any Parquet or Arrow file may become, however small it is, and whatever its footer says."""
MOST_TIMES = 100
"""Times its own size that a larger one may."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read_rows(data: Mapping[str, Any], path: str) -> Numbered:
    """Yield (number, row) of everything in `path`, one at a time; numbers count from 1.

    `path` is a file, a folder saved by datasets, or a hub id; `data` (fields of `DataSpec`) gives a hub data set's name
    and revision, and the split. The number is the line of a JSONL file and the record of any other. Raises `DataError`
    naming the file and, where the file has lines, line and column.
    """
    place = Path(path)
    if place.is_dir():
        return _read_columnar(place.name, lambda: _batches_of_saved(place, data["split"]))
    if not place.is_file():
        return _rows_of_batches(_hub_dataset(path, data).iter(batch_size=1000))
    suffix = place.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _read_jsonl(place)
    if suffix == ".json":
        return _read_jsonl(place) if _is_json_lines(place) else _read_json(place)
    if suffix in (".csv", ".tsv"):
        return _read_csv(place, "\t" if suffix == ".tsv" else ",")
    if suffix == ".parquet":
        return _read_columnar(place.name, lambda: _batches_of_parquet(place))
    if suffix in (".arrow", ".feather"):
        return _read_columnar(place.name, lambda: _batches_of_arrow(place))
    raise DataError(f"{place.name}: cannot tell what kind of file this is; allowed: {', '.join(FILE_FORMATS)}")


def source_fingerprint(data: Mapping[str, Any], path: str) -> str:
    """Return a sha256 of what `path` holds: file content, a saved folder's data files, or a hub id at its commit."""
    place = Path(path)
    if place.is_file():
        with place.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    digest = hashlib.sha256()
    if place.is_dir():
        for file in sorted(place.rglob("*")):
            if file.suffix in (".arrow", ".json") and not file.name.startswith("cache-"):
                with file.open("rb") as stream:
                    content = hashlib.file_digest(stream, "sha256").hexdigest()
                digest.update(f"{file.relative_to(place)} {content}\n".encode())
        digest.update(data["split"].encode())
    else:
        builder = _hub_builder(path, data)
        digest.update(json.dumps([path, data["name"], data["split"], builder.hash]).encode())
    return digest.hexdigest()


# --- files with lines


def _read_jsonl(path: Path) -> Numbered:
    with path.open("rb") as stream:
        for number, text in _lines(path, stream):
            if not text.strip():
                continue
            row = _parse_json(text, path, first_line=number)
            if not isinstance(row, dict):
                raise DataError(f"{path.name}, line {number}: every line must be an object, got {_kind(row)}")
            yield number, row


def _is_json_lines(path: Path) -> bool:
    """Whether a .json file holds an object per line, as many of them do."""
    with path.open("rb") as stream:
        first = next((line for line in stream if line.strip()), b"")
        more = any(line.strip() for line in stream)
    try:
        return more and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _read_json(path: Path) -> Numbered:
    with path.open("rb") as stream:
        text = "".join(line for _, line in _lines(path, stream))
    content = _parse_json(text, path)
    if isinstance(content, dict):
        yield from _rows_of_columns(content, path)
        return
    if not isinstance(content, list):
        raise DataError(f"{path.name}: expected a list of objects or an object of lists, got {_kind(content)}")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path.name}, item {number}: every item must be an object, got {_kind(row)}")
        yield number, row


def _rows_of_columns(columns: dict[str, Any], path: Path) -> Numbered:
    wrong = [name for name, values in columns.items() if not isinstance(values, list)]
    if wrong or not columns:
        found = f"{wrong[0]!r} is {_kind(columns[wrong[0]])}" if wrong else "the object is empty"
        raise DataError(f"{path.name}: expected a list of objects or an object of lists, but {found}")
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{path.name}: the columns have different lengths: {lengths}")
    for number, values in enumerate(zip(*columns.values(), strict=True), start=1):
        yield number, dict(zip(columns, values, strict=True))


def _parse_json(text: str, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path.name}, line {line}, column {error.colno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, a list in a list in a list ...
        raise DataError(f"{path.name}, line {first_line}: not usable JSON: {error}") from error


def _read_csv(path: Path, delimiter: str) -> Numbered:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long document
    with path.open("rb") as stream:
        lines = (text for _, text in _lines(path, stream))
        records = _csv_records(path, csv.reader(lines, delimiter=delimiter, strict=True))
        _, header = next(records, (0, []))
        refuse_many_columns(header, path.name)
        twice = sorted({name for name in header if header.count(name) > 1})
        if not header or twice or "" in header:
            problem = f"the columns {twice} stand twice" if twice else "the first line must name every column"
            raise DataError(f"{path.name}, line 1: {problem}")
        for number, (line, record) in enumerate(records, start=1):
            if len(record) != len(header):
                raise DataError(f"{path.name}, line {line}: {len(record)} fields where the header names {len(header)}")
            yield number, dict(zip(header, record, strict=True))


def refuse_many_columns(columns: Collection[str], name: str) -> None:
    """Raise DataError where a row is no row, but has a column for everything."""
    if len(columns) > MOST_COLUMNS:
        raise DataError(f"{name}: rows of {len(columns)} columns; allowed: at most {MOST_COLUMNS}")


def _csv_records(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, fields) of every record that is not a blank line; a record may span lines."""
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path.name}, line {line}: not CSV: {error}") from error
        if record:
            yield line, record


def _lines(path: Path, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield (line number, text with its line end) of a UTF-8 file; a byte order mark is skipped."""
    offset = 0
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            column = len(line[: error.start].decode("utf-8", errors="replace")) + 1
            raise DataError(
                f"{path.name}, line {number}, column {column}: not UTF-8: byte 0x{line[error.start]:02x} "
                f"at offset {offset + error.start}"
            ) from error
        offset += len(line)
        yield number, text.removeprefix("\ufeff") if number == 1 else text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# --- files with columns


def _read_columnar(name: str, batches: Any) -> Numbered:
    import pyarrow as pa

    try:
        yield from _rows_of_batches(batches())
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{name}: cannot be read: {error}") from error


def _rows_of_batches(batches: Iterator[dict[str, list[Any]]]) -> Numbered:
    number = 0
    for batch in batches:
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield number, {name: _without_nulls(value) for name, value in zip(batch, values, strict=True)}


def _without_nulls(value: Any) -> Any:
    """Undo what Arrow adds: objects of one column share all their keys, and absent ones read as null.

    A chat template that asks whether a message *has* tool calls must not find the key. `content` stays.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None or key == "content"}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _batches_of_parquet(path: Path) -> Iterator[dict[str, list[Any]]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        groups = range(file.metadata.num_row_groups)
        _refuse_bomb(path, sum(file.metadata.row_group(group).total_byte_size for group in groups))
        yield from _bounded(path, file.iter_batches(batch_size=100))


def _batches_of_arrow(path: Path) -> Iterator[dict[str, list[Any]]]:
    """Both of Arrow's layouts: the file with its footer, and the stream that datasets writes."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pa.ipc.open_file(source)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            source.seek(0)
            batches = iter(pa.ipc.open_stream(source))
        yield from _bounded(path, batches)


def _bounded(path: Path, batches: Iterable[Any]) -> Iterator[dict[str, list[Any]]]:
    """The columns of each batch of Arrow's, until they are more than a file of this size can mean to hold."""
    import pyarrow as pa

    held = 0
    for batch in batches:
        columns = [one.dictionary_decode() if pa.types.is_dictionary(one.type) else one for one in batch.columns]
        held += sum(column.nbytes for column in columns)
        _refuse_bomb(path, held)
        yield batch.to_pydict()


def _refuse_bomb(path: Path, expanded: int) -> None:
    """Raise DataError for a file that becomes far larger in memory than a file of its size with real data does."""
    most = max(MOST_EXPANDED, MOST_TIMES * path.stat().st_size)
    if expanded > most:
        raise DataError(
            f"{path.name}: {path.stat().st_size} bytes become more than {most // 10**6} MB when they are read; "
            f"allowed: {MOST_TIMES} times the file's size, or {MOST_EXPANDED // 10**6} MB; "
            "if it is right, write it as .jsonl"
        )


def _batches_of_saved(path: Path, split: str) -> Iterator[dict[str, list[Any]]]:
    import datasets

    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise DataError(f"{path.name}: not a folder that datasets' save_to_disk wrote")
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{path.name}: no split {split!r}; it has {', '.join(loaded)}")
        loaded = loaded[split]
    return loaded.with_format(None).iter(batch_size=1000)


# --- the hub


def _hub_builder(path: str, data: Mapping[str, Any]) -> datasets.DatasetBuilder:
    if Path(path).is_absolute() or Path(path).suffix.lower() in FILE_FORMATS or not _HUB_ID.fullmatch(path):
        raise DataError(f"{path}: no such file or folder")
    refuse_silent_hub()
    import datasets

    try:
        return datasets.load_dataset_builder(path, name=data["name"], revision=data["revision"])
    except Exception as error:  # the border to a network: whatever it is, the data set cannot be had
        raise DataError(f"{path}: no such file or folder, and not to be had from the hub: {error}") from error


def _hub_dataset(path: str, data: Mapping[str, Any]) -> datasets.Dataset:
    builder = _hub_builder(path, data)
    try:
        builder.download_and_prepare()
    except Exception as error:  # as above
        raise DataError(f"{path}: cannot be downloaded: {error}") from error
    if data["split"] not in builder.info.splits:
        raise DataError(f"{path}: no split {data['split']!r}; it has {', '.join(builder.info.splits)}")
    return builder.as_dataset(split=data["split"])
