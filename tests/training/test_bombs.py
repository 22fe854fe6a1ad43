"""A small file that becomes a large one when it is read is refused before it does."""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from tuner.errors import DataError
from tuner.training.data import MOST_EXPANDED, read_rows

pytestmark = pytest.mark.timeout(60)

LOCAL = {"name": None, "split": "train", "revision": None}
LONG = "word " * 20_000


def repeated(rows: int) -> pa.Table:
    """Rows that all hold the same 100 kB, of which one is kept."""
    indices = pa.array([0] * rows, pa.int32())
    return pa.table({"text": pa.DictionaryArray.from_arrays(indices, [LONG])})


def write_dictionary(path: Path) -> None:
    pa.parquet.write_table(repeated(40_000), path)


def write_compressed(path: Path) -> None:
    """As the footer says: a page after the other that is one letter."""
    table = pa.table({"text": ["a" * 1_000_000] * 300})
    pa.parquet.write_table(table, path, compression="zstd", use_dictionary=False)


def write_arrow(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, repeated(1).schema) as writer:
        writer.write_table(repeated(40_000), max_chunksize=1000)


def write_feather(path: Path) -> None:
    pa.feather.write_feather(pa.table({"text": ["a" * 1_000_000] * 300}), path, compression="zstd", chunksize=10)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_dictionary, "rows.parquet"),
        (write_compressed, "rows.parquet"),
        (write_arrow, "rows.arrow"),
        (write_feather, "rows.feather"),
    ],
)
def test_a_file_that_becomes_too_large_is_refused_soon(tmp_path, write, name):
    path = tmp_path / name
    write(path)
    assert path.stat().st_size < MOST_EXPANDED / 100
    began = time.monotonic()
    with pytest.raises(DataError, match=rf"{name}: \d+ bytes become more than 256 MB when they are read; allowed: 100"):
        for _ in read_rows(LOCAL, str(path)):
            pass
    assert time.monotonic() - began < 20


def test_rows_that_share_a_long_prompt_are_no_bomb(tmp_path):
    path = tmp_path / "rows.parquet"
    prompts, answers = ["Be kind. " * 200] * 5000, [f"answer {number}" for number in range(5000)]
    pa.parquet.write_table(pa.table({"prompt": prompts, "completion": answers}), path)
    assert sum(1 for _ in read_rows(LOCAL, str(path))) == 5000
