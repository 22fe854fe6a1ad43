"""What a Ray cluster that is started here takes of this machine: a port, short paths for sockets, a folder of logs."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from ray._common.utils import get_default_ray_temp_dir

from tuner.errors import MachineError, TunerError

PORTS = range(20_000, 32_768)
"""Nobody takes these by chance: Ray's own and its workers' are 6379, 8265, 10001 to 19999, 44217, 44227 and 52365, and
those that the system gives away begin where these end."""
LONGEST_FOLDER = 24
"""Bytes. A socket's path has at most 103 on macOS and 107 on Linux; Ray needs about 80 of them below its folder."""
_SHORT = "/tmp"
_LINKS = ("session_latest", "prom_metrics_service_discovery.json")
"""Beside the folders of sessions, into the last one."""
_MARK = "tuner.lock"
"""In the folder of a session that tuner started; its driver holds the lock as long as it lives."""


def free_port() -> int:
    """A port for the dashboard that nobody has, and that neither Ray nor the system takes for something else."""
    for port in random.sample(PORTS, 200):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise MachineError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free for Ray's dashboard")


@contextmanager
def short_folder() -> Iterator[None]:
    """Have Ray, and all that is started meanwhile, put its sockets where their paths are short enough.

    A folder for temporary files with a long name is called by a link to it; in place of one that is not there, or
    cannot be written to, /tmp is taken, as Python does. Raises MachineError where that is no way either.
    """
    before = {name: os.environ[name] for name in ("TMPDIR", "RAY_TMPDIR") if os.environ.get(name)}
    os.environ.update({name: _short(folder) for name, folder in before.items()})
    try:
        yield
    finally:
        os.environ.update(before)


def _short(folder: str) -> str:
    folder = os.path.abspath(folder)
    if not _may_write(folder):
        if not _may_write(_SHORT):
            raise MachineError(f"TMPDIR: neither {folder} nor {_SHORT} is a folder that can be written to")
        return _SHORT
    if len(os.fsencode(folder)) <= LONGEST_FOLDER:
        return folder
    link = f"{_SHORT}/tuner-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}"
    with suppress(OSError):
        os.symlink(folder, link)
    if not os.path.islink(link) or os.readlink(link) != folder or os.lstat(link).st_uid != os.getuid():
        raise MachineError(
            f"TMPDIR: {folder} is too long for the paths of sockets, and {link}, a short name for it, cannot be made: "
            f"set TMPDIR to a folder of at most {LONGEST_FOLDER} bytes"
        )
    return link


def _may_write(folder: str) -> bool:
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


@contextmanager
def removed_afterwards(session: Path) -> Iterator[None]:
    """Remove the folder of Ray's session, about a megabyte of logs, after this block.

    It stays where the block fails in a way that nobody foresaw: then its logs may say why.
    """
    lock = FileLock(session / _MARK)
    lock.acquire()
    try:
        yield
    except (TunerError, KeyboardInterrupt):
        _remove(session)
        raise
    except BaseException:
        (session / _MARK).unlink(missing_ok=True)
        raise
    else:
        _remove(session)
    finally:
        lock.release()


def remove_dead_sessions() -> None:
    """Remove what the clusters of drivers that were killed have left: of those that tuner started, no others."""
    for mark in Path(get_default_ray_temp_dir()).glob(f"session_*/{_MARK}"):
        if not mark.parent.is_symlink():
            with suppress(OSError, Timeout), FileLock(mark, timeout=0):
                _remove(mark.parent)


def _remove(session: Path) -> None:
    shutil.rmtree(session, ignore_errors=True)
    if session.exists():  # one of Ray's processes has just written there
        (session / _MARK).touch()
    for name in _LINKS:
        link = session.with_name(name)
        if link.is_symlink() and not link.exists():
            link.unlink(missing_ok=True)
