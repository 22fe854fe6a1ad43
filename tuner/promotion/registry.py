"""Promoted models on disk: every version kept, and a link that always points at a whole one.

models/ALIAS/v1, v2, ...     the versions, never changed once there
models/ALIAS/current         a symbolic link to one of them, moved in one step
models/ALIAS/history.jsonl   every move of the link, one JSON object a line
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from tuner.errors import NotFoundError
from tuner.promotion.manifest import read_manifest
from tuner.spec.layout import Root

_CURRENT = "current"
_HISTORY = "history.jsonl"
_INCOMING = ".incoming-"


@dataclass(frozen=True)
class Version:
    """One promoted model."""

    alias: str
    number: int
    path: Path

    @property
    def name(self) -> str:
        return f"v{self.number}"

    def manifest(self) -> dict[str, Any]:
        """What `tuner.promotion.manifest` wrote beside the weights."""
        return read_manifest(self.path)


def versions(root: Root, alias: str) -> list[Version]:
    """Every version of an alias, oldest first; an empty list for an alias that has none."""
    home = root.alias(alias)
    if not home.is_dir():
        return []
    numbers = sorted(int(match[1]) for entry in home.iterdir() if (match := re.fullmatch(r"v(\d+)", entry.name)))
    return [Version(alias, number, home / f"v{number}") for number in numbers]


def current(root: Root, alias: str) -> Version | None:
    """The version that the alias points at, or None; safe to call while another process promotes."""
    link = root.alias(alias) / _CURRENT
    if not link.is_symlink():
        return None
    target = os.readlink(link)
    return next((version for version in versions(root, alias) if version.name == target), None)


def history(root: Root, alias: str) -> list[dict[str, Any]]:
    """Every move of the alias, oldest first: `time`, `action`, `from`, `to`, `forced`, `reasons`."""
    path = root.alias(alias) / _HISTORY
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@contextmanager
def staging(root: Root, alias: str) -> Iterator[Path]:
    """Hold the alias, against every other process, and yield an empty working folder to prepare the next version in.

    What is still there at the end, or was left by a process that was killed, is removed.
    """
    home = root.alias(alias)
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home):
        for leftover in home.glob(f"{_INCOMING}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=home, prefix=_INCOMING))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def next_version(root: Root, alias: str) -> Version:
    """The version that the next `publish` will make; certain only within `staging`."""
    number = max((version.number for version in versions(root, alias)), default=0) + 1
    return Version(alias, number, root.alias(alias) / f"v{number}")


def publish(root: Root, alias: str, folder: Path, forced: bool = False, reasons: tuple[str, ...] = ()) -> Version:
    """Make a complete folder, below the one `staging` gave, the next version and point the alias at it.

    Killed between its steps it leaves the alias where it was: the folder arrives whole, by one rename, and only then
    does the link move.
    """
    version = next_version(root, alias)
    before = current(root, alias)
    os.replace(folder, version.path)
    _point(version)
    _record(version, "promote", before, forced, reasons)
    return version


def rollback(root: Root, alias: str) -> tuple[Version, Version]:
    """Point the alias at the version that was current when the present one was promoted; return (from, to).

    Raises:
        NotFoundError: the alias points at nothing, or at its first version, or the version before it was deleted.
    """
    home = root.alias(alias)
    if current(root, alias) is None:
        raise NotFoundError(f"alias {alias!r}: nothing is promoted under {home}")
    with _locked(home):
        present = current(root, alias)
        assert present is not None
        previous = present.manifest()["previous"]
        if previous is None:
            raise NotFoundError(f"alias {alias!r}: {present.name} is the first version, there is none to go back to")
        target = next((version for version in versions(root, alias) if version.name == previous), None)
        if target is None:
            raise NotFoundError(f"alias {alias!r}: {previous}, which stood before {present.name}, is no longer there")
        _point(target)
        _record(target, "rollback", present, forced=False, reasons=())
    return present, target


def _locked(home: Path) -> FileLock:
    return FileLock(home / ".lock")


def _point(version: Version) -> None:
    """Move the link in one step: a reader sees the old version or the new one, never neither."""
    link = version.path.parent / _CURRENT
    temporary = link.with_name(f".{_CURRENT}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(version.name)
    os.replace(temporary, link)


def _record(version: Version, action: str, before: Version | None, forced: bool, reasons: tuple[str, ...]) -> None:
    move = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "action": action,
        "from": before.name if before else None,
        "to": version.name,
        "forced": forced,
        "reasons": list(reasons),
    }
    with (version.path.parent / _HISTORY).open("a", encoding="utf-8") as file:
        file.write(json.dumps(move) + "\n")
