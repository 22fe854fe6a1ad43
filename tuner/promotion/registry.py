"""Promoted models: every version kept, and an alias that always points at a whole one.

models/ALIAS/v1, v2, ...     the versions, never changed once there
models/ALIAS/current         a symbolic link to one of them, moved in one step
models/ALIAS/history.jsonl   every move of the link, one JSON object a line

An object store has neither links nor locks, but makes an object only once. There each move is an object, and the alias
points where the last of them says:

models/ALIAS/moves/00001.json, 00002.json, ...
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tuner.errors import AliasMoved, NotFoundError, TunerError
from tuner.promotion.manifest import MANIFEST
from tuner.spec.layout import Root, flush

_CURRENT = "current"
_HISTORY = "history.jsonl"
_MOVES = "moves"
_CLAIM = ".claimed"
_INCOMING = ".incoming-"

Say = Callable[[str], None]
"""Called with a line for the user."""


@dataclass(frozen=True)
class Version:
    """One promoted model."""

    root: Root
    alias: str
    number: int

    @property
    def name(self) -> str:
        return f"v{self.number}"

    @property
    def path(self) -> Path:
        """Its folder; in an object store, where `root.fetch` puts it."""
        return self.root.inside(self.root.alias(self.alias) / self.name)

    @property
    def place(self) -> Path | str:
        """Where it lasts: its folder, or its URL in an object store."""
        return self.path if self.root.url is None else self.root.address(self.path)

    def manifest(self) -> dict[str, Any]:
        """What `tuner.promotion.manifest` wrote beside the weights. Raises TunerError where it cannot be read."""
        try:  # a border: the folder may have been copied in part, or edited
            found = json.loads(self.root.read(self.path / MANIFEST))
        except (OSError, ValueError) as error:
            raise self._broken(str(error)) from None
        if not isinstance(found, dict):
            raise self._broken("it is no JSON object")
        return found

    def recorded(self, *keys: str) -> Any:
        """A value of the manifest, by the keys that lead to it. Raises TunerError where it is not there."""
        found: Any = self.manifest()
        for key in keys:
            if not isinstance(found, dict) or key not in found:
                raise self._broken(f"{'.'.join(keys)} is not in it")
            found = found[key]
        return found

    def _broken(self, why: str) -> TunerError:
        return TunerError(
            f"alias {self.alias!r}: the manifest of {self.name} cannot be read: "
            f"{self.root.address(self.path / MANIFEST)}: {why}. "
            f"Copy {self.name} again as a whole, or promote under another alias"
        )


def versions(root: Root, alias: str) -> list[Version]:
    """Every version of an alias, oldest first; an empty list for an alias that has none."""
    known = [Version(root, alias, number) for number in _numbers(root, alias)]
    return [version for version in known if root.exists(version.path)]


def _numbers(root: Root, alias: str) -> list[int]:
    """Every number that is taken, in an object store also by what is not whole, or never will be."""
    return sorted(int(match[1]) for name in root.names(root.alias(alias)) if (match := re.fullmatch(r"v(\d+)", name)))


def current(root: Root, alias: str) -> Version | None:
    """The version that the alias points at, or None; safe to call while another process promotes.

    Raises TunerError where `current` is no link, or leads to no version: it was copied, or moved by hand.
    """
    if root.url is not None:
        moves = root.names(root.alias(alias) / _MOVES)
        target = _move(root, alias, moves[-1])["to"] if moves else None
    else:
        target = _linked(root, alias)
    if target is None:
        return None
    known = versions(root, alias)
    if found := next((version for version in known if version.name == target), None):
        return found
    raise TunerError(
        f"alias {alias!r} points at {target}, which is no version of it; there is "
        f"{', '.join(version.name for version in known) or 'none'}. {_how_to_point(root, alias, known)}"
    )


def _linked(root: Root, alias: str) -> str | None:
    """Where the link of an alias leads: the name of what lies beside it, else a path."""
    link = root.inside(root.alias(alias)) / _CURRENT
    if not os.path.lexists(link):
        return None
    if not link.is_symlink():
        raise TunerError(
            f"{link} is no symbolic link to a version: it was copied without links. "
            f"{_how_to_point(root, alias, versions(root, alias))}"
        )
    target = link.parent / os.readlink(root.inside(link))
    beside = os.path.realpath(target.parent) == os.path.realpath(link.parent)
    return target.name if beside else os.path.realpath(target)


def _how_to_point(root: Root, alias: str, known: list[Version]) -> str:
    if root.url is not None or not known:
        return f"Promote under another alias, or remove {root.address(root.alias(alias) / _CURRENT)}"
    link = shlex.quote(str(root.alias(alias) / _CURRENT))
    return f"Point it at one, such as the last: rm -r {link} && ln -s {known[-1].name} {link}"


def history(root: Root, alias: str) -> list[dict[str, Any]]:
    """Every move of the alias, oldest first: `time`, `action`, `from`, `to`, `forced`, `reasons`."""
    if root.url is not None:
        return [_move(root, alias, name) for name in root.names(root.alias(alias) / _MOVES)]
    path = root.inside(root.alias(alias) / _HISTORY)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [move for line in lines if (move := _whole(line)) is not None]


def _whole(line: str) -> dict[str, Any] | None:
    """A move; None for a line that was cut off, by a power cut or a full disk."""
    try:
        move = json.loads(line)
    except ValueError:
        return None
    return move if isinstance(move, dict) else None


def _move(root: Root, alias: str, name: str) -> dict[str, Any]:
    return json.loads(root.read(root.alias(alias) / _MOVES / name))


@contextmanager
def staging(root: Root, alias: str, say: Say = lambda line: None) -> Iterator[Path]:
    """Yield an empty working folder to prepare the next version in, and hold the alias meanwhile.

    `say` is called with a line where another process holds it, before the wait. Raises TunerError
    where one may not write.

    It is held against every other process; where the root is an object store, against those of this node, and `publish`
    refuses when another node was faster. What is still there at the end, or was left by a process that was killed, is
    removed.
    """
    home = root.alias(alias)
    with _locked(home, say):
        for leftover in home.glob(f"{_INCOMING}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=home, prefix=_INCOMING))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def next_version(root: Root, alias: str) -> Version:
    """The version that the next `publish` will make; certain only within `staging`."""
    return Version(root, alias, max(_numbers(root, alias), default=0) + 1)


def publish(
    version: Version, before: Version | None, folder: Path, forced: bool = False, reasons: tuple[str, ...] = ()
) -> None:
    """Make a complete folder, below the one `staging` gave, this next version and point the alias at it.

    Killed between its steps it leaves the alias where it was: the folder arrives whole, and only then does the alias
    move. Raises AliasMoved, and leaves nothing, when the alias no longer points at `before`, or the version is there.
    """
    if version.root.url is None:
        flush(folder)
        os.replace(folder, version.path)
    else:
        _upload(version, folder)
    try:
        _point(version, "promote", before, forced, reasons)
    except AliasMoved:
        version.root.forget(version.path)
        raise


def _upload(version: Version, folder: Path) -> None:
    """Put a folder where nobody else is putting one: whose claim comes second may not."""
    try:
        version.root.create(version.path / _CLAIM, secrets.token_hex(8))
    except FileExistsError:
        raise AliasMoved(version.alias) from None
    os.replace(folder, version.path)
    version.root.keep(version.path)


def rollback(root: Root, alias: str, say: Say = lambda line: None) -> tuple[Version, Version]:
    """Point the alias at the version that was current when the present one was promoted; return (from, to).

    The present one is that which the alias points at when this is called. `say` is called with a line where another
    process holds the alias, before the wait.

    Raises:
        NotFoundError: the alias points at nothing, or at its first version, or the version before it was deleted.
        AliasMoved: it was moved meanwhile, such as by a promotion that this waited for.
        TunerError: the alias, or its manifest, cannot be read, or one may not write there.
    """
    home = root.alias(alias)
    present = current(root, alias)
    if present is None:
        raise NotFoundError(f"alias {alias!r}: nothing is promoted under {root.address(home)}")
    with _locked(home, say):
        if current(root, alias) != present:
            raise AliasMoved(alias)
        previous = present.recorded("previous")
        if previous is None:
            raise NotFoundError(f"alias {alias!r}: {present.name} is the first version, there is none to go back to")
        target = next((version for version in versions(root, alias) if version.name == previous), None)
        if target is None:
            raise NotFoundError(f"alias {alias!r}: {previous}, which stood before {present.name}, is no longer there")
        _point(target, "rollback", present)
    return present, target


@contextmanager
def _locked(home: Path, say: Say) -> Iterator[None]:
    """Hold an alias against other processes; its folder is made."""
    lock = FileLock(home / ".lock")
    try:  # a border: the folder is the user's, and may be read-only
        home.mkdir(parents=True, exist_ok=True)
        if not os.access(home, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"another process promotes or rolls back {home.name}: waiting until it has ended")
            lock.acquire()
    except OSError as error:
        raise TunerError(f"cannot write in {home}: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


def _point(
    version: Version, action: str, before: Version | None, forced: bool = False, reasons: tuple[str, ...] = ()
) -> None:
    """Move the alias in one step, and record that: a reader sees the old version or the new one, never neither."""
    move = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "action": action,
        "from": before.name if before else None,
        "to": version.name,
        "forced": forced,
        "reasons": list(reasons),
    }
    root, home = version.root, version.path.parent
    if root.url is not None:
        _add_move(root, version.alias, move)
        return
    link = home / _CURRENT
    temporary = link.with_name(f".{_CURRENT}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(version.name)
    os.replace(temporary, link)
    with root.inside(home / _HISTORY).open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            file.write(b"" if file.read(1) == b"\n" else b"\n")  # the last line was cut off
        file.write(json.dumps(move).encode() + b"\n")
    flush(home / _HISTORY)


def _add_move(root: Root, alias: str, move: dict[str, Any]) -> None:
    """Make the move the next one, unless the last is no longer the one that it was decided on."""
    moves = root.alias(alias) / _MOVES
    last = root.names(moves)[-1:]
    points_at = _move(root, alias, last[0])["to"] if last else None
    number = int(last[0].partition(".")[0]) + 1 if last else 1
    try:
        if points_at != move["from"]:
            raise FileExistsError
        root.create(moves / f"{number:05d}.json", json.dumps(move))
    except FileExistsError:
        raise AliasMoved(alias) from None
