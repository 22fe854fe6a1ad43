"""What lasts of a root in an object store: files put there and taken from there, whole or not at all.

A folder is whole when the object is there that says what the others are: it is put last and deleted first.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from tuner.errors import MachineError

_LAST = ("manifest.json", "report.json", "adapter_config.json", "config.json", "state.json")
"""Of a promoted model, a trainer's checkpoint, an adapter, a whole model, an evaluation set."""
_PART = ".part"
_PATIENCE = timedelta(seconds=60)
_ANSWER = timedelta(seconds=30)
"""How long one request may take to its last byte; a large file is put in several."""


class Objects:
    """The objects below one URL, such as s3://bucket/runs. A key is a path below it; to a folder, each file is one.

    Region, endpoint and credentials are those of the AWS_ variables, or of the machine's own role. Raises MachineError
    where the store does not answer within a minute, or refuses.
    """

    def __init__(self, url: str):
        import obstore

        self._url, self._api = url, obstore
        with self._in_words():
            self._store: Any = obstore.store.from_url(
                url,
                client_options={"allow_http": True, "timeout": _ANSWER},
                retry_config={"max_retries": 5, "retry_timeout": _PATIENCE},
            )

    def exists(self, key: str) -> bool:
        """Whether a file, or a whole folder, is there."""
        return _whole(key, self._keys(key))

    def names(self, key: str) -> list[str]:
        """What lies directly in a folder, sorted; nothing where there is none."""
        with self._in_words():
            listed = self._api.list_with_delimiter(self._store, key)
        paths = [*listed["common_prefixes"], *(found["path"] for found in listed["objects"])]
        return sorted(path.rsplit("/", 1)[-1] for path in paths)

    def read(self, key: str) -> str:
        """The text of a file. Raises FileNotFoundError."""
        with self._in_words():
            return bytes(self._api.get(self._store, key).bytes()).decode("utf-8")

    def create(self, key: str, text: str) -> None:
        """Write a file that must not be there yet: of several who try, one does. Raises FileExistsError.

        The text must be the writer's alone: if it is there already, it is from a try whose answer was lost.
        """
        try:
            with self._in_words():
                self._api.put(self._store, key, text.encode("utf-8"), mode="create", use_multipart=False)
        except FileExistsError:
            if self.read(key) != text:
                raise

    def put(self, path: Path, key: str) -> None:
        """Copy a file or a folder there."""
        files = sorted(found for found in path.rglob("*") if found.is_file()) if path.is_dir() else [path]
        keys = {_join(key, file.relative_to(path).as_posix()): file for file in files}
        for one in _last_at_the_end(key, list(keys)):
            with self._in_words():
                self._api.put(self._store, one, keys[one])

    def get(self, key: str, path: Path) -> None:
        """Make `path` a copy of what is there, each of its files in one step. Raises FileNotFoundError."""
        keys = self._keys(key)
        if not _whole(key, keys):
            raise FileNotFoundError(f"{self._url}/{key} is not there")
        wanted = {path / one.removeprefix(key).removeprefix("/"): one for one in keys}
        for file in [found for found in path.rglob("*") if found.is_file() and found not in wanted]:
            if file.suffix != _PART:  # others may be fetching the same
                file.unlink(missing_ok=True)
        for file, one in wanted.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f".{file.name}.{secrets.token_hex(4)}{_PART}")
            with self._in_words(), part.open("wb") as copy:
                for chunk in self._api.get(self._store, one).stream():
                    copy.write(chunk)
            os.replace(part, file)

    def delete(self, key: str) -> None:
        """Remove a file or a folder, if it is there."""
        keys = _last_at_the_end(key, self._keys(key))
        with self._in_words():
            for some in (keys[-1:], keys[:-1]):
                if some:
                    self._api.delete(self._store, some)

    def _keys(self, key: str) -> list[str]:
        """The keys of all files at or below one key, sorted."""
        with self._in_words():
            try:
                self._api.head(self._store, key)
                return [key]
            except FileNotFoundError:
                return sorted(found["path"] for found in self._api.list(self._store, f"{key}/").collect())

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """The border to the store: a missing or existing object is Python's own error, everything else ours."""
        from obstore.exceptions import AlreadyExistsError, BaseError

        try:
            yield
        except AlreadyExistsError:
            raise FileExistsError(self._url) from None
        except BaseError as error:
            raise MachineError(f"{self._url}: {str(error).splitlines()[0]}") from error


@cache
def objects_at(url: str) -> Objects:
    """The objects below a URL, one connection pool a process."""
    return Objects(url)


def _join(key: str, name: str) -> str:
    return key if name == "." else f"{key}/{name}"


def _last_of(key: str, keys: list[str]) -> str | None:
    return next((f"{key}/{name}" for name in _LAST if f"{key}/{name}" in keys), None)


def _whole(key: str, keys: list[str]) -> bool:
    return keys == [key] or _last_of(key, keys) is not None


def _last_at_the_end(key: str, keys: list[str]) -> list[str]:
    last = _last_of(key, keys)
    return [one for one in keys if one != last] + ([last] if last else [])
