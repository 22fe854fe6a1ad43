"""Make a folder once, whole or not at all, however many processes ask for it."""

from __future__ import annotations

import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from tuner.spec.layout import flush, refuse_full_disk

COMPLETE = "complete.json"


def make_once(folder: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Return the summary of the cache entry `folder`, building the entry if it is not there whole.

    `build(temporary_folder)` fills a folder beside `folder` and returns a summary that JSON can hold; it is then
    renamed into place. Of several processes one builds and the others wait for it. An entry whose files are missing or
    not what was written is built anew; what a killed builder left behind is removed. Raises whatever `build` raises,
    and DiskFullError, and then leaves nothing.
    """
    summary = read_complete(folder)
    if summary is not None:
        return summary
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        summary = read_complete(folder)
        return summary if summary is not None else _build(folder, build)


def _build(folder: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    for leftover in [folder, *folder.parent.glob(f"{folder.name}.tmp-*")]:
        if leftover.is_symlink():  # what it points at is none of ours
            leftover.unlink()
        elif leftover.exists():
            shutil.rmtree(leftover)
    refuse_full_disk(folder.parent)
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        summary = build(temporary)
        refuse_full_disk(temporary)
        record = {"summary": summary, "summary_checksum": _of_summary(summary), "files": checksums(temporary)}
        (temporary / COMPLETE).write_text(json.dumps(record, indent=1), encoding="utf-8")
        flush(temporary)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def read_complete(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a whole entry, or None when it is absent, half-written, damaged or a link elsewhere."""
    if folder.is_symlink():
        return None
    try:
        record = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        summary = record["summary"]
        whole = record["summary_checksum"] == _of_summary(summary) and record["files"] == checksums(folder)
        return summary if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _of_summary(summary: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(summary, sort_keys=True).encode())


def checksums(folder: Path) -> dict[str, int]:
    """A checksum of every file, by its name: also of one that was cut short, or has a bit turned, on its disk."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != COMPLETE)
    return {path.relative_to(folder).as_posix(): _checksum(path, path.stat().st_mtime_ns) for path in files}


@lru_cache(maxsize=4096)
def _checksum(path: Path, changed_ns: int) -> int:
    """Reads some GB/s, once in a process."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return checksum
